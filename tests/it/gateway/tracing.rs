//! Spans of calls: what receivers get, whom nobody told, and what a collector and the protocol's own classes make of them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use reqwest::Method;
use serde_json::{Value, json};

use super::shipping::{Behaviour, Collector};
use super::{Rig, question, streamed};
use crate::harness::Answer;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// One entry of `otel` in the file.
fn entry(address: SocketAddr, more: &str) -> String {
    format!("{{ url = \"http://{address}/v1/traces\", allow_private = true{more} }}")
}

/// A rig whose gateway `g` sends spans.
fn traced(entries: &[String], more: &str) -> Rig {
    // The text goes on within the gateway's block.
    Rig::with(&format!("otel = [{}]\n{more}", entries.join(", ")))
}

/// All spans that a collector has taken, each with the head of its request.
fn taken(collector: &Collector) -> Vec<(String, Span)> {
    let mut spans = Vec::new();
    for (head, body) in collector.seen.lock().iter() {
        let body = if head.contains("content-encoding: gzip") {
            let mut plain = Vec::new();
            GzDecoder::new(&body[..]).read_to_end(&mut plain).unwrap();
            plain
        } else {
            body.clone()
        };
        let request: ExportTraceServiceRequest = match head.contains("content-type: application/json") {
            true => serde_json::from_slice(&body).unwrap(),
            false => ExportTraceServiceRequest::decode(&body[..]).unwrap(),
        };
        let scopes = request.resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        spans.extend(scopes.flat_map(|scope| scope.spans).map(|span| (head.clone(), span)));
    }
    spans
}

async fn spans(rig: &Rig, collector: &Collector, count: usize) -> Vec<Span> {
    rig.daemon.eventually("the spans arrive", |_| taken(collector).len() >= count).await;
    let taken = taken(collector);
    assert_eq!(taken.len(), count, "{taken:?}");
    taken.into_iter().map(|(_, span)| span).collect()
}

