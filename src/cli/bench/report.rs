//! What a load run found out: percentiles, throughput, failures; as a table for people and JSON for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cli::client::{Failure, Usage};
use crate::cli::table::{Side, render};

/// One request, seen from the client.
#[derive(Debug, Default)]
pub struct Sample {
    /// From when it should have been sent to its first text.
    pub ttft: Option<Duration>,
    /// Between one text and the next.
    pub gaps: Vec<Duration>,
    /// From when it should have been sent to its end.
    pub total: Duration,
    /// Token counts, if the server gave them.
    pub usage: Option<Usage>,
    /// Why it ended.
    pub finish: Option<String>,
    /// Texts that became vectors; 0 for generated text.
    pub texts: u64,
}

impl Sample {
    /// Tokens produced: counted by the server, or by the pieces they came in.
    fn output_tokens(&self) -> u64 {
        let pieces = self.gaps.len() as u64 + u64::from(self.ttft.is_some());
        self.usage.map_or(pieces, |usage| usage.completion_tokens)
    }
}

/// One load level, added up.
pub struct Level {
    /// `16` clients, or `4/s`.
    pub load: Load,
    /// From the first request to the last answer.
    pub wall: Duration,
    /// CPU time this program used meanwhile, which the server could not have.
    pub client_cpu: Duration,
    ok: u64,
    estimated: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    texts: u64,
    ttft: Times,
    gap: Times,
    per_token: Times,
    total: Times,
    finishes: BTreeMap<String, u64>,
    failures: BTreeMap<String, (u64, String)>,
}

/// How requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// So many clients, each sending when its last answer is there.
    Closed(usize),
    /// So many a second on average, whether answers come or not.
    Open(f64),
}

/// Durations in microseconds, three digits exact.
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Self {
        // An hour is longer than any patience; the bounds are constants, so this cannot fail.
        #[allow(clippy::expect_used)]
        Self(Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("constant bounds"))
    }

    fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    fn ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }

    fn json(&self) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        json!({
            "mean": round(self.0.mean() / 1000.0), "min": self.0.min() as f64 / 1000.0, "p50": self.ms(0.5), "p90": self.ms(0.9),
            "p95": self.ms(0.95), "p99": self.ms(0.99), "max": self.0.max() as f64 / 1000.0, "count": self.0.len(),
        })
    }
}

impl Level {
    /// Nothing sent yet.
    pub fn new(load: Load) -> Self {
        Self {
            load,
            wall: Duration::ZERO,
            client_cpu: Duration::ZERO,
            ok: 0,
            estimated: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            texts: 0,
            ttft: Times::new(),
            gap: Times::new(),
            per_token: Times::new(),
            total: Times::new(),
            finishes: BTreeMap::new(),
            failures: BTreeMap::new(),
        }
    }

    /// Counts one request. Failures count neither tokens nor times: a fast error is no fast answer.
    pub fn add(&mut self, result: Result<Sample, Failure>) {
        let sample = match result {
            Ok(sample) => sample,
            Err(failure) => {
                let entry = self.failures.entry(failure.reason.to_string()).or_insert((0, failure.message));
                entry.0 += 1;
                return;
            }
        };
        let output_tokens = sample.output_tokens();
        self.ok += 1;
        self.output_tokens += output_tokens;
        self.texts += sample.texts;
        match sample.usage {
            Some(usage) => {
                self.prompt_tokens += usage.prompt_tokens;
                self.cached_tokens += usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
            }
            None => self.estimated += 1,
        }
        if let Some(ttft) = sample.ttft {
            self.ttft.add(ttft);
            if let Some(rest) = output_tokens.checked_sub(1).filter(|&rest| rest > 0) {
                self.per_token.add(sample.gaps.iter().sum::<Duration>() / u32::try_from(rest).unwrap_or(u32::MAX));
            }
        }
        sample.gaps.iter().for_each(|&gap| self.gap.add(gap));
        self.total.add(sample.total);
        if sample.texts > 0 {
            return;
        }
        *self.finishes.entry(sample.finish.unwrap_or_else(|| "not said".into())).or_default() += 1;
    }

    /// Requests that were answered.
    pub fn ok(&self) -> u64 {
        self.ok
    }

    /// Requests that were not.
    pub fn failed(&self) -> u64 {
        self.failures.values().map(|(count, _)| count).sum()
    }

