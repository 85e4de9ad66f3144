//! Rows times panels in 16-bit integers: dot products of pairs run at twice the speed of f32, and with 12 and 13 bits a
//! number comes close to its precision. For networks whose answers are compared to the fourth digit, where int8 falls short.
//!
//!     panel   16 output channels, block of 128 k:  [k / 2][channel] pairs of i16 | 16 scales f32;  next block
//!     rows    [k] i16 | a scale f32 for each 128
//!     plain   the same in f32 throughout: panel [k][channel], rows [k]; the yardstick, and for odd widths
//!
//! Unlike `gemm.rs` this runs on the calling thread alone: whoever owns a block of rows takes it through several matrices
//! while it stays in the cache, and meets the others once a layer. Weights are 12 bits and a sign, inputs 13 of both, so
//! that 128 products of two fit 32 bits. A row's sum runs over k in order: its bits do not depend on its company.

use crate::base::{Error, Result};
use crate::kernel::buffer::Slab;
use crate::kernel::panel::{LANES, Source};
use crate::kernel::quant::dequantize_row;
use crate::kernel::simd::{Portable, Simd, by_isa, exp};
use crate::kernel::{Arena, Cpu, Isa};

/// Inputs that share a scale. What a block takes besides its products is a twentieth of them at 64, and the digits are as good.
const BLOCK: usize = 128;
/// Largest code of a weight and of an input: 128 x 2047 x 4095 < 2^31.
const WEIGHT_MAX: f32 = 2047.0;
const INPUT_MAX: f32 = 4095.0;
/// Bytes of a panel's block: codes, then scales.
const BLOCK_BYTES: usize = BLOCK * LANES * 2 + LANES * 4;
/// Rows of the largest tile.
const TILE: usize = 8;

/// A matrix in panels, with its bias. Several of the same inputs may lie side by side.
pub struct Words {
    data: Slab,
    /// Padded to whole panels.
    bias: Vec<f32>,
    channels: usize,
    inputs: usize,
    plain: bool,
}

/// What becomes of a product and its bias.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Then {
    /// It replaces what was there.
    Set,
    /// It is added to what was there.
    Add,
    /// `x * Phi(x)`, exact.
    Gelu,
    /// The approximation of it by tanh.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
}

/// Inputs of a matrix: rows back to back, and their 16-bit form.
pub struct WordRows {
    codes: Vec<i16>,
    scales: Vec<f32>,
}

impl WordRows {
    /// Room for `rows` rows of up to `width` numbers.
    pub fn new(rows: usize, width: usize) -> Self {
        Self { codes: vec![0; rows * width], scales: vec![0.0; rows * width.div_ceil(BLOCK)] }
    }

    /// Takes the rows of `x`, `width` numbers each. Rows that are not whole blocks are left to the plain form.
    pub fn take(&mut self, isa: Isa, x: &[f32], width: usize) {
        if !width.is_multiple_of(BLOCK) {
            return;
        }
        let blocks = x.len() / BLOCK;
        assert!(x.len() <= self.codes.len() && blocks <= self.scales.len() && x.len().is_multiple_of(width));
        // SAFETY: `blocks` blocks in each, as asserted.
        unsafe { quantize(isa, x.as_ptr(), blocks, self.codes.as_mut_ptr(), self.scales.as_mut_ptr()) };
    }
}

