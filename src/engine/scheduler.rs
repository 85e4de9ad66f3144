//! Decides which sequences compute how many tokens in the next step.
//!
//! ```text
//! submit ──> waiting ──admit──> running ──finish──> (gone)
//!               ^                  |
//!               +──── preempt ─────+      blocks go back, tokens stay
//! ```
//!
//! Each step has one budget of tokens. Running sequences come first: one token each for those that decode, then prompts,
//! as many rows as [`Pace`] finds tolerable for those that decode. Rows of prompts go out in order of admission, but a
//! prompt of more than a chunk leaves half of them to shorter ones behind it.
//!
//! The choices of a request share the prompt: choice 0 computes it alone, the others join when it is there. They hold its
//! full blocks together; the block in which it ends, which each will write to, is copied for each, and only the last row
//! of the prompt is computed again, since a token is drawn after it.
//!
//! Here a request comes in, rows are handed out, and what was drawn is taken down. Who runs and who makes way is decided in
//! `admit`, what comes back from outside the pool in `fetch`, which rows go to guesses in `draft`; `plan` is what all that
//! comes to, and `coast` does many steps that are alike at once. Pure: knows nothing of devices, clocks or channels.
//! `lane.rs` feeds it, a `Runner` executes the [`Plan`].

mod admit;
mod coast;
mod draft;
mod fetch;
mod plan;
#[cfg(test)]
mod trace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use self::admit::{Displace, GROWTH_DECAY, GROWTH_LEAST, GROWTH_START};
use self::plan::Share;
pub use self::plan::{Chain, Plan, Planned, Sampled};
use crate::base::{AccountId, Error, Kind, Result};
use crate::engine::blocks::{BlockHash, BlockId, Blocks};
use crate::engine::coming::{Coming, Follower};
use crate::engine::mirror::Mirror;
use crate::engine::pace::{Load, Pace};
use crate::engine::queue::{AccountKey, Queue, Ticket};
use crate::engine::sequence::{RequestKey, Sequence, SequenceKey};
use crate::engine::slab::Slab;
use crate::engine::speculate::{Guesses, Source};
use crate::engine::spill::Index;
use crate::model::lora::Adapter;

/// Rows of prompts with logits in a step, at most: on top of one for each running sequence.
pub const SCORED_ROWS: usize = 64;

/// What one model allows.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest sequence, prompt and answer.
    pub context: usize,
    /// Tokens computed in a step over all sequences.
    pub step_tokens: usize,
    /// Most tokens of one sequence in a step.
    pub prefill_chunk: usize,
    /// Sequences computed at the same time; at most three quarters of `step_tokens`.
    pub max_running: usize,
    /// Sequences waiting, beyond which submissions are refused.
    pub max_queue: usize,
    /// Requests of equal salt share the KV of equal prefixes.
    pub prefix_cache: bool,
    /// How many times longer a step may take because of a prompt while others decode; 0: as long as it takes.
    pub prefill_stretch: f64,
    /// Blocks that can be kept outside the pool; 0: none.
    pub spill_slots: usize,
    /// Places behind the next one that have their block early, if one is free: for a runner that begins the step after the next.
    pub foresight: usize,
    /// How far answers are guessed ahead.
    pub drafts: DraftLimits,
}

/// How far answers are guessed ahead. Default: not at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct DraftLimits {
    /// Most drafts of one sequence in a step; 0: none.
    pub most: usize,
    /// Most drafts in a step over all sequences.
    pub rows: usize,
    /// Guess from earlier text of prompt and answer.
    pub lookup: bool,
    /// A draft model guesses as well.
    pub model: bool,
}

/// A request as the scheduler sees it.
pub struct Ask<'a> {
    /// Who is served.
    pub account: &'a AccountId,
    /// Its share beside others', at least 1.
    pub weight: u32,
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Independent answers, at least 1.
    pub choices: u32,
    /// Most tokens of each answer, at least 1.
    pub max_tokens: u32,
    /// Higher is served first.
    pub priority: i8,
    /// Requests share prefixes only under equal salts, and only under the same adapter.
    pub salt: u64,
    /// What is computed with on top of the base.
    pub adapter: Option<Arc<Adapter>>,
    /// Logits of all rows of the prompt are wanted: what the model thinks of its tokens.
    pub scored: bool,
    /// Most drafts in a step, if fewer than the limits allow.
    pub drafts: Option<u32>,
    /// Tokens that each answer is expected to begin with or repeat; empty: nothing is known.
    pub expected: Vec<u32>,
}

struct Request {
    account: AccountKey,
    priority: i8,
    arrival: u64,
    root: BlockHash,
    adapter: Option<Arc<Adapter>>,
    most: usize,
    drafts: usize,
    expected: Vec<u32>,
    choices: u32,
    /// Choices that wait for choice 0 to compute the prompt.
    held: u32,
    live: Vec<SequenceKey>,
}

