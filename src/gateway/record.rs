//! What is told of a call that went through a gateway: its record and its counts, on whatever path it ended, and a line of the log if it
//! did not end well or somebody wants them all.
//!
//! A record ends exactly once: with its answer, with a refusal, or because it was dropped, which is how a caller leaves.

use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::http::header::HeaderValue;
use bytes::Bytes;
use serde_json::json;
use tracing::{Level, debug, enabled, info};

use crate::base::{AccountId, Error, KeyId, LogId, Millis, Neurons, RequestId, TraceContext};
use crate::gateway::asked::Ask;
use crate::gateway::bill::{Charge, Receipt};
use crate::gateway::counts::{Counts, Outcome};
use crate::gateway::options::CustomCost;
use crate::gateway::pipe::End;
use crate::guard::{Check, Finding};
use crate::ledger::{Reservation, Standing};
use crate::logs::{self, Body, CacheUse, Text};
use crate::registry::Gateway;
use crate::task::Task;

/// See the top of this file.
pub struct Record {
    /// Its id; `None`: this call is not to be logged.
    pub log: Option<LogId>,
    /// What the caller calls it; `None`: it is called by its own id, or by that of the request where it has none.
    pub event: Option<String>,
    request: RequestId,
    account: AccountId,
    key: Option<KeyId>,
    gateway: Arc<Gateway>,
    counts: Rc<Counts>,
    received: Instant,
    /// Spent on upstreams and between attempts, up to the head of the answer.
    elsewhere: Duration,
    /// What was tried.
    trail: String,
    cache: CacheUse,
    provider: Text,
    model: Text,
    step: usize,
    status: u16,
    metadata: Option<String>,
    trace: Option<TraceContext>,
    zero_retention: bool,
    ignored: Vec<&'static str>,
    flags: Vec<Finding>,
    custom_cost: Option<CustomCost>,
    first_byte: Option<Duration>,
    /// Where it went, with its query.
    endpoint: String,
    request_type: &'static str,
    request_kind: Option<String>,
    answer_kind: Text,
    user_agent: Option<HeaderValue>,
    authenticated: bool,
    /// The request's body, or none of it.
    asked: Body,
    /// Of the answer, its first chunk, if that is all so far.
    answered: Bytes,
    /// Its chunks, if there were more. Each is a small part of a buffer that its connection read into, and to hold on to them would make the
    /// connection read into new memory each time.
    chunks: Vec<u8>,
    /// Bytes of both.
    kept: usize,
    /// Bytes of the answer that may be kept.
    keep: usize,
    bytes: u64,
    /// What its answer came to, once that is known; nothing for answers that were there.
    receipt: Receipt,
    /// See [`Record::saves`].
    saved: Neurons,
    /// What the call holds of its limits.
    hold: Option<Box<Reservation>>,
    open: bool,
}

impl Record {
    /// Begins with a call.
    pub fn begin(counts: &Rc<Counts>, ask: &Ask) -> Box<Self> {
        counts.in_flight.inc();
        let collect = ask.options.collect_log.unwrap_or(ask.gateway.settings.collect_logs);
        let log = collect.then(|| LogId::at(Millis::now()));
        let keep = match log {
            Some(_) if ask.options.collect_log_payload != Some(false) => counts.body_bytes,
            _ => 0,
        };
        Box::new(Self {
            endpoint: ask.endpoint.clone(),
            request_type: if ask.tries_all { "universal" } else { "http" },
            request_kind: ask.content_type.clone(),
            answer_kind: Text::default(),
            user_agent: ask.user_agent.clone(),
            authenticated: ask.trusted,
            asked: Body { kept: ask.body.slice(..ask.body.len().min(keep)), size: ask.body.len() as u64 },
            answered: Bytes::new(),
            chunks: Vec::new(),
            kept: 0,
            keep,
            event: ask.options.event_id.clone(),
            log,
            request: ask.who.id,
            account: ask.account.clone(),
            key: ask.who.caller.key.clone(),
            gateway: ask.gateway.clone(),
            counts: counts.clone(),
            received: ask.who.received,
            elsewhere: Duration::ZERO,
            trail: String::new(),
            cache: CacheUse::Off,
            provider: (&*ask.provider).into(),
            model: Text::default(),
            step: 0,
            status: 0,
            metadata: ask.options.metadata.as_ref().and_then(|all| serde_json::to_string(all).ok()),
            trace: ask.options.trace(),
            zero_retention: ask.options.zero_retention.unwrap_or(ask.gateway.settings.zero_data_retention),
            ignored: ask.options.ignored.clone(),
            flags: Vec::new(),
            custom_cost: ask.options.custom_cost,
            first_byte: None,
            bytes: 0,
            receipt: Receipt::default(),
            saved: Neurons::ZERO,
            hold: None,
            open: true,
        })
    }

