//! How long a step takes on a device that is not there.
//!
//! ```text
//! memory   (weights + KV of all sequences) / bandwidth  ┐
//!                                                       ├ the longer one, + overhead a step + overhead a drawn token
//! compute  (rows * FLOPs + attention) / rate            ┘
//! ```
//!
//! A decode step streams all weights and every sequence's KV once, so memory bounds it until the rows of a step outweigh
//! that; a prompt's rows are bound by arithmetic. Rates are what well-made engines reach, not what data sheets promise.
//! `tests/simulate.rs` holds the presets to published figures.

/// The figures of a device with a model on it. A pair of GPUs that share a model is one device here.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cost {
    /// Streamed in every step.
    pub weight_bytes: f64,
    /// K and V of one token over all layers.
    pub kv_bytes_per_token: f64,
    /// Multiplications and additions of one row, attention left out.
    pub flops_per_token: f64,
    /// Those of one row's attention to one token.
    pub attention_flops: f64,
    /// Memory bandwidth reached.
    pub bytes_per_s: f64,
    /// Arithmetic rate reached.
    pub flops_per_s: f64,
    /// Launches, reductions between GPUs, scheduling: once a step.
    pub step_overhead_us: f64,
    /// Sampling and delivery of one token.
    pub token_overhead_us: f64,
    /// All of the device's memory.
    pub memory_bytes: f64,
    /// Of that, what is neither weights nor KV: workspaces, graphs, a margin.
    pub reserved_bytes: f64,
}

/// The work of one step, added up over its sequences.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct Work {
    /// Tokens computed.
    pub rows: u64,
    /// Tokens whose KV is read: for each sequence its length so far, once.
    pub context: u64,
    /// Pairs of a row and a token that it attends to.
    pub attended: u64,
    /// Tokens drawn.
    pub drawn: u64,
}

impl Work {
    /// Adds one sequence: `rows` tokens computed behind `start` others.
    pub fn add(&mut self, start: u64, rows: u64) {
        self.rows += rows;
        self.context += start + rows;
        self.attended += rows * start + rows * (rows + 1) / 2;
    }

    /// A step in which `sequences` sequences of `context` tokens altogether decode one token each.
    pub fn decode(sequences: u64, context: u64) -> Self {
        Self { rows: sequences, context, attended: context, drawn: sequences }
    }
}

impl Cost {
    /// Nanoseconds of a step, at least one.
    pub fn step_ns(&self, work: Work) -> u64 {
        let bytes = self.weight_bytes + work.context as f64 * self.kv_bytes_per_token;
        let flops = work.rows as f64 * self.flops_per_token + work.attended as f64 * self.attention_flops;
        let seconds = (bytes / self.bytes_per_s).max(flops / self.flops_per_s);
        let overhead_us = self.step_overhead_us + work.drawn as f64 * self.token_overhead_us;
        ((seconds * 1e9 + overhead_us * 1e3) as u64).max(1)
    }

    /// Nanoseconds of a request that has an idle device for itself and finds nothing in the prefix cache.
    pub fn alone_ns(&self, prompt: u64, output: u64) -> u64 {
        let mut first = Work { drawn: 1, ..Work::default() };
        first.add(0, prompt.max(1));
        let later = output.saturating_sub(1);
        self.step_ns(first) + later * self.step_ns(Work::decode(1, prompt + output / 2))
    }

    /// Tokens that fit beside the weights, in whole blocks of `block_tokens`.
    pub fn blocks(&self, block_tokens: usize) -> usize {
        let left = self.memory_bytes - self.weight_bytes - self.reserved_bytes;
        (left.max(0.0) / (self.kv_bytes_per_token * block_tokens as f64)) as usize
    }
}

/// A device and a model by one name.
pub struct Preset {
    /// What `--device` says.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Catalog id, for context and price.
    pub model: &'static str,
    /// Its figures.
    pub cost: Cost,
    /// Tokens a step, prompt tokens of one sequence in it, sequences at a time.
    pub limits: [usize; 3],
    /// Requests a second that keep it busy without making it wait.
    pub rate: f64,
}

const GB: f64 = 1e9;
const T: f64 = 1e12;

/// Llama 3.1 8B on one GPU: 32 layers, 8 KV heads of 128, hidden 4096.
const LLAMA_8B: Cost = Cost {
    weight_bytes: 15.0 * GB,
    kv_bytes_per_token: 131_072.0,
    flops_per_token: 15.0e9,
    attention_flops: 4.0 * 32.0 * 4096.0,
    bytes_per_s: 3.0 * T,
    flops_per_s: 590.0 * T,
    step_overhead_us: 1_300.0,
    token_overhead_us: 2.0,
    memory_bytes: 80.0 * GB,
    reserved_bytes: 6.0 * GB,
};

/// Llama 3.3 70B in fp8 on one H200: 80 layers, 8 KV heads of 128, hidden 8192. KV in fp8.
const LLAMA_70B: Cost = Cost {
    weight_bytes: 70.6 * GB,
    kv_bytes_per_token: 163_840.0,
    flops_per_token: 139.0e9,
    attention_flops: 4.0 * 80.0 * 8192.0,
    bytes_per_s: 4.3 * T,
    flops_per_s: 870.0 * T,
    step_overhead_us: 2_000.0,
    token_overhead_us: 2.0,
    memory_bytes: 141.0 * GB,
    reserved_bytes: 8.0 * GB,
};

