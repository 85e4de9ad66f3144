//! From a folder to an encoder that is ready to be installed: what `loader.rs` is for decoders.

use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info};

use super::loader::{Identity, Place};
use crate::base::{DeviceId, Error, Result, SlotId};
use crate::config::{Engine as EngineConfig, Model as ModelConfig, simulated};
use crate::engine::oneshot::{OneShot, OneShotSlot};
use crate::engine::sim::SimSpec;
use crate::engine::sim_encoder::SimEncoder;
use crate::kernel::{Isa, Pool, gpu};
use crate::metrics::{EngineMetrics, Metrics};
use crate::model::encoder::{Encoder, EncoderOptions, EncoderText, GpuEncoder};
use crate::model::files::ModelFiles;
use crate::model::weights::Weights;
use crate::task::Task;

/// Context window, vector length and labels of a simulated encoder.
const SIM_CONTEXT: u32 = 512;
const SIM_WIDTH: u32 = 8;
const SIM_LABELS: [&str; 2] = ["NEGATIVE", "POSITIVE"];

/// An encoder off the disk, and what the fleet says about it.
pub(super) struct ReadyEncoder {
    pub(super) slot: OneShotSlot,
    pub(super) text: Arc<EncoderText>,
    pub(super) metrics: EngineMetrics,
    /// Longest text served.
    pub(super) context: u32,
}

/// Reads, checks and packs one encoder, or sends it to a GPU. On the CPU `pool` computes it later.
pub(super) fn load(
    identity: &Identity,
    device: DeviceId,
    place: Place,
    pool: &Arc<Pool>,
    metrics: &Metrics,
) -> Result<ReadyEncoder> {
    let started = Instant::now();
    let (model, engine) = (&identity.model, &identity.engine);
    if !model.task.encodes() {
        let what = model.task.name();
        return Err(Error::unsupported(format!("{}: {what} is not available in this build", model.id)));
    }
    let (text, runner) = open(model, engine, place, pool).map_err(|error| error.context(&model.id))?;
    let classifies = text.labels().is_some();
    if classifies != (model.task == Task::TextClassification) {
        let (is, wanted) = if classifies { ("classifies", "embeds") } else { ("embeds", "classifies") };
        return Err(Error::unsupported(format!(
            "{}: {} holds a model that {is}, and this id is one that {wanted}: correct the path or the entry's task",
            model.id,
            model.path.display()
        )));
    }
    // An entry need not name a limit.
    let context = if model.context == 0 { text.context() } else { model.context.min(text.context()) };
    let metrics = metrics.engine(&model.id, device);
    info!(
        model = %model.id,
        %device,
        path = %model.path.display(),
        width = text.width(),
        context,
        ms = started.elapsed().as_millis() as u64,
        "model loaded"
    );
    let slot = OneShotSlot {
        slot: SlotId::next(),
        model: model.id.clone(),
        runner,
        step_tokens: engine.step_tokens,
        max_queue: engine.max_queue,
        metrics: metrics.clone(),
    };
    Ok(ReadyEncoder { slot, text: Arc::new(text), metrics, context })
}

/// Both halves of an encoder at the same time.
fn open(
    model: &ModelConfig,
    engine: &EngineConfig,
    place: Place,
    pool: &Arc<Pool>,
) -> Result<(EncoderText, Box<dyn OneShot>)> {
    if let Some(spec) = simulated(&model.path) {
        let labels = (model.task == Task::TextClassification).then(|| SIM_LABELS.map(str::to_owned).into());
        let width = if labels.is_some() { SIM_LABELS.len() as u32 } else { SIM_WIDTH };
        let runner = SimEncoder::new(spec.parse::<SimSpec>()?, width as usize, SIM_CONTEXT as usize);
        return Ok((EncoderText::bytes(SIM_CONTEXT, width, labels), Box::new(runner)));
    }
    let files = Arc::new(ModelFiles::open(&model.path)?);
    std::thread::scope(|scope| {
        let text = scope.spawn(|| EncoderText::of(&files));
        let runner = runner(&files, model, engine, place, pool);
        let text =
            text.join().map_err(|_| Error::internal("the tokenizer could not be read: its reader panicked"))??;
        Ok((text, runner?))
    })
}

fn runner(
    files: &Arc<ModelFiles>,
    model: &ModelConfig,
    engine: &EngineConfig,
    place: Place,
    pool: &Arc<Pool>,
) -> Result<Box<dyn OneShot>> {
    let weights = Weights::of(files.clone())?;
    let (spec, max_rows) = (weights.encoder()?, engine.step_tokens);
    match place {
        Place::Cpu => {
            let (isa, precision) = (Isa::detect(), model.precision);
            let options = EncoderOptions { pool: pool.clone(), isa, precision, max_rows };
            let encoder = Encoder::open(&weights, spec, &options, &|_| ())?;
            debug!(model = %model.id, bytes = encoder.weight_bytes(), "weights packed");
            Ok(Box::new(encoder))
        }
        Place::Gpu { ordinal, .. } => Ok(Box::new(GpuEncoder::open(gpu::open(ordinal)?, &weights, spec, max_rows)?)),
    }
}
