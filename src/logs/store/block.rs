//! Records in a segment's log: blocks of a few dozen, their heads and their bodies apart, so that a list reads no bodies.
//!
//! ```text
//!   N.log   [heads][bodies] [heads][bodies] [marks] [heads][bodies] …          each a frame with its checksum
//! ```
//!
//! Heads and bodies are LZ4. A frame of marks says what became of rows of the same log. What a crash tore is cut before the heads
//! whose bodies are not whole.

use std::io::{self, ErrorKind};
use std::path::Path;

use bytes::Bytes;

use super::row;
use crate::base::LogId;
use crate::logs::record::Record;
use crate::store::{Frames, Segment};

/// Bytes of bodies after which a block is full, and records.
const FULL: usize = 128 << 10;
pub(super) const MOST: usize = 512;
const HEADS: u8 = 0;
/// Heads of records that take the place of older ones with the same id.
const REPLACING: u8 = 1;
const MARKS: u8 = 2;

/// Where a block lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Block {
    pub(super) at: u64,
    pub(super) heads: u32,
    pub(super) bodies: u32,
}

/// What may become of a row: a byte for each, in a plane of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Plane {
    /// 1: deleted.
    Dead,
    /// 0: none; else -1, 0, 1 as 1, 2, 3.
    Feedback,
    /// 0: none; else the score and one.
    Score,
}

impl Plane {
    pub(super) const ALL: [Self; 3] = [Self::Dead, Self::Feedback, Self::Score];
}

/// One row's mark: which row of the log, of what kind, and its value.
pub(super) type Mark = (u32, Plane, u8);

/// What is in a log, in order.
pub(super) enum Seen {
    Block { block: Block, heads: Vec<Record>, is_replacing: bool },
    Marks(Vec<Mark>),
}

/// Blocks in the making; its buffers are used again.
#[derive(Default)]
pub(super) struct Writer {
    heads: Vec<u8>,
    bodies: Vec<u8>,
    packed: [Vec<u8>; 2],
}

impl Writer {
    /// How many of these records go into the next block; at least one where there are any.
    pub(super) fn next(records: &[(LogId, &Record)]) -> usize {
        let mut bytes = 0;
        let count = records.iter().take(MOST).take_while(|(_, record)| {
            let is_first = bytes == 0;
            bytes += bytes_of(record).max(1);
            is_first || bytes <= FULL
        });
        count.count()
    }

    /// Writes one block.
    ///
    /// # Errors
    /// The system's; nothing of the block is left then.
    pub(super) fn write(
        &mut self,
        log: &mut Segment,
        records: &[(LogId, &Record)],
        is_replacing: bool,
    ) -> io::Result<Block> {
        self.heads.clear();
        self.bodies.clear();
        for (id, record) in records {
            row::encode(*id, record, &mut self.heads);
            for body in [&record.asked.kept, &record.answered.kept] {
                row::put_number(&mut self.bodies, body.len() as u64);
                self.bodies.extend_from_slice(body);
            }
        }
        let [heads, bodies] = &mut self.packed;
        pack(if is_replacing { REPLACING } else { HEADS }, &self.heads, heads)?;
        pack(HEADS, &self.bodies, bodies)?;
        let at = log.write(&[heads, bodies])?;
        Ok(Block { at, heads: heads.len() as u32, bodies: bodies.len() as u32 })
    }
}

/// Notes marks; on disk after the next sync.
///
/// # Errors
/// The system's.
pub(super) fn write_marks(log: &mut Segment, marks: &[Mark]) -> io::Result<()> {
    let mut frame = vec![MARKS];
    for (row, plane, value) in marks {
        row::put_number(&mut frame, (*row).into());
        frame.extend_from_slice(&[*plane as u8, *value]);
    }
    log.write(&[&frame]).map(drop)
}

