//! What the ledger's handles share with the threads that keep: the book behind its lock, what waits for the journal, and how all
//! of it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::timeout;

use crate::base::{Error, Kind, Result, UtcDay};
use crate::ledger::book::Book;
use crate::ledger::claim::Denied;
use crate::ledger::entry::{Entry, Who};
use crate::ledger::rows::{Filter, Row};

/// Questions that wait at most; one more is refused.
const MAX_ASKS: usize = 64;

/// How much longer than its patience whoever waits for the fleet's thread does.
const TICK: Duration = Duration::from_millis(50);

/// What becomes of new calls when the disk does not keep what they cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFault {
    /// They are refused.
    Refuse,
    /// They go on, within their limits, and are neither charged nor listed.
    Unmetered,
}

/// How it is, and what it has done since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Why the disk does not keep, while it does not.
    pub fault: Option<Arc<str>>,
    /// How often that began.
    pub faults: u64,
    /// Entries that are not on disk yet.
    pub queued: usize,
    /// Reservations that are neither settled nor dropped.
    pub open: usize,
    /// Calls that were refused because of the disk.
    pub refused: u64,
    /// Calls that went on unmetered because of it.
    pub unmetered: u64,
    /// Number of the last entry.
    pub last: u64,
    /// Number of the last entry that is on disk.
    pub durable: u64,
    /// How it is with the fleet's store, if there is one.
    pub fleet: Option<FleetHealth>,
}

/// How it is with the fleet's store, and what has been since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FleetHealth {
    /// Whether the store answers, and leases.
    pub is_up: bool,
    /// Why not.
    pub fault: Option<Arc<str>>,
    /// How often it was lost.
    pub losses: u64,
    /// Counters of which this daemon has, or had of late, a lease.
    pub leases: u64,
    /// What was asked of the store.
    pub asks: u64,
    /// In so many rounds.
    pub rounds: u64,
    /// Calls that waited for a lease.
    pub waits: u64,
    /// Calls that were refused because the store did not answer.
    pub refused: u64,
    /// Calls that went on while it did not.
    pub local: u64,
    /// By how much the store's clock differed, in milliseconds.
    pub clock_off_ms: u64,
}

/// A question for the rows, answered when all that was settled before it is in them.
pub(super) struct Ask {
    pub(super) filter: Filter,
    pub(super) reply: oneshot::Sender<Vec<(UtcDay, Who, Row)>>,
}

/// What the thread is given to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) entries: Vec<Entry>,
    pub(super) asks: Vec<Ask>,
    pub(super) is_last: bool,
}

/// What the ledger holds of the thread.
pub(super) struct Link {
    pub(super) wake: Arc<Notify>,
    /// The last round that was answered or lost.
    pub(super) rounds: watch::Receiver<u64>,
    pub(super) patience: Duration,
    pub(super) is_closing: Arc<AtomicBool>,
}

impl Link {
    /// Gives everything back, and ends.
    pub(super) fn close(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Waits until it has ended, not for ever.
    pub(super) async fn ended(&self) {
        let mut rounds = self.rounds.clone();
        let ended = async { while rounds.changed().await.is_ok() {} };
        // What is not given back counts as taken until this daemon is back.
        let _ = timeout(self.patience * 4 + TICK, ended).await;
    }

    /// Waits for a round, for so long as a call may. `false`: it was too long.
    pub(super) async fn round(&self, round: u64, waited: Duration) -> bool {
        // A round may wait for the one before, and either may end in the store's being given up.
        let Some(limit) = (self.patience * 2 + TICK).checked_sub(waited) else { return false };
        self.wake.notify_one();
        let mut rounds = self.rounds.clone();
        matches!(timeout(limit, rounds.wait_for(|done| *done >= round)).await, Ok(Ok(_)))
    }
}

/// What handles, reservations and the journal share.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// For the journal.
    pub(super) wake: Condvar,
    pub(super) durable: watch::Receiver<u64>,
    pub(super) room: usize,
    pub(super) on_fault: OnFault,
    /// To the thread that asks the fleet's store.
    pub(super) link: Option<Link>,
}

pub(super) struct State {
    pub(super) book: Book,
    /// Number of the last entry.
    pub(super) last: u64,
    /// In the order in which the book has them.
    pub(super) queue: Vec<Entry>,
    pub(super) asks: Vec<Ask>,
    pub(super) health: Health,
    /// Whether the journal waits for something to do.
    pub(super) is_asleep: bool,
    pub(super) is_hurried: bool,
    pub(super) is_closing: bool,
    pub(super) is_over: bool,
}

impl State {
    /// Whether a call may be metered. Its settlement will find room.
    pub(super) fn admit(&mut self, shared: &Shared) -> Result<bool, Denied> {
        if self.health.fault.is_none() && self.health.queued + self.health.open < shared.room {
            return Ok(true);
        }
        match shared.on_fault {
            OnFault::Refuse => {
                self.health.refused += 1;
                Err(Denied::Faulty)
            }
            OnFault::Unmetered => Ok(false),
        }
    }

