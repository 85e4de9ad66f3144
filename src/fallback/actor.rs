//! The actor that owns the breakers, the handle callers hold, and the guard that gives a probe back.
//!
//!     plan ----> Cell: rests until (one atomic word) <----published---- Breaker (actor's thread)
//!     outcome -> Cell: successes (atomics)                                 ^
//!        '-- failures, and whatever comes while a target rests ------------'
//!
//! If the actor has died, targets that do not rest are tried as always, and those that do once their rest is over.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use actix::prelude::*;
use parking_lot::RwLock;

use super::backoff::Budget;
use super::breaker::{AllRest, Breaker, Policy, Rest, Successes};
use super::class::Toll;
use super::recent::Recent;
use super::{Outcome, Target};
use crate::base::{Error, Kind, Lookup, Millis, Result};

/// Messages waiting at most; outcomes beyond are dropped and counted.
const MAILBOX: usize = 1024;
/// Targets that are watched at most. Beyond, the one that was quiet for longest makes way; if all rest, a new one is not watched.
const MAX_TARGETS: usize = 1024;

/// A cell's word for a target that does not rest.
const CLOSED: u64 = 0;
/// A cell's word for a target whose probe is out.
const PROBING: u64 = u64::MAX;

type Cells = Lookup<Target, Arc<Cell>>;

/// What is read and counted without asking the actor.
#[derive(Debug)]
struct Cell {
    /// [`CLOSED`], [`PROBING`], or when the rest ends.
    rest: AtomicU64,
    answered: Recent,
    /// Answers since the start: whether one came between two failures.
    answers: AtomicU64,
    /// The last outcome, in milliseconds since 1970.
    used: AtomicU64,
    /// The provider's, shared by its targets.
    budget: Arc<Budget>,
}

#[derive(Debug, Default)]
struct Shared {
    cells: RwLock<Arc<Cells>>,
    refuses: AtomicBool,
    dropped: AtomicU64,
}

/// Which targets to try: the module's whole outside.
#[derive(Clone)]
pub struct Fallback {
    addr: Addr<FallbackActor>,
    shared: Arc<Shared>,
}

/// A target that may be tried.
#[derive(Debug)]
pub struct Planned {
    /// Its place among those asked for.
    pub index: usize,
    /// By what right.
    pub pass: Pass,
}

/// By what right a target is tried.
#[derive(Debug)]
pub enum Pass {
    /// It does not rest.
    Closed,
    /// Its rest is over and this call is the first to see how it is.
    Probe(Probe),
    /// Its rest is over, but others come before it: ask [`Fallback::probe`] when its turn comes.
    Later,
    /// All rest, and this one's rest ends first.
    Anyway,
}

/// A target as operators see it.
#[derive(Clone, PartialEq, Debug)]
pub struct TargetHealth {
    /// Which.
    pub target: Target,
    /// Whether it rests.
    pub rest: Rest,
    /// Answers in the last half minute.
    pub answered: u32,
    /// Failures in the last half minute.
    pub failed: u32,
    /// Failures in a row.
    pub in_a_row: u32,
    /// Rests since it is watched.
    pub rests: u64,
}

