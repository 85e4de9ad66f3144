//! Daemons that find each other's cached answers through a store.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fleet::Store;
use crate::harness::{Daemon, PATIENCE, Setup, sim};
use crate::upstream::Upstream;

/// SHA-256 of `secret`: only who shows a token makes a gateway by calling it.
const SECRET: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
/// What the store may take: long enough for a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_millis(2000);

fn config(store: &Store, upstream: &Upstream, gateway: &str) -> String {
    format!(
        "[[auth.token]]\nid = \"ops\"\naccount = \"test\"\nsha256 = \"{SECRET}\"\n\
         [fleet]\nurl = \"redis://127.0.0.1:{}\"\ncache = true\ntimeout_ms = {}\n\
         [[provider]]\nslug = \"openai\"\nbase_url = \"{}\"\nallow_private = true\n\
         [[gateway]]\nid = \"g\"\nauthentication = false\ncache_ttl = 600\n{gateway}{}",
        store.port,
        TIMEOUT.as_millis(),
        upstream.base("openai"),
        sim(0, "")
    )
}

fn start(config: &str) -> Daemon {
    let mut daemon = Daemon::start(Setup { config, env: &[] });
    daemon.wait_log("the fleet's store answers: cached answers are shared");
    daemon
}

struct Told {
    status: u16,
    cache: String,
    kind: String,
    text: String,
    took: Duration,
}

/// Makes a gateway by the API, or tells it the same again, which empties it.
async fn told(daemon: &Daemon, is_new: bool) {
    let fields = json!({ "id": "made", "authentication": false, "cache_invalidate_on_update": true, "cache_ttl": 600,
                         "collect_logs": false, "rate_limiting_interval": 0, "rate_limiting_limit": 0 });
    let url = format!("{}/client/v4/accounts/test/ai-gateway/gateways", daemon.base);
    let client = reqwest::Client::new();
    let request = if is_new { client.post(url) } else { client.put(format!("{url}/made")) };
    let response = request.bearer_auth("secret").json(&fields).send().await.unwrap();
    assert!(response.status().is_success(), "{}", response.text().await.unwrap());
}

async fn ask(daemon: &Daemon, gateway: &str, question: &str, stream: bool) -> Told {
    let body: Value = json!({ "model": "gpt", "stream": stream, "stream_options": { "include_usage": true },
                              "messages": [{ "role": "user", "content": question }] });
    let url = format!("{}/v1/test/{gateway}/openai/chat/completions", daemon.base);
    let began = Instant::now();
    let request =
        reqwest::Client::new().post(url).header("cf-aig-cache-ttl", "600").header("x-fake", "chunks=4; gap=2");
    let request = request.header("cf-aig-authorization", "Bearer secret");
    let response = request.json(&body).send().await.unwrap();
    let header = |name: &str| response.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    let (cache, kind, status) = (header("cf-aig-cache-status"), header("content-type"), response.status().as_u16());
    let text = response.text().await.unwrap();
    Told { status, cache, kind, text, took: began.elapsed() }
}

async fn until(daemon: &Daemon, outcome: &str, count: f64) {
    let (series, began) = (format!("neurond_cache_shared_total{{outcome=\"{outcome}\"}}"), Instant::now());
    while daemon.metric(&series).await < count {
        assert!(began.elapsed() < PATIENCE, "{outcome}: {count}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[actix::test]
async fn an_answer_of_one_daemon_is_a_hit_of_another_and_a_store_that_hangs_slows_nobody_down() {
    let (mut store, upstream) = (Store::start(), Upstream::start());
    let config_of = |gateway: &str| config(&store, &upstream, gateway);
    let file = config_of("");
    let (mut one, mut other) = (start(&file), start(&file));
    for daemon in [&one, &other] {
        told(daemon, true).await;
        assert_eq!(ask(daemon, "default", "make it", false).await.cache, "MISS", "it is as old as its first call");
    }
    // What was asked before a gateway was made, as far as clocks can tell, is not for it.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for (at, gateway) in ["g", "made", "default"].into_iter().enumerate() {
        for stream in [false, true] {
            let calls = upstream.count();
            let told = ask(&one, gateway, "what is shared?", stream).await;
            assert_eq!((told.status, told.cache.as_str()), (200, "MISS"), "{}", told.text);
            until(&one, "sent", (2 * at + 2 + usize::from(stream)) as f64).await;
            let again = ask(&other, gateway, "what is shared?", stream).await;
            assert_eq!((again.status, again.cache.as_str()), (200, "HIT"), "{gateway} {stream}");
            assert_eq!((again.kind, again.text), (told.kind.clone(), told.text), "{gateway} {stream}");
            assert_eq!(told.kind.starts_with("text/event-stream"), stream);
            assert_eq!(upstream.count(), calls + 1, "{gateway} {stream}");
        }
    }
    assert_eq!(other.metric(r#"neurond_cache_shared_total{outcome="hit"}"#).await, 6.0);

    // Emptied, a gateway takes nothing of before from others either, and what comes later again.
    told(&other, false).await;
    assert_eq!(ask(&other, "made", "what is shared?", true).await.cache, "MISS");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    ask(&one, "made", "later", true).await;
    until(&one, "sent", 8.0).await;
    assert_eq!(ask(&other, "made", "later", true).await.cache, "HIT");

    // Another set of rules, another gateway.
    let strict = start(&config_of("cache_invalidate_on_update = true\nretry_max_attempts = 2\n"));
    assert_eq!(ask(&strict, "g", "what is shared?", false).await.cache, "MISS");
    drop(strict);

    store.signal(libc::SIGSTOP);
    let first = ask(&other, "g", "hanging", false).await;
    assert_eq!((first.status, first.cache.as_str()), (200, "MISS"));
    other.wait_log("the fleet's store does not answer: cached answers are not shared");
    let began = Instant::now();
    for question in 0..20 {
        let told = ask(&other, "g", &format!("hanging {question}"), false).await;
        assert_eq!((told.status, told.cache.as_str()), (200, "MISS"));
        assert!(told.took < TIMEOUT, "{question}: {:?}", told.took);
    }
    println!("20 misses beside a store that hangs: {:?}", began.elapsed());
    one.wait_log("the fleet's store does not answer: cached answers are not shared");
    store.signal(libc::SIGCONT);
    for daemon in [&mut one, &mut other] {
        daemon.wait_logs("the fleet's store answers: cached answers are shared", 2);
    }
    ask(&other, "g", "back", false).await;
    until(&other, "sent", 3.0).await;
    assert_eq!(ask(&one, "g", "back", false).await.cache, "HIT");

    // Killed, and back empty.
    store.kill();
    other.wait_logs("the fleet's store does not answer: cached answers are not shared", 2);
    assert_eq!(ask(&other, "g", "gone", false).await.status, 200);
    store.again();
    other.wait_logs("the fleet's store answers: cached answers are shared", 3);
    for mut daemon in [one, other] {
        daemon.signal(libc::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0));
    }
}
