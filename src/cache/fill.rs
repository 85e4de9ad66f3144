//! One upstream call for all who ask the same at the same time.
//!
//! ```text
//!   FillTicket (one) ── begin, push, finish ──> Fill { Buffer } ──> Follower (many, the first caller too)
//!        └─ finish, if it may be stored ──> Whole ──┐    └─ nobody may join any more ──> Over ──> the actor
//!                                                   └───────────────────────────────────────────────┘
//! ```
//!
//! A ticket that is dropped has failed, a follower that is dropped has left: neither is ever missing. What is decided is
//! decided by `buffer.rs` under one lock, which is never held while anybody waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::{Message, Recipient};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::base::{Millis, Result};
use crate::cache::buffer::{Beginning, Buffer, FailedAnswer, Next, Pushed};
use crate::cache::entry::{Entry, Head, Stamps};
use crate::cache::key::Key;
use crate::cache::view::Shared;

/// An answer under way.
pub(super) struct Fill {
    pub(super) key: Key,
    /// The generations that it belongs to: those of its beginning.
    pub(super) stamps: Stamps,
    pub(super) begun: Millis,
    actor: Recipient<Told>,
    shared: Arc<Shared>,
    /// Whether the actor lets others join.
    is_listed: bool,
    buffer: Mutex<Buffer>,
    /// Something came, or ended: for readers.
    grown: Notify,
    /// Somebody read, or left: for the writer.
    space: Notify,
}

impl Fill {
    pub(super) fn new(
        key: Key,
        actor: Recipient<Told>,
        shared: Arc<Shared>,
        is_listed: bool,
        begun: Millis,
    ) -> Arc<Self> {
        let stamps = shared.generations.stamps(key.scopes);
        let buffer = Mutex::new(Buffer::new(shared.max_entry_bytes));
        let (grown, space) = (Notify::new(), Notify::new());
        Arc::new(Self { key, stamps, begun, actor, shared, is_listed, buffer, grown, space })
    }

    /// The only ticket of a new fill.
    pub(super) fn ticket(self: &Arc<Self>) -> FillTicket {
        FillTicket::new(self.clone(), 0, false)
    }

    /// One more reader, unless the answer is not for new ones.
    pub(super) fn join(self: &Arc<Self>) -> Option<Follower> {
        let mut buffer = self.buffer.lock();
        let reader = buffer.is_open().then(|| buffer.join(None))?;
        drop(buffer);
        Some(Follower::new(self.clone(), reader))
    }

    /// What a whole answer is stored as.
    pub(super) fn whole(&self) -> Option<(Arc<Head>, Vec<Bytes>, Duration)> {
        self.buffer.lock().whole()
    }

    /// Changes the buffer, and tells whom it concerns.
    fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut Buffer) -> T) -> T {
        let mut buffer = self.buffer.lock();
        let (was_open, held) = (buffer.is_open(), buffer.held());
        let outcome = change(&mut buffer);
        let (is_over, holds) = (was_open && !buffer.is_open(), buffer.held());
        drop(buffer);
        // Wraps where it shrinks, and so does the sum.
        self.shared.counters.filling.fetch_add(holds.wrapping_sub(held), Ordering::Relaxed);
        if is_over && self.is_listed {
            self.actor.do_send(Told::Over(self.clone()));
        }
        outcome
    }

    /// Changes the buffer in a way that readers wait for.
    fn advance<T>(self: &Arc<Self>, change: impl FnOnce(&mut Buffer) -> T) -> T {
        let outcome = self.change(change);
        self.grown.notify_waiters();
        outcome
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.shared.counters.filling.fetch_sub(self.buffer.get_mut().held(), Ordering::Relaxed);
    }
}

/// What a fill tells the actor.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) enum Told {
    /// It is whole and may be stored.
    Whole {
        fill: Arc<Fill>,
        /// Nobody else had it.
        is_ours: bool,
    },
    /// Nobody may join any more.
    Over(Arc<Fill>),
}

/// What a lookup finds.
pub enum Found {
    /// The answer.
    Hit(Arc<Entry>),
    /// Nothing: go upstream. Others of the same key wait for what becomes of the ticket.
    Fill(FillTicket),
    /// Somebody is upstream for the same already.
    Follow(Follower),
    /// The cache is in trouble: go upstream without it.
    Off,
}

