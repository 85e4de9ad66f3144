//! The columns of a segment out of its index in memory: sorted, packed and put one behind another.
//!
//! Pure, and the same bytes whenever it is done again.

use std::collections::HashSet;
use std::io;

use super::block::Plane;
use super::columns::{COLUMNS, Dictionary, Footer, Packed, Written, checksum};
use super::memory::{Memory, TEXTS};
use crate::logs::query::Number;

/// A segment's files in the making.
pub(super) struct Image {
    /// The columns.
    pub(super) bytes: Vec<u8>,
    /// The marks, if any row has one.
    pub(super) marks: Option<Vec<u8>>,
    pub(super) rows: u32,
}

/// Makes the file's bytes; `name` knows the account and the gateway of a scope. Rows that are dead are left out.
pub(super) fn image<'a>(memory: &Memory, name: impl Fn(u32) -> (&'a str, &'a str)) -> io::Result<Image> {
    let entries = &memory.entries;
    let mut order: Vec<u32> =
        (0..entries.len() as u32).filter(|row| entries[*row as usize].marks[Plane::Dead as usize] == 0).collect();
    let ranks = by_name(entries.iter().map(|entry| entry.scope), &name);
    order.sort_by_key(|row| {
        let entry = &entries[*row as usize];
        (ranks[entry.scope as usize], entry.id, *row)
    });
    let rows = || order.iter().map(|row| &entries[*row as usize]);
    // Ids and some twenty bytes of numbers and texts.
    let mut out = Vec::with_capacity(order.len() * 40 + (64 << 10));
    rows().for_each(|entry| out.extend_from_slice(&entry.id.to_le_bytes()));
    let mut columns = Vec::with_capacity(COLUMNS);
    // The bounds of all in one walk: an entry is several lines of memory, and columns are many.
    let (mut numbers, mut texts) = ([(u64::MAX, 0); Number::COUNT], [(u32::MAX, 0); TEXTS]);
    for entry in rows() {
        numbers.iter_mut().zip(entry.numbers).for_each(|(bounds, value)| widen(bounds, value));
        texts.iter_mut().zip(entry.texts).for_each(|(bounds, code)| widen(bounds, code));
    }
    for (number, bounds) in numbers.into_iter().enumerate() {
        columns.push(pack(rows().map(|entry| entry.numbers[number]), bounds, &mut out));
    }
    let mut dictionaries = Vec::with_capacity(TEXTS);
    for (text, words) in memory.words.iter().enumerate() {
        let mut sorted: Vec<u32> = (0..words.list.len() as u32).collect();
        sorted.sort_by(|one, other| words.list[*one as usize].cmp(&words.list[*other as usize]));
        let mut codes = vec![0; sorted.len() + 1];
        sorted.iter().enumerate().for_each(|(at, word)| codes[*word as usize + 1] = at as u64 + 1);
        let coded = |code: u32| codes.get(code as usize).copied().unwrap_or_default();
        let values = rows().map(|entry| coded(entry.texts[text]));
        columns.push(match texts[text] {
            // Many are the same in all rows.
            (min, max) if min >= max => pack(values, (coded(max), coded(max)), &mut out),
            _ => measured(values, &mut out),
        });
        let at = out.len() as u64;
        let mut end = 0;
        for word in &sorted {
            end += words.list[*word as usize].len() as u32;
            out.extend_from_slice(&end.to_le_bytes());
        }
        sorted.iter().for_each(|word| out.extend_from_slice(words.list[*word as usize].as_bytes()));
        dictionaries.push(Dictionary { at, words: sorted.len() as u32, bytes: end.into() });
    }
    columns.push(measured(rows().map(|entry| entry.block.into()), &mut out));
    columns.push(measured(rows().map(|entry| entry.slot.into()), &mut out));
    let blocks = out.len() as u64;
    for block in &memory.blocks {
        out.extend_from_slice(&block.at.to_le_bytes());
        out.extend_from_slice(&block.heads.to_le_bytes());
        out.extend_from_slice(&block.bodies.to_le_bytes());
    }
    let mut ranges: Vec<Written> = Vec::new();
    let mut scope = None;
    for (row, entry) in rows().enumerate() {
        if scope != Some(entry.scope) {
            scope = Some(entry.scope);
            let (account, gateway) = name(entry.scope);
            let row = row as u32;
            let (account, gateway) = (account.into(), gateway.into());
            ranges.push(Written { account, gateway, begin: row, end: row, first: entry.id, last: entry.id });
        }
        if let Some(range) = ranges.last_mut() {
            (range.end, range.last) = (row as u32 + 1, entry.id);
        }
    }
    let footer = Footer { rows: order.len() as u32, ids: 0, columns, dictionaries, blocks, ranges, log: memory.bytes };
    let footer = serde_json::to_vec(&footer)?;
    out.extend_from_slice(&footer);
    out.extend_from_slice(&(footer.len() as u32).to_le_bytes());
    out.extend_from_slice(&checksum(&footer));
    let has_marks = rows().any(|entry| entry.marks != [0; 3]);
    let marks = || Plane::ALL.iter().flat_map(|plane| rows().map(|entry| entry.marks[*plane as usize])).collect();
    Ok(Image { bytes: out, marks: has_marks.then(marks), rows: order.len() as u32 })
}

/// The rank of each scope among their names, by its number: rows that are sorted by it are in the same order whenever it is done again.
fn by_name<'a>(scopes: impl Iterator<Item = u32>, name: impl Fn(u32) -> (&'a str, &'a str)) -> Vec<u32> {
    let mut scopes: Vec<u32> = scopes.collect::<HashSet<_>>().into_iter().collect();
    scopes.sort_by_key(|scope| name(*scope));
    let mut ranks = vec![0; scopes.iter().max().map_or(0, |last| *last as usize + 1)];
    scopes.iter().enumerate().for_each(|(rank, scope)| ranks[*scope as usize] = rank as u32);
    ranks
}

fn widen<T: Ord + Copy>((min, max): &mut (T, T), value: T) {
    (*min, *max) = ((*min).min(value), (*max).max(value));
}

/// Packs values whose bounds are not known yet.
fn measured(values: impl Iterator<Item = u64> + Clone, out: &mut Vec<u8>) -> Packed {
    let mut bounds = (u64::MAX, 0);
    values.clone().for_each(|value| widen(&mut bounds, value));
    pack(values, bounds, out)
}

/// Packs values that lie between the least and the most.
fn pack(values: impl Iterator<Item = u64>, (min, max): (u64, u64), out: &mut Vec<u8>) -> Packed {
    let min = min.min(max);
    let width = match max - min {
        0 => 0,
        1..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    };
    let at = out.len() as u64;
    // Those without a width are all the same, and said already.
    if width > 0 {
        for value in values {
            out.extend_from_slice(&(value - min).to_le_bytes()[..width as usize]);
        }
    }
    Packed { at, width, min, max }
}
