//! Everything around the devices: callers, the router, the ledger, and what goes wrong.
//!
//! ```text
//! tick   the world: who asks, leaves, is late, dies     messages with their times ──┐
//!        the devices, each for itself, on all threads   <───────────────────────────┘ ──> what ended, and its time ──┐
//!        the world hears: charges, goes on, routes again; sees the loads   <─────────────────────────────────────────┘
//! tick   …
//! ```
//!
//! Within a tick nobody needs to know what happens elsewhere in it: callers act on answers of earlier ticks, and the
//! router on loads of the last one and on what it has sent since. Everything keeps its own time to the nanosecond; at
//! equal times the world goes before the devices. So neither the order in which devices have their turns nor the number
//! of threads can be seen from outside.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::{AccountId, DeviceId, Error, Kind, Millis, Neurons, RequestId, Result};
use crate::gateway::route::{self, Candidate};
use crate::kernel::Pool;
use crate::ledger::{Book, Claim, Open, Plan, Spent};
use crate::simulate::Setup;
use crate::simulate::device::{CallKey, Device, Make, Message, NEVER, Outcome, Submission};
use crate::simulate::report::{Lack, Report, Tally};
use crate::simulate::rng::Rng;
use crate::simulate::traffic::{self, Made, Request, Source};
use crate::task::Usage;

/// How long a dead device is still listed: the supervisor's tick.
const NOTICED_NS: u64 = 250_000_000;
/// How long a client that was refused waits.
const AFTER_FAILURE_NS: u64 = 1_000_000_000;
/// A tick: how old the loads are at most that the router sees, and the shortest time from an answer to what follows it.
const TICK_NS: u64 = 100_000_000;
/// With callers that ask again at once: as long as an answer and a question are under way.
const SHORT_TICK_NS: u64 = 1_000_000;
/// Fewer devices than this have had their turns before another thread has woken up.
const WORTH_WAKING: usize = 4;
/// Ticks between two reports of progress.
const PROGRESS_EVERY: u64 = 2_000;

/// Streams of the seed.
const FAULTS: u64 = 11;
const VANISHING: u64 = 12;

struct Call {
    /// Counts up: tells a call from an earlier one under the same key.
    number: u64,
    request: Request,
    prompt_tokens: u32,
    max_tokens: u32,
    attempts: usize,
    device: usize,
    /// When its caller went away.
    left_ns: Option<u64>,
    /// When its time was over.
    late_ns: Option<u64>,
    /// What it holds of its account.
    held: Option<Open>,
}

/// A call among those that have had its key.
type CallName = (CallKey, u64);

enum Event {
    Ask(Box<Request>),
    Leave(CallName),
    Die(usize),
    /// The fleet learns that a device is dead.
    Unlist(usize),
    Repaired(usize),
    Slow(usize),
    Fast(usize),
}

/// An event in line: by time, and among equals in the order in which they were planned.
struct Entry {
    at_ns: u64,
    planned: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at_ns, self.planned).cmp(&(other.at_ns, other.planned))
    }
}

/// What the world knows of a device.
struct Seat {
    alive: bool,
    listed: bool,
    faults: Rng,
    /// Waiting and running when it was last looked at, and what was sent since.
    load: (u64, u64),
}

/// A fleet and its callers.
pub struct World<'a> {
    setup: &'a Setup,
    end_ns: u64,
    timeout_ns: u64,
    source: Source,
    upcoming: Option<Request>,
    seats: Vec<Seat>,
    /// Whoever advances one holds it; nobody ever waits for another.
    devices: Vec<Mutex<Device>>,
    /// When something happens next on each device.
    due: Vec<u64>,
    /// Devices on which something happens in this tick.
    turns: Vec<usize>,
    threads: Pool,
    tick_ns: u64,
    candidates: Vec<Candidate>,
    calls: Vec<Option<Call>>,
    vacant: Vec<CallKey>,
    open: u64,
    events: BinaryHeap<Reverse<Entry>>,
    planned: u64,
    /// When calls are late, in order of time, as far as they may still be open.
    deadlines: VecDeque<(u64, CallName)>,
    /// Events that will bring another request.
    to_come: u64,
    accounts: Vec<(AccountId, u64)>,
    /// No gateway: calls go to the engine.
    gateway: Arc<str>,
    book: Book,
    tally: Tally,
    /// Those that threads count with while they have a device: as many as ever counted at the same time.
    tallies: Mutex<Vec<Tally>>,
    ended: Vec<Outcome>,
    now_ns: u64,
    last_end_ns: u64,
    vanishing: Rng,
}

