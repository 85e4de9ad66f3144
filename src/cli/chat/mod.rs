//! `neurond chat`: a conversation in the terminal, or one question in a pipe, with any OpenAI-compatible server.
//!
//!     conversation.rs   what was said, what can be typed (pure)
//!     line.rs           the prompt: editing, history, completion
//!     mod.rs            asks, prints tokens as they come, keeps the figures

use std::io::{IsTerminal, Read};
use std::time::{Duration, Instant};

use tokio::signal::ctrl_c;

use super::client::{Api, Failure, Server, Usage};
use crate::base::{Error, Kind, Result};
use conversation::{Conversation, ORDERS, Order};
use line::{Prompt, Typed};

mod conversation;
mod line;

const EXAMPLES: &str = "\
Examples:
  neurond chat                                      talk; /help lists what else can be typed
  neurond chat \"Name three moons of Jupiter\"        one answer, then exit
  neurond chat --set temperature=0 --set seed=1 \"Tell a joke\"
  cat report.txt | neurond chat \"Summarise this\"    the pipe comes after the question
  neurond chat --url https://api.example.com/v1 --token \"$TOKEN\" --model big-one

Ctrl-C stops the answer, not the program; Ctrl-D or /quit leaves.";

/// Arguments of `neurond chat`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Ask this and exit; text from a pipe is added to it
    prompt: Option<String>,
    #[command(flatten)]
    server: Server,
    /// Model to talk to [default: the first one the server lists]
    #[arg(long, short)]
    model: Option<String>,
    /// System prompt
    #[arg(long, short)]
    system: Option<String>,
    /// A sampling parameter, as with /set
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = conversation::setting)]
    settings: Vec<(String, serde_json::Value)>,
    /// Only the answer: no figures after it
    #[arg(long, short)]
    quiet: bool,
    /// Seconds the server may stay silent
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

/// Talks until the conversation ends, or answers one question.
pub async fn run(args: Args) -> Result<()> {
    let api = Api::new(&args.server, Duration::from_secs(args.timeout.max(1)))?;
    let mut talk = Conversation::default();
    talk.system = args.system;
    for (name, value) in args.settings {
        talk.set(name, value);
    }
    let piped = !std::io::stdin().is_terminal();
    if args.prompt.is_none() && !piped {
        return Session { api, talk, model: String::new(), quiet: args.quiet, total: Total::default() }
            .run(args.model)
            .await;
    }
    let piped = if piped { read_pipe(args.prompt.is_some()).await? } else { String::new() };
    let question = match (args.prompt, piped.trim()) {
        (Some(prompt), "") => prompt,
        (Some(prompt), text) => format!("{prompt}\n\n{text}"),
        (None, "") => return Err(Error::bad_input("nothing to ask: give a prompt, or text in a pipe")),
        (None, text) => text.to_owned(),
    };
    talk.ask(question);
    let model = api.pick_model(args.model).await?;
    let said = answer(&api, &talk.request(&model)).await?;
    if !args.quiet && std::io::stderr().is_terminal() {
        note(&said.figures());
    }
    match said.broken {
        Some(failure) => Err(failure.into()),
        None if said.stopped => Err(Error::new(Kind::Aborted, "")),
        None => Ok(()),
    }
}

