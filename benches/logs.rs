//! The log: appending, redacting, and asking ten million records.
//!
//!     cargo bench --bench logs                                    a batch, a redaction
//!     cargo bench --bench logs -- processor                       redaction in processor time, for machines that do other things too
//!     cargo bench --bench logs -- ten-million [RECORDS] [FOLDER]  fills a folder (kept if named, and used again) and asks it

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput};

use neurond::base::{AccountId, LogId, Millis, Neurons, RequestId};
use neurond::logs::{Body, CacheUse, Query, Record, RedactRules as Rules, Redactor, Store, StoreSettings as Settings};
use neurond::task::{Task, Usage};

const START: u64 = 1_700_000_000_000;

fn main() {
    let mut words = std::env::args().skip_while(|word| word != "ten-million").skip(1);
    if std::env::args().any(|word| word == "ten-million") {
        let count = words.next().and_then(|word| word.parse().ok()).unwrap_or(10_000_000);
        return many(count, words.next().map(PathBuf::from));
    }
    if std::env::args().any(|word| word == "processor") {
        return redact_alone();
    }
    let mut criterion =
        Criterion::default().configure_from_args().sample_size(20).measurement_time(Duration::from_secs(4));
    appending(&mut criterion);
    redacting(&mut criterion);
    criterion.final_summary();
}

/// Numbers that look like chance and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.roll(from.len() as u64) as usize]
    }
}

const WORDS: [&str; 40] = [
    "the", "model", "answers", "with", "a", "token", "of", "several", "words", "and", "every", "request", "through",
    "gateway", "is", "logged", "once", "while", "clients", "wait", "for", "their", "streams", "to", "end", "in",
    "good", "order", "because", "nobody", "likes", "when", "what", "was", "said", "before", "cannot", "be", "found",
    "again",
];

fn prose(dice: &mut Dice, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        text.push_str(dice.pick(&WORDS));
        text.push(' ');
    }
    text
}

