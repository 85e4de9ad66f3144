//! Calls through gateways, to a fake upstream that answers as providers do and misbehaves as they do.

mod aws;
mod cache;
mod checklist;
mod clouds;
mod misbehaving;
mod opening;
mod passing;
mod providers;
mod records;
mod retry;
mod schemas;
mod sets;
mod shipping;
mod soak;
mod socket;
mod spending;
mod told;
mod tracing;
mod unified;
mod world;

use std::time::Duration;

use neurond::config::Config;
use neurond::net::sse::{Decoder, SseEvent};
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Answer, Daemon, token};
use crate::upstream::Upstream;

/// The account whose token `secret` is.
const ACCOUNT: &str = "acme";

/// A daemon in front of a fake upstream that stands for every provider.
pub struct Rig {
    pub upstream: Upstream,
    pub daemon: Daemon,
    client: reqwest::Client,
}

impl Rig {
    /// With one more text for the configuration, in which `{upstream}` is the address of the fake, and which has a gateway `g` that
    /// wants no token of its own.
    pub fn with(more: &str) -> Self {
        Self::made(more, false, |_| {})
    }

    /// With the registry's folder and master key that `more` names; without it, there are none.
    pub fn kept(more: &str) -> Self {
        Self::made(more, true, |_| {})
    }

    /// With settings that the text for all has already, or that are not written in a file.
    pub fn tuned(tune: impl FnOnce(&mut Config)) -> Self {
        Self::made("", false, tune)
    }

    fn made(more: &str, keeps: bool, tune: impl FnOnce(&mut Config)) -> Self {
        let upstream = Upstream::start();
        let mut toml = String::from("[auth]\nanonymous = \"local\"\n[upstream]\nmax_retry_after_ms = 1500\n");
        for slug in
            ["openai", "anthropic", "google-ai-studio", "cohere", "aws-bedrock", "azure-openai", "mistral", "groq"]
        {
            let base = upstream.base(slug);
            toml += &format!("[[provider]]\nslug = \"{slug}\"\nbase_url = \"{base}\"\nallow_private = true\n");
        }
        toml += "[[gateway]]\nid = \"g\"\nauthentication = false\n";
        toml += &more.replace("{upstream}", &upstream.url());
        let daemon = Daemon::written(&toml, keeps, |config| {
            config.auth.tokens = vec![token("ada", "secret", ACCOUNT), token("bob", "other", "bobs")];
            tune(config);
        });
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        Self { upstream, daemon, client }
    }

    pub fn start() -> Self {
        Self::with("")
    }

    /// A request for what follows `/v1/acme/g/`.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, self.daemon.url(&format!("/v1/{ACCOUNT}/g/{path}")))
    }

    /// A chat through `openai`'s own path.
    pub fn chat(&self, headers: &[(&str, &str)], body: &Value) -> reqwest::RequestBuilder {
        self.post("openai/chat/completions", headers, body)
    }

    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> reqwest::RequestBuilder {
        let mut request = self.request(Method::POST, path).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request
    }

    /// Calls that ended so.
    pub fn calls(&self, outcome: &str) -> u64 {
        self.daemon.metric(&format!("neurond_gateway_calls_total{{outcome=\"{outcome}\"}}")) as u64
    }

    /// Tokens of a kind that a provider is said to have used.
    pub fn tokens(&self, provider: &str, kind: &str) -> u64 {
        self.daemon.metric(&format!("neurond_upstream_tokens_total{{kind=\"{kind}\",provider=\"{provider}\"}}")) as u64
    }

    /// Waits until nothing is left over of the calls so far.
    pub async fn is_clean(&self) {
        let has_ended = |daemon: &Daemon| daemon.metric("neurond_gateway_in_flight") == 0.0;
        self.daemon.eventually("every call has ended", has_ended).await;
        let began = std::time::Instant::now();
        loop {
            let stats = self.daemon.services.relays.cache.stats().await;
            if stats.fills_open == 0 && stats.followers == 0 {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "cache tickets are left over: {stats:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

pub fn question(text: &str) -> Value {
    json!({ "model": "gpt-4o-mini", "messages": [{ "role": "user", "content": text }] })
}

pub fn streamed(text: &str) -> Value {
    json!({ "model": "gpt-4o-mini", "stream": true, "stream_options": { "include_usage": true },
            "messages": [{ "role": "user", "content": text }] })
}

/// The events of an answer.
pub fn events(answer: &Answer) -> Vec<SseEvent> {
    assert!(answer.header("content-type").starts_with("text/event-stream"), "{answer:?}");
    let (mut decoder, mut events) = (Decoder::new(1 << 20), Vec::new());
    decoder.feed(answer.text.as_bytes(), &mut events).unwrap();
    events
}

/// The text that OpenAI's chunks make.
pub fn text(events: &[SseEvent]) -> String {
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(&event.data).ok());
    chunks.filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
}
