use std::collections::HashSet;
use std::path::Path;

use bytes::Bytes;

use super::*;
use crate::base::{KeyId, Millis, Neurons, RequestId};
use crate::logs::query::{Filter, Match, Number, Order, Test, Text};
use crate::logs::record::CacheUse;
use crate::task::{Task, Usage};

/// A record of that moment; what it is like follows from its number.
pub(in crate::logs) fn record(at: u64, number: u64) -> Record {
    let body = |text: String| Body { size: text.len() as u64, kept: Bytes::from(text) };
    Record {
        id: Some(LogId::at(Millis(at))),
        request: RequestId::from_number(number.into()),
        at: Millis(at),
        account: AccountId::new("acc"),
        key: Some(KeyId::new("key")),
        gateway: "gw".into(),
        provider: ["anthropic", "openai", "google"][number as usize % 3].into(),
        model: format!("model-{}", number % 7).into(),
        task: Some(Task::TextGeneration),
        path: "v1/chat/completions".into(),
        status: if number.is_multiple_of(5) { 500 } else { 200 },
        success: !number.is_multiple_of(5),
        cache: if number.is_multiple_of(4) { CacheUse::Hit } else { CacheUse::Miss },
        duration_us: 12_344 + number,
        first_byte_us: Some(3_000),
        usage: (!number.is_multiple_of(10)).then(|| Usage {
            prompt_tokens: 10 + number as u32,
            completion_tokens: 5,
            ..Usage::default()
        }),
        cost: Neurons::from_micro(number * 1_000_000),
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 0,
        request_type: "http".into(),
        request_content_type: Some("application/json".into()),
        response_content_type: Some("application/json".into()),
        metadata: Some(format!(r#"{{"user":"u{}","n":{number}}}"#, number % 11).into()),
        trace: None,
        zero_retention: false,
        event: Some(format!("event-{number}").into()),
        user_agent: None,
        authenticated: true,
        stored_key: false,
        attempts: "openai:200".into(),
        why: None,
        findings: Vec::new(),
        asked: body(format!("{{\"question\":\"number {number} of many\"}}")),
        answered: body(format!("{{\"answer\":\"{}\"}}", number * number)),
    }
}

pub(super) fn settings(folder: &Path) -> Settings {
    // Nothing happens by itself.
    Settings { tend: Duration::from_secs(3600), commit: Duration::from_millis(1), ..Settings::new(folder) }
}

/// Records of numbers, a second apart.
#[allow(clippy::vec_box)]
pub(super) fn records(numbers: std::ops::Range<u64>) -> Vec<Box<Record>> {
    numbers.map(|number| Box::new(record(1_700_000_000_000 + number * 1000, number))).collect()
}

impl Store {
    pub(super) fn account() -> AccountId {
        AccountId::new("acc")
    }

    pub(super) fn all(&self, query: &Query) -> Page {
        self.list(&Self::account(), "gw", query).unwrap()
    }

    /// Which numbers a query means, in order.
    pub(super) fn numbers(&self, query: &Query) -> Vec<u64> {
        self.all(query).records.iter().map(|stored| stored.record.duration_us - 12_344).collect()
    }

    /// Makes the open segment a full one, and waits until it is.
    fn roll(&self) {
        let inner = &self.0.inner;
        let mut writer = inner.settle().unwrap();
        inner.rotate(&mut writer).unwrap();
        inner.wait(&mut writer).unwrap();
    }

    fn tend(&self, now: u64) {
        self.0.inner.tend(Millis(now)).unwrap();
    }
}

pub(super) fn query(raw: &str) -> Query {
    Query::parse(raw).unwrap()
}

/// Forty records: sixteen in a full segment, as many in another, the rest in the open one.
#[allow(clippy::vec_box)]
pub(super) fn forty(folder: &Path) -> (Store, Vec<Box<Record>>) {
    let store = Store::open(settings(folder)).unwrap();
    let records = records(0..40);
    for (at, records) in records.chunks(16).enumerate() {
        if at > 0 {
            store.roll();
        }
        assert_eq!(store.append(records).unwrap(), Appended { stored: records.len() as u64, ..Appended::default() });
    }
    (store, records)
}

#[test]
fn what_was_appended_is_read_back_as_it_was_from_every_kind_of_segment() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    let check = |store: &Store| {
        for record in &records {
            let id = record.id.unwrap();
            let stored = store.get(&Store::account(), "gw", id).unwrap().unwrap();
            assert_eq!(stored, Stored { record: (**record).clone(), feedback: None, score: None });
            let (body, kind) = store.request(&Store::account(), "gw", id).unwrap().unwrap();
            assert_eq!((body, kind.as_deref()), (record.asked.clone(), Some("application/json")));
            assert_eq!(store.response(&Store::account(), "gw", id).unwrap().unwrap().0, record.answered);
            assert_eq!(store.get(&Store::account(), "other", id).unwrap(), None);
            assert_eq!(store.get(&AccountId::new("other"), "gw", id).unwrap(), None);
        }
        let page = store.all(&query("per_page=1000"));
        let mut newest: Vec<Record> = records.iter().rev().map(|record| (**record).clone()).collect();
        newest.iter_mut().for_each(|record| {
            record.asked.kept = Bytes::new();
            record.answered.kept = Bytes::new();
        });
        assert_eq!(page.records.into_iter().map(|stored| stored.record).collect::<Vec<_>>(), newest);
        assert_eq!(page.total_count, 40);
        assert_eq!(store.status().records, 40);
    };
    check(&store);
    drop(store);
    check(&Store::open(settings(folder.path())).unwrap());
    assert_eq!(store_get_unknown(folder.path()), None);
}

fn store_get_unknown(folder: &Path) -> Option<Stored> {
    Store::open(settings(folder)).unwrap().get(&Store::account(), "gw", LogId::at(Millis(5))).unwrap()
}

#[test]
fn filters_orders_and_pages_mean_what_a_plain_loop_over_the_records_means() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    type Means = fn(&Record) -> bool;
    let rows: Vec<(&str, Means)> = vec![
        ("provider=openai", |record| &*record.provider == "openai"),
        ("filters.key=provider&filters.operator=neq&filters.value=openai&filters.value=google", |record| {
            &*record.provider == "anthropic"
        }),
        ("filters.key=provider&filters.operator=contains&filters.value=oo", |record| &*record.provider == "google"),
        ("filters.key=provider&filters.operator=gt&filters.value=google", |record| &*record.provider == "openai"),
        ("filters.key=provider&filters.operator=lt&filters.value=google", |record| &*record.provider == "anthropic"),
        ("filters.key=provider&filters.value=nobody", |_| false),
        ("filters.key=provider&filters.operator=neq&filters.value=nobody", |_| true),
        ("filters.key=event_id&filters.value=event-17", |record| record.event.as_deref() == Some("event-17")),
        ("filters.key=event_id&filters.operator=contains&filters.value=-3", |record| {
            record.event.as_deref().unwrap().contains("-3")
        }),
        ("filters.key=user_agent&filters.value=x", |_| false),
        ("filters.key=user_agent&filters.operator=neq&filters.value=x", |_| true),
        ("filters.key=status_code&filters.operator=gt&filters.value=499", |record| record.status == 500),
        ("success=false&cached=true", |record| !record.success && record.cache.is_hit()),
        ("filters.key=tokens_in&filters.operator=gt&filters.value=30", |record| {
            record.usage.is_some_and(|usage| usage.prompt_tokens > 30)
        }),
        ("filters.key=tokens_in&filters.operator=neq&filters.value=31", |record| {
            record.usage.is_none_or(|usage| usage.prompt_tokens != 31)
        }),
        ("filters.key=tokens&filters.value=20&filters.value=36", |record| {
            record.usage.is_some_and(|usage| [20, 36].contains(&usage.total_tokens()))
        }),
        ("min_cost=0.00033", |record| record.cost.micro() >= 30_000_000),
        ("filters.key=duration&filters.operator=lt&filters.value=12.354", |record| record.duration_us < 12_354),
        ("filters.key=metadata.key&filters.value=user", |_| true),
        ("filters.key=metadata.value&filters.value=u3", |record| record.duration_us % 11 == (12_344 + 3) % 11),
        ("filters.key=metadata.value&filters.value=33", |record| record.duration_us == 12_344 + 33),
        ("filters.key=metadata.key&filters.operator=neq&filters.value=user", |_| false),
        ("start_date=2023-11-14T22:13:30Z&end_date=2023-11-14T22:13:50Z", |record| {
            (1_700_000_010_000..=1_700_000_030_000).contains(&record.at.0)
        }),
        ("filters.key=id&filters.operator=lt&filters.value=2023-11-14T22:13:30Z", |record| {
            record.at.0 < 1_700_000_010_000
        }),
        ("search=NUMBER+7+OF", |record| record.duration_us == 12_344 + 7),
        ("search=Model-3", |record| &*record.model == "model-3"),
        ("search=no+such+thing", |_| false),
        ("search=question&provider=google", |record| &*record.provider == "google"),
    ];
    type Key = fn(&Record) -> (u64, String);
    let orders: [(&str, Key); 6] = [
        ("created_at", |record| (record.at.0, String::new())),
        ("model", |record| (0, record.model.to_string())),
        ("provider", |record| (0, record.provider.to_string())),
        ("cost", |record| (record.cost.micro(), String::new())),
        ("success", |record| (record.success.into(), String::new())),
        ("tokens", |record| (record.usage.map_or(0, |usage| 1 + u64::from(usage.total_tokens())), String::new())),
    ];
    for (raw, means) in rows {
        for (order, key) in orders {
            for direction in ["asc", "desc"] {
                let mut wanted: Vec<&Record> =
                    records.iter().map(|record| &**record).filter(|record| means(record)).collect();
                wanted.sort_by_key(|record| (key(record), record.at));
                if direction == "desc" {
                    wanted.reverse();
                }
                let wanted: Vec<u64> = wanted.iter().map(|record| record.duration_us - 12_344).collect();
                let mut paged = Vec::new();
                for page in 1..=4 {
                    let raw = format!("{raw}&order_by={order}&order_by_direction={direction}&per_page=15&page={page}");
                    assert_eq!(store.all(&query(&raw)).total_count, wanted.len() as u64, "{raw}");
                    paged.extend(store.numbers(&query(&raw)));
                }
                assert_eq!(paged, wanted, "{raw} by {order} {direction}");
            }
        }
        assert_eq!(
            store.count(&Store::account(), "gw", &query(raw)).unwrap().total_count,
            store.all(&query(raw)).total_count
        );
    }
    let id = records[20].id.unwrap();
    assert_eq!(store.numbers(&query(&format!("filters.key=id&filters.value={id}"))), [20]);
    let part = &id.to_string()[12..];
    assert_eq!(store.numbers(&query(&format!("filters.key=id&filters.operator=contains&filters.value={part}"))), [20]);
    assert_eq!(store.numbers(&query(&format!("search={part}"))), [20]);
    assert_eq!(store.list(&Store::account(), "other", &Query::default()).unwrap().total_count, 0);
}

