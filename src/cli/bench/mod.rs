//! `neurond bench`: load on any OpenAI-compatible URL, measured from the client's side.
//!
//!     closed loop   N clients, each sends when its last answer is there      --concurrency 1,4,16
//!     open loop     arrivals at a rate, whether answers come or not          --rate 2
//!
//! Runs on one thread and parses no more than it must: it usually shares the machine with the server. Latencies of the
//! open loop count from the time a request was due, so that a server that stalls cannot hide it.
//!
//!     prompt.rs   what is asked (pure)     report.rs   what came of it (pure)

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::client::{Api, Failure, Reason, Server, Usage};
use crate::base::{Error, Result};
use prompt::{Prompts, Rng, as_input};
use report::{Level, Load, Sample};

mod prompt;
mod report;

const EXAMPLES: &str = "\
Examples:
  neurond bench                                                     one client, then four, then sixteen
  neurond bench --concurrency 32 --duration 60 --input-tokens 512 --output-tokens 64
  neurond bench --shared-prefix 1000 --input-tokens 1100            what the prefix cache is worth
  neurond bench --rate 2 --duration 120                             two arrivals a second, come what may
  neurond bench --url http://127.0.0.1:8081/v1 --json other.json    the same load on another server
  neurond bench --endpoint embeddings --batch 32 --concurrency 2    texts to vectors, 32 at a time

Output lengths are held equal with `ignore_eos`, which neurond, llama-server and vLLM understand. A server that ignores it
may stop early: the table then says how many answers did.";

/// Arguments of `neurond bench`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// Model to load [default: the first one the server lists]
    #[arg(long, short)]
    model: Option<String>,
    /// Clients at the same time; each figure is a run of its own
    #[arg(long, short, value_delimiter = ',', default_value = "1,4,16", value_parser = positive)]
    concurrency: Vec<usize>,
    /// Arrivals a second instead of a number of clients
    #[arg(long, short, conflicts_with = "concurrency", value_parser = rate)]
    rate: Option<f64>,
    /// Requests per run [default: four per client, at least eight]
    #[arg(long, short = 'n', conflicts_with = "duration", value_parser = positive)]
    requests: Option<usize>,
    /// Seconds in which requests are sent; those under way are finished and counted
    #[arg(long, short, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<f64>,
    /// Tokens of a prompt, about, template included
    #[arg(long, default_value_t = 128, value_parser = positive)]
    input_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128, value_parser = positive)]
    output_tokens: usize,
    /// Tokens at the beginning that all prompts have in common
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    shared_prefix: usize,
    /// Prompts from a file, one a line: text, or JSON with `prompt` or `messages`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_tokens", "shared_prefix"])]
    prompt_file: Option<PathBuf>,
    /// Repeats the prompts of an earlier run [default: from the clock, so that caches start cold]
    #[arg(long)]
    seed: Option<u64>,
    /// Texts in a request to `embeddings`
    #[arg(long, default_value_t = 32, value_parser = positive)]
    batch: usize,
    /// Which endpoint
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    endpoint: Endpoint,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Let answers end where the model ends them
    #[arg(long)]
    respect_eos: bool,
    /// Requests sent first and not counted, at each load
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Seconds a server may stay silent
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Write all figures here (`-` for standard output, instead of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Endpoint {
    /// `/chat/completions`
    Chat,
    /// `/completions`
    Completions,
    /// `/embeddings`
    Embeddings,
}

impl Endpoint {
    fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
        }
    }
}

/// Runs every load asked for, and reports.
pub async fn run(args: Args) -> Result<()> {
    if args.shared_prefix > args.input_tokens {
        return Err(Error::bad_input(format!(
            "--shared-prefix {} is longer than the prompt: raise --input-tokens above it",
            args.shared_prefix
        )));
    }
    let api = Api::new(&args.server, Duration::from_secs(args.timeout.max(1)))?;
    let model = api.pick_model(args.model.clone()).await?;
    let seed = args.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    });
    let mut bench = Bench { api, model, args, prompts: Prompts::File(Vec::new()), next: Cell::new(0) };
    bench.prompts = match &bench.args.prompt_file {
        Some(file) => Prompts::read(file)?,
        None => bench.calibrate(seed).await?,
    };
    eprintln!("{} at {}, seed {seed}", bench.model, bench.api.base());

    let loads: Vec<Load> = match bench.args.rate {
        Some(rate) => vec![Load::Open(rate)],
        None => bench.args.concurrency.iter().map(|&clients| Load::Closed(clients)).collect(),
    };
    let mut levels = Vec::new();
    for load in loads {
        let (level, stopped) = bench.level(load).await?;
        levels.push(level);
        if stopped {
            eprintln!("stopped; these are the figures so far");
            break;
        }
    }
    bench.report(&levels, seed)
}

struct Bench {
    api: Api,
    model: String,
    args: Args,
    prompts: Prompts,
    /// The next prompt's number; none is used twice, warm-up and calibration included.
    next: Cell<u64>,
}

