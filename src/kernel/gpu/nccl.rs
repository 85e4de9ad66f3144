//! What ranks on several GPUs sum and gather with: NCCL, which is opened when a model is divided over GPUs.
//!
//! ```text
//! connect([2, 3]) ──> a Link a rank ── all_reduce, gather ──> behind the rank's stream, inside graphs as outside
//!       rank 1 fails ── abandon ──> the communicators of all others are aborted: what waits on their streams ends
//! ```
//!
//! Ranks are threads of one process. Whoever fails has NCCL give up what the others wait for, on their devices or inside a call, which
//! any thread may ask for. Within a process NCCL frees the first communicator when the last is aborted, and waits for all graphs
//! that hold one before that: so the last is the failed rank's own, aborted on a thread of its own when nobody is inside a call any
//! more. Closing a group that is well is the same.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use half::bf16;
use libloading::os::unix::Library;
use parking_lot::Mutex;

use super::launch::Ptr;
use crate::base::{Error, Kind, Result};

/// The library's file.
pub(super) const LIBRARY: &str = "libnccl.so.2";

/// Numbers of `nccl.h` that calls take.
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;
/// Results that are no errors.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

type Comm = *mut c_void;
type Stream = *mut c_void;

/// The functions of the library. A communicator is a `ncclComm_t`, a stream a `cudaStream_t`, which is the driver's.
struct Nccl {
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    init_all: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
}

