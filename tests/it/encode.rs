//! Embeddings, reranking and classification on every surface, with the tiny models of `tests/goldens`.

use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use neurond::base::ModelId;
use neurond::config::{Config, KvType, Model, Precision};
use neurond::task::Task;
use serde_json::{Value, json};

use crate::harness::{Answer, CLASSIC, Daemon};

const AI: &str = "/client/v4/accounts/0123456789abcdef0123456789abcdef/ai";
const BERT: &str = "@cf/baai/bge-small-en-v1.5";
/// Answers `cls` and refuses what is too long.
const M3: &str = "@cf/baai/bge-m3";
const RERANKER: &str = "@cf/baai/bge-reranker-base";
const SENTIMENT: &str = "@cf/huggingface/distilbert-sst-2-int8";
/// Simulated.
const SIM: &str = "@cf/qwen/qwen3-embedding-0.6b";

fn model(id: &str, task: Task, path: &str) -> Model {
    let path = match path.starts_with("sim") {
        true => path.into(),
        false => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(path),
    };
    let id = ModelId::new(id);
    Model {
        id,
        task,
        path,
        precision: Precision::Plain,
        kv: KvType::default(),
        kv_bytes: 1 << 20,
        spill: None,
        draft: None,
        tensor_parallel: 1,
        on_gpu: Default::default(),
        context: 512,
        modified: None,
    }
}

fn daemon(sim: &str) -> Daemon {
    daemon_with(sim, |_| {})
}

fn daemon_with(sim: &str, change: impl FnOnce(&mut Config)) -> Daemon {
    Daemon::start(|config| {
        change(config);
        config.models = vec![
            model(BERT, Task::TextEmbeddings, "tiny-bert"),
            model(M3, Task::TextEmbeddings, "tiny-bert"),
            model(RERANKER, Task::TextClassification, "tiny-reranker"),
            model(SENTIMENT, Task::TextClassification, "tiny-sentiment"),
            model(SIM, Task::TextEmbeddings, sim),
            model(CLASSIC, Task::TextGeneration, "sim:end_in=0"),
        ];
    })
}