/// A span's attributes by name, as text.
fn said(span: &Span) -> BTreeMap<&str, String> {
    let text = |value: &Any| match value {
        Any::StringValue(text) => text.clone(),
        Any::IntValue(number) => number.to_string(),
        Any::DoubleValue(number) => number.to_string(),
        Any::BoolValue(is_so) => is_so.to_string(),
        other => format!("{other:?}"),
    };
    let value = |one: &KeyValue| Some(text(one.value.as_ref()?.value.as_ref()?));
    span.attributes.iter().filter_map(|one| Some((one.key.as_str(), value(one)?))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[actix_web::test]
async fn each_call_is_a_span_with_what_it_was_in_both_forms() {
    let (plain, packed) = (Collector::start(Vec::new()), Collector::start(Vec::new()));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("key"), "Bearer of-spans").unwrap();
    let key = format!(", authorization = {{ file = \"{}/key\" }}", folder.path().display());
    let headers = ", headers = { x-team = \"blue\" }, content_type = \"protobuf\"";
    let rig = traced(&[entry(plain.address, &key), entry(packed.address, headers)], "");
    let joined = [
        ("cf-aig-metadata", r#"{"user":"ann","n":7,"gen_ai.request.model":"mine"}"#),
        ("cf-aig-otel-trace-id", TRACE),
        ("cf-aig-otel-parent-span-id", SPAN),
        ("cf-aig-event-id", "joined"),
        ("traceparent", "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01"),
    ];
    let whole = Answer::of(rig.chat(&joined, &question("one"))).await;
    let traceparent = format!("00-{TRACE}-{SPAN}-00");
    let standard =
        [("traceparent", traceparent.as_str()), ("cf-aig-cache-ttl", "600"), ("cf-aig-event-id", "standard")];
    let stream = Answer::of(rig.chat(&standard, &streamed("two"))).await;
    let hit = [("cf-aig-cache-ttl", "600"), ("cf-aig-event-id", "hit"), ("traceparent", "00-nonsense")];
    let hit = Answer::of(rig.chat(&hit, &streamed("two"))).await;
    let failed = [("x-fake", "status=500"), ("cf-aig-event-id", "failed"), ("cf-aig-max-attempts", "1")];
    let failed = Answer::of(rig.chat(&failed, &question("three"))).await;
    assert_eq!((whole.status, stream.status, hit.status, failed.status), (200, 200, 200, 500));

    let mut all = spans(&rig, &plain, 4).await;
    let mut others = spans(&rig, &packed, 4).await;
    let by_id = |one: &Span, other: &Span| one.span_id.cmp(&other.span_id);
    all.sort_by(by_id);
    others.sort_by(by_id);
    assert_eq!(all, others, "both forms say the same");
    for (head, _) in taken(&plain) {
        assert!(head.starts_with("POST /v1/traces ") && head.contains("authorization: Bearer of-spans\r\n"), "{head}");
        assert!(!head.contains("x-team"), "{head}");
    }
    for (head, _) in taken(&packed) {
        assert!(
            head.contains("x-team: blue\r\n") && head.contains("content-type: application/x-protobuf\r\n"),
            "{head}"
        );
        assert!(!head.contains("authorization"), "{head}");
    }

    let of = |event: &str| all.iter().find(|span| said(span)["neurond.event_id"] == event).unwrap();
    let (one, usage) = (of("joined"), &whole.json()["usage"]);
    assert_eq!((hex(&one.trace_id), hex(&one.parent_span_id)), (TRACE.to_owned(), SPAN.to_owned()));
    assert_eq!((one.name.as_str(), one.kind), ("chat gpt-4o-mini", 3));
    for (name, value) in [
        ("gen_ai.request.model", "gpt-4o-mini"),
        ("gen_ai.model.provider", "openai"),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].to_string().as_str()),
        ("gen_ai.usage.output_tokens", usage["completion_tokens"].to_string().as_str()),
        ("gen_ai.completion_json", whole.text.as_str()),
        ("http.response.status_code", "200"),
        ("neurond.gateway", "g"),
        ("neurond.account", "acme"),
        ("neurond.cache", "off"),
        ("neurond.log_id", whole.header("cf-aig-log-id")),
        ("user", "ann"),
        ("n", "7"),
    ] {
        assert_eq!(said(one)[name], value, "{name}");
    }
    assert_eq!(serde_json::from_str::<Value>(&said(one)["gen_ai.prompt_json"]).unwrap(), question("one"));
    let cost: f64 = said(one)["gen_ai.usage.cost"].parse().unwrap();
    let taken = one.end_time_unix_nano - one.start_time_unix_nano;
    assert!(cost > 0.0 && taken > 0 && taken < 10_000_000_000, "{cost} {taken}");
    assert_eq!((one.events.len(), one.status.clone().unwrap().code), (1, 0));

    let two = of("standard");
    assert_eq!(
        (hex(&two.trace_id), hex(&two.parent_span_id), two.flags & 0xff),
        (TRACE.to_owned(), SPAN.to_owned(), 0)
    );
    assert_eq!(said(two)["gen_ai.completion_json"], stream.text, "a stream as it went");
    let three = of("hit");
    assert!(three.parent_span_id.is_empty() && three.trace_id.len() == 16 && hex(&three.trace_id) != TRACE);
    assert_eq!((said(three)["neurond.cache"].as_str(), said(three)["gen_ai.usage.cost"].as_str()), ("hit", "0"));
    let four = of("failed");
    assert_eq!((four.status.clone().unwrap().code, said(four)["error.type"].as_str()), (2, "upstream_status"));
    assert_eq!(said(four)["http.response.status_code"], "500");

    // What is ours stays here, and the standard header goes on.
    let heard = rig.upstream.requests();
    assert_eq!(heard[0].header("cf-aig-otel-trace-id"), None);
    assert_eq!(heard[0].header("traceparent"), Some(joined[4].1));
    assert_eq!(heard[1].header("traceparent"), Some(traceparent.as_str()));
    let sent = "neurond_spans_total{outcome=\"sent\"}";
    rig.daemon.eventually("they are counted", |daemon| daemon.metric(sent) == 8.0).await;
}

