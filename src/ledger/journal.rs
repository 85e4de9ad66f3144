//! The thread that keeps: it takes what was settled, adds it up, and brings it to disk in groups.
//!
//! ```text
//! queue ─ every 5 ms ─> Kept (the same sums, and the rows) ─> Folder: one write, one sync ─> durable up to n
//! ```
//!
//! A disk that fails is tried once more at once, in a new segment. If that fails as well, there is a fault: it is logged once,
//! new calls are treated as the settings say, and the disk is tried again until it keeps all that waited. Snapshots are made
//! of this thread's own sums, so no call waits for one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tracing::{error, info};

use crate::base::UtcDay;
use crate::ledger::entry::Entry;
use crate::ledger::folder::{Folder, Kept};
use crate::ledger::handle::Shared;
use crate::ledger::rows::{Filter, Row, Who};
use crate::store::Disk;

/// The first wait before a faulty disk is tried again; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The longest one.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// A question for the rows, answered when all that was settled before it is in them.
pub(super) struct Ask {
    pub(super) filter: Filter,
    pub(super) reply: oneshot::Sender<Vec<(UtcDay, Who, Row)>>,
}

/// What the thread is given to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) entries: Vec<Entry>,
    pub(super) asks: Vec<Ask>,
    pub(super) is_last: bool,
}

pub(super) struct Journal<D: Disk> {
    pub(super) shared: Arc<Shared>,
    pub(super) kept: Kept,
    /// `None`: all is kept in memory only.
    pub(super) folder: Option<Folder<D>>,
    pub(super) durable: watch::Sender<u64>,
    pub(super) commit_every: Duration,
}

impl<D: Disk> Journal<D> {
    /// Works until the ledger is closed.
    pub(super) fn run(mut self) {
        let shared = self.shared.clone();
        // However this ends, nobody waits for it any longer.
        let _end = End(&shared);
        let (mut work, mut fault) = (Work::default(), None::<Fault>);
        if let Err(error) = self.commit() {
            fault = Some(Fault::new(&shared, &error));
        }
        while !work.is_last {
            let retry_at = fault.as_ref().map(|fault| fault.retry_at);
            if !shared.take(&mut work, self.commit_every, retry_at) {
                return;
            }
            self.take(&mut work);
            if fault.as_ref().is_some_and(|fault| Instant::now() < fault.retry_at) && !work.is_last {
                continue;
            }
            match (self.commit(), &mut fault) {
                (Ok(()), _) => {
                    self.durable.send_replace(self.kept.seq);
                    shared.kept(self.kept.seq);
                    if fault.take().is_some() {
                        info!("the ledger's disk keeps again, and all that waited is on it");
                    }
                }
                (Err(error), None) => fault = Some(Fault::new(&shared, &error)),
                (Err(_), Some(fault)) => fault.again(),
            }
        }
        let Some(folder) = &mut self.folder else { return };
        if !folder.is_clean() {
            let lost = self.kept.seq - *self.durable.borrow();
            error!(lost, "the ledger ends while its disk is faulty: calls that were settled are not kept");
        } else if let Err(error) = folder.snapshot(&self.kept) {
            // The segments say the same, only slower.
            info!(%error, "the ledger ends without a snapshot");
        }
    }

    fn take(&mut self, work: &mut Work) {
        work.entries.iter().for_each(|entry| self.kept.apply(entry));
        if let Some(folder) = &mut self.folder {
            folder.push(&work.entries);
        }
        work.entries.clear();
        for ask in work.asks.drain(..) {
            // Who asked may have left.
            let _ = ask.reply.send(self.kept.rows.find(&ask.filter));
        }
    }

    /// Twice: after a failure it is another segment.
    fn commit(&mut self) -> std::io::Result<()> {
        let Some(folder) = &mut self.folder else { return Ok(()) };
        folder.commit(&self.kept).or_else(|_| folder.commit(&self.kept))
    }
}

/// A disk that does not keep.
struct Fault {
    retry_at: Instant,
    wait: Duration,
}

impl Fault {
    fn new(shared: &Shared, error: &std::io::Error) -> Self {
        error!(%error, "the ledger's disk is faulty: what is settled waits in memory until it keeps again");
        shared.failed(error);
        Self { retry_at: Instant::now() + FIRST_WAIT, wait: FIRST_WAIT }
    }

    fn again(&mut self) {
        self.wait = (self.wait * 2).min(LAST_WAIT);
        self.retry_at = Instant::now() + self.wait;
    }
}

struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended();
    }
}
