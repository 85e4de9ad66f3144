//! The shared way in and out, and OpenAI's own dialect.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::provider::Meter;
use crate::provider::find;
use crate::provider::testing::{chat, check_stream, meta, outline, place, refused, sent, stream_error};

fn hello() -> Value {
    json!({"model": "x/y", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.50})
}

#[test]
fn chat_goes_where_each_provider_has_it() {
    for (slug, model, base, url) in [
        ("openai", "gpt-4.1", None, "https://api.openai.com/v1/chat/completions"),
        ("groq", "llama", None, "https://api.groq.com/openai/v1/chat/completions"),
        ("mistral", "m", None, "https://api.mistral.ai/v1/chat/completions"),
        ("deepseek", "m", None, "https://api.deepseek.com/chat/completions"),
        ("perplexity", "sonar", None, "https://api.perplexity.ai/chat/completions"),
        ("xai", "grok-4", None, "https://api.x.ai/v1/chat/completions"),
        ("parallel", "speed", None, "https://api.parallel.ai/chat/completions"),
        ("custom-mine", "m", Some("https://h/api/v1"), "https://h/api/v1/chat/completions"),
        ("custom-mine", "m", Some("https://h"), "https://h/v1/chat/completions"),
        (
            "workers-ai",
            "@cf/x/y",
            Some("https://h/client/v4/accounts/a/ai"),
            "https://h/client/v4/accounts/a/ai/v1/chat/completions",
        ),
        (
            "azure",
            "gpt-4o",
            None,
            "https://res.openai.azure.com/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
        ),
        ("anthropic", "claude-opus-4-1", None, "https://api.anthropic.com/v1/messages"),
        (
            "google",
            "gemini-2.5-pro",
            None,
            "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro:generateContent",
        ),
        (
            "bedrock",
            "amazon.nova-lite-v1:0",
            None,
            "https://bedrock-runtime.us-east-1.amazonaws.com/model/amazon.nova-lite-v1%3A0/converse",
        ),
        ("cohere", "command-a", None, "https://api.cohere.ai/v2/chat"),
        (
            "google-vertex-ai",
            "google/gemini-2.5-pro",
            None,
            "https://us-east-1-aiplatform.googleapis.com/v1/projects/proj/locations/us-east-1/publishers/google/models/gemini-2.5-pro:generateContent",
        ),
        (
            "google-vertex-ai",
            "anthropic/claude-sonnet-4-5@20250929",
            None,
            "https://us-east-1-aiplatform.googleapis.com/v1/projects/proj/locations/us-east-1/publishers/anthropic/models/claude-sonnet-4-5%4020250929:rawPredict",
        ),
        (
            "google-vertex-ai",
            "meta/llama-4",
            None,
            "https://us-east-1-aiplatform.googleapis.com/v1/projects/proj/locations/us-east-1/endpoints/openapi/chat/completions",
        ),
    ] {
        let outgoing = chat(slug, model, &hello()).unwrap();
        let found = find(slug).unwrap().url(base, &outgoing.path, outgoing.query.as_deref()).unwrap();
        assert_eq!(found.to_string(), url, "{slug} {model}");
    }
}

#[test]
fn providers_without_chat_and_calls_without_place_are_refused() {
    for slug in ["replicate", "huggingface", "elevenlabs", "fal"] {
        assert_eq!(chat(slug, "m", &hello()).unwrap_err().kind(), Kind::Unsupported, "{slug}");
    }
    assert_eq!(refused("openai", "", &hello()), "model");
    let body = Bytes::from(hello().to_string());
    for slug in ["bedrock", "google-vertex-ai", "azure"] {
        let refused = find(slug).unwrap().chat("m", &body, &Place::default());
        assert_eq!(refused.unwrap_err().kind(), Kind::BadInput, "{slug}");
    }
    let named = find("azure").unwrap().chat("res/gpt-4o", &body, &Place::default()).unwrap();
    assert_eq!(named.path, "res/gpt-4o/chat/completions");
    assert!(find("openai").unwrap().chat("m", &Bytes::from("[]"), &place()).is_err());
    assert!(find("anthropic").unwrap().chat("m", &Bytes::from("{"), &place()).is_err());
}

