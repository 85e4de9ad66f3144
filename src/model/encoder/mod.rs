//! The encoder on a CPU (`gpu.rs`: on a GPU): packed rows of many texts in, a vector or scores for each text out. No padding, nothing kept
//! between steps.
//!
//!     rows of all texts, back to back        a0 a1 a2 b0 b1 c0 c1 c2 c3
//!       block of some rows, one thread       embed ─ norm ─ qkv of layer 0 ─┐
//!     ── all threads meet ──                                               K, V
//!       (text, head)                         softmax(q K) V, both ways
//!     ── all threads meet ──
//!       block of some rows, one thread       output ─(+) norm ─ up ─ gelu ─ down ─(+) norm ─ qkv of the next layer
//!     …
//!     each text                              first row | mean of rows ─ to length 1 | head ─> logits
//!
//! Threads meet twice a layer, and a block of rows stays in its thread's cache between. Matrices are computed in 16-bit
//! integers (`kernel/words.rs`): two to three times as fast as f32, and the vectors agree with it to the fifth digit.

mod gpu;
pub(super) mod spec;
mod text;

pub use gpu::GpuEncoder;
pub use spec::{EncoderSpec, Head};
pub use text::{EncoderText, Tokens};

use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::{Error, Result};
use crate::config::Precision;
use crate::kernel::quant::dequantize_row;
use crate::kernel::{
    Arena, Attention, Buffer, Cpu, Dtype, Isa, KvLayout, KvSpan, MAX_DIM, Pool, Query, Shared, Source, Then, WordRows,
    Words, each_row, layer_norm,
};
use crate::model::weights::Weights;
use crate::task::Pooling;

/// Rows that a thread takes through a layer at a time: their middle stays in L2.
const ROWS: usize = 64;
/// Tokens in a block of keys and values: what attention reads as one vector.
const BLOCK_TOKENS: usize = 16;
/// Texts in a step, at most.
const MAX_TEXTS: usize = 512;

/// How an encoder is laid out on its device.
#[derive(Clone)]
pub struct EncoderOptions {
    /// Worker threads.
    pub pool: Arc<Pool>,
    /// Instruction set: [`Isa::detect`], or another of [`Isa::available`] for comparisons.
    pub isa: Isa,
    /// Arithmetic of the weights.
    pub precision: Precision,
    /// Rows in a step, at most.
    pub max_rows: usize,
}

/// What an encoder computes in one step. Reused from step to step, so that a step allocates nothing.
#[derive(Clone, Default, Debug)]
pub struct EncodeBatch {
    /// Token ids, `[rows]`.
    tokens: Vec<u32>,
    texts: Vec<Text>,
}

#[derive(Clone, Copy, Debug)]
struct Text {
    row: usize,
    rows: usize,
    /// Tokens from this one on belong to the second segment.
    second: usize,
    pooling: Pooling,
}

impl EncodeBatch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.texts.clear();
    }

    /// Appends a text, at least one token long.
    pub fn push(&mut self, text: &Tokens, pooling: Pooling) {
        debug_assert!(!text.ids.is_empty());
        let (row, rows) = (self.tokens.len(), text.ids.len());
        self.texts.push(Text { row, rows, second: text.second as usize, pooling });
        self.tokens.extend_from_slice(&text.ids);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens of each text.
    pub fn each_text(&self) -> impl Iterator<Item = &[u32]> {
        self.texts.iter().map(|text| &self.tokens[text.row..][..text.rows])
    }

    /// Whether an encoder of steps of up to `most` rows can compute it.
    fn check(&self, spec: &EncoderSpec, most: usize) -> Result<()> {
        let wrong = |what: String| Err(Error::internal(format!("a batch that cannot be encoded: {what}")));
        let (rows, texts) = (self.rows(), self.texts.len());
        if rows > most || texts > MAX_TEXTS || texts == 0 {
            return wrong(format!("{rows} rows of {most}, {texts} texts of {MAX_TEXTS}"));
        }
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= spec.vocab) {
            return wrong(format!("token {token} of {}", spec.vocab));
        }
        match self.texts.iter().find(|text| text.rows == 0 || text.rows > spec.context()) {
            Some(text) => wrong(format!("a text of {} tokens, of {}", text.rows, spec.context())),
            None => Ok(()),
        }
    }
}

