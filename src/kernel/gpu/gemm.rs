//! Few rows times a matrix: `gemm_small.cu`.

use half::{bf16, f16};

use super::launch::{Fp8, Launch, Launcher, Ptr};
use crate::base::{Error, Result};

/// Rows up to which [`gemm_small`] goes.
pub const SMALL_ROWS: usize = 64;

/// Rows of a [`Card::product`](super::Card::product) come in multiples of it: those beyond what is wanted are computed for nothing, as they
/// would be inside a tile.
pub const LARGE_UNIT: usize = 64;

/// fp8 rows and the scale of each.
#[derive(Clone, Copy)]
pub struct Scaled {
    /// Row-major.
    pub data: Ptr<Fp8>,
    /// One a row.
    pub scales: Ptr<f32>,
}

/// A matrix of `n` channels of `k` inputs, and the rows that it takes.
#[derive(Clone, Copy)]
pub enum Weight {
    /// `w [n, k]` and `x [m, k]`.
    Bf16(Ptr<bf16>, Ptr<bf16>),
    /// The same in fp8, a scale a channel and a row.
    Fp8(Scaled, Scaled),
    /// As [`pack_q4`] packs it, and `x [m, k]`.
    Q4(Ptr<u32>, Ptr<f16>, Ptr<bf16>),
}

/// Where a product goes: `[m, stride]`, its first `n` columns.
#[derive(Clone, Copy)]
pub enum Sink {
    /// It replaces what is there.
    Set(Ptr<bf16>),
    /// It is added to what is there.
    Add(Ptr<bf16>),
    /// It replaces what is there, not rounded.
    Wide(Ptr<f32>),
}

impl Sink {
    /// `len` of its numbers from number `first` on.
    ///
    /// # Panics
    /// As [`Ptr::part`].
    pub fn part(self, first: usize, len: usize) -> Self {
        match self {
            Self::Set(out) => Self::Set(out.part(first, len)),
            Self::Add(out) => Self::Add(out.part(first, len)),
            Self::Wide(out) => Self::Wide(out.part(first, len)),
        }
    }

    pub(super) fn needs(self, least: usize, align: u64) -> Result<()> {
        match self {
            Self::Set(out) | Self::Add(out) => out.needs("out", least, align),
            Self::Wide(out) => out.needs("out", least, align),
        }
    }
}

