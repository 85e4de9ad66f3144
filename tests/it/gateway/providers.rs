//! Every provider by its name: where its calls go, and that they arrive there as they were sent; and providers of one's own.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use super::world::{TRUSTED, World};
use super::{Rig, question};
use crate::harness::Answer;
use crate::upstream::Seen;

/// A call of a provider's own.
struct Row {
    slug: &'static str,
    /// `POST` where nothing is said.
    line: &'static str,
    /// The credential that a caller brings; an empty name: it is in the query.
    brought: (&'static str, &'static str),
    /// Path and query behind an address without a path.
    arrives: &'static str,
    /// Where it arrives when nobody said another address.
    own: &'static str,
}

const fn row(
    slug: &'static str,
    line: &'static str,
    brought: (&'static str, &'static str),
    arrives: &'static str,
    own: &'static str,
) -> Row {
    Row { slug, line, brought, arrives, own }
}

const BEARER: (&str, &str) = ("authorization", "Bearer k");
const SIGNED: (&str, &str) =
    ("authorization", "AWS4-HMAC-SHA256 Credential=A/1/r/bedrock/aws4_request, SignedHeaders=host, Signature=0");
const CHAT: &str = "/v1/chat/completions";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row("openai", "chat/completions?x=%20&y", BEARER, "/v1/chat/completions?x=%20&y", "api.openai.com/v1/chat/completions?x=%20&y"),
    row("openai", "v1/responses", BEARER, "/v1/responses", "api.openai.com/v1/responses"),
    row("openai", "DELETE files/f%2F1", BEARER, "/v1/files/f%2F1", "api.openai.com/v1/files/f%2F1"),
    row("anthropic", "v1/messages?beta=true", ("x-api-key", "k"), "/v1/messages?beta=true", "api.anthropic.com/v1/messages?beta=true"),
    row("anthropic", "v1/messages/count_tokens", BEARER, "/v1/messages/count_tokens", "api.anthropic.com/v1/messages/count_tokens"),
    row("google-ai-studio", "v1beta/models/gemini-x:generateContent", ("x-goog-api-key", "k"), "/v1beta/models/gemini-x:generateContent", "generativelanguage.googleapis.com/v1beta/models/gemini-x:generateContent"),
    row("google-ai-studio", "v1/models/gemini-x:streamGenerateContent?alt=sse&key=k", ("", ""), "/v1/models/gemini-x:streamGenerateContent?alt=sse&key=k", "generativelanguage.googleapis.com/v1/models/gemini-x:streamGenerateContent?alt=sse&key=k"),
    row("google", "v1beta/models/e:embedContent", ("x-goog-api-key", "k"), "/v1beta/models/e:embedContent", "generativelanguage.googleapis.com/v1beta/models/e:embedContent"),
    row("google-vertex-ai", "v1/projects/p/locations/us-central1/publishers/google/models/g:generateContent", BEARER, "/v1/projects/p/locations/us-central1/publishers/google/models/g:generateContent", "us-central1-aiplatform.googleapis.com/v1/projects/p/locations/us-central1/publishers/google/models/g:generateContent"),
    row("google-vertex-ai", "v1/projects/p/locations/global/publishers/anthropic/models/claude%40x:rawPredict", BEARER, "/v1/projects/p/locations/global/publishers/anthropic/models/claude%40x:rawPredict", "aiplatform.googleapis.com/v1/projects/p/locations/global/publishers/anthropic/models/claude%40x:rawPredict"),
    row("aws-bedrock", "bedrock-runtime/us-west-2/model/a.b-v1%3A0/invoke", SIGNED, "/model/a.b-v1%3A0/invoke", "bedrock-runtime.us-west-2.amazonaws.com/model/a.b-v1%3A0/invoke"),
    row("bedrock", "bedrock-mantle/us-east-1/anthropic/v1/messages", BEARER, "/anthropic/v1/messages", "bedrock-mantle.us-east-1.api.aws/anthropic/v1/messages"),
    row("azure-openai", "res/gpt-4o/chat/completions?api-version=1", ("api-key", "k"), "/openai/deployments/gpt-4o/chat/completions?api-version=1", "res.openai.azure.com/openai/deployments/gpt-4o/chat/completions?api-version=1"),
    row("azure", "res/emb/embeddings?api-version=1", BEARER, "/openai/deployments/emb/embeddings?api-version=1", "res.openai.azure.com/openai/deployments/emb/embeddings?api-version=1"),
    row("groq", "chat/completions", BEARER, CHAT, "api.groq.com/openai/v1/chat/completions"),
    row("mistral", "v1/chat/completions", BEARER, CHAT, "api.mistral.ai/v1/chat/completions"),
    row("mistral", "chat/completions", BEARER, CHAT, "api.mistral.ai/v1/chat/completions"),
    row("deepseek", "chat/completions", BEARER, "/chat/completions", "api.deepseek.com/chat/completions"),
    row("openrouter", "v1/chat/completions", BEARER, CHAT, "openrouter.ai/api/v1/chat/completions"),
    row("openrouter", "chat/completions", BEARER, CHAT, "openrouter.ai/api/v1/chat/completions"),
    row("cohere", "v1/chat", BEARER, "/v1/chat", "api.cohere.ai/v1/chat"),
    row("cohere", "v2/chat", ("authorization", "Token k"), "/v2/chat", "api.cohere.ai/v2/chat"),
    row("perplexity-ai", "chat/completions", BEARER, "/chat/completions", "api.perplexity.ai/chat/completions"),
    row("grok", "v1/chat/completions", BEARER, CHAT, "api.x.ai/v1/chat/completions"),
    row("xai", "chat/completions", BEARER, CHAT, "api.x.ai/v1/chat/completions"),
    row("cerebras", "chat/completions", BEARER, CHAT, "api.cerebras.ai/v1/chat/completions"),
    row("replicate", "predictions", ("authorization", "Token k"), "/v1/predictions", "api.replicate.com/v1/predictions"),
    row("replicate", "GET predictions/p1", BEARER, "/v1/predictions/p1", "api.replicate.com/v1/predictions/p1"),
    row("huggingface", "org/vit", BEARER, "/org/vit", "api-inference.huggingface.co/models/org/vit"),
    row("fireworks", "chat/completions", BEARER, CHAT, "api.fireworks.ai/inference/v1/chat/completions"),
    row("baseten", "chat/completions", BEARER, CHAT, "inference.baseten.co/v1/chat/completions"),
    row("parallel", "v1beta/search", ("x-api-key", "k"), "/v1beta/search", "api.parallel.ai/v1beta/search"),
    row("cartesia", "tts/bytes", ("x-api-key", "k"), "/tts/bytes", "api.cartesia.ai/tts/bytes"),
    row("deepgram", "v1/listen?model=nova", ("authorization", "Token k"), "/v1/listen?model=nova", "api.deepgram.com/v1/listen?model=nova"),
    row("elevenlabs", "v1/text-to-speech/v", ("xi-api-key", "k"), "/v1/text-to-speech/v", "api.elevenlabs.io/v1/text-to-speech/v"),
    row("fal", "fal-ai/flux/dev", ("authorization", "Key k"), "/fal-ai/flux/dev", "fal.run/fal-ai/flux/dev"),
    row("ideogram", "generate", ("api-key", "k"), "/generate", "api.ideogram.ai/generate"),
    row("adobe-firefly", "PUT v3/images", BEARER, "/v3/images", "firefly-api.adobe.io/v3/images"),
];

