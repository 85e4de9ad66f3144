//! Large pages for memory that is read over and over: at once where the system hands them out quickly, else when there is time.
//!
//! ```text
//!   weights ─ lend ─> a few are touched: quick? ── yes ──> large from the first touch
//!                                          └────── no ───> small for now ─┐
//!   the allocator's memory ── small_heap ──> small for now ───────────────┴─> enlarge: moved to large ones, a page at a time
//! ```
//!
//! With large pages a walk over memory needs few translations of addresses, which in a virtual machine are dear. But a host that has
//! taken back what its guest had freed takes some ten milliseconds to hand out 2 MiB again, and a daemon would wait for that
//! until it is ready; small pages mostly come from what the guest has kept. The heap is worse off in any case while a daemon starts:
//! its threads touch a few KiB each here and there, and every first touch clears a page. Figures: `docs/PERFORMANCE.md`.
//!
//! Nothing depends on it but speed: where the system refuses, it is left as it is.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::debug;

/// Bytes of a large page.
pub(super) const LARGE: usize = 2 << 20;
const SMALL: usize = 4 << 10;
/// Clearing 2 MiB takes a third of it.
const QUICK: Duration = Duration::from_millis(1);
/// So many pages are tried; the first slow one is enough.
const TRIED: usize = 4;
/// Between two pages that are moved, as long as so many would take, and at least so long: those who serve meanwhile need the core, and
/// wait for the page.
const REST: u32 = 8;
const LEAST_REST: Duration = Duration::from_millis(5);

/// Memory with small pages that is to have large ones.
struct Small {
    range: Range<usize>,
    /// Whose it is; memory without an owner stays for as long as the process.
    owner: Option<Weak<dyn Any + Send + Sync>>,
}

static WAITING: Mutex<Vec<Small>> = Mutex::new(Vec::new());

/// Gives memory of zeros that nobody has touched large pages, or notes that it is to get them later.
pub(super) fn lend<T: Send + Sync + 'static>(range: Range<usize>, owner: &Arc<T>) {
    lend_within(QUICK, range, owner);
}

fn lend_within<T: Send + Sync + 'static>(patience: Duration, range: Range<usize>, owner: &Arc<T>) {
    if !advise(&range, Advice::Large) {
        return;
    }
    let is_slow = |page: usize| {
        let begin = Instant::now();
        // SAFETY: inside memory that its owner has not given to anybody yet, and a zero for a zero.
        unsafe { (page as *mut u8).write_volatile(0) };
        begin.elapsed() > patience
    };
    if places(&range).take(TRIED).any(is_slow) && advise(&range, Advice::Small) {
        let owner: Weak<T> = Arc::downgrade(owner);
        let mut waiting = WAITING.lock();
        // Models that come and go between two calls of `enlarge` leave nothing behind.
        waiting.retain(|small| small.owner.as_ref().is_none_or(|owner| owner.strong_count() > 0));
        waiting.push(Small { range, owner: Some(owner) });
    }
}

/// Begins with small pages for what is allocated, to be called before much is.
pub fn small_heap() {
    if let Some(range) = heap().filter(|range| advise(range, Advice::Small)) {
        WAITING.lock().push(Small { range, owner: None });
    }
}

/// Moves what waits for it to large pages, on a thread of its own that says how many it has moved; none if nothing waits.
pub fn enlarge() -> Option<JoinHandle<usize>> {
    let waiting = std::mem::take(&mut *WAITING.lock());
    if waiting.is_empty() {
        return None;
    }
    let work = move || {
        let moved = waiting.into_iter().map(enlarge_one).sum();
        debug!(pages = moved, "moved to large pages");
        moved
    };
    // Without a thread it all stays as it is.
    std::thread::Builder::new().name("pages".into()).spawn(work).ok()
}

fn enlarge_one(Small { range, owner }: Small) -> usize {
    let owner = owner.map(|owner| owner.upgrade());
    // Its owner is gone, or the system has changed its mind.
    if owner.is_some_and(|owner| owner.is_none()) || !advise(&range, Advice::Large) {
        return 0;
    }
    let mut moved = 0;
    for page in places(&range).filter(|page| is_touched(*page)) {
        let begin = Instant::now();
        // Kernels before 6.1 cannot: theirs do it by themselves, later.
        if !advise(&(page..page + LARGE), Advice::Move) {
            break;
        }
        moved += 1;
        std::thread::sleep((begin.elapsed() * REST).max(LEAST_REST));
    }
    moved
}

