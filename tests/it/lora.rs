//! Adapters from their upload to their answers, on a tiny decoder with goldens of merged weights; accounts, limits, restarts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::join_all;
use neurond::base::{AccountId, ModelId};
use neurond::config::{Config, KvType, Model, Precision};
use neurond::model::Detokenizer;
use neurond::model::text::TextModel;
use neurond::task::Task;
use serde_json::{Value, json};

use crate::harness::{Answer, CLASSIC, Daemon, token};

/// A model of the catalog that takes adapters; behind it is the tiny one.
const BASE: &str = "@cf/huggingfacetb/smollm2-135m-instruct";
const HOME: &str = "/client/v4/accounts/ada/ai";

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file)
}

/// A daemon with the tiny model, and a simulated one that takes no adapters. Accounts `ada` and `bob` have tokens of their names.
fn daemon(folder: &Path, tune: impl FnOnce(&mut Config)) -> Daemon {
    Daemon::start(|config| {
        let model = |id: &str, path: PathBuf| Model {
            id: ModelId::new(id),
            task: Task::TextGeneration,
            path,
            precision: Precision::Plain,
            kv: KvType::F32,
            kv_bytes: 4 << 20,
            spill: None,
            draft: None,
            tensor_parallel: 1,
            on_gpu: Default::default(),
            context: 512,
            modified: None,
        };
        config.models = vec![model(BASE, golden("tiny-llama")), model(CLASSIC, "sim".into())];
        config.auth.anonymous = None;
        config.auth.tokens =
            vec![token("ada", "ada", "ada"), token("bob", "bob", "bob"), token("house", "house", "house")];
        config.lora.path = Some(folder.to_owned());
        tune(config);
    })
}

/// A form as curl sends it.
fn form(parts: &[(&str, Option<&str>, &[u8])]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (name, filename, bytes) in parts {
        let filename = filename.map(|filename| format!("; filename=\"{filename}\"")).unwrap_or_default();
        body.extend(format!("--cut\r\ncontent-disposition: form-data; name=\"{name}\"{filename}\r\n\r\n").bytes());
        body.extend(*bytes);
        body.extend(b"\r\n");
    }
    body.extend(b"--cut--\r\n");
    ("multipart/form-data; boundary=cut".to_owned(), body)
}

/// A caller with a token that is its name.
struct Caller<'a>(&'a Daemon, &'static str);

impl Caller<'_> {
    fn url(&self, path: &str) -> String {
        self.0.url(&format!("/client/v4/accounts/{}/ai{path}", self.1))
    }

    async fn get(&self, path: &str) -> Answer {
        Answer::of(reqwest::Client::new().get(self.url(path)).bearer_auth(self.1)).await
    }

    async fn delete(&self, path: &str) -> Answer {
        Answer::of(reqwest::Client::new().delete(self.url(path)).bearer_auth(self.1)).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::of(reqwest::Client::new().post(self.url(path)).bearer_auth(self.1).json(&body)).await
    }

    async fn create(&self, name: &str) -> Value {
        let answer = self.post("/finetunes", json!({"model": BASE, "name": name, "description": "a test"})).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["result"].clone()
    }

    async fn upload(&self, key: &str, parts: &[(&str, Option<&str>, &[u8])]) -> Answer {
        let (kind, body) = form(parts);
        let request = reqwest::Client::new().post(self.url(&format!("/finetunes/{key}/finetune-assets")));
        Answer::of(request.bearer_auth(self.1).header("content-type", kind).body(body)).await
    }

    /// Both files of an adapter among the goldens.
    async fn fill(&self, key: &str, adapter: &str) {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let bytes = std::fs::read(golden("tiny-llama-lora").join(adapter).join(name)).unwrap();
            let answer = self.upload(key, &[("file_name", None, name.as_bytes()), ("file", Some(name), &bytes)]).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    }

    /// The answer to a raw prompt, greedily.
    async fn run(&self, prompt: &str, max_tokens: usize, lora: Option<&str>) -> Answer {
        let body = json!({"prompt": prompt, "raw": true, "max_tokens": max_tokens, "temperature": 0, "lora": lora});
        self.post(&format!("/run/{BASE}"), body).await
    }

    #[track_caller]
    fn refused(&self, answer: &Answer, status: u16, code: u32, words: &str) {
        let body = answer.json();
        let error = &body["errors"][0];
        assert_eq!((answer.status, error["code"].as_u64()), (status, Some(u64::from(code))), "{body}");
        assert!(error["message"].as_str().unwrap().contains(words), "{body}");
    }
}

