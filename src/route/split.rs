//! Which branch of a percentage element a key takes: always the same one, in the shares that were asked for.
//!
//!     key, element --hash with each branch's target--> a draw a branch, heavier branches draw lower --> the lowest wins
//!
//! This is weighted rendezvous hashing. When shares change, keys move to branches that grew and from branches that shrank, and next
//! to none between others; with two branches exactly as many move as must. A branch is known by where it leads, since its name is its share.

/// The branches of one percentage element.
#[derive(Debug)]
pub(super) struct Split {
    branches: Vec<Branch>,
}

#[derive(Debug)]
struct Branch {
    name: Box<str>,
    weight: f64,
    seed: u64,
    target: usize,
}

impl Split {
    /// Branches as name, share, target, and the target's id.
    pub(super) fn new<'b>(element: &str, branches: impl Iterator<Item = (&'b str, f64, usize, &'b str)>) -> Self {
        // Two elements must not divide the same keys in the same way.
        let salt = hash(0, element.as_bytes());
        let mut kept: Vec<Branch> = Vec::new();
        for (name, weight, target, id) in branches {
            match kept.iter_mut().find(|branch| branch.target == target) {
                Some(same) => {
                    same.weight += weight;
                    same.name = format!("{}+{name}", same.name).into();
                }
                None => kept.push(Branch { name: name.into(), weight, seed: hash(salt, id.as_bytes()), target }),
            }
        }
        Self { branches: kept }
    }

    pub(super) fn targets(&self) -> impl Iterator<Item = usize> {
        self.branches.iter().map(|branch| branch.target)
    }

    /// The branch of a key: its name and where it leads.
    pub(super) fn pick(&self, key: u64) -> (&str, usize) {
        let draw = |branch: &Branch| {
            // Uniform in (0, 1], 53 bits; an exponential draw with the weight as its rate.
            let bits = mixed(key ^ branch.seed) >> 11;
            let uniform = (bits + 1) as f64 / (1_u64 << 53) as f64;
            -uniform.ln() / branch.weight
        };
        let mut best: Option<(f64, &Branch)> = None;
        for branch in self.branches.iter().filter(|branch| branch.weight > 0.0) {
            let drawn = draw(branch);
            if best.is_none_or(|(lowest, _)| drawn < lowest) {
                best = Some((drawn, branch));
            }
        }
        // Shares add up to 100, so one of them is above zero.
        best.or(self.branches.first().map(|branch| (0.0, branch)))
            .map_or(("", 0), |(_, branch)| (&branch.name, branch.target))
    }
}

fn hash(seed: u64, bytes: &[u8]) -> u64 {
    mixed(bytes.iter().fold(mixed(seed), |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// The last step of SplitMix64: every bit of the input changes half of the output's.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: u64 = 40_000;

    fn split(shares: &[f64]) -> Split {
        let ids = ["a", "b", "c", "d", "e", "f"];
        Split::new("split", shares.iter().enumerate().map(|(at, share)| (ids[at], *share, at, ids[at])))
    }

    fn picks(split: &Split) -> Vec<usize> {
        (0..KEYS).map(|key| split.pick(key).1).collect()
    }

    fn share(picks: &[usize], wanted: usize) -> f64 {
        picks.iter().filter(|pick| **pick == wanted).count() as f64 / picks.len() as f64 * 100.0
    }

    #[test]
    fn keys_divide_in_the_shares_that_were_asked_for() {
        let check = |shares: &[f64]| {
            let picks = picks(&split(shares));
            for (at, wanted) in shares.iter().enumerate() {
                let got = share(&picks, at);
                // Five standard deviations of as many draws.
                let slack = 5.0 * (wanted * (100.0 - wanted) / KEYS as f64).sqrt();
                assert!((got - wanted).abs() <= slack, "{shares:?}: {got} for {wanted}");
            }
        };
        check(&[10.0, 90.0]);
        check(&[0.0, 100.0]);
        check(&[100.0, 0.0]);
        check(&[33.3, 33.3, 33.4]);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0, 85.0]);
    }

    #[test]
    fn a_changed_share_moves_little_more_than_it_must() {
        let check = |before: &[f64], after: &[f64], most: f64| {
            let (old, new) = (picks(&split(before)), picks(&split(after)));
            let must: f64 = before.iter().zip(after).map(|(a, b)| (b - a).max(0.0)).sum();
            let moved = old.iter().zip(&new).filter(|(a, b)| a != b).count() as f64 / KEYS as f64 * 100.0;
            assert!(moved >= must * 0.9 && moved <= must * most, "{before:?} to {after:?}: {moved} moved, {must} must");
        };
        check(&[10.0, 90.0], &[20.0, 80.0], 1.05);
        check(&[50.0, 50.0], &[0.0, 100.0], 1.05);
        check(&[10.0, 30.0, 60.0], &[20.0, 30.0, 50.0], 1.35);
        check(&[10.0, 10.0, 10.0, 10.0, 10.0, 50.0], &[15.0, 10.0, 10.0, 10.0, 10.0, 45.0], 1.7);
    }

    #[test]
    fn two_elements_divide_the_same_keys_independently() {
        let other = Split::new("other", [("a", 50.0, 0, "a"), ("b", 50.0, 1, "b")].into_iter());
        let (one, two) = (picks(&split(&[50.0, 50.0])), picks(&other));
        let both = one.iter().zip(&two).filter(|(a, b)| **a == 0 && **b == 0).count() as f64 / KEYS as f64;
        assert!((both - 0.25).abs() < 0.02, "{both}");
    }

    #[test]
    fn branches_that_lead_to_one_element_are_one() {
        let split = Split::new("s", [("10%", 10.0, 7, "x"), ("20%", 20.0, 8, "y"), ("else", 70.0, 7, "x")].into_iter());
        let picks = picks(&split);
        assert!((share(&picks, 7) - 80.0).abs() < 1.5);
        assert_eq!(split.targets().collect::<Vec<_>>(), [7, 8]);
    }
}
