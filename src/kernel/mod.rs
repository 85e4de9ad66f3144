//! The operations a network is made of, one file each: fast code per instruction set, chosen at run time, and the plain
//! reference it is tested against.
//!
//!     quant    block formats of files          panel   weights repacked for the kernels
//!     rows     norm, quantise, rope: one row   gemm    rows x panels, with what follows folded in
//!     int8     quantised panels, in gemm       words   rows x panels in 16 bits, layer norm: encoders
//!     lowrank  what adapters add to a product
//!     attention  softmax(q K) V over paged KV  pool    the threads, simd the instruction sets, buffer and pages the memory
//!     gpu      how kernels/*.cu are launched
//!     collective what the ranks of a group sum and gather

use std::sync::Arc;

mod attention;
mod buffer;
mod collective;
mod gemm;
pub mod gpu;
mod int8;
mod lowrank;
pub mod pages;
mod panel;
mod pool;
pub mod quant;
mod rows;
mod simd;
#[cfg(test)]
pub(crate) mod testing;
mod words;

pub use attention::{Attention, KvLayout, KvSpan, MAX_DIM, MAX_GROUP, Query};
pub use buffer::{Arena, Buffer, Plain, Shared};
pub use collective::{Collective, share};
pub use gemm::{Gate, Linear, Out, gated};
pub use lowrank::{Adapters, Cut, Delta, Find, LowRank, MAX_RANK};
pub use panel::{LANES, Panels, Part, Source};
pub use pool::Pool;
pub use quant::Dtype;
pub use rows::{Activations, Rope, each_row, norm_in_place, rotate};
pub use simd::Isa;
pub use words::{Then, WordRows, Words, layer_norm};

/// A CPU device: its threads and the instruction set its kernels use.
#[derive(Clone)]
pub struct Cpu {
    /// Worker threads, shared by the models of a device.
    pub pool: Arc<Pool>,
    /// One of [`Isa::available`].
    pub isa: Isa,
}