/// Raw prompts of a golden, with the text of the answer to each.
fn answers(file: &str) -> Vec<(String, usize, String)> {
    let text = TextModel::open(&golden("tiny-llama")).unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(golden(file)).unwrap()).unwrap();
    let raw = golden["prompts"].as_array().unwrap().iter().filter(|case| case["raw"].is_string());
    raw.map(|case| {
        assert_eq!(case["near_ties"], json!([]), "choose another prompt");
        let greedy = case["greedy"].as_array().unwrap();
        let (mut detokenizer, mut said) = (Detokenizer::new(Arc::clone(text.vocabulary())), String::new());
        greedy.iter().for_each(|token| detokenizer.push(token.as_u64().unwrap() as u32, &mut said));
        detokenizer.finish(&mut said);
        (case["raw"].as_str().unwrap().to_owned(), greedy.len(), said)
    })
    .collect()
}

/// A text up to a character that its last token may have begun.
fn whole(text: &Value) -> &str {
    text.as_str().unwrap().trim_end_matches('\u{fffd}')
}

#[tokio::test]
async fn an_adapter_is_made_filled_and_answers_as_merged_weights_do() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(folder.path(), |_| ());
    let ada = Caller(&daemon, "ada");
    let made = ada.create("mine").await;
    assert_eq!((&made["name"], &made["model"], &made["public"]), (&json!("mine"), &json!(BASE), &json!(false)));
    assert_eq!((&made["description"], &made["ready"]), (&json!("a test"), &json!(false)));
    assert_eq!(made["created_at"].as_str().unwrap().len(), "2026-11-24 15:04:05.678".len());
    let id = made["id"].as_str().unwrap().to_owned();

    let missing = "missing required files: upload adapter_config.json and adapter_model.safetensors";
    ada.refused(&ada.run("x", 4, Some("mine")).await, 400, 3039, missing);
    ada.fill(&id, "all").await;
    ada.create("other").await;
    ada.fill("other", "wide").await;
    let list = ada.get("/finetunes").await.json();
    let listed: Vec<_> = list["result"].as_array().unwrap().iter().map(|one| (&one["name"], &one["ready"])).collect();
    assert_eq!(listed, [(&json!("mine"), &json!(true)), (&json!("other"), &json!(true))]);

    // Base and two adapters in the same steps, each as its own merged weights would answer.
    let cases = [
        (None, "tiny-llama/golden.json"),
        (Some("mine"), "tiny-llama-lora/all/golden.json"),
        (Some("other"), "tiny-llama-lora/wide/golden.json"),
        (Some(id.as_str()), "tiny-llama-lora/all/golden.json"),
    ];
    let calls = cases.iter().flat_map(|(lora, file)| answers(file).into_iter().map(move |case| (*lora, case)));
    let outcomes = join_all(calls.map(async |(lora, (prompt, tokens, said))| {
        let answer = ada.run(&prompt, tokens, lora).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(whole(&answer.json()["result"]["response"]), whole(&json!(said)), "{lora:?}: {prompt}");
    }));
    assert_eq!(outcomes.await.len(), 12);
    assert_eq!(daemon.metric("neurond_adapters_loaded"), 2.0);
    assert_eq!(daemon.metric("neurond_adapter_loads_total{outcome=\"done\"}"), 2.0, "each was opened once");
    assert!(daemon.metric(&format!("neurond_adapted_tokens_total{{device=\"0\",model=\"{BASE}\"}}")) > 100.0);

    // The same field on the other surfaces, streams included.
    let (prompt, tokens, said) = answers("tiny-llama-lora/all/golden.json").remove(0);
    let body = json!({"model": BASE, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "lora": "mine"});
    assert_eq!(whole(&ada.post("/v1/completions", body).await.json()["choices"][0]["text"]), whole(&json!(said)));
    let body =
        json!({"prompt": prompt, "raw": true, "max_tokens": tokens, "temperature": 0, "lora": "mine", "stream": true});
    let chunks = ada.post(&format!("/run/{BASE}"), body).await.chunks();
    assert_eq!(whole(&json!(crate::harness::joined(&chunks, "/response"))), whole(&json!(said)));
    let chat =
        json!({"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "lora": "mine"});
    assert_eq!(ada.post("/v1/chat/completions", chat).await.status, 200);
    let response = json!({"model": BASE, "input": "hello", "max_output_tokens": 4, "lora": "nobody's"});
    ada.refused(&ada.post("/v1/responses", response).await, 400, 5006, "no fine-tune \"nobody's\"");
}

#[tokio::test]
async fn prefixes_are_shared_under_one_adapter_and_never_with_another() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(folder.path(), |_| ());
    let ada = Caller(&daemon, "ada");
    ada.create("a").await;
    ada.fill("a", "all").await;
    ada.create("same").await;
    ada.fill("same", "all").await;
    ada.create("b").await;
    ada.fill("b", "wide").await;
    let prompt = "The pilot asked for a second tug and a third one and a fourth one before the tide turned again.";
    let mut seen = Vec::new();
    for lora in [None, Some("a"), Some("b"), Some("a"), None, Some("b"), Some("same")] {
        let answer = ada.run(prompt, 6, lora).await.json();
        let cached = answer["result"]["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        seen.push((lora, cached > 0, answer["result"]["response"].clone()));
    }
    let cached: Vec<bool> = seen.iter().map(|(_, cached, _)| *cached).collect();
    assert_eq!(cached, [false, false, false, true, true, true, true], "equal files are one adapter");
    for (first, second) in [(0, 4), (1, 3), (2, 5), (1, 6)] {
        assert_eq!(seen[first].2, seen[second].2);
    }
    assert_ne!(seen[0].2, seen[1].2);
}

#[tokio::test]
async fn accounts_see_and_use_their_own_adapters_and_public_ones() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(folder.path(), |config| config.lora.public_account = Some(AccountId::new("house")));
    let (ada, bob, house) = (Caller(&daemon, "ada"), Caller(&daemon, "bob"), Caller(&daemon, "house"));
    let hers = ada.create("mine").await;
    let id = hers["id"].as_str().unwrap();
    ada.fill("mine", "all").await;
    assert_eq!(bob.get("/finetunes").await.json()["result"], json!([]));
    for key in ["mine", id] {
        bob.refused(&bob.run("x", 2, Some(key)).await, 400, 5006, "this account has no fine-tune");
        bob.refused(&bob.upload(key, &[("file", Some("adapter_config.json"), b"{}")]).await, 404, 7000, "no fine-tune");
        bob.refused(&bob.delete(&format!("/finetunes/{key}")).await, 404, 7000, "no fine-tune");
    }
    // A name of one's own is one's own, whoever else has it.
    bob.create("mine").await;
    bob.refused(&bob.run("x", 2, Some("mine")).await, 400, 3039, "missing");
    // Nobody reaches another account's through its path.
    let foreign = reqwest::Client::new().get(daemon.url("/client/v4/accounts/ada/ai/finetunes")).bearer_auth("bob");
    assert_eq!(Answer::of(foreign).await.status, 401);

    house.create("shared").await;
    house.fill("shared", "late").await;
    let public = bob.get("/finetunes/public").await.json();
    assert_eq!((&public["result"][0]["name"], &public["result"][0]["public"]), (&json!("shared"), &json!(true)));
    assert_eq!(bob.run("x", 2, Some("shared")).await.status, 200);
    bob.refused(&bob.delete("/finetunes/shared").await, 404, 7000, "no fine-tune");
}