    /// The round of asks that has what calls lack, if the fleet's store answers.
    pub(super) fn round(&mut self) -> Option<u64> {
        self.book.leases().and_then(|leases| leases.round())
    }

    pub(super) fn count_local(&mut self) {
        if let Some(fleet) = self.health.fleet.as_mut().filter(|fleet| !fleet.is_up) {
            fleet.local += 1;
        }
    }

    pub(super) fn push(&mut self, mut entry: Entry, shared: &Shared) -> u64 {
        self.last += 1;
        entry.seq = self.last;
        self.queue.push(entry);
        self.health.queued += 1;
        let is_full = self.queue.len() == shared.room / 8 + 1;
        self.is_hurried |= is_full;
        if self.is_asleep || is_full {
            self.is_asleep = false;
            shared.wake.notify_one();
        }
        self.last
    }
}

impl Shared {
    /// Nobody gets at a book that a panic has left half changed, nor at one that nobody keeps.
    pub(super) fn lock(&self) -> Option<MutexGuard<'_, State>> {
        self.state.lock().ok().filter(|state| !state.is_over)
    }

    /// What the fleet's thread does to the book; `None` once it is lost.
    pub(super) fn fleet<R>(&self, act: impl FnOnce(&mut Book, &mut FleetHealth) -> R) -> Option<R> {
        let mut state = self.state.lock().ok()?;
        let State { book, health, .. } = &mut *state;
        Some(act(book, health.fleet.as_mut()?))
    }

    pub(super) async fn durable(&self, seq: u64) -> Result<()> {
        let mut seen = self.durable.clone();
        seen.wait_for(|durable| *durable >= seq).await.map(drop).map_err(|_| dead())
    }

    pub(super) fn ask(&self, ask: Ask) -> Result<()> {
        let mut state = self.lock().ok_or_else(dead)?;
        if state.asks.len() >= MAX_ASKS {
            return Err(Error::new(Kind::Busy, "Too many ask for the ledger's rows at once. Try again in a moment."));
        }
        state.asks.push(ask);
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn close(&self) {
        if let Some(link) = &self.link {
            link.close();
        }
        if let Some(mut state) = self.lock() {
            state.is_closing = true;
            self.wake.notify_all();
        }
    }

    /// Waits until then for something to do, and gathers some more of it. `None`: there is nothing to do at any time, so it
    /// waits for the first, and gathers for so long. `false` once the book is lost.
    pub(super) fn take(&self, work: &mut Work, until: Option<Instant>, gather: Duration) -> bool {
        let Some(mut state) = self.lock() else { return false };
        let wait = match until {
            Some(at) => at.saturating_duration_since(Instant::now()),
            None => {
                state.is_asleep = true;
                let is_asleep = |state: &mut State| state.is_idle() && state.queue.is_empty() && !state.is_over;
                let Ok(woken) = self.wake.wait_while(state, is_asleep) else { return false };
                state = woken;
                state.is_asleep = false;
                gather
            }
        };
        let Ok((mut state, _)) = self.wake.wait_timeout_while(state, wait, |state| state.is_idle()) else {
            return false;
        };
        if state.is_over {
            return false;
        }
        std::mem::swap(&mut state.queue, &mut work.entries);
        std::mem::swap(&mut state.asks, &mut work.asks);
        state.is_hurried = false;
        work.is_last = state.is_closing;
        // From here on nothing can be settled that the last round does not see.
        state.is_over |= work.is_last;
        true
    }

    /// All up to this one is on disk, which keeps.
    pub(super) fn kept(&self, seq: u64) {
        let Ok(mut state) = self.state.lock() else { return };
        state.health.queued -= (seq - state.health.durable) as usize;
        state.health.durable = seq;
        state.health.fault = None;
    }

    pub(super) fn failed(&self, error: &std::io::Error) {
        let Ok(mut state) = self.state.lock() else { return };
        state.health.fault = Some(error.to_string().into());
        state.health.faults += 1;
    }

    /// Wakes the journal, which gathers no longer.
    pub(super) fn hurry(&self) {
        if let Ok(mut state) = self.state.lock() {
            state.is_hurried = true;
        }
        self.wake.notify_all();
    }

    /// One of its threads has ended.
    pub(super) fn ended(&self) {
        if let Ok(mut state) = self.state.lock() {
            state.is_over = true;
        }
        self.wake.notify_all();
    }
}

impl State {
    /// Whether nobody waits for the journal to act at once.
    fn is_idle(&self) -> bool {
        !self.is_hurried && !self.is_closing && self.asks.is_empty()
    }
}

pub(super) fn dead() -> Error {
    Error::new(Kind::Internal, "The ledger is not answering.")
}
