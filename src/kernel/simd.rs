//! Sixteen lanes of f32, on four instruction sets. Kernels are written once over [`Simd`] and compiled once per set;
//! which set runs is decided at run time, so that one portable binary uses what the machine has.
//!
//!     kernel<S: Simd>      one text, #[inline(always)]
//!       ├ portable         arrays of 16, whatever the compiler makes of them
//!       ├ neon             four registers of 4; dot products of bytes
//!       ├ avx2             two registers of 8; FMA, F16C
//!       └ avx512           one register of 16; VNNI for int8, and AMX for 16 rows of it at a time where there is some
//!
//! The order of additions inside a row never depends on how many rows are computed together: a row's result is
//! bit-identical alone and in any company (on one instruction set; between sets roundings differ).

use std::fmt;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "aarch64")]
pub(super) mod arm;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Isa {
    /// Any machine.
    Portable,
    /// 64-bit ARM with dot products of bytes (ARMv8.2 and later: Graviton 2, Ampere, Apple).
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// The same, with AMX for int8 (Xeons from 2023 on), which the kernel lets this process use.
    Amx,
}

impl Isa {
    /// The fastest one this machine has.
    pub fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Portable)
    }

    /// All that this machine has, slowest first.
    pub fn available() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    return match amx::is_ready() {
                        true => &[Self::Portable, Self::Avx2, Self::Avx512, Self::Amx],
                        false => &[Self::Portable, Self::Avx2, Self::Avx512],
                    };
                }
                return &[Self::Portable, Self::Avx2];
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            return &[Self::Portable, Self::Neon];
        }
        &[Self::Portable]
    }
}

impl Isa {
    /// Whether there are 32 registers of 16 lanes each, rather than half as many lanes or registers.
    pub(super) fn is_wide(self) -> bool {
        matches!(self, Self::Avx512 | Self::Amx)
    }

    /// Cuts rows into tiles of as many as the set takes, 4, 2 and 1: `work(row, count)`.
    #[inline]
    pub(super) fn each_tile(self, first: usize, last: usize, mut work: impl FnMut(usize, usize)) {
        let mut row = first;
        while row < last {
            let count = tile_rows(if self.is_wide() { 8 } else { 4 }, last - row);
            work(row, count);
            row += count;
        }
    }
}

/// Rows of the next tile when `left` are left and a tile has at most `most`: 8, 4, 2 or 1.
#[inline(always)]
pub(super) fn tile_rows(most: usize, left: usize) -> usize {
    match left.min(most) {
        8.. => 8,
        4..8 => 4,
        2..4 => 2,
        _ => 1,
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Neon => "neon-dotprod",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512-vnni",
            Self::Amx => "amx-int8",
        })
    }
}

/// Defines `unsafe fn name(isa, args)`, which runs `body::<S>(args)` compiled for the instruction set that `isa` names.
macro_rules! by_isa {
    ($(#[$doc:meta])* fn $name:ident $(<$(const $g:ident: $gt:ty),*>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name $(<$(const $g: $gt),*>)? (isa: $crate::kernel::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,bmi2,popcnt")]
            unsafe fn avx512 $(<$(const $g: $gt),*>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's promises are passed on; the features are those of this function.
                unsafe { $body::<$crate::kernel::simd::x86::Avx512 $($(, $g)*)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
            unsafe fn avx2 $(<$(const $g: $gt),*>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $body::<$crate::kernel::simd::x86::Avx2 $($(, $g)*)?>($($arg),*) }
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon,dotprod")]
            unsafe fn neon $(<$(const $g: $gt),*>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $body::<$crate::kernel::simd::arm::Neon $($(, $g)*)?>($($arg),*) }
            }
            // SAFETY: an `Isa` beyond Portable comes from `Isa::available`, so the machine has it.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernel::Isa::Avx512 | $crate::kernel::Isa::Amx => avx512 $(::<$($g),*>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernel::Isa::Avx2 => avx2 $(::<$($g),*>)? ($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    $crate::kernel::Isa::Neon => neon $(::<$($g),*>)? ($($arg),*),
                    _ => $body::<$crate::kernel::simd::Portable $($(, $g)*)?>($($arg),*),
                }
            }
        }
    };
}
pub(super) use by_isa;

