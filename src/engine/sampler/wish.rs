//! What a GPU is told of how a step's rows are drawn.

use crate::engine::sampler::Draw;
use crate::engine::seen::Counted;
use crate::kernel::gpu::{Edit, UNWANTED, Wish};

/// Wishes of a step, row by row. Kept from step to step.
#[derive(Default)]
pub(super) struct Wishes {
    /// One a row.
    pub(super) rows: Vec<Wish>,
    /// Changes of single logits, each of another token within a row.
    pub(super) edits: Vec<Edit>,
    /// Rows with masks.
    pub(super) masked: Vec<usize>,
    /// Rows that want what the kernel does not do: rivals, typical sampling, a penalty on repeats.
    pub(super) others: Vec<usize>,
}

impl Wishes {
    /// Whether the GPU draws any row.
    pub(super) fn any(&self) -> bool {
        self.rows.iter().any(|wish| wish.given != UNWANTED)
    }

    /// Notes the wishes of all rows, with at most `most_edits` edits; rows that have no room for theirs are others.
    pub(super) fn write<'a>(&mut self, draws: impl Iterator<Item = Option<Draw<'a>>>, most_edits: usize) {
        self.rows.clear();
        self.edits.clear();
        self.masked.clear();
        self.others.clear();
        for (row, draw) in draws.enumerate() {
            let first = self.edits.len();
            let mut wish = Wish { given: UNWANTED, ..Wish::default() };
            if let Some(draw) = draw {
                if suits(&draw) {
                    wish = self.wish(&draw, first);
                    if draw.given.is_none() && draw.mask.is_some() {
                        self.masked.push(row);
                    }
                }
                if wish.given == UNWANTED || self.edits.len() > most_edits {
                    self.edits.truncate(first);
                    self.masked.pop_if(|masked| *masked == row);
                    self.others.push(row);
                    wish.given = UNWANTED;
                }
            }
            self.rows.push(wish);
        }
    }

    fn wish(&mut self, draw: &Draw<'_>, first: usize) -> Wish {
        let sampling = draw.sampling;
        if let Some(given) = draw.given {
            return Wish { given: i32::try_from(given).unwrap_or(i32::MAX), logprob: 1, ..Wish::default() };
        }
        for &(token, bias) in &sampling.logit_bias {
            self.add(first, token, |edit| edit.bias += bias);
        }
        let biased = self.edits.len();
        if let Some(seen) = draw.seen {
            seen.lock().behind(draw.ahead, |seen| {
                for &Counted { token, answered, .. } in seen.counted() {
                    // Counted once each, so only biases can be of the same token.
                    let count = |edit: &mut Edit| (edit.answered, edit.seen) = (answered as i32, 1);
                    match self.edits[first..biased].iter_mut().find(|edit| edit.token == token as i32) {
                        Some(edit) => count(edit),
                        None => {
                            let mut edit = none(token);
                            count(&mut edit);
                            self.edits.push(edit);
                        }
                    }
                }
            });
        }
        Wish {
            seed: draw.seed,
            position: draw.position,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            top_k: i32::try_from(sampling.top_k).unwrap_or(i32::MAX),
            first_edit: first as i32,
            edits: (self.edits.len() - first) as i32,
            masked: i32::from(draw.mask.is_some()),
            logprob: i32::from(draw.logprobs.is_some()),
            given: -1,
        }
    }

    fn add(&mut self, first: usize, token: u32, change: impl FnOnce(&mut Edit)) {
        match self.edits[first..].iter_mut().find(|edit| edit.token == token as i32) {
            Some(edit) => change(edit),
            None => {
                let mut edit = none(token);
                change(&mut edit);
                self.edits.push(edit);
            }
        }
    }
}

/// Whether the kernel does all that is wanted.
fn suits(draw: &Draw<'_>) -> bool {
    let rivals = draw.logprobs.is_some_and(|rivals| rivals > 0);
    let looks_up = draw.given.is_some();
    !rivals && (looks_up || draw.sampling.typical_p >= 1.0 && draw.sampling.dry.is_none())
}

fn none(token: u32) -> Edit {
    Edit { token: i32::try_from(token).unwrap_or(i32::MAX), bias: 0.0, answered: 0, seen: 0 }
}

#[cfg(test)]
#[cfg(feature = "emulate")]
#[path = "wish_test.rs"]
mod tests;
