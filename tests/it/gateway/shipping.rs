//! Log records on their way out, whatever dies meanwhile: a real S3 server that checks signatures, a folder, a collector that
//! misbehaves, and the process that ships.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use neurond::base::{AccountId, LogId, Millis, Neurons, RequestId, Secret};
use neurond::logs::ship::{AtBound, Chosen, Destination, Format, Job, Outgoing, Settings, Ship};
use neurond::logs::{Body, CacheUse, Record};
use neurond::net::client;
use neurond::net::sigv4::Credentials;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Rig, question, streamed};
use crate::harness::Answer;

const PATIENCE: Duration = Duration::from_secs(60);
/// The folder that a process started by a test ships from, and where to.
const CHILD: &str = "NEUROND_TEST_SHIP";
const BATCH: usize = 50;

#[test]
fn a_bucket_gets_every_record_of_a_server_that_is_killed_and_started_again_and_none_twice() {
    let Some(mut server) = S3::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let ship = Ship::start(settings(folder.path(), vec![job("s3", server.destination("good"))])).unwrap();
    let mut sent = Vec::new();
    for round in 0..30 {
        sent.extend(append(&ship, round * 200..(round + 1) * 200));
        if round % 5 == 3 {
            server.kill();
        }
        if round % 5 == 0 && round > 0 {
            server.run();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    server.run();
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    let found = server.lines();
    assert_eq!(ids(&found), sent, "in order, and none twice");
    let status = ship.status();
    assert!(status.jobs[0].failures > 0 && status.spool_bytes == 0, "{status:?}");
}

#[test]
fn a_bucket_that_refuses_the_signature_holds_the_records_until_the_key_is_right() {
    let Some(server) = S3::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let start =
        |secret: &str| Ship::start(settings(folder.path(), vec![job("s3", server.destination(secret))])).unwrap();
    let ship = start("wrong");
    let sent = append(&ship, 0..100);
    assert!(!ship.flush(Duration::from_millis(100)));
    until(|| ship.status().jobs[0].is_held);
    let held = ship.status().jobs[0].clone();
    let (_, why) = held.last_error.unwrap();
    assert!(held.is_held && held.waiting_records == 100 && why.contains("403"), "{why}");
    assert!(why.contains("SignatureDoesNotMatch"), "the server's word is told: {why}");
    assert!(server.lines().is_empty());
    drop(ship);
    let ship = start("good");
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    assert_eq!(ids(&server.lines()), sent);
    assert!(!ship.status().jobs[0].is_held);
}

#[test]
fn a_bucket_is_reached_by_its_own_host_name() {
    let Some(server) = S3::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Nobody knows this name but the proxy.
    let proxy = tunnels_to(server.address);
    let destination = Destination::S3 {
        endpoint: "http://s3.test".into(),
        region: "eu-central-1".into(),
        bucket: "logs".into(),
        credentials: credentials("good"),
        path_style: false,
    };
    let mut settings = settings(folder.path(), vec![job("s3", destination)]);
    settings.client.proxy = Some(proxy.to_string());
    let ship = Ship::start(settings).unwrap();
    let sent = append(&ship, 0..10);
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    assert_eq!(ids(&server.lines()), sent);
}

#[test]
fn a_process_that_is_killed_while_it_ships_loses_nothing_that_it_had_taken() {
    if let Some(folder) = std::env::var_os(CHILD) {
        ship_for_ever(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let server = S3::start();
    let mut jobs = vec![job("disk", Destination::Folder { path: folder.path().join("there") })];
    jobs.extend(server.as_ref().map(|server| job("s3", server.destination("good"))));
    let endpoint = server.as_ref().map(|server| server.address.to_string()).unwrap_or_default();
    const KILLS: usize = 8;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "gateway::shipping::a_process_that_is_killed_while_it_ships_loses_nothing_that_it_had_taken",
            ])
            .env(CHILD, folder.path())
            .env("NEUROND_TEST_SHIP_TO", &endpoint)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = taken(folder.path()).len();
        until(|| taken(folder.path()).len() > before + 5 * BATCH);
        std::thread::sleep(Duration::from_millis(37 * kill as u64 % 100));
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let taken = taken(folder.path());
    let ship = Ship::start(settings(folder.path(), jobs)).unwrap();
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    let check = |found: Vec<Value>| {
        let mut seen: BTreeMap<String, Value> = BTreeMap::new();
        let mut twice = 0;
        for line in found {
            let id = line["Id"].as_str().unwrap().to_owned();
            if let Some(other) = seen.insert(id, line.clone()) {
                assert_eq!(other, line, "one id, one record");
                twice += 1;
            }
        }
        let missing: Vec<_> = taken.iter().filter(|id| !seen.contains_key(*id)).collect();
        assert!(missing.is_empty(), "{} of {} are missing: {missing:.200?}", missing.len(), taken.len());
        // It may have been killed between taking records and telling us.
        assert!(seen.len() - taken.len() <= KILLS * BATCH, "{} {}", seen.len(), taken.len());
        assert_eq!(twice, 0, "a repeat takes the place of the first");
    };
    check(lines_in(&folder.path().join("there")));
    if let Some(server) = server {
        check(server.lines());
    }
}

#[test]
fn a_collector_that_fails_in_every_way_gets_every_record_in_order() {
    use Behaviour::*;
    let collector = Collector::start(vec![
        Answer(500, ""),
        Answer(503, "retry-after: 0\r\n"),
        Hang,
        Reset,
        Take,
        Half,
        Answer(429, ""),
        Answer(403, ""),
        Take,
        TakeAndReset,
        Answer(408, ""),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let headers = vec![("authorization".to_owned(), Secret::new("Bearer collector".to_owned()))];
    let destination = Destination::Http { url: format!("http://{}/in?x=1", collector.address), headers };
    let patience = Duration::from_millis(400);
    let one = settings(folder.path(), vec![job("http", destination)]);
    let ship = Ship::start(Settings { patience, first_wait: Duration::from_millis(2), ..one }).unwrap();
    let mut sent = Vec::new();
    for round in 0..12 {
        sent.extend(append(&ship, round * 100..(round + 1) * 100));
        ship.flush(Duration::from_millis(1));
    }
    until(|| ship.flush(Duration::from_millis(100)));
    let seen = collector.seen.lock();
    let (mut names, mut order) = (BTreeMap::new(), Vec::new());
    for (head, body) in seen.iter() {
        let header = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
            line.unwrap_or_else(|| panic!("{name} in {head}")).to_owned()
        };
        assert!(head.starts_with("POST /in?x=1 HTTP/1.1\r\n"), "{head}");
        assert_eq!(header("authorization"), "Bearer collector");
        assert_eq!(
            (header("content-type"), header("content-encoding")),
            ("application/x-ndjson".into(), "gzip".into())
        );
        let lines = unpacked(body);
        let known = names.insert(header("x-object-name"), lines.clone());
        match known {
            Some(known) => assert_eq!(known, lines, "a repeat is the same"),
            None => order.extend(ids(&lines)),
        }
    }
    assert!(seen.len() > names.len(), "one was taken and not said to be");
    assert_eq!(order, sent);
    let status = ship.status();
    assert_eq!((status.jobs[0].shipped_records, status.spool_bytes), (1200, 0));
    assert!(status.jobs[0].failures >= 7, "{status:?}");
    assert!(!format!("{status:?}").contains("Bearer"), "{status:?}");
}

#[test]
fn a_destination_that_is_down_costs_the_others_nothing_and_the_spool_keeps_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    let collector = Collector::start(vec![Behaviour::Hang; 10_000]);
    let down = Destination::Http { url: format!("http://{}/", collector.address), headers: Vec::new() };
    let jobs = vec![job("good", Destination::Folder { path: there.clone() }), job("down", down)];
    let ship = Ship::start(Settings { max_bytes: 256 << 10, ..settings(folder.path(), jobs) }).unwrap();
    let mut sent = Vec::new();
    for round in 0..40 {
        sent.extend(append(&ship, round * 100..(round + 1) * 100));
        // What is sealed, and not what is being filled.
        until(|| ship.status().jobs[0].waiting_segments < 2);
        assert!(ship.status().spool_bytes <= 256 << 10);
    }
    assert!(!ship.flush(Duration::from_millis(200)), "it tells that one is not done");
    until(|| ship.status().jobs[0].waiting_records == 0);
    assert_eq!(ids(&lines_in(&there)), sent);
    let status = ship.status();
    let [good, down] = &status.jobs[..] else { panic!("{status:?}") };
    assert_eq!((good.dropped_records, good.shipped_records), (0, 4000));
    assert!(down.dropped_records > 0 && down.shipped_records == 0, "{down:?}");
    assert_eq!(down.dropped_records + down.waiting_records, status.appended_records);
    assert_eq!((status.dropped_records, status.refused_records), (down.dropped_records, 0));
}

#[test]
fn a_spool_that_refuses_tells_how_many_and_ships_what_it_took() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    std::fs::write(&there, "no folder").unwrap();
    let jobs = vec![job("disk", Destination::Folder { path: there.clone() })];
    let bounds = Settings { max_bytes: 256 << 10, at_bound: AtBound::Refuse, ..settings(folder.path(), jobs) };
    let ship = Ship::start(bounds).unwrap();
    let sent: Vec<String> = (0..40).flat_map(|round| append(&ship, round * 100..(round + 1) * 100)).collect();
    let full = ship.status();
    assert_eq!(full.appended_records + full.refused_records, 4000);
    assert!(full.refused_records > 1000 && full.dropped_records == 0, "{full:?}");
    std::fs::remove_file(&there).unwrap();
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    assert_eq!(ids(&lines_in(&there)), sent[..full.appended_records as usize], "the first that came");
}

#[test]
fn a_folder_that_is_full_gets_the_rest_when_there_is_room_and_no_half_objects() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&folder.path().join("small"), "128k") else { return };
    let jobs = vec![job("disk", Destination::Folder { path: disk.path.clone() })];
    let ship = Ship::start(settings(folder.path(), jobs)).unwrap();
    let mut sent = Vec::new();
    for round in 0..30 {
        sent.extend(append(&ship, round * 100..(round + 1) * 100));
    }
    assert!(!ship.flush(Duration::from_millis(500)));
    until(|| ship.status().jobs[0].last_error.is_some());
    let (_, why) = ship.status().jobs[0].last_error.clone().unwrap();
    assert!(why.contains("No space left"), "{why}");
    let some = ids(&lines_in(&disk.path));
    assert!(!some.is_empty() && some[..] == sent[..some.len()], "whole objects, in order");
    disk.mount_again("16m");
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    assert_eq!(ids(&lines_in(&disk.path)), sent);
}