#[test]
fn the_same_dialect_travels_as_it_is() {
    let body = Bytes::from(r#"{ "n":1.0e0, "model": "openai/gpt-4.1","new_field":{"a":1.50},"messages":[]}"#);
    let outgoing = find("openai").unwrap().chat("gpt-4.1", &body, &place()).unwrap();
    assert_eq!(&outgoing.body[..], br#"{ "n":1.0e0, "model": "gpt-4.1","new_field":{"a":1.50},"messages":[]}"#);
    assert_eq!((outgoing.dialect, outgoing.stream, outgoing.include_usage), (Dialect::OpenAi, false, false));
}

#[test]
fn streams_are_made_to_tell_what_they_used() {
    let stream = |options: Value| json!({"model": "x", "messages": [], "stream": true, "stream_options": options});
    for (slug, request, options, include) in [
        ("openai", stream(Value::Null), json!({"include_usage": true}), false),
        (
            "openai",
            stream(json!({"include_obfuscation": false})),
            json!({"include_obfuscation": false, "include_usage": true}),
            false,
        ),
        ("openai", stream(json!({"include_usage": true})), json!({"include_usage": true}), true),
        // Tells anyway, and knows no such field.
        ("mistral", stream(Value::Null), Value::Null, false),
    ] {
        let outgoing = chat(slug, "m", &request).unwrap();
        assert_eq!(sent(slug, "m", &request)["stream_options"], options, "{slug} {request}");
        assert_eq!((outgoing.stream, outgoing.include_usage), (true, include));
    }
}

#[test]
fn vertex_gets_claude_without_a_model_in_the_body() {
    let body = sent("google-vertex-ai", "anthropic/claude-sonnet-4-5@20250929", &hello());
    assert_eq!((body.get("model"), &body["anthropic_version"]), (None, &"vertex-2023-10-16".into()));
    let stream = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true});
    let outgoing = chat("google-vertex-ai", "gemini-2.5-pro", &stream).unwrap();
    assert!(outgoing.path.ends_with("publishers/google/models/gemini-2.5-pro:streamGenerateContent"));
    assert_eq!((outgoing.query.as_deref(), outgoing.dialect), (Some("alt=sse"), Dialect::Google));
    let body = sent("google-vertex-ai", "meta/llama-4", &hello());
    assert_eq!(body["model"], "meta/llama-4");
}

#[test]
fn whole_answers_in_openais_dialect_pass_unless_they_are_errors() {
    let body = br#"{"id": "1", "choices": [{"x": 1.50}], "error": null}"#;
    assert_eq!(&answer(Dialect::OpenAi, &meta(), body).unwrap()[..], body);
    for (body, kind) in [
        (&br#"{"error":{"message":"busy","code":429}}"#[..], Kind::RateLimited),
        (br#"{"choices":[],"error":{"message":"x"}}"#, Kind::ModelUnavailable),
        (b"{}", Kind::ModelUnavailable),
        (b"<html>", Kind::ModelUnavailable),
    ] {
        assert_eq!(answer(Dialect::OpenAi, &meta(), body).unwrap_err().kind(), kind);
    }
}

fn chunk(choices: &str, usage: &str) -> String {
    format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{choices}],\"usage\":{usage}}}\n\n"
    )
}

