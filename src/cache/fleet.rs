//! The store through which daemons find each other's answers.
//!
//! ```text
//!   a ticket ─ find ─> GET, within the timeout ─> whole, ours, not too old ─> a hit        anything else is a miss
//!   an answer that was stored ─ offer ─> queue ─ keeper ─> SET for as long as it is kept
//!
//!   up ─ no answer in time, an error ─> down: nobody asks, nothing is sent ─ keeper asks now and then ─> up
//! ```
//!
//! - **No call waits for a store that is known to be gone.** The first that get no answer wait for the timeout, once; then only
//!   the keeper asks, until it is answered.
//! - **A value says which request it answers**, when that was asked, and what its bytes add up to. One that is damaged, of another
//!   version or somebody else's is a miss.
//! - **Emptied is emptied.** Of a scope that was purged, and of a gateway that was changed, only answers are taken whose call
//!   began later, by as much as clocks may differ.
//!
//! Finding and sending have a connection each, so that no lookup waits behind long answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::Arbiter;
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout, timeout_at};
use tracing::{info, warn};

use crate::base::Millis;
use crate::cache::entry::{Cursor, Entry, Record};
use crate::cache::key::Digest;
use crate::metrics::Metrics;
use crate::net::redis::{Address, Store};

/// The layout of values.
const VERSION: u8 = 1;
/// Bytes of a checksum.
const SUM: usize = 16;
/// By how much clocks of a fleet may differ, in milliseconds.
const CLOCKS_OFF_MS: u64 = 1000;
/// Answers that wait to be sent, and their bytes: at most.
const WAITING: usize = 1024;
const WAITING_BYTES: u64 = 64 << 20;
/// Answers that are sent at once.
const AT_ONCE: usize = 4;
/// How often the store is asked whether it is there.
const PULSE: Duration = Duration::from_millis(500);
/// The first wait before a lost store is looked for; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The longest one.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// A store that has been there for so long is looked for soon when it is lost.
const STEADY: Duration = Duration::from_secs(10);

/// With whom answers are shared.
#[derive(Clone)]
pub struct Fleet {
    /// Where the store is. Its timeout is how long a call waits for it.
    pub store: Address,
    /// What the keys of this fleet begin with.
    pub name: String,
    /// A larger answer is not shared.
    pub max_entry_bytes: u64,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What callers hold of it. Dropped, it ends the keeper.
pub(super) struct Shelf {
    line: Arc<Line>,
    queue: mpsc::Sender<Parcel>,
}

/// What callers and the keeper share.
struct Line {
    fleet: Fleet,
    /// `None` while the store does not answer.
    open: watch::Sender<Option<Open>>,
    /// Bytes of answers that wait.
    waiting: AtomicU64,
    /// Whether a value that is none of ours, and one that the store would not take, was told of.
    is_oddness_told: AtomicBool,
    is_refusal_told: AtomicBool,
}

/// A connection for lookups.
#[derive(Clone)]
struct Open {
    /// Which one, so that a late failure of an old one is none of the new one's.
    number: u64,
    store: Store,
}

/// An answer on its way to the store.
struct Parcel {
    digest: Digest,
    entry: Arc<Entry>,
    begun: Millis,
}

impl Shelf {
    /// Begins to look for the store, on a thread of its own.
    pub(super) fn start(fleet: Fleet) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING);
        let line = Arc::new(Line {
            fleet,
            open: watch::Sender::new(None),
            waiting: AtomicU64::new(0),
            is_oddness_told: AtomicBool::new(false),
            is_refusal_told: AtomicBool::new(false),
        });
        let keeper = line.clone();
        let keep = async move {
            keeper.keep(waiting).await;
            Arbiter::current().stop();
        };
        Arbiter::new().spawn(keep);
        Self { line, queue }
    }

    /// Another daemon's answer, begun after `since` and of `limit` bytes at most. Waits for the store's timeout at most, and not
    /// at all while it is gone.
    pub(super) async fn find(&self, digest: &Digest, since: Millis, limit: u64, now: Millis) -> Option<Entry> {
        let line = &*self.line;
        let Open { number, mut store } = line.open.borrow().clone()?;
        let key = line.key(digest);
        let value = match timeout(line.fleet.store.timeout, store.get(&key)).await {
            Ok(Ok(value)) => value.map(|value| decode(digest, value.into(), now)),
            // Somebody else's key.
            Ok(Err(error)) if error.code() == Some("WRONGTYPE") => Some(None),
            Ok(Err(error)) => {
                line.count("failed");
                line.lost(number, &error.to_string());
                return None;
            }
            Err(_) => {
                line.count("failed");
                line.lost(number, "it does not answer in time");
                return None;
            }
        };
        let Some(value) = value else {
            line.count("miss");
            return None;
        };
        let Some((entry, begun)) = value else {
            line.count("failed");
            if !line.is_oddness_told.swap(true, Ordering::Relaxed) {
                warn!(
                    key,
                    "what the fleet's store keeps there is no cached answer, or a damaged one: it counts as none"
                );
            }
            return None;
        };
        // Who was never emptied takes all.
        let is_stale = since.0 > 0 && begun.0 <= since.0.saturating_add(CLOCKS_OFF_MS);
        let size = entry.head().size() + entry.body().len() as u64;
        let is_hit = !is_stale && now < entry.expires() && size <= limit;
        line.count(if is_hit { "hit" } else { "miss" });
        is_hit.then_some(entry)
    }

    /// Has an answer sent to the store, unless it is too large, too many wait, or the store is gone.
    pub(super) fn offer(&self, digest: &Digest, entry: Arc<Entry>, begun: Millis) {
        let (line, size) = (&self.line, entry.frame.len() as u64);
        if size > line.fleet.max_entry_bytes {
            return;
        }
        let parcel = Parcel { digest: *digest, entry, begun };
        let waiting = line.waiting.fetch_add(size, Ordering::Relaxed) + size;
        let is_taken = line.open.borrow().is_some() && waiting <= WAITING_BYTES && self.queue.try_send(parcel).is_ok();
        if !is_taken {
            line.waiting.fetch_sub(size, Ordering::Relaxed);
            line.count("dropped");
        }
    }
}

