//! What a caller wants of the gateway, said in `cf-aig-…` headers or in the `config` of a universal step.
//!
//! A malformed value never fails a request: it counts as not sent, and its name is kept for the log. None of these headers
//! is forwarded, nor are those that belong to one connection only. `traceparent` is read as well, and is forwarded as it came.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};

use crate::base::{TraceContext, span_id, trace_id};
use crate::fallback::Growth;
use crate::task::Usage;

/// Shortest and longest time an answer may be kept by a header.
const CACHE_TTL_S: std::ops::RangeInclusive<u64> = 60..=2_678_400;
/// W3C's header of traces.
const TRACEPARENT: &str = "traceparent";
/// Entries of metadata that are kept.
const MAX_METADATA: usize = 5;
/// Longest wait before a retry that a caller may ask for.
const MAX_RETRY_DELAY_MS: u64 = 5_000;
/// Longest text taken from a header.
const MAX_TEXT: usize = 1_024;

/// Each `None` was not said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Do not look into the cache; a fresh answer is stored all the same.
    pub skip_cache: Option<bool>,
    /// How long the answer may be kept; zero: not at all.
    pub cache_ttl: Option<Duration>,
    /// Stands for the whole request in the cache.
    pub cache_key: Option<String>,
    /// Up to five entries of text, numbers and flags.
    pub metadata: Option<Map<String, Value>>,
    /// Whether there is a log record.
    pub collect_log: Option<bool>,
    /// Whether it holds bodies.
    pub collect_log_payload: Option<bool>,
    /// What the caller pays, in dollars.
    pub custom_cost: Option<CustomCost>,
    /// The caller's own name for this call.
    pub event_id: Option<String>,
    /// To the first byte of an answer.
    pub request_timeout: Option<Duration>,
    /// 1 to 5.
    pub max_attempts: Option<u32>,
    /// Before the second attempt.
    pub retry_delay: Option<Duration>,
    /// How the delay grows.
    pub backoff: Option<Growth>,
    /// Which stored key.
    pub byok_alias: Option<String>,
    /// `provider/model` names to turn to, in this order, when the one that was asked fails. An addition of ours.
    pub fallback: Option<Vec<String>>,
    /// Nobody who answers may keep the call.
    pub zero_retention: Option<bool>,
    /// The trace that the call is of.
    pub trace_id: Option<[u8; 16]>,
    /// The caller's own span in it.
    pub parent_span_id: Option<[u8; 8]>,
    /// Both, as the standard has them.
    pub traceparent: Option<TraceContext>,
    /// Names of headers whose values made no sense.
    pub ignored: Vec<&'static str>,
}

/// A price that the caller says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CustomCost {
    /// Dollars a token.
    PerToken {
        /// Of the prompt.
        input: f64,
        /// Of the answer.
        output: f64,
    },
    /// Dollars for the call.
    Total(f64),
}

impl CustomCost {
    /// What a call with this usage costs, in dollars.
    pub fn of(self, usage: Option<&Usage>) -> f64 {
        let tokens = |of: fn(&Usage) -> u32| usage.map_or(0.0, |usage| f64::from(of(usage)));
        match self {
            Self::Total(dollars) => dollars,
            Self::PerToken { input, output } => {
                input * tokens(|usage| usage.prompt_tokens) + output * tokens(|usage| usage.completion_tokens)
            }
        }
    }
}

