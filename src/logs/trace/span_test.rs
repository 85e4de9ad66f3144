use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::base::{AccountId, KeyId, LogId, Millis, Neurons, RequestId, span_id, trace_id};
use crate::logs::record::CacheUse;
use crate::task::Usage;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

pub(in crate::logs::trace) fn body(text: impl AsRef<[u8]>) -> Body {
    let kept = bytes::Bytes::copy_from_slice(text.as_ref());
    Body { size: kept.len() as u64, kept }
}

/// A call in which everything is known.
pub(in crate::logs::trace) fn sample() -> Record {
    Record {
        id: LogId::parse("01HF7YAT00ABCDEFGHJKMNPQRS"),
        request: RequestId::from_number(7),
        at: Millis(1_750_000_000_123),
        account: AccountId::new("acme"),
        key: Some(KeyId::new("ada")),
        gateway: "g".into(),
        provider: "openai".into(),
        model: "gpt-4.1".into(),
        task: Some(Task::TextGeneration),
        path: "v1/chat/completions".into(),
        status: 200,
        success: true,
        cache: CacheUse::Miss,
        duration_us: 1_234_567,
        first_byte_us: Some(250_001),
        usage: Some(Usage { prompt_tokens: 10, cached_tokens: 4, completion_tokens: 20, ..Usage::default() }),
        cost: Neurons::from_micro(1_500_000),
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 1,
        request_type: "http".into(),
        request_content_type: Some("application/json".into()),
        response_content_type: Some("application/json".into()),
        metadata: Some(r#"{"user":"a \"b\"","n":1,"share":0.5,"paid":true}"#.into()),
        trace: Some(TraceContext { trace: trace_id(TRACE).unwrap(), parent: span_id(PARENT), flags: 1 }),
        zero_retention: false,
        event: Some("ev-1".into()),
        user_agent: Some("curl/8".into()),
        authenticated: true,
        stored_key: true,
        attempts: "openai=200".into(),
        why: None,
        findings: vec!["pii".into()],
        asked: body(r#"{"q":"hi"}"#),
        answered: body(r#"{"a":"ho"}"#),
    }
}

fn made(record: &Record) -> Span {
    span(record, &Ids { context: record.trace.unwrap(), span: [1; 8] })
}

/// Attributes as plain JSON; a name that is there twice is a mistake.
fn said(record: &Record) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for KeyValue { key, value, .. } in made(record).attributes {
        let plain = |value: AnyValue| match value.value.unwrap() {
            Any::StringValue(text) => json!(text),
            Any::IntValue(number) => json!(number),
            Any::DoubleValue(number) => json!(number),
            Any::BoolValue(is_so) => json!(is_so),
            other => panic!("{other:?}"),
        };
        let value = match value.unwrap() {
            AnyValue { value: Some(Any::ArrayValue(list)) } => list.values.into_iter().map(plain).collect(),
            one => plain(one),
        };
        assert_eq!(found.insert(key.clone(), value), None, "{key} twice");
    }
    found
}

#[test]
fn a_span_says_everything_that_the_record_does() {
    let expected = json!({
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4.1",
        "gen_ai.model.provider": "openai",
        "gen_ai.provider.name": "openai",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.cost": 0.0000165,
        "gen_ai.prompt_json": "{\"q\":\"hi\"}",
        "gen_ai.completion_json": "{\"a\":\"ho\"}",
        "http.response.status_code": 200,
        "url.path": "v1/chat/completions",
        "user_agent.original": "curl/8",
        "neurond.account": "acme",
        "neurond.gateway": "g",
        "neurond.token": "ada",
        "neurond.log_id": "01HF7YAT00ABCDEFGHJKMNPQRS",
        "neurond.request_id": "00000000-0000-0000-0000-000000000007",
        "neurond.event_id": "ev-1",
        "neurond.request_type": "http",
        "neurond.cache": "miss",
        "neurond.step": 1,
        "neurond.attempts": "openai=200",
        "neurond.stored_key": true,
        "neurond.custom_cost": false,
        "neurond.findings": ["pii"],
        "user": "a \"b\"",
        "n": 1,
        "share": 0.5,
        "paid": true,
    });
    assert_eq!(json!(said(&sample())), expected);
    let span = made(&sample());
    assert_eq!((span.name.as_str(), span.kind), ("chat gpt-4.1", SpanKind::Client as i32));
    assert_eq!(span.start_time_unix_nano, 1_750_000_000_123_000_000);
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 1_234_567_000);
    let events: Vec<_> = span.events.iter().map(|event| (event.name.as_str(), event.time_unix_nano)).collect();
    assert_eq!(events, [("first byte", 1_750_000_000_373_001_000)]);
    assert_eq!(span.status, Some(Status::default()), "neither good nor bad");
}

#[test]
fn a_span_is_in_its_callers_trace_and_begins_one_where_there_is_none() {
    let joined = span(&sample(), &Ids::of(&sample()));
    assert_eq!(joined.trace_id, trace_id(TRACE).unwrap());
    assert_eq!((joined.parent_span_id, joined.flags), (span_id(PARENT).unwrap().to_vec(), 0x301));
    assert!(joined.span_id.len() == 8 && joined.span_id != span_id(PARENT).unwrap());

    let first = TraceContext { parent: None, flags: 1, ..sample().trace.unwrap() };
    let first = Record { trace: Some(first), ..sample() };
    let first = span(&first, &Ids::of(&first));
    assert_eq!((&first.trace_id[..], first.parent_span_id.len(), first.flags), (&joined.trace_id[..], 0, 0x101));

    let alone = Record { trace: None, ..sample() };
    let [one, two] = [(); 2].map(|()| span(&alone, &Ids::of(&alone)));
    assert_eq!((one.trace_id.len(), one.parent_span_id.len(), one.flags), (16, 0, 0x101));
    assert!(one.trace_id != two.trace_id && one.span_id != two.span_id && one.span_id != joined.span_id);
}

#[test]
fn how_a_call_ended_is_its_status() {
    let check = |success: bool, status: u16, why: Option<&'static str>, expected: Option<&str>| {
        let record = Record { success, status, why: why.map(Into::into), ..sample() };
        let error = Status { code: StatusCode::Error as i32, message: expected.unwrap_or_default().into() };
        assert_eq!(made(&record).status, Some(expected.map_or(Status::default(), |_| error)), "{status} {why:?}");
        let said = said(&record);
        assert_eq!(said["http.response.status_code"], json!(status));
        assert_eq!(said.get("error.type"), expected.map(|why| json!(why)).as_ref());
    };
    check(true, 200, None, None);
    check(false, 500, Some("upstream_status"), Some("upstream_status"));
    check(false, 429, Some("rate_limited"), Some("rate_limited"));
    check(false, 499, None, Some("caller_left"));
}

