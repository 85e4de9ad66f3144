//! Which kernel attends to prompts: on a card that has several, the one that does it in the least time.
//!
//! No test without such a card can tell, and it depends on the card, on the heads and on how keys are kept. So each is given a prompt that
//! is made up when a model is loaded, which takes some milliseconds. Those that compute something else than the portable one do not serve.

use std::time::{Duration, Instant};

use half::bf16;

use super::attention::{Attention, Heads, Item, Keys, Merge, PagedKv, Tile, WIDE};
use super::card::{Bits, Card};
use super::launch::{Fp8, Ptr};
use crate::base::Result;

/// The portable one first.
const TILES: [Tile; 3] = [Tile::Wide, Tile::Group, Tile::Bulk];
/// Blocks of threads that a multiprocessor has at once: the prompt is so long that all are busy.
const EACH: usize = 3;
/// Launches of a kernel are timed until there were so many, or this time is over; the shortest counts.
const LAUNCHES: usize = 10;
/// See [`LAUNCHES`].
const PATIENCE: Duration = Duration::from_millis(20);
/// How far apart two numbers may be that are sums of numbers up to 1 with weights in bf16.
const NEAR: f32 = 0.02;
/// Another than the portable one has to be faster by so much: results differ in their last bits, and a machine should choose the same at
/// each start.
const FASTER: f64 = 1.05;

/// The kernel for wide items of such heads over blocks of `1 << block_shift` tokens. Says in the log why.
///
/// # Errors
/// The driver's.
pub fn fastest(card: &dyn Card, heads: Heads, in_fp8: bool, block_shift: u32) -> Result<Tile> {
    if !card.has_warpgroups() || ![64, 128].contains(&heads.dim) {
        return Ok(Tile::Wide);
    }
    // Nothing here ends a kernel that does not end by itself.
    tracing::info!(
        card = card.name(),
        "trying attention kernels; if this is the last line, set gpu.prompt_kernel to \"warps\""
    );
    let mut taken = Vec::new();
    let times = Trial::new(card, heads, in_fp8, block_shift, &mut taken).and_then(|trial| trial.times(card));
    taken.into_iter().try_for_each(|address| card.free(address))?;
    let times = times?;
    let tile = chosen(&times);
    let times: Vec<String> = TILES
        .iter()
        .zip(&times)
        .filter_map(|(tile, time)| Some(format!("{tile:?} {:.3}", time.as_ref()? * 1e3)))
        .collect();
    tracing::info!(card = card.name(), ?tile, ms = times.join(", "), "attention kernels were tried on a prompt");
    Ok(tile)
}

/// The one with the shortest time, if it pays; `None`: it does not serve.
fn chosen(times: &[Option<f64>; 3]) -> Tile {
    let portable = times[0].unwrap_or(f64::INFINITY);
    let others = TILES.into_iter().zip(times).filter_map(|(tile, time)| Some((tile, (*time)?)));
    let best = others.min_by(|(_, a), (_, b)| a.total_cmp(b));
    best.filter(|(_, time)| time * FASTER <= portable).map_or(Tile::Wide, |(tile, _)| tile)
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
    fn new(card: &dyn Card, heads: Heads, in_fp8: bool, block_shift: u32, taken: &mut Vec<u64>) -> Result<Self> {
        // The second half of a text.
        let rows = (EACH * card.processors() * WIDE).div_ceil(heads.heads);
        let before = rows + 5;
        let blocks = (rows + before).div_ceil(1 << block_shift);
        let numbers = (blocks * heads.kv_heads * heads.dim) << block_shift;
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
        let boxes = card.boxes(data, heads.dim, block_shift)?;
        let kv = PagedKv { data, boxes, block_shift, k_scale: 1.0, v_scale: 1.0 };
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

    /// Seconds that each of [`TILES`] takes; `None` for those that are no kernel of their own here, or compute something else than the first.
    fn times(&self, card: &dyn Card) -> Result<[Option<f64>; 3]> {
        let (mut times, mut expected) = ([None; 3], Vec::new());
        for (tile, time) in TILES.into_iter().zip(&mut times) {
            if tile == Tile::Bulk && self.kv.boxes.is_none() {
                continue;
            }
            let mut out = vec![bf16::NAN; self.len];
            card.upload(&out, self.out)?;
            self.run(card, tile)?;
            card.download(self.out, &mut out)?;
            if tile == TILES[0] {
                expected = out;
            } else if !out.iter().zip(&expected).all(|(a, b)| (a.to_f32() - b.to_f32()).abs() <= NEAR) {
                tracing::warn!(
                    card = card.name(),
                    ?tile,
                    "this kernel computes something else than the portable one: it does not serve"
                );
                continue;
            }
            let (begun, mut least) = (Instant::now(), f64::INFINITY);
            for launch in 0..LAUNCHES {
                if launch > 0 && begun.elapsed() > PATIENCE {
                    break;
                }
                let begun = Instant::now();
                self.run(card, tile)?;
                card.finish()?;
                least = least.min(begun.elapsed().as_secs_f64());
            }
            *time = Some(least);
        }
        Ok(times)
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

    const HEADS: Heads = Heads { heads: 8, kv_heads: 2, dim: 64 };

    fn times(card: &dyn Card, in_fp8: bool) -> Result<[Option<f64>; 3]> {
        Trial::new(card, HEADS, in_fp8, 4, &mut Vec::new())?.times(card)
    }

    #[test]
    fn every_kernel_that_a_card_has_is_tried_and_those_that_compute_the_same_are_timed() {
        let card = EmulatedCard::hopper(3);
        assert!(times(&card, false).unwrap().iter().all(|time| time.is_some_and(|time| time > 0.0)));
        let [wide, group, bulk] = times(&card, true).unwrap();
        assert!(wide.is_some() && group.is_some() && bulk.is_none(), "boxes hold bf16");
        assert!(TILES.contains(&fastest(&card, HEADS, true, 4).unwrap()));
        assert_eq!(fastest(&EmulatedCard::new(0), HEADS, false, 4).unwrap(), Tile::Wide);
        assert_eq!(fastest(&card, Heads { dim: 256, ..HEADS }, false, 4).unwrap(), Tile::Wide);
    }

    #[test]
    fn results_that_differ_are_seen() {
        let (card, mut taken) = (EmulatedCard::hopper(0), Vec::new());
        let trial = Trial::new(&card, HEADS, false, 4, &mut taken).unwrap();
        // A key that is not a number is one in all, and equal to nothing.
        let Keys::Bf16(keys, _) = trial.kv.data else { unreachable!() };
        (&card as &dyn Card).upload(&[bf16::NAN], keys.part(0, 1)).unwrap();
        let [wide, group, bulk] = trial.times(&card).unwrap();
        assert!(wide.is_some() && group.is_none() && bulk.is_none());
    }

    #[test]
    fn the_fastest_serves_if_it_is_much_faster_than_the_portable_one() {
        for (times, expected) in [
            ([Some(1.0), Some(0.7), Some(0.8)], Tile::Group),
            ([Some(1.0), Some(0.7), Some(0.6)], Tile::Bulk),
            ([Some(1.0), None, Some(0.9)], Tile::Bulk),
            ([Some(1.0), Some(0.98), Some(0.97)], Tile::Wide),
            ([Some(1.0), None, None], Tile::Wide),
        ] {
            assert_eq!(chosen(&times), expected, "{times:?}");
        }
    }
}
