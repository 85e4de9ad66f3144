//! What the engine thread is told, and the handle that tells it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{SendTimeoutError, Sender, TrySendError};

use crate::base::{AccountId, DeviceId, Error, Kind, ModelId, RequestId, Result, SlotId};
use crate::engine::Runner;
use crate::engine::oneshot::{Encode, OneShotSlot};
use crate::engine::spill::Store;
use crate::metrics::EngineMetrics;
use crate::model::Vocabulary;
use crate::model::grammar::CompiledGrammar;
use crate::model::lora::Adapter;
use crate::task::{Event, Sampling};

/// A message to the engine thread.
pub enum Command {
    /// A new request.
    Submit(Box<Submit>),
    /// A new request for a model that answers in one pass.
    Encode(Box<Encode>),
    /// A model made ready elsewhere; takes requests from the next step on.
    Install(Box<ModelSlot>),
    /// The same for one that answers in one pass.
    InstallOneShot(Box<OneShotSlot>),
    /// Take no new requests for this slot, finish what it has, free it, then drop `done`.
    Retire {
        /// Which slot.
        slot: SlotId,
        /// Dropped when the slot is gone.
        done: flume::Sender<()>,
    },
    /// Write the state of every slot to the log and send it back.
    Dump(flume::Sender<EngineStatus>),
    /// Finish what is running if `drain`, else fail it; then end the thread.
    Stop {
        /// Whether running requests may end well.
        drain: bool,
    },
}

/// A request on its way to the engine: tokens in, events out.
pub struct Submit {
    /// Whose answer it is, for logs.
    pub request: RequestId,
    /// Who is served; the scheduler is fair between accounts.
    pub account: AccountId,
    /// The account's share beside others', at least 1.
    pub weight: u32,
    /// Which loaded model.
    pub slot: SlotId,
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Independent answers, at least 1. They share the prompt's full KV blocks.
    pub choices: u32,
    /// Most tokens to produce for each choice, at least 1. `prompt.len() + max_tokens` fits the context window.
    pub max_tokens: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Seed in force: the caller's, or drawn for the request. Choice `i` uses `seed + i`.
    pub seed: u64,
    /// Text that ends a choice, none of them empty.
    pub stop: Vec<String>,
    /// `Some(k)`: report log-probabilities and `k` rivals for each token.
    pub logprobs: Option<u32>,
    /// What every choice must look like.
    pub grammar: Option<CompiledGrammar>,
    /// `Some(k)`: report log-probabilities and the `k` best for each token of the prompt, before anything else. The
    /// prompt is computed in full then, whatever the prefix cache holds.
    pub prompt_logprobs: Option<u32>,
    /// Higher is served first; 0 is normal.
    pub priority: i8,
    /// Separates prefix caches: requests share KV only if their salts are equal.
    pub cache_salt: u64,
    /// The adapter to compute with, opened for this slot's model. Its requests share KV among themselves only.
    pub adapter: Option<Arc<Adapter>>,
    /// Most tokens guessed ahead in a step, if fewer than the model's; changes the pace of the answer only.
    pub drafts: Option<u32>,
    /// Tokens of the text that the caller foresees; empty: nothing is known.
    pub expected: Vec<u32>,
    /// When the answer is worth nothing any more.
    pub deadline: Instant,
    /// When the call came in, for queue time and TTFT.
    pub received: Instant,
    /// What tokens print in this answer, if it is not what the slot's vocabulary says: the same tokens, others shown.
    pub vocabulary: Option<Arc<Vocabulary>>,
    /// Where the events go. Capacity: [`Submit::event_capacity`], so that the engine never waits for a client. Dropping
    /// the receiver cancels the request.
    pub events: flume::Sender<Event>,
}

impl Submit {
    /// Room for every event that a request can cause: one for the prompt, one a token, a finish a choice, usage of what
    /// was held back at the end, and `Done` or `Failed`.
    pub fn event_capacity(choices: u32, max_tokens: u32) -> usize {
        choices as usize * (max_tokens as usize + 2) + 3
    }
}

/// A model ready to run on a device.
pub struct ModelSlot {
    /// Unique for this loaded version.
    pub slot: SlotId,
    /// Its catalog id, for logs.
    pub model: ModelId,
    /// Bytes behind tokens, end tokens.
    pub vocabulary: Arc<Vocabulary>,
    /// Weights and KV pool.
    pub runner: Box<dyn Runner>,
    /// Longest sequence.
    pub context: u32,
    /// Tokens computed in a step over all sequences.
    pub step_tokens: usize,
    /// Most prompt tokens of one sequence in a step.
    pub prefill_chunk: usize,
    /// Sequences computed at the same time.
    pub max_running: usize,
    /// Sequences waiting, beyond which submissions fail with [`Kind::Busy`].
    pub max_queue: usize,
    /// Share KV of equal prefixes.
    pub prefix_cache: bool,
    /// How many times longer a step may take because of a prompt while others decode; 0: as long as it takes.
    pub prefill_stretch: f64,
    /// Where KV goes that the pool has no room for.
    pub spill: Option<Store>,
    /// How far answers are guessed ahead.
    pub speculation: Speculation,
    /// A draft model that guesses them: the same vocabulary, as many KV blocks of the same size.
    pub draft: Option<Box<dyn Runner>>,
    /// Where to count.
    pub metrics: EngineMetrics,
}

