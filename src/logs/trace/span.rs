//! From a record to a span.
//!
//! Names are those of OpenTelemetry's conventions for generative AI and HTTP, those that Cloudflare adds, and `neurond.…` for what
//! nobody else has a name for. What a caller sends as metadata is an attribute of its own name, unless that is taken.

use std::borrow::Cow;

use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::span::{Event, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, SpanFlags, Status};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::base::TraceContext;
use crate::logs::record::{Body, Record};
use crate::task::Task;

/// What callers cannot say by metadata.
const RESERVED: &str = "gen_ai.";
/// Why a call did not end well that nobody failed.
const CALLER_LEFT: &str = "caller_left";

/// Which span it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ids {
    pub context: TraceContext,
    pub span: [u8; 8],
}

impl Ids {
    /// A new span in the trace that the record names, or in a new one.
    pub(super) fn of(record: &Record) -> Self {
        let random = || Uuid::new_v4().into_bytes();
        let fresh = || TraceContext { trace: random(), parent: None, flags: TraceContext::SAMPLED };
        let [a, b, c, d, _, e, _, _, _, f, g, h, ..] = random();
        // Without the bits that say that it is a UUID.
        Self { context: record.trace.unwrap_or_else(fresh), span: [a, b, c, d, e, f, g, h] }
    }
}

/// A call's span.
pub(super) fn span(record: &Record, ids: &Ids) -> Span {
    let start = record.at.0.saturating_mul(1_000_000);
    let after = |us: u64| start.saturating_add(us.saturating_mul(1000));
    let first_byte = record.first_byte_us.map(|us| Event {
        time_unix_nano: after(us),
        name: "first byte".into(),
        ..Default::default()
    });
    let TraceContext { trace, parent, flags } = ids.context;
    let remote = SpanFlags::ContextHasIsRemoteMask as u32 | parent.map_or(0, |_| SpanFlags::ContextIsRemoteMask as u32);
    Span {
        trace_id: trace.to_vec(),
        span_id: ids.span.to_vec(),
        parent_span_id: parent.map(Vec::from).unwrap_or_default(),
        flags: u32::from(flags) | remote,
        name: name(record),
        kind: SpanKind::Client as i32,
        start_time_unix_nano: start,
        end_time_unix_nano: after(record.duration_us),
        attributes: attributes(record),
        events: Vec::from_iter(first_byte),
        status: Some(match error(record) {
            // Success is the reader's to judge, as the conventions want it.
            None => Status::default(),
            Some(why) => Status { code: StatusCode::Error as i32, message: why.into_owned() },
        }),
        ..Default::default()
    }
}

/// `chat gpt-4.1`: what was asked for, of whom.
fn name(record: &Record) -> String {
    let whom = if record.model.is_empty() { &record.provider } else { &record.model };
    let words = [operation(record.task).unwrap_or("call"), whom];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn operation(task: Option<Task>) -> Option<&'static str> {
    match task? {
        Task::TextGeneration => Some("chat"),
        Task::TextEmbeddings => Some("embeddings"),
        _ => None,
    }
}

/// Why it did not end well, in a word; `None`: it did.
fn error(record: &Record) -> Option<Cow<'_, str>> {
    (!record.success).then(|| Cow::Borrowed(record.why.as_deref().unwrap_or(CALLER_LEFT)))
}

