//! Decides which sequences compute how many tokens in the next step.
//!
//! ```text
//! submit ──> waiting ──admit──> running ──finish──> (gone)
//!               ^                  |
//!               +──── preempt ─────+      blocks go back, tokens stay
//! ```
//!
//! Each step has one budget of tokens. Running sequences come first: one token each for those that decode, then prompts,
//! as many rows as [`Pace`] finds tolerable for those that decode. The [`Queue`] is let in as long as there are rows for
//! newcomers, as far as free blocks go. A sequence that runs owns a block for every token it knows, so only decodes can
//! need another; when there is none, the last admitted of the lowest priority loses its blocks and waits again.
//!
//! Rows of prompts go out in order of admission, but a prompt of more than a chunk leaves half of them to shorter ones
//! behind it. A prompt that begins like one that is being computed follows it ([`Coming`]) and finds its blocks. An
//! account that has less of the batch than another takes places and blocks from it: see `Scheduler::make_way`.
//!
//! The choices of a request share the prompt: choice 0 computes it alone, the others join when it is there. They hold its
//! full blocks together; the block in which it ends, which each will write to, is copied for each, and only the last row
//! of the prompt is computed again, since a token is drawn after it. Pure: knows nothing of devices, clocks or channels.
//! `lane.rs` feeds it, a `Runner` executes the [`Plan`].
//!
//! Rows that nobody needs may go to drafts: guesses of what comes next ([`speculate`](crate::engine::speculate)), verified in
//! the same step. They never cost another sequence its row or its block. A draft model computes what a sequence has that it
//! does not ([`Mirror`]) before it guesses, and only for sequences that it guesses for.

mod coast;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::base::{AccountId, Error, Kind, Result};
use crate::engine::blocks::{BlockHash, BlockId, Blocks};
use crate::engine::coming::{Coming, Follower};
use crate::engine::mirror::Mirror;
use crate::engine::pace::{Load, Pace};
use crate::engine::queue::{AccountKey, Queue, Ticket};
use crate::engine::sequence::{RequestKey, Sequence, SequenceKey};
use crate::engine::slab::Slab;
use crate::engine::speculate::{Guesses, Source, Worth};
use crate::engine::spill::{Index, Kept, SlotId};
use crate::model::Batch;
use crate::model::lora::Adapter;

/// Share of a running sequence's remaining tokens that admission keeps blocks free for: at the start, and at the least.
const GROWTH_START: f32 = 0.5;
const GROWTH_LEAST: f32 = 0.1;
/// Taken off the share each step, so that it falls from start to least in some 600 steps without preemption.
const GROWTH_DECAY: f32 = (GROWTH_START - GROWTH_LEAST) / 600.0;
/// Added to the share when a sequence lost its blocks: admission was too brave.
const GROWTH_LESSON: f32 = 0.2;
/// Remaining tokens beyond this are not believed: `max_tokens` is often far above what is produced.
const GROWTH_HORIZON: usize = 4096;
/// A sequence follows another when that spares it at least one of so many of its rows.
const WORTH_FOLLOWING: usize = 4;
/// Prompts of more than a chunk in the batch at a time: more would hold blocks that nobody fills.
const MOST_LONG: usize = 4;
/// Spilled blocks fetched in a step, at most: they are copied while everybody waits.
const MOST_FETCHED: usize = 32;
/// Sequences that make way in a step, at most.
const MOST_MAKE_WAY: usize = 4;
/// Tokens of an answer over which it is to pay that the draft model computes what is before them.
const HORIZON: usize = 64;

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
    /// How far answers are guessed ahead.
    pub drafts: DraftLimits,
}

/// How far answers are guessed ahead. Default: not at all.
#[derive(Clone, Debug, Default)]
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

/// How many rows of a step a part has.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Known tokens.
    rows: usize,
    /// Drafts behind them.
    drafts: usize,
    /// Who guesses those.
    source: Source,
    /// Known tokens that the draft model computes.
    catch_up: usize,
    /// Places of the prompt whose logits are wanted, the last token's aside.
    scored: (usize, usize),
}

