//! OpenAI's shapes, which most providers have taken over: chat completions, completions, responses, embeddings, models.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Stream, event};
use super::ask::{Ask, Call, End, Usage, heard, words};

const DONE: &[u8] = b"data: [DONE]\n\n";

pub fn chat(ask: &Ask<'_>) -> Answer {
    if ask.stream {
        return chat_stream(ask);
    }
    let content = if ask.text.is_empty() { Value::Null } else { json!(ask.words()) };
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !ask.calls.is_empty() {
        message["tool_calls"] = ask.calls.iter().map(|call| tool_call(call, call.arguments.to_string())).collect();
    }
    let mut answer = json!({
        "id": ask.id("chatcmpl-"),
        "object": "chat.completion",
        "created": ask.created(),
        "model": ask.model,
        "choices": [{"index": 0, "message": message, "logprobs": null, "finish_reason": finish(ask.end)}],
        "system_fingerprint": "fp_fake",
    });
    if let Some(usage) = &ask.usage {
        answer["usage"] = chat_usage(usage);
    }
    with_id(Answer::json(&answer), ask)
}

fn chat_stream(ask: &Ask<'_>) -> Answer {
    let include_usage = ask.body["stream_options"]["include_usage"] == true;
    let chunk = |delta: Value, finish: Option<&str>| {
        let mut chunk = json!({
            "id": ask.id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": ask.created(),
            "model": ask.model,
            "system_fingerprint": "fp_fake",
            "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}],
        });
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    };
    let error = event(None, &error_value(ask.failing.unwrap_or(500)));
    let mut stream = Stream { error, ..Stream::default() };
    stream.opening.push(event(None, &chunk(json!({"role": "assistant", "content": "", "refusal": null}), None)));
    stream.chunks.extend(ask.text.iter().map(|piece| event(None, &chunk(json!({"content": piece}), None))));
    for (index, call) in ask.calls.iter().enumerate() {
        let mut begin = tool_call(call, String::new());
        begin["index"] = json!(index);
        stream.chunks.push(event(None, &chunk(json!({"tool_calls": [begin]}), None)));
        for piece in call.pieces() {
            let delta = json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]});
            stream.chunks.push(event(None, &chunk(delta, None)));
        }
    }
    let mut last = chunk(json!({}), Some(finish(ask.end)));
    if let Some(usage) = ask.usage.as_ref().map(chat_usage) {
        // Not everybody waits to be asked.
        match ask.by {
            "mistral" | "deepseek" | "perplexity-ai" | "perplexity" => last["usage"] = usage.clone(),
            "groq" => last["x_groq"] = json!({"id": ask.id("req_"), "usage": usage}),
            _ => {}
        }
    }
    stream.closing.push(event(None, &last));
    if let (true, Some(usage)) = (include_usage, &ask.usage) {
        let mut last = chunk(json!({}), None);
        last["choices"] = json!([]);
        last["usage"] = chat_usage(usage);
        stream.closing.push(event(None, &last));
    }
    stream.closing.push(Bytes::from_static(DONE));
    with_id(Answer::events(stream), ask)
}

fn tool_call(call: &Call, arguments: String) -> Value {
    json!({"id": format!("call_{}", call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}})
}

fn chat_usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    })
}

fn finish(end: End) -> &'static str {
    match end {
        End::Stop => "stop",
        End::Length => "length",
        End::Calls => "tool_calls",
    }
}

/// The older `completions`.
pub fn completion(ask: &Ask<'_>) -> Answer {
    let object = |text: &str, finish: Option<&str>| {
        json!({
            "id": ask.id("cmpl-"),
            "object": "text_completion",
            "created": ask.created(),
            "model": ask.model,
            "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": finish}],
        })
    };
    let last = |text: &str| {
        let mut last = object(text, Some(finish(ask.end)));
        last["usage"] = ask.usage.as_ref().map(chat_usage).unwrap_or_default();
        last
    };
    if !ask.stream {
        return with_id(Answer::json(&last(&ask.words())), ask);
    }
    let stream = Stream {
        chunks: ask.text.iter().map(|piece| event(None, &object(piece, None))).collect(),
        closing: vec![event(None, &last("")), Bytes::from_static(DONE)],
        error: event(None, &error_value(ask.failing.unwrap_or(500))),
        ..Stream::default()
    };
    with_id(Answer::events(stream), ask)
}

