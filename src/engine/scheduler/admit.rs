//! Decides who runs: whom the queue gives up and with which blocks, and who leaves the batch for another.
//!
//! ```text
//! queue ──let_in──> admit ───> runs ─────────+      with the blocks it finds, then free ones
//!  ^ ^                +──────> follows       |      another computes what it would
//!  | +──release_followers─────────+          |
//!  +──preempt, make_way──────────────────────+      blocks go back, tokens stay
//! ```
//!
//! The queue is let in as long as there are rows for newcomers, as far as free blocks go. A sequence that runs owns a block
//! for every token it knows, so only decodes can need another; when there is none, the last admitted of the lowest priority
//! loses its blocks and waits again.
//!
//! A prompt that begins like one that is being computed follows it ([`Coming`](crate::engine::coming::Coming)) and finds
//! its blocks. An account that has less of the batch than another takes places and blocks from it: see
//! [`Scheduler::make_way`].

use std::time::Instant;

use super::Scheduler;
use super::plan::Plan;
use crate::engine::coming::Follower;
use crate::engine::queue::{AccountKey, Ticket};
use crate::engine::sequence::{Sequence, SequenceKey};

/// Share of a running sequence's remaining tokens that admission keeps blocks free for: at the start, and at the least.
pub(super) const GROWTH_START: f32 = 0.5;
pub(super) const GROWTH_LEAST: f32 = 0.1;
/// Taken off the share each step, so that it falls from start to least in some 600 steps without preemption.
pub(super) const GROWTH_DECAY: f32 = (GROWTH_START - GROWTH_LEAST) / 600.0;
/// Added to the share when a sequence lost its blocks: admission was too brave.
const GROWTH_LESSON: f32 = 0.2;
/// Remaining tokens beyond this are not believed: `max_tokens` is often far above what is produced.
const GROWTH_HORIZON: usize = 4096;
/// A sequence follows another when that spares it at least one of so many of its rows.
const WORTH_FOLLOWING: usize = 4;
/// Prompts of more than a chunk in the batch at a time: more would hold blocks that nobody fills.
const MOST_LONG: usize = 4;
/// Sequences that make way in a step, at most.
const MOST_MAKE_WAY: usize = 4;

/// What became of the sequence whose turn it was.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Admission {
    /// It runs.
    Runs,
    /// It waits for blocks that another computes.
    Follows,
    /// It waits for blocks to be fetched.
    Fetches,
    /// Not enough blocks are free.
    LacksBlocks,
}

/// What there may be too little of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Good {
    /// Sequences in the batch.
    Place,
    /// KV.
    Blocks,
}

/// Who may lose blocks or places to a newcomer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Displace {
    /// Only what is free is given away.
    Nobody,
    /// Accounts that have more than the newcomer's.
    Heavier,
}

impl Scheduler {
    /// Admits from the queue as long as `rows` are not spoken for.
    pub(super) fn let_in(&mut self, rows: usize, displace: Displace, now: Instant, plan: &mut Plan) {
        if self.queue.is_empty() {
            return;
        }
        let (mut claimed, mut long) = (0, 0);
        let mut claim = |scheduler: &Self, key: SequenceKey| {
            let left = scheduler.sequences[key].left();
            if !scheduler.sequences[key].reads() {
                return (claimed, long);
            }
            claimed += match scheduler.is_long(left) {
                true if long > 0 => 0,
                true => rows / 2,
                false => left,
            };
            long += usize::from(scheduler.is_long(left));
            (claimed, long)
        };
        let mut spoken_for = (0, 0);
        for &key in &self.running {
            spoken_for = claim(self, key);
        }
        let make_way = |scheduler: &mut Self, ticket: Ticket, good: Good, plan: &mut Plan| {
            displace == Displace::Heavier && scheduler.make_way(ticket, good, now, plan)
        };
        // Who has just thrown somebody out must not invite the next one in, nor does anybody pass one who waits for blocks
        // to be fetched.
        while plan.preempted == 0 && plan.fetch.is_empty() && spoken_for.0 < rows && spoken_for.1 < MOST_LONG {
            let Some(ticket) = self.queue.next(now) else { break };
            if self.running.len() >= self.limits.max_running && !make_way(self, ticket, Good::Place, plan) {
                break;
            }
            let mut outcome = self.admit(ticket, now, plan);
            while outcome == Admission::LacksBlocks && make_way(self, ticket, Good::Blocks, plan) {
                outcome = self.admit(ticket, now, plan);
            }
            match outcome {
                Admission::Runs => spoken_for = claim(self, ticket.sequence),
                Admission::Follows => {}
                // Not passed by anyone smaller: its turn comes as soon as enough blocks are free.
                Admission::LacksBlocks | Admission::Fetches => break,
            }
        }
    }

