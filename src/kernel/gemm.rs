//! Rows times panels: `out[row][channel] = sum over k of x[row][k] * w[channel][k]`, and what follows it in a network.
//!
//!     task = block of 128 rows x 1 panel        a panel's weights stay in L1 while the rows go by
//!       tile = 8 rows x 16 channels             sums in registers, weights decoded once for 8 rows; 4 where registers are few
//!
//! Bound by memory for a few rows (each weight is read once a step), by the int8 multiplier beyond some ten.
//! Each row's sum runs over k in order whatever the size of its tile, so its bits do not depend on its company.
//! Quantised weights are multiplied in int8.rs.

use std::mem::MaybeUninit;

use crate::kernel::int8::{Int8, Scaled, int8_panel};
use crate::kernel::lowrank::Delta;
use crate::kernel::panel::{BLOCK, Codes, Kind, LANES, Panels};
use crate::kernel::rows::{Activations, View};
use crate::kernel::simd::{BYTE, FULL, NIBBLE, Simd, by_isa, exp, tile_rows};
use crate::kernel::{Cpu, Isa, Shared};

/// Rows that a task takes through a panel: their int8 form stays in L2.
const ROWS: usize = 128;

/// What a task computes: `[rows, 16]`, of the block's first rows.
type Block = [MaybeUninit<f32>; ROWS * LANES];

/// Not yet written. Zeroing it would take as long as a kernel does for a row of few inputs.
const EMPTY: Block = [MaybeUninit::uninit(); ROWS * LANES];

/// One matrix, or several of the same inputs side by side (q, k and v), each of its own kind.
pub struct Linear {
    parts: Vec<Panels>,
    bias: Option<Vec<f32>>,
}

/// Where a product goes. Rows are `[rows, channels]`, dense.
pub enum Out<'a> {
    /// Overwrites.
    Set(&'a mut [f32]),
    /// Adds: the residual stream.
    Add(&'a mut [f32]),
    /// Overwrites some columns of rows whose others belong to somebody else.
    Columns {
        /// `[rows, stride]`
        out: Shared<'a, f32>,
        /// Length of a row.
        stride: usize,
        /// Column of the first channel.
        first: usize,
    },
}

impl Linear {
    /// Matrices of the same inputs whose channels follow each other, and a bias for all channels if there is one.
    ///
    /// # Panics
    /// When inputs or the bias' length do not agree.
    pub fn new(parts: Vec<Panels>, bias: Option<Vec<f32>>) -> Self {
        assert!(!parts.is_empty() && parts.iter().all(|part| part.inputs() == parts[0].inputs()));
        let linear = Self { parts, bias };
        assert!(linear.bias.as_ref().is_none_or(|bias| bias.len() == linear.channels()));
        linear
    }

    /// Output channels.
    pub fn channels(&self) -> usize {
        self.parts.iter().map(Panels::channels).sum()
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.parts[0].inputs()
    }

    /// Whether any part takes int8 activations.
    pub fn takes_int8(&self) -> bool {
        self.parts.iter().any(Panels::takes_int8)
    }

    /// The weights of one channel: a row of an embedding table that is the head, too.
    pub fn channel(&self, channel: usize, out: &mut [f32]) {
        let (part, panel, _) = self.locate(channel / LANES);
        debug_assert_eq!(self.parts.len(), 1);
        self.parts[part].channel(panel * LANES + channel % LANES, out);
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Panels::bytes).sum()
    }

    /// Multiplies the first `rows` rows of `x`, which must hold the int8 form if `takes_int8`.
    pub fn apply(&self, cpu: &Cpu, x: &Activations, rows: usize, out: Out<'_>) {
        self.apply_adapted(cpu, x, rows, out, None);
    }

    /// [`Linear::apply`], and what adapters add to rows that have one.
    pub fn apply_adapted(&self, cpu: &Cpu, x: &Activations, rows: usize, out: Out<'_>, delta: Option<Delta<'_>>) {
        self.apply_beside(&mut || (), cpu, x, rows, out, delta);
    }

    /// [`Linear::apply_adapted`], with something else for the calling thread to do while the others begin.
    pub fn apply_beside(
        &self,
        errand: &mut dyn FnMut(),
        cpu: &Cpu,
        x: &Activations,
        rows: usize,
        out: Out<'_>,
        delta: Option<Delta<'_>>,
    ) {
        let width = self.channels();
        let (out, stride, before, add) = match out {
            Out::Set(out) => (Shared::new(out), width, 0, false),
            Out::Add(out) => (Shared::new(out), width, 0, true),
            Out::Columns { out, stride, first } => (out, stride, first, false),
        };
        assert!(before + width <= stride);
        let view = self.view(x, rows);
        let panels: usize = self.parts.iter().map(Panels::count).sum();
        each_task(errand, cpu, panels, rows, |panel, first, last| {
            let (index, panel, channel) = self.locate(panel);
            let part = &self.parts[index];
            let valid = LANES.min(part.channels() - panel * LANES);
            let bias = self.bias.as_ref().map(|bias| &bias[channel..channel + valid]);
            let mut block = EMPTY;
            let block = part.block(cpu.isa, panel, view, first, last, &mut block);
            if let Some(delta) = &delta {
                delta.add(cpu.isa, index, panel, first, block);
            }
            for (i, values) in block.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                if let Some(bias) = bias {
                    values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
                }
                // SAFETY: each pair of panel and rows is handed out once, and panels are different channels.
                let out = unsafe { out.part((first + i) * stride + before + channel, valid) };
                if add { add_to(out, values) } else { copy_to(out, values) }
            }
        });
    }

    /// Which part panel number `panel` of all belongs to, its number there, and its first channel of all.
    fn locate(&self, mut panel: usize) -> (usize, usize, usize) {
        let mut channel = 0;
        for (index, part) in self.parts.iter().enumerate() {
            if panel < part.count() {
                return (index, panel, channel + panel * LANES);
            }
            panel -= part.count();
            channel += part.channels();
        }
        unreachable!("a panel beyond the last")
    }

    fn view(&self, x: &Activations, rows: usize) -> View {
        assert_eq!(x.width(), self.inputs());
        x.view(rows, self.takes_int8())
    }
}