    /// Tokens produced per second, all clients together.
    pub fn output_tokens_per_s(&self) -> f64 {
        self.per_s(self.output_tokens)
    }

    fn per_s(&self, count: u64) -> f64 {
        if self.wall.is_zero() { 0.0 } else { count as f64 / self.wall.as_secs_f64() }
    }

    /// All figures, times in milliseconds.
    pub fn json(&self) -> Value {
        let failures: BTreeMap<_, _> = self
            .failures
            .iter()
            .map(|(reason, (count, example))| (reason, json!({ "count": count, "example": example })))
            .collect();
        json!({
            "concurrency": match self.load { Load::Closed(clients) => json!(clients), Load::Open(_) => Value::Null },
            "rate_per_s": match self.load { Load::Open(rate) => json!(rate), Load::Closed(_) => Value::Null },
            "requests": self.ok + self.failed(),
            "ok": self.ok,
            "failed": self.failed(),
            "failures": failures,
            "finish_reasons": self.finishes,
            "wall_s": round(self.wall.as_secs_f64()),
            "requests_per_s": round(self.per_s(self.ok)),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_estimated": self.estimated > 0,
            "output_tokens_per_s": round(self.output_tokens_per_s()),
            "texts": self.texts,
            "texts_per_s": round(self.per_s(self.texts)),
            "total_tokens_per_s": round(self.per_s(self.output_tokens + self.prompt_tokens)),
            "ttft_ms": self.ttft.json(),
            "inter_token_ms": self.gap.json(),
            "time_per_output_token_ms": self.per_token.json(),
            "end_to_end_ms": self.total.json(),
            "client_cpu_s": round(self.client_cpu.as_secs_f64()),
        })
    }
}

