//! One installed model at work: its scheduler, its runner, and the answers under way.
//!
//! ```text
//! submit ──> [ plan(now) ──> compute() ───> deliver(now) ] ──page──> scribe ──events──> callers
//!              cancels,       forward,       count,                     │
//!              deadlines,       prepare next  finish                    │
//!              hand out rows  sample,                                   │
//!                             join <──────── stop strings ──────────────┘
//! ```
//!
//! The three parts of a step are separate and take `now`, so a simulation can drive the real thing from a seed. No
//! threads unless [`Lane::with_scribe`] asks for one; the loop is in `run.rs`.

use std::time::{Duration, Instant};

use crate::base::{Error, Kind, Result, SlotId};
use crate::engine::answer::{Answer, Last};
use crate::engine::drafter::Drafter;
use crate::engine::masks::Masks;
use crate::engine::refusal::unavailable;
use crate::engine::reply::{Reply, Said};
use crate::engine::sampler::Sampler;
use crate::engine::scheduler::{Ask, DraftLimits, Limits, Plan, Planned, Pushed, Scheduler};
use crate::engine::scribe::Scribe;
use crate::engine::sequence::RequestKey;
use crate::engine::speculate::agreed;
use crate::engine::spill::Store;
use crate::engine::{ModelSlot, SlotStatus, Submit};
use crate::model::Launched;
use crate::task::Event;

/// How much the newest request counts in the moving average of how long one takes.
const PACE_WEIGHT: f64 = 0.1;

/// A model slot, installed.
pub struct Lane {
    slot: ModelSlot,
    scheduler: Scheduler,
    sampler: Sampler,
    masks: Masks,
    scribe: Scribe,
    drafter: Option<Drafter>,
    /// The step under way, and when that was begun.
    plan: Plan,
    begun: Instant,
    /// The one after it, as far as that can be told.
    next: Plan,
    /// By the scheduler's request key.
    answers: Vec<Option<Answer>>,
    /// Choices that a step completed.
    ended: Vec<Planned>,
    /// Requests found unfit while others are being looked at.
    unfit: Vec<(RequestKey, Option<Error>)>,
    steps: u64,
    retiring: bool,
    /// Seconds from a request's first step to its end, averaged.
    pace: f64,
}

impl Lane {
    /// Puts a slot to work.
    pub fn new(slot: ModelSlot) -> Self {
        let limits = Limits {
            context: slot.context as usize,
            step_tokens: slot.step_tokens,
            prefill_chunk: slot.prefill_chunk,
            max_running: slot.max_running,
            max_queue: slot.max_queue,
            prefix_cache: slot.prefix_cache,
            prefill_stretch: slot.prefill_stretch,
            spill_slots: slot.spill.as_ref().map_or(0, Store::slots),
            foresight: usize::from(slot.runner.goes_ahead()),
            drafts: DraftLimits {
                most: slot.speculation.most,
                rows: slot.speculation.rows,
                lookup: slot.speculation.lookup,
                model: slot.draft.is_some(),
            },
        };
        let mut slot = slot;
        let scheduler = Scheduler::new(limits, slot.runner.blocks(), slot.runner.block_tokens());
        slot.metrics.kv_total.set(scheduler.blocks().total() as i64);
        Self {
            masks: Masks::new(slot.max_running, slot.metrics.clone()),
            scribe: Scribe::new(slot.metrics.clone()),
            drafter: slot.draft.take().map(Drafter::new),
            slot,
            scheduler,
            sampler: Sampler::default(),
            plan: Plan::default(),
            begun: Instant::now(),
            next: Plan::default(),
            answers: Vec::new(),
            ended: Vec::new(),
            unfit: Vec::new(),
            steps: 0,
            retiring: false,
            pace: 1.0,
        }
    }

    /// From now on answers are written on a thread of their own while the device computes the next step, where a step has
    /// at least so many lines.
    pub fn with_scribe(mut self, least: usize) -> Self {
        self.scribe.move_out(least);
        self
    }

    /// Which slot.
    pub fn id(&self) -> SlotId {
        self.slot.slot
    }

