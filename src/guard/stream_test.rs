use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::guard::frame::tests::amazon_frame;
use crate::guard::tests::rule;
use crate::guard::{HOLD, On, Rule, Schemas};

const SSE: &str = "text/event-stream";

fn guard(rules: &[Rule]) -> Guard {
    Guard::new(rules, Schemas::default()).unwrap()
}

fn block(pattern: &str) -> Guard {
    guard(&[rule("r", pattern, On::Response, Action::Block)])
}

/// Feeds chunks to the end: what left, and what was found.
fn run<'c>(
    guard: &Guard,
    content_type: &str,
    hold: usize,
    chunks: impl IntoIterator<Item = &'c [u8]>,
) -> (Vec<u8>, Result<(), Finding>, Vec<String>) {
    let mut stream = guard.stream(content_type, hold);
    let mut out = Vec::new();
    let mut outcome = Ok(());
    for chunk in chunks {
        outcome = stream.feed(Bytes::copy_from_slice(chunk), &mut out);
        if outcome.is_err() {
            break;
        }
    }
    let outcome = outcome.and_then(|()| stream.finish(&mut out));
    let flags = stream.flags().iter().map(|flag| flag.rule.to_string()).collect();
    (out.concat(), outcome, flags)
}

fn event(data: &serde_json::Value) -> Vec<u8> {
    format!("data: {data}\n\n").into_bytes()
}

fn chat(text: &str) -> Vec<u8> {
    event(&json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}))
}

/// Events whose texts are "The ", "sec", "ret is" in a provider's form, and one more that ends the answer.
fn dialects() -> Vec<(&'static str, &'static str, Vec<Vec<u8>>)> {
    let each = |form: &dyn Fn(&str) -> Vec<u8>, last: &[u8]| {
        let mut events: Vec<Vec<u8>> = ["The ", "sec", "ret is"].iter().map(|text| form(text)).collect();
        events.push(last.to_vec());
        events
    };
    let done = b"data: [DONE]\n\n";
    let sse = |form: &'static dyn Fn(&str) -> serde_json::Value, last: serde_json::Value| {
        each(&|text| event(&form(text)), &event(&last))
    };
    vec![
        ("openai", SSE, each(&chat, done)),
        ("native", SSE, each(&|text| event(&json!({"response": text, "p": "abcdef"})), done)),
        ("completions", SSE, each(&|text| event(&json!({"choices": [{"text": text}]})), done)),
        ("reasoning", SSE, each(&|text| event(&json!({"choices": [{"delta": {"reasoning_content": text}}]})), done)),
        (
            "calls",
            SSE,
            each(
                &|text| {
                    event(
                        &json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}}]}),
                    )
                },
                done,
            ),
        ),
        (
            "anthropic",
            SSE,
            sse(
                &|text| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}),
                json!({"type": "message_stop"}),
            ),
        ),
        (
            "google",
            SSE,
            sse(
                &|text| json!({"candidates": [{"content": {"parts": [{"text": text}]}}]}),
                json!({"candidates": [{"finishReason": "STOP"}]}),
            ),
        ),
        (
            "cohere v2",
            SSE,
            sse(
                &|text| json!({"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}}),
                json!({"type": "message-end"}),
            ),
        ),
        (
            "cohere v1",
            "application/stream+json",
            ["The ", "sec", "ret is"]
                .iter()
                .map(|text| format!("{}\n", json!({"event_type": "text-generation", "text": text})).into_bytes())
                .chain([b"{\"event_type\":\"stream-end\"}\n".to_vec()])
                .collect(),
        ),
        (
            "responses",
            SSE,
            sse(
                &|text| json!({"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": text}),
                json!({"type": "response.completed"}),
            ),
        ),
        (
            "bedrock",
            "application/vnd.amazon.eventstream",
            each(
                &|text| amazon_frame(&json!({"contentBlockIndex": 0, "delta": {"text": text}}).to_string()),
                &amazon_frame("{\"stopReason\":\"end_turn\"}"),
            ),
        ),
        ("unknown", SSE, each(&|text| event(&json!({"generation": text, "n": 1})), done)),
        (
            "plain",
            SSE,
            each(&|text| format!("event: output\ndata: {text}\n\n").into_bytes(), b"event: done\ndata: {}\n\n"),
        ),
        (
            "two lines",
            SSE,
            each(
                &|text| {
                    format!("event: x\r\nid: 7\r\ndata: {{\"response\":\r\ndata: {}}}\r\n\r\n", json!(text))
                        .into_bytes()
                },
                done,
            ),
        ),
    ]
}

