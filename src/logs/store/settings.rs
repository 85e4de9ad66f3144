//! How the store is kept, and what gateways keep in it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::base::AccountId;

/// What a gateway keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep {
    /// Records at most: `log_management`.
    pub records: u64,
    /// What happens at that bound.
    pub strategy: Strategy,
}

impl Default for Keep {
    fn default() -> Self {
        Self { records: 10_000_000, strategy: Strategy::DeleteOldest }
    }
}

/// `log_management_strategy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// The oldest records make room.
    DeleteOldest,
    /// New ones are not taken.
    StopInserting,
}

/// See [`Settings::keep`].
pub type KeepOf = dyn Fn(&AccountId, &str) -> Keep + Send + Sync;

/// How the store is kept.
#[derive(Clone)]
pub struct Settings {
    /// Where its files are: its own, and one process's at a time.
    pub folder: PathBuf,
    /// How long a record may wait for the disk.
    pub commit: Duration,
    /// Bytes of the log of one segment.
    pub segment_bytes: u64,
    /// Bytes of all files; the oldest segments go first.
    pub max_bytes: u64,
    /// Records older than this are deleted; `None`: none for its age.
    pub max_age: Option<Duration>,
    /// What a gateway keeps: asked with every batch and every second under a lock of the store's, so it should be quick and ask the store
    /// for nothing.
    pub keep: Arc<KeepOf>,
    /// Bytes of bodies that one search reads at most: the newest are searched, the rest is not. 1 GiB take about a second.
    pub search_bytes: u64,
    /// How often bounds are looked at.
    pub tend: Duration,
}

impl Settings {
    /// The defaults, in a folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            commit: Duration::from_millis(50),
            segment_bytes: 256 << 20,
            max_bytes: 64 << 30,
            max_age: None,
            keep: Arc::new(|_, _| Keep::default()),
            search_bytes: 1 << 30,
            tend: Duration::from_secs(1),
        }
    }
}
