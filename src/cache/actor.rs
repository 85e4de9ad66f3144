//! The actor that owns the index, the files and the list of fills.
//!
//! ```text
//!   Lookup ─> in memory? on disk? under way? ─ no ─> a ticket, and others follow it
//!   Whole  ─> a place on disk (the oldest segment goes if there is none) ─> index ─> view
//!   Over, Purged, Alias, Flush, Look                         every few seconds: what is too old goes, what is new is synced
//! ```
//!
//! A handler that panics and a disk that cannot be read cost that lookup its hit; after several of them in a minute the
//! cache turns itself off until the next start. A disk that cannot be written to, which is mostly a full one, is left
//! alone for a minute while memory goes on.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use tracing::{error, info, warn};

use crate::base::{Error, Millis, Result};
use crate::cache::disk::{Disk, bytes_of};
use crate::cache::entry::{Entry, Record};
use crate::cache::fill::{Fill, Found, Told};
use crate::cache::fleet::Shelf;
use crate::cache::index::{Changes, Index, Limits, Place};
use crate::cache::key::{Digest, Key, Scope};
use crate::cache::settings::{Settings, Stats};
use crate::cache::view::Shared;

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

pub(super) struct CacheActor {
    shared: Arc<Shared>,
    limits: Limits,
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
    is_syncing: bool,
    /// What only the actor counts.
    done: Stats,
}

impl Actor for CacheActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(SWEEP, |this, _| {
            this.guarded(|this| this.sweep(Millis::now()));
        });
        ctx.run_interval(SYNC, |this, ctx| {
            this.guarded(|this| this.sync_beside(ctx));
        });
    }
}

