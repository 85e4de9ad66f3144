//! Rows as bytes: what lies on disk, and in memory where there is no disk.
//!
//! ```text
//! version | names: count, (length, text)… | rows: (5 names, status, cache, 13 sums, length, latency bins, length, ttft bins)…
//! ```
//!
//! All numbers are of variable length (`codec.rs`). Names are told once a block, so a block can be read alone; a row's names
//! are their places in that list from 1, and 0 is `other`. Reading takes no copy: a line's sketches stay bytes until somebody
//! wants them. Knows nothing of time and files; that the bytes are whole is the segment's to say.

use crate::base::Lookup;
use crate::logs::analytics::codec::{put, put_bytes, take, take_bytes};
use crate::logs::analytics::row::{Counts, Key, NAMES, Names, OTHER, Row};

/// The first byte; a block with another one is not read.
const VERSION: u8 = 1;

/// A block, its names read and its rows not.
pub(super) struct Block<'a> {
    names: Vec<&'a str>,
    rows: &'a [u8],
}

/// A row as it lies in its block.
pub(super) struct Line<'a> {
    /// Its names are places in the block's list of names, from 1; 0 is `other`.
    pub(super) key: Key,
    pub(super) counts: Counts,
    pub(super) latency: &'a [u8],
    pub(super) ttft: &'a [u8],
}

/// Writes a block of these rows, with those names that they use.
pub(super) fn encode(names: &Names, rows: &Lookup<Key, Row>) -> Vec<u8> {
    let mut places: Lookup<u32, u64> = Lookup::from_iter([(OTHER, 0)]);
    let (mut texts, mut lines, mut bins) = (Vec::new(), Vec::new(), Vec::new());
    for (key, row) in rows {
        for name in key.names {
            let next = places.len() as u64;
            let place = *places.entry(name).or_insert_with(|| {
                put_bytes(&mut texts, names.text(name).as_bytes());
                next
            });
            put(&mut lines, place);
        }
        put(&mut lines, key.status.into());
        put(&mut lines, key.cache.into());
        let mut counts = row.counts;
        counts.fields().into_iter().for_each(|count| put(&mut lines, *count));
        for sketch in [&row.latency, &row.ttft] {
            bins.clear();
            sketch.encode(&mut bins);
            put_bytes(&mut lines, &bins);
        }
    }
    let mut out = vec![VERSION];
    put(&mut out, places.len() as u64 - 1);
    out.extend(texts);
    out.extend(lines);
    out
}

impl<'a> Block<'a> {
    /// `None`: these bytes are none, or of another version.
    pub(super) fn read(mut bytes: &'a [u8]) -> Option<Self> {
        if *bytes.split_off_first()? != VERSION {
            return None;
        }
        let names = take(&mut bytes)?;
        let names = (0..names).map(|_| std::str::from_utf8(take_bytes(&mut bytes)?).ok()).collect::<Option<_>>()?;
        Some(Self { names, rows: bytes })
    }

    /// From the one whose number is 1.
    pub(super) fn names(&self) -> &[&'a str] {
        &self.names
    }

    /// The rows; a `None` among them: the rest is damaged.
    pub(super) fn lines(&self) -> impl Iterator<Item = Option<Line<'a>>> {
        let mut rest = self.rows;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let line = line(&mut rest);
            if line.is_none() {
                rest = &[];
            }
            Some(line)
        })
    }
}

fn line<'a>(rest: &mut &'a [u8]) -> Option<Line<'a>> {
    let mut key = Key { names: [OTHER; NAMES], ..Key::default() };
    for name in &mut key.names {
        *name = u32::try_from(take(rest)?).ok()?;
    }
    key.status = u16::try_from(take(rest)?).ok()?;
    key.cache = u8::try_from(take(rest)?).ok()?;
    let mut counts = Counts::default();
    for count in counts.fields() {
        *count = take(rest)?;
    }
    Some(Line { key, counts, latency: take_bytes(rest)?, ttft: take_bytes(rest)? })
}
