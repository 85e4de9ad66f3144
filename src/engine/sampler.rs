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
//! Here a step's rows are handed to threads and each row takes its way; `penalty.rs` shapes logits, `filter.rs` chooses
//! among them, `passes.rs` is the arithmetic of both. Logits on a GPU are drawn there, as `wish.rs` tells it, but for rows that
//! want what its kernel does not do.

mod filter;
mod passes;
mod penalty;
mod wish;

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::base::Result;
use crate::engine::Logits;
use crate::engine::seen::Seen;
use crate::kernel::Pool;
use crate::model::GpuLogits;
use crate::task::Sampling;
use filter::{Scratch, choose, find_best};
use passes::{Found, count_above, keep_allowed, max, sum_exp};
use penalty::shape;
use wish::Wishes;

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

/// Draws the tokens of a step. Keeps its work memory from step to step.
#[derive(Default)]
pub struct Sampler {
    scratch: Vec<Mutex<Scratch>>,
    drawn: Vec<Drawn>,
    rows: usize,
    wishes: Wishes,
}

impl Sampler {
    /// The results of the last [`Sampler::pick`], one a row.
    pub fn drawn(&self) -> &[Drawn] {
        &self.drawn[..self.rows]
    }

    /// One token for each row of `logits`; `draw(row)` says how, `None` that nobody wants it. Changes the logits.
    ///
    /// # Errors
    /// The device's whose logits they are.
    pub fn pick<'a>(&mut self, logits: Logits<'_>, draw: impl Fn(usize) -> Option<Draw<'a>> + Sync) -> Result<()> {
        self.rows = logits.rows();
        self.drawn.resize_with(self.rows.max(self.drawn.len()), Drawn::default);
        match logits {
            Logits::Host { data, vocab, pool } => {
                self.pick_rows(data, vocab, pool, None, draw);
                Ok(())
            }
            Logits::Gpu(logits) => self.pick_on_gpu(logits, draw),
        }
    }

    fn pick_on_gpu<'a>(
        &mut self,
        mut logits: GpuLogits<'_>,
        draw: impl Fn(usize) -> Option<Draw<'a>> + Sync,
    ) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let mut wishes = std::mem::take(&mut self.wishes);
        wishes.write((0..self.rows).map(&draw), logits.most_edits());
        if wishes.any() {
            let masks = wishes.masked.iter().filter_map(|&row| Some((row, draw(row)?.mask?)));
            let found = logits.draw(&wishes.rows, &wishes.edits, masks)?;
            for (drawn, found) in self.drawn.iter_mut().zip(found) {
                drawn.token = u32::try_from(found.token).ok();
                (drawn.logprob, drawn.rank) = (found.logprob, found.rank.unsigned_abs());
                drawn.top.clear();
            }
        } else {
            self.drawn[..self.rows].iter_mut().for_each(|drawn| drawn.token = None);
        }
        if !wishes.others.is_empty() {
            let vocab = logits.vocab();
            let (data, pool) = logits.land(&wishes.others)?;
            self.pick_rows(data, vocab, pool, Some(&wishes.others), draw);
        }
        self.wishes = wishes;
        Ok(())
    }

    /// The rows in `data` are those of the step, or those that are named.
    fn pick_rows<'a>(
        &mut self,
        data: &mut [f32],
        vocab: usize,
        pool: &Pool,
        named: Option<&[usize]>,
        draw: impl Fn(usize) -> Option<Draw<'a>> + Sync,
    ) {
        let vocab = vocab.max(1);
        let count = data.len() / vocab;
        self.scratch.resize_with(pool.threads().max(self.scratch.len()), Mutex::default);
        let data = Rows { first: data.as_mut_ptr(), length: vocab, rows: count };
        let out = Rows { first: self.drawn.as_mut_ptr(), length: 1, rows: self.rows };
        let (next, scratch) = (AtomicUsize::new(0), &self.scratch);
        let work = |thread: usize| {
            let mut scratch = scratch[thread].lock();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    return;
                }
                let row = named.map_or(at, |named| named[at]);
                // SAFETY: the counter gives each row to one thread, no row is named twice, and both slices live until all is done.
                let (values, drawn) = unsafe { (data.get(at), &mut out.get(row)[0]) };
                match draw(row) {
                    Some(draw) => pick_row(values, &draw, &mut scratch, drawn),
                    None => drawn.token = None,
                }
            }
        };
        if count > 1 {
            pool.run(work);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernel::Pool;
    use crate::model::Vocabulary;

    pub(super) fn pick(logits: &[f32], sampling: &Sampling, seed: u64, seen: &[u32], logprobs: Option<u32>) -> Drawn {
        let mut data = logits.to_vec();
        let mut past = Seen::new(&[], sampling, &Arc::new(Vocabulary::new(["a", "b", "c", "d", "\n"], vec![])));
        seen.iter().for_each(|&token| past.push(token));
        let past = Mutex::new(past);
        let pool = Pool::new(1);
        let rows = Logits::Host { data: &mut data, vocab: logits.len(), pool: &pool };
        let mut sampler = Sampler::default();
        let how =
            || Draw { sampling, seed, position: 0, seen: Some(&past), ahead: &[], logprobs, mask: None, given: None };
        sampler.pick(rows, |_| Some(how())).unwrap();
        sampler.drawn()[0].clone()
    }

    pub(super) fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Values without pattern in `-spread..spread`.
    pub(super) fn noise(count: usize, spread: f32, seed: u64) -> Vec<f32> {
        (0..count as u64).map(|at| (filter::uniform(seed, at) as f32 * 2.0 - 1.0) * spread).collect()
    }

    /// What the distribution should be, computed the slow way.
    pub(super) fn expected(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
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

    /// Nothing outside the kept set, chi-square inside it.
    pub(super) fn draws(logits: &[f32], sampling: &Sampling, seen: Option<&Mutex<Seen>>, chances: &[f64]) {
        const DRAWS: usize = 10_000;
        let mut counts = vec![0usize; logits.len()];
        let (pool, mut sampler) = (Pool::new(1), Sampler::default());
        for seed in 0..DRAWS as u64 {
            let mut data = logits.to_vec();
            let rows = Logits::Host { data: &mut data, vocab: logits.len(), pool: &pool };
            let (seed, position) = (seed / 7, seed % 7);
            let draw = Draw { sampling, seed, position, seen, ahead: &[], logprobs: None, mask: None, given: None };
            sampler.pick(rows, |_| Some(Draw { ..draw })).unwrap();
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
            let rows = Logits::Host { data: &mut data, vocab: logits.len(), pool: &pool };
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
            sampler.pick(rows, |_| Some(draw())).unwrap();
            let (drawn, logit) = (&sampler.drawn()[0], logits[token as usize]);
            assert_eq!((drawn.token, drawn.top.len()), (Some(token), 2));
            assert!((f64::from(drawn.logprob) - (f64::from(logit) - total)).abs() < 1e-5);
            assert_eq!(drawn.rank as usize, 1 + logits.iter().filter(|&&other| other > logit).count());
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
            let all = Logits::Host { data: &mut data, vocab: 700, pool: &pool };
            let mut sampler = Sampler::default();
            let draw = |row: usize| Draw {
                sampling: &sampling,
                seed: row as u64,
                position: 0,
                seen: None,
                ahead: &[],
                logprobs: Some(3),
                mask: None,
                given: None,
            };
            sampler.pick(all, |row| Some(draw(row))).unwrap();
            assert_eq!(sampler.drawn(), alone);
        }
    }

    #[test]
    fn a_banned_token_is_never_drawn() {
        let sampling = Sampling { temperature: 5.0, logit_bias: vec![(0, f32::NEG_INFINITY)], ..Sampling::default() };
        assert!((0..2_000).all(|seed| pick(&[9.0, 0.0, f32::NAN], &sampling, seed, &[], None).token == Some(1)));
    }
}
