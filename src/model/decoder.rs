//! The decoder on a CPU: packed rows of many sequences in, logits of the sampled ones out, over paged KV.
//!
//!     Batch ─ embed ─> x ─ layers (layers.rs) ─> norm of sampled rows ─ head ─> logits
//!                        └ K, V of all rows into their blocks (kv.rs)
//!
//! One text for every family: sizes, biases and rope come from [`DecoderSpec`]. Owned by one thread, which may use the
//! pool's others. Nothing is allocated in a step. Knows nothing of sequences beyond a step, nor of sampling.
//!
//! One rank of a group ([`crate::model::Group`]) is such a decoder as well: it holds its part of each matrix, and what would
//! go into the residual stream is summed over all ranks first.

use std::sync::Arc;

use crate::base::{Error, Result};
use crate::config::{KvType, Precision};
use crate::kernel::{
    Activations, Adapters, Arena, Attention, Buffer, Collective, Cpu, Delta, Isa, KvLayout, KvSpan, Linear, MAX_DIM,
    MAX_GROUP, Out, Panels, Pool, Query, Rope, Shared, each_row, gated, norm_in_place, rotate,
};
use crate::model::Batch;
use crate::model::batch::Bounds;
use crate::model::kv::KvPool;
use crate::model::layers::{Layer, Packer};
use crate::model::shard::{Matrix, Shard};
use crate::model::spec::{self, DecoderSpec};
use crate::model::weights::Weights;

/// How a decoder is laid out on its device.
#[derive(Clone)]
pub struct DecoderOptions {
    /// Worker threads.
    pub pool: Arc<Pool>,
    /// Instruction set: [`Isa::detect`], or another of [`Isa::available`] for comparisons.
    pub isa: Isa,
    /// Arithmetic of the weights.
    pub precision: Precision,
    /// Type of keys and values; `Plain` precision always has f32.
    pub kv: KvType,
    /// Size of the KV pool.
    pub kv_bytes: usize,
    /// Tokens in a KV block, at least 1.
    pub block_tokens: usize,
    /// Rows in a step, at most.
    pub max_rows: usize,
    /// Rows with logits in a step, at most.
    pub max_sample_rows: usize,
}

impl DecoderOptions {
    /// Bytes that a KV block takes over all layers of a model.
    pub fn kv_block_bytes(&self, spec: &DecoderSpec) -> usize {
        self.kv_layout(spec).block_bytes() * spec.layers
    }

    fn kv_layout(&self, spec: &DecoderSpec) -> KvLayout {
        KvLayout {
            heads: spec.kv_heads,
            dim: spec.head_dim,
            block_tokens: self.block_tokens.max(1),
            half: self.kv == KvType::F16 && self.precision != Precision::Plain,
        }
    }
}

/// A model ready to compute: packed weights, KV pool, work buffers.
pub struct Decoder {
    /// Of the whole model.
    spec: DecoderSpec,
    /// What of it is here: all, unless it is a rank of a group.
    shard: Shard,
    /// The way to the other ranks of the group.
    ranks: Option<Collective>,
    cpu: Cpu,
    /// `None` when the head is the embedding.
    embedding: Option<Panels>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Linear,
    kv: KvPool,
    rope: Rope,
    /// Of layers with a window, if it is another there.
    window_rope: Option<Rope>,
    attention: Attention,
    adapters: Adapters,
    work: Work,
    max_rows: usize,
    max_sample_rows: usize,
}

/// What a step computes in; sized for the largest one.
struct Work {
    /// The residual stream, `[rows, hidden]`.
    x: Buffer<f32>,
    /// `[rows, q, k and v of all heads]`
    qkv: Buffer<f32>,
    /// What goes into a matrix from the residual stream or from attention.
    inputs: Activations,
    /// The middle of the feed-forward.
    middle: Activations,
    /// The sampled rows in front of the head.
    sampled: Activations,
    /// `[rows, hidden]`: what this rank adds to the residual stream. Empty without a group.
    partial: Buffer<f32>,
    /// `[rows, hidden]`: what is normed before it is added. Empty for families that do not.
    added: Buffer<f32>,
    /// `[sampled rows, vocab]`. Empty on all ranks but the first.
    logits: Buffer<f32>,
}

/// One rank's place in a group.
pub(super) struct Place {
    pub(super) shard: Shard,
    pub(super) ranks: Collective,
}

