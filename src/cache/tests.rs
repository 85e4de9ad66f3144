//! The cache as its callers see it.

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
    }
}

fn memory() -> Cache {
    Cache::start(settings(None)).unwrap()
}

fn material(body: &str) -> Material<'_> {
    Material {
        account: Some("a"),
        gateway: Scope::gateway("a", "g"),
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
async fn a_hundred_at_once_ask_upstream_once_and_late_ones_hear_all() {
    let cache = memory();
    let found = join_all((0..100).map(|_| cache.lookup(key("x"), Millis::now()))).await;
    let (mut tickets, mut followers) = (Vec::new(), Vec::new());
    for found in found {
        match found {
            Found::Fill(ticket) => tickets.push(ticket),
            Found::Follow(follower) => followers.push(follower),
            other => panic!("{}", name(&other)),
        }
    }
    assert_eq!((tickets.len(), followers.len()), (1, 99));
    let mut ticket = tickets.pop().unwrap();
    followers.push(ticket.follow());
    assert_eq!(cache.stats().await.fills_open, 1);
    let readers = actix::spawn(join_all(followers.into_iter().map(|mut follower| async move {
        assert_eq!(begins(&mut follower).await, "200");
        read(follower).await
    })));
    ticket.begin(head(), KEEP);
    ticket.push(Bytes::from("one")).await.unwrap();
    let late = follower(&cache, key("x")).await;
    ticket.push(Bytes::new()).await.unwrap();
    ticket.push(Bytes::from("two")).await.unwrap();
    ticket.finish();
    let whole = (vec![Bytes::from("one"), Bytes::from("two")], true);
    assert_eq!(read(late).await, whole);
    assert!(readers.await.unwrap().iter().all(|read| *read == whole));
    assert_eq!(look(&cache, key("x"), Millis::now()).await, "hit");
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.misses, stats.coalesced, stats.stores), (1, 100, 1));
}

#[actix::test]
async fn after_a_failure_one_of_those_who_wait_tries_again_and_a_second_is_for_all() {
    let cache = memory();
    let ticket = ticket(&cache, key("x")).await;
    let mut own = ticket.follow();
    let mut crowd = Vec::new();
    for _ in 0..9 {
        crowd.push(follower(&cache, key("x")).await);
    }
    let waiting: Vec<_> = crowd
        .into_iter()
        .map(|mut follower| {
            actix::spawn(async move {
                match follower.head().await {
                    Lead::Lead(ticket) => {
                        let head = Head { status: 503, headers: Vec::new() };
                        ticket.fail(FailedAnswer::Answer { head: head.into(), body: Bytes::from("busy") });
                        format!("led, {}", begins(&mut follower).await)
                    }
                    _ => begins(&mut follower).await,
                }
            })
        })
        .collect();
    ticket.fail(failed("refused"));
    assert_eq!(begins(&mut own).await, "failed refused");
    let mut ends: Vec<String> = join_all(waiting).await.into_iter().map(Result::unwrap).collect();
    ends.sort();
    assert_eq!(ends[8], "led, failed 503");
    assert!(ends[..8].iter().all(|end| end == "failed 503"), "{ends:?}");
    assert!(own.next().await.unwrap().is_err() && own.next().await.is_none());
    drop(own);
    assert_eq!(nothing_is_left(&cache).await.stores, 0);
    assert_eq!(look(&cache, key("x"), Millis::now()).await, "fill");
}

#[actix::test]
async fn a_second_attempt_answers_those_who_waited_and_is_stored() {
    let cache = memory();
    let ticket = ticket(&cache, key("x")).await;
    let (mut one, mut two) = (follower(&cache, key("x")).await, follower(&cache, key("x")).await);
    drop(ticket);
    let Lead::Lead(ticket) = one.head().await else { panic!("nobody leads") };
    answer(ticket, &["a", "b"]).await;
    for follower in [&mut one, &mut two] {
        assert_eq!(begins(follower).await, "200");
    }
    assert_eq!(read(one).await, (vec![Bytes::from("a"), Bytes::from("b")], true));
    drop(two);
    assert_eq!(hit(&cache, key("x")).await.body(), "ab");
    nothing_is_left(&cache).await;
}

