//! Weights on their way to a GPU: out of a file, or made up there.
//!
//! ```text
//! file ── bf16, rows in parallel, while the chunk before travels ─┬──> bf16 on the device ──> fp8 there, if wanted
//! nothing ── numbers that follow from their places, on the device ┘
//! Q4_0 as it is, anything else rounded to it ── packed ───────────────> 4 bits on the device
//! ```
//!
//! A rank of several brings its own part of each matrix ([`Shard`]): some channels of it, or some inputs.

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use parking_lot::Mutex;

use super::{Data, Layer, Matrix};
use crate::base::{Error, Result};
use crate::config::Packing;
use crate::kernel::gpu::{Card, Norm, Ptr, Scaled, pack_q4, quantize_fp8, random_bf16};
use crate::kernel::quant::{dequantize_row, quantize_q4_0};
use crate::kernel::{Dtype, Part, Pool, Shared};
use crate::model::layers::halves;
use crate::model::shard::Shard;
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
    /// What is brought of each matrix.
    shard: &'a Shard,
    /// Of the first number that is made up.
    seed: usize,
    /// Rows and columns by name, of all ranks.
    shapes: HashMap<String, (usize, usize)>,
    pool: &'a Pool,
    progress: &'a (dyn Fn(f32) + Sync),
    /// Numbers of all tensors, and of those that are there.
    whole: usize,
    done: usize,
    /// A chunk on the device, on its way to fp8.
    scratch: Option<Ptr<bf16>>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        card: &'a dyn Card,
        source: Source<'a>,
        spec: &'a DecoderSpec,
        (rank, shard): (usize, &'a Shard),
        pool: &'a Pool,
        progress: &'a (dyn Fn(f32) + Sync),
    ) -> Self {
        let shapes: HashMap<_, _> = spec.tensors().map(|(name, rows, cols)| (name, (rows, cols))).collect();
        let whole = shapes.values().map(|(rows, cols)| rows * cols).sum();
        let seed = rank * whole;
        Self { card, source, spec, shard, seed, shapes, pool, progress, whole, done: 0, scratch: None }
    }

    pub(super) fn layer(&mut self, layer: usize, packing: Packing) -> Result<Layer> {
        let spec = self.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [q, k, v] = ["attn_q.weight", "attn_k.weight", "attn_v.weight"].map(name);
        let heads = (spec.rope.style == RopeStyle::Interleaved).then_some(spec.head_dim);
        let bias = if spec.qkv_bias {
            let mut bias = Vec::new();
            for (part, heads) in [("attn_q.bias", heads), ("attn_k.bias", heads), ("attn_v.bias", None)] {
                let values = self.vector(&name(part), 0.0)?;
                let channels = self.part(&name(part))?.channels;
                bias.extend(channels.map(|channel| bf16::from_f32(values[halves(heads, channel)])));
            }
            let at = self.card.alloc(bias.len())?;
            self.card.upload(&bias, at)?;
            at
        } else {
            Ptr::null()
        };
        let none = Norm { weight: Ptr::null(), eps: 0.0, offset: 0.0 };
        let head_norms = match spec.qk_norm {
            true => [
                self.norm_of(&name("attn_q_norm.weight"), spec.norm_eps, heads)?,
                self.norm_of(&name("attn_k_norm.weight"), spec.norm_eps, heads)?,
            ],
            false => [none; 2],
        };
        let post_norms = match spec.post_norms {
            true => [
                self.norm(&name("post_attention_norm.weight"), spec.norm_eps)?,
                self.norm(&name("post_ffw_norm.weight"), spec.norm_eps)?,
            ],
            false => [none; 2],
        };
        Ok(Layer {
            attention_norm: self.norm(&name("attn_norm.weight"), spec.norm_eps)?,
            qkv: self.matrix(&[&q, &k, &v], heads, packing)?,
            bias,
            head_norms,
            output: self.matrix(&[&name("attn_output.weight")], None, packing)?,
            ffn_norm: self.norm(&name("ffn_norm.weight"), spec.norm_eps)?,
            gate_up: self.matrix(&[&name("ffn_gate.weight"), &name("ffn_up.weight")], None, packing)?,
            down: self.matrix(&[&name("ffn_down.weight")], None, packing)?,
            post_norms,
        })
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        let shape = self.shapes.get(name).copied();
        shape.ok_or_else(|| Error::internal(format!("a decoder of this kind has no {name}")))
    }

    /// What is here of a matrix, or of the bias of one.
    fn part(&self, name: &str) -> Result<Part> {
        self.shard.part_of(name).ok_or_else(|| Error::internal(format!("{name} is no matrix that ranks divide")))
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
        self.norm_of(name, eps, None)
    }

    /// A norm's weights, put into halves where they are interleaved heads of `heads` numbers.
    fn norm_of(&mut self, name: &str, eps: f32, heads: Option<usize>) -> Result<Norm> {
        let offset = self.spec.norm_offset;
        let file = self.vector(name, 1.0 - offset)?;
        let values: Vec<bf16> = (0..file.len()).map(|at| bf16::from_f32(file[halves(heads, at)])).collect();
        let weight = self.card.alloc(values.len())?;
        self.card.upload(&values, weight)?;
        Ok(Norm { weight, eps, offset })
    }

    /// What is here of matrices of the same inputs, one below the other, rows of zeros behind them up to a multiple of 8. The rows
    /// of all but a third are put into halves when they are interleaved heads of `heads` numbers.
    pub(super) fn matrix(&mut self, names: &[&str], heads: Option<usize>, packing: Packing) -> Result<Matrix> {
        let parts = names.iter().map(|name| self.part(name)).collect::<Result<Vec<_>>>()?;
        let k = parts[0].inputs.len();
        let n = parts.iter().map(|part| part.channels.len()).sum::<usize>().next_multiple_of(8);
        if let Some(other) = parts.iter().position(|part| part.inputs != parts[0].inputs) {
            return Err(Error::internal(format!("{} and {} have other inputs", names[0], names[other])));
        }
        let data = match packing {
            Packing::Bf16 => Data::Bf16(self.card.alloc(n * k)?),
            Packing::Fp8 => Data::Fp8(Scaled { data: self.card.alloc(n * k)?, scales: self.card.alloc(n)? }),
            Packing::Q4 => Data::Q4(self.card.alloc(n * k / 8)?, self.card.alloc(n * k / 32)?),
        };
        let (mut below, most) = (0, (CHUNK / k).max(1));
        for (index, (name, Part { channels, inputs })) in names.iter().zip(parts).enumerate() {
            let (all, (_, whole_k)) = (channels.len(), self.shape(name)?);
            let heads = heads.filter(|_| index < 2);
            let tensor = match self.source {
                Source::File(weights) => Some(weights.tensor(name)?),
                Source::Random => None,
            };
            for first in (0..all).step_by(most) {
                let rows = most.min(all - first);
                let at = below + first;
                let of_file = channels.start + first..channels.start + first + rows;
                let to = match data {
                    Data::Bf16(data) => data.part(at * k, rows * k),
                    Data::Fp8(_) => self.scratch(rows * k)?.part(0, rows * k),
                    Data::Q4(codes, scales) => {
                        let to = (codes.part(at * k / 8, rows * k / 8), scales.part(at * k / 32, rows * k / 32));
                        self.send_q4(tensor.as_ref(), of_file, (&inputs, whole_k), heads, to)?;
                        continue;
                    }
                };
                match &tensor {
                    Some(tensor) => self.send(tensor, of_file, &inputs, heads, to)?,
                    None => {
                        // Uniform: three times the square is the mean of its square.
                        let size = (3.0 / whole_k as f32).sqrt();
                        random_bf16(self.card, to, (self.seed + self.done + first * k) as u64, size)?;
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
            let here = self.whole / self.spec.heads * self.shard.spec.heads;
            (self.progress)((self.done as f64 / here.max(1) as f64).min(1.0) as f32);
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

    /// Some inputs of some rows of a tensor, as bf16.
    fn send(
        &self,
        tensor: &Tensor<'_>,
        rows: Range<usize>,
        inputs: &Range<usize>,
        heads: Option<usize>,
        to: Ptr<bf16>,
    ) -> Result<()> {
        let k = inputs.len();
        self.card.send(rows.len() * k, to, |sent| {
            let sent = Shared::new(sent);
            self.pool.each(rows.len(), 1, |row| {
                // SAFETY: each row is handed out once.
                let out = unsafe { sent.part(row * k, k) };
                let row = halves(heads, rows.start + row);
                if tensor.dtype == Dtype::BF16 {
                    let row = &tensor.row(row).as_chunks::<2>().0[inputs.clone()];
                    out.iter_mut().zip(row).for_each(|(out, &number)| *out = bf16::from_le_bytes(number));
                } else {
                    let values = numbers(tensor, row, inputs);
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(value));
                }
            });
        })
    }

    /// Some inputs of some rows of a tensor of `cols` inputs, in 4 bits; made up they are all codes alike, which takes as long to read.
    fn send_q4(
        &self,
        tensor: Option<&Tensor<'_>>,
        rows: Range<usize>,
        (inputs, cols): (&Range<usize>, usize),
        heads: Option<usize>,
        (codes, scales): (Ptr<u32>, Ptr<f16>),
    ) -> Result<()> {
        let Some(tensor) = tensor else {
            // Codes from -8 to 7 have a mean square of 21.5.
            let scale = f16::from_f32(1.0 / (21.5 * cols as f32).sqrt());
            self.card.upload(&vec![scale; scales.len()], scales)?;
            let mixed: Vec<u32> = (0..codes.len() as u32).map(|at| at.wrapping_mul(0x9e37_79b9) ^ at >> 7).collect();
            return self.card.upload(&mixed, codes);
        };
        let (k, count) = (inputs.len(), rows.len());
        let row = |at: usize| -> Vec<u8> {
            let row = halves(heads, rows.start + at);
            if tensor.dtype == Dtype::Q4_0 {
                return tensor.row(row)[inputs.start / 32 * 18..inputs.end / 32 * 18].to_vec();
            }
            let mut out = Vec::with_capacity(k / 32 * 18);
            quantize_q4_0(&numbers(tensor, row, inputs), &mut out);
            out
        };
        let (mut all_scales, broken) = (vec![0u16; scales.len()], Mutex::new(None));
        self.card.send(codes.len(), codes, |all_codes| {
            let (out_codes, out_scales) = (Shared::new(all_codes), Shared::new(&mut all_scales[..]));
            self.pool.each(count, 1, |at| match pack_q4(&row(at), 1, k) {
                Ok((codes, scales)) => {
                    // SAFETY: each row is handed out once.
                    let (to_codes, to_scales) =
                        unsafe { (out_codes.part(at * k / 8, k / 8), out_scales.part(at * k / 32, k / 32)) };
                    to_codes.copy_from_slice(&codes);
                    to_scales.iter_mut().zip(scales).for_each(|(to, scale)| *to = scale.to_bits());
                }
                Err(error) => *broken.lock() = Some(error),
            });
        })?;
        if let Some(error) = broken.into_inner() {
            return Err(error);
        }
        let all_scales: Vec<f16> = all_scales.into_iter().map(f16::from_bits).collect();
        self.card.upload(&all_scales, scales)
    }
}

/// Some inputs of a row. Only the blocks that hold them are looked at.
fn numbers(tensor: &Tensor<'_>, row: usize, inputs: &Range<usize>) -> Vec<f32> {
    let (block, bytes) = (tensor.dtype.block_len(), tensor.dtype.block_bytes());
    let (first, end) = (inputs.start / block, inputs.end.div_ceil(block));
    let mut values = vec![0f32; (end - first) * block];
    // Cannot fail: the tensor's length was checked when its file was opened.
    let read = dequantize_row(tensor.dtype, &tensor.row(row)[first * bytes..end * bytes], &mut values);
    debug_assert!(read.is_ok());
    values.truncate(inputs.end - first * block);
    values.split_off(inputs.start - first * block)
}
