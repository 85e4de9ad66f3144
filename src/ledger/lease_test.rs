use proptest::prelude::*;

use super::*;
use crate::base::{AccountId, Neurons, RequestId};
use crate::ledger::book::{Book, Open};
use crate::ledger::model_store::ModelStore;
use crate::ledger::{AtLimit, Beyond, Claim, Counts, Plan, Window};
use crate::task::Usage;

const MINUTE: u64 = 60_000;
/// The beginning of a minute, an hour and a day.
const BEGIN: u64 = 20_000 * 86_400_000;

/// One daemon: its book, and the calls under way.
struct Daemon {
    name: &'static str,
    book: Book,
    process: u64,
    count: u64,
    open: Vec<(Open, u64)>,
}

/// Some daemons, their store, and what passed in truth.
struct World {
    daemons: Vec<Daemon>,
    store: ModelStore,
    window: Window,
    plan: Plan,
    now: u64,
    /// Asks that are on their way and will be late.
    late: Vec<(usize, u64, u64, Ask)>,
    /// By stretch: taken by daemons that are there, and by such as were killed.
    taken: std::collections::HashMap<u64, u64>,
}

impl World {
    fn new(daemons: usize, limit: u64, technique: Technique, counts: Counts) -> Self {
        let names = ["a", "b", "c"];
        let window = Window { id: 1, rule: "r".into(), limit, span: Span::Millis(MINUTE), technique, counts };
        let plan = Plan { allocation: Neurons::ZERO, beyond: Beyond::Bill, at_limit: AtLimit::Cut };
        let mut world = Self {
            daemons: Vec::new(),
            store: ModelStore::default(),
            window,
            plan,
            now: BEGIN,
            late: Vec::new(),
            taken: std::collections::HashMap::new(),
        };
        for name in &names[..daemons] {
            let mut daemon = Daemon { name, book: Book::new(100), process: 0, count: 0, open: Vec::new() };
            world.start(&mut daemon);
            world.daemons.push(daemon);
        }
        world
    }

    fn start(&self, daemon: &mut Daemon) {
        daemon.book.share(false, 100);
        (daemon.process, daemon.count) = (daemon.process + 1, 0);
        daemon.book.leases().unwrap().joined();
    }

    /// Tries to take, without waiting.
    fn take(&mut self, at: usize, amount: u64) -> Result<(), Denied> {
        let now = Millis(self.now);
        let (account, windows) = (AccountId::new("x"), [self.window.clone()]);
        let claim = Claim {
            request: RequestId::from_number(1),
            account: &account,
            plan: self.plan,
            windows: &windows,
            tokens: amount,
            neurons: Neurons::ZERO,
            cost: Neurons::from_micro(amount),
            is_once: false,
        };
        let open = self.daemons[at].book.reserve(&claim, now)?;
        let took = match self.window.counts {
            Counts::Requests => 1,
            Counts::Cost => open.granted().cost.micro(),
            _ => amount,
        };
        let index = self.window.span.index(now);
        *self.taken.entry(index).or_default() += took;
        self.daemons[at].open.push((open, index));
        self.check(index);
        Ok(())
    }

    /// What has passed counts against the limit, whoever let it pass.
    fn check(&self, index: u64) {
        let of = |index| self.taken.get(&index).copied().unwrap_or(0);
        let faded = match self.window.technique {
            Technique::Fixed => 0,
            Technique::Sliding => {
                let (overlap, length) = self.window.span.overlap(Millis(self.now));
                (of(index - 1) * overlap).div_ceil(length)
            }
        };
        assert!(of(index) + faded <= self.window.limit, "{} + {faded} of {}", of(index), self.window.limit);
    }

    /// The oldest call of a daemon ends and has used so much, or all it held if that is less.
    fn end(&mut self, at: usize, used: u64) {
        let now = Millis(self.now);
        let daemon = &mut self.daemons[at];
        if daemon.open.is_empty() {
            return;
        }
        let (open, index) = daemon.open.remove(0);
        let held = open.granted().cost.micro();
        let usage = Usage { completion_tokens: used.min(held) as u32, ..Usage::default() };
        if self.window.counts != Counts::Requests {
            *self.taken.get_mut(&index).unwrap() -= held - used.min(held);
        }
        daemon.book.count(open, &usage, Neurons::from_micro(used.min(held)), now);
    }