/// It is not stored and nobody reads it: stop asking upstream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unwanted;

/// The duty to get an answer. Whoever holds it outlives the client that asked first: others may be reading.
///
/// Dropped without [`finish`](Self::finish) or [`fail`](Self::fail), it has failed as [`FailedAnswer::Abandoned`].
#[must_use = "dropped, it fails all who wait for the answer"]
pub struct FillTicket {
    fill: Arc<Fill>,
    attempt: usize,
    /// Whether it has reached a caller.
    is_accepted: bool,
    is_done: bool,
}

impl FillTicket {
    fn new(fill: Arc<Fill>, attempt: usize, is_accepted: bool) -> Self {
        fill.shared.counters.fills.fetch_add(1, Ordering::Relaxed);
        Self { fill, attempt, is_accepted, is_done: false }
    }

    /// It is in the hands of somebody who will use it.
    pub(super) fn accept(mut self) -> Self {
        self.is_accepted = true;
        self
    }

    /// Asks the fleet, which is at hand or a miss. The ticket is done with if another daemon has the answer.
    pub(super) async fn find(self, now: Millis) -> Found {
        let fill = self.fill.clone();
        let Fill { key, shared, .. } = &*fill;
        let (Some(shelf), Some(common)) = (&shared.shelf, key.common) else { return Found::Fill(self.accept()) };
        // A ticket that is dropped meanwhile was never in anybody's hands: one of those who wait takes over.
        let since = fill.stamps.iter().flatten().map(|(_, generation)| *generation).fold(common.since.0, u64::max);
        let Some(found) = shelf.find(&common.digest, Millis(since), shared.max_entry_bytes, now).await else {
            return Found::Fill(self.accept());
        };
        let entry = Arc::new(found);
        self.adopt(&entry, now);
        Found::Hit(entry)
    }

    /// The answer is there, from another daemon: it is kept for as long as it would be there.
    fn adopt(mut self, entry: &Arc<Entry>, now: Millis) {
        self.is_done = true;
        let keep = Duration::from_millis(entry.expires().0.saturating_sub(now.0));
        let is_kept = self.fill.advance(|buffer| {
            buffer.begin(Head::clone(entry.head()), Some(keep));
            // Within the limit and whole, so nobody has to wait for a reader.
            for chunk in entry.clone().chunks() {
                buffer.push(&chunk, false);
            }
            buffer.finish()
        });
        if is_kept {
            self.fill.actor.do_send(Told::Whole { fill: self.fill.clone(), is_ours: false });
        }
    }

    /// A reader of this attempt's own, for the caller that it came from: it hears this attempt's failure and leads no other.
    /// To be made before the first chunk.
    pub fn follow(&self) -> Follower {
        let reader = self.fill.change(|buffer| buffer.join(Some(self.attempt)));
        Follower::new(self.fill.clone(), reader)
    }

    /// The answer begins. `keep` is how long it is served once it is whole, `None` if it must not be stored; what is no
    /// success, or a part of one (206), is not stored either. An answer that is not stored goes to those who wait already.
    pub fn begin(&mut self, head: Head, keep: Option<Duration>) {
        self.fill.advance(|buffer| buffer.begin(head, keep));
    }

    /// The next bytes of the answer, after [`begin`](Self::begin). Waits only where the answer is not stored and all who read
    /// it are behind.
    ///
    /// # Errors
    /// [`Unwanted`] when the answer is not stored and nobody reads it any more.
    pub async fn push(&mut self, chunk: Bytes) -> Result<(), Unwanted> {
        if chunk.is_empty() {
            return Ok(());
        }
        loop {
            let filling = self.fill.shared.counters.filling.load(Ordering::Relaxed);
            let is_crowded = filling + chunk.len() as u64 > self.fill.shared.max_filling_bytes;
            match self.fill.advance(|buffer| buffer.push(&chunk, is_crowded)) {
                Pushed::Taken => return Ok(()),
                Pushed::Unwanted => return Err(Unwanted),
                // One who reads in between leaves a permit.
                Pushed::Full => self.fill.space.notified().await,
            }
        }
    }

