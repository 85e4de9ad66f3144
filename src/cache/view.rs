//! What all threads may read without asking the actor: entries in memory, generations of scopes, counters.
//!
//! ```text
//! peek ──> shard by digest: digest ─> Arc<Entry>      an entry stands under its key and under the exact bytes that asked for it
//!             └─ as many purges as when it was last checked? served : compare the generations of its scopes
//! ```
//!
//! Only the actor writes entries here. A scope's generation is raised by whoever purges, so that it counts at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::base::{Lookup, Millis};
use crate::cache::entry::{Entry, Stamps};
use crate::cache::fleet::Shelf;
use crate::cache::key::{Digest, Scope};

/// Locks that hits are divided over. A power of two.
const SHARDS: usize = 64;

/// What the handle, the actor and the fills share.
pub(super) struct Shared {
    pub(super) view: View,
    pub(super) generations: Generations,
    pub(super) counters: Counters,
    /// What is shared with others.
    pub(super) shelf: Option<Shelf>,
    /// The cache has turned itself off.
    pub(super) is_off: AtomicBool,
    /// Most bytes of an answer that is stored.
    pub(super) max_entry_bytes: u64,
    /// Most bytes of answers under way before new ones are not stored any more.
    pub(super) max_filling_bytes: u64,
}

impl Shared {
    pub(super) fn new(max_entry_bytes: u64, max_filling_bytes: u64, shelf: Option<Shelf>) -> Self {
        let (view, generations, counters) = Default::default();
        Self { view, generations, counters, shelf, is_off: AtomicBool::new(false), max_entry_bytes, max_filling_bytes }
    }

    /// An entry that may be served now.
    pub(super) fn hit(&self, digest: &Digest, now: Millis) -> Option<Arc<Entry>> {
        let shard = self.view.shard(digest);
        let entry = shard.entries.read().get(digest)?.clone();
        if now >= entry.expires() || !self.generations.allow(&entry) {
            return None;
        }
        entry.touch(now);
        shard.hits.fetch_add(1, Ordering::Relaxed);
        Some(entry)
    }

    pub(super) fn is_off(&self) -> bool {
        self.is_off.load(Ordering::Relaxed)
    }
}

/// What happened, and what is open.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) misses: AtomicU64,
    pub(super) coalesced: AtomicU64,
    pub(super) fills: AtomicU64,
    pub(super) followers: AtomicU64,
    /// Bytes of answers that are under way, or read by somebody who is slow.
    pub(super) filling: AtomicU64,
}

/// Entries in memory.
pub(super) struct View {
    shards: Box<[Shard]>,
}

/// On a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Shard {
    entries: RwLock<Lookup<Digest, Arc<Entry>>>,
    hits: AtomicU64,
}

impl Default for View {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }
}

impl View {
    pub(super) fn insert(&self, digest: Digest, entry: Arc<Entry>) {
        // The old one is freed outside the lock.
        let old = self.shard(&digest).entries.write().insert(digest, entry);
        drop(old);
    }

    pub(super) fn remove(&self, digest: &Digest) {
        let old = self.shard(digest).entries.write().remove(digest);
        drop(old);
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<Arc<Entry>> {
        self.shard(digest).entries.read().get(digest).cloned()
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let old = std::mem::take(&mut *shard.entries.write());
            drop(old);
        }
    }

    pub(super) fn hits(&self) -> u64 {
        self.shards.iter().map(|shard| shard.hits.load(Ordering::Relaxed)).sum()
    }

    fn shard(&self, digest: &Digest) -> &Shard {
        &self.shards[usize::from(digest.0[0]) % SHARDS]
    }
}

/// When each scope was purged last.
#[derive(Default)]
pub(super) struct Generations {
    /// Purges of this process, all scopes together.
    purges: AtomicU64,
    /// Scopes that never were are not here: their generation is 0.
    known: RwLock<HashMap<Scope, u64>>,
}

impl Generations {
    pub(super) fn restore(&self, known: HashMap<Scope, u64>) {
        *self.known.write() = known;
    }

    /// From now on nothing of before is served. Returns the new generation, which says when that was: answers of a fleet are
    /// known by their time.
    pub(super) fn raise(&self, scope: Scope, now: Millis) -> u64 {
        let mut known = self.known.write();
        let generation = known.entry(scope).or_default();
        *generation = (*generation + 1).max(now.0);
        self.purges.fetch_add(1, Ordering::Release);
        *generation
    }

    /// The generations that an answer begun now belongs to.
    pub(super) fn stamps(&self, scopes: [Option<Scope>; 2]) -> Stamps {
        let known = self.known.read();
        scopes.map(|scope| scope.map(|scope| (scope, known.get(&scope).copied().unwrap_or_default())))
    }

    pub(super) fn are_current(&self, stamps: &Stamps) -> bool {
        let known = self.known.read();
        stamps.iter().flatten().all(|(scope, generation)| known.get(scope).copied().unwrap_or_default() == *generation)
    }

    /// The same for an entry, which remembers the answer until the next purge: hits share no lock here.
    fn allow(&self, entry: &Entry) -> bool {
        let purges = self.purges.load(Ordering::Acquire);
        if entry.checked.load(Ordering::Relaxed) == purges {
            return true;
        }
        let is_current = self.are_current(&entry.record.stamps);
        if is_current {
            entry.checked.store(purges, Ordering::Relaxed);
        }
        is_current
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::entry::{Head, Record};

    #[test]
    fn an_entry_is_served_until_it_expires_or_one_of_its_scopes_is_purged() {
        let [gateway, provider, other] = ["g", "p", "o"].map(|name| Scope::gateway("a", name));
        let check = |scopes: [Option<Scope>; 2], purged: &[Scope], now: u64, is_served: bool| {
            let shared = Shared::new(0, 0, None);
            shared.generations.restore(HashMap::from([(gateway, 4)]));
            let stamps = shared.generations.stamps(scopes);
            let record = Record { digest: Digest([1; 32]), created: Millis(10), expires: Millis(20), stamps };
            let head = Head { status: 200, headers: Vec::new() };
            shared.view.insert(record.digest, Arc::new(Entry::new(record, &head, &[], Millis(10)).unwrap()));
            assert!(shared.hit(&record.digest, Millis(10)).is_some());
            purged.iter().for_each(|scope| assert!(shared.generations.raise(*scope, Millis(10)) > 0));
            assert_eq!(shared.hit(&record.digest, Millis(now)).is_some(), is_served, "{scopes:?} {purged:?} {now}");
            assert_eq!(shared.view.hits(), 1 + u64::from(is_served));
            assert_eq!(
                shared.generations.are_current(&stamps),
                purged.iter().all(|scope| !scopes.contains(&Some(*scope)))
            );
            if is_served {
                assert_eq!(shared.view.get(&record.digest).unwrap().used(), Millis(now));
            }
        };
        let both = [Some(gateway), Some(provider)];
        check(both, &[], 19, true);
        check(both, &[], 20, false);
        check(both, &[other], 11, true);
        check(both, &[gateway], 11, false);
        check(both, &[provider], 11, false);
        check(both, &[other, provider, other], 11, false);
        check([Some(gateway), None], &[provider], 11, true);
    }
}
