//! The kernels for GPUs against references in f64, run by the emulator: random shapes, tails, nothing at all, and threads in
//! four orders, whose results must be the same to the bit.
//!
//! ```text
//! cargo test --features emulate --test kernels
//! ```

#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use neurond::kernel::Gate;
use neurond::kernel::gpu::{
    Adapted, Drawn, Edit, Emulator, Fp8, LORA_RANK, Launcher, Lora, Norm, Normed, Ptr, Scaled, Sink, UNWANTED, Weight,
    Wish, add_rms_norm, copy_blocks, embed, follow, gather_rows, gemm_small, lora, norm_add, pack_q4, put_columns,
    quantize_fp8, random_bf16, sample, scale_product, silu_mul, verify,
};
use neurond::kernel::quant::{Dtype, dequantize_row};

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/encoder.rs"]
mod encoder;

/// Reproducible random numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, end: usize) -> usize {
        (self.bits() >> 11) as usize % end
    }
    /// In -1..1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn bf16(&mut self, count: usize, size: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32(self.value() * size)).collect()
    }
    fn fp8(&mut self, count: usize) -> Vec<Fp8> {
        // No NaN.
        (0..count).map(|_| Fp8(self.bits() as u8)).map(|x| if x.0 & 0x7f == 0x7f { Fp8(0) } else { x }).collect()
    }
}

fn at<T>(slice: &mut [T]) -> Ptr<T> {
    // SAFETY: a test's vectors live until its launches have returned, and launches are over when they return.
    unsafe { Emulator::memory(slice) }
}

/// What runs kernels: the emulator with threads in this order, or a GPU where `NEUROND_TEST_GPU` is set.
fn on(seed: u32) -> &'static dyn Launcher {
    static ORDERS: [Emulator; 8] = [
        Emulator { seed: 0 },
        Emulator { seed: 1 },
        Emulator { seed: 2 },
        Emulator { seed: 3 },
        Emulator { seed: 4 },
        Emulator { seed: 5 },
        Emulator { seed: 6 },
        Emulator { seed: 7 },
    ];
    #[cfg(feature = "cuda")]
    if let Some(card) = real::card() {
        return card;
    }
    &ORDERS[seed as usize]
}

/// The same tests on a GPU: from the first launch on all memory of this process is CUDA's managed memory, so that the vectors of
/// tests are the device's as well. Nothing of it is given back, which tests can bear.
#[cfg(feature = "cuda")]
mod real {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, OnceLock};

    use cudarc::driver::result;
    use cudarc::driver::sys::CUmemAttach_flags;
    use neurond::base::Result;
    use neurond::kernel::gpu::{Boxes, Card, Keys, Launch, Launcher, open};

    /// Address space that is set aside; memory is taken where it is touched.
    const ARENA: usize = 32 << 30;

    struct Managed;

    #[global_allocator]
    static MEMORY: Managed = Managed;
    static BEGIN: AtomicUsize = AtomicUsize::new(0);
    static NEXT: AtomicUsize = AtomicUsize::new(0);

    // SAFETY: each piece of the arena is handed out once; everything else is the system's.
    unsafe impl GlobalAlloc for Managed {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let begin = BEGIN.load(Ordering::Acquire);
            if begin == 0 {
                // SAFETY: the caller's layout.
                return unsafe { System.alloc(layout) };
            }
            let align = layout.align().max(256);
            let at = NEXT
                .fetch_add(layout.size().next_multiple_of(align) + align, Ordering::Relaxed)
                .next_multiple_of(align);
            if at + layout.size() > begin + ARENA { std::ptr::null_mut() } else { at as *mut u8 }
        }

        unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
            let begin = BEGIN.load(Ordering::Acquire);
            if begin == 0 || !(begin..begin + ARENA).contains(&(memory as usize)) {
                // SAFETY: allocated by the system before the arena was there.
                unsafe { System.dealloc(memory, layout) }
            }
        }
    }

    /// A card that is waited for after each launch.
    pub struct Waiting(Mutex<Box<dyn Card>>);

    impl Waiting {
        pub fn has_warpgroups(&self) -> bool {
            self.0.lock().unwrap().has_warpgroups()
        }

        pub fn boxes(&self, data: Keys, dim: usize, shift: u32) -> Option<Boxes> {
            self.0.lock().unwrap().boxes(data, dim, shift).unwrap()
        }
    }

    impl Launcher for Waiting {
        fn launch(&self, launch: Launch) -> Result<()> {
            let card = self.0.lock().unwrap();
            card.launch(launch)?;
            card.marked().map(|_| ())
        }
    }

    pub fn card() -> Option<&'static Waiting> {
        static CARD: OnceLock<Option<Waiting>> = OnceLock::new();
        let begin = || {
            std::env::var_os("NEUROND_TEST_GPU")?;
            neurond::kernel::gpu::count(&[""]).unwrap();
            let card = open(0).unwrap();
            // SAFETY: the card's context is this thread's; the memory is never freed.
            let arena = unsafe { result::malloc_managed(ARENA, CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL) };
            let arena = arena.unwrap() as usize;
            NEXT.store(arena, Ordering::Release);
            BEGIN.store(arena, Ordering::Release);
            Some(Waiting(Mutex::new(card)))
        };
        CARD.get_or_init(begin).as_ref()
    }
}

