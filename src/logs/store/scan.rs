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
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use memchr::memmem;
use regex::bytes::{Regex, RegexBuilder};

use super::block::{self, Block};
use super::columns::{FIRST_TEXT, View, Vocabulary};
use super::memory::{ENTRIES, Entry, KEYS, Memory, Plane, TEXTS, VALUES};
use crate::base::{Error, Result};
use crate::logs::query::{Filter, Match, Number, Order, Query, Test, Text, part_of_id};

/// Bytes of the beginning of a body that a search looks at.
const SEARCHED: usize = 8 << 10;
/// Distinct texts that a list can be ordered by, over all segments.
const MOST_WORDS: usize = 1 << 20;
/// A text test with more codes is a table.
const FEW: usize = 4;

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
        let rows: Vec<u32> = (0..).zip(&memory.entries).filter(|(_, entry)| is_meant(entry)).map(|(row, _)| row).collect();
        let entries: Vec<Entry> = rows.iter().map(|row| memory.entries[*row as usize].clone()).collect();
        let is_empty = entries.is_empty();
        let texts = texts_of(query).into_iter().filter(|_| !is_empty);
        let words = texts.map(|text| (text, Vocabulary::of(memory.words[text].list.iter()))).collect();
        let blocks = if is_empty { Vec::new() } else { memory.blocks.clone() };
        Self { log, blocks, entries, rows, words }
    }
}

