//! The beginning of a streamed answer, judged before anybody has read of it.
//!
//!     upstream's own bytes --feed--> Hold      nothing is said yet: roles, ids, pings, comments
//!                                    Release   content, or what is not understood: all of it goes out as it came
//!                                    Failed    an error in a stream of status 200, as if the status had said so
//!
//! Some providers accept a call with 200 and tell in the stream that they are overloaded. As long as nothing was handed
//! on, such a call can be tried again, or somebody else can. What is held back is bounded, and a doubt always releases:
//! at worst the caller reads the error in the stream, as it would have without us.
//!
//! Events are told apart by their shape and not by who sent them, since one provider speaks several dialects. Pure.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::net::sse::{Decoder, SseEvent};
use crate::provider::Dialect;
use crate::provider::frame::{Frame, Frames};

/// Events without content that are waited through.
const MAX_EVENTS: usize = 64;
/// Bytes that are held back; the chunk that goes beyond them releases all.
pub(super) const MAX_BYTES: usize = 256 * 1024;
/// Bytes of a document without a frame that are waited for.
const MAX_DOCUMENT: usize = 16 * 1024;

/// What is to be done with the chunks so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Keep them and read on.
    Hold,
    /// Hand them on, and all that follows.
    Release,
    /// The provider failed: what it should have answered instead of a stream.
    Failed {
        /// The status that fits.
        status: u16,
        /// Its own words, as JSON.
        body: Bytes,
    },
}

/// See the top of this file. One for each answer.
#[derive(Debug)]
pub struct Opening {
    dialect: Dialect,
    framing: Framing,
    /// As they came, for whoever hands them on.
    chunks: VecDeque<Bytes>,
    events: usize,
    bytes: usize,
}

#[derive(Debug)]
enum Framing {
    Sse {
        decoder: Decoder,
        /// The next byte is the first of a line.
        at_start: bool,
    },
    /// A bare document that stands where an event should, as far as it has come.
    Document(Vec<u8>),
    Amazon(Frames),
}

impl Opening {
    /// Of an answer with this content type; nothing where that is no stream of events.
    pub fn new(dialect: Dialect, content_type: Option<&str>) -> Option<Self> {
        let kind = content_type?.split(';').next().unwrap_or_default().trim();
        let framing = match kind {
            _ if kind.eq_ignore_ascii_case("text/event-stream") => {
                Framing::Sse { decoder: Decoder::new(MAX_BYTES), at_start: true }
            }
            _ if kind.eq_ignore_ascii_case("application/vnd.amazon.eventstream") => {
                Framing::Amazon(Frames::new(MAX_BYTES))
            }
            _ => return None,
        };
        Some(Self { dialect, framing, chunks: VecDeque::new(), events: 0, bytes: 0 })
    }

    /// Takes the next chunk. Nothing is to be fed after any other verdict than [`Verdict::Hold`].
    pub fn feed(&mut self, chunk: &Bytes) -> Verdict {
        self.chunks.push_back(chunk.clone());
        self.bytes += chunk.len();
        match self.look_into(chunk) {
            Verdict::Hold if self.bytes > MAX_BYTES => Verdict::Release,
            verdict => verdict,
        }
    }

    /// The stream has ended behind what was held: what its last event says, where only a blank line is missing.
    /// [`Verdict::Hold`]: nothing.
    pub fn end(&mut self) -> Verdict {
        match &self.framing {
            Framing::Sse { .. } => self.look_into(b"\n\n"),
            Framing::Document(_) => Verdict::Release,
            Framing::Amazon(_) => Verdict::Hold,
        }
    }

    /// All that was fed, chunk by chunk.
    pub fn into_chunks(self) -> VecDeque<Bytes> {
        self.chunks
    }

    fn look_into(&mut self, chunk: &[u8]) -> Verdict {
        match &mut self.framing {
            Framing::Sse { .. } => self.sse(chunk),
            Framing::Document(document) => {
                document.extend_from_slice(chunk);
                bare(self.dialect, document)
            }
            Framing::Amazon(_) => self.amazon(chunk),
        }
    }