impl Words {
    /// Packs `parts`, whose channels follow each other, into `arena` on all threads. With `plain`, or when a row is not
    /// whole blocks, weights stay f32.
    ///
    /// # Errors
    /// `Internal` when the bytes of a part are not what it says, or inputs and bias do not agree.
    pub fn pack(cpu: &Cpu, arena: &mut Arena, parts: &[Source<'_>], mut bias: Vec<f32>, plain: bool) -> Result<Self> {
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let channels: usize = parts.iter().map(|part| part.channels).sum();
        let fits = |part: &Source<'_>| {
            let row = part.dtype.row_bytes(part.inputs)?;
            (part.inputs == inputs && row.checked_mul(part.channels) == Some(part.bytes.len())).then_some(())
        };
        if inputs == 0 || bias.len() != channels || !parts.iter().all(|part| fits(part).is_some()) {
            return Err(Error::internal(format!("parts of {inputs} inputs do not make {channels} channels")));
        }
        bias.resize(channels.next_multiple_of(LANES), 0.0);
        let plain = plain || !inputs.is_multiple_of(BLOCK);
        let stride = stride(inputs, plain);
        let count = channels.div_ceil(LANES);
        let data = arena.fill(count * stride, |out| {
            cpu.pool.each(count, 1, |panel| {
                // SAFETY: each panel is handed out once.
                let out = unsafe { out.part(panel * stride, stride) };
                let mut row = vec![0.0; inputs];
                for lane in 0..LANES.min(channels - panel * LANES) {
                    read_channel(parts, panel * LANES + lane, &mut row);
                    pack_channel(&row, lane, plain, out);
                }
            });
        });
        Ok(Self { data, bias, channels, inputs, plain })
    }

    /// Output channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Inputs of a channel.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// `out = then(x * weights + bias)` for the rows of `x`, `[rows, inputs]`, whose 16-bit form is `words`; `out` is
    /// `[rows, channels]`.
    pub fn apply(&self, isa: Isa, x: &[f32], words: &WordRows, then: Then, out: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert!(rows * self.inputs == x.len() && rows * self.channels == out.len());
        assert!(self.plain || x.len() <= words.codes.len());
        let blocks = self.inputs / BLOCK;
        let stride = stride(self.inputs, self.plain);
        // Two panels read the inputs once where there are registers for their sums.
        let twins = isa.is_wide() && !self.plain;
        let mut first = 0;
        while first < self.channels {
            let panels = if twins && first + LANES < self.channels { 2 } else { 1 };
            let panel = self.data[first / LANES * stride..][..panels * stride].as_ptr();
            let bias = self.bias[first..first + panels * LANES].as_ptr();
            let valid = (panels * LANES).min(self.channels - first);
            // SAFETY, of each call: whole panels and as much bias; `count` rows of inputs, and of results as `finish` says.
            let multiply = |row: usize, count: usize, finish: Finish| unsafe {
                if self.plain {
                    let x = x.as_ptr().add(row * self.inputs);
                    return match count {
                        1 => float_tile::<1>(isa, panel, self.inputs, x, finish),
                        2 => float_tile::<2>(isa, panel, self.inputs, x, finish),
                        4 => float_tile::<4>(isa, panel, self.inputs, x, finish),
                        _ => float_tile::<TILE>(isa, panel, self.inputs, x, finish),
                    };
                }
                let codes = words.codes.as_ptr().add(row * self.inputs);
                let scales = words.scales.as_ptr().add(row * blocks);
                match (panels, count) {
                    (1, 1) => word_tile::<1>(isa, panel, blocks, codes, scales, finish),
                    (1, 2) => word_tile::<2>(isa, panel, blocks, codes, scales, finish),
                    (1, 4) => word_tile::<4>(isa, panel, blocks, codes, scales, finish),
                    (1, _) => word_tile::<TILE>(isa, panel, blocks, codes, scales, finish),
                    (_, 1) => word_twins::<1>(isa, panel, blocks, codes, scales, finish),
                    (_, 2) => word_twins::<2>(isa, panel, blocks, codes, scales, finish),
                    (_, 4) => word_twins::<4>(isa, panel, blocks, codes, scales, finish),
                    (_, _) => word_twins::<TILE>(isa, panel, blocks, codes, scales, finish),
                }
            };
            isa.each_tile(0, rows, |row, count| {
                let results = &mut out[row * self.channels + first..][..(count - 1) * self.channels + valid];
                if valid == panels * LANES {
                    return multiply(
                        row,
                        count,
                        Finish { then, bias, out: results.as_mut_ptr(), stride: self.channels },
                    );
                }
                let mut padded = [0f32; 2 * TILE * LANES];
                for (padded, row) in padded.chunks_exact_mut(2 * LANES).zip(results.chunks(self.channels)) {
                    padded[..valid].copy_from_slice(&row[..valid]);
                }
                multiply(row, count, Finish { then, bias, out: padded.as_mut_ptr(), stride: 2 * LANES });
                for (padded, row) in padded.chunks_exact(2 * LANES).zip(results.chunks_mut(self.channels)) {
                    row[..valid].copy_from_slice(&padded[..valid]);
                }
            });
            first += panels * LANES;
        }
    }
}

