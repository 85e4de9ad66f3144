use super::*;

const NOW: Millis = Millis(1_750_000_000_000);
/// With heads, ten blocks make a segment.
const BLOCK: [u8; 80] = [7; 80];
const BOUNDS: Bounds =
    Bounds { segment_bytes: 1000, segment_age_ms: 5000, max_bytes: 8000, at_bound: AtBound::DropOldest };

fn open(folder: &Path, bounds: Bounds, jobs: &[&str]) -> Spool {
    Spool::open(folder, bounds, jobs).unwrap()
}

/// Two records a block.
fn fill(spool: &mut Spool, blocks: usize) {
    for _ in 0..blocks {
        spool.append(2, &BLOCK, NOW);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| name != "lock").collect();
    names.sort();
    names
}

/// As a job that ships all of it does.
fn ship(spool: &mut Spool, job: usize) -> Option<u64> {
    let (number, path) = spool.take(job)?;
    let mut records = 0;
    blocks::<io::Error>(&path, |_| {
        records += 2;
        Ok(())
    })
    .unwrap();
    write_cursor(&spool.cursor(job).unwrap(), number + 1).unwrap();
    spool.confirm(job, number, Shipped { records, skipped: 0, bytes: 9 }, NOW);
    Some(number)
}

/// What a job has been told of adds up.
fn assert_adds_up(spool: &Spool, found: u64) {
    let status = spool.status();
    for job in &status.jobs {
        let gone = job.shipped_records + job.skipped_records + job.damaged_records + job.dropped_records;
        assert_eq!(found + status.appended_records, gone + job.waiting_records, "{job:?}");
    }
}

#[test]
fn a_segment_goes_when_every_job_has_confirmed_it_and_not_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a", "b"]);
    assert_eq!(spool.take(0), None);
    fill(&mut spool, 25);
    assert_eq!(names(folder.path()).len(), 3, "{:?}", names(folder.path()));
    assert_eq!((spool.take(0).unwrap().0, spool.take(0).unwrap().0), (0, 0), "the same until it is confirmed");
    assert_eq!((ship(&mut spool, 0), ship(&mut spool, 0), ship(&mut spool, 0)), (Some(0), Some(1), None));
    assert_eq!((names(folder.path()).len(), spool.is_shipped(1)), (4, false), "b has none of them");
    assert_eq!((ship(&mut spool, 1), names(folder.path()).len()), (Some(0), 4));
    assert!(spool.seal() && !spool.seal());
    assert_eq!((ship(&mut spool, 0), ship(&mut spool, 1), ship(&mut spool, 1)), (Some(2), Some(1), Some(2)));
    assert_eq!((names(folder.path()), spool.is_shipped(2)), (vec!["a.cursor".to_owned(), "b.cursor".to_owned()], true));
    assert_adds_up(&spool, 0);
    let status = spool.status();
    assert_eq!((status.appended_records, status.spool_bytes, status.jobs[0].shipped_objects), (50, 0, 3));
}

#[test]
fn a_restart_goes_on_where_each_job_was_and_uses_no_number_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a", "b"]);
    fill(&mut spool, 25);
    ship(&mut spool, 0);
    assert!(Spool::open(folder.path(), BOUNDS, &["a"]).is_err_and(|error| error.message().contains("another neurond")));
    drop(spool);
    let mut spool = open(folder.path(), BOUNDS, &["a", "b", "new"]);
    let waiting = |spool: &Spool| spool.status().jobs.iter().map(|job| job.waiting_records).collect::<Vec<_>>();
    assert_eq!(waiting(&spool), [30, 50, 50], "a new job begins with what is there");
    fill(&mut spool, 1);
    assert_eq!(spool.active.as_ref().unwrap().number, 3);
    drop(spool);
    // A job that is no more keeps nothing, and its cursor is forgotten.
    let mut spool = open(folder.path(), BOUNDS, &["a"]);
    assert_eq!((waiting(&spool), names(folder.path()).len()), (vec![32], 4));
    while ship(&mut spool, 0).is_some() {}
    drop(spool);
    let mut spool = open(folder.path(), BOUNDS, &["a"]);
    fill(&mut spool, 1);
    spool.seal();
    assert_eq!(ship(&mut spool, 0), Some(4));
}