#[test]
fn a_match_across_events_is_cut_before_the_event_it_begins_in_for_every_provider() {
    for (name, content_type, events) in dialects() {
        for size in [1, 7, 1 << 20] {
            let bytes = events.concat();
            let (out, outcome, _) = run(&block("secret"), content_type, HOLD, bytes.chunks(size));
            assert_eq!(outcome.map_err(|found| found.what), Err("the stream".to_owned()), "{name} by {size}");
            assert!(events[0].starts_with(&out), "{name} by {size}: {}", String::from_utf8_lossy(&out));
            let (out, outcome, _) = run(&block("public"), content_type, HOLD, bytes.chunks(size));
            assert_eq!((out, outcome), (bytes, Ok(())), "{name} by {size}");
        }
    }
}

#[test]
fn an_event_leaves_as_soon_as_no_match_can_begin_in_it() {
    // "secret" has 6 bytes: an event stays until 6 more have come.
    let guard = block("secret");
    let mut stream = guard.stream(SSE, HOLD);
    let mut left = Vec::new();
    for text in ["abc", "de", "fgh", "i", "jklmnopq"] {
        let mut out = Vec::new();
        stream.feed(chat(text).into(), &mut out).unwrap();
        left.push(String::from_utf8(out.concat()).unwrap().matches("data:").count());
    }
    assert_eq!(left, [0, 0, 0, 1, 3]);
    let mut out = Vec::new();
    stream.feed(b": ping\n\n".to_vec().into(), &mut out).unwrap();
    assert!(out.is_empty());
    stream
        .feed(event(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})).into(), &mut out)
        .unwrap();
    assert_eq!(out.concat().iter().filter(|byte| **byte == b'{').count(), 3 + 3);
}

#[test]
fn nothing_is_held_without_text_and_nothing_at_all_for_flags() {
    let check = |guard: &Guard, chunk: &[u8], leaves: bool| {
        let mut out = Vec::new();
        guard.stream(SSE, HOLD).feed(Bytes::copy_from_slice(chunk), &mut out).unwrap();
        assert_eq!(out.concat() == chunk, leaves, "{}", String::from_utf8_lossy(chunk));
    };
    let flag = guard(&[rule("r", "secret", On::Response, Action::Flag)]);
    check(&block("secret"), b": ping\n\n", true);
    check(&block("secret"), b"data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n", true);
    check(&block("secret"), &chat("x"), false);
    check(&flag, &chat("x"), true);
    check(&flag, &chat("secret"), true);
    check(&flag, b"data: {\"resp", false);
}

#[test]
fn a_guard_without_rules_for_answers_is_idle() {
    let asks_only = guard(&[rule("r", "secret", On::Request, Action::Block)]);
    let mut stream = asks_only.stream(SSE, HOLD);
    assert!(stream.is_idle());
    let chunk = Bytes::from_static(b"data: half an ev");
    let mut out = Vec::new();
    stream.feed(chunk.clone(), &mut out).unwrap();
    assert_eq!(out[0].as_ptr(), chunk.as_ptr());
    assert!(block("secret").stream("audio/mpeg", HOLD).is_idle());
    assert!(!block("secret").stream(SSE, HOLD).is_idle());
}

#[test]
fn flags_are_noted_once_across_borders_and_the_stream_goes_on() {
    let rules = [rule("f", r"\bsecret\b", On::Both, Action::Flag), rule("g", "never", On::Both, Action::Flag)];
    let bytes = [chat("a sec"), chat("ret"), chat("."), chat("secret secret")].concat();
    for size in [1, 16, 4096] {
        let (out, outcome, flags) = run(&guard(&rules), SSE, HOLD, bytes.chunks(size));
        assert_eq!((out, outcome, flags), (bytes.clone(), Ok(()), vec!["f".to_owned()]));
    }
}

#[test]
fn the_next_character_decides_at_a_border() {
    let check = |pattern: &str, texts: &[&str], blocks: bool| {
        let bytes: Vec<u8> = texts.iter().flat_map(|text| chat(text)).chain(b"data: [DONE]\n\n".to_vec()).collect();
        let (out, outcome, _) = run(&block(pattern), SSE, HOLD, [&bytes[..]]);
        assert_eq!(outcome.is_err(), blocks, "{pattern} in {texts:?}");
        assert!(blocks || out == bytes);
    };
    check(r"\bsecret\b", &["a secret", "ary"], false);
    check(r"\bsecret\b", &["a secret", " x"], true);
    check(r"\bsecret\b", &["a secret"], true);
    check(r"\bsecret\b", &["a", "secret x"], false);
    check(r"^secret", &["secret"], true);
    check(r"^secret", &["a ", "secret"], false);
    check(r"^secret", &[&"a".repeat(300), "secret"], false);
    check(r"secret$", &["secret", " more"], false);
    check(r"secret$", &["more ", "secret"], true);
    check(r"(?m)^secret$", &["more\n", "secret", "\nx"], true);
}

