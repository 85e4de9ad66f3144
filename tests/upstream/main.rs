//! The fake upstream does what it says: other tests believe it.

#![allow(clippy::unwrap_used)]

#[path = "mod.rs"]
mod upstream;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use neurond::net::sse::{Decoder, SseEvent};
use serde_json::{Value, json};
use upstream::behaviour::Behaviour;
use upstream::{Options, Upstream, frames};

const CHAT: &str = "/openai/v1/chat/completions";

async fn post(upstream: &Upstream, path: &str, fake: &str, body: &Value) -> reqwest::Response {
    let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
    let url = format!("{}{path}", upstream.url());
    client.post(url).header("x-fake", fake).json(body).send().await.unwrap()
}

fn chat(text: &str) -> Value {
    json!({"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]})
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn events(bytes: &[u8]) -> Vec<SseEvent> {
    let mut events = Vec::new();
    Decoder::new(1 << 20).feed(bytes, &mut events).unwrap();
    events
}

/// The JSON of a stream's events.
fn data(bytes: &[u8]) -> Vec<Value> {
    events(bytes).iter().filter_map(|event| serde_json::from_str(&event.data).ok()).collect()
}

/// Frames of an event stream, both sums checked: headers and payload.
fn unframe(mut bytes: &[u8]) -> Vec<(Vec<(String, String)>, Value)> {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().unwrap());
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let (total, headers) = (number(bytes) as usize, number(&bytes[4..]) as usize);
        assert_eq!(number(&bytes[8..]), frames::crc32(&bytes[..8]));
        assert_eq!(number(&bytes[total - 4..]), frames::crc32(&bytes[..total - 4]));
        let payload = serde_json::from_slice(&bytes[12 + headers..total - 4]).unwrap();
        let mut rest = &bytes[12..12 + headers];
        let mut named = Vec::new();
        while !rest.is_empty() {
            let name = usize::from(rest[0]);
            assert_eq!(rest[1 + name], 7);
            let value = usize::from(rest[2 + name]) << 8 | usize::from(rest[3 + name]);
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            named.push((text(&rest[1..=name]), text(&rest[4 + name..4 + name + value])));
            rest = &rest[4 + name + value..];
        }
        frames.push((named, payload));
        bytes = &bytes[total..];
    }
    frames
}

/// Sends one request by hand and reads until the connection ends: what came, and how it ended.
fn raw(address: SocketAddr, path: &str, fake: &str) -> (Vec<u8>, Option<ErrorKind>) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let body = with(chat("one two three"), json!({"stream": path.contains("stream")})).to_string();
    let path = path.replace("stream:", "");
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nx-fake: {fake}\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut bytes = Vec::new();
    let ended = socket.read_to_end(&mut bytes).err().map(|error| error.kind());
    (bytes, ended)
}

