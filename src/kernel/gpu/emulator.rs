//! Runs kernels on the host: `kernels/emulate.cpp`, for tests where there is no GPU.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use parking_lot::Mutex;

use super::card::{Card, LANDING, Part, Parts, alone, check_parts};
use super::gemm::{LARGE_UNIT, Sink, Weight, scaled_afterwards};
use super::launch::{Fp8, Launch, Launcher, Ptr, Table};
use crate::base::{Error, Kind, Result};
use crate::kernel::{Buffer, Collective, Cpu, Isa, Pool};

/// Memory of an emulated card, in bytes; nobody counts it.
pub(super) const MEMORY: usize = 64 << 20;
/// Names a file: see [`broken`].
const FAULT: &str = "NEUROND_EMULATED_FAULT";
/// Names a file: see [`critical_errors`].
const ERRORS: &str = "NEUROND_EMULATED_ERRORS";

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

/// What an emulated card is like.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Chip {
    /// One whose maker's library is not installed.
    #[default]
    Bare,
    /// One whose library takes a scale a matrix, where there are scales.
    Ada,
    /// One that has warpgroups, and whose library takes a scale a row.
    Hopper,
}

/// Numbers that products wait for their scales in: few, so that rows come in several parts.
const UNSCALED: usize = 128 * 320;

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
    member: Option<Member>,
    chip: Chip,
    unscaled: Mutex<Vec<f32>>,
}

/// What was asked for to be repeated.
#[derive(Default)]
struct Notes {
    /// While something is noted.
    open: Option<Vec<Noted>>,
    all: Vec<Vec<Noted>>,
}

enum Noted {
    Launch(Launch),
    Reduce(Ptr<bf16>),
    Gather(Ptr<f32>, Ptr<f32>, Vec<Range<usize>>),
    Product((usize, usize, usize), Weight, Sink, usize),
    /// Without scales.
    Bare((usize, usize, usize), Ptr<Fp8>, Ptr<Fp8>, Ptr<f32>),
}

/// A card's place in a group.
struct Member {
    collective: Mutex<Collective>,
    cpu: Cpu,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.collective.lock().fail();
    }
}

impl EmulatedCard {
    /// One whose threads run in this order.
    pub fn new(seed: u32) -> Self {
        Self { emulator: Emulator { seed }, ..Self::default() }
    }

    /// One of such a kind.
    pub fn of(chip: Chip, seed: u32) -> Self {
        let unscaled = if chip == Chip::Ada { vec![f32::NAN; UNSCALED] } else { Vec::new() };
        Self { chip, unscaled: Mutex::new(unscaled), ..Self::new(seed) }
    }

    /// One that has warpgroups.
    pub fn hopper(seed: u32) -> Self {
        Self::of(Chip::Hopper, seed)
    }

    /// A group of so many, whose sums are taken in f32 in the order of ranks and rounded once.
    pub fn ranks(count: usize) -> Vec<Self> {
        let cpu = Cpu { pool: Arc::new(Pool::new(1)), isa: Isa::detect() };
        let member = |collective| Member { collective: Mutex::new(collective), cpu: cpu.clone() };
        let cards = Collective::of(count).into_iter().enumerate();
        cards.map(|(rank, collective)| Self { member: Some(member(collective)), ..Self::new(rank as u32) }).collect()
    }

    /// Does it now, or notes it.
    fn ask(&self, noted: Noted) -> Result<()> {
        if let Some(open) = &mut self.notes.lock().open {
            open.push(noted);
            return Ok(());
        }
        broken()?;
        self.run(&noted)
    }

