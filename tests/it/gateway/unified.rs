//! One way of asking for everybody's models, and Anthropic's way for everybody's models.

use serde_json::{Value, json};

use super::world::TRUSTED;
use super::{Rig, aws, events, text};
use crate::harness::Answer;

fn ask(model: &str, more: Value) -> Value {
    let mut body = json!({ "model": model, "max_tokens": 40, "messages": [
        { "role": "system", "content": "be short" }, { "role": "user", "content": "the quick brown fox" } ] });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

const BEDROCK: &str = "aws-bedrock/anthropic.claude-x-v1:0";
const MODELS: [&str; 7] = [
    "openai/gpt-4o",
    "anthropic/claude-x",
    "google-ai-studio/gemini-pro",
    "cohere/command-r",
    "mistral/mistral-large",
    BEDROCK,
    "workers-ai/@cf/meta/llama-3.2-1b-instruct",
];

/// With a key stored for Bedrock, which signs what it is sent.
fn rig() -> Rig {
    let file = tempfile::NamedTempFile::new().unwrap();
    let key = json!({ "accessKeyId": "AKIDFILE", "secretAccessKey": "s3cret", "region": "eu-west-1" });
    std::fs::write(&file, key.to_string()).unwrap();
    Rig::with(&format!(
        "[[provider]]\nslug = \"aws-bedrock\"\naccount = \"acme\"\nbase_url = \"{{upstream}}/aws-bedrock\"\n\
         allow_private = true\nkey = {{ file = \"{}\" }}\n",
        file.path().display()
    ))
}

fn key(model: &str) -> (&'static str, &'static str) {
    let ours = model.starts_with("workers-ai") || model == BEDROCK;
    if ours { TRUSTED } else { ("authorization", "Bearer k") }
}

#[actix_web::test]
async fn every_provider_answers_in_openais_words() {
    let rig = rig();
    for model in MODELS {
        let answer = Answer::of(rig.post("compat/chat/completions", &[key(model)], &ask(model, json!({})))).await;
        assert_eq!(answer.status, 200, "{model}: {answer:?}");
        let body: Value = serde_json::from_str(&answer.text).unwrap();
        assert_eq!(
            (&body["object"], &body["choices"][0]["message"]["role"]),
            (&json!("chat.completion"), &json!("assistant")),
            "{model}: {body}"
        );
        assert!(
            body["choices"][0]["finish_reason"].is_string() && body["usage"]["total_tokens"].as_u64() > Some(0),
            "{model}: {body}"
        );
        let streamed = ask(model, json!({ "stream": true, "stream_options": { "include_usage": true } }));
        let answer = Answer::of(rig.post("compat/chat/completions", &[key(model)], &streamed)).await;
        let all = events(&answer);
        assert_eq!(all.last().unwrap().data, "[DONE]", "{model}: {answer:?}");
        assert!(all.iter().any(|event| event.data.contains("\"usage\":{")), "{model}: {answer:?}");
        if !model.starts_with("workers-ai") {
            assert!(text(&all).contains("quick brown fox"), "{model}: {answer:?}");
        }
    }
    let anthropic = rig.upstream.requests().into_iter().find(|seen| seen.path.contains("anthropic")).unwrap();
    assert_eq!(anthropic.header("x-api-key"), Some("k"), "the key rides where this provider wants it");
    assert_eq!(anthropic.header("authorization"), None);
    assert!(anthropic.header("anthropic-version").is_some());
    assert!(anthropic.json()["system"].to_string().contains("be short"));
    rig.is_clean().await;
}

#[actix_web::test]
async fn tools_go_there_and_calls_come_back() {
    let rig = rig();
    let tools = json!({ "tools": [{ "type": "function", "function": { "name": "weather", "description": "d",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] } } }] });
    for model in &MODELS[..6] {
        let answer = Answer::of(rig.post("compat/chat/completions", &[key(model)], &ask(model, tools.clone()))).await;
        let body: Value = serde_json::from_str(&answer.text).unwrap();
        let call = &body["choices"][0]["message"]["tool_calls"][0];
        assert_eq!(call["function"]["name"], "weather", "{model}: {body}");
        serde_json::from_str::<Value>(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(body["choices"][0]["finish_reason"], "tool_calls", "{model}: {body}");
        let mut streamed = ask(model, tools.clone());
        streamed["stream"] = json!(true);
        let all = events(&Answer::of(rig.post("compat/chat/completions", &[key(model)], &streamed)).await);
        let chunks: Vec<Value> = all.iter().filter_map(|event| serde_json::from_str(&event.data).ok()).collect();
        let deltas =
            || chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"][0]["function"].as_object());
        let name: String = deltas().filter_map(|function| function.get("name")?.as_str()).collect();
        let arguments: String = deltas().filter_map(|function| function.get("arguments")?.as_str()).collect();
        assert_eq!(name, "weather", "{model}: {chunks:?}");
        serde_json::from_str::<Value>(&arguments).unwrap_or_else(|error| panic!("{model}: {error}: {arguments}"));
    }
}

