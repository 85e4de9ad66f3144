//! Analytics: every call counted by minute, hour and day, and asked about while it goes on.
//!
//! ```text
//!  observe(record) ─> table ──every few seconds──> part ─┐ 10 minutes later
//!                     (memory)                     part ─┴─────> minute ──60──> hour ──24──> day
//!                        │                          │              │  48 h       │  60 d      │  800 d
//!  query ─> parse ─> cover: the fewest of these that make up the time asked for ─> group ─> order ─> JSON
//! ```
//!
//! A series is an account, gateway, provider, model, key, status and use of the cache; of each there are sums and two sketches of
//! durations (`sketch.rs`, to 1 %). All stretches are blocks of rows in one format (`block.rs`), and merging adds them up; a block is
//! written once and then never changes (`shelf.rs`, `disk.rs`). A kill costs the calls since the last part, and none is counted twice.
//!
//! **Bounds.** A table, and a block of any stretch, has at most [`Settings::series`] rows of their own and half as many again for what
//! is folded into `other`. A row in a table takes some 300 bytes and 8 for each of at most 1,250 bins in two sketches; a usual one 2 kB.
//! Between two parts there is one table, so 4 MB at the default of 2,000 series. With a folder the rest lies on disk, in memory 60 bytes
//! for each part and block: under a megabyte. Without a folder it lies in memory up to [`Settings::memory_bytes`].
//! A query has at most 20,000 rows with sketches under way and 100,000 without, and tells 10,000.
//!
//! It keeps no texts of calls and no caller's metadata: neither has a bound.

mod answer;
mod ask;
mod block;
mod codec;
mod disk;
mod measure;
mod row;
mod shelf;
mod sketch;
mod table;

pub use sketch::RELATIVE_ERROR;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tracing::warn;

use crate::base::{AccountId, Millis, Result};
use crate::logs::analytics::answer::Answer;
use crate::logs::analytics::ask::Ask;
use crate::logs::analytics::block::Block;
use crate::logs::analytics::disk::Disk;
use crate::logs::analytics::shelf::{Place, Shelf, Tier};
use crate::logs::analytics::table::Table;
use crate::logs::record::Record;

/// A minute takes calls for so many minutes. Calls are told when they end and counted when they began; what took longer than
/// this counts in the oldest minute that is open.
const OPEN_MINUTES: u32 = 10;

/// How much is kept, and where.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Where it is kept across restarts; `None`: in memory only.
    pub folder: Option<PathBuf>,
    /// Hours for which there are figures by the minute, 2 at least; 48.
    pub minutes_for_hours: u32,
    /// Days for which there are figures by the hour, 2 at least; 60.
    pub hours_for_days: u32,
    /// Days for which there are figures by the day, 2 at least; 800.
    pub days_for_days: u32,
    /// Series that a minute, an hour or a day has of its own, 1 at least; what is more is folded into `other`; 2,000.
    pub series: usize,
    /// Without a folder, or while it cannot be written to: bytes in memory; the oldest go first; 64 MiB.
    pub memory_bytes: usize,
    /// How often what was counted goes to disk: what a kill may cost; 5 seconds.
    pub flush_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            folder: None,
            minutes_for_hours: 48,
            hours_for_days: 60,
            days_for_days: 800,
            series: 2000,
            memory_bytes: 64 << 20,
            flush_every: Duration::from_secs(5),
        }
    }
}

/// What did not go as it should, since the start; for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Calls that were counted under `other` because there were too many series.
    pub folded: u64,
    /// Calls that were counted in another minute than theirs: told too late, or the clock went back.
    pub moved: u64,
    /// Minutes, hours and days that were given up because memory or the disk was full.
    pub lost: u64,
    /// Times that a block could not be read and was left out.
    pub damaged: u64,
}

/// See the top of this file. One thread counts and keeps ([`Analytics::observe`], [`Analytics::tick`]); any may ask.
#[derive(Debug)]
pub struct Analytics {
    settings: Settings,
    state: Mutex<State>,
    /// Held by the one who keeps, also while it waits for the disk; `None` without a folder.
    disk: Mutex<Option<Disk>>,
}

#[derive(Debug)]
struct State {
    /// The minute it is.
    head: u32,
    flushed: Millis,
    /// What was counted since the last parts were made, by minute.
    fresh: Vec<(u32, Table)>,
    shelf: Shelf,
    stats: Stats,
    /// Whether it was said that the disk does not take what it is given.
    is_failing: bool,
}

