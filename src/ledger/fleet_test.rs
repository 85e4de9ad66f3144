use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::base::{AccountId, ModelId, Neurons, RequestId, Secret};
use crate::ledger::FleetHealth;
use crate::ledger::model_store::{ModelStore, SHARE};
use crate::ledger::{
    AtLimit, Beyond, Claim, Counts, Denied, Ledger, Plan, Reservation, Settings, Spent, Technique, Window,
};
use crate::net::test_store::TestStore;
use crate::task::Usage;

const FREE: Plan = Plan { allocation: Neurons::ZERO, beyond: Beyond::Bill, at_limit: AtLimit::Finish };

/// A window that does not end while a test looks at it.
fn window(id: u128, limit: u64, is_long: bool, counts: Counts) -> Window {
    let lengths = if is_long { [30_000_000_000, 37_000_000_000] } else { [3_000_000, 3_400_000] };
    let left = |length: &u64| length - Millis::now().0 % length;
    let length = lengths.into_iter().max_by_key(left).unwrap();
    Window { id, rule: "shared".into(), limit, span: Span::Millis(length), technique: Technique::Fixed, counts }
}

fn fleet(store: &TestStore, on_loss: OnLoss) -> Fleet {
    Fleet { store: store.address(), name: "test".to_owned(), share: SHARE, on_loss }
}

fn settings(store: &TestStore, on_loss: OnLoss, folder: Option<&Path>) -> Settings {
    Settings {
        fleet: Some(fleet(store, on_loss)),
        folder: folder.map(Path::to_path_buf),
        commit_every: Duration::from_millis(1),
        ..Settings::default()
    }
}

async fn start(store: &TestStore, on_loss: OnLoss, folder: Option<&Path>) -> Ledger {
    let ledger = Ledger::start(settings(store, on_loss, folder)).unwrap();
    assert!(ledger.joined(Duration::from_secs(10)).await, "{:?}", ledger.health());
    ledger
}

async fn claim(ledger: &Ledger, plan: Plan, windows: &[Window], amount: u64) -> Result<Reservation, Denied> {
    let account = AccountId::new("a");
    let amount = Neurons::from_micro(amount);
    let claim = Claim {
        request: RequestId::from_number(1),
        account: &account,
        plan,
        windows,
        tokens: 0,
        neurons: if plan.allocation > Neurons::ZERO { amount } else { Neurons::ZERO },
        cost: amount,
        is_once: false,
    };
    ledger.claim(&claim, Millis::now()).await
}

fn spent(micro: u64) -> Spent {
    let neurons = Neurons::from_micro(micro);
    let model = ModelId::new("m");
    let usage = Usage::default();
    Spent { key: None, gateway: "".into(), provider: "p".into(), model, usage, neurons, cost: neurons }
}