impl Line {
    async fn keep(&self, mut queue: mpsc::Receiver<Parcel>) {
        let (mut wait, mut number, mut is_told) = (FIRST_WAIT, 0, false);
        loop {
            match self.connect().await {
                Ok((finding, sending)) => {
                    number += 1;
                    info!(fleet = self.fleet.name, "the fleet's store answers: cached answers are shared");
                    self.open.send_replace(Some(Open { number, store: finding.clone() }));
                    let since = Instant::now();
                    if self.serve(number, finding, sending, &mut queue).await.is_none() {
                        return;
                    }
                    if since.elapsed() >= STEADY {
                        wait = FIRST_WAIT;
                    }
                }
                Err(error) if !is_told => {
                    warn!(%error, "the fleet's store does not answer: cached answers are not shared")
                }
                Err(_) => {}
            }
            // A loss was told of when it was noticed.
            is_told = true;
            let until = tokio::time::Instant::now() + wait;
            wait = (wait * 2).min(LAST_WAIT);
            while let Ok(parcel) = timeout_at(until, queue.recv()).await {
                let Some(parcel) = parcel else { return };
                self.taken(&parcel);
                self.count("dropped");
            }
        }
    }

    /// A connection to find with, and one to send with.
    async fn connect(&self) -> Result<(Store, Store), String> {
        let open = || async { self.fleet.store.open().await.map_err(|error| error.to_string()) };
        let (mut finding, sending) = (open().await?, open().await?);
        self.probe(&mut finding).await?;
        Ok((finding, sending))
    }

    /// Whether the store answers lookups.
    async fn probe(&self, store: &mut Store) -> Result<(), String> {
        let key = format!("{}:cache", self.fleet.name);
        match timeout(self.fleet.store.timeout, store.get(&key)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it does not answer in time".to_owned()),
        }
    }

    /// Sends what is offered until the store is lost; `None`: until nobody offers any more.
    async fn serve(
        &self,
        number: u64,
        mut finding: Store,
        sending: Store,
        queue: &mut mpsc::Receiver<Parcel>,
    ) -> Option<()> {
        let (mut open, mut parcels) = (self.open.subscribe(), Vec::with_capacity(AT_ONCE));
        loop {
            tokio::select! {
                taken = queue.recv_many(&mut parcels, AT_ONCE) => {
                    if taken == 0 {
                        return None;
                    }
                    join_all(parcels.drain(..).map(|parcel| self.send(number, sending.clone(), parcel))).await;
                }
                () = async { drop(open.wait_for(Option::is_none).await) } => return Some(()),
                () = sleep(PULSE) => {
                    if let Err(error) = self.probe(&mut finding).await {
                        self.lost(number, &error);
                    }
                }
            }
        }
    }

