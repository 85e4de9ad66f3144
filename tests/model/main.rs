//! The decoder, the tokenizer and the template against goldens that an independent reference wrote
//! (`scripts/goldens.py`: numpy, f64 arithmetic on the dequantised weights).
//!
//!     tests/goldens/*.json ── prompts, tokens, greedy answers, logits ──> Precision::Plain agrees to 1e-3, same answers
//!                                                    Plain, now trusted ──> Precision::Fast as close as llama.cpp is
//!
//! The real model is looked for in `$NEUROND_TEST_MODELS`, `target/test-models` and `models/`; without it those tests
//! say "skipped: no weights". The tiny models are committed and always run. Builds without optimisation leave the real one
//! out and say so: `cargo test --release --test model` (or `NEUROND_TEST_MODELS_ALL=1`) takes it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

/// Encoders.
mod encode;

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use half::{bf16, f16};
use neurond::config::{KvType, Precision};
use neurond::kernel::{Isa, KvLayout, Pool};
use neurond::model::text::TextModel;
use neurond::model::weights::Weights;
use neurond::model::{Batch, Decoder, DecoderOptions, Detokenizer};
use neurond::task::{Message, Prompt, Role};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// How far a logit may be from the reference's.
const CLOSE: f32 = 1e-3;

/// Tokens of a prompt from which on it is not short. 27 of the 32 are.
const SHORT: usize = 100;

/// What llama.cpp reaches against the same reference on the short prompts and their answers (docs/PERFORMANCE.md, section 3).
const LLAMA_KL: f64 = 4.171e-3;
const LLAMA_TOP1: f64 = 0.9757;

// ------------------------------------------------------------------------------------------------------- goldens

#[derive(Deserialize)]
struct Golden {
    vocab: usize,
    end_tokens: Vec<u32>,
    stride: usize,
    prompts: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: Option<Vec<Turn>>,
    raw: Option<String>,
    rendered: Option<String>,
    tokens: Vec<u32>,
    greedy: Vec<u32>,
    finish: String,
    /// Steps at which the reference's two best logits are so close that either token would be right.
    near_ties: Vec<usize>,
    text: Option<String>,
    logits: Vec<LogitsAt>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct LogitsAt {
    position: usize,
    top_ids: Vec<u32>,
    top: Vec<f32>,
    /// Every `stride`-th of the vocabulary.
    every: Vec<f32>,
}

impl Case {
    fn prompt(&self) -> Prompt {
        let Some(turns) = &self.messages else { return Prompt::Raw(self.raw.clone().expect("messages or raw")) };
        let role = |name: &str| match name {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => panic!("no role {other}"),
        };
        let messages = turns.iter().map(|turn| Message::new(role(&turn.role), turn.content.as_str())).collect();
        Prompt::Chat { messages, template_kwargs: Default::default() }
    }

    /// The prompt and what the model read of its own answer: everything that has logits.
    fn read(&self) -> Vec<u32> {
        [&self.tokens[..], &self.greedy[..self.greedy.len() - 1]].concat()
    }
}

fn golden<T: DeserializeOwned>(file: &str) -> T {
    let path = tiny(file);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn tiny(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file)
}

/// A file of weights that was fetched, or a word to whoever reads the output.
fn fetched(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("NEUROND_TEST_MODELS").map(PathBuf::from);
    let folders = named.into_iter().chain([root.join("target/test-models"), root.join("models")]);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no weights ({name} in $NEUROND_TEST_MODELS, target/test-models or models/)");
    }
    found
}

/// The demo model, unless it would take minutes.
fn real() -> Option<(PathBuf, Golden)> {
    let found = fetched("SmolLM2-135M-Instruct.Q4_1.gguf");
    if cfg!(debug_assertions) && std::env::var_os("NEUROND_TEST_MODELS_ALL").is_none() {
        eprintln!("skipped: a real model takes minutes without optimisation (cargo test --release --test model)");
        return None;
    }
    Some((found?, golden("smollm2-135m-instruct-q4_1.json")))
}

// ------------------------------------------------------------------------------------------- a runner under test

