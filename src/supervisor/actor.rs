//! The supervisor of one device: owns its engine thread, loads what it should serve, starts it again when it dies.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::prelude::*;
use parking_lot::RwLock;
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use crate::base::{DeviceId, Error, Kind, ModelId, Result, SlotId};
use crate::config::{Engine as EngineConfig, Model as ModelConfig};
use crate::engine::{self, Command, Engine, EngineStatus};
use crate::kernel::Pool;
use crate::kernel::gpu::{Health, Watch};
use crate::metrics::Metrics;
use crate::model::encoder::EncoderText;
use crate::supervisor::encoders::{self, ReadyEncoder};
use crate::supervisor::fleet::{FleetView, Installed, Replica};
use crate::supervisor::loader::{self, Identity, Place, Ready};
use crate::task::Task;

/// Reconciliations waiting behind the one that runs; more are refused.
const QUEUE: usize = 4;
/// How often the device is looked at.
const TICK: Duration = Duration::from_millis(250);
/// Between two looks at a GPU.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// How long an installation may wait for the engine to come round its loop.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(60);
/// First wait before a dead engine thread is started again; doubles up to the longest.
const BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// A thread that lived this long starts again without a grudge.
const GOOD_LIFE: Duration = Duration::from_secs(60);

/// What happened to one model in a reconciliation.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Nothing changed, neither its configuration nor its file.
    Kept,
    /// It was not there before and takes requests now.
    Loaded,
    /// A new version takes requests; the old one finishes what it has and is freed.
    Swapped,
    /// It is not wanted any more: no new requests, finishes what it has.
    Removed,
    /// It could not be loaded. If an older version was there, that one goes on serving.
    Failed(Error),
}

/// Outcome by model, wanted ones in the order of the configuration.
pub type Report = Vec<(ModelId, Outcome)>;

/// What a device is doing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DeviceStatus {
    /// Which.
    pub device: DeviceId,
    /// Models that take requests.
    pub models: Vec<ModelId>,
    /// Times its thread died and was started again.
    pub restarts: u64,
    /// Milliseconds since its thread last came round its loop.
    pub silent_ms: u64,
    /// Critical errors of the GPU since the daemon was started; none of a CPU.
    pub critical_errors: u64,
    /// What the thread says of itself; `None` if it did not answer in time.
    pub engine: Option<EngineStatus>,
}

/// The handle of a device's supervisor.
#[derive(Clone)]
pub struct Supervisor {
    addr: Addr<SupervisorActor>,
    /// The engine of the current life, for its heartbeat; `None` between two lives.
    pulse: Pulse,
}

pub(super) type Pulse = Arc<RwLock<Option<Engine>>>;

impl Supervisor {
    /// Starts the engine thread of a device with `threads` workers, and the actor that looks after it.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        device: DeviceId,
        place: Place,
        threads: usize,
        fleet: FleetView,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let (engine, thread) = engine::start(device)?;
        let pulse = Pulse::new(RwLock::new(Some(engine.clone())));
        let shared = pulse.clone();
        let arbiter = Arbiter::new();
        let addr = SupervisorActor::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(64);
            SupervisorActor {
                device,
                place,
                pool: Arc::new(Pool::new(threads)),
                engine,
                pulse: shared,
                thread: Some(thread),
                born: Instant::now(),
                restarts: 0,
                backoff: BACKOFF,
                restart_at: None,
                stopping: false,
                loaded: HashMap::new(),
                running: None,
                queue: VecDeque::new(),
                retiring: Vec::new(),
                fleet,
                metrics,
                health: Health::default(),
            }
        });
        Ok(Self { addr, pulse })
    }

    /// Makes the device serve exactly these models, and says what became of each. Returns when the new ones take requests;
    /// old ones may still be finishing.
    ///
    /// # Errors
    /// [`Kind::Busy`] when too many reconciliations wait already.
    pub async fn reconcile(&self, models: Vec<ModelConfig>, engine: EngineConfig) -> Result<Report> {
        let (reply, report) = oneshot::channel();
        self.addr.send(Reconcile { models, engine, reply }).await.map_err(dead)??;
        report.await.map_err(|_| Error::new(Kind::ShuttingDown, "The device is stopping."))
    }

    /// What the device is doing.
    ///
    /// # Errors
    /// When the supervisor has died.
    pub async fn status(&self) -> Result<DeviceStatus> {
        self.addr.send(Status).await.map_err(dead)
    }

    /// How long ago the device's thread last came round its loop; a thread that is being started again counts as well.
    pub fn silent_for(&self) -> Duration {
        let since = self.pulse.read();
        since.as_ref().map_or(Duration::ZERO, Engine::silent_for)
    }

    /// Its heartbeat, for who watches it from another thread.
    pub(super) fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Lets running requests end until `deadline`, then stops the thread.
    pub async fn drain(&self, deadline: Instant) {
        if let Err(error) = self.addr.send(Drain { deadline }).await {
            warn!(%error, "a device could not be drained");
        }
    }
}

