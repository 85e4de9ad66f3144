//! The fake upstream of the tests as a program: for SDKs of other languages, and as what a load test's target calls.
//!
//!     cargo run --release --example fake_upstream -- [--listen 127.0.0.1:0] [--threads 1] [--static BYTES]
//!
//! Prints one line of JSON, `{"address", "url"}`, and runs until it is killed or the pipe at its stdin closes. What it
//! can be told is in `tests/upstream/behaviour.rs`, and over HTTP in `tests/upstream/control.rs`.

#[path = "../tests/upstream/mod.rs"]
mod upstream;

use std::io::{IsTerminal, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

use clap::Parser;
use serde_json::json;
use upstream::{Options, Upstream};

#[derive(Parser)]
#[command(about = "Answers as AI providers do, and misbehaves as they do")]
struct Args {
    /// IP address and port
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Threads, each with a listener of its own
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Answer every request with so many bytes, as fast as it goes
    #[arg(long = "static", value_name = "BYTES")]
    fixed: Option<usize>,
    /// Forget requests at once: for long load tests
    #[arg(long)]
    forget: bool,
}

fn main() -> std::io::Result<()> {
    let Args { listen, threads, fixed, forget } = Args::parse();
    let record = !forget && fixed.is_none();
    let upstream = Upstream::with(Options { listen, threads, record, fixed })?;
    println!("{}", json!({"address": upstream.address.to_string(), "url": upstream.url()}));
    if owned_by_stdin()? {
        let mut rest = [0; 256];
        while std::io::stdin().read(&mut rest)? > 0 {}
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}

/// Whether somebody holds the other end of stdin. A shell's background job has /dev/null there, which is at its end at once.
fn owned_by_stdin() -> std::io::Result<bool> {
    let stdin = std::io::stdin();
    let kind = std::fs::File::from(stdin.as_fd().try_clone_to_owned()?).metadata()?.file_type();
    Ok(stdin.is_terminal() || kind.is_fifo() || kind.is_socket())
}
