//! AMX: sixteen rows times sixteen channels in an instruction.
//!
//!     tmm0..tmm3   sums       16 rows x 16 channels, i32
//!     tmm4, tmm5   inputs     16 rows x 32, i8
//!     tmm6, tmm7   weights    8 x 16 channels x 4, i8: as they lie in a panel
//!
//! Tiles only go to and from memory, and a vector instruction behind one of AMX waits for some forty cycles: so many
//! products are made in one go, and what follows them comes later. A thread that has used tiles keeps its configuration.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::sync::OnceLock;

use super::{DEPTH, TILE, Tiles};

/// What the rows and lines of the eight tiles are, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = {
    let mut shapes = Shapes { palette: 1, start: 0, reserved: [0; 14], line_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        shapes.line_bytes[tile] = if tile == 4 || tile == 5 { DEPTH as u16 } else { 64 };
        shapes.rows[tile] = if tile < 6 { TILE as u8 } else { DEPTH as u8 / 4 };
        tile += 1;
    }
    shapes
};

thread_local! {
    /// Whether this thread's tiles have their shapes.
    static CONFIGURED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the processor has it and the kernel lets this process use it, which has to be asked for.
pub(super) fn is_ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        // Linux, arch/x86/include/uapi/asm/prctl.h: may this process have the state of tiles' data?
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
        __cpuid_count(0, 0).eax >= 7
            && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
            // SAFETY: no memory is passed.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    })
}

pub(in crate::kernel) struct Amx;

impl Tiles for Amx {
    #[inline(always)]
    unsafe fn products(x: *const i8, width: usize, w: *const i8, count: usize, sums: *mut i32) {
        let (mut x, mut w, mut sums) = (x, w, sums);
        // SAFETY: by contract, `count` products' inputs, weights and sums. The instructions exist, as `is_ready` found.
        unsafe {
            if !CONFIGURED.get() {
                asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, preserves_flags, readonly));
                CONFIGURED.set(true);
            }
            if count >= 4 {
                // Sums are stored two products later than they are made. The first turn has none to store, and writes
                // where this turn's own will come.
                asm!(
                    "2:",
                    "tilezero tmm0",
                    "tileloadd tmm4, [{x} + {width}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tilestored [{late} + {line}*1 + 2048], tmm2",
                    "add {x}, 32",
                    "add {w}, 512",
                    "tilezero tmm1",
                    "tileloadd tmm5, [{x} + {width}*1]",
                    "tileloadd tmm7, [{w} + {line}*1]",
                    "tdpbssd tmm1, tmm5, tmm7",
                    "tilestored [{late} + {line}*1 + 3072], tmm3",
                    "add {x}, 32",
                    "add {w}, 512",
                    "tilezero tmm2",
                    "tileloadd tmm4, [{x} + {width}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tdpbssd tmm2, tmm4, tmm6",
                    "tilestored [{sums} + {line}*1], tmm0",
                    "add {x}, 32",
                    "add {w}, 512",
                    "tilezero tmm3",
                    "tileloadd tmm5, [{x} + {width}*1]",
                    "tileloadd tmm7, [{w} + {line}*1]",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "tilestored [{sums} + {line}*1 + 1024], tmm1",
                    "add {x}, 32",
                    "add {w}, 512",
                    "mov {late}, {sums}",
                    "add {sums}, 4096",
                    "dec {turns}",
                    "jnz 2b",
                    "tilestored [{late} + {line}*1 + 2048], tmm2",
                    "tilestored [{late} + {line}*1 + 3072], tmm3",
                    x = inout(reg) x,
                    w = inout(reg) w,
                    sums = inout(reg) sums,
                    late = inout(reg) sums => _,
                    turns = inout(reg) count / 4 => _,
                    width = in(reg) width,
                    line = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
            for _ in 0..count % 4 {
                asm!(
                    "tilezero tmm0",
                    "tileloadd tmm4, [{x} + {width}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tilestored [{sums} + {line}*1], tmm0",
                    x = in(reg) x,
                    w = in(reg) w,
                    sums = in(reg) sums,
                    width = in(reg) width,
                    line = in(reg) 64usize,
                    out("tmm0") _, out("tmm4") _, out("tmm6") _,
                    options(nostack, preserves_flags),
                );
                x = x.add(DEPTH);
                w = w.add(DEPTH * TILE);
                sums = sums.add(TILE * TILE);
            }
        }
    }
}
