//! What is done to rows one by one: `embed.cu`, `add_rms_norm.cu`, `silu_mul.cu`, `rope_kv_write.cu`, `put_columns.cu`.

use half::bf16;

use super::attention::{Heads, Keys, PagedKv};
use super::launch::{Fp8, Launch, Launcher, Ptr};
use crate::base::{Error, Result};
use crate::kernel::Gate;

/// Where normed or gated rows go.
#[derive(Clone, Copy)]
pub enum Normed {
    /// `[rows, width]`
    Bf16(Ptr<bf16>),
    /// `[rows, width]`, and a scale a row.
    Fp8(Ptr<Fp8>, Ptr<f32>),
}

impl Normed {
    fn needs(self, rows: usize, width: usize) -> Result<()> {
        match self {
            Self::Bf16(out) => out.needs("out", rows * width, 16),
            Self::Fp8(out, scales) => {
                out.needs("out", rows * width, 8)?;
                scales.needs("scales", rows, 4)
            }
        }
    }
}

/// A norm's weights and numbers.
#[derive(Clone, Copy)]
pub struct Norm {
    /// `[width]`
    pub weight: Ptr<bf16>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Added to the weights: 1 for models that store them less 1.
    pub offset: f32,
}

fn eights(what: &str, width: usize) -> Result<()> {
    match width.is_multiple_of(8) && width > 0 {
        true => Ok(()),
        false => Err(Error::unsupported(format!("{what} of {width}: GPU kernels take multiples of 8"))),
    }
}

/// Threads for `width` numbers, eight each and at most `pieces` times, whole warps.
pub(super) fn threads(what: &str, width: usize, pieces: usize) -> Result<u32> {
    eights(what, width)?;
    let least = (width / 8).div_ceil(pieces);
    let wanted = least.max((width / 8).min(256)).next_multiple_of(32);
    match wanted <= 1024 {
        true => Ok(wanted as u32),
        false => Err(Error::unsupported(format!("{what} of {width}: GPU kernels take up to {}", 1024 * 8 * pieces))),
    }
}

/// `out[row] = table[ids[row] - first] * scale`, zeros for words outside `first..first + words`. ids `[rows]`, table `[words,
/// hidden]`, out `[rows, hidden]`.
///
/// # Errors
/// `Unsupported` for a width that is no multiple of 8; `Internal` when memory is too short.
#[allow(clippy::too_many_arguments)]
pub fn embed(
    on: &dyn Launcher,
    rows: usize,
    ids: Ptr<i32>,
    table: Ptr<bf16>,
    hidden: usize,
    words: std::ops::Range<usize>,
    scale: f32,
    out: Ptr<bf16>,
) -> Result<()> {
    eights("rows", hidden)?;
    ids.needs("ids", rows, 4)?;
    table.needs("table", words.len() * hidden, 16)?;
    out.needs("out", rows * hidden, 16)?;
    if rows == 0 {
        return Ok(());
    }
    let threads = threads("rows", hidden, usize::MAX)?;
    let launch = Launch::new("embed_bf16", [rows, 1, 1], threads).ptr(ids).ptr(table).ptr(out);
    on.launch(launch.int(hidden).int(words.start).int(words.len()).float(scale))
}

/// `out[i] = x[rows[i]]`, rows of `hidden` numbers.
///
/// # Errors
/// As [`embed`].
pub fn gather_rows(
    on: &dyn Launcher,
    count: usize,
    x: Ptr<bf16>,
    rows: Ptr<i32>,
    hidden: usize,
    out: Ptr<bf16>,
) -> Result<()> {
    let threads = threads("rows", hidden, usize::MAX)?;
    rows.needs("rows", count, 4)?;
    x.needs("x", hidden, 16)?;
    out.needs("out", count * hidden, 16)?;
    if count == 0 {
        return Ok(());
    }
    on.launch(Launch::new("gather_rows_bf16", [count, 1, 1], threads).ptr(x).ptr(rows).ptr(out).int(hidden))
}

