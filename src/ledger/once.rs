//! Ids of calls that count once, remembered for a while. Pure.

use std::collections::{HashSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::base::{Millis, RequestId};

/// How long the id of a call that counts once is remembered, in milliseconds.
pub(super) const ONCE: u64 = 48 * 3_600_000;
/// So many are remembered at most; beyond it the oldest are forgotten early.
const MAX_ONCE: usize = 1 << 20;

/// Ids of calls that count once, and when they were settled.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Once {
    order: VecDeque<(Millis, RequestId)>,
    #[serde(skip)]
    known: HashSet<RequestId>,
}

impl Once {
    /// Completes one that was read.
    pub(super) fn restore(&mut self) {
        self.known = self.order.iter().map(|(_, request)| *request).collect();
    }

    pub(super) fn has(&self, request: RequestId) -> bool {
        self.known.contains(&request)
    }

    pub(super) fn insert(&mut self, request: RequestId, now: Millis) {
        while let Some((at, oldest)) = self.order.front().copied()
            && (at.0.saturating_add(ONCE) < now.0 || self.order.len() >= MAX_ONCE)
        {
            self.order.pop_front();
            self.known.remove(&oldest);
        }
        if self.known.insert(request) {
            self.order.push_back((now, request));
        }
    }
}
