//! Sends a span of every call through a gateway that has `otel` set, by OTLP over HTTP.
//!
//! ```text
//! append ──> queue ──> lanes, one a destination: 512 spans, 4 MiB or 1 s ──encode──> POST ──> done
//!  (never waits)          │ bounded: what is more is dropped, and counted      '─ backoff <─' 429, 502, 503, 504, no answer
//!                         '─ not used for a minute: gone
//! ```
//!
//! Best effort: nothing is on disk, and what cannot be sent for five minutes is lost. A destination that is down costs the others nothing.
//! Where spans go is said with each of them, so a setting that changes counts from the next call on.
//!
//! Records come redacted, and are given away: nobody else needs them any more.

mod lane;
mod span;
mod wire;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::interval;
use tracing::{error, warn};

use self::lane::Lane;
use self::span::Ids;
use crate::base::{Error, Result, Secret};
use crate::logs::post;
use crate::logs::record::Record;
use crate::metrics::Metrics;
use crate::net::client::{self, Client};

/// Spans that wait for the thread at most.
const QUEUE: usize = 1 << 14;
/// Bytes of all spans that wait, wherever.
const MAX_BYTES: usize = 128 << 20;
/// Bytes of a span without its bodies, about.
const SPAN: usize = 1 << 10;
/// Destinations at a time; spans for more are dropped.
const MAX_LANES: usize = 256;
/// A destination that got nothing for so long is forgotten, until it gets something.
const IDLE: Duration = Duration::from_secs(60);
/// How often is looked for those.
const TICK: Duration = Duration::from_secs(10);

/// Where spans go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Destination {
    /// The whole address, such as `https://otel.example/v1/traces`.
    pub url: String,
    /// Sent along.
    pub headers: Vec<(String, Secret<String>)>,
    /// Sent as `Authorization`.
    pub authorization: Option<Secret<String>>,
    /// Protobuf, or else JSON.
    pub protobuf: bool,
    /// The server may be on a private address.
    pub allow_private: bool,
}

/// How they are sent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How servers are reached.
    pub client: client::Settings,
    /// How long spans gather. Default: 1 s.
    pub linger: Duration,
    /// How long a server may take to answer. Default: 10 s.
    pub patience: Duration,
    /// The wait after a first failure; doubled up to 60 of it. Default: 1 s.
    pub first_wait: Duration,
    /// How long the same spans are tried. Default: 5 minutes.
    pub give_up: Duration,
}

impl Settings {
    /// The defaults.
    pub fn new(client: client::Settings) -> Self {
        Self {
            client,
            linger: Duration::from_secs(1),
            patience: Duration::from_secs(10),
            first_wait: Duration::from_secs(1),
            give_up: Duration::from_secs(300),
        }
    }
}

/// See the top of this file. Dropped, it stops at once.
pub struct Traces {
    queue: flume::Sender<Message>,
    /// Bytes of spans that wait.
    bytes: Arc<AtomicUsize>,
    counts: Counts,
    /// Disconnected when the thread is done.
    done: flume::Receiver<()>,
    stop: Option<oneshot::Sender<()>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Message {
    Span(Held),
    /// What there is goes now, and then the thread.
    End,
}

/// What became of spans, by destination.
#[derive(Clone)]
struct Counts {
    /// They arrived.
    sent: IntCounter,
    /// They arrived, and were not taken.
    rejected: IntCounter,
    /// They could not be sent.
    failed: IntCounter,
    /// There was no room for them.
    dropped: IntCounter,
}

/// A call on its way to its destinations.
struct Held {
    record: Box<Record>,
    ids: Ids,
    to: Arc<[Destination]>,
    size: usize,
    bytes: Arc<AtomicUsize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.size, Ordering::Relaxed);
    }
}

