//! Bytes on disk that survive a crash at any instant.

mod segment;

pub use segment::Segment;
