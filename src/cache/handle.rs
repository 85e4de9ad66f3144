//! The handle that callers hold.
//!
//! ```text
//!   Cache ── peek ──────────> Shared.view                      no actor, no await
//!     ├───── lookup ─ view? ─ CacheActor: memory, disk, a fill to follow, a ticket ─ Shelf: has another daemon the answer?
//!     └───── purge ─> Shared.generations, and the actor notes it on disk
//! ```
//!
//! Nothing here fails a request: what goes wrong is a miss, or [`Found::Off`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;

use crate::base::{Millis, Result};
use crate::cache::actor::{Alias, CacheActor, Flush, Look, Lookup, Purged};
use crate::cache::entry::Entry;
use crate::cache::fill::{Fill, FillTicket, Found};
use crate::cache::key::{Key, RawKey, Scope};
use crate::cache::settings::{Settings, Stats};
use crate::cache::view::Shared;

/// Messages waiting at most; callers wait in line behind it.
const MAILBOX: usize = 1024;
/// A lookup that takes longer is given up: the disk hangs, and upstream is quicker.
const PATIENCE: Duration = Duration::from_secs(2);

/// The cache's whole outside.
#[derive(Clone)]
pub struct Cache {
    addr: Addr<CacheActor>,
    shared: Arc<Shared>,
}

impl Cache {
    /// Opens the folder and serves what is there, on a thread of its own.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be made, read or written to.
    pub fn start(settings: Settings) -> Result<Self> {
        let actor = CacheActor::open(settings)?;
        let shared = actor.shared().clone();
        let arbiter = Arbiter::new();
        let addr = CacheActor::start_in_arbiter(&arbiter.handle(), |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            actor
        });
        Ok(Self { addr, shared })
    }

    /// Whether answers are shared with other daemons.
    pub fn is_shared(&self) -> bool {
        self.shared.shelf.is_some()
    }

    /// The answer in memory to exactly these bytes. Neither waits nor allocates; `None` says nothing about the disk, nor
    /// about the same request written differently: ask [`Cache::lookup`].
    pub fn peek(&self, raw: &RawKey, now: Millis) -> Option<Arc<Entry>> {
        self.shared.hit(&raw.0, now)
    }

    /// The answer, from memory or disk, or what is to be done for one. Never fails a request and never takes long.
    pub async fn lookup(&self, key: Key, now: Millis) -> Found {
        let Self { addr, shared } = self;
        if shared.is_off() {
            return Found::Off;
        }
        if let Some(entry) = shared.hit(&key.digest, now) {
            if key.raw != key.digest && shared.view.get(&key.raw).is_none() {
                // Lost when the actor is busy: the next one asks again.
                let _ = addr.try_send(Alias(key));
            }
            return Found::Hit(entry);
        }
        match tokio::time::timeout(PATIENCE, addr.send(Lookup { key, now })).await {
            Ok(Ok(Found::Fill(ticket))) => ticket.find(now).await,
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => Found::Off,
        }
    }

    /// A ticket without a look, for callers who want a fresh answer. It replaces the entry once it is whole. Nobody else
    /// follows it, and others of the same key are answered from the old entry meanwhile.
    pub fn refresh(&self, key: Key) -> FillTicket {
        self.shared.counters.misses.fetch_add(1, Ordering::Relaxed);
        Fill::new(key, self.addr.clone().recipient(), self.shared.clone(), false, Millis::now()).ticket().accept()
    }

    /// Nothing of this scope that was stored or begun before is served from now on. It counts at once, and after a start
    /// as well once [`Cache::flush`] has returned.
    pub fn purge(&self, scope: Scope) {
        let generation = self.shared.generations.raise(scope, Millis::now());
        self.addr.do_send(Purged { scope, generation });
    }

    /// How it is.
    pub async fn stats(&self) -> Stats {
        self.addr.send(Look).await.unwrap_or(Stats { is_off: true, ..Stats::default() })
    }

    /// Waits until all that was stored and purged so far is on disk.
    pub async fn flush(&self) {
        // An actor that is gone has nothing to write.
        let _ = self.addr.send(Flush).await;
    }
}

#[cfg(test)]
impl Cache {
    /// Keeps the actor busy.
    pub(super) fn occupy(&self, work: impl FnOnce() + Send + 'static) {
        self.addr.do_send(crate::cache::actor::Occupy(Box::new(work)));
    }
}
