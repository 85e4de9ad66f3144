//! `neurond serve`: hands the command line to the daemon. The daemon itself is `app`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::app::{self, Ended, Options};
use crate::base::Result;
use crate::config::{LogFormat, Overrides};

const EXAMPLES: &str = "\
Examples:
  neurond serve --config configs/dev.toml
  neurond serve --model smollm2=models/SmolLM2-135M-Instruct.Q4_1.gguf      no configuration file needed
  neurond serve --config /etc/neurond/neurond.toml --listen 0.0.0.0:8080 --log-format json

Without --config, ./neurond.toml and /etc/neurond/neurond.toml are looked for, in this order.
TERM or INT drain and exit, HUP reads the configuration again and swaps models, USR1 writes the state to the log.";

/// The ledger died: nothing is served that cannot be billed. A service manager should start us again.
const LEDGER_LOST: u8 = 70;

/// What the file says can be said here too, and wins.
#[derive(clap::Args)]
pub struct Over {
    /// Address and port of the API, over the file's
    #[arg(long, value_name = "ADDR:PORT", env = "NEUROND_LISTEN")]
    listen: Option<String>,
    /// Load a model: its id, and a GGUF file or a safetensors folder; may be given several times
    #[arg(long = "model", value_name = "ID=PATH", value_parser = model)]
    models: Vec<(String, PathBuf)>,
    /// Serve callers without a token as this account
    #[arg(long, value_name = "ACCOUNT")]
    anonymous: Option<String>,
    /// Threads that compute
    #[arg(long)]
    threads: Option<usize>,
    /// What is logged, such as `info` or `neurond=debug`
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// How log lines look: text or json
    #[arg(long, value_name = "FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
}

/// Arguments of `neurond serve`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Configuration file
    #[arg(long, short, value_name = "FILE", env = "NEUROND_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    over: Over,
}

impl From<Over> for Overrides {
    fn from(over: Over) -> Self {
        Self {
            listen: over.listen,
            anonymous: over.anonymous,
            models: over.models,
            threads: over.threads,
            log_filter: over.log,
            log_format: over.log_format,
        }
    }
}

/// Serves until told to stop.
pub fn run(args: Args) -> Result<ExitCode> {
    match app::run(Options { config: args.config, overrides: args.over.into() })? {
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::LedgerLost => Ok(ExitCode::from(LEDGER_LOST)),
    }
}

fn model(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok((id.to_owned(), path.into())),
        _ => Err("expected ID=PATH, such as smollm2=models/SmolLM2-135M-Instruct.Q4_1.gguf".into()),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text or json".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_an_id_and_a_path() {
        assert_eq!(model("a=b/c=d.gguf"), Ok(("a".into(), "b/c=d.gguf".into())));
        for bad in ["a", "=b", "a=", ""] {
            assert!(model(bad).is_err(), "{bad}");
        }
    }
}
