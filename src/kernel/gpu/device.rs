//! A GPU through CUDA's driver, which is looked for when neurond runs: the same binary starts where there is none.
//!
//! ```text
//! find()  ── no libcuda, no card ──> Err: what is missing            (the CPU serves)
//!         └─ open(ordinal) ──> context, one stream, every kernel of the embedded binaries by name
//! ```
//!
//! Several are opened together as ranks of a group, which NCCL connects (`nccl.rs`): then whoever waits for a card looks whether another
//! rank has failed.
//!
//! A [`Device`] belongs to one thread at a time, whose current context is the device's. Whatever the driver refuses is an error of
//! this device; since it may come from any earlier launch, nothing that the device holds can be trusted afterwards.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use cudarc::driver::result;
use cudarc::driver::sys;
use half::bf16;
use parking_lot::Mutex;

use super::blas::{Blas, WORKSPACE};
use super::card::{Card, LANDING, Part, Parts, alone, check_parts};
use super::gemm::{Sink, Weight, scaled_afterwards};
use super::launch::{Launch, Launcher, Ptr, Table};
use super::nccl::Link;
use super::pinned::{Pinned, Ring, failed};
use crate::base::{Error, Kind, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Dynamic shared memory that a kernel may have without asking.
const FREE_SHARED: usize = 48 << 10;

/// Bytes of [`Device::unscaled`].
const UNSCALED: usize = 32 << 20;

/// Between looks whether ranks have failed, of one that waits.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// One card and one stream of it.
pub struct Device {
    name: String,
    processors: usize,
    /// Major and minor.
    capability: (i32, i32),
    context: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, sys::CUfunction>>,
    /// All that was allocated.
    memory: Mutex<Vec<u64>>,
    /// What was noted, ready to be launched at once.
    graphs: Mutex<Vec<sys::CUgraphExec>>,
    marks: Mutex<Marks>,
    /// Where the host writes what is sent.
    ring: Mutex<Ring>,
    /// Where small answers land.
    landing: Mutex<Option<Pinned>>,
    /// Recorded behind a copy to there, whose length is beside it.
    departed: Mutex<(sys::CUevent, usize)>,
    blas: Mutex<Option<Blas>>,
    /// Where products in fp8 wait for their scales, where the library does not take them.
    unscaled: Ptr<f32>,
    /// To the other ranks, if it is one.
    link: Option<Link>,
}

// SAFETY: contexts, streams, events, graphs and functions of the driver may be used by any thread that makes the context its own, which every
// method does.
unsafe impl Send for Device {}

/// Events that were recorded, and those that can be again.
#[derive(Default)]
struct Marks {
    made: Vec<(Option<Part>, sys::CUevent)>,
    spare: Vec<sys::CUevent>,
}

/// How many cards there are.
///
/// # Errors
/// `ModelUnavailable` when the driver is not installed or sees none; the message says which.
pub(super) fn find() -> Result<usize> {
    // SAFETY: only asks whether the library can be opened. Without it every other call would panic.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::new(
            Kind::ModelUnavailable,
            "libcuda.so.1 is not here: install NVIDIA's driver, or serve on the CPU.",
        ));
    }
    let count = result::init()
        .and_then(|()| result::device::get_count())
        .map_err(|error| failed("looking for cards", error))?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(Error::new(Kind::ModelUnavailable, "the driver sees no card")),
    }
}

/// Where on the bus card `ordinal` is, as the management library writes it.
pub(super) fn bus(ordinal: u16) -> Option<String> {
    let device = result::device::get(ordinal.into()).ok()?;
    let mut text = [0u8; 32];
    // SAFETY: as much room as is said; the driver ends what it writes with a zero.
    let status = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as i32, device) };
    status.result().ok()?;
    Some(CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?.to_owned())
}

/// Opens CUDA's libraries by path, so that later opens by name find them: for those that no search path has. Returns what was
/// opened. Never closed.
pub(super) fn preload(folders: &[impl AsRef<Path>]) -> Vec<std::path::PathBuf> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let mut opened = Vec::new();
    for name in ["libcublasLt.so.13", "libcublas.so.13", super::nccl::LIBRARY] {
        for path in folders.iter().map(|folder| folder.as_ref().join(name)).filter(|path| path.exists()) {
            // SAFETY: what the operator named; its initialisers run, as they would at the first use.
            match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => {
                    std::mem::forget(library);
                    opened.push(path);
                    break;
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot be opened"),
            }
        }
    }
    opened
}

