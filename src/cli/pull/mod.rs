//! `neurond pull`: brings a model from a hub to this disk, whole and verified, or says why not.
//!
//!     listing ──choose──> files ──up to four at a time──> x.<id>.part ──sha256──> x
//!
//! Can be stopped anywhere and run again: what is there is checked, what is half there goes on where it stopped.
//!
//!     choose.rs    which files of a repository matter (pure)
//!     hub.rs       the hub's URLs, listings and refusals
//!     download.rs  one file: resume, retry, verify, rename

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::base::{Error, Kind, Result, Secret};
use choose::Choice;
use download::{Job, Outcome, Source};
use hub::{Hub, RemoteFile, Repo};

mod choose;
mod download;
mod hub;

const EXAMPLES: &str = "\
Examples:
  neurond pull HuggingFaceTB/SmolLM2-135M-Instruct                  safetensors, tokenizer, configuration
  neurond pull bartowski/Llama-3.2-1B-Instruct-GGUF                 asks which quantisation, Q4_K_M if nobody answers
  neurond pull bartowski/Llama-3.2-1B-Instruct-GGUF --file '*Q8_0*'
  neurond pull meta-llama/Llama-3.1-8B-Instruct@main --token hf_…   a gated model, with your token
  neurond pull org/model --endpoint http://mirror.internal:8000 --list

Stopped half-way? Run the same command again: it goes on where it stopped.";

/// Arguments of `neurond pull`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// ORG/MODEL, with @REVISION for a branch, tag or commit
    #[arg(value_name = "MODEL[@REVISION]")]
    repo: Repo,
    /// Only files that match, `*` and `?` allowed; may be given several times
    #[arg(long = "file", short, value_name = "PATTERN")]
    files: Vec<String>,
    /// Where models live
    #[arg(long, default_value = "models")]
    dir: PathBuf,
    /// The hub
    #[arg(long, env = "HF_ENDPOINT", default_value = "https://huggingface.co")]
    endpoint: String,
    /// Token for gated and private models
    #[arg(long, env = "HF_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Files downloaded at the same time
    #[arg(long, short, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Attempts in a row that may bring nothing before a file is given up
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// Show what would be downloaded, download nothing
    #[arg(long)]
    list: bool,
    /// No progress, only errors
    #[arg(long, short)]
    quiet: bool,
}

/// Downloads what was asked for.
pub async fn run(args: Args) -> Result<()> {
    let hub = Hub::new(&args.endpoint, args.token.clone().filter(|token| !token.is_empty()).map(Secret::new))?;
    let listing = hub.list(&args.repo).await?;
    let files = match choose::choose(&args.repo, &listing.files, &args.files)? {
        Choice::Settled(files) => files,
        Choice::Quantisations { offered, preferred } => {
            let picked = if args.quiet || args.list { preferred } else { ask(&offered, preferred)? };
            offered.into_iter().nth(picked).map(|offer| offer.files).unwrap_or_default()
        }
    };
    let files = hub.complete(&args.repo, &listing.commit, files).await?;
    if args.list {
        return super::print(&files.iter().map(describe).collect::<String>());
    }

    let folder = args.dir.join(&args.repo.org).join(&args.repo.name);
    std::fs::create_dir_all(&folder)
        .map_err(|error| super::failed(format!("cannot create {}: {error}", folder.display())))?;
    let jobs: Vec<Job> = files.into_iter().map(|file| Job::new(&folder, file, &listing.commit)).collect();
    check_space(&folder, &jobs)?;
    let bars = Bars::new(args.quiet);
    if !args.quiet {
        eprintln!("{} ({:.12}) -> {}", args.repo, listing.commit, folder.display());
    }
    let source = Source { hub: &hub, repo: &args.repo, commit: &listing.commit, retries: args.retries };
    let results = futures_util::stream::iter(jobs.iter().map(|job| {
        let (source, bars) = (&source, &bars);
        async move {
            let bar = bars.add(job);
            let result = download::run(job, source, &bar).await;
            bars.finish(&bar, job, &result);
            result
        }
    }));
    let mut results = results.buffer_unordered(usize::from(args.jobs));
    let mut first_error = None;
    loop {
        tokio::select! {
            next = results.next() => match next {
                Some(Ok(_)) => {}
                // The others go on: what they bring is there the next time.
                Some(Err(error)) => first_error = first_error.or(Some(error)),
                None => break,
            },
            _ = tokio::signal::ctrl_c() => {
                return Err(Error::new(Kind::Aborted, "stopped; the same command goes on from here"));
            }
        }
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    if !args.quiet {
        say_what_next(&args.repo, &folder, &jobs);
    }
    Ok(())
}

/// Asks a person which quantisation; without one the preferred is taken.
fn ask(offered: &[choose::Offer], preferred: usize) -> Result<usize> {
    if offered.len() < 2 || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        if let Some(offer) = offered.get(preferred).filter(|_| offered.len() > 1) {
            eprintln!("{} of {} quantisations: --file '*NAME*' takes another", offer.name, offered.len());
        }
        return Ok(preferred);
    }
    for (index, offer) in offered.iter().enumerate() {
        let mark = if index == preferred { "*" } else { " " };
        let size = offer.files.iter().map(|file| file.size).sum::<Option<u64>>().map(super::bytes).unwrap_or_default();
        eprintln!("{mark}{:>3}  {:<10} {size:>9}", index + 1, offer.name);
    }
    loop {
        eprint!("Which one? [{}] ", offered[preferred].name);
        let _ = std::io::stderr().flush();
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line);
        let typed = line.trim();
        if read.map_err(|error| super::failed(format!("cannot read the answer: {error}")))? == 0 || typed.is_empty() {
            return Ok(preferred);
        }
        let by_number = typed.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
        let by_name = || offered.iter().position(|offer| offer.name.eq_ignore_ascii_case(typed));
        match by_number.filter(|&index| index < offered.len()).or_else(by_name) {
            Some(index) => return Ok(index),
            None => eprintln!("a number from 1 to {}, or a name from the list", offered.len()),
        }
    }
}

