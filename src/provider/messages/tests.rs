//! Messages requests into chat, and chat answers into messages.

use serde_json::{Value, json};

use super::*;
use crate::base::Kind;
use crate::net::sse::{Decoder, Encoder};
use crate::provider::testing::{meta, sse};
use crate::provider::{Dialect, answer as from_provider, find};

fn translated(request: &Value) -> Value {
    let body = to_openai(request.to_string().as_bytes()).unwrap_or_else(|error| panic!("{request}: {error}"));
    serde_json::from_slice(&body).unwrap()
}

fn with(fields: Value) -> Value {
    let mut request = json!({"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]});
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

/// A conversation with everything in it.
fn full() -> Value {
    json!({
        "model": "openai/gpt-4.1", "max_tokens": 100, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stream": true,
        "stop_sequences": ["END"], "metadata": {"user_id": "u"},
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "In French."}],
        "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}, {"type": "custom", "name": "now"}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                {"type": "document", "title": "a.pdf", "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}},
            ]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": true, "content": [
                    {"type": "text", "text": "no clock"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "CCCC"}},
                ]},
                {"type": "text", "text": "And?"},
            ]},
        ],
    })
}

#[test]
fn a_conversation_with_tools_and_images_is_put_in_messages() {
    let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
    let expected = json!({
        "model": "openai/gpt-4.1",
        "messages": [
            {"role": "system", "content": "Be brief.\n\nIn French."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                image("data:image/png;base64,AAAA"),
                image("https://x/y.png"),
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,BBBB"}},
            ]},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}},
                {"id": "t2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "t2", "content": "Error: no clock"},
            {"role": "user", "content": [image("data:image/png;base64,CCCC"), {"type": "text", "text": "And?"}]},
        ],
        "max_tokens": 100, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": ["END"],
        "tools": [
            {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
        ],
        "tool_choice": "required", "parallel_tool_calls": false, "user": "u",
        "stream": true, "stream_options": {"include_usage": true},
    });
    assert_eq!(translated(&full()), expected);
}

#[test]
fn what_was_translated_can_be_translated_back() {
    // Messages -> chat -> Messages: the same words reach the same places.
    let chat = to_openai(full().to_string().as_bytes()).unwrap();
    let back = find("anthropic").unwrap().chat("claude-sonnet-4-5", &chat, &Default::default()).unwrap();
    let back: Value = serde_json::from_slice(&back.body).unwrap();
    let there = full();
    assert_eq!(back["messages"][0], there["messages"][0]);
    // Thoughts do not make the way.
    let blocks = |of: &Value| of["messages"][1]["content"].as_array().unwrap().clone();
    assert_eq!(blocks(&back)[..], blocks(&there)[1..]);
    for field in ["max_tokens", "temperature", "stop_sequences", "metadata", "tool_choice", "stream"] {
        assert_eq!(back[field], there[field], "{field}");
    }
}

#[test]
fn small_fields_find_their_counterparts() {
    for (fields, name, expected) in [
        (
            json!({"tool_choice": {"type": "tool", "name": "a"}, "tools": [{"name": "a"}]}),
            "tool_choice",
            json!({"type": "function", "function": {"name": "a"}}),
        ),
        (json!({"tool_choice": {"type": "none"}, "tools": [{"name": "a"}]}), "tool_choice", json!("none")),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 2000}}), "reasoning_effort", json!("low")),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 20_000}}), "reasoning_effort", json!("high")),
        (json!({"thinking": {"type": "adaptive"}}), "reasoning_effort", json!("medium")),
        (json!({"thinking": {"type": "disabled"}}), "reasoning_effort", Value::Null),
        (json!({"model": "openai/o3-mini"}), "max_completion_tokens", json!(10)),
        (json!({"model": "openai/gpt-5.1"}), "max_tokens", Value::Null),
        (json!({"system": ""}), "messages", json!([{"role": "user", "content": "Hi"}])),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}),
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": true}}),
        ),
    ] {
        assert_eq!(translated(&with(fields.clone()))[name], expected, "{fields}");
    }
}

