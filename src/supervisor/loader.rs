//! From a path to a model that is ready to be installed. Runs on a thread of its own, so that decoding goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tracing::info;

use crate::base::{DeviceId, Error, ModelId, Result, SlotId};
use crate::config::{Draft, Engine as EngineConfig, Model as ModelConfig, simulated, synthetic};
use crate::engine::scheduler::SCORED_ROWS;
use crate::engine::sim::{SimRunner, SimSpec, VOCABULARY as SIM_VOCABULARY};
use crate::engine::spill::Store;
use crate::engine::{ModelSlot, Runner, Speculation};
use crate::kernel::{Isa, Pool, gpu};
use crate::metrics::{EngineMetrics, Metrics};
use crate::model::files::ModelFiles;
use crate::model::lora::Shape;
use crate::model::spec::DecoderSpec;
use crate::model::text::TextModel;
use crate::model::weights::Weights;
use crate::model::{
    self, Decoder, DecoderOptions, Division, GpuDecoder, GpuOptions, Group, KvSize, Source, Synthetic, Vocabulary,
};

/// Drafts in a step over all sequences. When more would pay, the step is so large that hardly any does.
const DRAFT_ROWS: usize = 32;
/// Context window of a simulated model.
const SIM_CONTEXT: u32 = 32_768;

/// Where a device computes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Place {
    /// On the threads of its supervisor.
    Cpu,
    /// On a GPU.
    Gpu {
        /// Its number.
        ordinal: u16,
        /// Of what is left beside a model, how much becomes its KV pool, if nothing else is said.
        memory_share: f64,
    },
}

/// What makes two loads the same: the model's options, the time of its file among them, and the device's.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Identity {
    pub(super) model: ModelConfig,
    pub(super) engine: EngineConfig,
}

impl Identity {
    /// Whether its KV pool on a GPU is a share of what is left there: such models are loaded behind those that know what they need.
    pub(super) fn takes_the_rest(&self) -> bool {
        !self.model.task.encodes() && self.model.on_gpu.kv_bytes.is_none()
    }
}

/// A model off the disk, and what the fleet says about it.
pub(super) struct Ready {
    pub(super) slot: ModelSlot,
    pub(super) text: Arc<TextModel>,
    pub(super) shape: Option<Shape>,
    pub(super) metrics: EngineMetrics,
}

/// Reads, checks and packs one model, or sends it to a GPU. `pool` computes it later, or what is left to it; the packing itself uses
/// threads of its own.
pub(super) fn load(
    identity: &Identity,
    device: DeviceId,
    place: Place,
    pool: &Arc<Pool>,
    metrics: &Metrics,
) -> Result<Ready> {
    let started = Instant::now();
    let (model, engine) = (&identity.model, &identity.engine);
    let Opened { text, runner, draft, shape } =
        open(model, engine, place, pool).map_err(|error| error.context(&model.id))?;
    let context = model.context.min(text.context());
    let metrics = metrics.engine(&model.id, device);
    info!(
        model = %model.id,
        %device,
        path = %model.path.display(),
        kv_blocks = runner.blocks(),
        ranks = model.tensor_parallel,
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
        draft,
        metrics: metrics.clone(),
    };
    Ok(Ready { slot, text: Arc::new(text), shape, metrics })
}

/// Both halves of a model, and what its adapters have to fit.
struct Opened {
    text: TextModel,
    runner: Box<dyn Runner>,
    draft: Option<Box<dyn Runner>>,
    shape: Option<Shape>,
}

/// Rows with drafts in a step, over all sequences: each has logits, a row of the vocabulary in f32.
fn draft_rows(engine: &EngineConfig) -> usize {
    if engine.draft_tokens == 0 { 0 } else { DRAFT_ROWS.max(engine.draft_tokens) }
}

