use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::base::{ModelId, RequestId};
use crate::ledger::claim::{AtLimit, Beyond, Counts};
use crate::ledger::window::{Span, Technique};
use crate::store::fault::{Faults, FaultyDisk};
use crate::task::Usage;

fn claim<'a>(account: &'a AccountId, plan: Plan, windows: &'a [Window], neurons: u64, number: u128) -> Claim<'a> {
    let (request, neurons) = (RequestId::from_number(number), Neurons::from_micro(neurons));
    Claim { request, account, plan, windows, tokens: 0, neurons, cost: neurons, is_once: false }
}

fn spent(neurons: u64) -> Spent {
    let neurons = Neurons::from_micro(neurons);
    let model = ModelId::new("m");
    Spent { key: None, gateway: "".into(), provider: "".into(), model, usage: Usage::default(), neurons, cost: neurons }
}

fn settings(folder: &tempfile::TempDir) -> Settings {
    Settings { folder: Some(folder.path().join("ledger")), commit_every: Duration::ZERO, ..Settings::default() }
}

fn settle(ledger: &Ledger, neurons: u64) -> Ticket {
    let account = AccountId::new("a");
    ledger.reserve(&claim(&account, Plan::PAID, &[], neurons, 1), Millis(0)).unwrap().settle(&spent(neurons), Millis(0))
}

fn total(ledger: &Ledger) -> u64 {
    ledger.totals(&AccountId::new("a"), Millis(0)).unwrap().total.micro()
}

#[test]
fn of_ten_thousand_claims_at_once_exactly_as_many_pass_as_fit() {
    let plan = Plan { allocation: Neurons::from_micro(3000), beyond: Beyond::Refuse, at_limit: AtLimit::Cut };
    let check = |plan: Plan, windows: &[Window], expected: u64| {
        let ledger = Ledger::start(Settings::default()).unwrap();
        let (passed, account) = (AtomicU64::new(0), AccountId::new("a"));
        let held = parking_lot::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..16 {
                let (ledger, account, passed, held) = (&ledger, &account, &passed, &held);
                scope.spawn(move || {
                    for number in 0..625 {
                        let claim = claim(account, plan, windows, 1, thread * 625 + number);
                        let Ok(reservation) = ledger.reserve(&claim, Millis(1)) else { continue };
                        passed.fetch_add(1, Ordering::Relaxed);
                        // Some are settled at once, and leave no more room than those that are held.
                        if number % 2 == 0 {
                            drop(reservation.settle(&spent(1), Millis(1)));
                        } else {
                            held.lock().push(reservation);
                        }
                    }
                });
            }
        });
        assert_eq!(passed.into_inner(), expected);
    };
    let window = |limit, technique, counts| {
        [Window { id: 1, rule: "r".into(), limit, span: Span::Millis(60_000), technique, counts }]
    };
    check(plan, &[], 3000);
    check(Plan::PAID, &window(2500, Technique::Fixed, Counts::Requests), 2500);
    check(Plan::PAID, &window(1700, Technique::Sliding, Counts::Cost), 1700);
    check(plan, &window(2500, Technique::Sliding, Counts::Neurons), 2500);
}

#[tokio::test]
async fn a_dropped_reservation_is_given_back_and_a_settled_one_is_charged() {
    let ledger = Ledger::start(Settings::default()).unwrap();
    let account = AccountId::new("a");
    let kept = ledger.reserve(&claim(&account, Plan::FREE, &[], 10, 1), Millis(0)).unwrap();
    drop(ledger.reserve(&claim(&account, Plan::FREE, &[], 20, 2), Millis(0)).unwrap());
    assert_eq!(ledger.totals(&account, Millis(0)).unwrap().reserved.micro(), 10);
    let ticket = kept.settle(&spent(6), Millis(0));
    assert!(ticket.is_billed());
    let totals = ledger.totals(&account, Millis(0)).unwrap();
    assert_eq!((totals.reserved.micro(), totals.today.micro()), (0, 6));
    assert_eq!(ledger.health().open, 0);
    let rows = ledger.rows(Filter::default()).await.unwrap();
    assert_eq!(rows.iter().map(|(_, _, row)| (row.requests, row.neurons.micro())).collect::<Vec<_>>(), [(1, 6)]);
    ticket.durable().await.unwrap();
}