#[actix_web::test]
async fn a_daemon_ships_tables_that_say_what_its_lines_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let server = S3::start();
    std::fs::write(path("secret"), "good").unwrap();
    let mut more = String::from("[logs]\nship_every_s = 1\n");
    for (name, format) in [("lines", "ndjson"), ("tables", "parquet")] {
        let path = path(name);
        more += &format!("[[ship]]\nname = \"{name}\"\nto = \"folder\"\nformat = \"{format}\"\n");
        more += &format!("gateways = [\"*\"]\npath = \"{}\"\n", path.display());
    }
    if let Some(server) = &server {
        more += "[[ship]]\nname = \"s3\"\nto = \"s3\"\nformat = \"parquet\"\ngateways = [\"*\"]\nprefix = \"p/q\"\n";
        more += &format!("url = \"http://{}\"\nbucket = \"logs\"\npath_style = true\n", server.address);
        more += "allow_private = true\nregion = \"us-east-1\"\naccess_key_id = \"writer\"\n";
        more += &format!("secret_file = \"{}\"\n", path("secret").display());
    }
    let logs = path("logs");
    let rig = Rig::made(&more, false, move |config| config.records.folder = Some(logs));
    let told = [("cf-aig-metadata", r#"{"user":"zo\u00eb","plan":"free"}"#), ("user-agent", "tests/1")];
    for (headers, body, expected) in [
        (&told[..], question("gr\u{fc}n \u{1f600}"), 200),
        (&[("cf-aig-cache-ttl", "600")], streamed("two"), 200),
        (&[("cf-aig-cache-ttl", "600")], streamed("two"), 200),
        (&[("x-fake", "status=500"), ("cf-aig-max-attempts", "1")], question("three"), 500),
        (&[("cf-aig-collect-log-payload", "false")], question(""), 200),
    ] {
        assert_eq!(Answer::of(rig.chat(headers, &body)).await.status, expected, "{body}");
    }
    rig.daemon.eventually("five lines arrive", |_| lines_in(&path("lines")).len() == 5).await;
    // The same segments under the same names, but for their ends.
    let names = |folder: &Path, kind: &str| -> BTreeSet<String> {
        let stem = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().split('.').next().unwrap().to_owned();
        objects_in(folder, kind).iter().map(stem).collect()
    };
    let expected = names(&path("lines"), "gz");
    rig.daemon.eventually("tables arrive", |_| names(&path("tables"), "parquet") == expected).await;
    let (lines, rows) = (lines_in(&path("lines")), rows_of(&objects_in(&path("tables"), "parquet")));
    assert_eq!((ids(&rows), rows.len()), (ids(&lines), 5));
    for (row, line) in rows.iter().zip(&lines) {
        for (name, cell) in row.as_object().unwrap() {
            let field = line.get(name).unwrap_or(&Value::Null);
            assert_eq!(field_of(cell), field_of(field), "{name} of {line}");
        }
        assert!(line.as_object().unwrap().keys().all(|name| row.get(name).is_some()), "{row} {line}");
    }
    let metadata: Value = serde_json::from_str(rows[0]["Metadata"].as_str().unwrap()).unwrap();
    assert_eq!(metadata, serde_json::from_str::<Value>(told[0].1).unwrap(), "as the caller meant it");
    if let Some(server) = server {
        let there = server.root.path().join("logs/p/q");
        rig.daemon.eventually("the bucket has them", |_| names(&there, "parquet") == expected).await;
        let read = |files: BTreeSet<PathBuf>| files.iter().map(|file| std::fs::read(file).unwrap()).collect::<Vec<_>>();
        let same = read(objects_in(&there, "parquet")) == read(objects_in(&path("tables"), "parquet"));
        assert!(same, "the same bytes");
    }
}

#[test]
fn a_job_without_records_of_its_gateways_is_done_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let [there, other] = ["there", "other"].map(|name| folder.path().join(name));
    let chosen = Chosen { account: Some(AccountId::new("acme")), gateway: "another".into() };
    let elsewhere = Job { gateways: vec![chosen], ..job("other", Destination::Folder { path: other.clone() }) };
    let jobs = vec![job("disk", Destination::Folder { path: there.clone() }), elsewhere];
    let ship = Ship::start(settings(folder.path(), jobs)).unwrap();
    let sent = append(&ship, 0..500);
    assert!(ship.flush(PATIENCE), "{:?}", ship.status());
    assert_eq!((ids(&lines_in(&there)), lines_in(&other).len()), (sent, 0));
    assert_eq!((ship.status().spool_bytes, ship.status().jobs[1].skipped_records), (0, 500));
}

