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
//!
//! A device sees nothing but its own messages, so it can be advanced as far as they are known, on any thread.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::base::{AccountId, Error, Kind};
use crate::engine::scheduler::{Ask, Limits, Plan, Pushed, Scheduler};
use crate::simulate::cost::{Cost, Work};
use crate::simulate::report::Tally;
use crate::simulate::traffic::{self, Piece};

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
    /// It dies.
    Die,
    /// It is back, with an empty pool.
    Renew,
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
    pub prompt: Vec<Piece>,
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
    /// When.
    pub at_ns: u64,
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
    fn end(&self, at_ns: u64, failed: Option<Kind>) -> Outcome {
        let Self { call, produced, cached, last_ns, .. } = *self;
        Outcome { at_ns, call, produced, cached, last_ns, failed }
    }
}

/// What the device is doing until its next turn.
#[derive(Clone, Copy)]
enum Doing {
    Nothing,
    /// A planned step.
    Step,
    /// As many steps like the one before as there are `times`, begun at a time.
    Stretch {
        begun_ns: u64,
        work: Work,
    },
}

/// What a device is made of, each time it is new.
#[derive(Clone)]
pub struct Make {
    /// What its scheduler is allowed.
    pub limits: Limits,
    /// Blocks of its pool, and tokens in a block.
    pub blocks: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// What a step takes.
    pub cost: Cost,
    /// Whether stretches of equal steps are computed at once.
    pub coasts: bool,
    /// Check the books each so many steps; 0 never.
    pub check_every: u64,
}

/// A device of the fleet.
pub struct Device {
    make: Make,
    scheduler: Scheduler,
    plan: Plan,
    flights: Vec<Option<Flight>>,
    /// Messages on their way, in order of time.
    post: VecDeque<(u64, Message)>,
    /// Messages that have come, but were not looked at.
    inbox: Vec<Message>,
    doing: Doing,
    /// How long the planned step takes.
    step_time_ns: u64,
    /// How long each step of a stretch takes.
    times: Vec<u64>,
    slow: f64,
    /// The scheduler's clock at time 0.
    epoch: Instant,
    /// When it wants its turn.
    next_ns: u64,
    /// Waiting and running, as `Lane::show` would tell.
    load: (u64, u64),
    /// What has ended since it was last asked, in order of time.
    ended: Vec<Outcome>,
    /// Time spent computing.
    pub busy_ns: u64,
    unchecked: u64,
}

/// There is nothing to do until somebody comes.
pub const NEVER: u64 = u64::MAX;

impl Device {
    /// An idle device with an empty pool.
    pub fn new(make: Make) -> Self {
        Self {
            scheduler: scheduler(&make),
            make,
            plan: Plan::default(),
            flights: Vec::new(),
            post: VecDeque::new(),
            inbox: Vec::new(),
            doing: Doing::Nothing,
            step_time_ns: 0,
            times: Vec::new(),
            slow: 1.0,
            epoch: Instant::now(),
            next_ns: NEVER,
            load: (0, 0),
            ended: Vec::new(),
            busy_ns: 0,
            unchecked: 0,
        }
    }

    /// Sends a message, which arrives at `at_ns`: not before the last one, and not before a time it was advanced to.
    pub fn tell(&mut self, message: Message, at_ns: u64) {
        debug_assert!(self.post.back().is_none_or(|&(last_ns, _)| last_ns <= at_ns), "messages keep their order");
        self.post.push_back((at_ns, message));
    }

    /// When something happens here next.
    pub fn due_ns(&self) -> u64 {
        self.post.front().map_or(NEVER, |&(at_ns, _)| at_ns).min(self.next_ns)
    }

    /// Waiting and running, as the router sees them: what was sent here and is not looked at yet counts as running.
    pub fn load(&self) -> (u64, u64) {
        let coming = self.inbox.iter().filter(|message| matches!(message, Message::Submit(_))).count();
        (self.load.0, self.load.1 + coming as u64)
    }

    /// What has ended since the last call, in order of time.
    pub fn ended(&mut self) -> impl Iterator<Item = Outcome> {
        self.ended.drain(..)
    }

    /// Does everything that happens here before `until_ns`. At equal times messages go before the device's own turn.
    ///
    /// # Errors
    /// The first invariant that does not hold, with the time.
    pub fn advance(&mut self, until_ns: u64, tally: &mut Tally) -> Result<(), (u64, String)> {
        loop {
            let due_ns = self.due_ns();
            if due_ns >= until_ns {
                return Ok(());
            }
            let comes = self.post.front().is_some_and(|&(at_ns, _)| at_ns == due_ns);
            let done = match if comes { self.post.pop_front() } else { None } {
                Some((at_ns, message)) => self.receive(message, at_ns, tally),
                None => self.turn(tally),
            };
            done.map_err(|broken| (due_ns, broken))?;
        }
    }

    /// Puts a message into the inbox; it is looked at when the step under way has ended.
    fn receive(&mut self, message: Message, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        match message {
            Message::Die => return self.die(now_ns, tally),
            Message::Renew => {
                (self.scheduler, self.slow) = (scheduler(&self.make), 1.0);
                return Ok(());
            }
            message => self.inbox.push(message),
        }
        match self.doing {
            Doing::Nothing => self.next_ns = now_ns,
            Doing::Step => {}
            Doing::Stretch { begun_ns, .. } => {
                let (mut end_ns, mut done) = (begun_ns, 0);
                while done < self.times.len() && end_ns < now_ns {
                    end_ns += self.times[done];
                    done += 1;
                }
                self.times.truncate(done);
                self.next_ns = end_ns;
            }
        }
        Ok(())
    }

    fn step_ns(&self, work: Work) -> u64 {
        let time = self.make.cost.step_ns(work);
        if self.slow == 1.0 { time } else { (time as f64 * self.slow) as u64 }
    }

