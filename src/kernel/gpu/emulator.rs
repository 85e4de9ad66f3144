//! Runs kernels on the host: `kernels/emulate.cpp`, for tests where there is no GPU.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use super::launch::{Launch, Launcher, Ptr};
use crate::base::{Error, Result};

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