fn job(name: &str, destination: Destination) -> Job {
    Job { name: name.into(), gateways: Vec::new(), prefix: "p/q".into(), format: Format::Lines, destination }
}

/// Small segments and short waits.
fn settings(folder: &Path, jobs: Vec<Job>) -> Settings {
    let client = client::Settings {
        connect_timeout: Duration::from_secs(2),
        allow_private: true,
        proxy: None,
        tls: client::Tls::new(None).unwrap(),
    };
    let all = Settings::new(folder.join("spool"), jobs, client);
    Settings { segment_bytes: 32 << 10, first_wait: Duration::from_millis(10), ..all }
}

/// Bodies that do not compress, so that objects have a size.
fn record(number: usize) -> Record {
    let text = format!("{number} {} {}", RequestId::random(), RequestId::random());
    let body = |text: String| Body { size: text.len() as u64, kept: text.into() };
    // Objects sort by their times in seconds, so that their order can be seen.
    let at = Millis(1_750_000_000_000 + number as u64 * 1000);
    Record {
        id: Some(LogId::at(at)),
        request: RequestId::random(),
        at,
        account: AccountId::new("acme"),
        key: None,
        gateway: "g".into(),
        provider: "openai".into(),
        model: "m".into(),
        task: None,
        path: "v1/chat/completions".into(),
        status: 200,
        success: true,
        cache: CacheUse::Off,
        duration_us: 1000,
        first_byte_us: None,
        usage: None,
        cost: Neurons::ZERO,
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 0,
        request_type: "http".into(),
        request_content_type: None,
        response_content_type: None,
        metadata: None,
        trace: None,
        zero_retention: false,
        event: None,
        user_agent: None,
        authenticated: false,
        stored_key: false,
        attempts: "".into(),
        why: None,
        findings: Vec::new(),
        asked: body(text.clone()),
        answered: body(text),
    }
}