/// A model ready to compute: packed weights and work buffers.
pub struct Encoder {
    spec: EncoderSpec,
    cpu: Cpu,
    /// `[vocab, hidden]` as in the file.
    embedding: Table,
    /// `[positions, hidden]`
    positions: Table,
    /// `[segments, hidden]`
    segments: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    head: Option<(Words, Words)>,
    max_rows: usize,
    layout: KvLayout,
    attention: Attention,
    work: Work,
    /// One a thread, handed from block to block.
    scratch: Mutex<Vec<Scratch>>,
}

/// Rows that are looked up, in a copy of their own: a file may be replaced while it is mapped.
struct Table {
    dtype: Dtype,
    bytes: Buffer<u8>,
    row_bytes: usize,
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

struct Layer {
    qkv: Words,
    output: Words,
    attention_norm: Norm,
    up: Words,
    down: Words,
    norm: Norm,
}

/// What all threads see of a step; sized for the largest one.
struct Work {
    /// `[rows, hidden]`, normed.
    x: Buffer<f32>,
    /// `[rows, hidden]`
    q: Buffer<f32>,
    /// Keys and values of one layer, block by block.
    kv: Buffer<u8>,
    /// `[rows, hidden]`
    attended: Buffer<f32>,
    /// Block ids, which are just counted up.
    tables: Vec<u32>,
    /// By row: its text.
    text_of: Vec<u32>,
    /// By text: its first KV block.
    first_block: Vec<usize>,
    /// `[texts, width]`
    out: Vec<f32>,
}

/// What a thread works in for a block of rows.
struct Scratch {
    words: WordRows,
    /// `[ROWS, widest]`: q, k and v, or the middle of the feed-forward.
    wide: Vec<f32>,
}

impl Encoder {
    /// Packs the weights and allocates everything a step needs. `progress` hears how much is packed, 0 to 1.
    ///
    /// # Errors
    /// `ModelUnavailable` when a tensor is missing or broken, `Unsupported` for shapes the kernels do not have.
    pub fn open(
        weights: &Weights,
        spec: EncoderSpec,
        options: &EncoderOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let (hidden, dim) = (spec.hidden, spec.head_dim());
        if dim > MAX_DIM {
            return Err(Error::unsupported(format!("heads of {dim}: up to {MAX_DIM} are computed")));
        }
        let cpu = Cpu { pool: options.pool.clone(), isa: options.isa };
        let plain = options.precision == Precision::Plain;
        let mut packer = Packer { cpu: &cpu, arena: Arena::default(), weights, plain, progress, done: 0 };
        let (embedding, positions) = (packer.table("token_embd.weight")?, packer.table("position_embd.weight")?);
        let segments = if spec.segments > 0 { packer.vector("token_types.weight")? } else { Vec::new() };
        let norm = packer.norm("token_embd_norm")?;
        let layers: Vec<Layer> = (0..spec.layers).map(|layer| packer.layer(layer)).collect::<Result<_>>()?;
        let head = match &spec.head {
            Some(_) => Some((packer.matrix(&["cls"])?, packer.matrix(&["cls.output"])?)),
            None => None,
        };
        progress(1.0);

        // One text always fits, however long.
        let rows = options.max_rows.max(spec.context()).max(1);
        let layout = KvLayout { heads: spec.heads, dim, block_tokens: BLOCK_TOKENS, half: false };
        let blocks = rows / BLOCK_TOKENS + MAX_TEXTS.min(rows);
        let kv = blocks.checked_mul(layout.block_bytes()).and_then(Buffer::try_zeroed);
        let work = Work {
            x: Buffer::zeroed(rows * hidden),
            q: Buffer::zeroed(rows * hidden),
            kv: kv.ok_or_else(|| Error::unsupported(format!("steps of {rows} rows need more memory than there is")))?,
            attended: Buffer::zeroed(rows * hidden),
            tables: (0..blocks as u32).collect(),
            text_of: Vec::with_capacity(rows),
            first_block: Vec::with_capacity(MAX_TEXTS),
            out: Vec::with_capacity(MAX_TEXTS * hidden),
        };
        let widest = (3 * hidden).max(spec.ffn);
        let scratch = (0..cpu.pool.threads())
            .map(|_| Scratch { words: WordRows::new(ROWS, widest), wide: vec![0.0; ROWS * widest] })
            .collect();
        Ok(Self {
            spec,
            cpu,
            embedding,
            positions,
            segments,
            norm,
            layers,
            head,
            max_rows: rows,
            layout,
            attention: Attention::new(rows),
            work,
            scratch: Mutex::new(scratch),
        })
    }

