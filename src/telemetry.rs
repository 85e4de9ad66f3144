//! Log output: to stderr, as text for people or JSON for machines, with a filter that can be changed while running.
//!
//! On a terminal lines are coloured. Under journald they carry its priority (`<4>`) instead of a time, which journald adds
//! itself. Spans, metrics and trace context are made elsewhere; this only writes what is logged.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::base::{Error, Result};
use crate::config::{Log, LogFormat};

/// What USR2 steps through before it comes back to the configured filter. Dependencies stay at `info`: their own chatter
/// at `trace` would drown ours.
const LADDER: [&str; 3] = ["info", "info,neurond=debug", "info,neurond=trace"];

/// Changes the filter of a running process.
#[derive(Clone)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
    filters: Arc<Mutex<Filters>>,
}

#[derive(Clone)]
struct Filters {
    configured: String,
    current: String,
}

impl LogControl {
    /// The filter in force.
    pub fn current(&self) -> String {
        self.filters.lock().current.clone()
    }

    /// Puts a configured filter in force; [`LogControl::cycle`] comes back to it.
    ///
    /// # Errors
    /// `BadInput` when it is not a filter; the old one stays.
    pub fn set(&self, filter: &str) -> Result<()> {
        let mut filters = self.filters.lock();
        self.install(filter)?;
        *filters = Filters { configured: filter.to_owned(), current: filter.to_owned() };
        Ok(())
    }

    /// The next step: info, debug, trace, as configured. Returns the filter in force now.
    pub fn cycle(&self) -> String {
        let mut filters = self.filters.lock();
        let next = next_step(&filters);
        match self.install(&next) {
            Ok(()) => filters.current = next,
            Err(error) => tracing::warn!(%error, "log level stays"),
        }
        filters.current.clone()
    }

    fn install(&self, filter: &str) -> Result<()> {
        let parsed = parse(filter)?;
        self.handle.reload(parsed).map_err(|error| Error::internal("the log is gone").with_source(error))
    }
}

/// A press must always change something, so steps equal to what is in force are passed over.
fn next_step(filters: &Filters) -> String {
    let steps = LADDER.iter().copied().chain(std::iter::once(filters.configured.as_str()));
    let passed = LADDER.iter().position(|step| *step == filters.current).map_or(0, |index| index + 1);
    let next = steps.skip(passed).find(|step| *step != filters.current);
    next.unwrap_or(LADDER[0]).to_owned()
}

/// Begins logging to stderr, and makes panics log lines. Once a process.
///
/// # Errors
/// `BadInput` when the filter is not one, `Internal` when logging has begun already.
pub fn init(log: &Log) -> Result<LogControl> {
    let style = Style::of_stderr(log.format);
    let (subscriber, control) = build(log, style, Lines::start(std::io::stderr())?)?;
    subscriber.try_init().map_err(|error| Error::internal("logging has begun already").with_source(error))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(control)
}

/// Waits until what was logged so far has been written, for a second at most: before the process ends.
pub fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (done, written) = crossbeam_channel::bounded(1);
    if queue.send_timeout(Entry::Flush(done), LAST_LINES).is_ok() {
        let _ = written.recv_timeout(LAST_LINES);
    }
}

/// Lines on their way to whoever reads them. A thread of its own writes them, many at once: a reader that is slow holds up
/// no request. When too many wait, new ones are dropped and the next that is written says how many.
#[derive(Clone)]
struct Lines {
    queue: Sender<Entry>,
    dropped: Arc<AtomicU64>,
}

enum Entry {
    Line(Vec<u8>),
    /// Everything before it is written when this is answered.
    Flush(Sender<()>),
}

static QUEUE: OnceLock<Sender<Entry>> = OnceLock::new();
/// Lines that wait at most.
const MAX_LINES: usize = 16 * 1024;
/// Bytes written at once.
const MAX_WRITE: usize = 256 * 1024;
/// How long lines are gathered. To wake the thread for each of many costs its sender more than the line does.
const GATHERED: Duration = Duration::from_millis(4);
/// How long the end of the process waits for its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

