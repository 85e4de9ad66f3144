//! Chat completions as messages, whole and streamed.
//!
//!     {"delta":{"content":"Hi"}}     ->  content_block_start (text)  content_block_delta
//!     {"delta":{"tool_calls":[…]}}   ->  content_block_stop  content_block_start (tool_use)  content_block_delta (input_json)
//!     {"finish_reason":"stop"}       ->  content_block_stop
//!     usage, [DONE]                  ->  message_delta  message_stop
//!
//! Prompt tokens are known at the end only, so `message_delta` tells them again: clients take the last word.

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::base::{Error, Kind, Result};
use crate::net::sse::{Decoder, Encoder, SseEvent};
use crate::provider::json::{Maybe, Text};
use crate::provider::usage::Counts;
use crate::provider::{broken, failure as failures};
use crate::task::Usage;

const LONGEST_EVENT: usize = 16 << 20;

/// A whole `chat.completion` as a message.
///
/// # Errors
/// `ModelUnavailable` if it is none.
pub fn answer(openai: &[u8]) -> Result<Bytes> {
    #[derive(Deserialize)]
    struct Completion {
        #[serde(default)]
        id: String,
        #[serde(default)]
        model: String,
        choices: Vec<Value>,
        usage: Option<Counts>,
    }
    let completion: Completion = serde_json::from_slice(openai)
        .map_err(|error| broken(format!("the answer is not a chat completion: {error}")))?;
    let choice = completion.choices.first().ok_or_else(|| broken("the answer has no choices"))?;
    let message = &choice["message"];
    let mut content = Vec::new();
    let thoughts = message["reasoning_content"].as_str().or(message["reasoning"].as_str());
    match message["thinking_blocks"].as_array() {
        Some(blocks) => content.extend(blocks.iter().cloned()),
        None => content.extend(
            thoughts
                .filter(|text| !text.is_empty())
                .map(|text| json!({"type": "thinking", "thinking": text, "signature": ""})),
        ),
    }
    let said = message["content"].as_str().filter(|text| !text.is_empty()).or(message["refusal"].as_str());
    content.extend(said.map(|text| json!({"type": "text", "text": text})));
    for call in message["tool_calls"].as_array().into_iter().flatten() {
        let function = &call["function"];
        let input = input(function["arguments"].as_str().unwrap_or(""));
        content.push(json!({"type": "tool_use", "id": call["id"], "name": function["name"], "input": input}));
    }
    let stop = choice["stop_reason"].as_str();
    let reason = stop_reason(choice["finish_reason"].as_str(), stop, message["refusal"].is_string());
    let message = json!({
        "id": message_id(&completion.id),
        "type": "message",
        "role": "assistant",
        "model": completion.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop.filter(|_| reason == "stop_sequence"),
        "usage": UsageJson::new(completion.usage.unwrap_or_default().usage()),
    });
    Ok(message.to_string().into())
}

/// An error in OpenAI's shape as one in Anthropic's. The status stays.
pub fn failure(status: u16, openai_error: &[u8]) -> (u16, Bytes) {
    let document: Value = serde_json::from_slice(openai_error).unwrap_or_default();
    let message = document["error"]["message"].as_str().unwrap_or("the model could not answer");
    let kind = match status {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        503 | 529 => "overloaded_error",
        _ => "api_error",
    };
    (status, json!({"type": "error", "error": {"type": kind, "message": message}}).to_string().into())
}

/// A sign of life, as Anthropic sends them.
pub fn ping(out: &mut Encoder) {
    out.json(Some("ping"), &json!({"type": "ping"}));
}

/// `msg_…`, whatever it was called before.
fn message_id(id: &str) -> Cow<'_, str> {
    match id.strip_prefix("chatcmpl-") {
        _ if id.starts_with("msg_") => id.into(),
        Some(rest) => format!("msg_{rest}").into(),
        None => format!("msg_{id}").into(),
    }
}

/// Arguments as the object that they should be. What is none is passed on as text, where somebody may still see it.
fn input(arguments: &str) -> Value {
    match serde_json::from_str(arguments.trim()) {
        Ok(Value::Object(object)) => Value::Object(object),
        _ if matches!(arguments.trim(), "" | "null") => json!({}),
        _ => json!({"INVALID_JSON": arguments}),
    }
}

fn stop_reason(finish: Option<&str>, stop: Option<&str>, refused: bool) -> &'static str {
    match finish {
        Some("length") => "max_tokens",
        Some("tool_calls" | "function_call") => "tool_use",
        Some("content_filter") => "refusal",
        _ if refused => "refusal",
        _ if stop.is_some() => "stop_sequence",
        _ => "end_turn",
    }
}

/// Anthropic counts cached tokens beside the others.
#[derive(Clone, Copy, Serialize)]
struct UsageJson {
    input_tokens: u32,
    cache_creation_input_tokens: u32,
    cache_read_input_tokens: u32,
    output_tokens: u32,
}