/// What waits in the pipe. With a prompt at hand, a pipe nobody writes to (a service, a cron job) must not hold us up:
/// it gets a moment to say something.
async fn read_pipe(have_prompt: bool) -> Result<String> {
    if have_prompt && !ready_to_read(Duration::from_millis(500)) {
        return Ok(String::new());
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let read = read.await.map_err(|error| Error::internal(error.to_string()))?;
    read.map_err(|error| super::failed(format!("cannot read standard input: {error}")))
}

fn ready_to_read(wait: Duration) -> bool {
    let mut stdin = libc::pollfd { fd: libc::STDIN_FILENO, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive for the call, and its count.
    unsafe { libc::poll(&mut stdin, 1, wait.as_millis() as libc::c_int) > 0 }
}

struct Session {
    api: Api,
    talk: Conversation,
    model: String,
    quiet: bool,
    total: Total,
}

impl Session {
    async fn run(mut self, wanted: Option<String>) -> Result<()> {
        // Asked even when the model is named: a server that is not there should be known before anything is typed.
        let listed = self.api.models().await;
        let models = match (&wanted, listed) {
            (_, Ok(models)) => models.into_iter().map(|row| row.id).collect(),
            // A server without a model list can still answer, as long as it is there.
            (Some(_), Err(failure)) if matches!(failure.reason, super::client::Reason::Status(404)) => Vec::new(),
            (_, Err(failure)) => return Err(failure.into()),
        };
        let no_model = || super::failed(format!("{} lists no model: name one with --model", self.api.base()));
        self.model = wanted.or_else(|| models.first().cloned()).ok_or_else(no_model)?;
        note(&format!("{} at {}   /help for help, Ctrl-D to leave", self.model, self.api.base()));
        let mut prompt = Prompt::open()?;
        prompt.know_models(models);
        let mut many = false;
        loop {
            // On a thread of its own, so that open connections stay looked after while a person thinks.
            let read = tokio::task::spawn_blocking(move || {
                let typed = if many { prompt.read_many() } else { prompt.read() };
                (prompt, typed)
            });
            let (back, typed) = read.await.map_err(|error| Error::internal(error.to_string()))?;
            prompt = back;
            let typed_many = std::mem::take(&mut many);
            let text = match typed? {
                Typed::Line(text) => text,
                Typed::Nothing => continue,
                Typed::End => return Ok(()),
            };
            if text.trim().is_empty() {
                continue;
            }
            // Inside /multi a slash is just a slash.
            match if typed_many { None } else { conversation::order(&text) } {
                None => {
                    self.talk.ask(text);
                    self.answer().await?;
                }
                Some(Err(why)) => note(&why),
                Some(Ok(Order::Quit)) => return Ok(()),
                Some(Ok(Order::Multi)) => {
                    note("several lines; a dot alone ends them, Ctrl-C drops them");
                    many = true;
                }
                Some(Ok(Order::Model(None))) => self.list_models(&mut prompt).await,
                Some(Ok(Order::Retry)) => match self.talk.rewind() {
                    true => self.answer().await?,
                    false => note("nothing was asked yet"),
                },
                Some(Ok(order)) => self.obey(order),
            }
        }
    }

    async fn answer(&mut self) -> Result<()> {
        let said = match answer(&self.api, &self.talk.request(&self.model)).await {
            Ok(said) => said,
            Err(Trouble::Here(error)) => return Err(error),
            Err(Trouble::There(failure)) => {
                // Taken back, so that the same words can be sent again without being said twice.
                self.talk.unask();
                note(&failure.message);
                return Ok(());
            }
        };
        if !self.quiet {
            note(&said.figures());
        }
        if let Some(failure) = &said.broken {
            note(&format!("{} (/retry asks again)", failure.message));
        }
        self.total.add(&said);
        match said.text.is_empty() {
            true if said.finish.is_none() => self.talk.unask(),
            _ => self.talk.answered(said.text),
        }
        Ok(())
    }

    async fn list_models(&self, prompt: &mut Prompt) {
        let models = match self.api.models().await {
            Ok(models) => models.into_iter().map(|row| row.id).collect::<Vec<_>>(),
            Err(failure) => return note(&failure.message),
        };
        for model in &models {
            note(&format!("{} {model}", if *model == self.model { '*' } else { ' ' }));
        }
        prompt.know_models(models);
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Help => ORDERS.iter().for_each(|(name, args, help)| note(&format!("{name:<8} {args:<17} {help}"))),
            Order::Model(Some(model)) => {
                note(&format!("now talking to {model}"));
                self.model = model;
            }
            Order::System(None) => note(self.talk.system.as_deref().unwrap_or("no system prompt")),
            Order::System(Some(text)) => self.talk.system = (text != "off").then_some(text),
            Order::Set(None) if self.talk.settings.is_empty() => note("nothing set: the server's defaults hold"),
            Order::Set(None) => self.talk.settings.iter().for_each(|(name, value)| note(&format!("{name} {value}"))),
            Order::Set(Some((name, value))) => self.talk.set(name, value),
            Order::Reset => self.talk.reset(),
            Order::Save(file) => {
                let text = self.talk.export(&self.model, file.ends_with(".json"));
                match std::fs::write(&file, text) {
                    Ok(()) => note(&format!("written to {file}")),
                    Err(error) => note(&format!("cannot write {file}: {error}")),
                }
            }
            Order::Usage => note(&self.total.to_string()),
            // Those that need the terminal or the server are seen to in `run`.
            Order::Model(None) | Order::Retry | Order::Multi | Order::Quit => {}
        }
    }
}

/// An answer, as far as it came, and its figures.
#[derive(Default)]
struct Said {
    text: String,
    finish: Option<String>,
    usage: Option<Usage>,
    chunks: u64,
    first: Duration,
    last: Duration,
    stopped: bool,
    broken: Option<Failure>,
}

/// No answer at all: because of us, or because of the server.
enum Trouble {
    Here(Error),
    There(Failure),
}

/// Asks, and prints the answer while it is made. A failure after its first token keeps what was said.
async fn answer(api: &Api, body: &serde_json::Value) -> Result<Said, Trouble> {
    let fancy = super::is_fancy(&std::io::stdout());
    let begin = Instant::now();
    let mut said = Said::default();
    let mut thinking = false;
    let mut stop = std::pin::pin!(ctrl_c());
    let opened = tokio::select! {
        opened = api.stream("/chat/completions", body) => opened.map_err(Trouble::There)?,
        _ = &mut stop => return Ok(Said { stopped: true, ..said }),
    };
    let mut stream = opened;
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            _ = &mut stop => {
                said.stopped = true;
                break;
            }
        };
        let chunk = match next {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(failure) if said.chunks == 0 => return Err(Trouble::There(failure)),
            Err(failure) => {
                said.broken = Some(failure);
                break;
            }
        };
        if !chunk.text.is_empty() || !chunk.reasoning.is_empty() {
            said.chunks += 1;
            said.last = begin.elapsed();
            if said.chunks == 1 {
                said.first = said.last;
            }
        }
        if fancy && !chunk.reasoning.is_empty() {
            thinking = true;
            show(&format!("\x1b[2m{}\x1b[0m", printable(&chunk.reasoning)))?;
        }
        if !chunk.text.is_empty() {
            if std::mem::take(&mut thinking) {
                show("\n\n")?;
            }
            // Piped output is the model's words exactly; a terminal would also obey the control characters among them.
            if fancy {
                show(&printable(&chunk.text))?
            } else {
                show(&chunk.text)?
            }
            said.text.push_str(&chunk.text);
        }
        said.finish = chunk.finish.or(said.finish);
        said.usage = chunk.usage.or(said.usage);
    }
    if said.chunks > 0 && !said.text.ends_with('\n') || fancy && said.stopped {
        show("\n")?;
    }
    Ok(said)
}

