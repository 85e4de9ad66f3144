//! What the tests of all dialects share: requests through the front door, streams cut at every byte, answers in short.

use bytes::Bytes;
use serde_json::Value;

use crate::base::{Error, Result};
use crate::net::sse::{Decoder, Encoder};
use crate::provider::{Dialect, Meta, Outgoing, Place, Translator, answer, find};

pub(super) fn meta() -> Meta {
    Meta { id: "chatcmpl-1".to_owned(), created: 1_700_000_000, model: "provider/model".to_owned() }
}

pub(super) fn place() -> Place {
    Place {
        region: Some("us-east-1".to_owned()),
        project: Some("proj".to_owned()),
        resource: Some("res".to_owned()),
        ..Place::default()
    }
}

pub(super) fn chat(slug: &str, model: &str, request: &Value) -> Result<Outgoing> {
    find(slug).unwrap().chat(model, &Bytes::from(request.to_string()), &place())
}

/// The body that a provider gets.
pub(super) fn sent(slug: &str, model: &str, request: &Value) -> Value {
    let outgoing = chat(slug, model, request).unwrap_or_else(|error| panic!("{request}: {error}"));
    serde_json::from_slice(&outgoing.body).unwrap()
}

/// The field that a provider refuses a request for.
pub(super) fn refused(slug: &str, model: &str, request: &Value) -> String {
    let error = chat(slug, model, request).expect_err(&request.to_string());
    error.param().unwrap_or("").to_owned()
}

pub(super) fn answered(dialect: Dialect, body: &Value) -> Value {
    serde_json::from_slice(&answer(dialect, &meta(), body.to_string().as_bytes()).unwrap()).unwrap()
}

/// SSE as providers write it: `name` lines where there are names.
pub(super) fn sse(events: &[(&str, Value)]) -> Vec<u8> {
    let mut out = String::new();
    for (name, data) in events {
        if !name.is_empty() {
            out.push_str(&format!("event: {name}\n"));
        }
        out.push_str(&format!("data: {data}\n\n"));
    }
    out.into_bytes()
}

/// Everything that comes out of a stream in these pieces, and how it ended.
fn run(dialect: Dialect, pieces: &[&[u8]], include_usage: bool) -> (Bytes, Result<()>) {
    let mut translator = Translator::new(dialect, meta(), include_usage);
    let mut out = Encoder::default();
    let fed = pieces.iter().try_for_each(|piece| translator.feed(piece, &mut out));
    let ended = fed.and_then(|()| translator.end(&mut out));
    (out.take(), ended)
}

/// Checks what a stream becomes, in short; that it is the same wherever it is cut; and that cut off anywhere it is never
/// taken for complete, `complete` bytes in front of the end excepted.
pub(super) fn check_stream(dialect: Dialect, bytes: &[u8], complete: usize, expected: &[&str]) {
    let (whole, ended) = run(dialect, &[bytes], true);
    ended.unwrap_or_else(|error| panic!("{error}: {}", outline(&whole).join("\n")));
    assert_eq!(outline(&whole), expected);
    for cut in 0..bytes.len() {
        let (head, tail) = bytes.split_at(cut);
        let (pieces, ended) = run(dialect, &[head, tail], true);
        assert!(ended.is_ok() && pieces == whole, "cut at {cut}: {}", outline(&pieces).join("\n"));
        let (part, ended) = run(dialect, &[head], true);
        let is_done = part.ends_with(b"data: [DONE]\n\n");
        assert_eq!(ended.is_ok(), is_done, "cut off at {cut}");
        assert!(
            !is_done || cut + complete >= bytes.len(),
            "taken for complete when cut off at {cut} of {}",
            bytes.len()
        );
    }
    let single: Vec<_> = bytes.chunks(1).collect();
    assert_eq!(run(dialect, &single, true).0, whole, "byte by byte");
    let (unasked, _) = run(dialect, &[bytes], false);
    let without: Vec<_> = expected.iter().filter(|line| !line.starts_with("usage")).copied().collect();
    assert_eq!(outline(&unasked), without, "without usage");
}

/// The error that a stream ends in.
pub(super) fn stream_error(dialect: Dialect, bytes: &[u8]) -> Error {
    let (out, ended) = run(dialect, &[bytes], true);
    assert!(!outline(&out).iter().any(|line| line == "DONE"), "a failed stream is not done");
    ended.expect_err("the stream has an error in it")
}

/// Chunks in short, one line each.
pub(super) fn outline(bytes: &[u8]) -> Vec<String> {
    let mut events = Vec::new();
    Decoder::new(1 << 20).feed(bytes, &mut events).unwrap();
    events.iter().map(|event| line(&event.data)).collect()
}

fn line(data: &str) -> String {
    if data == "[DONE]" {
        return "DONE".to_owned();
    }
    let chunk: Value = serde_json::from_str(data).unwrap();
    assert_eq!(chunk["object"], "chat.completion.chunk");
    let choice = &chunk["choices"][0];
    if choice.is_null() {
        let usage = &chunk["usage"];
        let cached = &usage["prompt_tokens_details"]["cached_tokens"];
        return format!(
            "usage {} ({cached}) + {} = {}",
            usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
        );
    }
    let at = choice["index"].as_u64().unwrap();
    let at = if at == 0 { String::new() } else { format!("{at}: ") };
    let delta = &choice["delta"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let what = if let Some(reason) = text(&choice["finish_reason"]) {
        format!("finish {reason}")
    } else if let Some(role) = text(&delta["role"]) {
        format!("{role} as {} {}", chunk["id"].as_str().unwrap(), chunk["model"].as_str().unwrap())
    } else if let Some(text) = text(&delta["reasoning_content"]) {
        format!("think {text}")
    } else if let Some(text) = text(&delta["refusal"]) {
        format!("refuse {text}")
    } else if !delta["thinking_blocks"].is_null() {
        format!("block {}", delta["thinking_blocks"][0])
    } else if let Some(call) = delta["tool_calls"].get(0) {
        let function = &call["function"];
        let arguments = function["arguments"].as_str().unwrap();
        match call["id"].as_str() {
            Some(id) => {
                let extra = call.get("extra_content").map(|extra| format!(" {extra}")).unwrap_or_default();
                format!("call {} {id} {}{arguments}{extra}", call["index"], function["name"].as_str().unwrap())
            }
            None => format!("args {} {arguments}", call["index"]),
        }
    } else {
        format!("text {}", delta["content"].as_str().unwrap())
    };
    let logprobs = &choice["logprobs"]["content"];
    let logprobs = if logprobs.is_null() { String::new() } else { format!(" {logprobs}") };
    format!("{at}{what}{logprobs}")
}
