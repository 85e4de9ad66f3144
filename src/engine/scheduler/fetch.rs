//! Blocks that leave the pool for slots outside it, and come back when somebody asks for what they held.
//!
//! ```text
//! pool ──spill──> slots       what the step's newcomers pushed out, in place of what nobody asked for the longest
//!   ^               |
//!   +────fetch──────+         what the next in line would have found; it is admitted when that is there
//! ```
//!
//! Which slot holds what is the [`Index`]'s business; whoever computes the plan does the copying, and says here how it
//! went.

use super::Scheduler;
use super::plan::Plan;
use crate::engine::blocks::{BlockHash, BlockId};
use crate::engine::sequence::SequenceKey;
use crate::engine::spill::{Index, Kept, SlotId};

/// Spilled blocks fetched in a step, at most: they are copied while everybody waits.
const MOST_FETCHED: usize = 32;

impl Scheduler {
    /// Has blocks fetched that a sequence would find if they had not been spilled; `hits` of `most` are in the pool.
    pub(super) fn fetch(&mut self, key: SequenceKey, hits: usize, most: usize, plan: &mut Plan) -> bool {
        let (Some(index), sequence) = (&mut self.spilled, &mut self.sequences[key]) else { return false };
        let room = MOST_FETCHED.saturating_sub(plan.fetch.len());
        let wanted = &sequence.hashes[hits..most];
        let count = wanted.iter().take(room).take_while(|&&hash| index.find(hash).is_some()).count();
        // However small the pool is, what is fetched and taken again has an end.
        if count == 0 || sequence.fetched > 2 * most {
            return false;
        }
        for &hash in &sequence.hashes[..hits] {
            if let Some(block) = self.blocks.find(hash) {
                self.blocks.adopt(block);
                self.fetching.push(block);
            }
        }
        let first = self.fetching.len();
        if !self.blocks.take(count, &mut self.fetching) {
            self.blocks.release(&mut self.fetching);
            return false;
        }
        sequence.fetched += count;
        for (&hash, &block) in wanted.iter().zip(&self.fetching[first..]) {
            if let Some(slot) = index.find(hash) {
                index.hold(slot);
                plan.fetch.push((slot, block, hash));
            }
        }
        true
    }

    /// What the pool gave away in this step goes to the slots of those that nobody asked for the longest.
    pub(super) fn spill(&mut self, plan: &mut Plan) {
        let Some(index) = &mut self.spilled else { return };
        for (block, hash) in self.blocks.drain_evicted() {
            match index.keep(hash) {
                Kept::In(slot) => plan.spill.push((block, slot)),
                Kept::InsteadOfAnother(slot) => {
                    plan.spill.push((block, slot));
                    plan.given_up += 1;
                }
                Kept::Here | Kept::Nowhere => {}
            }
        }
    }

    /// A block was filled from a slot, or could not be.
    pub fn fetched(&mut self, (slot, block, hash): (SlotId, BlockId, BlockHash), worked: bool) {
        match worked {
            true => self.blocks.publish(block, hash),
            false => self.not_spilled(slot),
        }
    }

    /// What should have gone into a slot is not there.
    pub fn not_spilled(&mut self, slot: SlotId) {
        self.spilled.iter_mut().for_each(|index| index.forget(slot));
    }

    /// All blocks of the plan were fetched, or could not be: they can be found now.
    pub fn fetching_is_over(&mut self) {
        self.spilled.iter_mut().for_each(Index::let_go);
        self.blocks.release(&mut self.fetching);
    }

    /// Blocks kept outside the pool.
    pub fn spilled(&self) -> usize {
        self.spilled.as_ref().map_or(0, Index::len)
    }
}