impl<'a> World<'a> {
    /// Before the first request.
    pub fn new(setup: &'a Setup) -> Self {
        let source = match &setup.trace {
            Some(trace) => Source::Trace { trace: trace.clone(), sent: 0 },
            None => {
                let context = setup.engine.context as u32;
                Source::Made(Box::new(Made::new(&setup.shape, setup.seed, setup.duration_s, context)))
            }
        };
        let duration_ns = match &setup.trace {
            Some(trace) => trace.requests.last().map_or(1, |last| last.at_ns + 1),
            None => (setup.duration_s * 1e9) as u64,
        };
        let accounts = source.accounts();
        let seat = |at| {
            let faults = Rng::stream(setup.seed ^ FAULTS, at);
            Seat { alive: true, listed: true, faults, load: (0, 0) }
        };
        let make = Make {
            limits: setup.engine.limits(),
            blocks: setup.blocks(),
            block_tokens: setup.engine.block_tokens,
            cost: setup.cost,
            coasts: setup.coasts,
            check_every: setup.check_every as u64,
        };
        Self {
            setup,
            end_ns: duration_ns,
            timeout_ns: (setup.request_timeout_s * 1e9) as u64,
            source,
            upcoming: None,
            seats: (0..setup.devices as u64).map(seat).collect(),
            devices: (0..setup.devices).map(|_| Mutex::new(Device::new(make.clone()))).collect(),
            due: vec![NEVER; setup.devices],
            turns: Vec::with_capacity(setup.devices),
            threads: Pool::new(setup.threads.clamp(1, setup.devices)),
            tick_ns: if setup.shape.clients > 0 { SHORT_TICK_NS } else { TICK_NS },
            candidates: Vec::with_capacity(setup.devices),
            calls: Vec::new(),
            vacant: Vec::new(),
            open: 0,
            events: BinaryHeap::new(),
            planned: 0,
            deadlines: VecDeque::new(),
            to_come: 0,
            tally: Tally::new(accounts.clone(), duration_ns),
            tallies: Mutex::default(),
            accounts: accounts
                .iter()
                .map(|name| {
                    let account = AccountId::new(name);
                    let salt = route::cache_salt(&account);
                    (account, salt)
                })
                .collect(),
            gateway: "".into(),
            book: Book::new(1),
            ended: Vec::new(),
            now_ns: 0,
            last_end_ns: 0,
            vanishing: Rng::stream(setup.seed, VANISHING),
        }
    }

    /// From the first request to the last answer.
    pub fn run(mut self, progress: &mut dyn FnMut(f64)) -> Result<Report> {
        self.upcoming = self.source.next_request();
        for at in 0..self.seats.len() {
            self.plan_fault(at, self.setup.faults.death_every_s, Event::Die(at));
            self.plan_fault(at, self.setup.faults.slow_every_s, Event::Slow(at));
        }
        let mut ticks = 0u64;
        while self.upcoming.is_some() || self.open > 0 || self.to_come > 0 {
            if ticks.is_multiple_of(PROGRESS_EVERY) {
                progress((self.now_ns as f64 / self.end_ns as f64).min(1.0));
            }
            ticks += 1;
            self.tick().map_err(|broken| {
                let (seconds, seed) = (self.now_ns as f64 / 1e9, self.setup.seed);
                Error::internal(format!("seed {seed} at {seconds:.6} s: {broken}"))
            })?;
        }
        for tally in self.tallies.get_mut().drain(..) {
            self.tally.absorb(&tally);
        }
        self.finish().map_err(|broken| Error::internal(format!("seed {} at the end: {broken}", self.setup.seed)))?;
        Ok(self.report())
    }

