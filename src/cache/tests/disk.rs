//! What a start finds, and what trouble costs.

use super::*;

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
async fn what_is_still_asked_for_outlives_its_segment() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Settings { memory_bytes: 256 * KIB, disk_bytes: 1024 * KIB, ..settings(Some(folder.path())) };
    let cache = Cache::start(bounds.clone()).unwrap();
    store(&cache, "hot", &["hot"]).await;
    store(&cache, "cold", &["cold"]).await;
    let first = folder.path().join("00000001.cache");
    let mut now = Millis::now().0;
    while first.exists() {
        now += 1000;
        assert_eq!(look(&cache, key("hot"), Millis(now)).await, "hit");
        store_large(&cache, &format!("more {now}"), 50 * KIB).await;
    }
    assert!(cache.stats().await.disk_bytes > 700 * KIB, "nothing goes before it must");
    let next = Cache::start(bounds).unwrap();
    let found = [look(&next, key("hot"), Millis::now()).await, look(&next, key("cold"), Millis::now()).await];
    assert_eq!(found, ["hit", "fill"]);
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
    // What is purged meanwhile is purged after a start as well.
    cache.purge(Scope::gateway("a", "g"));
    cache.flush().await;
    let generations = std::fs::read(folder.path().join("generations")).unwrap();
    assert_eq!(generations.len(), 32, "one scope's");
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
        cache.stats().await;
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
