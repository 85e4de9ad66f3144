//! Counters of what passed in a stretch of time. Pure: `now` comes in as a value.
//!
//! ```text
//!   fixed     |····used····held··|            one stretch a number, aligned to the clock; what settles beyond the limit
//!                                             is carried into the next
//!   sliding   |  before: a part  |  now  |    the stretch before counts by how much of it still overlaps
//! ```
//!
//! A counter knows the three latest stretches. So a call that ends in the next one is charged where it began, and a clock that is set back
//! finds what it had counted instead of beginning anew.
//!
//! Where a fleet shares a counter, each stretch also has what of it is leased to this daemon (`lease.rs`), which is all that may be taken of it
//! here; carrying and fading are then the fleet's.

use serde::{Deserialize, Serialize};

use crate::base::Millis;

/// A window that is longer survives a restart, in milliseconds.
const DURABLE: u64 = 3_600_000;
/// For so many milliseconds such a window is kept when it is over.
const GRACE: u64 = 48 * 3_600_000;

/// How long a window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Span {
    /// So many milliseconds, aligned to multiples of them since 1970. Zero is taken for one.
    Millis(u64),
    /// A calendar month, UTC.
    Month,
}

impl Span {
    /// A day, UTC.
    pub const DAY: Self = Self::Millis(86_400_000);

    /// Whether its counts survive a restart.
    pub const fn is_durable(self) -> bool {
        match self {
            Self::Millis(length) => length > DURABLE,
            Self::Month => true,
        }
    }

    pub(super) fn index(self, now: Millis) -> u64 {
        match self {
            Self::Millis(length) => now.0 / length.max(1),
            Self::Month => {
                let now = i64::try_from(now.0).ok().and_then(|now| jiff::Timestamp::from_millisecond(now).ok());
                let date = jiff::tz::Offset::UTC.to_datetime(now.unwrap_or(jiff::Timestamp::MAX));
                date.year() as u64 * 12 + date.month() as u64 - 1
            }
        }
    }

    pub(super) fn start(self, index: u64) -> Millis {
        match self {
            Self::Millis(length) => Millis(index.saturating_mul(length.max(1))),
            Self::Month => {
                let date = jiff::civil::Date::new((index / 12) as i16, (index % 12 + 1) as i8, 1).ok();
                let time =
                    date.and_then(|date| jiff::tz::Offset::UTC.to_timestamp(date.to_datetime(Default::default())).ok());
                Millis(time.map_or(u64::MAX, |time| time.as_millisecond() as u64))
            }
        }
    }

    /// How much of the stretch before lies within one length of now, and that length.
    pub(super) fn overlap(self, now: Millis) -> (u64, u64) {
        let (passed, length) = self.within(now);
        (length - passed, length)
    }

    /// Milliseconds that have passed of the stretch, and its length.
    fn within(self, now: Millis) -> (u64, u64) {
        let index = self.index(now);
        let start = self.start(index).0;
        (now.0 - start, self.start(index + 1).0 - start)
    }
}

/// How a window moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Technique {
    /// Stretches lie end to end on the clock.
    Fixed,
    /// The stretch before counts by its overlap.
    Sliding,
}

/// What a counter is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Terms {
    pub(super) limit: u64,
    pub(super) span: Span,
    pub(super) technique: Technique,
}

/// What one call holds of one counter, and adds to it when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Charge {
    pub(super) id: u128,
    pub(super) terms: Terms,
    /// The stretch in which it was reserved.
    pub(super) index: u64,
    /// What is held for it there.
    pub(super) held: u64,
    /// What it has used of that stretch.
    pub(super) used: u64,
    /// The latest stretch when it ended.
    pub(super) latest: u64,
    /// What counts there, because it does not fit where it was reserved.
    pub(super) beyond: u64,
}

impl Terms {
    /// Of what this daemon takes of a counter that a fleet shares: the fleet knows the limit.
    pub(super) const fn leased(span: Span) -> Self {
        Self { limit: u64::MAX, span, technique: Technique::Fixed }
    }
}

impl Charge {
    pub(super) fn held(id: u128, terms: Terms, index: u64, held: u64) -> Self {
        Self { id, terms, index, held, used: 0, latest: index, beyond: 0 }
    }