#[actix_web::test]
async fn spans_hold_no_secrets_and_no_bodies_that_were_not_to_be_kept() {
    let collector = Collector::start(Vec::new());
    let rig = traced(&[entry(collector.address, "")], "");
    let secret = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD";
    let asked = question(&format!("my key is {secret}, write to ann@example.com"));
    let metadata = format!("{{\"who\":\"ann@example.com\",\"key\":\"{secret}\"}}");
    let headers = |event: &'static str, more: &'static str| {
        [
            ("cf-aig-event-id", event),
            ("cf-aig-metadata", metadata.as_str()),
            (more, if more == "cf-aig-zdr" { "true" } else { "false" }),
        ]
    };
    for (event, more) in [
        ("all", "x-nothing"),
        ("no payload", "cf-aig-collect-log-payload"),
        ("no log", "cf-aig-collect-log"),
        ("nobody keeps it", "cf-aig-zdr"),
    ] {
        let answer = Answer::of(rig.chat(&headers(event, more), &asked)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    for span in spans(&rig, &collector, 4).await {
        let said = said(&span);
        let event = said["neurond.event_id"].as_str();
        let text = format!("{said:?}");
        assert!(!text.contains(secret) && !text.contains("ann@example.com"), "{text}");
        assert!(said["who"].contains("REDACTED") && said["key"].contains("REDACTED"), "{text}");
        let bodies = said.keys().filter(|name| name.ends_with("_json")).count();
        assert_eq!(bodies, if event == "all" { 2 } else { 0 }, "{event}: {text}");
        assert_eq!(said.contains_key("neurond.log_id"), event != "no log", "{event}: {text}");
        assert_eq!(said["gen_ai.request.model"], "gpt-4o-mini", "{event}");
        if event == "all" {
            assert!(said["gen_ai.prompt_json"].contains("my key is [REDACTED"), "{text}");
        }
    }
}

#[actix_web::test]
async fn spans_wait_for_a_receiver_to_recover_and_not_for_one_that_refuses() {
    let failing = Collector::start(vec![Behaviour::Answer(503, "retry-after: 1\r\n"), Behaviour::Reset]);
    let refusing = Collector::start(vec![Behaviour::Answer(401, "")]);
    let rig = traced(&[entry(failing.address, ""), entry(refusing.address, "")], "zdr = true\n");
    let count = |outcome: &str| rig.daemon.metric(&format!("neurond_spans_total{{outcome=\"{outcome}\"}}"));
    Answer::of(rig.chat(&[("cf-aig-event-id", "first")], &question("one"))).await;
    rig.daemon.eventually("one refuses", |_| count("failed") == 1.0).await;
    Answer::of(rig.chat(&[("cf-aig-event-id", "second")], &question("two"))).await;
    let both = spans(&rig, &failing, 2).await;
    let events: Vec<_> = both.iter().map(|span| said(span)["neurond.event_id"].clone()).collect();
    assert_eq!(events, ["first", "second"]);
    assert!(both.iter().all(|span| !said(span).contains_key("gen_ai.prompt_json")), "the gateway says so");
    let one = spans(&rig, &refusing, 1).await;
    assert_eq!(said(&one[0])["neurond.event_id"], "second");
    rig.daemon.eventually("all are counted", |_| (count("sent"), count("failed")) == (3.0, 1.0)).await;
}

#[actix_web::test]
async fn what_the_api_says_of_receivers_counts_at_once_and_reaches_no_private_address() {
    let collector = Collector::start(Vec::new());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    std::fs::write(folder.path().join("master.key"), "11".repeat(32)).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder.path().join("master.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let more = format!("[registry]\nfolder = \"{path}/registry\"\n[vault]\nmaster_key_file = \"{path}/master.key\"\n");
    for is_allowed in [false, true] {
        let rig = Rig::made(&more, true, |config| config.upstream.allow_private = is_allowed);
        let manage = async |method: Method, path: &str, more: Value| {
            let mut fields = json!({
                "cache_invalidate_on_update": false, "cache_ttl": 0, "collect_logs": true, "authentication": false,
                "rate_limiting_interval": 0, "rate_limiting_limit": 0,
            });
            fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai-gateway/{path}"));
            let request = reqwest::Client::new().request(method, url).bearer_auth("secret").json(&fields);
            let answer = Answer::of(request).await;
            assert_eq!(answer.status, 200, "{answer:?}");
        };
        let ask = async |event: &str| {
            let url = rig.daemon.url("/v1/acme/made/openai/chat/completions");
            let request = reqwest::Client::new().post(url).header("cf-aig-event-id", event).json(&question("q"));
            assert_eq!(Answer::of(request).await.status, 200);
        };
        if !is_allowed {
            manage(Method::POST, "gateways", json!({ "id": "made" })).await;
        }
        manage(Method::PUT, "gateways/made", json!({ "otel": [] })).await;
        ask("before").await;
        // Gateways are asked when records are taken in, which is shortly after a call has ended.
        rig.is_clean().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        rig.daemon.services.relays.logs.flush().await;
        let otel = json!([{ "url": format!("http://{}/v1/traces", collector.address), "headers": {} }]);
        manage(Method::PUT, "gateways/made", json!({ "otel": otel })).await;
        ask("after").await;
        if is_allowed {
            let found = spans(&rig, &collector, 1).await;
            assert_eq!(said(&found[0])["neurond.event_id"], "after");
        } else {
            let failed = "neurond_spans_total{outcome=\"failed\"}";
            rig.daemon.eventually("it is refused", |daemon| daemon.metric(failed) == 1.0).await;
            assert!(taken(&collector).is_empty());
        }
    }
}

#[actix_web::test]
async fn a_collector_takes_both_forms_and_hands_on_what_was_sent() {
    let Some(tools) = tools() else { return };
    let (direct, behind) = (Collector::start(Vec::new()), Collector::start(Vec::new()));
    let rotel = Rotel::start(&tools, behind.address);
    // By another name, it is another receiver.
    let packed = entry(rotel.address, ", content_type = \"protobuf\"").replace("127.0.0.1", "localhost");
    let rig = traced(&[entry(rotel.address, ""), packed, entry(direct.address, "")], "");
    let joined = [("cf-aig-otel-trace-id", TRACE), ("cf-aig-metadata", r#"{"user":"ann","n":7,"paid":true}"#)];
    Answer::of(rig.chat(&joined, &question("gr\u{fc}n"))).await;
    Answer::of(rig.chat(&[("x-fake", "status=500"), ("cf-aig-max-attempts", "1")], &streamed("two"))).await;
    let sorted = |mut spans: Vec<Span>| {
        spans.sort_by(|one, other| one.span_id.cmp(&other.span_id));
        spans
    };
    let sent = sorted(spans(&rig, &direct, 2).await);
    let handed_on = sorted(spans(&rig, &behind, 4).await);
    assert_eq!(handed_on, [&sent[0], &sent[0], &sent[1], &sent[1]].map(Span::clone));
    assert_eq!(
        sent.iter()
            .filter(|span| hex(&span.trace_id) == TRACE && said(span).get("user").is_some_and(|user| user == "ann"))
            .count(),
        1
    );
    rig.daemon
        .eventually("all are counted", |daemon| daemon.metric("neurond_spans_total{outcome=\"sent\"}") == 6.0)
        .await;
}

#[actix_web::test]
async fn the_protocols_own_classes_read_both_forms() {
    let Some(tools) = tools() else { return };
    let (plain, packed) = (Collector::start(Vec::new()), Collector::start(Vec::new()));
    let rig = traced(&[entry(plain.address, ""), entry(packed.address, ", content_type = \"protobuf\"")], "");
    let headers =
        [("cf-aig-metadata", r#"{"user":"ann","n":7,"share":0.25,"paid":true}"#), ("cf-aig-otel-trace-id", TRACE)];
    Answer::of(rig.chat(&headers, &question("gr\u{fc}n \u{1f33f} \"quoted\""))).await;
    let expected = spans(&rig, &plain, 1).await.remove(0);
    spans(&rig, &packed, 1).await;
    let mut python = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/gateway/otlp.py"))
        .env("PYTHONPATH", &tools)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = python.stdin.take().unwrap();
    for (kind, collector) in [("json", &plain), ("protobuf", &packed)] {
        let body = BASE64_STANDARD.encode(&collector.seen.lock()[0].1);
        writeln!(stdin, "{kind} {body}").unwrap();
    }
    drop(stdin);
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success());
    let read: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [one, other] = &read[..] else { panic!("{read:?}") };
    assert_eq!(one, other, "both forms say the same");
    let resource = &one["resourceSpans"][0];
    assert_eq!(
        resource["resource"]["attributes"][0],
        json!({ "key": "service.name", "value": { "stringValue": "neurond" } })
    );
    let span = &resource["scopeSpans"][0]["spans"][0];
    // In protobuf's own JSON, ids are base64.
    assert_eq!(span["traceId"], BASE64_STANDARD.encode(&expected.trace_id));
    assert_eq!(span["spanId"], BASE64_STANDARD.encode(&expected.span_id));
    assert_eq!((&span["kind"], &span["name"]), (&json!("SPAN_KIND_CLIENT"), &json!("chat gpt-4o-mini")));
    assert_eq!(span["startTimeUnixNano"], expected.start_time_unix_nano.to_string());
    let attributes = span["attributes"].as_array().unwrap();
    assert_eq!(attributes.len(), expected.attributes.len());
    for (name, value) in [
        ("n", json!({ "intValue": "7" })),
        ("share", json!({ "doubleValue": 0.25 })),
        ("paid", json!({ "boolValue": true })),
        ("gen_ai.prompt_json", json!({ "stringValue": said(&expected)["gen_ai.prompt_json"] })),
    ] {
        let found = attributes.iter().find(|one| one["key"] == name).unwrap();
        assert_eq!(found["value"], value, "{name}");
    }
}

/// What `scripts/fetch_otlp.sh` fetches, or a word to whoever reads the output.
fn tools() -> Option<PathBuf> {
    let named = std::env::var_os("NEUROND_TEST_OTLP").map(PathBuf::from);
    let fetched = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-otlp");
    let folder = named.clone().unwrap_or_else(fetched);
    if !folder.join("rotel/rotel-agent").is_file() {
        assert!(named.is_none(), "NEUROND_TEST_OTLP: {} holds no collector", folder.display());
        eprintln!("skipped: no collector of traces (run scripts/fetch_otlp.sh)");
        return None;
    }
    Some(folder)
}

/// A collector in a process of its own, which hands on what it gets.
struct Rotel {
    address: SocketAddr,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Rotel {
    fn start(tools: &Path, to: SocketAddr) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = || TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let (address, unused) = (free(), free());
        let child = Command::new(tools.join("rotel/rotel-agent"))
            .arg("start")
            .args(["--pid-file", folder.path().join("pid").to_str().unwrap()])
            .args(["--otlp-http-endpoint", &address.to_string(), "--otlp-grpc-endpoint", &unused.to_string()])
            .args(["--exporter", "otlp", "--otlp-exporter-protocol", "http"])
            .args(["--otlp-exporter-endpoint", &format!("http://{to}")])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = std::time::Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the collector does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { address, child, _folder: folder }
    }
}

impl Drop for Rotel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