#[tokio::test]
async fn every_provider_answers_in_its_own_shape() {
    let upstream = Upstream::start();
    let messages = json!({"messages": [{"role": "user", "content": "hello you"}], "max_tokens": 100});
    let converse = json!({"messages": [{"role": "user", "content": [{"text": "hello you"}]}]});
    let contents = json!({"contents": [{"role": "user", "parts": [{"text": "hello you"}]}]});
    let input = json!({"model": "m", "input": "hello you"});
    let claude = "/aws-bedrock/model/anthropic.claude-v2%3A1";
    for (path, body, text, usage, tokens) in [
        (CHAT, chat("hello you"), "/choices/0/message/content", "/usage/prompt_tokens", 4),
        (
            "/groq/openai/v1/chat/completions",
            chat("hello you"),
            "/choices/0/message/content",
            "/usage/prompt_tokens",
            4,
        ),
        (
            "/openai/v1/completions",
            json!({"model": "m", "prompt": "hello you"}),
            "/choices/0/text",
            "/usage/prompt_tokens",
            2,
        ),
        ("/openai/v1/responses", input, "/output/0/content/0/text", "/usage/input_tokens", 2),
        (
            "/azure-openai/openai/deployments/m/chat/completions?api-version=1",
            messages.clone(),
            "/choices/0/message/content",
            "/usage/prompt_tokens",
            2,
        ),
        (
            "/anthropic/v1/messages",
            with(messages.clone(), json!({"model": "m"})),
            "/content/0/text",
            "/usage/input_tokens",
            2,
        ),
        (
            "/google-ai-studio/v1beta/models/m:generateContent",
            contents.clone(),
            "/candidates/0/content/parts/0/text",
            "/usageMetadata/promptTokenCount",
            2,
        ),
        (
            "/google-vertex-ai/v1/projects/p/locations/r/publishers/google/models/m:generateContent",
            contents,
            "/candidates/0/content/parts/0/text",
            "/usageMetadata/promptTokenCount",
            2,
        ),
        (
            "/google-vertex-ai/v1/projects/p/locations/r/publishers/anthropic/models/m:rawPredict",
            messages.clone(),
            "/content/0/text",
            "/usage/input_tokens",
            2,
        ),
        (&format!("{claude}/converse"), converse, "/output/message/content/0/text", "/usage/inputTokens", 2),
        (&format!("{claude}/invoke"), messages.clone(), "/content/0/text", "/usage/input_tokens", 2),
        (
            "/cohere/v2/chat",
            with(messages.clone(), json!({"model": "m"})),
            "/message/content/0/text",
            "/usage/tokens/input_tokens",
            2,
        ),
        ("/huggingface/org/m", json!({"inputs": "hello you"}), "/0/generated_text", "", 0),
    ] {
        let answer = post(&upstream, path, "ok", &body).await;
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["content-type"]),
            (200, &"application/json".parse().unwrap())
        );
        let answer: Value = answer.json().await.unwrap();
        let said = answer.pointer(text).and_then(Value::as_str).unwrap_or_else(|| panic!("{path}: {answer}"));
        let by = path.split('/').nth(1).unwrap();
        let model = if path.contains("claude") { "anthropic.claude-v2:1" } else { "m" };
        assert_eq!(said, format!("{by} {model} heard: hello you"), "{path}");
        if !usage.is_empty() {
            assert_eq!(answer.pointer(usage), Some(&json!(tokens)), "{path}: {answer}");
        }
    }
    assert_eq!(upstream.count(), 13);
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let upstream = Upstream::start();
    let messages = json!({"model": "m", "messages": [{"role": "user", "content": "hello you"}], "stream": true});
    let converse = json!({"messages": [{"role": "user", "content": [{"text": "hello you"}]}]});
    let contents = json!({"contents": [{"role": "user", "parts": [{"text": "hello you"}]}]});
    let google = "/google-ai-studio/v1beta/models/m:streamGenerateContent";
    let bedrock = "/aws-bedrock/model/m";
    for (path, body, text) in [
        (CHAT, &messages, "/choices/0/delta/content"),
        ("/openai/v1/completions", &messages, "/choices/0/text"),
        ("/openai/v1/responses", &json!({"model": "m", "input": "hello you", "stream": true}), "/delta"),
        ("/anthropic/v1/messages", &messages, "/delta/text"),
        (&format!("{google}?alt=sse"), &contents, "/candidates/0/content/parts/0/text"),
        (google, &contents, "/candidates/0/content/parts/0/text"),
        ("/google-vertex-ai/v1/m/m:streamRawPredict", &messages, "/delta/text"),
        (&format!("{bedrock}/converse-stream"), &converse, "/delta/text"),
        (&format!("{bedrock}/invoke-with-response-stream"), &messages, "/delta/text"),
        ("/cohere/v2/chat", &messages, "/delta/message/content/text"),
    ] {
        let answer = post(&upstream, path, "ok", body).await;
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        let bytes = answer.bytes().await.unwrap();
        let pieces: Vec<Value> = match kind.as_str() {
            "application/vnd.amazon.eventstream" => {
                let frames = unframe(&bytes).into_iter().map(|(_, payload)| payload);
                let inner = |payload: Value| match payload["bytes"].as_str() {
                    Some(text) => serde_json::from_slice(&BASE64_STANDARD.decode(text).unwrap()).unwrap(),
                    None => payload,
                };
                frames.map(inner).collect()
            }
            kind if kind.starts_with("text/event-stream") => data(&bytes),
            _ => serde_json::from_slice::<Vec<Value>>(&bytes).unwrap(),
        };
        let said: Vec<&str> = pieces.iter().filter_map(|piece| piece.pointer(text)?.as_str()).collect();
        let by = path.split('/').nth(1).unwrap();
        assert_eq!(said.concat(), format!("{by} m heard: hello you"), "{path}: {pieces:?}");
        assert!(said.len() >= 5, "{path} comes in chunks: {said:?}");
    }
}