#[test]
fn a_full_spool_drops_what_is_oldest_and_not_on_its_way() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a", "b"]);
    fill(&mut spool, 40);
    assert_eq!(spool.take(0).unwrap().0, 0);
    ship(&mut spool, 1);
    fill(&mut spool, 60);
    let status = spool.status();
    assert!(status.spool_bytes <= BOUNDS.max_bytes, "{status:?}");
    assert!(status.dropped_records > 0 && status.refused_records == 0, "{status:?}");
    assert_adds_up(&spool, 0);
    assert!(spool.sealed.contains_key(&0) && !spool.sealed.contains_key(&1), "the oldest is in the air");
    spool.confirm(0, 0, Shipped { records: 18, skipped: 0, bytes: 1 }, NOW);
    assert_eq!(spool.take(0).unwrap().0, *spool.sealed.keys().next().unwrap(), "and goes on with what is left");
    assert_adds_up(&spool, 0);
    let before = spool.status();
    spool.append(1, &[0; 8000], NOW);
    let after = spool.status();
    assert_eq!((after.refused_records, after.spool_bytes), (1, before.spool_bytes), "nothing goes for what never fits");
    // Only what it had not shipped is lost to a job.
    let [a, b] = [0, 1].map(|job| spool.status().jobs[job].dropped_records);
    assert_eq!((a, b), (status.dropped_records, status.dropped_records));
}

#[test]
fn a_full_spool_that_may_drop_nothing_refuses_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds { at_bound: AtBound::Refuse, ..BOUNDS };
    let mut spool = open(folder.path(), bounds, &["a"]);
    fill(&mut spool, 100);
    let status = spool.status();
    assert!(status.spool_bytes <= bounds.max_bytes && status.dropped_records == 0, "{status:?}");
    assert_eq!(status.appended_records + status.refused_records, 200);
    assert!(status.refused_records > 20 && spool.take(0).unwrap().0 == 0, "{status:?}");
    ship(&mut spool, 0);
    fill(&mut spool, 1);
    assert_eq!(spool.status().appended_records, status.appended_records + 2);
    assert_adds_up(&spool, 0);
}

#[test]
fn a_segment_is_sealed_when_it_is_old_and_only_if_it_holds_something() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a"]);
    assert!(!spool.seal_old(Millis(u64::MAX)));
    fill(&mut spool, 1);
    assert_eq!((spool.unsynced().len(), spool.unsynced().len()), (1, 0));
    assert!(!spool.seal_old(Millis(NOW.0 + 4999)) && spool.seal_old(Millis(NOW.0 + 5000)));
    assert!(!spool.seal_old(Millis(u64::MAX)));
    fill(&mut spool, 1);
    spool.seal();
    assert_eq!(spool.unsynced().len(), 1, "sealed before it was synced");
}

#[test]
fn a_segment_that_is_damaged_anywhere_ships_what_is_whole_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a"]);
    fill(&mut spool, 3);
    drop(spool);
    let path = path_of(folder.path(), 0);
    let whole = fs::read(&path).unwrap();
    let pair = whole.len() / 3;
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let mut spool = open(folder.path(), BOUNDS, &["a"]);
        let records = 2 * (cut / pair) as u64;
        assert_eq!(spool.status().jobs[0].waiting_records, records, "cut at {cut}");
        assert_eq!(spool.take(0).is_some(), records > 0, "cut at {cut}");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        fs::write(&path, damaged).unwrap();
        let mut spool = open(folder.path(), BOUNDS, &["a"]);
        let Some((_, path)) = spool.take(0) else {
            assert!(at < pair, "damaged at {at}");
            continue;
        };
        let mut seen = 0;
        blocks::<io::Error>(&path, |block| {
            assert_eq!(block, BLOCK);
            seen += 2;
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 2 * (at / pair) as u64, "damaged at {at}");
        spool.confirm(0, 0, Shipped { records: seen, skipped: 0, bytes: 0 }, NOW);
        let job = &spool.status().jobs[0];
        assert_eq!(job.waiting_records, 0);
        // Behind a length that is damaged nobody can count.
        let counted = if at % pair < 16 { job.damaged_records } else { 6 - seen };
        assert_eq!(job.damaged_records, counted, "damaged at {at}");
        let _ = fs::remove_file(cursor_of(folder.path(), "a"));
    }
}

#[test]
fn a_cursor_that_cannot_be_read_repeats_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a", "b"]);
    fill(&mut spool, 25);
    ship(&mut spool, 0);
    drop(spool);
    fs::write(cursor_of(folder.path(), "a"), "rubbish").unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a", "b"]);
    assert_eq!(spool.take(0).unwrap().0, 0);
}

#[test]
fn a_disk_that_will_not_is_counted_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path(), BOUNDS, &["a"]);
    let moved = folder.path().with_extension("away");
    fs::rename(folder.path(), &moved).unwrap();
    fill(&mut spool, 3);
    assert_eq!((spool.status().failed_records, spool.status().appended_records), (6, 0));
    fs::rename(&moved, folder.path()).unwrap();
    fill(&mut spool, 3);
    assert_eq!((spool.status().failed_records, spool.status().appended_records), (6, 6));
    spool.seal();
    assert!(ship(&mut spool, 0).is_some());
}