    /// What it computes.
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Rows and texts in a step, at most. A text of the longest length fits.
    pub fn limits(&self) -> (usize, usize) {
        (self.max_rows, MAX_TEXTS)
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layer = |layer: &Layer| layer.qkv.bytes() + layer.output.bytes() + layer.up.bytes() + layer.down.bytes();
        self.embedding.bytes.len() + self.positions.bytes.len() + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Computes the texts of a batch: `[texts, width]`. Vectors have length 1; a head's numbers are logits. A text's
    /// numbers have the same bits in any batch.
    ///
    /// # Errors
    /// `Internal` when the batch is larger than this encoder was opened for, or names what does not exist.
    pub fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]> {
        batch.check(&self.spec, self.max_rows)?;
        self.lay_out(batch);
        let rows = batch.rows();
        // Blocks of rows as equal as can be, in whole tiles: an odd one out would be waited for.
        let most = ROWS.min(rows.div_ceil(self.cpu.pool.threads()).next_multiple_of(8));
        let blocks = rows.div_ceil(most);
        let grain = rows.div_ceil(blocks).next_multiple_of(8).min(ROWS);
        let block = |index: usize| (index * grain, grain.min(rows - index * grain));
        let blocks = rows.div_ceil(grain);

        let this = Step::of(self, batch);
        this.cpu.pool.each(blocks, 1, |index| {
            let (first, rows) = block(index);
            with_scratch(this.scratch, |scratch| this.begin(first, rows, scratch));
        });
        for layer in 0..self.layers.len() {
            self.attend(rows);
            let this = Step::of(self, batch);
            this.cpu.pool.each(blocks, 1, |index| {
                let (first, rows) = block(index);
                with_scratch(this.scratch, |scratch| this.finish(layer, first, rows, scratch));
            });
        }
        self.pool(batch);
        Ok(&self.work.out)
    }

    /// Says where each text's keys and values go and who looks at them.
    fn lay_out(&mut self, batch: &EncodeBatch) {
        let Work { text_of, first_block, .. } = &mut self.work;
        text_of.clear();
        first_block.clear();
        let mut next = 0;
        for (index, text) in batch.texts.iter().enumerate() {
            text_of.extend(std::iter::repeat_n(index as u32, text.rows));
            first_block.push(next);
            next += text.rows.div_ceil(BLOCK_TOKENS);
        }
        // A table entry is its own index, so a text's table begins at its first block.
        let spans = batch.texts.iter().zip(&*first_block);
        let spans = spans.map(|(text, &table)| KvSpan { row: text.row, rows: text.rows, start: 0, table });
        self.attention.plan_whole(spans, 1);
    }

    /// attended = softmax(q K) V
    fn attend(&mut self, rows: usize) {
        let (spec, work) = (&self.spec, &mut self.work);
        let query = Query {
            q: &work.q[..rows * spec.hidden],
            stride: spec.hidden,
            heads: spec.heads,
            scale: 1.0 / (spec.head_dim() as f32).sqrt(),
            window: None,
            out: &mut work.attended[..rows * spec.hidden],
        };
        self.attention.run(&self.cpu, &self.layout, &work.kv, &work.tables, query);
    }

