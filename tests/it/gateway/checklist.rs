//! What every gateway must do, one test a line. Lines that have a test elsewhere are named with it:
//!
//! | line | where |
//! | --- | --- |
//! | bytes in are bytes out | here; `passing`: a_request_passes_byte_for_byte_but_for_what_is_ours |
//! | a hang-up is heard upstream, whenever | here |
//! | a reset in the middle of a stream is told | here; every other way to break off: `misbehaving` |
//! | errors keep status, body and advice | here |
//! | equal requests at once are one | `cache`: a_hundred_equal_requests_at_once_are_one_upstream, when_the_one_that_asks_fails_one_other_tries |
//! | tenants are apart, equal bodies are not | `cache`: accounts_do_not_see_each_others_answers, an_equal_request_is_answered_from_the_cache_until_something_differs |
//! | a limit is exact over all workers | here |
//! | usage is the same in every shape | here |
//! | a reload under load fails no request; memory stays flat | `tests/daemon/gateway.rs`: they need a process of their own |
//! | what it costs | `scripts/gateway_bench.py` |

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use super::{Rig, events};
use crate::harness::{Answer, CLASSIC};

/// An upper bound for what should take milliseconds.
const SOON: Duration = Duration::from_secs(2);

/// A way to ask for a stream.
struct Surface {
    name: &'static str,
    /// Behind the gateway, or from the root if it begins with a slash.
    path: &'static str,
    body: Value,
}

impl Surface {
    fn request(&self, rig: &Rig) -> reqwest::RequestBuilder {
        let key = ("authorization", "Bearer k");
        let Some(named) = self.path.strip_prefix('/') else { return rig.post(self.path, &[key], &self.body) };
        let url = rig.daemon.url(&format!("/{named}"));
        reqwest::Client::new().post(url).bearer_auth("secret").header("cf-aig-gateway-id", "g").json(&self.body)
    }
}

/// All ways to get text in events.
fn surfaces() -> Vec<Surface> {
    let asked = json!([{ "role": "user", "content": "one two three four five six seven eight" }]);
    let chat = |model: &str| json!({ "model": model, "stream": true, "max_tokens": 100, "messages": asked });
    let text = |field: &str| json!({ "model": "openai/gpt", "stream": true, field: asked[0]["content"] });
    let google = json!({ "contents": [{ "role": "user", "parts": [{ "text": "one two three four five six" }] }] });
    let list = [
        ("chat", "openai/chat/completions", chat("gpt")),
        ("messages", "anthropic/v1/messages", chat("claude-x")),
        ("responses", "openai/responses", text("input")),
        ("completions", "openai/completions", text("prompt")),
        ("Google's stream", "google-ai-studio/v1beta/models/gemini:streamGenerateContent?alt=sse", google),
        ("chat for Anthropic", "compat/chat/completions", chat("anthropic/claude-x")),
        ("chat for Google", "compat/chat/completions", chat("google-ai-studio/gemini")),
        ("chat by token", "/client/v4/accounts/acme/ai/v1/chat/completions", chat("cohere/command-r")),
        ("messages for OpenAI", "/client/v4/accounts/acme/ai/v1/messages", chat("openai/gpt")),
        ("messages for Google", "/client/v4/accounts/acme/ai/v1/messages", chat("google-ai-studio/gemini")),
        ("responses by token", "/client/v4/accounts/acme/ai/v1/responses", text("input")),
        ("completions by token", "/client/v4/accounts/acme/ai/v1/completions", text("prompt")),
    ];
    list.into_iter().map(|(name, path, body)| Surface { name, path, body }).collect()
}

