//! One call, parsed and authenticated.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::base::{AccountId, KeyId, RequestId};
use crate::config::{Budget, CatalogEntry};
use crate::gateway::bill::Tally;
use crate::gateway::limits::Ruled;
use crate::ledger::Standing;
use crate::task::TextInput;

/// What a surface makes of a request before it asks the gateway to serve it.
#[derive(Debug, Clone)]
pub struct Call<Input = TextInput> {
    /// From `x-request-id` or fresh.
    pub id: RequestId,
    /// Who pays.
    pub account: AccountId,
    /// With which token, if any.
    pub key: Option<KeyId>,
    /// Which model, aliases resolved.
    pub entry: Arc<CatalogEntry>,
    /// What is asked.
    pub input: Input,
    /// `x-session-affinity`: requests that share it share a device and its prefix cache.
    pub affinity: Option<String>,
    /// Fail at once instead of waiting in the queue.
    pub reject_if_busy: bool,
    /// When the request's head arrived.
    pub received: Instant,
    /// By what it is measured.
    pub terms: Terms,
}

/// By what a call of this machine's models is measured: whose plan, which limits, who hears what it used. Nothing of it for calls that
/// nobody waits for.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// The operator's own rules that it falls under.
    pub ruled: Ruled,
    /// Of the token that was shown.
    pub budget: Budget,
    /// Through which gateway it came; that has looked at rules and at budgets of money already.
    pub gateway: Option<Arc<str>>,
    /// Where the gateway hears what it used.
    pub tally: Option<Tally>,
    /// Where the surface hears how the tightest limit stands.
    pub standing: Arc<OnceLock<Standing>>,
    /// Another call of the same request counts as the request; this one counts what it uses.
    pub is_part: bool,
    /// A second run of the same call, after a crash, is not billed again.
    pub is_once: bool,
}
