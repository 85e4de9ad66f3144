//! Trying: steps in order, each as often as it may be, until one answers; and what an answer goes through before anybody
//! reads it.
//!
//!     step --breaker--> try --head--> good: translate, check by rules --> Begun
//!                        ^              '-- failed: class, advice --> wait and again | the next step
//!                        '---------------------------------------------'

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use bytes::Bytes;
use tokio::time::{sleep, timeout, timeout_at};

use super::Relay;
use crate::base::{Error, Kind, Millis, ModelId, Neurons, RequestId, Result};
use crate::config;
use crate::fallback::{self, Backoff, Class, Growth, Next, Outcome, Pass, Target, classify};
use crate::gateway::asked::{Ask, Who};
use crate::gateway::bill::{Bill, Pricing, Receipt, Tally};
use crate::gateway::headers::{self, Headers};
use crate::gateway::limits;
use crate::gateway::opening::{Opening, Verdict};
use crate::gateway::pipe::{End, Pipe, Source, Words};
use crate::gateway::record::label;
use crate::gateway::step::{Sign, Step, Way};
use crate::gateway::watch::Watch;
use crate::guard;
use crate::ledger::{Claim, Counts};
use crate::net::client::{Answer, AnswerBody, Fault};
use crate::net::gather::Gather;
use crate::provider::{self, Meta, Meter, Translator, messages};
use crate::registry::Gateway;

/// Before a second attempt, where nobody says otherwise.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// How long the opening of a stream without content is held back where something else can be tried.
const OPENING: Duration = Duration::from_secs(1);
/// How long the head of a stream waits for its first chunk: most come right behind it, and one packet takes both.
const COMPANY: Duration = Duration::from_millis(1);
/// How long a failed answer may take to say what failed.
const FAILURE_PATIENCE: Duration = Duration::from_secs(10);
/// Most of a failed answer that is kept, to be judged and to be handed on if nothing better comes.
pub(super) const MAX_FAILURE_BYTES: usize = 256 * 1024;

/// What attempts came to.
pub(super) struct Begun {
    pub(super) status: StatusCode,
    /// What the upstream said, and who answered.
    pub(super) headers: Headers,
    pub(super) pipe: Pipe,
    /// What it cost whoever asked first.
    pub(super) saved: Neurons,
}

/// What was tried, for the log and for a header.
#[derive(Default)]
pub(super) struct Trail {
    pub(super) text: String,
    /// Waited for others.
    pub(super) elsewhere: Duration,
    /// Where the record of the call finds what it came to.
    pub(super) receipt: Receipt,
}

impl Trail {
    pub(super) fn note(&mut self, target: &Target, what: &str) {
        // A caller's model names are not trusted with a header's length.
        if self.text.len() < 1024 {
            self.text.push_str(if self.text.is_empty() { "" } else { ", " });
            self.text.push_str(&target.provider);
            self.text.push('/');
            self.text.extend(target.model.chars().filter(char::is_ascii_graphic).take(96));
            self.text.push('=');
            self.text.push_str(what);
        }
    }
}

