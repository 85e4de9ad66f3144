//! Streams of every dialect, cut at every place.

use proptest::prelude::*;

use super::*;
use crate::fallback::{Class, Failure, classify};
use crate::gateway::watch::Watch;
use crate::provider::frame::encode;

const SSE: &str = "text/event-stream; charset=utf-8";
const AMAZON: &str = "application/vnd.amazon.eventstream";

/// The verdict on a stream that comes in these pieces, and what is handed on if it is released there.
fn read<'a>(dialect: Dialect, kind: &str, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Verdict, Vec<u8>) {
    let mut opening = Opening::new(dialect, Some(kind)).unwrap();
    let mut pieces = pieces.into_iter();
    let mut verdict = pieces.by_ref().map(|piece| opening.feed(&Bytes::copy_from_slice(piece)));
    let verdict = verdict.find(|verdict| *verdict != Verdict::Hold).unwrap_or(Verdict::Hold);
    let mut all = opening.into_chunks().into_iter().flatten().collect::<Vec<u8>>();
    all.extend(pieces.flatten());
    (verdict, all)
}

fn check_bytes(dialect: Dialect, kind: &str, bytes: &[u8], expected: &Verdict) {
    let shown = String::from_utf8_lossy(bytes);
    let check = |pieces: Vec<&[u8]>, how: &str| {
        let (verdict, all) = read(dialect, kind, pieces);
        assert_eq!(verdict, *expected, "{how}: {shown}");
        assert_eq!(all, bytes, "{how}: {shown}");
    };
    check(vec![bytes], "whole");
    check(bytes.chunks(1).collect(), "byte by byte");
    for cut in 0..=bytes.len() {
        let (head, tail) = bytes.split_at(cut);
        check(vec![head, tail], &format!("cut at {cut}"));
    }
}

/// Of server-sent events without their blank lines, or of their data alone where that is JSON.
fn check(dialect: Dialect, events: &[&str], expected: &Verdict) {
    let field = |event: &str| if event.starts_with('{') { "data: " } else { "" };
    let text: String = events.iter().map(|event| format!("{}{event}\n\n", field(event))).collect();
    check_bytes(dialect, SSE, text.as_bytes(), expected);
    check_bytes(dialect, SSE, text.replace('\n', "\r\n").as_bytes(), expected);
}

fn frame(kind: &str, name: &str, payload: &str) -> Vec<u8> {
    let of_name = if kind == "event" { ":event-type" } else { ":exception-type" };
    encode(&[(of_name, name), (":content-type", "application/json"), (":message-type", kind)], payload.as_bytes())
}

fn packed(inner: &str) -> Vec<u8> {
    frame("event", "chunk", &format!("{{\"bytes\":\"{}\",\"p\":\"abcdef\"}}", STANDARD.encode(inner)))
}

const ROLE: &str = r#"{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null,"tool_calls":[]},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x"}"#;
const FILTER: &str = r#"{"choices":[],"prompt_filter_results":[{"prompt_index":0}],"usage":null}"#;
const CREATED: &str = r#"{"type":"response.created","response":{"error":null,"output":[],"tools":[{"name":"f"}]}}"#;
const START: &str = r#"{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","content":[],"model":"c","stop_reason":null,"usage":{"input_tokens":25,"output_tokens":1}}}"#;
const PING: &str = "event: ping\ndata: {\"type\": \"ping\"}";
const BLOCK: &str = r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#;
const COHERE: &str = r#"{"type":"message-start","delta":{"message":{"role":"assistant","content":[],"tool_plan":""}}}"#;