/// Every preset.
pub static PRESETS: [Preset; 7] = [
    Preset {
        name: "h100-llama-8b-bf16",
        about: "Llama 3.1 8B in bf16 on one H100 of 80 GB",
        model: "@cf/meta/llama-3.1-8b-instruct-fp8-fast",
        cost: LLAMA_8B,
        limits: [8192, 2048, 256],
        rate: 4.0,
    },
    Preset {
        name: "h100-llama-8b-fp8",
        about: "Llama 3.1 8B in fp8 with fp8 KV on one H100 of 80 GB",
        model: "@cf/meta/llama-3.1-8b-instruct-fp8-fast",
        cost: Cost { weight_bytes: 8.0 * GB, kv_bytes_per_token: 65_536.0, flops_per_s: 870.0 * T, ..LLAMA_8B },
        limits: [8192, 2048, 512],
        rate: 6.0,
    },
    Preset {
        name: "h100-llama-8b-int4",
        about: "Llama 3.1 8B in int4 on one H100 of 80 GB",
        model: "@cf/meta/llama-3.1-8b-instruct-awq",
        cost: Cost { weight_bytes: 4.65 * GB, ..LLAMA_8B },
        limits: [8192, 2048, 256],
        rate: 4.0,
    },
    Preset {
        name: "h200-llama-70b-fp8",
        about: "Llama 3.3 70B in fp8 with fp8 KV on one H200 of 141 GB",
        model: "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
        cost: LLAMA_70B,
        limits: [2048, 1024, 256],
        rate: 0.3,
    },
    Preset {
        name: "2xh100-llama-70b-fp8",
        about: "Llama 3.3 70B in fp8 with fp8 KV on a pair of H100 of 80 GB",
        model: "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
        cost: Cost {
            bytes_per_s: 6.0 * T,
            flops_per_s: 1_740.0 * T,
            // Two reductions between the cards in each of 80 layers.
            step_overhead_us: 6_500.0,
            memory_bytes: 160.0 * GB,
            reserved_bytes: 12.0 * GB,
            ..LLAMA_70B
        },
        limits: [2048, 1024, 256],
        rate: 0.3,
    },
    Preset {
        name: "h100-llama-70b-int4",
        about: "Llama 3.3 70B in int4 with fp8 KV on one H100 of 80 GB",
        model: "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
        cost: Cost {
            weight_bytes: 37.4 * GB,
            bytes_per_s: 3.0 * T,
            flops_per_s: 590.0 * T,
            memory_bytes: 80.0 * GB,
            ..LLAMA_70B
        },
        limits: [2048, 1024, 128],
        rate: 0.2,
    },
    Preset {
        name: "cpu-smollm2-135m",
        about: "SmolLM2 135M in 4 bits on two cores with AVX-512, as measured in PERFORMANCE.md",
        model: "@cf/huggingfacetb/smollm2-135m-instruct",
        cost: Cost {
            weight_bytes: 98e6,
            kv_bytes_per_token: 23_040.0,
            flops_per_token: 0.27e9,
            attention_flops: 4.0 * 30.0 * 576.0,
            bytes_per_s: 21.0 * GB,
            flops_per_s: 0.5 * T,
            step_overhead_us: 100.0,
            token_overhead_us: 350.0,
            memory_bytes: 2.4 * GB,
            reserved_bytes: 0.3 * GB,
        },
        limits: [512, 256, 64],
        rate: 1.0,
    },
];

/// The preset of this name.
pub fn preset(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_the_sum_of_its_sequences() {
        let mut work = Work::default();
        work.add(10, 3);
        work.add(0, 2);
        assert_eq!(work, Work { rows: 5, context: 15, attended: 36 + 3, drawn: 0 });
        let mut decode = Work { drawn: 2, ..Work::default() };
        decode.add(9, 1);
        decode.add(4, 1);
        assert_eq!(decode, Work::decode(2, 15));
    }

    #[test]
    fn memory_bounds_few_rows_and_arithmetic_many() {
        let cost = Cost { step_overhead_us: 0.0, token_overhead_us: 0.0, ..PRESETS[1].cost };
        assert_eq!(cost.step_ns(Work::decode(1, 0)), (8.0 / 3.0 * 1e6) as u64);
        let mut prompt = Work::default();
        prompt.add(0, 8192);
        assert!(cost.step_ns(prompt) > (8192.0 * 15e9 / 870e12 * 1e9) as u64);
        let slower = Cost { step_overhead_us: 1000.0, ..cost };
        assert_eq!(slower.step_ns(prompt), cost.step_ns(prompt) + 1_000_000);
    }

    #[test]
    fn every_preset_has_a_name_of_its_own_a_known_model_and_room_for_its_context() {
        let catalog = crate::config::Catalog::builtin();
        for preset in &PRESETS {
            let entry = catalog.resolve(preset.model).unwrap();
            assert!(std::ptr::eq(super::preset(preset.name).unwrap(), preset));
            assert!(preset.cost.blocks(16) * 16 > entry.context as usize, "{}", preset.name);
        }
    }
}