impl Options {
    /// What a request's headers say.
    pub fn read<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut options = Self::default();
        for (name, value) in headers.filter(|(name, _)| is_ours(name) || *name == TRACEPARENT) {
            // What is no text makes no sense either.
            options.take(name, std::str::from_utf8(value).unwrap_or("\u{0}"));
        }
        options
    }

    fn take(&mut self, name: &str, value: &str) {
        let Some(rest) = name.strip_prefix("cf-aig-") else {
            match name {
                TRACEPARENT => self.traceparent = self.checked(TRACEPARENT, TraceContext::parse(value)),
                // Their older names.
                "cf-cache-ttl" => self.cache_ttl = self.cache_ttl.or(self.checked("cf-cache-ttl", ttl(value))),
                _ => self.skip_cache = self.skip_cache.or(self.checked("cf-skip-cache", flag(value))),
            }
            return;
        };
        match rest {
            "skip-cache" => self.skip_cache = self.checked("cf-aig-skip-cache", flag(value)),
            "cache-ttl" => self.cache_ttl = self.checked("cf-aig-cache-ttl", ttl(value)),
            "cache-key" => self.cache_key = self.checked("cf-aig-cache-key", text(value)),
            "metadata" => self.metadata = self.checked("cf-aig-metadata", metadata(value)),
            "collect-log" => self.collect_log = self.checked("cf-aig-collect-log", flag(value)),
            "collect-log-payload" => {
                self.collect_log_payload = self.checked("cf-aig-collect-log-payload", flag(value));
            }
            "custom-cost" => self.custom_cost = self.checked("cf-aig-custom-cost", custom_cost(value)),
            "event-id" => self.event_id = self.checked("cf-aig-event-id", text(value)),
            "request-timeout" => {
                self.request_timeout = self.checked("cf-aig-request-timeout", number(value).and_then(timeout));
            }
            "max-attempts" => self.max_attempts = self.checked("cf-aig-max-attempts", number(value).and_then(attempts)),
            "retry-delay" => self.retry_delay = self.checked("cf-aig-retry-delay", number(value).and_then(delay)),
            "backoff" => self.backoff = self.checked("cf-aig-backoff", Growth::parse(value.trim())),
            "fallback" => self.fallback = self.checked("cf-aig-fallback", names(value)),
            "zdr" => self.zero_retention = self.checked("cf-aig-zdr", flag(value)),
            "otel-trace-id" => self.trace_id = self.checked("cf-aig-otel-trace-id", trace_id(value.trim())),
            "otel-parent-span-id" => {
                self.parent_span_id = self.checked("cf-aig-otel-parent-span-id", span_id(value.trim()));
            }
            "byok-alias" => self.byok_alias = self.checked("cf-aig-byok-alias", text(value)),
            _ => {}
        }
    }

    /// The `config` of a universal step.
    pub fn take_config(&mut self, config: &Map<String, Value>) {
        let whole = |name: &str| config.get(name).filter(|value| !value.is_null());
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str().and_then(self::number));
        let flag = |value: &Value| value.as_bool().or_else(|| value.as_str().and_then(self::flag));
        if let Some(value) = whole("requestTimeout") {
            self.request_timeout = self.checked("requestTimeout", number(value).and_then(timeout));
        }
        if let Some(value) = whole("maxAttempts") {
            self.max_attempts = self.checked("maxAttempts", number(value).and_then(attempts));
        }
        if let Some(value) = whole("retryDelay") {
            self.retry_delay = self.checked("retryDelay", number(value).and_then(delay));
        }
        if let Some(value) = whole("backoff") {
            self.backoff = self.checked("backoff", value.as_str().and_then(Growth::parse));
        }
        if let Some(value) = whole("cacheTtl") {
            self.cache_ttl = self.checked("cacheTtl", number(value).and_then(in_range));
        }
        if let Some(value) = whole("skipCache") {
            self.skip_cache = self.checked("skipCache", flag(value));
        }
        if let Some(value) = whole("cacheKey") {
            self.cache_key = self.checked("cacheKey", value.as_str().and_then(text));
        }
    }

    /// These, and where they say nothing, those of the whole request.
    pub fn or(&self, request: &Self) -> Self {
        let mut ignored = self.ignored.clone();
        ignored.extend(&request.ignored);
        Self {
            skip_cache: self.skip_cache.or(request.skip_cache),
            cache_ttl: self.cache_ttl.or(request.cache_ttl),
            cache_key: self.cache_key.clone().or_else(|| request.cache_key.clone()),
            metadata: self.metadata.clone().or_else(|| request.metadata.clone()),
            collect_log: self.collect_log.or(request.collect_log),
            collect_log_payload: self.collect_log_payload.or(request.collect_log_payload),
            custom_cost: self.custom_cost.or(request.custom_cost),
            event_id: self.event_id.clone().or_else(|| request.event_id.clone()),
            request_timeout: self.request_timeout.or(request.request_timeout),
            max_attempts: self.max_attempts.or(request.max_attempts),
            retry_delay: self.retry_delay.or(request.retry_delay),
            backoff: self.backoff.or(request.backoff),
            fallback: self.fallback.clone().or_else(|| request.fallback.clone()),
            byok_alias: self.byok_alias.clone().or_else(|| request.byok_alias.clone()),
            zero_retention: self.zero_retention.or(request.zero_retention),
            trace_id: self.trace_id.or(request.trace_id),
            parent_span_id: self.parent_span_id.or(request.parent_span_id),
            traceparent: self.traceparent.or(request.traceparent),
            ignored,
        }
    }

    /// Where the call stands in a trace of its caller's. What Cloudflare's headers say wins; a span of another trace is no parent.
    pub fn trace(&self) -> Option<TraceContext> {
        let standard = self.traceparent.filter(|known| self.trace_id.is_none_or(|trace| trace == known.trace));
        let trace = self.trace_id.or(standard.map(|known| known.trace))?;
        let parent = self.parent_span_id.or(standard.and_then(|known| known.parent));
        let flags = standard.map_or(TraceContext::SAMPLED, |known| known.flags);
        Some(TraceContext { trace, parent, flags })
    }

    fn checked<T>(&mut self, name: &'static str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.ignored.push(name);
        }
        value
    }
}

