//! A simulated world: one lane over a simulated device, callers that come and go by step, and a clock that counts steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use neurond::base::{AccountId, DeviceId, Error, Kind, ModelId, RequestId, SlotId};
use neurond::config::Spill;
use neurond::engine::lane::Lane;
use neurond::engine::sim::{SimRunner, SimSpec};
use neurond::engine::spill::Store;
use neurond::engine::{ModelSlot, Runner, Speculation, Submit};
use neurond::metrics::{EngineMetrics, Metrics};
use neurond::model::lora::Adapter;
use neurond::task::{Dry, Event, FinishReason, PromptToken, Sampling, Usage};

/// Simulated time of a step.
pub const STEP: Duration = Duration::from_millis(10);

/// Numbers that look random and follow from a seed.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Both ends included.
    pub fn within(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.next().is_multiple_of(chances)
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.within(0, from.len() as u64 - 1) as usize].clone()
    }
}

#[derive(Clone, Debug)]
pub struct WorldSpec {
    pub blocks: usize,
    pub block_tokens: usize,
    pub context: u32,
    pub step_tokens: usize,
    pub prefill_chunk: usize,
    pub max_running: usize,
    pub max_queue: usize,
    pub prefix_cache: bool,
    pub prefill_stretch: f64,
    /// Blocks kept outside the pool.
    pub spill: usize,
    pub end_in: u32,
    pub fail_at: u64,
    /// Drafts of a sequence in a step, and of all.
    pub drafts: (usize, usize),
    /// A draft model that repeats itself after so many tokens: it agrees where the model does so as well.
    pub draft: Option<u32>,
    /// Tokens after which answers repeat themselves.
    pub period: u32,
}

impl WorldSpec {
    pub fn random(rng: &mut Rng) -> Self {
        let (context, block_tokens) = (rng.within(20, 160), rng.pick(&[1, 2, 3, 4, 8, 16]));
        Self {
            // Room for half of the longest sequence to three of them.
            blocks: (context * rng.within(2, 12) / 4).div_ceil(block_tokens) as usize,
            block_tokens: block_tokens as usize,
            context: context as u32,
            step_tokens: rng.within(1, 48) as usize,
            prefill_chunk: rng.within(1, 48) as usize,
            max_running: rng.within(1, 12) as usize,
            max_queue: rng.within(1, 40) as usize,
            prefix_cache: !rng.one_in(4),
            prefill_stretch: rng.pick(&[0.0, 1.0, 1.5, 3.0]),
            spill: rng.pick(&[0, 3, 20, 200]),
            end_in: rng.pick(&[0, 12, 80]),
            fail_at: if rng.one_in(8) { rng.within(1, 60) } else { 0 },
            drafts: (rng.pick(&[0, 1, 4, 15]), rng.within(1, 32) as usize),
            draft: rng.pick(&[None, None, Some(0), Some(7)]),
            period: rng.pick(&[0, 3, 7, 20]),
        }
    }

    fn slot(&self, metrics: EngineMetrics) -> ModelSlot {
        let device = SimSpec {
            blocks: self.blocks,
            block_tokens: self.block_tokens,
            end_in: self.end_in,
            fail_at: self.fail_at,
            period: self.period,
            most_rows: self.step_tokens,
            ..SimSpec::default()
        };
        ModelSlot {
            slot: SlotId::next(),
            model: ModelId::new("sim"),
            vocabulary: SimRunner::vocabulary(),
            runner: Box::new(SimRunner::new(device.clone())),
            context: self.context,
            step_tokens: self.step_tokens,
            prefill_chunk: self.prefill_chunk,
            max_running: self.max_running,
            max_queue: self.max_queue,
            prefix_cache: self.prefix_cache,
            prefill_stretch: self.prefill_stretch,
            spill: (self.spill > 0).then(|| store(self.spill, SimRunner::new(device.clone()).block_bytes())),
            speculation: Speculation { most: self.drafts.0, rows: self.drafts.1, lookup: true },
            draft: self.draft.map(|period| {
                let small = SimSpec { period, fail_at: 0, ..device.clone() };
                Box::new(SimRunner::new(small)) as Box<dyn Runner>
            }),
            metrics,
        }
    }
}

/// Room for so many blocks outside the pool.
fn store(blocks: usize, bytes: usize) -> Store {
    let opened = Store::open(&Spill { bytes: blocks * bytes, folder: None }, bytes);
    opened.unwrap_or_else(|error| panic!("{error}"))
}

