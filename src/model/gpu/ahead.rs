//! The step after the one that is computed, begun before the host has seen the tokens that it begins with.
//!
//! ```text
//! host    forward, draw n ─┬─ tokens of n land ── deliver, plan n + 1 ──┬─ forward: it is there, draw n + 1 ─┬─
//! device  [   step n   ][draw n][            step n + 1            ]  [draw n + 1][         step n + 2
//! ```
//!
//! While answers are only written, the next step is known but for its tokens, and those lie on the device. So it is launched behind the
//! draw, and whoever then asks for it finds it under way; sequences that ended meanwhile are rows that nobody looks at. When something
//! else is asked for, it was for nothing: what it wrote of K and V are places that whoever has them writes before they are read. That
//! costs as much as a step, so it is only done where the next step was of late what it looked to be: `trust` counts that,
//! whether steps are launched ahead or not.

use super::{Batch, GpuDecoder, TIMED_EVERY, bucket};
use crate::base::Result;
use crate::kernel::gpu::{Drawn, LANDING, UNWANTED, Wish, follow};

/// Below it steps are not launched ahead. A step for nothing costs some thirty times what the host takes between two.
const TRUSTED: f32 = 0.97;
/// How fast trust follows.
const LESSON: f32 = 0.02;

/// What is known of the next step.
pub(super) struct Ahead {
    /// The last step's sequences with a row more each, whose tokens come when they have landed. Without rows: nothing is expected.
    batch: Batch,
    /// It is on its way.
    launched: bool,
    /// Share of steps of late that were what was expected.
    pub(super) trust: f32,
    /// Where the rows that are looked at now are among those that were launched; empty: each in its place.
    pub(super) rows: Vec<u32>,
}

impl Default for Ahead {
    fn default() -> Self {
        // Some sixty steps have to be as they looked to be before one is launched ahead.
        Self { batch: Batch::default(), launched: false, trust: 0.9, rows: Vec::new() }
    }
}

impl Ahead {
    /// Expects the step after this one, if it is of one row a sequence and each has a place for one more.
    pub(super) fn expect(&mut self, batch: &Batch, block_tokens: usize) {
        self.batch.clear();
        if !is_decode(batch) {
            return;
        }
        for span in &batch.spans {
            if (span.start as usize + 2).div_ceil(block_tokens) > span.blocks as usize {
                return self.batch.clear();
            }
            self.batch.push(&[0], span.start + 1, batch.table(span), [0]);
        }
    }

    /// The tokens that it begins with.
    pub(super) fn begins_with(&mut self, tokens: impl Iterator<Item = u32>) {
        self.batch.tokens.iter_mut().zip(tokens).for_each(|(to, token)| *to = token);
    }

    /// Whether this step was launched already. Either way it is a lesson.
    pub(super) fn has(&mut self, batch: &Batch, block_tokens: usize) -> bool {
        self.rows.clear();
        let launched = std::mem::take(&mut self.launched);
        if self.batch.rows() == 0 {
            return false;
        }
        let expected = self.holds(batch, block_tokens);
        self.trust += LESSON * (f32::from(expected) - self.trust);
        if !(expected && launched) || self.rows.len() == self.batch.rows() {
            self.rows.clear();
        }
        expected && launched
    }

    /// Whether all sequences of a step are among the expected ones, in their order; notes where.
    fn holds(&mut self, batch: &Batch, block_tokens: usize) -> bool {
        let mut expected = self.batch.spans.iter().enumerate();
        is_decode(batch)
            && batch.spans.iter().all(|span| {
                let blocks = (span.start as usize + 1).div_ceil(block_tokens);
                let found = expected.find(|&(at, other)| {
                    other.start == span.start
                        && self.batch.tokens[at] == batch.tokens[span.row as usize]
                        && self.batch.table(other)[..blocks] == batch.table(span)[..blocks]
                });
                found.is_some_and(|(at, _)| {
                    self.rows.push(at as u32);
                    true
                })
            })
    }

    /// What was launched cannot be used any more.
    pub(super) fn spoil(&mut self) {
        self.launched = false;
    }
}

impl GpuDecoder {
    /// Whether the next step is to be launched behind a draw by these wishes.
    pub(super) fn goes_ahead(&self, wishes: &[Wish]) -> bool {
        let Ahead { batch, trust, rows, .. } = &self.ahead;
        let drawn_here = || wishes.iter().all(|wish| wish.given != UNWANTED);
        batch.rows() > 0
            && batch.rows() == wishes.len()
            && size_of::<Drawn>() * wishes.len() <= LANDING
            && *trust >= TRUSTED
            && rows.is_empty()
            && !(self.steps + 1).is_multiple_of(TIMED_EVERY)
            && self.notes[0][bucket(batch.rows()).1].is_some()
            && drawn_here()
    }

    /// Launches it.
    pub(super) fn go_ahead(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.ahead.batch);
        let (rows, at) = bucket(batch.rows());
        self.tell(&batch, Some(rows))?;
        follow(&*self.card, batch.rows(), self.drawing.drawn, self.step.ids.device)?;
        if let Some(note) = self.notes[0][at] {
            self.card.replay(note)?;
            self.steps += 1;
            self.ahead.launched = true;
        }
        self.ahead.batch = batch;
        Ok(())
    }
}

/// Whether every sequence has one row, which is looked at, and no adapter.
fn is_decode(batch: &Batch) -> bool {
    let rows = batch.rows();
    batch.spans.len() == rows && batch.sample_rows.len() == rows && batch.adapters.is_empty()
}
