//! Passes over a whole row, or over what was gathered from one: plain loops over fixed lanes that the compiler vectorises.
//!
//! Each is compiled twice and gives the same bits on every machine. Whatever is summed is summed in one order, so that
//! totals of the same values agree.

/// Values whose sum is taken together.
pub(super) const STRIDE: usize = 1024;
const LANES: usize = 16;

/// Tokens taken out of a row, always in order of id, so that nothing depends on how they were selected.
#[derive(Default)]
pub(super) struct Found {
    pub(super) ids: Vec<u32>,
    pub(super) values: Vec<f32>,
}

impl Found {
    /// Keeps the values above `bar`, and the first `ties` of those that equal it.
    pub(super) fn keep(&mut self, bar: f32, mut ties: usize) {
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

/// Compiles a function twice, once for AVX2, and calls what the machine can run. Both give the same bits: the lanes are
/// fixed, and nothing is fused.
macro_rules! wide {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) $(-> $out)? {
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
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_digits() {
        for step in 0..870_000 {
            let x = -(step as f32) / 10_000.0;
            let (ours, theirs) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / theirs - 1.0).abs() < 4e-7, "exp({x}) = {ours}, not {theirs}");
        }
        assert_eq!([exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::NAN)], [1.0, 0.0, 0.0, 0.0]);
    }
}
