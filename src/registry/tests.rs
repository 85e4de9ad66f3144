//! What outlives a restart, who wins, and what is never seen.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::*;
use crate::base::{AccountId, Secret};
use crate::config::gateway::{Fixed, FixedGateway, FixedProvider, Settings, Timeouts};
use crate::vault::seal::{MasterKey, Sealer};

const SECRETS: [&str; 4] = ["sk-the-stored-key", "hush-of-the-header", "bearer-of-the-spans", "sk-of-the-file"];

/// One whose key lies beside the folder.
pub(super) fn sealer(folder: &Path) -> Sealer {
    Sealer::open_files(None, Some(&folder.join("master.key")), &[]).unwrap()
}

/// What a file could say: gateways with fields of the wire, and custom providers.
pub(super) fn fixed(gateways: &[(&str, Option<&str>, Value)], providers: &[&str]) -> Fixed {
    let origin = "/etc/neurond/neurond.toml";
    let gateways = gateways.iter().map(|(id, account, fields)| {
        let fields: Map<String, Value> = fields.as_object().unwrap().clone();
        FixedGateway {
            account: account.map(AccountId::new),
            id: (*id).to_owned(),
            settings: Settings::check(&fields).unwrap(),
            fields,
            origin: origin.into(),
        }
    });
    let providers = providers.iter().map(|slug| FixedProvider {
        account: None,
        slug: (*slug).to_owned(),
        base_url: Some("https://of-the-file.example".into()),
        allow_private: true,
        key: Some(Secret::new(SECRETS[3].into())),
        timeouts: Timeouts::default(),
        origin: origin.into(),
    });
    Fixed { gateways: gateways.collect(), providers: providers.collect() }
}

fn start(folder: &Path, fixed: Fixed) -> Registry {
    Registry::start(Some(folder), fixed, sealer(folder)).unwrap()
}

async fn call(registry: &Registry, method: Method, path: &str, body: Value) -> Value {
    let path: Vec<_> = path.split('/').collect();
    let body = (!body.is_null()).then_some(body);
    let reply = registry.serve(&AccountId::new("acme"), method, &path, &[], body, "https://gw.example").await;
    assert_eq!(reply.status, 200, "{path:?}: {}", reply.body);
    reply.body
}

fn gateway(id: &str) -> Value {
    json!({
        "id": id,
        "cache_invalidate_on_update": true,
        "cache_ttl": 60,
        "collect_logs": true,
        "rate_limiting_interval": 0,
        "rate_limiting_limit": 0,
        "rules": [{ "name": "word", "pattern": "word" }],
        "otel": [{ "url": "https://o.example", "headers": {}, "authorization": SECRETS[2] }],
    })
}

/// Everything a registry can be told, one call after the other.
fn story() -> Vec<(Method, &'static str, Value)> {
    let key = json!({
        "alias": "default",
        "default_config": true,
        "provider_slug": "openai",
        "secret": SECRETS[0],
    });
    let custom = json!({
        "name": "Mine",
        "slug": "mine",
        "base_url": "https://mine.example",
        "enable": true,
        "headers": { "x-key": SECRETS[1] },
    });
    let route = json!({ "name": "r", "elements": admin::tests::elements("m") });
    vec![
        (Method::Post, "gateways", gateway("g")),
        (Method::Put, "gateways/g", json!({ "cache_ttl": 120 })),
        (Method::Post, "gateways/g/provider_configs", key),
        (Method::Post, "gateways/g/routes", route),
        (Method::Post, "gateways/g/datasets", json!({ "name": "d", "enable": true, "filters": [] })),
        (Method::Post, "custom-providers", custom),
        (Method::Post, "gateways", gateway("h")),
        (Method::Delete, "gateways/h", Value::Null),
    ]
}

