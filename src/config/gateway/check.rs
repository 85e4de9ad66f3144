//! From the fields that say what a gateway does to what it does: the same for the file and for the management API.
//!
//!     fields (JSON object, names of the wire) --check--> Settings, or every mistake at once
//!
//! Fields that are missing have their defaults; fields nobody knows are the caller's business at the top and mistakes inside nested
//! objects, since a guard that is misspelt must not be silently off. Compiles nothing: patterns and schemas are `guard`'s to judge.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use http::HeaderName;
use serde_json::{Map, Value};

use super::settings::{
    Action, Backoff, CATEGORIES, DlpPolicy, Guardrails, LogLimit, Otel, Problem, RateLimit, Retry, Rule, Schemas,
    Scope, Settings, Sides, SpendRule, Target, Technique, Timeouts, is_plain_url, is_slug,
};
use crate::base::{Result, Secret};

/// A month: the longest an answer is kept.
const MOST_CACHE_S: u64 = 2_678_400;
const MOST_SPEND_RULES: usize = 20;
const MOST_FALLBACKS: usize = 16;
const MOST_RULES: usize = 100;
const MOST_OTEL: usize = 8;
/// A day is longer than any answer.
const MOST_TIMEOUT_MS: u64 = 86_400_000;

impl Settings {
    /// Reads fields, secrets open.
    ///
    /// # Errors
    /// All mistakes.
    pub fn check(fields: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut read = Reader { fields, at: String::new(), problems: &mut problems };
        let settings = settings(&mut read);
        if problems.is_empty() { Ok(settings) } else { Err(problems) }
    }
}

fn settings(read: &mut Reader) -> Settings {
    for key in ["byok_only", "log_classification"] {
        read.flag(key, false);
    }
    read.text("store_id", 0..=1024);
    read.word("workers_ai_billing_mode", &[("postpaid", ()), ("unified", ())]);
    stripe(read);
    let interval = read.number("rate_limiting_interval", 0..=MOST_CACHE_S * 12, "seconds, 0 for no limit");
    let limit = read.number("rate_limiting_limit", 0..=1_000_000_000, "requests, 0 for no limit");
    let technique = read.word("rate_limiting_technique", &TECHNIQUES).unwrap_or_default();
    let rate_limit = match (limit, interval) {
        (Some(limit @ 1..), Some(seconds @ 1..)) => {
            Some(RateLimit { limit, interval: Duration::from_secs(seconds), technique })
        }
        _ => None,
    };
    let strategy = read.word("log_management_strategy", &[("STOP_INSERTING", false), ("DELETE_OLDEST", true)]);
    let records = read.number("log_management", 10_000..=10_000_000, "records");
    let retry = Retry {
        max_attempts: read.number("retry_max_attempts", 1..=5, "tries in all").map(|tries| tries as u32),
        delay: read.number("retry_delay", 0..=5000, "milliseconds").map(Duration::from_millis),
        backoff: read.word(
            "retry_backoff",
            &[("constant", Backoff::Constant), ("linear", Backoff::Linear), ("exponential", Backoff::Exponential)],
        ),
    };
    let cache_ttl = read.number("cache_ttl", 0..=MOST_CACHE_S, "seconds, 0 for no cache");
    Settings {
        authentication: read.flag("authentication", true),
        cache_ttl: cache_ttl.filter(|&seconds| seconds > 0).map(Duration::from_secs),
        cache_invalidate_on_update: read.flag("cache_invalidate_on_update", false),
        cache_per_account: read.flag("cache_per_account", true),
        collect_logs: read.flag("collect_logs", true),
        log_limit: records.map(|records| LogLimit { records, delete_oldest: strategy.unwrap_or(true) }),
        rate_limit,
        retry,
        timeouts: timeouts(read),
        fallback: fallback(read),
        spend_limits: spend_limits(read),
        dlp: dlp(read),
        guardrails: guardrails(read),
        rules: rules(read),
        schemas: schemas(read),
        otel: otel(read),
        logpush: read.flag("logpush", false),
        logpush_public_key: read.text("logpush_public_key", 16..=1024).map(str::to_owned),
        zero_data_retention: read.flag("zdr", false),
    }
}

