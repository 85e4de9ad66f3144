//! What `env.AI` of Worker code sees.

use serde_json::{Value, json};

use crate::harness::{Answer, CHATTY, CLASSIC, Daemon, joined};

async fn run(daemon: &Daemon, query: &str, model: Option<&str>, body: Value) -> Answer {
    let mut request = reqwest::Client::new().post(format!("http://{}/run{query}", daemon.binding)).json(&body);
    if let Some(model) = model {
        request = request.header("cf-consn-model-id", model);
    }
    Answer::of(request.header("host", "workers-binding.ai")).await
}

#[tokio::test]
async fn errors_have_the_names_the_shim_reads() {
    let daemon = Daemon::start(|_| {});
    let check = async |query: &str, model: Option<&str>, body: Value, status: u16, code: u32, words: &str| {
        let answer = run(&daemon, query, model, body).await;
        let error = answer.json();
        assert_eq!((answer.status, &error["internalCode"]), (status, &json!(code)), "{error}");
        assert_eq!((&error["name"], &error["httpCode"]), (&json!("AiError"), &json!(status)));
        assert_eq!(error["requestId"], answer.header("cf-ai-req-id"));
        assert!(error["description"].as_str().unwrap().contains(words), "{error}");
        assert!(error["message"].as_str().unwrap().starts_with("AiError: "), "{error}");
    };
    let inputs = json!({"inputs": {"prompt": "a"}, "options": {}});
    for version in ["?version=3", "?version=2", ""] {
        check(version, Some("@cf/no/model"), inputs.clone(), 400, 5007, "No such model `@cf/no/model`").await;
        check(version, Some("prefix:@cf/no/model"), inputs.clone(), 400, 5007, "No such model `@cf/no/model`").await;
    }
    check("?version=1", Some(CLASSIC), inputs.clone(), 400, 5006, "version").await;
    check("?version=3", None, inputs.clone(), 400, 5006, "cf-consn-model-id").await;
    check("?version=3", Some(CLASSIC), json!({"prompt": "a"}), 400, 5006, "'inputs' is required").await;
    check("?version=3", Some(CLASSIC), json!({"inputs": {"prompt": 1}}), 400, 5006, "inputs/prompt").await;
    check(
        "?version=3",
        Some(CLASSIC),
        json!({"inputs": {"requests": [{"prompt": "a"}]}, "options": {"queueRequest": true}}),
        400,
        5006,
        "keeps no batches",
    )
    .await;
    check("?version=3&userInputs=%7B%7D", Some(CLASSIC), inputs, 400, 5006, "streams").await;
}

#[tokio::test]
async fn models_are_listed_and_what_is_outside_is_not_there() {
    let daemon = Daemon::start(|_| {});
    let get = |path: &str| Answer::of(reqwest::Client::new().get(format!("http://{}{path}", daemon.binding)));
    let found = get("/ai-api/models/search?search=llama-3.2-1b").await.json();
    assert_eq!(found["result"][0]["name"], CLASSIC);
    assert!(found.get("success").is_none());
    for path in ["/ai-gateway/universal/run/x", "/to-everything/markdown/supported", "/autorag/rags", "/v1/models"] {
        let answer = get(path).await;
        assert_eq!((answer.status, &answer.json()["internalCode"]), (404, &json!(7000)), "{path}");
    }
}

#[tokio::test]
async fn the_api_has_no_binding_and_a_binding_that_is_not_configured_is_not_there() {
    let daemon = Daemon::start(|config| config.binding = None);
    assert_eq!(daemon.post("/run?version=3", json!({"inputs": {}})).await.status, 404);
    assert_eq!(run(&daemon, "", Some(CLASSIC), json!({"inputs": {"prompt": "a"}})).await.status, 404);
}

#[tokio::test]
async fn results_are_bare_and_billed_to_the_configured_account() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let inputs = json!({"prompt": "hi", "max_tokens": 8, "temperature": 0});
    let answer = run(&daemon, "?version=3", Some(CLASSIC), json!({"inputs": inputs, "options": {}})).await;
    let result = answer.json();
    assert_eq!((result["response"].as_str().unwrap().len(), result.get("success")), (8, None));
    assert!(!answer.header("cf-ai-neurons").is_empty() && !answer.header("cf-ai-req-id").is_empty());
    let prefixed = run(&daemon, "?version=2", Some(&format!("mine:{CLASSIC}")), json!({"inputs": inputs})).await.json();
    assert_eq!(prefixed["response"], result["response"]);
    let chat = run(&daemon, "?version=3", Some(CHATTY), json!({"inputs": inputs})).await.json();
    assert_eq!(chat["object"], "chat.completion");

    let streamed = json!({"inputs": {"prompt": "hi", "max_tokens": 8, "temperature": 0, "stream": true}});
    let chunks = run(&daemon, "?version=3", Some(CLASSIC), streamed).await.chunks();
    assert_eq!(joined(&chunks, "/response"), result["response"].as_str().unwrap());

    let rows = daemon.rows().await;
    assert!(rows.iter().all(|(who, _)| who.account.as_str() == "worker-account"), "{rows:?}");
    assert_eq!(rows.iter().map(|(_, row)| row.requests).sum::<u64>(), 4);
}

#[tokio::test]
async fn the_shim_reads_records_and_addresses_of_gateways() {
    let daemon = Daemon::serving("sim", |config| config.records.folder = None);
    let get = async |path: &str| {
        let url = format!("http://{}/ai-gateway/gateways/{path}", daemon.binding);
        Answer::of(reqwest::Client::new().get(url)).await
    };
    let unknown = get("default/logs/01J00000000000000000000000").await;
    assert_eq!(unknown.status, 404);
    assert!(unknown.json()["errors"][0]["message"].as_str().unwrap().contains("gateway"), "{unknown:?}");
}