    /// One vector a text, or what the head makes of its first row.
    fn pool(&mut self, batch: &EncodeBatch) {
        let (hidden, texts, width, isa) = (self.spec.hidden, batch.texts.len(), self.spec.width(), self.cpu.isa);
        let relu = self.spec.head.as_ref().is_some_and(|head| head.relu);
        let Work { x, out, .. } = &mut self.work;
        out.resize(texts * width, 0.0);
        let (x, out) = (&**x, Shared::new(out));
        let (head, scratch) = (&self.head, &self.scratch);
        each_row(&self.cpu, texts, hidden * 16, |index| {
            let text = &batch.texts[index];
            let rows = &x[text.row * hidden..][..text.rows * hidden];
            let first = &rows[..hidden];
            // SAFETY: each text is handed out once.
            let out = unsafe { out.part(index * width, width) };
            let Some((dense, output)) = head else { return unit(rows, text.pooling, out) };
            with_scratch(scratch, |Scratch { words, wide }| {
                let middle = &mut wide[..hidden];
                words.take(isa, first, hidden);
                dense.apply(isa, first, words, if relu { Then::Relu } else { Then::Set }, middle);
                if !relu {
                    middle.iter_mut().for_each(|x| *x = x.tanh());
                }
                words.take(isa, middle, hidden);
                output.apply(isa, middle, words, Then::Set, out);
            });
        });
    }
}

/// The rows of a text as one vector of length 1.
fn unit(rows: &[f32], pooling: Pooling, out: &mut [f32]) {
    let width = out.len();
    out.copy_from_slice(&rows[..width]);
    if pooling == Pooling::Mean {
        // The mean and the sum point the same way, and only the direction stays.
        for row in rows.chunks_exact(width).skip(1) {
            out.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    }
    let length = out.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    out.iter_mut().for_each(|x| *x /= length);
}

/// Lends a scratch to `work`. There are as many as threads, so there is always one.
fn with_scratch(all: &Mutex<Vec<Scratch>>, work: impl FnOnce(&mut Scratch)) {
    let scratch = all.lock().pop();
    let Some(mut scratch) = scratch else { unreachable!("more threads than the pool has") };
    work(&mut scratch);
    all.lock().push(scratch);
}

/// What the threads of a step read, and the parts of it that each writes its own rows of.
struct Step<'a> {
    spec: &'a EncoderSpec,
    cpu: &'a Cpu,
    embedding: &'a Table,
    positions: &'a Table,
    segments: &'a [f32],
    norm: &'a Norm,
    layers: &'a [Layer],
    layout: KvLayout,
    scratch: &'a Mutex<Vec<Scratch>>,
    batch: &'a EncodeBatch,
    text_of: &'a [u32],
    first_block: &'a [usize],
    attended: &'a [f32],
    x: Shared<'a, f32>,
    q: Shared<'a, f32>,
    kv: Shared<'a, u8>,
}

impl<'a> Step<'a> {
    fn of(encoder: &'a mut Encoder, batch: &'a EncodeBatch) -> Self {
        let Encoder { spec, cpu, embedding, positions, segments, norm, layers, layout, scratch, work, .. } = encoder;
        Self {
            spec,
            cpu,
            embedding,
            positions,
            segments,
            norm,
            layers,
            layout: *layout,
            scratch,
            batch,
            text_of: &work.text_of,
            first_block: &work.first_block,
            attended: &work.attended,
            x: work.x.share(),
            q: work.q.share(),
            kv: work.kv.share(),
        }
    }

    /// x = norm(token + position + segment), and what the first layer's attention needs of it.
    fn begin(&self, first: usize, rows: usize, scratch: &mut Scratch) {
        let hidden = self.spec.hidden;
        // SAFETY: each block of rows is handed out once.
        let x = unsafe { self.x.part(first * hidden, rows * hidden) };
        for (row, x) in (first..).zip(x.chunks_exact_mut(hidden)) {
            let text = &self.batch.texts[self.text_of[row] as usize];
            let position = row - text.row;
            self.embedding.read(self.batch.tokens[row] as usize, x);
            self.positions.add(self.spec.first_position + position, x, &mut scratch.wide[..hidden]);
            if self.spec.segments > 0 {
                let segment = usize::from(position >= text.second).min(self.spec.segments - 1);
                let segment = &self.segments[segment * hidden..][..hidden];
                x.iter_mut().zip(segment).for_each(|(x, segment)| *x += segment);
            }
        }
        self.normalize(x, self.norm);
        if let Some(layer) = self.layers.first() {
            self.project(layer, first, rows, x, scratch);
        }
    }

    /// The rest of a layer behind its attention, and what the next one's needs.
    fn finish(&self, index: usize, first: usize, rows: usize, scratch: &mut Scratch) {
        let (hidden, ffn, isa) = (self.spec.hidden, self.spec.ffn, self.cpu.isa);
        let layer = &self.layers[index];
        // SAFETY: each block of rows is handed out once.
        let x = unsafe { self.x.part(first * hidden, rows * hidden) };
        let attended = &self.attended[first * hidden..][..rows * hidden];
        let Scratch { words, wide } = scratch;
        words.take(isa, attended, hidden);
        layer.output.apply(isa, attended, words, Then::Add, x);
        self.normalize(x, &layer.attention_norm);
        words.take(isa, x, hidden);
        let middle = &mut wide[..rows * ffn];
        layer.up.apply(isa, x, words, self.spec.activation, middle);
        words.take(isa, middle, ffn);
        layer.down.apply(isa, middle, words, Then::Add, x);
        self.normalize(x, &layer.norm);
        if let Some(next) = self.layers.get(index + 1) {
            self.project(next, first, rows, x, scratch);
        }
    }

