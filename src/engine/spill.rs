//! Where KV blocks go that the pool gives away: host memory, or a file.
//!
//! ```text
//! pool   [ ...... block 7 ...... ]  taken for something else ──put──> [ slot 3 ]
//!        [ ...... block 9 ...... ]  <──get── wanted again ─────────── [ slot 3 ]
//! ```
//!
//! [`Index`] says which prefix lies in which slot, under the same hashes as in the pool: pure, the scheduler's. [`Store`] has
//! the bytes and knows nothing but slots. A
//! store belongs to one loaded version of a model and ends with it: its file has no name as soon as it is open, so nothing
//! of it can be found by another version, another process, or after a crash.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::base::{Error, Result};
use crate::config::Spill;
use crate::engine::blocks::{BlockHash, BlockId, Blocks};
use crate::kernel::Buffer;

/// Where one block lies in a [`Store`].
pub type SlotId = u32;

/// Which prefix lies in which slot; the one that nobody asked for the longest makes room.
pub struct Index {
    /// Slots are blocks of one token that nobody holds, except while they are on their way.
    slots: Blocks,
    held: Vec<BlockId>,
}

/// Where a block goes that the pool gives away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// It is here already.
    Here,
    /// Into this slot.
    In(SlotId),
    /// Into this slot, in which another was.
    InsteadOfAnother(SlotId),
    /// Nowhere: all slots are on their way.
    Nowhere,
}

impl Index {
    /// So many empty slots.
    pub fn new(slots: usize) -> Self {
        Self { slots: Blocks::new(slots, 1), held: Vec::new() }
    }

    /// Blocks that can be found.
    pub fn len(&self) -> usize {
        self.slots.cached()
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the block with this content lies.
    pub fn find(&self, hash: BlockHash) -> Option<SlotId> {
        self.slots.find(hash)
    }

    /// A block is given away and may be wanted again.
    pub fn keep(&mut self, hash: BlockHash) -> Kept {
        let mut one = Vec::new();
        if let Some(slot) = self.slots.find(hash) {
            self.slots.adopt(slot);
            self.slots.release(&mut vec![slot]);
            return Kept::Here;
        }
        let before = self.slots.cached();
        if !self.slots.take(1, &mut one) {
            return Kept::Nowhere;
        }
        let slot = one[0];
        let kept = if self.slots.cached() < before { Kept::InsteadOfAnother(slot) } else { Kept::In(slot) };
        self.slots.publish(slot, hash);
        self.slots.release(&mut one);
        kept
    }

    /// What is in a slot is on its way: it stays there until [`Index::let_go`].
    pub fn hold(&mut self, slot: SlotId) {
        self.slots.adopt(slot);
        self.held.push(slot);
    }

    /// Nothing is on its way any more.
    pub fn let_go(&mut self) {
        self.slots.release(&mut self.held);
    }

    /// What is in a slot cannot be had.
    pub fn forget(&mut self, slot: SlotId) {
        self.slots.forget(slot);
    }
}

/// Slots of one block each.
pub struct Store {
    block_bytes: usize,
    slots: usize,
    home: Home,
}

enum Home {
    Memory(Buffer<u8>),
    /// And room for the block on its way.
    File(File, Vec<u8>),
}

impl Store {
    /// Room for as many blocks as fit. Memory is taken from the system as slots are first written, disk likewise.
    ///
    /// # Errors
    /// `BadInput` when not even one block fits, when the machine has no such memory, or the folder takes no file.
    pub fn open(spill: &Spill, block_bytes: usize) -> Result<Self> {
        let slots = spill.bytes.checked_div(block_bytes).unwrap_or(0);
        if slots == 0 {
            return Err(Error::bad_input(format!(
                "spill_bytes is {}, but a block takes {block_bytes}: give more, or leave it out",
                spill.bytes
            )));
        }
        let home = match &spill.folder {
            Some(folder) => Home::File(nameless(folder)?, vec![0; block_bytes]),
            None => Home::Memory(Buffer::try_zeroed(slots * block_bytes).ok_or_else(|| {
                Error::bad_input(format!(
                    "spill_bytes is {}, which this machine does not have: ask for less",
                    spill.bytes
                ))
            })?),
        };
        Ok(Self { block_bytes, slots, home })
    }

