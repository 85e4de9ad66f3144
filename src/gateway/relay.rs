//! The life of a call that goes through a gateway, whoever answers it.
//!
//!     Ask --rules--> cache --Hit-----------------------------------------------------> Reply
//!                      |--Fill--> a task of its own: attempts --> shared answer --+
//!                      |--Follow: somebody asks the same at this moment ----------+--> Reply
//!                      '--not for keeping: attempts ---------------------------------> Reply
//!
//!     attempts:  step 1: try, wait, try ...  |  step 2  |  ...  until one answers; then the answer has begun
//!
//! Up to the head of an answer everything can be tried again; afterwards nothing can. One worker's relay: it knows the
//! engine of this process only as a function.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::body::BoxBody;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::unfold;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use hyper::upgrade::Upgraded;
use tokio::time::{sleep, timeout};

use crate::base::{AccountId, Error, Kind, Millis, RequestId, Result};
use crate::cache::{self, Cache, Entry, FailedAnswer, FillTicket, Follower, Found, Lead, Material, Scope};
use crate::config::gateway::KeyFiles;
use crate::config::{self, Live};
use crate::fallback::{self, Backoff, Class, Fallback, Growth, Next, Outcome, Pass, Policy, Target, classify};
use crate::gateway::limits::RouteLimits;
use crate::gateway::options::Options;
use crate::gateway::pipe::{End, Pipe, Source, Words, broke_off};
use crate::gateway::record::{CacheUse, Record, label};
use crate::gateway::step::{LocalCall, Sign, Step, Way};
use crate::guard;
use crate::metrics::Metrics;
use crate::net::client::{self, Answer, Attempt, Client, Fault, Origin};
use crate::net::sigv4;
use crate::net::vertex::{AccessToken, Age, ServiceAccount};
use crate::provider::{self, Meta, Meter, Translator, messages};
use crate::registry::{Gateway, Registry};
use crate::vault::Caller;
use crate::vault::seal::Sealer;

/// How long an answer is kept that only a custom key asks to keep.
const KEY_ALONE_TTL: Duration = Duration::from_secs(300);
/// Before a second attempt, where nobody says otherwise.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// Most of a failed answer that is kept, to be judged and to be handed on if nothing better comes.
const MAX_FAILURE_BYTES: usize = 256 * 1024;
/// How long a failed answer may take to say what failed.
const FAILURE_PATIENCE: Duration = Duration::from_secs(10);

/// What all workers' relays share.
#[derive(Clone)]
pub struct Parts {
    /// Configuration in force.
    pub config: Live,
    /// Gateways, custom providers, stored keys, routes.
    pub registry: Registry,
    /// Answers that are given again.
    pub cache: Cache,
    /// How targets do.
    pub fallback: Fallback,
    /// How often limits of routes were passed.
    pub limits: RouteLimits,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

impl Parts {
    /// Opens what the configuration names: what was told before, answers that are kept.
    ///
    /// # Errors
    /// When a folder, a master key or what the file says of gateways cannot be used.
    pub fn start(live: &Live, metrics: &Arc<Metrics>) -> Result<Self> {
        let config = live.get();
        let KeyFiles { named, default, previous } = &config.key_files;
        let sealer = Sealer::open_files(named.as_deref(), default.as_deref(), previous)?;
        let registry = Registry::start(config.registry.as_deref(), config.fixed.clone(), sealer)?;
        let config::Cache { memory_bytes, disk_bytes, max_entries, max_entry_bytes, folder } = config.cache.clone();
        let cache = Cache::start(cache::Settings { memory_bytes, disk_bytes, max_entries, max_entry_bytes, folder })?;
        let fallback = Fallback::start(Policy::default());
        let limits = RouteLimits::default();
        Ok(Self { config: live.clone(), registry, cache, fallback, limits, metrics: metrics.clone() })
    }
}

/// How workers' clients reach other servers.
///
/// # Errors
/// When the certificate authorities of the configuration cannot be read.
pub fn clients(upstream: &config::Upstream) -> Result<client::Settings> {
    let tls = client::Tls::new(upstream.authorities.as_deref())
        .map_err(|why| Error::bad_input(format!("upstream.ca_file {why}")))?;
    Ok(client::Settings {
        connect_timeout: upstream.connect_timeout,
        allow_private: upstream.allow_private,
        proxy: upstream.proxy.clone(),
        tls,
    })
}

/// Serves calls through gateways, on one HTTP worker.
pub struct Relay {
    /// What it has in common with others.
    pub parts: Parts,
    client: Client,
    local: Local,
    tokens: RefCell<HashMap<String, AccessToken>>,
}

/// The engine of this process, as the HTTP floor serves it.
pub type Local = Rc<dyn Fn(LocalCall, Who) -> LocalBoxFuture<'static, LocalAnswer>>;

/// What the engine answers.
pub struct LocalAnswer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// What follows.
    pub body: BoxBody,
}