/// Rows in a step, at most, and rows with logits.
const ROWS: usize = 512;
const SAMPLED: usize = 128;

/// A decoder and its KV blocks, handed out in no order, so that a table that is not followed shows.
struct Rig {
    decoder: Decoder,
    free: Vec<u32>,
    random: Random,
}

/// One sequence: what it has to read, how much of it is in KV, and where.
struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    table: Vec<u32>,
}

/// A xorshift generator: tests repeat exactly.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

impl Rig {
    fn new(model: &Path, precision: Precision, kv: KvType, block_tokens: usize, room: usize) -> Self {
        let weights = Weights::open(model).expect("the weights open");
        let spec = weights.spec().expect("a decoder");
        let half = kv == KvType::F16 && precision == Precision::Fast;
        let layout = KvLayout { heads: spec.kv_heads, dim: spec.head_dim, block_tokens, half };
        let options = DecoderOptions {
            pool: Arc::new(Pool::new(available_parallelism().map_or(1, usize::from))),
            isa: Isa::detect(),
            precision,
            kv,
            kv_bytes: room.div_ceil(block_tokens) * layout.block_bytes() * spec.layers,
            block_tokens,
            max_rows: ROWS,
            max_sample_rows: SAMPLED,
        };
        let decoder = Decoder::open(&weights, spec, &options, &|_| ()).expect("a decoder");
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut free: Vec<u32> = (0..decoder.blocks() as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        Self { decoder, free, random }
    }

    fn begin(&mut self, tokens: &[u32]) -> Sequence {
        Sequence { tokens: tokens.to_vec(), computed: 0, table: Vec::new() }
    }

    fn end(&mut self, sequence: Sequence) {
        self.free.extend(sequence.table);
    }

    /// Puts the next `count` tokens of a sequence into the batch, with the logits of those at `wanted` positions.
    fn plan(&mut self, batch: &mut Batch, sequence: &mut Sequence, count: usize, wanted: &[usize]) {
        let (start, end) = (sequence.computed, sequence.computed + count);
        while sequence.table.len() * self.decoder.block_tokens() < end {
            sequence.table.push(self.free.pop().expect("the rig has room for all sequences"));
        }
        let sampled = wanted.iter().filter(|&&p| (start..end).contains(&p)).map(|&p| (p - start) as u32);
        batch.push(&sequence.tokens[start..end], start as u32, &sequence.table, sampled);
        sequence.computed = end;
    }

    /// Teacher forcing: calls `see(position, logits)` at each wanted position, ascending. `chunk` says how many tokens
    /// are read at a time.
    fn force(
        &mut self,
        tokens: &[u32],
        wanted: &[usize],
        chunk: impl Fn(&mut Random) -> usize,
        mut see: impl FnMut(usize, &[f32]),
    ) {
        let mut sequence = self.begin(tokens);
        let mut left = wanted.iter();
        while sequence.computed < tokens.len() {
            let count = chunk(&mut self.random).min(tokens.len() - sequence.computed);
            let mut batch = Batch::default();
            self.plan(&mut batch, &mut sequence, count, wanted);
            let vocab = self.decoder.spec().vocab;
            let (logits, _) = self.decoder.forward(&batch).expect("a step");
            let rows = logits.chunks_exact(vocab);
            assert_eq!(rows.len(), batch.sample_rows.len());
            for row in rows {
                see(*left.next().expect("no more rows than asked for"), row);
            }
        }
        self.end(sequence);
    }

    /// Greedy answers, all sequences in the same steps: those that read their prompt share `PREFILL` rows a step with
    /// the decodes of the others. Each answer is as long as its golden, or ends where the model ends it.
    fn greedy(&mut self, cases: &[&Case], ends: &[u32]) -> Vec<Vec<u32>> {
        const PREFILL: usize = 128;
        let mut sequences: Vec<Sequence> = cases.iter().map(|case| self.begin(&case.tokens)).collect();
        let mut answers: Vec<Vec<u32>> = vec![Vec::new(); cases.len()];
        let mut running: Vec<usize> = (0..cases.len()).collect();
        while !running.is_empty() {
            let (mut batch, mut budget, mut sampled) = (Batch::default(), PREFILL, Vec::new());
            for &i in &running {
                let known = sequences[i].tokens.len();
                let left = known - sequences[i].computed;
                let count = if left == 1 { 1 } else { left.min(budget) };
                if count == 0 {
                    continue;
                }
                budget -= if left == 1 { 0 } else { count };
                self.plan(&mut batch, &mut sequences[i], count, &[known - 1]);
                if count == left {
                    sampled.push(i);
                }
            }
            let vocab = self.decoder.spec().vocab;
            let (logits, _) = self.decoder.forward(&batch).expect("a step");
            for (&i, row) in sampled.iter().zip(logits.chunks_exact(vocab)) {
                let token = best(row);
                answers[i].push(token);
                sequences[i].tokens.push(token);
                if ends.contains(&token) || answers[i].len() == cases[i].greedy.len() {
                    running.retain(|&other| other != i);
                }
            }
        }
        for sequence in sequences {
            self.end(sequence);
        }
        answers
    }
}

fn best(row: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (1..row.len()).fold(0, better) as u32
}

/// One heavy test at a time: each holds a model and uses all cores.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

// --------------------------------------------------------------------------------------------------------- checks

/// Tokens of every prompt, and the text of every answer, are the reference's.
fn check_text(model: &Path, golden: &Golden) {
    let text = TextModel::open(model).expect("the text half opens");
    assert_eq!(text.vocabulary().len(), golden.vocab);
    for &end in &golden.end_tokens {
        assert!(text.vocabulary().is_end(end), "{end} ends an answer");
    }
    for case in &golden.prompts {
        let name = &case.name;
        same(name, "prompt", &text.prompt_tokens(&case.prompt()).expect(name), &case.tokens);
        if let Some(rendered) = &case.rendered {
            same(name, "rendered prompt", &text.encode(rendered, true).expect(name), &case.tokens);
        }
        let Some(expected) = &case.text else { continue };
        let (mut detokenizer, mut said) = (Detokenizer::new(Arc::clone(text.vocabulary())), String::new());
        case.greedy.iter().for_each(|&token| detokenizer.push(token, &mut said));
        detokenizer.finish(&mut said);
        assert_eq!(&said, expected, "{name}: text of the answer");
    }
}

/// The plain path's logits are the reference's to 1e-3, and so are its greedy answers.
fn check_plain(model: &Path, golden: &Golden) {
    let room: usize = golden.prompts.iter().map(|case| case.tokens.len() + case.greedy.len() + 16).sum();
    let mut rig = Rig::new(model, Precision::Plain, KvType::F32, 16, room);
    let mut furthest = 0f32;
    for case in &golden.prompts {
        let wanted: Vec<usize> = case.logits.iter().map(|at| at.position).collect();
        let mut expected = case.logits.iter();
        rig.force(
            &case.read(),
            &wanted,
            |_| 256,
            |position, row| {
                let at = expected.next().expect("as many rows as wanted");
                assert_eq!(row.len(), golden.vocab);
                let top = at.top_ids.iter().map(|&id| id as usize).zip(&at.top);
                for (id, &value) in top.chain((0..golden.vocab).step_by(golden.stride).zip(&at.every)) {
                    let off = (row[id] - value).abs();
                    furthest = furthest.max(off);
                    assert!(off <= CLOSE, "{} at {position}: logit {id} is {}, not {value}", case.name, row[id]);
                }
            },
        );
    }
    let cases: Vec<&Case> = golden.prompts.iter().collect();
    for (case, answer) in cases.iter().zip(rig.greedy(&cases, &golden.end_tokens)) {
        same_but_ties(case, &answer);
        let ended = answer.last().is_some_and(|last| golden.end_tokens.contains(last));
        assert_eq!(ended, case.finish == "stop", "{}: how the answer ends", case.name);
    }
    println!("{}: {} prompts, furthest logit off by {furthest:.1e}", model.display(), cases.len());
}

/// Whoever else is in the batch, a sequence's answer is what it would be alone.
fn check_batch(model: &Path, golden: &Golden, precision: Precision, kv: KvType, longest: usize) {
    let cases: Vec<&Case> = golden.prompts.iter().filter(|case| case.tokens.len() <= longest).collect();
    let room: usize = cases.iter().map(|case| case.tokens.len() + case.greedy.len() + 16).sum();
    let mut rig = Rig::new(model, precision, kv, 16, room);
    let together = rig.greedy(&cases, &golden.end_tokens);
    for (case, expected) in cases.iter().zip(&together) {
        let alone = rig.greedy(&[case], &golden.end_tokens).remove(0);
        same(&case.name, &format!("{precision:?} answer alone and in a batch of {}", cases.len()), &alone, expected);
    }
}

/// How a prompt is cut into chunks, and KV into blocks, changes no bit of a logit.
fn check_chunks(model: &Path, tokens: &[u32], precision: Precision, kv: KvType, chunks: &[usize]) {
    let wanted = [0, tokens.len() / 3, tokens.len() - 1];
    let mut whole: Option<Vec<Vec<f32>>> = None;
    for block_tokens in [16, 8, 32] {
        let mut rig = Rig::new(model, precision, kv, block_tokens, tokens.len() + block_tokens);
        for &widest in [&ROWS].into_iter().chain(chunks) {
            let mut rows = Vec::new();
            let chunk = |random: &mut Random| if widest == ROWS { ROWS } else { 1 + random.below(widest) };
            rig.force(tokens, &wanted, chunk, |_, row| rows.push(row.to_vec()));
            let off = distance(&rows, whole.get_or_insert_with(|| rows.clone()));
            assert!(off == 0.0, "{precision:?}, blocks of {block_tokens}, chunks up to {widest}: off by {off}");
        }
    }
}

/// Blocks that left the pool and came back elsewhere hold what they held: the next logits have the same bits.
fn check_moved(model: &Path, tokens: &[u32], precision: Precision, kv: KvType) {
    let tokens = &tokens[..tokens.len().min(ROWS)];
    let last = tokens.len() - 1;
    let mut rig = Rig::new(model, precision, kv, 16, 2 * (tokens.len() + 16));
    let mut sequence = rig.begin(tokens);
    let step = |rig: &mut Rig, sequence: &mut Sequence, count: usize| {
        let mut batch = Batch::default();
        rig.plan(&mut batch, sequence, count, &[last]);
        rig.decoder.forward(&batch).expect("a step").0.to_vec()
    };
    step(&mut rig, &mut sequence, last);
    let mut moved = Sequence { tokens: tokens.to_vec(), computed: last, table: Vec::new() };
    let mut block = vec![0; rig.decoder.block_bytes()];
    for &from in &sequence.table {
        let to = rig.free.pop().expect("room for both");
        rig.decoder.export(from, &mut block);
        rig.decoder.import(to, &block);
        moved.table.push(to);
    }
    let expected = step(&mut rig, &mut sequence, 1);
    let found = step(&mut rig, &mut moved, 1);
    let off = distance(&[found], &[expected]);
    assert!(off == 0.0, "{precision:?}: off by {off} after a move");
}

/// Two answers to one prompt that share its full blocks and have a copy each of the one in which it ends: each has the
/// logits, to the bit, that it would have alone.
fn check_copies(model: &Path, tokens: &[u32], precision: Precision, kv: KvType) {
    let room = 3 * (tokens.len() + 32);
    let mut rig = Rig::new(model, precision, kv, 16, room);
    let vocab = rig.decoder.spec().vocab;
    let row = |rig: &mut Rig, sequence: &mut Sequence| {
        let (mut batch, last) = (Batch::default(), sequence.tokens.len() - 1);
        let count = sequence.tokens.len() - sequence.computed;
        rig.plan(&mut batch, sequence, count, &[last]);
        let (logits, _) = rig.decoder.forward(&batch).expect("a step");
        assert_eq!(logits.len(), vocab);
        logits.to_vec()
    };
    let mut first = rig.begin(tokens);
    let prompt = row(&mut rig, &mut first);
    let mut second = rig.begin(tokens);
    let (full, copy) = ((tokens.len() - 1) / 16, rig.free.pop().expect("room"));
    second.table.extend_from_slice(&first.table[..full]);
    second.table.push(copy);
    second.computed = tokens.len() - 1;
    rig.decoder.copy(first.table[full], copy);
    assert_eq!(row(&mut rig, &mut second), prompt, "{precision:?}: the prompt's last row");
    for step in 0..20 {
        for (answer, sequence) in [&mut first, &mut second].into_iter().enumerate() {
            sequence.tokens.push(1 + (7 * step + 3 * answer as u32) % 200);
            let shared = row(&mut rig, sequence);
            let mut alone = rig.begin(&sequence.tokens);
            let expected = row(&mut rig, &mut alone);
            rig.end(alone);
            assert_eq!(shared, expected, "{precision:?}: answer {answer} after {step} tokens");
        }
    }
}

/// The largest difference of two lists of rows.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn same<T: PartialEq + Debug>(name: &str, what: &str, got: &[T], expected: &[T]) {
    let Some(at) = differ(got, expected) else { return };
    let around = |list: &[T]| format!("{:?}", &list[at.saturating_sub(3).min(list.len())..(at + 5).min(list.len())]);
    panic!("{name}: {what} differs from {at} on: {} instead of {}", around(got), around(expected));
}