    /// Where whoever gets the answer says what it came to.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }

    /// What the answer cost whoever asked for it first.
    pub fn saves(&mut self, cost: Neurons) {
        self.saved = cost;
    }

    /// What the call holds of its limits until it ends.
    pub fn hold(&mut self, reservation: Reservation) {
        self.hold = Some(Box::new(reservation));
    }

    /// How the tightest limit of the call stands.
    pub fn standing(&self) -> Option<&Standing> {
        self.hold.as_ref().and_then(|hold| hold.standing())
    }

    /// It is a handshake.
    pub fn is_socket(&mut self) {
        self.request_type = "websocket";
    }

    /// The request that it is of.
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// Notes what rules found without blocking.
    pub fn flags(&mut self, flags: &[Finding]) {
        for flag in flags {
            self.counts.metrics.gateway_findings.with_label_values(&[&flag.check.to_string(), "FLAG"]).inc();
        }
        self.flags.extend_from_slice(flags);
    }

    /// Notes what a rule blocked.
    pub fn blocked(&self, finding: &Finding) {
        self.counts.metrics.gateway_findings.with_label_values(&[&finding.check.to_string(), "BLOCK"]).inc();
    }

    /// Time that somebody else took.
    pub fn waited(&mut self, time: Duration) {
        self.elsewhere += time;
    }

    /// The answer has begun.
    pub fn begun(
        &mut self,
        status: StatusCode,
        cache: CacheUse,
        (provider, model): (&str, &str),
        step: usize,
        trail: &str,
        kind: &str,
    ) {
        let taken = self.received.elapsed();
        self.counts.overhead.observe(taken.saturating_sub(self.elsewhere).as_secs_f64());
        self.counts.cache(cache).inc();
        self.first_byte = Some(taken);
        (self.status, self.cache, self.step) = (status.as_u16(), cache, step);
        (self.provider, self.model, self.trail) = (provider.into(), model.into(), trail.into());
        self.answer_kind = kind.into();
    }

    /// What rules found, as a header says it.
    pub fn dlp(&self) -> Option<String> {
        if self.flags.is_empty() {
            return None;
        }
        let findings: Vec<_> = self
            .flags
            .iter()
            .map(|flag| {
                json!({
                    "profile": { "context": {}, "entry_ids": [&*flag.rule], "profile_id": "" },
                    "policy_ids": [],
                    "check": flag.check.to_string(),
                })
            })
            .collect();
        Some(json!({ "findings": findings, "action": "FLAG" }).to_string())
    }

    /// Whether all of a body of known size went out.
    pub fn is_whole(&self, size: u64) -> bool {
        self.bytes >= size
    }

    /// Bytes that went to the caller.
    pub fn sent(&mut self, chunk: &Bytes) {
        self.bytes += chunk.len() as u64;
        if self.kept < self.keep {
            let len = chunk.len().min(self.keep - self.kept);
            if self.kept == 0 {
                self.answered = chunk.slice(..len);
            } else {
                self.chunks.extend_from_slice(&std::mem::take(&mut self.answered));
                self.chunks.extend_from_slice(&chunk[..len]);
            }
            self.kept += len;
        }
    }

    /// The same of a conversation, of which nothing is kept.
    pub fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// There was no answer but our own refusal, which whoever tells the caller counts as an error.
    pub fn refused(&mut self, error: &Error) {
        self.trail = error.attempts().unwrap_or_default().into();
        self.status = error.kind().status();
        self.close(Outcome::Refused, Some(error.kind().as_str()));
    }

    /// The answer has ended.
    pub fn ended(&mut self, end: &End) {
        match end {
            End::Whole if self.status < 400 => self.close(Outcome::Done, None),
            End::Whole => self.close(Outcome::Failed, Some("upstream_status")),
            End::Failed => self.close(Outcome::Failed, Some("upstream_error_event")),
            End::Broken(_) => self.close(Outcome::Failed, Some("upstream_broke")),
            End::Blocked(finding) => {
                self.blocked(finding);
                self.flags.push(finding.clone());
                self.close(Outcome::Failed, Some("answer_blocked"));
            }
        }
    }

