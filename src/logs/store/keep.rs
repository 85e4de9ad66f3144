//! What the store does by itself: syncing, sealing, and keeping within bounds.
//!
//! ```text
//!   sync    something was written ─ wait `commit` ─> fdatasync
//!   keeper  a segment is full ─> columns         once a second: ages, records of gateways, bytes, dead segments, one rewrite
//! ```

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::{info, warn};

use super::block::{self, Plane};
use super::columns::{self, Sealed, View};
use super::memory::Memory;
use super::read::sources;
use super::source::{Chunk, Source, broken};
use super::{Inner, Keep, Strategy, Writer, image, log_of, stem_of};
use crate::base::{AccountId, LogId, Millis, Result};
use crate::logs::query::{Query, first_id};
use crate::logs::record::Record;
use crate::store::Segment;

/// A segment that is not full is sealed after a day, so that age and bytes have whole segments to drop.
const OLD: u64 = 86_400_000;
/// Between two tries of what failed.
const REST: Duration = Duration::from_secs(1);

/// Rows of a block by their slots: whose, and their marks.
type Rows = BTreeMap<u32, (u32, [u8; 3])>;

pub(super) fn start(inner: &Arc<Inner>) -> io::Result<Vec<JoinHandle<()>>> {
    let (syncing, keeping) = (inner.clone(), inner.clone());
    Ok(vec![
        thread::Builder::new().name("log-sync".into()).spawn(move || sync(&syncing))?,
        thread::Builder::new().name("log-keeper".into()).spawn(move || keep(&keeping))?,
    ])
}

fn sync(inner: &Inner) {
    loop {
        let mut writer = inner.writer.lock();
        inner
            .dirty
            .wait_while(&mut writer, |writer| !writer.is_dirty && writer.unsynced.is_empty() && !writer.is_ending);
        if writer.is_ending {
            return;
        }
        drop(writer);
        thread::sleep(inner.settings.commit);
        if let Err(error) = inner.sync() {
            warn!(%error, "the log cannot be written to disk");
            thread::sleep(REST);
        }
    }
}

fn keep(inner: &Inner) {
    loop {
        let mut writer = inner.writer.lock();
        if !writer.is_sealing && !writer.is_ending {
            inner.full.wait_for(&mut writer, inner.settings.tend);
        }
        let (is_sealing, is_ending) = (writer.is_sealing, writer.is_ending);
        drop(writer);
        let done = match (is_sealing, is_ending) {
            (true, _) => inner.seal().map_err(broken),
            (false, true) => return,
            (false, false) => inner.tend(Millis::now()),
        };
        if let Err(error) = done {
            warn!(?error, "the log is not kept as it should be");
            if is_ending {
                // The next start makes its columns.
                return;
            }
            thread::sleep(REST);
        }
    }
}

impl Inner {
    /// Makes the columns of the full segment.
    fn seal(&self) -> io::Result<()> {
        // Marks of older segments that this one replaces rows of are on disk before it counts as full.
        self.sync()?;
        let Some(memory) = self.state.read().frozen.clone() else { return Ok(()) };
        let stem = stem_of(&self.settings, memory.number, 0);
        let sealed = self.make(&memory, &stem)?;
        let mut writer = self.writer.lock();
        let mut state = self.state.write();
        state.frozen = None;
        state.sealed.extend(sealed.map(|sealed| (memory.number, Arc::new(sealed))));
        writer.is_sealing = false;
        if let Some(Memory { mut entries, .. }) = Arc::into_inner(memory) {
            entries.clear();
            writer.spare = entries;
        }
        self.settled.notify_all();
        Ok(())
    }

    /// Writes columns and opens them; nothing where no row is left.
    fn make(&self, memory: &Memory, stem: &std::path::Path) -> io::Result<Option<Sealed>> {
        let names: Vec<_> =
            self.state.read().scopes.iter().map(|scope| (scope.account.clone(), scope.gateway.clone())).collect();
        let image = image::image(memory, |scope| {
            let (account, gateway) = &names[scope as usize];
            (account.as_str(), gateway)
        })?;
        if image.rows == 0 {
            columns::remove(stem)?;
            return Ok(None);
        }
        columns::write(stem, &image.bytes, image.marks.as_deref())?;
        let open = |account: &str, gateway: &str| self.state.write().intern(&AccountId::new(account), &gateway.into());
        Sealed::open(memory.number, stem.to_path_buf(), open)
    }