fn record(dice: &mut Dice, number: u64, body: usize) -> Record {
    let model = dice.roll(40);
    let (asked, answered) = (prose(dice, body), prose(dice, body));
    let asked =
        format!(r#"{{"model":"model-{model}","messages":[{{"role":"user","content":"{asked}"}}],"max_tokens":256}}"#);
    let answered = format!(
        r#"{{"id":"chatcmpl-{number:032x}","object":"chat.completion","created":1700000000,"model":"model-{model}","choices":[{{"index":0,"message":{{"role":"assistant","content":"{answered}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":{},"completion_tokens":{}}}}}"#,
        dice.roll(4000),
        dice.roll(900)
    );
    let body = |text: String| Body { size: text.len() as u64, kept: Bytes::from(text) };
    let at = Millis(START + number * 50);
    Record {
        id: Some(LogId::at(at)),
        request: RequestId::random(),
        at,
        account: AccountId::new("0123456789abcdef0123456789abcdef"),
        key: None,
        gateway: "production".into(),
        provider: dice.pick(&["openai", "anthropic", "google-ai-studio", "workers-ai", "groq"]).into(),
        model: format!("model-{model}").into(),
        task: Some(Task::TextGeneration),
        path: "v1/chat/completions".into(),
        status: if dice.roll(100) < 97 { 200 } else { 429 },
        success: dice.roll(100) < 97,
        cache: if dice.roll(10) == 0 { CacheUse::Hit } else { CacheUse::Miss },
        duration_us: 50_000 + dice.roll(9_000_000),
        first_byte_us: Some(40_000 + dice.roll(500_000)),
        usage: Some(Usage {
            prompt_tokens: dice.roll(4000) as u32,
            completion_tokens: dice.roll(900) as u32,
            ..Usage::default()
        }),
        cost: Neurons::from_micro(dice.roll(100_000_000)),
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 0,
        request_type: "http".into(),
        request_content_type: Some("application/json".into()),
        response_content_type: Some("application/json".into()),
        metadata: Some(format!(r#"{{"user":"u{}","team":"t{}"}}"#, dice.roll(100_000), dice.roll(20)).into()),
        trace: None,
        zero_retention: false,
        event: Some(format!("event-{number:012x}").into()),
        user_agent: Some(dice.pick(&["sdk-python/1.99", "sdk-node/5.2", "curl/8.5"]).into()),
        authenticated: true,
        stored_key: false,
        attempts: "openai 200".into(),
        why: None,
        findings: Vec::new(),
        asked: body(asked),
        answered: body(answered),
    }
}

fn appending(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(Settings { max_bytes: 2 << 30, ..Settings::new(folder.path()) }).unwrap();
    let mut dice = Dice(1);
    let batch: Vec<Box<Record>> = (0..1000).map(|number| Box::new(record(&mut dice, number, 1000))).collect();
    let mut group = criterion.benchmark_group("log");
    group.throughput(Throughput::Elements(1000));
    group.bench_function("append 1000 records of 1 KB each way", |bencher| {
        bencher.iter(|| store.append(&batch).unwrap())
    });
    group.finish();
}

/// Records to redact: bodies of 100 KB without and with secrets, a stream of 10 KB of text, and a small one.
fn samples() -> [(&'static str, Record); 4] {
    let mut dice = Dice(2);
    let clean = record(&mut dice, 1, 100_000);
    let mut dirty = record(&mut dice, 1, 100_000);
    let text = String::from_utf8(dirty.answered.kept.to_vec()).unwrap();
    let text = text.replacen("model answers", "mail ann@example.com", 3);
    dirty.answered = Body { size: text.len() as u64, kept: text.into() };
    let head = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{"index":0,"delta":{"content":""#;
    let events = prose(&mut dice, 10_000);
    let events =
        events.split_inclusive(' ').map(|word| format!("data: {head}{word}\"}},\"finish_reason\":null}}]}}\n\n"));
    let events: String = events.collect();
    let mut stream = record(&mut dice, 1, 10);
    stream.response_content_type = Some("text/event-stream".into());
    stream.answered = Body { size: events.len() as u64, kept: events.into() };
    [("clean", clean), ("with secrets", dirty), ("a stream", stream), ("1 KB each way", record(&mut dice, 1, 1000))]
}

fn bytes_of(record: &Record) -> usize {
    record.asked.kept.len() + record.answered.kept.len()
}

fn redacting(criterion: &mut Criterion) {
    let redactor = Redactor::new(&Rules::default()).unwrap();
    let mut group = criterion.benchmark_group("redact");
    for (name, one) in samples() {
        group.throughput(Throughput::Bytes(bytes_of(&one) as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_batched(|| one.clone(), |mut one| redactor.apply(&mut one), criterion::BatchSize::SmallInput);
        });
    }
    group.finish();
}

fn redact_alone() {
    let redactor = Redactor::new(&Rules::default()).unwrap();
    for (name, one) in samples() {
        let turns = 200_000_000 / bytes_of(&one);
        let before = thread_time();
        for _ in 0..turns {
            std::hint::black_box(redactor.apply(&mut one.clone()));
        }
        let each = (thread_time() - before).as_secs_f64() / turns as f64;
        println!("{name:<16}{:>8.0} MB/s {:>8.1} us a record", bytes_of(&one) as f64 / each / 1e6, each * 1e6);
    }
}

fn many(count: u64, folder: Option<PathBuf>) {
    let kept = tempfile::tempdir().unwrap();
    let folder = folder.unwrap_or_else(|| kept.path().to_path_buf());
    let settings = Settings {
        max_bytes: 200 << 30,
        keep: std::sync::Arc::new(|_, _| neurond::logs::Keep { records: u64::MAX, ..Default::default() }),
        ..Settings::new(&folder)
    };
    let begun = Instant::now();
    let store = Store::open(settings.clone()).unwrap();
    println!("open            {:>8.1} ms with {} records", millis(begun.elapsed()), store.status().records);
    fill(&store, count);
    let status = store.status();
    println!(
        "{} records, {} segments, {:.1} GB, {:.0} bytes a record",
        status.records,
        status.segments,
        status.bytes as f64 / 1e9,
        status.bytes as f64 / status.records.max(1) as f64
    );
    drop(store);
    let begun = Instant::now();
    let store = Store::open(settings).unwrap();
    println!("open            {:>8.1} ms", millis(begun.elapsed()));
    ask(&store);
    println!("resident        {:>8.0} MB", resident());
    report(&folder);
}

/// Appends what is missing, in batches as an actor would, and says what it cost.
fn fill(store: &Store, count: u64) {
    let mut dice = Dice(3);
    let have = store.status().records;
    if have >= count {
        return;
    }
    let (mut spent, mut processor) = (Duration::ZERO, Duration::ZERO);
    let mut batch: Vec<Box<Record>> = (0..1000).map(|number| Box::new(record(&mut dice, number, 100))).collect();
    for first in (have..count).step_by(batch.len()) {
        for (number, record) in (first..).zip(&mut batch) {
            // Bodies are the same again, so that making records is no part of what is measured.
            let fresh = Millis(START + number * 50);
            (record.id, record.at) = (Some(LogId::at(fresh)), fresh);
            record.event = Some(format!("event-{number:012x}").into());
            record.cost = Neurons::from_micro(dice.roll(100_000_000));
            record.duration_us = 50_000 + dice.roll(9_000_000);
            record.metadata =
                Some(format!(r#"{{"user":"u{}","team":"t{}"}}"#, dice.roll(100_000), dice.roll(20)).into());
        }
        let (begun, used) = (Instant::now(), processor_time());
        store.append(&batch).unwrap();
        spent += begun.elapsed();
        processor += processor_time() - used;
    }
    store.flush().unwrap();
    let added = (count - have) as f64;
    println!(
        "append          {:>8.0} records/s, {:.2} us of processor a record, all threads",
        added / spent.as_secs_f64(),
        processor.as_secs_f64() * 1e6 / added
    );
}

fn ask(store: &Store) {
    let account = AccountId::new("0123456789abcdef0123456789abcdef");
    let rows = [
        ("the newest", ""),
        ("with least and most", "meta_info=true"),
        ("the oldest", "order_by_direction=asc"),
        ("page 10,000", "page=10000"),
        ("by model", "order_by=model&order_by_direction=asc"),
        ("by cost", "order_by=cost"),
        ("by feedback", "order_by=feedback"),
        ("one provider", "provider=groq"),
        ("none", "provider=nobody"),
        ("one provider by cost", "provider=groq&order_by=cost"),
        (
            "429 and dear",
            "filters.key=status_code&filters.value=429&filters.key=cost&filters.operator=gt&filters.value=0.00109",
        ),
        ("few: cost", "filters.key=cost&filters.operator=gt&filters.value=0.0010999"),
        ("few: duration", "filters.key=duration&filters.operator=lt&filters.value=50.1"),
        ("not one of two models", "filters.key=model&filters.operator=neq&filters.value=model-1&filters.value=model-2"),
        ("model contains", "filters.key=model&filters.operator=contains&filters.value=-3"),
        ("one user", "filters.key=metadata.value&filters.value=u777"),
        ("user contains", "filters.key=metadata.value&filters.operator=contains&filters.value=u777"),
        ("one event", "filters.key=event_id&filters.value=event-00000000beef"),
        ("event contains", "filters.key=event_id&filters.operator=contains&filters.value=0beef"),
        ("id contains", "filters.key=id&filters.operator=contains&filters.value=XYZZY"),
        ("an hour", "start_date=1700010000000&end_date=1700013600000"),
        (
            "four filters",
            "provider=groq&cached=false&success=true&filters.key=tokens_in&filters.operator=gt&filters.value=3000",
        ),
        ("search a name", "search=model-17"),
        ("search, few", "search=no+such+words"),
    ];
    for (name, raw) in rows {
        let query = Query::parse(&format!("{raw}&per_page=50")).unwrap();
        let (mut best, mut used) = (Duration::MAX, Duration::MAX);
        let mut page = None;
        let first = Instant::now();
        let mut cold = Duration::ZERO;
        for turn in 0..3 {
            let (begun, before) = (Instant::now(), thread_time());
            page = Some(store.list(&account, "production", &query).unwrap());
            best = best.min(begun.elapsed());
            used = used.min(thread_time() - before);
            if turn == 0 {
                cold = first.elapsed();
            }
        }
        let page = page.unwrap();
        let part = if page.is_complete { "" } else { ", in part" };
        let (best, cold, used, count) = (millis(best), millis(cold), millis(used), page.total_count);
        println!("{name:<24}{best:>8.1} ms  (first {cold:>8.1}, processor {used:>8.1})  {count:>9} records{part}");
    }
    for (name, sets) in [
        ("sums of all", &[""][..]),
        (
            "sums of four filters",
            &["provider=groq&cached=false&success=true&filters.key=tokens_in&filters.operator=gt&filters.value=3000"],
        ),
        ("sums of three sets", &["provider=groq", "cached=true&success=true", "min_cost=0.001"]),
    ] {
        let sets: Vec<_> = sets.iter().map(|raw| Query::parse(raw).unwrap().filters).collect();
        let (mut best, mut used, mut count) = (Duration::MAX, Duration::MAX, 0);
        for _ in 0..3 {
            let (begun, before) = (Instant::now(), thread_time());
            count = store.sums(&account, "production", &sets).unwrap().count;
            best = best.min(begun.elapsed());
            used = used.min(thread_time() - before);
        }
        println!("{name:<24}{:>8.1} ms  (processor {:>8.1})  {count:>9} records", millis(best), millis(used));
    }
    let page = store.list(&account, "production", &Query::parse("page=5000&per_page=50").unwrap()).unwrap();
    let id = page.records[0].record.id.unwrap();
    let begun = Instant::now();
    assert!(store.get(&account, "production", id).unwrap().is_some());
    println!("{:<24}{:>8.2} ms", "one record with bodies", millis(begun.elapsed()));
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What this thread has computed: what others do on the same machine counts not.
fn thread_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default())
}

/// User and system time of all threads.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or_default() / 1024.0
}

fn report(folder: &Path) {
    let bytes: u64 =
        std::fs::read_dir(folder).unwrap().filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum();
    println!("on disk         {:>8.2} GB", bytes as f64 / 1e9);
}
