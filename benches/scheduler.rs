//! What a step costs beside the model: deciding it and delivering it. Drawing its tokens: `benches/sampler.rs`. Delivery is
//! measured in time of the engine's thread, with answers written on it and beside it, while callers wait for each token.
//!
//! ```text
//! cargo bench --bench scheduler
//! ```

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use neurond::base::{AccountId, DeviceId, ModelId, RequestId, SlotId};
use neurond::engine::lane::Lane;
use neurond::engine::scheduler::{Ask, DraftLimits, Limits, Plan, Pushed, Scheduler};
use neurond::engine::sim::{SimRunner, SimSpec};
use neurond::engine::{ModelSlot, Submit};
use neurond::metrics::Metrics;
use neurond::task::{Event, Sampling};

const RUNNING: usize = 256;
const BLOCKS: usize = 16_384;
const PROMPT: usize = 256;
const ANSWER: u32 = 512;

/// 256 sequences that decode; one of them ends and another joins every other step.
struct Decoding {
    scheduler: Scheduler,
    accounts: Vec<AccountId>,
    arrivals: u32,
    now: Instant,
    plan: Plan,
    next: Plan,
}

impl Decoding {
    fn new() -> Self {
        let limits = Limits {
            context: 8192,
            step_tokens: 2048,
            prefill_chunk: 512,
            max_running: RUNNING,
            max_queue: 1024,
            prefix_cache: true,
            prefill_stretch: 1.7,
            spill_slots: 0,
            foresight: 0,
            drafts: DraftLimits::default(),
        };
        let mut this = Self {
            scheduler: Scheduler::new(limits, BLOCKS, 16),
            accounts: (0..16).map(|at| AccountId::new(format!("account-{at}"))).collect(),
            arrivals: 0,
            now: Instant::now(),
            plan: Plan::default(),
            next: Plan::default(),
        };
        // Ages are spread, so that a step has its share of ends and beginnings.
        for at in 0..RUNNING as u32 {
            this.join(1 + at * ANSWER / RUNNING as u32);
        }
        for _ in 0..2 * ANSWER {
            this.step(true);
        }
        assert!(this.scheduler.running() > RUNNING * 9 / 10, "{}", this.scheduler.running());
        this
    }

    fn join(&mut self, max_tokens: u32) {
        self.arrivals += 1;
        let prompt = (0..PROMPT as u32).map(|at| at + self.arrivals).collect();
        let account = &self.accounts[self.arrivals as usize % self.accounts.len()];
        let ask = Ask {
            account,
            weight: 1,
            prompt,
            choices: 1,
            max_tokens,
            priority: 0,
            salt: 0,
            adapter: None,
            scored: false,
            drafts: None,
            expected: vec![],
        };
        assert!(self.scheduler.submit(ask, self.now).is_ok());
    }

    /// Plan and books of a step. Returns how long it kept the device waiting.
    fn step(&mut self, prepares: bool) -> Duration {
        let begun = Instant::now();
        std::mem::swap(&mut self.plan, &mut self.next);
        self.scheduler.plan(self.now, &mut self.plan);
        let mut waited = begun.elapsed();
        let begun = Instant::now();
        if prepares {
            self.scheduler.prepare(&self.plan, self.now, &mut self.next);
        } else {
            self.scheduler.computed(&self.plan, self.now);
            waited += begun.elapsed();
        }
        let begun = Instant::now();
        let mut ended = 0;
        for part in self.plan.sampled.iter().map(|row| row.part) {
            if self.scheduler.push(part.sequence, 5) == Pushed::Full {
                self.scheduler.finish(part.sequence);
                ended += 1;
            }
        }
        waited += begun.elapsed();
        (0..ended).for_each(|_| self.join(ANSWER));
        waited
    }
}

/// Plan and books of a step: all of it, and as much of it as a device waits for.
fn plan(c: &mut Criterion) {
    let mut decoding = Decoding::new();
    let mut group = c.benchmark_group("scheduler, 256 sequences");
    group.bench_function("step", |b| b.iter(|| decoding.step(false)));
    for (name, prepares) in [("between steps", false), ("between steps, prepared", true)] {
        group.bench_function(name, |b| b.iter_custom(|steps| (0..steps).map(|_| decoding.step(prepares)).sum()));
    }
    group.finish();
}