impl UsageJson {
    fn new(usage: Option<Usage>) -> Self {
        let usage = usage.unwrap_or_default();
        Self {
            input_tokens: usage.prompt_tokens - usage.cached_tokens,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.cached_tokens,
            output_tokens: usage.completion_tokens,
        }
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    model: Option<Text<'a>>,
    #[serde(borrow)]
    choices: Option<Vec<ChunkChoice<'a>>>,
    #[serde(default)]
    usage: Maybe<Counts>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct ChunkChoice<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    stop_reason: Option<Value>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning_content: Option<Text<'a>>,
    /// The same by another name; some send both.
    #[serde(borrow)]
    reasoning: Option<Text<'a>>,
    #[serde(borrow)]
    refusal: Option<Text<'a>>,
    #[serde(borrow)]
    thinking_blocks: Option<Vec<ThinkingBlock<'a>>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<CallDelta<'a>>>,
}

#[derive(Deserialize)]
struct ThinkingBlock<'a> {
    #[serde(borrow)]
    signature: Option<Text<'a>>,
    #[serde(borrow)]
    data: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct CallDelta<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    function: Option<FunctionDelta<'a>>,
}

#[derive(Deserialize)]
struct FunctionDelta<'a> {
    #[serde(borrow)]
    name: Option<Text<'a>>,
    #[serde(borrow)]
    arguments: Option<Text<'a>>,
}

/// Turns a stream of OpenAI chunks into one of Anthropic's events.
#[derive(Debug)]
pub struct Translator {
    decoder: Decoder,
    events: Vec<SseEvent>,
    /// What the caller calls the model, where the stream does not say.
    model: String,
    counts: Counts,
    begun: bool,
    /// The block being written, and the number of the next.
    open: Open,
    next: u32,
    /// The calls that have begun, so that none is begun twice.
    calls: Vec<u32>,
    finish: Option<(&'static str, Option<String>)>,
    refused: bool,
    done: bool,
    failed: Option<Error>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Open {
    Nothing,
    Text,
    Thinking,
    /// The call of this number, with arguments or not yet.
    Call(u32, bool),
}

impl Translator {
    /// A translator for a caller who knows the model as `model`.
    pub fn new(model: String) -> Self {
        Self {
            decoder: Decoder::new(LONGEST_EVENT),
            events: Vec::new(),
            model,
            counts: Counts::default(),
            begun: false,
            open: Open::Nothing,
            next: 0,
            calls: Vec::new(),
            finish: None,
            refused: false,
            done: false,
            failed: None,
        }
    }

    /// Takes the next bytes of the OpenAI stream and writes the events that follow from them.
    ///
    /// # Errors
    /// The error of the stream, with a kind to act on; [`Self::fail`] tells it to the client.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Encoder) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let mut events = std::mem::take(&mut self.events);
        let fed = self.decoder.feed(bytes, &mut events).map_err(|error| broken(error.message()));
        let outcome = events.drain(..).try_for_each(|event| self.event(&event.data, out)).and(fed);
        self.events = events;
        self.failed = outcome.as_ref().err().cloned();
        outcome
    }

    /// The OpenAI stream has ended.
    ///
    /// # Errors
    /// `ModelUnavailable` if it did so before the answer was complete; then no `message_stop` is written.
    pub fn end(&mut self, out: &mut Encoder) -> Result<()> {
        match (&self.failed, self.done, &self.finish) {
            (Some(error), ..) => Err(error.clone()),
            (None, true, _) => Ok(()),
            (None, false, Some(_)) => {
                self.stop(out);
                Ok(())
            }
            (None, false, None) => Err(broken("the stream ended before the answer did")),
        }
    }

    /// What the stream has said of its usage up to here.
    pub fn usage(&self) -> Option<Usage> {
        self.counts.usage()
    }

    /// Tells the client that the stream has failed. Nothing follows.
    pub fn fail(error: &Error, out: &mut Encoder) {
        let kind = match error.kind() {
            Kind::Busy | Kind::ModelUnavailable | Kind::EngineLost | Kind::ShuttingDown => "overloaded_error",
            Kind::RateLimited | Kind::OutOfNeurons => "rate_limit_error",
            Kind::Timeout => "timeout_error",
            Kind::BadInput | Kind::ContextLength | Kind::Unsupported => "invalid_request_error",
            _ => "api_error",
        };
        let error = json!({"type": kind, "message": error.message()});
        out.json(Some("error"), &json!({"type": "error", "error": error}));
    }

    fn event(&mut self, data: &str, out: &mut Encoder) -> Result<()> {
        if self.done {
            return Ok(());
        }
        if data.trim() == "[DONE]" {
            if self.finish.is_none() {
                return Err(broken("the stream ended without saying why"));
            }
            self.stop(out);
            return Ok(());
        }
        let chunk: Chunk =
            serde_json::from_str(data).map_err(|error| broken(format!("the stream is not one of chunks: {error}")))?;
        if chunk.error.is_some() {
            return Err(failures::inside(chunk.error.as_ref()));
        }
        self.counts.merge(&chunk.usage.0.unwrap_or_default());
        self.begin(chunk.id.as_deref().unwrap_or(""), chunk.model.as_deref(), out);
        // A message has one choice.
        for choice in chunk.choices.iter().flatten().filter(|choice| choice.index == 0) {
            if let Some(delta) = &choice.delta {
                self.delta(delta, out)?;
            }
            if let Some(reason) = &choice.finish_reason {
                self.close(out);
                let stop = choice.stop_reason.as_ref().and_then(Value::as_str);
                let reason = stop_reason(Some(reason), stop, self.refused);
                self.finish = Some((reason, stop.filter(|_| reason == "stop_sequence").map(str::to_owned)));
            }
        }
        Ok(())
    }

    fn begin(&mut self, id: &str, model: Option<&str>, out: &mut Encoder) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let message = json!({
            "id": message_id(id),
            "type": "message",
            "role": "assistant",
            "model": model.unwrap_or(&self.model),
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": UsageJson::new(self.counts.usage()),
        });
        out.json(Some("message_start"), &json!({"type": "message_start", "message": message}));
        ping(out);
    }