impl Relay {
    /// Steps in order, each as often as it may, until one answers.
    pub(super) async fn attempts(&self, mut ask: Ask, trail: &mut Trail) -> Result<Begun> {
        // Kept for as long as the call lasts, so it is counted.
        let config = Arc::clone(&self.parts.config.get());
        let upstream = &config.upstream;
        let deadline = Instant::now() + upstream.total_timeout;
        let mut last: Option<Result<Begun>> = None;
        let mut taken = 0;
        while let Some(step) = ask.next_step() {
            let step = match step {
                Ok(step) => step,
                // The caller's own step that cannot be taken is the caller's mistake; a fallback that cannot is skipped.
                Err(error) if taken == 0 && last.is_none() && ask.plan.most == 1 => return Err(error),
                Err(error) => {
                    taken += 1;
                    last = Some(last.unwrap_or(Err(error)));
                    continue;
                }
            };
            taken += 1;
            let is_last = taken >= ask.plan.most;
            if taken > 1 {
                self.parts.metrics.gateway_fallbacks.with_label_values(&[label(&step.target.provider)]).inc();
            }
            let watched = watched(&ask, &step);
            let pass = self.parts.fallback.probe(&watched, Millis::now()).await;
            // When nothing else is left, a target that rests is better than none.
            let Some(pass) = pass.or(is_last.then_some(Pass::Anyway)) else {
                trail.note(&step.target, "resting");
                continue;
            };
            let turn = Turn { step: &step, watched, is_last, deadline, upstream };
            match self.take(&ask, turn, pass, trail).await {
                Ok(begun) if begun.status.is_success() || is_last => return Ok(begun),
                // What is wrong with the request is wrong with it everywhere, unless the caller lists steps to be tried.
                Ok(begun) if begun.status.as_u16() == 400 && !ask.tries_all => return Ok(begun),
                outcome => last = Some(outcome),
            }
            if deadline <= Instant::now() {
                break;
            }
        }
        last.unwrap_or_else(|| {
            Err(Error::new(Kind::Unreachable, "All targets rest after failures; try again in a moment.")
                .with_retry_after(Duration::from_secs(5)))
        })
    }

