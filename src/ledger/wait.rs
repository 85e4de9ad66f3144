//! Calls that wait for a lease, where a fleet shares what they need.
//!
//! ```text
//! try ─ not leased ─> the round that asks for it ─> try again        too long, or no store: Unleased
//! ```
//!
//! Waits outside the book's lock, and never where nothing is shared.

use std::time::{Duration, Instant};

use crate::base::Millis;
use crate::ledger::claim::{Claim, Denied, Window};
use crate::ledger::handle::{Ledger, Reservation};

impl Ledger {
    /// As [`Ledger::reserve`], and waits for a lease where a fleet shares what it needs: once for all its limits, not longer than the
    /// settings say.
    ///
    /// # Errors
    /// As [`Ledger::reserve`].
    pub async fn claim(&self, claim: &Claim<'_>, now: Millis) -> Result<Reservation, Denied> {
        self.leased(now, |now| self.try_reserve(claim, now)).await
    }

    /// Whether a window has something left, as [`Ledger::pass`] would find it.
    ///
    /// # Errors
    /// [`Denied::Unleased`]: what a fleet shares is not leased here; [`Denied::Dead`].
    pub fn has_room(&self, window: &Window, now: Millis) -> Result<bool, Denied> {
        self.shared.fleet(|book, _| book.has_room(window, now)).unwrap_or(Err(Denied::Dead))
    }

    /// Waits until these windows have something leased here, or are known to have nothing left.
    ///
    /// # Errors
    /// As [`Ledger::has_room`].
    pub async fn lease(&self, windows: &[Window], now: Millis) -> Result<(), Denied> {
        let look = |now| {
            let looked = self.shared.fleet(|book, _| {
                // All of them, so that they are asked for at once.
                let looks: Vec<_> = windows.iter().map(|window| book.has_room(window, now).map(drop)).collect();
                let found: Result<(), _> = looks.into_iter().collect();
                found.map_err(|denied| (denied, book.leases().and_then(|leases| leases.round())))
            });
            looked.unwrap_or(Ok(()))
        };
        self.leased(now, look).await
    }

    /// Whether its counters are a fleet's.
    pub fn is_shared(&self) -> bool {
        self.shared.link.is_some()
    }

    /// Waits until the fleet's store leases, not longer than this. `false`: it does not yet. Without a fleet there is nothing to wait for.
    pub async fn joined(&self, limit: Duration) -> bool {
        let Some(link) = &self.shared.link else { return true };
        let mut rounds = link.rounds.clone();
        let is_up = || self.shared.fleet(|_, health| health.is_up).unwrap_or(false);
        let joined = async { while !is_up() && rounds.changed().await.is_ok() {} };
        let _ = tokio::time::timeout(limit, joined).await;
        is_up()
    }

    /// Tries, and again when leases have come. One that others took meanwhile is asked for anew.
    async fn leased<T>(
        &self,
        now: Millis,
        attempt: impl Fn(Millis) -> Result<T, (Denied, Option<u64>)>,
    ) -> Result<T, Denied> {
        // Most need not wait, and then nobody looks at a clock.
        let mut began: Option<Instant> = None;
        loop {
            let waited = began.map_or(Duration::ZERO, |began| began.elapsed());
            let round = match attempt(Millis(now.0.saturating_add(waited.as_millis() as u64))) {
                Ok(done) => return Ok(done),
                Err((Denied::Unleased, round)) => round,
                Err((denied, _)) => return Err(denied),
            };
            let is_waiting = match (&self.shared.link, round) {
                (Some(link), Some(round)) => {
                    self.shared.fleet(|_, health| health.waits += u64::from(began.is_none()));
                    began.get_or_insert_with(Instant::now);
                    link.round(round, waited).await
                }
                _ => false,
            };
            if !is_waiting {
                self.shared.fleet(|_, health| health.refused += 1);
                return Err(Denied::Unleased);
            }
        }
    }
}
