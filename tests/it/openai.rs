//! OpenAI's surface.

use neurond::config::Draft;
use serde_json::{Value, json};

use crate::harness::{Answer, CLASSIC, CONTEXT, Daemon, joined};

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
    check("/v1/embeddings", json!({"model": "x", "input": "y"}), 404, json!("model_not_found"), "`x` or task").await;
    check("/v1/moderations", json!({}), 400, json!("unsupported"), "Moderation is not available").await;
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
        json!({"model": CLASSIC, "messages": hi, "tools": [{"type": "web_search"}]}),
        400,
        json!("unsupported"),
        "offer functions",
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
    let none = Daemon::start(|_| {});
    assert_eq!(none.get("/v1/models").await.json(), json!({"object": "list", "data": []}));
    let daemon = Daemon::serving("sim", |_| {});
    let list = daemon.get("/v1/models").await.json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["data"][0]["id"]), (2, &json!(CLASSIC)));
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
    daemon
        .eventually("both are counted", |daemon| {
            counted(daemon, "/v1/models/{model}") == 1.0 && counted(daemon, "other") == 1.0
        })
        .await;
    assert!(!daemon.get("/metrics").await.text.contains("whatever-i-like"));
}

const CHAT: &str = "/v1/chat/completions";

/// A chat that answers the same each time.
fn chat(more: Value) -> Value {
    with(
        json!({"model": CLASSIC, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}),
        more,
    )
}

fn completion(more: Value) -> Value {
    with(json!({"model": CLASSIC, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}), more)
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_streamed_chat_says_the_same_as_a_whole_one() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let answer = daemon.post(CHAT, chat(json!({"max_tokens": 40}))).await;
    let whole = answer.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!((whole["object"].as_str(), whole["model"].as_str()), (Some("chat.completion"), Some(CLASSIC)));
    assert_eq!((text.len(), whole["choices"][0]["finish_reason"].as_str()), (40, Some("length")));
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 40);
    assert_eq!(usage["total_tokens"].as_u64(), usage["prompt_tokens"].as_u64().map(|prompt| prompt + 40));
    assert!(usage["neurons"].as_f64().unwrap() > 0.0 && !answer.header("cf-ai-neurons").is_empty());

    let streamed = daemon
        .post(CHAT, chat(json!({"max_tokens": 40, "stream": true, "stream_options": {"include_usage": true}})))
        .await;
    let chunks = streamed.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk"));
    assert_eq!(joined(&chunks, "/choices/0/delta/content"), text);
    let [.., finish, last] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(
        (&finish["choices"][0]["finish_reason"], &finish["choices"][0]["delta"]),
        (&json!("length"), &json!({}))
    );
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(40)));
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["usage"].is_null()));

    let plain = daemon.post(CHAT, chat(json!({"max_tokens": 40, "stream": true}))).await.chunks();
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none() && chunk.get("p").is_none()));
}

#[tokio::test]
async fn without_a_word_about_length_an_answer_has_the_catalogs() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let whole = daemon.post(CHAT, chat(json!({}))).await.json();
    assert_eq!(
        (&whole["usage"]["completion_tokens"], &whole["choices"][0]["finish_reason"]),
        (&json!(256), &json!("length"))
    );
}

