//! Records that wait to be shipped: segments on disk, once for all jobs.
//!
//! ```text
//! block ─append─> 000000000007.spool ──seal: size, age, flush──> take ─> shipped ─> confirm ──the last job's──> deleted
//!                                                                 '── given back: the same one is taken again
//! NAME.cursor     the first segment that job NAME has not confirmed
//! ```
//!
//! A segment is pairs of frames: how many records, and the records. A job confirms segments in order; its cursor is on disk before
//! the segment may go, so a crash repeats a segment and loses none. Every start begins a segment of its own. What is full keeps to
//! its bound: see [`AtBound`]. What is in a record, and where it is shipped to, is for others to know.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tracing::{error, warn};

use super::status::{JobStatus, Status};
use crate::base::{Error, Millis, Result};
use crate::store::{Frames, Segment, lock, snapshot};

/// Lengths and checksums of a pair of frames, and the count.
const HEADS: u64 = 20;
/// Milliseconds between two warnings of the same kind.
const WARN_MS: u64 = 60_000;

/// What happens when the spool is as large as it may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AtBound {
    /// The oldest sealed segment goes, shipped or not, unless it is on its way just now.
    #[default]
    DropOldest,
    /// New records are refused until a segment has been shipped.
    Refuse,
}

/// How large a segment and all of them may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub segment_bytes: u64,
    pub segment_age_ms: u64,
    pub max_bytes: u64,
    pub at_bound: AtBound,
}

/// See the top of this file.
pub(super) struct Spool {
    folder: PathBuf,
    bounds: Bounds,
    sealed: BTreeMap<u64, Sealed>,
    active: Option<Active>,
    next: u64,
    jobs: Vec<Progress>,
    appended: u64,
    refused: u64,
    failed: u64,
    dropped: u64,
    /// Segments that were sealed before they were synced.
    unsynced: Vec<File>,
    /// Whether the active one was written to since it was synced last.
    is_dirty: bool,
    warned: Millis,
    /// Held as long as this lives.
    _lock: File,
}

#[derive(Clone, Copy)]
struct Sealed {
    bytes: u64,
    records: u64,
}

struct Active {
    number: u64,
    segment: Segment,
    records: u64,
    since: Millis,
}

/// How far a job is.
struct Progress {
    /// The first segment that it has not confirmed.
    next: u64,
    /// What it is shipping now.
    in_air: Option<u64>,
    status: JobStatus,
}

/// What became of a segment's records.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Shipped {
    /// Records that arrived.
    pub records: u64,
    /// Records of gateways that are not the job's.
    pub skipped: u64,
    /// Bytes of the object; none where no record was the job's.
    pub bytes: u64,
}

