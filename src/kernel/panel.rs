//! Weights as kernels read them: panels of 16 output channels, made once at load out of a file's rows.
//!
//!     file     channel 0: k0 k1 k2 …        panel    block of 32 k: codes of k 0..4 of channels 0..16, k 4..8 of …,
//!              channel 1: k0 k1 k2 …                 scales of channels 0..16, minima of channels 0..16; next block
//!
//! One vector then is 16 channels, a row of activations is read once for all of them, and no kernel ever adds across
//! lanes. Codes stay as narrow as in the file: 4 bits, or 8 for the kinds of 5, 6 and 8. Scales and minima are f16, as
//! in the file; the K formats' products of two numbers are rounded to f16 under one power of two for the matrix.
//! What is in the panels is all there is: the file's pages may go.

use std::ops::Range;

use half::f16;

use crate::base::{Error, Result};
use crate::kernel::buffer::Slab;
use crate::kernel::quant::{Dtype, dequantize_row, unpack_group};
use crate::kernel::{Arena, Cpu};

/// Output channels of a panel.
pub const LANES: usize = 16;
/// Inputs that share a scale of the activations.
pub(super) const BLOCK: usize = 32;

/// A matrix in panels.
pub struct Panels {
    pub(super) data: Slab,
    pub(super) kind: Kind,
    /// Bytes from panel to panel.
    pub(super) stride: usize,
    channels: usize,
    inputs: usize,
}

/// What a panel holds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    /// `weight = factor * scale * (code - zero)`, or `factor * (scale * code + min)` when `affine`.
    Quant {
        codes: Codes,
        /// Scales for each 32 inputs: 1 or 2.
        groups: usize,
        affine: bool,
        zero: f32,
        factor: f32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Codes {
    /// Two to a byte: of 8 consecutive inputs the first 4 are the low nibbles.
    Nibble,
    /// One to a byte, at most 63.
    Byte,
    /// One to a byte, up to 255.
    Full,
}

/// Where a matrix comes from: rows as they lie in a file.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// How numbers are written.
    pub dtype: Dtype,
    /// All rows, back to back.
    pub bytes: &'a [u8],
    /// Number of rows: output channels.
    pub channels: usize,
    /// Length of a row: inputs.
    pub inputs: usize,
}

/// Some channels of a matrix, and some inputs of each: what a rank holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Output channels.
    pub channels: Range<usize>,
    /// Inputs; both ends at multiples of [`Dtype::block_len`].
    pub inputs: Range<usize>,
}

impl Source<'_> {
    /// All of it.
    pub fn whole(&self) -> Part {
        Part { channels: 0..self.channels, inputs: 0..self.inputs }
    }
}

impl Panels {
    /// Packs `source` into `arena` on all threads. Channel `c` is row `order(c)` of the source. With `plain`, everything becomes f32.
    ///
    /// # Errors
    /// `Internal` when the bytes are not `channels` rows of `inputs` weights.
    pub fn pack(
        cpu: &Cpu,
        arena: &mut Arena,
        source: Source<'_>,
        plain: bool,
        order: impl Fn(usize) -> usize + Sync,
    ) -> Result<Self> {
        Self::pack_part(cpu, arena, source, source.whole(), plain, order)
    }

