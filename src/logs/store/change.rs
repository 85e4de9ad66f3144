//! What changes records that are there: deletions, and what people say of them.
//!
//! ```text
//!   feedback, score, dead   a mark: in the log of the open segment, or in the marks of a full one
//!   metadata                the record once more, and a mark on the old one
//! ```
//!
//! Whoever changes something holds the writer and has waited until nothing is being sealed, so rows stay where they are.

use std::io;
use std::sync::Arc;

use super::block::{self, Mark, Plane};
use super::columns::{Sealed, View};
use super::memory::Entry;
use super::read::sources;
use super::scan;
use super::source::{Source, broken};
use super::{Inner, Patch, Stored, Writer, filter};
use crate::base::{AccountId, LogId, Result};
use crate::logs::query::Query;

/// Where a record is.
enum Place {
    Open(u32),
    Sealed(Arc<Sealed>, u32),
}

impl Inner {
    pub(super) fn delete(&self, writer: &mut Writer, scope: u32, query: &Query) -> Result<u64> {
        let (sealed, chunks) = self.state.read().snapshot_of(scope, query, &self.settings);
        let mut sources = sources(&sealed, chunks, Some(scope)).map_err(broken)?;
        let mut rows: Vec<Vec<u32>> = vec![Vec::new(); sources.len()];
        if let Some(limit) = query.limit {
            for (source, row) in scan::scan(&mut sources, query, limit as usize, 0)?.chosen {
                rows[source].push(row);
            }
        } else {
            for (source, rows) in sources.iter_mut().zip(&mut rows) {
                let Some(mask) = filter::select(source, &query.filters).map_err(broken)? else { continue };
                rows.extend((0..).zip(mask).filter(|(_, is_meant)| *is_meant).map(|(row, _)| row));
            }
        }
        let mut count = 0;
        for (source, mut rows) in sources.iter().zip(rows) {
            rows.sort_unstable();
            count += rows.len() as u64;
            self.bury(writer, scope, source, rows).map_err(broken)?;
        }
        Ok(count)
    }

    /// Deletes live rows of a source; nobody else does meanwhile.
    pub(super) fn bury(&self, writer: &mut Writer, scope: u32, source: &Source, mut rows: Vec<u32>) -> io::Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let count = rows.len() as u64;
        match source {
            Source::Disk(view) => {
                rows.iter_mut().for_each(|row| *row += view.range.begin);
                writer.unsynced.extend(view.sealed.mark(view.range, &rows, Plane::Dead, 1)?);
            }
            Source::Memory(chunk) => {
                let marks: Vec<Mark> = rows.iter().map(|row| (chunk.rows[*row as usize], Plane::Dead, 1)).collect();
                self.mark_open(writer, &marks)?;
            }
        }
        self.state.write().scopes[scope as usize].live -= count;
        self.soil(writer);
        Ok(())
    }

    fn mark_open(&self, writer: &mut Writer, marks: &[Mark]) -> io::Result<()> {
        block::write_marks(&mut writer.log, marks)?;
        let mut state = self.state.write();
        state.open.bytes = writer.log.end();
        marks.iter().for_each(|mark| state.open.mark(*mark));
        Ok(())
    }

    pub(super) fn patch(&self, account: &AccountId, gateway: &str, id: LogId, patch: &Patch) -> Result<bool> {
        let mut writer = self.settle()?;
        let Some(scope) = self.state.read().scope(account, gateway) else { return Ok(false) };
        let Some(mut place) = self.find(scope, id).map_err(broken)? else { return Ok(false) };
        if let Some(metadata) = &patch.metadata {
            self.make_room(&mut writer)?;
            // The open segment may have become a full one.
            self.wait(&mut writer)?;
            let Some(old) = self.find(scope, id).map_err(broken)? else { return Ok(false) };
            let Some(mut stored) = self.get(account, gateway, id)? else { return Ok(false) };
            stored.record.metadata = metadata.clone();
            place = self.replace(&mut writer, scope, id, &stored, &old).map_err(broken)?;
        }
        let feedback = patch.feedback.map(|feedback| (Plane::Feedback, feedback.map_or(0, |value| (value + 2) as u8)));
        let score = patch.score.map(|score| (Plane::Score, score.map_or(0, |value| value + 1)));
        for (plane, value) in feedback.into_iter().chain(score) {
            self.mark(&mut writer, scope, &place, plane, value).map_err(broken)?;
        }
        Ok(true)
    }

    /// Writes a record once more and deletes it where it was.
    fn replace(&self, writer: &mut Writer, scope: u32, id: LogId, stored: &Stored, old: &Place) -> io::Result<Place> {
        let block = writer.blocks.write(&mut writer.log, &[(id, &stored.record)], true)?;
        let mut state = self.state.write();
        state.push(block, &[(scope, id, &stored.record)], writer.log.end());
        let row = state.open.entries.len() as u32 - 1;
        state.scopes[scope as usize].live -= 1;
        drop(state);
        let marks = [
            (row, Plane::Feedback, stored.feedback.map_or(0, |value| (value + 2) as u8)),
            (row, Plane::Score, stored.score.map_or(0, |value| value + 1)),
        ];
        self.mark_open(writer, &marks)?;
        let place = Place::Open(row);
        self.mark(writer, scope, old, Plane::Dead, 1)?;
        Ok(place)
    }

    fn mark(&self, writer: &mut Writer, scope: u32, place: &Place, plane: Plane, value: u8) -> io::Result<()> {
        match place {
            Place::Open(row) => self.mark_open(writer, &[(*row, plane, value)])?,
            Place::Sealed(sealed, row) => {
                let Some(range) = sealed.range(scope) else { return Ok(()) };
                writer.unsynced.extend(sealed.mark(range, &[*row], plane, value)?);
            }
        }
        self.soil(writer);
        Ok(())
    }

    /// Where a record is, while nothing is being sealed.
    fn find(&self, scope: u32, id: LogId) -> io::Result<Option<Place>> {
        let state = self.state.read();
        let is_it = |entry: &Entry| entry.id == id.number() && entry.scope == scope && entry.marks[0] == 0;
        if let Some(row) = state.open.entries.iter().rposition(is_it) {
            return Ok(Some(Place::Open(row as u32)));
        }
        let sealed: Vec<_> = state.sealed.values().rev().cloned().collect();
        drop(state);
        for sealed in sealed {
            let Some(range) = sealed.range(scope) else { continue };
            let Some(view) = View::open(&sealed, range)? else { continue };
            let Some(row) = view.find(id.number())? else { continue };
            if view.marks(row)?[Plane::Dead as usize] == 0 {
                return Ok(Some(Place::Sealed(sealed.clone(), row)));
            }
        }
        Ok(None)
    }
}
