//! The thread that takes records in, and the handle by which calls give them to it.
//!
//! ```text
//!   append ─> queue ─ 10 ms ─> batch: observe, clean ─> store.append, ship.append, trace.append
//! ```
//!
//! It sleeps while records gather, so that a busy gateway wakes it a hundred times a second and not for each call.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tracing::{error, warn};

use super::analytics::{self, Analytics};
use super::clean::Cleaner;
use super::redact::Redactor;
use super::ship::{self, Outgoing, PublicKey, Ship};
use super::store::{self, Store};
use super::trace::{self, Traces};
use crate::base::{AccountId, Error, Lookup, Millis, Result};
use crate::logs::record::{Body, Record};
use crate::metrics::Metrics;

/// Records that wait at most; beyond it they are dropped, and counted.
const QUEUE: usize = 1 << 16;
/// Bytes of bodies that wait at most; beyond it records go without bodies, and are counted.
const QUEUE_BYTES: usize = 256 << 20;
/// How long records gather.
const GATHER: Duration = Duration::from_millis(10);
/// Records that are taken in at once.
const BATCH: usize = 4096;
/// How often what is due by time is done while no records come.
const TICK: Duration = Duration::from_millis(500);
/// Keys of gateways that are kept ready.
const MAX_KEYS: usize = 1024;

/// How it is kept.
pub struct Settings {
    /// Records and bodies; `None`: they are not kept here.
    pub store: Option<store::Settings>,
    /// What is taken out of texts before they are kept or shipped.
    pub redactor: Redactor,
    /// Where they are shipped to, if anywhere.
    pub ship: Option<ship::Settings>,
    /// How spans are sent.
    pub traces: trace::Settings,
    /// Sums.
    pub analytics: analytics::Settings,
    /// Where a gateway's records go: asked with every batch.
    pub push: Arc<PushOf>,
}

/// What a gateway says of where its records go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Push {
    /// Its records are shipped.
    pub enabled: bool,
    /// An RSA key, PEM, that metadata and bodies are sealed for.
    pub key: Option<Arc<str>>,
    /// Who gets a span of each call.
    pub traces: Arc<[trace::Destination]>,
}

/// See [`Settings::push`].
pub type PushOf = dyn Fn(&AccountId, &str) -> Push + Send + Sync;

/// What the gateways of a batch say.
type Told = Lookup<(AccountId, Arc<str>), Push>;

/// The log's whole outside. Cheap to clone.
#[derive(Clone)]
pub struct Logs(Arc<Shared>);

struct Shared {
    queue: flume::Sender<Message>,
    /// Bytes of bodies in the queue.
    bytes: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
    store: Option<Store>,
    ship: Option<Arc<Ship>>,
    traces: Arc<Traces>,
    analytics: Arc<Analytics>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The thread that writes sums ends with it.
    _over: flume::Sender<()>,
}

enum Message {
    Record(Box<Record>),
    /// All before it has been taken in.
    Flush(oneshot::Sender<()>),
    /// The same, and it ends.
    End(oneshot::Sender<()>),
}