#[actix::test]
async fn clients_that_leave_change_nothing_for_the_others() {
    let cache = memory();
    let mut ticket = ticket(&cache, key("x")).await;
    let own = ticket.follow();
    let stays = follower(&cache, key("x")).await;
    drop(follower(&cache, key("x")).await);
    ticket.begin(head(), KEEP);
    ticket.push(Bytes::from("one")).await.unwrap();
    drop(own);
    ticket.push(Bytes::from("two")).await.unwrap();
    assert_eq!(cache.stats().await.followers, 1);
    ticket.finish();
    assert_eq!(read(stays).await.0.concat(), b"onetwo");
    assert_eq!(hit(&cache, key("x")).await.body(), "onetwo");
    nothing_is_left(&cache).await;
}

#[actix::test]
async fn a_lookup_that_is_given_up_leaves_no_fill_and_costs_those_who_wait_no_attempt() {
    let cache = memory();
    // Begins with a lookup while the actor is busy, so that it cannot be answered at once.
    let begin = || {
        let (release, released) = std::sync::mpsc::channel::<()>();
        cache.occupy(move || drop(released.recv()));
        let mut lookup = Box::pin(cache.lookup(key("x"), Millis::now()));
        assert!((&mut lookup).now_or_never().is_none());
        drop(release);
        lookup
    };
    drop(begin());
    nothing_is_left(&cache).await;
    let lookup = begin();
    // The ticket is on its way when this one joins.
    let mut follower = follower(&cache, key("x")).await;
    drop(lookup);
    let mut other = self::follower(&cache, key("x")).await;
    let Lead::Lead(ticket) = follower.head().await else { panic!("nobody leads") };
    ticket.fail(failed("one"));
    let Lead::Lead(ticket) = other.head().await else { panic!("that was the first attempt that counted") };
    ticket.fail(failed("two"));
    assert_eq!([begins(&mut follower).await, begins(&mut other).await], ["failed one", "failed two"]);
    drop((follower, other));
    nothing_is_left(&cache).await;
}

#[actix::test]
async fn an_answer_that_breaks_off_is_an_error_to_its_readers_and_is_not_stored() {
    let cache = memory();
    for fails in [true, false] {
        let mut ticket = ticket(&cache, key("x")).await;
        let own = ticket.follow();
        let other = follower(&cache, key("x")).await;
        ticket.begin(head(), KEEP);
        ticket.push(Bytes::from("one")).await.unwrap();
        if fails {
            ticket.fail(failed("reset"))
        } else {
            drop(ticket)
        }
        for follower in [own, other] {
            assert_eq!(read(follower).await, (vec![Bytes::from("one")], false));
        }
        assert_eq!(nothing_is_left(&cache).await.stores, 0);
    }
}

#[actix::test]
async fn an_answer_that_grows_too_large_goes_on_for_its_readers_alone() {
    let cache = memory();
    let mut ticket = ticket(&cache, key("x")).await;
    let mut own = ticket.follow();
    ticket.begin(head(), KEEP);
    let part = large("x", MIB / 2);
    ticket.push(part.clone()).await.unwrap();
    let joined = follower(&cache, key("x")).await;
    ticket.push(part.clone()).await.unwrap();
    cache.stats().await;
    assert_eq!(look(&cache, key("x"), Millis::now()).await, "fill", "a new caller goes upstream");
    drop(joined);
    let writer = actix::spawn(async move {
        for _ in 0..20 {
            ticket.push(part.clone()).await.unwrap();
        }
        ticket
    });
    let mut bytes = 0;
    while bytes < 11 * MIB {
        bytes += own.next().await.unwrap().unwrap().len() as u64;
        let held = cache.stats().await.filling_bytes;
        assert!(held <= 2 * MIB + MIB / 2, "{held} bytes are held for a reader at {bytes}");
    }
    let mut ticket = writer.await.unwrap();
    drop(own);
    assert_eq!(ticket.push(Bytes::from("more")).await, Err(Unwanted));
    ticket.finish();
    assert_eq!(nothing_is_left(&cache).await.stores, 0);
}

