//! Tokens drawn where the logits are, so that no row of the vocabulary travels.

use crate::base::{Error, Result};
use crate::kernel::Pool;
use crate::kernel::gpu::{Card, Drawn, Edit, Ptr, UNWANTED, Wish, sample};
use crate::model::{Batch, GpuDecoder};

/// Edits of a step for each row with logits, on average, that there is room for.
const EDITS: usize = 1024;

/// Logits of a step on the device, until the next one. Each row is drawn there, or brought over and drawn by the host, or neither.
pub struct GpuLogits<'a> {
    decoder: &'a mut GpuDecoder,
    rows: usize,
}

/// What the device is told of how tokens are drawn, and what it answers.
pub(super) struct Drawing {
    wishes: Ptr<Wish>,
    edits: Ptr<Edit>,
    /// A bit a token, a row of words each.
    masks: Ptr<u32>,
    scratch: Ptr<u64>,
    pub(super) drawn: Ptr<Drawn>,
    landed: Vec<Drawn>,
    /// Wishes of rows that others lie between.
    spread: Vec<Wish>,
    /// Rows that the host draws.
    logits: Vec<f32>,
    /// By row, where drafts are to come true: the one behind it.
    follows: Vec<Option<u32>>,
    /// Steps in which that was looked at.
    foreseen: u64,
}

impl Drawing {
    pub(super) fn alloc(card: &dyn Card, rows: usize, vocab: usize) -> Result<Self> {
        Ok(Self {
            wishes: card.alloc(rows)?,
            edits: card.alloc(rows * EDITS)?,
            masks: card.alloc(rows * vocab.div_ceil(32))?,
            scratch: card.alloc(rows * vocab)?,
            drawn: card.alloc(rows)?,
            landed: vec![Drawn::default(); rows],
            spread: Vec::new(),
            // Costs memory only where it is used.
            logits: vec![0.0; rows * vocab],
            follows: Vec::new(),
            foreseen: 0,
        })
    }

    /// Notes which draft stands behind each row with logits.
    pub(super) fn foresee(&mut self, batch: &Batch) {
        self.foreseen += 1;
        self.follows.clear();
        let mut spans = batch.spans.iter();
        let mut end = 0;
        for &row in &batch.sample_rows {
            while row >= end {
                let Some(span) = spans.next() else { return };
                end = span.row + span.rows;
            }
            self.follows.push((row + 1 < end).then(|| batch.tokens[row as usize + 1]));
        }
    }

    /// Has as many drafts come true as `accept` says.
    fn accept(&mut self, accept: f32, rows: usize) {
        for (row, (drawn, follows)) in self.landed[..rows].iter_mut().zip(&self.follows).enumerate() {
            let chance =
                (self.foreseen.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ row as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
            if let Some(draft) = follows {
                let right = ((chance >> 40) as f32) < accept * (1u64 << 24) as f32;
                drawn.token = if right { *draft as i32 } else { i32::from(*draft == 0) };
            }
        }
    }
}

impl<'a> GpuLogits<'a> {
    pub(super) fn new(decoder: &'a mut GpuDecoder, rows: usize) -> Self {
        Self { decoder, rows }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    pub fn vocab(&self) -> usize {
        self.decoder.spec.vocab
    }

    /// Edits of all rows together that there is room for.
    pub fn most_edits(&self) -> usize {
        self.decoder.drawing.edits.len()
    }

    /// Draws as `wishes` say, one for each row, and waits for it. `masks` gives those of the rows that have one, as many words as
    /// there are up to the vocabulary; what a mask does not reach is not allowed.
    ///
    /// # Errors
    /// `Internal` when there are more edits than there is room for or other wishes than rows, and the device's: of this step and
    /// whatever was launched before.
    pub fn draw<'m>(
        &mut self,
        wishes: &[Wish],
        edits: &[Edit],
        masks: impl Iterator<Item = (usize, &'m [u32])>,
    ) -> Result<&[Drawn]> {
        if wishes.len() != self.rows {
            return Err(Error::internal(format!("{} wishes for {} rows", wishes.len(), self.rows)));
        }
        let (vocab, stride) = (self.vocab(), self.decoder.stride());
        let goes_ahead = self.decoder.goes_ahead(wishes);
        let GpuDecoder { card, work, drawing, ahead, .. } = &mut *self.decoder;
        let card = &**card;
        let places = &ahead.rows;
        let wishes = match places.last() {
            None => wishes,
            Some(&last) => {
                drawing.spread.clear();
                drawing.spread.resize(last as usize + 1, Wish { given: UNWANTED, ..Wish::default() });
                places.iter().zip(wishes).for_each(|(&at, &wish)| drawing.spread[at as usize] = wish);
                &drawing.spread
            }
        };
        let rows = wishes.len();
        card.upload(wishes, drawing.wishes)?;
        card.upload(edits, drawing.edits)?;
        let words = vocab.div_ceil(32);
        for (row, mask) in masks {
            let to = drawing.masks.part(place(places, row) * words, words);
            match mask.len().checked_sub(words) {
                Some(_) => card.upload(&mask[..words], to)?,
                None => card.upload(&[mask, &vec![0; words - mask.len()]].concat(), to)?,
            }
        }
        let Drawing { wishes, edits, masks, scratch, drawn, .. } = *drawing;
        sample(card, rows, (vocab, stride), work.logits, wishes, masks, edits, scratch, drawn)?;
        if goes_ahead {
            card.depart(drawn, rows)?;
            self.decoder.go_ahead()?;
        }
        let GpuDecoder { card, drawing, options, ahead, .. } = &mut *self.decoder;
        let landed = &mut drawing.landed[..rows];
        if goes_ahead {
            card.land(landed)?
        } else {
            card.download(drawn, landed)?
        }
        ahead.rows.iter().enumerate().for_each(|(row, &at)| landed[row] = landed[at as usize]);
        ahead.begins_with(landed.iter().map(|drawn| drawn.token as u32));
        if let Some(accept) = options.accept {
            drawing.accept(accept, self.rows);
        }
        Ok(&drawing.landed[..self.rows])
    }

    /// Brings some rows over, `[rows, vocab]`, with the threads to work on them. After [`GpuLogits::draw`] they are what their wishes
    /// left of them.
    ///
    /// # Errors
    /// The device's, as above.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn land(&mut self, rows: &[usize]) -> Result<(&mut [f32], &Pool)> {
        let (vocab, stride) = (self.vocab(), self.decoder.stride());
        let GpuDecoder { card, work, drawing, options, ahead, .. } = &mut *self.decoder;
        let logits = &mut drawing.logits[..rows.len() * vocab];
        for (out, &row) in logits.chunks_exact_mut(vocab).zip(rows) {
            card.download(work.logits.part(place(&ahead.rows, row) * stride, vocab), out)?;
        }
        Ok((logits, &options.pool))
    }
}

/// Where a row lies on the device.
fn place(places: &[u32], row: usize) -> usize {
    places.get(row).map_or(row, |&at| at as usize)
}