/// A request, and what its caller does.
#[derive(Clone, Debug)]
pub struct Request {
    /// The step before which it arrives.
    pub step: usize,
    pub account: u8,
    pub priority: i8,
    pub prompt: Vec<u32>,
    pub choices: u32,
    pub max_tokens: u32,
    pub seed: u64,
    /// Which of the sampling settings below.
    pub kind: u8,
    pub stop: Vec<String>,
    pub salt: u64,
    pub logprobs: Option<u32>,
    /// Which adapter it is computed with.
    pub adapter: Option<u64>,
    /// What the model thinks of the prompt is asked for.
    pub prompt_logprobs: Option<u32>,
    pub drafts: Option<u32>,
    /// What its caller foresees.
    pub expected: Vec<u32>,
    /// Steps after which its caller goes away.
    pub leaves: Option<usize>,
    /// From arrival.
    pub deadline: Option<Duration>,
}

impl Request {
    pub fn random(rng: &mut Rng, spec: &WorldSpec) -> Self {
        // Few families with prefixes of their own, so that blocks are shared, and shared by halves.
        let family = rng.within(0, 2) as u32;
        let (shared, own) = (rng.within(0, 24) as u32, rng.within(1, 16) as u32);
        let own_first = rng.within(0, 250) as u32;
        let prompt = (0..shared).map(|at| (family * 50 + at) % 256).chain((0..own).map(|at| (own_first + at) % 256));
        let foreseen = rng.pick(&["", "", "", "the the the", "eeaattoo"]).bytes().map(u32::from);
        let letters = ["zj", "q", "a v", "or", "the", "ss", "  ", "xx"];
        Self {
            step: if rng.one_in(3) { 0 } else { rng.within(0, 80) as usize },
            account: rng.within(0, 3) as u8,
            priority: rng.pick(&[0, 0, 0, -1, 2]),
            prompt: prompt.collect(),
            choices: rng.pick(&[1, 1, 1, 2, 4]),
            max_tokens: rng.within(1, spec.context.into()) as u32,
            seed: rng.within(0, 3) * 100,
            kind: rng.within(0, 4) as u8,
            stop: (0..rng.pick(&[0u8, 0, 1, 3])).map(|_| rng.pick(&letters).to_owned()).collect(),
            salt: rng.within(0, 1),
            logprobs: rng.pick(&[None, None, Some(0), Some(3)]),
            adapter: rng.pick(&[None, None, Some(0), Some(1)]),
            prompt_logprobs: rng.pick(&[None, None, None, Some(0), Some(2)]),
            drafts: rng.pick(&[None, None, Some(0), Some(2)]),
            expected: foreseen.collect(),
            leaves: rng.one_in(5).then(|| rng.within(0, 60) as usize),
            deadline: rng.one_in(8).then(|| STEP * rng.within(0, 100) as u32),
        }
    }

    fn sampling(&self) -> Sampling {
        let plain = Sampling::default();
        match self.kind {
            0 => Sampling { temperature: 0.0, ..plain },
            1 => plain,
            2 => Sampling { temperature: 0.8, top_p: 0.9, top_k: 12, ..plain },
            3 => Sampling {
                repetition_penalty: 1.1,
                frequency_penalty: 0.3,
                penalty_last_n: Some(7),
                typical_p: 0.8,
                dry: Some(Dry {
                    multiplier: 1.5,
                    base: 1.5,
                    allowed_length: 1,
                    last_n: Some(40),
                    breakers: vec![" ".into()],
                }),
                ..plain
            },
            _ => Sampling {
                repetition_penalty: 1.3,
                presence_penalty: 0.5,
                frequency_penalty: 0.2,
                top_p: 0.95,
                ..plain
            },
        }
    }

    fn submit(&self, slot: SlotId, now: Instant) -> (Submit, flume::Receiver<Event>) {
        let (events, receiver) = flume::bounded(Submit::event_capacity(self.choices, self.max_tokens));
        let submit = Submit {
            request: RequestId::random(),
            account: AccountId::new(format!("account-{}", self.account)),
            weight: 1,
            slot,
            prompt: self.prompt.clone(),
            choices: self.choices,
            max_tokens: self.max_tokens,
            sampling: self.sampling(),
            seed: self.seed,
            stop: self.stop.clone(),
            logprobs: self.logprobs,
            grammar: None,
            prompt_logprobs: self.prompt_logprobs,
            priority: self.priority,
            cache_salt: self.salt,
            adapter: self.adapter.map(|name| Arc::new(Adapter::hollow(name))),
            drafts: self.drafts,
            expected: self.expected.clone(),
            deadline: now + self.deadline.unwrap_or(Duration::from_secs(1_000_000)),
            received: now,
            vocabulary: None,
            events,
        };
        (submit, receiver)
    }
}

/// What a caller got, checked for order while it comes in.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    choices: Vec<Choice>,
    /// As of the newest text.
    used: Usage,
    pub done: Option<Usage>,
    /// What the model thinks of the prompt.
    pub prompt: Option<Vec<PromptToken>>,
    pub failed: Option<Kind>,
    /// The step after which it ended.
    pub ended: usize,
    /// Everything, as it came.
    pub events: Vec<Event>,
}