/// What [`Scheduler::push`] did with a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pushed {
    /// The sequence goes on.
    Open,
    /// The sequence may not have another token: finish it.
    Full,
}

/// All sequences of one model: who waits, who runs, who holds which block.
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    queue: Queue,
    sequences: Slab<Sequence>,
    requests: Slab<Request>,
    /// In order of admission.
    running: Vec<SequenceKey>,
    /// Choices not in the queue yet, over all requests.
    held: usize,
    growth: f32,
    pace: Pace,
    /// Prompts still to be read of a crowd that came at once.
    crowd: usize,
    names_quickly: bool,
    /// Of the draft model.
    draft_pace: Pace,
    mirror: Option<Mirror>,
    coming: Coming,
    spilled: Option<Index>,
    /// Blocks that are being filled, and those before them, so that nobody takes them meanwhile.
    fetching: Vec<BlockId>,
    /// Counts plans.
    step: u64,
    arrivals: u64,
    admissions: u64,
}

impl Scheduler {
    /// A scheduler over `blocks` free blocks of `block_tokens` tokens.
    pub fn new(limits: Limits, blocks: usize, block_tokens: usize) -> Self {
        let mut limits = limits;
        limits.step_tokens = limits.step_tokens.max(1);
        limits.prefill_chunk = limits.prefill_chunk.clamp(1, limits.step_tokens);
        // A quarter of each step is never needed for decodes, so prompts move on however full the batch is.
        limits.max_running = limits.max_running.clamp(1, (limits.step_tokens - limits.step_tokens / 4).max(1));
        let mut blocks = Blocks::new(blocks, block_tokens);
        let spilled = (limits.spill_slots > 0).then(|| Index::new(limits.spill_slots));
        if spilled.is_some() {
            blocks.remember_evicted();
        }
        // A sequence alone in the pool can always be finished: admission and preemption rely on it.
        limits.context = limits.context.min(blocks.total() * blocks.block_tokens());
        let mirror = limits.drafts.model.then(|| Mirror::new(blocks.total()));
        Self {
            blocks,
            queue: Queue::default(),
            sequences: Slab::default(),
            requests: Slab::default(),
            running: Vec::with_capacity(limits.max_running),
            held: 0,
            growth: GROWTH_START,
            pace: Pace::default(),
            crowd: 0,
            names_quickly: false,
            draft_pace: Pace::default(),
            mirror,
            coming: Coming::default(),
            spilled,
            fetching: Vec::new(),
            step: 0,
            arrivals: 0,
            admissions: 0,
            limits,
        }
    }

    /// Takes a request in. Its answers may be shorter than `max_tokens` if the context window ends before.
    ///
    /// # Errors
    /// [`Kind::ContextLength`] when it could never be computed, [`Kind::Busy`] when too many wait already.
    pub fn submit(&mut self, ask: Ask<'_>, now: Instant) -> Result<RequestKey> {
        if ask.prompt.is_empty() || ask.choices == 0 || ask.max_tokens == 0 {
            return Err(Error::bad_input(
                "A request needs a prompt, at least one choice and at least one token to produce.",
            ));
        }
        if ask.prompt.len() >= self.limits.context {
            let (long, context) = (ask.prompt.len(), self.limits.context);
            let message = format!(
                "The prompt is {long} tokens long, but prompt and answer must fit into {context}: shorten the prompt."
            );
            return Err(Error::new(Kind::ContextLength, message));
        }
        // An idle queue takes any request, however many choices it has: refusing it could never help. A full one takes
        // more from those who have not filled it.
        let (wanted, most) = (self.waiting() + ask.choices as usize, self.limits.max_queue);
        let has_share =
            || wanted <= 2 * most && self.queue.has_share(ask.account, ask.weight, ask.choices as usize, most);
        if self.waiting() > 0 && wanted > most && !has_share() {
            return Err(Error::new(Kind::Busy, "Too many requests are waiting for this model; try again in a moment.")
                .with_retry_after(Duration::from_secs(1)));
        }
        self.arrivals += 1;
        let request = self.requests.insert(Request {
            account: self.queue.enter(ask.account, ask.weight),
            priority: ask.priority,
            arrival: self.arrivals,
            root: match (self.limits.prefix_cache, &ask.adapter) {
                (false, _) => BlockHash::root(1, self.arrivals),
                (true, None) => BlockHash::root(0, ask.salt),
                (true, Some(adapter)) => BlockHash::root(2, ask.salt).then(adapter.digest()),
            },
            adapter: ask.adapter,
            most: ask.prompt.len().saturating_add(ask.max_tokens as usize).min(self.limits.context),
            drafts: ask.drafts.map_or(self.limits.drafts.most, |most| self.limits.drafts.most.min(most as usize)),
            expected: ask.expected,
            choices: ask.choices,
            held: ask.choices - 1,
            live: Vec::with_capacity(ask.choices as usize),
        });
        self.held += ask.choices as usize - 1;
        let ticket = self.open(request, 0, ask.prompt);
        if ask.scored {
            self.sequences[ticket.sequence].scored = Some(0);
        }
        self.queue.join(ticket, now);
        Ok(request)
    }

