//! OpenAI's surface.

use serde_json::json;

use crate::harness::{Answer, CLASSIC, Daemon, model};

#[tokio::test]
async fn what_is_not_available_says_so_in_openais_shape() {
    let daemon = Daemon::start(|_| {});
    let check = async |path: &str, body: serde_json::Value, status: u16, code: serde_json::Value, words: &str| {
        let answer = daemon.post(path, body).await;
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["code"]), (status, &code), "{path}: {error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{path}: {error}");
    };
    let hi = json!([{"role": "user", "content": "hi"}]);
    check(
        "/v1/embeddings",
        json!({"model": "x", "input": "y"}),
        400,
        json!("unsupported"),
        "Embeddings are not available",
    )
    .await;
    check("/v1/audio/speech", json!({}), 400, json!("unsupported"), "Speech is not available").await;
    check("/v1/nothing", json!({}), 404, json!("not_found"), "nothing at this path").await;
    check("/v1/chat/completions", json!({"messages": hi}), 400, json!(null), "'model' is required").await;
    check(
        "/v1/chat/completions",
        json!({"model": "gpt-4", "messages": hi}),
        404,
        json!("model_not_found"),
        "No such model `gpt-4`",
    )
    .await;
    check(
        "/v1/chat/completions",
        json!({"model": "@cf/meta/llama-3.2-1b-instrukt", "messages": hi}),
        404,
        json!("model_not_found"),
        CLASSIC,
    )
    .await;
    check(
        "/v1/chat/completions",
        json!({"model": CLASSIC, "messages": hi, "tools": [{"type": "function"}]}),
        400,
        json!("unsupported"),
        "Tool calling",
    )
    .await;
    check(
        "/v1/chat/completions",
        json!({"model": CLASSIC, "messages": hi}),
        404,
        json!("model_not_found"),
        "not loaded",
    )
    .await;
    let answer = daemon.get("/v1/chat/completions").await;
    assert_eq!((answer.status, answer.header("allow")), (405, "POST"));
}

#[tokio::test]
async fn models_are_those_configured_by_id_or_alias_raw_or_encoded() {
    let daemon = Daemon::start(|_| {});
    assert_eq!(daemon.get("/v1/models").await.json(), json!({"object": "list", "data": []}));
    daemon.services.fleet.update(|fleet| {
        fleet.models.insert(model(CLASSIC), Vec::new());
    });
    let list = daemon.get("/v1/models").await.json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["data"][0]["id"]), (1, &json!(CLASSIC)));
    for name in [CLASSIC, "@cf%2Fmeta%2Fllama-3.2-1b-instruct", "%40cf/meta/llama-3.2-1b-instruct"] {
        assert_eq!(daemon.get(&format!("/v1/models/{name}")).await.json(), list["data"][0]);
    }
    assert_eq!(daemon.get("/v1/models/other").await.status, 404);
}

#[tokio::test]
async fn every_answer_has_the_id_that_was_sent_if_it_was_one() {
    let daemon = Daemon::start(|_| {});
    let ask =
        |id: &'static str| Answer::of(reqwest::Client::new().get(daemon.url("/nowhere")).header("x-request-id", id));
    let sent = "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c";
    let answer = ask(sent).await;
    assert_eq!((answer.header("x-request-id"), answer.header("cf-ai-req-id")), (sent, sent));
    let answer = ask("not-a-uuid").await;
    assert_eq!(answer.header("x-request-id").len(), 36);
    assert_eq!(answer.header("x-request-id"), answer.header("cf-ai-req-id"));
}

#[tokio::test]
async fn requests_are_counted_by_route_and_status_and_never_by_what_a_client_chose() {
    let daemon = Daemon::start(|_| {});
    daemon.get("/v1/models/whatever-i-like").await;
    daemon.get("/another/whatever-i-like").await;
    let counted = |daemon: &Daemon, route: &str| {
        daemon.metric(&format!(r#"neurond_http_requests_total{{method="GET",route="{route}",status="404"}}"#))
    };
    daemon.eventually("both are counted", |daemon| {
        counted(daemon, "/v1/models/{model}") == 1.0 && counted(daemon, "other") == 1.0
    });
    assert!(!daemon.get("/metrics").await.text.contains("whatever-i-like"));
}
