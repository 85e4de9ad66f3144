//! The decoder on a GPU: as [`crate::model::Decoder`], with everything that a step touches in the device's memory.
//!
//! ```text
//! host    Batch ── ids, positions, slots, tables, items of attention ──> device     logits <── last
//! device  embed ─> x ─┬─ norm ─ qkv ─ rope + K, V into pages ─ attention ─ output ─(+)─┬─ norm ─ gate, up ─ silu·mul ─ down ─(+)─
//!                     └──────────────────────────────────────────────────────────────┘└─────────────────────────────────────┘
//! ```
//!
//! All memory is taken when the model is loaded. Activations are bf16, sums f32; matrices are bf16, or fp8 with a scale a
//! channel, whose rows are quantised in the step before them. A [`GpuDecoder`] belongs to one thread; any error is the device's,
//! and nothing of it can be trusted afterwards.

use std::sync::Arc;

use half::bf16;

use crate::base::{Error, Result};
use crate::kernel::gpu::{
    Attention, Bits, Card, Fp8, Gate, Heads, Item, Keys, LARGE_UNIT, Merge, NARROW, Norm, Normed, PagedKv, Ptr, RopeKv,
    SMALL_ROWS, Scaled, WIDE, Weight, add_rms_norm, copy_blocks, embed, gather_rows, gemm_small, quantize_fp8,
    rope_kv_write, silu_mul,
};
use crate::kernel::quant::dequantize_row;
use crate::kernel::{Pool, Shared};
use crate::model::Batch;
use crate::model::batch::Bounds;
use crate::model::layers::halves;
use crate::model::spec::{DecoderSpec, RopeStyle};
use crate::model::weights::Weights;

/// Weights that are converted on the host before they are sent.
const CHUNK: usize = 4 << 20;

/// How numbers are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// As computed.
    Bf16,
    /// Half as large, and half as much to read: 3 bits of mantissa and a scale.
    Fp8,
}

/// How a decoder is laid out on a GPU.
#[derive(Clone)]
pub struct GpuOptions {
    /// Threads of the host, which convert weights and draw tokens.
    pub pool: Arc<Pool>,
    /// Of all matrices but the embedding and the head.
    pub weights: Format,
    /// Of keys and values.
    pub kv: Format,
    /// Size of the KV pool.
    pub kv_bytes: usize,
    /// Tokens in a KV block: a power of two.
    pub block_tokens: usize,
    /// Rows in a step, at most.
    pub max_rows: usize,
    /// Rows with logits in a step, at most.
    pub max_sample_rows: usize,
    /// Sequences in a step, at most.
    pub max_sequences: usize,
    /// Tokens of a sequence, at most.
    pub context: usize,
}

/// A model ready to compute: weights, KV pool and work buffers on a device.
pub struct GpuDecoder {
    card: Box<dyn Card>,
    spec: DecoderSpec,
    options: GpuOptions,
    heads: Heads,
    /// `[vocab, hidden]`
    embedding: Ptr<bf16>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Matrix,
    frequencies: Ptr<f32>,
    kv: KvPool,
    step: Step,
    work: Work,
    attention: Attention,
    logits: Vec<f32>,
    /// What a copy of blocks ran into: the next step says so.
    failed: Option<Error>,
}

struct Layer {
    attention_norm: Norm,
    qkv: Matrix,
    /// Of the model's, all heads; null if it has none.
    bias: Ptr<bf16>,
    output: Matrix,
    ffn_norm: Norm,
    gate_up: Matrix,
    down: Matrix,
}

/// `n` channels of `k` inputs.
#[derive(Clone, Copy)]
struct Matrix {
    n: usize,
    k: usize,
    data: Data,
}

#[derive(Clone, Copy)]
enum Data {
    Bf16(Ptr<bf16>),
    Fp8(Scaled),
}

/// Rows on their way into a matrix.
#[derive(Clone, Copy)]
struct Rows {
    bf16: Ptr<bf16>,
    fp8: Ptr<Fp8>,
    scales: Ptr<f32>,
}

