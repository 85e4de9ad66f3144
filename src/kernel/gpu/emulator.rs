//! Runs kernels on the host: `kernels/emulate.cpp`, for tests where there is no GPU.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::time::Instant;

use parking_lot::Mutex;

use super::card::{Card, LANDING, Part, Parts};
use super::launch::{Launch, Launcher, Ptr};
use crate::base::{Error, Kind, Result};
use crate::kernel::Buffer;

/// Memory of an emulated card, in bytes; nobody counts it.
pub(super) const MEMORY: usize = 64 << 20;
/// Names a file: see [`broken`].
const FAULT: &str = "NEUROND_EMULATED_FAULT";

unsafe extern "C" {
    fn emulate_launch(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared: usize,
        arguments: *mut *mut c_void,
        count: c_int,
        seed: c_uint,
    ) -> c_int;
}

/// Threads of a block run in an order that the seed decides: 0 in theirs, 1 backwards, else shuffled. What a kernel computes
/// must not depend on it.
#[derive(Clone, Copy, Default)]
pub struct Emulator {
    /// The order.
    pub seed: u32,
}

impl Emulator {
    /// A slice as memory of the emulated device.
    ///
    /// # Safety
    /// As [`Ptr::new`]: it outlives the launches that have it, and nobody uses it meanwhile.
    pub unsafe fn memory<T>(slice: &mut [T]) -> Ptr<T> {
        // SAFETY: by the caller's promise.
        unsafe { Ptr::new(slice.as_mut_ptr() as u64, slice.len()) }
    }
}

impl Launcher for Emulator {
    fn launch(&self, mut launch: Launch) -> Result<()> {
        let name = CString::new(launch.name.as_str()).map_err(|_| Error::internal("a kernel's name holds a zero"))?;
        let (grid, block, shared) = (launch.grid, launch.block, launch.shared);
        let mut arguments = launch.arguments();
        // SAFETY: the arguments are as many as there are addresses, each of a value of its own, alive until the call ends;
        // memory behind them is there by the promise of whoever made the pointers.
        let status = unsafe {
            emulate_launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                arguments.as_mut_ptr(),
                arguments.len() as c_int,
                self.seed,
            )
        };
        match status {
            0 => Ok(()),
            1 => Err(Error::internal(format!("there is no kernel {}", launch.name))),
            _ => Err(Error::internal(format!("kernel {} takes another number of arguments", launch.name))),
        }
    }
}

/// An emulated device with memory of its own.
#[derive(Default)]
pub struct EmulatedCard {
    emulator: Emulator,
    memory: Mutex<Vec<Buffer<u8>>>,
    notes: Mutex<Notes>,
    /// On its way out.
    departed: Mutex<Vec<u8>>,
    /// When each mark was made.
    marks: Mutex<Vec<(Option<Part>, Instant)>>,
}

/// What was launched to be launched again.
#[derive(Default)]
struct Notes {
    /// While something is noted.
    open: Option<Vec<Launch>>,
    all: Vec<Vec<Launch>>,
}

impl EmulatedCard {
    /// One whose threads run in this order.
    pub fn new(seed: u32) -> Self {
        Self { emulator: Emulator { seed }, ..Self::default() }
    }
}

impl Launcher for EmulatedCard {
    fn launch(&self, launch: Launch) -> Result<()> {
        if let Some(noted) = &mut self.notes.lock().open {
            noted.push(launch);
            return Ok(());
        }
        broken()?;
        self.emulator.launch(launch)
    }
}

/// Fails once when the file that [`FAULT`] names is there: as a driver does after a kernel that went wrong.
fn broken() -> Result<()> {
    match std::env::var_os(FAULT).is_some_and(|path| std::fs::remove_file(path).is_ok()) {
        true => Err(Error::internal("an emulated card has broken down, as it was told to")),
        false => Ok(()),
    }
}

impl Card for EmulatedCard {
    fn name(&self) -> String {
        "emulated".to_owned()
    }

    fn processors(&self) -> usize {
        4
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(MEMORY)
    }

    fn alloc_bytes(&self, bytes: usize) -> Result<u64> {
        let Some(mut memory) = Buffer::<u8>::try_zeroed(bytes) else {
            return Err(Error::new(Kind::ModelUnavailable, format!("there are no {bytes} bytes")));
        };
        let address = memory.as_mut_ptr() as u64;
        self.memory.lock().push(memory);
        Ok(address)
    }

