//! Time as values, so that whoever decides takes `now` as an argument and tests choose it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// Reads the wall clock; only the rim of the program does.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// Whole seconds, as OpenAI's `created` wants them.
    pub const fn seconds(self) -> u64 {
        self.0 / 1000
    }

    /// The day whose allocation this moment uses.
    pub const fn day(self) -> UtcDay {
        UtcDay((self.0 / 86_400_000) as u32)
    }
}

/// A UTC day, counted from 1970-01-01: allocations reset when it changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UtcDay(pub u32);

impl UtcDay {
    /// The first moment of the next day.
    pub const fn end(self) -> Millis {
        Millis((self.0 as u64 + 1) * 86_400_000)
    }
}
