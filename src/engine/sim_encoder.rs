//! A simulated encoder: no network; what comes out of a text depends on its tokens, and its first number is its length
//! before it is scaled to what a vector is. For tests and load work without weights.

use std::time::Duration;

use crate::base::{Error, Result};
use crate::engine::oneshot::{OneShot, OneShotLimits};
use crate::engine::sim::SimSpec;
use crate::model::encoder::EncodeBatch;

/// The simulated encoder.
pub struct SimEncoder {
    spec: SimSpec,
    width: usize,
    context: usize,
    out: Vec<f32>,
    steps: u64,
}

impl SimEncoder {
    /// Of the settings of a simulated device, those about time and failing count here.
    pub fn new(spec: SimSpec, width: usize, context: usize) -> Self {
        Self { spec, width, context, out: Vec::new(), steps: 0 }
    }
}

impl OneShot for SimEncoder {
    fn limits(&self) -> OneShotLimits {
        let rows = self.context.max(8192);
        OneShotLimits { rows, texts: 512, text_rows: self.context, vocab: 256, width: self.width }
    }

    fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]> {
        self.steps += 1;
        if self.steps == self.spec.fail_at {
            return Err(Error::internal(format!("sim: step {} was to fail", self.steps)));
        }
        assert!(self.steps != self.spec.panic_at, "sim: step {} was to panic", self.steps);
        self.out.clear();
        for ids in batch.each_text() {
            let sums = (1..self.width as u64).map(|i| {
                let mixed = ids.iter().fold(i, |x, &id| (x ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
            });
            self.out.push(ids.len() as f32);
            self.out.extend(sums);
        }
        let busy = self.spec.step_us + self.spec.row_us * batch.rows() as u64;
        if busy > 0 {
            std::thread::sleep(Duration::from_micros(busy));
        }
        Ok(&self.out)
    }
}
