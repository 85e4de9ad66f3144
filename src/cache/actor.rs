//! The actor that owns the index, the files and the list of fills, and the handle that callers hold.
//!
//! ```text
//!   Cache ── peek ──────────> Shared.view                      no actor, no await
//!     ├───── lookup ─ view? ─ CacheActor: memory, disk, a fill to follow, a ticket
//!     └───── purge ─> Shared.generations, and the actor notes it on disk
//! ```
//!
//! Nothing here fails a request. A handler that panics, a disk that cannot be read: that lookup is answered with
//! [`Found::Off`] or as a miss, and after several in a minute the cache turns itself off until the next start. A disk that
//! cannot be written to, which is mostly a full one, is left alone for a minute while memory goes on.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use tracing::{error, info, warn};

use crate::base::{Error, Millis, Result};
use crate::cache::disk::Disk;
use crate::cache::entry::{Entry, Record};
use crate::cache::fill::{Fill, FillTicket, Follower, Home};
use crate::cache::index::{Changes, Index, Limits, Place};
use crate::cache::key::{Digest, Key, RawKey, Scope};
use crate::cache::view::Shared;

/// Messages waiting at most; callers wait in line behind it.
const MAILBOX: usize = 1024;
/// A lookup that takes longer is given up: the disk hangs, and upstream is quicker.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often old entries are looked for.
const SWEEP: Duration = Duration::from_secs(10);
/// How often what was written is synced: a crash of the machine loses at most the entries since.
const SYNC: Duration = Duration::from_secs(5);
/// So many failures within the time turn the cache off.
const MANY_FAILURES: usize = 5;
const FAILURES_WITHIN: u64 = 60_000;
/// How long a disk that cannot be written to is left alone, in milliseconds.
const REST: u64 = 60_000;
/// No entry is larger, whatever the settings say: it is one frame of a segment.
const MAX_ENTRY_BYTES: u64 = 512 << 20;

/// What the cache may take.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Memory for whole answers. Answers under way may take as much again before new ones are not stored any more.
    pub memory_bytes: u64,
    /// Disk for whole answers; 0 keeps them in memory only.
    pub disk_bytes: u64,
    /// Entries at most, in memory and on disk together.
    pub max_entries: usize,
    /// A larger answer is not stored.
    pub max_entry_bytes: u64,
    /// Where the disk tier is. `None` keeps answers in memory only.
    pub folder: Option<PathBuf>,
}

/// How the cache is, and what it has done since its start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// It has turned itself off after several failures, or its thread is gone.
    pub is_off: bool,
    /// There is a disk tier, and it is written to.
    pub is_disk_on: bool,
    /// Entries there are.
    pub entries: u64,
    /// Those of them that are in memory.
    pub entries_in_memory: u64,
    /// Bytes of entries in memory.
    pub memory_bytes: u64,
    /// Bytes of all segments.
    pub disk_bytes: u64,
    /// Tickets that are neither finished nor failed nor dropped.
    pub fills_open: u64,
    /// Bytes of answers that are under way or still being read by followers.
    pub filling_bytes: u64,
    /// Followers there are.
    pub followers: u64,
    /// Lookups and peeks that were answered.
    pub hits: u64,
    /// Lookups that got a ticket, refreshes included.
    pub misses: u64,
    /// Lookups that got a follower.
    pub coalesced: u64,
    /// Answers that were stored.
    pub stores: u64,
    /// Entries that made room in memory, or altogether.
    pub evictions: u64,
    /// Entries that became too old.
    pub expired: u64,
    /// Failures of the disk and of handlers.
    pub failures: u64,
}

/// What a lookup finds.
pub enum Found {
    /// The answer.
    Hit(Arc<Entry>),
    /// Nothing: go upstream. Others of the same key wait for what becomes of the ticket.
    Fill(FillTicket),
    /// Somebody is upstream for the same already.
    Follow(Follower),
    /// The cache is in trouble: go upstream without it.
    Off,
}

/// The cache's whole outside.
#[derive(Clone)]
pub struct Cache {
    home: Home,
}

