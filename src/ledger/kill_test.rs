//! The daemon's process killed again and again while it settles, and what its folder says afterwards.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::base::{AccountId, Millis, ModelId, Neurons, RequestId};
use crate::ledger::folder::Folder;
use crate::ledger::kept::Kept;
use crate::ledger::{Claim, Denied, Ledger, Plan, Settings, Spent};
use crate::store::RealDisk;
use crate::task::Usage;

const FOLDER: &str = "NEUROND_TEST_LEDGER";
const KILLS: u64 = 200;
const THREADS: u64 = 4;
/// Requests of each thread that the next process runs again, as one does who does not know how they ended.
const AGAIN: u64 = 40;

/// What a request costs.
fn cost(thread: u64, number: u64) -> u64 {
    1 + (thread * 31 + number * 17) % 1000
}

fn request(thread: u64, number: u64) -> RequestId {
    RequestId::from_number((u128::from(thread) << 64) | u128::from(number))
}

fn settings(folder: &Path) -> Settings {
    let commit_every = Duration::from_millis(1);
    Settings { folder: Some(folder.to_path_buf()), commit_every, segment_bytes: 20_000, ..Settings::default() }
}

/// Settles until it is killed, and says of each request when it is on disk.
#[test]
#[ignore = "a process that another test starts and kills"]
fn process() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let start: u64 = std::env::var("NEUROND_TEST_START").unwrap().parse().unwrap();
    let ledger = Ledger::start(settings(&PathBuf::from(folder))).unwrap();
    println!("\nready");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let ledger = &ledger;
            scope.spawn(move || run(ledger, thread, start));
        }
    });
}

fn run(ledger: &Ledger, thread: u64, start: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let account = AccountId::new("a");
    let now = Millis::now();
    let mut waiting = Vec::new();
    for number in start.saturating_sub(AGAIN).. {
        let neurons = Neurons::from_micro(cost(thread, number));
        let claim = Claim {
            request: request(thread, number),
            account: &account,
            plan: Plan::PAID,
            windows: &[],
            tokens: 0,
            neurons,
            cost: neurons,
            is_once: true,
        };
        let reservation = match ledger.reserve(&claim, now) {
            Ok(reservation) => reservation,
            Err(Denied::Settled) => continue,
            Err(other) => panic!("{other:?}"),
        };
        if number % 7 == 3 {
            // Open for ever, as far as this process is concerned.
            std::mem::forget(ledger.reserve(&claim, now));
        }
        let model = ModelId::new("m");
        let spent = Spent {
            key: None,
            gateway: "".into(),
            provider: "".into(),
            model,
            usage: Usage::default(),
            neurons,
            cost: neurons,
        };
        waiting.push((number, reservation.settle(&spent, now)));
        if waiting.len() >= 5 {
            for (number, ticket) in waiting.drain(..) {
                runtime.block_on(ticket.durable()).unwrap();
                let line = format!("{thread} {number}\n");
                std::io::stdout().write_all(line.as_bytes()).unwrap();
            }
        }
    }
}

fn spawn(folder: &Path, start: u64) -> Child {
    let test = concat!(module_path!(), "::process");
    let test = test.split_once("::").unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env("NEUROND_TEST_START", start.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn whatever_is_said_to_be_on_disk_survives_two_hundred_kills_and_nothing_is_billed_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut told: HashSet<(u64, u64)> = HashSet::new();
    let mut next = 0;
    for kill in 0..KILLS {
        let mut child = spawn(folder.path(), next);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "ready"), "the process did not start");
        std::thread::sleep(Duration::from_micros(RequestId::random().low_bits() % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            // The last one may be torn.
            let Some((thread, number)) = line.split_once(' ') else { continue };
            let Ok(number) = number.parse() else { continue };
            told.insert((thread.parse().unwrap(), number));
            next = next.max(number + 1);
        }
        check(folder.path(), &told, next, kill);
    }
    assert!(told.len() > KILLS as usize, "{} requests are too few to say anything", told.len());
}

fn check(folder: &Path, told: &HashSet<(u64, u64)>, next: u64, kill: u64) {
    let mut kept = Kept::new(1000, 1000);
    Folder::open(RealDisk, folder, 20_000, &mut kept, (1000, 1000)).unwrap();
    let account = Arc::new(AccountId::new("a"));
    let now = Millis::now();
    let (mut settled, mut sum) = (0, 0);
    for thread in 0..THREADS {
        // Some more may have been settled than were told.
        for number in 0..next + 1000 {
            let is_settled = kept.book.is_settled(request(thread, number));
            assert!(is_settled || !told.contains(&(thread, number)), "kill {kill}: {thread} {number} is lost");
            settled += u64::from(is_settled);
            sum += if is_settled { cost(thread, number) } else { 0 };
        }
    }
    let totals = kept.book.totals(&account, now);
    assert_eq!((totals.total.micro(), totals.reserved.micro()), (sum, 0), "kill {kill}");
    let rows = kept.rows.find(&Default::default());
    let row = |of: fn(&crate::ledger::Row) -> u64| rows.iter().map(|(_, _, row)| of(row)).sum::<u64>();
    assert_eq!((row(|row| row.requests), row(|row| row.cost.micro())), (settled, sum), "kill {kill}");
    assert_eq!(kept.seq, settled, "kill {kill}");
}
