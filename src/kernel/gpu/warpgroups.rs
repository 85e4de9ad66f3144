//! Whether a card's warpgroups are worth having: they have to compute what its warps do, in less time.
//!
//! No test without such a card can tell. So a prompt that is made up goes through both kernels when a model is loaded, for each kind of
//! heads and keys that has both, which takes some milliseconds. A card whose answers differ serves as any other does.

use std::time::Instant;

use half::bf16;

use super::attention::{Attention, Item, Keys, Merge, PagedKv, Tile};
use super::card::{Bits, Card};
use super::launch::{Fp8, Ptr};
use super::rows::Heads;
use crate::base::Result;

/// Tokens of a block.
const SHIFT: u32 = 4;
/// Rows of the prompt, and tokens before it.
const PROMPT: (usize, usize) = (1000, 1048);
/// Launches that are timed, of each kernel.
const LAUNCHES: usize = 10;
/// How far apart two numbers may be that are sums of numbers up to 1 with weights in bf16.
const NEAR: f32 = 0.02;
/// They have to be faster by so much: results differ in their last bits, and a machine should choose the same at each start.
const FASTER: f64 = 1.05;

/// Whether they are to read prompts. Says in the log why.
///
/// # Errors
/// The driver's.
pub fn warpgroups_pay(card: &dyn Card) -> Result<bool> {
    if !card.has_warpgroups() {
        return Ok(false);
    }
    let name = card.name();
    Ok(match compared(card, PROMPT)? {
        None => {
            tracing::warn!(card = name, "its warpgroups compute something else than its warps: they do not serve");
            false
        }
        Some(speedup) => {
            let serve = speedup >= FASTER;
            tracing::info!(card = name, speedup, serve, "warpgroups were tried on a prompt");
            serve
        }
    })
}

/// How many times as fast they are over all kinds of heads and keys, reading `rows` rows behind `before` tokens; `None` when their results are
/// others.
fn compared(card: &dyn Card, (rows, before): (usize, usize)) -> Result<Option<f64>> {
    let mut seconds = [0.0; 2];
    for dim in [64, 128] {
        for in_fp8 in [false, true] {
            let heads = Heads { heads: 8, kv_heads: 2, dim };
            let mut taken = Vec::new();
            let trial = Trial::new(card, heads, (rows, before), in_fp8, &mut taken);
            let agree = trial.and_then(|trial| trial.compare(card, &mut seconds));
            taken.into_iter().try_for_each(|address| card.free(address))?;
            if !agree? {
                return Ok(None);
            }
        }
    }
    Ok(Some(seconds[0] / seconds[1]))
}

/// One prompt, on the card.
struct Trial {
    heads: Heads,
    q: Ptr<bf16>,
    q_stride: usize,
    kv: PagedKv,
    tables: Ptr<i32>,
    items: (Ptr<Item>, usize),
    out: Ptr<bf16>,
    len: usize,
}

impl Trial {
    /// What it allocates is in `taken`, also when it fails.
    fn new(
        card: &dyn Card,
        heads: Heads,
        (rows, before): (usize, usize),
        in_fp8: bool,
        taken: &mut Vec<u64>,
    ) -> Result<Self> {
        let blocks = (rows + before).div_ceil(1 << SHIFT);
        let numbers = (blocks * heads.kv_heads * heads.dim) << SHIFT;
        let q_stride = (heads.heads + 2 * heads.kv_heads) * heads.dim;
        let q = brought(card, &made_up(1, rows * q_stride, bf16::from_f32), taken)?;
        let data = match in_fp8 {
            false => Keys::Bf16(
                brought(card, &made_up(2, numbers, bf16::from_f32), taken)?,
                brought(card, &made_up(3, numbers, bf16::from_f32), taken)?,
            ),
            // Sign, exponents of 1/16 to 1/2 and any digits.
            true => {
                let narrow = |x: f32| Fp8(((x.to_bits() >> 24) as u8 & 0x80) | 0x18 | ((x.abs() * 32.0) as u8 & 0x1f));
                Keys::Fp8(
                    brought(card, &made_up(2, numbers, narrow), taken)?,
                    brought(card, &made_up(3, numbers, narrow), taken)?,
                )
            }
        };
        let kv = PagedKv { data, block_shift: SHIFT, k_scale: 1.0, v_scale: 1.0 };
        // Not in order.
        let table: Vec<i32> = (0..blocks).rev().map(|block| block as i32).collect();
        let tables = brought(card, &table, taken)?;
        let mut attention = Attention::default();
        let spans = std::iter::once((0, rows, before, 0));
        attention.plan(spans, heads.heads / heads.kv_heads, heads.kv_heads, 0, 0);
        let items = (brought(card, &attention.wide, taken)?, attention.wide.len());
        let len = rows * heads.heads * heads.dim;
        let out = brought(card, &vec![bf16::ZERO; len], taken)?;
        Ok(Self { heads, q, q_stride, kv, tables, items, out, len })
    }