fn dead(error: MailboxError) -> Error {
    Error::internal("The device's supervisor is not answering.").with_source(error)
}

struct SupervisorActor {
    device: DeviceId,
    place: Place,
    pool: Arc<Pool>,
    engine: Engine,
    pulse: Pulse,
    thread: Option<JoinHandle<()>>,
    born: Instant,
    restarts: u64,
    backoff: Duration,
    restart_at: Option<Instant>,
    stopping: bool,
    /// What takes requests, and from what it was loaded.
    loaded: HashMap<ModelId, (SlotId, Identity)>,
    running: Option<Reconciliation>,
    queue: VecDeque<Reconcile>,
    retiring: Vec<Retiring>,
    fleet: FleetView,
    metrics: Arc<Metrics>,
    /// As it was when it was looked at last.
    health: Health,
}

/// A reconciliation whose loader thread is at work.
struct Reconciliation {
    todo: usize,
    report: Report,
    reply: Option<oneshot::Sender<Report>>,
}

/// An old version finishing what it has.
struct Retiring {
    model: ModelId,
    slot: SlotId,
    since: Instant,
    done: flume::Receiver<()>,
    /// Still to be told to the engine, whose inbox was full.
    order: Option<flume::Sender<()>>,
}

#[derive(Message)]
#[rtype(result = "Result<()>")]
struct Reconcile {
    models: Vec<ModelConfig>,
    engine: EngineConfig,
    reply: oneshot::Sender<Report>,
}

/// From the loader thread: one model is installed, or why not.
#[derive(Message)]
#[rtype(result = "()")]
struct Loaded {
    identity: Identity,
    result: Result<Installed>,
}

/// From the thread that watches a GPU.
#[derive(Message)]
#[rtype(result = "()")]
struct Looked(Health);

#[derive(Message)]
#[rtype(result = "DeviceStatus")]
struct Status;

#[derive(Message)]
#[rtype(result = "()")]
struct Drain {
    deadline: Instant,
}

impl Actor for SupervisorActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(TICK, Self::tick);
        self.watch(ctx);
    }
}

impl Handler<Looked> for SupervisorActor {
    type Result = ();

    fn handle(&mut self, Looked(health): Looked, _: &mut Context<Self>) {
        self.note_health(health);
    }
}

impl Handler<Reconcile> for SupervisorActor {
    type Result = Result<()>;

    fn handle(&mut self, order: Reconcile, ctx: &mut Context<Self>) -> Result<()> {
        if self.queue.len() >= QUEUE {
            return Err(Error::new(Kind::Busy, "Reloads are already waiting for this device."));
        }
        self.queue.push_back(order);
        self.next_reconciliation(ctx);
        Ok(())
    }
}

impl Handler<Loaded> for SupervisorActor {
    type Result = ();

    fn handle(&mut self, Loaded { identity, result }: Loaded, ctx: &mut Context<Self>) {
        let model = identity.model.id.clone();
        let outcome = match result {
            Ok(installed) => self.publish(identity, installed),
            Err(error) => {
                error!(model = %model, device = %self.device, %error, "model not loaded");
                Outcome::Failed(error)
            }
        };
        let swapped = match &outcome {
            Outcome::Swapped => Some("done"),
            Outcome::Failed(_) if self.loaded.contains_key(&model) => Some("failed"),
            _ => None,
        };
        if let Some(outcome) = swapped {
            self.metrics.swaps.with_label_values(&[outcome]).inc();
        }
        if let Some(running) = &mut self.running {
            running.report.push((model, outcome));
            running.todo -= 1;
        }
        self.next_reconciliation(ctx);
    }
}

