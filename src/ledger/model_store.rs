//! The fleet's store as a few lines of Rust: what `fleet.lua` says, for tests. That both say the same is a test of its own.

use std::collections::HashMap;

use crate::ledger::ask::{Ask, Heard, Place};

/// See the top of this file.
#[derive(Default)]
pub(super) struct ModelStore {
    stretches: HashMap<(Place, u64), Stretch>,
}

#[derive(Default, Clone)]
struct Stretch {
    leased: u64,
    carried: u64,
    is_hungry: bool,
    /// Process, ask and lease by daemon.
    records: HashMap<String, (u64, u64, u64)>,
}

/// Of what is left a daemon leases at most a tenth ahead of need.
pub(super) const SHARE: f64 = 0.1;

impl ModelStore {
    /// `None`: a later ask was answered before.
    pub(super) fn answer(&mut self, (daemon, process, count): (&str, u64, u64), ask: &Ask) -> Option<Heard> {
        let before = |back: u64| self.stretches.get(&(ask.place.clone(), ask.index.saturating_sub(back))).cloned();
        let (one, two) = (before(1), before(2).unwrap_or_default());
        let key = (ask.place.clone(), ask.index);
        let stretch = self.stretches.entry(key).or_default();
        let name = if ask.epoch == 0 { daemon.to_owned() } else { format!("{daemon}/{process}/{}", ask.epoch) };
        let record = stretch.records.get(&name).copied();
        if record.is_some_and(|(of, at, _)| of > process || (of == process && at > count)) {
            return None;
        }
        let is_known = record.is_some_and(|(of, ..)| of == process);
        let mine = record.filter(|_| is_known || ask.adopts).map_or(0, |(.., lease)| lease);
        let others = stretch.leased - mine;
        let leased_before = one.as_ref().map_or(0, |one| one.leased);
        let (mut carried, mut faded) = (0, 0);
        if let Some((overlap, length)) = ask.fade {
            faded = (leased_before * overlap).div_ceil(length);
        } else if let Some(limit) = ask.limit {
            carried = match &one {
                Some(one) => (one.leased + one.carried).saturating_sub(limit),
                None => (two.leased + two.carried).saturating_sub(2 * limit),
            };
            stretch.carried = carried;
        }
        let (mut lease, mut is_short) = (ask.keep, false);
        if let Some(limit) = ask.limit.filter(|_| ask.need + ask.ahead > 0) {
            let room = limit.saturating_sub(carried + faded + others + ask.keep);
            if room < ask.need {
                (lease, is_short, stretch.is_hungry) = (ask.keep + room, true, true);
            } else {
                let spare = ((room - ask.need) as f64 * SHARE) as u64;
                if stretch.is_hungry && spare as f64 > limit as f64 * SHARE / 2.0 {
                    stretch.is_hungry = false;
                }
                lease += ask.need + if stretch.is_hungry { 0 } else { ask.ahead.min(spare) };
            }
        }
        stretch.leased = others + lease;
        stretch.records.insert(name, (process, count, lease));
        Some(Heard {
            place: ask.place.clone(),
            index: ask.index,
            epoch: ask.epoch,
            grant: lease,
            others,
            carried,
            before: leased_before,
            is_short,
            is_hungry: stretch.is_hungry,
            is_known,
        })
    }

    /// What a daemon has of a window.
    pub(super) fn lease(&self, window: &u128, index: u64, daemon: &str) -> u64 {
        let stretches = self.stretches.iter();
        let mut found =
            stretches.filter(|((place, of), _)| *of == index && matches!(place, Place::Window(id, _) if id == window));
        found.next().and_then(|(_, stretch)| stretch.records.get(daemon)).map_or(0, |(.., lease)| *lease)
    }
}
