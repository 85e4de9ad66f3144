//! Cloudflare's native surface.

use serde_json::json;

use crate::harness::{CHATTY, CLASSIC, Daemon, joined};

const AI: &str = "/client/v4/accounts/0123456789abcdef0123456789abcdef/ai";

#[tokio::test]
async fn errors_have_the_envelope_the_code_and_the_request_in_the_text() {
    let daemon = Daemon::start(|_| {});
    let check = async |path: &str, body: serde_json::Value, status: u16, code: u32, words: &str| {
        let answer = daemon.post(&format!("{AI}{path}"), body).await;
        let json = answer.json();
        let error = &json["errors"][0];
        assert_eq!((answer.status, &error["code"]), (status, &json!(code)), "{path}: {json}");
        assert_eq!((&json["success"], &json["result"], &json["messages"]), (&json!(false), &json!({}), &json!([])));
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(words), "{path}: {message}");
        if message.starts_with("AiError: ") {
            assert!(message.ends_with(&format!(" ({})", answer.header("cf-ai-req-id"))), "{message}");
        }
        assert_eq!(answer.header("cf-ai-neurons"), "", "errors cost nothing");
    };
    let run = format!("/run/{CLASSIC}");
    check(
        &run,
        json!({}),
        400,
        5006,
        "AiError: Bad input: Error: oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt'",
    )
    .await;
    check(&run, json!({"prompt": "a", "messages": []}), 400, 5006, "2 matches").await;
    check(&run, json!({"prompt": "a", "temperature": 9}), 400, 5006, "(at '/temperature')").await;
    check(&run, json!({"messages": [{"role": "user"}]}), 400, 5006, "(at '/messages/0/content')").await;
    check(&run, json!({"prompt": "a", "lora": "mine"}), 405, 5005, "LoRA").await;
    check("/run/@cf/no/model", json!({"prompt": "a"}), 400, 5007, "AiError: No such model `@cf/no/model` or task")
        .await;
    check("/run/@cf%2Fno%2Fmodel", json!({"prompt": "a"}), 400, 5007, "No such model `@cf/no/model` or task").await;
    check("/run/@cf/baai/bge-m3", json!({"text": "a"}), 400, 5007, "not loaded on this server").await;
    check("/run/@cf/openai/whisper", json!({"audio": []}), 400, 5007, "or task").await;
    check("/run", json!({"model": "@cf/no/model", "input": {"prompt": "a"}}), 400, 5007, "No such model").await;
    check("/run", json!({"model": CLASSIC}), 400, 5006, "'input' is required").await;
    check(&format!("{run}?queueRequest=true"), json!({"requests": [{"prompt": "a"}]}), 400, 5006, "keeps no batches")
        .await;
    check(&run, json!({"requests": []}), 400, 5006, "must hold 1 to 100 requests, not 0").await;
    check(&format!("{run}?tags=a,,b"), json!({"prompt": "a"}), 400, 5006, "(at '/tags')").await;
    check("/run/dynamic/route", json!({}), 404, 7000, "No route for that URI").await;
    check("/tomarkdown", json!({}), 400, 5006, "Markdown conversion is not available").await;
    check("/nothing", json!({}), 404, 7000, "No route for that URI").await;
    check("/models/search", json!({}), 405, 7001, "Method POST not available").await;
}