    /// Gives a waiting sequence blocks for all its tokens, found ones first, so that it runs from now on.
    fn admit(&mut self, ticket: Ticket, now: Instant, plan: &mut Plan) -> Admission {
        let block_tokens = self.blocks.block_tokens();
        let sequence = &mut self.sequences[ticket.sequence];
        let known = sequence.tokens.len();
        // At least one token is always recomputed: a full prefix hit would leave no row to take logits from.
        let most_hits = (known - 1).min(sequence.scored.unwrap_or(usize::MAX)) / block_tokens;
        sequence.name_blocks(most_hits, block_tokens);
        let (mut hits, mut free_hits) = (0, 0);
        let twin = self.twin(ticket.sequence);
        if twin.is_some() {
            hits = most_hits;
        } else {
            let sequence = &self.sequences[ticket.sequence];
            while let Some(&hash) = sequence.hashes[..most_hits].get(hits)
                && let Some(block) = self.blocks.find(hash)
            {
                hits += 1;
                free_hits += usize::from(self.blocks.is_free(block));
            }
        }
        if let Some(follower) = self.leader(ticket, hits, most_hits) {
            self.queue.remove(ticket);
            self.coming.follow(follower);
            plan.followed += 1;
            return Admission::Follows;
        }
        let need = self.blocks.needed(known) - hits;
        // With nobody else running there is nobody to keep blocks for.
        let reserve = if self.running.is_empty() { 0 } else { self.reserve(ticket.sequence) };
        if self.blocks.free() - free_hits < need + reserve {
            return Admission::LacksBlocks;
        }
        if self.fetch(ticket.sequence, hits, most_hits, plan) {
            return Admission::Fetches;
        }
        for at in 0..hits {
            let block = match twin {
                Some(twin) => Some(self.sequences[twin].table[at]),
                None => self.blocks.find(self.sequences[ticket.sequence].hashes[at]),
            };
            if let Some(block) = block {
                self.blocks.adopt(block);
                self.sequences[ticket.sequence].table.push(block);
            }
        }
        let original = twin.map(|twin| self.sequences[twin].table[hits]);
        let sequence = &mut self.sequences[ticket.sequence];
        sequence.computed = sequence.table.len() * block_tokens;
        sequence.published = sequence.table.len();
        let taken = self.blocks.take(need, &mut sequence.table);
        debug_assert!(taken, "free blocks were counted");
        if let Some(mirror) = &self.mirror {
            let found = sequence.table.iter().zip(&sequence.hashes).take(hits);
            sequence.tagged = found.take_while(|&(&block, &hash)| mirror.has(block, hash)).count();
            sequence.mirrored = sequence.tagged * block_tokens;
        }
        if let Some(original) = original {
            let copy = sequence.table[hits];
            plan.copies.push((original, copy));
            sequence.computed = known - 1;
            self.mirror.iter_mut().for_each(|mirror| mirror.written(copy));
            let whole = sequence.mirrored == hits * block_tokens;
            if whole && twin.is_some_and(|twin| self.sequences[twin].mirrored >= known - 1) {
                self.sequences[ticket.sequence].mirrored = known - 1;
            }
        }
        let sequence = &mut self.sequences[ticket.sequence];
        self.coming.announce(ticket.sequence, &sequence.hashes[hits..most_hits]);
        self.admissions += 1;
        sequence.admitted = self.admissions;
        sequence.fed = self.step;
        if sequence.choice == 0 && sequence.preemptions == 0 {
            plan.begun.push((sequence.request, sequence.computed));
        }
        // Being computed again was not the account's wish.
        let charge = if sequence.preemptions == 0 { sequence.left() } else { 0 };
        self.running.push(ticket.sequence);
        self.queue.take(ticket, now);
        self.queue.charge(ticket.account, charge);
        Admission::Runs
    }