#[tokio::test]
async fn several_answers_have_their_own_index_in_both_forms() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let more = json!({"n": 3, "temperature": 2, "seed": 7, "max_tokens": 30});
    let whole = daemon.post(CHAT, chat(more.clone())).await.json();
    let texts: Vec<&str> = (0..3).map(|i| whole["choices"][i]["message"]["content"].as_str().unwrap()).collect();
    assert_eq!((0..3).map(|i| whole["choices"][i]["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    assert_eq!(whole["usage"]["completion_tokens"], 90);

    let chunks = daemon.post(CHAT, with(chat(more), json!({"stream": true}))).await.chunks();
    for (i, text) in texts.iter().enumerate() {
        let own: Vec<Value> = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == i).cloned().collect();
        assert_eq!(joined(&own, "/choices/0/delta/content"), *text);
        assert_eq!(own.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_is_named() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let whole = daemon.post(CHAT, chat(json!({"max_tokens": 30}))).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let stop = &text[10..13];
    let cut = daemon.post(CHAT, chat(json!({"max_tokens": 30, "stop": ["no such thing", stop]}))).await.json();
    let choice = &cut["choices"][0];
    let at = text.find(stop).unwrap();
    assert_eq!(choice["message"]["content"], text[..at]);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
}

#[tokio::test]
async fn log_probabilities_come_in_the_chat_form_and_in_the_legacy_form() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let whole = daemon.post(CHAT, chat(json!({"max_tokens": 9, "logprobs": true, "top_logprobs": 2}))).await.json();
    let choice = &whole["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 9);
    assert_eq!(joined(tokens, "/token"), choice["message"]["content"].as_str().unwrap());
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
        assert_eq!(token["top_logprobs"][0]["token"], token["token"], "greedy picks the best");
    }
    let chunks = daemon.post(CHAT, chat(json!({"max_tokens": 9, "logprobs": true, "stream": true}))).await.chunks();
    let streamed: Vec<Value> =
        chunks.iter().filter_map(|c| c.pointer("/choices/0/logprobs/content")?.as_array()).flatten().cloned().collect();
    assert_eq!(streamed.len(), 9);

    let legacy = daemon.post("/v1/completions", completion(json!({"logprobs": 3}))).await.json();
    let logprobs = &legacy["choices"][0]["logprobs"];
    let count = |name: &str| logprobs[name].as_array().unwrap().len();
    assert_eq!(["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(count), [12; 4]);
    assert_eq!(logprobs["text_offset"][11], 11);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 3);
    let chunks = daemon.post("/v1/completions", completion(json!({"logprobs": 0, "stream": true}))).await.chunks();
    let offsets: Vec<&Value> =
        chunks.iter().filter_map(|c| c.pointer("/choices/0/logprobs/text_offset")?.as_array()).flatten().collect();
    assert_eq!(offsets, (0..12).map(Value::from).collect::<Vec<_>>().iter().collect::<Vec<_>>());
}

#[tokio::test]
async fn completions_answer_each_prompt_n_times_in_order() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let ask = async |more: Value| daemon.post("/v1/completions", completion(more)).await;
    let alone = ask(json!({})).await.json();
    assert_eq!(alone["object"], "text_completion");
    let text = alone["choices"][0]["text"].as_str().unwrap().to_owned();
    let bytes: Vec<u8> = b"Once upon a time".to_vec();
    assert_eq!(ask(json!({"prompt": bytes})).await.json()["choices"][0]["text"], text, "tokens are bytes here");

    let both = json!({"prompt": ["Another story", "Once upon a time"], "n": 2});
    let many = ask(both.clone()).await.json();
    let choices = many["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!((&choices[2]["text"], &choices[3]["text"]), (&json!(text), &json!(text)));
    assert_ne!(choices[0]["text"], text);
    assert_eq!(many["usage"]["completion_tokens"], 48);
    assert_eq!(many["usage"]["prompt_tokens"], 13 + 16);

    let chunks = ask(with(both, json!({"stream": true, "stream_options": {"include_usage": true}}))).await.chunks();
    let third: Vec<Value> = chunks.iter().filter(|c| c["choices"][0]["index"] == 2).cloned().collect();
    assert_eq!(joined(&third, "/choices/0/text"), text);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 48);

    let echoed = ask(json!({"echo": true})).await.json();
    assert_eq!(echoed["choices"][0]["text"], format!("Once upon a time{text}"));
    assert_eq!(
        joined(&ask(json!({"echo": true, "stream": true})).await.chunks(), "/choices/0/text"),
        format!("Once upon a time{text}")
    );
}

#[tokio::test]
async fn responses_have_their_object_and_their_named_events() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let body = json!({"model": CLASSIC, "input": "Tell me a story.", "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 20});
    let whole = daemon.post("/v1/responses", body.clone()).await.json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    assert_eq!((text.len(), whole["usage"]["output_tokens"].as_u64()), (20, Some(20)));

    let streamed = daemon.post("/v1/responses", with(body, json!({"stream": true}))).await;
    let events = streamed.events();
    let values: Vec<Value> = events.iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect();
    for (i, (event, value)) in events.iter().zip(&values).enumerate() {
        assert_eq!(
            (event.name.as_deref(), value["sequence_number"].as_u64()),
            (value["type"].as_str(), Some(i as u64))
        );
    }
    let mut names: Vec<&str> = values.iter().map(|value| value["type"].as_str().unwrap()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    assert_eq!(joined(&values, "/delta"), text);
    assert_eq!(values.last().unwrap()["response"]["output"][0]["content"][0]["text"], text);

    let ended = Daemon::serving("sim:end_in=1", |_| {});
    let body =
        json!({"model": CLASSIC, "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]});
    let whole = ended.post("/v1/responses", body).await.json();
    assert_eq!((&whole["status"], &whole["incomplete_details"]), (&json!("completed"), &Value::Null));
}

#[tokio::test]
async fn a_prompt_seen_before_is_read_from_the_cache_and_says_so() {
    let daemon = Daemon::serving("sim", |_| {});
    let body = completion(json!({"prompt": "x".repeat(200)}));
    let cached = async || {
        daemon.post("/v1/completions", body.clone()).await.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached().await, 0);
    assert!(cached().await >= 128, "whole blocks of the prompt");
}

#[tokio::test]
async fn what_does_not_fit_the_context_is_refused_with_both_figures() {
    let daemon = Daemon::serving("sim", |_| {});
    let answer = daemon
        .post("/v1/completions", completion(json!({"prompt": "x".repeat(CONTEXT as usize), "max_tokens": 10})))
        .await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &error["code"]), (400, &json!("context_length_exceeded")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&format!("({})", CONTEXT + 10)) && message.contains(&format!("({CONTEXT})")), "{message}");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=20000", |config| {
        config.engine.max_running = 1;
        config.engine.max_queue = 1;
    });
    let long = |daemon: &Daemon| {
        let request =
            reqwest::Client::new().post(daemon.url(CHAT)).json(&chat(json!({"max_tokens": 500, "stream": true})));
        tokio::spawn(async move { request.send().await.unwrap() })
    };
    let series = format!(r#"neurond_{{}}{{device="0",model="{CLASSIC}"}}"#);
    let load = |daemon: &Daemon, name: &str| daemon.metric(&series.replacen("{}", name, 1));
    let first = long(&daemon).await.unwrap();
    let running = |daemon: &Daemon| load(daemon, "running") == 1.0 && load(daemon, "queue_depth") == 0.0;
    daemon.eventually("the first call runs", running).await;
    let second = long(&daemon);
    daemon.eventually("the second call waits", |daemon| load(daemon, "queue_depth") == 1.0).await;
    let refused = daemon.post(CHAT, chat(json!({}))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("overloaded")));
    assert!((1..=60).contains(&refused.header("retry-after").parse::<u32>().unwrap()), "{refused:?}");
    let native = daemon.post(&format!("/client/v4/accounts/a/ai/run/{CLASSIC}"), json!({"prompt": "hi"})).await;
    assert_eq!((native.status, &native.json()["errors"][0]["code"]), (429, &json!(3040)));
    assert!(native.text.contains("Capacity temporarily exceeded, please try again."), "{}", native.text);

    // Both clients leave: the work is cancelled, whether it ran or waited.
    second.abort();
    drop(first);
    daemon
        .eventually("the engine is idle again", |daemon| load(daemon, "queue_depth") + load(daemon, "running") == 0.0)
        .await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_work_streaming_or_waiting() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=10000", |_| {});
    for stream in [true, false] {
        let request =
            reqwest::Client::new().post(daemon.url(CHAT)).json(&chat(json!({"max_tokens": 1500, "stream": stream})));
        let call = tokio::spawn(async move { request.send().await.unwrap().bytes().await });
        let running = format!(r#"neurond_running{{device="0",model="{CLASSIC}"}}"#);
        daemon.eventually("the sequence runs", |daemon| daemon.metric(&running) == 1.0).await;
        call.abort();
        daemon.eventually("the sequence is gone", |daemon| daemon.metric(&running) == 0.0).await;
        daemon.eventually("nothing is being answered", |daemon| daemon.metric("neurond_http_in_flight") == 0.0).await;
    }
    let cancelled = format!(r#"neurond_cancelled_total{{model="{CLASSIC}"}}"#);
    assert_eq!(daemon.metric(&cancelled), 2.0);
}

#[tokio::test]
async fn a_stream_that_fails_midway_ends_with_an_error_and_without_done() {
    let daemon = Daemon::serving("sim:end_in=0,fail_at=6", |_| {});
    let answer = daemon.post(CHAT, chat(json!({"stream": true}))).await;
    let events = answer.events();
    let last: Value = serde_json::from_str(&events.last().unwrap().data).unwrap();
    assert!(last["error"]["message"].is_string() && last["error"]["type"] == "server_error", "{last}");
    assert!(!answer.text.contains("[DONE]"), "{}", answer.text);
    assert!(events.len() > 2, "some text came first: {}", answer.text);
}

#[tokio::test]
async fn an_open_stream_ends_well_while_the_server_drains() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=20000", |_| {});
    let request = reqwest::Client::new().post(daemon.url(CHAT)).json(&chat(json!({"max_tokens": 60, "stream": true})));
    let response = request.send().await.unwrap();
    daemon.enter(neurond::base::Phase::Draining);
    let stopped = daemon.stop();
    let text = response.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert_eq!(text.matches("chat.completion.chunk").count(), 1 + 60 + 1);
    stopped.await;
}

#[tokio::test]
async fn one_id_sent_twice_at_once_is_billed_twice() {
    let daemon = Daemon::serving("sim:end_in=0,step_us=5000", |_| {});
    let call = || {
        let request = reqwest::Client::new()
            .post(daemon.url(CHAT))
            .header("x-request-id", "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c");
        Answer::of(request.json(&chat(json!({"max_tokens": 20}))))
    };
    let (a, b) = futures_util::future::join(call(), call()).await;
    assert_ne!(a.header("x-request-id"), b.header("x-request-id"));
    let rows = daemon.rows().await;
    assert_eq!(rows.iter().map(|(_, row)| row.requests).sum::<u64>(), 2);
}

#[tokio::test]
async fn a_text_stops_repeating_itself_when_told_to() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let text = async |more: Value| {
        let body = completion(with(json!({"max_tokens": 60}), more));
        daemon.post("/v1/completions", body).await.json()["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let longest_run = |text: &str| {
        let same = text.as_bytes().chunk_by(|a, b| a == b).map(<[u8]>::len);
        same.max().unwrap_or(0)
    };
    // A bias that lets nothing but `a` and `b` through; `a` is the better one.
    let bias = json!({"97": 100, "98": 90});
    assert_eq!(text(json!({"logit_bias": bias})).await, "a".repeat(60));
    // Each `a` that would carry on a run of two or more costs more than the one before.
    let dry = text(json!({"logit_bias": bias, "dry_multiplier": 4, "dry_base": 2})).await;
    assert!(longest_run(&dry) < 12 && dry.contains('b'), "{dry}");
    let penalty = json!({"logit_bias": bias, "frequency_penalty": 2, "repeat_last_n": 8});
    let windowed = text(penalty).await;
    // The penalty is worth ten of the bias at most when five of the window are `a`: from then on they keep a balance.
    let late = windowed[40..].matches('a').count();
    assert!((8..=18).contains(&late), "{windowed}");
    let unwindowed = text(json!({"logit_bias": bias, "frequency_penalty": 2})).await;
    assert!((9..=12).contains(&unwindowed[40..].matches('a').count()), "{unwindowed}");
    let typical = json!({"temperature": 1, "seed": 3, "typical_p": 0.2});
    assert_eq!(text(typical.clone()).await, text(typical).await);
}

#[tokio::test]
async fn what_the_model_thinks_of_the_prompt_comes_in_both_forms() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let ask = async |more: Value| daemon.post("/v1/completions", completion(more)).await;
    let plain = ask(json!({"logprobs": 2})).await.json();
    let answer = plain["choices"][0]["text"].as_str().unwrap();
    assert!(plain["choices"][0].get("prompt_logprobs").is_none());

    let whole = ask(json!({"logprobs": 2, "echo": true})).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], format!("Once upon a time{answer}"));
    let logprobs = &choice["logprobs"];
    let all = |name: &str| logprobs[name].as_array().unwrap().clone();
    assert_eq!(["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|name| all(name).len()), [28; 4]);
    assert_eq!((all("tokens")[0].as_str(), all("tokens")[5].as_str()), (Some("O"), Some("u")));
    assert_eq!(all("text_offset"), (0..28).map(Value::from).collect::<Vec<_>>());
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for at in 1..28 {
        assert!(logprobs["token_logprobs"][at].as_f64().unwrap() <= 0.0);
        assert_eq!(logprobs["top_logprobs"][at].as_object().unwrap().len(), 2);
    }
    let of_answer = |name: &str| all(name)[16..].to_vec();
    assert_eq!(json!(of_answer("token_logprobs")), plain["choices"][0]["logprobs"]["token_logprobs"]);

    // Asked about its own answer, the model says what it said of it.
    let told =
        ask(json!({"prompt": format!("Once upon a time{answer}"), "max_tokens": 0, "echo": true, "logprobs": 2}));
    let told = told.await.json();
    assert_eq!(told["choices"][0]["text"], choice["text"]);
    assert_eq!(told["choices"][0]["logprobs"], *logprobs);
    assert_eq!(
        (told["usage"]["prompt_tokens"].as_u64(), told["usage"]["completion_tokens"].as_u64()),
        (Some(28), Some(0))
    );
    assert_eq!(told["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "a prompt that is looked at is computed");

    let chunks = ask(json!({"logprobs": 2, "echo": true, "stream": true})).await.chunks();
    assert_eq!(joined(&chunks, "/choices/0/text"), choice["text"].as_str().unwrap());
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let pointer = format!("/choices/0/logprobs/{name}");
        let streamed: Vec<Value> =
            chunks.iter().filter_map(|c| c.pointer(&pointer)?.as_array()).flatten().cloned().collect();
        assert_eq!(streamed, all(name), "{name}");
    }

    // vLLM's form, by token id; every token of the simulated model is a byte.
    let vllm = ask(json!({"prompt_logprobs": 1, "n": 2})).await.json();
    for choice in vllm["choices"].as_array().unwrap() {
        let tokens = choice["prompt_logprobs"].as_array().unwrap();
        assert!(tokens.len() == 16 && tokens[0].is_null() && choice["logprobs"].is_null(), "{choice}");
        let entry = &tokens[5]["117"];
        assert_eq!(entry["decoded_token"], "u");
        assert_eq!(entry["logprob"], logprobs["token_logprobs"][5]);
        let best = tokens[5].as_object().unwrap().values().find(|entry| entry["rank"] == 1).unwrap();
        assert!(best["logprob"].as_f64() >= entry["logprob"].as_f64());
    }
    let chatted = daemon.post(CHAT, chat(json!({"prompt_logprobs": 0, "max_tokens": 3}))).await.json();
    let tokens = chatted["prompt_logprobs"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, chatted["usage"]["prompt_tokens"].as_u64().unwrap());
    assert!(tokens[1..].iter().all(|token| token.as_object().unwrap().len() == 1));
    let plain = daemon.post(CHAT, chat(json!({"max_tokens": 3}))).await.json();
    assert!(plain["prompt_logprobs"].is_null());
    assert_eq!(plain["choices"], chatted["choices"]);

    let long = json!({"prompt": "x".repeat(1_000), "prompt_logprobs": 20, "max_tokens": 1});
    assert_eq!(ask(long).await.json()["choices"][0]["prompt_logprobs"].as_array().unwrap().len(), 1_000);
}

#[tokio::test]
async fn the_best_of_several_answers_is_given_and_all_are_counted() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    let ask = async |more: Value| {
        daemon.post("/v1/completions", completion(with(json!({"temperature": 1.5, "seed": 5}), more))).await.json()
    };
    let all = ask(json!({"n": 5, "logprobs": 0})).await;
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|p| p.as_f64().unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    let mut order: Vec<&Value> = all["choices"].as_array().unwrap().iter().collect();
    order.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = ask(json!({"n": 2, "best_of": 5})).await;
    let choices = best["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    for (at, choice) in choices.iter().enumerate() {
        assert_eq!((choice["index"].as_u64(), &choice["text"]), (Some(at as u64), &order[at]["text"]));
        assert!(choice["logprobs"].is_null(), "they were for ranking only");
    }
    assert_eq!(best["usage"]["completion_tokens"], 60);
    let one = ask(json!({"best_of": 5, "logprobs": 0, "prompt": ["Once upon a time", "Twice"]})).await;
    assert_eq!(one["choices"].as_array().unwrap().len(), 2);
    assert_eq!(one["choices"][0]["text"], order[0]["text"]);
    assert_eq!(one["choices"][0]["logprobs"], order[0]["logprobs"]);
}

#[tokio::test]
async fn a_draft_model_guesses_and_changes_no_answer() {
    // Devices of the same kind think alike, and one that repeats itself thinks like one that does not now and then.
    let serving = |period: u32, lookup: bool| {
        Daemon::serving("sim:end_in=0,step_us=1000", move |config| {
            config.engine.prompt_lookup = lookup;
            for model in &mut config.models {
                let path = format!("sim:end_in=0,period={period}").into();
                model.draft = Some(Draft { path, modified: None });
            }
        })
    };
    let ask = async |daemon: &Daemon, more: Value| {
        let mut body = json!({"model": CLASSIC, "prompt": "once upon a time there was", "max_tokens": 200, "seed": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = daemon.post("/v1/completions", body).await.json();
        let count = |what: &str| answer["usage"]["completion_tokens_details"][what].as_u64().unwrap_or(0);
        let text = answer["choices"][0]["text"].as_str().unwrap().to_owned();
        (text, count("accepted_prediction_tokens"), count("rejected_prediction_tokens"))
    };
    for (period, lookup) in [(0, false), (3, false), (0, true)] {
        let daemon = serving(period, lookup);
        for more in [json!({}), json!({"temperature": 0}), json!({"temperature": 0.8, "frequency_penalty": 0.4})] {
            let mut plain = more.clone();
            plain["speculative.n_max"] = json!(0);
            let (plain, ..) = ask(&daemon, plain).await;
            let (text, accepted, rejected) = ask(&daemon, more.clone()).await;
            assert_eq!(text, plain, "{more}, {period}");
            match period {
                0 => assert!(accepted > 150 && rejected < 20, "{more}: {accepted} of {}", accepted + rejected),
                _ => assert!(accepted > 0 && rejected > 0, "{more}: {accepted} of {}", accepted + rejected),
            }
        }
        let series = format!("neurond_draft_seconds_count{{device=\"0\",model=\"{CLASSIC}\"}}");
        assert!(daemon.metric(&series) > 10.0);
    }
}

#[tokio::test]
async fn guessing_ahead_shows_in_usage_and_never_in_the_text() {
    // Answers repeat themselves, so what was said before is a good guess.
    let daemon = Daemon::serving("sim:period=8,end_in=0,step_us=1000", |_| {});
    let ask = async |more: Value| {
        let mut body = json!({"model": CLASSIC, "prompt": "once upon a time there was", "max_tokens": 120, "seed": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = daemon.post("/v1/completions", body).await.json();
        (answer["choices"][0]["text"].as_str().unwrap().to_owned(), answer["usage"].clone())
    };
    let (plain, none) = ask(json!({"speculative.n_max": 0})).await;
    assert_eq!((plain.len(), &none["completion_tokens_details"]), (120, &Value::Null));
    let (text, usage) = ask(json!({})).await;
    assert_eq!(text, plain);
    let details = &usage["completion_tokens_details"];
    let count = |what: &str| details[what].as_u64().unwrap();
    assert!(count("accepted_prediction_tokens") > 20, "{usage}");
    assert!(count("rejected_prediction_tokens") > 0, "{usage}");
    assert_eq!(usage["completion_tokens"], 120);
    // Who foresees the answer gets it in fewer steps still.
    let (text, foreseen) = ask(json!({"prediction": {"type": "content", "content": plain}})).await;
    let accepted = foreseen["completion_tokens_details"]["accepted_prediction_tokens"].as_u64().unwrap();
    assert_eq!(text, plain);
    assert!(accepted > count("accepted_prediction_tokens"), "{foreseen} after {usage}");
    let series = format!("neurond_spec_accepted_tokens_total{{device=\"0\",model=\"{CLASSIC}\"}}");
    assert_eq!(daemon.metric(&series), (count("accepted_prediction_tokens") + accepted) as f64);
    for (body, words) in [
        (json!({"prediction": {"type": "image", "content": "x"}}), "prediction.type"),
        (json!({"prediction": {"type": "content"}}), "prediction.content"),
        (json!({"speculative.n_max": -1}), "speculative.n_max"),
    ] {
        let mut body = body;
        body["model"] = json!(CLASSIC);
        body["prompt"] = json!("x");
        let answer = daemon.post("/v1/completions", body).await;
        assert_eq!(answer.status, 400);
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(words), "{}", answer.json());
    }
}