    /// Keeps to the bounds, as of `now`.
    pub(super) fn tend(&self, now: Millis) -> Result<()> {
        {
            let mut writer = self.settle()?;
            let (is_old, is_empty) = {
                let open = &self.state.read().open;
                (open.begun + OLD < now.0, open.entries.is_empty())
            };
            if is_old && !is_empty {
                self.rotate(&mut writer).map_err(broken)?;
            }
        }
        self.trim(now)?;
        self.drop_segments().map_err(broken)?;
        self.rewrite().map_err(broken)
    }

    /// Deletes what is too old, and what gateways have too much.
    fn trim(&self, now: Millis) -> Result<()> {
        let cutoff = self.settings.max_age.and_then(|age| now.0.checked_sub(age.as_millis() as u64));
        let mut due = Vec::new();
        for (number, scope) in self.state.read().scopes.iter().enumerate().filter(|(_, scope)| scope.live > 0) {
            let Keep { records, strategy } = (self.settings.keep)(&scope.account, &scope.gateway);
            let excess = if strategy == Strategy::DeleteOldest { scope.live.saturating_sub(records) } else { 0 };
            if excess > 0 || cutoff.is_some() {
                due.push((number as u32, excess));
            }
        }
        let cutoff = cutoff.map_or(0, |cutoff| first_id(Millis(cutoff)));
        for (scope, excess) in due {
            let mut writer = self.settle()?;
            self.trim_scope(&mut writer, scope, excess, cutoff).map_err(broken)?;
        }
        Ok(())
    }

    /// Deletes a gateway's oldest `excess` rows, and all with ids below `cutoff`.
    fn trim_scope(&self, writer: &mut Writer, scope: u32, mut excess: u64, cutoff: u128) -> io::Result<()> {
        let query = Query::default();
        let sealed: Vec<_> = self.state.read().sealed.values().cloned().collect();
        for sealed in &sealed {
            let Some(range) =
                sealed.range(scope).filter(|range| range.live() > 0 && (excess > 0 || range.first < cutoff))
            else {
                continue;
            };
            let Some(view) = View::open(sealed, range)? else { continue };
            let old = view.rank(cutoff)? as usize;
            let dead = view.plane(Plane::Dead)?;
            let rows =
                oldest(view.len(), |row| dead.as_ref().is_some_and(|dead| dead[row] != 0), |row| row < old, excess);
            excess = excess.saturating_sub(rows.len() as u64);
            self.bury(writer, scope, &Source::Disk(view), rows)?;
        }
        let chunk = {
            let state = self.state.read();
            let is_old = |entry: &super::memory::Entry| entry.scope == scope && entry.id < cutoff;
            if excess == 0 && !state.open.entries.iter().any(is_old) {
                return Ok(());
            }
            Chunk::of(&state.open, log_of(&self.settings, state.open.number), scope, &query)
        };
        let rows = oldest(chunk.entries.len(), |_| false, |row| chunk.entries[row].id < cutoff, excess);
        self.bury(writer, scope, &Source::Memory(chunk), rows)
    }

    /// Drops segments without live rows, and the oldest ones while all are too large.
    fn drop_segments(&self) -> io::Result<()> {
        let mut dropped = Vec::new();
        let writer = self.writer.lock();
        {
            let mut state = self.state.write();
            let dead: Vec<u32> =
                state.sealed.values().filter(|sealed| sealed.live() == 0).map(|sealed| sealed.number).collect();
            dropped.extend(dead.iter().filter_map(|number| state.sealed.remove(number)));
            while state.bytes() > self.settings.max_bytes {
                let Some((_, oldest)) = state.sealed.pop_first() else { break };
                info!(
                    segment = oldest.number,
                    records = oldest.live(),
                    "the log is at its bound of bytes: its oldest segment goes"
                );
                for range in &oldest.ranges {
                    state.scopes[range.scope as usize].live -= u64::from(range.live());
                }
                dropped.push(oldest);
            }
        }
        drop(writer);
        dropped.iter().try_for_each(|sealed| sealed.remove())
    }

