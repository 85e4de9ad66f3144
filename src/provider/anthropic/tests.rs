//! Requests to Anthropic and its answers, as its documentation writes them.

use serde_json::{Value, json};

use super::*;
use crate::base::Kind;
use crate::provider::Dialect;
use crate::provider::testing::{answered, chat, check_stream, refused, sent, sse, stream_error};

const MODEL: &str = "claude-sonnet-4-5-20250929";

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}})
}

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

/// A greeting with these fields set.
fn with(fields: Value) -> Value {
    let mut request = hello();
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

#[test]
fn a_conversation_with_tools_and_images_is_put_in_blocks() {
    let request = json!({
        "model": "anthropic/claude", "max_tokens": 100, "temperature": 1.5, "stop": ["END"], "user": "u1", "stream": true,
        "tools": [weather(), {"type": "function", "function": {"name": "now", "parameters": {"properties": {}}}}], "tool_choice": "required",
        "parallel_tool_calls": false,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "In French.", "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.jpg"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,BBBB"}},
                {"type": "file", "file": {"file_data": "data:text/plain;base64,aGk="}},
            ]},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [
                {"id": "call.1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}},
                {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
            ]},
            {"role": "tool", "tool_call_id": "call.1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "call_2", "content": ""},
            {"role": "user", "content": "And?"},
        ],
    });
    let outgoing = chat("anthropic", MODEL, &request).unwrap();
    assert_eq!((outgoing.path.as_str(), outgoing.query, outgoing.stream), ("v1/messages", None, true));
    assert_eq!(outgoing.headers, [("anthropic-version", "2023-06-01")]);
    let body: Value = serde_json::from_slice(&outgoing.body).unwrap();
    let expected = json!({
        "model": MODEL,
        "max_tokens": 100,
        "system": [
            {"type": "text", "text": "Be brief."},
            {"type": "text", "text": "In French.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                {"type": "image", "source": {"type": "url", "url": "https://x/y.jpg"}},
                {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}, "title": "a.pdf"},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi"}},
            ]},
            {"role": "assistant", "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "tool_result", "tool_use_id": "call_2"},
                {"type": "text", "text": "And?"},
            ]},
        ],
        "tools": [
            {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
            {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
        "temperature": 1.0,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
        "stream": true,
    });
    assert_eq!(body, expected);
}

#[test]
fn lengths_and_sampling_are_what_a_model_takes() {
    for (model, expected) in [
        ("claude-3-haiku-20240307", (4096, true)),
        ("claude-3-5-sonnet-20241022", (8192, true)),
        ("claude-3-7-sonnet-20250219", (32_000, true)),
        (MODEL, (32_000, false)),
        ("claude-opus-5", (32_000, false)),
    ] {
        let body = sent("anthropic", model, &with(json!({"temperature": 0.5, "top_p": 0.9})));
        let both = body["temperature"] == 0.5 && body["top_p"] == 0.9;
        assert_eq!((body["max_tokens"].as_u64(), both), (Some(expected.0), expected.1), "{model}");
    }
    assert_eq!(sent("anthropic", MODEL, &with(json!({"top_p": 0.9, "top_k": 5})))["top_k"], 5);
}

#[test]
fn effort_becomes_thinking_in_the_models_own_way() {
    let of = |model: &str, fields: Value| {
        let body = sent("anthropic", model, &with(fields));
        (body["thinking"].clone(), body["output_config"]["effort"].clone(), body.get("temperature").is_some())
    };
    let high = || json!({"reasoning_effort": "high", "temperature": 0.2, "max_tokens": 10_000});
    let budget = |tokens: u64| json!({"type": "enabled", "budget_tokens": tokens});
    assert_eq!(of(MODEL, high()), (budget(8000), Value::Null, false));
    assert_eq!(of("claude-opus-4-6", high()), (json!({"type": "adaptive"}), "high".into(), false));
    let adaptive = json!({"type": "adaptive", "display": "summarized"});
    assert_eq!(of("claude-opus-4-7", high()), (adaptive, "high".into(), false));
    assert_eq!(of("claude-3-5-sonnet-20241022", high()), (Value::Null, Value::Null, true));
    assert_eq!(of(MODEL, json!({"reasoning_effort": "none"})).0, Value::Null);
    assert_eq!(of(MODEL, json!({"reasoning_effort": "high", "max_tokens": 1024})).0, Value::Null);
    let endless = json!({"reasoning_effort": "high", "max_tokens": u64::MAX});
    assert_eq!(of(MODEL, endless).0, budget(32_000));
    let own = json!({"thinking": {"type": "enabled", "budget_tokens": 2000}});
    assert_eq!(of(MODEL, own), (budget(2000), Value::Null, false));
    let forced = json!({"reasoning_effort": "high", "tools": [weather()], "tool_choice": "required"});
    assert_eq!(of(MODEL, forced).0, Value::Null);
}

