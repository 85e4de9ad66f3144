//! The paged KV pool as book-keeping: who holds which block, which are free, and which hold tokens worth finding again.
//!
//! ```text
//! free list, oldest first:   [no content] … [cached, oldest] … [cached, newest]
//!                             ^ taken here                      ^ freed here
//! ```
//!
//! A block is referenced by tables (`refs > 0`) or lies in the free list (`refs == 0`), never both. A free block that was
//! published keeps its hash, so that a later prompt with the same beginning finds it, until the block is taken for
//! something else. Blocks are shared only when full; one that several will write to is copied for each (`scheduler.rs`).
//!
//! Pure book-keeping: the memory itself belongs to the runner.

use std::hash::Hasher;

/// Index of a block in the runner's KV pool.
pub type BlockId = u32;

const NONE: BlockId = BlockId::MAX;
/// In the place of a link: this block is in no chain.
const UNNAMED: BlockId = BlockId::MAX - 1;
/// Chains for each block: so many that few have a second block, since each block of a chain is another cache miss.
const CHAINS: usize = 4;
/// Tokens hashed at a time, so that the hash input fits a small stack buffer.
const PIECE: usize = 32;

/// Names the content of a full block and of everything before it: 128 bits of BLAKE3 over the parent's name and the
/// block's tokens. The first parent comes from a salt, so equal prompts under different salts never meet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The parent of first blocks. `domain` separates kinds of salt, so that no value of one equals a value of another.
    pub fn root(domain: u8, salt: u64) -> Self {
        let mut input = [0; 9];
        input[0] = domain;
        input[1..].copy_from_slice(&salt.to_le_bytes());
        Self::of(&input)
    }

    /// The name of the block that follows this one and holds `tokens`.
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut name = self;
        for piece in tokens.chunks(PIECE) {
            let mut input = [0; 16 + 4 * PIECE];
            input[..16].copy_from_slice(&name.0.to_le_bytes());
            for (bytes, token) in input[16..].chunks_exact_mut(4).zip(piece) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            name = Self::of(&input[..16 + 4 * piece.len()]);
        }
        name
    }

    /// As [`BlockHash::then`] in a fraction of the time, but whoever wants two contents of one name can find them: for
    /// simulations, whose callers want nothing.
    pub fn then_quickly(self, tokens: &[u32]) -> Self {
        let fold = |one: u64, other: u64| {
            let product = u128::from(one) * u128::from(other);
            product as u64 ^ (product >> 64) as u64
        };
        let (mut low, mut high) = (self.0 as u64, (self.0 >> 64) as u64);
        for four in tokens.chunks(4) {
            let word = |at: usize| four.get(at).copied().map_or(0, u64::from);
            let (one, other) = (word(0) | word(1) << 32, word(2) | word(3) << 32);
            // Neither waits for the other: a name takes as long as one of them.
            low = fold(low ^ one, 0x9e37_79b9_7f4a_7c15 ^ other);
            high = fold(high ^ other, 0xd6e8_feb8_6659_fd93 ^ one.rotate_left(29));
        }
        Self(u128::from(fold(low ^ high, 0xa076_1d64_78bd_642f)) | u128::from(high) << 64)
    }

    fn of(input: &[u8]) -> Self {
        let digest = blake3::hash(input);
        let mut low = [0; 16];
        low.copy_from_slice(&digest.as_bytes()[..16]);
        Self(u128::from_le_bytes(low))
    }
}

/// The name is already uniform: its low half is the map's hash.
#[derive(Default)]
pub struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
}

/// Half a cache line: most of what is done here is to look at a block that nobody has looked at for a while.
#[repr(align(32))]
struct Block {
    /// What it can be found by while it is in a chain.
    hash: BlockHash,
    refs: u32,
    /// Neighbours in the free list; [`NONE`] at its ends and outside of it.
    prev: BlockId,
    next: BlockId,
    /// The next block in the chain of its hash; [`NONE`] at its end, [`UNNAMED`] outside of it.
    chain: BlockId,
}