    /// One step, as often as it may be tried.
    async fn take(&self, ask: &Ask, turn: Turn<'_>, pass: Pass, trail: &mut Trail) -> Result<Begun> {
        let Turn { step, watched, is_last, deadline, upstream } = turn;
        let metrics = &self.parts.metrics;
        let provider = label(&step.target.provider);
        let (settings, options) = (&ask.gateway.settings, &step.options);
        let most = options.max_attempts.or(settings.retry.max_attempts).unwrap_or(1);
        let delay = options.retry_delay.or(settings.retry.delay).unwrap_or(RETRY_DELAY);
        let growth = options.backoff.or(settings.retry.backoff.map(growth)).unwrap_or_default();
        let backoff = Backoff::new(u64::from(most), delay.as_millis() as u64, growth);
        let first_byte = options.request_timeout.or(settings.timeouts.first_byte);
        let bill = match self.bill(ask, step, &trail.receipt, false).await {
            Ok(bill) => bill,
            Err(error) => {
                self.parts.fallback.settle(&watched, pass, Outcome::Abandoned, Millis::now());
                trail.note(&step.target, error.kind().as_str());
                return Err(error);
            }
        };
        let mut pass = Some(pass);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            // The very last try waits as long as a provider may take at all, and is handed on whatever it says.
            let is_last_try = is_last && attempt == backoff.attempts();
            let patience = match first_byte {
                Some(limit) if !is_last_try => limit,
                _ => step.timeouts.first_byte.unwrap_or(upstream.first_byte_timeout),
            };
            let sent = Instant::now();
            let limits = Limits { patience: patience.min(left), deadline, wary: !is_last_try, tally: bill.tally() };
            let outcome = self.try_once(ask, step, upstream, limits).await;
            let taken = sent.elapsed();
            trail.elsewhere += taken;
            let now = Millis::now();
            let pass = pass.take().unwrap_or(Pass::Closed);
            let (class, asked_ms, outcome) = match outcome {
                Ok(begun) if begun.status.as_u16() < 400 => {
                    let counts = self.counts.provider(provider);
                    counts.answered.inc();
                    counts.first_byte.observe(taken.as_secs_f64());
                    self.parts.fallback.settle(&watched, pass, Outcome::Answered, now);
                    trail.note(&step.target, begun.status.as_str());
                    return Ok(begun.billed(bill).signed(step, trail));
                }
                Ok(mut begun) => {
                    let body = timeout(FAILURE_PATIENCE, collect(&mut begun.pipe, MAX_FAILURE_BYTES)).await;
                    let body = body.ok().flatten().unwrap_or_default();
                    let status = begun.status.as_u16();
                    let class = classify(fallback::Failure::Answer { status, head: &body });
                    let header = |name: &str| begun.headers.get(name).and_then(|value| value.to_str().ok());
                    let asked_ms = fallback::retry_after_ms(header, now);
                    trail.note(&step.target, begun.status.as_str());
                    if let (401, Way::Upstream { sign, .. }) = (status, &step.way) {
                        self.forget_token(sign);
                    }
                    begun.pipe = Pipe::new(Source::Whole(Some(body)), ask.words, false);
                    (class, asked_ms, Ok(begun))
                }
                Err(Failure::Ours(error)) => {
                    self.parts.fallback.settle(&watched, pass, Outcome::Abandoned, now);
                    trail.note(&step.target, error.kind().as_str());
                    if error.kind() == Kind::AnswerBlocked {
                        // It was answered, and is to be paid for.
                        bill.settle(None, 0, false);
                    }
                    return Err(error);
                }
                Err(Failure::Fault(fault)) => {
                    trail.note(&step.target, word(&fault));
                    (class(&fault), None, Err(no_answer(&step.target, &fault)))
                }
            };
            metrics.upstream_attempts.common().with_label_values(&[provider, class.as_str()]).inc();
            // A caller's own bad key says nothing of the target.
            let theirs = matches!(class, Class::Credential | Class::Billing) && !step.stored_key;
            let told = if theirs { Outcome::Abandoned } else { Outcome::Failed(class) };
            self.parts.fallback.settle(&watched, pass, told, now);
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
            let asked_ms = asked_ms.map(|asked| asked.min(upstream.max_retry_after.as_millis() as u64));
            let after = match backoff.next(attempt, class, asked_ms, Some(left), chance()) {
                Next::Retry { after_ms } if self.parts.fallback.may_retry(&watched, now) => after_ms,
                _ => return outcome.map(|begun| begun.signed(step, trail)),
            };
            metrics.gateway_retries.with_label_values(&[provider]).inc();
            let pause = Duration::from_millis(after);
            trail.elsewhere += pause;
            sleep(pause).await;
        }
    }

    /// What a step may cost, held until its answer has ended. `again`: it goes on with a call that has been counted as a
    /// request.
    ///
    /// # Errors
    /// Which limit refuses it.
    pub async fn bill(&self, ask: &Ask, step: &Step, receipt: &Receipt, again: bool) -> Result<Box<Bill>> {
        let (provider, model) = (&*step.target.provider, &*step.target.model);
        let is_local = matches!(step.way, Way::Local(_));
        let config = self.parts.config.get();
        let (key, metering) = (&ask.who.caller.key, &config.metering);
        let task = config.catalog.resolve(model).filter(|_| is_local).map(|entry| entry.task);
        let mut windows = Vec::new();
        ask.ruled.of_target(provider, model, task, &mut windows);
        windows.extend_from_slice(&step.budgets);
        if let Some(key) = key {
            limits::of_budget(key, &ask.who.caller.budget, true, &mut windows);
        }
        let told = ask.options.metadata.as_ref();
        for rule in &ask.gateway.settings.spend_limits {
            windows.extend(limits::of_spending(&ask.account, &ask.gateway.id, rule, told, (provider, model)));
        }
        if again {
            windows.retain(|window| window.counts != Counts::Requests);
        }
        let tariff = metering.tariffs.find(provider, model).filter(|_| !is_local);
        let (mut tokens, mut cost) = (0, Neurons::ZERO);
        if windows.iter().any(|window| window.counts != Counts::Requests) {
            let most = ask.most();
            tokens = u64::from(most.total_tokens());
            let listed = match is_local {
                true => config.catalog.resolve(model).map(|entry| entry.price.charge(&most)),
                false => tariff.map(|tariff| tariff.charge(&most)),
            };
            // What has no price may cost something all the same: a budget that is used up lets it not through either.
            cost = listed.unwrap_or_default().max(Neurons::from_micro(1));
        }
        let model = ModelId::new(model);
        let mut reservation = None;
        if !is_local || !windows.is_empty() {
            let plan =
                config.accounts.iter().find(|account| account.id == ask.account).and_then(|account| account.plan);
            let claim = Claim {
                request: ask.who.id,
                account: &ask.account,
                plan: limits::plan(&plan.unwrap_or(metering.plan)),
                windows: &windows,
                tokens,
                neurons: Neurons::ZERO,
                cost,
                is_once: false,
            };
            reservation = Some(self.parts.ledger.claim(&claim, Millis::now()).await.map_err(|denied| {
                self.parts.metrics.refused_by_limits.with_label_values(&[limits::label(&denied)]).inc();
                limits::refusal(denied, provider, &model)
            })?);
        }
        // What is held is large, and the bill goes from hand to hand.
        Ok(Box::new(Bill {
            reservation,
            key: key.clone(),
            gateway: ask.gateway.id.clone(),
            provider: self.counts.provider(label(provider)).slug(provider),
            model,
            custom: ask.options.custom_cost,
            pricing: match is_local {
                true => Pricing::Local(Tally::default()),
                false => Pricing::Listed(tariff.copied()),
            },
            stored_key: step.stored_key,
            asked: ask.body.len(),
            receipt: receipt.clone(),
        }))
    }

    /// One attempt, up to an answer that can be handed on.
    async fn try_once(
        &self,
        ask: &Ask,
        step: &Step,
        upstream: &config::Upstream,
        limits: Limits,
    ) -> Result<Begun, Failure> {
        let late = |what| Failure::Fault(Fault::Timeout(what));
        let head = timeout(limits.patience, self.head(ask, step, upstream, &limits)).await;
        let (status, mut headers, source) = head.unwrap_or_else(|_| Err(late("the first byte")))?;
        let events = is_events(&headers);
        let limit = upstream.max_answer_bytes;
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let (encoding, kind) = (text("content-encoding"), text("content-type"));
        let mut pipe = Pipe::new(source, ask.words, events);
        if !matches!(step.way, Way::Local(_)) && status.is_success() {
            let meter = Meter::new(kind);
            pipe = pipe.metered(meter, encoding, limit);
            if step.speech.is_verbatim() && encoding.is_none_or(|encoding| encoding == "identity") {
                pipe = pipe.watched(Watch::new(step.dialect, kind.unwrap_or_default()));
            }
        }
        // What is read to its end first may take as long as it keeps coming.
        let until = tokio::time::Instant::from_std(limits.deadline);
        if !step.speech.is_verbatim() {
            let translated = Box::pin(self.translated(ask, step, status, &mut headers, pipe, limit));
            pipe = timeout_at(until, translated).await.unwrap_or_else(|_| Err(late("the whole answer")))?;
        }
        if !ask.gateway.guard.ignores_responses() && status.is_success() {
            let checked = Box::pin(checked(&ask.gateway, &mut headers, pipe, ask.words, limit));
            pipe = timeout_at(until, checked).await.unwrap_or_else(|_| Err(late("the whole answer")))?;
        }
        Ok(Begun { status, headers, pipe, saved: Neurons::ZERO })
    }

    /// Up to the head of an answer; where one is wary, up to its first content, since something else can be tried.
    async fn head(
        &self,
        ask: &Ask,
        step: &Step,
        upstream: &config::Upstream,
        limits: &Limits,
    ) -> Result<(StatusCode, Headers, Source), Failure> {
        let gateway = &ask.gateway;
        let (mut status, mut headers, mut source) = match &step.way {
            Way::Local(call) => {
                let who = Who { tally: limits.tally.clone(), ..ask.who.clone() };
                let answer = (self.local)(call.clone(), who, ask.gateway.id.clone()).await;
                (answer.status, answer.headers, Source::Local(answer.body))
            }
            Way::Upstream { attempt, sign } => {
                let is_ready = matches!(sign, Sign::Ready) && gateway.guard.ignores_responses();
                let signed = if is_ready { None } else { Box::pin(self.signed(attempt, sign, gateway)).await? };
                let answer = self.client.send(signed.as_ref().unwrap_or(attempt)).await;
                let Answer { status, headers, body } = answer.map_err(Failure::Fault)?;
                let idle = gateway.settings.timeouts.idle.or(step.timeouts.idle).unwrap_or(upstream.idle_timeout);
                let whole = gateway.settings.timeouts.request.or(step.timeouts.request);
                let status = StatusCode::from_u16(status.as_u16()).unwrap_or(StatusCode::BAD_GATEWAY);
                (status, callers(&headers), Source::Upstream(VecDeque::new(), body.with_patience(idle, whole)))
            }
        };
        if let Source::Upstream(held, body) = &mut source
            && limits.wary
            && status.is_success()
            && let Some(opening) =
                Opening::new(step.dialect, headers.get("content-type").and_then(|it| it.to_str().ok()))
        {
            match Box::pin(opened(body, opening)).await.map_err(Failure::Fault)? {
                Opened::Good(chunks) => *held = chunks,
                Opened::Failed(told, body) => {
                    status = told;
                    headers.insert(&CONTENT_TYPE, HeaderValue::from_static("application/json"));
                    source = Source::Whole(Some(body));
                }
            }
        }
        if let Source::Upstream(held, body) = &mut source
            && held.is_empty()
            && is_events(&headers)
            && let Ok(Some(chunk)) = timeout(COMPANY, body.chunk()).await
        {
            held.push_back(chunk.map_err(Failure::Fault)?);
        }
        Ok((status, headers, source))
    }

    /// Puts an answer into the caller's words.
    async fn translated(
        &self,
        ask: &Ask,
        step: &Step,
        status: StatusCode,
        headers: &mut Headers,
        mut pipe: Pipe,
        limit: usize,
    ) -> Result<Pipe, Failure> {
        let speech = step.speech;
        let encoding = headers.remove("content-encoding");
        if status.is_success() && encoding.is_some_and(|encoding| encoding != "identity") {
            let why = "the answer is compressed, which it was asked not to be";
            return Err(Failure::Fault(Fault::Broken(why.into())));
        }
        let meta = Meta {
            id: format!("chatcmpl-{}", ask.who.id.simple()),
            created: Millis::now().seconds(),
            model: format!("{}/{}", step.target.provider, step.target.model),
        };
        let streams = is_events(headers) || is_frames(headers);
        if status.is_success() && streams {
            headers.insert(&CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            let to_messages = speech.to_messages.then(|| messages::Translator::new(meta.model.clone()));
            let to_openai = speech.to_openai.then(|| Translator::new(step.dialect, meta, speech.include_usage));

            return Ok(pipe.translated(to_openai, to_messages));
        }
        let body = collect(&mut pipe, limit).await;
        let Some(mut body) = body else {
            return Err(Failure::Fault(Fault::Broken("the answer broke off, or is too large to be translated".into())));
        };
        headers.insert(&CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status.is_success() {
            let unreadable = |error: Error| Failure::Fault(Fault::Broken(error.message().to_owned()));
            if speech.to_openai {
                body = provider::answer(step.dialect, &meta, &body).map_err(unreadable)?;
            }
            if speech.to_messages {
                body = messages::answer(&body).map_err(unreadable)?;
            }
        } else {
            if speech.to_openai {
                (_, body) = provider::failure(step.dialect, status.as_u16(), &body);
            }
            if speech.to_messages {
                (_, body) = messages::failure(status.as_u16(), &body);
            }
        }
        let usage = pipe.usage();
        let words = ask.words;
        Ok(Pipe::new(Source::Whole(Some(body)), words, false).with_usage(usage))
    }
}

/// A step when its turn has come.
struct Turn<'a> {
    step: &'a Step,
    /// The target as breakers know it.
    watched: Target,
    /// Nothing comes behind it.
    is_last: bool,
    deadline: Instant,
    upstream: &'a config::Upstream,
}

