//! What adapters add to a product: `out[row] += scale * B (A x[row])`, where A has few rows and B few columns. Each row of
//! a step has an adapter of its own, or none.
//!
//!     x, rows of one adapter ──A──> low [rows, 96]     8 rows a turn, gathered from wherever they are in the step
//!     tile of a product (gemm.rs) (+)── B low          before bias and gate are done with it and it is written
//!
//! A is read once a step for all rows of its adapter, as the base's weights are; a step without adapters pays nothing.
//! The scale is applied between the two, so that no weight is rounded again. Each row's sums run over k in order whatever
//! the size of its tile, so its bits depend neither on its company nor on the adapters of others.

use std::ops::Range;

use crate::base::{Error, Result};
use crate::kernel::panel::{Kind, LANES, Panels};
use crate::kernel::rows::Activations;
use crate::kernel::simd::{Simd, by_isa};
use crate::kernel::{Buffer, Cpu, Isa, Shared};

/// Highest rank of an adapter.
pub const MAX_RANK: usize = 32;
/// Most matrices that share their inputs: queries, keys and values.
const MAX_PARTS: usize = 3;
/// Numbers of a row between A and B.
const LOW: usize = MAX_PARTS * MAX_RANK;
/// Panels of A, at most.
const LOW_PANELS: usize = MAX_RANK / LANES;
/// Rows of the largest tile.
const TILE: usize = 8;
/// Multiplications by 16 lanes below which the caller alone is done sooner than threads are woken.
const ALONE: usize = 16 << 10;

/// What one adapter adds to the matrices of one product, part by part; `None` where it adds nothing.
#[derive(Default)]
pub struct LowRank {
    parts: [Option<Pair>; MAX_PARTS],
}

/// What an adapter adds to one matrix.
struct Pair {
    /// `[rank, inputs]`
    a: Panels,
    /// `[channels, rank]`
    b: Panels,
    scale: f32,
}

impl LowRank {
    /// Adds `scale * b a` to matrix number `part` of the product.
    ///
    /// # Errors
    /// `Internal` when the two do not fit each other or are not of floats.
    pub fn set(&mut self, part: usize, a: Panels, b: Panels, scale: f32) -> Result<()> {
        if a.channels() != b.inputs() || a.channels() > MAX_RANK || a.takes_int8() || b.takes_int8() {
            return Err(Error::internal("the two halves of an adapter's matrix do not fit"));
        }
        self.parts[part] = Some(Pair { a, b, scale });
        Ok(())
    }

    /// Whether it adds nothing at all.
    pub fn is_empty(&self) -> bool {
        self.parts.iter().all(Option::is_none)
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.parts.iter().flatten().map(|pair| pair.a.bytes() + pair.b.bytes()).sum()
    }
}

/// Which rows of a step have which adapter, and what their inputs became under A. Allocated once for the largest step.
pub struct Adapters {
    /// By row: the number of its adapter, from 1; 0 for none.
    of: Vec<u16>,
    /// Rows that have an adapter, by adapter.
    rows: Vec<u32>,
    gathers: Vec<Gather>,
    /// `[rows, parts, rank]`, each part's ranks from a multiple of [`MAX_RANK`] on.
    low: Buffer<f32>,
}

/// Rows of one adapter that are computed together.
#[derive(Clone, Copy)]
struct Gather {
    adapter: u16,
    count: u8,
    /// Where in `Adapters::rows`.
    first: u32,
}

/// Which part of a product is computed here, where a rank holds a part of the matrices: adapters are whole.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The first input.
    pub input: usize,
    /// The first panel of channels, part by part.
    pub panels: [usize; MAX_PARTS],
}

/// The second half of a product: what is still to be added to its tiles.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
    of: &'a [u16],
    low: &'a [f32],
    panels: [usize; MAX_PARTS],
    find: &'a Find<'a>,
}

/// What adapter number `n` of a step adds to the product at hand.
pub type Find<'a> = dyn Fn(usize) -> Option<&'a LowRank> + Sync + 'a;

impl Adapters {
    /// For steps of up to `rows` rows.
    pub fn new(rows: usize) -> Self {
        Self {
            of: Vec::with_capacity(rows),
            rows: Vec::with_capacity(rows),
            gathers: Vec::with_capacity(rows),
            low: Buffer::zeroed(rows * LOW),
        }
    }

