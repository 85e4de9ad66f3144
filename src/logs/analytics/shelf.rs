//! Which stretches of time there is something of, and where it lies.
//!
//! ```text
//!  minute:  open: part, part, part … ──sealed, merged──> closed: one block ─┐
//!  hour:                                                  one block  <──────┴ 60 of them, once all are closed ─┐
//!  day:                                                   one block  <──────────────────────────── 24 hours ───┘
//! ```
//!
//! What is closed never changes. So a minute whose block is there, or that of its hour or day, takes no more calls, and no call
//! is ever counted in two blocks of one tier, whenever the daemon is killed.
//!
//! Pure: no clock, no files.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

/// How long a stretch of time is. Times are counted in these, from 1970: the 29,000,000th minute.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Tier {
    Minute,
    Hour,
    Day,
}

impl Tier {
    pub(super) const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    pub(super) const fn minutes(self) -> u32 {
        match self {
            Self::Minute => 1,
            Self::Hour => 60,
            Self::Day => 1440,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// The minutes of its `start`th stretch.
    pub(super) const fn span(self, start: u32) -> Range<u32> {
        start * self.minutes()..(start + 1) * self.minutes()
    }
}

/// Where a block lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Held(Arc<[u8]>),
    Stored { file: File, at: u64, length: usize },
}

/// A file of blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum File {
    /// The parts of an open minute.
    Parts(u32),
    /// So many stretches of a tier, by number.
    Blocks(Tier, u32),
}

#[derive(Debug)]
enum Minute {
    Open { parts: Vec<Place>, is_sealed: bool },
    Closed(Place),
}

/// See the top of this file.
#[derive(Default, Debug)]
pub(super) struct Shelf {
    minutes: BTreeMap<u32, Minute>,
    hours: BTreeMap<u32, Place>,
    days: BTreeMap<u32, Place>,
}

impl Shelf {
    /// The first minute from this one on that takes calls.
    pub(super) fn first_open(&self, mut minute: u32) -> u32 {
        loop {
            if self.days.contains_key(&(minute / 1440)) {
                minute = (minute / 1440 + 1) * 1440;
            } else if self.hours.contains_key(&(minute / 60)) {
                minute = (minute / 60 + 1) * 60;
            } else if matches!(
                self.minutes.get(&minute),
                Some(Minute::Closed(_) | Minute::Open { is_sealed: true, .. })
            ) {
                minute += 1;
            } else {
                return minute;
            }
        }
    }

    /// One more part of an open minute.
    pub(super) fn add_part(&mut self, minute: u32, place: Place) {
        let open = || Minute::Open { parts: Vec::new(), is_sealed: false };
        if let Minute::Open { parts, .. } = self.minutes.entry(minute).or_insert_with(open) {
            parts.push(place);
        }
    }

    /// The parts that are in memory only: minute, which of its parts, and the part.
    pub(super) fn held_parts(&self) -> Vec<(u32, usize, Arc<[u8]>)> {
        let mut held = Vec::new();
        for (minute, state) in &self.minutes {
            let Minute::Open { parts, is_sealed: false } = state else { continue };
            held.extend(parts.iter().enumerate().filter_map(|(index, part)| match part {
                Place::Held(bytes) => Some((*minute, index, bytes.clone())),
                Place::Stored { .. } => None,
            }));
        }
        held
    }

    /// A part has come to lie elsewhere.
    pub(super) fn move_part(&mut self, minute: u32, index: usize, place: Place) {
        if let Some(Minute::Open { parts, .. }) = self.minutes.get_mut(&minute)
            && let Some(part) = parts.get_mut(index)
        {
            *part = place;
        }
    }

    /// Minutes before `minute` take no more calls from now on: those of them that are still to be closed.
    pub(super) fn seal(&mut self, minute: u32) -> Vec<u32> {
        let mut sealed = Vec::new();
        for (minute, state) in self.minutes.range_mut(..minute) {
            if let Minute::Open { is_sealed, .. } = state {
                *is_sealed = true;
                sealed.push(*minute);
            }
        }
        sealed
    }

    /// Hours or days that end before `minute`, have no block, and have nothing open in them.
    pub(super) fn to_close(&self, tier: Tier, minute: u32) -> BTreeSet<u32> {
        let ends = |start: &u32| tier.span(*start).end <= minute;
        match tier {
            Tier::Minute => BTreeSet::new(),
            Tier::Hour => {
                let hours = self.minutes.keys().map(|minute| minute / 60);
                let hours = hours.filter(|hour| {
                    ends(hour) && !self.hours.contains_key(hour) && !self.days.contains_key(&(hour / 24))
                });
                let mut hours: BTreeSet<u32> = hours.collect();
                for (minute, state) in &self.minutes {
                    if matches!(state, Minute::Open { .. }) {
                        hours.remove(&(minute / 60));
                    }
                }
                hours
            }
            Tier::Day => {
                let days = self.hours.keys().map(|hour| hour / 24);
                let mut days: BTreeSet<u32> = days.filter(|day| ends(day) && !self.days.contains_key(day)).collect();
                for minute in self.minutes.keys().filter(|minute| !self.hours.contains_key(&(*minute / 60))) {
                    days.remove(&(minute / 1440));
                }
                days
            }
        }
    }

    /// All that is to be merged into a block of this stretch.
    pub(super) fn inputs(&self, tier: Tier, start: u32) -> Vec<Place> {
        match tier {
            Tier::Minute => self.places(tier, start),
            Tier::Hour => Tier::Hour.span(start).flat_map(|minute| self.places(Tier::Minute, minute)).collect(),
            Tier::Day => self.hours.range(start * 24..(start + 1) * 24).map(|(_, place)| place.clone()).collect(),
        }
    }