    pub(super) fn used(id: u128, terms: Terms, index: u64, used: u64) -> Self {
        Self { used, ..Self::held(id, terms, index, 0) }
    }
}

/// One stretch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) index: u64,
    pub(super) used: u64,
    /// By calls that have not ended; those of an earlier process are refunded.
    #[serde(skip)]
    pub(super) held: u64,
    /// What of it is leased to this daemon, all that was taken included.
    #[serde(skip)]
    pub(super) grant: u64,
}

impl Slot {
    /// Used, or held.
    pub(super) fn taken(&self) -> u64 {
        self.used.saturating_add(self.held)
    }
}

/// What passed lately, under one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    pub(super) span: Span,
    /// Latest first.
    slots: [Slot; 3],
    /// Calls that hold something of it.
    #[serde(skip)]
    pub(super) holders: u32,
    /// How many counters had been forgotten before their end when this one began: one of its id may be among them.
    #[serde(skip)]
    pub(super) epoch: u32,
}

impl Counter {
    pub(super) const fn new(span: Span) -> Self {
        Self { span, slots: [Slot { index: 0, used: 0, held: 0, grant: 0 }; 3], holders: 0, epoch: 0 }
    }

    /// The latest stretches, latest first.
    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// One stretch, as far as this counter has one.
    pub(super) fn slot(&self, index: u64) -> Slot {
        self.slots.iter().find(|slot| slot.index == index).copied().unwrap_or(Slot { index, ..Slot::default() })
    }

    /// Says what of a stretch is leased.
    pub(super) fn grant(&mut self, index: u64, grant: u64) {
        self.open(Terms::leased(self.span), index).grant = grant;
    }

    /// Puts down what was counted elsewhere.
    pub(super) fn put(&mut self, index: u64, used: u64) {
        self.open(Terms::leased(self.span), index).used = used;
    }

    /// What was used in one stretch.
    pub(super) fn used(&self, index: u64) -> u64 {
        self.slots.iter().find(|slot| slot.index == index).map_or(0, |slot| slot.used)
    }

    /// How much may still pass.
    pub(super) fn left(&self, terms: Terms, now: Millis) -> u64 {
        let slot = self.opened(terms, terms.span.index(now));
        terms.limit.saturating_sub(self.faded(terms, now).saturating_add(slot.used).saturating_add(slot.held))
    }

    /// Milliseconds until `amount` may pass, if nobody else takes it.
    pub(super) fn wait(&self, terms: Terms, now: Millis, amount: u64) -> Option<u64> {
        let Terms { limit, span, technique } = terms;
        if amount > limit || limit == 0 {
            return None;
        }
        let index = span.index(now);
        let slot = self.opened(terms, index);
        let (passed, length) = span.within(now);
        if technique == Technique::Fixed {
            // Each stretch takes its limit off what is carried.
            let stretches = slot.used.saturating_add(amount).saturating_sub(limit).div_ceil(limit).max(1);
            return Some(span.start(index.saturating_add(stretches)).0 - now.0);
        }
        let count = slot.used.saturating_add(slot.held);
        Some(match limit.checked_sub(count.saturating_add(amount)) {
            Some(room) => fades(self.before(index), room, length).saturating_sub(passed),
            // Not before the stretch of now fades itself.
            None => length - passed + fades(count, limit - amount, length),
        })
    }

    /// Holds an amount and says in which stretch.
    pub(super) fn hold(&mut self, terms: Terms, now: Millis, amount: u64) -> u64 {
        self.holders += 1;
        let slot = self.open(terms, terms.span.index(now));
        slot.held = slot.held.saturating_add(amount);
        slot.index
    }

    /// Charges at once, and says in which stretch.
    pub(super) fn add(&mut self, terms: Terms, now: Millis, amount: u64) -> u64 {
        let slot = self.open(terms, terms.span.index(now));
        slot.used = slot.used.saturating_add(amount);
        slot.index
    }

