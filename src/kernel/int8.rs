//! Rows of int8 activations times one panel of quantised weights: per block of 32 `acc = sum code * x` in i32, then
//! `y += dx * (dw * acc + min * sum x)`.
//!
//!     some rows          tiles of 8, 4, 2, 1 rows, sums in registers, weights decoded once a tile
//!     16 rows, AMX       all sums of some blocks first, to memory, since tiles go nowhere else; then the scales
//!
//! Sums of codes are whole numbers and what follows is one function, so that both ways give a row the same bits.

use std::mem::MaybeUninit;

use crate::kernel::Isa;
use crate::kernel::panel::{BLOCK, LANES};
use crate::kernel::rows::{CENTRES, View};
use crate::kernel::simd::{BYTE, DEPTH, FULL, NIBBLE, Simd, TILE, Tiles, by_isa, tile_rows};

/// Rows of int8 activations: strides follow from `blocks`.
#[derive(Clone, Copy)]
pub(super) struct Int8 {
    pub(super) x: View,
    pub(super) blocks: usize,
}

impl Int8 {
    /// From row `row` on.
    ///
    /// # Safety
    /// There are that many rows.
    #[inline(always)]
    pub(super) unsafe fn from(self, row: usize) -> Self {
        // SAFETY: by contract.
        let x = unsafe { self.x.from(row, self.blocks) };
        Self { x, blocks: self.blocks }
    }
}

/// What codes of a matrix mean beyond the scales of their groups: `factor * scale * (code - zero)`.
#[derive(Clone, Copy)]
pub(super) struct Scaled {
    pub(super) zero: f32,
    pub(super) factor: f32,
}

/// Bytes that a single row's weights are asked for ahead of their use.
const AHEAD: usize = 4096;

/// Products that AMX makes in one go: their sums, weights and inputs stay in L1.
const TILES: usize = 20;

/// So many rows that a tile lacks some for are taken as one all the same: it costs less than the two or three smaller ones of them.
const NEARLY: usize = 10;

/// A product is of a block.
const _: () = assert!(DEPTH == BLOCK && TILE == LANES);

/// `[rows, 16]` = rows of `x` times a panel.
///
/// # Safety
/// A panel of `x.blocks` blocks in the layout of panel.rs, with `GROUPS` scales a block and as many minima if `AFFINE`;
/// `rows` rows of `x` and, since a tile may be read that is not full, memory for as many as make tiles of 16; room for as many rows
/// of 16 results; `isa` is one of [`Isa::available`].
pub(super) unsafe fn int8_panel<const CODES: u8, const GROUPS: usize, const AFFINE: bool>(
    isa: Isa,
    w: *const u8,
    x: Int8,
    rows: usize,
    scaled: Scaled,
    out: *mut f32,
) {
    // SAFETY: by contract, cut at a row.
    unsafe {
        // Groups of 16 inputs would leave half of each tile empty.
        let tiled = if isa == Isa::Amx && GROUPS == 1 { (rows + TILE - NEARLY) / TILE * TILE } else { 0 };
        #[cfg(target_arch = "x86_64")]
        if tiled > 0 {
            amx::<CODES, AFFINE>(w, x, tiled, scaled, out);
        }
        let tiled = tiled.min(rows);
        untiled::<CODES, GROUPS, AFFINE>(isa, w, x.from(tiled), rows - tiled, scaled, out.add(tiled * LANES));
    }
}

by_isa! {
    fn untiled<const CODES: u8, const GROUPS: usize, const AFFINE: bool>(
        w: *const u8, x: Int8, rows: usize, scaled: Scaled, out: *mut f32,
    ) = untiled_body
}

#[inline(always)]
unsafe fn untiled_body<S: Simd, const CODES: u8, const GROUPS: usize, const AFFINE: bool>(
    w: *const u8,
    x: Int8,
    rows: usize,
    scaled: Scaled,
    out: *mut f32,
) {
    let mut row = 0;
    while row < rows {
        let count = tile_rows(S::ROWS, rows - row);
        // SAFETY: by contract, `rows` rows of activations and of 16 results.
        unsafe {
            let (x, out) = (x.from(row), out.add(row * LANES));
            match count {
                8.. if S::ROWS == 8 => some_rows::<S, CODES, GROUPS, AFFINE, 8>(w, x, scaled, out),
                4.. => some_rows::<S, CODES, GROUPS, AFFINE, 4>(w, x, scaled, out),
                2.. => some_rows::<S, CODES, GROUPS, AFFINE, 2>(w, x, scaled, out),
                _ => some_rows::<S, CODES, GROUPS, AFFINE, 1>(w, x, scaled, out),
            }
        }
        row += count;
    }
}

