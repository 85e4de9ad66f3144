//! Batches: at once, in line, and across a restart.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{CLASSIC, Daemon};

fn path(more: &str) -> String {
    format!("/client/v4/accounts/local/ai/run/{CLASSIC}{more}")
}

fn prompt(at: usize) -> Value {
    json!({"prompt": format!("Story number {at}"), "max_tokens": 20, "temperature": 0, "external_reference": format!("ref-{at}")})
}

/// Asks until a batch is whole.
async fn whole(daemon: &Daemon, id: &Value) -> Value {
    for _ in 0..2_000 {
        let answer = daemon.post(&path(""), json!({"request_id": id})).await;
        let result = answer.json()["result"].clone();
        if result.get("responses").is_some() {
            return result;
        }
        assert!(["queued", "running"].contains(&result["status"].as_str().unwrap()), "{result}");
        assert_eq!(result["request_id"], *id);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never whole");
}

/// What each request gets when it is sent alone.
async fn alone(daemon: &Daemon, at: usize) -> Value {
    daemon.post(&path(""), prompt(at)).await.json()["result"]["response"].clone()
}

#[tokio::test]
async fn requests_are_answered_together_and_a_bad_one_fails_alone() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let bad = json!({"prompt": "x", "temperature": 9, "external_reference": "bad"});
    let streamed = json!({"prompt": "x", "stream": true});
    let requests = json!([prompt(0), bad, prompt(2), streamed]);
    let answer = daemon.post(&path(""), json!({ "requests": requests })).await;
    let result = answer.json()["result"].clone();
    let responses = result["responses"].as_array().unwrap();
    assert_eq!(responses.len(), 4);
    for (at, response) in responses.iter().enumerate() {
        assert_eq!(response["id"], at);
        let good = at % 2 == 0;
        assert_eq!(response["success"], good, "{response}");
        if good {
            assert_eq!(response["result"]["response"], alone(&daemon, at).await);
            assert_eq!(response["external_reference"], format!("ref-{at}"));
        }
    }
    assert_eq!(responses[1]["external_reference"], "bad");
    assert!(responses[1]["error"]["message"].as_str().unwrap().contains("requests/1/temperature"), "{}", responses[1]);
    assert!(responses[3]["error"]["message"].as_str().unwrap().contains("batch"), "{}", responses[3]);
    assert_eq!(result["usage"]["completion_tokens"], 40);
    assert!(!answer.header("cf-ai-neurons").is_empty());
    let check = async |body: Value, words: &str| {
        let answer = daemon.post(&path(""), body).await;
        let errors = answer.json()["errors"].to_string();
        assert!(answer.status == 400 && errors.contains(words), "{errors}");
    };
    check(json!({"requests": [1]}), "must be an object").await;
    check(json!({"requests": [prompt(0)], "prompt": "x"}), "goes without").await;
    check(json!({"requests": vec![prompt(0); 101]}), "1 to 100").await;
}

#[tokio::test]
async fn a_batch_in_line_is_answered_when_there_is_room_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::serving("sim:end_in=0", |config| config.batches = Some(folder.path().join("deep/batches")));
    let bad = json!({"prompt": "", "external_reference": "bad"});
    let requests: Vec<Value> = (0..12).map(|at| if at == 5 { bad.clone() } else { prompt(at) }).collect();
    let queued = daemon.post(&path("?queueRequest=true"), json!({ "requests": requests })).await.json();
    assert_eq!((&queued["success"], &queued["result"]["status"]), (&json!(true), &json!("queued")));
    assert_eq!(queued["result"]["model"], CLASSIC);
    let id = &queued["result"]["request_id"];
    let result = whole(&daemon, id).await;
    let mut responses = result["responses"].as_array().unwrap().clone();
    responses.sort_by_key(|response| response["id"].as_u64());
    assert_eq!(responses.len(), 12);
    for (at, response) in responses.iter().enumerate() {
        assert_eq!((response["id"].as_u64(), response["success"].as_bool()), (Some(at as u64), Some(at != 5)));
        if at != 5 {
            assert_eq!(response["result"]["response"], alone(&daemon, at).await);
        }
    }
    assert_eq!(result["usage"]["completion_tokens"], 11 * 20);
    assert_eq!(whole(&daemon, id).await, result, "it is kept");

    let unknown = daemon.post(&path(""), json!({"request_id": "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c"})).await;
    assert_eq!(unknown.status, 404, "{}", unknown.text);
    assert_eq!(daemon.post(&path(""), json!({"request_id": "nonsense"})).await.status, 404);
    let other = format!("/client/v4/accounts/local/ai/run/{CLASSIC}?queueRequest=true");
    assert_eq!(daemon.post(&other, json!({"prompt": "x"})).await.status, 400);
}

#[tokio::test]
async fn a_batch_survives_a_restart_and_a_torn_end_of_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |sim: &str| Daemon::serving(sim, |config| config.batches = Some(folder.path().into()));
    let daemon = serve("sim:end_in=0,step_us=4000");
    let requests: Vec<Value> = (0..40).map(prompt).collect();
    let queued = daemon.post(&path("?queueRequest=true"), json!({ "requests": requests })).await.json();
    let id = queued["result"]["request_id"].clone();
    let file = folder.path().join(format!("{}.batch", id.as_str().unwrap()));
    let answered = |bytes: &[u8]| bytes.windows(10).filter(|part| part == b"\"response\"").count();
    let start = std::time::Instant::now();
    while answered(&std::fs::read(&file).unwrap()) < 2 {
        assert!(start.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(daemon);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let bytes = std::fs::read(&file).unwrap();
    assert!(!bytes.windows(7).any(|part| part == b"\"whole\""), "it was over already");
    // What a crash in the middle of a write leaves.
    std::fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
    // And one that was never promised to anybody.
    std::fs::write(folder.path().join("0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c.batch"), b"torn").unwrap();

    let daemon = serve("sim:end_in=0");
    let result = whole(&daemon, &id).await;
    let mut ids: Vec<u64> = result["responses"].as_array().unwrap().iter().map(|r| r["id"].as_u64().unwrap()).collect();
    ids.sort();
    assert_eq!(ids, (0..40).collect::<Vec<_>>(), "each once");
    for response in result["responses"].as_array().unwrap() {
        let at = response["id"].as_u64().unwrap() as usize;
        assert_eq!(response["result"]["response"], alone(&daemon, at).await);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    drop(daemon);
    let daemon = serve("sim:end_in=0");
    assert_eq!(whole(&daemon, &id).await, result, "a whole batch is kept across restarts as well");
}
