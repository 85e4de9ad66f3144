//! One call, parsed and authenticated.

use std::sync::Arc;
use std::time::Instant;

use crate::base::{AccountId, KeyId, RequestId};
use crate::config::CatalogEntry;
use crate::gateway::terms::Terms;
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
