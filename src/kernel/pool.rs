//! Worker threads of a CPU device.
//!
//!     caller   ──work(0)──┐ wait │ … serial … │──work(0)──┐
//!     worker 1 ──work(1)──┘ spin ─────────────│──work(1)──┘ spin, then yield, then sleep
//!
//! A step of a model is some hundred short parallel parts with next to nothing between them, so a worker that has
//! finished spins for the next part, then gives its core to others between looks, and only then sleeps. A worker that
//! comes late, because others have its core, finds a part of [`Pool::each`] closed and goes on: nobody waits for threads
//! that hold no work. One part at a time: a second caller waits for the first. Not a scheduler: parts may not start parts.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

/// Looks at the epoch before a waiting thread starts to give its core away: some 20 µs.
const SPINS: usize = 1_500;
/// Times it gives its core away before it sleeps: a few ms when nobody else wants the core.
pub(super) const YIELDS: usize = 4_000;

/// A fixed set of threads that all run the same closure and meet at its end.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held by the caller whose closure is running.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Rises with every job; a worker runs when it sees a new value.
    epoch: Line<AtomicUsize>,
    /// Who may still enter the current job and who is inside: see [`enter`].
    door: Line<AtomicU64>,
    /// Valid while the door is open, and until the last one inside has left.
    job: UnsafeCell<Option<&'static (dyn Fn(usize) + Sync)>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleeping: AtomicUsize,
    bed: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written by the caller while the door is closed and nobody is inside, and only read by those inside.
unsafe impl Sync for Shared {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Shared {}

/// Alone on its cache line, so that the workers' countdown does not disturb those that look at the epoch.
#[repr(align(128))]
pub(super) struct Line<T>(pub(super) T);

impl Pool {
    /// `threads` in all, the caller's included: `Pool::new(1)` starts none. Threads the system refuses are done without.
    pub fn new(threads: usize) -> Self {
        Self::named("kernel", threads)
    }

