//! The tokenizer against ids from an independent implementation (`scripts/tokenizer_goldens.py`).

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::Detokenizer;
use crate::model::tests_support::{GgufFile, demo_model};

const BPE: &str = include_str!("../goldens/bpe.json");
const SPM: &str = include_str!("../goldens/spm.json");
const TOKENS: &str = include_str!("../goldens/tokens.json");

/// `(text, ids)` under a rule.
fn goldens(rule: &str) -> Vec<(String, Vec<u32>)> {
    let all: Value = serde_json::from_str(TOKENS).unwrap();
    let texts: Vec<String> = serde_json::from_value(all["texts"].clone()).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(all[rule].clone()).unwrap();
    assert!(texts.len() > 40 && texts.len() == ids.len());
    texts.into_iter().zip(ids).collect()
}

/// Tokens in order of id, and merges, of a tokenizer.json.
fn vocabulary(file: &str) -> (Vec<String>, Vec<(String, String)>) {
    let file: Value = serde_json::from_str(file).unwrap();
    let mut tokens: Vec<(u64, String)> = file["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (id.as_u64().unwrap(), token.clone()))
        .collect();
    tokens.sort_unstable();
    (
        tokens.into_iter().map(|(_, token)| token).collect(),
        serde_json::from_value(file["model"]["merges"].clone()).unwrap(),
    )
}

/// `<|endoftext|>`, but not the ordinary token `<|`.
fn is_marker(token: &str) -> bool {
    token.len() > 4 && token.starts_with("<|") && token.ends_with("|>")
}

fn bpe_file(rule: &str) -> GgufFile {
    let (tokens, merges) = vocabulary(BPE);
    let kinds = tokens.iter().map(|token| if is_marker(token) { CONTROL } else { NORMAL });
    GgufFile::new()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", rule)
        .i32s("tokenizer.ggml.token_type", kinds)
        .texts("tokenizer.ggml.merges", merges.iter().map(|(left, right)| format!("{left} {right}")))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .texts("tokenizer.ggml.tokens", tokens)
}

fn spm_file() -> GgufFile {
    let (tokens, merges) = vocabulary(SPM);
    let rank = |token: &str| merges.iter().position(|(left, right)| token == format!("{left}{right}"));
    let scores: Vec<f32> = tokens.iter().map(|token| rank(token).map_or(-1e9, |rank| -(rank as f32))).collect();
    let kinds = tokens.iter().map(|token| match token.as_str() {
        "<unk>" => UNKNOWN,
        "<s>" | "</s>" => CONTROL,
        token if token.starts_with("<0x") => BYTE,
        _ => NORMAL,
    });
    GgufFile::new()
        .text("tokenizer.ggml.model", "llama")
        .i32s("tokenizer.ggml.token_type", kinds)
        .f32s("tokenizer.ggml.scores", scores)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0)
        .texts("tokenizer.ggml.tokens", tokens)
}

fn open_gguf(file: GgufFile) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::read(&ModelFiles::open(&file.write(folder.path())).unwrap())
}

fn open_folder(tokenizer: &str, settings: Value, generation: Value) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("config.json", "{}".to_owned());
    write("tokenizer.json", tokenizer.to_owned());
    write("tokenizer_config.json", settings.to_string());
    write("generation_config.json", generation.to_string());
    Tokenizer::read(&ModelFiles::open(folder.path()).unwrap())
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    let mut ids = Vec::new();
    tokenizer.encode(text, special, &mut ids).unwrap();
    ids
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer.vocabulary()));
    let mut text = String::new();
    ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
    detokenizer.finish(&mut text);
    text
}

fn check_goldens(tokenizer: &Tokenizer, rule: &str) {
    for (text, ids) in goldens(rule) {
        let ours = encode(tokenizer, &text, true);
        assert_eq!(
            ours,
            ids,
            "{rule}: {text:?}\n ours {:?}\n  not {:?}",
            pieces(tokenizer, &ours),
            pieces(tokenizer, &ids)
        );
    }
}

fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.vocabulary().piece(id)).into_owned()).collect()
}

#[test]
fn byte_level_tokens_are_those_of_the_independent_implementation() {
    for rule in ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "falcon", "default"] {
        check_goldens(&open_gguf(bpe_file(rule)).unwrap(), rule);
    }
}

#[test]
fn sentence_piece_tokens_are_those_of_the_independent_implementation() {
    check_goldens(&open_gguf(spm_file()).unwrap(), "spm");
}

#[test]
fn a_tokenizer_json_gives_the_same_tokens() {
    let eos = json!({"eos_token_id": 2});
    check_goldens(&open_folder(BPE, json!({}), eos.clone()).unwrap(), "llama-bpe");
    check_goldens(&open_folder(SPM, json!({}), eos).unwrap(), "spm");
}

#[test]
fn the_demo_models_tokens_are_those_of_the_independent_implementation() {
    let Some(path) = demo_model() else { return };
    let tokenizer = Tokenizer::read(&ModelFiles::open(&path).unwrap()).unwrap();
    check_goldens(&tokenizer, "demo");
    assert_eq!(tokenizer.vocabulary().end_tokens(), [0, 2]);
    assert_eq!((tokenizer.begin(), tokenizer.control("<|im_start|>")), (None, Some(1)));
    for (text, _) in goldens("demo").into_iter().filter(|(text, _)| !text.contains(['\u{4}', '\u{13}'])) {
        assert_eq!(decode(&tokenizer, &encode(&tokenizer, &text, false)), text);
    }
}

