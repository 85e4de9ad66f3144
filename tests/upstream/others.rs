//! Cohere, Replicate and Hugging Face; Google's token endpoint; and what no provider has: an echo, and bytes.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Stream, event};
use super::ask::{Ask, Call, End, Usage, words};
use super::connection::Request;
use super::openai::vector;

pub fn cohere_chat(ask: &Ask<'_>) -> Answer {
    if ask.stream {
        return cohere_stream(ask);
    }
    let mut message = json!({"role": "assistant"});
    if ask.calls.is_empty() {
        message["content"] = json!([{"type": "text", "text": ask.words()}]);
    } else {
        message["tool_plan"] = json!(ask.words());
        let calls = ask.calls.iter().map(|call| cohere_call(call, call.arguments.to_string()));
        message["tool_calls"] = calls.collect();
    }
    let mut answer = json!({"id": ask.id(""), "finish_reason": cohere_finish(ask.end), "message": message});
    if let Some(usage) = &ask.usage {
        answer["usage"] = cohere_usage(usage);
    }
    Answer::json(&answer)
}

fn cohere_stream(ask: &Ask<'_>) -> Answer {
    let say = |kind: &str, mut data: Value| {
        data["type"] = json!(kind);
        event(Some(kind), &data)
    };
    let message = json!({"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []});
    let mut stream = Stream::default();
    stream.opening.push(say("message-start", json!({"id": ask.id(""), "delta": {"message": message}})));
    if ask.calls.is_empty() {
        let content = |content: Value| json!({"index": 0, "delta": {"message": {"content": content}}});
        stream.opening.push(say("content-start", content(json!({"type": "text", "text": ""}))));
        stream.chunks.extend(ask.text.iter().map(|piece| say("content-delta", content(json!({"text": piece})))));
        stream.closing.push(say("content-end", json!({"index": 0})));
    } else {
        let plan = |piece: &String| say("tool-plan-delta", json!({"delta": {"message": {"tool_plan": piece}}}));
        stream.chunks.extend(ask.text.iter().map(plan));
        for (index, call) in ask.calls.iter().enumerate() {
            let calls = |call: Value| json!({"index": index, "delta": {"message": {"tool_calls": call}}});
            stream.chunks.push(say("tool-call-start", calls(cohere_call(call, String::new()))));
            for piece in call.pieces() {
                stream.chunks.push(say("tool-call-delta", calls(json!({"function": {"arguments": piece}}))));
            }
            stream.chunks.push(say("tool-call-end", json!({"index": index})));
        }
    }
    let mut delta = json!({"finish_reason": cohere_finish(ask.end)});
    if let Some(usage) = &ask.usage {
        delta["usage"] = cohere_usage(usage);
    }
    stream.closing.push(say("message-end", json!({"delta": delta})));
    stream.closing.push(Bytes::from_static(b"data: [DONE]\n\n"));
    // It ends a stream that fails as it ends others.
    let failed = json!({"finish_reason": "ERROR", "error": "the generation failed"});
    stream.error = match ask.failing {
        Some(status) => event(None, &json!({"id": ask.id(""), "message": cohere_message(status)})),
        None => say("message-end", json!({"delta": failed})),
    };
    Answer::events(stream)
}

fn cohere_call(call: &Call, arguments: String) -> Value {
    json!({"id": format!("call_{}", call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}})
}

fn cohere_usage(usage: &Usage) -> Value {
    let mut whole = json!({
        "billed_units": {"input_tokens": usage.prompt, "output_tokens": usage.output},
        "tokens": {"input_tokens": usage.prompt, "output_tokens": usage.output},
    });
    if usage.cached > 0 {
        whole["cached_tokens"] = json!(usage.cached);
    }
    whole
}

fn cohere_finish(end: End) -> &'static str {
    match end {
        End::Stop => "COMPLETE",
        End::Length => "MAX_TOKENS",
        End::Calls => "TOOL_CALL",
    }
}

pub fn cohere_embed(ask: &Ask<'_>) -> Answer {
    let texts = ask.body["texts"].as_array().map_or(&[][..], Vec::as_slice);
    let texts: Vec<&str> = texts.iter().filter_map(Value::as_str).collect();
    let vectors: Vec<Value> = texts.iter().map(|text| json!(vector(text))).collect();
    let tokens: usize = texts.iter().map(|text| words(text)).sum();
    Answer::json(&json!({
        "id": ask.id(""),
        "embeddings": {"float": vectors},
        "texts": texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
        "response_type": "embeddings_by_type",
    }))
}

/// Cohere's errors are a sentence.
pub fn cohere_error(status: u16) -> Answer {
    Answer::json(&json!({"id": "fake-error", "message": cohere_message(status)}))
}

fn cohere_message(status: u16) -> &'static str {
    match status {
        401 => "invalid api token",
        402 => "Please add or update your payment method.",
        429 => "You are using a Trial key, which is limited to 20 API calls / minute.",
        500.. => "internal server error",
        _ => "invalid request",
    }
}

