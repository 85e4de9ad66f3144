//! The encoder on a GPU: as [`Encoder`](super::Encoder), with everything that a step touches in the device's memory.
//!
//! ```text
//! host    texts ── tokens, items of attention ──> device                                                vectors or logits <── each text
//! device  embed ─ norm ─> x ─┬─ qkv ─ attention ─ output ─(+) norm ─┬─ up ─ gelu ─ down ─(+) norm ─┬─> pool, or head
//!                            └──────────────────────────────────────┘──────────────────────────────┘
//! ```
//!
//! All memory is taken when the model is loaded. Matrices, tables and the inputs of products are bf16; what rows are added up in is f32,
//! and so are biases and norms. Biases are added by whatever follows a product.
//!
//! A [`GpuEncoder`] belongs to one thread; any error is the device's, and nothing of it can be trusted afterwards.

use half::bf16;

use super::{EncodeBatch, EncoderSpec, MAX_TEXTS, Text};
use crate::base::{Error, Result};
use crate::kernel::Then;
use crate::kernel::gpu::{
    Activation, Card, LARGE_UNIT, LayerNorm, Pooled, Ptr, SMALL_ROWS, Sink, TEXT_ROWS, Tables, TextItem, Token, Weight,
    add_layer_norm, attend_texts, bias_activate, embed_layer_norm, gather_rows, gemm_small, pool_rows, takes_texts,
};
use crate::kernel::quant::dequantize_row;
use crate::model::weights::Weights;
use crate::task::Pooling;

/// Numbers that are sent at a time.
const CHUNK: usize = 1 << 20;

/// A model ready to compute: weights and work buffers on a device.
pub struct GpuEncoder {
    card: Box<dyn Card>,
    spec: EncoderSpec,
    tables: Tables,
    norm: LayerNorm,
    layers: Vec<Layer>,
    activation: Activation,
    head: Option<Head>,
    max_rows: usize,
    step: Step,
    work: Work,
    /// `[texts, width]`
    out: Vec<f32>,
}

struct Layer {
    qkv: Matrix,
    output: Matrix,
    attention_norm: LayerNorm,
    up: Matrix,
    down: Matrix,
    norm: LayerNorm,
}

struct Head {
    dense: Matrix,
    activation: Activation,
    /// Channels beyond the labels are zeros.
    output: Matrix,
    /// Of the labels: added on the host.
    bias: Vec<f32>,
}

/// `n` channels of `k` inputs.
struct Matrix {
    n: usize,
    k: usize,
    /// `[n, k]`
    weight: Ptr<bf16>,
    /// `[n]`
    bias: Ptr<f32>,
}

/// What the device is told of a step.
struct Step {
    tokens: Ptr<Token>,
    items: Ptr<TextItem>,
    /// Of texts that become vectors.
    pooled: Ptr<Pooled>,
    /// Of texts that a head looks at: their first rows.
    firsts: Ptr<i32>,
}

/// What a step computes in; sized for the largest one.
struct Work {
    /// `[rows, hidden]`, normed: what the next half of a layer is added to.
    x: Ptr<f32>,
    /// The same, as inputs of products.
    inputs: Ptr<bf16>,
    /// `[rows, 3 * hidden]` or `[rows, ffn]`
    wide: Ptr<bf16>,
    /// `[rows, hidden]`
    attended: Ptr<bf16>,
    /// `[rows, hidden]`, out of a product.
    delta: Ptr<bf16>,
    /// `[texts, hidden]`, into a head and in its middle.
    first: [Ptr<bf16>; 2],
    /// `[texts, width]`, the width of a head's output rounded up to eights.
    out: Ptr<f32>,
}