/// `out[row, columns] = x[row]`: x `[rows, columns.len()]`, out `[rows, stride]`.
///
/// # Errors
/// `Unsupported` for columns or a stride that are no multiples of 4; `Internal` when memory is too short.
pub fn put_columns(
    on: &dyn Launcher,
    rows: usize,
    x: Ptr<f32>,
    columns: std::ops::Range<usize>,
    out: Ptr<f32>,
    stride: usize,
) -> Result<()> {
    let width = columns.len();
    if [width, columns.start, stride].iter().any(|number| !number.is_multiple_of(4)) {
        return Err(Error::unsupported(format!("columns {columns:?} of {stride}: GPU kernels put them in fours")));
    }
    if rows == 0 || width == 0 {
        return Ok(());
    }
    x.needs("x", rows * width, 16)?;
    out.needs("out", (rows - 1) * stride + columns.end, 16)?;
    let launch = Launch::new("put_columns_f32", [rows, width.div_ceil(4096), 1], 256).ptr(x).ptr(out);
    on.launch(launch.int(width).int(columns.start).int(stride))
}

/// `x += delta`, if there is one, and `out = x / rms(x) * weight`: x and delta `[rows, width]`.
///
/// # Errors
/// As [`embed`], and `Unsupported` for more than 32,768 numbers a row.
pub fn add_rms_norm(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    x: Ptr<bf16>,
    delta: Ptr<bf16>,
    norm: Norm,
    out: Normed,
) -> Result<()> {
    let threads = threads("rows", width, 4)?;
    x.needs("x", rows * width, 16)?;
    delta.needs("delta", if delta.is_null() { 0 } else { rows * width }, 16)?;
    norm.weight.needs("weight", width, 16)?;
    out.needs(rows, width)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = match out {
        Normed::Bf16(out) => {
            Launch::new("add_rms_norm_bf16", [rows, 1, 1], threads).ptr(x).ptr(delta).ptr(norm.weight).ptr(out)
        }
        Normed::Fp8(out, scales) => {
            let launch = Launch::new("add_rms_norm_fp8", [rows, 1, 1], threads).ptr(x).ptr(delta).ptr(norm.weight);
            launch.ptr(out).ptr(scales)
        }
    };
    on.launch(launch.int(width).float(norm.eps).float(norm.offset))
}

/// `x += delta / rms(delta) * weight`: x and delta `[rows, width]`.
///
/// # Errors
/// As [`add_rms_norm`].
pub fn norm_add(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    x: Ptr<bf16>,
    delta: Ptr<bf16>,
    norm: Norm,
) -> Result<()> {
    let threads = threads("rows", width, 4)?;
    x.needs("x", rows * width, 16)?;
    delta.needs("delta", rows * width, 16)?;
    norm.weight.needs("weight", width, 16)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch::new("norm_add_bf16", [rows, 1, 1], threads).ptr(x).ptr(delta).ptr(norm.weight);
    on.launch(launch.int(width).float(norm.eps).float(norm.offset))
}

/// `out = act(gate) * up` of gate and up side by side, `[rows, 2 * width]`.
///
/// # Errors
/// As [`embed`], and `Unsupported` for more than 65,536 numbers a row.
pub fn silu_mul(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    gate_up: Ptr<bf16>,
    gate: Gate,
    out: Normed,
) -> Result<()> {
    let threads = threads("rows", width, 8)?;
    gate_up.needs("gate_up", rows * 2 * width, 16)?;
    out.needs(rows, width)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = match out {
        Normed::Bf16(out) => Launch::new("silu_mul_bf16", [rows, 1, 1], threads).ptr(gate_up).ptr(out),
        Normed::Fp8(out, scales) => {
            Launch::new("silu_mul_fp8", [rows, 1, 1], threads).ptr(gate_up).ptr(out).ptr(scales)
        }
    };
    on.launch(launch.int(width).int(usize::from(gate == Gate::Gelu)))
}

/// How queries and keys are turned and where keys and values go.
#[derive(Clone, Copy)]
pub struct RopeKv {
    /// `[dim / 2]`: radians a position.
    pub frequencies: Ptr<f32>,
    /// Of what is turned; 1 for most models.
    pub magnitude: f32,
    /// `[(heads + 2 * kv_heads) * dim]`, added first; or null.
    pub bias: Ptr<bf16>,
    /// Of each query head, if the model has one; its weight may be null.
    pub q_norm: Norm,
    /// Of each key head.
    pub k_norm: Norm,
}