#[tokio::test]
async fn a_restart_goes_on_where_the_last_one_ended() {
    let folder = tempfile::tempdir().unwrap();
    let account = AccountId::new("a");
    let windows = [
        Window {
            id: 1,
            rule: "month".into(),
            limit: 100,
            span: Span::Month,
            technique: Technique::Fixed,
            counts: Counts::Cost,
        },
        Window {
            id: 2,
            rule: "day".into(),
            limit: 3,
            span: Span::DAY,
            technique: Technique::Sliding,
            counts: Counts::Requests,
        },
    ];
    for round in 0..3 {
        let ledger = Ledger::start(settings(&folder)).unwrap();
        assert_eq!(total(&ledger), round * 40);
        assert_eq!(ledger.health().last, ledger.health().durable);
        let claim = claim(&account, Plan::FREE, &windows, 40, 1);
        let reservation = ledger.reserve(&claim, Millis(0)).unwrap();
        assert_eq!(reservation.standing().unwrap().left, [60, 20, 0][round as usize]);
        let other = Ledger::start(settings(&folder)).err().unwrap();
        assert!(other.message().contains("another daemon"), "{other}");
        let ticket = reservation.settle(&spent(40), Millis(0));
        if round == 1 {
            ledger.close().await.unwrap();
        } else {
            ticket.durable().await.unwrap();
            ledger.close().await.unwrap();
        }
        assert!(!ledger.is_alive());
        assert_eq!(ledger.reserve(&claim, Millis(0)).err(), Some(Denied::Dead));
    }
    let ledger = Ledger::start(settings(&folder)).unwrap();
    assert!(matches!(ledger.pass(&windows[1], Millis(0)), Err(Denied::Over(over)) if over.left == 0));
    let rows = ledger.rows(Filter::default()).await.unwrap();
    assert_eq!((rows.len(), rows[0].2.requests, rows[0].2.cost.micro()), (1, 3, 120));
}

#[tokio::test]
async fn a_disk_that_fails_once_is_not_noticed_and_nothing_is_lost() {
    for faults in [Faults { deaf: 1, ..Faults::default() }, Faults { torn: 1, ..Faults::default() }] {
        let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
        let ledger = Ledger::start_on(disk.clone(), settings(&folder)).unwrap();
        settle(&ledger, 5).durable().await.unwrap();
        disk.set(faults);
        settle(&ledger, 6).durable().await.unwrap();
        settle(&ledger, 7).durable().await.unwrap();
        assert_eq!(ledger.health().faults, 0);
        // Before the ledger can close well.
        disk.set(Faults { room: Some(0), ..Faults::default() });
        ledger.close().await.unwrap();
        for torn in [0, 3, 1000] {
            disk.power_off(torn);
        }
        assert_eq!(total(&Ledger::start(settings(&folder)).unwrap()), 18, "{faults:?}");
    }
}

#[tokio::test]
async fn a_full_disk_refuses_new_calls_and_keeps_those_that_waited_when_there_is_room() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let ledger = Ledger::start_on(disk.clone(), settings(&folder)).unwrap();
    settle(&ledger, 5).durable().await.unwrap();
    let account = AccountId::new("a");
    let admitted: Vec<_> =
        (0..50).map(|_| ledger.reserve(&claim(&account, Plan::PAID, &[], 1, 1), Millis(0)).unwrap()).collect();
    disk.set(Faults { room: Some(10), ..Faults::default() });
    let tickets: Vec<_> = admitted.into_iter().map(|reservation| reservation.settle(&spent(1), Millis(0))).collect();
    let mut told = until(&ledger, |health| health.fault.is_some()).await;
    assert_eq!((told.faults, told.open, told.durable), (1, 0, 1));
    assert!(told.queued > 0 && told.fault.take().is_some());
    let refused = ledger.reserve(&claim(&account, Plan::PAID, &[], 1, 1), Millis(0)).err();
    assert_eq!((refused, ledger.health().refused), (Some(Denied::Faulty), 1));
    assert_eq!(total(&ledger), 55, "what was settled counts");
    let rows = ledger.rows(Filter::default()).await.unwrap();
    assert_eq!(rows[0].2.requests, 51, "and can be looked at");
    disk.set(Faults::default());
    for ticket in tickets {
        ticket.durable().await.unwrap();
    }
    let health = until(&ledger, |health| health.fault.is_none()).await;
    assert_eq!((health.queued, health.durable, health.faults), (0, 51, 1));
    settle(&ledger, 5).durable().await.unwrap();
    ledger.close().await.unwrap();
    disk.power_off(0);
    assert_eq!(total(&Ledger::start(settings(&folder)).unwrap()), 60);
}

#[tokio::test]
async fn calls_go_on_unmetered_where_the_settings_say_so() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let settings = Settings { on_fault: OnFault::Unmetered, ..settings(&folder) };
    let ledger = Ledger::start_on(disk.clone(), settings.clone()).unwrap();
    disk.set(Faults { deaf: u32::MAX, ..Faults::default() });
    drop(settle(&ledger, 5));
    until(&ledger, |health| health.fault.is_some()).await;
    let account = AccountId::new("a");
    let rate = [Window {
        id: 1,
        rule: "r".into(),
        limit: 1,
        span: Span::Millis(1000),
        technique: Technique::Fixed,
        counts: Counts::Requests,
    }];
    let reservation = ledger.reserve(&claim(&account, Plan::FREE, &rate, 7, 1), Millis(0)).unwrap();
    assert_eq!(reservation.granted().neurons.micro(), 7);
    assert!(ledger.reserve(&claim(&account, Plan::FREE, &rate, 7, 1), Millis(0)).is_err(), "limits count");
    let ticket = reservation.settle(&spent(7), Millis(0));
    assert!(!ticket.is_billed());
    assert_eq!((total(&ledger), ledger.health().unmetered), (5, 1));
    assert_eq!(ledger.totals(&account, Millis(0)).unwrap().reserved, Neurons::ZERO);
    assert!(ledger.close().await.is_err(), "what waits is not on disk");
    // Nothing of it was: a later start knows of nothing.
    disk.power_off(0);
    assert_eq!(total(&Ledger::start(settings).unwrap()), 0);
}