impl Rows {
    fn alloc(card: &dyn Card, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { bf16: card.alloc(rows * width)?, fp8: card.alloc(rows * width)?, scales: card.alloc(rows)? })
    }

    /// Where they go for this matrix.
    fn for_matrix(&self, matrix: &Matrix) -> Normed {
        match matrix.data {
            Data::Bf16(_) => Normed::Bf16(self.bf16),
            Data::Fp8(_) => Normed::Fp8(self.fp8, self.scales),
        }
    }
}

struct KvPool {
    /// Keys of layer 0, values of layer 0, keys of layer 1, …
    data: Ptr<u8>,
    blocks: usize,
    /// Of a block's keys in a layer.
    block_bytes: usize,
    block_shift: u32,
    /// From and to.
    pair: Ptr<i32>,
}

impl KvPool {
    /// From the keys of a layer to its values, and on to the next layer's keys.
    fn stride(&self) -> usize {
        self.blocks * self.block_bytes
    }

    fn layer(&self, format: Format, layer: usize) -> PagedKv {
        let at = |index: usize| self.data.part(index * self.stride(), self.stride()).address();
        let (keys, values) = (at(2 * layer), at(2 * layer + 1));
        // SAFETY: parts of the pool, which are as long.
        let data = unsafe {
            match format {
                Format::Bf16 => Keys::Bf16(Ptr::new(keys, self.stride() / 2), Ptr::new(values, self.stride() / 2)),
                Format::Fp8 => Keys::Fp8(Ptr::new(keys, self.stride()), Ptr::new(values, self.stride())),
            }
        };
        PagedKv { data, block_shift: self.block_shift, k_scale: 1.0, v_scale: 1.0 }
    }
}

/// What a step is told, on the host and on the device.
struct Step {
    ids: Told<i32>,
    positions: Told<i32>,
    slots: Told<i32>,
    sampled: Told<i32>,
    tables: Told<i32>,
    narrow: Told<Item>,
    wide: Told<Item>,
    narrow_merges: Told<Merge>,
    wide_merges: Told<Merge>,
}

struct Told<T> {
    host: Vec<T>,
    device: Ptr<T>,
}

impl<T: Bits> Told<T> {
    fn alloc(card: &dyn Card, most: usize) -> Result<Self> {
        Ok(Self { host: Vec::with_capacity(most), device: card.alloc(most)? })
    }

    fn tell(&mut self, card: &dyn Card, values: impl IntoIterator<Item = T>) -> Result<()> {
        self.host.clear();
        self.host.extend(values);
        card.upload(&self.host, self.device)
    }
}

/// What a step computes in; sized for the largest one.
struct Work {
    /// The residual stream, `[rows, hidden]`.
    x: Ptr<bf16>,
    /// `[rows, hidden]` or `[rows, q width]`, into a matrix.
    inputs: Rows,
    /// `[rows, q, k and v of all heads]`
    qkv: Ptr<bf16>,
    /// `[rows, 2 * ffn]`
    gate_up: Ptr<bf16>,
    /// `[rows, ffn]`
    middle: Rows,
    /// Sums of attention that are merged.
    partial: Ptr<f32>,
    /// `[sampled rows, hidden]`
    sampled: Ptr<bf16>,
    /// `[sampled rows, vocab]`, the vocabulary rounded up to eights.
    logits: Ptr<bf16>,
    /// The same on the host.
    landed: Vec<bf16>,
}