    /// A choice of the same request whose blocks hold the whole prompt, for one that has produced nothing.
    fn twin(&self, key: SequenceKey) -> Option<SequenceKey> {
        let sequence = &self.sequences[key];
        if sequence.choice == 0 || sequence.produced() > 0 {
            return None;
        }
        let mut others = self.requests[sequence.request].live.iter().copied().filter(|&other| other != key);
        others.find(|&other| self.sequences[other].computed >= sequence.prompt)
    }

    /// Whom a sequence had better follow, which has found `hits` of `most` blocks.
    fn leader(&self, ticket: Ticket, hits: usize, most: usize) -> Option<Follower> {
        let sequence = &self.sequences[ticket.sequence];
        if sequence.preemptions > 0 {
            return None;
        }
        let mut found = None;
        let mut shared = 0;
        for &block in &sequence.hashes[hits..most] {
            let Some(leader) = self.coming.leader(block) else { break };
            if is_stuck(&self.sequences[leader], self.step) {
                break;
            }
            shared += 1;
            found = Some(Follower { ticket, block, leader });
        }
        let left = sequence.tokens.len() - hits * self.blocks.block_tokens();
        found.filter(|_| shared * self.blocks.block_tokens() * WORTH_FOLLOWING >= left)
    }

    /// Sequences whose common prefix is there, or will not come, are first in their lines again.
    pub(super) fn release_followers(&mut self, now: Instant) {
        if self.coming.followers().is_empty() {
            return;
        }
        let (sequences, step) = (&self.sequences, self.step);
        let released = self.coming.released(|leader| is_stuck(&sequences[leader], step));
        for ticket in released.rev() {
            self.queue.join_front(ticket, now);
        }
    }

    /// Blocks to keep free for what the running sequences and this one will probably produce.
    fn reserve(&self, newcomer: SequenceKey) -> usize {
        let growth = |key: SequenceKey| {
            let sequence = &self.sequences[key];
            let expected = (sequence.most - sequence.tokens.len()).min(GROWTH_HORIZON) as f32 * self.growth;
            self.blocks.needed(sequence.tokens.len() + expected as usize) - self.blocks.needed(sequence.tokens.len())
        };
        self.running.iter().copied().map(growth).sum::<usize>() + growth(newcomer)
    }

    /// Gives running sequences a block for the token that is being drawn, and for those in foresight, as far as there are free ones.
    pub(super) fn grow_freely(&mut self) {
        for &key in &self.running {
            let sequence = &mut self.sequences[key];
            let more = if sequence.left() == 0 { 1 + self.limits.foresight } else { 0 };
            let known = (sequence.tokens.len() + more).min(sequence.most);
            if self.blocks.needed(known) > sequence.table.len() && !self.blocks.take(1, &mut sequence.table) {
                break;
            }
        }
    }

    /// Gives every running sequence a block for its newest token.
    pub(super) fn grow(&mut self, now: Instant, plan: &mut Plan) {
        let mut at = 0;
        while let Some(&key) = self.running.get(at) {
            let sequence = &mut self.sequences[key];
            let has_room = self.blocks.needed(sequence.tokens.len()) <= sequence.table.len();
            if has_room || self.blocks.take(1, &mut sequence.table) {
                at += 1;
            } else if let Some(victim) = self.preempt(now, plan)
                && victim < at
            {
                at -= 1;
            }
        }
    }

    /// Throws the weakest sequence out of the batch. Returns its place in the running list.
    fn preempt(&mut self, now: Instant, plan: &mut Plan) -> Option<usize> {
        let at = (0..self.running.len()).min_by_key(|&at| self.sequences[self.running[at]].standing())?;
        let ticket = self.throw_out(at);
        self.queue.rejoin(ticket, now);
        self.growth = (self.growth + GROWTH_LESSON).min(1.0);
        plan.preempted += 1;
        Some(at)
    }