    fn normalize(&self, x: &mut [f32], norm: &Norm) {
        layer_norm(self.cpu.isa, x, &norm.weight, &norm.bias, self.spec.norm_eps);
    }

    /// Queries to `q`, keys and values into their blocks.
    fn project(&self, layer: &Layer, first: usize, rows: usize, x: &[f32], scratch: &mut Scratch) {
        let (hidden, dim, isa) = (self.spec.hidden, self.layout.dim, self.cpu.isa);
        let Scratch { words, wide } = scratch;
        let qkv = &mut wide[..rows * 3 * hidden];
        words.take(isa, x, hidden);
        layer.qkv.apply(isa, x, words, Then::Set, qkv);
        // SAFETY: each block of rows is handed out once.
        let q = unsafe { self.q.part(first * hidden, rows * hidden) };
        for ((row, qkv), q) in (first..).zip(qkv.chunks_exact(3 * hidden)).zip(q.chunks_exact_mut(hidden)) {
            let (query, kv) = qkv.split_at(hidden);
            let (keys, values) = kv.split_at(hidden);
            q.copy_from_slice(query);
            let text = self.text_of[row] as usize;
            let position = row - self.batch.texts[text].row;
            let block = self.first_block[text] + position / BLOCK_TOKENS;
            let block = self.kv.at(block * self.layout.block_bytes());
            for (head, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
                // SAFETY: `lay_out` gave each text blocks of its own, and two rows never share a slot.
                unsafe { self.layout.write(isa, block, position % BLOCK_TOKENS, head, key, value) };
            }
        }
    }
}

impl Table {
    fn read(&self, row: usize, out: &mut [f32]) {
        let read = dequantize_row(self.dtype, &self.bytes[row * self.row_bytes..][..self.row_bytes], out);
        // Its length was checked when the table was read.
        debug_assert!(read.is_ok());
    }

    fn add(&self, row: usize, out: &mut [f32], scratch: &mut [f32]) {
        self.read(row, scratch);
        out.iter_mut().zip(scratch).for_each(|(out, x)| *out += *x);
    }
}

/// Packs tensors and says how far it is.
struct Packer<'a> {
    cpu: &'a Cpu,
    arena: Arena,
    weights: &'a Weights,
    plain: bool,
    progress: &'a (dyn Fn(f32) + Sync),
    done: u64,
}

impl Packer<'_> {
    fn layer(&mut self, layer: usize) -> Result<Layer> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        Ok(Layer {
            qkv: self.matrix(&[&name("attn_q"), &name("attn_k"), &name("attn_v")])?,
            output: self.matrix(&[&name("attn_output")])?,
            attention_norm: self.norm(&name("attn_output_norm"))?,
            up: self.matrix(&[&name("ffn_up")])?,
            down: self.matrix(&[&name("ffn_down")])?,
            norm: self.norm(&name("layer_output_norm"))?,
        })
    }

    /// Matrices of the same inputs side by side, with their biases. Their pages in the file are given back.
    fn matrix(&mut self, names: &[&str]) -> Result<Words> {
        let (mut sources, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            let tensor = self.weights.tensor(&format!("{name}.weight"))?;
            sources.push(Source {
                dtype: tensor.dtype,
                bytes: tensor.data,
                channels: tensor.rows,
                inputs: tensor.cols,
            });
            bias.extend(self.vector(&format!("{name}.bias"))?);
        }
        let words = Words::pack(self.cpu, &mut self.arena, &sources, bias, self.plain)
            .map_err(|error| error.context(names[0]))?;
        for name in names {
            self.finished(&format!("{name}.weight"));
        }
        Ok(words)
    }

    fn table(&mut self, name: &str) -> Result<Table> {
        let tensor = self.weights.tensor(name)?;
        let mut bytes = Buffer::zeroed(tensor.data.len());
        bytes.copy_from_slice(tensor.data);
        let table = Table { dtype: tensor.dtype, bytes, row_bytes: tensor.row_bytes() };
        self.finished(name);
        Ok(table)
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        Ok(Norm { weight: self.vector(&format!("{name}.weight"))?, bias: self.vector(&format!("{name}.bias"))? })
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        self.weights.tensor(name)?.to_f32()
    }

    fn finished(&mut self, name: &str) {
        self.done += self.weights.find(name).map_or(0, |tensor| tensor.data.len() as u64);
        self.weights.release(name);
        (self.progress)((self.done as f64 / self.weights.bytes().max(1) as f64).min(1.0) as f32);
    }
}
