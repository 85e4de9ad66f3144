//! A gateway's rows in one segment, on disk or still in memory, looked at alike.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use super::block::{Block, Plane};
use super::columns::{FIRST_TEXT, View, Vocabulary};
use super::memory::{Entry, KEYS, Memory, TEXTS, VALUES};
use crate::base::Error;
use crate::logs::query::{Order, Query, Test, Text};

/// Texts that a search looks at.
pub(super) const SEARCHED: [Text; 3] = [Text::Provider, Text::Model, Text::Event];

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
        texts.extend(SEARCHED.map(|text| text as usize));
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
