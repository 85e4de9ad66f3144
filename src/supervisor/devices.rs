//! All devices of this machine: who serves which model.
//!
//! ```text
//! models ──┬─ text in, not kept from GPUs ─────────> every GPU that it names, a copy each      ids 0, 1, …: the GPUs' numbers
//!          │       │                          └──────> or as many as it has ranks: the first's
//!          │       └─ GPU kernels do not take it ──┐
//!          └─ all others, or no GPU there ─────────┴> the CPU                                   the id behind them
//! ```
//!
//! A device that dies or cannot load something is its own supervisor's matter: the others go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use parking_lot::Mutex;
use tracing::{debug, info, warn};

use crate::base::{DeviceId, Kind, ModelId, Result};
use crate::config::{Config, Gpu, Model};
use crate::engine::Engine;
use crate::kernel::gpu;
use crate::metrics::Metrics;
use crate::supervisor::actor::{DeviceStatus, Outcome, Pulse, Report, Supervisor};
use crate::supervisor::fleet::FleetView;
use crate::supervisor::loader::Place;

/// The CPU and the GPUs that serve.
pub struct Devices {
    cpu: Supervisor,
    /// By number.
    gpus: Vec<(u16, Supervisor)>,
    /// Models that the GPUs' kernels did not take, as they were written then: asking again would change nothing.
    refused: Mutex<Vec<Model>>,
}

/// The heartbeats of devices, for who watches them.
#[derive(Clone)]
pub struct Pulses(Vec<(String, Pulse)>);

impl Pulses {
    /// Each device, and how long ago its thread came round its loop; `None`: it has none.
    pub fn read(&self) -> Vec<(String, Option<Duration>)> {
        let silent = |pulse: &Pulse| pulse.read().as_ref().map(Engine::silent_for);
        self.0.iter().map(|(name, pulse)| (name.clone(), silent(pulse))).collect()
    }
}