#[tokio::test]
async fn tools_are_called_with_arguments_that_fit_unless_a_result_was_just_sent() {
    let upstream = Upstream::start();
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}, "required": ["city", "unit"]});
    let arguments = json!({"city": "Oslo", "unit": "C"});
    let ask = "Weather in Oslo?";
    let openai = with(
        chat(ask),
        json!({"tools": [{"type": "function", "function": {"name": "weather", "parameters": schema}}]}),
    );
    let anthropic = with(chat(ask), json!({"tools": [{"name": "weather", "input_schema": schema}]}));
    let google = json!({
        "contents": [{"role": "user", "parts": [{"text": ask}]}],
        "tools": [{"functionDeclarations": [{"name": "weather", "parameters": schema}]}],
    });
    let bedrock = json!({
        "messages": [{"role": "user", "content": [{"text": ask}]}],
        "toolConfig": {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": schema}}}]},
    });
    let whole = async |path: &str, body: &Value| post(&upstream, path, "ok", body).await.json::<Value>().await.unwrap();
    let parsed = |text: &Value| serde_json::from_str::<Value>(text.as_str().unwrap()).unwrap();

    let call = &whole(CHAT, &openai).await["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!((call["name"].as_str(), parsed(&call["arguments"])), (Some("weather"), arguments.clone()));
    let call = &whole("/cohere/v2/chat", &openai).await["message"]["tool_calls"][0]["function"];
    assert_eq!(parsed(&call["arguments"]), arguments);
    let answer = whole("/anthropic/v1/messages", &anthropic).await;
    assert_eq!((&answer["content"][0]["input"], &answer["stop_reason"]), (&arguments, &json!("tool_use")));
    let answer = whole("/google/v1beta/models/m:generateContent", &google).await;
    assert_eq!(answer["candidates"][0]["content"]["parts"][0]["functionCall"]["args"], arguments);
    let answer = whole("/aws-bedrock/model/m/converse", &bedrock).await;
    assert_eq!(answer["output"]["message"]["content"][0]["toolUse"]["input"], arguments);

    let stream = post(&upstream, CHAT, "calls=2; talk", &with(openai.clone(), json!({"stream": true}))).await;
    let pieces = data(&stream.bytes().await.unwrap());
    for index in 0..2 {
        let calls = pieces.iter().filter_map(|piece| piece.pointer("/choices/0/delta/tool_calls/0"));
        let mine = calls.filter(|call| call["index"] == index).map(|call| &call["function"]["arguments"]);
        let text: String = mine.map(|text| text.as_str().unwrap()).collect();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), arguments);
    }

    let mut told = openai.clone();
    let result = json!({"role": "tool", "tool_call_id": "x", "content": "snow"});
    told["messages"].as_array_mut().unwrap().push(result);
    assert_eq!(whole(CHAT, &told).await["choices"][0]["message"]["content"], "openai m heard: snow");
    let none = with(openai, json!({"tool_choice": "none"}));
    assert!(whole(CHAT, &none).await["choices"][0]["message"]["tool_calls"].is_null());
}

#[tokio::test]
async fn errors_have_the_providers_shape_and_the_headers_asked_for() {
    let upstream = Upstream::start();
    for (path, status, place, expected) in [
        (CHAT, 429, "/error/code", "rate_limit_exceeded"),
        (CHAT, 401, "/error/code", "invalid_api_key"),
        ("/anthropic/v1/messages", 529, "/error/type", "overloaded_error"),
        ("/anthropic/v1/messages", 402, "/error/type", "billing_error"),
        ("/google/v1beta/models/m:generateContent", 503, "/error/status", "UNAVAILABLE"),
        ("/aws-bedrock/model/m/converse", 429, "/message", "Too many requests, please wait before trying again."),
        ("/cohere/v2/chat", 500, "/message", "internal server error"),
        ("/replicate/v1/predictions", 500, "/title", "The fake upstream fails"),
    ] {
        let answer = post(&upstream, path, &format!("{status}; retry-after=7; header=x-more: a=b"), &chat("x")).await;
        assert_eq!(answer.status().as_u16(), status);
        assert_eq!(
            (&answer.headers()["retry-after"], &answer.headers()["x-more"]),
            (&"7".parse().unwrap(), &"a=b".parse().unwrap())
        );
        assert_eq!(answer.json::<Value>().await.unwrap().pointer(place), Some(&json!(expected)), "{path} {status}");
    }
    let dated = post(&upstream, CHAT, "429; retry-after-date=90; retry-after-ms=1500", &chat("x")).await;
    assert!(dated.headers()["retry-after"].to_str().unwrap().ends_with(" GMT"));
    assert_eq!(dated.headers()["retry-after-ms"], "1500");
}