/// What of a request's headers belongs to the upstream.
pub fn forwarded<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> HeaderMap {
    let mut forwarded = HeaderMap::with_capacity(16);
    let mut named: Vec<String> = Vec::new();
    for (name, value) in headers {
        if name == "connection" {
            let words = std::str::from_utf8(value).unwrap_or_default().split(',');
            let words = words.map(|word| word.trim().to_ascii_lowercase());
            named.extend(words.filter(|word| !matches!(word.as_str(), "close" | "keep-alive" | "upgrade" | "")));
        }
        if is_hop_by_hop(name) || is_ours(name) {
            continue;
        }
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value)) {
            forwarded.append(name, value);
        }
    }
    // Whatever `Connection` names belongs to this connection as well.
    for name in named {
        forwarded.remove(name.as_str());
    }
    forwarded
}

/// Headers that are for the gateway, whether or not this build acts on them: they are nobody else's business.
fn is_ours(name: &str) -> bool {
    name.starts_with("cf-aig-") || matches!(name, "cf-cache-ttl" | "cf-skip-cache")
}

/// Headers that say something about one connection, and those that are made anew for the next.
pub fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "host"
            | "content-length"
            | "expect"
    )
}

fn flag(value: &str) -> Option<bool> {
    match value.trim() {
        "true" | "True" | "TRUE" | "1" => Some(true),
        "false" | "False" | "FALSE" | "0" => Some(false),
        _ => None,
    }
}

fn number(value: &str) -> Option<u64> {
    value.trim().parse().ok()
}

fn text(value: &str) -> Option<String> {
    let value = value.trim();
    (!value.is_empty() && value.len() <= MAX_TEXT && !value.chars().any(char::is_control)).then(|| value.to_owned())
}

fn ttl(value: &str) -> Option<Duration> {
    number(value).and_then(in_range)
}

fn in_range(seconds: u64) -> Option<Duration> {
    (seconds == 0 || CACHE_TTL_S.contains(&seconds)).then(|| Duration::from_secs(seconds))
}

