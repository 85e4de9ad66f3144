//! What each kind of caller sees of each thing that an upstream can do wrong, what it costs upstream, and that nothing of
//! it is left behind: no call, no connection, no half an answer in the cache.
//!
//!     behaviour x way of asking --> status, who, how, upstream calls
//!
//! `who` is the provider that answered, `ours` the gateway itself. `how`: `whole`; `told`, a stream that ends with an error
//! event; `cut`, a connection that breaks, where there is no other way to tell; `error`, an answer that says so. `-`: nothing is promised.

use std::fmt;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{Rig, question, streamed};
use crate::upstream::Seen;

/// How long an upstream may take to begin, and then be silent. Apart, so that it is clear which of them ends a call.
const FIRST_BYTE: Duration = Duration::from_millis(900);
const IDLE: Duration = Duration::from_millis(450);
/// The largest answer that is read whole.
const MOST: usize = 1 << 20;

/// Bytes that the fake sends at a time of a long body.
const BLOCK: usize = 64 << 10;

/// Ways of asking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// `openai` by its own path.
    Native,
    /// `anthropic` in OpenAI's words.
    Unified,
    /// `openai`, and `groq` as a second step.
    Steps,
    /// As `Native`, with the cache on.
    Kept,
    /// As `Unified`, tried twice, and `groq` behind it.
    Chain,
}

const WAYS: [Way; 5] = [Way::Native, Way::Unified, Way::Steps, Way::Kept, Way::Chain];

impl Way {
    /// Whom the behaviours are for.
    fn first(self) -> &'static str {
        if matches!(self, Self::Unified | Self::Chain) { "/anthropic" } else { "/openai" }
    }

    fn request(self, rig: &Rig, stream: bool) -> reqwest::RequestBuilder {
        let plain = if stream { streamed("a question") } else { question("a question") };
        let mut unified = plain.clone();
        unified["model"] = json!("anthropic/claude-x");
        unified["max_tokens"] = json!(50);
        let step = |provider: &str| {
            json!({ "provider": provider, "endpoint": "chat/completions", "query": plain,
                    "headers": { "authorization": "Bearer k", "content-type": "application/json" } })
        };
        let key = ("authorization", "Bearer k");
        match self {
            Self::Native => rig.chat(&[key], &plain),
            Self::Kept => rig.chat(&[key, ("cf-aig-cache-ttl", "60")], &plain),
            Self::Steps => rig.post("", &[], &json!([step("openai"), step("groq")])),
            Self::Unified => rig.post("compat/chat/completions", &[key], &unified),
            Self::Chain => {
                let again =
                    [("cf-aig-max-attempts", "2"), ("cf-aig-retry-delay", "1"), ("cf-aig-fallback", "groq/llama")];
                rig.post("compat/chat/completions", &[&[key][..], &again].concat(), &unified)
            }
        }
    }
}

#[actix_web::test]
async fn an_error_is_handed_on_or_turned_away_from() {
    check(
        false,
        "
         behaviour              | native             | unified               | steps            | kept               | chain
         429; retry-after-ms=20 | 429 openai error 1 | 429 anthropic error 1 | 200 groq whole 2 | 429 openai error 1 | 200 groq whole 3
         500                    | 500 openai error 1 | 500 anthropic error 1 | 200 groq whole 2 | 500 openai error 1 | 200 groq whole 3
        ",
    )
    .await;
}

#[actix_web::test]
async fn no_answer_at_all_is_tried_again_or_has_a_reason() {
    check(
        false,
        "
         behaviour   | native           | unified          | steps            | kept             | chain
         hang        | 504 ours error 1 | 504 ours error 1 | 200 groq whole 2 | 504 ours error 1 | 200 groq whole 3
         drip=1/60   | 504 ours error 1 | 504 ours error 1 | 200 groq whole 2 | 504 ours error 1 | 200 groq whole 3
         reset       | 502 ours error 1 | 502 ours error 1 | 200 groq whole 2 | 502 ours error 1 | 200 groq whole 3
         close-early | 502 ours error 1 | 502 ours error 1 | 200 groq whole 2 | 502 ours error 1 | 200 groq whole 3
         garbage     | 502 ours error 1 | 502 ours error 1 | 200 groq whole 2 | 502 ours error 1 | 200 groq whole 3
        ",
    )
    .await;
}

