//! The decoder of a GPU, run by the emulator, against that of the CPU in plain arithmetic.

use std::sync::Arc;

use super::*;
use crate::base::Kind;
use crate::config::{KvType, Precision};
use crate::kernel::gpu::EmulatedCard;
use crate::kernel::{Dtype, Isa};
use crate::model::tests_support::Tiny;
use crate::model::weights::Weights;
use crate::model::{Decoder, DecoderOptions};

const BLOCK: usize = 16;
const BLOCKS: usize = 24;

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

struct Pair {
    gpu: GpuDecoder,
    cpu: Decoder,
}

fn options(weights: Format, kv: Format, kv_size: KvSize) -> GpuOptions {
    GpuOptions {
        pool: Arc::new(Pool::new(2)),
        weights,
        kv,
        kv_size,
        block_tokens: BLOCK,
        max_rows: 96,
        max_sample_rows: 8,
        max_sequences: 4,
        context: BLOCK * BLOCKS,
    }
}

fn weights(tiny: &Tiny) -> Weights {
    let folder = tempfile::tempdir().unwrap();
    Weights::open(&tiny.file(11).write(folder.path())).unwrap()
}

impl Pair {
    fn new(card: Box<dyn Card>, tiny: &Tiny, format: Format, kv: Format) -> Self {
        let weights = weights(tiny);
        let spec = weights.spec().unwrap();
        let element = if kv == Format::Bf16 { 2 } else { 1 };
        let bytes = 2 * spec.layers * spec.kv_width() * BLOCK * BLOCKS * element;
        let gpu = GpuDecoder::open(
            card,
            Source::File(&weights),
            spec.clone(),
            &options(format, kv, KvSize::Bytes(bytes)),
            &|_| (),
        )
        .unwrap();
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
        Self { gpu, cpu: Decoder::open(&weights, spec, &options, &|_| ()).unwrap() }
    }

    /// Both compute a step: how far the GPU is off, root mean squares of errors and of logits compared.
    fn step(&mut self, batch: &Batch) -> f32 {
        let expected = self.cpu.forward(batch).unwrap().0.to_vec();
        let mut asked = 0;
        let found = logits(self.gpu.forward(batch, &mut || asked += 1).unwrap());
        assert_eq!((found.len(), asked), (expected.len(), 1));
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
        let errors = squares(&mut found.iter().zip(&expected).map(|(found, expected)| found - expected));
        (errors / squares(&mut expected.iter().copied())).sqrt() as f32
    }
}

/// All rows of a step.
fn logits(mut of: GpuLogits<'_>) -> Vec<f32> {
    let rows: Vec<usize> = (0..of.rows()).collect();
    of.land(&rows).unwrap().0.to_vec()
}

/// `count` words of sequence `slot` from `start` on, with logits for the last.
fn part(batch: &mut Batch, slot: usize, start: usize, count: usize, vocab: usize) {
    let words: Vec<u32> = (start..start + count).map(|at| ((at * 31 + slot * 77 + 5) % vocab) as u32).collect();
    // In no order, so that a table that is not followed shows.
    let table: Vec<u32> =
        (0..(start + count).div_ceil(BLOCK)).map(|block| ((slot * 8 + block) * 7 % BLOCKS) as u32).collect();
    batch.push(&words, start as u32, &table, [count as u32 - 1]);
}

fn emulated() -> Box<dyn Card> {
    Box::new(EmulatedCard::new(2))
}

fn follow(card: Box<dyn Card>, tiny: &Tiny, format: Format, kv: Format, most: f32) {
    let mut pair = Pair::new(card, tiny, format, kv);
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
        assert!(off < most, "step {at} in {format:?} with KV in {kv:?} is off by {off}");
    }
}

#[test]
fn it_computes_what_the_cpu_does() {
    for tiny in [&LLAMA, &QWEN] {
        follow(emulated(), tiny, Format::Bf16, Format::Bf16, 0.03);
        follow(emulated(), tiny, Format::Fp8, Format::Fp8, 0.25);
    }
}

/// Keys are cut into ranges as a text grows, in a step that was noted when there was one.
#[test]
fn a_note_is_of_no_length() {
    let mut pair = Pair::new(emulated(), &LLAMA, Format::Bf16, Format::Bf16);
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
                follow(open(0).unwrap(), tiny, Format::Bf16, Format::Bf16, 0.03);
                follow(open(0).unwrap(), tiny, Format::Fp8, Format::Fp8, 0.25);
            }
        }
    }
}

#[test]
fn blocks_are_copied_and_leave_and_come_back() {
    let mut pair = Pair::new(emulated(), &LLAMA, Format::Bf16, Format::Bf16);
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
    let options = |bytes| options(Format::Bf16, Format::Bf16, KvSize::Bytes(bytes));
    let error = refused(&odd, &options(1 << 20));
    assert!(error.kind() == Kind::Unsupported && error.message().contains("feed-forward of 272"), "{error}");
    let narrow = Tiny { dim: 32, heads: 6, kv_heads: 2, ..LLAMA };
    assert!(refused(&narrow, &options(1 << 20)).message().contains("heads of 32"));
    assert!(refused(&LLAMA, &options(100)).message().contains("has 100: give it more with kv_bytes"));
    let uneven = GpuOptions { block_tokens: 12, ..options(1 << 20) };
    assert!(refused(&LLAMA, &uneven).message().contains("block_tokens is 12"));

    let mut pair = Pair::new(emulated(), &LLAMA, Format::Bf16, Format::Bf16);
    let mut batch = Batch::default();
    batch.push(&[1], 0, &[BLOCKS as u32], [0]);
    assert!(pair.gpu.forward(&batch, &mut || ()).err().unwrap().message().contains("block 24 of 24"));
}