fn same_but_ties(case: &Case, answer: &[u32]) {
    match differ(answer, &case.greedy) {
        Some(at) if case.near_ties.contains(&at) => {
            println!("{}: took the other side of a near tie at {at}", case.name)
        }
        _ => same(&case.name, "greedy answer", answer, &case.greedy),
    }
}

/// Where two lists part, if they do.
fn differ<T: PartialEq>(a: &[T], b: &[T]) -> Option<usize> {
    let shared = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (shared < a.len() || shared < b.len()).then_some(shared)
}

/// KL(p || q) in nats of two rows of logits.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let most = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        most + row.iter().map(|&x| (f64::from(x) - most).exp()).sum::<f64>().ln()
    };
    let (zp, zq) = (log_sum(p), log_sum(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (lp, lq) = (f64::from(p) - zp, f64::from(q) - zq);
        lp.exp() * (lp - lq)
    };
    p.iter().zip(q).map(term).sum()
}

// ---------------------------------------------------------------------------------------------------------- tests

#[test]
fn tokens_templates_and_text_are_the_references() {
    check_text(&tiny("tiny-llama"), &golden("tiny-llama/golden.json"));
    check_text(&tiny("tiny-gguf/legacy.gguf"), &golden("tiny-gguf/legacy.json"));
    check_text(&tiny("tiny-gguf/k.gguf"), &golden("tiny-gguf/k.json"));
    let Some((model, golden)) = real() else { return };
    check_text(&model, &golden);
}

