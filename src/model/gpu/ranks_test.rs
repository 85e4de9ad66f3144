//! Ranks on emulated cards against one card, against themselves, and on the way to their end.

use std::sync::atomic::Ordering;

use super::super::tests::{BLOCK, BLOCKS, logits, options, part, weights};
use super::super::{GpuDecoder, GpuOptions, KvSize, Launched, Source, TIMED_EVERY};
use super::*;
use crate::base::Kind;
use crate::config::{Format, Packing};
use crate::kernel::Dtype;
use crate::kernel::gpu::{EmulatedCard, Wish};
use crate::model::spec::DecoderSpec;
use crate::model::tests_support::Tiny;
use crate::model::weights::Weights;
use crate::model::{Batch, Group, Synthetic, synthetic};

/// Two KV heads for four query heads, interleaved; a vocabulary that no number of ranks divides, the head tied to it.
const LLAMA: Tiny = Tiny {
    arch: "llama",
    hidden: 192,
    heads: 4,
    kv_heads: 2,
    dim: 64,
    ffn: 320,
    vocab: 301,
    tied: true,
    dtypes: &[Dtype::F32, Dtype::F16, Dtype::BF16],
};
/// Biases, a head of its own, blocks of 32 whose cuts are those of 4 bits.
const QWEN: Tiny = Tiny {
    arch: "qwen2",
    hidden: 256,
    heads: 8,
    kv_heads: 2,
    dim: 64,
    ffn: 512,
    vocab: 128,
    tied: false,
    dtypes: &[Dtype::Q4_0],
};

/// Outcomes that are normed before they are added, windows.
const GEMMA: Tiny = Tiny { arch: "gemma3", dtypes: &[Dtype::BF16], ..LLAMA };

fn cards(ranks: usize) -> Vec<Box<dyn Card>> {
    EmulatedCard::ranks(ranks).into_iter().map(|card| Box::new(card) as Box<dyn Card>).collect()
}

fn group_of(source: Source<'_>, spec: &DecoderSpec, ranks: usize, options: &GpuOptions) -> Group<GpuDecoder> {
    let division = Division::on_gpus(spec, ranks, options.weights).unwrap();
    let group = Group::open_on_gpus(cards(ranks), source, &division, options, &|_| ()).unwrap();
    assert_eq!(group.ranks(), ranks);
    group
}