impl Device {
    /// Opens card `ordinal`, after [`find`] has found more than so many.
    ///
    /// # Errors
    /// `Internal` when the driver refuses anything, or has no code for this chip.
    pub fn open(ordinal: usize) -> Result<Self> {
        let ordinal = ordinal as i32;
        let device = result::device::get(ordinal).map_err(|error| failed("finding the card", error))?;
        let name = result::device::get_name(device).map_err(|error| failed("naming the card", error))?;
        // SAFETY: the device comes from the driver.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|error| failed("opening the card", error))?;
        let ask = |attribute| {
            // SAFETY: as above.
            unsafe { result::device::get_attribute(device, attribute) }
                .map_err(|error| failed("asking what the card is", error))
        };
        let processors = ask(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let major = ask(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = ask(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let mut this = Self {
            name,
            processors,
            capability: (major, minor),
            context,
            device,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            functions: Mutex::default(),
            memory: Mutex::default(),
            graphs: Mutex::default(),
            marks: Mutex::default(),
            ring: Mutex::default(),
            landing: Mutex::default(),
            departed: Mutex::new((std::ptr::null_mut(), 0)),
            blas: Mutex::default(),
            unscaled: Ptr::null(),
            link: None,
        };
        this.enter()?;
        *this.landing.lock() = Some(Pinned::alloc(LANDING)?);
        this.departed.lock().0 = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| failed("making an event", error))?;
        this.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed("making a stream", error))?;
        for (file, binary) in KERNELS {
            // SAFETY: a whole fat binary, which says its length itself.
            let module = unsafe { result::module::load_data(binary.as_ptr().cast()) };
            let module =
                module.map_err(|error| failed(&format!("loading kernels of {file} on {}", this.name), error))?;
            this.modules.push(module);
        }
        let blas = Blas::open(this.alloc_bytes(WORKSPACE)?)?;
        if blas.as_ref().is_some_and(Blas::leaves_scales) {
            // SAFETY: allocated here, and there as long as the device.
            this.unscaled = unsafe { Ptr::new(this.alloc_bytes(UNSCALED)?, UNSCALED / size_of::<f32>()) };
        }
        if blas.is_none() {
            tracing::warn!("libcublasLt.so.13 is not here: prompts are read by slower kernels of our own");
        }
        *this.blas.lock() = blas;
        Ok(this)
    }

    /// Opens cards as the ranks of a group, in this order.
    ///
    /// # Errors
    /// As [`Device::open`], and `ModelUnavailable` when NCCL is not installed or cannot connect them.
    pub fn open_ranks(ordinals: &[u16]) -> Result<Vec<Self>> {
        let open = |&ordinal: &u16| Self::open(ordinal.into()).map_err(|error| error.context(format!("GPU {ordinal}")));
        let mut cards: Vec<Self> = ordinals.iter().map(open).collect::<Result<_>>()?;
        for (card, link) in cards.iter_mut().zip(super::nccl::connect(ordinals)?) {
            card.link = Some(link);
        }
        Ok(cards)
    }

    /// Makes the context this thread's own.
    fn enter(&self) -> Result<()> {
        // SAFETY: retained until `self` is dropped.
        unsafe { result::ctx::set_current(self.context) }.map_err(|error| failed("entering the card's context", error))
    }

    /// A kernel by its name, looked for once.
    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock();
        if let Some(&function) = functions.get(&launch.name) {
            return Ok(function);
        }
        let name = &launch.name;
        let symbol = CString::new(name.as_str()).map_err(|_| Error::internal("a kernel's name holds a zero"))?;
        let found = self.modules.iter().find_map(|&module| {
            // SAFETY: a module of this context.
            unsafe { result::module::get_function(module, symbol.clone()) }.ok()
        });
        let function = found.ok_or_else(|| Error::internal(format!("there is no kernel {name}")))?;
        functions.insert(name.clone(), function);
        Ok(function)
    }
}

impl Launcher for Device {
    fn launch(&self, mut launch: Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(&launch)?;
        if launch.shared > FREE_SHARED {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this context.
            unsafe { result::function::set_function_attribute(function, attribute, launch.shared as i32) }.map_err(
                |error| failed(&format!("{} bytes of shared memory for {}", launch.shared, launch.name), error),
            )?;
        }
        let (grid, block) = (<(u32, u32, u32)>::from(launch.grid), <(u32, u32, u32)>::from(launch.block));
        let shared = launch.shared as u32;
        let mut arguments: Vec<*mut c_void> = launch.arguments();
        // SAFETY: the arguments are those of the kernel, by its launcher; memory behind them is there by the promise of whoever
        // made the pointers.
        unsafe { result::launch_kernel(function, grid, block, shared, self.stream, &mut arguments) }
            .map_err(|error| failed(&format!("launching {}", launch.name), error))
    }
}

impl Card for Device {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn has_warpgroups(&self) -> bool {
        self.capability == (9, 0)
    }