    /// Writes one segment anew of which more than half is dead.
    fn rewrite(&self) -> io::Result<()> {
        let old = {
            let state = self.state.read();
            state.sealed.values().find(|sealed| sealed.live() < sealed.rows / 2).cloned()
        };
        let Some(old) = old else { return Ok(()) };
        let changes = old.changes();
        let generation = old.generation().wrapping_add(1);
        let stem = stem_of(&self.settings, old.number, generation);
        columns::remove(&stem)?;
        let memory = self.copy(&old, &stem)?;
        let fresh = self.make(&memory, &stem)?;
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        let is_there = state.sealed.get(&old.number).is_some_and(|sealed| Arc::ptr_eq(sealed, &old));
        if !is_there || old.changes() != changes {
            // Rows were marked meanwhile: another time.
            drop(state);
            return columns::remove(&stem);
        }
        state.sealed.remove(&old.number);
        state.sealed.extend(fresh.map(|fresh| (old.number, Arc::new(fresh))));
        drop(state);
        old.remove()
    }

    /// The live rows of a segment in another log, which is on disk when this returns.
    fn copy(&self, old: &Arc<Sealed>, stem: &std::path::Path) -> io::Result<Memory> {
        // Which rows of which block live on: their slots, gateways and marks.
        let mut blocks: BTreeMap<u64, (block::Block, Rows)> = BTreeMap::new();
        for range in &old.ranges {
            let Some(source) = sources(std::slice::from_ref(old), Vec::new(), Some(range.scope))?.pop() else {
                continue;
            };
            for row in 0..range.end - range.begin {
                let (_, block, slot, marks) = source.place(row)?;
                if marks[Plane::Dead as usize] == 0 {
                    blocks.entry(block.at).or_insert((block, BTreeMap::new())).1.insert(slot, (range.scope, marks));
                }
            }
        }
        let mut log = Segment::create(&columns::with(stem, "log"))?;
        let (mut memory, mut writer) = (Memory::new(old.number), block::Writer::default());
        for (block, slots) in blocks.into_values() {
            let (Some(mut heads), Some(bodies)) =
                (block::read_heads(&old.log(), block)?, block::read_bodies(&old.log(), block)?)
            else {
                continue;
            };
            if block::fill(&mut heads, &bodies).is_none() {
                continue;
            }
            let live = slots.iter().filter_map(|(slot, (scope, marks))| {
                let record = heads.get(*slot as usize)?;
                Some((*scope, record.id?, record, *marks))
            });
            let live: Vec<(u32, LogId, &Record, [u8; 3])> = live.collect();
            let records: Vec<_> = live.iter().map(|(_, id, record, _)| (*id, *record)).collect();
            let first = memory.entries.len() as u32;
            let block = writer.write(&mut log, &records, false)?;
            memory.push(block, live.iter().map(|(scope, id, record, _)| (*scope, *id, *record)));
            // In the log as well, for whoever makes the columns again.
            let marks: Vec<block::Mark> =
                (first..).zip(&live).flat_map(|(row, (.., marks))| marked(row, *marks)).collect();
            if !marks.is_empty() {
                block::write_marks(&mut log, &marks)?;
                marks.iter().for_each(|mark| memory.mark(*mark));
            }
        }
        log.sync()?;
        memory.bytes = log.end();
        Ok(memory)
    }
}

fn marked(row: u32, marks: [u8; 3]) -> impl Iterator<Item = block::Mark> {
    Plane::ALL.into_iter().zip(marks).filter(|(_, value)| *value != 0).map(move |(plane, value)| (row, plane, value))
}

/// The first rows that are not dead: those that are old, and `excess` in all at least.
fn oldest(rows: usize, is_dead: impl Fn(usize) -> bool, is_old: impl Fn(usize) -> bool, excess: u64) -> Vec<u32> {
    let mut chosen = Vec::new();
    for row in (0..rows).filter(|row| !is_dead(*row)) {
        if is_old(row) || (chosen.len() as u64) < excess {
            chosen.push(row as u32);
        }
    }
    chosen
}