#[test]
fn connections_end_as_they_are_told_to() {
    let upstream = Upstream::start();
    let stream = format!("stream:{CHAT}");
    let size = |bytes: &[u8]| String::from_utf8_lossy(bytes).matches("\"content\":\"openai \"").count();
    for (path, fake, ended, has, lacks) in [
        (CHAT, "reset", Some(ErrorKind::ConnectionReset), "", "HTTP"),
        (CHAT, "close-early", None, "", "HTTP"),
        (CHAT, "garbage", None, "this is no HTTP", "HTTP/1.1"),
        (CHAT, "close", None, "connection: close\r\n", "chunked"),
        (CHAT, "stale", None, "heard: one two three", "connection:"),
        (CHAT, "until-close", None, "heard: one two three", "content-length"),
        (CHAT, "close; chunked", None, "\r\n0\r\n\r\n", "content-length"),
        (CHAT, "short=10", None, "heard: one two three", "chunked"),
        (CHAT, "reset-after=0", Some(ErrorKind::ConnectionReset), "heard: one two three", "usage"),
        (CHAT, "close; early-hints", None, "HTTP/1.1 103 Early Hints\r\n", "nothing"),
        (CHAT, "close; redirect=http://elsewhere/", None, "location: http://elsewhere/\r\n", "heard"),
        (CHAT, "close; long-headers=9k", None, &"l".repeat(9 << 10), "nothing"),
        (CHAT, "close; drip=7/0", None, "heard: one two three", "nothing"),
        (CHAT, "close; says={\"a\": 1}", None, "{\\\"a\\\": 1}", "heard"),
        (CHAT, "close; html", None, "content-type: text/html\r\n", "heard"),
        (&stream, "reset-after=2", Some(ErrorKind::ConnectionReset), "\"m \"", "heard"),
        (&stream, "close-after=2", None, "\"m \"", "heard"),
        (&stream, "close; error-after=2", None, "server_error", "[DONE]"),
        (&stream, "close; garbage-after=2", None, "[DONE]", "nothing"),
        (&stream, "close; bad-json", None, "[DONE]", "nothing"),
        (&stream, "until-close", None, "[DONE]", "chunked"),
        (&stream, "close; drip=5/0", None, "[DONE]", "nothing"),
        (&stream, "close; chunks=3; size=4", None, "\"www \"", "heard"),
    ] {
        let (bytes, how) = raw(upstream.address, path, fake);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(how, ended, "{fake}: {text}");
        assert!(text.contains(has), "{fake}: {has} in {text}");
        assert!(!text.contains(lacks), "{fake}: {lacks} not in {text}");
        if path == stream && !fake.contains("chunks") && !fake.contains("drip") {
            assert_eq!(size(&bytes), 1, "{fake}: {text}");
        }
    }
    let (bytes, _) = raw(upstream.address, CHAT, "close; bad-json");
    let (_, body) = std::str::from_utf8(&bytes).unwrap().split_once("\r\n\r\n").unwrap();
    assert!(serde_json::from_str::<Value>(body).unwrap_err().is_eof());
}