/// What callers can see of an account, ids and all.
async fn seen(registry: &Registry) -> Vec<Value> {
    let mut seen = Vec::new();
    for path in ["gateways", "custom-providers"] {
        seen.push(call(registry, Method::Get, path, Value::Null).await);
    }
    if registry.view().gateway("acme", "g").is_some() {
        for path in ["gateways/g/provider_configs", "gateways/g/routes", "gateways/g/datasets"] {
            seen.push(call(registry, Method::Get, path, Value::Null).await);
        }
    }
    seen
}

/// A copy of the folder as a killed process leaves it: whatever was answered is in it.
fn as_left_by_a_kill(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    // And a write that had begun.
    std::fs::write(copy.path().join(".acme.json.new"), "{\"version\":1,\"acc").unwrap();
    copy
}

#[actix::test]
async fn what_was_answered_is_there_after_a_kill_at_any_moment() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), Fixed::default());
    for (method, path, body) in story() {
        call(&registry, method, path, body).await;
        let copy = as_left_by_a_kill(folder.path());
        let again = start(copy.path(), Fixed::default());
        assert_eq!(seen(&again).await, seen(&registry).await, "after {method:?} {path}");
    }
    let copy = as_left_by_a_kill(folder.path());
    let again = start(copy.path(), Fixed::default());
    let (one, other) = (again.view(), registry.view());
    assert_eq!(one.secret("acme", "g", "openai", None).unwrap().secret.expose(), SECRETS[0]);
    assert_eq!(one.custom("acme", "mine").unwrap().headers[0].1.expose(), SECRETS[1]);
    let (one, other) = (one.gateway("acme", "g").unwrap(), other.gateway("acme", "g").unwrap());
    assert_eq!((one.generation, &one.settings), (other.generation, &other.settings));
    assert!(!one.guard.ignores_requests(), "its rules are compiled");
}

#[actix::test]
async fn no_secret_is_seen_in_any_view_answer_or_file() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), fixed(&[], &["custom-file"]));
    let mut all = String::new();
    for (method, path, body) in story() {
        all += &call(&registry, method, path, body).await.to_string();
    }
    for value in seen(&registry).await {
        all += &value.to_string();
    }
    let view = registry.view();
    let key = view.secret("acme", "g", "openai", None).unwrap();
    let custom = view.custom("acme", "mine").unwrap();
    let gateway = view.gateway("acme", "g").unwrap();
    all += &format!("{view:?} {key:?} {custom:?} {:?}", gateway.settings);
    all += &format!("{:?} {:?}", view.custom("acme", "file"), view.secret("acme", "g", "custom-file", None));
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        all += &String::from_utf8_lossy(&std::fs::read(entry.unwrap().path()).unwrap());
    }
    assert_eq!(key.secret.expose(), SECRETS[0]);
    assert_eq!(custom.headers[0].1.expose(), SECRETS[1]);
    assert_eq!(gateway.settings.otel[0].authorization.as_ref().unwrap().expose(), SECRETS[2]);
    assert_eq!(view.secret("acme", "g", "custom-file", None).unwrap().secret.expose(), SECRETS[3]);
    for secret in SECRETS {
        assert!(!all.contains(secret), "{secret} is seen in\n{all}");
    }
}

#[actix::test]
async fn a_sealed_secret_is_useless_under_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), Fixed::default());
    for (method, path, body) in story() {
        call(&registry, method, path, body).await;
    }
    let text = std::fs::read_to_string(folder.path().join("acme.json")).unwrap();
    let moved = text.replace("\"account\":\"acme\"", "\"account\":\"evil\"");
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("master.key"), elsewhere.path().join("master.key")).unwrap();
    std::fs::write(elsewhere.path().join("evil.json"), moved).unwrap();
    let view = start(elsewhere.path(), Fixed::default()).view();
    assert!(view.secret("evil", "g", "openai", None).is_none());
    assert!(view.custom("evil", "mine").is_none());
    assert!(view.gateway("evil", "g").is_none(), "a gateway that is not whole is not served");
    assert!(view.route("evil", "g", "r").is_some(), "what holds no secret is");
}

