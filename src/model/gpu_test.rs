//! The decoder of a GPU, run by the emulator, against that of the CPU in plain arithmetic.

use std::sync::Arc;

use super::*;
use crate::base::Kind;
use crate::config::{KvType, Precision};
use crate::kernel::gpu::{Chip, EmulatedCard, Wish};
use crate::kernel::testing::Dice;
use crate::kernel::{Dtype, Isa};
use crate::model::lora::{CONFIG_FILE, Shape, WEIGHTS_FILE};
use crate::model::tests_support::{SafeTensor, TINY_WINDOW, Tiny, safetensors};
use crate::model::weights::Weights;
use crate::model::{Decoder, DecoderOptions, Synthetic, synthetic};

pub(super) const BLOCK: usize = 16;
pub(super) const BLOCKS: usize = 24;

/// Interleaved heads in groups of 3, the head tied to an embedding whose words are no multiple of 8.
const LLAMA: Tiny = Tiny {
    arch: "llama",
    hidden: 192,
    heads: 3,
    kv_heads: 1,
    dim: 64,
    ffn: 256,
    vocab: 301,
    tied: true,
    dtypes: &[Dtype::F32, Dtype::F16],
};
/// Biases, heads of 128 that are halves already, a head of its own.
const QWEN: Tiny = Tiny {
    arch: "qwen2",
    hidden: 256,
    heads: 2,
    kv_heads: 2,
    dim: 128,
    ffn: 384,
    vocab: 128,
    tied: false,
    dtypes: &[Dtype::BF16, Dtype::F16],
};

/// Heads as wide as kernels have them, norms on both sides, a layer with a window and one without.
const GEMMA: Tiny = Tiny {
    arch: "gemma3",
    hidden: 128,
    heads: 2,
    kv_heads: 1,
    dim: 256,
    ffn: 192,
    vocab: 200,
    tied: true,
    dtypes: &[Dtype::F32, Dtype::BF16],
};

struct Pair {
    gpu: GpuDecoder,
    cpu: Decoder,
}

pub(super) fn options(weights: Packing, kv: Format, kv_size: KvSize) -> GpuOptions {
    GpuOptions {
        pool: Arc::new(Pool::new(2)),
        weights,
        kv,
        prompt_kernel: PromptKernel::Fastest,
        kv_size,
        block_tokens: BLOCK,
        max_rows: 96,
        max_sample_rows: 8,
        max_sequences: 4,
        context: BLOCK * BLOCKS,
        accept: None,
    }
}

pub(super) fn weights(tiny: &Tiny) -> Weights {
    let folder = tempfile::tempdir().unwrap();
    Weights::open(&tiny.file(11).write(folder.path())).unwrap()
}

impl Pair {
    fn new(card: Box<dyn Card>, tiny: &Tiny, packing: Packing, kv: Format) -> Self {
        Self::of(card, &weights(tiny), packing, kv)
    }

    fn of(card: Box<dyn Card>, weights: &Weights, packing: Packing, kv: Format) -> Self {
        let spec = weights.spec().unwrap();
        let element = if kv == Format::Bf16 { 2 } else { 1 };
        let bytes = 2 * spec.layers * spec.kv_width() * BLOCK * BLOCKS * element;
        Self::opened(card, weights, &options(packing, kv, KvSize::Bytes(bytes)))
    }

    fn opened(card: Box<dyn Card>, weights: &Weights, options: &GpuOptions) -> Self {
        let spec = weights.spec().unwrap();
        let gpu = GpuDecoder::open(card, Source::File(weights), spec.clone(), options, &|_| ()).unwrap();
        assert_eq!((gpu.blocks(), gpu.block_tokens()), (BLOCKS, BLOCK));
        let mut options = DecoderOptions {
            pool: Arc::new(Pool::new(1)),
            isa: Isa::detect(),
            precision: Precision::Plain,
            kv: KvType::F32,
            kv_bytes: 0,
            block_tokens: BLOCK,
            max_rows: 96,
            max_sample_rows: 8,
        };
        options.kv_bytes = options.kv_block_bytes(&spec) * BLOCKS;
        Self { gpu, cpu: Decoder::open(weights, spec, &options, &|_| ()).unwrap() }
    }