#[derive(Clone, Debug, Default)]
struct Choice {
    text: String,
    bytes: Vec<u8>,
    finish: Option<(FinishReason, Option<String>)>,
}

impl Answer {
    fn of(choices: u32) -> Self {
        Self { choices: vec![Choice::default(); choices as usize], ..Self::default() }
    }

    pub fn text(&self, choice: u32) -> &str {
        &self.choices[choice as usize].text
    }

    pub fn finish(&self, choice: u32) -> Option<&(FinishReason, Option<String>)> {
        self.choices[choice as usize].finish.as_ref()
    }

    pub fn is_blank(&self) -> bool {
        self.choices.iter().all(|choice| choice.text.is_empty() && choice.finish.is_none())
    }

    fn is_over(&self) -> bool {
        self.done.is_some() || self.failed.is_some()
    }

    fn hear(&mut self, event: Event, request: &Request) -> Result<(), String> {
        if self.is_over() {
            return Err(format!("{event:?} came after the end"));
        }
        self.events.push(event.clone());
        match event {
            Event::Prompt(tokens) => {
                if self.prompt.is_some() || !self.is_blank() || request.prompt_logprobs.is_none() {
                    return Err("the prompt came late, twice or unasked".into());
                }
                let ids: Vec<u32> = tokens.iter().map(|of| of.token).collect();
                let rivals = |of: &PromptToken| of.scored.as_ref().map(|scored| scored.top.len() as u32);
                if ids != request.prompt
                    || tokens[0].scored.is_some()
                    || tokens[1..].iter().any(|of| rivals(of) != request.prompt_logprobs)
                {
                    return Err(format!("{tokens:?} is not what is known of {:?}", request.prompt));
                }
                self.prompt = Some(tokens);
            }
            Event::Text { .. } | Event::Done(_) if request.prompt_logprobs.is_some() && self.prompt.is_none() => {
                return Err("the prompt was forgotten".into());
            }
            Event::Text { choice, text, logprobs, usage } => {
                let choice = &mut self.choices[choice as usize];
                if choice.finish.is_some() {
                    return Err(format!("{text:?} came after the finish of its choice"));
                }
                if usage.completion_tokens <= self.used.completion_tokens {
                    return Err(format!("{usage:?} after {:?}", self.used));
                }
                self.used = usage;
                if text.is_empty() && logprobs.is_empty() {
                    return Err("an event says nothing".into());
                }
                choice.text += &text;
                logprobs.iter().for_each(|token| choice.bytes.extend(&token.bytes));
            }
            Event::Finish { choice, reason, stop } => {
                let choice = &mut self.choices[choice as usize];
                if choice.finish.replace((reason, stop)).is_some() {
                    return Err("a choice finished twice".into());
                }
                // Every token is a byte here, so log-probabilities and text agree to the byte.
                if request.logprobs.is_some() && choice.bytes != choice.text.as_bytes() {
                    return Err(format!("log-probabilities of {:?}, text {:?}", choice.bytes, choice.text));
                }
                if request.stop.iter().any(|stop| choice.text.contains(stop.as_str())) {
                    return Err(format!("{:?} contains a stop string", choice.text));
                }
            }
            Event::Done(usage) if usage.completion_tokens < self.used.completion_tokens => {
                return Err(format!("{usage:?} after {:?}", self.used));
            }
            Event::Done(usage) => self.done = Some(usage),
            Event::Failed(error) => self.failed = Some(error.kind()),
            Event::Tool { .. } => panic!("an engine knows no tools"),
        }
        Ok(())
    }
}

/// One lane and its clock.
pub struct World {
    pub spec: WorldSpec,
    pub metrics: EngineMetrics,
    lane: Lane,
    now: Instant,
}

impl World {
    pub fn new(spec: WorldSpec) -> Self {
        let metrics = Metrics::new().engine(&ModelId::new("sim"), DeviceId(0));
        Self { lane: Lane::new(spec.slot(metrics.clone())), spec, metrics, now: Instant::now() }
    }

    /// The same with a thread of its own to write answers.
    pub fn with_scribe(self, least: usize) -> Self {
        Self { lane: self.lane.with_scribe(least), ..self }
    }

    /// The longest sequence, as the pool allows it.
    pub fn context(&self) -> usize {
        self.lane.scheduler().limits().context
    }