    /// Whether both kernels agree. Adds the time of each to `seconds`.
    fn compare(&self, card: &dyn Card, seconds: &mut [f64; 2]) -> Result<bool> {
        let mut found = Vec::new();
        for (tile, seconds) in [Tile::Wide, Tile::Group].into_iter().zip(seconds) {
            let mut out = vec![bf16::NAN; self.len];
            card.upload(&out, self.out)?;
            self.run(card, tile)?;
            card.download(self.out, &mut out)?;
            let begun = Instant::now();
            (0..LAUNCHES).try_for_each(|_| self.run(card, tile))?;
            card.finish()?;
            *seconds += begun.elapsed().as_secs_f64();
            found.push(out);
        }
        let mut pairs = found[0].iter().zip(&found[1]);
        Ok(pairs.all(|(wide, group)| (wide.to_f32() - group.to_f32()).abs() <= NEAR))
    }

    fn run(&self, card: &dyn Card, tile: Tile) -> Result<()> {
        let (merges, partial) = ((Ptr::<Merge>::null(), 0, 0), Ptr::null());
        let scale = 1.0 / (self.heads.dim as f32).sqrt();
        let Self { heads, q, q_stride, kv, tables, items, out, .. } = self;
        Attention::run(card, tile, *items, merges, *heads, *q, *q_stride, kv, *tables, scale, 0, *out, partial)
    }
}

/// The same numbers at each start, in -1..1 (splitmix64).
fn made_up<T>(seed: u64, count: usize, of: impl Fn(f32) -> T) -> Vec<T> {
    let number = |at: usize| {
        let z = (seed << 40).wrapping_add(at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|at| of(number(at))).collect()
}

fn brought<T: Bits>(card: &dyn Card, from: &[T], taken: &mut Vec<u64>) -> Result<Ptr<T>> {
    let room = card.alloc(from.len())?;
    taken.push(room.address());
    card.upload(from, room)?;
    Ok(room)
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::super::emulator::EmulatedCard;
    use super::*;

    #[test]
    fn warpgroups_are_seen_to_compute_the_same_and_where_there_are_none_they_are_not_asked() {
        let card = EmulatedCard::hopper(3);
        assert!(compared(&card, (40, 100)).unwrap().is_some_and(|speedup| speedup > 0.0));
        assert!(!warpgroups_pay(&EmulatedCard::new(0)).unwrap());
    }

    #[test]
    fn results_that_differ_are_seen() {
        let (card, mut taken) = (EmulatedCard::hopper(0), Vec::new());
        let heads = Heads { heads: 4, kv_heads: 1, dim: 64 };
        let trial = Trial::new(&card, heads, (32, 30), false, &mut taken).unwrap();
        let agree = || trial.compare(&card, &mut [0.0; 2]).unwrap();
        assert!(agree());
        // A key that is not a number is one in both, and equal to nothing.
        let Keys::Bf16(keys, _) = trial.kv.data else { unreachable!() };
        (&card as &dyn Card).upload(&[bf16::NAN], keys.part(trial.heads.dim * 31, 1)).unwrap();
        assert!(!agree());
    }
}