    /// Both compute a step: how far the GPU is off.
    fn step(&mut self, batch: &Batch) -> f32 {
        let expected = self.cpu.forward(batch).unwrap().0.to_vec();
        let mut asked = 0;
        let found = logits(self.gpu.forward(batch, &mut || asked += 1).unwrap());
        assert_eq!((found.len(), asked), (expected.len(), 1));
        apart(&found, &expected)
    }
}

/// Root mean squares of errors and of what is expected, compared.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let errors = squares(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    (errors / squares(&mut expected.iter().copied())).sqrt() as f32
}

/// All rows of a step.
pub(super) fn logits(mut of: GpuLogits<'_>) -> Vec<f32> {
    let rows: Vec<usize> = (0..of.rows()).collect();
    of.land(&rows).unwrap().0.to_vec()
}

/// `count` words of sequence `slot` from `start` on, with logits for the last.
pub(super) fn part(batch: &mut Batch, slot: usize, start: usize, count: usize, vocab: usize) {
    let words: Vec<u32> = (start..start + count).map(|at| ((at * 31 + slot * 77 + 5) % vocab) as u32).collect();
    // In no order, so that a table that is not followed shows.
    let table: Vec<u32> =
        (0..(start + count).div_ceil(BLOCK)).map(|block| ((slot * 8 + block) * 7 % BLOCKS) as u32).collect();
    batch.push(&words, start as u32, &table, [count as u32 - 1]);
}

fn emulated() -> Box<dyn Card> {
    Box::new(EmulatedCard::new(2))
}

fn follow(card: Box<dyn Card>, tiny: &Tiny, packing: Packing, kv: Format, most: f32) {
    follow_pair(Pair::new(card, tiny, packing, kv), most);
}

fn follow_pair(mut pair: Pair, most: f32) {
    let vocab = pair.gpu.spec().vocab;
    // Long and short prompts together, a chunk that goes on behind a decoding row, then decoding rows alone: as many as were
    // noted before, and fewer.
    let steps: [&[(usize, usize, usize)]; 8] = [
        &[(0, 0, 70), (1, 0, 1)],
        &[(1, 1, 1), (0, 70, 20), (2, 0, 33)],
        &[(0, 90, 1), (1, 2, 1), (2, 33, 1)],
        &[(2, 34, 1)],
        &[(2, 35, 1), (0, 91, 1), (1, 3, 1)],
        &[(1, 4, 1), (2, 36, 1), (0, 92, 1)],
        &[(0, 93, 1)],
        &[(2, 37, 1), (0, 94, 1), (1, 5, 1)],
    ];
    for (at, parts) in steps.iter().enumerate() {
        let mut batch = Batch::default();
        parts.iter().for_each(|&(slot, start, count)| part(&mut batch, slot, start, count, vocab));
        let off = pair.step(&batch);
        let GpuOptions { weights, kv, .. } = &pair.gpu.options;
        assert!(off < most, "step {at} in {weights:?} with KV in {kv:?} is off by {off}");
    }
}

#[test]
fn it_computes_what_the_cpu_does() {
    for tiny in [&LLAMA, &QWEN, &GEMMA] {
        follow(emulated(), tiny, Packing::Bf16, Format::Bf16, 0.03);
        follow(emulated(), tiny, Packing::Fp8, Format::Fp8, 0.25);
    }
    for (packing, kv, most) in [(Packing::Bf16, Format::Bf16, 0.03), (Packing::Fp8, Format::Fp8, 0.25)] {
        for kernel in [PromptKernel::Warpgroups, PromptKernel::Bulk] {
            let of = GpuOptions { prompt_kernel: kernel, ..options(packing, kv, KvSize::Blocks(BLOCKS)) };
            let pair = Pair::opened(Box::new(EmulatedCard::hopper(2)), &weights(&LLAMA), &of);
            assert_eq!(pair.gpu.kv.boxes.is_empty(), kernel == PromptKernel::Warpgroups || kv == Format::Fp8);
            follow_pair(pair, most);
        }
        // As where the maker's library takes a scale a matrix only.
        follow(Box::new(EmulatedCard::of(Chip::Ada, 1)), &LLAMA, packing, kv, most);
    }
}

/// A folder of the goldens, also where tests run that were built elsewhere: in the root of a checkout.
fn goldens(name: &str) -> std::path::PathBuf {
    let built = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if built.exists() { built } else { std::path::Path::new(".") };
    root.join("tests/goldens").join(name)
}