#[actix_web::test]
async fn bedrock_is_asked_by_its_own_path_in_its_own_words_with_a_signature_over_both() {
    let rig = rig();
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object", "properties": {} } } }]);
    for (more, method) in [
        (json!({}), "converse"),
        (json!({ "stream": true }), "converse-stream"),
        (json!({ "tools": tools }), "converse"),
    ] {
        let answer = Answer::of(rig.post("compat/chat/completions", &[TRUSTED], &ask(BEDROCK, more.clone()))).await;
        assert_eq!((answer.status, answer.header("cf-aig-provider")), (200, "aws-bedrock"), "{answer:?}");
        assert_eq!(answer.header("cf-aig-model"), "anthropic.claude-x-v1:0");
        let seen = rig.upstream.requests().pop().unwrap();
        assert_eq!(seen.path, format!("/aws-bedrock/model/anthropic.claude-x-v1%3A0/{method}"));
        let proof = aws::check(&seen, "s3cret").unwrap();
        assert_eq!((proof.key_id.as_str(), proof.region.as_str()), ("AKIDFILE", "eu-west-1"));
        let body = seen.json();
        assert_eq!(body["system"], json!([{ "text": "be short" }]), "{body}");
        assert_eq!(body["messages"][0]["content"], json!([{ "text": "the quick brown fox" }]), "{body}");
        assert_eq!(body["inferenceConfig"]["maxTokens"], 40, "{body}");
        assert_eq!(
            body["toolConfig"]["tools"][0]["toolSpec"]["name"].is_string(),
            more.get("tools").is_some(),
            "{body}"
        );
    }
    // Without a token of ours there is no key, and so nothing that says a region.
    let answer = Answer::of(rig.post("compat/chat/completions", &[], &ask(BEDROCK, json!({})))).await;
    assert!(answer.status == 400 && answer.text.contains("region"), "{answer:?}");
    assert_eq!(rig.upstream.count(), 3);
    rig.is_clean().await;
}

#[actix_web::test]
async fn frames_of_bedrock_become_chunks_with_calls_usage_and_an_end() {
    let rig = rig();
    let tools = json!({ "stream": true, "stream_options": { "include_usage": true }, "tools": [{ "type": "function", "function": { "name": "weather",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] } } }] });
    let fake = [TRUSTED, ("x-fake", "talk; calls=2; cached=2")];
    let answer = Answer::of(rig.post("compat/chat/completions", &fake, &ask(BEDROCK, tools))).await;
    let all = events(&answer);
    assert_eq!((text(&all).as_str(), all.last().unwrap().data.as_str()), ("Let me look.", "[DONE]"), "{answer:?}");
    let chunks: Vec<Value> = all.iter().filter_map(|event| serde_json::from_str(&event.data).ok()).collect();
    let mut calls = [String::new(), String::new()];
    let deltas = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array()).flatten();
    for delta in deltas {
        let call = &mut calls[delta["index"].as_u64().unwrap() as usize];
        *call += delta["function"]["arguments"].as_str().unwrap_or_default();
    }
    assert_eq!(calls, ["{\"city\":\"fox\"}", "{\"city\":\"fox\"}"], "{chunks:?}");
    let finishes: Vec<_> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(finishes, ["tool_calls"], "{chunks:?}");
    let usage = &chunks.last().unwrap()["usage"];
    let cached = &usage["prompt_tokens_details"]["cached_tokens"];
    assert_eq!((&usage["prompt_tokens"], cached), (&json!(6), &json!(2)), "{usage}");
    let short = Answer::of(rig.post(
        "compat/chat/completions",
        &[TRUSTED],
        &ask(BEDROCK, json!({ "max_tokens": 2, "stream": true })),
    ))
    .await;
    assert!(short.text.contains("\"finish_reason\":\"length\"") && short.text.contains("[DONE]"), "{short:?}");
    for fake in ["error-after=3", "garbage-after=3", "reset-after=3", "close-after=3"] {
        let request =
            rig.post("compat/chat/completions", &[TRUSTED, ("x-fake", fake)], &ask(BEDROCK, json!({ "stream": true })));
        let answer = Answer::of(request).await;
        let all = events(&answer);
        let last: Value = serde_json::from_str(&all.last().unwrap().data).unwrap();
        assert!(last["error"]["message"].is_string(), "{fake}: {answer:?}");
        assert!(!answer.text.contains("[DONE]") && !answer.text.contains("finish_reason\":\"s"), "{fake}: {answer:?}");
        assert_eq!(text(&all), "aws-bedrock anthropic.claude-x-v1:0 heard: ", "{fake}");
    }
    rig.is_clean().await;
}

#[actix_web::test]
async fn errors_keep_their_status_and_get_openais_shape() {
    let rig = rig();
    for model in &MODELS[..6] {
        for status in [400, 401, 429, 500] {
            let fake = status.to_string();
            let request = rig.post("compat/chat/completions", &[key(model), ("x-fake", &fake)], &ask(model, json!({})));
            let answer = Answer::of(request).await;
            assert_eq!(answer.status, status, "{model}: {answer:?}");
            let body: Value = serde_json::from_str(&answer.text).unwrap();
            assert!(body["error"]["message"].is_string(), "{model} {status}: {body}");
        }
    }
}