fn show(text: &str) -> Result<(), Trouble> {
    super::print(text).map_err(Trouble::Here)
}

/// Without the control characters by which text takes over a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Something said about the conversation rather than in it: dimmed, and on stderr.
fn note(text: &str) {
    if super::is_fancy(&std::io::stderr()) {
        eprintln!("\x1b[2m{}\x1b[0m", printable(text));
    } else {
        eprintln!("{text}");
    }
}

impl Said {
    /// Tokens after the first, per second; chunks stand in when the server does not count.
    fn tokens_per_s(&self) -> Option<f64> {
        let tokens = self.usage.map_or(self.chunks, |usage| usage.completion_tokens);
        let time = self.last.saturating_sub(self.first).as_secs_f64();
        (tokens > 1 && time > 0.0).then(|| (tokens - 1) as f64 / time)
    }

    fn figures(&self) -> String {
        let mut parts = Vec::new();
        match self.usage {
            Some(usage) => {
                let cached = usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
                let cached = if cached > 0 { format!(" ({cached} cached)") } else { String::new() };
                parts.push(format!("{} tokens in{cached}, {} out", usage.prompt_tokens, usage.completion_tokens));
            }
            None => parts.push(format!("about {} tokens out", self.chunks)),
        }
        if self.chunks > 0 {
            parts.push(format!("first after {:.2} s", self.first.as_secs_f64()));
        }
        if let Some(speed) = self.tokens_per_s() {
            parts.push(format!("{speed:.1} tokens/s"));
        }
        if self.stopped {
            parts.push("stopped".into());
        } else if self.finish.as_deref() == Some("length") {
            parts.push("cut at the token limit: /set max_tokens N allows more".into());
        }
        parts.join(" · ")
    }
}

#[derive(Default)]
struct Total {
    answers: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    waited: Duration,
    decoding: Duration,
}

impl Total {
    fn add(&mut self, said: &Said) {
        self.answers += 1;
        self.prompt_tokens += said.usage.map_or(0, |usage| usage.prompt_tokens);
        self.completion_tokens += said.usage.map_or(said.chunks, |usage| usage.completion_tokens);
        self.waited += said.first;
        self.decoding += said.last.saturating_sub(said.first);
    }
}

impl std::fmt::Display for Total {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { answers, prompt_tokens, completion_tokens, waited, decoding } = self;
        write!(f, "{answers} answers · {prompt_tokens} tokens in, {completion_tokens} out")?;
        if *answers > 0 {
            write!(f, " · first token after {:.2} s on average", waited.as_secs_f64() / *answers as f64)?;
        }
        if *completion_tokens > *answers && !decoding.is_zero() {
            write!(f, " · {:.1} tokens/s", (completion_tokens - answers) as f64 / decoding.as_secs_f64())?;
        }
        Ok(())
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Here(error) => error,
            Trouble::There(failure) => failure.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_words_cannot_take_over_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\r\x07\n\tc\u{9b}d"), "a[2Jb\n\tcd");
    }

    #[test]
    fn speed_counts_the_tokens_after_the_first() {
        let usage = Usage { prompt_tokens: 9, completion_tokens: 21, ..Usage::default() };
        let said = Said {
            usage: Some(usage),
            chunks: 15,
            first: Duration::from_secs(1),
            last: Duration::from_secs(3),
            ..Said::default()
        };
        assert_eq!(said.tokens_per_s(), Some(10.0));
        assert_eq!(said.figures(), "9 tokens in, 21 out · first after 1.00 s · 10.0 tokens/s");
    }
}