impl Source<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Disk(view) => view.len(),
            Self::Memory(chunk) => chunk.entries.len(),
        }
    }

    fn live(&self) -> u64 {
        match self {
            Self::Disk(view) => view.range.live().into(),
            Self::Memory(chunk) => chunk.entries.len() as u64,
        }
    }

    fn limits(&self, column: usize) -> (u64, u64) {
        match self {
            Self::Disk(view) => view.limits(column),
            Self::Memory(_) => (0, u64::MAX),
        }
    }

    fn numbers(&mut self, column: usize, out: &mut Vec<u64>) -> io::Result<()> {
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

    fn ids(&mut self, out: &mut Vec<u128>) -> io::Result<()> {
        match self {
            Self::Disk(view) => return view.ids(out),
            Self::Memory(chunk) => {
                out.clear();
                out.extend(chunk.entries.iter().map(|entry| entry.id));
            }
        }
        Ok(())
    }

    fn code(&mut self, text: usize, word: &str) -> io::Result<Option<u64>> {
        match self {
            Self::Disk(view) => view.code(text, word),
            Self::Memory(chunk) => {
                let at = chunk.words.get(&text).and_then(|words| words.iter().position(|known| known == word.as_bytes()));
                Ok(at.map(|at| at as u64 + 1))
            }
        }
    }

    fn words(&mut self, text: usize) -> io::Result<Vocabulary> {
        match self {
            Self::Disk(view) => view.words(text),
            Self::Memory(chunk) => Ok(chunk.words.get(&text).cloned().unwrap_or_default()),
        }
    }

    /// -1, 0, 1 as 1, 2, 3, and 0 where there is none.
    fn feedback(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Disk(view) => view.plane(Plane::Feedback),
            Self::Memory(chunk) => {
                Ok(Some(chunk.entries.iter().map(|entry| entry.marks[Plane::Feedback as usize]).collect()))
            }
        }
    }

    fn dead(&self) -> io::Result<Option<Vec<u8>>> {
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
        found.count += mask.iter().map(|is_meant| u64::from(*is_meant)).sum::<u64>();
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

/// The rows that are not dead and pass all filters; `None` where that is sure to be none.
pub(super) fn select(source: &mut Source, filters: &[Filter]) -> io::Result<Option<Vec<bool>>> {
    if source.live() == 0 {
        return Ok(None);
    }
    let mut mask = match source.dead()? {
        Some(dead) => dead.iter().map(|dead| *dead == 0).collect(),
        None => vec![true; source.len()],
    };
    let mut hits = Hits::default();
    for filter in filters {
        match (hits.of(source, &filter.test)?, filter.is_negated) {
            (Whole::All, false) | (Whole::None, true) => {}
            (Whole::All, true) | (Whole::None, false) => return Ok(None),
            (Whole::Some, is_negated) => {
                mask.iter_mut().zip(&hits.hits).for_each(|(is_meant, hit)| *is_meant &= *hit != is_negated);
            }
        }
    }
    Ok(Some(mask))
}

/// What a test says of a source, where that needs no look at the rows.
enum Whole {
    None,
    All,
    Some,
}

#[derive(Default)]
struct Hits {
    hits: Vec<bool>,
    numbers: Vec<u64>,
    ids: Vec<u128>,
}

impl Hits {
    fn of(&mut self, source: &mut Source, test: &Test) -> io::Result<Whole> {
        match test {
            Test::Always(true) => return Ok(Whole::All),
            Test::Always(false) => return Ok(Whole::None),
            Test::Number(number, ranges) => {
                let ranges: Vec<_> = ranges.iter().map(raised).collect();
                let (min, max) = source.limits(*number as usize);
                if ranges.iter().all(|range| range.is_empty() || *range.start() > max || *range.end() < min) {
                    return Ok(Whole::None);
                }
                if ranges.iter().any(|range| *range.start() <= min && *range.end() >= max) {
                    return Ok(Whole::All);
                }
                source.numbers(*number as usize, &mut self.numbers)?;
                self.within(&ranges);
            }
            Test::Feedback(ranges) => {
                let Some(feedback) = source.feedback()? else { return Ok(Whole::None) };
                self.numbers.clear();
                self.numbers.extend(feedback.into_iter().map(u64::from));
                self.within(&ranges.iter().map(raised).collect::<Vec<_>>());
            }
            Test::Text(text, matches) => return self.texts(source, *text as usize..*text as usize + 1, matches),
            Test::MetadataKey(matches) => return self.texts(source, KEYS..KEYS + ENTRIES, matches),
            Test::MetadataValue(matches) => return self.texts(source, VALUES..VALUES + ENTRIES, matches),
            Test::Id(ranges) => {
                if let Source::Disk(view) = source {
                    let (first, last) = (view.range.first, view.range.last);
                    if ranges.iter().all(|range| *range.start() > last || *range.end() < first) {
                        return Ok(Whole::None);
                    }
                }
                source.ids(&mut self.ids)?;
                let hits = self.ids.iter().map(|id| ranges.iter().any(|range| range.contains(id)));
                self.hits.clear();
                self.hits.extend(hits);
            }
            Test::IdPart(parts) => {
                source.ids(&mut self.ids)?;
                self.hits.clear();
                self.hits.extend(self.ids.iter().map(|id| parts.iter().any(|part| has_part(*id, *part))));
            }
        }
        Ok(Whole::Some)
    }

    fn within(&mut self, ranges: &[RangeInclusive<u64>]) {
        self.hits.clear();
        match ranges {
            [range] if !range.is_empty() => {
                let (low, width) = (*range.start(), range.end() - range.start());
                self.hits.extend(self.numbers.iter().map(|number| number.wrapping_sub(low) <= width));
            }
            _ => self.hits.extend(self.numbers.iter().map(|number| ranges.iter().any(|range| range.contains(number)))),
        }
    }

    /// Rows with a match in one of some columns.
    fn texts(&mut self, source: &mut Source, texts: Range<usize>, matches: &[Match]) -> io::Result<Whole> {
        let mut whole = Whole::None;
        for text in texts {
            // A column without texts is not looked at.
            if source.limits(FIRST_TEXT + text).1 == 0 {
                continue;
            }
            let codes = codes(source, text, matches)?;
            if codes.is_empty() {
                continue;
            }
            if matches!(whole, Whole::None) {
                self.hits.clear();
                self.hits.resize(source.len(), false);
                whole = Whole::Some;
            }
            source.numbers(FIRST_TEXT + text, &mut self.numbers)?;
            let rows = self.hits.iter_mut().zip(&self.numbers);
            if codes.len() <= FEW {
                rows.for_each(|(hit, code)| *hit |= codes.contains(code));
                continue;
            }
            let mut table = vec![false; codes.iter().max().map_or(0, |most| *most as usize + 1)];
            codes.iter().for_each(|code| table[*code as usize] = true);
            rows.for_each(|(hit, code)| *hit |= table.get(*code as usize).copied().unwrap_or_default());
        }
        Ok(whole)
    }
}

/// The codes of the texts that match; none is 0.
fn codes(source: &mut Source, text: usize, matches: &[Match]) -> io::Result<Vec<u64>> {
    let mut codes = Vec::new();
    let mut words: Option<Vocabulary> = None;
    for wanted in matches {
        if let Match::Is(word) = wanted {
            codes.extend(source.code(text, word)?);
            continue;
        }
        let words = match &mut words {
            Some(words) => words,
            none => none.insert(source.words(text)?),
        };
        let mut numbered = (1..).zip(words.iter());
        match wanted {
            Match::Contains(part) if part.is_empty() => codes.extend(numbered.map(|(code, _)| code)),
            Match::Contains(part) => {
                let finder = memmem::Finder::new(&**part);
                codes.extend(containing(words, |text| finder.find(text).map(|at| at..at + part.len())));
            }
            Match::Below(word) => codes.extend(numbered.by_ref().filter(|(_, known)| *known < word.as_bytes()).map(|(code, _)| code)),
            Match::Above(word) | Match::Is(word) => {
                codes.extend(numbered.by_ref().filter(|(_, known)| *known > word.as_bytes()).map(|(code, _)| code));
            }
        }
    }
    Ok(codes)
}

/// The codes of words in which `find` finds something, in order. Words lie one behind the other: what begins in one and ends in the next
/// is in neither.
fn containing(words: &Vocabulary, find: impl Fn(&[u8]) -> Option<Range<usize>>) -> Vec<u64> {
    let (mut codes, mut at) = (Vec::new(), 0);
    while let Some(found) = find(&words.text[at..]) {
        let (word, end) = words.at(at + found.start);
        if at + found.end <= end {
            codes.push(word as u64 + 1);
            at = end;
        } else {
            at += found.start + 1;
        }
    }
    codes
}

/// In the columns 0 is none, so all else is one more.
fn raised(range: &RangeInclusive<u64>) -> RangeInclusive<u64> {
    match range.is_empty() {
        true => range.clone(),
        false => range.start().saturating_add(1)..=range.end().saturating_add(1),
    }
}

/// Whether an id has these digits somewhere.
fn has_part(id: u128, (part, digits): (u128, u32)) -> bool {
    if digits >= 26 {
        return id == part;
    }
    let mask = (1u128 << (5 * digits)) - 1;
    (0..=26 - digits).any(|place| id >> (5 * place) & mask == part)
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
            return Err(Error::bad_field("order_by", "'order_by' has too many different texts here: narrow the list with filters"));
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
                    Some(feedback) => keys.extend(feedback.into_iter().map(|mark| if mark == 0 { 2 } else { mark.into() })),
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

/// A text that is looked for everywhere.
struct Search {
    pattern: Regex,
    part: Option<(u128, u32)>,
    budget: u64,
    is_complete: bool,
}

impl Search {
    const TEXTS: [Text; 3] = [Text::Provider, Text::Model, Text::Event];

    fn new(text: &str, budget: u64) -> Result<Self> {
        let pattern = RegexBuilder::new(&regex::escape(text)).case_insensitive(true).build();
        let pattern = pattern.map_err(|_| Error::bad_field("search", "'search' is too long: look for a part of it"))?;
        Ok(Self { pattern, part: part_of_id(text), budget, is_complete: true })
    }

    /// Leaves the rows that have it: ids and names first, then bodies, newest first, while the budget lasts.
    fn narrow(&mut self, source: &mut Source, mask: &mut [bool]) -> io::Result<()> {
        let mut hits = vec![false; mask.len()];
        if let Some(part) = self.part {
            let mut ids = Vec::new();
            source.ids(&mut ids)?;
            hits.iter_mut().zip(ids).for_each(|(hit, id)| *hit = has_part(id, part));
        }
        let mut numbers = Vec::new();
        for text in Self::TEXTS {
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
                view.numbers(super::columns::BLOCK, &mut blocks)?;
                view.numbers(super::columns::SLOT, &mut slots)?;
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
            let (Some(mut heads), Some(bodies)) = (block::read_heads(&log, block)?, block::read_bodies(&log, block)?) else {
                continue;
            };
            self.budget = self.budget.saturating_sub(bodies.len() as u64);
            if block::fill(&mut heads, &bodies).is_none() {
                continue;
            }
            for row in rows {
                let Some(head) = heads.get(slots[*row] as usize) else { continue };
                let bodies = [&head.record.asked.kept, &head.record.answered.kept];
                hits[*row] = bodies.iter().any(|body| self.pattern.is_match(&body[..body.len().min(SEARCHED)]));
            }
        }
        Ok(())
    }
}

impl Source<'_> {
    fn log(&self) -> PathBuf {
        match self {
            Self::Disk(view) => view.sealed.log(),
            Self::Memory(chunk) => chunk.log.clone(),
        }
    }

    fn block(&self, block: u64) -> io::Result<Block> {
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
    Error::internal("the log's files cannot be read or written: look at the disk, and at what the server's log says").with_source(error)
}
