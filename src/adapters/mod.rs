//! Adapters that accounts bring: kept on disk, opened on demand, shared by all requests that name one.
//!
//!     create, upload, list, delete ──> <lora.path>/<account>/<id>/{finetune.json, adapter_config.json, adapter_model.safetensors}
//!     acquire(name) ──> in memory? ──> Arc<Adapter>
//!                            └─ no: opened once on a blocking thread, whoever else asks waits; the least recently used idle ones go
//!
//! One actor owns the list and what is in memory, so that limits are exact. Every change is on disk before it is answered: written under
//! another name, synced, renamed; a crash leaves the old state or the new one. What is half uploaded is listed and not usable.

mod actor;
mod book;
mod cache;
mod disk;
mod upload;

pub use actor::Adapters;
pub use book::{Draft, Finetune};
pub use upload::Upload;