    /// The caller left.
    pub fn left(&mut self) {
        self.close(Outcome::Cancelled, None);
    }

    fn close(&mut self, outcome: Outcome, why: Option<&'static str>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        self.counts.in_flight.dec();
        self.counts.outcome(outcome).inc();
        // A hit used nothing of the upstream, and has no receipt.
        let charge = self.receipt.get().copied();
        let usage = charge.and_then(|charge| charge.usage);
        if let Some(charge) = &charge {
            let provider = self.counts.provider(label(&self.provider));
            provider.charged(charge);
        }
        if let Some(hold) = self.hold.take() {
            let cost = charge.map_or(Neurons::ZERO, |charge| charge.cost);
            hold.count(&usage.unwrap_or_default(), cost, Millis::now());
        }
        // The record says it all: a line for each call that went well takes about an eighth of what the gateway does with it.
        let is_worth_a_line = match outcome {
            Outcome::Done => enabled!(target: "neurond::calls", Level::DEBUG),
            _ => enabled!(target: "neurond::calls", Level::INFO),
        };
        if let Some(log) = self.log
            && is_worth_a_line
        {
            let line = self.line(log, outcome.as_str(), why, charge.as_ref());
            match outcome {
                Outcome::Done => debug!(target: "neurond::calls", "{line}"),
                _ => info!(target: "neurond::calls", "{line}"),
            }
        }
        let record = self.told(outcome, why, charge.as_ref());
        self.counts.logs.append(record);
    }

    /// The record as it is kept, counted and shipped.
    fn told(&mut self, outcome: Outcome, why: Option<&'static str>, charge: Option<&Charge>) -> Box<logs::Record> {
        let taken = self.received.elapsed();
        let path = path_of(&self.endpoint);
        let answered = match (std::mem::take(&mut self.answered), std::mem::take(&mut self.chunks)) {
            // What comes from the cache is there to stay, and known by where it lies.
            (one, chunks) if chunks.is_empty() && self.cache.is_hit() => one,
            (one, chunks) if chunks.is_empty() => apart(one),
            (_, chunks) => chunks.into(),
        };
        Box::new(logs::Record {
            id: self.log,
            request: self.request,
            at: Millis(Millis::now().0.saturating_sub(taken.as_millis() as u64)),
            account: self.account.clone(),
            key: self.key.clone(),
            gateway: self.gateway.id.clone(),
            provider: std::mem::take(&mut self.provider),
            model: std::mem::take(&mut self.model),
            task: task_of(path),
            path: path.into(),
            status: if self.status == 0 { CALLER_LEFT } else { self.status },
            success: outcome == Outcome::Done,
            cache: self.cache,
            duration_us: taken.as_micros() as u64,
            first_byte_us: self.first_byte.map(|first| first.as_micros() as u64),
            usage: charge.and_then(|charge| charge.usage),
            cost: charge.map_or(Neurons::ZERO, |charge| charge.cost),
            custom_cost: self.custom_cost.is_some(),
            saved: if self.cache.is_hit() { self.saved } else { Neurons::ZERO },
            step: self.step as u16,
            request_type: self.request_type.into(),
            request_content_type: self.request_kind.take().map(Text::from),
            response_content_type: (!self.answer_kind.is_empty()).then(|| std::mem::take(&mut self.answer_kind)),
            metadata: self.metadata.take().map(Text::from),
            trace: self.trace,
            zero_retention: self.zero_retention,
            event: self.event.take().map(Text::from),
            user_agent: self.user_agent.as_ref().and_then(|agent| agent.to_str().ok()).map(Text::from),
            authenticated: self.authenticated,
            stored_key: charge.is_some_and(|charge| charge.stored_key),
            attempts: std::mem::take(&mut self.trail).into(),
            why: why.map(Into::into),
            findings: self.flags.iter().map(|flag| Box::from(&*flag.rule)).collect(),
            asked: Body { kept: apart(std::mem::take(&mut self.asked.kept)), size: self.asked.size },
            answered: Body { kept: answered, size: self.bytes },
        })
    }

