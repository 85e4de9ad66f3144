//! The index of a full segment, as a file: rows sorted by gateway and id, one column after another.
//!
//! ```text
//!   N.G.columns   [ids] [numbers …] [texts: codes, dictionary …] [blocks] [footer][length u32][checksum]
//!   N.G.marks     [dead] [feedback] [score]            a byte a row each, written in place; not there while no row has one
//! ```
//!
//! Numbers are as wide as what lies between the least and the most of their column: 0, 1, 2, 4 or 8 bytes. Dictionaries are sorted, so a
//! text is found without reading them. A gateway's rows lie side by side. The file never changes, and can be made again from the log.
//! `G` counts how often a segment was rewritten.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::block::{Block, Plane};
use super::memory::TEXTS;
use crate::logs::query::Number;
use crate::store::snapshot;

/// Columns in order: numbers, codes of texts, block, slot.
pub(super) const FIRST_TEXT: usize = Number::COUNT;
pub(super) const BLOCK: usize = FIRST_TEXT + TEXTS;
pub(super) const SLOT: usize = BLOCK + 1;
pub(super) const COLUMNS: usize = SLOT + 1;
/// Bytes of a block in the file.
const BLOCK_BYTES: u64 = 16;
/// Dictionaries up to here are read as a whole.
const SMALL: u64 = 64 << 10;
/// Bytes of a column that are read at once.
const PIECE: usize = 16 << 10;

/// Where a column lies, how wide its numbers are, and what is added to them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Packed {
    pub(super) at: u64,
    pub(super) width: u8,
    pub(super) min: u64,
    pub(super) max: u64,
}

/// Texts: that many ends of four bytes, then the bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Dictionary {
    pub(super) at: u64,
    pub(super) words: u32,
    pub(super) bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) account: Box<str>,
    pub(super) gateway: Box<str>,
    pub(super) begin: u32,
    pub(super) end: u32,
    pub(super) first: u128,
    pub(super) last: u128,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Footer {
    pub(super) rows: u32,
    pub(super) ids: u64,
    pub(super) columns: Vec<Packed>,
    pub(super) dictionaries: Vec<Dictionary>,
    pub(super) blocks: u64,
    pub(super) ranges: Vec<Written>,
    /// Bytes of the log.
    pub(super) log: u64,
}

/// The rows of one gateway.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) scope: u32,
    pub(super) begin: u32,
    pub(super) end: u32,
    /// Its least and its greatest id.
    pub(super) first: u128,
    pub(super) last: u128,
    pub(super) dead: AtomicU32,
}

impl Range {
    /// Rows that were not deleted.
    pub(super) fn live(&self) -> u32 {
        self.end - self.begin - self.dead.load(Ordering::Acquire)
    }
}

/// A full segment.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) number: u32,
    pub(super) stem: PathBuf,
    pub(super) ranges: Vec<Range>,
    pub(super) rows: u32,
    /// Bytes of all its files.
    pub(super) bytes: u64,
    footer: Footer,
    is_marked: AtomicBool,
    changes: AtomicU32,
}

/// Puts a segment's files in their place: the marks first, since the columns make it count.
pub(super) fn write(stem: &Path, image: &[u8], marks: Option<&[u8]>) -> io::Result<()> {
    if let Some(marks) = marks {
        snapshot::write(&with(stem, "marks"), marks, snapshot::PRIVATE)?;
    }
    snapshot::write(&with(stem, "columns"), image, snapshot::PRIVATE)
}

/// A segment's file: `N.G` and what it is.
pub(super) fn with(stem: &Path, what: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(".");
    name.push(what);
    name.into()
}

