//! `neurond usage`: who used what, how fast it was and what it cost, as the running daemon counts it.
//!
//! ```text
//!  GET …/ai-gateway/analytics ─> by group ──────────┐
//!                                by group and time ─┼─> table with trends,  CSV,  JSON
//!                                all in one ────────┘
//! ```
//!
//! Adds nothing up itself: quantiles cannot be, and so every row is the daemon's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::client::{Api, Failure, Reason, Server};
use super::table::{Side, render};
use super::{failed, is_fancy, print};
use crate::base::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  neurond usage                                   the last seven days by model
  neurond usage --account acme --by provider,status --days 30
  neurond usage --by day --days 90                a row for each day
  neurond usage --by key,model --from 2026-05-01 --to 2026-05-31
  neurond usage --by hour --from 24h              24 hours until now
  neurond usage --by model,day --days 31 --csv may.csv
  neurond usage --json | python3 -m json.tool

Days are UTC. `hits` are answers out of the response cache, of the calls that asked it; p50, p95 and p99 say what half, 95 and 99 per cent of
the calls stayed under, and ttft how soon half of them had their first byte, all to within 1 %. The daemon keeps minutes for two days,
hours for sixty and days for two years, unless it is configured otherwise.";

/// Rows of a CSV file or of JSON: as many as the daemon tells at once.
const ALL: u32 = 10_000;
/// Characters of a trend.
const TREND: usize = 16;

/// Arguments of `neurond usage`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// Whose usage: the account of the token
    #[arg(long, env = "NEUROND_ACCOUNT", default_value = "local")]
    account: String,
    /// Today and the days before it, so many in all
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=36_500), conflicts_with_all = ["from", "to"])]
    days: u32,
    /// From here on: a date, a time (2026-05-01T10:00:00Z), or so long ago (90m, 24h, 7d)
    #[arg(long, value_name = "WHEN")]
    from: Option<String>,
    /// Until here: the end of a date, or a time [default: now]
    #[arg(long, value_name = "WHEN")]
    to: Option<String>,
    /// A row for each of these; several with commas
    #[arg(long, value_delimiter = ',', default_value = "model")]
    by: Vec<By>,
    /// Most rows of the table [default: 30; a time: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(ALL)))]
    limit: Option<u32>,
    /// Write all rows and measures to a file, or to standard output (-)
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    csv: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
    /// Letters only, also in a terminal
    #[arg(long)]
    plain: bool,
}

/// What a row is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum By {
    Model,
    Provider,
    Gateway,
    Key,
    Status,
    Cache,
    Minute,
    Hour,
    Day,
}

impl By {
    /// Its name among the daemon's dimensions.
    fn dimension(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Provider => "provider",
            Self::Gateway => "gateway",
            Self::Key => "key",
            Self::Status => "status",
            Self::Cache => "cache",
            Self::Minute => "datetimeMinute",
            Self::Hour => "datetimeHour",
            Self::Day => "date",
        }
    }

    /// The heading of its column.
    fn title(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
            other => other.dimension(),
        }
    }

    fn is_time(self) -> bool {
        matches!(self, Self::Minute | Self::Hour | Self::Day)
    }
}

/// What the daemon says.
#[derive(Deserialize)]
struct Report {
    #[serde(deserialize_with = "moment")]
    from: Timestamp,
    #[serde(deserialize_with = "moment")]
    to: Timestamp,
    step: Option<Box<str>>,
    total: usize,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    count: u64,
    dimensions: Map<String, Value>,
    /// `sum`, `avg`, `quantiles`, `ratio`.
    #[serde(flatten)]
    sections: Map<String, Value>,
}

impl Row {
    fn number(&self, section: &str, name: &str) -> Option<f64> {
        self.sections.get(section)?.get(name)?.as_f64()
    }
}

fn moment<'de, D: serde::Deserializer<'de>>(told: D) -> Result<Timestamp, D::Error> {
    String::deserialize(told)?.parse().map_err(serde::de::Error::custom)
}