    fn delta(&mut self, delta: &Delta, out: &mut Encoder) -> Result<()> {
        let thoughts = delta.reasoning_content.as_ref().or(delta.reasoning.as_ref());
        if let Some(text) = thoughts.filter(|text| !text.is_empty()) {
            self.open(Open::Thinking, || json!({"type": "thinking", "thinking": "", "signature": ""}), out);
            self.grow(Piece::Thinking { thinking: text }, out);
        }
        for block in delta.thinking_blocks.iter().flatten() {
            if let Some(data) = &block.data {
                self.close(out);
                self.start(&json!({"type": "redacted_thinking", "data": &**data}), out);
                self.halt(out);
            } else if let (Some(signature), Open::Thinking) = (&block.signature, self.open) {
                self.grow(Piece::Signature { signature }, out);
            }
        }
        let refusal = delta.refusal.as_ref().filter(|text| !text.is_empty());
        self.refused |= refusal.is_some();
        for text in delta.content.as_ref().filter(|text| !text.is_empty()).into_iter().chain(refusal) {
            self.open(Open::Text, || json!({"type": "text", "text": ""}), out);
            self.grow(Piece::Text { text }, out);
        }
        for call in delta.tool_calls.iter().flatten() {
            self.call(call, out)?;
        }
        Ok(())
    }

    fn call(&mut self, call: &CallDelta, out: &mut Encoder) -> Result<()> {
        let function = call.function.as_ref();
        let is_open = matches!(self.open, Open::Call(index, _) if index == call.index);
        if !is_open {
            if self.calls.contains(&call.index) {
                return Err(broken("the stream went back to a call that had ended"));
            }
            self.calls.push(call.index);
            let id = call.id.as_deref().unwrap_or("");
            let name = function.and_then(|function| function.name.as_deref()).unwrap_or("");
            let start = || json!({"type": "tool_use", "id": id, "name": name, "input": {}});
            self.open(Open::Call(call.index, false), start, out);
        }
        let more = function.and_then(|function| function.arguments.as_deref());
        if let Some(more) = more.filter(|more| !more.is_empty()) {
            self.open = Open::Call(call.index, true);
            self.grow(Piece::InputJson { partial_json: more }, out);
        }
        Ok(())
    }

    /// Makes sure that a block of this kind is open.
    fn open(&mut self, wanted: Open, start: impl FnOnce() -> Value, out: &mut Encoder) {
        if self.open != wanted {
            self.close(out);
            self.start(&start(), out);
            self.open = wanted;
        }
    }

    fn close(&mut self, out: &mut Encoder) {
        match std::mem::replace(&mut self.open, Open::Nothing) {
            Open::Nothing => {}
            Open::Call(_, false) => {
                self.grow(Piece::InputJson { partial_json: "{}" }, out);
                self.halt(out);
            }
            Open::Text | Open::Thinking | Open::Call(..) => self.halt(out),
        }
    }

    fn start(&self, block: &Value, out: &mut Encoder) {
        let event = json!({"type": "content_block_start", "index": self.next, "content_block": block});
        out.json(Some("content_block_start"), &event);
    }

    fn grow(&self, delta: Piece, out: &mut Encoder) {
        out.json(Some("content_block_delta"), &Growth { kind: "content_block_delta", index: self.next, delta });
    }

    fn halt(&mut self, out: &mut Encoder) {
        out.json(Some("content_block_stop"), &json!({"type": "content_block_stop", "index": self.next}));
        self.next += 1;
    }

    /// The end of the message, once.
    fn stop(&mut self, out: &mut Encoder) {
        let Some((reason, sequence)) = self.finish.take() else { return };
        self.done = true;
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        let usage = UsageJson::new(self.counts.usage());
        out.json(Some("message_delta"), &json!({"type": "message_delta", "delta": delta, "usage": usage}));
        out.json(Some("message_stop"), &json!({"type": "message_stop"}));
    }
}

#[derive(Serialize)]
struct Growth<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    index: u32,
    delta: Piece<'a>,
}

/// What a block grows by.
#[derive(Serialize)]
#[serde(tag = "type")]
enum Piece<'a> {
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "signature_delta")]
    Signature { signature: &'a str },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: &'a str },
}