    /// One round of asks of one daemon.
    fn round(&mut self, at: usize, fate: Fate) {
        let now = Millis(self.now);
        let daemon = &mut self.daemons[at];
        let mut heard = Vec::new();
        let asks = daemon.book.asks(now, 10);
        for ask in asks {
            daemon.count += 1;
            match fate {
                Fate::Told | Fate::Unheard | Fate::Twice => {
                    heard.extend(self.store.answer((daemon.name, daemon.process, daemon.count), &ask));
                    if matches!(fate, Fate::Twice) {
                        heard.extend(self.store.answer((daemon.name, daemon.process, daemon.count), &ask));
                    }
                }
                Fate::Late => self.late.push((at, daemon.process, daemon.count, ask)),
            }
        }
        if matches!(fate, Fate::Told | Fate::Twice) {
            for heard in &heard {
                daemon.book.hear(heard, now);
            }
        } else {
            let leases = daemon.book.leases().unwrap();
            leases.parted();
            leases.joined();
        }
    }

    /// Killed and started again; what it had counted is gone, as of short windows it is.
    fn kill(&mut self, at: usize) {
        let (book, open) = (Book::new(100), Vec::new());
        let mut daemon =
            std::mem::replace(&mut self.daemons[at], Daemon { name: "", book, process: 0, count: 0, open });
        daemon.book = Book::new(100);
        daemon.open.clear();
        self.start(&mut daemon);
        self.daemons[at] = daemon;
    }

    /// Rounds until nobody wants anything.
    fn settle(&mut self) {
        for _ in 0..3 {
            (0..self.daemons.len()).for_each(|at| self.round(at, Fate::Told));
        }
    }
}

/// What becomes of a round.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Told,
    /// It is done, and the answers are lost.
    Unheard,
    /// It is sent twice.
    Twice,
    /// It is done some time.
    Late,
}