impl Analytics {
    /// Opens what the folder holds, or begins with nothing.
    ///
    /// # Errors
    /// `BadInput`: the folder is another daemon's, or cannot be read and written.
    pub fn open(settings: Settings, now: Millis) -> Result<Self> {
        let (disk, shelf) = match &settings.folder {
            Some(folder) => Disk::open(folder).map(|(disk, shelf)| (Some(disk), shelf))?,
            None => (None, Shelf::default()),
        };
        let (fresh, stats) = (Vec::new(), Stats::default());
        let state = State { head: minute_of(now), flushed: now, fresh, shelf, stats, is_failing: false };
        Ok(Self { settings, state: Mutex::new(state), disk: Mutex::new(disk) })
    }

    /// Counts a call in the minute it began in. Waits for no disk, and for queries a millisecond at most.
    pub fn observe(&self, record: &Record) {
        let mut state = self.state.lock();
        let minute = state.place(record.at);
        let State { fresh, stats, .. } = &mut *state;
        let index = fresh.iter().position(|(at, _)| *at == minute).unwrap_or_else(|| {
            fresh.push((minute, Table::default()));
            fresh.len() - 1
        });
        let others: usize =
            fresh.iter().enumerate().filter(|(at, _)| *at != index).map(|(_, (_, table))| table.len()).sum();
        let is_own = fresh[index].1.observe(record, self.settings.series.saturating_sub(others));
        stats.folded += u64::from(!is_own);
    }

    /// To be called about once a second, by the one who observes: knows what time it is from this, and keeps what is due to be kept.
    pub fn tick(&self, now: Millis) {
        let is_due = {
            let mut state = self.state.lock();
            state.head = minute_of(now);
            let since = now.0.checked_sub(state.flushed.0);
            since.is_none_or(|since| u128::from(since) >= self.settings.flush_every.as_millis())
        };
        if is_due {
            self.flush(now);
        }
    }

    /// Keeps all that was counted, and closes what is due; also to be called at the end. Waits for the disk.
    pub fn flush(&self, now: Millis) {
        let mut disk = self.disk.lock();
        let head = minute_of(now);
        let sealed_before = head.saturating_sub(OPEN_MINUTES);
        let (held, sealed) = {
            let mut state = self.state.lock();
            (state.head, state.flushed) = (head, now);
            state.make_parts();
            let sealed = state.shelf.seal(sealed_before);
            (state.shelf.held_parts(), sealed)
        };
        if let Some(disk) = &mut *disk {
            for (minute, index, bytes) in held {
                match disk.append_part(minute, &bytes) {
                    Ok(place) => self.state.lock().shelf.move_part(minute, index, place),
                    // It stays in memory, and is tried again.
                    Err(error) => self.say(Err(error)),
                }
            }
        }
        sealed.into_iter().for_each(|minute| self.close(&mut disk, Tier::Minute, minute));
        for tier in [Tier::Hour, Tier::Day] {
            let due = self.state.lock().shelf.to_close(tier, sealed_before);
            due.into_iter().for_each(|start| self.close(&mut disk, tier, start));
        }
        let mut state = self.state.lock();
        let kept = self.kept(head);
        state.shelf.forget(kept);
        state.stats.lost += state.shelf.trim(self.settings.memory_bytes);
        let first = Tier::ALL.map(|tier| state.shelf.first(tier).unwrap_or(kept[tier as usize]));
        drop(state);
        if let Some(disk) = &mut *disk {
            disk.forget(first);
        }
    }

    /// Answers the query string of a request: sums, averages and quantiles of an account's calls, or of all accounts' (`None`), by
    /// time and by whatever is asked for. Reads files and takes up to some tenths of a second: not for a thread that serves.
    ///
    /// # Errors
    /// `BadInput` that names the parameter, and what it may be.
    pub fn query(&self, account: Option<&AccountId>, query: &str, now: Millis) -> Result<Value> {
        let head = minute_of(now);
        let [minute, hour, day] = self.kept(head);
        let ask = Ask::parse(account, query, head, [minute, hour * 60, day * 1440])?;
        let cover = {
            let state = self.state.lock();
            let fresh: Vec<u32> = state.fresh.iter().map(|(minute, _)| *minute).collect();
            state.shelf.cover(&ask.range, ask.step.unwrap_or(Tier::Day), &fresh)
        };
        let mut answer = Answer::new(&ask);
        for (tier, start) in cover {
            answer.turn_to(tier.span(start).start)?;
            for bytes in self.blocks(tier, start) {
                let added = Block::read(&bytes).and_then(|block| answer.add(&block));
                self.note_damage(added.is_none());
            }
        }
        answer.finish()
    }

