//! Weights on their way to a GPU: out of a file, or made up there.
//!
//! ```text
//! bf16 in rows as they are ──────────────────────────────────────┐
//! anything else ── converted in chunks, rows in parallel ────────┴──> bf16 on the device ──> fp8 there, if wanted
//! nothing ── numbers that follow from their places, on the device ─┘
//! ```

use std::collections::HashMap;

use half::bf16;

use super::{Data, Layer, Matrix};
use crate::base::{Error, Result};
use crate::config::Format;
use crate::kernel::gpu::{Card, Norm, Ptr, Scaled, quantize_fp8, random_bf16};
use crate::kernel::quant::dequantize_row;
use crate::kernel::{Dtype, Pool, Shared};
use crate::model::layers::halves;
use crate::model::spec::{DecoderSpec, RopeStyle};
use crate::model::weights::{Tensor, Weights};

/// Numbers that are sent at a time.
const CHUNK: usize = 4 << 20;

/// Where weights come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// A file.
    File(&'a Weights),
    /// Nowhere: they are random, of a size that keeps activations as large as they are.
    Random,
}

/// Brings tensors to the device, and says how far it is.
pub(super) struct Loader<'a> {
    card: &'a dyn Card,
    source: Source<'a>,
    spec: &'a DecoderSpec,
    /// Rows and columns by name.
    shapes: HashMap<String, (usize, usize)>,
    pool: &'a Pool,
    progress: &'a (dyn Fn(f32) + Sync),
    /// Numbers of all tensors, and of those that are there.
    whole: usize,
    done: usize,
    /// A chunk on the host.
    sent: Vec<bf16>,
    /// A chunk on the device, on its way to fp8.
    scratch: Option<Ptr<bf16>>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        card: &'a dyn Card,
        source: Source<'a>,
        spec: &'a DecoderSpec,
        pool: &'a Pool,
        progress: &'a (dyn Fn(f32) + Sync),
    ) -> Self {
        let shapes: HashMap<_, _> = spec.tensors().map(|(name, rows, cols)| (name, (rows, cols))).collect();
        let whole = shapes.values().map(|(rows, cols)| rows * cols).sum();
        Self { card, source, spec, shapes, pool, progress, whole, done: 0, sent: Vec::new(), scratch: None }
    }

    pub(super) fn layer(&mut self, layer: usize, format: Format) -> Result<Layer> {
        let spec = self.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [q, k, v] = ["attn_q.weight", "attn_k.weight", "attn_v.weight"].map(name);
        let heads = (spec.rope.style == RopeStyle::Interleaved).then_some(spec.head_dim);
        let bias = if spec.qkv_bias {
            let mut bias = Vec::new();
            for (part, heads) in [("attn_q.bias", heads), ("attn_k.bias", heads), ("attn_v.bias", None)] {
                let values = self.vector(&name(part), 0.0)?;
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

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        let shape = self.shapes.get(name).copied();
        shape.ok_or_else(|| Error::internal(format!("a decoder of this kind has no {name}")))
    }

    /// A few numbers; `made_up` each where there is no file.
    fn vector(&self, name: &str, made_up: f32) -> Result<Vec<f32>> {
        match self.source {
            Source::File(weights) => weights.tensor(name)?.to_f32(),
            Source::Random => {
                let (rows, cols) = self.shape(name)?;
                Ok(vec![made_up; rows * cols])
            }
        }
    }

    pub(super) fn norm(&mut self, name: &str, eps: f32) -> Result<Norm> {
        let values: Vec<bf16> = self.vector(name, 1.0)?.into_iter().map(bf16::from_f32).collect();
        let weight = self.card.alloc(values.len())?;
        self.card.upload(&values, weight)?;
        Ok(Norm { weight, eps, offset: 0.0 })
    }

    /// Matrices of the same inputs, one below the other, rows of zeros behind them up to a multiple of 8. The rows of all but a
    /// third are put into halves when they are interleaved heads of `heads` numbers.
    pub(super) fn matrix(&mut self, names: &[&str], heads: Option<usize>, format: Format) -> Result<Matrix> {
        let shapes = names.iter().map(|name| self.shape(name)).collect::<Result<Vec<_>>>()?;
        let k = shapes[0].1;
        let n = shapes.iter().map(|(rows, _)| rows).sum::<usize>().next_multiple_of(8);
        if let Some(other) = shapes.iter().position(|(_, cols)| *cols != k) {
            return Err(Error::internal(format!("{} and {} have other inputs", names[0], names[other])));
        }
        let data = match format {
            Format::Bf16 => Data::Bf16(self.card.alloc(n * k)?),
            Format::Fp8 => Data::Fp8(Scaled { data: self.card.alloc(n * k)?, scales: self.card.alloc(n)? }),
        };
        let (mut below, most) = (0, (CHUNK / k).max(1));
        for (index, (name, &(all, _))) in names.iter().zip(&shapes).enumerate() {
            let heads = heads.filter(|_| index < 2);
            let tensor = match self.source {
                Source::File(weights) => Some(weights.tensor(name)?),
                Source::Random => None,
            };
            for first in (0..all).step_by(most) {
                let rows = most.min(all - first);
                let at = below + first;
                let to = match data {
                    Data::Bf16(data) => data.part(at * k, rows * k),
                    Data::Fp8(_) => self.scratch(rows * k)?.part(0, rows * k),
                };
                match &tensor {
                    Some(tensor) => self.send(tensor, first..first + rows, heads, to)?,
                    None => {
                        // Uniform: three times the square is the mean of its square.
                        let size = (3.0 / k as f32).sqrt();
                        random_bf16(self.card, to, (self.done + first * k) as u64, size)?;
                    }
                }
                if let Data::Fp8(Scaled { data, scales }) = data {
                    let (data, scales) = (data.part(at * k, rows * k), scales.part(at, rows));
                    quantize_fp8(self.card, (rows, k), to, data, scales)?;
                }
            }
            below += all;
            self.done += all * k;
            if let Source::File(weights) = self.source {
                weights.release(name);
            }
            (self.progress)((self.done as f64 / self.whole.max(1) as f64).min(1.0) as f32);
        }
        Ok(Matrix { n, k, data })
    }

    /// Room for a chunk on the device.
    fn scratch(&mut self, len: usize) -> Result<Ptr<bf16>> {
        match self.scratch.filter(|scratch| scratch.len() >= len) {
            Some(scratch) => Ok(scratch),
            None => Ok(*self.scratch.insert(self.card.alloc(CHUNK.max(len))?)),
        }
    }

    /// Some rows of a tensor, as bf16.
    fn send(
        &mut self,
        tensor: &Tensor<'_>,
        rows: std::ops::Range<usize>,
        heads: Option<usize>,
        to: Ptr<bf16>,
    ) -> Result<()> {
        let k = tensor.cols;
        if tensor.dtype == Dtype::BF16 && heads.is_none() {
            // SAFETY: a card copies bytes and looks at no number; there are as many at `to` as these rows have.
            return unsafe { self.card.upload_bytes(&tensor.data[rows.start * 2 * k..rows.end * 2 * k], to.address()) };
        }
        self.sent.resize(rows.len() * k, bf16::ZERO);
        let sent = Shared::new(&mut self.sent[..]);
        self.pool.each(rows.len(), 1, |row| {
            let mut values = vec![0f32; k];
            // Cannot fail: the tensor's length was checked when its file was opened.
            let read = dequantize_row(tensor.dtype, tensor.row(halves(heads, rows.start + row)), &mut values);
            debug_assert!(read.is_ok());
            // SAFETY: each row is handed out once.
            let out = unsafe { sent.part(row * k, k) };
            out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(value));
        });
        self.card.upload(&self.sent, to)
    }
}
