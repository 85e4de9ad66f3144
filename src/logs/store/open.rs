//! A folder of segments, as a start finds it: what a crash left is cut off, made again or removed.
//!
//! ```text
//!   columns and log   a full segment
//!   log alone         the last one: goes on; another: its columns are made again
//!   columns alone     being deleted: removed
//!   two generations   being rewritten: the later one counts once it has columns
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use parking_lot::{Condvar, Mutex, RwLock};
use tracing::warn;

use super::block::{self, Plane, Seen};
use super::columns::{self, Sealed, View};
use super::memory::Memory;
use super::source::broken;
use super::{Inner, Settings, State, Writer, image, log_of, stem_of};
use crate::base::{AccountId, Error, LogId, Result};
use crate::store::{Segment, lock};

/// Rows that take the place of older ones: gateway, id, segment, and row where that is still open.
type Replacing = Vec<(u32, LogId, u32)>;

pub(super) fn open(settings: Settings) -> Result<Inner> {
    fs::create_dir_all(&settings.folder).map_err(broken)?;
    let lock = lock(&settings.folder.join("lock")).map_err(broken)?.ok_or_else(|| {
        let folder = settings.folder.display();
        Error::bad_input(format!(
            "the log in {folder} is in use by another process: stop that one, or name another folder"
        ))
    })?;
    let (state, log) = read(&settings).map_err(broken)?;
    let blocks = block::Writer::default();
    let writer = Writer {
        log,
        blocks,
        unsynced: Vec::new(),
        is_dirty: false,
        is_new: false,
        is_sealing: false,
        spare: Vec::new(),
        is_ending: false,
    };
    Ok(Inner {
        settings,
        state: RwLock::new(state),
        writer: Mutex::new(writer),
        dirty: Condvar::new(),
        full: Condvar::new(),
        settled: Condvar::new(),
        syncing: Mutex::new(()),
        _lock: lock,
    })
}

fn read(settings: &Settings) -> io::Result<(State, Segment)> {
    let mut state = State::default();
    let mut log = None;
    let mut replacing = Replacing::new();
    let found = folder(&settings.folder)?;
    let last = found.last_key_value().map_or(0, |(number, _)| *number);
    for (number, generations) in found {
        let has = |generation: &u32, what: &str| generations[generation].contains(what);
        let with_columns =
            generations.keys().rev().find(|generation| has(generation, "columns") && has(generation, "log"));
        let first = generations.keys().find(|generation| has(generation, "log"));
        let chosen = with_columns.or(first).copied();
        for generation in generations.keys().filter(|generation| Some(**generation) != chosen) {
            columns::remove(&stem_of(settings, number, *generation))?;
        }
        let Some(generation) = chosen else { continue };
        let stem = stem_of(settings, number, generation);
        let path = columns::with(&stem, "log");
        if with_columns.is_some() {
            if let Some(sealed) =
                Sealed::open(number, stem.clone(), |account, gateway| name(&mut state, account, gateway))?
            {
                state.sealed.insert(number, sealed.into());
                continue;
            }
            warn!(segment = %stem.display(), "the index of a segment of the log is damaged and made again");
        }
        let (memory, end) = replay(&mut state, number, &path, &mut replacing)?;
        let goes_on = number == last && generation == 0 && with_columns.is_none();
        if goes_on {
            log = Some(Segment::resume(&path, end)?);
            state.open = memory;
            continue;
        }
        // What follows the whole frames is no part of a segment that is full.
        Segment::resume(&path, end)?.sync()?;
        if let Some(sealed) = seal(&mut state, &memory, &stem)? {
            state.sealed.insert(number, sealed.into());
        }
    }
    let log = match log {
        Some(log) => log,
        None => {
            state.open = Memory::new(last + 1);
            Segment::create(&log_of(settings, last + 1))?
        }
    };
    replace(&mut state, &replacing)?;
    count(&mut state);
    Ok((state, log))
}