const TECHNIQUES: [(&str, Technique); 2] = [("fixed", Technique::Fixed), ("sliding", Technique::Sliding)];
const ACTIONS: [(&str, Action); 2] = [("FLAG", Action::Flag), ("BLOCK", Action::Block)];

fn timeouts(read: &mut Reader) -> Timeouts {
    let mut timeout = |key| read.number(key, 1..=MOST_TIMEOUT_MS, "milliseconds").map(Duration::from_millis);
    Timeouts {
        request: timeout("request_timeout_ms"),
        first_byte: timeout("first_byte_timeout_ms"),
        idle: timeout("idle_timeout_ms"),
    }
}

fn fallback(read: &mut Reader) -> Vec<Target> {
    let mut targets = Vec::new();
    for (index, value) in read.list("fallback", MOST_FALLBACKS).iter().enumerate() {
        let target = value.as_str().and_then(target);
        if target.is_none() {
            let remedy = "is no target; name a provider and one of its models, as openai/gpt-4.1 or workers-ai/@cf/…";
            read.wrong(&format!("fallback[{index}]"), value, remedy);
        }
        targets.extend(target);
    }
    targets
}

/// `provider/model`, or a model of ours alone. A route is none: it has its own fallbacks, and might lead back here.
fn target(text: &str) -> Option<Target> {
    let (provider, model) = match text.split_once('/')? {
        (at, _) if at.starts_with('@') => ("workers-ai", text),
        pair => pair,
    };
    let good = is_slug(provider) && provider != "dynamic" && !model.is_empty() && !model.contains(char::is_whitespace);
    good.then(|| Target { provider: super::canonical(provider).to_owned(), model: model.to_owned() })
}

fn spend_limits(read: &mut Reader) -> Vec<SpendRule> {
    let mut found: Vec<SpendRule> = Vec::new();
    let Some(mut limits) = read.object("spend_limits") else { return found };
    limits.only(&["enabled", "rules"]);
    let all = limits.flag("enabled", true);
    for (index, value) in limits.list("rules", MOST_SPEND_RULES).iter().enumerate() {
        let Some(mut rule) = limits.element("rules", index, value) else { continue };
        rule.only(&["id", "enabled", "limit", "limitType", "window", "technique", "metadata", "model", "provider"]);
        let id = rule.text("id", 1..=64).map_or_else(|| format!("rule-{}", index + 1), str::to_owned);
        if found.iter().any(|other| other.id == id) {
            rule.wrong("id", &Value::from(id.as_str()), "is there twice; give each rule its own");
        }
        if rule.word("limitType", &[("cost", ())]).is_none() && !rule.fields.contains_key("limitType") {
            rule.wrong("limitType", &Value::Null, "is missing; it is \"cost\"");
        }
        let limit = rule.fields.get("limit").and_then(Value::as_f64).filter(|limit| limit.is_finite() && *limit >= 0.0);
        if limit.is_none() {
            let value = rule.fields.get("limit").cloned().unwrap_or_default();
            rule.wrong("limit", &value, "is no amount of money; give US dollars, 0 or more");
        }
        let window = rule.number("window", 1..=MOST_CACHE_S * 12, "seconds");
        if window.is_none() && !rule.fields.contains_key("window") {
            rule.wrong("window", &Value::Null, "is missing; give seconds");
        }
        let technique = rule.word("technique", &TECHNIQUES).unwrap_or_default();
        let mut metadata = BTreeMap::new();
        if let Some(mut keys) = rule.object("metadata") {
            for key in keys.fields.keys() {
                metadata.extend(scope(&mut keys, key).map(|scope| (key.clone(), scope)));
            }
        }
        let (model, provider) = (scope(&mut rule, "model"), scope(&mut rule, "provider"));
        if all && rule.flag("enabled", true) {
            let (limit_usd, window) = (limit.unwrap_or_default(), Duration::from_secs(window.unwrap_or(1)));
            found.push(SpendRule { id, limit_usd, window, technique, metadata, model, provider });
        }
    }
    found
}

