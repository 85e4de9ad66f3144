//! Adapters on a GPU, as `kernels/lora.cu` reads them.
//!
//! ```text
//! an adapter   A [32, k], B [n, 32] of every matrix that it adapts, bf16, ranks filled up with zeros: one piece of memory
//! a step       addresses of A and B by matrix, a column an adapter of the step; rows of one adapter in items of up to 16
//! ```
//!
//! An adapter is brought over when a request with it is taken in, and leaves when nobody holds it any more: a step finds all of its
//! own there. What a matrix of some adapter of a step does not have is zeros, and a matrix that none has is not launched.

use std::sync::{Arc, Weak};

use half::bf16;

use super::Told;
use crate::base::{Error, Kind, Result};
use crate::kernel::gpu::{Adapted, Card, LORA_RANK, LORA_ROWS, Lora, Ptr, lora};
use crate::model::Batch;
use crate::model::lora::{Adapter, Module};
use crate::model::spec::DecoderSpec;

/// The adapters of a decoder, and those of the step at hand.
pub(super) struct Adapters {
    layers: usize,
    held: Vec<Held>,
    /// As many as the largest A or B.
    zeros: Ptr<bf16>,
    items: Told<Adapted>,
    /// Addresses of A and B, and what they are multiplied by: `[layers, modules, 2, adapters of the step]`.
    addresses: Told<u64>,
    scales: Told<f32>,
    /// By layer and module: whether any adapter of the step has it.
    used: Vec<bool>,
    /// Between A and B, `[rows, 32]`.
    between: Ptr<bf16>,
}

/// An adapter that is there.
struct Held {
    of: Weak<Adapter>,
    memory: u64,
    scale: f32,
    /// By layer and module: where A and B are; 0: nowhere.
    places: Vec<[u64; 2]>,
}

impl Adapters {
    /// For steps of up to `rows` rows of up to `sequences` sequences.
    pub(super) fn alloc(card: &dyn Card, spec: &DecoderSpec, rows: usize, sequences: usize) -> Result<Self> {
        let widest = spec.hidden.max(spec.q_width()).max(spec.ffn);
        let matrices = spec.layers * Module::ALL.len();
        Ok(Self {
            layers: spec.layers,
            held: Vec::new(),
            zeros: card.alloc(widest * LORA_RANK)?,
            items: Told::alloc(card, rows)?,
            addresses: Told::alloc(card, matrices * 2 * sequences)?,
            scales: Told::alloc(card, sequences)?,
            used: vec![false; matrices],
            between: card.alloc(rows * LORA_RANK)?,
        })
    }

    /// Brings an adapter over, unless it is there.
    ///
    /// # Errors
    /// [`Kind::Busy`] when there is no memory for it now, and the card's.
    pub(super) fn adopt(&mut self, card: &dyn Card, adapter: &Arc<Adapter>) -> Result<()> {
        self.let_go(card)?;
        if self.place(adapter).is_some() {
            return Ok(());
        }
        let (mut numbers, mut offsets) = (Vec::new(), Vec::new());
        for layer in 0..self.layers {
            for module in Module::ALL {
                let Some([a, b]) = adapter.halves(layer, module) else {
                    offsets.push(None);
                    continue;
                };
                let begin = numbers.len();
                let (a, b, rank) = (a.to_f32()?, b.to_f32()?, a.rows);
                numbers.extend(a.iter().map(|&value| bf16::from_f32(value)));
                numbers.resize(begin + a.len() / rank * LORA_RANK, bf16::ZERO);
                let middle = numbers.len();
                for row in b.chunks_exact(rank) {
                    numbers.extend(row.iter().map(|&value| bf16::from_f32(value)));
                    numbers.resize(numbers.len() + LORA_RANK - rank, bf16::ZERO);
                }
                offsets.push(Some([begin, middle]));
            }
        }
        let memory = card.alloc::<bf16>(numbers.len().max(1)).map_err(|error| match error.kind() {
            Kind::ModelUnavailable => {
                let message = "The GPU has no memory for this adapter while others are in use; try again in a moment.";
                Error::new(Kind::Busy, message).with_retry_after(std::time::Duration::from_secs(5))
            }
            _ => error,
        })?;
        card.upload(&numbers, memory)?;
        let address = |offset: usize| memory.address() + (offset * size_of::<bf16>()) as u64;
        let places = offsets.into_iter().map(|offsets| offsets.map_or([0; 2], |offsets| offsets.map(address)));
        self.held.push(Held {
            of: Arc::downgrade(adapter),
            memory: memory.address(),
            scale: adapter.scale(),
            places: places.collect(),
        });
        Ok(())
    }

    /// Frees what nobody holds any more.
    fn let_go(&mut self, card: &dyn Card) -> Result<()> {
        let gone: Vec<Held> = self.held.extract_if(.., |held| held.of.strong_count() == 0).collect();
        gone.into_iter().try_for_each(|held| card.free(held.memory))
    }

    fn place(&self, adapter: &Arc<Adapter>) -> Option<usize> {
        self.held.iter().position(|held| held.of.as_ptr() == Arc::as_ptr(adapter))
    }

    /// How many adapters are there.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.held.len()
    }

    /// Sends what a step's launches are told.
    pub(super) fn tell(&mut self, card: &dyn Card, batch: &Batch) -> Result<()> {
        let spans = batch.spans.iter().filter(|span| span.adapter > 0);
        let items = spans.flat_map(|span| {
            (0..span.rows).step_by(LORA_ROWS).map(move |at| Adapted {
                row: (span.row + at) as i32,
                rows: (span.rows - at).min(LORA_ROWS as u32) as i32,
                adapter: span.adapter as i32 - 1,
                unused: 0,
            })
        });
        self.items.tell(card, items)?;
        let there = batch.adapters.iter().map(|adapter| {
            self.place(adapter).ok_or_else(|| Error::internal("an adapter of a step is not on its device"))
        });
        let there = there.collect::<Result<Vec<_>>>()?;
        let held = &self.held;
        self.scales.tell(card, there.iter().map(|&at| held[at].scale))?;
        let (zeros, matrices) = (self.zeros.address(), self.used.len());
        for (matrix, used) in self.used.iter_mut().enumerate() {
            *used = there.iter().any(|&at| held[at].places[matrix][0] != 0);
        }
        let addresses = (0..matrices).flat_map(|matrix| {
            let there = &there;
            (0..2).flat_map(move |half| {
                there.iter().map(move |&at| match held[at].places[matrix][half] {
                    0 => zeros,
                    address => address,
                })
            })
        });
        self.addresses.tell(card, addresses)
    }

    /// `out += scale * B (A x)` of one matrix, for the rows of the step that have an adapter: x `[rows, k]`, out `[rows, out_stride]`
    /// from its first channel on.
    pub(super) fn add(
        &self,
        card: &dyn Card,
        (layer, module): (usize, Module),
        (n, k): (usize, usize),
        x: Ptr<bf16>,
        out: Ptr<bf16>,
        out_stride: usize,
    ) -> Result<()> {
        let (matrix, adapters) = (layer * Module::ALL.len() + module as usize, self.scales.host.len());
        if adapters == 0 || !self.used[matrix] {
            return Ok(());
        }
        let half = |half: usize| self.addresses.device.part((2 * matrix + half) * adapters, adapters);
        let matrices = Lora { a: half(0), b: half(1), scales: self.scales.device };
        let items = (self.items.device, self.items.host.len());
        lora(card, items, &matrices, (n, k), x, k, self.between, out, out_stride)
    }
}