    /// The next tick in which anything happens.
    fn tick(&mut self) -> Result<(), String> {
        let next_ns = self.due.iter().copied().min().unwrap_or(NEVER).min(self.due_ns());
        if next_ns == NEVER {
            return Err(format!("{} calls are open, but nobody works on them", self.open));
        }
        if next_ns < self.now_ns {
            return Err(format!("time went back to {next_ns} ns"));
        }
        let until_ns = (next_ns / self.tick_ns + 1) * self.tick_ns;
        loop {
            let next_ns = self.due_ns();
            if next_ns >= until_ns {
                break;
            }
            self.now_ns = next_ns;
            self.next_event()?;
        }
        self.advance(until_ns)?;
        self.now_ns = until_ns;
        let mut ended = std::mem::take(&mut self.ended);
        for outcome in ended.drain(..) {
            self.hear(outcome)?;
        }
        self.ended = ended;
        Ok(())
    }

    /// When something happens in the world next.
    fn due_ns(&self) -> u64 {
        let request_ns = self.upcoming.as_ref().map_or(NEVER, |request| request.at_ns);
        let event_ns = self.events.peek().map_or(NEVER, |Reverse(entry)| entry.at_ns);
        let deadline_ns = self.deadlines.front().map_or(NEVER, |&(at_ns, _)| at_ns);
        request_ns.min(event_ns).min(deadline_ns)
    }

    /// What happens in the world now.
    fn next_event(&mut self) -> Result<(), String> {
        let now_ns = self.now_ns;
        if let Some(&(at_ns, name)) = self.deadlines.front()
            && at_ns == now_ns
        {
            self.deadlines.pop_front();
            if let Some(call) = self.call(name) {
                call.late_ns = Some(now_ns);
                let device = call.device;
                self.tell(device, Message::Cancel(name.0));
            }
        } else if self.events.peek().is_some_and(|Reverse(entry)| entry.at_ns == now_ns) {
            if let Some(Reverse(entry)) = self.events.pop() {
                self.happen(entry.event)?;
            }
        } else if let Some(request) = self.upcoming.take() {
            self.upcoming = self.source.next_request();
            self.ask(request)?;
        }
        Ok(())
    }

    /// All devices do what happens on them before `until_ns`.
    fn advance(&mut self, until_ns: u64) -> Result<(), String> {
        let due = self.due.iter().enumerate().filter(|&(_, &due_ns)| due_ns < until_ns);
        self.turns.clear();
        self.turns.extend(due.map(|(at, _)| at));
        let (devices, turns, tallies, broken) = (&self.devices, &self.turns, &self.tallies, Mutex::new(Vec::new()));
        let empty = || self.tally.empty();
        let work = |turn: usize| {
            let mut tally = tallies.lock().pop().unwrap_or_else(empty);
            if let Err((at_ns, what)) = devices[turns[turn]].lock().advance(until_ns, &mut tally) {
                broken.lock().push((at_ns, turns[turn], what));
            }
            tallies.lock().push(tally);
        };
        if turns.len() < WORTH_WAKING {
            (0..turns.len()).for_each(work);
        } else {
            self.threads.each(turns.len(), 1, work);
        }
        if let Some((at_ns, device, what)) = broken.into_inner().into_iter().min() {
            self.now_ns = at_ns;
            return Err(format!("device {device}: {what}"));
        }
        for &at in &self.turns {
            let device = self.devices[at].get_mut();
            self.due[at] = device.due_ns();
            self.seats[at].load = device.load();
            self.ended.extend(device.ended());
        }
        // Stable: at equal times by device.
        self.ended.sort_by_key(|outcome| outcome.at_ns);
        Ok(())
    }

    fn tell(&mut self, at: usize, message: Message) {
        let device = self.devices[at].get_mut();
        device.tell(message, self.now_ns);
        self.due[at] = device.due_ns();
    }

