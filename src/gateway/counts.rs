//! The series that every call through a gateway counts in. A worker resolves them once: to find one by its labels takes
//! longer than to count.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use crate::base::Lookup;
use crate::gateway::bill::Charge;
use crate::logs::{CacheUse, Logs};
use crate::metrics::Metrics;

/// How a call ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// With a whole answer.
    Done,
    /// With an answer that is a failure, or broke off.
    Failed,
    /// The caller left before.
    Cancelled,
    /// With a refusal of ours.
    Refused,
}

impl Outcome {
    /// All there are, in order.
    pub const ALL: [Self; 4] = [Self::Done, Self::Failed, Self::Cancelled, Self::Refused];

    /// Its name in metrics and the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
        }
    }
}

/// See the top of this file.
pub struct Counts {
    /// All series, for what happens seldom.
    pub metrics: Arc<Metrics>,
    /// Where records go.
    pub logs: Logs,
    /// Bytes of each body that a record keeps.
    pub body_bytes: usize,
    /// Calls under way.
    pub in_flight: IntGauge,
    /// What the gateway itself took of calls, in seconds.
    pub overhead: Histogram,
    outcomes: [IntCounter; Outcome::ALL.len()],
    caches: [IntCounter; CacheUse::ALL.len()],
    upstreams: Upstreams,
    providers: RefCell<Lookup<Box<str>, Rc<Provider>>>,
}

/// A worker's stripes of what is counted by provider.
struct Upstreams {
    attempts: IntCounterVec,
    first_byte: HistogramVec,
    tokens: IntCounterVec,
    cost: IntCounterVec,
    unpriced: IntCounterVec,
}

/// Those of one provider.
pub struct Provider {
    /// Attempts that were answered.
    pub answered: IntCounter,
    /// Seconds to the head of an answer.
    pub first_byte: Histogram,
    prompt: IntCounter,
    cached: IntCounter,
    completion: IntCounter,
    cost: IntCounter,
    unpriced: IntCounter,
    slug: Arc<str>,
}

impl Provider {
    /// What the ledger calls a provider that counts here: a custom one by its own name.
    pub fn slug(&self, name: &str) -> Arc<str> {
        if *self.slug == *name { self.slug.clone() } else { name.into() }
    }

    /// What an answer came to.
    pub fn charged(&self, charge: &Charge) {
        if let Some(usage) = &charge.usage {
            self.prompt.inc_by(u64::from(usage.prompt_tokens));
            self.cached.inc_by(u64::from(usage.cached_tokens));
            self.completion.inc_by(u64::from(usage.completion_tokens));
        }
        self.cost.inc_by(charge.cost.micro());
        if charge.unpriced {
            self.unpriced.inc();
        }
    }
}

impl Counts {
    /// Resolves what is known beforehand.
    pub fn new(metrics: Arc<Metrics>, logs: Logs, body_bytes: usize) -> Self {
        let (calls, cache) = (metrics.gateway_calls.own(), metrics.gateway_cache.own());
        Self {
            in_flight: metrics.gateway_in_flight.own(),
            overhead: metrics.gateway_overhead.own(),
            outcomes: Outcome::ALL.map(|outcome| calls.with_label_values(&[outcome.as_str()])),
            caches: CacheUse::ALL.map(|state| cache.with_label_values(&[state.as_str()])),
            upstreams: Upstreams {
                attempts: metrics.upstream_attempts.own(),
                first_byte: metrics.upstream_first_byte.own(),
                tokens: metrics.upstream_tokens.own(),
                cost: metrics.upstream_cost.own(),
                unpriced: metrics.upstream_unpriced.own(),
            },
            providers: RefCell::default(),
            metrics,
            logs,
            body_bytes,
        }
    }

    /// Calls that ended so.
    pub fn outcome(&self, outcome: Outcome) -> &IntCounter {
        &self.outcomes[outcome as usize]
    }

    /// Calls that the cache did this for.
    pub fn cache(&self, cache: CacheUse) -> &IntCounter {
        &self.caches[cache as usize]
    }

    /// A provider's; `name` is of a closed set ([`label`](crate::gateway::record::label)).
    pub fn provider(&self, name: &str) -> Rc<Provider> {
        if let Some(known) = self.providers.borrow().get(name) {
            return known.clone();
        }
        let upstreams = &self.upstreams;
        let tokens = |kind| upstreams.tokens.with_label_values(&[name, kind]);
        let provider = Rc::new(Provider {
            answered: upstreams.attempts.with_label_values(&[name, "ok"]),
            first_byte: upstreams.first_byte.with_label_values(&[name]),
            prompt: tokens("prompt"),
            cached: tokens("cached"),
            completion: tokens("completion"),
            cost: upstreams.cost.with_label_values(&[name]),
            unpriced: upstreams.unpriced.with_label_values(&[name]),
            slug: name.into(),
        });
        self.providers.borrow_mut().insert(name.into(), provider.clone());
        provider
    }
}