/// A prediction that has begun; whole already if the caller waits for it.
pub fn replicate_create(ask: &Ask<'_>) -> Answer {
    replicate(ask, &ask.id("fake"), "starting", Value::Null).status(201)
}

/// The same a little later.
pub fn replicate_look(ask: &Ask<'_>) -> Answer {
    replicate(ask, &ask.model, "succeeded", json!(["All ", "is ", "done."]))
}

fn replicate(ask: &Ask<'_>, id: &str, status: &str, output: Value) -> Answer {
    let url = format!("https://api.replicate.com/v1/predictions/{id}");
    Answer::json(&json!({
        "id": id,
        "model": "fake/model",
        "version": ask.body["version"].as_str().unwrap_or("fake-version"),
        "input": ask.body["input"],
        "logs": "",
        "output": output,
        "error": null,
        "status": status,
        "created_at": "2025-01-01T00:00:00Z",
        "urls": {"get": url, "cancel": format!("{url}/cancel")},
        "metrics": {"predict_time": 0.001},
    }))
}

/// Errors of Replicate.
pub fn detail_error(status: u16) -> Answer {
    Answer::json(&json!({"title": "The fake upstream fails", "detail": "It was told to.", "status": status}))
}

pub fn hugging_face(ask: &Ask<'_>) -> Answer {
    Answer::json(&json!([{"generated_text": ask.words()}]))
}

pub fn hugging_face_error(status: u16) -> Answer {
    let mut error = json!({"error": "The fake upstream fails."});
    if status == 503 {
        error = json!({"error": "Model fake is currently loading", "estimated_time": 20.0});
    }
    Answer::json(&error)
}

/// Google's token endpoint. The token says how many were given, so that a test sees which one is used.
pub fn token(ask: &Ask<'_>) -> Answer {
    let token = ask.id("ya29.fake");
    let life = ask.expires.unwrap_or(3599);
    Answer::json(&json!({"access_token": token, "expires_in": life, "token_type": "Bearer"}))
}

pub fn token_error(status: u16) -> Answer {
    let _ = status;
    Answer::json(&json!({"error": "invalid_grant", "error_description": "Invalid JWT Signature."}))
}

/// What came, as it came.
pub fn echo(request: &Request) -> Answer {
    let headers: Vec<Value> = request.headers.iter().map(|(name, value)| json!([name, value])).collect();
    Answer::json(&json!({
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "headers": headers,
        "body": std::str::from_utf8(&request.body).ok(),
        "body_base64": BASE64_STANDARD.encode(&request.body),
    }))
}

/// So many bytes that are no text and follow from their place.
pub fn bytes(count: usize) -> Answer {
    let bytes: Vec<u8> = (0..count).map(|at| (at.wrapping_mul(131) >> 3) as u8).collect();
    Answer::bytes("application/octet-stream", bytes)
}

pub fn unknown(path: &str) -> Answer {
    let message = format!("the fake upstream has nothing at {path}");
    Answer::json(&json!({"error": {"message": message, "type": "invalid_request_error"}})).status(404)
}