impl Devices {
    /// Starts a supervisor for the CPU and for each GPU that is to serve and is there.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(config: &Config, fleet: &FleetView, metrics: &Arc<Metrics>) -> Result<Self> {
        let ordinals = ordinals(config);
        let start = |device, place, threads| {
            Supervisor::start(DeviceId(device), place, threads, fleet.clone(), metrics.clone())
        };
        let Gpu { memory_share, threads, .. } = config.gpu;
        let on_gpu = |&ordinal: &u16| Ok((ordinal, start(ordinal, Place::Gpu { ordinal, memory_share }, threads)?));
        let gpus = ordinals.iter().map(on_gpu).collect::<Result<_>>()?;
        let behind = ordinals.last().map_or(0, |last| last + 1);
        let cpu = start(behind, Place::Cpu, config.engine.threads)?;
        Ok(Self { cpu, gpus, refused: Mutex::default() })
    }

    fn all(&self) -> impl Iterator<Item = &Supervisor> {
        self.gpus.iter().map(|(_, gpu)| gpu).chain([&self.cpu])
    }

    /// Makes all devices serve exactly the configured models, and says what became of each on each device it is for. Returns when
    /// the new ones take requests.
    ///
    /// # Errors
    /// As [`Supervisor::reconcile`].
    pub async fn reconcile(&self, config: &Config) -> Result<Report> {
        let on_gpu = config.engine.on_gpu(&config.gpu);
        self.refused.lock().retain(|refused| config.models.contains(refused));
        let (mut report, mut refused) = (Report::new(), Vec::new());
        for model in config.models.iter().filter(|model| model.is_for_gpus() && model.tensor_parallel > 1) {
            if !self.gpus.is_empty() && self.gpus_of(model).is_empty() {
                warn!(model = %model.id, ranks = model.tensor_parallel, "fewer GPUs serve than it has ranks: the CPU serves it");
            }
        }
        let on_one = |(ordinal, gpu): &(u16, Supervisor)| {
            let models = config.models.iter().filter_map(|model| self.on(*ordinal, model)).collect();
            let (gpu, on_gpu) = (gpu.clone(), on_gpu.clone());
            async move { gpu.reconcile(models, on_gpu).await }
        };
        // Where a model lies on several, one after the other: what it leaves free is another's.
        let spread = config.models.iter().any(|model| model.tensor_parallel > 1 && !self.gpus_of(model).is_empty());
        let gpus = async {
            if !spread {
                return join_all(self.gpus.iter().map(on_one)).await;
            }
            let mut outcomes = Vec::new();
            for gpu in &self.gpus {
                outcomes.push(on_one(gpu).await);
            }
            outcomes
        };
        let cpu = || config.models.iter().filter(|model| self.is_for_cpu(model)).cloned().collect();
        let (gpus, on_cpu) = futures_util::future::join(gpus, self.cpu.reconcile(cpu(), config.engine.clone())).await;
        for outcomes in gpus {
            for (id, outcome) in outcomes? {
                let model = config.models.iter().find(|model| model.id == id && model.on_gpu.gpus.is_none());
                match (model, &outcome) {
                    (Some(model), Outcome::Failed(error)) if error.kind() == Kind::Unsupported => {
                        // Every GPU says so.
                        if !refused.contains(model) {
                            warn!(model = %id, %error, "GPU kernels do not take this model: the CPU serves it");
                            refused.push(model.clone());
                        }
                    }
                    _ => report.push((id, outcome)),
                }
            }
        }
        report.extend(on_cpu?);
        if !refused.is_empty() {
            self.refused.lock().append(&mut refused);
            let again = self.cpu.reconcile(cpu(), config.engine.clone()).await?;
            let known: Vec<ModelId> = report.iter().map(|(id, _)| id.clone()).collect();
            report.extend(again.into_iter().filter(|(id, _)| !known.contains(id)));
        }
        Ok(report)
    }

    /// The GPUs that serve a model, each with a copy or each with a rank. None: the CPU does.
    fn gpus_of(&self, model: &Model) -> Vec<u16> {
        if !model.is_for_gpus() || self.refused.lock().contains(model) {
            return Vec::new();
        }
        let serving: Vec<u16> = self.gpus.iter().map(|(ordinal, _)| *ordinal).collect();
        let mut gpus = match &model.on_gpu.gpus {
            Some(named) => named.iter().filter(|gpu| serving.contains(gpu)).copied().collect(),
            None => serving,
        };
        match model.tensor_parallel {
            1 => {}
            ranks if ranks <= gpus.len() => gpus.truncate(ranks),
            _ => gpus.clear(),
        }
        gpus
    }

    /// A model as this GPU's supervisor serves it, if it does: what is divided is the first's, and says who has the other ranks.
    fn on(&self, ordinal: u16, model: &Model) -> Option<Model> {
        let gpus = self.gpus_of(model);
        let mut model = model.clone();
        if model.tensor_parallel == 1 {
            return gpus.contains(&ordinal).then_some(model);
        }
        let leads = gpus.first() == Some(&ordinal);
        model.on_gpu.gpus = Some(gpus);
        leads.then_some(model)
    }

    fn is_for_cpu(&self, model: &Model) -> bool {
        self.gpus_of(model).is_empty()
    }

    /// What each device is doing, or why it does not say.
    pub async fn status(&self) -> Vec<Result<DeviceStatus>> {
        join_all(self.all().map(Supervisor::status)).await
    }

    /// The heartbeats of all devices.
    pub fn pulses(&self) -> Pulses {
        let gpus = self.gpus.iter().map(|(ordinal, gpu)| (format!("gpu {ordinal}"), gpu.pulse()));
        Pulses(gpus.chain([("cpu".to_owned(), self.cpu.pulse())]).collect())
    }

    /// How long the device that was silent longest has been silent.
    pub fn silent_for(&self) -> Duration {
        self.all().map(Supervisor::silent_for).max().unwrap_or_default()
    }

    /// Lets running requests end until `deadline`, then stops all threads.
    pub async fn drain(&self, deadline: Instant) {
        join_all(self.all().map(|device| device.drain(deadline))).await;
    }
}

/// The GPUs that serve, in order. Whoever names some and has none is told.
fn ordinals(config: &Config) -> Vec<u16> {
    let named = config.models.iter().filter_map(|model| model.on_gpu.gpus.as_ref()).flatten();
    let asked = config.gpu.devices.iter().flatten().chain(named).next().is_some();
    if config.gpu.devices.as_ref().is_some_and(Vec::is_empty) {
        if asked {
            warn!("gpu.devices is empty: the CPU serves models that name GPUs, too");
        }
        return Vec::new();
    }
    let there = match gpu::count(&config.gpu.library_folders) {
        Ok(count) => u16::try_from(count).unwrap_or(u16::MAX - 1),
        Err(error) => {
            match (asked, cfg!(feature = "cuda")) {
                (true, _) => warn!("no GPU serves, the CPU does: {}", error.message()),
                (false, true) => info!("no GPU serves, the CPU does: {}", error.message()),
                (false, false) => debug!("no GPU serves, the CPU does: {}", error.message()),
            }
            return Vec::new();
        }
    };
    let wanted = config.gpu.devices.clone().unwrap_or_else(|| (0..there).collect());
    let (mut serving, missing): (Vec<u16>, Vec<u16>) = wanted.into_iter().partition(|&ordinal| ordinal < there);
    if !missing.is_empty() {
        warn!(?missing, there, "gpu.devices names GPUs that are not there");
    }
    serving.sort_unstable();
    info!(gpus = ?serving, "GPUs serve");
    serving
}