    /// What did not go as it should.
    pub fn stats(&self) -> Stats {
        self.state.lock().stats
    }

    /// The first minute, hour and day that are kept.
    fn kept(&self, head: u32) -> [u32; 3] {
        let Settings { minutes_for_hours, hours_for_days, days_for_days, .. } = self.settings;
        let back = |tier: Tier, count: u32| (head / tier.minutes()).saturating_sub(count);
        [
            back(Tier::Minute, minutes_for_hours.max(2).saturating_mul(60)),
            back(Tier::Hour, hours_for_days.max(2).saturating_mul(24)),
            back(Tier::Day, days_for_days.max(2)),
        ]
    }

    /// Makes one block of all there is of a stretch.
    fn close(&self, disk: &mut Option<Disk>, tier: Tier, start: u32) {
        let inputs = self.state.lock().shelf.inputs(tier, start);
        // Room for some more than are kept, so that it is the busiest that stay.
        let (mut table, most) = (Table::default(), self.settings.series);
        for input in &inputs {
            let bytes = disk::read(self.settings.folder.as_deref(), input);
            let merged = bytes.and_then(|bytes| table.merge(&Block::read(&bytes)?, most.saturating_mul(4)));
            self.note_damage(merged.is_none());
        }
        table.shrink(most);
        let block = table.encode();
        let place = match disk {
            None => Place::Held(block.into()),
            Some(disk) => match disk.append_block(tier, start, &block) {
                Ok(place) => place,
                Err(error) => return self.say(Err(error)),
            },
        };
        self.say(Ok(()));
        self.state.lock().shelf.close(tier, start, place);
        if let (Some(disk), Tier::Minute) = (disk, tier) {
            disk.remove_parts(start);
        }
    }

    /// All blocks of a stretch, and what was counted of it since.
    fn blocks(&self, tier: Tier, start: u32) -> Vec<Arc<[u8]>> {
        let folder = self.settings.folder.as_deref();
        let read = || {
            let mut places = self.state.lock().places(tier, start);
            places.drain(..).map(|place| disk::read(folder, &place)).collect::<Vec<_>>()
        };
        let mut blocks = read();
        if blocks.iter().any(Option::is_none) {
            // Its parts may have become a block in between.
            blocks = read();
        }
        self.note_damage(blocks.iter().any(Option::is_none));
        blocks.into_iter().flatten().collect()
    }

    fn note_damage(&self, is_damaged: bool) {
        if is_damaged {
            self.state.lock().stats.damaged += 1;
        }
    }

    /// Says once that the disk fails, and once that it does not any more.
    fn say(&self, outcome: std::io::Result<()>) {
        let was_failing = std::mem::replace(&mut self.state.lock().is_failing, outcome.is_err());
        match outcome {
            Err(error) if !was_failing => {
                warn!(%error, "analytics cannot be written: kept in memory for now; is the disk full?")
            }
            Ok(()) if was_failing => warn!("analytics can be written again"),
            _ => {}
        }
    }
}

impl State {
    /// The minute that a call counts in.
    fn place(&mut self, at: Millis) -> u32 {
        let own = minute_of(at);
        let near = own.clamp(self.head.saturating_sub(OPEN_MINUTES), self.head.saturating_add(1));
        let minute = match self.fresh.iter().any(|(minute, _)| *minute == near) {
            true => near,
            false => self.shelf.first_open(near),
        };
        self.stats.moved += u64::from(minute != own);
        minute
    }

    /// Puts what was counted on the shelf.
    fn make_parts(&mut self) {
        for (minute, table) in self.fresh.drain(..) {
            self.shelf.add_part(minute, Place::Held(table.encode().into()));
        }
    }

    /// Where all of a stretch lies, what was counted since included.
    fn places(&self, tier: Tier, start: u32) -> Vec<Place> {
        let mut places = self.shelf.places(tier, start);
        if tier == Tier::Minute {
            let fresh = self.fresh.iter().filter(|(minute, _)| *minute == start);
            places.extend(fresh.map(|(_, table)| Place::Held(table.encode().into())));
        }
        places
    }
}

fn minute_of(at: Millis) -> u32 {
    // A minute of the year 9,000 has room for its end.
    u32::try_from(at.0 / 60_000).map_or(u32::MAX / 2, |minute| minute.min(u32::MAX / 2))
}

#[cfg(test)]
mod tests;