impl GpuDecoder {
    /// Sends the weights to the device and takes all memory that a step needs. `progress` hears how much is sent, 0 to 1.
    ///
    /// # Errors
    /// `ModelUnavailable` when a tensor is missing or broken or the device has not the memory, `Unsupported` for shapes the
    /// kernels do not have, `BadInput` when the KV pool is too small, and whatever the device says.
    pub fn open(
        card: Box<dyn Card>,
        weights: &Weights,
        spec: DecoderSpec,
        options: &GpuOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let options = options.clone();
        let heads = Heads { heads: spec.heads, kv_heads: spec.kv_heads, dim: spec.head_dim };
        Attention::takes(heads)?;
        let widths = [("hidden size", spec.hidden), ("query width", spec.q_width()), ("feed-forward", spec.ffn)];
        let unit = if options.weights == Format::Fp8 { 64 } else { 32 };
        if let Some((what, width)) = widths.iter().find(|(_, width)| !width.is_multiple_of(unit)) {
            return Err(Error::unsupported(format!("a {what} of {width}: GPU kernels take multiples of {unit}")));
        }
        if !options.block_tokens.is_power_of_two() {
            let tokens = options.block_tokens;
            return Err(Error::bad_input(format!("block_tokens is {tokens}: on a GPU it is a power of two")));
        }
        // Room for rows that are computed for nothing.
        let [rows, sample_rows] =
            [options.max_rows, options.max_sample_rows].map(|rows| rows.max(1).next_multiple_of(LARGE_UNIT));

        let mut loader =
            Loader { card: &*card, weights, pool: &options.pool, progress, done: 0, sent: vec![], scratch: None };
        let embedding = loader.matrix(&["token_embd.weight"], None, Format::Bf16)?;
        let layers: Vec<Layer> =
            (0..spec.layers).map(|layer| loader.layer(&spec, layer, options.weights)).collect::<Result<_>>()?;
        let norm = loader.norm("output_norm.weight", spec.norm_eps)?;
        let head = match spec.tied_head {
            true => embedding,
            false => loader.matrix(&["output.weight"], None, Format::Bf16)?,
        };
        let Data::Bf16(embedding) = embedding.data else {
            return Err(Error::internal("the embedding is not in bf16"));
        };
        let frequencies = spec.rope.frequencies(spec.head_dim);
        let frequencies_at = card.alloc(frequencies.len())?;
        card.upload(&frequencies, frequencies_at)?;

        let element = if options.kv == Format::Bf16 { 2 } else { 1 };
        let block_bytes = spec.kv_width() * options.block_tokens * element;
        let blocks = options.kv_bytes / (2 * spec.layers * block_bytes);
        if blocks == 0 {
            return Err(Error::bad_input(format!(
                "kv_bytes is {}, but a block of {} tokens takes {}: give the KV pool more",
                options.kv_bytes,
                options.block_tokens,
                2 * spec.layers * block_bytes
            )));
        }
        let kv = KvPool {
            data: card.alloc(2 * spec.layers * blocks * block_bytes)?,
            blocks,
            block_bytes,
            block_shift: options.block_tokens.trailing_zeros(),
            pair: card.alloc(2)?,
        };

        // Attention is cut until there are so many blocks of threads.
        let wanted = 2 * card.processors();
        let tables = options.max_sequences * options.context.div_ceil(options.block_tokens);
        let step = Step {
            ids: Told::alloc(&*card, rows)?,
            positions: Told::alloc(&*card, rows)?,
            slots: Told::alloc(&*card, rows)?,
            sampled: Told::alloc(&*card, sample_rows)?,
            tables: Told::alloc(&*card, tables)?,
            narrow: Told::alloc(&*card, rows + wanted)?,
            wide: Told::alloc(&*card, rows + wanted)?,
            narrow_merges: Told::alloc(&*card, rows + wanted)?,
            wide_merges: Told::alloc(&*card, rows + wanted)?,
        };
        let work = Work {
            x: card.alloc(rows * spec.hidden)?,
            inputs: Rows::alloc(&*card, rows.max(sample_rows), spec.hidden.max(spec.q_width()))?,
            qkv: card.alloc(rows * (spec.q_width() + 2 * spec.kv_width()))?,
            gate_up: card.alloc(rows * 2 * spec.ffn)?,
            middle: Rows::alloc(&*card, rows, spec.ffn)?,
            partial: card.alloc(wanted * WIDE * (spec.head_dim + 2))?,
            sampled: card.alloc(sample_rows * spec.hidden)?,
            logits: card.alloc(sample_rows * head.n)?,
            landed: vec![bf16::ZERO; sample_rows * head.n],
        };
        progress(1.0);
        Ok(Self {
            heads,
            embedding,
            layers,
            norm,
            head,
            frequencies: frequencies_at,
            kv,
            step,
            work,
            attention: Attention::default(),
            logits: vec![0.0; sample_rows * spec.vocab],
            failed: None,
            card,
            spec,
            options,
        })
    }

    /// What it computes.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
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

