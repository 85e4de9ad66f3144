//! Gateways whose requests and answers must follow a JSON schema.

use serde_json::{Value, json};

use super::{Rig, events, question, streamed, text};
use crate::harness::Answer;

/// Gateways that want a name of the user; answers about a city; the same, kept; and the same with somebody to turn to.
const GATEWAYS: &str = r#"
[[gateway]]
id = "asks"
authentication = false
schemas = { request = { type = "object", required = ["model", "user"], properties = { user = { type = "string", minLength = 1 } } } }
[[gateway]]
id = "answers"
authentication = false
schemas = { response = { type = "object", required = ["city"], properties = { city = { type = "string" } } } }
[[gateway]]
id = "keeps"
authentication = false
cache_ttl = 60
schemas = { response = { type = "object", required = ["city"] } }
[[gateway]]
id = "turns"
authentication = false
fallback = ["anthropic/claude-x"]
schemas = { response = { type = "object", required = ["city"] } }
"#;

const GOOD: &str = "says={\"city\": \"Oslo\"}";
const BAD: &str = "says={\"town\": \"Oslo\"}";

async fn ask(rig: &Rig, path: &str, fake: &str, body: Value) -> Answer {
    let request = reqwest::Client::new().post(rig.daemon.url(&format!("/v1/acme/{path}")));
    Answer::of(request.header("authorization", "Bearer k").header("x-fake", fake).json(&body)).await
}

/// Checks a refusal in the shape of the contract, which names the place and quotes nothing.
#[track_caller]
fn refused(answer: &Answer, code: u64, place: &str) {
    let body = answer.json();
    assert_eq!((answer.status, &body["internalCode"]), (424, &json!(code)), "{body}");
    assert_eq!(
        (&body["success"], &body["result"], &body["messages"]),
        (&json!(false), &json!([]), &json!([])),
        "{body}"
    );
    assert_eq!((&body["name"], &body["httpCode"]), (&json!("AiGatewayError"), &json!(424)), "{body}");
    assert_eq!(body["error"][0]["code"], code, "{body}");
    let message = body["message"].as_str().unwrap();
    assert_eq!(body["error"][0]["message"], message, "{body}");
    assert!(message.contains(place) && !answer.text.contains("Oslo"), "{body}");
}

fn with_user(mut body: Value, user: Value) -> Value {
    body["user"] = user;
    body
}

#[actix_web::test]
async fn a_request_that_breaks_the_schema_is_refused_and_nobody_hears_of_it() {
    let rig = Rig::with(GATEWAYS);
    let unified = |user: Value| {
        with_user(
            json!({ "model": "anthropic/claude-x", "max_tokens": 9, "messages": [{ "role": "user", "content": "Oslo" }] }),
            user,
        )
    };
    for (path, body, place) in [
        ("asks/openai/chat/completions", question("Oslo"), "required"),
        ("asks/openai/chat/completions", with_user(streamed("Oslo"), json!(7)), "/user"),
        ("asks/anthropic/v1/messages", question("Oslo"), "required"),
        ("asks/compat/chat/completions", unified(json!("")), "/user"),
        ("asks/openai/chat/completions", json!("Oslo"), "type"),
    ] {
        refused(&ask(&rig, path, "ok", body).await, 2016, place);
    }
    let form = reqwest::Client::new().post(rig.daemon.url("/v1/acme/asks/openai/audio/speech")).body("Oslo=1");
    refused(&Answer::of(form).await, 2016, "not JSON");
    assert_eq!(rig.upstream.count(), 0);
    for (path, body) in [
        ("asks/openai/chat/completions", with_user(question("Oslo"), json!("ada"))),
        ("asks/openai/chat/completions", with_user(streamed("Oslo"), json!("ada"))),
        ("asks/compat/chat/completions", unified(json!("ada"))),
    ] {
        let answer = ask(&rig, path, "ok", body).await;
        assert!(answer.status == 200 && answer.text.contains("Oslo"), "{path}: {answer:?}");
    }
    // What has no body breaks nothing.
    let listed = reqwest::Client::new().get(rig.daemon.url("/v1/acme/asks/openai/models"));
    assert_eq!(Answer::of(listed).await.status, 200);
    rig.is_clean().await;
}

/// One answer in each dialect: the path, and the body of a request.
fn dialects() -> Vec<(&'static str, Value)> {
    let messages = json!([{ "role": "user", "content": "q" }]);
    let bedrock = json!({ "messages": [{ "role": "user", "content": [{ "text": "q" }] }] });
    let unified = |model: &str| json!({ "model": model, "max_tokens": 50, "messages": messages });
    vec![
        ("openai/chat/completions", question("q")),
        ("openai/completions", json!({ "model": "m", "prompt": "q" })),
        ("openai/responses", json!({ "model": "m", "input": "q" })),
        ("anthropic/v1/messages", json!({ "model": "c", "max_tokens": 50, "messages": messages })),
        ("google-ai-studio/v1beta/models/g:generateContent", json!({ "contents": [{ "parts": [{ "text": "q" }] }] })),
        ("cohere/v2/chat", json!({ "model": "c", "messages": messages })),
        ("aws-bedrock/bedrock-runtime/us-east-1/model/m/converse", bedrock),
        ("compat/chat/completions", unified("openai/gpt-x")),
        ("compat/chat/completions", unified("anthropic/claude-x")),
        ("compat/chat/completions", unified("google-ai-studio/gemini-x")),
        ("compat/chat/completions", unified("cohere/command-x")),
    ]
}

