//! What a row's draw costs by what is asked of it, and what looking back costs a token.
//!
//! ```text
//! cargo bench --bench sampler
//! ```

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use neurond::engine::Logits;
use neurond::engine::sampler::{Draw, Sampler};
use neurond::engine::seen::Seen;
use neurond::kernel::Pool;
use neurond::model::Vocabulary;
use neurond::task::{Dry, Sampling};
use parking_lot::Mutex;

/// Tokens of prompt and answer in front of a draw that looks back.
const HISTORY: u32 = 8192;

/// One row. Logits fall off like a language model's: a few likely tokens, a long tail.
fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("sample a row");
    let pool = Pool::new(1);
    let mut sampler = Sampler::default();
    for vocab in [49_152usize, 128_256] {
        let tail = |id: usize| {
            let noise = (id as u32).wrapping_mul(2_654_435_769) >> 8;
            12.0 - 1.8 * (1.0 + noise as f32 / 16_777_216.0 * vocab as f32).ln()
        };
        let logits: Vec<f32> = (0..vocab).map(tail).collect();
        let (plain, pieces) = (Sampling::default(), vocabulary(vocab));
        group.throughput(Throughput::Elements(vocab as u64));
        for (name, sampling, logprobs) in [
            ("greedy", Sampling { temperature: 0.0, ..plain.clone() }, None),
            ("temperature", plain.clone(), None),
            ("min-p 0.05", Sampling { min_p: 0.05, ..plain.clone() }, None),
            ("top-k 40", Sampling { top_k: 40, ..plain.clone() }, None),
            ("top-p 0.9", Sampling { top_p: 0.9, ..plain.clone() }, None),
            ("top-p 0.9 hot", Sampling { top_p: 0.9, temperature: 2.0, ..plain.clone() }, None),
            ("typical 0.9", Sampling { typical_p: 0.9, ..plain.clone() }, None),
            ("typical 0.9 hot", Sampling { typical_p: 0.9, temperature: 2.0, ..plain.clone() }, None),
            ("typical 0.9 of top-k 40", Sampling { typical_p: 0.9, top_k: 40, ..plain.clone() }, None),
            ("greedy, penalties", Sampling { temperature: 0.0, ..penalised() }, None),
            ("greedy, penalties of 64", Sampling { temperature: 0.0, penalty_last_n: Some(64), ..penalised() }, None),
            ("greedy, penalties, DRY", Sampling { temperature: 0.0, dry: Some(dry()), ..penalised() }, None),
            (
                "everything",
                Sampling { top_k: 40, typical_p: 0.9, top_p: 0.9, min_p: 0.05, dry: Some(dry()), ..penalised() },
                None,
            ),
            ("greedy, 5 logprobs", Sampling { temperature: 0.0, ..plain.clone() }, Some(5)),
        ] {
            let prompt: Vec<u32> = (0..HISTORY).map(|at| word(at, vocab)).collect();
            let seen = Seen::needed(&sampling).then(|| Mutex::new(Seen::new(&prompt, &sampling, &pieces)));
            let mut position = 0;
            group.bench_function(format!("{name}, {vocab}"), |b| {
                b.iter_batched_ref(
                    || logits.clone(),
                    |data| {
                        position += 1;
                        let draw = || Draw {
                            sampling: &sampling,
                            seed: 1,
                            position,
                            seen: seen.as_ref(),
                            ahead: &[],
                            logprobs,
                            mask: None,
                            given: None,
                        };
                        let _ = sampler.pick(Logits::Host { data, vocab, pool: &pool }, |_| Some(draw()));
                        black_box(sampler.drawn()[0].token)
                    },
                    criterion::BatchSize::SmallInput,
                )
            });
        }
    }
    group.finish();
}

/// One more token behind 8,192: what a choice pays for state that is carried along.
fn looking_back(c: &mut Criterion) {
    let mut group = c.benchmark_group("look back");
    let vocab = 49_152;
    let prompt: Vec<u32> = (0..HISTORY).map(|at| word(at, vocab)).collect();
    for (name, sampling) in [
        ("penalties", penalised()),
        ("penalties of 64", Sampling { penalty_last_n: Some(64), ..penalised() }),
        ("DRY", Sampling { dry: Some(dry()), ..Sampling::default() }),
    ] {
        let mut seen = Seen::new(&prompt, &sampling, &vocabulary(vocab));
        let mut at = HISTORY;
        // The deepest of fifteen drafts looks at all those before it, and leaves no trace.
        let drafts: Vec<u32> = (at..at + 15).map(|at| word(at, vocab)).collect();
        group.bench_function(format!("{name}, ahead of 15 drafts"), |b| {
            b.iter(|| seen.behind(&drafts, |seen| black_box(seen.counted().len() + seen.repeats().len())))
        });
        group.bench_function(name, |b| {
            b.iter(|| {
                at += 1;
                seen.push(word(at, vocab));
                black_box(seen.counted().len() + seen.repeats().len())
            })
        });
    }
    group.finish();
}

fn penalised() -> Sampling {
    Sampling { repetition_penalty: 1.1, frequency_penalty: 0.2, presence_penalty: 0.2, ..Sampling::default() }
}

fn dry() -> Dry {
    Dry { multiplier: 0.8, base: 1.75, allowed_length: 2, last_n: None, breakers: vec!["\n".into(), ":".into()] }
}

/// Words as a text has them: few are many.
fn word(at: u32, vocab: usize) -> u32 {
    let noise = f64::from(at.wrapping_mul(2_654_435_769) >> 8) / 16_777_216.0;
    (vocab as f64).powf(noise) as u32 % vocab as u32
}

fn vocabulary(vocab: usize) -> Arc<Vocabulary> {
    Arc::new(Vocabulary::new((0..vocab).map(|id| format!(" {id}")), vec![]))
}

criterion_group!(benches, rows, looking_back);
criterion_main!(benches);
