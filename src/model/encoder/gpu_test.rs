//! The encoder of a GPU, run by the emulator, against that of the CPU in plain arithmetic.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::base::Kind;
use crate::config::Precision;
use crate::kernel::gpu::EmulatedCard;
use crate::kernel::testing::Dice;
use crate::kernel::{Dtype, Isa, Pool};
use crate::model::encoder::{Encoder, EncoderOptions, Tokens};
use crate::model::tests_support::{SafeTensor, safetensors};

const VOCAB: usize = 90;
const POSITIONS: usize = 150;

/// An encoder of two layers and random weights.
#[derive(Clone, Copy)]
struct Tiny {
    architecture: &'static str,
    hidden: usize,
    heads: usize,
    ffn: usize,
    activation: &'static str,
    /// Of a head; 0: there is none.
    labels: usize,
    dtype: Dtype,
}

/// Heads of 32, two segments, weights that bf16 rounds.
const BERT: Tiny = Tiny {
    architecture: "BertModel",
    hidden: 96,
    heads: 3,
    ffn: 160,
    activation: "gelu",
    labels: 0,
    dtype: Dtype::F32,
};

const BERT_LAYER: [&str; 8] = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "attention.output.LayerNorm",
    "output.LayerNorm",
];
const DISTIL_LAYER: [&str; 8] = [
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
    "sa_layer_norm",
    "output_layer_norm",
];

impl Tiny {
    /// Its folder, read.
    fn weights(&self) -> Weights {
        let Self { architecture, hidden, heads, ffn, activation, labels, dtype } = *self;
        let (distil, roberta) = (architecture.starts_with("Distil"), architecture.contains("Roberta"));
        let segments = if roberta { 1 } else { 2 };
        let config = json!({
            "architectures": [architecture], "vocab_size": VOCAB, "max_position_embeddings": POSITIONS,
            "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn, "num_hidden_layers": 2,
            "dim": hidden, "n_heads": heads, "hidden_dim": ffn, "n_layers": 2,
            "hidden_act": activation, "activation": activation, "type_vocab_size": segments, "pad_token_id": 1,
            "num_labels": labels,
        });
        let mut dice = Dice::new(5);
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        let mut put = |name: String, shape: &[usize], centre: f32, spread: f32| {
            let values = (0..shape.iter().product::<usize>()).map(|_| centre + spread * dice.value()).collect();
            tensors.push((name, shape.to_vec(), values));
        };
        put("embeddings.word_embeddings.weight".into(), &[VOCAB, hidden], 0.0, 1.0);
        put("embeddings.position_embeddings.weight".into(), &[POSITIONS, hidden], 0.0, 0.5);
        if !distil {
            put("embeddings.token_type_embeddings.weight".into(), &[segments, hidden], 0.0, 0.5);
        }
        let (layers, parts) = if distil { ("transformer.layer", DISTIL_LAYER) } else { ("encoder.layer", BERT_LAYER) };
        let name = |layer: usize, part: usize| format!("{layers}.{layer}.{}", parts[part]);
        let mut norms = vec!["embeddings.LayerNorm".to_owned()];
        let mut matrices = Vec::new();
        for layer in 0..2 {
            matrices.extend((0..4).map(|part| (name(layer, part), hidden, hidden)));
            matrices.extend([(name(layer, 4), ffn, hidden), (name(layer, 5), hidden, ffn)]);
            norms.extend([name(layer, 6), name(layer, 7)]);
        }
        if labels > 0 {
            let (dense, out) = match (distil, roberta) {
                (true, _) => ("pre_classifier", "classifier"),
                (_, true) => ("classifier.dense", "classifier.out_proj"),
                _ => ("pooler.dense", "classifier"),
            };
            matrices.extend([(dense.to_owned(), hidden, hidden), (out.to_owned(), labels, hidden)]);
        }
        for norm in norms {
            put(format!("{norm}.weight"), &[hidden], 1.0, 0.2);
            put(format!("{norm}.bias"), &[hidden], 0.0, 0.2);
        }
        for (matrix, n, k) in matrices {
            put(format!("{matrix}.weight"), &[n, k], 0.0, 1.7 / (k as f32).sqrt());
            put(format!("{matrix}.bias"), &[n], 0.0, 0.5);
        }
        let bytes = |values: &[f32]| -> Vec<u8> {
            match dtype {
                Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            }
        };
        let kind = if dtype == Dtype::BF16 { "BF16" } else { "F32" };
        let tensors: Vec<SafeTensor<'_>> =
            tensors.iter().map(|(name, shape, values)| (name.as_str(), kind, shape.clone(), bytes(values))).collect();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
        Weights::open(folder.path()).unwrap()
    }
}