    /// [`Panels::pack`] of a part: channel `c` of it is row `order(part.channels.start + c)`.
    ///
    /// # Errors
    /// As [`Panels::pack`], and when the part is not in the matrix, is empty, or cuts through a block.
    pub fn pack_part(
        cpu: &Cpu,
        arena: &mut Arena,
        source: Source<'_>,
        part: Part,
        plain: bool,
        order: impl Fn(usize) -> usize + Sync,
    ) -> Result<Self> {
        let Source { dtype, bytes, channels, inputs } = source;
        let name = dtype.name();
        let row_bytes = dtype.row_bytes(inputs).filter(|row| row.checked_mul(channels) == Some(bytes.len()));
        let Some(row_bytes) = row_bytes else {
            return Err(Error::internal(format!("{} bytes are not {channels} x {inputs} {name}", bytes.len())));
        };
        // Where the part begins in a row, and how many bytes of it there are.
        let cut = dtype.row_bytes(part.inputs.start).zip(dtype.row_bytes(part.inputs.len()));
        let inside = part.channels.end <= channels && part.inputs.end <= inputs;
        let Some((start, length)) = cut.filter(|_| inside && !part.channels.is_empty() && !part.inputs.is_empty())
        else {
            return Err(Error::internal(format!("{part:?} is no part of {channels} x {inputs} {name}")));
        };
        let (first, channels, inputs) = (part.channels.start, part.channels.len(), part.inputs.len());
        let row = |channel: usize| &bytes[order(first + channel) * row_bytes + start..][..length];
        let kind = if plain { Kind::F32 } else { Kind::of(dtype, inputs, (0..channels).map(row)) };
        let stride = kind.bytes(inputs).next_multiple_of(64);
        let count = channels.div_ceil(LANES);
        let data = arena.fill(count * stride, |out| {
            cpu.pool.each(count, 1, |panel| {
                // SAFETY: each panel is handed out once.
                let out = unsafe { out.part(panel * stride, stride) };
                for lane in 0..LANES.min(channels - panel * LANES) {
                    pack_channel(kind, dtype, row(panel * LANES + lane), inputs, lane, out);
                }
            });
        });
        Ok(Self { data, kind, stride, channels, inputs })
    }

    /// Bytes that [`Panels::pack`] takes of an arena for a matrix of floats.
    pub fn size(dtype: Dtype, channels: usize, inputs: usize) -> usize {
        channels.div_ceil(LANES) * (inputs * LANES * dtype.block_bytes()).next_multiple_of(64)
    }

    /// Output channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Inputs of a channel.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Whether its kernels take activations in int8 rather than f32.
    pub fn takes_int8(&self) -> bool {
        matches!(self.kind, Kind::Quant { .. })
    }

    /// The weights of one channel: a row of an embedding table.
    pub fn channel(&self, channel: usize, out: &mut [f32]) {
        assert!(channel < self.channels && out.len() == self.inputs);
        let (panel, lane) = (&self.data[channel / LANES * self.stride..][..self.stride], channel % LANES);
        let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
        match self.kind {
            Kind::F32 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = (k * LANES + lane) * 4;
                    *out = f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]);
                }
            }
            Kind::F16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = half((k * LANES + lane) * 2);
                }
            }
            Kind::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = (k * LANES + lane) * 2;
                    *out = half::bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
                }
            }
            Kind::Quant { codes, groups, affine, zero, factor } => {
                let stride = self.kind.block_bytes();
                for (k, out) in out.iter_mut().enumerate() {
                    let (block, k) = (k / BLOCK * stride, k % BLOCK);
                    let code = match codes {
                        Codes::Nibble => panel[block + k / 8 * 64 + lane * 4 + k % 4] >> (k % 8 / 4 * 4) & 15,
                        _ => panel[block + k / 4 * 64 + lane * 4 + k % 4],
                    };
                    let scale = block + codes.block_bytes() + (k * groups / BLOCK * LANES + lane) * 2;
                    let min = scale + groups * LANES * 2;
                    let value = match affine {
                        true => half(scale) * f32::from(code) + half(min),
                        false => half(scale) * (f32::from(code) - zero),
                    };
                    *out = value * factor;
                }
            }
        }
    }
}

