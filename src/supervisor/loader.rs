//! From a path to a model that is ready to be installed. Runs on a thread of its own, so that decoding goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tracing::info;

use crate::base::{DeviceId, Error, ModelId, Result, SlotId};
use crate::config::{Engine as EngineConfig, Model as ModelConfig, simulated};
use crate::engine::scheduler::SCORED_ROWS;
use crate::engine::sim::{SimRunner, SimSpec};
use crate::engine::spill::Store;
use crate::engine::{ModelSlot, Runner, Speculation};
use crate::kernel::{Isa, Pool};
use crate::metrics::{EngineMetrics, Metrics};
use crate::model::files::ModelFiles;
use crate::model::lora::Shape;
use crate::model::text::TextModel;
use crate::model::weights::Weights;
use crate::model::{Decoder, DecoderOptions};

/// Drafts in a step over all sequences. When more would pay, the step is so large that hardly any does.
const DRAFT_ROWS: usize = 32;
/// Context window of a simulated model.
const SIM_CONTEXT: u32 = 32_768;

/// What makes two loads the same: the model's options, the time of its file among them, and the device's.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Identity {
    pub(super) model: ModelConfig,
    pub(super) engine: EngineConfig,
}

/// A model off the disk, and what the fleet says about it.
pub(super) struct Ready {
    pub(super) slot: ModelSlot,
    pub(super) text: Arc<TextModel>,
    pub(super) shape: Option<Shape>,
    pub(super) metrics: EngineMetrics,
}

/// Reads, checks and packs one model. `pool` computes it later; the packing itself uses threads of its own.
pub(super) fn load(identity: &Identity, device: DeviceId, pool: &Arc<Pool>, metrics: &Metrics) -> Result<Ready> {
    let started = Instant::now();
    let (model, engine) = (&identity.model, &identity.engine);
    let Opened { text, runner, shape } = open(model, engine, pool).map_err(|error| error.context(&model.id))?;
    let context = model.context.min(text.context());
    let metrics = metrics.engine(&model.id, device);
    info!(
        model = %model.id,
        path = %model.path.display(),
        kv_blocks = runner.blocks(),
        context,
        ms = started.elapsed().as_millis() as u64,
        "model loaded"
    );
    let open = |spill| Store::open(spill, runner.block_bytes()).map_err(|error| error.context(&model.id));
    let spill = model.spill.as_ref().map(open).transpose()?;
    let slot = ModelSlot {
        slot: SlotId::next(),
        model: model.id.clone(),
        vocabulary: text.vocabulary().clone(),
        runner,
        context,
        step_tokens: engine.step_tokens,
        prefill_chunk: engine.prefill_chunk,
        max_running: engine.max_running,
        max_queue: engine.max_queue,
        prefix_cache: engine.prefix_cache,
        prefill_stretch: engine.prefill_stretch,
        spill,
        speculation: Speculation { most: engine.draft_tokens, rows: draft_rows(engine), lookup: engine.prompt_lookup },
        metrics: metrics.clone(),
    };
    Ok(Ready { slot, text: Arc::new(text), shape, metrics })
}

/// Both halves of a model, and what its adapters have to fit.
struct Opened {
    text: TextModel,
    runner: Box<dyn Runner>,
    shape: Option<Shape>,
}

/// Rows with drafts in a step, over all sequences: each has logits, a row of the vocabulary in f32.
fn draft_rows(engine: &EngineConfig) -> usize {
    if engine.draft_tokens == 0 { 0 } else { DRAFT_ROWS.max(engine.draft_tokens) }
}

/// Both halves of a model at the same time: the text half is a quarter of a small model's load time.
fn open(model: &ModelConfig, engine: &EngineConfig, pool: &Arc<Pool>) -> Result<Opened> {
    if let Some(spec) = simulated(&model.path) {
        let text = TextModel::bytes(SimRunner::vocabulary(), SIM_CONTEXT)?;
        return Ok(Opened { text, runner: Box::new(SimRunner::new(spec.parse::<SimSpec>()?)), shape: None });
    }
    let files = Arc::new(ModelFiles::open(&model.path)?);
    std::thread::scope(|scope| {
        let text = scope.spawn(|| TextModel::of(&files));
        let decoder = decoder(&files, model, engine, pool);
        let text =
            text.join().map_err(|_| Error::internal("the tokenizer could not be read: its reader panicked"))??;
        let decoder = decoder?;
        let shape = Some(Shape::of(decoder.spec()));
        Ok(Opened { text, runner: Box::new(decoder), shape })
    })
}

fn decoder(files: &Arc<ModelFiles>, model: &ModelConfig, engine: &EngineConfig, pool: &Arc<Pool>) -> Result<Decoder> {
    let weights = Weights::of(files.clone())?;
    let spec = weights.spec()?;
    let options = DecoderOptions {
        pool: pool.clone(),
        isa: Isa::detect(),
        precision: model.precision,
        kv: model.kv,
        kv_bytes: model.kv_bytes,
        block_tokens: engine.block_tokens,
        max_rows: engine.step_tokens,
        max_sample_rows: (engine.max_running + SCORED_ROWS + draft_rows(engine)).min(engine.step_tokens),
    };
    let progress =
        Progress { model: &model.id, bytes: weights.bytes(), told: AtomicU64::new(0), begun: Instant::now() };
    Decoder::open(&weights, spec, &options, &|done| progress.tell(done))
}

/// Tells whoever waits for a large model how far its packing is: a line every two seconds, none for a small one.
struct Progress<'a> {
    model: &'a ModelId,
    bytes: u64,
    /// Seconds after `begun` of the last line.
    told: AtomicU64,
    begun: Instant,
}

impl Progress<'_> {
    fn tell(&self, done: f32) {
        let (seconds, told) = (self.begun.elapsed().as_secs(), self.told.load(Ordering::Relaxed));
        if seconds < told + 2
            || self.told.compare_exchange(told, seconds, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let (percent, of_mb) = ((done * 100.0) as u32, self.bytes / 1_000_000);
        info!(model = %self.model, percent, of_mb, seconds, "packing weights");
    }
}
