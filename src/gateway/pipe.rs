//! The body of an answer on its way: from where it comes to what the caller reads, no faster than the caller reads it.
//!
//!     upstream | engine | cache --> count usage --> translate --> check by rules --> caller
//!
//! Pulled, never pushed: a slow caller slows its own upstream, and dropping the pipe hangs up. Where nothing has to be
//! done with an answer its chunks pass as they are, neither copied nor collected.

use std::collections::VecDeque;
use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use bytes::Bytes;
use flate2::write::GzDecoder;
use futures_util::StreamExt;
use futures_util::stream::LocalBoxStream;
use serde_json::json;

use crate::base::{Error, Kind};
use crate::gateway::bill::Bill;
use crate::gateway::watch::Watch;
use crate::guard::{Check, Finding, StreamGuard};
use crate::net::client::{AnswerBody, Fault};
use crate::net::sse;
use crate::provider::{Dialect, Meter, Translator, messages};
use crate::task::Usage;

/// Where bytes come from.
pub enum Source {
    /// Another server; first what was held back of it already.
    Upstream(VecDeque<Bytes>, AnswerBody),
    /// The engine of this process.
    Local(BoxBody),
    /// All there is; `None` once it was handed on.
    Whole(Option<Bytes>),
    /// A stream of the cache, in the chunks that it came in.
    Chunks(Box<dyn Iterator<Item = Bytes>>),
    /// An answer that is being written into the cache.
    Shared(LocalBoxStream<'static, crate::base::Result<Bytes>>),
}

/// In whose words an answer tells that it broke off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Words {
    /// A provider's own.
    Native(Dialect),
    /// OpenAI's chat.
    OpenAi,
    /// Anthropic's Messages.
    Messages,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub enum End {
    /// As its sender meant it.
    Whole,
    /// As its sender meant it, who says in it that it failed.
    Failed,
    /// Before that; in the provider's own words where it had any.
    Broken(Error),
    /// By a rule of the gateway.
    Blocked(Finding),
}

/// See the top of this file.
pub struct Pipe {
    source: Source,
    meter: Reading,
    watch: Option<Box<Watch>>,
    translation: Option<Box<Translation>>,
    guard: Option<Box<StreamGuard>>,
    flags: Vec<Finding>,
    words: Words,
    /// The caller reads events: it can be told what went wrong.
    events: bool,
    ready: VecDeque<Bytes>,
    /// Why it ended, on its way to whoever cannot read it in an event.
    untold: Option<Error>,
    end: Option<End>,
    /// What its source costs; settled when it ends, or is dropped.
    bill: Option<Box<Bill>>,
    /// Bytes that its source gave.
    came: u64,
}

/// How usage is found out.
enum Reading {
    Nothing,
    Known(Usage),
    Plain(Box<Meter>),
    /// The answer is compressed, and read beside being passed on.
    Gzip(Box<GzDecoder<Bounded>>),
}

/// A meter that stops reading when a small answer turns out to be a huge one.
struct Bounded {
    meter: Option<Meter>,
    left: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.left {
            return Err(std::io::Error::other("the answer grows without bound"));
        }
        self.left -= bytes.len();
        if let Some(meter) = &mut self.meter {
            meter.feed(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// From a dialect to the caller's words, event by event.
struct Translation {
    to_openai: Option<Translator>,
    to_messages: Option<messages::Translator>,
    between: sse::Encoder,
    out: sse::Encoder,
}

impl Translation {
    fn feed(&mut self, chunk: &[u8]) -> Result<(), Error> {
        match (&mut self.to_openai, &mut self.to_messages) {
            (Some(first), None) => first.feed(chunk, &mut self.out),
            (None, Some(second)) => second.feed(chunk, &mut self.out),
            (Some(first), Some(second)) => {
                first.feed(chunk, &mut self.between)?;
                second.feed(&self.between.take(), &mut self.out)
            }
            (None, None) => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), Error> {
        if let Some(first) = &mut self.to_openai {
            match &mut self.to_messages {
                None => return first.end(&mut self.out),
                Some(second) => {
                    first.end(&mut self.between)?;
                    second.feed(&self.between.take(), &mut self.out)?;
                }
            }
        }
        match &mut self.to_messages {
            Some(second) => second.end(&mut self.out),
            None => Ok(()),
        }
    }
}

impl Pipe {
    /// Hands on what comes, as it comes.
    pub fn new(source: Source, words: Words, events: bool) -> Self {
        Self {
            source,
            meter: Reading::Nothing,
            watch: None,
            translation: None,
            guard: None,
            flags: Vec::new(),
            words,
            events,
            ready: VecDeque::new(),
            untold: None,
            end: None,
            bill: None,
            came: 0,
        }
    }

    /// Settles what it costs when it ends.
    pub fn billed(mut self, bill: Box<Bill>) -> Self {
        self.bill = Some(bill);
        self
    }

    /// Counts usage on the way. A compressed answer is read up to `limit` bytes.
    pub fn metered(mut self, meter: Meter, encoding: Option<&str>, limit: usize) -> Self {
        self.meter = match encoding {
            None | Some("identity") => Reading::Plain(Box::new(meter)),
            Some("gzip") => Reading::Gzip(Box::new(GzDecoder::new(Bounded { meter: Some(meter), left: limit }))),
            Some(_) => Reading::Nothing,
        };
        self
    }

    /// Looks on, in a stream that passes as it is, whether it says that it failed.
    pub fn watched(mut self, watch: Option<Watch>) -> Self {
        self.watch = watch.map(Box::new);
        self
    }

    /// Translates a stream on the way.
    /// What comes out are events, whatever goes in.
    pub fn translated(mut self, to_openai: Option<Translator>, to_messages: Option<messages::Translator>) -> Self {
        if to_openai.is_some() || to_messages.is_some() {
            let (between, out) = (sse::Encoder::default(), sse::Encoder::default());
            self.translation = Some(Box::new(Translation { to_openai, to_messages, between, out }));
            self.events = true;
        }
        self
    }

    /// Checks a stream by rules on the way.
    pub fn guarded(mut self, guard: StreamGuard) -> Self {
        self.guard = (!guard.is_idle()).then(|| Box::new(guard));
        self
    }

    /// What the answer used is known already.
    pub fn with_usage(mut self, usage: Option<Usage>) -> Self {
        if let Some(usage) = usage {
            self.meter = Reading::Known(usage);
        }
        self
    }

    /// What rules found in it is known already.
    pub fn with_flags(mut self, flags: Vec<Finding>) -> Self {
        self.flags = flags;
        self
    }

    /// What rules found without blocking it.
    pub fn flags(&self) -> &[Finding] {
        self.guard.as_ref().map_or(&self.flags, |guard| guard.flags())
    }

    /// How many bytes will come, if that is known and nothing on the way changes it.
    pub fn length(&self) -> Option<u64> {
        if self.translation.is_some() || self.guard.is_some() {
            return None;
        }
        match &self.source {
            Source::Upstream(held, body) if held.is_empty() => body.length(),
            Source::Upstream(..) => None,
            Source::Local(body) => match body.size() {
                BodySize::None => Some(0),
                BodySize::Sized(bytes) => Some(bytes),
                BodySize::Stream => None,
            },
            Source::Whole(bytes) => Some(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Source::Chunks(_) | Source::Shared(_) => None,
        }
    }

    /// How it ended, once it did.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Nobody reads on: what it costs is known as far as it will be.
    pub fn settle(&mut self) {
        let Some(bill) = self.bill.take() else { return };
        let usage = self.usage();
        bill.settle(usage, self.came, self.events);
    }

    /// What the answer says it used, as far as it was read. Asked once.
    pub fn usage(&mut self) -> Option<Usage> {
        match std::mem::replace(&mut self.meter, Reading::Nothing) {
            Reading::Nothing => None,
            Reading::Known(usage) => Some(usage),
            Reading::Plain(meter) => meter.finish(),
            // What could not be read any further counts as far as it was.
            Reading::Gzip(mut decoder) => {
                let _ = decoder.try_finish();
                decoder.get_mut().meter.take().and_then(Meter::finish)
            }
        }
    }

    /// Whoever reads it tells what went wrong: it is an error here, and no event of the stream.
    pub fn says_nothing(&mut self) {
        self.events = false;
    }

    /// The next bytes for the caller; `None` at the end. After an error nothing follows: the connection is to be cut, since
    /// that is the only way left to tell.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(chunk)));
            }
            if let Some(error) = self.untold.take() {
                return Poll::Ready(Some(Err(error)));
            }
            if self.end.is_some() {
                return Poll::Ready(None);
            }
            match std::task::ready!(poll_source(&mut self.source, cx)) {
                Some(Ok(chunk)) => {
                    self.read(&chunk);
                    if self.translation.is_none() && self.guard.is_none() {
                        return Poll::Ready(Some(Ok(chunk)));
                    }
                    if let Err(end) = self.pass(chunk) {
                        self.stop(end);
                    }
                }
                Some(Err(error)) => self.stop(broken(error)),
                None => match self.finish() {
                    Ok(()) => {
                        let has_failed = self.watch.take().is_some_and(|mut watch| watch.has_failed());
                        self.end = Some(if has_failed { End::Failed } else { End::Whole });
                        self.settle();
                    }
                    Err(end) => self.stop(end),
                },
            }
        }
    }

    fn read(&mut self, chunk: &[u8]) {
        self.came += chunk.len() as u64;
        if let Some(watch) = &mut self.watch {
            watch.feed(chunk);
        }
        match &mut self.meter {
            Reading::Nothing | Reading::Known(_) => {}
            Reading::Plain(meter) => meter.feed(chunk),
            Reading::Gzip(decoder) => {
                if decoder.write_all(chunk).is_err() {
                    self.meter = Reading::Nothing;
                }
            }
        }
    }

    /// Through the stages, in order.
    fn pass(&mut self, chunk: Bytes) -> Result<(), End> {
        let chunk = match &mut self.translation {
            None => chunk,
            Some(translation) => {
                let outcome = translation.feed(&chunk);
                let made = translation.out.take();
                self.check(made)?;
                return outcome.map_err(End::Broken);
            }
        };
        self.check(chunk)
    }

    fn check(&mut self, chunk: Bytes) -> Result<(), End> {
        if chunk.is_empty() {
            return Ok(());
        }
        let Some(guard) = &mut self.guard else {
            self.ready.push_back(chunk);
            return Ok(());
        };
        let mut released = Vec::new();
        let outcome = guard.feed(chunk, &mut released);
        self.ready.extend(released);
        outcome.map_err(End::Blocked)
    }

    fn finish(&mut self) -> Result<(), End> {
        if let Some(translation) = &mut self.translation {
            let outcome = translation.end();
            let made = translation.out.take();
            self.check(made)?;
            outcome.map_err(End::Broken)?;
        }
        if let Some(guard) = &mut self.guard {
            let mut released = Vec::new();
            let outcome = guard.finish(&mut released);
            self.ready.extend(released);
            outcome.map_err(End::Blocked)?;
        }
        Ok(())
    }

    /// Ends it early: whoever reads events reads why, and from everybody else the rest is missing. Nothing says that the
    /// answer was whole.
    fn stop(&mut self, end: End) {
        let error = match &end {
            End::Whole | End::Failed => return,
            End::Broken(error) => error.clone(),
            End::Blocked(finding) => {
                let message = format!("The response was blocked by the rule `{}`.", finding.rule);
                Error::new(Kind::AnswerBlocked, message).with_param(&*finding.rule)
            }
        };
        match self.events {
            true => self.ready.push_back(error_event(self.words, &error)),
            false => self.untold = Some(error),
        }
        // Dropping the source hangs up.
        self.source = Source::Whole(None);
        self.end = Some(end);
        self.settle();
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.settle();
    }
}

fn poll_source(source: &mut Source, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
    match source {
        Source::Upstream(held, body) => match held.pop_front() {
            Some(chunk) => Poll::Ready(Some(Ok(chunk))),
            None => body.poll_chunk(cx).map(|chunk| Some(chunk?.map_err(|fault| broke_off(&fault)))),
        },
        Source::Local(body) => Pin::new(body)
            .poll_next(cx)
            .map(|chunk| Some(chunk?.map_err(|error| broke_off(&Fault::Broken(error.to_string()))))),
        Source::Whole(bytes) => Poll::Ready(bytes.take().filter(|bytes| !bytes.is_empty()).map(Ok)),
        Source::Chunks(chunks) => Poll::Ready(chunks.next().map(Ok)),
        Source::Shared(chunks) => chunks.poll_next_unpin(cx),
    }
}

/// How an answer ended that broke off. Where it was blocked on its way to several callers, each of them hears so.
fn broken(error: Error) -> End {
    match error.param() {
        Some(rule) if error.kind() == Kind::AnswerBlocked => {
            End::Blocked(Finding { rule: rule.into(), check: Check::Response, what: String::new() })
        }
        _ => End::Broken(error),
    }
}

/// What a caller hears of a provider that went away.
fn broke_off(fault: &Fault) -> Error {
    Error::new(Kind::Unreachable, format!("The provider broke off: {fault}"))
}

/// One event that says what went wrong, in the words the caller expects.
fn error_event(words: Words, error: &Error) -> Bytes {
    let mut out = sse::Encoder::default();
    let message = error.message();
    // Type and code as OpenAI calls them, type as Anthropic, status as Google.
    let (kind, code, anthropic, google) = match error.kind() {
        Kind::RateLimited => ("rate_limit_error", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
        Kind::Busy | Kind::ModelUnavailable => ("server_error", "overloaded", "overloaded_error", "UNAVAILABLE"),
        Kind::Timeout | Kind::UpstreamTimeout => ("timeout_error", "timeout", "timeout_error", "DEADLINE_EXCEEDED"),
        Kind::BadInput => ("invalid_request_error", "bad_request", "invalid_request_error", "INVALID_ARGUMENT"),
        Kind::AnswerBlocked => ("invalid_request_error", "response_blocked", "api_error", "FAILED_PRECONDITION"),
        _ => ("server_error", "upstream_unreachable", "api_error", "UNAVAILABLE"),
    };
    match words {
        Words::Messages | Words::Native(Dialect::Anthropic) => {
            let body = json!({ "type": "error", "error": { "type": anthropic, "message": message } });
            out.json(Some("error"), &body);
        }
        Words::Native(Dialect::Google) => {
            out.json(None, &json!({ "error": { "code": 502, "message": message, "status": google } }));
        }
        Words::OpenAi | Words::Native(_) => {
            let body = json!({ "error": { "message": message, "type": kind, "param": null, "code": code } });
            out.json(None, &body);
        }
    }
    out.take()
}