/// What the gate of a feed-forward layer goes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    /// `x * sigmoid(x)`
    Silu,
    /// By its tanh formula.
    Gelu,
}

/// `out = act(gate(x)) * up(x)`, `[rows, channels]`: the first half of a feed-forward layer in one pass. Adapters know
/// the gate as part 0 and the other as part 1.
#[allow(clippy::too_many_arguments)]
pub fn gated(
    cpu: &Cpu,
    act: Gate,
    gate: &Panels,
    up: &Panels,
    x: &Activations,
    rows: usize,
    out: &mut [f32],
    delta: Option<Delta<'_>>,
) {
    let width = gate.channels();
    assert!(up.channels() == width && gate.inputs() == x.width() && up.inputs() == x.width());
    let view = x.view(rows, gate.takes_int8() || up.takes_int8());
    let out = Shared::new(out);
    each_task(&mut || (), cpu, gate.count(), rows, |panel, first, last| {
        let valid = LANES.min(width - panel * LANES);
        let (mut a, mut b) = (EMPTY, EMPTY);
        let a = gate.block(cpu.isa, panel, view, first, last, &mut a);
        let b = up.block(cpu.isa, panel, view, first, last, &mut b);
        if let Some(delta) = &delta {
            delta.add(cpu.isa, 0, panel, first, a);
            delta.add(cpu.isa, 1, panel, first, b);
        }
        // SAFETY: as many rows of 16 each.
        unsafe {
            match act {
                Gate::Silu => gate_mul::<false>(cpu.isa, a.as_mut_ptr(), b.as_ptr(), last - first),
                Gate::Gelu => gate_mul::<true>(cpu.isa, a.as_mut_ptr(), b.as_ptr(), last - first),
            }
        }
        for (i, values) in a.as_chunks::<LANES>().0.iter().enumerate() {
            // SAFETY: each pair of panel and rows is handed out once.
            copy_to(unsafe { out.part((first + i) * width + panel * LANES, valid) }, values);
        }
    });
}

