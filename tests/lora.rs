//! Adapters on real decoders against goldens of merged weights (`scripts/tiny_models.py`: numpy, f64), and against
//! themselves in other company.
//!
//!     base + adapter, Precision::Plain ── logits to 1e-4, greedy answers ──> tests/goldens/tiny-llama-lora/*/golden.json
//!     several adapters and none in one step ── every bit ──> each alone

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use neurond::config::{KvType, Precision};
use neurond::kernel::{Isa, Pool};
use neurond::model::lora::{Adapter, Shape};
use neurond::model::spec::DecoderSpec;
use neurond::model::weights::Weights;
use neurond::model::{Batch, Decoder, DecoderOptions};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// How far a logit may be from that of the merged weights.
const CLOSE: f32 = 1e-4;
/// Tokens in a KV block, blocks of a sequence, sequences of a rig.
const BLOCK: usize = 16;
const BLOCKS: usize = 24;
const SEQUENCES: usize = 8;

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file)
}

fn adapter(name: &str, spec: &DecoderSpec) -> Arc<Adapter> {
    Arc::new(Adapter::open(&golden("tiny-llama-lora").join(name), Shape::of(spec)).unwrap())
}

/// A decoder; sequence `n` has its own blocks.
fn decoder(model: &Path, precision: Precision, kv: KvType) -> Decoder {
    let weights = Weights::open(model).unwrap();
    let spec = weights.spec().unwrap();
    let mut options = DecoderOptions {
        pool: Arc::new(Pool::new(2)),
        isa: Isa::detect(),
        precision,
        kv,
        kv_bytes: 0,
        block_tokens: BLOCK,
        max_rows: 512,
        max_sample_rows: 512,
    };
    options.kv_bytes = options.kv_block_bytes(&spec) * BLOCKS * SEQUENCES;
    Decoder::open(&weights, spec, &options, &|_| ()).unwrap()
}

/// The next `tokens` of sequence `slot`, which has `start` of them, under an adapter or none.
type Part<'a> = (usize, usize, &'a [u32], Option<&'a Arc<Adapter>>);

/// Computes a step and gives the logits of every row, part by part.
fn step(decoder: &mut Decoder, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let mut batch = Batch::default();
    for &(slot, start, tokens, adapter) in parts {
        let blocks = (start + tokens.len()).div_ceil(BLOCK);
        let table: Vec<u32> = (0..blocks).map(|block| (slot * BLOCKS + block) as u32).collect();
        batch.push(tokens, start as u32, &table, 0..tokens.len() as u32);
        if let Some(adapter) = adapter {
            batch.adapt(adapter);
        }
    }
    let vocab = decoder.spec().vocab;
    let logits = decoder.forward(&batch).unwrap().0.to_vec();
    let mut rest = logits.as_slice();
    parts.iter().map(|part| rest.split_off(..part.2.len() * vocab).unwrap().to_vec()).collect()
}

/// Logits of all tokens, read `chunk` at a time.
fn read(decoder: &mut Decoder, tokens: &[u32], chunk: usize, adapter: Option<&Arc<Adapter>>) -> Vec<f32> {
    let mut logits = Vec::new();
    for (i, part) in tokens.chunks(chunk).enumerate() {
        logits.extend(step(decoder, &[(0, i * chunk, part, adapter)]).remove(0));
    }
    logits
}

fn best(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u32).collect()
}

/// Base and adapter, in f32, say what the reference says with the adapter merged into its weights.
fn check_merged(model: &str, name: &str, file: &str) {
    let golden_file = golden("tiny-llama-lora").join(name).join(file);
    let golden_of: Value = serde_json::from_slice(&std::fs::read(golden_file).unwrap()).unwrap();
    let stride = golden_of["stride"].as_u64().unwrap() as usize;
    let mut decoder = decoder(&golden(model), Precision::Plain, KvType::F32);
    let vocab = decoder.spec().vocab;
    let adapter = adapter(name, decoder.spec());
    let mut furthest = 0f32;
    for case in golden_of["prompts"].as_array().unwrap() {
        let (prompt, greedy, ties) = (numbers(&case["tokens"]), numbers(&case["greedy"]), numbers(&case["near_ties"]));
        let tokens = [&prompt[..], &greedy[..greedy.len() - 1]].concat();
        let logits = read(&mut decoder, &tokens, 200, Some(&adapter));
        let row = |position: usize| &logits[position * vocab..][..vocab];
        for at in case["logits"].as_array().unwrap() {
            let row = row(at["position"].as_u64().unwrap() as usize);
            let top = numbers(&at["top_ids"]).into_iter().zip(at["top"].as_array().unwrap());
            let every = (0..vocab as u32).step_by(stride).zip(at["every"].as_array().unwrap());
            for (id, expected) in top.chain(every) {
                let off = (row[id as usize] - expected.as_f64().unwrap() as f32).abs();
                furthest = furthest.max(off);
                assert!(off <= CLOSE, "{name} on {model}, {}: logit {id} is off by {off}", case["name"]);
            }
        }
        for (i, &token) in greedy.iter().enumerate().filter(|(i, _)| !ties.contains(&(*i as u32))) {
            assert_eq!(best(row(prompt.len() - 1 + i)), token, "{name} on {model}, {}: token {i}", case["name"]);
        }
    }
    println!("{name} on {model}: furthest logit off by {furthest:.1e}");
}

