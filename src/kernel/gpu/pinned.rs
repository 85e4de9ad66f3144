//! Memory of the host that a card reads and writes by itself. What lies elsewhere the driver copies first, on the calling thread.

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::base::{Error, Result};

/// A range of such memory.
pub(super) struct Pinned {
    data: *mut u8,
    bytes: usize,
}

/// Two ranges in turn: while the card reads one, the other is written.
#[derive(Default)]
pub(super) struct Ring {
    rooms: [Option<Room>; 2],
    next: usize,
}

struct Room {
    memory: Pinned,
    /// Recorded behind the last copy out of it.
    read: sys::CUevent,
}

impl Pinned {
    /// Zeros. The context is this thread's, here and in [`Pinned::free`].
    pub(super) fn alloc(bytes: usize) -> Result<Self> {
        // SAFETY: freed by `free`.
        let data =
            unsafe { result::malloc_host(bytes, 0) }.map_err(|error| failed("pinning memory", error))?.cast::<u8>();
        // SAFETY: as many as were allocated.
        unsafe { data.write_bytes(0, bytes) };
        Ok(Self { data, bytes })
    }

    /// The first `bytes`, if there are as many.
    pub(super) fn room(&mut self, bytes: usize) -> Option<&mut [u8]> {
        // SAFETY: allocated, written, and borrowed like the owner of it.
        (bytes <= self.bytes).then(|| unsafe { std::slice::from_raw_parts_mut(self.data, bytes) })
    }

    /// Gives it back. No copy from or to it is under way.
    pub(super) unsafe fn free(self) {
        // SAFETY: allocated by `alloc`. A failure costs what the driver then keeps.
        let _ = unsafe { result::free_host(self.data.cast::<c_void>()) };
    }
}

// SAFETY: memory of the process, of no thread in particular.
unsafe impl Send for Pinned {}
// SAFETY: events may be used by any thread whose context is theirs.
unsafe impl Send for Room {}

impl Ring {
    /// Has `fill` write `bytes` bytes where no copy reads any more, and `copy` send them over `stream`.
    pub(super) fn send(
        &mut self,
        bytes: usize,
        stream: sys::CUstream,
        fill: &mut dyn FnMut(&mut [u8]),
        copy: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let at = self.next;
        self.next = 1 - at;
        let slot = &mut self.rooms[at];
        if let Some(room) = slot {
            // SAFETY: an event of this context.
            unsafe { result::event::synchronize(room.read) }.map_err(|error| failed("waiting for a copy", error))?;
        }
        if let Some(small) = slot.take_if(|room| room.memory.bytes < bytes) {
            // SAFETY: what read it is done.
            unsafe { small.free() };
        }
        let room = match slot {
            Some(room) => room,
            None => {
                let memory = Pinned::alloc(bytes)?;
                let read = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(|error| failed("making an event", error))?;
                slot.insert(Room { memory, read })
            }
        };
        let data = room.memory.room(bytes).ok_or_else(|| Error::internal("a room that is too small"))?;
        fill(data);
        copy(data)?;
        // SAFETY: an event and a stream of this context.
        unsafe { result::event::record(room.read, stream) }.map_err(|error| failed("recording an event", error))
    }

    /// Gives all of it back. The stream it was used with is done.
    pub(super) unsafe fn free(&mut self) {
        for room in self.rooms.iter_mut().filter_map(Option::take) {
            // SAFETY: by contract.
            unsafe { room.free() };
        }
    }
}

impl Room {
    unsafe fn free(self) {
        // SAFETY: made by `send`; no copy out of it is under way, by contract.
        unsafe {
            let _ = result::event::destroy(self.read);
            self.memory.free();
        }
    }
}

/// What the driver refused, and why.
pub(super) fn failed(what: &str, error: DriverError) -> Error {
    Error::internal(format!("{what}: {error}"))
}