#[actix_web::test]
async fn half_an_answer_is_never_taken_for_a_whole_one() {
    check(
        false,
        "
         behaviour          | native           | unified          | steps            | kept             | chain
         hang-after=1       | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
         reset-after=1      | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
         close-after=1      | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
         half-close-after=1 | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
         bad-chunk-after=1  | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
         short=9            | 200 openai cut 1 | 502 ours error 1 | 200 openai cut 1 | 200 openai cut 1 | 200 groq whole 3
        ",
    )
    .await;
}

#[actix_web::test]
async fn what_is_no_answer_passes_as_it_is_and_is_not_translated() {
    check(
        false,
        "
         behaviour | native             | unified               | steps              | kept               | chain
         bad-json  | 200 openai whole 1 | 502 ours error 1      | 200 openai whole 1 | 200 openai whole 1 | 200 groq whole 3
         html      | 200 openai whole 1 | 502 ours error 1      | 200 openai whole 1 | 200 openai whole 1 | 200 groq whole 3
         huge=2m   | 200 openai whole 1 | 502 ours error 1      | 200 openai whole 1 | 200 openai whole 1 | 200 groq whole 3
         drip=1/0  | 200 openai whole 1 | 200 anthropic whole 1 | 200 openai whole 1 | 200 openai whole 1 | 200 anthropic whole 1
        ",
    )
    .await;
}

#[actix_web::test]
async fn a_stream_that_fails_on_the_way_says_so_and_is_tried_no_second_time() {
    check(
        true,
        "
         behaviour          | native             | unified               | steps              | kept               | chain
         hang-after=2       | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         reset-after=2      | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         close-after=2      | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         half-close-after=2 | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         bad-chunk-after=2  | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         garbage-after=2    | 200 openai whole 1 | 200 anthropic told 1  | 200 openai whole 1 | 200 openai whole 1 | 200 anthropic told 1
         error-after=2      | 200 openai told 1  | 200 anthropic told 1  | 200 openai told 1  | 200 openai told 1  | 200 anthropic told 1
         drip=1/0           | 200 openai whole 1 | 200 anthropic whole 1 | 200 openai whole 1 | 200 openai whole 1 | 200 anthropic whole 1
        ",
    )
    .await;
}

