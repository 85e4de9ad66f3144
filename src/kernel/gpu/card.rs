//! What a decoder needs of a device beside launches: memory that lasts as long as the device, and ways in and out of it.

use std::ops::Range;

use half::{bf16, f16};

use super::attention::{Boxes, Item, Keys, Merge};
use super::encoder::{Pooled, TextItem, Token};
use super::gemm::{Sink, Weight};
use super::launch::{Fp8, Launcher, Ptr, Table};
use super::lora::Adapted;
use super::sample::{Drawn, Edit, Wish};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::base::Error;
use crate::base::Result;

/// Bytes that can be on their way out while others are launched.
pub const LANDING: usize = 64 << 10;

/// What the time of a step goes into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Products with weights.
    Product,
    /// Attention over pages.
    Attention,
    /// Norms, turning, gates, gathering.
    Other,
}

/// Seconds of each [`Part`], in their order.
pub type Parts = [f64; 3];

/// A device of one engine. Everything it is asked for happens in order.
pub trait Card: Launcher + Send {
    /// What it calls itself.
    fn name(&self) -> String;

    /// Its multiprocessors: how many blocks of threads it works on at once, at least.
    fn processors(&self) -> usize;

    /// Whether its tensor cores multiply for four warps at once, out of shared memory: Hopper's.
    fn has_warpgroups(&self) -> bool;

    /// `numbers` as a table of rows of `columns` numbers, out of which boxes of `box_rows` rows are copied. Only a card with warpgroups is
    /// asked for it, after the memory was allocated and until it is freed.
    ///
    /// # Errors
    /// The driver's.
    fn table(&self, numbers: Ptr<bf16>, columns: usize, box_rows: usize) -> Result<Table>;

    /// Bytes that are free now.
    ///
    /// # Errors
    /// The driver's.
    fn free_bytes(&self) -> Result<usize>;

    /// `bytes` zero bytes at a multiple of 64, which are there until they are freed or the card is dropped.
    ///
    /// # Errors
    /// `ModelUnavailable` when there are not so many.
    fn alloc_bytes(&self, bytes: usize) -> Result<u64>;

    /// Frees what was allocated at this address; does nothing if nothing was. Whatever was launched before may still use it.
    ///
    /// # Errors
    /// The driver's.
    fn free(&self, address: u64) -> Result<()>;

    /// Copies in. `from` may change afterwards.
    ///
    /// # Safety
    /// There are as many bytes at `to`, of this card.
    ///
    /// # Errors
    /// The driver's.
    unsafe fn upload_bytes(&self, from: &[u8], to: u64) -> Result<()>;