/// What an attempt may take.
struct Limits {
    /// To the head of its answer.
    patience: Duration,
    /// Of the whole call.
    deadline: Instant,
    /// Something else can be tried.
    wary: bool,
    /// Where the engine of this process says what it used, if it is asked.
    tally: Option<Tally>,
}

/// Why an attempt brought no answer.
pub(super) enum Failure {
    /// Of the way there.
    Fault(Fault),
    /// Of ours: trying again changes nothing.
    Ours(Error),
}

impl Begun {
    /// Says who answered and what was tried before.
    /// What it costs goes with it.
    fn billed(self, bill: Box<Bill>) -> Self {
        let Self { status, headers, pipe, saved } = self;
        Self { status, headers, pipe: pipe.billed(bill), saved }
    }

    fn signed(mut self, step: &Step, trail: &Trail) -> Self {
        let mut values = headers::Values::with_capacity(128);
        let mut say = |name: &HeaderName, value: &str| {
            if let Some(value) = values.make(value) {
                self.headers.insert(name, value);
            }
        };
        say(&headers::STEP, itoa::Buffer::new().format(step.index));
        say(&headers::PROVIDER, &step.target.provider);
        say(&headers::MODEL, &step.target.model);
        say(&headers::ATTEMPTS, &trail.text);
        if let Some(route) = &step.route {
            say(&headers::ROUTING_REASON, route);
        }
        self
    }
}

