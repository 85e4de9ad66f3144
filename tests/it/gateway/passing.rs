//! Native calls: everything passes, both ways, and hanging up is heard.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use super::{Rig, events, question, streamed, text};
use crate::harness::Answer;

#[actix_web::test]
async fn a_request_passes_byte_for_byte_but_for_what_is_ours() {
    let rig = Rig::start();
    let body = "{\"model\" : \"x\",\"z\":1.50e+3, \"unknown\":{\"b\":1,\"a\":[ 2 ]},\"text\":\"\\u00e9\"}";
    let sent = rig
        .request(Method::PUT, "openai/a%2Fb/c/echo?x=1&y=%20z")
        .header("authorization", "Bearer sk-theirs")
        .header("content-type", "application/json; odd=1")
        .header("x-custom", "kept")
        .header("x-request-id", "their-own")
        .header("cf-aig-cache-ttl", "0")
        .header("cf-aig-metadata", "{\"a\":1}")
        .header("cf-aig-authorization", "Bearer secret")
        .header("connection", "x-hop")
        .header("x-hop", "gone")
        .body(body);
    let answer = Answer::of(sent).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = rig.upstream.requests().pop().unwrap();
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("PUT", "/openai/v1/a%2Fb/c/echo"));
    assert_eq!(seen.query.as_deref(), Some("x=1&y=%20z"));
    assert_eq!(seen.body, body.as_bytes());
    for (name, value) in [
        ("authorization", Some("Bearer sk-theirs")),
        ("content-type", Some("application/json; odd=1")),
        ("x-custom", Some("kept")),
        ("x-request-id", Some("their-own")),
        ("x-hop", None),
    ] {
        assert_eq!(seen.header(name), value, "{name}");
    }
    let ours = seen.headers.iter().filter(|(name, _)| name.to_ascii_lowercase().starts_with("cf-aig"));
    assert_eq!(ours.count(), 0, "{:?}", seen.headers);
    rig.is_clean().await;
}

#[actix_web::test]
async fn an_answer_says_who_answered_and_carries_what_the_upstream_said() {
    let rig = Rig::start();
    let answer =
        Answer::of(rig.chat(&[("x-fake", "header=x-theirs: 1; header=set-cookie: a=b")], &question("hello there")))
            .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let body: Value = serde_json::from_str(&answer.text).unwrap();
    assert!(body["choices"][0]["message"]["content"].as_str().unwrap().contains("hello there"), "{body}");
    for (name, value) in [
        ("cf-aig-cache-status", "MISS"),
        ("cf-aig-step", "0"),
        ("cf-aig-provider", "openai"),
        ("cf-aig-model", "gpt-4o-mini"),
        ("cf-aig-attempts", "openai/gpt-4o-mini=200"),
        ("x-theirs", "1"),
        ("set-cookie", ""),
    ] {
        assert_eq!(answer.header(name), value, "{name}");
    }
    assert_eq!(answer.header("cf-aig-log-id").len(), 26);
    assert_eq!(answer.header("cf-aig-log-id"), answer.header("cf-aig-request-id"));
    let silent =
        Answer::of(rig.chat(&[("cf-aig-collect-log", "false"), ("cf-aig-event-id", "mine")], &question("x"))).await;
    assert_eq!((silent.header("cf-aig-log-id"), silent.header("cf-aig-event-id")), ("", "mine"));
}

#[actix_web::test]
async fn every_providers_own_path_leads_to_its_own_upstream() {
    let rig = Rig::start();
    for (path, arrives) in [
        ("openai/v1/chat/completions", "/openai/v1/chat/completions"),
        ("openai/chat/completions", "/openai/v1/chat/completions"),
        ("groq/chat/completions", "/groq/v1/chat/completions"),
        ("mistral/v1/chat/completions", "/mistral/v1/chat/completions"),
        ("anthropic/v1/messages", "/anthropic/v1/messages"),
        (
            "google-ai-studio/v1beta/models/gemini-pro:generateContent",
            "/google-ai-studio/v1beta/models/gemini-pro:generateContent",
        ),
        ("google/v1/models/gemini-pro:generateContent", "/google-ai-studio/v1/models/gemini-pro:generateContent"),
        ("cohere/v2/chat", "/cohere/v2/chat"),
    ] {
        let answer = Answer::of(rig.post(path, &[("authorization", "Bearer k")], &question("q"))).await;
        let seen = rig.upstream.requests().pop().map(|seen| seen.path).unwrap_or_default();
        assert_eq!(seen, arrives, "{path}: {answer:?}");
        assert_ne!(answer.header("cf-aig-provider"), "", "{path}: {answer:?}");
    }
}

