//! What happens to one row at a time: RMS norm, quantising for the int8 kernels, rotary positions.
//!
//!     x ──norm──> normed f32 ──quantise──> 32 x i8 | scale | sums       one block of 32 at a time
//!
//! A row is some hundred numbers that stay in L1 between the steps; the caller spreads rows over threads.

use crate::kernel::panel::BLOCK;
use crate::kernel::simd::{Simd, TILE, by_isa};
use crate::kernel::{Buffer, Cpu, Isa, Shared};

/// Inputs of a matrix, row by row, in the forms its kernels take: f32, or int8 in blocks of 32 with a scale each.
/// Allocated once for the largest step.
pub struct Activations {
    floats: Buffer<f32>,
    codes: Buffer<i8>,
    /// Per row and block of 32: `x = scale * code`.
    scales: Buffer<f32>,
    /// Per row and 16 inputs: sum of the codes. A whole number, as f32.
    sums: Buffer<f32>,
    /// Per row and block: sum of the codes.
    totals: Buffer<f32>,
    /// Per row and block: what the dot product of codes centred on each of [`CENTRES`] begins with.
    starts: Buffer<i32>,
    width: usize,
}

/// The code that means zero in the formats of 4 and of 8 bits that have one. Weights are kept as codes, `sum (code -
/// centre) * x` is what is wanted: a sum that begins with `-centre * sum x` comes out right, and costs no instruction.
pub(super) const CENTRES: [i32; 2] = [8, 128];

/// Rows of [`Activations`] as the kernels see them.
#[derive(Clone, Copy)]
pub(super) struct View {
    pub(super) floats: *const f32,
    pub(super) codes: *const i8,
    pub(super) scales: *const f32,
    pub(super) sums: *const f32,
    pub(super) totals: *const f32,
    pub(super) starts: *const i32,
}

impl View {
    /// From row `row` on, where rows have `blocks` blocks.
    ///
    /// # Safety
    /// There are that many rows in the int8 form.
    #[inline(always)]
    pub(super) unsafe fn from(self, row: usize, blocks: usize) -> Self {
        let blocks = row * blocks;
        // SAFETY: by contract.
        unsafe {
            Self {
                floats: self.floats,
                codes: self.codes.add(blocks * BLOCK),
                scales: self.scales.add(blocks),
                sums: self.sums.add(blocks * 2),
                totals: self.totals.add(blocks),
                starts: self.starts.add(blocks * CENTRES.len()),
            }
        }
    }
}

// SAFETY: read-only pointers into the `Activations` that the view was made of; see `Activations::view`.
unsafe impl Sync for View {}

impl Activations {
    /// Room for `rows` rows of up to `width` numbers; the int8 form only when `int8`, and for as many more as fill a tile.
    pub fn new(rows: usize, width: usize, int8: bool) -> Self {
        let blocks = if int8 { (rows + TILE - 1) * width.div_ceil(BLOCK) } else { 0 };
        Self {
            floats: Buffer::zeroed(rows * width),
            codes: Buffer::zeroed(blocks * BLOCK),
            scales: Buffer::zeroed(blocks),
            sums: Buffer::zeroed(blocks * 2),
            totals: Buffer::zeroed(blocks),
            starts: Buffer::zeroed(blocks * CENTRES.len()),
            width,
        }
    }

    /// Length of the rows it holds now.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows of the present width that there is room for.
    pub fn capacity(&self) -> usize {
        self.floats.len() / self.width.max(1)
    }

    /// The f32 form, to be written as rows of `width`; then [`Activations::quantize`].
    pub fn floats(&mut self, width: usize) -> &mut [f32] {
        self.width = width;
        &mut self.floats
    }

    /// Fills `rows` rows with the RMS norm of `x`, `[rows, width]` (`pick(i)` is the row of `x` that becomes row `i`):
    /// `x / sqrt(mean(x^2) + eps) * weight`. Makes the int8 form too when `int8`.
    #[allow(clippy::too_many_arguments)]
    pub fn norm(
        &mut self,
        cpu: &Cpu,
        x: &[f32],
        weight: &[f32],
        eps: f32,
        rows: usize,
        pick: impl Fn(usize) -> usize + Sync,
        int8: bool,
    ) {
        let width = weight.len();
        self.width = width;
        assert!(rows <= self.capacity());
        let int8_rows = Int8Rows {
            codes: self.codes.share(),
            scales: self.scales.share(),
            sums: self.sums.share(),
            totals: self.totals.share(),
            starts: self.starts.share(),
        };
        let floats = self.floats.share();
        each_row(cpu, rows, width, |row| {
            let from = pick(row);
            let x = &x[from * width..(from + 1) * width];
            // SAFETY: each row is handed out once.
            unsafe {
                let out = floats.part(row * width, width);
                norm_row(cpu.isa, x, weight, eps, out);
                if int8 {
                    quantize_into(cpu.isa, out, row, int8_rows);
                }
            }
        });
    }

