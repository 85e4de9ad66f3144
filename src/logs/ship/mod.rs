//! Ships log records to where they are kept for good: a bucket, a folder or a collector.
//!
//! ```text
//! append ──> spool: segments on disk ──a task a job──> lines or a table, gzip ──> S3 | folder | HTTP ──> cursor ──> deleted
//!  (never waits for a destination)          '── backoff <──'  outage: they wait, up to the spool's bound
//! ```
//!
//! A record that was appended arrives at least once, in order, whatever is killed: a segment goes when every job has confirmed it, and
//! one that was on its way when the process died is shipped again under the same name. What is written is on disk a second later;
//! an end of the process loses nothing of it, an end of the machine that second. Each job has gateways, a pace and a cursor of its own.
//!
//! Records come redacted. Which gateways export at all, and under which key, the caller knows: here it comes with the record.

mod carry;
mod envelope;
mod json;
mod line;
mod pack;
mod parquet;
mod sink;
mod spool;
mod status;
mod table;
mod thrift;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use self::carry::{Bell, Carrier, Manner, Shared};
pub use self::envelope::PublicKey;
pub use self::pack::{Chosen, Format};
pub use self::sink::Destination;
use self::sink::Sink;
pub use self::spool::AtBound;
use self::spool::{Bounds, Spool};
pub use self::status::{JobStatus, Status};
use crate::base::{Error, Millis, Result};
use crate::logs::post;
use crate::logs::record::Record;
use crate::net::client;

/// Jobs at most.
pub const MAX_JOBS: usize = 4;
/// Bytes of records that are written at once.
const BLOCK: usize = 256 << 10;
/// Segments that the spool has room for at least: one being filled, one on its way for each job, and some to choose from.
const MIN_SEGMENTS: u64 = 8;

/// What is shipped where.
#[derive(Clone, Debug)]
pub struct Job {
    /// Names it in the status, the log and the spool: lower-case letters, digits, `-` and `_`.
    pub name: String,
    /// Gateways whose records it ships. None: all.
    pub gateways: Vec<Chosen>,
    /// What its objects' names begin with, such as `prod/logs`; may be empty.
    pub prefix: String,
    /// What its objects are. A server gets lines.
    pub format: Format,
    /// Where to.
    pub destination: Destination,
}

/// How records are shipped.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where records wait; for this process alone. About 1 KB a record and what is exported of its bodies.
    pub folder: PathBuf,
    /// At most [`MAX_JOBS`].
    pub jobs: Vec<Job>,
    /// Bytes of a segment, which becomes one object of about a quarter of that. Default: 16 MiB; at most an eighth of `max_bytes`.
    pub segment_bytes: u64,
    /// A segment is shipped when it is so old, full or not. Default: 60 s.
    pub segment_age: Duration,
    /// Bytes of the spool. Default: 1 GiB.
    pub max_bytes: u64,
    /// What happens when it has as many. Default: the oldest records go.
    pub at_bound: AtBound,
    /// The wait after a first failure; doubled up to 60 of it, 300 where a destination refuses for good. Default: 1 s.
    pub first_wait: Duration,
    /// How long an object may take to arrive. Default: 2 minutes.
    pub patience: Duration,
    /// How servers are reached. `allow_private` must be set for those of one's own network.
    pub client: client::Settings,
}

impl Settings {
    /// The defaults.
    pub fn new(folder: PathBuf, jobs: Vec<Job>, client: client::Settings) -> Self {
        Self {
            folder,
            jobs,
            segment_bytes: 16 << 20,
            segment_age: Duration::from_secs(60),
            max_bytes: 1 << 30,
            at_bound: AtBound::default(),
            first_wait: Duration::from_secs(1),
            patience: Duration::from_secs(120),
            client,
        }
    }
}

/// A record to be shipped.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// One without an id is not shipped.
    pub record: &'a Record,
    /// Its gateway's key: metadata and bodies leave sealed for it. `None`: they leave as they are.
    pub key: Option<&'a PublicKey>,
}