/// Where the sums of a tile go: `out = then(sums + bias)`, rows `stride` apart.
#[derive(Clone, Copy)]
struct Finish {
    then: Then,
    bias: *const f32,
    out: *mut f32,
    stride: usize,
}

impl Finish {
    /// Of R rows and P panels. A loop on purpose: unrolled, the function of each [`Then`] would be there for every row.
    ///
    /// # Safety
    /// P times 16 numbers of bias, and of results in each of R rows.
    #[inline(always)]
    unsafe fn take<S: Simd, const R: usize, const P: usize>(self, sums: [[S::F; P]; R]) {
        // SAFETY: by contract.
        unsafe {
            for (r, sums) in sums.into_iter().enumerate().take(S::turns::<R>(R)) {
                for (p, sum) in sums.into_iter().enumerate() {
                    let x = S::add(sum, S::load(self.bias.add(p * LANES)));
                    let out = self.out.add(r * self.stride + p * LANES);
                    S::store(
                        out,
                        match self.then {
                            Then::Set => x,
                            Then::Add => S::add(x, S::load(out)),
                            Then::Gelu => gelu::<S>(x),
                            Then::GeluTanh => gelu_tanh::<S>(x),
                            Then::Relu => S::max(x, S::splat(0.0)),
                        },
                    );
                }
            }
        }
    }
}

/// Bytes from panel to panel.
fn stride(inputs: usize, plain: bool) -> usize {
    if plain { inputs * LANES * 4 } else { inputs / BLOCK * BLOCK_BYTES }
}

/// Row `channel` of all parts, as numbers.
fn read_channel(parts: &[Source<'_>], mut channel: usize, row: &mut [f32]) {
    for part in parts {
        if channel < part.channels {
            let length = part.bytes.len() / part.channels;
            let read = dequantize_row(part.dtype, &part.bytes[channel * length..][..length], row);
            // Lengths were checked; a row of another length reads as nothing.
            debug_assert!(read.is_ok());
            return;
        }
        channel -= part.channels;
    }
}

fn pack_channel(row: &[f32], lane: usize, plain: bool, out: &mut [u8]) {
    if plain {
        for (k, weight) in row.iter().enumerate() {
            out[(k * LANES + lane) * 4..][..4].copy_from_slice(&weight.to_ne_bytes());
        }
        return;
    }
    for (block, out) in row.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK_BYTES)) {
        let largest = block.iter().fold(0f32, |largest, weight| largest.max(weight.abs()));
        let inverse = if largest > 1e-30 { WEIGHT_MAX / largest } else { 0.0 };
        for (k, weight) in block.iter().enumerate() {
            let code = (weight * inverse).round_ties_even().clamp(-WEIGHT_MAX, WEIGHT_MAX) as i16;
            out[(k / 2 * LANES + lane) * 4 + k % 2 * 2..][..2].copy_from_slice(&code.to_ne_bytes());
        }
        let scale = largest / WEIGHT_MAX;
        out[BLOCK * LANES * 2 + lane * 4..][..4].copy_from_slice(&scale.to_ne_bytes());
    }
}

/// What 16-bit kernels need beyond [`Simd`].
///
/// # Safety
/// As [`Simd`].
#[allow(clippy::missing_safety_doc)]
trait Pairs: Simd {
    /// acc[c] += w[2c] * x[0] + w[2c + 1] * x[1], all i16.
    unsafe fn dot_pair(acc: Self::I, w: Self::C, x: i32) -> Self::I;
    /// Rounds 16 values within i16 and stores them.
    unsafe fn store_i16(p: *mut i16, x: Self::F);
}

