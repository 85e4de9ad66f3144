//! Groups against one decoder of the same weights, against themselves in other company, and on the way to their end.

use std::path::PathBuf;

use super::*;
use crate::config::{KvType, Precision};
use crate::kernel::{Dtype, Isa};
use crate::model::lora::Shape;
use crate::model::tests_support::Tiny;

/// Tokens in a KV block, blocks of a sequence, sequences of a rig.
const BLOCK: usize = 8;
const BLOCKS: usize = 16;
const SEQUENCES: usize = 8;

/// Formats of 32, some after the other; heads that two KV heads serve.
const LEGACY: Tiny = Tiny {
    arch: "llama",
    hidden: 128,
    heads: 8,
    kv_heads: 2,
    dim: 32,
    ffn: 224,
    vocab: 300,
    tied: true,
    dtypes: &[Dtype::Q4_1, Dtype::Q8_0, Dtype::Q5_0, Dtype::Q4_0, Dtype::Q5_1],
};
/// Formats of 256, biases, a head of its own; the middle is three blocks long.
const K: Tiny = Tiny {
    arch: "qwen2",
    hidden: 256,
    heads: 8,
    kv_heads: 4,
    dim: 64,
    ffn: 768,
    vocab: 333,
    tied: false,
    dtypes: &[Dtype::Q4_K, Dtype::Q6_K, Dtype::Q5_K],
};
/// Nothing is a multiple of anything.
const FLOATS: Tiny = Tiny {
    arch: "qwen2",
    hidden: 96,
    heads: 6,
    kv_heads: 3,
    dim: 16,
    ffn: 100,
    vocab: 101,
    tied: true,
    dtypes: &[Dtype::F32, Dtype::F16, Dtype::BF16],
};

/// What layers give is normed before it is added, so it is summed over the ranks before that.
const GEMMA: Tiny = Tiny {
    arch: "gemma3",
    hidden: 96,
    heads: 4,
    kv_heads: 2,
    dim: 32,
    ffn: 128,
    vocab: 301,
    tied: true,
    dtypes: &[Dtype::F32, Dtype::Q8_0, Dtype::BF16],
};

fn weights(tiny: Tiny) -> Weights {
    let folder = tempfile::tempdir().unwrap();
    Weights::open(&tiny.file(7).write(folder.path())).unwrap()
}

fn options(spec: &DecoderSpec, precision: Precision, threads: usize) -> DecoderOptions {
    let mut options = DecoderOptions {
        pool: Arc::new(Pool::new(threads)),
        isa: Isa::detect(),
        precision,
        kv: KvType::F16,
        kv_bytes: 0,
        block_tokens: BLOCK,
        max_rows: 256,
        max_sample_rows: 256,
    };
    options.kv_bytes = options.kv_block_bytes(spec) * BLOCKS * SEQUENCES;
    options
}

fn group(weights: &Weights, precision: Precision, ranks: usize) -> Group {
    let spec = weights.spec().unwrap();
    let division = Division::new(weights, &spec, ranks).unwrap();
    let mut options = options(&spec, precision, ranks + 1);
    // KV heads that several ranks hold take as much room again.
    options.kv_bytes *= ranks.div_ceil(spec.kv_heads);
    let group = Group::open(weights, &division, &options, &|_| ()).unwrap();
    assert_eq!((group.ranks(), group.blocks()), (ranks, BLOCKS * SEQUENCES));
    group
}

/// What the tests do with one decoder and with a group.
trait Steps {
    fn step(&mut self, batch: &Batch) -> Vec<f32>;
}

impl Steps for Decoder {
    fn step(&mut self, batch: &Batch) -> Vec<f32> {
        self.forward(batch).unwrap().0.to_vec()
    }
}

impl Steps for Group {
    fn step(&mut self, batch: &Batch) -> Vec<f32> {
        self.forward(batch).unwrap().0.to_vec()
    }
}

/// The next `tokens` of sequence `slot`, which has `start` of them, under an adapter or none.
type Next<'a> = (usize, usize, &'a [u32], Option<&'a Arc<Adapter>>);

