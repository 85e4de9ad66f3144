//! What is told of calls afterwards: kept and listed, counted, and shipped to where it is kept for good.
//!
//! ```text
//!   gateway ─ append ─> queue ─> writer ─┬─ analytics: sums and quantiles by minute, hour and day
//!                      (bounded)         ├─ redact ─> store: records and bodies, for lists
//!                                        ├─────────> ship: spool ─> bucket, folder, collector
//!                                        └─────────> trace: spans, to whom the gateway says
//! ```
//!
//! No call waits for any of it: a queue that is full costs bodies first and then records, and both are counted. What must not be
//! lost, money, is the ledger's. Nothing here reaches a disk before it is redacted.

pub mod analytics;
mod clean;
mod post;
mod query;
mod record;
mod redact;
mod render;
pub mod ship;
mod store;
pub mod trace;
mod writer;

pub use query::{Filter, Query};
pub use record::{Body, CacheUse, Record, Text};
pub use redact::{Redactor, Rule as RedactRule, Rules as RedactRules};
pub use render::{detail, item, moment, result_info};
pub use store::{Keep, Page, Patch, Settings as StoreSettings, Store, Stored, Strategy, Sums};
pub use writer::{Logs, Push, Settings};