#[actix::test]
async fn what_the_file_says_wins_and_an_own_block_before_everybodys() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), Fixed::default());
    for (method, path, body) in story() {
        call(&registry, method, path, body).await;
    }
    let ttl = |registry: &Registry, account: &str| {
        let gateway = registry.view().gateway(account, "g");
        gateway.map(|gateway| (gateway.settings.cache_ttl.unwrap().as_secs(), gateway.fixed))
    };
    assert_eq!((ttl(&registry, "acme"), ttl(&registry, "other")), (Some((120, false)), None));
    let everybodys = ("g", None, json!({ "cache_ttl": 7 }));
    let own = ("g", Some("acme"), json!({ "cache_ttl": 8 }));
    registry.replace_fixed(fixed(std::slice::from_ref(&everybodys), &[])).unwrap();
    assert_eq!((ttl(&registry, "acme"), ttl(&registry, "other")), (Some((7, true)), Some((7, true))));
    registry.replace_fixed(fixed(&[everybodys, own], &["custom-mine", "openai"])).unwrap();
    assert_eq!((ttl(&registry, "acme"), ttl(&registry, "other")), (Some((8, true)), Some((7, true))));
    let view = registry.view();
    assert_eq!(view.custom("acme", "mine").unwrap().base_url, "https://of-the-file.example");
    assert_eq!(view.provider("acme", "openai").unwrap().base_url.as_deref(), Some("https://of-the-file.example"));
    // Everybody's key of the file stands in where an account has none of its own.
    assert_eq!(view.secret("acme", "g", "openai", None).unwrap().secret.expose(), SECRETS[0]);
    assert_eq!(view.secret("other", "g", "openai", Some("default")).unwrap().secret.expose(), SECRETS[3]);
    assert!(view.secret("other", "g", "openai", Some("spare")).is_none());
    let mut own = fixed(&[], &["openai"]);
    own.providers[0].account = Some(AccountId::new("acme"));
    registry.replace_fixed(own).unwrap();
    assert_eq!(registry.view().secret("acme", "g", "openai", None).unwrap().secret.expose(), SECRETS[3]);
    assert!(registry.view().secret("other", "g", "openai", None).is_none());
    assert_eq!(ttl(&registry, "acme"), Some((120, false)), "what was hidden is back");
}

#[actix::test]
async fn a_file_that_does_not_compile_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), fixed(&[("g", None, json!({}))], &[]));
    let bad = fixed(&[("g", None, json!({ "rules": [{ "name": "r", "pattern": "(" }] }))], &[]);
    let error = check(&bad).unwrap_err();
    assert!(error.message().starts_with("/etc/neurond/neurond.toml: gateway g: "), "{error}");
    assert!(registry.replace_fixed(bad.clone()).is_err());
    assert!(registry.view().gateway("x", "g").unwrap().settings.rules.is_empty());
    assert!(Registry::start(None, bad, sealer(folder.path())).is_err());
}

#[actix::test]
async fn a_fixed_gateway_forgets_its_answers_when_its_block_changes_if_it_says_so() {
    let generation = |fields: Value| {
        let folder = tempfile::tempdir().unwrap();
        let registry = start(folder.path(), fixed(&[("g", None, fields)], &[]));
        registry.view().gateway("x", "g").unwrap().generation
    };
    let on = |ttl: u64| json!({ "cache_ttl": ttl, "cache_invalidate_on_update": true });
    assert_eq!(generation(on(60)), generation(on(60)), "the same after a restart");
    assert_ne!(generation(on(60)), generation(on(61)));
    assert_eq!(generation(json!({ "cache_ttl": 60 })), generation(json!({ "cache_ttl": 61 })));
}