impl Cache {
    /// Opens the folder and serves what is there, on a thread of its own.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be made, read or written to.
    pub fn start(settings: Settings) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut index = Index::new(Limits { memory_bytes: settings.memory_bytes, entries: settings.max_entries });
        let mut disk = None;
        if let Some(folder) = settings.folder.filter(|_| settings.disk_bytes > 0) {
            let found = Disk::open(&folder, settings.disk_bytes).map_err(|error| {
                let name = folder.display();
                Error::bad_input(format!(
                    "The cache's folder {name}: {error}. Name a folder that the daemon may write to."
                ))
            })?;
            shared.generations.restore(found.generations);
            disk = Some(found.disk);
            replay(&shared, &mut index, found.entries, Millis::now());
            info!(folder = %folder.display(), entries = index.len(), "the cache goes on with what was stored");
        }
        let max_entry_bytes = settings.max_entry_bytes.min(MAX_ENTRY_BYTES);
        let max_filling_bytes = settings.memory_bytes.max(max_entry_bytes);
        let mut actor = CacheActor {
            shared: shared.clone(),
            limits: Limits { memory_bytes: settings.memory_bytes, entries: settings.max_entries },
            max_entry_bytes,
            max_filling_bytes,
            index,
            disk,
            fills: HashMap::new(),
            failed: VecDeque::new(),
            rests_until: Millis(0),
            is_outdated: false,
            done: Stats::default(),
        };
        actor.tidy();
        let arbiter = Arbiter::new();
        let addr = CacheActor::start_in_arbiter(&arbiter.handle(), |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            actor
        });
        Ok(Self { home: Home { addr, shared, max_entry_bytes, max_filling_bytes } })
    }

    /// The answer in memory to exactly these bytes. Neither waits nor allocates; `None` says nothing about the disk, nor
    /// about the same request written differently: ask [`Cache::lookup`].
    pub fn peek(&self, raw: &RawKey, now: Millis) -> Option<Arc<Entry>> {
        self.home.shared.hit(&raw.0, now)
    }

    /// The answer, from memory or disk, or what is to be done for one. Never fails a request and never takes long.
    pub async fn lookup(&self, key: Key, now: Millis) -> Found {
        let Home { addr, shared, .. } = &self.home;
        if shared.is_off() {
            return Found::Off;
        }
        if let Some(entry) = shared.hit(&key.digest, now) {
            if key.raw != key.digest && shared.view.get(&key.raw).is_none() {
                // Lost when the actor is busy: the next one asks again.
                let _ = addr.try_send(Alias(key));
            }
            return Found::Hit(entry);
        }
        match tokio::time::timeout(PATIENCE, addr.send(Lookup { key, now })).await {
            Ok(Ok(Found::Fill(ticket))) => Found::Fill(ticket.accept()),
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => Found::Off,
        }
    }

    /// A ticket without a look, for callers who want a fresh answer. It replaces the entry once it is whole. Nobody else
    /// follows it, and others of the same key are answered from the old entry meanwhile.
    pub fn refresh(&self, key: Key) -> FillTicket {
        self.home.shared.counters.misses.fetch_add(1, Ordering::Relaxed);
        Fill::new(key, self.home.clone(), false).ticket().accept()
    }

    /// Nothing of this scope that was stored or begun before is served from now on. It counts at once, and after a start
    /// as well once [`Cache::flush`] has returned.
    pub fn purge(&self, scope: Scope) {
        let generation = self.home.shared.generations.raise(scope);
        self.home.addr.do_send(Purged { scope, generation });
    }

    /// How it is.
    pub async fn stats(&self) -> Stats {
        self.home.addr.send(Look).await.unwrap_or(Stats { is_off: true, ..Stats::default() })
    }

    /// Waits until all that was stored and purged so far is on disk.
    pub async fn flush(&self) {
        // An actor that is gone has nothing to write.
        let _ = self.home.addr.send(Flush).await;
    }
}

/// Puts what was on disk into the index.
fn replay(shared: &Shared, index: &mut Index, entries: Vec<(Record, Place)>, now: Millis) {
    // Nothing of this is in memory, and segments without entries are looked for afterwards.
    let mut changes = Changes::default();
    for (record, place) in entries {
        if record.expires > now && shared.generations.are_current(&record.stamps) {
            index.insert(record, None, Some(place), record.created, &|_| Millis(0), &mut changes);
        }
    }
}

pub(super) struct CacheActor {
    shared: Arc<Shared>,
    limits: Limits,
    max_entry_bytes: u64,
    max_filling_bytes: u64,
    index: Index,
    disk: Option<Disk>,
    /// Answers under way that others may join.
    fills: HashMap<Digest, Arc<Fill>>,
    /// When there were failures lately.
    failed: VecDeque<Millis>,
    /// The disk is not written to before.
    rests_until: Millis,
    /// Whether there was a purge since the last sweep.
    is_outdated: bool,
    /// What only the actor counts.
    done: Stats,
}

