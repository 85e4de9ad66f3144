//! The process on a machine with two GPUs, which are emulated: kernels, notes and draws are those of real ones.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::harness::{Daemon, PATIENCE, Setup, field};

const LARGE: &str = "@cf/meta/llama-3.2-1b-instruct";
const SMALL: &str = "@cf/huggingfacetb/smollm2-135m-instruct";

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-llama")
}

/// A Llama of two layers with heads that GPU kernels take, its weights made up; the tokenizer is the small one's.
fn write_model(folder: &Path) {
    let (vocab, hidden, heads, kv_heads, dim, ffn) = (512, 128, 2, 1, 64, 192);
    std::fs::create_dir_all(folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(goldens().join(file), folder.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(goldens().join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", hidden),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("head_dim", dim),
        ("intermediate_size", ffn),
    ] {
        config[key] = json!(value);
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut state = 7u64;
    let mut tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    let mut put = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product::<usize>()).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            if shape.len() == 1 { 1.0 + 0.1 * value } else { 0.4 * value }
        });
        let bytes = values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        tensors.insert(name, (shape.to_vec(), bytes));
    };
    put("model.embed_tokens.weight".into(), &[vocab, hidden]);
    put("model.norm.weight".into(), &[hidden]);
    put("lm_head.weight".into(), &[vocab, hidden]);
    for layer in 0..2 {
        for (part, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * dim, hidden]),
            ("self_attn.k_proj", vec![kv_heads * dim, hidden]),
            ("self_attn.v_proj", vec![kv_heads * dim, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * dim]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            put(format!("model.layers.{layer}.{part}.weight"), &shape);
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn gpus_are_listed_and_measured() {
    let gpus = |args: &[&str], count: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_neurond"))
            .arg("gpus")
            .args(args)
            .env("NEUROND_EMULATED_GPUS", count)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let found: Value = serde_json::from_str(&gpus(&["--measure", "--scale", "0.003", "--json"], "2")).unwrap();
    assert_eq!((found.as_array().unwrap().len(), &found[1]["name"]), (2, &json!("emulated")));
    assert!(found[0]["copy_bytes_per_s"].as_f64().unwrap() > 0.0, "{found}");
    assert!(found[0]["bf16_flops_per_s"].is_null(), "no library multiplies on an emulated card");
    let table = gpus(&[], "1");
    assert!(table.lines().count() == 2 && table.contains("emulated"), "{table}");
    assert!(gpus(&[], "2").contains("models can be divided over them (tensor_parallel): threads"));
}

async fn ask(base: &str, body: Value) -> Result<Value, u16> {
    let answer = reqwest::Client::new().post(format!("{base}/v1/completions")).json(&body).send().await.unwrap();
    match answer.status().as_u16() {
        200 => Ok(answer.json().await.unwrap()),
        status => Err(status),
    }
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

#[actix::test]
async fn gpus_serve_what_their_kernels_take_and_the_cpu_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let (model, fault) = (folder.path().join("model"), folder.path().join("fault"));
    write_model(&model);
    let config = |gpus: &str| {
        let small = goldens();
        format!(
            "[gpu]\nstep_tokens = 64\nprefill_chunk = 32\nmax_running = 4\nthreads = 1\n\
             [[model]]\nid = {LARGE:?}\npath = {model:?}\nkv_bytes = \"1MiB\"\ncontext = 256\n{gpus}\n\
             [[model]]\nid = {SMALL:?}\npath = {small:?}\nkv_bytes = \"4MiB\"\n"
        )
    };
    let fault_path = fault.to_str().unwrap();
    let errors = folder.path().join("errors");
    let env = [
        ("NEUROND_EMULATED_GPUS", "2"),
        ("NEUROND_EMULATED_FAULT", fault_path),
        ("NEUROND_EMULATED_ERRORS", errors.to_str().unwrap()),
    ];
    let mut daemon = Daemon::start(Setup { config: &config(""), env: &env });
    assert_eq!(field(&daemon.wait_log("GPUs serve"), "gpus"), json!("[0, 1]"));
    let loaded = |daemon: &Daemon| {
        let lines = daemon.logged("model loaded");
        let mut places: Vec<_> = lines
            .iter()
            .map(|line| (field(line, "model").as_str().unwrap().to_owned(), field(line, "device").to_string()))
            .collect();
        places.sort();
        places
    };
    let at = |model: &str, device: &str| (model.to_owned(), format!("{device:?}"));
    assert_eq!(loaded(&daemon), [at(SMALL, "2"), at(LARGE, "0"), at(LARGE, "1")]);
    let refused = daemon.wait_log("GPU kernels do not take this model: the CPU serves it");
    assert!(field(&refused, "error").as_str().unwrap().contains("heads of 16"), "{refused}");

    // Both GPUs work, and say the same: greedy, drawn with a seed, and with rivals, which the host ranks.
    let base = daemon.base.clone();
    let prompts = ["The pilot", "A river that", "Seven", "Once more,"];
    let body = |model: &str, prompt: &str, more: Value| {
        let mut body = json!({"model": model, "prompt": prompt, "max_tokens": 6, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let wishes = [
        json!({"temperature": 0}),
        json!({"temperature": 1, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.4}),
        json!({"temperature": 0, "logprobs": 2}),
    ];
    let all = async || {
        let calls = wishes.iter().flat_map(|wish| prompts.map(|prompt| ask(&base, body(LARGE, prompt, wish.clone()))));
        futures_util::future::join_all(calls).await
    };
    let first: Vec<Value> = all().await.into_iter().map(Result::unwrap).collect();
    let said: Vec<&str> = first.iter().map(text).collect();
    assert!(said.iter().all(|text| !text.is_empty()) && said[0] != said[1] && said[0] != said[4], "{said:?}");
    assert_eq!(said[..4], said[8..], "greedy with rivals");
    let rivals = first[8]["choices"][0]["logprobs"]["top_logprobs"].as_array().unwrap();
    assert!(rivals.len() == 6 && rivals[0].as_object().unwrap().len() >= 2, "{rivals:?}");
    let tokens = async |device: u32, model: &str| {
        daemon.metric(&format!(r#"neurond_generation_tokens_total{{device="{device}",model="{model}"}}"#)).await
    };
    for device in 0..2 {
        assert!(tokens(device, LARGE).await > 0.0, "GPU {device} did nothing");
    }
    assert!(daemon.metric(r#"neurond_gpu_memory_bytes{device="1",kind="total"}"#).await > 0.0, "nobody watches");
    let small = ask(&base, body(SMALL, "The pilot", json!({"temperature": 0}))).await.unwrap();
    assert!(!text(&small).is_empty());
    assert_eq!(tokens(2, SMALL).await, 6.0);

    // A long answer that nobody joins: its steps are begun before the host has seen the tokens, and say the same.
    let long = json!({"temperature": 0, "max_tokens": 150, "speculative.n_max": 0});
    let long = ask(&base, body(LARGE, prompts[0], long)).await.unwrap();
    assert!(text(&long).starts_with(said[0]), "{} {}", text(&long), said[0]);
    let mut ahead = 0.0;
    for device in 0..2 {
        let series = format!(r#"neurond_gpu_graph_steps_total{{device="{device}",launch="ahead",model="{LARGE}"}}"#);
        ahead += daemon.metric(&series).await;
    }
    // How many is the machine's matter: a busy one comes to fewer.
    assert!((10.0..150.0).contains(&ahead), "{ahead} steps of 150 were begun ahead");

    // One breaks down: the other goes on meanwhile, and the broken one comes back.
    std::fs::write(&fault, "").unwrap();
    let outcomes = all().await;
    assert!(!fault.exists(), "nothing broke");
    let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
    assert!(failed < outcomes.len(), "a device that breaks takes others with it: {outcomes:?}");
    for (outcome, expected) in outcomes.iter().zip(&said) {
        assert!(outcome.as_ref().is_ok_and(|answer| text(answer) == *expected) || outcome.is_err());
    }
    daemon.wait_logs("model loaded", 4);
    let again: Vec<String> = all().await.into_iter().map(|answer| text(&answer.unwrap()).to_owned()).collect();
    assert_eq!(again, said);
    let restarts =
        async |device: u32| daemon.metric(&format!(r#"neurond_engine_restarts_total{{device="{device}"}}"#)).await;
    assert_eq!((restarts(0).await + restarts(1).await, restarts(2).await), (1.0, 0.0));

    // Kept from the GPUs, the model is the CPU's; given to one, it is that one's alone.
    for (done, (gpus, device)) in [("gpus = []", 2), ("gpus = [1]", 1)].into_iter().enumerate() {
        daemon.rewrite_config(&config(gpus));
        daemon.signal(libc::SIGHUP);
        daemon.wait_logs("reload done", done + 1);
        let before =
            daemon.metric(&format!(r#"neurond_generation_tokens_total{{device="{device}",model="{LARGE}"}}"#)).await;
        assert!(all().await.iter().all(Result::is_ok));
        let after =
            daemon.metric(&format!(r#"neurond_generation_tokens_total{{device="{device}",model="{LARGE}"}}"#)).await;
        assert_eq!(after - before, 72.0, "{gpus}");
    }

    // Cards whose driver tells of critical errors serve on, and whoever asks is warned.
    let ready = async || -> Value { reqwest::get(format!("{base}/health/ready")).await.unwrap().json().await.unwrap() };
    assert_eq!(ready().await["warnings"], json!([]));
    std::fs::write(&errors, "2").unwrap();
    daemon.wait_logs("the GPU had a critical error; nvidia-smi -q and the kernel's log say more", 2);
    let told = ready().await;
    assert_eq!((&told["status"], told["warnings"].as_array().unwrap().len()), (&json!("ready"), 2), "{told}");
    assert!(told["warnings"][1].as_str().unwrap().starts_with("device 1: 2 critical errors"), "{told}");
}

/// What a Hopper has beside the kernels of all cards: they are tried when a model is loaded, and each says what the portable one does.
#[actix::test]
async fn a_hoppers_own_kernels_read_prompts_as_the_portable_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model);
    let config = |kernel: &str, kv: &str| {
        format!(
            "[engine]\nprompt_lookup = false\n\
             [gpu]\nprompt_kernel = \"{kernel}\"\nstep_tokens = 64\nprefill_chunk = 64\nmax_running = 4\nthreads = 1\n\
             [[model]]\nid = {LARGE:?}\npath = {model:?}\nkv_bytes = \"1MiB\"\ngpu_kv = \"{kv}\"\ncontext = 256\n"
        )
    };
    let env = [("NEUROND_EMULATED_GPUS", "1"), ("NEUROND_EMULATED_CHIP", "hopper")];
    let mut daemon = Daemon::start(Setup { config: &config("warps", "bf16"), env: &env });
    let base = daemon.base.clone();
    let said = async || {
        let prompt = |first: &str| {
            format!(
                "{first} went down to the river and asked the ferryman what it would cost to be brought over, {first}"
            )
        };
        let body = |first: &str| json!({"model": LARGE, "prompt": prompt(first), "max_tokens": 6, "ignore_eos": true, "temperature": 0});
        let calls = ["The pilot", "A girl", "Seven men"].map(|first| ask(&base, body(first)));
        let answers = futures_util::future::join_all(calls).await.into_iter();
        answers.map(|answer| text(&answer.unwrap()).to_owned()).collect::<Vec<String>>()
    };
    let kernel = |daemon: &Daemon| field(daemon.logged("attends to prompts").last().unwrap(), "kernel");
    let mut reloads = 0;
    for kv in ["bf16", "fp8"] {
        let mut expected = Vec::new();
        for (name, serves) in [("warps", "Wide"), ("warpgroups", "Group"), ("bulk", "Bulk")] {
            if (name, kv) != ("warps", "bf16") {
                daemon.rewrite_config(&config(name, kv));
                daemon.signal(libc::SIGHUP);
                reloads += 1;
                daemon.wait_logs("reload done", reloads);
            }
            assert_eq!(kernel(&daemon), json!(serves));
            let said = said().await;
            if expected.is_empty() {
                expected = said.clone();
            }
            assert_eq!(said, expected, "{name} with KV in {kv}");
        }
    }
    assert!(daemon.logged("attention kernels were tried on a prompt").is_empty());
    daemon.rewrite_config(&config("fastest", "bf16"));
    daemon.signal(libc::SIGHUP);
    daemon.wait_logs("reload done", reloads + 1);
    let tried = daemon.wait_log("attention kernels were tried on a prompt");
    let times = field(&tried, "ms");
    assert!(["Wide", "Group", "Bulk"].iter().all(|tile| times.as_str().unwrap().contains(tile)), "{tried}");
    assert_eq!(field(&tried, "tile"), kernel(&daemon));
    assert!(said().await.iter().all(|text| !text.is_empty()));
}

/// On two GPUs as on one: what is said, drafts, a rank that breaks, another order of ranks.
#[actix::test]
async fn a_model_divided_over_two_gpus_is_one_device() {
    let folder = tempfile::tempdir().unwrap();
    let (model, fault) = (folder.path().join("model"), folder.path().join("fault"));
    write_model(&model);
    let config = |more: &str| {
        format!(
            "[engine]\nprompt_lookup = false\n[gpu]\nstep_tokens = 64\nprefill_chunk = 32\nmax_running = 4\nthreads = 1\n\
             [[model]]\nid = {LARGE:?}\npath = {model:?}\nkv_bytes = \"1MiB\"\ncontext = 256\n{more}\n"
        )
    };
    let env = [("NEUROND_EMULATED_GPUS", "2"), ("NEUROND_EMULATED_FAULT", fault.to_str().unwrap())];
    let mut daemon = Daemon::start(Setup { config: &config("gpus = [0]"), env: &env });
    let base = daemon.base.clone();
    let all = async || {
        let body = |prompt: &str| json!({"model": LARGE, "prompt": prompt, "max_tokens": 6, "ignore_eos": true, "temperature": 0});
        let calls = ["The pilot", "A river that", "Seven", "Once more,"].map(|prompt| ask(&base, body(prompt)));
        futures_util::future::join_all(calls).await
    };
    let said =
        async || -> Vec<String> { all().await.into_iter().map(|answer| text(&answer.unwrap()).to_owned()).collect() };
    let expected = said().await;
    let draft = format!("draft = {model:?}");
    let mut loaded = 1;
    for (done, (more, leader)) in
        [("".to_owned(), 0), (draft, 0), ("gpus = [1, 0]".to_owned(), 1)].into_iter().enumerate()
    {
        daemon.rewrite_config(&config(&format!("tensor_parallel = 2\n{more}")));
        daemon.signal(libc::SIGHUP);
        daemon.wait_logs("reload done", done + 1);
        loaded += 1;
        let line = daemon.wait_logs("model loaded", loaded).pop().unwrap();
        assert_eq!((field(&line, "ranks"), field(&line, "device")), (json!(2), json!(leader.to_string())), "{line}");
        assert_eq!(said().await, expected, "{more}");
        let series = |name: &str| format!(r#"neurond_{name}_total{{device="{leader}",model="{LARGE}"}}"#);
        assert!(daemon.metric(&series("generation_tokens")).await >= 24.0);
        assert_eq!(daemon.metric(&series("spec_drafted_tokens")).await > 0.0, leader == 0 && done > 0, "{more}");
    }

    // Whichever rank breaks down, the group does, and comes back.
    std::fs::write(&fault, "").unwrap();
    let outcomes = all().await;
    assert!(!fault.exists() && outcomes.iter().any(Result::is_err), "nothing broke: {outcomes:?}");
    daemon.wait_logs("model loaded", loaded + 1);
    let deadline = std::time::Instant::now() + PATIENCE;
    while all().await.iter().any(Result::is_err) {
        assert!(std::time::Instant::now() < deadline, "it does not come back");
    }
    assert_eq!(said().await, expected);
    assert_eq!(daemon.metric(r#"neurond_engine_restarts_total{device="1"}"#).await, 1.0);

    // A GPU too few.
    daemon.rewrite_config(&config("tensor_parallel = 2\ngpus = [1]"));
    daemon.signal(libc::SIGHUP);
    let refused = daemon.wait_log("reload refused; the configuration in force stays");
    assert!(refused.to_string().contains("takes as many GPUs, one a rank; name 2 of them"), "{refused}");
    assert_eq!(said().await, expected);
}

const BERT: &str = "@cf/baai/bge-small-en-v1.5";
const M3: &str = "@cf/baai/bge-m3";
const RERANKER: &str = "@cf/baai/bge-reranker-base";
const SENTIMENT: &str = "@cf/huggingface/distilbert-sst-2-int8";

/// A copy of a tiny encoder with two heads of 32, which GPU kernels take, in the place of four.
fn write_encoder(name: &str, folder: &Path) -> PathBuf {
    let (from, to) = (goldens().with_file_name(name), folder.join(name));
    std::fs::create_dir_all(&to).unwrap();
    for file in ["tokenizer.json", "model.safetensors"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    let key = if config.get("n_heads").is_some() { "n_heads" } else { "num_attention_heads" };
    config[key] = json!(2);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    to
}

async fn post(base: &str, path: &str, body: Value) -> Result<Value, u16> {
    let answer = reqwest::Client::new().post(format!("{base}{path}")).json(&body).send().await.unwrap();
    match answer.status().as_u16() {
        200 => Ok(answer.json().await.unwrap()),
        status => Err(status),
    }
}

/// The part of an answer that is computed.
async fn part(base: &str, (path, body, part): &(String, Value, &str)) -> Result<Value, u16> {
    let mut part = post(base, path, body.clone()).await?.pointer(part).unwrap().clone();
    // The best first: those that are nearly even may change places.
    part.as_array_mut().unwrap().sort_by_key(|entry| entry["id"].as_u64());
    Ok(part)
}

fn series(name: &str, device: usize, model: &str) -> String {
    format!(r#"{name}{{device="{device}",model="{model}"}}"#)
}

/// Numbers of a JSON value, in order of their places.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Number(number) => vec![number.as_f64().unwrap()],
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        Value::Object(fields) => fields.values().flat_map(numbers).collect(),
        _ => Vec::new(),
    }
}

#[actix::test]
async fn gpus_embed_and_classify_as_the_cpu_does() {
    let folder = tempfile::tempdir().unwrap();
    let (large, fault) = (folder.path().join("model"), folder.path().join("fault"));
    write_model(&large);
    let small = goldens().with_file_name("tiny-bert");
    let paths = ["tiny-bert", "tiny-reranker", "tiny-sentiment"].map(|name| write_encoder(name, folder.path()));
    let config = |gpus: &str| {
        let ids = [BERT, RERANKER, SENTIMENT];
        let models =
            ids.iter().zip(&paths).map(|(id, path)| format!("[[model]]\nid = {id:?}\npath = {path:?}\n{gpus}\n"));
        format!(
            "[gpu]\nstep_tokens = 64\nprefill_chunk = 32\nmax_running = 4\nthreads = 1\n\
             [[model]]\nid = {LARGE:?}\npath = {large:?}\ncontext = 256\n{}\
             [[model]]\nid = {M3:?}\npath = {small:?}\n",
            models.collect::<String>()
        )
    };
    let fault_path = fault.to_str().unwrap();
    let env = [("NEUROND_EMULATED_GPUS", "2"), ("NEUROND_EMULATED_FAULT", fault_path)];
    let mut daemon = Daemon::start(Setup { config: &config(""), env: &env });
    let lines = daemon.logged("model loaded");
    let on = |device: &str| -> Vec<Value> {
        lines.iter().filter(|line| field(line, "device") == device).map(|line| field(line, "model")).collect()
    };
    // What takes the rest of the memory comes last.
    assert_eq!((on("0"), on("1")), ([BERT, RERANKER, SENTIMENT, LARGE].map(Value::from).to_vec(), on("0")));
    assert_eq!(on("2"), [M3]);
    let refused = daemon.wait_log("GPU kernels do not take this model: the CPU serves it");
    assert!(field(&refused, "error").as_str().unwrap().contains("4 heads of 16"), "{refused}");

    let base = daemon.base.clone();
    let texts = ["the ship from riga", "day two", "A pilot asked for the Second tug, and came in!", "x"];
    let contexts = texts.map(|text| json!({ "text": text }));
    let run = |model: &str| format!("/client/v4/accounts/test/ai/run/{model}");
    let asked = [
        ("/v1/embeddings".to_owned(), json!({"model": BERT, "input": texts, "encoding_format": "float"}), "/data"),
        (run(BERT), json!({"text": texts, "pooling": "cls"}), "/result/data"),
        (run(RERANKER), json!({"query": "which ship", "contexts": contexts}), "/result/response"),
        (run(SENTIMENT), json!({"text": texts[2]}), "/result"),
    ];
    let all =
        async || futures_util::future::join_all(asked.iter().cycle().take(16).map(|asked| part(&base, asked))).await;
    let first: Vec<Value> = all().await.into_iter().map(Result::unwrap).collect();
    let mut steps = [0.0; 3];
    for (device, steps) in steps.iter_mut().enumerate() {
        for model in [BERT, RERANKER, SENTIMENT] {
            *steps += daemon.metric(&series("neurond_steps_total", device, model)).await;
        }
    }
    assert!(steps[0] > 0.0 && steps[1] > 0.0 && steps[2] == 0.0, "{steps:?}");
    let vectors = post(&base, "/v1/embeddings", json!({"model": M3, "input": texts})).await.unwrap();
    assert_eq!(numbers(&vectors["data"]).len(), 4 * 65, "64 numbers and an index each");
    assert!(daemon.metric(&series("neurond_step_seconds_count", 2, M3)).await > 0.0);

    // One breaks down: the other goes on meanwhile, and the broken one comes back with all that it had.
    std::fs::write(&fault, "").unwrap();
    let outcomes = all().await;
    assert!(!fault.exists(), "nothing broke");
    assert!(outcomes.iter().any(Result::is_ok), "a device that breaks takes others with it: {outcomes:?}");
    let lines = daemon.wait_logs("model loaded", 9 + 4);
    assert_eq!(field(&lines[12], "model"), LARGE, "last again");
    let again: Vec<Value> = all().await.into_iter().map(Result::unwrap).collect();
    assert_eq!(again, first);

    // Kept from the GPUs, they are the CPU's, which says the same but for rounding.
    daemon.rewrite_config(&config("gpus = []"));
    daemon.signal(libc::SIGHUP);
    daemon.wait_log("reload done");
    let on_cpu: Vec<Value> = all().await.into_iter().map(Result::unwrap).collect();
    assert!(daemon.metric(&series("neurond_steps_total", 2, BERT)).await > 0.0);
    for (found, expected) in first.iter().zip(&on_cpu) {
        let (found, expected) = (numbers(found), numbers(expected));
        assert!(found.len() == expected.len() && found.len() > 1);
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        // Numbers of vectors, or scores: the tiny models' large weights make these steep.
        let most = if found.len() > 20 { 0.02 } else { 0.05 };
        assert!(off < most, "off by {off}: {found:?}, on the CPU {expected:?}");
    }
}