/// `run(launcher, out)` with threads in four orders: the same to the bit. Returns it.
fn in_any_order<T: Clone + PartialEq + std::fmt::Debug>(
    fresh: &[T],
    run: impl Fn(&dyn Launcher, &mut Vec<T>),
) -> Vec<T> {
    let mut outcomes = (0..4).map(|seed| {
        let mut out = fresh.to_vec();
        run(on(seed), &mut out);
        out
    });
    let first = outcomes.next().unwrap();
    for (order, other) in outcomes.enumerate() {
        assert!(other == first, "the result depends on the order of threads ({})", order + 1);
    }
    first
}

#[track_caller]
fn near(found: f32, expected: f64, relative: f64, absolute: f64, what: &dyn std::fmt::Display) {
    let off = (f64::from(found) - expected).abs();
    assert!(off <= relative * expected.abs() + absolute, "{what}: {found}, and it should be {expected}");
}

/// bf16 has 8 bits: half a unit of the last, and a little for sums in another order.
const BF16: f64 = 1.0 / 256.0;

#[test]
fn fp8_is_what_the_format_says() {
    let known = [
        (0x00, 0.0),
        (0x01, 2f32.powi(-9)),
        (0x08, 2f32.powi(-6)),
        (0x38, 1.0),
        (0x3c, 1.5),
        (0x7e, 448.0),
        (0xb8, -1.0),
    ];
    for (bits, value) in known {
        assert_eq!(Fp8(bits).to_f32(), value);
    }
    assert!(Fp8(0x7f).to_f32().is_nan());
    let values: Vec<f32> = (0..0x7f).map(|bits| Fp8(bits).to_f32()).collect();
    assert!(values.is_sorted());
}

#[test]
fn rows_of_the_embedding() {
    let mut dice = Dice(1);
    for (rows, hidden, first, scale) in [(1, 8, 0, 1.0), (5, 576, 10, 1.0), (3, 4096, 0, 22.5), (0, 64, 0, 1.0)] {
        let words = 30;
        let mut table = dice.bf16(words * hidden, 1.0);
        let mut ids: Vec<i32> = (0..rows).map(|_| dice.below(words + 20) as i32).collect();
        let out = in_any_order(&vec![bf16::NAN; rows * hidden], |on, out| {
            let (mut ids, mut table) = (ids.clone(), table.clone());
            embed(on, rows, at(&mut ids), at(&mut table), hidden, first..first + words, scale, at(out)).unwrap();
        });
        for (row, &id) in ids.iter().enumerate() {
            for i in 0..hidden {
                let word = (id as usize).checked_sub(first).filter(|&word| word < words);
                let expected = word.map_or(0.0, |word| f64::from(table[word * hidden + i].to_f32()) * f64::from(scale));
                near(out[row * hidden + i].to_f32(), expected, BF16, 0.0, &row);
            }
        }
        let wanted: Vec<i32> = (0..rows).map(|_| dice.below(words) as i32).collect();
        let gathered = in_any_order(&vec![bf16::NAN; rows * hidden], |on, out| {
            gather_rows(on, rows, at(&mut table.clone()), at(&mut wanted.clone()), hidden, at(out)).unwrap();
        });
        for (row, &from) in wanted.iter().enumerate() {
            assert_eq!(gathered[row * hidden..][..hidden], table[from as usize * hidden..][..hidden]);
        }
        (table[0], ids) = (bf16::ONE, vec![]);
        assert!(
            ids.is_empty() && embed(on(0), 1, at(&mut ids), at(&mut table), hidden, 0..1, 1.0, Ptr::null()).is_err()
        );
    }
}