#[tokio::test]
async fn the_catalog_is_searched_by_word_task_author_and_page() {
    let daemon = Daemon::start(|_| {});
    let search = async |query: &str| daemon.get(&format!("{AI}/models/search?{query}")).await.json();
    let all = search("per_page=1000").await;
    let total = all["result_info"]["total_count"].as_u64().unwrap();
    assert_eq!(all["result"].as_array().unwrap().len() as u64, total);
    assert!(total > 50 && all["success"] == true);

    let llama = search("search=llama-3.2-1b").await;
    assert_eq!(llama["result"][0]["name"], CLASSIC);
    assert_eq!(llama["result"][0]["task"]["name"], "Text Generation");
    let price =
        llama["result"][0]["properties"].as_array().unwrap().iter().find(|p| p["property_id"] == "price").unwrap();
    assert_eq!(price["value"][0], json!({"unit": "per M input tokens", "price": 0.027, "currency": "USD"}));

    for query in ["task=Text%20Generation", "task=c329a1f9-323d-4e91-b2aa-582dd4188d34"] {
        let found = search(&format!("{query}&author=meta&per_page=1000")).await;
        let names = found["result"].as_array().unwrap();
        assert!(!names.is_empty() && names.iter().all(|m| m["name"].as_str().unwrap().contains("/meta/")), "{query}");
    }
    let page = search("page=2&per_page=3").await;
    assert_eq!(page["result"][0], all["result"][3]);
    assert_eq!((&page["result_info"]["count"], &page["result_info"]["page"]), (&json!(3), &json!(2)));
    let open = search("format=openrouter&search=llama-3.2-1b").await;
    assert_eq!(open["data"][0]["pricing"]["prompt"], "0.000000027027");
    assert_eq!(daemon.get(&format!("{AI}/models/search?page=0")).await.status, 400);
}

#[tokio::test]
async fn schemas_tasks_and_authors_are_listed() {
    let daemon = Daemon::start(|_| {});
    let schema = daemon.get(&format!("{AI}/models/schema?model={CLASSIC}")).await.json();
    assert_eq!(schema["result"]["input"]["oneOf"][0]["required"], json!(["prompt"]));
    assert_eq!(schema["result"]["input"]["oneOf"][1]["properties"]["max_tokens"]["default"], 256);
    assert_eq!(daemon.get(&format!("{AI}/models/schema?model=x")).await.status, 400);
    let tasks = daemon.get(&format!("{AI}/tasks/search")).await.json();
    assert_eq!(tasks["result"].as_array().unwrap().len(), 11);
    let authors = daemon.get(&format!("{AI}/authors/search")).await.json();
    assert!(authors["result"].as_array().unwrap().iter().any(|author| author["name"] == "meta"));
}

#[tokio::test]
async fn the_compatible_routes_answer_errors_with_both_keys() {
    let daemon = Daemon::start(|_| {});
    let answer = daemon.post(&format!("{AI}/v1/chat/completions"), json!({"model": "x", "messages": []})).await;
    assert_eq!((answer.status, &answer.json()["errors"][0]["code"]), (400, &json!(5007)));
    assert_eq!(answer.json()["error"]["code"], "model_not_found");
    let answer = daemon.post(&format!("{AI}/v1/moderations"), json!({})).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("unsupported")));
    // Anthropic's clients read errors in their own words, and may put `/v1` twice.
    let answer = daemon.post(&format!("{AI}/v1/v1/messages"), json!({})).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (400, &json!("invalid_request_error")), "{answer:?}");
}

