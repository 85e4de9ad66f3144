//! One step, decided: whose rows it has, what is drawn after them, and what is moved before.
//!
//! ```text
//! parts      a            b                   c            whose rows: a part has one span of the batch
//! rows       7 8 9 10     4  draft draft      0 1 2        known tokens, then guesses of what follows them
//! sampled          ^      ^    ^     ^        ? ?          ^ a token is drawn, ? the prompt's next one is looked up
//! ```
//!
//! Parts and their [`Share`]s are noted while the scheduler decides, and packed into a batch when everybody has theirs.
//! Whoever computes a [`Plan`] reads it, and fills in what a draft model guessed. Decides nothing.

use std::time::Duration;

use super::Scheduler;
use crate::engine::blocks::{BlockHash, BlockId};
use crate::engine::pace::Load;
use crate::engine::sequence::{RequestKey, SequenceKey};
use crate::engine::speculate::Source;
use crate::engine::spill::SlotId;
use crate::model::Batch;

/// A part that could have another draft.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hope {
    pub(super) part: usize,
    pub(super) source: Source,
    /// That all its drafts so far are right.
    pub(super) chance: f32,
}

/// One step, decided. Reused from step to step, so that planning allocates nothing.
#[derive(Default)]
pub struct Plan {
    /// What the runner computes.
    pub batch: Batch,
    /// Whose rows they are, in the order of the batch's spans.
    pub parts: Vec<Planned>,
    /// Blocks to be copied, one after the other: from where, to where. Whatever is to leave the pool leaves before that;
    /// nothing is brought back and no row is written before it, even if the owner has lost its place since.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Rows after which a token is drawn or looked up, in the order of the batch's `sample_rows`.
    pub sampled: Vec<Sampled>,
    /// In the order of `sampled`: the token of the prompt that follows there, or [`DRAWN`].
    pub(super) followed_by: Vec<u32>,
    /// Requests whose first token is computed in this step, with the prompt tokens found in the prefix cache.
    pub begun: Vec<(RequestKey, usize)>,
    /// [`Scheduler::prepare`] has begun it.
    pub(in crate::engine) prepared: bool,
    /// Tokens computed that belong to prompts.
    pub prompt_rows: usize,
    /// What the step costs, drafts aside.
    pub(super) load: Load,
    /// Tokens computed with an adapter.
    pub adapted_rows: usize,
    /// Sequences that lost their blocks for want of blocks.
    pub preempted: usize,
    /// Sequences that lost their place to an account that had less.
    pub made_way: usize,
    /// Blocks to be copied out of the pool before anything else: what they held goes into a slot.
    pub spill: Vec<(BlockId, SlotId)>,
    /// Blocks to be copied back after that, before the step is computed. [`Scheduler::fetched`] for each.
    pub fetch: Vec<(SlotId, BlockId, BlockHash)>,
    /// Spilled blocks that were given up for others.
    pub given_up: usize,
    /// Sequences that began to follow another instead of computing the same blocks.
    pub followed: usize,
    /// Drafts to be verified. Those of the draft model are zeros until it has made them.
    pub drafted: usize,
    /// What the draft model computes first: known tokens. Logits are wanted of one row of each of `chains`, in their order.
    pub catch_up: Batch,
    /// Parts that it makes drafts for.
    pub chains: Vec<Chain>,
    /// What each of its passes computed, and how long that took: filled in by whoever has it compute.
    pub passes: Vec<(Load, Duration)>,
    /// In the order of `parts`.
    pub(super) shares: Vec<Share>,
    pub(super) hopes: Vec<Hope>,
    /// One part's tokens, where drafts follow the known ones.
    pub(super) tokens: Vec<u32>,
}

/// One sequence's part of a [`Plan`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planned {
    /// Which sequence.
    pub sequence: SequenceKey,
    /// Of which request.
    pub request: RequestKey,
    /// Which of its choices.
    pub choice: u32,
}

/// A row after which a token is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sampled {
    /// Whose.
    pub part: Planned,
    /// Drafts between the last known token and this row, its own included. The rows of one sequence follow each other,
    /// from 0 on.
    pub ahead: u32,
}

/// A part whose drafts the draft model makes: one in the first pass, from what is known, the next from that one, and so on.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Which part.
    pub part: usize,
    /// Its first sampled row.
    pub sampled: usize,
    /// How many drafts.
    pub drafts: usize,
}

/// How many rows of a step a part has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Known tokens.
    pub(super) rows: usize,
    /// Drafts behind them.
    pub(super) drafts: usize,
    /// Who guesses those.
    pub(super) source: Source,
    /// Known tokens that the draft model computes.
    pub(super) catch_up: usize,
    /// Places of the prompt whose logits are wanted, the last token's aside.
    pub(super) scored: (usize, usize),
}

