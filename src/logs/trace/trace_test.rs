use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use serde_json::{Value, json};

use super::span::tests::{body, sample};
use super::*;
use crate::base::Millis;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a receiver does with a request.
#[derive(Clone, Debug)]
enum Does {
    Take,
    /// A status, more headers, a body.
    Answer(u16, &'static str, Vec<u8>),
    /// Nothing, until the other side leaves.
    Hang,
    /// Closes without an answer.
    Reset,
}

/// Heads and bodies of what a server was asked, and whether it has taken them.
type Seen = Mutex<Vec<(String, Vec<u8>, bool)>>;

/// A server that does what it was told, and takes spans when nothing is left of that.
struct Receiver {
    address: SocketAddr,
    seen: Arc<Seen>,
}

impl Receiver {
    fn start(script: impl IntoIterator<Item = Does>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Seen> = Arc::default();
        let script = Arc::new(Mutex::new(VecDeque::from_iter(script)));
        let theirs = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, script) = (theirs.clone(), script.clone());
                std::thread::spawn(move || serve(&stream.unwrap(), &seen, &script));
            }
        });
        Self { address, seen }
    }

    fn destination(&self, protobuf: bool) -> Destination {
        Destination {
            url: format!("http://{}/v1/traces", self.address),
            headers: vec![("x-team".into(), Secret::new("blue".into()))],
            authorization: Some(Secret::new("Bearer of-spans".into())),
            protobuf,
            allow_private: true,
        }
    }

    /// The spans that it has taken, of requests in protobuf.
    fn spans(&self) -> Vec<Span> {
        let seen = self.seen.lock();
        let taken = seen.iter().filter(|(.., is_taken)| *is_taken);
        let requests = taken.map(|(_, body, _)| ExportTraceServiceRequest::decode(&body[..]).unwrap());
        requests.flat_map(|all| all.resource_spans).flat_map(|all| all.scope_spans).flat_map(|all| all.spans).collect()
    }

    fn starts(&self) -> Vec<u64> {
        self.spans().iter().map(|span| span.start_time_unix_nano / 1_000_000).collect()
    }

    fn requests(&self) -> usize {
        self.seen.lock().len()
    }
}

/// Ends with the connection.
fn serve(mut stream: &TcpStream, seen: &Seen, script: &Mutex<VecDeque<Does>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        let mut body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut body).ok()?;
        let does = script.lock().pop_front().unwrap_or(Does::Take);
        let (status, more, said) = match does {
            Does::Take => (200, "", Vec::new()),
            Does::Answer(status, more, said) => (status, more, said),
            Does::Hang => {
                seen.lock().push((head, body, false));
                // Ends when the other side closes.
                let _ = reader.read(&mut [0]);
                return None;
            }
            Does::Reset => {
                seen.lock().push((head, body, false));
                return None;
            }
        };
        seen.lock().push((head, body, status == 200));
        let head = format!("HTTP/1.1 {status} So\r\n{more}content-length: {}\r\n\r\n", said.len());
        stream.write_all(&[head.as_bytes(), &said].concat()).ok()?;
    }
}

fn fails(status: u16) -> Does {
    Does::Answer(status, "", b"no".to_vec())
}

/// Short waits.
fn settings() -> Settings {
    let client = client::Settings {
        connect_timeout: Duration::from_secs(2),
        allow_private: false,
        proxy: None,
        tls: client::Tls::new(None).unwrap(),
    };
    Settings { linger: Duration::from_millis(10), first_wait: Duration::from_millis(5), ..Settings::new(client) }
}

struct Rig {
    traces: Traces,
    metrics: Metrics,
}

impl Rig {
    fn start(settings: Settings) -> Self {
        let metrics = Metrics::new();
        Self { traces: Traces::start(settings, &metrics).unwrap(), metrics }
    }

    fn append(&self, numbers: std::ops::Range<u64>, to: &[&Destination]) {
        let to: Arc<[Destination]> = to.iter().map(|to| (*to).clone()).collect();
        for number in numbers {
            self.traces.append(Box::new(Record { at: Millis(number), ..sample() }), to.clone());
        }
    }

    /// Sent, rejected, failed, dropped.
    fn counts(&self) -> [u64; 4] {
        ["sent", "rejected", "failed", "dropped"].map(|outcome| self.metrics.spans.with_label_values(&[outcome]).get())
    }

    fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", self.counts());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn json_is_as_the_protocol_writes_it() {
    let record = sample();
    let mut ids = Ids::of(&record);
    ids.span = [0xab; 8];
    let written = wire::encode(vec![span::span(&record, &ids)], false).unwrap();
    let said: Value = serde_json::from_slice(&written).unwrap();
    let resource = &said["resourceSpans"][0];
    assert_eq!(resource["resource"]["attributes"][0]["key"], "service.name");
    assert_eq!(resource["resource"]["attributes"][0]["value"], json!({ "stringValue": "neurond" }));
    assert_eq!(resource["resource"]["attributes"][1]["value"], json!({ "stringValue": env!("CARGO_PKG_VERSION") }));
    assert_eq!(resource["scopeSpans"][0]["scope"]["name"], "neurond");
    let span = &resource["scopeSpans"][0]["spans"][0];
    for (field, value) in [
        ("traceId", json!("4bf92f3577b34da6a3ce929d0e0e4736")),
        ("spanId", json!("abababababababab")),
        ("parentSpanId", json!("00f067aa0ba902b7")),
        ("kind", json!(3)),
        ("startTimeUnixNano", json!("1750000000123000000")),
        ("endTimeUnixNano", json!("1750000001357567000")),
    ] {
        assert_eq!(span[field], value, "{field} of {span}");
    }
    let value = |name: &str| {
        let found = span["attributes"].as_array().unwrap().iter().find(|one| one["key"] == name);
        found.unwrap_or_else(|| panic!("{name}"))["value"].clone()
    };
    assert_eq!(value("gen_ai.usage.input_tokens"), json!({ "intValue": "10" }));
    assert_eq!(value("gen_ai.usage.cost"), json!({ "doubleValue": 0.0000165 }));
    assert_eq!(value("neurond.stored_key"), json!({ "boolValue": true }));
    assert_eq!(value("neurond.findings"), json!({ "arrayValue": { "values": [{ "stringValue": "pii" }] } }));
}

#[test]
fn a_servers_word_on_what_it_has_not_taken_is_read_in_both_forms() {
    let partial = |rejected_spans, error_message: &str| {
        let error_message = error_message.into();
        let partial_success = Some(ExportTracePartialSuccess { rejected_spans, error_message });
        ExportTraceServiceResponse { partial_success }.encode_to_vec()
    };
    let check = |said: &[u8], expected: Option<(u64, &str)>| {
        let expected = expected.map(|(count, why)| (count, why.to_owned()));
        assert_eq!(wire::rejected(said), expected, "{:?}", String::from_utf8_lossy(said));
    };
    check(b"", None);
    check(b"{}", None);
    check(b"{\"partialSuccess\":{}}", Some((0, "")));
    check(b" {\"partialSuccess\":{\"rejectedSpans\":\"3\",\"errorMessage\":\"too\\nold\"}}", Some((3, "tooold")));
    check(b"{\"partialSuccess\":{\"rejectedSpans\":3}}", Some((3, "")));
    check(b"{\"partialSuccess\":{\"rejectedSpans\":\"-3\"}}", Some((0, "")));
    check(&partial(3, "too old"), Some((3, "too old")));
    check(&partial(0, "careful"), Some((0, "careful")));
    check(b"thank you", None);
}

#[test]
fn only_what_the_protocol_names_is_tried_again() {
    let passing: Vec<u16> = (200..600).filter(|status| wire::is_passing((*status).try_into().unwrap())).collect();
    assert_eq!(passing, [429, 502, 503, 504]);
}