#[test]
fn openais_streams_pass_and_the_usage_goes_to_whoever_asked() {
    let stream = [
        ": ping\n\n".to_owned(),
        chunk(r#"{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}"#, "null"),
        chunk(r#"{"index":0,"delta":{"content":"H\u00e9"},"finish_reason":null}"#, "null"),
        chunk(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#, "null"),
        chunk(
            "",
            r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":1}}"#,
        ),
        "data: [DONE]\n\n".to_owned(),
    ];
    let bytes = stream.concat();
    let expected = ["assistant as c m", "text H\u{e9}", "finish stop", "usage 3 (1) + 4 = 7", "DONE"];
    // Behind the chunk that ends every choice some providers just close.
    let optional = stream[4].len() + stream[5].len();
    check_stream(Dialect::OpenAi, bytes.as_bytes(), optional, &expected);
    let mut translator = Translator::new(Dialect::OpenAi, meta(), false);
    let mut out = Encoder::default();
    translator.feed(bytes.as_bytes(), &mut out).unwrap();
    translator.end(&mut out).unwrap();
    assert_eq!(translator.usage().map(|usage| (usage.prompt_tokens, usage.completion_tokens)), Some((3, 4)));
    assert_eq!(outline(&out.take()), ["assistant as c m", "text H\u{e9}", "finish stop", "DONE"]);
}

#[test]
fn errors_inside_openais_streams_are_errors() {
    let begun = chunk(r#"{"index":0,"delta":{"content":"a"},"finish_reason":null}"#, "null");
    for (bad, kind, message) in [
        (r#"{"error":{"message":"slow down","type":"rate_limit_error"}}"#, Kind::RateLimited, "slow down"),
        (r#"{"error":{"code":503,"message":"overloaded"},"choices":[]}"#, Kind::Busy, "overloaded"),
        (r#"{"object":"error","message":"oops"}"#, Kind::ModelUnavailable, "oops"),
    ] {
        let found = stream_error(Dialect::OpenAi, format!("{begun}data: {bad}\n\n").as_bytes());
        assert_eq!((found.kind(), found.message()), (kind, message));
    }
    let cut = stream_error(Dialect::OpenAi, begun.as_bytes());
    assert_eq!(cut.kind(), Kind::ModelUnavailable);
    assert_eq!(stream_error(Dialect::OpenAi, b"").kind(), Kind::ModelUnavailable);
}

#[test]
fn a_failed_stream_stays_failed() {
    let mut translator = Translator::new(Dialect::OpenAi, meta(), false);
    let mut out = Encoder::default();
    assert!(translator.feed(b"data: {\"error\":\"x\"}\n\n", &mut out).is_err());
    let good = chunk(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#, "null");
    assert_eq!(translator.feed(good.as_bytes(), &mut out).unwrap_err().message(), "x");
    assert!(translator.end(&mut out).is_err());
    assert!(out.is_empty());
}

/// Pieces that streams are made of, in an order that none has.
fn rubble() -> impl Strategy<Value = Vec<u8>> {
    let words = [
        "data: ",
        "\n",
        "\n\n",
        "event: x\n",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "\\",
        ":",
        ",",
        "null",
        "1",
        "-1",
        "true",
        "\"type\"",
        "\"index\"",
        "\"delta\"",
        "\"choices\"",
        "\"usage\"",
        "\"candidates\"",
        "\"message\"",
        "\"text\"",
        "data: {\"type\":\"content_block_delta\",\"index\":4294967295,\"delta\":{\"thinking\":\"x\"}}\n\n",
        "data: {\"type\":\"content_block_stop\",\"index\":7}\n\n",
        "data: {\"candidates\":[{\"index\":4294967295,\"finishReason\":\"STOP\"}]}\n\n",
        "data: {\"choices\":[{\"index\":4294967295,\"delta\":{\"tool_calls\":[{}]},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"type\":\"tool-call-end\",\"index\":9}\n\n",
        "data: [DONE]\n\n",
    ];
    let word = prop_oneof![
        8 => prop::sample::select(words.to_vec()).prop_map(|word| word.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(word, 0..40).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn no_bytes_make_a_translator_or_a_meter_panic(bytes in rubble(), cut in 0usize..400) {
        let (head, tail) = bytes.split_at(cut.min(bytes.len()));
        let dialects = [Dialect::OpenAi, Dialect::Anthropic, Dialect::Google, Dialect::Bedrock, Dialect::Cohere];
        for dialect in dialects {
            let mut out = Encoder::default();
            let mut translator = Translator::new(dialect, meta(), true);
            let _ = translator.feed(head, &mut out).and_then(|()| translator.feed(tail, &mut out));
            let _ = translator.end(&mut out);
            let _ = answer(dialect, &meta(), &bytes);
        }
        let mut out = Encoder::default();
        let mut messages = crate::provider::messages::Translator::new("m".to_owned());
        let _ = messages.feed(head, &mut out).and_then(|()| messages.feed(tail, &mut out));
        for kind in ["application/json", "text/event-stream", "application/vnd.amazon.eventstream"] {
            let (mut whole, mut parts) = (Meter::new(Some(kind)), Meter::new(Some(kind)));
            whole.feed(&bytes);
            parts.feed(head);
            parts.feed(tail);
            prop_assert_eq!(whole.finish(), parts.finish(), "{}", kind);
        }
    }
}
