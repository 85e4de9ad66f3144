//! Queries, keys and values over pages, against references in f64: turned and put down, and attended to.

use half::bf16;
use neurond::kernel::gpu::{
    Attention, Boxes, Card, EmulatedCard, Fp8, Heads, Item, Keys, Launcher, Merge, Norm, PagedKv, Ptr, RopeKv, Tile,
    rope_kv_write,
};

#[cfg(feature = "cuda")]
use super::real;
use super::{BF16, Dice, at, in_any_order, near, on};

/// Whether what runs kernels has those of warpgroups.
fn has_warpgroups() -> bool {
    #[cfg(feature = "cuda")]
    if let Some(card) = real::card() {
        return card.has_warpgroups();
    }
    true
}

/// What [`Tile::Bulk`] takes, where whatever runs kernels has it.
fn boxes(data: Keys, dim: usize, shift: u32) -> Option<Boxes> {
    #[cfg(feature = "cuda")]
    if let Some(card) = real::card() {
        return card.boxes(data, dim, shift);
    }
    (&EmulatedCard::hopper(0) as &dyn Card).boxes(data, dim, shift).unwrap()
}

/// A pool of blocks and a table of some of them in disorder.
struct Paged {
    heads: Heads,
    shift: u32,
    blocks: usize,
}

impl Paged {
    fn len(&self) -> usize {
        (self.blocks * self.heads.kv_heads * self.heads.dim) << self.shift
    }
    fn place(&self, block: usize, head: usize, slot: usize) -> usize {
        (((block * self.heads.kv_heads + head) << self.shift) + slot) * self.heads.dim
    }
    fn table(&self, dice: &mut Dice) -> Vec<i32> {
        let mut table: Vec<i32> = (0..self.blocks as i32).collect();
        (1..table.len()).for_each(|i| table.swap(i, dice.below(i + 1)));
        table
    }
}