/// What transformers computes, in f64, of a tiny checkpoint (`scripts/family_goldens.py`).
#[derive(Deserialize)]
struct FamilyGolden {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

impl FamilyGolden {
    fn of(family: &str) -> Self {
        golden(&format!("{family}/golden.json"))
    }
}

const FAMILIES: [&str; 5] = ["tiny-llama3", "tiny-qwen3", "tiny-mistral-window", "tiny-gemma", "tiny-gemma3"];

#[test]
fn families_agree_with_transformers() {
    for (family, &isa) in FAMILIES.iter().flat_map(|family| Isa::available().iter().map(move |isa| (family, isa))) {
        let golden = FamilyGolden::of(family);
        let weights = Weights::open(&tiny(family)).unwrap();
        let spec = weights.spec().unwrap();
        let mut options = DecoderOptions {
            pool: Arc::new(Pool::new(2)),
            isa,
            precision: Precision::Plain,
            kv: KvType::F32,
            kv_bytes: 0,
            block_tokens: 16,
            max_rows: 64,
            max_sample_rows: 64,
        };
        options.kv_bytes = options.kv_block_bytes(&spec) * 8;
        let vocab = spec.vocab;
        let mut decoder = Decoder::open(&weights, spec, &options, &|_| ()).unwrap();
        let table = [3, 5, 1, 0, 7, 2, 6, 4];
        // In two pieces: the second one finds the first one's keys.
        let (first, second) = golden.tokens.split_at(23);
        let mut logits = Vec::new();
        for (start, piece) in [(0, first), (first.len(), second)] {
            let mut batch = Batch::default();
            batch.push(piece, start as u32, &table, 0..piece.len() as u32);
            logits.extend_from_slice(decoder.forward(&batch).unwrap().0);
        }
        for (position, expected) in golden.positions.iter().zip(&golden.logits) {
            let found = &logits[position * vocab..][..vocab];
            let off = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0f32, f32::max);
            assert!(off < CLOSE, "{family} on {isa}, position {position}: off by {off}");
        }
        // And its answer, token by token.
        let mut last = logits[logits.len() - vocab..].to_vec();
        for (at, &expected) in golden.greedy.iter().enumerate() {
            assert_eq!(best(&last), expected, "{family} on {isa}: token {at} of the answer");
            let mut batch = Batch::default();
            batch.push(&[expected], (golden.tokens.len() + at) as u32, &table, [0]);
            last = decoder.forward(&batch).unwrap().0.to_vec();
        }
    }
}