/// As [`claim`], and again while a busy machine takes the store for lost.
async fn admitted(ledger: &Ledger, plan: Plan, windows: &[Window], amount: u64) -> Reservation {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match claim(ledger, plan, windows, amount).await {
            Ok(reservation) => return reservation,
            Err(denied) => assert!(denied == Denied::Unleased && Instant::now() < deadline, "{denied:?}"),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Claims one after the other until nothing has come for a while, and says how many were admitted. Each is settled at once.
async fn drain(ledger: &Ledger, plan: Plan, windows: &[Window], patience: Duration) -> u64 {
    let (mut admitted, mut last) = (0, Instant::now());
    while last.elapsed() < patience {
        match claim(ledger, plan, windows, 1).await {
            Ok(reservation) => {
                drop(reservation.settle(&spent(1), Millis::now()));
                (admitted, last) = (admitted + 1, Instant::now());
            }
            Err(_) => sleep(Duration::from_millis(5)).await,
        }
    }
    admitted
}

async fn until(ledger: &Ledger, is_met: impl Fn(&FleetHealth) -> bool) -> FleetHealth {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let health = ledger.health().fleet.unwrap();
        if is_met(&health) {
            return health;
        }
        assert!(Instant::now() < deadline, "{health:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Many threads at each ledger claim until nobody is admitted any more, which is not looked at before so many were.
fn race(ledgers: &[Ledger], plan: Plan, windows: &[Window], expected: u64) -> u64 {
    let (admitted, begin) = (AtomicU64::new(0), Instant::now());
    std::thread::scope(|scope| {
        for ledger in ledgers {
            for _ in 0..4 {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    loop {
                        let some = runtime.block_on(drain(ledger, plan, windows, Duration::from_millis(400)));
                        let all = admitted.fetch_add(some, Ordering::Relaxed) + some;
                        if (some == 0 && all >= expected) || begin.elapsed() > Duration::from_secs(30) {
                            break;
                        }
                    }
                });
            }
        }
    });
    admitted.into_inner()
}

#[test]
fn the_script_says_what_the_model_says() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = TestStore::start();
    let ask = (0..3u64, 0..60u64, 0..40u64, 0..40u64, prop::option::of(1..150u64), any::<(bool, bool)>(), 0..3u32);
    let who = (0..3usize, 1..3u64, 1..60u64);
    let mut runner = TestRunner::deterministic();
    let (link, make) = Keeper::new(fleet(&server, OnLoss::Refuse), None).unwrap();
    drop(link);
    let ledger = Ledger::start(Settings::default()).unwrap();
    let mut keeper = make(ledger.shared.clone());
    runtime.block_on(async {
        let mut store = keeper.fleet.store.open().await.unwrap();
        store.load(&keeper.script).await.unwrap();
        for case in 0..150u128 {
            let mut model = ModelStore::default();
            let span = Span::Millis(3_600_000);
            let now = span.start(span.index(Millis::now()));
            for _ in 0..25 {
                let ((back, keep, need, ahead, limit, (adopts, is_sliding), epoch), (daemon, process, count)) =
                    (&ask, &who).new_tree(&mut runner).unwrap().current();
                let ask = Ask {
                    place: Place::Window(case, span),
                    span,
                    index: span.index(now) - back,
                    epoch,
                    adopts,
                    keep,
                    need,
                    ahead,
                    limit,
                    fade: is_sliding.then_some((700, 1000)),
                };
                let name = ["a", "b", "c"][daemon];
                let expected = model.answer((name, process, count), &ask);
                keeper.member = Member { name: name.to_owned(), process };
                keeper.count = count;
                let (keys, arguments) = keeper.words(&ask, now);
                let answer = store.run(&keeper.script, &keys, &arguments).await.unwrap();
                assert_eq!(heard_of(&ask, &answer), expected, "{ask:?} {name} {process} {count}");
            }
        }
    });
}

#[tokio::test]
async fn three_ledgers_with_many_threads_admit_exactly_the_limit() {
    let store = TestStore::start();
    let ledgers = [
        start(&store, OnLoss::Refuse, None).await,
        start(&store, OnLoss::Refuse, None).await,
        start(&store, OnLoss::Refuse, None).await,
    ];
    let requests = [window(1, 5000, false, Counts::Requests)];
    assert_eq!(race(&ledgers, FREE, &requests, 5000), 5000);
    let both = [window(2, 3000, true, Counts::Cost), window(3, 4000, false, Counts::Requests)];
    assert_eq!(race(&ledgers, FREE, &both, 3000), 3000);
    let plan = Plan { allocation: Neurons::from_micro(2000), beyond: Beyond::Refuse, at_limit: AtLimit::Cut };
    assert_eq!(race(&ledgers, plan, &[], 2000), 2000);
    // What is left of the allocation is the fleet's, whoever is asked.
    let left = ledgers.each_ref().map(|ledger| ledger.left(&AccountId::new("a"), plan, Millis::now()).unwrap().micro());
    assert_eq!(left, [0; 3]);
}

#[tokio::test]
async fn what_is_free_is_free_once_in_the_fleet() {
    let store = TestStore::start();
    let (one, two) = (start(&store, OnLoss::Refuse, None).await, start(&store, OnLoss::Refuse, None).await);
    let plan = Plan { allocation: Neurons::from_micro(1000), beyond: Beyond::Bill, at_limit: AtLimit::Finish };
    for _ in 0..15 {
        for ledger in [&one, &two] {
            drop(admitted(ledger, plan, &[], 100).await.settle(&spent(100), Millis::now()));
        }
    }
    let totals = [&one, &two].map(|ledger| ledger.totals(&AccountId::new("a"), Millis::now()).unwrap());
    assert_eq!(totals.map(|totals| totals.today.micro()), [1500; 2]);
    assert_eq!(totals.iter().map(|totals| totals.billed.micro()).sum::<u64>(), 2000);
}

#[tokio::test]
async fn a_ledger_that_ends_gives_everything_back() {
    let store = TestStore::start();
    let (one, two) = (start(&store, OnLoss::Refuse, None).await, start(&store, OnLoss::Refuse, None).await);
    let windows = [window(1, 1000, false, Counts::Requests)];
    for _ in 0..100 {
        drop(admitted(&one, FREE, &windows, 1).await.settle(&spent(1), Millis::now()));
    }
    one.close().await.unwrap();
    assert_eq!(drain(&two, FREE, &windows, Duration::from_secs(2)).await, 900);
}

#[tokio::test]
async fn a_store_that_hangs_costs_a_bounded_wait_and_leases_go_on() {
    let store = TestStore::start();
    let refusing = start(&store, OnLoss::Refuse, None).await;
    let windows = [window(1, 100_000, false, Counts::Requests)];
    // A lease that is worth something.
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(400) {
        drop(admitted(&refusing, FREE, &windows, 1).await.settle(&spent(1), Millis::now()));
        sleep(Duration::from_millis(1)).await;
    }
    store.pause();
    claim(&refusing, FREE, &windows, 1).await.map(drop).unwrap();
    let (mut served, since) = (1, Instant::now());
    let denied = loop {
        match claim(&refusing, FREE, &windows, 1).await {
            Ok(_) => served += 1,
            Err(denied) => break denied,
        }
    };
    assert_eq!(denied, Denied::Unleased);
    assert!(served > 10, "{served} from the lease");
    assert!(since.elapsed() < Duration::from_millis(1200), "{:?}", since.elapsed());
    let health = until(&refusing, |health| !health.is_up).await;
    assert!(health.fault.is_some() && health.refused >= 1 && health.losses == 1, "{health:?}");
    // Known to be lost, nobody waits for it.
    let since = Instant::now();
    assert_eq!(claim(&refusing, FREE, &windows, 1).await.err(), Some(Denied::Unleased));
    assert!(since.elapsed() < Duration::from_millis(100), "{:?}", since.elapsed());
    store.resume();
    until(&refusing, |health| health.is_up).await;
    claim(&refusing, FREE, &windows, 1).await.map(drop).unwrap();
}

#[tokio::test]
async fn what_was_taken_without_the_store_is_told_when_it_is_back() {
    let store = TestStore::start();
    let (one, two) = (start(&store, OnLoss::Local, None).await, start(&store, OnLoss::Local, None).await);
    let windows = [window(1, 1000, false, Counts::Requests)];
    for _ in 0..100 {
        drop(admitted(&one, FREE, &windows, 1).await);
        drop(admitted(&two, FREE, &windows, 1).await);
    }
    store.pause();
    let (began, mut alone) = (Instant::now(), 0);
    while alone < 300 {
        assert!(began.elapsed() < Duration::from_secs(10));
        alone += u64::from(claim(&one, FREE, &windows, 1).await.is_ok());
    }
    let health = until(&one, |health| !health.is_up).await;
    assert!(health.local > 0 && health.refused == 0, "{health:?}");
    store.resume();
    until(&one, |health| health.is_up).await;
    until(&two, |health| health.is_up).await;
    // Two hundred, three hundred, and no more than the rest of the thousand; the one that told goes on as well.
    assert_eq!(drain(&two, FREE, &windows, Duration::from_secs(3)).await, 500);
    assert!(matches!(claim(&one, FREE, &windows, 1).await.err(), Some(Denied::Over(_))));
    // Alone, a daemon stops at the limit as it knows it.
    store.pause();
    until(&one, |health| !health.is_up).await;
    assert!(matches!(claim(&one, FREE, &windows, 1).await.err(), Some(Denied::Over(_))));
    store.resume();
}

/// Restarts the store while three ledgers claim, and says how many they were admitted.
fn race_over_a_restart(mut store: TestStore, limit: u64) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ledgers = [0; 3].map(|_| runtime.block_on(start(&store, OnLoss::Refuse, None)));
    let windows = [window(1, limit, false, Counts::Requests)];
    std::thread::scope(|scope| {
        let racing = scope.spawn(|| race(&ledgers, FREE, &windows, limit));
        for pause in [40, 400, 1500] {
            std::thread::sleep(Duration::from_millis(pause));
            store.again();
        }
        racing.join().unwrap()
    })
}