#[tokio::test]
async fn a_classic_model_answers_in_the_envelope_and_bills_in_the_header() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    for model in [CLASSIC.to_owned(), CLASSIC.replace('/', "%2F"), CLASSIC.replace('@', "%40")] {
        let answer =
            daemon.post(&format!("{AI}/run/{model}"), json!({"prompt": "hi", "raw": true, "temperature": 0})).await;
        let json = answer.json();
        assert_eq!((answer.status, &json["success"]), (200, &json!(true)), "{json}");
        assert_eq!((&json["errors"], &json["messages"]), (&json!([]), &json!([])));
        let result = &json["result"];
        assert_eq!(result["response"].as_str().unwrap().len(), 256, "the default length");
        assert_eq!(result["tool_calls"], json!([]));
        assert_eq!(
            (&result["usage"]["prompt_tokens"], &result["usage"]["completion_tokens"]),
            (&json!(2), &json!(256))
        );
        // 2 tokens read at 2,457 and 256 made at 18,252 neurons a million.
        assert_eq!(result["usage"]["neurons"], json!(4.677426));
        assert_eq!(answer.header("cf-ai-neurons"), "4.68");
    }
    let unified = daemon
        .post(&format!("{AI}/run"), json!({"model": CLASSIC, "input": {"prompt": "hi", "max_tokens": 3}}))
        .await
        .json();
    assert_eq!(unified["result"]["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn a_classic_stream_has_padded_text_then_usage_then_done() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 30});
    let whole = daemon.post(&format!("{AI}/run/{CLASSIC}"), body.clone()).await.json();
    let mut body = body;
    body["stream"] = json!(true);
    let chunks = daemon.post(&format!("{AI}/run/{CLASSIC}"), body).await.chunks();
    assert_eq!(joined(&chunks, "/response"), whole["result"]["response"].as_str().unwrap());
    let (last, texts) = chunks.split_last().unwrap();
    assert_eq!((&last["response"], &last["usage"]["completion_tokens"]), (&json!(""), &json!(30)));
    assert_eq!(last["usage"]["neurons"], whole["result"]["usage"]["neurons"]);
    assert_eq!(texts[0]["tool_calls"], json!([]));
    assert!(texts[1..].iter().all(|text| text.get("tool_calls").is_none()));
    let padding: std::collections::HashSet<usize> =
        texts.iter().map(|text| text["p"].as_str().unwrap().len()).collect();
    assert!(padding.len() > 3, "{padding:?}");
}

#[tokio::test]
async fn a_chat_schema_model_answers_with_a_chat_completion() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 10, "n": 2});
    let whole = daemon.post(&format!("{AI}/run/{CHATTY}"), body.clone()).await.json();
    assert_eq!((&whole["success"], &whole["result"]["object"]), (&json!(true), &json!("chat.completion")));
    assert_eq!(whole["result"]["choices"].as_array().unwrap().len(), 2);
    let mut body = body;
    (body["stream"], body["n"]) = (json!(true), json!(1));
    let chunks = daemon.post(&format!("{AI}/run/{CHATTY}"), body).await.chunks();
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!((&last["response"], &last["usage"]["completion_tokens"]), (&json!(""), &json!(10)));
    assert!(rest.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["p"].is_string()));
    assert_eq!(
        joined(rest, "/choices/0/delta/content"),
        whole["result"]["choices"][0]["message"]["content"].as_str().unwrap()
    );
}

#[tokio::test]
async fn the_compatible_routes_answer_bare_openai_objects() {
    let daemon = Daemon::serving("sim", |_| {});
    let chat = json!({"model": CLASSIC, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5});
    let answer = daemon.post(&format!("{AI}/v1/chat/completions"), chat).await.json();
    assert_eq!(answer["object"], "chat.completion");
    let answer = daemon
        .post(&format!("{AI}/v1/completions"), json!({"model": CLASSIC, "prompt": "hi", "max_tokens": 5}))
        .await
        .json();
    assert_eq!(answer["object"], "text_completion");
    let answer = daemon
        .post(&format!("{AI}/v1/responses"), json!({"model": CLASSIC, "input": "hi", "max_output_tokens": 5}))
        .await
        .json();
    assert_eq!(answer["object"], "response");
    let list = daemon.get(&format!("{AI}/v1/models")).await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(daemon.get(&format!("{AI}/v1/models/{CHATTY}")).await.json()["id"], CHATTY);
}

#[tokio::test]
async fn whoever_will_not_wait_is_told_at_once() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=20000", |config| config.engine.max_running = 1);
    let slow = || {
        let request = reqwest::Client::new().post(daemon.url(&format!("{AI}/run/{CLASSIC}")));
        let request = request.json(&json!({"prompt": "hi", "max_tokens": 500, "stream": true}));
        tokio::spawn(async move { request.send().await.unwrap() })
    };
    let load =
        |daemon: &Daemon, name: &str| daemon.metric(&format!(r#"neurond_{name}{{device="0",model="{CLASSIC}"}}"#));
    let first = slow().await.unwrap();
    let running = |daemon: &Daemon| load(daemon, "running") == 1.0 && load(daemon, "queue_depth") == 0.0;
    daemon.eventually("the first call runs", running).await;
    let second = slow();
    daemon.eventually("the second call waits", |daemon| load(daemon, "queue_depth") == 1.0).await;
    let refused =
        daemon.post(&format!("{AI}/run/{CLASSIC}"), json!({"prompt": "hi", "options": {"rejectIfBusy": true}})).await;
    assert_eq!((refused.status, &refused.json()["errors"][0]["code"]), (429, &json!(3040)));
    second.abort();
    drop(first);
}