    fn plan(&mut self, at_ns: u64, event: Event) {
        self.planned += 1;
        self.to_come += u64::from(matches!(event, Event::Ask(_)));
        self.events.push(Reverse(Entry { at_ns, planned: self.planned, event }));
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        let now_ns = self.now_ns;
        match event {
            Event::Ask(request) => {
                self.to_come -= 1;
                self.ask(*request)?;
            }
            Event::Leave(name) => {
                if let Some(call) = self.call(name) {
                    call.left_ns = Some(now_ns);
                    let device = call.device;
                    self.tell(device, Message::Cancel(name.0));
                }
            }
            Event::Die(at) => {
                self.tally.deaths += 1;
                self.seats[at].alive = false;
                self.tell(at, Message::Die);
                let repair_ns = (self.seats[at].faults.exponential(self.setup.faults.repair_s) * 1e9) as u64;
                self.plan(now_ns + NOTICED_NS, Event::Unlist(at));
                self.plan(now_ns + NOTICED_NS + 1 + repair_ns, Event::Repaired(at));
            }
            Event::Unlist(at) => self.seats[at].listed = false,
            Event::Repaired(at) => {
                self.tell(at, Message::Renew);
                let seat = &mut self.seats[at];
                (seat.alive, seat.listed, seat.load) = (true, true, (0, 0));
                self.plan_fault(at, self.setup.faults.death_every_s, Event::Die(at));
            }
            Event::Slow(at) => {
                self.tally.slow_spells += 1;
                self.tell(at, Message::Slow(self.setup.faults.slow_factor.max(0.01)));
                let for_ns = (self.seats[at].faults.exponential(self.setup.faults.slow_for_s) * 1e9) as u64;
                self.plan(now_ns + 1 + for_ns, Event::Fast(at));
            }
            Event::Fast(at) => {
                self.tell(at, Message::Slow(1.0));
                self.plan_fault(at, self.setup.faults.slow_every_s, Event::Slow(at));
            }
        }
        Ok(())
    }

    /// A fault that comes on average each `every_s` seconds, unless all is over by then.
    fn plan_fault(&mut self, at: usize, every_s: f64, event: Event) {
        if every_s <= 0.0 {
            return;
        }
        let at_ns = self.now_ns + 1 + (self.seats[at].faults.exponential(every_s) * 1e9) as u64;
        if at_ns < self.end_ns {
            self.plan(at_ns, event);
        }
    }

    fn call(&mut self, (key, number): CallName) -> Option<&mut Call> {
        self.calls[key as usize].as_mut().filter(|call| call.number == number)
    }

    /// A caller asks.
    fn ask(&mut self, mut request: Request) -> Result<(), String> {
        let now_ns = self.now_ns;
        self.tally.sent(now_ns, request.account, self.open);
        if self.setup.faults.vanish > 0.0 && self.vanishing.chance(self.setup.faults.vanish) {
            let after_ns = 1 + (self.vanishing.exponential(4.0) * 1e9) as u64;
            request.leaves_ns = Some(request.leaves_ns.map_or(after_ns, |leaves_ns| leaves_ns.min(after_ns)));
        }
        // The gateway's budget: what was asked has to fit, what was not is cut to what is left.
        let prompt_tokens = traffic::length(&request.prompt);
        let room = self.setup.engine.context.saturating_sub(prompt_tokens) as u32;
        if room == 0 || request.max_tokens.is_some_and(|most| most > room) {
            self.tally.lacks(Lack::TooLong);
            return Ok(());
        }
        let (number, leaves_ns) = (self.tally.requests, request.leaves_ns);
        let call = Call {
            number,
            prompt_tokens: prompt_tokens as u32,
            max_tokens: request.max_tokens.unwrap_or(request.output).min(room),
            request,
            attempts: 0,
            device: 0,
            left_ns: None,
            late_ns: None,
            held: None,
        };
        self.open += 1;
        let key = match self.vacant.pop() {
            Some(key) => {
                self.calls[key as usize] = Some(call);
                key
            }
            None => {
                self.calls.push(Some(call));
                self.calls.len() as CallKey - 1
            }
        };
        if let Some(leaves_ns) = leaves_ns {
            self.plan(now_ns + leaves_ns, Event::Leave((key, number)));
        }
        self.deadlines.push_back((now_ns + self.timeout_ns, (key, number)));
        self.route(key)
    }