    fn table(&self, numbers: Ptr<bf16>, columns: usize, box_rows: usize) -> Result<Table> {
        self.enter()?;
        let mut table = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, stride) = ([columns as u64, (numbers.len() / columns) as u64], [2 * columns as u64]);
        let (each, steps) = ([64, box_rows as u32], [1, 1]);
        // SAFETY: two dimensions, and as many sizes, steps and strides (of all dimensions but the first) as that takes.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut table,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                numbers.address() as *mut c_void,
                sizes.as_ptr(),
                stride.as_ptr(),
                each.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(|error| failed("describing keys and values", error))?;
        Ok(Table(table.opaque))
    }

    fn free_bytes(&self) -> Result<usize> {
        self.enter()?;
        result::mem_get_info().map(|(free, _)| free).map_err(|error| failed("asking for memory", error))
    }

    fn alloc_bytes(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let bytes = bytes.max(1);
        // SAFETY: freed when the device is dropped; zeroed before anybody has it.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            Error::new(Kind::ModelUnavailable, format!("{} has no {bytes} bytes left: {error}", self.name))
        })?;
        self.memory.lock().push(address);
        // SAFETY: as many as were allocated.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }.map_err(|error| failed("zeroing", error))?;
        Ok(address)
    }

    fn free(&self, address: u64) -> Result<()> {
        self.enter()?;
        let mut memory = self.memory.lock();
        let Some(at) = memory.iter().position(|&other| other == address) else { return Ok(()) };
        memory.swap_remove(at);
        // SAFETY: allocated above and in the list until now; the driver waits for what was launched.
        unsafe { result::free_sync(address) }.map_err(|error| failed("freeing memory", error))
    }

    unsafe fn upload_bytes(&self, from: &[u8], to: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise. From memory that is not pinned, the driver returns when it has its own copy.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(|error| failed("copying in", error))
    }

    unsafe fn send_bytes(&self, len: usize, to: u64, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller's promise; the ring keeps what is sent until it is there.
        let copy = |bytes: &[u8]| {
            unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(|error| failed("copying in", error))
        };
        self.ring.lock().send(len, self.stream, fill, copy)
    }

    unsafe fn download_bytes(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        let mut landing = self.landing.lock();
        if let Some(landed) = landing.as_mut().and_then(|landing| landing.room(to.len())) {
            // SAFETY: by the caller's promise.
            unsafe { result::memcpy_dtoh_async(&mut *landed, from, self.stream) }
                .map_err(|error| failed("copying out", error))?;
            self.finish()?;
            to.copy_from_slice(landed);
            return Ok(());
        }
        // SAFETY: by the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(|error| failed("copying out", error))?;
        self.finish()
    }

    unsafe fn depart_bytes(&self, from: u64, len: usize) -> Result<()> {
        self.enter()?;
        let (mut landing, mut departed) = (self.landing.lock(), self.departed.lock());
        let Some(room) = landing.as_mut().and_then(|landing| landing.room(len)) else {
            return Err(Error::internal(format!("{len} bytes depart, {LANDING} at most")));
        };
        departed.1 = len;
        // SAFETY: by the caller's promise; an event and a stream of this context.
        unsafe {
            result::memcpy_dtoh_async(room, from, self.stream).map_err(|error| failed("copying out", error))?;
            result::event::record(departed.0, self.stream).map_err(|error| failed("recording an event", error))
        }
    }

    fn land_bytes(&self, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        let (mut landing, departed) = (self.landing.lock(), self.departed.lock());
        let Some(room) =
            landing.as_mut().and_then(|landing| landing.room(to.len())).filter(|room| room.len() == departed.1)
        else {
            return Err(Error::internal(format!("{} bytes land, {} have departed", to.len(), departed.1)));
        };
        // SAFETY: an event of this context.
        unsafe { result::event::synchronize(departed.0) }.map_err(|error| failed("waiting for the card", error))?;
        to.copy_from_slice(room);
        Ok(())
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
        self.enter()?;
        // Other threads may load models meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: this device's stream; capturing ends below whatever becomes of the work.
        let (worked, graph) = unsafe {
            result::stream::begin_capture(self.stream, mode).map_err(|error| failed("beginning a graph", error))?;
            (work(), result::stream::end_capture(self.stream))
        };
        worked?;
        let graph = graph.map_err(|error| failed("ending a graph", error))?;
        // SAFETY: a graph that was just made, and is not needed once it is instantiated.
        let instance = unsafe {
            let instance = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            instance.map_err(|error| failed("instantiating a graph", error))?
        };
        let mut graphs = self.graphs.lock();
        graphs.push(instance);
        Ok(graphs.len() - 1)
    }

    fn replay(&self, note: usize) -> Result<()> {
        self.enter()?;
        let graph = self.graphs.lock().get(note).copied();
        let graph = graph.ok_or_else(|| Error::internal(format!("there is no graph {note}")))?;
        // SAFETY: a graph of this stream's context; what it touches is there as long as the device.
        unsafe { result::graph::launch(graph, self.stream) }.map_err(|error| failed("launching a graph", error))
    }

    fn finish(&self) -> Result<()> {
        self.enter()?;
        let waiting = |error| failed("waiting for the card", error);
        let Some(link) = &self.link else {
            // SAFETY: this device's stream.
            return unsafe { result::stream::synchronize(self.stream) }.map_err(waiting);
        };
        // The stream may wait for ranks that will never come.
        let mut looked = Instant::now();
        loop {
            // SAFETY: as above.
            match unsafe { sys::cuStreamQuery(self.stream) } {
                sys::CUresult::CUDA_ERROR_NOT_READY => {}
                status => {
                    status.result().map_err(waiting)?;
                    // What is done may have been given up.
                    return link.check();
                }
            }
            if looked.elapsed() >= LOOK_EVERY {
                link.check()?;
                looked = Instant::now();
            }
            std::hint::spin_loop();
        }
    }

    fn all_reduce(&self, x: Ptr<bf16>) -> Result<()> {
        self.enter()?;
        self.link.as_ref().ok_or_else(alone)?.all_reduce(x, self.stream.cast())
    }

    fn gather(&self, own: Ptr<f32>, into: Ptr<f32>, parts: &[Range<usize>]) -> Result<()> {
        self.enter()?;
        let link = self.link.as_ref().ok_or_else(alone)?;
        check_parts(link.rank(), own, into, parts)?;
        link.gather(own, into, parts, self.stream.cast())
    }

    fn abandon(&self) {
        if let Some(link) = &self.link {
            link.abandon();
        }
    }

    fn mark(&self, part: Option<Part>) -> Result<()> {
        self.enter()?;
        let mut marks = self.marks.lock();
        let event = match marks.spare.pop() {
            Some(event) => event,
            None => result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(|error| failed("making an event", error))?,
        };
        marks.made.push((part, event));
        // SAFETY: an event of this context, and its stream.
        unsafe { result::event::record(event, self.stream) }.map_err(|error| failed("recording an event", error))
    }

    fn marked(&self) -> Result<Parts> {
        self.finish()?;
        let mut marks = self.marks.lock();
        let made = std::mem::take(&mut marks.made);
        let mut parts = Parts::default();
        for pair in made.windows(2) {
            let (Some(part), begun) = pair[0] else { continue };
            // SAFETY: both were recorded, and what was launched before them is done.
            let ms = unsafe { result::event::elapsed(begun, pair[1].1) };
            parts[part as usize] += f64::from(ms.map_err(|error| failed("reading an event", error))?) / 1e3;
        }
        marks.spare.extend(made.into_iter().map(|(_, event)| event));
        Ok(parts)
    }

    fn product(&self, shape: (usize, usize, usize), weight: Weight, out: Sink, out_stride: usize) -> Result<bool> {
        let mut blas = self.blas.lock();
        let Some(blas) = blas.as_mut() else { return Ok(false) };
        self.enter()?;
        let stream = self.stream.cast();
        match weight {
            Weight::Fp8(w, x) if !self.unscaled.is_null() => {
                let mut bare = |shape, w, x, to| blas.bare(shape, w, x, to, stream);
                scaled_afterwards(self, shape, (w, x), (out, out_stride), self.unscaled, &mut bare)
            }
            _ => blas.product(shape, weight, out, out_stride, stream),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Before anything is waited for.
        self.abandon();
        if self.enter().is_err() {
            return;
        }
        *self.blas.lock() = None;
        // SAFETY: nobody has the device any more. Failures cost what the driver then keeps.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            self.ring.lock().free();
            if let Some(landing) = self.landing.lock().take() {
                landing.free();
            }
            let departed = self.departed.lock().0;
            if !departed.is_null() {
                let _ = result::event::destroy(departed);
            }
            let marks = std::mem::take(&mut *self.marks.lock());
            for event in marks.made.into_iter().map(|(_, event)| event).chain(marks.spare) {
                let _ = result::event::destroy(event);
            }
            for &graph in self.graphs.lock().iter() {
                let _ = result::graph::exec_destroy(graph);
            }
            // The last rank's closes the communicators, which waits for the graphs of all.
            self.link = None;
            let _ = result::ctx::set_current(self.context);
            for &address in self.memory.lock().iter() {
                let _ = result::free_sync(address);
            }
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