    /// Whether there is nothing to compute and nobody to answer.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Takes no requests from now on.
    pub fn retire(&mut self) {
        self.retiring = true;
    }

    /// Whether it takes no requests any more.
    pub fn is_retiring(&self) -> bool {
        self.retiring
    }

    /// Takes a request in, or tells it why not.
    pub fn submit(&mut self, submit: Submit, now: Instant) {
        let events = submit.events.clone();
        if let Err(error) = self.accept(submit, now) {
            // A receiver that is gone needs no answer.
            let _ = events.try_send(Event::Failed(error));
        }
        self.show();
    }

    fn accept(&mut self, submit: Submit, now: Instant) -> Result<()> {
        if self.retiring {
            return Err(unavailable());
        }
        let vocabulary = &self.slot.vocabulary;
        if let Some(token) = submit.prompt.iter().find(|&&token| token as usize >= vocabulary.len()) {
            let most = vocabulary.len().saturating_sub(1);
            return Err(Error::bad_input(format!(
                "The prompt holds token {token}, but the vocabulary ends at {most}."
            )));
        }
        if submit.adapter.as_ref().is_some_and(|adapter| !self.slot.runner.takes(adapter)) {
            return Err(Error::internal("an adapter that was opened for another model"));
        }
        if let Some(adapter) = &submit.adapter {
            self.slot.runner.adopt(adapter)?;
        }
        let vocabulary = submit.vocabulary.as_ref().unwrap_or(&self.slot.vocabulary);
        let (answer, reply) = (Answer::new(&submit, vocabulary.clone()), Reply::new(&submit, vocabulary));
        let ask = Ask {
            account: &submit.account,
            weight: submit.weight,
            prompt: submit.prompt,
            choices: submit.choices,
            max_tokens: submit.max_tokens,
            priority: submit.priority,
            salt: submit.cache_salt,
            adapter: submit.adapter,
            scored: submit.prompt_logprobs.is_some(),
            drafts: submit.drafts,
            expected: submit.expected,
        };
        let key = self.scheduler.submit(ask, now).map_err(|error| match error.kind() {
            Kind::Busy => error.with_retry_after(self.expected_wait()),
            _ => error,
        })?;
        let at = key as usize;
        self.answers.resize_with(self.answers.len().max(at + 1), || None);
        self.answers[at] = Some(answer);
        self.scribe.open(key, reply);
        self.slot.metrics.requests.inc();
        Ok(())
    }

    /// How long until the queue of now has moved up, at the pace of late.
    fn expected_wait(&self) -> Duration {
        let rounds = self.scheduler.waiting() as f64 / self.scheduler.limits().max_running as f64;
        Duration::from_secs((self.pace * rounds).ceil().clamp(1.0, 60.0) as u64)
    }

    /// Begins a step: lets go of whoever left or is late, then decides what to compute. Returns whether there is
    /// anything; if so, [`Lane::compute`] and [`Lane::deliver`] must follow.
    pub fn plan(&mut self, now: Instant) -> bool {
        self.scribe.collect();
        self.finish_stopped();
        for (key, answer) in self.answers.iter().enumerate() {
            let Some(answer) = answer else { continue };
            if answer.is_unwanted() {
                self.unfit.push((key as RequestKey, None));
            } else if answer.is_late(now) {
                let late =
                    "The deadline passed before the answer was complete; ask for fewer tokens or allow more time.";
                self.unfit.push((key as RequestKey, Some(Error::new(Kind::Timeout, late))));
            }
        }
        if !self.unfit.is_empty() {
            // Who has left because the answer is whole has not left. An error shows when the step is computed.
            let _ = self.scribe.join();
            self.finish_stopped();
            self.let_go();
            self.scribe.post(now);
        }
        std::mem::swap(&mut self.plan, &mut self.next);
        self.begun = now;
        loop {
            self.scheduler.plan(now, &mut self.plan);
            self.move_blocks();
            // With nobody to compute for meanwhile, blocks are fetched until all are there.
            if self.plan.batch.rows() > 0 || self.plan.fetch.is_empty() {
                break;
            }
        }
        let metrics = &self.slot.metrics;
        metrics.preemptions.inc_by(self.plan.preempted as u64);
        metrics.made_way.inc_by(self.plan.made_way as u64);
        metrics.followed.inc_by(self.plan.followed as u64);
        for &(key, cached) in &self.plan.begun {
            if let Some(answer) = &mut self.answers[key as usize] {
                answer.begin(cached, now, metrics);
                self.scribe.begin(key, cached);
            }
        }
        let rows = self.plan.batch.rows();
        if rows == 0 {
            self.show();
            return false;
        }
        metrics.prompt_tokens.inc_by(self.plan.prompt_rows as u64);
        metrics.adapted_tokens.inc_by(self.plan.adapted_rows as u64);
        metrics.step_rows.observe(rows as f64);
        metrics.step_sequences.observe(self.plan.parts.len() as f64);
        true
    }

