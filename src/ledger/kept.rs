//! All that survives a crash, and how it is read back from the ledger's folder.
//!
//! ```text
//! book, then the segments in order ─ each entry once ─> Kept, and up to where it was said to be on disk
//! ```
//!
//! - **Entries are numbered without gaps.** One that is met twice counts once.
//! - **Each frame says what was on disk when it was written.** After a loss of power a segment may have entries whose
//!   predecessors, in another one, did not reach the disk. Nobody was told that those were kept, so what lies behind such a gap
//!   is passed over. A gap in what was promised stops the start.
//! - A torn end is not an error: nobody was told that it was on disk.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::ledger::book::Book;
use crate::ledger::entry::Entry;
use crate::ledger::rows::Rows;
use crate::store::Segment;

const VERSION: u8 = 2;

/// The sum of all entries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Kept {
    /// The last entry in it.
    pub(super) seq: u64,
    pub(super) book: Book,
    pub(super) rows: Rows,
}

impl Kept {
    pub(super) fn new(max_windows: usize, max_rows: usize) -> Self {
        let mut kept = Self { seq: 0, book: Book::new(max_windows), rows: Rows::default() };
        kept.rows.limit(max_rows);
        kept
    }

    pub(super) fn apply(&mut self, entry: &Entry) {
        self.seq = entry.seq;
        self.book.apply(entry);
        if let Some(bill) = &entry.bill {
            self.rows.add(bill);
        }
    }

    /// As a snapshot has it.
    ///
    /// # Errors
    /// None that a book can cause.
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        let body = rmp_serde::to_vec(self).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(body.len() + 33);
        bytes.push(VERSION);
        bytes.extend_from_slice(blake3::hash(&body).as_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// What a snapshot has.
    ///
    /// # Errors
    /// `BadInput` when it is damaged or of another version.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        let Some((&VERSION, rest)) = bytes.split_first() else { return Err(foreign(path)) };
        let Some((sum, body)) = rest.split_first_chunk::<32>() else { return Err(damaged(path)) };
        if blake3::hash(body).as_bytes() != sum {
            return Err(damaged(path));
        }
        rmp_serde::from_slice(body).map_err(|error| foreign(path).with_source(error))
    }
}

/// Begins a frame: everything up to entry `durable` is on disk.
pub(super) fn frame(durable: u64) -> Vec<u8> {
    let mut frame = vec![VERSION];
    frame.extend_from_slice(&durable.to_le_bytes());
    frame
}

/// Adds the entries of a segment that `kept` does not have. Returns the highest entry that a frame says is on disk.
///
/// # Errors
/// `BadInput` when the segment cannot be read or is of another version.
pub(super) fn replay(path: &Path, kept: &mut Kept) -> Result<u64> {
    let mut outcome = Ok(());
    let mut promised = 0;
    let read = Segment::read(path, |frame| {
        if outcome.is_ok() {
            outcome = replay_frame(frame, path, kept).map(|durable| promised = promised.max(durable));
        }
    });
    read.map_err(|error| Error::bad_input(format!("The ledger cannot read {}: {error}.", path.display())))?;
    outcome.map(|()| promised)
}

fn replay_frame(frame: &[u8], path: &Path, kept: &mut Kept) -> Result<u64> {
    let Some((&VERSION, rest)) = frame.split_first() else { return Err(foreign(path)) };
    let Some((durable, mut rest)) = rest.split_first_chunk() else { return Err(foreign(path)) };
    while !rest.is_empty() {
        let entry: Entry = rmp_serde::from_read(&mut rest).map_err(|error| foreign(path).with_source(error))?;
        if entry.seq == kept.seq + 1 {
            kept.apply(&entry);
        }
    }
    Ok(u64::from_le_bytes(*durable))
}

fn foreign(path: &Path) -> Error {
    let name = path.display();
    Error::bad_input(format!("{name} is not of a ledger that this version reads: start the version that wrote it."))
}

fn damaged(path: &Path) -> Error {
    let name = path.display();
    Error::bad_input(format!("{name} is damaged: bring it back from a backup, or move the ledger's folder away."))
}