/// Goes through a log; returns where what is whole ends.
///
/// # Errors
/// The system's.
pub(super) fn walk(path: &Path, mut see: impl FnMut(Seen)) -> io::Result<u64> {
    let mut frames = Frames::open(path)?;
    let mut frame = Vec::new();
    loop {
        let at = frames.at();
        if !frames.read(&mut frame)? {
            return Ok(at);
        }
        if let [MARKS, marks @ ..] = &frame[..] {
            see(Seen::Marks(read_marks(marks)));
            continue;
        }
        let (Some(heads), Some(bodies)) = (heads(&frame), frames.skip()?) else { return Ok(at) };
        let block = Block { at, heads: frame.len() as u32, bodies: bodies as u32 };
        see(Seen::Block { block, heads, is_replacing: frame[0] == REPLACING });
    }
}

/// The heads of a block; nothing if it is damaged, or its segment is gone.
///
/// # Errors
/// The system's.
pub(super) fn read_heads(path: &Path, block: Block) -> io::Result<Option<Vec<Record>>> {
    Ok(frame_at(path, block.at, block.heads)?.as_deref().and_then(heads))
}

/// The bodies of a block as [`each`] takes them: lengths and bytes.
///
/// # Errors
/// The system's.
pub(super) fn read_bodies(path: &Path, block: Block) -> io::Result<Option<Bytes>> {
    let at = block.at + 8 + u64::from(block.heads);
    Ok(frame_at(path, at, block.bodies)?.as_deref().and_then(unpack).map(Bytes::from))
}

/// What is kept of request and answer, record by record.
pub(super) fn each(bodies: &Bytes) -> impl Iterator<Item = [Bytes; 2]> + '_ {
    let mut rest = &bodies[..];
    let mut next = move || {
        let length = usize::try_from(row::number(&mut rest)?).ok()?;
        let (body, behind) = rest.split_at_checked(length)?;
        rest = behind;
        Some(bodies.slice_ref(body))
    };
    std::iter::from_fn(move || Some([next()?, next()?]))
}

/// Gives each head its bodies; nothing if some are missing.
pub(super) fn fill(heads: &mut [Record], bodies: &Bytes) -> Option<()> {
    let mut bodies = each(bodies);
    for record in heads {
        [record.asked.kept, record.answered.kept] = bodies.next()?;
    }
    Some(())
}

/// Bytes that a record takes before it is packed.
pub(super) fn bytes_of(record: &Record) -> usize {
    record.asked.kept.len() + record.answered.kept.len()
}

fn frame_at(path: &Path, at: u64, length: u32) -> io::Result<Option<Vec<u8>>> {
    match Segment::read_at(path, at, length as usize) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => read,
    }
}

fn heads(frame: &[u8]) -> Option<Vec<Record>> {
    let bytes = unpack(frame)?;
    let (mut rest, mut heads) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        heads.push(row::decode(&mut rest)?);
    }
    Some(heads)
}

fn read_marks(mut bytes: &[u8]) -> Vec<Mark> {
    let mut marks = Vec::new();
    while let Some(row) = row::number(&mut bytes) {
        let Some(([plane, value], rest)) = bytes.split_first_chunk() else { break };
        marks.extend(Plane::ALL.get(*plane as usize).map(|plane| (row as u32, *plane, *value)));
        bytes = rest;
    }
    marks
}

/// Kind, length as it was, and the bytes packed.
fn pack(kind: u8, bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    out.clear();
    out.push(kind);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    let head = out.len();
    out.resize(head + lz4_flex::block::get_maximum_output_size(bytes.len()), 0);
    let length = lz4_flex::block::compress_into(bytes, &mut out[head..]).map_err(io::Error::other)?;
    out.truncate(head + length);
    Ok(())
}

fn unpack(frame: &[u8]) -> Option<Vec<u8>> {
    let (length, packed) = frame.get(1..)?.split_first_chunk()?;
    lz4_flex::block::decompress(packed, u32::from_le_bytes(*length) as usize).ok()
}
