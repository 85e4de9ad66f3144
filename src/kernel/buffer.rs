//! Memory of the device: aligned, zeroed, of a fixed size; and a view of it that several threads may write at once.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::kernel::pages::{self, LARGE};

/// From this size on a buffer has pages of its own: untouched ones cost nothing, and freed ones go back at once.
const PAGES: usize = 256 << 10;

/// Numbers for which all zero bits are a value.
///
/// # Safety
/// Zeroed memory must be a valid value, and the type must need no drop.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for i8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for half::bf16 {}

/// A slice of zeros to begin with, aligned to a cache line, on the heap or in pages of its own. Pages are only taken
/// from the system when first written.
pub struct Buffer<T: Plain> {
    data: NonNull<T>,
    len: usize,
    memory: Memory,
}

enum Memory {
    None,
    Heap(Layout),
    /// Kept for its `Drop`.
    Pages {
        _map: MmapMut,
    },
}

// SAFETY: owns its memory like a `Box<[T]>`.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros. Ends the process when there is no memory, like a `Vec`.
    pub fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|| handle_alloc_error(Layout::new::<T>()))
    }

    /// `len` zeros, or `None` when the system has no such range.
    pub fn try_zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self { data: NonNull::dangling(), len, memory: Memory::None });
        }
        let bytes = len.checked_mul(size_of::<T>())?;
        if bytes >= PAGES {
            let mut map = MmapMut::map_anon(bytes).ok()?;
            let data = NonNull::new(map.as_mut_ptr().cast())?;
            return Some(Self { data, len, memory: Memory::Pages { _map: map } });
        }
        let layout = Layout::from_size_align(bytes, 64).ok()?;
        // SAFETY: the size is not 0.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<T>())?;
        Some(Self { data, len, memory: Memory::Heap(layout) })
    }

    /// A view that threads may write through, each its own part.
    pub fn share(&mut self) -> Shared<'_, T> {
        Shared { data: self.data.as_ptr(), len: self.len, of: PhantomData }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Memory::Heap(layout) = self.memory {
            // SAFETY: allocated by `try_zeroed` with this layout.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) };
        }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements, ours.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

/// Hands out memory for what is read from end to end in every step: back to back on large pages, where the system has
/// them. A walk over small pages would cost an address translation every 4 KiB, in a virtual machine a dear one.
#[derive(Default)]
pub struct Arena {
    chunk: Option<Arc<Buffer<u8>>>,
    used: usize,
}

/// A range of an [`Arena`], which lives as long as any of its ranges.
pub struct Slab {
    chunk: Arc<Buffer<u8>>,
    start: usize,
    len: usize,
}

impl Arena {
    const CHUNK: usize = 64 << 20;

    /// An arena that begins with exactly `bytes`, on ordinary pages: for what is small or comes and goes.
    pub fn of(bytes: usize) -> Self {
        Self { chunk: Some(Arc::new(Buffer::zeroed(bytes))), used: 0 }
    }

    /// `len` bytes, aligned to a cache line, as `fill` leaves them; zeros to begin with.
    pub fn fill(&mut self, len: usize, fill: impl FnOnce(Shared<'_, u8>)) -> Slab {
        let fits = self.chunk.as_ref().is_some_and(|chunk| chunk.len - self.used >= len);
        let chunk = match self.chunk.take() {
            Some(chunk) if fits => chunk,
            _ => {
                let chunk = Arc::new(Buffer::<u8>::zeroed(len.max(Self::CHUNK) + LARGE));
                let start = chunk.data.as_ptr() as usize;
                pages::lend(start..start + chunk.len, &chunk);
                self.used = chunk.data.as_ptr().align_offset(LARGE).min(LARGE);
                chunk
            }
        };
        let start = self.used;
        self.used = (start + len).next_multiple_of(64).min(chunk.len);
        assert!(start + len <= chunk.len);
        // SAFETY: inside the chunk, and no slab handed out before or after this one overlaps it. Chunks are only
        // written here, through the pointer they were allocated with.
        let shared = Shared { data: unsafe { chunk.data.as_ptr().add(start) }, len, of: PhantomData };
        fill(shared);
        self.chunk = Some(chunk.clone());
        Slab { chunk, start, len }
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the chunk, initialised, and no longer written. Not a slice of the whole chunk, of which other
        // parts may be being written.
        unsafe { std::slice::from_raw_parts(self.chunk.data.as_ptr().add(self.start), self.len) }
    }
}

/// A mutable slice that several threads hold at once. Who writes which part is the kernels' business.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: a mutable borrow of plain numbers; access is through unsafe functions whose callers keep parts disjoint.
unsafe impl<T: Plain> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Shared<'_, T> {}

impl<'a, T: Plain> Shared<'a, T> {
    /// Of any mutable slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), of: PhantomData }
    }

    /// Of memory that somebody else lends.
    ///
    /// # Safety
    /// There are `len` initialised elements at `data` for as long as the view lives, and its holders alone touch them.
    pub(super) unsafe fn of_raw(data: *mut T, len: usize) -> Self {
        Self { data, len, of: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other thread may read or write them while the result lives.
    ///
    /// # Panics
    /// When the range is not inside.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: inside, by the assertion; alone, by contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
    /// The address of element `index`, which must exist or be the first behind the last.
    ///
    /// # Panics
    /// When it does not.
    pub fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "element {index} of {}", self.len);
        // SAFETY: inside, by the assertion.
        unsafe { self.data.add(index) }
    }
}
