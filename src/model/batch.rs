//! One step's work, packed: the rows of all sequences back to back.
//!
//!     tokens     a0 a1 a2 | b7 | c3        rows: chunk of a, one decode each of b and c
//!     positions   0  1  2 |  7 |  3
//!     spans      (0,3,pos 0) (3,1,pos 7) (4,1,pos 3)
//!     sample            2    3    4        rows whose logits are wanted

use std::sync::Arc;

use crate::base::{Error, Result};
use crate::model::lora::Adapter;

/// What the runner computes in one step. Reused from step to step, so that a step allocates nothing.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    /// Token ids, `[rows]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[rows]`.
    pub positions: Vec<u32>,
    /// One entry a sequence, in row order.
    pub spans: Vec<Span>,
    /// Block tables of all spans back to back: physical KV block ids, in order of position.
    pub tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub sample_rows: Vec<u32>,
    /// Adapters of the spans that have one, each once.
    pub adapters: Vec<Arc<Adapter>>,
}

/// The rows of one sequence in a [`Batch`].
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub row: u32,
    /// Number of rows, at least 1.
    pub rows: u32,
    /// Position of the first row, which is the number of tokens already in KV. Row `row + i` attends to positions `0..=start + i`.
    pub start: u32,
    /// First entry in [`Batch::tables`].
    pub table: u32,
    /// Entries in [`Batch::tables`]; enough blocks for `start + rows` tokens.
    pub blocks: u32,
    /// Its place in [`Batch::adapters`] plus one; 0: the base alone.
    pub adapter: u32,
}

impl Batch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.tables.clear();
        self.sample_rows.clear();
        self.adapters.clear();
    }

    /// Appends one sequence: `tokens` at positions `start..`, its whole block table, and which of its rows (counted
    /// from its own first) need logits.
    pub fn push(&mut self, tokens: &[u32], start: u32, table: &[u32], sample: impl IntoIterator<Item = u32>) {
        debug_assert!(!tokens.is_empty());
        let row = self.tokens.len() as u32;
        self.spans.push(Span {
            row,
            rows: tokens.len() as u32,
            start,
            table: self.tables.len() as u32,
            blocks: table.len() as u32,
            adapter: 0,
        });
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(start..start + tokens.len() as u32);
        self.tables.extend_from_slice(table);
        self.sample_rows.extend(sample.into_iter().map(|i| row + i));
    }

    /// The sequence appended last is computed with this adapter.
    pub fn adapt(&mut self, adapter: &Arc<Adapter>) {
        let known = self.adapters.iter().position(|other| Arc::ptr_eq(other, adapter));
        let at = known.unwrap_or(self.adapters.len());
        if known.is_none() {
            self.adapters.push(adapter.clone());
        }
        if let Some(span) = self.spans.last_mut() {
            span.adapter = at as u32 + 1;
        }
    }

    /// The adapter of a span.
    pub fn adapter(&self, span: &Span) -> Option<&Arc<Adapter>> {
        self.adapters.get((span.adapter as usize).checked_sub(1)?)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The block table of a span.
    pub fn table(&self, span: &Span) -> &[u32] {
        &self.tables[span.table as usize..(span.table + span.blocks) as usize]
    }

    /// Whether it is whole, and small enough.
    ///
    /// # Errors
    /// `Internal`: what is wrong with it.
    pub(super) fn check(&self, most: &Bounds) -> Result<()> {
        let rows = self.rows();
        let wrong = |what: String| Err(Error::internal(format!("a batch that cannot be computed: {what}")));
        if rows > most.rows || self.sample_rows.len() > most.sample_rows {
            let sampled = self.sample_rows.len();
            return wrong(format!("{rows} rows of {}, {sampled} sampled of {}", most.rows, most.sample_rows));
        }
        if self.positions.len() != rows || self.spans.iter().map(|span| span.rows as usize).sum::<usize>() != rows {
            return wrong("spans and positions do not cover its rows".to_owned());
        }
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= most.vocab) {
            return wrong(format!("token {token} of {}", most.vocab));
        }
        if let Some(row) = self.sample_rows.iter().find(|&&row| row as usize >= rows) {
            return wrong(format!("sampled row {row} of {rows}"));
        }
        let mut row = 0;
        for span in &self.spans {
            let tokens = span.start as usize + span.rows as usize;
            let end = span.table as usize + span.blocks as usize;
            if span.row as usize != row || end > self.tables.len() {
                return wrong(format!("{span:?} of {rows} rows and {} blocks", self.tables.len()));
            }
            if (span.blocks as usize).saturating_mul(most.block_tokens) < tokens {
                return wrong(format!("{} blocks for {tokens} tokens", span.blocks));
            }
            if span.adapter as usize > self.adapters.len() {
                return wrong(format!("adapter {} of {}", span.adapter, self.adapters.len()));
            }
            row += span.rows as usize;
        }
        match self.tables.iter().find(|&&block| block as usize >= most.blocks) {
            Some(block) => wrong(format!("block {block} of {}", most.blocks)),
            None => Ok(()),
        }
    }
}

/// What a decoder was opened for.
pub(super) struct Bounds {
    pub(super) rows: usize,
    pub(super) sample_rows: usize,
    pub(super) vocab: usize,
    pub(super) blocks: usize,
    pub(super) block_tokens: usize,
}