fn describe(file: &RemoteFile) -> String {
    let size = file.size.map(super::bytes).unwrap_or_else(|| "?".into());
    let hash = file.sha256.as_deref().unwrap_or("(no hash given)");
    format!("{size:>10}  {hash:<64}  {}\n", file.path)
}

/// Refuses before the first byte rather than at the last one.
fn check_space(folder: &Path, jobs: &[Job]) -> Result<()> {
    /// What a disk should have left when we are done.
    const SPARE: u64 = 64 << 20;
    let needed: u64 = jobs.iter().map(Job::missing_bytes).sum();
    let Some(free) = free_bytes(folder) else { return Ok(()) };
    if needed == 0 || needed.saturating_add(SPARE) <= free {
        return Ok(());
    }
    Err(super::failed(format!(
        "{} needs {} more, and {} are free there: make room, choose a smaller file with --file, or another place with --dir",
        folder.display(),
        super::bytes(needed),
        super::bytes(free)
    )))
}

fn free_bytes(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    // SAFETY: statvfs is plain data, for which zeroes are a value.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a NUL-terminated path and a statvfs to write to, both alive for the call.
    let known = unsafe { libc::statvfs(path.as_ptr(), &mut about) } == 0;
    known.then(|| about.f_bavail.saturating_mul(about.f_frsize))
}

fn say_what_next(repo: &Repo, folder: &Path, jobs: &[Job]) {
    let gguf = jobs.iter().find(|job| job.target.extension().is_some_and(|ending| ending == "gguf"));
    let has_weights = |job: &&Job| job.target.extension().is_some_and(|ending| ending == "safetensors");
    let Some(weights) = gguf.map(|job| job.target.as_path()).or(jobs.iter().find(has_weights).map(|_| folder)) else {
        return;
    };
    eprintln!("Serve it with:  neurond serve --model {}={}", repo.name.to_lowercase(), weights.display());
}

/// One progress line a file, on a terminal; one line of text a file, elsewhere.
struct Bars {
    all: MultiProgress,
    plain: bool,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        let fancy = !quiet && super::is_fancy(&std::io::stderr());
        let target = if fancy { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        Self { all: MultiProgress::with_draw_target(target), plain: !quiet && !fancy }
    }

    fn add(&self, job: &Job) -> ProgressBar {
        let style = "{prefix:<38!} {bar:20} {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12}  {eta:>4} {msg}";
        let bar = self.all.add(job.file.size.map_or_else(ProgressBar::no_length, ProgressBar::new));
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(job.file.path.clone());
        bar
    }

    fn finish(&self, bar: &ProgressBar, job: &Job, result: &Result<Outcome>) {
        let word = match result {
            Ok(Outcome::Present) => "already here",
            Ok(Outcome::Verified) => "verified",
            Ok(Outcome::Unverified) => "complete",
            Err(_) => "failed",
        };
        if result.is_ok() {
            bar.set_position(bar.length().unwrap_or(bar.position()));
        }
        bar.abandon_with_message(word);
        if self.plain {
            eprintln!("{:>10}  {word:<12}  {}", super::bytes(bar.position()), job.file.path);
        }
    }
}