/// How a stream began.
enum Opened {
    /// With content, or for so long without that it is handed on. All that came of it.
    Good(VecDeque<Bytes>),
    /// With a failure, as if its status had said so.
    Failed(StatusCode, Bytes),
}

/// Reads a stream until it says something. Who accepts a call and cannot serve it says so at once: whoever is silent for
/// [`OPENING`] is thinking.
async fn opened(body: &mut AnswerBody, mut opening: Opening) -> Result<Opened, Fault> {
    let until = tokio::time::Instant::now() + OPENING;
    loop {
        let Ok(chunk) = timeout_at(until, body.chunk()).await else { break };
        let verdict = match chunk {
            Some(chunk) => opening.feed(&chunk?),
            None => match opening.end() {
                Verdict::Hold => return Err(Fault::Broken("the stream ended before it said anything".into())),
                verdict => verdict,
            },
        };
        match verdict {
            Verdict::Hold => {}
            Verdict::Release => break,
            Verdict::Failed { status, body } => {
                return Ok(Opened::Failed(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY), body));
            }
        }
    }
    Ok(Opened::Good(opening.into_chunks()))
}

/// An upstream's headers for the caller: without what belongs to its connection, or to nobody but its own site.
fn callers(theirs: &http::HeaderMap) -> Headers {
    let mut headers = Headers::with_capacity(theirs.len() + 8);
    for (name, value) in theirs.iter().filter(|(name, _)| !is_connections(name.as_str())) {
        let name = HeaderName::from_bytes(name.as_str().as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value.as_bytes())) {
            headers.append(name, value);
        }
    }
    headers
}