#[test]
fn what_has_no_counterpart_is_refused_by_name() {
    let say = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
    for (fields, param) in [
        (json!({"model": null}), "model"),
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages.0.role"),
        (json!({"messages": [{"role": "user"}]}), "messages.0.content"),
        (json!({"system": 1}), "system"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools.0.type"),
        (json!({"tools": [{}]}), "tools.0.name"),
        (json!({"tools": [{"name": "a"}], "tool_choice": {"type": "some"}}), "tool_choice"),
        (json!({"mcp_servers": [{}]}), "mcp_servers"),
        (say(json!({"type": "image", "source": {"type": "file", "file_id": "f"}})), "messages.0.content.0"),
        (say(json!({"type": "container_upload"})), "messages.0.content.0"),
        (say(json!({"type": "tool_result"})), "messages.0.content.0.tool_use_id"),
    ] {
        let request = with(fields);
        let error = to_openai(request.to_string().as_bytes()).expect_err(&request.to_string());
        assert_eq!(error.param(), Some(param), "{request}");
    }
    assert!(to_openai(b"[]").is_err() && to_openai(b"{").is_err());
}

#[test]
fn a_completion_becomes_a_message() {
    let completion = json!({
        "id": "chatcmpl-9", "model": "m", "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "Hi", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
                {"id": "c3", "type": "function", "function": {"name": "h", "arguments": "{oops"}},
            ],
        }}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}},
    });
    let message: Value = serde_json::from_slice(&answer(completion.to_string().as_bytes()).unwrap()).unwrap();
    let expected = json!({
        "id": "msg_9", "type": "message", "role": "assistant", "model": "m",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
            {"type": "tool_use", "id": "c3", "name": "h", "input": {"INVALID_JSON": "{oops"}},
        ],
        "stop_reason": "tool_use", "stop_sequence": null,
        "usage": {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 5},
    });
    assert_eq!(message, expected);
    // And back, as far as chat has words for it.
    let again: Value =
        serde_json::from_slice(&from_provider(Dialect::Anthropic, &meta(), message.to_string().as_bytes()).unwrap())
            .unwrap();
    let theirs = &again["choices"][0]["message"];
    assert_eq!(
        (&theirs["content"], &theirs["tool_calls"][0]),
        (&"Hi".into(), &completion["choices"][0]["message"]["tool_calls"][0])
    );
    assert_eq!(again["usage"]["prompt_tokens"], 10);
    assert!(answer(b"{}").is_err() && answer(br#"{"choices":[]}"#).is_err());
}

#[test]
fn every_ending_has_its_word() {
    for (choice, reason, sequence) in [
        (json!({"finish_reason": "stop", "message": {}}), "end_turn", Value::Null),
        (json!({"finish_reason": "stop", "stop_reason": "END", "message": {}}), "stop_sequence", "END".into()),
        (json!({"finish_reason": "length", "message": {}}), "max_tokens", Value::Null),
        (json!({"finish_reason": "content_filter", "message": {}}), "refusal", Value::Null),
        (json!({"finish_reason": "stop", "message": {"refusal": "no"}}), "refusal", Value::Null),
    ] {
        let body = json!({"choices": [choice]}).to_string();
        let message: Value = serde_json::from_slice(&answer(body.as_bytes()).unwrap()).unwrap();
        assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&reason.into(), &sequence), "{body}");
    }
}

