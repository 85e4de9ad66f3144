//! What a row of an answer is told of, by name: sums, averages, quantiles, ratios. What is told is ordered by, too.

use serde_json::Value;

use crate::base::Neurons;
use crate::logs::analytics::block::Line;
use crate::logs::analytics::row::{Counts, Key};
use crate::logs::record::CacheUse;

/// What a row has under one name.
#[derive(Debug)]
pub(super) struct Measure {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
    pub(super) of: fn(&Row) -> Value,
}

const fn sum(name: &'static str, of: fn(&Row) -> Value) -> Measure {
    Measure { section: "sum", name, of }
}

const fn avg(name: &'static str, of: fn(&Row) -> Value) -> Measure {
    Measure { section: "avg", name, of }
}

const fn quantile(name: &'static str, of: fn(&Row) -> Value) -> Measure {
    Measure { section: "quantiles", name, of }
}

const fn ratio(name: &'static str, of: fn(&Row) -> Value) -> Measure {
    Measure { section: "ratio", name, of }
}

pub(super) static COUNT: Measure =
    Measure { section: "count", name: "count", of: |row| row.sum.counts.requests.into() };

/// All but `count`, in the order in which they are told.
pub(super) static MEASURES: [Measure; 31] = [
    // In USD; nothing for answers from the cache.
    sum("cost", |row| Neurons::from_micro(row.sum.counts.cost).rounded_usd().into()),
    // What those would have cost.
    sum("savedCost", |row| Neurons::from_micro(row.sum.counts.saved).rounded_usd().into()),
    sum("totalNeurons", |row| Neurons::from_micro(row.sum.counts.cost).as_f64().into()),
    sum("savedNeurons", |row| Neurons::from_micro(row.sum.counts.saved).as_f64().into()),
    sum("cachedRequests", |row| row.sum.hits.into()),
    // Without a whole answer of a status under 400; the next two go by the status alone.
    sum("erroredRequests", |row| row.sum.counts.failed.into()),
    sum("requests4xx", |row| row.sum.status_4xx.into()),
    sum("requests5xx", |row| row.sum.status_5xx.into()),
    // Answered, but nobody said how many tokens it took: these are missing in the sums of tokens.
    sum("unmeteredRequests", |row| row.sum.counts.unmetered.into()),
    sum("totalInputTokens", |row| row.sum.counts.tokens_in.into()),
    sum("totalOutputTokens", |row| row.sum.counts.tokens_out.into()),
    // Of answers from the response cache, and of all others.
    sum("cachedTokensIn", |row| row.sum.hit_tokens_in.into()),
    sum("cachedTokensOut", |row| row.sum.hit_tokens_out.into()),
    sum("uncachedTokensIn", |row| row.sum.counts.tokens_in.saturating_sub(row.sum.hit_tokens_in).into()),
    sum("uncachedTokensOut", |row| row.sum.counts.tokens_out.saturating_sub(row.sum.hit_tokens_out).into()),
    // That a provider had in its own cache of prompts.
    sum("promptCachedTokens", |row| row.sum.counts.prompt_cached.into()),
    sum("bytesIn", |row| row.sum.counts.bytes_in.into()),
    sum("bytesOut", |row| row.sum.counts.bytes_out.into()),
    avg("latency", |row| share(row.sum.counts.latency as f64 / 1000.0, row.sum.counts.requests)),
    avg("ttft", |row| share(row.sum.counts.ttft as f64 / 1000.0, row.sum.counts.answered)),
    avg("tokensPerRequest", |row| {
        let tokens = row.sum.counts.tokens_in.saturating_add(row.sum.counts.tokens_out);
        share(tokens as f64, row.sum.counts.requests)
    }),
    quantile("latencyP50", |row| milliseconds(row.latency, 0)),
    quantile("latencyP95", |row| milliseconds(row.latency, 1)),
    quantile("latencyP99", |row| milliseconds(row.latency, 2)),
    quantile("ttftP50", |row| milliseconds(row.ttft, 0)),
    quantile("ttftP95", |row| milliseconds(row.ttft, 1)),
    quantile("ttftP99", |row| milliseconds(row.ttft, 2)),
    // Of the calls that asked the cache.
    ratio("cacheHits", |row| share(row.sum.hits as f64, row.sum.looked_up)),
    ratio("errored", |row| share(row.sum.counts.failed as f64, row.sum.counts.requests)),
    ratio("requests4xx", |row| share(row.sum.status_4xx as f64, row.sum.counts.requests)),
    ratio("requests5xx", |row| share(row.sum.status_5xx as f64, row.sum.counts.requests)),
];

impl Measure {
    pub(super) fn count() -> &'static Self {
        &COUNT
    }

    /// By its name, or with its section before it: `cost`, `sum_cost`. Of two of one name the first.
    pub(super) fn find(text: &str) -> Option<&'static Self> {
        let is_named = |measure: &&Self| {
            text == measure.name
                || text.strip_prefix(measure.section).and_then(|rest| rest.strip_prefix('_')) == Some(measure.name)
        };
        std::iter::once(&COUNT).chain(&MEASURES).find(is_named)
    }

    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        std::iter::once(COUNT.name)
            .chain(MEASURES.iter().filter(|measure| measure.section != "ratio").map(|measure| measure.name))
    }
}

/// A group when all of it was seen.
pub(super) struct Row {
    /// The first minute of its step.
    pub(super) minute: u32,
    pub(super) key: Key,
    pub(super) sum: Sum,
    /// In microseconds: of a half, 95 and 99 per cent.
    pub(super) latency: Option<[f64; 3]>,
    pub(super) ttft: Option<[f64; 3]>,
}

/// Sums of a group.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Sum {
    pub(super) counts: Counts,
    /// Asked the cache.
    pub(super) looked_up: u64,
    pub(super) hits: u64,
    pub(super) hit_tokens_in: u64,
    pub(super) hit_tokens_out: u64,
    pub(super) status_4xx: u64,
    pub(super) status_5xx: u64,
}

impl Sum {
    /// Adds a line of a block.
    pub(super) fn add(&mut self, line: &Line<'_>) {
        let Line { key, counts, .. } = line;
        let (cache, requests) = (key.cache_use(), counts.requests);
        self.counts.add(*counts);
        self.looked_up += requests * u64::from(cache != CacheUse::Off);
        if cache.is_hit() {
            self.hits += requests;
            self.hit_tokens_in += counts.tokens_in;
            self.hit_tokens_out += counts.tokens_out;
        }
        match key.status / 100 {
            4 => self.status_4xx += requests,
            5 => self.status_5xx += requests,
            _ => {}
        }
    }
}

/// A part of so many; `null` of none. Three decimals are more than is measured.
fn share(part: f64, of: u64) -> Value {
    if of == 0 { Value::Null } else { rounded(part / of as f64, 1e6) }
}

fn milliseconds(quantiles: Option<[f64; 3]>, index: usize) -> Value {
    quantiles.map_or(Value::Null, |quantiles| rounded(quantiles[index] / 1000.0, 1e3))
}

fn rounded(value: f64, parts: f64) -> Value {
    ((value * parts).round() / parts).into()
}
