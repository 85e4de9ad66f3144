//! The ledger: reserving and settling, with and without a disk, and what a start reads.
//!
//! ```text
//! cargo bench --bench ledger
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use neurond::base::{AccountId, KeyId, Millis, ModelId, Neurons, RequestId};
use neurond::ledger::{Claim, Counts, Ledger, Plan, Reservation, Settings, Span, Spent, Technique, Ticket, Window};
use neurond::task::Usage;

/// Entries that are read at a start.
const ENTRIES: u64 = 1_000_000;

/// One account's calls: two windows, one of which is a budget.
struct Caller {
    account: AccountId,
    windows: Vec<Window>,
    spent: Spent,
    now: Millis,
}

impl Caller {
    fn new(number: u128) -> Self {
        let window = |id, span, technique, counts| {
            let rule = Arc::from("rule");
            Window { id: number << 8 | id, rule, limit: u64::MAX, span, technique, counts }
        };
        let usage = Usage { prompt_tokens: 900, cached_tokens: 512, completion_tokens: 200, ..Usage::default() };
        let neurons = Neurons::from_micro(67_629_000);
        Self {
            account: AccountId::new(format!("{number:032x}")),
            windows: vec![
                window(1, Span::Millis(60_000), Technique::Sliding, Counts::Requests),
                window(2, Span::Month, Technique::Fixed, Counts::Cost),
            ],
            spent: Spent {
                key: Some(KeyId::new("production")),
                gateway: "default".into(),
                provider: "workers-ai".into(),
                model: ModelId::new("@cf/meta/llama-3.3-70b-instruct-fp8-fast"),
                usage,
                neurons,
                cost: neurons,
            },
            now: Millis::now(),
        }
    }

    fn reserve(&self, ledger: &Ledger, request: u64) -> Reservation {
        let claim = Claim {
            request: RequestId::from_number(request.into()),
            account: &self.account,
            plan: Plan::PAID,
            windows: &self.windows,
            tokens: 1100,
            neurons: self.spent.neurons,
            cost: self.spent.cost,
            is_once: false,
        };
        loop {
            // While the queue is full: the journal is slower than this loop.
            match ledger.reserve(&claim, self.now) {
                Ok(reservation) => return reservation,
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn call(&self, ledger: &Ledger, request: u64) -> Ticket {
        self.reserve(ledger, request).settle(&self.spent, self.now)
    }
}

fn settings(folder: &Path) -> Settings {
    Settings { folder: Some(folder.to_path_buf()), segment_bytes: u64::MAX, ..Settings::default() }
}

/// How long so many calls of each of the callers take, each on a thread of its own.
fn together(ledger: &Ledger, callers: &[Caller], calls: u64) -> Duration {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for caller in callers {
            scope.spawn(move || (0..calls).for_each(|request| drop(black_box(caller.call(ledger, request)))));
        }
    });
    begin.elapsed()
}

fn ledger(c: &mut Criterion) {
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements(1));

    let memory = Ledger::start(Settings::default()).expect("a ledger in memory");
    let caller = Caller::new(1);
    group.bench_function("reserve, release", |b| b.iter(|| drop(black_box(caller.reserve(&memory, 1)))));

    for threads in [1, 2] {
        let callers: Vec<_> = (0..threads).map(Caller::new).collect();
        group.bench_function(format!("reserve, settle: {threads} threads, each"), |b| {
            b.iter_custom(|calls| together(&memory, &callers, calls));
        });
    }

    let folder = tempfile::tempdir().expect("a folder");
    let disk = Ledger::start(settings(folder.path())).expect("a ledger on disk");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    group.bench_function("reserve, settle, until all is on disk", |b| {
        b.iter_custom(|calls| {
            let begin = Instant::now();
            (0..calls).for_each(|request| drop(caller.call(&disk, request)));
            runtime.block_on(disk.flush()).expect("a disk that keeps");
            begin.elapsed()
        });
    });
    group.bench_function("one settlement, until it is on disk", |b| {
        b.iter(|| runtime.block_on(caller.call(&disk, 1).durable()).expect("a disk that keeps"));
    });

    let folder = tempfile::tempdir().expect("a folder");
    let disk = Ledger::start(settings(folder.path())).expect("a ledger on disk");
    let callers: Vec<_> = (0..100).map(Caller::new).collect();
    (0..ENTRIES).for_each(|request| drop(callers[request as usize % callers.len()].call(&disk, request)));
    runtime.block_on(disk.flush()).expect("a disk that keeps");
    let log = std::fs::read(folder.path().join("00000001.wal")).expect("a segment");
    group.throughput(Throughput::Elements(ENTRIES)).sample_size(10);
    group.bench_function("start", |b| {
        b.iter_custom(|starts| {
            let start = |_| {
                let folder = tempfile::tempdir().expect("a folder");
                std::fs::write(folder.path().join("00000001.wal"), &log).expect("a disk");
                let begin = Instant::now();
                let ledger = Ledger::start(settings(folder.path())).expect("a ledger on disk");
                let took = begin.elapsed();
                assert_eq!(ledger.health().last, ENTRIES);
                runtime.block_on(ledger.close()).expect("a disk that keeps");
                took
            };
            (0..starts).map(start).sum()
        });
    });
    group.finish();
}

criterion_group!(benches, ledger);
criterion_main!(benches);
