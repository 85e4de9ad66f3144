//! Kernels alone, on one thread and every instruction set of the machine: matrices by kind and number of rows, and
//! attention by context.
//!
//!     cargo bench --bench kernels [-- FILTER]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use neurond::kernel::{Activations, Arena, Attention, Cpu, Dtype, Isa, KvLayout, KvSpan, Linear, Out, Panels, Pool};
use neurond::kernel::{Query, Source};

/// The feed-forward of the demo model.
const CHANNELS: usize = 1536;
const INPUTS: usize = 512;

fn cpus() -> impl Iterator<Item = Cpu> {
    Isa::available().iter().map(|&isa| Cpu { pool: Arc::new(Pool::new(1)), isa })
}

/// Multiplications a second, `elements` being one multiplication and addition each.
fn matrices(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    for cpu in cpus() {
        for dtype in [Dtype::Q4_1, Dtype::Q4_0, Dtype::Q8_0, Dtype::Q6_K, Dtype::F16, Dtype::F32] {
            // A constant: neither ever NaN nor slow, whatever the format makes of it.
            let bytes = vec![0x11; CHANNELS * dtype.row_bytes(INPUTS).unwrap_or(0)];
            let source = Source { dtype, bytes: &bytes, channels: CHANNELS, inputs: INPUTS };
            let Ok(panels) = Panels::pack(&cpu, &mut Arena::default(), source, false, |channel| channel) else {
                continue;
            };
            let linear = Linear::new(vec![panels], None);
            for rows in [1, 8, 128] {
                let mut x = Activations::new(rows, INPUTS, true);
                x.floats(INPUTS).iter_mut().enumerate().for_each(|(i, x)| *x = (i % 63) as f32 - 31.0);
                x.quantize(&cpu, rows);
                let mut out = vec![0f32; rows * CHANNELS];
                group.throughput(Throughput::Elements((rows * CHANNELS * INPUTS) as u64));
                let id = BenchmarkId::new(format!("{}/{}", cpu.isa, dtype.name()), rows);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| linear.apply(&cpu, &x, rows, Out::Set(black_box(&mut out))));
                });
            }
        }
    }
}

/// Bytes of KV a second, for one decoded row and for a chunk of 64 rows.
fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let layout = KvLayout { heads: 3, dim: 64, block_tokens: 16, half: true };
    let (heads, context) = (9, 1024);
    let table: Vec<u32> = (0..(context / layout.block_tokens) as u32).rev().collect();
    let blocks = vec![0u8; table.len() * layout.block_bytes()];
    for cpu in cpus() {
        for rows in [1, 64] {
            let mut plan = Attention::new(rows);
            plan.plan(std::iter::once(KvSpan { row: 0, rows, start: context - rows, table: 0 }), heads / layout.heads);
            let q = vec![0.5f32; rows * heads * layout.dim];
            let mut out = vec![0f32; q.len()];
            group.throughput(Throughput::Bytes(blocks.len() as u64));
            group.bench_function(BenchmarkId::new(cpu.isa.to_string(), rows), |bencher| {
                bencher.iter(|| {
                    let out = black_box(&mut out[..]);
                    let query = Query { q: &q, stride: heads * layout.dim, heads, scale: 0.125, window: None, out };
                    plan.run(&cpu, &layout, &blocks, &table, query);
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(600));
    targets = matrices, attention
}
criterion_main!(benches);
