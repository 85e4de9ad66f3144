//! `neurond simulate`: what a fleet would do with a day of traffic, without the fleet and without the day.
//!
//!     preset, profile, --set ─> Setup ─> simulate::run ─> Report ─> table or JSON
//!     --compare               ─> Setup ─> simulate::run ─> Report ─┘   beside it, on a thread of its own
//!
//!     table.rs   the report for people (pure)

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::table::{Side, render};
use crate::base::{Error, Kind, Result};
use crate::simulate::cost::{PRESETS, preset};
use crate::simulate::report::Report;
use crate::simulate::traffic::{PROFILES, profile};
use crate::simulate::{Faults, Setup, preset_names, run as simulate, trace};

mod table;

const EXAMPLES: &str = "\
Examples:
  neurond simulate                                                  a day of chat on eight H200 with a 70B model
  neurond simulate --devices 64 --device 2xh100-llama-70b-fp8       as much on 64 pairs of H100
  neurond simulate --rate 4 --compare devices=6                     would six do?
  neurond simulate --profile agent --compare affinity=0             what session affinity is worth
  neurond simulate --set max_running=64,step_tokens=1024 --compare step_tokens=4096
  neurond simulate --trace requests.csv --devices 4                 recorded traffic (docs/SIMULATE.md has the format)
  neurond simulate --faults --check                                 devices die, callers vanish; every book is checked
  neurond simulate --list                                           every device, profile and setting

The scheduler, the block manager, the router and the ledger are the ones that serve; only the device is a cost model.
The same arguments give the same report, to the last digit.";

/// Arguments of `neurond simulate`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Device and model, by name (`--list`)
    #[arg(long, value_name = "NAME", default_value = "h200-llama-70b-fp8")]
    device: String,
    /// How many, each with the whole model
    #[arg(long, short = 'n', default_value_t = 8)]
    devices: usize,
    /// Kind of use, by name (`--list`)
    #[arg(long, short, value_name = "NAME", default_value = "chat", conflicts_with = "trace")]
    profile: String,
    /// Requests a second over the fleet, averaged over a day [default: what suits the device]
    #[arg(long, short, value_name = "PER_S", conflicts_with = "trace")]
    rate: Option<f64>,
    /// How long requests are sent: 90s, 30m, 24h, 7d
    #[arg(long, short = 't', value_name = "TIME", default_value = "24h", value_parser = duration, conflicts_with = "trace")]
    duration: f64,
    /// Recorded requests, CSV or JSON lines, in place of made-up ones (`-` for standard input)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Replay the trace so many times as fast
    #[arg(long, value_name = "TIMES", default_value_t = 1.0, requires = "trace", value_parser = positive)]
    speed: f64,
    /// Another seed is another day
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A bad day: devices die and are slow, callers vanish, half of the KV pool is missing
    #[arg(long)]
    faults: bool,
    /// Compare the books each N steps of a device, not only at the end
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1000")]
    check: Option<usize>,
    /// Threads to compute on; the report is the same on any number [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Change a setting (`--list` names them); several with commas
    #[arg(long, short, value_name = "NAME=VALUE", value_delimiter = ',')]
    set: Vec<String>,
    /// Run a second time with these settings changed, and show both
    #[arg(long, short, value_name = "NAME=VALUE", value_delimiter = ',')]
    compare: Vec<String>,
    /// Name devices, profiles and settings, and leave
    #[arg(long)]
    list: bool,
    /// Write all figures here (`-` for standard output, instead of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Simulates, once or twice, and reports.
pub fn run(args: Args) -> Result<()> {
    let setup = setup(&args)?;
    if args.list {
        return super::print(&list(setup));
    }
    let mut setups = vec![(setup.device.to_owned(), setup)];
    if !args.compare.is_empty() {
        let mut other = setups[0].1.clone();
        change(&mut other, "--compare", &args.compare)?;
        setups[0].0 = "as is".into();
        setups.push((args.compare.join(" "), other));
    }
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let each = threads.div_ceil(setups.len());
    for (_, setup) in &mut setups {
        setup.check()?;
        setup.threads = each;
    }
    let begun = Instant::now();
    let reports = run_all(&setups)?;
    let tokens: u64 = reports.iter().map(|(_, report)| report.tally.produced() + report.tally.prompt_tokens).sum();
    // How long it took is no part of the report, which is the same on every machine.
    eprintln!("simulated {} tokens in {:.1} s", table::grouped(tokens), begun.elapsed().as_secs_f64());
    write(&args, &reports)
}