/// When to stop sending.
struct Until {
    left: Cell<Option<usize>>,
    end: Option<Instant>,
}

impl Until {
    fn one_more(&self) -> bool {
        let in_time = self.end.is_none_or(|end| Instant::now() < end);
        match self.left.get() {
            None => in_time,
            Some(0) => false,
            Some(left) => {
                self.left.set(Some(left - 1));
                in_time
            }
        }
    }
}

impl Bench {
    /// Words are not tokens, and templates add some: two short requests tell how many words make the length asked for.
    async fn calibrate(&mut self, seed: u64) -> Result<Prompts> {
        let wanted = self.args.input_tokens;
        let mut measured = Vec::new();
        for own_words in [wanted.div_ceil(2), wanted] {
            self.prompts = Prompts::Random { seed: !seed, shared_words: 0, own_words };
            let sample = self.request(self.body(1), Instant::now()).await?;
            let texts = sample.texts.max(1) as f64;
            measured.push(sample.usage.map(|usage| (own_words as f64, usage.prompt_tokens as f64 / texts)));
        }
        let (mut fixed, mut per_word) = (0.0, 1.0);
        if let [Some((few, short)), Some((many, long))] = measured[..] {
            per_word = if many > few { ((long - short) / (many - few)).max(0.1) } else { 1.0 };
            fixed = (long - per_word * many).max(0.0);
        }
        let words = |tokens: f64| (tokens / per_word).round().max(0.0) as usize;
        let shared_words = words(self.args.shared_prefix as f64);
        let all_words = words(wanted as f64 - fixed).max(1);
        Ok(Prompts::Random { seed, shared_words, own_words: all_words.saturating_sub(shared_words).max(1) })
    }

    /// One load level, with its warm-up. True if Ctrl-C ended it.
    async fn level(&self, load: Load) -> Result<(Level, bool)> {
        let warmup = self.args.warmup;
        if warmup > 0 {
            let bodies = (0..warmup).map(|_| self.body(self.args.output_tokens.min(16)));
            let warmed = join_all(bodies.map(|body| self.request(body, Instant::now()))).await;
            // A server that fails every warm-up would fail the run: better to say so now, in its own words.
            if warmed.iter().all(Result::is_err) {
                warmed.into_iter().collect::<Result<Vec<_>, _>>()?;
            }
        }
        let by_default = match load {
            Load::Closed(clients) => (clients * 4).max(8),
            Load::Open(_) => 32,
        };
        let requests = self.args.requests.or(self.args.duration.is_none().then_some(by_default));
        let bar = progress(load, requests);
        let level = RefCell::new(Level::new(load));
        let count = |result| {
            let mut level = level.borrow_mut();
            level.add(result);
            bar.set_position(level.ok() + level.failed());
        };
        let cpu = cpu_time();
        let begin = Instant::now();
        let end = self.args.duration.map(|seconds| begin + Duration::from_secs_f64(seconds));
        let until = Until { left: Cell::new(requests), end };
        let stopped = {
            let sending = async {
                match load {
                    Load::Closed(clients) => self.closed_loop(clients, &until, &count).await,
                    Load::Open(rate) => self.open_loop(rate, &until, &count).await,
                }
            };
            tokio::select! {
                () = sending => false,
                _ = tokio::signal::ctrl_c() => true,
            }
        };
        bar.finish_and_clear();
        let mut level = level.into_inner();
        level.wall = begin.elapsed();
        level.client_cpu = cpu_time().saturating_sub(cpu);
        Ok((level, stopped))
    }

