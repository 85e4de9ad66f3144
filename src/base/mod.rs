//! The ground floor: names, errors, money and time. Nothing here knows what a model or a request is.

mod error;
mod id;
mod neuron;
mod phase;
mod secret;
mod time;
mod trace;

use std::collections::HashMap;

pub use error::{Error, Kind, Limit, Result};
pub use id::{AccountId, DeviceId, KeyId, LogId, ModelId, RequestId, SlotId};
pub use neuron::Neurons;
pub use phase::Phase;
pub use secret::Secret;
pub use time::{Millis, UtcDay};
pub use trace::{TraceContext, span_id, trace_id};

/// A map that calls look into on their way. Its hash is quicker than the standard library's and has a seed of each process's own, but does
/// not promise to withstand who searches for collisions: it is for keys that operators choose, that are few, or hashes themselves.
pub type Lookup<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