impl Sealed {
    /// Opens what is there; `scope` numbers an account and a gateway. Nothing if the columns are damaged.
    pub(super) fn open(
        number: u32,
        stem: PathBuf,
        mut scope: impl FnMut(&str, &str) -> u32,
    ) -> io::Result<Option<Self>> {
        let file = File::open(with(&stem, "columns"))?;
        let length = file.metadata()?.len();
        let Some(footer) = read_footer(&file, length)? else { return Ok(None) };
        let mut ranges: Vec<Range> = footer
            .ranges
            .iter()
            .map(|range| Range {
                scope: scope(&range.account, &range.gateway),
                begin: range.begin,
                end: range.end,
                first: range.first,
                last: range.last,
                dead: AtomicU32::new(0),
            })
            .collect();
        let marks = match std::fs::read(with(&stem, "marks")) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            read => Some(read?).filter(|marks| marks.len() == footer.rows as usize * Plane::ALL.len()),
        };
        if let Some(marks) = &marks {
            for range in &mut ranges {
                let dead = marks[range.begin as usize..range.end as usize].iter().filter(|dead| **dead != 0).count();
                range.dead = AtomicU32::new(dead as u32);
            }
        }
        ranges.sort_by_key(|range| range.scope);
        let bytes = length + footer.log + marks.as_ref().map_or(0, |marks| marks.len() as u64);
        let (rows, is_marked) = (footer.rows, AtomicBool::new(marks.is_some()));
        Ok(Some(Self { number, stem, ranges, rows, bytes, footer, is_marked, changes: AtomicU32::new(0) }))
    }

    /// The rows of a scope, if there are any.
    pub(super) fn range(&self, scope: u32) -> Option<&Range> {
        self.ranges.binary_search_by_key(&scope, |range| range.scope).ok().map(|at| &self.ranges[at])
    }

    /// Rows that were not deleted.
    pub(super) fn live(&self) -> u32 {
        self.ranges.iter().map(Range::live).sum()
    }

    /// How often it was rewritten.
    pub(super) fn generation(&self) -> u32 {
        self.stem.extension().and_then(|text| text.to_str()?.parse().ok()).unwrap_or_default()
    }

    /// How often rows were marked since it was opened.
    pub(super) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    pub(super) fn log(&self) -> PathBuf {
        with(&self.stem, "log")
    }

    /// Sets a mark of rows, which are sorted; returns the file that is to be synced.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn mark(&self, range: &Range, rows: &[u32], plane: Plane, value: u8) -> io::Result<Option<File>> {
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(None) };
        let path = with(&self.stem, "marks");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(snapshot::PRIVATE)
            .open(path)?;
        let whole = u64::from(self.rows) * Plane::ALL.len() as u64;
        if file.metadata()?.len() != whole {
            file.set_len(whole)?;
            if let Some(folder) = self.stem.parent() {
                File::open(folder)?.sync_all()?;
            }
        }
        let at = plane as u64 * u64::from(self.rows) + u64::from(*first);
        let mut marks = vec![0; (last - first) as usize + 1];
        file.read_exact_at(&mut marks, at)?;
        let mut newly = 0;
        for row in rows {
            let mark = &mut marks[(row - first) as usize];
            newly += u32::from(*mark == 0);
            *mark = value;
        }
        file.write_all_at(&marks, at)?;
        self.is_marked.store(true, Ordering::Release);
        self.changes.fetch_add(1, Ordering::AcqRel);
        if plane == Plane::Dead {
            range.dead.fetch_add(newly, Ordering::AcqRel);
        }
        Ok(Some(file))
    }

    /// Deletes the files; readers that have them open keep them.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove(&self.stem)
    }
}

