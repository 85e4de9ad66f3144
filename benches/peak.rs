//! What this machine can do at most: int8 and f32 arithmetic from registers, and reading memory. The yardstick for what the
//! other benchmarks reach.
//!
//!     cargo bench --bench peak [-- THREADS]
//!
//! Best of several rounds, all threads at once: a peak is what happens when nothing else does.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use neurond::kernel::{Buffer, Isa};

const ROUNDS: usize = 7;
const TURNS: usize = 2_000_000;

fn main() {
    let threads = std::env::args().filter_map(|argument| argument.parse().ok()).next();
    let threads = threads.or(std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    println!("{threads} threads");
    for &isa in Isa::available() {
        let (int8, float) = arithmetic(isa);
        // An operation is a multiplication or an addition.
        let rate = |work: fn(usize) -> u64, ops: usize| {
            let best = best(threads, |_| {
                black_box(work(black_box(TURNS)));
            });
            (threads * TURNS * ops) as f64 / best.as_secs_f64() / 1e9
        };
        println!("{isa:<12} int8 {:>7.0} GOP/s   f32 {:>7.0} GFLOP/s", rate(int8.0, int8.1), rate(float.0, float.1));
    }
    for (name, bytes) in [("L1", 16 << 10), ("L2", 512 << 10), ("L3", 8 << 20), ("memory", 256 << 20)] {
        let buffers: Vec<Buffer<u32>> = (0..threads)
            .map(|_| {
                let mut buffer = Buffer::zeroed(bytes / 4);
                buffer.fill(1);
                buffer
            })
            .collect();
        let passes = ((1usize << 30) / bytes).max(1);
        let best = best(threads, |thread| {
            for _ in 0..passes {
                black_box(read(black_box(&buffers[thread])));
            }
        });
        let gigabytes = (threads * passes * bytes) as f64 / 1e9;
        println!("read {name:<8} {:>7.1} GB/s", gigabytes / best.as_secs_f64());
    }
}

/// The shortest time in which all threads, started together, did `work`.
fn best(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let round = || {
        let start = Barrier::new(threads);
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let (start, work) = (&start, &work);
                    scope.spawn(move || {
                        start.wait();
                        let begin = Instant::now();
                        work(thread);
                        begin.elapsed()
                    })
                })
                .collect();
            handles.into_iter().filter_map(|handle| handle.join().ok()).max().unwrap_or(Duration::MAX)
        })
    };
    (0..ROUNDS).map(|_| round()).min().unwrap_or(Duration::MAX)
}

/// Sixteen sums a turn, so that additions do not wait for each other.
fn read(values: &[u32]) -> u32 {
    let mut sums = [0u32; 128];
    for chunk in values.as_chunks::<128>().0 {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}

/// A loop of `turns` turns, and the operations of a turn.
type Loop = (fn(usize) -> u64, usize);

/// The loops of an instruction set: int8 and f32.
fn arithmetic(isa: Isa) -> (Loop, Loop) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY (all six): the set comes from `Isa::available`.
        Isa::Amx => (
            (|turns| unsafe { x86::int8_tiles(turns) }, 4 * 16 * 16 * 64 * 2),
            (|turns| unsafe { x86::float_512(turns) }, 12 * 16 * 2),
        ),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (
            (|turns| unsafe { x86::int8_512(turns) }, 12 * 64 * 2),
            (|turns| unsafe { x86::float_512(turns) }, 12 * 16 * 2),
        ),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (
            (|turns| unsafe { x86::int8_256(turns) }, 12 * 32 * 2),
            (|turns| unsafe { x86::float_256(turns) }, 12 * 8 * 2),
        ),
        _ => ((portable_int8, 128 * 2), (portable_float, 64 * 2)),
    }
}

fn portable_int8(turns: usize) -> u64 {
    let (mut sums, a, b) = ([0i32; 128], black_box([3u8; 128]), black_box([-2i8; 128]));
    for _ in 0..turns {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = sum.wrapping_add(i32::from(a) * i32::from(b));
        }
        black_box(&mut sums);
    }
    sums.iter().fold(0, |all, sum| all ^ *sum as u64)
}

fn portable_float(turns: usize) -> u64 {
    let (mut sums, a, b) = ([0f32; 64], black_box([1.5f32; 64]), black_box([0.5f32; 64]));
    for _ in 0..turns {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
        black_box(&mut sums);
    }
    sums.iter().fold(0, |all, sum| all ^ u64::from(sum.to_bits()))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Four independent chains of 16 rows times 16 channels, 64 deep.
    pub(super) unsafe fn int8_tiles(turns: usize) -> u64 {
        #[repr(align(64))]
        struct Shapes([u8; 64]);
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        shapes.0[16..32].iter_mut().step_by(2).for_each(|line_bytes| *line_bytes = 64);
        shapes.0[48..56].fill(16);
        let mut sums = [0u32; 16 * 16];
        // SAFETY: tiles of 16 lines of 64 bytes, and memory for one of them.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", "tilezero tmm4", "tilezero tmm5",
                "2:",
                "tdpbssd tmm0, tmm4, tmm5",
                "tdpbssd tmm1, tmm4, tmm5",
                "tdpbssd tmm2, tmm4, tmm5",
                "tdpbssd tmm3, tmm4, tmm5",
                "dec {turns}",
                "jnz 2b",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilerelease",
                shapes = in(reg) &shapes,
                sums = in(reg) &mut sums,
                line = in(reg) 64usize,
                turns = inout(reg) turns.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                options(nostack),
            );
        }
        u64::from(sums[0])
    }

    /// Twelve independent chains of one instruction.
    macro_rules! chains {
        ($(#[$feature:meta])* $name:ident, $zero:expr, |$acc:ident| $step:expr, $fold:expr) => {
            $(#[$feature])*
            pub(super) unsafe fn $name(turns: usize) -> u64 {
                let mut sums = [$zero; 12];
                for _ in 0..turns {
                    for sum in &mut sums {
                        let $acc = *sum;
                        *sum = $step;
                    }
                }
                sums.into_iter().fold(0u64, |all, sum| all ^ $fold(sum))
            }
        };
    }

    chains!(
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        int8_512,
        _mm512_setzero_si512(),
        |acc| _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(3), _mm512_set1_epi8(-2)),
        |sum| _mm512_reduce_add_epi32(sum) as u64
    );
    chains!(
        #[target_feature(enable = "avx512f")]
        float_512,
        _mm512_setzero_ps(),
        |acc| _mm512_fmadd_ps(_mm512_set1_ps(1.5), _mm512_set1_ps(0.5), acc),
        |sum| u64::from(_mm512_reduce_add_ps(sum).to_bits())
    );
    chains!(
        #[target_feature(enable = "avx2")]
        int8_256,
        _mm256_setzero_si256(),
        |acc| {
            // What AVX2 has: products in pairs to 16 bits, pairs of those to 32, and the addition.
            let pairs = _mm256_maddubs_epi16(acc, _mm256_set1_epi8(-2));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        },
        |sum| _mm256_extract_epi64::<0>(sum) as u64
    );
    chains!(
        #[target_feature(enable = "avx2,fma")]
        float_256,
        _mm256_setzero_ps(),
        |acc| _mm256_fmadd_ps(_mm256_set1_ps(1.5), _mm256_set1_ps(0.5), acc),
        |sum| _mm256_extract_epi64::<0>(_mm256_castps_si256(sum)) as u64
    );
}