fn timeout(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

fn attempts(count: u64) -> Option<u32> {
    (1..=5).contains(&count).then_some(count as u32)
}

fn delay(ms: u64) -> Option<Duration> {
    (ms <= MAX_RETRY_DELAY_MS).then(|| Duration::from_millis(ms))
}

/// Names with commas between them; at most eight.
fn names(value: &str) -> Option<Vec<String>> {
    let names: Vec<String> = value.split(',').map(|name| name.trim().to_owned()).collect();
    let good = |name: &String| !name.is_empty() && name.len() <= 256 && !name.chars().any(char::is_control);
    (names.len() <= 8 && names.iter().all(good)).then_some(names)
}

/// One null or nested value drops all of it.
fn metadata(value: &str) -> Option<Map<String, Value>> {
    let Ok(Value::Object(all)) = serde_json::from_str(value) else { return None };
    if all.values().any(|value| matches!(value, Value::Null | Value::Array(_) | Value::Object(_))) {
        return None;
    }
    Some(all.into_iter().take(MAX_METADATA).collect())
}

fn custom_cost(value: &str) -> Option<CustomCost> {
    let Ok(Value::Object(cost)) = serde_json::from_str(value) else { return None };
    let dollars =
        |name: &str| cost.get(name).and_then(Value::as_f64).filter(|value| value.is_finite() && *value >= 0.0);
    if let Some(total) = dollars("total_cost") {
        return Some(CustomCost::Total(total));
    }
    let (input, output) = (dollars("per_token_in"), dollars("per_token_out"));
    if input.is_none() && output.is_none() {
        return None;
    }
    Some(CustomCost::PerToken { input: input.unwrap_or(0.0), output: output.unwrap_or(0.0) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(headers: &[(&str, &str)]) -> (Options, Vec<String>) {
        let pairs = || headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        let (options, forwarded) = (Options::read(pairs()), forwarded(pairs()));
        let forwarded = forwarded.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
        let mut forwarded: Vec<String> = forwarded.collect();
        forwarded.sort();
        (options, forwarded)
    }

    #[test]
    fn what_is_for_the_gateway_or_for_one_connection_stays_here() {
        let (options, forwarded) = read(&[
            ("host", "gateway"),
            ("authorization", "Bearer x"),
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("content-length", "12"),
            ("transfer-encoding", "chunked"),
            ("cf-aig-skip-cache", "true"),
            ("cf-aig-something-new", "1"),
            ("cf-cache-ttl", "120"),
            ("cf-ray", "kept"),
            ("x-twice", "a"),
            ("x-twice", "b"),
        ]);
        assert_eq!(forwarded, ["authorization: Bearer x", "cf-ray: kept", "x-twice: a", "x-twice: b"]);
        assert_eq!((options.skip_cache, options.cache_ttl), (Some(true), Some(Duration::from_secs(120))));
        assert!(options.ignored.is_empty());
    }

    #[test]
    fn a_value_without_sense_counts_as_not_sent_and_is_named() {
        for (name, value) in [
            ("cf-aig-cache-ttl", "59"),
            ("cf-aig-cache-ttl", "2678401"),
            ("cf-aig-cache-ttl", "-1"),
            ("cf-aig-max-attempts", "0"),
            ("cf-aig-max-attempts", "6"),
            ("cf-aig-retry-delay", "5001"),
            ("cf-aig-backoff", "quadratic"),
            ("cf-aig-request-timeout", "0"),
            ("cf-aig-skip-cache", "maybe"),
            ("cf-aig-metadata", "{\"a\":null}"),
            ("cf-aig-metadata", "{\"a\":{\"b\":1},\"c\":1}"),
            ("cf-aig-metadata", "[1]"),
            ("cf-aig-custom-cost", "{\"per_token_in\":-1}"),
            ("cf-aig-event-id", ""),
            ("cf-aig-zdr", "perhaps"),
            ("cf-aig-otel-trace-id", "00000000000000000000000000000000"),
            ("cf-aig-otel-parent-span-id", "00f067aa0ba902b"),
        ] {
            let (options, forwarded) = read(&[(name, value)]);
            assert_eq!(options, Options { ignored: vec![name], ..Options::default() }, "{name}: {value}");
            assert!(forwarded.is_empty());
        }
    }

    #[test]
    fn a_trace_is_joined_as_the_headers_say_and_the_standard_one_goes_on() {
        let (trace, other) = ("4bf92f3577b34da6a3ce929d0e0e4736", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
        let (span, mine) = ("00f067aa0ba902b7", "bbbbbbbbbbbbbbbb");
        let standard = format!("00-{trace}-{span}-00");
        let check = |headers: &[(&str, &str)], expected: Option<(&str, Option<&str>, u8)>| {
            let (options, forwarded) = read(headers);
            let expected = expected.map(|(trace, parent, flags)| TraceContext {
                trace: trace_id(trace).unwrap(),
                parent: parent.map(|span| span_id(span).unwrap()),
                flags,
            });
            assert_eq!(options.trace(), expected, "{headers:?}");
            let sent = headers.iter().filter(|(name, _)| *name == TRACEPARENT);
            assert_eq!(forwarded, sent.map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>());
        };
        let (id, parent) = ("cf-aig-otel-trace-id", "cf-aig-otel-parent-span-id");
        check(&[], None);
        check(&[(TRACEPARENT, &standard)], Some((trace, Some(span), 0)));
        check(&[(TRACEPARENT, "00-nonsense")], None);
        check(&[(id, other)], Some((other, None, 1)));
        check(&[(id, other), (parent, mine)], Some((other, Some(mine), 1)));
        check(&[(parent, mine)], None);
        check(&[(TRACEPARENT, &standard), (parent, mine)], Some((trace, Some(mine), 0)));
        check(&[(TRACEPARENT, &standard), (id, other)], Some((other, None, 1)));
        check(&[(TRACEPARENT, &standard), (id, trace)], Some((trace, Some(span), 0)));
        check(&[(TRACEPARENT, &standard), (id, "short")], Some((trace, Some(span), 0)));
    }

    #[test]
    fn metadata_keeps_its_first_five_entries() {
        let (options, _) = read(&[("cf-aig-metadata", r#"{"a":1,"b":"x","c":true,"d":2.5,"e":5,"f":6}"#)]);
        assert_eq!(Value::Object(options.metadata.unwrap()), json!({"a": 1, "b": "x", "c": true, "d": 2.5, "e": 5}));
    }

    #[test]
    fn a_step_wins_over_the_request() {
        let (request, _) = read(&[("cf-aig-max-attempts", "2"), ("cf-aig-request-timeout", "900")]);
        let mut step = Options::default();
        let config = json!({"maxAttempts": 4, "backoff": "linear", "cacheTtl": "60", "requestTimeout": "soon"});
        step.take_config(config.as_object().unwrap());
        let both = step.or(&request);
        assert_eq!((both.max_attempts, both.backoff), (Some(4), Some(Growth::Linear)));
        assert_eq!(both.cache_ttl, Some(Duration::from_secs(60)));
        assert_eq!(both.request_timeout, Some(Duration::from_millis(900)));
        assert_eq!(both.ignored, ["requestTimeout"]);
    }

    #[test]
    fn a_price_is_for_the_call_or_a_token() {
        let cost = |text| read(&[("cf-aig-custom-cost", text)]).0.custom_cost;
        assert_eq!(cost(r#"{"total_cost":0.05}"#), Some(CustomCost::Total(0.05)));
        assert_eq!(cost(r#"{"per_token_in":1e-6}"#), Some(CustomCost::PerToken { input: 1e-6, output: 0.0 }));
    }
}