#[test]
fn an_adapter_computes_what_merged_weights_do() {
    for name in ["all", "wide", "late"] {
        check_merged("tiny-llama", name, "golden.json");
    }
    // Its rows of q and k lie in another order, which an adapter must not notice.
    check_merged("tiny-gguf/legacy.gguf", "all", "legacy.json");
}

#[test]
fn several_adapters_and_none_in_one_batch_have_the_bits_that_each_has_alone() {
    let tokens: Vec<u32> = (0..120).map(|i| (i * 37 + 11) % 500).collect();
    for (model, precision, kv) in [
        ("tiny-llama", Precision::Plain, KvType::F32),
        ("tiny-llama", Precision::Fast, KvType::F16),
        ("tiny-gguf/legacy.gguf", Precision::Fast, KvType::F16),
    ] {
        let mut decoder = decoder(&golden(model), precision, kv);
        let vocab = decoder.spec().vocab;
        let names = ["all", "wide", "late"].map(|name| adapter(name, decoder.spec()));
        let of = [Some(&names[0]), None, Some(&names[1]), Some(&names[0]), Some(&names[2]), None, Some(&names[1])];
        let alone: Vec<Vec<f32>> = of.iter().map(|adapter| read(&mut decoder, &tokens, 120, *adapter)).collect();
        assert_eq!(alone[0], alone[3], "the same adapter");
        for (a, b) in [(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)] {
            assert_ne!(alone[a], alone[b], "{model}: {a} and {b} are different adapters");
        }
        // Prompts in chunks beside single tokens, out of step with each other.
        let chunks = [
            [40, 1, 1, 78],
            [1, 60, 58, 1],
            [7, 100, 1, 12],
            [1, 1, 1, 117],
            [33, 33, 33, 21],
            [90, 10, 10, 10],
            [64, 1, 54, 1],
        ];
        let (mut done, mut together) = ([0; 7], vec![Vec::new(); 7]);
        for round in 0..4 {
            let parts: Vec<Part<'_>> = (0..7)
                .map(|slot| (slot, done[slot], &tokens[done[slot]..done[slot] + chunks[slot][round]], of[slot]))
                .collect();
            for (slot, logits) in step(&mut decoder, &parts).into_iter().enumerate() {
                together[slot].extend(logits);
                done[slot] += chunks[slot][round];
            }
        }
        for (slot, (alone, together)) in alone.iter().zip(&together).enumerate() {
            for (row, (alone, together)) in alone.chunks(vocab).zip(together.chunks(vocab)).enumerate() {
                assert_eq!(alone, together, "{model} {precision:?}: sequence {slot}, row {row}");
            }
        }
    }
}

#[test]
fn an_adapter_of_another_shape_is_refused() {
    let weights = Weights::open(&golden("tiny-gguf/k.gguf")).unwrap();
    let error = Adapter::open(&golden("tiny-llama-lora/all"), Shape::of(&weights.spec().unwrap())).unwrap_err();
    assert!(
        error.message().contains("Q of layer 0 is 8 x 64 and 64 x 8; with rank 8 this model takes 8 x 256"),
        "{error}"
    );
    let mut other = decoder(&golden("tiny-gguf/k.gguf"), Precision::Plain, KvType::F32);
    let fits = Weights::open(&golden("tiny-llama")).unwrap().spec().unwrap();
    let mut batch = Batch::default();
    batch.push(&[1], 0, &[0], [0]);
    batch.adapt(&adapter("all", &fits));
    assert!(other.forward(&batch).err().unwrap().message().contains("is for another model"));
}

/// The weights of a folder with an adapter's merged into them, in f32: `W + B A`.
fn merge(base: &Path, adapter: &Path, to: &Path) {
    let read = |path: &Path| std::fs::read(path).unwrap();
    let numbers = |tensor: &TensorView<'_>| -> Vec<f32> {
        let halves = tensor.data().as_chunks::<2>().0.iter();
        match tensor.dtype() {
            Dtype::F16 => halves.map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
            _ => halves.map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        }
    };
    let (weights, deltas) = (read(&base.join("model.safetensors")), read(&adapter.join("adapter_model.safetensors")));
    let (weights, deltas) = (SafeTensors::deserialize(&weights).unwrap(), SafeTensors::deserialize(&deltas).unwrap());
    let merged = weights.tensors().into_iter().map(|(name, tensor)| {
        let mut values = numbers(&tensor);
        let half = |half: &str| {
            let module = name.strip_suffix(".weight").unwrap();
            deltas.tensor(&format!("base_model.model.{module}.lora_{half}.weight")).ok()
        };
        if let (Some(a), Some(b)) = (half("A"), half("B")) {
            let (rank, width) = (a.shape()[0], a.shape()[1]);
            let (a, b) = (numbers(&a), numbers(&b));
            for (row, values) in values.chunks_exact_mut(width).enumerate() {
                for (at, value) in values.iter_mut().enumerate() {
                    *value += (0..rank).map(|i| b[row * rank + i] * a[i * width + at]).sum::<f32>();
                }
            }
        }
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        (name, tensor.shape().to_vec(), bytes)
    });
    let merged: Vec<_> = merged.collect();
    let views =
        merged.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).unwrap();
    std::fs::copy(base.join("config.json"), to.join("config.json")).unwrap();
}