    /// Makes the int8 form of the first `rows` rows.
    pub fn quantize(&mut self, cpu: &Cpu, rows: usize) {
        let width = self.width;
        assert!(rows <= self.capacity());
        let int8_rows = Int8Rows {
            codes: self.codes.share(),
            scales: self.scales.share(),
            sums: self.sums.share(),
            totals: self.totals.share(),
            starts: self.starts.share(),
        };
        let floats = &*self.floats;
        each_row(cpu, rows, width, |row| {
            // SAFETY: each row is handed out once.
            unsafe { quantize_into(cpu.isa, &floats[row * width..(row + 1) * width], row, int8_rows) };
        });
    }

    /// For the kernels of `rows` rows.
    pub(super) fn view(&self, rows: usize, int8: bool) -> View {
        assert!(rows <= self.capacity());
        assert!(!int8 || self.width.is_multiple_of(BLOCK) && rows * self.width <= self.codes.len());
        View {
            floats: self.floats.as_ptr(),
            codes: self.codes.as_ptr(),
            scales: self.scales.as_ptr(),
            sums: self.sums.as_ptr(),
            totals: self.totals.as_ptr(),
            starts: self.starts.as_ptr(),
        }
    }
}

/// `work(row)` for each of `rows` rows of some `width` numbers. A few are done sooner by the caller than handed to threads.
pub fn each_row(cpu: &Cpu, rows: usize, width: usize, work: impl Fn(usize) + Sync) {
    if rows * width < 4096 {
        (0..rows).for_each(work);
    } else {
        let grain = rows.div_ceil(4 * cpu.pool.threads());
        cpu.pool.each(rows, grain, work);
    }
}

fn norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    // SAFETY: the three are equally long.
    unsafe { norm(isa, x.as_ptr(), weight.as_ptr(), eps, x.len(), out.as_mut_ptr()) }
}

/// The RMS norm of a row in its own place.
pub fn norm_in_place(isa: Isa, row: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(row.len(), weight.len());
    // SAFETY: equally long; each number is read before it is written, and none is read after that.
    unsafe { norm(isa, row.as_ptr(), weight.as_ptr(), eps, row.len(), row.as_mut_ptr()) }
}

by_isa! { fn norm(x: *const f32, weight: *const f32, eps: f32, len: usize, out: *mut f32) = norm_body }

#[inline(always)]
unsafe fn norm_body<S: Simd>(x: *const f32, weight: *const f32, eps: f32, len: usize, out: *mut f32) {
    // SAFETY: all accesses are below `len`.
    unsafe {
        let whole = len / 16 * 16;
        let mut squares = [S::splat(0.0); 2];
        for (i, at) in (0..whole).step_by(16).enumerate() {
            let v = S::load(x.add(at));
            squares[i % 2] = S::fma(v, v, squares[i % 2]);
        }
        let mut sum = S::sum(S::add(squares[0], squares[1]));
        for at in whole..len {
            sum += *x.add(at) * *x.add(at);
        }
        let scale = 1.0 / (sum / len as f32 + eps).sqrt();
        for at in (0..whole).step_by(16) {
            let v = S::mul(S::load(x.add(at)), S::splat(scale));
            S::store(out.add(at), S::mul(v, S::load(weight.add(at))));
        }
        for at in whole..len {
            *out.add(at) = *x.add(at) * scale * *weight.add(at);
        }
    }
}

/// The int8 form of all rows, to be written row by row.
#[derive(Clone, Copy)]
struct Int8Rows<'a> {
    codes: Shared<'a, i8>,
    scales: Shared<'a, f32>,
    sums: Shared<'a, f32>,
    totals: Shared<'a, f32>,
    starts: Shared<'a, i32>,
}

