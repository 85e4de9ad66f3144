//! Rows drawn on an emulated GPU, against the same logits drawn by the host.

use std::sync::Arc;

use parking_lot::Mutex;

use super::*;
use crate::config::{Format, Packing, PromptKernel};
use crate::engine::Logits;
use crate::engine::sampler::{Drawn, Sampler};
use crate::engine::seen::Seen;
use crate::kernel::gpu::EmulatedCard;
use crate::kernel::{Dtype, Pool};
use crate::model::tests_support::Tiny;
use crate::model::weights::Weights;
use crate::model::{Batch, GpuDecoder, GpuOptions, KvSize, Source, Vocabulary};
use crate::task::{Dry, Sampling};

const ROWS: usize = 5;
const TINY: Tiny = Tiny {
    arch: "llama",
    hidden: 64,
    heads: 1,
    kv_heads: 1,
    dim: 64,
    ffn: 64,
    vocab: 301,
    tied: false,
    dtypes: &[Dtype::F32],
};

fn decoder() -> GpuDecoder {
    let folder = tempfile::tempdir().unwrap();
    let weights = Weights::open(&TINY.file(3).write(folder.path())).unwrap();
    let options = GpuOptions {
        pool: Arc::new(Pool::new(1)),
        weights: Packing::Bf16,
        kv: Format::Bf16,
        prompt_kernel: PromptKernel::Warps,
        kv_size: KvSize::Blocks(4),
        block_tokens: 16,
        max_rows: 16,
        max_sample_rows: 8,
        max_sequences: 2,
        context: 64,
        accept: None,
    };
    let spec = weights.spec().unwrap();
    GpuDecoder::open(Box::new(EmulatedCard::new(3)), Source::File(&weights), spec, &options, &|_| ()).unwrap()
}

/// The rows of one text, each with its logits.
fn batch() -> Batch {
    let mut batch = Batch::default();
    batch.push(&(40..40 + ROWS as u32).collect::<Vec<_>>(), 0, &[2], 0..ROWS as u32);
    batch
}

/// Draws the rows on the device, in wishes that differ from row to row, and on the host: the same.
fn check(decoder: &mut GpuDecoder, sampler: &mut Sampler, sampling: &Sampling, logprobs: Option<u32>) -> Vec<Drawn> {
    let vocabulary = Arc::new(Vocabulary::new((0..301).map(|word| format!("w{word}")), vec![]));
    let prompt: Vec<u32> = (0..60).map(|at| at * 7 % 50).collect();
    let mut seen = Seen::new(&prompt, sampling, &vocabulary);
    [7, 9, 7, 300, 8, 7, 9].into_iter().for_each(|token| seen.push(token));
    let seen = Seen::needed(sampling).then(|| Mutex::new(seen));
    let mask: Vec<u32> = (0..10).map(|word| 0x5555_5555 << (word % 2)).collect();
    let ahead = [9, 8];
    let draw = |row: usize| {
        let draw = Draw {
            sampling,
            seed: 77 + row as u64,
            position: 3 * row as u64,
            seen: seen.as_ref(),
            ahead: if row == 2 { &ahead } else { &[] },
            logprobs,
            mask: (row == 3).then_some(&mask[..if logprobs.is_some() { 10 } else { 6 }]),
            given: (row == 1 && logprobs.is_some()).then_some(12),
        };
        (row != 4).then_some(draw)
    };
    let vocab = TINY.vocab;
    let batch = batch();
    let mut logits = decoder.forward(&batch, &mut || ()).unwrap();
    let mut data = logits.land(&[0, 1, 2, 3, 4]).unwrap().0.to_vec();
    let pool = Pool::new(1);
    let on_host = Logits::Host { data: &mut data, vocab, pool: &pool };
    let mut host = Sampler::default();
    host.pick(on_host, draw).unwrap();
    let logits = decoder.forward(&batch, &mut || ()).unwrap();
    sampler.pick(Logits::Gpu(logits), draw).unwrap();
    let near = |one: f32, other: f32| (one - other).abs() < 1e-4;
    for (row, (found, expected)) in sampler.drawn().iter().zip(host.drawn()).enumerate().take(4) {
        assert_eq!((found.token, found.top.len()), (expected.token, expected.top.len()), "row {row}, {sampling:?}");
        assert!(near(found.logprob, expected.logprob), "row {row}: {found:?}, {expected:?}, {sampling:?}");
        if row == 1 && logprobs.is_some() {
            assert_eq!(found.rank, expected.rank);
        }
    }
    assert_eq!(sampler.drawn()[4].token, None, "nobody wanted it");
    sampler.drawn().to_vec()
}

#[test]
fn a_gpu_draws_what_the_host_would() {
    let (mut decoder, mut sampler) = (decoder(), Sampler::default());
    let plain = Sampling::default();
    let greedy = Sampling { temperature: 0.0, ..plain.clone() };
    let dry = Dry { multiplier: 2.0, base: 1.5, allowed_length: 1, last_n: None, breakers: vec![] };
    let wishes = [
        greedy.clone(),
        plain.clone(),
        Sampling { top_k: 5, temperature: 1.7, ..plain.clone() },
        Sampling { top_p: 0.6, min_p: 0.01, ..plain.clone() },
        Sampling { repetition_penalty: 1.4, presence_penalty: 0.5, frequency_penalty: 0.2, ..greedy.clone() },
        Sampling {
            frequency_penalty: 0.3,
            penalty_last_n: Some(3),
            logit_bias: vec![(7, 0.4), (7, 0.2), (11, -3.0)],
            ..plain.clone()
        },
        Sampling { typical_p: 0.5, ..plain.clone() },
        Sampling { dry: Some(dry), ..greedy.clone() },
    ];
    let mut tokens = Vec::new();
    for sampling in &wishes {
        for logprobs in [None, Some(0), Some(3)] {
            tokens.extend(check(&mut decoder, &mut sampler, sampling, logprobs).into_iter().map(|drawn| drawn.token));
        }
    }
    tokens.sort_unstable();
    tokens.dedup();
    assert!(tokens.len() > 10, "{tokens:?} is always the same");
}

/// Rows whose edits there is no room for go to the host; so do those that want what the kernel does not do, and no others.
#[test]
fn rows_go_where_they_can_be_drawn() {
    let draw = |sampling, logprobs| Draw {
        sampling,
        seed: 1,
        position: 0,
        seen: None,
        ahead: &[],
        logprobs,
        mask: Some(&[1]),
        given: None,
    };
    let plain = Sampling::default();
    let biased = Sampling { logit_bias: (0..6).map(|token| (token, 1.0)).collect(), ..Sampling::default() };
    let typical = Sampling { typical_p: 0.9, ..Sampling::default() };
    let rows =
        [draw(&plain, None), draw(&biased, Some(0)), draw(&biased, None), draw(&typical, None), draw(&plain, Some(1))];
    let mut wishes = Wishes::default();
    wishes.write(rows.into_iter().map(Some).chain([None]), 10);
    assert_eq!((&wishes.others[..], &wishes.masked[..], wishes.edits.len()), (&[2, 3, 4][..], &[0, 1][..], 6));
    assert_eq!(wishes.rows.iter().map(|wish| wish.given).collect::<Vec<_>>(), [-1, -1, -2, -2, -2, -2]);
    assert!(wishes.any());
    wishes.write([None].into_iter(), 10);
    assert!(!wishes.any() && wishes.others.is_empty());
}