#[actix_web::test]
async fn anthropics_words_reach_any_model() {
    let rig = rig();
    for model in [
        "claude-x",
        "openai/gpt-4o",
        "google-ai-studio/gemini-pro",
        BEDROCK,
        "workers-ai/@cf/meta/llama-3.2-1b-instruct",
    ] {
        let ask = async |stream: bool| {
            let body = json!({ "model": model, "max_tokens": 30, "stream": stream, "system": "be short",
                "messages": [{ "role": "user", "content": [{ "type": "text", "text": "lorem ipsum" }] }] });
            let url = rig.daemon.url("/client/v4/accounts/acme/ai/v1/messages");
            let request = reqwest::Client::new().post(url).header("x-api-key", "secret");
            Answer::of(request.header("anthropic-version", "2023-06-01").json(&body)).await
        };
        let whole = ask(false).await;
        assert_eq!(whole.status, 200, "{model}: {whole:?}");
        let body: Value = serde_json::from_str(&whole.text).unwrap();
        assert_eq!(
            (&body["type"], &body["role"], &body["content"][0]["type"]),
            (&json!("message"), &json!("assistant"), &json!("text")),
            "{model}: {body}"
        );
        assert!(body["usage"]["output_tokens"].as_u64() > Some(0), "{model}: {body}");
        let streamed = ask(true).await;
        let names: Vec<_> =
            events(&streamed).into_iter().filter_map(|event| event.name).filter(|name| name != "ping").collect();
        assert_eq!(names.first().map(String::as_str), Some("message_start"), "{model}: {streamed:?}");
        assert_eq!(names.last().map(String::as_str), Some("message_stop"), "{model}: {streamed:?}");
        assert!(names.iter().any(|name| name == "content_block_delta"), "{model}: {names:?}");
    }
    let seen = rig.upstream.requests();
    assert!(seen.iter().all(|seen| seen.header("x-api-key") != Some("secret")), "our token is nobody else's");
}

#[actix_web::test]
async fn cloudflares_surface_leads_to_any_provider_as_well() {
    let rig = Rig::start();
    let url = rig.daemon.url("/client/v4/accounts/acme/ai/v1/chat/completions");
    let request = reqwest::Client::new().post(&url).bearer_auth("secret").json(&ask("openai/gpt-4o", json!({})));
    let answer = Answer::of(request).await;
    assert_eq!((answer.status, answer.header("cf-aig-provider")), (200, "openai"), "{answer:?}");
    let seen = rig.upstream.requests().pop().unwrap();
    assert_eq!(seen.header("authorization"), None, "the token of the gateway does not leak");
    assert_eq!(seen.json()["model"], "gpt-4o");
    let local = json!({ "model": "@cf/meta/llama-3.2-1b-instruct", "max_tokens": 4, "messages": [{ "role": "user", "content": "x" }] });
    let request = reqwest::Client::new().post(&url).bearer_auth("secret").header("cf-aig-gateway-id", "g").json(&local);
    assert_eq!(Answer::of(request).await.header("cf-aig-provider"), "workers-ai");
    let run = rig.daemon.url("/client/v4/accounts/acme/ai/run/@cf/meta/llama-3.2-1b-instruct");
    let request = reqwest::Client::new().post(run).bearer_auth("secret").header("cf-aig-gateway-id", "g");
    let answer = Answer::of(request.json(&json!({ "prompt": "x", "max_tokens": 4 }))).await;
    assert_eq!(
        (answer.json()["success"].clone(), answer.header("cf-aig-provider")),
        (json!(true), "workers-ai"),
        "{answer:?}"
    );
    let absent =
        reqwest::Client::new().post(&url).bearer_auth("secret").header("cf-aig-gateway-id", "absent").json(&local);
    assert_eq!(Answer::of(absent).await.status, 400);
}

#[actix_web::test]
async fn the_run_form_has_an_envelope_of_its_own() {
    let rig = Rig::start();
    let token = [("cf-aig-authorization", "secret")];
    let body = json!({ "model": "@cf/meta/llama-3.2-1b-instruct", "input": { "prompt": "x", "max_tokens": 3 } });
    let answer = Answer::of(rig.post("run", &token, &body)).await.json();
    assert_eq!((&answer["state"], &answer["provider"]), (&json!("Completed"), &json!("workers-ai")), "{answer}");
    assert!(answer["result"]["response"].is_string(), "{answer}");
    let body = json!({ "model": "gpt-4o", "provider": "openai", "input": { "messages": [{ "role": "user", "content": "x" }] } });
    let failed = Answer::of(rig.post("run", &[("x-fake", "429")], &body)).await;
    assert_eq!((failed.status, failed.json()["state"].clone()), (429, json!("Failed")), "{failed:?}");
}