impl Row {
    fn call(&self) -> (Method, String) {
        let (method, rest) = self.line.split_once(' ').unwrap_or(("POST", self.line));
        (method.parse().unwrap(), format!("{}/{rest}", self.slug))
    }

    /// Neither JSON nor text, and not read by anybody here.
    fn body(&self) -> Vec<u8> {
        if self.line.starts_with("GET") { Vec::new() } else { b"{\"model\" : 1.50e+3\0\xff\xfe".to_vec() }
    }

    fn headers(&self) -> Vec<(&'static str, &'static str)> {
        let mut headers = vec![
            ("accept", "*/*"),
            ("accept-encoding", "gzip"),
            ("content-type", "application/x-odd; a=1"),
            ("user-agent", "theirs/1"),
            ("x-request-id", "their own"),
            ("x-stainless-lang", "none"),
        ];
        headers.extend((!self.brought.0.is_empty()).then_some(self.brought));
        headers
    }

    /// Checks what came, at a host and below a path.
    fn arrived(&self, seen: &Seen, host: &str, target: &str) {
        let Self { slug, line, .. } = self;
        let query = seen.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        assert_eq!(format!("{}{query}", seen.path), target, "{slug} {line}");
        assert_eq!((seen.method.as_str(), &seen.body[..]), (self.call().0.as_str(), &self.body()[..]), "{slug} {line}");
        let length = self.body().len().to_string();
        let mut expected = BTreeSet::from([("host", host)]);
        expected.extend(self.headers());
        if !self.line.starts_with("GET") {
            expected.insert(("content-length", &length));
        }
        let names: Vec<String> = seen.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        let have: BTreeSet<_> =
            names.iter().zip(&seen.headers).map(|(name, (_, value))| (name.as_str(), value.as_str())).collect();
        assert_eq!((have.len(), &have), (names.len(), &expected), "{slug} {line}");
    }
}