#[test]
fn a_receiver_that_fails_in_every_passing_way_gets_every_span_once_it_is_well() {
    let wait = Does::Answer(429, "retry-after: 0\r\n", Vec::new());
    let receiver = Receiver::start([fails(503), wait, Does::Hang, Does::Reset, Does::Reset, fails(502), fails(504)]);
    let rig = Rig::start(Settings { patience: Duration::from_secs(2), ..settings() });
    let to = receiver.destination(true);
    for round in 0..8 {
        rig.append(round * 200..(round + 1) * 200, &[&to]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(rig.traces.close(PATIENCE));
    assert_eq!(receiver.starts(), (0..1600).collect::<Vec<_>>(), "in order");
    assert_eq!(rig.counts(), [1600, 0, 0, 0]);
    assert!(receiver.requests() > 7 + 3, "{}", receiver.requests());
    for (head, ..) in receiver.seen.lock().iter() {
        assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
        for line in ["x-team: blue", "authorization: Bearer of-spans", "content-type: application/x-protobuf"] {
            assert!(head.lines().any(|one| one == line), "{line} in {head}");
        }
    }
}

#[test]
fn a_wait_that_a_receiver_asks_for_is_waited() {
    let receiver = Receiver::start([Does::Answer(503, "retry-after: 1\r\n", Vec::new())]);
    let rig = Rig::start(settings());
    let begun = Instant::now();
    rig.append(0..1, &[&receiver.destination(true)]);
    rig.until("it arrives", |rig| rig.counts()[0] == 1);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn what_a_receiver_refuses_is_not_sent_again_and_the_next_is() {
    for status in [400, 401, 404, 413, 500, 501] {
        let receiver = Receiver::start([fails(status)]);
        let rig = Rig::start(settings());
        let to = receiver.destination(true);
        rig.append(0..3, &[&to]);
        rig.until("it is refused", |rig| rig.counts()[2] == 3);
        rig.append(3..5, &[&to]);
        rig.until("the next arrives", |rig| rig.counts()[0] == 2);
        assert_eq!((receiver.requests(), receiver.starts()), (2, vec![3, 4]), "{status}");
    }
}

#[test]
fn spans_that_a_receiver_does_not_take_are_counted() {
    let said = b"{\"partialSuccess\":{\"rejectedSpans\":\"2\",\"errorMessage\":\"too old\"}}".to_vec();
    let receiver = Receiver::start([Does::Answer(200, "content-type: application/json\r\n", said)]);
    let rig = Rig::start(settings());
    rig.append(0..5, &[&receiver.destination(false)]);
    assert!(rig.traces.close(PATIENCE));
    assert_eq!(rig.counts(), [3, 2, 0, 0]);
}

#[test]
fn spans_gather_up_to_a_number_and_a_size_and_for_a_while() {
    let receiver = Receiver::start([]);
    let to = receiver.destination(true);
    let rig = Rig::start(Settings { linger: PATIENCE * 10, ..settings() });
    rig.append(0..512, &[&to]);
    rig.until("a full batch goes at once", |rig| rig.counts()[0] == 512);
    drop(rig);
    let rig = Rig::start(Settings { linger: Duration::from_millis(200), ..settings() });
    let begun = Instant::now();
    rig.append(512..515, &[&to]);
    rig.until("a small one after a while", |rig| rig.counts()[0] == 3);
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    drop(rig);
    let rig = Rig::start(Settings { linger: PATIENCE * 10, ..settings() });
    let large = Record { asked: body(vec![b'x'; 1 << 20]), ..sample() };
    for _ in 0..10 {
        rig.traces.append(Box::new(large.clone()), [to.clone()].into());
    }
    assert!(rig.traces.close(PATIENCE));
    let sizes: Vec<usize> = receiver.seen.lock().iter().skip(2).map(|(_, body, _)| body.len() >> 20).collect();
    assert_eq!(sizes, [3, 3, 3, 1], "no request of more than 4 MiB");
}

#[test]
fn a_destination_that_is_down_costs_the_others_nothing_and_no_more_than_its_room() {
    let (down, good) = (Receiver::start(vec![Does::Hang; 1000]), Receiver::start([]));
    let rig = Rig::start(settings());
    let to = [&down.destination(true), &good.destination(true)];
    for round in 0..40 {
        rig.append(round * 500..(round + 1) * 500, &to);
        rig.until("the other gets its spans", |rig| rig.counts()[0] == (round + 1) * 500);
    }
    let [sent, _, failed, dropped] = rig.counts();
    assert_eq!((sent, failed), (20_000, 0));
    // The queue, and the batch that is under way.
    assert!((20_000 - 16_384 - 512..=20_000 - 16_384).contains(&dropped), "{dropped}");
    assert!(!rig.traces.close(Duration::from_millis(100)), "it does not wait for ever");
    let bytes = rig.traces.bytes.clone();
    assert!(bytes.load(Ordering::Relaxed) >= 16_384 * SPAN);
    drop(rig);
    assert_eq!(bytes.load(Ordering::Relaxed), 0, "everything was given back");
}

#[test]
fn the_end_waits_neither_for_a_batch_to_fill_nor_for_better_times() {
    let receiver = Receiver::start([fails(503)]);
    let long = Duration::from_secs(100);
    let rig = Rig::start(Settings { linger: Duration::from_millis(1), first_wait: long, ..settings() });
    rig.append(0..1, &[&receiver.destination(true)]);
    rig.until("the first try fails", |_| receiver.requests() == 1);
    rig.append(1..3, &[&receiver.destination(true)]);
    assert!(rig.traces.close(PATIENCE));
    assert_eq!((receiver.starts(), rig.counts()), (vec![0, 1, 2], [3, 0, 0, 0]));

    let receiver = Receiver::start([]);
    let rig = Rig::start(Settings { linger: long, ..settings() });
    rig.append(0..3, &[&receiver.destination(false)]);
    assert!(rig.traces.close(PATIENCE));
    assert_eq!(rig.counts(), [3, 0, 0, 0]);
}

#[test]
fn spans_that_cannot_be_sent_are_given_up() {
    let receiver = Receiver::start(vec![fails(503); 1000]);
    let rig = Rig::start(Settings { give_up: Duration::from_millis(100), ..settings() });
    rig.append(0..4, &[&receiver.destination(true)]);
    rig.until("they are given up", |rig| rig.counts()[2] == 4);
    assert!(receiver.requests() > 2);
}

#[test]
fn an_address_that_is_private_or_none_gets_nothing() {
    let receiver = Receiver::start([]);
    let rig = Rig::start(settings());
    let good = receiver.destination(true);
    let bad = ("not a name".to_owned(), Secret::new("x".to_owned()));
    let destinations = [
        Destination { allow_private: false, ..good.clone() },
        Destination { url: "nonsense".into(), ..good.clone() },
        Destination { headers: vec![bad], ..good },
    ];
    for (at, to) in destinations.iter().enumerate() {
        rig.append(0..1, &[to]);
        rig.until("it is refused", |rig| rig.counts()[2] == at as u64 + 1);
    }
    assert_eq!(receiver.requests(), 0);
}