#[tokio::test]
async fn what_is_wrong_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(folder.path(), |config| {
        config.lora.max_adapters = 2;
        config.lora.max_file_bytes = 100_000;
    });
    let ada = Caller(&daemon, "ada");
    let create = async |body: Value| ada.post("/finetunes", body).await;
    ada.refused(&create(json!({"name": "x"})).await, 400, 5006, "'model' is required");
    ada.refused(&create(json!({"model": BASE})).await, 400, 5006, "'name' is required");
    ada.refused(&create(json!({"model": "@cf/no/such", "name": "x"})).await, 400, 5007, "No such model");
    ada.refused(&create(json!({"model": CLASSIC, "name": "x"})).await, 405, 5005, "LoRA is not supported");
    for name in ["../../etc", "..", "a/b", "", "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c"] {
        ada.refused(&create(json!({"model": BASE, "name": name})).await, 400, 5006, "name");
    }
    ada.create("x").await;
    ada.refused(&create(json!({"model": BASE, "name": "x"})).await, 400, 5006, "already");
    ada.create("y").await;
    ada.refused(&create(json!({"model": BASE, "name": "z"})).await, 400, 5006, "has 2 fine-tunes");
    ada.refused(
        &ada.post(&format!("/run/{CLASSIC}"), json!({"prompt": "x", "lora": "x"})).await,
        405,
        5005,
        "LoRA is not supported",
    );

    let config = std::fs::read(golden("tiny-llama-lora/all/adapter_config.json")).unwrap();
    let weights = std::fs::read(golden("tiny-llama-lora/all/adapter_model.safetensors")).unwrap();
    let name = |name: &'static str| ("file_name", None, name.as_bytes());
    let check = async |parts: &[(&str, Option<&str>, &[u8])], status: u16, code: u32, words: &str| {
        ada.refused(&ada.upload("x", parts).await, status, code, words);
    };
    check(&[name("adapter_config.json")], 400, 5006, "'file' is required").await;
    check(&[("file", None, &config)], 400, 5006, "'file_name' is required").await;
    check(&[name("../adapter_config.json"), ("file", None, &config)], 400, 5006, "'file_name' must be").await;
    check(&[name("pytorch_model.bin"), ("file", None, &config)], 400, 5006, "'file_name' must be").await;
    check(&[name("adapter_config.json"), ("file", None, b"{\"r\":")], 400, 5006, "is not JSON").await;
    check(&[name("adapter_config.json"), ("file", None, br#"{"r":64,"lora_alpha":1}"#)], 400, 5006, "rank 64").await;
    check(&[name("adapter_model.safetensors"), ("file", None, &config)], 400, 5006, "cut or corrupt").await;
    check(&[name("adapter_model.safetensors"), ("file", None, &weights[..9_000])], 400, 5006, "cut or corrupt").await;
    check(&[name("adapter_model.safetensors"), ("file", None, &vec![0; 100_001])], 413, 3006, "larger than 100000")
        .await;
    check(&[("file", None, &config), ("file", None, &config)], 400, 5006, "too many").await;
    check(&[("extra", None, b"x")], 400, 5006, "too many").await;
    let (kind, body) = form(&[name("adapter_config.json"), ("file", None, &config)]);
    let send = async |kind: &str, body: &[u8]| {
        let request = reqwest::Client::new().post(ada.url("/finetunes/x/finetune-assets")).bearer_auth("ada");
        Answer::of(request.header("content-type", kind).body(body.to_vec())).await
    };
    ada.refused(&send("application/json", b"{}").await, 400, 5006, "multipart/form-data");
    ada.refused(&send(&kind, &body[..body.len() - 30]).await, 400, 5006, "does not parse");
    let gone = ada.upload("nobody", &[name("adapter_config.json"), ("file", None, &config)]).await;
    ada.refused(&gone, 404, 7000, "no fine-tune \"nobody\"");

    // Nothing of all this stayed, and what is good is taken afterwards.
    let list = ada.get("/finetunes").await.json();
    assert_eq!(list["result"][0]["ready"], json!(false));
    let id = list["result"][0]["id"].as_str().unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path().join("ada").join(id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["finetune.json"]);
    ada.fill("x", "all").await;
    assert_eq!(ada.run("x", 2, Some("x")).await.status, 200);
    // Weights of another rank than the configuration says are found when they meet.
    let other = std::fs::read(golden("tiny-llama-lora/wide/adapter_model.safetensors")).unwrap();
    assert_eq!(ada.upload("x", &[name("adapter_model.safetensors"), ("file", None, &other)]).await.status, 200);
    ada.refused(&ada.run("x", 2, Some("x")).await, 400, 5006, "with rank 8 this model takes 8 x 64");
    assert_eq!(daemon.metric("neurond_adapter_loads_total{outcome=\"failed\"}"), 1.0);
}

#[tokio::test]
async fn adapters_outlive_the_daemon_and_what_was_under_way_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let (prompt, tokens, said) = answers("tiny-llama-lora/wide/golden.json").remove(0);
    let id = {
        let daemon = daemon(folder.path(), |_| ());
        let ada = Caller(&daemon, "ada");
        let id = ada.create("mine").await["id"].as_str().unwrap().to_owned();
        ada.fill("mine", "wide").await;
        ada.create("half").await;
        let gone = ada.create("gone").await;
        assert_eq!(ada.delete("/finetunes/gone").await.json()["result"]["id"], gone["id"]);
        id
    };
    let account = folder.path().join("ada");
    std::fs::write(account.join(&id).join(".upload-0"), "half a file").unwrap();
    std::fs::create_dir(account.join(".new-0")).unwrap();
    std::fs::create_dir(account.join("somebody-elses")).unwrap();
    let daemon = daemon(folder.path(), |_| ());
    let ada = Caller(&daemon, "ada");
    let list = ada.get("/finetunes").await.json();
    let names: Vec<_> = list["result"].as_array().unwrap().iter().map(|one| (&one["name"], &one["ready"])).collect();
    assert_eq!(names, [(&json!("mine"), &json!(true)), (&json!("half"), &json!(false))]);
    assert_eq!(whole(&ada.run(&prompt, tokens, Some(&id)).await.json()["result"]["response"]), whole(&json!(said)));
    assert!(!account.join(&id).join(".upload-0").exists() && !account.join(".new-0").exists());
    assert!(account.join("somebody-elses").exists());
}

#[tokio::test]
async fn memory_is_bounded_and_the_least_recently_used_adapter_goes() {
    let folder = tempfile::tempdir().unwrap();
    // Room for one of the two, by what is estimated before it is opened.
    let daemon = daemon(folder.path(), |config| config.lora.cache_bytes = 130_000);
    let ada = Caller(&daemon, "ada");
    ada.create("a").await;
    ada.fill("a", "all").await;
    ada.create("b").await;
    ada.fill("b", "wide").await;
    let mut said = Vec::new();
    for lora in ["a", "b", "a", "a", "b"] {
        said.push(ada.run("The tide", 6, Some(lora)).await.json()["result"]["response"].clone());
    }
    assert_eq!((&said[0], &said[1]), (&said[2], &said[4]));
    assert!(said[0] != said[1] && said[0] == said[3]);
    assert_eq!(daemon.metric("neurond_adapter_loads_total{outcome=\"done\"}"), 4.0);
    assert_eq!(daemon.metric("neurond_adapter_evictions_total"), 3.0);
    assert!(daemon.metric("neurond_adapter_bytes") <= 130_000.0);
    assert_eq!(ada.delete("/finetunes/b").await.status, 200);
    ada.refused(&ada.run("x", 2, Some("b")).await, 400, 5006, "no fine-tune");
    assert_eq!((daemon.metric("neurond_adapters_loaded"), daemon.metric("neurond_adapter_bytes")), (0.0, 0.0));
}

#[tokio::test]
async fn a_server_without_a_place_for_adapters_says_so() {
    let daemon = daemon(Path::new("unused"), |config| config.lora.path = None);
    let ada = Caller(&daemon, "ada");
    assert_eq!(ada.get("/finetunes").await.json()["result"], json!([]));
    let refused = ada.post("/finetunes", json!({"model": BASE, "name": "x"})).await;
    ada.refused(&refused, 400, 5006, "its operator has to set `lora.path`");
    ada.refused(&ada.run("x", 2, Some("x")).await, 405, 5005, "lora.path");
    let anybody = reqwest::Client::new().get(daemon.url(&format!("{HOME}/finetunes")));
    assert_eq!(Answer::of(anybody).await.status, 401);
}
