//! The ledger as others hold it: the book behind its lock, and the guard that gives a reservation back.
//!
//! ```text
//! reserve ─ lock: book, room in the queue ─> Reservation ─ settle ─ lock: book, queue ─> Ticket ─ durable ─> on disk
//!                                                     └─── dropped ─ lock: book
//! ```
//!
//! The queue to the journal is bounded, and a reservation is only made while there is room for its settlement: what was
//! admitted can always be settled. At the bound, and while the disk is faulty, new calls are refused or go on unmetered, as
//! the settings say.
//!
//! Where a fleet shares counters, a reservation may need a lease that is not here: [`Ledger::claim`] waits for it, outside the lock.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::base::{AccountId, Error, Millis, Neurons, Result, UtcDay};
use crate::ledger::book::{AccountTotals, Open};
use crate::ledger::claim::{Claim, Denied, Granted, Plan, Spent, Standing, Window};
use crate::ledger::entry::Who;
use crate::ledger::fleet::{Fleet, Keeper, OnLoss};
use crate::ledger::folder::Folder;
use crate::ledger::journal::Journal;
use crate::ledger::kept::Kept;
use crate::ledger::rows::{Filter, Row};
use crate::ledger::shared::{Ask, FleetHealth, Health, OnFault, Shared, State, dead};
use crate::store::{Disk, RealDisk};
use crate::task::Usage;

/// How the ledger keeps.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where it keeps. `None`: in memory only, and a restart begins with an empty book.
    pub folder: Option<PathBuf>,
    /// How long settlements are gathered before they are synced together.
    pub commit_every: Duration,
    /// Settlements that wait for the disk and calls that have not ended, together at most.
    pub queue: usize,
    /// What becomes of new calls when the disk does not keep what they cost.
    pub on_fault: OnFault,
    /// Bytes of a segment, after which there is a snapshot: a start reads at most about as many.
    pub segment_bytes: u64,
    /// Windows that are kept at most, about 190 bytes each. Those that are over are forgotten first, then the ones that end
    /// first.
    pub max_windows: usize,
    /// Rows of usage that are kept at most, about 400 bytes each; the oldest day goes first.
    pub max_rows: usize,
    /// With whom it shares its counters. `None`: nobody.
    pub fleet: Option<Fleet>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            folder: None,
            commit_every: Duration::from_millis(5),
            queue: 65_536,
            on_fault: OnFault::Refuse,
            segment_bytes: 64 << 20,
            max_windows: 200_000,
            max_rows: 200_000,
            fleet: None,
        }
    }
}

/// The ledger's whole outside. It ends, and keeps all there is, when it is closed or the last of its clones is gone.
#[derive(Clone)]
pub struct Ledger {
    pub(super) shared: Arc<Shared>,
    _closer: Arc<Closer>,
}

impl Ledger {
    /// Reads what is in the folder, adds it up, and keeps what follows on a thread of its own. Blocks while it reads.
    ///
    /// # Errors
    /// [`Kind::BadInput`](crate::base::Kind::BadInput) when the folder cannot be used, is another daemon's, or lacks entries.
    pub fn start(settings: Settings) -> Result<Self> {
        Self::start_on(RealDisk, settings)
    }