impl Spool {
    /// Opens a folder, or makes it, for jobs of these names.
    ///
    /// # Errors
    /// `BadInput` when it cannot be read and written, or another process has it.
    pub(super) fn open(folder: &Path, bounds: Bounds, jobs: &[&str]) -> Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            Error::bad_input(format!("{}: records to be shipped cannot be kept there: {error}", folder.display()))
        };
        // What callers have said lies in there.
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| wrong(&error))?;
        let lock = lock(&folder.join("lock")).map_err(|error| wrong(&error))?;
        let lock = lock.ok_or_else(|| wrong(&"another neurond has it"))?;
        let (mut sealed, mut jobs) = (BTreeMap::new(), jobs.iter().map(Progress::of).collect::<Vec<_>>());
        Self::read(folder, &mut sealed, &mut jobs).map_err(|error| wrong(&error))?;
        let last = sealed.last_key_value().map_or(0, |(number, _)| number + 1);
        // Never a number that a job has confirmed already.
        let next = jobs.iter().map(|job| job.next).fold(last, u64::max);
        let mut spool = Self {
            folder: folder.to_path_buf(),
            bounds,
            sealed,
            active: None,
            next,
            jobs,
            appended: 0,
            refused: 0,
            failed: 0,
            dropped: 0,
            unsynced: Vec::new(),
            is_dirty: false,
            warned: Millis(0),
            _lock: lock,
        };
        spool.sweep();
        Ok(spool)
    }

    /// Takes encoded records, or refuses them; on disk after the next sync. Returns whether a segment was sealed.
    pub(super) fn append(&mut self, records: u64, block: &[u8], now: Millis) -> bool {
        let bytes = HEADS + block.len() as u64;
        let full = |active: &Active| active.segment.end() + bytes > self.bounds.segment_bytes;
        let is_sealed = self.active.as_ref().is_some_and(full) && self.seal();
        while self.bytes() + bytes > self.bounds.max_bytes {
            let never_fits = bytes > self.bounds.max_bytes;
            if never_fits || self.bounds.at_bound == AtBound::Refuse || !self.drop_oldest() {
                self.refused += records;
                if self.may_warn(now) {
                    let (refused, folder) = (self.refused, self.folder.display());
                    warn!(refused, %folder, "log records are not exported: the spool is full; see to its destinations");
                }
                return is_sealed;
            }
        }
        let mut written = self.write(records, block, now);
        if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::StorageFull)
            && self.bounds.at_bound == AtBound::DropOldest
            && self.drop_oldest()
        {
            written = self.write(records, block, now);
        }
        match written {
            Ok(()) => self.appended += records,
            Err(error) => {
                self.failed += records;
                if self.may_warn(now) {
                    let (failed, folder) = (self.failed, self.folder.display());
                    error!(failed, %folder, %error, "log records are not exported: the spool cannot be written");
                }
            }
        }
        is_sealed
    }

    /// Seals what has waited long enough; returns whether there was anything.
    pub(super) fn seal_old(&mut self, now: Millis) -> bool {
        let old = |active: &Active| now.0.saturating_sub(active.since.0) >= self.bounds.segment_age_ms;
        self.active.as_ref().is_some_and(old) && self.seal()
    }

    /// Seals what there is; returns whether there was anything.
    pub(super) fn seal(&mut self) -> bool {
        let Some(active) = self.active.take_if(|active| active.records > 0) else { return false };
        if std::mem::take(&mut self.is_dirty) {
            // A file that cannot be opened once more is synced by the system, later.
            self.unsynced.extend(active.segment.file());
        }
        self.sealed.insert(active.number, Sealed { bytes: active.segment.end(), records: active.records });
        true
    }

    /// What is to be synced, and counts as synced from now on.
    pub(super) fn unsynced(&mut self) -> Vec<File> {
        let mut files = std::mem::take(&mut self.unsynced);
        if std::mem::take(&mut self.is_dirty) {
            files.extend(self.active.as_ref().and_then(|active| active.segment.file().ok()));
        }
        files
    }

    /// The next segment of a job, which stays until it is confirmed or given back.
    pub(super) fn take(&mut self, job: usize) -> Option<(u64, PathBuf)> {
        let progress = self.jobs.get_mut(job)?;
        let (number, _) = self.sealed.range(progress.next..).next()?;
        progress.in_air = Some(*number);
        Some((*number, path_of(&self.folder, *number)))
    }

    /// The attempt came to nothing.
    pub(super) fn give_back(&mut self, job: usize, why: &str, is_held: bool, now: Millis) {
        let Some(progress) = self.jobs.get_mut(job) else { return };
        progress.in_air = None;
        progress.status.failures += 1;
        progress.status.is_held = is_held;
        progress.status.last_error = Some((now, why.to_owned()));
    }

    /// A job is done with a segment. Its cursor should say so already.
    pub(super) fn confirm(&mut self, job: usize, number: u64, shipped: Shipped, now: Millis) {
        let Some(progress) = self.jobs.get_mut(job) else { return };
        progress.in_air = None;
        progress.next = number + 1;
        let status = &mut progress.status;
        status.is_held = false;
        status.last_success = Some(now);
        status.shipped_records += shipped.records;
        status.skipped_records += shipped.skipped;
        status.shipped_bytes += shipped.bytes;
        status.shipped_objects += u64::from(shipped.bytes > 0);
        let there = self.sealed.get(&number).map_or(0, |segment| segment.records);
        status.damaged_records += there.saturating_sub(shipped.records + shipped.skipped);
        self.sweep();
    }

    /// Where a job's cursor is.
    pub(super) fn cursor(&self, job: usize) -> Option<PathBuf> {
        self.jobs.get(job).map(|progress| cursor_of(&self.folder, &progress.status.name))
    }

    /// The last segment that is sealed.
    pub(super) fn last(&self) -> Option<u64> {
        self.sealed.last_key_value().map(|(number, _)| *number)
    }

    /// Whether no job has to ship anything up to segment `last`.
    pub(super) fn is_shipped(&self, last: u64) -> bool {
        self.jobs.iter().all(|job| job.next > last || self.sealed.range(job.next..=last).next().is_none())
    }

    pub(super) fn status(&self) -> Status {
        let active = self.active.as_ref();
        let (bytes, records) = active.map_or((0, 0), |active| (active.segment.end(), active.records));
        let jobs = self.jobs.iter().map(|job| {
            let waiting = || self.sealed.range(job.next..).map(|(_, segment)| segment);
            JobStatus {
                waiting_segments: waiting().count() as u64 + u64::from(records > 0),
                waiting_bytes: waiting().map(|segment| segment.bytes).sum::<u64>() + bytes,
                waiting_records: waiting().map(|segment| segment.records).sum::<u64>() + records,
                ..job.status.clone()
            }
        });
        Status {
            appended_records: self.appended,
            refused_records: self.refused,
            failed_records: self.failed,
            dropped_records: self.dropped,
            spool_bytes: self.bytes(),
            jobs: jobs.collect(),
        }
    }

    fn write(&mut self, records: u64, block: &[u8], now: Millis) -> io::Result<()> {
        let active = match &mut self.active {
            Some(active) => active,
            empty => {
                let segment = Segment::create(&path_of(&self.folder, self.next))?;
                let number = self.next;
                self.next += 1;
                empty.insert(Active { number, segment, records: 0, since: now })
            }
        };
        if active.records == 0 {
            active.since = now;
        }
        active.segment.write(&[&(records as u32).to_le_bytes(), block])?;
        active.records += records;
        self.is_dirty = true;
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let sealed: u64 = self.sealed.values().map(|segment| segment.bytes).sum();
        sealed + self.active.as_ref().map_or(0, |active| active.segment.end())
    }

    /// Deletes the oldest segment that nobody is shipping just now; returns whether there was one.
    fn drop_oldest(&mut self) -> bool {
        let is_idle = |number: &u64| self.jobs.iter().all(|job| job.in_air != Some(*number));
        let Some(number) = self.sealed.keys().copied().find(is_idle) else { return false };
        let records = self.delete(number);
        self.dropped += records;
        for job in self.jobs.iter_mut().filter(|job| job.next <= number) {
            job.status.dropped_records += records;
        }
        warn!(records, number, "log records were dropped before they were exported everywhere: the spool is full");
        true
    }

    /// Deletes what all jobs have confirmed.
    fn sweep(&mut self) {
        let Some(next) = self.jobs.iter().map(|job| job.next).min() else { return };
        while let Some((&number, _)) = self.sealed.first_key_value().filter(|(number, _)| **number < next) {
            self.delete(number);
        }
    }

    fn delete(&mut self, number: u64) -> u64 {
        let path = path_of(&self.folder, number);
        if let Err(error) = fs::remove_file(&path) {
            // It is found by the next start, and shipped once more.
            warn!(path = %path.display(), %error, "a segment that is done with cannot be deleted");
        }
        self.sealed.remove(&number).map_or(0, |segment| segment.records)
    }

    fn may_warn(&mut self, now: Millis) -> bool {
        let is_due = now.0.saturating_sub(self.warned.0) >= WARN_MS;
        if is_due {
            self.warned = now;
        }
        is_due
    }

    fn read(folder: &Path, sealed: &mut BTreeMap<u64, Sealed>, jobs: &mut [Progress]) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let (stem, kind) = (path.file_stem(), path.extension().and_then(|kind| kind.to_str()));
            let Some(stem) = stem.and_then(|stem| stem.to_str()) else { continue };
            match (kind, u64::from_str(stem)) {
                (Some("spool"), Ok(number)) => {
                    let segment = count(&path)?;
                    match segment.records {
                        0 => fs::remove_file(&path)?,
                        _ => drop(sealed.insert(number, segment)),
                    }
                }
                (Some("cursor"), _) => match jobs.iter_mut().find(|job| job.status.name == stem) {
                    Some(job) => job.next = read_cursor(&path)?,
                    // Of a job that is no more: should it come back, it begins with what is there.
                    None => fs::remove_file(&path)?,
                },
                _ => {}
            }
        }
        Ok(())
    }
}

