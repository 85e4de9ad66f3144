//! What adapters add to a product: `lora.cu`.

use half::bf16;

use super::launch::{Launch, Launcher, Ptr};
use crate::base::{Error, Result};

/// Rank that adapters are filled up to with zeros.
pub const LORA_RANK: usize = 32;
/// Rows of an item, at most.
pub const LORA_ROWS: usize = 16;

/// Rows that follow each other and have one adapter. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Adapted {
    /// First row.
    pub row: i32,
    /// Rows, up to [`LORA_ROWS`].
    pub rows: i32,
    /// Which of the step's adapters.
    pub adapter: i32,
    /// Fills it up to 16 bytes.
    pub unused: i32,
}

/// One matrix' adapters on the device.
#[derive(Clone, Copy)]
pub struct Lora {
    /// Addresses of `[32, k]` bf16, one an adapter.
    pub a: Ptr<u64>,
    /// Addresses of `[n, 32]` bf16.
    pub b: Ptr<u64>,
    /// One an adapter.
    pub scales: Ptr<f32>,
}

/// `out += scale * B (A x)` for the rows of `count` items: x `[rows, x_stride]` of `k` inputs, out `[rows, out_stride]` of `n` channels,
/// `between` `[rows, 32]`.
///
/// # Errors
/// `Unsupported` for inputs that are no multiple of 32 or channels of none of 8; `Internal` when memory is too short.
#[allow(clippy::too_many_arguments)]
pub fn lora(
    on: &dyn Launcher,
    (items, count): (Ptr<Adapted>, usize),
    lora: &Lora,
    (n, k): (usize, usize),
    x: Ptr<bf16>,
    x_stride: usize,
    between: Ptr<bf16>,
    out: Ptr<bf16>,
    out_stride: usize,
) -> Result<()> {
    if !k.is_multiple_of(32) || !n.is_multiple_of(8) || !x_stride.is_multiple_of(8) || !out_stride.is_multiple_of(2) {
        return Err(Error::unsupported(format!(
            "adapters of {n} x {k}: inputs in multiples of 32, channels in eights"
        )));
    }
    items.needs("items", count, 4)?;
    x.needs("x", k, 16)?;
    between.needs("between", LORA_RANK, 16)?;
    out.needs("out", n, 4)?;
    if count == 0 {
        return Ok(());
    }
    let launch =
        Launch::new("lora_shrink", [count, 1, 1], 128).ptr(x).ptr(lora.a).ptr(lora.scales).ptr(items).ptr(between);
    on.launch(launch.int(k).int(x_stride))?;
    let launch =
        Launch::new("lora_expand", [count, n.div_ceil(32), 1], 128).ptr(between).ptr(lora.b).ptr(items).ptr(out);
    on.launch(launch.int(n).int(out_stride))
}