/// Sent with each call, and nobody else's business.
const OURS: [(&str, &str); 5] = [
    TRUSTED,
    ("cf-aig-metadata", "{\"a\":1}"),
    ("cf-aig-event-id", "e1"),
    ("cf-aig-unknown", "x"),
    ("cf-cache-ttl", "0"),
];

#[actix_web::test]
async fn calls_of_every_provider_arrive_as_sent_at_the_address_that_was_put_in_its_place() {
    let slugs: BTreeSet<&str> = ROWS.iter().map(|row| canonical(row.slug)).collect();
    let blocks = slugs.iter().map(|slug| {
        format!("[[provider]]\nslug = \"{slug}\"\naccount = \"acme\"\nbase_url = \"{{upstream}}/at/{slug}\"\nallow_private = true\n")
    });
    let rig = Rig::with(&blocks.collect::<String>());
    for row in ROWS {
        let (method, path) = row.call();
        let request = [&row.headers()[..], &OURS]
            .concat()
            .iter()
            .fold(rig.request(method, &path), |request, (name, value)| request.header(*name, *value));
        let answer = Answer::of(request.body(row.body())).await;
        let seen = rig.upstream.requests().pop().unwrap_or_else(|| panic!("{path}: {answer:?}"));
        rig.upstream.clear();
        row.arrived(&seen, &rig.upstream.address.to_string(), &format!("/at/{}{}", canonical(row.slug), row.arrives));
        assert_eq!(answer.header("cf-aig-provider"), row.slug, "{path}: {answer:?}");
        assert_eq!(answer.header("cf-aig-event-id"), "e1", "{path}: {answer:?}");
    }
}

#[actix_web::test]
async fn calls_of_every_provider_arrive_as_sent_at_its_own_address_over_tls() {
    let world = World::with(&[], "");
    for row in ROWS {
        let (method, path) = row.call();
        let headers = [&row.headers()[..], &OURS].concat();
        Answer::of(world.request(method, &path, &headers).body(row.body())).await;
        let (host, _) = row.own.split_once('/').unwrap();
        row.arrived(&world.heard_one(), host, &row.own[host.len()..]);
        assert!(world.tunnel.asked().contains(&format!("{host}:443")), "{path}: {:?}", world.tunnel.asked());
    }
}