#[actix_web::test]
async fn what_leads_nowhere_is_refused_in_the_gateways_words() {
    let rig = Rig::start();
    let check = |answer: Answer, status: u16, code: u64| {
        let body = answer.json();
        assert_eq!((answer.status, &body["internalCode"]), (status, &json!(code)), "{body}");
        assert_eq!(body["error"][0]["code"], code, "{body}");
        assert_eq!((&body["name"], &body["httpCode"]), (&json!("AiGatewayError"), &json!(status)), "{body}");
    };
    check(Answer::of(rig.post("nobody/chat", &[], &question("x"))).await, 400, 2008);
    check(Answer::of(rig.post("custom-none/chat", &[], &question("x"))).await, 400, 2008);
    check(Answer::of(rig.post("openai/..%2fsecrets", &[], &question("x"))).await, 400, 7003);
    check(rig.daemon.post("/v1/acme/absent/openai/chat/completions", question("x")).await, 400, 2001);
    let aliased = rig.chat(&[("cf-aig-authorization", "Bearer secret"), ("cf-aig-byok-alias", "none")], &question("x"));
    check(Answer::of(aliased).await, 400, 2040);
    assert_eq!(rig.upstream.count(), 0);
}

#[actix_web::test]
async fn a_gateway_with_authentication_wants_a_token_of_ours() {
    let rig = Rig::with("[[gateway]]\nid = \"closed\"\n");
    let url = rig.daemon.url("/v1/acme/closed/openai/chat/completions");
    let ask = |token: Option<&str>| {
        let request = reqwest::Client::new().post(&url).json(&question("x"));
        match token {
            Some(token) => request.header("cf-aig-authorization", token),
            None => request,
        }
    };
    for (token, status) in [
        (Some("Bearer secret"), 200),
        (Some("secret"), 200),
        (None, 401),
        (Some("Bearer wrong"), 401),
        // Of another account.
        (Some("Bearer other"), 401),
    ] {
        assert_eq!(Answer::of(ask(token)).await.status, status, "{token:?}");
    }
}