/// Who is asking.
#[derive(Clone)]
pub struct Who {
    /// This request.
    pub id: RequestId,
    /// With which rights.
    pub caller: Caller,
    /// On whose bill the engine computes; `None`: it does not.
    pub engine: Option<Caller>,
    /// When its head arrived.
    pub received: Instant,
}

/// A call, parsed and authenticated.
pub struct Ask {
    /// Who asks.
    pub who: Who,
    /// Whose gateway.
    pub account: AccountId,
    /// Through which.
    pub gateway: Arc<Gateway>,
    /// What is tried, one after the other. Asked for the next when the last one failed.
    pub plan: Plan,
    /// What was said for all of them.
    pub options: Rc<Options>,
    /// A step that is refused as a bad request is not the end either: the caller lists steps of its own.
    pub tries_all: bool,
    /// How the caller reads.
    pub words: Words,
    /// The provider in the address, or the name of the form.
    pub provider: Box<str>,
    /// What identifies the request: its method, path and query, and its body.
    pub method: Method,
    /// See `method`.
    pub endpoint: String,
    /// See `method`.
    pub body: Bytes,
    /// Of the body.
    pub content_type: Option<String>,
    /// The caller's own credentials for providers: part of what identifies the request.
    pub credentials: Vec<u8>,
}

/// The steps of a call.
pub struct Plan {
    /// The next one; an error is a step that cannot be taken.
    pub next: Box<dyn FnMut() -> Option<Result<Step>>>,
    /// How many there are at most.
    pub most: usize,
}

impl Plan {
    /// One step after the other.
    pub fn list(steps: Vec<Result<Step>>) -> Self {
        let most = steps.len();
        let mut steps = steps.into_iter();
        Self { next: Box::new(move || steps.next()), most }
    }
}

/// An answer that has begun.
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// What the upstream said, without what belongs to its connection, and what the gateway says.
    pub headers: HeaderMap,
    /// What follows.
    pub pipe: Pipe,
    /// Closes with it.
    pub record: Record,
}

/// What attempts came to.
struct Begun {
    status: StatusCode,
    /// What the upstream said, and who answered.
    headers: HeaderMap,
    pipe: Pipe,
}

/// What was tried, for the log and for a header.
#[derive(Default)]
struct Trail {
    text: String,
    tried: usize,
    /// Waited for others.
    elsewhere: Duration,
}

impl Trail {
    fn note(&mut self, target: &Target, what: impl std::fmt::Display) {
        self.tried += 1;
        // A caller's model names are not trusted with a header's length.
        if self.text.len() < 1024 {
            let gap = if self.text.is_empty() { "" } else { ", " };
            let model: String = target.model.chars().filter(char::is_ascii_graphic).take(96).collect();
            let _ = write!(self.text, "{gap}{}/{model}={what}", target.provider);
        }
    }
}

impl Relay {
    /// A relay with a client of its own.
    pub fn new(parts: Parts, client: Client, local: Local) -> Self {
        Self { parts, client, local, tokens: RefCell::default() }
    }