/// Where large pages can be.
fn places(range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
    let count = (range.end.saturating_sub(range.start.next_multiple_of(LARGE))) / LARGE;
    let start = range.start.next_multiple_of(LARGE);
    (0..count).map(move |page| start + page * LARGE)
}

enum Advice {
    Large,
    Small,
    /// What is there is moved into a large page.
    Move,
}

#[cfg(target_os = "linux")]
fn advise(range: &Range<usize>, advice: Advice) -> bool {
    let advice = match advice {
        Advice::Large => libc::MADV_HUGEPAGE,
        Advice::Small => libc::MADV_NOHUGEPAGE,
        // `libc::MADV_COLLAPSE`, which it knows of for one C library only.
        Advice::Move => 25,
    };
    // SAFETY: none of these changes what memory holds, and the system refuses what is not mapped.
    unsafe { libc::madvise(range.start as *mut _, range.len(), advice) == 0 }
}

/// Whether anything of a large page's place is there.
#[cfg(target_os = "linux")]
fn is_touched(page: usize) -> bool {
    let mut present = [0_u8; LARGE / SMALL];
    // SAFETY: a byte for each page of the system's is written, and none is smaller.
    let status = unsafe { libc::mincore(page as *mut _, LARGE, present.as_mut_ptr()) };
    status == 0 && present.iter().any(|byte| byte & 1 == 1)
}

/// What the allocator has reserved: it does so with its first piece, and any piece lies in it.
#[cfg(target_os = "linux")]
fn heap() -> Option<Range<usize>> {
    let piece = Box::new(0_u8);
    let at = &raw const *piece as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        range.contains(&at).then_some(range)
    })
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &Range<usize>, _: Advice) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn is_touched(_: usize) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn heap() -> Option<Range<usize>> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::kernel::Buffer;

    fn memory() -> (Arc<Buffer<u8>>, Range<usize>) {
        let memory = Arc::new(Buffer::<u8>::zeroed(5 * LARGE));
        let start = memory.as_ptr() as usize;
        (memory, start..start + 5 * LARGE)
    }

    #[test]
    fn the_heap_is_where_pieces_lie() {
        let range = heap().unwrap();
        assert!(range.len() >= SMALL && range.start.is_multiple_of(SMALL), "{range:?}");
    }

    #[test]
    fn what_waits_is_moved_and_stays_what_it_is() {
        let (memory, range) = memory();
        // Four fit for sure; the first is touched to see how long it takes, which is always too long.
        lend_within(Duration::ZERO, range.clone(), &memory);
        let Some(first) = places(&range).next().filter(|first| is_touched(*first)) else {
            return; // A system without large pages.
        };
        let at = first + LARGE - range.start + 5 * SMALL;
        // SAFETY: inside, and nobody else has it.
        unsafe { std::ptr::copy_nonoverlapping(b"abc".as_ptr(), memory.as_ptr().cast_mut().add(at), 3) };
        let touched: Vec<usize> = places(&range).filter(|page| is_touched(*page)).collect();
        assert_eq!(touched, [first, first + LARGE]);
        let is_ours = |small: &mut Small| small.range == range;
        let small = WAITING.lock().extract_if(.., is_ours).next().unwrap();
        assert!(enlarge_one(small) <= 2);
        assert_eq!(&memory[at..at + 3], b"abc");
        assert!(memory.iter().filter(|byte| **byte != 0).eq(b"abc"));
    }

    #[test]
    fn what_is_gone_is_left_alone() {
        let (memory, range) = memory();
        let owner: Weak<Buffer<u8>> = Arc::downgrade(&memory);
        drop(memory);
        assert_eq!(enlarge_one(Small { range, owner: Some(owner) }), 0);
    }

    #[test]
    fn quick_pages_are_large_from_the_start() {
        let (memory, range) = memory();
        lend_within(Duration::MAX, range.clone(), &memory);
        assert!(WAITING.lock().iter().all(|small| small.range != range));
    }
}