#[actix::test]
async fn the_default_gateway_comes_into_being_once_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), Fixed::default());
    let account = AccountId::new("acme");
    assert!(registry.view().gateway("acme", "default").is_none());
    let made = registry.ensure_default(&account).await.unwrap();
    let settings = &made.settings;
    assert_eq!((settings.authentication, settings.collect_logs), (true, true));
    assert_eq!((settings.cache_ttl, settings.rate_limit), (None, None));
    let shown = call(&registry, Method::Get, "gateways/default", Value::Null).await;
    assert_eq!(shown["result"]["is_default"], true);
    let again = start(as_left_by_a_kill(folder.path()).path(), Fixed::default());
    assert_eq!(again.ensure_default(&account).await.unwrap().generation, made.generation);
    // Where the file has one, that is it.
    let registry = start(tempfile::tempdir().unwrap().path(), fixed(&[("default", None, json!({}))], &[]));
    assert!(registry.ensure_default(&account).await.unwrap().fixed);
}

#[actix::test]
async fn without_a_place_and_beside_another_daemon_nothing_changes_and_all_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let first = start(folder.path(), Fixed::default());
    call(&first, Method::Post, "gateways", gateway("g")).await;
    let second = start(folder.path(), Fixed::default());
    assert!(second.view().gateway("acme", "g").is_some());
    let nowhere = Registry::start(None, Fixed::default(), sealer(folder.path())).unwrap();
    for (registry, words) in [(&second, "another neurond"), (&nowhere, "registry.folder")] {
        let body = Some(gateway("new"));
        let reply = registry.serve(&AccountId::new("acme"), Method::Post, &["gateways"], &[], body, "").await;
        assert_eq!((reply.status, &reply.body["errors"][0]["code"]), (400, &json!(7001)), "{}", reply.body);
        assert!(reply.body["errors"][0]["message"].as_str().unwrap().contains(words), "{}", reply.body);
        assert!(registry.view().gateway("acme", "new").is_none());
        let default = registry.ensure_default(&AccountId::new("fresh")).await.unwrap();
        assert!(default.settings.authentication, "calls go on");
    }
}

#[actix::test]
async fn a_file_that_cannot_be_read_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("acme.json"), "{\"version\":9}").unwrap();
    let registry = start(folder.path(), Fixed::default());
    let body = Some(gateway("g"));
    let reply = registry.serve(&AccountId::new("acme"), Method::Post, &["gateways"], &[], body, "").await;
    assert_eq!(reply.status, 500, "{}", reply.body);
    registry.ensure_default(&AccountId::new("acme")).await.unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join("acme.json")).unwrap(), "{\"version\":9}");
}

#[actix::test]
async fn what_an_earlier_master_key_sealed_is_sealed_anew_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let registry = start(folder.path(), Fixed::default());
    for (method, path, body) in story() {
        call(&registry, method, path, body).await;
    }
    let old = MasterKey::read(&folder.path().join("master.key")).unwrap();
    let copy = as_left_by_a_kill(folder.path());
    let new = MasterKey::random();
    let sealer = Sealer::new(new.clone(), vec![old.clone()]);
    let view = Registry::start(Some(copy.path()), Fixed::default(), sealer).unwrap().view();
    assert_eq!(view.secret("acme", "g", "openai", None).unwrap().secret.expose(), SECRETS[0]);
    let text = std::fs::read_to_string(copy.path().join("acme.json")).unwrap();
    assert!(text.contains(new.id()) && !text.contains(old.id()), "{text}");
    let offline = as_left_by_a_kill(folder.path());
    let mut registry = Offline::open(offline.path()).unwrap();
    let both = Sealer::new(new.clone(), vec![old]);
    assert_eq!((registry.reseal(&both).unwrap(), registry.reseal(&both).unwrap()), (3, 0));
    drop(registry);
    let view = Registry::start(Some(offline.path()), Fixed::default(), Sealer::new(new, vec![])).unwrap().view();
    assert_eq!(view.custom("acme", "mine").unwrap().headers[0].1.expose(), SECRETS[1]);
    assert!(view.gateway("acme", "g").is_some());
}
