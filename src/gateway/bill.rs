//! What an attempt costs, from the claim before it is sent to the settlement when its answer has ended.
//!
//! ```text
//!   step ─ limits, budgets ─ reserve ─> Bill ─ goes with the answer ─ end, or dropped: usage x price ─> ledger
//!                                                                                    └─> Receipt ─> record of the call
//! ```
//!
//! It goes with the answer that the upstream gives, not with the caller: whoever leaves an answer that others read, or that
//! is being kept, leaves the bill behind as well. What upstreams do not count is estimated and marked so, never nothing.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use memchr::memmem::Finder;
use parking_lot::Mutex;

use crate::base::{KeyId, Millis, ModelId, Neurons};
use crate::config::Tariff;
use crate::gateway::options::CustomCost;
use crate::ledger::{Reservation, Spent};
use crate::task::Usage;

/// Bytes of a token, where nobody counted them: of a text, and of a stream with its wrapping.
const TEXT_BYTES: u64 = 4;
const EVENT_BYTES: u64 = 200;
/// Tokens of an answer to a request that sets no bound.
const USUAL_ANSWER: u64 = 1024;

/// What an answer came to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Charge {
    /// Tokens, if they were counted or can be estimated.
    pub usage: Option<Usage>,
    /// They are an estimate.
    pub estimated: bool,
    /// What it costs.
    pub cost: Neurons,
    /// No price is known: it costs something, and nobody knows what.
    pub unpriced: bool,
    /// A stored key stood in for the caller's.
    pub stored_key: bool,
}

/// Where the record of a call finds what its answer came to, once that is known.
pub type Receipt = Rc<OnceCell<Charge>>;

/// Where the engine of this process says what a call used of it.
pub type Tally = Arc<Mutex<Option<(Usage, Neurons)>>>;

/// See the top of this file.
pub struct Bill {
    /// Held until the answer has ended.
    pub reservation: Option<Reservation>,
    /// Which of our tokens was shown.
    pub key: Option<KeyId>,
    /// Through which gateway.
    pub gateway: Arc<str>,
    /// Who answers.
    pub provider: Arc<str>,
    /// With which model.
    pub model: ModelId,
    /// How it is priced, unless the caller says it.
    pub pricing: Pricing,
    /// What the caller says.
    pub custom: Option<CustomCost>,
    /// A stored key stands in for the caller's.
    pub stored_key: bool,
    /// Bytes of the request.
    pub asked: usize,
    /// For the record.
    pub receipt: Receipt,
}

/// How an answer is priced.
pub enum Pricing {
    /// The engine of this process does, and writes it down itself.
    Local(Tally),
    /// By the list, if the model is in it.
    Listed(Option<Tariff>),
}

impl Bill {
    /// Where the engine of this process is to say what it used.
    pub fn tally(&self) -> Option<Tally> {
        match &self.pricing {
            Pricing::Local(tally) => Some(tally.clone()),
            Pricing::Listed(_) => None,
        }
    }

    /// The answer has ended, or nobody reads it any more. `usage` is what it said, `answered` how many bytes came, as events
    /// or not.
    pub fn settle(mut self, usage: Option<Usage>, answered: u64, events: bool) {
        let charge = Charge { stored_key: self.stored_key, ..self.charge(usage, answered, events) };
        // Whoever was to read it may be gone.
        let _ = self.receipt.set(charge);
        let Some(reservation) = self.reservation.take() else { return };
        let now = Millis::now();
        if matches!(self.pricing, Pricing::Local(_)) {
            // The engine has its own line in the ledger; what counts here are the limits of this call.
            reservation.count(&charge.usage.unwrap_or_default(), charge.cost, now);
            return;
        }
        let spent = Spent {
            key: self.key.take(),
            gateway: self.gateway.clone(),
            provider: self.provider.clone(),
            model: self.model.clone(),
            usage: charge.usage.unwrap_or_default(),
            neurons: Neurons::ZERO,
            cost: charge.cost,
        };
        drop(reservation.settle(&spent, now));
    }