#[test]
fn queries_are_turned_and_keys_and_values_put_into_the_pool() {
    let mut dice = Dice(4);
    for (rows, heads, kv_heads, dim, with_norm) in
        [(1, 1, 1, 64, false), (5, 9, 3, 64, false), (3, 8, 2, 128, true), (2, 4, 1, 256, true), (4, 3, 3, 96, false)]
    {
        let paged = Paged { heads: Heads { heads, kv_heads, dim }, shift: 4, blocks: 4 };
        let all = heads + 2 * kv_heads;
        let qkv = dice.bf16(rows * all * dim, 2.0);
        let positions: Vec<i32> = (0..rows).map(|_| dice.below(100_000) as i32).collect();
        // The last row fills the batch up, if it is not alone.
        let slots: Vec<i32> =
            (0..rows).map(|row| if row > 0 && row + 1 == rows { -1 } else { (row * 13 + 2) as i32 }).collect();
        let frequencies: Vec<f32> = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let (q_weight, k_weight, eps, offset, magnitude) = (dice.bf16(dim, 1.0), dice.bf16(dim, 1.0), 1e-6, 1.0, 1.25);
        let (k_scale, v_scale) = (0.5, 0.25);
        let bias = if rows > 2 { dice.bf16(all * dim, 1.0) } else { vec![] };
        let run = |on: &dyn Launcher, qkv: &mut Vec<bf16>, data: Keys, scales: (f32, f32)| {
            let (mut positions, mut slots, mut frequencies) = (positions.clone(), slots.clone(), frequencies.clone());
            let (mut q, mut k) = (q_weight.clone(), k_weight.clone());
            let norm =
                |weight: &mut Vec<bf16>| Norm { weight: if with_norm { at(weight) } else { Ptr::null() }, eps, offset };
            let mut bias = bias.clone();
            let rope = RopeKv {
                frequencies: at(&mut frequencies),
                magnitude,
                bias: if bias.is_empty() { Ptr::null() } else { at(&mut bias) },
                q_norm: norm(&mut q),
                k_norm: norm(&mut k),
            };
            let kv = PagedKv { data, boxes: None, block_shift: 4, k_scale: scales.0, v_scale: scales.1 };
            rope_kv_write(on, rows, paged.heads, at(qkv), at(&mut positions), at(&mut slots), &rope, &kv).unwrap();
        };
        let untouched = bf16::from_f32(77.0);
        let fresh = [qkv.clone(), vec![untouched; 2 * paged.len()]].concat();
        let found = in_any_order(&fresh, |on, all| {
            let (mut qkv, mut pool) = (all[..qkv.len()].to_vec(), all[qkv.len()..].to_vec());
            let (keys, values) = pool.split_at_mut(paged.len());
            run(on, &mut qkv, Keys::Bf16(at(keys), at(values)), (1.0, 1.0));
            *all = [qkv, pool].concat();
        });
        let (turned, pool) = found.split_at(qkv.len());
        let (keys, values) = pool.split_at(paged.len());
        let (mut keys8, mut values8) = (vec![Fp8(0x55); paged.len()], vec![Fp8(0x55); paged.len()]);
        run(on(1), &mut qkv.clone(), Keys::Fp8(at(&mut keys8), at(&mut values8)), (k_scale, v_scale));
        let mut written = 0;
        for row in 0..rows {
            for head in 0..all {
                let bias = |i: usize| bias.get(head * dim + i).map_or(0.0, |bias| f64::from(bias.to_f32()));
                let x = &qkv[(row * all + head) * dim..][..dim];
                let x: Vec<f64> = x.iter().enumerate().map(|(i, x)| f64::from(x.to_f32()) + bias(i)).collect();
                let weight = if head < heads { &q_weight } else { &k_weight };
                let is_value = head >= heads + kv_heads;
                let factor = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + f64::from(eps)).sqrt();
                let normed = |i: usize| match with_norm && !is_value {
                    true => x[i] * factor * (f64::from(weight[i].to_f32()) + f64::from(offset)),
                    false => x[i],
                };
                let expected = |i: usize| {
                    if is_value {
                        return x[i];
                    }
                    let pair = i % (dim / 2);
                    // The angle is a product in f32, as everywhere.
                    let (sine, cosine) = f64::from(positions[row] as f32 * frequencies[pair]).sin_cos();
                    let (low, high) = (normed(pair), normed(pair + dim / 2));
                    f64::from(magnitude)
                        * if i < dim / 2 { low * cosine - high * sine } else { high * cosine + low * sine }
                };
                for i in 0..dim {
                    let what = format!("row {row}, head {head}, {i}");
                    if head < heads {
                        near(turned[(row * all + head) * dim + i].to_f32(), expected(i), BF16, 1e-5, &what);
                        continue;
                    }
                    let Ok(slot) = usize::try_from(slots[row]) else { continue };
                    let place = paged.place(slot / 16, (head - heads) % kv_heads, slot % 16) + i;
                    let (wide, narrow, scale) = match is_value {
                        true => (values[place], values8[place], v_scale),
                        false => (keys[place], keys8[place], k_scale),
                    };
                    written += 1;
                    near(wide.to_f32(), expected(i), BF16, 1e-5, &what);
                    near(narrow.to_f32() * scale, expected(i), 1.0 / 15.0, 0.001, &what);
                }
            }
        }
        let left_alone = pool.iter().filter(|&&x| x == untouched).count();
        assert_eq!(left_alone, pool.len() - written, "nothing else is written");
    }
}

/// One sequence's part of a step: rows, position of the first.
type Span = (usize, usize);

/// Attention of some spans, each over keys of its own, in bf16 or fp8, against f64.
fn attends(dice: &mut Dice, heads: Heads, shift: u32, spans: &[Span], window: usize, wanted: usize, in_fp8: bool) {
    let wide = [Tile::Wide, Tile::Group, Tile::Bulk];
    for planned in if window > 0 { vec![window, 0] } else { vec![0] } {
        for &wide in &wide[..if has_warpgroups() { 3 } else { 1 }] {
            attends_as_planned(dice, heads, shift, spans, (window, planned), wanted, in_fp8, wide);
        }
    }
}

