//! When things compute: one OS thread per device runs the models installed on it.
//!
//!     callers --Submit--> inbox (bounded) --> scheduler + blocks + runner, one set a model slot --Event--> callers
//!
//! The thread knows nobody above it. Callers hold an [`Engine`], which is the sending end of its inbox and a heartbeat.

pub mod blocks;
pub mod queue;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

mod command;
mod runner;

pub use command::{Command, Engine, EngineStatus, ModelSlot, SlotStatus, Submit};
pub use runner::{Logits, Runner};