    /// Copies blocks out of the pool that are about to be overwritten, others within it for choices that write to them,
    /// and those back that are wanted again.
    fn move_blocks(&mut self) {
        let (runner, metrics) = (&mut self.slot.runner, &self.slot.metrics);
        if let Some(drafter) = &mut self.drafter {
            // What is kept outside the pool is the target's alone, so nothing has to leave first.
            self.plan.copies.iter().for_each(|&(from, to)| drafter.copy(from, to));
        }
        let Some(store) = &mut self.slot.spill else {
            self.plan.copies.iter().for_each(|&(from, to)| runner.copy(from, to));
            return;
        };
        for &(block, slot) in &self.plan.spill {
            match store.put(slot, |out| runner.export(block, out)) {
                true => metrics.spill_stored.inc(),
                false => self.scheduler.not_spilled(slot),
            }
        }
        self.plan.copies.iter().for_each(|&(from, to)| runner.copy(from, to));
        for &fetch in &self.plan.fetch {
            let (slot, block, _) = fetch;
            let worked = store.get(slot, |from| runner.import(block, from));
            metrics.spill_hits.inc_by(u64::from(worked));
            self.scheduler.fetched(fetch, worked);
        }
        self.scheduler.fetching_is_over();
        metrics.spill_evicted.inc_by(self.plan.given_up as u64);
    }

    fn let_go(&mut self) {
        while let Some((key, error)) = self.unfit.pop() {
            let Some(answer) = self.answers[key as usize].take() else { continue };
            self.scheduler.cancel(key);
            if error.is_none() {
                tracing::debug!(request = %answer.request(), "cancelled: the caller went away");
                self.slot.metrics.cancelled.inc();
            }
            self.scribe.end(key, error);
        }
    }

    /// Computes the planned step and draws its tokens, with `clock` to see what a draft model costs; meanwhile the scribe writes those of the step before.
    ///
    /// # Errors
    /// The runner's: nothing of this device can be trusted any more; or nobody writes any more. [`Lane::fail`] is all that
    /// may follow.
    pub fn compute(&mut self, clock: &dyn Fn() -> Instant) -> Result<()> {
        if let Some(drafter) = &mut self.drafter {
            drafter.draft(&mut self.plan, &self.answers, clock)?;
            if !self.plan.passes.is_empty() {
                let took = self.plan.passes.iter().map(|(_, took)| took.as_secs_f64()).sum();
                self.slot.metrics.draft_time.observe(took);
            }
        }
        self.masks.start(&mut self.answers, &self.plan);
        let mut prepare = || self.scheduler.prepare(&self.plan, self.begun, &mut self.next);
        let logits = self.slot.runner.forward(&self.plan.batch, &mut prepare);
        self.masks.join(&mut self.answers);
        let logits = logits?;
        if logits.rows() != self.plan.batch.sample_rows.len() {
            return Err(Error::internal("the runner returned another number of rows than were asked for"));
        }
        debug_assert!(self.next.prepared, "a runner has something done meanwhile");
        let (answers, plan) = (&self.answers, &self.plan);
        self.sampler.pick(logits, |row| {
            let part = plan.sampled[row].part;
            let answer = answers[part.request as usize].as_ref()?;
            let draw = || answer.draw(part.choice, plan.ahead(row));
            Some(plan.given(row).map_or_else(draw, |token| answer.look_up(token)))
        })?;
        if let Some([product, attention, other]) = self.slot.runner.parts()? {
            let metrics = &self.slot.metrics;
            metrics.gpu_product.observe(product);
            metrics.gpu_attention.observe(attention);
            metrics.gpu_other.observe(other);
        }
        self.scribe.join()
    }

