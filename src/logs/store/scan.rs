//! Which rows a query means: filters to masks, an order to keys, and the best of all segments.
//!
//! ```text
//!   source (a gateway's rows in one segment) ─ filters ─> mask ─ count, least and most
//!                                                          └─ keys ─> Top: the best `page × per_page` of all
//! ```
//!
//! A column is read as a whole, 64 Ki rows at most, and only if its limits leave the question open. Nothing is kept a record.

use std::io;

use super::columns::{FIRST_TEXT, Vocabulary};
use super::filter::select;
use super::search::Search;
use super::source::{Source, broken};
use crate::base::{Error, Result};
use crate::logs::query::{Number, Order, Query};

/// Distinct texts that a list can be ordered by, over all segments.
const MOST_WORDS: usize = 1 << 20;

/// Least, most and sum of a number over the records that have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measure {
    /// Records that have it.
    pub count: u64,
    /// The least.
    pub min: u64,
    /// The greatest.
    pub max: u64,
    /// All together.
    pub sum: u128,
}

/// What [`Query::meta_info`] asks for, in the store's units; `None`: no record has that number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MetaInfo {
    /// Micro-neurons.
    pub cost: Option<Measure>,
    /// Microseconds.
    pub duration: Option<Measure>,
    /// Tokens read.
    pub tokens_in: Option<Measure>,
    /// Tokens produced.
    pub tokens_out: Option<Measure>,
    /// Both.
    pub total_tokens: Option<Measure>,
}

/// A row that was chosen: the number of its source, and the row in it.
pub(super) type Chosen = (usize, u32);

/// What a scan found.
pub(super) struct Found {
    pub(super) count: u64,
    pub(super) chosen: Vec<Chosen>,
    pub(super) meta_info: Option<MetaInfo>,
    /// Nothing was left out for want of time.
    pub(super) is_complete: bool,
}

/// Looks at all sources, which are given oldest first, and keeps the best `wanted` rows. A search reads up to `budget` bytes.
pub(super) fn scan(sources: &mut [Source], query: &Query, wanted: usize, budget: u64) -> Result<Found> {
    let mut search = query.search.as_deref().map(|text| Search::new(text, budget)).transpose()?;
    let mut ranks = Ranks::new(sources, query.order)?;
    let mut top = Top { wanted, floor: 0, best: Vec::new() };
    let mut found = Found { count: 0, chosen: Vec::new(), meta_info: None, is_complete: true };
    let mut meta = query.meta_info.then(MetaInfo::default);
    let mut keys = Vec::new();
    let count = sources.len();
    let order = |turn: usize| if query.is_descending { count - 1 - turn } else { turn };
    for at in (0..count).map(order) {
        let source = &mut sources[at];
        let is_hopeless = wanted == 0 || top.is_hopeless(source, query, at);
        if query.filters.is_empty() && search.is_none() && meta.is_none() && is_hopeless {
            found.count += source.live();
            continue;
        }
        let Some(mut mask) = select(source, &query.filters).map_err(broken)? else { continue };
        if let Some(search) = &mut search {
            search.narrow(source, &mut mask).map_err(broken)?;
        }
        let count = mask.iter().filter(|is_meant| **is_meant).count() as u64;
        if count == 0 {
            continue;
        }
        found.count += count;
        if let Some(meta) = &mut meta {
            measure(source, &mask, meta, &mut keys).map_err(broken)?;
        }
        if is_hopeless {
            continue;
        }
        ranks.keys(source, at, query.order, &mut keys).map_err(broken)?;
        for (row, key) in keys.iter().enumerate().filter(|(row, _)| mask[*row]) {
            top.offer(packed(*key, at, row as u32, query.is_descending));
        }
    }
    found.chosen = top.finish().into_iter().map(|best| unpacked(best, query.is_descending)).collect();
    found.meta_info = meta;
    found.is_complete = search.is_none_or(|search| search.is_complete);
    Ok(found)
}

/// How the texts of an order sort over all sources.
struct Ranks(Vec<Vec<u64>>);