#[actix::test]
async fn a_writer_waits_for_its_reader_and_a_reader_that_is_too_slow_is_cut_off() {
    let cache = memory();
    let mut ticket = ticket(&cache, key("x")).await;
    let (mut fast, mut slow) = (ticket.follow(), ticket.follow());
    ticket.begin(head(), None);
    let part = large("x", MIB);
    ticket.push(part.clone()).await.unwrap();
    ticket.push(Bytes::from("x")).await.unwrap();
    let mut waiting = Box::pin(ticket.push(part.clone()));
    assert!((&mut waiting).now_or_never().is_none());
    fast.next().await.unwrap().unwrap();
    waiting.await.unwrap();
    for _ in 0..3 {
        fast.next().await.unwrap().unwrap();
        ticket.push(part.clone()).await.unwrap();
    }
    let error = slow.next().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), crate::base::Kind::Aborted);
    assert!(slow.next().await.is_none());
    // A reader that goes away is not waited for either.
    let mut waiting = Box::pin(async { while ticket.push(part.clone()).await.is_ok() {} });
    assert!((&mut waiting).now_or_never().is_none());
    drop((fast, slow));
    waiting.await;
    drop(ticket);
    nothing_is_left(&cache).await;
}

#[actix::test]
async fn answers_under_way_take_no_more_memory_than_those_that_are_kept() {
    let cache = Cache::start(Settings { memory_bytes: MIB, ..settings(None) }).unwrap();
    let mut held = Vec::new();
    for body in ["x", "y"] {
        let mut ticket = ticket(&cache, key(body)).await;
        ticket.begin(head(), KEEP);
        ticket.push(large(body, MIB / 3)).await.unwrap();
        held.push(ticket);
    }
    let mut over = ticket(&cache, key("z")).await;
    let own = over.follow();
    over.begin(head(), KEEP);
    over.push(large("z", MIB / 2)).await.unwrap();
    over.finish();
    assert!(read(own).await.1, "it is read, though it is not stored");
    held.into_iter().for_each(FillTicket::finish);
    assert_eq!(nothing_is_left(&cache).await.stores, 2);
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
async fn what_upstream_wants_not_kept_is_shared_with_those_who_wait_and_nobody_else() {
    let cache = memory();
    let mut ticket = ticket(&cache, key("x")).await;
    let waits = follower(&cache, key("x")).await;
    ticket.begin(head(), None);
    cache.stats().await;
    let other = self::ticket(&cache, key("x")).await;
    ticket.push(Bytes::from("a")).await.unwrap();
    ticket.finish();
    assert_eq!(read(waits).await, (vec![Bytes::from("a")], true));
    answer(other, &["b"]).await;
    assert_eq!(nothing_is_left(&cache).await.stores, 1);
    assert_eq!(hit(&cache, key("x")).await.body(), "b");
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

#[actix::test]
async fn a_purge_outlives_a_start_and_what_came_after_it_too() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::start(settings(Some(folder.path()))).unwrap();
    store(&cache, "before", &["a"]).await;
    store(&cache, "again", &["a"]).await;
    cache.purge(Scope::gateway("a", "g"));
    store(&cache, "again", &["b"]).await;
    cache.flush().await;
    let next = Cache::start(settings(Some(folder.path()))).unwrap();
    assert_eq!(look(&next, key("before"), Millis::now()).await, "fill");
    assert_eq!(hit(&next, key("again")).await.body(), "b");
    assert_eq!(next.stats().await.entries, 1);
}

#[actix::test]
async fn what_was_stored_is_there_after_a_start_and_what_is_damaged_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::start(settings(Some(folder.path()))).unwrap();
    for (body, chunks) in [("x", ["one", "1"]), ("y", ["two", "2"]), ("z", ["three", "3"])] {
        store(&cache, body, &chunks).await;
    }
    cache.flush().await;
    let next = Cache::start(settings(Some(folder.path()))).unwrap();
    let stats = next.stats().await;
    assert_eq!((stats.entries, stats.entries_in_memory, stats.is_disk_on), (3, 0, true));
    let (raw, key) = keys("x");
    assert!(next.peek(&raw, Millis::now()).is_none(), "it is on disk only");
    let entry = hit(&next, key).await;
    assert_eq!(**entry.head(), head());
    assert_eq!(entry.chunks().collect::<Vec<_>>(), ["one", "1"]);
    assert!(next.peek(&raw, Millis::now()).is_some());
    // The body of the second lies about the middle of the file.
    let path = folder.path().join("00000001.cache");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|window| window == b"two2").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let last = Cache::start(settings(Some(folder.path()))).unwrap();
    assert_eq!(last.stats().await.entries, 2, "the third was torn");
    let found = [look(&last, self::key("y"), Millis::now()).await, look(&last, self::key("z"), Millis::now()).await];
    assert_eq!(found, ["fill", "fill"]);
    assert_eq!(hit(&last, key).await.body(), "one1");
    store(&last, "y", &["new"]).await;
    assert_eq!(hit(&last, self::key("y")).await.body(), "new");
    let stats = nothing_is_left(&last).await;
    assert_eq!((stats.entries, stats.failures), (2, 0));
}

