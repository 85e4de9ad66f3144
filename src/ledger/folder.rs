//! The ledger's files: a snapshot of what is kept, and what was settled since.
//!
//! ```text
//!   book             version, checksum, everything up to entry n        replaced as a whole
//!   00000007.wal     [n | entries …] [n | entries …]                    one frame a write: what is on disk by now, what is new
//!   lock             held by the daemon that writes here
//!
//! push ─ write ─> the system has it: a killed process loses nothing of it
//!          └─ job ─ run, by another thread ─ finish ─> on disk: a loss of power does not either
//! ```
//!
//! - **Nothing waits for the disk.** Writing goes on while a [`Job`] syncs what was written before, or writes a snapshot,
//!   which begins a new segment.
//! - **A start ends with a snapshot**: what an earlier process believed to be on disk is written anew, and no old segment is
//!   ever appended to.
//! - **A segment that failed once is left alone.** After a sync that failed nobody knows what the disk holds, and the next
//!   sync would say that all is well. What is not known to be on disk is written again, to a new segment.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use crate::base::{Error, Result};
use crate::ledger::entry::Entry;
use crate::ledger::kept::{Kept, frame, replay};
use crate::store::{Bytes, Disk, Segment, lock, snapshot};

const BOOK: &str = "book";
const SUFFIX: &str = "wal";
/// Bytes of entries in one frame, about.
const FRAME_BYTES: usize = 1 << 20;

/// The folder, open for one writer.
pub(super) struct Folder<D: Disk> {
    disk: D,
    path: PathBuf,
    /// Held as long as this lives.
    _lock: File,
    active: Option<Segment<D::File>>,
    /// Number of the active segment, or of the last there was.
    number: u64,
    /// Whether anything in the active segment is on disk, its name with it.
    is_sure: bool,
    /// A segment that was given up with nothing in it on disk. It goes when what it has is written elsewhere.
    given_up: Option<u64>,
    /// Entries that are not known to be on disk.
    frames: VecDeque<Frame>,
    /// How many of the frames are written.
    written: usize,
    /// The active segment, if it has been written to since it was synced.
    unsynced: Option<D::File>,
    /// Whether a job is under way.
    is_at_work: bool,
    /// Whether one is that began before a segment was given up: it tells what must be written again.
    is_unclear: bool,
    /// Number of the last entry that is on disk.
    durable: u64,
    segment_bytes: u64,
    /// Whether a snapshot must be on disk before anything counts as being there.
    is_stale: bool,
}

/// Entries that are written together.
struct Frame {
    bytes: Vec<u8>,
    /// Number of the last one.
    last: u64,
}

/// Brings to disk what was written; for another thread to run.
pub(super) struct Job<D: Disk> {
    disk: D,
    path: PathBuf,
    file: Option<D::File>,
    /// Whether its name may not be on disk.
    is_new: bool,
    /// Number of the last entry in the file.
    last: u64,
    /// Number of the last segment.
    number: u64,
    snapshot: Option<Snapshot>,
}

struct Snapshot {
    bytes: Vec<u8>,
    /// Number of the last entry in it.
    seq: u64,
    /// Whether nothing is on disk without it.
    is_needed: bool,
}

