//! What a call asks of the ledger, and what it hears: plain data.
//!
//! ```text
//! Claim ─ reserve ─> Granted, Standing      or Denied
//! Spent ─ settle
//! ```
//!
//! Decides nothing. The ledger holds no configuration: a claim brings the plan and the limits that bind it, so those of a reload
//! count from the next call on.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::{AccountId, KeyId, ModelId, Neurons, RequestId};
use crate::ledger::window::{Span, Technique, Terms};
use crate::task::Usage;

/// What a call asks to spend.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The call.
    pub request: RequestId,
    /// Who pays.
    pub account: &'a AccountId,
    /// How it pays.
    pub plan: Plan,
    /// The limits that bind it, each id once.
    pub windows: &'a [Window],
    /// Tokens at most, read and produced.
    pub tokens: u64,
    /// Neurons at most, of this machine's models: what the allocation is for.
    pub neurons: Neurons,
    /// Money at most, this machine's models and others': 1,000 neurons are $0.011.
    pub cost: Neurons,
    /// Whether its id is remembered for 48 hours, so that a second run of the same request is not billed.
    pub is_once: bool,
}

/// How an account pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Neurons a UTC day that cost nothing. Zero is none.
    pub allocation: Neurons,
    /// What becomes of calls beyond it.
    pub beyond: Beyond,
    /// What becomes of a call that is given less than it asks for, there or in a budget.
    pub at_limit: AtLimit,
}

/// What becomes of calls beyond the allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Beyond {
    /// They are refused.
    Refuse,
    /// They are billed.
    Bill,
}

/// What becomes of a call whose estimate is more than what is left of its money. With nothing left it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtLimit {
    /// It holds what is left and may go on to its end. What that takes beyond the limit counts in the next day or window.
    Finish,
    /// It is granted what is left, and whoever runs it ends it there.
    Cut,
}

impl Plan {
    /// 10,000 neurons a day, nothing beyond.
    pub const FREE: Self =
        Self { allocation: Neurons::from_micro(10_000_000_000), beyond: Beyond::Refuse, at_limit: AtLimit::Finish };
    /// 10,000 neurons a day, and what is beyond is billed.
    pub const PAID: Self = Self { beyond: Beyond::Bill, ..Self::FREE };
}

/// A limit on what passes in a stretch of time. A budget is one that counts neurons or cost. No limit is no window: zero lets
/// nothing through.
#[derive(Debug, Clone)]
pub struct Window {
    /// Whose counter: a hash of the rule and of the values it tells apart, a good one (SHA-256, or one with a secret), or
    /// callers could make theirs meet. One id with another span begins anew.
    pub id: u128,
    /// The rule's name in refusals.
    pub rule: Arc<str>,
    /// Requests, tokens or micro-neurons.
    pub limit: u64,
    /// How long it is.
    pub span: Span,
    /// How it moves.
    pub technique: Technique,
    /// What it counts.
    pub counts: Counts,
}

impl Window {
    pub(super) fn terms(&self) -> Terms {
        Terms { limit: self.limit, span: self.span, technique: self.technique }
    }
}

/// What a window counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// Calls, charged as they come and not given back.
    Requests,
    /// Tokens read and produced.
    Tokens,
    /// Neurons of this machine's models.
    Neurons,
    /// Money, in neurons.
    Cost,
}

impl Counts {
    /// Whether a window that counts this is a budget.
    pub const fn is_money(self) -> bool {
        matches!(self, Self::Neurons | Self::Cost)
    }
}

/// What a call may spend: its estimate, or less where a plan cuts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Of this machine's models.
    pub neurons: Neurons,
    /// Of money in all.
    pub cost: Neurons,
}

/// How a limit stands, for the headers of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The rule's name.
    pub rule: Arc<str>,
    /// What is counted.
    pub counts: Counts,
    /// Of how many.
    pub limit: u64,
    /// How many are left, those of calls that have not ended taken off.
    pub left: u64,
    /// Milliseconds until the window that counts now is over.
    pub reset_ms: u64,
}

/// Why a call may not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// A limit is reached. Nothing was charged anywhere.
    Over(Over),
    /// A call that counts once was settled before: what it was answered is known already.
    Settled,
    /// The limit is shared, what is leased of it here does not suffice, and more is not to be had: [`Ledger::claim`] asks the fleet for
    /// it, whose store does not answer.
    ///
    /// [`Ledger::claim`]: crate::ledger::Ledger::claim
    Unleased,
    /// The disk cannot keep what calls cost, or not as fast as they end.
    Faulty,
    /// The ledger has died. The process is about to end.
    Dead,
}

/// The limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Over {
    /// Which limit.
    pub what: What,
    /// The rule's name; `allocation` for that one.
    pub rule: Arc<str>,
    /// What it counts.
    pub counts: Counts,
    /// Of how many.
    pub limit: u64,
    /// How many are left: fewer than were asked for.
    pub left: u64,
    /// Milliseconds until there is room, if nobody else takes it. `None`: it asks for more than the limit, so there never is.
    pub retry_after_ms: Option<u64>,
}

/// The kinds of limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A window that counts requests or tokens.
    Window,
    /// A window that counts money.
    Budget,
    /// The account's neurons of the day.
    Allocation,
}

/// What a call has used.
#[derive(Debug, Clone)]
pub struct Spent {
    /// With which key, if with one.
    pub key: Option<KeyId>,
    /// Through which gateway; empty for none.
    pub gateway: Arc<str>,
    /// From which provider.
    pub provider: Arc<str>,
    /// Of which model.
    pub model: ModelId,
    /// How much, in tokens.
    pub usage: Usage,
    /// Neurons of this machine's models.
    pub neurons: Neurons,
    /// Money in all.
    pub cost: Neurons,
}