#[actix_web::test]
async fn every_provider_of_the_list_is_in_the_table() {
    let rows: BTreeSet<&str> = ROWS.iter().map(|row| canonical(row.slug)).collect();
    let all = neurond::provider::all().iter().map(|provider| provider.slug);
    // That one is served here.
    let missing: Vec<&str> = all.filter(|slug| *slug != "workers-ai" && !rows.contains(slug)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn canonical(slug: &'static str) -> &'static str {
    neurond::provider::find(slug).unwrap().slug
}

#[actix_web::test]
async fn a_stored_key_rides_where_each_provider_looks_for_it() {
    let rows = [
        ("openai", "v1/models", vec![BEARER]),
        ("anthropic", "v1/models", vec![("x-api-key", "k")]),
        ("google-ai-studio", "v1beta/models", vec![("x-goog-api-key", "k")]),
        ("google-vertex-ai", "v1/projects/p/locations/us-central1/endpoints", vec![BEARER]),
        ("aws-bedrock", "bedrock-runtime/us-east-1/async-invoke", vec![BEARER]),
        ("azure-openai", "res/d/models", vec![("api-key", "k")]),
        ("groq", "models", vec![BEARER]),
        ("mistral", "models", vec![BEARER]),
        ("deepseek", "models", vec![BEARER]),
        ("openrouter", "models", vec![BEARER]),
        ("cohere", "v1/models", vec![BEARER]),
        ("perplexity-ai", "models", vec![BEARER]),
        ("grok", "models", vec![BEARER]),
        ("cerebras", "models", vec![BEARER]),
        ("replicate", "predictions", vec![BEARER]),
        ("huggingface", "org/vit", vec![BEARER]),
        ("fireworks", "models", vec![BEARER]),
        ("baseten", "models", vec![BEARER]),
        ("parallel", "v1/tasks", vec![BEARER, ("x-api-key", "k")]),
        ("cartesia", "voices", vec![("x-api-key", "k")]),
        ("deepgram", "v1/projects", vec![("authorization", "Token k")]),
        ("elevenlabs", "v1/voices", vec![("xi-api-key", "k")]),
        ("fal", "fal-ai/flux", vec![("authorization", "Key k")]),
        ("ideogram", "models", vec![("api-key", "k")]),
        ("adobe-firefly", "v3/images", vec![BEARER]),
    ];
    let keys: Vec<(&str, &str)> = rows.iter().map(|(slug, ..)| (*slug, "k")).collect();
    let world = World::with(&keys, "");
    let credentials = ["authorization", "api-key", "x-api-key", "x-goog-api-key", "xi-api-key"];
    for (slug, path, expected) in rows {
        for trusted in [true, false] {
            let headers = if trusted { &[TRUSTED][..] } else { &[] };
            Answer::of(world.request(Method::GET, &format!("{slug}/{path}"), headers)).await;
            let seen = world.heard_one();
            let have: Vec<_> = credentials.iter().filter_map(|name| Some((*name, seen.header(name)?))).collect();
            assert_eq!(have, if trusted { expected.clone() } else { Vec::new() }, "{slug}");
        }
    }
}

#[actix_web::test]
async fn a_provider_of_ones_own_is_called_with_its_headers_and_its_stored_key() {
    let world = World::with(&[], "");
    let made = json!({ "name": "Mine", "slug": "mine", "base_url": "https://models.example.org/in/v1", "enable": true,
        "headers": { "x-tenant": "t-1", "Accept-Language": "no" } });
    let made = world.tell("custom-providers", made).await;
    assert_eq!(made["slug"], "mine", "{made}");
    assert!(!made.to_string().contains("t-1"), "headers are write-only: {made}");
    let key =
        json!({ "alias": "default", "provider_slug": "custom-mine", "default_config": true, "secret": "sk-mine" });
    world.tell("gateways/g/provider_configs", key).await;
    let mut unified = question("one two");
    unified["model"] = json!("custom-mine/org/model");
    for (path, body, arrives, headers, key) in [
        ("custom-mine/things/a%2Fb?x=1", question("q"), "/in/v1/things/a%2Fb", vec![TRUSTED], Some("Bearer sk-mine")),
        ("custom-mine/chat/completions", question("q"), "/in/v1/chat/completions", vec![BEARER], Some("Bearer k")),
        (
            "custom-mine/chat/completions",
            question("q"),
            "/in/v1/chat/completions",
            vec![TRUSTED, ("x-api-key", "k")],
            None,
        ),
        ("custom-mine/chat/completions", question("q"), "/in/v1/chat/completions", vec![], None),
        ("compat/chat/completions", unified, "/in/v1/chat/completions", vec![TRUSTED], Some("Bearer sk-mine")),
    ] {
        let answer = world.post(path, &headers, &body).await;
        let seen = world.heard_one();
        assert_eq!((seen.path.as_str(), seen.header("host")), (arrives, Some("models.example.org")), "{path}");
        assert_eq!((seen.header("authorization"), answer.header("cf-aig-provider")), (key, "custom-mine"), "{path}");
        assert_eq!((seen.header("x-tenant"), seen.header("accept-language")), (Some("t-1"), Some("no")), "{path}");
        let model: Value = if path.starts_with("compat") { json!("org/model") } else { body["model"].clone() };
        assert_eq!(seen.json()["model"], model, "{path}");
        assert_eq!(seen.headers.iter().filter(|(name, _)| name.starts_with("cf-")).count(), 0, "{path}");
    }
}