    /// Writes K and V of all rows into their blocks and computes logits of `batch.sample_rows`: `[rows, vocab]` and the host's
    /// threads. Calls `errand` when all is launched.
    ///
    /// # Errors
    /// `Internal` when the batch is larger than this decoder was opened for or names what does not exist, and whatever the
    /// device says: then nothing of it can be trusted.
    pub fn forward(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<(&mut [f32], &Pool)> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        batch.check(&Bounds {
            rows: self.options.max_rows,
            sample_rows: self.options.max_sample_rows,
            vocab: self.spec.vocab,
            blocks: self.kv.blocks,
            block_tokens: self.options.block_tokens,
        })?;
        self.tell(batch)?;
        let rows = batch.rows();
        let (card, spec, work) = (&*self.card, &self.spec, &self.work);
        embed(card, rows, self.step.ids.device, self.embedding, spec.hidden, 0..spec.vocab, 1.0, work.x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(index, layer, rows)?;
            self.feed_forward(layer, rows)?;
        }
        let sampled = batch.sample_rows.len();
        if sampled > 0 {
            gather_rows(card, sampled, work.x, self.step.sampled.device, spec.hidden, work.sampled)?;
            let normed = Normed::Bf16(work.inputs.bf16);
            add_rms_norm(card, sampled, spec.hidden, work.sampled, Ptr::null(), self.norm, normed)?;
            self.product(&self.head, work.inputs, sampled, work.logits, false)?;
        }
        errand();
        self.land(sampled)
    }

    /// Brings the logits over.
    fn land(&mut self, sampled: usize) -> Result<(&mut [f32], &Pool)> {
        let (vocab, width) = (self.spec.vocab, self.head.n);
        let landed = &mut self.work.landed[..sampled * width];
        self.card.download(self.work.logits, landed)?;
        let logits = &mut self.logits[..sampled * vocab];
        let out = Shared::new(logits);
        self.options.pool.each(sampled, 1, |row| {
            // SAFETY: each row is handed out once.
            let out = unsafe { out.part(row * vocab, vocab) };
            out.iter_mut().zip(&landed[row * width..]).for_each(|(out, logit)| *out = logit.to_f32());
        });
        Ok((&mut self.logits[..sampled * vocab], &self.options.pool))
    }

    /// Sends what the kernels are told of a step.
    fn tell(&mut self, batch: &Batch) -> Result<()> {
        let (card, step, tokens) = (&*self.card, &mut self.step, self.options.block_tokens);
        step.ids.tell(card, batch.tokens.iter().map(|&token| token as i32))?;
        step.positions.tell(card, batch.positions.iter().map(|&position| position as i32))?;
        let slots = batch.spans.iter().flat_map(|span| {
            let table = batch.table(span);
            (span.start as usize..(span.start + span.rows) as usize)
                .map(move |position| (table[position / tokens] as usize * tokens + position % tokens) as i32)
        });
        step.slots.tell(card, slots)?;
        step.sampled.tell(card, batch.sample_rows.iter().map(|&row| row as i32))?;
        step.tables.tell(card, batch.tables.iter().map(|&block| block as i32))?;
        let spans = batch
            .spans
            .iter()
            .map(|span| (span.row as usize, span.rows as usize, span.start as usize, span.table as usize));
        let Heads { heads, kv_heads, .. } = self.heads;
        self.attention.plan(spans, heads / kv_heads, kv_heads, 0, 2 * card.processors());
        step.narrow.tell(card, self.attention.narrow.iter().copied())?;
        step.wide.tell(card, self.attention.wide.iter().copied())?;
        step.narrow_merges.tell(card, self.attention.narrow_merges.iter().copied())?;
        step.wide_merges.tell(card, self.attention.wide_merges.iter().copied())
    }

