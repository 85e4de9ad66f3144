//! Requests to Converse and its answers, as AWS's documentation writes them.

use serde_json::{Value, json};

use super::*;
use crate::base::Kind;
use crate::provider::testing::{answered, chat, check_stream, refused, sent, stream_error};
use crate::provider::{Dialect, frame};

const CLAUDE: &str = "us.anthropic.claude-sonnet-4-5-20250929-v1:0";
const NOVA: &str = "amazon.nova-lite-v1:0";

fn with(fields: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}})
}

#[test]
fn a_conversation_with_tools_and_images_is_put_in_blocks() {
    let request = json!({
        "stream": true, "max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "stop": ["END"],
        "tools": [weather()], "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "s3://bucket/x.png"}},
                {"type": "file", "file": {"filename": "a b.pdf", "file_data": "data:application/pdf;base64,BBBB"}},
            ]},
            {"role": "assistant", "thinking_blocks": [
                {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "redacted_thinking", "data": "xx"},
            ], "tool_calls": [{"id": "call_1", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": ""},
            {"role": "user", "content": "And?"},
        ],
    });
    let outgoing = chat("bedrock", NOVA, &request).unwrap();
    assert_eq!(outgoing.path, "bedrock-runtime/us-east-1/model/amazon.nova-lite-v1%3A0/converse-stream");
    let body: Value = serde_json::from_slice(&outgoing.body).unwrap();
    let expected = json!({
        "messages": [
            {"role": "user", "content": [
                {"text": "What is this?"},
                {"image": {"format": "jpeg", "source": {"bytes": "AAAA"}}},
                {"image": {"format": "png", "source": {"s3Location": {"uri": "s3://bucket/x.png"}}}},
                {"document": {"format": "pdf", "name": "a-b-pdf", "source": {"bytes": "BBBB"}}},
            ]},
            {"role": "assistant", "content": [
                {"reasoningContent": {"reasoningText": {"text": "t", "signature": "s"}}},
                {"reasoningContent": {"redactedContent": "xx"}},
                {"toolUse": {"toolUseId": "call_1", "name": "weather", "input": {"city": "Paris"}}},
            ]},
            {"role": "user", "content": [
                {"toolResult": {"toolUseId": "call_1", "content": [{"text": "(empty)"}]}},
                {"text": "And?"},
            ]},
        ],
        "system": [{"text": "Be brief."}],
        "toolConfig": {
            "tools": [{"toolSpec": {"name": "weather", "description": "d", "inputSchema": {"json": {"type": "object", "properties": {"city": {"type": "string"}}}}}}],
            "toolChoice": {"tool": {"name": "weather"}},
        },
        "inferenceConfig": {"maxTokens": 50, "temperature": 0.5, "topP": 0.9, "stopSequences": ["END"]},
        "additionalModelRequestFields": {"inferenceConfig": {"topK": 20}},
    });
    assert_eq!(body, expected);
}

#[test]
fn families_of_models_get_their_own_fields() {
    let extra =
        |model: &str, fields: Value| sent("bedrock", model, &with(fields))["additionalModelRequestFields"].clone();
    let thinking = extra(CLAUDE, json!({"reasoning_effort": "medium", "temperature": 0.3}));
    assert_eq!(thinking, json!({"thinking": {"type": "enabled", "budget_tokens": 4096}}));
    let body = sent("bedrock", CLAUDE, &with(json!({"reasoning_effort": "medium", "temperature": 0.3})));
    assert_eq!(body["inferenceConfig"], json!({"maxTokens": 8192}));
    assert_eq!(extra(CLAUDE, json!({"top_k": 3})), json!({"top_k": 3}));
    assert_eq!(
        extra("openai.gpt-oss-120b-1:0", json!({"reasoning_effort": "minimal"})),
        json!({"reasoning_effort": "low"})
    );
    assert_eq!(extra("meta.llama3-8b", json!({"reasoning_effort": "high", "top_k": 1})), Value::Null);
}

#[test]
fn tools_of_the_past_stay_declared() {
    let past = |more: Value| {
        let mut request = json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ]});
        for (name, value) in more.as_object().unwrap() {
            request[name] = value.clone();
        }
        request
    };
    let body = sent("bedrock", NOVA, &past(json!({})));
    assert_eq!(body["toolConfig"]["tools"][0]["toolSpec"]["name"], "f");
    assert_eq!(refused("bedrock", NOVA, &past(json!({"tools": [weather()], "tool_choice": "none"}))), "tool_choice");
    let none = sent("bedrock", NOVA, &with(json!({"tools": [weather()], "tool_choice": "none"})));
    assert_eq!(none.get("toolConfig"), None);
}

#[test]
fn json_is_the_arguments_of_a_tool() {
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "description": "the answer", "schema": {"type": "object"}}});
    let body = sent("bedrock", NOVA, &with(json!({"response_format": format})));
    let spec = json!({"name": JSON_TOOL, "description": "the answer", "inputSchema": {"json": {"type": "object"}}});
    assert_eq!(body["toolConfig"], json!({"tools": [{"toolSpec": spec}], "toolChoice": {"tool": {"name": JSON_TOOL}}}));
    let body = sent("bedrock", NOVA, &with(json!({"response_format": format, "tools": [weather()]})));
    assert_eq!(body["toolConfig"]["toolChoice"], json!({"any": {}}));
    let body = sent("bedrock", NOVA, &with(json!({"response_format": {"type": "json_object"}})));
    assert_eq!(body["system"], json!([{"text": JSON_ONLY}]));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    for (fields, param) in [
        (json!({"n": 3}), "n"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"presence_penalty": 1}), "presence_penalty"),
        (json!({"tools": [weather()], "parallel_tool_calls": false}), "parallel_tool_calls"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]}),
            "messages",
        ),
    ] {
        assert_eq!(refused("bedrock", NOVA, &with(fields)), param);
    }
    let provider = crate::provider::find("bedrock").unwrap();
    let nowhere = crate::provider::Place::default();
    assert!(provider.chat(NOVA, &with(json!({})).to_string().into(), &nowhere).is_err());
}