    /// Hands a call to a device, as the gateway would; or gives up.
    fn route(&mut self, key: CallKey) -> Result<(), String> {
        let mut lack = Lack::Unavailable;
        loop {
            let Some(call) = self.calls[key as usize].as_mut() else {
                return Err("a call is routed after its end".into());
            };
            if call.attempts == route::ATTEMPTS {
                break;
            }
            self.candidates.clear();
            let listed = (0..).zip(&self.seats).filter(|(_, seat)| seat.listed);
            self.candidates.extend(listed.map(|(at, seat)| {
                let (waiting, running) = seat.load;
                Candidate { device: DeviceId(at), waiting, running }
            }));
            let (account, salt) = &self.accounts[call.request.account as usize];
            let affinity = call.request.session.map(|session| route::affinity(&format!("{session:x}"), account));
            let Some(chosen) = route::choose(&self.candidates, affinity, account) else { break };
            let at = usize::from(self.candidates[chosen].device.0);
            call.attempts += 1;
            call.device = at;
            let most =
                Usage { prompt_tokens: call.prompt_tokens, completion_tokens: call.max_tokens, ..Usage::default() };
            let (estimate, now) = (self.setup.price.charge(&most), millis(self.now_ns));
            let claim = Claim {
                request: RequestId::from_number(call.number.into()),
                account,
                plan: Plan::PAID,
                windows: &[],
                tokens: most.total_tokens().into(),
                neurons: estimate,
                cost: estimate,
                is_once: false,
            };
            let held = self.book.reserve(&claim, now);
            let held = held.map_err(|denied| format!("a call without limits was refused: {denied:?}"))?;
            if !self.seats[at].alive {
                self.book.release(held, now);
                lack = Lack::Lost;
                continue;
            }
            let submission = Submission {
                call: key,
                account: account.clone(),
                account_at: call.request.account,
                prompt: call.request.prompt.clone(),
                answer: call.request.answer,
                output: call.request.output,
                max_tokens: call.max_tokens,
                priority: call.request.priority,
                salt: *salt,
                received_ns: call.request.at_ns,
            };
            call.held = Some(held);
            self.tell(at, Message::Submit(Box::new(submission)));
            self.seats[at].load.1 += 1;
            return Ok(());
        }
        self.close(key, lack)
    }

    /// A call ends without having been taken in by anybody.
    fn close(&mut self, key: CallKey, lack: Lack) -> Result<(), String> {
        let Some(_) = self.calls[key as usize].take() else { return Err("a call has ended twice".into()) };
        self.vacant.push(key);
        self.open -= 1;
        self.tally.lacks(lack);
        Ok(())
    }

    /// A device has done with a call.
    fn hear(&mut self, outcome: Outcome) -> Result<(), String> {
        let key = outcome.call;
        let Some(call) = self.calls[key as usize].as_mut() else { return Err("a call has ended twice".into()) };
        let now = millis(outcome.at_ns);
        let Some(held) = call.held.take() else { return Err(format!("call {} had no reservation", call.number)) };
        // The first token is the point of no return.
        let lost = outcome.failed.is_some_and(route::is_worth_another);
        if lost && outcome.produced == 0 && call.left_ns.is_none() && call.late_ns.is_none() {
            self.book.release(held, now);
            self.tally.retried += u64::from(call.attempts < route::ATTEMPTS);
            return match call.attempts < route::ATTEMPTS {
                true => self.route(key),
                false => self.close(key, Lack::Lost),
            };
        }
        // What its caller did after the end does not count.
        call.left_ns = call.left_ns.filter(|&left_ns| left_ns <= outcome.at_ns);
        call.late_ns = call.late_ns.filter(|&late_ns| late_ns <= outcome.at_ns);
        let Some(call) = self.calls[key as usize].take() else { return Err("a call has ended twice".into()) };
        self.vacant.push(key);
        self.open -= 1;
        self.last_end_ns = self.last_end_ns.max(outcome.at_ns);

        // A token of the step that was under way when its caller left was never heard.
        let unheard = call.left_ns.is_some_and(|left_ns| outcome.produced > 0 && outcome.last_ns > left_ns);
        let heard = outcome.produced - u32::from(unheard);
        if outcome.cached >= call.prompt_tokens {
            return Err(format!("call {} found all of its prompt in the cache", call.number));
        }
        if heard == 0 {
            self.book.release(held, now);
        } else {
            let usage = Usage {
                prompt_tokens: call.prompt_tokens,
                cached_tokens: outcome.cached,
                completion_tokens: heard,
                ..Usage::default()
            };
            let used = self.setup.price.charge(&usage);
            let spent = Spent {
                key: None,
                gateway: self.gateway.clone(),
                provider: self.gateway.clone(),
                model: self.setup.model.clone(),
                usage,
                neurons: used,
                cost: used,
            };
            if !self.book.settle(held, &spent, now).0 {
                return Err(format!("call {} was not billed", call.number));
            }
            let account = &mut self.tally.accounts[call.request.account as usize];
            account.prompt_tokens += u64::from(usage.prompt_tokens);
            account.cached_tokens += u64::from(usage.cached_tokens);
            account.completion_tokens += u64::from(heard);
            account.neurons = account.neurons + used;
        }

        // A pool smaller than the context ends answers early.
        let pool = self.setup.blocks() * self.setup.engine.block_tokens;
        let room = pool.min(self.setup.engine.context).saturating_sub(call.prompt_tokens as usize) as u32;
        let whole = outcome.produced == call.request.output.min(call.max_tokens).min(room);
        let lack = match outcome.failed {
            _ if call.left_ns.is_some() => Lack::Left,
            Some(Kind::Busy) => Lack::Busy,
            Some(Kind::ContextLength) => Lack::TooLong,
            Some(Kind::EngineLost) => Lack::Lost,
            Some(kind) => return Err(format!("call {} failed with {}", call.number, kind.as_str())),
            None if whole => return self.answered(call, &outcome),
            None if call.late_ns.is_some() => Lack::Late,
            None => return Err(format!("call {} has ended after {} tokens", call.number, outcome.produced)),
        };
        self.tally.lacks(lack);
        // A client that only counts answers asks again, but not at once.
        if self.setup.shape.clients > 0 {
            self.goes_on(call.request, 0, outcome.at_ns + AFTER_FAILURE_NS);
        }
        Ok(())
    }

