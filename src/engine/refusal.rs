//! What callers hear whom an engine cannot serve.

use std::time::Duration;

use crate::base::{Error, Kind};

/// What a submission hears whose slot is gone or going.
pub(super) fn unavailable() -> Error {
    Error::new(Kind::ModelUnavailable, "This version of the model is being replaced; ask again.")
        .with_retry_after(Duration::from_secs(1))
}

/// What a caller hears while the inbox is full.
pub(super) fn full() -> Error {
    Error::new(Kind::Busy, "The engine's inbox is full; try again in a moment.")
        .with_retry_after(Duration::from_secs(1))
}

/// The thread of a device is gone.
pub(super) fn lost() -> Error {
    Error::new(Kind::EngineLost, "The device of this model went away; try again in a moment.")
        .with_retry_after(Duration::from_secs(2))
}