    fn sse(&mut self, mut chunk: &[u8]) -> Verdict {
        let mut events = Vec::new();
        // Line by line: behind the first content nothing needs to be taken apart.
        while let Some(first) = chunk.first() {
            let Framing::Sse { decoder, at_start } = &mut self.framing else { return Verdict::Release };
            if *at_start {
                match first {
                    b':' | b'd' | b'e' | b'i' | b'r' | b'\r' | b'\n' | 0xef => {}
                    // Google's errors, and those of proxies: the body that an error status would have, without a frame.
                    b'{' => {
                        self.framing = Framing::Document(Vec::new());
                        return self.look_into(chunk);
                    }
                    _ => return Verdict::Release,
                }
            }
            let end = memchr::memchr(b'\n', chunk);
            let (line, rest) = chunk.split_at(end.map_or(chunk.len(), |end| end + 1));
            *at_start = end.is_some();
            if decoder.feed(line, &mut events).is_err() {
                return Verdict::Release;
            }
            for event in events.drain(..) {
                match self.count(sse_event(self.dialect, event)) {
                    Verdict::Hold => {}
                    verdict => return verdict,
                }
            }
            chunk = rest;
        }
        Verdict::Hold
    }

    fn amazon(&mut self, chunk: &[u8]) -> Verdict {
        let Framing::Amazon(decoder) = &mut self.framing else { return Verdict::Release };
        let mut frames = Vec::new();
        let outcome = decoder.feed(chunk, &mut frames);
        for frame in frames {
            match self.count(amazon_frame(self.dialect, frame)) {
                Verdict::Hold => {}
                verdict => return verdict,
            }
        }
        if outcome.is_ok() { Verdict::Hold } else { Verdict::Release }
    }

    fn count(&mut self, verdict: Verdict) -> Verdict {
        if verdict != Verdict::Hold {
            return verdict;
        }
        self.events += 1;
        if self.events > MAX_EVENTS { Verdict::Release } else { Verdict::Hold }
    }
}

pub(super) fn sse_event(dialect: Dialect, event: SseEvent) -> Verdict {
    let data = Bytes::from(event.data);
    if event.name.as_deref() == Some("error") {
        return failed("", data);
    }
    judge(dialect, data)
}

fn amazon_frame(dialect: Dialect, frame: Frame) -> Verdict {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        bytes: Cow<'a, str>,
    }
    let Frame { kind, name, message, payload } = frame;
    match (kind.as_str(), name.as_str()) {
        ("exception" | "error", _) if payload.first() == Some(&b'{') => failed(&name, payload),
        ("exception" | "error", _) => {
            let message = if message.is_empty() { &name } else { &message };
            failed(&name, json!({ "message": message }).to_string().into())
        }
        (_, "initial-response" | "messageStart") => Verdict::Hold,
        (_, "contentBlockStart" | "contentBlockDelta") => match serde_json::from_slice::<Event>(&payload) {
            Ok(event) if !event.start.0 && !event.delta.0 => Verdict::Hold,
            _ => Verdict::Release,
        },
        // What a model streams in its own dialect is packed once more.
        (_, "chunk") => {
            let chunk = serde_json::from_slice::<Chunk>(&payload).ok();
            match chunk.and_then(|chunk| STANDARD.decode(chunk.bytes.as_bytes()).ok()) {
                Some(inner) => judge(dialect, inner.into()),
                None => Verdict::Release,
            }
        }
        _ => Verdict::Release,
    }
}

/// A document that stands where events should.
fn bare(dialect: Dialect, document: &[u8]) -> Verdict {
    match serde_json::Deserializer::from_slice(document).into_iter::<&RawValue>().next() {
        Some(Ok(whole)) => match judge(dialect, Bytes::copy_from_slice(whole.get().as_bytes())) {
            Verdict::Hold => Verdict::Release,
            verdict => verdict,
        },
        Some(Err(error)) if error.is_eof() && document.len() <= MAX_DOCUMENT => Verdict::Hold,
        _ => Verdict::Release,
    }
}