#[test]
fn columns_are_put_where_they_belong() {
    let mut dice = Dice(31);
    for (rows, width, first, more) in
        [(0, 8, 0, 0), (1, 0, 4, 8), (1, 8, 16, 0), (3, 4096, 4, 12), (2, 4100, 0, 4), (5, 9000, 64, 36), (2, 24, 8, 0)]
    {
        let stride = first + width + more;
        let x: Vec<f32> = (0..rows * width).map(|_| dice.value()).collect();
        let out = in_any_order(&vec![7.0f32; rows * stride], |on, out| {
            put_columns(on, rows, at(&mut x.clone()), first..first + width, at(out), stride).unwrap();
        });
        for (i, found) in out.iter().enumerate() {
            let (row, column) = (i / stride, i % stride);
            let expected = if (first..first + width).contains(&column) { x[row * width + column - first] } else { 7.0 };
            assert_eq!(*found, expected, "row {row}, column {column}");
        }
    }
    let (mut x, mut out) = (vec![0.0f32; 16], vec![0.0f32; 16]);
    for (columns, stride) in [(1..5, 8), (0..6, 8), (0..4, 7), (8..16, 16)] {
        assert!(put_columns(on(0), 3, at(&mut x), columns, at(&mut out), stride).is_err());
    }
}

#[test]
fn products_get_their_scales_afterwards() {
    let mut dice = Dice(12);
    for (m, n, more) in [(1, 4, 0), (3, 640, 8), (2, 5000, 4)] {
        let stride = n + more;
        let mut numbers = |count: usize| (0..count).map(|_| dice.value()).collect::<Vec<f32>>();
        let (x, w_scales, x_scales) = (numbers(m * n), numbers(n), numbers(m));
        let run = |on: &dyn Launcher, out: Sink| {
            let (mut x, mut w_scales, mut x_scales) = (x.clone(), w_scales.clone(), x_scales.clone());
            scale_product(on, (m, n), at(&mut x), (at(&mut w_scales), at(&mut x_scales)), out, stride).unwrap();
        };
        let there = bf16::from_f32(0.25);
        let set = in_any_order(&vec![there; m * stride], |on, out| run(on, Sink::Set(at(out))));
        let added = in_any_order(&vec![there; m * stride], |on, out| run(on, Sink::Add(at(out))));
        let wide = in_any_order(&vec![0.25f32; m * stride], |on, out| run(on, Sink::Wide(at(out))));
        for i in 0..m * stride {
            let (row, column) = (i / stride, i % stride);
            let what = format!("{m} x {n}, row {row}, column {column}");
            if column >= n {
                assert_eq!((set[i], added[i], wide[i]), (there, there, 0.25), "{what}");
                continue;
            }
            let scale = f64::from(w_scales[column]) * f64::from(x_scales[row]);
            let expected = f64::from(x[row * n + column]) * scale;
            near(wide[i], expected, 1e-6, 1e-9, &what);
            near(set[i].to_f32(), expected, BF16, 1e-9, &what);
            near(added[i].to_f32(), expected + 0.25, BF16, 1e-6, &what);
        }
    }
    let (mut x, mut scales, mut out) = (vec![0.0f32; 32], vec![0.0f32; 8], vec![bf16::ZERO; 32]);
    for (n, stride) in [(6, 8), (4, 6)] {
        let scales = (at(&mut scales), at(&mut scales));
        assert!(scale_product(on(0), (2, n), at(&mut x), scales, Sink::Set(at(&mut out)), stride).is_err());
    }
}

#[test]
fn the_residual_stream_and_its_norm() {
    let mut dice = Dice(2);
    for (rows, width, offset) in
        [(1, 8, 0.0), (4, 576, 0.0), (2, 4096, 1.0), (3, 8192, 0.0), (1, 16384, 0.0), (2, 2056, 1.0)]
    {
        for with_delta in [false, true] {
            let (x, delta, weight) =
                (dice.bf16(rows * width, 3.0), dice.bf16(rows * width, 1.0), dice.bf16(width, 1.0));
            let eps = 1e-5;
            let run = |on: &dyn Launcher, x: &mut Vec<bf16>, out: Normed| {
                let (mut delta, mut weight) = (delta.clone(), weight.clone());
                let delta = if with_delta { at(&mut delta) } else { Ptr::null() };
                let norm = Norm { weight: at(&mut weight), eps, offset };
                add_rms_norm(on, rows, width, at(x), delta, norm, out).unwrap();
            };
            // x and its norm, one after the other.
            let fresh = [x.clone(), vec![bf16::NAN; rows * width]].concat();
            let found = in_any_order(&fresh, |on, both| {
                let (mut x, mut y) = (both[..rows * width].to_vec(), both[rows * width..].to_vec());
                run(on, &mut x, Normed::Bf16(at(&mut y)));
                *both = [x, y].concat();
            });
            let (sums, normed) = found.split_at(rows * width);
            let (mut scaled, mut scales) = (vec![Fp8(0x7f); rows * width], vec![f32::NAN; rows]);
            run(on(3), &mut x.clone(), Normed::Fp8(at(&mut scaled), at(&mut scales)));
            for row in 0..rows {
                let range = row * width..(row + 1) * width;
                let added = |i: usize| x[i].to_f32() + if with_delta { delta[i].to_f32() } else { 0.0 };
                range.clone().for_each(|i| assert_eq!(sums[i], bf16::from_f32(added(i))));
                let squares: f64 = sums[range.clone()].iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
                let factor = 1.0 / (squares / width as f64 + f64::from(eps)).sqrt();
                let mut most = 0f64;
                for i in range.clone() {
                    let by = f64::from(weight[i - row * width].to_f32()) + f64::from(offset);
                    let expected = f64::from(sums[i].to_f32()) * factor * by;
                    most = most.max(expected.abs());
                    near(normed[i].to_f32(), expected, BF16, 1e-6, &i);
                    // 4 bits: half a unit of the last, and what is less than the least.
                    near(scaled[i].to_f32() * scales[row], expected, 1.0 / 15.0, f64::from(scales[row]) / 500.0, &i);
                }
                near(scales[row], most / 448.0, 1e-5, 1e-12, &"scale");
            }
        }
    }
}

