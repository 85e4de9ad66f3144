//! x86-64: AVX2 and AVX-512.
//!
//! SAFETY, for the whole module: the intrinsics need the features of their set, which the trait's contract
//! promises; pointers are valid for what is read and written by the same contract.
use std::arch::asm;
use std::arch::x86_64::*;

use std::ops::Range;

use super::{FULL, NIBBLE, Simd};

#[derive(Clone, Copy)]
pub(in crate::kernel) struct Avx512;

#[allow(unsafe_op_in_unsafe_fn)]
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type C = __m512i;
    const FULL_OFFSET: f32 = 0.0;
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        _mm512_storeu_ps(p, x)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn ldexp(x: __m512, n: __m512) -> __m512 {
        _mm512_scalef_ps(x, n)
    }
    #[inline(always)]
    unsafe fn first(n: usize, a: __m512, b: __m512) -> __m512 {
        let mask = if n >= 16 { 0xffff } else { (1u16 << n) - 1 };
        _mm512_mask_blend_ps(mask, b, a)
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        _mm512_reduce_add_ps(a)
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m512) -> f32 {
        _mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    unsafe fn zero_i() -> __m512i {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: __m512) -> i32 {
        let x = _mm512_cvtps_epi32(x);
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x));
        _mm512_reduce_add_epi32(x)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> (__m512i, __m512i) {
        let both = _mm512_loadu_si512(p.cast());
        let mask = _mm512_set1_epi8(15);
        (_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask))
    }
    #[inline(always)]
    unsafe fn dot2<const FULL: bool>(acc: __m512i, w0: __m512i, w1: __m512i, x0: i32, x1: i32) -> __m512i {
        let acc = _mm512_dpbusd_epi32(acc, w0, _mm512_set1_epi32(x0));
        _mm512_dpbusd_epi32(acc, w1, _mm512_set1_epi32(x1))
    }
    /// One product for each row in turn, and in this order: the compiler would take row after row, where each product waits for
    /// the one before, and a processor does not look far enough ahead to begin the next rows meanwhile.
    #[inline(always)]
    unsafe fn dots<const CODES: u8, const R: usize>(
        codes: *const u8,
        pairs: Range<usize>,
        x: *const i8,
        width: usize,
        start: impl Fn(usize) -> i32,
    ) -> [__m512i; R] {
        let mut sums = [Self::zero_i(); R];
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = Self::splat_i(start(r));
        }
        macro_rules! pair {
            ($pair:literal) => {
                // Known when this is compiled.
                if pairs.contains(&$pair) {
                    let (w0, w1) = match CODES {
                        NIBBLE => Self::nibbles(codes.add($pair * 64)),
                        _ => (Self::codes(codes.add($pair * 128)), Self::codes(codes.add($pair * 128 + 64))),
                    };
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = dot::<{ $pair * 8 }>(*sum, w0, x.add(r * width));
                    }
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = dot::<{ $pair * 8 + 4 }>(*sum, w1, x.add(r * width));
                    }
                }
            };
        }
        pair!(0);
        pair!(1);
        pair!(2);
        pair!(3);
        sums
    }
}

/// `sum` + in each lane four of `codes` times the four bytes at `x + AT`; not moved over another one.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn dot<const AT: usize>(mut sum: __m512i, codes: __m512i, x: *const i8) -> __m512i {
    // SAFETY: reads four bytes, of a row by contract.
    unsafe {
        asm!(
            "vpdpbusd {sum}, {codes}, dword ptr [{x} + {at}]{{1to16}}",
            sum = inout(zmm_reg) sum,
            codes = in(zmm_reg) codes,
            x = in(reg) x,
            at = const AT,
            options(nostack, preserves_flags, readonly)
        );
    }
    sum
}

#[derive(Clone, Copy)]
pub(in crate::kernel) struct Avx2;

