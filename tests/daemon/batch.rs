//! A batch in line whose daemon is killed in the middle: nothing can be written, flushed or told at that moment.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Daemon, MODEL, PATIENCE, Setup, sim};

const REQUESTS: usize = 60;

/// Which requests are answered in a batch's file.
fn answered(file: &Path) -> Vec<usize> {
    let text = String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned();
    let frames = text.split(r#"{"response":{"response":{"id":"#).skip(1);
    frames.map(|frame| frame.split(',').next().unwrap().parse().unwrap()).collect()
}

async fn post(daemon: &Daemon, query: &str, body: Value) -> Value {
    let url = format!("{}/client/v4/accounts/test/ai/run/{MODEL}{query}", daemon.base);
    let answer = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    answer.json::<Value>().await.unwrap()["result"].clone()
}

#[actix::test]
async fn a_batch_goes_on_after_a_kill_and_every_request_is_answered_and_charged_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = |step_ms| {
        let state = folder.path().join("ledger");
        format!("[batch]\nfolder = {:?}\n[ledger]\nfolder = {state:?}\n{}", folder.path(), sim(step_ms, ""))
    };
    // All as long as each other, so that all cost the same.
    let request = |at: usize| json!({"prompt": format!("Story number {at:02}"), "max_tokens": 16, "temperature": 0});

    let mut daemon = Daemon::start(Setup { config: &config(3), env: &[] });
    let requests: Vec<Value> = (0..REQUESTS).map(request).collect();
    let id = post(&daemon, "?queueRequest=true", json!({ "requests": requests })).await["request_id"].clone();
    let file = folder.path().join(format!("{}.batch", id.as_str().unwrap()));
    let start = Instant::now();
    while answered(&file).len() < 10 {
        assert!(start.elapsed() < PATIENCE, "{:?}", answered(&file));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    daemon.signal(libc::SIGKILL);
    assert!(!daemon.wait_exit().success());
    let before = answered(&file);
    assert!((10..REQUESTS).contains(&before.len()), "{} were answered before", before.len());

    let daemon = Daemon::start(Setup { config: &config(0), env: &[] });
    let start = Instant::now();
    let result = loop {
        let result = post(&daemon, "", json!({ "request_id": id })).await;
        if result.get("responses").is_some() {
            break result;
        }
        assert!(start.elapsed() < PATIENCE, "{result}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let responses = result["responses"].as_array().unwrap();
    let ids: Vec<usize> = responses.iter().map(|response| response["id"].as_u64().unwrap() as usize).collect();
    assert_eq!(answered(&file), ids, "each is one line of the file");
    assert_eq!(ids.len(), REQUESTS);
    assert_eq!(BTreeSet::from_iter(&ids).len(), REQUESTS, "each once: {ids:?}");
    assert_eq!(ids[..before.len()], before, "what was answered is not answered again");

    // Only what was left was computed, and charged, by the second process; the sum of the batch has each once.
    let left = (REQUESTS - before.len()) as f64;
    assert_eq!(daemon.metric(r#"neurond_batch_requests_total{outcome="done"}"#).await, left);
    assert_eq!(daemon.metric(r#"neurond_batches{state="whole"}"#).await, 1.0);
    let all = result["usage"]["neurons"].as_f64().unwrap();
    let charged = daemon.metric(&format!("neurond_micro_neurons_total{{model=\"{MODEL}\"}}")).await / 1e6;
    assert!(all > 0.0 && (charged - all * left / REQUESTS as f64).abs() < 1e-3, "{charged} for {left} of {all}");
    assert_eq!(result["usage"]["completion_tokens"], 16 * REQUESTS);
    // The ledger has each once, of both processes.
    let usage = format!("{}/client/v4/accounts/test/ai-gateway/usage", daemon.base);
    let usage: Value = reqwest::get(usage).await.unwrap().json().await.unwrap();
    let rows = usage["result"]["rows"].as_array().unwrap();
    let requests: u64 = rows.iter().map(|row| row["requests"].as_u64().unwrap()).sum();
    assert_eq!(requests, REQUESTS as u64, "{usage}");
    assert!((usage["result"]["total_neurons"].as_f64().unwrap() - all).abs() < 1e-3, "{usage} for {all}");
    for response in responses {
        let alone = post(&daemon, "", request(response["id"].as_u64().unwrap() as usize)).await;
        assert_eq!(response["result"]["response"], alone["response"]);
    }
}