#[tokio::test]
async fn a_stream_can_fail_before_it_says_anything() {
    let upstream = Upstream::start();
    let google = "/google-ai-studio/v1beta/models/m:streamGenerateContent?alt=sse";
    for (path, fake, before, word) in [
        (CHAT, "error-event=0", 0, "server_error"),
        (CHAT, "error-event=1/429", 1, "rate_limit_exceeded"),
        (CHAT, "error-event=70/400", 70, "The request is wrong."),
        ("/openai/v1/responses", "error-event=2/429", 2, "rate_limit_exceeded"),
        ("/openai/v1/responses", "error-event=4", 4, "server_error"),
        ("/anthropic/v1/messages", "error-event=3", 3, "overloaded_error"),
        (google, "error-event=2", 0, "UNAVAILABLE"),
        ("/cohere/v2/chat", "error-event=2", 2, "the generation failed"),
        ("/cohere/v2/chat", "error-event=1/500", 1, "internal server error"),
    ] {
        let answer = post(&upstream, path, fake, &with(chat("hello"), json!({"stream": true}))).await;
        assert_eq!(answer.status().as_u16(), 200, "{path}");
        let events = events(&answer.bytes().await.unwrap());
        let (last, opening) = events.split_last().unwrap();
        assert_eq!(opening.len(), before, "{path} {fake}");
        assert!(last.data.contains(word), "{path} {fake}: {last:?}");
        assert!(opening.iter().all(|event| !event.data.contains("hello")), "{path}: {opening:?}");
    }
    let converse = json!({"messages": [{"role": "user", "content": [{"text": "hello"}]}]});
    for (fake, name) in [("error-event=1", "modelStreamErrorException"), ("error-event=1/429", "throttlingException")] {
        let answer = post(&upstream, "/aws-bedrock/model/m/converse-stream", fake, &converse).await;
        let frames = unframe(&answer.bytes().await.unwrap());
        let names: Vec<&str> = frames.iter().map(|(headers, _)| headers[0].1.as_str()).collect();
        assert_eq!(names, ["messageStart", name]);
    }
}

#[tokio::test]
async fn long_and_packed_bodies_are_what_they_are_said_to_be() {
    let upstream = Upstream::start();
    for framing in ["", "; chunked"] {
        let answer = post(&upstream, CHAT, &format!("huge=3m{framing}"), &chat("x")).await;
        assert_eq!(answer.content_length().is_some(), framing.is_empty());
        let body = answer.bytes().await.unwrap();
        assert_eq!(body.len(), 3 << 20);
        assert!(serde_json::from_slice::<Value>(&body).is_ok());
    }
    // Nothing here unpacks; what is packed is stored as it is, and its sum is at the end.
    let packed = post(&upstream, CHAT, "gzip", &chat("packed up")).await;
    assert_eq!(packed.headers()["content-encoding"], "gzip");
    let bytes = packed.bytes().await.unwrap();
    let length = usize::from(u16::from_le_bytes([bytes[11], bytes[12]]));
    let body = &bytes[15..15 + length];
    assert!(serde_json::from_slice::<Value>(body).unwrap()["choices"][0]["message"]["content"].is_string());
    assert_eq!(bytes[bytes.len() - 8..bytes.len() - 4], frames::crc32(body).to_le_bytes());

    let bomb = post(&upstream, CHAT, "bomb=64m", &chat("x")).await.bytes().await.unwrap();
    assert!(bomb.len() < 64 << 20 >> 7, "{} bytes", bomb.len());
    for bytes in [0, 1, 2, 258, 259, 260, 1000] {
        let bomb = frames::bomb(bytes);
        assert_eq!(bomb[bomb.len() - 8..bomb.len() - 4], frames::crc32(&vec![0; bytes]).to_le_bytes());
    }
}

#[test]
fn sums_and_frames_are_those_of_the_published_examples() {
    assert_eq!(frames::crc32(b"123456789"), 0xcbf4_3926);
    let empty = [0, 0, 0, 0x10, 0, 0, 0, 0, 0x05, 0xc2, 0x48, 0xeb, 0x7d, 0x98, 0xc8, 0xff];
    assert_eq!(frames::event(&[], b"")[..], empty);
}