    /// Copies in `len` bytes that `fill` writes, into memory that the card reads by itself. Returns when they are written: they
    /// travel while the next ones are.
    ///
    /// # Safety
    /// There are as many bytes at `to`, of this card.
    ///
    /// # Errors
    /// The driver's.
    unsafe fn send_bytes(&self, len: usize, to: u64, fill: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    /// Copies out, after all that was launched, and waits for it.
    ///
    /// # Safety
    /// There are as many bytes at `from`, of this card.
    ///
    /// # Errors
    /// The driver's, and those of whatever was launched before.
    unsafe fn download_bytes(&self, from: u64, to: &mut [u8]) -> Result<()>;

    /// Begins to copy out up to [`LANDING`] bytes, after all that was launched; [`Card::land_bytes`] must follow, and no other copy out
    /// before it.
    ///
    /// # Safety
    /// There are as many bytes at `from`, of this card.
    ///
    /// # Errors
    /// `Internal` when they are more, and the driver's.
    unsafe fn depart_bytes(&self, from: u64, len: usize) -> Result<()>;

    /// Waits for what has departed, not for what was launched since.
    ///
    /// # Errors
    /// As [`Card::download_bytes`], and `Internal` when another number has departed.
    fn land_bytes(&self, to: &mut [u8]) -> Result<()>;

    /// Notes what `work` launches without running it, to be [replayed](Card::replay). What it launches has been launched once before,
    /// and it copies nothing. Returns the number of the note.
    ///
    /// # Errors
    /// Those of `work`, and the driver's.
    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<usize>;

    /// Launches all of a note, in much less time than each by itself.
    ///
    /// # Errors
    /// `Internal` when there is no such note, and the driver's.
    fn replay(&self, note: usize) -> Result<()>;

    /// What is launched from here on belongs to this part, until the next mark; `None`: to none. Not while something is noted.
    ///
    /// # Errors
    /// The driver's.
    fn mark(&self, part: Option<Part>) -> Result<()>;

    /// Time of the parts that were marked since the last call, when all that was launched is done.
    ///
    /// # Errors
    /// The driver's.
    fn marked(&self) -> Result<Parts>;

    /// Waits until all that was launched is done; of a rank, unless another one fails meanwhile.
    ///
    /// # Errors
    /// The driver's, those of whatever was launched before, and `Internal` when another rank failed.
    fn finish(&self) -> Result<()>;

    /// `x = x of rank 0 + x of rank 1 + ...` on every rank of the group, in place: all have the same bits then. Behind what was launched
    /// before, as launches are, and noted as they are. All ranks ask for the same, in the same order.
    ///
    /// # Errors
    /// `Internal` when the card is no rank of a group, or another rank has failed; and the library's.
    fn all_reduce(&self, x: Ptr<bf16>) -> Result<()>;

    /// Brings `own` of every rank but the first into rank 0's `into`: that of rank `r` to `parts[r]` of it. As [`Card::all_reduce`]
    /// otherwise.
    ///
    /// # Errors
    /// As [`Card::all_reduce`], and `Internal` for parts that do not fit.
    fn gather(&self, own: Ptr<f32>, into: Ptr<f32>, parts: &[Range<usize>]) -> Result<()>;

    /// This rank cannot go on: no other waits for it any more, and whatever they do together fails from now on. So it is when a card
    /// is dropped.
    fn abandon(&self);

    /// `x * w^T` into `out` of `m` rows, a multiple of [`LARGE_UNIT`](super::LARGE_UNIT), by a library of the card's maker: rows of `out_stride` numbers,
    /// their first `n` columns. False: there is none, or it does not do that.
    ///
    /// # Errors
    /// `Internal` when memory is too short, and the library's.
    fn product(
        &self,
        (_m, _n, _k): (usize, usize, usize),
        _weight: Weight,
        _out: Sink,
        _out_stride: usize,
    ) -> Result<bool> {
        Ok(false)
    }
}

/// What a card says that is asked for what ranks do together, and is none.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(super) fn alone() -> Error {
    Error::internal("a card that is no rank of a group was asked for a sum over ranks")
}

/// Whether `parts` are of `into` on rank 0, and `own` is as long as its part on another.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(super) fn check_parts(rank: usize, own: Ptr<f32>, into: Ptr<f32>, parts: &[Range<usize>]) -> Result<()> {
    let fits = match rank {
        0 => parts.iter().all(|part| part.start <= part.end && part.end <= into.len()),
        _ => parts.get(rank).is_some_and(|part| part.len() == own.len()),
    };
    if fits { Ok(()) } else { Err(Error::internal(format!("rank {rank} gathers {parts:?} of other lengths"))) }
}