    /// A stretch is closed; a minute's parts are forgotten.
    pub(super) fn close(&mut self, tier: Tier, start: u32, place: Place) {
        match tier {
            Tier::Minute => drop(self.minutes.insert(start, Minute::Closed(place))),
            Tier::Hour => drop(self.hours.insert(start, place)),
            Tier::Day => drop(self.days.insert(start, place)),
        }
    }

    /// Where all of a stretch lies.
    pub(super) fn places(&self, tier: Tier, start: u32) -> Vec<Place> {
        let closed = match tier {
            Tier::Minute => match self.minutes.get(&start) {
                Some(Minute::Open { parts, .. }) => return parts.clone(),
                Some(Minute::Closed(place)) => Some(place),
                None => None,
            },
            Tier::Hour => self.hours.get(&start),
            Tier::Day => self.days.get(&start),
        };
        closed.cloned().into_iter().collect()
    }

    /// Stretches that make up these minutes without overlap, none longer than `step`, by time. Minutes in `fresh` may have
    /// nothing on the shelf yet.
    pub(super) fn cover(&self, range: &Range<u32>, step: Tier, fresh: &[u32]) -> Vec<(Tier, u32)> {
        let inside = |tier: Tier, start: u32| {
            let span = tier.span(start);
            range.start <= span.start && span.end <= range.end
        };
        let whole = |tier: Tier| range.start / tier.minutes()..range.end.div_ceil(tier.minutes());
        let mut cover = Vec::new();
        if step >= Tier::Day {
            cover.extend(self.days.range(whole(Tier::Day)).map(|(day, _)| (Tier::Day, *day)));
            cover.retain(|(tier, day)| inside(*tier, *day));
        }
        let days: BTreeSet<u32> = cover.iter().map(|(_, day)| *day).collect();
        if step >= Tier::Hour {
            let hours = self.hours.range(whole(Tier::Hour)).map(|(hour, _)| *hour);
            let hours = hours.filter(|hour| inside(Tier::Hour, *hour) && !days.contains(&(hour / 24)));
            cover.extend(hours.map(|hour| (Tier::Hour, hour)));
        }
        let hours: BTreeSet<u32> =
            cover.iter().filter(|(tier, _)| *tier == Tier::Hour).map(|(_, hour)| *hour).collect();
        let minutes: BTreeSet<u32> = self.minutes.range(range.clone()).map(|(minute, _)| *minute).collect();
        let fresh = fresh.iter().copied().filter(|minute| range.contains(minute)).collect();
        let minutes = minutes.union(&fresh).copied();
        let minutes = minutes.filter(|minute| !days.contains(&(minute / 1440)) && !hours.contains(&(minute / 60)));
        cover.extend(minutes.map(|minute| (Tier::Minute, minute)));
        cover.sort_unstable_by_key(|(tier, start)| tier.span(*start).start);
        cover
    }

    /// Forgets what is older than the first minute, hour and day that are kept.
    pub(super) fn forget(&mut self, kept: [u32; 3]) {
        let [minute, hour, day] = kept;
        // What is not in an hour or a day yet stays until it is.
        self.minutes.retain(|start, _| *start >= minute || !self.hours.contains_key(&(start / 60)));
        self.hours.retain(|start, _| *start >= hour || !self.days.contains_key(&(start / 24)));
        self.days.retain(|start, _| *start >= day);
    }

    /// The first stretch of a tier that there is.
    pub(super) fn first(&self, tier: Tier) -> Option<u32> {
        match tier {
            Tier::Minute => self.minutes.keys().next().copied(),
            Tier::Hour => self.hours.keys().next().copied(),
            Tier::Day => self.days.keys().next().copied(),
        }
    }

    /// Bytes of what is in memory only.
    pub(super) fn held_bytes(&self) -> usize {
        let blocks = self.hours.values().chain(self.days.values());
        self.minutes.values().map(Minute::held_bytes).chain(blocks.map(Place::held_bytes)).sum()
    }

    /// Gives up the oldest of what is in memory only, minutes first, until it is this small. How many stretches it were whose calls
    /// are in no longer one either.
    pub(super) fn trim(&mut self, bytes: usize) -> u64 {
        let mut left = self.held_bytes();
        let mut lost = 0;
        let mut goes = |held: usize, is_kept_elsewhere: bool| {
            let goes = left > bytes && held > 0;
            if goes {
                left -= held;
                lost += u64::from(!is_kept_elsewhere);
            }
            goes
        };
        let Self { minutes, hours, days } = self;
        minutes.retain(|start, state| !goes(state.held_bytes(), hours.contains_key(&(start / 60))));
        hours.retain(|start, place| !goes(place.held_bytes(), days.contains_key(&(start / 24))));
        days.retain(|_, place| !goes(place.held_bytes(), false));
        lost
    }
}

impl Minute {
    fn held_bytes(&self) -> usize {
        match self {
            Self::Open { parts, .. } => parts.iter().map(Place::held_bytes).sum(),
            Self::Closed(place) => place.held_bytes(),
        }
    }
}

impl Place {
    fn held_bytes(&self) -> usize {
        match self {
            Self::Held(bytes) => bytes.len(),
            Self::Stored { .. } => 0,
        }
    }
}

#[cfg(test)]
#[path = "shelf_test.rs"]
mod tests;