#[test]
fn what_is_normed_before_it_is_added() {
    let mut dice = Dice(12);
    for (rows, width, offset) in [(1, 8, 1.0), (3, 640, 1.0), (2, 3840, 0.0), (1, 16384, 1.0), (2, 2056, 0.0)] {
        let (x, delta, weight) = (dice.bf16(rows * width, 3.0), dice.bf16(rows * width, 9.0), dice.bf16(width, 1.0));
        let eps = 1e-6;
        let found = in_any_order(&x, |on, x| {
            let (mut delta, mut weight) = (delta.clone(), weight.clone());
            norm_add(on, rows, width, at(x), at(&mut delta), Norm { weight: at(&mut weight), eps, offset }).unwrap();
        });
        for (row, delta) in delta.chunks_exact(width).enumerate() {
            let squares: f64 = delta.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
            let factor = 1.0 / (squares / width as f64 + f64::from(eps)).sqrt();
            for (i, delta) in delta.iter().enumerate() {
                let normed = f64::from(delta.to_f32()) * factor * (f64::from(weight[i].to_f32()) + f64::from(offset));
                let expected = f64::from(x[row * width + i].to_f32()) + normed;
                near(found[row * width + i].to_f32(), expected, BF16, 1e-5, &i);
            }
        }
    }
    norm_add(
        on(0),
        0,
        8,
        Ptr::null(),
        Ptr::null(),
        Norm { weight: at(&mut dice.bf16(8, 1.0)), eps: 1e-6, offset: 0.0 },
    )
    .unwrap();
}

#[test]
fn the_gate_of_a_feed_forward_layer() {
    let mut dice = Dice(3);
    for (rows, width) in [(1, 8), (3, 1536), (2, 14336), (1, 28672)] {
        for gate in [Gate::Silu, Gate::Gelu] {
            let mut gate_up = dice.bf16(rows * 2 * width, 6.0);
            // Both ends, where a formula can overflow.
            (gate_up[0], gate_up[1]) = (bf16::from_f32(-200.0), bf16::from_f32(200.0));
            let out = in_any_order(&vec![bf16::NAN; rows * width], |on, out| {
                silu_mul(on, rows, width, at(&mut gate_up.clone()), gate, Normed::Bf16(at(out))).unwrap();
            });
            let (mut scaled, mut scales) = (vec![Fp8(0x7f); rows * width], vec![f32::NAN; rows]);
            let to = Normed::Fp8(at(&mut scaled), at(&mut scales));
            silu_mul(on(2), rows, width, at(&mut gate_up.clone()), gate, to).unwrap();
            for row in 0..rows {
                for i in 0..width {
                    let x = f64::from(gate_up[row * 2 * width + i].to_f32());
                    let up = f64::from(gate_up[(row * 2 + 1) * width + i].to_f32());
                    let act = match gate {
                        Gate::Silu => x / (1.0 + (-x).exp()),
                        Gate::Gelu => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh()),
                    };
                    let (at, expected) = (row * width + i, act * up);
                    near(out[at].to_f32(), expected, BF16, 1e-5, &at);
                    near(scaled[at].to_f32() * scales[row], expected, 1.0 / 15.0, f64::from(scales[row]) / 500.0, &at);
                }
            }
        }
    }
}

