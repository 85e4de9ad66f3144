//! Caches that share answers through a store.

use super::*;
use crate::cache::{Common, Fleet};
use crate::metrics::Metrics;
use crate::net::redis::{Address, Store};
use crate::net::test_store::TestStore;
use std::time::Instant;

/// The store's timeout: long enough for a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_millis(1000);
/// How long anything may take before a test gives up.
const LONG: Duration = Duration::from_secs(20);

struct Daemon {
    cache: Cache,
    metrics: Arc<Metrics>,
    /// What its gateway is called in its own cache.
    own: &'static str,
    since: u64,
}

impl Daemon {
    async fn start(store: &TestStore, own: &'static str) -> Self {
        Self::with(store, own, KIB).await
    }

    async fn with(store: &TestStore, own: &'static str, max_entry_bytes: u64) -> Self {
        let metrics = Arc::new(Metrics::new());
        let fleet = fleet(store, max_entry_bytes, &metrics);
        let cache = Cache::start(Settings { fleet: Some(fleet), ..settings(None) }).unwrap();
        let daemon = Self { cache, metrics, own, since: 0 };
        daemon.up().await;
        daemon
    }

    /// Waits until answers are shared.
    async fn up(&self) {
        let before = self.count("miss") + self.count("hit");
        let began = Instant::now();
        while self.count("miss") + self.count("hit") == before {
            assert!(began.elapsed() < LONG, "the store is not found");
            drop(self.look("is it there?").await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn key(&self, body: &str) -> Key {
        let common = Common { gateway: Scope::gateway("a", "g#alike"), since: Millis(self.since) };
        let material = Material { gateway: Scope::gateway("a", self.own), common: Some(common), ..material(body) };
        material.key(&material.raw())
    }

    async fn look(&self, body: &str) -> Found {
        self.cache.lookup(self.key(body), Millis::now()).await
    }

    async fn word(&self, body: &str) -> &'static str {
        name(&self.look(body).await)
    }

    async fn ticket(&self, body: &str) -> FillTicket {
        ticket(&self.cache, self.key(body)).await
    }

    /// What became of lookups and answers.
    fn count(&self, outcome: &str) -> u64 {
        self.metrics.cache_shared.with_label_values(&[outcome]).get()
    }

    /// Waits until so many were counted.
    async fn until(&self, outcome: &str, count: u64) {
        let began = Instant::now();
        while self.count(outcome) < count {
            assert!(began.elapsed() < LONG, "{outcome}: {} of {count}", self.count(outcome));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Answers a question, and waits until others can know.
    async fn answer(&self, body: &str, chunks: &[&'static str]) {
        let sent = self.count("sent");
        let ticket = self.ticket(body).await;
        answer(ticket, chunks).await;
        self.until("sent", sent + 1).await;
    }
}

fn fleet(store: &TestStore, max_entry_bytes: u64, metrics: &Arc<Metrics>) -> Fleet {
    let store = Address { timeout: TIMEOUT, ..store.address() };
    Fleet { store, name: "t".into(), max_entry_bytes, metrics: metrics.clone() }
}

async fn open(store: &TestStore) -> Store {
    store.address().open().await.unwrap()
}

fn hex(key: &Key) -> String {
    let digest = key.common.unwrap().digest.0;
    format!("t:cache:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

#[actix::test]
async fn an_answer_of_one_is_a_hit_of_the_other_with_its_chunks_and_what_is_left_of_its_time() {
    let store = TestStore::start();
    let (one, other) = (Daemon::start(&store, "g#1").await, Daemon::start(&store, "g#2").await);
    one.answer("x", &["data: 1\n\n", "data: 2\n\n"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let Found::Hit(entry) = other.look("x").await else { panic!("no hit") };
    assert_eq!(entry.head().header("content-type").unwrap(), "text/event-stream");
    assert_eq!(entry.clone().chunks().collect::<Vec<_>>(), ["data: 1\n\n", "data: 2\n\n"]);
    let Found::Hit(ours) = one.look("x").await else { panic!("no hit") };
    assert_eq!(entry.expires(), ours.expires());
    // Kept here from now on, for as long as there.
    other.cache.stats().await;
    let hits = other.count("hit");
    store.pause();
    let Found::Hit(kept) = other.look("x").await else { panic!("not kept") };
    store.resume();
    assert!(kept.expires().0.abs_diff(ours.expires().0) < 200, "{:?} {:?}", kept.expires(), ours.expires());
    assert_eq!((hits, other.count("hit"), other.count("sent")), (1, 1, 0), "nor is it sent back");
    let stats = nothing_is_left(&other.cache).await;
    assert_eq!((stats.entries, stats.filling_bytes), (1, 0));
    // Who asked the same at that moment reads it, too; and what one's own limit forbids is not taken.
    let third = Daemon::start(&store, "g#3").await;
    let found = join_all((0..8).map(|_| third.look("x"))).await;
    for found in found {
        match found {
            Found::Hit(entry) => assert_eq!(entry.body(), "data: 1\n\ndata: 2\n\n"),
            Found::Follow(mut follower) => {
                assert!(matches!(follower.head().await, Lead::Head(_)));
                assert_eq!(follower.next().await.unwrap().unwrap(), "data: 1\n\n");
            }
            other => panic!("{}", name(&other)),
        }
    }
    assert_eq!(third.count("hit"), 1);
}

#[actix::test]
async fn only_whole_good_answers_within_the_limit_are_shared_and_only_among_the_same() {
    let store = TestStore::start();
    let (one, other) = (Daemon::with(&store, "g#1", 300).await, Daemon::start(&store, "g#1").await);
    let mut broken = one.ticket("broken").await;
    broken.begin(head(), KEEP);
    broken.push(Bytes::from("half")).await.unwrap();
    broken.fail(failed("broke off"));
    let mut said = one.ticket("a failure in the stream").await;
    said.begin(head(), KEEP);
    said.push(Bytes::from("error")).await.unwrap();
    said.finish_unkept();
    let mut refused = one.ticket("an error").await;
    refused.begin(Head { status: 500, ..head() }, KEEP);
    refused.finish();
    let mut short = one.ticket("not to be kept").await;
    short.begin(head(), None);
    short.finish();
    let mut large = one.ticket("large").await;
    large.begin(head(), KEEP);
    large.push(Bytes::from(vec![b'x'; 300])).await.unwrap();
    large.finish();
    one.answer("good", &["good"]).await;
    for body in ["broken", "a failure in the stream", "an error", "not to be kept", "large"] {
        assert_eq!(other.word(body).await, "fill", "{body}");
    }
    assert_eq!((one.count("sent"), other.word("good").await), (1, "hit"));
    assert_eq!(one.word("large").await, "hit", "kept where it was answered");
    // Another account's, or that of a gateway with other settings.
    let key = |change: fn(&mut Material<'_>)| {
        let common = Common { gateway: Scope::gateway("a", "g#alike"), since: Millis(0) };
        let mut material = Material { common: Some(common), ..material("good") };
        change(&mut material);
        material.key(&material.raw())
    };
    let else_of: [fn(&mut Material<'_>); 4] = [
        |material| material.account = Some("b"),
        |material| material.auth = &[b"l"],
        |material| material.common = Some(Common { gateway: Scope::gateway("a", "g#else"), since: Millis(0) }),
        |material| material.common = None,
    ];
    let stranger = Daemon::start(&store, "g#1").await;
    assert_eq!(look(&stranger.cache, key(|_| ()), Millis::now()).await, "hit");
    for change in else_of {
        let fresh = Daemon::start(&store, "g#9").await;
        let key =
            Key { digest: crate::cache::key::Digest([9; 32]), raw: crate::cache::key::Digest([9; 32]), ..key(change) };
        assert_eq!(look(&fresh.cache, key, Millis::now()).await, "fill");
    }
}

#[actix::test]
async fn a_store_that_hangs_costs_one_timeout_and_is_used_again_when_it_is_back() {
    let store = TestStore::start();
    let (one, other) = (Daemon::start(&store, "g#1").await, Daemon::start(&store, "g#2").await);
    one.answer("before", &["b"]).await;
    store.pause();
    let began = Instant::now();
    let first = join_all((0..20).map(|at| other.word(["a", "b", "c", "d"][at % 4]))).await;
    assert!(first.iter().all(|word| *word == "fill" || *word == "follow"), "{first:?}");
    assert!(began.elapsed() < TIMEOUT * 3, "{:?}", began.elapsed());
    // Until the keeper is answered nobody waits, whatever it does meanwhile.
    let (down, mut calls) = (Instant::now(), 0);
    while down.elapsed() < Duration::from_secs(2) {
        let began = Instant::now();
        assert_eq!(other.word("before").await, "fill");
        assert!(began.elapsed() < TIMEOUT / 2, "call {calls}: {:?}", began.elapsed());
        let ticket = other.ticket(["e", "f"][calls % 2]).await;
        ticket.fail(failed("no"));
        calls += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(calls > 20, "{calls}");
    // What cannot be sent is dropped, and kept where it is.
    let ticket = other.ticket("meanwhile").await;
    answer(ticket, &["m"]).await;
    other.until("dropped", 1).await;
    assert_eq!(other.word("meanwhile").await, "hit");
    assert_eq!(other.count("hit"), 0);
    store.resume();
    other.up().await;
    assert_eq!(other.word("before").await, "hit");
    one.up().await;
    assert_eq!(one.word("meanwhile").await, "fill");
}

#[actix::test]
async fn a_store_that_was_killed_is_found_again_and_one_that_never_was_costs_nothing() {
    let mut store = TestStore::start();
    let one = Daemon::start(&store, "g#1").await;
    one.answer("x", &["x"]).await;
    store.kill();
    let began = Instant::now();
    for body in ["a", "b", "c"] {
        assert_eq!(one.word(body).await, "fill");
    }
    let metrics = Arc::new(Metrics::new());
    let alone = Cache::start(Settings { fleet: Some(fleet(&store, KIB, &metrics)), ..settings(None) }).unwrap();
    assert_eq!(look(&alone, one.key("x"), Millis::now()).await, "fill");
    // Four lookups, none of which waited.
    assert!(began.elapsed() < TIMEOUT * 2, "{:?}", began.elapsed());
    store.again();
    one.up().await;
    one.answer("y", &["y"]).await;
    let other = Daemon::start(&store, "g#2").await;
    assert_eq!((other.word("y").await, other.word("x").await), ("hit", "fill"), "it had forgotten x");
}

#[actix::test]
async fn what_is_damaged_or_somebody_elses_is_a_miss_and_the_next_answer_replaces_it() {
    let store = TestStore::start();
    let (one, other) = (Daemon::start(&store, "g#1").await, Daemon::start(&store, "g#2").await);
    let mut raw = open(&store).await;
    one.answer("x", &["x"]).await;
    one.answer("y", &["y"]).await;
    let [x, y] = ["x", "y"].map(|body| hex(&one.key(body)));
    let whole = raw.get(&x).await.unwrap().unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let newer = [&[whole[0] + 1], &whole[1..]].concat();
    let foreign = raw.get(&y).await.unwrap().unwrap();
    for (at, value) in [flipped, newer, foreign, whole[..40].to_vec(), Vec::new(), b"hello".to_vec()].iter().enumerate()
    {
        raw.set(&x, value, LONG).await.unwrap();
        assert_eq!(other.word("x").await, "fill", "{at}");
        assert_eq!(other.count("failed"), at as u64 + 1);
    }
    other.answer("x", &["anew"]).await;
    let third = Daemon::start(&store, "g#3").await;
    let Found::Hit(entry) = third.look("x").await else { panic!("no hit") };
    assert_eq!(entry.body(), "anew");
    // A key that is no text at all is no reason to take the store for gone.
    let script =
        crate::net::redis::Script::new("redis.call('DEL', KEYS[1]); redis.call('LPUSH', KEYS[1], 1); return {1}");
    raw.run(&script, &[x], &[]).await.unwrap();
    let fourth = Daemon::start(&store, "g#4").await;
    assert_eq!((fourth.word("x").await, fourth.word("y").await), ("fill", "hit"));
}

#[actix::test]
async fn nothing_of_before_a_purge_or_a_change_of_the_gateway_comes_back() {
    let store = TestStore::start();
    let one = Daemon::start(&store, "g#1").await;
    let mut other = Daemon::start(&store, "g#1").await;
    one.answer("x", &["old"]).await;
    let mut under_way = one.ticket("y").await;
    under_way.begin(head(), KEEP);
    assert_eq!(other.word("x").await, "hit");
    // A purge of one scope, and the gateway's own invalidation: both are times.
    other.cache.purge(Scope::gateway("a", "g#1"));
    assert_eq!(other.word("x").await, "fill", "it is at the store still");
    let sent = one.count("sent");
    under_way.finish();
    one.until("sent", sent + 1).await;
    assert_eq!(other.word("y").await, "fill", "begun before, if it ended later");
    let changed = Millis::now();
    other.since = changed.0;
    other.own = "g#2";
    assert_eq!(other.word("x").await, "fill");
    // What begins later counts, wherever.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    one.answer("z", &["new"]).await;
    assert_eq!(other.word("z").await, "hit");
    other.answer("x", &["new"]).await;
    let third = Daemon { since: changed.0, ..Daemon::start(&store, "g#3").await };
    let Found::Hit(entry) = third.look("x").await else { panic!("no hit") };
    assert_eq!(entry.body(), "new");
}
