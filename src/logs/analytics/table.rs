//! What was counted, series by series: one row for each account, gateway, provider, model, key, status and use of the cache.
//!
//!     Record ──observe─┐                                      ┌─> encode ─> block
//!     block  ──merge───┴─> row (at most so many) ──shrink─────┘
//!                            '── beyond: a row named `other`, which keeps account, class of status and use of the cache
//!
//! So the sums of an account, its error and hit rates stay exact however many models its callers make up. Where even accounts
//! are too many, theirs is `other` as well. Knows nothing of time and files.

use crate::base::Lookup;
use crate::logs::analytics::block::{Block, encode};
use crate::logs::analytics::row::{Key, NAMES, Name, Names, OTHER, Row};
use crate::logs::record::Record;

/// A longer name is cut: models are what callers write.
const LONGEST_NAME: usize = 128;

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
