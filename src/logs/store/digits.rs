//! Digits that are looked for in ids. At which bits they may be is worked out once for all rows, so a row takes some
//! twenty comparisons of a word and no shift.

/// See the top of this file.
pub(super) struct Digits {
    /// Mask and value of each place that lies in the lower half of an id, in the upper one, and in both.
    low: Vec<(u64, u64)>,
    high: Vec<(u64, u64)>,
    across: Vec<(u128, u128)>,
}

impl Digits {
    /// Of a part of an id: its number, and how many digits it has.
    pub(super) fn of((part, digits): (u128, u32)) -> Self {
        let mut found = Self { low: Vec::new(), high: Vec::new(), across: Vec::new() };
        if digits >= 26 {
            found.across.push((u128::MAX, part));
            return found;
        }
        for shift in (0..=26 - digits).map(|place| 5 * place) {
            let (mask, value) = (((1u128 << (5 * digits)) - 1) << shift, part << shift);
            // The first digit of an id has three bits.
            if value >> shift != part {
                continue;
            }
            match (mask as u64, (mask >> 64) as u64) {
                (low, 0) => found.low.push((low, value as u64)),
                (0, high) => found.high.push((high, (value >> 64) as u64)),
                _ => found.across.push((mask, value)),
            }
        }
        found
    }

    /// Whether an id has them somewhere.
    pub(super) fn are_in(&self, id: u128) -> bool {
        let (low, high) = (id as u64, (id >> 64) as u64);
        // No early end: it would be guessed wrong more often than it saves a comparison.
        let in_low = self.low.iter().fold(false, |has, (mask, value)| has | ((low & mask) == *value));
        let in_high = self.high.iter().fold(in_low, |has, (mask, value)| has | ((high & mask) == *value));
        self.across.iter().fold(in_high, |has, (mask, value)| has | ((id & mask) == *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::LogId;
    use crate::logs::query::part_of_id;

    #[test]
    fn digits_are_found_wherever_an_id_has_them_and_nowhere_else() {
        let ids = ["01KB4QRSTV0123456789ABCDEF", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", "00000000000000000000000000"];
        for text in ids {
            let id = LogId::parse(text).unwrap().number();
            for begin in 0..26 {
                for end in begin + 1..=26 {
                    let part = &text[begin..end];
                    assert!(Digits::of(part_of_id(part).unwrap()).are_in(id), "{part} in {text}");
                    for other in ids.into_iter().filter(|other| !other.contains(part)) {
                        let other = LogId::parse(other).unwrap().number();
                        assert!(!Digits::of(part_of_id(part).unwrap()).are_in(other), "{part} of {text}");
                    }
                }
            }
        }
        // Eight at the front is more than an id begins with.
        assert!(!Digits::of(part_of_id("8").unwrap()).are_in(LogId::parse(ids[2]).unwrap().number()));
    }
}