fn setup(args: &Args) -> Result<Setup> {
    let preset = preset(&args.device)
        .ok_or_else(|| Error::bad_input(format!("--device {}: there are {}", args.device, preset_names())))?;
    let profile = profile(&args.profile).ok_or_else(|| {
        let names = PROFILES.each_ref().map(|profile| profile.name).join(", ");
        Error::bad_input(format!("--profile {}: there are {names}", args.profile))
    })?;
    let mut setup = Setup::new(preset, profile, args.devices);
    setup.seed = args.seed;
    setup.duration_s = args.duration;
    setup.check_every = args.check.unwrap_or(0);
    if let Some(rate) = args.rate {
        setup.set("rate", &rate.to_string())?;
    }
    if args.faults {
        setup.faults = Faults::BAD_DAY;
    }
    if let Some(file) = &args.trace {
        let name = |error: Error| error.context(format!("--trace {}", file.display()));
        let text = match file.as_os_str() == "-" {
            true => std::io::read_to_string(std::io::stdin()),
            false => std::fs::read_to_string(file),
        };
        let text = text.map_err(|error| name(Error::bad_input(error.to_string())))?;
        setup.trace = Some(Arc::new(trace::read(&text, args.speed).map_err(name)?));
    }
    change(&mut setup, "--set", &args.set)?;
    Ok(setup)
}

fn change(setup: &mut Setup, flag: &str, changes: &[String]) -> Result<()> {
    for change in changes {
        let Some((name, value)) = change.split_once('=') else {
            return Err(Error::bad_input(format!("{flag} {change}: NAME=VALUE is needed")));
        };
        setup.set(name.trim(), value.trim()).map_err(|error| error.context(flag))?;
    }
    Ok(())
}

/// Each setup beside the others, while this thread shows how far they are.
fn run_all(setups: &[(String, Setup)]) -> Result<Vec<(String, Report)>> {
    let done: Vec<AtomicU64> = setups.iter().map(|_| AtomicU64::new(0)).collect();
    let bar = progress();
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = setups
            .iter()
            .zip(&done)
            .map(|((_, setup), done)| {
                let mut tell = |share: f64| done.store((share * 1_000.0) as u64, Ordering::Relaxed);
                scope.spawn(move || simulate(setup, &mut tell))
            })
            .collect();
        while !threads.iter().all(|thread| thread.is_finished()) {
            bar.set_position(done.iter().map(|done| done.load(Ordering::Relaxed)).min().unwrap_or(0));
            std::thread::sleep(Duration::from_millis(20));
        }
        bar.finish_and_clear();
        let panicked = |_| Err(Error::internal("the simulation panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect::<Vec<_>>()
    });
    let named = setups.iter().zip(outcomes).map(|((name, _), outcome)| Ok((name.clone(), outcome?)));
    named.collect::<Result<Vec<_>>>().map_err(|error| match error.kind() {
        Kind::BadInput => error,
        _ => error.context("an invariant does not hold, which is a bug worth reporting"),
    })
}

fn progress() -> ProgressBar {
    let fancy = super::is_fancy(&std::io::stderr());
    let target = if fancy { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(1_000), target);
    let style = ProgressStyle::with_template("{bar:40} {percent} %  {elapsed}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

fn write(args: &Args, reports: &[(String, Report)]) -> Result<()> {
    let whole = json!({
        "tool": concat!("neurond simulate ", env!("CARGO_PKG_VERSION")),
        "device": args.device,
        "profile": if args.trace.is_some() { Value::Null } else { json!(args.profile) },
        "seed": args.seed,
        "runs": reports.iter().map(|(name, report)| {
            let mut run = report.json();
            run["name"] = json!(name);
            run
        }).collect::<Vec<_>>(),
    });
    match &args.json {
        Some(file) if file.as_os_str() == "-" => super::print(&format!("{whole:#}\n")),
        Some(file) => {
            std::fs::write(file, format!("{whole:#}\n"))
                .map_err(|error| super::failed(format!("cannot write {}: {error}", file.display())))?;
            super::print(&table::report(reports))
        }
        None => super::print(&table::report(reports)),
    }
}

/// Devices, profiles and settings with the values in force.
fn list(mut setup: Setup) -> String {
    let rows =
        |rows: &[(&str, &str)]| rows.iter().map(|(name, about)| vec![name.to_string(), about.to_string()]).collect();
    let devices: Vec<Vec<String>> = rows(&PRESETS.each_ref().map(|preset| (preset.name, preset.about)));
    let profiles: Vec<Vec<String>> = rows(&PROFILES.each_ref().map(|profile| (profile.name, profile.about)));
    let settings: Vec<Vec<String>> = setup
        .knobs()
        .iter()
        .map(|knob| vec![knob.name.to_owned(), knob.value().to_string(), knob.about.to_owned()])
        .collect();
    let two = |name| [(name, Side::Left), ("", Side::Left)];
    let three = [("setting", Side::Left), ("value", Side::Right), ("", Side::Left)];
    [render(&two("device"), &devices), render(&two("profile"), &profiles), render(&three, &settings)].join("\n")
}

fn duration(text: &str) -> Result<f64, String> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("a number with s, m, h or d is needed: 90s, 30m, 24h, 7d".into()),
    };
    let seconds =
        digits.parse::<f64>().ok().map(|number| number * unit).filter(|seconds| *seconds > 0.0 && *seconds < 1e9);
    seconds.ok_or_else(|| "a number above 0 with s, m, h or d is needed: 90s, 30m, 24h, 7d".into())
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "must be a number above 0".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("24h", 86_400.0), ("7d", 604_800.0)] {
            assert_eq!(duration(text), Ok(seconds), "{text}");
        }
        for wrong in ["", "h", "-1h", "0", "5w", "1h30m", "NaN"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