    /// x += output(attention(rope(qkv(norm(x)))))
    fn attend(&self, index: usize, layer: &Layer, rows: usize) -> Result<()> {
        let (card, spec, work, step, heads) = (&*self.card, &self.spec, &self.work, &self.step, self.heads);
        let into = work.inputs.for_matrix(&layer.qkv);
        add_rms_norm(card, rows, spec.hidden, work.x, Ptr::null(), layer.attention_norm, into)?;
        self.product(&layer.qkv, work.inputs, rows, work.qkv, false)?;
        let none = Norm { weight: Ptr::null(), eps: 0.0, offset: 0.0 };
        let rope =
            RopeKv { frequencies: self.frequencies, magnitude: 1.0, bias: layer.bias, q_norm: none, k_norm: none };
        let kv = self.kv.layer(self.options.kv, index);
        rope_kv_write(card, rows, heads, work.qkv, step.positions.device, step.slots.device, &rope, &kv)?;
        let scale = 1.0 / (spec.head_dim as f32).sqrt();
        let attended = work.inputs.bf16;
        for (tile, items, merges) in
            [(NARROW, &step.narrow, &step.narrow_merges), (WIDE, &step.wide, &step.wide_merges)]
        {
            let most = merges.host.iter().map(|merge| merge.rows as usize).max().unwrap_or(0);
            Attention::run(
                card,
                tile,
                (items.device, items.host.len()),
                (merges.device, merges.host.len(), most),
                heads,
                work.qkv,
                layer.qkv.n,
                &kv,
                step.tables.device,
                scale,
                0,
                attended,
                work.partial,
            )?;
        }
        if let Normed::Fp8(out, scales) = work.inputs.for_matrix(&layer.output) {
            quantize_fp8(card, (rows, spec.q_width()), attended, out, scales)?;
        }
        self.product(&layer.output, work.inputs, rows, work.x, true)
    }

    /// x += down(silu(gate(norm(x))) * up(norm(x)))
    fn feed_forward(&self, layer: &Layer, rows: usize) -> Result<()> {
        let (card, spec, work) = (&*self.card, &self.spec, &self.work);
        let into = work.inputs.for_matrix(&layer.gate_up);
        add_rms_norm(card, rows, spec.hidden, work.x, Ptr::null(), layer.ffn_norm, into)?;
        self.product(&layer.gate_up, work.inputs, rows, work.gate_up, false)?;
        silu_mul(card, rows, spec.ffn, work.gate_up, Gate::Silu, work.middle.for_matrix(&layer.down))?;
        self.product(&layer.down, work.middle, rows, work.x, true)
    }

    /// `out = x * matrix^T`, or `out += …` with `add`.
    fn product(&self, matrix: &Matrix, x: Rows, rows: usize, out: Ptr<bf16>, add: bool) -> Result<()> {
        let (card, Matrix { n, k, data }) = (&*self.card, *matrix);
        let part = |first: usize, count: usize| match data {
            Data::Bf16(data) => Weight::Bf16(data, x.bf16.part(first * k, count * k)),
            Data::Fp8(data) => {
                let x = Scaled { data: x.fp8.part(first * k, count * k), scales: x.scales.part(first, count) };
                Weight::Fp8(data, x)
            }
        };
        let whole = rows.next_multiple_of(LARGE_UNIT);
        if rows > SMALL_ROWS && card.product((whole, n, k), part(0, whole), out.part(0, whole * n), n, add)? {
            return Ok(());
        }
        for first in (0..rows).step_by(SMALL_ROWS) {
            let count = SMALL_ROWS.min(rows - first);
            gemm_small(card, (count, n, k), part(first, count), out.part(first * n, count * n), n, add)?;
        }
        Ok(())
    }
}

/// Brings a file's tensors to the device, and says how far it is.
struct Loader<'a> {
    card: &'a dyn Card,
    weights: &'a Weights,
    pool: &'a Pool,
    progress: &'a (dyn Fn(f32) + Sync),
    /// Bytes of tensors sent so far.
    done: u64,
    /// A chunk on the host.
    sent: Vec<bf16>,
    /// A chunk on the device, on its way to fp8.
    scratch: Option<Ptr<bf16>>,
}