impl Nccl {
    /// The library, opened once and never closed.
    fn get() -> Result<&'static Self> {
        static OPENED: OnceLock<std::result::Result<Nccl, String>> = OnceLock::new();
        OPENED.get_or_init(|| Self::open().map_err(|error| error.to_string())).as_ref().map_err(|error| {
            let remedy = "install NCCL for CUDA 13 (libnccl2, or the package nvidia-nccl-cu13) and name its folder in \
                          gpu.library_folders if the system does not find it";
            Error::new(
                Kind::ModelUnavailable,
                format!("{LIBRARY} connects GPUs and cannot be opened ({error}): {remedy}"),
            )
        })
    }

    fn open() -> std::result::Result<Self, libloading::Error> {
        // SAFETY: its initialisers run, as those of CUDA's libraries do. The types of the functions are those of nccl.h, which
        // keeps them within a version 2.
        unsafe {
            let library = Library::new(LIBRARY)?;
            let opened = Self {
                version: *library.get(b"ncclGetVersion\0")?,
                error: *library.get(b"ncclGetErrorString\0")?,
                init_all: *library.get(b"ncclCommInitAll\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                send: *library.get(b"ncclSend\0")?,
                receive: *library.get(b"ncclRecv\0")?,
            };
            std::mem::forget(library);
            Ok(opened)
        }
    }

    /// What a call returned.
    fn done(&self, what: &str, status: c_int) -> Result<()> {
        if matches!(status, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: a text that is always there.
        let text = unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy();
        Err(Error::internal(format!("NCCL: {what}: {text} (NCCL_DEBUG=WARN in the environment says more)")))
    }
}

/// What NCCL calls itself.
///
/// # Errors
/// `ModelUnavailable` when it is not installed; the message says what to install.
pub(super) fn version() -> Result<String> {
    let nccl = Nccl::get()?;
    let mut version = 0;
    // SAFETY: a place for a number.
    nccl.done("version", unsafe { (nccl.version)(&mut version) })?;
    Ok(format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// The ranks of a group.
struct Ranks {
    nccl: &'static Nccl,
    /// By rank.
    comms: Vec<Comm>,
    failed: AtomicBool,
    /// Ranks that are inside a call of NCCL.
    inside: AtomicUsize,
    /// Aborts the last communicator.
    closer: Mutex<Option<JoinHandle<()>>>,
}

// SAFETY: communicators may be used by any thread, each by one at a time but for being aborted.
unsafe impl Send for Ranks {}
// SAFETY: as above.
unsafe impl Sync for Ranks {}

impl Drop for Ranks {
    fn drop(&mut self) {
        // Nobody has a link any more, nor a graph that holds a communicator: it ends soon.
        if let Some(closer) = self.closer.get_mut().take() {
            let _ = closer.join();
        }
    }
}

/// One rank's way to the others. Whoever drops it has abandoned the group.
pub(super) struct Link {
    rank: usize,
    ranks: Arc<Ranks>,
}

/// Connects cards that are open already, one a rank.
///
/// # Errors
/// `ModelUnavailable` when the library is not installed, `Internal` when it cannot connect them.
pub(super) fn connect(ordinals: &[u16]) -> Result<Vec<Link>> {
    let nccl = Nccl::get()?;
    let devices: Vec<c_int> = ordinals.iter().map(|&ordinal| ordinal.into()).collect();
    let mut comms: Vec<Comm> = vec![std::ptr::null_mut(); devices.len()];
    // SAFETY: as many numbers, and room for as many communicators. The runtime's devices have the driver's numbers.
    let status = unsafe { (nccl.init_all)(comms.as_mut_ptr(), devices.len() as c_int, devices.as_ptr()) };
    nccl.done(&format!("connecting GPUs {ordinals:?}"), status)?;
    let ranks = Arc::new(Ranks {
        nccl,
        comms,
        failed: AtomicBool::new(false),
        inside: AtomicUsize::new(0),
        closer: Mutex::default(),
    });
    Ok((0..ordinals.len()).map(|rank| Link { rank, ranks: ranks.clone() }).collect())
}

impl Link {
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// Calls NCCL with this rank's communicator, unless a rank has failed.
    fn call(&self, work: impl FnOnce(&Nccl, Comm) -> Result<()>) -> Result<()> {
        /// Leaves however the work ends.
        struct Leave<'a>(&'a AtomicUsize);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let Ranks { nccl, comms, failed, inside, .. } = &*self.ranks;
        let given_up = || Err(Error::internal("another rank of this model failed"));
        // Said before the look at the failure; a failing rank sets that before it looks who is inside. One of the two sees the
        // other.
        inside.fetch_add(1, Ordering::SeqCst);
        let leave = Leave(inside);
        if failed.load(Ordering::SeqCst) {
            return given_up();
        }
        let outcome = work(nccl, comms[self.rank]);
        drop(leave);
        // What was given up is no fault of this rank.
        if failed.load(Ordering::SeqCst) { given_up() } else { outcome }
    }

    /// Whether all ranks are well.
    ///
    /// # Errors
    /// `Internal` when another failed, or NCCL ran into something since it was asked last.
    pub(super) fn check(&self) -> Result<()> {
        self.call(|nccl, comm| {
            let mut status = SUCCESS;
            // SAFETY: a communicator that is there, and a place for a number.
            nccl.done("asking", unsafe { (nccl.async_error)(comm, &mut status) })?;
            nccl.done("between GPUs", status)
        })
    }

    /// `x` becomes the sum of all ranks' on `stream`.
    pub(super) fn all_reduce(&self, x: Ptr<bf16>, stream: Stream) -> Result<()> {
        let at = x.address() as *mut c_void;
        self.call(|nccl, comm| {
            // SAFETY: numbers of this rank's card, and its stream; in place is allowed.
            nccl.done("summing", unsafe { (nccl.all_reduce)(at, at, x.len(), BFLOAT16, SUM, comm, stream) })
        })
    }

    /// `own` of each other rank to its part of rank 0's `into`, which were checked.
    pub(super) fn gather(&self, own: Ptr<f32>, into: Ptr<f32>, parts: &[Range<usize>], stream: Stream) -> Result<()> {
        if self.rank > 0 {
            let from = own.address() as *const c_void;
            return self.call(|nccl, comm| {
                // SAFETY: numbers of this rank's card, and its stream.
                nccl.done("sending", unsafe { (nccl.send)(from, own.len(), FLOAT32, 0, comm, stream) })
            });
        }
        self.call(|nccl, comm| {
            // SAFETY: opens a group of calls, which is closed below whatever becomes of them.
            nccl.done("receiving", unsafe { (nccl.group_start)() })?;
            let received = parts.iter().enumerate().skip(1).try_for_each(|(peer, part)| {
                let at = into.part(part.start, part.len()).address() as *mut c_void;
                // SAFETY: as above.
                let status = unsafe { (nccl.receive)(at, part.len(), FLOAT32, peer as c_int, comm, stream) };
                nccl.done("receiving", status)
            });
            // SAFETY: as above.
            let ended = unsafe { (nccl.group_end)() };
            received.and_then(|()| nccl.done("receiving", ended))
        })
    }

    /// Ends the group: what other ranks wait for is given up. Not from inside a call.
    pub(super) fn abandon(&self) {
        let Ranks { comms, failed, inside, closer, .. } = &*self.ranks;
        let nccl = self.ranks.nccl;
        if failed.swap(true, Ordering::SeqCst) {
            return;
        }
        for (_, &comm) in comms.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
            // SAFETY: made by `connect` and aborted once; it is freed after the last is aborted.
            unsafe { (nccl.abort)(comm) };
        }
        while inside.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        /// A communicator on its way to its end.
        struct Last(Comm);
        // SAFETY: nobody else uses it any more.
        unsafe impl Send for Last {}
        let last = Last(comms[self.rank]);
        let close = move || {
            let Last(comm) = { last };
            // SAFETY: as above; all have been aborted now, and nobody is inside a call.
            unsafe { (nccl.abort)(comm) };
        };
        match std::thread::Builder::new().name("nccl-close".to_owned()).spawn(close) {
            Ok(thread) => *closer.lock() = Some(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread to close communicators of GPUs on: their memory is not given back")
            }
        }
    }
}
