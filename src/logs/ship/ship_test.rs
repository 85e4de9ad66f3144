use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::Value;

use super::*;
use crate::base::{AccountId, LogId, Secret};
use crate::net::sigv4::Credentials;
use line::tests::{body, sample};

const NOW: Millis = Millis(1_750_000_000_000);

fn job(name: &str, path: &Path) -> Job {
    Job {
        name: name.into(),
        gateways: Vec::new(),
        prefix: "logs".into(),
        format: Format::Lines,
        destination: Destination::Folder { path: path.into() },
    }
}

fn settings(folder: &Path, jobs: Vec<Job>) -> Settings {
    let client = client::Settings {
        connect_timeout: Duration::from_secs(2),
        allow_private: true,
        proxy: None,
        tls: client::Tls::new(None).unwrap(),
    };
    let first_wait = Duration::from_millis(20);
    Settings { first_wait, ..Settings::new(folder.join("spool"), jobs, client) }
}

fn record(number: u64, gateway: &str) -> Record {
    let at = Millis(NOW.0 + number);
    Record { id: Some(LogId::at(at)), at, gateway: gateway.into(), asked: body(number.to_string()), ..sample() }
}

fn append(ship: &Ship, records: &[Record]) {
    ship.append(records.iter().map(|record| Outgoing { record, key: None }), NOW);
}

/// Names and lines of all objects under a folder.
fn objects(folder: &Path) -> BTreeMap<String, Vec<Value>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let mut text = String::new();
            GzDecoder::new(std::fs::File::open(&path).unwrap()).read_to_string(&mut text).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            found.insert(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned(), lines);
        }
    }
    found
}

fn ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["Id"].as_str().unwrap()).collect()
}

#[test]
fn each_job_gets_the_records_of_its_gateways_in_order_under_names_that_tell_when() {
    let folder = tempfile::tempdir().unwrap();
    let [all, some] = ["all", "some"].map(|name| folder.path().join(name));
    let chosen =
        |account: Option<&str>, gateway: &str| Chosen { account: account.map(AccountId::new), gateway: gateway.into() };
    let gateways = vec![chosen(Some("acme"), "g1"), chosen(Some("other"), "g0"), chosen(None, "g3")];
    let jobs = vec![job("all", &all), Job { gateways, prefix: String::new(), ..job("some", &some) }];
    // None is sealed for its age while it is filled: by the clock the records are old.
    let segment_age = Duration::from_secs(u64::from(u32::MAX));
    let ship = Ship::start(Settings { segment_age, ..settings(folder.path(), jobs) }).unwrap();
    let mut records: Vec<Record> = (0..2000).map(|number| record(number, &format!("g{}", number % 4))).collect();
    records[7].id = None;
    append(&ship, &records);
    assert!(ship.flush(Duration::from_secs(20)), "{:?}", ship.status());
    let expected = |gateways: &[&str]| -> Vec<String> {
        let wanted = records.iter().filter(|record| gateways.contains(&&*record.gateway));
        wanted.filter_map(|record| Some(record.id?.to_string())).collect()
    };
    let (all, some) = (objects(&all), objects(&some));
    let ([(name, lines)], [(other, others)]) = (&*all.iter().collect::<Vec<_>>(), &*some.iter().collect::<Vec<_>>())
    else {
        panic!("one object each: {all:?} {some:?}")
    };
    assert_eq!(ids(lines), expected(&["g0", "g1", "g2", "g3"]));
    assert_eq!(ids(others), expected(&["g1", "g3"]));
    assert!(name.starts_with("logs/20250615/20250615T150640Z_20250615T150641Z_"), "{name}");
    assert!(other.starts_with("20250615/20250615T150640Z_20250615T150641Z_"), "{other}");
    assert!(name.ends_with(".log.gz") && name.len() == other.len() + 5, "{name}");
    let status = ship.status();
    assert_eq!((status.appended_records, status.spool_bytes, status.jobs[1].skipped_records), (1999, 0, 1000));
    assert_eq!(status.jobs.iter().map(|job| job.shipped_records).collect::<Vec<_>>(), [1999, 999]);
}

#[test]
fn a_segment_that_is_shipped_again_takes_the_place_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    // A second job that cannot ship keeps the segments.
    let stuck = folder.path().join("stuck");
    std::fs::write(&stuck, "no folder").unwrap();
    let jobs = || vec![job("good", &there), job("stuck", &stuck)];
    let start = || Ship::start(settings(folder.path(), jobs())).unwrap();
    let ship = start();
    append(&ship, &(0..100).map(|number| record(number, "g")).collect::<Vec<_>>());
    assert!(!ship.flush(Duration::from_millis(300)));
    drop(ship);
    let first = objects(&there);
    assert_eq!(first.values().map(Vec::len).collect::<Vec<_>>(), [100]);
    std::fs::remove_file(folder.path().join("spool/good.cursor")).unwrap();
    std::fs::remove_file(&stuck).unwrap();
    let ship = start();
    assert!(ship.flush(Duration::from_secs(20)), "{:?}", ship.status());
    assert_eq!((objects(&there), objects(&stuck)), (first.clone(), first));
    assert_eq!(ship.status().jobs[0].shipped_records, 100, "it was shipped twice");
}

