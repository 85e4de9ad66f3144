//! Structured output on every surface: what was asked for comes out, or an error, or a cut that says so.

use serde_json::{Value, json};

use crate::harness::{CHATTY, CLASSIC, Daemon, joined};

const CHAT: &str = "/v1/chat/completions";

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog", "bird"]},
            "legs": {"type": "integer", "minimum": 0, "maximum": 99},
            "names": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 3},
        },
        "required": ["kind", "legs", "names"],
        "additionalProperties": false,
    })
}

fn is_valid(text: &str) -> bool {
    let Ok(document) = serde_json::from_str::<Value>(text) else { return false };
    jsonschema::is_valid(&schema(), &document)
}

fn chat(more: Value) -> Value {
    with(json!({"model": CLASSIC, "messages": [{"role": "user", "content": "An animal?"}], "max_tokens": 400}), more)
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn openai_format() -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema()}})
}

#[tokio::test]
async fn every_choice_is_a_valid_document_whole_and_streamed() {
    let daemon = Daemon::serving("sim:end_in=3", |_| {});
    for seed in 0..6 {
        let body = chat(json!({"n": 4, "seed": seed, "temperature": 2, "response_format": openai_format()}));
        let whole = daemon.post(CHAT, body.clone()).await.json();
        let streamed = daemon.post(CHAT, with(body, json!({"stream": true}))).await.chunks();
        for index in 0..4 {
            let choice = &whole["choices"][index];
            let text = choice["message"]["content"].as_str().unwrap();
            assert!(is_valid(text), "{text}");
            assert_eq!(choice["finish_reason"], "stop");
            let mine: Vec<_> = streamed.iter().filter(|chunk| chunk["choices"][0]["index"] == index).cloned().collect();
            assert_eq!(joined(&mine, "/choices/0/delta/content"), text, "seed {seed}");
        }
    }
    let masks = daemon.metric(&format!(r#"neurond_grammar_mask_seconds_count{{device="0",model="{CLASSIC}"}}"#));
    let tokens = daemon.metric(&format!(r#"neurond_generation_tokens_total{{device="0",model="{CLASSIC}"}}"#));
    let accepted = daemon.metric(&format!(r#"neurond_spec_accepted_tokens_total{{device="0",model="{CLASSIC}"}}"#));
    assert_eq!(masks, tokens - accepted, "once for each token, and for the drafts before it that came true");
    let hits = daemon.metric(&format!(r#"neurond_grammar_cache_hits_total{{device="0",model="{CLASSIC}"}}"#));
    assert_eq!(hits, 11.0, "compiled once");
}

#[tokio::test]
async fn sequences_that_lose_their_blocks_keep_to_their_grammar() {
    // Room for little more than one of the sequences, and so many that admission becomes brave: they take each other's blocks time and again.
    let daemon = Daemon::serving("sim:blocks=14,block_tokens=16,end_in=0,step_us=300", |_| {});
    let body = |seed: i64| {
        chat(json!({"seed": seed, "max_tokens": 120, "temperature": 2, "response_format": openai_format()}))
    };
    let asked = (0..60).map(|seed| daemon.post(CHAT, body(seed)));
    for answer in futures_util::future::join_all(asked).await {
        let text = answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        assert!(is_valid(&text), "{text}");
    }
    assert!(daemon.metric(&format!(r#"neurond_preemptions_total{{device="0",model="{CLASSIC}"}}"#)) > 0.0);
}

#[tokio::test]
async fn a_document_that_can_be_guessed_is_the_same_in_fewer_steps() {
    let document = json!({"kind": "cat", "legs": 4, "names": ["Minka", "Mau"]}).to_string();
    let say: String = document.bytes().map(|byte| format!("%{byte:02x}")).collect();
    // A step has to cost something, or rows that verify guesses look as dear as steps.
    let daemon = Daemon::serving(&format!("sim:end_in=0,step_us=2000,say={say}"), |_| {});
    let ask = async |more: Value| {
        let words = format!("Say this again: {document}");
        let body = json!({"model": CLASSIC, "messages": [{"role": "user", "content": words}], "max_tokens": 400});
        let answer =
            daemon.post(CHAT, with(with(body, more), json!({"response_format": openai_format()}))).await.json();
        let choice = &answer["choices"][0];
        let accepted = &answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"];
        let text = choice["message"]["content"].as_str().unwrap().to_owned();
        (text, choice["finish_reason"].clone(), accepted.as_u64().unwrap_or(0))
    };
    let (plain, finish, none) = ask(json!({"speculative.n_max": 0})).await;
    assert_eq!((plain.as_str(), finish.as_str(), none), (document.as_str(), Some("stop"), 0));
    let (text, finish, repeated) = ask(json!({})).await;
    assert_eq!((text, finish.as_str()), (plain.clone(), Some("stop")));
    assert!(repeated > 20, "{repeated} came true");
    let (text, _, foreseen) = ask(json!({"prediction": {"type": "content", "content": plain}})).await;
    assert_eq!(text, plain);
    assert!(foreseen > 20, "{foreseen} came true");
    // A guess that the grammar forbids is no token of the answer, and a limit cuts where it would without guesses.
    for limit in 1..plain.len() {
        let prediction = plain.replace("cat", "cow").replace('4', "4.5");
        let cut = json!({"prediction": {"type": "content", "content": prediction}, "max_tokens": limit});
        let (text, finish, _) = ask(cut).await;
        assert_eq!((text.as_str(), finish.as_str()), (&plain[..limit], Some("length")));
    }
}

#[tokio::test]
async fn a_document_that_a_limit_cuts_says_so() {
    let daemon = Daemon::serving("sim:end_in=2", |_| {});
    let cut = json!({"max_tokens": 9, "response_format": openai_format()});
    let choice = &daemon.post(CHAT, chat(cut.clone())).await.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["message"]["content"].as_str().unwrap().starts_with('{'));
    let native = format!("/client/v4/accounts/a/ai/run/{CLASSIC}");
    let answer = daemon.post(&native, with(cut, json!({"prompt": "An animal?"}))).await;
    let error = &answer.json()["errors"][0];
    assert_eq!((answer.status, &error["code"]), (400, &json!(5006)));
    assert!(error["message"].as_str().unwrap().contains("JSON Mode couldn't be met"), "{error}");
}

#[tokio::test]
async fn a_whole_answer_ends_even_if_end_tokens_are_ignored() {
    let daemon = Daemon::serving("sim:end_in=0", |_| {});
    for more in [json!({"guided_choice": ["yes", "no"]}), json!({"guided_regex": "ab|ba"})] {
        let choice = &daemon.post(CHAT, chat(with(more, json!({"ignore_eos": true})))).await.json()["choices"][0];
        assert!(["yes", "no", "ab", "ba"].contains(&choice["message"]["content"].as_str().unwrap()), "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn every_surface_takes_its_own_spelling() {
    let daemon = Daemon::serving("sim:end_in=4", |_| {});
    let hi = json!([{"role": "user", "content": "hi"}]);
    let native = |model: &str| format!("/client/v4/accounts/a/ai/run/{model}");
    let bare = json!({"type": "json_schema", "json_schema": schema()});
    for format in [
        json!({"response_format": bare}),
        json!({"response_format": openai_format()}),
        json!({"guided_json": schema()}),
    ] {
        let body = with(json!({"messages": hi, "max_tokens": 400, "temperature": 1}), format);
        let result = &daemon.post(&native(CLASSIC), body.clone()).await.json()["result"];
        assert!(result["response"].is_object() && is_valid(&result["response"].to_string()), "{result}");
        let result = &daemon.post(&native(CHATTY), body.clone()).await.json()["result"];
        assert!(is_valid(result["choices"][0]["message"]["content"].as_str().unwrap()), "{result}");
        let refused = daemon.post(&native(CLASSIC), with(body, json!({"stream": true}))).await;
        let error = &refused.json()["errors"][0];
        assert_eq!((refused.status, &error["code"]), (400, &json!(5006)), "{error}");
        assert!(error["message"].as_str().unwrap().contains("JSON Mode"), "{error}");
    }
    let lark = "start: \"<\" WORD \">\"\nWORD: /[a-z]{3}/";
    let response = daemon.post(&native(CLASSIC), json!({"messages": hi, "guided_grammar": lark})).await.json();
    let text = response["result"]["response"].as_str().unwrap();
    assert!(text.len() == 5 && text.starts_with('<') && text.ends_with('>'), "{text}");

    let format = json!({"type": "json_schema", "name": "animal", "schema": schema()});
    let body = json!({"model": CLASSIC, "input": "hi", "max_output_tokens": 400, "text": {"format": format}});
    let response = daemon.post("/v1/responses", body).await.json();
    assert!(is_valid(response["output"][0]["content"][0]["text"].as_str().unwrap()), "{response}");
    assert_eq!(response["text"]["format"], format);

    let body = json!({"model": CLASSIC, "prompt": "x", "max_tokens": 40, "structured_outputs": {"regex": "[0-9]{4}"}});
    let text = daemon.post("/v1/completions", body).await.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.len() == 4 && text.parse::<u16>().is_ok(), "{text}");
}

#[tokio::test]
async fn a_bad_schema_is_an_error_that_names_what_is_wrong() {
    let daemon = Daemon::serving("sim", |_| {});
    for (more, words) in [
        (json!({"guided_json": {"properties": {"a": {"not": {}}}}}), "'/properties/a/not' is not supported"),
        (json!({"guided_json": {"type": "array", "uniqueItems": true}}), "'/uniqueItems' is not supported"),
        (json!({"guided_json": {"type": "text"}}), "text"),
        (json!({"guided_json": {"$ref": "#/$defs/nothing"}}), "nothing"),
        (json!({"guided_regex": "(a"}), "The regular expression cannot be used"),
        (json!({"guided_grammar": "start: other"}), "The grammar cannot be used"),
        (json!({"guided_json": {}, "guided_regex": "a"}), "send one of them"),
        (json!({"response_format": {"type": "json_schema"}}), "'response_format.json_schema' is required"),
    ] {
        let answer = daemon.post(CHAT, chat(more.clone())).await;
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!(answer.status, 400, "{more}: {message}");
        assert!(message.contains(words), "{more}: {message}");
    }
    assert_eq!(daemon.post(CHAT, chat(json!({"max_tokens": 3}))).await.status, 200, "nobody else is the worse for it");
}