    /// Where a call that ends now is charged: where it was reserved. In a stretch that is over only the limit can still be used
    /// up, and what is beyond counts in the latest; of one that is forgotten, what is beyond the estimate.
    pub(super) fn placed(&self, charge: Charge, used: u64) -> Charge {
        let latest = self.slots[0].index.max(charge.index);
        if charge.index == latest {
            return Charge { used, ..charge };
        }
        let room = match charge.terms.technique {
            _ if charge.index < self.slots[2].index => {
                let used = used.saturating_sub(charge.held);
                return Charge { index: latest, held: 0, used, latest, ..charge };
            }
            Technique::Fixed => charge.terms.limit.saturating_sub(self.opened(charge.terms, charge.index).used),
            Technique::Sliding => used,
        };
        Charge { used: used.min(room), latest, beyond: used.saturating_sub(room), ..charge }
    }

    /// Turns what was held into what was used.
    pub(super) fn settle(&mut self, charge: &Charge) {
        self.holders = self.holders.saturating_sub(1);
        let slot = self.open(charge.terms, charge.index);
        slot.held = slot.held.saturating_sub(charge.held);
        slot.used = slot.used.saturating_add(charge.used);
        if charge.beyond > 0 {
            let latest = self.open(charge.terms, charge.latest);
            latest.used = latest.used.saturating_add(charge.beyond);
        }
    }

    /// Gives back what was held.
    pub(super) fn release(&mut self, index: u64, held: u64) {
        self.holders = self.holders.saturating_sub(1);
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.index == index) {
            slot.held = slot.held.saturating_sub(held);
        }
    }

    /// Whether nothing of it counts any more. A long one waits for calls that settle late: the journal does not know of them
    /// before.
    pub(super) fn is_over(&self, now: Millis) -> bool {
        let grace = if self.span.is_durable() { GRACE } else { 0 };
        self.ends().0.saturating_add(grace) <= now.0
    }

    /// What is carried reaches into the stretch after the latest.
    pub(super) fn ends(&self) -> Millis {
        self.span.start(self.slots[0].index.saturating_add(2))
    }

    /// What the stretch before weighs now, rounded up.
    fn faded(&self, terms: Terms, now: Millis) -> u64 {
        if terms.technique == Technique::Fixed {
            return 0;
        }
        let before = self.before(terms.span.index(now));
        if before == 0 {
            return 0;
        }
        let (passed, length) = terms.span.within(now);
        let faded = (u128::from(before) * u128::from(length - passed)).div_ceil(u128::from(length));
        u64::try_from(faded).unwrap_or(u64::MAX)
    }

    /// All that counted in the stretch before.
    fn before(&self, index: u64) -> u64 {
        let before = self.slots.iter().find(|slot| slot.index.checked_add(1) == Some(index));
        before.map_or(0, |slot| slot.used.saturating_add(slot.held))
    }

    /// The stretch as it is, or as it would begin.
    fn opened(&self, terms: Terms, index: u64) -> Slot {
        if let Some(slot) = self.slots.iter().find(|slot| slot.index == index) {
            return *slot;
        }
        let before = self.slots.iter().find(|slot| slot.index < index);
        let carried = match (terms.technique, before) {
            (Technique::Fixed, Some(before)) => {
                before.used.saturating_sub(terms.limit.saturating_mul(index - before.index))
            }
            _ => 0,
        };
        Slot { index, used: carried, ..Slot::default() }
    }

    fn open(&mut self, terms: Terms, index: u64) -> &mut Slot {
        if let Some(at) = self.slots.iter().position(|slot| slot.index == index) {
            return &mut self.slots[at];
        }
        let slot = self.opened(terms, index);
        let at = self.slots.iter().filter(|slot| slot.index > index).count().min(2);
        // The earliest goes.
        self.slots[at..].rotate_right(1);
        self.slots[at] = slot;
        &mut self.slots[at]
    }
}

/// When of `count` no more than `room` is left, in milliseconds of a stretch over which it fades.
fn fades(count: u64, room: u64, length: u64) -> u64 {
    let overlap = (u128::from(room) * u128::from(length)).checked_div(u128::from(count));
    length - overlap.and_then(|overlap| u64::try_from(overlap).ok()).map_or(length, |overlap| overlap.min(length))
}
