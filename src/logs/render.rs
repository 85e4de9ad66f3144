//! Records in the fields of the wire.
//!
//! ```text
//!   Stored ─> item     of a list: all but the bodies
//!          └> detail   that, and the beginnings of the bodies
//!   Page   ─> result_info
//! ```
//!
//! Times are milliseconds, exact as far as JSON's numbers go but for `duration`, which clients read as a whole number (`timings` has the
//! rest). Money is USD, to 1e-10. What a record does not have is `null`.

use serde_json::{Map, Number, Value, json};

use crate::base::{Millis, Neurons};
use crate::logs::query::Query;
use crate::logs::record::{Body, Record};
use crate::logs::store::{Measure, Page, Stored, dlp_action, model_type};

/// Bytes of a body's beginning at most.
const HEAD: usize = 10_000;

/// An entry of a list.
pub fn item(stored: &Stored) -> Value {
    Value::Object(fields(stored))
}

/// One record by itself. Its bodies must have been read.
pub fn detail(stored: &Stored) -> Value {
    let mut fields = fields(stored);
    let record = &stored.record;
    for (name, body) in [("request", &record.asked), ("response", &record.answered)] {
        let (head, is_complete) = head(body);
        fields.insert(format!("{name}_head"), head.into());
        fields.insert(format!("{name}_head_complete"), is_complete.into());
    }
    Value::Object(fields)
}

/// What a list says of itself; `count` and the totals are those of `page`.
pub fn result_info(query: &Query, page: &Page) -> Value {
    let mut info = json!({
        "page": query.page,
        "per_page": query.per_page,
        "count": page.records.len(),
        "total_count": page.total_count,
        "total_pages": page.total_count.div_ceil(query.per_page),
    });
    // Of use to whoever searches: older bodies were not looked at.
    if !page.is_complete {
        info["search_complete"] = false.into();
    }
    let Some(meta) = page.meta_info else { return info };
    let measures = [
        ("cost", meta.cost, cost as fn(u64) -> Value),
        ("duration", meta.duration, duration),
        ("tokens_in", meta.tokens_in, Value::from),
        ("tokens_out", meta.tokens_out, Value::from),
        ("total_tokens", meta.total_tokens, Value::from),
    ];
    for (name, measure, render) in measures {
        let value = |pick: fn(Measure) -> u64| measure.map(pick).map_or(Value::Null, render);
        info[format!("min_{name}")] = value(|measure| measure.min);
        info[format!("max_{name}")] = value(|measure| measure.max);
    }
    info
}

