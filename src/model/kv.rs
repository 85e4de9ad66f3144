//! The physical KV pool of a model: one range of memory a layer, cut into blocks. Which block belongs to whom is the
//! engine's business; a block id means the same place in every layer.

use crate::base::{Error, Result};
use crate::kernel::{Buffer, KvLayout, Shared};

/// Keys and values of all sequences of a model.
pub(super) struct KvPool {
    layout: KvLayout,
    blocks: usize,
    layers: Vec<Buffer<u8>>,
}

impl KvPool {
    /// As many blocks as `bytes` hold over all layers. Memory is taken from the system as blocks are first written.
    ///
    /// # Errors
    /// `BadInput` when not even one block fits, or when the system has no such range of memory.
    pub(super) fn new(layout: KvLayout, layers: usize, bytes: usize) -> Result<Self> {
        let block = layout.block_bytes() * layers;
        let blocks = bytes / block;
        if blocks == 0 {
            return Err(Error::bad_input(format!(
                "kv_bytes is {bytes}, but a block of {} tokens takes {block}: give the KV pool more",
                layout.block_tokens
            )));
        }
        let pool: Option<Vec<_>> = (0..layers).map(|_| Buffer::try_zeroed(blocks * layout.block_bytes())).collect();
        let Some(layers) = pool else {
            return Err(Error::bad_input(format!(
                "kv_bytes is {bytes}, which this machine does not have: ask for less"
            )));
        };
        Ok(Self { layout, blocks, layers })
    }

    /// How a block lies in memory.
    pub(super) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Blocks of the pool.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of a block over all layers.
    pub(super) fn block_bytes(&self) -> usize {
        self.layout.block_bytes() * self.layers.len()
    }

    /// A block's content, layer after layer.
    pub(super) fn export(&self, block: usize, out: &mut [u8]) {
        let bytes = self.layout.block_bytes();
        assert_eq!(out.len(), self.block_bytes());
        for (layer, out) in self.layers.iter().zip(out.chunks_exact_mut(bytes)) {
            out.copy_from_slice(&layer[block * bytes..][..bytes]);
        }
    }

    /// Fills a block with what another held.
    pub(super) fn import(&mut self, block: usize, from: &[u8]) {
        let bytes = self.layout.block_bytes();
        assert_eq!(from.len(), self.block_bytes());
        for (layer, from) in self.layers.iter_mut().zip(from.chunks_exact(bytes)) {
            layer[block * bytes..][..bytes].copy_from_slice(from);
        }
    }

    /// Copies a block's content into another, over all layers.
    pub(super) fn copy(&mut self, from: usize, to: usize) {
        let block = self.layout.block_bytes();
        for layer in &mut self.layers {
            layer.copy_within(from * block..(from + 1) * block, to * block);
        }
    }

    /// All blocks of a layer.
    pub(super) fn layer(&self, layer: usize) -> &[u8] {
        &self.layers[layer]
    }

    /// All blocks of a layer, to be written by several threads.
    pub(super) fn share(&mut self, layer: usize) -> Shared<'_, u8> {
        self.layers[layer].share()
    }
}