fn scope(read: &mut Reader, key: &str) -> Option<Scope> {
    let mut scope = read.object(key)?;
    scope.only(&["mode", "values"]);
    let Some(is_filter) = scope.word("mode", &[("partition", false), ("filter", true)]) else {
        if !scope.fields.contains_key("mode") {
            scope.wrong("mode", &Value::Null, "is missing; it is \"partition\" or \"filter\"");
        }
        return None;
    };
    if !is_filter {
        return Some(Scope::Partition);
    }
    let values = scope.words("values", 100);
    if values.is_empty() {
        scope.wrong("values", &Value::Null, "is empty, so no call would ever count; name the values that do");
    }
    Some(Scope::Filter(values))
}

fn dlp(read: &mut Reader) -> Vec<DlpPolicy> {
    let Some(mut dlp) = read.object("dlp") else { return Vec::new() };
    dlp.only(&["enabled", "action", "profiles", "policies"]);
    let all = dlp.flag("enabled", true);
    if !dlp.fields.contains_key("policies") {
        let action = dlp.needed("action", &ACTIONS);
        let sides = Sides { request: true, response: true };
        let policy = DlpPolicy {
            id: "default".into(),
            action: action.unwrap_or(Action::Block),
            sides,
            profiles: dlp.words("profiles", 100),
        };
        return if all { vec![policy] } else { Vec::new() };
    }
    let mut found: Vec<DlpPolicy> = Vec::new();
    for (index, value) in dlp.list("policies", 100).iter().enumerate() {
        let Some(mut policy) = dlp.element("policies", index, value) else { continue };
        policy.only(&["id", "enabled", "action", "check", "profiles"]);
        let id = policy.text("id", 1..=64).map_or_else(|| format!("policy-{}", index + 1), str::to_owned);
        if found.iter().any(|other| other.id == id) {
            policy.wrong("id", &Value::from(id.as_str()), "is there twice; give each policy its own");
        }
        let action = policy.needed("action", &ACTIONS);
        let mut sides = Sides { request: false, response: false };
        for check in policy.words("check", 2) {
            match check.as_str() {
                "REQUEST" => sides.request = true,
                "RESPONSE" => sides.response = true,
                other => policy.wrong("check", &Value::from(other), "is neither \"REQUEST\" nor \"RESPONSE\""),
            }
        }
        let profiles = policy.words("profiles", 100);
        if all && policy.flag("enabled", true) {
            found.push(DlpPolicy { id, action: action.unwrap_or(Action::Block), sides, profiles });
        }
    }
    found
}

fn guardrails(read: &mut Reader) -> Guardrails {
    let Some(mut both) = read.object("guardrails") else { return Guardrails::default() };
    both.only(&["prompt", "response"]);
    let mut side = |key| {
        let Some(mut categories) = both.object(key) else { return BTreeMap::new() };
        categories.only(&CATEGORIES);
        CATEGORIES.iter().filter_map(|name| Some((*name, categories.word(name, &ACTIONS)?))).collect()
    };
    Guardrails { prompt: side("prompt"), response: side("response") }
}

