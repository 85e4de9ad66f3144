//! Logits to token, one row at a time, rows in parallel.
//!
//! ```text
//! raw logits ─ mask ─ bias ─ penalties ─┬─ temperature 0: the best, lowest id first
//!     |                                 └─ temperature ─ top-k ─ typical ─ top-p ─ min-p ─ draw
//!     └─ log-probabilities, if asked for
//! ```
//!
//! A row's token depends on its logits, its sampling parameters and (seed, position) only: the random number is a hash
//! of the two, not a state, so neither batch company nor a preemption can change an answer.
//!
//! The vocabulary is never sorted. Top-k finds a bar that at least k values reach from the maxima of small chunks and
//! selects among the few above it; top-p and typical drop what is too unlikely to matter by one comparison a token and
//! find their bar by halving among the rest. The passes over a whole row are plain loops over fixed lanes that the compiler vectorises.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::engine::Logits;
use crate::engine::seen::{Counted, Seen};
use crate::task::Sampling;

/// Values whose maximum is taken together in the search for the best k.
const CHUNK: usize = 64;
/// Values whose sum is taken together in a draw.
const STRIDE: usize = 1024;
const LANES: usize = 16;

/// What one row's draw depends on, its logits aside.
pub struct Draw<'a> {
    /// The caller's wishes.
    pub sampling: &'a Sampling,
    /// Of this choice.
    pub seed: u64,
    /// Tokens that the answer has already.
    pub position: u64,
    /// What it looks back at; needed only where [`Seen::needed`] says so. Rows of one sequence take turns.
    pub seen: Option<&'a Mutex<Seen>>,
    /// Tokens behind those: drafts that this row stands on.
    pub ahead: &'a [u32],
    /// `Some(k)`: report log-probabilities and `k` rivals.
    pub logprobs: Option<u32>,
    /// A bit a token, those set may be drawn; tokens beyond its end may not.
    pub mask: Option<&'a [u32]>,
    /// Nothing is drawn: this token of the prompt follows, and only its log-probability is wanted.
    pub given: Option<u32>,
}

/// One row's result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drawn {
    /// The token, or `None` if no logit of the row is a number.
    pub token: Option<u32>,
    /// Its log-probability under the raw logits, if asked for.
    pub logprob: f32,
    /// The best tokens under the raw logits, best first, if asked for.
    pub top: Vec<(u32, f32)>,
    /// Of a given token: 1 if it is the best.
    pub rank: u32,
}

/// Tokens taken out of a row, always in order of id, so that nothing depends on how they were selected.
#[derive(Default)]
struct Found {
    ids: Vec<u32>,
    values: Vec<f32>,
}

impl Found {
    /// Keeps the values above `bar`, and the first `ties` of those that equal it.
    fn keep(&mut self, bar: f32, mut ties: usize) {
        let mut kept = 0;
        for at in 0..self.values.len() {
            let (id, value) = (self.ids[at], self.values[at]);
            let tie = value == bar && ties > 0;
            ties -= usize::from(tie);
            // Written in any case and kept by moving on: the condition is as good as random for a branch.
            (self.ids[kept], self.values[kept]) = (id, value);
            kept += usize::from(value > bar || tie);
        }
        self.ids.truncate(kept);
        self.values.truncate(kept);
    }
}

#[derive(Default)]
struct Scratch {
    raw: Vec<f32>,
    maxima: Vec<f32>,
    order: Vec<f32>,
    found: Found,
}

/// Draws the tokens of a step. Keeps its work memory from step to step.
#[derive(Default)]
pub struct Sampler {
    scratch: Vec<Mutex<Scratch>>,
    drawn: Vec<Drawn>,
    rows: usize,
}

impl Sampler {
    /// The results of the last [`Sampler::pick`], one a row.
    pub fn drawn(&self) -> &[Drawn] {
        &self.drawn[..self.rows]
    }

    /// One token for each row of `logits`; `draw(row)` says how, `None` that nobody wants it. Changes the logits.
    pub fn pick<'a>(&mut self, logits: Logits<'_>, draw: impl Fn(usize) -> Option<Draw<'a>> + Sync) {
        let vocab = logits.vocab.max(1);
        let rows = logits.data.len() / vocab;
        self.rows = rows;
        self.scratch.resize_with(logits.pool.threads().max(self.scratch.len()), Mutex::default);
        self.drawn.resize_with(rows.max(self.drawn.len()), Drawn::default);
        let data = Rows { first: logits.data.as_mut_ptr(), length: vocab, rows };
        let out = Rows { first: self.drawn.as_mut_ptr(), length: 1, rows };
        let (next, scratch) = (AtomicUsize::new(0), &self.scratch);
        let work = |thread: usize| {
            let mut scratch = scratch[thread].lock();
            loop {
                let row = next.fetch_add(1, Ordering::Relaxed);
                if row >= rows {
                    return;
                }
                // SAFETY: the counter gives each row to one thread, and both slices live until `pick` returns.
                let (values, drawn) = unsafe { (data.get(row), &mut out.get(row)[0]) };
                match draw(row) {
                    Some(draw) => pick_row(values, &draw, &mut scratch, drawn),
                    None => drawn.token = None,
                }
            }
        };
        if rows > 1 {
            logits.pool.run(work);
        } else {
            work(0);
        }
    }
}

