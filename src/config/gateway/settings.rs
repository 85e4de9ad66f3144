//! What a gateway does: the same for the file and for the management API. `check.rs` makes it of the fields that say it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::base::{Result, Secret};

/// What stands in an answer where a secret is. Sent back, it keeps the secret that is there.
pub const MASK: &str = "***";

/// Every field that may be set.
pub const FIELDS: [&str; 31] = [
    "authentication",
    "byok_only",
    "cache_invalidate_on_update",
    "cache_per_account",
    "cache_ttl",
    "collect_logs",
    "dlp",
    "fallback",
    "first_byte_timeout_ms",
    "guardrails",
    "idle_timeout_ms",
    "log_classification",
    "log_management",
    "log_management_strategy",
    "logpush",
    "logpush_public_key",
    "otel",
    "rate_limiting_interval",
    "rate_limiting_limit",
    "rate_limiting_technique",
    "request_timeout_ms",
    "retry_backoff",
    "retry_delay",
    "retry_max_attempts",
    "rules",
    "schemas",
    "spend_limits",
    "store_id",
    "stripe",
    "workers_ai_billing_mode",
    "zdr",
];

/// Hazard categories of guardrails.
pub const CATEGORIES: [&str; 14] =
    ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S12", "S13", "P1"];

/// What a gateway does with each call.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Callers need a token of ours.
    pub authentication: bool,
    /// How long answers are kept; `None`: no cache unless a request asks for it.
    pub cache_ttl: Option<Duration>,
    /// Any change of the gateway empties its cache.
    pub cache_invalidate_on_update: bool,
    /// Accounts do not see each other's cached answers.
    pub cache_per_account: bool,
    /// Calls are logged.
    pub collect_logs: bool,
    /// Most log records kept; `None`: as many as the daemon keeps.
    pub log_limit: Option<LogLimit>,
    /// Requests in a time; `None`: no limit.
    pub rate_limit: Option<RateLimit>,
    /// Tries of one target.
    pub retry: Retry,
    /// How long to wait for a target.
    pub timeouts: Timeouts,
    /// What is tried in order when the target that was asked for failed.
    pub fallback: Vec<Target>,
    /// Budgets that are in force.
    pub spend_limits: Vec<SpendRule>,
    /// Data-loss policies that are in force.
    pub dlp: Vec<DlpPolicy>,
    /// What a guard model judges.
    pub guardrails: Guardrails,
    /// Patterns that texts are searched for.
    pub rules: Vec<Rule>,
    /// JSON schemas that bodies must follow.
    pub schemas: Schemas,
    /// Where spans go.
    pub otel: Vec<Otel>,
    /// Log records are exported.
    pub logpush: bool,
    /// RSA key, PEM, that exported bodies are encrypted for.
    pub logpush_public_key: Option<String>,
    /// Only providers that retain nothing.
    pub zero_data_retention: bool,
}

/// Most log records of a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimit {
    /// How many.
    pub records: u64,
    /// Whether the oldest goes when one more comes; otherwise the new one is not kept.
    pub delete_oldest: bool,
}

/// Requests in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// How many.
    pub limit: u64,
    /// In how long.
    pub interval: Duration,
    /// How the time is cut.
    pub technique: Technique,
}

/// How a time is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Technique {
    /// At multiples of the interval on the clock.
    #[default]
    Fixed,
    /// The window before counts by what of it is still within the interval.
    Sliding,
}

/// Tries of one target. What is `None` is the daemon's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retry {
    /// Tries in all, 1 to 5.
    pub max_attempts: Option<u32>,
    /// Before the second try.
    pub delay: Option<Duration>,
    /// How the delay grows.
    pub backoff: Option<Backoff>,
}

/// How the delay between tries grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backoff {
    /// Not at all.
    Constant,
    /// By itself each time.
    Linear,
    /// Twofold each time.
    Exponential,
}

/// How long to wait for a provider. What is `None` is the next outer setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// For the whole answer.
    pub request: Option<Duration>,
    /// For its first byte.
    pub first_byte: Option<Duration>,
    /// Between two pieces of a stream.
    pub idle: Option<Duration>,
}