    /// Takes in a step: `count` adapters, and spans of rows as `(rows, adapter)` from row 0 on, adapter 0 being none.
    pub fn plan(&mut self, isa: Isa, count: usize, spans: impl Iterator<Item = (usize, usize)> + Clone) {
        let Self { of, rows, gathers, .. } = self;
        of.clear();
        rows.clear();
        gathers.clear();
        if count == 0 {
            return;
        }
        for (rows, adapter) in spans {
            of.extend(std::iter::repeat_n(adapter as u16, rows));
        }
        assert!(of.len() * LOW <= self.low.len() && count <= usize::from(u16::MAX));
        for adapter in 1..=count as u16 {
            let first = rows.len();
            rows.extend(of.iter().enumerate().filter(|(_, of)| **of == adapter).map(|(row, _)| row as u32));
            isa.each_tile(first, rows.len(), |first, count| {
                gathers.push(Gather { adapter, count: count as u8, first: first as u32 });
            });
        }
    }

    /// Rows of the step that have an adapter.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// `low = scale * A x` for the rows that have an adapter, whatever parts of the product it adds to. `None` when no row
    /// has one. `x` are the inputs from `cut.input` on.
    pub fn project<'a>(
        &'a mut self,
        cpu: &Cpu,
        x: &Activations,
        parts: usize,
        cut: Cut,
        find: &'a Find<'a>,
    ) -> Option<Delta<'a>> {
        if self.rows.is_empty() {
            return None;
        }
        let inputs = x.width();
        let view = x.view(self.of.len(), false);
        let (rows, gathers, low) = (&self.rows, &self.gathers, self.low.share());
        let tasks = gathers.len() * parts * LOW_PANELS;
        let grain = if rows.len() * parts * LOW_PANELS * inputs < ALONE { tasks } else { 1 };
        cpu.pool.each(tasks, grain, |task| {
            // All of it: its pointers alone may not go to other threads.
            let x = view;
            let gather = gathers[task / (parts * LOW_PANELS)];
            let (part, panel) = (task / LOW_PANELS % parts, task % LOW_PANELS);
            let found = find(usize::from(gather.adapter) - 1).and_then(|adapter| adapter.parts[part].as_ref());
            let Some(pair) = found.filter(|pair| panel * LANES < pair.a.channels()) else { return };
            assert!(cut.input + inputs <= pair.a.inputs());
            let rows = &rows[gather.first as usize..][..usize::from(gather.count)];
            let (mut from, mut to) = ([std::ptr::null(); TILE], [std::ptr::null_mut(); TILE]);
            for (i, &row) in rows.iter().enumerate() {
                let row = row as usize;
                // SAFETY: the view holds as many rows as the step has.
                from[i] = unsafe { x.floats.add(row * inputs) };
                to[i] = low.at(row * LOW + part * MAX_RANK + panel * LANES);
            }
            let inputs = cut.input..cut.input + inputs;
            // SAFETY: rows of so many numbers; 16 numbers of each are written here and nowhere else.
            unsafe { multiply::<false>(cpu.isa, &pair.a, panel, inputs, pair.scale, &from, &to, rows.len()) };
        });
        Some(Delta { of: &self.of, low: &self.low, panels: cut.panels, find })
    }
}

impl Delta<'_> {
    /// Adds to a tile of the product, `[count, 16]`: panel `panel` of part `part`, rows from `row` on.
    #[inline]
    pub(super) fn add(&self, isa: Isa, part: usize, panel: usize, row: usize, tile: &mut [f32]) {
        let of = &self.of[row..row + tile.len() / LANES];
        if of.iter().all(|&adapter| adapter == 0) {
            return;
        }
        let (tile, panel) = (Shared::new(tile), self.panels[part] + panel);
        let mut at = 0;
        while let Some(&adapter) = of.get(at) {
            let run = of[at..].iter().take_while(|&&other| other == adapter).count();
            let found = if adapter > 0 { (self.find)(usize::from(adapter) - 1) } else { None };
            if let Some(pair) = found.and_then(|adapter| adapter.parts[part].as_ref()) {
                isa.each_tile(at, at + run, |first, count| {
                    let (mut from, mut to) = ([std::ptr::null(); TILE], [std::ptr::null_mut(); TILE]);
                    for i in 0..count {
                        from[i] = self.low[(row + first + i) * LOW + part * MAX_RANK..][..MAX_RANK].as_ptr();
                        to[i] = tile.at((first + i) * LANES);
                    }
                    // SAFETY: rows of as many numbers as B has inputs; the tile is this caller's alone.
                    unsafe { multiply::<true>(isa, &pair.b, panel, 0..pair.b.inputs(), 1.0, &from, &to, count) };
                });
            }
            at += run;
        }
    }
}