impl Block {
    fn is_named(&self) -> bool {
        self.chain != UNNAMED
    }
}

/// All blocks of one KV pool. Nothing is allocated after [`Blocks::new`].
pub struct Blocks {
    blocks: Vec<Block>,
    /// Where the chain of each remainder of a hash begins.
    chains: Vec<BlockId>,
    head: BlockId,
    tail: BlockId,
    free: usize,
    cached: usize,
    tokens: usize,
    /// Blocks taken although they could be found, if anybody wants to know.
    evicted: Option<Vec<(BlockId, BlockHash)>>,
}

impl Blocks {
    /// A pool of `total` free blocks of `tokens` tokens each.
    pub fn new(total: usize, tokens: usize) -> Self {
        let mut pool = Self {
            blocks: (0..total)
                .map(|_| Block { hash: BlockHash(0), refs: 0, prev: NONE, next: NONE, chain: UNNAMED })
                .collect(),
            chains: vec![NONE; total.next_power_of_two() * CHAINS],
            head: NONE,
            tail: NONE,
            free: 0,
            cached: 0,
            tokens: tokens.max(1),
            evicted: None,
        };
        for id in 0..total as BlockId {
            pool.append(id);
        }
        pool
    }

    /// Blocks of the pool.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that no table holds, cached ones included.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Blocks that tables hold.
    pub fn used(&self) -> usize {
        self.total() - self.free
    }

    /// Free blocks whose content can still be found.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens in a block.
    pub fn block_tokens(&self) -> usize {
        self.tokens
    }