/// A panel's results for a row: all of them, but for a last panel that is not full.
#[inline]
fn copy_to(out: &mut [f32], values: &[f32; LANES]) {
    match <&mut [f32; LANES]>::try_from(&mut *out) {
        Ok(out) => *out = *values,
        Err(_) => out.copy_from_slice(&values[..out.len()]),
    }
}

/// As [`copy_to`], on top of what is there.
#[inline]
fn add_to(out: &mut [f32], values: &[f32; LANES]) {
    match <&mut [f32; LANES]>::try_from(&mut *out) {
        Ok(out) => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
        Err(_) => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
    }
}

/// Hands out `work(panel, first row, end row)`: all panels for a block of rows, then the next block.
fn each_task(
    errand: &mut dyn FnMut(),
    cpu: &Cpu,
    panels: usize,
    rows: usize,
    work: impl Fn(usize, usize, usize) + Sync,
) {
    let tasks = panels * rows.div_ceil(ROWS);
    // Enough pieces to even out threads that are held up, few enough that taking one costs nothing.
    let grain = (tasks / (cpu.pool.threads() * 12)).max(1);
    cpu.pool.each_beside(errand, tasks, grain, |task| {
        let first = task / panels * ROWS;
        work(task % panels, first, rows.min(first + ROWS));
    });
}

impl Panels {
    /// Number of panels.
    fn count(&self) -> usize {
        self.channels().div_ceil(LANES)
    }

