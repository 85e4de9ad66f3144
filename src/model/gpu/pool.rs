//! The KV pool on a device: where its blocks lie, and their ways in and out.

use super::{GpuDecoder, GpuOptions};
use crate::base::{Error, Result};
use crate::config::Format;
use crate::kernel::gpu::{Boxes, Card, Keys, PagedKv, Ptr, Tile, copy_blocks};
use crate::model::spec::DecoderSpec;

/// How large a KV pool is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum KvSize {
    /// As many blocks as so many bytes hold.
    Bytes(usize),
    /// So many blocks.
    Blocks(usize),
    /// As many blocks as this share of what is free when everything else of the decoder has its memory; out of it a draft model takes
    /// `beside` bytes and `each` for every block.
    Share {
        /// Above 0, at most 1.
        share: f64,
        /// Of another decoder's weights.
        beside: usize,
        /// Of another decoder's blocks.
        each: usize,
    },
}

pub(super) struct KvPool {
    /// Keys of layer 0, values of layer 0, keys of layer 1, …
    pub(super) data: Ptr<u8>,
    pub(super) blocks: usize,
    /// Of a block's keys in a layer.
    pub(super) block_bytes: usize,
    pub(super) block_shift: u32,
    /// Of each layer, where a kernel brings keys and values by them.
    pub(super) boxes: Vec<Boxes>,
    /// From and to.
    pub(super) pair: Ptr<i32>,
}

impl KvPool {
    /// One without blocks.
    pub(super) fn new(card: &dyn Card, spec: &DecoderSpec, options: &GpuOptions) -> Result<Self> {
        Ok(Self {
            data: Ptr::null(),
            blocks: 0,
            block_bytes: options.kv_block_bytes(spec) / (2 * spec.layers),
            block_shift: options.block_tokens.trailing_zeros(),
            boxes: Vec::new(),
            pair: card.alloc(2)?,
        })
    }

    /// How many blocks it is to have.
    pub(super) fn fit(card: &dyn Card, spec: &DecoderSpec, options: &GpuOptions) -> Result<usize> {
        let whole = options.kv_block_bytes(spec);
        let fit = |bytes: usize, block: usize| match bytes / block {
            0 => Err(Error::bad_input(format!(
                "a block of {} tokens takes {block} bytes, and the KV pool on {} has {bytes}: give it more with kv_bytes, or free \
                 memory of the GPU",
                options.block_tokens,
                card.name(),
            ))),
            blocks => Ok(blocks),
        };
        match options.kv_size {
            KvSize::Bytes(bytes) => fit(bytes, whole),
            KvSize::Blocks(blocks) => Ok(blocks),
            KvSize::Share { share, beside, each } => {
                fit(((card.free_bytes()? as f64 * share) as usize).saturating_sub(beside), whole + each)
            }
        }
    }

    /// From the keys of a layer to its values, and on to the next layer's keys.
    pub(super) fn stride(&self) -> usize {
        self.blocks * self.block_bytes
    }

    pub(super) fn layer(&self, format: Format, layer: usize) -> PagedKv {
        let at = |index: usize| self.data.part(index * self.stride(), self.stride()).address();
        let (keys, values) = (at(2 * layer), at(2 * layer + 1));
        // SAFETY: parts of the pool, which are as long.
        let data = unsafe {
            match format {
                Format::Bf16 => Keys::Bf16(Ptr::new(keys, self.stride() / 2), Ptr::new(values, self.stride() / 2)),
                Format::Fp8 => Keys::Fp8(Ptr::new(keys, self.stride()), Ptr::new(values, self.stride())),
            }
        };
        PagedKv {
            data,
            boxes: self.boxes.get(layer).copied(),
            block_shift: self.block_shift,
            k_scale: 1.0,
            v_scale: 1.0,
        }
    }
}

impl GpuDecoder {
    /// How many blocks its KV pool is to have, now that everything else has its memory.
    ///
    /// # Errors
    /// `BadInput` when it is none, and the device's.
    pub(in crate::model) fn fit(&self) -> Result<usize> {
        KvPool::fit(&*self.card, &self.shard.spec, &self.options)
    }

    /// Takes the memory of the KV pool.
    ///
    /// # Errors
    /// `ModelUnavailable` when there is not so much.
    pub(in crate::model) fn take_pool(&mut self, blocks: usize) -> Result<()> {
        self.kv.data = self.card.alloc(blocks * self.block_bytes())?;
        self.kv.blocks = blocks;
        if self.wide == Tile::Bulk {
            let (card, kv, dim) = (&*self.card, &self.kv, self.heads.dim);
            let layers = 0..self.spec.layers;
            let boxes = layers.map(|layer| card.boxes(kv.layer(self.options.kv, layer).data, dim, kv.block_shift));
            // None of any layer: their keys are in fp8, or their blocks too short.
            self.kv.boxes = boxes.filter_map(Result::transpose).collect::<Result<_>>()?;
        }
        Ok(())
    }

    /// KV blocks of the pool; valid ids are `0..blocks`.
    pub fn blocks(&self) -> usize {
        self.kv.blocks
    }

    /// Tokens in a KV block.
    pub fn block_tokens(&self) -> usize {
        self.options.block_tokens
    }

    /// Bytes of a block over all layers.
    pub fn block_bytes(&self) -> usize {
        2 * self.spec.layers * self.kv.block_bytes
    }

    /// Makes a block hold what another holds.
    pub fn copy(&mut self, from: u32, to: u32) {
        self.ahead.spoil();
        let (kv, card) = (&self.kv, &*self.card);
        let copied = card
            .upload(&[from as i32, to as i32], kv.pair)
            .and_then(|()| copy_blocks(card, 1, kv.data, kv.pair, kv.block_bytes, kv.stride(), 2 * self.spec.layers));
        self.note(copied);
    }

    /// Copies a block out of the pool: keys and values, layer after layer.
    ///
    /// # Panics
    /// When there is no such block, or `out` has not [`GpuDecoder::block_bytes`].
    pub fn export(&mut self, block: u32, out: &mut [u8]) {
        assert_eq!(out.len(), self.block_bytes());
        let (kv, card) = (&self.kv, &*self.card);
        let copied = out.chunks_exact_mut(kv.block_bytes).enumerate().try_for_each(|(index, out)| {
            card.download(kv.data.part(index * kv.stride() + block as usize * kv.block_bytes, out.len()), out)
        });
        self.note(copied);
    }

    /// Copies a block into the pool, as it was exported.
    ///
    /// # Panics
    /// As [`GpuDecoder::export`].
    pub fn import(&mut self, block: u32, from: &[u8]) {
        assert_eq!(from.len(), self.block_bytes());
        self.ahead.spoil();
        let (kv, card) = (&self.kv, &*self.card);
        let copied = from.chunks_exact(kv.block_bytes).enumerate().try_for_each(|(index, from)| {
            card.upload(from, kv.data.part(index * kv.stride() + block as usize * kv.block_bytes, from.len()))
        });
        self.note(copied);
    }

    /// Who asked cannot be told now.
    fn note(&mut self, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.failed.get_or_insert(error);
        }
    }
}