fn group(weights: &Weights, ranks: usize, packing: Packing, kv: Format) -> Group<GpuDecoder> {
    let options = options(packing, kv, KvSize::Blocks(BLOCKS));
    group_of(Source::File(weights), &weights.spec().unwrap(), ranks, &options)
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

/// A group computes what one card does: prompts, chunks beside single rows, steps that are repeated as a whole; and it draws the same.
fn check_same(tiny: &Tiny, packing: Packing, kv: Format, ranks: usize, most: f32) {
    let weights = weights(tiny);
    let options = options(packing, kv, KvSize::Blocks(BLOCKS));
    let one = Box::new(EmulatedCard::new(2));
    let spec = weights.spec().unwrap();
    let mut one = GpuDecoder::open(one, Source::File(&weights), spec, &options, &|_| ()).unwrap();
    let mut group = group(&weights, ranks, packing, kv);
    let vocab = one.spec().vocab;
    // Slot, position and rows of each sequence; how they are launched.
    type Step<'a> = (&'a [(usize, usize, usize)], Launched);
    let steps: [Step<'_>; 7] = [
        (&[(0, 0, 70), (1, 0, 1)], Launched::Eager),
        (&[(1, 1, 1), (0, 70, 20), (2, 0, 33)], Launched::Eager),
        (&[(0, 90, 1), (1, 2, 1), (2, 33, 1)], Launched::Noted),
        (&[(2, 34, 1)], Launched::Noted),
        (&[(2, 35, 1), (0, 91, 1), (1, 3, 1)], Launched::Replayed),
        (&[(0, 92, 1)], Launched::Replayed),
        (&[(1, 4, 1), (2, 36, 1), (0, 93, 1)], Launched::Replayed),
    ];
    let (mut ties, mut furthest) = (0, 0f32);
    for (at, (parts, launched)) in steps.into_iter().enumerate() {
        let mut batch = Batch::default();
        parts.iter().for_each(|&(slot, start, count)| part(&mut batch, slot, start, count, vocab));
        let expected = logits(one.forward(&batch, &mut || ()).unwrap());
        let mut errands = 0;
        let mut found = group.forward(&batch, &mut || errands += 1).unwrap();
        let rows: Vec<usize> = (0..found.rows()).collect();
        let values = found.land(&rows).unwrap().0.to_vec();
        let wishes = vec![Wish::default(); rows.len()];
        let drawn = found.draw(&wishes, &[], std::iter::empty()).unwrap();
        let (drawn, found): (Vec<i32>, _) = (drawn.iter().map(|drawn| drawn.token).collect(), values);
        assert_eq!((group.launched(), errands, found.len()), (launched, 1, expected.len()), "step {at}");
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
        let off = (square(&mut found.iter().zip(&expected).map(|(a, b)| a - b))
            / square(&mut expected.iter().copied()))
        .sqrt();
        furthest = furthest.max(off);
        assert!(off < most, "step {at} in {packing:?} with KV in {kv:?} on {ranks} ranks is off by {off}");
        for (row, (expected, found)) in expected.chunks(vocab).zip(found.chunks(vocab)).enumerate() {
            let token = best(expected);
            assert_eq!(best(found), drawn[row] as usize);
            if drawn[row] as usize != token {
                // Two tokens that were nearly even.
                let size = (square(&mut expected.iter().copied()) / vocab as f32).sqrt();
                assert!(expected[token] - expected[best(found)] < 4.0 * most * size, "step {at}, row {row}");
                ties += 1;
            }
        }
    }
    println!("{} {packing:?} {kv:?} on {ranks} ranks: {furthest:.1e}, {ties} ties", tiny.arch);
    assert!(ties <= 1, "{ties} tokens differ");
}

#[test]
fn ranks_compute_what_one_card_does() {
    for (tiny, ranks) in [(&LLAMA, 2), (&LLAMA, 4), (&GEMMA, 2), (&QWEN, 4)] {
        check_same(tiny, Packing::Bf16, Format::Bf16, ranks, 0.04);
    }
}

/// Of a matrix whose inputs are cut, each rank has scales of its own; 4 bits stay those of the file.
#[test]
fn ranks_compute_with_fewer_bits_too() {
    check_same(&LLAMA, Packing::Fp8, Format::Fp8, 2, 0.3);
    check_same(&QWEN, Packing::Q4, Format::Bf16, 4, 0.04);
}

#[test]
fn weights_are_made_up_by_each_rank() {
    let Synthetic { spec, accept } = synthetic("tiny,accept=1").unwrap();
    for packing in [Packing::Bf16, Packing::Fp8] {
        let options = GpuOptions { accept, ..options(packing, Format::Bf16, KvSize::Blocks(BLOCKS)) };
        let mut group = group_of(Source::Random, &spec, 2, &options);
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7, 8], 0, &[1], [0, 1, 2, 3]);
        let found = logits(group.forward(&batch, &mut || ()).unwrap());
        for row in found.chunks(spec.vocab) {
            // Words of both ranks.
            for half in row.chunks(spec.vocab / 2) {
                let square = half.iter().map(|logit| logit * logit).sum::<f32>() / half.len() as f32;
                assert!((0.1..10.0).contains(&square), "{packing:?}: mean square {square}");
            }
            assert_ne!(row[..spec.vocab / 2], row[spec.vocab / 2..]);
        }
        let mut logits = group.forward(&batch, &mut || ()).unwrap();
        let drawn = logits.draw(&[Wish::default(); 4], &[], std::iter::empty()).unwrap();
        assert_eq!(drawn[..3].iter().map(|drawn| drawn.token).collect::<Vec<_>>(), [6, 7, 8], "drafts come true");
    }
    let large = synthetic("llama-3.3-70b").unwrap().spec;
    for (ranks, packing) in [(2, Packing::Q4), (4, Packing::Fp8), (8, Packing::Bf16), (16, Packing::Fp8)] {
        Division::on_gpus(&large, ranks, packing).unwrap();
    }
}