    /// Something known at its end only, before [`finish`](Self::finish): one more header for who finds it stored.
    pub fn note(&mut self, name: &'static str, value: Bytes) {
        self.fill.change(|buffer| buffer.note(name, value));
    }

    /// The answer is whole, as far as upstream says. It is stored if it may be.
    pub fn finish(mut self) {
        self.is_done = true;
        if self.fill.advance(Buffer::finish) {
            self.fill.actor.do_send(Told::Whole { fill: self.fill.clone(), is_ours: true });
        }
    }

    /// The answer is whole, and turned out to be a failure: those who read it have read so, and nobody else will.
    pub fn finish_unkept(mut self) {
        self.is_done = true;
        self.fill.advance(|buffer| {
            buffer.forbid();
            buffer.finish()
        });
    }

    /// The answer is not coming, or broke off. Before [`begin`](Self::begin) one of those who wait may try once more.
    pub fn fail(mut self, failure: FailedAnswer) {
        self.is_done = true;
        self.fill.advance(|buffer| buffer.fail(failure));
    }
}

impl Drop for FillTicket {
    fn drop(&mut self) {
        self.fill.shared.counters.fills.fetch_sub(1, Ordering::Relaxed);
        if self.is_done {
            return;
        }
        if self.is_accepted {
            self.fill.advance(|buffer| buffer.fail(FailedAnswer::Abandoned));
        } else {
            self.fill.advance(Buffer::vacate);
        }
    }
}

/// How an answer begins.
pub enum Lead {
    /// With this, and [`Follower::next`] has the rest.
    Head(Arc<Head>),
    /// The first attempt failed before it began: go upstream with this ticket, and go on reading with the follower.
    Lead(FillTicket),
    /// There is no answer.
    Failed(FailedAnswer),
}

/// A reader of an answer that may still be coming, from its first chunk. Dropping it changes nothing for others.
pub struct Follower {
    fill: Arc<Fill>,
    reader: usize,
    is_done: bool,
}

impl Follower {
    fn new(fill: Arc<Fill>, reader: usize) -> Self {
        fill.shared.counters.followers.fetch_add(1, Ordering::Relaxed);
        Self { fill, reader, is_done: false }
    }

    /// Waits for the beginning of the answer. To be called before [`next`](Self::next), and again after [`Lead::Lead`].
    /// Bounded by the caller's own deadline only.
    pub async fn head(&mut self) -> Lead {
        loop {
            let grown = self.fill.grown.notified();
            match self.fill.change(|buffer| buffer.beginning(self.reader)) {
                Beginning::Head(head) => return Lead::Head(head),
                Beginning::Lead(attempt) => return Lead::Lead(FillTicket::new(self.fill.clone(), attempt, true)),
                Beginning::Failed(failure) => return Lead::Failed(failure),
                Beginning::Wait => grown.await,
            }
        }
    }

    /// The next chunk as it was pushed, `None` at the end. Nothing is lost if the wait is given up.
    ///
    /// # Errors
    /// The filler's own when the answer broke off, `Aborted` when this reader was too slow; nothing comes after it.
    pub async fn next(&mut self) -> Option<Result<Bytes>> {
        while !self.is_done {
            // Before the look, so that what comes right after it is heard.
            let grown = self.fill.grown.notified();
            match self.read() {
                Next::Chunk(chunk) => return Some(Ok(chunk)),
                Next::End => self.is_done = true,
                Next::Broken(error) => {
                    self.is_done = true;
                    return Some(Err(error));
                }
                Next::Wait => grown.await,
            }
        }
        None
    }

    fn read(&self) -> Next {
        let mut buffer = self.fill.buffer.lock();
        let next = buffer.next(self.reader);
        let is_awaited = buffer.has_window() && matches!(next, Next::Chunk(_));
        drop(buffer);
        if is_awaited {
            self.fill.space.notify_one();
        }
        next
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.fill.shared.counters.followers.fetch_sub(1, Ordering::Relaxed);
        self.fill.change(|buffer| buffer.leave(self.reader));
        self.fill.space.notify_one();
    }
}