/// Products of four `w - 128` and four `x` a lane. maddubs adds two products in 16 bits, which 255 * 127 * 2 overflows. The code less 128
/// does not: its sign moves over to x, which is never -128.
#[inline(always)]
unsafe fn less_128(w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: registers only, of the set that the callers have.
    unsafe {
        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

#[allow(unsafe_op_in_unsafe_fn)]
impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type C = [__m256i; 2];
    const FULL_OFFSET: f32 = 128.0;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        _mm256_storeu_ps(p, x[0]);
        _mm256_storeu_ps(p.add(8), x[1]);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
        _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        let half = |p: *const u16| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
        };
        [half(p), half(p.add(8))]
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        let sign = _mm256_set1_ps(-0.0);
        [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])]
    }
    #[inline(always)]
    unsafe fn ldexp(x: Self::F, n: Self::F) -> Self::F {
        let power = |n: __m256| {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        };
        [_mm256_mul_ps(x[0], power(n[0])), _mm256_mul_ps(x[1], power(n[1]))]
    }
    #[inline(always)]
    unsafe fn first(n: usize, a: Self::F, b: Self::F) -> Self::F {
        let n = _mm256_set1_epi32(n.min(16) as i32);
        let low = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        let high = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
        [
            _mm256_blendv_ps(b[0], a[0], _mm256_castsi256_ps(low)),
            _mm256_blendv_ps(b[1], a[1], _mm256_castsi256_ps(high)),
        ]
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let b = _mm256_add_ps(a[0], a[1]);
        let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
        let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
        _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps::<1>(d, d)))
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        let b = _mm256_max_ps(a[0], a[1]);
        let c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
        let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
        _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps::<1>(d, d)))
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [_mm256_setzero_si256(); 2]
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        [_mm256_set1_epi32(x); 2]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::F) -> i32 {
        let (low, high) = (_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
        let pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
        let quads = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
        let twice = _mm_add_epi32(quads, _mm_shuffle_epi32::<0b01_00_11_10>(quads));
        _mm_cvtsi128_si32(_mm_add_epi32(twice, _mm_shuffle_epi32::<0b10_11_00_01>(twice)))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> Self::C {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> (Self::C, Self::C) {
        let both = Self::codes(p);
        let mask = _mm256_set1_epi8(15);
        let high = |x| _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
        ([_mm256_and_si256(both[0], mask), _mm256_and_si256(both[1], mask)], [high(both[0]), high(both[1])])
    }
    #[inline(always)]
    unsafe fn dot2<const FULL: bool>(acc: Self::I, w0: Self::C, w1: Self::C, x0: i32, x1: i32) -> Self::I {
        let (x0, x1) = (_mm256_set1_epi32(x0), _mm256_set1_epi32(x1));
        let ones = _mm256_set1_epi16(1);
        let half = |acc, w0, w1| {
            if FULL {
                _mm256_add_epi32(acc, _mm256_add_epi32(less_128(w0, x0), less_128(w1, x1)))
            } else {
                // 63 * 127 * 4 = 32,004 still fits.
                let sum = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
                _mm256_add_epi32(acc, _mm256_madd_epi16(sum, ones))
            }
        };
        [half(acc[0], w0[0], w1[0]), half(acc[1], w0[1], w1[1])]
    }
    #[inline(always)]
    unsafe fn turns<const R: usize>(count: usize) -> usize {
        if R > 2 { std::ptr::read_volatile(&count) } else { count }
    }
    /// A block of nibbles is summed in 16 bits, which hold 15 * 127 * 16 = 30,480.
    #[inline(always)]
    unsafe fn dots<const CODES: u8, const R: usize>(
        codes: *const u8,
        pairs: Range<usize>,
        x: *const i8,
        width: usize,
        start: impl Fn(usize) -> i32,
    ) -> [Self::I; R] {
        let mut sums = [Self::zero_i(); R];
        let four = |r: usize, at: usize| x.add(r * width + at).cast::<i32>().read_unaligned();
        let (mut pair, end) = (pairs.start, Self::turns::<R>(pairs.end));
        while pair != end {
            if CODES == FULL {
                // One after the other: there are no registers for both and what becomes of them.
                for at in [2 * pair, 2 * pair + 1] {
                    let w = Self::codes(codes.add(at * 64));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_epi32(four(r, at * 4));
                        for half in 0..2 {
                            sum[half] = _mm256_add_epi32(sum[half], less_128(w[half], x));
                        }
                    }
                }
                pair += 1;
                continue;
            }
            let (w0, w1) = if CODES == NIBBLE {
                Self::nibbles(codes.add(pair * 64))
            } else {
                (Self::codes(codes.add(pair * 128)), Self::codes(codes.add(pair * 128 + 64)))
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                let (x0, x1) = (four(r, pair * 8), four(r, pair * 8 + 4));
                if CODES == NIBBLE {
                    let (x0, x1) = (_mm256_set1_epi32(x0), _mm256_set1_epi32(x1));
                    for half in 0..2 {
                        sum[half] = _mm256_add_epi16(sum[half], _mm256_maddubs_epi16(w0[half], x0));
                        sum[half] = _mm256_add_epi16(sum[half], _mm256_maddubs_epi16(w1[half], x1));
                    }
                } else {
                    *sum = Self::dot2::<false>(*sum, w0, w1, x0, x1);
                }
            }
            pair += 1;
        }
        let ones = _mm256_set1_epi16(1);
        for (r, sum) in sums.iter_mut().enumerate() {
            let start = _mm256_set1_epi32(start(r));
            for half in sum {
                let whole = if CODES == NIBBLE { _mm256_madd_epi16(*half, ones) } else { *half };
                *half = _mm256_add_epi32(start, whole);
            }
        }
        sums
    }
}