/// No token of the prompt: one is drawn.
const DRAWN: u32 = u32::MAX;

impl Plan {
    pub(super) fn clear(&mut self) {
        self.batch.clear();
        self.parts.clear();
        self.copies.clear();
        self.sampled.clear();
        self.followed_by.clear();
        self.begun.clear();
        self.prepared = false;
        self.prompt_rows = 0;
        self.load = Load::default();
        self.adapted_rows = 0;
        self.drafted = 0;
        self.catch_up.clear();
        self.chains.clear();
        self.passes.clear();
        self.preempted = 0;
        self.made_way = 0;
        self.spill.clear();
        self.fetch.clear();
        self.given_up = 0;
        self.followed = 0;
        self.shares.clear();
        self.hopes.clear();
    }

    /// The drafts behind a sampled row of a part, which must be its first.
    pub fn drafts(&self, sampled: usize) -> &[u32] {
        debug_assert_eq!(self.sampled[sampled].ahead, 0);
        let count = self.sampled[sampled + 1..].iter().take_while(|row| row.ahead > 0).count();
        let first = self.batch.sample_rows[sampled] as usize + 1;
        &self.batch.tokens[first..first + count]
    }

    /// The drafts before a sampled row, its own included.
    pub fn ahead(&self, sampled: usize) -> &[u32] {
        let after = self.batch.sample_rows[sampled] as usize + 1;
        &self.batch.tokens[after - self.sampled[sampled].ahead as usize..after]
    }

    /// The token of the prompt that follows a sampled row, whose log-probability is wanted; `None`: a token is drawn.
    pub fn given(&self, sampled: usize) -> Option<u32> {
        self.followed_by.get(sampled).copied().filter(|&token| token != DRAWN)
    }

    /// Rows of prompts whose logits are wanted.
    pub(super) fn scored_rows(&self) -> usize {
        self.shares.iter().map(|share| share.scored.1 - share.scored.0).sum()
    }
}

impl Scheduler {
    /// Puts the rows of all parts into the batch.
    pub(super) fn pack(&mut self, plan: &mut Plan) {
        for (at, (part, share)) in plan.parts.iter().zip(&plan.shares).enumerate() {
            let sequence = &mut self.sequences[part.sequence];
            let (start, end) = (sequence.computed - share.rows, sequence.computed);
            // A token is drawn after the last known one, and after each draft.
            let samples = end == sequence.tokens.len();
            let drafts = share.drafts;
            sequence.computed = end + drafts;
            let blocks = self.blocks.needed(end + drafts);
            let foreseen = self.blocks.needed(end + drafts + self.limits.foresight).min(sequence.table.len());
            let table = &sequence.table[..blocks.max(foreseen)];
            let mut tokens = &sequence.tokens[start..end];
            if drafts > 0 {
                plan.tokens.clear();
                plan.tokens.extend_from_slice(tokens);
                match share.source {
                    Source::Lookup => {
                        plan.tokens.extend((0..drafts).filter_map(|ahead| sequence.guesses.guess(ahead)));
                    }
                    Source::Model => plan.tokens.extend((0..drafts).map(|_| 0)),
                }
                tokens = &plan.tokens;
            }
            let rows = share.rows as u32;
            let sampled = if samples { rows - 1..rows + drafts as u32 } else { 0..0 };
            let scored = share.scored.0..share.scored.1;
            let wanted = scored.clone().map(|place| (place - start) as u32).chain(sampled.clone());
            plan.batch.push(tokens, start as u32, table, wanted);
            if let Some(adapter) = &self.requests[part.request].adapter {
                plan.batch.adapt(adapter);
                plan.adapted_rows += share.rows;
            }
            if let Some(mirror) = self.mirror.as_mut().filter(|_| share.catch_up > 0) {
                let (from, to) = (sequence.mirrored, sequence.mirrored + share.catch_up);
                // Drafts are computed as well, but for the last.
                let guessed = if share.source == Source::Model { drafts } else { 0 };
                let table = &sequence.table[..self.blocks.needed(to)];
                let first = (guessed > 0).then_some(share.catch_up as u32 - 1);
                plan.catch_up.push(&sequence.tokens[from..to], from as u32, table, first);
                if guessed > 0 {
                    plan.chains.push(Chain { part: at, sampled: plan.sampled.len() + scored.len(), drafts });
                }
                sequence.mirror(mirror, to, guessed.saturating_sub(1), self.blocks.block_tokens());
            }
            plan.sampled.extend(scored.clone().map(|_| Sampled { part: *part, ahead: 0 }));
            plan.sampled.extend((0..sampled.len() as u32).map(|ahead| Sampled { part: *part, ahead }));
            plan.followed_by.extend(scored.map(|place| sequence.tokens[place + 1]));
            plan.followed_by.extend(sampled.map(|_| DRAWN));
        }
    }
}