/// A slice cut into rows of equal length, each of which is used by one thread.
struct Rows<T> {
    first: *mut T,
    length: usize,
    rows: usize,
}

// SAFETY: shared only to hand out disjoint rows, see `get`.
unsafe impl<T: Send> Sync for Rows<T> {}

impl<T> Rows<T> {
    /// # Safety
    /// No row is handed out twice at the same time, and the memory behind outlives what is handed out.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: within the slice that `first` came from, by the assertion; not aliased, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.length), self.length) }
    }
}

fn pick_row(row: &mut [f32], draw: &Draw<'_>, scratch: &mut Scratch, out: &mut Drawn) {
    out.top.clear();
    out.logprob = 0.0;
    let mut raw_total = 0.0;
    if let Some(rivals) = draw.logprobs {
        let best = max(row);
        raw_total = best + sum_exp(row, best).ln() as f32;
        find_best(row, rivals as usize, scratch);
        let Found { ids, values } = &scratch.found;
        out.top.extend(ids.iter().zip(values).map(|(&id, &value)| (id, value - raw_total)));
        out.top.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if draw.given.is_none() {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(row);
        }
    }
    if let Some(token) = draw.given {
        let logit = row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        (out.token, out.logprob, out.rank) = (Some(token), logit - raw_total, 1 + count_above(row, logit));
        return;
    }
    if let Some(mask) = draw.mask {
        keep_allowed(row, mask);
    }
    shape(row, draw);
    out.token = choose(row, draw, scratch);
    if let (Some(token), Some(_)) = (out.token, draw.logprobs) {
        out.logprob = scratch.raw[token as usize] - raw_total;
    }
}

