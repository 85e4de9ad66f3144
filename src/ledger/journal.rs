//! The threads that keep: one takes what was settled, adds it up and writes it, the other one waits for the disk.
//!
//! ```text
//! queue ─ every 5 ms ─> Kept (the same sums, and the rows) ─> Folder: one write ─ Job ─> one sync ─ Done ─> durable up to n
//! ```
//!
//! Writing never waits for a sync: while a busy disk takes a second for one, what is settled is with the system, and survives
//! the process. There is one job at a time, so a slow disk has more to sync at once, not more syncs.
//!
//! A disk that fails is tried once more at once, in a new segment. If that fails as well, there is a fault: it is logged once,
//! new calls are treated as the settings say, and the disk is tried again until it keeps all that waited. Snapshots are made
//! of this thread's own sums, so no call waits for one.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{error, info};

use crate::ledger::folder::{Done, Folder, Job};
use crate::ledger::kept::Kept;
use crate::ledger::shared::{Shared, Work};
use crate::store::Disk;

/// The first wait before a faulty disk is tried again; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The longest one.
const LAST_WAIT: Duration = Duration::from_secs(2);

pub(super) struct Journal<D: Disk> {
    shared: Arc<Shared>,
    kept: Kept,
    durable: watch::Sender<u64>,
    /// `None`: all is kept in memory only.
    disk: Option<Side<D>>,
    commit_every: Duration,
}

/// The folder, and the thread that runs its jobs.
struct Side<D: Disk> {
    folder: Folder<D>,
    jobs: SyncSender<Job<D>>,
    done: Receiver<Done>,
    /// When the last job began.
    began: Option<Instant>,
    trouble: Option<Trouble>,
}

/// A disk that has failed, and has kept nothing since.
struct Trouble {
    retry_at: Instant,
    wait: Duration,
    /// Whether it failed again when it was tried once more.
    is_fault: bool,
}

impl<D: Disk> Journal<D> {
    /// Works until the ledger is closed.
    ///
    /// # Errors
    /// The system's, when it has no threads left.
    pub(super) fn start(
        shared: Arc<Shared>,
        kept: Kept,
        folder: Option<Folder<D>>,
        durable: watch::Sender<u64>,
        commit_every: Duration,
    ) -> io::Result<()> {
        let mut disk = None;
        if let Some(folder) = folder {
            let ((jobs, inbox), (outbox, done)) = (sync_channel(1), sync_channel(1));
            let shared = shared.clone();
            Builder::new().name("ledger-sync".to_owned()).spawn(move || sync(&shared, &inbox, &outbox))?;
            disk = Some(Side { folder, jobs, done, began: None, trouble: None });
        }
        let journal = Self { shared, kept, durable, disk, commit_every };
        Builder::new().name("ledger".to_owned()).spawn(move || journal.run()).map(drop)
    }

    fn run(mut self) {
        let shared = self.shared.clone();
        // However this ends, nobody waits for it any longer.
        let _end = End(&shared);
        let mut work = Work::default();
        while !work.is_last {
            self.bring();
            let until = self.disk.as_ref().and_then(|disk| disk.next(self.commit_every));
            if !shared.take(&mut work, until, self.commit_every) {
                return;
            }
            self.take(&mut work);
            if let Some(done) = self.disk.as_ref().and_then(|disk| disk.done.try_recv().ok()) {
                self.finish(done);
            }
        }
        self.end();
    }

    fn take(&mut self, work: &mut Work) {
        work.entries.iter().for_each(|entry| self.kept.apply(entry));
        match &mut self.disk {
            Some(disk) => disk.folder.push(&work.entries),
            None => announce(&self.durable, &self.shared, self.kept.seq),
        }
        work.entries.clear();
        for ask in work.asks.drain(..) {
            // Who asked may have left.
            let _ = ask.reply.send(self.kept.rows.find(&ask.filter));
        }
    }

    /// Writes what is there, and has it synced.
    fn bring(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        let now = Instant::now();
        if disk.trouble.as_ref().is_some_and(|trouble| now < trouble.retry_at) {
            return;
        }
        let written = disk.folder.write();
        let outcome = written.and_then(|()| {
            if !disk.folder.is_due() || disk.began.is_some_and(|began| now < began + self.commit_every) {
                return Ok(());
            }
            disk.began = Some(now);
            // There is room for it: there is one at a time. Should the other thread be dead, so is the ledger in a moment.
            disk.folder.job(&self.kept, false).map(|job| drop(disk.jobs.try_send(job)))
        });
        if let Err(error) = outcome {
            disk.fail(&self.shared, &error);
        }
    }

    fn finish(&mut self, done: Done) {
        let Some(disk) = &mut self.disk else { return };
        match disk.folder.finish(done) {
            Ok(seq) => {
                announce(&self.durable, &self.shared, seq);
                if disk.trouble.take().is_some_and(|trouble| trouble.is_fault) {
                    info!("the ledger's disk keeps again, and what waited is on it");
                }
            }
            Err(error) => disk.fail(&self.shared, &error),
        }
    }

    /// Everything on disk, once more if that fails, as a snapshot.
    fn end(mut self) {
        if let Some(disk) = &self.disk
            && disk.folder.is_at_work()
            && let Ok(done) = disk.done.recv()
        {
            self.finish(done);
        }
        for _ in 0..2 {
            let Some(disk) = &mut self.disk else { return };
            match disk.folder.write().and_then(|()| disk.folder.job(&self.kept, true)) {
                Ok(job) => {
                    let done = job.run();
                    self.finish(done);
                }
                Err(error) => disk.fail(&self.shared, &error),
            }
            if *self.durable.borrow() == self.kept.seq {
                return;
            }
        }
        let lost = self.kept.seq - *self.durable.borrow();
        error!(lost, "the ledger ends while its disk is faulty: calls that were settled are not kept");
    }
}

impl<D: Disk> Side<D> {
    /// When there is something to do again, if nothing happens. `None`: when something does.
    fn next(&self, commit_every: Duration) -> Option<Instant> {
        let retry_at = self.trouble.as_ref().map(|trouble| trouble.retry_at);
        if self.folder.is_waiting() {
            return retry_at;
        }
        let due = self.began.map_or_else(Instant::now, |began| began + commit_every);
        self.folder.is_due().then(|| retry_at.map_or(due, |at| at.max(due)))
    }

    fn fail(&mut self, shared: &Shared, error: &io::Error) {
        let trouble =
            self.trouble.get_or_insert(Trouble { retry_at: Instant::now(), wait: Duration::ZERO, is_fault: false });
        if trouble.wait.is_zero() {
            // Once more at once.
            trouble.wait = FIRST_WAIT;
            return;
        }
        if !trouble.is_fault {
            error!(%error, "the ledger's disk is faulty: what is settled waits in memory until it keeps again");
            shared.failed(error);
            trouble.is_fault = true;
        }
        trouble.retry_at = Instant::now() + trouble.wait;
        trouble.wait = (trouble.wait * 2).min(LAST_WAIT);
    }
}

/// Up to this one all is on disk.
fn announce(durable: &watch::Sender<u64>, shared: &Shared, seq: u64) {
    shared.kept(seq);
    if *durable.borrow() < seq {
        durable.send_replace(seq);
    }
}

/// Runs one job after the other.
fn sync<D: Disk>(shared: &Shared, jobs: &Receiver<Job<D>>, done: &SyncSender<Done>) {
    let _end = End(shared);
    for job in jobs {
        if done.send(job.run()).is_err() {
            return;
        }
        shared.hurry();
    }
}

struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended();
    }
}