fn golden(name: &str) -> Weights {
    Weights::open(&goldens(name)).unwrap()
}

/// Heads that are normed before they are turned; windows; norms whose weights lack 1.
#[test]
fn families_compute_what_they_do_on_the_cpu() {
    for name in ["tiny-qwen3", "tiny-mistral-window", "tiny-gemma", "tiny-gemma3"] {
        follow_pair(Pair::of(emulated(), &golden(name), Packing::Bf16, Format::Bf16), 0.03);
    }
}

/// The logits that transformers give in f64, and their answers wherever a token is not close to another.
fn answer_as_the_reference_does(open: impl Fn() -> Box<dyn Card>) {
    const TABLE: [u32; 8] = [7, 2, 9, 4, 1, 8, 12, 3];
    for name in ["tiny-llama3", "tiny-mistral-window", "tiny-gemma", "tiny-gemma3"] {
        let file = goldens(name).join("golden.json");
        let of: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let numbers = |key: &str| -> Vec<u32> { serde_json::from_value(of[key].clone()).unwrap() };
        let margins: Vec<f32> = serde_json::from_value(of["margins"].clone()).unwrap();
        let (weights, options) = (golden(name), options(Packing::Bf16, Format::Bf16, KvSize::Blocks(BLOCKS)));
        let spec = weights.spec().unwrap();
        let mut gpu = GpuDecoder::open(open(), Source::File(&weights), spec, &options, &|_| ()).unwrap();
        let (mut text, mut start, mut clear) = (numbers("tokens"), 0, 0);

        let rows: Vec<Vec<f32>> = serde_json::from_value(of["logits"].clone()).unwrap();
        let mut batch = Batch::default();
        batch.push(&text, 0, &TABLE, numbers("positions"));
        let off = apart(&logits(gpu.forward(&batch, &mut || ()).unwrap()), &rows.concat());
        assert!(off < 0.03, "{name}: logits are off by {off}");

        for (at, (expected, margin)) in numbers("greedy").into_iter().zip(margins).enumerate() {
            let mut batch = Batch::default();
            let count = text.len() - start;
            batch.push(&text[start..], start as u32, &TABLE, [count as u32 - 1]);
            start = text.len();
            let mut logits = gpu.forward(&batch, &mut || ()).unwrap();
            let drawn = logits.draw(&[Wish::default()], &[], std::iter::empty()).unwrap()[0].token as u32;
            if margin > 0.3 {
                assert_eq!(drawn, expected, "{name}: token {at}");
                clear += 1;
            }
            text.push(expected);
        }
        assert!(clear >= 8, "{name}: only {clear} tokens are clear");
    }
}

#[test]
fn families_answer_what_the_reference_does() {
    answer_as_the_reference_does(emulated);
}

/// Guesses that lie across the edge of a window are looked at as they would be one by one.
#[test]
fn a_window_moves_on_within_a_step() {
    let mut pair = Pair::new(emulated(), &GEMMA, Packing::Bf16, Format::Bf16);
    let edge = TINY_WINDOW - 3;
    let word = |at: u32| at * 31 % 200;
    let table: Vec<u32> = (0..8).map(|block| block * 5 % 24).collect();
    let mut batch = Batch::default();
    batch.push(&(0..edge).map(word).collect::<Vec<_>>(), 0, &table, [0]);
    pair.step(&batch);
    let mut step = |first: u32, count: u32| {
        let mut batch = Batch::default();
        batch.push(&(first..first + count).map(word).collect::<Vec<_>>(), first, &table, 0..count);
        let off = pair.step(&batch);
        assert!(off < 0.03, "{count} rows from {first} are off by {off}");
    };
    step(edge, 6);
    step(edge, 1);
    step(edge + 1, 5);
    step(edge + 6, 8);
}

/// A file in 4 bits is computed as it is, one in 16 is rounded to them.
#[test]
fn four_bits_are_those_of_the_file() {
    let file = Tiny { hidden: 256, heads: 4, kv_heads: 2, ffn: 384, dtypes: &[Dtype::Q4_0], ..LLAMA };
    follow(emulated(), &file, Packing::Q4, Format::Bf16, 0.03);
    follow(emulated(), &Tiny { dtypes: &[Dtype::F16], ..file }, Packing::Q4, Format::Bf16, 0.5);
}

