//! What encoders do to rows and texts: `layer_norm.cu`, `bias_activate.cu`, `varlen_attention.cu`, `pool_rows.cu`.

use half::bf16;

use super::launch::{Launch, Launcher, Ptr};
use super::rows::threads;
use crate::base::{Error, Result};

/// Rows of an item of attention, at most.
pub const TEXT_ROWS: usize = 64;
/// Numbers of a vector, at most: eight warps' sums of it fit the shared memory of every chip.
const MOST_WIDTH: usize = 3072;

/// Where a row comes from. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Token {
    /// Row of the words' table.
    pub word: i32,
    /// Row of the positions' table.
    pub position: i32,
    /// Row of the segments' table, if there is one.
    pub segment: i32,
}

/// Some rows of a text, which see all of it. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TextItem {
    /// First row of the step.
    pub row: i32,
    /// Rows, up to [`TEXT_ROWS`].
    pub rows: i32,
    /// First row of the text.
    pub text: i32,
    /// Rows of the text.
    pub length: i32,
}

impl TextItem {
    /// The items of a text whose first row in the step is `text`.
    pub fn of(text: usize, length: usize) -> impl Iterator<Item = Self> {
        (0..length).step_by(TEXT_ROWS).map(move |at| Self {
            row: (text + at) as i32,
            rows: TEXT_ROWS.min(length - at) as i32,
            text: text as i32,
            length: length as i32,
        })
    }
}

/// A text that becomes a vector. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pooled {
    /// First row of the step.
    pub row: i32,
    /// Rows.
    pub rows: i32,
    /// 1: the mean of them; 0: the first.
    pub mean: i32,
}

/// A layer norm's weights and numbers.
#[derive(Clone, Copy)]
pub struct LayerNorm {
    /// `[width]`
    pub weight: Ptr<f32>,
    /// `[width]`
    pub bias: Ptr<f32>,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    fn needs(&self, width: usize) -> Result<()> {
        self.weight.needs("weight", width, 16)?;
        self.bias.needs("bias", width, 16)
    }
}

/// What a token's row is the sum of: tables of rows of `width` numbers.
#[derive(Clone, Copy)]
pub struct Tables {
    /// By word.
    pub words: Ptr<bf16>,
    /// By position.
    pub positions: Ptr<bf16>,
    /// By segment, or null.
    pub segments: Ptr<bf16>,
}

/// `x = y = norm(words[word] + positions[position] + segments[segment])`: tokens `[rows]`, x and y `[rows, width]`.
///
/// # Errors
/// `Unsupported` for a width that is no multiple of 8 or more than 32,768; `Internal` when memory is too short.
#[allow(clippy::too_many_arguments)]
pub fn embed_layer_norm(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    tokens: Ptr<Token>,
    tables: Tables,
    norm: LayerNorm,
    x: Ptr<f32>,
    y: Ptr<bf16>,
) -> Result<()> {
    let threads = threads("rows", width, 4)?;
    tokens.needs("tokens", rows, 4)?;
    tables.words.needs("words", width, 16)?;
    tables.positions.needs("positions", width, 16)?;
    tables.segments.needs("segments", if tables.segments.is_null() { 0 } else { width }, 16)?;
    norm.needs(width)?;
    x.needs("x", rows * width, 16)?;
    y.needs("y", rows * width, 16)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch::new("embed_layer_norm", [rows, 1, 1], threads).ptr(tokens);
    let launch = launch.ptr(tables.words).ptr(tables.positions).ptr(tables.segments);
    on.launch(launch.ptr(norm.weight).ptr(norm.bias).ptr(x).ptr(y).int(width).float(norm.eps))
}

/// `x = y = norm(x + delta + added)`: x, delta and y `[rows, width]`, added `[width]`.
///
/// # Errors
/// As [`embed_layer_norm`].
#[allow(clippy::too_many_arguments)]
pub fn add_layer_norm(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    x: Ptr<f32>,
    delta: Ptr<bf16>,
    added: Ptr<f32>,
    norm: LayerNorm,
    y: Ptr<bf16>,
) -> Result<()> {
    let threads = threads("rows", width, 4)?;
    x.needs("x", rows * width, 16)?;
    delta.needs("delta", rows * width, 16)?;
    added.needs("added", width, 16)?;
    norm.needs(width)?;
    y.needs("y", rows * width, 16)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch::new("add_layer_norm", [rows, 1, 1], threads).ptr(x).ptr(delta).ptr(added);
    on.launch(launch.ptr(norm.weight).ptr(norm.bias).ptr(y).int(width).float(norm.eps))
}