    /// Ends a step: complete sequences leave, the scribe gets what there is to tell.
    pub fn deliver(&mut self, now: Instant) {
        self.steps += 1;
        // Whoever hears that its answer is complete may count on the adapter being idle.
        self.plan.batch.adapters.clear();
        self.finish_stopped();
        let metrics = &self.slot.metrics;
        metrics.steps.inc();
        match self.slot.runner.launched() {
            Some(Launched::Replayed) => metrics.graph_replayed.inc(),
            Some(Launched::Ahead) => metrics.graph_ahead.inc(),
            Some(Launched::Noted) => metrics.graph_noted.inc(),
            Some(Launched::Eager) => metrics.graph_eager.inc(),
            None => {}
        }
        let mut row = 0;
        while let Some(first) = self.plan.sampled.get(row) {
            let (part, drafts) = (first.part, self.plan.drafts(row));
            let drawn = &self.sampler.drawn()[row..=row + drafts.len()];
            let given = self.plan.given(row);
            row += drawn.len();
            let Some(answer) = &mut self.answers[part.request as usize] else { continue };
            if let Some(token) = given {
                self.scribe.looked_up(part.request, token, &drawn[0]);
                continue;
            }
            // A stop string had ended it when the row was planned already.
            if answer.is_complete(part.choice) {
                continue;
            }
            metrics.drafted_tokens.inc_by(drafts.len() as u64);
            // Rows behind a draft that did not come true are as if they had not been computed.
            let count = agreed(drafts, drawn.iter().map_while(|drawn| drawn.token));
            for (at, drawn) in drawn[..count].iter().enumerate() {
                let Some(token) = drawn.token else {
                    // Behind drafts it is drawn once more without them, and an error only then.
                    if at == 0 {
                        self.unfit.push((part.request, Some(answer.no_token(part.choice))));
                    }
                    break;
                };
                let full = self.scheduler.push(part.sequence, token) == Pushed::Full;
                let last = answer.accept(part.choice, token, full);
                let drafted = if at == 0 { drafts.len() as u32 } else { 0 };
                let said = Said { token, logprob: drawn.logprob, drafted, accepted: at + 1 < count, last };
                self.scribe.say(part, said, drawn);
                if last != Last::No {
                    self.ended.push(part);
                    // Whatever was drawn behind the end is not part of the answer.
                    break;
                }
            }
        }
        self.scheduler.settle(&self.plan);
        let mut ended = std::mem::take(&mut self.ended);
        ended.drain(..).for_each(|part| self.finish(part, now));
        self.ended = ended;
        self.let_go();
        self.scribe.post(now);
        self.scribe.collect();
        self.finish_stopped();
        self.show();
    }

    /// A choice is complete, and with it its sequence.
    fn finish(&mut self, part: Planned, now: Instant) {
        if self.scheduler.finish(part.sequence)
            && let Some(answer) = self.answers[part.request as usize].take()
        {
            self.pace += PACE_WEIGHT * (answer.service_time(now).as_secs_f64() - self.pace);
        }
    }

    /// The same for choices that were ended by a stop string, as far as the scribe has said so.
    fn finish_stopped(&mut self) {
        while let Some(stopped) = self.scribe.next_stopped() {
            let part = stopped.part;
            // In the meantime its caller may have left, or a token of the same step may have been the last.
            let answer = self.answers[part.request as usize].as_mut();
            let answer = answer.filter(|answer| answer.request() == stopped.request);
            if let Some(answer) = answer.filter(|answer| !answer.is_complete(part.choice)) {
                answer.complete(part.choice);
                self.finish(part, stopped.drawn);
            }
        }
    }

