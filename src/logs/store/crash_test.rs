//! Files cut and damaged, and a process killed.

use std::path::Path;
use std::process::{Command, Stdio};

use super::tests::{forty, query, records, settings};
use super::*;

#[test]
fn the_last_log_cut_or_damaged_anywhere_keeps_its_whole_blocks_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    let path = folder.path().join("00000001.0.log");
    let (mut ends, records) = (Vec::new(), records(0..6));
    for pair in records.chunks(2) {
        store.append(pair).unwrap();
        ends.push(std::fs::metadata(&path).unwrap().len());
    }
    drop(store);
    let bytes = std::fs::read(&path).unwrap();
    let check = |bytes: &[u8], whole: usize, why: &str| {
        std::fs::write(&path, bytes).unwrap();
        let store = Store::open(settings(folder.path())).unwrap();
        assert_eq!(store.numbers(&Query::default()), (0..whole as u64 * 2).rev().collect::<Vec<_>>(), "{why}");
        store.append(&records[5..]).unwrap();
        drop(store);
        let store = Store::open(settings(folder.path())).unwrap();
        assert_eq!(store.all(&Query::default()).total_count, whole as u64 * 2 + 1, "{why}");
    };
    for cut in (0..=bytes.len()).step_by(3).chain(ends.iter().map(|end| *end as usize)) {
        check(&bytes[..cut], ends.iter().filter(|end| **end <= cut as u64).count(), &format!("cut at {cut}"));
    }
    for at in (0..ends[0] as usize).step_by(7) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x20;
        std::fs::write(&path, damaged).unwrap();
        let store = Store::open(settings(folder.path())).unwrap();
        // Bodies are looked at when they are asked for, so damage in them leaves the lists whole.
        let listed = store.all(&Query::default());
        for stored in listed.records {
            let read = store.get(&Store::account(), "gw", stored.record.id.unwrap()).unwrap();
            assert!(read.is_none_or(|read| records.iter().any(|record| **record == read.record)), "damaged at {at}");
        }
    }
}

#[test]
fn columns_that_are_missing_cut_or_damaged_are_made_again_with_marks_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    store
        .patch(&Store::account(), "gw", records[3].id.unwrap(), &Patch { feedback: Some(Some(1)), ..Patch::default() })
        .unwrap();
    store.delete(&Store::account(), "gw", &query("limit=2&order_by_direction=asc")).unwrap();
    drop(store);
    let path = folder.path().join("00000001.0.columns");
    let whole = std::fs::read(&path).unwrap();
    let footer = whole.len() - 40;
    let check = |why: &str| {
        let store = Store::open(settings(folder.path())).unwrap();
        assert_eq!(store.numbers(&query("per_page=1000")), (2..40).rev().collect::<Vec<_>>(), "{why}");
        assert_eq!(store.numbers(&query("feedback=1")), [3], "{why}");
        assert_eq!(store.get(&Store::account(), "gw", records[4].id.unwrap()).unwrap().unwrap().record, *records[4]);
        drop(store);
        assert_eq!(std::fs::read(&path).unwrap(), whole, "{why}: the same once more");
    };
    for cut in [0, 1, 7, 8, 100, footer, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        check(&format!("cut at {cut}"));
    }
    for at in [footer, whole.len() - 8, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        check(&format!("damaged at {at}"));
    }
    std::fs::remove_file(&path).unwrap();
    check("missing");
    std::fs::remove_file(folder.path().join("00000001.0.log")).unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    assert_eq!(
        store.numbers(&query("per_page=1000")),
        (16..40).rev().collect::<Vec<_>>(),
        "a segment without its log is none"
    );
}

#[test]
fn a_record_written_again_is_there_once_even_where_its_old_row_was_not_marked() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    let metadata = Some(Some(r#"{"new":1}"#.into()));
    for at in [3, 39] {
        store
            .patch(
                &Store::account(),
                "gw",
                records[at].id.unwrap(),
                &Patch { metadata: metadata.clone(), ..Patch::default() },
            )
            .unwrap();
    }
    drop(store);
    // The crash came before the mark.
    std::fs::remove_file(folder.path().join("00000001.0.marks")).unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    assert_eq!(store.numbers(&query("per_page=1000")), (0..40).rev().collect::<Vec<_>>());
    assert_eq!(store.numbers(&query("filters.key=metadata.key&filters.value=new")), [39, 3]);
}

/// Set by [`a_process_killed_at_any_moment_leaves_what_it_had_flushed`] for the process that it kills.
const KILLED: &str = "NEUROND_TEST_LOG_FOLDER";

#[test]
fn a_process_killed_at_any_moment_leaves_what_it_had_flushed() {
    if let Ok(folder) = std::env::var(KILLED) {
        return append_until_killed(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut promised = 0;
    for turn in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["a_process_killed_at_any_moment", "--nocapture", "--test-threads=1"])
            .env(KILLED, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let mut heard = 0;
        while heard < 3 + turn * 5 {
            let line = lines.next().unwrap().unwrap();
            if let Some((_, number)) = line.split_once("on disk: ") {
                promised = number.parse().unwrap();
                heard += 1;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died counts as well.
        for line in lines.map_while(std::io::Result::ok) {
            if let Some(number) = line.split_once("on disk: ").and_then(|(_, number)| number.trim().parse().ok()) {
                promised = number;
            }
        }
        let store = Store::open(Settings { segment_bytes: 20_000, ..settings(folder.path()) }).unwrap();
        let total = store.all(&query("per_page=1")).total_count;
        assert!(total >= promised, "{total} of {promised}");
        let mut seen = Vec::new();
        for page in 1..=total.div_ceil(1000) {
            seen.extend(store.numbers(&query(&format!("per_page=1000&order_by_direction=asc&page={page}"))));
        }
        assert_eq!(seen, (0..total).collect::<Vec<_>>(), "all of them, once, in order");
    }
}

fn append_until_killed(folder: &Path) {
    let store = Store::open(Settings { segment_bytes: 20_000, ..settings(folder) }).unwrap();
    let mut next = store.all(&query("per_page=1")).total_count;
    loop {
        store.append(&records(next..next + 50)).unwrap();
        next += 50;
        store.flush().unwrap();
        println!("on disk: {next}");
    }
}