#[test]
fn a_store_that_comes_back_without_its_data_is_told_what_was_taken() {
    assert_eq!(race_over_a_restart(TestStore::start(), 60_000), 60_000);
}

#[test]
fn a_store_that_comes_back_with_its_data_goes_on() {
    let store = TestStore::with(&["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]);
    assert_eq!(race_over_a_restart(store, 60_000), 60_000);
}

#[tokio::test]
async fn a_store_that_is_emptied_is_told_what_was_taken() {
    let store = TestStore::start();
    let (one, two) = (start(&store, OnLoss::Refuse, None).await, start(&store, OnLoss::Refuse, None).await);
    let windows = [window(1, 1000, false, Counts::Requests)];
    for _ in 0..300 {
        drop(admitted(&one, FREE, &windows, 1).await);
    }
    let script = Script::new("return {redis.call('FLUSHALL') and 1}");
    store.address().open().await.unwrap().run(&script, &[], &[]).await.unwrap();
    until(&one, |health| health.losses >= 1).await;
    until(&two, |health| health.losses >= 1 && health.is_up).await;
    until(&one, |health| health.is_up).await;
    assert_eq!(drain(&two, FREE, &windows, Duration::from_secs(3)).await, 700);
}

#[tokio::test]
async fn a_cluster_is_asked_as_one_server_is() {
    let store = TestStore::with(&["--save", "", "--cluster-enabled", "yes"]);
    let slots = Script::new("return {redis.call('PING') and 1}");
    // One node that has all keys.
    let client = redis::Client::open(store.address().urls[0].expose().as_str()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let all: Vec<u16> = (0..16384).collect();
    let () = redis::cmd("CLUSTER").arg("ADDSLOTS").arg(all).query_async(&mut connection).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while store.address().open().await.unwrap().run(&slots, &["k".to_owned()], &[]).await.is_err() {
        assert!(Instant::now() < deadline, "the cluster does not come up");
        sleep(Duration::from_millis(20)).await;
    }
    let mut settings = settings(&store, OnLoss::Refuse, None);
    settings.fleet.as_mut().unwrap().store.is_cluster = true;
    let ledgers = [Ledger::start(settings.clone()).unwrap(), Ledger::start(settings).unwrap()];
    for ledger in &ledgers {
        assert!(ledger.joined(Duration::from_secs(10)).await, "{:?}", ledger.health());
    }
    let windows = [window(1, 500, false, Counts::Requests), window(2, 400, true, Counts::Cost)];
    let admitted = drain(&ledgers[0], FREE, &windows[1..], Duration::from_secs(2)).await;
    assert_eq!(admitted, 400);
    assert_eq!(drain(&ledgers[1], FREE, &windows, Duration::from_millis(200)).await, 0);
    assert_eq!(drain(&ledgers[1], FREE, &windows[..1], Duration::from_secs(2)).await, 500);
}

#[tokio::test]
async fn a_password_is_needed_where_there_is_one() {
    let store = TestStore::with(&["--save", "", "--requirepass", "s3cret"]);
    let mut settings = settings(&store, OnLoss::Refuse, None);
    let without = Ledger::start(settings.clone()).unwrap();
    let health = until(&without, |health| health.fault.is_some()).await;
    assert!(!format!("{health:?}").contains("s3cret"));
    settings.fleet.as_mut().unwrap().store.password = Some(Secret::new("s3cret".to_owned()));
    assert!(!format!("{settings:?}").contains("s3cret"));
    let with = Ledger::start(settings).unwrap();
    assert!(with.joined(Duration::from_secs(10)).await, "{:?}", with.health());
}

const FOLDER: &str = "NEUROND_TEST_FLEET";

/// Takes, says of each when it is on disk, and is killed.
#[test]
#[ignore = "a process that another test starts and kills"]
fn process() {
    let Some(told) = std::env::var_os(FOLDER) else { return };
    let told: HashMap<String, String> = serde_json::from_str(told.to_str().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Address {
            urls: vec![Secret::new(told["url"].clone())],
            password: None,
            is_cluster: false,
            authorities: None,
            timeout: Duration::from_millis(250),
        };
        let fleet = Fleet { store, name: "test".to_owned(), share: SHARE, on_loss: OnLoss::Refuse };
        let settings =
            Settings { fleet: Some(fleet), folder: Some(told["folder"].clone().into()), ..Settings::default() };
        let ledger = Ledger::start(settings).unwrap();
        assert!(ledger.joined(Duration::from_secs(10)).await);
        let windows = [window(1, 2000, true, Counts::Cost), window(2, 2000, false, Counts::Requests)];
        loop {
            let reservation = admitted(&ledger, FREE, &windows, 1).await;
            reservation.settle(&spent(1), Millis::now()).durable().await.unwrap();
            println!("\ntook");
        }
    });
}

fn spawn(store: &TestStore, folder: &Path) -> Child {
    let test = concat!(module_path!(), "::process").split_once("::").unwrap().1;
    let url = store.address().urls[0].expose().clone();
    let told = serde_json::json!({ "url": url, "folder": folder });
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, told.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn leases_of_a_killed_daemon_count_as_taken_until_it_is_back() {
    let store = TestStore::start();
    let folder = tempfile::tempdir().unwrap();
    let others = [start(&store, OnLoss::Refuse, None).await, start(&store, OnLoss::Refuse, None).await];
    let mut child = spawn(&store, folder.path());
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let took = lines.map(|line| line.unwrap()).filter(|line| line == "took").take(150).count();
    assert_eq!(took, 150);
    child.kill().unwrap();
    child.wait().unwrap();
    let budget = [window(1, 2000, true, Counts::Cost)];
    let before = race(&others, FREE, &budget, 1850 * 9 / 10 - 5);
    // A few more than it said may have been written down, and what it had leased ahead is a tenth of what was left at most.
    assert!((1850 * 9 / 10 - 5..=1850).contains(&before), "{before}");
    // It is back and knows what it took; the rest is everybody's.
    let back = start(&store, OnLoss::Refuse, Some(folder.path())).await;
    let account = AccountId::new("a");
    let settled = back.totals(&account, Millis::now()).unwrap().total.micro();
    assert!((150..200).contains(&settled), "{settled}");
    assert_eq!(before + settled + race(&others, FREE, &budget, 2000 - before - settled), 2000);
    // Nobody knows how much it had taken of a window that does not survive it: all of its lease counts.
    let rate = [window(2, 2000, false, Counts::Requests)];
    let admitted = race(&others, FREE, &rate, 1850 * 9 / 10 - 5);
    assert!((1850 * 9 / 10 - 5..=2000 - settled).contains(&admitted), "{admitted}");
}
