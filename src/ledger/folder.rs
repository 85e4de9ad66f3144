//! The ledger's files: a snapshot of what is kept, and what was settled since.
//!
//! ```text
//!   book             version, checksum, everything up to entry n        replaced as a whole
//!   00000007.wal     [entries …] [entries …]                            one frame a group commit
//!   lock             held by the daemon that writes here
//! ```
//!
//! - **A start ends with a snapshot**, before anything else is written: what an earlier process believed to be on disk is
//!   written anew, and no old segment is ever appended to.
//! - **A segment that failed once is left alone.** After a sync that failed nobody knows what the disk holds, and the next
//!   sync would say that all is well. What is not known to be on disk is written again, to a new segment.
//! - **Entries are numbered without gaps.** One that is met twice counts once; one that is missing stops the start.
//! - A torn end is not an error: nobody was told that it was on disk.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::base::{Error, Result};
use crate::ledger::book::Book;
use crate::ledger::entry::Entry;
use crate::ledger::rows::Rows;
use crate::store::{Disk, Segment, lock, snapshot};

const VERSION: u8 = 1;
const BOOK: &str = "book";
const SUFFIX: &str = "wal";
/// Bytes of entries in one frame, about.
const FRAME_BYTES: usize = 1 << 20;

/// All that survives a crash: the sum of all entries.
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
}

/// The folder, open for one writer.
pub(super) struct Folder<D: Disk> {
    disk: D,
    path: PathBuf,
    /// Held as long as this lives.
    _lock: File,
    active: Option<Segment<D::File>>,
    /// Whether the active one has entries that are on disk.
    is_active_used: bool,
    /// Number of the active segment, or of the last there was.
    number: u64,
    /// Frames that are not known to be on disk.
    pending: Vec<Vec<u8>>,
    segment_bytes: u64,
    /// A snapshot is due when the active segment has this many bytes.
    snapshot_at: u64,
    /// Whether nothing may be written before a snapshot is.
    is_stale: bool,
}

impl<D: Disk> Folder<D> {
    /// Opens the folder, or makes it, and adds up what is there onto `kept`, which is empty.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be read or is somebody else's, or when entries are missing.
    pub(super) fn open(
        disk: D,
        path: &Path,
        segment_bytes: u64,
        kept: &mut Kept,
        bounds: (usize, usize),
    ) -> Result<Self> {
        let name = path.display();
        let refuse = |error: io::Error| {
            Error::bad_input(format!(
                "The ledger's folder {name}: {error}. Name a folder that the daemon may write to."
            ))
        };
        fs::create_dir_all(path).map_err(refuse)?;
        let lock = lock(&path.join("lock")).map_err(refuse)?.ok_or_else(|| {
            Error::bad_input(format!("The ledger's folder {name} is used by another daemon: give each its own."))
        })?;
        if let Some(bytes) = snapshot::read(&path.join(BOOK)).map_err(refuse)? {
            *kept = decode(&bytes, &path.join(BOOK))?;
            kept.book.restore(bounds.0);
            kept.rows.limit(bounds.1);
        }
        let segments = segments(path).map_err(refuse)?;
        let before = kept.seq;
        for number in &segments {
            replay(&path_of(path, *number), kept)?;
        }
        info!(folder = %name, entries = kept.seq - before, "the ledger goes on with what was settled");
        Ok(Self {
            disk,
            path: path.to_path_buf(),
            _lock: lock,
            active: None,
            is_active_used: false,
            number: segments.last().copied().unwrap_or(0),
            pending: Vec::new(),
            segment_bytes: segment_bytes.max(1),
            snapshot_at: segment_bytes.max(1),
            is_stale: !segments.is_empty(),
        })
    }

    /// Entries to be written by the next commit.
    pub(super) fn push(&mut self, entries: &[Entry]) {
        for entry in entries {
            if self.pending.last().is_none_or(|frame| frame.len() >= FRAME_BYTES) {
                self.pending.push(vec![VERSION]);
            }
            // Writing to memory does not fail.
            if let Some(frame) = self.pending.last_mut()
                && let Err(error) = rmp_serde::encode::write(frame, entry)
            {
                warn!(%error, seq = entry.seq, "an entry of the ledger cannot be encoded");
            }
        }
    }

    /// Whether all that was pushed is on disk.
    pub(super) fn is_clean(&self) -> bool {
        self.pending.is_empty() && !self.is_stale
    }