#[tokio::test]
async fn what_is_admitted_can_be_settled_and_what_could_not_be_is_refused() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let settings = Settings { queue: 8, commit_every: Duration::from_secs(3600), ..settings(&folder) };
    let ledger = Ledger::start_on(disk, settings).unwrap();
    let account = AccountId::new("a");
    let mut open: Vec<_> =
        (0..8).map(|_| ledger.reserve(&claim(&account, Plan::PAID, &[], 1, 1), Millis(0)).unwrap()).collect();
    let next = || ledger.reserve(&claim(&account, Plan::PAID, &[], 1, 1), Millis(0)).err();
    assert_eq!(next(), Some(Denied::Faulty));
    drop(open.pop());
    assert_eq!(next(), None);
    let tickets: Vec<_> = open.into_iter().map(|reservation| reservation.settle(&spent(1), Millis(0))).collect();
    // A queue that fills up does not wait for others to join.
    for ticket in tickets {
        ticket.durable().await.unwrap();
    }
    assert_eq!(total(&ledger), 7);
}

#[test]
fn a_panic_while_it_counts_leaves_a_ledger_that_nobody_uses() {
    let ledger = Ledger::start(Settings::default()).unwrap();
    let account = AccountId::new("a");
    let held = ledger.reserve(&claim(&account, Plan::FREE, &[], 1, 1), Millis(0)).unwrap();
    assert!(ledger.is_alive());
    let shared = ledger.shared.clone();
    let panicked = std::thread::spawn(move || {
        let _state = shared.state.lock().unwrap();
        panic!("in the midst of it");
    });
    assert!(panicked.join().is_err());
    assert!(!ledger.is_alive());
    assert_eq!(ledger.reserve(&claim(&account, Plan::FREE, &[], 1, 2), Millis(0)).err(), Some(Denied::Dead));
    assert!(ledger.totals(&account, Millis(0)).is_err() && ledger.health().fault.is_some());
    assert!(!held.settle(&spent(1), Millis(0)).is_billed());
}

/// Waits until the ledger's health is as expected.
async fn until(ledger: &Ledger, is_met: impl Fn(&Health) -> bool) -> Health {
    loop {
        let health = ledger.health();
        if is_met(&health) {
            return health;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn while_a_sync_takes_its_time_what_is_settled_is_written_all_the_same() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let settings = Settings { segment_bytes: 2000, queue: 200, ..settings(&folder) };
    let ledger = Ledger::start_on(disk.clone(), settings.clone()).unwrap();
    settle(&ledger, 1).durable().await.unwrap();
    disk.set(Faults { is_stuck: true, ..Faults::default() });
    let tickets: Vec<_> = (0..100).map(|_| settle(&ledger, 1)).collect();
    // What a process that is killed now leaves behind.
    let killed = tempfile::tempdir().unwrap();
    let path = killed.path().join("ledger");
    let is_written = || {
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        for entry in std::fs::read_dir(settings.folder.as_ref().unwrap()).unwrap() {
            let entry = entry.unwrap();
            // A segment may go meanwhile.
            let _ = std::fs::copy(entry.path(), path.join(entry.file_name()));
        }
        let mut kept = Kept::new(100, 100);
        Folder::open(RealDisk, &path, 2000, &mut kept, (100, 100)).unwrap();
        kept.seq == 101
    };
    for _ in 0..1000 {
        if is_written() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(is_written());
    assert_eq!((ledger.health().durable, ledger.health().queued), (1, 100));
    assert_eq!(ledger.health().fault, None);
    // What waits is bounded.
    let account = AccountId::new("a");
    let reserve = || ledger.reserve(&claim(&account, Plan::PAID, &[], 1, 1), Millis(0));
    let held: Vec<_> = (0..100).map(|_| reserve().unwrap()).collect();
    assert_eq!(reserve().err(), Some(Denied::Faulty));
    drop(held);
    disk.set(Faults::default());
    for ticket in tickets {
        ticket.durable().await.unwrap();
    }
    assert_eq!(ledger.health().durable, 101);
    ledger.close().await.unwrap();
    assert_eq!(total(&Ledger::start(settings).unwrap()), 101);
}
