//! Encoders and their tokenizers against goldens that an independent reference wrote (`scripts/encoder_goldens.py`: numpy,
//! f64 arithmetic).
//!
//!     tests/goldens/*.json ── texts, tokens, vectors, logits ──> Precision::Plain agrees to 1e-5,
//!                                                                Precision::Fast to a cosine of 0.9999
//!
//! The real model is looked for in `$NEUROND_TEST_MODELS`, `target/test-models` and `models/`; without it its test says
//! "skipped: no weights". The tiny models are committed and always run.

use std::path::Path;
use std::sync::Arc;

use neurond::config::Precision;
use neurond::kernel::{Isa, Pool};
use neurond::model::encoder::{EncodeBatch, Encoder, EncoderOptions, EncoderText, Tokens};
use neurond::model::files::ModelFiles;
use neurond::model::weights::Weights;
use neurond::task::{Passage, Pooling};
use serde::Deserialize;

use crate::{fetched, golden, tiny};

/// What a vector must reach against the reference's, for whoever compares distances with another implementation.
const COSINE: f64 = 0.9999;

#[derive(Deserialize)]
struct Golden {
    /// Longest sequence; longer ones were cut.
    most: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    pair: Option<String>,
    ids: Vec<u32>,
    second: u32,
    mean: Option<Vec<f32>>,
    cls: Option<Vec<f32>>,
    logits: Option<Vec<f32>>,
}

impl Case {
    fn passage(&self) -> Passage {
        match &self.pair {
            Some(second) => Passage::Pair(self.text.clone(), second.clone()),
            None => Passage::Text(self.text.clone()),
        }
    }
}

fn open(folder: &Path, precision: Precision, isa: Isa, threads: usize, max_rows: usize) -> Encoder {
    let weights = Weights::open(folder).unwrap();
    let spec = weights.encoder().unwrap();
    let options = EncoderOptions { pool: Arc::new(Pool::new(threads)), isa, precision, max_rows };
    Encoder::open(&weights, spec, &options, &|_| ()).unwrap()
}

fn tokens(text: &EncoderText, golden: &Golden) -> Vec<Tokens> {
    golden.cases.iter().map(|case| text.tokens(&case.passage(), golden.most, true).unwrap()).collect()
}

