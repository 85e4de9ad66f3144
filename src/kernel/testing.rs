//! What the tests of this folder share: reproducible numbers and every instruction set of the machine.

use std::sync::Arc;

use crate::kernel::quant::Dtype;
use crate::kernel::{Cpu, Isa, Pool};

/// One device of two threads for each instruction set that this machine has.
pub fn cpus() -> Vec<Cpu> {
    let pool = Arc::new(Pool::new(2));
    Isa::available().iter().map(|&isa| Cpu { pool: pool.clone(), isa }).collect()
}

/// Reproducible random numbers (splitmix64).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// Rows of any format whose weights are of a model's size: random codes under sane scales.
    pub fn weights(&mut self, dtype: Dtype, channels: usize, inputs: usize) -> Vec<u8> {
        let blocks = channels * inputs / dtype.block_len();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let start = bytes.len();
            bytes.extend((0..dtype.block_bytes()).map(|_| self.bits() as u8));
            let scale = half::f16::from_f32(self.value() * 0.02).to_le_bytes();
            let min = half::f16::from_f32(self.value() * 0.1).to_le_bytes();
            let block = &mut bytes[start..];
            match dtype {
                Dtype::F32 => block.copy_from_slice(&self.value().to_le_bytes()),
                Dtype::F16 => block.copy_from_slice(&half::f16::from_f32(self.value()).to_le_bytes()),
                Dtype::BF16 => block.copy_from_slice(&half::bf16::from_f32(self.value()).to_le_bytes()),
                Dtype::Q6_K => block[208..].copy_from_slice(&scale),
                Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => block[..2].copy_from_slice(&scale),
                Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4_K | Dtype::Q5_K => {
                    block[..2].copy_from_slice(&scale);
                    block[2..4].copy_from_slice(&min);
                }
            }
        }
        bytes
    }
}
