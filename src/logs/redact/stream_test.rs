//! Secrets cut into the pieces of a stream, or by the end of what is kept.

use serde_json::{Value, json};

use super::tests::{clean, redactor, secrets, shows};
use super::*;

/// A text cut into events of a stream as this provider sends them.
type Shape = (&'static str, fn(&str, usize) -> String, fn(&Value) -> Option<String>);

fn shapes() -> Vec<Shape> {
    fn at(value: &Value, path: &str) -> Option<String> {
        value.pointer(path)?.as_str().map(str::to_owned)
    }
    fn event(value: &Value) -> String {
        format!("data: {value}\n\n")
    }
    vec![
        (
            "OpenAI",
            |piece, _| {
                event(
                    &json!({ "id": "chatcmpl-1", "created": 1_700_000_000, "choices": [{ "index": 0, "delta": { "content": piece }, "finish_reason": null }] }),
                )
            },
            |value| at(value, "/choices/0/delta/content"),
        ),
        (
            "OpenAI, the number last",
            |piece, _| event(&json!({ "choices": [{ "delta": { "content": piece }, "index": 0 }] })),
            |value| at(value, "/choices/0/delta/content"),
        ),
        (
            "OpenAI's tools",
            |piece, _| {
                event(
                    &json!({ "choices": [{ "index": 0, "delta": { "tool_calls": [{ "index": 1, "function": { "arguments": piece } }] } }] }),
                )
            },
            |value| at(value, "/choices/0/delta/tool_calls/0/function/arguments"),
        ),
        (
            "OpenAI's responses",
            |piece, at| {
                format!(
                    "event: response.output_text.delta\n{}",
                    event(
                        &json!({ "type": "response.output_text.delta", "sequence_number": at, "output_index": 0, "content_index": 0, "delta": piece })
                    )
                )
            },
            |value| at(value, "/delta"),
        ),
        (
            "Anthropic",
            |piece, _| {
                format!(
                    "event: content_block_delta\n{}",
                    event(
                        &json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": piece } })
                    )
                )
            },
            |value| at(value, "/delta/text"),
        ),
        (
            "Google",
            |piece, _| {
                event(
                    &json!({ "candidates": [{ "content": { "parts": [{ "text": piece }], "role": "model" }, "index": 0 }] }),
                )
            },
            |value| at(value, "/candidates/0/content/parts/0/text"),
        ),
        ("native", |piece, _| event(&json!({ "response": piece, "p": "abcdef" })), |value| at(value, "/response")),
        (
            "lines",
            |piece, _| format!("{}\n", json!({ "message": { "role": "assistant", "content": piece }, "done": false })),
            |value| at(value, "/message/content"),
        ),
    ]
}

fn pieces(text: &str, length: usize) -> Vec<String> {
    text.chars().collect::<Vec<_>>().chunks(length).map(|piece| piece.iter().collect()).collect()
}

/// What a reader of a stream puts together.
fn read(stream: &str, text_of: fn(&Value) -> Option<String>) -> String {
    let documents =
        stream.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data:").unwrap_or(line)).ok());
    documents.filter_map(|value: Value| text_of(&value)).collect()
}

#[test]
fn a_secret_cut_over_the_events_of_a_stream_is_taken_out_of_each() {
    let secrets: Vec<String> = secrets().into_iter().step_by(3).collect();
    for (name, event, text_of) in shapes() {
        for secret in &secrets {
            for length in [1, 3, 7] {
                let pieces = pieces(&format!("so it is {secret} and no other"), length);
                let stream: String = pieces.iter().enumerate().map(|(at, piece)| event(piece, at)).collect();
                let left = clean(&format!("{stream}data: [DONE]\n\n"));
                let text = read(&left, text_of);
                assert!(!shows(&text, secret), "{name}: {text}");
                assert!(text.starts_with("so it is [REDACTED") && text.ends_with(" and no other"), "{name}: {text}");
                assert_eq!(
                    left.lines().count(),
                    format!("{stream}data: [DONE]\n\n").lines().count(),
                    "{name}: every event is still there"
                );
                for line in left.lines().filter(|line| line.contains('{')) {
                    let data = line.strip_prefix("data: ").unwrap_or(line);
                    assert!(serde_json::from_str::<Value>(data).is_ok(), "{name}: {line}");
                }
            }
        }
    }
}

#[test]
fn texts_of_other_choices_in_between_do_not_hide_a_secret() {
    let event = |index: usize, piece: &str| {
        format!("data: {}\n\n", json!({ "choices": [{ "index": index, "delta": { "content": piece } }] }))
    };
    let (one, other) = (pieces("write to ann@example.com now", 4), pieces("call +1 415 555 2671 then", 4));
    let stream: String = one.iter().zip(&other).map(|(one, other)| event(0, one) + &event(1, other)).collect();
    let left = clean(&stream);
    let text = |wanted: u64| -> String {
        let values = left.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
        let pieces = values.filter(|value| value["choices"][0]["index"] == wanted);
        pieces.map(|value| value["choices"][0]["delta"]["content"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(text(0), "write to [REDACTED:email] now");
    assert!(text(1).starts_with("call [REDACTED:phone]"), "{}", text(1));
    // Arguments that are a document themselves, with an escape cut in two.
    let arguments = pieces("{\"to\":\"a\\nann@example.com\",\"k\":\"\\u0073k-abcdefghijklmnop1234\"}", 3);
    let stream: String = arguments
        .iter()
        .map(|piece| format!("data: {}\n\n", json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "input_json_delta", "partial_json": piece } })))
        .collect();
    let left = clean(&stream);
    let text: String = read(&left, |value| value["delta"]["partial_json"].as_str().map(str::to_owned));
    assert!(!text.contains("ann@") && !text.contains("example.com") && !text.contains("abcdefgh"), "{text}");
    // Google's stream that is one array.
    let array = format!(
        "[{}]",
        pieces("it is ann@example.com here", 5)
            .iter()
            .map(|piece| json!({ "candidates": [{ "content": { "parts": [{ "text": piece }] } }] }).to_string())
            .collect::<Vec<_>>()
            .join(",\r\n")
    );
    let left: Value = serde_json::from_str(&clean(&array)).unwrap();
    let text: String = left
        .as_array()
        .unwrap()
        .iter()
        .map(|value| value["candidates"][0]["content"]["parts"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, "it is [REDACTED:email] here");
}

#[test]
fn of_a_body_that_was_cut_no_first_half_of_a_secret_is_left() {
    let redactor = redactor();
    for secret in secrets() {
        let bodies = [
            format!("the text is {secret}"),
            json!({ "messages": [{ "content": format!("the text is {secret}") }] }).to_string(),
            shapes()[0].1(&format!("the text is {secret}"), 0),
        ];
        for body in bodies {
            let begin = body.find("the text is ").unwrap() + "the text is ".len();
            for cut in begin..(begin + secret.len()).min(body.len()) {
                let kept = Body { kept: Bytes::copy_from_slice(&body.as_bytes()[..cut]), size: body.len() as u64 };
                let left = redactor.body(&kept, "").unwrap_or(kept.kept);
                let left = String::from_utf8(left.to_vec()).unwrap();
                let tail = left.rsplit("the text is ").next().unwrap();
                // A blank within a number lets what stands before be seen as what it is: too short for one.
                let shown: String =
                    tail.replace("[REDACTED:cut]", "").chars().filter(|letter| letter.is_alphanumeric()).collect();
                let is_hidden = tail.contains("[REDACTED") || shown.is_empty();
                assert!(
                    is_hidden && (shown.is_empty() || tail.starts_with("[REDACTED")),
                    "{body} cut at {cut} left {left}"
                );
            }
        }
    }
    // Pieces of a stream that ends before the secret does.
    for (name, event, text_of) in shapes() {
        let stream: String =
            pieces("the key is sk-proj-abc", 3).iter().enumerate().map(|(at, piece)| event(piece, at)).collect();
        let kept = Body { size: stream.len() as u64 + 100, kept: stream.into() };
        let left = redactor.body(&kept, "text/event-stream").unwrap();
        assert_eq!(read(std::str::from_utf8(&left).unwrap(), text_of), "the key is [REDACTED:cut]", "{name}");
    }
}
