//! Kernels for GPUs: what it takes to launch each of `kernels/*.cu`.
//!
//! ```text
//! rows, attention, gemm, encoder, …  shapes checked, grid and arguments chosen ──> Launch ──┬─> a GPU's stream
//!                                                                                         └─> Emulator: the same source,
//!                                                                                             compiled for the host
//! ```
//!
//! A [`Launch`] is a kernel's name, its grid and its arguments as the driver takes them, so tests without a GPU run what a GPU
//! would be told to. Memory is a [`Ptr`]: an address of the device, typed and of known length. Nothing here allocates.
//!
//! Cards that are opened together are ranks of a group: they sum and gather over NCCL, emulated ones over
//! [`crate::kernel::Collective`].

mod attention;
#[cfg(feature = "cuda")]
mod blas;
mod card;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "emulate")]
mod emulator;
mod encoder;
mod gemm;
mod launch;
mod lora;
#[cfg(feature = "cuda")]
mod nccl;
mod open;
#[cfg(feature = "cuda")]
mod pinned;
mod rows;
mod sample;
mod trial;
mod watch;

pub use attention::{Attention, Boxes, Heads, Item, Keys, Merge, NARROW, PagedKv, Tile, WIDE};
pub use card::{Bits, Card, LANDING, Part, Parts};
#[cfg(feature = "emulate")]
pub use emulator::{Chip, EmulatedCard, Emulator};
pub use encoder::{
    Activation, LayerNorm, Pooled, TEXT_ROWS, Tables, TextItem, Token, add_layer_norm, attend_texts, bias_activate,
    embed_layer_norm, pool_rows, takes_texts,
};
pub use gemm::{LARGE_UNIT, SMALL_ROWS, Scaled, Sink, Weight, gemm_small, pack_q4, scale_product};
pub use launch::{Fp8, Launch, Launcher, Ptr, Table};
pub use lora::{Adapted, LORA_RANK, LORA_ROWS, Lora, lora};
pub use open::{collectives, count, open, open_ranks};
pub use rows::{
    Norm, Normed, RopeKv, add_rms_norm, copy_blocks, embed, gather_rows, norm_add, put_columns, quantize_fp8,
    random_bf16, rope_kv_write, silu_mul,
};
pub use sample::{Drawn, Edit, UNWANTED, Wish, follow, sample, verify};
pub use trial::fastest;
pub use watch::{Health, Watch};