impl Logs {
    /// Opens what is kept, and takes records in on a thread of its own.
    ///
    /// # Errors
    /// When a folder cannot be used, or a destination cannot be one.
    pub fn start(settings: Settings, metrics: Arc<Metrics>) -> Result<Self> {
        let Settings { store, redactor, ship, traces, analytics, push } = settings;
        let store = store.map(Store::open).transpose()?;
        let ship = ship.map(Ship::start).transpose()?.map(Arc::new);
        let traces = Arc::new(Traces::start(traces, &metrics)?);
        let analytics = Arc::new(Analytics::open(analytics, Millis::now())?);
        let (queue, records) = flume::bounded(QUEUE);
        let bytes = Arc::new(AtomicUsize::new(0));
        let writer = Writer {
            records,
            bytes: bytes.clone(),
            redactor,
            store: store.clone(),
            ship: ship.clone(),
            traces: traces.clone(),
            analytics: analytics.clone(),
            push,
            keys: HashMap::new(),
            metrics: metrics.clone(),
            is_failing: false,
        };
        // Sums are written on a thread of their own: records do not wait for the disk.
        let (over, until) = flume::bounded::<()>(0);
        let sums = analytics.clone();
        let tick = move || {
            while until.recv_timeout(TICK) == Err(flume::RecvTimeoutError::Timeout) {
                sums.tick(Millis::now());
            }
        };
        let failed = |error| Error::internal("the thread that writes sums cannot be started").with_source(error);
        std::thread::Builder::new().name("sums".to_owned()).spawn(tick).map_err(failed)?;
        let thread = std::thread::Builder::new().name("logs".to_owned()).spawn(move || writer.run());
        let thread =
            thread.map_err(|error| Error::internal("the log's thread cannot be started").with_source(error))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self(Arc::new(Shared { queue, bytes, metrics, store, ship, traces, analytics, thread, _over: over })))
    }

    /// Takes a record. Never waits.
    pub fn append(&self, mut record: Box<Record>) {
        let size = record.asked.kept.len() + record.answered.kept.len();
        let before = self.0.bytes.fetch_add(size, Ordering::Relaxed);
        if before + size > QUEUE_BYTES {
            self.0.bytes.fetch_sub(size, Ordering::Relaxed);
            for body in [&mut record.asked, &mut record.answered] {
                *body = Body { kept: Default::default(), size: body.size };
            }
            self.0.metrics.log_bodies_dropped.inc();
        }
        let size = record.asked.kept.len() + record.answered.kept.len();
        if self.0.queue.try_send(Message::Record(record)).is_err() {
            self.0.bytes.fetch_sub(size, Ordering::Relaxed);
            self.0.metrics.log_records_dropped.inc();
        }
    }

    /// Where records are kept, if they are.
    pub fn store(&self) -> Option<&Store> {
        self.0.store.as_ref()
    }

    /// What is shipped, if anything is.
    pub fn ship(&self) -> Option<&Ship> {
        self.0.ship.as_deref()
    }

    /// What was counted.
    pub fn analytics(&self) -> &Arc<Analytics> {
        &self.0.analytics
    }

    /// Waits until all that was appended before is counted and can be listed.
    pub async fn flush(&self) {
        self.tell(Message::Flush).await;
    }

    /// Writes down what there is, and ends. Shipping and sending get `patience` to catch up; records that do not arrive are shipped by the
    /// next start, spans are lost.
    pub async fn close(&self, patience: Duration) {
        self.tell(Message::End).await;
        let Shared { store, ship, traces, analytics, .. } = &*self.0;
        let (store, ship, traces, analytics) = (store.clone(), ship.clone(), traces.clone(), analytics.clone());
        let thread = self.0.thread.lock().take();
        let closing = tokio::task::spawn_blocking(move || {
            if thread.is_some_and(|thread| thread.join().is_err()) {
                error!("the log's thread had panicked");
            }
            std::thread::scope(|beside| {
                beside.spawn(|| {
                    if !traces.close(patience) {
                        warn!("some spans are not sent yet: they are lost");
                    }
                });
                if let Some(ship) = ship
                    && !ship.flush(patience)
                {
                    warn!("some log records are not shipped yet: the next start does it");
                }
            });
            analytics.flush(Millis::now());
            if let Some(Err(error)) = store.map(|store| store.flush()) {
                error!(%error, "the log's last records");
            }
        });
        if let Err(error) = closing.await {
            error!(%error, "closing the log");
        }
    }

    async fn tell(&self, message: fn(oneshot::Sender<()>) -> Message) {
        let (done, heard) = oneshot::channel();
        if self.0.queue.send_async(message(done)).await.is_ok() {
            // It is gone if it panicked, which has been said.
            let _ = heard.await;
        }
    }
}

struct Writer {
    records: flume::Receiver<Message>,
    bytes: Arc<AtomicUsize>,
    redactor: Redactor,
    store: Option<Store>,
    ship: Option<Arc<Ship>>,
    traces: Arc<Traces>,
    analytics: Arc<Analytics>,
    push: Arc<PushOf>,
    /// By their PEM; `None`: that is none.
    keys: HashMap<Arc<str>, Option<PublicKey>>,
    metrics: Arc<Metrics>,
    is_failing: bool,
}

impl Writer {
    fn run(mut self) {
        let (mut batch, mut shown) = (Vec::new(), Instant::now());
        loop {
            let mut message = match self.records.recv_timeout(TICK) {
                Ok(message) => {
                    std::thread::sleep(GATHER);
                    Some(message)
                }
                Err(flume::RecvTimeoutError::Timeout) => None,
                Err(flume::RecvTimeoutError::Disconnected) => return self.analytics.flush(Millis::now()),
            };
            while let Some(next) = message.take().or_else(|| self.records.try_recv().ok()) {
                match next {
                    Message::Record(record) => {
                        batch.push(record);
                        if batch.len() >= BATCH {
                            self.take_in(&mut batch);
                        }
                    }
                    Message::Flush(done) => {
                        self.take_in(&mut batch);
                        // Whoever asked may be gone.
                        let _ = done.send(());
                    }
                    Message::End(done) => {
                        self.take_in(&mut batch);
                        let _ = done.send(());
                        return;
                    }
                }
            }
            self.take_in(&mut batch);
            if shown.elapsed() >= TICK {
                self.show();
                shown = Instant::now();
            }
        }
    }

