//! The operations a network is made of, one file each: fast code per instruction set, chosen at run time, and the plain
//! reference it is tested against.

mod buffer;
mod pool;
mod simd;

pub use buffer::{Buffer, Shared};
pub use pool::Pool;
pub use simd::Isa;
