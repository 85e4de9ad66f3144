//! `neurond check-config`: what `serve` would do with a configuration, without doing it.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::serve::Over;
use super::table::{Side, render};
use crate::base::{Millis, Result};
use crate::config::{self, Config, Model, synthetic};
use crate::kernel::gpu;
use crate::model::Division;
use crate::registry;

const EXAMPLES: &str = "\
Examples:
  neurond check-config                              the file `serve` would find
  neurond check-config /etc/neurond/neurond.toml && systemctl reload neurond
  neurond check-config configs/dev.toml --strict    warnings count as errors

Exit codes: 0 usable, 1 usable but with warnings under --strict, 2 not usable.";

/// Arguments of `neurond check-config`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The file [default: ./neurond.toml, then /etc/neurond/neurond.toml]
    #[arg(value_name = "FILE", env = "NEUROND_CONFIG")]
    config: Option<PathBuf>,
    /// Fail on warnings
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    over: Over,
}

/// Prints what the configuration means, and what may not be meant.
pub fn run(args: Args) -> Result<ExitCode> {
    let config = config::load(args.config.as_deref(), &args.over.into())?;
    // Patterns and schemas of gateways are compiled by whoever serves them, and so here.
    registry::check(&config.fixed)?;
    for model in config.models.iter().filter(|model| model.tensor_parallel > 1) {
        check_ranks(&config, model).map_err(|error| error.context(&model.id))?;
    }
    super::print(&summary(&config))?;
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    let fails = args.strict && !config.warnings.is_empty();
    Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether a model can be divided as it is to be, by whoever serves it here.
fn check_ranks(config: &Config, model: &Model) -> Result<()> {
    let check = |packing| Division::check(&model.path, model.tensor_parallel, packing);
    let packing = model.is_for_gpus().then_some(model.on_gpu.weights);
    if packing.is_none() || model.on_gpu.gpus.is_some() || synthetic(&model.path).is_some() {
        return check(packing);
    }
    // Nobody has said who: GPUs if there are enough and they can, else the CPU.
    let enough = gpu::count(&config.gpu.library_folders).is_ok_and(|count| count >= model.tensor_parallel);
    if enough && check(packing).is_ok() { Ok(()) } else { check(None) }
}

fn summary(config: &Config) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<10} {value}");
    };
    let origin =
        config.origin.as_deref().map_or("built-in defaults (no file found)".into(), |path| path.display().to_string());
    line("file", origin);
    line("listen", format!("http://{}", config.server.listen));
    if let Some(binding) = &config.binding {
        line("binding", format!("http://{} for account {}, without credentials", binding.listen, binding.account));
    }
    let expired = config.auth.tokens.iter().filter(|token| token.expires.is_some_and(|at| at <= Millis::now())).count();
    let tokens = match (config.auth.tokens.len(), expired) {
        (count, 0) => format!("{count} tokens"),
        (count, expired) => format!("{count} tokens, {expired} of them expired"),
    };
    let anonymous = match &config.auth.anonymous {
        Some(account) => format!("callers without a token are account {account}"),
        None => "callers without a token are refused".into(),
    };
    line("auth", format!("{tokens}; {anonymous}"));
    let engine = &config.engine;
    line(
        "engine",
        format!(
            "{} threads, {} tokens a step, {} sequences at a time, {} waiting, prefix cache {}",
            engine.threads,
            engine.step_tokens,
            engine.max_running,
            engine.max_queue,
            if engine.prefix_cache { "on" } else { "off" }
        ),
    );
    line("catalog", format!("{} models by name", config.catalog.entries().len()));
    if config.models.is_empty() {
        line("models", "none loaded".into());
        return text;
    }
    text.push('\n');
    let rows: Vec<_> = config
        .models
        .iter()
        .map(|model| {
            let size = super::models::weight_bytes(&model.path).map_or_else(|| "missing".into(), super::bytes);
            vec![
                model.id.to_string(),
                size,
                super::bytes(model.kv_bytes as u64),
                model.context.to_string(),
                model.tensor_parallel.to_string(),
                gpus(model),
                model.path.display().to_string(),
            ]
        })
        .collect();
    let columns = [
        ("model", Side::Left),
        ("weights", Side::Right),
        ("KV", Side::Right),
        ("context", Side::Right),
        ("ranks", Side::Right),
        ("GPUs", Side::Left),
        ("path", Side::Left),
    ];
    text + &render(&columns, &rows)
}

/// Which GPUs serve a model, if there are any.
fn gpus(model: &Model) -> String {
    let packing = format!("{:?}", model.on_gpu.weights).to_lowercase();
    match &model.on_gpu.gpus {
        _ if !model.is_for_gpus() => "-".into(),
        None if model.tensor_parallel > 1 => format!("the first {}, {packing}", model.tensor_parallel),
        None => format!("all, {packing}"),
        Some(gpus) => format!("{}, {packing}", gpus.iter().map(u16::to_string).collect::<Vec<_>>().join(" ")),
    }
}