fn fields(Stored { record, feedback, score }: &Stored) -> Map<String, Value> {
    let text = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    let maybe = |text: Option<&str>| text.map_or(Value::Null, Value::from);
    let tokens = |count: fn(&crate::task::Usage) -> u32| record.usage.as_ref().map(count);
    let fields = json!({
        "id": record.id.map(|id| id.to_string()),
        "created_at": moment(record.at),
        "provider": &*record.provider,
        "model": &*record.model,
        "model_type": model_type(record),
        "path": &*record.path,
        "status_code": record.status,
        "success": record.success,
        "cached": record.cache.is_hit(),
        "duration": (record.duration_us + 500) / 1000,
        "tokens_in": tokens(|usage| usage.prompt_tokens),
        "tokens_out": tokens(|usage| usage.completion_tokens),
        "cost": cost(record.cost.micro()),
        "custom_cost": record.custom_cost,
        "step": record.step,
        "request_type": &*record.request_type,
        "request_content_type": maybe(record.request_content_type.as_deref()),
        "response_content_type": maybe(record.response_content_type.as_deref()),
        "request_size": record.asked.size,
        "response_size": record.answered.size,
        "metadata": metadata(record),
        "feedback": feedback,
        "score": score,
        "event_id": maybe(record.event.as_deref()),
        "user_agent": maybe(record.user_agent.as_deref()),
        "authentication": record.authenticated,
        "wholesale": false,
        "byok": record.stored_key,
        "dlp_action": text(dlp_action(record)),
        "timings": {
            "first_byte": record.first_byte_us.map(duration),
            "total": duration(record.duration_us),
        },
        "usage_metadata": record.usage,
        "cache_status": record.cache.as_str(),
        "saved_cost": cost(record.saved.micro()),
        "attempts": text(&record.attempts),
        "error": record.why.as_deref(),
        "findings": record.findings,
        "request_id": record.request.to_string(),
        "key": record.key.as_ref().map(|key| key.as_str()),
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn metadata(record: &Record) -> Value {
    record.metadata.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// A moment as RFC 3339 has it, in UTC.
pub fn moment(at: Millis) -> String {
    let at = i64::try_from(at.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map(|at| format!("{at:.3}")).unwrap_or_default()
}

/// Milliseconds of microseconds.
fn duration(us: u64) -> Value {
    number(us as f64 / 1e3)
}

/// USD of micro-neurons.
fn cost(micro: u64) -> Value {
    number(Neurons::from_micro(micro).rounded_usd())
}

/// An integer where it is one.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value < 9e15 {
        return Value::from(value as u64);
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// The beginning of a body as text, and whether that is all of it. What is no text has none.
fn head(body: &Body) -> (&str, bool) {
    let cut = &body.kept[..body.kept.len().min(HEAD)];
    let text = match std::str::from_utf8(cut) {
        Ok(text) => text,
        // A character that the cut fell into is left out.
        Err(error) if error.error_len().is_none() && cut.len() < body.size as usize => {
            std::str::from_utf8(&cut[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => "",
    };
    (text, body.is_complete() && text.len() == body.kept.len())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::logs::store::tests::record;

    fn stored() -> Stored {
        let mut record = record(1_700_000_000_123, 1);
        record.metadata = Some(r#"{"user":"ann","paid":true,"n":1.50}"#.into());
        Stored { record, feedback: Some(-1), score: None }
    }

    #[test]
    fn a_record_has_every_field_of_the_wire() {
        let item = item(&stored());
        let wanted = json!({
            "created_at": "2023-11-14T22:13:20.123Z", "provider": "openai", "model": "model-1", "model_type": "text-generation",
            "path": "v1/chat/completions", "status_code": 200, "success": true, "cached": false, "duration": 12,
            "tokens_in": 11, "tokens_out": 5, "cost": 0.000011, "custom_cost": false, "step": 0, "request_type": "http",
            "request_content_type": "application/json", "response_content_type": "application/json",
            "metadata": { "user": "ann", "paid": true, "n": 1.5 }, "feedback": -1, "score": null, "event_id": "event-1",
            "authentication": true, "wholesale": false, "byok": false, "timings": { "first_byte": 3, "total": 12.345 },
        });
        for (name, value) in wanted.as_object().unwrap() {
            assert_eq!(item[name], *value, "{name}");
        }
        assert_eq!(item["id"].as_str().unwrap().len(), 26);
        assert!(item.get("request_head").is_none(), "bodies are of the detail");
    }

    #[test]
    fn costs_are_written_to_1e_10_and_durations_exactly() {
        for (micro, text) in [
            (0, "0"),
            (1, "0"),
            (9091, "1e-7"),
            (22_727_272_727, "0.25"),
            (1_000_000, "0.000011"),
            (1_000_000_000_000, "11"),
            (123_456_789, "0.0013580247"),
        ] {
            assert_eq!(cost(micro).to_string(), text);
        }
        for (us, text) in [(0, "0"), (1, "0.001"), (12_000, "12"), (12_345, "12.345"), (3_600_000_001, "3600000.001")] {
            assert_eq!(duration(us).to_string(), text);
        }
    }

    #[test]
    fn a_quarter_of_a_dollar_reads_so_wherever_money_is_told() {
        let quarter = Neurons::from_usd(0.25);
        let mut stored = stored();
        (stored.record.cost, stored.record.saved) = (quarter, quarter);
        let item = item(&stored);
        assert_eq!((&item["cost"], &item["saved_cost"]), (&json!(0.25), &json!(0.25)));
        let cost = Some(Measure { count: 1, min: quarter.micro(), max: quarter.micro(), sum: quarter.micro().into() });
        let meta_info = Some(crate::logs::store::MetaInfo { cost, ..Default::default() });
        let page = Page { records: vec![stored], total_count: 1, meta_info, is_complete: true };
        let info = result_info(&Query::default(), &page);
        assert_eq!((&info["min_cost"], &info["max_cost"]), (&json!(0.25), &json!(0.25)));
    }

    #[test]
    fn a_head_is_the_beginning_of_a_text_and_says_whether_it_is_all() {
        let long = "ä".repeat(HEAD);
        let rows: [(&[u8], u64, &str, bool); 6] = [
            (b"{}", 2, "{}", true),
            (b"", 0, "", true),
            (b"{\"a\"", 9, "{\"a\"", false),
            ("aä".as_bytes().split_at(2).0, 9, "a", false),
            (b"\xff\xd8\xff", 3, "", false),
            (long.as_bytes(), long.len() as u64, &long[..HEAD], false),
        ];
        for (kept, size, text, is_complete) in rows {
            let body = Body { kept: Bytes::copy_from_slice(kept), size };
            assert_eq!(head(&body), (text, is_complete), "{kept:?}");
        }
        let mut stored = stored();
        stored.record.asked = Body { kept: "hello".into(), size: 5 };
        let detail = detail(&stored);
        assert_eq!((&detail["request_head"], &detail["request_head_complete"]), (&json!("hello"), &json!(true)));
        assert_eq!(detail["request_size"], 5);
    }

    #[test]
    fn a_list_says_which_page_it_is_and_its_least_and_most() {
        let measure = |min, max| Some(Measure { count: 1, min, max, sum: 0 });
        let meta_info = Some(crate::logs::store::MetaInfo {
            cost: measure(1_000_000, 2_000_000),
            duration: measure(1_500, 2_000),
            tokens_in: measure(1, 2),
            tokens_out: None,
            total_tokens: measure(3, 4),
        });
        let page = Page { records: vec![stored()], total_count: 101, meta_info, is_complete: true };
        let query = Query { page: 6, per_page: 20, ..Query::default() };
        let wanted = json!({
            "page": 6, "per_page": 20, "count": 1, "total_count": 101, "total_pages": 6,
            "min_cost": 0.000011, "max_cost": 0.000022, "min_duration": 1.5, "max_duration": 2, "min_tokens_in": 1, "max_tokens_in": 2,
            "min_tokens_out": null, "max_tokens_out": null, "min_total_tokens": 3, "max_total_tokens": 4,
        });
        assert_eq!(result_info(&query, &page), wanted);
    }
}