/// Windows move on from row to row, whatever a step consists of: prompts in any pieces and blocks, guesses beyond the last
/// token, a shared beginning, blocks that were elsewhere.
#[test]
fn windows_are_the_same_however_a_text_is_read() {
    for family in ["tiny-mistral-window", "tiny-gemma3"] {
        let (model, golden) = (tiny(family), FamilyGolden::of(family));
        let text = [&golden.tokens[..], &golden.greedy].concat();
        for (precision, kv) in [(Precision::Plain, KvType::F32), (Precision::Fast, KvType::F16)] {
            check_chunks(&model, &text, precision, kv, &[1, 5, 24, 40]);
            check_moved(&model, &text, precision, kv);
            for length in [1, 20, 33, 60] {
                check_copies(&model, &text[..length], precision, kv);
            }
        }
    }
}

#[test]
fn tiny_gguf_models_of_every_block_format_agree_with_the_reference() {
    check_plain(&tiny("tiny-gguf/legacy.gguf"), &golden("tiny-gguf/legacy.json"));
    check_plain(&tiny("tiny-gguf/k.gguf"), &golden("tiny-gguf/k.json"));
}

/// The checkpoint's values are exact in all three types, so one golden serves them all. Llama 3.1's RoPE scaling is on,
/// and one prompt goes beyond the original context.
#[test]
fn a_tiny_safetensors_model_agrees_with_the_reference_in_bf16_f16_and_f32() {
    let golden = golden("tiny-llama/golden.json");
    check_plain(&tiny("tiny-llama"), &golden);
    for dtype in [Dtype::F16, Dtype::F32] {
        let folder = tempfile::tempdir().expect("a folder");
        retype(&tiny("tiny-llama"), folder.path(), dtype);
        check_plain(folder.path(), &golden);
    }
}