/// Which files there are of each segment and generation. Others are left alone.
fn folder(folder: &Path) -> io::Result<BTreeMap<u32, BTreeMap<u32, BTreeSet<String>>>> {
    let mut found: BTreeMap<u32, BTreeMap<u32, BTreeSet<String>>> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let mut parts = name.to_str().unwrap_or_default().split('.');
        let (Some(number), Some(generation), Some(what), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (Ok(number), Ok(generation)) = (number.parse(), generation.parse()) else { continue };
        found.entry(number).or_default().entry(generation).or_default().insert(what.to_owned());
    }
    Ok(found)
}

fn name(state: &mut State, account: &str, gateway: &str) -> u32 {
    state.intern(&AccountId::new(account), &gateway.into())
}

/// The index of a log, and where what is whole ends.
fn replay(state: &mut State, number: u32, path: &Path, replacing: &mut Replacing) -> io::Result<(Memory, u64)> {
    let mut memory = Memory::new(number);
    let end = block::walk(path, |seen| match seen {
        Seen::Marks(marks) => marks.into_iter().for_each(|mark| memory.mark(mark)),
        Seen::Block { block, heads, is_replacing } => {
            let mut rows = Vec::with_capacity(heads.len());
            for head in &heads {
                let scope = state.intern(&head.account, &head.gateway);
                rows.extend(head.id.map(|id| (scope, id, head)));
            }
            if is_replacing {
                replacing.extend(rows.iter().map(|(scope, id, _)| (*scope, *id, number)));
            }
            memory.push(block, rows.into_iter());
        }
    })?;
    memory.bytes = end;
    Ok((memory, end))
}

/// Makes the columns of a log that has none. Marks that are there of an earlier time count.
fn seal(state: &mut State, memory: &Memory, stem: &Path) -> io::Result<Option<Sealed>> {
    let scopes = &state.scopes;
    let name_of = |scope: u32| (scopes[scope as usize].account.as_str(), &*scopes[scope as usize].gateway);
    let image::Image { bytes, marks, rows } = image::image(memory, name_of)?;
    let known = fs::metadata(columns::with(stem, "marks"))
        .is_ok_and(|file| file.len() == u64::from(rows) * Plane::ALL.len() as u64);
    if rows == 0 {
        columns::remove(stem)?;
        return Ok(None);
    }
    columns::write(stem, &bytes, marks.as_deref().filter(|_| !known))?;
    Sealed::open(memory.number, stem.to_path_buf(), |account, gateway| name(state, account, gateway))
}

/// Deletes what was written again: the crash may have come before its mark.
fn replace(state: &mut State, replacing: &Replacing) -> io::Result<()> {
    for (scope, id, number) in replacing {
        for sealed in state.sealed.values() {
            let Some(range) = sealed.range(*scope).filter(|_| sealed.number < *number) else { continue };
            let Some(view) = View::open(sealed, range)? else { continue };
            let Some(row) = view.find(id.number())? else { continue };
            if view.marks(row)?[Plane::Dead as usize] == 0
                && let Some(file) = sealed.mark(range, &[row], Plane::Dead, 1)?
            {
                file.sync_data()?;
            }
        }
        let entries = &mut state.open.entries;
        let is_it = |entry: &super::memory::Entry| entry.scope == *scope && entry.id == id.number();
        let last = entries.iter().rposition(is_it);
        for (row, entry) in entries.iter_mut().enumerate() {
            if Some(row) != last && is_it(entry) {
                entry.marks[Plane::Dead as usize] = 1;
            }
        }
    }
    Ok(())
}

fn count(state: &mut State) {
    for range in state.sealed.values().flat_map(|sealed| &sealed.ranges) {
        state.scopes[range.scope as usize].live += u64::from(range.live());
    }
    for entry in state.open.entries.iter().filter(|entry| entry.marks[Plane::Dead as usize] == 0) {
        state.scopes[entry.scope as usize].live += 1;
    }
}
