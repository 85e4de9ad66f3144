//! Anthropic's messages, whole and as events; Bedrock and Vertex carry the same in other wrappings.

use serde_json::{Value, json};

use super::answer::{Answer, Stream, event};
use super::ask::{Ask, Call, End, Usage};

pub fn messages(ask: &Ask<'_>) -> Answer {
    let answer = if ask.stream {
        let Events { opening, chunks, closing } = events(ask);
        let wire = |events: Vec<Value>| events.iter().map(|data| event(data["type"].as_str(), data)).collect();
        Answer::events(Stream {
            opening: wire(opening),
            chunks: wire(chunks),
            closing: wire(closing),
            error: event(Some("error"), &error_value(ask.failing.unwrap_or(529))),
            ..Stream::default()
        })
    } else {
        Answer::json(&message(ask))
    };
    answer.header("request-id", ask.id("req_")).header("anthropic-ratelimit-requests-remaining", "999")
}

pub fn message(ask: &Ask<'_>) -> Value {
    let mut content = Vec::new();
    if !ask.text.is_empty() {
        content.push(json!({"type": "text", "text": ask.words()}));
    }
    content.extend(ask.calls.iter().map(|call| tool_use(call, call.arguments.clone())));
    let mut message = envelope(ask, content);
    message["stop_reason"] = json!(stop_reason(ask.end));
    if let Some(usage) = &ask.usage {
        message["usage"] = self::usage(usage, usage.output);
    }
    message
}

/// A streamed message, as the data of its events.
pub struct Events {
    pub opening: Vec<Value>,
    pub chunks: Vec<Value>,
    pub closing: Vec<Value>,
}

pub fn events(ask: &Ask<'_>) -> Events {
    let mut start = envelope(ask, Vec::new());
    if let Some(usage) = &ask.usage {
        start["usage"] = self::usage(usage, 1);
    }
    let mut opening = vec![json!({"type": "message_start", "message": start})];
    let (mut chunks, mut closing) = (Vec::new(), Vec::new());
    let begin =
        |index: usize, block: Value| json!({"type": "content_block_start", "index": index, "content_block": block});
    let delta = |index: usize, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
    let stop = |index: usize| json!({"type": "content_block_stop", "index": index});

    let mut index = 0;
    if !ask.text.is_empty() {
        opening.push(begin(0, json!({"type": "text", "text": ""})));
        opening.push(json!({"type": "ping"}));
        chunks.extend(ask.text.iter().map(|piece| delta(0, json!({"type": "text_delta", "text": piece}))));
        if ask.calls.is_empty() {
            closing.push(stop(0))
        } else {
            chunks.push(stop(0))
        }
        index = 1;
    }
    for call in &ask.calls {
        chunks.push(begin(index, tool_use(call, json!({}))));
        chunks.push(delta(index, json!({"type": "input_json_delta", "partial_json": ""})));
        let pieces = call.pieces();
        chunks.extend(
            pieces.iter().map(|piece| delta(index, json!({"type": "input_json_delta", "partial_json": piece}))),
        );
        chunks.push(stop(index));
        index += 1;
    }
    let mut end =
        json!({"type": "message_delta", "delta": {"stop_reason": stop_reason(ask.end), "stop_sequence": null}});
    if let Some(usage) = &ask.usage {
        end["usage"] = json!({"output_tokens": usage.output});
    }
    closing.push(end);
    closing.push(json!({"type": "message_stop"}));
    Events { opening, chunks, closing }
}

fn envelope(ask: &Ask<'_>, content: Vec<Value>) -> Value {
    json!({
        "id": ask.id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": content,
        "stop_reason": null,
        "stop_sequence": null,
    })
}

fn tool_use(call: &Call, input: Value) -> Value {
    json!({"type": "tool_use", "id": format!("toolu_{}", call.id), "name": call.name, "input": input})
}

/// `input_tokens` are those that were not cached.
fn usage(usage: &Usage, output: usize) -> Value {
    json!({
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": output,
        "service_tier": "standard",
    })
}

fn stop_reason(end: End) -> &'static str {
    match end {
        End::Stop => "end_turn",
        End::Length => "max_tokens",
        End::Calls => "tool_use",
    }
}

pub fn count_tokens(ask: &Ask<'_>) -> Answer {
    Answer::json(&json!({"input_tokens": ask.usage.map_or(0, |usage| usage.prompt)}))
}

pub fn models(ask: &Ask<'_>) -> Answer {
    let entry = |id: &str| json!({"type": "model", "id": id, "display_name": id, "created_at": "2025-01-01T00:00:00Z"});
    Answer::json(&match ask.model.as_str() {
        "unnamed" => {
            json!({"data": [entry("fake-large")], "has_more": false, "first_id": "fake-large", "last_id": "fake-large"})
        }
        model => entry(model),
    })
}

pub fn error(status: u16) -> Answer {
    Answer::json(&error_value(status)).header("request-id", "req_fake_error")
}

fn error_value(status: u16) -> Value {
    let (kind, message) = match status {
        401 => ("authentication_error", "invalid x-api-key"),
        402 => ("billing_error", "Your credit balance is too low."),
        403 => ("permission_error", "Not allowed."),
        404 => ("not_found_error", "model: not found"),
        413 => ("request_too_large", "Request exceeds the maximum size."),
        429 => ("rate_limit_error", "This request would exceed your rate limit."),
        529 => ("overloaded_error", "Overloaded"),
        500.. => ("api_error", "Internal server error"),
        _ => ("invalid_request_error", "The request is wrong."),
    };
    json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_fake_error"})
}