    /// Lets all requests come and go. Checks after every step; fails when that takes more than `bound` steps.
    pub fn play(&mut self, requests: &[Request], bound: usize, aloud: bool) -> Result<Vec<Answer>, String> {
        let mut answers: Vec<Answer> = requests.iter().map(|request| Answer::of(request.choices)).collect();
        let mut callers: Vec<Option<flume::Receiver<Event>>> = requests.iter().map(|_| None).collect();
        let (mut lost, mut left) = (false, false);
        for step in 0.. {
            for ((request, caller), answer) in requests.iter().zip(&mut callers).zip(&mut answers) {
                if request.step == step && lost {
                    answer.failed = Some(Kind::EngineLost);
                } else if request.step == step {
                    let (submit, receiver) = request.submit(self.lane.id(), self.now);
                    self.lane.submit(submit, self.now);
                    *caller = Some(receiver);
                }
                if request.leaves.is_some_and(|after| request.step + after == step) && caller.take().is_some() {
                    left = true;
                }
            }
            if !lost && let Err(error) = self.step() {
                if self.spec.fail_at == 0 || !error.to_string().contains("was to fail") {
                    return Err(format!("step {step}: {error}"));
                }
                self.lane.fail(&Error::new(Kind::EngineLost, "lost"));
                lost = true;
            }
            if aloud {
                let parts = self.lane.planned().parts.iter().zip(&self.lane.planned().batch.spans);
                let parts: Vec<_> = parts.map(|(part, span)| format!("{part:?} {span:?}")).collect();
                eprintln!("step {step}: {} waiting, {parts:#?}", self.lane.scheduler().waiting());
            }
            self.lane.check().map_err(|error| format!("step {step}: {error}"))?;
            if std::mem::take(&mut left) && self.lane.is_idle() && self.lane.scheduler().blocks().used() > 0 {
                return Err(format!("step {step}: a caller that left still holds blocks"));
            }
            for ((request, caller), answer) in requests.iter().zip(&callers).zip(&mut answers) {
                for event in caller.iter().flat_map(|caller| caller.try_iter()) {
                    answer.hear(event, request).map_err(|error| format!("step {step}: {error}"))?;
                    answer.ended = step;
                }
            }
            self.now += STEP;
            if self.lane.is_idle() && requests.iter().all(|request| request.step <= step) {
                break;
            }
            if step > bound {
                return Err(format!("not over after {step} steps"));
            }
        }
        for (at, ((request, caller), answer)) in requests.iter().zip(&callers).zip(&mut answers).enumerate() {
            // A scribe of its own may be writing still.
            while let Some(Ok(event)) = caller.as_ref().map(|caller| caller.recv_timeout(Duration::from_secs(20))) {
                answer.hear(event, request).map_err(|error| format!("at the end: {error}"))?;
            }
            if caller.is_some() && !answer.is_over() {
                return Err(format!("request {at} never ended"));
            }
        }
        Ok(answers)
    }

    fn step(&mut self) -> Result<(), Error> {
        if !self.lane.plan(self.now) {
            // Whatever waits can be computed when nothing runs: no step may be empty while somebody waits.
            return match self.lane.is_idle() {
                true => Ok(()),
                false => Err(Error::internal("nothing was planned, but somebody waits")),
            };
        }
        self.lane.compute(&|| self.now)?;
        self.lane.deliver(self.now);
        let rows = self.lane.planned().batch.rows() as u32;
        let took = STEP / 4 + STEP * rows / 32;
        self.lane.step_took(took, took);
        Ok(())
    }

    /// One choice of a request by itself, with room for everything and without a guess.
    pub fn alone(&self, request: &Request, choice: u32) -> Answer {
        let spec = WorldSpec {
            blocks: 256,
            block_tokens: 16,
            context: self.context() as u32,
            step_tokens: 512,
            prefill_chunk: 512,
            max_running: 1,
            max_queue: 1,
            prefix_cache: false,
            prefill_stretch: 0.0,
            spill: 0,
            end_in: self.spec.end_in,
            fail_at: 0,
            drafts: (0, 0),
            draft: None,
            period: self.spec.period,
        };
        let request = Request {
            step: 0,
            choices: 1,
            seed: request.seed + u64::from(choice),
            leaves: None,
            deadline: None,
            ..request.clone()
        };
        match Self::new(spec).play(&[request], 1_000, false).map(|mut answers| answers.pop()) {
            Ok(Some(answer)) => answer,
            other => panic!("a request alone ended with {other:?}"),
        }
    }

    /// Nothing is left behind.
    pub fn is_empty(&self) -> Result<(), String> {
        let scheduler = self.lane.scheduler();
        let (used, waiting, running) = (scheduler.blocks().used(), scheduler.waiting(), scheduler.running());
        if (used, waiting, running) != (0, 0, 0) || !self.lane.is_idle() {
            return Err(format!("{used} blocks used, {waiting} waiting, {running} running at the end"));
        }
        Ok(())
    }
}
