//! Descriptions out of both kinds of files, and what is wrong with those that cannot be computed.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::config::{KvType, Precision};
use crate::kernel::{Dtype, Isa, Pool};
use crate::model::tests_support::GgufFile;
use crate::model::weights::Weights;
use crate::model::{Batch, Decoder, DecoderOptions};

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    })
}

fn read(config: Value) -> Result<DecoderSpec> {
    DecoderSpec::read(&ModelFiles::Folder { path: "m".into(), config })
}

fn with(changes: Value) -> Value {
    let mut config = llama_config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn llama_3_1_reads_as_it_is() {
    let spec = read(llama_config()).unwrap();
    assert_eq!((spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim), (4096, 32, 32, 8, 128));
    assert_eq!((spec.q_width(), spec.kv_width(), spec.ffn, spec.vocab), (4096, 1024, 14336, 128256));
    assert_eq!((spec.context, spec.qkv_bias, spec.tied_head), (131_072, false, false));
    assert_eq!(spec.rope.style, RopeStyle::Halves);
    let names: Vec<_> = spec.tensors().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), 3 + 32 * 9);
    assert!(names.contains(&"blk.31.ffn_down.weight".to_owned()) && names.contains(&"output.weight".to_owned()));
}

#[test]
fn llama_3_1_keeps_short_waves_and_stretches_long_ones() {
    let rope = read(llama_config()).unwrap().rope;
    let plain = Rope { scaling: RopeScaling::None, ..rope.clone() }.frequencies(128);
    let scaled = rope.frequencies(128);
    // Worked out with the formula of the Llama 3.1 paper's code for these sizes: lambda = 2 pi / frequency,
    // short below 2048, long above 8192.
    for (i, (&plain, &scaled)) in plain.iter().zip(&scaled).enumerate() {
        let wavelength = std::f32::consts::TAU / plain;
        let ratio = plain / scaled;
        match wavelength {
            w if w < 2048.0 => assert_eq!(ratio, 1.0, "{i}"),
            w if w > 8192.0 => assert!((ratio - 8.0).abs() < 1e-5, "{i}: {ratio}"),
            w => {
                let smooth = (8192.0 / w - 1.0) / 3.0;
                let expected = plain * ((1.0 - smooth) / 8.0 + smooth);
                assert!((scaled / expected - 1.0).abs() < 1e-5, "{i}");
            }
        }
    }
    assert_eq!(plain[0], 1.0);
    assert!((plain[32] / 500_000f32.powf(-0.5) - 1.0).abs() < 1e-6);
}