    /// Takes a place, or blocks, from an account for one that has less of them: as long as the one who gives still has as
    /// much as the one who gets, by their weights. So a flood of long answers cannot keep others out, and what was taken
    /// is never taken back. Who makes way is first of its line again; its blocks stay cached.
    fn make_way(&mut self, ticket: Ticket, good: Good, now: Instant, plan: &mut Plan) -> bool {
        if plan.made_way == MOST_MAKE_WAY {
            return false;
        }
        let held = |sequence: &Sequence| if good == Good::Place { 1 } else { sequence.table.len() };
        let of = |account: AccountKey| {
            let running = self.running.iter().map(|&key| &self.sequences[key]);
            running.filter(|sequence| sequence.ticket.account == account).map(held).sum::<usize>()
        };
        let weight = |account: AccountKey| self.queue.weight(account) as usize;
        let wanted = match good {
            Good::Place => 1,
            Good::Blocks => self.blocks.needed(self.sequences[ticket.sequence].tokens.len()),
        };
        let mine = of(ticket.account) + wanted;
        let gives = |sequence: &Sequence| {
            let other = sequence.ticket.account;
            other != ticket.account
                && sequence.ticket.priority <= ticket.priority
                && mine * weight(other) <= (of(other) - held(sequence)) * weight(ticket.account)
        };
        let candidates = (0..self.running.len()).filter(|&at| gives(&self.sequences[self.running[at]]));
        let Some(at) = candidates.min_by_key(|&at| self.sequences[self.running[at]].standing()) else { return false };
        let other = self.throw_out(at);
        self.queue.join_front(other, now);
        plan.made_way += 1;
        true
    }

    /// Takes a sequence out of the batch; its tokens stay.
    fn throw_out(&mut self, at: usize) -> Ticket {
        let key = self.running.remove(at);
        let sequence = &mut self.sequences[key];
        self.coming.settle(key, &sequence.hashes);
        self.blocks.release(&mut sequence.table);
        sequence.computed = 0;
        sequence.mirrored = 0;
        sequence.tagged = 0;
        sequence.published = 0;
        sequence.admitted = 0;
        sequence.preemptions += 1;
        sequence.ticket
    }
}

