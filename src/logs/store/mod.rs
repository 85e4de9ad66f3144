//! The log on disk: millions of records, listed, filtered, marked and forgotten.
//!
//! ```text
//!   append ─> blocks ─> N.0.log ──sync, 50 ms──> on disk            the segment that is being written, with its index in memory
//!                          │ 64 Ki records, 256 MiB or a day
//!                          └─ keeper ─> N.0.columns (+ N.0.marks)   full segments: an index a column wide, bodies stay in the log
//!   list ──────> columns ──> places ──> heads                       a page reads the columns that it asks about, then 50 heads
//!   patch, delete ──> marks                                         a byte a row; metadata: the record is written again
//! ```
//!
//! Why not a database: SQLite (3.40, the same columns, one million rows, one core) takes 4.3 us a row without indexes and 0.4 to 0.9 s to count
//! and page one filter, so 5 to 9 s for ten million; with six indexes 35 us a row, and still seconds where a filter has no index. Here a row
//! is written once, bodies packed, and a filter over ten million rows reads the ten to eighty megabytes of its column.
//!
//! Ten million records of one gateway, one of two cores (`benches/logs.rs -- ten-million`): 3.0 GB, opened in 20 ms, about 5 us of processor to
//! append one. A page of 50 with its count: 1 ms without filters, 15 to 65 ms with filters that match many, few or none and by another column,
//! 50 to 105 ms with four of them or with a part of a text; least and most of all 140 to 170 ms; a part of an id 360 ms; a search of bodies 1 to 2 s, all its
//! budget of 1 GiB. Memory: 45 to 75 MB.
//!
//! - **Durable** when the next group commit has ended, within `commit` and the time the disk takes. What a crash tears is cut off; columns
//!   are made again from the log wherever they are missing or damaged.
//! - **Deleted** rows are marked, and gone from every answer at once. Their bytes go when half of their segment is dead and it is written
//!   anew, or with the segment.
//! - **Bounds**: records of each gateway, age, and bytes of all; whole segments go, the oldest first. The bounds are looked at once a second,
//!   so a gateway may have a second's records too many. An append waits only while two segments are full and none is sealed yet.
//!
//! Methods block: from async code they are called on blocking threads.

mod block;
mod change;
mod columns;
#[cfg(test)]
#[path = "crash_test.rs"]
mod crash;
mod digits;
mod filter;
mod image;
mod keep;
mod memory;
mod open;
mod read;
mod row;
mod scan;
mod search;
mod settings;
mod source;
mod sums;
#[cfg(test)]
pub(in crate::logs) mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use crate::base::{AccountId, Error, LogId, Lookup, Result};
use crate::logs::query::Query;
use crate::logs::record::{Body, Record, Text};
use crate::store::{Segment, sync_names};
use block::Plane;
use columns::Sealed;
use memory::Memory;
use read::{read, read_one, sources};
use source::{Chunk, Source, broken};

pub(in crate::logs) use memory::{dlp_action, model_type};
pub use row::Stored;
pub use scan::{Measure, MetaInfo};
pub use settings::{Keep, Settings, Strategy};
pub use sums::Sums;

/// Records of a segment.
const ROWS: usize = 64 << 10;
/// A record with longer bodies is not stored.
const LONGEST: usize = 10_000_000;
/// How long an append waits for a full segment to be sealed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Appended {
    /// Records that were taken in.
    pub stored: u64,
    /// Records whose gateway is full and stops inserting.
    pub refused: u64,
    /// Records of more than 10 MB.
    pub oversized: u64,
}

/// A page of a list.
#[derive(Clone, PartialEq, Debug)]
pub struct Page {
    /// Those of the page, without bodies.
    pub records: Vec<Stored>,
    /// Those of all pages.
    pub total_count: u64,
    /// If it was asked for.
    pub meta_info: Option<MetaInfo>,
    /// Whether the bodies of all records were searched; `false`: the newest only.
    pub is_complete: bool,
}

