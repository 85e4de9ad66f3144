//! The management API as its clients see it: status, envelope and fields. Ids and moments are written as `ID` and `NOW`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Method, Reply};
use crate::base::AccountId;
use crate::config::gateway::Fixed;
use crate::registry::Registry;
use crate::registry::tests::{fixed, sealer};

#[path = "sets_test.rs"]
mod sets;

/// A registry, and an account that calls it.
struct Peer {
    registry: Registry,
    account: AccountId,
}

impl Peer {
    fn new(folder: &Path, fixed: Fixed) -> Self {
        let registry = Registry::start(Some(folder), fixed, sealer(folder)).unwrap();
        Self { registry, account: AccountId::new("acme") }
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Reply {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let path: Vec<_> = path.split('/').collect();
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let query: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let body = (!body.is_null()).then_some(body);
        self.registry.serve(&self.account, method, &path, &query, body, "https://gw.example/").await
    }

    /// Done well; the whole body.
    async fn good(&self, method: Method, path: &str, body: Value) -> Value {
        let reply = self.call(method, path, body).await;
        assert_eq!(reply.status, 200, "{method:?} {path}: {}", reply.body);
        assert_eq!(reply.body["success"], true);
        reply.body
    }

    /// Done well; what is in the envelope.
    async fn result(&self, method: Method, path: &str, body: Value) -> Value {
        let mut body = self.good(method, path, body).await;
        assert_eq!((&body["errors"], &body["messages"]), (&json!([]), &json!([])), "{path}");
        body["result"].take()
    }

    /// Refused with this status and code, and a message with these words.
    async fn refused(&self, method: Method, path: &str, body: Value, status: u16, code: u32, words: &str) {
        let shown = body.to_string();
        let Reply { status: is, body } = self.call(method, path, body).await;
        let message = body["errors"][0]["message"].as_str().unwrap_or_default();
        assert_eq!((is, &body["errors"][0]["code"]), (status, &json!(code)), "{method:?} {path} {shown}: {body}");
        assert!(message.contains(words), "{method:?} {path} {shown}: {message}");
        let rest = (&body["success"], &body["result"], &body["messages"]);
        assert_eq!(rest, (&json!(false), &Value::Null, &json!([])));
    }
}

use Method::{Delete, Get, Patch, Post, Put};

/// What the official client sends for a new gateway.
fn plain(id: &str) -> Value {
    json!({
        "id": id,
        "cache_invalidate_on_update": true,
        "cache_ttl": 0,
        "collect_logs": true,
        "rate_limiting_interval": 0,
        "rate_limiting_limit": 0,
    })
}

/// A route that asks one model.
pub(in crate::registry) fn elements(model: &str) -> Value {
    json!([
        { "id": "s", "type": "start", "outputs": { "next": { "elementId": "m" } } },
        {
            "id": "m",
            "type": "model",
            "properties": { "provider": "openai", "model": model, "timeout": 10000, "retries": 1 },
            "outputs": { "success": { "elementId": "e" }, "fallback": { "elementId": "e" } },
        },
        { "id": "e", "type": "end", "outputs": {} },
    ])
}

/// Ids and moments are another each time; that they are what they should be is checked here.
fn settled(mut value: Value) -> Value {
    fn walk(value: &mut Value, key: &str) {
        match value {
            Value::Object(fields) => fields.iter_mut().for_each(|(key, value)| walk(value, key)),
            Value::Array(list) => list.iter_mut().for_each(|value| walk(value, key)),
            Value::String(text) if key.ends_with("_at") => {
                text.parse::<jiff::Timestamp>().unwrap_or_else(|error| panic!("{key} = {text}: {error}"));
                *value = json!("NOW");
            }
            Value::String(text) if uuid::Uuid::try_parse(text).is_ok() => *value = json!("ID"),
            _ => {}
        }
    }
    walk(&mut value, "");
    value
}

#[actix::test]
async fn a_gateway_has_every_field_that_clients_read() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    let made = peer.result(Post, "gateways", plain("my-gateway")).await;
    let golden = json!({
        "id": "my-gateway",
        "account_id": "acme",
        "account_tag": "acme",
        "internal_id": "ID",
        "is_default": false,
        "authentication": false,
        "byok_only": false,
        "cache_invalidate_on_update": true,
        "cache_per_account": true,
        "cache_ttl": 0,
        "collect_logs": true,
        "fallback": [],
        "first_byte_timeout_ms": null,
        "guardrails": null,
        "idle_timeout_ms": null,
        "log_classification": false,
        "log_management": null,
        "log_management_strategy": null,
        "logpush": false,
        "logpush_public_key": null,
        "otel": null,
        "rate_limiting_interval": 0,
        "rate_limiting_limit": 0,
        "rate_limiting_technique": "fixed",
        "request_timeout_ms": null,
        "retry_backoff": null,
        "retry_delay": null,
        "retry_max_attempts": null,
        "rules": [],
        "schemas": null,
        "spend_limits": null,
        "store_id": null,
        "stripe": null,
        "workers_ai_billing_mode": "postpaid",
        "zdr": false,
        "created_at": "NOW",
        "modified_at": "NOW",
    });
    assert_eq!(settled(made.clone()), golden);
    assert_eq!(peer.result(Get, "gateways/my-gateway", Value::Null).await, made);
    let deleted = peer.result(Delete, "gateways/my-gateway", Value::Null).await;
    assert_eq!(deleted, made);
    peer.refused(Get, "gateways/my-gateway", Value::Null, 404, 7002, "\"my-gateway\" is not there").await;
}