#[test]
fn what_gpus_cannot_be_divided_into_is_told() {
    let spec = weights(&LLAMA).spec().unwrap();
    let check = |ranks, packing, words: &[&str]| {
        let error = Division::on_gpus(&spec, ranks, packing).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().starts_with(&format!("tensor_parallel = {ranks} is not possible")), "{error}");
        assert!(words.iter().all(|words| error.message().contains(words)), "{error}");
    };
    check(3, Packing::Bf16, &["4 query heads", "1, 2 and 4 are"]);
    check(4, Packing::Q4, &["heads of a rank are 64 wide, and GPU kernels take multiples of 128", "1 and 2 are"]);
    let error = Group::open_on_gpus(
        cards(1),
        Source::Random,
        &Division::on_gpus(&spec, 2, Packing::Bf16).unwrap(),
        &options(Packing::Bf16, Format::Bf16, KvSize::Blocks(1)),
        &|_| (),
    );
    assert!(error.map(|_| ()).unwrap_err().message().contains("1 cards for 2 ranks"));
}

/// What one rank cannot have is the error of all.
#[test]
fn a_rank_that_cannot_be_opened_holds_nobody_up() {
    let odd = Tiny { ffn: 272, ..LLAMA };
    let weights = weights(&odd);
    let spec = weights.spec().unwrap();
    let division = Division::on_gpus(&spec, 2, Packing::Bf16).unwrap();
    let options = options(Packing::Bf16, Format::Bf16, KvSize::Blocks(BLOCKS));
    let opened = Group::open_on_gpus(cards(2), Source::File(&weights), &division, &options, &|_| ());
    let error = opened.map(|_| ()).unwrap_err();
    assert!(error.kind() == Kind::Unsupported && error.message().contains("feed-forward of"), "{error}");
    assert!(error.message().contains("rank 1 of 2"), "{error}");
}

/// A draft model is to lie beside rank 0: all have as many blocks as that has room for.
#[test]
fn every_rank_has_as_many_blocks_as_the_smallest() {
    let weights = weights(&LLAMA);
    let spec = weights.spec().unwrap();
    let blocks = |beside: usize| {
        let size = KvSize::Share { share: 0.5, beside, each: 0 };
        group_of(Source::File(&weights), &spec, 2, &options(Packing::Bf16, Format::Bf16, size))
    };
    let (alone, beside) = (blocks(0), blocks(24 << 20));
    // Half of the heads each.
    let block = 2 * spec.layers * spec.kv_width() / 2 * BLOCK * 2;
    assert_eq!(alone.block_bytes(), 2 * block);
    assert_eq!(alone.blocks() - beside.blocks(), (32 << 20) / block - (8 << 20) / block);
}

#[test]
fn blocks_leave_and_come_back_with_the_parts_of_all_ranks() {
    for ranks in [2, 4] {
        let weights = weights(&LLAMA);
        let mut group = group(&weights, ranks, Packing::Bf16, Format::Bf16);
        let mut first = Batch::default();
        first.push(&(0..20).collect::<Vec<u32>>(), 0, &[3, 5], [19]);
        group.forward(&first, &mut || ()).unwrap();
        let next = |group: &mut Group<GpuDecoder>, table: &[u32]| {
            let mut batch = Batch::default();
            batch.push(&[7], 20, table, [0]);
            logits(group.forward(&batch, &mut || ()).unwrap())
        };
        let expected = next(&mut group, &[3, 5]);
        group.copy(3, 9);
        group.copy(5, 1);
        assert_eq!(next(&mut group, &[9, 1]), expected);
        let mut content = vec![0; group.block_bytes()];
        group.export(9, &mut content);
        assert!(content.chunks(content.len() / ranks).all(|part| part.iter().any(|&byte| byte != 0)));
        group.import(20, &content);
        assert_eq!(next(&mut group, &[20, 1]), expected);
        assert_ne!(next(&mut group, &[1, 20]), expected);
    }
}