impl Lines {
    fn start(mut out: impl Write + Send + 'static) -> Result<Self> {
        let (queue, lines) = crossbeam_channel::bounded(MAX_LINES);
        let lines = Self { queue, dropped: Arc::default() }.spawn(lines, move |bytes| {
            // Nobody is left to tell where stderr is gone.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        })?;
        let _ = QUEUE.set(lines.queue.clone());
        Ok(lines)
    }

    fn spawn(self, lines: Receiver<Entry>, mut write: impl FnMut(&[u8]) + Send + 'static) -> Result<Self> {
        let dropped = self.dropped.clone();
        let work = move || {
            let mut bytes = Vec::new();
            while let Ok(first) = lines.recv() {
                let mut asked = None;
                for entry in std::iter::once(first).chain(lines.try_iter()) {
                    match entry {
                        Entry::Line(line) => bytes.extend_from_slice(&line),
                        Entry::Flush(done) => asked = Some(done),
                    }
                    if asked.is_some() || bytes.len() >= MAX_WRITE {
                        break;
                    }
                }
                if let lost @ 1.. = dropped.swap(0, Ordering::Relaxed) {
                    bytes.extend_from_slice(
                        format!("{lost} log lines were dropped: whoever reads them is too slow\n").as_bytes(),
                    );
                }
                write(&bytes);
                bytes.clear();
                match asked {
                    Some(done) => {
                        let _ = done.send(());
                    }
                    None => std::thread::sleep(GATHERED),
                }
            }
        };
        std::thread::Builder::new()
            .name("log".into())
            .spawn(work)
            .map_err(|error| Error::internal("the log's thread cannot be started").with_source(error))?;
        Ok(self)
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Entry::Line(bytes.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// How lines are dressed for where they go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
    Terminal,
    Plain,
    Journal,
    Json,
}

impl Style {
    fn of_stderr(format: LogFormat) -> Self {
        match format {
            LogFormat::Json => Self::Json,
            LogFormat::Text if std::io::stderr().is_terminal() => Self::Terminal,
            LogFormat::Text if goes_to_journal() => Self::Journal,
            LogFormat::Text => Self::Plain,
        }
    }
}

/// `JOURNAL_STREAM` is device and inode of the journal's stream; it is inherited by processes whose stderr goes elsewhere,
/// so it counts only if stderr is that very stream.
fn goes_to_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

fn parse(filter: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(filter).map_err(|error| {
        Error::bad_input(format!("{filter:?} is not a log filter ({error}); write info, debug, or neurond=debug,warn"))
    })
}

fn build<W>(log: &Log, style: Style, writer: W) -> Result<(impl Subscriber + Send + Sync, LogControl)>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Internal errors would go to stderr by a macro that panics when stderr is gone: a lost log line is no reason to die.
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let lines = match style {
        Style::Terminal => lines.with_ansi(true).boxed(),
        Style::Plain => lines.with_ansi(false).map_event_format(|usual| Quick { usual, style }).boxed(),
        Style::Journal => {
            let usual = Journal(Format::default().without_time());
            lines.with_ansi(false).event_format(Quick { usual, style }).boxed()
        }
        Style::Json => lines.json().flatten_event(true).map_event_format(|usual| Quick { usual, style }).boxed(),
    };
    let (filter, handle) = reload::Layer::new(parse(&log.filter)?);
    let filters = Filters { configured: log.filter.clone(), current: log.filter.clone() };
    let control = LogControl { handle, filters: Arc::new(Mutex::new(filters)) };
    Ok((tracing_subscriber::registry().with(filter).with(lines), control))
}

/// A line with the priority in front that `journalctl -p` filters by.
struct Journal(Format<tracing_subscriber::fmt::format::Full, ()>);

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// What is told of every call: its line is put together by hand, with what callers chose escaped in it, and goes out as it
/// is. The usual way looks at each of its letters again, which takes longer than the gateway does for a cached answer.
struct Quick<Usual> {
    usual: Usual,
    style: Style,
}

/// The target of those lines.
const CALLS: &str = "neurond::calls";

impl<S, N, Usual> FormatEvent<S, N> for Quick<Usual>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    Usual: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::INFO => "INFO",
            Level::DEBUG => "DEBUG",
            _ => "",
        };
        if metadata.target() != CALLS || level.is_empty() {
            return self.usual.format_event(context, writer, event);
        }
        let mut line = Line { out: String::new(), direct: None };
        match self.style {
            Style::Json => {
                writer.write_str("{\"timestamp\":\"")?;
                SystemTime.format_time(&mut writer)?;
                event.record(&mut line);
                let message = serde_json::to_string(&line.out).map_err(|_| fmt::Error)?;
                writeln!(writer, "\",\"level\":\"{level}\",\"message\":{message},\"target\":\"{CALLS}\"}}")
            }
            Style::Journal | Style::Plain | Style::Terminal => {
                if self.style == Style::Journal {
                    writer.write_str(if level == "INFO" { "<6>" } else { "<7>" })?;
                } else {
                    SystemTime.format_time(&mut writer)?;
                    writer.write_char(' ')?;
                }
                write!(writer, "{level:>5} {CALLS}: ")?;
                line.direct = Some(writer.by_ref());
                event.record(&mut line);
                writer.write_char('\n')
            }
        }
    }
}

