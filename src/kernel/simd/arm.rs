//! 64-bit ARM: NEON.
//!
//! SAFETY, for the whole module: as `x86`. What the standard library does not offer yet, conversions of f16 and dot
//! products of bytes, is written as the one instruction that it is.
use std::arch::aarch64::*;
use std::arch::asm;

use super::Simd;

#[derive(Clone, Copy)]
pub(in crate::kernel) struct Neon;

#[inline(always)]
fn each<T>(f: impl Fn(usize) -> T) -> [T; 4] {
    std::array::from_fn(f)
}

/// acc[c] += sum over i < 4 of w[4c + i] * x[4c + i]
#[allow(unsafe_op_in_unsafe_fn)]
#[inline(always)]
unsafe fn dot(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    asm!(
        ".arch_extension dotprod",
        "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
        acc = inout(vreg) acc, w = in(vreg) w, x = in(vreg) x,
        options(pure, nomem, nostack, preserves_flags)
    );
    acc
}

#[allow(unsafe_op_in_unsafe_fn)]
impl Simd for Neon {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type C = [uint8x16_t; 4];
    const FULL_OFFSET: f32 = 128.0;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [vdupq_n_f32(x); 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        each(|i| vld1q_f32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        for (i, x) in x.into_iter().enumerate() {
            vst1q_f32(p.add(4 * i), x);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        each(|i| {
            let x: float32x4_t;
            let bits = vld1_u16(p.add(4 * i));
            asm!(
                "fcvtl {x:v}.4s, {bits:v}.4h",
                x = out(vreg) x, bits = in(vreg) bits,
                options(pure, nomem, nostack, preserves_flags)
            );
            x
        })
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        for (i, x) in x.into_iter().enumerate() {
            let bits: uint16x4_t;
            asm!(
                "fcvtn {bits:v}.4h, {x:v}.4s",
                bits = out(vreg) bits, x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
            vst1_u16(p.add(4 * i), bits);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        each(|i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p.add(4 * i))))))
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // Not FMAX, which keeps a NaN where the other sets take the second argument.
        each(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        each(|i| vabsq_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        each(|i| vrndnq_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn ldexp(x: Self::F, n: Self::F) -> Self::F {
        each(|i| {
            let biased = vaddq_s32(vcvtnq_s32_f32(n[i]), vdupq_n_s32(127));
            vmulq_f32(x[i], vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased)))
        })
    }
    #[inline(always)]
    unsafe fn first(n: usize, a: Self::F, b: Self::F) -> Self::F {
        let (n, lanes) = (n.min(16) as i32, [0, 1, 2, 3]);
        each(|i| {
            let places = vaddq_s32(vld1q_s32(lanes.as_ptr()), vdupq_n_s32(4 * i as i32));
            vbslq_f32(vcltq_s32(places, vdupq_n_s32(n)), a[i], b[i])
        })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
        vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a[0], a[1]), vmaxnmq_f32(a[2], a[3])))
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [vdupq_n_s32(0); 4]
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        [vdupq_n_s32(x); 4]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        each(|i| vld1q_s32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        each(|i| vcvtq_f32_s32(a[i]))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::F) -> i32 {
        let x = each(|i| vcvtnq_s32_f32(x[i]));
        let low = vcombine_s16(vqmovn_s32(x[0]), vqmovn_s32(x[1]));
        let high = vcombine_s16(vqmovn_s32(x[2]), vqmovn_s32(x[3]));
        vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        vaddvq_s32(vaddq_s32(vaddq_s32(x[0], x[1]), vaddq_s32(x[2], x[3])))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> Self::C {
        each(|i| vld1q_u8(p.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> (Self::C, Self::C) {
        let both = Self::codes(p);
        (each(|i| vandq_u8(both[i], vdupq_n_u8(15))), each(|i| vshrq_n_u8::<4>(both[i])))
    }
    #[inline(always)]
    unsafe fn dot2<const FULL: bool>(acc: Self::I, w0: Self::C, w1: Self::C, x0: i32, x1: i32) -> Self::I {
        let [x0, x1] = [x0, x1].map(|x| vreinterpretq_s8_s32(vdupq_n_s32(x)));
        // The product is of signed bytes: codes beyond 127 are taken less 128.
        let signed = |w| vreinterpretq_s8_u8(if FULL { veorq_u8(w, vdupq_n_u8(128)) } else { w });
        each(|i| dot(dot(acc[i], signed(w0[i]), x0), signed(w1[i]), x1))
    }
}