/// How far a model's answers are guessed ahead. Default: not at all.
#[derive(Default)]
pub struct Speculation {
    /// Most drafts of one sequence in a step; 0: none.
    pub most: usize,
    /// Most drafts in a step over all sequences; the runner computes logits for as many more rows.
    pub rows: usize,
    /// Guess from earlier text of prompt and answer.
    pub lookup: bool,
}

/// What a device is doing, for dumps and the fleet.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct EngineStatus {
    /// One entry a slot.
    pub slots: Vec<SlotStatus>,
}

/// What a model slot is doing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SlotStatus {
    /// Which.
    pub slot: SlotId,
    /// Of which model.
    pub model: ModelId,
    /// Takes no new requests.
    pub retiring: bool,
    /// Sequences waiting.
    pub waiting: usize,
    /// Sequences running.
    pub running: usize,
    /// KV blocks held by sequences.
    pub kv_used: usize,
    /// KV blocks free, cached ones included.
    pub kv_free: usize,
    /// Steps computed so far.
    pub steps: u64,
}

/// The handle of a device's thread.
#[derive(Clone)]
pub struct Engine {
    device: DeviceId,
    inbox: Sender<Command>,
    heartbeat: Arc<AtomicU64>,
    started: Instant,
    /// Calls that are on their way here.
    coming: Arc<AtomicUsize>,
}

/// A call on its way to an engine.
pub struct Coming(Arc<AtomicUsize>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// For the thread's starter: the handle of an inbox. `heartbeat` is milliseconds since `started`, stored by the
    /// thread at least once a second while it lives.
    pub(super) fn new(device: DeviceId, inbox: Sender<Command>, heartbeat: Arc<AtomicU64>, started: Instant) -> Self {
        Self { device, inbox, heartbeat, started, coming: Arc::default() }
    }

    /// Which device.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Hands a request over; its events follow on its own channel. If the slot is not there any more, that is a
    /// `Failed` of [`Kind::ModelUnavailable`]: look the model up again, a newer version may be serving.
    ///
    /// # Errors
    /// [`Kind::Busy`] when the inbox is full, [`Kind::EngineLost`] when the thread is gone.
    pub fn submit(&self, submit: Submit) -> Result<()> {
        self.tell(Command::Submit(Box::new(submit)))
    }

    /// Hands texts over; the answer follows on their own channel, with the same meaning of errors.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn encode(&self, encode: Encode) -> Result<()> {
        self.tell(Command::Encode(Box::new(encode)))
    }

    /// Sends any command without waiting.
    ///
    /// # Errors
    /// [`Kind::Busy`] when the inbox is full, [`Kind::EngineLost`] when the thread is gone.
    pub fn tell(&self, command: Command) -> Result<()> {
        self.inbox.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => full(),
            TrySendError::Disconnected(_) => lost(),
        })
    }

    /// Sends any command, waiting for room; never from an async thread.
    ///
    /// # Errors
    /// As [`Engine::tell`], `Busy` only after `patience`.
    pub fn tell_within(&self, command: Command, patience: Duration) -> Result<()> {
        self.inbox.send_timeout(command, patience).map_err(|error| match error {
            SendTimeoutError::Timeout(_) => full(),
            SendTimeoutError::Disconnected(_) => lost(),
        })
    }

    /// A call will come here, and counts until what this returns is dropped, or the call is sent: whatever is done before.
    pub fn expect(&self) -> Coming {
        self.coming.fetch_add(1, Ordering::Relaxed);
        Coming(self.coming.clone())
    }

    /// Calls that are on their way or sent and not looked at yet.
    pub fn backlog(&self) -> usize {
        self.coming.load(Ordering::Relaxed) + self.inbox.len()
    }

    /// How long ago the thread last came round its loop.
    pub fn silent_for(&self) -> Duration {
        let last = Duration::from_millis(self.heartbeat.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}

fn full() -> Error {
    Error::new(Kind::Busy, "The engine's inbox is full; try again in a moment.")
        .with_retry_after(Duration::from_secs(1))
}

/// The thread of a device is gone.
pub(super) fn lost() -> Error {
    Error::new(Kind::EngineLost, "The device of this model went away; try again in a moment.")
        .with_retry_after(Duration::from_secs(2))
}