/// The same with a plan for a window, or for all keys of which a row sees those in its window; and one of the kernels for wide items.
#[allow(clippy::too_many_arguments)]
fn attends_as_planned(
    dice: &mut Dice,
    heads: Heads,
    shift: u32,
    spans: &[Span],
    (window, planned): (usize, usize),
    wanted: usize,
    in_fp8: bool,
    wide: Tile,
) {
    let Heads { heads: all, kv_heads, dim } = heads;
    let rows: usize = spans.iter().map(|span| span.0).sum();
    let needed = |&(rows, start): &Span| (rows + start).div_ceil(1 << shift);
    let paged = Paged { heads, shift, blocks: spans.iter().map(needed).sum::<usize>() + 2 };
    let tables = paged.table(dice);
    let q_stride = (all + 2 * kv_heads) * dim;
    let q = dice.bf16(rows * q_stride, 1.5);
    // Blocks that nobody reads, and slots behind the last key, hold NaN.
    let (keys, values) = (dice.bf16(paged.len(), 1.0), dice.bf16(paged.len(), 1.0));
    let (keys8, values8) = (dice.fp8(paged.len()), dice.fp8(paged.len()));
    let (k_scale, v_scale) = if in_fp8 { (0.01, 0.02) } else { (1.0, 1.0) };
    let scale = 1.0 / (dim as f32).sqrt();
    let mut first = (0, 0);
    let placed: Vec<(usize, usize, usize, usize)> = spans
        .iter()
        .map(|span| {
            let (row, table) = first;
            first = (row + span.0, table + needed(span));
            (row, span.0, span.1, table)
        })
        .collect();
    let mut keys = keys;
    let mut values = values;
    let mut known = vec![false; paged.len() / dim];
    for &(_, count, start, table) in &placed {
        for key in 0..start + count {
            for head in 0..kv_heads {
                known[paged.place(tables[table + (key >> shift)] as usize, head, key & ((1 << shift) - 1)) / dim] =
                    true;
            }
        }
    }
    for (at, _) in known.iter().enumerate().filter(|(_, known)| !**known) {
        keys[at * dim..][..dim].fill(bf16::NAN);
        values[at * dim..][..dim].fill(bf16::NAN);
    }
    let mut attention = Attention::default();
    attention.plan(placed.iter().copied(), all / kv_heads, kv_heads, planned, wanted);
    let out = in_any_order(&vec![bf16::NAN; rows * all * dim], |on, out| {
        let (mut q, mut tables) = (q.clone(), tables.clone());
        let (mut keys, mut values, mut keys8, mut values8) =
            (keys.clone(), values.clone(), keys8.clone(), values8.clone());
        let data = match in_fp8 {
            true => Keys::Fp8(at(&mut keys8), at(&mut values8)),
            false => Keys::Bf16(at(&mut keys), at(&mut values)),
        };
        let kv = PagedKv { data, boxes: boxes(data, dim, shift), block_shift: shift, k_scale, v_scale };
        for (tile, items, merges) in [
            (Tile::Narrow, &attention.narrow, &attention.narrow_merges),
            (wide, &attention.wide, &attention.wide_merges),
        ] {
            // A captured graph has room for more than there is.
            let mut items = [items.as_slice(), &[Item::default()]].concat();
            let (count, merge_count) = (items.len(), merges.len());
            let most_rows = merges.iter().map(|merge| merge.rows as usize).max().unwrap_or(0);
            let mut partial = vec![f32::NAN; Attention::partial_len(merges, tile, heads)];
            let mut merges: Vec<Merge> = merges.clone();
            let (items, merges) = ((at(&mut items), count), (at(&mut merges), merge_count, most_rows));
            let (q, out, partial) = (at(&mut q), at(out), at(&mut partial));
            Attention::run(
                on,
                tile,
                items,
                merges,
                heads,
                q,
                q_stride,
                &kv,
                at(&mut tables),
                scale,
                window,
                out,
                partial,
            )
            .unwrap();
        }
    });
    for &(row, count, start, table) in &placed {
        for t in 0..count {
            for head in 0..all {
                let position = start + t;
                let from = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
                let place = |key: usize| {
                    paged.place(
                        tables[table + (key >> shift)] as usize,
                        head / (all / kv_heads),
                        key & ((1 << shift) - 1),
                    )
                };
                let number = |wide: &[bf16], narrow: &[Fp8], scale: f32, i: usize| match in_fp8 {
                    true => f64::from(narrow[i].to_f32()) * f64::from(scale),
                    false => f64::from(wide[i].to_f32()),
                };
                let query = &q[(row + t) * q_stride + head * dim..][..dim];
                let scores: Vec<f64> = (from..=position)
                    .map(|key| {
                        let dot =
                            |i: usize| f64::from(query[i].to_f32()) * number(&keys, &keys8, k_scale, place(key) + i);
                        (0..dim).map(dot).sum::<f64>() * f64::from(scale)
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..dim {
                    let weigh =
                        |(at, weight): (usize, &f64)| weight * number(&values, &values8, v_scale, place(from + at) + i);
                    let expected = weights.iter().enumerate().map(weigh).sum::<f64>() / total;
                    let found = out[((row + t) * all + head) * dim + i].to_f32();
                    // Weights are bf16 when they meet the values.
                    near(
                        found,
                        expected,
                        0.01,
                        0.006 * f64::from(if in_fp8 { 448.0 * v_scale } else { 1.0 }),
                        &format!(
                            "row {row} + {t} at {position}, head {head}, {i}; {spans:?}, window {window}, wanted {wanted}"
                        ),
                    );
                }
            }
        }
    }
}

#[test]
fn attention_over_pages() {
    let mut dice = Dice(6);
    let smol = Heads { heads: 9, kv_heads: 3, dim: 64 };
    let llama = Heads { heads: 8, kv_heads: 2, dim: 128 };
    let gemma = Heads { heads: 4, kv_heads: 1, dim: 256 };
    // Decodes of any length, drafts, chunks, all in one step; whole and cut into ranges.
    for (heads, shift) in [(smol, 4), (llama, 4), (llama, 5), (gemma, 4)] {
        attends(&mut dice, heads, shift, &[(1, 0), (1, 36), (1, 127), (3, 70), (20, 0)], 0, 0, false);
        attends(&mut dice, heads, shift, &[(1, 700), (2, 300)], 0, 1000, false);
    }
    attends(&mut dice, llama, 4, &[(1, 500), (40, 530)], 100, 0, false);
    attends(&mut dice, llama, 4, &[(1, 900), (33, 600)], 0, 1000, false);
    attends(&mut dice, llama, 4, &[(1, 900), (33, 600), (1, 40)], 128, 1000, false);
    attends(&mut dice, gemma, 4, &[(1, 700), (2, 300), (20, 600)], 100, 1000, false);
    attends(&mut dice, Heads { heads: 16, kv_heads: 1, dim: 64 }, 4, &[(1, 65), (5, 3)], 0, 0, false);
}

#[test]
fn attention_over_pages_in_fp8() {
    let mut dice = Dice(7);
    for dim in [64, 128, 256] {
        let heads = Heads { heads: 4, kv_heads: 2, dim };
        attends(&mut dice, heads, 4, &[(1, 90), (17, 20)], 0, 0, true);
    }
    attends(&mut dice, Heads { heads: 8, kv_heads: 1, dim: 128 }, 4, &[(1, 600)], 0, 1000, true);
}