/// Weights that are made up: of numbers, and of no two rows alike.
#[test]
fn random_weights_compute_numbers() {
    for packing in [Packing::Bf16, Packing::Fp8, Packing::Q4] {
        let spec = synthetic("tiny").unwrap().spec;
        let options = options(packing, Format::Bf16, KvSize::Blocks(BLOCKS));
        let mut gpu = GpuDecoder::open(emulated(), Source::Random, spec, &options, &|_| ()).unwrap();
        let mut batch = Batch::default();
        part(&mut batch, 0, 0, 9, 512);
        part(&mut batch, 1, 0, 4, 512);
        let found = logits(gpu.forward(&batch, &mut || ()).unwrap());
        let (first, second) = found.split_at(512);
        assert!(found.iter().all(|logit| logit.is_finite()) && first != second, "{packing:?}");
        let square = first.iter().map(|logit| logit * logit).sum::<f32>() / 512.0;
        assert!((0.1..10.0).contains(&square), "{packing:?}: mean square {square}");
    }
    // The published model has 11.8 billion in its text part.
    let gemma = synthetic("gemma-3-12b").unwrap().spec;
    let numbers: usize = gemma.tensors().map(|(_, rows, cols)| rows * cols).sum();
    assert!((11_760_000_000..11_780_000_000).contains(&numbers), "{numbers}");
    assert_eq!((gemma.window_of(4), gemma.window_of(5)), (Some(1024), None));
    assert!(synthetic("llama-9").unwrap_err().message().contains("llama-3.1-8b"));
    assert!(synthetic("tiny,accept=2").unwrap_err().message().contains("a share from 0 to 1"));
}

/// As many drafts come true as are asked for, and those that do not are never right by chance.
#[test]
fn drafts_of_made_up_weights_come_true_as_often_as_they_are_told_to() {
    for share in [0.0, 0.7, 1.0] {
        let Synthetic { spec, accept } = synthetic(&format!("tiny,accept={share}")).unwrap();
        let options = GpuOptions { accept, ..options(Packing::Bf16, Format::Bf16, KvSize::Blocks(BLOCKS)) };
        let mut gpu = GpuDecoder::open(emulated(), Source::Random, spec, &options, &|_| ()).unwrap();
        let (mut right, mut all) = (0, 0);
        for step in 0..30 {
            let mut batch = Batch::default();
            batch.push(&[5, 6, 7, step], 0, &[1], [0, 1, 2, 3]);
            batch.push(&[9], 0, &[2], [0]);
            let mut logits = gpu.forward(&batch, &mut || ()).unwrap();
            let drawn = logits.draw(&[Wish::default(); 5], &[], std::iter::empty()).unwrap();
            right += (0..3).filter(|&row| drawn[row].token == batch.tokens[row + 1] as i32).count();
            all += 3;
        }
        let found = right as f32 / all as f32;
        assert!((found - share).abs() < if share == 0.7 { 0.2 } else { 1e-6 }, "{found}, not {share}");
    }
}

/// Keys are cut into ranges as a text grows, in a step that was noted when there was one.
#[test]
fn a_note_is_of_no_length() {
    let mut pair = Pair::new(emulated(), &LLAMA, Packing::Bf16, Format::Bf16);
    let vocab = pair.gpu.spec().vocab as u32;
    let table: Vec<u32> = (0..BLOCKS as u32).map(|block| block * 5 % BLOCKS as u32).collect();
    let word = |at: u32| (at * 31 + 5) % vocab;
    let mut step = |first: u32, count: u32| {
        let words: Vec<u32> = (first..first + count).map(word).collect();
        let mut batch = Batch::default();
        batch.push(&words, first, &table[..((first + count) as usize).div_ceil(BLOCK)], [count - 1]);
        let off = pair.step(&batch);
        assert!(off < 0.03, "{count} rows from {first} are off by {off}");
    };
    step(0, 40);
    step(40, 1);
    step(41, 1);
    (42..330).step_by(96).for_each(|first| step(first, 96));
    step(330, 1);
    step(331, 1);
}

