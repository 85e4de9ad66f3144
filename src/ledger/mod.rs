//! Who may use what, and who has: every call is reserved by estimate before it runs and settled by use when it ends.
//!
//! ```text
//! reserve(claim) ─> Reservation ─ settle(spent) ─> sums of accounts and windows, at once ─ queue ─> journal ─> disk, rows
//!        │                └────── dropped ───────> released, nothing charged
//!        └─> Denied: which limit, what is left, when to come again
//! ```
//!
//! - **Exact.** Allocations, budgets and rate windows are one kind of counter. All limits of a claim are looked at before any is
//!   charged, and what is held counts, so no number of calls at once passes a limit by one. What settles beyond its estimate
//!   is carried on as debt.
//! - **A lock, not an actor.** Asking a thread costs two switches of threads, tens of microseconds and more than a whole hit
//!   of the cache; a few additions under a short lock cost a fraction of one. The book is pure and private, nothing waits or
//!   allocates much under the lock, and its order is the journal's: entries are queued under it. The lock is the standard
//!   library's because it knows when somebody panicked inside: such a book is used by nobody again, and
//!   [`Ledger::is_alive`] says so.
//! - **Settled is on disk** when the [`Ticket`] says so: one sync for all of some milliseconds. Written it is before: what a
//!   process that is killed loses is what it settled in the last of them. Reservations are not written at all, so a crash
//!   refunds them. Rows by day, and snapshots, belong to the journal's thread; no call waits for them.
//! - **The disk may fail.** What is admitted can be settled, waits in memory, and is written when the disk is back; new calls
//!   are refused meanwhile or go on unmetered.
//! - **A fleet may share the counters.** Then a call takes of a lease, and [`Ledger::claim`] waits where there is none. Leases add
//!   up to the limit at most; who hands them out is a store that runs one script (`fleet.lua`).
//!
//! Knows no prices, no HTTP and no configuration beyond [`Settings`]: a claim brings its plan and its limits.

mod ask;
mod book;
mod claim;
mod entry;
mod fleet;
mod folder;
mod handle;
mod journal;
mod kept;
mod lease;
mod member;
mod once;
mod rows;
mod share;
mod shared;
mod table;
mod wait;
mod window;

pub use book::{AccountTotals, Book, Open};
pub use claim::{AtLimit, Beyond, Claim, Counts, Denied, Granted, Over, Plan, Spent, Standing, What, Window};
pub use entry::Who;
pub use fleet::{Fleet, OnLoss};
pub use handle::{Ledger, Reservation, Settings, Ticket};
pub use rows::{Filter, Row};
pub use shared::{FleetHealth, Health, OnFault};
pub use window::{Span, Technique};

#[cfg(test)]
mod kill_test;
#[cfg(test)]
mod model_store;
#[cfg(test)]
mod model_test;
