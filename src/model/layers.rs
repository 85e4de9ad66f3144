//! The layers of a decoder, packed for the kernels out of a model's tensors.
//!
//!     x ─┬─ norm ─ qkv ─ (norm of heads) ─ rope ─ attention ─ output ─ (norm) ─(+)─┬─ norm ─ gate, up ─ act·mul ─ down ─ (norm) ─(+)─
//!        └──────────────────────────────────────────────────────────────────────┘  └──────────────────────────────────────────────┘
//!
//! Whatever order a file has the numbers of a head in, packed heads are halves: number `i` turns with `i + dim / 2`.

use crate::base::Result;
use crate::kernel::{Arena, Cpu, Linear, Panels, Source};
use crate::model::shard::{Matrix, Shard};
use crate::model::spec::RopeStyle;
use crate::model::weights::Weights;

/// One decoder layer.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// Queries, keys and values of all heads, side by side.
    pub(super) qkv: Linear,
    /// Of each head of queries, and of keys, if they are normed.
    pub(super) head_norms: Option<[Vec<f32>; 2]>,
    pub(super) output: Linear,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) gate: Panels,
    pub(super) up: Panels,
    pub(super) down: Linear,
    /// Of what attention gives, and of what the feed-forward gives, if they are normed before they are added.
    pub(super) post_norms: Option<[Vec<f32>; 2]>,
}

/// Packs tensors and says how far it is.
pub(super) struct Packer<'a> {
    pub(super) cpu: &'a Cpu,
    /// Where panels go, in the order a step reads them.
    pub(super) arena: Arena,
    pub(super) weights: &'a Weights,
    /// What is packed of each.
    pub(super) shard: &'a Shard,
    /// Everything in f32.
    pub(super) plain: bool,
    pub(super) progress: &'a (dyn Fn(f32) + Sync),
    /// Bytes of tensors packed so far.
    pub(super) done: u64,
}

impl Packer<'_> {
    /// Layer number `layer`.
    pub(super) fn layer(&mut self, layer: usize) -> Result<Layer> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let spec = &self.shard.spec;
        let heads = (spec.rope.style == RopeStyle::Interleaved).then_some(spec.head_dim);
        let bias = if spec.qkv_bias {
            let mut bias = Vec::new();
            let (query, other) = (Matrix::Query, Matrix::KeyOrValue);
            for (part, matrix, heads) in
                [("attn_q.bias", query, heads), ("attn_k.bias", other, heads), ("attn_v.bias", other, None)]
            {
                let values = self.vector(&name(part))?;
                bias.extend(self.shard.part(matrix).channels.map(|channel| values[halves(heads, channel)]));
            }
            Some(bias)
        } else {
            None
        };
        let q = self.matrix(&name("attn_q.weight"), Matrix::Query, heads)?;
        let k = self.matrix(&name("attn_k.weight"), Matrix::KeyOrValue, heads)?;
        let v = self.matrix(&name("attn_v.weight"), Matrix::KeyOrValue, None)?;
        let head_norms = if spec.qk_norm {
            let norm = |name: &str| -> Result<Vec<f32>> {
                let values = self.norm(name)?;
                Ok((0..values.len()).map(|at| values[halves(heads, at)]).collect())
            };
            Some([norm(&name("attn_q_norm.weight"))?, norm(&name("attn_k_norm.weight"))?])
        } else {
            None
        };
        let post_norms = if spec.post_norms {
            Some([self.norm(&name("post_attention_norm.weight"))?, self.norm(&name("post_ffw_norm.weight"))?])
        } else {
            None
        };
        Ok(Layer {
            attention_norm: self.norm(&name("attn_norm.weight"))?,
            qkv: Linear::new(vec![q, k, v], bias),
            head_norms,
            output: Linear::new(vec![self.matrix(&name("attn_output.weight"), Matrix::Output, None)?], None),
            ffn_norm: self.norm(&name("ffn_norm.weight"))?,
            gate: self.matrix(&name("ffn_gate.weight"), Matrix::GateOrUp, None)?,
            up: self.matrix(&name("ffn_up.weight"), Matrix::GateOrUp, None)?,
            down: Linear::new(vec![self.matrix(&name("ffn_down.weight"), Matrix::Down, None)?], None),
            post_norms,
        })
    }

    /// The rank's part of a matrix, its rows put into halves when they are interleaved heads of `heads` numbers. Its pages in
    /// the file are given back.
    pub(super) fn matrix(&mut self, name: &str, matrix: Matrix, heads: Option<usize>) -> Result<Panels> {
        let tensor = self.weights.tensor(name)?;
        let source = Source { dtype: tensor.dtype, bytes: tensor.data, channels: tensor.rows, inputs: tensor.cols };
        let part = self.shard.part(matrix);
        let order = |channel| halves(heads, channel);
        let panels = Panels::pack_part(self.cpu, &mut self.arena, source, part, self.plain, order)
            .map_err(|error| error.context(name))?;
        self.done += tensor.data.len() as u64;
        self.weights.release(name);
        (self.progress)((self.done as f64 / self.weights.bytes().max(1) as f64).min(1.0) as f32);
        Ok(panels)
    }

    /// What a norm multiplies by.
    pub(super) fn norm(&self, name: &str) -> Result<Vec<f32>> {
        let offset = self.shard.spec.norm_offset;
        Ok(self.vector(name)?.into_iter().map(|weight| weight + offset).collect())
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        self.weights.tensor(name)?.to_f32()
    }
}

/// The row of a file that becomes `channel`: the even numbers of an interleaved head first, then the odd ones.
pub(super) fn halves(heads: Option<usize>, channel: usize) -> usize {
    let Some(dim) = heads else { return channel };
    let (head, i, half) = (channel / dim * dim, channel % dim, dim / 2);
    head + if i < half { 2 * i } else { 2 * (i - half) + 1 }
}