pub fn responses(ask: &Ask<'_>) -> Answer {
    let response = |status: &str, output: Vec<Value>| {
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let usage = ask.usage.filter(|_| status != "in_progress").map(|usage| {
            json!({
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.output,
            })
        });
        json!({
            "id": ask.id("resp_"),
            "object": "response",
            "created_at": ask.created(),
            "status": status,
            "error": null,
            "incomplete_details": incomplete,
            "instructions": ask.body["instructions"],
            "metadata": {},
            "model": ask.model,
            "output": output,
            "parallel_tool_calls": true,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": ask.body["tools"].as_array().cloned().unwrap_or_default(),
            "top_p": 1.0,
            "usage": usage,
        })
    };
    let status = if ask.end == End::Length { "incomplete" } else { "completed" };
    let mut output = Vec::new();
    if !ask.text.is_empty() {
        output.push(output_message(ask, "completed", vec![output_text(&ask.words())]));
    }
    output.extend(ask.calls.iter().map(|call| function_call(call, "completed", call.arguments.to_string())));
    let whole = response(status, output.clone());
    if !ask.stream {
        return with_id(Answer::json(&whole), ask);
    }

    let mut events = Numbered::default();
    let mut stream = Stream::default();
    for kind in ["response.created", "response.in_progress"] {
        stream.opening.push(events.next(kind, json!({"response": response("in_progress", Vec::new())})));
    }
    for (index, item) in output.iter().enumerate() {
        let place = json!({"item_id": item["id"], "output_index": index});
        let with = |more: Value| merged(&place, more);
        if item["type"] == "message" {
            let text = |more: Value| merged(&with(json!({"content_index": 0})), more);
            let empty = output_message(ask, "in_progress", Vec::new());
            stream.chunks_or_opening(
                events.next("response.output_item.added", json!({"output_index": index, "item": empty})),
            );
            stream
                .chunks_or_opening(events.next("response.content_part.added", text(json!({"part": output_text("")}))));
            for piece in &ask.text {
                stream
                    .chunks
                    .push(events.next("response.output_text.delta", text(json!({"delta": piece, "logprobs": []}))));
            }
            let done = text(json!({"text": ask.words(), "logprobs": []}));
            stream.closing_of_item(events.next("response.output_text.done", done), ask);
            let part = text(json!({"part": output_text(&ask.words())}));
            stream.closing_of_item(events.next("response.content_part.done", part), ask);
        } else {
            let call = &ask.calls[index - usize::from(!ask.text.is_empty())];
            let empty = function_call(call, "in_progress", String::new());
            stream
                .chunks
                .push(events.next("response.output_item.added", json!({"output_index": index, "item": empty})));
            for piece in call.pieces() {
                let delta = with(json!({"delta": piece}));
                stream.chunks.push(events.next("response.function_call_arguments.delta", delta));
            }
            let done = with(json!({"arguments": call.arguments.to_string(), "name": call.name}));
            stream.closing_of_item(events.next("response.function_call_arguments.done", done), ask);
        }
        let done = events.next("response.output_item.done", json!({"output_index": index, "item": item}));
        stream.closing_of_item(done, ask);
    }
    stream.closing.push(events.next(&format!("response.{status}"), json!({"response": whole})));
    let code = ask.failing.map(|status| error_value(status)["error"]["code"].take()).filter(Value::is_string);
    let code = code.unwrap_or_else(|| json!("server_error"));
    let failure = json!({"code": code, "message": "The fake upstream failed.", "param": null});
    stream.error = events.next("error", failure);
    with_id(Answer::events(stream), ask)
}

impl Stream {
    /// What begins an item opens the stream, unless something was said already.
    fn chunks_or_opening(&mut self, event: Bytes) {
        if self.chunks.is_empty() { self.opening.push(event) } else { self.chunks.push(event) }
    }