    /// Brings what was pushed to disk; it is there when this returns. `kept` has all of it.
    ///
    /// # Errors
    /// The system's; all that was pushed is still to be written then.
    pub(super) fn commit(&mut self, kept: &Kept) -> io::Result<()> {
        if self.is_stale {
            return self.snapshot(kept);
        }
        if self.pending.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.write() {
            self.abandon();
            return Err(error);
        }
        self.pending.clear();
        self.is_active_used = true;
        let end = self.active.as_ref().map_or(0, Segment::end);
        if end >= self.snapshot_at
            && let Err(error) = self.snapshot(kept)
        {
            warn!(%error, "the ledger cannot write a snapshot and goes on in its segment");
            self.snapshot_at = end + self.segment_bytes;
        }
        Ok(())
    }

    /// Writes everything in one file, which makes the segments superfluous.
    ///
    /// # Errors
    /// The system's; nothing is lost then.
    pub(super) fn snapshot(&mut self, kept: &Kept) -> io::Result<()> {
        self.disk.replace(&self.path.join(BOOK), &encode(kept)?)?;
        self.pending.clear();
        (self.active, self.is_active_used, self.is_stale) = (None, false, false);
        self.snapshot_at = self.segment_bytes;
        for number in segments(&self.path)? {
            // One that stays is read again, and its entries are known already.
            if let Err(error) = self.disk.remove(&path_of(&self.path, number)) {
                warn!(number, %error, "the ledger cannot remove a segment that it needs no more");
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let segment = match &mut self.active {
            Some(active) => active,
            empty => {
                self.number += 1;
                self.is_active_used = false;
                empty.insert(self.disk.create(&path_of(&self.path, self.number))?)
            }
        };
        let frames: Vec<&[u8]> = self.pending.iter().map(Vec::as_slice).collect();
        segment.write(&frames)?;
        segment.sync()
    }

    fn abandon(&mut self) {
        self.active = None;
        if !self.is_active_used {
            // Best effort: what is in it is written again elsewhere.
            let _ = self.disk.remove(&path_of(&self.path, self.number));
        }
    }
}

fn path_of(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:08}.{SUFFIX}"))
}

/// Numbers of the segments there are, in order.
fn segments(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number: Option<u64> =
            name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn replay(path: &Path, kept: &mut Kept) -> Result<()> {
    let mut outcome = Ok(());
    let read = Segment::read(path, |frame| {
        if outcome.is_ok() {
            outcome = replay_frame(frame, path, kept);
        }
    });
    read.map_err(|error| Error::bad_input(format!("The ledger cannot read {}: {error}.", path.display())))?;
    outcome
}

fn replay_frame(frame: &[u8], path: &Path, kept: &mut Kept) -> Result<()> {
    let Some((&VERSION, mut rest)) = frame.split_first() else { return Err(foreign(path)) };
    while !rest.is_empty() {
        let entry: Entry = rmp_serde::from_read(&mut rest).map_err(|error| foreign(path).with_source(error))?;
        if entry.seq <= kept.seq {
            continue;
        }
        if entry.seq != kept.seq + 1 {
            let (known, next) = (kept.seq, entry.seq);
            return Err(Error::bad_input(format!(
                "The ledger knows its entries up to {known}, and {} goes on at {next}: bring back the files that are missing \
                 from a backup, or move the folder away to begin anew.",
                path.display()
            )));
        }
        kept.apply(&entry);
    }
    Ok(())
}

fn encode(kept: &Kept) -> io::Result<Vec<u8>> {
    let body = rmp_serde::to_vec(kept).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(body.len() + 33);
    bytes.push(VERSION);
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn decode(bytes: &[u8], path: &Path) -> Result<Kept> {
    let Some((&VERSION, rest)) = bytes.split_first() else { return Err(foreign(path)) };
    let Some((sum, body)) = rest.split_first_chunk::<32>() else { return Err(damaged(path)) };
    if blake3::hash(body).as_bytes() != sum {
        return Err(damaged(path));
    }
    rmp_serde::from_slice(body).map_err(|error| foreign(path).with_source(error))
}

fn foreign(path: &Path) -> Error {
    let name = path.display();
    Error::bad_input(format!("{name} is not of a ledger that this version reads: start the version that wrote it."))
}

fn damaged(path: &Path) -> Error {
    let name = path.display();
    Error::bad_input(format!("{name} is damaged: bring it back from a backup, or move the ledger's folder away."))
}

#[cfg(test)]
#[path = "folder_test.rs"]
mod tests;