impl Progress {
    fn of(name: &&str) -> Self {
        Self { next: 0, in_air: None, status: JobStatus { name: (*name).to_owned(), ..JobStatus::default() } }
    }
}

/// Says on disk that a job has confirmed everything before segment `next`.
///
/// # Errors
/// The system's; the segment before is shipped again after a crash then.
pub(super) fn write_cursor(path: &Path, next: u64) -> io::Result<()> {
    snapshot::write(path, next.to_string().as_bytes(), snapshot::PRIVATE)
}

fn read_cursor(path: &Path) -> io::Result<u64> {
    let bytes = snapshot::read(path)?.unwrap_or_default();
    let number = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
    if number.is_none() {
        warn!(path = %path.display(), "is no cursor; its job ships everything that is there once more");
    }
    Ok(number.unwrap_or(0))
}

/// Hears the blocks of a segment, up to its end or to where it is damaged.
///
/// # Errors
/// The system's, and those of `hear`.
pub(super) fn blocks<E: From<io::Error>>(
    path: &Path,
    mut hear: impl FnMut(&[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let (mut frames, mut head, mut block) = (Frames::open(path)?, Vec::new(), Vec::new());
    while frames.read(&mut head)? && frames.read(&mut block)? {
        hear(&block)?;
    }
    Ok(())
}

/// How much there is in a segment, without reading its records.
fn count(path: &Path) -> io::Result<Sealed> {
    let (mut frames, mut head, mut records) = (Frames::open(path)?, Vec::new(), 0);
    while frames.read(&mut head)? && frames.skip()?.is_some() {
        records += head.first_chunk().map_or(0, |count| u64::from(u32::from_le_bytes(*count)));
    }
    let (whole, bytes) = (frames.at(), frames.length());
    if whole < bytes {
        // The last write of a process that was killed, most likely.
        warn!(path = %path.display(), whole, bytes, "a segment of log records is not whole; its end is left out");
    }
    Ok(Sealed { bytes, records })
}

fn path_of(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:012}.spool"))
}

fn cursor_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.cursor"))
}

#[cfg(test)]
#[path = "spool_test.rs"]
mod tests;
