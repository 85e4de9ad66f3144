//! What this daemon may take of counters that a fleet shares, without asking anybody. Pure: no clock, no I/O.
//!
//! ```text
//!   reserve ─ leased and left? ── yes ─> taken, at once
//!                 │ no                          looks, in turn: idle? used up soon? over?
//!                 v                                    v
//!               wants ────────────── Ask ──────> the fleet's store ─> Heard ─> leased
//! ```
//!
//! - **The store adds up leases, not spending.** For each stretch of a counter it knows what every daemon has leased, all that was
//!   taken included, and leases no more than the limit. What a daemon takes stays within its lease, so the sum never passes
//!   the limit, however late it is told. What is not taken is given back: when it is idle, when somebody else
//!   lacks it, when its stretch is over.
//! - **Every ask says all of it**: what is kept, what is needed. One that is sent twice, or whose answer is lost, changes nothing.
//!   Until the answer is there, this daemon goes by what it keeps.
//! - **A lease without its daemon counts as taken** until its stretch ends or the daemon is back and says what it has taken.
//!   No clock has to run out for that, so a daemon that is cut off may go on with its lease.
//! - **Leases are small**: what half a second takes at the latest pace, and a share of what is left. Where somebody had to be
//!   refused, each call asks for its own.
//!
//! What is here may all be lost but for the grants, which live in the counters: then the store leases too little for a while.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::base::Millis;
use crate::ledger::ask::{Ask, Heard, Place};
use crate::ledger::claim::Denied;
use crate::ledger::window::{Counter, Span, Technique, Terms};

/// For how long a lease should last at the latest pace, in milliseconds.
const AHEAD: u64 = 500;
/// How long the store is not asked again for what it does not have, in milliseconds.
const DRY: u64 = 100;
/// How long what calls have waited for is not given back, in milliseconds.
const FED: u64 = 100;
/// A pace is that of at least so many milliseconds.
const PACE: u64 = 20;
/// Asks that are made at once.
const AT_ONCE: usize = 256;

/// What a call finds of a counter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// May be taken here and now.
    pub(super) left: u64,
    /// Is left of the limit, as far as it is known here, others' part included.
    pub(super) shown: u64,
}

/// What a call asks of one counter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amount {
    pub(super) wanted: u64,
    /// With less it is refused.
    pub(super) needed: u64,
    /// Whether it goes on without knowing.
    pub(super) is_optional: bool,
}

/// All leases of this daemon.
#[derive(Debug, Clone)]
pub(super) struct Leases {
    /// Without the store, limits count for this daemon alone.
    is_alone: bool,
    /// Whether the store answers.
    is_up: bool,
    /// Whether this daemon knows of all that was taken of long windows before it was started.
    adopts: bool,
    table: HashMap<Place, Lease>,
    /// All of them, those that were looked at longest ago first.
    ring: VecDeque<Place>,
    most: usize,
    /// Whether all is given back, for good.
    is_leaving: bool,
    /// Those that calls wait for.
    wanted: VecDeque<Place>,
    /// Of asks, that was made last.
    round: u64,
}

#[derive(Debug, Clone)]
struct Lease {
    span: Span,
    /// `None`: only what was taken is known.
    terms: Option<Terms>,
    is_in_ring: bool,
    /// Wanted by calls that wait.
    needs: u64,
    /// Whether the store may not know how it stands.
    is_unsure: bool,
    /// When it was looked at, and what was taken then.
    seen: (Millis, u64, u64),
    /// A second.
    pace: u64,
    /// What the store said last.
    told: Option<Heard>,
    /// The latest stretch of which the store must know.
    known_at: Option<u64>,
    dry_until: Millis,
    /// Until then calls may be on their way that waited for what was leased.
    fed_until: Millis,
    /// The last round in which it was looked at.
    round: u64,
}

impl Leases {
    pub(super) fn new(is_alone: bool, adopts: bool, most: usize) -> Self {
        Self {
            is_alone,
            adopts,
            is_up: false,
            table: HashMap::new(),
            ring: VecDeque::new(),
            most: most.max(1),
            wanted: VecDeque::new(),
            round: 0,
            is_leaving: false,
        }
    }