    /// The record as words with `=` between name and value. Written by hand: through the log's own fields it takes longer
    /// than all else the gateway does with a call.
    fn line(&self, log: LogId, outcome: &str, why: Option<&str>, charge: Option<&Charge>) -> String {
        let mut line = String::with_capacity(512);
        let mut text = |name: &str, value: &str| {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(name);
            line.push('=');
            // What callers choose may hold anything: it stays one value of one line.
            if value.is_empty() || value.bytes().any(|byte| byte <= b' ' || matches!(byte, b'"' | b'\\' | 127..)) {
                let _ = write!(line, "{value:?}");
            } else {
                line.push_str(value);
            }
        };
        let (mut digits, mut letters) = ([0; 36], [0; 26]);
        let log = log.text(&mut letters);
        text("log", log);
        text("request", self.request.text(&mut digits));
        text("event", self.event.as_deref().unwrap_or(log));
        text("account", self.account.as_str());
        text("key", self.key.as_ref().map_or("-", KeyId::as_str));
        text("gateway", &self.gateway.id);
        text("provider", &self.provider);
        text("model", &self.model);
        text("step", itoa::Buffer::new().format(self.step));
        text("status", itoa::Buffer::new().format(self.status));
        text("cache", self.cache.as_str());
        text("outcome", outcome);
        for (name, value) in [("why", why), ("metadata", self.metadata.as_deref())] {
            if let Some(value) = value {
                text(name, value);
            }
        }
        text("attempts", &self.trail);
        if let Some(usage) = charge.and_then(|charge| charge.usage) {
            text("prompt_tokens", itoa::Buffer::new().format(usage.prompt_tokens));
            text("cached_tokens", itoa::Buffer::new().format(usage.cached_tokens));
            text("completion_tokens", itoa::Buffer::new().format(usage.completion_tokens));
        }
        if let Some(charge) = charge {
            text("cost_usd", &format!("{:.9}", charge.cost.usd()));
            let marks =
                [(self.custom_cost.is_some(), "custom"), (charge.estimated, "estimated"), (charge.unpriced, "unknown")];
            if let Some((_, mark)) = marks.iter().find(|(is_so, _)| *is_so) {
                text("cost_is", mark);
            }
        }
        if !self.ignored.is_empty() {
            text("ignored", &self.ignored.join(","));
        }
        for flag in &self.flags {
            text(if flag.check == Check::Request { "found_in_request" } else { "found_in_response" }, &flag.rule);
        }
        text("bytes", itoa::Buffer::new().format(self.bytes));
        if let Some(first) = self.first_byte {
            text("first_byte_us", itoa::Buffer::new().format(first.as_micros()));
        }
        text("total_us", itoa::Buffer::new().format(self.received.elapsed().as_micros()));
        line
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.left();
    }
}

/// A body that waits for the log. A short one is a small part of the buffer that its connection read into: kept as it is, it would keep the
/// whole of it, and each call would read into memory that no cache knows.
fn apart(body: Bytes) -> Bytes {
    if body.len() <= SHORT { Bytes::copy_from_slice(&body) } else { body }
}

/// Bytes up to which a body is copied: about what a connection reads at once.
const SHORT: usize = 8 << 10;
/// What nginx calls a request whose caller left before there was an answer.
const CALLER_LEFT: u16 = 499;

/// The path at the provider, of one of the gateway's own addresses; any other as it is. Without its query.
fn path_of(endpoint: &str) -> &str {
    let end = memchr::memchr(b'?', endpoint.as_bytes()).unwrap_or(endpoint.len());
    let path = &endpoint[..end];
    // /v1/ACCOUNT/GATEWAY/PROVIDER/…
    let own = path.strip_prefix("/v1/").and_then(|rest| {
        let third = memchr::memchr_iter(b'/', rest.as_bytes()).nth(2)?;
        Some(&rest[third + 1..])
    });
    own.unwrap_or(path)
}

/// What a path asks for, where that is plain.
fn task_of(path: &str) -> Option<Task> {
    let is = |ends: &[&str]| ends.iter().any(|end| path.ends_with(end));
    if is(&["embeddings", ":embedContent", ":batchEmbedContents", "/embed"]) {
        return Some(Task::TextEmbeddings);
    }
    if is(&[
        "completions",
        "/messages",
        "/responses",
        ":generateContent",
        ":streamGenerateContent",
        "/converse",
        "/converse-stream",
        "/chat",
    ]) {
        return Some(Task::TextGeneration);
    }
    is(&["images/generations"]).then_some(Task::TextToImage)
}

/// A provider as a label: custom ones are named by their callers, so they share one.
pub fn label(provider: &str) -> &str {
    if provider.starts_with("custom-") { "custom" } else { provider }
}