/// Sixteen lanes. All functions are unsafe since they may only run where their instruction set exists, and since
/// loads and stores take bare pointers; none needs alignment.
///
/// # Safety
/// Pointers must be valid for the 16 (or, for codes, 64) elements that the name says, and the set must be available.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Simd: Copy {
    /// 16 x f32.
    type F: Copy;
    /// 16 x i32.
    type I: Copy;
    /// 64 x u8: 16 channels x 4 consecutive k.
    type C: Copy;
    /// What [`Simd::dot2`] takes off each code when `FULL`.
    const FULL_OFFSET: f32;
    /// Rows of a tile of 16 channels: more sums than there are registers would go to memory and back with every
    /// multiplication.
    const ROWS: usize = 4;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn store_f16(p: *mut u16, x: Self::F);
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// x * 2^n for whole n in -126..=127.
    unsafe fn ldexp(x: Self::F, n: Self::F) -> Self::F;
    /// The first `n` lanes of `a`, the others of `b`.
    unsafe fn first(n: usize, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sum(a: Self::F) -> f32;
    unsafe fn max_lane(a: Self::F) -> f32;

    unsafe fn zero_i() -> Self::I;
    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn load_i(p: *const i32) -> Self::I;
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// Rounds 16 values in -127..=127 to i8 and stores them; returns their sum.
    unsafe fn store_i8(p: *mut i8, x: Self::F) -> i32;

    /// A hint that the cache line at `p` will be read; any address will do.
    unsafe fn prefetch(p: *const u8);
    unsafe fn codes(p: *const u8) -> Self::C;
    /// Low and high nibbles.
    unsafe fn nibbles(p: *const u8) -> (Self::C, Self::C);
    /// acc[c] += sum over i < 4 of w0[4c + i] * x0[i] + w1[4c + i] * x1[i]; `x` are four i8 in -127..=127 each.
    /// `FULL`: codes may be up to 255 and are taken less [`Simd::FULL_OFFSET`]; else they are at most 63.
    unsafe fn dot2<const FULL: bool>(acc: Self::I, w0: Self::C, w1: Self::C, x0: i32, x1: i32) -> Self::I;

    /// `count`, hidden from the compiler where it must not know how many turns a loop over R rows has: it would unroll them,
    /// add in another order to shorten the chain, and run out of registers, which costs half as much again.
    #[inline(always)]
    unsafe fn turns<const R: usize>(count: usize) -> usize {
        count
    }

    /// `start(r)` + the dot products of R rows, `width` apart, with `8 * pairs.len()` inputs' codes of a block; both begin
    /// with the block. Sets of few registers go another way to the same sums.
    #[inline(always)]
    unsafe fn dots<const CODES: u8, const R: usize>(
        codes: *const u8,
        pairs: Range<usize>,
        x: *const i8,
        width: usize,
        start: impl Fn(usize) -> i32,
    ) -> [Self::I; R] {
        // SAFETY: by contract.
        unsafe {
            let mut acc = [Self::zero_i(); R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = Self::splat_i(start(r));
            }
            // Eight inputs a turn: two vectors of codes, which are one vector of nibbles.
            for pair in pairs {
                let (w0, w1) = match CODES {
                    NIBBLE => Self::nibbles(codes.add(pair * 64)),
                    _ => (Self::codes(codes.add(pair * 128)), Self::codes(codes.add(pair * 128 + 64))),
                };
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = x.add(r * width + pair * 8).cast::<i32>();
                    let (x0, x1) = (x.read_unaligned(), x.add(1).read_unaligned());
                    *acc = match CODES {
                        FULL => Self::dot2::<true>(*acc, w0, w1, x0, x1),
                        _ => Self::dot2::<false>(*acc, w0, w1, x0, x1),
                    };
                }
            }
            acc
        }
    }
}