    /// How many blocks it holds.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Fills a slot with what `write` puts there. Says whether that worked: a disk may be full.
    pub fn put(&mut self, slot: SlotId, write: impl FnOnce(&mut [u8])) -> bool {
        let at = slot as usize * self.block_bytes;
        match &mut self.home {
            Home::Memory(memory) => {
                write(&mut memory[at..][..self.block_bytes]);
                true
            }
            Home::File(file, block) => {
                write(block);
                let written = file.write_all_at(block, at as u64);
                written.inspect_err(|error| tracing::warn!(%error, "a KV block could not be written to disk")).is_ok()
            }
        }
    }

    /// Hands what a slot was filled with to `read`. Says whether that worked.
    pub fn get(&mut self, slot: SlotId, read: impl FnOnce(&[u8])) -> bool {
        let at = slot as usize * self.block_bytes;
        match &mut self.home {
            Home::Memory(memory) => {
                read(&memory[at..][..self.block_bytes]);
                true
            }
            Home::File(file, block) => match file.read_exact_at(block, at as u64) {
                Ok(()) => {
                    read(block);
                    true
                }
                Err(error) => {
                    tracing::warn!(%error, "a KV block could not be read from disk");
                    false
                }
            },
        }
    }
}

/// A file that is gone when it is closed, however that happens.
fn nameless(folder: &Path) -> Result<File> {
    let wrong = |error: std::io::Error| {
        let folder = folder.display();
        Error::bad_input(format!("spill_folder = {folder}: {error}; name a folder where the daemon may write"))
            .with_source(error)
    };
    let name = format!(".neurond-spill-{:032x}", uuid::Uuid::new_v4().as_u128());
    let path = folder.join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(wrong)?;
    std::fs::remove_file(&path).map_err(wrong)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_keeps_what_was_asked_for_last() {
        let mut index = Index::new(2);
        let [a, b, c, d] = [1, 2, 3, 4].map(|token| BlockHash::root(0, 0).then(&[token]));
        assert_eq!([index.keep(a), index.keep(b), index.keep(a)], [Kept::In(0), Kept::In(1), Kept::Here]);
        assert_eq!(index.keep(c), Kept::InsteadOfAnother(1));
        assert_eq!([a, b, c].map(|hash| index.find(hash)), [Some(0), None, Some(1)]);
        index.hold(0);
        index.hold(1);
        assert_eq!(index.keep(d), Kept::Nowhere);
        index.let_go();
        index.forget(0);
        assert_eq!((index.find(a), index.len()), (None, 1));
        assert_eq!([index.keep(d), index.keep(b)], [Kept::In(0), Kept::InsteadOfAnother(1)]);
    }

    fn check(folder: Option<&Path>) {
        let spill = Spill { bytes: 100, folder: folder.map(Path::to_path_buf) };
        let mut store = Store::open(&spill, 32).unwrap();
        assert_eq!(store.slots(), 3);
        for round in 0..2u8 {
            for slot in 0..3u8 {
                assert!(store.put(slot.into(), |block| block.fill(10 * round + slot)));
            }
            for slot in [2, 0, 1u8] {
                let mut found = Vec::new();
                assert!(store.get(slot.into(), |block| found.extend_from_slice(block)));
                assert_eq!(found, [10 * round + slot; 32]);
            }
        }
    }

    #[test]
    fn a_slot_gives_back_what_it_was_given() {
        check(None);
        let folder = tempfile::tempdir().unwrap();
        check(Some(folder.path()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let refused = |bytes, folder: Option<&str>| {
            let spill = Spill { bytes, folder: folder.map(Into::into) };
            Store::open(&spill, 32).map(|_| ()).unwrap_err().message().to_owned()
        };
        assert!(refused(31, None).starts_with("spill_bytes is 31, but a block takes 32"));
        assert!(refused(99, Some("/no/such/folder")).starts_with("spill_folder = /no/such/folder: No such file"));
    }

    #[test]
    fn a_slot_that_cannot_be_read_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(&Spill { bytes: 64, folder: Some(folder.path().into()) }, 32).unwrap();
        assert!(!store.get(1, |_| panic!("nothing was written there")));
    }
}
