//! When things compute: one OS thread per device runs the models installed on it.
//!
//! ```text
//! callers --Submit--> inbox (bounded) --> scheduler + blocks + runner, one set a model slot --Event--> callers
//! ```
//!
//! Bottom up: [`blocks`] keeps the books of the KV pool, [`queue`] says who is next, [`coming`] who waits for whose prefix,
//! [`spill`] keeps what the pool gives away, [`pace`] says how much a step may hold, [`speculate`] guesses what an answer
//! says next, `drafter.rs` does so with a smaller model, which has the blocks that [`mirror`] says, [`sequence`] is one answer's state, [`scheduler`] decides a step, `masks.rs` finds out beside it what grammars
//! allow, [`seen`] is what draws look back at, [`sampler`] draws tokens, [`answer`] says how and when they end, `reply.rs`
//! turns them into events, which `scribe.rs` has done on another thread, [`lane`] is all of these for one model, and the loop
//! around the lanes is in `run.rs`. [`oneshot`] is the lane of models that answer in
//! one pass. [`sim`] is a device without weights.
//!
//! The thread knows nobody above it. Callers hold an [`Engine`], which is the sending end of its inbox and a heartbeat.

pub mod answer;
pub mod blocks;
pub mod coming;
pub mod lane;
pub mod mirror;
pub mod oneshot;
pub mod pace;
pub mod queue;
pub mod sampler;
pub mod scheduler;
pub mod seen;
pub mod sequence;
pub mod sim;
pub mod sim_encoder;
pub mod speculate;
pub mod spill;

mod command;
mod drafter;
mod masks;
mod refusal;
mod reply;
mod run;
mod runner;
mod scribe;
mod slab;
mod slot;
mod submit;

pub use command::{Coming, Command, Engine};
pub use run::start;
pub use runner::{Logits, Runner};
pub use slot::{EngineStatus, ModelSlot, SlotStatus, Speculation};
pub use submit::Submit;