#[test]
fn choices_and_blocks_are_texts_of_their_own() {
    let choice = |index: u64, text: &str| event(&json!({"choices": [{"index": index, "delta": {"content": text}}]}));
    let check = |events: Vec<Vec<u8>>, blocks: bool| {
        let bytes = events.concat();
        let (out, outcome, _) = run(&block("secret"), SSE, HOLD, [&bytes[..]]);
        assert_eq!(outcome.is_err(), blocks, "{}", String::from_utf8_lossy(&bytes));
        assert!(blocks || out == bytes);
    };
    check(vec![choice(0, "sec"), choice(1, "ret")], false);
    check(vec![choice(0, "sec"), choice(1, "sec"), choice(0, "ure"), choice(1, "ret")], true);
    check(
        vec![
            choice(0, "sec"),
            event(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})),
            choice(0, "ret"),
        ],
        false,
    );
    let escaped = b"data: {\"response\":\"\\u0073ec\"}\n\ndata: {\"response\":\"r\\u0065t\"}\n\n".to_vec();
    check(vec![escaped], true);
    let broken = b"data: {\"response\":\"\\ud83d \\u0073ecret\"}\n\n".to_vec();
    check(vec![broken], true);
    let repeated = event(&json!({"type": "response.output_text.done", "output_index": 0, "text": "secret"}));
    check(vec![repeated], true);
    check(vec![b"data: {\"response\":\"secret\"}".to_vec()], true);
}

#[test]
fn a_choice_that_was_given_up_does_not_hold_the_others_for_ever() {
    let choice = |index: u64, text: &str| event(&json!({"choices": [{"index": index, "delta": {"content": text}}]}));
    let guard = block("secret");
    let mut stream = guard.stream(SSE, HOLD);
    let mut out = Vec::new();
    stream.feed(choice(0, "sec").into(), &mut out).unwrap();
    let mut fed = 0;
    while out.is_empty() {
        assert!(fed < 2 * MAX_BEHIND, "nothing left after {fed} bytes");
        let next = choice(1, &"x".repeat(1000));
        fed += next.len() as u64;
        stream.feed(next.into(), &mut out).unwrap();
    }
    assert!(fed > MAX_BEHIND / 2);
}

#[test]
fn a_pattern_without_bound_is_seen_as_far_as_text_is_held() {
    let check = |between: usize, blocks: bool| {
        let bytes = [chat("BEGIN"), chat(&"x".repeat(between)), chat("END"), chat("y")].concat();
        let (_, outcome, _) = run(&block("BEGIN.*END"), SSE, 100, [&bytes[..]]);
        assert_eq!(outcome.is_err(), blocks, "{between}");
    };
    check(90, true);
    check(200, false);
}

#[test]
fn an_answer_that_is_no_stream_of_events_is_held_and_looked_at_whole() {
    let body = br#"{"choices":[{"message":{"content":"a secret"}}]}"#;
    let chunks = || body.chunks(5);
    let (out, outcome, _) = run(&block("secret"), "application/json", HOLD, chunks());
    assert_eq!((out.len(), outcome.is_err()), (0, true));
    let (out, outcome, _) = run(&block("public"), "application/json", HOLD, chunks());
    assert_eq!((&out[..], outcome), (&body[..], Ok(())));
    let flag = guard(&[rule("f", "secret", On::Both, Action::Flag)]);
    let (out, _, flags) = run(&flag, "application/json", HOLD, chunks());
    assert_eq!((&out[..], flags), (&body[..], vec!["f".to_owned()]));
}

#[test]
fn what_cannot_be_read_is_cut_by_a_blocking_rule_and_let_go_by_a_flag() {
    let garbage = [0xff; 64];
    let kind = "application/vnd.amazon.eventstream";
    let (out, outcome, _) = run(&block("secret"), kind, HOLD, [&garbage[..]]);
    assert_eq!((out.len(), outcome.is_err()), (0, true));
    let flag = guard(&[rule("f", "secret", On::Both, Action::Flag)]);
    let (out, outcome, _) = run(&flag, kind, HOLD, [&garbage[..], &garbage[..]]);
    assert_eq!((out.len(), outcome), (128, Ok(())));
}

#[test]
fn an_answer_of_endless_parts_is_cut_by_a_blocking_rule_and_let_go_by_a_flag() {
    let part = |index: usize| event(&json!({"choices": [{"index": index, "delta": {"content": "x"}}]}));
    let bytes: Vec<u8> = (0..MAX_PARTS + 1).flat_map(part).collect();
    let (_, outcome, _) = run(&block("secret"), SSE, HOLD, [&bytes[..]]);
    assert!(outcome.is_err());
    let flag = guard(&[rule("f", "secret", On::Both, Action::Flag)]);
    let (out, outcome, _) = run(&flag, SSE, HOLD, [&bytes[..]]);
    assert_eq!((out, outcome), (bytes, Ok(())));
}

