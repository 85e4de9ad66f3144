//! Numbers that look random and follow from a seed alone.

/// SplitMix64. Streams of different names are independent, so that one more draw in one place moves nothing elsewhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The stream `name` of a seed.
    pub fn stream(seed: u64, name: u64) -> Self {
        Self(mix(seed ^ mix(name)))
    }

    /// 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Above 0, at most 1.
    pub fn unit(&mut self) -> f64 {
        ((self.draw() >> 11) as f64 + 1.0) / (1u64 << 53) as f64
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.draw()) * bound as u128) >> 64) as usize
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.unit() <= probability
    }

    /// Time to the next event of a Poisson process, given the mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }

    /// Half of the values are below `median`; `sigma` is the spread of their logarithm.
    pub fn lognormal(&mut self, median: f64, sigma: f64) -> f64 {
        let normal = (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        median * (sigma * normal).exp()
    }
}

/// A bijection of 64 bits without visible pattern.
pub fn mix(bits: u64) -> u64 {
    let mut mixed = bits;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_distribution_asked_for() {
        let mut rng = Rng::stream(7, 1);
        let count = 40_000;
        let mean = (0..count).map(|_| rng.exponential(4.0)).sum::<f64>() / f64::from(count);
        assert!((mean - 4.0).abs() < 0.1, "{mean}");
        let below = (0..count).filter(|_| rng.lognormal(100.0, 1.0) < 100.0).count() as f64 / f64::from(count);
        assert!((below - 0.5).abs() < 0.01, "{below}");
        let wide = (0..count).filter(|_| rng.lognormal(100.0, 1.0) < 100.0 * 1f64.exp()).count() as f64;
        assert!((wide / f64::from(count) - 0.841).abs() < 0.01, "{wide}");
        let hits = (0..count).filter(|_| rng.chance(0.2)).count() as f64 / f64::from(count);
        assert!((hits - 0.2).abs() < 0.01 && !rng.chance(0.0), "{hits}");
    }

    #[test]
    fn streams_repeat_and_differ() {
        let first = |seed, name| Rng::stream(seed, name).draw();
        assert_eq!(first(1, 2), first(1, 2));
        assert!(first(1, 2) != first(2, 1) && first(1, 2) != first(1, 3));
    }
}