/// All ranks launch a step in the same way, whether anybody asks for its parts or not.
#[test]
fn steps_are_timed_on_all_ranks_at_once() {
    let spec = synthetic("tiny").unwrap().spec;
    let options = options(Packing::Bf16, Format::Bf16, KvSize::Blocks(BLOCKS));
    let mut group = group_of(Source::Random, &spec, 2, &options);
    let mut batch = Batch::default();
    batch.push(&[7], 0, &[1], [0]);
    let first = logits(group.forward(&batch, &mut || ()).unwrap());
    let mut timed = Vec::new();
    for step in 2..=2 * TIMED_EVERY {
        assert_eq!(logits(group.forward(&batch, &mut || ()).unwrap()), first);
        assert_eq!(group.launched() == Launched::Eager, step.is_multiple_of(TIMED_EVERY));
        if let Some(parts) = group.parts().unwrap() {
            assert!(parts.iter().all(|&seconds| seconds > 0.0), "{parts:?}");
            timed.push(step);
        }
    }
    assert_eq!(timed, [TIMED_EVERY, 2 * TIMED_EVERY]);
}

#[test]
fn a_rank_that_dies_ends_the_group_and_nobody_waits() {
    let weights = weights(&LLAMA);
    for ranks in [2, 4] {
        for dying in [0, 1, ranks - 1] {
            let mut group = group(&weights, ranks, Packing::Bf16, Format::Bf16);
            let mut step = Batch::default();
            step.push(&[1, 2, 3], 0, &[0], [2]);
            let before = logits(group.forward(&step, &mut || ()).unwrap());
            let mut wrong = Batch::default();
            wrong.push(&[1], 0, &[BLOCKS as u32], [0]);
            assert!(group.forward(&wrong, &mut || ()).err().unwrap().message().contains("block 24 of 24"));
            assert_eq!(logits(group.forward(&step, &mut || ()).unwrap()), before, "a refused batch harms nobody");
            group.doomed.store(dying, Ordering::Relaxed);
            for _ in 0..2 {
                let error = group.forward(&step, &mut || ()).err().unwrap();
                assert!(error.message().contains(&format!("rank {dying} of this model died")), "{error}");
            }
        }
    }
}

/// Says so where there are not two GPUs: a machine that has them runs the same steps on them.
#[cfg(feature = "cuda")]
#[test]
fn real_cards_compute_the_same_together() {
    use crate::kernel::gpu::{count, open, open_ranks};
    let ranks = match count(&[""]) {
        Ok(count @ 2..) => {
            if count >= 4 {
                4
            } else {
                2
            }
        }
        Ok(count) => return eprintln!("not run: {count} GPUs"),
        Err(error) => return eprintln!("not run: {error}"),
    };
    for (packing, kv, most) in [(Packing::Bf16, Format::Bf16, 0.03), (Packing::Fp8, Format::Fp8, 0.25)] {
        let weights = weights(&LLAMA);
        let options = options(packing, kv, KvSize::Blocks(BLOCKS));
        let spec = weights.spec().unwrap();
        let mut one =
            GpuDecoder::open(open(0).unwrap(), Source::File(&weights), spec.clone(), &options, &|_| ()).unwrap();
        let division = Division::on_gpus(&spec, ranks, packing).unwrap();
        let cards = open_ranks(&(0..ranks as u16).collect::<Vec<_>>()).unwrap();
        let mut group = Group::open_on_gpus(cards, Source::File(&weights), &division, &options, &|_| ()).unwrap();
        let mut done = 0;
        for count in [60, 1, 1, 1, 20, 1] {
            let mut batch = Batch::default();
            part(&mut batch, 0, done, count, spec.vocab);
            done += count;
            let expected = logits(one.forward(&batch, &mut || ()).unwrap());
            let found = logits(group.forward(&batch, &mut || ()).unwrap());
            let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            let off = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
            assert!(off < 2.0 * most, "{count} rows in {packing:?} are off by {off}");
        }
        // One that dies holds up neither the others nor their end.
        group.doomed.store(1, Ordering::Relaxed);
        let mut batch = Batch::default();
        part(&mut batch, 0, done, 1, spec.vocab);
        assert!(group.forward(&batch, &mut || ()).err().unwrap().message().contains("rank 1 of this model died"));
    }
}