#[test]
fn tiny_models_answer_alike_alone_batched_chunked_and_in_any_block_size() {
    let models = [
        ("tiny-llama", "tiny-llama/golden.json"),
        ("tiny-gguf/legacy.gguf", "tiny-gguf/legacy.json"),
        ("tiny-gguf/k.gguf", "tiny-gguf/k.json"),
    ];
    for (model, file) in models {
        let (model, golden) = (tiny(model), golden::<Golden>(file));
        let longest = golden.prompts.iter().max_by_key(|case| case.tokens.len()).expect("a prompt").read();
        for (precision, kv) in [(Precision::Plain, KvType::F32), (Precision::Fast, KvType::F16)] {
            check_batch(&model, &golden, precision, kv, usize::MAX);
            check_chunks(&model, &longest, precision, kv, &[1, 7, 40, 300]);
            check_moved(&model, &longest, precision, kv);
            for length in [1, 15, 16, 17, 40] {
                check_copies(&model, &longest[..length.min(longest.len())], precision, kv);
            }
        }
    }
}

#[test]
fn the_plain_path_of_a_real_model_agrees_with_the_reference_on_every_prompt() {
    let _turn = alone();
    let Some((model, golden)) = real() else { return };
    check_plain(&model, &golden);
}

#[test]
fn a_real_model_answers_every_prompt_in_a_batch_of_all_as_it_does_alone() {
    let _turn = alone();
    let Some((model, golden)) = real() else { return };
    check_batch(&model, &golden, Precision::Fast, KvType::F16, usize::MAX);
    check_batch(&model, &golden, Precision::Plain, KvType::F32, 300);
}

