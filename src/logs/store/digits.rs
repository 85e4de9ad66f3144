//! Digits that are looked for in ids.
//!
//! At which bits they may be is worked out once for all rows. An id is two words, and a place lies in one of them or in both. Places are
//! gone through for many rows at a time, in plain loops that the compiler makes vectors of, once for each of several instruction sets.

/// Rows that are looked at together: what is kept of them fits into the registers of AVX-512.
const ROWS: usize = 64;

/// Which bits of a word count, and what they must be.
type Place = (u64, u64);

/// See the top of this file.
pub(super) struct Digits {
    /// Each place that lies in the lower half of an id, in the upper one, and in both.
    low: Vec<Place>,
    high: Vec<Place>,
    across: Vec<(Place, Place)>,
}

impl Digits {
    /// Of a part of an id: its number, and how many digits it has.
    pub(super) fn of((part, digits): (u128, u32)) -> Self {
        let mut found = Self { low: Vec::new(), high: Vec::new(), across: Vec::new() };
        let bits = if digits < 26 { (1 << (5 * digits)) - 1 } else { u128::MAX };
        for shift in (0..=26u32.saturating_sub(digits)).map(|place| 5 * place) {
            let (mask, value) = (bits << shift, part << shift);
            // The first digit of an id has three bits.
            if value >> shift != part {
                continue;
            }
            let (low, high) = ((mask as u64, value as u64), ((mask >> 64) as u64, (value >> 64) as u64));
            match (low.0, high.0) {
                (_, 0) => found.low.push(low),
                (0, _) => found.high.push(high),
                _ => found.across.push((low, high)),
            }
        }
        found
    }

    /// Marks the ids that have them somewhere; what is marked already stays so.
    pub(super) fn mark(&self, ids: &[u128], hits: &mut [bool]) {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                // SAFETY: the machine has it.
                return unsafe { self.mark_avx512(ids, hits) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                return unsafe { self.mark_avx2(ids, hits) };
            }
        }
        self.mark_plain(ids, hits);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn mark_avx512(&self, ids: &[u128], hits: &mut [bool]) {
        self.mark_plain(ids, hits);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn mark_avx2(&self, ids: &[u128], hits: &mut [bool]) {
        self.mark_plain(ids, hits);
    }

    /// Loops and no closures around what takes time: closures are not compiled for the instruction set of whoever calls this.
    #[inline(always)]
    fn mark_plain(&self, ids: &[u128], hits: &mut [bool]) {
        let (whole, rest) = ids.as_chunks();
        let (marks, last) = hits.as_chunks_mut();
        for (ids, hits) in whole.iter().zip(marks) {
            self.mark_rows(ids, hits);
        }
        let (mut ids, mut hits) = ([0; ROWS], [false; ROWS]);
        ids[..rest.len()].copy_from_slice(rest);
        self.mark_rows(&ids, &mut hits);
        last.iter_mut().zip(hits).for_each(|(mark, hit)| *mark |= hit);
    }

    /// No early end: it would be guessed wrong more often than it saves a comparison.
    #[inline(always)]
    fn mark_rows(&self, ids: &[u128; ROWS], hits: &mut [bool; ROWS]) {
        let (mut low, mut high, mut found) = ([0; ROWS], [0; ROWS], [0; ROWS]);
        for row in 0..ROWS {
            (low[row], high[row]) = (ids[row] as u64, (ids[row] >> 64) as u64);
        }
        for place in &self.low {
            for row in 0..ROWS {
                found[row] |= all_if_at(low[row], *place);
            }
        }
        for place in &self.high {
            for row in 0..ROWS {
                found[row] |= all_if_at(high[row], *place);
            }
        }
        for (lower, upper) in &self.across {
            for row in 0..ROWS {
                found[row] |= all_if_at(low[row], *lower) & all_if_at(high[row], *upper);
            }
        }
        for row in 0..ROWS {
            hits[row] |= found[row] != 0;
        }
    }
}

/// All bits where a word has what it must have at a place, none otherwise: as comparisons of vectors answer.
#[inline(always)]
fn all_if_at(word: u64, (mask, value): Place) -> u64 {
    u64::from(word & mask == value).wrapping_neg()
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::base::LogId;
    use crate::logs::query::part_of_id;

    /// Which ids have a part, as every instruction set of this machine says.
    fn marked(part: &str, ids: &[u128]) -> Vec<bool> {
        let digits = Digits::of(part_of_id(part).unwrap());
        let run = |mark: &dyn Fn(&mut [bool])| {
            let mut hits = vec![false; ids.len()];
            mark(&mut hits);
            hits
        };
        let plain = run(&|hits| digits.mark_plain(ids, hits));
        assert_eq!(run(&|hits| digits.mark(ids, hits)), plain, "{part}: as this machine does it");
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the machine has it.
                assert_eq!(run(&|hits| unsafe { digits.mark_avx2(ids, hits) }), plain, "{part}: AVX2");
            }
            if has_avx512() {
                // SAFETY: as above.
                assert_eq!(run(&|hits| unsafe { digits.mark_avx512(ids, hits) }), plain, "{part}: AVX-512");
            }
        }
        plain
    }

    #[test]
    fn digits_are_found_wherever_an_id_has_them_and_nowhere_else() {
        let texts = ["01KB4QRSTV0123456789ABCDEF", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", "00000000000000000000000000"];
        let ids = texts.map(|text| LogId::parse(text).unwrap().number());
        for text in texts {
            for begin in 0..26 {
                for end in begin + 1..=26 {
                    let part = &text[begin..end];
                    assert_eq!(marked(part, &ids), texts.map(|text| text.contains(part)), "{part} of {text}");
                }
            }
        }
        // Eight at the front is more than an id begins with.
        assert_eq!(marked("8", &ids), [true, false, false]);
    }

    proptest! {
        /// Half of the ids have digits 0 and 1 only, so that a part of one is in others too.
        #[test]
        fn rows_are_marked_whose_texts_contain_the_part(
            ids in vec(prop_oneof![any::<u128>(), any::<u128>().prop_map(|id| id & (((1 << 125) - 1) / 31))], 1..300),
            row: prop::sample::Index, begin in 0..26usize, length in 1..=26usize,
        ) {
            let texts: Vec<String> = ids.iter().map(|id| LogId::from_number(*id).to_string()).collect();
            let part = &row.get(&texts)[begin..(begin + length).min(26)];
            let wanted: Vec<bool> = texts.iter().map(|text| text.contains(part)).collect();
            prop_assert_eq!(marked(part, &ids), wanted, "{}", part);
        }
    }

    #[test]
    fn what_is_marked_stays_marked() {
        let mut hits = [true; 3];
        Digits::of(part_of_id("Z").unwrap()).mark(&[0, 31, 0], &mut hits);
        assert_eq!(hits, [true; 3]);
    }
}
