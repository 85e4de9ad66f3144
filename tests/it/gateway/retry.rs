//! Trying again, and trying somebody else.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Rig, question, streamed};
use crate::harness::Answer;

#[actix_web::test]
async fn what_may_do_better_is_tried_again_and_what_cannot_is_not() {
    let rig = Rig::start();
    for (first, worth) in [
        ("429", true),
        ("500", true),
        ("503", true),
        ("529", true),
        ("reset", true),
        ("garbage", true),
        ("400", false),
        ("401", false),
        ("404", false),
        ("402", false),
    ] {
        rig.upstream.clear();
        rig.upstream.script("/openai", [first, "ok"]);
        let headers = [("cf-aig-max-attempts", "3"), ("cf-aig-retry-delay", "1"), ("cf-aig-backoff", "constant")];
        let answer = Answer::of(rig.chat(&headers, &question("q"))).await;
        assert_eq!(
            (answer.status == 200, rig.upstream.count()),
            (worth, if worth { 2 } else { 1 }),
            "{first}: {answer:?}"
        );
        // Where nothing at all was heard on a kept connection, the try is not even counted.
        if worth && first != "reset" {
            let trail = answer.header("cf-aig-attempts");
            assert!(trail.ends_with("=200") && trail.matches("openai/gpt-4o-mini").count() == 2, "{first}: {trail}");
        }
        // So that one provider's failures do not weigh on the next row.
        let policy = neurond::fallback::Policy { consecutive: 1000, failure_rate: 1.1, ..Default::default() };
        rig.daemon.services.relays.fallback.reconfigure(policy).await.unwrap();
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn without_another_target_status_body_and_advice_are_the_upstreams() {
    let rig = Rig::start();
    for (fake, status, header, value) in [
        ("429; retry-after=7", 429, "retry-after", "7"),
        ("503; retry-after-ms=2500", 503, "retry-after-ms", "2500"),
        ("429; header=x-should-retry: false", 429, "x-should-retry", "false"),
    ] {
        let answer = Answer::of(rig.chat(&[("x-fake", fake)], &question("q"))).await;
        assert_eq!((answer.status, answer.header(header)), (status, value), "{fake}: {answer:?}");
        let body: Value = serde_json::from_str(&answer.text).unwrap();
        assert!(body["error"]["message"].is_string() && body["internalCode"].is_null(), "{fake}: {body}");
    }
}

#[actix_web::test]
async fn retry_after_is_obeyed_up_to_a_cap() {
    let rig = Rig::start();
    for (advice, at_least, at_most) in [("retry-after-ms=400", 380, 1200), ("retry-after=600", 1450, 4000)] {
        rig.upstream.clear();
        rig.upstream.script("/openai", [format!("429; {advice}").as_str(), "ok"]);
        let began = Instant::now();
        let answer =
            Answer::of(rig.chat(&[("cf-aig-max-attempts", "2"), ("cf-aig-retry-delay", "1")], &question("q"))).await;
        let taken = began.elapsed().as_millis();
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!((at_least..at_most).contains(&taken), "{advice}: {taken} ms");
    }
}

#[actix_web::test]
async fn steps_are_taken_in_order_until_one_answers() {
    let rig = Rig::start();
    let step = |provider: &str, endpoint: &str, fake: &str, config: Value| {
        json!({ "provider": provider, "endpoint": endpoint, "config": config,
                "headers": { "Authorization": "Bearer k", "x-fake": fake, "x-number": 7, "cf-aig-cache-ttl": "0" },
                "query": { "model": "m", "max_tokens": 5, "messages": [{ "role": "user", "content": "q" }] } })
    };
    let ask = async |steps: Value| Answer::of(rig.post("", &[], &steps)).await;
    let slow = json!({ "requestTimeout": 200 });
    let steps = json!([
        step("openai", "chat/completions", "500", json!({ "maxAttempts": 2, "retryDelay": 1 })),
        step("groq", "chat/completions", "hang", slow),
        step("anthropic", "v1/messages", "ok", json!({})),
    ]);
    let answer = ask(steps).await;
    assert_eq!(
        (answer.status, answer.header("cf-aig-step"), answer.header("cf-aig-provider")),
        (200, "2", "anthropic"),
        "{answer:?}"
    );
    assert_eq!(answer.header("cf-aig-attempts"), "openai/m=500, openai/m=500, groq/m=timeout, anthropic/m=200");
    let seen = rig.upstream.requests();
    assert_eq!(seen.last().unwrap().header("x-number"), Some("7"));
    assert!(seen.iter().all(|seen| seen.header("cf-aig-cache-ttl").is_none()));
    // All fail: the last one's own words.
    let answer = ask(json!([
        step("openai", "chat/completions", "500", json!({})),
        step("groq", "chat/completions", "429", json!({}))
    ]))
    .await;
    assert_eq!((answer.status, answer.header("cf-aig-step")), (429, "1"), "{answer:?}");
    // One object is a list of one.
    assert_eq!(ask(step("openai", "chat/completions", "ok", json!({}))).await.header("cf-aig-step"), "0");
    for bad in [json!([]), json!("x"), json!([{ "endpoint": "x" }])] {
        assert_eq!(ask(bad).await.status, 400);
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn nothing_is_tried_again_once_the_caller_has_read_a_byte() {
    let rig = Rig::start();
    let headers = [
        ("cf-aig-max-attempts", "5"),
        ("cf-aig-retry-delay", "1"),
        ("x-fake", "chunks=9; reset-after=3"),
        ("cf-aig-fallback", "groq/m"),
    ];
    let answer = Answer::of(rig.chat(&headers, &streamed("q"))).await;
    assert_eq!((answer.status, rig.upstream.count()), (200, 1));
    assert!(!answer.text.contains("[DONE]"), "{answer:?}");
}

#[actix_web::test]
async fn the_first_byte_and_the_gaps_have_timeouts_of_their_own() {
    let rig = Rig::with("[[gateway]]\nid = \"idle\"\nauthentication = false\nidle_timeout_ms = 400\n");
    let url = rig.daemon.url("/v1/acme/idle/openai/chat/completions");
    let ask = |fake: &str| {
        let request = reqwest::Client::new().post(&url).header("x-fake", fake);
        request.header("cf-aig-request-timeout", "300").header("cf-aig-fallback", "groq/m")
    };
    // A first byte that is late sends the call on; a stream that lasts longer than that is not cut by it.
    let late = Answer::of(ask("delay=1500").json(&question("q"))).await;
    assert_eq!(late.header("cf-aig-provider"), "groq", "{late:?}");
    rig.upstream.clear();
    let long = Answer::of(ask("chunks=10; gap=100").json(&streamed("q"))).await;
    assert!(long.text.contains("[DONE]") && long.header("cf-aig-provider") == "openai", "{long:?}");
    let stalled = Answer::of(ask("chunks=10; gap=1; hang-after=3").json(&streamed("q"))).await;
    assert!(stalled.text.contains("between two chunks"), "{stalled:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_chain_ends_at_the_engine_of_this_process() {
    let rig = Rig::with(
        "[[gateway]]\nid = \"safe\"\nfallback = [\"anthropic/claude-x\", \"workers-ai/@cf/meta/llama-3.2-1b-instruct\"]\n",
    );
    let url = rig.daemon.url("/v1/acme/safe/compat/chat/completions");
    let ask = || {
        let request = reqwest::Client::new().post(&url).header("cf-aig-authorization", "secret");
        request.json(
            &json!({ "model": "openai/gpt-4o", "max_tokens": 5, "messages": [{ "role": "user", "content": "q" }] }),
        )
    };
    rig.upstream.script("/openai", ["500"]);
    let second = Answer::of(ask()).await;
    assert_eq!(
        (second.status, second.header("cf-aig-provider"), second.header("cf-aig-step")),
        (200, "anthropic", "1"),
        "{second:?}"
    );
    assert_eq!(second.json()["object"], "chat.completion");
    rig.upstream.script("/openai", ["503"]);
    rig.upstream.script("/anthropic", ["529"]);
    let last = Answer::of(ask()).await;
    assert_eq!(
        (last.status, last.header("cf-aig-provider"), last.header("cf-aig-step")),
        (200, "workers-ai", "2"),
        "{last:?}"
    );
    assert_eq!(last.json()["object"], "chat.completion");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_target_that_keeps_failing_rests_and_comes_back() {
    let rig = Rig::start();
    let policy = neurond::fallback::Policy { consecutive: 3, rest_ms: 400, ..Default::default() };
    rig.daemon.services.relays.fallback.reconfigure(policy).await.unwrap();
    let ask = async || Answer::of(rig.chat(&[("cf-aig-fallback", "groq/m")], &question("q"))).await;
    rig.upstream.script("/openai", ["500", "500", "500"]);
    for _ in 0..3 {
        assert_eq!(ask().await.header("cf-aig-provider"), "groq");
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let resting = ask().await;
    assert_eq!(resting.header("cf-aig-attempts"), "openai/gpt-4o-mini=resting, groq/m=200");
    let metrics = rig.daemon.get("/metrics").await;
    assert!(
        metrics.text.contains("neurond_breakers_open{provider=\"openai\"} 1"),
        "{}",
        metrics.text.lines().filter(|line| line.contains("breakers")).collect::<Vec<_>>().join("\n")
    );
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(ask().await.header("cf-aig-provider"), "openai", "its rest is over");
}