    fn free(&self, address: u64) -> Result<()> {
        self.memory.lock().retain(|memory| memory.as_ptr() as u64 != address);
        Ok(())
    }

    unsafe fn depart_bytes(&self, from: u64, len: usize) -> Result<()> {
        if len > LANDING {
            return Err(Error::internal(format!("{len} bytes depart, {LANDING} at most")));
        }
        let mut departed = vec![0; len];
        // SAFETY: by the caller's promise.
        unsafe { self.download_bytes(from, &mut departed)? };
        *self.departed.lock() = departed;
        Ok(())
    }

    fn land_bytes(&self, to: &mut [u8]) -> Result<()> {
        let departed = std::mem::take(&mut *self.departed.lock());
        if departed.len() != to.len() {
            return Err(Error::internal(format!("{} bytes land, {} have departed", to.len(), departed.len())));
        }
        to.copy_from_slice(&departed);
        Ok(())
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
        self.notes.lock().open = Some(Vec::new());
        let worked = work();
        let mut notes = self.notes.lock();
        let noted = notes.open.take().unwrap_or_default();
        worked?;
        notes.all.push(noted);
        Ok(notes.all.len() - 1)
    }

    fn replay(&self, note: usize) -> Result<()> {
        let notes = self.notes.lock();
        let Some(noted) = notes.all.get(note) else { return Err(Error::internal(format!("there is no note {note}"))) };
        broken()?;
        noted.iter().try_for_each(|launch| self.emulator.launch(launch.clone()))
    }

    fn mark(&self, part: Option<Part>) -> Result<()> {
        // A launch is over when it returns.
        self.marks.lock().push((part, Instant::now()));
        Ok(())
    }

    fn marked(&self) -> Result<Parts> {
        let mut parts = Parts::default();
        let marks = std::mem::take(&mut *self.marks.lock());
        for pair in marks.windows(2) {
            if let (Some(part), begun) = pair[0] {
                parts[part as usize] += pair[1].1.duration_since(begun).as_secs_f64();
            }
        }
        Ok(parts)
    }

    unsafe fn upload_bytes(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: by the caller's promise; launches are over when they return.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn send_bytes(&self, len: usize, to: u64, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        // What is left from another time must not be taken for what was written now.
        let mut room = Buffer::<u8>::zeroed(len);
        room.fill(0xff);
        fill(&mut room);
        // SAFETY: by the caller's promise.
        unsafe { self.upload_bytes(&room, to) }
    }

    unsafe fn download_bytes(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel makes of 0, 1, … 127 with threads in several orders.
    fn sums(name: &str) -> Vec<f32> {
        let card: Box<dyn Card> = Box::new(EmulatedCard::default());
        let (x, out) = (card.alloc::<f32>(128).unwrap(), card.alloc::<f32>(1).unwrap());
        let numbers: Vec<f32> = (0..128).map(|number| number as f32).collect();
        card.upload(&numbers, x).unwrap();
        let sum = |seed| {
            let mut sum = [f32::NAN];
            card.upload(&sum, out).unwrap();
            Emulator { seed }.launch(Launch::new(name, [1, 1, 1], 128).ptr(x).ptr(out)).unwrap();
            card.download(out, &mut sum).unwrap();
            sum[0]
        };
        (0..6).map(sum).collect()
    }

    /// What the tests of kernels rely on: a missing barrier is seen in the order of threads, a wrong index in the result.
    #[test]
    fn a_broken_barrier_or_index_shows() {
        let right = 127.0 * 128.0 / 2.0;
        assert!(sums("sum_right").iter().all(|&sum| sum == right));
        let racing = sums("sum_no_barrier");
        assert!(racing.iter().any(|sum| *sum != racing[0]), "{racing:?}");
        assert!(sums("sum_wrong_index").iter().all(|&sum| sum != right));
        let error = Emulator::default().launch(Launch::new("sum_right", [1, 1, 1], 128)).unwrap_err();
        assert!(error.message().contains("another number of arguments"), "{error}");
        let error = Emulator::default().launch(Launch::new("no_such", [1, 1, 1], 32)).unwrap_err();
        assert!(error.message().contains("there is no kernel no_such"), "{error}");
    }
}