#[actix::test]
async fn what_leaves_memory_is_read_back_and_both_tiers_keep_to_their_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Settings { memory_bytes: 256 * KIB, disk_bytes: 1024 * KIB, ..settings(Some(folder.path())) };
    let cache = Cache::start(bounds.clone()).unwrap();
    let bodies: Vec<String> = (0..12).map(|number| format!("body {number}")).collect();
    for body in &bodies {
        store_large(&cache, body, 50 * KIB).await;
        let stats = cache.stats().await;
        assert!(stats.memory_bytes <= 256 * KIB && stats.disk_bytes <= 1024 * KIB, "{stats:?}");
    }
    assert_eq!(cache.stats().await.entries_in_memory, 4);
    for body in &bodies {
        assert_eq!(hit(&cache, key(body)).await.body(), &large(body, 50 * KIB));
    }
    // One that is asked for all the time moves to another segment when its own goes, once.
    let (mut hits, mut gone) = (0, 0);
    for number in 0..200 {
        match cache.lookup(key("hot"), Millis(Millis::now().0 + 1000 + number)).await {
            Found::Hit(_) => hits += 1,
            Found::Fill(ticket) => {
                answer(ticket, &["hot"]).await;
                gone += 1;
            }
            other => panic!("{}", name(&other)),
        }
        store_large(&cache, &format!("more {number}"), 50 * KIB).await;
        let stats = cache.stats().await;
        assert!(stats.memory_bytes <= 256 * KIB && stats.disk_bytes <= 1024 * KIB, "{stats:?}");
    }
    assert_eq!((hits, gone), (199, 1), "in memory it stays");
    let stats = nothing_is_left(&cache).await;
    assert!(stats.is_disk_on && stats.entries < 40 && stats.evictions > 150, "{stats:?}");
    // A start with a smaller bound keeps to that one.
    let less = Cache::start(Settings { disk_bytes: 300 * KIB, ..bounds }).unwrap();
    let stats = less.stats().await;
    assert!(stats.disk_bytes <= 300 * KIB && stats.entries > 0, "{stats:?}");
}

#[actix::test]
async fn hits_are_right_while_others_store_and_evict() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Settings { memory_bytes: 128 * KIB, disk_bytes: 512 * KIB, ..settings(Some(folder.path())) };
    let cache = Cache::start(bounds).unwrap();
    let bodies: Vec<String> = (0..16).map(|number| format!("body {number}")).collect();
    let is_over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (cache, bodies, is_over) = (cache.clone(), bodies.clone(), is_over.clone());
            std::thread::spawn(move || {
                let keys: Vec<RawKey> = bodies.iter().map(|body| keys(body).0).collect();
                let mut hits = 0_u64;
                while !is_over.load(Ordering::Relaxed) {
                    for (key, body) in keys.iter().zip(&bodies) {
                        let Some(entry) = cache.peek(key, Millis::now()) else { continue };
                        assert_eq!(entry.body(), &large(body, 20 * KIB));
                        hits += 1;
                    }
                }
                hits
            })
        })
        .collect();
    let mut hits = 0;
    for round in 0..20 {
        for body in &bodies {
            match cache.lookup(key(body), Millis::now()).await {
                Found::Hit(entry) => {
                    assert_eq!(entry.body(), &large(body, 20 * KIB));
                    hits += 1;
                }
                Found::Fill(mut ticket) => {
                    ticket.begin(head(), KEEP);
                    ticket.push(large(body, 20 * KIB)).await.unwrap();
                    ticket.finish();
                }
                other => panic!("{} in round {round}", name(&other)),
            }
        }
        cache.stats().await;
    }
    is_over.store(true, Ordering::Relaxed);
    hits += readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>();
    let stats = nothing_is_left(&cache).await;
    assert_eq!(stats.hits, hits);
    assert!(stats.evictions > 0, "{stats:?}");
}