#[actix_web::test]
async fn a_structured_answer_that_breaks_the_schema_is_refused_in_every_dialect() {
    let rig = Rig::with(GATEWAYS);
    for (path, body) in dialects() {
        let path = format!("answers/{path}");
        refused(&ask(&rig, &path, BAD, body.clone()).await, 2017, "required");
        refused(&ask(&rig, &path, "says={\"city\": \"Os", body.clone()).await, 2017, "not whole JSON");
        refused(&ask(&rig, &path, "says={\"city\": 7}", body.clone()).await, 2017, "/city");
        // Prose is no structured answer.
        for (fake, words) in [("says=The city is Oslo.", "The city is Oslo."), (GOOD, "{\\\"city\\\": \\\"Oslo\\\"}")] {
            let answer = ask(&rig, &path, fake, body.clone()).await;
            assert!(answer.status == 200 && answer.text.contains(words), "{path}: {answer:?}");
        }
    }
    // Errors of a provider are its own.
    let failed = ask(&rig, "answers/openai/chat/completions", "400", question("another")).await;
    assert_eq!((failed.status, failed.json()["internalCode"].clone()), (400, Value::Null), "{failed:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_refused_answer_is_not_kept_and_a_good_one_is() {
    let rig = Rig::with(GATEWAYS);
    let path = "keeps/openai/chat/completions";
    for (fake, status) in [(BAD, 424), (GOOD, 200), (BAD, 200)] {
        let answer = ask(&rig, path, fake, question("q")).await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    assert_eq!(rig.upstream.count(), 2, "the last was answered from the cache");
    rig.is_clean().await;
}

#[actix_web::test]
async fn another_provider_is_asked_when_an_answer_breaks_the_schema() {
    let rig = Rig::with(GATEWAYS);
    rig.upstream.script("/openai", [BAD, BAD]);
    rig.upstream.script("/anthropic", [GOOD, BAD]);
    let body = json!({ "model": "openai/gpt-x", "max_tokens": 50, "messages": [{ "role": "user", "content": "q" }] });
    let ask = async || {
        let url = rig.daemon.url("/v1/acme/turns/compat/chat/completions");
        Answer::of(reqwest::Client::new().post(url).json(&body)).await
    };
    let turned = ask().await;
    assert_eq!(
        (turned.status, turned.header("cf-aig-step"), turned.header("cf-aig-provider")),
        (200, "1", "anthropic"),
        "{turned:?}"
    );
    assert!(turned.text.contains("Oslo"), "{turned:?}");
    refused(&ask().await, 2017, "required");
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_stream_ends_with_an_error_before_it_could_say_that_it_is_whole() {
    let rig = Rig::with(GATEWAYS);
    let unified = |model: &str| json!({ "model": model, "max_tokens": 50, "stream": true, "messages": [{ "role": "user", "content": "q" }] });
    for (path, body) in [
        ("answers/openai/chat/completions", streamed("q")),
        ("answers/compat/chat/completions", unified("openai/gpt-x")),
        ("answers/compat/chat/completions", unified("anthropic/claude-x")),
        ("answers/compat/chat/completions", unified("google-ai-studio/gemini-x")),
        ("answers/compat/chat/completions", unified("cohere/command-x")),
    ] {
        for fake in [BAD, "says={\"city\": \"Os"] {
            let cut = ask(&rig, path, fake, body.clone()).await;
            let all = events(&cut);
            let last: Value = serde_json::from_str(&all.last().unwrap().data).unwrap();
            let message = last["error"]["message"].as_str().unwrap_or_else(|| panic!("{path}: {cut:?}"));
            assert!(message.contains("`schema`"), "{path}: {message}");
            assert!(!cut.text.contains("[DONE]") && !cut.text.contains("\"stop\""), "{path}: {cut:?}");
        }
        let good = ask(&rig, path, GOOD, body.clone()).await;
        let all = events(&good);
        assert_eq!(
            (text(&all).as_str(), all.last().unwrap().data.as_str()),
            ("{\"city\": \"Oslo\"}", "[DONE]"),
            "{path}: {good:?}"
        );
        assert!(good.text.contains("\"stop\""), "{path}: {good:?}");
    }
    let messages =
        json!({ "model": "c", "max_tokens": 50, "stream": true, "messages": [{ "role": "user", "content": "q" }] });
    for (fake, last) in [(BAD, "error"), (GOOD, "message_stop")] {
        let answer = ask(&rig, "answers/anthropic/v1/messages", fake, messages.clone()).await;
        let names: Vec<String> = events(&answer).into_iter().filter_map(|event| event.name).collect();
        assert_eq!(names.last().map(String::as_str), Some(last), "{answer:?}");
        assert_eq!(names.iter().any(|name| name == "message_delta"), last == "message_stop", "{answer:?}");
    }
    rig.is_clean().await;
}
