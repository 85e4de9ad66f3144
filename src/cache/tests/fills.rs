//! Many who ask the same at once: who goes upstream, and what the others hear.

use super::*;

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
        cache.occupy(move || {
            let _ = released.recv();
        });
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

/// One caller among many: asks, leads, follows and leaves by chance.
struct Caller {
    cache: Cache,
    chance: u64,
}

impl Caller {
    fn draw(&mut self, below: u64) -> u64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.chance % below
    }

    async fn call(&mut self) {
        let body = ["x", "y", "z"][self.draw(3) as usize];
        if self.draw(50) == 0 {
            self.cache.purge(Scope::gateway("a", "g"));
        }
        if self.draw(20) == 0 {
            self.lead(self.cache.refresh(key(body)), body).await;
        }
        // A lifetime of some milliseconds, so that entries are met at every age.
        match self.cache.lookup(key(body), Millis(Millis::now().0 + 3_599_995)).await {
            Found::Hit(entry) => assert_eq!(entry.body(), &large(body, 300)),
            Found::Fill(ticket) => {
                let own = ticket.follow();
                if self.draw(2) == 0 {
                    drop(own);
                    self.lead(ticket, body).await;
                } else {
                    self.lead(ticket, body).await;
                    self.follow(own, body).await;
                }
            }
            Found::Follow(follower) if self.draw(5) == 0 => drop(follower),
            Found::Follow(follower) => self.follow(follower, body).await,
            Found::Off => panic!("nothing has failed"),
        }
    }

    async fn lead(&mut self, mut ticket: FillTicket, body: &str) {
        match self.draw(8) {
            0 => return drop(ticket),
            1 => return ticket.fail(failed("refused")),
            _ => ticket.begin(head(), KEEP.filter(|_| self.draw(4) > 0)),
        }
        for part in large(body, 300).chunks(100) {
            if ticket.push(Bytes::copy_from_slice(part)).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        match self.draw(8) {
            0 => ticket.fail(failed("reset")),
            1 => drop(ticket),
            _ => ticket.finish(),
        }
    }

    async fn follow(&mut self, mut follower: Follower, body: &str) {
        loop {
            match follower.head().await {
                Lead::Head(_) => break,
                Lead::Lead(ticket) => self.lead(ticket, body).await,
                Lead::Failed(_) => return,
            }
        }
        let (chunks, is_whole) = read(follower).await;
        let read = chunks.concat();
        assert_eq!(read, large(body, 300)[..read.len()]);
        assert!(!is_whole || read.len() == 300);
    }
}

#[actix::test]
async fn whatever_many_do_at_once_nobody_hears_a_wrong_answer_and_nothing_is_left() {
    let cache = memory();
    let callers: Vec<_> = (1..=4)
        .map(|seed| {
            let mut caller = Caller { cache: cache.clone(), chance: seed * 0x9e37_79b9 };
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..1000 {
                        caller.call().await;
                    }
                });
            })
        })
        .collect();
    // This thread has nothing to do meanwhile: the actor has its own.
    callers.into_iter().for_each(|caller| caller.join().unwrap());
    let stats = nothing_is_left(&cache).await;
    assert!(stats.misses > 0 && stats.stores > 0 && stats.failures == 0, "{stats:?}");
}