/// `x * w^T` into `out`, of rows of `out_stride` numbers.
///
/// # Errors
/// `Unsupported` for more than [`SMALL_ROWS`] rows, channels that are no multiple of 8 or inputs of none of 32 (bf16), 64 (fp8), 128
/// (4 bits); `Internal` when memory is too short.
pub fn gemm_small(
    on: &dyn Launcher,
    (m, n, k): (usize, usize, usize),
    weight: Weight,
    out: Sink,
    out_stride: usize,
) -> Result<()> {
    let (kind, unit) = match weight {
        Weight::Bf16(..) => ("bf16", 32),
        Weight::Fp8(..) => ("fp8", 64),
        Weight::Q4(..) => ("q4", 128),
    };
    if m > SMALL_ROWS || !n.is_multiple_of(8) || !k.is_multiple_of(unit) {
        return Err(Error::unsupported(format!(
            "{m} rows times {n} x {k} in {kind}: up to {SMALL_ROWS} rows, channels in eights and inputs in multiples of {unit}"
        )));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    out.needs((m - 1) * out_stride + n, 4)?;
    let tiles = [1, 2, 4].into_iter().find(|tiles| tiles * 16 >= m).unwrap_or(4);
    let launch = Launch::new(format!("gemm_small_{kind}_{tiles}"), [n / 8, 1, 1], 128);
    let launch = match weight {
        Weight::Bf16(w, x) => {
            w.needs("w", n * k, 16)?;
            x.needs("x", m * k, 16)?;
            launch.ptr(x).ptr(w)
        }
        Weight::Fp8(w, x) => {
            w.data.needs("w", n * k, 16)?;
            w.scales.needs("scales of w", n, 4)?;
            x.data.needs("x", m * k, 16)?;
            x.scales.needs("scales of x", m, 4)?;
            launch.ptr(x.data).ptr(x.scales).ptr(w.data).ptr(w.scales)
        }
        Weight::Q4(codes, scales, x) => {
            codes.needs("codes", n * k / 8, 16)?;
            scales.needs("scales", n * k / 32, 2)?;
            x.needs("x", m * k, 16)?;
            launch.ptr(x).ptr(codes).ptr(scales)
        }
    };
    let (launch, sink) = match out {
        Sink::Set(out) => (launch.ptr(out), 0),
        Sink::Add(out) => (launch.ptr(out), 1),
        Sink::Wide(out) => (launch.ptr(out), 2),
    };
    on.launch(launch.int(m).int(k).int(out_stride).int(sink))
}

/// A product in fp8 that was computed without scales, `x [m, n]`, into `out` of rows of `out_stride` numbers: times that of its channel and
/// that of its row.
///
/// # Errors
/// `Unsupported` for channels or a stride that are no multiples of 4; `Internal` when memory is too short.
pub fn scale_product(
    on: &dyn Launcher,
    (m, n): (usize, usize),
    x: Ptr<f32>,
    (w_scales, x_scales): (Ptr<f32>, Ptr<f32>),
    out: Sink,
    out_stride: usize,
) -> Result<()> {
    if !n.is_multiple_of(4) || !out_stride.is_multiple_of(4) {
        return Err(Error::unsupported(format!(
            "{n} channels in rows of {out_stride}: GPU kernels scale them in fours"
        )));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    x.needs("x", m * n, 16)?;
    w_scales.needs("scales of w", n, 16)?;
    x_scales.needs("scales of x", m, 4)?;
    out.needs((m - 1) * out_stride + n, 16)?;
    let kind = if matches!(out, Sink::Wide(_)) { "f32" } else { "bf16" };
    let launch = Launch::new(format!("scale_product_{kind}"), [m, n.div_ceil(4096), 1], 256);
    let launch = launch.ptr(x).ptr(w_scales).ptr(x_scales);
    let (launch, adds) = match out {
        Sink::Set(out) => (launch.ptr(out), 0),
        Sink::Add(out) => (launch.ptr(out), 1),
        Sink::Wide(out) => (launch.ptr(out), 0),
    };
    on.launch(launch.int(n).int(out_stride).int(adds))
}

/// Computes a product in fp8 without scales: its shape, w, x and where to. False: it cannot.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(super) type Bare<'a> = dyn FnMut((usize, usize, usize), Ptr<Fp8>, Ptr<Fp8>, Ptr<f32>) -> Result<bool> + 'a;

/// A product in fp8 by a library that takes no scale a row: `bare` computes it without any, as many rows at a time as `room` holds, and
/// [`scale_product`] follows. What `bare` cannot compute is done by [`gemm_small`]. False: `room` is too small for that many channels, and
/// nothing is computed.
///
/// # Errors
/// As [`scale_product`], and those of `bare`.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(super) fn scaled_afterwards(
    on: &dyn Launcher,
    (m, n, k): (usize, usize, usize),
    (w, x): (Scaled, Scaled),
    (out, out_stride): (Sink, usize),
    room: Ptr<f32>,
    bare: &mut Bare<'_>,
) -> Result<bool> {
    let most = room.len() / n / LARGE_UNIT * LARGE_UNIT;
    if most == 0 {
        return Ok(false);
    }
    for first in (0..m).step_by(most) {
        let count = most.min(m - first);
        let rows =
            |at: usize, count: usize| Scaled { data: x.data.part(at * k, count * k), scales: x.scales.part(at, count) };
        let out = |at: usize, count: usize| out.part(at * out_stride, (count - 1) * out_stride + n);
        let (room, x) = (room.part(0, count * n), rows(first, count));
        if bare((count, n, k), w.data, x.data, room)? {
            scale_product(on, (count, n), room, (w.scales, x.scales), out(first, count), out_stride)?;
            continue;
        }
        for at in (first..first + count).step_by(SMALL_ROWS) {
            let count = SMALL_ROWS.min(first + count - at);
            gemm_small(on, (count, n, k), Weight::Fp8(w, rows(at, count)), out(at, count), out_stride)?;
        }
    }
    Ok(true)
}

/// Rows of GGUF's Q4_0 (`[n, k]`, blocks of 32) as the kernel reads them: codes `[n, k / 128, 4, 4]` words of 8 and scales
/// `[n, k / 32]`.
///
/// # Errors
/// `Unsupported` when k is no multiple of 128; `Internal` when the bytes are not n rows of k.
pub fn pack_q4(bytes: &[u8], n: usize, k: usize) -> Result<(Vec<u32>, Vec<f16>)> {
    if !k.is_multiple_of(128) {
        return Err(Error::unsupported(format!("{k} inputs in 4 bits: GPU kernels take multiples of 128")));
    }
    let row_bytes = k / 32 * 18;
    if bytes.len() != n * row_bytes {
        return Err(Error::internal(format!("{} bytes are not {n} x {k} Q4_0", bytes.len())));
    }
    let (mut codes, mut scales) = (Vec::with_capacity(n * k / 8), Vec::with_capacity(n * k / 32));
    for row in bytes.chunks_exact(row_bytes) {
        for four in row.chunks_exact(4 * 18) {
            let block = |at: usize| &four[at * 18..][..18];
            scales.extend((0..4).map(|at| f16::from_le_bytes([block(at)[0], block(at)[1]])));
            // In the file the low nibbles are the first 16 of a block.
            let code = |at: usize, k: usize| u32::from(block(at)[2 + k % 16] >> (k / 16 * 4) & 15);
            for q in 0..4 {
                codes.extend((0..4).map(|at| {
                    (0..4).fold(0, |word, pair| {
                        let (low, high) = (code(at, 8 * q + 2 * pair), code(at, 8 * q + 2 * pair + 1));
                        word | low << (4 * pair) | high << (16 + 4 * pair)
                    })
                }));
            }
        }
    }
    Ok((codes, scales))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::quant::{Dtype, dequantize_row};
    use crate::kernel::testing::Dice;

    #[test]
    fn packed_codes_are_those_of_the_file() {
        let (n, k) = (3, 256);
        let bytes = Dice::new(1).weights(Dtype::Q4_0, n, k);
        let (codes, scales) = pack_q4(&bytes, n, k).unwrap();
        let mut expected = vec![0.0; n * k];
        dequantize_row(Dtype::Q4_0, &bytes, &mut expected).unwrap();
        for row in 0..n {
            for at in 0..k {
                let (block, q, j) = (at % 128 / 32, at % 32 / 8, at % 8);
                let word = codes[(row * k + at / 128 * 128) / 8 + q * 4 + block];
                let code = word >> (j / 2 * 4 + j % 2 * 16) & 15;
                let value = (code as f32 - 8.0) * scales[(row * k + at) / 32].to_f32();
                assert_eq!(value, expected[row * k + at], "row {row}, input {at}");
            }
        }
        assert!(pack_q4(&bytes, n, k + 1).is_err() && pack_q4(&bytes[1..], n, k).is_err());
    }
}