    async fn send(&self, number: u64, mut store: Store, parcel: Parcel) {
        self.taken(&parcel);
        let Parcel { digest, entry, begun } = parcel;
        let keep = Duration::from_millis(entry.expires().0.saturating_sub(Millis::now().0));
        if keep.is_zero() {
            return;
        }
        let (key, value) = (self.key(&digest), encode(&digest, &entry, begun));
        let why = match timeout(self.fleet.store.timeout, store.set(&key, &value, keep)).await {
            Ok(Ok(())) => return self.count("sent"),
            // It answers, and has no room, or no right is given: lookups go on.
            Ok(Err(error)) if error.code().is_some() => {
                if !self.is_refusal_told.swap(true, Ordering::Relaxed) {
                    warn!(%error, "the fleet's store does not take a cached answer: give it room, and the rights that its user needs");
                }
                return self.count("failed");
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not take an answer in time".to_owned(),
        };
        self.count("failed");
        self.lost(number, &why);
    }

    /// From now on nobody asks, until the keeper has found it again.
    fn lost(&self, number: u64, error: &str) {
        let is_new = self.open.send_if_modified(|open| {
            let is_this = open.as_ref().is_some_and(|open| open.number == number);
            if is_this {
                *open = None;
            }
            is_this
        });
        if is_new {
            warn!(error, "the fleet's store does not answer: cached answers are not shared");
        }
    }

    fn taken(&self, parcel: &Parcel) {
        self.waiting.fetch_sub(parcel.entry.frame.len() as u64, Ordering::Relaxed);
    }

    fn key(&self, digest: &Digest) -> String {
        let mut key = format!("{}:cache:", self.fleet.name);
        digest.0.iter().for_each(|byte| {
            key.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(u32::from(digit), 16).unwrap_or_default()));
        });
        key
    }

    fn count(&self, outcome: &str) {
        self.fleet.metrics.cache_shared.with_label_values(&[outcome]).inc();
    }
}

/// An answer as the store keeps it: version, checksum of what follows, the request, three times, the frame.
fn encode(digest: &Digest, entry: &Entry, begun: Millis) -> Vec<u8> {
    let mut value = Vec::with_capacity(1 + SUM + 56 + entry.frame.len());
    value.push(VERSION);
    value.extend_from_slice(&[0; SUM]);
    value.extend_from_slice(&digest.0);
    for time in [begun, entry.record.created, entry.record.expires] {
        value.extend_from_slice(&time.0.to_le_bytes());
    }
    value.extend_from_slice(&entry.frame);
    let sum = sum(&value[1 + SUM..]);
    value[1..=SUM].copy_from_slice(&sum);
    value
}

/// An answer to this request and when it was begun; nothing if the value is anything else.
fn decode(digest: &Digest, value: Bytes, now: Millis) -> Option<(Entry, Millis)> {
    let mut cursor = Cursor(&value);
    if cursor.array()? != [VERSION] || cursor.array()? != sum(cursor.0) || cursor.array()? != digest.0 {
        return None;
    }
    let [begun, created, expires] = [cursor.u64()?, cursor.u64()?, cursor.u64()?];
    let frame = value.slice_ref(cursor.0);
    // However far the other's clock is off, it is kept no longer than it was meant to be.
    let expires = Millis(expires.min(now.0.saturating_add(expires.saturating_sub(created))));
    let named = Digest(cursor.array()?);
    let record = Record { digest: named, created: Millis(created), expires, stamps: [None; 2] };
    Some((Entry::from_frame(record, frame, now)?, Millis(begun)))
}

fn sum(bytes: &[u8]) -> [u8; SUM] {
    let mut sum = [0; SUM];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..SUM]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::entry::Head;

    #[test]
    fn a_value_is_read_back_for_its_request_only_and_not_with_any_byte_changed() {
        let (own, common) = (Digest([1; 32]), Digest([2; 32]));
        let record = Record { digest: own, created: Millis(1000), expires: Millis(61_000), stamps: [None; 2] };
        let head = Head { status: 200, headers: vec![("content-type".into(), Bytes::from("text/event-stream"))] };
        let chunks = [Bytes::from("data: 1\n\n"), Bytes::from("data: 2\n\n")];
        let entry = Entry::new(record, &head, &chunks, Millis(1000)).unwrap();
        let value = encode(&common, &entry, Millis(900));
        let read = |digest: &Digest, value: &[u8], now| decode(digest, Bytes::copy_from_slice(value), Millis(now));
        let (found, begun) = read(&common, &value, 11_000).unwrap();
        assert_eq!((begun, found.expires(), &**found.head()), (Millis(900), Millis(61_000), &head));
        assert_eq!(Arc::new(found).chunks().collect::<Vec<_>>(), chunks);
        // Of a clock that is behind this one, and of one that is ahead.
        assert_eq!(read(&common, &value, 62_000).unwrap().0.expires(), Millis(61_000));
        assert_eq!(read(&common, &value, 0).unwrap().0.expires(), Millis(60_000));
        assert!(read(&own, &value, 11_000).is_none());
        for at in 0..value.len() {
            let mut damaged = value.clone();
            damaged[at] ^= 0x10;
            assert!(read(&common, &damaged, 11_000).is_none(), "{at}");
            assert!(read(&common, &value[..at], 11_000).is_none(), "{at}");
        }
    }
}