    // Records are boxed by the calls that they are of, and handed on as they are.
    #[allow(clippy::vec_box)]
    fn take_in(&mut self, batch: &mut Vec<Box<Record>>) {
        if batch.is_empty() {
            return;
        }
        let bytes: usize = batch.iter().map(|record| record.asked.kept.len() + record.answered.kept.len()).sum();
        for record in batch.iter() {
            self.analytics.observe(record);
        }
        let told = self.ask(batch);
        // They are not to be logged; their spans have no bodies, which were not kept.
        let unlogged = batch.extract_if(.., |record| record.id.is_none());
        let is_traced = told.values().any(|push| !push.traces.is_empty());
        let mut unlogged: Vec<_> =
            unlogged.filter(|record| is_traced && destinations(&told, record).is_some()).collect();
        let mut cleaner = Cleaner::new(&self.redactor);
        for record in batch.iter_mut().chain(&mut unlogged) {
            cleaner.clean(record);
        }
        if let Some(store) = &self.store {
            match store.append(batch) {
                Ok(appended) => {
                    self.is_failing = false;
                    self.metrics.log_records.inc_by(appended.stored);
                    self.metrics.log_records_dropped.inc_by(appended.refused + appended.oversized);
                }
                Err(error) => {
                    self.metrics.log_records_dropped.inc_by(batch.len() as u64);
                    if !std::mem::replace(&mut self.is_failing, true) {
                        error!(%error, "log records cannot be written: they are dropped, and counted, until they can");
                    }
                }
            }
        }
        self.hand_on(batch, &told);
        for record in batch.drain(..).chain(unlogged) {
            if is_traced && let Some(to) = destinations(&told, &record) {
                self.traces.append(record, to.clone());
            }
        }
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What the gateways say whose records these are.
    fn ask(&self, batch: &[Box<Record>]) -> Told {
        let mut told = Told::default();
        let mut last: Option<&Record> = None;
        for record in batch {
            let is_same = |last: &Record| last.account == record.account && last.gateway == record.gateway;
            if last.replace(record).is_some_and(is_same) {
                continue;
            }
            told.entry((record.account.clone(), record.gateway.clone()))
                .or_insert_with(|| (self.push)(&record.account, &record.gateway));
        }
        told
    }

    /// Ships what is to be shipped.
    fn hand_on(&mut self, batch: &[Box<Record>], told: &Told) {
        let Some(ship) = &self.ship else { return };
        if self.keys.len() > MAX_KEYS {
            self.keys.clear();
        }
        for pem in told.values().filter_map(|push| push.key.as_ref()) {
            self.keys.entry(pem.clone()).or_insert_with(|| {
                let key = PublicKey::parse(pem);
                key.map_err(|error| error!(%error, "records of a gateway are not shipped: its logpush_public_key")).ok()
            });
        }
        let outgoing = batch.iter().filter_map(|record| {
            let push = told.get(&(record.account.clone(), record.gateway.clone())).filter(|push| push.enabled)?;
            let key = match &push.key {
                None => None,
                // What is to be sealed and cannot be stays here.
                Some(pem) => Some(self.keys.get(pem)?.as_ref()?),
            };
            Some(Outgoing { record, key })
        });
        ship.append(outgoing, Millis::now());
    }

    fn show(&self) {
        if let Some(store) = &self.store {
            let status = store.status();
            for (what, count) in [("records", status.records), ("bytes", status.bytes), ("segments", status.segments)] {
                self.metrics.log_store.with_label_values(&[what]).set(count as i64);
            }
        }
        if let Some(ship) = &self.ship {
            let status = ship.status();
            self.metrics.log_spool_bytes.set(status.spool_bytes as i64);
            let lost = status.refused_records + status.failed_records + status.dropped_records;
            self.metrics.log_ship_lost.set(lost as i64);
            for job in &status.jobs {
                let labels = [job.name.as_str()];
                self.metrics.log_ship_waiting.with_label_values(&labels).set(job.waiting_records as i64);
                self.metrics.log_shipped.with_label_values(&labels).set(job.shipped_records as i64);
                self.metrics.log_ship_failures.with_label_values(&labels).set(job.failures as i64);
            }
        }
    }
}

/// Who gets a span of a call, if anybody.
fn destinations<'a>(told: &'a Told, record: &Record) -> Option<&'a Arc<[trace::Destination]>> {
    let push = told.get(&(record.account.clone(), record.gateway.clone()))?;
    Some(&push.traces).filter(|to| !to.is_empty())
}
