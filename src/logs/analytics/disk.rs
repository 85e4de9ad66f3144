//! The folder of analytics.
//!
//! ```text
//!  .lock                      held by the one who writes
//!  parts-29000042             an open minute: [part] [part] …          removed once its block is on disk
//!  minute-120833.blocks       [start][block] [start][block] …          240 stretches a file: four hours of minutes,
//!  hour-2013.blocks                                                    ten days of hours,
//!  day-85.blocks                                                       eight months of days; removed as a whole
//! ```
//!
//! A block is on disk before the parts it was made of go, and a minute that has a block has no parts: whatever instant a kill
//! comes at, a call is in one of the two. Parts are not waited for: a kill of the daemon leaves them, a loss of power may cost the
//! last. What a crash tore is cut. A start reads where blocks begin, not the blocks.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use crate::base::{Error, Result};
use crate::logs::analytics::shelf::{File, Place, Shelf, Tier};
use crate::store::{Frames, Segment, lock};

/// Stretches in a file.
const STRETCHES: u32 = 240;
/// Length and checksum of a frame.
const HEAD: u64 = 8;
const LOCK: &str = ".lock";

/// See the top of this file.
#[derive(Debug)]
pub(super) struct Disk {
    folder: PathBuf,
    /// Where the whole frames of each file ended when it was opened or closed last.
    ends: BTreeMap<File, u64>,
    /// Those that are written to.
    open: BTreeMap<File, Segment>,
    _lock: fs::File,
}

impl Disk {
    /// Opens a folder, or makes it, and finds what it holds.
    ///
    /// # Errors
    /// `BadInput`: somebody else has it, or it cannot be read and written.
    pub(super) fn open(folder: &Path) -> Result<(Self, Shelf)> {
        let wrong = |words: String| Error::bad_input(format!("analytics folder {}: {words}", folder.display()));
        let system = |error: io::Error| wrong(format!("{error}; it must be a folder that the daemon may write to"));
        fs::create_dir_all(folder).map_err(system)?;
        let lock = lock(&folder.join(LOCK)).map_err(system)?;
        let lock = lock.ok_or_else(|| wrong("another daemon writes to it; give each its own".to_owned()))?;
        let mut found: Vec<File> = Vec::new();
        for entry in fs::read_dir(folder).map_err(system)? {
            found.extend(entry.map_err(system)?.file_name().to_str().and_then(parse));
        }
        // Blocks first: a minute that has one needs no parts.
        found.sort_unstable_by_key(|file| (matches!(file, File::Parts(_)), *file));
        let mut disk = Self { folder: folder.to_owned(), ends: BTreeMap::new(), open: BTreeMap::new(), _lock: lock };
        let mut shelf = Shelf::default();
        for file in found {
            let read = match file {
                File::Blocks(tier, _) => disk.read_blocks(file, tier, &mut shelf),
                File::Parts(minute) => disk.read_parts(file, minute, &mut shelf),
            };
            read.map_err(|error| wrong(format!("{}: {error}", name(file))))?;
        }
        Ok((disk, shelf))
    }

    /// One more part of an open minute; the system writes it when it likes.
    ///
    /// # Errors
    /// The system's; nothing of it is left then.
    pub(super) fn append_part(&mut self, minute: u32, bytes: &[u8]) -> io::Result<Place> {
        let file = File::Parts(minute);
        let at = self.segment(file)?.write(&[bytes])?;
        Ok(Place::Stored { file, at, length: bytes.len() })
    }

    /// The block of a stretch; it is on disk when this returns.
    ///
    /// # Errors
    /// The system's; nothing of it is left then, or will be before the next one.
    pub(super) fn append_block(&mut self, tier: Tier, start: u32, bytes: &[u8]) -> io::Result<Place> {
        let file = File::Blocks(tier, start / STRETCHES);
        let segment = self.segment(file)?;
        let at = segment.write(&[&start.to_le_bytes(), bytes])?;
        if let Err(error) = segment.sync() {
            // Nobody knows what is on disk of it: it is cut, and nothing comes to lie behind it.
            self.open.remove(&file);
            self.ends.insert(file, at);
            return Err(error);
        }
        // The files of earlier stretches are full and need not stay open.
        let full = |other: &File| matches!(other, File::Blocks(of, _) if *of == tier) && *other != file;
        for other in self.open.keys().copied().filter(full).collect::<Vec<_>>() {
            self.ends.extend(self.open.remove(&other).map(|segment| (other, segment.end())));
        }
        Ok(Place::Stored { file, at: at + HEAD + 4, length: bytes.len() })
    }

