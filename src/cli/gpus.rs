//! `neurond gpus`: which GPUs there are, and the ceilings that a model's speed on them is held against.

use std::path::PathBuf;
use std::time::Instant;

use half::bf16;
use serde_json::{Value, json};

use super::table::{Side, render};
use crate::base::{Kind, Result};
use crate::kernel::gpu::{self, Card, Fp8, LARGE_UNIT, Ptr, Scaled, Sink, Watch, Weight, copy_blocks};

const EXAMPLES: &str = "\
Examples:
  neurond gpus                        which GPUs serve here
  neurond gpus --measure              and how fast they copy and multiply: some seconds each
  neurond gpus --measure --json
  CUDA_VISIBLE_DEVICES=1 neurond gpus";

/// Bytes that are copied at a time, in blocks of a MiB.
const COPIED: usize = 1 << 30;
const BLOCK: usize = 1 << 20;
/// Rows, channels and inputs of the product that is measured.
const SIZE: usize = 8192;
/// Shortest time of a measurement, in seconds; most repeats.
const LONG_ENOUGH: f64 = 0.5;
const MOST_REPEATS: usize = 1 << 12;

/// Arguments of `neurond gpus`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Measure memory bandwidth and the rate of products in bf16 and fp8
    #[arg(long)]
    measure: bool,
    /// For programs
    #[arg(long)]
    json: bool,
    /// Folder of CUDA's libraries, if the system does not find them; several with commas
    #[arg(long, value_name = "FOLDER", value_delimiter = ',')]
    libraries: Vec<PathBuf>,
    /// For a quick look: this share of the usual sizes
    #[arg(long, hide = true, default_value_t = 1.0)]
    scale: f64,
}

/// What a GPU does at best, as measured.
#[derive(Default)]
struct Rates {
    /// Bytes a second, read and written.
    copy: Option<f64>,
    /// Multiplications and additions a second.
    bf16: Option<f64>,
    /// The same in fp8.
    fp8: Option<f64>,
}

/// Lists them.
pub fn run(args: &Args) -> Result<()> {
    let count = match gpu::count(&args.libraries) {
        Ok(count) => count,
        Err(error) if error.kind() == Kind::ModelUnavailable => {
            if args.json {
                return super::print("[]\n");
            }
            return Err(super::failed(format!("no GPU: {}", error.message())));
        }
        Err(error) => return Err(error),
    };
    let (mut rows, mut found) = (Vec::new(), Vec::new());
    for ordinal in 0..u16::try_from(count).unwrap_or(u16::MAX) {
        let card = gpu::open(ordinal)?;
        let free = card.free_bytes()?;
        let rates = if args.measure { measure(&*card, args.scale)? } else { Rates::default() };
        let health = Watch::begin(ordinal).map(|mut watch| watch.look());
        let number =
            |rate: Option<f64>, unit: f64| rate.map_or_else(|| "-".into(), |rate| format!("{:.0}", rate / unit));
        rows.push(vec![
            ordinal.to_string(),
            card.name(),
            card.processors().to_string(),
            super::bytes(free as u64),
            number(rates.copy, 1e9),
            number(rates.bf16, 1e12),
            number(rates.fp8, 1e12),
        ]);
        found.push(json!({
            "gpu": ordinal,
            "name": card.name(),
            "multiprocessors": card.processors(),
            "free_bytes": free,
            "total_bytes": health.map(|health| health.memory_total),
            "copy_bytes_per_s": rates.copy,
            "bf16_flops_per_s": rates.bf16,
            "fp8_flops_per_s": rates.fp8,
        }));
    }
    if args.json {
        return super::print(&format!("{:#}\n", Value::from(found)));
    }
    let columns = [
        ("gpu", Side::Right),
        ("name", Side::Left),
        ("SMs", Side::Right),
        ("free", Side::Right),
        ("copy GB/s", Side::Right),
        ("bf16 TFLOP/s", Side::Right),
        ("fp8 TFLOP/s", Side::Right),
    ];
    let mut text = render(&columns[..if args.measure { 7 } else { 4 }], &rows);
    if count > 1 {
        text += &match gpu::collectives() {
            Ok(how) => format!("\nmodels can be divided over them (tensor_parallel): {how}\n"),
            Err(error) => format!("\nno model can be divided over them: {}\n", error.message()),
        };
    }
    super::print(&text)
}

fn measure(card: &dyn Card, scale: f64) -> Result<Rates> {
    let blocks = ((COPIED / BLOCK) as f64 * scale).max(2.0) as usize / 2 * 2;
    let size = (SIZE as f64 * scale).max(1.0) as usize;
    let size = size.next_multiple_of(LARGE_UNIT);
    // Half of the blocks are read, and as many written.
    let copied = (blocks * BLOCK) as f64;
    let pool: Ptr<u8> = card.alloc(blocks * BLOCK)?;
    let half = blocks / 2;
    let pairs: Vec<i32> = (0..half).flat_map(|block| [block as i32, (block + half) as i32]).collect();
    let pairs_at = card.alloc(pairs.len())?;
    card.upload(&pairs, pairs_at)?;
    // In 16 pieces a block, as layers of a pool: enough threads for every multiprocessor.
    let pieces = 16;
    let copy = timed(card, || {
        copy_blocks(card, half, pool, pairs_at, BLOCK / pieces, blocks * BLOCK / pieces, pieces).map(|()| true)
    })?;
    let flops = 2.0 * (size as f64).powi(3);
    let out: Ptr<bf16> = card.alloc(size * size)?;
    let (w, x): (Ptr<bf16>, Ptr<bf16>) = (card.alloc(size * size)?, card.alloc(size * size)?);
    gpu::random_bf16(card, w, 1, 1.0)?;
    gpu::random_bf16(card, x, 2, 1.0)?;
    let shape = (size, size, size);
    let in_bf16 = timed(card, || card.product(shape, Weight::Bf16(w, x), Sink::Set(out), size))?;
    let narrow = |from: Ptr<bf16>| -> Result<Scaled> {
        let scaled = Scaled { data: card.alloc::<Fp8>(size * size)?, scales: card.alloc(size)? };
        gpu::quantize_fp8(card, (size, size), from, scaled.data, scaled.scales)?;
        Ok(scaled)
    };
    let (w, x) = (narrow(w)?, narrow(x)?);
    let in_fp8 = timed(card, || card.product(shape, Weight::Fp8(w, x), Sink::Set(out), size))?;
    Ok(Rates {
        copy: copy.map(|seconds| copied / seconds),
        bf16: in_bf16.map(|seconds| flops / seconds),
        fp8: in_fp8.map(|seconds| flops / seconds),
    })
}

/// Seconds of one piece of work, of as many as take long enough together; `None` when the card does not do it.
fn timed(card: &dyn Card, mut work: impl FnMut() -> Result<bool>) -> Result<Option<f64>> {
    let end: Ptr<u8> = card.alloc(1)?;
    let wait = || card.download(end, &mut [0u8]);
    if !work()? {
        return Ok(None);
    }
    wait()?;
    let mut repeats = 1;
    loop {
        let begun = Instant::now();
        for _ in 0..repeats {
            work()?;
        }
        wait()?;
        let seconds = begun.elapsed().as_secs_f64();
        if seconds >= LONG_ENOUGH || repeats >= MOST_REPEATS {
            return Ok(Some(seconds / repeats as f64));
        }
        repeats *= 4;
    }
}