/// Whether a sequence that runs had no rows in the last step: whoever follows it would wait for its turn as well.
fn is_stuck(leader: &Sequence, step: u64) -> bool {
    leader.fed + 1 < step
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::trace::{check, check_both, limits, seq};
    use super::super::{Ask, Limits, Plan, Scheduler};
    use crate::base::AccountId;

    #[test]
    fn higher_priority_is_admitted_first() {
        let limits = Limits { max_running: 1, ..limits() };
        check(
            8,
            limits,
            [seq("a", 2, 1), seq("b", 2, 1), seq("c", 2, 1).priority(3)],
            "c[0..2] c. | a[0..2] a. | b[0..2] b.",
        );
    }

    #[test]
    fn admission_keeps_blocks_free_for_what_runs() {
        // a has two blocks and will probably need a third: the two free ones are not for b, which needs both.
        check(
            4,
            limits(),
            [seq("a", 16, 40), seq("b", 20, 2).at(1)],
            &format!("a[0..16] | {} | a a. | b[0..20] | b b.", ["a"; 38].join(" | ")),
        );
    }

    #[test]
    fn a_prefix_is_shared_but_one_token_is_always_recomputed() {
        check(8, limits(), [seq("a", 48, 1), seq("a", 48, 1).at(1)], "a[0..48] a. | a[32..48] a.");
        check(8, limits(), [seq("a", 49, 1), seq("a", 49, 1).at(1)], "a[0..49] a. | a a.");
    }

    #[test]
    fn without_a_prefix_cache_only_the_choices_of_a_request_share() {
        let limits = Limits { prefix_cache: false, ..limits() };
        check(8, limits.clone(), [seq("a", 48, 1), seq("a", 48, 1).at(1)], "a[0..48] a. | a[0..48] a.");
        let choices = [seq("a", 33, 1).choices(3)];
        check_both(8, limits, choices, "a0[0..33] a0. | a1 a2 a1. a2.", "a0[0..33] a0. | a1* a2* a1. a2.");
    }

    #[test]
    fn a_prefix_that_is_being_computed_is_waited_for_and_not_computed_again() {
        let limits = Limits { step_tokens: 32, prefill_chunk: 32, ..limits() };
        check(
            16,
            limits.clone(),
            [seq("a", 60, 1), seq("a", 60, 1), seq("b", 6, 1)],
            "a[0..26] b[0..6] b. | a[26..58] | a[58..60] a[48..60] a. a.",
        );
        // Whoever is followed leaves: the next one computes, the others follow that one.
        check(
            16,
            limits.clone(),
            [seq("a", 60, 1).leaves(1), seq("a", 60, 1), seq("a", 60, 1)],
            "a[0..32] | a[32..60] a. | a[48..60] a.",
        );
        // A follower that leaves disturbs nobody.
        check(
            16,
            limits,
            [seq("a", 60, 1), seq("a", 60, 1).leaves(1), seq("a", 60, 1)],
            "a[0..32] | a[32..60] a. | a[48..60] a.",
        );
    }

    #[test]
    fn a_prefix_too_short_to_matter_is_not_waited_for() {
        // One block of 16 in common is worth waiting for beside 40 tokens, not beside 100.
        let of = |own: usize| {
            let mut scheduler = Scheduler::new(limits(), 64, 16);
            let (now, mut plan) = (Instant::now(), Plan::default());
            for other in [1, 2] {
                let prompt = [vec![0; 16], vec![other; own]].concat();
                let account = AccountId::new("a");
                let ask = Ask {
                    account: &account,
                    weight: 1,
                    prompt,
                    choices: 1,
                    max_tokens: 1,
                    priority: 0,
                    salt: 0,
                    adapter: None,
                    scored: false,
                    drafts: None,
                    expected: vec![],
                };
                scheduler.submit(ask, now).unwrap();
            }
            scheduler.plan(now, &mut plan);
            (plan.followed, scheduler.running())
        };
        assert_eq!(of(24), (1, 1));
        assert_eq!(of(100).0, 0);
    }

    #[test]
    fn nobody_follows_a_sequence_that_makes_no_progress() {
        // b is as long as a and waits for rows behind it; its followers do not wait with it for ever.
        let limits = Limits { step_tokens: 16, prefill_chunk: 8, ..limits() };
        let mut scheduler = Scheduler::new(limits, 64, 16);
        let (now, mut plan) = (Instant::now(), Plan::default());
        let ask = |scheduler: &mut Scheduler, token: u32, length: usize| {
            let account = AccountId::new("a");
            let prompt = vec![token; length];
            let ask = Ask {
                account: &account,
                weight: 1,
                prompt,
                choices: 1,
                max_tokens: 1,
                priority: 0,
                salt: 0,
                adapter: None,
                scored: false,
                drafts: None,
                expected: vec![],
            };
            scheduler.submit(ask, now).unwrap()
        };
        for token in 0..3 {
            ask(&mut scheduler, token, 200);
        }
        let follower = ask(&mut scheduler, 2, 200);
        let mut waited = 0;
        loop {
            scheduler.plan(now, &mut plan);
            scheduler.check().unwrap();
            if plan.parts.iter().any(|part| part.request == follower) {
                break;
            }
            scheduler.computed(&plan, now);
            for part in plan.sampled.iter().map(|row| row.part) {
                scheduler.push(part.sequence, 0);
                scheduler.finish(part.sequence);
            }
            waited += 1;
        }
        assert!(waited < 60, "{waited}");
    }

    #[test]
    fn a_preempted_sequence_keeps_its_tokens_and_finds_its_blocks_again() {
        // Four blocks: a and b fill two each, then both need a third. b came last.
        check(
            4,
            limits(),
            [seq("a", 31, 4), seq("b", 31, 4)],
            "a[0..31] b[0..31] | a b | -b a | a a. | b[16..33] | b b.",
        );
    }

    #[test]
    fn the_lowest_priority_is_preempted_first_even_if_it_came_first() {
        check(
            4,
            limits(),
            [seq("a", 28, 8).priority(-1), seq("b", 31, 4).at(1)],
            "a[0..28] | a b[0..31] | a b | -a b | b b. | a[16..31] | a | a | a | a a.",
        );
    }

    #[test]
    fn an_account_with_less_of_the_batch_gets_a_place_from_one_with_more() {
        let limits = Limits { max_running: 2, ..limits() };
        let accounts = [seq("a", 4, 9), seq("a", 4, 9), seq("b", 4, 2).at(2), seq("b", 4, 2).at(2)];
        check(
            64,
            limits,
            accounts,
            "a[0..4] a[0..4] | a a | -a a b[0..4] | a b b. | a b[0..4] | a b b. | a a[0..6] | a a | a a a. | a | a | a | \
             a a.",
        );
    }

    #[test]
    fn an_account_with_less_of_the_pool_gets_blocks_from_one_with_more() {
        check(
            6,
            limits(),
            [seq("a", 40, 6), seq("a", 40, 6), seq("b", 40, 2).at(2)],
            "a[0..40] | a a[32..40] | -a a b[0..40] | a b b. | a a[32..41] | a a a. | a | a | a a.",
        );
    }
}
