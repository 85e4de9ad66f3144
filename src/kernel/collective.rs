//! What the ranks of a group say to each other: each holds a part of a model and computes with a device of its own.
//!
//! ```text
//! all_reduce   partials of all ranks ──┐ meet │ rank r sums share r of the elements, in the order of ranks, │ meet
//!                                      └──────│ and adds the sum to that share of every rank's x            │
//! gather       rank 0's buffer ────────  meet │ every rank writes its own columns of it                     │ meet
//! ```
//!
//! Here ranks are threads of one process and read each other's memory. What a library for several accelerators offers are
//! the same two operations, so one could take this one's place. The order of a sum is fixed, and each element is summed
//! by one rank for all: all ranks go on with the same bits, and the bits of a row depend on nothing but the row.
//!
//! A rank that cannot go on says so with [`Collective::fail`]; from then on every operation of every rank is an error, also
//! of those that wait already. Nobody returns from an operation while another rank may still touch what it lent.

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::base::{Error, Result};
use crate::kernel::pool::{Line, YIELDS, wait};
use crate::kernel::{Cpu, Shared};

/// Elements that are summed in one go: they stay in L1 from the first rank to the last.
const CHUNK: usize = 1024;
/// Elements of a cache line. Shares begin at multiples of it, so that no two ranks write one line.
const LINE: usize = 16;
/// Elements below which the caller alone is done sooner than threads are woken.
const ALONE: usize = 8 << 10;
/// Between looks of a rank that has waited for longer than any step should take.
const NAP: Duration = Duration::from_micros(100);

/// One rank's handle.
pub struct Collective {
    rank: usize,
    meeting: Arc<Meeting>,
}

/// Where the ranks meet.
struct Meeting {
    /// Ranks that have come to the meeting under way.
    arrived: Line<AtomicUsize>,
    /// Rises by 2 with every meeting; odd once a rank has failed.
    round: Line<AtomicU64>,
    ranks: Vec<Line<Lent>>,
}

/// What a rank lends to the others for one operation.
struct Lent {
    partial: AtomicPtr<f32>,
    x: AtomicPtr<f32>,
    len: AtomicUsize,
    /// Between two meetings, where a rank touches what others lent.
    inside: AtomicBool,
}

const FAILED: u64 = 1;

impl Collective {
    /// The handles of `ranks` ranks, in order.
    pub fn of(ranks: usize) -> Vec<Self> {
        let lent = || {
            Line(Lent {
                partial: AtomicPtr::new(null_mut()),
                x: AtomicPtr::new(null_mut()),
                len: AtomicUsize::new(0),
                inside: AtomicBool::new(false),
            })
        };
        let meeting = Arc::new(Meeting {
            arrived: Line(AtomicUsize::new(0)),
            round: Line(AtomicU64::new(0)),
            ranks: (0..ranks).map(|_| lent()).collect(),
        });
        (0..ranks).map(|rank| Self { rank, meeting: meeting.clone() }).collect()
    }

    /// Which rank this is, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `x += partial[0] + partial[1] + …` on every rank, summed in this order. Each rank's `x` must hold the same before,
    /// and does so after, bit for bit.
    ///
    /// # Errors
    /// `Internal` when a rank has failed, or when ranks bring different lengths. What `x` holds then is of no use.
    pub fn all_reduce(&mut self, cpu: &Cpu, partial: &[f32], x: &mut [f32]) -> Result<()> {
        let len = x.len();
        assert_eq!(partial.len(), len);
        self.lend(partial.as_ptr().cast_mut(), x.as_mut_ptr(), len);
        self.exchange(|ranks| {
            if ranks.iter().any(|Line(lent)| lent.len.load(Ordering::Relaxed) != len) {
                return Err(Error::internal("the ranks of a model do not compute the same step"));
            }
            let share = share(len, LINE, self.rank, ranks.len());
            let chunks = share.len().div_ceil(CHUNK);
            let grain = if share.len() <= ALONE { chunks } else { 1 };
            cpu.pool.each(chunks, grain, |chunk| {
                let first = share.start + chunk * CHUNK;
                let count = CHUNK.min(share.end - first);
                // SAFETY: every rank lent `len` numbers, and none returns before all have left. The partials are only
                // read; these elements of every x are this rank's share, and this call's chunk of it.
                unsafe { reduce(ranks, self.rank, first, count) };
            });
            Ok(())
        })
    }