/// A part that could have another draft.
#[derive(Clone, Copy, Debug)]
struct Hope {
    part: usize,
    source: Source,
    /// That all its drafts so far are right.
    chance: f32,
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
    followed_by: Vec<u32>,
    /// Requests whose first token is computed in this step, with the prompt tokens found in the prefix cache.
    pub begun: Vec<(RequestKey, usize)>,
    /// Tokens computed that belong to prompts.
    pub prompt_rows: usize,
    /// What the step costs, drafts aside.
    load: Load,
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
    shares: Vec<Share>,
    hopes: Vec<Hope>,
    /// One part's tokens, where drafts follow the known ones.
    tokens: Vec<u32>,
}

impl Plan {
    fn clear(&mut self) {
        self.batch.clear();
        self.parts.clear();
        self.copies.clear();
        self.sampled.clear();
        self.followed_by.clear();
        self.begun.clear();
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
}

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

/// No token of the prompt: one is drawn.
const DRAWN: u32 = u32::MAX;

impl Plan {
    /// The token of the prompt that follows a sampled row, whose log-probability is wanted; `None`: a token is drawn.
    pub fn given(&self, sampled: usize) -> Option<u32> {
        self.followed_by.get(sampled).copied().filter(|&token| token != DRAWN)
    }

    /// Rows of prompts whose logits are wanted.
    fn scored_rows(&self) -> usize {
        self.shares.iter().map(|share| share.scored.1 - share.scored.0).sum()
    }
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
            table: Vec::new(),
            published: 0,
            hashes: Vec::new(),
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

    /// Decides the next step. An empty batch means that there is nothing to compute.
    pub fn plan(&mut self, now: Instant, plan: &mut Plan) {
        plan.clear();
        self.step += 1;
        self.growth = (self.growth - GROWTH_DECAY).max(GROWTH_LEAST);
        self.release_followers(now);
        self.grow(now, plan);
        let mut decode = Load::default();
        for sequence in self.running.iter().map(|&key| &self.sequences[key]).filter(|sequence| sequence.left() == 1) {
            decode.decodes(1, sequence.computed);
        }
        let mut budget = self.limits.step_tokens;
        let rows = self.prompt_rows(decode).min(budget - decode.decode);
        // Before anything is placed: what was placed must keep its blocks.
        self.let_in(rows, now, plan);
        for at in 0..self.running.len() {
            if self.sequences[self.running[at]].left() == 1 {
                budget -= self.place(self.running[at], budget, plan);
            }
        }
        self.read(rows.min(budget), plan);
        self.draft(plan);
        self.pack(plan);
        self.spill(plan);
    }

    /// Rows that prompts may have beside others that decode.
    fn prompt_rows(&self, decode: Load) -> usize {
        if decode.decode == 0 || self.limits.prefill_stretch == 0.0 {
            return usize::MAX;
        }
        let reading = self.running.iter().map(|&key| &self.sequences[key]).filter(|sequence| sequence.left() > 1);
        let coming = self.queue.len().min(self.limits.max_running.saturating_sub(self.running.len()));
        let context = reading.clone().next().map_or(0, |first| first.computed);
        self.pace.prompt_rows(decode, reading.count() + coming, context, self.limits.prefill_stretch)
    }

    /// Whether this much is read in several steps.
    fn is_long(&self, left: usize) -> bool {
        left > self.limits.prefill_chunk
    }

