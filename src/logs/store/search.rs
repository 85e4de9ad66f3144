//! A text that is looked for in ids, names and the beginnings of bodies.
//!
//! Names are few and quick. Bodies are read block by block, newest first, until the budget is used up.

use std::io;

use regex::bytes::{Regex, RegexBuilder};

use super::block;
use super::columns::{BLOCK, FIRST_TEXT, SLOT};
use super::digits::Digits;
use super::filter::containing;
use super::source::{SEARCHED, Source};
use crate::base::{Error, Result};
use crate::logs::query::part_of_id;

/// Bytes of the beginning of a body that a search looks at.
const LOOKED_AT: usize = 8 << 10;

/// A text that is looked for everywhere.
pub(super) struct Search {
    pattern: Regex,
    digits: Option<Digits>,
    budget: u64,
    pub(super) is_complete: bool,
}

impl Search {
    pub(super) fn new(text: &str, budget: u64) -> Result<Self> {
        let pattern = RegexBuilder::new(&regex::escape(text)).case_insensitive(true).build();
        let pattern = pattern.map_err(|_| Error::bad_field("search", "'search' is too long: look for a part of it"))?;
        Ok(Self { pattern, digits: part_of_id(text).map(Digits::of), budget, is_complete: true })
    }

    /// Leaves the rows that have it: ids and names first, then bodies, newest first, while the budget lasts.
    pub(super) fn narrow(&mut self, source: &mut Source, mask: &mut [bool]) -> io::Result<()> {
        let mut hits = vec![false; mask.len()];
        if let Some(digits) = &self.digits {
            let mut ids = Vec::new();
            source.ids(&mut ids)?;
            digits.mark(&ids, &mut hits);
        }
        let mut numbers = Vec::new();
        for text in SEARCHED {
            let words = source.words(text as usize)?;
            let codes = containing(&words, |text| self.pattern.find(text).map(|found| found.range()));
            if codes.is_empty() {
                continue;
            }
            source.numbers(FIRST_TEXT + text as usize, &mut numbers)?;
            hits.iter_mut().zip(&numbers).for_each(|(hit, code)| *hit |= codes.binary_search(code).is_ok());
        }
        self.bodies(source, mask, &mut hits)?;
        mask.iter_mut().zip(hits).for_each(|(is_meant, hit)| *is_meant &= hit);
        Ok(())
    }

    fn bodies(&mut self, source: &mut Source, mask: &[bool], hits: &mut [bool]) -> io::Result<()> {
        let (mut blocks, mut slots) = (Vec::new(), Vec::new());
        match &mut *source {
            Source::Disk(view) => {
                view.numbers(BLOCK, &mut blocks)?;
                view.numbers(SLOT, &mut slots)?;
            }
            Source::Memory(chunk) => {
                blocks.extend(chunk.entries.iter().map(|entry| u64::from(entry.block)));
                slots.extend(chunk.entries.iter().map(|entry| u64::from(entry.slot)));
            }
        }
        let mut rows: Vec<usize> = (0..mask.len()).filter(|row| mask[*row] && !hits[*row]).collect();
        rows.sort_unstable_by_key(|row| std::cmp::Reverse((blocks[*row], slots[*row])));
        let log = source.log();
        for rows in rows.chunk_by(|one, other| blocks[*one] == blocks[*other]) {
            if self.budget == 0 {
                self.is_complete = false;
                return Ok(());
            }
            let block = source.block(blocks[rows[0]])?;
            let Some(bodies) = block::read_bodies(&log, block)? else { continue };
            self.budget = self.budget.saturating_sub(bodies.len() as u64);
            // Most blocks have it nowhere, and one look at all of it is quick.
            if !self.pattern.is_match(&bodies) {
                continue;
            }
            let bodies: Vec<_> = block::each(&bodies).collect();
            for row in rows {
                let Some(bodies) = bodies.get(slots[*row] as usize) else { continue };
                hits[*row] = bodies.iter().any(|body| self.pattern.is_match(&body[..body.len().min(LOOKED_AT)]));
            }
        }
        Ok(())
    }
}