#[actix::test]
async fn an_update_changes_what_it_names_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    let mut fields = plain("g");
    fields["retry_max_attempts"] = json!(3);
    fields["cache_ttl"] = json!(60);
    fields["otel"] =
        json!([{ "url": "https://o.example", "headers": { "x-key": "open-1" }, "authorization": "open-2" }]);
    let made = peer.result(Post, "gateways", fields).await;
    let shown = json!([{ "url": "https://o.example", "headers": { "x-key": "***" }, "authorization": "***" }]);
    assert_eq!(made["otel"], shown);
    let before = peer.registry.view().gateway("acme", "g").unwrap();
    // A client that is older than `retry_max_attempts`, and one that sends back what it was shown.
    peer.result(Put, "gateways/g", plain("g")).await;
    let mut whole = peer.result(Get, "gateways/g", Value::Null).await;
    assert_eq!((&whole["retry_max_attempts"], &whole["cache_ttl"]), (&json!(3), &json!(0)));
    whole["retry_max_attempts"] = Value::Null;
    let whole = peer.result(Put, "gateways/g", whole).await;
    assert_eq!(whole["retry_max_attempts"], Value::Null);
    let after = peer.registry.view().gateway("acme", "g").unwrap();
    let otel = &after.settings.otel[0];
    assert_eq!(otel.authorization.as_ref().unwrap().expose(), "open-2");
    assert_eq!(otel.headers[0].1.expose(), "open-1");
    assert!(after.generation > before.generation, "its cache is empty now");
    peer.result(Put, "gateways/g", json!({ "cache_invalidate_on_update": false })).await;
    let last = peer.registry.view().gateway("acme", "g").unwrap();
    assert_eq!(last.generation, after.generation);
    assert_eq!(before.settings.retry.max_attempts, Some(3), "a snapshot that is held stays what it was");
    let other = json!({ "otel": [{ "url": "https://other.example", "authorization": "***" }] });
    peer.refused(Put, "gateways/g", other, 400, 7001, "there is none: send it").await;
}

#[actix::test]
async fn gateways_are_listed_page_by_page_and_searched_by_id() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    for id in ["beta", "alpha", "gamma", "alphabet"] {
        peer.result(Post, "gateways", plain(id)).await;
    }
    let check = async |query: &str, ids: &[&str], info: Value| {
        let body = peer.good(Get, &format!("gateways?{query}"), Value::Null).await;
        let found: Vec<_> = body["result"].as_array().unwrap().iter().map(|gateway| gateway["id"].clone()).collect();
        assert_eq!(json!(found), json!(ids), "{query}");
        assert_eq!(body["result_info"], info, "{query}");
    };
    let info = |page: usize, per_page: usize, count: usize, total: usize, pages: usize| {
        json!({
            "page": page,
            "per_page": per_page,
            "count": count,
            "total_count": total,
            "total_pages": pages,
        })
    };
    check("", &["alpha", "alphabet", "beta", "gamma"], info(1, 20, 4, 4, 1)).await;
    check("page=2&per_page=3", &["gamma"], info(2, 3, 1, 4, 2)).await;
    check("page=3&per_page=3", &[], info(3, 3, 0, 4, 2)).await;
    check("search=ALPHA", &["alpha", "alphabet"], info(1, 20, 2, 2, 1)).await;
    for query in ["page=0", "per_page=1001", "per_page=x", "page=-1"] {
        peer.refused(Get, &format!("gateways?{query}"), Value::Null, 400, 7001, "must be from 1 to").await;
    }
}