/// Texts of these lengths, of which some are pairs.
fn texts(lengths: &[usize], seed: u64) -> Vec<Tokens> {
    let mut dice = Dice::new(seed);
    let text = |&length: &usize| Tokens {
        ids: (0..length).map(|_| (dice.bits() % VOCAB as u64) as u32).collect(),
        second: (length - length / 3) as u32,
    };
    lengths.iter().map(text).collect()
}

fn batch(texts: &[Tokens], first: Pooling, second: Pooling) -> EncodeBatch {
    let mut batch = EncodeBatch::default();
    texts.iter().zip([first, second].into_iter().cycle()).for_each(|(text, pooling)| batch.push(text, pooling));
    batch
}

/// Both compute the same steps: vectors point the same way, and logits are as large.
fn follow(card: Box<dyn Card>, tiny: &Tiny) {
    let weights = tiny.weights();
    let spec = weights.encoder().unwrap();
    let mut gpu = GpuEncoder::open(card, &weights, spec.clone(), 64).unwrap();
    assert_eq!(gpu.limits().0, POSITIONS.next_multiple_of(LARGE_UNIT), "one text fits, however long");
    let options =
        EncoderOptions { pool: Arc::new(Pool::new(2)), isa: Isa::detect(), precision: Precision::Plain, max_rows: 160 };
    let mut cpu = Encoder::open(&weights, spec, &options, &|_| ()).unwrap();
    // The longest; tiles that are full, and those that are not; a step with less than was there before.
    for (step, lengths) in [&[148][..], &[1, 64, 20, 65], &[3, 30]].into_iter().enumerate() {
        let texts = texts(lengths, step as u64);
        for (first, second) in [(Pooling::Mean, Pooling::Cls), (Pooling::Cls, Pooling::Mean)] {
            let batch = batch(&texts, first, second);
            let expected = cpu.forward(&batch).unwrap();
            let found = gpu.forward(&batch).unwrap();
            assert_eq!(found.len(), expected.len());
            let width = found.len() / texts.len();
            for (at, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
                let what = format!("{}, step {step}, text {at}", tiny.architecture);
                if tiny.labels > 0 {
                    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(off < 0.03, "{what}: {found:?} is not {expected:?}");
                    continue;
                }
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                assert!((dot(found, found) - 1.0).abs() < 1e-5, "{what}: its length");
                let cosine = dot(found, expected);
                assert!(cosine > 0.9995, "{what}: a cosine of {cosine}");
            }
        }
    }
}

/// Heads of all widths, each activation, every architecture and its head.
fn kinds() -> [Tiny; 6] {
    let large = Tiny { hidden: 128, heads: 2, dtype: Dtype::BF16, ..BERT };
    [
        BERT,
        Tiny { architecture: "RobertaModel", heads: 1, activation: "gelu_new", ..large },
        Tiny { architecture: "DistilBertModel", ffn: 320, activation: "relu", ..large },
        Tiny { architecture: "BertForSequenceClassification", labels: 1, ..BERT },
        Tiny { architecture: "XLMRobertaForSequenceClassification", labels: 1, ..large },
        Tiny { architecture: "DistilBertForSequenceClassification", labels: 11, ..large },
    ]
}

#[test]
fn it_computes_what_the_cpu_does() {
    kinds().iter().for_each(|tiny| follow(Box::new(EmulatedCard::new(2)), tiny));
}

/// Says so where there is no GPU: a machine that has one runs the same steps on it.
#[cfg(feature = "cuda")]
#[test]
fn a_real_card_encodes_the_same() {
    use crate::kernel::gpu::{count, open};
    match count(&[""]) {
        Err(error) => {
            assert_eq!(error.kind(), Kind::ModelUnavailable);
            eprintln!("not run: {error}");
        }
        Ok(_) => kinds().iter().for_each(|tiny| follow(open(0).unwrap(), tiny)),
    }
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let open = |tiny: Tiny| {
        let weights = tiny.weights();
        GpuEncoder::open(Box::new(EmulatedCard::default()), &weights, weights.encoder().unwrap(), 64)
    };
    for (tiny, words) in
        [(Tiny { heads: 6, ..BERT }, "6 heads of 16"), (Tiny { ffn: 100, ..BERT }, "a feed-forward of 100")]
    {
        let error = open(tiny).err().unwrap();
        assert!(error.kind() == Kind::Unsupported && error.message().contains(words), "{error}");
    }
    let mut gpu = open(BERT).unwrap();
    for (texts, words) in [
        (vec![], "0 texts"),
        (texts(&[100, 93], 0), "193 rows of 192"),
        (texts(&[151], 0), "a text of 151 tokens, of 150"),
        (vec![Tokens { ids: vec![VOCAB as u32], second: 1 }], "token 90 of 90"),
    ] {
        let error = gpu.forward(&batch(&texts, Pooling::Mean, Pooling::Mean)).unwrap_err();
        assert!(error.message().contains(words), "{error}");
    }
}