impl Pairs for Portable {
    #[inline(always)]
    unsafe fn dot_pair(mut acc: Self::I, w: Self::C, x: i32) -> Self::I {
        let x = x.to_ne_bytes();
        let word = |low: u8, high: u8| i32::from(i16::from_ne_bytes([low, high]));
        let (x0, x1) = (word(x[0], x[1]), word(x[2], x[3]));
        for (c, acc) in acc.iter_mut().enumerate() {
            *acc += word(w[4 * c], w[4 * c + 1]) * x0 + word(w[4 * c + 2], w[4 * c + 3]) * x1;
        }
        acc
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, x: Self::F) {
        // SAFETY: 16 elements by contract.
        unsafe {
            let x = Self::round(x);
            p.cast::<[i16; 16]>().write_unaligned(x.map(|x| x as i16));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! SAFETY: as `simd::x86`.
    use std::arch::x86_64::*;

    use super::Pairs;
    use crate::kernel::simd::x86::{Avx2, Avx512};

    /// `vpdpwssd`. LLVM takes the intrinsic apart into a product and a sum, for their latency, which nothing here waits for.
    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    unsafe fn add_products(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        let mut sum = acc;
        // SAFETY: registers only.
        unsafe {
            std::arch::asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) sum, in(zmm_reg) w, in(zmm_reg) x,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }

    #[allow(unsafe_op_in_unsafe_fn)]
    impl Pairs for Avx512 {
        #[inline(always)]
        unsafe fn dot_pair(acc: __m512i, w: __m512i, x: i32) -> __m512i {
            add_products(acc, w, _mm512_set1_epi32(x))
        }
        #[inline(always)]
        unsafe fn store_i16(p: *mut i16, x: __m512) {
            _mm256_storeu_si256(p.cast(), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
        }
    }

    #[allow(unsafe_op_in_unsafe_fn)]
    impl Pairs for Avx2 {
        #[inline(always)]
        unsafe fn dot_pair(acc: Self::I, w: Self::C, x: i32) -> Self::I {
            let x = _mm256_set1_epi32(x);
            let half = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
            [half(acc[0], w[0]), half(acc[1], w[1])]
        }
        #[inline(always)]
        unsafe fn store_i16(p: *mut i16, x: Self::F) {
            let (low, high) = (_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            _mm256_storeu_si256(p.cast(), words);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! SAFETY: as `simd::arm`.
    use std::arch::aarch64::*;

    use super::Pairs;
    use crate::kernel::simd::arm::Neon;

    #[allow(unsafe_op_in_unsafe_fn)]
    impl Pairs for Neon {
        #[inline(always)]
        unsafe fn dot_pair(acc: Self::I, w: Self::C, x: i32) -> Self::I {
            let x = vreinterpretq_s16_s32(vdupq_n_s32(x));
            std::array::from_fn(|i| {
                let w = vreinterpretq_s16_u8(w[i]);
                let (low, high) = (vmull_s16(vget_low_s16(w), vget_low_s16(x)), vmull_high_s16(w, x));
                vaddq_s32(acc[i], vpaddq_s32(low, high))
            })
        }
        #[inline(always)]
        unsafe fn store_i16(p: *mut i16, x: Self::F) {
            for (i, x) in x.into_iter().enumerate() {
                vst1_s16(p.add(4 * i), vqmovn_s32(vcvtnq_s32_f32(x)));
            }
        }
    }
}

by_isa! {
    fn word_tile<const R: usize>(panel: *const u8, blocks: usize, codes: *const i16, scales: *const f32, finish: Finish)
        = word_body
}

by_isa! {
    /// [`word_tile`] of two panels that follow each other.
    fn word_twins<const R: usize>(panel: *const u8, blocks: usize, codes: *const i16, scales: *const f32, finish: Finish)
        = word_twins_body
}

#[inline(always)]
unsafe fn word_body<S: Pairs, const R: usize>(
    panel: *const u8,
    blocks: usize,
    codes: *const i16,
    scales: *const f32,
    finish: Finish,
) {
    // SAFETY: the caller's promises.
    unsafe { word_panels::<S, R, 1>(panel, blocks, codes, scales, finish) }
}

#[inline(always)]
unsafe fn word_twins_body<S: Pairs, const R: usize>(
    panel: *const u8,
    blocks: usize,
    codes: *const i16,
    scales: *const f32,
    finish: Finish,
) {
    // SAFETY: the caller's promises.
    unsafe { word_panels::<S, R, 2>(panel, blocks, codes, scales, finish) }
}

#[inline(always)]
unsafe fn word_panels<S: Pairs, const R: usize, const P: usize>(
    panel: *const u8,
    blocks: usize,
    codes: *const i16,
    scales: *const f32,
    finish: Finish,
) {
    // SAFETY: P panels of `blocks` blocks, R rows of as many, and of results.
    unsafe {
        let mut results = [[S::splat(0.0); P]; R];
        for block in 0..blocks {
            let at = |p: usize| panel.add((p * blocks + block) * BLOCK_BYTES);
            let mut acc = [[S::zero_i(); P]; R];
            // Two pairs a turn: what the loop itself takes is a tenth of one.
            for turn in 0..S::turns::<R>(BLOCK / 4) {
                for pair in [2 * turn, 2 * turn + 1] {
                    let mut w = [S::codes(at(0).add(pair * LANES * 4)); P];
                    for (p, w) in w.iter_mut().enumerate().skip(1) {
                        *w = S::codes(at(p).add(pair * LANES * 4));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = codes.add((r * blocks + block) * BLOCK + pair * 2).cast::<i32>().read_unaligned();
                        for (acc, w) in acc.iter_mut().zip(w) {
                            *acc = S::dot_pair(*acc, w, x);
                        }
                    }
                }
            }
            for (r, (acc, results)) in acc.into_iter().zip(&mut results).enumerate() {
                let x = S::splat(*scales.add(r * blocks + block));
                for (p, (acc, result)) in acc.into_iter().zip(results).enumerate() {
                    let scale = S::load(at(p).add(BLOCK * LANES * 2).cast());
                    *result = S::fma(S::mul(S::to_f(acc), scale), x, *result);
                }
            }
        }
        finish.take::<S, R, P>(results);
    }
}

by_isa! { fn float_tile<const R: usize>(panel: *const u8, inputs: usize, x: *const f32, finish: Finish) = float_body }

#[inline(always)]
unsafe fn float_body<S: Simd, const R: usize>(panel: *const u8, inputs: usize, x: *const f32, finish: Finish) {
    // SAFETY: a panel of `inputs` vectors, R rows of `inputs` numbers, and of results.
    unsafe {
        let mut sums = [[S::splat(0.0)]; R];
        for k in 0..inputs {
            let w = S::load(panel.cast::<f32>().add(k * LANES));
            for (r, [sum]) in sums.iter_mut().enumerate() {
                *sum = S::fma(w, S::splat(*x.add(r * inputs + k)), *sum);
            }
        }
        finish.take::<S, R, 1>(sums);
    }
}

by_isa! { fn quantize(x: *const f32, blocks: usize, codes: *mut i16, scales: *mut f32) = quantize_body }

#[inline(always)]
unsafe fn quantize_body<S: Pairs>(x: *const f32, blocks: usize, codes: *mut i16, scales: *mut f32) {
    // SAFETY: `blocks` blocks of inputs and codes, and as many scales.
    unsafe {
        for block in 0..blocks {
            let x: [S::F; BLOCK / LANES] = std::array::from_fn(|i| S::load(x.add(block * BLOCK + i * LANES)));
            let largest = x.iter().fold(S::splat(0.0), |largest, &x| S::max(largest, S::abs(x)));
            let largest = S::max_lane(largest);
            // A block too small to invert is nothing at all beside any other.
            let inverse = S::splat(if largest > 1e-30 { INPUT_MAX / largest } else { 0.0 });
            *scales.add(block) = largest / INPUT_MAX;
            for (i, x) in x.into_iter().enumerate() {
                S::store_i16(codes.add(block * BLOCK + i * LANES), S::mul(x, inverse));
            }
        }
    }
}

/// `x * Phi(x) = x / 2 * (1 + erf(x / sqrt 2))`, erf as a quotient of two polynomials between -4 and 4 (the coefficients of Eigen's
/// `generic_fast_erf_float`, to 4e-7): neither an exponential nor a branch.
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let z = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let z = S::min(S::max(z, S::splat(-4.0)), S::splat(4.0));
        let square = S::mul(z, z);
        let mut above = S::splat(-2.726_142e-10);
        for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2] {
            above = S::fma(above, square, S::splat(c));
        }
        let mut below = S::splat(-1.456_607_2e-5);
        for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_473_9e-2] {
            below = S::fma(below, square, S::splat(c));
        }
        let half = S::mul(x, S::splat(0.5));
        S::fma(half, S::div(S::mul(above, z), below), half)
    }
}

/// `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))`
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let inner = S::fma(S::mul(x, x), S::splat(-2.0 * 0.797_884_6 * 0.044_715), S::splat(-2.0 * 0.797_884_6));
        S::div(x, S::add(S::splat(1.0), exp::<S>(S::mul(x, inner))))
    }
}

