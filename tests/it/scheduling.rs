//! What callers see of the scheduler: whom a session meets, whose prefix is computed once, who goes first, who is kept out.

use std::time::{Duration, Instant};

use neurond::base::AccountId;
use neurond::config::{Account, Spill};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::{Answer, CLASSIC, Daemon, token};

const COMPLETIONS: &str = "/v1/completions";

/// A completion of so many tokens, greedy, of one account or the anonymous one, with an affinity if there is one.
fn ask(daemon: &Daemon, key: &str, affinity: &str, body: Value) -> reqwest::RequestBuilder {
    let mut request = reqwest::Client::new().post(daemon.url(COMPLETIONS));
    if !key.is_empty() {
        request = request.bearer_auth(key);
    }
    if !affinity.is_empty() {
        request = request.header("x-session-affinity", affinity);
    }
    let mut whole = json!({"model": CLASSIC, "temperature": 0});
    body.as_object().unwrap().iter().for_each(|(name, value)| whole[name] = value.clone());
    request.json(&whole)
}

/// When an answer was there, counted from a common beginning.
fn timed(begin: Instant, request: reqwest::RequestBuilder) -> JoinHandle<(Answer, Duration)> {
    tokio::spawn(async move { (Answer::of(request).await, begin.elapsed()) })
}

fn engine(daemon: &Daemon, name: &str, device: u16) -> f64 {
    daemon.metric(&format!(r#"neurond_{name}{{device="{device}",model="{CLASSIC}"}}"#))
}

#[tokio::test]
async fn a_session_stays_on_its_device_and_finds_its_prefix_there() {
    let daemon = Daemon::serving_on(2, "sim:end_in=0", |_| {});
    let mut homes = [0, 0];
    for session in 0..12 {
        let before = [0, 1].map(|device| engine(&daemon, "engine_requests_total", device));
        for turn in 1..4 {
            let prompt = format!("session {session} has said: {}", "a word, ".repeat(10 * turn));
            let answer = Answer::of(ask(&daemon, "", &format!("s{session}"), json!({"prompt": prompt}))).await;
            let cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
            assert!(turn == 1 || cached >= 80, "turn {turn} of session {session} found {cached} tokens");
        }
        let served = [0, 1].map(|device| engine(&daemon, "engine_requests_total", device) - before[device as usize]);
        assert!(served == [3.0, 0.0] || served == [0.0, 3.0], "session {session} was on both devices: {served:?}");
        homes[usize::from(served[1] > 0.0)] += 1;
    }
    assert!(homes[0] > 0 && homes[1] > 0, "all sessions share a device: {homes:?}");
}

#[tokio::test]
async fn a_prefix_that_many_ask_for_at_once_is_computed_once_and_changes_no_answer() {
    let prefix = "You are a helpful assistant. ".repeat(20);
    let prompt = |client: usize| json!({"prompt": format!("{prefix}Question {client}?"), "max_tokens": 24});
    let answers = |cache: bool| {
        let prompt = &prompt;
        async move {
            let daemon = Daemon::serving("sim:end_in=0,step_us=2000", |config| config.engine.prefix_cache = cache);
            let begin = Instant::now();
            let calls: Vec<_> = (0..8).map(|client| timed(begin, ask(&daemon, "", "", prompt(client)))).collect();
            let mut texts = Vec::new();
            for call in calls {
                texts.push(call.await.unwrap().0.json()["choices"][0]["text"].as_str().unwrap().to_owned());
            }
            (texts, engine(&daemon, "prompt_tokens_total", 0), engine(&daemon, "prefix_followed_total", 0))
        }
    };
    let (shared, computed, followed) = answers(true).await;
    let (alone, all, none) = answers(false).await;
    assert_eq!(shared, alone);
    let (whole, own) = (prefix.len() as f64, 30.0);
    assert!(computed < 1.1 * whole + 8.0 * own, "{computed} tokens computed for 8 prompts of {whole}");
    assert!(all > 8.0 * whole && none == 0.0 && followed >= 1.0, "{all} {none} {followed}");
}

#[tokio::test]
async fn a_prefix_that_had_to_leave_the_pool_comes_back_from_memory_or_disk() {
    let folder = tempfile::tempdir().unwrap();
    let story = |of: &str| json!({"prompt": format!("a story of {of}: ").repeat(40), "max_tokens": 16});
    let mut texts = Vec::new();
    for spill in [None, Some(None), Some(Some(folder.path().to_path_buf()))] {
        // 64 blocks of 16 tokens hold one of the stories, not both.
        let daemon = Daemon::serving("sim:end_in=0,blocks=64", |config| {
            for model in &mut config.models {
                model.spill = spill.clone().map(|folder| Spill { bytes: 1 << 20, folder });
            }
        });
        let mut found = Vec::new();
        for of in ["an old man", "a young cat", "an old man", "a young cat"] {
            let answer = Answer::of(ask(&daemon, "", "", story(of))).await.json();
            found.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
            texts.push(answer["choices"][0]["text"].as_str().unwrap().to_owned());
        }
        let hits = engine(&daemon, "spill_hits_total", 0);
        match spill {
            None => assert!(found[2] < 600 && hits == 0.0, "{found:?} {hits}"),
            Some(_) => assert!(found[2] > 900 && found[3] > 900 && hits > 20.0, "{found:?} {hits}"),
        }
    }
    assert!(texts.chunks(4).all(|round| round == &texts[..4]), "{texts:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file was left behind");
}

#[tokio::test]
async fn a_flood_of_one_account_does_not_keep_another_waiting() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=5000", |config| {
        config.auth.anonymous = None;
        config.auth.tokens = vec![token("flood", "flood-secret", "flood"), token("light", "light-secret", "light")];
        (config.engine.max_running, config.engine.max_queue) = (2, 4);
    });
    let begin = Instant::now();
    let long = || ask(&daemon, "flood-secret", "", json!({"prompt": "much", "max_tokens": 400}));
    let flood: Vec<_> = (0..12).map(|_| timed(begin, long())).collect();
    let full = |daemon: &Daemon| engine(daemon, "running", 0) == 2.0 && engine(daemon, "queue_depth", 0) >= 1.0;
    daemon.eventually("the batch is full and others wait", full).await;
    let light = timed(begin, ask(&daemon, "light-secret", "", json!({"prompt": "little", "max_tokens": 10})));
    let (answer, light) = light.await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let (mut served, mut refused, mut first) = (0, 0, Duration::MAX);
    for call in flood {
        let (answer, took) = call.await.unwrap();
        match answer.status {
            200 => (served, first) = (served + 1, first.min(took)),
            503 => refused += 1,
            _ => panic!("{answer:?}"),
        }
    }
    assert!(served >= 3 && served + refused == 12, "{served} served, {refused} refused");
    assert!(light < first, "a long answer was over after {first:?}, the short one after {light:?}");
    assert!(engine(&daemon, "made_way_total", 0) >= 1.0);
}

