//! Requests to Cohere and its answers, as its documentation writes them.

use serde_json::{Value, json};

use crate::base::Kind;
use crate::provider::Dialect;
use crate::provider::testing::{answered, chat, check_stream, refused, sent, sse, stream_error};

const MODEL: &str = "command-a-03-2025";

fn with(fields: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}})
}

#[test]
fn a_conversation_keeps_its_shape() {
    let request = json!({
        "model": "cohere/command-a", "stream": true, "max_tokens": 50, "temperature": 0.5, "top_p": 1.0, "top_k": 20, "seed": 7,
        "stop": ["END"], "presence_penalty": 0.1, "frequency_penalty": 0.2, "logprobs": true,
        "tools": [tool("weather"), tool("now")], "tool_choice": {"type": "function", "function": {"name": "now"}},
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
            ]},
            {"role": "assistant", "content": "I will look.", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": "Sunny."},
            {"role": "user", "content": "And?"},
        ],
    });
    let outgoing = chat("cohere", MODEL, &request).unwrap();
    assert_eq!(outgoing.path, "v2/chat");
    let body: Value = serde_json::from_slice(&outgoing.body).unwrap();
    let expected = json!({
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
            ]},
            {"role": "assistant", "tool_plan": "I will look.", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
            {"role": "user", "content": "And?"},
        ],
        "tools": [tool("now")],
        "tool_choice": "REQUIRED",
        "max_tokens": 50, "temperature": 0.5, "k": 20, "seed": 7, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "stop_sequences": ["END"], "logprobs": true, "stream": true,
    });
    assert_eq!(body, expected);
}

#[test]
fn formats_and_thinking_are_switches() {
    let format =
        |format: Value| sent("cohere", MODEL, &with(json!({"response_format": format})))["response_format"].clone();
    assert_eq!(format(json!({"type": "json_object"})), json!({"type": "json_object"}));
    let schema =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}}});
    assert_eq!(format(schema), json!({"type": "json_object", "schema": {"type": "object", "required": ["a"]}}));
    let thinking = |model: &str, effort: &str| {
        sent("cohere", model, &with(json!({"reasoning_effort": effort})))["thinking"].clone()
    };
    assert_eq!(thinking("command-a-reasoning-08-2025", "low"), json!({"type": "enabled", "token_budget": 1024}));
    assert_eq!(thinking("command-a-reasoning-08-2025", "none"), json!({"type": "disabled"}));
    assert_eq!(thinking(MODEL, "low"), Value::Null);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    for (fields, param) in [
        (json!({"n": 2}), "n"),
        (json!({"logprobs": true, "top_logprobs": 2}), "top_logprobs"),
        (json!({"tools": [tool("a")], "parallel_tool_calls": false}), "parallel_tool_calls"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "data:a/b;base64,AA"}}]}]}),
            "messages",
        ),
    ] {
        assert_eq!(refused("cohere", MODEL, &with(fields)), param);
    }
}