/// What is to be changed of a record; `None` leaves as it is, `Some(None)` takes away.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Patch {
    /// -1, 0 or 1.
    pub feedback: Option<Option<i8>>,
    /// From 0 to 100.
    pub score: Option<Option<u8>>,
    /// A JSON object, as text.
    pub metadata: Option<Option<Text>>,
}

/// How much there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// Records that are not deleted.
    pub records: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Full segments.
    pub segments: u64,
}

/// See the top of this file. Cheap to clone; the last one that goes writes what is left to disk.
#[derive(Clone)]
pub struct Store(Arc<Handle>);

struct Handle {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

struct Inner {
    settings: Settings,
    state: RwLock<State>,
    /// Held by whoever changes something; taken before `state`.
    writer: Mutex<Writer>,
    /// There is something to sync, or the store ends.
    dirty: Condvar,
    /// There is a segment to seal, or the store ends.
    full: Condvar,
    /// No segment is being sealed.
    settled: Condvar,
    /// One at a time syncs: who comes second knows that the first has ended.
    syncing: Mutex<()>,
    /// Held as long as the process uses the folder.
    _lock: File,
}

struct Writer {
    log: Segment,
    blocks: block::Writer,
    /// Files that are to be synced, beside the log.
    unsynced: Vec<File>,
    is_dirty: bool,
    /// Whether the log's name may not be on disk.
    is_new: bool,
    is_sealing: bool,
    is_ending: bool,
    /// The entries of the last segment that was sealed, emptied: the next one has their room and need not ask the system for its own.
    spare: Vec<memory::Entry>,
}

#[derive(Default)]
struct State {
    scopes: Vec<Scope>,
    names: Lookup<(AccountId, Arc<str>), u32>,
    sealed: BTreeMap<u32, Arc<Sealed>>,
    /// Full, and about to become the last of the sealed ones.
    frozen: Option<Arc<Memory>>,
    open: Memory,
}

/// A gateway.
struct Scope {
    account: AccountId,
    gateway: Arc<str>,
    /// Records that are not deleted.
    live: u64,
}

impl Store {
    /// Opens a folder, or makes it. Reads the log of the last segment and the outlines of the others.
    ///
    /// # Errors
    /// The system's; and if another process has it.
    pub fn open(settings: Settings) -> Result<Self> {
        let inner = Arc::new(open::open(settings)?);
        let threads = keep::start(&inner).map_err(broken)?;
        Ok(Self(Arc::new(Handle { inner, threads })))
    }

    /// Takes records in; those without an id are passed over. One thread at a time does best. They are seen at once, and on disk with the next
    /// group commit.
    ///
    /// # Errors
    /// The system's: of this batch some records may be lost.
    pub fn append<R: Deref<Target = Record>>(&self, records: &[R]) -> Result<Appended> {
        let inner = &*self.0.inner;
        let mut appended = Appended::default();
        let mut rows = Vec::with_capacity(records.len());
        let mut writer = inner.writer.lock();
        inner.admit(records, &mut rows, &mut appended);
        let mut rest = &rows[..];
        while !rest.is_empty() {
            inner.make_room(&mut writer)?;
            let (now, later) = rest.split_at(inner.write(&mut writer, rest)?);
            appended.stored += now.len() as u64;
            rest = later;
        }
        Ok(appended)
    }

    /// The records that a query means, without bodies.
    ///
    /// # Errors
    /// The system's; an order by texts of which there are too many.
    pub fn list(&self, account: &AccountId, gateway: &str, query: &Query) -> Result<Page> {
        let wanted = query.skipped().saturating_add(query.per_page);
        self.scan(account, gateway, query, wanted as usize, |sources, found| {
            let skipped = (query.skipped() as usize).min(found.chosen.len());
            Ok(Page {
                records: read(sources, &found.chosen[skipped..]).map_err(broken)?,
                total_count: found.count,
                meta_info: found.meta_info,
                is_complete: found.is_complete,
            })
        })
    }

    /// How many records a query means, and with `meta_info` their least and most.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub fn count(&self, account: &AccountId, gateway: &str, query: &Query) -> Result<Page> {
        self.scan(account, gateway, query, 0, |_, found| {
            let (total_count, meta_info, is_complete) = (found.count, found.meta_info, found.is_complete);
            Ok(Page { records: Vec::new(), total_count, meta_info, is_complete })
        })
    }

