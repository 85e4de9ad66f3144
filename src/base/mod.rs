//! The ground floor: names, errors, money and time. Nothing here knows what a model or a request is.

mod error;
mod id;
mod neuron;
mod phase;
mod secret;
mod time;
mod trace;

pub use error::{Error, Kind, Limit, Result};
pub use id::{AccountId, DeviceId, KeyId, LogId, ModelId, RequestId, SlotId};
pub use neuron::Neurons;
pub use phase::Phase;
pub use secret::Secret;
pub use time::{Millis, UtcDay};
pub use trace::{TraceContext, span_id, trace_id};