/// Returns their ids.
fn append(ship: &Ship, numbers: std::ops::Range<usize>) -> Vec<String> {
    let records: Vec<Record> = numbers.map(record).collect();
    for some in records.chunks(20) {
        ship.append(some.iter().map(|record| Outgoing { record, key: None }), Millis::now());
    }
    records.iter().map(|record| record.id.unwrap().to_string()).collect()
}

fn unpacked(bytes: &[u8]) -> Vec<Value> {
    let mut text = String::new();
    GzDecoder::new(bytes).read_to_string(&mut text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(lines: &[Value]) -> Vec<String> {
    lines.iter().map(|line| line["Id"].as_str().unwrap().to_owned()).collect()
}

/// All objects under a folder whose names end so, by name.
fn objects_in(folder: &Path, kind: &str) -> BTreeSet<PathBuf> {
    let (mut objects, mut folders) = (BTreeSet::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                // What was not finished has another name.
                false if path.extension().is_some_and(|found| found == kind) => drop(objects.insert(path)),
                false => {}
            }
        }
    }
    objects
}

/// The lines of all objects under a folder, by name.
fn lines_in(folder: &Path) -> Vec<Value> {
    objects_in(folder, "gz").iter().flat_map(|path| unpacked(&std::fs::read(path).unwrap())).collect()
}