#[actix::test]
async fn what_is_wrong_with_a_gateway_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    for key in ["id", "cache_invalidate_on_update", "cache_ttl", "collect_logs", "rate_limiting_interval"] {
        let mut fields = plain("g");
        fields.as_object_mut().unwrap().remove(key);
        peer.refused(Post, "gateways", fields, 400, 7001, &format!("'{key}' is required")).await;
    }
    for (key, value, words) in [
        ("id", json!(""), "'id' must be 1 to 64"),
        ("id", json!("x".repeat(65)), "'id' must be 1 to 64"),
        ("id", json!("a/b"), "'id' must be 1 to 64"),
        ("id", json!(7), "'id' must be 1 to 64"),
        ("cache_ttl", json!(-1), "cache_ttl = -1: is not from 0 to 2678400"),
        ("cache_ttl", json!(2_678_401), "cache_ttl"),
        ("cache_ttl", json!("60"), "cache_ttl = \"60\""),
        ("collect_logs", json!("yes"), "collect_logs = \"yes\": is neither true nor false"),
        ("log_management", json!(10_000_001), "10000 to 10000000"),
        ("log_management_strategy", json!("DELETE"), "DELETE_OLDEST"),
        ("rate_limiting_limit", json!(1.5), "rate_limiting_limit = 1.5"),
        ("rate_limiting_technique", json!("both"), "\"fixed\" or \"sliding\""),
        ("retry_max_attempts", json!(6), "1 to 5"),
        ("retry_delay", json!(5001), "0 to 5000"),
        ("retry_backoff", json!("cubic"), "exponential"),
        ("logpush_public_key", json!("short"), "16 to 1024"),
        ("otel", json!([{ "url": "x" }]), "otel[0].url"),
        ("otel", json!([{ "url": "http://10.0.0.7/", "allow_private": true }]), "otel[0].allow_private"),
        ("otel", json!([{ "url": "https://x/", "secret": "hush" }]), "otel[0].secret = \"(hidden)\""),
        ("spend_limits", json!({ "rules": vec![json!({}); 21] }), "more than 20"),
        ("guardrails", json!({ "prompt": { "S99": "BLOCK" } }), "S99"),
        ("dlp", json!({ "enabled": true, "action": "block", "profiles": [] }), "dlp.action = \"block\""),
        ("workers_ai_billing_mode", json!("free"), "postpaid"),
        ("rules", json!([{ "name": "a", "pattern": "(" }]), "does not compile"),
        ("schemas", json!({ "request": { "type": 7 } }), "schema"),
        ("fallback", json!(["gpt-4.1"]), "fallback[0]"),
    ] {
        let mut fields = plain("g");
        fields[key] = value;
        peer.refused(Post, "gateways", fields, 400, 7001, words).await;
    }
    peer.refused(Post, "gateways", json!([]), 400, 7001, "must be a JSON object").await;
    peer.refused(Post, "gateways", Value::Null, 400, 7001, "must be a JSON object").await;
    // What newer clients send and this server does not know does no harm.
    let mut fields = plain("g");
    fields["a_field_of_tomorrow"] = json!(1);
    peer.result(Post, "gateways", fields).await;
    peer.refused(Post, "gateways", plain("g"), 400, 7001, "is there already").await;
    peer.refused(Put, "gateways/g", json!({ "id": "h" }), 400, 7001, "keeps its name").await;
    peer.refused(Put, "gateways/h", json!({}), 404, 7002, "\"h\"").await;
    peer.refused(Delete, "gateways/h", Value::Null, 404, 7002, "\"h\"").await;
    peer.refused(Delete, "gateways", Value::Null, 405, 7001, "Method DELETE not available").await;
    peer.refused(Post, "gateways/g/nothing", json!({}), 404, 7000, "No route").await;
    peer.refused(Get, "nothing", Value::Null, 404, 7000, "No route").await;
}

