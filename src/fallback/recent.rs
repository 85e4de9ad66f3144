//! Counts of the last half minute that any thread may add to: eight slots of four seconds, each one atomic word.
//!
//!     now --> slot (now / 4 s) % 8:  [which four seconds | how many]
//!
//! A slot of an earlier round is begun anew by whoever comes first. Takes `now`; knows no clock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::base::Millis;

const SLOTS: usize = 8;
const SLOT_MS: u64 = 4000;

/// The time that is looked back at, in milliseconds.
pub(super) const WINDOW_MS: u64 = SLOTS as u64 * SLOT_MS;

#[derive(Debug, Default)]
pub(super) struct Recent {
    slots: [AtomicU64; SLOTS],
}

impl Recent {
    pub(super) fn add(&self, now: Millis) {
        let tick = tick(now);
        self.change(tick, |word| {
            // A thread whose clock is behind adds to the slot as it is.
            if tick_of(word) >= tick { word.saturating_add(1) } else { (tick << 32) | 1 }
        });
    }

    /// Undoes one `add` of the same moment.
    pub(super) fn take_back(&self, now: Millis) {
        self.change(tick(now), |word| if word & u64::from(u32::MAX) > 0 { word - 1 } else { word });
    }

    pub(super) fn sum(&self, now: Millis) -> u32 {
        let oldest = tick(now).saturating_sub(SLOTS as u64 - 1);
        let words = self.slots.iter().map(|slot| slot.load(Relaxed)).filter(|word| tick_of(*word) >= oldest);
        words.fold(0_u32, |sum, word| sum.saturating_add(word as u32))
    }

    pub(super) fn clear(&self) {
        self.slots.iter().for_each(|slot| slot.store(0, Relaxed));
    }

    fn change(&self, tick: u64, change: impl Fn(u64) -> u64) {
        let slot = &self.slots[tick as usize % SLOTS];
        // Never `None`, so never an error.
        let _ = slot.fetch_update(Relaxed, Relaxed, |word| Some(change(word)));
    }
}

fn tick(now: Millis) -> u64 {
    now.0 / SLOT_MS
}

fn tick_of(word: u64) -> u64 {
    word >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_leave_when_their_time_has_passed() {
        let recent = Recent::default();
        let start = 1_700_000_000_000;
        let sum = |after: u64| recent.sum(Millis(start + after));
        recent.add(Millis(start));
        recent.add(Millis(start + 10));
        recent.add(Millis(start + 9_000));
        assert_eq!((sum(9_000), sum(WINDOW_MS - SLOT_MS), sum(WINDOW_MS + SLOT_MS), sum(10 * WINDOW_MS)), (3, 3, 1, 0));
        recent.add(Millis(start + 3 * WINDOW_MS));
        assert_eq!(sum(3 * WINDOW_MS), 1);
        recent.take_back(Millis(start + 3 * WINDOW_MS));
        recent.take_back(Millis(start + 3 * WINDOW_MS));
        assert_eq!(sum(3 * WINDOW_MS), 0);
    }

    #[test]
    fn no_count_is_lost_between_threads() {
        let recent = Recent::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| recent.add(Millis(5))));
            }
        });
        assert_eq!(recent.sum(Millis(5)), 40_000);
        recent.clear();
        assert_eq!(recent.sum(Millis(5)), 0);
    }
}