/// `out[r] = scale * panel x[r]`, over these inputs of the matrix, on top of what is there when `ADD`, for `count` (1, 2, 4
/// or 8) rows.
///
/// # Safety
/// Each of the first `count` pointers leads to as many numbers as there are `inputs`, and to room for 16.
#[inline]
#[allow(clippy::too_many_arguments)]
unsafe fn multiply<const ADD: bool>(
    isa: Isa,
    matrix: &Panels,
    panel: usize,
    inputs: Range<usize>,
    scale: f32,
    x: &[*const f32; TILE],
    out: &[*mut f32; TILE],
    count: usize,
) {
    debug_assert!(matches!(count, 1 | 2 | 4 | 8));
    assert!(inputs.end <= matrix.inputs());
    // A panel of floats is a vector of 16 an input.
    let vector = if matrix.kind == Kind::F32 { LANES * 4 } else { LANES * 2 };
    let panel = &matrix.data[panel * matrix.stride..][..matrix.stride];
    let (w, inputs) = (panel[inputs.start * vector..].as_ptr(), inputs.len());
    macro_rules! rows {
        ($kind:ident) => {
            match count {
                1 => tile::<$kind, ADD, 1>(isa, w, inputs, scale, x, out),
                2 => tile::<$kind, ADD, 2>(isa, w, inputs, scale, x, out),
                4 => tile::<$kind, ADD, 4>(isa, w, inputs, scale, x, out),
                _ => tile::<$kind, ADD, 8>(isa, w, inputs, scale, x, out),
            }
        };
    }
    // SAFETY: a panel holds a vector of 16 for each of the matrix's inputs; the rest by contract.
    unsafe {
        match matrix.kind {
            Kind::F16 => rows!(F16),
            Kind::Bf16 => rows!(BF16),
            _ => rows!(F32),
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

by_isa! {
    fn tile<const KIND: u8, const ADD: bool, const R: usize>(
        w: *const u8, inputs: usize, scale: f32, x: &[*const f32; TILE], out: &[*mut f32; TILE],
    ) = tile_body
}

#[inline(always)]
unsafe fn tile_body<S: Simd, const KIND: u8, const ADD: bool, const R: usize>(
    w: *const u8,
    inputs: usize,
    scale: f32,
    x: &[*const f32; TILE],
    out: &[*mut f32; TILE],
) {
    // SAFETY: a panel of `inputs` vectors, R rows of `inputs` numbers, R times 16 results.
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for k in 0..inputs {
            let w = match KIND {
                F32 => S::load(w.cast::<f32>().add(k * LANES)),
                F16 => S::load_f16(w.cast::<u16>().add(k * LANES)),
                _ => S::load_bf16(w.cast::<u16>().add(k * LANES)),
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(w, S::splat(*x[r].add(k)), *sum);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            let base = if ADD { S::load(out[r]) } else { S::splat(0.0) };
            S::store(out[r], S::fma(sum, S::splat(scale), base));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{Dice, cpus};
    use crate::kernel::{Arena, Dtype, Gate, Linear, Out, Source, gated};

    /// A matrix and its numbers, `[channels, inputs]`.
    fn matrix(cpu: &Cpu, dtype: Dtype, channels: usize, inputs: usize, dice: &mut Dice) -> (Panels, Vec<f32>) {
        let bytes = dice.weights(dtype, channels, inputs);
        let source = Source { dtype, bytes: &bytes, channels, inputs };
        let panels = Panels::pack(cpu, &mut Arena::default(), source, false, |c| c).unwrap();
        let mut weights = vec![0.0; channels * inputs];
        for (channel, row) in weights.chunks_exact_mut(inputs).enumerate() {
            panels.channel(channel, row);
        }
        (panels, weights)
    }

    /// `scale * b (a x)`
    fn added(x: &[f32], a: &[f32], b: &[f32], rank: usize, scale: f32) -> Vec<f64> {
        let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let low: Vec<f64> = a.chunks_exact(x.len()).map(|a| dot(&x, a)).collect();
        b.chunks_exact(rank).map(|b| f64::from(scale) * dot(&low, b)).collect()
    }

    fn inputs(x: &[f32], width: usize) -> Activations {
        let mut out = Activations::new(x.len() / width, width, false);
        out.floats(width)[..x.len()].copy_from_slice(x);
        out
    }

    /// Adapters of a step by span: `(rows, adapter)`.
    const SPANS: [(usize, usize); 8] = [(1, 2), (3, 0), (19, 1), (1, 3), (1, 2), (1, 1), (11, 0), (140, 2)];

    #[test]
    fn each_row_gets_what_its_own_adapter_adds_and_the_others_nothing() {
        let width = 64;
        let rows: usize = SPANS.iter().map(|(rows, _)| rows).sum();
        let of: Vec<usize> = SPANS.iter().flat_map(|&(rows, of)| std::iter::repeat_n(of, rows)).collect();
        for cpu in cpus() {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                let mut dice = Dice::new(7);
                let x = dice.values(rows * width);
                let parts = [40, 9];
                let (first, second) =
                    (matrix(&cpu, Dtype::F32, 40, width, &mut dice), matrix(&cpu, Dtype::F32, 9, width, &mut dice));
                let linear = Linear::new(vec![first.0, second.0], None);
                // The third adds to the second part only.
                let (mut adapters, mut numbers) = (Vec::new(), Vec::new());
                for (rank, scale) in [(1, 2.0), (32, 0.5), (16, 1.5)] {
                    let mut adapter = LowRank::default();
                    for (part, &channels) in parts.iter().enumerate().filter(|&(part, _)| rank != 16 || part == 1) {
                        let (a, b) = (
                            matrix(&cpu, dtype, rank, width, &mut dice),
                            matrix(&cpu, dtype, channels, rank, &mut dice),
                        );
                        adapter.set(part, a.0, b.0, scale).unwrap();
                        numbers.push((adapters.len() + 1, part, a.1, b.1, rank, scale));
                    }
                    adapters.push(adapter);
                }
                let step = |x: &[f32], count: usize, spans: &[(usize, usize)]| {
                    let mut plan = Adapters::new(spans.iter().map(|(rows, _)| rows).sum());
                    plan.plan(cpu.isa, count, spans.iter().copied());
                    let x = inputs(x, width);
                    let find = |adapter: usize| adapters.get(adapter);
                    let delta = plan.project(&cpu, &x, 2, Cut::default(), &find);
                    let mut out = vec![0.0; x.capacity() * 49];
                    linear.apply_adapted(&cpu, &x, x.capacity(), Out::Set(&mut out), delta);
                    out
                };
                let plain = step(&x, 0, &[(rows, 0)]);
                let all = step(&x, 3, &SPANS);
                for (row, &adapter) in of.iter().enumerate() {
                    let mut expected: Vec<f64> = plain[row * 49..][..49].iter().map(|&y| f64::from(y)).collect();
                    for (_, part, a, b, rank, scale) in numbers.iter().filter(|of| of.0 == adapter) {
                        let delta = added(&x[row * width..][..width], a, b, *rank, *scale);
                        expected[part * 40..].iter_mut().zip(delta).for_each(|(y, delta)| *y += delta);
                    }
                    for (got, expected) in all[row * 49..][..49].iter().zip(expected) {
                        assert!(
                            (f64::from(*got) - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                            "{} row {row}: {got} {expected}",
                            cpu.isa
                        );
                    }
                    let alone = step(&x[row * width..][..width], 3, &[(1, adapter)]);
                    assert_eq!(alone, all[row * 49..][..49], "{} {} row {row} alone", cpu.isa, dtype.name());
                    if adapter == 0 {
                        assert_eq!(plain[row * 49..][..49], all[row * 49..][..49], "row {row} has no adapter");
                    }
                }
            }
        }
    }

    #[test]
    fn gate_and_up_are_adapted_before_they_meet() {
        let (rows, width, ffn, rank) = (11, 32, 24, 4);
        for cpu in cpus() {
            let mut dice = Dice::new(11);
            let x = dice.values(rows * width);
            let [gate, up] = [0, 1].map(|_| matrix(&cpu, Dtype::F32, ffn, width, &mut dice));
            let mut adapter = LowRank::default();
            let mut pairs = Vec::new();
            for part in 0..2 {
                let (a, b) =
                    (matrix(&cpu, Dtype::F32, rank, width, &mut dice), matrix(&cpu, Dtype::F32, ffn, rank, &mut dice));
                adapter.set(part, a.0, b.0, 0.25).unwrap();
                pairs.push((a.1, b.1));
            }
            let mut plan = Adapters::new(rows);
            plan.plan(cpu.isa, 1, [(4, 0), (rows - 4, 1)].into_iter());
            let activations = inputs(&x, width);
            let find = |_: usize| Some(&adapter);
            let delta = plan.project(&cpu, &activations, 2, Cut::default(), &find);
            let (mut out, mut plain) = (vec![0.0; rows * ffn], vec![0.0; rows * ffn]);
            gated(&cpu, Gate::Silu, &gate.0, &up.0, &activations, rows, &mut plain, None);
            gated(&cpu, Gate::Silu, &gate.0, &up.0, &activations, rows, &mut out, delta);
            assert_eq!(out[..4 * ffn], plain[..4 * ffn]);
            let base = |w: &[f32], x: &[f32], c: usize| -> f64 {
                w[c * width..][..width].iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
            };
            for row in 4..rows {
                let x = &x[row * width..][..width];
                let [g, u] = [0, 1].map(|part| added(x, &pairs[part].0, &pairs[part].1, rank, 0.25));
                for c in 0..ffn {
                    let (g, u) = (base(&gate.1, x, c) + g[c], base(&up.1, x, c) + u[c]);
                    let (got, expected) = (f64::from(out[row * ffn + c]), g / (1.0 + (-g).exp()) * u);
                    assert!((got - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{} {got} {expected}", cpu.isa);
                }
            }
        }
    }

    #[test]
    fn ranks_that_hold_parts_of_a_matrix_use_their_parts_of_a_whole_adapter() {
        let (rows, width, channels, rank) = (5, 96, 48, 20);
        for cpu in cpus() {
            for dtype in [Dtype::F32, Dtype::F16] {
                let mut dice = Dice::new(13);
                let x = dice.values(rows * width);
                let (a, b) =
                    (matrix(&cpu, dtype, rank, width, &mut dice), matrix(&cpu, dtype, channels, rank, &mut dice));
                let mut adapter = LowRank::default();
                adapter.set(0, a.0, b.0, 0.5).unwrap();
                let zeros = |channels: usize, inputs: usize| {
                    let bytes = vec![0; channels * inputs * 4];
                    let source = Source { dtype: Dtype::F32, bytes: &bytes, channels, inputs };
                    Linear::new(vec![Panels::pack(&cpu, &mut Arena::default(), source, false, |c| c).unwrap()], None)
                };
                let run = |linear: &Linear, x: &[f32], cut: Cut| {
                    let (mut plan, find) = (Adapters::new(rows), |_: usize| Some(&adapter));
                    plan.plan(cpu.isa, 1, [(rows, 1)].into_iter());
                    let x = inputs(x, x.len() / rows);
                    let mut out = vec![0.0; rows * linear.channels()];
                    linear.apply_adapted(&cpu, &x, rows, Out::Set(&mut out), plan.project(&cpu, &x, 1, cut, &find));
                    out
                };
                let whole = run(&zeros(channels, width), &x, Cut::default());
                let lower = run(&zeros(16, width), &x, Cut { panels: [2, 0, 0], ..Cut::default() });
                for (whole, lower) in whole.chunks(channels).zip(lower.chunks(16)) {
                    assert_eq!(&whole[32..], lower, "the last 16 channels");
                }
                let halves = [0..40, 40..width].map(|cut| {
                    let x: Vec<f32> = x.chunks(width).flat_map(|row| row[cut.clone()].to_vec()).collect();
                    run(&zeros(channels, cut.len()), &x, Cut { input: cut.start, ..Cut::default() })
                });
                for (i, whole) in whole.iter().enumerate() {
                    let sum = halves[0][i] + halves[1][i];
                    assert!((whole - sum).abs() < 1e-4 * (1.0 + whole.abs()), "{} {whole} {sum}", cpu.isa);
                }
            }
        }
    }

    #[test]
    fn halves_that_do_not_fit_are_refused() {
        let cpu = &cpus()[0];
        let mut dice = Dice::new(1);
        let mut pair = |rank, other| {
            let a = matrix(cpu, Dtype::F32, rank, 32, &mut dice).0;
            LowRank::default().set(0, a, matrix(cpu, Dtype::F32, 8, other, &mut dice).0, 1.0)
        };
        assert!(pair(4, 4).is_ok());
        assert!(pair(4, 5).is_err());
        assert!(pair(33, 33).is_err());
    }
}
