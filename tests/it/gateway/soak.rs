//! Many calls at once, with every fault there is: each client has one outcome, and nothing is left over.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde_json::json;

use super::{Rig, question, streamed};

const CALLS: usize = 10_000;
const AT_ONCE: usize = 64;

#[actix_web::test]
async fn ten_thousand_calls_with_faults_end_once_each_and_leave_nothing() {
    let rig = Rig::start();
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
    rig.is_clean().await;
    // Every probe is back, every socket but kept ones is closed, and no task holds one.
    let health = rig.daemon.services.relays.fallback.health(neurond::base::Millis::now()).await.unwrap();
    assert!(health.iter().all(|target| target.rest != neurond::fallback::Rest::Probing), "{health:?}");
    let metrics = &rig.daemon.services.metrics;
    let (kept, began) = (512, std::time::Instant::now());
    while rig.upstream.open() > kept || metrics.http_in_flight.get() > 0 {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{} upstream sockets, {} requests",
            rig.upstream.open(),
            metrics.http_in_flight.get()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ended: u64 = ["done", "failed", "cancelled", "refused"]
        .iter()
        .map(|outcome| metrics.gateway_calls.with_label_values(&[outcome]).get())
        .sum();
    assert!(ended >= (CALLS - total[2]) as u64, "one record a call: {ended}");
}