impl CacheActor {
    /// Opens the folder and puts what is there into the index.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be made, read or written to.
    pub(super) fn open(settings: Settings) -> Result<Self> {
        let max_entry_bytes = settings.max_entry_bytes.min(MAX_ENTRY_BYTES);
        let limits = Limits { memory_bytes: settings.memory_bytes, entries: settings.max_entries };
        let mut actor = Self {
            shared: Arc::new(Shared::new(
                max_entry_bytes,
                settings.memory_bytes.max(max_entry_bytes),
                settings.fleet.map(Shelf::start),
            )),
            limits,
            index: Index::new(limits),
            disk: None,
            fills: HashMap::new(),
            failed: VecDeque::new(),
            rests_until: Millis(0),
            is_outdated: false,
            is_syncing: false,
            done: Stats::default(),
        };
        let Some(folder) = settings.folder.filter(|_| settings.disk_bytes > 0) else { return Ok(actor) };
        let found = Disk::open(&folder, settings.disk_bytes).map_err(|error| {
            let name = folder.display();
            Error::bad_input(format!("The cache's folder {name}: {error}. Name a folder that the daemon may write to."))
        })?;
        actor.shared.generations.restore(found.generations);
        actor.disk = Some(found.disk);
        actor.replay(found.entries, Millis::now());
        info!(folder = %folder.display(), entries = actor.index.len(), "the cache goes on with what was stored");
        Ok(actor)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Puts what was on disk into the index, and deletes segments in which nothing lives, or that are beyond a limit that
    /// has become smaller.
    fn replay(&mut self, entries: Vec<(Record, Place)>, now: Millis) {
        // Nothing of this is in memory, and dead segments are looked for afterwards.
        let mut changes = Changes::default();
        for (record, place) in entries {
            if record.expires > now && self.shared.generations.are_current(&record.stamps) {
                self.index.insert(record, None, Some(place), record.created, &|_| Millis(0), &mut changes);
            }
        }
        let Some(disk) = &mut self.disk else { return };
        let dead = disk.segments().into_iter().filter(|number| !self.index.lives_in(*number));
        dead.collect::<Vec<_>>().into_iter().for_each(|number| disk.delete(number));
        while let Some(oldest) = self.disk.as_ref().filter(|disk| !disk.has_room(&[], &[])).and_then(Disk::oldest) {
            self.drop_segment(oldest.0);
        }
    }

    fn lookup(&mut self, key: Key, now: Millis, addr: Addr<Self>) -> Found {
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
        let fill = Fill::new(key, addr.recipient(), self.shared.clone(), true, now);
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

    /// Stores an answer that is whole, and tells others of one that is ours.
    fn store(&mut self, fill: &Fill, is_ours: bool, now: Millis) {
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
        if let (true, Some(shelf), Some(common)) = (is_ours, &self.shared.shelf, fill.key.common) {
            shelf.offer(&common.digest, entry, fill.begun);
        }
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
            let Some(rest) = budget.checked_sub(bytes_of(&record, &entry.frame)) else { continue };
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

    /// Syncs on another thread: lookups do not wait for it.
    fn sync_beside(&mut self, ctx: &mut Context<Self>) {
        if self.is_syncing {
            return;
        }
        let files = self.unsynced();
        if files.is_empty() {
            return;
        }
        self.is_syncing = true;
        let synced = tokio::task::spawn_blocking(move || sync_all(&files)).into_actor(self);
        ctx.spawn(synced.map(|outcome, this, _| {
            this.is_syncing = false;
            if let Ok(Err(error)) = outcome {
                this.rest(&error, Millis::now());
            }
        }));
    }

    fn sync(&mut self) {
        if let Err(error) = sync_all(&self.unsynced()) {
            self.rest(&error, Millis::now());
        }
    }

    fn unsynced(&mut self) -> Vec<File> {
        match self.disk.as_mut().map(Disk::unsynced) {
            Some(Ok(files)) => files,
            Some(Err(error)) => {
                self.rest(&error, Millis::now());
                Vec::new()
            }
            None => Vec::new(),
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
            is_disk_on: self.disk.is_some() && self.rests_until <= Millis::now() && !self.shared.is_off(),
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
        if self.shared.is_off() { None } else { self.caught(work) }
    }

    fn caught<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> Option<T> {
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
        if self.failed.len() < MANY_FAILURES || self.shared.is_off() {
            return;
        }
        error!(
            failures = self.failed.len(),
            "the cache has failed several times in a minute and is off until a restart"
        );
        self.shared.is_off.store(true, Ordering::Relaxed);
        self.forget_all();
    }

    fn forget_all(&mut self) {
        self.index = Index::new(self.limits);
        self.fills.clear();
        self.shared.view.clear();
    }
}

fn sync_all(files: &[File]) -> std::io::Result<()> {
    files.iter().try_for_each(File::sync_data)
}

fn used(shared: &Shared, digest: &Digest) -> Millis {
    shared.view.get(digest).map_or(Millis(0), |entry| entry.used())
}

#[derive(Message)]
#[rtype(result = "Found")]
pub(super) struct Lookup {
    pub(super) key: Key,
    pub(super) now: Millis,
}

/// An entry was asked for in other bytes than before.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Alias(pub(super) Key);

#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Purged {
    pub(super) scope: Scope,
    pub(super) generation: u64,
}

#[derive(Message)]
#[rtype(result = "Stats")]
pub(super) struct Look;

#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Flush;

impl Handler<Lookup> for CacheActor {
    type Result = MessageResult<Lookup>;
    fn handle(&mut self, Lookup { key, now }: Lookup, ctx: &mut Context<Self>) -> Self::Result {
        let addr = ctx.address();
        MessageResult(self.guarded(|this| this.lookup(key, now, addr)).unwrap_or(Found::Off))
    }
}

impl Handler<Alias> for CacheActor {
    type Result = ();
    fn handle(&mut self, Alias(key): Alias, _: &mut Context<Self>) {
        self.guarded(|this| this.alias(&key));
    }
}

impl Handler<Told> for CacheActor {
    type Result = ();
    fn handle(&mut self, told: Told, _: &mut Context<Self>) {
        let fill = match told {
            Told::Whole { fill, is_ours } => {
                self.guarded(|this| this.store(&fill, is_ours, Millis::now()));
                fill
            }
            Told::Over(fill) => fill,
        };
        // Only now, so that there is never a moment with neither the fill nor the entry.
        self.unlist(&fill);
    }
}

impl Handler<Purged> for CacheActor {
    type Result = ();
    fn handle(&mut self, Purged { scope, generation }: Purged, _: &mut Context<Self>) {
        // Off or not: after the next start it must have happened.
        self.caught(|this| this.purged(scope, generation));
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
pub(super) struct Occupy(pub(super) Box<dyn FnOnce() + Send>);

#[cfg(test)]
impl Handler<Occupy> for CacheActor {
    type Result = ();
    fn handle(&mut self, Occupy(work): Occupy, _: &mut Context<Self>) {
        self.guarded(|_| work());
    }
}
