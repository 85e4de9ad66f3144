//! Prefixes on their way: full blocks that a running sequence will have computed in a moment, and who waits for them.
//!
//! ```text
//! a (runs)      [==== published ====|~~~~ announced ~~~~]  its own rest
//! b (follows)   [==== found =======>|.. waits for these .]  its own rest
//! ```
//!
//! A sequence that begins like one that is being computed would compute the same blocks again. It follows instead: it
//! waits outside the queue until the last block they share is published, or until whoever computes it is gone, and is
//! then the first of its line. Whoever is followed runs, so nobody waits for somebody who waits.
//!
//! Pure book-keeping by hash: knows neither blocks nor tokens.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::engine::blocks::{BlockHash, Uniform};
use crate::engine::queue::Ticket;
use crate::engine::sequence::SequenceKey;

/// Announced blocks and their followers.
#[derive(Default)]
pub struct Coming {
    /// Who computes a block. Where two do, the first.
    leaders: HashMap<BlockHash, SequenceKey, BuildHasherDefault<Uniform>>,
    /// In order of arrival.
    followers: Vec<Follower>,
}

/// Somebody who waits for a block.
#[derive(Clone, Copy)]
pub struct Follower {
    /// Its place in the queue when the wait is over.
    pub ticket: Ticket,
    /// The last block it shares with its leader.
    pub block: BlockHash,
    /// Who computes it.
    pub leader: SequenceKey,
}

impl Coming {
    /// `leader` is going to compute these blocks.
    pub fn announce(&mut self, leader: SequenceKey, blocks: &[BlockHash]) {
        for &block in blocks {
            self.leaders.entry(block).or_insert(leader);
        }
    }

    /// `leader` has computed these blocks, or will not.
    pub fn settle(&mut self, leader: SequenceKey, blocks: &[BlockHash]) {
        for block in blocks {
            if self.leaders.get(block) == Some(&leader) {
                self.leaders.remove(block);
            }
        }
    }

    /// Who is going to compute this block.
    pub fn leader(&self, block: BlockHash) -> Option<SequenceKey> {
        self.leaders.get(&block).copied()
    }

    /// From now on somebody waits for a block.
    pub fn follow(&mut self, follower: Follower) {
        debug_assert_eq!(self.leader(follower.block), Some(follower.leader), "nobody waits for what is not coming");
        self.followers.push(follower);
    }

    /// Those who have nothing to wait for any more: their block is settled, or `is_stuck` says so of their leader.
    pub fn released(&mut self, is_stuck: impl Fn(SequenceKey) -> bool) -> impl DoubleEndedIterator<Item = Ticket> {
        let (leaders, mut free) = (&self.leaders, Vec::new());
        self.followers.retain(|follower| {
            let waits = leaders.get(&follower.block) == Some(&follower.leader) && !is_stuck(follower.leader);
            free.extend((!waits).then_some(follower.ticket));
            waits
        });
        free.into_iter()
    }

    /// Somebody does not wait any more. Says whether they did.
    pub fn leave(&mut self, sequence: SequenceKey) -> bool {
        let before = self.followers.len();
        self.followers.retain(|follower| follower.ticket.sequence != sequence);
        self.followers.len() < before
    }

    /// How many wait.
    pub fn followers(&self) -> &[Follower] {
        &self.followers
    }

    /// Blocks on their way.
    pub fn len(&self) -> usize {
        self.leaders.len()
    }

    /// Whether no block is on its way.
    pub fn is_empty(&self) -> bool {
        self.leaders.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(count: u32) -> Vec<BlockHash> {
        let mut hash = BlockHash::root(0, 1);
        (0..count).map(|at| (hash = hash.then(&[at]), hash).1).collect()
    }

    fn follower(sequence: u32, block: BlockHash, leader: SequenceKey) -> Follower {
        Follower { ticket: Ticket { sequence, account: 0, priority: 0, arrival: sequence.into() }, block, leader }
    }

    fn released(coming: &mut Coming, stuck: Option<SequenceKey>) -> Vec<u32> {
        coming.released(|leader| Some(leader) == stuck).map(|ticket| ticket.sequence).collect()
    }

    #[test]
    fn followers_go_when_their_last_shared_block_is_there() {
        let (mut coming, blocks) = (Coming::default(), blocks(3));
        coming.announce(7, &blocks);
        coming.follow(follower(1, blocks[1], 7));
        coming.follow(follower(2, blocks[0], 7));
        coming.follow(follower(3, blocks[1], 7));
        assert_eq!(released(&mut coming, None), [0; 0]);
        coming.settle(7, &blocks[..1]);
        assert_eq!(released(&mut coming, None), [2]);
        coming.settle(7, &blocks[1..2]);
        assert_eq!(released(&mut coming, None), [1, 3]);
        assert_eq!((coming.len(), coming.followers().len()), (1, 0));
    }

    #[test]
    fn followers_of_somebody_who_left_or_stands_still_go_on_alone() {
        let (mut coming, blocks) = (Coming::default(), blocks(2));
        coming.announce(7, &blocks);
        coming.follow(follower(1, blocks[1], 7));
        coming.settle(7, &blocks);
        assert_eq!(released(&mut coming, None), [1]);
        coming.announce(8, &blocks);
        coming.follow(follower(2, blocks[1], 8));
        coming.follow(follower(3, blocks[1], 8));
        assert!(coming.leave(2) && !coming.leave(2));
        assert_eq!(released(&mut coming, Some(8)), [3]);
    }

    #[test]
    fn a_block_that_two_compute_is_settled_by_the_first() {
        let (mut coming, blocks) = (Coming::default(), blocks(1));
        coming.announce(7, &blocks);
        coming.announce(8, &blocks);
        coming.settle(8, &blocks);
        assert_eq!(coming.leader(blocks[0]), Some(7));
        coming.settle(7, &blocks);
        assert!(coming.is_empty());
    }
}
