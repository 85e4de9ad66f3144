//! Bedrock's shapes: converse, invoke, and their streams as frames of AWS's own.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Stream};
use super::ask::{Ask, Call, End, Usage, heard, words};
use super::openai::vector;
use super::{anthropic, frames};

const STREAM: &str = "application/vnd.amazon.eventstream";

pub fn converse(ask: &Ask<'_>) -> Answer {
    let text = (!ask.text.is_empty()).then(|| json!({"text": ask.words()}));
    let calls = ask
        .calls
        .iter()
        .map(|call| json!({"toolUse": {"toolUseId": tool_use_id(call), "name": call.name, "input": call.arguments}}));
    let content: Vec<Value> = text.into_iter().chain(calls).collect();
    let mut answer = json!({
        "metrics": {"latencyMs": 1},
        "output": {"message": {"content": content, "role": "assistant"}},
        "stopReason": stop_reason(ask.end),
    });
    if let Some(usage) = &ask.usage {
        answer["usage"] = self::usage(usage);
    }
    with_id(Answer::json(&answer), ask)
}

pub fn converse_stream(ask: &Ask<'_>) -> Answer {
    let delta = |index: usize, delta: Value| {
        event("contentBlockDelta", json!({"contentBlockIndex": index, "delta": delta, "p": "abcdefghij"}))
    };
    let stop = |index: usize| event("contentBlockStop", json!({"contentBlockIndex": index, "p": "abcdef"}));
    let mut stream = stream_of_errors(ask);
    stream.opening.push(event("messageStart", json!({"p": "abcd", "role": "assistant"})));
    let mut index = 0;
    if !ask.text.is_empty() {
        stream.chunks.extend(ask.text.iter().map(|piece| delta(0, json!({"text": piece}))));
        if ask.calls.is_empty() {
            stream.closing.push(stop(0))
        } else {
            stream.chunks.push(stop(0))
        }
        index = 1;
    }
    for call in &ask.calls {
        let start = json!({"toolUse": {"toolUseId": tool_use_id(call), "name": call.name}});
        stream.chunks.push(event("contentBlockStart", json!({"contentBlockIndex": index, "start": start, "p": "ab"})));
        stream.chunks.extend(call.pieces().iter().map(|piece| delta(index, json!({"toolUse": {"input": piece}}))));
        stream.chunks.push(stop(index));
        index += 1;
    }
    stream.closing.push(event("messageStop", json!({"p": "abcdefgh", "stopReason": stop_reason(ask.end)})));
    let mut metadata = json!({"metrics": {"latencyMs": 1}, "p": "abc"});
    if let Some(usage) = &ask.usage {
        metadata["usage"] = self::usage(usage);
    }
    stream.closing.push(event("metadata", metadata));
    with_id(Answer::stream(STREAM, stream), ask)
}

/// Models here speak their makers' shapes; ours are Anthropic's, and Amazon's for embeddings.
pub fn invoke(ask: &Ask<'_>) -> Answer {
    let answer = if ask.model.contains("embed") {
        let text = heard(ask.body);
        json!({"embedding": vector(&text), "inputTextTokenCount": words(&text)})
    } else {
        anthropic::message(ask)
    };
    let mut answer = with_id(Answer::json(&answer), ask);
    if let Some(usage) = &ask.usage {
        answer = answer
            .header("x-amzn-bedrock-input-token-count", (usage.prompt - usage.cached).to_string())
            .header("x-amzn-bedrock-output-token-count", usage.output.to_string())
            .header("x-amzn-bedrock-invocation-latency", "1");
    }
    answer
}

/// The maker's own events, each as base64 in a frame; the last one also carries Bedrock's counts.
pub fn invoke_stream(ask: &Ask<'_>) -> Answer {
    let wire =
        |data: &Value| event("chunk", json!({"bytes": BASE64_STANDARD.encode(data.to_string()), "p": "abcdefghijklm"}));
    let anthropic::Events { opening, chunks, mut closing } = anthropic::events(ask);
    if let (Some(usage), Some(last)) = (&ask.usage, closing.last_mut()) {
        last["amazon-bedrock-invocationMetrics"] = json!({
            "inputTokenCount": usage.prompt - usage.cached,
            "outputTokenCount": usage.output,
            "cacheReadInputTokenCount": usage.cached,
            "invocationLatency": 2,
            "firstByteLatency": 1,
        });
    }
    let mut stream = stream_of_errors(ask);
    stream.opening = opening.iter().map(wire).collect();
    stream.chunks = chunks.iter().map(wire).collect();
    stream.closing = closing.iter().map(wire).collect();
    with_id(Answer::stream(STREAM, stream), ask)
}

fn event(kind: &str, payload: Value) -> Bytes {
    let headers = [(":event-type", kind), (":content-type", "application/json"), (":message-type", "event")];
    frames::event(&headers, payload.to_string().as_bytes())
}

fn stream_of_errors(ask: &Ask<'_>) -> Stream {
    let (kind, message) = match ask.failing.map(error_words) {
        // In a stream their names begin small.
        Some((kind, message)) => (kind[..1].to_lowercase() + &kind[1..], json!({"message": message})),
        None => {
            let message = json!({"message": "The model failed.", "originalStatusCode": 500});
            ("modelStreamErrorException".to_owned(), message)
        }
    };
    let headers = [(":exception-type", &*kind), (":content-type", "application/json"), (":message-type", "exception")];
    let error = frames::event(&headers, message.to_string().as_bytes());
    // A frame whose last sum is wrong.
    let mut garbage = event("contentBlockDelta", json!({})).to_vec();
    garbage.last_mut().into_iter().for_each(|byte| *byte ^= 0x55);
    Stream { error, garbage: garbage.into(), ..Stream::default() }
}

fn tool_use_id(call: &Call) -> String {
    format!("tooluse_{}", call.id)
}

/// `inputTokens` are those that were not cached; the total has all.
fn usage(usage: &Usage) -> Value {
    json!({
        "inputTokens": usage.prompt - usage.cached,
        "outputTokens": usage.output,
        "totalTokens": usage.prompt + usage.output,
        "cacheReadInputTokens": usage.cached,
        "cacheWriteInputTokens": 0,
    })
}

fn stop_reason(end: End) -> &'static str {
    match end {
        End::Stop => "end_turn",
        End::Length => "max_tokens",
        End::Calls => "tool_use",
    }
}

pub fn error(status: u16) -> Answer {
    let (kind, message) = error_words(status);
    let kind = format!("{kind}:http://internal.amazon.com/coral/com.amazon.bedrock/");
    Answer::json(&json!({"message": message})).header("x-amzn-errortype", kind).header("x-amzn-requestid", "fake-error")
}

fn error_words(status: u16) -> (&'static str, &'static str) {
    match status {
        401 | 403 => ("UnrecognizedClientException", "The security token included in the request is invalid."),
        404 => ("ResourceNotFoundException", "Could not resolve the foundation model from the provided identifier."),
        408 => ("ModelTimeoutException", "Model has timed out."),
        424 => ("ModelErrorException", "The model failed."),
        429 => ("ThrottlingException", "Too many requests, please wait before trying again."),
        503 | 529 => ("ServiceUnavailableException", "Bedrock is unable to process your request."),
        500.. => ("InternalServerException", "The system encountered an unexpected error."),
        _ => ("ValidationException", "The request is wrong."),
    }
}

fn with_id(answer: Answer, ask: &Ask<'_>) -> Answer {
    answer.header("x-amzn-requestid", ask.id(""))
}