#[tokio::test]
async fn a_client_that_hangs_up_is_seen_with_the_moment_and_the_chunks() {
    let upstream = Upstream::start();
    let asked = Instant::now();
    let body = with(chat("x"), json!({"stream": true}));
    let mut stream = post(&upstream, CHAT, "gap=5; chunks=2000", &body).await;
    let mut bytes = Vec::new();
    while String::from_utf8_lossy(&bytes).matches("wwww").count() < 3 {
        bytes.extend_from_slice(&stream.chunk().await.unwrap().unwrap());
    }
    drop(stream);
    let left = Instant::now();
    let seen = upstream.until_closed_early(1).await.remove(0);
    let closed = seen.closed_early.unwrap();
    assert!((3..2000).contains(&closed.chunks), "{closed:?}");
    assert!(seen.at >= asked && closed.at >= seen.at && closed.at >= left, "{closed:?}");

    // Behind some chunks, and before the first byte.
    for fake in ["hang-after=3", "half-close-after=3", "bad-chunk-after=3"] {
        upstream.clear();
        let mut stream = post(&upstream, CHAT, fake, &body).await;
        let mut bytes = Vec::new();
        while !String::from_utf8_lossy(&bytes).contains("heard: ") {
            bytes.extend_from_slice(&stream.chunk().await.unwrap().unwrap());
        }
        drop(stream);
        assert_eq!(upstream.until_closed_early(1).await[0].closed_early.unwrap().chunks, 3, "{fake}");
    }
    for fake in ["hang", "delay=1000000", "pause=1000000"] {
        upstream.clear();
        let asking = async { post(&upstream, CHAT, fake, &body).await.bytes().await };
        tokio::select! {
            _ = asking => panic!("{fake}: it was answered"),
            _ = upstream.until("asked", |seen| seen.len() == 1) => {}
        }
        assert_eq!(upstream.until_closed_early(1).await[0].closed_early.unwrap().chunks, 0, "{fake}");
    }
}

#[tokio::test]
async fn a_chunk_without_a_size_is_no_end_of_an_answer() {
    let upstream = Upstream::start();
    for (fake, stream) in [("bad-chunk-after=0", false), ("bad-chunk-after=2", true)] {
        let broken = post(&upstream, CHAT, fake, &with(chat("x"), json!({"stream": stream}))).await;
        assert!(broken.status() == 200 && broken.bytes().await.is_err(), "{fake}");
    }
}

#[tokio::test]
async fn connections_are_kept_and_given_up_as_told() {
    let upstream = Upstream::start();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |fake: &str| {
        let url = format!("{}{CHAT}", upstream.url());
        let answer = client.post(url).header("x-fake", fake).json(&chat("x")).send().await.unwrap();
        answer.bytes().await.unwrap();
    };
    for fake in ["ok", "500", "chunked", "huge=100k", "close"] {
        ask(fake).await;
    }
    ask("ok").await;
    let over: Vec<u64> = upstream.requests().iter().map(|seen| seen.connection).collect();
    assert_eq!((over, upstream.accepted()), (vec![1, 1, 1, 1, 1, 2], 2));

    // A connection that looks alive and ends when it is used again.
    let mut socket = TcpStream::connect(upstream.address).unwrap();
    let request = b"GET /openai/v1/models HTTP/1.1\r\nx-fake: stale-next\r\n\r\n";
    socket.write_all(request).unwrap();
    let mut byte = [0; 4096];
    assert!(socket.read(&mut byte).unwrap() > 0);
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(socket.read(&mut byte).unwrap_err().kind(), ErrorKind::WouldBlock);
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.write_all(request).unwrap();
    assert!(matches!(socket.read(&mut byte).map_err(|error| error.kind()), Ok(0) | Err(ErrorKind::ConnectionReset)));
    let seen = upstream.until("2 models", |seen| seen.iter().filter(|seen| seen.method == "GET").count() == 1).await;
    assert_eq!(seen.last().unwrap().connection, 3);
}

#[tokio::test]
async fn scripts_are_used_up_in_order_by_the_paths_they_are_for() {
    let upstream = Upstream::start();
    upstream.script("/openai", ["503", "ok"]);
    upstream.script("/anthropic", [Behaviour { status: Some(529), ..Behaviour::default() }]);
    upstream.script("/openai", ["429"]);
    assert_eq!(upstream.scripted(), 4);
    for (path, fake, status) in [
        ("/anthropic/v1/messages", None, 529),
        (CHAT, None, 503),
        (CHAT, Some("402"), 402),
        (CHAT, None, 200),
        (CHAT, None, 429),
        (CHAT, None, 200),
        ("/anthropic/v1/messages", None, 200),
        (CHAT, Some("nonsense"), 400),
        ("/nobody/knows", None, 404),
    ] {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut ask = client.post(format!("{}{path}", upstream.url())).json(&chat("x"));
        if let Some(fake) = fake {
            ask = ask.header("x-fake", fake);
        }
        assert_eq!(ask.send().await.unwrap().status().as_u16(), status, "{path} {fake:?}");
    }
    assert_eq!(upstream.scripted(), 0);
}