    /// Looks after a counter of which an earlier process has taken.
    pub(super) fn adopt(&mut self, place: Place, span: Span) {
        self.lease(place, span);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The round that has what calls want now; `None` while the store does not answer.
    pub(super) fn round(&self) -> Option<u64> {
        self.is_up.then_some(self.round + 1)
    }

    /// The round of asks that was made last.
    pub(super) fn asked(&self) -> u64 {
        self.round
    }

    /// The store answers and knows of all leases.
    pub(super) fn joined(&mut self) {
        self.is_up = true;
    }

    /// The store does not answer, or does not know what it was told: everything is told anew.
    pub(super) fn parted(&mut self) {
        self.is_up = false;
        self.wanted.clear();
        // Whoever waits for the next one looks again.
        self.round += 1;
        for lease in self.table.values_mut() {
            (lease.needs, lease.is_unsure, lease.known_at) = (0, true, None);
        }
    }

    /// Gives back what is not taken, for good, however fast it was taken until now and whoever has waited for it.
    pub(super) fn leave(&mut self) {
        self.parted();
        self.is_leaving = true;
    }

    /// Looks whether a call may take of a counter; if not, the lease is wanted.
    ///
    /// # Errors
    /// [`Denied::Unleased`].
    pub(super) fn room(
        &mut self,
        place: Place,
        counter: &Counter,
        terms: Terms,
        amount: Amount,
        now: Millis,
    ) -> Result<Room, Denied> {
        let is_up = self.is_up;
        let is_alone = !self.is_leaving && (self.is_alone || amount.is_optional);
        let lease = self.lease(place.clone(), terms.span);
        lease.terms = Some(terms);
        let index = terms.span.index(now);
        let slot = counter.slot(index);
        let left = slot.grant.saturating_sub(slot.taken());
        let shown = lease.known(counter, terms, now).left(terms, now);
        if left >= amount.wanted || amount.needed > terms.limit {
            return Ok(Room { left, shown });
        }
        if !is_up && is_alone {
            return Ok(Room { left: left.max(shown), shown });
        }
        let is_dry = now < lease.dry_until && lease.told.as_ref().is_some_and(|told| told.index == index);
        if (is_up && is_dry) || (!is_up && left >= amount.needed.max(1)) {
            return Ok(Room { left, shown });
        }
        if is_up {
            if lease.needs == 0 {
                self.wanted.push_back(place.clone());
            }
            let lease = self.lease(place, terms.span);
            lease.needs = lease.needs.saturating_add(amount.wanted);
        }
        Err(Denied::Unleased)
    }

    /// A counter as far as it is known here.
    pub(super) fn known(&self, place: &Place, counter: &Counter, terms: Terms, now: Millis) -> Counter {
        self.table.get(place).map_or(*counter, |lease| lease.known(counter, terms, now))
    }

    /// What may be taken of a stretch beyond what is held.
    pub(super) fn spare(&self, place: &Place, counter: &Counter, terms: Terms, index: u64, now: Millis) -> u64 {
        let slot = counter.slot(index);
        let left = slot.grant.saturating_sub(slot.taken());
        match self.table.get(place) {
            Some(lease) if !self.is_up && index == terms.span.index(now) => {
                left.max(lease.known(counter, terms, now).left(terms, now))
            }
            _ => left,
        }
    }

    /// Whether calls wait for it.
    pub(super) fn is_wanted(&self, place: &Place) -> bool {
        self.table.get(place).is_some_and(|lease| lease.needs > 0)
    }

    /// Which are to be looked at in this round: those that calls wait for, and so many in turn.
    pub(super) fn due(&mut self, looks: usize) -> Vec<Place> {
        self.round += 1;
        let waited = self.wanted.len().min(AT_ONCE);
        let mut due: Vec<_> = self.wanted.drain(..waited).collect();
        let looks = looks.min(self.ring.len());
        due.extend(self.ring.drain(..looks));
        for place in &due[waited..] {
            if let Some(lease) = self.table.get_mut(place) {
                lease.is_in_ring = false;
            }
        }
        due
    }

    /// Says what the store is to be asked for a counter, and gives back what is too much. One that is over is forgotten.
    pub(super) fn look(&mut self, place: &Place, counter: Option<&mut Counter>, now: Millis, asks: &mut Vec<Ask>) {
        let Some(lease) = self.table.get_mut(place) else { return };
        // Calls may wait for one whose turn it is as well.
        if std::mem::replace(&mut lease.round, self.round) == self.round {
            return;
        }
        let index = lease.span.index(now);
        let counter = counter.filter(|counter| counter.span == lease.span);
        let is_live = |counter: &Counter| counter.slots().iter().any(|slot| counts(slot.index, index));
        let Some(counter) = counter.filter(|counter| lease.needs > 0 || is_live(counter)) else {
            self.table.remove(place);
            return;
        };
        if !lease.is_in_ring {
            lease.is_in_ring = true;
            self.ring.push_back(place.clone());
        }
        let adopts = self.adopts && lease.span.is_durable();
        let sliding = lease.terms.filter(|terms| terms.technique == Technique::Sliding);
        let mut ask = Ask {
            place: place.clone(),
            span: lease.span,
            index,
            epoch: counter.epoch,
            adopts,
            keep: 0,
            need: 0,
            ahead: 0,
            limit: lease.terms.map(|terms| terms.limit),
            fade: sliding.map(|terms| terms.span.overlap(now)),
        };
        let slots: [_; 3] = std::array::from_fn(|at| counter.slots()[at]);
        for slot in slots.iter().filter(|slot| slot.index < index && counts(slot.index, index)) {
            // Nobody takes of it any more, so what was taken is all that is needed.
            let taken = slot.taken();
            if slot.grant != taken || (lease.is_unsure && (taken > 0 || adopts)) {
                asks.push(Ask { index: slot.index, keep: taken, ..ask.clone() });
                counter.grant(slot.index, taken);
            }
        }
        let slot = counter.slot(index);
        let (taken, grant) = (slot.taken(), slot.grant);
        lease.pace = lease.paced(now, index, taken);
        let is_hungry = lease.told.as_ref().is_some_and(|told| told.index == index && told.is_hungry);
        let ahead = if is_hungry || self.is_leaving { 0 } else { lease.pace.saturating_mul(AHEAD) / 1000 };
        let free = grant.saturating_sub(taken);
        let needs = std::mem::take(&mut lease.needs);
        let is_unsure = std::mem::take(&mut lease.is_unsure) && (taken > 0 || grant > 0 || adopts);
        ask.keep = grant.max(taken);
        if needs > 0 {
            ask.need = taken.saturating_add(needs).saturating_sub(ask.keep);
            ask.ahead = ahead;
            lease.fed_until = Millis(now.0.saturating_add(FED));
        } else if (now >= lease.fed_until || self.is_leaving) && free > ahead.saturating_mul(2) {
            ask.keep = taken.saturating_add(ahead);
            counter.grant(index, ask.keep);
        } else if self.is_up && free < ahead / 2 && now >= lease.dry_until {
            ask.ahead = ahead - free;
        } else if taken <= grant && !is_unsure {
            return;
        }
        asks.push(ask);
    }

    /// Takes in what the store said. `false`: it has forgotten what it knew.
    pub(super) fn hear(&mut self, heard: &Heard, counter: &mut Counter, now: Millis) -> bool {
        let Some(lease) = self.table.get_mut(&heard.place) else { return true };
        let latest = counter.slots()[0].index;
        let is_there = heard.index > latest || counter.slots().iter().any(|slot| slot.index == heard.index);
        if counter.epoch != heard.epoch || counter.span != lease.span || !is_there {
            return true;
        }
        let was_known = lease.known_at == Some(heard.index);
        counter.grant(heard.index, heard.grant);
        if lease.told.as_ref().is_none_or(|told| told.index <= heard.index) {
            lease.dry_until = if heard.is_short { Millis(now.0.saturating_add(DRY)) } else { Millis(0) };
            lease.told = Some(heard.clone());
            lease.known_at = Some(heard.index);
        }
        heard.is_known || !was_known
    }

    fn lease(&mut self, place: Place, span: Span) -> &mut Lease {
        if self.table.len() >= self.most && !self.table.contains_key(&place) {
            // Its grant stays in its counter.
            if let Some(oldest) = self.ring.pop_front() {
                self.table.remove(&oldest);
            }
        }
        match self.table.entry(place) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(empty) => {
                self.ring.push_back(empty.key().clone());
                empty.insert(Lease {
                    span,
                    terms: None,
                    needs: 0,
                    is_in_ring: true,
                    is_unsure: true,
                    seen: (Millis(0), 0, 0),
                    pace: 0,
                    told: None,
                    known_at: None,
                    dry_until: Millis(0),
                    fed_until: Millis(0),
                    round: 0,
                })
            }
        }
    }
}