    fn at(&self, ns: u64) -> Instant {
        self.epoch + Duration::from_nanos(ns)
    }

    /// Does what is due at `next_ns` and says when it wants to be called again by setting it.
    fn turn(&mut self, tally: &mut Tally) -> Result<(), String> {
        let now_ns = self.next_ns;
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => {}
            Doing::Step => self.deliver(now_ns, tally)?,
            Doing::Stretch { begun_ns, work } => self.coast(begun_ns, work, now_ns, tally)?,
        }
        if let Doing::Stretch { .. } = self.doing {
            return Ok(());
        }
        let mut inbox = std::mem::take(&mut self.inbox);
        for message in inbox.drain(..) {
            match message {
                Message::Submit(submission) => self.submit(*submission, now_ns),
                Message::Cancel(call) => self.cancel(call, now_ns),
                Message::Slow(factor) => self.slow = factor,
                Message::Die | Message::Renew => return Err("a device looks at its own death".into()),
            }
        }
        self.inbox = inbox;
        self.plan(now_ns, tally)
    }

    fn submit(&mut self, submission: Submission, now_ns: u64) {
        let Submission { call, account, account_at, prompt, answer, output, max_tokens, priority, salt, received_ns } =
            submission;
        let prompt = traffic::tokens(&prompt);
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
            Err(error) => self.ended.push(flight.end(now_ns, Some(Error::kind(&error)))),
        }
        self.show();
    }

    fn cancel(&mut self, call: CallKey, now_ns: u64) {
        let is_this = |flight: &Option<Flight>| flight.as_ref().is_some_and(|flight| flight.call == call);
        // It may have ended in the step that was under way.
        let Some(key) = self.flights.iter().position(is_this) else { return };
        if let Some(flight) = self.flights[key].take() {
            self.scheduler.cancel(key as u32);
            self.ended.push(flight.end(now_ns, None));
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
    fn deliver(&mut self, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
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
                self.ended.push(flight.end(now_ns, None));
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
        if !self.make.coasts || !self.inbox.is_empty() || going != self.scheduler.running() as u64 {
            return Ok(());
        }
        let steps = self.scheduler.steady(longest);
        if steps > 0 {
            let work = Work::decode(going, context);
            let mut times = std::mem::take(&mut self.times);
            times.clear();
            times.extend((0..steps).map(|step| self.step_ns(later(work, step))));
            self.times = times;
            self.doing = Doing::Stretch { begun_ns: now_ns, work };
            self.next_ns = now_ns + self.times.iter().sum::<u64>();
        }
        Ok(())
    }

    /// The stretch under way has ended, or was cut.
    fn coast(&mut self, begun_ns: u64, work: Work, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        let (times, steps) = (&self.times, self.times.len());
        tally.stretch(begun_ns, times, work.drawn);
        let end_ns = begun_ns + times.iter().sum::<u64>();
        if end_ns != now_ns {
            return Err(format!("a stretch ended at {end_ns} ns, not at {now_ns}"));
        }
        self.busy_ns += now_ns - begun_ns;
        let flights = &self.flights;
        let token =
            |request: u32, at: usize| flights[request as usize].as_ref().map_or(0, |flight| flight.answer.token(at));
        self.scheduler.coast(steps, token, |step| Duration::from_nanos(times[step]));
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
        if self.make.check_every == 0 || self.unchecked < self.make.check_every {
            return Ok(());
        }
        self.unchecked = 0;
        self.scheduler.check()
    }

    /// As `Lane::show`: from now on others see this load.
    fn show(&mut self) {
        self.load = (self.scheduler.waiting() as u64, self.scheduler.running() as u64);
    }

    /// The device is dead: everything on it and on its way to it is lost. What was produced before is told. Its load is
    /// what it told last, since the dead tell nothing.
    fn die(&mut self, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        self.cut(now_ns, tally)?;
        let failed = Some(Kind::EngineLost);
        for (key, slot) in self.flights.iter_mut().enumerate() {
            if let Some(flight) = slot.take() {
                self.scheduler.cancel(key as u32);
                self.ended.push(flight.end(now_ns, failed));
            }
        }
        for message in self.inbox.drain(..) {
            if let Message::Submit(lost) = message {
                let (call, last_ns) = (lost.call, lost.received_ns);
                self.ended.push(Outcome { at_ns: now_ns, call, produced: 0, cached: 0, last_ns, failed });
            }
        }
        self.doing = Doing::Nothing;
        self.next_ns = NEVER;
        self.is_empty()
    }

    /// Applies the steps of a stretch that ended before `now_ns`: their tokens were heard.
    fn cut(&mut self, now_ns: u64, tally: &mut Tally) -> Result<(), String> {
        let Doing::Stretch { begun_ns, work } = self.doing else { return Ok(()) };
        let (mut end_ns, mut done) = (begun_ns, 0);
        while let Some(&time) = self.times.get(done) {
            // What happens at the end of a step happens before it.
            if end_ns + time >= now_ns {
                tally.step(end_ns, time, 0, &later(work, done));
                self.busy_ns += time;
                break;
            }
            (end_ns, done) = (end_ns + time, done + 1);
        }
        self.times.truncate(done);
        self.coast(begun_ns, work, end_ns, tally)
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

fn scheduler(make: &Make) -> Scheduler {
    let mut scheduler = Scheduler::new(make.limits.clone(), make.blocks, make.block_tokens);
    // No caller here tries to make two prompts of one name.
    scheduler.name_quickly();
    scheduler
}

/// The work of a decode step, `steps` steps later: every sequence is that much longer.
fn later(work: Work, steps: usize) -> Work {
    Work::decode(work.rows, work.context + work.rows * steps as u64)
}
