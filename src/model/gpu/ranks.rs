//! What is different where a decoder is one rank of several, each on a GPU of its own.
//!
//! ```text
//! embedding   rows of a rank's own words, zeros for all others ── all_reduce ──> x
//! a layer     output, down: a rank's part of the product ── all_reduce ──> delta, which the next norm adds to x, or is normed itself
//! head        columns of a rank's own words ── gather ──> rank 0, which draws
//! ```
//!
//! So x is the same on all ranks, to the bit. Sums are taken in bf16, as they go from card to card.

use std::ops::Range;

use half::bf16;

use super::GpuDecoder;
use crate::base::Result;
use crate::kernel::gpu::{Card, Ptr, put_columns};
use crate::model::shard::{Division, Shard};

/// A rank's place in a group.
pub(in crate::model) struct Seat {
    pub(super) rank: usize,
    pub(super) shard: Shard,
    /// Of each rank.
    pub(super) words: Vec<Range<usize>>,
}

impl Seat {
    /// That of rank number `rank`.
    pub(in crate::model) fn of(division: &Division, rank: usize) -> Self {
        let words = (0..division.ranks()).map(|rank| division.shard(rank).vocab).collect();
        Self { rank, shard: division.shard(rank), words }
    }
}

/// What a rank has beside what every decoder has.
pub(super) struct Ranks {
    pub(super) rank: usize,
    words: Vec<Range<usize>>,
    /// `[rows, hidden]`: what a layer adds, of this rank and then of all.
    pub(super) delta: Ptr<bf16>,
    /// `[sampled rows, hidden]`: the same of the rows whose logits are wanted.
    sampled: Ptr<bf16>,
    /// On rank 0: the columns of the others, `[sampled rows, own columns]` one behind the other.
    gathered: Ptr<f32>,
}

/// Columns that a rank's words take: the head's channels come in eights.
fn columns(words: &Range<usize>) -> usize {
    words.len().next_multiple_of(8)
}

impl Ranks {
    /// For steps of up to `rows` rows, `sample_rows` of them with logits.
    pub(super) fn alloc(
        card: &dyn Card,
        (rank, words): (usize, Vec<Range<usize>>),
        (rows, sample_rows): (usize, usize),
        hidden: usize,
    ) -> Result<Self> {
        let others: usize = words[1..].iter().map(columns).sum();
        Ok(Self {
            rank,
            delta: card.alloc(rows * hidden)?,
            sampled: card.alloc(sample_rows * hidden)?,
            gathered: card.alloc(if rank == 0 { sample_rows * others } else { 0 })?,
            words,
        })
    }

    /// Puts the columns of all ranks into rank 0's logits, whose rows are `stride` long; the others' have their own alone.
    fn gather(&self, card: &dyn Card, rows: usize, logits: Ptr<f32>, stride: usize) -> Result<()> {
        let mut end = 0;
        let part = |words: &Range<usize>| {
            let first = end;
            end += rows * columns(words);
            first..end
        };
        let parts: Vec<_> = std::iter::once(0..0).chain(self.words[1..].iter().map(part)).collect();
        let own = logits.part(0, rows * columns(&self.words[self.rank]));
        card.gather(own, self.gathered, &parts)?;
        if self.rank > 0 {
            return Ok(());
        }
        self.words.iter().zip(parts).skip(1).try_for_each(|(words, part)| {
            let x = self.gathered.part(part.start, part.len());
            put_columns(card, rows, x, words.start..words.start + columns(words), logits, stride)
        })
    }
}

impl GpuDecoder {
    /// Meets the other ranks for the first time, with as little and as much as steps will have. What that takes is taken here.
    ///
    /// # Errors
    /// The card's, and `Internal` when another rank failed.
    pub(in crate::model) fn greet(&mut self) -> Result<()> {
        for rows in [1, self.options.max_rows] {
            self.sum(self.outcome_at(), rows)?;
        }
        for rows in [1, self.options.max_sample_rows] {
            self.gather(rows)?;
        }
        self.card.finish()
    }

    /// Tells all other ranks that this one cannot go on.
    pub(in crate::model) fn abandon(&self) {
        self.card.abandon();
    }

    /// Length of a row of logits.
    pub(super) fn stride(&self) -> usize {
        match &self.ranks {
            Some(Ranks { rank: 1.., .. }) => self.head.n,
            _ => self.spec.vocab.next_multiple_of(8),
        }
    }

    /// What ranks have summed and the next norm adds to the residual stream; null where there are none, or it is normed before.
    pub(super) fn delta(&self) -> Ptr<bf16> {
        self.summed().map_or(Ptr::null(), |ranks| ranks.delta)
    }

    /// Room for the same of the rows whose logits are wanted.
    pub(super) fn sampled_delta(&self) -> Ptr<bf16> {
        self.summed().map_or(Ptr::null(), |ranks| ranks.sampled)
    }

    fn summed(&self) -> Option<&Ranks> {
        self.ranks.as_ref().filter(|_| !self.spec.post_norms)
    }

    /// The sum over all ranks of so many rows, in place.
    pub(super) fn sum(&self, x: Ptr<bf16>, rows: usize) -> Result<()> {
        match self.ranks {
            Some(_) if rows > 0 => self.card.all_reduce(x.part(0, rows * self.spec.hidden)),
            _ => Ok(()),
        }
    }

    /// Logits of so many rows, of all ranks' words.
    pub(super) fn gather(&self, rows: usize) -> Result<()> {
        match &self.ranks {
            Some(ranks) if rows > 0 => ranks.gather(&*self.card, rows, self.work.logits, self.stride()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[cfg(feature = "emulate")]
#[path = "ranks_test.rs"]
mod tests;
