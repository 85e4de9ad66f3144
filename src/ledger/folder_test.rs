use super::*;
use crate::base::{AccountId, Millis, ModelId, Neurons, RequestId};
use crate::ledger::book::Book;
use crate::ledger::claim::{Claim, Plan, Spent};
use crate::store::RealDisk;
use crate::store::fault::{Faults, FaultyDisk};
use crate::task::Usage;

const BOUNDS: (usize, usize) = (100, 100);

/// The book of a process, and its folder.
struct Life<D: Disk> {
    live: Book,
    kept: Kept,
    folder: Folder<D>,
}

impl<D: Disk> Life<D> {
    fn begin(disk: D, path: &Path, segment_bytes: u64) -> Result<Self> {
        let mut kept = Kept::new(BOUNDS.0, BOUNDS.1);
        let folder = Folder::open(disk, path, segment_bytes, &mut kept, BOUNDS)?;
        Ok(Self { live: kept.book.clone(), kept, folder })
    }

    /// Settles so many neurons, without bringing them to disk.
    fn settle(&mut self, neurons: u64) {
        let account = AccountId::new("a");
        let (request, neurons) = (RequestId::from_number(self.kept.seq.into()), Neurons::from_micro(neurons));
        let claim = Claim {
            request,
            account: &account,
            plan: Plan::PAID,
            windows: &[],
            tokens: 0,
            neurons,
            cost: neurons,
            is_once: true,
        };
        let open = self.live.reserve(&claim, Millis(0)).unwrap();
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
        let mut entry = self.live.settle(open, &spent, Millis(0)).1.unwrap();
        entry.seq = self.kept.seq + 1;
        self.kept.apply(&entry);
        self.folder.push(&[entry]);
    }

    /// Writes and syncs it.
    fn commit(&mut self) -> io::Result<()> {
        self.folder.write()?;
        if self.folder.is_due() {
            let job = self.folder.job(&self.kept, false)?;
            assert_eq!(self.folder.finish(job.run())?, self.kept.seq);
        }
        Ok(())
    }

    fn snapshot(&mut self) {
        let job = self.folder.job(&self.kept, true).unwrap();
        assert_eq!(self.folder.finish(job.run()).unwrap(), self.kept.seq);
    }

    fn total(&self) -> u64 {
        self.kept.book.totals(&AccountId::new("a"), Millis(0)).total.micro()
    }
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_segment_torn_at_any_byte_keeps_its_whole_commits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("whole");
    let mut life = Life::begin(RealDisk, &path, 1 << 20).unwrap();
    let mut ends = Vec::new();
    for number in 0..5 {
        (0..=number).for_each(|_| life.settle(1));
        life.commit().unwrap();
        ends.push((fs::metadata(path.join("00000001.wal")).unwrap().len(), life.total()));
    }
    drop(life);
    let bytes = fs::read(path.join("00000001.wal")).unwrap();
    let torn = folder.path().join("torn");
    for cut in 0..=bytes.len() {
        let _ = fs::remove_dir_all(&torn);
        fs::create_dir_all(&torn).unwrap();
        fs::write(torn.join("00000001.wal"), &bytes[..cut]).unwrap();
        let expected = ends.iter().rev().find(|(end, _)| *end <= cut as u64).map_or(0, |(_, total)| *total);
        let mut life = Life::begin(RealDisk, &torn, 1 << 20).unwrap();
        assert_eq!(life.total(), expected, "cut at {cut}");
        if cut % 50 == 0 {
            // And it goes on from there.
            life.settle(100);
            life.commit().unwrap();
            drop(life);
            assert_eq!(names(&torn), ["book", "lock"], "the start's snapshot has it all");
            assert_eq!(Life::begin(RealDisk, &torn, 1 << 20).unwrap().total(), expected + 100, "cut at {cut}");
        }
    }
}