    pub(super) fn start_on<D: Disk>(disk: D, settings: Settings) -> Result<Self> {
        let mut kept = Kept::new(settings.max_windows, settings.max_rows);
        let bounds = (settings.max_windows, settings.max_rows);
        let folder = match &settings.folder {
            Some(path) => Some(Folder::open(disk, path, settings.segment_bytes, &mut kept, bounds)?),
            None => None,
        };
        let (durable, seen) = watch::channel(kept.seq);
        let mut book = kept.book.clone();
        let (mut link, mut keeper, mut told) = (None, None, None);
        if let Some(fleet) = &settings.fleet {
            let (made, make) = Keeper::new(fleet.clone(), settings.folder.clone())?;
            book.share(fleet.on_loss == OnLoss::Local, settings.max_windows);
            (link, keeper, told) = (Some(made), Some(make), Some(FleetHealth::default()));
        }
        let state = State {
            book,
            last: kept.seq,
            queue: Vec::new(),
            asks: Vec::new(),
            health: Health { last: kept.seq, durable: kept.seq, fleet: told, ..Health::default() },
            is_asleep: false,
            is_hurried: false,
            is_closing: false,
            is_over: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            durable: seen,
            room: settings.queue.max(1),
            on_fault: settings.on_fault,
            link,
        });
        if let Some(make) = keeper {
            let keeper = make(shared.clone());
            let thread = std::thread::Builder::new().name("fleet".to_owned()).spawn(move || keeper.run());
            thread.map_err(|error| Error::internal("The fleet's thread cannot be started.").with_source(error))?;
        }
        Journal::start(shared.clone(), kept, folder, durable, settings.commit_every)
            .map_err(|error| Error::internal("The ledger's threads cannot be started.").with_source(error))?;
        Ok(Self { _closer: Arc::new(Closer(shared.clone())), shared })
    }

    /// Holds what the claim may spend until the reservation is settled or dropped. Never waits, neither for the disk nor for a lease.
    ///
    /// # Errors
    /// Which limit refuses it, that the disk does not keep, or that what a fleet shares is not leased here. Nothing is charged then.
    pub fn reserve(&self, claim: &Claim<'_>, now: Millis) -> Result<Reservation, Denied> {
        self.try_reserve(claim, now).map_err(|(denied, _)| denied)
    }

    /// The round of asks that brings what is lacked comes with the refusal.
    pub(super) fn try_reserve(&self, claim: &Claim<'_>, now: Millis) -> Result<Reservation, (Denied, Option<u64>)> {
        let mut state = self.shared.lock().ok_or((Denied::Dead, None))?;
        let is_metered = state.admit(&self.shared).map_err(|denied| (denied, None))?;
        let open = state.book.reserve(claim, now).map_err(|denied| (denied, state.round()))?;
        if is_metered {
            state.health.open += 1;
        } else {
            state.health.unmetered += 1;
        }
        state.count_local();
        drop(state);
        Ok(Reservation { shared: self.shared.clone(), open: Some(open), is_metered, at: now })
    }

    /// Passes a window without a reservation: one that counts requests counts this one, others only must have something left.
    ///
    /// # Errors
    /// As [`Ledger::reserve`].
    pub fn pass(&self, window: &Window, now: Millis) -> Result<Standing, Denied> {
        let mut state = self.shared.lock().ok_or(Denied::Dead)?;
        let is_metered = !window.span.is_durable() || state.admit(&self.shared)?;
        let (standing, entry) = state.book.pass(window, now)?;
        state.count_local();
        if let Some(entry) = entry.filter(|_| is_metered) {
            state.push(entry, &self.shared);
        }
        Ok(standing)
    }

    /// One account's money now.
    ///
    /// # Errors
    /// [`Kind::Internal`](crate::base::Kind::Internal) when the ledger has died.
    pub fn totals(&self, account: &AccountId, now: Millis) -> Result<AccountTotals> {
        Ok(self.shared.lock().ok_or_else(dead)?.book.totals(account, now))
    }

    /// What is left of an account's allocation, what calls under way hold taken off.
    ///
    /// # Errors
    /// As [`Ledger::totals`].
    pub fn left(&self, account: &AccountId, plan: Plan, now: Millis) -> Result<Neurons> {
        Ok(self.shared.lock().ok_or_else(dead)?.book.left(account, plan, now))
    }

    /// What was used, all that was settled so far included, oldest day first. Waits for the journal.
    ///
    /// # Errors
    /// As [`Ledger::totals`]; [`Kind::Busy`](crate::base::Kind::Busy) when too many ask.
    pub async fn rows(&self, filter: Filter) -> Result<Vec<(UtcDay, Who, Row)>> {
        let (reply, answer) = oneshot::channel();
        self.shared.ask(Ask { filter, reply })?;
        answer.await.map_err(|_| dead())
    }

    /// How it is.
    pub fn health(&self) -> Health {
        let Some(state) = self.shared.lock() else { return Health { fault: Some("dead".into()), ..Health::default() } };
        Health { last: state.last, ..state.health.clone() }
    }

    /// Whether it still counts. A panic while it did leaves a book that nobody may use: then it does not.
    pub fn is_alive(&self) -> bool {
        self.shared.lock().is_some()
    }

    /// Waits until all that was settled so far is on disk, however long the disk takes.
    ///
    /// # Errors
    /// As [`Ledger::totals`].
    pub async fn flush(&self) -> Result<()> {
        let last = self.shared.lock().ok_or_else(dead)?.last;
        self.shared.durable(last).await
    }

    /// Keeps all that was settled, and ends. What is still reserved then is refunded.
    ///
    /// # Errors
    /// [`Kind::Internal`](crate::base::Kind::Internal) when the disk did not keep all of it.
    pub async fn close(&self) -> Result<()> {
        if let Some(link) = &self.shared.link {
            link.close();
            link.ended().await;
        }
        self.shared.close();
        let mut seen = self.shared.durable.clone();
        while seen.changed().await.is_ok() {}
        let state = self.shared.state.lock().map_err(|_| dead())?;
        if *seen.borrow() < state.last {
            return Err(Error::internal("The ledger's disk did not keep all that was settled."));
        }
        Ok(())
    }
}