#[derive(Debug, Clone)]
enum Step {
    Take(usize, u64),
    End(usize, u64),
    Round(usize, Fate),
    Late,
    Kill(usize),
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![
        6 => Just(Fate::Told),
        1 => Just(Fate::Unheard),
        1 => Just(Fate::Twice),
        1 => Just(Fate::Late)
    ];
    let step = prop_oneof![
        12 => (0..3usize, 1..40u64).prop_map(|(at, amount)| Step::Take(at, amount)),
        6 => (0..3usize, 0..40u64).prop_map(|(at, used)| Step::End(at, used)),
        8 => (0..3usize, fate).prop_map(|(at, fate)| Step::Round(at, fate)),
        1 => Just(Step::Late),
        1 => (0..3usize).prop_map(Step::Kill),
        4 => prop_oneof![4 => 1..300u64, 1 => 10_000..70_000u64].prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_taken_leased_lost_told_twice_or_late_passes_the_limit(
        steps in steps(),
        limit in 1..120u64,
        is_sliding: bool,
        counts in prop_oneof![Just(Counts::Requests), Just(Counts::Cost)],
    ) {
        let technique = if is_sliding { Technique::Sliding } else { Technique::Fixed };
        let mut world = World::new(3, limit, technique, counts);
        for step in steps {
            match step {
                Step::Take(at, amount) => drop(world.take(at, amount)),
                Step::End(at, used) => world.end(at, used),
                Step::Round(at, fate) => world.round(at, fate),
                Step::Late => {
                    for (at, process, count, ask) in std::mem::take(&mut world.late) {
                        // Whoever sent it does not listen any more.
                        let _ = world.store.answer((world.daemons[at].name, process, count), &ask);
                    }
                }
                Step::Kill(at) => world.kill(at),
                Step::Pass(ms) => world.now += ms,
            }
        }
    }
}

#[test]
fn three_daemons_admit_exactly_the_limit_and_no_more() {
    for (technique, counts) in [
        (Technique::Fixed, Counts::Requests),
        (Technique::Sliding, Counts::Requests),
        (Technique::Fixed, Counts::Tokens),
    ] {
        let mut world = World::new(3, 1000, technique, counts);
        let (mut admitted, mut refused) = (0, 0);
        for turn in 0.. {
            if refused > 300 {
                break;
            }
            world.now += u64::from(turn % 50 == 0);
            match world.take(turn % 3, 1) {
                Ok(()) => admitted += 1,
                Err(Denied::Unleased) => world.round(turn % 3, Fate::Told),
                Err(Denied::Over(over)) => {
                    assert!(over.retry_after_ms.is_some_and(|wait| wait <= 2 * MINUTE), "{over:?}");
                    refused += 1;
                    world.now += 30;
                    world.settle();
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(admitted, 1000, "{technique:?} {counts:?}");
    }
}

#[test]
fn most_calls_ask_nobody() {
    let mut world = World::new(1, 1_000_000, Technique::Fixed, Counts::Requests);
    let mut asked = 0;
    for turn in 0..20_000 {
        // Four calls a millisecond; looked at every fifty.
        world.now += u64::from(turn % 4 == 0);
        if world.take(0, 1).is_err() {
            asked += 1;
            world.round(0, Fate::Told);
            world.take(0, 1).unwrap();
        }
        if turn % 200 == 0 {
            world.round(0, Fate::Told);
        }
    }
    assert!(asked < 120, "{asked} of 20000");
}

#[test]
fn an_idle_lease_comes_back_and_leaves_room_for_others() {
    let mut world = World::new(2, 1000, Technique::Fixed, Counts::Requests);
    for turn in 0..400 {
        world.now += 1;
        if world.take(0, 1).is_err() {
            world.round(0, Fate::Told);
        }
        if turn % 50 == 0 {
            world.round(0, Fate::Told);
        }
    }
    let leased = |world: &World| world.store.lease(&world.window.id, BEGIN / MINUTE, "a");
    let taken = world.taken[&(BEGIN / MINUTE)];
    assert!(leased(&world) > taken + 5, "{} {taken}", leased(&world));
    for _ in 0..6 {
        world.now += 200;
        world.round(0, Fate::Told);
    }
    assert_eq!(leased(&world), taken);
}

#[test]
fn who_leaves_gives_back_at_once_what_was_leased_for_calls_that_come_fast() {
    for gap in [1, 30, 150] {
        let mut world = World::new(1, 1000, Technique::Fixed, Counts::Requests);
        let mut taken = 0;
        while taken < 100 {
            world.now += 1;
            match world.take(0, 1) {
                Ok(()) => taken += 1,
                Err(_) => world.round(0, Fate::Told),
            }
        }
        let leased = |world: &World| world.store.lease(&world.window.id, BEGIN / MINUTE, "a");
        assert!(leased(&world) > taken, "{} {taken}", leased(&world));
        world.now += gap;
        world.daemons[0].book.leases().unwrap().leave();
        world.round(0, Fate::Told);
        assert_eq!(leased(&world), taken, "after {gap} ms");
    }
}

#[test]
fn what_a_killed_daemon_had_counts_as_taken_until_the_window_ends() {
    let mut world = World::new(2, 10, Technique::Fixed, Counts::Requests);
    assert_eq!(world.take(0, 1), Err(Denied::Unleased));
    world.round(0, Fate::Told);
    world.take(0, 1).unwrap();
    world.kill(0);
    let mut admitted = 0;
    for turn in 0..40 {
        world.now += 30;
        if world.take(turn % 2, 1).is_ok() {
            admitted += 1;
        }
        world.settle();
    }
    assert_eq!(admitted, 9);
    world.now += MINUTE;
    let _ = world.take(0, 1);
    world.round(0, Fate::Told);
    world.take(0, 1).unwrap();
}

#[test]
fn what_is_beyond_the_limit_is_carried_for_all() {
    let mut world = World::new(2, 100, Technique::Fixed, Counts::Cost);
    let _ = world.take(0, 60);
    world.round(0, Fate::Told);
    world.take(0, 60).unwrap();
    // It took more than it had held: a hundred and seventy.
    let (open, _) = world.daemons[0].open.pop().unwrap();
    let now = Millis(world.now);
    world.daemons[0].book.count(open, &Usage::default(), Neurons::from_micro(170), now);
    world.taken.clear();
    world.now += 300;
    world.settle();
    world.now += MINUTE;
    // Seventy of this minute are gone.
    let _ = world.take(1, 40);
    world.round(1, Fate::Told);
    world.taken.insert(world.now / MINUTE, 70);
    world.take(1, 40).unwrap();
    assert_eq!(world.daemons[1].open[0].0.granted().cost.micro(), 30);
}