    fn run(&self, noted: &Noted) -> Result<()> {
        let member = || self.member.as_ref().ok_or_else(alone);
        match noted {
            Noted::Launch(launch) => self.emulator.launch(launch.clone()),
            Noted::Product(shape, weight, out, out_stride) => {
                match *weight {
                    // SAFETY: lengths were checked when it was asked for; nothing else touches them until the call returns.
                    Weight::Bf16(w, x) => unsafe {
                        multiply(*shape, (w, |w| w.to_f32()), (x, |x| x.to_f32()), |_, _, sum| sum, *out, *out_stride)
                    },
                    Weight::Fp8(w, x) => {
                        // SAFETY: as above.
                        let scale = |scales: Ptr<f32>, at: usize| unsafe { *(scales.address() as *const f32).add(at) };
                        let scaled = |row, channel, sum: f32| sum * scale(w.scales, channel) * scale(x.scales, row);
                        // SAFETY: as above.
                        unsafe {
                            multiply(*shape, (w.data, Fp8::to_f32), (x.data, Fp8::to_f32), scaled, *out, *out_stride)
                        }
                    }
                    Weight::Q4(..) => return Err(Error::internal("no library multiplies in 4 bits")),
                }
                Ok(())
            }
            Noted::Bare(shape, w, x, to) => {
                // SAFETY: as above.
                unsafe {
                    multiply(*shape, (*w, Fp8::to_f32), (*x, Fp8::to_f32), |_, _, sum| sum, Sink::Wide(*to), shape.1)
                };
                Ok(())
            }
            Noted::Reduce(x) => {
                let Member { collective, cpu } = member()?;
                // SAFETY: numbers of this card's memory, which nothing else touches until the call returns.
                let x = unsafe { std::slice::from_raw_parts_mut(x.address() as *mut bf16, x.len()) };
                let own: Vec<f32> = x.iter().map(|number| number.to_f32()).collect();
                let mut sums = vec![0.0; own.len()];
                collective.lock().all_reduce(cpu, &own, &mut sums)?;
                x.iter_mut().zip(sums).for_each(|(x, sum)| *x = bf16::from_f32(sum));
                Ok(())
            }
            Noted::Gather(own, into, parts) => {
                let mut collective = member()?.collective.lock();
                let rank = collective.rank();
                check_parts(rank, *own, *into, parts)?;
                let own = match rank {
                    0 => &[][..],
                    // SAFETY: as above.
                    _ => unsafe { std::slice::from_raw_parts(own.address() as *const f32, own.len()) },
                };
                let into = match rank {
                    // SAFETY: as above.
                    0 => unsafe { std::slice::from_raw_parts_mut(into.address() as *mut f32, into.len()) },
                    _ => &mut [],
                };
                collective.gather(into, |into| {
                    // SAFETY: parts of different ranks do not overlap; rank 0 has checked that they are of what it lent.
                    let part = |part: &Range<usize>| unsafe { into.part(part.start, part.len()) };
                    if rank > 0 {
                        part(&parts[rank]).copy_from_slice(own);
                    }
                })
            }
        }
    }
}

/// `x * w^T` as a library computes it, in f32, each sum passed through `last` with its row and channel.
///
/// # Safety
/// There are as many numbers as the shape says, and nobody else uses them.
unsafe fn multiply<T: Copy>(
    (m, n, k): (usize, usize, usize),
    (w, of_w): (Ptr<T>, impl Fn(T) -> f32),
    (x, of_x): (Ptr<T>, impl Fn(T) -> f32),
    last: impl Fn(usize, usize, f32) -> f32,
    out: Sink,
    out_stride: usize,
) {
    // SAFETY: by the caller's promise.
    let numbers = |from: Ptr<T>, len| unsafe { std::slice::from_raw_parts(from.address() as *const T, len) };
    let w: Vec<f32> = numbers(w, n * k).iter().map(|&w| of_w(w)).collect();
    let x: Vec<f32> = numbers(x, m * k).iter().map(|&x| of_x(x)).collect();
    for row in 0..m {
        for channel in 0..n {
            let pairs = x[row * k..][..k].iter().zip(&w[channel * k..][..k]);
            let sum = last(row, channel, pairs.map(|(x, w)| x * w).sum());
            let at = row * out_stride + channel;
            // SAFETY: by the caller's promise.
            unsafe {
                match out {
                    Sink::Set(out) => *(out.address() as *mut bf16).add(at) = bf16::from_f32(sum),
                    Sink::Add(out) => {
                        let out = (out.address() as *mut bf16).add(at);
                        *out = bf16::from_f32((*out).to_f32() + sum);
                    }
                    Sink::Wide(out) => *(out.address() as *mut f32).add(at) = sum,
                }
            }
        }
    }
}

impl Launcher for EmulatedCard {
    fn launch(&self, launch: Launch) -> Result<()> {
        self.ask(Noted::Launch(launch))
    }
}

/// Fails once when the file that [`FAULT`] names is there: as a driver does after a kernel that went wrong.
fn broken() -> Result<()> {
    match std::env::var_os(FAULT).is_some_and(|path| std::fs::remove_file(path).is_ok()) {
        true => Err(Error::internal("an emulated card has broken down, as it was told to")),
        false => Ok(()),
    }
}