#[test]
fn a_snapshot_takes_the_place_of_segments_and_no_entry_counts_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut life = Life::begin(RealDisk, path, 600).unwrap();
    for number in 1..=20 {
        life.settle(1);
        life.commit().unwrap();
        assert_eq!(life.total(), number);
    }
    assert!(names(path).len() < 4, "{:?}", names(path));
    let (seq, wal) = (life.kept.seq, names(path).into_iter().find(|name| name.ends_with("wal")).unwrap());
    // A crash between a snapshot and the removal of what it replaces.
    let bytes = fs::read(path.join(&wal)).unwrap();
    life.snapshot();
    assert_eq!(names(path), ["book", "lock"]);
    drop(life);
    fs::write(path.join(wal), bytes).unwrap();
    let life = Life::begin(RealDisk, path, 600).unwrap();
    assert_eq!((life.total(), life.kept.seq), (20, seq));
    assert_eq!(life.kept.rows.find(&Default::default())[0].2.requests, 20);
}

#[test]
fn what_a_disk_lost_after_a_failed_sync_was_written_again_elsewhere() {
    // Whatever fails when, what a commit said is on disk survives the power, torn anywhere.
    for (number, faults) in [
        Faults { deaf: 1, ..Faults::default() },
        Faults { deaf: 3, ..Faults::default() },
        Faults { torn: 1, ..Faults::default() },
        Faults { torn: 2, deaf: 2, ..Faults::default() },
        Faults { room: Some(0), ..Faults::default() },
        Faults { room: Some(100), ..Faults::default() },
        Faults { room: Some(300), ..Faults::default() },
    ]
    .into_iter()
    .enumerate()
    {
        for torn in [0, 1, 9, 100, 250] {
            let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
            let mut life = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
            life.settle(1);
            life.commit().unwrap();
            disk.set(faults);
            let (mut failures, mut sure) = (0, 1);
            for _ in 0..6 {
                life.settle(1);
                match life.commit() {
                    Ok(()) => sure = life.total(),
                    Err(_) => failures += 1,
                }
            }
            assert!(failures > 0, "{number}");
            disk.power_off(torn);
            drop(life);
            let next = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
            assert!((sure..=7).contains(&next.total()), "{number} {torn}: {} of {sure}", next.total());
            drop(next);
            // The disk is back.
            disk.set(Faults::default());
            let mut life = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
            let before = life.total();
            life.settle(1);
            life.commit().unwrap();
            disk.power_off(0);
            drop(life);
            assert_eq!(Life::begin(disk, folder.path(), 1 << 20).unwrap().total(), before + 1, "{number} {torn}");
        }
    }
}

#[test]
fn what_an_earlier_process_did_not_sync_is_made_sure_of_before_anything_follows() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let begin = || Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
    let mut life = begin();
    life.settle(1);
    life.commit().unwrap();
    life.settle(1);
    // Killed between the write and the sync.
    life.folder.write().unwrap();
    drop(life);
    let mut life = begin();
    assert_eq!(life.total(), 2);
    life.settle(1);
    life.commit().unwrap();
    disk.power_off(0);
    drop(life);
    assert_eq!(begin().total(), 3);
}

#[test]
fn a_disk_that_stays_full_is_not_littered() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let mut life = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
    for _ in 0..10 {
        disk.set(Faults { room: Some(20), ..Faults::default() });
        life.settle(1);
        assert_eq!(life.commit().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
    assert_eq!(names(folder.path()), ["lock"]);
    disk.set(Faults::default());
    life.commit().unwrap();
    drop(life);
    assert_eq!(Life::begin(disk, folder.path(), 1 << 20).unwrap().total(), 10);
}

#[test]
fn a_snapshot_that_does_not_fit_is_put_off() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
    let mut life = Life::begin(disk.clone(), folder.path(), 300).unwrap();
    life.settle(1);
    life.commit().unwrap();
    // Room for an entry, and none for a snapshot.
    disk.set(Faults { room: Some(250), ..Faults::default() });
    life.settle(1);
    life.commit().unwrap();
    assert_eq!(names(folder.path()), ["00000001.wal", "lock"]);
    drop(life);
    assert_eq!(Life::begin(disk, folder.path(), 300).unwrap().total(), 2);
}