impl Kind {
    /// For rows of `inputs` weights.
    fn of<'a>(dtype: Dtype, inputs: usize, rows: impl Iterator<Item = &'a [u8]>) -> Self {
        let (Some(group), Some(bits)) = (dtype.group_len(), dtype.code_bits()) else {
            return match dtype {
                Dtype::F16 => Self::F16,
                Dtype::BF16 => Self::Bf16,
                _ => Self::F32,
            };
        };
        let codes = match bits {
            4 => Codes::Nibble,
            5 | 6 => Codes::Byte,
            _ => Codes::Full,
        };
        let factor = if dtype.block_len() > BLOCK { power_of_two_for(dtype, inputs, rows) } else { 1.0 };
        Self::Quant {
            codes,
            groups: BLOCK / group,
            affine: dtype.zero_code().is_none(),
            zero: f32::from(dtype.zero_code().unwrap_or(0)),
            factor,
        }
    }

    /// Bytes of a panel before padding.
    fn bytes(self, inputs: usize) -> usize {
        match self {
            Self::F32 => inputs * LANES * 4,
            Self::F16 | Self::Bf16 => inputs * LANES * 2,
            Self::Quant { .. } => inputs / BLOCK * self.block_bytes(),
        }
    }

    /// Bytes of a quantised panel for 32 inputs: codes, scales, minima.
    fn block_bytes(self) -> usize {
        match self {
            Self::Quant { codes, groups, affine, .. } => {
                codes.block_bytes() + groups * LANES * 2 * (1 + usize::from(affine))
            }
            _ => self.bytes(BLOCK),
        }
    }
}

impl Codes {
    /// Bytes of a panel's codes for 32 inputs.
    pub(super) const fn block_bytes(self) -> usize {
        match self {
            Self::Nibble => 256,
            Self::Byte | Self::Full => 512,
        }
    }
}

/// The power of two under which the largest scale or minimum of the K formats is near the top of f16's range, so that
/// the small ones keep all their bits.
fn power_of_two_for<'a>(dtype: Dtype, inputs: usize, rows: impl Iterator<Item = &'a [u8]>) -> f32 {
    let mut codes = [0; BLOCK];
    let group_len = dtype.group_len().unwrap_or(BLOCK);
    let mut largest = 0f32;
    for row in rows {
        for group in 0..inputs / group_len {
            let group = unpack_group(dtype, row, group, &mut codes);
            let min = if dtype.zero_code().is_some() { 0.0 } else { group.min.abs() };
            largest = largest.max(group.scale.abs()).max(min);
        }
    }
    if !largest.is_normal() {
        return 1.0;
    }
    // largest / factor lies in 2^13 .. 2^14.
    let exponent = (largest.to_bits() >> 23) as i32 - 127 - 13;
    f32::from_bits(((exponent.clamp(-126, 127) + 127) << 23) as u32)
}