/// Asks and tells.
pub async fn run(args: Args) -> Result<()> {
    let api = Api::new(&args.server, Duration::from_secs(60))?;
    let (from, to) = time(&args, Timestamp::now().to_zoned(TimeZone::UTC).date())?;
    let groups: Vec<&str> = args.by.iter().map(|by| by.dimension()).collect();
    let is_by_time = args.by.iter().any(|by| by.is_time());
    let ask = async |from: &str, to: Option<&str>, more: &[(&str, &str)]| {
        let time = [("from", Some(from)), ("to", to)].into_iter().filter_map(|(name, value)| Some((name, value?)));
        let query: Vec<(&str, &str)> = time.chain(more.iter().copied()).collect();
        let path = ["client", "v4", "accounts", &args.account, "ai-gateway", "analytics"];
        api.get_from_root(&path, &query).await
    };
    let groups = ("group_by", &groups.join(",")[..]);
    let most = if is_by_time || args.json || args.csv.is_some() { ALL } else { 30 };
    let limit = args.limit.unwrap_or(most).to_string();
    let answer = ask(&from, to.as_deref(), &[groups, ("limit", &limit)]).await.map_err(explained)?;
    if args.json {
        let answer: Value = result(&answer)?;
        return print(&format!("{answer:#}\n"));
    }
    let report: Report = result(&answer)?;
    if let Some(file) = &args.csv {
        write(file, &csv(&report, &args.by))?;
        tell_missing(&report);
        return Ok(());
    }
    // What else is asked is of the same time, which may have been rounded.
    let (from, to) = (report.from.to_string(), report.to.to_string());
    let said = format!("{}: {from} to {to}", args.account);
    if report.rows.is_empty() {
        eprintln!("{said}: no calls. Another time (--from) or account (--account) may have some");
        return Ok(());
    }
    let all: Report = result(&ask(&from, Some(&to), &[]).await.map_err(explained)?)?;
    // Where that were too many rows there are no trends.
    let trends = match is_by_time {
        true => None,
        false => ask(&from, Some(&to), &[groups, ("step", "auto"), ("limit", &ALL.to_string())]).await.ok(),
    };
    let trends = trends.and_then(|answer| result::<Report>(&answer).ok());
    let is_fancy = !args.plain && is_fancy(&std::io::stdout());
    print(&table(&report, &all, trends.as_ref(), &args.by, is_fancy))?;
    eprintln!("{said}");
    tell_missing(&report);
    Ok(())
}

fn tell_missing(report: &Report) {
    let (told, total) = (report.rows.len(), report.total);
    if told < total {
        let more =
            if total > ALL as usize { "a shorter time (--from, --to) shows all of it" } else { "--limit shows more" };
        eprintln!("{told} of {total} rows; {more}");
    }
}

/// The daemon's refusal of a value is wrong usage; where it refuses the account it helps to name another.
fn explained(failure: Failure) -> Error {
    match failure.reason {
        Reason::Status(400) => Error::bad_input(failure.message),
        Reason::Status(403) => {
            failed(failure.message + ". Name the token's own account with --account; it needs the scope `admin`")
        }
        _ => failure.into(),
    }
}

/// `from` and `to` as the daemon reads them; a date at the end is part of it.
fn time(args: &Args, today: Date) -> Result<(String, Option<String>)> {
    let wrong = |error: jiff::Error| Error::bad_input(format!("--days {}, --to {:?}: {error}", args.days, args.to));
    let from = match &args.from {
        Some(from) => from.clone(),
        None if args.to.is_some() => return Err(Error::bad_input("--to needs --from: from when on?")),
        None => today.checked_sub(jiff::Span::new().days(i64::from(args.days) - 1)).map_err(wrong)?.to_string(),
    };
    let to = match &args.to {
        Some(to) if to.len() == 10 && to.parse::<Date>().is_ok() => {
            Some(to.parse::<Date>().and_then(Date::tomorrow).map_err(wrong)?.to_string())
        }
        to => to.clone(),
    };
    Ok((from, to))
}