/// A lane on a device whose steps take so long.
fn sim(step_us: u64) -> Lane {
    let device = SimSpec { blocks: BLOCKS, step_us, end_in: 0, verify: false, ..SimSpec::default() };
    let metrics = Metrics::new();
    Lane::new(ModelSlot {
        slot: SlotId::next(),
        model: ModelId::new("sim"),
        vocabulary: SimRunner::vocabulary(),
        runner: Box::new(SimRunner::new(device)),
        context: 8192,
        step_tokens: 2048,
        prefill_chunk: 512,
        max_running: RUNNING,
        max_queue: 1024,
        prefix_cache: true,
        prefill_stretch: 1.7,
        spill: None,
        speculation: Default::default(),
        draft: None,
        metrics: metrics.engine(&ModelId::new("sim"), DeviceId(0)),
    })
}

/// One more answer, whose prompt is like no other's.
fn join(lane: &mut Lane, which: u32, max_tokens: u32) -> flume::Receiver<Event> {
    let (events, receiver) = flume::bounded(Submit::event_capacity(1, max_tokens));
    let submit = Submit {
        request: RequestId::random(),
        account: AccountId::new("account"),
        weight: 1,
        slot: lane.id(),
        prompt: (0..PROMPT as u32).map(|at| (at * 7 + which) % 256).collect(),
        choices: 1,
        max_tokens,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        seed: 1,
        stop: vec!["\n\n".into()],
        logprobs: None,
        grammar: None,
        prompt_logprobs: None,
        priority: 0,
        cache_salt: 0,
        adapter: None,
        drafts: None,
        expected: vec![],
        deadline: Instant::now() + Duration::from_secs(3600),
        received: Instant::now(),
        vocabulary: None,
        events,
    };
    lane.submit(submit, Instant::now());
    receiver
}

/// The same with delivery, sampling over 257 tokens and a device that takes no time.
fn lane(c: &mut Criterion) {
    let mut lane = sim(0);
    let mut receivers = Vec::new();
    let join = |lane: &mut Lane, receivers: &mut Vec<flume::Receiver<Event>>, max_tokens: u32| {
        receivers.push(join(lane, 1 + receivers.len() as u32, max_tokens));
    };
    for at in 0..RUNNING as u32 {
        join(&mut lane, &mut receivers, 1 + at * ANSWER / RUNNING as u32);
    }
    let mut step = |lane: &mut Lane| {
        assert!(lane.plan(Instant::now()));
        assert!(lane.compute(&Instant::now).is_ok());
        lane.deliver(Instant::now());
        let mut ended = 0;
        receivers.retain(|receiver| {
            let over = receiver.try_iter().any(|event| matches!(event, Event::Done(_)));
            ended += usize::from(over);
            !over
        });
        (0..ended).for_each(|_| join(lane, &mut receivers, ANSWER));
    };
    (0..2 * ANSWER).for_each(|_| step(&mut lane));
    let mut group = c.benchmark_group("lane");
    group.bench_function("step of 256 sequences", |b| b.iter(|| step(&mut lane)));
    group.finish();
}

/// Time that this thread has computed.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is there on every Linux, and `time` outlives the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What delivery takes of the engine's thread in a step of 64 sequences. Every caller waits for its next token, as the
/// handlers of a server do, so each event wakes one.
fn deliver(c: &mut Criterion) {
    const DECODING: usize = 64;
    let mut group = c.benchmark_group("deliver 64 tokens");
    group.throughput(Throughput::Elements(DECODING as u64));
    for (name, lane) in [("on the engine's thread", sim(400)), ("beside it", sim(400).with_scribe(1))] {
        let mut lane = lane;
        let (callers, rounds) = std::sync::mpsc::channel::<Vec<flume::Receiver<Event>>>();
        let server = std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { panic!("no runtime") };
            for round in rounds {
                let tasks = tokio::task::LocalSet::new();
                for caller in round {
                    tasks.spawn_local(async move { while caller.recv_async().await.is_ok() {} });
                }
                runtime.block_on(tasks);
            }
        });
        let mut step = || {
            if lane.is_idle() {
                let round = (0..DECODING as u32).map(|at| join(&mut lane, at, 3_000)).collect();
                assert!(callers.send(round).is_ok());
            }
            assert!(lane.plan(Instant::now()) && lane.compute(&Instant::now).is_ok());
            let before = thread_time();
            lane.deliver(Instant::now());
            thread_time() - before
        };
        let _warm: Duration = (0..40).map(|_| step()).sum();
        group.sample_size(20).bench_function(name, |b| b.iter_custom(|steps| (0..steps).map(|_| step()).sum()));
        drop((lane, callers));
        assert!(server.join().is_ok());
    }
    group.finish();
}

criterion_group!(benches, plan, lane, deliver);
criterion_main!(benches);