#[test]
fn thoughts_that_are_sent_back_are_thought_on() {
    let request = |blocks: Value| {
        json!({"reasoning_effort": "low", "tools": [weather()], "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "thinking_blocks": blocks, "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ]})
    };
    let block = json!({"type": "thinking", "thinking": "t", "signature": "s"});
    let body = sent("anthropic", MODEL, &request(json!([block])));
    assert_eq!((&body["thinking"]["type"], &body["messages"][1]["content"][0]), (&"enabled".into(), &block));
    // Without them the API would refuse to go on thinking.
    assert_eq!(sent("anthropic", MODEL, &request(Value::Null))["thinking"], Value::Null);
}

#[test]
fn json_is_asked_for_as_the_model_allows() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let body = sent("anthropic", MODEL, &with(json!({"response_format": format})));
    let closed = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false});
    assert_eq!(body["output_config"]["format"], json!({"type": "json_schema", "schema": closed}));
    assert!(body.get("tools").is_none());

    let old = "claude-3-5-sonnet-20241022";
    let body = sent("anthropic", old, &with(json!({"response_format": format})));
    assert_eq!(
        (&body["tools"][0]["input_schema"], &body["tool_choice"]),
        (&schema, &json!({"type": "tool", "name": JSON_TOOL}))
    );
    let body = sent("anthropic", old, &with(json!({"response_format": format, "tools": [weather()]})));
    assert_eq!((body["tools"].as_array().unwrap().len(), &body["tool_choice"]["type"]), (2, &"any".into()));
    let body = sent("anthropic", MODEL, &with(json!({"response_format": {"type": "json_object"}})));
    assert_eq!(body["system"][0]["text"], JSON_ONLY);
}

#[test]
fn what_would_be_ignored_is_refused_by_name() {
    for (fields, param) in [
        (json!({"n": 2}), "n"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
        (json!({"frequency_penalty": -1}), "frequency_penalty"),
    ] {
        assert_eq!(refused("anthropic", MODEL, &with(fields)), param);
    }
    let audio = json!([{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]);
    assert_eq!(refused("anthropic", MODEL, &json!({"messages": [{"role": "user", "content": audio}]})), "messages");
    sent(
        "anthropic",
        MODEL,
        &with(json!({"n": 1, "presence_penalty": 0, "logprobs": false, "seed": 1, "store": true})),
    );
}

#[test]
fn a_message_becomes_a_completion() {
    let message = json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": MODEL,
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "sig"},
            {"type": "redacted_thinking", "data": "xx"},
            {"type": "text", "text": "It is "}, {"type": "text", "text": "sunny."},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris", "n": 1.50}},
        ],
        "stop_reason": "tool_use", "stop_sequence": null,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 2, "output_tokens": 7},
    });
    let expected = json!({
        "id": "msg_1", "object": "chat.completion", "created": 1_700_000_000, "model": MODEL,
        "choices": [{
            "index": 0,
            "message": {
                "role": "assistant", "content": "It is sunny.", "refusal": null, "reasoning_content": "hm",
                "thinking_blocks": [
                    {"type": "thinking", "thinking": "hm", "signature": "sig"},
                    {"type": "redacted_thinking", "data": "xx"},
                ],
                "tool_calls": [{"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\",\"n\":1.5}"}}],
            },
            "logprobs": null, "finish_reason": "tool_calls",
        }],
        "usage": {
            "prompt_tokens": 16, "completion_tokens": 7, "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        },
    });
    assert_eq!(answered(Dialect::Anthropic, &message), expected);
    for (reason, finish) in [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
    ] {
        let message = json!({"content": [], "stop_reason": reason});
        let answer = answered(Dialect::Anthropic, &message);
        assert_eq!(answer["choices"][0]["finish_reason"], finish, "{reason}");
        assert_eq!(answer.get("usage"), None, "unknown is not zero");
    }
}