fn is_connections(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "transfer-encoding"
            | "content-length"
            | "te"
            | "trailer"
            | "upgrade"
            | "proxy-authenticate"
            | "set-cookie"
    )
}

pub(super) fn content_type(headers: &Headers) -> &str {
    headers.text("content-type")
}

pub(super) fn is_events(headers: &Headers) -> bool {
    content_type(headers).starts_with("text/event-stream")
}

/// Bedrock's streams.
pub(super) fn is_frames(headers: &Headers) -> bool {
    content_type(headers).starts_with("application/vnd.amazon.eventstream")
}

/// Lets rules look at an answer: at a stream as it goes by, at anything else before any of it is seen.
async fn checked(
    gateway: &Gateway,
    headers: &mut Headers,
    mut pipe: Pipe,
    words: Words,
    limit: usize,
) -> Result<Pipe, Failure> {
    if headers.get("content-encoding").is_some_and(|encoding| encoding != "identity") {
        let why = "the answer is compressed, and rules of this gateway are to read it";
        return Err(Failure::Fault(Fault::Broken(why.into())));
    }
    let kind = content_type(headers).to_owned();
    if is_events(headers) || is_frames(headers) {
        return Ok(pipe.guarded(gateway.guard.stream(&kind, guard::HOLD)));
    }
    let Some(body) = collect(&mut pipe, limit).await else {
        return Err(Failure::Fault(Fault::Broken("the answer broke off, or is too large to be checked".into())));
    };
    let verdict = gateway.guard.response(&body, &kind);
    if let Some(finding) = verdict.blocked {
        let message = format!("The response was blocked by the rule `{}` ({})", finding.rule, finding.what);
        return Err(Failure::Ours(Error::new(Kind::AnswerBlocked, message)));
    }
    let usage = pipe.usage();
    Ok(Pipe::new(Source::Whole(Some(body)), words, false).with_usage(usage).with_flags(verdict.flags))
}