impl Actor for CacheActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(SWEEP, |this, _| drop(this.guarded(|this| this.sweep(Millis::now()))));
        ctx.run_interval(SYNC, |this, _| drop(this.guarded(Self::sync)));
    }
}

impl CacheActor {
    fn lookup(&mut self, key: Key, now: Millis, home: Home) -> Found {
        if let Some(entry) = self.shared.hit(&key.digest, now).or_else(|| self.load(&key, now)) {
            self.alias(&key);
            return Found::Hit(entry);
        }
        let counters = &self.shared.counters;
        let fill = self.fills.get(&key.digest).filter(|fill| self.shared.generations.are_current(&fill.stamps));
        if let Some(follower) = fill.and_then(Fill::join) {
            counters.coalesced.fetch_add(1, Ordering::Relaxed);
            return Found::Follow(follower);
        }
        counters.misses.fetch_add(1, Ordering::Relaxed);
        let fill = Fill::new(key, home, true);
        let ticket = fill.ticket();
        self.fills.insert(key.digest, fill);
        Found::Fill(ticket)
    }

    /// Brings an entry from disk.
    fn load(&mut self, key: &Key, now: Millis) -> Option<Arc<Entry>> {
        let (digest, mut changes) = (&key.digest, Changes::default());
        self.index.expire(digest, now, &mut changes);
        self.apply(changes);
        let (record, place) = self.index.find(digest)?;
        let is_current = self.shared.generations.are_current(&record.stamps);
        let frame = if is_current { self.read(place?, now) } else { None };
        let mut changes = Changes::default();
        let entry = frame.and_then(|frame| Entry::from_frame(record, frame.into(), now));
        let Some(entry) = entry.map(Arc::new) else {
            self.index.remove(digest, &mut changes);
            self.apply(changes);
            return None;
        };
        let shared = &self.shared;
        self.index.load(digest, entry.memory(), now, &|digest| used(shared, digest), &mut changes);
        self.apply(changes);
        self.show(&entry);
        self.done.hits += 1;
        Some(entry)
    }