    /// A record with what is kept of its bodies.
    ///
    /// # Errors
    /// The system's.
    pub fn get(&self, account: &AccountId, gateway: &str, id: LogId) -> Result<Option<Stored>> {
        self.0.inner.get(account, gateway, id)
    }

    /// What is kept of the request, and its media type.
    ///
    /// # Errors
    /// The system's.
    pub fn request(&self, account: &AccountId, gateway: &str, id: LogId) -> Result<Option<(Body, Option<Text>)>> {
        Ok(self.get(account, gateway, id)?.map(|Stored { record, .. }| (record.asked, record.request_content_type)))
    }

    /// What is kept of the answer, and its media type.
    ///
    /// # Errors
    /// The system's.
    pub fn response(&self, account: &AccountId, gateway: &str, id: LogId) -> Result<Option<(Body, Option<Text>)>> {
        Ok(self.get(account, gateway, id)?.map(|Stored { record, .. }| (record.answered, record.response_content_type)))
    }

    /// Deletes what a query means: all of it, or the first `limit` in its order. Returns how many. Appends wait meanwhile.
    ///
    /// # Errors
    /// The system's; a search, which deletes nothing.
    pub fn delete(&self, account: &AccountId, gateway: &str, query: &Query) -> Result<u64> {
        if query.search.is_some() {
            return Err(Error::bad_field("search", "'search' does not delete: say which records with filters"));
        }
        let inner = &*self.0.inner;
        let mut writer = inner.settle()?;
        let Some(scope) = inner.state.read().scope(account, gateway) else { return Ok(0) };
        inner.delete(&mut writer, scope, query)
    }

    /// Changes a record; `false`: it is not there.
    ///
    /// # Errors
    /// The system's.
    pub fn patch(&self, account: &AccountId, gateway: &str, id: LogId, patch: &Patch) -> Result<bool> {
        self.0.inner.patch(account, gateway, id, patch)
    }

    /// How much there is.
    pub fn status(&self) -> Status {
        let state = self.0.inner.state.read();
        Status {
            records: state.scopes.iter().map(|scope| scope.live).sum(),
            bytes: state.bytes(),
            segments: state.sealed.len() as u64,
        }
    }

    /// Returns when all that was appended is on disk.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> Result<()> {
        self.0.inner.sync().map_err(broken)
    }

    fn scan<T>(
        &self,
        account: &AccountId,
        gateway: &str,
        query: &Query,
        wanted: usize,
        then: impl FnOnce(&[Source], scan::Found) -> Result<T>,
    ) -> Result<T> {
        let (sealed, chunks, scope) =
            self.0.inner.state.read().snapshot(account, gateway, query, &self.0.inner.settings);
        let mut sources = sources(&sealed, chunks, scope).map_err(broken)?;
        let found = scan::scan(&mut sources, query, wanted, self.0.inner.settings.search_bytes)?;
        then(&sources, found)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inner.writer.lock().is_ending = true;
        self.inner.dirty.notify_all();
        self.inner.full.notify_all();
        for thread in self.threads.drain(..) {
            // It has said itself what was wrong.
            let _ = thread.join();
        }
        if let Err(error) = self.inner.sync() {
            tracing::error!(%error, "the last records of the log may be lost");
        }
    }
}

