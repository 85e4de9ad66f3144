//! What is asked of the fleet's store, and what it says: plain data.

use crate::base::AccountId;
use crate::ledger::window::Span;

/// Which counter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    Window(u128, Span),
    /// An account's neurons of the day.
    Allocation(AccountId),
}

/// What the store is to lease of one stretch of a counter, in all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) place: Place,
    pub(super) span: Span,
    pub(super) index: u64,
    /// Of the counter: one that began anew has a lease of its own.
    pub(super) epoch: u32,
    /// Whether what an earlier process leased is this counter's.
    pub(super) adopts: bool,
    /// At least.
    pub(super) keep: u64,
    /// What calls wait for, beyond that.
    pub(super) need: u64,
    /// What they will want next.
    pub(super) ahead: u64,
    /// `None`: not known yet, and nothing is asked for.
    pub(super) limit: Option<u64>,
    /// How much of the stretch before still counts: so many parts of so many.
    pub(super) fade: Option<(u64, u64)>,
}

/// What the store says to an ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) place: Place,
    pub(super) index: u64,
    pub(super) epoch: u32,
    /// Leased.
    pub(super) grant: u64,
    /// Leased to others.
    pub(super) others: u64,
    /// Taken beyond the limit of stretches before.
    pub(super) carried: u64,
    /// Leased of the stretch before, to all.
    pub(super) before: u64,
    /// What was needed is not there.
    pub(super) is_short: bool,
    /// Somebody needed what was not there.
    pub(super) is_hungry: bool,
    /// The store knew of an earlier ask for this stretch.
    pub(super) is_known: bool,
}