/// The rows of Parquet files, as pyarrow finds them.
fn rows_of(files: &BTreeSet<PathBuf>) -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("NEUROND_TEST_PARQUET").map(PathBuf::from);
    let reader = named.unwrap_or_else(|| root.join("target/test-parquet"));
    assert!(reader.join("pyarrow").is_dir(), "no reader of Parquet: run scripts/fetch_parquet.sh");
    let script = root.join("scripts/parquet_rows.py");
    let output = Command::new("python3").arg(script).args(files).env("PYTHONPATH", reader).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A cell as the field of a line that it is: objects from their text, numbers alike.
fn field_of(cell: &Value) -> Value {
    match cell {
        Value::String(text) if text.starts_with(['{', '[']) => serde_json::from_str(text).unwrap_or(cell.clone()),
        // Amounts have twelve digits behind the point; how they are read from text may differ by less.
        Value::Number(number) => json!(number.as_f64().map(|number| (number * 1e12).round())),
        Value::Object(fields) => fields.iter().map(|(name, cell)| (name.clone(), field_of(cell))).collect(),
        _ => cell.clone(),
    }
}

#[track_caller]
fn until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "it takes too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The life of a process that is killed: takes records, tells which, and ships meanwhile.
fn ship_for_ever(folder: &Path) -> ! {
    let mut jobs = vec![job("disk", Destination::Folder { path: folder.join("there") })];
    let address = std::env::var("NEUROND_TEST_SHIP_TO").unwrap();
    if !address.is_empty() {
        jobs.push(job("s3", bucket(&address, "good")));
    }
    let ship = Ship::start(settings(folder, jobs)).unwrap();
    let mut told = std::fs::File::options().create(true).append(true).open(folder.join("taken")).unwrap();
    let begin = Instant::now();
    let mut number = taken(folder).len();
    // Nobody waits for it to end; should nobody kill it either, it does.
    while begin.elapsed() < PATIENCE {
        let ids = append(&ship, number..number + BATCH);
        number += BATCH;
        told.write_all((ids.join("\n") + "\n").as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    std::process::exit(1)
}

/// What a killed process had told that it took.
fn taken(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("taken")).unwrap_or_default();
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    // One that was killed while it wrote left half an id, which the next one wrote on: neither tells anything.
    whole.lines().filter(|id| LogId::parse(id).is_some()).map(str::to_owned).collect()
}

fn credentials(secret: &str) -> Credentials {
    Credentials {
        access_key_id: "writer".into(),
        secret_access_key: Secret::new(secret.to_owned()),
        session_token: None,
    }
}

fn bucket(address: &str, secret: &str) -> Destination {
    Destination::S3 {
        endpoint: format!("http://{address}"),
        region: "us-east-1".into(),
        bucket: "logs".into(),
        credentials: credentials(secret),
        path_style: true,
    }
}

/// An S3 server in a process of its own, which knows the key `good` and keeps a bucket `logs`.
struct S3 {
    program: PathBuf,
    address: SocketAddr,
    root: tempfile::TempDir,
    child: Option<Child>,
}

impl S3 {
    /// The server that `scripts/s3_server.sh` builds, or a word to whoever reads the output.
    fn start() -> Option<Self> {
        let named = std::env::var_os("NEUROND_TEST_S3").map(PathBuf::from);
        let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/s3-server/bin/s3s-fs");
        let program = named.clone().unwrap_or_else(built);
        if !program.is_file() {
            assert!(named.is_none(), "NEUROND_TEST_S3: {} is not there", program.display());
            eprintln!("skipped: no S3 server (run scripts/s3_server.sh)");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let address = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let mut server = Self { program, address, root, child: None };
        server.run();
        Some(server)
    }

    fn run(&mut self) {
        if self.child.is_some() {
            return;
        }
        let child = Command::new(&self.program)
            .args(["--host", "127.0.0.1", "--access-key", "writer", "--secret-key", "good", "--domain", "s3.test"])
            .args(["--domain", &self.address.to_string(), "--port", &self.address.port().to_string()])
            .arg(self.root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.unwrap());
        until(|| TcpStream::connect(self.address).is_ok());
    }

    /// SIGKILL.
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn destination(&self, secret: &str) -> Destination {
        bucket(&self.address.to_string(), secret)
    }

    fn lines(&self) -> Vec<Value> {
        lines_in(&self.root.path().join("logs/p/q"))
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A proxy whose every tunnel ends at one address.
fn tunnels_to(end: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(end).unwrap());
            let mut reader = BufReader::new(near.try_clone().unwrap());
            let head = head_of(&mut reader).unwrap();
            assert!(head.starts_with("CONNECT logs.s3.test:80 "), "{head}");
            (&near).write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            let (mut up, mut down) = (far.try_clone().unwrap(), far);
            std::thread::spawn(move || std::io::copy(&mut reader, &mut up));
            std::thread::spawn(move || std::io::copy(&mut down, &mut &near));
        }
    });
    address
}

