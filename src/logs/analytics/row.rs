//! A series: its names and numbers, its sums, and the two sketches of its times.

use std::sync::Arc;

use crate::base::Lookup;
use crate::logs::analytics::sketch::Sketch;
use crate::logs::record::{CacheUse, Record};

/// The number of the name that folded rows have. Not to be reached by a text: an account that is called `other` has another.
pub(super) const OTHER: u32 = 0;

/// The dimensions that are names, in the order in which [`Key::names`] has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Name {
    Account,
    Gateway,
    Provider,
    Model,
    Key,
}

/// How many dimensions are names.
pub(super) const NAMES: usize = 5;

/// Which series; names are numbers of a [`Names`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Key {
    pub(super) names: [u32; NAMES],
    pub(super) status: u16,
    /// Index into [`CacheUse::ALL`].
    pub(super) cache: u8,
}

impl Key {
    /// Where it counts when there is no room for it.
    pub(super) fn folded(self, account: u32) -> Self {
        let names = [account, OTHER, OTHER, OTHER, OTHER];
        Self { names, status: self.status / 100 * 100, cache: self.cache }
    }

    pub(super) fn cache_use(self) -> CacheUse {
        CacheUse::ALL.get(usize::from(self.cache)).copied().unwrap_or(CacheUse::Off)
    }
}

/// Texts by number and numbers by text.
#[derive(Debug)]
pub(super) struct Names {
    numbers: Lookup<Arc<str>, u32>,
    texts: Vec<Arc<str>>,
}

impl Default for Names {
    fn default() -> Self {
        Self { numbers: Lookup::default(), texts: vec!["other".into()] }
    }
}

impl Names {
    pub(super) fn text(&self, number: u32) -> &str {
        self.texts.get(number as usize).map_or("", |text| text)
    }

    pub(super) fn number(&mut self, text: &str) -> u32 {
        if let Some(number) = self.find(text) {
            return number;
        }
        let (text, number): (Arc<str>, _) = (Arc::from(text), self.texts.len() as u32);
        self.texts.push(text.clone());
        self.numbers.insert(text, number);
        number
    }

    pub(super) fn find(&self, text: &str) -> Option<u32> {
        self.numbers.get(text).copied()
    }
}

/// Sums of a series. Money is in micro-neurons, time in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Counts {
    pub(super) requests: u64,
    /// Without a whole answer of a status under 400.
    pub(super) failed: u64,
    /// Succeeded, but nobody said how many tokens it took.
    pub(super) unmetered: u64,
    pub(super) tokens_in: u64,
    pub(super) tokens_out: u64,
    /// Of those in, how many the provider had in its own prompt cache.
    pub(super) prompt_cached: u64,
    pub(super) cost: u64,
    pub(super) saved: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) latency: u64,
    /// To the first byte, of the requests that had one.
    pub(super) ttft: u64,
    /// Those requests.
    pub(super) answered: u64,
}

impl Counts {
    /// How many numbers there are.
    pub(super) const LENGTH: usize = 13;

    /// All of them in the order of files: new ones go to the end, under another version of blocks.
    pub(super) fn fields(&mut self) -> [&mut u64; Self::LENGTH] {
        let Self { requests, failed, unmetered, tokens_in, tokens_out, prompt_cached, cost, .. } = self;
        let Self { saved, bytes_in, bytes_out, latency, ttft, answered, .. } = self;
        [
            requests,
            failed,
            unmetered,
            tokens_in,
            tokens_out,
            prompt_cached,
            cost,
            saved,
            bytes_in,
            bytes_out,
            latency,
            ttft,
            answered,
        ]
    }

    pub(super) fn add(&mut self, mut other: Self) {
        for (sum, more) in self.fields().into_iter().zip(other.fields()) {
            *sum = sum.saturating_add(*more);
        }
    }
}

/// A series.
#[derive(Clone, PartialEq, Default, Debug)]
pub(super) struct Row {
    pub(super) counts: Counts,
    pub(super) latency: Sketch,
    pub(super) ttft: Sketch,
}

impl Row {
    pub(super) fn observe(&mut self, record: &Record) {
        let usage = record.usage.unwrap_or_default();
        self.counts.add(Counts {
            requests: 1,
            failed: u64::from(!record.success),
            unmetered: u64::from(record.success && record.usage.is_none()),
            tokens_in: usage.prompt_tokens.into(),
            tokens_out: usage.completion_tokens.into(),
            prompt_cached: usage.cached_tokens.into(),
            cost: record.cost.micro(),
            saved: record.saved.micro(),
            bytes_in: record.asked.size,
            bytes_out: record.answered.size,
            latency: record.duration_us,
            ttft: record.first_byte_us.unwrap_or(0),
            answered: u64::from(record.first_byte_us.is_some()),
        });
        self.latency.add(record.duration_us);
        if let Some(first_byte) = record.first_byte_us {
            self.ttft.add(first_byte);
        }
    }

    pub(super) fn absorb(&mut self, other: &Self) {
        self.counts.add(other.counts);
        self.latency.absorb(&other.latency);
        self.ttft.absorb(&other.ttft);
    }
}
