//! A disk that fails as it is told, for tests.
//!
//! ```text
//! full after n bytes: the write is cut short, then ENOSPC      deaf: each sync is EIO, and what it should have kept is lost
//! stuck: syncs take as long as one likes
//! power off: every file is what it was when it was synced last, and torn somewhere behind
//! ```
//!
//! It lies as systems do: after a sync that failed the next one succeeds, and what was written before it is gone all the same.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::store::{Bytes, Disk, RealDisk, Segment};

/// Clones share their faults.
#[derive(Clone, Debug, Default)]
pub struct FaultyDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    faults: Faults,
    /// What of each file is on disk whatever happens.
    kept: HashMap<PathBuf, u64>,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Bytes that still fit. `None`: as many as one likes.
    pub room: Option<u64>,
    /// Syncs that fail before they succeed again; writes after the first failure do not see it.
    pub deaf: u32,
    /// Writes that fail with EIO before they succeed again, half of each done.
    pub torn: u32,
    /// Whether syncs wait until they do not any longer.
    pub is_stuck: bool,
}

impl FaultyDisk {
    /// Changes what goes wrong from now on.
    pub fn set(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Takes the power away: of each file is left what was synced, and `torn` bytes of what was not.
    pub fn power_off(&self, torn: u64) {
        self.power_off_with(|_| torn);
    }

    /// As [`FaultyDisk::power_off`], other bytes of each file.
    pub fn power_off_with(&self, torn: impl Fn(&Path) -> u64) {
        for (path, kept) in &self.0.lock().kept {
            let Ok(file) = OpenOptions::new().write(true).open(path) else { continue };
            let length = file.metadata().unwrap().len();
            file.set_len(length.min(kept + torn(path))).unwrap();
        }
    }
}

impl State {
    /// How many of these bytes are written, and whether the rest fails.
    fn admit(&mut self, bytes: usize) -> (usize, Option<Error>) {
        let faults = &mut self.faults;
        if faults.torn > 0 {
            faults.torn -= 1;
            return (bytes / 2, Some(Error::from_raw_os_error(libc::EIO)));
        }
        let Some(room) = &mut faults.room else { return (bytes, None) };
        let fits = bytes.min(usize::try_from(*room).unwrap());
        *room -= fits as u64;
        (fits, (fits < bytes).then(|| Error::from(ErrorKind::StorageFull)))
    }
}

/// A file of a [`FaultyDisk`].
#[derive(Debug)]
pub struct FaultyFile {
    file: File,
    path: PathBuf,
    disk: FaultyDisk,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let (fits, error) = self.disk.0.lock().admit(bytes.len());
        if fits > 0 {
            // A write that is cut short says so by its number; the next one hears of the error.
            self.file.write_all(&bytes[..fits])?;
        }
        match error {
            Some(error) if fits == 0 || error.kind() != ErrorKind::StorageFull => Err(error),
            _ => Ok(fits),
        }
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Bytes for FaultyFile {
    fn set_len(&self, length: u64) -> Result<()> {
        self.file.set_len(length)
    }

    fn sync_data(&self) -> Result<()> {
        while self.disk.0.lock().faults.is_stuck {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut state = self.disk.0.lock();
        let length = self.file.metadata()?.len();
        let kept = state.kept.get(&self.path).copied().unwrap_or(0).min(length);
        if state.faults.deaf > 0 {
            state.faults.deaf -= 1;
            // The pages count as clean from now on; on disk are zeros.
            self.file.set_len(kept)?;
            self.file.set_len(length)?;
            return Err(Error::from_raw_os_error(libc::EIO));
        }
        state.kept.insert(self.path.clone(), length);
        Ok(())
    }

    fn try_clone(&self) -> Result<Self> {
        Ok(Self { file: self.file.try_clone()?, path: self.path.clone(), disk: self.disk.clone() })
    }
}

impl Disk for FaultyDisk {
    type File = FaultyFile;

    fn create(&self, path: &Path) -> Result<Segment<FaultyFile>> {
        if self.0.lock().faults.room == Some(0) {
            return Err(Error::from(ErrorKind::StorageFull));
        }
        let file = OpenOptions::new().append(true).create_new(true).open(path)?;
        self.0.lock().kept.insert(path.to_path_buf(), 0);
        Ok(Segment::over(FaultyFile { file, path: path.to_path_buf(), disk: self.clone() }))
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut state = self.0.lock();
        if let (_, Some(error)) = state.admit(bytes.len()) {
            return Err(error);
        }
        if state.faults.deaf > 0 {
            state.faults.deaf -= 1;
            return Err(Error::from_raw_os_error(libc::EIO));
        }
        RealDisk.replace(path, bytes)
    }
}