#[test]
fn an_answer_becomes_a_completion() {
    let call = json!({"id": "weather_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}});
    let response = json!({
        "id": "c1", "finish_reason": "TOOL_CALL",
        "message": {"role": "assistant", "tool_plan": "I will look.", "tool_calls": [call]},
        "usage": {"billed_units": {"input_tokens": 5, "output_tokens": 9}, "tokens": {"input_tokens": 71, "output_tokens": 9}},
    });
    let answer = answered(Dialect::Cohere, &response);
    let message = json!({"role": "assistant", "content": "I will look.", "refusal": null, "tool_calls": [call]});
    assert_eq!(
        answer["choices"][0],
        json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "tool_calls"})
    );
    assert_eq!((&answer["id"], &answer["usage"]["prompt_tokens"]), (&"c1".into(), &5.into()));

    let response = json!({
        "id": "c2", "finish_reason": "MAX_TOKENS",
        "message": {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi"}]},
        "logprobs": [{"text": "Hi", "token_ids": [1, 2], "logprobs": [-0.5, -0.25]}],
    });
    let choice = &answered(Dialect::Cohere, &response)["choices"][0];
    assert_eq!((&choice["message"]["reasoning_content"], &choice["finish_reason"]), (&"hm".into(), &"length".into()));
    assert_eq!(choice["logprobs"]["content"][0]["logprob"], -0.75);
    let failed = br#"{"id":"c","finish_reason":"ERROR","message":{"role":"assistant"}}"#;
    assert!(crate::provider::answer(Dialect::Cohere, &crate::provider::testing::meta(), failed).is_err());
}

fn event(kind: &'static str, fields: Value) -> (&'static str, Value) {
    let mut event = json!({ "type": kind });
    for (name, value) in fields.as_object().unwrap() {
        event[name] = value.clone();
    }
    (kind, event)
}

fn start() -> (&'static str, Value) {
    let message = json!({"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []});
    event("message-start", json!({"id": "c1", "delta": {"message": message}}))
}

fn end(reason: &str) -> (&'static str, Value) {
    let usage = json!({"billed_units": {"input_tokens": 5, "output_tokens": 9}, "tokens": {"input_tokens": 71, "output_tokens": 9}});
    event("message-end", json!({"delta": {"finish_reason": reason, "usage": usage}}))
}

#[test]
fn a_stream_of_text_is_translated_event_by_event() {
    let content = |content: Value| json!({"index": 0, "delta": {"message": {"content": content}}});
    let mut sure = event("content-delta", content(json!({"text": "!"})));
    sure.1["logprobs"] = json!({"text": "!", "token_ids": [1], "logprobs": [-0.5]});
    let events = [
        start(),
        event("content-start", content(json!({"type": "thinking", "thinking": ""}))),
        event("content-delta", content(json!({"thinking": "hm"}))),
        event("content-end", json!({"index": 0})),
        event("content-start", content(json!({"type": "text", "text": ""}))),
        event("content-delta", content(json!({"text": "H\u{e9}"}))),
        sure,
        event(
            "citation-start",
            json!({"index": 0, "delta": {"message": {"citations": {"start": 0, "end": 2, "text": "H\u{e9}"}}}}),
        ),
        event("content-end", json!({"index": 1})),
        end("COMPLETE"),
    ];
    check_stream(
        Dialect::Cohere,
        &sse(&events),
        0,
        &[
            "assistant as c1 provider/model",
            "think hm",
            "text H\u{e9}",
            "text ! [{\"token\":\"!\",\"logprob\":-0.5,\"bytes\":[33],\"top_logprobs\":[]}]",
            "finish stop",
            "usage 5 (0) + 9 = 14",
            "DONE",
        ],
    );
}

#[test]
fn a_stream_of_calls_is_translated_event_by_event() {
    let calls = |index: u32, call: Value| json!({"index": index, "delta": {"message": {"tool_calls": call}}});
    let begin =
        |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}});
    let more = |arguments: &str| json!({"function": {"arguments": arguments}});
    let events = [
        start(),
        event("tool-plan-delta", json!({"delta": {"message": {"tool_plan": "I will look."}}})),
        event("tool-call-start", calls(0, begin("w1", "weather"))),
        event("tool-call-delta", calls(0, more("{\"city\""))),
        event("tool-call-delta", calls(0, more(":\"Paris\"}"))),
        event("tool-call-end", json!({"index": 0})),
        event("tool-call-start", calls(1, begin("n1", "now"))),
        event("tool-call-end", json!({"index": 1})),
        end("TOOL_CALL"),
    ];
    check_stream(
        Dialect::Cohere,
        &sse(&events),
        0,
        &[
            "assistant as c1 provider/model",
            "text I will look.",
            "call 0 w1 weather",
            "args 0 {\"city\"",
            "args 0 :\"Paris\"}",
            "call 1 n1 now",
            "args 1 {}",
            "finish tool_calls",
            "usage 5 (0) + 9 = 14",
            "DONE",
        ],
    );
}

#[test]
fn streams_that_fail_are_not_taken_for_complete() {
    let broken = event("message-end", json!({"delta": {"finish_reason": "ERROR", "error": "ran out of memory"}}));
    let found = stream_error(Dialect::Cohere, &sse(&[start(), broken]));
    assert_eq!((found.kind(), found.message()), (Kind::ModelUnavailable, "ran out of memory"));
    let untyped = stream_error(Dialect::Cohere, &sse(&[start(), ("", json!({"message": "too late"}))]));
    assert_eq!(untyped.message(), "too late");
    assert!(stream_error(Dialect::Cohere, &sse(&[start(), end("TIMEOUT")])).message().contains("TIMEOUT"));
}
