//! What the cache may take, and how it is.

use std::path::PathBuf;

use crate::cache::fleet::Fleet;

/// What the cache may take.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Memory for whole answers. Answers under way may take as much again before new ones are not stored any more.
    pub memory_bytes: u64,
    /// Disk for whole answers; 0 keeps them in memory only.
    pub disk_bytes: u64,
    /// Entries at most, in memory and on disk together.
    pub max_entries: usize,
    /// A larger answer is not stored.
    pub max_entry_bytes: u64,
    /// Where the disk tier is. `None` keeps answers in memory only.
    pub folder: Option<PathBuf>,
    /// With whom answers are shared.
    pub fleet: Option<Fleet>,
}

/// How the cache is, and what it has done since its start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// It has turned itself off after several failures, or its thread is gone.
    pub is_off: bool,
    /// There is a disk tier, and it is written to.
    pub is_disk_on: bool,
    /// Entries there are.
    pub entries: u64,
    /// Those of them that are in memory.
    pub entries_in_memory: u64,
    /// Bytes of entries in memory.
    pub memory_bytes: u64,
    /// Bytes of all segments.
    pub disk_bytes: u64,
    /// Tickets that are neither finished nor failed nor dropped.
    pub fills_open: u64,
    /// Bytes of answers that are under way or still being read by followers.
    pub filling_bytes: u64,
    /// Followers there are.
    pub followers: u64,
    /// Lookups and peeks that were answered.
    pub hits: u64,
    /// Lookups that got a ticket, refreshes included, and those that others of a fleet had the answer for.
    pub misses: u64,
    /// Lookups that got a follower.
    pub coalesced: u64,
    /// Answers that were stored.
    pub stores: u64,
    /// Entries that made room in memory, or altogether.
    pub evictions: u64,
    /// Entries that became too old.
    pub expired: u64,
    /// Failures of the disk and of handlers.
    pub failures: u64,
}
