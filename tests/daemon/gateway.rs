//! A gateway in a process of its own: reloads under load, and what it holds while it serves.
//!
//! The load comes from a thread of its own, so that it goes on while a test waits for the log.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::{Daemon, Setup, field, sim};
use crate::upstream::Upstream;

const RELOADS: usize = 20;
/// Calls at once.
const AT_ONCE: usize = 16;
/// How long the soak lasts, in seconds, where this variable does not say.
const SOAK: (&str, u64) = ("NEUROND_SOAK_SECONDS", 5);
/// A soak shorter than this says nothing about memory: caches and pools are still filling.
const TELLING: Duration = Duration::from_secs(60);

#[actix::test]
async fn twenty_reloads_under_load_fail_no_request_and_a_broken_file_changes_nothing() {
    let upstreams = [Upstream::start(), Upstream::start()];
    // Another upstream and another cache each time: providers and gateways both change.
    let config = |round: usize| config(&upstreams[round % 2], &format!("cache_ttl = {}\n", 60 + round));
    let mut daemon = House::start(&config(0));
    let load = Load::start(&daemon.base);
    for round in 1..=RELOADS {
        let answered = load.answered();
        daemon.rewrite_config(&config(round));
        daemon.signal(libc::SIGHUP);
        daemon.wait_logs("reload done", round);
        // Each state of the configuration serves some calls.
        load.wait_for(answered + 2 * AT_ONCE as u64);
    }
    let broken = config(1).replace("cache_ttl = 61", "cache_ttl = \"long\"");
    daemon.rewrite_config(&broken);
    daemon.signal(libc::SIGHUP);
    let refused = daemon.wait_log("reload refused; the configuration in force stays");
    assert!(field(&refused, "error").as_str().unwrap().contains("cache_ttl"), "{refused}");
    // The last good file named the first upstream. Calls that began before it may still be on their way to the other.
    let settled = (0..10).any(|_| {
        let before = upstreams.each_ref().map(Upstream::count);
        load.wait_for(load.answered() + 4 * AT_ONCE as u64);
        let after = upstreams.each_ref().map(Upstream::count);
        after[0] > before[0] && after[1] == before[1]
    });
    assert!(settled, "the broken file changed who is asked");
    let (answered, failed) = load.stop();
    assert!(failed.is_empty(), "{} of {answered}: {failed:?}", failed.len());
    assert!(upstreams.iter().all(|upstream| upstream.count() > 0));
    assert_eq!(daemon.metric(r#"neurond_config_reloads_total{outcome="applied"}"#).await, RELOADS as f64);
}

/// What must come back whole, again and again, until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Vec<String>>,
}

impl Load {
    fn start(base: &str) -> Self {
        let (stop, answered) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let (over, count, base) = (stop.clone(), answered.clone(), base.to_owned());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let client = reqwest::Client::new();
            let caller = async |caller: usize| {
                let mut failed = Vec::new();
                let mut number = caller;
                while !over.load(Ordering::Relaxed) {
                    number += AT_ONCE;
                    match whole(&client, &base, number).await {
                        Ok(()) => count.fetch_add(1, Ordering::Relaxed),
                        Err(why) => {
                            failed.push(why);
                            0
                        }
                    };
                }
                failed
            };
            runtime.block_on(join_all((0..AT_ONCE).map(caller))).concat()
        });
        Self { stop, answered, thread }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn wait_for(&self, answered: u64) {
        let began = Instant::now();
        while self.answered() < answered {
            assert!(began.elapsed() < crate::harness::PATIENCE, "{} answered, not {answered}", self.answered());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many calls were answered, and what went wrong with others.
    fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        (self.answered.load(Ordering::Relaxed), self.thread.join().unwrap())
    }
}

/// One call, which must be answered to its end.
async fn whole(client: &reqwest::Client, base: &str, number: usize) -> Result<(), String> {
    let stream = number % 2 == 1;
    let request = client.post(url(base, number)).header("x-fake", "chunks=6; gap=2").json(&body(number, stream));
    let response = request.send().await.map_err(|error| format!("{number}: {error:?}"))?;
    let status = response.status();
    let text = response.text().await.map_err(|error| format!("{number}: {error:?}"))?;
    let end = if stream { "[DONE]" } else { "\"usage\"" };
    if status != 200 || !text.contains(end) || text.contains("\"error\"") {
        return Err(format!("{number}: {status} {text}"));
    }
    Ok(())
}

#[actix::test]
async fn a_hundred_megabytes_pass_without_being_held() {
    const LONG: usize = 100 << 20;
    const ROOM: u64 = 60 << 20;
    let upstream = Upstream::start();
    // What is read whole, to be translated, has a bound of its own, and so has what the cache holds of an answer on its way.
    let config = config(&upstream, "").replace("[upstream]\n", "[upstream]\nmax_answer_bytes = \"8MiB\"\n");
    let config = format!("{config}[cache]\nmax_entry_bytes = \"8MiB\"\n");
    let daemon = House::start(&config);
    let client = reqwest::Client::new();
    let ask = |number: usize, ttl: &str| {
        let request = client.post(url(&daemon.base, number)).header("x-fake", "huge=100m");
        request.header("cf-aig-cache-ttl", ttl).json(&body(number, false))
    };
    // So that what every call needs is there already.
    for number in 0..8 {
        whole(&client, &daemon.base, number).await.unwrap();
    }
    let before = memory(&daemon, "VmHWM");
    // A provider's own call, and the same with an answer that would be kept if it were not too large.
    for ttl in ["0", "60"] {
        let mut chunks = ask(0, ttl).send().await.unwrap().bytes_stream();
        let mut bytes = 0;
        while let Some(chunk) = chunks.next().await {
            bytes += chunk.unwrap().len();
        }
        assert_eq!(bytes, LONG, "ttl {ttl}");
    }
    // In other words than the provider's: refused at the bound, and the upstream hears it.
    let refused = ask(2, "0").send().await.unwrap();
    assert_eq!(refused.status(), 502, "{}", refused.text().await.unwrap());
    let cut = upstream.until_closed_early(1).await[0].closed_early.unwrap();
    assert!(cut.chunks * (64 << 10) < LONG / 2, "{cut:?}");
    let grown = memory(&daemon, "VmHWM") - before;
    println!("grown by {} MiB at most", grown >> 20);
    assert!(grown < ROOM, "{} MiB", grown >> 20);
}

#[actix::test]
async fn a_soak_with_streams_aborted_at_random_leaves_memory_flat_and_nothing_open() {
    let seconds = std::env::var(SOAK.0).ok().and_then(|text| text.parse().ok()).unwrap_or(SOAK.1);
    let (upstream, whole) = (Upstream::start(), Duration::from_secs(seconds));
    let daemon = House::start(&config(&upstream, "cache_ttl = 60\n"));
    let began = Instant::now();
    let client = reqwest::Client::new();
    let caller = async |caller: usize| {
        let (mut chance, mut calls, mut heard) = (Chance(caller as u64 + 1), 0u64, 0u64);
        while began.elapsed() < whole {
            calls += 1;
            heard += u64::from(troubled(&client, &daemon.base, &mut chance).await);
            if calls.is_multiple_of(64) {
                // What it remembers of requests is not the daemon's to hold, but this process's.
                upstream.clear();
            }
        }
        (calls, heard)
    };
    // The highest of each third: a segment of records grows until it is full and begins anew, so one moment says little.
    let watch = async {
        let mut highest = [0; 3];
        while began.elapsed() < whole {
            let third = &mut highest[((began.elapsed().as_secs_f64() * 3.0 / whole.as_secs_f64()) as usize).min(2)];
            *third = memory(&daemon, "VmRSS").max(*third);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        highest
    };
    let (calls, highest) = futures_util::future::join(join_all((0..2 * AT_ONCE).map(caller)), watch).await;
    let heard: u64 = calls.iter().map(|(_, heard)| heard).sum();
    let calls: u64 = calls.iter().map(|(calls, _)| calls).sum();
    drop(client);
    let began = Instant::now();
    loop {
        let left = open(&daemon, &upstream).await;
        if left.is_none() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("{calls} calls in {seconds} s: {:?} MiB at most in each third", highest.map(|bytes| bytes >> 20));
    let mut ended = 0.0;
    for outcome in ["done", "failed", "cancelled", "refused"] {
        ended += daemon.metric(&format!("neurond_gateway_calls_total{{outcome=\"{outcome}\"}}")).await;
    }
    // Who leaves before all of its request was read has asked nothing.
    assert!(
        (heard as f64..=calls as f64).contains(&ended),
        "{ended} records of {calls} calls, {heard} of them answered"
    );
    if whole >= TELLING {
        let [_, middle, last] = highest;
        assert!(last as f64 <= middle as f64 * 1.1, "{middle} bytes at most in the second third, {last} in the last");
    }
}

/// One call with whatever fault chance chooses, left at a moment that it chooses too. Whether an answer began.
async fn troubled(client: &reqwest::Client, base: &str, chance: &mut Chance) -> bool {
    let faults = [
        "ok",
        "ok",
        "chunks=30; gap=3",
        "chunks=9; size=2k",
        "chunks=20; gap=1; reset-after=5",
        "hang-after=2",
        "hang",
        "429; retry-after-ms=5",
        "500",
        "garbage",
        "short=5",
        "chunks=20; close-after=9",
        "huge=30k",
        "gzip",
    ];
    let fake = faults[chance.below(faults.len())];
    let (number, stream) = (chance.below(40), chance.below(3) > 0);
    let mut request = client.post(url(base, number)).header("x-fake", fake).json(&body(number, stream));
    for (name, value) in [("cf-aig-cache-ttl", "0"), ("cf-aig-fallback", "groq/m"), ("cf-aig-max-attempts", "2")] {
        if chance.below(3) == 0 {
            request = request.header(name, value).header("cf-aig-retry-delay", "1");
        }
    }
    // Nobody waits for what hangs.
    let patience = Duration::from_millis([3, 20, 150, 600][chance.below(4)]);
    let chunks = chance.below(12);
    let mut heard = false;
    let _ = tokio::time::timeout(patience, async {
        let Ok(response) = request.send().await else { return };
        heard = true;
        let mut stream = response.bytes_stream();
        for _ in 0..chunks {
            if !matches!(stream.next().await, Some(Ok(_))) {
                return;
            }
        }
    })
    .await;
    heard
}

/// What is still open that should not be.
async fn open(daemon: &Daemon, upstream: &Upstream) -> Option<String> {
    let calls = daemon.metric("neurond_gateway_in_flight").await;
    let (kept, sockets) = (upstream.open(), sockets(daemon));
    // Every worker may keep as many as it needed at once; besides them it listens, and is being asked just now.
    let clean = calls == 0.0 && kept <= 4 * AT_ONCE && sockets <= kept + 16;
    (!clean).then(|| format!("{calls} calls, {kept} upstream connections, {sockets} sockets"))
}

/// Numbers that follow from the first one.
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

/// A daemon that keeps nothing outside its own folder.
struct House {
    daemon: Daemon,
    _state: tempfile::TempDir,
}

impl House {
    fn start(config: &str) -> Self {
        let state = tempfile::tempdir().unwrap();
        let env = [("STATE_DIRECTORY", state.path().to_str().unwrap())];
        let daemon = Daemon::start(Setup { config, env: &env });
        Self { daemon, _state: state }
    }
}

impl std::ops::Deref for House {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl std::ops::DerefMut for House {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

fn config(upstream: &Upstream, gateway: &str) -> String {
    let provider = |slug: &str| {
        format!("[[provider]]\nslug = \"{slug}\"\nbase_url = \"{}\"\nallow_private = true\n", upstream.base(slug))
    };
    let providers = ["openai", "anthropic", "google-ai-studio", "groq"].map(provider).concat();
    let model = sim(0, "");
    format!(
        "[upstream]\nmax_retry_after_ms = 50\n{providers}[[gateway]]\nid = \"g\"\nauthentication = false\n{gateway}{model}"
    )
}

/// Where the call with this number goes, and what it says.
fn url(base: &str, number: usize) -> String {
    let path = if number % 4 < 2 { "openai/chat/completions" } else { "compat/chat/completions" };
    format!("{base}/v1/test/g/{path}")
}

fn body(number: usize, stream: bool) -> Value {
    let model = ["gpt", "gpt", "anthropic/claude-x", "google-ai-studio/gemini"][number % 4];
    json!({ "model": model, "max_tokens": 50, "stream": stream, "stream_options": { "include_usage": true },
            "messages": [{ "role": "user", "content": format!("question {number}") }] })
}

/// A line of the daemon's `/proc/…/status`, in bytes.
fn memory(daemon: &Daemon, what: &str) -> u64 {
    let status = std::fs::read_to_string(proc(daemon).join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn sockets(daemon: &Daemon) -> usize {
    let open = std::fs::read_dir(proc(daemon).join("fd")).unwrap().flatten();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

fn proc(daemon: &Daemon) -> PathBuf {
    format!("/proc/{}", daemon.pid()).into()
}
