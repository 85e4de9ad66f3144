//! The operations a network is made of, one file each: fast code per instruction set, chosen at run time, and the plain
//! reference it is tested against.

mod pool;
pub mod quant;

pub use pool::Pool;
pub use quant::Dtype;