/// See the top of this file. Dropped, it stops at once; what was not shipped is shipped by the next one.
pub struct Ship {
    shared: Arc<Shared>,
    chosen: Vec<Arc<[Chosen]>>,
    block: Mutex<Vec<u8>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ship {
    /// Opens the spool and goes on where the last one stopped, on a thread of its own.
    ///
    /// # Errors
    /// `BadInput` when a setting cannot be used, the folder cannot be written, or another process has it.
    pub fn start(settings: Settings) -> Result<Self> {
        check(&settings)?;
        let Settings { folder, jobs, segment_bytes, segment_age, max_bytes, at_bound, first_wait, patience, client } =
            settings;
        let segment_age_ms = u64::try_from(segment_age.as_millis()).unwrap_or(u64::MAX);
        let bounds = Bounds { segment_bytes, segment_age_ms, max_bytes, at_bound };
        let names: Vec<&str> = jobs.iter().map(|job| job.name.as_str()).collect();
        let spool = Spool::open(&folder, bounds, &names)?;
        let carriers = jobs.into_iter().enumerate().map(|(number, job)| {
            let Job { name, gateways, prefix, format, destination } = job;
            let sink = Sink::new(destination).map_err(|error| error.context(format!("export job {name}")))?;
            Ok(Carrier { number, name, prefix, chosen: gateways.into(), format, sink })
        });
        let carriers: Vec<Carrier> = carriers.collect::<Result<_>>()?;
        let chosen = carriers.iter().map(|carrier| carrier.chosen.clone()).collect();
        let bells = carriers.iter().map(|_| Bell::default()).collect();
        let shared = Arc::new(Shared { spool: Mutex::new(spool), confirmed: Condvar::new(), bells });
        let failed =
            |error| Error::internal("the thread that exports log records cannot be started").with_source(error);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("ship-disk")
            .on_thread_start(post::step_back)
            .max_blocking_threads(2 * carriers.len() + 1)
            .build()
            .map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let manner = Manner { client, patience, first_wait, tick: segment_age / 4 };
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("ship".into())
            .spawn(move || carry::run(runtime, theirs, carriers, manner, stopped))
            .map_err(failed)?;
        Ok(Self { shared, chosen, block: Mutex::default(), stop: Some(stop), thread: Some(thread) })
    }

    /// Takes records, in order. Waits for the disk's cache and for no destination; what the spool has no room for is counted
    /// and gone, as [`AtBound`] says. For one writer; others would wait for it.
    pub fn append<'a>(&self, records: impl IntoIterator<Item = Outgoing<'a>>, now: Millis) {
        let mut block = self.block.lock();
        let mut count = 0;
        for Outgoing { record, key } in records {
            let Some(id) = record.id else { continue };
            let (account, gateway) = (record.account.as_str().as_bytes(), record.gateway.as_bytes());
            if !self.chosen.iter().any(|chosen| pack::is_chosen(chosen, account, gateway)) {
                continue;
            }
            line::encode(record, id, key, &mut block);
            count += 1;
            if block.len() >= BLOCK {
                self.write(&mut count, &mut block, now);
            }
        }
        if count > 0 {
            self.write(&mut count, &mut block, now);
        }
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        self.shared.spool.lock().status()
    }

    /// Ships what was appended before, without waiting for a segment to fill or a pause to end. Returns whether all of it arrived within
    /// `patience`; what did not is shipped later, or by the next start. Blocks.
    pub fn flush(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut spool = self.shared.spool.lock();
        spool.seal();
        let Some(last) = spool.last() else { return true };
        self.shared.ring();
        self.shared.bells.iter().for_each(|bell| bell.hurry.notify_one());
        while !spool.is_shipped(last) {
            if self.shared.confirmed.wait_until(&mut spool, until).timed_out() {
                return spool.is_shipped(last);
            }
        }
        true
    }

    fn write(&self, count: &mut u64, block: &mut Vec<u8>, now: Millis) {
        let is_sealed = self.shared.spool.lock().append(*count, block, now);
        (*count, _) = (0, block.clear());
        if is_sealed {
            self.shared.ring();
        }
    }
}

impl Drop for Ship {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has told what went wrong, if something did.
            let _ = thread.join();
        }
    }
}

fn check(settings: &Settings) -> Result<()> {
    if settings.jobs.len() > MAX_JOBS {
        return Err(Error::bad_input(format!("{} export jobs are too many: {MAX_JOBS} at most", settings.jobs.len())));
    }
    if settings.segment_bytes == 0 || settings.segment_bytes > settings.max_bytes / MIN_SEGMENTS {
        let least = settings.segment_bytes.max(1).saturating_mul(MIN_SEGMENTS);
        return Err(Error::bad_input(format!(
            "a spool of {} bytes is too small for segments of {}: give it {least}, or make them smaller",
            settings.max_bytes, settings.segment_bytes
        )));
    }
    for (at, job) in settings.jobs.iter().enumerate() {
        let is_letter = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
        if !(1..=64).contains(&job.name.len()) || !job.name.bytes().all(is_letter) {
            return Err(Error::bad_input(format!(
                "export job {:?}: name it with 1 to 64 of a-z, 0-9, - and _",
                job.name
            )));
        }
        if settings.jobs[..at].iter().any(|other| other.name == job.name) {
            return Err(Error::bad_input(format!("two export jobs are named {:?}: rename one", job.name)));
        }
        if !sink::is_prefix(&job.prefix) {
            return Err(Error::bad_input(format!(
                "export job {}: the prefix {:?} cannot begin names; write it like logs/prod, or leave it out",
                job.name, job.prefix
            )));
        }
        if job.format == Format::Parquet && matches!(job.destination, Destination::Http { .. }) {
            return Err(Error::bad_input(format!(
                "export job {}: Parquet goes to a bucket or a folder; a server gets lines of JSON",
                job.name
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "ship_test.rs"]
mod tests;