/// Both halves of a model at the same time: the text half is a quarter of a small model's load time.
fn open(model: &ModelConfig, engine: &EngineConfig, place: Place, pool: &Arc<Pool>) -> Result<Opened> {
    if let Some(spec) = simulated(&model.path) {
        let text = TextModel::bytes(SimRunner::vocabulary(), SIM_CONTEXT)?;
        let runner: Box<dyn Runner> = Box::new(SimRunner::new(spec.parse::<SimSpec>()?));
        let draft = draft(model, engine, place, pool, &text, runner.as_ref(), SIM_VOCABULARY)?;
        return Ok(Opened { text, runner, draft, shape: None });
    }
    let rows = (engine.max_running + SCORED_ROWS + draft_rows(engine)).min(engine.step_tokens);
    if let Some(name) = synthetic(&model.path) {
        let Synthetic { spec, accept } = model::synthetic(name)?;
        let text = made_up(&spec)?;
        let runner = match place {
            Place::Gpu { ordinal, memory_share } => {
                let made = Made::Up { accept };
                let size = kv_size(model, engine, pool, memory_share)?;
                on_gpus(made, spec.clone(), model, engine, &gpus(model, ordinal), size, pool, rows)?
            }
            Place::Cpu => {
                let message = format!("synthetic:{name}: weights are made up on a GPU, and none serves this model");
                return Err(Error::bad_input(message));
            }
        };
        let draft = draft(model, engine, place, pool, &text, runner.as_ref(), spec.vocab)?;
        return Ok(Opened { text, runner, draft, shape: None });
    }
    let files = Arc::new(ModelFiles::open(&model.path)?);
    std::thread::scope(|scope| {
        let text = scope.spawn(|| TextModel::of(&files));
        let target = target(&files, model, engine, place, pool, rows);
        let text =
            text.join().map_err(|_| Error::internal("the tokenizer could not be read: its reader panicked"))??;
        let Target { runner, pool, spec } = target?;
        let draft = draft(model, engine, place, &pool, &text, runner.as_ref(), spec.vocab)?;
        // Ranks on GPUs take no adapters.
        let adaptable = place == Place::Cpu || model.tensor_parallel == 1;
        Ok(Opened { text, runner, draft, shape: adaptable.then(|| Shape::of(&spec)) })
    })
}

/// A model's decoder.
struct Target {
    runner: Box<dyn Runner>,
    /// The threads that compute a draft model beside it.
    pool: Arc<Pool>,
    spec: DecoderSpec,
}

/// The decoder of a model, on as many ranks as it is to have; `rows` rows of a step have logits.
fn target(
    files: &Arc<ModelFiles>,
    model: &ModelConfig,
    engine: &EngineConfig,
    place: Place,
    pool: &Arc<Pool>,
    rows: usize,
) -> Result<Target> {
    if let Place::Gpu { ordinal, memory_share } = place {
        let weights = Weights::of(files.clone())?;
        let (spec, size) = (weights.spec()?, kv_size(model, engine, pool, memory_share)?);
        let gpus = gpus(model, ordinal);
        let runner = on_gpus(Made::File(&weights), spec.clone(), model, engine, &gpus, size, pool, rows)?;
        return Ok(Target { runner, pool: pool.clone(), spec });
    }
    if model.tensor_parallel == 1 {
        let decoder = decoder(files, model, engine, pool, |_, _| model.kv_bytes, rows)?;
        let spec = decoder.spec().clone();
        return Ok(Target { runner: Box::new(decoder), pool: pool.clone(), spec });
    }
    let weights = Weights::of(files.clone())?;
    let spec = weights.spec()?;
    let division = Division::new(&weights, &spec, model.tensor_parallel)?;
    let options = DecoderOptions { kv_bytes: model.kv_bytes, ..options(model, engine, pool, rows) };
    let progress = Progress::of(model, weights.bytes());
    let group = Group::open(&weights, &division, &options, &|done| progress.tell(done))?;
    let pool = group.pool().clone();
    Ok(Target { runner: Box::new(group), pool, spec })
}