    /// Serves a call up to the head of its answer.
    ///
    /// # Errors
    /// The gateway's own refusals, and `Unreachable` or `UpstreamTimeout` where nobody answered. Whatever an upstream says
    /// itself is a reply.
    pub async fn serve(self: &Rc<Self>, ask: Ask) -> Result<Reply> {
        let mut record = Record::begin(&self.parts.metrics, &ask);
        let mut trail = Trail::default();
        let outcome = self.answer(ask, &mut record, &mut trail).await;
        record.waited(trail.elsewhere);
        match outcome {
            Ok((begun, cache)) => Ok(finish(begun, cache, record)),
            Err(error) => {
                record.refused(&error, &trail.text);
                Err(error)
            }
        }
    }

    /// Hands a handshake for a WebSocket to the provider of a call's first step.
    ///
    /// # Errors
    /// As [`Relay::serve`].
    pub async fn upgrade(&self, mut ask: Ask) -> Result<(HeaderMap, Upgraded, Record)> {
        let mut record = Record::begin(&self.parts.metrics, &ask);
        let mut trail = Trail::default();
        let outcome = self.handshake(&mut ask, &mut trail).await;
        record.waited(trail.elsewhere);
        match outcome {
            Ok((mut headers, upgraded, target)) => {
                record.begun(
                    StatusCode::SWITCHING_PROTOCOLS,
                    CacheUse::Off,
                    &target.provider,
                    &target.model,
                    0,
                    &trail.text,
                );
                headers.insert("cf-aig-step", HeaderValue::from_static("0"));
                if let Some(log) = record.log
                    && let Ok(value) = HeaderValue::from_str(&log.to_string())
                {
                    headers.insert("cf-aig-log-id", value);
                }
                Ok((headers, upgraded, record))
            }
            Err(error) => {
                record.refused(&error, &trail.text);
                Err(error)
            }
        }
    }

    async fn handshake(&self, ask: &mut Ask, trail: &mut Trail) -> Result<(HeaderMap, Upgraded, Target)> {
        let step = (ask.plan.next)().unwrap_or_else(|| Err(Error::internal("a call without steps")))?;
        let Way::Upstream { attempt, sign } = &step.way else {
            return Err(Error::unsupported("The models of this server have no realtime sockets."));
        };
        let failed = |failure| match failure {
            Failure::Ours(error) => error,
            Failure::Fault(fault) => no_answer(&step.target, &fault),
        };
        let signed = self.signed(attempt, sign, &ask.gateway).await.map_err(failed)?;
        let mut attempt = signed.unwrap_or_else(|| attempt.clone());
        attempt.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        attempt.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        let patience = self.parts.config.get().upstream.first_byte_timeout;
        let began = Instant::now();
        let outcome = timeout(patience, self.client.upgrade(&attempt)).await;
        trail.elsewhere += began.elapsed();
        let outcome = outcome.unwrap_or(Err(Fault::Timeout("the handshake")));
        trail.note(&step.target, outcome.as_ref().map_or_else(word, |_| "101"));
        let (headers, upgraded) = outcome.map_err(|fault| no_answer(&step.target, &fault))?;
        Ok((headers, upgraded, step.target))
    }

    async fn answer(self: &Rc<Self>, ask: Ask, record: &mut Record, trail: &mut Trail) -> Result<(Begun, CacheUse)> {
        let verdict = ask.gateway.guard.request(&ask.body, ask.content_type.as_deref().unwrap_or_default());
        record.flags(&verdict.flags);
        if let Some(finding) = verdict.blocked {
            record.blocked(&finding);
            let message = format!("The prompt was blocked by the rule `{}` ({})", finding.rule, finding.what);
            return Err(Error::new(Kind::PromptBlocked, message));
        }
        let Some(keep) = kept_for(&ask) else {
            return Ok((self.attempts(ask, trail).await?, CacheUse::Off));
        };
        let keying = Keying::of(&ask);
        let auth = [ask.credentials.as_slice()];
        let material = keying.material(&ask, &auth);
        let raw = material.raw();
        let now = Millis::now();
        let cache = &self.parts.cache;
        let found = if ask.options.skip_cache == Some(true) {
            Found::Fill(cache.refresh(material.key(&raw)))
        } else if let Some(entry) = cache.peek(&raw, now) {
            Found::Hit(entry)
        } else {
            // Only now: a key over what the bytes mean takes reading them.
            cache.lookup(material.key(&raw), now).await
        };
        match found {
            Found::Hit(entry) => Ok((hit(entry, ask.words), CacheUse::Hit)),
            Found::Off => Ok((self.attempts(ask, trail).await?, CacheUse::Off)),
            Found::Fill(ticket) => {
                let (follower, words) = (ticket.follow(), ask.words);
                self.fill(ticket, ask, keep);
                self.follow(follower, None, words, keep, trail).await
            }
            Found::Follow(follower) => {
                let words = ask.words;
                self.follow(follower, Some(ask), words, keep, trail).await
            }
        }
    }

