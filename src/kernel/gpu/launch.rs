//! A kernel's name, its grid and its arguments.

use std::ffi::c_void;
use std::marker::PhantomData;

use crate::base::{Error, Result};

/// 8 bits: sign, 4 of exponent, 3 of mantissa; up to 448, no infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Fp8(pub u8);

impl Fp8 {
    /// Its value.
    pub fn to_f32(self) -> f32 {
        let (exponent, mantissa) = (i32::from(self.0 >> 3 & 15), f32::from(self.0 & 7));
        let size = match (exponent, self.0 & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa * (-9f32).exp2(),
            _ => (8.0 + mantissa) * ((exponent - 10) as f32).exp2(),
        };
        if self.0 >> 7 == 1 { -size } else { size }
    }
}

/// Memory of a device: `len` numbers of type `T` at an address.
pub struct Ptr<T> {
    address: u64,
    len: usize,
    of: PhantomData<*const T>,
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

// SAFETY: an address, which nothing here reads.
unsafe impl<T> Send for Ptr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Ptr<T> {}

impl<T> Ptr<T> {
    /// `len` numbers at `address`.
    ///
    /// # Safety
    /// Until the last launch that has it is over there are so many at this address of the device that launches go to, and
    /// whoever else uses them does so in the order of its stream.
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, of: PhantomData }
    }

    /// No memory, where a kernel can do without.
    pub fn null() -> Self {
        Self { address: 0, len: 0, of: PhantomData }
    }

    /// Whether it is no memory.
    pub fn is_null(self) -> bool {
        self.address == 0
    }

    /// Where it begins.
    pub fn address(self) -> u64 {
        self.address
    }

    /// How many numbers there are.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` of its numbers from number `first` on.
    ///
    /// # Panics
    /// When it has not so many.
    pub fn part(self, first: usize, len: usize) -> Self {
        assert!(first.checked_add(len).is_some_and(|end| end <= self.len), "{first} + {len} of {}", self.len);
        Self { address: self.address + (first * size_of::<T>()) as u64, len, of: PhantomData }
    }

    /// What is wrong with it when a kernel needs `least` numbers at a multiple of `align` bytes.
    pub(super) fn needs(self, what: &str, least: usize, align: u64) -> Result<()> {
        if least == 0 {
            return Ok(());
        }
        if self.len < least {
            return Err(Error::internal(format!("{what}: {} numbers, and the kernel touches {least}", self.len)));
        }
        match self.address.is_multiple_of(align) {
            true => Ok(()),
            false => Err(Error::internal(format!("{what}: not at a multiple of {align} bytes"))),
        }
    }
}

/// A table of rows of bf16, as the card copies boxes of 64 columns out of it by itself: made by [`Card::table`](super::Card::table), which
/// says what the words are.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub struct Table(pub(super) [u64; 16]);

/// One argument, by value.
#[derive(Clone, Copy)]
#[repr(C)]
union Value {
    address: u64,
    int: i32,
    long: i64,
    float: f32,
}

/// A kernel to be run.
#[derive(Clone)]
pub struct Launch {
    /// Its name in `kernels/`.
    pub name: String,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// They come first.
    tables: Vec<Table>,
    values: Vec<Value>,
}

impl Launch {
    /// A kernel over `grid` blocks of `threads` threads, without arguments.
    pub(super) fn new(name: impl Into<String>, grid: [usize; 3], threads: u32) -> Self {
        Self {
            name: name.into(),
            grid: grid.map(|blocks| blocks as u32),
            block: [threads, 1, 1],
            shared: 0,
            tables: Vec::new(),
            values: Vec::new(),
        }
    }

    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }

    pub(super) fn table(mut self, table: Table) -> Self {
        self.tables.push(table);
        self
    }

    pub(super) fn ptr<T>(mut self, ptr: Ptr<T>) -> Self {
        self.values.push(Value { address: ptr.address });
        self
    }

    pub(super) fn int(mut self, int: usize) -> Self {
        self.values.push(Value { int: int as i32 });
        self
    }

    pub(super) fn long(mut self, long: usize) -> Self {
        self.values.push(Value { long: long as i64 });
        self
    }

    pub(super) fn float(mut self, float: f32) -> Self {
        self.values.push(Value { float });
        self
    }

    /// The addresses of all arguments, in order: what a driver's launch takes.
    pub fn arguments(&mut self) -> Vec<*mut c_void> {
        let tables = self.tables.iter_mut().map(|table| std::ptr::from_mut(table).cast());
        tables.chain(self.values.iter_mut().map(|value| std::ptr::from_mut(value).cast())).collect()
    }
}

/// What runs kernels, one after the other.
pub trait Launcher {
    /// Puts a kernel behind those launched before.
    ///
    /// # Errors
    /// When there is no such kernel or the device refuses it; nothing of the device can be trusted then.
    fn launch(&self, launch: Launch) -> Result<()>;
}