#[actix::test]
async fn a_disk_that_cannot_be_written_to_leaves_memory_at_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let cache = Cache::start(settings(Some(&path))).unwrap();
    std::fs::remove_dir_all(&path).unwrap();
    store(&cache, "x", &["a"]).await;
    store(&cache, "y", &["b"]).await;
    assert_eq!(hit(&cache, key("x")).await.body(), "a");
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.is_disk_on, stats.is_off, stats.stores, stats.disk_bytes), (false, false, 2, 0));
}

#[actix::test]
async fn a_folder_that_somebody_emptied_is_a_miss_and_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::start(Settings { memory_bytes: 0, ..settings(Some(folder.path())) }).unwrap();
    for body in ["1", "2", "3", "4", "5", "6"] {
        store(&cache, body, &["a"]).await;
    }
    assert_eq!(hit(&cache, key("1")).await.body(), "a");
    std::fs::remove_file(folder.path().join("00000001.cache")).unwrap();
    for body in ["1", "2", "3", "4", "5", "6"] {
        assert_eq!(look(&cache, key(body), Millis::now()).await, "fill");
    }
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.entries, stats.failures, stats.is_off), (0, 0, false));
    store(&cache, "1", &["b"]).await;
    assert_eq!(hit(&cache, key("1")).await.body(), "b");
}

#[actix::test]
async fn several_failures_in_a_minute_turn_it_off_and_fewer_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::start(Settings { memory_bytes: 0, ..settings(Some(folder.path())) }).unwrap();
    let bodies = ["1", "2", "3", "4", "5", "6"];
    for body in bodies {
        store(&cache, body, &["a"]).await;
    }
    // A folder where a file was: it opens, and cannot be read.
    let path = folder.path().join("00000001.cache");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let now = Millis::now().0;
    let mut found = Vec::new();
    for (at, body) in bodies.into_iter().enumerate() {
        // The first one is long ago when the last comes.
        let now = Millis(if at == 0 { now - 60_000 } else { now });
        found.push(look(&cache, key(body), now).await);
    }
    assert_eq!(found, ["fill"; 6]);
    assert_eq!(look(&cache, key("7"), Millis::now()).await, "off");
    let stats = nothing_is_left(&cache).await;
    assert_eq!((stats.is_off, stats.failures, stats.entries), (true, 6, 0));
    // Who insists on a ticket has one, and it does no harm.
    answer(cache.refresh(key("7")), &["a"]).await;
    assert_eq!(nothing_is_left(&cache).await.stores, 6);
}

#[actix::test]
async fn a_handler_that_panics_costs_what_is_stored_and_no_request() {
    let cache = memory();
    store(&cache, "x", &["a"]).await;
    let under_way = ticket(&cache, key("y")).await;
    let reads = follower(&cache, key("y")).await;
    for failures in 1..5 {
        cache.occupy(|| panic!("as a test wants it"));
        assert_eq!(look(&cache, key("x"), Millis::now()).await, "fill");
        let stats = cache.stats().await;
        assert_eq!((stats.failures, stats.is_off, stats.entries), (failures, false, 0));
    }
    store(&cache, "x", &["b"]).await;
    assert_eq!(hit(&cache, key("x")).await.body(), "b");
    cache.occupy(|| panic!("as a test wants it"));
    cache.stats().await;
    assert!(cache.peek(&keys("x").0, Millis::now()).is_none());
    assert_eq!(look(&cache, key("x"), Millis::now()).await, "off");
    answer(under_way, &["still"]).await;
    assert_eq!(read(reads).await.0, ["still"]);
    assert!(nothing_is_left(&cache).await.is_off);
}

#[actix::test]
async fn a_folder_that_cannot_be_one_is_an_error_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, b"").unwrap();
    let error = Cache::start(settings(Some(&path))).err().unwrap();
    assert_eq!(error.kind(), crate::base::Kind::BadInput);
}
