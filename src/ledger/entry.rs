//! What one call changes in the book, as the journal keeps it.
//!
//! ```text
//! book.settle ─> Entry ─ queue ─> journal ─> disk        replay: Entry ─> book.apply
//! ```
//!
//! An entry holds sums that are decided, and no reservation: what is replayed comes out as it was, and calls that were open are
//! refunded because nothing says that they were.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::{AccountId, KeyId, Millis, ModelId, Neurons, RequestId, UtcDay};
use crate::ledger::window::Charge;

/// One call that has ended, or has passed a long window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place in the order of all: each is one more than the one before.
    pub(super) seq: u64,
    pub(super) at: Millis,
    /// Of windows that survive a restart.
    pub(super) charges: Vec<Charge>,
    pub(super) bill: Option<Bill>,
}

/// What an account owes for a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bill {
    pub(super) request: RequestId,
    pub(super) is_once: bool,
    pub(super) who: Who,
    /// The day on which it was reserved: whose allocation it used.
    pub(super) day: UtcDay,
    /// What counts against the allocation.
    pub(super) free: Charge,
    /// All of it.
    pub(super) neurons: Neurons,
    /// What the plan bills of it.
    pub(super) billed: Neurons,
    /// Money in all.
    pub(super) cost: Neurons,
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) completion_tokens: u32,
}

/// Whose sums, and of what.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Who {
    /// Who pays.
    pub account: AccountId,
    /// With which key, if with one.
    pub key: Option<KeyId>,
    /// Through which gateway; empty for none.
    pub gateway: Arc<str>,
    /// From which provider.
    pub provider: Arc<str>,
    /// Of which model; `other` for what one day had too many of.
    pub model: ModelId,
}