/// What can be told of an event by, whoever sent it.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    object: Cow<'a, str>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    /// A message that begins (Anthropic), or the words of an error.
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    item: Option<&'a RawValue>,
    choices: Option<Says>,
    #[serde(default)]
    usage: Says,
    #[serde(default)]
    delta: Says,
    #[serde(default)]
    content_block: Says,
    #[serde(default)]
    start: Says,
    #[serde(default)]
    part: Says,
}

impl Event<'_> {
    fn is_error(&self, dialect: Dialect) -> bool {
        let told = |error: &RawValue| error.get().starts_with(['{', '[', '"', 't']) && error.get().len() > 2;
        // Cohere's errors are a sentence and nothing else.
        let is_sentence = || self.message.is_some_and(|message| message.get().starts_with('"'));
        self.error.is_some_and(told)
            || self.kind == "error"
            || self.object == "error"
            || (dialect == Dialect::Cohere && self.kind.is_empty() && is_sentence())
    }
}

fn judge(dialect: Dialect, data: Bytes) -> Verdict {
    if data.trim_ascii().is_empty() {
        return Verdict::Hold;
    }
    // What is no JSON is content, or the end: `[DONE]`.
    let Ok(event) = serde_json::from_slice::<Event>(&data) else { return Verdict::Release };
    if event.is_error(dialect) {
        return failed("", data.clone());
    }
    let says_nothing = match &*event.kind {
        // A chunk of chat or of completions.
        "" => event.choices.is_some_and(|choices| !choices.0) && !event.usage.0,
        "ping" | "keepalive" | "response.created" | "response.queued" | "response.in_progress" => true,
        "message_start" => event.message.is_some_and(begins_empty),
        "content_block_start" => !event.content_block.0,
        "content_block_delta" | "message-start" | "content-start" | "content-delta" | "tool-plan-delta" => {
            !event.delta.0
        }
        // Reasoning that has begun may last for minutes of silence: that is work, not a beginning.
        "response.output_item.added" => event.item.is_some_and(begins_empty),
        "response.content_part.added" => !event.part.0,
        "response.failed" => return failed_response(event.response, &data),
        "message-end" => return message_end(&data),
        _ => false,
    };
    if says_nothing { Verdict::Hold } else { Verdict::Release }
}

/// A message, of Anthropic's or in an answer of OpenAI's, without anything in it.
fn begins_empty(message: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(rename = "type", borrow, default)]
        kind: Cow<'a, str>,
        #[serde(default)]
        content: Says,
        #[serde(default)]
        stop_reason: Says,
    }
    let message = serde_json::from_str::<Message>(message.get());
    message
        .is_ok_and(|message| matches!(&*message.kind, "message" | "") && !message.content.0 && !message.stop_reason.0)
}

/// OpenAI puts the error into the answer that failed; with an error status it would stand alone.
fn failed_response(response: Option<&RawValue>, data: &Bytes) -> Verdict {
    #[derive(Deserialize)]
    struct Response<'a> {
        #[serde(borrow)]
        error: Option<&'a RawValue>,
    }
    let response = response.and_then(|response| serde_json::from_str::<Response>(response.get()).ok());
    match response.and_then(|response| response.error) {
        Some(error) => failed("", format!("{{\"error\":{}}}", error.get()).into()),
        None => failed("", data.clone()),
    }
}

/// Cohere ends a stream that fails as it ends others; with an error status it would send a sentence.
fn message_end(data: &[u8]) -> Verdict {
    #[derive(Deserialize)]
    struct End {
        delta: Option<Delta>,
    }
    #[derive(Deserialize)]
    struct Delta {
        finish_reason: Option<String>,
        error: Option<String>,
    }
    let delta = serde_json::from_slice::<End>(data).ok().and_then(|end| end.delta);
    let Some(Delta { finish_reason, error }) = delta else { return Verdict::Release };
    let reason = finish_reason.unwrap_or_default();
    let error = error.filter(|error| !error.is_empty());
    if error.is_none() && !matches!(reason.as_str(), "ERROR" | "TIMEOUT" | "ERROR_LIMIT") {
        return Verdict::Release;
    }
    let word = if reason == "TIMEOUT" { "timeout" } else { "" };
    failed(word, json!({ "message": error.unwrap_or(reason) }).to_string().into())
}