/// Deletes what there is of a segment, the log first: columns are made again for a log that has none, and columns without a log are
/// nothing.
pub(super) fn remove(stem: &Path) -> io::Result<()> {
    for what in ["log", "columns", "marks"] {
        match std::fs::remove_file(with(stem, what)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A gateway's rows in a full segment, open for reading.
pub(super) struct View<'a> {
    pub(super) sealed: &'a Sealed,
    pub(super) range: &'a Range,
    file: File,
    marks: Option<File>,
    bytes: Vec<u8>,
}

impl<'a> View<'a> {
    /// Nothing if the segment was deleted meanwhile.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open(sealed: &'a Sealed, range: &'a Range) -> io::Result<Option<Self>> {
        let open = |what: &str| match File::open(with(&sealed.stem, what)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        };
        let Some(file) = open("columns")? else { return Ok(None) };
        let marks = if sealed.is_marked.load(Ordering::Acquire) { open("marks")? } else { None };
        Ok(Some(Self { sealed, range, file, marks, bytes: Vec::new() }))
    }

    pub(super) fn len(&self) -> usize {
        (self.range.end - self.range.begin) as usize
    }

    /// Least and most of a column, over all gateways.
    pub(super) fn limits(&self, column: usize) -> (u64, u64) {
        let packed = self.column(column);
        (packed.min, packed.max)
    }

    /// A whole column.
    pub(super) fn numbers(&self, column: usize, out: &mut Vec<u64>) -> io::Result<()> {
        let Packed { at, width, min, .. } = self.column(column);
        match width {
            0 => {
                out.clear();
                out.resize(self.len(), min);
                Ok(())
            }
            1 => self.read(at, out, |[byte]: [u8; 1]| min + u64::from(byte)),
            2 => self.read(at, out, |bytes| min + u64::from(u16::from_le_bytes(bytes))),
            4 => self.read(at, out, |bytes| min + u64::from(u32::from_le_bytes(bytes))),
            _ => self.read(at, out, |bytes| min.wrapping_add(u64::from_le_bytes(bytes))),
        }
    }

    /// The numbers of all rows in a column that begins at `at`, by pieces that stay in the processor's cache.
    fn read<T, const WIDTH: usize>(
        &self,
        at: u64,
        out: &mut Vec<T>,
        number: impl Fn([u8; WIDTH]) -> T,
    ) -> io::Result<()> {
        let mut bytes = [0; PIECE];
        out.clear();
        out.reserve(self.len());
        while out.len() < self.len() {
            let piece = &mut bytes[..(self.len() - out.len()).min(PIECE / WIDTH) * WIDTH];
            let row = u64::from(self.range.begin) + out.len() as u64;
            self.file.read_exact_at(piece, at + row * WIDTH as u64)?;
            out.extend(piece.as_chunks().0.iter().map(|bytes| number(*bytes)));
        }
        Ok(())
    }

    /// One row of a column.
    fn number(&self, column: usize, row: u32) -> io::Result<u64> {
        let Packed { at, width, min, .. } = self.column(column);
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes[..width as usize], at + u64::from(row) * u64::from(width))?;
        Ok(min.wrapping_add(u64::from_le_bytes(bytes)))
    }

    /// All ids, which are sorted.
    pub(super) fn ids(&self, out: &mut Vec<u128>) -> io::Result<()> {
        self.read(self.sealed.footer.ids, out, u128::from_le_bytes)
    }

    /// How many rows of the range have a smaller id.
    pub(super) fn rank(&self, id: u128) -> io::Result<u32> {
        let (mut low, mut high) = (self.range.begin, self.range.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let mut bytes = [0; 16];
            self.file.read_exact_at(&mut bytes, self.sealed.footer.ids + u64::from(middle) * 16)?;
            match u128::from_le_bytes(bytes) < id {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(low - self.range.begin)
    }

    /// The row of an id, dead or not.
    pub(super) fn find(&self, id: u128) -> io::Result<Option<u32>> {
        if !(self.range.first..=self.range.last).contains(&id) {
            return Ok(None);
        }
        let row = self.range.begin + self.rank(id)?;
        // Its greatest id ends the range, so the row is one of it.
        let mut bytes = [0; 16];
        self.file.read_exact_at(&mut bytes, self.sealed.footer.ids + u64::from(row) * 16)?;
        Ok((u128::from_le_bytes(bytes) == id).then_some(row))
    }

    /// A plane of marks; nothing if there are none.
    pub(super) fn plane(&self, plane: Plane) -> io::Result<Option<Vec<u8>>> {
        let Some(marks) = &self.marks else { return Ok(None) };
        let mut bytes = vec![0; self.len()];
        let at = plane as u64 * u64::from(self.sealed.rows) + u64::from(self.range.begin);
        marks.read_exact_at(&mut bytes, at)?;
        Ok(Some(bytes))
    }

    /// The marks of one row.
    pub(super) fn marks(&self, row: u32) -> io::Result<[u8; 3]> {
        let mut marks = [0; 3];
        if let Some(file) = &self.marks {
            for (plane, mark) in marks.iter_mut().enumerate() {
                file.read_exact_at(
                    std::slice::from_mut(mark),
                    plane as u64 * u64::from(self.sealed.rows) + u64::from(row),
                )?;
            }
        }
        Ok(marks)
    }

    /// The code of a text; `None`: no row has it.
    pub(super) fn code(&mut self, text: usize, word: &str) -> io::Result<Option<u64>> {
        let dictionary = self.sealed.footer.dictionaries[text];
        if dictionary.bytes <= SMALL {
            let words = self.words(text)?;
            return Ok(words.iter().position(|known| known == word.as_bytes()).map(|at| at as u64 + 1));
        }
        let (mut low, mut high) = (0, dictionary.words);
        while low < high {
            let middle = low + (high - low) / 2;
            self.read_word(dictionary, middle)?;
            match self.bytes.as_slice().cmp(word.as_bytes()) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(Some(u64::from(middle) + 1)),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    fn read_word(&mut self, dictionary: Dictionary, word: u32) -> io::Result<()> {
        let mut ends = [0; 8];
        match word {
            0 => self.file.read_exact_at(&mut ends[4..], dictionary.at)?,
            _ => self.file.read_exact_at(&mut ends, dictionary.at + u64::from(word - 1) * 4)?,
        }
        let [a, b, c, d, e, f, g, h] = ends;
        let (begin, end) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        self.bytes.resize(end.saturating_sub(begin) as usize, 0);
        let at = dictionary.at + u64::from(dictionary.words) * 4 + u64::from(begin);
        self.file.read_exact_at(&mut self.bytes, at)
    }

    /// All words of a column; word `n` has the code `n + 1`.
    pub(super) fn words(&self, text: usize) -> io::Result<Vocabulary> {
        let Dictionary { at, words, bytes } = self.sealed.footer.dictionaries[text];
        let mut read = vec![0; words as usize * 4 + bytes as usize];
        self.file.read_exact_at(&mut read, at)?;
        let text = read.split_off(words as usize * 4);
        let ends = read.as_chunks().0.iter().map(|end| u32::from_le_bytes(*end)).collect();
        Ok(Vocabulary { ends, text })
    }

    /// Where a block lies.
    pub(super) fn block(&self, block: u64) -> io::Result<Block> {
        let mut bytes = [0; BLOCK_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.sealed.footer.blocks + block * BLOCK_BYTES)?;
        let number = u128::from_le_bytes(bytes);
        Ok(Block { at: number as u64, heads: (number >> 64) as u32, bodies: (number >> 96) as u32 })
    }

    /// The block of a row, and which of its records it is.
    pub(super) fn place(&self, row: u32) -> io::Result<(Block, u32)> {
        Ok((self.block(self.number(BLOCK, row)?)?, self.number(SLOT, row)? as u32))
    }

    fn column(&self, column: usize) -> Packed {
        self.sealed.footer.columns[column]
    }
}

/// Texts one behind the other.
#[derive(Clone, Default)]
pub(super) struct Vocabulary {
    ends: Vec<u32>,
    pub(super) text: Vec<u8>,
}

impl Vocabulary {
    pub(super) fn of(words: impl Iterator<Item = impl AsRef<str>>) -> Self {
        let mut vocabulary = Self::default();
        for word in words {
            vocabulary.text.extend_from_slice(word.as_ref().as_bytes());
            vocabulary.ends.push(vocabulary.text.len() as u32);
        }
        vocabulary
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn word(&self, at: usize) -> &[u8] {
        let begin = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[begin as usize..self.ends[at] as usize]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|at| self.word(at))
    }

    /// The word that a place of the text is in, and where that word ends.
    pub(super) fn at(&self, place: usize) -> (usize, usize) {
        let word = self.ends.partition_point(|end| *end as usize <= place);
        (word, self.ends.get(word).map_or(self.text.len(), |end| *end as usize))
    }
}

fn read_footer(file: &File, length: u64) -> io::Result<Option<Footer>> {
    let Some(tail) = length.checked_sub(8) else { return Ok(None) };
    let mut end = [0; 8];
    file.read_exact_at(&mut end, tail)?;
    let [a, b, c, d, sum @ ..] = end;
    let bytes = u32::from_le_bytes([a, b, c, d]);
    let Some(at) = tail.checked_sub(bytes.into()) else { return Ok(None) };
    let mut footer = vec![0; bytes as usize];
    file.read_exact_at(&mut footer, at)?;
    if checksum(&footer) != sum {
        return Ok(None);
    }
    let read: Option<Footer> = serde_json::from_slice(&footer).ok();
    // Written by another version, which had other columns.
    Ok(read.filter(|read| read.columns.len() == COLUMNS && read.dictionaries.len() == TEXTS))
}

pub(super) fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut sum = [0; 4];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..4]);
    sum
}