#[actix::test]
async fn the_address_of_a_gateway_is_the_one_the_caller_used() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    peer.result(Post, "gateways", plain("g")).await;
    let url = peer.result(Get, "gateways/g/url/workers-ai", Value::Null).await;
    assert_eq!(url, "https://gw.example/v1/acme/g/workers-ai");
    assert_eq!(peer.result(Get, "gateways/g/url/universal", Value::Null).await, "https://gw.example/v1/acme/g");
    assert_eq!(peer.result(Get, "gateways/g/url", Value::Null).await, "https://gw.example/v1/acme/g");
    peer.refused(Get, "gateways/h/url/openai", Value::Null, 404, 7002, "\"h\"").await;
}

#[actix::test]
async fn what_the_file_says_can_be_read_and_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), fixed(&[("prod", None, json!({ "cache_ttl": 60 }))], &["custom-vllm"]));
    let shown = peer.result(Get, "gateways/prod", Value::Null).await;
    assert_eq!((&shown["cache_ttl"], &shown["authentication"]), (&json!(60), &json!(true)));
    let words = "is written in /etc/neurond/neurond.toml as [[gateway]]: change it there and reload";
    peer.refused(Put, "gateways/prod", json!({}), 400, 7001, words).await;
    peer.refused(Delete, "gateways/prod", Value::Null, 400, 7001, words).await;
    peer.refused(Post, "gateways", plain("prod"), 400, 7001, words).await;
    let list = peer.result(Get, "gateways", Value::Null).await;
    assert_eq!(list.as_array().unwrap().len(), 1);
    let providers = peer.result(Get, "custom-providers", Value::Null).await;
    assert_eq!((&providers[0]["slug"], &providers[0]["enable"]), (&json!("vllm"), &json!(true)));
    let path = format!("custom-providers/{}", providers[0]["id"].as_str().unwrap());
    assert_eq!(peer.result(Get, &path, Value::Null).await, providers[0]);
    peer.refused(Patch, &path, json!({ "enable": false }), 400, 7001, "as [[provider]]").await;
    peer.refused(Delete, &path, Value::Null, 400, 7001, "as [[provider]]").await;
    let taken = json!({ "name": "x", "slug": "vllm", "base_url": "https://x.example" });
    peer.refused(Post, "custom-providers", taken, 400, 7001, "as [[provider]]").await;
    // Keys and routes are the account's own.
    let key = json!({ "alias": "a", "default_config": true, "provider_slug": "openai", "secret": "sk-1" });
    peer.result(Post, "gateways/prod/provider_configs", key).await;
    assert_eq!(peer.registry.view().secret("acme", "prod", "openai", None).unwrap().secret.expose(), "sk-1");
    peer.result(Post, "gateways/prod/routes", json!({ "name": "r", "elements": elements("m") })).await;
    assert!(peer.registry.view().route("acme", "prod", "r").is_some());
}