/// The draft model of a model, if it has one: `target` says how many blocks, `vocab` how long a row of logits.
fn draft(
    model: &ModelConfig,
    engine: &EngineConfig,
    place: Place,
    pool: &Arc<Pool>,
    text: &TextModel,
    target: &dyn Runner,
    vocab: usize,
) -> Result<Option<Box<dyn Runner>>> {
    let Some(Draft { path, .. }) = model.draft.as_ref().filter(|_| engine.draft_tokens > 0) else { return Ok(None) };
    let open = || -> Result<Box<dyn Runner>> {
        if let Some(spec) = simulated(path) {
            text.vocabulary().check_same(&SimRunner::vocabulary())?;
            let (blocks, block_tokens) = (target.blocks(), target.block_tokens());
            return Ok(Box::new(SimRunner::new(SimSpec { blocks, block_tokens, ..spec.parse()? })));
        }
        if let (Some(name), Place::Gpu { ordinal, .. }) = (synthetic(path), place) {
            let Synthetic { spec, accept } = model::synthetic(name)?;
            text.vocabulary().check_same(made_up(&spec)?.vocabulary())?;
            let size = KvSize::Blocks(target.blocks());
            let made = Made::Up { accept };
            return on_gpus(made, spec, model, engine, &[ordinal], size, pool, engine.max_running);
        }
        let files = Arc::new(ModelFiles::open(path)?);
        let small = TextModel::of(&files)?;
        text.vocabulary().check_same(small.vocabulary())?;
        let (runner, has): (Box<dyn Runner>, usize) = match place {
            Place::Cpu => {
                let bytes =
                    |options: &DecoderOptions, spec: &DecoderSpec| target.blocks() * options.kv_block_bytes(spec);
                let decoder = decoder(&files, model, engine, pool, bytes, engine.max_running)?;
                let has = decoder.spec().vocab;
                (Box::new(decoder), has)
            }
            Place::Gpu { ordinal, .. } => {
                let (weights, size) = (Weights::of(files.clone())?, KvSize::Blocks(target.blocks()));
                let spec = weights.spec()?;
                let has = spec.vocab;
                let rows = engine.max_running;
                (on_gpus(Made::File(&weights), spec, model, engine, &[ordinal], size, pool, rows)?, has)
            }
        };
        if has != vocab || runner.blocks() != target.blocks() {
            return Err(Error::bad_input(format!("its logits are of {has} tokens, the model's of {vocab}")));
        }
        info!(model = %model.id, draft = %path.display(), "draft model loaded");
        Ok(runner)
    };
    open().map(Some).map_err(|error| error.context(format!("draft model {}", path.display())))
}

/// `kv_bytes` says how large the KV pool is, `rows` how many rows of a step have logits.
fn decoder(
    files: &Arc<ModelFiles>,
    model: &ModelConfig,
    engine: &EngineConfig,
    pool: &Arc<Pool>,
    kv_bytes: impl Fn(&DecoderOptions, &DecoderSpec) -> usize,
    rows: usize,
) -> Result<Decoder> {
    let weights = Weights::of(files.clone())?;
    let spec = weights.spec()?;
    let mut options = options(model, engine, pool, rows);
    options.kv_bytes = kv_bytes(&options, &spec);
    let progress = Progress::of(model, weights.bytes());
    Decoder::open(&weights, spec, &options, &|done| progress.tell(done))
}

/// How large a model's KV pool on a GPU is: as it is written, or what is left, a draft model's part of it left out.
fn kv_size(model: &ModelConfig, engine: &EngineConfig, pool: &Arc<Pool>, share: f64) -> Result<KvSize> {
    if let Some(bytes) = model.on_gpu.kv_bytes {
        return Ok(KvSize::Bytes(bytes));
    }
    let (mut beside, mut each) = (0, 0);
    if let Some(Draft { path, .. }) = model.draft.as_ref().filter(|_| engine.draft_tokens > 0) {
        let spec = match synthetic(path) {
            Some(name) => model::synthetic(name)?.spec,
            None => Weights::of(Arc::new(ModelFiles::open(path)?))?.spec()?,
        };
        let options = gpu_options(model, engine, &spec, pool, KvSize::Blocks(1), engine.max_running);
        (beside, each) = (options.weight_bytes(&spec), options.kv_block_bytes(&spec));
    }
    Ok(KvSize::Share { share, beside, each })
}

