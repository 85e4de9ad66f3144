//! The thread that ships: a task a job, and one that seals and syncs.
//!
//! ```text
//! take ─> pack ─> put ─> cursor ─> confirm          one segment after the other
//!           ^      │
//!           '──────'  backoff: doubled and drawn, or longer where somebody must see to it; a flush ends the wait
//! ```
//!
//! Reading, compressing and writing to disk are done by threads beside, so a job that waits for a disk or a server holds up no other.
//! All of these threads step back behind those that serve calls.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinSet, LocalSet, spawn_blocking};
use tokio::time::{interval, sleep};
use tracing::{debug, error, info, warn};

use super::pack::{self, Chosen, Failure, Format, Object};
use super::sink::Sink;
use super::spool::{Shipped, Spool, write_cursor};
use crate::base::{Millis, RequestId};
use crate::logs::post::{self, Trouble};
use crate::net::client::{self, Client};

/// How often is looked what is to be sealed and synced, at most.
const TICK: Duration = Duration::from_secs(1);

/// What the writer and the jobs share.
pub(super) struct Shared {
    pub spool: Mutex<Spool>,
    /// A job has confirmed a segment.
    pub confirmed: Condvar,
    pub bells: Vec<Bell>,
}

/// Wakes one job.
#[derive(Default)]
pub(super) struct Bell {
    /// There is something to ship.
    pub more: Notify,
    /// Somebody waits for it: no time to wait for better times.
    pub hurry: Notify,
}

/// A job made ready.
pub(super) struct Carrier {
    pub number: usize,
    pub name: String,
    pub prefix: String,
    pub chosen: Arc<[Chosen]>,
    pub format: Format,
    pub sink: Sink,
}

/// How they are carried.
#[derive(Clone)]
pub(super) struct Manner {
    pub client: client::Settings,
    pub patience: Duration,
    pub first_wait: Duration,
    pub tick: Duration,
}

impl Shared {
    /// There is something to ship.
    pub(super) fn ring(&self) {
        self.bells.iter().for_each(|bell| bell.more.notify_one());
    }
}

/// Ships until `stop` says so, or is dropped.
pub(super) fn run(
    runtime: tokio::runtime::Runtime,
    shared: Arc<Shared>,
    carriers: Vec<Carrier>,
    manner: Manner,
    stop: oneshot::Receiver<()>,
) {
    post::step_back();
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let client = Client::new(manner.client.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn_local(keep(shared.clone(), client.clone(), manner.tick.min(TICK)));
        for carrier in carriers {
            tasks.spawn_local(carry(carrier, shared.clone(), client.clone(), manner.clone()));
        }
        tokio::select! {
            _ = stop => {}
            // They end by a panic only.
            Some(end) = tasks.join_next() => error!(?end, "log records are not exported any more: restart the daemon"),
        }
    });
    drop(local);
    runtime.shutdown_timeout(TICK);
}

/// Seals what is old, and makes what was written outlive the machine.
async fn keep(shared: Arc<Shared>, client: Client, tick: Duration) {
    let mut ticks = interval(tick.max(Duration::from_millis(1)));
    loop {
        ticks.tick().await;
        let (is_sealed, files) = {
            let mut spool = shared.spool.lock();
            (spool.seal_old(Millis::now()), spool.unsynced())
        };
        if is_sealed {
            shared.ring();
        }
        client.sweep();
        if files.is_empty() {
            continue;
        }
        let synced = spawn_blocking(move || files.iter().try_for_each(std::fs::File::sync_data)).await;
        if let Ok(Err(error)) = synced {
            warn!(%error, "the spool of log records could not be synced");
        }
    }
}

/// One segment after the other.
async fn carry(carrier: Carrier, shared: Arc<Shared>, client: Client, manner: Manner) {
    let Some(bell) = shared.bells.get(carrier.number) else { return };
    // What was packed for an attempt that failed.
    let mut packed: Option<(u64, Option<Object>, Shipped)> = None;
    let mut tries = 0;
    loop {
        let taken = shared.spool.lock().take(carrier.number);
        let Some((segment, path)) = taken else {
            packed = None;
            bell.more.notified().await;
            continue;
        };
        let outcome = async {
            if packed.as_ref().is_none_or(|(known, ..)| *known != segment) {
                let (prefix, chosen, format) = (carrier.prefix.clone(), carrier.chosen.clone(), carrier.format);
                let made = spawn_blocking(move || pack::pack(&path, &prefix, &chosen, format)).await;
                let made = made.map_err(|error| Trouble::Lasting(format!("it could not be packed: {error}")))?;
                let (object, shipped) = made.map_err(unpacked)?;
                packed = Some((segment, object, shipped));
            }
            match &packed {
                Some((_, Some(object), _)) => carrier.sink.put(object, &client, manner.patience).await,
                _ => Ok(()),
            }
        };
        match outcome.await {
            Ok(()) => {
                let shipped = packed.take().map(|(_, _, shipped)| shipped).unwrap_or_default();
                if tries > 0 {
                    info!(job = carrier.name, "log records are exported again");
                }
                tries = 0;
                debug!(job = carrier.name, segment, ?shipped, "a segment of log records is exported");
                confirm(&shared, &carrier, segment, shipped).await;
            }
            Err(trouble) => {
                tries += 1;
                let wait = trouble.wait(tries, manner.first_wait, RequestId::random().low_bits());
                tell(&shared, &carrier, trouble, tries, wait);
                tokio::select! {
                    () = sleep(wait) => {}
                    () = bell.hurry.notified() => {}
                }
            }
        }
    }
}

async fn confirm(shared: &Shared, carrier: &Carrier, segment: u64, shipped: Shipped) {
    let cursor = shared.spool.lock().cursor(carrier.number);
    if let Some(path) = cursor {
        let written = spawn_blocking(move || write_cursor(&path, segment + 1)).await;
        if let Ok(Err(error)) = written {
            // What is shipped is shipped; a disk that is full needs the room of the segment.
            warn!(job = carrier.name, %error, "a crash now would export log records twice: the cursor cannot be written");
        }
    }
    shared.spool.lock().confirm(carrier.number, segment, shipped, Millis::now());
    shared.confirmed.notify_all();
}

fn unpacked(failure: Failure) -> Trouble {
    match failure {
        Failure::Read(error) => Trouble::Passing(format!("the spool cannot be read: {error}"), None),
        Failure::Render(error) => Trouble::Lasting(error.to_string()),
    }
}

fn tell(shared: &Shared, carrier: &Carrier, trouble: Trouble, tries: u32, wait: Duration) {
    let (why, is_held) = match trouble {
        Trouble::Passing(why, _) => (why, false),
        Trouble::Lasting(why) => (why, true),
    };
    let job = &carrier.name;
    if is_held {
        error!(job, why, "log records are held back: their destination refuses them; see to its settings");
    } else if tries == 1 {
        warn!(job, why, ?wait, "log records could not be exported; they are kept and tried again");
    } else {
        debug!(job, why, tries, ?wait, "log records could not be exported");
    }
    shared.spool.lock().give_back(carrier.number, &why, is_held, Millis::now());
}