fn rules(read: &mut Reader) -> Vec<Rule> {
    let mut found: Vec<Rule> = Vec::new();
    for (index, value) in read.list("rules", MOST_RULES).iter().enumerate() {
        let Some(mut rule) = read.element("rules", index, value) else { continue };
        rule.only(&["name", "pattern", "on", "action"]);
        let name = rule.text("name", 1..=64).map_or_else(|| format!("rule-{}", index + 1), str::to_owned);
        if found.iter().any(|other| other.name == name) {
            rule.wrong("name", &Value::from(name.as_str()), "is there twice; give each rule its own");
        }
        let pattern = rule.text("pattern", 1..=4096).unwrap_or_default().to_owned();
        if !rule.fields.contains_key("pattern") {
            rule.wrong("pattern", &Value::Null, "is missing; give a regular expression");
        }
        let sides = |request, response| Sides { request, response };
        let on = [("request", sides(true, false)), ("response", sides(false, true)), ("both", sides(true, true))];
        let sides = rule.word("on", &on).unwrap_or(on[2].1);
        let action = rule.word("action", &[("block", Action::Block), ("flag", Action::Flag)]);
        found.push(Rule { name, pattern, sides, action: action.unwrap_or(Action::Block) });
    }
    found
}

fn schemas(read: &mut Reader) -> Schemas {
    let Some(mut both) = read.object("schemas") else { return Schemas::default() };
    both.only(&["request", "response"]);
    let mut side = |key| {
        let schema = both.fields.get(key).filter(|schema| !schema.is_null()).cloned();
        if let Some(other) = schema.as_ref().filter(|schema| !schema.is_object() && !schema.is_boolean()) {
            both.wrong(key, other, "is no JSON schema; give an object");
        }
        schema
    };
    Schemas { request: side("request"), response: side("response") }
}

fn otel(read: &mut Reader) -> Vec<Otel> {
    let mut found: Vec<Otel> = Vec::new();
    for (index, value) in read.list("otel", MOST_OTEL).iter().enumerate() {
        let Some(mut entry) = read.element("otel", index, value) else { continue };
        entry.only(&["url", "headers", "authorization", "content_type"]);
        let url = entry.text("url", 1..=2048).unwrap_or_default().to_owned();
        // Credentials in it are a mistake, and not to be shown.
        let shown = Value::from(if url.contains('@') { "(hidden)" } else { &url });
        if is_plain_url(&url).is_none() {
            let remedy = "is no address without credentials and query; give one such as https://otel.example/v1/traces";
            entry.wrong("url", &shown, remedy);
        }
        if found.iter().any(|other| other.url == url) {
            entry.wrong("url", &shown, "is there twice; keep one of them");
        }
        let mut headers = Vec::new();
        if let Some(mut names) = entry.object("headers") {
            for name in names.fields.keys() {
                if HeaderName::try_from(name).is_err() {
                    names.wrong(name, &Value::from("(hidden)"), "is no name of a header; give letters, digits and -");
                }
                headers.extend(names.secret(name).map(|value| (name.clone(), value)));
            }
        }
        let protobuf = entry.word("content_type", &[("json", false), ("protobuf", true)]).unwrap_or(false);
        let authorization = entry.secret("authorization");
        found.push(Otel { url, headers, authorization, protobuf, allow_private: false });
    }
    found
}

/// Kept and shown again; nothing here bills by it.
fn stripe(read: &mut Reader) {
    let Some(mut stripe) = read.object("stripe") else { return };
    stripe.only(&["authorization", "usage_events"]);
    stripe.secret("authorization");
    stripe.list("usage_events", 100);
}

