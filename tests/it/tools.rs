//! Calling tools, on every surface. The simulated device says what it is told to.

use serde_json::{Value, json};

use crate::harness::{Answer, CHATTY, CLASSIC, Daemon, joined};

const CHAT: &str = "/v1/chat/completions";
const RUN: &str = "/client/v4/accounts/0123456789abcdef0123456789abcdef/ai/run";

/// A daemon whose models answer with `text`.
fn saying(text: &str) -> Daemon {
    let text: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
    Daemon::serving(&format!("sim:say={text}"), |_| {})
}

/// A question with two tools, in OpenAI's shape.
fn ask(more: Value) -> Value {
    let mut body = json!({
        "model": CLASSIC,
        "messages": [{"role": "user", "content": "Weather in Oslo?"}],
        "tools": [
            {"type": "function", "function": {"name": "get_weather", "description": "The weather now.", "parameters": {
                "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
            {"type": "function", "function": {"name": "now"}},
        ],
        "temperature": 0,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

const CALL: &str = r#"{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}"#;
const ARGUMENTS: &str = r#"{"city": "Oslo", "days": [1, 2]}"#;

/// What the deltas of a streamed chat make: text, calls as they would stand in a whole answer, the finish reason.
fn assembled(chunks: &[Value], choice: usize) -> (String, Vec<Value>, String) {
    let own: Vec<Value> = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice).cloned().collect();
    let mut calls: Vec<Value> = Vec::new();
    for delta in own.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/tool_calls")?.as_array()).flatten() {
        let index = delta["index"].as_u64().unwrap() as usize;
        if index == calls.len() {
            assert!(delta["id"].is_string() && delta["type"] == "function", "{delta}");
            let mut call = delta.clone();
            call.as_object_mut().unwrap().remove("index");
            calls.push(call);
        } else {
            assert!(index + 1 == calls.len() && delta.get("id").is_none() && delta.get("type").is_none(), "{delta}");
            let more = delta["function"]["arguments"].as_str().unwrap();
            let arguments = &mut calls[index]["function"]["arguments"];
            *arguments = json!(arguments.as_str().unwrap().to_owned() + more);
        }
    }
    (joined(&own, "/choices/0/delta/content"), calls, joined(&own, "/choices/0/finish_reason"))
}

fn without_ids(calls: &[Value]) -> Vec<Value> {
    calls.iter().map(|call| json!({"type": call["type"], "function": call["function"]})).collect()
}

#[tokio::test]
async fn a_call_comes_out_of_a_chat_whole_and_in_pieces() {
    let daemon =
        saying(&format!("I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>"));
    let whole = daemon.post(CHAT, ask(json!({}))).await.json();
    let choice = &whole["choices"][0];
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("I look."), &json!("tool_calls")));
    assert_eq!(
        without_ids(calls),
        [
            json!({"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}),
            json!({"type": "function", "function": {"name": "now", "arguments": "{}"}}),
        ]
    );
    let id = |call: &Value| call["id"].as_str().unwrap().to_owned();
    assert!(id(&calls[0]).starts_with("call_") && id(&calls[0]) != id(&calls[1]));
    assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() > CALL.len() as u64);

    let chunks =
        daemon.post(CHAT, ask(json!({"stream": true, "stream_options": {"include_usage": true}}))).await.chunks();
    let (text, streamed, finish) = assembled(&chunks, 0);
    assert_eq!((text.as_str(), finish.as_str()), ("I look.", "tool_calls"));
    assert_eq!(without_ids(&streamed), without_ids(calls));
    let pieces = chunks.iter().filter(|chunk| chunk.pointer("/choices/0/delta/tool_calls").is_some()).count();
    assert!(pieces > 10, "arguments come as they are written, not all at once: {pieces}");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(daemon.metric(&format!(r#"neurond_tool_calls_total{{model="{CLASSIC}"}}"#)), 4.0);
}

#[tokio::test]
async fn an_answer_that_only_calls_has_no_content_and_one_that_only_speaks_has_no_calls() {
    let daemon = saying(CALL);
    let message = daemon.post(CHAT, ask(json!({}))).await.json()["choices"][0]["message"].clone();
    assert_eq!((&message["content"], message["tool_calls"].as_array().unwrap().len()), (&Value::Null, 1));
    for text in
        ["Just words { and [ brackets.", r#"{"name": "Alice", "arguments": {}}"#, "<tool_call>no</tool_call>", "[1, 2]"]
    {
        let daemon = saying(text);
        let choice = daemon.post(CHAT, ask(json!({}))).await.json()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(text), &json!("stop")));
        assert_eq!(choice["message"]["tool_calls"], json!([]));
        let chunks = daemon.post(CHAT, ask(json!({"stream": true}))).await.chunks();
        assert_eq!(assembled(&chunks, 0), (text.to_owned(), vec![], "stop".to_owned()));
    }
}

#[tokio::test]
async fn without_tools_or_with_none_allowed_a_call_is_text() {
    let daemon = saying(CALL);
    for more in [json!({"tools": []}), json!({"tool_choice": "none"})] {
        let choice = daemon.post(CHAT, ask(more)).await.json()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(CALL), &json!("stop")));
    }
    let prompt =
        async |more: Value| daemon.post(CHAT, ask(more)).await.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let plain = prompt(json!({"tools": []})).await;
    assert_eq!(prompt(json!({"tool_choice": "none"})).await, plain, "tools that must not be used are not shown");
    assert!(prompt(json!({})).await > plain + 200);
}

#[tokio::test]
async fn several_answers_call_each_for_themselves() {
    let daemon = saying(&format!("{CALL}\n{CALL}"));
    let more = json!({"n": 2, "logprobs": true, "top_logprobs": 1});
    let whole = daemon.post(CHAT, ask(more.clone())).await.json();
    let ids: Vec<&str> =
        (0..4).map(|i| whole["choices"][i / 2]["message"]["tool_calls"][i % 2]["id"].as_str().unwrap()).collect();
    assert!((1..4).all(|i| !ids[..i].contains(&ids[i])), "{ids:?}");
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(joined(tokens, "/token"), format!("{CALL}\n{CALL}"), "log-probabilities are of all tokens");
    let chunks = daemon.post(CHAT, ask(json!({"n": 2, "logprobs": true, "stream": true}))).await.chunks();
    for choice in 0..2 {
        assert_eq!(
            without_ids(&assembled(&chunks, choice).1),
            without_ids(whole["choices"][choice]["message"]["tool_calls"].as_array().unwrap())
        );
    }
    let streamed: Vec<Value> = chunks
        .iter()
        .filter(|chunk| chunk["choices"][0]["index"] == 0)
        .filter_map(|chunk| chunk.pointer("/choices/0/logprobs/content")?.as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(joined(&streamed, "/token"), joined(tokens, "/token"));
    let one = daemon.post(CHAT, ask(json!({"parallel_tool_calls": false}))).await.json();
    assert_eq!(one["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_call_that_is_cut_says_so() {
    let daemon = saying(CALL);
    let cut = daemon.post(CHAT, ask(json!({"max_tokens": 50}))).await.json();
    let choice = &cut["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(ARGUMENTS.starts_with(arguments) && arguments.len() < ARGUMENTS.len());
    let stopped = daemon.post(CHAT, ask(json!({"stop": "Oslo"}))).await.json();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let native = daemon.post(&format!("{RUN}/{CLASSIC}"), ask(json!({"max_tokens": 50}))).await.json();
    assert_eq!(native["result"]["tool_calls"], json!([]), "arguments that are no object are of no use to anyone");
}

#[tokio::test]
async fn classic_models_answer_with_arguments_as_objects() {
    let daemon = saying(&format!("{CALL}\n{CALL}"));
    let flat = json!([{"name": "get_weather", "description": "x", "parameters": {"type": "object", "properties": {}}}]);
    for tools in [flat, ask(json!({}))["tools"].clone()] {
        let answer = daemon.post(&format!("{RUN}/{CLASSIC}"), ask(json!({ "tools": tools }))).await.json();
        let call = json!({"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}});
        assert_eq!(
            (&answer["result"]["response"], &answer["result"]["tool_calls"]),
            (&Value::Null, &json!([call, call]))
        );
    }
    let chunks = daemon.post(&format!("{RUN}/{CLASSIC}"), ask(json!({"stream": true}))).await.chunks();
    let first = &chunks[0];
    assert_eq!((first.get("response"), &first["tool_calls"][0]["type"]), (Some(&Value::Null), &json!("function")));
    assert_eq!(first["tool_calls"][0]["function"], json!({"name": "get_weather"}));
    assert!(first["tool_calls"][0]["id"].is_string() && first["tool_calls"][0]["index"] == 0);
    let [.., finish, usage] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(
        *finish,
        json!({"tool_calls": [{"id": null, "type": null, "index": 1, "function": {"name": null, "arguments": ""}}], "finish_reason": "tool_calls"})
    );
    assert_eq!(usage["response"], "");
    for call in 0..2 {
        let own: Vec<Value> = chunks.iter().filter(|chunk| chunk["tool_calls"][0]["index"] == call).cloned().collect();
        assert_eq!(joined(&own, "/tool_calls/0/function/arguments"), ARGUMENTS);
    }
    let begins = |chunk: &Value| chunk["tool_calls"][0]["id"].is_string();
    assert!(
        chunks[..chunks.len() - 1].iter().all(|chunk| chunk.get("response").is_some() == begins(chunk)),
        "{chunks:?}"
    );

    let text = saying("Sunny.");
    let answer = text.post(&format!("{RUN}/{CLASSIC}"), ask(json!({}))).await.json();
    assert_eq!((&answer["result"]["response"], &answer["result"]["tool_calls"]), (&json!("Sunny."), &json!([])));
}

#[tokio::test]
async fn chat_schema_models_answer_in_openais_shape_through_the_binding_too() {
    let daemon = saying(CALL);
    let native = daemon.post(&format!("{RUN}/{CHATTY}"), ask(json!({}))).await.json();
    let expected = [json!({"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}})];
    let calls = |answer: &Value| without_ids(answer["choices"][0]["message"]["tool_calls"].as_array().unwrap());
    assert_eq!(calls(&native["result"]), expected);
    let chunks = daemon.post(&format!("{RUN}/{CHATTY}"), ask(json!({"stream": true}))).await.chunks();
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(without_ids(&assembled(rest, 0).1), expected);
    assert!(last["usage"]["neurons"].as_f64().unwrap() > 0.0);
    let bind = async |model: &str| {
        let request = reqwest::Client::new().post(format!("http://{}/run?version=3", daemon.binding));
        let body = json!({"inputs": ask(json!({})), "options": {}});
        Answer::of(request.header("cf-consn-model-id", model).json(&body)).await.json()
    };
    assert_eq!(calls(&bind(CHATTY).await), expected);
    assert_eq!(bind(CLASSIC).await["tool_calls"][0]["arguments"]["city"], "Oslo");
}

#[tokio::test]
async fn responses_have_calls_as_items_of_their_own() {
    let daemon = saying(&format!("I look.\n<tool_call>{CALL}</tool_call>"));
    let tools =
        json!([{"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}]);
    let body = json!({"model": CLASSIC, "input": "Weather?", "tools": tools, "temperature": 0});
    let whole = daemon.post("/v1/responses", body.clone()).await.json();
    let [message, call] = &whole["output"].as_array().unwrap()[..] else { panic!("{whole}") };
    assert_eq!((&message["type"], &message["content"][0]["text"]), (&json!("message"), &json!("I look.")));
    assert_eq!(
        (&call["type"], &call["name"], &call["arguments"]),
        (&json!("function_call"), &json!("get_weather"), &json!(ARGUMENTS))
    );
    assert!(call["call_id"].as_str().unwrap().starts_with("call_") && call["id"].as_str().unwrap().starts_with("fc_"));
    assert_eq!(
        (&whole["status"], &whole["tools"], &whole["tool_choice"]),
        (&json!("completed"), &tools, &json!("auto"))
    );

    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let events = daemon.post("/v1/responses", streaming).await.events();
    let values: Vec<Value> = events.iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect();
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
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let of = |name: &str| -> Vec<Value> { values.iter().filter(|value| value["type"] == name).cloned().collect() };
    assert_eq!(joined(&of("response.function_call_arguments.delta"), "/delta"), ARGUMENTS);
    assert_eq!(of("response.function_call_arguments.done")[0]["arguments"], ARGUMENTS);
    let added = &of("response.output_item.added")[1];
    assert_eq!(
        (&added["output_index"], &added["item"]["arguments"], &added["item"]["status"]),
        (&json!(1), &json!(""), &json!("in_progress"))
    );
    let done = &of("response.output_item.done")[1]["item"];
    let output = &values.last().unwrap()["response"]["output"];
    assert_eq!((done, output.as_array().unwrap().len()), (&output[1], 2));

    // And back: the call and its result as items.
    let mut again = body;
    again["input"] = json!([
        {"role": "user", "content": "Weather?"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "{\"celsius\": -3}"},
    ]);
    let answer = daemon.post("/v1/responses", again).await.json();
    assert!(answer["usage"]["input_tokens"].as_u64() > whole["usage"]["input_tokens"].as_u64(), "{answer}");
}

#[tokio::test]
async fn a_result_goes_back_in_every_shape_and_is_answered() {
    let daemon = saying("It is cold.");
    let turns = |call: Value, result: Value| json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": null, "tool_calls": [call]}, result]);
    let function = json!({"name": "get_weather", "arguments": ARGUMENTS});
    let conversations = [
        turns(
            json!({"id": "call_1", "type": "function", "function": function}),
            json!({"role": "tool", "tool_call_id": "call_1", "content": "-3"}),
        ),
        turns(
            json!({"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}),
            json!({"role": "tool", "name": "get_weather", "content": "-3"}),
        ),
        turns(
            json!({"id": "abcdef123", "function": function}),
            json!({"role": "tool", "content": [{"type": "text", "text": "-3"}]}),
        ),
    ];
    let mut prompts = Vec::new();
    for messages in conversations {
        for path in [CHAT.to_owned(), format!("{RUN}/{CLASSIC}"), format!("{RUN}/{CHATTY}")] {
            let answer = daemon.post(&path, ask(json!({ "messages": messages }))).await.json();
            let usage = answer.pointer("/usage").or(answer.pointer("/result/usage")).unwrap();
            prompts.push(usage["prompt_tokens"].as_u64().unwrap());
            assert!(answer.to_string().contains("It is cold."), "{answer}");
        }
    }
    assert!(prompts.iter().all(|prompt| *prompt == prompts[0]), "one conversation, one prompt: {prompts:?}");
}

#[tokio::test]
async fn what_is_wrong_with_tools_is_said_by_field_on_every_surface() {
    let daemon = Daemon::serving("sim", |_| {});
    let twice = json!({"tools": [{"name": "f"}, {"name": "f"}]});
    let answer = daemon.post(CHAT, ask(twice.clone())).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("tools.1.name")));
    let native = daemon.post(&format!("{RUN}/{CLASSIC}"), ask(twice)).await;
    assert_eq!((native.status, &native.json()["errors"][0]["code"]), (400, &json!(5006)));
    assert!(native.text.contains("at '/tools/1/name'"), "{}", native.text);
    let embedded = ask(json!({"tools": null, "functions": [{"name": "f", "code": "return 1"}]}));
    let native = daemon.post(&format!("{RUN}/{CLASSIC}"), embedded).await;
    assert_eq!((native.status, &native.json()["errors"][0]["code"]), (400, &json!(5006)));
    assert!(native.text.contains("Functions with code are not run here"), "{}", native.text);
}

/// Two tools whose arguments come to an end by themselves, also when a device draws nothing but letters.
fn bounded(more: Value) -> Value {
    let weather = json!({"type": "object", "properties": {
        "city": {"enum": ["Oslo", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}, "warm": {"type": "boolean"},
        "where": {"type": "object", "properties": {"unit": {"const": "C"}}, "required": ["unit"], "additionalProperties": false}},
        "required": ["city", "days", "where"]});
    let tools = json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": weather}},
        {"type": "function", "function": {"name": "now"}},
    ]);
    let mut body = ask(json!({ "tools": tools, "max_tokens": 400, "parallel_tool_calls": false }));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[track_caller]
fn is_weather(arguments: &Value) {
    assert!(["Oslo", "Paris"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");
    assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{arguments}");
    assert_eq!(arguments["where"], json!({"unit": "C"}));
    assert!(arguments.as_object().unwrap().keys().all(|key| ["city", "days", "warm", "where"].contains(&key.as_str())));
}

#[tokio::test]
async fn whoever_must_call_does_and_by_the_schema() {
    let daemon = Daemon::serving("sim", |_| {});
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for seed in 1..4 {
        let more = json!({"tool_choice": named, "temperature": 1.5, "seed": seed});
        let whole = daemon.post(CHAT, bounded(more.clone())).await.json();
        let choice = &whole["choices"][0];
        let calls = choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{whole}"));
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"], calls.len()),
            (&Value::Null, &json!("tool_calls"), 1)
        );
        assert_eq!(calls[0]["function"]["name"], "get_weather");
        is_weather(&serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap());

        let mut streaming = bounded(more.clone());
        streaming["stream"] = json!(true);
        let chunks = daemon.post(CHAT, streaming).await.chunks();
        let (text, streamed, finish) = assembled(&chunks, 0);
        assert_eq!((text.as_str(), finish.as_str()), ("", "tool_calls"));
        assert_eq!(without_ids(&streamed), without_ids(calls));

        let native = daemon.post(&format!("{RUN}/{CLASSIC}"), bounded(more)).await.json();
        is_weather(&native["result"]["tool_calls"][0]["arguments"]);
        assert_eq!(native["result"]["response"], Value::Null);
    }
    let now = json!({"type": "function", "function": {"name": "now"}});
    let whole = daemon.post(CHAT, bounded(json!({ "tool_choice": now }))).await.json();
    let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    let arguments = serde_json::from_str::<Value>(call["arguments"].as_str().unwrap()).unwrap();
    assert_eq!((&call["name"], arguments), (&json!("now"), json!({})), "a function without parameters gets none");
}

#[tokio::test]
async fn a_required_call_is_one_of_those_offered_on_every_surface() {
    let daemon = Daemon::serving("sim", |_| {});
    let required = json!({"tool_choice": "required", "n": 3, "temperature": 1.2, "seed": 5});
    let whole = daemon.post(CHAT, bounded(required)).await.json();
    for choice in whole["choices"].as_array().unwrap() {
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &choice["finish_reason"]), (1, &json!("tool_calls")), "{choice}");
        let function = &calls[0]["function"];
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        match function["name"].as_str().unwrap() {
            "get_weather" => is_weather(&arguments),
            name => assert_eq!((name, arguments), ("now", json!({}))),
        }
    }
    let mut body = bounded(json!({"tool_choice": "required", "input": "Weather?"}));
    body.as_object_mut().unwrap().remove("messages");
    let response = daemon.post("/v1/responses", body).await.json();
    let [call] = &response["output"].as_array().unwrap()[..] else { panic!("{response}") };
    assert_eq!((&call["type"], &response["tool_choice"]), (&json!("function_call"), &json!("required")));
    // The device says something else, and may not.
    let stubborn = saying("I would rather not.");
    let forced = stubborn.post(CHAT, bounded(json!({"tool_choice": "required"}))).await.json();
    assert_eq!(forced["choices"][0]["finish_reason"], "tool_calls", "{forced}");
}

#[tokio::test]
async fn a_strict_tool_keeps_its_schema_where_the_model_is_free() {
    let wrong = r#"{"name": "get_weather", "arguments": {"town": "Oslo"}}"#;
    let daemon = saying(wrong);
    let strict = |strict: bool| {
        let mut body = bounded(json!({}));
        body["tools"][0]["function"]["strict"] = json!(strict);
        body
    };
    let call = async |body: Value| {
        let answer = daemon.post(CHAT, body).await.json();
        let arguments = answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].clone();
        serde_json::from_str::<Value>(arguments.as_str().unwrap_or_else(|| panic!("{answer}"))).unwrap()
    };
    assert_eq!(call(strict(false)).await, json!({"town": "Oslo"}));
    is_weather(&call(strict(true)).await);
    let daemon = saying("Just words.");
    let answer = daemon.post(CHAT, strict(true)).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "Just words.");
    let mut odd = strict(true);
    odd["tools"][0]["function"]["parameters"]["properties"]["days"] = json!({"type": "array", "uniqueItems": true});
    let refused = daemon.post(CHAT, odd).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")), "{refused:?}");
}

#[tokio::test]
async fn a_structured_answer_and_tools_that_may_be_called_or_not_are_told_apart_or_refused() {
    let daemon = Daemon::serving("sim", |_| {});
    // This model's calls are JSON without a marker, as is the document.
    for more in [json!({"guided_regex": "[0-9]+"}), json!({"response_format": {"type": "json_object"}})] {
        let mixed = daemon.post(CHAT, bounded(more)).await;
        assert_eq!((mixed.status, &mixed.json()["error"]["param"]), (400, &json!("tool_choice")), "{mixed:?}");
    }
    let none = bounded(json!({"guided_regex": "[0-9]{3}", "tool_choice": "none"}));
    let answer = daemon.post(CHAT, none).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"].as_str().map(str::len), Some(3), "{answer}");
    let forced = bounded(json!({"response_format": {"type": "json_object"}, "tool_choice": "required"}));
    let answer = daemon.post(&format!("{RUN}/{CLASSIC}"), forced).await.json();
    assert_eq!(
        (&answer["result"]["response"], answer["result"]["tool_calls"].as_array().unwrap().len()),
        (&Value::Null, 1)
    );
}
