//! One device: the real scheduler and block manager, and a clock in the place of a runner.
//!
//! ```text
//! inbox ──> plan ──> (the step's time passes) ──> computed, tokens pushed ──> plan …
//!                                                       '── steady ──> coast over many steps at once
//! ```
//!
//! What `run.rs` and `lane.rs` do, with every wait replaced by a number: messages are looked at between two steps, a
//! token is heard when its step ends, the load is told when `Lane::show` would tell it. A message that arrives in a
//! stretch cuts it at the end of the step that is then under way, so stretches change nothing but the time it takes.

use std::time::{Duration, Instant};

use crate::base::{AccountId, Error, Kind};
use crate::engine::scheduler::{Ask, Limits, Plan, Pushed, Scheduler};
use crate::simulate::cost::{Cost, Work};
use crate::simulate::report::Tally;
use crate::simulate::traffic::Piece;

/// A call, as the world knows it.
pub type CallKey = u32;

/// A message to a device.
pub enum Message {
    /// A request.
    Submit(Box<Submission>),
    /// Its caller is gone, or its deadline has passed.
    Cancel(CallKey),
    /// From now on a step takes so many times as long.
    Slow(f64),
}

/// A request on its way to a device.
pub struct Submission {
    /// Whose.
    pub call: CallKey,
    /// Who is served, and where that is counted.
    pub account: AccountId,
    /// Index of the account.
    pub account_at: u32,
    /// What is asked.
    pub prompt: Vec<u32>,
    /// Where the answer's tokens come from.
    pub answer: Piece,
    /// Tokens after which the model ends it.
    pub output: u32,
    /// Most tokens.
    pub max_tokens: u32,
    /// Higher is served first.
    pub priority: i8,
    /// Prefixes are shared under equal salts.
    pub salt: u64,
    /// When the call came in.
    pub received_ns: u64,
}

/// What became of a call on this device.
pub struct Outcome {
    /// Whose.
    pub call: CallKey,
    /// Tokens that its caller got.
    pub produced: u32,
    /// Prompt tokens found in the prefix cache.
    pub cached: u32,
    /// When the last of them came; when it was asked for, if none did.
    pub last_ns: u64,
    /// Why it failed, if it did. A cancelled call has no error and may be incomplete.
    pub failed: Option<Kind>,
}

struct Flight {
    call: CallKey,
    account: u32,
    answer: Piece,
    output: u32,
    produced: u32,
    cached: u32,
    prompt: u32,
    /// Tokens that were computed once.
    reached: u32,
    received_ns: u64,
    /// When its last token was heard.
    last_ns: u64,
}

impl Flight {
    fn end(&self, failed: Option<Kind>) -> Outcome {
        let Self { call, produced, cached, last_ns, .. } = *self;
        Outcome { call, produced, cached, last_ns, failed }
    }
}

/// What the device is doing until its next turn.
#[derive(Clone, Copy)]
enum Doing {
    Nothing,
    /// A planned step.
    Step,
    /// So many steps like the one before, begun at a time.
    Stretch {
        begun_ns: u64,
        steps: usize,
        work: Work,
    },
}

/// A device of the fleet.
pub struct Device {
    scheduler: Scheduler,
    plan: Plan,
    flights: Vec<Option<Flight>>,
    inbox: Vec<Message>,
    doing: Doing,
    /// How long the planned step takes.
    step_time_ns: u64,
    cost: Cost,
    slow: f64,
    coasts: bool,
    /// The scheduler's clock at time 0.
    epoch: Instant,
    /// When it wants its turn.
    pub next_ns: u64,
    /// Waiting and running, as the router sees them.
    pub load: (u64, u64),
    /// Time spent computing.
    pub busy_ns: u64,
    /// Steps computed.
    pub steps: u64,
    /// Check the books each so many steps; 0 never.
    check_every: u64,
    unchecked: u64,
}

/// There is nothing to do until somebody comes.
pub const NEVER: u64 = u64::MAX;