    fn read(&mut self, place: Place, now: Millis) -> Option<Vec<u8>> {
        match self.disk.as_ref()?.read(place) {
            Ok(frame) => frame,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Somebody has emptied the folder.
                self.drop_segment(place.segment);
                None
            }
            Err(error) => {
                warn!(segment = place.segment, %error, "the cache cannot read what it has stored");
                self.failed(now);
                None
            }
        }
    }

    /// Stores an answer that is whole.
    fn store(&mut self, fill: &Fill, now: Millis) {
        let Some((head, chunks, keep)) = fill.whole() else { return };
        if !self.shared.generations.are_current(&fill.stamps) {
            return;
        }
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let (digest, expires) = (fill.key.digest, Millis(now.0.saturating_add(keep)));
        let record = Record { digest, created: now, expires, stamps: fill.stamps };
        let Some(entry) = Entry::new(record, &head, &chunks, now).map(Arc::new) else { return };
        let place = self.write(&entry, now);
        let (shared, mut changes) = (&self.shared, Changes::default());
        let memory = Some(entry.memory());
        self.index.insert(record, memory, place, now, &|digest| used(shared, digest), &mut changes);
        self.apply(changes);
        self.show(&entry);
        self.alias(&fill.key);
        self.done.stores += 1;
    }

    /// Finds a place on disk.
    fn write(&mut self, entry: &Entry, now: Millis) -> Option<Place> {
        let record = entry.record.encode(entry.frame.len());
        if now < self.rests_until || !self.disk.as_ref()?.fits(&record, &entry.frame) {
            return None;
        }
        while !self.disk.as_ref()?.has_room(&record, &entry.frame) {
            self.make_room(now)?;
        }
        let written = self.disk.as_mut()?.append(&record, &entry.frame);
        written.map_err(|error| self.rest(&error, now)).ok()
    }

    /// Drops the oldest segment and writes anew what of it is still asked for, half of its bytes at most.
    fn make_room(&mut self, now: Millis) -> Option<()> {
        let (oldest, bytes) = self.disk.as_ref()?.oldest()?;
        let mut budget = bytes / 2;
        for digest in self.drop_segment(oldest) {
            let Some(entry) = self.shared.view.get(&digest) else { continue };
            let record = entry.record.encode(entry.frame.len());
            let needed = record.len() as u64 + entry.frame.len() as u64 + 16;
            let Some(rest) = budget.checked_sub(needed) else { continue };
            budget = rest;
            match self.disk.as_mut()?.append(&record, &entry.frame) {
                Ok(place) => self.index.rewritten(&digest, place, now),
                Err(error) => {
                    self.rest(&error, now);
                    return None;
                }
            }
        }
        Some(())
    }

    fn drop_segment(&mut self, number: u32) -> Vec<Digest> {
        let (shared, mut changes) = (&self.shared, Changes::default());
        let hot = self.index.drop_segment(number, &|digest| used(shared, digest), &mut changes);
        self.apply(changes);
        hot
    }

    /// Leaves the disk alone for a while.
    fn rest(&mut self, error: &std::io::Error, now: Millis) {
        warn!(%error, "the cache cannot write to its folder and keeps answers in memory only for a minute");
        self.rests_until = Millis(now.0 + REST);
    }

    fn purged(&mut self, scope: Scope, generation: u64) {
        self.is_outdated = true;
        let Some(disk) = &mut self.disk else { return };
        if let Err(error) = disk.purge(scope, generation) {
            // Nobody would know of the purge after a start, so nothing may be left of what was purged.
            warn!(%error, "the cache cannot note a purge and gives up what it has on disk");
            disk.segments().into_iter().for_each(|number| drop(self.drop_segment(number)));
        }
    }

    fn sweep(&mut self, now: Millis) {
        let mut changes = Changes::default();
        self.index.sweep(now, &mut changes);
        if std::mem::take(&mut self.is_outdated) {
            self.index.retain(|stamps| self.shared.generations.are_current(stamps), &mut changes);
        }
        self.apply(changes);
    }

    fn sync(&mut self) {
        if let Some(Err(error)) = self.disk.as_mut().map(Disk::sync) {
            self.rest(&error, Millis::now());
        }
    }

    /// After a start: segments in which nothing lives, and those beyond a limit that has become smaller.
    fn tidy(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        let empty = disk.segments().into_iter().filter(|number| !self.index.lives_in(*number));
        empty.collect::<Vec<_>>().into_iter().for_each(|number| disk.delete(number));
        while let Some(oldest) = self.disk.as_ref().filter(|disk| !disk.has_room(&[], &[])).and_then(Disk::oldest) {
            self.drop_segment(oldest.0);
        }
    }

    /// Lets an entry be read by all, if the index has it in memory.
    fn show(&self, entry: &Arc<Entry>) {
        if self.index.is_in_memory(&entry.record.digest) {
            self.shared.view.insert(entry.record.digest, entry.clone());
        }
    }

    /// Lets an entry in memory be found under the exact bytes that asked for it.
    fn alias(&mut self, key: &Key) {
        let mut changes = Changes::default();
        if self.index.alias(&key.digest, key.raw, &mut changes)
            && let Some(entry) = self.shared.view.get(&key.digest)
        {
            self.shared.view.insert(key.raw, entry);
        }
        self.apply(changes);
    }

    fn apply(&mut self, changes: Changes) {
        changes.forget.iter().for_each(|digest| self.shared.view.remove(digest));
        if let Some(disk) = &mut self.disk {
            changes.delete.into_iter().for_each(|number| disk.delete(number));
        }
        self.done.evictions += changes.evicted;
        self.done.expired += changes.expired;
    }

    /// Takes a fill off the list, unless another has taken its place.
    fn unlist(&mut self, fill: &Arc<Fill>) {
        if self.fills.get(&fill.key.digest).is_some_and(|listed| Arc::ptr_eq(listed, fill)) {
            self.fills.remove(&fill.key.digest);
        }
    }

    fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        Stats {
            is_off: self.shared.is_off(),
            is_disk_on: self.disk.is_some() && self.rests_until <= Millis::now(),
            entries: self.index.len() as u64,
            entries_in_memory: self.index.in_memory() as u64,
            memory_bytes: self.index.memory_bytes(),
            disk_bytes: self.disk.as_ref().map_or(0, Disk::bytes),
            fills_open: counters.fills.load(Ordering::Relaxed),
            filling_bytes: counters.filling.load(Ordering::Relaxed),
            followers: counters.followers.load(Ordering::Relaxed),
            hits: self.shared.view.hits() + self.done.hits,
            misses: counters.misses.load(Ordering::Relaxed),
            coalesced: counters.coalesced.load(Ordering::Relaxed),
            ..self.done
        }
    }

    /// Does the work of a handler, unless the cache is off. A panic costs that message and what is in memory and known of
    /// the disk: which part of it is still right cannot be told.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.shared.is_off() {
            return None;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| work(self)));
        if outcome.is_err() {
            self.forget_all();
            self.failed(Millis::now());
        }
        outcome.ok()
    }

    fn failed(&mut self, now: Millis) {
        self.done.failures += 1;
        self.failed.push_back(now);
        self.failed.retain(|at| now.0.saturating_sub(at.0) < FAILURES_WITHIN);
        if self.failed.len() < MANY_FAILURES {
            return;
        }
        error!(
            failures = self.failed.len(),
            "the cache has failed several times in a minute and is off until a restart"
        );
        self.shared.is_off.store(true, Ordering::Relaxed);
        self.forget_all();
        self.disk = None;
    }

    fn forget_all(&mut self) {
        self.index = Index::new(self.limits);
        self.fills.clear();
        self.shared.view.clear();
    }
}