/// `word` is what the provider calls it outside of the body, if it does.
fn failed(word: &str, body: Bytes) -> Verdict {
    let document = serde_json::from_slice::<Value>(&body).ok().filter(Value::is_object);
    if let Some(document) = document {
        return Verdict::Failed { status: status(word, &document), body };
    }
    let message = String::from_utf8_lossy(&body);
    let document = json!({ "error": { "message": message.trim() } });
    Verdict::Failed { status: status(word, &document), body: document.to_string().into() }
}

/// Parts of names of errors, in letters and digits, and the status that goes with them. The first that is found counts.
const STATUSES: [(u16, &[&str]); 11] = [
    (529, &["overloadederror"]),
    (503, &["overloaded", "unavailable", "notready", "slowdown"]),
    (429, &["ratelimit", "throttl", "resourceexhausted", "toomany", "quota", "capacityexceeded"]),
    (402, &["billing", "paymentrequired", "insufficientbalance", "insufficientcredits"]),
    (401, &["authentication", "unauthenticated", "unauthorized", "apikey", "unrecognizedclient", "expiredtoken"]),
    (403, &["permission", "accessdenied", "forbidden"]),
    (404, &["notfound"]),
    (413, &["toolarge"]),
    (504, &["timeout", "timedout", "deadline"]),
    (503, &["capacity"]),
    (400, &["invalid", "validation", "badrequest", "contextlength", "contentfilter", "contentpolicy", "unsupported"]),
];

/// The status that an error would have had: its own number, or the one that goes with its name.
fn status(word: &str, document: &Value) -> u16 {
    let error = if document["error"].is_object() { &document["error"] } else { document };
    let fields = |names: [&'static str; 4]| names.into_iter().flat_map(|name| [&error[name], &document[name]]);
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let is_failure = |number: &u64| (400..600).contains(number);
    if let Some(own) = fields(["code", "status", "status_code", "http_status"]).filter_map(number).find(is_failure) {
        return own as u16;
    }
    let mut words = letters(word);
    for name in fields(["type", "code", "status", "error_type"]).filter_map(Value::as_str) {
        // An event's own type, and numbers that only their maker can read, are no names.
        if name != "error" && name.contains(|letter: char| letter.is_ascii_alphabetic()) {
            words += &letters(name);
        }
    }
    // Where it has no name the sentence has to do.
    if words.is_empty() {
        let sentences = [&error["message"], &document["error"], &document["detail"]];
        words.extend(sentences.into_iter().filter_map(Value::as_str).map(letters));
    }
    let found = STATUSES.iter().find(|(_, parts)| parts.iter().any(|part| words.contains(part)));
    found.map_or(500, |(status, _)| *status)
}

/// `rate_limit_error`, `RateLimitError` and `Rate limit error` are one name.
fn letters(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect()
}

/// Whether there is anything in a value: not if it is nothing, empty, or made of such. Roles, types and indices are nothing.
#[derive(Clone, Copy, Default, Debug)]
struct Says(bool);

impl<'de> Deserialize<'de> for Says {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SaysWalk).map(Self)
    }
}

struct SaysWalk;

impl<'de> Visitor<'de> for SaysWalk {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E>(self, value: bool) -> Result<bool, E> {
        Ok(value)
    }

    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(!text.is_empty())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let mut any = false;
        while let Some(Says(says)) = list.next_element()? {
            any |= says;
        }
        Ok(any)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut any = false;
        while let Some(IsFrame(is_frame)) = map.next_key()? {
            if is_frame {
                map.next_value::<IgnoredAny>()?;
            } else {
                any |= map.next_value::<Says>()?.0;
            }
        }
        Ok(any)
    }
}

/// Whether a key names what surrounds content.
struct IsFrame(bool);

impl<'de> Deserialize<'de> for IsFrame {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk;
        impl Visitor<'_> for Walk {
            type Value = bool;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, key: &str) -> Result<bool, E> {
                Ok(matches!(key, "role" | "type" | "index"))
            }
        }
        deserializer.deserialize_str(Walk).map(Self)
    }
}

#[cfg(test)]
#[path = "opening_test.rs"]
mod tests;
