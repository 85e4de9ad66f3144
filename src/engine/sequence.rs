//! One sequence: a prompt and the answer so far, of one choice of one request.
//!
//! ```text
//! tokens    [ prompt ........ | produced ...... ]      known
//! computed   ~~~~~~~~~~~~~~~~~~~~~~~~~~^               K and V are in the pool up to here
//! left                                 |-------|       what the scheduler still has to compute
//! ```
//!
//! `left` is all that scheduling looks at: a prompt in chunks, one token a step, a sequence that lost its blocks and a
//! prefix that was found are all the same thing with another `left`. Drafts are tokens that nobody knows yet: while a step
//! verifies them `computed` runs ahead of what is known, and [`Sequence::settle`] takes it back to what came true.

use crate::engine::blocks::{BlockHash, BlockId, Blocks};
use crate::engine::mirror::Mirror;
use crate::engine::queue::Ticket;
use crate::engine::speculate::Guesses;

/// A sequence known to the scheduler.
pub type SequenceKey = u32;
/// A request known to the scheduler.
pub type RequestKey = u32;

/// The scheduling state of one choice.
pub struct Sequence {
    /// Whose it is.
    pub request: RequestKey,
    /// Which choice, from 0.
    pub choice: u32,
    /// Its place when it waits.
    pub ticket: Ticket,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Most tokens this sequence may have, the prompt's included.
    pub most: usize,
    /// Tokens whose K and V are in the pool, counted from the first.
    pub computed: usize,
    /// Tokens whose K and V the draft model has as well, if there is one.
    pub mirrored: usize,
    /// Blocks of `table` that are tagged as such.
    pub tagged: usize,
    /// Tokens of the prompt whose logits were looked at, where they are wanted; the last one's always are.
    pub scored: Option<usize>,
    /// Where K and V are. While the sequence runs there is a block for every known token.
    pub table: Vec<BlockId>,
    /// Blocks of `table` that can be found by others, or need not be offered again.
    pub published: usize,
    /// Names of full blocks, as far as they were needed. Survives preemption.
    pub hashes: Vec<BlockHash>,
    /// They are named by [`BlockHash::then_quickly`].
    pub named_quickly: bool,
    /// Counts up with each admission; 0 while waiting.
    pub admitted: u64,
    /// The plan that last gave it rows, or admitted it.
    pub fed: u64,
    /// Blocks that were fetched for it from outside the pool.
    pub fetched: usize,
    /// How often it lost its blocks.
    pub preemptions: u32,
    /// The parent of its first block.
    pub root: BlockHash,
    /// What it expects to say next.
    pub guesses: Guesses,
}

impl Sequence {
    /// Known tokens that are not computed yet; none while drafts are being verified.
    pub fn left(&self) -> usize {
        self.tokens.len().saturating_sub(self.computed)
    }

    /// Whether it has more to compute than the token that was drawn last, or is being drawn.
    pub fn reads(&self) -> bool {
        self.left() > 1
    }

    /// Tokens of the answer so far.
    pub fn produced(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Makes sure that the first `count` full blocks have names.
    pub fn name_blocks(&mut self, count: usize, block_tokens: usize) {
        while self.hashes.len() < count {
            let from = self.hashes.len() * block_tokens;
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            let tokens = &self.tokens[from..from + block_tokens];
            self.hashes.push(if self.named_quickly { parent.then_quickly(tokens) } else { parent.then(tokens) });
        }
    }

    /// Offers the blocks that are full and computed to others. Drafts are not known and never offered.
    pub fn publish(&mut self, blocks: &mut Blocks) {
        let full = self.computed.min(self.tokens.len()) / blocks.block_tokens();
        if full == self.published {
            return;
        }
        self.name_blocks(full, blocks.block_tokens());
        for at in self.published..full {
            blocks.publish(self.table[at], self.hashes[at]);
        }
        self.published = full;
    }

    /// In the step being planned the draft model computes the known tokens up to `to` and `drafts` more.
    pub fn mirror(&mut self, mirror: &mut Mirror, to: usize, drafts: usize, block_tokens: usize) {
        let (from, end) = (self.mirrored, to + drafts);
        self.table[from / block_tokens..end.div_ceil(block_tokens)].iter().for_each(|&block| mirror.written(block));
        self.name_blocks(to / block_tokens, block_tokens);
        // Drafts that came true may have filled blocks before `from`.
        for at in self.tagged..to / block_tokens {
            mirror.holds(self.table[at], self.hashes[at]);
        }
        self.tagged = to / block_tokens;
        self.mirrored = end;
    }

    /// Drafts were verified: K and V of those that did not come true count no more, and blocks taken for them go back.
    pub fn settle(&mut self, blocks: &mut Blocks) {
        // What was drawn last is not computed.
        self.computed = self.computed.min(self.tokens.len() - 1);
        self.mirrored = self.mirrored.min(self.computed);
        self.publish(blocks);
        let keep = blocks.needed(self.tokens.len());
        blocks.shorten(&mut self.table, keep);
    }

    /// How hard this sequence is to throw out of the batch. Each time it was makes it one level harder, so that a
    /// low priority cannot be recomputed for ever.
    pub fn standing(&self) -> (i64, std::cmp::Reverse<u64>) {
        (i64::from(self.ticket.priority) + i64::from(self.preemptions), std::cmp::Reverse(self.admitted))
    }
}