impl Device {
    /// An idle device with an empty pool.
    pub fn new(limits: Limits, cost: Cost, blocks: usize, block_tokens: usize, coasts: bool, check_every: u64) -> Self {
        Self {
            scheduler: Scheduler::new(limits, blocks, block_tokens),
            plan: Plan::default(),
            flights: Vec::new(),
            inbox: Vec::new(),
            doing: Doing::Nothing,
            step_time_ns: 0,
            cost,
            slow: 1.0,
            coasts,
            epoch: Instant::now(),
            next_ns: NEVER,
            load: (0, 0),
            busy_ns: 0,
            steps: 0,
            check_every,
            unchecked: 0,
        }
    }

    /// Puts a message into the inbox; it is looked at when the step under way has ended.
    pub fn tell(&mut self, message: Message, now_ns: u64) {
        self.inbox.push(message);
        match self.doing {
            Doing::Nothing => self.next_ns = now_ns,
            Doing::Step => {}
            Doing::Stretch { begun_ns, steps, work } => {
                let (mut end_ns, mut done) = (begun_ns, 0);
                while done < steps && end_ns < now_ns {
                    end_ns += self.step_ns(later(work, done));
                    done += 1;
                }
                self.doing = Doing::Stretch { begun_ns, steps: done, work };
                self.next_ns = end_ns;
            }
        }
    }

    fn step_ns(&self, work: Work) -> u64 {
        step_ns(&self.cost, self.slow, work)
    }

    fn at(&self, ns: u64) -> Instant {
        self.epoch + Duration::from_nanos(ns)
    }