/// A provider and one of its models.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Slug, canonical.
    pub provider: String,
    /// As the provider names it.
    pub model: String,
}

/// A budget.
#[derive(Debug, Clone, PartialEq)]
pub struct SpendRule {
    /// Names it in refusals.
    pub id: String,
    /// US dollars.
    pub limit_usd: f64,
    /// In how long.
    pub window: Duration,
    /// How the time is cut.
    pub technique: Technique,
    /// By key of a request's metadata.
    pub metadata: BTreeMap<String, Scope>,
    /// By model.
    pub model: Option<Scope>,
    /// By provider.
    pub provider: Option<Scope>,
}

/// Which calls share a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// A separate budget for each value.
    Partition,
    /// Only calls with one of these values count.
    Filter(Vec<String>),
}

/// What happens to a text that was found fault with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It passes and is marked.
    Flag,
    /// It is refused.
    Block,
}

/// Which texts are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sides {
    /// What callers send.
    pub request: bool,
    /// What comes back.
    pub response: bool,
}

/// A data-loss policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DlpPolicy {
    /// Names it in findings.
    pub id: String,
    /// What happens to a text with findings.
    pub action: Action,
    /// Which texts are looked at.
    pub sides: Sides,
    /// What is looked for.
    pub profiles: Vec<String>,
}

/// What a guard model judges, by category; categories that are not there are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guardrails {
    /// What callers send.
    pub prompt: BTreeMap<&'static str, Action>,
    /// What comes back.
    pub response: BTreeMap<&'static str, Action>,
}

/// A pattern that texts are searched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Names it in refusals and logs.
    pub name: String,
    /// A regular expression.
    pub pattern: String,
    /// Which texts are looked at.
    pub sides: Sides,
    /// What happens to a text that matches.
    pub action: Action,
}

/// JSON schemas that bodies must follow.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Schemas {
    /// What callers send.
    pub request: Option<Value>,
    /// What comes back.
    pub response: Option<Value>,
}

/// Where spans go.
#[derive(Debug, Clone, PartialEq)]
pub struct Otel {
    /// OTLP over HTTP.
    pub url: String,
    /// Sent with each export.
    pub headers: Vec<(String, Secret<String>)>,
    /// Sent as `Authorization`.
    pub authorization: Option<Secret<String>>,
    /// Protobuf, or else JSON.
    pub protobuf: bool,
    /// The server may be on a private address: the file says so.
    pub allow_private: bool,
}

/// One mistake in the fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which field, as `spend_limits.rules[0].limit`.
    pub key: String,
    /// What was there, short, and never a secret.
    pub value: String,
    /// What is wrong with it and what to do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}: {}", self.key, self.value, self.remedy)
    }
}

/// Shows every secret among the fields to `see`, with a label that stays the same when others come and go.
///
/// # Errors
/// The first of `see`.
pub fn each_secret(
    fields: &mut Map<String, Value>,
    mut see: impl FnMut(&str, &mut String) -> Result<()>,
) -> Result<()> {
    for entry in fields.get_mut("otel").and_then(Value::as_array_mut).into_iter().flatten() {
        let url = entry.get("url").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(Value::String(text)) = entry.get_mut("authorization") {
            see(&format!("otel {url} authorization"), text)?;
        }
        for (name, value) in entry.get_mut("headers").and_then(Value::as_object_mut).into_iter().flatten() {
            if let Value::String(text) = value {
                see(&format!("otel {url} header {name}"), text)?;
            }
        }
    }
    if let Some(Value::String(text)) = fields.get_mut("stripe").and_then(|stripe| stripe.get_mut("authorization")) {
        see("stripe authorization", text)?;
    }
    Ok(())
}

/// Whether a text is a gateway's name, or a custom provider's.
pub fn is_slug(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=64).contains(&text.len()) && text.chars().all(letter) && !text.starts_with('-')
}

/// A web address without credentials, query or fragment.
pub fn is_plain_url(text: &str) -> Option<reqwest::Url> {
    let url = reqwest::Url::parse(text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    plain.then_some(url)
}