/// One step over these, with logits for every row.
fn batch(parts: &[Next<'_>]) -> Batch {
    let mut batch = Batch::default();
    for &(slot, start, tokens, adapter) in parts {
        let blocks = (start + tokens.len()).div_ceil(BLOCK);
        // In no order, so that a table that is not followed shows.
        let table: Vec<u32> =
            (0..blocks).map(|block| ((slot * BLOCKS + block) * 37 % (BLOCKS * SEQUENCES)) as u32).collect();
        batch.push(tokens, start as u32, &table, 0..tokens.len() as u32);
        if let Some(adapter) = adapter {
            batch.adapt(adapter);
        }
    }
    batch
}

fn words(count: usize, vocab: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 41 + seed * 17 + i * i * 7) % vocab) as u32).collect()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

/// A group's logits are those of one decoder to `close` of the largest, and it says the same; 40 greedy tokens after
/// prompts of several lengths, all in one batch.
fn check_same(tiny: Tiny, precision: Precision, ranks: usize, close: f32) {
    let weights = weights(tiny);
    let spec = weights.spec().unwrap();
    let open = |precision| Decoder::open(&weights, spec.clone(), &options(&spec, precision, 1), &|_| ()).unwrap();
    let (mut one, mut exact, mut group) = (open(precision), open(Precision::Plain), group(&weights, precision, ranks));
    let mut sequences: Vec<Vec<u32>> = [3, 21, 40].map(|length| words(length, spec.vocab, length)).into();
    let (mut done, mut furthest, mut rounding, mut ties) = ([0; 3], 0f32, 0f32, 0);
    for step in 0..40 {
        let parts: Vec<Next<'_>> =
            (0..3).map(|slot| (slot, done[slot], &sequences[slot][done[slot]..], None)).collect();
        let batch = batch(&parts);
        let (expected, found, exact) = (one.step(&batch), group.step(&batch), exact.step(&batch));
        let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let mut last = 0;
        for (slot, sequence) in sequences.iter_mut().enumerate() {
            last += sequence.len() - done[slot];
            done[slot] = sequence.len();
            let [expected, found] = [&expected, &found].map(|rows| &rows[(last - 1) * spec.vocab..][..spec.vocab]);
            let token = best(expected);
            if best(found) != token {
                // Two tokens that are closer than the bound: either is right.
                assert!(expected[token] - expected[best(found)] <= 2.0 * close * largest, "step {step}: {token}");
                ties += 1;
            }
            sequence.push(token as u32);
        }
        let off = |other: &[f32]| expected.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
        furthest = furthest.max(off(&found));
        rounding = rounding.max(off(&exact));
        assert!(off(&found) <= close, "{precision:?} on {ranks} ranks, step {step}: {:e} of the largest", off(&found));
    }
    let arch = tiny.arch;
    println!(
        "{arch} {precision:?} on {ranks} ranks: {furthest:.1e}, int8 and f16 by themselves {rounding:.1e}, {ties} ties"
    );
    assert!(ties <= 2, "{ties} tokens of 120 differ");
    assert!(precision == Precision::Plain || furthest < 2.0 * rounding, "more than rounding twice");
}

/// Sums of f32 in another order.
const SUMS: f32 = 1e-5;
/// And, on the way, numbers that lie at the edge between two codes of int8 or two f16 of the KV: such a one may fall to the
/// other side, a step of 1/127 of the largest in its block of 32, and after some layers nothing is rounded as it was. So the
/// two may be as far from each other as two roundings of the same numbers are.
const CODES: f32 = 2e-2;

#[test]
fn in_f32_ranks_compute_what_one_does() {
    for ranks in [2, 4] {
        check_same(LEGACY, Precision::Plain, ranks, SUMS);
    }
    check_same(K, Precision::Plain, 2, SUMS);
    for ranks in [3, 6] {
        check_same(FLOATS, Precision::Plain, ranks, SUMS);
    }
}