/// What a product and its bias go through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `x * Phi(x)`, exact.
    Gelu,
    /// The approximation of it by tanh.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// tanh.
    Tanh,
}

/// `x = act(x + bias)`: x `[rows, width]`, bias `[width]`.
///
/// # Errors
/// `Unsupported` for a width that is no multiple of 8; `Internal` when memory is too short.
pub fn bias_activate(
    on: &dyn Launcher,
    rows: usize,
    width: usize,
    x: Ptr<bf16>,
    bias: Ptr<f32>,
    act: Activation,
) -> Result<()> {
    let threads = threads("rows", width, usize::MAX)?;
    x.needs("x", rows * width, 16)?;
    bias.needs("bias", width, 4)?;
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch::new("bias_activate", [rows, 1, 1], threads).ptr(x).ptr(bias);
    on.launch(launch.int(width).int(act as usize))
}

/// Whether there are kernels for `heads` heads of `dim` numbers, and rows and vectors that consist of them.
///
/// # Errors
/// `Unsupported` for heads that are not 32, 64 or 128 wide, or wider rows than 3,072.
pub fn takes_texts(heads: usize, dim: usize) -> Result<()> {
    match [32, 64, 128].contains(&dim) && heads * dim <= MOST_WIDTH {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "{heads} heads of {dim}: GPU kernels for encoders take 32, 64 and 128, up to {MOST_WIDTH} a row"
        ))),
    }
}

/// Attention of `count` items. qkv `[rows, 3 * heads * dim]`, bias `[3 * heads * dim]`, out `[rows, heads * dim]`; scores are divided by
/// the root of `dim`.
///
/// # Errors
/// As [`takes_texts`]; `Internal` when memory is too short.
pub fn attend_texts(
    on: &dyn Launcher,
    (items, count): (Ptr<TextItem>, usize),
    (heads, dim): (usize, usize),
    qkv: Ptr<bf16>,
    bias: Ptr<f32>,
    out: Ptr<bf16>,
) -> Result<()> {
    takes_texts(heads, dim)?;
    if count == 0 {
        return Ok(());
    }
    items.needs("items", count, 4)?;
    qkv.needs("qkv", 3 * heads * dim, 16)?;
    bias.needs("bias", 3 * heads * dim, 8)?;
    out.needs("out", heads * dim, 4)?;
    // Two tiles of keys and two of values.
    let launch = Launch::new(format!("attend_text_{dim}"), [count, heads, 1], 128).shared(4 * TEXT_ROWS * dim * 2);
    on.launch(launch.ptr(qkv).ptr(bias).ptr(items).ptr(out).int(heads).float(1.0 / (dim as f32).sqrt()))
}

/// A vector of length 1 for each of `count` texts: x `[rows, width]`, out `[count, width]`.
///
/// # Errors
/// `Unsupported` for a width that is no multiple of 4 or more than 3,072; `Internal` when memory is too short.
pub fn pool_rows(
    on: &dyn Launcher,
    (texts, count): (Ptr<Pooled>, usize),
    width: usize,
    x: Ptr<f32>,
    out: Ptr<f32>,
) -> Result<()> {
    if !width.is_multiple_of(4) || width > MOST_WIDTH {
        return Err(Error::unsupported(format!(
            "vectors of {width}: GPU kernels take multiples of 4, up to {MOST_WIDTH}"
        )));
    }
    texts.needs("texts", count, 4)?;
    x.needs("x", width, 16)?;
    out.needs("out", count * width, 4)?;
    if count == 0 {
        return Ok(());
    }
    let launch = Launch::new("pool_rows", [count, 1, 1], 256).shared(8 * width * 4);
    on.launch(launch.ptr(x).ptr(texts).ptr(out).int(width))
}