#[test]
fn blocks_of_the_pool_become_copies() {
    let (blocks, bytes, layers) = (6, 4112, 3);
    let stride = blocks * bytes + 64;
    let mut dice = Dice(5);
    let pool: Vec<u8> = (0..layers * stride).map(|_| dice.bits() as u8).collect();
    let pairs = [0, 3, 5, 1];
    let found = in_any_order(&pool, |on, pool| {
        copy_blocks(on, 2, at(pool), at(&mut pairs.to_vec()), bytes, stride, layers).unwrap();
    });
    let mut expected = pool.clone();
    for layer in 0..layers {
        for pair in pairs.chunks(2) {
            let from = layer * stride + pair[0] as usize * bytes;
            expected.copy_within(from..from + bytes, layer * stride + pair[1] as usize * bytes);
        }
    }
    assert!(found == expected);
}

/// A small product in each format against f64, for rows of every tile; a row's bits do not depend on how many there are.
#[test]
fn few_rows_times_a_matrix() {
    let mut dice = Dice(8);
    for (n, k) in [(8, 128), (24, 640)] {
        let weight = dice.bf16(n * k, 1.0);
        let (weight8, scales8) = (dice.fp8(n * k), (0..n).map(|_| dice.value().abs() + 0.1).collect::<Vec<f32>>());
        let file: Vec<u8> = (0..n * k / 32)
            .flat_map(|_| {
                let scale = f16::from_f32(dice.value()).to_le_bytes();
                let codes: Vec<u8> = (0..16).map(|_| dice.bits() as u8).collect();
                [scale.to_vec(), codes].concat()
            })
            .collect();
        let (codes, scales4) = pack_q4(&file, n, k).unwrap();
        let mut weight4 = vec![0.0; n * k];
        dequantize_row(Dtype::Q4_0, &file, &mut weight4).unwrap();
        let x = dice.bf16(64 * k, 1.0);
        let (x8, x_scales) = (dice.fp8(64 * k), (0..64).map(|_| dice.value().abs() + 0.1).collect::<Vec<f32>>());
        let mut whole: Vec<Vec<bf16>> = Vec::new();
        for m in [64, 1, 15, 17, 33] {
            for add in [false, true] {
                for format in 0..3 {
                    let stride = n + 8;
                    let compute = |on: &dyn Launcher, out: Sink| {
                        let (mut x, mut weight, mut codes, mut scales4) =
                            (x.clone(), weight.clone(), codes.clone(), scales4.clone());
                        let (mut x8, mut x_scales, mut weight8, mut scales8) =
                            (x8.clone(), x_scales.clone(), weight8.clone(), scales8.clone());
                        let weight = match format {
                            0 => Weight::Bf16(at(&mut weight), at(&mut x)),
                            1 => Weight::Fp8(
                                Scaled { data: at(&mut weight8), scales: at(&mut scales8) },
                                Scaled { data: at(&mut x8), scales: at(&mut x_scales) },
                            ),
                            _ => Weight::Q4(at(&mut codes), at(&mut scales4), at(&mut x)),
                        };
                        gemm_small(on, (m, n, k), weight, out, stride).unwrap();
                    };
                    let found = in_any_order(&vec![bf16::from_f32(2.0); m * stride], |on, out| {
                        compute(on, if add { Sink::Add(at(out)) } else { Sink::Set(at(out)) });
                    });
                    let wide = in_any_order(&vec![2f32; m * stride], |on, out| compute(on, Sink::Wide(at(out))));
                    for row in 0..m {
                        for channel in 0..n {
                            let (mut sum, mut size) = (0.0, 0.0);
                            for i in 0..k {
                                let (a, b) = match format {
                                    0 => (x[row * k + i].to_f32(), weight[channel * k + i].to_f32()),
                                    1 => (x8[row * k + i].to_f32(), weight8[channel * k + i].to_f32()),
                                    _ => (x[row * k + i].to_f32(), weight4[channel * k + i]),
                                };
                                sum += f64::from(a) * f64::from(b);
                                size += f64::from(a * b).abs();
                            }
                            let scale =
                                if format == 1 { f64::from(x_scales[row]) * f64::from(scales8[channel]) } else { 1.0 };
                            let expected = sum * scale + if add { 2.0 } else { 0.0 };
                            let what = format!("{m} x {n} x {k}, format {format}, row {row}, channel {channel}");
                            near(found[row * stride + channel].to_f32(), expected, BF16, 1e-6 * size * scale, &what);
                            near(wide[row * stride + channel], sum * scale, 0.0, 1e-6 * size * scale, &what);
                        }
                        assert!(
                            found[row * stride + n..][..8].iter().all(|&x| x == bf16::from_f32(2.0)),
                            "beyond its columns"
                        );
                    }
                    match m {
                        64 => whole.push(found),
                        _ => {
                            let same = &whole[whole.len() - 6..][usize::from(add) * 3 + format];
                            assert!(
                                found[..] == same[..m * stride],
                                "{m} rows have other bits than 64, format {format}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn adapters_add_to_the_rows_that_have_one() {
    let mut dice = Dice(10);
    for (n, k, items) in [
        (8, 32, vec![(0, 1, 0)]),
        (40, 96, vec![(0, 16, 1), (16, 3, 1), (25, 2, 0)]),
        (1536, 576, vec![(3, 7, 2), (10, 1, 0)]),
    ] {
        let (rows, x_stride, out_stride) = (32, k + 8, n + 2);
        let matrices = |dice: &mut Dice, len: usize| (0..3).map(|_| dice.bf16(len, 1.0)).collect::<Vec<_>>();
        let (a, b) = (matrices(&mut dice, LORA_RANK * k), matrices(&mut dice, n * LORA_RANK));
        let scales = [0.5, 2.0, 1.0];
        let (x, before) = (dice.bf16(rows * x_stride, 1.0), dice.bf16(rows * out_stride, 1.0));
        let adapted: Vec<Adapted> =
            items.iter().map(|&(row, rows, adapter)| Adapted { row, rows, adapter, unused: 0 }).collect();
        let found = in_any_order(&before, |on, out| {
            let (mut a, mut b, mut x, mut scales) = (a.clone(), b.clone(), x.clone(), scales.to_vec());
            let addresses = |matrices: &mut Vec<Vec<bf16>>| -> Vec<u64> {
                matrices.iter_mut().map(|matrix| at(matrix).address()).collect()
            };
            let (mut a, mut b) = (addresses(&mut a), addresses(&mut b));
            let (mut between, mut adapted) = (vec![bf16::NAN; rows * LORA_RANK], adapted.clone());
            let adapters = Lora { a: at(&mut a), b: at(&mut b), scales: at(&mut scales) };
            let items = (at(&mut adapted), adapted.len());
            lora(on, items, &adapters, (n, k), at(&mut x), x_stride, at(&mut between), at(out), out_stride).unwrap();
        });
        for row in 0..rows {
            let item = items.iter().find(|item| (item.0..item.0 + item.1).contains(&(row as i32)));
            let between: Vec<f64> = (0..LORA_RANK)
                .map(|r| {
                    let Some(&(_, _, adapter)) = item else { return 0.0 };
                    let number = |i: usize| {
                        f64::from(x[row * x_stride + i].to_f32()) * f64::from(a[adapter as usize][r * k + i].to_f32())
                    };
                    (0..k).map(number).sum::<f64>() * f64::from(scales[adapter as usize])
                })
                .collect();
            for channel in 0..out_stride {
                let old = before[row * out_stride + channel];
                let Some(&(_, _, adapter)) = item.filter(|_| channel < n) else {
                    assert_eq!(found[row * out_stride + channel], old);
                    continue;
                };
                let part = |r: usize| between[r] * f64::from(b[adapter as usize][channel * LORA_RANK + r].to_f32());
                let expected = f64::from(old.to_f32()) + (0..LORA_RANK).map(part).sum::<f64>();
                let size: f64 = (0..LORA_RANK).map(|r| part(r).abs()).sum();
                near(
                    found[row * out_stride + channel].to_f32(),
                    expected,
                    BF16,
                    BF16 * size,
                    &format!("row {row}, {channel}"),
                );
            }
        }
    }
}

#[test]
fn weights_become_fp8_and_are_made_up() {
    let mut dice = Dice(11);
    for (n, k) in [(1, 8), (5, 576), (2, 8192)] {
        let mut weight = dice.bf16(n * k, 0.1);
        weight[..8].fill(bf16::ZERO);
        let mut scales = vec![f32::NAN; n];
        let found = in_any_order(&vec![Fp8(0x7f); n * k], |on, out| {
            let (mut weight, mut scales) = (weight.clone(), vec![0.0; n]);
            quantize_fp8(on, (n, k), at(&mut weight), at(out), at(&mut scales)).unwrap();
        });
        quantize_fp8(on(0), (n, k), at(&mut weight.clone()), at(&mut found.clone()), at(&mut scales)).unwrap();
        for (i, (found, weight)) in found.iter().zip(&weight).enumerate() {
            let scale = scales[i / k];
            near(found.to_f32() * scale, f64::from(weight.to_f32()), 1.0 / 15.0, f64::from(scale) / 500.0, &i);
        }
    }
    let made =
        |seed, len: usize| in_any_order(&vec![bf16::NAN; len], |on, out| random_bf16(on, at(out), seed, 0.5).unwrap());
    let (one, other) = (made(1, 5000), made(2, 5000));
    assert!(one[..100] == made(1, 100)[..] && one != other);
    let mean = one.iter().map(|x| x.to_f32()).sum::<f32>() / 5000.0;
    let square = one.iter().map(|x| x.to_f32().powi(2)).sum::<f32>() / 5000.0;
    assert!(mean.abs() < 0.02 && (square - 0.25 / 3.0).abs() < 0.005, "{mean} {square}");
}

fn wish() -> Wish {
    Wish { temperature: 1.0, ..Wish::default() }
}

fn draw(logits: &[f32], wishes: &[Wish], masks: &[u32], edits: &[Edit]) -> Vec<Drawn> {
    let rows = wishes.len();
    let vocab = logits.len() / rows;
    let draw = |seed: u32| {
        // Behind each row lies what would win if anybody looked at it.
        let stride = vocab + 3;
        let mut logits: Vec<f32> = logits.chunks(vocab).flat_map(|row| [row, &[f32::MAX; 3]].concat()).collect();
        let (mut wishes, mut masks, mut edits) = (wishes.to_vec(), masks.to_vec(), edits.to_vec());
        let (mut scratch, mut drawn) = (vec![u64::MAX; rows * vocab], vec![Drawn::default(); rows]);
        let masks = if masks.is_empty() { Ptr::null() } else { at(&mut masks) };
        let (logits, wishes, edits) = (at(&mut logits), at(&mut wishes), at(&mut edits));
        sample(on(seed), rows, (vocab, stride), logits, wishes, masks, edits, at(&mut scratch), at(&mut drawn))
            .unwrap();
        drawn
    };
    let drawn = draw(0);
    assert!(drawn == draw(1) && drawn == draw(7), "the result depends on the order of threads");
    drawn
}

/// What is left of a row by sorting it, in order of ids, and what it weighs.
fn kept(logits: &[f32], wish: &Wish) -> Vec<(usize, f64)> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: usize| (f64::from(logits[id] - best) / f64::from(wish.temperature)).exp();
    let mut order: Vec<usize> = (0..logits.len()).filter(|&id| logits[id] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if wish.top_k > 0 {
        order.truncate(wish.top_k as usize);
    }
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    let within = |&id: &usize| {
        let before = sum;
        sum += weight(id);
        before == 0.0 || before < f64::from(wish.top_p) * total
    };
    let mut kept: Vec<usize> =
        order.iter().copied().take_while(within).filter(|&id| weight(id) >= f64::from(wish.min_p)).collect();
    kept.sort();
    kept.into_iter().map(|id| (id, weight(id))).collect()
}

#[test]
fn tokens_are_drawn_as_the_filters_say() {
    let mut dice = Dice(9);
    for vocab in [33, 1000, 3001] {
        let logits: Vec<f32> = (0..vocab).map(|_| dice.value() * 6.0).collect();
        let plain = wish();
        for filter in [
            plain,
            Wish { temperature: 0.5, ..plain },
            Wish { top_k: 7, temperature: 2.0, ..plain },
            Wish { top_p: 0.8, ..plain },
            Wish { min_p: 0.2, ..plain },
            Wish { top_k: 20, top_p: 0.7, min_p: 0.05, temperature: 1.3, ..plain },
            Wish { top_p: 0.0, ..plain },
            Wish { top_k: 1, ..plain },
            Wish { top_k: 1_000_000, top_p: 0.9, ..plain },
        ] {
            let left = kept(&logits, &filter);
            let total: f64 = left.iter().map(|(_, weight)| weight).sum();
            let wishes: Vec<Wish> = (0..6).map(|seed| Wish { seed, position: 3 * seed, ..filter }).collect();
            let drawn = draw(&logits.repeat(6), &wishes, &[], &[]);
            for (wish, drawn) in wishes.iter().zip(&drawn) {
                let place = left.iter().position(|&(id, _)| id as i32 == drawn.token);
                let place = place.unwrap_or_else(|| panic!("{filter:?} leaves {left:?}, and {drawn:?}"));
                assert!((drawn.candidates - left.len() as i32).abs() <= 1, "{drawn:?} of {}", left.len());
                // Where the random number falls among the weights, but for rounding.
                let goal = uniform(wish.seed, wish.position) * total;
                let before: f64 = left[..place].iter().map(|(_, weight)| weight).sum();
                let slack = 1e-4 * total;
                assert!(before - slack <= goal && goal <= before + left[place].1 + slack, "{filter:?}: {drawn:?}");
            }
        }
    }
}

/// As the engine's sampler has it.
fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let stream = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(stream.wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(1));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
fn greedy_masks_edits_and_log_probabilities() {
    let greedy = Wish { temperature: 0.0, ..wish() };
    let token = |logits: &[f32], wish: Wish, mask: &[u32], edits: &[Edit]| draw(logits, &[wish], mask, edits)[0].token;
    for (logits, expected) in [
        (vec![1.0, 3.0, 2.0, 3.0], 1),
        (vec![f32::NAN, -5.0, f32::NEG_INFINITY], 1),
        (vec![f32::NAN, f32::NEG_INFINITY], -1),
        (vec![0.0, f32::INFINITY], 1),
    ] {
        assert_eq!(token(&logits, greedy, &[], &[]), expected, "{logits:?}");
        if !logits.contains(&f32::INFINITY) && logits.len() != 4 {
            assert_eq!(token(&logits, wish(), &[], &[]), expected);
        }
    }
    let logits: Vec<f32> = (0..70).map(|id| id as f32 / 10.0).collect();
    let masked = Wish { masked: 1, ..greedy };
    assert_eq!(token(&logits, masked, &[u32::MAX, 1 << 3, 0], &[]), 35);
    assert_eq!(token(&logits, Wish { masked: 1, ..wish() }, &[0, 0, 1 << 2], &[]), 66);
    assert_eq!(token(&logits, masked, &[0, 0, 0], &[]), -1);
    let edit = |token, bias, answered, seen| Edit { token, bias, answered, seen };
    let small = [2.0, 1.9, -1.0];
    let with = |wish: Wish, edits: &[Edit]| token(&small, Wish { edits: edits.len() as i32, ..wish }, &[], edits);
    assert_eq!(with(greedy, &[edit(2, 4.0, 0, 0), edit(99, 9.0, 0, 0)]), 2);
    assert_eq!(with(Wish { repetition_penalty: 1.2, ..greedy }, &[edit(0, 0.0, 0, 1)]), 1);
    assert_eq!(with(Wish { presence_penalty: 0.2, ..greedy }, &[edit(0, 0.0, 0, 1)]), 0, "only in the prompt");
    assert_eq!(with(Wish { presence_penalty: 0.2, ..greedy }, &[edit(0, 0.0, 1, 1)]), 1);
    assert_eq!(with(Wish { frequency_penalty: 0.06, ..greedy }, &[edit(0, 0.0, 1, 1)]), 0);
    assert_eq!(with(Wish { frequency_penalty: 0.06, ..greedy }, &[edit(0, 0.0, 2, 1)]), 1);
    // Of the raw logits, whatever was done to them.
    let total = small.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    for temperature in [0.0, 1.0] {
        let wish = Wish { temperature, top_k: 1, logprob: 1, edits: 1, repetition_penalty: 1.5, ..wish() };
        let drawn = draw(&small, &[wish], &[], &[edit(2, 9.0, 0, 1)])[0];
        assert_eq!(drawn.token, 2);
        near(drawn.logprob, -1.0 - total, 1e-5, 0.0, &"log-probability");
    }
    let given = draw(&small, &[Wish { given: 1, logprob: 1, ..greedy }], &[], &[])[0];
    assert_eq!((given.token, given.rank), (1, 2));
    near(given.logprob, 1.9 - total, 1e-5, 0.0, &"log-probability");
    let both = draw(&[small, small].concat(), &[Wish { given: UNWANTED, ..wish() }, greedy], &[], &[]);
    assert_eq!((both[0].token, both[1].token), (-1, 0), "who wants nothing gets nothing");
}

#[test]
fn the_next_step_begins_with_what_was_drawn() {
    for rows in [1, 127, 128, 300] {
        let mut drawn: Vec<Drawn> = (0..rows).map(|row| Drawn { token: row % 7 - 1, ..Drawn::default() }).collect();
        let mut ids = vec![99; rows as usize + 1];
        follow(on(0), rows as usize, at(&mut drawn), at(&mut ids)).unwrap();
        assert!((0..rows).all(|row| ids[row as usize] == (row % 7 - 1).max(0)), "{ids:?}");
        assert_eq!(ids[rows as usize], 99, "not beyond");
    }
}

#[test]
fn drafts_count_up_to_the_first_that_did_not_come_true() {
    let on = on(0);
    let token = |token| Drawn { token, ..Drawn::default() };
    let mut drawn: Vec<Drawn> = [5, 6, 7, 1, 2, 9, 4].map(token).to_vec();
    let mut drafts = vec![5, 6, -1, 1, 3, -1, -1];
    let mut spans = vec![0, 3, 3, 3, 6, 1];
    let mut accepted = vec![0; 3];
    verify(on, 3, at(&mut drawn), at(&mut drafts), at(&mut spans), at(&mut accepted)).unwrap();
    assert_eq!(accepted, [3, 2, 1]);
}