#[test]
fn requests_are_read_and_echoed_however_they_are_sent() {
    let upstream = Upstream::start();
    let mut socket = TcpStream::connect(upstream.address).unwrap();
    // Two at once; the first in chunks with a trailer.
    let sent = "POST /a%2Fb/echo?q=1&q=2 HTTP/1.1\r\nHost: h\r\nX-Odd:  a b \r\nx-odd: c\r\nTransfer-Encoding: chunked\r\n\r\n\
                5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\nx-trailer: t\r\n\r\n\
                POST /echo HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\nconnection: close\r\n\r\n\u{fffd}";
    socket.write_all(sent.as_bytes()).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    let bodies: Vec<Value> = text
        .split("\r\n\r\n")
        .filter_map(|part| {
            let end = part.rfind('}')?;
            serde_json::from_str(&part[..=end]).ok()
        })
        .collect();
    let headers = json!([["Host", "h"], ["X-Odd", "a b"], ["x-odd", "c"], ["Transfer-Encoding", "chunked"]]);
    let expected = json!({"method": "POST", "path": "/a%2Fb/echo", "query": "q=1&q=2", "headers": headers, "body": "hello!", "body_base64": "aGVsbG8h"});
    assert_eq!(bodies[0], expected, "{text}");
    assert_eq!(bodies[1]["body_base64"], "77+9");
    assert_eq!(upstream.requests()[0].header("X-ODD"), Some("a b"));
}

#[tokio::test]
async fn another_program_reads_and_scripts_it_over_http() {
    let upstream = Upstream::start();
    let script = json!({"path": "/openai", "behaviours": ["503; retry-after=1"]});
    assert_eq!(post(&upstream, "/_fake/script", "", &script).await.status().as_u16(), 200);
    assert_eq!(
        post(&upstream, "/_fake/script", "", &json!({"path": "/", "behaviours": ["?"]})).await.status().as_u16(),
        400
    );
    let url = format!("{}{CHAT}", upstream.url());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    assert_eq!(client.post(url).json(&chat("x")).send().await.unwrap().status().as_u16(), 503);
    upstream.until("answered", |seen| seen.len() == 1 && seen[0].answered.is_some()).await;
    let state: Value =
        client.get(format!("{}/_fake/requests", upstream.url())).send().await.unwrap().json().await.unwrap();
    let request = &state["requests"][0];
    assert_eq!(
        (&request["path"], &request["answered"], &request["closed_early"]),
        (&json!(CHAT), &json!(true), &Value::Null)
    );
    assert_eq!(serde_json::from_str::<Value>(request["body"].as_str().unwrap()).unwrap(), chat("x"));
    post(&upstream, "/_fake/clear", "", &json!({})).await;
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_fixed_answer_comes_from_every_thread_and_a_dropped_server_frees_its_port() {
    let upstream =
        Upstream::with(Options { threads: 2, fixed: Some(300), record: false, ..Options::default() }).unwrap();
    for _ in 0..8 {
        let answer = post(&upstream, "/any/thing", "500", &chat("x")).await;
        assert_eq!(answer.bytes().await.unwrap().len(), 300);
    }
    assert_eq!((upstream.count(), upstream.accepted()), (0, 8));
    let address = upstream.address;
    let mut open = TcpStream::connect(address).unwrap();
    drop(upstream);
    assert!(matches!(open.read(&mut [0]).map_err(|error| error.kind()), Ok(0) | Err(ErrorKind::ConnectionReset)));
    drop(open);
    let again = Upstream::with(Options { listen: address, ..Options::default() }).unwrap();
    assert_eq!(again.address, address);
    drop(again);
    assert!(TcpListener::bind(address).is_ok() || TcpStream::connect(address).is_err());
}
