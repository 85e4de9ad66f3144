//! Bytes on disk that survive a crash at any instant.

mod segment;
pub mod snapshot;

pub use segment::{Frames, Segment};
