//! Who executes a planned step: a model on a device, a model divided over the ranks of one, and the simulated device of tests
//! and `simulate`.

use crate::base::Result;
use crate::kernel::Pool;
use crate::model::lora::Adapter;
use crate::model::{Batch, Decoder, Group};

/// Computes packed steps over its own paged KV pool.
pub trait Runner: Send {
    /// KV blocks of the pool; valid block ids are `0..blocks`.
    fn blocks(&self) -> usize;

    /// Tokens in a block.
    fn block_tokens(&self) -> usize;

    /// Whether it can compute with this adapter.
    fn takes(&self, _: &Adapter) -> bool {
        false
    }

    /// Writes K and V of all rows into their blocks, and computes logits of `batch.sample_rows`. Calls `meanwhile` once, on
    /// this thread, when the device has begun: whatever the caller can do before it knows the logits.
    ///
    /// # Errors
    /// Any error means that the device cannot be trusted any more: the engine fails its sequences and stops. `meanwhile`
    /// may not have been called then.
    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>>;

    /// Makes a block hold what another holds.
    fn copy(&mut self, from: u32, to: u32);

    /// Bytes that a block's content takes outside the pool; 0: it cannot leave.
    fn block_bytes(&self) -> usize {
        0
    }

    /// Copies a block's content out: `out` has [`Runner::block_bytes`].
    fn export(&mut self, _block: u32, _out: &mut [u8]) {}

    /// Makes a block hold what another held when it was exported.
    fn import(&mut self, _block: u32, _from: &[u8]) {}
}

/// Logits of the sampled rows of a step, `[rows, vocab]` f32 row-major, to be changed in place by the sampler; and the
/// threads to do it with.
pub struct Logits<'a> {
    /// `rows * vocab` values.
    pub data: &'a mut [f32],
    /// Length of a row.
    pub vocab: usize,
    /// Worker threads that are idle now.
    pub pool: &'a Pool,
}

impl Runner for Decoder {
    fn blocks(&self) -> usize {
        Decoder::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Decoder::block_tokens(self)
    }

    fn takes(&self, adapter: &Adapter) -> bool {
        adapter.fits(self.spec())
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        let vocab = self.spec().vocab;
        let (data, pool) = self.forward_beside(batch, meanwhile)?;
        Ok(Logits { data, vocab, pool })
    }

    fn copy(&mut self, from: u32, to: u32) {
        Decoder::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Decoder::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Decoder::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Decoder::import(self, block, from);
    }
}

impl Runner for Group {
    fn blocks(&self) -> usize {
        Group::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Group::block_tokens(self)
    }

    fn takes(&self, adapter: &Adapter) -> bool {
        Group::takes(self, adapter)
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        let vocab = self.spec().vocab;
        let (data, pool) = self.forward_beside(batch, meanwhile)?;
        Ok(Logits { data, vocab, pool })
    }

    fn copy(&mut self, from: u32, to: u32) {
        Group::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Group::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Group::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Group::import(self, block, from);
    }
}