#[test]
fn an_answer_through_the_json_tool_is_text() {
    let message = json!({
        "content": [{"type": "tool_use", "id": "t", "name": JSON_TOOL, "input": {"a": 1}}], "stop_reason": "tool_use",
    });
    let choice = &answered(Dialect::Anthropic, &message)["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&"{\"a\":1}".into(), &"stop".into()));
    assert_eq!(choice["message"].get("tool_calls"), None);
}

fn start() -> (&'static str, Value) {
    (
        "message_start",
        json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": [], "stop_reason": null, "usage": {"input_tokens": 25, "cache_read_input_tokens": 5, "output_tokens": 1}}}),
    )
}

fn begin(index: u32, block: Value) -> (&'static str, Value) {
    ("content_block_start", json!({"type": "content_block_start", "index": index, "content_block": block}))
}

fn delta(index: u32, delta: Value) -> (&'static str, Value) {
    ("content_block_delta", json!({"type": "content_block_delta", "index": index, "delta": delta}))
}

fn stop(index: u32) -> (&'static str, Value) {
    ("content_block_stop", json!({"type": "content_block_stop", "index": index}))
}

fn end(reason: &str) -> [(&'static str, Value); 2] {
    [
        (
            "message_delta",
            json!({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": null}, "usage": {"output_tokens": 15}}),
        ),
        ("message_stop", json!({"type": "message_stop"})),
    ]
}

#[test]
fn a_stream_is_translated_event_by_event() {
    let mut events = vec![
        start(),
        ("ping", json!({"type": "ping"})),
        begin(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
        delta(0, json!({"type": "thinking_delta", "thinking": "let me "})),
        delta(0, json!({"type": "thinking_delta", "thinking": "see"})),
        delta(0, json!({"type": "signature_delta", "signature": "sig"})),
        stop(0),
        begin(1, json!({"type": "text", "text": ""})),
        delta(1, json!({"type": "text_delta", "text": "H\u{e9}llo \u{1f600}"})),
        delta(1, json!({"type": "text_delta", "text": ""})),
        stop(1),
        begin(2, json!({"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}})),
        delta(2, json!({"type": "input_json_delta", "partial_json": ""})),
        delta(2, json!({"type": "input_json_delta", "partial_json": "{\"city\": "})),
        delta(2, json!({"type": "input_json_delta", "partial_json": "\"Paris\"}"})),
        stop(2),
        begin(3, json!({"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}})),
        stop(3),
    ];
    events.extend(end("tool_use"));
    check_stream(
        Dialect::Anthropic,
        &sse(&events),
        0,
        &[
            "assistant as msg_1 claude",
            "think let me ",
            "think see",
            "block {\"type\":\"thinking\",\"thinking\":\"let me see\",\"signature\":\"sig\"}",
            "text H\u{e9}llo \u{1f600}",
            "call 0 toolu_1 weather",
            "args 0 {\"city\": ",
            "args 0 \"Paris\"}",
            "call 1 toolu_2 now",
            "args 1 {}",
            "finish tool_calls",
            "usage 30 (5) + 15 = 45",
            "DONE",
        ],
    );
}

#[test]
fn a_stream_through_the_json_tool_is_text() {
    let mut events = vec![
        start(),
        begin(0, json!({"type": "tool_use", "id": "toolu_1", "name": JSON_TOOL, "input": {}})),
        delta(0, json!({"type": "input_json_delta", "partial_json": "{\"a\":1}"})),
        stop(0),
    ];
    events.extend(end("tool_use"));
    check_stream(
        Dialect::Anthropic,
        &sse(&events),
        0,
        &["assistant as msg_1 claude", "text {\"a\":1}", "finish stop", "usage 30 (5) + 15 = 45", "DONE"],
    );
}

#[test]
fn streams_that_fail_are_not_taken_for_complete() {
    let error = ("error", json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}));
    let found = stream_error(Dialect::Anthropic, &sse(&[start(), error]));
    assert_eq!((found.kind(), found.message()), (Kind::Busy, "Overloaded"));
    let silent = stream_error(Dialect::Anthropic, &sse(&[start(), ("message_stop", json!({"type": "message_stop"}))]));
    assert_eq!(silent.kind(), Kind::ModelUnavailable);
    assert_eq!(stream_error(Dialect::Anthropic, b"data: <html>\n\n").kind(), Kind::ModelUnavailable);
}