#[actix::test]
async fn custom_providers_come_and_go_and_their_headers_stay_hidden() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    let fields = json!({ "name": "Mine", "slug": "mine", "base_url": "https://mine.example/v1/", "headers": "{\"X-Key\":\"hush\"}" });
    let made = peer.result(Post, "custom-providers", fields.clone()).await;
    let golden = json!({
        "id": "ID",
        "name": "Mine",
        "slug": "mine",
        "base_url": "https://mine.example/v1/",
        "enable": false,
        "beta": false,
        "headers": "{\"x-key\":\"***\"}",
        "created_at": "NOW",
        "modified_at": "NOW",
    });
    assert_eq!(settled(made.clone()), golden);
    assert!(peer.registry.view().custom("acme", "mine").is_none(), "switched off until somebody switches it on");
    let path = format!("custom-providers/{}", made["id"].as_str().unwrap());
    let change = json!({
        "enable": true,
        "description": "ours",
        "headers": { "x-key": "***", "x-more": "psst" },
        "position": 3,
    });
    let changed = peer.result(Patch, &path, change).await;
    assert_eq!((&changed["description"], &changed["position"]), (&json!("ours"), &json!(3)));
    let custom = peer.registry.view().custom("acme", "mine").unwrap();
    assert_eq!((custom.base_url.as_str(), custom.allow_private), ("https://mine.example/v1", false));
    let headers: Vec<_> = custom.headers.iter().map(|(name, value)| format!("{name}={}", value.expose())).collect();
    assert_eq!(headers, ["x-key=hush", "x-more=psst"]);
    peer.result(Patch, &path, json!({ "description": null })).await;
    let later = peer.registry.view().custom("acme", "mine").unwrap();
    assert!(later.generation > custom.generation, "answers of before are forgotten");
    for (query, count) in
        [("search=MIN", 1), ("search=none", 0), ("enable=true", 1), ("enable=false", 0), ("beta=true", 0)]
    {
        let body = peer.good(Get, &format!("custom-providers?{query}"), Value::Null).await;
        assert_eq!(body["result_info"]["total_count"], count, "{query}");
    }
    peer.refused(Post, "custom-providers", fields, 400, 7001, "'slug' must be one that no other").await;
    assert_eq!(peer.result(Delete, &path, Value::Null).await["slug"], "mine");
    assert!(peer.registry.view().custom("acme", "mine").is_none());
    peer.refused(Get, &path, Value::Null, 404, 7002, "custom provider").await;
    peer.refused(Get, "custom-providers/none", Value::Null, 404, 7002, "\"none\"").await;
    for (key, value, words) in [
        ("name", Value::Null, "'name' is required"),
        ("slug", json!("custom-x"), "goes in front by itself"),
        ("slug", json!("a b"), "letters"),
        ("base_url", json!("http://x.example"), "https://"),
        ("base_url", json!("https://user:hush@x.example"), "without credentials"),
        ("enable", json!("yes"), "true or false"),
        ("headers", json!("x-key: hush"), "must be a JSON object"),
        ("headers", json!({ "host": "hush" }), "must not set host"),
        ("headers", json!({ "a b": "hush" }), "names that HTTP allows"),
        ("headers", json!({ "x": "hush\r\ny: z" }), "printable"),
        ("headers", json!({ "x": "***" }), "there is no x"),
        ("description", json!(7), "'description' must be a text"),
        ("position", json!(1.5), "whole number"),
    ] {
        let mut fields = json!({ "name": "x", "slug": "x", "base_url": "https://x.example" });
        fields[key] = value;
        let reply = peer.call(Post, "custom-providers", fields.clone()).await;
        assert!(!reply.body.to_string().contains("hush"), "{}", reply.body);
        peer.refused(Post, "custom-providers", fields, 400, 7001, words).await;
    }
}

