//! Requests to Google and its answers, as its documentation writes them.

use serde_json::{Value, json};

use super::*;
use crate::base::Kind;
use crate::provider::Dialect;
use crate::provider::testing::{answered, chat, check_stream, refused, sent, sse, stream_error};

const MODEL: &str = "gemini-2.5-flash";

fn with(fields: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "d", "strict": true, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false,
    }}})
}

#[test]
fn a_conversation_with_tools_and_images_is_put_in_parts() {
    let request = json!({
        "stream": true, "n": 2, "seed": 7, "max_completion_tokens": 50, "temperature": 0.5, "top_p": 0.9, "top_k": 20,
        "stop": "END", "presence_penalty": 0.1, "frequency_penalty": 0.2, "logprobs": true, "top_logprobs": 3,
        "tools": [weather(), {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": false,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.webp?s=1"}},
                {"type": "input_audio", "input_audio": {"data": "CCCC", "format": "wav"}},
            ]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "1", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}, "extra_content": {"google": {"thought_signature": "sig"}}},
                {"id": "2", "function": {"name": "now", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "{\"sky\":\"clear\"}"},
            {"role": "tool", "tool_call_id": "2", "content": "noon"},
        ],
    });
    let outgoing = chat("google-ai-studio", MODEL, &request).unwrap();
    assert_eq!(outgoing.path, "v1beta/models/gemini-2.5-flash:streamGenerateContent");
    assert_eq!(outgoing.query.as_deref(), Some("alt=sse"));
    let body: Value = serde_json::from_slice(&outgoing.body).unwrap();
    let expected = json!({
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [
                {"text": "What is this?"},
                {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
                {"fileData": {"mimeType": "image/webp", "fileUri": "https://x/y.webp?s=1"}},
                {"inlineData": {"mimeType": "audio/wav", "data": "CCCC"}},
            ]},
            {"role": "model", "parts": [
                {"functionCall": {"name": "weather", "args": {"city": "Paris"}}, "thoughtSignature": "sig"},
                {"functionCall": {"name": "now", "args": {}}},
            ]},
            {"role": "user", "parts": [
                {"functionResponse": {"name": "weather", "response": {"sky": "clear"}}},
                {"functionResponse": {"name": "now", "response": {"output": "noon"}}},
            ]},
        ],
        "tools": [{"functionDeclarations": [
            {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
            {"name": "now"},
        ]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["weather"]}},
        "generationConfig": {
            "temperature": 0.5, "topP": 0.9, "topK": 20, "maxOutputTokens": 50, "candidateCount": 2,
            "stopSequences": ["END"], "seed": 7, "presencePenalty": 0.1, "frequencyPenalty": 0.2,
            "responseLogprobs": true, "logprobs": 3,
        },
    });
    assert_eq!(body, expected);
}

