//! Answers that are given again.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{Rig, events, question, streamed};
use crate::harness::Answer;

const KEEP: (&str, &str) = ("cf-aig-cache-ttl", "60");

fn status(answer: &Answer) -> &str {
    answer.header("cf-aig-cache-status")
}

#[actix_web::test]
async fn an_equal_request_is_answered_from_the_cache_until_something_differs() {
    let rig = Rig::start();
    let ask = async |headers: &[(&str, &str)], body: Value| {
        let answer = Answer::of(rig.chat(headers, &body)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    };
    let first = ask(&[KEEP], question("q")).await;
    let again = ask(&[KEEP], question("q")).await;
    assert_eq!((status(&first), status(&again)), ("MISS", "HIT"));
    assert_eq!(first.text, again.text);
    assert_eq!(first.header("content-type"), again.header("content-type"));
    assert_ne!(first.header("cf-aig-log-id"), again.header("cf-aig-log-id"), "each call has a record of its own");
    for (name, headers, body) in [
        ("another question", vec![KEEP], question("r")),
        ("another key", vec![KEEP, ("authorization", "Bearer b")], question("q")),
        ("forced", vec![KEEP, ("cf-aig-skip-cache", "true")], question("q")),
        ("not asked for", vec![], question("q")),
        ("switched off", vec![("cf-aig-cache-ttl", "0")], question("q")),
    ] {
        assert_eq!(status(&ask(&headers, body).await), "MISS", "{name}");
    }
    let mut shuffled = json!({ "messages": [{ "content": "q", "role": "user" }] });
    shuffled["model"] = json!("gpt-4o-mini");
    assert_eq!(status(&ask(&[KEEP], shuffled).await), "HIT", "the order of members does not count");
    assert_eq!(status(&ask(&[("cf-cache-ttl", "60")], question("q")).await), "HIT", "the older name");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_key_of_ones_own_stands_for_the_whole_request() {
    let rig = Rig::start();
    let key = ("cf-aig-cache-key", "greeting");
    let first = Answer::of(rig.chat(&[key], &question("one"))).await;
    let again = Answer::of(rig.chat(&[key], &question("two"))).await;
    assert_eq!((status(&first), status(&again)), ("MISS", "HIT"));
    assert_eq!(first.text, again.text);
    let per_user = Answer::of(rig.chat(&[("cf-aig-cache-key", "greeting:ada")], &question("one"))).await;
    assert_eq!(status(&per_user), "MISS");
}

#[actix_web::test]
async fn accounts_do_not_see_each_others_answers() {
    let rig = Rig::with("[[gateway]]\nid = \"shared\"\ncache_per_account = false\ncache_ttl = 600\n");
    let ask = async |account: &str, gateway: &str, token: &str| {
        let url = rig.daemon.url(&format!("/v1/{account}/{gateway}/openai/chat/completions"));
        let request = reqwest::Client::new().post(url).header("cf-aig-cache-ttl", "60");
        let request = request.header("cf-aig-authorization", token).json(&question("q"));
        let answer = Answer::of(request).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        status(&answer).to_owned()
    };
    assert_eq!(ask("acme", "g", "secret").await, "MISS");
    assert_eq!(ask("bobs", "g", "other").await, "MISS");
    assert_eq!(ask("acme", "g", "secret").await, "HIT");
    assert_eq!(ask("acme", "shared", "secret").await, "MISS");
    assert_eq!(ask("acme", "shared", "secret").await, "HIT");
}

#[actix_web::test]
async fn who_has_no_token_gets_nothing_that_a_stored_key_paid_for() {
    let rig = Rig::start();
    let with = Answer::of(rig.chat(&[KEEP, ("cf-aig-authorization", "secret")], &question("q"))).await;
    let without = Answer::of(rig.chat(&[KEEP], &question("q"))).await;
    assert_eq!((status(&with), status(&without)), ("MISS", "MISS"));
}

#[actix_web::test]
async fn a_hundred_equal_requests_at_once_are_one_upstream() {
    let rig = Rig::start();
    let asks = (0..100).map(|_| Answer::of(rig.chat(&[KEEP, ("x-fake", "delay=300")], &question("same"))));
    let answers = join_all(asks).await;
    assert_eq!(rig.upstream.count(), 1);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.text == answers[0].text));
    assert_eq!(answers.iter().filter(|answer| status(answer) == "MISS").count(), 1);
    rig.is_clean().await;
}