/// # Safety
/// No other thread may touch row `row` of the outputs.
unsafe fn quantize_into(isa: Isa, x: &[f32], row: usize, to: Int8Rows<'_>) {
    let (width, blocks) = (x.len(), x.len() / BLOCK);
    assert_eq!(blocks * BLOCK, width);
    // SAFETY: alone by contract; the parts are as long as `width` says.
    unsafe {
        let codes = to.codes.part(row * width, width).as_mut_ptr();
        let scales = to.scales.part(row * blocks, blocks).as_mut_ptr();
        let sums = to.sums.part(row * blocks * 2, blocks * 2).as_mut_ptr();
        let totals = to.totals.part(row * blocks, blocks).as_mut_ptr();
        let starts = to.starts.part(row * blocks * CENTRES.len(), blocks * CENTRES.len()).as_mut_ptr();
        quantize(isa, x.as_ptr(), blocks, codes, scales, sums, totals, starts);
    }
}

by_isa! {
    fn quantize(
        x: *const f32, blocks: usize, codes: *mut i8, scales: *mut f32, sums: *mut f32, totals: *mut f32, starts: *mut i32,
    ) = quantize_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn quantize_body<S: Simd>(
    x: *const f32,
    blocks: usize,
    codes: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
    totals: *mut f32,
    starts: *mut i32,
) {
    // SAFETY: `blocks` blocks of 32 inputs, 32 codes, 1 scale, 2 sums, their total and a start for each centre.
    unsafe {
        for block in 0..blocks {
            let (low, high) = (S::load(x.add(block * BLOCK)), S::load(x.add(block * BLOCK + 16)));
            let largest = S::max_lane(S::max(S::abs(low), S::abs(high)));
            // A block too small to invert is nothing at all beside any other.
            let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
            let codes = codes.add(block * BLOCK);
            *scales.add(block) = largest / 127.0;
            let low = S::store_i8(codes, S::mul(low, S::splat(inverse)));
            let high = S::store_i8(codes.add(16), S::mul(high, S::splat(inverse)));
            *sums.add(block * 2) = low as f32;
            *sums.add(block * 2 + 1) = high as f32;
            *totals.add(block) = (low + high) as f32;
            for (i, centre) in CENTRES.into_iter().enumerate() {
                *starts.add(block * CENTRES.len() + i) = -centre * (low + high);
            }
        }
    }
}

/// Rotary positions: pair `i` of a head turns by `position * frequency[i]`.
pub struct Rope {
    /// `[rotated / 2]`, in the model's order.
    frequencies: Vec<f32>,
    /// Of the step's rows: `[rows][cos x half, sin x half]`.
    table: Buffer<f32>,
}

impl Rope {
    /// For steps of up to `rows` rows.
    pub fn new(frequencies: Vec<f32>, rows: usize) -> Self {
        let table = Buffer::zeroed(rows * frequencies.len() * 2);
        Self { frequencies, table }
    }

    /// Computes the table for the positions of a step's rows.
    pub fn set(&mut self, cpu: &Cpu, positions: &[u32]) {
        let half = self.frequencies.len();
        assert!(positions.len() * half * 2 <= self.table.len());
        let table = self.table.share();
        let frequencies = &self.frequencies;
        // A pair costs about as much as 16 numbers elsewhere.
        each_row(cpu, positions.len(), half * 16, |row| {
            // SAFETY: each row is handed out once.
            let (cos, sin) = unsafe { table.part(row * half * 2, half * 2) }.split_at_mut(half);
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
                // In f64 the angle keeps its fraction at any position; as f32 it would lose it beyond some ten thousand.
                let (s, c) = (f64::from(positions[row]) * f64::from(*frequency)).sin_cos();
                *cos = c as f32;
                *sin = s as f32;
            }
        });
    }

    /// `(cos, sin)` of a row of the step, each half as long as the rotated part of a head.
    pub fn of(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        self.table[row * half * 2..(row + 1) * half * 2].split_at(half)
    }
}

/// Rotates the first `2 * cos.len()` numbers of a head in place; number `i` pairs with number `i + cos.len()`.
pub fn rotate(isa: Isa, head: &mut [f32], (cos, sin): (&[f32], &[f32])) {
    let half = cos.len();
    assert!(sin.len() == half && 2 * half <= head.len());
    // SAFETY: lengths as asserted.
    unsafe { rotate_at(isa, head.as_mut_ptr(), cos.as_ptr(), sin.as_ptr(), half) }
}