/// Turns queries in place and puts keys and values into the pool. qkv `[rows, (heads + 2 * kv_heads) * dim]`; positions and
/// slots `[rows]`, slots as `block * block_tokens + place`, below 0 for rows that only fill a batch up.
///
/// # Errors
/// `Unsupported` for heads of more than 256 or an odd number; `Internal` when memory is too short.
#[allow(clippy::too_many_arguments)]
pub fn rope_kv_write(
    on: &dyn Launcher,
    rows: usize,
    heads: Heads,
    qkv: Ptr<bf16>,
    positions: Ptr<i32>,
    slots: Ptr<i32>,
    rope: &RopeKv,
    kv: &PagedKv,
) -> Result<()> {
    let Heads { heads, kv_heads, dim } = heads;
    if dim > 256 || !dim.is_multiple_of(2) {
        return Err(Error::unsupported(format!("heads of {dim}: GPU kernels take even numbers up to 256")));
    }
    let all = heads + 2 * kv_heads;
    qkv.needs("qkv", rows * all * dim, 16)?;
    positions.needs("positions", rows, 4)?;
    slots.needs("slots", rows, 4)?;
    rope.frequencies.needs("frequencies", dim / 2, 4)?;
    rope.bias.needs("bias", if rope.bias.is_null() { 0 } else { all * dim }, 2)?;
    for norm in [rope.q_norm, rope.k_norm].iter().filter(|norm| !norm.weight.is_null()) {
        norm.weight.needs("norm of heads", dim, 2)?;
    }
    if rows == 0 {
        return Ok(());
    }
    let name = match kv.data {
        Keys::Bf16(..) => "rope_kv_write_bf16",
        Keys::Fp8(..) => "rope_kv_write_fp8",
    };
    let launch = Launch::new(name, [(rows * all).div_ceil(4), 1, 1], 128);
    let launch = launch.ptr(qkv).ptr(positions).ptr(slots).ptr(rope.frequencies);
    let launch = launch.ptr(rope.bias).ptr(rope.q_norm.weight).ptr(rope.k_norm.weight);
    let launch = match kv.data {
        Keys::Bf16(keys, values) => launch.ptr(keys).ptr(values),
        Keys::Fp8(keys, values) => launch.ptr(keys).ptr(values),
    };
    let launch = launch.int(rows).int(heads).int(kv_heads).int(dim).int(1 << kv.block_shift);
    let launch = launch.float(rope.k_norm.eps).float(rope.k_norm.offset).float(rope.magnitude);
    on.launch(launch.float(kv.k_scale).float(kv.v_scale))
}

/// Makes blocks of a pool copies of others: pairs `[count, 2]` of from and to, no block in two of them. A block is `bytes`
/// long in each of `layers` layers, `stride` bytes apart.
///
/// # Errors
/// `Internal` for lengths that are no multiples of 16 or memory that is too short.
pub fn copy_blocks(
    on: &dyn Launcher,
    count: usize,
    pool: Ptr<u8>,
    pairs: Ptr<i32>,
    bytes: usize,
    stride: usize,
    layers: usize,
) -> Result<()> {
    if !bytes.is_multiple_of(16) || !stride.is_multiple_of(16) {
        return Err(Error::internal(format!("blocks of {bytes} bytes, {stride} apart: no multiples of 16")));
    }
    pool.needs("pool", layers.saturating_sub(1) * stride + bytes, 16)?;
    pairs.needs("pairs", 2 * count, 4)?;
    if count == 0 || layers == 0 {
        return Ok(());
    }
    let launch = Launch::new("copy_blocks", [count, layers, 1], 256).ptr(pool).ptr(pairs);
    on.launch(launch.long(bytes).long(stride))
}

/// bf16 weights `[n, k]` as fp8 with a scale a channel.
///
/// # Errors
/// As [`embed`].
pub fn quantize_fp8(
    on: &dyn Launcher,
    (n, k): (usize, usize),
    weight: Ptr<bf16>,
    out: Ptr<Fp8>,
    scales: Ptr<f32>,
) -> Result<()> {
    let threads = threads("weights", k, usize::MAX)?;
    weight.needs("weights", n * k, 16)?;
    out.needs("out", n * k, 8)?;
    scales.needs("scales", n, 4)?;
    if n == 0 {
        return Ok(());
    }
    on.launch(Launch::new("quantize_fp8", [n, 1, 1], threads).ptr(weight).ptr(out).ptr(scales).int(k))
}

/// Numbers in `-size..size` that depend on their place and `seed`: weights where none can be had.
///
/// # Errors
/// The launcher's.
pub fn random_bf16(on: &dyn Launcher, weight: Ptr<bf16>, seed: u64, size: f32) -> Result<()> {
    if weight.is_empty() {
        return Ok(());
    }
    let blocks = weight.len().div_ceil(256).min(1 << 16);
    let launch = Launch::new("random_bf16", [blocks, 1, 1], 256).ptr(weight).long(weight.len());
    on.launch(launch.long(seed as usize).float(size))
}