/// Bytes of a block's codes, and of all of it.
const fn block_bytes(codes: u8, groups: usize, affine: bool) -> (usize, usize) {
    let code_bytes = if codes == NIBBLE { 256 } else { 512 };
    (code_bytes, code_bytes + groups * LANES * 2 * if affine { 2 } else { 1 })
}

#[inline(always)]
unsafe fn some_rows<S: Simd, const CODES: u8, const GROUPS: usize, const AFFINE: bool, const R: usize>(
    w: *const u8,
    x: Int8,
    scaled: Scaled,
    out: *mut f32,
) {
    let (code_bytes, block_bytes) = block_bytes(CODES, GROUPS, AFFINE);
    let Int8 { x, blocks } = x;
    let width = blocks * BLOCK;
    // SAFETY: a panel of `blocks` blocks in the layout of panel.rs, R rows of as many blocks, R x 16 results.
    unsafe {
        // Where all codes of a kind have one centre, the sums begin with what it takes off, unless the set's own dot
        // product takes it off.
        let centre = match CODES {
            NIBBLE if !AFFINE => Some(0),
            FULL if S::FULL_OFFSET == 0.0 => Some(1),
            _ => None,
        };
        debug_assert!(AFFINE || CODES == BYTE || scaled.zero == CENTRES[usize::from(CODES == FULL)] as f32);
        let mut results = [S::splat(0.0); R];
        for block in 0..blocks {
            let codes = w.add(block * block_bytes);
            if R == 1 {
                // One row waits for memory alone; the machine's own prefetch stops at every small page.
                for line in (0..block_bytes).step_by(64) {
                    S::prefetch(codes.wrapping_add(AHEAD + line));
                }
            }
            for group in 0..GROUPS {
                let start = |r| match centre {
                    Some(centre) => *x.starts.add((r * blocks + block) * CENTRES.len() + centre),
                    None => 0,
                };
                let pairs = group * (4 / GROUPS)..(group + 1) * (4 / GROUPS);
                let acc = S::dots::<CODES, R>(codes, pairs, x.codes.add(block * BLOCK), width, start);
                let group = Group::<S>::of::<GROUPS, AFFINE>(codes.add(code_bytes), group, scaled);
                for (r, (acc, result)) in acc.into_iter().zip(&mut results).enumerate() {
                    *result = group.add::<CODES, GROUPS, AFFINE>(acc, x, r * blocks + block, *result);
                }
            }
        }
        for (r, result) in results.into_iter().enumerate() {
            S::store(out.add(r * LANES), S::mul(result, S::splat(scaled.factor)));
        }
    }
}

/// What the sums of a group are scaled by, for 16 channels.
struct Group<S: Simd> {
    number: usize,
    scale: S::F,
    min: S::F,
    minus_zero: S::F,
}

impl<S: Simd> Group<S> {
    /// Group `number` of the block whose scales begin at `scales`.
    #[inline(always)]
    unsafe fn of<const GROUPS: usize, const AFFINE: bool>(scales: *const u8, number: usize, scaled: Scaled) -> Self {
        let scales = scales.cast::<u16>();
        // SAFETY: by contract, `GROUPS` times 16 scales, and as many minima.
        unsafe {
            let scale = S::load_f16(scales.add(number * LANES));
            let min = if AFFINE { S::load_f16(scales.add((GROUPS + number) * LANES)) } else { scale };
            Self { number, scale, min, minus_zero: S::splat(-scaled.zero) }
        }
    }