by_isa! { fn rotate_at(head: *mut f32, cos: *const f32, sin: *const f32, half: usize) = rotate_body }

#[inline(always)]
unsafe fn rotate_body<S: Simd>(head: *mut f32, cos: *const f32, sin: *const f32, half: usize) {
    // SAFETY: all accesses are below `2 * half` in `head` and `half` in the tables.
    unsafe {
        let whole = half / 16 * 16;
        for i in (0..whole).step_by(16) {
            let (a, b) = (S::load(head.add(i)), S::load(head.add(half + i)));
            let (c, s) = (S::load(cos.add(i)), S::load(sin.add(i)));
            S::store(head.add(i), S::sub(S::mul(a, c), S::mul(b, s)));
            S::store(head.add(half + i), S::add(S::mul(b, c), S::mul(a, s)));
        }
        for i in whole..half {
            let (a, b) = (*head.add(i), *head.add(half + i));
            let (c, s) = (*cos.add(i), *sin.add(i));
            *head.add(i) = a * c - b * s;
            *head.add(half + i) = b * c + a * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{Dice, cpus};

    #[test]
    fn norm_is_the_formula() {
        for cpu in cpus() {
            for (rows, width) in [(1, 1), (3, 31), (2, 576), (40, 640)] {
                let mut dice = Dice::new(width as u64);
                let (x, weight) = (dice.values(rows * width), dice.values(width));
                let mut out = Activations::new(rows, width, false);
                out.norm(&cpu, &x, &weight, 1e-5, rows, |row| rows - 1 - row, false);
                for row in 0..rows {
                    let x = &x[(rows - 1 - row) * width..][..width];
                    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let expected = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                        let got = f64::from(out.floats[row * width + i]);
                        assert!((got - expected).abs() < 1e-5, "{} {rows}x{width}: {got} {expected}", cpu.isa);
                    }
                }
            }
        }
    }

    #[test]
    fn int8_blocks_are_the_nearest_codes_and_their_sums() {
        for cpu in cpus() {
            for (rows, width) in [(1, 32), (5, 96), (33, 1536)] {
                let mut dice = Dice::new(width as u64 + 7);
                let mut out = Activations::new(rows, width, true);
                let x = dice.values(rows * width);
                out.floats(width)[..rows * width].copy_from_slice(&x);
                out.floats(width)[..32].fill(0.0);
                out.quantize(&cpu, rows);
                for block in 0..rows * width / 32 {
                    let x = &out.floats[block * 32..][..32];
                    let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
                    assert_eq!(out.scales[block], largest / 127.0);
                    let codes = &out.codes[block * 32..][..32];
                    for (x, &code) in x.iter().zip(codes) {
                        assert!((x - out.scales[block] * f32::from(code)).abs() <= largest / 253.0, "{}", cpu.isa);
                    }
                    for side in 0..2 {
                        let sum: i32 = codes[side * 16..][..16].iter().map(|&code| i32::from(code)).sum();
                        assert_eq!(out.sums[block * 2 + side], sum as f32);
                    }
                    assert_eq!(out.totals[block], out.sums[block * 2] + out.sums[block * 2 + 1]);
                }
            }
        }
    }

    #[test]
    fn heads_turn_by_position_times_frequency() {
        for cpu in cpus() {
            for half in [1, 8, 16, 37] {
                let mut dice = Dice::new(half as u64);
                let frequencies: Vec<f32> = (0..half).map(|i| 0.9f32.powi(i as i32)).collect();
                let positions = [0, 1, 7, 8191, 131_071];
                let mut rope = Rope::new(frequencies.clone(), positions.len());
                rope.set(&cpu, &positions);
                for (row, position) in positions.into_iter().enumerate() {
                    let before = dice.values(2 * half + 3);
                    let mut head = before.clone();
                    rotate(cpu.isa, &mut head, rope.of(row));
                    assert_eq!(head[2 * half..], before[2 * half..]);
                    for i in 0..half {
                        let (sin, cos) = (f64::from(position) * f64::from(frequencies[i])).sin_cos();
                        let (a, b) = (f64::from(before[i]), f64::from(before[i + half]));
                        assert!((f64::from(head[i]) - (a * cos - b * sin)).abs() < 1e-6, "{}", cpu.isa);
                        assert!((f64::from(head[i + half]) - (b * cos + a * sin)).abs() < 1e-6, "{}", cpu.isa);
                    }
                }
            }
        }
    }
}