/// What is in Cloudflare's envelope.
fn result<T: serde::de::DeserializeOwned>(answer: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Envelope<T> {
        result: T,
    }
    let read = serde_json::from_slice::<Envelope<T>>(answer).map(|envelope| envelope.result);
    read.map_err(|error| failed(format!("the server's answer is no analytics ({error}): is --url that of a neurond?")))
}

fn write(file: &Path, text: &str) -> Result<()> {
    if file == Path::new("-") {
        return print(text);
    }
    std::fs::write(file, text).map_err(|error| failed(format!("cannot write {}: {error}", file.display())))
}

/// Each row with its trend, or where rows are times a bar, and all of them in one below.
fn table(report: &Report, all: &Report, trends: Option<&Report>, by: &[By], is_fancy: bool) -> String {
    const NUMBERS: [&str; 11] =
        ["requests", "errors", "hits", "tokens in", "tokens out", "neurons", "USD", "p50", "p95", "p99", "ttft"];
    let mut columns: Vec<(&str, Side)> = by.iter().map(|by| (by.title(), Side::Left)).collect();
    columns.extend(NUMBERS.map(|name| (name, Side::Right)));
    columns.push(("", Side::Left));
    let busiest = report.rows.iter().map(|row| row.count).max().unwrap_or(0);
    let mut rows: Vec<Vec<String>> = Vec::new();
    for row in &report.rows {
        let mut cells: Vec<String> = by.iter().map(|by| label(row, *by)).collect();
        cells.extend(numbers(row));
        cells.push(match trends {
            Some(trends) => trend(&series(trends, Some(&row.dimensions)), is_fancy),
            None => bar(row.count, busiest, is_fancy),
        });
        rows.push(cells);
    }
    if let (Some(whole), true) = (all.rows.first(), report.total > 1) {
        let mut cells = vec![String::new(); by.len()];
        cells[0] = "all".to_owned();
        cells.extend(numbers(whole));
        cells.push(trends.map(|trends| trend(&series(trends, None), is_fancy)).unwrap_or_default());
        rows.push(cells);
    }
    render(&columns, &rows)
}

/// What a row is of; times without the letters.
fn label(row: &Row, by: By) -> String {
    let text = text(row.dimensions.get(by.dimension()));
    if by.is_time() { text.trim_end_matches(":00Z").replace('T', " ") } else { text }
}

fn numbers(row: &Row) -> [String; 11] {
    let sum = |name| row.number("sum", name).unwrap_or(0.0);
    let time = |name| row.number("quantiles", name).map_or_else(|| "-".to_owned(), milliseconds);
    [
        short(row.count as f64),
        short(sum("erroredRequests")),
        row.number("ratio", "cacheHits").map_or_else(|| "-".to_owned(), |ratio| format!("{:.0}%", ratio * 100.0)),
        short(sum("totalInputTokens")),
        short(sum("totalOutputTokens")),
        short(sum("totalNeurons")),
        usd(sum("cost")),
        time("latencyP50"),
        time("latencyP95"),
        time("latencyP99"),
        time("ttftP50"),
    ]
}

/// Requests step by step from the first to the last: of one group, or of all.
fn series(trends: &Report, group: Option<&Map<String, Value>>) -> Vec<u64> {
    let (name, seconds) = match trends.step.as_deref() {
        Some("minute") => ("datetimeMinute", 60),
        Some("hour") => ("datetimeHour", 3600),
        _ => ("date", 86_400),
    };
    let index = |row: &Row| {
        let at = row.dimensions.get(name)?.as_str()?;
        let date = || at.parse::<Date>().ok()?.to_zoned(TimeZone::UTC).ok().map(|midnight| midnight.timestamp());
        let at = at.parse::<Timestamp>().ok().or_else(date)?;
        usize::try_from((at.as_second() - trends.from.as_second()) / seconds).ok()
    };
    let length = (trends.to.as_second() - trends.from.as_second()) / seconds;
    let mut counts = vec![0; usize::try_from(length).unwrap_or(0).min(ALL as usize)];
    for row in &trends.rows {
        if group.is_none_or(|group| group.iter().all(|(name, value)| row.dimensions.get(name) == Some(value)))
            && let Some(count) = index(row).and_then(|index| counts.get_mut(index))
        {
            *count += row.count;
        }
    }
    counts
}