#[test]
fn a_real_model_does_not_mind_how_a_prompt_is_cut() {
    let _turn = alone();
    let Some((model, golden)) = real() else { return };
    let lengths = golden.prompts.iter().filter(|case| case.tokens.len() <= ROWS);
    let case = lengths.max_by_key(|case| case.tokens.len()).expect("a prompt");
    check_chunks(&model, &case.tokens, Precision::Fast, KvType::F16, &[7, 40, 300]);
    check_moved(&model, &case.tokens, Precision::Fast, KvType::F16);
    check_chunks(&model, &case.tokens, Precision::Plain, KvType::F32, &[40, 300]);
}

/// By teacher forcing on the short prompts and their answers. The plain path stands for the reference, which it was
/// just shown to equal; the bound is llama.cpp's own distance on the same file and tokens, and a tenth.
#[test]
fn the_fast_path_stays_as_close_to_the_reference_as_llama_cpp_does() {
    let _turn = alone();
    let Some((model, golden)) = real() else { return };
    let short = golden.prompts.iter().filter(|case| case.tokens.len() < SHORT);
    let texts: Vec<Vec<u32>> = short.map(Case::read).collect();
    let mut plain = Rig::new(&model, Precision::Plain, KvType::F32, 16, 1024);
    let mut fast = Rig::new(&model, Precision::Fast, KvType::F16, 16, 1024);
    let (mut positions, mut kl, mut agreed) = (0usize, 0f64, 0usize);
    for tokens in &texts {
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        let mut exact = Vec::new();
        plain.force(tokens, &wanted, |_| 128, |_, row| exact.push(row.to_vec()));
        fast.force(
            tokens,
            &wanted,
            |_| 128,
            |position, row| {
                positions += 1;
                kl += divergence(&exact[position], row);
                agreed += usize::from(best(&exact[position]) == best(row));
            },
        );
    }
    let (kl, top1) = (kl / positions as f64, agreed as f64 / positions as f64);
    println!(
        "fast path over {positions} positions: mean KL {kl:.3e} (llama.cpp {LLAMA_KL:.3e}), top-1 {:.2} % (llama.cpp {:.2} %)",
        100.0 * top1,
        100.0 * LLAMA_TOP1
    );
    assert!(positions >= 2000, "only {positions} positions");
    assert!(kl <= 1.1 * LLAMA_KL, "mean KL {kl:.3e} is beyond llama.cpp's {LLAMA_KL:.3e}");
    assert!(top1 >= LLAMA_TOP1 - 0.005, "top-1 agreement {top1:.4} is below llama.cpp's {LLAMA_TOP1:.4}");
}

/// Copies a bf16 checkpoint with its weights in another type.
fn retype(from: &Path, to: &Path, dtype: Dtype) {
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            std::fs::copy(&path, target).expect("copied");
            continue;
        }
        let data = std::fs::read(&path).expect("a shard");
        let shard = SafeTensors::deserialize(&data).expect("a shard");
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shard
            .tensors()
            .into_iter()
            .map(|(name, tensor)| {
                let values = tensor.data().as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes));
                let bytes = match dtype {
                    Dtype::F16 => values.flat_map(|value| f16::from_f32(value.to_f32()).to_le_bytes()).collect(),
                    _ => values.flat_map(|value| value.to_f32().to_le_bytes()).collect(),
                };
                (name, tensor.shape().to_vec(), bytes)
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).expect("a tensor")));
        safetensors::serialize_to_file(views, None, &target).expect("written");
    }
}
