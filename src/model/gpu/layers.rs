//! What a step launches, layer after layer.

use half::{bf16, f16};

use super::{Extent, GpuDecoder};
use crate::base::Result;
use crate::kernel::gpu::{
    Attention, Card, Fp8, LARGE_UNIT, Norm, Normed, Part, Ptr, RopeKv, SMALL_ROWS, Scaled, Sink, Tile, Weight,
    add_rms_norm, embed, gather_rows, gemm_small, norm_add, quantize_fp8, rope_kv_write, silu_mul,
};
use crate::model::lora::Module;

pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    pub(super) qkv: Matrix,
    /// Of the model's, all heads; null if it has none.
    pub(super) bias: Ptr<bf16>,
    /// Of each head of queries, and of keys; null weights if there are none.
    pub(super) head_norms: [Norm; 2],
    pub(super) output: Matrix,
    pub(super) ffn_norm: Norm,
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    /// Of what attention gives, and of what the feed-forward gives; null weights if they are added as they are.
    pub(super) post_norms: [Norm; 2],
}

/// `n` channels of `k` inputs.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) data: Data,
}

#[derive(Clone, Copy)]
pub(super) enum Data {
    Bf16(Ptr<bf16>),
    Fp8(Scaled),
    /// As [`pack_q4`](crate::kernel::gpu::pack_q4) packs it.
    Q4(Ptr<u32>, Ptr<f16>),
}

/// Rows on their way into a matrix.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) bf16: Ptr<bf16>,
    pub(super) fp8: Ptr<Fp8>,
    pub(super) scales: Ptr<f32>,
}

impl Rows {
    pub(super) fn alloc(card: &dyn Card, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { bf16: card.alloc(rows * width)?, fp8: card.alloc(rows * width)?, scales: card.alloc(rows)? })
    }

    /// Where they go for this matrix.
    pub(super) fn for_matrix(&self, matrix: &Matrix) -> Normed {
        match matrix.data {
            Data::Bf16(_) | Data::Q4(..) => Normed::Bf16(self.bf16),
            Data::Fp8(_) => Normed::Fp8(self.fp8, self.scales),
        }
    }
}

impl GpuDecoder {
    /// What follows is timed as this part.
    fn mark(&self, extent: Extent, part: Part) -> Result<()> {
        if extent.timed { self.card.mark(Some(part)) } else { Ok(()) }
    }