/// A number of rows for each place, none too small and each its own.
#[test]
fn buckets_follow_each_other() {
    let mut last = (0, 0);
    for rows in 1..400 {
        let (filled, at) = bucket(rows);
        assert!(filled >= rows && filled < rows.next_power_of_two().max(2) + MANY, "{rows}: {filled}");
        assert!(
            (filled, at) == last || (filled > last.0 && (at == last.1 + 1 || rows == 1)),
            "{rows}: {filled} at {at}"
        );
        last = (filled, at);
    }
}

/// Sequences with drafts behind their last words: whatever their depths, a step of as many rows is launched as a whole. Prompts and
/// what is too deep for a narrow item are not.
#[test]
fn drafts_are_verified_in_steps_that_were_noted() {
    for (tiny, packing, kv, most) in
        [(&LLAMA, Packing::Bf16, Format::Bf16, 0.03), (&QWEN, Packing::Fp8, Format::Fp8, 0.25)]
    {
        let mut pair = Pair::new(emulated(), tiny, packing, kv);
        let vocab = pair.gpu.spec().vocab;
        let mut step = |parts: &[(usize, usize, usize)], all: bool| {
            let mut batch = Batch::default();
            for &(slot, start, count) in parts {
                let words: Vec<u32> =
                    (start..start + count).map(|at| ((at * 31 + slot * 77 + 5) % vocab) as u32).collect();
                let blocks = 0..(start + count).div_ceil(BLOCK);
                let table: Vec<u32> = blocks.map(|block| ((slot * 8 + block) * 7 % BLOCKS) as u32).collect();
                let sampled = if all { 0..count as u32 } else { count as u32 - 1..count as u32 };
                batch.push(&words, start as u32, &table, sampled);
            }
            let off = pair.step(&batch);
            assert!(off < most, "{parts:?} in {packing:?} is off by {off}");
            pair.gpu.launched()
        };
        assert_eq!(step(&[(0, 0, 50), (1, 0, 9), (2, 0, 31)], false), Launched::Eager);
        assert_eq!(step(&[(0, 50, 1), (1, 9, 4), (2, 31, 2)], true), Launched::Noted);
        // Other depths, fewer rows and sequences, a first draft that was wrong.
        assert_eq!(step(&[(0, 51, 3), (1, 13, 1), (2, 33, 3)], true), Launched::Replayed);
        assert_eq!(step(&[(2, 34, 5)], true), Launched::Replayed);
        // As many rows, but one each.
        assert_eq!(step(&[(0, 54, 1), (1, 14, 1), (2, 39, 1)], true), Launched::Noted);
        assert_eq!(step(&[(0, 55, 2), (1, 15, 2)], true), Launched::Noted);
        assert_eq!(step(&[(0, 55, 3), (1, 17, 1)], true), Launched::Replayed);
        let group = tiny.heads / tiny.kv_heads;
        let deep = NARROW / group + 1;
        if deep <= 8 {
            assert_eq!(step(&[(0, 58, deep)], true), Launched::Eager);
        }
    }
}