#[test]
fn what_says_nothing_yet_is_held() {
    use Dialect::{Anthropic, Cohere, OpenAi};
    let item = r#"{"type":"response.output_item.added","item":{"id":"m","type":"message","content":[]}}"#;
    let part = r#"{"type":"response.content_part.added","part":{"type":"output_text","text":"","logprobs":[]}}"#;
    let thinking = r#"{"type":"content_block_start","content_block":{"type":"thinking","thinking":""}}"#;
    let delta = r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":""}}"#;
    let content = r#"{"type":"content-start","delta":{"message":{"content":{"type":"text","text":""}}}}"#;
    for (dialect, events) in [
        (OpenAi, &["\u{feff}: OPENROUTER PROCESSING", ":", FILTER, ROLE, "data:", "id: 7\nretry: 3"][..]),
        (OpenAi, &[r#"{"choices":[{"text":"","index":0,"finish_reason":null}]}"#]),
        (OpenAi, &[r#"{"choices":[{"delta":{"role":"assistant"}}],"error":null,"x_groq":{"id":"r"}}"#]),
        (OpenAi, &[CREATED, r#"{"type":"response.in_progress","response":{}}"#, item, part]),
        (OpenAi, &[r#"{"type":"response.queued"}"#, r#"{"type":"keepalive","sequence_number":3}"#]),
        (Anthropic, &[START, PING, thinking, BLOCK]),
        (Anthropic, &[START, delta]),
        (Cohere, &[COHERE, content]),
    ] {
        check(dialect, events, &Verdict::Hold);
    }
    let start = frame("event", "messageStart", r#"{"p":"abcd","role":"assistant"}"#);
    let delta = frame("event", "contentBlockDelta", r#"{"contentBlockIndex":0,"delta":{"text":""},"p":"ab"}"#);
    let converse = [frame("event", "initial-response", "{}"), start, delta].concat();
    check_bytes(Dialect::Bedrock, AMAZON, &converse, &Verdict::Hold);
    let invoke = [packed(START), packed(r#"{"type":"ping"}"#), packed(BLOCK)].concat();
    check_bytes(Dialect::Bedrock, AMAZON, &invoke, &Verdict::Hold);
}

#[test]
fn content_releases_all_of_it() {
    use Dialect::{Anthropic, Cohere, Google, Opaque, OpenAi};
    let chat = |choice: &str| format!("{{\"choices\":[{{\"index\":0,{choice}}}]}}");
    for (dialect, before, event) in [
        (OpenAi, ROLE, &*chat(r#""delta":{"content":"a"}"#)),
        (OpenAi, ROLE, &*chat(r#""delta":{"reasoning_content":"a"}"#)),
        (OpenAi, ROLE, &*chat(r#""delta":{"refusal":"a"}"#)),
        (OpenAi, ROLE, &*chat(r#""delta":{"audio":{"id":"a"}}"#)),
        (OpenAi, ROLE, &*chat(r#""delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f"}}]}"#)),
        (OpenAi, ROLE, &*chat(r#""delta":{},"finish_reason":"stop""#)),
        (OpenAi, FILTER, &*chat(r#""text":"a""#)),
        (OpenAi, ROLE, r#"{"choices":[],"usage":{"prompt_tokens":1}}"#),
        (OpenAi, ROLE, "data: [DONE]"),
        (OpenAi, CREATED, r#"{"type":"response.output_text.delta","delta":"a"}"#),
        (OpenAi, CREATED, r#"{"type":"response.output_item.added","item":{"type":"reasoning"}}"#),
        (OpenAi, CREATED, r#"{"type":"response.output_item.added","item":{"type":"function_call"}}"#),
        (OpenAi, CREATED, r#"{"type":"response.completed","response":{}}"#),
        (Anthropic, BLOCK, r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#),
        (Anthropic, BLOCK, r#"{"type":"content_block_delta","delta":{"thinking":"a"}}"#),
        (Anthropic, START, r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"t"}}"#),
        (Anthropic, START, r#"{"type":"content_block_start","content_block":{"data":"x"}}"#),
        (Anthropic, START, r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"}}"#),
        (Anthropic, PING, r#"{"type":"message_start","message":{"content":[{"text":"a"}]}}"#),
        (Google, ": a", r#"{"candidates":[{"content":{"parts":[{"text":"a"}],"role":"model"}}]}"#),
        (Google, ": a", r#"{"promptFeedback":{"blockReason":"SAFETY"}}"#),
        (Cohere, COHERE, r#"{"type":"content-delta","delta":{"message":{"content":{"text":"a"}}}}"#),
        (Cohere, COHERE, r#"{"type":"tool-plan-delta","delta":{"message":{"tool_plan":"a"}}}"#),
        (Cohere, COHERE, r#"{"type":"message-end","delta":{"finish_reason":"COMPLETE"}}"#),
        (Cohere, COHERE, r#"{"type":"message-end","delta":{"finish_reason":"ERROR_TOXIC"}}"#),
        (Opaque, ": a", "event: output\ndata: some text"),
    ] {
        // What comes behind content is nobody's business here.
        check(dialect, &[before, event, r#"{"error":{"code":503}}"#], &Verdict::Release);
    }
    for event in [
        frame("event", "contentBlockDelta", r#"{"delta":{"text":"a"}}"#),
        frame("event", "contentBlockStart", r#"{"start":{"toolUse":{"toolUseId":"t","name":"f"}}}"#),
        frame("event", "messageStop", r#"{"stopReason":"end_turn"}"#),
        packed(r#"{"generation":"","stop_reason":null}"#),
        packed(r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#),
    ] {
        let start = frame("event", "messageStart", r#"{"role":"assistant"}"#);
        let late = frame("exception", "throttlingException", "{}");
        check_bytes(Dialect::Bedrock, AMAZON, &[start, event, late].concat(), &Verdict::Release);
    }
}

#[test]
fn what_is_not_understood_is_released() {
    for text in [
        "<html>oops</html>",
        "data: {\"choices\": [{\"delta\": \n\n",
        "data: 7\n\n",
        "data: {\"x\":1}\n\n",
        "data: {\"error\":100}\n\n",
        "data: {\"error\":{}}\n\n",
        "data: {\"type\":{}}\n\n",
        "[{\"error\":{\"code\":503}}]",
        "{\"candidates\":[]}\n{\"error\":{}}",
        "{\"choices\":[]}",
        "{}}",
        "\u{0}\u{1}",
    ] {
        check_bytes(Dialect::OpenAi, SSE, text.as_bytes(), &Verdict::Release);
    }
    let mut damaged = frame("exception", "throttlingException", "{}");
    *damaged.last_mut().unwrap() ^= 1;
    check_bytes(Dialect::Bedrock, AMAZON, &damaged, &Verdict::Release);
    check_bytes(Dialect::Bedrock, AMAZON, b"data: {\"error\":{}}\n\n", &Verdict::Release);
    for kind in [None, Some("application/json; charset=UTF-8"), Some("audio/mpeg"), Some("")] {
        assert!(Opening::new(Dialect::Google, kind).is_none(), "{kind:?}");
    }
}

fn fails(dialect: Dialect, events: &[&str], status: u16, class: Class, body: &str) {
    check(dialect, events, &Verdict::Failed { status, body: Bytes::copy_from_slice(body.as_bytes()) });
    assert_eq!(classify(Failure::Answer { status, head: body.as_bytes() }), class, "{status} {body}");
}

#[test]
fn errors_become_answers_with_the_status_that_fits() {
    use Class::{Billing, Caller, ContextTooLong, Credential, Overload, Quota, Refused, Timeout};
    use Dialect::{Anthropic, Cohere, Google, Opaque, OpenAi};
    for (dialect, before, status, class, body) in [
        (OpenAi, ROLE, 500, Overload, r#"{"error":{"message":"m","type":"server_error","code":null}}"#),
        (OpenAi, ROLE, 429, Quota, r#"{"error":{"message":"m","type":"tokens","code":"rate_limit_exceeded"}}"#),
        (OpenAi, ":", 429, Billing, r#"{"error":{"message":"m","code":"insufficient_quota"}}"#),
        (
            OpenAi,
            ":",
            401,
            Credential,
            r#"{"error":{"message":"m","type":"invalid_request","code":"invalid_api_key"}}"#,
        ),
        (OpenAi, ":", 404, Caller, r#"{"error":{"message":"m","type":"invalid_request","code":"model_not_found"}}"#),
        (OpenAi, ":", 400, ContextTooLong, r#"{"error":{"message":"m","code":"context_length_exceeded"}}"#),
        (OpenAi, ":", 400, Refused, r#"{"error":{"message":"m","code":"content_filter"}}"#),
        (OpenAi, ":", 400, Caller, r#"{"error":{"message":"m","type":"invalid_request","code":400}}"#),
        (OpenAi, ROLE, 502, Overload, r#"{"choices":[{"finish_reason":"error"}],"error":{"code":502,"message":"m"}}"#),
        (OpenAi, ":", 429, Quota, r#"{"object":"error","type":"service_tier_capacity_exceeded","code":"3505"}"#),
        (OpenAi, ":", 503, Overload, r#"{"error":{"code":"1305","message":"The service is overloaded"}}"#),
        (OpenAi, ":", 503, Overload, r#"{"error":{"type":"over_capacity","message":"m"}}"#),
        (OpenAi, ":", 429, Quota, r#"{"error":{"code":"429","message":"m"}}"#),
        (OpenAi, CREATED, 500, Overload, r#"{"type":"error","sequence_number":2,"code":"server_error"}"#),
        (OpenAi, CREATED, 503, Overload, r#"{"type":"error","code":null,"message":"We are overloaded"}"#),
        (Anthropic, START, 529, Overload, r#"{"type":"error","error":{"type":"overloaded_error"},"request_id":"r"}"#),
        (Anthropic, PING, 429, Quota, r#"{"type":"error","error":{"type":"rate_limit_error"}}"#),
        (Anthropic, BLOCK, 500, Overload, r#"{"type":"error","error":{"type":"api_error"}}"#),
        (Anthropic, ":", 401, Credential, r#"{"type":"error","error":{"type":"authentication_error"}}"#),
        (Anthropic, ":", 403, Credential, r#"{"type":"error","error":{"type":"permission_error"}}"#),
        (Anthropic, ":", 402, Billing, r#"{"type":"error","error":{"type":"billing_error"}}"#),
        (Anthropic, ":", 413, Caller, r#"{"type":"error","error":{"type":"request_too_large"}}"#),
        (Anthropic, ":", 504, Timeout, r#"{"type":"error","error":{"type":"timeout_error"}}"#),
        (
            Anthropic,
            ":",
            400,
            ContextTooLong,
            r#"{"error":{"type":"invalid_request_error","message":"prompt is too long"}}"#,
        ),
        (Google, ":", 503, Overload, r#"{"error":{"code":503,"message":"m","status":"UNAVAILABLE"}}"#),
        (Google, ":", 429, Quota, r#"{"error":{"message":"m","status":"RESOURCE_EXHAUSTED"}}"#),
        (Cohere, COHERE, 429, Quota, r#"{"message":"too many requests"}"#),
        (Opaque, ":", 503, Overload, r#"{"error":"Model is overloaded","error_type":"overloaded"}"#),
        (Opaque, ":", 500, Overload, r#"{"error":true}"#),
    ] {
        fails(dialect, &[before, body, ROLE], status, class, body);
    }
}

#[test]
fn errors_inside_other_events_stand_as_they_would_alone() {
    let body = r#"{"error":{"code":"rate_limit_exceeded","message":"m"}}"#;
    let failed = format!("{{\"type\":\"response.failed\",\"response\":{body}}}");
    fails(Dialect::OpenAi, &[CREATED, &failed], 429, Class::Quota, body);
    let body = r#"{"type":"response.failed","response":null}"#;
    fails(Dialect::OpenAi, &[body], 500, Class::Overload, body);
    for (delta, status, class, body) in [
        (r#"{"finish_reason":"ERROR","error":"oh"}"#, 500, Class::Overload, r#"{"message":"oh"}"#),
        (r#"{"finish_reason":"ERROR_LIMIT"}"#, 500, Class::Overload, r#"{"message":"ERROR_LIMIT"}"#),
        (r#"{"finish_reason":"TIMEOUT","error":"oh"}"#, 504, Class::Timeout, r#"{"message":"oh"}"#),
    ] {
        let end = format!("{{\"type\":\"message-end\",\"delta\":{delta}}}");
        fails(Dialect::Cohere, &[COHERE, &end], status, class, body);
    }
    for (data, status, class, body) in [
        ("unavailable", 503, Class::Overload, r#"{"error":{"message":"unavailable"}}"#),
        (r#"{"code":"InvalidApiKey"}"#, 401, Class::Credential, r#"{"code":"InvalidApiKey"}"#),
        ("{\"error\":\ndata: {\"code\":429}}", 429, Class::Quota, "{\"error\":\n{\"code\":429}}"),
    ] {
        fails(Dialect::Opaque, &[PING, &format!("event: error\ndata: {data}")], status, class, body);
    }
    // A sentence is an error at Cohere only.
    check(Dialect::Opaque, &[r#"{"message":"hello"}"#], &Verdict::Release);
}

#[test]
fn bedrocks_exceptions_are_known_by_their_names() {
    let check = |before: &[u8], last: Vec<u8>, status: u16, class: Class, body: &str| {
        let expected = Verdict::Failed { status, body: Bytes::copy_from_slice(body.as_bytes()) };
        check_bytes(Dialect::Bedrock, AMAZON, &[before, &last].concat(), &expected);
        assert_eq!(classify(Failure::Answer { status, head: body.as_bytes() }), class, "{status} {body}");
    };
    let start = frame("event", "messageStart", r#"{"role":"assistant"}"#);
    let body = r#"{"message":"m"}"#;
    for (name, status, class) in [
        ("throttlingException", 429, Class::Quota),
        ("serviceUnavailableException", 503, Class::Overload),
        ("internalServerException", 500, Class::Overload),
        ("modelStreamErrorException", 500, Class::Overload),
        ("modelTimeoutException", 504, Class::Timeout),
        ("validationException", 400, Class::Caller),
        ("accessDeniedException", 403, Class::Credential),
    ] {
        check(&start, frame("exception", name, body), status, class, body);
    }
    let name = "throttlingException";
    check(b"", frame("exception", name, ""), 429, Class::Quota, &format!("{{\"message\":\"{name}\"}}"));
    let headers = [(":message-type", "error"), (":error-code", "InternalError"), (":error-message", "oops")];
    check(&start, encode(&headers, b""), 500, Class::Overload, r#"{"message":"oops"}"#);
    let inner = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    check(&packed(r#"{"type":"ping"}"#), packed(inner), 529, Class::Overload, inner);
}

#[test]
fn an_error_without_a_frame_is_one_too() {
    let body =
        "{\n  \"error\": {\n    \"code\": 503,\n    \"message\": \"}\",\n    \"status\": \"UNAVAILABLE\"\n  }\n}";
    let expected = Verdict::Failed { status: 503, body: Bytes::from(body) };
    for text in [body.to_owned(), format!("\r\n{body}\n"), format!(": hello\n\n{body}")] {
        check_bytes(Dialect::Google, SSE, text.as_bytes(), &expected);
    }
    let endless = format!("{{\"a\":\"{}", "x".repeat(MAX_DOCUMENT));
    assert_eq!(read(Dialect::Google, SSE, [endless.as_bytes()]).0, Verdict::Release);
}

#[test]
fn a_failure_in_the_middle_is_seen_however_it_is_cut_and_talk_of_errors_is_none() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"an error occurred: {\\\"error\\\":1}\"}}]}\n\n";
    let said =
        "event: response.in_progress\ndata: {\"type\":\"response.in_progress\",\"response\":{\"error\":null}}\n\n";
    let check = |kind: &str, stream: &[u8], has_failed: bool| {
        for size in [1, 2, 3, 7, 50, stream.len()] {
            let mut watch = Watch::new(Dialect::OpenAi, kind).unwrap();
            stream.chunks(size).for_each(|chunk| watch.feed(chunk));
            assert_eq!(watch.has_failed(), has_failed, "{size}: {:?}", String::from_utf8_lossy(stream));
        }
    };
    let sse = "text/event-stream; charset=utf-8";
    for failure in [
        "data: {\"error\":{\"message\":\"m\",\"type\":\"server_error\"}}\n\n",
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"m\"}}\r\n\r\n",
        "data: {\"type\":\"response.failed\",\"response\":{\"status\":\"failed\",\"error\":{\"code\":\"c\",\"message\":\"m\"}}}\n\n",
        "data: {\"error\":{\"message\":\"the blank line never comes\"}}",
    ] {
        check(sse, format!("{text}{said}{text}{failure}").as_bytes(), true);
        check(sse, format!("{text}{said}{text}").as_bytes(), false);
    }
    let talk = frame("event", "contentBlockDelta", "{\"delta\":{\"text\":\":exception-type\"}}");
    let failure = frame("exception", "throttlingException", "{\"message\":\"m\"}");
    let aws = "application/vnd.amazon.eventstream";
    check(aws, &[talk.clone(), talk.clone()].concat(), false);
    check(aws, &[talk.clone(), failure, talk].concat(), true);
    assert!(Watch::new(Dialect::OpenAi, "application/json").is_none());
}

#[test]
fn the_end_completes_an_event_whose_blank_line_never_came() {
    let end = |kind: &str, bytes: &[u8]| {
        let mut opening = Opening::new(Dialect::OpenAi, Some(kind)).unwrap();
        assert_eq!(opening.feed(&Bytes::copy_from_slice(bytes)), Verdict::Hold);
        let verdict = opening.end();
        assert_eq!(opening.into_chunks(), [bytes]);
        verdict
    };
    let failed = Verdict::Failed { status: 503, body: Bytes::from_static(b"{\"error\":{\"code\":503}}") };
    for tail in ["", "\n", "\r", "\r\n"] {
        let text = format!("data: {{\"error\":{{\"code\":503}}}}{tail}");
        assert_eq!(end(SSE, text.as_bytes()), failed, "{text:?}");
    }
    assert_eq!(end(SSE, b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}"), Verdict::Release);
    assert_eq!(end(SSE, format!("{PING}\n\n").as_bytes()), Verdict::Hold);
    assert_eq!(end(SSE, b"{\"error\":"), Verdict::Release);
    assert_eq!(end(AMAZON, &frame("event", "messageStart", "{}")[..20]), Verdict::Hold);
}

#[test]
fn no_more_is_held_than_was_agreed() {
    let pings = |count: usize| format!("{PING}\n\n").repeat(count);
    assert_eq!(read(Dialect::Anthropic, SSE, [pings(MAX_EVENTS).as_bytes()]).0, Verdict::Hold);
    let error = format!("{}data: {{\"error\":\"oh\"}}\n\n", pings(MAX_EVENTS + 1));
    check_bytes(Dialect::Anthropic, SSE, error.as_bytes(), &Verdict::Release);
    let comments = vec![b'\n'; MAX_BYTES + 1];
    assert_eq!(read(Dialect::OpenAi, SSE, [&comments[1..]]).0, Verdict::Hold);
    assert_eq!(read(Dialect::OpenAi, SSE, comments.chunks(4000)).0, Verdict::Release);
    let large = format!("data: {}", "x".repeat(MAX_BYTES));
    assert_eq!(read(Dialect::OpenAi, SSE, [large.as_bytes()]).0, Verdict::Release);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_or_change_on_the_way(
        start in prop::sample::select(vec!["", "data: {\"", "data: {\"error\":", "event: error\ndata: ", "{", ": "]),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        amazon in any::<bool>(),
        size in 1usize..40,
    ) {
        let bytes = [start.as_bytes(), &bytes].concat();
        let kind = if amazon { AMAZON } else { SSE };
        let (_, all) = read(Dialect::Cohere, kind, bytes.chunks(size));
        prop_assert_eq!(all, bytes);
    }
}