/// Where a family norms what a layer gives, what an adapter adds is normed with it.
#[test]
fn adapters_of_other_families_compute_what_merged_weights_do() {
    let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 96).collect();
    for model in ["tiny-qwen3", "tiny-gemma", "tiny-gemma3"] {
        let [adapter_at, merged_at] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut base = decoder(&golden(model), Precision::Plain, KvType::F32);
        write_adapter(adapter_at.path(), base.spec(), 1.0);
        merge(&golden(model), adapter_at.path(), merged_at.path());
        let adapter = Arc::new(Adapter::open(adapter_at.path(), Shape::of(base.spec())).unwrap());
        let mut merged = decoder(merged_at.path(), Precision::Plain, KvType::F32);
        let expected = read(&mut merged, &tokens, 60, None);
        let off = |found: Vec<f32>| found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let (with, without) =
            (off(read(&mut base, &tokens, 25, Some(&adapter))), off(read(&mut base, &tokens, 25, None)));
        assert!(with < 1e-3 && without > 0.1, "{model}: off by {with}, without the adapter by {without}");
    }
}

/// Writes an adapter of rank 32 over all matrices of a model; the numbers of B are multiplied by `size`.
fn write_adapter(folder: &Path, spec: &DecoderSpec, size: f32) {
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let (hidden, q, kv, ffn) = (spec.hidden, spec.q_width(), spec.kv_width(), spec.ffn);
    let modules = [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", ffn, hidden),
        ("mlp.up_proj", ffn, hidden),
        ("mlp.down_proj", hidden, ffn),
    ];
    let mut tensors = Vec::new();
    for layer in 0..spec.layers {
        for (module, outputs, inputs) in modules {
            for (half, rows, cols, size) in [("A", 32, inputs, 0.02), ("B", outputs, 32, size)] {
                let values = (0..rows * cols).flat_map(|_| f16::from_f32(random() * size).to_le_bytes());
                let name = format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight");
                tensors.push((name, vec![rows, cols], values.collect::<Vec<u8>>()));
            }
        }
    }
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("adapter_model.safetensors")).unwrap();
    let config =
        json!({"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": "all-linear", "bias": "none"});
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn on_a_real_model_a_small_adapter_changes_the_answer_and_one_of_zeros_does_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("NEUROND_TEST_MODELS").map(PathBuf::from);
    let folders = named.into_iter().chain([root.join("target/test-models"), root.join("models")]);
    let found = folders.map(|folder| folder.join("SmolLM2-135M-Instruct.Q4_1.gguf")).find(|path| path.is_file());
    let Some(model) = found else {
        return eprintln!(
            "skipped: no weights (SmolLM2-135M-Instruct.Q4_1.gguf in $NEUROND_TEST_MODELS, target/test-models or models/)"
        );
    };
    let mut decoder = decoder(&model, Precision::Fast, KvType::F16);
    let vocab = decoder.spec().vocab;
    let tokens = [504, 2365, 282, 4649, 314, 260, 2008, 30];
    let with = |size: f32| {
        let folder = tempfile::tempdir().unwrap();
        write_adapter(folder.path(), decoder.spec(), size);
        Arc::new(Adapter::open(folder.path(), Shape::of(decoder.spec())).unwrap())
    };
    let (zero, small) = (with(0.0), with(0.01));
    assert_eq!((small.rank(), small.bytes() > 9_000_000), (32, true), "{} bytes", small.bytes());
    let of = [None, Some(&zero), Some(&small)];
    let alone: Vec<Vec<f32>> = of.iter().map(|adapter| read(&mut decoder, &tokens, 8, *adapter)).collect();
    assert_eq!(alone[0], alone[1], "an adapter of zeros adds nothing");
    let last = |logits: &[f32]| logits[7 * vocab..].to_vec();
    let (base, other) = (last(&alone[0]), last(&alone[2]));
    let furthest = base.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    println!("a random adapter of rank 32 moves logits by up to {furthest:.2}");
    assert!(furthest > 0.1 && furthest < 50.0 && other.iter().all(|logit| logit.is_finite()), "{furthest}");
    let together =
        step(&mut decoder, &[(0, 0, &tokens, None), (1, 0, &tokens, Some(&zero)), (2, 0, &tokens, Some(&small))]);
    assert_eq!(together, alone);
}
