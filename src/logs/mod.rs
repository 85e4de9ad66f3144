//! What is told of calls afterwards.

mod record;

pub use record::{Body, CacheUse, Record};