#[test]
fn errors_have_anthropics_shape() {
    for (status, kind) in [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (529, "overloaded_error"),
    ] {
        let (same, body) = failure(status, br#"{"error":{"message":"why","type":"x","code":null}}"#);
        let expected = json!({"type": "error", "error": {"type": kind, "message": "why"}});
        assert_eq!((same, serde_json::from_slice::<Value>(&body).unwrap()), (status, expected));
    }
}

/// Events in short, after checking that names and types agree.
fn outline(bytes: &[u8]) -> Vec<String> {
    let mut events = Vec::new();
    Decoder::new(1 << 20).feed(bytes, &mut events).unwrap();
    let line = |event: crate::net::sse::SseEvent| {
        let data: Value = serde_json::from_str(&event.data).unwrap();
        let kind = data["type"].as_str().unwrap().to_owned();
        assert_eq!(event.name.as_deref(), Some(kind.as_str()));
        let rest = match kind.as_str() {
            "message_start" => format!(" {} {}", data["message"]["id"], data["message"]["model"]),
            "content_block_start" => format!(" {} {}", data["index"], data["content_block"]),
            "content_block_delta" => format!(" {} {}", data["index"], data["delta"]),
            "content_block_stop" => format!(" {}", data["index"]),
            "message_delta" => format!(" {} {}", data["delta"], data["usage"]),
            "error" => format!(" {}", data["error"]),
            _ => String::new(),
        };
        format!("{kind}{rest}")
    };
    events.into_iter().map(line).collect()
}

fn run(pieces: &[&[u8]]) -> (bytes::Bytes, Result<()>) {
    let mut translator = Translator::new("asked".to_owned());
    let mut out = Encoder::default();
    let fed = pieces.iter().try_for_each(|piece| translator.feed(piece, &mut out));
    let ended = fed.and_then(|()| translator.end(&mut out));
    (out.take(), ended)
}

fn chunk(delta: Value, finish: Value) -> (&'static str, Value) {
    (
        "",
        json!({"id": "chatcmpl-9", "object": "chat.completion.chunk", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}),
    )
}

#[test]
fn a_stream_of_chunks_becomes_one_of_events() {
    let call = |index: u32, id: Value, function: Value| json!({"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]});
    let usage = (
        "",
        json!({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}}}),
    );
    let mut bytes = sse(&[
        chunk(json!({"role": "assistant", "content": ""}), Value::Null),
        chunk(json!({"reasoning_content": "h"}), Value::Null),
        chunk(json!({"reasoning_content": "m"}), Value::Null),
        chunk(json!({"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "sig"}]}), Value::Null),
        chunk(json!({"content": "H\u{e9}"}), Value::Null),
        chunk(json!({"content": "llo"}), Value::Null),
        chunk(call(0, "c1".into(), json!({"name": "f", "arguments": ""})), Value::Null),
        chunk(call(0, Value::Null, json!({"arguments": "{\"a\""})), Value::Null),
        chunk(call(0, Value::Null, json!({"arguments": ":1}"})), Value::Null),
        chunk(call(1, "c2".into(), json!({"name": "g", "arguments": ""})), Value::Null),
        chunk(json!({}), "tool_calls".into()),
        usage,
    ]);
    bytes.extend_from_slice(b"data: [DONE]\n\n");
    let expected = [
        "message_start \"msg_9\" \"m\"",
        "ping",
        "content_block_start 0 {\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}",
        "content_block_delta 0 {\"type\":\"thinking_delta\",\"thinking\":\"h\"}",
        "content_block_delta 0 {\"type\":\"thinking_delta\",\"thinking\":\"m\"}",
        "content_block_delta 0 {\"type\":\"signature_delta\",\"signature\":\"sig\"}",
        "content_block_stop 0",
        "content_block_start 1 {\"type\":\"text\",\"text\":\"\"}",
        "content_block_delta 1 {\"type\":\"text_delta\",\"text\":\"H\u{e9}\"}",
        "content_block_delta 1 {\"type\":\"text_delta\",\"text\":\"llo\"}",
        "content_block_stop 1",
        "content_block_start 2 {\"type\":\"tool_use\",\"id\":\"c1\",\"name\":\"f\",\"input\":{}}",
        "content_block_delta 2 {\"type\":\"input_json_delta\",\"partial_json\":\"{\\\"a\\\"\"}",
        "content_block_delta 2 {\"type\":\"input_json_delta\",\"partial_json\":\":1}\"}",
        "content_block_stop 2",
        "content_block_start 3 {\"type\":\"tool_use\",\"id\":\"c2\",\"name\":\"g\",\"input\":{}}",
        "content_block_delta 3 {\"type\":\"input_json_delta\",\"partial_json\":\"{}\"}",
        "content_block_stop 3",
        "message_delta {\"stop_reason\":\"tool_use\",\"stop_sequence\":null} {\"input_tokens\":6,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":4,\"output_tokens\":5}",
        "message_stop",
    ];
    let (whole, ended) = run(&[&bytes]);
    ended.unwrap();
    assert_eq!(outline(&whole), expected);
    for cut in 0..bytes.len() {
        let (head, tail) = bytes.split_at(cut);
        let (pieces, ended) = run(&[head, tail]);
        assert!(ended.is_ok() && pieces == whole, "cut at {cut}");
        let (part, ended) = run(&[head]);
        assert_eq!(
            ended.is_ok(),
            part.ends_with(b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"),
            "cut off at {cut}"
        );
    }
}

#[test]
fn streams_that_fail_say_so_in_the_clients_dialect() {
    let begun = chunk(json!({"content": "a"}), Value::Null);
    let error = ("", json!({"error": {"message": "slow down", "type": "rate_limit_error"}}));
    let (out, ended) = run(&[&sse(&[begun.clone(), error])]);
    let error = ended.unwrap_err();
    assert_eq!(error.kind(), Kind::RateLimited);
    assert!(!outline(&out).iter().any(|line| line.starts_with("message_stop")));
    let mut last = Encoder::default();
    Translator::fail(&error, &mut last);
    assert_eq!(outline(&last.take()), ["error {\"type\":\"rate_limit_error\",\"message\":\"slow down\"}"]);

    let (_, ended) = run(&[&sse(&[begun])]);
    assert_eq!(ended.unwrap_err().kind(), Kind::ModelUnavailable);
    let (_, ended) = run(&[b"data: [DONE]\n\n"]);
    assert_eq!(ended.unwrap_err().kind(), Kind::ModelUnavailable);
    let one =
        |index: u32| chunk(json!({"tool_calls": [{"index": index, "function": {"arguments": "x"}}]}), Value::Null);
    let (_, ended) = run(&[&sse(&[one(0), one(1), one(0)])]);
    assert!(ended.is_err(), "a call that has ended does not go on");
}
