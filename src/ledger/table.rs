//! The table of counters. Pure.
//!
//! It is bounded: each new counter looks at two old ones and forgets those that are over; when it is full all the same, the one
//! that ends first goes, except where a call still holds something.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use serde::{Deserialize, Serialize};

use crate::base::Millis;
use crate::ledger::window::{Charge, Counter, Span};

/// Counters that are looked at before one is forgotten that is not over.
const LOOKS: usize = 32;

/// Ids are hashes already.
#[derive(Debug, Clone, Copy, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u128(&mut self, id: u128) {
        self.0 = id as u64 ^ (id >> 64) as u64;
    }
}

/// Counters by id.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Windows {
    counters: HashMap<u128, Counter, BuildHasherDefault<AsIs>>,
    /// All ids, those that were looked at longest ago first.
    #[serde(skip)]
    ring: VecDeque<u128>,
    #[serde(skip)]
    most: usize,
    /// Counters that were forgotten before their end.
    #[serde(skip)]
    forgotten: u32,
}

impl Windows {
    /// Bounds the table.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most.max(1);
        self.ring = self.counters.keys().copied().collect();
    }

    /// The counter as it is, or as it would begin.
    pub(super) fn get(&self, id: u128, span: Span) -> Counter {
        self.counters.get(&id).copied().filter(|counter| counter.span == span).unwrap_or(Counter::new(span))
    }

    /// The counter, made if need be.
    pub(super) fn open(&mut self, id: u128, span: Span, now: Millis) -> &mut Counter {
        if !self.counters.contains_key(&id) {
            self.make_room(now);
            self.ring.push_back(id);
        }
        let epoch = self.forgotten;
        let begin = |epoch| {
            let mut counter = Counter::new(span);
            counter.epoch = epoch;
            counter
        };
        let counter = self.counters.entry(id).or_insert_with(|| begin(epoch));
        if counter.span != span {
            self.forgotten += 1;
            *counter = begin(self.forgotten);
        }
        counter
    }

    /// The counter, if there is one.
    pub(super) fn known(&mut self, id: u128) -> Option<&mut Counter> {
        self.counters.get_mut(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.counters.len()
    }

    /// All there are, and where what begins anew from now on is told from them.
    pub(super) fn all(&mut self) -> impl Iterator<Item = (u128, Span)> {
        self.forgotten = 0;
        self.counters.iter_mut().map(|(id, counter)| {
            counter.epoch = 0;
            (*id, counter.span)
        })
    }

    /// The charge as it is to be settled now.
    pub(super) fn placed(&self, charge: Charge, used: u64) -> Charge {
        self.get(charge.id, charge.terms.span).placed(charge, used)
    }

    pub(super) fn settle(&mut self, charge: &Charge, now: Millis) {
        self.open(charge.id, charge.terms.span, now).settle(charge);
    }

    pub(super) fn release(&mut self, charge: &Charge) {
        if let Some(counter) = self.counters.get_mut(&charge.id) {
            counter.release(charge.index, charge.held);
        }
    }

    /// Looks at two, so that forgetting is never a pause. If that is not enough, at some more: the first to end goes.
    fn make_room(&mut self, now: Millis) {
        let mut first: Option<(Millis, u128)> = None;
        for looked in 0..LOOKS.min(self.ring.len()) {
            if looked >= 2 && self.counters.len() < self.most {
                break;
            }
            let Some(id) = self.ring.pop_front() else { break };
            let Some(counter) = self.counters.get(&id) else { continue };
            if counter.holders > 0 {
                self.ring.push_back(id);
            } else if counter.is_over(now) {
                self.counters.remove(&id);
            } else if let Some(later) = first.replace((counter.ends(), id)) {
                let (sooner, later) =
                    if later.0 < counter.ends() { (later, id) } else { ((counter.ends(), id), later.1) };
                first = Some(sooner);
                self.ring.push_back(later);
            }
        }
        let Some((_, id)) = first else { return };
        if self.counters.len() < self.most {
            self.ring.push_back(id);
        } else {
            self.forgotten += 1;
            self.counters.remove(&id);
        }
    }
}