    /// Blocks that `tokens` tokens need.
    pub fn needed(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens)
    }

    /// The block with this content, if there is one.
    pub fn find(&self, hash: BlockHash) -> Option<BlockId> {
        let mut id = self.chains[self.chain_of(hash)];
        while id != NONE && self.blocks[id as usize].hash != hash {
            id = self.blocks[id as usize].chain;
        }
        (id != NONE).then_some(id)
    }

    /// A name is uniform already.
    fn chain_of(&self, hash: BlockHash) -> usize {
        hash.0 as usize & (self.chains.len() - 1)
    }

    /// From now on the block cannot be found. Returns its name, if it had one.
    fn unname(&mut self, id: BlockId) -> Option<BlockHash> {
        let Block { hash, chain, .. } = self.blocks[id as usize];
        if chain == UNNAMED {
            return None;
        }
        self.blocks[id as usize].chain = UNNAMED;
        let first = self.chain_of(hash);
        if self.chains[first] == id {
            self.chains[first] = chain;
            return Some(hash);
        }
        let mut before = self.chains[first];
        while self.blocks[before as usize].chain != id {
            before = self.blocks[before as usize].chain;
        }
        self.blocks[before as usize].chain = chain;
        Some(hash)
    }

    /// Whether no table holds the block.
    pub fn is_free(&self, id: BlockId) -> bool {
        self.blocks[id as usize].refs == 0
    }

    /// One more table holds the block, which was found by its content.
    pub fn adopt(&mut self, id: BlockId) {
        if self.is_free(id) {
            self.unlink(id);
            self.cached -= usize::from(self.blocks[id as usize].is_named());
        }
        self.blocks[id as usize].refs += 1;
    }

    /// Moves `count` free blocks to the end of a table, or none if there are not enough. What they held is forgotten.
    #[must_use]
    pub fn take(&mut self, count: usize, table: &mut Vec<BlockId>) -> bool {
        if count > self.free {
            return false;
        }
        for _ in 0..count {
            let id = self.head;
            self.unlink(id);
            self.blocks[id as usize].refs = 1;
            if let Some(hash) = self.unname(id) {
                self.cached -= 1;
                self.evicted.iter_mut().for_each(|evicted| evicted.push((id, hash)));
            }
            table.push(id);
        }
        true
    }

    /// Makes a full block findable. Where another block already has this content, that one stays the one to find.
    pub fn publish(&mut self, id: BlockId, hash: BlockHash) {
        debug_assert!(!self.is_free(id), "only held blocks are published");
        debug_assert!(!self.blocks[id as usize].is_named(), "a block is published once");
        if self.find(hash).is_none() {
            let chain = self.chain_of(hash);
            let first = std::mem::replace(&mut self.chains[chain], id);
            let block = &mut self.blocks[id as usize];
            (block.hash, block.chain) = (hash, first);
        }
    }

    /// From now on [`Blocks::drain_evicted`] says which blocks were taken although they could be found.
    pub fn remember_evicted(&mut self) {
        self.evicted.get_or_insert_default();
    }

    /// Blocks taken since the last call, and what they held.
    pub fn drain_evicted(&mut self) -> impl Iterator<Item = (BlockId, BlockHash)> {
        self.evicted.iter_mut().flat_map(|evicted| evicted.drain(..))
    }

    /// What a block holds is not to be found any more.
    pub fn forget(&mut self, id: BlockId) {
        if self.unname(id).is_some() && self.is_free(id) {
            self.cached -= 1;
            // Taking this one first costs no prefix hit.
            self.unlink(id);
            self.prepend(id);
        }
    }

    /// Gives a table's blocks back and empties it. The last block goes first, so that the ends of sequences are taken
    /// again before the beginnings that others may share.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        self.shorten(table, 0);
    }

    /// Gives back all but a table's first `keep` blocks.
    pub fn shorten(&mut self, table: &mut Vec<BlockId>, keep: usize) {
        for id in table.drain(keep.min(table.len())..).rev() {
            let block = &mut self.blocks[id as usize];
            debug_assert!(block.refs > 0, "block {id} released more often than held");
            block.refs -= 1;
            if block.refs > 0 {
                continue;
            }
            if block.is_named() {
                self.cached += 1;
                self.append(id);
            } else {
                // Nothing to find here: taking this one first costs no prefix hit.
                self.prepend(id);
            }
        }
    }

    fn append(&mut self, id: BlockId) {
        let tail = self.tail;
        self.blocks[id as usize].prev = tail;
        match tail {
            NONE => self.head = id,
            _ => self.blocks[tail as usize].next = id,
        }
        self.tail = id;
        self.free += 1;
    }

    fn prepend(&mut self, id: BlockId) {
        let head = self.head;
        self.blocks[id as usize].next = head;
        match head {
            NONE => self.tail = id,
            _ => self.blocks[head as usize].prev = id,
        }
        self.head = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { prev, next, .. } = self.blocks[id as usize];
        match prev {
            NONE => self.head = next,
            _ => self.blocks[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            _ => self.blocks[next as usize].prev = prev,
        }
        let block = &mut self.blocks[id as usize];
        (block.prev, block.next) = (NONE, NONE);
        self.free -= 1;
    }

    /// The free blocks, next to be taken first, and whether something can be found in them.
    #[cfg(test)]
    pub(super) fn free_list(&self) -> Vec<(BlockId, bool)> {
        let real = |id: BlockId| (id != NONE).then_some(id);
        let ids = std::iter::successors(real(self.head), |&id| real(self.blocks[id as usize].next));
        ids.map(|id| (id, self.blocks[id as usize].is_named())).collect()
    }

    /// Compares the books with the tables of all running sequences. For tests, simulations and debug builds: it walks
    /// the whole pool.
    ///
    /// # Errors
    /// The first sentence that is not true.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), String> {
        let mut refs = vec![0u32; self.total()];
        for table in tables {
            for &id in table {
                refs[id as usize] += 1;
            }
        }
        for (id, (block, &held)) in self.blocks.iter().zip(&refs).enumerate() {
            if block.refs != held {
                return Err(format!("block {id} counts {} references, tables hold {held}", block.refs));
            }
            if block.is_named() && self.find(block.hash) != Some(id as BlockId) {
                return Err(format!("block {id} has a hash that leads elsewhere"));
            }
        }
        for (chain, &first) in self.chains.iter().enumerate() {
            let mut id = first;
            while id != NONE {
                let block = &self.blocks[id as usize];
                if !block.is_named() || self.chain_of(block.hash) != chain {
                    return Err(format!("block {id} is in a chain that is not its own"));
                }
                id = block.chain;
            }
        }
        let (mut free, mut cached, mut before, mut id) = (0, 0, NONE, self.head);
        while id != NONE {
            let block = &self.blocks[id as usize];
            if block.refs != 0 || block.prev != before {
                return Err(format!("block {id} lies wrongly in the free list"));
            }
            free += 1;
            cached += usize::from(block.is_named());
            (before, id) = (id, block.next);
            if free > self.total() {
                return Err("the free list is a circle".into());
            }
        }
        if before != self.tail || free != self.free || cached != self.cached {
            return Err(format!(
                "the free list holds {free} blocks ({cached} cached), not {} ({})",
                self.free, self.cached
            ));
        }
        let used = refs.iter().filter(|&&held| held > 0).count();
        if free + used != self.total() {
            return Err(format!("{free} free + {used} used is not {}", self.total()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Runs a script over a pool of `total` blocks of 2 tokens and compares what it says at the end.
    ///
    /// `a+2` table a takes 2 blocks · `a=xy` publishes them under the chain x, y · `a?xy` adopts as much of the chain
    /// as is found · `a-` releases. The result lists tables, then free / cached counts.
    fn check(total: usize, script: &str, expected: &str) {
        let mut pool = Blocks::new(total, 2);
        let mut tables: BTreeMap<char, Vec<BlockId>> = BTreeMap::new();
        for word in script.split_whitespace() {
            let (name, rest) = (word.chars().next().unwrap(), &word[1..]);
            let table = tables.entry(name).or_default();
            let chain = |names: &str| {
                let mut hash = BlockHash::root(0, 7);
                names.bytes().map(|byte| (hash = hash.then(&[byte.into(), 0]), hash).1).collect::<Vec<_>>()
            };
            match rest.split_at(1) {
                ("+", count) => {
                    let before = table.len();
                    if !pool.take(count.parse().unwrap(), table) {
                        assert_eq!(table.len(), before, "a failed take changes nothing");
                    }
                }
                ("=", names) => table.iter().zip(chain(names)).for_each(|(&id, hash)| pool.publish(id, hash)),
                ("?", names) => {
                    let found: Vec<_> = chain(names).into_iter().map_while(|hash| pool.find(hash)).collect();
                    for id in found {
                        pool.adopt(id);
                        table.push(id);
                    }
                }
                ("-", _) => pool.release(table),
                other => panic!("{other:?}"),
            }
            pool.check(tables.values().map(Vec::as_slice)).unwrap_or_else(|error| panic!("after {word}: {error}"));
        }
        let tables: Vec<_> = tables.iter().map(|(name, table)| format!("{name}{table:?}")).collect();
        assert_eq!(format!("{} {}/{}", tables.join(" "), pool.free(), pool.cached()), expected, "{script}");
    }

    #[test]
    fn blocks_are_taken_from_the_head_and_all_or_none() {
        check(4, "a+3 b+2 c+1", "a[0, 1, 2] b[] c[3] 0/0");
    }

    #[test]
    fn a_released_prefix_is_found_until_its_blocks_are_taken() {
        check(4, "a+2 a=xy a- b?xyz", "a[] b[0, 1] 2/0");
        check(4, "a+2 a=xy a- b+2 c?xy", "a[] b[2, 3] c[0, 1] 0/0");
        check(4, "a+2 a=xy a- b+3 c?xy", "a[] b[2, 3, 1] c[0] 0/0");
        check(4, "a+2 a=xy a- b+4 c?xy", "a[] b[2, 3, 1, 0] c[] 0/0");
    }

    #[test]
    fn the_end_of_a_sequence_is_taken_before_its_beginning() {
        check(3, "a+3 a=xyz a- b+1 c?xyz", "a[] b[2] c[0, 1] 0/0");
    }

    #[test]
    fn a_shared_block_is_free_when_its_last_table_lets_go() {
        check(3, "a+2 a=xy b?x a-", "a[] b[0] 2/1");
        check(3, "a+2 a=xy b?x b- a-", "a[] b[] 3/2");
    }

    #[test]
    fn blocks_with_nothing_to_find_are_taken_first() {
        check(3, "a+1 a=x b+1 a- b- c+2 d?x", "a[] b[] c[1, 2] d[0] 0/0");
    }

    #[test]
    fn equal_content_in_two_blocks_is_found_in_the_first() {
        check(4, "a+1 b+1 a=x b=x c?x b- a- c-", "a[] b[] c[] 4/1");
    }

    #[test]
    fn a_chain_names_everything_before_it_and_its_salt() {
        for then in [BlockHash::then, BlockHash::then_quickly] {
            let root = BlockHash::root(0, 1);
            let two = |one: [u32; 2], other: [u32; 2]| then(then(root, &one), &other);
            assert_eq!(two([1, 2], [3, 4]), two([1, 2], [3, 4]));
            assert_ne!(two([1, 2], [3, 4]), two([2, 1], [3, 4]));
            assert_ne!(then(root, &[1, 2]), then(BlockHash::root(0, 2), &[1, 2]));
            assert_ne!(then(root, &[1, 2]), then(BlockHash::root(1, 1), &[1, 2]));
            let long: Vec<u32> = (0..100).collect();
            assert_ne!(then(root, &long), then(root, &long[..99]));
        }
    }

    #[test]
    fn quick_names_do_not_meet_by_chance() {
        let mut seen = std::collections::HashSet::new();
        for first in 0..2_000u32 {
            let mut name = BlockHash::root(0, 1);
            for block in 0..50 {
                let tokens: Vec<u32> = (0..16).map(|at| first * 3 + block * 16 + at).collect();
                name = name.then_quickly(&tokens);
                assert!(seen.insert(name.0 as u64), "in the half that the map looks at");
            }
        }
    }

    #[test]
    fn blocks_are_found_in_chains_of_any_length() {
        let mut pool = Blocks::new(64, 1);
        // Names of one remainder: one chain.
        let name = |at: u32| BlockHash(u128::from(at) << 64 | 5);
        let mut tables: Vec<Vec<BlockId>> = (0..64).map(|_| Vec::new()).collect();
        for (at, table) in (0..).zip(&mut tables) {
            assert!(pool.take(1, table));
            pool.publish(table[0], name(at));
        }
        // First, last and middle ones leave.
        for gone in [63, 0, 31, 30, 32] {
            pool.forget(tables[gone][0]);
            pool.check(tables.iter().map(Vec::as_slice)).unwrap();
            assert_eq!(pool.find(name(gone as u32)), None);
        }
        let found = (0..64).filter(|&at| pool.find(name(at)) == Some(tables[at as usize][0])).count();
        assert_eq!(found, 59);
        assert_eq!(std::mem::size_of::<Block>(), 32);
    }

    #[test]
    fn a_broken_book_is_noticed() {
        let mut pool = Blocks::new(2, 2);
        let mut table = Vec::new();
        assert!(pool.take(1, &mut table));
        assert!(pool.check(std::iter::empty()).is_err(), "a leaked block");
        assert!(
            pool.check([table.as_slice(), table.as_slice()].into_iter()).is_err(),
            "a block shared without a reference"
        );
        assert!(pool.check(std::iter::once(table.as_slice())).is_ok());
    }
}