    async fn closed_loop(&self, clients: usize, until: &Until, count: &impl Fn(Result<Sample, Failure>)) {
        let client = async || {
            while until.one_more() {
                let result = self.request(self.body(self.args.output_tokens), Instant::now()).await;
                // A server that refuses at once is not asked a million times a second.
                let pause = result.is_err();
                count(result);
                if pause {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        join_all((0..clients).map(|_| client())).await;
    }

    async fn open_loop(&self, rate: f64, until: &Until, count: &impl Fn(Result<Sample, Failure>)) {
        let mut arrivals = Rng::new(self.next.get() ^ 0x5eed);
        let mut under_way = FuturesUnordered::new();
        let mut due = Instant::now();
        let mut open = until.one_more();
        while open || !under_way.is_empty() {
            tokio::select! {
                Some(result) = under_way.next(), if !under_way.is_empty() => count(result),
                () = tokio::time::sleep_until(due.into()), if open => {
                    under_way.push(self.request(self.body(self.args.output_tokens), due));
                    due += Duration::from_secs_f64(arrivals.until_next_s(rate));
                    open = until.one_more();
                }
            }
        }
    }

    fn body(&self, max_tokens: usize) -> Value {
        if self.args.endpoint == Endpoint::Embeddings {
            let first = self.next.get();
            self.next.set(first + self.args.batch as u64);
            let text = |number| as_input(self.prompts.get(number), false).1;
            let input: Vec<Value> = (first..self.next.get()).map(text).collect();
            return json!({ "model": self.model, "input": input, "encoding_format": "base64" });
        }
        let number = self.next.get();
        self.next.set(number + 1);
        let (field, input) = as_input(self.prompts.get(number), self.args.endpoint == Endpoint::Chat);
        json!({
            "model": self.model,
            field: input,
            "stream": true,
            "stream_options": { "include_usage": true },
            "max_tokens": max_tokens,
            "temperature": self.args.temperature,
            "ignore_eos": !self.args.respect_eos,
        })
    }

    /// One request, timed from `due`.
    async fn request(&self, body: Value, due: Instant) -> Result<Sample, Failure> {
        let path = match self.args.endpoint {
            Endpoint::Chat => "/chat/completions",
            Endpoint::Completions => "/completions",
            Endpoint::Embeddings => return self.embed(&body, due).await,
        };
        let mut answer = self.api.stream(path, &body).await?;
        let mut sample = Sample { gaps: Vec::with_capacity(self.args.output_tokens), ..Sample::default() };
        let mut last = due;
        while let Some(chunk) = answer.next().await? {
            if !chunk.text.is_empty() || !chunk.reasoning.is_empty() {
                let now = Instant::now();
                match sample.ttft {
                    None => sample.ttft = Some(now - due),
                    Some(_) => sample.gaps.push(now - last),
                }
                last = now;
            }
            sample.usage = chunk.usage.or(sample.usage);
            sample.finish = chunk.finish.or(sample.finish);
        }
        sample.total = due.elapsed();
        Ok(sample)
    }

    /// One request for vectors, of which nothing is read but the usage.
    async fn embed(&self, body: &Value, due: Instant) -> Result<Sample, Failure> {
        #[derive(serde::Deserialize)]
        struct Embedded {
            usage: Option<Usage>,
        }
        let answer = self.api.post("/embeddings", body).await?;
        let total = due.elapsed();
        let Ok(Embedded { usage }) = serde_json::from_slice(&answer) else {
            let message = format!("{}/embeddings answered with something else than embeddings", self.api.base());
            return Err(Failure { reason: Reason::Malformed, message });
        };
        Ok(Sample { texts: self.args.batch as u64, total, usage, ..Sample::default() })
    }

    fn report(&self, levels: &[Level], seed: u64) -> Result<()> {
        let args = &self.args;
        let whole = json!({
            "tool": concat!("neurond bench ", env!("CARGO_PKG_VERSION")),
            "url": self.api.base(),
            "model": self.model,
            "endpoint": args.endpoint.name(),
            "batch": if args.endpoint == Endpoint::Embeddings { json!(args.batch) } else { Value::Null },
            "input_tokens": if args.prompt_file.is_some() { Value::Null } else { json!(args.input_tokens) },
            "output_tokens": args.output_tokens,
            "shared_prefix": args.shared_prefix,
            "ignore_eos": !args.respect_eos,
            "temperature": args.temperature,
            "seed": seed,
            "levels": levels.iter().map(Level::json).collect::<Vec<_>>(),
        });
        match &args.json {
            Some(file) if file.as_os_str() == "-" => super::print(&format!("{whole:#}\n"))?,
            Some(file) => {
                std::fs::write(file, format!("{whole:#}\n"))
                    .map_err(|error| super::failed(format!("cannot write {}: {error}", file.display())))?;
                super::print(&report::render_all(levels))?;
            }
            None => super::print(&report::render_all(levels))?,
        }
        if levels.iter().all(|level| level.ok() == 0) {
            return Err(super::failed("no request was answered"));
        }
        Ok(())
    }
}

fn progress(load: Load, requests: Option<usize>) -> ProgressBar {
    let fancy = super::is_fancy(&std::io::stderr());
    let target = if fancy { ProgressDrawTarget::stderr_with_hz(2) } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(requests.map(|count| count as u64), target);
    let (name, template) = match load {
        Load::Closed(clients) => (format!("{clients} clients"), "{prefix}  {pos} of {len} answers  {elapsed}"),
        Load::Open(rate) => (format!("{rate}/s"), "{prefix}  {pos} of {len} answers  {elapsed}"),
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.with_prefix(name)
}

/// CPU time of this process so far.
fn cpu_time() -> Duration {
    // SAFETY: rusage is plain data, for which zeroes are a value; the call writes to it and keeps nothing.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |value: libc::timeval| {
        Duration::from_secs(value.tv_sec.unsigned_abs()) + Duration::from_micros(value.tv_usec.unsigned_abs())
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

fn positive(text: &str) -> Result<usize, String> {
    text.trim().parse().ok().filter(|&number: &usize| number > 0).ok_or_else(|| "must be a whole number above 0".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate > 0.0);
    number.ok_or_else(|| "must be a number of arrivals a second above 0".into())
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0 && *seconds <= 1e6);
    number.ok_or_else(|| "must be a number of seconds above 0".into())
}