    /// Launches all of a step.
    pub(super) fn launch(&self, extent: Extent) -> Result<()> {
        let Extent { rows, sampled, .. } = extent;
        let (card, spec, work) = (&*self.card, &self.spec, &self.work);
        self.mark(extent, Part::Other)?;
        let (words, scale) = (self.shard.vocab.clone(), spec.embedding_scale);
        embed(card, rows, self.step.ids.device, self.embedding, spec.hidden, words, scale, work.x)?;
        self.sum(work.x, rows)?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(index, layer, extent)?;
            self.feed_forward(index, layer, extent)?;
        }
        if sampled > 0 {
            self.head(extent)?;
        }
        if extent.timed { card.mark(None) } else { Ok(()) }
    }

    /// Logits of the rows that are wanted.
    fn head(&self, extent: Extent) -> Result<()> {
        let (card, spec, work, sampled) = (&*self.card, &self.spec, &self.work, extent.sampled);
        self.mark(extent, Part::Other)?;
        gather_rows(card, sampled, work.x, self.step.sampled.device, spec.hidden, work.sampled)?;
        let delta = self.sampled_delta();
        if !delta.is_null() {
            gather_rows(card, sampled, self.delta(), self.step.sampled.device, spec.hidden, delta)?;
        }
        let normed = Normed::Bf16(work.inputs.bf16);
        add_rms_norm(card, sampled, spec.hidden, work.sampled, delta, self.norm, normed)?;
        self.mark(extent, Part::Product)?;
        self.product_apart(&self.head, work.inputs, sampled, Sink::Wide(work.logits), self.stride())?;
        self.mark(extent, Part::Other)?;
        self.gather(sampled)
    }

    /// x += output(attention(rope(qkv(norm(x))))), the outcome normed where the family does
    fn attend(&self, index: usize, layer: &Layer, extent: Extent) -> Result<()> {
        let (card, spec, work, step, heads) = (&*self.card, &self.shard.spec, &self.work, &self.step, self.heads);
        let rows = extent.rows;
        self.mark(extent, Part::Other)?;
        let into = work.inputs.for_matrix(&layer.qkv);
        let delta = if index > 0 { self.delta() } else { Ptr::null() };
        add_rms_norm(card, rows, spec.hidden, work.x, delta, layer.attention_norm, into)?;
        self.mark(extent, Part::Product)?;
        self.product(&layer.qkv, work.inputs, rows, Sink::Set(work.qkv))?;
        self.mark(extent, Part::Other)?;
        if extent.adapted {
            if let Normed::Fp8(..) = into {
                // Adapters take what it was before it was rounded.
                let exact = Normed::Bf16(work.inputs.bf16);
                add_rms_norm(card, rows, spec.hidden, work.x, Ptr::null(), layer.attention_norm, exact)?;
            }
            let mut first = 0;
            for (module, n) in [(Module::Q, spec.q_width()), (Module::K, spec.kv_width()), (Module::V, spec.kv_width())]
            {
                let out = work.qkv.part(first, work.qkv.len() - first);
                self.adapters.add(card, (index, module), (n, spec.hidden), work.inputs.bf16, out, layer.qkv.n)?;
                first += n;
            }
        }
        let [q_norm, k_norm] = layer.head_norms;
        let window = spec.window_of(index);
        let frequencies = self.frequencies[usize::from(window.is_some())];
        let rope = RopeKv { frequencies, magnitude: 1.0, bias: layer.bias, q_norm, k_norm };
        let kv = self.kv.layer(self.options.kv, index);
        rope_kv_write(card, rows, heads, work.qkv, step.positions.device, step.slots.device, &rope, &kv)?;
        self.mark(extent, Part::Attention)?;
        let attended = work.inputs.bf16;
        let tiles = [(Tile::Narrow, &step.narrow, &step.narrow_merges), (self.wide, &step.wide, &step.wide_merges)];
        for ((tile, items, merges), (count, merge_count, most)) in tiles.into_iter().zip(extent.items) {
            Attention::run(
                card,
                tile,
                (items.device, count),
                (merges.device, merge_count, most),
                heads,
                work.qkv,
                layer.qkv.n,
                &kv,
                step.tables.device,
                spec.score_scale,
                window.unwrap_or(0),
                attended,
                work.partial,
            )?;
        }
        self.mark(extent, Part::Other)?;
        if let Normed::Fp8(out, scales) = work.inputs.for_matrix(&layer.output) {
            quantize_fp8(card, (rows, spec.q_width()), attended, out, scales)?;
        }
        self.mark(extent, Part::Product)?;
        self.product(&layer.output, work.inputs, rows, self.outcome())?;
        self.mark(extent, Part::Other)?;
        self.sum(self.outcome_at(), rows)?;
        if extent.adapted {
            let shape = (spec.hidden, spec.q_width());
            self.adapters.add(card, (index, Module::O), shape, attended, self.outcome_at(), spec.hidden)?;
        }
        self.add_outcome(layer.post_norms[0], rows)
    }

    /// Where what attention or the feed-forward gives goes: the residual stream, or beside it, to be summed over ranks or normed first.
    fn outcome(&self) -> Sink {
        match self.ranks.is_some() || self.spec.post_norms {
            true => Sink::Set(self.outcome_at()),
            false => Sink::Add(self.work.x),
        }
    }

    pub(super) fn outcome_at(&self) -> Ptr<bf16> {
        match &self.ranks {
            _ if self.spec.post_norms => self.work.added,
            Some(ranks) => ranks.delta,
            None => self.work.x,
        }
    }

    /// The outcome, normed, to the residual stream, unless it is there.
    fn add_outcome(&self, norm: Norm, rows: usize) -> Result<()> {
        match self.spec.post_norms {
            true => norm_add(&*self.card, rows, self.spec.hidden, self.work.x, self.work.added, norm),
            false => Ok(()),
        }
    }

    /// x += down(act(gate(norm(x))) * up(norm(x))), the outcome normed where the family does
    fn feed_forward(&self, index: usize, layer: &Layer, extent: Extent) -> Result<()> {
        let (card, spec, work, rows) = (&*self.card, &self.shard.spec, &self.work, extent.rows);
        let into = work.inputs.for_matrix(&layer.gate_up);
        add_rms_norm(card, rows, spec.hidden, work.x, self.delta(), layer.ffn_norm, into)?;
        self.mark(extent, Part::Product)?;
        self.product(&layer.gate_up, work.inputs, rows, Sink::Set(work.gate_up))?;
        self.mark(extent, Part::Other)?;
        if extent.adapted {
            if let Normed::Fp8(..) = into {
                let exact = Normed::Bf16(work.inputs.bf16);
                add_rms_norm(card, rows, spec.hidden, work.x, Ptr::null(), layer.ffn_norm, exact)?;
            }
            for (module, first) in [(Module::Gate, 0), (Module::Up, spec.ffn)] {
                let out = work.gate_up.part(first, work.gate_up.len() - first);
                let shape = (spec.ffn, spec.hidden);
                self.adapters.add(card, (index, module), shape, work.inputs.bf16, out, layer.gate_up.n)?;
            }
        }
        let into = work.middle.for_matrix(&layer.down);
        silu_mul(card, rows, spec.ffn, work.gate_up, spec.gate, into)?;
        self.mark(extent, Part::Product)?;
        self.product(&layer.down, work.middle, rows, self.outcome())?;
        self.mark(extent, Part::Other)?;
        self.sum(self.outcome_at(), rows)?;
        if extent.adapted {
            if let Normed::Fp8(..) = into {
                silu_mul(card, rows, spec.ffn, work.gate_up, spec.gate, Normed::Bf16(work.middle.bf16))?;
            }
            let shape = (spec.hidden, spec.ffn);
            self.adapters.add(card, (index, Module::Down), shape, work.middle.bf16, self.outcome_at(), spec.hidden)?;
        }
        self.add_outcome(layer.post_norms[1], rows)
    }

    /// `x * matrix^T` into `out`.
    fn product(&self, matrix: &Matrix, x: Rows, rows: usize, out: Sink) -> Result<()> {
        self.product_apart(matrix, x, rows, out, matrix.n)
    }

    /// The same, into rows that are `stride` numbers apart.
    fn product_apart(&self, matrix: &Matrix, x: Rows, rows: usize, out: Sink, stride: usize) -> Result<()> {
        let (card, Matrix { n, k, data }) = (&*self.card, *matrix);
        let part = |first: usize, count: usize| match data {
            Data::Bf16(data) => Weight::Bf16(data, x.bf16.part(first * k, count * k)),
            Data::Q4(codes, scales) => Weight::Q4(codes, scales, x.bf16.part(first * k, count * k)),
            Data::Fp8(data) => {
                let x = Scaled { data: x.fp8.part(first * k, count * k), scales: x.scales.part(first, count) };
                Weight::Fp8(data, x)
            }
        };
        let whole = rows.next_multiple_of(LARGE_UNIT);
        if rows > SMALL_ROWS && card.product((whole, n, k), part(0, whole), out.part(0, whole * stride), stride)? {
            return Ok(());
        }
        for first in (0..rows).step_by(SMALL_ROWS) {
            let count = SMALL_ROWS.min(rows - first);
            gemm_small(card, (count, n, k), part(first, count), out.part(first * stride, count * stride), stride)?;
        }
        Ok(())
    }
}
