//! What is installed on a device, and how it is doing.

use std::sync::Arc;

use crate::base::{ModelId, SlotId};
use crate::engine::Runner;
use crate::engine::spill::Store;
use crate::metrics::EngineMetrics;
use crate::model::Vocabulary;

/// A model ready to run on a device.
pub struct ModelSlot {
    /// Unique for this loaded version.
    pub slot: SlotId,
    /// Its catalog id, for logs.
    pub model: ModelId,
    /// Bytes behind tokens, end tokens.
    pub vocabulary: Arc<Vocabulary>,
    /// Weights and KV pool.
    pub runner: Box<dyn Runner>,
    /// Longest sequence.
    pub context: u32,
    /// Tokens computed in a step over all sequences.
    pub step_tokens: usize,
    /// Most prompt tokens of one sequence in a step.
    pub prefill_chunk: usize,
    /// Sequences computed at the same time.
    pub max_running: usize,
    /// Sequences waiting, beyond which submissions fail with `Busy`.
    pub max_queue: usize,
    /// Share KV of equal prefixes.
    pub prefix_cache: bool,
    /// How many times longer a step may take because of a prompt while others decode; 0: as long as it takes.
    pub prefill_stretch: f64,
    /// Where KV goes that the pool has no room for.
    pub spill: Option<Store>,
    /// How far answers are guessed ahead.
    pub speculation: Speculation,
    /// A draft model that guesses them: the same vocabulary, as many KV blocks of the same size.
    pub draft: Option<Box<dyn Runner>>,
    /// Where to count.
    pub metrics: EngineMetrics,
}

/// How far a model's answers are guessed ahead. Default: not at all.
#[derive(Default)]
pub struct Speculation {
    /// Most drafts of one sequence in a step; 0: none.
    pub most: usize,
    /// Most drafts in a step over all sequences; the runner computes logits for as many more rows.
    pub rows: usize,
    /// Guess from earlier text of prompt and answer.
    pub lookup: bool,
}

/// What a device is doing, for dumps and the fleet.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct EngineStatus {
    /// One entry a slot.
    pub slots: Vec<SlotStatus>,
}

/// What a model slot is doing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SlotStatus {
    /// Which.
    pub slot: SlotId,
    /// Of which model.
    pub model: ModelId,
    /// Takes no new requests.
    pub retiring: bool,
    /// Sequences waiting.
    pub waiting: usize,
    /// Sequences running.
    pub running: usize,
    /// KV blocks held by sequences.
    pub kv_used: usize,
    /// KV blocks free, cached ones included.
    pub kv_free: usize,
    /// Steps computed so far.
    pub steps: u64,
}