impl Decoder {
    /// Packs the weights and allocates everything a step needs. `progress` hears how much is packed, 0 to 1.
    ///
    /// # Errors
    /// `ModelUnavailable` when a tensor is missing or broken, `Unsupported` for shapes the kernels do not have,
    /// `BadInput` when the KV pool is too small or too large.
    pub fn open(
        weights: &Weights,
        spec: DecoderSpec,
        options: &DecoderOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        Self::open_place(weights, spec, None, options, progress)
    }

    /// [`Decoder::open`] of a rank's part; the pool and the size of the KV pool are the rank's own.
    pub(super) fn open_place(
        weights: &Weights,
        spec: DecoderSpec,
        place: Option<Place>,
        options: &DecoderOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        if spec.head_dim > MAX_DIM || spec.heads / spec.kv_heads > MAX_GROUP {
            return Err(Error::unsupported(format!(
                "heads of {} in groups of {}: up to {MAX_DIM} in groups of {MAX_GROUP} are computed",
                spec.head_dim,
                spec.heads / spec.kv_heads
            )));
        }
        let (rows, sample_rows) = (options.max_rows.max(1), options.max_sample_rows.max(1));
        let plain = options.precision == Precision::Plain;
        let (shard, ranks) = match place {
            Some(Place { shard, ranks }) => (shard, Some(ranks)),
            None => (Shard::whole(&spec), None),
        };
        let leads = ranks.as_ref().is_none_or(|ranks| ranks.rank() == 0);
        let own = &shard.spec;
        let kv = KvPool::new(options.kv_layout(own), spec.layers, options.kv_bytes)?;
        let cpu = Cpu { pool: options.pool.clone(), isa: options.isa };
        let arena = Arena::default();
        let mut packer = Packer { cpu: &cpu, arena, weights, shard: &shard, plain, progress, done: 0 };
        let embedding = packer.matrix("token_embd.weight", Matrix::Words, None)?;
        let layers: Vec<Layer> = (0..spec.layers).map(|layer| packer.layer(layer)).collect::<Result<_>>()?;
        let norm = packer.norm("output_norm.weight")?;
        let (embedding, head) = match spec.tied_head {
            true => (None, embedding),
            false => (Some(embedding), packer.matrix("output.weight", Matrix::Words, None)?),
        };
        let head = Linear::new(vec![head], None);
        progress(1.0);

        let inputs_int8 = layers.iter().any(|layer| {
            layer.qkv.takes_int8() || layer.output.takes_int8() || layer.gate.takes_int8() || layer.up.takes_int8()
        });
        let middle_int8 = layers.iter().any(|layer| layer.down.takes_int8());
        let work = Work {
            x: Buffer::zeroed(rows * spec.hidden),
            qkv: Buffer::zeroed(rows * (own.q_width() + 2 * own.kv_width())),
            inputs: Activations::new(rows, spec.hidden.max(own.q_width()), inputs_int8),
            middle: Activations::new(rows, own.ffn, middle_int8),
            sampled: Activations::new(sample_rows, spec.hidden, head.takes_int8()),
            partial: Buffer::zeroed(if ranks.is_some() { rows * spec.hidden } else { 0 }),
            added: Buffer::zeroed(if spec.post_norms { rows * spec.hidden } else { 0 }),
            logits: Buffer::zeroed(if leads { sample_rows * spec.vocab } else { 0 }),
        };
        let rope = |rope: &spec::Rope| Rope::new(rope.frequencies(spec.head_dim), rows);
        Ok(Self {
            rope: rope(&spec.rope),
            window_rope: spec.window.as_ref().and_then(|window| window.rope.as_ref()).map(rope),
            attention: Attention::new(rows),
            adapters: Adapters::new(rows),
            max_rows: rows,
            max_sample_rows: sample_rows,
            spec,
            shard,
            ranks,
            cpu,
            embedding,
            layers,
            norm,
            head,
            kv,
            work,
        })
    }

