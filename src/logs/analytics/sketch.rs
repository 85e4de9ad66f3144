//! Quantiles of durations to within one per cent, in a few hundred bytes.
//!
//!     microseconds ──ln──> bin ──+1──┐
//!     the bins of another sketch ──+─┴──> bins ──> quantile: walk up to its rank, answer with the bin's middle
//!
//! Bin `i` counts values in (γ^(i-1), γ^i], γ = (1 + α) / (1 - α), and answers 2γ^i / (γ + 1), which no value in it is farther
//! from than α. Adding up the bins of two sketches gives the sketch of both, so minutes become hours and days without loss.
//! After C. Masson, J. E. Rim, H. K. Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error
//! Guarantees", PVLDB 12 (2019), <https://arxiv.org/abs/1908.10693>. From 1 us to 19 hours there are 1,250 bins, so none need
//! to be collapsed as in the paper. Encoded, a bin in use takes two or three bytes; calls of one model fill 50 to 250.

use crate::logs::analytics::codec::{put, take};

/// α: an answer is off by at most this share of the exact one.
pub const RELATIVE_ERROR: f64 = 0.01;
/// ln γ.
const LN_GAMMA: f64 = 0.020_000_666_706_669_435;
/// Longer durations count as this long: 19 hours.
const LONGEST_US: u64 = 1 << 36;
/// The last bin that a value can fall into.
const LAST: usize = 1_248;

/// See the top of this file.
#[derive(Clone, PartialEq, Default, Debug)]
pub(super) struct Sketch {
    /// The bin that `counts` begins with.
    first: usize,
    counts: Vec<u64>,
}

impl Sketch {
    /// Counts a duration in microseconds; nothing counts as one.
    pub(super) fn add(&mut self, microseconds: u64) {
        let value = microseconds.clamp(1, LONGEST_US) as f64;
        self.count((value.ln() / LN_GAMMA).ceil() as usize, 1);
    }

    /// The durations, in microseconds, that these shares of all lie below; `None` if nothing was counted.
    pub(super) fn quantiles<const N: usize>(&self, shares: [f64; N]) -> Option<[f64; N]> {
        let total: u64 = self.counts.iter().sum();
        let last = total.checked_sub(1)?;
        Some(shares.map(|share| {
            let rank = (share * last as f64) as u64;
            let mut seen = 0;
            let bin = self.counts.iter().position(|count| {
                seen += count;
                seen > rank
            });
            let bin = self.first + bin.unwrap_or(self.counts.len().saturating_sub(1));
            // 2 / (γ + 1) is 1 - α.
            (1.0 - RELATIVE_ERROR) * (bin as f64 * LN_GAMMA).exp()
        }))
    }

    /// Writes the bins that are in use: how far from the one before, and how many.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let mut before = 0;
        for (index, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            put(out, (self.first + index - before) as u64);
            put(out, *count);
            before = self.first + index;
        }
    }

    /// Adds what another one encoded; `None` if that is none, and then some of it may have been added.
    pub(super) fn merge(&mut self, mut bytes: &[u8]) -> Option<()> {
        let mut bin = 0usize;
        while !bytes.is_empty() {
            bin = bin.checked_add(usize::try_from(take(&mut bytes)?).ok()?).filter(|bin| *bin <= LAST)?;
            self.count(bin, take(&mut bytes)?);
        }
        Some(())
    }

    /// Adds the bins of another one.
    pub(super) fn absorb(&mut self, other: &Self) {
        for (index, count) in other.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            self.count(other.first + index, *count);
        }
    }

    fn count(&mut self, bin: usize, times: u64) {
        if self.counts.is_empty() {
            self.first = bin;
        }
        if bin < self.first {
            self.counts.splice(..0, std::iter::repeat_n(0, self.first - bin));
            self.first = bin;
        }
        let index = bin - self.first;
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        self.counts[index] = self.counts[index].saturating_add(times);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHARES: [f64; 6] = [0.0, 0.5, 0.9, 0.95, 0.99, 1.0];

    fn sketch(values: &[u64]) -> Sketch {
        let mut sketch = Sketch::default();
        values.iter().for_each(|value| sketch.add(*value));
        sketch
    }

    fn encoded(sketch: &Sketch) -> Vec<u8> {
        let mut out = Vec::new();
        sketch.encode(&mut out);
        out
    }

    /// As many small values as large ones.
    fn durations() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec((0u32..36, any::<u64>()).prop_map(|(bits, value)| value % (1 << bits) + 1), 1..400)
    }

    proptest! {
        #[test]
        fn a_quantile_is_within_one_per_cent_of_the_exact_one(mut values in durations()) {
            let answers = sketch(&values).quantiles(SHARES).unwrap();
            values.sort_unstable();
            for (share, answer) in SHARES.into_iter().zip(answers) {
                let exact = values[(share * (values.len() - 1) as f64) as usize] as f64;
                prop_assert!((answer - exact).abs() <= exact * RELATIVE_ERROR * (1.0 + 1e-9), "{share}: {answer}, not {exact}");
            }
        }

        #[test]
        fn merging_is_counting_all_in_one(one in durations(), other in durations()) {
            let all = sketch(&[&one[..], &other[..]].concat());
            let mut merged = sketch(&one);
            merged.merge(&encoded(&sketch(&other))).unwrap();
            let mut absorbed = sketch(&other);
            absorbed.absorb(&sketch(&one));
            prop_assert_eq!(encoded(&merged), encoded(&all));
            prop_assert_eq!(encoded(&absorbed), encoded(&all));
            let mut read = Sketch::default();
            read.merge(&encoded(&all)).unwrap();
            prop_assert_eq!(read, all);
        }

        #[test]
        fn rubbish_is_refused_or_read_and_never_grows_without_bound(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut sketch = Sketch::default();
            let _ = sketch.merge(&bytes);
            prop_assert!(sketch.counts.len() <= LAST + 1);
        }
    }

    #[test]
    fn the_shortest_and_the_longest_have_a_bin_and_an_empty_sketch_has_no_quantile() {
        let ends = sketch(&[0, 1, u64::MAX]);
        assert_eq!((ends.first, ends.counts.len()), (0, LAST + 1));
        let [low, high] = ends.quantiles([0.0, 1.0]).unwrap();
        assert!((low - 1.0).abs() < 0.011 && (high / LONGEST_US as f64 - 1.0).abs() < 0.011, "{low} {high}");
        assert_eq!(Sketch::default().quantiles([0.5]), None);
    }

    #[test]
    fn ten_thousand_calls_from_100_ms_to_10_s_fit_into_a_few_hundred_bytes() {
        let values: Vec<u64> = (0..10_000u64).map(|n| 100_000 + n * n % 9_900_000).collect();
        let length = encoded(&sketch(&values)).len();
        assert!((300..800).contains(&length), "{length}");
    }
}