#[test]
fn metadata_takes_no_name_that_is_taken() {
    let metadata =
        r#"{"gen_ai.request.model":"x","gen_ai.mine":1,"http.response.status_code":7,"":"x","neurond":"mine"}"#;
    let said = said(&Record { metadata: Some(metadata.into()), ..sample() });
    assert_eq!((&said["gen_ai.request.model"], &said["http.response.status_code"]), (&json!("gpt-4.1"), &json!(200)));
    assert_eq!((said.get("gen_ai.mine"), said.get("")), (None, None));
    assert_eq!(said["neurond"], json!("mine"));
    for none in [None, Some("no json"), Some("[1]")] {
        let metadata = none.map(Into::into);
        let found = self::said(&Record { metadata, ..sample() });
        assert_eq!(found.keys().filter(|name| !name.contains('.')).count(), 0, "{found:?}");
    }
}

#[test]
fn bodies_go_as_far_as_they_are_kept_and_are_text() {
    let check = |kept: &[u8], size: u64, expected: Option<&str>, is_cut: bool| {
        let asked = Body { kept: kept.to_vec().into(), size };
        let said = said(&Record { asked, ..sample() });
        assert_eq!(said.get("gen_ai.prompt_json"), expected.map(|text| json!(text)).as_ref(), "{kept:?}");
        assert_eq!(said.contains_key("neurond.prompt_complete"), is_cut, "{kept:?}");
    };
    check(b"all of it", 9, Some("all of it"), false);
    check(b"the beg", 90, Some("the beg"), true);
    check(&"gr\u{fc}n".as_bytes()[..3], 5, Some("gr"), true);
    check(b"\x89PNG\xff\xfe", 6, None, false);
    check(b"", 90, None, false);
    let said = said(&Record { zero_retention: true, ..sample() });
    assert!(said.keys().all(|name| !name.ends_with("_json")), "{said:?}");
    assert_eq!(said["gen_ai.usage.input_tokens"], json!(10));
}

#[test]
fn what_is_not_known_is_not_said() {
    let record = Record {
        id: None,
        key: None,
        provider: "".into(),
        model: "".into(),
        task: None,
        usage: None,
        event: None,
        user_agent: None,
        metadata: None,
        first_byte_us: None,
        findings: Vec::new(),
        cache: CacheUse::Hit,
        saved: Neurons::from_micro(1_500_000),
        asked: Body::default(),
        answered: Body::default(),
        ..sample()
    };
    let expected = [
        "gen_ai.usage.cost",
        "http.response.status_code",
        "neurond.account",
        "neurond.attempts",
        "neurond.cache",
        "neurond.custom_cost",
        "neurond.gateway",
        "neurond.request_id",
        "neurond.request_type",
        "neurond.saved_cost",
        "neurond.step",
        "neurond.stored_key",
        "url.path",
    ];
    assert_eq!(said(&record).into_keys().collect::<Vec<_>>(), expected);
    assert_eq!((made(&record).name.as_str(), made(&record).events.len()), ("call", 0));
}