#[test]
fn with_quantised_weights_ranks_compute_what_one_does() {
    for ranks in [2, 4] {
        check_same(LEGACY, Precision::Fast, ranks, CODES);
    }
    check_same(K, Precision::Fast, 2, CODES);
    for ranks in [3, 6] {
        check_same(FLOATS, Precision::Fast, ranks, CODES);
    }
    check_same(GEMMA, Precision::Fast, 2, CODES);
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_company() {
    for (tiny, precision, ranks) in [
        (LEGACY, Precision::Fast, 2),
        (LEGACY, Precision::Fast, 4),
        (K, Precision::Fast, 2),
        (FLOATS, Precision::Plain, 3),
        (GEMMA, Precision::Fast, 2),
    ] {
        let weights = weights(tiny);
        let mut group = group(&weights, precision, ranks);
        let vocab = group.spec().vocab;
        let tokens: Vec<Vec<u32>> = (0..7).map(|slot| words(60, vocab, slot)).collect();
        let alone: Vec<Vec<f32>> =
            tokens.iter().enumerate().map(|(slot, tokens)| group.step(&batch(&[(slot, 0, tokens, None)]))).collect();
        // Prompts in chunks beside single tokens, out of step with each other.
        let chunks = [[20, 1, 39], [1, 58, 1], [7, 52, 1], [1, 1, 58], [33, 26, 1], [10, 10, 40], [57, 2, 1]];
        let (mut done, mut together) = ([0; 7], vec![Vec::new(); 7]);
        for round in 0..3 {
            let parts: Vec<Next<'_>> = (0..7)
                .map(|slot| (slot, done[slot], &tokens[slot][done[slot]..][..chunks[slot][round]], None))
                .collect();
            let mut rest = group.step(&batch(&parts));
            for slot in 0..7 {
                let others = rest.split_off(chunks[slot][round] * vocab);
                together[slot].extend(std::mem::replace(&mut rest, others));
                done[slot] += chunks[slot][round];
            }
        }
        for (slot, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert!(alone == together, "{precision:?} on {ranks} ranks: sequence {slot}");
        }
    }
}

#[test]
fn blocks_leave_and_come_back_with_the_parts_of_all_ranks() {
    for (tiny, ranks) in [(LEGACY, 2), (LEGACY, 4), (FLOATS, 3)] {
        let weights = weights(tiny);
        let [mut from, mut to] = [(); 2].map(|()| group(&weights, Precision::Fast, ranks));
        let tokens = words(2 * BLOCK, from.spec().vocab, 1);
        let read = |group: &mut Group, table: &[u32], tokens: &[u32], start: u32| {
            let mut batch = Batch::default();
            batch.push(tokens, start, table, 0..tokens.len() as u32);
            group.step(&batch)
        };
        read(&mut from, &[5, 9], &tokens, 0);
        let expected = read(&mut from, &[5, 9, 2], &[1, 2, 3], 2 * BLOCK as u32);
        let mut bytes = vec![0; from.block_bytes()];
        for (old, new) in [(5, 70), (9, 3)] {
            from.export(old, &mut bytes);
            assert!(bytes.chunks(bytes.len() / ranks).all(|part| part.iter().any(|&byte| byte != 0)));
            to.import(new, &bytes);
            let mut again = vec![0; to.block_bytes()];
            to.export(new, &mut again);
            assert!(bytes == again);
        }
        assert!(read(&mut to, &[70, 3, 1], &[1, 2, 3], 2 * BLOCK as u32) == expected, "{ranks} ranks");
        from.copy(5, 20);
        from.copy(9, 21);
        assert!(read(&mut from, &[20, 21, 22], &[1, 2, 3], 2 * BLOCK as u32) == expected, "{ranks} ranks, copied");
        assert!(read(&mut from, &[20, 1, 22], &[1, 2, 3], 2 * BLOCK as u32) != expected, "KV that counts");
    }
}

#[test]
fn adapters_are_cut_as_the_matrices_are() {
    let golden = |file: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file);
    let weights = Weights::open(&golden("tiny-llama")).unwrap();
    let spec = weights.spec().unwrap();
    let adapters = ["all", "wide", "late"]
        .map(|name| Arc::new(Adapter::open(&golden("tiny-llama-lora").join(name), Shape::of(&spec)).unwrap()));
    let tokens = words(40, spec.vocab, 3);
    let of = [None, Some(&adapters[0]), Some(&adapters[1]), None, Some(&adapters[2]), Some(&adapters[0])];
    let parts: Vec<Next<'_>> = of.iter().enumerate().map(|(slot, of)| (slot, 0, &tokens[..40 - slot], *of)).collect();
    let mut one = Decoder::open(&weights, spec.clone(), &options(&spec, Precision::Plain, 2), &|_| ()).unwrap();
    let expected = one.step(&batch(&parts));
    for ranks in [2, 4] {
        let mut group = group(&weights, Precision::Plain, ranks);
        assert!(adapters.iter().all(|adapter| group.takes(adapter)));
        let found = group.step(&batch(&parts));
        let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let off = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off <= SUMS * largest, "{ranks} ranks: {off}");
        let mut first = 0;
        for part in &parts {
            let alone = group.step(&batch(&[*part]));
            assert!(alone == found[first..first + alone.len()], "{ranks} ranks: sequence {} alone", part.0);
            first += alone.len();
        }
    }
    // Heads that are narrower than a panel: a rank would begin in the middle of one.
    let narrow = Tiny { dim: 8, heads: 4, kv_heads: 4, ..FLOATS };
    let weights = self::weights(narrow);
    let mut group = group(&weights, Precision::Plain, 4);
    assert!(!group.takes(&adapters[0]));
    let refused = group.forward(&batch(&[(0, 0, &[1], Some(&adapters[0]))])).map(|_| ()).unwrap_err();
    assert!(refused.message().contains("cannot be computed"), "{refused}");
}

