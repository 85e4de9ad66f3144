//! The columns of a segment out of its index in memory: sorted, packed and put one behind another.
//!
//! Pure, and the same bytes whenever it is done again.

use std::collections::{HashMap, HashSet};
use std::io;

use super::columns::{COLUMNS, Dictionary, Footer, Packed, Written, checksum};
use super::memory::{Memory, Plane, TEXTS};
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
        (ranks.get(&entry.scope), entry.id, *row)
    });
    let rows = || order.iter().map(|row| &entries[*row as usize]);
    let mut out = Vec::new();
    rows().for_each(|entry| out.extend_from_slice(&entry.id.to_le_bytes()));
    let mut columns = Vec::with_capacity(COLUMNS);
    for number in 0..Number::COUNT {
        columns.push(pack(rows().map(|entry| entry.numbers[number]), &mut out));
    }
    let mut dictionaries = Vec::with_capacity(TEXTS);
    for (text, words) in memory.words.iter().enumerate() {
        let mut sorted: Vec<u32> = (0..words.list.len() as u32).collect();
        sorted.sort_by(|one, other| words.list[*one as usize].cmp(&words.list[*other as usize]));
        let mut codes = vec![0; sorted.len() + 1];
        sorted.iter().enumerate().for_each(|(at, word)| codes[*word as usize + 1] = at as u64 + 1);
        columns.push(pack(rows().map(|entry| codes[entry.texts[text] as usize]), &mut out));
        let at = out.len() as u64;
        let mut end = 0;
        for word in &sorted {
            end += words.list[*word as usize].len() as u32;
            out.extend_from_slice(&end.to_le_bytes());
        }
        sorted.iter().for_each(|word| out.extend_from_slice(words.list[*word as usize].as_bytes()));
        dictionaries.push(Dictionary { at, words: sorted.len() as u32, bytes: end.into() });
    }
    columns.push(pack(rows().map(|entry| entry.block.into()), &mut out));
    columns.push(pack(rows().map(|entry| entry.slot.into()), &mut out));
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

/// The scopes in the order of their names: rows that are sorted by it are in the same order whenever it is done again.
fn by_name<'a>(scopes: impl Iterator<Item = u32>, name: impl Fn(u32) -> (&'a str, &'a str)) -> HashMap<u32, usize> {
    let mut scopes: Vec<u32> = scopes.collect::<HashSet<_>>().into_iter().collect();
    scopes.sort_by_key(|scope| name(*scope));
    scopes.into_iter().enumerate().map(|(rank, scope)| (scope, rank)).collect()
}

fn pack(values: impl Iterator<Item = u64> + Clone, out: &mut Vec<u8>) -> Packed {
    let (min, max) = values.clone().fold((u64::MAX, 0), |(min, max), value| (min.min(value), max.max(value)));
    let min = min.min(max);
    let width = match max - min {
        0 => 0,
        1..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    };
    let at = out.len() as u64;
    for value in values {
        out.extend_from_slice(&(value - min).to_le_bytes()[..width as usize]);
    }
    Packed { at, width, min, max }
}
