//! TERM drains, USR1 dumps, USR2 changes the log level, systemd hears of it.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::harness::{Daemon, MODEL, PATIENCE, Setup, field, sim};

/// A streamed completion as far as it is read: text pieces until `[DONE]`.
pub async fn stream(base: &str, max_tokens: u32) -> reqwest::Response {
    let body = json!({"model": MODEL, "prompt": "once upon a time", "max_tokens": max_tokens,
                      "stream": true, "ignore_eos": true, "temperature": 0});
    let response = reqwest::Client::new().post(format!("{base}/v1/completions")).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
    response
}

/// Reads a stream to its end and says how many content chunks it had and whether it ended well.
pub async fn read(response: reqwest::Response) -> (usize, bool) {
    let text = response.text().await.unwrap_or_default();
    let chunks = text.lines().filter(|line| line.starts_with("data: {")).count();
    (chunks, text.trim_end().ends_with("data: [DONE]"))
}

#[actix::test]
async fn term_lets_open_streams_end_refuses_new_ones_and_exits_with_zero() {
    let mut daemon = Daemon::start(Setup { config: &sim(10, ""), env: &[] });
    let mut open = stream(&daemon.base, 150).await.bytes_stream();
    let mut text = String::from_utf8(open.next().await.unwrap().unwrap().to_vec()).unwrap();
    daemon.signal(libc::SIGTERM);
    daemon.wait_logs("draining: no new calls, open ones may finish", 1);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let refused = reqwest::get(format!("{}/health/live", daemon.base)).await;
    assert!(refused.is_err(), "a new connection was taken while draining: {refused:?}");
    while let Some(part) = open.next().await {
        text.push_str(std::str::from_utf8(&part.unwrap()).unwrap());
    }
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[actix::test]
async fn a_second_term_cuts_off_what_is_open() {
    let mut daemon = Daemon::start(Setup { config: &sim(50, ""), env: &[] });
    let mut open = stream(&daemon.base, 1000).await.bytes_stream();
    open.next().await.unwrap().unwrap();
    daemon.signal(libc::SIGTERM);
    daemon.wait_log("draining: no new calls, open ones may finish");
    daemon.signal(libc::SIGINT);
    let started = Instant::now();
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[actix::test]
async fn usr1_dumps_every_floor_as_json() {
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &[] });
    assert!(read(stream(&daemon.base, 5).await).await.1);
    daemon.signal(libc::SIGUSR1);
    let state = daemon.wait_log("state");
    let state: Value = serde_json::from_str(field(&state, "state").as_str().unwrap()).unwrap();
    assert_eq!(state["models"], json!([MODEL]));
    assert_eq!(state["engine"]["slots"][0]["running"], 0, "{state}");
    let health = daemon.wait_log("state: the ledger's disk");
    assert!(field(&health, "health").as_str().unwrap().contains("\"fault\":null"));
    let ledger = daemon.wait_log("state: ledger");
    let row: Value = serde_json::from_str(field(&ledger, "row").as_str().unwrap()).unwrap();
    assert_eq!((&row["requests"], &row["completion_tokens"]), (&json!(1), &json!(5)), "{row}");
}

#[actix::test]
async fn usr2_cycles_the_log_filter() {
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &[] });
    for count in 1..=3 {
        daemon.signal(libc::SIGUSR2);
        daemon.wait_logs("log filter changed", count);
    }
    let filters: Vec<Value> = daemon.logged("log filter changed").iter().map(|entry| field(entry, "filter")).collect();
    assert_eq!(filters.len(), 3);
    assert!(filters.windows(2).all(|pair| pair[0] != pair[1]), "{filters:?}");
}

#[actix::test]
async fn systemd_hears_ready_reloading_watchdog_and_stopping() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let env = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "400000")];
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &env });
    let hear = |wanted: &str| {
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("never heard {wanted}: {error}"));
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if message.lines().any(|line| line.starts_with(wanted)) {
                return message;
            }
        }
    };
    hear("READY=1");
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    daemon.signal(libc::SIGHUP);
    assert!(hear("RELOADING=1").contains("MONOTONIC_USEC="));
    hear("READY=1");
    daemon.signal(libc::SIGTERM);
    hear("STOPPING=1");
    assert_eq!(daemon.wait_exit().code(), Some(0));
}