fn used(shared: &Shared, digest: &Digest) -> Millis {
    shared.view.get(digest).map_or(Millis(0), |entry| entry.used())
}

#[derive(Message)]
#[rtype(result = "Found")]
struct Lookup {
    key: Key,
    now: Millis,
}

/// An entry was asked for in other bytes than before.
#[derive(Message)]
#[rtype(result = "()")]
struct Alias(Key);

/// An answer is whole and may be stored.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Store(pub(super) Arc<Fill>);

/// Nobody may join any more.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Over(pub(super) Arc<Fill>);

#[derive(Message)]
#[rtype(result = "()")]
struct Purged {
    scope: Scope,
    generation: u64,
}

#[derive(Message)]
#[rtype(result = "Stats")]
struct Look;

#[derive(Message)]
#[rtype(result = "()")]
struct Flush;

impl Handler<Lookup> for CacheActor {
    type Result = MessageResult<Lookup>;
    fn handle(&mut self, Lookup { key, now }: Lookup, ctx: &mut Context<Self>) -> Self::Result {
        let home = Home {
            addr: ctx.address(),
            shared: self.shared.clone(),
            max_entry_bytes: self.max_entry_bytes,
            max_filling_bytes: self.max_filling_bytes,
        };
        MessageResult(self.guarded(|this| this.lookup(key, now, home)).unwrap_or(Found::Off))
    }
}

impl Handler<Alias> for CacheActor {
    type Result = ();
    fn handle(&mut self, Alias(key): Alias, _: &mut Context<Self>) {
        self.guarded(|this| this.alias(&key));
    }
}

impl Handler<Store> for CacheActor {
    type Result = ();
    fn handle(&mut self, Store(fill): Store, _: &mut Context<Self>) {
        self.guarded(|this| this.store(&fill, Millis::now()));
        // Only now, so that there is never a moment with neither the fill nor the entry.
        self.unlist(&fill);
    }
}

impl Handler<Over> for CacheActor {
    type Result = ();
    fn handle(&mut self, Over(fill): Over, _: &mut Context<Self>) {
        self.unlist(&fill);
    }
}

impl Handler<Purged> for CacheActor {
    type Result = ();
    fn handle(&mut self, Purged { scope, generation }: Purged, _: &mut Context<Self>) {
        self.guarded(|this| this.purged(scope, generation));
    }
}

impl Handler<Look> for CacheActor {
    type Result = MessageResult<Look>;
    fn handle(&mut self, _: Look, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.stats())
    }
}

impl Handler<Flush> for CacheActor {
    type Result = ();
    fn handle(&mut self, _: Flush, _: &mut Context<Self>) {
        self.guarded(Self::sync);
    }
}

/// Whatever a test wants done in a handler.
#[cfg(test)]
#[derive(Message)]
#[rtype(result = "()")]
struct Occupy(Box<dyn FnOnce() + Send>);

#[cfg(test)]
impl Handler<Occupy> for CacheActor {
    type Result = ();
    fn handle(&mut self, Occupy(work): Occupy, _: &mut Context<Self>) {
        self.guarded(|_| work());
    }
}

#[cfg(test)]
impl Cache {
    /// Keeps the actor busy.
    pub(super) fn occupy(&self, work: impl FnOnce() + Send + 'static) {
        self.home.addr.do_send(Occupy(Box::new(work)));
    }
}