#[test]
fn least_and_most_are_those_of_the_records_that_are_meant() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = forty(folder.path());
    let meta = store.all(&query("meta_info=true&provider=openai&per_page=1")).meta_info.unwrap();
    // 1, 4, 7 … 37, and 10 has no tokens.
    let sum = (1..40).step_by(3).sum::<u64>();
    let cost = Measure { count: 13, min: 1_000_000, max: 37_000_000, sum: u128::from(sum) * 1_000_000 };
    assert_eq!(meta.cost, Some(cost));
    assert_eq!(meta.duration.map(|measure| (measure.min, measure.max)), Some((12_345, 12_381)));
    let sum = u128::from(sum - 10 + 12 * 10);
    assert_eq!(meta.tokens_in, Some(Measure { count: 12, min: 11, max: 47, sum }));
    assert_eq!(meta.total_tokens, Some(Measure { count: 12, min: 16, max: 52, sum: sum + 60 }));
    let none = store.all(&query("meta_info=true&provider=nobody")).meta_info.unwrap();
    assert_eq!(none, MetaInfo::default());
}

#[test]
fn a_search_that_may_not_read_on_says_so_and_has_looked_at_the_newest() {
    let folder = tempfile::tempdir().unwrap();
    drop(forty(folder.path()));
    let store = Store::open(Settings { search_bytes: 1, ..settings(folder.path()) }).unwrap();
    let page = store.all(&query("search=number"));
    assert_eq!((page.total_count, page.is_complete), (8, false), "the block of the newest");
    assert!(store.all(&query("search=openai&provider=openai")).is_complete, "names are no bodies");
}

