//! What gateways are told: by their file and by the management API; and what they do because of it.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Rig, events, question, streamed};
use crate::harness::Answer;

/// A call of the management API.
async fn manage(rig: &Rig, method: Method, path: &str, body: Value) -> Answer {
    let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai-gateway/{path}"));
    let request = reqwest::Client::new().request(method, url).bearer_auth("secret");
    Answer::of(if body.is_null() { request } else { request.json(&body) }).await
}

pub(super) fn folders(rig: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let more =
        format!("[registry]\nfolder = \"{path}/registry\"\n[vault]\nmaster_key_file = \"{path}/master.key\"\n{rig}");
    std::fs::write(folder.path().join("master.key"), "11".repeat(32)).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder.path().join("master.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    (folder, more)
}

#[actix_web::test]
async fn a_gateway_made_by_the_api_serves_and_a_stored_key_stands_in_for_the_callers() {
    let (folder, more) = folders("");
    let rig = Rig::kept(&more);
    let made = manage(
        &rig,
        Method::POST,
        "gateways",
        json!({
            "id": "made", "cache_invalidate_on_update": true, "cache_ttl": 300, "collect_logs": true,
            "rate_limiting_interval": 0, "rate_limiting_limit": 0, "rate_limiting_technique": "fixed",
        }),
    )
    .await;
    assert_eq!((made.status, made.json()["result"]["id"].clone()), (200, json!("made")), "{made:?}");
    let key = manage(
        &rig,
        Method::POST,
        "gateways/made/provider_configs",
        json!({
            "alias": "default", "provider_slug": "openai", "default_config": true, "secret": "sk-stored-key-of-acme",
        }),
    )
    .await;
    assert_eq!(key.status, 200, "{key:?}");
    assert!(!key.text.contains("sk-stored-key-of-acme"), "write-only: {key:?}");
    let ask = async || {
        let url = rig.daemon.url("/v1/acme/made/openai/chat/completions");
        Answer::of(reqwest::Client::new().post(url).header("cf-aig-authorization", "secret").json(&question("q"))).await
    };
    assert_eq!(ask().await.header("cf-aig-cache-status"), "MISS");
    assert_eq!(rig.upstream.requests()[0].header("authorization"), Some("Bearer sk-stored-key-of-acme"));
    assert_eq!(ask().await.header("cf-aig-cache-status"), "HIT", "the gateway's own setting");
    // An update empties the cache, as it was told to.
    let put = manage(
        &rig,
        Method::PUT,
        "gateways/made",
        json!({
            "cache_invalidate_on_update": true, "cache_ttl": 600, "collect_logs": false,
            "rate_limiting_interval": 0, "rate_limiting_limit": 0, "rate_limiting_technique": "fixed",
        }),
    )
    .await;
    assert_eq!(put.status, 200, "{put:?}");
    let after = ask().await;
    assert_eq!((after.header("cf-aig-cache-status"), after.header("cf-aig-log-id")), ("MISS", ""), "and logs are off");
    // Sealed on disk, and nowhere readable.
    let files: String = walk(folder.path())
        .iter()
        .map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned())
        .collect();
    assert!(files.contains("made") && !files.contains("sk-stored-key-of-acme"));
    let listed = manage(&rig, Method::GET, "gateways", Value::Null).await.json();
    assert!(listed["result"].as_array().unwrap().iter().any(|gateway| gateway["id"] == "made"), "{listed}");
    assert_eq!(manage(&rig, Method::DELETE, "gateways/made", Value::Null).await.status, 200);
    assert_eq!(ask().await.json()["internalCode"], 2001);
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[actix_web::test]
async fn the_file_wins_and_cannot_be_changed_by_the_api() {
    let (_folder, more) = folders("");
    let rig = Rig::kept(&more);
    let put = manage(
        &rig,
        Method::PUT,
        "gateways/g",
        json!({ "cache_ttl": 600, "cache_invalidate_on_update": false, "collect_logs": true,
        "rate_limiting_interval": 0, "rate_limiting_limit": 0 }),
    )
    .await;
    assert_eq!((put.status, put.json()["errors"][0]["code"].clone()), (400, json!(7001)), "{put:?}");
    for (path, status, code) in [("gateways/none", 404, 7002), ("nothing", 404, 7000)] {
        let answer = manage(&rig, Method::GET, path, Value::Null).await;
        assert_eq!(
            (answer.status, answer.json()["errors"][0]["code"].clone()),
            (status, json!(code)),
            "{path}: {answer:?}"
        );
    }
    let url = rig.daemon.url("/client/v4/accounts/acme/ai-gateway/gateways");
    assert_eq!(Answer::of(reqwest::Client::new().get(url).bearer_auth("wrong")).await.status, 401);
}

#[actix_web::test]
async fn a_custom_provider_is_called_like_any_other() {
    let upstream = crate::upstream::Upstream::start();
    let more = format!(
        "[[provider]]\nslug = \"custom-mine\"\nbase_url = \"{}\"\nallow_private = true\n",
        upstream.base("openai")
    );
    let rig = Rig::with(&more);
    let answer = Answer::of(rig.post("custom-mine/v1/chat/completions", &[], &question("q"))).await;
    assert_eq!((answer.status, answer.header("cf-aig-provider")), (200, "custom-mine"), "{answer:?}");
    let mut body = question("q");
    body["model"] = json!("custom-mine/some-model");
    let answer = Answer::of(rig.post("compat/chat/completions", &[], &body)).await;
    assert_eq!((answer.status, answer.header("cf-aig-model")), (200, "some-model"), "{answer:?}");
    assert_eq!(upstream.count(), 2);
}

#[actix_web::test]
async fn a_route_decides_who_answers_and_turns_to_another() {
    let (_folder, more) = folders("");
    let rig = Rig::kept(&more);
    let body = json!({ "id": "made", "cache_invalidate_on_update": false, "cache_ttl": 0, "collect_logs": true,
        "rate_limiting_interval": 0, "rate_limiting_limit": 0, "rate_limiting_technique": "fixed" });
    assert_eq!(manage(&rig, Method::POST, "gateways", body).await.status, 200);
    let to = |id: &str| json!({ "elementId": id });
    let elements = json!([
        { "id": "s", "type": "start", "outputs": { "next": to("c") } },
        { "id": "c", "type": "conditional", "properties": { "conditions": { "metadata.plan": { "$eq": "paid" } } },
          "outputs": { "true": to("big"), "false": to("limit") } },
        { "id": "limit", "type": "rate", "properties": { "limitType": "count", "key": "metadata.user_id", "limit": 2, "window": 3600, "technique": "fixed" },
          "outputs": { "success": to("small"), "fallback": to("e") } },
        { "id": "big", "type": "model", "properties": { "provider": "anthropic", "model": "claude-big", "timeout": 2000, "retries": 0 },
          "outputs": { "success": to("e"), "fallback": to("small") } },
        { "id": "small", "type": "model", "properties": { "provider": "openai", "model": "gpt-small" },
          "outputs": { "success": to("e"), "fallback": to("e") } },
        { "id": "e", "type": "end" },
    ]);
    let made =
        manage(&rig, Method::POST, "gateways/made/routes", json!({ "name": "support", "elements": elements })).await;
    assert_eq!(made.status, 200, "{made:?}");
    let ask = async |metadata: Value| {
        let url = rig.daemon.url("/v1/acme/made/compat/chat/completions");
        let request = reqwest::Client::new().post(url).header("cf-aig-authorization", "secret");
        let request = request.header("cf-aig-metadata", metadata.to_string());
        let body =
            json!({ "model": "dynamic/support", "max_tokens": 9, "messages": [{ "role": "user", "content": "q" }] });
        Answer::of(request.json(&body)).await
    };
    let model = |answer: &Answer| {
        format!("{} {}/{}", answer.status, answer.header("cf-aig-provider"), answer.header("cf-aig-model"))
    };
    assert_eq!(model(&ask(json!({ "plan": "paid" })).await), "200 anthropic/claude-big");
    rig.upstream.script("/anthropic", ["500"]);
    let turned = ask(json!({ "plan": "paid" })).await;
    assert_eq!((model(&turned).as_str(), turned.header("cf-aig-step")), ("200 openai/gpt-small", "1"), "{turned:?}");
    assert!(turned.header("cf-aig-routing-reason").contains("big failed, small try"), "{turned:?}");
    for expected in [200, 200, 429] {
        let answer = ask(json!({ "plan": "free", "user_id": "u1" })).await;
        assert_eq!(answer.status, expected, "{answer:?}");
    }
    assert_eq!(ask(json!({ "plan": "free", "user_id": "u2" })).await.status, 200, "each user has a limit of its own");
    let absent = json!({ "model": "dynamic/none", "messages": [] });
    assert_eq!(Answer::of(rig.post("compat/chat/completions", &[], &absent)).await.json()["internalCode"], 2008);
}

#[actix_web::test]
async fn rules_refuse_prompts_flag_answers_and_cut_streams() {
    let rig = Rig::with(
        "[[gateway]]\nid = \"ruled\"\nauthentication = false\nrules = [\
         { name = \"card\", pattern = '\\b\\d{16}\\b', on = \"request\" }, \
         { name = \"word\", pattern = 'forbidden', on = \"response\" }, \
         { name = \"odd\", pattern = 'peculiar', on = \"both\", action = \"flag\" }]\n",
    );
    let ask = async |body: Value| {
        let url = rig.daemon.url("/v1/acme/ruled/openai/chat/completions");
        Answer::of(reqwest::Client::new().post(url).json(&body)).await
    };
    let card = ask(question("pay with 4111111111111111 please")).await;
    assert_eq!((card.status, card.json()["internalCode"].clone()), (424, json!(2016)), "{card:?}");
    assert_eq!(rig.upstream.count(), 0);
    // The fake says what it was asked.
    let answer = ask(question("this is forbidden talk")).await;
    assert_eq!((answer.status, answer.json()["internalCode"].clone()), (424, json!(2017)), "{answer:?}");
    let cut = ask(streamed("all is well until forbidden words come and go on for a long while after that")).await;
    let all = events(&cut);
    let last: Value = serde_json::from_str(&all.last().unwrap().data).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("word"), "{cut:?}");
    let said = super::text(&all);
    assert!(!said.contains("forbidden") && !cut.text.contains("[DONE]"), "{said}");
    let flagged = ask(question("a peculiar question")).await;
    assert_eq!(flagged.status, 200);
    assert!(flagged.header("cf-aig-dlp").contains("FLAG"), "{flagged:?}");
    let fine = ask(streamed("nothing of that kind")).await;
    assert!(super::text(&events(&fine)).contains("nothing of that kind") && fine.text.contains("[DONE]"), "{fine:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn schemas_bind_requests() {
    let rig = Rig::with(
        "[[gateway]]\nid = \"strict\"\nauthentication = false\n\
         schemas = { request = { type = \"object\", required = [\"model\", \"user\"] } }\n",
    );
    let url = rig.daemon.url("/v1/acme/strict/openai/chat/completions");
    let ask = async |body: Value| Answer::of(reqwest::Client::new().post(&url).json(&body)).await.status;
    assert_eq!(ask(question("q")).await, 424);
    let mut named = question("q");
    named["user"] = json!("u");
    assert_eq!(ask(named).await, 200);
}