impl GpuEncoder {
    /// Sends the weights to the device and takes all memory that a step of up to `max_rows` rows needs. One text always fits, however
    /// long.
    ///
    /// # Errors
    /// `ModelUnavailable` when a tensor is missing or broken or the device has not the memory, `Unsupported` for shapes the kernels
    /// do not have, and whatever the device says.
    pub fn open(card: Box<dyn Card>, weights: &Weights, spec: EncoderSpec, max_rows: usize) -> Result<Self> {
        takes_texts(spec.heads, spec.head_dim())?;
        let (hidden, width) = (spec.hidden, spec.width());
        let widths = [("hidden size", hidden), ("feed-forward", spec.ffn)];
        if let Some((what, width)) = widths.iter().find(|(_, width)| !width.is_multiple_of(32)) {
            return Err(Error::unsupported(format!("a {what} of {width}: GPU kernels take multiples of 32")));
        }
        let loader = Loader { card: &*card, weights, eps: spec.norm_eps };
        let tables = Tables {
            words: loader.table("token_embd.weight")?,
            positions: loader.table("position_embd.weight")?,
            segments: if spec.segments > 0 { loader.table("token_types.weight")? } else { Ptr::null() },
        };
        let norm = loader.norm("token_embd_norm")?;
        let layers: Vec<Layer> = (0..spec.layers).map(|layer| loader.layer(layer)).collect::<Result<_>>()?;
        let head = match &spec.head {
            Some(head) => Some(Head {
                dense: loader.matrix(&["cls"])?,
                activation: if head.relu { Activation::Relu } else { Activation::Tanh },
                output: loader.matrix(&["cls.output"])?,
                bias: weights.tensor("cls.output.bias")?.to_f32()?,
            }),
            None => None,
        };

        let activation = match spec.activation {
            Then::Gelu => Activation::Gelu,
            Then::GeluTanh => Activation::GeluTanh,
            Then::Relu => Activation::Relu,
            other @ (Then::Set | Then::Add) => {
                return Err(Error::internal(format!("{other:?} is no activation of an encoder")));
            }
        };

        // Products take whole units of rows.
        let rows = max_rows.max(spec.context()).next_multiple_of(LARGE_UNIT);
        let texts = MAX_TEXTS.next_multiple_of(LARGE_UNIT);
        let step = Step {
            tokens: card.alloc(rows)?,
            items: card.alloc(rows / TEXT_ROWS + MAX_TEXTS)?,
            pooled: card.alloc(MAX_TEXTS)?,
            firsts: card.alloc(MAX_TEXTS)?,
        };
        let work = Work {
            x: card.alloc(rows * hidden)?,
            inputs: card.alloc(rows * hidden)?,
            wide: card.alloc(rows * spec.ffn.max(3 * hidden))?,
            attended: card.alloc(rows * hidden)?,
            delta: card.alloc(rows * hidden)?,
            first: [card.alloc(texts * hidden)?, card.alloc(texts * hidden)?],
            out: card.alloc(texts * width.next_multiple_of(8))?,
        };
        let out = Vec::with_capacity(MAX_TEXTS * width);
        Ok(Self { card, spec, tables, norm, layers, activation, head, max_rows: rows, step, work, out })
    }

    /// What it computes.
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// As [`Encoder::limits`](super::Encoder::limits).
    pub fn limits(&self) -> (usize, usize) {
        (self.max_rows, MAX_TEXTS)
    }