impl dyn Card + '_ {
    /// What [`Tile::Bulk`](super::Tile::Bulk) takes of keys and values of `dim` numbers in blocks of `1 << block_shift` tokens; `None` where
    /// there is no such kernel.
    ///
    /// # Errors
    /// The driver's.
    pub fn boxes(&self, data: Keys, dim: usize, block_shift: u32) -> Result<Option<Boxes>> {
        let Keys::Bf16(keys, values) = data else { return Ok(None) };
        if !self.has_warpgroups() || ![64, 128].contains(&dim) || block_shift < 3 {
            return Ok(None);
        }
        let table = |of| self.table(of, dim, 1 << block_shift.min(6));
        Ok(Some(Boxes { keys: table(keys)?, values: table(values)? }))
    }

    /// Room for `len` numbers, all bits zero.
    ///
    /// # Errors
    /// As [`Card::alloc_bytes`].
    pub fn alloc<T: Bits>(&self, len: usize) -> Result<Ptr<T>> {
        let address = self.alloc_bytes(len * size_of::<T>())?;
        // SAFETY: as many numbers as were asked for, as long as the card is there; whoever launches has the card.
        Ok(unsafe { Ptr::new(address, len) })
    }

    /// Copies numbers to where `to` begins.
    ///
    /// # Errors
    /// `Internal` when they are more than there is room for, and the driver's.
    pub fn upload<T: Bits>(&self, from: &[T], to: Ptr<T>) -> Result<()> {
        to.needs("upload", from.len(), 1)?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: nothing but bits, without gaps; the target is as long.
        unsafe {
            let bytes = std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from));
            self.upload_bytes(bytes, to.address())
        }
    }

    /// Begins to copy `len` numbers out, as [`Card::depart_bytes`] does.
    ///
    /// # Errors
    /// As there, and `Internal` when there are fewer.
    pub fn depart<T: Bits>(&self, from: Ptr<T>, len: usize) -> Result<()> {
        from.needs("depart", len, 1)?;
        // SAFETY: the source is as long.
        unsafe { self.depart_bytes(from.address(), len * size_of::<T>()) }
    }

    /// Waits for numbers that have departed.
    ///
    /// # Errors
    /// As [`Card::land_bytes`].
    pub fn land<T: Bits>(&self, to: &mut [T]) -> Result<()> {
        // SAFETY: any bits are a value.
        self.land_bytes(unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr().cast::<u8>(), size_of_val(to)) })
    }

    /// Copies `len` numbers that `fill` writes to where `to` begins, as [`Card::send_bytes`] does. They are whatever they were
    /// before.
    ///
    /// # Errors
    /// `Internal` when they are more than there is room for, and the driver's.
    pub fn send<T: Bits>(&self, len: usize, to: Ptr<T>, mut fill: impl FnMut(&mut [T])) -> Result<()> {
        to.needs("send", len, 1)?;
        let mut write = |bytes: &mut [u8]| {
            // SAFETY: any bits are a value, and whoever hands out the room has it at a multiple of 64.
            let (before, numbers, _) = unsafe { bytes.align_to_mut::<T>() };
            debug_assert!(before.is_empty() && numbers.len() == len);
            fill(numbers);
        };
        // SAFETY: the target is as long.
        unsafe { self.send_bytes(len * size_of::<T>(), to.address(), &mut write) }
    }

    /// Copies numbers from where `from` begins.
    ///
    /// # Errors
    /// `Internal` when there are fewer, and those of [`Card::download_bytes`].
    pub fn download<T: Bits>(&self, from: Ptr<T>, to: &mut [T]) -> Result<()> {
        from.needs("download", to.len(), 1)?;
        // SAFETY: any bits are a value; the source is as long.
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(to.as_mut_ptr().cast::<u8>(), size_of_val(to));
            self.download_bytes(from.address(), bytes)
        }
    }
}

/// Numbers that are nothing but their bits.
///
/// # Safety
/// Any bits are a value, and there are no gaps between them.
pub unsafe trait Bits: Copy {}

macro_rules! bits {
    ($($number:ty),*) => {
        $(
            // SAFETY: numbers, or a few of the same size in the order of C.
            unsafe impl Bits for $number {}
        )*
    };
}
bits!(u8, i32, u32, u64, f32, bf16, f16, Fp8, Item, Merge, Adapted, Wish, Edit, Drawn, Token, TextItem, Pooled);