    fn answered(&mut self, call: Call, outcome: &Outcome) -> Result<(), String> {
        let alone_ns = self.setup.cost.alone_ns(call.prompt_tokens.into(), outcome.produced.into());
        self.tally.done(call.request.account, outcome.at_ns - call.request.at_ns, alone_ns);
        self.goes_on(call.request, outcome.produced, outcome.at_ns);
        Ok(())
    }

    /// After an answer comes the next question, in a later tick.
    fn goes_on(&mut self, request: Request, produced: u32, at_ns: u64) {
        if let Some(mut next) = self.source.follow(request, produced, at_ns) {
            next.at_ns = next.at_ns.max(self.now_ns);
            self.plan(next.at_ns, Event::Ask(Box::new(next)));
        }
    }

    /// What must hold when all is over.
    fn finish(&mut self) -> Result<(), String> {
        for (at, device) in self.devices.iter_mut().enumerate() {
            device.get_mut().is_empty().map_err(|left| format!("device {at}: {left}"))?;
        }
        let lacking: u64 = self.tally.lacking.values().sum();
        if self.tally.done + lacking != self.tally.requests {
            return Err(format!("{} requests, {} done, {lacking} not", self.tally.requests, self.tally.done));
        }
        let (drawn, counted) = (self.tally.produced(), self.tally.ttft.count() + self.tally.itl.count());
        if drawn != counted {
            return Err(format!("{drawn} tokens were produced, {counted} were timed"));
        }
        let now = millis(self.now_ns);
        let mut charged = Neurons::ZERO;
        for (tally, (account, _)) in self.tally.accounts.iter().zip(&self.accounts) {
            let totals = self.book.totals(account, now);
            if totals.reserved != Neurons::ZERO || totals.total != tally.neurons {
                return Err(format!("the ledger says {totals:?} of {account}, {:?} were delivered", tally.neurons));
            }
            if tally.completion_tokens > tally.produced {
                return Err(format!("{account} got {} tokens of {}", tally.completion_tokens, tally.produced));
            }
            charged = charged + totals.total;
        }
        if charged != self.tally.accounts.iter().map(|account| account.neurons).sum() {
            return Err(format!("the ledger's sum is {charged:?}"));
        }
        Ok(())
    }

    fn report(mut self) -> Report {
        let mut setup = self.setup.clone();
        let wall_ns = match (&setup.trace, setup.shape.clients) {
            (None, 0) => self.last_end_ns.max(self.end_ns),
            _ => self.last_end_ns.max(1),
        };
        Report {
            settings: setup.knobs().iter().map(|knob| (knob.name, knob.value())).collect(),
            title: format!("{} of {}, {}, seed {}", setup.devices, setup.device, setup.model, setup.seed),
            wall_ns,
            utilisation: self
                .devices
                .iter_mut()
                .map(|device| device.get_mut().busy_ns as f64 / wall_ns as f64)
                .collect(),
            blocks: setup.blocks(),
            tally: self.tally,
        }
    }
}

fn millis(ns: u64) -> Millis {
    Millis(ns / 1_000_000)
}
