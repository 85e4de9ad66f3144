//! Which rows a query means: filters to masks, an order to keys, and the best of all segments.
//!
//! ```text
//!   source (a gateway's rows in one segment) ─ filters ─> mask ─ count, least and most
//!                                                          └─ keys ─> Top: the best `page × per_page` of all
//! ```
//!
//! A column is read as a whole, 64 Ki rows at most, and only if its limits leave the question open. Nothing is kept a record.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use super::block::Block;
use super::columns::{FIRST_TEXT, View, Vocabulary};
use super::filter::select;
use super::memory::{Entry, KEYS, Memory, Plane, TEXTS, VALUES};
use super::search::Search;
use crate::base::{Error, Result};
use crate::logs::query::{Number, Order, Query, Test};

/// Distinct texts that a list can be ordered by, over all segments.
const MOST_WORDS: usize = 1 << 20;

/// A gateway's rows in one segment.
pub(super) enum Source<'a> {
    Disk(View<'a>),
    Memory(Chunk),
}

/// A copy of what a query needs of the segment that is being written.
pub(super) struct Chunk {
    pub(super) log: PathBuf,
    pub(super) blocks: Vec<Block>,
    /// Those that are not dead, and which row of the segment each is.
    pub(super) entries: Vec<Entry>,
    pub(super) rows: Vec<u32>,
    words: HashMap<usize, Vocabulary>,
}

impl Chunk {
    pub(super) fn of(memory: &Memory, log: PathBuf, scope: u32, query: &Query) -> Self {
        let is_meant = |entry: &Entry| entry.scope == scope && entry.marks[Plane::Dead as usize] == 0;
        let rows: Vec<u32> =
            (0..).zip(&memory.entries).filter(|(_, entry)| is_meant(entry)).map(|(row, _)| row).collect();
        let entries: Vec<Entry> = rows.iter().map(|row| memory.entries[*row as usize].clone()).collect();
        let is_empty = entries.is_empty();
        let texts = texts_of(query).into_iter().filter(|_| !is_empty);
        let words = texts.map(|text| (text, Vocabulary::of(memory.words[text].list.iter()))).collect();
        let blocks = if is_empty { Vec::new() } else { memory.blocks.clone() };
        Self { log, blocks, entries, rows, words }
    }
}

impl Source<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Disk(view) => view.len(),
            Self::Memory(chunk) => chunk.entries.len(),
        }
    }

    pub(super) fn live(&self) -> u64 {
        match self {
            Self::Disk(view) => view.range.live().into(),
            Self::Memory(chunk) => chunk.entries.len() as u64,
        }
    }

    pub(super) fn limits(&self, column: usize) -> (u64, u64) {
        match self {
            Self::Disk(view) => view.limits(column),
            Self::Memory(_) => (0, u64::MAX),
        }
    }

    pub(super) fn numbers(&mut self, column: usize, out: &mut Vec<u64>) -> io::Result<()> {
        match self {
            Self::Disk(view) => return view.numbers(column, out),
            Self::Memory(chunk) => {
                out.clear();
                out.extend(chunk.entries.iter().map(|entry| match column.checked_sub(FIRST_TEXT) {
                    None => entry.numbers[column],
                    Some(text) => entry.texts[text].into(),
                }));
            }
        }
        Ok(())
    }

    pub(super) fn ids(&mut self, out: &mut Vec<u128>) -> io::Result<()> {
        match self {
            Self::Disk(view) => return view.ids(out),
            Self::Memory(chunk) => {
                out.clear();
                out.extend(chunk.entries.iter().map(|entry| entry.id));
            }
        }
        Ok(())
    }

    pub(super) fn code(&mut self, text: usize, word: &str) -> io::Result<Option<u64>> {
        match self {
            Self::Disk(view) => view.code(text, word),
            Self::Memory(chunk) => {
                let at =
                    chunk.words.get(&text).and_then(|words| words.iter().position(|known| known == word.as_bytes()));
                Ok(at.map(|at| at as u64 + 1))
            }
        }
    }

    pub(super) fn words(&mut self, text: usize) -> io::Result<Vocabulary> {
        match self {
            Self::Disk(view) => view.words(text),
            Self::Memory(chunk) => Ok(chunk.words.get(&text).cloned().unwrap_or_default()),
        }
    }

    /// -1, 0, 1 as 1, 2, 3, and 0 where there is none.
    pub(super) fn feedback(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Disk(view) => view.plane(Plane::Feedback),
            Self::Memory(chunk) => {
                Ok(Some(chunk.entries.iter().map(|entry| entry.marks[Plane::Feedback as usize]).collect()))
            }
        }
    }

    pub(super) fn dead(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Disk(view) if view.range.live() < view.range.end - view.range.begin => view.plane(Plane::Dead),
            _ => Ok(None),
        }
    }
}

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

impl Source<'_> {
    pub(super) fn log(&self) -> PathBuf {
        match self {
            Self::Disk(view) => view.sealed.log(),
            Self::Memory(chunk) => chunk.log.clone(),
        }
    }

    pub(super) fn block(&self, block: u64) -> io::Result<Block> {
        match self {
            Self::Disk(view) => view.block(block),
            Self::Memory(chunk) => Ok(chunk.blocks[block as usize]),
        }
    }

    /// Where a chosen row lies, and its marks.
    pub(super) fn place(&self, row: u32) -> io::Result<(PathBuf, Block, u32, [u8; 3])> {
        match self {
            Self::Disk(view) => {
                let row = view.range.begin + row;
                let (block, slot) = view.place(row)?;
                Ok((view.sealed.log(), block, slot, view.marks(row)?))
            }
            Self::Memory(chunk) => {
                let entry = &chunk.entries[row as usize];
                Ok((chunk.log.clone(), chunk.blocks[entry.block as usize], entry.slot, entry.marks))
            }
        }
    }
}

/// The texts that a query looks at.
fn texts_of(query: &Query) -> Vec<usize> {
    let mut texts: Vec<usize> = Vec::new();
    for filter in &query.filters {
        match &filter.test {
            Test::Text(text, _) => texts.push(*text as usize),
            Test::MetadataKey(_) => texts.extend(KEYS..VALUES),
            Test::MetadataValue(_) => texts.extend(VALUES..TEXTS),
            _ => {}
        }
    }
    if query.search.is_some() {
        texts.extend(Search::TEXTS.map(|text| text as usize));
    }
    if let Order::Text(text) = query.order {
        texts.push(text as usize);
    }
    texts.sort_unstable();
    texts.dedup();
    texts
}

pub(super) fn broken(error: io::Error) -> Error {
    Error::internal("the log's files cannot be read or written: look at the disk, and at what the server's log says")
        .with_source(error)
}