#[test]
fn control_tokens_in_text_are_text_unless_asked_for() {
    let eos = json!({"eos_token_id": 2});
    for tokenizer in [open_gguf(bpe_file("llama-bpe")).unwrap(), open_folder(BPE, json!({}), eos).unwrap()] {
        let text = "a<|im_end|>b";
        let special = encode(&tokenizer, text, true);
        assert_eq!((special.len(), special[1]), (3, 2));
        assert_eq!(decode(&tokenizer, &special), "ab");
        let plain = encode(&tokenizer, text, false);
        assert!(!plain.contains(&2));
        assert_eq!(decode(&tokenizer, &plain), text);
    }
}

#[test]
fn user_defined_tokens_are_never_split_and_always_printed() {
    let (mut tokens, merges) = vocabulary(BPE);
    tokens.push("<tool>".to_owned());
    let kinds = |token: &String| match token.as_str() {
        "<tool>" => USER_DEFINED,
        token if is_marker(token) => CONTROL,
        _ => NORMAL,
    };
    let id = tokens.len() as u32 - 1;
    let file = GgufFile::new()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .i32s("tokenizer.ggml.token_type", tokens.iter().map(kinds))
        .texts("tokenizer.ggml.merges", merges.iter().map(|(left, right)| format!("{left} {right}")))
        .texts("tokenizer.ggml.tokens", &tokens);
    let tokenizer = open_gguf(file).unwrap();
    let ids = encode(&tokenizer, "x<tool><|im_end|>", false);
    assert_eq!(ids[1], id);
    assert_eq!(decode(&tokenizer, &ids), "x<tool><|im_end|>");
}

#[test]
fn the_first_token_and_the_last_ones_are_found() {
    let bpe = |file: GgufFile| open_gguf(file).unwrap();
    assert_eq!(bpe(bpe_file("gpt-2")).begin(), None);
    assert_eq!(bpe(bpe_file("llama-bpe")).begin(), Some(1));
    assert_eq!(bpe(bpe_file("llama-bpe").flag("tokenizer.ggml.add_bos_token", false)).begin(), None);
    assert_eq!(bpe(spm_file()).begin(), Some(1));
    assert_eq!(bpe(bpe_file("gpt-2").u32("tokenizer.ggml.eot_token_id", 5)).vocabulary().end_tokens(), [0, 2, 5]);
    let names = bpe(spm_file()).names().to_vec();
    let named = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
    assert_eq!(names, named.map(|(name, text)| (name, text.to_owned())));

    let folder = |file, settings, generation| open_folder(file, settings, generation).unwrap();
    assert_eq!(folder(SPM, json!({}), json!({})).begin(), Some(1));
    let both =
        folder(SPM, json!({"add_bos_token": false, "eos_token": {"content": "a"}}), json!({"eos_token_id": [7]}));
    assert_eq!(both.begin(), None);
    assert_eq!(both.vocabulary().end_tokens().len(), 3);
    assert!(both.vocabulary().is_end(2) && both.vocabulary().is_end(7));
}

#[test]
fn tokenizers_that_make_no_sense_are_named() {
    let check = |file: GgufFile, words: &str| {
        let error = open_gguf(file).map(|_| ()).unwrap_err();
        assert!(error.message().contains(words), "{error} / {words}");
    };
    check(GgufFile::new(), "tokenizer.ggml.model is missing");
    check(GgufFile::new().text("tokenizer.ggml.model", "bert"), "\"bert\" is not supported yet");
    check(GgufFile::new().text("tokenizer.ggml.model", "gpt2"), "tokenizer.ggml.tokens is missing");
    let tokens = || GgufFile::new().text("tokenizer.ggml.model", "gpt2").texts("tokenizer.ggml.tokens", ["a", "b"]);
    check(tokens(), "no token that ends");
    check(tokens().i32s("tokenizer.ggml.token_type", [1]), "2 tokens, but 1 token types");
    check(tokens().u32("tokenizer.ggml.eos_token_id", 9), "no token that ends");
    check(tokens().u32("tokenizer.ggml.eos_token_id", 1), "merges is missing");
    check(bpe_file("klingon"), "klingon");
    let error = open_folder("{", json!({}), json!({})).map(|_| ()).unwrap_err();
    assert!(error.message().contains("tokenizer.json"), "{error}");
}

static BYTE_LEVEL: LazyLock<Tokenizer> = LazyLock::new(|| open_gguf(bpe_file("llama-bpe")).unwrap());
static BYTE_LEVEL_JSON: LazyLock<Tokenizer> =
    LazyLock::new(|| open_folder(BPE, json!({}), json!({"eos_token_id": 2})).unwrap());
static SENTENCE_PIECE: LazyLock<Tokenizer> =
    LazyLock::new(|| open_gguf(spm_file().flag("tokenizer.ggml.add_space_prefix", false)).unwrap());

proptest! {
    #[test]
    fn any_text_comes_back_as_it_went_in(text in "(?s).{0,80}", plain in "[a-zA-Z ,.'\n]{0,80}") {
        for text in [text, plain] {
            // The small vocabulary has all 256 bytes.
            prop_assert_eq!(&decode(&BYTE_LEVEL, &encode(&BYTE_LEVEL, &text, false)), &text);
            let spaced = text.replace('\u{2581}', " ");
            prop_assert_eq!(decode(&SENTENCE_PIECE, &encode(&SENTENCE_PIECE, &text, false)), spaced);
        }
    }

    #[test]
    fn both_implementations_agree_on_any_text(text in "(?s).{0,60}", spaced in "[ \n\ta-zA-Z0-9'.]{0,60}") {
        for text in [text, spaced] {
            prop_assert_eq!(encode(&BYTE_LEVEL, &text, true), encode(&BYTE_LEVEL_JSON, &text, true), "{:?}", text);
        }
    }
}