#[test]
fn feedback_score_and_metadata_are_changed_in_every_kind_of_segment_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, records) = forty(folder.path());
    let patch = |store: &Store, at: usize, patch: Patch| {
        store.patch(&Store::account(), "gw", records[at].id.unwrap(), &patch).unwrap()
    };
    for at in [3, 20, 39] {
        assert!(patch(&store, at, Patch { feedback: Some(Some(-1)), ..Patch::default() }));
        assert!(patch(&store, at, Patch { score: Some(Some(100)), ..Patch::default() }));
        assert!(patch(&store, at, Patch { metadata: Some(Some(r#"{"team":"red"}"#.into())), ..Patch::default() }));
    }
    assert!(patch(&store, 4, Patch { feedback: Some(Some(1)), score: Some(Some(0)), metadata: None }));
    assert!(patch(&store, 4, Patch { score: Some(None), ..Patch::default() }));
    assert!(patch(&store, 5, Patch { metadata: Some(None), ..Patch::default() }));
    assert!(!store.patch(&Store::account(), "gw", LogId::at(Millis(1)), &Patch::default()).unwrap());
    for turn in 0..3 {
        assert_eq!(store.all(&Query::default()).total_count, 40);
        assert_eq!(store.numbers(&query("feedback=-1")), [39, 20, 3], "turn {turn}");
        assert_eq!(store.numbers(&query("filters.key=feedback&filters.operator=gt&filters.value=0")), [4]);
        assert_eq!(store.numbers(&query("filters.key=metadata.value&filters.value=red")), [39, 20, 3]);
        assert_eq!(
            store.numbers(&query("filters.key=metadata.key&filters.operator=neq&filters.value=user")),
            [39, 20, 5, 3]
        );
        let by_feedback = store.numbers(&query("order_by=feedback&per_page=1000"));
        assert_eq!((by_feedback[0], &by_feedback[37..]), (4, &[39, 20, 3][..]));
        for at in [3, 20, 39] {
            let stored = store.get(&Store::account(), "gw", records[at].id.unwrap()).unwrap().unwrap();
            assert_eq!((stored.feedback, stored.score), (Some(-1), Some(100)));
            assert_eq!(stored.record.metadata.as_deref(), Some(r#"{"team":"red"}"#));
            assert_eq!(stored.record.asked, records[at].asked, "its bodies too");
        }
        match turn {
            0 => {
                drop(store);
                store = Store::open(settings(folder.path())).unwrap();
            }
            _ => store.roll(),
        }
    }
}

#[test]
fn what_is_deleted_is_gone_from_every_answer_and_after_a_start() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, records) = forty(folder.path());
    let delete = |store: &Store, raw: &str| store.delete(&Store::account(), "gw", &query(raw)).unwrap();
    assert_eq!(delete(&store, "provider=openai"), 13);
    assert_eq!(delete(&store, "provider=openai"), 0);
    assert_eq!(delete(&store, "limit=3&order_by=cost&order_by_direction=desc"), 3);
    let gone = |number: &u64| number % 3 == 1 || [39, 38, 36].contains(number);
    let left: Vec<u64> = (0..40).rev().filter(|number| !gone(number)).collect();
    for turn in 0..3 {
        assert_eq!(store.numbers(&query("per_page=1000")), left, "turn {turn}");
        assert_eq!(store.all(&query("per_page=1")).total_count, left.len() as u64);
        assert_eq!(store.status().records, left.len() as u64);
        assert_eq!(store.get(&Store::account(), "gw", records[1].id.unwrap()).unwrap(), None);
        assert_eq!(store.get(&Store::account(), "gw", records[39].id.unwrap()).unwrap(), None);
        match turn {
            0 => {
                drop(store);
                store = Store::open(settings(folder.path())).unwrap();
            }
            _ => store.roll(),
        }
    }
    assert!(store.delete(&Store::account(), "gw", &query("search=x")).is_err());
    assert_eq!(delete(&store, ""), left.len() as u64);
    store.tend(0);
    assert_eq!(store.status(), Status { records: 0, bytes: 0, segments: 0 }, "empty segments are dropped");
}

#[test]
fn a_segment_of_which_more_than_half_is_dead_is_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    store
        .patch(&Store::account(), "gw", records[2].id.unwrap(), &Patch { feedback: Some(Some(1)), ..Patch::default() })
        .unwrap();
    store
        .delete(
            &Store::account(),
            "gw",
            &query("limit=12&order_by_direction=asc&filters.key=cost&filters.operator=gt&filters.value=0.000022"),
        )
        .unwrap();
    let before = store.status();
    let names = || {
        std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect::<HashSet<_>>()
    };
    assert!(names().contains("00000001.0.columns"));
    store.tend(0);
    assert!(!names().contains("00000001.0.log") && names().contains("00000001.1.columns"), "{:?}", names());
    let check = |store: &Store| {
        assert_eq!(store.status().records, before.records);
        assert!(store.status().bytes < before.bytes);
        let wanted: Vec<u64> = (0..3).chain(15..40).rev().collect();
        assert_eq!(store.numbers(&query("per_page=1000")), wanted);
        assert_eq!(store.numbers(&query("feedback=1")), [2]);
        let stored = store.get(&Store::account(), "gw", records[2].id.unwrap()).unwrap().unwrap();
        assert_eq!(stored.record, *records[2]);
    };
    check(&store);
    drop(store);
    // A rewrite that a crash cut short counts for nothing.
    std::fs::write(folder.path().join("00000002.1.log"), b"half").unwrap();
    check(&Store::open(settings(folder.path())).unwrap());
    assert!(!names().contains("00000002.1.log"));
}

#[test]
fn gateways_keep_to_their_bounds_by_forgetting_or_by_stopping() {
    let folder = tempfile::tempdir().unwrap();
    let keep = |_: &AccountId, gateway: &str| Keep {
        records: 25,
        strategy: if gateway == "gw" { Strategy::DeleteOldest } else { Strategy::StopInserting },
    };
    let store = Store::open(Settings { keep: Arc::new(keep), ..settings(folder.path()) }).unwrap();
    for (at, numbers) in [0..16, 16..32, 32..40].into_iter().enumerate() {
        if at > 0 {
            store.roll();
        }
        let mut batch = records(numbers);
        store.append(&batch).unwrap();
        batch.iter_mut().for_each(|record| record.gateway = "other".into());
        let refused = [0, 7, 8][at];
        let appended = store.append(&batch).unwrap();
        assert_eq!(appended, Appended { stored: batch.len() as u64 - refused, refused, oversized: 0 });
    }
    assert_eq!(store.all(&Query::default()).total_count, 40);
    store.tend(0);
    assert_eq!(store.numbers(&query("per_page=1000")), (15..40).rev().collect::<Vec<_>>());
    let other = store.list(&Store::account(), "other", &query("per_page=1&order_by_direction=asc")).unwrap();
    assert_eq!((other.total_count, other.records[0].record.duration_us), (25, 12_344));
}

#[test]
fn what_is_too_old_goes_row_by_row_and_what_is_too_much_by_whole_segments() {
    let folder = tempfile::tempdir().unwrap();
    drop(forty(folder.path()));
    let age = Settings { max_age: Some(Duration::from_secs(60)), ..settings(folder.path()) };
    let store = Store::open(age).unwrap();
    store.tend(1_700_000_060_000 + 20_500);
    assert_eq!(store.numbers(&query("per_page=1000")), (21..40).rev().collect::<Vec<_>>());
    store.tend(1_700_000_060_000 + 34_500);
    assert_eq!(store.numbers(&query("per_page=1000")), (35..40).rev().collect::<Vec<_>>(), "in the open segment too");
    drop(store);
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = forty(folder.path());
    let bytes = store.status().bytes;
    drop(store);
    let store = Store::open(Settings { max_bytes: bytes - 1, ..settings(folder.path()) }).unwrap();
    store.tend(0);
    assert_eq!(store.numbers(&query("per_page=1000")), (16..40).rev().collect::<Vec<_>>());
    assert_eq!(store.status().records, 24);
    store.tend(1_700_000_000_000 + 3 * 86_400_000);
    store.0.inner.settle().map(drop).unwrap();
    assert_eq!(store.status().segments, 2, "a segment of yesterday is sealed");
}

#[test]
fn records_without_an_id_or_of_more_than_ten_megabytes_are_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    let mut batch = records(0..4);
    batch[0].id = None;
    batch[1].asked.kept = vec![b'x'; LONGEST + 1].into();
    batch[2].asked.kept = vec![b'x'; LONGEST / 2].into();
    assert_eq!(store.append(&batch).unwrap(), Appended { stored: 2, refused: 0, oversized: 1 });
    assert_eq!(store.numbers(&Query::default()), [3, 2]);
    let stored = store.get(&Store::account(), "gw", batch[2].id.unwrap()).unwrap().unwrap();
    assert_eq!(stored.record.asked, batch[2].asked);
}

#[test]
fn a_full_segment_is_sealed_by_itself_and_nobody_notices() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(Settings { segment_bytes: 2_000, ..settings(folder.path()) }).unwrap();
    let mut many = records(0..2_000);
    for batch in many.chunks(10) {
        store.append(batch).unwrap();
        let count = store.all(&query("per_page=1")).total_count;
        assert_eq!(count, batch.last().unwrap().duration_us - 12_344 + 1);
    }
    assert!(store.status().segments > 50, "{:?}", store.status());
    assert_eq!(
        store.numbers(&query("per_page=1000&page=2&order_by=created_at&order_by_direction=asc")),
        (1000..2000).collect::<Vec<_>>()
    );
    many.clear();
}

#[test]
fn a_folder_serves_one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    let error = Store::open(settings(folder.path())).err().unwrap();
    assert!(error.message().contains("another process"), "{error}");
    drop(store);
    Store::open(settings(folder.path())).unwrap();
}