    /// [`Pool::new`], its threads called `name` and their number.
    pub fn named(name: &str, threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: Line(AtomicUsize::new(0)),
            door: Line(AtomicU64::new(CLOSED)),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads.clamp(1, COUNT as usize))
            .map_while(|thread| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("{name}-{thread}")).spawn(move || shared.serve(thread)).ok()
            })
            .collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// How many threads run a closure, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(thread)` once on each thread, `0..threads`, the caller being 0, and returns when all are done.
    ///
    /// # Panics
    /// With the first panic of any thread, once all are done. `work` must not call `run` of the same pool.
    pub fn run(&self, work: impl Fn(usize) + Sync) {
        self.start(&mut || work(0), &work, true);
    }

    /// Runs `own` on the caller, which may use what is the caller's alone, and `others(thread)` on each other thread,
    /// `1..threads`; returns when all are done.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn lead(&self, own: impl FnOnce(), others: impl Fn(usize) + Sync) {
        let mut own = Some(own);
        let mut once = || {
            if let Some(own) = own.take() {
                own();
            }
        };
        self.start(&mut once, &others, true);
    }

    /// The caller runs `own`. With `all`, every other thread runs `job`; else those that come before the caller is done.
    fn start(&self, own: &mut dyn FnMut(), job: &(dyn Fn(usize) + Sync), all: bool) {
        if self.workers.is_empty() {
            return own();
        }
        let turn = self.turn.lock();
        let shared = &*self.shared;
        // SAFETY: the reference is only used by workers inside the door, for whom this function waits even when the job
        // panics; so it does not outlive the job. Nobody is inside now: the last job was waited for.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static _>(job)) };
        let door = &shared.door.0;
        let epoch = shared.epoch.0.load(Ordering::Relaxed).wrapping_add(1);
        door.store((epoch as u64) << JOB, Ordering::Release);
        shared.epoch.0.store(epoch, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            let _bed = shared.bed.lock();
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(own));
        if all {
            let everyone = self.workers.len() as u64;
            wait(|| door.load(Ordering::Acquire) >> ENTERED & COUNT == everyone, usize::MAX);
        }
        door.fetch_or(CLOSED, Ordering::AcqRel);
        wait(|| door.load(Ordering::Acquire) & COUNT == 0, usize::MAX);
        let theirs = shared.panic.lock().take();
        drop(turn);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Runs `work(index)` for each of `0..count`, handed out in order, `grain` at a time, to whichever thread is free.
    /// For work of uneven size put the largest first.
    pub fn each(&self, count: usize, grain: usize, work: impl Fn(usize) + Sync) {
        self.each_beside(&mut || (), count, grain, work);
    }

    /// [`Pool::each`], with something else for the caller to do first: once, while the other threads begin.
    pub fn each_beside(&self, errand: &mut dyn FnMut(), count: usize, grain: usize, work: impl Fn(usize) + Sync) {
        let grain = grain.max(1);
        if count <= grain {
            errand();
            return (0..count).for_each(work);
        }
        let next = AtomicUsize::new(0);
        let take = |_| {
            loop {
                let first = next.fetch_add(grain, Ordering::Relaxed);
                if first >= count {
                    return;
                }
                (first..(first + grain).min(count)).for_each(&work);
            }
        };
        let mut own = || {
            errand();
            take(0);
        };
        self.start(&mut own, &take, false);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        {
            let _bed = self.shared.bed.lock();
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            if !wait(|| self.epoch.0.load(Ordering::Acquire) != seen, YIELDS) {
                self.sleep(seen);
            }
            seen = self.epoch.0.load(Ordering::Acquire);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if !enter(&self.door.0, seen) {
                continue;
            }
            // SAFETY: inside the door.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(thread)))
            {
                self.panic.lock().get_or_insert(panic);
            }
            self.door.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Until the epoch is another than `seen`.
    fn sleep(&self, seen: usize) {
        let mut bed = self.bed.lock();
        // Counted before the look at the epoch; the caller raises the epoch before it looks at the count. One of the
        // two sees the other.
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while self.epoch.0.load(Ordering::SeqCst) == seen {
            self.wake.wait(&mut bed);
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A door's number: how many are inside in the low bits, whether it is closed, how many have ever entered, and which job
/// it leads to, so that a late worker does not enter the next job as the last one, and then again as itself.
const COUNT: u64 = (1 << 16) - 1;
const CLOSED: u64 = 1 << 16;
const ENTERED: u32 = 17;
const JOB: u32 = 34;

/// Goes in, unless the door is closed or leads to another job.
fn enter(door: &AtomicU64, epoch: usize) -> bool {
    let step_in = |now: u64| {
        let open = now & CLOSED == 0 && now >> JOB == (epoch as u64) << JOB >> JOB;
        open.then_some(now + 1 + (1 << ENTERED))
    };
    door.fetch_update(Ordering::AcqRel, Ordering::Acquire, step_in).is_ok()
}

/// Waits for `done` without sleeping; false after having yielded `yields` times in vain.
pub(super) fn wait(done: impl Fn() -> bool, yields: usize) -> bool {
    for _ in 0..SPINS {
        if done() {
            return true;
        }
        std::hint::spin_loop();
    }
    for _ in 0..yields {
        if done() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_thread_runs_every_job_once_also_after_sleeping() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..200 {
                let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                if round % 100 == 50 {
                    std::thread::sleep(Duration::from_millis(60));
                }
            }
        }
    }

    #[test]
    fn the_caller_leads_with_what_is_its_own_while_the_others_follow() {
        for threads in [1, 4] {
            let pool = Pool::new(threads);
            let (mut led, followed) = (Vec::new(), AtomicUsize::new(0));
            for round in 0..100 {
                pool.lead(|| led.push(round), |thread| _ = followed.fetch_add(thread, Ordering::Relaxed));
            }
            assert_eq!(led.len(), 100);
            assert_eq!(followed.into_inner(), 100 * (1..threads).sum::<usize>());
        }
    }

    #[test]
    fn each_index_is_handed_out_once() {
        let pool = Pool::new(3);
        for (count, grain) in [(0, 1), (1, 1), (7, 3), (1000, 1), (1000, 16)] {
            let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            pool.each(count, grain, |index| {
                seen[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) == 1), "{count} by {grain}");
        }
    }

    #[test]
    fn an_errand_is_done_once_by_the_caller_while_others_work() {
        for (threads, count) in [(1, 9), (2, 9), (3, 1), (3, 0)] {
            let (pool, caller, mut done) = (Pool::new(threads), std::thread::current().id(), 0);
            let seen = AtomicUsize::new(0);
            let mut errand = || {
                assert_eq!(std::thread::current().id(), caller);
                done += 1;
                // With others there it can only end when they have begun, or there is nothing for them.
                wait(|| threads == 1 || count <= 1 || seen.load(Ordering::Relaxed) > 0, usize::MAX);
            };
            pool.each_beside(&mut errand, count, 1, |_| {
                seen.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!((done, seen.load(Ordering::Relaxed)), (1, count), "{threads} threads");
        }
    }

    #[test]
    fn a_panic_in_any_thread_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for bad in 0..2 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(|thread| assert_ne!(thread, bad, "as asked"))));
            assert!(caught.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn two_callers_take_turns() {
        let pool = Pool::new(2);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(|thread| {
                            if thread == 0 {
                                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                                inside.fetch_sub(1, Ordering::SeqCst);
                            }
                        });
                    }
                });
            }
        });
    }
}
