//! The cache's files: segments of entries, the oldest of which goes when there is no room, and the generations of scopes.
//!
//! ```text
//!   00000007.cache  [record][frame][record][frame] …       sealed
//!   00000008.cache  [record][frame] …                      the active one, appended to until it is full
//!   generations     [scope, generation] …
//! ```
//!
//! A start reads records and passes over frames, so it takes as long as there are entries, not bytes; a frame is checked
//! when it is asked for. Entries are written without waiting for the disk and synced now and then: a crash may lose the
//! last of them, and never makes one of them wrong. Purges are noted and synced one by one. Two processes
//! with one folder would cost each other hits, no more: a frame is served only under the key that it says itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::cache::entry::Record;
use crate::cache::index::Place;
use crate::cache::key::Scope;
use crate::store::{Frames, Segment};

/// A segment is full when it has this many bytes, or a quarter of what the disk tier may have.
const SEGMENT_BYTES: u64 = 64 << 20;
const GENERATIONS: &str = "generations";
/// Lengths and checksums of a record and its frame.
const HEADS: u64 = 16;

pub(super) struct Disk {
    folder: PathBuf,
    limit: u64,
    segment_bytes: u64,
    /// Bytes of each segment, the active one included.
    sizes: BTreeMap<u32, u64>,
    active: Option<(u32, Segment)>,
    next: u32,
    generations: Segment,
    /// Whether the active one was written to since it was synced last.
    is_dirty: bool,
    /// Segments that were sealed before they were synced.
    sealed: Vec<File>,
}

/// What a folder held.
pub(super) struct Found {
    pub(super) disk: Disk,
    /// Oldest first; a later record of a key replaces the earlier.
    pub(super) entries: Vec<(Record, Place)>,
    pub(super) generations: HashMap<Scope, u64>,
}

impl Disk {
    /// Opens a folder, or makes it. What a crash tore is cut off.
    ///
    /// # Errors
    /// The system's, when the folder or its list of generations cannot be read and written. A segment that cannot is given
    /// up.
    pub(super) fn open(folder: &Path, limit: u64) -> io::Result<Found> {
        fs::create_dir_all(folder)?;
        let (mut entries, mut sizes) = (Vec::new(), BTreeMap::new());
        for number in segments(folder)? {
            let path = path_of(folder, number);
            match walk(&path, number, &mut entries) {
                Ok(0) => remove(&path),
                Ok(end) => drop(sizes.insert(number, end)),
                Err(error) => {
                    warn!(path = %path.display(), %error, "a segment of the cache cannot be read and is given up");
                    entries.retain(|(_, place)| place.segment != number);
                    remove(&path);
                }
            }
        }
        let generations = merge(read_generations(folder)?, &entries);
        let segment_bytes = SEGMENT_BYTES.min(limit / 4).max(1);
        // Goes on in the last one, so that a daemon that is often started does not leave a file each time.
        let last = sizes.last_key_value().filter(|(_, end)| **end < segment_bytes);
        let resume = |number: u32, end: u64| Some((number, Segment::resume(&path_of(folder, number), end).ok()?));
        let active = last.and_then(|(number, end)| resume(*number, *end));
        let next = sizes.last_key_value().map_or(1, |(number, _)| number.saturating_add(1));
        let log = write_generations(folder, &generations)?;
        let folder = folder.to_path_buf();
        let disk = Self {
            folder,
            limit,
            segment_bytes,
            sizes,
            active,
            next,
            generations: log,
            is_dirty: false,
            sealed: Vec::new(),
        };
        Ok(Found { disk, entries, generations })
    }

    /// Whether an entry with a frame of this length could ever be held.
    pub(super) fn fits(&self, record: &[u8], frame: &[u8]) -> bool {
        bytes_of(record, frame) <= self.limit
    }

    /// Whether there is room for it now.
    pub(super) fn has_room(&self, record: &[u8], frame: &[u8]) -> bool {
        self.bytes() + bytes_of(record, frame) <= self.limit
    }