#[actix::test]
async fn a_stored_key_goes_in_and_never_comes_out() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    peer.result(Post, "gateways", plain("g")).await;
    let path = "gateways/g/provider_configs";
    let key = |alias: &str, default: bool, secret: &str| {
        json!({
            "alias": alias,
            "default_config": default,
            "provider_slug": "google",
            "secret": secret,
            "rate_limit": 10,
            "rate_limit_period": 60,
        })
    };
    let made = peer.result(Post, path, key("first", true, "sk-0123456789abcdefWXYZ")).await;
    let golden = json!({
        "id": "ID",
        "alias": "first",
        "provider_slug": "google-ai-studio",
        "gateway_id": "g",
        "default_config": true,
        "secret_id": "ID",
        "secret_preview": "***WXYZ",
        "created_at": "NOW",
        "modified_at": "NOW",
        "rate_limit": 10.0,
        "rate_limit_period": 60.0,
    });
    assert_eq!(settled(made.clone()), golden);
    let is = |alias: Option<&str>, wanted: Option<&str>| {
        let found = peer.registry.view().secret("acme", "g", "google-ai-studio", alias);
        assert_eq!(found.as_ref().map(|key| key.secret.expose().as_str()), wanted, "{alias:?}");
    };
    is(None, Some("sk-0123456789abcdefWXYZ"));
    is(Some("default"), Some("sk-0123456789abcdefWXYZ"));
    let second = peer.result(Post, path, key("default", false, "sk-2")).await;
    is(None, Some("sk-0123456789abcdefWXYZ"));
    is(Some("default"), Some("sk-2"));
    is(Some("first"), Some("sk-0123456789abcdefWXYZ"));
    is(Some("none"), None);
    let first = format!("{path}/{}", made["id"].as_str().unwrap());
    // Another name, the same secret; nobody is the default now, so the alias `default` is.
    let renamed = peer.result(Put, &first, json!({ "alias": "renamed", "default_config": false })).await;
    assert_eq!((&renamed["id"], &renamed["secret_id"]), (&made["id"], &made["secret_id"]));
    is(Some("renamed"), Some("sk-0123456789abcdefWXYZ"));
    is(Some("first"), None);
    is(None, Some("sk-2"));
    let rotated =
        peer.result(Put, &first, json!({ "secret": "sk-3", "default_config": true, "rate_limit": null })).await;
    assert_ne!(rotated["secret_id"], made["secret_id"]);
    assert!(rotated.get("rate_limit").is_none());
    is(None, Some("sk-3"));
    // Another gateway may use the same secret by its id.
    peer.result(Post, "gateways", plain("h")).await;
    let same =
        json!({ "alias": "a", "default_config": true, "provider_slug": "openai", "secret_id": second["secret_id"] });
    peer.result(Post, "gateways/h/provider_configs", same).await;
    assert_eq!(peer.registry.view().secret("acme", "h", "openai", None).unwrap().secret.expose(), "sk-2");
    let list = peer.good(Get, path, Value::Null).await;
    assert_eq!(list["result_info"]["total_count"], 2);
    assert_eq!(peer.result(Get, &first, Value::Null).await["alias"], "renamed");
    peer.result(Delete, &first, Value::Null).await;
    is(None, Some("sk-2"));
    peer.refused(Delete, &first, Value::Null, 404, 7002, "provider config").await;
    for (key, value, words) in [
        ("alias", Value::Null, "'alias' is required"),
        ("alias", json!("a b"), "'alias' must be 1 to 64"),
        ("alias", json!("default"), "is there already"),
        ("provider_slug", json!("opnai"), "'provider_slug' must be the slug"),
        ("secret", Value::Null, "'secret' is required"),
        ("secret", json!(""), "'secret' must be a text of 1 to"),
        ("secret", json!("sk-4\nsk-5"), "on one line"),
        ("secret", json!(7), "must be a text"),
        ("rate_limit", json!(0), "above 0"),
    ] {
        let mut fields = key_with("x");
        fields[key] = value;
        peer.refused(Post, path, fields, 400, 7001, words).await;
    }
    peer.refused(Get, "gateways/none/provider_configs", Value::Null, 404, 7002, "\"none\"").await;
    // A secret that is JSON is kept on one line.
    let bedrock = json!({ "alias": "a", "provider_slug": "bedrock", "secret": "{\n \"accessKeyId\": \"AK\"\n}" });
    let shown = peer.result(Post, path, bedrock).await;
    assert_eq!(shown["secret_preview"], "***");
    let kept = peer.registry.view().secret("acme", "g", "aws-bedrock", Some("a")).unwrap();
    assert_eq!(kept.secret.expose(), "{\"accessKeyId\":\"AK\"}");
}

fn key_with(alias: &str) -> Value {
    json!({ "alias": alias, "default_config": false, "provider_slug": "google-ai-studio", "secret": "sk-4" })
}