#[tokio::test]
async fn priorities_count_as_far_as_the_account_is_allowed() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=4000", |config| {
        config.engine.max_running = 1;
        config.auth.anonymous = None;
        config.auth.tokens = vec![token("may", "may-secret", "may"), token("maynot", "maynot-secret", "maynot")];
        config.accounts = vec![Account { id: AccountId::new("may"), weight: 1, priority: 20, plan: None }];
    });
    let order = async |key: &'static str, bodies: [Value; 3]| {
        let begin = Instant::now();
        // What the last round left must be seen to be over, or it would pass for the first of this one.
        let idle = |daemon: &Daemon| engine(daemon, "running", 0) == 0.0 && engine(daemon, "queue_depth", 0) == 0.0;
        daemon.eventually("nobody is left of the round before", idle).await;
        let first = timed(begin, ask(&daemon, key, "", json!({"prompt": "first", "max_tokens": 200})));
        daemon.eventually("it runs", |daemon| engine(daemon, "running", 0) == 1.0).await;
        let mut calls = Vec::new();
        for (at, mut body) in bodies.into_iter().enumerate() {
            (body["prompt"], body["max_tokens"]) = (json!("then"), json!(4));
            calls.push(timed(begin, ask(&daemon, key, "", body)));
            daemon.eventually("it waits", |daemon| engine(daemon, "queue_depth", 0) == at as f64 + 1.0).await;
        }
        first.await.unwrap();
        let mut ends = Vec::new();
        for (at, call) in calls.into_iter().enumerate() {
            ends.push((call.await.unwrap().1, at));
        }
        ends.sort();
        ends.into_iter().map(|(_, at)| at).collect::<Vec<_>>()
    };
    let tiers = [json!({"service_tier": "flex"}), json!({}), json!({"service_tier": "priority"})];
    assert_eq!(order("may-secret", tiers.clone()).await, [2, 1, 0]);
    assert_eq!(order("maynot-secret", tiers).await, [1, 2, 0], "what is not allowed counts as nothing asked");
    let numbers = [json!({"priority": 5}), json!({"priority": 0}), json!({"priority": -5})];
    assert_eq!(order("may-secret", numbers).await, [2, 1, 0], "lower is earlier");
    let wrong = Answer::of(ask(&daemon, "may-secret", "", json!({"prompt": "x", "service_tier": "gold"}))).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("service_tier")));
}