/// An object's fields, and where mistakes in them go.
struct Reader<'a> {
    fields: &'a Map<String, Value>,
    /// What its keys are part of, with a dot behind.
    at: String,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn wrong(&mut self, key: &str, value: &Value, remedy: &str) {
        let mut shown = value.to_string();
        if let Some((cut, _)) = shown.char_indices().nth(80) {
            shown.truncate(cut);
            shown.push('…');
        }
        self.problems.push(Problem { key: format!("{}{key}", self.at), value: shown, remedy: remedy.to_owned() });
    }

    /// What is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        let Some(value) = self.get(key) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.wrong(key, value, "is neither true nor false");
            default
        })
    }

    fn number(&mut self, key: &str, range: RangeInclusive<u64>, unit: &str) -> Option<u64> {
        let value = self.get(key)?;
        // Some clients write whole numbers with a point.
        let whole = value.as_u64().or_else(|| {
            let number = value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..9e15).contains(number))?;
            Some(number as u64)
        });
        let number = whole.filter(|number| range.contains(number));
        if number.is_none() {
            let (least, most) = range.into_inner();
            self.wrong(key, value, &format!("is not from {least} to {most} ({unit})"));
        }
        number
    }

    fn word<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> Option<T> {
        let value = self.get(key)?;
        let found = value.as_str().and_then(|text| words.iter().find(|(word, _)| *word == text));
        if found.is_none() {
            let all: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            self.wrong(key, value, &format!("is not {}", all.join(" or ")));
        }
        found.map(|(_, meaning)| *meaning)
    }

    /// A word that must be there.
    fn needed<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> Option<T> {
        if self.get(key).is_none() {
            let all: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            self.wrong(key, &Value::Null, &format!("is missing; it is {}", all.join(" or ")));
        }
        self.word(key, words)
    }

    fn text(&mut self, key: &str, lengths: RangeInclusive<usize>) -> Option<&'a str> {
        let value = self.get(key)?;
        let text = value.as_str().filter(|text| lengths.contains(&text.chars().count()));
        if text.is_none() {
            let (least, most) = lengths.into_inner();
            self.wrong(key, value, &format!("is not a text of {least} to {most} characters"));
        }
        text
    }

    /// A text that is never shown.
    fn secret(&mut self, key: &str) -> Option<Secret<String>> {
        let value = self.get(key)?;
        let text = value.as_str().filter(|text| text.len() <= 8192 && !text.chars().any(char::is_control));
        if text.is_none() {
            self.wrong(key, &Value::from("(hidden)"), "is not a text of at most 8192 characters on one line");
        }
        text.map(|text| Secret::new(text.to_owned()))
    }

    fn list(&mut self, key: &str, most: usize) -> &'a [Value] {
        let Some(value) = self.get(key) else { return &[] };
        match value.as_array() {
            Some(list) if list.len() <= most => list,
            Some(list) => {
                self.wrong(
                    key,
                    &Value::from(format!("{} entries", list.len())),
                    &format!("is more than {most} entries"),
                );
                &[]
            }
            None => {
                self.wrong(key, value, "is not a list");
                &[]
            }
        }
    }

    fn words(&mut self, key: &str, most: usize) -> Vec<String> {
        let mut words = Vec::new();
        for value in self.list(key, most) {
            match value.as_str() {
                Some(word) => words.push(word.to_owned()),
                None => self.wrong(key, value, "is not a text"),
            }
        }
        words
    }

    fn object(&mut self, key: &str) -> Option<Reader<'_>> {
        let value = self.get(key)?;
        let Some(fields) = value.as_object() else {
            self.wrong(key, &Value::from("(something else)"), "is not an object");
            return None;
        };
        Some(Reader { fields, at: format!("{}{key}.", self.at), problems: self.problems })
    }

    fn element(&mut self, key: &str, index: usize, value: &'a Value) -> Option<Reader<'_>> {
        let key = format!("{key}[{index}]");
        let Some(fields) = value.as_object() else {
            self.wrong(&key, &Value::from("(something else)"), "is not an object");
            return None;
        };
        Some(Reader { fields, at: format!("{}{key}.", self.at), problems: self.problems })
    }

    fn only(&mut self, known: &[&str]) {
        for (key, value) in self.fields {
            if !known.contains(&key.as_str()) {
                // It may be a secret under a misspelt name.
                let hidden = Value::from("(hidden)");
                let shown = if value.is_boolean() || value.is_number() { value } else { &hidden };
                self.wrong(key, shown, &format!("is not known here; known are {}", known.join(", ")));
            }
        }
    }
}