    /// Rank 0's `out`, into which every rank writes its part, `write` seeing all of it. What others bring as `out` is not
    /// looked at. Parts of different ranks must not overlap.
    ///
    /// # Errors
    /// `Internal` when a rank has failed. What `out` holds then is of no use.
    pub fn gather(&mut self, out: &mut [f32], write: impl FnOnce(Shared<'_, f32>)) -> Result<()> {
        self.lend(null_mut(), out.as_mut_ptr(), out.len());
        self.exchange(|ranks| {
            let Line(first) = &ranks[0];
            let (out, len) = (first.x.load(Ordering::Relaxed), first.len.load(Ordering::Relaxed));
            // SAFETY: rank 0 lent `len` numbers, touches them through such a view only, and does not return before all
            // have left. Parts are taken through unsafe functions whose callers keep them disjoint.
            write(unsafe { Shared::of_raw(out, len) });
            Ok(())
        })
    }

    /// This rank cannot go on: all operations of all ranks fail from now on.
    pub fn fail(&self) {
        self.meeting.round.0.fetch_or(FAILED, Ordering::SeqCst);
    }

    fn lend(&mut self, partial: *mut f32, x: *mut f32, len: usize) {
        let Line(lent) = &self.meeting.ranks[self.rank];
        lent.partial.store(partial, Ordering::Relaxed);
        lent.x.store(x, Ordering::Relaxed);
        lent.len.store(len, Ordering::Relaxed);
    }

    /// `work` between two meetings: all have lent before it, and all are done with it after it.
    fn exchange(&self, work: impl FnOnce(&[Line<Lent>]) -> Result<()>) -> Result<()> {
        let retreat = Retreat(self);
        self.meet()?;
        self.inside(work)?;
        self.meet()?;
        std::mem::forget(retreat);
        Ok(())
    }

    fn inside(&self, work: impl FnOnce(&[Line<Lent>]) -> Result<()>) -> Result<()> {
        /// Leaves also when the work panics.
        struct Leave<'a>(&'a AtomicBool);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        let Meeting { ranks, round, .. } = &*self.meeting;
        let inside = &ranks[self.rank].0.inside;
        // Said before the look at the failure; a failing rank sets that before it looks who is inside. One of the two
        // sees the other.
        inside.store(true, Ordering::SeqCst);
        let _leave = Leave(inside);
        if round.0.load(Ordering::SeqCst) & FAILED != 0 {
            return Err(failed());
        }
        work(ranks)
    }

    /// Returns when all ranks have come here.
    fn meet(&self) -> Result<()> {
        let Meeting { arrived: Line(arrived), round: Line(round), ranks } = &*self.meeting;
        // No round can end before this rank arrives.
        let now = round.load(Ordering::Acquire);
        if now & FAILED == 0 {
            if arrived.fetch_add(1, Ordering::AcqRel) + 1 == ranks.len() {
                arrived.store(0, Ordering::Relaxed);
                round.fetch_add(2, Ordering::AcqRel);
            } else {
                wait_for(|| round.load(Ordering::Acquire) != now);
            }
        }
        match round.load(Ordering::Acquire) & FAILED {
            0 => Ok(()),
            _ => Err(failed()),
        }
    }
}

/// Ends an operation that failed or panicked. Others may have met before they could hear of it: whoever is inside now may
/// use what this rank lent, whoever comes later finds that the group has failed, and leaves.
struct Retreat<'a>(&'a Collective);

impl Drop for Retreat<'_> {
    fn drop(&mut self) {
        self.0.fail();
        for Line(lent) in &self.0.meeting.ranks {
            wait_for(|| !lent.inside.load(Ordering::SeqCst));
        }
    }
}