/// A character for each stretch of time, the higher the more; nothing where there was nothing.
fn trend(counts: &[u64], is_fancy: bool) -> String {
    let levels: [char; 8] = if is_fancy {
        ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█']
    } else {
        ['.', ':', '-', '=', '+', '*', '#', '@']
    };
    let width = counts.len().min(TREND);
    // Stretches that are not equally long are made comparable.
    let means: Vec<f64> = (0..width)
        .map(|column| {
            let part = &counts[column * counts.len() / width..(column + 1) * counts.len() / width];
            part.iter().sum::<u64>() as f64 / part.len() as f64
        })
        .collect();
    let most = means.iter().copied().fold(0.0, f64::max);
    let level =
        |mean: f64| ((mean / most * 8.0).ceil() as usize).checked_sub(1).map_or(' ', |level| levels[level.min(7)]);
    means.into_iter().map(|mean| if mean > 0.0 { level(mean) } else { ' ' }).collect()
}

/// As long as the share of the longest.
fn bar(count: u64, most: u64, is_fancy: bool) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (count as f64 / most.max(1) as f64 * (TREND * 8) as f64).ceil() as usize;
    match is_fancy {
        true => "█".repeat(eighths / 8) + EIGHTHS[eighths % 8],
        false => "#".repeat(eighths.div_ceil(8)),
    }
}

/// RFC 4180: a heading, then all rows with all measures; a comma between fields, CRLF at the end.
fn csv(report: &Report, by: &[By]) -> String {
    let mut lines: Vec<Vec<String>> =
        vec![by.iter().map(|by| by.dimension().to_owned()).chain(["count".to_owned()]).collect()];
    if let Some(first) = report.rows.first() {
        lines[0].extend(measures(first).into_iter().map(|(name, _)| name));
    }
    for row in &report.rows {
        let groups = by.iter().map(|by| text(row.dimensions.get(by.dimension())));
        let numbers = measures(row).into_iter().map(|(_, value)| text(Some(value)));
        lines.push(groups.chain([row.count.to_string()]).chain(numbers).collect());
    }
    let quoted = |field: &String| match field.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.clone(),
    };
    lines.iter().map(|line| line.iter().map(quoted).collect::<Vec<_>>().join(",") + "\r\n").collect()
}

/// All that is measured, by section and name.
fn measures(row: &Row) -> Vec<(String, &Value)> {
    let sections = row.sections.iter().filter_map(|(section, values)| Some((section, values.as_object()?)));
    sections
        .flat_map(|(section, values)| values.iter().map(move |(name, value)| (format!("{section}_{name}"), value)))
        .collect()
}

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Five digits as they are, more in thousands, millions …
fn short(number: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let (mut number, mut unit) = (number, 0);
    if number < 99_999.5 {
        return if number.fract() == 0.0 { format!("{number}") } else { format!("{number:.2}") };
    }
    while number >= 999.5 && unit + 1 < UNITS.len() {
        number /= 1000.0;
        unit += 1;
    }
    let decimals = if number < 9.995 { 2 } else { usize::from(number < 99.95) };
    format!("{number:.decimals$}{}", UNITS[unit])
}

fn usd(amount: f64) -> String {
    if amount > 0.0 && amount < 0.01 { "<0.01".to_owned() } else { format!("{amount:.2}") }
}

fn milliseconds(time: f64) -> String {
    match time {
        short if short < 10.0 => format!("{short:.1} ms"),
        medium if medium < 999.5 => format!("{medium:.0} ms"),
        long if long < 99_950.0 => format!("{:.1} s", long / 1000.0),
        longer => format!("{:.0} s", longer / 1000.0),
    }
}

#[cfg(test)]
#[path = "usage_test.rs"]
mod tests;