    /// The segment to drop first, and its bytes.
    pub(super) fn oldest(&self) -> Option<(u32, u64)> {
        self.sizes.first_key_value().map(|(number, bytes)| (*number, *bytes))
    }

    /// Segments that are there.
    pub(super) fn segments(&self) -> Vec<u32> {
        self.sizes.keys().copied().collect()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sizes.values().sum()
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// The system's: a full disk, for one. Nothing of the entry is left then.
    pub(super) fn append(&mut self, record: &[u8], frame: &[u8]) -> io::Result<Place> {
        let needed = bytes_of(record, frame);
        let end = self.active.as_ref().map_or(0, |(_, segment)| segment.end());
        if end > 0 && end + needed > self.segment_bytes {
            self.seal()?;
        }
        let (number, segment) = match &mut self.active {
            Some(active) => active,
            empty => {
                let segment = Segment::create(&path_of(&self.folder, self.next))?;
                let number = self.next;
                self.next = self.next.saturating_add(1);
                self.sizes.insert(number, 0);
                empty.insert((number, segment))
            }
        };
        self.is_dirty = true;
        let begin = segment.write(&[record, frame])?;
        self.sizes.insert(*number, segment.end());
        Ok(Place { segment: *number, at: begin + HEADS / 2 + record.len() as u64, length: frame.len() as u64 })
    }

    /// The frame that lies there; nothing if it is damaged.
    ///
    /// # Errors
    /// The system's, `NotFound` when somebody has deleted the segment.
    pub(super) fn read(&self, place: Place) -> io::Result<Option<Vec<u8>>> {
        Segment::read_at(&path_of(&self.folder, place.segment), place.at, place.length as usize)
    }

    /// Deletes a segment.
    pub(super) fn delete(&mut self, number: u32) {
        if self.active.as_ref().is_some_and(|(active, _)| *active == number) {
            self.active = None;
        }
        if self.sizes.remove(&number).is_some() {
            remove(&path_of(&self.folder, number));
        }
    }

    /// Notes that a scope was purged; on disk when this returns.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn purge(&mut self, scope: Scope, generation: u64) -> io::Result<()> {
        self.generations.append(&generation_frame(&scope, generation))
    }

    /// What is to be synced, and counts as synced from now on.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn unsynced(&mut self) -> io::Result<Vec<File>> {
        let mut files = std::mem::take(&mut self.sealed);
        if std::mem::take(&mut self.is_dirty)
            && let Some((_, segment)) = &self.active
        {
            files.push(segment.file()?);
        }
        Ok(files)
    }

    fn seal(&mut self) -> io::Result<()> {
        self.sealed = self.unsynced()?;
        self.active = None;
        Ok(())
    }
}

/// What an entry takes on disk.
pub(super) fn bytes_of(record: &[u8], frame: &[u8]) -> u64 {
    HEADS + record.len() as u64 + frame.len() as u64
}

fn path_of(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("{number:08}.cache"))
}