fn failed() -> Error {
    Error::internal("another rank of this model failed")
}

/// Spins, then yields, as the threads of a pool do; then looks now and then, since a rank may be held up by a debugger.
fn wait_for(done: impl Fn() -> bool) {
    while !wait(&done, YIELDS) {
        std::thread::sleep(NAP);
    }
}

/// The part of rank `rank` when `ranks` ranks divide `len` elements in units of `unit`: parts differ by a unit at most, and
/// the last unit may be a short one.
pub fn share(len: usize, unit: usize, rank: usize, ranks: usize) -> std::ops::Range<usize> {
    let units = len.div_ceil(unit);
    let at = |rank: usize| (units * rank / ranks * unit).min(len);
    at(rank)..at(rank + 1)
}

/// Adds `count` elements from `first` on of all partials to those of every rank's x.
///
/// # Safety
/// Every rank lent `first + count` numbers; nobody else reads or writes these of any x.
unsafe fn reduce(ranks: &[Line<Lent>], own: usize, first: usize, count: usize) {
    let mut sums = [0f32; CHUNK];
    let sums = &mut sums[..count];
    for (rank, Line(lent)) in ranks.iter().enumerate() {
        let partial = lent.partial.load(Ordering::Relaxed);
        // SAFETY: by contract.
        let partial = unsafe { std::slice::from_raw_parts(partial.add(first), count) };
        match rank {
            0 => sums.copy_from_slice(partial),
            _ => sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial),
        }
    }
    let x = ranks[own].0.x.load(Ordering::Relaxed);
    // SAFETY: by contract.
    let x = unsafe { std::slice::from_raw_parts(x.add(first), count) };
    sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
    for Line(lent) in ranks {
        let x = lent.x.load(Ordering::Relaxed);
        // SAFETY: by contract; the slice of this rank's own x is no longer in use.
        unsafe { std::slice::from_raw_parts_mut(x.add(first), count) }.copy_from_slice(sums);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::kernel::testing::Dice;
    use crate::kernel::{Isa, Pool};

    fn cpu(threads: usize) -> Cpu {
        Cpu { pool: Arc::new(Pool::new(threads)), isa: Isa::detect() }
    }

    /// Runs `work(rank, its handle)` on a thread a rank.
    fn on_ranks<T: Send>(ranks: usize, work: impl Fn(usize, Collective) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = Collective::of(ranks)
                .into_iter()
                .enumerate()
                .map(|(rank, handle)| scope.spawn(move || work(rank, handle)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn shares_cover_everything_once() {
        for (len, unit) in [(0, 16), (1, 16), (49_152, 16), (1536, 256), (100, 32), (4864, 256)] {
            for ranks in 1..7 {
                let shares: Vec<_> = (0..ranks).map(|rank| share(len, unit, rank, ranks)).collect();
                assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start), "{shares:?}");
                assert_eq!((shares[0].start, shares[ranks - 1].end), (0, len));
                assert!(shares.iter().all(|share| share.start.is_multiple_of(unit) || share.start == len));
            }
        }
    }

    #[test]
    fn every_rank_gets_the_sum_in_the_order_of_ranks_to_the_bit() {
        for ranks in 2..=5 {
            let mut dice = Dice::new(ranks as u64);
            // From nothing at all to more than one thread takes, whole lines and broken ones.
            let mut lengths = vec![0, 1, 15, 16, 17, 100, 1024 * ranks, 1024 * ranks + 1, 50_000 * ranks + 7];
            lengths.extend((0..40).map(|_| dice.bits() as usize % 3000));
            // Numbers of very different size, so that another order shows.
            let mut wild = |len: usize| -> Vec<f32> {
                (0..len).map(|_| dice.value() * 10f32.powi((dice.bits() % 9) as i32 - 4)).collect()
            };
            let steps: Vec<(Vec<f32>, Vec<Vec<f32>>)> =
                lengths.iter().map(|&len| (wild(len), (0..ranks).map(|_| wild(len)).collect())).collect();
            let found = on_ranks(ranks, |rank, mut handle| {
                let cpu = cpu(1 + rank % 2);
                let reduce = |(x, partials): &(Vec<f32>, Vec<Vec<f32>>)| {
                    let mut x = x.clone();
                    handle.all_reduce(&cpu, &partials[rank], &mut x).unwrap();
                    x
                };
                steps.iter().map(reduce).collect::<Vec<_>>()
            });
            let mut another_order = 0;
            for (step, (x, partials)) in steps.iter().enumerate() {
                let sum = |order: &mut dyn Iterator<Item = usize>, i: usize| {
                    x[i] + order.map(|rank| partials[rank][i]).reduce(|sum, partial| sum + partial).unwrap()
                };
                let expected: Vec<f32> = (0..x.len()).map(|i| sum(&mut (0..ranks), i)).collect();
                let backwards = (0..x.len()).map(|i| sum(&mut (0..ranks).rev(), i));
                another_order += backwards.zip(&expected).filter(|(a, b)| a != *b).count();
                for (rank, found) in found.iter().enumerate() {
                    assert!(found[step] == expected, "rank {rank} of {ranks}, {} numbers", x.len());
                }
            }
            assert!(ranks == 2 || another_order > 1000, "numbers that would show another order");
        }
    }

    #[test]
    fn rank_0_gathers_what_every_rank_writes() {
        let (ranks, width, rows) = (3, 20, 7);
        let found = on_ranks(ranks, |rank, mut handle| {
            let mut out = vec![-1.0; if rank == 0 { rows * width } else { 0 }];
            for round in 0..100 {
                let columns = share(width, 4, rank, ranks);
                let write = |out: Shared<'_, f32>| {
                    for row in 0..rows {
                        // SAFETY: ranks have different columns.
                        let part = unsafe { out.part(row * width + columns.start, columns.len()) };
                        part.fill((round * 1000 + row * 10 + rank) as f32);
                    }
                };
                handle.gather(&mut out, write).unwrap();
                for (i, &found) in out.iter().enumerate() {
                    let of = (0..ranks).find(|&rank| share(width, 4, rank, ranks).contains(&(i % width))).unwrap();
                    assert_eq!(found, (round * 1000 + i / width * 10 + of) as f32);
                }
            }
        });
        assert_eq!(found.len(), ranks);
    }

    #[test]
    fn a_rank_that_fails_or_panics_ends_the_operations_of_all() {
        for ranks in 2..=5 {
            for round in 0..20 {
                let (dying, at) = (round % ranks, round / 2);
                let done = on_ranks(ranks, |rank, mut handle| {
                    let cpu = cpu(1);
                    let (partial, mut x, mut done) = (vec![1.0; 5000], vec![0.0; 5000], 0);
                    let outcome = catch_unwind(AssertUnwindSafe(|| -> Result<()> {
                        loop {
                            assert!(rank != dying || done < at, "as asked");
                            match done % 2 {
                                0 => handle.all_reduce(&cpu, &partial, &mut x)?,
                                _ => handle.gather(&mut x, |_| ())?,
                            }
                            done += 1;
                        }
                    }));
                    if outcome.is_err() {
                        handle.fail();
                    }
                    // Nobody writes here any more.
                    x.fill(7.0);
                    assert!(handle.all_reduce(&cpu, &partial, &mut x).is_err());
                    assert!(x.iter().all(|&x| x == 7.0));
                    done
                });
                assert!(done.iter().all(|&done| done == at || done + 1 == at), "{done:?}, rank {dying} ends at {at}");
            }
        }
    }

    #[test]
    fn ranks_that_do_not_do_the_same_are_told() {
        let outcomes = on_ranks(2, |rank, mut handle| {
            let mut x = vec![0.0; 64 + rank];
            handle.all_reduce(&cpu(1), &vec![0.0; 64 + rank], &mut x).is_err()
        });
        assert_eq!(outcomes, [true, true]);
    }
}