#[test]
fn an_answer_becomes_a_completion() {
    let response = json!({
        "output": {"message": {"role": "assistant", "content": [
            {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "sig"}}},
            {"text": "It is sunny."},
            {"toolUse": {"toolUseId": "tooluse_1", "name": "weather", "input": {"city": "Paris"}}},
        ]}},
        "stopReason": "tool_use",
        "usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15},
        "metrics": {"latencyMs": 100},
    });
    let answer = answered(Dialect::Bedrock, &response);
    assert_eq!((&answer["id"], &answer["model"]), (&"chatcmpl-1".into(), &"provider/model".into()));
    let message = json!({
        "role": "assistant", "content": "It is sunny.", "refusal": null, "reasoning_content": "hm",
        "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "sig"}],
        "tool_calls": [{"id": "tooluse_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}}],
    });
    assert_eq!(
        answer["choices"][0],
        json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "tool_calls"})
    );
    assert_eq!(answer["usage"]["total_tokens"], 15);
    for (reason, finish) in [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
    ] {
        let response = json!({"output": {"message": {"content": []}}, "stopReason": reason});
        assert_eq!(answered(Dialect::Bedrock, &response)["choices"][0]["finish_reason"], finish);
    }
}

fn event(name: &str, payload: Value) -> Vec<u8> {
    let headers = [(":event-type", name), (":content-type", "application/json"), (":message-type", "event")];
    frame::encode(&headers, payload.to_string().as_bytes())
}

fn exception(name: &str, message: &str) -> Vec<u8> {
    let headers = [(":exception-type", name), (":content-type", "application/json"), (":message-type", "exception")];
    frame::encode(&headers, json!({ "message": message }).to_string().as_bytes())
}

#[test]
fn a_stream_is_translated_event_by_event() {
    let metadata = event(
        "metadata",
        json!({"usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15, "cacheReadInputTokens": 2}, "metrics": {"latencyMs": 9}, "p": "abc"}),
    );
    let events = [
        event("messageStart", json!({"role": "assistant", "p": "ab"})),
        event("contentBlockDelta", json!({"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "hm"}}})),
        event(
            "contentBlockDelta",
            json!({"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "sig"}}}),
        ),
        event("contentBlockStop", json!({"contentBlockIndex": 0})),
        event("contentBlockDelta", json!({"contentBlockIndex": 1, "delta": {"text": "H\u{e9}"}})),
        event("contentBlockDelta", json!({"contentBlockIndex": 1, "delta": {"text": "llo"}})),
        event("contentBlockStop", json!({"contentBlockIndex": 1})),
        event(
            "contentBlockStart",
            json!({"contentBlockIndex": 2, "start": {"toolUse": {"toolUseId": "t1", "name": "weather"}}}),
        ),
        event("contentBlockDelta", json!({"contentBlockIndex": 2, "delta": {"toolUse": {"input": "{\"city\""}}})),
        event("contentBlockDelta", json!({"contentBlockIndex": 2, "delta": {"toolUse": {"input": ":\"Paris\"}"}}})),
        event("contentBlockStop", json!({"contentBlockIndex": 2})),
        event(
            "contentBlockStart",
            json!({"contentBlockIndex": 3, "start": {"toolUse": {"toolUseId": "t2", "name": "now"}}}),
        ),
        event("contentBlockStop", json!({"contentBlockIndex": 3})),
        event("messageStop", json!({"stopReason": "tool_use"})),
        metadata.clone(),
    ];
    // Behind `messageStop` an answer is complete; what it used is then unknown.
    check_stream(
        Dialect::Bedrock,
        &events.concat(),
        metadata.len(),
        &[
            "assistant as chatcmpl-1 provider/model",
            "think hm",
            "block {\"type\":\"thinking\",\"thinking\":\"hm\",\"signature\":\"sig\"}",
            "text H\u{e9}",
            "text llo",
            "call 0 t1 weather",
            "args 0 {\"city\"",
            "args 0 :\"Paris\"}",
            "call 1 t2 now",
            "args 1 {}",
            "finish tool_calls",
            "usage 12 (2) + 5 = 17",
            "DONE",
        ],
    );
}

#[test]
fn streams_that_fail_are_not_taken_for_complete() {
    let start = event("messageStart", json!({"role": "assistant"}));
    for (bad, kind, message) in [
        (exception("throttlingException", "slow down"), Kind::RateLimited, "slow down"),
        (exception("modelStreamErrorException", "oops"), Kind::ModelUnavailable, "oops"),
        (exception("serviceUnavailableException", "later"), Kind::Busy, "later"),
        (exception("validationException", "no"), Kind::BadInput, "no"),
        (
            frame::encode(
                &[(":message-type", "error"), (":error-code", "InternalError"), (":error-message", "boom")],
                b"",
            ),
            Kind::ModelUnavailable,
            "boom",
        ),
    ] {
        let found = stream_error(Dialect::Bedrock, &[start.clone(), bad].concat());
        assert_eq!((found.kind(), found.message()), (kind, message));
    }
    assert_eq!(stream_error(Dialect::Bedrock, b"HTTP/1.1 502 Bad Gateway").kind(), Kind::ModelUnavailable);
    let malformed = event("messageStop", json!({"stopReason": "malformed_tool_use"}));
    assert_eq!(stream_error(Dialect::Bedrock, &[start, malformed].concat()).kind(), Kind::ModelUnavailable);
}