impl Handler<Status> for SupervisorActor {
    type Result = ResponseFuture<DeviceStatus>;

    fn handle(&mut self, _: Status, _: &mut Context<Self>) -> Self::Result {
        let (sender, receiver) = flume::bounded(1);
        let asked = self.engine.tell(Command::Dump(sender)).is_ok();
        let mut status = DeviceStatus {
            device: self.device,
            models: self.loaded.keys().cloned().collect(),
            restarts: self.restarts,
            silent_ms: self.engine.silent_for().as_millis() as u64,
            critical_errors: self.health.critical,
            engine: None,
        };
        status.models.sort();
        Box::pin(async move {
            if asked {
                let answer = tokio::time::timeout(Duration::from_secs(2), receiver.recv_async()).await;
                status.engine = answer.ok().and_then(std::result::Result::ok);
            }
            status
        })
    }
}

impl Handler<Drain> for SupervisorActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, Drain { deadline }: Drain, _: &mut Context<Self>) -> Self::Result {
        self.stopping = true;
        self.queue.clear();
        self.unpublish_all();
        let (engine, thread) = (self.engine.clone(), self.thread.take());
        Box::pin(async move {
            let Some(thread) = thread else { return };
            let mut asked = engine.tell(Command::Stop { drain: true }).is_ok();
            while !thread.is_finished() && Instant::now() < deadline {
                asked = asked || engine.tell(Command::Stop { drain: true }).is_ok();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if !thread.is_finished() {
                // Out of time: what is left is failed rather than finished.
                let _ = engine.tell(Command::Stop { drain: false });
                let grace = Instant::now() + Duration::from_secs(1);
                while !thread.is_finished() && Instant::now() < grace {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        })
    }
}

impl SupervisorActor {
    /// Closes the reconciliation that is complete, and begins the next one.
    fn next_reconciliation(&mut self, ctx: &mut Context<Self>) {
        if self.running.as_ref().is_some_and(|running| running.todo > 0) {
            return;
        }
        if let Some(Reconciliation { report, reply: Some(reply), .. }) = self.running.take() {
            // Whoever asked may have gone; the work is done all the same.
            let _ = reply.send(report);
        }
        if self.thread.is_none() {
            return; // between two lives; the restart comes here again
        }
        let Some(Reconcile { models, mut engine, reply }) = self.queue.pop_front() else { return };
        // A device keeps the threads it was started with: another number is no reason to load everything again.
        engine.threads = self.pool.threads();
        let wanted: Vec<Identity> =
            models.into_iter().map(|model| Identity { model, engine: engine.clone() }).collect();
        let mut report = self.remove_unwanted(&wanted);
        let mut load = Vec::new();
        for identity in wanted {
            match self.loaded.get(&identity.model.id) {
                Some((_, current)) if *current == identity => report.push((identity.model.id.clone(), Outcome::Kept)),
                _ => load.push(identity),
            }
        }
        self.begin(load, report, Some(reply), ctx);
    }

    fn remove_unwanted(&mut self, wanted: &[Identity]) -> Report {
        let unwanted: Vec<ModelId> =
            self.loaded.keys().filter(|id| !wanted.iter().any(|want| want.model.id == **id)).cloned().collect();
        for model in &unwanted {
            if let Some((slot, _)) = self.loaded.remove(model) {
                self.unpublish(model);
                self.retire(model.clone(), slot);
            }
        }
        unwanted.into_iter().map(|model| (model, Outcome::Removed)).collect()
    }

    /// Starts the loader thread over `load`, one model after the other so that at most one is held twice.
    fn begin(
        &mut self,
        mut load: Vec<Identity>,
        report: Report,
        reply: Option<oneshot::Sender<Report>>,
        ctx: &mut Context<Self>,
    ) {
        if let Place::Gpu { .. } = self.place {
            load.sort_by_key(Identity::takes_the_rest);
        }
        self.running = Some(Reconciliation { todo: load.len(), report, reply });
        if load.is_empty() {
            return self.next_reconciliation(ctx);
        }
        let (device, place, engine, pool) = (self.device, self.place, self.engine.clone(), self.pool.clone());
        let (metrics, addr) = (self.metrics.clone(), ctx.address());
        let work = move || {
            for identity in load {
                let result = match identity.model.task {
                    Task::TextGeneration => loader::load(&identity, device, place, &pool, &metrics)
                        .and_then(|ready| install(&engine, ready))
                        .map(Installed::Text),
                    _ => encoders::load(&identity, device, place, &pool, &metrics)
                        .and_then(|ready| install_encoder(&engine, ready))
                        .map(Installed::Encoder),
                };
                addr.do_send(Loaded { identity, result });
            }
        };
        if let Err(error) = std::thread::Builder::new().name(format!("loader-{device}")).spawn(work) {
            error!(%error, "no thread to load models on");
            self.running = None;
        }
    }

    /// Moves new requests over to a version that is installed, and retires the one it replaces.
    fn publish(&mut self, identity: Identity, installed: Installed) -> Outcome {
        let model = identity.model.id.clone();
        let (slot, device) = (installed.slot(), self.device);
        let old = self.loaded.insert(model.clone(), (slot, identity));
        self.fleet.update(|fleet| fleet.put(&model, installed));
        self.metrics.model_ready.with_label_values(&[model.as_str(), &device.to_string()]).set(1);
        match old {
            Some((old, _)) => {
                self.retire(model, old);
                Outcome::Swapped
            }
            None => Outcome::Loaded,
        }
    }

    fn unpublish(&mut self, model: &ModelId) {
        let device = self.device;
        self.fleet.update(|fleet| fleet.take_out(model, device));
        self.metrics.model_ready.with_label_values(&[model.as_str(), &device.to_string()]).set(0);
    }

    fn unpublish_all(&mut self) {
        let models: Vec<ModelId> = self.loaded.keys().cloned().collect();
        models.iter().for_each(|model| self.unpublish(model));
    }

    fn retire(&mut self, model: ModelId, slot: SlotId) {
        let (order, done) = flume::bounded(1);
        self.retiring.push(Retiring { model, slot, since: Instant::now(), done, order: Some(order) });
        self.look_after_retiring();
    }

    fn look_after_retiring(&mut self) {
        let engine = &self.engine;
        self.retiring.retain_mut(|old| {
            if let Some(order) = &old.order {
                if engine.tell(Command::Retire { slot: old.slot, done: order.clone() }).is_ok() {
                    old.order = None;
                }
                return true;
            }
            let gone = matches!(old.done.try_recv(), Err(flume::TryRecvError::Disconnected) | Ok(()));
            if gone {
                info!(model = %old.model, slot = old.slot.0, ms = old.since.elapsed().as_millis() as u64, "old version freed");
            }
            !gone
        });
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        self.look_after_retiring();
        if self.stopping {
            return;
        }
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.bury();
        }
        if self.restart_at.is_some_and(|at| Instant::now() >= at) {
            self.revive(ctx);
        }
    }

    /// Looks at a GPU now and then, on a thread of its own: a driver in trouble may take its time.
    fn watch(&self, ctx: &Context<Self>) {
        let Place::Gpu { ordinal, .. } = self.place else { return };
        let addr = ctx.address().downgrade();
        let work = move || {
            let Some(mut watch) = Watch::begin(ordinal) else { return };
            while let Some(addr) = addr.upgrade() {
                addr.do_send(Looked(watch.look()));
                drop(addr);
                std::thread::sleep(WATCH_EVERY);
            }
        };
        if let Err(error) = std::thread::Builder::new().name(format!("watch-{}", self.device)).spawn(work) {
            warn!(%error, device = %self.device, "no thread to watch a GPU on");
        }
    }

    /// Tells the metrics how the GPU is, and the log when something in it broke.
    fn note_health(&mut self, now: Health) {
        let device = self.device.to_string();
        let (device, metrics) = (device.as_str(), &self.metrics);
        metrics.gpu_memory.with_label_values(&[device, "total"]).set(now.memory_total as i64);
        metrics.gpu_memory.with_label_values(&[device, "used"]).set(now.memory_used as i64);
        metrics.gpu_clock.with_label_values(&[device, "sm"]).set(i64::from(now.sm_mhz) * 1_000_000);
        metrics.gpu_clock.with_label_values(&[device, "memory"]).set(i64::from(now.memory_mhz) * 1_000_000);
        metrics.gpu_power.with_label_values(&[device]).set(f64::from(now.power_mw) / 1e3);
        metrics.gpu_temperature.with_label_values(&[device]).set(i64::from(now.temperature));
        metrics.gpu_busy.with_label_values(&[device]).set(f64::from(now.busy) / 100.0);
        metrics.gpu_errors.with_label_values(&[device, "ecc"]).set(now.uncorrected as i64);
        metrics.gpu_errors.with_label_values(&[device, "xid"]).set(now.critical as i64);
        if (now.critical, now.uncorrected) != (self.health.critical, self.health.uncorrected) {
            let Health { critical, uncorrected, xid, .. } = now;
            let trouble = format!(
                "device {}: {critical} critical errors (the last: XID {xid}) and {uncorrected} memory errors that could not be corrected; nvidia-smi -q says more",
                self.device
            );
            self.fleet.update(|fleet| drop(fleet.troubles.insert(self.device, trouble)));
        }
        if now.critical > self.health.critical {
            error!(device, xid = now.xid, "the GPU had a critical error; nvidia-smi -q and the kernel's log say more");
        }
        if now.uncorrected > self.health.uncorrected {
            error!(device, errors = now.uncorrected, "the GPU's memory had errors that could not be corrected");
        }
        self.health = now;
    }

    /// The thread is gone: nothing it served can be served until it is started again.
    fn bury(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let cause = match thread.join() {
            Ok(()) => "it ended after a device error".to_owned(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                format!("it panicked: {}", text.unwrap_or_default())
            }
        };
        *self.pulse.write() = None;
        self.unpublish_all();
        self.retiring.clear();
        if self.born.elapsed() > GOOD_LIFE {
            self.backoff = BACKOFF;
        }
        error!(device = %self.device, cause, restart_in_ms = self.backoff.as_millis() as u64, "engine thread died");
        self.restart_at = Some(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        self.restarts += 1;
        self.metrics.engine_restarts.with_label_values(&[&self.device.to_string()]).inc();
    }

    /// Starts a new thread and loads what the old one had.
    fn revive(&mut self, ctx: &mut Context<Self>) {
        if self.running.as_ref().is_some_and(|running| running.todo > 0) {
            return; // a loader still works for the old thread; its installations will fail
        }
        self.restart_at = None;
        match engine::start(self.device) {
            Ok((engine, thread)) => {
                (self.engine, self.thread, self.born) = (engine, Some(thread), Instant::now());
                *self.pulse.write() = Some(self.engine.clone());
                let load = std::mem::take(&mut self.loaded).into_values().map(|(_, identity)| identity).collect();
                let reply = self.running.take().and_then(|running| running.reply);
                self.begin(load, Report::new(), reply, ctx);
            }
            Err(error) => {
                error!(device = %self.device, %error, "engine thread could not be started again");
                self.restart_at = Some(Instant::now() + self.backoff);
            }
        }
    }
}

fn install(engine: &Engine, Ready { slot, text, shape, metrics }: Ready) -> Result<Replica> {
    let replica = Replica {
        slot: slot.slot,
        device: engine.device(),
        engine: engine.clone(),
        metrics,
        text,
        context: slot.context,
        shape,
    };
    engine.tell_within(Command::Install(Box::new(slot)), INSTALL_TIMEOUT)?;
    Ok(replica)
}

fn install_encoder(engine: &Engine, ready: ReadyEncoder) -> Result<Replica<Arc<EncoderText>>> {
    let ReadyEncoder { slot, text, metrics, context } = ready;
    let replica = Replica {
        slot: slot.slot,
        device: engine.device(),
        engine: engine.clone(),
        metrics,
        text,
        context,
        shape: None,
    };
    engine.tell_within(Command::InstallOneShot(Box::new(slot)), INSTALL_TIMEOUT)?;
    Ok(replica)
}
