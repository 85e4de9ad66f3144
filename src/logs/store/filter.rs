//! Filters to masks: which rows of a source they let through.
//!
//! A column is read only if its limits leave the question open, and then as a whole.

use std::io;
use std::ops::{Range, RangeInclusive};

use memchr::memmem;

use super::columns::{FIRST_TEXT, Vocabulary};
use super::digits::Digits;
use super::memory::{ENTRIES, KEYS, VALUES};
use super::source::Source;
use crate::logs::query::{Filter, Match, Test};

/// A text test with more codes is a table.
const FEW: usize = 4;

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
                self.hits.resize(self.ids.len(), false);
                parts.iter().for_each(|part| Digits::of(*part).mark(&self.ids, &mut self.hits));
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
            Match::Below(word) => {
                codes.extend(numbered.by_ref().filter(|(_, known)| *known < word.as_bytes()).map(|(code, _)| code))
            }
            Match::Above(word) | Match::Is(word) => {
                codes.extend(numbered.by_ref().filter(|(_, known)| *known > word.as_bytes()).map(|(code, _)| code));
            }
        }
    }
    Ok(codes)
}

/// The codes of words in which `find` finds something, in order. Words lie one behind the other: what begins in one and ends in the next
/// is in neither.
pub(super) fn containing(words: &Vocabulary, find: impl Fn(&[u8]) -> Option<Range<usize>>) -> Vec<u64> {
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