    fn open(&mut self, key: RequestKey, choice: u32, prompt: Vec<u32>) -> Ticket {
        let request = &mut self.requests[key];
        let (account, priority, arrival) = (request.account, request.priority, request.arrival);
        let mut ticket = Ticket { sequence: 0, account, priority, arrival };
        let mut tokens = prompt;
        let prompt = tokens.len();
        tokens.reserve_exact((request.most - prompt).min(1024));
        let blocks = self.blocks.needed(tokens.capacity());
        let sequence = self.sequences.insert(Sequence {
            request: key,
            choice,
            ticket,
            prompt,
            tokens,
            most: request.most,
            computed: 0,
            mirrored: 0,
            tagged: 0,
            scored: None,
            table: Vec::with_capacity(blocks),
            published: 0,
            hashes: Vec::with_capacity(blocks),
            named_quickly: self.names_quickly,
            admitted: 0,
            fed: 0,
            fetched: 0,
            preemptions: 0,
            root: request.root,
            guesses: Guesses::new(request.drafts, self.limits.drafts.lookup, request.expected.clone()),
        });
        ticket.sequence = sequence;
        self.sequences[sequence].ticket = ticket;
        request.live.push(sequence);
        ticket
    }

    /// The step of `plan` is under way, and its tokens are not known yet: does for the `next` one what does not depend on
    /// them. Blocks that it fills can be found by others from now on, since whatever is planned later is computed later;
    /// each sequence has a block for the token it will probably get, and newcomers have theirs, as far as blocks and
    /// places are free. Nobody loses any here: who does is known when the tokens are.
    ///
    /// [`Scheduler::push`] and [`Scheduler::settle`] for `plan` must follow, then [`Scheduler::plan`] of `next`.
    pub fn prepare(&mut self, plan: &Plan, now: Instant, next: &mut Plan) {
        self.computed(plan, now);
        self.begin(next);
        next.prepared = true;
        self.release_followers(now);
        self.grow_freely();
        let rows = self.rows_beside(self.decodes());
        self.let_in(rows, Displace::Nobody, now, next);
    }

    /// Decides the next step, or what [`Scheduler::prepare`] has left open of it. An empty batch means that there is
    /// nothing to compute.
    pub fn plan(&mut self, now: Instant, plan: &mut Plan) {
        if !std::mem::take(&mut plan.prepared) {
            self.begin(plan);
        }
        self.release_followers(now);
        self.grow(now, plan);
        let rows = self.rows_beside(self.decodes());
        // Before anything is placed: what was placed must keep its blocks.
        self.let_in(rows, Displace::Heavier, now, plan);
        let (mut budget, mut readers) = (self.limits.step_tokens, 0);
        for at in 0..self.running.len() {
            match self.sequences[self.running[at]].reads() {
                true => readers += 1,
                false => budget -= self.place(self.running[at], budget, plan),
            }
        }
        if readers > 0 {
            // Once more prompts than answers, a crowd is one to its last prompt: that would wait for the longest otherwise.
            let (prompts, answers) = (readers + self.coming_prompts(), self.running.len() - readers);
            self.crowd = if prompts > answers.max(1) { prompts } else { self.crowd.min(prompts) };
            self.read(rows.min(budget), plan);
        }
        self.draft(plan);
        self.pack(plan);
        self.spill(plan);
    }

    fn begin(&mut self, plan: &mut Plan) {
        plan.clear();
        self.step += 1;
        self.growth = (self.growth - GROWTH_DECAY).max(GROWTH_LEAST);
    }

    /// What those cost who decode, or will when the token is known that is being drawn.
    fn decodes(&self) -> Load {
        let mut decode = Load::default();
        for sequence in self.running.iter().map(|&key| &self.sequences[key]).filter(|sequence| !sequence.reads()) {
            decode.decodes(1, sequence.computed);
        }
        decode
    }

    /// Rows that prompts may have beside others that decode.
    fn rows_beside(&self, decode: Load) -> usize {
        self.prompt_rows(decode).min(self.limits.step_tokens - decode.decode)
    }

    /// The same, whatever a step has room for.
    fn prompt_rows(&self, decode: Load) -> usize {
        if decode.decode == 0 || self.limits.prefill_stretch == 0.0 {
            return usize::MAX;
        }
        let reading = self.running.iter().map(|&key| &self.sequences[key]).filter(|sequence| sequence.reads());
        let context = reading.clone().next().map_or(0, |first| first.computed);
        let prompts = reading.count() + self.coming_prompts();
        self.pace.prompt_rows(decode, prompts, self.crowd > 0, context, self.limits.prefill_stretch)
    }