#[actix::test]
async fn routes_answer_in_the_odd_shapes_that_clients_read() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    peer.result(Post, "gateways", plain("g")).await;
    let path = "gateways/g/routes";
    let made = peer.result(Post, path, json!({ "name": "support", "elements": elements("gpt-4.1") })).await;
    let version = |active: &str| {
        json!({
            "version_id": "ID",
            "data": elements("gpt-4.1").to_string(),
            "active": active,
            "is_valid": true,
            "created_at": "NOW",
        })
    };
    let deployment = json!({ "deployment_id": "ID", "version_id": "ID", "created_at": "NOW" });
    let golden = json!({
        "id": "ID",
        "name": "support",
        "gateway_id": "g",
        "account_tag": "acme",
        "elements": elements("gpt-4.1"),
        "created_at": "NOW",
        "modified_at": "NOW",
        "version": version("true"),
        "deployment": deployment.clone(),
    });
    assert_eq!(settled(made.clone()), golden);
    let route = format!("{path}/{}", made["id"].as_str().unwrap());
    assert_eq!(peer.result(Get, &route, Value::Null).await, made);
    let list = peer.good(Get, path, Value::Null).await;
    let page = |name: &str, list: Value| {
        let mut data = json!({ "order_by": "created_at", "order_by_direction": "desc", "page": 1, "per_page": 20 });
        data[name] = list;
        json!({ "success": true, "data": data })
    };
    assert_eq!(settled(list), page("routes", json!([golden])));
    let renamed = peer.good(Patch, &route, json!({ "name": "Customer support" })).await;
    assert_eq!(renamed["route"]["name"], "Customer support");
    assert_eq!(renamed.as_object().unwrap().keys().collect::<Vec<_>>(), ["success", "route"]);
    assert!(peer.registry.view().route("acme", "g", "support").is_none());
    // A new version is a draft until it is deployed.
    let draft = peer
        .result(Post, &format!("{route}/versions"), json!({ "elements": elements("gpt-5"), "comment": "new" }))
        .await;
    assert_eq!((&draft["elements"], &draft["id"]), (&elements("gpt-5"), &made["id"]));
    let in_force = |peer: &Peer| peer.registry.view().route("acme", "g", "Customer support").unwrap().version.clone();
    assert_eq!(json!(in_force(&peer)), made["version"]["version_id"]);
    let versions = peer.good(Get, &format!("{route}/versions"), Value::Null).await;
    let [newest, oldest] = &versions["data"]["versions"].as_array().unwrap()[..] else { panic!("{versions}") };
    assert_eq!(
        (&newest["active"], &newest["comment"], &oldest["active"]),
        (&json!("false"), &json!("new"), &json!("true"))
    );
    let id = newest["version_id"].as_str().unwrap();
    let got = peer.result(Get, &format!("{route}/versions/{id}"), Value::Null).await;
    for key in [
        "id",
        "active",
        "created_at",
        "data",
        "elements",
        "gateway_id",
        "modified_at",
        "name",
        "version_id",
        "is_valid",
    ] {
        assert!(got.get(key).is_some_and(|value| !value.is_null()), "{key}: {got}");
    }
    let deployed = peer.result(Post, &format!("{route}/deployments"), json!({ "version_id": id })).await;
    assert_eq!((&deployed["elements"], &deployed["version"]["active"]), (&elements("gpt-5"), &json!("true")));
    assert_eq!(in_force(&peer), id);
    let deployments =
        peer.good(Get, &format!("{route}/deployments?order_by_direction=asc&per_page=1"), Value::Null).await;
    assert_eq!(settled(deployments)["data"]["deployments"], json!([deployment]));
    // A draft that is not whole yet can be kept and not deployed.
    let half = json!({ "elements": [{ "id": "s", "type": "start", "outputs": {} }] });
    let half = peer.result(Post, &format!("{route}/versions"), half).await;
    assert_eq!(half["version"]["is_valid"], false);
    let deploy = json!({ "version_id": half["version_id"] });
    peer.refused(Post, &format!("{route}/deployments"), deploy, 400, 7001, "is not valid").await;
    let unknown = json!({ "version_id": "00000000-0000-4000-8000-000000000000" });
    peer.refused(Post, &format!("{route}/deployments"), unknown, 404, 7002, "version").await;
    for (body, words) in [
        (json!({ "elements": elements("m") }), "'name' is required"),
        (json!({ "name": "a/b", "elements": elements("m") }), "dynamic/NAME"),
        (json!({ "name": "Customer support", "elements": elements("m") }), "no other route"),
        (json!({ "name": "x" }), "'elements' is required"),
        (json!({ "name": "x", "elements": {} }), "must be a list"),
        (json!({ "name": "x", "elements": [{ "id": "a" }] }), "'elements.0.type' must be a text"),
        (json!({ "name": "x", "elements": [{ "id": "s", "type": "start", "outputs": {} }] }), ""),
    ] {
        peer.refused(Post, path, body, 400, 7001, words).await;
    }
    peer.refused(Get, &format!("{path}?order_by_direction=up"), Value::Null, 400, 7001, "asc or desc").await;
    peer.refused(Get, &format!("{path}/none"), Value::Null, 404, 7002, "\"none\"").await;
    assert_eq!(peer.result(Delete, &route, Value::Null).await["id"], made["id"]);
    assert!(peer.registry.view().route("acme", "g", "Customer support").is_none());
}