    /// Computes the texts of a batch: `[texts, width]`. Vectors have length 1; a head's numbers are logits.
    ///
    /// # Errors
    /// `Internal` when the batch is larger than this encoder was opened for or names what does not exist, and whatever the device
    /// says: then nothing of it can be trusted.
    pub fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]> {
        batch.check(&self.spec, self.max_rows)?;
        let (rows, texts) = (batch.rows(), batch.texts.len());
        let items = self.tell(batch)?;
        let (card, work, hidden) = (&*self.card, &self.work, self.spec.hidden);
        embed_layer_norm(card, rows, hidden, self.step.tokens, self.tables, self.norm, work.x, work.inputs)?;
        self.layers.iter().try_for_each(|layer| self.layer(layer, rows, items))?;
        match &self.head {
            Some(head) => self.classify(head, texts)?,
            None => pool_rows(card, (self.step.pooled, texts), hidden, work.x, work.out)?,
        }
        self.read(texts)
    }

    /// Sends what the kernels are told of a step. Returns how many items its attention has.
    fn tell(&self, batch: &EncodeBatch) -> Result<usize> {
        let (card, spec, step) = (&*self.card, &self.spec, &self.step);
        let token = |text: &Text, position: usize| Token {
            word: batch.tokens[text.row + position] as i32,
            position: (spec.first_position + position) as i32,
            segment: usize::from(position >= text.second).min(spec.segments.saturating_sub(1)) as i32,
        };
        let tokens: Vec<Token> =
            batch.texts.iter().flat_map(|text| (0..text.rows).map(move |position| token(text, position))).collect();
        card.upload(&tokens, step.tokens)?;
        let items: Vec<TextItem> = batch.texts.iter().flat_map(|text| TextItem::of(text.row, text.rows)).collect();
        card.upload(&items, step.items)?;
        match self.head {
            Some(_) => {
                let firsts: Vec<i32> = batch.texts.iter().map(|text| text.row as i32).collect();
                card.upload(&firsts, step.firsts)?;
            }
            None => {
                let pooled = |&Text { row, rows, pooling, .. }: &Text| Pooled {
                    row: row as i32,
                    rows: rows as i32,
                    mean: i32::from(pooling == Pooling::Mean),
                };
                card.upload(&batch.texts.iter().map(pooled).collect::<Vec<_>>(), step.pooled)?;
            }
        }
        Ok(items.len())
    }

    /// x = norm(x + output(attention(qkv(x)))), and then norm(x + down(act(up(x))))
    fn layer(&self, layer: &Layer, rows: usize, items: usize) -> Result<()> {
        let (card, spec, work) = (&*self.card, &self.spec, &self.work);
        let Work { x, inputs, wide, attended, delta, .. } = *work;
        let Layer { qkv, output, attention_norm, up, down, norm } = layer;
        self.product(qkv, inputs, rows, Sink::Set(wide))?;
        attend_texts(card, (self.step.items, items), (spec.heads, spec.head_dim()), wide, qkv.bias, attended)?;
        self.product(output, attended, rows, Sink::Set(delta))?;
        add_layer_norm(card, rows, spec.hidden, x, delta, output.bias, *attention_norm, inputs)?;
        self.product(up, inputs, rows, Sink::Set(wide))?;
        bias_activate(card, rows, spec.ffn, wide, up.bias, self.activation)?;
        self.product(down, wide, rows, Sink::Set(delta))?;
        add_layer_norm(card, rows, spec.hidden, x, delta, down.bias, *norm, inputs)
    }

    /// What a head makes of the first rows, but for its last bias.
    fn classify(&self, head: &Head, texts: usize) -> Result<()> {
        let (card, work, hidden) = (&*self.card, &self.work, self.spec.hidden);
        let [first, middle] = work.first;
        gather_rows(card, texts, work.inputs, self.step.firsts, hidden, first)?;
        self.product(&head.dense, first, texts, Sink::Set(middle))?;
        bias_activate(card, texts, hidden, middle, head.dense.bias, head.activation)?;
        self.product(&head.output, middle, texts, Sink::Wide(work.out))
    }

    /// `x * matrix^T` into `out`.
    fn product(&self, &Matrix { n, k, weight, .. }: &Matrix, x: Ptr<bf16>, rows: usize, out: Sink) -> Result<()> {
        let (card, whole) = (&*self.card, rows.next_multiple_of(LARGE_UNIT));
        let part = |first: usize, count: usize| Weight::Bf16(weight, x.part(first * k, count * k));
        if rows > SMALL_ROWS && card.product((whole, n, k), part(0, whole), out.part(0, whole * n), n)? {
            return Ok(());
        }
        for first in (0..rows).step_by(SMALL_ROWS) {
            let count = SMALL_ROWS.min(rows - first);
            gemm_small(card, (count, n, k), part(first, count), out.part(first * n, count * n), n)?;
        }
        Ok(())
    }

    /// Waits for the step, and brings over what came out of it.
    fn read(&mut self, texts: usize) -> Result<&[f32]> {
        let width = self.spec.width();
        let stride = self.head.as_ref().map_or(width, |head| head.output.n);
        self.out.resize(texts * stride, 0.0);
        self.card.download(self.work.out, &mut self.out)?;
        if let Some(Head { bias, .. }) = &self.head {
            for (text, label) in (0..texts).flat_map(|text| (0..width).map(move |label| (text, label))) {
                // Closer together, so nothing is overwritten that is still to be read.
                self.out[text * width + label] = self.out[text * stride + label] + bias[label];
            }
            self.out.truncate(texts * width);
        }
        Ok(&self.out)
    }
}