    /// Whether this much is read in several steps.
    fn is_long(&self, left: usize) -> bool {
        left > self.limits.prefill_chunk
    }

    /// Hands `rows` out to sequences with more than a token to compute.
    fn read(&mut self, mut rows: usize, plan: &mut Plan) {
        let left = |scheduler: &Self, at: usize| scheduler.sequences[scheduler.running[at]].left();
        let all = 0..self.running.len();
        let mut short: usize = all.clone().map(|at| left(self, at)).filter(|&left| !self.is_long(left)).sum();
        // Of the long ones that of the account which was served least.
        let standing = |&at: &usize| {
            let sequence = &self.sequences[self.running[at]];
            (self.queue.served(sequence.ticket.account), sequence.admitted)
        };
        let first = all.clone().filter(|&at| self.is_long(left(self, at))).min_by_key(standing);
        for at in all.clone() {
            let most = match left(self, at) {
                left if !self.is_long(left) => {
                    short -= left;
                    rows
                }
                _ if Some(at) == first => rows.div_ceil(2).max(rows.saturating_sub(short)),
                _ => 0,
            };
            rows -= self.place(self.running[at], most, plan);
        }
        for at in all {
            if rows > 0 && Some(at) != first {
                rows -= self.place(self.running[at], rows, plan);
            }
        }
    }

    /// How many of those who wait have a place.
    fn coming_prompts(&self) -> usize {
        self.queue.len().min(self.limits.max_running.saturating_sub(self.running.len()))
    }

    /// Gives a sequence as many rows as the budget and its share allow. Returns how many.
    fn place(&mut self, key: SequenceKey, budget: usize, plan: &mut Plan) -> usize {
        let sequence = &mut self.sequences[key];
        let mut rows = sequence.left().min(budget).min(self.limits.prefill_chunk);
        // Rows whose logits are wanted, but for the last: those of the prompt that were not looked at before.
        let last = sequence.prompt - 1;
        let first = sequence.scored.unwrap_or(last).max(sequence.computed).min(last);
        if first < last {
            rows = rows.min(first - sequence.computed + SCORED_ROWS - plan.scored_rows());
        }
        if rows == 0 {
            return 0;
        }
        let (start, end) = (sequence.computed, sequence.computed + rows);
        plan.parts.push(Planned { sequence: key, request: sequence.request, choice: sequence.choice });
        let scored = (first, end.clamp(first, last));
        plan.shares.push(Share { rows, drafts: 0, source: Source::Lookup, catch_up: 0, scored });
        plan.prompt_rows += end.min(sequence.prompt).saturating_sub(start);
        if start < sequence.prompt && end >= sequence.prompt {
            self.crowd = self.crowd.saturating_sub(1);
        }
        match rows {
            1 => plan.load.decodes(1, start),
            rows => plan.load.reads(rows, start),
        }
        sequence.computed = end;
        sequence.fed = self.step;
        rows
    }

    /// A step took this long.
    pub fn took(&mut self, plan: &Plan, time: Duration) {
        let mut load = plan.load;
        load.decode += plan.drafted;
        let mut drafting = Duration::ZERO;
        for &(load, took) in &plan.passes {
            self.draft_pace.learn(load, took);
            drafting += took;
        }
        self.pace.learn(load, time.saturating_sub(drafting));
    }

    /// The plan was computed: what it filled can be found by others, and choices that waited for a prompt join.
    pub fn computed(&mut self, plan: &Plan, now: Instant) {
        for part in &plan.parts {
            let sequence = &mut self.sequences[part.sequence];
            let before = sequence.published;
            sequence.publish(&mut self.blocks);
            self.coming.settle(part.sequence, &sequence.hashes[before..sequence.published]);
            if let Some(scored) = &mut sequence.scored {
                *scored = sequence.computed.max(*scored);
            }
            if part.choice == 0 && sequence.computed >= sequence.prompt && self.requests[part.request].held > 0 {
                self.unhold(part.request, part.sequence, now);
            }
        }
    }

    fn unhold(&mut self, key: RequestKey, first: SequenceKey, now: Instant) {
        let request = &mut self.requests[key];
        self.held -= request.held as usize;
        request.held = 0;
        // Each joins in front, so the last goes first.
        for choice in (1..request.choices).rev() {
            let first = &self.sequences[first];
            let prompt = first.tokens[..first.prompt].to_vec();
            let ticket = self.open(key, choice, prompt);
            self.queue.join_front(ticket, now);
        }
    }