/// Bias and penalties, in place.
fn shape(row: &mut [f32], draw: &Draw<'_>) {
    let sampling = draw.sampling;
    for &(token, bias) in &sampling.logit_bias {
        if let Some(logit) = row.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if let Some(seen) = draw.seen {
        // A row that stands on drafts sees them as if they had been said.
        seen.lock().behind(draw.ahead, |seen| penalise(row, sampling, seen));
    }
}

fn penalise(row: &mut [f32], sampling: &Sampling, seen: &Seen) {
    for &Counted { token, answered, .. } in seen.counted() {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        if *logit > 0.0 {
            *logit /= sampling.repetition_penalty;
        } else {
            *logit *= sampling.repetition_penalty;
        }
        if answered > 0 {
            *logit -= sampling.frequency_penalty * answered as f32 + sampling.presence_penalty;
        }
    }
    let Some(dry) = &sampling.dry else { return };
    for &(token, length) in seen.repeats() {
        if let Some(logit) = row.get_mut(token as usize) {
            let exponent = length.saturating_sub(dry.allowed_length) as f32;
            // Never infinite: something must be left to draw even if everything would repeat something.
            *logit -= (dry.multiplier * dry.base.powf(exponent)).min(f32::MAX);
        }
    }
}

fn choose(row: &mut [f32], draw: &Draw<'_>, scratch: &mut Scratch) -> Option<u32> {
    let sampling = draw.sampling;
    let best = max(row);
    if best == f32::NEG_INFINITY {
        return None;
    }
    // An infinite logit is certain.
    if sampling.temperature <= 0.0 || best == f32::INFINITY {
        return row.iter().position(|&logit| logit == best).map(|id| id as u32);
    }
    let random = uniform(draw.seed, draw.position);
    let heat = 1.0 / sampling.temperature.max(1e-4);
    let limit = sampling.top_k as usize;
    let total = if limit > 0 && limit < row.len() {
        find_best(row, limit, scratch);
        if sampling.typical_p < 1.0 {
            let (total, mean) = spread(&scratch.found.values, best, heat);
            typical(scratch, best, heat, mean, f64::from(sampling.typical_p) * total)
        } else {
            weigh(&mut scratch.found.values, best, heat, 0.0)
        }
    } else if sampling.typical_p < 1.0 {
        let (total, mean) = spread(row, best, heat);
        let goal = f64::from(sampling.typical_p) * total;
        // All tokens whose weight is below `floor` together weigh less than the rest of the goal, so those above are
        // enough. Nothing is kept that is further from the mean than the further end of these: the best, or the floor.
        let floor = ((total - goal) / row.len() as f64).max(1e-38).ln().min(2.0 * f64::from(mean)) as f32;
        gather(row, (best + (floor - 1e-3) / heat).max(f32::MIN), &mut scratch.found);
        typical(scratch, best, heat, mean, goal)
    } else if sampling.top_p < 1.0 {
        let total = weigh(row, best, heat, 0.0);
        // All tokens below this bar together weigh less than `1 - top_p` of the total, so none of them is kept.
        let bar = ((1.0 - f64::from(sampling.top_p)) * total / row.len() as f64) as f32;
        gather(row, bar.max(f32::MIN_POSITIVE), &mut scratch.found);
        total
    } else {
        let total = weigh(row, best, heat, sampling.min_p);
        return draw_from(row, random * total).map(|id| id as u32);
    };
    let found = &mut scratch.found;
    if sampling.top_p < 1.0 {
        nucleus(found, f64::from(sampling.top_p) * total);
    }
    if sampling.min_p > 0.0 {
        // The best token may be too likely to be typical.
        let most = if sampling.typical_p < 1.0 { max(&found.values) } else { 1.0 };
        found.keep(sampling.min_p * most, usize::MAX);
    }
    let total = sum_from(&found.values, 0.0);
    draw_from(&found.values, random * total).map(|at| found.ids[at])
}

/// The `count` best values of a row into `scratch.found`, the lowest ids among equals; fewer if fewer are finite.
fn find_best(row: &[f32], count: usize, scratch: &mut Scratch) {
    let Scratch { maxima, order, found, .. } = scratch;
    maxima.clear();
    maxima.extend(row.chunks(CHUNK).map(max));
    // `count` chunks have a maximum of at least the bar, so at least `count` values do.
    let mut bar = f32::MIN;
    if (1..maxima.len()).contains(&count) {
        bar = bar.max(nth_best(maxima, count - 1));
    }
    gather(row, bar, found);
    if count == 0 {
        found.keep(f32::INFINITY, 0);
    } else if found.values.len() > count {
        order.clear();
        order.extend_from_slice(&found.values);
        let bar = nth_best(order, count - 1);
        let above = found.values.iter().filter(|&&value| value > bar).count();
        found.keep(bar, count - above);
    }
}

/// The value with `n` better ones. Changes the order.
fn nth_best(values: &mut [f32], n: usize) -> f32 {
    *values.select_nth_unstable_by(n, |a, b| b.total_cmp(a)).1
}

/// Keeps the smallest set of best candidates that weighs at least `goal`, at least one. Looks for the largest weight
/// that will do as a bar by halving the range of floats: their bits are ordered as they are. Some 28 passes of a masked
/// sum, where sorting would be thousands of comparisons that no branch predictor guesses.
fn nucleus(found: &mut Found, goal: f64) {
    let (mut low, mut high) = (f32::MIN_POSITIVE.to_bits(), 1.0f32.to_bits() + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if sum_from(&found.values, f32::from_bits(middle)) >= goal {
            low = middle;
        } else {
            high = middle;
        }
    }
    let bar = f32::from_bits(low);
    let above = sum_from(&found.values, f32::from_bits(high));
    let ties = ((goal - above) / f64::from(bar)).ceil().max(if above > 0.0 { 0.0 } else { 1.0 });
    found.keep(bar, ties as usize);
}

/// Turns the candidates' logits into weights and keeps the smallest set of those nearest to `mean` that weighs at least
/// `goal`, at least one: the tokens whose surprise differs least from the entropy. The bar is found by halving, as in
/// [`nucleus`]. Returns the weight of what is left.
fn typical(scratch: &mut Scratch, best: f32, heat: f32, mean: f32, goal: f64) -> f64 {
    let Scratch { order: far, found, .. } = scratch;
    far.clear();
    far.extend(found.values.iter().map(|&logit| ((logit - best) * heat - mean).abs()));
    weigh(&mut found.values, best, heat, 0.0);
    let (mut low, mut high) = (0, f32::INFINITY.to_bits());
    while low < high {
        let middle = low + (high - low) / 2;
        let weight = sum_within(&found.values, far, f32::from_bits(middle));
        if weight >= goal && weight > 0.0 {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let bar = f32::from_bits(high);
    // The first of those that are equally far, as many as it takes.
    let below = if high == 0 { 0.0 } else { sum_within(&found.values, far, f32::from_bits(high - 1)) };
    let mut missing = goal - below;
    let mut kept = 0;
    for (at, &far) in far.iter().enumerate() {
        let tie = far == bar && (missing > 0.0 || kept == 0 && below == 0.0);
        missing -= if tie { f64::from(found.values[at]) } else { 0.0 };
        (found.ids[kept], found.values[kept]) = (found.ids[at], found.values[at]);
        kept += usize::from(far < bar || tie);
    }
    found.ids.truncate(kept);
    found.values.truncate(kept);
    sum_from(&found.values, 0.0)
}

/// The first place at which the weights add up to more than `goal`.
fn draw_from(weights: &[f32], mut goal: f64) -> Option<usize> {
    let mut last = None;
    for (at, stride) in weights.chunks(STRIDE).enumerate() {
        let weight = sum_from(stride, 0.0);
        if weight > 0.0 {
            last = Some((at, stride));
            if goal < weight {
                break;
            }
            goal -= weight;
        }
    }
    // Past the end by a rounding error: the last place that weighs anything.
    let (at, stride) = last?;
    let mut place = None;
    for (within, &weight) in stride.iter().enumerate().filter(|&(_, &weight)| weight > 0.0) {
        place = Some(at * STRIDE + within);
        goal -= f64::from(weight);
        if goal < 0.0 {
            break;
        }
    }
    place
}

/// A number in `[0, 1)` that looks random, the same for the same arguments.
fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    // Mixed between the two, so that neighbouring seeds (the choices of a request) do not walk the same sequence.
    let stream = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(stream.wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(1));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Compiles a function twice, once for AVX2, and calls what the machine can run. Both give the same bits: the lanes are
/// fixed, and nothing is fused.
macro_rules! wide {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn plain($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    plain($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the machine has AVX2.
                    return unsafe { avx2($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    };
}

wide! {
    /// The largest value that is a number; minus infinity if none is.
    fn max(row: &[f32]) -> f32 {
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = larger(*lane, value);
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &value| larger(best, value))
    }
}

wide! {
    /// Takes out what a mask does not allow.
    fn keep_allowed(row: &mut [f32], mask: &[u32]) {
        for (at, chunk) in row.chunks_mut(32).enumerate() {
            let bits = mask.get(at).copied().unwrap_or(0);
            if bits == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                *logit = if bits >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
}

wide! {
    /// How many values are above `bar`.
    fn count_above(row: &[f32], bar: f32) -> u32 {
        let mut lanes = [0u32; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane += u32::from(value > bar);
            }
        }
        lanes.iter().sum::<u32>() + rest.iter().map(|&value| u32::from(value > bar)).sum::<u32>()
    }
}

wide! {
    /// The sum of the values of at least `bar`.
    fn sum_from(row: &[f32], bar: f32) -> f64 {
        let mut total = 0.0;
        for stride in row.chunks(STRIDE) {
            total += sum_stride(stride, bar);
        }
        total
    }
}

wide! {
    /// The sum of `exp(value - best)`.
    fn sum_exp(row: &[f32], best: f32) -> f64 {
        let mut total = 0.0;
        for stride in row.chunks(STRIDE) {
            let mut lanes = [0.0f32; LANES];
            let (chunks, rest) = stride.as_chunks::<LANES>();
            for chunk in chunks {
                for (lane, &value) in lanes.iter_mut().zip(chunk) {
                    *lane += exp(value - best);
                }
            }
            total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
            total += rest.iter().map(|&value| f64::from(exp(value - best))).sum::<f64>();
        }
        total
    }
}

wide! {
    /// The sum of the weights `exp(l)` with `l = (logit - best) * heat`, and the mean of `l` under them: the negative
    /// entropy, but for a constant that all `l` share.
    fn spread(row: &[f32], best: f32, heat: f32) -> (f64, f32) {
        let (mut total, mut moment) = (0.0f64, 0.0f64);
        for stride in row.chunks(STRIDE) {
            let (mut weights, mut products) = ([0.0f32; LANES], [0.0f32; LANES]);
            let (chunks, rest) = stride.as_chunks::<LANES>();
            for chunk in chunks {
                for ((weight, product), &value) in weights.iter_mut().zip(&mut products).zip(chunk) {
                    let l = (value - best) * heat;
                    let w = exp(l);
                    *weight += w;
                    // Where nothing is weighed, `l` may be infinite or no number.
                    *product += if w > 0.0 { w * l } else { 0.0 };
                }
            }
            for &value in rest {
                let l = (value - best) * heat;
                let w = exp(l);
                weights[0] += w;
                products[0] += if w > 0.0 { w * l } else { 0.0 };
            }
            total += weights.iter().map(|&lane| f64::from(lane)).sum::<f64>();
            moment += products.iter().map(|&lane| f64::from(lane)).sum::<f64>();
        }
        (total, (moment / total) as f32)
    }
}

wide! {
    /// The sum of the weights whose distance is at most `bar`.
    fn sum_within(weights: &[f32], far: &[f32], bar: f32) -> f64 {
        let mut total = 0.0;
        for (weights, far) in weights.chunks(STRIDE).zip(far.chunks(STRIDE)) {
            let mut lanes = [0.0f32; LANES];
            let ((weights, rest), (far, far_rest)) = (weights.as_chunks::<LANES>(), far.as_chunks::<LANES>());
            for (weights, far) in weights.iter().zip(far) {
                for ((lane, &weight), &far) in lanes.iter_mut().zip(weights).zip(far) {
                    *lane += if far <= bar { weight } else { 0.0 };
                }
            }
            total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
            let near = rest.iter().zip(far_rest).filter(|&(_, &far)| far <= bar);
            total += near.map(|(&weight, _)| f64::from(weight)).sum::<f64>();
        }
        total
    }
}

wide! {
    /// Turns logits into weights `exp((logit - best) * heat)`, those below `least` into 0. Returns their sum.
    fn weigh(row: &mut [f32], best: f32, heat: f32, least: f32) -> f64 {
        let mut total = 0.0;
        for stride in row.chunks_mut(STRIDE) {
            for logit in stride.iter_mut() {
                let weight = exp((*logit - best) * heat);
                *logit = if weight >= least { weight } else { 0.0 };
            }
            total += sum_stride(stride, 0.0);
        }
        total
    }
}

wide! {
    /// All values of at least `bar`, in order of id.
    fn gather(row: &[f32], bar: f32, found: &mut Found) {
        found.ids.resize(row.len(), 0);
        found.values.resize(row.len(), 0.0);
        let mut count = 0;
        for (at, chunk) in row.chunks(LANES).enumerate() {
            // Most chunks have nothing: one vector comparison each.
            if !chunk.iter().fold(false, |any, &value| any | (value >= bar)) {
                continue;
            }
            for (within, &value) in chunk.iter().enumerate() {
                found.ids[count] = (at * LANES + within) as u32;
                found.values[count] = value;
                count += usize::from(value >= bar);
            }
        }
        found.ids.truncate(count);
        found.values.truncate(count);
    }
}

/// One order of addition wherever a stride is summed, so that all totals agree to the bit.
#[inline(always)]
fn sum_stride(stride: &[f32], bar: f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = stride.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += if value >= bar { value } else { 0.0 };
        }
    }
    lanes.iter().chain(rest.iter().filter(|&&value| value >= bar)).map(|&value| f64::from(value)).sum()
}

/// `e^x` for `x <= 0`, to about one unit in the last place; 0 below -87 and for what is no number.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer that lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = x - power * LN2_HIGH - power * LN2_LOW;
    let mut series = 1.0 / 720.0;
    for factor in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * rest + factor;
    }
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127);
    let value = series * f32::from_bits((exponent as u32) << 23);
    if x >= -87.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernel::Pool;
    use crate::model::Vocabulary;
    use crate::task::Dry;

    fn pick(logits: &[f32], sampling: &Sampling, seed: u64, seen: &[u32], logprobs: Option<u32>) -> Drawn {
        let mut data = logits.to_vec();
        let mut past = Seen::new(&[], sampling, &Arc::new(Vocabulary::new(["a", "b", "c", "d", "\n"], vec![])));
        seen.iter().for_each(|&token| past.push(token));
        let past = Mutex::new(past);
        let pool = Pool::new(1);
        let rows = Logits { data: &mut data, vocab: logits.len(), pool: &pool };
        let mut sampler = Sampler::default();
        sampler.pick(rows, |_| {
            Some(Draw { sampling, seed, position: 0, seen: Some(&past), ahead: &[], logprobs, mask: None, given: None })
        });
        sampler.drawn()[0].clone()
    }

    fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    #[test]
    fn penalties_see_drafts_as_if_they_had_been_said() {
        let sampling = Sampling {
            repetition_penalty: 1.3,
            frequency_penalty: 0.7,
            presence_penalty: 0.3,
            temperature: 0.5,
            penalty_last_n: Some(5),
            dry: Some(Dry { multiplier: 1.0, base: 2.0, allowed_length: 1, last_n: None, breakers: vec![] }),
            ..Sampling::default()
        };
        let vocabulary = Arc::new(Vocabulary::new((0..40).map(|token| token.to_string()), vec![]));
        let logits = noise(40, 4.0, 9);
        for cut in 0..=6 {
            let said = [3, 5, 3, 7, 5, 9];
            let mut past = Seen::new(&[5, 11], &sampling, &vocabulary);
            said[..cut].iter().for_each(|&token| past.push(token));
            let past = Mutex::new(past);
            let mut row = logits.clone();
            let draw = Draw {
                sampling: &sampling,
                seed: 1,
                position: 6,
                seen: Some(&past),
                ahead: &said[cut..],
                logprobs: None,
                mask: None,
                given: None,
            };
            shape(&mut row, &draw);
            let mut all = Seen::new(&[5, 11], &sampling, &vocabulary);
            said.iter().for_each(|&token| all.push(token));
            let all = Mutex::new(all);
            let mut expected = logits.clone();
            shape(&mut expected, &Draw { seen: Some(&all), ahead: &[], ..draw });
            assert_eq!(row, expected, "{cut} of the tokens were said, the others are drafts");
            assert_ne!(row, logits);
        }
    }

    /// Values without pattern in `-spread..spread`.
    fn noise(count: usize, spread: f32, seed: u64) -> Vec<f32> {
        (0..count as u64).map(|at| (uniform(seed, at) as f32 * 2.0 - 1.0) * spread).collect()
    }

    /// What the distribution should be, computed the slow way.
    fn expected(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let best = f64::from(logits[order[0]]);
        let weight = |id: usize| ((f64::from(logits[id]) - best) / f64::from(sampling.temperature)).exp();
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k as usize);
        }
        if sampling.typical_p < 1.0 {
            let total: f64 = order.iter().map(|&id| weight(id)).sum();
            let chance = |id: usize| weight(id) / total;
            let entropy: f64 = -order.iter().map(|&id| chance(id) * chance(id).ln()).sum::<f64>();
            let surprise = |id: usize| ((-chance(id).ln() - entropy).abs() * 1e5).round() as i64;
            order.sort_by_key(|&id| (surprise(id), id));
            let mut sum = 0.0;
            let enough = |&id: &usize| {
                let before = sum;
                sum += weight(id);
                before == 0.0 || before < f64::from(sampling.typical_p) * total
            };
            order = order.iter().copied().take_while(enough).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        }
        let most = weight(order[0]);
        let total: f64 = order.iter().map(|&id| weight(id)).sum();
        let mut sum = 0.0;
        let within = |&id: &usize| {
            let before = sum;
            sum += weight(id);
            before == 0.0 || before < f64::from(sampling.top_p) * total
        };
        let kept: Vec<usize> = order
            .iter()
            .copied()
            .take_while(within)
            .filter(|&id| weight(id) >= f64::from(sampling.min_p) * most)
            .collect();
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut chances = vec![0.0; logits.len()];
        kept.iter().for_each(|&id| chances[id] = weight(id) / total);
        chances
    }

    /// Draws many times and compares with the slow way.
    fn check(logits: &[f32], sampling: Sampling) {
        draws(logits, &sampling, None, &expected(logits, &sampling));
    }

    /// Nothing outside the kept set, chi-square inside it.
    fn draws(logits: &[f32], sampling: &Sampling, seen: Option<&Mutex<Seen>>, chances: &[f64]) {
        const DRAWS: usize = 10_000;
        let mut counts = vec![0usize; logits.len()];
        let (pool, mut sampler) = (Pool::new(1), Sampler::default());
        for seed in 0..DRAWS as u64 {
            let mut data = logits.to_vec();
            let rows = Logits { data: &mut data, vocab: logits.len(), pool: &pool };
            let (seed, position) = (seed / 7, seed % 7);
            let draw = Draw { sampling, seed, position, seen, ahead: &[], logprobs: None, mask: None, given: None };
            sampler.pick(rows, |_| Some(Draw { ..draw }));
            counts[sampler.drawn()[0].token.unwrap() as usize] += 1;
        }
        let (mut square, mut cells, mut rare, mut rare_chance) = (0.0, 0, 0, 0.0);
        for (&count, &chance) in counts.iter().zip(chances) {
            assert!(chance > 0.0 || count == 0, "drew a token that {sampling:?} leaves out");
            let mean = chance * DRAWS as f64;
            if mean < 8.0 {
                (rare, rare_chance) = (rare + count, rare_chance + chance);
                continue;
            }
            square += (count as f64 - mean).powi(2) / mean;
            cells += 1;
        }
        let mean = rare_chance * DRAWS as f64;
        if mean >= 8.0 {
            square += (rare as f64 - mean).powi(2) / mean;
            cells += 1;
        }
        // Five standard deviations above the mean of a chi-square with that many cells.
        let freedom = (cells as f64 - 1.0).max(1.0);
        assert!(
            square < freedom + 5.0 * (2.0 * freedom).sqrt(),
            "chi-square {square} over {cells} cells for {sampling:?}"
        );
    }

    #[test]
    fn draws_follow_the_distribution_under_every_filter() {
        let plain = Sampling::default();
        for logits in [noise(40, 3.0, 1), noise(1_200, 6.0, 2), vec![0.5; 100]] {
            check(&logits, plain.clone());
            check(&logits, Sampling { temperature: 0.5, ..plain.clone() });
            check(&logits, Sampling { temperature: 2.0, top_k: 7, ..plain.clone() });
            check(&logits, Sampling { top_p: 0.8, ..plain.clone() });
            check(&logits, Sampling { min_p: 0.2, ..plain.clone() });
            check(&logits, Sampling { top_k: 20, top_p: 0.7, min_p: 0.05, temperature: 1.3, ..plain.clone() });
            check(&logits, Sampling { top_p: 0.0, ..plain.clone() });
            check(&logits, Sampling { top_k: 1, ..plain.clone() });
            check(&logits, Sampling { top_k: 1_000_000, top_p: 0.8, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.9, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.3, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.0, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.95, temperature: 0.4, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.5, top_k: 12, ..plain.clone() });
            check(&logits, Sampling { typical_p: 0.7, top_p: 0.8, min_p: 0.3, ..plain.clone() });
            check(
                &logits,
                Sampling { typical_p: 0.6, top_k: 30, top_p: 0.9, min_p: 0.1, temperature: 1.5, ..plain.clone() },
            );
        }
    }

    #[test]
    fn greedy_is_the_best_and_the_lowest_id_on_ties() {
        for (logits, token) in [
            (vec![1.0, 3.0, 2.0, 3.0], Some(1)),
            (vec![f32::NAN, -5.0, f32::NEG_INFINITY], Some(1)),
            (vec![f32::NAN, f32::NEG_INFINITY], None),
            (vec![0.0, f32::INFINITY], Some(1)),
        ] {
            assert_eq!(pick(&logits, &greedy(), 0, &[], None).token, token, "{logits:?}");
        }
        let logits = noise(50_000, 9.0, 3);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert_eq!(pick(&logits, &greedy(), 0, &[], None).token, Some(best as u32));
    }

    #[test]
    fn bias_and_penalties_come_before_the_choice() {
        let choose =
            |sampling: Sampling, seen: &[u32]| pick(&[2.0, 1.9, -1.0], &sampling, 0, seen, None).token.unwrap();
        assert_eq!(choose(greedy(), &[0]), 0);
        assert_eq!(choose(Sampling { logit_bias: vec![(2, 4.0), (99, 9.0)], ..greedy() }, &[]), 2);
        assert_eq!(choose(Sampling { logit_bias: vec![(0, f32::NEG_INFINITY)], ..greedy() }, &[]), 1);
        assert_eq!(choose(Sampling { repetition_penalty: 1.2, ..greedy() }, &[0]), 1);
        assert_eq!(choose(Sampling { presence_penalty: 0.2, ..greedy() }, &[0]), 1);
        assert_eq!(choose(Sampling { presence_penalty: 0.09, ..greedy() }, &[0, 0, 0]), 0, "once however often");
        assert_eq!(choose(Sampling { frequency_penalty: 0.06, ..greedy() }, &[0]), 0);
        assert_eq!(choose(Sampling { frequency_penalty: 0.06, ..greedy() }, &[0, 0]), 1, "once an occurrence");
        assert_eq!(choose(Sampling { frequency_penalty: -1.0, ..greedy() }, &[2, 2, 2, 2]), 2);
    }

    #[test]
    fn penalties_look_at_the_newest_tokens_only_if_asked_to() {
        let choose = |penalty_last_n, seen: &[u32]| {
            let sampling = Sampling { presence_penalty: 0.2, penalty_last_n, ..greedy() };
            pick(&[2.0, 1.9, -1.0], &sampling, 0, seen, None).token.unwrap()
        };
        assert_eq!(choose(None, &[0, 2, 2]), 1);
        assert_eq!(choose(Some(3), &[0, 2, 2]), 1);
        assert_eq!(choose(Some(2), &[0, 2, 2]), 0);
        assert_eq!(choose(Some(0), &[0, 2, 2]), 0);
    }

    #[test]
    fn a_repeat_costs_more_the_longer_it_is() {
        let dry = |multiplier, base| {
            let breakers = vec!["\n".to_owned()];
            let dry = Dry { multiplier, base, allowed_length: 2, last_n: None, breakers };
            Sampling { dry: Some(dry), ..greedy() }
        };
        // After 0 1 2 … 0 1: 2 carries on a repeat of two, which costs the multiplier; of three, times the base.
        let choose =
            |sampling: &Sampling, seen: &[u32]| pick(&[0.0, 0.0, 1.0, 2.5, 0.0], sampling, 0, seen, None).token;
        assert_eq!(choose(&dry(1.4, 2.0), &[0, 1, 3, 2, 0, 1]), Some(3));
        assert_eq!(choose(&dry(1.6, 2.0), &[0, 1, 3, 2, 0, 1]), Some(2));
        assert_eq!(choose(&dry(0.7, 2.0), &[2, 0, 1, 3, 2, 0, 1]), Some(3));
        assert_eq!(choose(&dry(0.8, 2.0), &[2, 0, 1, 3, 2, 0, 1]), Some(2));
        assert_eq!(choose(&dry(9.0, 2.0), &[0, 1, 3, 2, 0, 4, 1]), Some(3), "a line feed lies between");
        let everything: Vec<u32> = [[0, 1]; 200].concat();
        assert_eq!(pick(&[1.0, 0.0], &dry(1.0, 16.0), 0, &everything, None).token, Some(1), "16^398 is no number");
    }

    /// What the logits become, in f64 and with every token counted at every step.
    #[test]
    fn the_distribution_under_all_penalties_is_that_of_a_plain_count() {
        let sampling = Sampling {
            repetition_penalty: 1.3,
            frequency_penalty: 0.3,
            presence_penalty: 0.4,
            penalty_last_n: Some(6),
            logit_bias: vec![(3, 1.5), (1, -0.5)],
            dry: Some(Dry { multiplier: 0.5, base: 1.5, allowed_length: 1, last_n: None, breakers: vec![] }),
            temperature: 0.8,
            ..Sampling::default()
        };
        let (logits, prompt, answer) = (noise(12, 2.0, 8), [1, 2, 3, 4, 5, 3], [7, 1, 2, 7, 2]);
        let mut shaped = logits.clone();
        shaped[3] += 1.5;
        shaped[1] -= 0.5;
        // The newest six: 3 | 7 1 2 7 2; and 2 was followed by 3 and by 7 after a repeat of one.
        for token in [3, 7, 1, 2] {
            shaped[token] *= if shaped[token] > 0.0 { 1.0 / 1.3 } else { 1.3 };
        }
        for (token, times) in [(7, 2.0), (1, 1.0), (2, 2.0)] {
            shaped[token] -= 0.3 * times + 0.4;
        }
        shaped[3] -= 0.5;
        shaped[7] -= 0.5;
        let vocabulary = Arc::new(Vocabulary::new((0..12).map(|_| "x"), vec![]));
        let mut seen = Seen::new(&prompt, &sampling, &vocabulary);
        answer.into_iter().for_each(|token| seen.push(token));
        let seen = Mutex::new(seen);
        let mut row = logits.clone();
        let draw = Draw {
            sampling: &sampling,
            seed: 0,
            position: 0,
            seen: Some(&seen),
            ahead: &[],
            logprobs: None,
            mask: None,
            given: None,
        };
        shape(&mut row, &draw);
        for (ours, theirs) in row.iter().zip(&shaped) {
            assert!((ours - theirs).abs() < 1e-5, "{row:?} is not {shaped:?}");
        }
        draws(&logits, &sampling, Some(&seen), &expected(&shaped, &sampling));
    }

    #[test]
    fn log_probabilities_are_those_of_the_unchanged_logits() {
        let logits = [1.0f32, 2.0, 4.0, 3.0];
        let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let sampling = Sampling { logit_bias: vec![(0, 100.0)], ..greedy() };
        let drawn = pick(&logits, &sampling, 0, &[], Some(2));
        assert_eq!(drawn.token, Some(0));
        assert!((f64::from(drawn.logprob) - (1.0 - total)).abs() < 1e-6);
        assert_eq!(drawn.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [2, 3]);
        assert!((f64::from(drawn.top[0].1) - (4.0 - total)).abs() < 1e-6);
        assert!(pick(&logits, &sampling, 0, &[], None).top.is_empty());
        let sampled = Sampling { temperature: 0.7, top_p: 0.5, ..Sampling::default() };
        let drawn = pick(&logits, &sampled, 0, &[], Some(0));
        assert!((f64::from(drawn.logprob) - (f64::from(logits[drawn.token.unwrap() as usize]) - total)).abs() < 1e-6);
    }

    #[test]
    fn a_given_token_has_the_log_probability_and_rank_of_the_unchanged_logits() {
        let logits = noise(3_000, 5.0, 4);
        let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let sampling = Sampling { logit_bias: vec![(7, 100.0)], temperature: 0.1, ..Sampling::default() };
        let pool = Pool::new(1);
        for token in [0, 7, 1_500, 2_999] {
            let mut data = logits.clone();
            let mut sampler = Sampler::default();
            let rows = Logits { data: &mut data, vocab: logits.len(), pool: &pool };
            let draw = || Draw {
                sampling: &sampling,
                seed: 0,
                position: 0,
                seen: None,
                ahead: &[],
                logprobs: Some(2),
                mask: None,
                given: Some(token),
            };
            sampler.pick(rows, |_| Some(draw()));
            let (drawn, logit) = (&sampler.drawn()[0], logits[token as usize]);
            assert_eq!((drawn.token, drawn.top.len()), (Some(token), 2));
            assert!((f64::from(drawn.logprob) - (f64::from(logit) - total)).abs() < 1e-5);
            assert_eq!(drawn.rank as usize, 1 + logits.iter().filter(|&&other| other > logit).count());
        }
    }

    #[test]
    fn the_best_k_are_exact_for_every_k() {
        let logits = noise(5_000, 4.0, 5);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        for count in [0, 1, 2, 20, 64, 77, 78, 79, 500, 4_999, 5_000, 9_000] {
            let mut scratch = Scratch::default();
            find_best(&logits, count, &mut scratch);
            let mut best = order[..count.min(order.len())].to_vec();
            best.sort();
            assert_eq!(scratch.found.ids, best, "{count}");
        }
    }

    #[test]
    fn a_row_is_drawn_the_same_in_any_company_on_any_thread() {
        let rows: Vec<Vec<f32>> = (0..9).map(|row| noise(700, 5.0, row)).collect();
        let sampling = Sampling { top_p: 0.95, ..Sampling::default() };
        let alone: Vec<_> =
            rows.iter().enumerate().map(|(row, logits)| pick(logits, &sampling, row as u64, &[], Some(3))).collect();
        for threads in [1, 3] {
            let mut data = rows.concat();
            let pool = Pool::new(threads);
            let all = Logits { data: &mut data, vocab: 700, pool: &pool };
            let mut sampler = Sampler::default();
            sampler.pick(all, |row| {
                let seed = row as u64;
                Some(Draw {
                    sampling: &sampling,
                    seed,
                    position: 0,
                    seen: None,
                    ahead: &[],
                    logprobs: Some(3),
                    mask: None,
                    given: None,
                })
            });
            assert_eq!(sampler.drawn(), alone);
        }
    }

    #[test]
    fn a_banned_token_is_never_drawn() {
        let sampling = Sampling { temperature: 5.0, logit_bias: vec![(0, f32::NEG_INFINITY)], ..Sampling::default() };
        assert!((0..2_000).all(|seed| pick(&[9.0, 0.0, f32::NAN], &sampling, seed, &[], None).token == Some(1)));
    }

    #[test]
    fn exp_is_right_to_the_last_digits() {
        for step in 0..870_000 {
            let x = -(step as f32) / 10_000.0;
            let (ours, theirs) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / theirs - 1.0).abs() < 4e-7, "exp({x}) = {ours}, not {theirs}");
        }
        assert_eq!([exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::NAN)], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn random_numbers_of_neighbouring_seeds_and_positions_are_not_related() {
        let numbers: Vec<f64> =
            (0..100).flat_map(|seed| (0..100).map(move |position| uniform(seed, position))).collect();
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let product =
            numbers.windows(2).map(|pair| (pair[0] - 0.5) * (pair[1] - 0.5)).sum::<f64>() / numbers.len() as f64;
        let across =
            numbers.windows(101).map(|pair| (pair[0] - 0.5) * (pair[100] - 0.5)).sum::<f64>() / numbers.len() as f64;
        assert!(
            (mean - 0.5).abs() < 0.02 && product.abs() < 0.004 && across.abs() < 0.004,
            "{mean} {product} {across}"
        );
    }
}