impl Fallback {
    /// Starts with no target known, on a thread of its own. Targets are watched from their first outcome on.
    pub fn start(policy: Policy) -> Self {
        let shared = Arc::new(Shared::default());
        shared.refuses.store(policy.all_rest == AllRest::Refuse, Relaxed);
        let arbiter = Arbiter::new();
        let published = shared.clone();
        let addr = FallbackActor::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            FallbackActor { policy, watched: HashMap::new(), budgets: HashMap::new(), shared: published }
        });
        Self { addr, shared }
    }

    /// Of these targets those to try, in their order: without those that rest. Waits for nobody unless a rest is over and a probe is to be had.
    /// If all rest, the best of them or none, as the policy says.
    pub async fn plan(&self, targets: &[Target], now: Millis) -> Vec<Planned> {
        let cells = self.cells();
        let mut plan = Vec::with_capacity(targets.len());
        let mut has_closed = false;
        let mut best: Option<(u64, usize)> = None;
        for (index, target) in targets.iter().enumerate() {
            let rest = cells.get(target).map_or(CLOSED, |cell| cell.rest.load(Relaxed));
            let pass = match rest {
                CLOSED => Some(Pass::Closed),
                until if until > now.0 => None,
                _ if has_closed => Some(Pass::Later),
                _ => match self.addr.send(TakeProbe(target.clone(), now)).await {
                    Ok(probe) => probe.map(Pass::Probe),
                    // No actor, no breakers.
                    Err(_) => Some(Pass::Closed),
                },
            };
            has_closed |= matches!(pass, Some(Pass::Closed));
            match pass {
                Some(pass) => plan.push(Planned { index, pass }),
                None if best.is_none_or(|(earliest, _)| rest < earliest) => best = Some((rest, index)),
                None => {}
            }
        }
        if let (true, Some((_, index)), false) = (plan.is_empty(), best, self.shared.refuses.load(Relaxed)) {
            plan.push(Planned { index, pass: Pass::Anyway });
        }
        plan
    }

    /// For a target whose pass was [`Pass::Later`]: the right to try it, unless somebody else has it or it rests again.
    pub async fn probe(&self, target: &Target, now: Millis) -> Option<Pass> {
        let rest = self.cells().get(target).map_or(CLOSED, |cell| cell.rest.load(Relaxed));
        match rest {
            CLOSED => Some(Pass::Closed),
            until if until > now.0 => None,
            _ => match self.addr.send(TakeProbe(target.clone(), now)).await {
                Ok(probe) => probe.map(Pass::Probe),
                Err(_) => Some(Pass::Closed),
            },
        }
    }

    /// Says how an attempt ended. Told, not asked. A pass that is dropped instead tells nothing, and gives its probe back.
    pub fn settle(&self, target: &Target, pass: Pass, outcome: Outcome, now: Millis) {
        let cells = self.cells();
        let Some(cell) = cells.get(target) else {
            // The first word of this target: whether it is good or bad, it is watched from now on.
            if outcome != Outcome::Abandoned {
                self.tell(Report { target: target.clone(), outcome, now });
            }
            return;
        };
        cell.used.store(now.0, Relaxed);
        if outcome != Outcome::Abandoned {
            cell.budget.call(now);
        }
        if outcome == Outcome::Answered {
            cell.answered.add(now);
            cell.answers.fetch_add(1, Relaxed);
        }
        if let Pass::Probe(probe) = pass {
            return probe.settle(outcome, now);
        }
        let is_news = match outcome {
            Outcome::Answered => cell.rest.load(Relaxed) != CLOSED,
            Outcome::Failed(class) => class.toll() != Toll::Nothing,
            Outcome::Abandoned => false,
        };
        if is_news {
            self.tell(Report { target: target.clone(), outcome, now });
        }
    }

    /// Whether the target's provider may be tried once more, counted as a retry if so: retries are a fifth of a provider's recent calls at most, and a few.
    pub fn may_retry(&self, target: &Target, now: Millis) -> bool {
        self.cells().get(target).is_none_or(|cell| cell.budget.retry(now))
    }

    /// How all watched targets are, in the order of their names.
    ///
    /// # Errors
    /// [`Kind::Internal`] when the actor has died; calls go on without breakers then.
    pub async fn health(&self, now: Millis) -> Result<Vec<TargetHealth>> {
        let dead = |error| Error::new(Kind::Internal, "The breakers are not answering.").with_source(error);
        self.addr.send(Health(now)).await.map_err(dead)
    }

    /// Another policy, for what happens from now on; what rests goes on to rest.
    ///
    /// # Errors
    /// As [`Fallback::health`].
    pub async fn reconfigure(&self, policy: Policy) -> Result<()> {
        let dead = |error| Error::new(Kind::Internal, "The breakers are not answering.").with_source(error);
        self.addr.send(Reconfigure(policy)).await.map_err(dead)
    }

    /// Outcomes that were dropped because the actor had too many waiting.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Whether the actor still takes messages.
    pub fn is_alive(&self) -> bool {
        self.addr.connected()
    }

    fn cells(&self) -> Arc<Cells> {
        self.shared.cells.read().clone()
    }

    fn tell(&self, report: Report) {
        if self.addr.try_send(report).is_err() {
            self.shared.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// The right to try a target that rested. Dropped without an outcome, it is given back.
#[derive(Debug)]
pub struct Probe {
    addr: Option<Addr<FallbackActor>>,
    target: Target,
    number: u64,
}

impl Probe {
    fn new(addr: Addr<FallbackActor>, target: Target, number: u64) -> Self {
        Self { addr: Some(addr), target, number }
    }

    fn settle(mut self, outcome: Outcome, now: Millis) {
        let toll = match outcome {
            Outcome::Answered => None,
            Outcome::Failed(class) => Some(class.toll()),
            // Dropped, it is given back.
            Outcome::Abandoned => return,
        };
        if let Some(addr) = self.addr.take() {
            addr.do_send(Probed { target: self.target.clone(), number: self.number, toll, now });
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(addr) = self.addr.take() {
            addr.do_send(GiveBack(self.target.clone(), self.number));
        }
    }
}

struct FallbackActor {
    policy: Policy,
    watched: HashMap<Target, Watched>,
    budgets: HashMap<Box<str>, Arc<Budget>>,
    shared: Arc<Shared>,
}

struct Watched {
    breaker: Breaker,
    cell: Arc<Cell>,
    /// Answers when the last failure came.
    answers: u64,
}

impl FallbackActor {
    /// The target, watched from now on; none if there is no room.
    fn watch(&mut self, target: &Target, now: Millis) -> Option<&mut Watched> {
        if !self.watched.contains_key(target) {
            if self.watched.len() >= MAX_TARGETS {
                let quiet = self.watched.iter().filter(|(_, watched)| watched.breaker.rest() == Rest::None);
                let quietest =
                    quiet.min_by_key(|(_, watched)| watched.cell.used.load(Relaxed)).map(|(target, _)| target.clone());
                self.watched.remove(&quietest?);
                // Budgets that only this map holds belong to nobody.
                self.budgets.retain(|_, budget| Arc::strong_count(budget) > 1);
            }
            let budget = self.budgets.entry(target.provider.clone()).or_default().clone();
            let cell = Cell {
                rest: AtomicU64::new(CLOSED),
                answered: Recent::default(),
                answers: AtomicU64::new(0),
                used: AtomicU64::new(now.0),
                budget,
            };
            self.watched.insert(target.clone(), Watched { breaker: Breaker::new(), cell: Arc::new(cell), answers: 0 });
            let cells = self.watched.iter().map(|(target, watched)| (target.clone(), watched.cell.clone())).collect();
            *self.shared.cells.write() = Arc::new(cells);
        }
        self.watched.get_mut(target)
    }
}

impl Watched {
    fn publish(&self, target: &Target, before: Rest) {
        let rest = self.breaker.rest();
        let word = match rest {
            Rest::None => CLOSED,
            Rest::Probing => PROBING,
            Rest::Until(until) => until.0.clamp(CLOSED + 1, PROBING - 1),
        };
        self.cell.rest.store(word, Relaxed);
        let Target { provider, model } = target;
        match (before, rest) {
            (Rest::None, Rest::Until(until)) => tracing::warn!(%provider, %model, until = until.0, "target rests"),
            (Rest::Probing, Rest::None) => tracing::info!(%provider, %model, "target answers again"),
            _ => {}
        }
    }

    fn successes(&mut self, now: Millis) -> Successes {
        let answers = self.cell.answers.load(Relaxed);
        let since_failure = std::mem::replace(&mut self.answers, answers) != answers;
        Successes { recent: self.cell.answered.sum(now), since_failure }
    }
}

impl Actor for FallbackActor {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "()")]
struct Report {
    target: Target,
    outcome: Outcome,
    now: Millis,
}

#[derive(Message)]
#[rtype(result = "Option<Probe>")]
struct TakeProbe(Target, Millis);

#[derive(Message)]
#[rtype(result = "()")]
struct Probed {
    target: Target,
    number: u64,
    toll: Option<Toll>,
    now: Millis,
}

#[derive(Message)]
#[rtype(result = "()")]
struct GiveBack(Target, u64);

#[derive(Message)]
#[rtype(result = "()")]
struct Reconfigure(Policy);

#[derive(Message)]
#[rtype(result = "Vec<TargetHealth>")]
struct Health(Millis);

impl Handler<Report> for FallbackActor {
    type Result = ();
    fn handle(&mut self, Report { target, outcome, now }: Report, _: &mut Context<Self>) {
        let policy = self.policy;
        let is_new = !self.watched.contains_key(&target);
        let Some(watched) = self.watch(&target, now) else { return };
        // What came before there was a cell was not counted.
        if is_new {
            watched.cell.budget.call(now);
            if outcome == Outcome::Answered {
                watched.cell.answered.add(now);
                watched.cell.answers.fetch_add(1, Relaxed);
            }
        }
        let before = watched.breaker.rest();
        match outcome {
            Outcome::Answered => watched.breaker.answered(now),
            Outcome::Failed(class) if class.toll() != Toll::Nothing => {
                let ok = watched.successes(now);
                watched.breaker.failed(class.toll(), ok, &policy, now);
            }
            Outcome::Failed(_) | Outcome::Abandoned => {}
        }
        watched.publish(&target, before);
    }
}

impl Handler<TakeProbe> for FallbackActor {
    type Result = Option<Probe>;
    fn handle(&mut self, TakeProbe(target, now): TakeProbe, ctx: &mut Context<Self>) -> Self::Result {
        let watched = self.watched.get_mut(&target)?;
        let before = watched.breaker.rest();
        let probe = watched.breaker.take_probe(now);
        watched.publish(&target, before);
        // A guard from the start: who asked may leave before the answer is there.
        Some(Probe::new(ctx.address(), target, probe?))
    }
}

impl Handler<Probed> for FallbackActor {
    type Result = ();
    fn handle(&mut self, Probed { target, number, toll, now }: Probed, _: &mut Context<Self>) {
        let policy = self.policy;
        let Some(watched) = self.watched.get_mut(&target) else { return };
        let before = watched.breaker.rest();
        watched.successes(now);
        watched.breaker.probed(number, toll, &policy, now);
        watched.publish(&target, before);
    }
}

impl Handler<GiveBack> for FallbackActor {
    type Result = ();
    fn handle(&mut self, GiveBack(target, number): GiveBack, _: &mut Context<Self>) {
        let Some(watched) = self.watched.get_mut(&target) else { return };
        let before = watched.breaker.rest();
        watched.breaker.give_back(number);
        watched.publish(&target, before);
    }
}

impl Handler<Reconfigure> for FallbackActor {
    type Result = ();
    fn handle(&mut self, Reconfigure(policy): Reconfigure, _: &mut Context<Self>) {
        self.shared.refuses.store(policy.all_rest == AllRest::Refuse, Relaxed);
        self.policy = policy;
    }
}

impl Handler<Health> for FallbackActor {
    type Result = MessageResult<Health>;
    fn handle(&mut self, Health(now): Health, _: &mut Context<Self>) -> Self::Result {
        let mut health: Vec<TargetHealth> = self
            .watched
            .iter()
            .map(|(target, watched)| TargetHealth {
                target: target.clone(),
                rest: watched.breaker.rest(),
                answered: watched.cell.answered.sum(now),
                failed: watched.breaker.recent_failures(now),
                in_a_row: watched.breaker.in_a_row(),
                rests: watched.breaker.rests(),
            })
            .collect();
        health.sort_by(|a, b| a.target.cmp(&b.target));
        MessageResult(health)
    }
}

#[cfg(test)]
#[path = "actor_test.rs"]
mod tests;