    /// The sequence's next token is known. Where drafts were verified, one call for each that came true and one for what
    /// came instead of the rest; then [`Scheduler::settle`].
    pub fn push(&mut self, key: SequenceKey, token: u32) -> Pushed {
        let sequence = &mut self.sequences[key];
        debug_assert!(sequence.computed >= sequence.tokens.len(), "a token is drawn after all known ones are computed");
        sequence.tokens.push(token);
        sequence.guesses.push(token);
        self.queue.charge(sequence.ticket.account, 1);
        if sequence.tokens.len() >= sequence.most { Pushed::Full } else { Pushed::Open }
    }

    /// All tokens of the step are known: drafts that did not come true are as if they had never been.
    pub fn settle(&mut self, plan: &Plan) {
        if plan.drafted == 0 {
            return;
        }
        for (part, share) in plan.parts.iter().zip(&plan.shares).filter(|(_, share)| share.drafts > 0) {
            // Gone if one of its tokens was the last.
            if let Some(sequence) = self.sequences.get_mut(part.sequence) {
                if share.source == Source::Model {
                    let verified = sequence.computed - share.drafts;
                    let accepted = (sequence.tokens.len() - 1).saturating_sub(verified);
                    sequence.guesses.judge_model(share.drafts, accepted);
                }
                sequence.settle(&mut self.blocks);
            }
        }
    }

    /// The sequence is complete; its blocks are free. Returns whether its request is complete too, and gone.
    pub fn finish(&mut self, key: SequenceKey) -> bool {
        // Drafts that came true may have filled blocks that a follow-up of this answer will want.
        if let Some(sequence) = self.sequences.get_mut(key) {
            sequence.settle(&mut self.blocks);
        }
        let Some(request) = self.remove(key) else { return false };
        let owner = &mut self.requests[request];
        owner.live.retain(|&other| other != key);
        if !owner.live.is_empty() || owner.held > 0 {
            return false;
        }
        self.queue.leave(owner.account);
        self.requests.remove(request);
        true
    }

    /// The request is not wanted any more; its blocks are free.
    pub fn cancel(&mut self, key: RequestKey) {
        let Some(request) = self.requests.remove(key) else { return };
        for sequence in request.live {
            self.remove(sequence);
        }
        self.held -= request.held as usize;
        self.queue.leave(request.account);
    }

    fn remove(&mut self, key: SequenceKey) -> Option<RequestKey> {
        let mut sequence = self.sequences.remove(key)?;
        match self.running.iter().position(|&other| other == key) {
            Some(at) => drop(self.running.remove(at)),
            None if self.coming.leave(key) => {}
            None => self.queue.remove(sequence.ticket),
        }
        self.coming.settle(key, &sequence.hashes);
        self.blocks.release(&mut sequence.table);
        Some(sequence.request)
    }