/// `x = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row, in place.
pub fn layer_norm(isa: Isa, x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let width = weight.len();
    assert!(bias.len() == width && x.len().is_multiple_of(width));
    for row in x.chunks_exact_mut(width) {
        // SAFETY: three times `width` numbers.
        unsafe { norm(isa, row.as_mut_ptr(), weight.as_ptr(), bias.as_ptr(), eps, width) };
    }
}

by_isa! { fn norm(x: *mut f32, weight: *const f32, bias: *const f32, eps: f32, len: usize) = norm_body }

#[inline(always)]
unsafe fn norm_body<S: Simd>(x: *mut f32, weight: *const f32, bias: *const f32, eps: f32, len: usize) {
    // SAFETY: all accesses are below `len`.
    unsafe {
        let whole = len / LANES * LANES;
        let mut sum = S::splat(0.0);
        for at in (0..whole).step_by(LANES) {
            sum = S::add(sum, S::load(x.add(at)));
        }
        let mut total = S::sum(sum);
        (whole..len).for_each(|at| total += *x.add(at));
        let mean = total / len as f32;
        // A second pass over the deviations: the difference of two large sums would lose them.
        let mut squares = S::splat(0.0);
        for at in (0..whole).step_by(LANES) {
            let d = S::sub(S::load(x.add(at)), S::splat(mean));
            squares = S::fma(d, d, squares);
        }
        let mut total = S::sum(squares);
        (whole..len).for_each(|at| total += (*x.add(at) - mean) * (*x.add(at) - mean));
        let scale = 1.0 / (total / len as f32 + eps).sqrt();
        for at in (0..whole).step_by(LANES) {
            let d = S::mul(S::sub(S::load(x.add(at)), S::splat(mean)), S::splat(scale));
            S::store(x.add(at), S::fma(d, S::load(weight.add(at)), S::load(bias.add(at))));
        }
        for at in whole..len {
            *x.add(at) = (*x.add(at) - mean) * scale * *weight.add(at) + *bias.add(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::quant::Dtype;
    use crate::kernel::testing::{Dice, cpus};

    fn bytes(weights: &[f32]) -> Vec<u8> {
        weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()
    }

    fn matrix(cpu: &Cpu, weights: &[f32], bias: &[f32], inputs: usize, plain: bool) -> Words {
        let bytes = bytes(weights);
        // Two parts, the second of an odd size, as q, k and v are.
        let channels = bias.len();
        let (first, second) = bytes.split_at(channels / 3 * inputs * 4);
        let source = |bytes, channels| Source { dtype: Dtype::F32, bytes, channels, inputs };
        let parts = [source(first, channels / 3), source(second, channels - channels / 3)];
        let parts = if channels < 3 { &parts[1..] } else { &parts[..] };
        Words::pack(cpu, &mut Arena::default(), parts, bias.to_vec(), plain).unwrap()
    }

    fn apply(cpu: &Cpu, matrix: &Words, x: &[f32], then: Then, out: &mut [f32]) {
        let mut words = WordRows::new(x.len() / matrix.inputs(), matrix.inputs());
        words.take(cpu.isa, x, matrix.inputs());
        matrix.apply(cpu.isa, x, &words, then, out);
    }

    fn erf(z: f64) -> f64 {
        // The series, which needs no table: enough for |z| < 4.
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn products_are_nearly_exact_in_16_bits_and_exact_in_f32() {
        for cpu in cpus() {
            for (rows, channels, inputs) in [(1, 16, 128), (7, 33, 256), (13, 48, 384), (64, 2, 128), (3, 20, 40)] {
                let mut dice = Dice::new((rows * channels) as u64);
                let (weights, bias) = (dice.values(channels * inputs), dice.values(channels));
                let (x, before) = (dice.values(rows * inputs), dice.values(rows * channels));
                let size = (inputs as f64).sqrt() / 3.0;
                for (plain, tolerance) in [(false, 2e-3), (true, 1e-5)] {
                    let matrix = matrix(&cpu, &weights, &bias, inputs, plain);
                    for then in [Then::Set, Then::Add, Then::Relu, Then::Gelu, Then::GeluTanh] {
                        let mut out = before.clone();
                        apply(&cpu, &matrix, &x, then, &mut out);
                        for (at, &got) in out.iter().enumerate() {
                            let (row, channel) = (at / channels, at % channels);
                            let pairs = x[row * inputs..][..inputs].iter().zip(&weights[channel * inputs..]);
                            let dot: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                            let x = dot + f64::from(bias[channel]);
                            let expected = match then {
                                Then::Set => x,
                                Then::Add => x + f64::from(before[at]),
                                Then::Relu => x.max(0.0),
                                Then::Gelu if x.abs() > 5.0 => x.max(0.0),
                                Then::Gelu => x * 0.5 * (1.0 + erf(x / 2f64.sqrt())),
                                Then::GeluTanh => {
                                    x * 0.5 * (1.0 + (0.797_884_560_802_865 * (x + 0.044_715 * x.powi(3))).tanh())
                                }
                            };
                            let error = (f64::from(got) - expected).abs() / size;
                            assert!(
                                error < tolerance,
                                "{} {then:?} {rows}x{channels}x{inputs}: {got} {expected}",
                                cpu.isa
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_codes_do_not_overflow() {
        for cpu in cpus() {
            for sign in [1.0, -1.0] {
                let matrix = matrix(&cpu, &[sign; 16 * 128], &[0.0; 16], 128, false);
                let mut out = [0.0; 16];
                apply(&cpu, &matrix, &[-1.0; 128], Then::Set, &mut out);
                assert!(out.iter().all(|x| (x + sign * 128.0).abs() < 1e-3), "{} {out:?}", cpu.isa);
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_company() {
        for cpu in cpus() {
            for plain in [false, true] {
                let (rows, channels, inputs) = (29, 40, 256);
                let mut dice = Dice::new(5);
                let (weights, bias) = (dice.values(channels * inputs), dice.values(channels));
                let x = dice.values(rows * inputs);
                let matrix = matrix(&cpu, &weights, &bias, inputs, plain);
                let mut all = vec![0.0; rows * channels];
                apply(&cpu, &matrix, &x, Then::Gelu, &mut all);
                for row in 0..rows {
                    let mut alone = vec![0.0; channels];
                    apply(&cpu, &matrix, &x[row * inputs..][..inputs], Then::Gelu, &mut alone);
                    assert_eq!(alone, all[row * channels..][..channels], "{} row {row}", cpu.isa);
                }
            }
        }
    }

    #[test]
    fn layer_norm_is_the_formula() {
        for cpu in cpus() {
            for (rows, width) in [(1, 1), (3, 31), (2, 384), (5, 40)] {
                let mut dice = Dice::new(width as u64);
                let x: Vec<f32> = dice.values(rows * width).into_iter().map(|x| x + 3.0).collect();
                let (weight, bias) = (dice.values(width), dice.values(width));
                let mut out = x.clone();
                layer_norm(cpu.isa, &mut out, &weight, &bias, 1e-12);
                for (at, &got) in out.iter().enumerate() {
                    let row = &x[at / width * width..][..width];
                    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
                    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
                    let unit = (f64::from(x[at]) - mean) / (variance + 1e-12).sqrt();
                    let expected = unit * f64::from(weight[at % width]) + f64::from(bias[at % width]);
                    assert!((f64::from(got) - expected).abs() < 1e-4, "{} {width}: {got} {expected}", cpu.isa);
                }
            }
        }
    }
}
