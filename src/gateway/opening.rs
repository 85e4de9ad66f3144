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
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use memchr::memmem::Finder;
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
const MAX_BYTES: usize = 256 * 1024;
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

/// Looks on as a stream goes by, whether it says of itself that it failed. The caller reads that as it was said; it is not
/// kept for others, and no good answer.
#[derive(Debug)]
pub struct Watch {
    dialect: Dialect,
    /// None: AWS's frames.
    decoder: Option<Decoder>,
    /// In the middle of an event, or the last bytes of frames.
    midway: Vec<u8>,
    has_failed: bool,
}

/// In every event that says so, whatever else is in it.
static WORDS: LazyLock<[Finder<'static>; 2]> =
    LazyLock::new(|| ["rror", "RROR"].map(|word| Finder::new(word.as_bytes())));
/// The names of headers that only frames of failures have, with the lengths around them: no JSON holds these bytes.
const FAILURES: [&[u8]; 2] = [b"\x0f:exception-type\x07", b"\x0b:error-code\x07"];

impl Watch {
    /// Over an answer of this content type; nothing where that is no stream of events.
    pub fn new(dialect: Dialect, content_type: &str) -> Option<Self> {
        let kind = content_type.split(';').next().unwrap_or_default().trim();
        let decoder = match kind {
            _ if kind.eq_ignore_ascii_case("text/event-stream") => Some(Decoder::new(MAX_BYTES)),
            _ if kind.eq_ignore_ascii_case("application/vnd.amazon.eventstream") => None,
            _ => return None,
        };
        Some(Self { dialect, decoder, midway: Vec::new(), has_failed: false })
    }

    /// The next bytes of it.
    pub fn feed(&mut self, chunk: &[u8]) {
        if self.has_failed {
            return;
        }
        let Some(decoder) = &mut self.decoder else {
            // A name may come in two pieces.
            let longest = FAILURES.map(<[u8]>::len).into_iter().max().unwrap_or_default();
            self.midway.extend_from_slice(&chunk[..chunk.len().min(longest)]);
            let found = |bytes: &[u8]| FAILURES.iter().any(|name| memchr::memmem::find(bytes, name).is_some());
            self.has_failed = found(&self.midway) || found(chunk);
            if chunk.len() > longest {
                self.midway.clear();
                self.midway.extend_from_slice(&chunk[chunk.len() - longest..]);
            }
            self.midway.drain(..self.midway.len().saturating_sub(longest));
            return;
        };
        let is_whole = chunk.ends_with(b"\n\n") || chunk.ends_with(b"\r\n\r\n");
        // Most chunks are whole events that say nothing like it: these cost a search.
        if self.midway.is_empty() && is_whole && WORDS.iter().all(|word| word.find(chunk).is_none()) {
            return;
        }
        self.midway.clear();
        if !is_whole {
            self.midway.push(b'.');
        }
        let mut events = Vec::new();
        // What is too long to be an event is content.
        if decoder.feed(chunk, &mut events).is_err() {
            *decoder = Decoder::new(MAX_BYTES);
        }
        let dialect = self.dialect;
        let failed = |event| matches!(sse_event(dialect, event), Verdict::Failed { .. });
        self.has_failed = events.into_iter().any(failed);
    }

    /// Whether it has said so, now that all of it is there.
    pub fn has_failed(&mut self) -> bool {
        if self.decoder.is_some() && !self.midway.is_empty() {
            self.feed(b"\n\n");
        }
        self.has_failed
    }
}

fn sse_event(dialect: Dialect, event: SseEvent) -> Verdict {
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fallback::{Class, Failure, classify};
    use crate::provider::frame::encode;

    const SSE: &str = "text/event-stream; charset=utf-8";
    const AMAZON: &str = "application/vnd.amazon.eventstream";

    /// The verdict on a stream that comes in these pieces, and what is handed on if it is released there.
    fn read<'a>(dialect: Dialect, kind: &str, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Verdict, Vec<u8>) {
        let mut opening = Opening::new(dialect, Some(kind)).unwrap();
        let mut pieces = pieces.into_iter();
        let mut verdict = pieces.by_ref().map(|piece| opening.feed(&Bytes::copy_from_slice(piece)));
        let verdict = verdict.find(|verdict| *verdict != Verdict::Hold).unwrap_or(Verdict::Hold);
        let mut all = opening.into_chunks().into_iter().flatten().collect::<Vec<u8>>();
        all.extend(pieces.flatten());
        (verdict, all)
    }

    fn check_bytes(dialect: Dialect, kind: &str, bytes: &[u8], expected: &Verdict) {
        let shown = String::from_utf8_lossy(bytes);
        let check = |pieces: Vec<&[u8]>, how: &str| {
            let (verdict, all) = read(dialect, kind, pieces);
            assert_eq!(verdict, *expected, "{how}: {shown}");
            assert_eq!(all, bytes, "{how}: {shown}");
        };
        check(vec![bytes], "whole");
        check(bytes.chunks(1).collect(), "byte by byte");
        for cut in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(cut);
            check(vec![head, tail], &format!("cut at {cut}"));
        }
    }

    /// Of server-sent events without their blank lines, or of their data alone where that is JSON.
    fn check(dialect: Dialect, events: &[&str], expected: &Verdict) {
        let field = |event: &str| if event.starts_with('{') { "data: " } else { "" };
        let text: String = events.iter().map(|event| format!("{}{event}\n\n", field(event))).collect();
        check_bytes(dialect, SSE, text.as_bytes(), expected);
        check_bytes(dialect, SSE, text.replace('\n', "\r\n").as_bytes(), expected);
    }

    fn frame(kind: &str, name: &str, payload: &str) -> Vec<u8> {
        let of_name = if kind == "event" { ":event-type" } else { ":exception-type" };
        encode(&[(of_name, name), (":content-type", "application/json"), (":message-type", kind)], payload.as_bytes())
    }

    fn packed(inner: &str) -> Vec<u8> {
        frame("event", "chunk", &format!("{{\"bytes\":\"{}\",\"p\":\"abcdef\"}}", STANDARD.encode(inner)))
    }

    const ROLE: &str = r#"{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null,"tool_calls":[]},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x"}"#;
    const FILTER: &str = r#"{"choices":[],"prompt_filter_results":[{"prompt_index":0}],"usage":null}"#;
    const CREATED: &str = r#"{"type":"response.created","response":{"error":null,"output":[],"tools":[{"name":"f"}]}}"#;
    const START: &str = r#"{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","content":[],"model":"c","stop_reason":null,"usage":{"input_tokens":25,"output_tokens":1}}}"#;
    const PING: &str = "event: ping\ndata: {\"type\": \"ping\"}";
    const BLOCK: &str = r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#;
    const COHERE: &str =
        r#"{"type":"message-start","delta":{"message":{"role":"assistant","content":[],"tool_plan":""}}}"#;

    #[test]
    fn what_says_nothing_yet_is_held() {
        use Dialect::{Anthropic, Cohere, OpenAi};
        let item = r#"{"type":"response.output_item.added","item":{"id":"m","type":"message","content":[]}}"#;
        let part = r#"{"type":"response.content_part.added","part":{"type":"output_text","text":"","logprobs":[]}}"#;
        let thinking = r#"{"type":"content_block_start","content_block":{"type":"thinking","thinking":""}}"#;
        let delta = r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":""}}"#;
        let content = r#"{"type":"content-start","delta":{"message":{"content":{"type":"text","text":""}}}}"#;
        for (dialect, events) in [
            (OpenAi, &["\u{feff}: OPENROUTER PROCESSING", ":", FILTER, ROLE, "data:", "id: 7\nretry: 3"][..]),
            (OpenAi, &[r#"{"choices":[{"text":"","index":0,"finish_reason":null}]}"#]),
            (OpenAi, &[r#"{"choices":[{"delta":{"role":"assistant"}}],"error":null,"x_groq":{"id":"r"}}"#]),
            (OpenAi, &[CREATED, r#"{"type":"response.in_progress","response":{}}"#, item, part]),
            (OpenAi, &[r#"{"type":"response.queued"}"#, r#"{"type":"keepalive","sequence_number":3}"#]),
            (Anthropic, &[START, PING, thinking, BLOCK]),
            (Anthropic, &[START, delta]),
            (Cohere, &[COHERE, content]),
        ] {
            check(dialect, events, &Verdict::Hold);
        }
        let start = frame("event", "messageStart", r#"{"p":"abcd","role":"assistant"}"#);
        let delta = frame("event", "contentBlockDelta", r#"{"contentBlockIndex":0,"delta":{"text":""},"p":"ab"}"#);
        let converse = [frame("event", "initial-response", "{}"), start, delta].concat();
        check_bytes(Dialect::Bedrock, AMAZON, &converse, &Verdict::Hold);
        let invoke = [packed(START), packed(r#"{"type":"ping"}"#), packed(BLOCK)].concat();
        check_bytes(Dialect::Bedrock, AMAZON, &invoke, &Verdict::Hold);
    }

    #[test]
    fn content_releases_all_of_it() {
        use Dialect::{Anthropic, Cohere, Google, Opaque, OpenAi};
        let chat = |choice: &str| format!("{{\"choices\":[{{\"index\":0,{choice}}}]}}");
        for (dialect, before, event) in [
            (OpenAi, ROLE, &*chat(r#""delta":{"content":"a"}"#)),
            (OpenAi, ROLE, &*chat(r#""delta":{"reasoning_content":"a"}"#)),
            (OpenAi, ROLE, &*chat(r#""delta":{"refusal":"a"}"#)),
            (OpenAi, ROLE, &*chat(r#""delta":{"audio":{"id":"a"}}"#)),
            (OpenAi, ROLE, &*chat(r#""delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f"}}]}"#)),
            (OpenAi, ROLE, &*chat(r#""delta":{},"finish_reason":"stop""#)),
            (OpenAi, FILTER, &*chat(r#""text":"a""#)),
            (OpenAi, ROLE, r#"{"choices":[],"usage":{"prompt_tokens":1}}"#),
            (OpenAi, ROLE, "data: [DONE]"),
            (OpenAi, CREATED, r#"{"type":"response.output_text.delta","delta":"a"}"#),
            (OpenAi, CREATED, r#"{"type":"response.output_item.added","item":{"type":"reasoning"}}"#),
            (OpenAi, CREATED, r#"{"type":"response.output_item.added","item":{"type":"function_call"}}"#),
            (OpenAi, CREATED, r#"{"type":"response.completed","response":{}}"#),
            (Anthropic, BLOCK, r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#),
            (Anthropic, BLOCK, r#"{"type":"content_block_delta","delta":{"thinking":"a"}}"#),
            (Anthropic, START, r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"t"}}"#),
            (Anthropic, START, r#"{"type":"content_block_start","content_block":{"data":"x"}}"#),
            (Anthropic, START, r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"}}"#),
            (Anthropic, PING, r#"{"type":"message_start","message":{"content":[{"text":"a"}]}}"#),
            (Google, ": a", r#"{"candidates":[{"content":{"parts":[{"text":"a"}],"role":"model"}}]}"#),
            (Google, ": a", r#"{"promptFeedback":{"blockReason":"SAFETY"}}"#),
            (Cohere, COHERE, r#"{"type":"content-delta","delta":{"message":{"content":{"text":"a"}}}}"#),
            (Cohere, COHERE, r#"{"type":"tool-plan-delta","delta":{"message":{"tool_plan":"a"}}}"#),
            (Cohere, COHERE, r#"{"type":"message-end","delta":{"finish_reason":"COMPLETE"}}"#),
            (Cohere, COHERE, r#"{"type":"message-end","delta":{"finish_reason":"ERROR_TOXIC"}}"#),
            (Opaque, ": a", "event: output\ndata: some text"),
        ] {
            // What comes behind content is nobody's business here.
            check(dialect, &[before, event, r#"{"error":{"code":503}}"#], &Verdict::Release);
        }
        for event in [
            frame("event", "contentBlockDelta", r#"{"delta":{"text":"a"}}"#),
            frame("event", "contentBlockStart", r#"{"start":{"toolUse":{"toolUseId":"t","name":"f"}}}"#),
            frame("event", "messageStop", r#"{"stopReason":"end_turn"}"#),
            packed(r#"{"generation":"","stop_reason":null}"#),
            packed(r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#),
        ] {
            let start = frame("event", "messageStart", r#"{"role":"assistant"}"#);
            let late = frame("exception", "throttlingException", "{}");
            check_bytes(Dialect::Bedrock, AMAZON, &[start, event, late].concat(), &Verdict::Release);
        }
    }

    #[test]
    fn what_is_not_understood_is_released() {
        for text in [
            "<html>oops</html>",
            "data: {\"choices\": [{\"delta\": \n\n",
            "data: 7\n\n",
            "data: {\"x\":1}\n\n",
            "data: {\"error\":100}\n\n",
            "data: {\"error\":{}}\n\n",
            "data: {\"type\":{}}\n\n",
            "[{\"error\":{\"code\":503}}]",
            "{\"candidates\":[]}\n{\"error\":{}}",
            "{\"choices\":[]}",
            "{}}",
            "\u{0}\u{1}",
        ] {
            check_bytes(Dialect::OpenAi, SSE, text.as_bytes(), &Verdict::Release);
        }
        let mut damaged = frame("exception", "throttlingException", "{}");
        *damaged.last_mut().unwrap() ^= 1;
        check_bytes(Dialect::Bedrock, AMAZON, &damaged, &Verdict::Release);
        check_bytes(Dialect::Bedrock, AMAZON, b"data: {\"error\":{}}\n\n", &Verdict::Release);
        for kind in [None, Some("application/json; charset=UTF-8"), Some("audio/mpeg"), Some("")] {
            assert!(Opening::new(Dialect::Google, kind).is_none(), "{kind:?}");
        }
    }

    fn fails(dialect: Dialect, events: &[&str], status: u16, class: Class, body: &str) {
        check(dialect, events, &Verdict::Failed { status, body: Bytes::copy_from_slice(body.as_bytes()) });
        assert_eq!(classify(Failure::Answer { status, head: body.as_bytes() }), class, "{status} {body}");
    }

    #[test]
    fn errors_become_answers_with_the_status_that_fits() {
        use Class::{Billing, Caller, ContextTooLong, Credential, Overload, Quota, Refused, Timeout};
        use Dialect::{Anthropic, Cohere, Google, Opaque, OpenAi};
        for (dialect, before, status, class, body) in [
            (OpenAi, ROLE, 500, Overload, r#"{"error":{"message":"m","type":"server_error","code":null}}"#),
            (OpenAi, ROLE, 429, Quota, r#"{"error":{"message":"m","type":"tokens","code":"rate_limit_exceeded"}}"#),
            (OpenAi, ":", 429, Billing, r#"{"error":{"message":"m","code":"insufficient_quota"}}"#),
            (
                OpenAi,
                ":",
                401,
                Credential,
                r#"{"error":{"message":"m","type":"invalid_request","code":"invalid_api_key"}}"#,
            ),
            (
                OpenAi,
                ":",
                404,
                Caller,
                r#"{"error":{"message":"m","type":"invalid_request","code":"model_not_found"}}"#,
            ),
            (OpenAi, ":", 400, ContextTooLong, r#"{"error":{"message":"m","code":"context_length_exceeded"}}"#),
            (OpenAi, ":", 400, Refused, r#"{"error":{"message":"m","code":"content_filter"}}"#),
            (OpenAi, ":", 400, Caller, r#"{"error":{"message":"m","type":"invalid_request","code":400}}"#),
            (
                OpenAi,
                ROLE,
                502,
                Overload,
                r#"{"choices":[{"finish_reason":"error"}],"error":{"code":502,"message":"m"}}"#,
            ),
            (OpenAi, ":", 429, Quota, r#"{"object":"error","type":"service_tier_capacity_exceeded","code":"3505"}"#),
            (OpenAi, ":", 503, Overload, r#"{"error":{"code":"1305","message":"The service is overloaded"}}"#),
            (OpenAi, ":", 503, Overload, r#"{"error":{"type":"over_capacity","message":"m"}}"#),
            (OpenAi, ":", 429, Quota, r#"{"error":{"code":"429","message":"m"}}"#),
            (OpenAi, CREATED, 500, Overload, r#"{"type":"error","sequence_number":2,"code":"server_error"}"#),
            (OpenAi, CREATED, 503, Overload, r#"{"type":"error","code":null,"message":"We are overloaded"}"#),
            (
                Anthropic,
                START,
                529,
                Overload,
                r#"{"type":"error","error":{"type":"overloaded_error"},"request_id":"r"}"#,
            ),
            (Anthropic, PING, 429, Quota, r#"{"type":"error","error":{"type":"rate_limit_error"}}"#),
            (Anthropic, BLOCK, 500, Overload, r#"{"type":"error","error":{"type":"api_error"}}"#),
            (Anthropic, ":", 401, Credential, r#"{"type":"error","error":{"type":"authentication_error"}}"#),
            (Anthropic, ":", 403, Credential, r#"{"type":"error","error":{"type":"permission_error"}}"#),
            (Anthropic, ":", 402, Billing, r#"{"type":"error","error":{"type":"billing_error"}}"#),
            (Anthropic, ":", 413, Caller, r#"{"type":"error","error":{"type":"request_too_large"}}"#),
            (Anthropic, ":", 504, Timeout, r#"{"type":"error","error":{"type":"timeout_error"}}"#),
            (
                Anthropic,
                ":",
                400,
                ContextTooLong,
                r#"{"error":{"type":"invalid_request_error","message":"prompt is too long"}}"#,
            ),
            (Google, ":", 503, Overload, r#"{"error":{"code":503,"message":"m","status":"UNAVAILABLE"}}"#),
            (Google, ":", 429, Quota, r#"{"error":{"message":"m","status":"RESOURCE_EXHAUSTED"}}"#),
            (Cohere, COHERE, 429, Quota, r#"{"message":"too many requests"}"#),
            (Opaque, ":", 503, Overload, r#"{"error":"Model is overloaded","error_type":"overloaded"}"#),
            (Opaque, ":", 500, Overload, r#"{"error":true}"#),
        ] {
            fails(dialect, &[before, body, ROLE], status, class, body);
        }
    }

    #[test]
    fn errors_inside_other_events_stand_as_they_would_alone() {
        let body = r#"{"error":{"code":"rate_limit_exceeded","message":"m"}}"#;
        let failed = format!("{{\"type\":\"response.failed\",\"response\":{body}}}");
        fails(Dialect::OpenAi, &[CREATED, &failed], 429, Class::Quota, body);
        let body = r#"{"type":"response.failed","response":null}"#;
        fails(Dialect::OpenAi, &[body], 500, Class::Overload, body);
        for (delta, status, class, body) in [
            (r#"{"finish_reason":"ERROR","error":"oh"}"#, 500, Class::Overload, r#"{"message":"oh"}"#),
            (r#"{"finish_reason":"ERROR_LIMIT"}"#, 500, Class::Overload, r#"{"message":"ERROR_LIMIT"}"#),
            (r#"{"finish_reason":"TIMEOUT","error":"oh"}"#, 504, Class::Timeout, r#"{"message":"oh"}"#),
        ] {
            let end = format!("{{\"type\":\"message-end\",\"delta\":{delta}}}");
            fails(Dialect::Cohere, &[COHERE, &end], status, class, body);
        }
        for (data, status, class, body) in [
            ("unavailable", 503, Class::Overload, r#"{"error":{"message":"unavailable"}}"#),
            (r#"{"code":"InvalidApiKey"}"#, 401, Class::Credential, r#"{"code":"InvalidApiKey"}"#),
            ("{\"error\":\ndata: {\"code\":429}}", 429, Class::Quota, "{\"error\":\n{\"code\":429}}"),
        ] {
            fails(Dialect::Opaque, &[PING, &format!("event: error\ndata: {data}")], status, class, body);
        }
        // A sentence is an error at Cohere only.
        check(Dialect::Opaque, &[r#"{"message":"hello"}"#], &Verdict::Release);
    }

    #[test]
    fn bedrocks_exceptions_are_known_by_their_names() {
        let check = |before: &[u8], last: Vec<u8>, status: u16, class: Class, body: &str| {
            let expected = Verdict::Failed { status, body: Bytes::copy_from_slice(body.as_bytes()) };
            check_bytes(Dialect::Bedrock, AMAZON, &[before, &last].concat(), &expected);
            assert_eq!(classify(Failure::Answer { status, head: body.as_bytes() }), class, "{status} {body}");
        };
        let start = frame("event", "messageStart", r#"{"role":"assistant"}"#);
        let body = r#"{"message":"m"}"#;
        for (name, status, class) in [
            ("throttlingException", 429, Class::Quota),
            ("serviceUnavailableException", 503, Class::Overload),
            ("internalServerException", 500, Class::Overload),
            ("modelStreamErrorException", 500, Class::Overload),
            ("modelTimeoutException", 504, Class::Timeout),
            ("validationException", 400, Class::Caller),
            ("accessDeniedException", 403, Class::Credential),
        ] {
            check(&start, frame("exception", name, body), status, class, body);
        }
        let name = "throttlingException";
        check(b"", frame("exception", name, ""), 429, Class::Quota, &format!("{{\"message\":\"{name}\"}}"));
        let headers = [(":message-type", "error"), (":error-code", "InternalError"), (":error-message", "oops")];
        check(&start, encode(&headers, b""), 500, Class::Overload, r#"{"message":"oops"}"#);
        let inner = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
        check(&packed(r#"{"type":"ping"}"#), packed(inner), 529, Class::Overload, inner);
    }

    #[test]
    fn an_error_without_a_frame_is_one_too() {
        let body =
            "{\n  \"error\": {\n    \"code\": 503,\n    \"message\": \"}\",\n    \"status\": \"UNAVAILABLE\"\n  }\n}";
        let expected = Verdict::Failed { status: 503, body: Bytes::from(body) };
        for text in [body.to_owned(), format!("\r\n{body}\n"), format!(": hello\n\n{body}")] {
            check_bytes(Dialect::Google, SSE, text.as_bytes(), &expected);
        }
        let endless = format!("{{\"a\":\"{}", "x".repeat(MAX_DOCUMENT));
        assert_eq!(read(Dialect::Google, SSE, [endless.as_bytes()]).0, Verdict::Release);
    }

    #[test]
    fn a_failure_in_the_middle_is_seen_however_it_is_cut_and_talk_of_errors_is_none() {
        let text = "data: {\"choices\":[{\"delta\":{\"content\":\"an error occurred: {\\\"error\\\":1}\"}}]}\n\n";
        let said =
            "event: response.in_progress\ndata: {\"type\":\"response.in_progress\",\"response\":{\"error\":null}}\n\n";
        let check = |kind: &str, stream: &[u8], has_failed: bool| {
            for size in [1, 2, 3, 7, 50, stream.len()] {
                let mut watch = Watch::new(Dialect::OpenAi, kind).unwrap();
                stream.chunks(size).for_each(|chunk| watch.feed(chunk));
                assert_eq!(watch.has_failed(), has_failed, "{size}: {:?}", String::from_utf8_lossy(stream));
            }
        };
        let sse = "text/event-stream; charset=utf-8";
        for failure in [
            "data: {\"error\":{\"message\":\"m\",\"type\":\"server_error\"}}\n\n",
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"m\"}}\r\n\r\n",
            "data: {\"type\":\"response.failed\",\"response\":{\"status\":\"failed\",\"error\":{\"code\":\"c\",\"message\":\"m\"}}}\n\n",
            "data: {\"error\":{\"message\":\"the blank line never comes\"}}",
        ] {
            check(sse, format!("{text}{said}{text}{failure}").as_bytes(), true);
            check(sse, format!("{text}{said}{text}").as_bytes(), false);
        }
        let talk = frame("event", "contentBlockDelta", "{\"delta\":{\"text\":\":exception-type\"}}");
        let failure = frame("exception", "throttlingException", "{\"message\":\"m\"}");
        let aws = "application/vnd.amazon.eventstream";
        check(aws, &[talk.clone(), talk.clone()].concat(), false);
        check(aws, &[talk.clone(), failure, talk].concat(), true);
        assert!(Watch::new(Dialect::OpenAi, "application/json").is_none());
    }

    #[test]
    fn the_end_completes_an_event_whose_blank_line_never_came() {
        let end = |kind: &str, bytes: &[u8]| {
            let mut opening = Opening::new(Dialect::OpenAi, Some(kind)).unwrap();
            assert_eq!(opening.feed(&Bytes::copy_from_slice(bytes)), Verdict::Hold);
            let verdict = opening.end();
            assert_eq!(opening.into_chunks(), [bytes]);
            verdict
        };
        let failed = Verdict::Failed { status: 503, body: Bytes::from_static(b"{\"error\":{\"code\":503}}") };
        for tail in ["", "\n", "\r", "\r\n"] {
            let text = format!("data: {{\"error\":{{\"code\":503}}}}{tail}");
            assert_eq!(end(SSE, text.as_bytes()), failed, "{text:?}");
        }
        assert_eq!(end(SSE, b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}"), Verdict::Release);
        assert_eq!(end(SSE, format!("{PING}\n\n").as_bytes()), Verdict::Hold);
        assert_eq!(end(SSE, b"{\"error\":"), Verdict::Release);
        assert_eq!(end(AMAZON, &frame("event", "messageStart", "{}")[..20]), Verdict::Hold);
    }

    #[test]
    fn no_more_is_held_than_was_agreed() {
        let pings = |count: usize| format!("{PING}\n\n").repeat(count);
        assert_eq!(read(Dialect::Anthropic, SSE, [pings(MAX_EVENTS).as_bytes()]).0, Verdict::Hold);
        let error = format!("{}data: {{\"error\":\"oh\"}}\n\n", pings(MAX_EVENTS + 1));
        check_bytes(Dialect::Anthropic, SSE, error.as_bytes(), &Verdict::Release);
        let comments = vec![b'\n'; MAX_BYTES + 1];
        assert_eq!(read(Dialect::OpenAi, SSE, [&comments[1..]]).0, Verdict::Hold);
        assert_eq!(read(Dialect::OpenAi, SSE, comments.chunks(4000)).0, Verdict::Release);
        let large = format!("data: {}", "x".repeat(MAX_BYTES));
        assert_eq!(read(Dialect::OpenAi, SSE, [large.as_bytes()]).0, Verdict::Release);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_change_on_the_way(
            start in prop::sample::select(vec!["", "data: {\"", "data: {\"error\":", "event: error\ndata: ", "{", ": "]),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            amazon in any::<bool>(),
            size in 1usize..40,
        ) {
            let bytes = [start.as_bytes(), &bytes].concat();
            let kind = if amazon { AMAZON } else { SSE };
            let (_, all) = read(Dialect::Cohere, kind, bytes.chunks(size));
            prop_assert_eq!(all, bytes);
        }
    }
}