    /// Counts a step's time, from plan to delivery, of which [`Lane::compute`] had `computing`.
    pub fn step_took(&mut self, time: Duration, computing: Duration) {
        self.scheduler.took(&self.plan, time);
        self.slot.metrics.step_time.observe(time.as_secs_f64());
        self.slot.metrics.step_gap.observe(time.saturating_sub(computing).as_secs_f64());
    }

    /// Checks everything that must hold between two steps. For tests, simulations and debug builds.
    ///
    /// # Errors
    /// The first sentence that is not true.
    pub fn check(&self) -> Result<(), String> {
        self.scheduler.check()
    }

    /// What the last [`Lane::plan`] decided.
    pub fn planned(&self) -> &Plan {
        &self.plan
    }

    /// Who waits and who runs.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Ends every request with this error, unless it has its whole answer. Everybody has heard it when this returns.
    pub fn fail(&mut self, error: &Error) {
        for key in 0..self.answers.len() {
            if self.answers[key].take().is_some() {
                self.scheduler.cancel(key as RequestKey);
                self.scribe.end(key as RequestKey, Some(error.clone()));
            }
        }
        self.scribe.post(Instant::now());
        // Whoever is lost with the scribe was told by it.
        let _ = self.scribe.join();
        self.finish_stopped();
        self.show();
    }

    /// Sets the gauges.
    fn show(&self) {
        let (metrics, blocks) = (&self.slot.metrics, self.scheduler.blocks());
        metrics.queue.set(self.scheduler.waiting() as i64);
        metrics.running.set(self.scheduler.running() as i64);
        metrics.kv_used.set(blocks.used() as i64);
        metrics.kv_cached.set(blocks.cached() as i64);
        metrics.spill_used.set(self.scheduler.spilled() as i64);
    }

