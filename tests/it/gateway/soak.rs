//! Many calls at once, with every fault there is: each client has one outcome, and nothing is left over: no call, no
//! socket, no thread.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use serde_json::json;

use super::{Rig, question, streamed};
use crate::harness::Answer;

const CALLS: usize = 10_000;
const AT_ONCE: usize = 64;
/// Connections to the upstream that may be kept for the next call: each worker keeps what it needed at once.
const KEPT: usize = 2 * AT_ONCE;
/// Set in the process that a test has for itself.
const ALONE: &str = "NEUROND_TEST_ALONE";

#[actix_web::test]
async fn ten_thousand_calls_with_faults_end_once_each_and_leave_nothing() {
    // Sockets and threads are a process's: beside other tests nobody could say whose they are.
    if std::env::var_os(ALONE).is_none() {
        return alone("gateway::soak::ten_thousand_calls_with_faults_end_once_each_and_leave_nothing");
    }
    let mut rig = Rig::start();
    // What every call needs is there from now on: workers start with their first one.
    join_all((0..AT_ONCE).map(|_| Answer::of(rig.chat(&[], &question("warm"))))).await;
    rig.client = reqwest::Client::new();
    let metrics = rig.daemon.services.metrics.clone();
    let at_rest =
        |rig: &Rig| rig.upstream.open() as i64 == metrics.upstream_idle.get() && metrics.http_connections.get() == 0;
    until(|| at_rest(&rig).then_some(()).ok_or("the first calls are not over".into())).await;
    // Both ends of the connections to the upstream are in this process.
    let (sockets_before, threads_before) = (sockets() - 2 * rig.upstream.open(), threads());
    let policy = neurond::fallback::Policy { consecutive: 10, rest_ms: 50, ..Default::default() };
    rig.daemon.services.relays.fallback.reconfigure(policy).await.unwrap();
    let (answered, broken, left) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let one = async |number: usize| {
        let text = format!("question {}", number % 97);
        let (path, mut body) = match number % 5 {
            0 => ("openai/chat/completions", question(&text)),
            1 => ("openai/chat/completions", streamed(&text)),
            2 => (
                "compat/chat/completions",
                json!({ "model": "anthropic/claude-x", "max_tokens": 20, "messages": [{ "role": "user", "content": text }] }),
            ),
            3 => (
                "compat/chat/completions",
                json!({ "model": "google-ai-studio/gemini", "stream": true, "messages": [{ "role": "user", "content": text }] }),
            ),
            _ => (
                "workers-ai/v1/chat/completions",
                json!({ "model": "@cf/meta/llama-3.2-1b-instruct", "max_tokens": 3, "messages": [{ "role": "user", "content": text }] }),
            ),
        };
        body["user"] = json!(format!("u{}", number % 13));
        let fake = match number % 11 {
            0 => "429; retry-after-ms=5",
            1 => "500",
            2 => "reset",
            3 => "chunks=20; gap=1; reset-after=5",
            4 => "chunks=20; gap=2",
            5 => "garbage",
            6 => "short=5",
            7 => "gzip",
            _ => "ok",
        };
        let token = if number % 5 == 4 { "Bearer secret" } else { "Bearer k" };
        let mut headers = vec![("authorization", token), ("x-fake", fake), ("cf-aig-retry-delay", "1")];
        if number.is_multiple_of(3) {
            headers.push(("cf-aig-cache-ttl", "60"));
        }
        if number.is_multiple_of(4) {
            headers.push(("cf-aig-max-attempts", "2"));
        }
        if number.is_multiple_of(7) {
            headers.push(("cf-aig-fallback", "groq/m"));
        }
        let request = rig.post(path, &headers, &body);
        // Some leave before, some in the middle.
        if number.is_multiple_of(17) {
            let _ = tokio::time::timeout(Duration::from_millis(2), request.send()).await;
            left.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Ok(response) = request.send().await else {
            broken.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let mut chunks = response.bytes_stream();
        if number.is_multiple_of(19) {
            let _ = chunks.next().await;
            left.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut whole = true;
        while let Some(chunk) = chunks.next().await {
            whole &= chunk.is_ok();
        }
        let outcome = if whole { &answered } else { &broken };
        outcome.fetch_add(1, Ordering::Relaxed);
    };
    stream::iter(0..CALLS).for_each_concurrent(AT_ONCE, one).await;
    let total = [&answered, &broken, &left].map(|count| count.load(Ordering::Relaxed));
    assert_eq!(total.iter().sum::<usize>(), CALLS, "{total:?}");
    assert!(total[0] > CALLS / 2, "{total:?}");

    // Without its client, what is left of the daemon's sockets are connections to the upstream that wait for a call.
    rig.client = reqwest::Client::new();
    let clean = || {
        let (open, sockets, threads) = (rig.upstream.open(), sockets(), threads());
        let clean = at_rest(&rig)
            && open <= KEPT
            && rig.daemon.metric("neurond_http_in_flight") == 0.0
            && sockets <= sockets_before + 2 * open
            && threads <= threads_before;
        let (waiting, clients) = (metrics.upstream_idle.get(), metrics.http_connections.get());
        let left = || {
            format!(
                "{open} upstream connections, {waiting} of them waiting; {clients} of clients; {sockets} sockets, \
                 {sockets_before} before; {threads} threads, {threads_before} before"
            )
        };
        clean.then_some(()).ok_or_else(left)
    };
    until(clean).await;
    // Only now nothing can begin any more: a request whose client has left may have been read after all others were answered.
    rig.is_clean().await;
    let health = rig.daemon.services.relays.fallback.health(neurond::base::Millis::now()).await.unwrap();
    assert!(health.iter().all(|target| target.rest != neurond::fallback::Rest::Probing), "a probe is lost: {health:?}");
    let ended: u64 = ["done", "failed", "cancelled", "refused"].iter().map(|outcome| rig.calls(outcome)).sum();
    let calls = (AT_ONCE + CALLS - total[2]) as u64..=(AT_ONCE + CALLS) as u64;
    assert!(calls.contains(&ended), "one record a call: {ended}, not {calls:?}");
}

/// Waits until nothing is left that should not be. Some threads end only when they were idle for ten seconds.
async fn until(clean: impl Fn() -> Result<(), String>) {
    let began = Instant::now();
    while let Err(left) = clean() {
        assert!(began.elapsed() < Duration::from_secs(30), "{left}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs one test in a process of its own.
fn alone(test: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Sockets that this process has open.
fn sockets() -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// Threads that this process has.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