/// An amount held for one call. Dropped without being settled, it is given back.
#[must_use]
pub struct Reservation {
    shared: Arc<Shared>,
    open: Option<Open>,
    is_metered: bool,
    /// When it was made.
    at: Millis,
}

impl Reservation {
    /// What the call may spend. Where that is less than was claimed, whoever runs the call ends it there.
    pub fn granted(&self) -> Granted {
        self.open.as_ref().map_or(Granted { neurons: Neurons::ZERO, cost: Neurons::ZERO }, Open::granted)
    }

    /// How the tightest of its windows stood when it was made.
    pub fn standing(&self) -> Option<&Standing> {
        self.open.as_ref().and_then(Open::standing)
    }

    /// Charges what was used. Counts at once, and survives a crash once the ticket says so.
    pub fn settle(mut self, spent: &Spent, now: Millis) -> Ticket {
        let shared = self.shared.clone();
        let Some(open) = self.open.take() else { return Ticket { shared, seq: 0, is_billed: false } };
        let Some(mut state) = shared.lock() else {
            return Ticket { seq: u64::MAX, is_billed: false, shared: self.shared.clone() };
        };
        if !self.is_metered {
            state.book.release(open, now);
            drop(state);
            return Ticket { shared, seq: 0, is_billed: false };
        }
        state.health.open -= 1;
        let (is_billed, entry) = state.book.settle(open, spent, now);
        let seq = entry.map_or(state.last, |entry| state.push(entry, &shared));
        drop(state);
        Ticket { shared, seq, is_billed }
    }
}

impl Reservation {
    /// Counts in its windows what the call has used; another reservation bills it.
    pub fn count(mut self, usage: &Usage, cost: Neurons, now: Millis) {
        let Some(open) = self.open.take() else { return };
        let Some(mut state) = self.shared.lock() else { return };
        if !self.is_metered {
            drop(state.book.release(open, now));
            return;
        }
        state.health.open -= 1;
        if let Some(entry) = state.book.count(open, usage, cost, now) {
            state.push(entry, &self.shared);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(open) = self.open.take() else { return };
        let Some(mut state) = self.shared.lock() else { return };
        let entry = state.book.release(open, self.at);
        if self.is_metered {
            state.health.open -= 1;
            if let Some(entry) = entry {
                state.push(entry, &self.shared);
            }
        }
    }
}

/// A settlement on its way to the disk. Dropping it changes nothing.
pub struct Ticket {
    shared: Arc<Shared>,
    seq: u64,
    is_billed: bool,
}

impl Ticket {
    /// Whether the call was charged. It was not if it counts once and was settled before, or went on unmetered.
    pub fn is_billed(&self) -> bool {
        self.is_billed
    }

    /// Waits until it is on disk, however long the disk takes. Without a folder: until it is in the rows.
    ///
    /// # Errors
    /// [`Kind::Internal`](crate::base::Kind::Internal) when the ledger has died or was closed before.
    pub async fn durable(self) -> Result<()> {
        self.shared.durable(self.seq).await
    }
}

struct Closer(Arc<Shared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
#[path = "handle_test.rs"]
mod tests;