    /// Reads an answer that is being written, by this call's own task or by another's. `ask` is there as long as this call
    /// may have to become the one that asks.
    async fn follow(
        self: &Rc<Self>,
        mut follower: Follower,
        mut ask: Option<Ask>,
        words: Words,
        keep: Duration,
        trail: &mut Trail,
    ) -> Result<(Begun, CacheUse)> {
        let began = Instant::now();
        loop {
            let lead = follower.head().await;
            trail.elsewhere = began.elapsed();
            match lead {
                Lead::Head(head) => {
                    let (status, headers) = known_head(&head);
                    let events = is_events(&headers);
                    let chunks = unfold(follower, |mut follower| async {
                        let chunk = follower.next().await?;
                        Some((chunk, follower))
                    });
                    let pipe = Pipe::new(Source::Shared(chunks.boxed_local()), words, events);
                    let cache = if ask.is_some() { CacheUse::Coalesced } else { CacheUse::Miss };
                    return Ok((Begun { status, headers, pipe }, cache));
                }
                Lead::Lead(ticket) => match ask.take() {
                    Some(ask) => self.fill(ticket, ask, keep),
                    None => return Err(Error::internal("a call was to lead twice")),
                },
                Lead::Failed(FailedAnswer::Answer { head, body }) => {
                    let (status, headers) = known_head(&head);
                    let pipe = Pipe::new(Source::Whole(Some(body)), words, false);
                    return Ok((Begun { status, headers, pipe }, CacheUse::Miss));
                }
                Lead::Failed(FailedAnswer::Error(error)) => return Err(error),
                Lead::Failed(FailedAnswer::Abandoned) => {
                    return Err(Error::new(Kind::Unreachable, "The answer broke off before it began; try again."));
                }
            }
        }
    }

    /// Gets an answer for all who wait for it, in a task that outlives the caller it came from.
    fn fill(self: &Rc<Self>, mut ticket: FillTicket, ask: Ask, keep: Duration) {
        let relay = self.clone();
        actix_web::rt::spawn(async move {
            let mut trail = Trail::default();
            let mut begun = match relay.attempts(ask, &mut trail).await {
                Ok(begun) => begun,
                Err(error) => return ticket.fail(FailedAnswer::Error(error)),
            };
            let head = cached_head(&begun);
            if !begun.status.is_success() {
                let body = collect(&mut begun.pipe, MAX_FAILURE_BYTES).await.unwrap_or_default();
                return ticket.fail(FailedAnswer::Answer { head: Arc::new(head), body });
            }
            let keep = is_keepable(&begun.headers).then_some(keep);
            ticket.begin(head, keep);
            loop {
                match poll_fn(|cx| begun.pipe.poll_chunk(cx)).await {
                    Some(Ok(chunk)) => {
                        if ticket.push(chunk).await.is_err() {
                            return;
                        }
                    }
                    Some(Err(fault)) => {
                        return ticket.fail(FailedAnswer::Error(broke_off(&fault)));
                    }
                    None => {
                        return match begun.pipe.end() {
                            Some(End::Whole) => ticket.finish(),
                            Some(End::Broken(error)) => {
                                let error = error.clone();
                                ticket.fail(FailedAnswer::Error(error));
                            }
                            Some(End::Blocked(_)) | None => ticket.fail(FailedAnswer::Abandoned),
                        };
                    }
                }
            }
        });
    }