    /// Sequences waiting, those included that wait for a prompt or a prefix to be computed.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.held + self.coming.followers().len()
    }

    /// Sequences in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether there are no requests.
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0
    }

    /// The limits in force, after clamping.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The pool's books.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// A sequence that is alive.
    pub fn sequence(&self, key: SequenceKey) -> Option<&Sequence> {
        self.sequences.get(key)
    }

    /// Checks everything that must hold between two steps. For tests, simulations and debug builds.
    ///
    /// # Errors
    /// The first sentence that is not true.
    pub fn check(&self) -> Result<(), String> {
        let tables = self.sequences.iter().map(|(_, sequence)| sequence.table.as_slice());
        self.blocks.check(tables.chain([self.fetching.as_slice()]))?;
        let (mut waiting, mut held) = (0, 0);
        for (key, sequence) in self.sequences.iter() {
            let running = self.running.contains(&key);
            waiting += usize::from(!running);
            if !running && (!sequence.table.is_empty() || sequence.computed > 0) {
                return Err(format!("sequence {key} waits and holds blocks, or says that it has computed"));
            }
            if running && sequence.table.len() < self.blocks.needed(sequence.computed) {
                return Err(format!("sequence {key} has computed more than its blocks hold"));
            }
            if sequence.mirrored > sequence.computed {
                return Err(format!("the draft model has more of sequence {key} than is computed"));
            }
            if sequence.computed > sequence.tokens.len() || sequence.tokens.len() > sequence.most {
                return Err(format!("sequence {key} is longer than it may be"));
            }
            if !self.requests.get(sequence.request).is_some_and(|request| request.live.contains(&key)) {
                return Err(format!("sequence {key} belongs to no request"));
            }
        }
        for (key, request) in self.requests.iter() {
            held += request.held as usize;
            if request.live.is_empty() {
                return Err(format!("request {key} has no sequence and is not gone"));
            }
        }
        let followers = self.coming.followers();
        if waiting != self.queue.len() + followers.len() || held != self.held {
            return Err(format!("{waiting} wait and {held} are held, not {} and {}", self.queue.len(), self.held));
        }
        let waits = |follower: &&Follower| self.coming.leader(follower.block) == Some(follower.leader);
        let mut waiting = followers.iter().filter(waits);
        if let Some(lost) = waiting.find(|follower| !self.running.contains(&follower.leader)) {
            return Err(format!("sequence {} follows one that does not run", lost.ticket.sequence));
        }
        let mut running = self.running.iter().map(|&key| &self.sequences[key]);
        if !self.coming.is_empty() && !running.any(|sequence| sequence.published < sequence.hashes.len()) {
            return Err(format!("{} blocks are announced, but nobody computes any", self.coming.len()));
        }
        if self.running.len() > self.limits.max_running {
            return Err(format!("{} sequences run", self.running.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::trace::{check, check_both, limits, seq};
    use super::*;

    #[test]
    fn sequences_join_and_leave_step_by_step() {
        check(16, limits(), [seq("a", 10, 3), seq("b", 5, 1).at(1)], "a[0..10] | a b[0..5] b. | a a.");
    }

    #[test]
    fn a_long_prompt_goes_in_chunks_and_others_decode_meanwhile() {
        let limits = Limits { step_tokens: 32, prefill_chunk: 24, ..limits() };
        check(
            16,
            limits,
            [seq("a", 4, 4), seq("b", 60, 1).at(1), seq("c", 5, 1).at(1)],
            "a[0..4] | a b[0..24] c[0..5] c. | a b[24..48] | a b[48..60] a. b.",
        );
    }

    #[test]
    fn a_short_prompt_is_not_stuck_behind_long_ones() {
        let limits = Limits { step_tokens: 16, prefill_chunk: 8, ..limits() };
        check(
            64,
            limits.clone(),
            [seq("a", 40, 1), seq("b", 40, 1), seq("c", 6, 1).at(1)],
            "a[0..8] b[0..8] | a[8..16] c[0..6] b[8..10] c. | a[16..24] b[10..18] | a[24..32] b[18..26] | \
             a[32..40] b[26..34] a. | b[34..40] b.",
        );
        // Short ones keep coming: the long one has half of every step.
        let rush = [1, 2, 3].map(|at| seq(["b", "c", "d"][at - 1], 8, 1).at(at));
        let [b, c, d] = rush;
        check(
            64,
            limits,
            [seq("a", 40, 1), b, c, d],
            "a[0..8] | a[8..16] b[0..8] b. | a[16..24] c[0..8] c. | a[24..32] d[0..8] d. | a[32..40] a.",
        );
    }

    #[test]
    fn prompts_add_to_a_step_only_what_those_who_decode_can_bear() {
        let limits = Limits {
            step_tokens: 512,
            prefill_chunk: 256,
            prefill_stretch: 2.0,
            max_running: 18,
            max_queue: 12,
            ..limits()
        };
        let mut scheduler = Scheduler::new(limits.clone(), 256, 16);
        let (now, mut plan) = (Instant::now(), Plan::default());
        let submit = |scheduler: &mut Scheduler, token: u32, length: usize| {
            let account = AccountId::new("a");
            let prompt = vec![token; length];
            let ask = Ask {
                account: &account,
                weight: 1,
                prompt,
                choices: 1,
                max_tokens: 900,
                priority: 0,
                salt: 0,
                adapter: None,
                scored: false,
                drafts: None,
                expected: vec![],
            };
            scheduler.submit(ask, now).unwrap();
        };
        // 4 ms a step and half a millisecond a row, whatever the row.
        let step = |scheduler: &mut Scheduler, plan: &mut Plan| {
            scheduler.plan(now, plan);
            scheduler.computed(plan, now);
            for part in plan.sampled.iter().map(|row| row.part) {
                scheduler.push(part.sequence, 9);
            }
            let rows = plan.batch.rows();
            scheduler.took(plan, Duration::from_micros(4_000 + 500 * rows as u64));
            (rows, plan.prompt_rows)
        };
        (1..=6).for_each(|token| submit(&mut scheduler, token, 10));
        assert_eq!(step(&mut scheduler, &mut plan), (60, 60), "nobody waits for these rows");
        (0..50).for_each(|_| assert_eq!(step(&mut scheduler, &mut plan), (6, 0)));
        submit(&mut scheduler, 7, 900);
        let (mut steps, mut without, mut left) = (0, 0, 900);
        while left > 0 {
            let (rows, prompt) = step(&mut scheduler, &mut plan);
            // 7 rows take 7.5 ms, so 15 are allowed: 22 rows in all, 16 in whole tiles.
            assert!(rows <= 24 && (prompt == 0 || prompt >= 8.min(left)), "{rows} rows, {prompt} of prompts");
            without += usize::from(prompt == 0);
            (steps, left) = (steps + 1, left - prompt);
        }
        assert!(without * 10 < steps, "{without} of {steps} steps read nothing");
        assert!((45..120).contains(&steps), "{steps}");
        // A crowd is let in by more at once, down to the last of it.
        let mut scheduler = Scheduler::new(limits, 1024, 16);
        (1..=6).for_each(|token| submit(&mut scheduler, token, 10));
        (0..50).for_each(|_| assert!(step(&mut scheduler, &mut plan).0 >= 6));
        (10..22).for_each(|token| submit(&mut scheduler, token, 100));
        let mut left = 1200;
        while left > 0 {
            let (_, prompt) = step(&mut scheduler, &mut plan);
            assert!(prompt >= 120.min(left), "{prompt} of {left}");
            left -= prompt;
        }
    }

    #[test]
    fn the_budget_is_shared_by_all_and_decodes_come_first() {
        let limits = Limits { step_tokens: 16, prefill_chunk: 16, ..limits() };
        check(16, limits, [seq("a", 12, 3), seq("b", 20, 1)], "a[0..12] b[0..4] | a b[4..19] | a b a. b.");
    }

    #[test]
    fn what_needs_no_token_is_done_before_the_tokens_are_known() {
        let mut scheduler = Scheduler::new(Limits { max_running: 3, ..limits() }, 8, 16);
        let (now, account) = (Instant::now(), AccountId::new("a"));
        let submit = |scheduler: &mut Scheduler, long: u32| {
            let ask = Ask {
                account: &account,
                weight: 1,
                prompt: (long..2 * long).collect(),
                choices: 1,
                max_tokens: 9,
                priority: 0,
                salt: 0,
                adapter: None,
                scored: false,
                drafts: None,
                expected: vec![],
            };
            scheduler.submit(ask, now).unwrap();
        };
        let (mut plan, mut next) = (Plan::default(), Plan::default());
        submit(&mut scheduler, 16);
        scheduler.plan(now, &mut plan);
        submit(&mut scheduler, 17);
        scheduler.prepare(&plan, now, &mut next);
        // The prompt's block can be found, its 17th token has a block, and the newcomer has two.
        assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.blocks.used()), (2, 0, 4));
        assert_eq!(scheduler.blocks.cached(), 0, "what can be found is in use");
        let first = plan.parts[0].sequence;
        let hash = scheduler.sequences[first].hashes[0];
        assert_eq!(scheduler.blocks.find(hash), Some(scheduler.sequences[first].table[0]));
        // Who comes now is in the next step as well.
        submit(&mut scheduler, 18);
        assert_eq!(scheduler.push(first, 7), Pushed::Open);
        scheduler.plan(now, &mut next);
        let rows = |plan: &Plan| plan.batch.spans.iter().map(|span| span.rows).collect::<Vec<_>>();
        assert_eq!((rows(&plan), rows(&next)), (vec![16], vec![1, 17, 18]));
        assert_eq!((next.begun.len(), scheduler.blocks.used()), (2, 6));
        // A pool that is full: nobody loses a block before it is known who ends.
        (0..2).for_each(|_| submit(&mut scheduler, 15));
        scheduler.prepare(&next, now, &mut plan);
        assert_eq!((scheduler.running(), scheduler.waiting()), (3, 2));
        let keys: Vec<_> = next.parts.iter().map(|part| part.sequence).collect();
        keys.iter().for_each(|&key| assert_eq!(scheduler.push(key, 7), Pushed::Open));
        scheduler.finish(keys[1]);
        scheduler.plan(now, &mut plan);
        assert_eq!((rows(&plan), plan.preempted, plan.made_way), (vec![1, 1, 15], 0, 0));
        scheduler.check().unwrap();
    }

    #[test]
    fn choices_wait_for_the_first_to_compute_the_prompt() {
        check(
            8,
            limits(),
            [seq("a", 40, 2).choices(3), seq("b", 4, 1)],
            "a0[0..40] b[0..4] b. | a0 a1* a2* a0. | a1 a2 a1. a2.",
        );
        // Whoever has gone has nothing to copy from, unless that was settled before; a full last block is copied as well.
        let choices = [seq("a", 40, 1).choices(2)];
        check_both(8, limits(), choices, "a0[0..40] a0. | a1[32..40] a1.", "a0[0..40] a0. | a1* a1.");
        check(8, limits(), [seq("a", 32, 2).choices(2)], "a0[0..32] | a0 a1* a0. | a1 a1.");
        check(
            8,
            Limits { prefix_cache: false, ..limits() },
            [seq("a", 9, 2).choices(2)],
            "a0[0..9] | a0 a1* a0. | a1 a1.",
        );
    }

    #[test]
    fn every_row_of_a_scored_prompt_is_looked_at_once_even_if_it_is_thrown_out_in_between() {
        // Its prefix is there already; and a longer answer of higher priority needs its blocks before it is through.
        let limits = Limits { step_tokens: 2, prefill_chunk: 2, ..limits() };
        let mut scheduler = Scheduler::new(limits, 17, 16);
        let (now, mut plan) = (Instant::now(), Plan::default());
        let account = AccountId::new("a");
        let prompt: Vec<u32> = (0..150).collect();
        let plain = |prompt, max_tokens, priority| Ask {
            account: &account,
            weight: 1,
            prompt,
            choices: 1,
            max_tokens,
            priority,
            salt: 0,
            adapter: None,
            scored: false,
            drafts: None,
            expected: vec![],
        };
        scheduler.submit(plain(prompt.clone(), 1, 0), now).unwrap();
        let (mut key, mut looked_at, mut drawn, mut preempted) = (None, Vec::new(), 0, 0);
        loop {
            if scheduler.is_idle() {
                if key.is_some() {
                    break;
                }
                scheduler.submit(plain(vec![9; 14], 134, 5), now).unwrap();
                let scored = Ask { choices: 2, scored: true, ..plain(prompt.clone(), 30, 0) };
                key = Some(scheduler.submit(scored, now).unwrap());
            }
            scheduler.plan(now, &mut plan);
            scheduler.check().unwrap();
            assert_eq!(plan.sampled.len(), plan.batch.sample_rows.len());
            preempted += plan.preempted;
            scheduler.computed(&plan, now);
            for (row, Sampled { part, .. }) in plan.sampled.clone().into_iter().enumerate() {
                if let Some(token) = plan.given(row) {
                    assert_eq!((Some(part.request), part.choice), (key, 0));
                    let place = plan.batch.positions[plan.batch.sample_rows[row] as usize];
                    assert_eq!(token, place + 1, "the prompt counts up");
                    looked_at.push(place);
                    continue;
                }
                drawn += usize::from(Some(part.request) == key);
                if scheduler.push(part.sequence, 7) == Pushed::Full {
                    scheduler.finish(part.sequence);
                }
            }
        }
        assert!(preempted > 0 && scheduler.blocks.used() == 0);
        assert_eq!(looked_at, (0..149).collect::<Vec<_>>());
        assert_eq!(drawn, 60);
    }

    #[test]
    fn a_cancelled_request_frees_its_blocks_wherever_it_is() {
        let limits = Limits { step_tokens: 16, prefill_chunk: 16, max_running: 2, ..limits() };
        // a leaves within its prompt, b while it waits, c with choices that are held back, d while it decodes.
        check(
            8,
            limits,
            [
                seq("a", 60, 4).leaves(1),
                seq("b", 4, 9).at(1).leaves(1),
                seq("c", 60, 2).choices(4).at(1).leaves(3),
                seq("d", 5, 99).at(4).leaves(6),
            ],
            "a[0..16] | c0[0..16] | c0[16..32] |  | d[0..5] | d",
        );
    }

    #[test]
    fn what_can_never_be_computed_is_refused_at_once_and_what_can_is_not() {
        check(2, limits(), [seq("a", 32, 1)], "a ContextLength");
        // The pool ends the answer: 31 + 1.
        check(2, limits(), [seq("a", 31, 9)], "a[0..31] a.");
        check(99, Limits { context: 20, ..limits() }, [seq("a", 18, 9)], "a[0..18] | a a.");
    }

    #[test]
    fn a_full_queue_refuses_but_an_empty_one_takes_any_request() {
        let limits = Limits { max_running: 1, max_queue: 2, ..limits() };
        check(
            8,
            limits,
            [seq("a", 2, 1).choices(4), seq("b", 2, 1)],
            "b Busy | a0[0..2] a0. | a1[0..2] a1. | a2[0..2] a2. | a3[0..2] a3.",
        );
    }

    #[test]
    fn a_queue_that_one_account_has_filled_takes_others_in() {
        let limits = Limits { max_running: 1, max_queue: 4, ..limits() };
        let mut scheduler = Scheduler::new(limits, 64, 16);
        let mut outcome = |account: &str, weight: u32| {
            let (account, prompt) = (AccountId::new(account), vec![1; 4]);
            let ask = Ask {
                account: &account,
                weight,
                prompt,
                choices: 1,
                max_tokens: 9,
                priority: 0,
                salt: 0,
                adapter: None,
                scored: false,
                drafts: None,
                expected: vec![],
            };
            scheduler.submit(ask, Instant::now()).map_or_else(|error| format!("{:?}", error.kind()), |_| "in".into())
        };
        let flood: Vec<_> = (0..5).map(|_| outcome("flood", 1)).collect();
        assert_eq!(flood, ["in", "in", "in", "in", "Busy"]);
        let light: Vec<_> = (0..3).map(|_| outcome("light", 1)).collect();
        assert_eq!(light, ["in", "in", "Busy"], "half of four places");
        let heavy: Vec<_> = (0..3).map(|_| outcome("heavy", 2)).collect();
        assert_eq!(heavy, ["in", "in", "Busy"], "twice as many as there are places is the end");
    }
}
