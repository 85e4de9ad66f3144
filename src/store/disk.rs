//! What a journal needs of a disk, so that tests can take its place.
//!
//! ```text
//! journal ─> Disk ─> RealDisk: files          the daemon
//!              └───> FaultyDisk               tests: full, torn, and lying about what it has kept
//! ```
//!
//! Reading is not part of it: what is read back is always a real file.

use std::fs::{self, File};
use std::io::{ErrorKind, Result};
use std::path::Path;

use crate::store::segment::{Bytes, Segment, sync_names};
use crate::store::snapshot;

/// Where segments and snapshots are written.
pub trait Disk: Clone + Send + 'static {
    /// What segments are written to.
    type File: Bytes + Send;

    /// A new, empty segment. Its name is on disk after [`Disk::sync_names`].
    ///
    /// # Errors
    /// The system's; `AlreadyExists` if there is one.
    fn create(&self, path: &Path) -> Result<Segment<Self::File>>;

    /// Waits until the names of a folder's files are on disk.
    ///
    /// # Errors
    /// The system's.
    fn sync_names(&self, folder: &Path) -> Result<()> {
        sync_names(folder)
    }

    /// Replaces a snapshot, as [`snapshot::write`] does.
    ///
    /// # Errors
    /// The system's; the file is what it was then.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()>;

    /// Removes a file, if there is one. After a crash it may be there again.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// The files of this machine.
#[derive(Clone, Copy, Debug)]
pub struct RealDisk;

impl Disk for RealDisk {
    type File = File;

    fn create(&self, path: &Path) -> Result<Segment> {
        Segment::begin(path)
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        snapshot::write(path, bytes, snapshot::PRIVATE)
    }
}
