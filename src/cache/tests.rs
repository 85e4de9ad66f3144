//! The cache as its callers see it.

mod disk;
mod fills;
mod fleet;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;

use crate::base::{Error, Millis};
use crate::cache::{
    Cache, Entry, FailedAnswer, FillTicket, Follower, Found, Head, Key, Lead, Material, RawKey, Scope, Settings, Stats,
    Unwanted,
};

const KEEP: Option<Duration> = Some(Duration::from_secs(3600));
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn settings(folder: Option<&Path>) -> Settings {
    Settings {
        memory_bytes: 16 * MIB,
        disk_bytes: 16 * MIB,
        max_entries: 1000,
        max_entry_bytes: MIB,
        folder: folder.map(Path::to_path_buf),
        fleet: None,
    }
}

fn memory() -> Cache {
    Cache::start(settings(None)).unwrap()
}

fn material(body: &str) -> Material<'_> {
    Material {
        account: Some("a"),
        gateway: Scope::gateway("a", "g"),
        common: None,
        provider: "custom-p",
        provider_scope: Some(Scope::provider("a", "p")),
        method: "POST",
        endpoint: "v1/chat/completions",
        auth: &[b"k"],
        body: body.as_bytes(),
        custom: None,
    }
}

fn keys(body: &str) -> (RawKey, Key) {
    let material = material(body);
    let raw = material.raw();
    (raw, material.key(&raw))
}

fn key(body: &str) -> Key {
    keys(body).1
}

fn head() -> Head {
    Head { status: 200, headers: vec![("content-type".into(), Bytes::from("text/event-stream"))] }
}

async fn ticket(cache: &Cache, key: Key) -> FillTicket {
    match cache.lookup(key, Millis::now()).await {
        Found::Fill(ticket) => ticket,
        other => panic!("{}", name(&other)),
    }
}

async fn follower(cache: &Cache, key: Key) -> Follower {
    match cache.lookup(key, Millis::now()).await {
        Found::Follow(follower) => follower,
        other => panic!("{}", name(&other)),
    }
}

async fn hit(cache: &Cache, key: Key) -> Arc<Entry> {
    match cache.lookup(key, Millis::now()).await {
        Found::Hit(entry) => entry,
        other => panic!("{}", name(&other)),
    }
}

/// What a lookup finds, in a word. What is found is dropped.
async fn look(cache: &Cache, key: Key, now: Millis) -> &'static str {
    name(&cache.lookup(key, now).await)
}

fn name(found: &Found) -> &'static str {
    match found {
        Found::Hit(_) => "hit",
        Found::Fill(_) => "fill",
        Found::Follow(_) => "follow",
        Found::Off => "off",
    }
}