    /// For dumps.
    pub fn status(&self) -> SlotStatus {
        SlotStatus {
            slot: self.slot.slot,
            model: self.slot.model.clone(),
            retiring: self.retiring,
            waiting: self.scheduler.waiting(),
            running: self.scheduler.running(),
            kv_used: self.scheduler.blocks().used(),
            kv_free: self.scheduler.blocks().free(),
            steps: self.steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{AccountId, DeviceId, ModelId, RequestId};
    use crate::engine::sim::SimRunner;
    use crate::engine::{Logits, Runner, Speculation};
    use crate::kernel::Pool;
    use crate::metrics::Metrics;
    use crate::model::Batch;
    use crate::task::Sampling;

    /// A device whose logits are what a test wants: row by row, by the last token of the prompt.
    struct Scripted {
        logits: Vec<f32>,
        pool: Pool,
        rows_missing: usize,
    }

    impl Runner for Scripted {
        fn blocks(&self) -> usize {
            8
        }
        fn block_tokens(&self) -> usize {
            4
        }
        fn copy(&mut self, _: u32, _: u32) {}
        fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
            meanwhile();
            self.logits.clear();
            for &row in &batch.sample_rows {
                let broken = batch.tokens[row as usize] == 1;
                self.logits.extend([0.0, 0.5, 1.0].map(|logit| if broken { f32::NAN } else { logit }));
            }
            self.logits.truncate(self.logits.len() - 3 * self.rows_missing);
            Ok(Logits::Host { data: &mut self.logits, vocab: 3, pool: &self.pool })
        }
    }

    fn lane(rows_missing: usize) -> Lane {
        Lane::new(ModelSlot {
            slot: SlotId::next(),
            model: ModelId::new("scripted"),
            vocabulary: SimRunner::vocabulary(),
            runner: Box::new(Scripted { logits: Vec::new(), pool: Pool::new(1), rows_missing }),
            context: 100,
            step_tokens: 8,
            prefill_chunk: 8,
            max_running: 2,
            max_queue: 2,
            prefix_cache: true,
            prefill_stretch: 0.0,
            spill: None,
            speculation: Speculation::default(),
            draft: None,
            metrics: Metrics::new().engine(&ModelId::new("scripted"), DeviceId(0)),
        })
    }

    fn submit(lane: &mut Lane, token: u32, max_tokens: u32, now: Instant) -> flume::Receiver<Event> {
        submit_with(lane, token, max_tokens, now, |_| ())
    }

    fn submit_with(
        lane: &mut Lane,
        token: u32,
        max_tokens: u32,
        now: Instant,
        change: impl FnOnce(&mut Submit),
    ) -> flume::Receiver<Event> {
        let (events, receiver) = flume::bounded(Submit::event_capacity(1, max_tokens));
        let mut submit = Submit {
            request: RequestId::random(),
            account: AccountId::new("a"),
            weight: 1,
            slot: lane.id(),
            prompt: vec![token],
            choices: 1,
            max_tokens,
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            seed: 0,
            stop: vec![],
            logprobs: None,
            grammar: None,
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            adapter: None,
            drafts: None,
            expected: vec![],
            deadline: now + Duration::from_secs(9),
            received: now,
            vocabulary: None,
            events,
        };
        change(&mut submit);
        lane.submit(submit, now);
        receiver
    }

    fn last(receiver: &flume::Receiver<Event>) -> Event {
        receiver.try_iter().last().unwrap()
    }

    #[test]
    fn logits_without_a_number_fail_their_request_only() {
        let (mut lane, now) = (lane(0), Instant::now());
        let [broken, whole] = [1, 0].map(|token| submit(&mut lane, token, 2, now));
        for _ in 0..2 {
            assert!(lane.plan(now));
            lane.compute(&Instant::now).unwrap();
            lane.deliver(now);
            lane.check().unwrap();
        }
        assert!(matches!(last(&broken), Event::Failed(error) if error.kind() == Kind::Internal));
        assert!(matches!(last(&whole), Event::Done(usage) if usage.completion_tokens == 2));
        assert!(lane.is_idle() && !lane.plan(now));
    }

    #[test]
    fn a_runner_that_forgets_a_row_is_an_error() {
        let (mut lane, now) = (lane(1), Instant::now());
        let receiver = submit(&mut lane, 0, 2, now);
        assert!(lane.plan(now));
        let error = lane.compute(&Instant::now).unwrap_err();
        lane.fail(&error);
        assert!(matches!(last(&receiver), Event::Failed(_)));
        assert!(lane.is_idle());
        lane.check().unwrap();
    }

    fn step(lane: &mut Lane, now: Instant) -> Result<bool> {
        let planned = lane.plan(now);
        if planned {
            lane.compute(&Instant::now)?;
            lane.deliver(now);
        }
        lane.check().unwrap();
        Ok(planned)
    }

    #[test]
    fn a_caller_that_leaves_is_gone_before_the_next_step() {
        let (mut lane, now) = (lane(0).with_scribe(1), Instant::now());
        let metrics = lane.slot.metrics.clone();
        let (leaves, stays) = (submit(&mut lane, 0, 20, now), submit(&mut lane, 0, 9, now));
        (0..3).for_each(|_| assert!(step(&mut lane, now).unwrap()));
        drop(leaves);
        assert!(step(&mut lane, now).unwrap());
        assert_eq!((metrics.cancelled.get(), lane.scheduler.running()), (1, 1));
        while step(&mut lane, now).unwrap() {}
        assert!(lane.is_idle() && lane.scheduler.blocks().used() == 0);
        assert!(matches!(stays.iter().last(), Some(Event::Done(usage)) if usage.completion_tokens == 9));
    }

    #[test]
    fn an_answer_that_a_stop_string_ended_was_not_left_by_its_caller() {
        let (mut lane, now) = (lane(0).with_scribe(1), Instant::now());
        let metrics = lane.slot.metrics.clone();
        // Greedy says token 2, a control character, time and again.
        let receiver = submit_with(&mut lane, 0, 20, now, |submit| submit.stop = vec!["\u{2}\u{2}\u{2}".to_owned()]);
        let mut steps = 0;
        let mut ended = None;
        while !lane.is_idle() {
            assert!(step(&mut lane, now).unwrap() || lane.is_idle());
            steps += 1;
            if steps == 3 {
                // Heard, and the caller goes, before the lane knows.
                ended = receiver.iter().find(|event| matches!(event, Event::Done(_)));
            }
        }
        assert!(matches!(ended, Some(Event::Done(usage)) if usage.completion_tokens == 3), "{ended:?}");
        assert!((3..=4).contains(&steps), "{steps} steps");
        assert_eq!((metrics.cancelled.get(), metrics.finished_stop.get(), metrics.generation_tokens.get()), (0, 1, 3));
        assert_eq!(lane.scheduler.blocks().used(), 0);
    }

    #[test]
    fn a_scribe_that_dies_ends_every_request_once_and_the_lane() {
        let (mut lane, now) = (lane(0).with_scribe(1), Instant::now());
        let mut receivers: Vec<_> = (0..2).map(|_| submit(&mut lane, 0, 20, now)).collect();
        (0..2).for_each(|_| assert!(step(&mut lane, now).unwrap()));
        // A line that no step writes: there is no such choice.
        let part = Planned { sequence: 0, request: 0, choice: 7 };
        let said = Said { token: 0, logprob: 0.0, drafted: 0, accepted: false, last: Last::No };
        lane.scribe.say(part, said, &crate::engine::sampler::Drawn::default());
        receivers.push(submit(&mut lane, 0, 20, now));
        let error = (0..3).find_map(|_| step(&mut lane, now).err()).expect("the lane must hear of it");
        receivers.push(submit(&mut lane, 0, 20, now));
        lane.fail(&Error::new(Kind::EngineLost, error.to_string()));
        for receiver in receivers {
            let ends: Vec<_> = receiver.iter().filter(|event| !matches!(event, Event::Text { .. })).collect();
            assert!(matches!(&ends[..], [Event::Failed(error)] if error.kind() == Kind::EngineLost), "{ends:?}");
        }
        assert!(lane.is_idle() && lane.scribe.join().is_err());
        lane.check().unwrap();
    }

    #[test]
    fn a_full_queue_says_how_long_to_wait_and_a_retired_lane_where_to_look() {
        let (mut lane, now) = (lane(0), Instant::now());
        let receivers: Vec<_> = (0..3).map(|_| submit(&mut lane, 0, 2, now)).collect();
        assert!(receivers[..2].iter().all(|receiver| receiver.is_empty()));
        let Event::Failed(error) = last(&receivers[2]) else { panic!("taken in") };
        assert_eq!(error.kind(), Kind::Busy);
        assert!((1..=60).contains(&error.retry_after().unwrap().as_secs()));
        lane.retire();
        let Event::Failed(error) = last(&submit(&mut lane, 0, 2, now)) else { panic!("taken in") };
        assert_eq!(error.kind(), Kind::ModelUnavailable);
        assert_eq!((lane.status().waiting, lane.is_idle()), (2, false), "what it has, it finishes");
    }

    #[test]
    fn gauges_and_counters_say_what_is_going_on() {
        let (mut lane, mut now) = (lane(0), Instant::now());
        let metrics = lane.slot.metrics.clone();
        let _receiver = submit(&mut lane, 0, 5, now);
        assert_eq!((metrics.queue.get(), metrics.running.get(), metrics.kv_total.get()), (1, 0, 8));
        for _ in 0..5 {
            assert!(lane.plan(now));
            lane.compute(&Instant::now).unwrap();
            now += Duration::from_millis(10);
            lane.deliver(now);
        }
        assert_eq!(
            (metrics.queue.get(), metrics.running.get(), metrics.kv_used.get(), metrics.kv_cached.get()),
            (0, 0, 0, 1)
        );
        assert_eq!((metrics.prompt_tokens.get(), metrics.generation_tokens.get(), metrics.steps.get()), (1, 5, 5));
        assert_eq!((metrics.ttft.get_sample_count(), metrics.inter_token.get_sample_count()), (1, 4));
        assert!((metrics.inter_token.get_sample_sum() - 0.04).abs() < 1e-9);
        assert_eq!(
            (metrics.requests.get(), metrics.finished_length.get(), metrics.request_time.get_sample_count()),
            (1, 1, 1)
        );
    }
}