#[test]
fn a_plain_request_is_plain() {
    let outgoing = chat("google", MODEL, &with(json!({}))).unwrap();
    assert_eq!((outgoing.path.as_str(), outgoing.query), ("v1beta/models/gemini-2.5-flash:generateContent", None));
    assert_eq!(&outgoing.body[..], br#"{"contents":[{"role":"user","parts":[{"text":"Hi"}]}]}"#);
    let tuned = chat("google", "tunedModels/mine", &with(json!({}))).unwrap();
    assert_eq!(tuned.path, "v1beta/tunedModels/mine:generateContent");
}

#[test]
fn calls_that_gemini_did_not_make_are_let_through() {
    let request = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}},
            {"id": "2", "function": {"name": "f", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "tool", "tool_call_id": "2", "content": "r"},
    ]});
    let signatures = |model: &str| {
        let body = sent("google", model, &request);
        let parts = body["contents"][1]["parts"].as_array().unwrap().clone();
        parts.iter().map(|part| part["thoughtSignature"].as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(signatures("gemini-3-pro-preview"), [Some(NO_SIGNATURE.to_owned()), None]);
    assert_eq!(signatures("gemini-4-argon"), [Some(NO_SIGNATURE.to_owned()), None]);
    assert_eq!(signatures(MODEL), [None, None]);
}

#[test]
fn effort_becomes_a_level_or_a_budget() {
    for (model, effort, expected) in [
        (MODEL, "medium", json!({"thinkingBudget": 8192, "includeThoughts": true})),
        (MODEL, "none", json!({"thinkingBudget": 0, "includeThoughts": false})),
        ("gemini-2.5-pro", "none", json!({"thinkingBudget": 128, "includeThoughts": false})),
        ("gemini-3-pro-preview", "medium", json!({"thinkingLevel": "high", "includeThoughts": true})),
        ("gemini-3.1-pro", "medium", json!({"thinkingLevel": "medium", "includeThoughts": true})),
        ("gemini-3-flash", "minimal", json!({"thinkingLevel": "minimal", "includeThoughts": true})),
        ("gemini-2.0-flash", "high", Value::Null),
    ] {
        let body = sent("google", model, &with(json!({"reasoning_effort": effort})));
        assert_eq!(body["generationConfig"]["thinkingConfig"], expected, "{model} {effort}");
    }
}

#[test]
fn json_is_a_switch_with_or_without_a_schema() {
    let object = sent("google", MODEL, &with(json!({"response_format": {"type": "json_object"}})));
    assert_eq!(object["generationConfig"], json!({"responseMimeType": "application/json"}));
    let schema = json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"x": {"type": ["integer", "null"]}}, "additionalProperties": false}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let body = sent("google", MODEL, &with(json!({"response_format": format})));
    let expected = json!({"type": "object", "properties": {"x": {"nullable": true, "type": "integer"}}});
    assert_eq!(body["generationConfig"]["responseSchema"], expected);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let one = with(json!({"tools": [weather()], "parallel_tool_calls": false}));
    assert_eq!(refused("google", MODEL, &one), "parallel_tool_calls");
    let orphan =
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "9", "content": "r"}]});
    assert_eq!(refused("google", MODEL, &orphan), "messages");
}

#[test]
fn an_answer_becomes_a_completion() {
    let response = json!({
        "candidates": [
            {"content": {"role": "model", "parts": [
                {"text": "hm", "thought": true},
                {"text": "It is sunny."},
                {"functionCall": {"name": "weather", "args": {"city": "Paris"}}, "thoughtSignature": "sig"},
                {"functionCall": {"id": "given", "name": "now"}},
            ]}, "finishReason": "STOP", "index": 0},
            {"content": {"parts": [{"text": "Rain"}]}, "finishReason": "MAX_TOKENS", "index": 1, "logprobsResult": {
                "chosenCandidates": [{"token": "Rain", "tokenId": 5, "logProbability": -0.5}],
                "topCandidates": [{"candidates": [{"token": "Rain", "logProbability": -0.5}, {"token": "Sun", "logProbability": -1.5}]}],
            }},
        ],
        "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 3, "totalTokenCount": 18},
        "modelVersion": "gemini-2.5-flash", "responseId": "r1",
    });
    let answer = answered(Dialect::Google, &response);
    assert_eq!((&answer["id"], &answer["model"]), (&"r1".into(), &"gemini-2.5-flash".into()));
    let first = json!({
        "index": 0,
        "message": {"role": "assistant", "content": "It is sunny.", "refusal": null, "reasoning_content": "hm", "tool_calls": [
            {"id": "call_1_0", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}, "extra_content": {"google": {"thought_signature": "sig"}}},
            {"id": "given", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ]},
        "logprobs": null, "finish_reason": "tool_calls",
    });
    assert_eq!(answer["choices"][0], first);
    let second = &answer["choices"][1];
    assert_eq!((&second["index"], &second["finish_reason"]), (&1.into(), &"length".into()));
    let rivals = json!([{"token": "Rain", "logprob": -0.5, "bytes": b"Rain"}, {"token": "Sun", "logprob": -1.5, "bytes": b"Sun"}]);
    let expected = json!([{"token": "Rain", "logprob": -0.5, "bytes": b"Rain", "top_logprobs": rivals}]);
    assert_eq!(second["logprobs"]["content"], expected);
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
}