#[actix_web::test]
async fn the_engine_is_a_provider_like_all_others() {
    let rig = Rig::start();
    let native = json!({ "prompt": "hello", "max_tokens": 4 });
    let token = [("authorization", "Bearer secret")];
    for path in ["workers-ai/@cf/meta/llama-3.2-1b-instruct", "workers-ai/run/@cf%2Fmeta%2Fllama-3.2-1b-instruct"] {
        let answer = Answer::of(rig.post(path, &token, &native)).await;
        let body = answer.json();
        assert!(body["success"] == true && body["result"]["response"].is_string(), "{path}: {body}");
        assert_eq!(answer.header("cf-aig-provider"), "workers-ai", "{path}");
    }
    let chat = json!({ "model": "@cf/meta/llama-3.2-1b-instruct", "max_tokens": 4, "messages": [{ "role": "user", "content": "hi" }] });
    let answer = Answer::of(rig.post("workers-ai/v1/chat/completions", &token, &chat)).await;
    assert_eq!(answer.json()["object"], "chat.completion");
    let mut stream = chat.clone();
    stream["stream"] = json!(true);
    let answer = Answer::of(rig.post("workers-ai/v1/chat/completions", &token, &stream)).await;
    assert_eq!(events(&answer).last().unwrap().data, "[DONE]");
    let bad = Answer::of(rig.post("workers-ai/v1/chat/completions", &[("authorization", "Bearer wrong")], &chat)).await;
    assert_eq!(bad.status, 401, "{bad:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_stream_passes_chunk_by_chunk() {
    let rig = Rig::start();
    let mut answer = rig
        .chat(&[("x-fake", "chunks=5; gap=60")], &streamed("one two three four five"))
        .send()
        .await
        .unwrap()
        .bytes_stream();
    let (began, mut times) = (Instant::now(), Vec::new());
    while let Some(chunk) = answer.next().await {
        chunk.unwrap();
        times.push(began.elapsed());
    }
    // Not collected and handed on at once: the first is there long before the last.
    assert!(times.len() >= 5, "{times:?}");
    assert!(*times.last().unwrap() - times[0] >= Duration::from_millis(150), "{times:?}");
}

#[actix_web::test]
async fn hanging_up_reaches_the_upstream_before_and_after_the_first_byte() {
    let rig = Rig::start();
    for (fake, path, after) in [
        ("chunks=1000; gap=20", "openai/chat/completions", 3),
        ("chunks=1000; gap=20", "anthropic/v1/messages", 3),
        ("hang", "openai/chat/completions", 0),
        ("chunks=1000; gap=20", "compat/chat/completions", 3),
    ] {
        rig.upstream.clear();
        let mut body = streamed("a b c");
        body["max_tokens"] = json!(100);
        if path.starts_with("compat") {
            body["model"] = json!("anthropic/claude-x");
        }
        let request = rig.post(path, &[("x-fake", fake), ("authorization", "Bearer k")], &body);
        if after == 0 {
            let sent = tokio::time::timeout(Duration::from_millis(300), request.send()).await;
            assert!(sent.is_err(), "{path}: it hangs");
        } else {
            let mut stream = request.send().await.unwrap().bytes_stream();
            for _ in 0..after {
                stream.next().await.unwrap().unwrap();
            }
            drop(stream);
        }
        let cut = rig.upstream.until_closed_early(1).await;
        assert_eq!(cut.len(), 1, "{path}");
        rig.is_clean().await;
    }
    let cancelled = rig.calls("cancelled");
    assert!(cancelled >= 3, "each is counted as what it is: {cancelled}");
}

#[actix_web::test]
async fn the_head_of_a_stream_waits_no_more_than_a_moment_for_its_first_chunk() {
    let rig = Rig::start();
    let request = rig.chat(&[("x-fake", "pause=2000; chunks=2")], &streamed("a b")).send();
    let answer = tokio::time::timeout(Duration::from_millis(1500), request).await.expect("the head is here").unwrap();
    assert_eq!(answer.status(), 200);
    let mut stream = answer.bytes_stream();
    assert!(tokio::time::timeout(Duration::from_millis(100), stream.next()).await.is_err(), "nothing was said yet");
    assert!(stream.next().await.unwrap().is_ok(), "then it is");
}

#[actix_web::test]
async fn while_streams_overlap_the_next_finds_a_connection_and_a_lone_one_opens_no_other() {
    let rig = Rig::tuned(|config| config.server.workers = 1);
    let begun = async || {
        let answer = rig.chat(&[("x-fake", "chunks=1000; gap=20")], &streamed("a b c")).send().await.unwrap();
        let mut stream = answer.bytes_stream();
        stream.next().await.unwrap().unwrap();
        stream
    };
    let settled = async |open: usize, what: &str| {
        rig.upstream.until(what, |_| rig.upstream.open() == open).await;
        // Time for one too many.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(rig.upstream.open(), open, "{what}");
    };
    let mut streams = vec![begun().await];
    settled(1, "one stream has one connection").await;
    for open in 3..6 {
        streams.push(begun().await);
        settled(open, "another has one, and one is ahead").await;
    }
    let over: Vec<u64> = rig.upstream.requests().iter().map(|seen| seen.connection).collect();
    assert_eq!(over, [1, 2, 3, 4], "each takes the one that was ahead");
    drop(streams);
    rig.is_clean().await;
    settled(1, "the one ahead is kept").await;
    assert_eq!(Answer::of(rig.chat(&[], &question("q"))).await.status, 200);
    assert_eq!(rig.upstream.accepted(), 5, "and serves whoever comes next");
}

#[actix_web::test]
async fn a_stream_that_breaks_off_says_so_and_never_says_done() {
    let rig = Rig::start();
    for fake in ["reset-after=4", "close-after=4"] {
        let answer = Answer::of(rig.chat(&[("x-fake", &format!("chunks=20; {fake}"))], &streamed("q"))).await;
        let all = events(&answer);
        let last: Value = serde_json::from_str(&all.last().unwrap().data).unwrap();
        assert!(last["error"]["message"].is_string(), "{fake}: {last}");
        assert!(
            !answer.text.contains("[DONE]") && !answer.text.contains("\"finish_reason\":\"stop\""),
            "{fake}: {}",
            answer.text
        );
    }
    rig.is_clean().await;
    assert_eq!(rig.calls("failed"), 2);
}

#[actix_web::test]
async fn what_an_upstream_does_wrong_costs_one_call_and_has_a_reason() {
    let rig = Rig::with(
        "[[gateway]]\nid = \"quick\"\nauthentication = false\nfirst_byte_timeout_ms = 300\nidle_timeout_ms = 300\n",
    );
    let url = rig.daemon.url("/v1/acme/quick/openai/chat/completions");
    let ask = |fake: &str| {
        reqwest::Client::new()
            .post(&url)
            .header("x-fake", fake)
            .header("cf-aig-request-timeout", "300")
            .json(&question("q"))
    };
    for (fake, status, code) in [("reset", 502, 2005), ("garbage", 502, 2005), ("close-early", 502, 2005)] {
        let answer = Answer::of(ask(fake)).await;
        assert_eq!((answer.status, answer.json()["internalCode"].as_u64()), (status, Some(code)), "{fake}: {answer:?}");
    }
    // A body shorter than it was announced is no whole answer, and must not look like one.
    for fake in ["short=10", "hang-after=1"] {
        let response = ask(fake).send().await.unwrap();
        assert!(response.bytes().await.is_err(), "{fake}");
    }
    let long = ask("huge=20m").send().await.unwrap();
    assert_eq!(long.bytes().await.unwrap().len(), 20 << 20);
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_kept_connection_that_has_been_closed_is_no_failure() {
    let rig = Rig::start();
    for fake in ["stale", "stale-next", "close", "ok"] {
        for _ in 0..3 {
            let answer = Answer::of(rig.chat(&[("x-fake", fake)], &question("q"))).await;
            assert_eq!(answer.status, 200, "{fake}: {answer:?}");
        }
    }
}

#[actix_web::test]
async fn redirects_are_handed_on_and_private_addresses_refused() {
    let rig = Rig::with("[[provider]]\nslug = \"custom-inside\"\nbase_url = \"https://127.0.0.1:9\"\n");
    let answer = rig.chat(&[("x-fake", "redirect=http://169.254.169.254/latest")], &question("q"));
    let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let response = client.execute(answer.build().unwrap()).await.unwrap();
    assert_eq!(response.status(), 307);
    assert_eq!(rig.upstream.count(), 1);
    let refused = Answer::of(rig.post("custom-inside/x", &[], &question("q"))).await;
    assert_eq!(refused.json()["internalCode"], 2008, "{refused:?}");
    assert!(refused.text.contains("private"), "{refused:?}");
}

#[actix_web::test]
async fn usage_is_counted_whatever_shape_it_has_even_compressed() {
    let rig = Rig::start();
    let counted = |kind: &str| ["openai", "anthropic"].map(|provider| rig.tokens(provider, kind));
    let plain = Answer::of(rig.chat(&[], &question("one two three"))).await;
    let usage: Value = serde_json::from_str(&plain.text).unwrap();
    let (prompt, completion) =
        (usage["usage"]["prompt_tokens"].as_u64().unwrap(), usage["usage"]["completion_tokens"].as_u64().unwrap());
    rig.is_clean().await;
    assert_eq!((counted("prompt")[0], counted("completion")[0]), (prompt, completion));
    Answer::of(rig.chat(&[], &streamed("one two three"))).await;
    rig.is_clean().await;
    assert_eq!((counted("prompt")[0], counted("completion")[0]), (prompt * 2, completion * 2), "streamed");
    Answer::of(rig.chat(&[("x-fake", "gzip"), ("accept-encoding", "br, gzip")], &question("one two three"))).await;
    rig.is_clean().await;
    assert_eq!((counted("prompt")[0], counted("completion")[0]), (prompt * 3, completion * 3), "compressed");
    let body = json!({ "model": "claude-x", "max_tokens": 9, "stream": true, "messages": [{ "role": "user", "content": "a b" }] });
    Answer::of(rig.post("anthropic/v1/messages", &[], &body)).await;
    rig.is_clean().await;
    assert!(counted("prompt")[1] > 0 && counted("completion")[1] > 0, "Anthropic's stream");
    // A bomb is passed on as it came and not unpacked without bound.
    let bomb = Answer::of(rig.chat(&[("x-fake", "bomb=200m"), ("accept-encoding", "gzip")], &question("q")));
    let _ = bomb.await;
    rig.is_clean().await;
    let _ = text(&[]);
}
