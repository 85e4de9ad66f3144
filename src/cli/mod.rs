//! The command line: what can be typed, and which exit code comes back. One file a command; none of them knows another.
//!
//!     serve ─> app          chat, models, bench ─> client ─> any OpenAI-compatible URL
//!     check-config ─> config             pull ─> any hub with Hugging Face's URL layout
//!     simulate ─> simulate               gpus ─> kernel            keys ─> registry, vault
//!
//! Answers go to stdout, everything said about them to stderr, so that output can be piped.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::base::{Error, Kind, Result};

mod bench;
mod chat;
mod check;
mod client;
mod completions;
mod gpus;
mod keys;
mod models;
mod pull;
mod serve;
mod simulate;
mod table;
mod usage;

const TOUR: &str = "\
Examples:
  neurond serve --config configs/dev.toml         the daemon, on 127.0.0.1:8080
  neurond chat                                    talk to it
  neurond chat \"Why is the sky blue?\"             one question, one answer
  git diff | neurond chat \"Write a commit message\"
  neurond models                                  what can be asked for
  neurond pull HuggingFaceTB/SmolLM2-135M-Instruct
  neurond keys hash                               a token for a caller
  neurond check-config /etc/neurond/neurond.toml  before a reload
  neurond bench --concurrency 1,4,16              how fast is it here
  neurond simulate --devices 64                   how fast would 64 GPUs be

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 70 the ledger died (serve), 130 stopped by Ctrl-C.
Every command has its own examples: neurond help COMMAND";

/// One daemon that serves open models and answers as OpenAI and Cloudflare Workers AI do.
#[derive(Parser)]
#[command(name = "neurond", version, after_help = TOUR, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    Serve(serve::Args),
    /// Read a configuration as `serve` would, and say what it means or what is wrong with it
    CheckConfig(check::Args),
    /// Talk to a model in the terminal
    Chat(chat::Args),
    /// List models: of a running server, or on this disk
    Models(models::Args),
    /// What was used and what it cost: by model, key, gateway, day
    Usage(usage::Args),
    /// Tokens for callers, and providers' keys that are stored sealed
    Keys(keys::Args),
    /// Download a model from a hub: resumes, verifies, picks the files that matter
    Pull(pull::Args),
    /// Put load on a server and measure latency and throughput
    Bench(bench::Args),
    /// Simulate a fleet under a day of traffic: the real scheduler over devices that are a cost model
    Simulate(Box<simulate::Args>),
    /// List this machine's GPUs, and measure what they can do at best
    Gpus(gpus::Args),
    /// Print a completion script for your shell
    Completions(completions::Args),
}

/// Parses the arguments, runs the command, says what went wrong if something did.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::CheckConfig(args) => check::run(args),
        Command::Chat(args) => block_on(chat::run(args)),
        Command::Models(args) => block_on(models::run(args)),
        Command::Usage(args) => block_on(usage::run(args)),
        Command::Keys(args) => keys::run(args),
        Command::Pull(args) => block_on(pull::run(args)),
        Command::Bench(args) => block_on(bench::run(args)),
        Command::Simulate(args) => simulate::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Gpus(args) => gpus::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => completions::run(args, &mut Cli::command()).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        if !error.message().is_empty() {
            eprintln!("neurond: {}", error.message());
        }
        ExitCode::from(match error.kind() {
            Kind::BadInput => 2,
            Kind::Aborted => 130,
            _ => 1,
        })
    })
}

/// Clients run on one thread: they share their cores with the server they talk to more often than not.
fn block_on(command: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("cannot start: {error}")))?;
    let outcome = runtime.block_on(command);
    // A blocked read of standard input must not keep the program alive.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

/// A plain failure: exit code 1 and this sentence. Up here an error's kind decides nothing but the exit code.
fn failed(message: impl Into<String>) -> Error {
    Error::new(Kind::NotFound, message)
}

/// Writes to stdout. A reader that went away (`| head`) ends the program quietly.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Error::new(Kind::Aborted, ""),
        _ => failed(format!("cannot write to standard output: {error}")),
    })
}

/// Whether colours and redrawn lines make sense on this stream.
fn is_fancy(stream: &impl IsTerminal) -> bool {
    stream.is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// `1.4 GB`, `12.0 kB`: decimal, as disks and networks count.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bytes_are_readable() {
        for (count, shown) in
            [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (999_999, "1.0 MB"), (98_362_432, "98.4 MB")]
        {
            assert_eq!(bytes(count), shown);
        }
    }

    #[test]
    fn every_command_teaches_by_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("neurond "), "`neurond {} --help` has no example", command.get_name());
        }
    }

    #[test]
    fn a_misspelt_command_is_answered_with_the_right_one() {
        let error = Cli::try_parse_from(["neurond", "serv"]).err().expect("`serv` is no command");
        assert!(error.to_string().contains("serve"), "{error}");
    }
}
