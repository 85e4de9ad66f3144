//! The answer on its way to the client, and its close.
//!
//! A call closes exactly once, by `Done`, by `Failed` or because its `Delivery` was dropped: the reservation is settled by
//! what was produced, the metrics count it, the log has its line. Dropping the event channel with it is what cancels the work.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;
use tracing::info;

use crate::base::{AccountId, Error, KeyId, Kind, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::gateway::bill::Tally;
use crate::gateway::calls::Calls;
use crate::gateway::hold::Held;
use crate::gateway::step::LOCAL;
use crate::gateway::{Call, Gateway, hold};
use crate::ledger::Spent;
use crate::logs::{CacheUse, Logs, Record};
use crate::metrics::Metrics;
use crate::task::{Event, FinishReason, PromptToken, TokenLogprob, ToolCall, ToolDelta, Usage};

/// The events of a call that has begun to answer.
pub struct Delivery {
    events: flume::Receiver<Event>,
    /// What has arrived and is not handed on yet.
    held: VecDeque<Event>,
    /// Finds calls of tools, where there may be some.
    calls: Option<Calls>,
    patience: tokio::time::Instant,
    /// The prompt is only read: what is drawn after it is nobody's.
    silent: bool,
    close: Close,
}

/// What an attempt brought.
pub(super) struct Begun {
    /// What follows.
    pub(super) events: flume::Receiver<Event>,
    /// The event that [`Gateway::serve`] waited for.
    pub(super) first: Event,
    /// The prompt, to be given back in front of the answer.
    pub(super) echo: Option<String>,
    /// Finds calls of tools, where there may be some.
    pub(super) calls: Option<Calls>,
}

/// What the end of a call needs to know. `outcome` is set once.
pub(super) struct Close {
    request: RequestId,
    account: AccountId,
    key: Option<KeyId>,
    entry: Arc<CatalogEntry>,
    received: Instant,
    first_event: Instant,
    usage: Usage,
    neurons: Neurons,
    reservation: Option<Held>,
    spent: Spent,
    tally: Option<Tally>,
    /// Where it is told of; nowhere if a gateway tells of it.
    logs: Option<Logs>,
    metrics: Arc<Metrics>,
}

impl Delivery {
    pub(super) fn new(
        gateway: &Gateway,
        call: &Call,
        begun: Begun,
        reservation: Held,
        patience: tokio::time::Instant,
    ) -> Self {
        let Begun { events, first, echo, calls } = begun;
        let mut held = VecDeque::new();
        if let Some(text) = echo {
            held.extend((0..call.input.choices).map(|choice| Event::Text {
                choice,
                text: text.clone(),
                logprobs: Vec::new(),
                usage: Usage::default(),
            }));
        }
        let close = Close::new(gateway, call, reservation);
        let silent = call.input.max_tokens == Some(0);
        let mut delivery = Self { events, held, calls, patience, silent, close };
        delivery.take(first);
        delivery
    }

    /// The next event; `None` after `Done` or `Failed`.
    pub async fn next(&mut self) -> Option<Event> {
        while self.held.is_empty() {
            self.close.reservation.as_ref()?;
            let event = match timeout_at(self.patience, self.events.recv_async()).await {
                Ok(Ok(event)) => event,
                Ok(Err(_)) => Event::Failed(engine_lost()),
                Err(_) => Event::Failed(too_late()),
            };
            self.take(event);
        }
        self.held.pop_front()
    }

    /// The next event if it is there already, for packing several into one write.
    pub fn next_ready(&mut self) -> Option<Event> {
        while self.held.is_empty() {
            self.close.reservation.as_ref()?;
            let event = self.events.try_recv().ok()?;
            self.take(event);
        }
        self.held.pop_front()
    }

    /// What the call used so far; final once `Done` has been seen.
    pub fn usage(&self) -> Usage {
        self.close.usage
    }

    /// What the call cost; final once `Done` has been seen.
    pub fn neurons(&self) -> Neurons {
        self.close.neurons
    }

    /// Takes the whole answer at once.
    ///
    /// # Errors
    /// The error the stream failed with.
    pub async fn collect(mut self) -> Result<Answer> {
        let mut choices: Vec<Choice> = Vec::new();
        let mut prompt = None;
        let at = |choices: &mut Vec<Choice>, index: u32| {
            let index = index as usize;
            while choices.len() <= index {
                choices.push(Choice::default());
            }
            index
        };
        while let Some(event) = self.next().await {
            match event {
                Event::Prompt(tokens) => prompt = Some(Arc::new(tokens)),
                Event::Text { choice, text, logprobs, .. } => {
                    let index = at(&mut choices, choice);
                    choices[index].text.push_str(&text);
                    choices[index].logprobs.extend(logprobs);
                }
                Event::Tool { choice, delta, .. } => {
                    let index = at(&mut choices, choice);
                    choices[index].take(delta);
                }
                Event::Finish { choice, reason, stop } => {
                    let index = at(&mut choices, choice);
                    (choices[index].finish, choices[index].stop) = (reason, stop);
                }
                Event::Done(_) => {}
                Event::Failed(error) => return Err(error),
            }
        }
        choices.iter_mut().for_each(|choice| choice.prompt = prompt.clone());
        Ok(Answer { choices, usage: self.usage(), neurons: self.neurons() })
    }

    /// Counts an event and puts what it says behind what is held.
    fn take(&mut self, mut event: Event) {
        if self.silent {
            match &mut event {
                Event::Text { text, logprobs, usage, .. } => {
                    text.clear();
                    logprobs.clear();
                    usage.completion_tokens = 0;
                }
                Event::Done(usage) => usage.completion_tokens = 0,
                _ => {}
            }
        }
        match &event {
            Event::Text { usage, .. } => self.close.usage = *usage,
            Event::Done(usage) => {
                self.close.usage = *usage;
                self.close.settle("done");
            }
            Event::Failed(error) => {
                // A failure after the first byte is charged for what was produced, like a client that left.
                self.close.metrics.errors.with_label_values(&[error.kind().as_str()]).inc();
                self.close.settle("failed");
            }
            Event::Prompt(_) | Event::Tool { .. } | Event::Finish { .. } => {}
        }
        match &mut self.calls {
            Some(calls) => {
                let known = self.held.len();
                calls.read(event, &mut self.held);
                let begins = |event: &&Event| matches!(event, Event::Tool { delta: ToolDelta::Begin { .. }, .. });
                match self.held.range(known..).filter(begins).count() as u64 {
                    0 => {}
                    begun => {
                        let model = self.close.entry.id.as_str();
                        self.close.metrics.tool_calls.with_label_values(&[model]).inc_by(begun);
                    }
                }
            }
            None => self.held.push_back(event),
        }
    }
}

impl Drop for Close {
    fn drop(&mut self) {
        if self.reservation.is_some() {
            self.metrics.cancelled.with_label_values(&[self.entry.id.as_str()]).inc();
            self.settle("cancelled");
        }
    }
}

impl Close {
    pub(super) fn new<Input>(gateway: &Gateway, call: &Call<Input>, reservation: Held) -> Self {
        Self {
            request: call.id,
            account: call.account.clone(),
            key: call.key.clone(),
            entry: call.entry.clone(),
            received: call.received,
            first_event: Instant::now(),
            usage: Usage::default(),
            neurons: Neurons::ZERO,
            reservation: Some(reservation),
            spent: hold::spent(call),
            tally: call.terms.tally.clone(),
            logs: call.terms.gateway.is_none().then(|| gateway.logs.clone()),
            metrics: gateway.metrics.clone(),
        }
    }

    /// All of an answer that comes at once; returns what it cost.
    pub(super) fn done(&mut self, usage: Usage) -> Neurons {
        (self.usage, self.first_event) = (usage, Instant::now());
        self.settle("done");
        self.neurons
    }

    /// The call failed before it answered: nothing is charged, and whoever hears the error logs it.
    pub(super) fn release(&mut self) {
        self.reservation = None;
    }

    /// The call for who counts calls: it is not kept, since it came through no gateway.
    fn told(&self, outcome: &'static str) -> Box<Record> {
        let taken = self.received.elapsed();
        let status = match outcome {
            "done" => 200,
            "cancelled" => 499,
            _ => 500,
        };
        let (id, gateway, path, cache) = (None, "".into(), "".into(), CacheUse::Off);
        let (metadata, event, user_agent, why) = Default::default();
        let (request_content_type, response_content_type, findings, asked, answered) = Default::default();
        Box::new(Record {
            id,
            request: self.request,
            at: Millis(Millis::now().0.saturating_sub(millis(taken))),
            account: self.account.clone(),
            key: self.key.clone(),
            gateway,
            provider: LOCAL.into(),
            model: self.entry.id.as_str().into(),
            task: Some(self.entry.task),
            path,
            status,
            success: status == 200,
            cache,
            duration_us: taken.as_micros() as u64,
            first_byte_us: Some((self.first_event - self.received).as_micros() as u64),
            usage: Some(self.usage),
            cost: self.neurons,
            custom_cost: false,
            saved: Neurons::ZERO,
            step: 0,
            request_type: "engine".into(),
            request_content_type,
            response_content_type,
            metadata,
            trace: None,
            zero_retention: false,
            event,
            user_agent,
            authenticated: self.key.is_some(),
            stored_key: false,
            attempts: "".into(),
            why,
            findings,
            asked,
            answered,
        })
    }

    fn settle(&mut self, outcome: &'static str) {
        let Some(reservation) = self.reservation.take() else { return };
        self.neurons = self.entry.price.charge(&self.usage);
        (self.spent.usage, self.spent.neurons, self.spent.cost) = (self.usage, self.neurons, self.neurons);
        if let Some(tally) = &self.tally {
            *tally.lock() = Some((self.usage, self.neurons));
        }
        if let Held::Reserved(reservation) = reservation {
            drop(reservation.settle(&self.spent, Millis::now()));
        }
        if let Some(logs) = &self.logs {
            logs.append(self.told(outcome));
        }
        self.metrics.neurons.with_label_values(&[self.entry.id.as_str()]).inc_by(self.neurons.micro());
        info!(
            target: "neurond::call",
            request = %self.request,
            account = %self.account,
            key = self.key.as_ref().map_or("-", KeyId::as_str),
            model = %self.entry.id,
            outcome,
            prompt_tokens = self.usage.prompt_tokens,
            cached_tokens = self.usage.cached_tokens,
            completion_tokens = self.usage.completion_tokens,
            neurons = self.neurons.as_f64(),
            first_event_ms = millis(self.first_event - self.received),
            total_ms = millis(self.received.elapsed()),
        );
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn engine_lost() -> Error {
    Error::new(Kind::EngineLost, "The device of this model went away while it was answering; try again in a moment.")
        .with_retry_after(Duration::from_secs(2))
}

pub(super) fn too_late() -> Error {
    Error::new(Kind::Timeout, "The answer took longer than the configured request timeout.")
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// In order of their index.
    pub choices: Vec<Choice>,
    /// What it used.
    pub usage: Usage,
    /// What it cost.
    pub neurons: Neurons,
}

/// One of the answers to a prompt.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The text.
    pub text: String,
    /// Calls of tools, in the order made.
    pub calls: Vec<ToolCall>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The stop string that ended it, if one did.
    pub stop: Option<String>,
    /// One entry a token, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// The prompt's tokens, if asked for.
    pub prompt: Option<Arc<Vec<PromptToken>>>,
}

impl Choice {
    /// Takes in what is new of a call.
    fn take(&mut self, delta: ToolDelta) {
        match (delta, self.calls.last_mut()) {
            (ToolDelta::Begin { id, name }, _) => self.calls.push(ToolCall { id, name, arguments: String::new() }),
            (ToolDelta::Arguments(more), Some(call)) => call.arguments.push_str(&more),
            (ToolDelta::Arguments(_), None) => debug_assert!(false, "arguments of no call"),
        }
    }
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            text: String::new(),
            calls: Vec::new(),
            finish: FinishReason::Stop,
            stop: None,
            logprobs: Vec::new(),
            prompt: None,
        }
    }
}