/// Brings tensors to the device.
struct Loader<'a> {
    card: &'a dyn Card,
    weights: &'a Weights,
    /// Of all norms.
    eps: f32,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer> {
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

    fn norm(&self, name: &str) -> Result<LayerNorm> {
        let weight = self.vector(self.weights.tensor(&format!("{name}.weight"))?.to_f32()?)?;
        let bias = self.vector(self.weights.tensor(&format!("{name}.bias"))?.to_f32()?)?;
        Ok(LayerNorm { weight, bias, eps: self.eps })
    }

    fn vector(&self, values: Vec<f32>) -> Result<Ptr<f32>> {
        let at = self.card.alloc(values.len())?;
        self.card.upload(&values, at)?;
        Ok(at)
    }

    /// Matrices of the same inputs, one below the other, with their biases; zeros behind them up to a multiple of 8 channels.
    fn matrix(&self, names: &[&str]) -> Result<Matrix> {
        let mut bias = Vec::new();
        for name in names {
            bias.extend(self.weights.tensor(&format!("{name}.bias"))?.to_f32()?);
        }
        let (n, k) = (bias.len().next_multiple_of(8), self.weights.tensor(&format!("{}.weight", names[0]))?.cols);
        let weight = self.card.alloc(n * k)?;
        let mut below = 0;
        for name in names {
            below += self.send(&format!("{name}.weight"), weight.part(below, n * k - below))?;
        }
        bias.resize(n, 0.0);
        Ok(Matrix { n, k, weight, bias: self.vector(bias)? })
    }

    /// Rows that are looked up.
    fn table(&self, name: &str) -> Result<Ptr<bf16>> {
        let tensor = self.weights.tensor(name)?;
        let table = self.card.alloc(tensor.rows * tensor.cols)?;
        self.send(name, table)?;
        Ok(table)
    }

    /// Sends a tensor, in chunks of whole rows. Returns how many numbers it has.
    fn send(&self, name: &str, to: Ptr<bf16>) -> Result<usize> {
        let tensor = self.weights.tensor(name)?;
        let most = (CHUNK / tensor.cols.max(1)).max(1);
        let mut values = Vec::new();
        for first in (0..tensor.rows).step_by(most) {
            let rows = most.min(tensor.rows - first);
            values.resize(rows * tensor.cols, 0.0);
            let bytes = &tensor.data[first * tensor.row_bytes()..][..rows * tensor.row_bytes()];
            dequantize_row(tensor.dtype, bytes, &mut values)?;
            self.card.send(values.len(), to.part(first * tensor.cols, values.len()), |sent| {
                sent.iter_mut().zip(&values).for_each(|(sent, &value)| *sent = bf16::from_f32(value));
            })?;
        }
        self.weights.release(name);
        Ok(tensor.rows * tensor.cols)
    }
}

#[cfg(test)]
#[cfg(feature = "emulate")]
#[path = "gpu_test.rs"]
mod tests;
