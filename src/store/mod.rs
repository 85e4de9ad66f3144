//! Bytes on disk that survive a crash at any instant.

mod disk;
#[cfg(test)]
pub mod fault;
mod lock;
mod segment;
pub mod snapshot;

pub use disk::{Disk, RealDisk};
pub use lock::lock;
pub use segment::{Bytes, Frames, Segment, sync_names};