/// Rows of a product that is made as one, and its channels.
pub(super) const TILE: usize = 16;
/// Inputs of such a product.
pub(super) const DEPTH: usize = 32;

/// Products of tiles of int8.
pub(super) trait Tiles {
    /// Products number `i < count`: `sums[i][row][channel] = sum over k < 32 of x[row * width + i * 32 + k] *
    /// w[i][k / 4][channel][k % 4]`, for 16 rows and 16 channels.
    ///
    /// # Safety
    /// 16 rows of `width` inputs, of which the first `count * 32` are read, `count * 512` weights and room for `count * 256` sums;
    /// the instructions exist.
    unsafe fn products(x: *const i8, width: usize, w: *const i8, count: usize, sums: *mut i32);
}

/// How the codes of a block lie and how large they are: two to a byte, up to 15.
pub(super) const NIBBLE: u8 = 0;
/// A byte each, up to 63.
pub(super) const BYTE: u8 = 1;
/// A byte each, up to 255.
pub(super) const FULL: u8 = 2;

/// e^x to about 2 units in the last place; 0 below -87, finite above 88.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only; the caller's promise is that S is available.
    unsafe {
        let x = S::min(S::max(x, S::splat(-87.3)), S::splat(88.0));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_3e-1] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
        S::ldexp(p, n)
    }
}