    /// What it computes.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The threads that compute it.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.cpu.pool
    }

    /// KV blocks of the pool; valid ids are `0..blocks`.
    pub fn blocks(&self) -> usize {
        self.kv.blocks()
    }

    /// Tokens in a KV block.
    pub fn block_tokens(&self) -> usize {
        self.kv.layout().block_tokens
    }

    /// Bytes of a block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.kv.block_bytes()
    }

    /// Makes a block hold what another holds.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn copy(&mut self, from: u32, to: u32) {
        self.kv.copy(from as usize, to as usize);
    }

    /// Copies a block out of the pool.
    ///
    /// # Panics
    /// When there is no such block, or `out` has not its length.
    pub fn export(&self, block: u32, out: &mut [u8]) {
        self.kv.export(block as usize, out);
    }

    /// Copies a block into the pool, as it was exported.
    ///
    /// # Panics
    /// When there is no such block, or `from` has not its length.
    pub fn import(&mut self, block: u32, from: &[u8]) {
        self.kv.import(block as usize, from);
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let linears = layer.qkv.bytes() + layer.output.bytes() + layer.down.bytes();
            linears + layer.gate.bytes() + layer.up.bytes()
        };
        let embedding = self.embedding.as_ref().map_or(0, Panels::bytes);
        embedding + self.head.bytes() + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Writes K and V of all rows into their blocks and computes logits of `batch.sample_rows`: `[rows, vocab]` and the
    /// pool, whose threads are idle then. A row's logits have the same bits in any batch.
    ///
    /// # Errors
    /// `Internal` when the batch is larger than this decoder was opened for, or names what does not exist.
    pub fn forward(&mut self, batch: &Batch) -> Result<(&mut [f32], &Pool)> {
        self.forward_beside(batch, &mut || ())
    }

    /// [`Decoder::forward`], with something else for the calling thread to do: once, while the others compute.
    ///
    /// # Errors
    /// As [`Decoder::forward`], and then `errand` may not have been done.
    pub fn forward_beside(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<(&mut [f32], &Pool)> {
        self.check(batch)?;
        self.compute(batch, errand)?;
        Ok(self.logits(batch))
    }

    /// [`Decoder::forward_beside`] of a batch that was checked; in a group, together with all other ranks.
    ///
    /// # Errors
    /// `Internal` when another rank failed.
    pub(super) fn compute(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()> {
        self.embed(batch)?;
        for rope in std::iter::once(&mut self.rope).chain(&mut self.window_rope) {
            rope.set(&self.cpu, &batch.positions);
        }
        let spans = batch.spans.iter().map(|span| KvSpan {
            row: span.row as usize,
            rows: span.rows as usize,
            start: span.start as usize,
            table: span.table as usize,
        });
        self.attention.plan(spans, self.shard.spec.heads / self.shard.spec.kv_heads);
        let adapted = batch.spans.iter().map(|span| (span.rows as usize, span.adapter as usize));
        self.adapters.plan(self.cpu.isa, batch.adapters.len(), adapted);
        for layer in 0..self.layers.len() {
            match layer {
                0 => self.attend(layer, batch, errand)?,
                _ => self.attend(layer, batch, &mut || ())?,
            }
            self.feed_forward(layer, batch)?;
        }
        self.head(batch)
    }

    /// Logits of the step that was computed last, `[rows, vocab]`, and the pool, whose threads are idle.
    pub(super) fn logits(&mut self, batch: &Batch) -> (&mut [f32], &Pool) {
        (&mut self.work.logits[..batch.sample_rows.len() * self.spec.vocab], &self.cpu.pool)
    }

    /// Tells all other ranks that this one cannot go on.
    pub(super) fn abandon(&self) {
        if let Some(ranks) = &self.ranks {
            ranks.fail();
        }
    }

    /// Whether a batch can be computed.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        batch.check(&Bounds {
            rows: self.max_rows,
            sample_rows: self.max_sample_rows,
            vocab: self.spec.vocab,
            blocks: self.kv.blocks(),
            block_tokens: self.block_tokens(),
        })?;
        match batch.adapters.iter().find(|adapter| !adapter.fits(&self.spec)) {
            Some(adapter) => {
                Err(Error::internal(format!("a batch that cannot be computed: {adapter:?} is for another model")))
            }
            None => Ok(()),
        }
    }

    /// x = the rows of the embedding. A rank knows those of its own words, and the others are nothing in its sum.
    fn embed(&mut self, batch: &Batch) -> Result<()> {
        let (hidden, rows, words) = (self.spec.hidden, batch.rows(), &self.shard.vocab);
        let scale = self.spec.embedding_scale;
        let Work { x, partial, .. } = &mut self.work;
        let into = if self.ranks.is_some() { partial.share() } else { x.share() };
        each_row(&self.cpu, rows, hidden, |row| {
            // SAFETY: each row is handed out once.
            let out = unsafe { into.part(row * hidden, hidden) };
            let token = batch.tokens[row] as usize;
            match &self.embedding {
                _ if !words.contains(&token) => out.fill(0.0),
                Some(embedding) => embedding.channel(token - words.start, out),
                None => self.head.channel(token - words.start, out),
            }
            if scale != 1.0 {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        });
        let Some(ranks) = &mut self.ranks else { return Ok(()) };
        x[..rows * hidden].fill(0.0);
        ranks.all_reduce(&self.cpu, &partial[..rows * hidden], &mut x[..rows * hidden])
    }

    /// x += output(attention(rope(qkv(norm(x))))); heads are normed before they are turned, and the outcome, where the family does
    fn attend(&mut self, index: usize, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()> {
        let (spec, cpu, work, layer) = (&self.shard.spec, &self.cpu, &mut self.work, &self.layers[index]);
        let (rows, dim) = (batch.rows(), spec.head_dim);
        let (q_width, kv_width) = (spec.q_width(), spec.kv_width());
        let stride = q_width + 2 * kv_width;
        let layout = *self.kv.layout();

        let int8 = layer.qkv.takes_int8();
        work.inputs.norm(cpu, &work.x, &layer.attention_norm, spec.norm_eps, rows, |row| row, int8);
        let find = |adapter: usize| Some(&batch.adapters[adapter].layers[index].qkv);
        let delta = self.adapters.project(cpu, &work.inputs, 3, self.shard.cut_qkv(), &find);
        let out = Out::Set(&mut work.qkv[..rows * stride]);
        layer.qkv.apply_beside(errand, cpu, &work.inputs, rows, out, delta);

        let window = spec.window_of(index);
        let rope = self.window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(&self.rope);
        let (qkv, blocks) = (work.qkv.share(), self.kv.share(index));
        let norms = layer.head_norms.as_ref();
        each_row(cpu, rows, stride, |row| {
            // SAFETY: each row is handed out once.
            let (q, kv) = unsafe { qkv.part(row * stride, stride) }.split_at_mut(q_width);
            let (keys, values) = kv.split_at_mut(kv_width);
            if let Some([of_queries, of_keys]) = norms {
                let norm = |head: &mut [f32], weight| norm_in_place(cpu.isa, head, weight, spec.norm_eps);
                q.chunks_exact_mut(dim).for_each(|head| norm(head, of_queries));
                keys.chunks_exact_mut(dim).for_each(|head| norm(head, of_keys));
            }
            q.chunks_exact_mut(dim).for_each(|head| rotate(cpu.isa, head, rope.of(row)));
            let (block, slot) = place(batch, row, layout.block_tokens);
            for (head, (key, value)) in keys.chunks_exact_mut(dim).zip(values.chunks_exact(dim)).enumerate() {
                rotate(cpu.isa, key, rope.of(row));
                // SAFETY: the batch was checked, so the block exists; two rows never share a slot.
                unsafe {
                    let block = blocks.at(block * layout.block_bytes());
                    layout.write(cpu.isa, block, slot, head, key, value);
                }
            }
        });

        let query = Query {
            q: &work.qkv[..rows * stride],
            stride,
            heads: spec.heads,
            scale: spec.score_scale,
            window,
            out: &mut work.inputs.floats(q_width)[..rows * q_width],
        };
        self.attention.run(cpu, &layout, self.kv.layer(index), &batch.tables, query);
        if layer.output.takes_int8() {
            work.inputs.quantize(cpu, rows);
        }
        let find = |adapter: usize| Some(&batch.adapters[adapter].layers[index].output);
        let delta = self.adapters.project(cpu, &work.inputs, 1, self.shard.cut_output(), &find);
        let post = layer.post_norms.as_ref().map(|[attention, _]| (&attention[..], spec.norm_eps));
        let Work { x, partial, added, inputs, .. } = work;
        add(self.ranks.as_mut(), cpu, &layer.output, inputs, rows, post, [x, partial, added], delta)
    }

    /// x += down(act(gate(norm(x))) * up(norm(x))), the outcome normed where the family does
    fn feed_forward(&mut self, index: usize, batch: &Batch) -> Result<()> {
        let (spec, cpu, work, layer) = (&self.shard.spec, &self.cpu, &mut self.work, &self.layers[index]);
        let rows = batch.rows();
        let int8 = layer.gate.takes_int8() || layer.up.takes_int8();
        work.inputs.norm(cpu, &work.x, &layer.ffn_norm, spec.norm_eps, rows, |row| row, int8);
        let middle = &mut work.middle.floats(spec.ffn)[..rows * spec.ffn];
        let find = |adapter: usize| Some(&batch.adapters[adapter].layers[index].ffn);
        let delta = self.adapters.project(cpu, &work.inputs, 2, self.shard.cut_ffn(), &find);
        gated(cpu, spec.gate, &layer.gate, &layer.up, &work.inputs, rows, middle, delta);
        if layer.down.takes_int8() {
            work.middle.quantize(cpu, rows);
        }
        let find = |adapter: usize| Some(&batch.adapters[adapter].layers[index].down);
        let delta = self.adapters.project(cpu, &work.middle, 1, self.shard.cut_down(), &find);
        let post = layer.post_norms.as_ref().map(|[_, ffn]| (&ffn[..], spec.norm_eps));
        let Work { x, partial, added, middle, .. } = work;
        add(self.ranks.as_mut(), cpu, &layer.down, middle, rows, post, [x, partial, added], delta)
    }

    /// Logits of the sampled rows: a rank's columns are those of its words.
    fn head(&mut self, batch: &Batch) -> Result<()> {
        let (cpu, work, head, vocab) = (&self.cpu, &mut self.work, &self.head, self.spec.vocab);
        let sampled = batch.sample_rows.len();
        let pick = |row: usize| batch.sample_rows[row] as usize;
        work.sampled.norm(cpu, &work.x, &self.norm, self.spec.norm_eps, sampled, pick, head.takes_int8());
        if sampled == 0 {
            return Ok(());
        }
        let Work { sampled: inputs, logits, .. } = work;
        match &mut self.ranks {
            None => head.apply(cpu, inputs, sampled, Out::Set(&mut logits[..sampled * vocab])),
            Some(ranks) => ranks.gather(logits, |out| {
                let out = Out::Columns { out, stride: vocab, first: self.shard.vocab.start };
                head.apply(cpu, inputs, sampled, out);
            })?,
        }
        Ok(())
    }
}

/// `x += linear(inputs)` and what adapters add: all ranks' parts of it, where there are ranks, and normed before, where there are
/// weights and an epsilon for that.
#[allow(clippy::too_many_arguments)]
fn add(
    ranks: Option<&mut Collective>,
    cpu: &Cpu,
    linear: &Linear,
    inputs: &Activations,
    rows: usize,
    post: Option<(&[f32], f32)>,
    [x, partial, added]: [&mut [f32]; 3],
    delta: Option<Delta<'_>>,
) -> Result<()> {
    let width = linear.channels();
    let count = rows * width;
    let into = if post.is_some() { &mut added[..count] } else { &mut x[..count] };
    match ranks {
        None if post.is_some() => linear.apply_adapted(cpu, inputs, rows, Out::Set(into), delta),
        None => linear.apply_adapted(cpu, inputs, rows, Out::Add(into), delta),
        Some(ranks) => {
            linear.apply_adapted(cpu, inputs, rows, Out::Set(&mut partial[..count]), delta);
            if post.is_some() {
                into.fill(0.0);
            }
            ranks.all_reduce(cpu, &partial[..count], into)?;
        }
    }
    let Some((weight, eps)) = post else { return Ok(()) };
    let (x, added) = (Shared::new(&mut x[..count]), Shared::new(&mut added[..count]));
    each_row(cpu, rows, width, |row| {
        // SAFETY: each row is handed out once.
        let (x, added) = unsafe { (x.part(row * width, width), added.part(row * width, width)) };
        norm_in_place(cpu.isa, added, weight, eps);
        x.iter_mut().zip(added).for_each(|(x, added)| *x += *added);
    });
    Ok(())
}

/// Block and slot of a row's own token.
fn place(batch: &Batch, row: usize, block_tokens: usize) -> (usize, usize) {
    let after = batch.spans.partition_point(|span| span.row as usize <= row);
    let span = &batch.spans[after - 1];
    let position = span.start as usize + row - span.row as usize;
    (batch.table(span)[position / block_tokens] as usize, position % block_tokens)
}