/// How many critical errors a card has had: what the file says that [`ERRORS`] names.
pub(super) fn critical_errors() -> u64 {
    let said = std::env::var_os(ERRORS).and_then(|path| std::fs::read_to_string(path).ok());
    said.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

impl Card for EmulatedCard {
    fn name(&self) -> String {
        "emulated".to_owned()
    }

    fn has_warpgroups(&self) -> bool {
        self.chip == Chip::Hopper
    }

    fn processors(&self) -> usize {
        4
    }

    fn table(&self, numbers: Ptr<bf16>, columns: usize, box_rows: usize) -> Result<Table> {
        // As `Table` of `emulate.h` has them.
        let mut words = [0; 16];
        let rows = numbers.len() / columns;
        words[..5].copy_from_slice(&[numbers.address(), rows as u64, columns as u64, box_rows as u64, 0x74_6162_6c65]);
        Ok(Table(words))
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
        noted.iter().try_for_each(|noted| self.run(noted))
    }

    fn finish(&self) -> Result<()> {
        // Whatever was launched was over when the launch returned.
        Ok(())
    }

    fn product(&self, shape: (usize, usize, usize), weight: Weight, out: Sink, out_stride: usize) -> Result<bool> {
        let (m, n, k) = shape;
        if self.chip == Chip::Bare || matches!(weight, Weight::Q4(..)) {
            return Ok(false);
        }
        if !m.is_multiple_of(LARGE_UNIT) {
            return Err(Error::internal(format!("a product of {m} rows, which come in multiples of {LARGE_UNIT}")));
        }
        out.needs((m - 1) * out_stride + n, 16)?;
        match weight {
            Weight::Bf16(w, x) => w.needs("w", n * k, 16).and_then(|()| x.needs("x", m * k, 16))?,
            Weight::Fp8(w, x) => {
                w.data.needs("w", n * k, 16).and_then(|()| w.scales.needs("scales of w", n, 4))?;
                x.data.needs("x", m * k, 16).and_then(|()| x.scales.needs("scales of x", m, 4))?;
            }
            Weight::Q4(..) => {}
        }
        match weight {
            Weight::Fp8(w, x) if self.chip == Chip::Ada => {
                // SAFETY: there as long as the card.
                let room = unsafe { Emulator::memory(&mut self.unscaled.lock()) };
                // It has nothing for so few rows.
                let mut bare = |shape: (usize, usize, usize), w, x, to| match shape.0 {
                    LARGE_UNIT => Ok(false),
                    _ => self.ask(Noted::Bare(shape, w, x, to)).map(|()| true),
                };
                scaled_afterwards(self, shape, (w, x), (out, out_stride), room, &mut bare)
            }
            _ => self.ask(Noted::Product(shape, weight, out, out_stride)).map(|()| true),
        }
    }

    fn all_reduce(&self, x: Ptr<bf16>) -> Result<()> {
        self.ask(Noted::Reduce(x))
    }

    fn gather(&self, own: Ptr<f32>, into: Ptr<f32>, parts: &[Range<usize>]) -> Result<()> {
        self.ask(Noted::Gather(own, into, parts.to_vec()))
    }

    fn abandon(&self) {
        if let Some(member) = &self.member {
            member.collective.lock().fail();
        }
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
    use super::super::gemm::Scaled;
    use super::*;
    use crate::kernel::testing::Dice;

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
    /// Says which mistake the process is to end by.
    const MISTAKE: &str = "NEUROND_TEST_MISTAKE";

    /// The mistake that this process, which is a test's, is to make.
    fn mistake() -> Option<usize> {
        std::env::var(MISTAKE).ok()?.parse().ok()
    }

    /// Whether the test that calls ends with these words in a process of its own that makes this mistake.
    fn ends(mistake: usize, words: &str) {
        let name = std::thread::current().name().unwrap().to_owned();
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let said = again.args(["--exact", &name, "--nocapture"]).env(MISTAKE, mistake.to_string()).output().unwrap();
        let text = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && text.contains(words), "{mistake}: {text}");
    }

    /// What only a card with warpgroups would tell, the emulator tells without one.
    #[test]
    fn a_warpgroups_product_that_is_asked_for_wrongly_ends_the_process() {
        let product = |fault: usize| {
            let mut numbers: Vec<bf16> = (0..64 * 64).map(|at| bf16::from_f32((at / 64) as f32)).collect();
            let mut out = [f32::NAN; 128];
            // SAFETY: both live until the launch has returned.
            let (x, to) = unsafe { (Emulator::memory(&mut numbers), Emulator::memory(&mut out)) };
            let launch = Launch::new("product_of_ones", [1, 1, 1], 128).shared(64 * 64 * 2 + 1024);
            Emulator { seed: 3 }.launch(launch.ptr(x).ptr(to).int(fault)).unwrap();
            out
        };
        if let Some(fault) = mistake() {
            product(fault);
            return;
        }
        // A thread's first column is twice its number in its four.
        let sums = product(0);
        assert!(sums.iter().enumerate().all(|(thread, &sum)| sum == (16 * (thread % 4 * 2)) as f32), "{sums:?}");
        let mistakes = ["not published", "not ready", "overwritten", "not waited for"];
        (1..).zip(mistakes).for_each(|(fault, words)| ends(fault, words));
    }

    /// So it is with boxes that a card brings by itself.
    #[test]
    fn a_box_that_is_asked_for_wrongly_shows() {
        let sum = |fault: usize| {
            let mut numbers: Vec<bf16> = (0..12 * 128).map(|at| bf16::from_f32((at / 128) as f32)).collect();
            let mut out = [0.0];
            // SAFETY: both live until the launch has returned.
            let (x, to) = unsafe { (Emulator::memory(&mut numbers), Emulator::memory(&mut out)) };
            let table = EmulatedCard::hopper(0).table(x, 128, 8).unwrap();
            let launch = Launch::new("sum_of_box", [1, 1, 1], 32).shared(16 * 64 * 2 + 8 + 1024);
            Emulator { seed: 3 }.launch(launch.table(table).ptr(to).int(fault)).unwrap();
            out[0]
        };
        if let Some(fault) = mistake() {
            sum(fault);
            return;
        }
        assert_eq!(sum(0), (3..11).sum::<usize>() as f32 * 64.0);
        assert!(sum(1).is_nan(), "what is on its way can be read");
        let mistakes = ["not waited for", "more bytes", "not reached", "misaligned", "before they begin"];
        (2..).zip(mistakes).for_each(|(fault, words)| ends(fault, words));
    }

    /// In parts, with scales that come afterwards, and where the library has nothing for a part.
    #[test]
    fn a_product_is_the_same_whatever_the_library_does_about_scales() {
        let (m, n, k, stride) = (192, 320, 128, 328);
        let mut dice = Dice::new(5);
        let mut fp8 = |count: usize| -> Vec<Fp8> { (0..count).map(|_| Fp8(dice.bits() as u8 & 0xb7)).collect() };
        let (w, x) = (fp8(n * k), fp8(m * k));
        let scales = |count: usize| -> Vec<f32> { (0..count).map(|at| 0.01 + at as f32 / 1000.0).collect() };
        let product = |chip, add| {
            let card = &EmulatedCard::of(chip, 1) as &dyn Card;
            let put = |from: &[f32]| {
                let to = card.alloc(from.len()).unwrap();
                card.upload(from, to).unwrap();
                to
            };
            let (w_data, x_data) = (card.alloc(w.len()).unwrap(), card.alloc(x.len()).unwrap());
            card.upload(&w, w_data).unwrap();
            card.upload(&x, x_data).unwrap();
            let out = card.alloc(m * stride).unwrap();
            let mut found = vec![bf16::ONE; m * stride];
            card.upload(&found, out).unwrap();
            let weight = Weight::Fp8(
                Scaled { data: w_data, scales: put(&scales(n)) },
                Scaled { data: x_data, scales: put(&scales(m)) },
            );
            let sink = if add { Sink::Add(out) } else { Sink::Set(out) };
            assert!(card.product((m, n, k), weight, sink, stride).unwrap());
            card.download(out, &mut found).unwrap();
            found
        };
        for add in [false, true] {
            let (expected, found) = (product(Chip::Hopper, add), product(Chip::Ada, add));
            assert!(expected[..n].iter().any(|&x| x != bf16::ONE) && expected[n] == bf16::ONE);
            for (at, (expected, found)) in expected.iter().zip(&found).enumerate() {
                let (expected, found) = (expected.to_f32(), found.to_f32());
                assert!((expected - found).abs() <= expected.abs() / 100.0 + 0.01, "{at}: {found}, not {expected}");
            }
        }
        let card = EmulatedCard::new(0);
        let none = Weight::Bf16(Ptr::null(), Ptr::null());
        assert!(!card.product((64, 8, 8), none, Sink::Set(Ptr::null()), 8).unwrap());
    }

    /// Runs `work(rank, its card)` on a thread a rank, on emulated cards and on a machine's own if it has so many.
    fn on_ranks<T: Send>(ranks: usize, work: impl Fn(usize, &dyn Card) -> T + Sync) -> Vec<T> {
        let together = |cards: Vec<Box<dyn Card>>| -> Vec<T> {
            let work = &work;
            let done: Vec<(T, Box<dyn Card>)> = std::thread::scope(|scope| {
                let begin = |(rank, card): (usize, Box<dyn Card>)| scope.spawn(move || (work(rank, &*card), card));
                let threads: Vec<_> = cards.into_iter().enumerate().map(begin).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            // A card that leaves ends the group: not before all are done.
            done.into_iter().map(|(outcome, _)| outcome).collect()
        };
        #[cfg(feature = "cuda")]
        if super::super::count(&[""]).is_ok_and(|count| count >= ranks) {
            together(super::super::open_ranks(&(0..ranks as u16).collect::<Vec<_>>()).unwrap());
        }
        let cards = EmulatedCard::ranks(ranks).into_iter().map(|card| Box::new(card) as Box<dyn Card>);
        together(cards.collect())
    }

    /// Number `at` of rank `rank`: no other has it, and sums of a few fit into bf16.
    fn number(rank: usize, at: usize) -> f32 {
        ((at * 7 + rank * 3) % 32) as f32 - 8.0
    }

    #[test]
    fn ranks_sum_and_gather_at_once_and_when_repeated() {
        for ranks in 2..=4 {
            let len = 1000;
            // Different lengths, as words of a vocabulary are; rank 0's own are in their place already.
            let parts: Vec<Range<usize>> =
                (0..ranks).map(|rank| [0..0, 0..100, 104..150, 152..160][rank].clone()).collect();
            on_ranks(ranks, |rank, card| {
                let x = card.alloc::<bf16>(len).unwrap();
                let (own, into) = (card.alloc::<f32>(parts[rank].len()).unwrap(), card.alloc::<f32>(160).unwrap());
                let numbers: Vec<bf16> = (0..len).map(|at| bf16::from_f32(number(rank, at))).collect();
                let logits: Vec<f32> = (0..parts[rank].len()).map(|at| number(rank, at)).collect();
                card.upload(&logits, own).unwrap();
                let mut work = || card.all_reduce(x).and_then(|()| card.gather(own, into, &parts));
                let check = || {
                    card.finish().unwrap();
                    let (mut sums, mut gathered) = (vec![bf16::NAN; len], vec![f32::NAN; 160]);
                    card.download(x, &mut sums).unwrap();
                    card.download(into, &mut gathered).unwrap();
                    for (at, sum) in sums.iter().enumerate() {
                        assert_eq!(sum.to_f32(), (0..ranks).map(|rank| number(rank, at)).sum::<f32>());
                    }
                    for (at, &found) in gathered.iter().enumerate() {
                        let of = (0..ranks).find(|&of| rank == 0 && parts[of].contains(&at));
                        assert_eq!(found, of.map_or(0.0, |of| number(of, at - parts[of].start)));
                    }
                    card.upload(&[0.0f32; 160], into).unwrap();
                };
                card.upload(&numbers, x).unwrap();
                work().unwrap();
                check();
                let note = card.record(&mut work).unwrap();
                for _ in 0..3 {
                    card.upload(&numbers, x).unwrap();
                    card.replay(note).unwrap();
                    check();
                }
            });
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_is_gone() {
        for leaver in 0..3 {
            for drops in [false, true] {
                let (errors, well) = (std::sync::Mutex::new(Vec::new()), std::sync::Barrier::new(3));
                let cards = EmulatedCard::ranks(3).into_iter().enumerate();
                std::thread::scope(|scope| {
                    for (rank, card) in cards {
                        let (errors, well) = (&errors, &well);
                        scope.spawn(move || {
                            let cards: &dyn Card = &card;
                            let x = cards.alloc::<bf16>(100).unwrap();
                            card.all_reduce(x).unwrap();
                            well.wait();
                            match (rank == leaver, drops) {
                                (true, true) => drop(card),
                                (true, false) => {
                                    card.abandon();
                                    assert!(card.all_reduce(x).is_err());
                                }
                                (false, _) => errors.lock().unwrap().push(card.all_reduce(x).unwrap_err()),
                            }
                        });
                    }
                });
                let errors = errors.into_inner().unwrap();
                assert!(errors.len() == 2 && errors.iter().all(|error| error.message().contains("another rank")));
            }
        }
        let alone: Box<dyn Card> = Box::new(EmulatedCard::new(0));
        let x = alone.alloc::<bf16>(8).unwrap();
        assert!(alone.all_reduce(x).unwrap_err().message().contains("no rank of a group"));
    }
}
