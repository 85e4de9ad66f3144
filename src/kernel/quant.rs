//! Block formats of GGUF weights: how they lie in a file, and the plain way to turn them into numbers.
//!
//!     row, Q4_1   [scale min 32 x 4 bit][scale min 32 x 4 bit] …      one block = one group of 32
//!     row, Q4_K   [scales mins 8 x (32 x 4 bit)] …                    one block = 8 groups of 32
//!     row, Q6_K   [16 x (16 x 6 bit) scales] …                        one block = 16 groups of 16
//!
//! All block formats are the same idea: a group of weights shares a scale and a minimum, `weight = scale * code + min`.
//! [`unpack_group`] reads any of them in that form, for packing into the layout that a kernel wants; [`dequantize_row`]
//! is the yardstick that fast code is tested against. Nothing here is fast, and nothing here quantises.

use half::{bf16, f16};

use crate::base::{Error, Result};

/// How the numbers of a tensor are written down.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types, reason = "the names everybody knows them by")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
    /// 8 bits, signed, one f16 scale for 32.
    Q8_0,
    /// 4 bits around 8, one f16 scale for 32.
    Q4_0,
    /// 4 bits, f16 scale and minimum for 32.
    Q4_1,
    /// 5 bits around 16, one f16 scale for 32.
    Q5_0,
    /// 5 bits, f16 scale and minimum for 32.
    Q5_1,
    /// 4 bits; 8 groups of 32 with 6-bit scales and minima under two f16.
    Q4_K,
    /// 5 bits; 8 groups of 32 with 6-bit scales and minima under two f16.
    Q5_K,
    /// 6 bits around 32; 16 groups of 16 with 8-bit scales under one f16.
    Q6_K,
}

/// What the codes of a group mean: `weight = scale * code + min`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Group {
    /// Step between two codes.
    pub scale: f32,
    /// The weight of code 0.
    pub min: f32,
}

/// Weights in a block of the K formats.
const K_BLOCK: usize = 256;

impl Dtype {
    /// Every format that can be read.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The format behind a GGUF tensor type number, if it is one of ours.
    pub const fn from_ggml(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// The GGUF tensor type number.
    pub const fn ggml(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// As in file names and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Weights in a block; rows are whole blocks. 1 for floats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => K_BLOCK,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Weights that share a scale and a minimum: 32, or 16 for Q6_K. `None` for floats, which have no groups.
    pub const fn group_len(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q6_K => Some(16),
            _ => Some(32),
        }
    }

    /// Bits of a code: codes are below `1 << code_bits`. `None` for floats.
    pub const fn code_bits(self) -> Option<u32> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q8_0 => Some(8),
            Self::Q4_0 | Self::Q4_1 | Self::Q4_K => Some(4),
            Self::Q5_0 | Self::Q5_1 | Self::Q5_K => Some(5),
            Self::Q6_K => Some(6),
        }
    }

    /// The code that means 0 in formats without a minimum, where `min = -zero * scale`.
    pub const fn zero_code(self) -> Option<u8> {
        match self {
            Self::Q8_0 => Some(128),
            Self::Q4_0 => Some(8),
            Self::Q5_0 => Some(16),
            Self::Q6_K => Some(32),
            _ => None,
        }
    }

    /// Bytes of a row of `cols` weights; `None` when the row is not whole blocks or the number overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// Reads group number `group` of a row: its codes into the first [`Dtype::group_len`] places of `codes`, and what they
/// mean. Q8_0's signed codes come shifted by 128, so that all codes are unsigned.
///
/// # Panics
/// When `dtype` is a float format, the group lies outside `row`, or `codes` is too short: the caller's bug.
pub fn unpack_group(dtype: Dtype, row: &[u8], group: usize, codes: &mut [u8]) -> Group {
    let length = dtype.group_len().unwrap_or(0);
    assert!(length > 0, "{} has no groups", dtype.name());
    let per_block = dtype.block_len() / length;
    let block = &row[group / per_block * dtype.block_bytes()..][..dtype.block_bytes()];
    let codes = &mut codes[..length];
    let group = group % per_block;
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("floats have no groups"),
        Dtype::Q8_0 => {
            for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
                *code = byte ^ 0x80;
            }
            centred(dtype, half_at(block, 0))
        }
        Dtype::Q4_0 => {
            nibbles(&block[2..], codes);
            centred(dtype, half_at(block, 0))
        }
        Dtype::Q4_1 => {
            nibbles(&block[4..], codes);
            Group { scale: half_at(block, 0), min: half_at(block, 2) }
        }
        Dtype::Q5_0 => {
            nibbles(&block[6..], codes);
            fifth_bits(&block[2..6], codes);
            centred(dtype, half_at(block, 0))
        }
        Dtype::Q5_1 => {
            nibbles(&block[8..], codes);
            fifth_bits(&block[4..8], codes);
            Group { scale: half_at(block, 0), min: half_at(block, 2) }
        }
        Dtype::Q4_K => {
            k_nibbles(&block[16..], group, codes);
            k_group(block, group)
        }
        Dtype::Q5_K => {
            k_nibbles(&block[48..], group, codes);
            for (code, &high) in codes.iter_mut().zip(&block[16..48]) {
                *code |= (high >> group & 1) << 4;
            }
            k_group(block, group)
        }
        Dtype::Q6_K => {
            // Two halves of 128 weights, each four quarters of 32: quarter 0 and 1 are the low, 2 and 3 the high
            // nibbles of the same 64 bytes; all four share 32 bytes of upper bits. A group is half a quarter.
            let (half, quarter, side) = (group / 8, group % 8 / 2, group % 2 * 16);
            let low = &block[half * 64 + quarter % 2 * 32 + side..];
            let high = &block[128 + half * 32 + side..];
            for (code, (&low, &high)) in codes.iter_mut().zip(low.iter().zip(high)) {
                *code = (low >> (quarter / 2 * 4) & 0xF) | (high >> (quarter * 2) & 3) << 4;
            }
            centred(dtype, half_at(block, 208) * f32::from(block[192 + group].cast_signed()))
        }
    }
}

