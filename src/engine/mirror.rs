//! Which of the pool's blocks the draft model has as well.
//!
//! ```text
//! block          7      8      9           ids and block tables are the target's
//! target         abcd   efgh   ij..
//! draft model    abcd   (old)  ij..        computed only when a sequence is guessed by it
//! tags           #abcd  -      -           what the draft model's whole blocks hold
//! ```
//!
//! The draft model's pool has a block for each of the target's, under the same ids. It is filled late, and only for
//! sequences that it guesses for, so what the prefix cache finds is not always there: a tag says what a block holds. A
//! tag is taken away with the first row that is written to the block, never because the target uses it for something else,
//! so it is true whatever happens to the block meanwhile.

use crate::engine::blocks::{BlockHash, BlockId};

/// Tags of all blocks.
pub struct Mirror(Vec<Option<BlockHash>>);

impl Mirror {
    /// So many blocks that hold nothing.
    pub fn new(blocks: usize) -> Self {
        Self(vec![None; blocks])
    }

    /// Something is written to a block.
    pub fn written(&mut self, block: BlockId) {
        self.0[block as usize] = None;
    }

    /// A block holds all of this.
    pub fn holds(&mut self, block: BlockId, content: BlockHash) {
        self.0[block as usize] = Some(content);
    }

    /// Whether a block holds all of this.
    pub fn has(&self, block: BlockId, content: BlockHash) -> bool {
        self.0[block as usize] == Some(content)
    }
}