/// Sequences that end, wait a step or come in the middle, computed by a decoder that begins steps ahead and by one that does not.
#[test]
fn a_step_that_was_begun_ahead_is_the_step_that_was_asked_for() {
    for (kv, packing) in [(Format::Bf16, Packing::Bf16), (Format::Fp8, Packing::Fp8)] {
        let open = || {
            let options = options(packing, kv, KvSize::Blocks(BLOCKS));
            GpuDecoder::open(emulated(), Source::Random, synthetic("tiny").unwrap().spec, &options, &|_| ()).unwrap()
        };
        let mut decoders = [open(), open()];
        let mut texts: [Vec<u32>; 3] = [vec![3, 1, 4], vec![15, 9], vec![26, 5, 35, 8]];
        // Which sequences a step has, and how it is launched by the one that begins ahead, when that is told.
        let both = [0, 1].as_slice();
        let steps: [(&[usize], Option<Launched>); 16] = [
            (&[0], None),
            (&[1], None),
            (both, Some(Launched::Noted)),
            (both, Some(Launched::Ahead)),
            (both, Some(Launched::Ahead)),
            // A prompt: what was begun was for nothing.
            (&[0, 1, 2], Some(Launched::Eager)),
            (&[0, 1, 2], Some(Launched::Noted)),
            (&[0, 1, 2], Some(Launched::Ahead)),
            // One is missing: its row is there, and the next step is not begun from such rows.
            (&[0, 2], Some(Launched::Ahead)),
            (&[0, 2], Some(Launched::Replayed)),
            (&[0, 2], Some(Launched::Ahead)),
            (&[2], Some(Launched::Ahead)),
            // It comes back, and begins where it had stopped.
            (both, Some(Launched::Replayed)),
            (both, Some(Launched::Ahead)),
            // In another order it is another step.
            (&[1, 0], Some(Launched::Replayed)),
            (&[1, 0], Some(Launched::Ahead)),
        ];
        let mut known = [0; 3];
        for (at, (sequences, launched)) in steps.into_iter().enumerate() {
            let mut batch = Batch::default();
            for &slot in sequences {
                let table: Vec<u32> = (0..4).map(|block| ((slot * 8 + block) * 7 % BLOCKS) as u32).collect();
                let new = &texts[slot][known[slot]..];
                batch.push(new, known[slot] as u32, &table, [new.len() as u32 - 1]);
            }
            let wishes: Vec<Wish> = sequences
                .iter()
                .map(|&slot| Wish { seed: slot as u64, position: at as u64, temperature: 1.0, ..Wish::default() })
                .collect();
            let drawn = [0, 1].map(|which| {
                let decoder = &mut decoders[which];
                decoder.ahead.trust = if which == 0 { 1.0 } else { 0.0 };
                let mut logits = decoder.forward(&batch, &mut || ()).unwrap();
                let drawn = logits.draw(&wishes, &[], std::iter::empty()).unwrap();
                drawn.iter().map(|drawn| drawn.token as u32).collect::<Vec<_>>()
            });
            assert_eq!(drawn[0], drawn[1], "step {at} in {packing:?}");
            assert!(decoders[1].launched() != Launched::Ahead);
            assert!(
                launched.is_none_or(|how| how == decoders[0].launched()),
                "step {at}: {:?}",
                decoders[0].launched()
            );
            for (&slot, &token) in sequences.iter().zip(&drawn[0]) {
                known[slot] = texts[slot].len();
                texts[slot].push(token);
            }
        }
        assert!(
            texts.iter().flatten().collect::<std::collections::HashSet<_>>().len() > 12,
            "texts that say something"
        );
    }
}

/// An adapter for a tiny model, of this rank, over the modules that are named; its weights follow from `seed`.
fn adapter(tiny: &Tiny, spec: &DecoderSpec, rank: usize, modules: &[&str], seed: u64) -> Arc<Adapter> {
    let mut dice = Dice::new(seed);
    let (q, kv) = (spec.q_width(), spec.kv_width());
    let shapes = [
        ("self_attn.q_proj", q, tiny.hidden),
        ("self_attn.k_proj", kv, tiny.hidden),
        ("self_attn.v_proj", kv, tiny.hidden),
        ("self_attn.o_proj", tiny.hidden, q),
        ("mlp.gate_proj", tiny.ffn, tiny.hidden),
        ("mlp.up_proj", tiny.ffn, tiny.hidden),
        ("mlp.down_proj", tiny.hidden, tiny.ffn),
    ];
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (layer, (module, n, k)) in (0..spec.layers).flat_map(|layer| shapes.map(|shape| (layer, shape))) {
        // Not every layer has every one.
        if modules.contains(&module) && (layer + module.len()) % 5 > 0 {
            for (half, rows, cols) in [("A", rank, k), ("B", n, rank)] {
                let name = format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight");
                tensors.push((name, vec![rows, cols], dice.weights(Dtype::F16, rows, cols)));
            }
        }
    }
    let tensors: Vec<SafeTensor<'_>> =
        tensors.iter().map(|(name, shape, bytes)| (name.as_str(), "F16", shape.clone(), bytes.clone())).collect();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(WEIGHTS_FILE), safetensors(&tensors)).unwrap();
    let config = serde_json::json!({"peft_type": "LORA", "r": rank, "lora_alpha": 0.03 * rank as f64, "target_modules": "all-linear"});
    std::fs::write(folder.path().join(CONFIG_FILE), config.to_string()).unwrap();
    Arc::new(Adapter::open(folder.path(), Shape::of(spec)).unwrap())
}

