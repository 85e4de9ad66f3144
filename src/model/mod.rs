//! How a network computes: from files on disk to logits, over paged KV.
//!
//! A model has two halves: [`text::TextModel`], which everyone may share (tokenizer, template, limits), and the decoder,
//! which one engine thread owns (weights, KV pool, work buffers).

pub mod encoder;
pub mod files;
pub mod gguf;
pub mod grammar;
pub mod lora;
pub mod spec;
pub mod template;
pub mod text;
pub mod tokenizer;
pub mod tools;
pub mod weights;

mod batch;
mod decoder;
mod gpu;
mod group;
mod kv;
mod layers;
mod shard;
mod synthetic;
mod vocab;

#[cfg(test)]
pub(crate) mod tests_support;

pub use batch::{Batch, Span};
pub use decoder::{Decoder, DecoderOptions};
pub use gpu::{GpuDecoder, GpuLogits, GpuOptions, KvSize, Launched, Source};
pub use group::Group;
pub use shard::Division;
pub use synthetic::{Synthetic, synthetic};
pub use vocab::{Detokenizer, Vocabulary};