/// Writes one channel into its lane of a panel.
fn pack_channel(kind: Kind, dtype: Dtype, row: &[u8], inputs: usize, lane: usize, out: &mut [u8]) {
    match kind {
        Kind::F16 | Kind::Bf16 => {
            for (k, bytes) in row.chunks_exact(2).enumerate() {
                out[(k * LANES + lane) * 2..][..2].copy_from_slice(bytes);
            }
        }
        Kind::F32 => {
            let mut values = [0f32; 256];
            let step = dtype.block_len().max(32);
            for first in (0..inputs).step_by(step) {
                let values = &mut values[..step.min(inputs - first)];
                let bytes = |k: usize| k / dtype.block_len() * dtype.block_bytes();
                let row = &row[bytes(first)..bytes(first + values.len())];
                // Cannot fail: the slice was cut to whole blocks.
                let read = dequantize_row(dtype, row, values);
                debug_assert!(read.is_ok());
                for (k, value) in values.iter().enumerate() {
                    out[((first + k) * LANES + lane) * 4..][..4].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        Kind::Quant { codes, groups, affine, factor, .. } => {
            let length = BLOCK / groups;
            let mut unpacked = [0u8; BLOCK];
            for (block, out) in out.chunks_exact_mut(kind.block_bytes()).take(inputs / BLOCK).enumerate() {
                for side in 0..groups {
                    let group = unpack_group(dtype, row, block * groups + side, &mut unpacked[side * length..]);
                    let scale = codes.block_bytes() + (side * LANES + lane) * 2;
                    out[scale..][..2].copy_from_slice(&f16::from_f32(group.scale / factor).to_le_bytes());
                    if affine {
                        let min = scale + groups * LANES * 2;
                        out[min..][..2].copy_from_slice(&f16::from_f32(group.min / factor).to_le_bytes());
                    }
                }
                match codes {
                    Codes::Nibble => {
                        for (pair, eight) in unpacked.chunks_exact(8).enumerate() {
                            for i in 0..4 {
                                out[pair * 64 + lane * 4 + i] = eight[i] | eight[i + 4] << 4;
                            }
                        }
                    }
                    Codes::Byte | Codes::Full => {
                        for (quad, four) in unpacked.chunks_exact(4).enumerate() {
                            out[quad * 64 + lane * 4..][..4].copy_from_slice(four);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{Dice, cpus};

    #[test]
    fn a_packed_matrix_gives_its_rows_back_in_the_order_asked_for() {
        let cpu = &cpus()[0];
        for dtype in Dtype::ALL {
            for channels in [1, 16, 37] {
                let inputs = dtype.block_len().max(32) * 2;
                let bytes = Dice::new(channels as u64).weights(dtype, channels, inputs);
                let source = Source { dtype, bytes: &bytes, channels, inputs };
                for plain in [false, true] {
                    let panels = Panels::pack(cpu, &mut Arena::default(), source, plain, |c| channels - 1 - c).unwrap();
                    for channel in 0..channels {
                        let row = dtype.row_bytes(inputs).unwrap();
                        let (mut expected, mut got) = (vec![0.0; inputs], vec![0.0; inputs]);
                        dequantize_row(dtype, &bytes[(channels - 1 - channel) * row..][..row], &mut expected).unwrap();
                        panels.channel(channel, &mut got);
                        let scale = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
                        // Two numbers rounded to 11 bits, and nothing at all where the file has f16.
                        let tolerance = if plain { 0.0 } else { scale * 1.5e-3 };
                        for (expected, got) in expected.iter().zip(&got) {
                            assert!((expected - got).abs() <= tolerance, "{} {expected} {got}", dtype.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_part_of_a_matrix_has_the_weights_that_the_whole_has_there() {
        let cpu = &cpus()[0];
        for dtype in Dtype::ALL {
            let (channels, unit) = (50, dtype.block_len().max(32));
            let inputs = 4 * unit;
            let bytes = Dice::new(9).weights(dtype, channels, inputs);
            let source = Source { dtype, bytes: &bytes, channels, inputs };
            let order = |c: usize| channels - 1 - c;
            let whole = Panels::pack(cpu, &mut Arena::default(), source, true, order).unwrap();
            for part in [
                Part { channels: 0..50, inputs: unit..3 * unit },
                Part { channels: 17..18, inputs: 0..inputs },
                Part { channels: 16..50, inputs: 3 * unit..inputs },
            ] {
                let panels = Panels::pack_part(cpu, &mut Arena::default(), source, part.clone(), true, order).unwrap();
                assert_eq!((panels.channels(), panels.inputs()), (part.channels.len(), part.inputs.len()));
                for (at, channel) in part.channels.clone().enumerate() {
                    let (mut expected, mut got) = (vec![0.0; inputs], vec![0.0; part.inputs.len()]);
                    whole.channel(channel, &mut expected);
                    panels.channel(at, &mut got);
                    assert_eq!(got, expected[part.inputs.clone()], "{} {part:?}", dtype.name());
                }
            }
            let inside = |channels, inputs| {
                Panels::pack_part(cpu, &mut Arena::default(), source, Part { channels, inputs }, false, order).is_ok()
            };
            assert!(inside(0..50, 0..unit));
            assert!(!inside(0..51, 0..unit) && !inside(0..50, unit..5 * unit) && !inside(3..3, 0..unit));
            assert_eq!(inside(0..50, 0..unit / 2), dtype.block_len() == 1, "{}: half a block", dtype.name());
        }
    }

    #[test]
    fn bytes_that_are_not_the_matrix_are_refused() {
        let cpu = &cpus()[0];
        for (bytes, channels, inputs) in [(17, 1, 32), (18, 2, 32), (18, 1, 33), (0, 0, 32), (18, usize::MAX, 32)] {
            let source = Source { dtype: Dtype::Q4_0, bytes: &vec![0; bytes], channels, inputs };
            assert!(Panels::pack(cpu, &mut Arena::default(), source, false, |c| c).is_err());
        }
    }
}