/// Throughput first, then latencies with their percentiles, then what went wrong.
pub fn render_all(levels: &[Level]) -> String {
    use Side::{Left, Right};
    let load = |level: &Level| match level.load {
        Load::Closed(clients) => clients.to_string(),
        Load::Open(rate) => format!("{rate}/s"),
    };
    let embeds = levels.iter().any(|level| level.texts > 0);
    let rows: Vec<_> = levels
        .iter()
        .map(|level| {
            let client_share = level.client_cpu.as_secs_f64() / level.wall.as_secs_f64().max(1e-9) * 100.0;
            vec![
                load(level),
                level.ok.to_string(),
                level.failed().to_string(),
                format!("{:.1}", level.wall.as_secs_f64()),
                format!("{:.2}", level.per_s(level.ok)),
                match embeds {
                    true => format!("{:.1}", level.per_s(level.texts)),
                    false => {
                        format!("{}{:.1}", if level.estimated > 0 { "~" } else { "" }, level.output_tokens_per_s())
                    }
                },
                format!("{:.1}", level.per_s(level.output_tokens + level.prompt_tokens)),
                (level.prompt_tokens / level.ok.max(1)).to_string(),
                (level.output_tokens / level.ok.max(1)).to_string(),
                format!("{client_share:.0}%"),
            ]
        })
        .collect();
    let mut text = render(
        &[
            ("load", Right),
            ("ok", Right),
            ("failed", Right),
            ("wall s", Right),
            ("req/s", Right),
            (if embeds { "texts/s" } else { "output tok/s" }, Right),
            ("total tok/s", Right),
            ("tokens in", Right),
            ("out", Right),
            ("client CPU", Right),
        ],
        &rows,
    );

    let mut rows = Vec::new();
    for level in levels.iter().filter(|level| level.ok > 0) {
        let named = [
            ("time to first token", &level.ttft),
            ("between tokens", &level.gap),
            ("per output token", &level.per_token),
            ("end to end", &level.total),
        ];
        for (name, times) in named.into_iter().filter(|(_, times)| !times.0.is_empty()) {
            let mut row = vec![load(level), name.to_owned(), format!("{:.1}", times.0.mean() / 1000.0)];
            row.extend([0.5, 0.9, 0.95, 0.99, 1.0].map(|quantile| format!("{:.1}", times.ms(quantile))));
            rows.push(row);
        }
    }
    if !rows.is_empty() {
        let columns = [
            ("load", Right),
            ("milliseconds", Left),
            ("mean", Right),
            ("p50", Right),
            ("p90", Right),
            ("p95", Right),
            ("p99", Right),
            ("max", Right),
        ];
        text.push('\n');
        text.push_str(&render(&columns, &rows));
    }
    for level in levels {
        for (reason, (count, example)) in &level.failures {
            text.push_str(&format!("\n{count} failed at load {}: {reason}: {example}\n", load(level)));
        }
        let early =
            level.finishes.iter().filter(|(reason, _)| *reason != "length").map(|(_, count)| count).sum::<u64>();
        if early > 0 {
            text.push_str(&format!("\n{early} answers at load {} ended before their token limit\n", load(level)));
        }
    }
    text
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client::Reason;

    fn sample(ttft_ms: u64, gaps: usize, gap_ms: u64, completion_tokens: u64) -> Sample {
        Sample {
            ttft: Some(Duration::from_millis(ttft_ms)),
            gaps: vec![Duration::from_millis(gap_ms); gaps],
            total: Duration::from_millis(ttft_ms + gaps as u64 * gap_ms),
            usage: Some(Usage { prompt_tokens: 100, completion_tokens, ..Usage::default() }),
            finish: Some("length".into()),
            texts: 0,
        }
    }

    fn about(value: &Value, expected: f64) {
        let value = value.as_f64().expect("a number");
        assert!((value - expected).abs() <= expected * 0.002, "{value} is not {expected}");
    }

    #[test]
    fn throughput_and_percentiles_are_those_of_the_samples() {
        let mut level = Level::new(Load::Closed(2));
        for ttft in 1..=100 {
            level.add(Ok(sample(ttft * 10, 10, 20, 11)));
        }
        level.wall = Duration::from_secs(10);
        let json = level.json();
        about(&json["output_tokens_per_s"], 110.0);
        about(&json["total_tokens_per_s"], 1110.0);
        about(&json["requests_per_s"], 10.0);
        about(&json["ttft_ms"]["p50"], 500.0);
        about(&json["ttft_ms"]["p99"], 990.0);
        about(&json["inter_token_ms"]["mean"], 20.0);
        about(&json["time_per_output_token_ms"]["p90"], 20.0);
        about(&json["end_to_end_ms"]["max"], 1200.0);
        assert_eq!(json["inter_token_ms"]["count"], 1000);
        assert_eq!(json["output_tokens_estimated"], false);
    }

    #[test]
    fn time_per_token_counts_tokens_not_pieces() {
        let mut level = Level::new(Load::Closed(1));
        level.add(Ok(sample(10, 5, 20, 11)));
        about(&level.json()["time_per_output_token_ms"]["mean"], 10.0);
    }

    #[test]
    fn vectors_are_counted_by_text() {
        let mut level = Level::new(Load::Closed(2));
        for _ in 0..4 {
            let usage = Some(Usage { prompt_tokens: 640, ..Usage::default() });
            level.add(Ok(Sample { texts: 32, total: Duration::from_millis(50), usage, ..Sample::default() }));
        }
        level.wall = Duration::from_secs(2);
        let json = level.json();
        about(&json["texts_per_s"], 64.0);
        about(&json["total_tokens_per_s"], 1280.0);
        let table = render_all(&[level]);
        assert!(table.contains("texts/s") && table.contains("64.0") && !table.contains("ended before"), "{table}");
    }

    #[test]
    fn failures_are_counted_by_kind_and_leave_the_times_alone() {
        let mut level = Level::new(Load::Open(2.5));
        let fail = |reason, message: &str| Err(Failure { reason, message: message.into() });
        level.add(fail(Reason::Status(429), "busy"));
        level.add(fail(Reason::Status(429), "still busy"));
        level.add(fail(Reason::Cut, "gone"));
        let json = level.json();
        assert_eq!(json["failures"]["status 429"], json!({ "count": 2, "example": "busy" }));
        assert_eq!((&json["failed"], &json["ok"], &json["ttft_ms"]), (&json!(3), &json!(0), &Value::Null));
        let table = render_all(&[level]);
        assert!(table.contains("2.5/s") && table.contains("status 429: busy"), "{table}");
    }

    #[test]
    fn without_usage_pieces_stand_in_for_tokens_and_the_table_says_so() {
        let mut level = Level::new(Load::Closed(1));
        level.add(Ok(Sample { usage: None, ..sample(10, 9, 10, 0) }));
        level.wall = Duration::from_secs(1);
        assert_eq!(level.json()["output_tokens"], 10);
        assert!(render_all(&[level]).contains("~10.0"));
    }
}