    /// Removes the parts of a minute that has its block.
    pub(super) fn remove_parts(&mut self, minute: u32) {
        if self.ends.contains_key(&File::Parts(minute)) {
            self.remove(File::Parts(minute));
        }
    }

    /// Removes files all of whose stretches come before the first minute, hour or day that there is.
    pub(super) fn forget(&mut self, first: [u32; 3]) {
        for (tier, first) in Tier::ALL.into_iter().zip(first) {
            let earlier = File::Blocks(tier, 0)..File::Blocks(tier, first / STRETCHES);
            let old: Vec<File> = self.ends.range(earlier).map(|(file, _)| *file).collect();
            old.into_iter().for_each(|file| self.remove(file));
        }
    }

    fn segment(&mut self, file: File) -> io::Result<&mut Segment> {
        let place = match self.open.entry(file) {
            Entry::Occupied(open) => return Ok(open.into_mut()),
            Entry::Vacant(place) => place,
        };
        let path = path(&self.folder, file);
        let segment = match self.ends.get(&file) {
            Some(end) => Segment::resume(&path, *end)?,
            None => Segment::create(&path)?,
        };
        self.ends.insert(file, segment.end());
        Ok(place.insert(segment))
    }

    fn read_blocks(&mut self, file: File, tier: Tier, shelf: &mut Shelf) -> io::Result<()> {
        let mut frames = Frames::open(&path(&self.folder, file))?;
        let (mut end, mut start) = (0, Vec::new());
        while frames.read(&mut start)? {
            let at = frames.at();
            let (Ok(start), Some(length)) = (start[..].try_into(), frames.skip()?) else { break };
            shelf.close(tier, u32::from_le_bytes(start), Place::Stored { file, at, length });
            end = frames.at();
        }
        self.ends.insert(file, end);
        Ok(())
    }

    fn read_parts(&mut self, file: File, minute: u32, shelf: &mut Shelf) -> io::Result<()> {
        let is_merged = shelf.first_open(minute) != minute;
        let mut at = 0;
        if !is_merged {
            Segment::read(&path(&self.folder, file), |part| {
                shelf.add_part(minute, Place::Stored { file, at, length: part.len() });
                at += HEAD + part.len() as u64;
            })?;
        }
        self.ends.insert(file, at);
        if is_merged {
            self.remove(file);
        }
        Ok(())
    }

    fn remove(&mut self, file: File) {
        self.open.remove(&file);
        self.ends.remove(&file);
        if let Err(error) = fs::remove_file(path(&self.folder, file)) {
            // It is found and removed again after the next start.
            warn!(file = name(file), %error, "a file of analytics that is not needed any more cannot be removed");
        }
    }
}

/// The bytes that lie there; `None` if they are damaged, or there is no such file any more.
pub(super) fn read(folder: Option<&Path>, place: &Place) -> Option<Arc<[u8]>> {
    match (place, folder) {
        (Place::Held(bytes), _) => Some(bytes.clone()),
        (Place::Stored { file, at, length }, Some(folder)) => {
            Segment::read_at(&path(folder, *file), *at, *length).ok().flatten().map(Arc::from)
        }
        (Place::Stored { .. }, None) => None,
    }
}

fn path(folder: &Path, file: File) -> PathBuf {
    folder.join(name(file))
}

fn name(file: File) -> String {
    match file {
        File::Parts(minute) => format!("parts-{minute}"),
        File::Blocks(tier, number) => format!("{}-{number}.blocks", tier.as_str()),
    }
}

fn parse(name: &str) -> Option<File> {
    let (kind, number) = name.split_once('-')?;
    if kind == "parts" {
        return Some(File::Parts(number.parse().ok()?));
    }
    let tier = Tier::ALL.into_iter().find(|tier| tier.as_str() == kind)?;
    Some(File::Blocks(tier, number.strip_suffix(".blocks")?.parse().ok()?))
}
