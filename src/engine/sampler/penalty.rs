//! What is added to and taken from logits before anything is chosen: the caller's bias, penalties for tokens that were
//! seen, and for those that would go on with a repeat.

use crate::engine::sampler::Draw;
use crate::engine::seen::{Counted, Seen};
use crate::task::Sampling;

/// Bias and penalties, in place.
pub(super) fn shape(row: &mut [f32], draw: &Draw<'_>) {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::tests::{draws, expected, greedy, noise, pick};
    use super::*;
    use crate::model::Vocabulary;
    use crate::task::Dry;

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
}