fn head_of(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

/// What a collector does with a request.
#[derive(Clone, Copy)]
pub enum Behaviour {
    Take,
    /// A status and more headers.
    Answer(u16, &'static str),
    /// Nothing, until the other side leaves.
    Hang,
    /// Closes in the middle of the request.
    Reset,
    /// Closes in the middle of the answer's head.
    Half,
    /// Has it, and closes before saying so.
    TakeAndReset,
}

pub type Seen = Mutex<Vec<(String, Vec<u8>)>>;

/// A server that takes what is posted, in ways told beforehand; well where nothing is left of them.
pub struct Collector {
    pub address: SocketAddr,
    /// Heads and bodies of what it has taken.
    pub seen: Arc<Seen>,
}

impl Collector {
    pub fn start(script: Vec<Behaviour>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, script) = (Arc::default(), Arc::new(Mutex::new(VecDeque::from(script))));
        let ours = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, script) = (Arc::clone(&ours), script.clone());
                std::thread::spawn(move || serve(&stream.unwrap(), &seen, &script));
            }
        });
        Self { address, seen }
    }
}

/// Ends with the connection.
fn serve(mut stream: &TcpStream, seen: &Seen, script: &Mutex<VecDeque<Behaviour>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let head = head_of(&mut reader)?;
        let behaviour = script.lock().pop_front().unwrap_or(Behaviour::Take);
        if let Behaviour::Reset = behaviour {
            return None;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        let mut body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut body).ok()?;
        if let Behaviour::Take | Behaviour::TakeAndReset = behaviour {
            seen.lock().push((head, body));
        }
        let answer = match behaviour {
            Behaviour::Take => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
            Behaviour::Answer(status, more) => format!("HTTP/1.1 {status} No\r\n{more}content-length: 2\r\n\r\nno"),
            Behaviour::Half => "HTTP/1.1 20".to_owned(),
            Behaviour::Reset | Behaviour::TakeAndReset => return None,
            Behaviour::Hang => {
                // Ends when the other side closes.
                let _ = reader.read(&mut [0]);
                return None;
            }
        };
        stream.write_all(answer.as_bytes()).ok()?;
        if let Behaviour::Half = behaviour {
            return None;
        }
    }
}

/// A disk in memory, where one may be mounted.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let options = format!("size={size},mode=755");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: no small disk can be mounted here (that takes root)");
            return None;
        }
        Some(Self { path: path.to_path_buf() })
    }

    fn mount_again(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.path).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
