//! What was counted, series by series: one row for each account, gateway, provider, model, key, status and use of the cache.
//!
//!     Record ──observe─┐                                      ┌─> encode ─> block
//!     block  ──merge───┴─> row (at most so many) ──shrink─────┘
//!                            '── beyond: a row named `other`, which keeps account, class of status and use of the cache
//!
//! So the sums of an account, its error and hit rates stay exact however many models its callers make up. Where even accounts
//! are too many, theirs is `other` as well. Knows nothing of time and files.

use std::sync::Arc;

use crate::base::Lookup;
use crate::logs::analytics::block::{Block, encode};
use crate::logs::analytics::sketch::Sketch;
use crate::logs::record::{CacheUse, Record};

/// The number of the name that folded rows have. Not to be reached by a text: an account that is called `other` has another.
pub(super) const OTHER: u32 = 0;
/// A longer name is cut: models are what callers write.
const LONGEST_NAME: usize = 128;

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
    fn folded(self, account: u32) -> Self {
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

    fn find(&self, text: &str) -> Option<u32> {
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
    fn observe(&mut self, record: &Record) {
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

    fn absorb(&mut self, other: &Self) {
        self.counts.add(other.counts);
        self.latency.absorb(&other.latency);
        self.ttft.absorb(&other.ttft);
    }
}

/// See the top of this file.
#[derive(Default, Debug)]
pub(super) struct Table {
    names: Names,
    rows: Lookup<Key, Row>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Counts a call; `false`: under `other`, since there are `most` rows.
    pub(super) fn observe(&mut self, record: &Record, most: usize) -> bool {
        let key_id = record.key.as_ref().map_or("", |key| key.as_str());
        let texts = [record.account.as_str(), &record.gateway, &record.provider, &record.model, key_id].map(cut);
        let key = Key { names: [OTHER; NAMES], status: record.status, cache: record.cache as u8 };
        let (key, is_own) = self.place(texts, key, most);
        self.rows.entry(key).or_default().observe(record);
        is_own
    }

    /// Adds the rows of a block; those that are new and too many go under `other`. `None` if the block is damaged, and then some
    /// of it was added.
    pub(super) fn merge(&mut self, block: &Block<'_>, most: usize) -> Option<()> {
        let mut numbers = vec![OTHER];
        numbers.extend(block.names().iter().map(|name| self.names.number(name)));
        for line in block.lines() {
            let line = line?;
            let mut key = line.key;
            for name in &mut key.names {
                *name = *numbers.get(*name as usize)?;
            }
            if self.rows.len() >= most && !self.rows.contains_key(&key) {
                key = key.folded(key.names[Name::Account as usize]);
            }
            let row = self.rows.entry(key).or_default();
            row.counts.add(line.counts);
            row.latency.merge(line.latency)?;
            row.ttft.merge(line.ttft)?;
        }
        Some(())
    }

    /// Keeps the `most` busiest rows and folds the others: into a quarter as many at most, and a few of no account.
    pub(super) fn shrink(&mut self, most: usize) {
        if self.rows.len() <= most {
            return;
        }
        for (most, keeps_account) in [(most, true), (most + most / 4, false)] {
            let mut busiest: Vec<_> = self.rows.iter().map(|(key, row)| (row.counts.requests, *key)).collect();
            // What is folded already is no series of its own and comes last; folded again, it stays what it is.
            let folds = |key: &Key| u8::from(key.names[1..] == [OTHER; 4]) + u8::from(key.names == [OTHER; NAMES]);
            busiest.sort_unstable_by_key(|(requests, key)| (folds(key), std::cmp::Reverse(*requests)));
            for (_, key) in busiest.into_iter().skip(most) {
                let Some(row) = self.rows.remove(&key) else { continue };
                let account = if keeps_account { key.names[Name::Account as usize] } else { OTHER };
                self.rows.entry(key.folded(account)).or_default().absorb(&row);
            }
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        encode(&self.names, &self.rows)
    }

    /// Under which key a call counts, and whether that is its own. Names are taken up only for rows that there is room for.
    fn place(&mut self, texts: [&str; NAMES], mut key: Key, most: usize) -> (Key, bool) {
        let has_room = self.rows.len() < most;
        let mut is_known = true;
        for (name, text) in key.names.iter_mut().zip(texts) {
            *name = match self.names.find(text) {
                Some(number) => number,
                None if has_room => self.names.number(text),
                None => {
                    is_known = false;
                    OTHER
                }
            };
        }
        if has_room || (is_known && self.rows.contains_key(&key)) {
            return (key, true);
        }
        let has_room = self.rows.len() < most + most / 4;
        let account = if has_room { self.names.number(texts[0]) } else { key.names[0] };
        let folded = key.folded(account);
        if has_room || self.rows.contains_key(&folded) { (folded, false) } else { (key.folded(OTHER), false) }
    }
}

/// The beginning of a name.
fn cut(text: &str) -> &str {
    let end = (0..=LONGEST_NAME.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