    /// `result` + what the group's sums `acc` are worth; `at` is the row's block. Sums of codes that have one centre are centred.
    #[inline(always)]
    unsafe fn add<const CODES: u8, const GROUPS: usize, const AFFINE: bool>(
        &self,
        acc: S::I,
        x: View,
        at: usize,
        result: S::F,
    ) -> S::F {
        // SAFETY: the view has that block.
        unsafe {
            let sum = S::splat(if GROUPS == 1 { *x.totals.add(at) } else { *x.sums.add(at * 2 + self.number) });
            let value = if AFFINE {
                S::fma(self.min, sum, S::mul(S::to_f(acc), self.scale))
            } else if CODES != BYTE {
                S::mul(S::to_f(acc), self.scale)
            } else {
                S::mul(S::fma(self.minus_zero, sum, S::to_f(acc)), self.scale)
            };
            S::fma(value, S::splat(*x.scales.add(at)), result)
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,bmi2,popcnt")]
unsafe fn amx<const CODES: u8, const AFFINE: bool>(w: *const u8, x: Int8, rows: usize, scaled: Scaled, out: *mut f32) {
    use crate::kernel::simd::{amx::Amx, x86::Avx512};
    // SAFETY: the caller's promises are passed on; the features are those of this function.
    unsafe { tiled_body::<Avx512, Amx, CODES, AFFINE>(w, x, rows, scaled, out) }
}

/// Memory for some blocks' weights and sums; tiles are read and written by whole cache lines.
#[repr(align(64))]
struct Room {
    codes: [MaybeUninit<i8>; TILES * BLOCK * LANES],
    sums: [MaybeUninit<i32>; TILES * TILE * LANES],
}

/// `rows`, a multiple of 16, in chunks of blocks: weights of a chunk are unpacked once for all rows, and `out` holds the results
/// of the chunks before.
#[inline(always)]
unsafe fn tiled_body<S: Simd, T: Tiles, const CODES: u8, const AFFINE: bool>(
    w: *const u8,
    x: Int8,
    rows: usize,
    scaled: Scaled,
    out: *mut f32,
) {
    debug_assert!(rows.is_multiple_of(TILE));
    let (code_bytes, block_bytes) = block_bytes(CODES, 1, AFFINE);
    let blocks = x.blocks;
    let chunk = blocks.div_ceil(blocks.div_ceil(TILES));
    let mut room = Room {
        codes: [MaybeUninit::uninit(); TILES * BLOCK * LANES],
        sums: [MaybeUninit::uninit(); TILES * TILE * LANES],
    };
    let (codes, sums) = (room.codes.as_mut_ptr().cast::<i8>(), room.sums.as_mut_ptr().cast::<i32>());
    for begin in (0..blocks).step_by(chunk) {
        let end = blocks.min(begin + chunk);
        // SAFETY: by contract, `blocks` blocks of weights and of inputs in each row, `rows` rows of 16 results; the
        // room is for `chunk` blocks, which are at most `TILES`.
        unsafe {
            for block in begin..end {
                let to = codes.add((block - begin) * BLOCK * LANES);
                centred::<CODES, AFFINE>(w.add(block * block_bytes), to);
            }
            for row in (0..rows).step_by(TILE) {
                let (Int8 { x, .. }, out) = (x.from(row), out.add(row * LANES));
                T::products(x.codes.add(begin * BLOCK), blocks * BLOCK, codes, end - begin, sums);
                let mut results = [S::splat(0.0); TILE];
                if begin > 0 {
                    for (r, result) in results.iter_mut().enumerate() {
                        *result = S::load(out.add(r * LANES));
                    }
                }
                for block in begin..end {
                    let sums = sums.add((block - begin) * TILE * LANES);
                    let group = Group::<S>::of::<1, AFFINE>(w.add(block * block_bytes + code_bytes), 0, scaled);
                    for (r, result) in results.iter_mut().enumerate() {
                        let acc = S::load_i(sums.add(r * LANES));
                        *result = group.add::<CODES, 1, AFFINE>(acc, x, r * blocks + block, *result);
                    }
                }
                let factor = S::splat(if end == blocks { scaled.factor } else { 1.0 });
                for (r, result) in results.into_iter().enumerate() {
                    S::store(out.add(r * LANES), S::mul(result, factor));
                }
            }
        }
    }
}

/// The codes of a block as signed bytes, `[k / 4][channel][k % 4]`, less their centre where they have one.
#[inline(always)]
unsafe fn centred<const CODES: u8, const AFFINE: bool>(codes: *const u8, to: *mut i8) {
    // SAFETY: a block's codes, and room for 512.
    unsafe {
        if CODES == NIBBLE {
            let centre = if AFFINE { 0 } else { CENTRES[0] as i8 };
            for pair in 0..4 {
                for i in 0..64 {
                    let both = *codes.add(pair * 64 + i);
                    *to.add(pair * 128 + i) = (both & 15) as i8 - centre;
                    *to.add(pair * 128 + 64 + i) = (both >> 4) as i8 - centre;
                }
            }
        } else {
            for i in 0..BLOCK * LANES {
                // Less 128, in the other way of writing signs.
                *to.add(i) = (*codes.add(i) ^ if CODES == FULL { 0x80 } else { 0 }) as i8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::rows::Activations;
    use crate::kernel::simd::Portable;
    use crate::kernel::testing::Dice;
    use crate::kernel::{Cpu, Pool};
    use std::sync::Arc;

    /// Tiles by their definition.
    struct Defined;

    impl Tiles for Defined {
        unsafe fn products(x: *const i8, width: usize, w: *const i8, count: usize, sums: *mut i32) {
            for (i, row, channel) in
                (0..count).flat_map(|i| (0..TILE * LANES).map(move |at| (i, at / LANES, at % LANES)))
            {
                // SAFETY: by contract.
                unsafe {
                    let product = |k: usize| {
                        let w = *w.add(i * BLOCK * LANES + (k / 4 * LANES + channel) * 4 + k % 4);
                        i32::from(*x.add(row * width + i * BLOCK + k)) * i32::from(w)
                    };
                    *sums.add((i * TILE + row) * LANES + channel) = (0..BLOCK).map(product).sum();
                }
            }
        }
    }

    fn check<const CODES: u8, const AFFINE: bool>(most: u8, zero: f32) {
        let cpu = Cpu { pool: Arc::new(Pool::new(1)), isa: Isa::Portable };
        for (rows, blocks) in [(16, 1), (32, 7), (16, 21), (48, 43)] {
            let mut dice = Dice::new(u64::from(CODES) + blocks as u64);
            let mut x = Activations::new(rows, blocks * BLOCK, true);
            let values = dice.values(rows * blocks * BLOCK);
            x.floats(blocks * BLOCK).copy_from_slice(&values);
            x.quantize(&cpu, rows);
            let (code_bytes, block_bytes) = block_bytes(CODES, 1, AFFINE);
            let mut w = Vec::new();
            for _ in 0..blocks {
                w.extend((0..code_bytes).map(|_| (dice.bits() as u8) & most));
                w.extend(
                    (0..(block_bytes - code_bytes) / 2).flat_map(|_| half::f16::from_f32(dice.value()).to_le_bytes()),
                );
            }
            let scaled = Scaled { zero, factor: 0.75 };
            let (mut tiled, mut untiled) = (vec![f32::NAN; rows * LANES], vec![f32::NAN; rows * LANES]);
            let x = Int8 { x: x.view(rows, true), blocks };
            // SAFETY: all as long as `rows` and `blocks` say.
            unsafe {
                tiled_body::<Portable, Defined, CODES, AFFINE>(w.as_ptr(), x, rows, scaled, tiled.as_mut_ptr());
                untiled_body::<Portable, CODES, 1, AFFINE>(w.as_ptr(), x, rows, scaled, untiled.as_mut_ptr());
            }
            assert!(tiled.iter().all(|x| x.is_finite()));
            assert_eq!(tiled, untiled, "{CODES} {AFFINE}: {rows} rows of {blocks} blocks");
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_a_tile() {
        check::<NIBBLE, false>(0xff, 8.0);
        check::<NIBBLE, true>(0xff, 0.0);
        check::<BYTE, false>(31, 16.0);
        check::<BYTE, true>(31, 0.0);
        check::<FULL, false>(0xff, 128.0);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn amx_multiplies_as_it_is_defined() {
        if !Isa::available().contains(&Isa::Amx) {
            eprintln!("left out: this machine has no AMX");
            return;
        }
        let mut dice = Dice::new(3);
        for (count, width) in [(1, 32), (4, 160), (7, 224), (18, 576), (20, 700)] {
            let bytes = |n: usize, dice: &mut Dice| (0..n).map(|_| dice.bits() as i8).collect::<Vec<i8>>();
            let (x, w) = (bytes(TILE * width, &mut dice), bytes(count * BLOCK * LANES, &mut dice));
            let (mut got, mut expected) = (vec![0; count * 256 + 1], vec![0; count * 256 + 1]);
            // SAFETY: all as long as count and width say; the set is there.
            unsafe {
                crate::kernel::simd::amx::Amx::products(x.as_ptr(), width, w.as_ptr(), count, got.as_mut_ptr());
                Defined::products(x.as_ptr(), width, w.as_ptr(), count, expected.as_mut_ptr());
            }
            assert_eq!(got, expected, "{count}, rows of {width}");
        }
    }
}
