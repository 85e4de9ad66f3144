//! Logits by teacher forcing, for comparisons with other implementations (`scripts/agreement.py`).
//!
//!     cargo run --release --example logits -- --model FILE --tokens tokens.json --out logits.f32 [--precision plain]
//!
//! `tokens.json` is a list of lists of token ids, each a sequence of its own. The output has one row of `vocab` f32,
//! little-endian, for every token of every sequence in order: what the model would have answered after reading it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use neurond::base::{Error, Result};
use neurond::config::{KvType, Precision};
use neurond::kernel::{Isa, KvLayout, Pool};
use neurond::model::weights::Weights;
use neurond::model::{Batch, Decoder, DecoderOptions};

/// Rows in a step.
const CHUNK: usize = 128;
const BLOCK: usize = 16;

#[derive(Parser)]
#[command(about = "Logits by teacher forcing, one row of f32 a token")]
struct Args {
    /// GGUF file or safetensors folder
    #[arg(long)]
    model: PathBuf,
    /// JSON list of lists of token ids
    #[arg(long)]
    tokens: PathBuf,
    /// Where the rows go
    #[arg(long)]
    out: PathBuf,
    /// `plain` or `fast`
    #[arg(long, default_value = "fast", value_parser = precision)]
    precision: Precision,
    /// `f16` or `f32`
    #[arg(long, default_value = "f16", value_parser = kv)]
    kv: KvType,
    /// Worker threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

fn precision(text: &str) -> std::result::Result<Precision, String> {
    match text {
        "plain" => Ok(Precision::Plain),
        "fast" => Ok(Precision::Fast),
        _ => Err("plain or fast".into()),
    }
}

fn kv(text: &str) -> std::result::Result<KvType, String> {
    match text {
        "f16" => Ok(KvType::F16),
        "f32" => Ok(KvType::F32),
        _ => Err("f16 or f32".into()),
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let failed =
        |what: &PathBuf, error: &dyn std::fmt::Display| Error::bad_input(format!("{}: {error}", what.display()));
    let text = std::fs::read(&args.tokens).map_err(|error| failed(&args.tokens, &error))?;
    let sequences: Vec<Vec<u32>> = serde_json::from_slice(&text).map_err(|error| failed(&args.tokens, &error))?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0).max(1);

    let weights = Weights::open(&args.model)?;
    let spec = weights.spec()?;
    let half = args.kv == KvType::F16 && args.precision == Precision::Fast;
    let layout = KvLayout { heads: spec.kv_heads, dim: spec.head_dim, block_tokens: BLOCK, half };
    let blocks = longest.div_ceil(BLOCK);
    let options = DecoderOptions {
        pool: Arc::new(Pool::new(args.threads)),
        isa: Isa::detect(),
        precision: args.precision,
        kv: args.kv,
        kv_bytes: blocks * layout.block_bytes() * spec.layers,
        block_tokens: BLOCK,
        max_rows: CHUNK,
        max_sample_rows: CHUNK,
    };
    let mut decoder = Decoder::open(&weights, spec, &options, &|_| ())?;
    let table: Vec<u32> = (0..blocks as u32).collect();
    let mut out = BufWriter::new(File::create(&args.out).map_err(|error| failed(&args.out, &error))?);
    let mut batch = Batch::default();
    for tokens in &sequences {
        for (index, chunk) in tokens.chunks(CHUNK).enumerate() {
            let start = index * CHUNK;
            batch.clear();
            let table = &table[..(start + chunk.len()).div_ceil(BLOCK)];
            batch.push(chunk, start as u32, table, 0..chunk.len() as u32);
            let (logits, _) = decoder.forward(&batch)?;
            for value in logits {
                out.write_all(&value.to_le_bytes()).map_err(|error| failed(&args.out, &error))?;
            }
        }
    }
    out.flush().map_err(|error| failed(&args.out, &error))
}