    /// Admits from the queue as long as `rows` are not spoken for.
    fn let_in(&mut self, rows: usize, now: Instant, plan: &mut Plan) {
        let (mut claimed, mut long) = (0, 0);
        let mut claim = |scheduler: &Self, key: SequenceKey| {
            let left = scheduler.sequences[key].left();
            if left == 1 {
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
        // Who has just thrown somebody out must not invite the next one in.
        while plan.preempted == 0 && spoken_for.0 < rows && spoken_for.1 < MOST_LONG {
            let Some(ticket) = self.queue.next(now) else { break };
            if self.running.len() >= self.limits.max_running && !self.make_way(ticket, Good::Place, now, plan) {
                break;
            }
            let mut outcome = self.admit(ticket, now, plan);
            while outcome == Admission::LacksBlocks && self.make_way(ticket, Good::Blocks, now, plan) {
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

    /// Gives every running sequence a block for its newest token.
    fn grow(&mut self, now: Instant, plan: &mut Plan) {
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

    /// Sequences whose common prefix is there, or will not come, are first in their lines again.
    fn release_followers(&mut self, now: Instant) {
        if self.coming.followers().is_empty() {
            return;
        }
        let (sequences, step) = (&self.sequences, self.step);
        let released = self.coming.released(|leader| is_stuck(&sequences[leader], step));
        for ticket in released.rev() {
            self.queue.join_front(ticket, now);
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

    /// Has blocks fetched that a sequence would find if they had not been spilled; `hits` of `most` are in the pool.
    fn fetch(&mut self, key: SequenceKey, hits: usize, most: usize, plan: &mut Plan) -> bool {
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
    fn spill(&mut self, plan: &mut Plan) {
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

    /// What should have gone into a slot is not there.
    pub fn not_spilled(&mut self, slot: SlotId) {
        self.spilled.iter_mut().for_each(|index| index.forget(slot));
    }

    /// A block was filled from a slot, or could not be.
    pub fn fetched(&mut self, (slot, block, hash): (SlotId, BlockId, BlockHash), worked: bool) {
        match worked {
            true => self.blocks.publish(block, hash),
            false => self.not_spilled(slot),
        }
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

    /// A choice of the same request whose blocks hold the whole prompt, for one that has produced nothing.
    fn twin(&self, key: SequenceKey) -> Option<SequenceKey> {
        let sequence = &self.sequences[key];
        if sequence.choice == 0 || sequence.produced() > 0 {
            return None;
        }
        let mut others = self.requests[sequence.request].live.iter().copied().filter(|&other| other != key);
        others.find(|&other| self.sequences[other].computed >= sequence.prompt)
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

    /// Gives rows that are left to drafts, first to each sequence's first, then to each one's second, as long as they pay.
    fn draft(&mut self, plan: &mut Plan) {
        let limits = self.limits.drafts.clone();
        let rows: usize = plan.shares.iter().map(|share| share.rows).sum();
        let mut left = (self.limits.step_tokens - rows).min(limits.rows);
        if limits.most == 0 || left == 0 {
            return;
        }
        let (step, row) = self.pace.step(plan.load);
        let mut worth = Worth::of(step, rows, row);
        self.hope(&worth, plan);
        for ahead in 0..limits.most {
            self.board(ahead, &mut worth, plan);
            plan.hopes.retain_mut(|hope| {
                let sequence = &mut self.sequences[plan.parts[hope.part].sequence];
                // The last token that may be drawn needs no draft.
                let room = (sequence.most - sequence.tokens.len() - 1).min(sequence.guesses.most());
                if left == 0 || ahead >= room {
                    return false;
                }
                let Some(chance) = sequence.guesses.chance(hope.source, ahead) else { return false };
                let lacks = self.blocks.needed(sequence.tokens.len() + ahead + 1) > sequence.table.len();
                if lacks && self.blocks.free() == 0 || !worth.add(hope.chance * chance) {
                    return false;
                }
                let has = !lacks || self.blocks.take(1, &mut sequence.table);
                debug_assert!(has, "there was a free block");
                hope.chance *= chance;
                let share = &mut plan.shares[hope.part];
                share.drafts += 1;
                if hope.source == Source::Model {
                    share.source = hope.source;
                    share.catch_up = sequence.tokens.len() - sequence.mirrored;
                }
                plan.drafted += 1;
                left -= 1;
                true
            });
            if plan.hopes.is_empty() {
                break;
            }
        }
    }

    /// Who could have drafts, and whose they would be. A sequence that the draft model knows too little of yet may have it
    /// catch up without guessing.
    fn hope(&mut self, worth: &Worth, plan: &mut Plan) {
        let mut room = if self.mirror.is_some() && self.pace.is_known() { self.limits.prefill_chunk } else { 0 };
        for (at, part) in plan.parts.iter().enumerate() {
            let sequence = &mut self.sequences[part.sequence];
            if sequence.left() > 0 || sequence.guesses.most() == 0 {
                continue;
            }
            sequence.guesses.prepare(&sequence.tokens);
            let lookup = sequence.guesses.chance(Source::Lookup, 0);
            let trust = sequence.guesses.chance(Source::Model, 0).unwrap_or(0.0);
            if room > 0 && lookup.is_none_or(|lookup| lookup < trust) {
                let behind = sequence.tokens.len() - sequence.mirrored;
                let mut load = Load::default();
                load.reads(behind, sequence.mirrored);
                let ahead = (sequence.most - sequence.tokens.len()).clamp(1, HORIZON);
                if worth.pays(1, trust, self.draft_pace.seconds(load) as f32 / ahead as f32) {
                    if behind <= room {
                        room -= behind;
                        plan.hopes.push(Hope { part: at, source: Source::Model, chance: 1.0 });
                        continue;
                    }
                    plan.shares[at].catch_up = std::mem::take(&mut room);
                }
            }
            if lookup.is_some() {
                plan.hopes.push(Hope { part: at, source: Source::Lookup, chance: 1.0 });
            }
        }
    }

    /// Decides whether the draft model makes another pass, for the draft after `ahead` others of all who still hope for it.
    fn board(&mut self, ahead: usize, worth: &mut Worth, plan: &mut Plan) {
        let (mut load, mut chance) = (Load::default(), 0.0);
        for hope in plan.hopes.iter().filter(|hope| hope.source == Source::Model) {
            let sequence = &self.sequences[plan.parts[hope.part].sequence];
            load.decodes(1, sequence.tokens.len() + ahead);
            chance += hope.chance * sequence.guesses.chance(Source::Model, ahead).unwrap_or(0.0);
        }
        if load.decode == 0 {
            return;
        }
        let pass = self.draft_pace.seconds(load) as f32;
        if worth.pays(load.decode, chance, pass) {
            worth.spend(pass);
            return;
        }
        plan.hopes.retain_mut(|hope| {
            let guesses = &self.sequences[plan.parts[hope.part].sequence].guesses;
            let stays = hope.source == Source::Lookup || ahead == 0 && guesses.chance(Source::Lookup, 0).is_some();
            hope.source = Source::Lookup;
            stays
        });
    }

    /// Puts the rows of all parts into the batch.
    fn pack(&mut self, plan: &mut Plan) {
        for (at, (part, share)) in plan.parts.iter().zip(&plan.shares).enumerate() {
            let sequence = &mut self.sequences[part.sequence];
            let (start, end) = (sequence.computed - share.rows, sequence.computed);
            // A token is drawn after the last known one, and after each draft.
            let samples = end == sequence.tokens.len();
            let drafts = share.drafts;
            sequence.computed = end + drafts;
            let table = &sequence.table[..self.blocks.needed(end + drafts)];
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

/// Whether a sequence that runs had no rows in the last step: whoever follows it would wait for its turn as well.
fn is_stuck(leader: &Sequence, step: u64) -> bool {
    leader.fed + 1 < step
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::speculate::agreed;

    /// A request: name, prompt, tokens to produce; `at` is the step it arrives before. Prompts hold the name's letter
    /// unless `shared`, so equal names share prefixes.
    #[derive(Clone)]
    struct Seq {
        name: &'static str,
        prompt: usize,
        most: u32,
        choices: u32,
        priority: i8,
        at: usize,
        leaves: Option<usize>,
    }

    fn seq(name: &'static str, prompt: usize, most: u32) -> Seq {
        Seq { name, prompt, most, choices: 1, priority: 0, at: 0, leaves: None }
    }

    impl Seq {
        fn choices(self, choices: u32) -> Self {
            Self { choices, ..self }
        }
        fn priority(self, priority: i8) -> Self {
            Self { priority, ..self }
        }
        fn at(self, at: usize) -> Self {
            Self { at, ..self }
        }
        fn leaves(self, step: usize) -> Self {
            Self { leaves: Some(step), ..self }
        }
    }

    fn limits() -> Limits {
        Limits {
            context: 1000,
            step_tokens: 64,
            prefill_chunk: 64,
            max_running: 8,
            max_queue: 8,
            prefix_cache: true,
            prefill_stretch: 0.0,
            spill_slots: 0,
            drafts: DraftLimits::default(),
        }
    }

    /// Runs requests to their end over `blocks` blocks of 16 and compares the steps. In a step: `-b` lost its blocks,
    /// `a[0..32]` several rows, `a` one row, `a*` one after a copied block, `a+3` one with three drafts; `a.` is complete.
    /// Choices are named `a0 a1`.
    fn check<const N: usize>(blocks: usize, limits: Limits, requests: [Seq; N], expected: &str) {
        let mut scheduler = Scheduler::new(limits, blocks, 16);
        let (mut now, mut plan) = (Instant::now(), Plan::default());
        let mut keys: Vec<Option<RequestKey>> = vec![None; N];
        let mut trace: Vec<String> = Vec::new();
        for step in 0.. {
            for (key, request) in keys.iter_mut().zip(&requests) {
                if request.at == step {
                    let account = AccountId::new(&request.name[..1]);
                    let prompt = vec![u32::from(request.name.as_bytes()[0]); request.prompt];
                    let (choices, max_tokens, priority) = (request.choices, request.most, request.priority);
                    let ask = Ask {
                        account: &account,
                        weight: 1,
                        prompt,
                        choices,
                        max_tokens,
                        priority,
                        salt: 0,
                        adapter: None,
                        scored: false,
                        drafts: None,
                        expected: vec![],
                    };
                    match scheduler.submit(ask, now) {
                        Ok(new) => *key = Some(new),
                        Err(error) => trace.push(format!("{} {:?}", request.name, error.kind())),
                    }
                }
                if request.leaves == Some(step) {
                    scheduler.cancel(key.take().unwrap());
                }
            }
            if scheduler.is_idle() && requests.iter().all(|request| request.at <= step) {
                break;
            }
            let name = |key: SequenceKey, scheduler: &Scheduler, keys: &[Option<RequestKey>]| {
                let sequence = scheduler.sequence(key).unwrap();
                let at = keys.iter().position(|&key| key == Some(sequence.request)).unwrap();
                match requests[at].choices {
                    1 => requests[at].name.to_owned(),
                    _ => format!("{}{}", requests[at].name, sequence.choice),
                }
            };
            let before = scheduler.running.clone();
            scheduler.plan(now, &mut plan);
            if plan.drafted == 0 {
                scheduler.check().unwrap();
            }
            assert!(plan.batch.rows() <= scheduler.limits.step_tokens);
            let mut line: Vec<String> = before
                .iter()
                .filter(|&&key| !scheduler.running.contains(&key))
                .map(|&key| format!("-{}", name(key, &scheduler, &keys)))
                .collect();
            assert_eq!(line.len(), plan.preempted + plan.made_way);
            for ((part, span), share) in plan.parts.iter().zip(&plan.batch.spans).zip(&plan.shares) {
                let (from, to) = (span.start, span.start + share.rows as u32);
                let rows = if share.rows > 1 { format!("[{from}..{to}]") } else { "".into() };
                let drafts = if share.drafts > 0 { format!("+{}", share.drafts) } else { "".into() };
                let copied = plan.copies.iter().any(|(_, to)| plan.batch.table(span).contains(to));
                let copied = if copied { "*" } else { "" };
                line.push(name(part.sequence, &scheduler, &keys) + &rows + copied + &drafts);
            }
            scheduler.computed(&plan, now);
            // Every token is a 7.
            let firsts = (0..plan.sampled.len()).filter(|&row| plan.sampled[row].ahead == 0);
            let ended = firsts.filter_map(|row| {
                let (part, count) = (plan.sampled[row].part, agreed(plan.drafts(row), std::iter::repeat(7)));
                (0..count).any(|_| scheduler.push(part.sequence, 7) == Pushed::Full).then_some(part)
            });
            let ended: Vec<_> = ended.collect();
            scheduler.settle(&plan);
            for part in ended {
                line.push(name(part.sequence, &scheduler, &keys) + ".");
                let complete = scheduler.finish(part.sequence);
                keys.iter_mut().filter(|key| complete && **key == Some(part.request)).for_each(|key| *key = None);
            }
            scheduler.check().unwrap();
            trace.push(line.join(" "));
            now += Duration::from_millis(10);
            assert!(step < 200, "no end: {trace:?}");
        }
        assert_eq!(scheduler.blocks.used(), 0);
        assert_eq!(trace.join(" | "), expected);
    }

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
        let limits = Limits { step_tokens: 512, prefill_chunk: 256, prefill_stretch: 2.0, ..limits() };
        let mut scheduler = Scheduler::new(limits, 256, 16);
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
        let mut steps = 0;
        while scheduler.running() < 7 || plan.prompt_rows > 0 || steps == 0 {
            let (rows, prompt) = step(&mut scheduler, &mut plan);
            // 7 rows take 7.5 ms, so 15 are allowed: 22 rows in all, 16 in whole tiles.
            assert!(rows <= 24 && (prompt == 0 || prompt >= 8), "{rows} rows, {prompt} of prompts");
            steps += 1;
        }
        assert!((45..120).contains(&steps), "{steps}");
    }

    #[test]
    fn the_budget_is_shared_by_all_and_decodes_come_first() {
        let limits = Limits { step_tokens: 16, prefill_chunk: 16, ..limits() };
        check(16, limits, [seq("a", 12, 3), seq("b", 20, 1)], "a[0..12] b[0..4] | a b[4..19] | a b a. b.");
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
    fn without_a_prefix_cache_only_the_choices_of_a_request_share() {
        let limits = Limits { prefix_cache: false, ..limits() };
        check(8, limits.clone(), [seq("a", 48, 1), seq("a", 48, 1).at(1)], "a[0..48] a. | a[0..48] a.");
        check(8, limits, [seq("a", 33, 1).choices(3)], "a0[0..33] a0. | a1 a2 a1. a2.");
    }

    #[test]
    fn choices_wait_for_the_first_to_compute_the_prompt() {
        check(
            8,
            limits(),
            [seq("a", 40, 2).choices(3), seq("b", 4, 1)],
            "a0[0..40] b[0..4] b. | a0 a1* a2* a0. | a1 a2 a1. a2.",
        );
        // Whoever has gone has nothing to copy from; a full last block is copied as well.
        check(8, limits(), [seq("a", 40, 1).choices(2)], "a0[0..40] a0. | a1[32..40] a1.");
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

    fn guessing(step_tokens: usize) -> Limits {
        let drafts = DraftLimits { most: 4, rows: 8, lookup: true, model: false };
        Limits { step_tokens, prefill_chunk: step_tokens, drafts, ..limits() }
    }

    #[test]
    fn rows_that_are_left_verify_drafts_and_an_answer_ends_where_it_would_without() {
        // The prompt expects a's, then the answer's 7s expect 7s; the last token needs no draft.
        check(8, guessing(64), [seq("a", 8, 14)], "a[0..8] | a | a | a | a+1 | a+1 | a+2 | a+2 a.");
    }

    #[test]
    fn drafts_take_no_row_from_a_prompt_or_another_sequence() {
        check(
            8,
            guessing(4),
            [seq("a", 3, 12), seq("b", 6, 2).at(5)],
            "a[0..3] | a | a | a | a+1 | a b[0..3] | a b[3..6] | a+1 b b. | a+1 a.",
        );
    }

    #[test]
    fn drafts_take_free_blocks_only_and_give_back_what_did_not_come_true() {
        // The fourth 7 expects another, but it would be the first of a block that b has.
        check(2, guessing(64), [seq("a", 12, 6), seq("b", 2, 2).at(3)], "a[0..12] | a | a | a b[0..2] | a b b. | a a.");
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
}
