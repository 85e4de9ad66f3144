//! Google's shapes, the same at AI Studio and at Vertex: generateContent, its stream, embeddings, counts.

use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Stream};
use super::ask::{Ask, Call, End, Usage, heard};
use super::openai::vector;

pub fn generate(ask: &Ask<'_>) -> Answer {
    let text = (!ask.text.is_empty()).then(|| json!({"text": ask.words()}));
    let parts: Vec<Value> = text.into_iter().chain(ask.calls.iter().map(function_call)).collect();
    Answer::json(&response(ask, parts, Some(finish(ask.end))))
}

/// `alt=sse`: events whose lines end in CRLF, and no sign at the end but the end.
pub fn stream(ask: &Ask<'_>) -> Answer {
    let event = |value: &Value| Bytes::from(format!("data: {value}\r\n\r\n"));
    let (chunks, last) = stream_parts(ask);
    Answer::events(Stream {
        chunks: chunks.iter().map(event).collect(),
        closing: vec![event(&last)],
        error: event(&error_value(ask.failing.unwrap_or(503))),
        ..Stream::default()
    })
}

/// Without it: one JSON array, an element a chunk.
pub fn array_stream(ask: &Ask<'_>) -> Answer {
    let (chunks, last) = stream_parts(ask);
    let element = |value: &Value| Bytes::from(format!("{value}\r\n,\r\n"));
    let stream = Stream {
        opening: vec![Bytes::from_static(b"[")],
        chunks: chunks.iter().map(element).collect(),
        closing: vec![Bytes::from(last.to_string()), Bytes::from_static(b"\r\n]")],
        error: Bytes::from(format!("{}\r\n]", error_value(503))),
        garbage: Bytes::from_static(b"{\"candidates\": [\xff\xfe,\r\n"),
    };
    Answer::stream("application/json; charset=UTF-8", stream)
}

fn stream_parts(ask: &Ask<'_>) -> (Vec<Value>, Value) {
    let texts = ask.text.iter().map(|piece| response(ask, vec![json!({"text": piece})], None));
    // Calls are never cut.
    let calls = ask.calls.iter().map(|call| response(ask, vec![function_call(call)], None));
    let last = response(ask, vec![json!({"text": ""})], Some(finish(ask.end)));
    (texts.chain(calls).collect(), last)
}

fn response(ask: &Ask<'_>, parts: Vec<Value>, finish: Option<&str>) -> Value {
    let mut candidate = json!({"content": {"parts": parts, "role": "model"}, "index": 0});
    if let Some(finish) = finish {
        candidate["finishReason"] = json!(finish);
    }
    let mut response = json!({"candidates": [candidate], "modelVersion": ask.model, "responseId": ask.id("")});
    if let Some(usage) = &ask.usage {
        response["usageMetadata"] = usage_metadata(usage);
    }
    response
}

fn function_call(call: &Call) -> Value {
    json!({"functionCall": {"name": call.name, "args": call.arguments}})
}

fn usage_metadata(usage: &Usage) -> Value {
    let mut metadata = json!({
        "promptTokenCount": usage.prompt,
        "candidatesTokenCount": usage.output,
        "totalTokenCount": usage.prompt + usage.output,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": usage.prompt}],
    });
    if usage.cached > 0 {
        metadata["cachedContentTokenCount"] = json!(usage.cached);
    }
    metadata
}

/// Calls have no reason of their own here.
fn finish(end: End) -> &'static str {
    if end == End::Length { "MAX_TOKENS" } else { "STOP" }
}

pub fn embed(ask: &Ask<'_>) -> Answer {
    Answer::json(&json!({"embedding": {"values": vector(&heard(ask.body))}}))
}

pub fn batch_embed(ask: &Ask<'_>) -> Answer {
    let requests = ask.body["requests"].as_array().map_or(&[][..], Vec::as_slice);
    let vectors: Vec<Value> = requests.iter().map(|request| json!({"values": vector(&heard(request))})).collect();
    Answer::json(&json!({"embeddings": vectors}))
}

/// Embeddings as Vertex has them.
pub fn predict(ask: &Ask<'_>) -> Answer {
    let instances = ask.body["instances"].as_array().map_or(&[][..], Vec::as_slice);
    let texts = instances.iter().map(|instance| instance["content"].as_str().unwrap_or_default());
    let predictions: Vec<Value> = texts
        .map(|text| {
            let statistics = json!({"truncated": false, "token_count": super::ask::words(text)});
            json!({"embeddings": {"values": vector(text), "statistics": statistics}})
        })
        .collect();
    Answer::json(&json!({"predictions": predictions}))
}

pub fn count_tokens(ask: &Ask<'_>) -> Answer {
    Answer::json(&json!({"totalTokens": ask.usage.map_or(0, |usage| usage.prompt)}))
}

pub fn models(ask: &Ask<'_>) -> Answer {
    let entry = |id: &str| {
        json!({
            "name": format!("models/{id}"),
            "displayName": id,
            "inputTokenLimit": 1_048_576,
            "outputTokenLimit": 8192,
            "supportedGenerationMethods": ["generateContent", "countTokens"],
        })
    };
    Answer::json(&match ask.model.as_str() {
        "unnamed" => json!({"models": [entry("fake-large"), entry("fake-small")]}),
        model => entry(model),
    })
}

pub fn error(status: u16) -> Answer {
    Answer::json(&error_value(status))
}

fn error_value(status: u16) -> Value {
    let (word, message) = match status {
        401 => ("UNAUTHENTICATED", "API keys are not supported by this API."),
        402 | 403 => ("PERMISSION_DENIED", "The caller does not have permission."),
        404 => ("NOT_FOUND", "models/fake is not found for API version v1beta."),
        429 => ("RESOURCE_EXHAUSTED", "You exceeded your current quota."),
        503 | 529 => ("UNAVAILABLE", "The model is overloaded. Please try again later."),
        504 => ("DEADLINE_EXCEEDED", "The deadline expired."),
        500.. => ("INTERNAL", "An internal error has occurred."),
        _ => ("INVALID_ARGUMENT", "The request is wrong."),
    };
    let mut error = json!({"code": status, "message": message, "status": word});
    if status == 429 {
        error["details"] = json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"}]);
    }
    json!({"error": error})
}