/// Numbers of the segments that are there, in order.
fn segments(folder: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for file in fs::read_dir(folder)? {
        let name = file?.file_name();
        let number: Option<u32> =
            name.to_str().and_then(|name| name.strip_suffix(".cache")).and_then(|name| name.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Adds a segment's entries, cuts it where they end, and returns where that is.
fn walk(path: &Path, segment: u32, entries: &mut Vec<(Record, Place)>) -> io::Result<u64> {
    let (mut frames, mut bytes, mut end) = (Frames::open(path)?, Vec::new(), 0);
    while frames.read(&mut bytes)? {
        let at = frames.at();
        let Some((record, length)) = Record::decode(&bytes) else { break };
        if frames.skip()?.is_none_or(|known| known as u64 != length) {
            break;
        }
        entries.push((record, Place { segment, at, length }));
        end = frames.at();
    }
    if frames.length() > end {
        Segment::resume(path, end)?;
    }
    Ok(end)
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != ErrorKind::NotFound
    {
        warn!(path = %path.display(), %error, "a segment of the cache cannot be deleted");
    }
}

fn generation_frame(scope: &Scope, generation: u64) -> [u8; 24] {
    let mut frame = [0; 24];
    frame[..16].copy_from_slice(&scope.0);
    frame[16..].copy_from_slice(&generation.to_le_bytes());
    frame
}

fn read_generations(folder: &Path) -> io::Result<HashMap<Scope, u64>> {
    let mut known = HashMap::new();
    let read = Segment::read(&folder.join(GENERATIONS), |frame| {
        let Some((scope, generation)) = frame.split_first_chunk::<16>() else { return };
        let Ok(generation) = generation.try_into() else { return };
        let newest: &mut u64 = known.entry(Scope(*scope)).or_default();
        *newest = u64::from_le_bytes(generation).max(*newest);
    });
    match read {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(known),
    }
}

/// The generations that still matter: those of scopes that some entry belongs to. An entry of a later generation than is
/// known proves a purge whose note was lost.
fn merge(mut known: HashMap<Scope, u64>, entries: &[(Record, Place)]) -> HashMap<Scope, u64> {
    let stamps = || entries.iter().flat_map(|(record, _)| record.stamps).flatten();
    let seen: HashSet<Scope> = stamps().map(|(scope, _)| scope).collect();
    known.retain(|scope, _| seen.contains(scope));
    for (scope, generation) in stamps().filter(|(_, generation)| *generation > 0) {
        let newest = known.entry(scope).or_default();
        *newest = generation.max(*newest);
    }
    known
}

/// Writes the list of generations anew, so that it does not grow with every purge there ever was.
fn write_generations(folder: &Path, generations: &HashMap<Scope, u64>) -> io::Result<Segment> {
    let draft = folder.join("generations.new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut log = Segment::create(&draft)?;
    for (scope, generation) in generations {
        log.write(&[&generation_frame(scope, *generation)])?;
    }
    log.sync()?;
    fs::rename(&draft, folder.join(GENERATIONS))?;
    File::open(folder)?.sync_all()?;
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Millis;
    use crate::cache::key::Digest;

    fn record(name: u8, generation: u64) -> Record {
        let stamps = [Some((Scope::gateway("a", "g"), generation)), None];
        Record { digest: Digest([name; 32]), created: Millis(1), expires: Millis(2), stamps }
    }

    fn write(disk: &mut Disk, name: u8, length: usize) -> Place {
        let frame = vec![name; length];
        disk.append(&record(name, 0).encode(length), &frame).unwrap()
    }

    fn names(found: &Found) -> Vec<u8> {
        found.entries.iter().map(|(record, _)| record.digest.0[0]).collect()
    }

    #[test]
    fn entries_are_there_after_a_start_wherever_the_last_segment_was_cut_or_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = Disk::open(folder.path(), 1 << 20).unwrap().disk;
        let places = [1, 2, 3].map(|name| write(&mut disk, name, 10));
        assert_eq!([disk.unsynced().unwrap().len(), disk.unsynced().unwrap().len()], [1, 0]);
        drop(disk);
        let path = path_of(folder.path(), 1);
        let bytes = fs::read(&path).unwrap();
        let ends: Vec<u64> = places.iter().map(|place| place.at + 8 + 10).collect();
        assert_eq!(bytes.len() as u64, ends[2]);
        // What is found, and which of the frames can be read, after the segment has become `bytes`.
        let check = |bytes: &[u8], whole: usize, damaged: Option<usize>, why: &str| {
            fs::write(&path, bytes).unwrap();
            let found = Disk::open(folder.path(), 1 << 20).unwrap();
            assert_eq!(names(&found), (1..=whole as u8).collect::<Vec<_>>(), "{why}");
            let length = fs::metadata(&path).ok().map(|file| file.len());
            assert_eq!(length, whole.checked_sub(1).map(|last| ends[last]), "{why}");
            for (at, (_, place)) in found.entries.iter().enumerate() {
                assert_eq!(*place, places[at]);
                let frame = found.disk.read(*place).unwrap();
                assert_eq!(frame, (damaged != Some(at)).then(|| vec![at as u8 + 1; 10]), "{why}");
            }
            let mut disk = found.disk;
            let place = write(&mut disk, 9, 10);
            assert_eq!((place.segment, disk.read(place).unwrap()), (1, Some(vec![9; 10])), "{why}");
        };
        // Every part of the layout has at least eight bytes.
        for cut in (0..=bytes.len()).step_by(5).chain(ends.iter().map(|end| *end as usize)) {
            let whole = ends.iter().filter(|end| **end <= cut as u64).count();
            check(&bytes[..cut], whole, None, &format!("cut at {cut}"));
        }
        for at in (0..bytes.len()).step_by(3) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let whole = ends.iter().filter(|end| **end <= at as u64).count();
            // A frame's checksum and bytes are looked at when it is read; all else ends the segment.
            let begin = places[whole].at as usize;
            let why = format!("damaged at {at}");
            match at >= begin + 4 {
                true => check(&damaged, 3, Some(whole), &why),
                false => check(&damaged, whole, None, &why),
            }
        }
    }

    #[test]
    fn a_full_segment_is_followed_by_another_and_the_last_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = Disk::open(folder.path(), 1200).unwrap().disk;
        let segments: Vec<u32> = (1..=4).map(|name| write(&mut disk, name, 100).segment).collect();
        assert_eq!(segments, [1, 2, 3, 4], "a quarter of the limit has room for one");
        assert_eq!(disk.unsynced().unwrap().len(), 4, "the sealed ones too");
        assert_eq!(write(&mut disk, 5, 5).segment, 5);
        assert_eq!(disk.oldest().unwrap().0, 1);
        disk.delete(1);
        disk.delete(1);
        assert_eq!(disk.oldest().unwrap().0, 2);
        let found = Disk::open(folder.path(), 1200).unwrap();
        assert_eq!(names(&found), [2, 3, 4, 5]);
        assert_eq!(found.disk.bytes(), disk.bytes());
        let mut disk = found.disk;
        assert_eq!(write(&mut disk, 6, 5).segment, 5);
        disk.delete(5);
        assert_eq!(write(&mut disk, 7, 5).segment, 6, "a number is used once");
        let (record, frame) = (record(8, 0).encode(900), vec![8; 900]);
        assert!(disk.fits(&record, &frame) && !disk.has_room(&record, &frame));
        assert!(!disk.fits(&record, &vec![8; 2000]));
        let place = Place { segment: 1, at: 0, length: 1 };
        assert_eq!(disk.read(place).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn generations_outlive_a_start_while_some_entry_belongs_to_them() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Disk::open(folder.path(), 1 << 20).unwrap();
        let (ours, other) = (Scope::gateway("a", "g"), Scope::gateway("a", "other"));
        let mut disk = open().disk;
        write(&mut disk, 1, 5);
        for (scope, generation) in [(ours, 1), (other, 1), (ours, 2)] {
            disk.purge(scope, generation).unwrap();
        }
        assert_eq!(open().generations, HashMap::from([(ours, 2)]));
        assert_eq!(open().generations, HashMap::from([(ours, 2)]), "as it was written anew");
        // The note of a purge was lost, an entry of after it was not.
        disk.append(&record(2, 7).encode(1), b"x").unwrap();
        assert_eq!(open().generations, HashMap::from([(ours, 7)]));
        fs::write(folder.path().join("generations"), b"rubbish").unwrap();
        assert_eq!(open().generations, HashMap::from([(ours, 7)]));
    }
}
