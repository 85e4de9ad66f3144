//! The block manager: taking and giving back, finding a prefix, naming blocks.
//!
//!     cargo bench --bench blocks

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use neurond::engine::blocks::{BlockHash, Blocks};

const TOTAL: usize = 32_768;
const TOKENS: usize = 16;
/// Blocks of a prompt of 8,192 tokens.
const PROMPT: usize = 512;

fn chain(first: u32) -> Vec<BlockHash> {
    let mut hash = BlockHash::root(0, 0);
    (0..PROMPT as u32).map(|block| (hash = hash.then(&[first + block; TOKENS]), hash).1).collect()
}

fn blocks(c: &mut Criterion) {
    let mut group = c.benchmark_group("blocks");
    group.throughput(Throughput::Elements(PROMPT as u64));

    group.bench_function("name", |b| b.iter(|| chain(black_box(1))));

    // Every block of the pool is cached, so that each taken one is forgotten first.
    let mut pool = Blocks::new(TOTAL, TOKENS);
    let mut table = Vec::with_capacity(PROMPT);
    let mut next = 0;
    group.bench_function("take, publish, release", |b| {
        b.iter_batched(
            || {
                next += PROMPT as u32;
                chain(next)
            },
            |hashes| {
                assert!(pool.take(PROMPT, &mut table));
                table.iter().zip(hashes).for_each(|(&block, hash)| pool.publish(block, hash));
                pool.release(&mut table);
            },
            criterion::BatchSize::SmallInput,
        )
    });

    let hashes = chain(7);
    assert!(pool.take(PROMPT, &mut table));
    table.iter().zip(&hashes).for_each(|(&block, &hash)| pool.publish(block, hash));
    pool.release(&mut table);
    group.bench_function("find, adopt, release", |b| {
        b.iter(|| {
            for &hash in &hashes {
                if let Some(block) = pool.find(black_box(hash)) {
                    pool.adopt(block);
                    table.push(block);
                }
            }
            assert_eq!(table.len(), PROMPT);
            pool.release(&mut table);
        })
    });
    group.finish();
}

criterion_group!(benches, blocks);
criterion_main!(benches);
