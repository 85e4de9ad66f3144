//! From logits to one token: temperature, the filters, and the draw among what they leave.
//!
//! ```text
//! temperature 0 ──> the best, lowest id first
//! temperature ─ top-k ─ typical ─ top-p ─ min-p ─ draw
//! ```
//!
//! The vocabulary is never sorted. Top-k finds a bar that at least k values reach from the maxima of small chunks and
//! selects among the few above it; top-p and typical drop what is too unlikely to matter by one comparison a token and
//! find their bar by halving among the rest.

use super::Draw;
use super::passes::{Found, STRIDE, gather, max, spread, sum_from, sum_within, weigh};

/// Values whose maximum is taken together in the search for the best k.
const CHUNK: usize = 64;

/// Work memory of a thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// The row as it came, where it is asked about later.
    pub(super) raw: Vec<f32>,
    maxima: Vec<f32>,
    order: Vec<f32>,
    /// What is left of the row.
    pub(super) found: Found,
}

/// The token of a row whose logits have their final shape. Changes them.
pub(super) fn choose(row: &mut [f32], draw: &Draw<'_>, scratch: &mut Scratch) -> Option<u32> {
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
pub(super) fn find_best(row: &[f32], count: usize, scratch: &mut Scratch) {
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
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
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

#[cfg(test)]
mod tests {
    use super::super::tests::{draws, expected, greedy, noise, pick};
    use super::*;
    use crate::task::Sampling;

    /// Draws many times and compares with the slow way.
    fn check(logits: &[f32], sampling: Sampling) {
        draws(logits, &sampling, None, &expected(logits, &sampling));
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