    /// Steps in order, each as often as it may, until one answers.
    async fn attempts(&self, mut ask: Ask, trail: &mut Trail) -> Result<Begun> {
        let upstream = self.parts.config.get().upstream.clone();
        let deadline = Instant::now() + upstream.total_timeout;
        let mut last: Option<Result<Begun>> = None;
        let mut taken = 0;
        while let Some(step) = (ask.plan.next)() {
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
            let turn = Turn { step: &step, watched, is_last, deadline, upstream: &upstream };
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
        let mut pass = Some(pass);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            // The very last try waits as long as a provider may take at all.
            let patience = match first_byte {
                Some(limit) if !(is_last && attempt == backoff.attempts()) => limit,
                _ => step.timeouts.first_byte.unwrap_or(upstream.first_byte_timeout),
            };
            let sent = Instant::now();
            let outcome = timeout(patience.min(left), self.try_once(ask, step, upstream)).await;
            let outcome = outcome.unwrap_or(Err(Failure::Fault(Fault::Timeout("the first byte"))));
            let taken = sent.elapsed();
            trail.elsewhere += taken;
            let now = Millis::now();
            let pass = pass.take().unwrap_or(Pass::Closed);
            let (class, asked_ms, outcome) = match outcome {
                Ok(begun) if begun.status.as_u16() < 400 => {
                    metrics.upstream_attempts.with_label_values(&[provider, "ok"]).inc();
                    metrics.upstream_first_byte.with_label_values(&[provider]).observe(taken.as_secs_f64());
                    self.parts.fallback.settle(&watched, pass, Outcome::Answered, now);
                    trail.note(&step.target, begun.status.as_u16());
                    return Ok(begun.signed(step, trail));
                }
                Ok(mut begun) => {
                    let body = timeout(FAILURE_PATIENCE, collect(&mut begun.pipe, MAX_FAILURE_BYTES)).await;
                    let body = body.ok().flatten().unwrap_or_default();
                    let status = begun.status.as_u16();
                    let class = classify(fallback::Failure::Answer { status, head: &body });
                    let header = |name: &str| begun.headers.get(name).and_then(|value| value.to_str().ok());
                    let asked_ms = fallback::retry_after_ms(header, now);
                    trail.note(&step.target, status);
                    begun.pipe = Pipe::new(Source::Whole(Some(body)), ask.words, false);
                    (class, asked_ms, Ok(begun))
                }
                Err(Failure::Ours(error)) => {
                    self.parts.fallback.settle(&watched, pass, Outcome::Abandoned, now);
                    trail.note(&step.target, error.kind().as_str());
                    return Err(error);
                }
                Err(Failure::Fault(fault)) => {
                    trail.note(&step.target, word(&fault));
                    (class(&fault), None, Err(no_answer(&step.target, &fault)))
                }
            };
            metrics.upstream_attempts.with_label_values(&[provider, class.as_str()]).inc();
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

    /// One attempt, up to the head of an answer.
    async fn try_once(&self, ask: &Ask, step: &Step, upstream: &config::Upstream) -> Result<Begun, Failure> {
        let gateway = &ask.gateway;
        let (status, mut headers, source) = match &step.way {
            Way::Local(call) => {
                let answer = (self.local)(call.clone(), ask.who.clone()).await;
                (answer.status, answer.headers, Source::Local(answer.body))
            }
            Way::Upstream { attempt, sign } => {
                let answer = match self.signed(attempt, sign, gateway).await? {
                    Some(signed) => self.client.send(&signed).await,
                    None => self.client.send(attempt).await,
                };
                let Answer { status, headers, body } = answer.map_err(Failure::Fault)?;
                let idle = gateway.settings.timeouts.idle.or(step.timeouts.idle).unwrap_or(upstream.idle_timeout);
                let whole = gateway.settings.timeouts.request.or(step.timeouts.request);
                (status, headers, Source::Upstream(body.with_patience(idle, whole)))
            }
        };
        cleanse(&mut headers);
        let events = is_events(&headers);
        let limit = upstream.max_answer_bytes;
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (encoding, kind) = (text(header::CONTENT_ENCODING), text(header::CONTENT_TYPE));
        let mut pipe = Pipe::new(source, ask.words, events);
        if !matches!(step.way, Way::Local(_)) && status.is_success() {
            let meter = Meter::new(kind.as_deref());
            pipe = pipe.metered(meter, encoding.as_deref(), limit);
        }
        if !step.speech.is_verbatim() {
            pipe = self.translated(ask, step, status, &mut headers, pipe, limit).await?;
        }
        if !gateway.guard.ignores_responses() && status.is_success() {
            pipe = checked(gateway, &mut headers, pipe, ask.words, limit).await?;
        }
        Ok(Begun { status, headers, pipe })
    }

    /// Puts an answer into the caller's words.
    async fn translated(
        &self,
        ask: &Ask,
        step: &Step,
        status: StatusCode,
        headers: &mut HeaderMap,
        mut pipe: Pipe,
        limit: usize,
    ) -> Result<Pipe, Failure> {
        let speech = step.speech;
        headers.remove(header::CONTENT_ENCODING);
        let meta = Meta {
            id: format!("chatcmpl-{}", ask.who.id.simple()),
            created: Millis::now().seconds(),
            model: format!("{}/{}", step.target.provider, step.target.model),
        };
        let streams = is_events(headers) || is_frames(headers);
        if status.is_success() && streams {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            let to_messages = speech.to_messages.then(|| messages::Translator::new(meta.model.clone()));
            let to_openai = speech.to_openai.then(|| Translator::new(step.dialect, meta, speech.include_usage));

            return Ok(pipe.translated(to_openai, to_messages));
        }
        let body = collect(&mut pipe, limit).await;
        let Some(mut body) = body else {
            return Err(Failure::Fault(Fault::Broken("the answer broke off, or is too large to be translated".into())));
        };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
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

    /// The attempt with credentials of this moment; `None`: it has all it needs.
    async fn signed(&self, attempt: &Attempt, sign: &Sign, gateway: &Gateway) -> Result<Option<Attempt>, Failure> {
        let mut signed = match sign {
            Sign::Ready if gateway.guard.ignores_responses() => return Ok(None),
            _ => attempt.clone(),
        };
        if !gateway.guard.ignores_responses() {
            // What rules are to read must be readable.
            signed.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        match sign {
            Sign::Ready => {}
            Sign::Aws { credentials, region } => {
                // What a signature does not cover must not be there twice.
                signed.headers.remove(header::AUTHORIZATION);
                let path = attempt.path.path();
                let host = attempt.origin.authority.as_str();
                let kind = attempt.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                let mut covered = vec![("host", host)];
                covered.extend(kind.map(|kind| ("content-type", kind)));
                let request = sigv4::Request {
                    method: attempt.method.as_str(),
                    path,
                    query: attempt.path.query().unwrap_or_default(),
                    headers: &covered,
                    payload: sigv4::Payload::Bytes(&attempt.body),
                };
                let scope = sigv4::Scope { region, service: "bedrock" };
                for (name, value) in sigv4::sign(credentials, scope, &request, Millis::now()) {
                    set(&mut signed.headers, name, &value)?;
                }
            }
            Sign::Google(account) => {
                let token = self.google_token(account).await?;
                set(&mut signed.headers, "authorization", &format!("Bearer {token}"))?;
            }
        }
        Ok(Some(signed))
    }

    /// An access token, from memory or from Google.
    async fn google_token(&self, account: &Arc<ServiceAccount>) -> Result<String, Failure> {
        let now = Millis::now();
        if let Some(token) = self.tokens.borrow().get(account.email()).filter(|token| token.age(now) == Age::Fresh) {
            return Ok(token.bearer.expose().clone());
        }
        let form = account.form(now).map_err(Failure::Ours)?;
        let attempt = token_request(account.token_uri(), form).map_err(Failure::Ours)?;
        let answer = self.client.send(&attempt).await.map_err(Failure::Fault)?;
        let status = answer.status.as_u16();
        let body = answer.body.collect(MAX_FAILURE_BYTES).await.map_err(Failure::Fault)?;
        let token = AccessToken::read(status, &body, now).map_err(Failure::Ours)?;
        let bearer = token.bearer.expose().clone();
        self.tokens.borrow_mut().insert(account.email().to_owned(), token);
        Ok(bearer)
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

/// Why an attempt brought no answer.
enum Failure {
    /// Of the way there.
    Fault(Fault),
    /// Of ours: trying again changes nothing.
    Ours(Error),
}

impl Begun {
    /// Says who answered and what was tried before.
    fn signed(mut self, step: &Step, trail: &Trail) -> Self {
        let mut say = |name: &'static str, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                self.headers.insert(HeaderName::from_static(name), value);
            }
        };
        say("cf-aig-step", &step.index.to_string());
        say("cf-aig-provider", &step.target.provider);
        say("cf-aig-model", &step.target.model);
        say("cf-aig-attempts", &trail.text);
        if let Some(route) = &step.route {
            say("cf-aig-routing-reason", route);
        }
        self
    }
}

/// How long an answer to this is to be kept; `None`: it is not even looked for.
fn kept_for(ask: &Ask) -> Option<Duration> {
    if ask.method != Method::POST {
        return None;
    }
    let gateways = ask.gateway.settings.cache_ttl.filter(|ttl| !ttl.is_zero());
    let alone = ask.options.cache_key.as_ref().map(|_| KEY_ALONE_TTL);
    ask.options.cache_ttl.or(gateways).or(alone).filter(|ttl| !ttl.is_zero())
}

/// What stands for a request in the cache.
struct Keying {
    gateway: Scope,
    provider: Option<Scope>,
    /// Whose answers these are; `None`: everybody's.
    owner: Option<AccountId>,
}

impl Keying {
    fn of(ask: &Ask) -> Self {
        // A change of the gateway that empties its cache changes its name there.
        let name = format!("{}#{}", ask.gateway.id, ask.gateway.generation);
        let slug = ask.provider.strip_prefix("custom-");
        Self {
            gateway: Scope::gateway(ask.account.as_str(), &name),
            provider: slug.map(|slug| Scope::provider(ask.account.as_str(), slug)),
            owner: ask.gateway.settings.cache_per_account.then(|| ask.who.caller.account.clone()),
        }
    }

    fn material<'a>(&'a self, ask: &'a Ask, auth: &'a [&'a [u8]]) -> Material<'a> {
        Material {
            account: self.owner.as_ref().map(AccountId::as_str),
            gateway: self.gateway,
            provider: &ask.provider,
            provider_scope: self.provider,
            method: ask.method.as_str(),
            endpoint: &ask.endpoint,
            auth: if self.owner.is_some() { auth } else { &[] },
            body: &ask.body,
            custom: ask.options.cache_key.as_deref(),
        }
    }
}

/// The reply to a call, with what the gateway says in its headers.
fn finish(begun: Begun, cache: CacheUse, mut record: Record) -> Reply {
    let Begun { status, mut headers, pipe } = begun;
    record.flags(pipe.flags());
    {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let step = text("cf-aig-step").parse().unwrap_or(0);
        record.begun(status, cache, text("cf-aig-provider"), text("cf-aig-model"), step, text("cf-aig-attempts"));
    }
    let hit = if cache.is_hit() { "HIT" } else { "MISS" };
    headers.insert(HeaderName::from_static("cf-aig-cache-status"), HeaderValue::from_static(hit));
    let mut say = |name: &'static str, value: &str| {
        let value = HeaderValue::from_str(value).ok()?;
        headers.insert(HeaderName::from_static(name), value.clone());
        Some(value)
    };
    say("cf-aig-event-id", &record.event);
    if let Some(found) = record.dlp() {
        say("cf-aig-dlp", &found);
    }
    if let Some(log) = record.log
        && let Some(value) = say("cf-aig-log-id", &log.to_string())
    {
        headers.insert(HeaderName::from_static("cf-aig-request-id"), value);
    }
    Reply { status, headers, pipe, record }
}

/// An answer out of the cache: as it was, with its chunks where those are events.
fn hit(entry: Arc<Entry>, words: Words) -> Begun {
    let (status, headers) = known_head(entry.head());
    let events = is_events(&headers);
    let source =
        if events { Source::Chunks(Box::new(entry.chunks())) } else { Source::Whole(Some(entry.body().clone())) };
    Begun { status, headers, pipe: Pipe::new(source, words, events) }
}

/// Status and headers as the cache keeps them.
fn cached_head(begun: &Begun) -> cache::Head {
    let headers = begun.headers.iter();
    let headers =
        headers.map(|(name, value)| (name.as_str().into(), Bytes::copy_from_slice(value.as_bytes()))).collect();
    cache::Head { status: begun.status.as_u16(), headers }
}

fn known_head(head: &cache::Head) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::with_capacity(head.headers.len() + 6);
    for (name, value) in &head.headers {
        let name = HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_maybe_shared(value.clone())) {
            headers.append(name, value);
        }
    }
    (StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY), headers)
}

/// Takes out what belongs to the upstream's connection, or to nobody but its own site.
fn cleanse(headers: &mut HeaderMap) {
    const NOT_OURS: [HeaderName; 8] = [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::CONTENT_LENGTH,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::SET_COOKIE,
    ];
    for name in NOT_OURS {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}

fn content_type(headers: &HeaderMap) -> &str {
    headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn is_events(headers: &HeaderMap) -> bool {
    content_type(headers).starts_with("text/event-stream")
}

/// Bedrock's streams.
fn is_frames(headers: &HeaderMap) -> bool {
    content_type(headers).starts_with("application/vnd.amazon.eventstream")
}

/// Text and images may be kept; what an upstream marks as not to be stored may not.
fn is_keepable(headers: &HeaderMap) -> bool {
    let kind = content_type(headers);
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let fits = kind.starts_with("text/") || kind.starts_with("image/") || kind.ends_with("json") || is_frames(headers);
    let control = headers.get(header::CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
    // Providers say `no-cache` of every stream; `no-store` is meant.
    fits && !control.split(',').any(|word| word.trim().eq_ignore_ascii_case("no-store"))
}

/// Lets rules look at an answer: at a stream as it goes by, at anything else before any of it is seen.
async fn checked(
    gateway: &Gateway,
    headers: &mut HeaderMap,
    mut pipe: Pipe,
    words: Words,
    limit: usize,
) -> Result<Pipe, Failure> {
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
async fn collect(pipe: &mut Pipe, limit: usize) -> Option<Bytes> {
    let mut first = Bytes::new();
    let mut all = Vec::new();
    while let Some(chunk) = poll_fn(|cx| pipe.poll_chunk(cx)).await {
        let chunk = chunk.ok()?;
        if first.len() + all.len() + chunk.len() > limit {
            return None;
        }
        // Most answers come in one piece, which is handed on as it is.
        if first.is_empty() && all.is_empty() {
            first = chunk;
            continue;
        }
        if all.is_empty() {
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&chunk);
    }
    matches!(pipe.end(), Some(End::Whole)).then(|| if all.is_empty() { first } else { all.into() })
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

fn no_answer(target: &Target, fault: &Fault) -> Error {
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
fn word(fault: &Fault) -> &'static str {
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

fn set(headers: &mut HeaderMap, name: &str, value: &str) -> Result<(), Failure> {
    let unusable = || Failure::Ours(Error::bad_input("The stored key cannot be sent: it holds control characters."));
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| unusable())?;
    value.set_sensitive(true);
    headers.insert(name, value);
    Ok(())
}

/// A POST of a form, for an access token.
fn token_request(uri: &str, form: String) -> Result<Attempt> {
    let unusable = || Error::bad_input("The service account's token_uri is no https address.");
    let (tls, rest) = match (uri.strip_prefix("https://"), uri.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return Err(unusable()),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let origin = Origin::new(tls, authority).map_err(|_| unusable())?;
    let path = format!("/{path}").parse().map_err(|_| unusable())?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    let (origin, body) = (Arc::new(origin), Bytes::from(form));
    Ok(Attempt { origin, method: Method::POST, path, headers, body, allow_private: false })
}

/// A number for jitter.
fn chance() -> u64 {
    RequestId::random().low_bits()
}