#[test]
fn a_rank_that_dies_ends_the_group_and_nobody_waits() {
    let weights = weights(LEGACY);
    for ranks in [2, 4] {
        for dying in [0, 1, ranks - 1] {
            let mut group = group(&weights, Precision::Fast, ranks);
            let step = batch(&[(0, 0, &[1, 2, 3], None)]);
            let wrong = group.forward(&batch(&[(0, 0, &[1_000_000], None)])).map(|_| ()).unwrap_err();
            assert!(wrong.message().contains("token 1000000"), "{wrong}");
            let (before, mut errands) = (group.step(&step), 0);
            let beside = group.forward_beside(&step, &mut || errands += 1).unwrap().0.to_vec();
            assert_eq!((beside, errands), (before.clone(), 1));
            assert_eq!(group.step(&step), before, "a batch that is refused harms nobody");
            group.doomed.store(dying, std::sync::atomic::Ordering::Relaxed);
            for _ in 0..3 {
                let error = group.forward(&step).map(|_| ()).unwrap_err();
                assert!(error.message().contains(&format!("rank {dying} of this model died")), "{error}");
                assert!(error.message().contains("asked to die"), "{error}");
            }
        }
    }
}

#[test]
fn numbers_that_are_not_possible_are_told_with_those_that_are() {
    let check = |tiny: Tiny, ranks: usize, words: &[&str]| {
        let weights = weights(tiny);
        let error = Division::new(&weights, &weights.spec().unwrap(), ranks).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), crate::base::Kind::BadInput);
        assert!(error.message().starts_with(&format!("tensor_parallel = {ranks} is not possible")), "{error}");
        for words in words {
            assert!(error.message().contains(words), "{error} / {words}");
        }
    };
    check(LEGACY, 3, &["8 query heads", "1, 2 and 4 are"]);
    check(LEGACY, 0, &["8 query heads"]);
    check(LEGACY, 8, &["feed-forward of 224 has fewer units of 32", "1, 2 and 4 are"]);
    check(FLOATS, 2, &["3 key-value heads can neither be divided nor repeated", "1, 3 and 6 are"]);
    check(K, 4, &["blk.0.attn_output.weight is", "blocks of 256", "128 wide", "1 and 2 are"]);
    check(Tiny { vocab: 20, ..LEGACY }, 4, &["vocabulary of 20 has fewer units of 16", "1 and 2 are"]);
    check(Tiny { heads: 3, kv_heads: 3, ffn: 32, ..LEGACY }, 3, &["feed-forward of 32", "only 1 is"]);
}

#[test]
fn what_cannot_be_opened_is_the_error_of_all() {
    let weights = weights(LEGACY);
    let spec = weights.spec().unwrap();
    let division = Division::new(&weights, &spec, 2).unwrap();
    let options = DecoderOptions { kv_bytes: 10, ..options(&spec, Precision::Fast, 2) };
    let error = Group::open(&weights, &division, &options, &|_| ()).map(|_| ()).unwrap_err();
    assert!(error.message().contains("kv_bytes"), "{error}");
}