/// Arrays; the yardstick, and what machines without AVX2 run.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn lanes<T>(f: impl Fn(usize) -> T) -> [T; 16] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F = [f32; 16];
    type I = [i32; 16];
    type C = [u8; 64];
    const FULL_OFFSET: f32 = 0.0;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: 16 elements by contract, also below.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: see load.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        // SAFETY: see load.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        lanes(|i| f16_to_f32(bits[i]))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        // SAFETY: see load.
        unsafe { p.cast::<[u16; 16]>().write_unaligned(lanes(|i| half::f16::from_f32_const(x[i]).to_bits())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        // SAFETY: see load.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        lanes(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Rounded twice: without the instruction a true fma is a library call.
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        lanes(|i| a[i].abs())
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        // Adding 1.5 * 2^23 leaves no bits for fractions; the machine's rounding is to even.
        lanes(|i| if a[i].abs() < 4_194_304.0 { (a[i] + 12_582_912.0) - 12_582_912.0 } else { a[i] })
    }
    #[inline(always)]
    unsafe fn ldexp(x: Self::F, n: Self::F) -> Self::F {
        lanes(|i| x[i] * f32::from_bits(((n[i] as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn first(n: usize, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if i < n { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let b: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let c: [f32; 4] = std::array::from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        // SAFETY: see load.
        unsafe { p.cast::<[i32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        lanes(|i| a[i] as f32)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::F) -> i32 {
        // SAFETY: see load.
        unsafe {
            let x = Self::round(x);
            let codes = lanes(|i| x[i] as i8);
            p.cast::<[i8; 16]>().write_unaligned(codes);
            codes.into_iter().map(i32::from).sum()
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> Self::C {
        // SAFETY: see load.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> (Self::C, Self::C) {
        // SAFETY: see load.
        let c = unsafe { Self::codes(p) };
        (std::array::from_fn(|i| c[i] & 15), std::array::from_fn(|i| c[i] >> 4))
    }
    #[inline(always)]
    unsafe fn dot2<const FULL: bool>(acc: Self::I, w0: Self::C, w1: Self::C, x0: i32, x1: i32) -> Self::I {
        let mut acc = acc;
        for (w, x) in [(w0, x0), (w1, x1)] {
            let x = x.to_le_bytes();
            for (i, acc) in acc.iter_mut().enumerate() {
                for (j, x) in x.into_iter().enumerate() {
                    *acc += i32::from(w[4 * i + j]) * i32::from(x as i8);
                }
            }
        }
        acc
    }
}

/// Exact, also for subnormals; branches only on the rare classes.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let magic = f32::from_bits(113 << 23);
    let mut word = (u32::from(bits) & 0x7fff) << 13;
    let exponent = word & (0x7c00 << 13);
    word += (127 - 15) << 23;
    if exponent == 0x7c00 << 13 {
        word += (128 - 16) << 23;
    } else if exponent == 0 {
        word = (f32::from_bits(word + (1 << 23)) - magic).to_bits();
    }
    f32::from_bits(word | (u32::from(bits) & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe fn probe_body<S: Simd>(x: *const f32, out: *mut f32) {
        // SAFETY: 16 inputs, 96 outputs; see the caller.
        unsafe {
            let v = S::load(x);
            S::store(out, exp::<S>(v));
            S::store(out.add(16), S::round(v));
            S::store(out.add(32), S::first(5, v, S::splat(9.0)));
            let mut halves = [0u16; 16];
            S::store_f16(halves.as_mut_ptr(), v);
            S::store(out.add(48), S::load_f16(halves.as_ptr()));
            S::store(out.add(64), S::load_bf16(halves.as_ptr()));
            let mut bytes = [0i8; 16];
            let sum = S::store_i8(bytes.as_mut_ptr(), S::max(S::min(v, S::splat(127.0)), S::splat(-127.0)));
            assert_eq!(sum, bytes.iter().map(|&b| i32::from(b)).sum::<i32>());
            let tail = [S::sum(v), S::max_lane(v), bytes[0] as f32, bytes[15] as f32];
            std::ptr::copy_nonoverlapping(tail.as_ptr(), out.add(80), 4);
        }
    }
    by_isa! { fn probe(x: *const f32, out: *mut f32) = probe_body }

    #[test]
    fn every_set_computes_what_the_standard_library_does() {
        let inputs: [[f32; 16]; 2] = [
            std::array::from_fn(|i| (i as f32 - 7.5) * 5.3),
            [-1e30, -90.0, -87.0, -1e-8, 0.0, 1e-8, 0.5, 1.5, 2.5, -0.5, -1.5, 6e-8, 3e-6, 60.0, 87.9, -42.4],
        ];
        for &isa in Isa::available() {
            for x in inputs {
                let mut out = [0f32; 96];
                // SAFETY: both arrays are as long as the probe asks.
                unsafe { probe(isa, x.as_ptr(), out.as_mut_ptr()) };
                for i in 0..16 {
                    let exact = f64::from(x[i]).exp();
                    assert!(
                        (f64::from(out[i]) - exact).abs() <= 3e-7 * exact + 1.3e-38,
                        "{isa} exp({}) {}",
                        x[i],
                        out[i]
                    );
                    assert_eq!(out[16 + i], x[i].round_ties_even(), "{isa}");
                    assert_eq!(out[32 + i], if i < 5 { x[i] } else { 9.0 }, "{isa}");
                    assert_eq!(out[48 + i], half::f16::from_f32(x[i]).to_f32(), "{isa}");
                    assert_eq!(
                        out[64 + i],
                        half::bf16::from_bits(half::f16::from_f32(x[i]).to_bits()).to_f32(),
                        "{isa}"
                    );
                }
                assert!((out[80] - x.iter().sum::<f32>()).abs() <= 1e-5 * x.iter().map(|x| x.abs()).sum::<f32>());
                assert_eq!(out[81], x.iter().copied().fold(f32::MIN, f32::max));
                let byte = |x: f32| x.clamp(-127.0, 127.0).round_ties_even();
                assert_eq!((out[82], out[83]), (byte(x[0]), byte(x[15])), "{isa}");
            }
        }
    }
}