    fn charge(&self, usage: Option<Usage>, answered: u64, events: bool) -> Charge {
        let told = match &self.pricing {
            Pricing::Local(tally) => tally.lock().map(|(usage, _)| usage),
            Pricing::Listed(_) => usage,
        };
        if let Some(custom) = self.custom {
            let cost = Neurons::from_usd(custom.of(told.as_ref()).max(0.0));
            return Charge { usage: told, cost, ..Charge::default() };
        }
        match &self.pricing {
            Pricing::Local(tally) => {
                let told = *tally.lock();
                Charge {
                    usage: told.map(|(usage, _)| usage),
                    cost: told.map_or(Neurons::ZERO, |(_, neurons)| neurons),
                    ..Charge::default()
                }
            }
            Pricing::Listed(tariff) => {
                let Some(tariff) = tariff else {
                    return Charge { usage, unpriced: true, ..Charge::default() };
                };
                let estimated = usage.is_none();
                let usage = usage.unwrap_or_else(|| estimate(self.asked as u64, answered, events));
                let cost = tariff.charge(&usage);
                Charge { usage: Some(usage), estimated, cost, ..Charge::default() }
            }
        }
    }
}

/// What a request may come to at most, by its length and what it says: for limits, before anybody counts.
///
/// A body that nowhere has one of the names is not parsed. One that escapes their letters passes for one that sets no bound.
pub fn most(body: &[u8]) -> Usage {
    /// What the names of all bounds of length have in common, and the number of answers.
    static NAMES: LazyLock<[Finder<'static>; 2]> = LazyLock::new(|| [Finder::new("tokens\""), Finder::new("\"n\"")]);
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Bounds {
        max_tokens: Option<u64>,
        max_completion_tokens: Option<u64>,
        max_output_tokens: Option<u64>,
        n: Option<u64>,
    }
    let says = NAMES.iter().any(|name| name.find(body).is_some());
    let bounds: Bounds = says.then(|| serde_json::from_slice(body).ok()).flatten().unwrap_or_default();
    let most = bounds.max_completion_tokens.or(bounds.max_tokens).or(bounds.max_output_tokens);
    let completion = most.unwrap_or(USUAL_ANSWER).saturating_mul(bounds.n.unwrap_or(1).max(1));
    let completion_tokens = u32::try_from(completion).unwrap_or(u32::MAX);
    Usage { completion_tokens, ..estimate(body.len() as u64, 0, false) }
}

/// Tokens by bytes.
pub fn estimate(asked: u64, answered: u64, events: bool) -> Usage {
    let tokens = |bytes: u64, each: u64| u32::try_from(bytes.div_ceil(each)).unwrap_or(u32::MAX);
    Usage {
        prompt_tokens: tokens(asked, TEXT_BYTES),
        completion_tokens: tokens(answered, if events { EVENT_BYTES } else { TEXT_BYTES }),
        ..Usage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Tariffs;

    fn charge(pricing: Pricing, custom: Option<CustomCost>, model: &str, usage: Option<Usage>) -> Charge {
        let receipt = Receipt::default();
        let bill = Bill {
            reservation: None,
            key: None,
            gateway: "g".into(),
            provider: "openai".into(),
            model: ModelId::new(model),
            pricing,
            custom,
            stored_key: false,
            asked: 4000,
            receipt: receipt.clone(),
        };
        bill.settle(usage, 400, false);
        *receipt.get().unwrap()
    }

    fn listed(model: &str) -> Pricing {
        Pricing::Listed(Tariffs::load(None).unwrap().find("openai", model).copied())
    }

    #[test]
    fn what_nobody_counted_is_estimated_and_marked() {
        let usage = Usage { prompt_tokens: 1000, completion_tokens: 100, ..Usage::default() };
        let counted = charge(listed("gpt-4o"), None, "gpt-4o", Some(usage));
        let estimated = charge(listed("gpt-4o"), None, "gpt-4o", None);
        assert_eq!((counted.cost, counted.estimated), (estimated.cost, false));
        assert!(estimated.estimated && estimated.cost > Neurons::ZERO);
    }

    #[test]
    fn a_model_without_a_price_is_marked_and_the_callers_own_price_counts() {
        let unknown = charge(listed("nobody-knows-me"), None, "nobody-knows-me", None);
        assert_eq!((unknown.cost, unknown.unpriced), (Neurons::ZERO, true));
        let total = charge(listed("nobody-knows-me"), Some(CustomCost::Total(0.11)), "nobody-knows-me", None);
        assert_eq!((total.cost, total.unpriced), (Neurons::from_micro(10_000_000_000), false));
    }

    #[test]
    fn the_engine_says_itself_what_it_took() {
        let (usage, neurons) = (Usage { prompt_tokens: 7, ..Usage::default() }, Neurons::from_micro(9));
        let told = charge(Pricing::Local(Arc::new(Mutex::new(Some((usage, neurons))))), None, "m", None);
        assert_eq!((told.usage, told.cost), (Some(usage), neurons));
        let silent = charge(Pricing::Local(Tally::default()), None, "m", None);
        assert_eq!((silent.usage, silent.cost), (None, Neurons::ZERO));
    }
}