/// How a job went.
pub(super) struct Done {
    /// Number of the last entry that is on disk by it.
    outcome: io::Result<u64>,
    /// Number of the segment that was synced.
    number: u64,
    /// Whether there is a new snapshot, and no segment is left.
    is_snapshot: bool,
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
            *kept = Kept::decode(&bytes, &path.join(BOOK))?;
            kept.book.restore(bounds.0);
            kept.rows.limit(bounds.1);
        }
        let segments = segments(path).map_err(refuse)?;
        let before = kept.seq;
        let mut durable = before;
        for number in &segments {
            durable = durable.max(replay(&path_of(path, *number), kept)?);
        }
        if kept.seq < durable {
            return Err(Error::bad_input(format!(
                "The ledger's folder {name} has all entries up to {}, and they were kept up to {durable}: bring back the files \
                 that are missing from a backup, or move the folder away to begin anew.",
                kept.seq
            )));
        }
        info!(folder = %name, entries = kept.seq - before, "the ledger goes on with what was settled");
        Ok(Self {
            disk,
            path: path.to_path_buf(),
            _lock: lock,
            active: None,
            number: segments.last().copied().unwrap_or(0),
            is_sure: false,
            given_up: None,
            frames: VecDeque::new(),
            written: 0,
            unsynced: None,
            is_at_work: false,
            is_unclear: false,
            durable,
            segment_bytes: segment_bytes.max(1),
            is_stale: !segments.is_empty(),
        })
    }

    /// Entries for the next write.
    pub(super) fn push(&mut self, entries: &[Entry]) {
        for entry in entries {
            let is_new = self.written == self.frames.len();
            if is_new || self.frames.back().is_none_or(|frame| frame.bytes.len() >= FRAME_BYTES) {
                self.frames.push_back(Frame { bytes: frame(self.durable), last: entry.seq });
            }
            let Some(frame) = self.frames.back_mut() else { continue };
            frame.last = entry.seq;
            // Writing to memory does not fail.
            if let Err(error) = rmp_serde::encode::write(&mut frame.bytes, entry) {
                warn!(%error, seq = entry.seq, "an entry of the ledger cannot be encoded");
            }
        }
    }

    /// Whether something that was pushed waits for a write.
    pub(super) fn is_waiting(&self) -> bool {
        self.written < self.frames.len() && !self.is_unclear
    }

    /// Whether a job is under way.
    pub(super) fn is_at_work(&self) -> bool {
        self.is_at_work
    }

    /// Whether there is something for a job to do, and none under way.
    pub(super) fn is_due(&self) -> bool {
        !self.is_at_work && (self.is_stale || self.unsynced.is_some() || self.is_full())
    }

    /// Gives the system what was pushed.
    ///
    /// # Errors
    /// The system's. What is not known to be on disk is written again, to another segment, by the next call.
    pub(super) fn write(&mut self) -> io::Result<()> {
        if !self.is_waiting() {
            return Ok(());
        }
        self.try_write().inspect_err(|_| self.give_up())?;
        self.written = self.frames.len();
        if let Some(number) = self.given_up.take() {
            // Best effort: what is read twice counts once.
            let _ = self.disk.remove(&path_of(&self.path, number));
        }
        Ok(())
    }

    /// What is to be done now: a sync of what was written, and a snapshot if one is due or asked for. `kept` has all that was
    /// pushed. Say how it [went](Self::finish) before there is another.
    ///
    /// # Errors
    /// None that a book can cause.
    pub(super) fn job(&mut self, kept: &Kept, with_snapshot: bool) -> io::Result<Job<D>> {
        let mut snapshot = None;
        if with_snapshot || self.is_stale || self.is_full() {
            snapshot = Some(Snapshot { bytes: kept.encode()?, seq: kept.seq, is_needed: self.is_stale });
            self.active = None;
        }
        let last = self.written.checked_sub(1).and_then(|at| self.frames.get(at));
        let last = last.map_or(self.durable, |frame| frame.last);
        self.is_at_work = true;
        let (disk, path, number) = (self.disk.clone(), self.path.clone(), self.number);
        Ok(Job { disk, path, file: self.unsynced.take(), is_new: !self.is_sure, last, number, snapshot })
    }

    /// Hears how a job went. Returns the number of the last entry that is on disk.
    ///
    /// # Errors
    /// The job's. What is not known to be on disk is written again, as after [`Folder::write`].
    pub(super) fn finish(&mut self, done: Done) -> io::Result<u64> {
        (self.is_at_work, self.is_unclear) = (false, false);
        let last = done.outcome.inspect_err(|_| self.give_up())?;
        self.is_stale &= !done.is_snapshot;
        self.is_sure |= done.number == self.number;
        self.given_up.take_if(|number| *number == done.number);
        self.durable = self.durable.max(last);
        while self.frames.front().is_some_and(|frame| frame.last <= self.durable) {
            self.frames.pop_front();
            self.written = self.written.saturating_sub(1);
        }
        Ok(self.durable)
    }

    /// Whether the active segment has grown enough for a snapshot to take its place.
    fn is_full(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.end() >= self.segment_bytes)
    }

    fn try_write(&mut self) -> io::Result<()> {
        let segment = match &mut self.active {
            Some(active) => active,
            empty => {
                self.number += 1;
                self.is_sure = false;
                empty.insert(self.disk.create(&path_of(&self.path, self.number))?)
            }
        };
        if self.unsynced.is_none() {
            self.unsynced = Some(segment.file()?);
        }
        let frames: Vec<&[u8]> = self.frames.range(self.written..).map(|frame| &frame.bytes[..]).collect();
        segment.write(&frames).map(drop)
    }

    fn give_up(&mut self) {
        match self.active.take() {
            Some(active) if active.end() == 0 => {
                let _ = self.disk.remove(&path_of(&self.path, self.number));
            }
            Some(_) if !self.is_sure => self.given_up = Some(self.number),
            _ => {}
        }
        self.written = 0;
        self.unsynced = None;
        self.is_unclear = self.is_at_work;
    }
}

impl<D: Disk> Job<D> {
    /// Takes as long as the disk does.
    pub(super) fn run(self) -> Done {
        let synced = self.file.iter().try_for_each(|file| {
            if self.is_new {
                self.disk.sync_names(&self.path)?;
            }
            file.sync_data()
        });
        let mut outcome = synced.map(|()| self.last);
        let mut is_snapshot = false;
        if let Some(snapshot) = self.snapshot {
            match self.disk.replace(&self.path.join(BOOK), &snapshot.bytes) {
                Ok(()) => {
                    // It has what the segments have, whether they are on disk or not.
                    (outcome, is_snapshot) = (Ok(snapshot.seq), true);
                    remove(&self.disk, &self.path, self.number);
                }
                Err(error) if snapshot.is_needed => outcome = Err(error),
                Err(error) => warn!(%error, "the ledger cannot write a snapshot: its segments stay until the next one"),
            }
        }
        Done { outcome, number: self.number, is_snapshot }
    }
}

/// Removes the segments up to one.
fn remove(disk: &impl Disk, folder: &Path, last: u64) {
    let numbers = segments(folder).inspect_err(|error| warn!(%error, "the ledger cannot list its segments"));
    for number in numbers.unwrap_or_default().into_iter().take_while(|number| *number <= last) {
        // One that stays is read again, and its entries are known already.
        if let Err(error) = disk.remove(&path_of(folder, number)) {
            warn!(number, %error, "the ledger cannot remove a segment that it needs no more");
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

#[cfg(test)]
#[path = "folder_test.rs"]
mod tests;