/// All that is left, if it comes whole and is not more than `limit` bytes.
pub(super) async fn collect(pipe: &mut Pipe, limit: usize) -> Option<Bytes> {
    let mut gather = Gather::default();
    while let Some(chunk) = poll_fn(|cx| pipe.poll_chunk(cx)).await {
        if !gather.push(chunk.ok()?, limit) {
            return None;
        }
    }
    matches!(pipe.end(), Some(End::Whole)).then(|| gather.whole())
}

fn growth(written: config::gateway::Backoff) -> Growth {
    match written {
        config::gateway::Backoff::Constant => Growth::Constant,
        config::gateway::Backoff::Linear => Growth::Linear,
        config::gateway::Backoff::Exponential => Growth::Exponential,
    }
}

/// The target as breakers know it: two accounts' custom providers may share a name and nothing else.
fn watched(ask: &Ask, step: &Step) -> Target {
    let Target { provider, model } = &step.target;
    if !provider.starts_with("custom-") {
        return step.target.clone();
    }
    Target { provider: format!("{}:{provider}", ask.account).into(), model: model.clone() }
}

pub(super) fn no_answer(target: &Target, fault: &Fault) -> Error {
    let provider = &target.provider;
    match fault {
        Fault::Timeout(what) => {
            Error::new(Kind::UpstreamTimeout, format!("{provider} did not answer in time ({what})."))
        }
        Fault::Refused(why) => Error::new(Kind::NoSuchProvider, format!("{provider} is not called: {why}")),
        Fault::Connect(why) | Fault::Broken(why) => {
            Error::new(Kind::Unreachable, format!("No answer from {provider}: {why}"))
        }
    }
}

/// For the trail of a call.
pub(super) fn word(fault: &Fault) -> &'static str {
    match fault {
        Fault::Refused(_) => "refused",
        Fault::Connect(_) => "unreachable",
        Fault::Broken(_) => "broken",
        Fault::Timeout(_) => "timeout",
    }
}

fn class(fault: &Fault) -> Class {
    match fault {
        Fault::Refused(_) => Class::Caller,
        Fault::Connect(_) | Fault::Broken(_) => classify(fallback::Failure::Transport),
        Fault::Timeout(_) => classify(fallback::Failure::Timeout),
    }
}

/// A number for jitter.
fn chance() -> u64 {
    RequestId::random().low_bits()
}