    /// Rows `first..last` of `x`, at most a block of them, times one panel: `[rows, 16]`.
    #[inline]
    fn block<'a>(
        &self,
        isa: Isa,
        panel: usize,
        x: View,
        first: usize,
        last: usize,
        out: &'a mut Block,
    ) -> &'a mut [f32] {
        let rows = last - first;
        assert!(rows <= ROWS && panel < self.count());
        let (inputs, out) = (self.inputs(), out.as_mut_ptr().cast::<f32>());
        let weights = self.data[panel * self.stride..][..self.stride].as_ptr();
        // SAFETY: the view was made for at least `last` rows of this width, a panel holds `inputs` vectors or as many
        // blocks, the kernels write 16 numbers a row, and a block has room for its rows, filled up to whole tiles.
        unsafe {
            let floats = x.floats.wrapping_add(first * inputs);
            match self.kind {
                Kind::F32 => float_panel::<F32>(isa, weights, inputs, floats, rows, out),
                Kind::F16 => float_panel::<F16>(isa, weights, inputs, floats, rows, out),
                Kind::Bf16 => float_panel::<BF16>(isa, weights, inputs, floats, rows, out),
                Kind::Quant { codes, groups, affine, zero, factor } => {
                    let x = Int8 { x, blocks: inputs / BLOCK }.from(first);
                    let scaled = Scaled { zero, factor };
                    match (codes, groups, affine) {
                        (Codes::Nibble, _, false) => int8_panel::<NIBBLE, 1, false>(isa, weights, x, rows, scaled, out),
                        (Codes::Nibble, _, true) => int8_panel::<NIBBLE, 1, true>(isa, weights, x, rows, scaled, out),
                        (Codes::Byte, 1, false) => int8_panel::<BYTE, 1, false>(isa, weights, x, rows, scaled, out),
                        (Codes::Byte, 1, true) => int8_panel::<BYTE, 1, true>(isa, weights, x, rows, scaled, out),
                        (Codes::Byte, _, _) => int8_panel::<BYTE, 2, false>(isa, weights, x, rows, scaled, out),
                        (Codes::Full, _, _) => int8_panel::<FULL, 1, false>(isa, weights, x, rows, scaled, out),
                    }
                }
            }
            std::slice::from_raw_parts_mut(out, rows * LANES)
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

by_isa! { fn float_panel<const KIND: u8>(w: *const u8, inputs: usize, x: *const f32, rows: usize, out: *mut f32) = float_body }

#[inline(always)]
unsafe fn float_body<S: Simd, const KIND: u8>(w: *const u8, inputs: usize, x: *const f32, rows: usize, out: *mut f32) {
    let mut row = 0;
    while row < rows {
        let count = tile_rows(S::ROWS, rows - row);
        // SAFETY: by contract, `rows` rows of `inputs` numbers and of 16 results.
        unsafe {
            let (x, out) = (x.add(row * inputs), out.add(row * LANES));
            match count {
                8.. if S::ROWS == 8 => float_tile::<S, KIND, 8>(w, inputs, x, out),
                4.. => float_tile::<S, KIND, 4>(w, inputs, x, out),
                2.. => float_tile::<S, KIND, 2>(w, inputs, x, out),
                _ => float_tile::<S, KIND, 1>(w, inputs, x, out),
            }
        }
        row += count;
    }
}

#[inline(always)]
unsafe fn float_tile<S: Simd, const KIND: u8, const R: usize>(
    w: *const u8,
    inputs: usize,
    x: *const f32,
    out: *mut f32,
) {
    // SAFETY: a panel of `inputs` vectors, R rows of `inputs` numbers, R x 16 results.
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for k in 0..inputs {
            let w = match KIND {
                F32 => S::load(w.cast::<f32>().add(k * LANES)),
                F16 => S::load_f16(w.cast::<u16>().add(k * LANES)),
                _ => S::load_bf16(w.cast::<u16>().add(k * LANES)),
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(w, S::splat(*x.add(r * inputs + k)), *sum);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            S::store(out.add(r * LANES), sum);
        }
    }
}

by_isa! { fn gate_mul<const GELU: bool>(gate: *mut f32, up: *const f32, rows: usize) = gate_mul_body }

/// `gate = gate / (1 + e^-z) * up`, for rows of 16. With z = gate that is silu; `(1 + tanh(z)) / 2` is `1 / (1 + e^-2z)`, so with
/// twice what gelu takes the tanh of it is gelu.
#[inline(always)]
unsafe fn gate_mul_body<S: Simd, const GELU: bool>(gate: *mut f32, up: *const f32, rows: usize) {
    for row in 0..rows {
        // SAFETY: `rows` x 16 numbers each.
        unsafe {
            let g = S::load(gate.add(row * LANES));
            let z = match GELU {
                true => S::mul(g, S::fma(S::mul(g, g), S::splat(2.0 * ROOT * 0.044_715), S::splat(2.0 * ROOT))),
                false => g,
            };
            let below = S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), z)));
            S::store(gate.add(row * LANES), S::mul(S::div(g, below), S::load(up.add(row * LANES))));
        }
    }
}