#[test]
fn the_familys_other_members_differ_where_they_should() {
    let newer = read(with(json!({"rope_theta": null, "rope_scaling": null,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "head_dim": 64})))
    .unwrap();
    assert_eq!((newer.rope.theta, newer.head_dim), (7.0, 64));
    assert_eq!(newer.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

/// Tokens of the window, and 1 for each layer that has it.
fn windows(spec: &DecoderSpec) -> (u32, String) {
    let window = spec.window.as_ref().unwrap();
    (window.tokens, window.layers.iter().map(|&has| if has { '1' } else { '0' }).collect())
}

#[test]
fn a_window_is_of_the_layers_that_a_file_names_or_its_family_has() {
    let of = |family: &str, changes: Value| {
        let mut config = with(json!({"architectures": [format!("{family}ForCausalLM")], "num_hidden_layers": 4}));
        changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        read(config).unwrap()
    };
    let mistral = of("Mistral", json!({"sliding_window": 4096}));
    assert_eq!((windows(&mistral), mistral.context), ((4096, "1111".into()), 131_072));
    assert_eq!((mistral.window_of(3), mistral.window_rope()), (Some(4096), &mistral.rope));
    for (family, changes) in [
        ("Mistral", json!({"sliding_window": null})),
        ("Mistral", json!({"sliding_window": 131_072})),
        ("Llama", json!({"sliding_window": 4096, "use_sliding_window": true})),
        ("Qwen2", json!({"sliding_window": 4096})),
        ("Qwen2", json!({"sliding_window": 4096, "use_sliding_window": true})),
        (
            "Qwen3",
            json!({"sliding_window": 4096, "use_sliding_window": true, "layer_types": vec!["full_attention"; 4]}),
        ),
    ] {
        let spec = of(family, changes.clone());
        assert_eq!((spec.window, spec.qkv_bias), (None, family == "Qwen2"), "{family} {changes}");
    }
    let qwen = json!({"sliding_window": 4096, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows(&of("Qwen2", qwen)), (4096, "0001".into()));
    let named = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
    assert_eq!(windows(&of("Mistral", json!({"sliding_window": 512, "layer_types": named}))), (512, "0101".into()));
}

/// The files of Gemma 3 4B, as they were published and as newer tools write them.
#[test]
fn gemma_3_reads_with_what_its_files_leave_out() {
    let text = json!({"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024});
    let spec = read(json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": text, "vision_config": {"hidden_size": 1152}}))
    .unwrap();
    assert_eq!((spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim), (2560, 34, 8, 4, 256));
    assert_eq!((spec.vocab, spec.ffn, spec.context, spec.tied_head), (262_208, 10240, 131_072, true));
    assert_eq!((spec.norm_eps, spec.norm_offset, spec.post_norms, spec.qk_norm), (1e-6, 1.0, true, true));
    // 50.596 has no nearer bf16.
    assert_eq!((spec.score_scale, spec.embedding_scale, spec.gate), (1.0 / 16.0, 50.5, Gate::Gelu));
    assert_eq!((spec.rope.theta, &spec.rope.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!(windows(&spec), (1024, "1111101111101111101111101111101111".into()));
    assert_eq!(*spec.window_rope(), Rope { theta: 1e4, style: RopeStyle::Halves, scaling: RopeScaling::None });
    let names: Vec<_> = spec.tensors().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), 2 + 34 * 13);
    assert!(names.contains(&"blk.33.post_ffw_norm.weight".to_owned()));

    let newer = json!({"architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "num_hidden_layers": 3,
        "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 64,
        "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}});
    let spec = read(newer.clone()).unwrap();
    assert_eq!((windows(&spec), spec.score_scale), ((512, "101".into()), 0.125));
    assert_eq!((spec.rope.theta, &spec.rope.scaling), (5e5, &RopeScaling::Linear { factor: 2.0 }));
    assert_eq!((spec.window_rope().theta, &spec.window_rope().scaling), (2e4, &RopeScaling::None));
    let mut capped = newer;
    capped["final_logit_softcapping"] = json!(30.0);
    assert!(read(capped).unwrap_err().message().contains("final_logit_softcapping is not supported"));
}

#[test]
fn what_cannot_be_computed_is_named() {
    let check = |changes: Value, words: &str| {
        let error = read(with(changes)).unwrap_err();
        assert!(error.message().contains(words), "{error} / {words}");
    };
    check(json!({"architectures": ["Gemma2ForCausalLM"]}), "Gemma2ForCausalLM is not supported yet");
    check(
        json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": ["linear_attention"]}),
        "linear_attention",
    );
    check(
        json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
        "in 2 of 32 layers",
    );
    check(json!({"hidden_size": null}), "hidden_size is missing");
    check(json!({"hidden_size": "big"}), "hidden_size is \"big\"");
    check(json!({"hidden_size": 0}), "hidden size is 0");
    check(json!({"num_hidden_layers": -1}), "num_hidden_layers");
    check(json!({"num_key_value_heads": 5}), "32 heads cannot share 5");
    check(json!({"head_dim": 63}), "odd");
    check(json!({"rms_norm_eps": 0}), "epsilon");
    check(json!({"rope_theta": 0}), "rope base is 0");
    check(json!({"rope_scaling": {"rope_type": "yarn", "factor": 2}}), "\"yarn\"");
    check(json!({"rope_scaling": {"type": "linear"}}), "factor is missing");
    check(json!({"hidden_act": "gelu"}), "gelu");
    check(json!({"quantization_config": {}}), "use a GGUF file");
}

fn gguf_llama() -> GgufFile {
    GgufFile::new()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .u32("llama.context_length", 128)
        .u32("llama.embedding_length", 64)
        .u32("llama.feed_forward_length", 96)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .tensor("token_embd.weight", Dtype::Q4_0, &[64, 10], vec![0; 360])
}

fn read_gguf(file: GgufFile) -> Result<DecoderSpec> {
    let folder = tempfile::tempdir().unwrap();
    DecoderSpec::read(&ModelFiles::open(&file.write(folder.path())).unwrap())
}

#[test]
fn gguf_keys_read_as_the_same_description() {
    let spec = read_gguf(gguf_llama()).unwrap();
    assert_eq!((spec.vocab, spec.hidden, spec.layers, spec.heads, spec.kv_heads), (10, 64, 2, 4, 2));
    assert_eq!((spec.head_dim, spec.ffn, spec.context, spec.tied_head), (16, 96, 128, true));
    assert_eq!(spec.rope, Rope { theta: 1e4, style: RopeStyle::Interleaved, scaling: RopeScaling::None });
    let linear = gguf_llama().text("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4.0);
    assert_eq!(read_gguf(linear).unwrap().rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let factors: Vec<u8> = (1..=8).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let rope = read_gguf(gguf_llama().tensor("rope_freqs.weight", Dtype::F32, &[8], factors)).unwrap().rope;
    assert_eq!(rope.frequencies(16)[1], (1e4f64.powf(-0.125) / 2.0) as f32);
}

#[test]
fn gguf_files_say_what_a_window_is() {
    let spec = read_gguf(gguf_llama().u32("llama.attention.sliding_window", 32)).unwrap();
    assert_eq!((windows(&spec), spec.window_of(0), spec.norm_offset), ((32, "11".into()), Some(32), 0.0));
    let gemma = |layers: u32| {
        GgufFile::new()
            .text("general.architecture", "gemma3")
            .u32("gemma3.block_count", layers)
            .u32("gemma3.context_length", 32768)
            .u32("gemma3.embedding_length", 64)
            .u32("gemma3.feed_forward_length", 96)
            .u32("gemma3.attention.head_count", 4)
            .u32("gemma3.attention.head_count_kv", 1)
            .u32("gemma3.attention.key_length", 256)
            .u32("gemma3.attention.sliding_window", 512)
            .f32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
            .f32("gemma3.rope.freq_base", 1e6)
            .tensor("token_embd.weight", Dtype::Q4_0, &[64, 10], vec![0; 360])
    };
    let spec = read_gguf(gemma(7)).unwrap();
    assert_eq!((windows(&spec), spec.rope.theta, spec.window_rope().theta), ((512, "1111101".into()), 1e6, 1e4));
    assert_eq!((spec.embedding_scale, spec.score_scale, spec.gate), (8.0, 1.0 / 16.0, Gate::Gelu));
    assert!(spec.post_norms && spec.qk_norm && spec.norm_offset == 0.0);
    assert_eq!(read_gguf(gemma(62)).unwrap().score_scale, 0.25);
    let capped = gemma(2).f32("gemma3.final_logit_softcapping", 30.0);
    assert!(read_gguf(capped).unwrap_err().message().contains("soft cap"));
}

#[test]
fn gguf_files_that_cannot_be_computed_are_named() {
    let check = |file: GgufFile, words: &str| {
        let error = read_gguf(file).unwrap_err();
        assert!(error.message().contains(words), "{error} / {words}");
    };
    check(GgufFile::new(), "general.architecture is missing");
    check(GgufFile::new().text("general.architecture", "gemma2"), "\"gemma2\" is not supported yet");
    check(GgufFile::new().text("general.architecture", "llama"), "llama.embedding_length is missing");
    check(gguf_llama().u32("llama.expert_count", 8), "experts");
    check(gguf_llama().u32("llama.attention.value_length", 8), "values of another width");
    check(gguf_llama().text("llama.rope.scaling.type", "yarn"), "yarn");
    let short = vec![0; 16];
    check(gguf_llama().tensor("rope_freqs.weight", Dtype::F32, &[4], short), "4 factors for heads of 16");
}

/// The same model as a folder and as a file, which has the 1 of its norms in them.
#[test]
fn a_gemma_3_computes_the_same_from_a_gguf_file() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-gemma3");
    let folder = Weights::open(&path).unwrap();
    let spec = folder.spec().unwrap();
    let (window, rope) = (spec.window.clone().unwrap(), spec.rope.clone());
    let RopeScaling::Linear { factor } = rope.scaling else { panic!("{rope:?}") };
    let mut file = GgufFile::new()
        .text("general.architecture", "gemma3")
        .u32("gemma3.block_count", spec.layers as u32)
        .u32("gemma3.context_length", spec.context)
        .u32("gemma3.embedding_length", spec.hidden as u32)
        .u32("gemma3.feed_forward_length", spec.ffn as u32)
        .u32("gemma3.attention.head_count", spec.heads as u32)
        .u32("gemma3.attention.head_count_kv", spec.kv_heads as u32)
        .u32("gemma3.attention.key_length", spec.head_dim as u32)
        .u32("gemma3.attention.value_length", spec.head_dim as u32)
        .u32("gemma3.attention.sliding_window", window.tokens)
        .u32("gemma3.attention.sliding_window_pattern", 3)
        .f32("gemma3.attention.layer_norm_rms_epsilon", spec.norm_eps)
        .f32("gemma3.rope.freq_base", rope.theta)
        .text("gemma3.rope.scaling.type", "linear")
        .f32("gemma3.rope.scaling.factor", factor);
    for (name, rows, cols) in spec.tensors() {
        let add = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let values = folder.tensor(&name).unwrap().to_f32().unwrap();
        let bytes = values.iter().flat_map(|value| (value + add).to_le_bytes()).collect();
        let shape = if rows == 1 { vec![cols as u64] } else { vec![cols as u64, rows as u64] };
        file = file.tensor(&name, Dtype::F32, &shape, bytes);
    }
    let temporary = tempfile::tempdir().unwrap();
    let file = Weights::open(&file.write(temporary.path())).unwrap();
    // Files have no key for what scores go by.
    let score_scale = spec.score_scale;
    let of_file = DecoderSpec { score_scale, ..file.spec().unwrap() };
    assert_eq!(of_file, DecoderSpec { norm_offset: 0.0, ..spec.clone() });
    let logits = |weights: &Weights, spec: DecoderSpec| {
        let mut options = DecoderOptions {
            pool: Arc::new(Pool::new(1)),
            isa: Isa::detect(),
            precision: Precision::Plain,
            kv: KvType::F32,
            kv_bytes: 0,
            block_tokens: 16,
            max_rows: 60,
            max_sample_rows: 60,
        };
        options.kv_bytes = options.kv_block_bytes(&spec) * 4;
        let words: Vec<u32> = (0..60).map(|at| at * 31 % spec.vocab as u32).collect();
        let mut batch = Batch::default();
        batch.push(&words, 0, &[2, 0, 3, 1], 0..60);
        Decoder::open(weights, spec, &options, &|_| ()).unwrap().forward(&batch).unwrap().0.to_vec()
    };
    assert!(logits(&file, of_file) == logits(&folder, spec));
}