impl Ranks {
    fn new(sources: &mut [Source], order: Order) -> Result<Self> {
        let Order::Text(text) = order else { return Ok(Self(Vec::new())) };
        let mut all = Vec::with_capacity(sources.len());
        for source in sources {
            all.push(source.words(text as usize).map_err(broken)?);
        }
        let mut words: Vec<&[u8]> = all.iter().flat_map(Vocabulary::iter).collect();
        if words.len() > MOST_WORDS {
            return Err(Error::bad_field(
                "order_by",
                "'order_by' has too many different texts here: narrow the list with filters",
            ));
        }
        words.sort_unstable();
        words.dedup();
        let rank = |word: &[u8]| words.binary_search(&word).map_or(0, |rank| rank as u64 + 1);
        Ok(Self(all.iter().map(|words| std::iter::once(0).chain(words.iter().map(rank)).collect()).collect()))
    }

    fn keys(&mut self, source: &mut Source, at: usize, order: Order, keys: &mut Vec<u64>) -> io::Result<()> {
        match order {
            Order::Number(number) => source.numbers(number as usize, keys),
            Order::Text(text) => {
                source.numbers(FIRST_TEXT + text as usize, keys)?;
                let ranks = &self.0[at];
                keys.iter_mut().for_each(|code| *code = ranks.get(*code as usize).copied().unwrap_or_default());
                Ok(())
            }
            Order::Feedback => {
                keys.clear();
                match source.feedback()? {
                    // None lies between down and up.
                    Some(feedback) => {
                        keys.extend(feedback.into_iter().map(|mark| if mark == 0 { 2 } else { mark.into() }))
                    }
                    None => keys.resize(source.len(), 2),
                }
                Ok(())
            }
        }
    }
}

/// The greatest of many.
struct Top {
    wanted: usize,
    /// What is not greater is not among them.
    floor: u128,
    best: Vec<u128>,
}

impl Top {
    fn offer(&mut self, item: u128) {
        if item < self.floor {
            return;
        }
        self.best.push(item);
        if self.best.len() >= self.wanted.saturating_mul(2).max(64) {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.best.len() > self.wanted {
            self.best.select_nth_unstable_by(self.wanted - 1, |one, other| other.cmp(one));
            self.best.truncate(self.wanted);
            self.floor = self.best.iter().copied().min().unwrap_or_default();
        }
    }

    /// Whether nothing of a source can be among them, as far as its limits tell.
    fn is_hopeless(&self, source: &Source, query: &Query, at: usize) -> bool {
        let Order::Number(number) = query.order else { return false };
        let (min, max) = source.limits(number as usize);
        let key = if query.is_descending { max } else { min };
        let row = if query.is_descending { u32::MAX } else { 0 };
        packed(key, at, row, query.is_descending) < self.floor
    }

    fn finish(mut self) -> Vec<u128> {
        if self.wanted > 0 {
            self.cut();
        }
        self.best.sort_unstable_by(|one, other| other.cmp(one));
        self.best.truncate(self.wanted);
        self.best
    }
}

/// Key and place in one number: the greater comes first.
fn packed(key: u64, source: usize, row: u32, is_descending: bool) -> u128 {
    let whole = u128::from(key) << 64 | (source as u128) << 32 | u128::from(row);
    if is_descending { whole } else { !whole }
}

fn unpacked(packed: u128, is_descending: bool) -> Chosen {
    let whole = if is_descending { packed } else { !packed };
    ((whole >> 32) as u32 as usize, whole as u32)
}

fn measure(source: &mut Source, mask: &[bool], meta: &mut MetaInfo, numbers: &mut Vec<u64>) -> io::Result<()> {
    let measures = [
        (Number::Cost, &mut meta.cost),
        (Number::Duration, &mut meta.duration),
        (Number::TokensIn, &mut meta.tokens_in),
        (Number::TokensOut, &mut meta.tokens_out),
        (Number::Tokens, &mut meta.total_tokens),
    ];
    for (number, total) in measures {
        source.numbers(number as usize, numbers)?;
        let (mut count, mut min, mut max, mut sum) = (0u64, u64::MAX, 0u64, 0u128);
        for (number, _) in numbers.iter().zip(mask).filter(|(number, is_meant)| **is_meant && **number > 0) {
            count += 1;
            min = min.min(number - 1);
            max = max.max(number - 1);
            sum += u128::from(number - 1);
        }
        if count > 0 {
            let before = total.unwrap_or(Measure { count: 0, min: u64::MAX, max: 0, sum: 0 });
            *total = Some(Measure {
                count: before.count + count,
                min: before.min.min(min),
                max: before.max.max(max),
                sum: before.sum + sum,
            });
        }
    }
    Ok(())
}