#[test]
fn what_is_missing_or_foreign_or_damaged_stops_the_start_and_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut life = Life::begin(RealDisk, path, 1 << 20).unwrap();
    life.settle(1);
    life.commit().unwrap();
    // As after a snapshot that failed: another segment.
    life.folder.active = None;
    life.settle(1);
    life.commit().unwrap();
    let segment = |number| path_of(path, number);
    let (first, second) = (fs::read(segment(1)).unwrap(), fs::read(segment(2)).unwrap());
    life.snapshot();
    drop(life);
    let book = fs::read(path.join(BOOK)).unwrap();
    let check = |files: &[(PathBuf, &[u8])], says: &str| {
        fs::remove_dir_all(path).unwrap();
        fs::create_dir_all(path).unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(name, bytes).unwrap());
        match Life::begin(RealDisk, path, 1 << 20) {
            Ok(life) => assert_eq!((life.total(), says), (2, "")),
            Err(error) => assert!(!says.is_empty() && error.message().contains(says), "{error}"),
        }
    };
    check(&[(segment(1), &first), (segment(2), &second)], "");
    check(&[(path.join(BOOK), &book), (segment(1), &first), (segment(2), &second)], "");
    check(&[(segment(2), &second)], "bring back the files that are missing");
    let mut damaged = first.clone();
    *damaged.last_mut().unwrap() ^= 1;
    check(&[(segment(1), &damaged), (segment(2), &second)], "bring back the files that are missing");
    let mut damaged = book.clone();
    *damaged.last_mut().unwrap() ^= 1;
    check(&[(path.join(BOOK), &damaged)], "is damaged");
    damaged[0] = 9;
    check(&[(path.join(BOOK), &damaged)], "start the version that wrote it");
}

#[test]
fn writing_goes_on_beside_a_job_and_a_gap_that_nobody_was_promised_is_passed_over() {
    // Two segments of which neither is synced, and power that is lost: whatever of each reached the disk, what was promised is
    // there, and nothing counts without what came before it.
    for (first, second) in [(0, 0), (0, 1000), (1000, 0), (1000, 1000), (100, 1000), (1000, 100)] {
        let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
        let mut life = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
        (0..3).for_each(|_| life.settle(1));
        life.commit().unwrap();
        let sure = life.total();
        life.settle(1);
        life.folder.write().unwrap();
        life.settle(1);
        // The job begins another segment, and is not run before the power goes.
        let job = life.folder.job(&life.kept, true).unwrap();
        assert!(!life.folder.is_due());
        life.settle(1);
        life.folder.write().unwrap();
        disk.power_off_with(|path| if path.ends_with("00000001.wal") { first } else { second });
        drop(life);
        let next = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
        let expected = match (first, second) {
            (1000, 1000) => sure + 3,
            (1000, _) => sure + 1,
            _ => sure,
        };
        assert_eq!((next.total(), next.kept.seq), (expected, expected), "{first} {second}");
        drop(job);
    }
}

#[test]
fn a_job_that_ends_after_a_write_failed_keeps_what_it_synced() {
    for (fails, torn) in [(false, 0), (true, 0), (false, 300), (true, 300)] {
        let (folder, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
        let mut life = Life::begin(disk.clone(), folder.path(), 1 << 20).unwrap();
        life.settle(1);
        life.folder.write().unwrap();
        let job = life.folder.job(&life.kept, false).unwrap();
        life.settle(1);
        disk.set(Faults { torn: 1, ..Faults::default() });
        life.folder.write().unwrap_err();
        // What must be written again is known when the job has ended.
        assert!(!life.folder.is_waiting());
        disk.set(Faults { deaf: u32::from(fails), ..Faults::default() });
        assert_eq!(life.folder.finish(job.run()).ok(), (!fails).then_some(1));
        assert!(life.folder.is_waiting());
        life.folder.write().unwrap();
        disk.power_off(torn);
        let sure = if torn > 0 { 2 } else { u64::from(!fails) };
        drop(life);
        assert_eq!(Life::begin(disk, folder.path(), 1 << 20).unwrap().total(), sure, "{fails} {torn}");
    }
}
