//! Streams of status 200 that turn out to be failures before they say anything, and streams that break off later.

use serde_json::{Value, json};

use super::{Rig, events, question, streamed, text};
use crate::harness::Answer;

const TWICE: [(&str, &str); 2] = [("cf-aig-max-attempts", "2"), ("cf-aig-retry-delay", "1")];

fn asked(path: &str, model: &str) -> (String, Value) {
    let body =
        json!({ "model": model, "stream": true, "max_tokens": 50, "messages": [{ "role": "user", "content": "q" }] });
    (path.to_owned(), body)
}

#[actix_web::test]
async fn a_stream_that_fails_before_it_says_anything_is_tried_again_in_every_dialect() {
    let rig = Rig::start();
    let gemini = "google-ai-studio/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse";
    for ((path, body), fakes) in [
        (asked("openai/chat/completions", "gpt-4o-mini"), ["error-event=0/429", "error-event=3/500"]),
        (asked("openai/responses", "gpt-4o-mini"), ["error-event=2/429", "error-event=4"]),
        (asked("anthropic/v1/messages", "claude-x"), ["error-event=0", "error-event=3"]),
        (asked(gemini, "gemini"), ["error-event=0", "error-event=2"]),
        (asked("compat/chat/completions", "anthropic/claude-x"), ["error-event=2", "error-event=40"]),
        (asked("compat/chat/completions", "google-ai-studio/gemini"), ["error-event=0", "error-event=1"]),
        (asked("compat/chat/completions", "cohere/command"), ["error-event=1/500", "error-event=2"]),
    ] {
        for fake in fakes {
            rig.upstream.clear();
            rig.upstream.script("/", [fake, "ok"]);
            let answer = Answer::of(rig.post(&path, &TWICE, &body)).await;
            assert_eq!((answer.status, rig.upstream.count()), (200, 2), "{path} {fake}: {answer:?}");
            assert!(!answer.text.contains("\"error\":{"), "{path} {fake}: {answer:?}");
            assert_eq!(answer.header("cf-aig-attempts").matches('=').count(), 2, "{path} {fake}");
            let policy = neurond::fallback::Policy { consecutive: 1000, failure_rate: 1.1, ..Default::default() };
            rig.daemon.services.relays.fallback.reconfigure(policy).await.unwrap();
        }
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn what_counts_as_a_beginning_and_what_as_a_failure() {
    let rig = Rig::start();
    for (fake, trail) in [
        ("error-event=64", "openai/gpt-4o-mini=500, openai/gpt-4o-mini=200"),
        // So many are a beginning of their own.
        ("error-event=65", "openai/gpt-4o-mini=200"),
        ("close-after=0", "openai/gpt-4o-mini=broken, openai/gpt-4o-mini=200"),
        ("close-after=0; until-close", "openai/gpt-4o-mini=broken, openai/gpt-4o-mini=200"),
        ("error-event=1/400", "openai/gpt-4o-mini=400"),
        ("error-event=1/401", "openai/gpt-4o-mini=401"),
    ] {
        rig.upstream.clear();
        rig.upstream.script("/openai", [fake, "ok"]);
        let answer = Answer::of(rig.chat(&TWICE, &streamed("q"))).await;
        assert_eq!(answer.header("cf-aig-attempts"), trail, "{fake}: {answer:?}");
        let policy = neurond::fallback::Policy { consecutive: 1000, failure_rate: 1.1, ..Default::default() };
        rig.daemon.services.relays.fallback.reconfigure(policy).await.unwrap();
    }
    rig.upstream.clear();
    rig.upstream.script("/aws-bedrock", ["error-event=1/429", "ok"]);
    let frames = "aws-bedrock/bedrock-runtime/us-east-1/model/nova/converse-stream";
    let body = json!({ "messages": [{ "role": "user", "content": [{ "text": "q" }] }] });
    let answer = Answer::of(rig.post(frames, &TWICE, &body)).await;
    assert_eq!(answer.header("cf-aig-attempts"), "aws-bedrock/nova=429, aws-bedrock/nova=200", "{answer:?}");
    // An opening is no first byte.
    rig.upstream.script("/openai", ["hang-after=0"]);
    let headers = [("cf-aig-request-timeout", "300"), ("cf-aig-fallback", "groq/m")];
    let answer = Answer::of(rig.chat(&headers, &streamed("q"))).await;
    assert_eq!(answer.header("cf-aig-attempts"), "openai/gpt-4o-mini=timeout, groq/m=200", "{answer:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn another_provider_answers_for_one_that_fails_in_its_stream() {
    let rig = Rig::start();
    rig.upstream.script("/openai", ["error-event=1/503"]);
    let answer = Answer::of(rig.chat(&[("cf-aig-fallback", "groq/llama")], &streamed("q"))).await;
    assert_eq!((answer.status, answer.header("cf-aig-provider")), (200, "groq"), "{answer:?}");
    assert!(!text(&events(&answer)).is_empty());
    assert_eq!(answer.header("cf-aig-attempts"), "openai/gpt-4o-mini=503, groq/llama=200");
}

#[actix_web::test]
async fn without_anything_else_to_try_a_stream_is_handed_on_as_it_is() {
    let rig = Rig::start();
    let answer = Answer::of(rig.chat(&[("x-fake", "error-event=2/429")], &streamed("q"))).await;
    assert_eq!((answer.status, rig.upstream.count()), (200, 1), "{answer:?}");
    assert!(answer.text.contains("\"error\""), "{answer:?}");
    // The last try as well.
    rig.upstream.script("/openai", ["error-event=0/500", "error-event=2/429"]);
    let answer = Answer::of(rig.chat(&TWICE, &streamed("q"))).await;
    assert_eq!((answer.status, rig.upstream.count()), (200, 3), "{answer:?}");
    assert!(answer.text.contains("\"error\""), "{answer:?}");
}

#[actix_web::test]
async fn what_is_held_back_goes_out_byte_by_byte_as_it_came() {
    let rig = Rig::start();
    for (path, body) in [
        asked("openai/chat/completions", "gpt-4o-mini"),
        asked("openai/responses", "gpt-4o-mini"),
        asked("anthropic/v1/messages", "claude-x"),
    ] {
        let direct = Answer::of(rig.post(&path, &[("x-fake", "chunks=5")], &body)).await;
        let wary = Answer::of(rig.post(&path, &[("x-fake", "chunks=5; drip=7/1"), TWICE[0]], &body)).await;
        assert_eq!((direct.status, wary.status), (200, 200), "{wary:?}");
        let same = |answer: &Answer| {
            // Ids and times differ from call to call.
            let digits = |letter: char| if letter.is_ascii_digit() { '0' } else { letter };
            answer.text.chars().map(digits).collect::<String>()
        };
        assert_eq!(same(&direct), same(&wary), "{path}: {direct:?} {wary:?}");
    }
    // Whoever thinks for long is no failure.
    let thinking = Answer::of(rig.chat(&[("x-fake", "chunks=2; gap=1300"), TWICE[0]], &streamed("q"))).await;
    assert_eq!(thinking.header("cf-aig-attempts").matches('=').count(), 1, "{thinking:?}");
    assert!(thinking.text.contains("[DONE]"), "{thinking:?}");
}

#[actix_web::test]
async fn a_stream_that_breaks_off_says_so_once_however_many_read_it() {
    let rig = Rig::start();
    let headers = [("x-fake", "chunks=20; gap=20; reset-after=4"), ("cf-aig-cache-ttl", "60")];
    let asked = (0..3).map(|_| Answer::of(rig.chat(&headers, &streamed("q"))));
    for answer in futures_util::future::join_all(asked).await {
        assert_eq!(answer.text.matches("\"error\"").count(), 1, "{answer:?}");
        assert!(!answer.text.contains("[DONE]"), "{answer:?}");
    }
    assert_eq!(rig.upstream.count(), 1);
    rig.is_clean().await;
}

#[actix_web::test]
async fn an_answer_that_says_it_failed_is_handed_on_and_neither_kept_nor_counted_as_good() {
    let rig = Rig::start();
    let ended = |outcome: &str| rig.daemon.metric(&format!("neurond_gateway_calls_total{{outcome=\"{outcome}\"}}"));
    let frames = "aws-bedrock/bedrock-runtime/us-east-1/model/nova/converse-stream";
    let turn = json!({ "messages": [{ "role": "user", "content": [{ "text": "q" }] }] });
    let mut calls = 0.0;
    for (path, body) in [
        asked("openai/chat/completions", "gpt-4o-mini"),
        asked("openai/responses", "gpt-4o-mini"),
        asked("anthropic/v1/messages", "claude-x"),
        (frames.to_owned(), turn),
    ] {
        for ttl in ["0", "60", "60"] {
            let headers = [("x-fake", "chunks=9; error-after=3"), ("cf-aig-cache-ttl", ttl)];
            let answer = Answer::of(rig.post(&path, &headers, &body)).await;
            assert_eq!((answer.status, answer.header("cf-aig-cache-status")), (200, "MISS"), "{path}: {answer:?}");
            let words = ["\"error\":{", "\"type\":\"error\"", ":exception-type"];
            assert!(words.iter().any(|word| answer.text.contains(word)), "{path} {ttl}: {answer:?}");
            calls += 1.0;
            rig.is_clean().await;
            assert_eq!((ended("failed"), ended("done")), (calls, 0.0), "{path} {ttl}");
        }
    }
    assert_eq!(rig.upstream.count() as f64, calls);
}

#[actix_web::test]
async fn an_answer_that_a_rule_blocks_says_so_once_with_the_cache_and_without() {
    let rule = "rules = [{ name = \"secret\", pattern = 'sesame', on = \"response\" }]\n";
    let rig = Rig::with(rule);
    for cache in ["0", "60"] {
        let fake = ("x-fake", "says=open sesame and so on and so on for long enough");
        let answer = Answer::of(rig.chat(&[fake, ("cf-aig-cache-ttl", cache)], &streamed("q"))).await;
        assert_eq!(answer.text.matches("\"error\"").count(), 1, "{cache}: {answer:?}");
        assert!(answer.text.contains("secret") && !answer.text.contains("[DONE]"), "{cache}: {answer:?}");
    }
    let findings = rig.daemon.metric(r#"neurond_gateway_findings_total{action="BLOCK",check="RESPONSE"}"#);
    assert_eq!(findings, 2.0);
}

#[actix_web::test]
async fn errors_of_our_own_say_what_was_tried() {
    let rig = Rig::start();
    for cache in ["0", "60"] {
        let headers = [("cf-aig-cache-ttl", cache), ("cf-aig-fallback", "groq/llama")];
        rig.upstream.script("/openai", ["hang"]);
        let request = rig.chat(&headers, &question(cache)).header("cf-aig-request-timeout", "100");
        rig.upstream.script("/groq", ["close-early", "close-early", "close-early"]);
        let answer = Answer::of(request).await;
        assert_eq!(answer.status, 502, "{answer:?}");
        let trail = answer.header("cf-aig-attempts");
        assert!(trail.starts_with("openai/gpt-4o-mini=timeout, groq/llama="), "{answer:?}");
    }
}
