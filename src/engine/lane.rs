//! One installed model at work: its scheduler, its runner, and the answers under way.
//!
//!     submit ──> [ plan(now) ──> compute() ──> deliver(now) ] ──events──> callers
//!                  cancels,       forward,        tokens to text,
//!                  deadlines,     sample          finish, publish blocks
//!                  schedule
//!
//! The three parts of a step are separate and take `now`, so a simulation can drive the real thing from a seed. No
//! threads and no channels but the answers' own; the loop is in `run.rs`.

use std::time::{Duration, Instant};

use crate::base::{Error, Kind, Result, SlotId};
use crate::engine::answer::Answer;
use crate::engine::sampler::Sampler;
use crate::engine::scheduler::{Ask, Limits, Plan, Pushed, Scheduler};
use crate::engine::sequence::RequestKey;
use crate::engine::{ModelSlot, SlotStatus, Submit};
use crate::task::Event;

/// How much the newest request counts in the moving average of how long one takes.
const PACE_WEIGHT: f64 = 0.1;

/// A model slot, installed.
pub struct Lane {
    slot: ModelSlot,
    scheduler: Scheduler,
    sampler: Sampler,
    plan: Plan,
    /// By the scheduler's request key.
    answers: Vec<Option<Answer>>,
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
        };
        let scheduler = Scheduler::new(limits, slot.runner.blocks(), slot.runner.block_tokens());
        slot.metrics.kv_total.set(scheduler.blocks().total() as i64);
        Self {
            slot,
            scheduler,
            sampler: Sampler::default(),
            plan: Plan::default(),
            answers: Vec::new(),
            unfit: Vec::new(),
            steps: 0,
            retiring: false,
            pace: 1.0,
        }
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
        let answer = Answer::new(&submit, vocabulary.clone());
        let ask = Ask {
            account: &submit.account,
            prompt: submit.prompt,
            choices: submit.choices,
            max_tokens: submit.max_tokens,
            priority: submit.priority,
            salt: submit.cache_salt,
        };
        let key = self.scheduler.submit(ask, now).map_err(|error| match error.kind() {
            Kind::Busy => error.with_retry_after(self.expected_wait()),
            _ => error,
        })?;
        let at = key as usize;
        self.answers.resize_with(self.answers.len().max(at + 1), || None);
        self.answers[at] = Some(answer);
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
        self.let_go();
        self.scheduler.plan(now, &mut self.plan);
        let metrics = &self.slot.metrics;
        metrics.preemptions.inc_by(self.plan.preempted as u64);
        for &(key, cached) in &self.plan.begun {
            if let Some(answer) = &mut self.answers[key as usize] {
                answer.begin(cached, now, metrics);
            }
        }
        let rows = self.plan.batch.rows();
        if rows == 0 {
            self.show();
            return false;
        }
        metrics.prompt_tokens.inc_by(self.plan.prompt_rows as u64);
        metrics.step_rows.observe(rows as f64);
        metrics.step_sequences.observe(self.plan.parts.len() as f64);
        true
    }

    fn let_go(&mut self) {
        while let Some((key, error)) = self.unfit.pop() {
            let Some(answer) = self.answers[key as usize].take() else { continue };
            self.scheduler.cancel(key);
            match error {
                Some(error) => answer.fail(error),
                None => {
                    tracing::debug!(request = %answer.request(), "cancelled: the caller went away");
                    self.slot.metrics.cancelled.inc();
                }
            }
        }
    }

    /// Computes the planned step and draws its tokens.
    ///
    /// # Errors
    /// The runner's: nothing of this device can be trusted any more. [`Lane::fail`] is all that may follow.
    pub fn compute(&mut self) -> Result<()> {
        let logits = self.slot.runner.forward(&self.plan.batch)?;
        if logits.data.len() != self.plan.batch.sample_rows.len() * logits.vocab {
            return Err(Error::internal("the runner returned another number of rows than were asked for"));
        }
        let (answers, sampled) = (&self.answers, &self.plan.sampled);
        self.sampler.pick(logits, |row| {
            let part = sampled[row];
            answers[part.request as usize].as_ref().map(|answer| answer.draw(part.choice))
        });
        Ok(())
    }

    /// Ends a step: tokens become text and events, complete sequences leave.
    pub fn deliver(&mut self, now: Instant) {
        self.steps += 1;
        self.scheduler.computed(&self.plan, now);
        let metrics = &self.slot.metrics;
        metrics.steps.inc();
        for (&part, drawn) in self.plan.sampled.iter().zip(self.sampler.drawn()) {
            let Some(answer) = &mut self.answers[part.request as usize] else { continue };
            let Some(token) = drawn.token else {
                let broken = Error::internal("the model's logits hold no number");
                self.unfit.push((part.request, Some(broken)));
                continue;
            };
            metrics.generation_tokens.inc();
            let last = self.scheduler.push(part.sequence, token) == Pushed::Full;
            if !answer.accept(part.choice, token, drawn, last, now, metrics) {
                continue;
            }
            if self.scheduler.finish(part.sequence)
                && let Some(answer) = self.answers[part.request as usize].take()
            {
                self.pace += PACE_WEIGHT * (answer.service_time(now).as_secs_f64() - self.pace);
                answer.done(now, metrics);
            }
        }
        self.let_go();
        self.show();
    }

    /// Counts a step's time, from plan to delivery.
    pub fn step_took(&self, time: Duration) {
        self.slot.metrics.step_time.observe(time.as_secs_f64());
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

    /// Ends every request with this error.
    pub fn fail(&mut self, error: &Error) {
        for key in 0..self.answers.len() {
            if let Some(answer) = self.answers[key].take() {
                self.scheduler.cancel(key as RequestKey);
                answer.fail(error.clone());
            }
        }
        self.show();
    }

    /// Sets the gauges.
    fn show(&self) {
        let (metrics, blocks) = (&self.slot.metrics, self.scheduler.blocks());
        metrics.queue.set(self.scheduler.waiting() as i64);
        metrics.running.set(self.scheduler.running() as i64);
        metrics.kv_used.set(blocks.used() as i64);
        metrics.kv_cached.set(blocks.cached() as i64);
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

/// What a submission hears whose slot is gone or going.
pub fn unavailable() -> Error {
    Error::new(Kind::ModelUnavailable, "This version of the model is being replaced; ask again.")
        .with_retry_after(Duration::from_secs(1))
}