/// Rows of several adapters and of none in a step, before and after a step of none.
#[test]
fn adapters_add_what_they_do_on_the_cpu() {
    for (tiny, packing, kv, most) in [
        (&LLAMA, Packing::Bf16, Format::Bf16, 0.03),
        (&QWEN, Packing::Fp8, Format::Fp8, 0.25),
        (&GEMMA, Packing::Bf16, Format::Bf16, 0.03),
    ] {
        let mut pair = Pair::new(emulated(), tiny, packing, kv);
        let spec = pair.gpu.spec().clone();
        let all = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ];
        let whole = adapter(tiny, &spec, 8, &all, 5);
        let some = adapter(tiny, &spec, 32, &["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], 6);
        assert!(pair.gpu.takes(&whole));
        for adapter in [&whole, &some, &whole] {
            pair.gpu.adopt(adapter).unwrap();
        }
        assert_eq!(pair.gpu.adapters.count(), 2);
        let step = |pair: &mut Pair, parts: &[(usize, usize, usize, Option<&Arc<Adapter>>)]| {
            let mut batch = Batch::default();
            for &(slot, start, count, adapter) in parts {
                part(&mut batch, slot, start, count, spec.vocab);
                adapter.into_iter().for_each(|adapter| batch.adapt(adapter));
            }
            let off = pair.step(&batch);
            assert!(off < most, "{packing:?}: off by {off}");
            pair.gpu.launched()
        };
        step(&mut pair, &[(0, 0, 20, Some(&some)), (1, 0, 3, None), (2, 0, 37, Some(&whole))]);
        assert_eq!(step(&mut pair, &[(0, 20, 1, Some(&some)), (2, 37, 1, Some(&whole))]), Launched::Eager);
        assert_eq!(step(&mut pair, &[(1, 3, 1, None)]), Launched::Noted);
        assert_eq!(step(&mut pair, &[(1, 4, 1, None)]), Launched::Replayed);
        let mut batch = Batch::default();
        part(&mut batch, 1, 5, 1, spec.vocab);
        let plain = logits(pair.gpu.forward(&batch, &mut || ()).unwrap());
        batch.adapt(&whole);
        let adapted = logits(pair.gpu.forward(&batch, &mut || ()).unwrap());
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
        let change = squares(&mut adapted.iter().zip(&plain).map(|(adapted, plain)| adapted - plain));
        assert!((change / squares(&mut plain.iter().copied())).sqrt() > 2.0 * most, "it makes a difference");
        // Whoever nobody holds any more is gone with the next one that comes.
        batch.clear();
        drop(whole);
        pair.gpu.adopt(&some).unwrap();
        assert_eq!(pair.gpu.adapters.count(), 1);
        let other = adapter(tiny, &spec, 4, &["mlp.up_proj"], 7);
        part(&mut batch, 1, 5, 1, spec.vocab);
        batch.adapt(&other);
        assert!(pair.gpu.forward(&batch, &mut || ()).err().unwrap().message().contains("not on its device"));
    }
}

#[test]
fn a_step_now_and_then_says_what_its_time_goes_into() {
    let spec = synthetic("tiny").unwrap().spec;
    let options = options(Packing::Bf16, Format::Bf16, KvSize::Blocks(BLOCKS));
    let mut gpu = GpuDecoder::open(emulated(), Source::Random, spec, &options, &|_| ()).unwrap();
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    batch.push(&[7], 0, &[1], [0]);
    for step in 1..=TIMED_EVERY + 1 {
        logits.push(self::logits(gpu.forward(&batch, &mut || ()).unwrap()));
        let parts = gpu.parts().unwrap();
        assert_eq!(parts.is_some(), step == TIMED_EVERY);
        let how = match step {
            1 => Launched::Noted,
            TIMED_EVERY => Launched::Eager,
            _ => Launched::Replayed,
        };
        assert_eq!(gpu.launched(), how, "step {step}");
        if let Some(parts) = parts {
            assert!(parts.iter().all(|&seconds| seconds > 0.0), "{parts:?}");
            assert_eq!(gpu.parts().unwrap(), None, "told once");
        }
    }
    assert!(logits.iter().all(|other| *other == logits[0]));
    // Where nobody asks, no other is timed.
    let mut eager = 0;
    for _ in TIMED_EVERY + 1..=3 * TIMED_EVERY {
        gpu.forward(&batch, &mut || ()).unwrap();
        eager += usize::from(gpu.launched() == Launched::Eager);
    }
    assert_eq!(eager, 1);
}

/// Says so where there is no GPU: a machine that has one runs the same steps on it.
#[cfg(feature = "cuda")]
#[test]
fn a_real_card_computes_the_same() {
    use crate::kernel::gpu::{count, open};
    match count(&[""]) {
        Err(error) => {
            assert_eq!(error.kind(), Kind::ModelUnavailable);
            eprintln!("not run: {error}");
        }
        Ok(_) => {
            for tiny in [&LLAMA, &QWEN] {
                follow(open(0).unwrap(), tiny, Packing::Bf16, Format::Bf16, 0.03);
                follow(open(0).unwrap(), tiny, Packing::Fp8, Format::Fp8, 0.25);
                follow(open(0).unwrap(), tiny, Packing::Bf16, Format::Fp8, 0.25);
            }
            // Whichever pays on this one: each computes the same.
            for kernel in [PromptKernel::Warps, PromptKernel::Warpgroups, PromptKernel::Bulk] {
                for (kv, most) in [(Format::Bf16, 0.03), (Format::Fp8, 0.25)] {
                    let of = GpuOptions { prompt_kernel: kernel, ..options(Packing::Bf16, kv, KvSize::Blocks(BLOCKS)) };
                    follow_pair(Pair::opened(open(0).unwrap(), &weights(&LLAMA), &of), most);
                }
            }
            answer_as_the_reference_does(|| open(0).unwrap());
        }
    }
}

#[test]
fn blocks_are_copied_and_leave_and_come_back() {
    let mut pair = Pair::new(emulated(), &LLAMA, Packing::Bf16, Format::Bf16);
    let vocab = pair.gpu.spec().vocab;
    let mut first = Batch::default();
    first.push(&(0..20).collect::<Vec<u32>>(), 0, &[3, 5], [19]);
    pair.step(&first);
    let next = |table: &[u32]| {
        let mut batch = Batch::default();
        batch.push(&[vocab as u32 - 1], 20, table, [0]);
        batch
    };
    let logits = |pair: &mut Pair, table: &[u32]| logits(pair.gpu.forward(&next(table), &mut || ()).unwrap());
    let expected = logits(&mut pair, &[3, 5]);
    pair.gpu.copy(3, 9);
    pair.gpu.copy(5, 1);
    assert_eq!(logits(&mut pair, &[9, 1]), expected);
    let mut content = vec![0; pair.gpu.block_bytes()];
    pair.gpu.export(9, &mut content);
    pair.gpu.import(20, &content);
    assert_eq!(logits(&mut pair, &[20, 1]), expected);
    assert_ne!(logits(&mut pair, &[1, 20]), expected);
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let refused = |tiny: &Tiny, options: &GpuOptions| {
        let weights = weights(tiny);
        let spec = weights.spec().unwrap();
        GpuDecoder::open(Box::new(EmulatedCard::default()), Source::File(&weights), spec, options, &|_| ())
            .err()
            .unwrap()
    };
    let odd = Tiny { ffn: 272, dtypes: &[Dtype::F16], ..LLAMA };
    let options = |bytes| options(Packing::Bf16, Format::Bf16, KvSize::Bytes(bytes));
    let error = refused(&odd, &options(1 << 20));
    assert!(error.kind() == Kind::Unsupported && error.message().contains("feed-forward of 272"), "{error}");
    let narrow = Tiny { dim: 32, heads: 6, kv_heads: 2, ..LLAMA };
    assert!(refused(&narrow, &options(1 << 20)).message().contains("heads of 32"));
    assert!(refused(&LLAMA, &options(100)).message().contains("has 100: give it more with kv_bytes"));
    let uneven = GpuOptions { block_tokens: 12, ..options(1 << 20) };
    assert!(refused(&LLAMA, &uneven).message().contains("block_tokens is 12"));

    let mut pair = Pair::new(emulated(), &LLAMA, Packing::Bf16, Format::Bf16);
    let mut batch = Batch::default();
    batch.push(&[1], 0, &[BLOCKS as u32], [0]);
    assert!(pair.gpu.forward(&batch, &mut || ()).err().unwrap().message().contains("block 24 of 24"));
}
