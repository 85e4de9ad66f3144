//! What grammars allow next, found out while the device computes.
//!
//! ```text
//! engine   start ──────── forward ──────── join ── sample
//!            │ matchers                      ↑ matchers, masks ready
//! masks      └──> prepare, prepare, … ───────┘
//! ```
//!
//! A matcher is lent to a thread of its own for the time of a forward pass, which needs none of it. Threads are started
//! by the first grammar. Matchers travel in boxes through channels with room for all, so a step allocates nothing here.
//! Rows that stand on drafts have masks like any other: what may follow if the drafts come true.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::engine::answer::Answer;
use crate::engine::scheduler::Plan;
use crate::engine::sequence::RequestKey;
use crate::metrics::EngineMetrics;
use crate::model::grammar::Matcher;

/// Of how many cores one works on masks. They take a fraction of a step's time, which the others compute.
const CORES_A_THREAD: usize = 8;
/// Most threads.
const MAX_THREADS: usize = 4;

/// The masks of one lane.
pub(super) struct Masks {
    /// Most matchers in a step.
    room: usize,
    metrics: EngineMetrics,
    workers: Option<Workers>,
    /// Matchers lent out and not back yet.
    away: usize,
    /// Room for drafts that go with a matcher.
    spare: Vec<Vec<u32>>,
}

struct Workers {
    jobs: Sender<Job>,
    done: Receiver<Job>,
    threads: Vec<JoinHandle<()>>,
}

struct Job {
    request: RequestKey,
    choice: u32,
    matcher: Box<Matcher>,
    drafts: Vec<u32>,
}

impl Masks {
    pub(super) fn new(room: usize, metrics: EngineMetrics) -> Self {
        Self { room, metrics, workers: None, away: 0, spare: Vec::new() }
    }

    /// Begins to prepare the masks of all rows after which a token is drawn under a grammar.
    pub(super) fn start(&mut self, answers: &mut [Option<Answer>], plan: &Plan) {
        for (row, first) in plan.sampled.iter().enumerate().filter(|(_, sampled)| sampled.ahead == 0) {
            let part = first.part;
            let Some(answer) = &mut answers[part.request as usize] else { continue };
            if plan.given(row).is_some() {
                continue;
            }
            let Some(matcher) = answer.take_matcher(part.choice) else { continue };
            let mut drafts = self.spare.pop().unwrap_or_default();
            drafts.extend_from_slice(plan.drafts(row));
            let job = Job { request: part.request, choice: part.choice, matcher, drafts };
            if self.workers.is_none() {
                self.workers = Workers::start(self.room, &self.metrics);
            }
            let unsent = match &self.workers {
                Some(workers) => match workers.jobs.try_send(job) {
                    Ok(()) => {
                        self.away += 1;
                        continue;
                    }
                    Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
                },
                None => job,
            };
            let job = unsent.done(&self.metrics);
            answer.return_matcher(part.choice, job.matcher);
            self.spare.push(job.drafts);
        }
    }

    /// Waits until all of them are ready.
    pub(super) fn join(&mut self, answers: &mut [Option<Answer>]) {
        let Some(workers) = self.workers.as_ref().filter(|_| self.away > 0) else { return };
        let started = Instant::now();
        for job in workers.done.iter().take(self.away) {
            if let Some(answer) = &mut answers[job.request as usize] {
                answer.return_matcher(job.choice, job.matcher);
            }
            self.spare.push(job.drafts);
        }
        self.away = 0;
        self.metrics.mask_wait.observe(started.elapsed().as_secs_f64());
    }
}

impl Job {
    fn done(mut self, metrics: &EngineMetrics) -> Self {
        let started = Instant::now();
        // A thread that died would be waited for forever.
        if catch_unwind(AssertUnwindSafe(|| self.matcher.prepare(&self.drafts))).is_err() {
            self.matcher.fail(&"the compiler panicked");
        }
        self.drafts.clear();
        metrics.mask_time.observe(started.elapsed().as_secs_f64());
        self
    }
}

impl Workers {
    /// `None` if there is no thread to be had: the masks are computed where they are needed then.
    fn start(room: usize, metrics: &EngineMetrics) -> Option<Self> {
        let (jobs, inbox) = bounded::<Job>(room);
        let (outbox, done) = bounded(room);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = Vec::new();
        for i in 0..(cores / CORES_A_THREAD).clamp(1, MAX_THREADS) {
            let (inbox, outbox, metrics) = (inbox.clone(), outbox.clone(), metrics.clone());
            let work = move || {
                for job in inbox {
                    if outbox.send(job.done(&metrics)).is_err() {
                        return;
                    }
                }
            };
            match std::thread::Builder::new().name(format!("neurond-mask-{i}")).spawn(work) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%error, "a thread for masks could not be started"),
            }
        }
        (!threads.is_empty()).then_some(Self { jobs, done, threads })
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The threads end with the channel that feeds them.
        self.jobs = bounded(0).0;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