#[actix_web::test]
async fn what_is_compressed_against_ones_wish_is_not_translated() {
    let rig = Rig::start();
    for way in [Way::Unified, Way::Chain] {
        for stream in [false, true] {
            rig.upstream.script(way.first(), ["gzip", "gzip"]);
            let outcome = Outcome::of(way.request(&rig, stream)).await.to_string();
            let expected = if way == Way::Chain { "200 groq whole" } else { "502 ours error" };
            assert_eq!(outcome, expected, "{way:?}, stream: {stream}");
            let asked = rig.upstream.requests();
            assert!(asked.iter().all(|seen| seen.header("accept-encoding") == Some("identity")), "{asked:?}");
            rig.upstream.clear();
        }
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn an_answer_that_never_ends_is_cut_where_there_is_a_bound_for_all_of_it() {
    let rig = Rig::with("[[gateway]]\nid = \"brief\"\nauthentication = false\nrequest_timeout_ms = 400\n");
    let ask = |fake: &str, stream: bool| {
        let url = rig.daemon.url("/v1/acme/brief/openai/chat/completions");
        let body = if stream { streamed("q") } else { question("q") };
        reqwest::Client::new().post(url).header("x-fake", fake).json(&body)
    };
    for (fake, stream, how) in
        [("chunks=5000; gap=20", true, "told"), ("drip=1/20", false, "cut"), ("drip=9/20", true, "told")]
    {
        let outcome = Outcome::of(ask(fake, stream)).await;
        assert_eq!(outcome.to_string(), format!("200 openai {how}"), "{fake}");
        rig.upstream.until_closed_early(1).await;
        rig.upstream.clear();
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_slow_reader_holds_up_its_upstream_and_not_the_memory() {
    let rig = Rig::start();
    let key = ("authorization", "Bearer k");
    let mut unified = streamed("q");
    unified["model"] = json!("anthropic/claude-x");
    // What the sockets of two connections may take, and what the cache may on top.
    let (sockets, cached) = (30 << 20, rig.daemon.services.config.get().cache.max_entry_bytes as usize);
    for (path, fake, ttl, body, most) in [
        ("openai/chat/completions", "huge=100m", "0", question("q"), sockets),
        ("compat/chat/completions", "chunks=1600; size=64k", "0", unified, sockets),
        ("openai/chat/completions", "huge=100m", "60", question("q"), sockets + cached),
    ] {
        rig.upstream.clear();
        let request = rig.post(path, &[key, ("x-fake", fake), ("cf-aig-cache-ttl", ttl)], &body);
        let mut chunks = request.send().await.unwrap().bytes_stream();
        let mut read = 0;
        while read < 1 << 20 {
            read += chunks.next().await.unwrap().unwrap().len();
        }
        // Long enough to fill whatever fills.
        tokio::time::sleep(Duration::from_millis(600)).await;
        drop(chunks);
        let sent = rig.upstream.until_closed_early(1).await[0].closed_early.unwrap().chunks * BLOCK;
        println!("{path} {fake}, ttl {ttl}: {} MiB sent for 1 MiB read", sent >> 20);
        assert!(sent < most, "{path} {fake}, ttl {ttl}: {sent} bytes sent for {read} read");
        rig.is_clean().await;
    }
}

/// Each row in turn; the ways of a row beside each other, each with a daemon and an upstream of its own.
async fn check(stream: bool, table: &str) {
    let mut wrong = Vec::new();
    let rows = table.lines().filter(|line| line.contains('|')).skip(1);
    for row in rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>()) {
        let (fake, expected) = row.split_first().unwrap();
        let seen = join_all(WAYS.map(|way| seen(way, fake, stream))).await;
        assert_eq!(seen.len(), expected.len(), "{fake}");
        for ((way, seen), expected) in WAYS.iter().zip(seen).zip(expected) {
            if *expected != "-" && seen != *expected {
                wrong.push(format!("{fake}, {way:?}: {seen}, not {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// What one caller saw; and behind it what should not be, if anything was left behind.
async fn seen(way: Way, fake: &str, stream: bool) -> String {
    let rig = Rig::tuned(|config| {
        config.upstream.first_byte_timeout = FIRST_BYTE;
        config.upstream.idle_timeout = IDLE;
        config.upstream.max_answer_bytes = MOST;
    });
    rig.upstream.script(way.first(), [fake, fake]);
    let outcome = Outcome::of(way.request(&rig, stream)).await;
    let mut text = format!("{outcome} {}", rig.upstream.count());
    // Whatever came of it, it is over, upstream as well.
    rig.is_clean().await;
    let over = |seen: &Seen| seen.answered.is_some() || seen.closed_early.is_some();
    rig.upstream.until("let go", |seen| seen.iter().all(over)).await;

    let record = match outcome.how {
        "whole" => "done",
        _ if outcome.who == "ours" => "refused",
        _ => "failed",
    };
    for name in ["done", "failed", "cancelled", "refused"] {
        let count = rig.calls(name);
        if count != u64::from(name == record) {
            text += &format!("; {count} calls recorded as {name}");
        }
    }
    let kept = way == Way::Kept && outcome.how == "whole";
    let entries = rig.daemon.services.relays.cache.stats().await.entries;
    if entries != u64::from(kept) {
        text += &format!("; {entries} answers kept");
    }
    if way == Way::Kept {
        rig.upstream.clear();
        let again = Outcome::of(way.request(&rig, stream)).await;
        if (again.hit, again.how, rig.upstream.count()) != (kept, "whole", usize::from(!kept)) {
            text += &format!("; then {again} {}, a hit: {}", rig.upstream.count(), again.hit);
        }
    }
    text
}

/// What a caller saw.
struct Outcome {
    status: u16,
    who: String,
    how: &'static str,
    hit: bool,
}

impl Outcome {
    async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let header = |name: &str| {
            let value = response.headers().get(name).map(|value| value.to_str().unwrap());
            value.unwrap_or_default().to_owned()
        };
        let (status, mut who, hit) =
            (response.status().as_u16(), header("cf-aig-provider"), header("cf-aig-cache-status") == "HIT");
        let events = header("content-type").starts_with("text/event-stream");
        let (mut chunks, mut bytes, mut cut) = (response.bytes_stream(), Vec::new(), false);
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(_) => cut = true,
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if body["name"] == "AiGatewayError" {
            who = "ours".into();
        }
        let done = text.contains("data: [DONE]");
        let told = text.contains("\"error\":");
        let how = match (cut, events) {
            (true, _) => "cut",
            (false, true) if told => "told",
            (false, true) if !done => "without an end",
            (false, _) if status >= 400 => "error",
            (false, _) => "whole",
        };
        let how = if done && how != "whole" { "broken and yet done" } else { how };
        Self { status, who, how, hit }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.status, self.who, self.how)
    }
}
