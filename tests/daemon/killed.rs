//! A gateway that is killed under load, several times: what it answered is in its ledger and among its records.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Daemon, Setup};
use crate::upstream::Upstream;

const KILLS: usize = 4;
const CALLERS: usize = 8;
/// What is answered this long before a kill is with the system by then, on a machine that does other things as well. Five
/// milliseconds are enough for one that does not.
const WRITTEN: Duration = Duration::from_millis(1500);
/// Dollars that each call costs.
const COST: f64 = 0.5;

/// One call that was answered to its end.
struct Answered {
    log_id: String,
    at: Instant,
}

/// Calls without end until it is told to stop, or the daemon is gone.
async fn call(base: &str, caller: usize, over: &AtomicBool) -> Vec<Answered> {
    let client = reqwest::Client::new();
    let mut answered = Vec::new();
    for number in 0.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let words = format!("caller {caller} asks {number}");
        let request = client
            .post(format!("{base}/v1/test/g/openai/chat/completions"))
            .header("cf-aig-custom-cost", format!(r#"{{"total_cost":{COST}}}"#))
            .header("cf-aig-metadata", json!({ "caller": caller, "number": number }).to_string())
            .json(&json!({ "model": "gpt", "messages": [{ "role": "user", "content": words }] }));
        let Ok(response) = request.send().await else { break };
        assert_eq!(response.status(), 200);
        let log_id = response.headers()["cf-aig-log-id"].to_str().unwrap().to_owned();
        if response.bytes().await.is_ok() {
            answered.push(Answered { log_id, at: Instant::now() });
        }
    }
    answered
}

async fn manage(daemon: &Daemon, path: &str) -> Value {
    let url = format!("{}/client/v4/accounts/test/ai-gateway/{path}", daemon.base);
    let answer: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    assert_eq!(answer["success"], true, "{path}: {answer}");
    answer
}

/// How often each record is listed, by its id.
async fn records(daemon: &Daemon) -> HashMap<String, usize> {
    let mut listed = HashMap::new();
    for page in 1.. {
        let path = format!("gateways/g/logs?per_page=50&page={page}&order_by=created_at&order_by_direction=asc");
        let page = manage(daemon, &path).await;
        let page = page["result"].as_array().unwrap();
        if page.is_empty() {
            break;
        }
        page.iter().for_each(|record| *listed.entry(record["id"].as_str().unwrap().to_owned()).or_default() += 1);
    }
    listed
}

#[actix::test]
async fn what_was_answered_before_a_kill_is_charged_once_and_among_the_records() {
    let (upstream, state) = (Upstream::start(), tempfile::tempdir().unwrap());
    let config = format!(
        "[[provider]]\nslug = \"openai\"\nbase_url = \"{}\"\nallow_private = true\n[[gateway]]\nid = \"g\"\nauthentication = false\n",
        upstream.base("openai")
    );
    let env = [("STATE_DIRECTORY", state.path().to_str().unwrap())];
    let start = || Daemon::start(Setup { config: &config, env: &env });
    let (mut answered, mut begun) = (Vec::new(), 0.0);
    for kill in 0..KILLS {
        let mut daemon = start();
        let over = Arc::new(AtomicBool::new(false));
        let load = {
            let (base, over) = (daemon.base.clone(), over.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let callers = (0..CALLERS).map(|caller| call(&base, caller + kill * CALLERS, &over));
                runtime.block_on(futures_util::future::join_all(callers))
            })
        };
        std::thread::sleep(WRITTEN + Duration::from_millis(400 + 37 * kill as u64));
        let killed = Instant::now();
        daemon.signal(libc::SIGKILL);
        assert!(!daemon.wait_exit().success());
        over.store(true, Ordering::Relaxed);
        let calls: Vec<Answered> = load.join().unwrap().into_iter().flatten().collect();
        begun += (calls.len() + CALLERS) as f64;
        assert!(calls.len() > CALLERS, "{} calls are too few to say anything", calls.len());
        answered.extend(calls.into_iter().filter(|call| call.at + WRITTEN < killed));
    }
    let daemon = start();
    let listed = records(&daemon).await;
    let lost: Vec<_> = answered.iter().filter(|call| !listed.contains_key(&call.log_id)).collect();
    assert!(lost.is_empty(), "{} of {} records are lost", lost.len(), answered.len());
    assert!(listed.values().all(|times| *times == 1), "a record is listed twice");
    let usage = manage(&daemon, "usage").await;
    let rows = usage["result"]["rows"].as_array().unwrap();
    let requests: f64 = rows.iter().map(|row| row["requests"].as_f64().unwrap()).sum();
    let cost: f64 = rows.iter().map(|row| row["cost_usd"].as_f64().unwrap()).sum();
    assert!(
        (answered.len() as f64..=begun).contains(&requests),
        "{requests}, {} answered, {begun} begun",
        answered.len()
    );
    assert!((cost - requests * COST).abs() < 1e-6, "{cost} for {requests}");
    println!("{} answered in time, {requests} charged, {} listed, {begun} begun", answered.len(), listed.len());
}