#[test]
fn queries_and_changes_go_on_while_segments_fill_and_are_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        Store::open(Settings { segment_bytes: 30_000, tend: Duration::from_millis(1), ..settings(folder.path()) })
            .unwrap();
    let many = records(0..6_000);
    // Also where what is appended panics: the scope waits for whoever asks.
    let appending = std::sync::Arc::new(());
    let is_appending = std::sync::Arc::downgrade(&appending);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = 0;
            while is_appending.strong_count() > 0 {
                let page = store
                    .all(&query("order_by=model&filters.key=provider&filters.operator=neq&filters.value=x&per_page=5"));
                assert!(page.total_count >= last, "{} after {last}", page.total_count);
                last = page.total_count;
            }
        });
        let _appending = appending;
        for (at, batch) in many.chunks(100).enumerate() {
            store.append(batch).unwrap();
            if at % 10 == 0 {
                let id = batch[50].id.unwrap();
                assert!(
                    store
                        .patch(&Store::account(), "gw", id, &Patch { feedback: Some(Some(1)), ..Patch::default() })
                        .unwrap()
                );
            }
        }
    });
    assert_eq!(store.all(&query("feedback=1")).total_count, 6);
    assert_eq!(store.all(&Query::default()).total_count, 6_000);
    let mask = Filter { test: Test::Text(Text::Provider, vec![Match::Is("openai".into())]), is_negated: false };
    let query = Query { filters: vec![mask], order: Order::Number(Number::Cost), ..Query::default() };
    assert_eq!(store.all(&query).total_count, 2_000);
}
