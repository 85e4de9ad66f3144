//! What is in memory: opened adapters under a limit of bytes, the least recently used idle one goes first. Pure but for the
//! reference counts, which say who is idle.
//!
//!     acquire ──> Entry { cell }  empty: whoever holds it fills it, others wait on it
//!                    └ bytes      an estimate until it is full

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::base::{Error, Kind, Result};
use crate::model::lora::{Adapter, Shape};

/// One state of an adapter, opened for bases of one shape.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    pub(super) id: Uuid,
    pub(super) version: u64,
    pub(super) shape: Shape,
}

/// An adapter in memory, or what went wrong when it was opened.
pub(super) type Cell = Arc<OnceCell<Result<Arc<Adapter>>>>;

struct Entry {
    cell: Cell,
    bytes: u64,
    used: u64,
}

impl Entry {
    /// Nobody computes with it, opens it, or waits for it.
    fn is_idle(&self) -> bool {
        let held = match self.cell.get() {
            Some(Ok(adapter)) => Arc::strong_count(adapter),
            _ => 1,
        };
        Arc::strong_count(&self.cell) == 1 && held == 1
    }
}

/// Opened adapters.
#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    bytes: u64,
    clock: u64,
}

impl Cache {
    /// The cell of an adapter; a new one when there is none, for which idle ones may have to go. Also says how many went.
    ///
    /// # Errors
    /// [`Kind::Busy`] when what others are using leaves no room, `BadInput` when it could never fit.
    pub(super) fn acquire(&mut self, key: Key, estimate: u64, most: u64) -> Result<(Cell, usize)> {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.used = self.clock;
            return Ok((entry.cell.clone(), 0));
        }
        if estimate > most {
            let message =
                format!("this fine-tune takes some {estimate} bytes of memory, and `lora.cache_bytes` allows {most}");
            return Err(Error::bad_field("lora", message));
        }
        // Another state of the same adapter is the first that nobody will ask for again.
        let outdated = self.evict_if(|other, entry| other.id == key.id && other.shape == key.shape && entry.is_idle());
        let evicted = outdated + self.make_room(most - estimate);
        if self.bytes > most - estimate {
            let message = "The memory for fine-tunes is in use by other requests; try again in a moment.";
            return Err(Error::new(Kind::Busy, message).with_retry_after(Duration::from_secs(1)));
        }
        let cell = Cell::default();
        self.bytes += estimate;
        self.entries.insert(key, Entry { cell: cell.clone(), bytes: estimate, used: self.clock });
        Ok((cell, evicted))
    }

    /// It was opened and takes this much, or could not be. Says how many others had to go.
    pub(super) fn opened(&mut self, key: Key, bytes: Option<u64>, most: u64) -> usize {
        let Some(bytes) = bytes else {
            self.remove(&key);
            return 0;
        };
        if let Some(entry) = self.entries.get_mut(&key) {
            self.bytes = self.bytes - entry.bytes + bytes;
            entry.bytes = bytes;
        }
        self.make_room(most)
    }

    /// No state of this adapter is wanted any more; requests that compute with one go on.
    pub(super) fn forget(&mut self, id: Uuid) -> usize {
        self.evict_if(|key, _| key.id == id)
    }

    /// How many there are, and their bytes.
    pub(super) fn size(&self) -> (usize, u64) {
        (self.entries.len(), self.bytes)
    }

    fn make_room(&mut self, most: u64) -> usize {
        let mut evicted = 0;
        while self.bytes > most {
            let idle = self.entries.iter().filter(|(_, entry)| entry.is_idle());
            let Some(key) = idle.min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key) else { break };
            self.remove(&key);
            evicted += 1;
        }
        evicted
    }

    fn evict_if(&mut self, mut gone: impl FnMut(&Key, &Entry) -> bool) -> usize {
        let keys: Vec<Key> = self.entries.iter().filter(|(key, entry)| gone(key, entry)).map(|(key, _)| *key).collect();
        keys.iter().for_each(|key| self.remove(key));
        keys.len()
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u128, version: u64) -> Key {
        Key { id: Uuid::from_u128(id), version, shape: Shape::default() }
    }

    fn open(cache: &mut Cache, id: u128, bytes: u64, most: u64) -> Result<(Arc<Adapter>, usize)> {
        let (cell, evicted) = cache.acquire(key(id, 0), bytes, most)?;
        let fresh = !cell.initialized();
        let _ = cell.set(Ok(Arc::new(Adapter::hollow(id as u64))));
        let adapter = cell.get().unwrap().clone().unwrap();
        drop(cell);
        let later = if fresh { cache.opened(key(id, 0), Some(bytes), most) } else { 0 };
        Ok((adapter, evicted + later))
    }

    #[test]
    fn the_least_recently_used_idle_adapter_goes() {
        let mut cache = Cache::default();
        for id in [1, 2, 3] {
            assert_eq!(open(&mut cache, id, 10, 30).unwrap().1, 0);
        }
        open(&mut cache, 1, 10, 30).unwrap();
        let (_held, evicted) = open(&mut cache, 4, 10, 30).unwrap();
        assert_eq!((evicted, cache.size()), (1, (3, 30)));
        let cells = |cache: &Cache| [1, 2, 3, 4].map(|id| cache.entries.contains_key(&key(id, 0)));
        assert_eq!(cells(&cache), [true, false, true, true]);
        assert_eq!(open(&mut cache, 5, 20, 30).unwrap().1, 2);
        assert_eq!(cells(&cache), [false, false, false, true]);
    }

    #[test]
    fn what_is_in_use_stays_and_a_newcomer_is_told_to_wait() {
        let mut cache = Cache::default();
        let held = open(&mut cache, 1, 20, 30).unwrap().0;
        assert_eq!(open(&mut cache, 2, 20, 30).err().unwrap().kind(), Kind::Busy);
        assert_eq!(open(&mut cache, 3, 31, 30).err().unwrap().kind(), Kind::BadInput);
        drop(held);
        assert_eq!(open(&mut cache, 2, 20, 30).unwrap().1, 1);
        let (waiting, _) = cache.acquire(key(9, 0), 5, 30).unwrap();
        assert_eq!(open(&mut cache, 8, 29, 30).err().unwrap().kind(), Kind::Busy, "somebody waits for 9");
        drop(waiting);
        assert!(open(&mut cache, 8, 29, 30).is_ok(), "nobody waits any more, though it was never opened");
    }

    #[test]
    fn a_new_state_a_failure_and_a_deletion_give_their_bytes_back() {
        let mut cache = Cache::default();
        open(&mut cache, 1, 10, 30).unwrap();
        let (cell, evicted) = cache.acquire(key(1, 1), 12, 30).unwrap();
        assert_eq!((cell.initialized(), evicted, cache.size()), (false, 1, (1, 12)));
        assert_eq!(cache.opened(key(1, 1), None, 30), 0);
        assert_eq!(cache.size(), (0, 0));
        open(&mut cache, 2, 10, 30).unwrap();
        assert_eq!((cache.forget(Uuid::from_u128(2)), cache.size()), (1, (0, 0)));
    }
}