/// Numbers of a Q4_0 block, and its bytes.
const Q4_0_BLOCK: (usize, usize) = (32, 18);

/// Rounds a row to Q4_0 and appends it: a scale so that the number that is furthest from 0 becomes -8, as llama.cpp chooses it.
///
/// # Panics
/// When the row is no multiple of 32 long.
pub fn quantize_q4_0(row: &[f32], out: &mut Vec<u8>) {
    assert!(row.len().is_multiple_of(Q4_0_BLOCK.0));
    for block in row.chunks_exact(Q4_0_BLOCK.0) {
        let furthest = block.iter().copied().fold(0f32, |far, value| if value.abs() > far.abs() { value } else { far });
        let (scale, inverse) = if furthest == 0.0 { (0.0, 0.0) } else { (furthest / -8.0, -8.0 / furthest) };
        let scale = f16::from_f32(scale);
        let code = |value: f32| (value * inverse + 8.5).clamp(0.0, 15.0) as u8;
        out.extend(scale.to_le_bytes());
        out.extend((0..16).map(|at| code(block[at]) | code(block[at + 16]) << 4));
    }
}

/// Turns a row into numbers: `out.len()` weights from `row`.
///
/// # Errors
/// `Internal` when `row` is not exactly as long as `out.len()` weights of `dtype` are.
pub fn dequantize_row(dtype: Dtype, row: &[u8], out: &mut [f32]) -> Result<()> {
    if dtype.row_bytes(out.len()) != Some(row.len()) {
        return Err(Error::internal(format!("{} bytes are not a row of {} {}", row.len(), out.len(), dtype.name())));
    }
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(row.chunks_exact(4)) {
                *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        Dtype::F16 => {
            for (out, bytes) in out.iter_mut().zip(row.chunks_exact(2)) {
                *out = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        Dtype::BF16 => {
            for (out, bytes) in out.iter_mut().zip(row.chunks_exact(2)) {
                *out = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        _ => {
            let mut codes = [0u8; 32];
            for (index, out) in out.chunks_exact_mut(dtype.group_len().unwrap_or(32)).enumerate() {
                let group = unpack_group(dtype, row, index, &mut codes);
                for (out, &code) in out.iter_mut().zip(&codes) {
                    // One rounding where the format has one: `scale * (code - zero)`, not `scale * code + min`.
                    *out = match dtype.zero_code() {
                        Some(zero) => group.scale * f32::from(i16::from(code) - i16::from(zero)),
                        None => group.scale * f32::from(code) + group.min,
                    };
                }
            }
        }
    }
    Ok(())
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// A group without a minimum of its own. Exact: every `zero_code` is a power of two.
fn centred(dtype: Dtype, scale: f32) -> Group {
    Group { scale, min: -f32::from(dtype.zero_code().unwrap_or(0)) * scale }
}

/// Blocks of 32: the low nibbles of 16 bytes come first, then the high ones.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    for (i, &byte) in bytes[..16].iter().enumerate() {
        codes[i] = byte & 0xF;
        codes[i + 16] = byte >> 4;
    }
}

/// Adds bit `i` of a 32-bit word as the fifth bit of code `i`.
fn fifth_bits(word: &[u8], codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (word[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// K formats: groups 2i and 2i + 1 are the low and high nibbles of the same 32 bytes.
fn k_nibbles(bytes: &[u8], group: usize, codes: &mut [u8]) {
    for (code, &byte) in codes.iter_mut().zip(&bytes[group / 2 * 32..]) {
        *code = byte >> (group % 2 * 4) & 0xF;
    }
}

/// The 6-bit scale and minimum of a group, packed into 12 bytes: four scales with the upper bits of scales 4..8 on top,
/// four minima likewise, then the lower nibbles of scales and minima 4..8.
fn k_group(block: &[u8], group: usize) -> Group {
    let packed = &block[4..16];
    let (scale, min) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (packed[group + 4] & 0xF | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4)
    };
    Group { scale: half_at(block, 0) * f32::from(scale), min: -(half_at(block, 2) * f32::from(min)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Dice;

    /// `[u32 type][u32 weights][u32 bytes][row][f32 x weights]` for each type, written by `scripts/quant_goldens.py`.
    const GOLDENS: &[u8] = include_bytes!("goldens/quant.bin");

    fn goldens() -> Vec<(Dtype, &'static [u8], Vec<f32>)> {
        fn number(rest: &mut &[u8]) -> u32 {
            let (head, tail) = rest.split_at(4);
            *rest = tail;
            u32::from_le_bytes(head.try_into().unwrap())
        }
        let mut rest = GOLDENS;
        let mut all = Vec::new();
        while !rest.is_empty() {
            let dtype = Dtype::from_ggml(number(&mut rest)).unwrap();
            let (weights, bytes) = (number(&mut rest) as usize, number(&mut rest) as usize);
            let (row, tail) = rest.split_at(bytes);
            rest = tail;
            let expected = (0..weights).map(|_| f32::from_bits(number(&mut rest))).collect();
            all.push((dtype, row, expected));
        }
        all
    }

    #[test]
    fn every_format_reads_as_the_gguf_package_reads_it() {
        let goldens = goldens();
        assert_eq!(goldens.iter().map(|(dtype, ..)| *dtype).collect::<Vec<_>>(), Dtype::ALL);
        for (dtype, row, expected) in goldens {
            let mut out = vec![f32::NAN; expected.len()];
            dequantize_row(dtype, row, &mut out).unwrap();
            assert_eq!(out, expected, "{}", dtype.name());
        }
    }

    #[test]
    fn groups_say_the_same_as_rows() {
        for (dtype, row, expected) in goldens() {
            let Some(length) = dtype.group_len() else { continue };
            for (index, expected) in expected.chunks(length).enumerate() {
                let mut codes = vec![0; length];
                let group = unpack_group(dtype, row, index, &mut codes);
                for (&code, &expected) in codes.iter().zip(expected) {
                    assert!(u32::from(code) < 1 << dtype.code_bits().unwrap());
                    let value = group.scale * f32::from(code) + group.min;
                    let tolerance = 1e-6 * (group.scale.abs() * 256.0 + group.min.abs());
                    assert!((value - expected).abs() <= tolerance, "{}: {value} {expected}", dtype.name());
                }
            }
        }
    }

    #[test]
    fn type_numbers_go_both_ways() {
        for dtype in Dtype::ALL {
            assert_eq!(Dtype::from_ggml(dtype.ggml()), Some(dtype));
        }
        assert_eq!(Dtype::from_ggml(4), None);
    }

    #[test]
    fn a_row_of_the_wrong_length_is_refused() {
        assert_eq!(Dtype::Q4_0.row_bytes(33), None);
        assert_eq!(Dtype::Q4_K.row_bytes(512), Some(288));
        assert!(dequantize_row(Dtype::Q4_0, &[0; 17], &mut [0.0; 32]).is_err());
        assert!(dequantize_row(Dtype::F32, &[0; 8], &mut [0.0; 3]).is_err());
    }

    #[test]
    fn rounding_to_four_bits_is_off_by_at_most_a_scale() {
        let mut dice = Dice::new(9);
        let mut row = dice.values(96);
        row[32..64].fill(0.0);
        row[40] = -3.0;
        let (mut bytes, mut back) = (Vec::new(), vec![0f32; 96]);
        quantize_q4_0(&row, &mut bytes);
        assert_eq!(Some(bytes.len()), Dtype::Q4_0.row_bytes(96));
        dequantize_row(Dtype::Q4_0, &bytes, &mut back).unwrap();
        for (block, back) in row.chunks(32).zip(back.chunks(32)) {
            let scale = block.iter().fold(0f32, |far, value| far.max(value.abs())) / 8.0;
            let off = block.iter().zip(back).map(|(value, back)| (value - back).abs()).fold(0f32, f32::max);
            assert!(off <= scale * 1.001, "{off} of {scale}");
        }
        assert!((back[40] + 3.0).abs() < 0.01 && back[41] == 0.0, "{} {}", back[40], back[41]);
        bytes.clear();
        quantize_q4_0(&[0.0; 32], &mut bytes);
        assert!(bytes[..2] == [0, 0]);
    }
}
