//! A smaller model that guesses what the target says next.
//!
//! ```text
//! pass 1   [known tokens it has not seen] [same] ..   one batch over all sequences  ──draw──> d1 d1 ..
//! pass 2   [d1] [d1] ..                                                             ──draw──> d2 d2 ..
//! target   [last known, d1, d2] ..                    verifies them in one step
//! ```
//!
//! Its KV pool has the target's block ids and tables ([`mirror`](crate::engine::mirror)). It draws with the caller's wishes
//! and with the random number of the place that a draft is for, as the target will: where both think alike they draw alike,
//! at any temperature. It knows nothing of grammars and adapters, which only costs drafts.

use std::time::Instant;

use crate::base::{Error, Result};
use crate::engine::Runner;
use crate::engine::answer::Answer;
use crate::engine::pace::Load;
use crate::engine::sampler::{Draw, Sampler};
use crate::engine::scheduler::{Chain, Plan};
use crate::model::Batch;

/// A draft model at work.
pub(super) struct Drafter {
    runner: Box<dyn Runner>,
    sampler: Sampler,
    /// Chains that the pass under way goes on with.
    riders: Vec<Chain>,
    /// A row for each of them.
    batch: Batch,
}

impl Drafter {
    /// `runner` has the target's vocabulary, and as many blocks of the same size.
    pub(super) fn new(runner: Box<dyn Runner>) -> Self {
        Self { runner, sampler: Sampler::default(), riders: Vec::new(), batch: Batch::default() }
    }

    /// Makes a block hold what another holds.
    pub(super) fn copy(&mut self, from: u32, to: u32) {
        self.runner.copy(from, to);
    }

    /// Computes what a plan wants to be caught up, makes its drafts, and notes how long that took by `clock`.
    ///
    /// # Errors
    /// The runner's: the device cannot be trusted any more.
    pub(super) fn draft(
        &mut self,
        plan: &mut Plan,
        answers: &[Option<Answer>],
        clock: &dyn Fn() -> Instant,
    ) -> Result<()> {
        let mut load = Load::default();
        for span in &plan.catch_up.spans {
            match span.rows as usize {
                1 => load.decodes(1, span.start as usize),
                rows => load.reads(rows, span.start as usize),
            }
        }
        self.riders.clear();
        self.riders.extend_from_slice(&plan.chains);
        if load != Load::default() {
            self.pass(None, load, 0, plan, answers, clock)?;
        }
        for made in 1.. {
            self.riders.retain(|chain| chain.drafts > made);
            if self.riders.is_empty() {
                break;
            }
            let (mut load, mut batch) = (Load::default(), std::mem::take(&mut self.batch));
            batch.clear();
            for chain in &self.riders {
                let at = plan.batch.sample_rows[chain.sampled] as usize + made;
                let (token, position) = (plan.batch.tokens[at], plan.batch.positions[at]);
                batch.push(&[token], position, plan.batch.table(&plan.batch.spans[chain.part]), [0]);
                load.decodes(1, position as usize);
            }
            let passed = self.pass(Some(&batch), load, made, plan, answers, clock);
            self.batch = batch;
            passed?;
        }
        Ok(())
    }

    /// One pass over `batch`, or what the plan wants caught up, after which each rider has a draft behind the `made` before.
    fn pass(
        &mut self,
        batch: Option<&Batch>,
        load: Load,
        made: usize,
        plan: &mut Plan,
        answers: &[Option<Answer>],
        clock: &dyn Fn() -> Instant,
    ) -> Result<()> {
        let begun = clock();
        let logits = self.runner.forward(batch.unwrap_or(&plan.catch_up), &mut || ())?;
        if logits.rows() != self.riders.len() {
            return Err(Error::internal("the draft model returned another number of rows than were asked for"));
        }
        self.sampler.pick(logits, |row| {
            let Chain { part, sampled, .. } = self.riders[row];
            let part = plan.parts[part];
            let draw = answers[part.request as usize].as_ref()?.draw(part.choice, plan.ahead(sampled + made));
            Some(Draw { mask: None, logprobs: None, ..draw })
        })?;
        for (chain, drawn) in self.riders.iter().zip(self.sampler.drawn()) {
            let at = plan.batch.sample_rows[chain.sampled] as usize + 1 + made;
            // Without a number among the logits any draft is as good as another.
            plan.batch.tokens[at] = drawn.token.unwrap_or(0);
        }
        plan.passes.push((load, clock().saturating_duration_since(begun)));
        Ok(())
    }
}