#[test]
fn a_cut_stream_stays_cut() {
    let guard = block("secret");
    let mut stream = guard.stream(SSE, HOLD);
    let mut out = Vec::new();
    let first = stream.feed(chat("secret").into(), &mut out).unwrap_err();
    assert_eq!(stream.feed(chat("fine").into(), &mut out), Err(first.clone()));
    assert_eq!(stream.finish(&mut out), Err(first));
    assert!(out.is_empty());
}

#[test]
fn a_structured_answer_is_validated_before_its_last_event_leaves() {
    let schema = json!({"type": "object", "required": ["city"]});
    let guard = Guard::new(&[], Schemas { request: None, response: Some(schema) }).unwrap();
    let finish = event(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}));
    let done = b"data: [DONE]\n\n".to_vec();
    let check = |texts: &[&str], ends: &[&Vec<u8>], left: Option<usize>| {
        let mut events: Vec<Vec<u8>> = texts.iter().map(|text| chat(text)).collect();
        events.extend(ends.iter().map(|end| end.to_vec()));
        let bytes = events.concat();
        for size in [1, 50, 1 << 20] {
            let (out, outcome, _) = run(&guard, SSE, HOLD, bytes.chunks(size));
            assert_eq!(outcome.is_err(), left.is_some(), "{texts:?}");
            assert_eq!(out, events[..left.unwrap_or(events.len())].concat(), "{texts:?} by {size}");
        }
    };
    check(&["{\"ci", "ty\":1}"], &[&finish, &done], None);
    check(&["The city ", "is Oslo"], &[&finish, &done], None);
    check(&["{\"to", "wn\":1}"], &[&finish, &done], Some(1));
    check(&["{\"to", "wn\":1}"], &[&done], Some(1));
    check(&["{\"to", "wn\":1}"], &[], Some(1));
    check(&["{\"city\":", "1"], &[&finish], Some(1));
}

/// The text of the events that left.
fn text_of(out: &[u8]) -> String {
    let out = std::str::from_utf8(out).unwrap();
    let events = out.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    let texts = events.filter_map(|data| {
        let value: serde_json::Value = serde_json::from_str(data).ok()?;
        Some(value["choices"][0]["delta"]["content"].as_str()?.to_owned())
    });
    texts.collect()
}

proptest! {
    #[test]
    fn however_it_is_cut_no_byte_of_a_match_leaves_and_all_else_leaves_as_it_came(
        texts in prop::collection::vec("[abcé ]{0,6}", 0..30),
        pattern in prop::sample::select(vec!["abc", "a[abé]{0,6}c", r"\bab", r"bc\b", "é{3}", r"^a{2,4}\b", "(?i)ABCÉ", "c$", "ca?(?:b|é )c"]),
        cuts in prop::collection::vec(1usize..90, 1..20),
        finished in any::<bool>(),
    ) {
        let mut bytes: Vec<u8> = texts.iter().flat_map(|text| chat(text)).collect();
        if finished {
            bytes.extend(b"data: [DONE]\n\n");
        }
        let mut chunks = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (chunk, tail) = rest.split_at((*cut).min(rest.len()));
            chunks.push(chunk);
            rest = tail;
        }
        let (out, outcome, _) = run(&block(pattern), SSE, HOLD, chunks);
        let whole = texts.concat();
        match regex::Regex::new(pattern).unwrap().find(&whole) {
            None => {
                prop_assert_eq!(outcome, Ok(()));
                prop_assert_eq!(out, bytes);
            }
            Some(found) => {
                prop_assert!(outcome.is_err());
                prop_assert!(bytes.starts_with(&out));
                let left = text_of(&out);
                prop_assert!(left.len() <= found.start(), "{left:?} of {whole:?} left, the match begins at {}", found.start());
            }
        }
    }

    #[test]
    fn any_bytes_at_all_leave_as_they_came_when_nothing_matches(
        bytes in prop::collection::vec(prop::sample::select(b"data: {}\"\\[]\r\n:,x\xc3\xa9\xff0".to_vec()), 0..300),
        size in 1usize..40,
    ) {
        for kind in [SSE, "application/x-ndjson", "application/json", "text/plain"] {
            let (out, outcome, _) = run(&block("zzz"), kind, HOLD, bytes.chunks(size));
            prop_assert_eq!(outcome, Ok(()));
            prop_assert_eq!(&out, &bytes);
        }
    }
}