impl Loader<'_> {
    fn layer(&mut self, spec: &DecoderSpec, layer: usize, format: Format) -> Result<Layer> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [q, k, v] = ["attn_q.weight", "attn_k.weight", "attn_v.weight"].map(name);
        let heads = (spec.rope.style == RopeStyle::Interleaved).then_some(spec.head_dim);
        let bias = if spec.qkv_bias {
            let mut bias = Vec::new();
            for (part, heads) in [("attn_q.bias", heads), ("attn_k.bias", heads), ("attn_v.bias", None)] {
                let values = self.weights.tensor(&name(part))?.to_f32()?;
                bias.extend((0..values.len()).map(|channel| bf16::from_f32(values[halves(heads, channel)])));
            }
            let at = self.card.alloc(bias.len())?;
            self.card.upload(&bias, at)?;
            at
        } else {
            Ptr::null()
        };
        Ok(Layer {
            attention_norm: self.norm(&name("attn_norm.weight"), spec.norm_eps)?,
            qkv: self.matrix(&[&q, &k, &v], heads, format)?,
            bias,
            output: self.matrix(&[&name("attn_output.weight")], None, format)?,
            ffn_norm: self.norm(&name("ffn_norm.weight"), spec.norm_eps)?,
            gate_up: self.matrix(&[&name("ffn_gate.weight"), &name("ffn_up.weight")], None, format)?,
            down: self.matrix(&[&name("ffn_down.weight")], None, format)?,
        })
    }

    fn norm(&mut self, name: &str, eps: f32) -> Result<Norm> {
        let values: Vec<bf16> = self.weights.tensor(name)?.to_f32()?.into_iter().map(bf16::from_f32).collect();
        let weight = self.card.alloc(values.len())?;
        self.card.upload(&values, weight)?;
        Ok(Norm { weight, eps, offset: 0.0 })
    }

    /// Matrices of the same inputs, one below the other, rows of zeros behind them up to a multiple of 8. The rows of all but a
    /// third are put into halves when they are interleaved heads of `heads` numbers.
    fn matrix(&mut self, names: &[&str], heads: Option<usize>, format: Format) -> Result<Matrix> {
        let tensors = names.iter().map(|name| self.weights.tensor(name)).collect::<Result<Vec<_>>>()?;
        let k = tensors[0].cols;
        let n = tensors.iter().map(|tensor| tensor.rows).sum::<usize>().next_multiple_of(8);
        if let Some(other) = tensors.iter().position(|tensor| tensor.cols != k) {
            return Err(Error::internal(format!("{} and {} have other inputs", names[0], names[other])));
        }
        let data = match format {
            Format::Bf16 => Data::Bf16(self.card.alloc(n * k)?),
            Format::Fp8 => Data::Fp8(Scaled { data: self.card.alloc(n * k)?, scales: self.card.alloc(n)? }),
        };
        let mut below = 0;
        for (index, (tensor, name)) in tensors.iter().zip(names).enumerate() {
            let heads = heads.filter(|_| index < 2);
            let most = (CHUNK / k).max(1);
            for first in (0..tensor.rows).step_by(most) {
                let rows = most.min(tensor.rows - first);
                self.sent.resize(rows * k, bf16::ZERO);
                let sent = Shared::new(&mut self.sent[..]);
                self.pool.each(rows, 1, |row| {
                    let mut values = vec![0f32; k];
                    // Cannot fail: the tensor's length was checked when its file was opened.
                    let read = dequantize_row(tensor.dtype, tensor.row(halves(heads, first + row)), &mut values);
                    debug_assert!(read.is_ok());
                    // SAFETY: each row is handed out once.
                    let out = unsafe { sent.part(row * k, k) };
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(value));
                });
                let at = below + first;
                match data {
                    Data::Bf16(data) => self.card.upload(&self.sent, data.part(at * k, rows * k))?,
                    Data::Fp8(Scaled { data, scales }) => {
                        let scratch = match self.scratch.filter(|scratch| scratch.len() >= rows * k) {
                            Some(scratch) => scratch,
                            None => *self.scratch.insert(self.card.alloc(CHUNK.max(rows * k))?),
                        };
                        self.card.upload(&self.sent, scratch)?;
                        let (data, scales) = (data.part(at * k, rows * k), scales.part(at, rows));
                        quantize_fp8(self.card, (rows, k), scratch, data, scales)?;
                    }
                }
            }
            below += tensor.rows;
            self.done += tensor.data.len() as u64;
            self.weights.release(name);
            (self.progress)((self.done as f64 / self.weights.bytes().max(1) as f64).min(1.0) as f32);
        }
        Ok(Matrix { n, k, data })
    }
}

#[cfg(test)]
#[cfg(feature = "emulate")]
#[path = "gpu_test.rs"]
mod tests;