async fn answer(mut ticket: FillTicket, chunks: &[&'static str]) {
    ticket.begin(head(), KEEP);
    for chunk in chunks {
        ticket.push(Bytes::from_static(chunk.as_bytes())).await.unwrap();
    }
    ticket.finish();
}

async fn store(cache: &Cache, body: &str, chunks: &[&'static str]) {
    answer(ticket(cache, key(body)).await, chunks).await;
    // Messages are handled in their order: what was stored is there when this is answered.
    cache.stats().await;
}

async fn store_large(cache: &Cache, body: &str, length: u64) {
    let mut ticket = ticket(cache, key(body)).await;
    ticket.begin(head(), KEEP);
    ticket.push(large(body, length)).await.unwrap();
    ticket.finish();
    cache.stats().await;
}

/// Bytes that say whose they are.
fn large(body: &str, length: u64) -> Bytes {
    body.as_bytes().iter().copied().cycle().take(length as usize).collect()
}

/// All chunks, and whether they are the whole answer.
async fn read(mut follower: Follower) -> (Vec<Bytes>, bool) {
    let mut chunks = Vec::new();
    while let Some(chunk) = follower.next().await {
        match chunk {
            Ok(chunk) => chunks.push(chunk),
            Err(_) => return (chunks, false),
        }
    }
    (chunks, true)
}

async fn begins(follower: &mut Follower) -> String {
    match follower.head().await {
        Lead::Head(head) => head.status.to_string(),
        Lead::Lead(_) => "lead".to_owned(),
        Lead::Failed(FailedAnswer::Answer { head, .. }) => format!("failed {}", head.status),
        Lead::Failed(FailedAnswer::Error(error)) => format!("failed {error}"),
        Lead::Failed(FailedAnswer::Abandoned) => "abandoned".to_owned(),
    }
}

fn failed(message: &str) -> FailedAnswer {
    FailedAnswer::Error(Error::internal(message))
}

async fn nothing_is_left(cache: &Cache) -> Stats {
    let stats = cache.stats().await;
    assert_eq!((stats.fills_open, stats.followers, stats.filling_bytes), (0, 0, 0), "{stats:?}");
    stats
}

#[test]
fn what_callers_hold_may_go_from_thread_to_thread() {
    fn check<T: Send + 'static>() {}
    check::<Cache>();
    check::<FillTicket>();
    check::<Follower>();
    check::<Found>();
    check::<Lead>();
}

#[actix::test]
async fn a_stored_answer_is_served_as_it_came_and_without_the_actor_once_its_bytes_are_known() {
    let cache = memory();
    let (raw, first) = keys(r#"{"a":1,"b":2}"#);
    let now = Millis::now();
    assert!(cache.peek(&raw, now).is_none());
    store(&cache, r#"{"a":1,"b":2}"#, &["data: 1\n\n", "data: 2", "\n\n"]).await;
    let entry = cache.peek(&raw, now).unwrap();
    assert_eq!(**entry.head(), head());
    assert_eq!(entry.head().header("Content-Type").unwrap(), "text/event-stream");
    assert_eq!(entry.body(), "data: 1\n\ndata: 2\n\n");
    assert_eq!(entry.chunks().collect::<Vec<_>>(), ["data: 1\n\n", "data: 2", "\n\n"]);
    let (other_raw, other) = keys(r#"{"b":2, "a":1}"#);
    assert!(cache.peek(&other_raw, now).is_none());
    assert_eq!(look(&cache, other, now).await, "hit");
    cache.stats().await;
    assert!(cache.peek(&other_raw, now).is_some());
    assert_eq!(look(&cache, first, now).await, "hit");
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.hits, stats.misses, stats.stores, stats.entries), (4, 1, 1, 1));
    assert!(stats.memory_bytes > 0 && stats.disk_bytes == 0 && !stats.is_disk_on);
}

#[actix::test]
async fn an_entry_is_served_until_its_time_and_then_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    for folder in [None, Some(folder.path())] {
        let cache = Cache::start(settings(folder)).unwrap();
        store(&cache, "x", &["a"]).await;
        let (raw, key) = keys("x");
        let entry = hit(&cache, key).await;
        assert_eq!(entry.expires().0 - entry.created().0, 3_600_000);
        let (last, over) = (Millis(entry.expires().0 - 1), entry.expires());
        assert!(cache.peek(&raw, last).is_some() && cache.peek(&raw, over).is_none());
        assert_eq!(look(&cache, key, last).await, "hit");
        assert_eq!(look(&cache, key, over).await, "fill");
        let stats = nothing_is_left(&cache).await;
        assert_eq!((stats.entries, stats.expired, stats.memory_bytes, stats.disk_bytes), (0, 1, 0, 0));
    }
}

#[actix::test]
async fn a_refresh_replaces_the_entry_and_is_nobody_elses() {
    let cache = memory();
    let (raw, key) = keys("x");
    store(&cache, "x", &["old"]).await;
    let (first, second) = (cache.refresh(key), cache.refresh(key));
    let mut reader = first.follow();
    assert_eq!(hit(&cache, key).await.body(), "old");
    answer(second, &["second"]).await;
    cache.stats().await;
    assert_eq!(cache.peek(&raw, Millis::now()).unwrap().body(), "second");
    first.fail(failed("refused"));
    assert_eq!(begins(&mut reader).await, "failed refused");
    drop(reader);
    assert_eq!(hit(&cache, key).await.body(), "second");
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.entries, stats.stores, stats.coalesced), (1, 2, 0));
}

#[actix::test]
async fn a_purge_counts_at_once_for_entries_and_for_fills_under_way() {
    let scopes = [Scope::gateway("a", "g"), Scope::provider("a", "p"), Scope::gateway("a", "other")];
    for (at, scope) in scopes.into_iter().enumerate() {
        let cache = memory();
        store(&cache, "x", &["old"]).await;
        let under_way = ticket(&cache, key("y")).await;
        cache.purge(scope);
        let is_purged = at < 2;
        assert_eq!(cache.peek(&keys("x").0, Millis::now()).is_none(), is_purged);
        let found = [look(&cache, key("x"), Millis::now()).await, look(&cache, key("y"), Millis::now()).await];
        assert_eq!(found, if is_purged { ["fill", "fill"] } else { ["hit", "follow"] });
        answer(under_way, &["late"]).await;
        cache.stats().await;
        assert_eq!(look(&cache, key("y"), Millis::now()).await, if is_purged { "fill" } else { "hit" });
        assert_eq!(nothing_is_left(&cache).await.entries, if is_purged { 0 } else { 2 });
        store(&cache, "z", &["new"]).await;
        assert_eq!(hit(&cache, key("z")).await.body(), "new");
    }
}
