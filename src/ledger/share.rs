//! The book's counters where a fleet shares them: which lease a call takes of, what the store is asked, what it says. Pure.

use crate::base::Millis;
use crate::ledger::ask::{Ask, Heard, Place};
use crate::ledger::book::Book;
use crate::ledger::claim::{Denied, Window};
use crate::ledger::lease::{Amount, Leases, Room};
use crate::ledger::window::{Counter, Span, Terms};

impl Book {
    /// Shares its counters with other daemons from now on. `is_alone`: while the fleet's store does not answer, limits count for this
    /// daemon alone.
    pub(super) fn share(&mut self, is_alone: bool, most: usize) {
        let mut leases = Leases::new(is_alone, self.windows.len() < most, most);
        for (id, span) in self.windows.all().filter(|(_, span)| span.is_durable()) {
            leases.adopt(Place::Window(id, span), span);
        }
        for account in self.accounts.keys() {
            leases.adopt(Place::Allocation(account.clone()), Span::DAY);
        }
        self.leases = Some(Box::new(leases));
    }

    /// What it may take of what it shares.
    pub(super) fn leases(&mut self) -> Option<&mut Leases> {
        self.leases.as_deref_mut()
    }

    /// What is to be asked of the fleet's store: for calls that wait, and for some counters in turn.
    pub(super) fn asks(&mut self, now: Millis, looks: usize) -> Vec<Ask> {
        let mut asks = Vec::new();
        let Some(leases) = &mut self.leases else { return asks };
        for place in leases.due(looks) {
            let counter = match &place {
                Place::Window(id, span) if leases.is_wanted(&place) => Some(self.windows.open(*id, *span, now)),
                Place::Window(id, _) => self.windows.known(*id),
                Place::Allocation(account) if leases.is_wanted(&place) => {
                    Some(&mut self.accounts.entry(account.clone()).or_default().free)
                }
                Place::Allocation(account) => self.accounts.get_mut(account).map(|account| &mut account.free),
            };
            leases.look(&place, counter, now, &mut asks);
        }
        asks
    }

    /// Takes in what the fleet's store said. `false`: it has forgotten what it was told.
    pub(super) fn hear(&mut self, heard: &Heard, now: Millis) -> bool {
        let Some(leases) = &mut self.leases else { return true };
        let counter = match &heard.place {
            Place::Window(id, _) => self.windows.known(*id),
            Place::Allocation(account) => self.accounts.get_mut(account).map(|account| &mut account.free),
        };
        counter.is_none_or(|counter| leases.hear(heard, counter, now))
    }

    /// Whether a window has something left.
    ///
    /// # Errors
    /// [`Denied::Unleased`].
    pub(super) fn has_room(&mut self, window: &Window, now: Millis) -> Result<bool, Denied> {
        let counter = self.windows.get(window.id, window.span);
        let amount = Amount { wanted: 1, needed: 1, is_optional: false };
        let room = self.room(|| Place::Window(window.id, window.span), &counter, window.terms(), amount, now)?;
        Ok(room.left > 0)
    }

    /// A counter as far as it is known, others' part included.
    pub(super) fn known(&self, place: &Place, counter: &Counter, terms: Terms, now: Millis) -> Counter {
        self.leases.as_ref().map_or(*counter, |leases| leases.known(place, counter, terms, now))
    }

    /// What a call finds of a counter: what is left, or what is leased and left.
    pub(super) fn room(
        &mut self,
        place: impl FnOnce() -> Place,
        counter: &Counter,
        terms: Terms,
        amount: Amount,
        now: Millis,
    ) -> Result<Room, Denied> {
        match &mut self.leases {
            None => {
                let left = counter.left(terms, now);
                Ok(Room { left, shown: left })
            }
            Some(leases) => leases.room(place(), counter, terms, amount, now),
        }
    }
}