fn attributes(record: &Record) -> Vec<KeyValue> {
    let mut all = Attributes::default();
    all.maybe("gen_ai.operation.name", operation(record.task));
    all.some("gen_ai.request.model", &record.model);
    all.some("gen_ai.model.provider", &record.provider);
    all.some("gen_ai.provider.name", &record.provider);
    if let Some(usage) = record.usage {
        all.whole("gen_ai.usage.input_tokens", usage.prompt_tokens.into());
        all.whole("gen_ai.usage.output_tokens", usage.completion_tokens.into());
        all.whole("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens.into());
    }
    all.real("gen_ai.usage.cost", record.cost.usd());
    if !record.zero_retention {
        all.body(["gen_ai.prompt_json", "neurond.prompt_complete"], &record.asked);
        all.body(["gen_ai.completion_json", "neurond.completion_complete"], &record.answered);
    }
    all.whole("http.response.status_code", record.status.into());
    all.some("url.path", &record.path);
    all.maybe("user_agent.original", record.user_agent.as_deref());
    all.maybe("error.type", error(record).as_deref());
    all.text("neurond.account", record.account.as_str());
    all.text("neurond.gateway", &record.gateway);
    all.maybe("neurond.token", record.key.as_ref().map(|key| key.as_str()));
    all.maybe("neurond.log_id", record.id.map(|id| id.to_string()).as_deref());
    all.text("neurond.request_id", &record.request.to_string());
    all.maybe("neurond.event_id", record.event.as_deref());
    all.text("neurond.request_type", &record.request_type);
    all.text("neurond.cache", record.cache.as_str());
    all.whole("neurond.step", record.step.into());
    all.some("neurond.attempts", &record.attempts);
    all.flag("neurond.stored_key", record.stored_key);
    all.flag("neurond.custom_cost", record.custom_cost);
    if record.cache.is_hit() {
        all.real("neurond.saved_cost", record.saved.usd());
    }
    all.texts("neurond.findings", &record.findings);
    all.metadata(record.metadata.as_deref().unwrap_or_default());
    all.done()
}

/// Attributes as they are gathered; each has its name once.
#[derive(Default)]
pub(super) struct Attributes(Vec<KeyValue>);

impl Attributes {
    /// All of them.
    pub(super) fn done(self) -> Vec<KeyValue> {
        self.0
    }

    pub(super) fn text(&mut self, name: &str, text: &str) {
        self.put(name, Any::StringValue(text.to_owned()));
    }

    fn maybe(&mut self, name: &str, text: Option<&str>) {
        if let Some(text) = text {
            self.text(name, text);
        }
    }

    /// Nothing is no value.
    fn some(&mut self, name: &str, text: &str) {
        self.maybe(name, Some(text).filter(|text| !text.is_empty()));
    }

    fn whole(&mut self, name: &str, number: i64) {
        self.put(name, Any::IntValue(number));
    }

    fn real(&mut self, name: &str, number: f64) {
        self.put(name, Any::DoubleValue(number));
    }

    fn flag(&mut self, name: &str, is_so: bool) {
        self.put(name, Any::BoolValue(is_so));
    }

    fn texts(&mut self, name: &str, texts: &[Box<str>]) {
        let value = |text: &str| AnyValue { value: Some(Any::StringValue(text.to_owned())) };
        if !texts.is_empty() {
            self.put(name, Any::ArrayValue(ArrayValue { values: texts.iter().map(|text| value(text)).collect() }));
        }
    }

    /// A body as far as it is kept and is text; where that is not all of it, `complete` says so.
    fn body(&mut self, [name, complete]: [&str; 2], body: &Body) {
        let text = match std::str::from_utf8(&body.kept) {
            Ok(text) => text,
            // A text whose last character was cut.
            Err(error) if error.error_len().is_none() && !body.is_complete() => {
                std::str::from_utf8(&body.kept[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => "",
        };
        if text.is_empty() {
            return;
        }
        self.text(name, text);
        if !body.is_complete() {
            self.flag(complete, false);
        }
    }

    /// A caller's own entries: texts, numbers and flags.
    fn metadata(&mut self, json: &str) {
        let Ok(entries) = serde_json::from_str::<Map<String, Value>>(json) else { return };
        for (name, value) in entries {
            let is_taken = name.starts_with(RESERVED) || self.0.iter().any(|known| known.key == name);
            let value = match value {
                Value::String(text) => Any::StringValue(text),
                Value::Bool(is_so) => Any::BoolValue(is_so),
                Value::Number(number) => match number.as_i64() {
                    Some(whole) => Any::IntValue(whole),
                    None => Any::DoubleValue(number.as_f64().unwrap_or_default()),
                },
                Value::Null | Value::Array(_) | Value::Object(_) => continue,
            };
            if !is_taken && !name.is_empty() {
                self.put(&name, value);
            }
        }
    }

    fn put(&mut self, name: &str, value: Any) {
        let value = Some(AnyValue { value: Some(value) });
        self.0.push(KeyValue { key: name.to_owned(), value, ..Default::default() });
    }
}

#[cfg(test)]
#[path = "span_test.rs"]
pub(super) mod tests;