fn gpu_options(
    model: &ModelConfig,
    engine: &EngineConfig,
    spec: &DecoderSpec,
    pool: &Arc<Pool>,
    kv_size: KvSize,
    rows: usize,
) -> GpuOptions {
    GpuOptions {
        pool: pool.clone(),
        weights: model.on_gpu.weights,
        kv: model.on_gpu.kv,
        prompt_kernel: model.on_gpu.prompt_kernel,
        kv_size,
        block_tokens: engine.block_tokens,
        max_rows: engine.step_tokens,
        max_sample_rows: rows,
        max_sequences: engine.max_running,
        context: model.context.min(spec.context) as usize,
        accept: None,
    }
}

/// Texts for weights that are made up: what is read is bytes, and every token has a word.
fn made_up(spec: &DecoderSpec) -> Result<TextModel> {
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    let words = (257..spec.vocab).map(|word| format!(" {word:x}").into_bytes());
    let vocabulary = Vocabulary::new(bytes.chain([vec![]]).chain(words), vec![256]);
    TextModel::bytes(Arc::new(vocabulary), spec.context)
}

/// Where a GPU's weights come from.
enum Made<'a> {
    File(&'a Weights),
    /// Nowhere; a share of the drafts may come true all the same.
    Up {
        accept: Option<f32>,
    },
}

/// The GPUs that compute a model of the device whose own is `ordinal`: that one, or one a rank.
fn gpus(model: &ModelConfig, ordinal: u16) -> Vec<u16> {
    match &model.on_gpu.gpus {
        Some(ranks) if model.tensor_parallel > 1 => ranks.clone(),
        _ => vec![ordinal],
    }
}

/// The decoder on a GPU, or divided over several, with memory and an order of work of its own there; `rows` rows of a step have
/// logits.
#[allow(clippy::too_many_arguments)]
fn on_gpus(
    made: Made<'_>,
    spec: DecoderSpec,
    model: &ModelConfig,
    engine: &EngineConfig,
    gpus: &[u16],
    kv_size: KvSize,
    pool: &Arc<Pool>,
    rows: usize,
) -> Result<Box<dyn Runner>> {
    let (source, bytes, accept) = match made {
        Made::File(weights) => (Source::File(weights), weights.bytes(), None),
        Made::Up { accept } => (Source::Random, 0, accept),
    };
    let options = GpuOptions { accept, ..gpu_options(model, engine, &spec, pool, kv_size, rows) };
    let progress = Progress::of(model, bytes);
    let tell = |done| progress.tell(done);
    if let [ordinal] = *gpus {
        return Ok(Box::new(GpuDecoder::open(gpu::open(ordinal)?, source, spec, &options, &tell)?));
    }
    let division = Division::on_gpus(&spec, gpus.len(), options.weights)?;
    Ok(Box::new(Group::open_on_gpus(gpu::open_ranks(gpus)?, source, &division, &options, &tell)?))
}

/// All but the size of the KV pool.
fn options(model: &ModelConfig, engine: &EngineConfig, pool: &Arc<Pool>, rows: usize) -> DecoderOptions {
    DecoderOptions {
        pool: pool.clone(),
        isa: Isa::detect(),
        precision: model.precision,
        kv: model.kv,
        kv_bytes: 0,
        block_tokens: engine.block_tokens,
        max_rows: engine.step_tokens,
        max_sample_rows: rows,
    }
}

/// Tells whoever waits for a large model how far its packing is: a line every two seconds, none for a small one.
struct Progress<'a> {
    model: &'a ModelId,
    bytes: u64,
    /// Seconds after `begun` of the last line.
    told: AtomicU64,
    begun: Instant,
}

impl<'a> Progress<'a> {
    fn of(model: &'a ModelConfig, bytes: u64) -> Self {
        Self { model: &model.id, bytes, told: AtomicU64::new(0), begun: Instant::now() }
    }

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