    /// Does what is due at `next_ns` and says when it wants to be called again by setting it.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn turn(&mut self, tally: &mut Tally, ended: &mut Vec<Outcome>) -> Result<(), String> {
        let now_ns = self.next_ns;
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => {}
            Doing::Step => self.deliver(now_ns, tally, ended)?,
            Doing::Stretch { begun_ns, steps, work } => self.coast(begun_ns, steps, work, now_ns, tally)?,
        }
        if let Doing::Stretch { .. } = self.doing {
            return Ok(());
        }
        let mut inbox = std::mem::take(&mut self.inbox);
        for message in inbox.drain(..) {
            match message {
                Message::Submit(submission) => self.submit(*submission, now_ns, ended),
                Message::Cancel(call) => self.cancel(call, ended),
                Message::Slow(factor) => self.slow = factor,
            }
        }
        self.inbox = inbox;
        self.plan(now_ns, tally)
    }

    fn submit(&mut self, submission: Submission, now_ns: u64, ended: &mut Vec<Outcome>) {
        let Submission { call, account, account_at, prompt, answer, output, max_tokens, priority, salt, received_ns } =
            submission;
        let prompt_tokens = prompt.len() as u32;
        let ask = Ask {
            account: &account,
            weight: 1,
            prompt,
            choices: 1,
            max_tokens,
            priority,
            salt,
            adapter: None,
            scored: false,
            drafts: None,
            expected: vec![],
        };
        let flight = Flight {
            call,
            account: account_at,
            answer,
            output: output.min(max_tokens),
            produced: 0,
            cached: 0,
            prompt: prompt_tokens,
            reached: 0,
            received_ns,
            last_ns: received_ns,
        };
        match self.scheduler.submit(ask, self.at(now_ns)) {
            Ok(key) => {
                let at = key as usize;
                self.flights.resize_with(self.flights.len().max(at + 1), || None);
                self.flights[at] = Some(flight);
            }
            Err(error) => ended.push(flight.end(Some(Error::kind(&error)))),
        }
        self.show();
    }

    fn cancel(&mut self, call: CallKey, ended: &mut Vec<Outcome>) {
        let is_this = |flight: &Option<Flight>| flight.as_ref().is_some_and(|flight| flight.call == call);
        // It may have ended in the step that was under way.
        let Some(key) = self.flights.iter().position(is_this) else { return };
        if let Some(flight) = self.flights[key].take() {
            self.scheduler.cancel(key as u32);
            ended.push(flight.end(None));
        }
    }

    fn plan(&mut self, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        self.scheduler.plan(self.at(now_ns), &mut self.plan);
        tally.planned(&self.plan);
        for &(key, cached) in &self.plan.begun {
            let Some(flight) = self.flights.get_mut(key as usize).and_then(Option::as_mut) else {
                return Err(format!("request {key} begins, but nobody asked for it"));
            };
            flight.cached = cached as u32;
            tally.begins(now_ns - flight.received_ns, flight.prompt.into(), cached as u64);
        }
        if self.plan.batch.rows() == 0 {
            self.next_ns = NEVER;
            self.show();
            return match self.scheduler.is_idle() {
                true => Ok(()),
                false => Err("nothing was planned, but somebody waits".into()),
            };
        }
        let mut work = Work { drawn: self.plan.sampled.len() as u64, ..Work::default() };
        for (part, span) in self.plan.parts.iter().zip(&self.plan.batch.spans) {
            work.add(span.start.into(), span.rows.into());
            let Some(flight) = &mut self.flights[part.request as usize] else {
                return Err(format!("request {} is computed, but is gone", part.request));
            };
            let end = span.start + span.rows;
            tally.recomputed(u64::from(end.min(flight.reached).saturating_sub(span.start)));
            flight.reached = flight.reached.max(end);
        }
        let time = self.step_ns(work);
        self.doing = Doing::Step;
        self.step_time_ns = time;
        self.next_ns = now_ns + time;
        self.busy_ns += time;
        tally.step(now_ns, time, self.plan.prompt_rows, &work);
        Ok(())
    }

    /// The step under way has ended.
    fn deliver(&mut self, now_ns: u64, tally: &mut Tally, ended: &mut Vec<Outcome>) -> Result<(), String> {
        self.steps += 1;
        self.scheduler.computed(&self.plan, self.at(now_ns));
        let mut context = 0;
        let (mut longest, mut going) = (usize::MAX, 0);
        for part in self.plan.sampled.iter().map(|row| row.part) {
            let slot = &mut self.flights[part.request as usize];
            let Some(flight) = slot.as_mut() else {
                return Err(format!("request {} gets a token, but is gone", part.request));
            };
            let token = flight.answer.token(flight.produced as usize);
            let full = self.scheduler.push(part.sequence, token) == Pushed::Full;
            if flight.produced == 0 {
                tally.first_token(now_ns, flight.account, now_ns - flight.received_ns);
            } else {
                tally.next_tokens(now_ns, now_ns - flight.last_ns, 1);
            }
            tally.tokens(flight.account, 1);
            flight.produced += 1;
            flight.last_ns = now_ns;
            if flight.produced > flight.output {
                return Err(format!("request {} got {} tokens of {}", part.request, flight.produced, flight.output));
            }
            if full || flight.produced == flight.output {
                ended.push(flight.end(None));
                *slot = None;
                if !self.scheduler.finish(part.sequence) {
                    return Err(format!("request {} has ended, but is not gone", part.request));
                }
                continue;
            }
            going += 1;
            longest = longest.min((flight.output - flight.produced) as usize - 1);
            context += self.scheduler.sequence(part.sequence).map_or(0, |sequence| sequence.tokens.len() as u64);
        }
        self.scheduler.took(&self.plan, Duration::from_nanos(self.step_time_ns));
        self.show();
        self.check(1)?;
        // Who runs and had no row in this step has no token that the next one could follow in time.
        if !self.coasts || !self.inbox.is_empty() || going != self.scheduler.running() as u64 {
            return Ok(());
        }
        let steps = self.scheduler.steady(longest);
        if steps > 0 {
            let work = Work::decode(going, context);
            self.doing = Doing::Stretch { begun_ns: now_ns, steps, work };
            self.next_ns = (0..steps).fold(now_ns, |end, step| end + self.step_ns(later(work, step)));
        }
        Ok(())
    }

    /// The stretch under way has ended, or was cut.
    fn coast(&mut self, begun_ns: u64, steps: usize, work: Work, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        let mut end_ns = begun_ns;
        for step in 0..steps {
            let work = later(work, step);
            let time = self.step_ns(work);
            tally.step(end_ns, time, 0, &work);
            end_ns += time;
            tally.next_tokens(end_ns, time, work.drawn);
        }
        if end_ns != now_ns {
            return Err(format!("a stretch ended at {end_ns} ns, not at {now_ns}"));
        }
        self.steps += steps as u64;
        self.busy_ns += now_ns - begun_ns;
        let flights = &self.flights;
        let token =
            |request: u32, at: usize| flights[request as usize].as_ref().map_or(0, |flight| flight.answer.token(at));
        let (cost, slow) = (self.cost, self.slow);
        let took = |step: usize| Duration::from_nanos(step_ns(&cost, slow, later(work, step)));
        self.scheduler.coast(steps, token, took);
        for flight in self.plan.sampled.iter().map(|row| row.part.request as usize) {
            let Some(flight) = self.flights[flight].as_mut() else { continue };
            if flight.last_ns != begun_ns {
                return Err(format!("call {} had no token when its stretch began", flight.call));
            }
            flight.produced += steps as u32;
            flight.reached += steps as u32;
            flight.last_ns = now_ns;
            tally.tokens(flight.account, steps as u64);
        }
        self.check(steps as u64)
    }

    fn check(&mut self, steps: u64) -> Result<(), String> {
        self.unchecked += steps;
        if self.check_every == 0 || self.unchecked < self.check_every {
            return Ok(());
        }
        self.unchecked = 0;
        self.scheduler.check()
    }

    /// As `Lane::show`: from now on the router sees this load.
    fn show(&mut self) {
        self.load = (self.scheduler.waiting() as u64, self.scheduler.running() as u64);
    }

    /// The device is dead: everything on it and on its way to it is lost. What was produced before is told.
    pub fn die(&mut self, ended: &mut Vec<Outcome>, tally: &mut Tally, now_ns: u64) -> Result<(), String> {
        self.cut(now_ns, tally)?;
        let failed = Some(Kind::EngineLost);
        for (key, slot) in self.flights.iter_mut().enumerate() {
            if let Some(flight) = slot.take() {
                self.scheduler.cancel(key as u32);
                ended.push(flight.end(failed));
            }
        }
        for message in self.inbox.drain(..) {
            if let Message::Submit(lost) = message {
                ended.push(Outcome { call: lost.call, produced: 0, cached: 0, last_ns: lost.received_ns, failed });
            }
        }
        self.doing = Doing::Nothing;
        self.next_ns = NEVER;
        self.show();
        self.is_empty()
    }

    /// Applies the steps of a stretch that ended before `now_ns`: their tokens were heard.
    fn cut(&mut self, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        let Doing::Stretch { begun_ns, steps, work } = self.doing else { return Ok(()) };
        let (mut end_ns, mut done) = (begun_ns, 0);
        while done < steps {
            let time = self.step_ns(later(work, done));
            // What happens at the end of a step happens before it.
            if end_ns + time >= now_ns {
                tally.step(end_ns, time, 0, &later(work, done));
                self.busy_ns += time;
                break;
            }
            (end_ns, done) = (end_ns + time, done + 1);
        }
        self.coast(begun_ns, done, work, end_ns, tally)
    }

    /// Nothing is left behind.
    ///
    /// # Errors
    /// What is left, or what is wrong with the books.
    pub fn is_empty(&self) -> Result<(), String> {
        let scheduler = &self.scheduler;
        let (used, waiting, running) = (scheduler.blocks().used(), scheduler.waiting(), scheduler.running());
        if (used, waiting, running) != (0, 0, 0) || self.flights.iter().any(Option::is_some) {
            return Err(format!("{used} blocks used, {waiting} waiting, {running} running at the end"));
        }
        scheduler.check()
    }
}

fn step_ns(cost: &Cost, slow: f64, work: Work) -> u64 {
    let time = cost.step_ns(work);
    if slow == 1.0 { time } else { (time as f64 * slow) as u64 }
}

/// The work of a decode step, `steps` steps later: every sequence is that much longer.
fn later(work: Work, steps: usize) -> Work {
    Work::decode(work.rows, work.context + work.rows * steps as u64)
}
