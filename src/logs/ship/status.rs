//! How shipping goes, as numbers. They count from the start of the process, but for what waits.

use crate::base::Millis;

/// How shipping goes. For every job, `waiting` at the start + `appended` = `shipped` + `skipped` + `damaged` + `dropped` +
/// `waiting` now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// Records that the spool took.
    pub appended_records: u64,
    /// Records that it did not, because it is full.
    pub refused_records: u64,
    /// Records that it did not, because the disk would not.
    pub failed_records: u64,
    /// Records that it dropped before every job had them, because it was full.
    pub dropped_records: u64,
    /// Bytes on disk.
    pub spool_bytes: u64,
    /// In the order of the settings.
    pub jobs: Vec<JobStatus>,
}

/// How a job goes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct JobStatus {
    /// Its name.
    pub name: String,
    /// Segments that it has still to ship, the one that is being filled included.
    pub waiting_segments: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Their records, whoever's.
    pub waiting_records: u64,
    /// Records that arrived.
    pub shipped_records: u64,
    /// Records of gateways that are not its.
    pub skipped_records: u64,
    /// Records that could not be read any more.
    pub damaged_records: u64,
    /// Records that were dropped before it had them.
    pub dropped_records: u64,
    /// Objects that arrived.
    pub shipped_objects: u64,
    /// Their bytes, compressed.
    pub shipped_bytes: u64,
    /// Attempts that came to nothing.
    pub failures: u64,
    /// Whether its destination refuses in a way that waiting does not mend: somebody must see to it.
    pub is_held: bool,
    /// When an attempt failed last, and why.
    pub last_error: Option<(Millis, String)>,
    /// When a segment was done with last.
    pub last_success: Option<Millis>,
}