#[actix_web::test]
async fn bytes_in_are_bytes_out_but_for_the_models_name() {
    let rig = Rig::start();
    let written = |model: &str| {
        format!(
            "{{\"z\" : 1.50e+3,\t\"model\" :\"{model}\", \"unknown\":{{\"b\":1,\"a\":[ 2 ,1E2]}},\n\"n\":1.0,\
             \"messages\":[{{\"role\":\"user\",\"content\":\"\\u00e9 \\/\"}}],\"input\":\"x\",\"prompt\":\"x\"}}"
        )
    };
    let cloudflare = "/client/v4/accounts/acme/ai/v1";
    for (path, model, arrives) in [
        ("/v1/acme/g/compat/chat/completions", "openai/gpt-4o", "gpt-4o"),
        ("/v1/acme/g/compat/embeddings", "openai/small", "small"),
        (&format!("{cloudflare}/chat/completions"), "groq/llama", "llama"),
        (&format!("{cloudflare}/responses"), "openai/gpt-4o", "gpt-4o"),
        (&format!("{cloudflare}/completions"), "mistral/large", "large"),
        (&format!("{cloudflare}/messages"), "anthropic/claude-x", "claude-x"),
    ] {
        rig.upstream.clear();
        let request = reqwest::Client::new().post(rig.daemon.url(path)).bearer_auth("secret");
        let request = request.header("cf-aig-gateway-id", "g").header("content-type", "application/json");
        let answer = Answer::of(request.body(written(model))).await;
        let seen = rig.upstream.requests().pop().unwrap_or_else(|| panic!("{path}: {answer:?}"));
        assert_eq!(String::from_utf8_lossy(&seen.body), written(arrives), "{path}: {answer:?}");
    }
    // And back: a body that is no text.
    let through = rig.request(Method::GET, "openai/bytes/100000").send().await.unwrap().bytes().await.unwrap();
    let direct = reqwest::get(rig.upstream.base("openai/v1/bytes/100000")).await.unwrap().bytes().await.unwrap();
    assert!(through.len() == 100_000 && through == direct);
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_hang_up_after_three_chunks_reaches_the_upstream_on_every_surface() {
    hang_up("chunks=1000; gap=15", 3).await;
}

#[actix_web::test]
async fn a_hang_up_before_the_first_token_reaches_the_upstream_on_every_surface() {
    hang_up("hang", 0).await;
    // The head is there, and no token.
    hang_up("pause=60000", 0).await;
}

async fn hang_up(fake: &str, after: usize) {
    let rig = Rig::start();
    let calls = |outcome: &str| rig.calls(outcome);
    let mut recorded = 0;
    for surface in surfaces() {
        let name = format!("{fake}, {}", surface.name);
        rig.upstream.clear();
        rig.upstream.script("/", [fake]);
        let asking = async {
            let mut chunks = surface.request(&rig).send().await.unwrap().bytes_stream();
            for _ in 0..after {
                chunks.next().await.unwrap().unwrap();
            }
            if after == 0 {
                chunks.next().await;
                panic!("{name}: a token");
            }
            // Dropped only when the clock has been read.
            (Instant::now(), chunks)
        };
        let left = if after == 0 {
            // Whatever may come has come by then.
            let arrived = async {
                rig.upstream.until("asked", |seen| seen.len() == 1).await;
                tokio::time::sleep(Duration::from_millis(60)).await;
            };
            tokio::select! {
                _ = asking => unreachable!("{name}"),
                () = arrived => Instant::now(),
            }
        } else {
            let (left, chunks) = asking.await;
            drop(chunks);
            left
        };
        let cut = rig.upstream.until_closed_early(1).await.remove(0).closed_early.unwrap();
        let taken = cut.at.saturating_duration_since(left);
        println!("{name}: heard after {taken:?}");
        assert!(taken < SOON, "{name}: heard after {taken:?}");
        rig.is_clean().await;
        recorded += 1;
        let counted = ["cancelled", "done", "failed", "refused"].map(calls);
        assert_eq!(counted, [recorded, 0, 0, 0], "{name}: one record");
        assert_eq!(rig.upstream.count(), 1, "{name}");
    }
}

#[actix_web::test]
async fn a_hang_up_frees_the_engines_slot_and_its_reservation() {
    let rig = Rig::tuned(|config| {
        for model in &mut config.models {
            model.path = "sim:end_in=0,step_us=10000".into();
        }
    });
    let running = format!(r#"neurond_running{{device="0",model="{CLASSIC}"}}"#);
    let asked = json!([{ "role": "user", "content": "x" }]);
    let chat = json!({ "model": CLASSIC, "stream": true, "max_tokens": 1500, "messages": asked });
    let text = |field: &str| json!({ "model": CLASSIC, "stream": true, "max_tokens": 1500, field: "x" });
    let compat =
        json!({ "model": format!("workers-ai/{CLASSIC}"), "stream": true, "max_tokens": 1500, "messages": asked });
    let reserved = async || {
        let (account, now) = (neurond::base::AccountId::new("acme"), neurond::base::Millis::now());
        rig.daemon.services.gateway.ledger.totals(&account, now).unwrap().reserved.to_string()
    };
    let nothing = reserved().await;
    for (path, body) in [
        ("workers-ai/v1/chat/completions", chat),
        ("workers-ai/v1/completions", text("prompt")),
        ("workers-ai/v1/responses", text("input")),
        ("compat/chat/completions", compat),
    ] {
        let request = rig.post(path, &[("authorization", "Bearer secret"), ("cf-aig-authorization", "secret")], &body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}: {}", response.text().await.unwrap());
        let mut chunks = response.bytes_stream();
        for _ in 0..3 {
            chunks.next().await.unwrap().unwrap();
        }
        assert_eq!(rig.daemon.metric(&running), 1.0, "{path}");
        assert_ne!(reserved().await, nothing, "{path}");
        drop(chunks);
        rig.daemon.eventually("the slot is free", |daemon| daemon.metric(&running) == 0.0).await;
        rig.is_clean().await;
        let began = Instant::now();
        while reserved().await != nothing {
            assert!(began.elapsed() < SOON, "{path}: {} is still reserved", reserved().await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[actix_web::test]
async fn an_upstream_reset_after_four_chunks_is_told_on_every_surface_and_not_kept() {
    let rig = Rig::start();
    let calls = |outcome: &str| rig.calls(outcome);
    for (at, surface) in surfaces().into_iter().enumerate() {
        let name = surface.name;
        let ask = || surface.request(&rig).header("cf-aig-cache-ttl", "60");
        rig.upstream.clear();
        rig.upstream.script("/", ["chunks=20; reset-after=4"]);
        let broken = Answer::of(ask()).await;
        let last = events(&broken).pop().unwrap();
        let data: Value = serde_json::from_str(&last.data).unwrap_or_else(|_| panic!("{name}: {broken:?}"));
        assert!(data["error"]["message"].is_string(), "{name}: {broken:?}");
        let anthropic = name.starts_with("messages");
        assert_eq!(last.name.as_deref(), anthropic.then_some("error"), "{name}: {broken:?}");
        for end in ["[DONE]", "\"stop\"", "end_turn", "message_stop", "\"STOP\"", "response.completed"] {
            assert!(!broken.text.contains(end), "{name}: {end} in {}", broken.text);
        }
        rig.is_clean().await;
        assert_eq!((calls("failed"), calls("done")), (at as u64 + 1, at as u64), "{name}");
        let again = Answer::of(ask()).await;
        assert_eq!((again.header("cf-aig-cache-status"), rig.upstream.count()), ("MISS", 2), "{name}: {again:?}");
    }
    // What is no stream of events has no other way to tell than to break off as well.
    let contents = json!({ "contents": [{ "role": "user", "parts": [{ "text": "one two three four five" }] }] });
    let converse = json!({ "messages": [{ "role": "user", "content": [{ "text": "one two three four five" }] }] });
    for (path, body) in [
        ("google-ai-studio/v1beta/models/gemini:streamGenerateContent", contents),
        ("aws-bedrock/bedrock-runtime/us-east-1/model/m/converse-stream", converse),
    ] {
        rig.upstream.script("/", ["chunks=20; reset-after=4"]);
        let response = rig.post(path, &[("authorization", "Bearer k")], &body).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert!(response.bytes().await.is_err(), "{path}");
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn errors_without_a_fallback_keep_status_body_and_advice() {
    let rig = Rig::start();
    let asked = json!([{ "role": "user", "content": "x" }]);
    let chat = |model: &str| json!({ "model": model, "max_tokens": 9, "messages": asked });
    let messages = "/client/v4/accounts/acme/ai/v1/messages";
    for (path, body, upstream) in [
        ("openai/chat/completions", chat("gpt"), Some("openai/v1/chat/completions")),
        ("anthropic/v1/messages", chat("claude-x"), Some("anthropic/v1/messages")),
        (
            "google-ai-studio/v1beta/models/m:generateContent",
            json!({}),
            Some("google-ai-studio/v1beta/models/m:generateContent"),
        ),
        ("cohere/v2/chat", chat("command-r"), Some("cohere/v2/chat")),
        ("compat/chat/completions", chat("openai/gpt"), Some("openai/v1/chat/completions")),
        // In other words than the provider's.
        ("compat/chat/completions", chat("anthropic/claude-x"), None),
        (messages, chat("openai/gpt"), None),
    ] {
        for (fake, status, name, value) in
            [("503; retry-after=3", 503, "retry-after", "3"), ("429; retry-after-ms=70", 429, "retry-after-ms", "70")]
        {
            rig.upstream.script("/", [fake]);
            let surface = Surface { name: "", path, body: body.clone() };
            let answer = Answer::of(surface.request(&rig)).await;
            assert_eq!((answer.status, answer.header(name)), (status, value), "{path}: {answer:?}");
            let Some(upstream) = upstream else { continue };
            rig.upstream.script("/", [fake]);
            let direct = Answer::of(reqwest::Client::new().post(rig.upstream.base(upstream)).json(&body)).await;
            assert_eq!(answer.text, direct.text, "{path}");
        }
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_limit_of_ten_lets_exactly_ten_pass_on_four_workers() {
    // A window that no clock leaves while this runs; and a minute, which carries over what was counted before it.
    for (technique, window) in [("fixed", 366 * 86400), ("sliding", 60)] {
        let folder = tempfile::tempdir().unwrap();
        let registry = folder.path().join("registry");
        let rig = Rig::made(&format!("[registry]\nfolder = {registry:?}\n"), true, |config| config.server.workers = 4);
        limited(&rig, technique, window).await;
        let body = json!({ "model": "dynamic/limited", "messages": [{ "role": "user", "content": "x" }] });
        // A connection each, so that all workers have some.
        let ask = |_| {
            let url = rig.daemon.url("/v1/acme/made/compat/chat/completions");
            Answer::of(reqwest::Client::new().post(url).header("cf-aig-authorization", "secret").json(&body))
        };
        let answers = join_all((0..200).map(ask)).await;
        let with = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
        assert_eq!((with(200), with(429), rig.upstream.count()), (10, 190, 10), "{technique}");
        let refused = answers.iter().find(|answer| answer.status == 429).unwrap();
        assert_eq!(refused.json()["internalCode"], 2003, "{refused:?}");
        assert_ne!(refused.header("retry-after"), "", "{refused:?}");
        rig.is_clean().await;
    }
}

/// A gateway `made` with a route `limited`, which lets ten calls pass.
async fn limited(rig: &Rig, technique: &str, window: u64) {
    let to = |id: &str| json!({ "elementId": id });
    let elements = json!([
        { "id": "s", "type": "start", "outputs": { "next": to("limit") } },
        { "id": "limit", "type": "rate",
          "properties": { "limitType": "count", "limit": 10, "window": window, "technique": technique },
          "outputs": { "success": to("model"), "fallback": to("e") } },
        { "id": "model", "type": "model", "properties": { "provider": "openai", "model": "gpt" },
          "outputs": { "success": to("e"), "fallback": to("e") } },
        { "id": "e", "type": "end" },
    ]);
    let gateway = json!({ "id": "made", "cache_invalidate_on_update": false, "cache_ttl": 0, "collect_logs": true,
        "rate_limiting_interval": 0, "rate_limiting_limit": 0, "rate_limiting_technique": "fixed" });
    for (path, body) in
        [("gateways", gateway), ("gateways/made/routes", json!({ "name": "limited", "elements": elements }))]
    {
        let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai-gateway/{path}"));
        let told = Answer::of(reqwest::Client::new().post(url).bearer_auth("secret").json(&body)).await;
        assert_eq!(told.status, 200, "{told:?}");
    }
}

#[actix_web::test]
async fn usage_in_every_shape_counts_the_same_streamed_or_not() {
    let rig = Rig::start();
    let asked = json!([{ "role": "user", "content": "one two three four" }]);
    let chat =
        json!({ "model": "m", "messages": asked, "max_tokens": 100, "stream_options": { "include_usage": true } });
    let other = |model: &str| json!({ "model": model, "messages": asked, "max_tokens": 100 });
    let text = |field: &str| json!({ "model": "m", field: "one two three four" });
    let contents = json!({ "contents": [{ "role": "user", "parts": [{ "text": "one two three four" }] }] });
    let converse = json!({ "messages": [{ "role": "user", "content": [{ "text": "one two three four" }] }] });
    let google = "google-ai-studio/v1beta/models/m";
    let bedrock = "aws-bedrock/bedrock-runtime/us-east-1/model/m";
    let messages = "/client/v4/accounts/acme/ai/v1/messages";
    let same = |path: &str, body: Value| (path.to_owned(), path.to_owned(), body);
    let shapes = [
        same("openai/chat/completions", chat.clone()),
        same("openai/completions", text("prompt")),
        same("openai/responses", text("input")),
        same("azure-openai/res/m/chat/completions", chat),
        // These tell without being asked to, each at a place of its own.
        same("mistral/v1/chat/completions", other("m")),
        same("groq/chat/completions", other("m")),
        same("anthropic/v1/messages", other("m")),
        same("cohere/v2/chat", other("m")),
        (format!("{google}:generateContent"), format!("{google}:streamGenerateContent?alt=sse"), contents.clone()),
        (format!("{google}:generateContent"), format!("{google}:streamGenerateContent"), contents),
        (format!("{bedrock}/converse"), format!("{bedrock}/converse-stream"), converse),
        (format!("{bedrock}/invoke"), format!("{bedrock}/invoke-with-response-stream"), other("m")),
        same("compat/chat/completions", other("openai/m")),
        same("compat/chat/completions", other("anthropic/m")),
        same("compat/chat/completions", other("google-ai-studio/m")),
        same("compat/chat/completions", other("cohere/m")),
        same(messages, other("openai/m")),
        same(messages, other("google-ai-studio/m")),
    ];
    let counted = || {
        let providers =
            ["openai", "azure-openai", "mistral", "groq", "anthropic", "cohere", "google-ai-studio", "aws-bedrock"];
        let sum = |kind: &str| providers.map(|provider| rig.tokens(provider, kind)).iter().sum();
        ["prompt", "cached", "completion"].map(sum)
    };
    let mut wrong = Vec::new();
    for (whole, streamed, mut body) in shapes {
        let asks = [
            (&whole, false, "cached=2"),
            (&streamed, true, "cached=2"),
            (&whole, false, "cached=2; gzip"),
            (&streamed, true, "cached=2; gzip"),
        ];
        // What is translated is not asked for in a compressed form.
        let translated = whole.starts_with("compat") || whole == messages;
        for (path, stream, fake) in asks.into_iter().take(if translated { 2 } else { 4 }) {
            body["stream"] = json!(stream);
            rig.upstream.script("/", [fake]);
            let before: [u64; 3] = counted();
            let surface = Surface { name: "", path: path.clone().leak(), body: body.clone() };
            let response = surface.request(&rig).header("accept-encoding", "gzip").send().await.unwrap();
            let status = response.status();
            response.bytes().await.unwrap();
            rig.is_clean().await;
            let after = counted();
            let used = [0, 1, 2].map(|at| after[at] - before[at]);
            // The fake says who it is, for which model, that it `heard:`, and what.
            if (status.as_u16(), used) != (200, [4, 2, 7]) {
                wrong.push(format!("{path} {} stream: {stream} {fake}: {status} {used:?}", body["model"]));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