/// The root of 2 / pi.
const ROOT: f32 = 0.797_884_6;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::quant::{Dtype, dequantize_row};
    use crate::kernel::testing::{Dice, cpus};
    use crate::kernel::{Arena, Source};

    struct Case {
        panels: Panels,
        /// `[channels, inputs]`
        weights: Vec<f32>,
    }

    fn case(cpu: &Cpu, dtype: Dtype, channels: usize, inputs: usize, seed: u64) -> Case {
        let bytes = Dice::new(seed).weights(dtype, channels, inputs);
        let source = Source { dtype, bytes: &bytes, channels, inputs };
        let panels = Panels::pack(cpu, &mut Arena::default(), source, false, |c| c).unwrap();
        let mut weights = vec![0.0; channels * inputs];
        let row = dtype.row_bytes(inputs).unwrap();
        for (row, out) in bytes.chunks_exact(row).zip(weights.chunks_exact_mut(inputs)) {
            dequantize_row(dtype, row, out).unwrap();
        }
        Case { panels, weights }
    }

    fn inputs(cpu: &Cpu, x: &[f32], rows: usize) -> Activations {
        let width = x.len() / rows;
        let mut out = Activations::new(rows, width, width.is_multiple_of(BLOCK));
        out.floats(width)[..x.len()].copy_from_slice(x);
        if width.is_multiple_of(BLOCK) {
            out.quantize(cpu, rows);
        }
        out
    }

    fn product(x: &[f32], weights: &[f32], inputs: usize) -> Vec<f64> {
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
        x.chunks_exact(inputs).flat_map(|x| weights.chunks_exact(inputs).map(move |w| dot(x, w))).collect()
    }

    fn close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
        let size = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
        for (got, expected) in got.iter().zip(expected) {
            assert!((f64::from(*got) - expected).abs() <= tolerance * size, "{what}: {got} {expected} of {size}");
        }
    }

    #[test]
    fn every_kind_of_weight_multiplies_as_its_dequantised_rows_do() {
        for cpu in cpus() {
            for dtype in Dtype::ALL {
                for (rows, channels, blocks) in [(1, 16, 1), (7, 33, 2), (13, 64, 3), (131, 17, 1)] {
                    let width = dtype.block_len().max(32) * blocks;
                    let case = case(&cpu, dtype, channels, width, rows as u64);
                    // Codes times a scale, so that quantising loses nothing and only the kernel is tested.
                    let mut dice = Dice::new(9);
                    let x: Vec<f32> = (0..rows * width)
                        .map(|i| if i % 32 == 5 { 127.0 } else { (dice.value() * 127.0).round() } * 0.25)
                        .collect();
                    let mut out = vec![f32::NAN; rows * channels];
                    let linear = Linear::new(vec![case.panels], None);
                    linear.apply(&cpu, &inputs(&cpu, &x, rows), rows, Out::Set(&mut out));
                    // Scales of the K formats are products rounded to f16.
                    let tolerance = if dtype.block_len() == 256 { 2e-3 } else { 2e-5 };
                    let what = format!("{} {} {rows}x{channels}x{width}", cpu.isa, dtype.name());
                    close(&out, &product(&x, &case.weights, width), tolerance, &what);
                }
            }
        }
    }

    #[test]
    fn extreme_codes_do_not_overflow() {
        for cpu in cpus() {
            for (dtype, byte, weight) in
                [(Dtype::Q8_0, 0x80u8, -128.0), (Dtype::Q8_0, 0x7f, 127.0), (Dtype::Q4_0, 0xff, 7.0)]
            {
                for sign in [1.0, -1.0] {
                    let mut bytes = Vec::new();
                    for _ in 0..16 * 2 {
                        bytes.extend(half::f16::ONE.to_le_bytes());
                        bytes.extend(std::iter::repeat_n(byte, dtype.block_bytes() - 2));
                    }
                    let source = Source { dtype, bytes: &bytes, channels: 16, inputs: 64 };
                    let linear = Linear::new(
                        vec![Panels::pack(&cpu, &mut Arena::default(), source, false, |c| c).unwrap()],
                        None,
                    );
                    let mut out = vec![0.0; 16];
                    linear.apply(&cpu, &inputs(&cpu, &[sign * 127.0; 64], 1), 1, Out::Set(&mut out));
                    assert!(out.iter().all(|&x| x == sign * 127.0 * weight * 64.0), "{} {out:?}", cpu.isa);
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_company() {
        for cpu in cpus() {
            for dtype in [Dtype::Q4_1, Dtype::Q4_0, Dtype::Q8_0, Dtype::Q6_K, Dtype::F16, Dtype::F32] {
                let (rows, channels, width) = (143, 40, 512);
                let linear = Linear::new(vec![case(&cpu, dtype, channels, width, 3).panels], None);
                let x = Dice::new(4).values(rows * width);
                let mut all = vec![0.0; rows * channels];
                linear.apply(&cpu, &inputs(&cpu, &x, rows), rows, Out::Set(&mut all));
                for row in [0, 1, 7, 8, 127, 128, 140, 142] {
                    let mut alone = vec![0.0; channels];
                    let x = inputs(&cpu, &x[row * width..][..width], 1);
                    linear.apply(&cpu, &x, 1, Out::Set(&mut alone));
                    assert_eq!(alone, all[row * channels..][..channels], "{} {} row {row}", cpu.isa, dtype.name());
                }
            }
        }
    }

    #[test]
    fn parts_of_different_kinds_lie_side_by_side_with_bias_and_residual() {
        for cpu in cpus() {
            let (rows, width) = (5, 256);
            let parts = [(Dtype::Q4_K, 20), (Dtype::F16, 7), (Dtype::Q6_K, 33)];
            let cases: Vec<Case> = parts.iter().map(|&(dtype, n)| case(&cpu, dtype, n, width, n as u64)).collect();
            let weights: Vec<f32> = cases.iter().flat_map(|case| case.weights.clone()).collect();
            let mut dice = Dice::new(5);
            let (x, bias, residual) = (dice.values(rows * width), dice.values(60), dice.values(rows * 60));
            let linear = Linear::new(cases.into_iter().map(|case| case.panels).collect(), Some(bias.clone()));
            let mut out = residual.clone();
            linear.apply(&cpu, &inputs(&cpu, &x, rows), rows, Out::Add(&mut out));
            let mut expected = product(&x, &weights, width);
            for (i, expected) in expected.iter_mut().enumerate() {
                *expected += f64::from(bias[i % 60]) + f64::from(residual[i]);
            }
            close(&out, &expected, 2e-2, "quantised inputs");
        }
    }

    #[test]
    fn columns_of_others_are_left_alone() {
        let cpu = &cpus()[0];
        let (rows, width, channels, stride) = (9, 64, 20, 50);
        let linear = Linear::new(vec![case(cpu, Dtype::F32, channels, width, 1).panels], None);
        let x = inputs(cpu, &Dice::new(3).values(rows * width), rows);
        let (mut dense, mut out) = (vec![0.0; rows * channels], vec![-7.0; rows * stride]);
        linear.apply(cpu, &x, rows, Out::Set(&mut dense));
        linear.apply(cpu, &x, rows, Out::Columns { out: Shared::new(&mut out), stride, first: 13 });
        for (dense, out) in dense.chunks(channels).zip(out.chunks(stride)) {
            assert_eq!(&out[13..33], dense);
            assert!(out[..13].iter().chain(&out[33..]).all(|&x| x == -7.0));
        }
    }

    #[test]
    fn gated_is_silu_or_gelu_of_one_product_times_the_other() {
        for cpu in cpus() {
            for (rows, act) in [1, 6, 130].into_iter().flat_map(|rows| [(rows, Gate::Silu), (rows, Gate::Gelu)]) {
                let (channels, width) = (24, 64);
                let (gate, up) =
                    (case(&cpu, Dtype::F32, channels, width, 1), case(&cpu, Dtype::F32, channels, width, 2));
                let mut x = Dice::new(3).values(rows * width);
                // Both ends, where a formula can overflow.
                x[..width].iter_mut().for_each(|x| *x *= 40.0);
                let mut out = vec![0.0; rows * channels];
                gated(&cpu, act, &gate.panels, &up.panels, &inputs(&cpu, &x, rows), rows, &mut out, None);
                let (a, b) = (product(&x, &gate.weights, width), product(&x, &up.weights, width));
                let act = |a: f64| match act {
                    Gate::Silu => a / (1.0 + (-a).exp()),
                    Gate::Gelu => 0.5 * a * (1.0 + (0.797_884_560_802_865_4 * (a + 0.044_715 * a.powi(3))).tanh()),
                };
                let expected: Vec<f64> = a.iter().zip(&b).map(|(&a, &b)| act(a) * b).collect();
                close(&out[channels..], &expected[channels..], 1e-5, "gated");
                close(&out[..channels], &expected[..channels], 1e-5, "gated, far out");
            }
        }
    }
}