impl Inner {
    /// Which records go in, each with the number of its gateway.
    fn admit<'a, R: Deref<Target = Record>>(
        &self,
        records: &'a [R],
        rows: &mut Vec<(u32, LogId, &'a Record)>,
        appended: &mut Appended,
    ) {
        let mut room: Lookup<u32, u64> = Lookup::default();
        let mut last: Option<(u32, &Record)> = None;
        let mut state = self.state.write();
        for record in records.iter().map(Deref::deref) {
            let Some(id) = record.id else { continue };
            if block::bytes_of(record) > LONGEST {
                appended.oversized += 1;
                continue;
            }
            let known = last.filter(|(_, last)| last.account == record.account && last.gateway == record.gateway);
            let scope = known.map_or_else(|| state.intern(&record.account, &record.gateway), |(scope, _)| scope);
            last = Some((scope, record));
            let room = room.entry(scope).or_insert_with(|| {
                let keep = (self.settings.keep)(&record.account, &record.gateway);
                match keep.strategy {
                    Strategy::DeleteOldest => u64::MAX,
                    Strategy::StopInserting => keep.records.saturating_sub(state.scopes[scope as usize].live),
                }
            });
            if *room == 0 {
                appended.refused += 1;
                continue;
            }
            *room -= 1;
            rows.push((scope, id, record));
        }
    }

    /// Writes the next block of `rows`; returns how many that were.
    fn write(&self, writer: &mut Writer, rows: &[(u32, LogId, &Record)]) -> Result<usize> {
        let records: Vec<(LogId, &Record)> =
            rows.iter().take(block::MOST).map(|(_, id, record)| (*id, *record)).collect();
        let count = block::Writer::next(&records);
        let block = writer.blocks.write(&mut writer.log, &records[..count], false).map_err(broken)?;
        let mut state = self.state.write();
        state.push(block, &rows[..count], writer.log.end());
        drop(state);
        self.soil(writer);
        Ok(count)
    }

    /// Notes that there is something to sync.
    fn soil(&self, writer: &mut Writer) {
        if !std::mem::replace(&mut writer.is_dirty, true) {
            self.dirty.notify_one();
        }
    }

    /// Begins another segment if the open one is full; waits while the one before it is not sealed.
    fn make_room(&self, writer: &mut MutexGuard<Writer>) -> Result<()> {
        let state = self.state.read();
        let is_full = state.open.entries.len() >= ROWS || state.open.bytes >= self.settings.segment_bytes;
        drop(state);
        if !is_full {
            return Ok(());
        }
        self.wait(writer)?;
        self.rotate(writer).map_err(broken)
    }

    /// The writer, when no segment is being sealed: rows stay where they are while it is held.
    fn settle(&self) -> Result<MutexGuard<'_, Writer>> {
        let mut writer = self.writer.lock();
        self.wait(&mut writer)?;
        Ok(writer)
    }

    fn wait(&self, writer: &mut MutexGuard<Writer>) -> Result<()> {
        let timeout = self.settled.wait_while_for(writer, |writer| writer.is_sealing, PATIENCE);
        match timeout.timed_out() {
            true => Err(Error::internal(
                "the log cannot seal its segment: look at the disk, and at what the server's log says",
            )),
            false => Ok(()),
        }
    }

    fn rotate(&self, writer: &mut Writer) -> io::Result<()> {
        let number = self.state.read().open.number + 1;
        let log = Segment::begin(&log_of(&self.settings, number))?;
        writer.is_new = true;
        let full = std::mem::replace(&mut writer.log, log);
        writer.unsynced.push(full.file()?);
        let mut state = self.state.write();
        let entries = std::mem::take(&mut writer.spare);
        let full = std::mem::replace(&mut state.open, Memory { entries, ..Memory::new(number) });
        state.frozen = Some(Arc::new(full));
        writer.is_sealing = true;
        self.full.notify_one();
        Ok(())
    }

    /// Waits until what was written is on disk.
    fn sync(&self) -> io::Result<()> {
        let _turn = self.syncing.lock();
        let mut writer = self.writer.lock();
        let mut files = std::mem::take(&mut writer.unsynced);
        if std::mem::take(&mut writer.is_dirty) {
            files.push(writer.log.file()?);
        }
        let is_new = std::mem::take(&mut writer.is_new);
        drop(writer);
        if is_new && let Err(error) = sync_names(&self.settings.folder) {
            let mut writer = self.writer.lock();
            writer.unsynced.append(&mut files);
            (writer.is_dirty, writer.is_new) = (true, true);
            return Err(error);
        }
        for (at, file) in files.iter().enumerate() {
            if let Err(error) = file.sync_data() {
                let mut writer = self.writer.lock();
                writer.unsynced.extend(files.drain(at..));
                writer.is_dirty = true;
                return Err(error);
            }
        }
        Ok(())
    }

    fn get(&self, account: &AccountId, gateway: &str, id: LogId) -> Result<Option<Stored>> {
        let (sealed, scope) = {
            let state = self.state.read();
            let Some(scope) = state.scope(account, gateway) else { return Ok(None) };
            // A look into memory is no copy of it.
            let found = [Some(&state.open), state.frozen.as_deref()].into_iter().flatten().find_map(|memory| {
                let is_it =
                    |entry: &&memory::Entry| entry.id == id.number() && entry.scope == scope && entry.marks[0] == 0;
                let entry = memory.entries.iter().rev().find(is_it)?;
                let block = memory.blocks[entry.block as usize];
                Some((log_of(&self.settings, memory.number), block, entry.slot, entry.marks))
            });
            if let Some((log, block, slot, marks)) = found {
                drop(state);
                return read_one(&log, block, slot, marks).map_err(broken);
            }
            (state.sealed.values().cloned().collect::<Vec<_>>(), scope)
        };
        for source in sources(&sealed, Vec::new(), Some(scope)).map_err(broken)?.iter().rev() {
            let Source::Disk(view) = source else { continue };
            let Some(row) = view.find(id.number()).map_err(broken)? else { continue };
            let (log, block, slot, marks) = source.place(row - view.range.begin).map_err(broken)?;
            if marks[Plane::Dead as usize] == 0 {
                return read_one(&log, block, slot, marks).map_err(broken);
            }
        }
        Ok(None)
    }
}

