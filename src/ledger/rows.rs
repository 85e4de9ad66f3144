//! Who used what: sums by day, account, key, gateway, provider and model. Pure.
//!
//! ```text
//! Bill ─> day ─> Who ─> Row        400 days, and so many rows in all: the oldest day goes first
//! ```
//!
//! Belongs to the journal's thread: no request waits for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::{AccountId, KeyId, ModelId, Neurons, UtcDay};
use crate::ledger::entry::{Bill, Who};

/// Days that are kept.
const DAYS: u32 = 400;
/// What stands for a model when one day alone has too many rows.
const OTHER: &str = "other";

/// What was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Calls settled.
    pub requests: u64,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
    /// Of those, tokens out of the prefix cache.
    pub cached_tokens: u64,
    /// Tokens produced.
    pub completion_tokens: u64,
    /// Of this machine's models.
    pub neurons: Neurons,
    /// Of those, what was beyond the allocation and is billed.
    pub billed: Neurons,
    /// Money in all.
    pub cost: Neurons,
}

impl Row {
    /// Adds another's sums.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.neurons = self.neurons + other.neurons;
        self.billed = self.billed + other.billed;
        self.cost = self.cost + other.cost;
    }
}

/// Which rows. `None` is all.
#[derive(Debug, Clone)]
pub struct Filter {
    /// The first day.
    pub from: UtcDay,
    /// The last day.
    pub to: UtcDay,
    /// Of this account.
    pub account: Option<AccountId>,
    /// Of this key.
    pub key: Option<KeyId>,
    /// Of this gateway.
    pub gateway: Option<Arc<str>>,
    /// Of this provider.
    pub provider: Option<Arc<str>>,
    /// Of this model.
    pub model: Option<ModelId>,
    /// Only those behind this one: the last of the page before.
    pub after: Option<(UtcDay, Who)>,
    /// Rows at most.
    pub most: usize,
}

impl Default for Filter {
    fn default() -> Self {
        let (from, to) = (UtcDay(0), UtcDay(u32::MAX));
        Self {
            from,
            to,
            account: None,
            key: None,
            gateway: None,
            provider: None,
            model: None,
            after: None,
            most: usize::MAX,
        }
    }
}

impl Filter {
    /// All rows of these days.
    pub fn days(from: UtcDay, to: UtcDay) -> Self {
        let (account, key, gateway, provider, model, after) = Default::default();
        Self { from, to, account, key, gateway, provider, model, after, most: usize::MAX }
    }

    fn takes(&self, day: UtcDay, who: &Who) -> bool {
        self.account.as_ref().is_none_or(|account| *account == who.account)
            && self.key.as_ref().is_none_or(|key| Some(key) == who.key.as_ref())
            && self.gateway.as_ref().is_none_or(|gateway| *gateway == who.gateway)
            && self.provider.as_ref().is_none_or(|provider| *provider == who.provider)
            && self.model.as_ref().is_none_or(|model| *model == who.model)
            && self.after.as_ref().is_none_or(|(known, last)| day > *known || who > last)
    }
}

/// All rows there are.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Rows {
    days: BTreeMap<UtcDay, HashMap<Who, Row>>,
    #[serde(skip)]
    count: usize,
    #[serde(skip)]
    most: usize,
}

impl Rows {
    /// Bounds the table.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most.max(1);
        self.count = self.days.values().map(HashMap::len).sum();
    }

    pub(super) fn add(&mut self, bill: &Bill) {
        let row = Row {
            requests: 1,
            prompt_tokens: bill.prompt_tokens.into(),
            cached_tokens: bill.cached_tokens.into(),
            completion_tokens: bill.completion_tokens.into(),
            neurons: bill.neurons,
            billed: bill.billed,
            cost: bill.cost,
        };
        if let Some(known) = self.days.get_mut(&bill.day).and_then(|day| day.get_mut(&bill.who)) {
            return known.add(&row);
        }
        self.forget_before(UtcDay(bill.day.0.saturating_sub(DAYS - 1)));
        while self.count >= self.most
            && let Some(oldest) = self.days.keys().next().copied().filter(|oldest| *oldest < bill.day)
        {
            self.forget_before(UtcDay(oldest.0 + 1));
        }
        let mut who = bill.who.clone();
        if self.count >= self.most {
            // Accounts are as many as there are; models are what callers write.
            who = Who { key: None, gateway: "".into(), provider: "".into(), model: ModelId::new(OTHER), ..who };
        }
        let day = self.days.entry(bill.day).or_default();
        let before = day.len();
        day.entry(who).or_default().add(&row);
        self.count += day.len() - before;
    }

    /// Oldest day first, by account within it.
    pub(super) fn find(&self, filter: &Filter) -> Vec<(UtcDay, Who, Row)> {
        let from = filter.after.as_ref().map_or(filter.from, |(day, _)| filter.from.max(*day));
        let mut found = Vec::new();
        if from > filter.to {
            return found;
        }
        for (day, rows) in self.days.range(from..=filter.to) {
            let begin = found.len();
            let rows = rows.iter().filter(|(who, _)| filter.takes(*day, who));
            found.extend(rows.map(|(who, row)| (*day, who.clone(), *row)));
            found[begin..].sort_unstable_by(|(_, a, _), (_, b, _)| a.cmp(b));
            if found.len() >= filter.most {
                found.truncate(filter.most);
                break;
            }
        }
        found
    }

    fn forget_before(&mut self, day: UtcDay) {
        while let Some(oldest) = self.days.first_entry().filter(|oldest| *oldest.key() < day) {
            self.count -= oldest.remove().len();
        }
    }
}
