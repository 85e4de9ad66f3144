//! The response cache: whole answers by what was asked, in memory and on disk, and one upstream call for all who ask the
//! same at the same time.
//!
//! ```text
//!   Material ─> RawKey ─ peek ──────────────────────────────────> Entry           most hits: one hash, one look
//!          └──> Key ─── lookup ─> Hit ───────────────────────────> Entry
//!                          ├────> Fill ─> FillTicket ─ upstream ─> stored  ┐   and sent to the others of a fleet
//!                          ├────> Follow ─> Follower <─ chunks as they come┘
//!                          └────> Off: go upstream, as if there were no cache
//! ```
//!
//! - **Only whole, good answers are stored**: no errors, nothing partial, nothing over the size limit.
//! - **Purging is a number.** Each scope (a gateway, a custom provider) has a generation; an entry belongs to those of its
//!   beginning, and one of an earlier generation is not served. Nothing is searched for, and fills under way are purged too.
//! - **A crash loses, and never spoils.** Entries are written at once and synced every few seconds. A killed process loses
//!   nothing, a machine without power what was written since. A torn end is cut, a damaged frame is a miss.
//! - **A fleet's answers are hits here too** (`fleet.rs`): who would go upstream asks the store that daemons share.
//! - **No trouble of the cache's is the caller's.** It is a miss, or `Off`.
//!
//! Knows nothing of HTTP beyond statuses and headers as bytes, nor of who may share answers with whom: the caller says what
//! a key is made of and how long an answer is kept.

mod actor;
mod buffer;
mod disk;
mod entry;
mod fill;
mod fleet;
mod handle;
mod index;
mod json;
mod key;
mod settings;
mod view;

#[cfg(test)]
mod tests;

pub use buffer::FailedAnswer;
pub use entry::{Entry, Head};
pub use fill::{FillTicket, Follower, Found, Lead, Unwanted};
pub use fleet::Fleet;
pub use handle::Cache;
pub use key::{Common, Key, Material, RawKey, Scope};
pub use settings::{Settings, Stats};