#[test]
fn what_is_blocked_says_so() {
    let prompt = json!({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 4, "totalTokenCount": 4}});
    let choice = &answered(Dialect::Google, &prompt)["choices"][0];
    assert_eq!(choice["finish_reason"], "content_filter");
    assert_eq!(choice["message"]["refusal"], "The prompt was blocked: SAFETY.");
    for reason in ["SAFETY", "RECITATION", "PROHIBITED_CONTENT", "SPII", "BLOCKLIST"] {
        let answer = json!({"candidates": [{"finishReason": reason}]});
        assert_eq!(answered(Dialect::Google, &answer)["choices"][0]["finish_reason"], "content_filter", "{reason}");
    }
    let malformed = br#"{"candidates":[{"finishReason":"MALFORMED_FUNCTION_CALL","finishMessage":"bad"}]}"#;
    for body in [&malformed[..], b"{}", b"<html>", br#"{"error":{"code":500,"message":"x","status":"INTERNAL"}}"#] {
        let error = crate::provider::answer(Dialect::Google, &crate::provider::testing::meta(), body).unwrap_err();
        assert_eq!(error.kind(), Kind::ModelUnavailable);
    }
    check_stream(
        Dialect::Google,
        &sse(&[("", prompt)]),
        0,
        &[
            "assistant as chatcmpl-1 provider/model",
            "refuse The prompt was blocked: SAFETY.",
            "finish content_filter",
            "usage 4 (0) + 0 = 4",
            "DONE",
        ],
    );
}

fn piece(parts: Value, more: Value) -> (&'static str, Value) {
    let mut candidate = json!({"content": {"parts": parts, "role": "model"}});
    for (name, value) in more.as_object().unwrap() {
        candidate[name] = value.clone();
    }
    let usage =
        json!({"promptTokenCount": 10, "candidatesTokenCount": 6, "totalTokenCount": 16, "cachedContentTokenCount": 3});
    ("", json!({"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini", "responseId": "r1"}))
}

#[test]
fn a_stream_is_translated_as_it_comes() {
    let events = [
        piece(json!([{"text": "hm", "thought": true}]), json!({"index": 0})),
        piece(json!([{"text": "H\u{e9}l"}, {"text": "lo"}]), json!({})),
        piece(
            json!([{"text": "!"}]),
            json!({"logprobsResult": {"chosenCandidates": [{"token": "!", "logProbability": -1.0}]}}),
        ),
        piece(
            json!([{"functionCall": {"name": "weather", "args": {"city": "Paris"}}, "thoughtSignature": "sig"}]),
            json!({}),
        ),
        piece(json!([{"functionCall": {"name": "now"}}]), json!({})),
        piece(json!([{"text": ""}]), json!({"finishReason": "STOP"})),
    ];
    check_stream(
        Dialect::Google,
        &sse(&events),
        0,
        &[
            "assistant as r1 gemini",
            "think hm",
            "text H\u{e9}l",
            "text lo",
            "text ! [{\"token\":\"!\",\"logprob\":-1.0,\"bytes\":[33],\"top_logprobs\":[]}]",
            "call 0 call_1_0 weather {\"google\":{\"thought_signature\":\"sig\"}}",
            "args 0 {\"city\":\"Paris\"}",
            "call 1 call_1_1 now",
            "args 1 {}",
            "finish tool_calls",
            "usage 10 (3) + 6 = 16",
            "DONE",
        ],
    );
}

#[test]
fn several_candidates_end_one_by_one() {
    let events = [
        piece(json!([{"text": "a"}]), json!({"index": 0})),
        piece(json!([{"text": "b"}]), json!({"index": 1, "finishReason": "STOP"})),
        piece(json!([]), json!({"index": 0, "finishReason": "MAX_TOKENS"})),
    ];
    check_stream(
        Dialect::Google,
        &sse(&events),
        0,
        &[
            "assistant as r1 gemini",
            "text a",
            "1: assistant as r1 gemini",
            "1: text b",
            "1: finish stop",
            "finish length",
            "usage 10 (3) + 6 = 16",
            "DONE",
        ],
    );
}

#[test]
fn streams_that_fail_are_not_taken_for_complete() {
    let hello = piece(json!([{"text": "a"}]), json!({}));
    let error = ("", json!({"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}));
    let found = stream_error(Dialect::Google, &sse(&[hello.clone(), error]));
    assert_eq!((found.kind(), found.message()), (Kind::Busy, "overloaded"));
    let malformed = piece(json!([]), json!({"finishReason": "MALFORMED_FUNCTION_CALL"}));
    assert_eq!(stream_error(Dialect::Google, &sse(&[hello.clone(), malformed])).kind(), Kind::ModelUnavailable);
    assert_eq!(stream_error(Dialect::Google, &sse(&[hello])).kind(), Kind::ModelUnavailable);
}