/// The message of an event, and nothing else of it.
struct Line<'a> {
    out: String,
    /// Where it goes, if not into `out`.
    direct: Option<Writer<'a>>,
}

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = match &mut self.direct {
                Some(writer) => write!(writer, "{value:?}"),
                None => fmt::Write::write_fmt(&mut self.out, format_args!("{value:?}")),
            };
        }
    }
}

/// A panic is a bug: it must be found where everything else is found.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let payload = panic.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let message = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("a value that is not text");
    // Captured only if RUST_BACKTRACE asks for it.
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        tracing::error!(thread, place, %backtrace, "panic: {message}");
    } else {
        tracing::error!(thread, place, "panic: {message}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is written while `work` runs with this filter and style.
    fn written(filter: &str, style: Style, work: impl FnOnce(&LogControl)) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let log = Log { filter: filter.into(), format: LogFormat::Text };
        let (subscriber, control) = build(&log, style, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || work(&control));
        String::from_utf8(sink.0.lock().clone()).unwrap()
    }

    #[test]
    fn json_is_an_object_a_line_with_its_fields_at_the_top() {
        let text = written("info", Style::Json, |_| tracing::info!(model = "m", "loaded \"it\""));
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(
            (&line["message"], &line["model"], &line["level"]),
            (&"loaded \"it\"".into(), &"m".into(), &"INFO".into())
        );
    }

    #[test]
    fn the_journal_gets_a_priority_and_no_time_or_colour() {
        let text = written("trace", Style::Journal, |_| {
            tracing::error!("e");
            tracing::warn!("w");
            tracing::info!(n = 1, "i");
            tracing::debug!("d");
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2], "<6> INFO neurond::telemetry::tests: i n=1");
        assert!(
            lines[0].starts_with("<3>ERROR") && lines[1].starts_with("<4> WARN") && lines[3].starts_with("<7>DEBUG")
        );
    }

    #[test]
    fn plain_lines_begin_with_the_time_and_carry_no_escape_codes() {
        let text = written("info", Style::Plain, |_| tracing::info!("x"));
        assert!(text.starts_with("20") && !text.contains('\x1b'), "{text:?}");
        assert!(written("info", Style::Terminal, |_| tracing::info!("x")).contains('\x1b'));
    }

    #[test]
    fn lines_of_calls_look_like_all_others() {
        let line = r#"event="a\"b" status=200"#;
        for style in [Style::Plain, Style::Journal, Style::Json, Style::Terminal] {
            let calls = written("debug", style, |_| {
                tracing::info!(target: "neurond::calls", "{line}");
                tracing::debug!(target: "neurond::calls", "{line}");
            });
            let others = written("debug", style, |_| {
                tracing::info!(target: "neurond::callx", "{line}");
                tracing::debug!(target: "neurond::callx", "{line}");
            });
            let known = |text: &str| {
                // The time and the target differ.
                let text = text.replace("callx", "calls");
                let digits = |letter: char| if letter.is_ascii_digit() { '0' } else { letter };
                text.chars().map(digits).collect::<String>()
            };
            assert_eq!(known(&calls), known(&others));
            assert_eq!(calls.lines().count(), 2);
        }
    }

    #[test]
    fn usr2_goes_through_the_levels_and_back_to_what_was_configured() {
        let text = written("warn", Style::Plain, |control| {
            tracing::info!("one");
            let steps: Vec<_> = (0..5).map(|_| control.cycle()).collect();
            assert_eq!(steps, ["info", "info,neurond=debug", "info,neurond=trace", "warn", "info"]);
            tracing::info!("two");
            control.set("error").unwrap();
            tracing::warn!("three");
            assert!(control.set("neurond=loud").unwrap_err().message().contains("is not a log filter"));
            assert_eq!(control.current(), "error");
        });
        assert!(!text.contains("one") && text.contains("two") && !text.contains("three"), "{text}");
    }

    #[test]
    fn a_press_always_changes_something() {
        written("info", Style::Plain, |control| {
            let steps: Vec<_> = (0..4).map(|_| control.cycle()).collect();
            assert_eq!(steps, ["info,neurond=debug", "info,neurond=trace", "info", "info,neurond=debug"]);
        });
    }

    #[test]
    fn a_panic_is_a_log_line() {
        let text = written("info", Style::Plain, |_| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(log_panic));
            let _ = std::panic::catch_unwind(|| panic!("out of {}", "luck"));
            std::panic::set_hook(before);
        });
        assert!(text.contains("ERROR") && text.contains("panic: out of luck"), "{text}");
        assert!(text.contains("src/telemetry.rs:") && text.contains("thread="), "{text}");
    }
}