impl Lease {
    /// The counter with what others had of it when the store last said so.
    fn known(&self, counter: &Counter, terms: Terms, now: Millis) -> Counter {
        let index = terms.span.index(now);
        let mut known = Counter::new(terms.span);
        let all =
            |told: &Heard| told.others.saturating_add(told.carried).saturating_add(counter.slot(told.index).taken());
        match &self.told {
            Some(told) if told.index == index => {
                known.put(index.saturating_sub(1), told.before);
                known.put(index, all(told));
                return known;
            }
            Some(told) if told.index < index => known.put(told.index, all(told)),
            _ => known.put(index.saturating_sub(1), counter.slot(index.saturating_sub(1)).taken()),
        }
        known.add(terms, now, counter.slot(index).taken());
        known
    }

    /// What is taken a second of late: rises at once, and falls slowly.
    fn paced(&mut self, now: Millis, index: u64, taken: u64) -> u64 {
        let (at, of, before) = self.seen;
        let elapsed = now.0.saturating_sub(at.0);
        if of == index && elapsed < PACE {
            return self.pace;
        }
        self.seen = (now, index, taken);
        if of != index {
            return self.pace;
        }
        match taken.saturating_sub(before).saturating_mul(1000) / elapsed.max(1) {
            0 => self.pace / 8,
            fresh => fresh.max(self.pace / 2),
        }
    }
}

/// Whether a stretch still matters to the fleet.
fn counts(index: u64, now: u64) -> bool {
    index > 0 && index.saturating_add(2) >= now
}

#[cfg(test)]
#[path = "lease_test.rs"]
mod tests;