#[actix_web::test]
async fn when_the_one_that_asks_fails_one_other_tries() {
    let rig = Rig::start();
    rig.upstream.script("/openai", ["503; delay=300", "ok; delay=100"]);
    let asks = (0..50).map(|_| Answer::of(rig.chat(&[KEEP], &question("same"))));
    let answers = join_all(asks).await;
    assert_eq!(rig.upstream.count(), 2);
    let failed = answers.iter().filter(|answer| answer.status == 503).count();
    assert_eq!((failed, answers.iter().filter(|answer| answer.status == 200).count()), (1, 49));
    // When the second fails as well, everybody hears it.
    rig.upstream.clear();
    rig.upstream.script("/openai", ["503; delay=300", "500; delay=100"]);
    let answers = join_all((0..50).map(|_| Answer::of(rig.chat(&[KEEP], &question("other"))))).await;
    assert_eq!(rig.upstream.count(), 2);
    assert!(answers.iter().all(|answer| answer.status >= 500));
    rig.is_clean().await;
}

#[actix_web::test]
async fn the_answer_comes_even_if_who_asked_first_has_left() {
    let rig = Rig::start();
    let first = rig.chat(&[KEEP, ("x-fake", "delay=600")], &question("same"));
    let first = actix_web::rt::spawn(first.send());
    while rig.upstream.open() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let second = rig.chat(&[KEEP], &question("same")).send();
    let second = actix_web::rt::spawn(second);
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.abort();
    let second = second.await.unwrap().unwrap();
    assert_eq!((second.status().as_u16(), rig.upstream.count()), (200, 1));
    // And if everybody has left, the answer is kept for who comes next.
    let alone = rig.chat(&[KEEP, ("x-fake", "delay=300")], &question("alone"));
    assert!(tokio::time::timeout(Duration::from_millis(150), alone.send()).await.is_err());
    rig.is_clean().await;
    assert_eq!(status(&Answer::of(rig.chat(&[KEEP], &question("alone"))).await), "HIT");
}

#[actix_web::test]
async fn a_stream_is_kept_and_replayed_as_a_stream() {
    let rig = Rig::start();
    let fake = ("x-fake", "chunks=8; gap=10");
    let first = Answer::of(rig.chat(&[KEEP, fake], &streamed("one two three"))).await;
    let mut replay = rig.chat(&[KEEP], &streamed("one two three")).send().await.unwrap();
    assert_eq!(replay.headers()["cf-aig-cache-status"], "HIT");
    let mut text = String::new();
    while let Some(chunk) = replay.chunk().await.unwrap() {
        text += std::str::from_utf8(&chunk).unwrap();
    }
    assert_eq!(first.text, text);
    assert_eq!(events(&first).last().unwrap().data, "[DONE]");
    // Two at once: the second reads from the first chunk on, while they come.
    let two = [0, 1].map(|_| rig.chat(&[KEEP, ("x-fake", "chunks=8; gap=40")], &streamed("together")));
    let two = join_all(two.map(Answer::of)).await;
    assert_eq!(two[0].text, two[1].text);
    assert_eq!(
        rig.upstream.requests().iter().filter(|seen| seen.json()["messages"][0]["content"] == "together").count(),
        1
    );
    rig.is_clean().await;
}

#[actix_web::test]
async fn nothing_partial_failed_or_large_is_kept() {
    let rig = Rig::start();
    for fake in [
        "500",
        "429",
        "404",
        "chunks=9; reset-after=4",
        "chunks=9; close-after=4",
        "short=3",
        "huge=30m",
        "bad-json; until-close",
    ] {
        let body = if fake.contains("after") { streamed(fake) } else { question(fake) };
        let sent = rig.chat(&[KEEP, ("x-fake", fake)], &body).send().await.unwrap();
        let mut rest = sent.bytes_stream();
        while let Some(Ok(_)) = rest.next().await {}
        rig.is_clean().await;
        let before = rig.upstream.count();
        let again = Answer::of(rig.chat(&[KEEP, ("x-fake", "ok")], &body)).await;
        // `bad-json` with a status of 200 is an answer as far as HTTP can tell.
        if !fake.starts_with("bad-json") {
            assert_eq!((status(&again), rig.upstream.count()), ("MISS", before + 1), "{fake}");
        }
    }
}