impl Traces {
    /// Starts the thread that sends.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn start(settings: Settings, metrics: &Metrics) -> Result<Self> {
        let count = |outcome: &str| metrics.spans.with_label_values(&[outcome]);
        let counts = Counts {
            sent: count("sent"),
            rejected: count("rejected"),
            failed: count("failed"),
            dropped: count("dropped"),
        };
        let failed = |error| Error::internal("the thread that sends spans cannot be started").with_source(error);
        // Names are looked up beside.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("traces-names")
            .on_thread_start(post::step_back)
            .max_blocking_threads(4)
            .build()
            .map_err(failed)?;
        let (queue, messages) = flume::bounded(QUEUE);
        let (ending, done) = flume::bounded(1);
        let (stop, stopped) = oneshot::channel();
        let theirs = counts.clone();
        let run = move || {
            let _ending: flume::Sender<()> = ending;
            post::step_back();
            let local = LocalSet::new();
            local.block_on(&runtime, async {
                tokio::select! {
                    _ = stopped => {}
                    () = route(messages, settings, theirs) => {}
                }
            });
            drop(local);
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("traces".into()).spawn(run).map_err(failed)?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { queue, bytes: Arc::default(), counts, done, stop: Some(stop), thread })
    }

    /// Sends a call's span to all of `to`. Never waits; what there is no room for is counted and gone.
    pub fn append(&self, record: Box<Record>, to: Arc<[Destination]>) {
        let size = SPAN + record.asked.kept.len() + record.answered.kept.len();
        let before = self.bytes.fetch_add(size, Ordering::Relaxed);
        // Gives back what it has, dropped or not.
        let held = Held { ids: Ids::of(&record), record, to, size, bytes: self.bytes.clone() };
        let copies = held.to.len() as u64;
        if before + size > MAX_BYTES || self.queue.try_send(Message::Span(held)).is_err() {
            self.counts.dropped.inc_by(copies);
        }
    }

    /// Sends what there is, and ends. Returns whether that took no longer than `patience`; spans that are not sent by then are lost. Blocks.
    pub fn close(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let is_told = self.queue.send_timeout(Message::End, patience);
        if matches!(is_told, Err(flume::SendTimeoutError::Timeout(_))) {
            return false;
        }
        self.done.recv_deadline(until) != Err(flume::RecvTimeoutError::Timeout)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.lock().take().is_some_and(|thread| thread.join().is_err()) {
            error!("the thread that sends spans had panicked");
        }
    }
}

/// Gives each span to the lanes of its destinations, until the end.
async fn route(messages: flume::Receiver<Message>, settings: Settings, counts: Counts) {
    let client = Client::new(settings.client.clone());
    let mut lanes: Vec<Rc<Lane>> = Vec::new();
    let mut tasks = JoinSet::new();
    let mut ticks = interval(TICK);
    let mut is_crowded = false;
    loop {
        let message = tokio::select! {
            message = messages.recv_async() => message,
            _ = ticks.tick() => {
                lanes.retain(|lane| !lane.is_idle(IDLE) || lane.end());
                client.sweep();
                while let Some(end) = tasks.try_join_next() {
                    tell_panic(end);
                }
                continue;
            }
        };
        let Ok(Message::Span(held)) = message else { break };
        let held = Rc::new(held);
        for to in held.to.iter() {
            let known = lanes.iter().find(|lane| lane.to == *to);
            let lane = match known {
                Some(lane) => lane,
                None if lanes.len() < MAX_LANES => {
                    let lane = Rc::new(Lane::new(to.clone()));
                    tasks.spawn_local(lane::run(lane.clone(), client.clone(), settings.clone(), counts.clone()));
                    lanes.push(lane);
                    let Some(lane) = lanes.last() else { continue };
                    lane
                }
                None => {
                    if !std::mem::replace(&mut is_crowded, true) {
                        warn!(
                            "gateways send spans to more than {MAX_LANES} destinations: those of the latest are dropped"
                        );
                    }
                    counts.dropped.inc();
                    continue;
                }
            };
            if !lane.push(held.clone()) {
                counts.dropped.inc();
            }
        }
    }
    for lane in &lanes {
        lane.end();
    }
    while let Some(end) = tasks.join_next().await {
        tell_panic(end);
    }
}

fn tell_panic(end: std::result::Result<(), tokio::task::JoinError>) {
    if let Err(error) = end {
        error!(%error, "spans of a destination are not sent any more: restart the daemon");
    }
}

#[cfg(test)]
#[path = "trace_test.rs"]
mod tests;