fn golden(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("golden.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    golden["cases"].as_array().unwrap().clone()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[track_caller]
fn same(got: &[f32], expected: &Value) {
    let expected = floats(expected);
    assert_eq!(got.len(), expected.len());
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-4, "off by {off}");
}

async fn run(daemon: &Daemon, model: &str, body: Value) -> Answer {
    daemon.post(&format!("{AI}/run/{model}"), body).await
}

/// The responses of a batch, by id.
fn by_id(result: &Value) -> Vec<Value> {
    let mut responses = result["responses"].as_array().unwrap_or_else(|| panic!("{result}")).clone();
    responses.sort_by_key(|response| response["id"].as_u64());
    responses
}

#[tokio::test]
async fn encoders_answer_batches_at_once_and_in_line_as_they_answer_single_requests() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon_with("sim", |config| config.batches = Some(folder.path().into()));
    let check = async |model: &str, requests: Value, bad: usize| {
        let body = json!({ "requests": requests });
        let now = run(&daemon, model, body.clone()).await.json()["result"].clone();
        let queued = daemon.post(&format!("{AI}/run/{model}?queueRequest=true"), body).await.json();
        let id = &queued["result"]["request_id"];
        let mut later = Value::Null;
        for _ in 0..1_000 {
            later = run(&daemon, model, json!({ "request_id": id })).await.json()["result"].clone();
            if later.get("responses").is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (now_by, later_by) = (by_id(&now), by_id(&later));
        assert_eq!(now_by.len(), requests.as_array().unwrap().len());
        let mut tokens = 0;
        for (at, request) in requests.as_array().unwrap().iter().enumerate() {
            let single = run(&daemon, model, request.clone()).await;
            assert_eq!(single.status == 200, at != bad, "{}", single.text);
            for responses in [&now_by, &later_by] {
                let response = &responses[at];
                assert_eq!((&response["id"], &response["success"]), (&json!(at), &json!(at != bad)), "{response}");
                assert_eq!(response["external_reference"], request["external_reference"]);
                match at == bad {
                    true => assert!(response["error"]["message"].as_str().unwrap().contains(&format!("requests/{at}"))),
                    // Digit by digit.
                    false => assert_eq!(response["result"].to_string(), single.json()["result"].to_string()),
                }
            }
            tokens += single.json()["result"]["usage"]["prompt_tokens"].as_u64().unwrap_or_default();
        }
        for whole in [now, later] {
            assert!(whole["usage"]["neurons"].as_f64().unwrap() > 0.0 || tokens == 0, "{}", whole["usage"]);
            assert!(tokens == 0 || whole["usage"]["prompt_tokens"] == tokens, "{} is not {tokens}", whole["usage"]);
        }
    };
    let texts = json!([
        {"text": "a ship", "external_reference": "one"}, {"text": ["the harbour", "a longer text of a few words"]},
        {"text": ""}, {"contexts": [{"text": "cargo"}], "query": "a ship"}, {"text": "a pilot", "pooling": "cls"}
    ]);
    check(BERT, texts, 2).await;
    check(RERANKER, json!([{"query": "a ship", "contexts": [{"text": "cargo"}, {"text": "a boat"}]}]), 9).await;
    check(SENTIMENT, json!([{"text": "a good ship"}, {"text": ["a", "b"]}]), 1).await;
    let nested = run(&daemon, BERT, json!({"requests": [{"requests": [{"text": "a"}]}]})).await;
    assert!(nested.text.contains("not within another request"), "{}", nested.text);
    let metrics = daemon.get("/metrics").await.text;
    for line in [
        "neurond_batches{state=\"whole\"} 3",
        "neurond_batch_requests_waiting 0",
        "neurond_batch_requests_running 0",
        "neurond_batch_requests_total{outcome=\"done\"} 6",
        "neurond_batch_requests_total{outcome=\"failed\"} 2",
    ] {
        assert!(metrics.lines().any(|found| found == line), "no {line}");
    }
}

#[tokio::test]
async fn native_embeddings_have_shape_data_and_pooling() {
    let daemon = daemon("sim");
    let cases = golden("tiny-bert");
    let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
    let tokens: usize = cases.iter().map(|case| case["ids"].as_array().unwrap().len()).sum();
    for (pooling, named) in [("mean", json!({"text": texts})), ("cls", json!({"text": texts, "pooling": "cls"}))] {
        let answer = run(&daemon, BERT, named).await;
        let json = answer.json();
        assert_eq!((answer.status, &json["success"]), (200, &json!(true)), "{json}");
        let result = &json["result"];
        assert_eq!((&result["shape"], &result["pooling"]), (&json!([texts.len(), 64]), &json!(pooling)));
        for (case, row) in cases.iter().zip(result["data"].as_array().unwrap()) {
            same(&floats(row), &case[pooling]);
        }
        assert_eq!(result["usage"]["prompt_tokens"], tokens);
        // 1,841 neurons a million.
        assert_eq!(answer.header("cf-ai-neurons"), format!("{:.2}", tokens as f64 * 0.001_841));
    }
    let one = run(&daemon, BERT, json!({"text": texts[0]})).await.json();
    assert_eq!(one["result"]["shape"], json!([1, 64]));
    let series = format!(r#"neurond_prompt_tokens_total{{device="0",model="{BERT}"}}"#);
    assert!(daemon.metric(&series) >= 2.0 * tokens as f64);
    let micro = daemon.metric(&format!(r#"neurond_micro_neurons_total{{model="{BERT}"}}"#));
    assert_eq!(micro, 1841.0 * daemon.metric(&series));
}

#[tokio::test]
async fn contexts_alone_are_vectors_and_with_a_query_scores() {
    let daemon = daemon("sim");
    let cases = golden("tiny-bert");
    let contexts: Vec<Value> = cases[1..4].iter().map(|case| json!({"text": case["text"]})).collect();
    let vectors = run(&daemon, M3, json!({"contexts": contexts})).await.json();
    assert_eq!((&vectors["result"]["shape"], &vectors["result"]["pooling"]), (&json!([3, 64]), &json!("cls")));
    for (case, row) in cases[1..4].iter().zip(vectors["result"]["response"].as_array().unwrap()) {
        same(&floats(row), &case["cls"]);
    }
    let query = &cases[0]["text"];
    let scored = run(&daemon, M3, json!({"query": query, "contexts": contexts})).await.json();
    let response = scored["result"]["response"].as_array().unwrap();
    assert_eq!(response.len(), 3);
    let mut last = f64::INFINITY;
    for entry in response {
        let (case, score) = (&cases[1 + entry["id"].as_u64().unwrap() as usize], entry["score"].as_f64().unwrap());
        let (a, b) = (floats(&cases[0]["cls"]), floats(&case["cls"]));
        let cosine: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
        assert!((score - f64::from(cosine)).abs() < 1e-4 && score <= last, "{scored}");
        last = score;
    }
}

#[tokio::test]
async fn openai_clients_get_floats_or_base64_from_texts_and_tokens() {
    let daemon = daemon("sim");
    let cases = golden("tiny-bert");
    let texts: Vec<&Value> = cases.iter().map(|case| &case["text"]).collect();
    let ids: Vec<&Value> = cases.iter().map(|case| &case["ids"]).collect();
    for path in ["/v1/embeddings".to_owned(), format!("{AI}/v1/embeddings")] {
        for input in [json!(texts), json!(ids)] {
            for format in ["float", "base64"] {
                let body = json!({"model": BERT, "input": input, "encoding_format": format});
                let answer = daemon.post(&path, body).await;
                let json = answer.json();
                assert_eq!((answer.status, &json["object"], &json["model"]), (200, &json!("list"), &json!(BERT)));
                for (index, (case, entry)) in cases.iter().zip(json["data"].as_array().unwrap()).enumerate() {
                    assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
                    let vector = match format {
                        "float" => floats(&entry["embedding"]),
                        _ => {
                            let bytes = STANDARD.decode(entry["embedding"].as_str().unwrap()).unwrap();
                            bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
                        }
                    };
                    same(&vector, &case["mean"]);
                }
                let tokens = ids.iter().map(|ids| ids.as_array().unwrap().len()).sum::<usize>();
                assert_eq!(json["usage"]["prompt_tokens"], tokens);
                assert_eq!(json["usage"]["total_tokens"], tokens);
            }
        }
    }
    let one = daemon.post("/v1/embeddings", json!({"model": BERT, "input": ids[0]})).await.json();
    same(&floats(&one["data"][0]["embedding"]), &cases[0]["mean"]);
    let listed = daemon.get("/v1/models").await.json();
    let ids: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert!(ids.contains(&BERT) && ids.contains(&RERANKER) && ids.contains(&CLASSIC), "{listed}");
    let ready = daemon.get("/health/ready").await;
    assert!(ready.status == 200 && ready.text.contains(SENTIMENT), "{ready:?}");
}

#[tokio::test]
async fn a_reranker_scores_pairs_and_gives_the_best_first() {
    let daemon = daemon("sim");
    let cases = golden("tiny-reranker");
    // The first two share their query.
    let query = &cases[0]["text"];
    let expected: Vec<f64> =
        cases[..2].iter().map(|case| 1.0 / (1.0 + (-case["logits"][0].as_f64().unwrap()).exp())).collect();
    let best = usize::from(expected[1] > expected[0]);
    let contexts: Vec<Value> = cases[..2].iter().map(|case| json!({"text": case["pair"]})).collect();
    let answer = run(&daemon, RERANKER, json!({"query": query, "contexts": contexts})).await.json();
    let response = &answer["result"]["response"];
    assert_eq!((&response[0]["id"], &response[1]["id"]), (&json!(best), &json!(1 - best)), "{answer}");
    for entry in response.as_array().unwrap() {
        let expected = expected[entry["id"].as_u64().unwrap() as usize];
        assert!((entry["score"].as_f64().unwrap() - expected).abs() < 1e-4, "{answer}");
    }
    let top = run(&daemon, RERANKER, json!({"query": query, "contexts": contexts, "top_k": 1})).await.json();
    assert_eq!(top["result"]["response"].as_array().unwrap().len(), 1);

    let documents: Vec<&Value> = cases[..2].iter().map(|case| &case["pair"]).collect();
    let body = json!({"model": RERANKER, "query": query, "documents": documents, "top_n": 1, "return_documents": true});
    for path in ["/v1/rerank".to_owned(), format!("{AI}/v1/rerank")] {
        let answer = daemon.post(&path, body.clone()).await.json();
        let result = &answer["results"][0];
        assert_eq!((&result["index"], &result["document"]["text"]), (&json!(best), documents[best]), "{answer}");
        assert!((result["relevance_score"].as_f64().unwrap() - expected[best]).abs() < 1e-4);
        assert_eq!(answer["results"].as_array().unwrap().len(), 1);
        assert!(answer["usage"]["total_tokens"].as_u64().unwrap() > 20);
    }
    // An embedding model ranks by cosine.
    let by_cosine = daemon.post("/v1/rerank", json!({"model": BERT, "query": query, "documents": documents})).await;
    assert_eq!(by_cosine.json()["results"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_classifier_names_every_label_in_its_own_order() {
    let daemon = daemon("sim");
    for case in golden("tiny-sentiment") {
        let answer = run(&daemon, SENTIMENT, json!({"text": case["text"]})).await.json();
        let result = &answer["result"];
        assert_eq!((&result[0]["label"], &result[1]["label"]), (&json!("NEGATIVE"), &json!("POSITIVE")), "{answer}");
        let logits = floats(&case["logits"]);
        let positive = 1.0 / (1.0 + f64::from(logits[0] - logits[1]).exp());
        assert!((result[1]["score"].as_f64().unwrap() - positive).abs() < 1e-4, "{answer}");
        assert!((result[0]["score"].as_f64().unwrap() - (1.0 - positive)).abs() < 1e-4, "{answer}");
    }
    let request = reqwest::Client::new()
        .post(format!("http://{}/run?version=3", daemon.binding))
        .header("cf-consn-model-id", SENTIMENT)
        .json(&json!({"inputs": {"text": "the ship"}}));
    let bare = Answer::of(request).await.json();
    assert_eq!(bare[0]["label"], "NEGATIVE", "bare on the binding: {bare}");
}

#[tokio::test]
async fn what_is_wrong_is_said_in_the_contracts_words() {
    let daemon = daemon("sim");
    let check = async |model: &str, body: Value, status: u16, code: u32, words: &str| {
        let answer = run(&daemon, model, body.clone()).await;
        let json = answer.json();
        assert_eq!((answer.status, &json["errors"][0]["code"]), (status, &json!(code)), "{body}: {json}");
        let message = json["errors"][0]["message"].as_str().unwrap();
        assert!(message.contains(words), "{body}: {message}");
    };
    check(BERT, json!({}), 400, 5006, "required properties at '/' are 'text'").await;
    check(BERT, json!({"text": 5}), 400, 5006, "(at '/text')").await;
    check(BERT, json!({"text": ["a", 5]}), 400, 5006, "(at '/text/1')").await;
    check(BERT, json!({"text": ["a", ""]}), 400, 5006, "'text.1' must have at least 1 character").await;
    check(BERT, json!({"text": []}), 400, 5006, "from 1 to 100 entries").await;
    check(BERT, json!({"text": vec!["a"; 101]}), 400, 5006, "from 1 to 100 entries, not 101").await;
    check(BERT, json!({"text": "a", "pooling": "max"}), 400, 5006, "must be mean or cls").await;
    check(BERT, json!({"requests": [{"text": "a"}], "text": "b"}), 400, 5006, "goes without").await;
    check(BERT, json!({"requests": []}), 400, 5006, "must hold 1 to 100").await;
    let hundred = json!({"text": vec!["a"; 101]});
    check(BERT, json!({"requests": vec![hundred; 100]}), 400, 5006, "10000 texts altogether, not 10100").await;
    check(RERANKER, json!({"text": "a"}), 400, 5006, "required properties at '/' are 'query', 'contexts'").await;
    check(RERANKER, json!({"query": "a"}), 400, 5006, "'contexts' is required").await;
    check(RERANKER, json!({"query": "a", "contexts": [{}]}), 400, 5006, "(at '/contexts/0/text')").await;
    check(SENTIMENT, json!({"query": "a", "contexts": [{"text": "b"}]}), 400, 5006, "are 'text'").await;
    check(SENTIMENT, json!({}), 400, 5006, "oneOf at '/' not met").await;

    // What is too long is cut, unless the model's contract refuses it.
    let long = "tug ".repeat(60);
    check(M3, json!({"text": long}), 400, 5021, "tokens (62) exceeded this model context window limit (48)").await;
    check(BERT, json!({"text": long, "truncate_inputs": false}), 400, 5021, "context window limit (48)").await;
    let cut = run(&daemon, M3, json!({"text": long, "truncate_inputs": true})).await.json();
    assert_eq!(cut["result"]["usage"]["prompt_tokens"], 48);
    assert_eq!(run(&daemon, BERT, json!({"text": long})).await.json()["result"]["usage"]["prompt_tokens"], 48);

    let openai = async |body: Value, status: u16, param: Value, words: &str| {
        let answer = daemon.post("/v1/embeddings", body.clone()).await;
        let json = answer.json();
        assert_eq!((answer.status, &json["error"]["param"]), (status, &param), "{body}: {json}");
        assert!(json["error"]["message"].as_str().unwrap().contains(words), "{body}: {json}");
    };
    openai(json!({"input": "a"}), 400, json!("model"), "required").await;
    openai(json!({"model": BERT}), 400, json!("input"), "required").await;
    openai(json!({"model": CLASSIC, "input": "a"}), 404, json!("model"), "or task").await;
    openai(json!({"model": BERT, "input": "a", "dimensions": 32}), 400, json!("dimensions"), "cannot be shortened")
        .await;
    openai(json!({"model": BERT, "input": "a", "encoding_format": "int8"}), 400, json!("encoding_format"), "base64")
        .await;
    openai(json!({"model": BERT, "input": [[1, 2], []]}), 400, json!("input.1"), "at least one token").await;
    openai(json!({"model": BERT, "input": [1, 70_000]}), 400, Value::Null, "outside the vocabulary").await;
    let chat = json!({"model": BERT, "messages": [{"role": "user", "content": "a"}]});
    assert_eq!(daemon.post("/v1/chat/completions", chat).await.status, 404);

    let schema = daemon.get(&format!("{AI}/models/schema?model={BERT}")).await.json();
    assert_eq!(schema["result"]["input"]["oneOf"][0]["properties"]["pooling"]["default"], "mean");
}

#[tokio::test]
async fn a_client_that_leaves_is_not_computed_and_a_lost_device_comes_back() {
    let daemon = daemon("sim:step_us=100000,fail_at=3");
    let series = format!(r#"neurond_engine_cancelled_total{{device="0",model="{SIM}"}}"#);
    let client = reqwest::Client::builder().timeout(Duration::from_millis(40)).build().unwrap();
    // The simulated encoder has 512 tokens a text and one step for each.
    let body = json!({"text": vec!["x".repeat(500); 50]});
    let left = client.post(daemon.url(&format!("{AI}/run/{SIM}"))).json(&body).send().await;
    assert!(left.unwrap_err().is_timeout());
    daemon.eventually("the request is dropped", |daemon| daemon.metric(&series) == 1.0).await;
    assert_eq!(daemon.metric(&format!(r#"neurond_micro_neurons_total{{model="{SIM}"}}"#)), 0.0, "nothing was produced");
    assert_eq!(daemon.metric(&format!(r#"neurond_cancelled_total{{model="{SIM}"}}"#)), 1.0);

    // The device fails under the next ones; its supervisor starts it again, encoders included.
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(run(&daemon, SIM, json!({"text": "a"})).await.status);
    }
    assert!(statuses.contains(&503), "{statuses:?}");
    let restarts = r#"neurond_engine_restarts_total{device="0"}"#;
    daemon.eventually("it is started again", |daemon| daemon.metric(restarts) == 1.0).await;
    daemon.eventually("all models are back", |daemon| daemon.services.fleet.get().serving().count() == 6).await;
    assert_eq!(run(&daemon, BERT, json!({"text": "a"})).await.status, 200);
}