    /// What ends an item closes the stream, unless more items follow.
    fn closing_of_item(&mut self, event: Bytes, ask: &Ask<'_>) {
        if ask.calls.is_empty() { self.closing.push(event) } else { self.chunks.push(event) }
    }
}

/// Events of the responses API count themselves.
#[derive(Default)]
struct Numbered(u64);

impl Numbered {
    fn next(&mut self, kind: &str, fields: Value) -> Bytes {
        let number = self.0;
        self.0 += 1;
        event(Some(kind), &merged(&json!({"type": kind, "sequence_number": number}), fields))
    }
}

fn merged(base: &Value, more: Value) -> Value {
    let mut all = base.as_object().cloned().unwrap_or_default();
    all.extend(more.as_object().cloned().unwrap_or_default());
    Value::Object(all)
}

fn output_message(ask: &Ask<'_>, status: &str, content: Vec<Value>) -> Value {
    json!({"id": ask.id("msg_"), "type": "message", "status": status, "role": "assistant", "content": content})
}

fn output_text(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn function_call(call: &Call, status: &str, arguments: String) -> Value {
    json!({
        "id": format!("fc_{}", call.id),
        "type": "function_call",
        "status": status,
        "call_id": format!("call_{}", call.id),
        "name": call.name,
        "arguments": arguments,
    })
}

pub fn embeddings(ask: &Ask<'_>) -> Answer {
    let inputs: Vec<&Value> = match &ask.body["input"] {
        Value::Array(inputs) => inputs.iter().collect(),
        input => vec![input],
    };
    let as_text = ask.body["encoding_format"] == "base64";
    let data: Vec<Value> = (inputs.iter().enumerate())
        .map(|(index, input)| {
            let vector = vector(input.as_str().unwrap_or_default());
            let embedding = if as_text {
                json!(BASE64_STANDARD.encode(vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()))
            } else {
                json!(vector)
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let tokens: usize = inputs.iter().map(|input| words(input.as_str().unwrap_or_default())).sum();
    let mut answer = json!({"object": "list", "data": data, "model": ask.model});
    if ask.usage.is_some() {
        answer["usage"] = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    }
    with_id(Answer::json(&answer), ask)
}

/// A vector that follows from a text: its length, its words, its first byte, and one.
pub fn vector(text: &str) -> [f32; 4] {
    [text.len() as f32, words(text) as f32, f32::from(text.bytes().next().unwrap_or(0)), 1.0]
}

pub fn models(ask: &Ask<'_>) -> Answer {
    let entry = |id: &str| json!({"id": id, "object": "model", "created": 1_700_000_000, "owned_by": ask.by});
    Answer::json(&match ask.model.as_str() {
        "unnamed" => json!({"object": "list", "data": [entry("fake-large"), entry("fake-small")]}),
        model => entry(model),
    })
}

/// Speech, as bytes that are no text.
pub fn speech(ask: &Ask<'_>) -> Answer {
    Answer::bytes("audio/mpeg", [b"\xff\xfb\x90\x00", heard(ask.body).as_bytes(), b"\x00\xff"].concat())
}

pub fn error(status: u16) -> Answer {
    Answer::json(&error_value(status)).header("x-request-id", "req_fake_error")
}

fn error_value(status: u16) -> Value {
    let (kind, code, message) = match status {
        401 => ("invalid_request_error", json!("invalid_api_key"), "Incorrect API key provided: sk-fake."),
        402 => ("insufficient_quota", json!("insufficient_quota"), "Insufficient balance."),
        403 => ("invalid_request_error", json!("unsupported_country"), "Not available where you are."),
        404 => ("invalid_request_error", json!("model_not_found"), "The model does not exist."),
        429 => ("requests", json!("rate_limit_exceeded"), "Rate limit reached for requests."),
        503 | 529 => ("server_error", json!("overloaded"), "The engine is currently overloaded."),
        500.. => ("server_error", Value::Null, "The server had an error."),
        _ => ("invalid_request_error", Value::Null, "The request is wrong."),
    };
    json!({"error": {"message": message, "type": kind, "param": null, "code": code}})
}

fn with_id(answer: Answer, ask: &Ask<'_>) -> Answer {
    answer.header("x-request-id", ask.id("req_")).header("openai-processing-ms", "1")
}