fn encode(encoder: &mut Encoder, texts: &[Tokens], pooling: Pooling) -> Vec<f32> {
    let mut batch = EncodeBatch::default();
    texts.iter().for_each(|text| batch.push(text, pooling));
    encoder.forward(&batch).unwrap().to_vec()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Tokens, vectors and logits of a folder are the golden's, on these instruction sets, in any precision.
fn check(folder: &Path, golden: &Golden, sets: &[Isa]) {
    let text = EncoderText::of(&ModelFiles::open(folder).unwrap()).unwrap();
    let texts = tokens(&text, golden);
    for (case, tokens) in golden.cases.iter().zip(&texts) {
        assert_eq!((&tokens.ids, tokens.second), (&case.ids, case.second), "{:?}", case.text);
    }
    for &isa in sets {
        for precision in [Precision::Plain, Precision::Fast] {
            let mut encoder = open(folder, precision, isa, 2, 2048);
            let mut worst: f64 = 1.0;
            for pooling in [Pooling::Mean, Pooling::Cls] {
                let got = encode(&mut encoder, &texts, pooling);
                for (case, got) in golden.cases.iter().zip(got.chunks_exact(encoder.spec().width())) {
                    let (what, plain) = (format!("{isa} {precision:?} {:?}", case.text), precision == Precision::Plain);
                    if let Some(logits) = &case.logits {
                        for (got, expected) in got.iter().zip(logits) {
                            let tolerance = if plain { 2e-5 } else { 2e-2 };
                            assert!((got - expected).abs() < tolerance, "{what}: {got} {expected}");
                        }
                        continue;
                    }
                    let expected = if pooling == Pooling::Mean { &case.mean } else { &case.cls };
                    let expected = expected.as_deref().unwrap();
                    let length = got.iter().map(|x| x * x).sum::<f32>();
                    assert!((length - 1.0).abs() < 1e-5, "{what}: length {length}");
                    worst = worst.min(cosine(got, expected));
                    if plain {
                        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(off < 1e-5, "{what}: off by {off}");
                    }
                }
            }
            assert!(worst >= COSINE, "{isa} {precision:?}: cosine {worst}");
            eprintln!("{}: {isa} {precision:?}: cosine at least {worst:.7}", folder.display());
        }
    }
}

fn check_tiny(name: &str) {
    let folder = tiny(name);
    check(&folder, &golden(&format!("{name}/golden.json")), Isa::available());
}

#[test]
fn bert_gives_the_references_vectors() {
    check_tiny("tiny-bert");
}

#[test]
fn a_cross_encoder_tells_the_two_texts_apart() {
    check_tiny("tiny-cross-encoder");
}

#[test]
fn xlm_roberta_counts_positions_from_behind_the_padding() {
    check_tiny("tiny-reranker");
}

#[test]
fn distilbert_has_no_segments_and_a_head_of_its_own() {
    check_tiny("tiny-sentiment");
}

#[test]
fn the_real_model_gives_the_references_vectors() {
    let Some(weights) = fetched("all-MiniLM-L6-v2/model.safetensors") else { return };
    // The portable one takes a minute without optimisation; the tiny models show that sets agree.
    check(weights.parent().unwrap(), &golden("all-minilm-l6-v2.json"), &[Isa::detect()]);
}

#[test]
fn a_text_has_the_same_bits_alone_in_company_and_on_any_number_of_threads() {
    let folder = tiny("tiny-bert");
    let golden: Golden = golden("tiny-bert/golden.json");
    let text = EncoderText::of(&ModelFiles::open(&folder).unwrap()).unwrap();
    let texts = tokens(&text, &golden);
    // 40 times 5 texts: many blocks of rows, cut anywhere.
    let many: Vec<Tokens> = (0..40).flat_map(|_| texts.clone()).collect();
    for &isa in Isa::available() {
        let mut one = open(&folder, Precision::Fast, isa, 1, 128);
        let alone: Vec<Vec<f32>> =
            texts.iter().map(|text| encode(&mut one, std::slice::from_ref(text), Pooling::Mean)).collect();
        for threads in [1, 2, 5] {
            let mut encoder = open(&folder, Precision::Fast, isa, threads, 4096);
            let all = encode(&mut encoder, &many, Pooling::Mean);
            for (at, got) in all.chunks_exact(encoder.spec().width()).enumerate() {
                assert_eq!(got, alone[at % texts.len()], "{isa} {threads} threads, text {at}");
            }
        }
    }
}

#[test]
fn what_is_too_long_is_refused_unless_it_may_be_cut() {
    let text = EncoderText::of(&ModelFiles::open(&tiny("tiny-bert")).unwrap()).unwrap();
    let check = |passage: &Passage, most: usize, expected: Result<usize, &str>| {
        let got = text.tokens(passage, most, false);
        match (got, expected) {
            (Ok(tokens), Ok(length)) => assert_eq!(tokens.ids.len(), length, "{passage:?}"),
            (Err(error), Err(words)) => {
                assert!(error.message().contains(words), "{error}");
                assert!(text.tokens(passage, most, true).unwrap().ids.len() <= most);
            }
            (got, expected) => panic!("{passage:?}: {got:?}, not {expected:?}"),
        }
    };
    let words = |count: usize| "tug ".repeat(count);
    check(&Passage::Text(words(14)), 16, Ok(16));
    check(
        &Passage::Text(words(15)),
        16,
        Err("maximum output tokens (17) exceeded this model context window limit (16)"),
    );
    // A book is not read to its end.
    check(&Passage::Text(words(1_000_000)), 16, Err("tokens (1000"));
    check(&Passage::Pair(words(6), words(7)), 16, Ok(16));
    check(&Passage::Pair(words(7), words(7)), 16, Err("limit (16)"));
    check(&Passage::Tokens(vec![5; 14]), 16, Ok(16));
    check(&Passage::Tokens(vec![5; 15]), 16, Err("limit (16)"));
    // Tokens that have their marks already do not get them twice.
    let whole = text.tokens(&Passage::Text(words(3)), 16, false).unwrap();
    assert_eq!(text.tokens(&Passage::Tokens(whole.ids.clone()), 16, false).unwrap(), whole);
    let error = text.tokens(&Passage::Tokens(vec![5, 40_000]), 16, false).unwrap_err();
    assert!(error.message().contains("Token 40000 is outside the vocabulary"), "{error}");
}
