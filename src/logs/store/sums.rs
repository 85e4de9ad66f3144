//! What the records of several selections come to. One look at the columns that are filtered by, then at two more and the marks; no record
//! is read.

use std::io;

use super::Store;
use super::filter::select;
use super::read::sources;
use super::source::{Source, broken};
use crate::base::{AccountId, Result};
use crate::logs::query::{Filter, Number, Query};

/// Sums over records.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sums {
    /// Records.
    pub count: u64,
    /// Micro-neurons.
    pub cost: u128,
    /// Microseconds.
    pub duration: u128,
    /// Thumbs up.
    pub liked: u64,
    /// Thumbs down.
    pub disliked: u64,
}

impl Store {
    /// What a gateway's records come to that pass all filters of one of these sets. A record that passes several sets counts once.
    ///
    /// # Errors
    /// The system's.
    pub fn sums(&self, account: &AccountId, gateway: &str, sets: &[Vec<Filter>]) -> Result<Sums> {
        let inner = &*self.0.inner;
        // Of what is in memory, the texts are copied that any of them asks about.
        let all = Query { filters: sets.concat(), ..Query::default() };
        let (sealed, chunks, scope) = inner.state.read().snapshot(account, gateway, &all, &inner.settings);
        let (mut sums, mut numbers) = (Sums::default(), Vec::new());
        for source in &mut sources(&sealed, chunks, scope).map_err(broken)? {
            add(source, sets, &mut sums, &mut numbers).map_err(broken)?;
        }
        Ok(sums)
    }
}

fn add(source: &mut Source, sets: &[Vec<Filter>], sums: &mut Sums, numbers: &mut Vec<u64>) -> io::Result<()> {
    let mut mask: Option<Vec<bool>> = None;
    for filters in sets {
        let Some(more) = select(source, filters)? else { continue };
        match &mut mask {
            Some(mask) => mask.iter_mut().zip(more).for_each(|(is_meant, more)| *is_meant |= more),
            none => *none = Some(more),
        }
    }
    let Some(mask) = mask else { return Ok(()) };
    sums.count += mask.iter().map(|is_meant| u64::from(*is_meant)).sum::<u64>();
    for (number, sum) in [(Number::Cost, &mut sums.cost), (Number::Duration, &mut sums.duration)] {
        source.numbers(number as usize, numbers)?;
        // In the columns 0 is none, so all else is one more.
        let meant = numbers.iter().zip(&mask).filter(|(_, is_meant)| **is_meant);
        *sum += meant.map(|(number, _)| u128::from(number.saturating_sub(1))).sum::<u128>();
    }
    for (mark, _) in source.feedback()?.iter().flatten().zip(&mask).filter(|(_, is_meant)| **is_meant) {
        sums.disliked += u64::from(*mark == 1);
        sums.liked += u64::from(*mark == 3);
    }
    Ok(())
}

#[cfg(test)]
#[path = "sums_test.rs"]
mod tests;
