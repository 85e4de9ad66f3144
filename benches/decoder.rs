//! Tokens per second of the decoder alone: prefill, and decode at several batch sizes, on the demo model.
//!
//!     NEUROND_TEST_MODELS=models cargo bench --bench decoder [-- THREADS]
//!
//! Best of a few rounds, so that a busy neighbour does not decide.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use neurond::base::Result;
use neurond::config::{KvType, Precision};
use neurond::kernel::{Isa, Pool};
use neurond::model::weights::Weights;
use neurond::model::{Batch, Decoder, DecoderOptions};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BLOCK: usize = 16;
const PREFILL: usize = 512;
const CONTEXT: usize = 128;
const STEPS: usize = 24;
const BATCHES: [usize; 5] = [1, 4, 16, 32, 64];

fn main() -> Result<()> {
    let named = std::env::var_os("NEUROND_TEST_MODELS").map(PathBuf::from);
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let folders = named.into_iter().chain([root.join("target/test-models"), root.join("models")]);
    let Some(path) = folders.map(|folder| folder.join(FILE)).find(|path| path.is_file()) else {
        println!("skipped: no weights ({FILE} in $NEUROND_TEST_MODELS, target/test-models or models)");
        return Ok(());
    };
    let threads = std::env::args().filter_map(|argument| argument.parse().ok()).next();
    let threads = threads.or(std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);

    let begin = Instant::now();
    let weights = Weights::open(&path)?;
    let spec = weights.spec()?;
    let mut options = DecoderOptions {
        pool: Arc::new(Pool::new(threads)),
        isa: Isa::detect(),
        precision: Precision::Fast,
        kv: KvType::F16,
        kv_bytes: 0,
        block_tokens: BLOCK,
        max_rows: PREFILL,
        max_sample_rows: 64,
    };
    let blocks_each = (CONTEXT + STEPS).div_ceil(BLOCK);
    options.kv_bytes = options.kv_block_bytes(&spec) * (64 * blocks_each).max(PREFILL / BLOCK);
    let mut decoder = Decoder::open(&weights, spec, &options, &|_| ())?;
    let opened = begin.elapsed();
    println!("{} on {threads} threads, {}", path.display(), options.isa);
    println!("open {:>8.0} ms, weights {} MB packed", opened.as_secs_f64() * 1e3, decoder.weight_bytes() / 1_000_000);

    let table: Vec<u32> = (0..(PREFILL / BLOCK) as u32).collect();
    let mut batch = Batch::default();
    let prompt = |decoder: &mut Decoder, batch: &mut Batch, rows: usize| -> Result<Duration> {
        let tokens: Vec<u32> = (0..rows as u32).map(|i| 1000 + i * 37 % 5000).collect();
        batch.clear();
        batch.push(&tokens, 0, &table[..rows.div_ceil(BLOCK)], [rows as u32 - 1]);
        let begin = Instant::now();
        decoder.forward(batch)?;
        Ok(begin.elapsed())
    };
    prompt(&mut decoder, &mut batch, PREFILL)?;
    for rows in [32, 128, PREFILL] {
        let best =
            (0..6).map(|_| prompt(&mut decoder, &mut batch, rows)).collect::<Result<Vec<_>>>()?.into_iter().min();
        let seconds = best.unwrap_or_default().as_secs_f64();
        println!("prefill {rows:>4}   {:>8.1} tok/s   {:>8.2} ms", rows as f64 / seconds, seconds * 1e3);
    }
    for sequences in BATCHES {
        let tables: Vec<Vec<u32>> =
            (0..sequences).map(|s| (0..blocks_each).map(|b| (s * blocks_each + b) as u32).collect()).collect();
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let begin = Instant::now();
            for step in 0..STEPS {
                batch_of(&tables, CONTEXT + step, &mut batch);
                decoder.forward(&batch)?;
            }
            best = best.min(begin.elapsed());
        }
        let step = best.as_secs_f64() / STEPS as f64;
        println!("decode  {sequences:>4}   {:>8.1} tok/s   {:>8.2} ms a step", sequences as f64 / step, step * 1e3);
    }
    Ok(())
}

/// One row for each sequence, at `position`.
fn batch_of(tables: &[Vec<u32>], position: usize, batch: &mut Batch) {
    batch.clear();
    for (index, table) in tables.iter().enumerate() {
        batch.push(&[100 + index as u32], position as u32, table, [0]);
    }
}