#[test]
fn what_is_old_is_shipped_without_being_asked_and_what_is_left_by_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    let quick =
        || Settings { segment_age: Duration::from_millis(40), ..settings(folder.path(), vec![job("a", &there)]) };
    let until = |ship: &Ship, count: u64| {
        let begin = Instant::now();
        while ship.status().jobs[0].shipped_records < count {
            assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", ship.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let ship = Ship::start(quick()).unwrap();
    append(&ship, &[record(1, "g")]);
    until(&ship, 1);
    append(&ship, &[record(2, "g")]);
    drop(ship);
    let ship = Ship::start(quick()).unwrap();
    append(&ship, &[record(3, "g")]);
    assert!(ship.flush(Duration::from_secs(20)));
    let found = objects(&there);
    let mut asked: Vec<&str> = found.values().flatten().map(|line| line["RequestBody"].as_str().unwrap()).collect();
    asked.sort();
    assert_eq!(asked, ["1", "2", "3"]);
}

#[test]
fn the_threads_that_ship_step_back_behind_those_that_serve() {
    let folder = tempfile::tempdir().unwrap();
    let ship = Ship::start(settings(folder.path(), vec![job("a", &folder.path().join("there"))])).unwrap();
    append(&ship, &[record(1, "g")]);
    assert!(ship.flush(Duration::from_secs(20)));
    let threads = || {
        let mut found = Vec::new();
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            // A thread of another test may have ended.
            let Ok(stat) = std::fs::read_to_string(task.unwrap().path().join("stat")) else { continue };
            let (name, rest) = stat.split_once(") ").unwrap();
            if name.ends_with("(ship") || name.ends_with("(ship-disk") {
                found.push(rest.split(' ').nth(16).unwrap().parse::<i32>().unwrap());
            }
        }
        found
    };
    // One of another test may just have begun.
    let begin = Instant::now();
    while !threads().iter().all(|nice| *nice == post::NICE) || threads().len() < 2 {
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", threads());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn settings_that_cannot_be_used_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let good = || job("a", folder.path());
    let http = |url: &str, headers: Vec<(String, Secret<String>)>| Destination::Http { url: url.into(), headers };
    let s3 = |endpoint: &str, bucket: &str| Destination::S3 {
        endpoint: endpoint.into(),
        region: "auto".into(),
        bucket: bucket.into(),
        credentials: Credentials {
            access_key_id: "a".into(),
            secret_access_key: Secret::new("s".into()),
            session_token: None,
        },
        path_style: true,
    };
    let to = |destination: Destination| vec![Job { destination, ..good() }];
    let bad = ("authorization".to_owned(), Secret::new("top\nsecret".to_owned()));
    for (jobs, expected) in [
        ((0..5).map(|number| job(&format!("j{number}"), folder.path())).collect(), "4 at most"),
        (vec![good(), good()], "rename one"),
        (vec![job("", folder.path())], "1 to 64"),
        (vec![job("../x", folder.path())], "1 to 64"),
        (vec![Job { prefix: "../x".into(), ..good() }], "logs/prod"),
        (vec![Job { prefix: "/x".into(), ..good() }], "logs/prod"),
        (vec![Job { prefix: "x/".into(), ..good() }], "logs/prod"),
        (vec![Job { prefix: "x/./y".into(), ..good() }], "logs/prod"),
        (
            vec![Job { format: Format::Parquet, destination: http("https://host/", Vec::new()), ..good() }],
            "lines of JSON",
        ),
        (to(http("ftp://host/x", Vec::new())), "https://host/path"),
        (to(http("host", Vec::new())), "https://host/path"),
        (to(http("https://user@host/", Vec::new())), "is no host"),
        (to(http("https://host/", vec![bad])), "authorization"),
        (to(s3("https://host", "")), "bucket"),
        (to(s3("https://host", "a/b")), "bucket"),
        (to(s3("", "b")), "https://host/path"),
    ] {
        let error = Ship::start(settings(folder.path(), jobs)).err().unwrap();
        assert!(error.message().contains(expected), "{expected}: {error}");
        assert!(!error.message().contains("secret"), "{error}");
    }
    let small = Settings { segment_bytes: 200, max_bytes: 1000, ..settings(folder.path(), vec![good()]) };
    let error = Ship::start(small).err().unwrap();
    assert!(error.message().contains("give it 1600"), "{error}");
    assert!(Ship::start(settings(folder.path(), Vec::new())).is_ok_and(|ship| ship.flush(Duration::ZERO)));
}