impl State {
    fn scope(&self, account: &AccountId, gateway: &str) -> Option<u32> {
        self.names.get(&(account.clone(), gateway.into())).copied()
    }

    fn intern(&mut self, account: &AccountId, gateway: &Arc<str>) -> u32 {
        let next = self.scopes.len() as u32;
        let scope = *self.names.entry((account.clone(), gateway.clone())).or_insert(next);
        if scope == next {
            self.scopes.push(Scope { account: account.clone(), gateway: gateway.clone(), live: 0 });
        }
        scope
    }

    fn push(&mut self, block: block::Block, rows: &[(u32, LogId, &Record)], end: u64) {
        self.open.push(block, rows.iter().copied());
        self.open.bytes = end;
        rows.iter().for_each(|(scope, ..)| self.scopes[*scope as usize].live += 1);
    }

    fn bytes(&self) -> u64 {
        let memory = [Some(&self.open), self.frozen.as_deref()].into_iter().flatten();
        self.sealed.values().map(|sealed| sealed.bytes).chain(memory.map(|memory| memory.bytes)).sum()
    }

    fn snapshot(
        &self,
        account: &AccountId,
        gateway: &str,
        query: &Query,
        settings: &Settings,
    ) -> (Vec<Arc<Sealed>>, Vec<Chunk>, Option<u32>) {
        let Some(scope) = self.scope(account, gateway) else { return (Vec::new(), Vec::new(), None) };
        let (sealed, chunks) = self.snapshot_of(scope, query, settings);
        (sealed, chunks, Some(scope))
    }

    /// What holds a gateway's rows, oldest first.
    fn snapshot_of(&self, scope: u32, query: &Query, settings: &Settings) -> (Vec<Arc<Sealed>>, Vec<Chunk>) {
        let sealed = self.sealed.values().filter(|sealed| sealed.range(scope).is_some()).cloned().collect();
        let memory = [self.frozen.as_deref(), Some(&self.open)].into_iter().flatten();
        let chunks = memory.map(|memory| Chunk::of(memory, log_of(settings, memory.number), scope, query)).collect();
        (sealed, chunks)
    }
}

/// The first form of a segment: number and generation.
fn stem_of(settings: &Settings, number: u32, generation: u32) -> PathBuf {
    settings.folder.join(format!("{number:08}.{generation}"))
}

fn log_of(settings: &Settings, number: u32) -> PathBuf {
    columns::with(&stem_of(settings, number, 0), "log")
}
