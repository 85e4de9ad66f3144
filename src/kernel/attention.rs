//! softmax(q K) V over paged KV, for rows of many sequences at once.
//!
//!     block of a layer   [kv head] K: [tokens / 16][dim][16]   V: [tokens][dim]      f16 or f32; a last group of
//!                                                              fewer tokens is as narrow as it is
//!     task               (sequence, kv head, some rows): rows x query heads of the group = up to 12 queries
//!     tile of 64 tokens  scores 12 x 64 -> running max and sum -> p V added to 12 accumulators of dim
//!
//! K lies across tokens, so that a vector is 16 tokens and a score needs no addition across lanes. K and V are read once
//! for all query heads of a group and all rows of a task. Tiles begin at the same positions, mostly multiples of 64 tokens,
//! whatever the chunking of the prompt or the company of the row: a row's bits depend on neither. With a window, tiles that no
//! row of a task sees are not read; what a row does not see of the others adds nothing, to the bit.
//! Decode is bound by reading KV, prefill by f32 multiplication.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::kernel::simd::{Simd, by_isa, exp};
use crate::kernel::{Cpu, Isa, Shared};

/// Tokens that one vector holds.
const GROUP: usize = 16;
/// Tokens of a tile.
const TILE: usize = 64;
/// Groups of a tile, at most; blocks that are not whole groups have short ones.
const GROUPS: usize = 8;
/// A tile's scores, and room for the empty lanes of a short last group.
const SCORES: usize = TILE + GROUP;
/// Queries that a task aims at.
const QUERIES: usize = 12;
/// Query heads of a group, at most.
pub const MAX_GROUP: usize = 32;
/// Length of a head, at most.
pub const MAX_DIM: usize = 256;
/// From one query to the next while they are worked on.
const Q_STRIDE: usize = MAX_DIM + GROUP;

/// How keys and values lie in a block of one layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvLayout {
    /// KV heads.
    pub heads: usize,
    /// Length of a head.
    pub dim: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// f16 rather than f32.
    pub half: bool,
}

impl KvLayout {
    /// Bytes of a block of one layer.
    pub fn block_bytes(&self) -> usize {
        self.heads * self.head_bytes()
    }

    fn element(&self) -> usize {
        if self.half { 2 } else { 4 }
    }

    /// A row of V: whole vectors.
    fn padded(&self) -> usize {
        self.dim.next_multiple_of(GROUP)
    }

    fn key_bytes(&self) -> usize {
        self.block_tokens * self.dim * self.element()
    }

    fn head_bytes(&self) -> usize {
        (self.key_bytes() + self.block_tokens * self.padded() * self.element()).next_multiple_of(64)
    }

    /// Writes key and value of one token and one KV head into a block.
    ///
    /// # Safety
    /// `block` is a whole block, and no other thread touches this slot of it.
    pub unsafe fn write(&self, isa: Isa, block: *mut u8, slot: usize, head: usize, key: &[f32], value: &[f32]) {
        assert!(slot < self.block_tokens && head < self.heads && key.len() == self.dim && value.len() == self.dim);
        assert!(self.dim <= MAX_DIM);
        let group = slot / GROUP * GROUP;
        let (first, width) = (group * self.dim + slot % GROUP, GROUP.min(self.block_tokens - group));
        // SAFETY: heads lie back to back, K before V; slot, head and lengths as asserted.
        unsafe {
            let keys = block.add(head * self.head_bytes());
            let values = keys.add(self.key_bytes() + slot * self.padded() * self.element());
            if self.half {
                let mut bits = [0u16; MAX_DIM];
                halves(isa, key, &mut bits);
                for (d, bits) in bits[..self.dim].iter().enumerate() {
                    keys.cast::<u16>().add(first + d * width).write(*bits);
                }
                halves(isa, value, &mut bits);
                values.cast::<u16>().copy_from_nonoverlapping(bits.as_ptr(), self.dim);
            } else {
                for (d, x) in key.iter().enumerate() {
                    keys.cast::<f32>().add(first + d * width).write(*x);
                }
                values.cast::<f32>().copy_from_nonoverlapping(value.as_ptr(), self.dim);
            }
        }
    }
}

fn halves(isa: Isa, from: &[f32], to: &mut [u16; MAX_DIM]) {
    let mut padded = [0f32; MAX_DIM];
    padded[..from.len()].copy_from_slice(from);
    // SAFETY: both are MAX_DIM long, and `from` is not longer.
    unsafe { halves_at(isa, padded.as_ptr(), from.len().div_ceil(GROUP), to.as_mut_ptr()) }
}

by_isa! { fn halves_at(from: *const f32, vectors: usize, to: *mut u16) = halves_body }

#[inline(always)]
unsafe fn halves_body<S: Simd>(from: *const f32, vectors: usize, to: *mut u16) {
    for i in 0..vectors {
        // SAFETY: `vectors` x 16 numbers each. Beyond f16's range its largest number stands, not infinity, which would
        // spoil every sum it enters.
        unsafe {
            let x = S::load(from.add(i * GROUP));
            S::store_f16(to.add(i * GROUP), S::max(S::min(x, S::splat(65504.0)), S::splat(-65504.0)));
        }
    }
}

/// Rows of one sequence that look at its KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpan {
    /// First row.
    pub row: usize,
    /// Rows, at positions `start..start + rows`.
    pub rows: usize,
    /// Position of the first row.
    pub start: usize,
    /// First entry of the sequence in the block tables.
    pub table: usize,
}

/// Some rows of a sequence, small enough for one thread.
#[derive(Clone, Copy, Debug)]
struct Part {
    row: usize,
    rows: usize,
    /// Tokens that the first row looks at.
    seen: usize,
    /// How many more each following row does: 1, or 0 where all look at the whole sequence.
    step: usize,
    table: usize,
}

impl Part {
    /// Tokens that the last row looks at.
    fn end(&self) -> usize {
        self.seen + (self.rows - 1) * self.step
    }
}

/// The division of a step's attention into tasks. Made once a step, used by every layer; allocates only to grow.
#[derive(Default)]
pub struct Attention {
    parts: Vec<Part>,
}

/// One layer's queries and where their answers go.
pub struct Query<'a> {
    /// Rotated queries, row by row: `q[row * stride + head * dim ..]`.
    pub q: &'a [f32],
    /// From row to row in `q`.
    pub stride: usize,
    /// Query heads; a multiple of the KV heads.
    pub heads: usize,
    /// Factor of the scores, mostly `1 / sqrt(dim)`.
    pub scale: f32,
    /// Tokens that a row sees, the last of those that the plan lets it look at; `None`: all of them.
    pub window: Option<usize>,
    /// `[rows, heads, dim]`, dense.
    pub out: &'a mut [f32],
}

impl Attention {
    /// With room for `rows` rows a step.
    pub fn new(rows: usize) -> Self {
        Self { parts: Vec::with_capacity(rows) }
    }

    /// Divides a step's rows, `group` query heads to a KV head; the longest parts first. A row looks at its own position
    /// and all before it.
    pub fn plan(&mut self, spans: impl Iterator<Item = KvSpan>, group: usize) {
        self.divide(spans, group, true);
    }

    /// The same for encoders: a row looks at its whole span, in both directions.
    pub fn plan_whole(&mut self, spans: impl Iterator<Item = KvSpan>, group: usize) {
        self.divide(spans, group, false);
    }

    fn divide(&mut self, spans: impl Iterator<Item = KvSpan>, group: usize, causal: bool) {
        let rows = (QUERIES / group).max(1);
        self.parts.clear();
        for span in spans {
            for first in (0..span.rows).step_by(rows) {
                self.parts.push(Part {
                    row: span.row + first,
                    rows: rows.min(span.rows - first),
                    seen: span.start + if causal { first + 1 } else { span.rows },
                    step: usize::from(causal),
                    table: span.table,
                });
            }
        }
        self.parts.sort_unstable_by_key(|part| std::cmp::Reverse((part.end(), part.row)));
    }

    /// Runs the plan over one layer: `blocks` are its KV blocks back to back, `tables` the block tables of all spans.
    ///
    /// # Panics
    /// When a table names a block that is not there, or a size is beyond [`MAX_GROUP`] and [`MAX_DIM`].
    pub fn run(&self, cpu: &Cpu, layout: &KvLayout, blocks: &[u8], tables: &[u32], query: Query<'_>) {
        let group = query.heads / layout.heads;
        assert!(group * layout.heads == query.heads && group <= MAX_GROUP && layout.dim <= MAX_DIM);
        let Query { q, stride, heads, scale, window, out } = query;
        let window = window.unwrap_or(usize::MAX);
        // Blocks from the beginning of a tile to the next place where both begin, whatever came before.
        let period = TILE / gcd(layout.block_tokens, TILE);
        let out = Shared::new(out);
        let (dim, padded) = (layout.dim, layout.padded());
        cpu.pool.each(self.parts.len() * layout.heads, 1, |task| {
            let (part, head) = (&self.parts[task / layout.heads], task % layout.heads);
            let queries = part.rows * group;
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let scratch = scratch.as_mut_ptr();
            // Where query `i` lies in a row of `heads * dim`.
            let place = |i: usize| (part.row + i / group, (head * group + i % group) * dim);
            for i in 0..queries {
                let (row, at) = place(i);
                let from = &q[row * stride + at..][..dim];
                // SAFETY: `queries <= MAX_GROUP`, since a part of several rows has at most QUERIES; dims as asserted.
                unsafe {
                    let to = (&raw mut (*scratch).q[i]).cast::<f32>();
                    for (d, x) in from.iter().enumerate() {
                        to.add(d).write(x * scale);
                    }
                    (&raw mut (*scratch).max[i]).write(f32::NEG_INFINITY);
                    (&raw mut (*scratch).sum[i]).write(0.0);
                    (&raw mut (*scratch).acc).cast::<f32>().add(i * padded).write_bytes(0, padded);
                }
            }
            let seen = |i: usize| {
                let end = part.seen + i / group * part.step;
                end.saturating_sub(window)..end
            };
            let end = part.end();
            let table = &tables[part.table..][..end.div_ceil(layout.block_tokens)];
            // The first row sees farthest back.
            let skipped = seen(0).start / layout.block_tokens / period * period;
            let mut tile = Tile { position: skipped * layout.block_tokens, ..Tile::default() };
            for (index, &block) in table.iter().enumerate().skip(skipped) {
                let base = block as usize * layout.block_bytes() + head * layout.head_bytes();
                let head = &blocks[base..base + layout.head_bytes()];
                for first in (0..layout.block_tokens).step_by(GROUP) {
                    let position = index * layout.block_tokens + first;
                    if position >= end {
                        break;
                    }
                    let width = GROUP.min(layout.block_tokens - first);
                    let tokens = width.min(end - position);
                    let begins = first == 0 && index.is_multiple_of(period);
                    if tile.len == GROUPS || tile.tokens + width > TILE || begins && tile.len > 0 {
                        // SAFETY: K and V of each group lie in the block as `layout` says, queries in the scratch.
                        unsafe { tile.run(cpu.isa, layout, scratch, queries, seen) };
                        tile = Tile { position, ..Tile::default() };
                    }
                    let values = layout.key_bytes() + first * padded * layout.element();
                    tile.push(head[first * dim * layout.element()..].as_ptr(), head[values..].as_ptr(), width, tokens);
                }
            }
            // SAFETY: as above.
            unsafe { tile.run(cpu.isa, layout, scratch, queries, seen) };
            for i in 0..queries {
                let (row, at) = place(i);
                // SAFETY: each row and head belongs to one task; the scratch was filled for `queries`.
                unsafe {
                    let out = out.part(row * heads * dim + at, dim);
                    let inverse = 1.0 / (*scratch).sum[i];
                    let acc = (&raw const (*scratch).acc).cast::<f32>().add(i * padded);
                    for (d, out) in out.iter_mut().enumerate() {
                        *out = *acc.add(d) * inverse;
                    }
                }
            }
        });
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A task's working memory, on its thread's stack: some 70 KiB, of which it touches what its sizes need.
struct Scratch {
    /// Scaled. A stride that is known when it is compiled, where one that is not would have the processor add up one address after
    /// the other; and not a power of two, so that what a vector of keys meets lies in different sets of the cache.
    q: [[f32; Q_STRIDE]; MAX_GROUP],
    /// `[queries, padded dim]`: sum of p V so far, relative to `max`.
    acc: [f32; MAX_GROUP * MAX_DIM],
    /// `[queries, SCORES]`: scores, then weights.
    p: [f32; MAX_GROUP * SCORES],
    max: [f32; MAX_GROUP],
    sum: [f32; MAX_GROUP],
}

/// Up to 64 tokens, in groups of up to 16.
#[derive(Clone, Copy)]
struct Tile {
    /// Of its first token.
    position: usize,
    tokens: usize,
    len: usize,
    groups: [Group; GROUPS],
}

#[derive(Clone, Copy)]
struct Group {
    keys: *const u8,
    values: *const u8,
    /// Tokens from number to number of a key: 16, or what is left of the block.
    width: usize,
    /// First token, counted from the tile's.
    first: usize,
    tokens: usize,
}

impl Default for Tile {
    fn default() -> Self {
        let none = Group { keys: std::ptr::null(), values: std::ptr::null(), width: 0, first: 0, tokens: 0 };
        Self { position: 0, tokens: 0, len: 0, groups: [none; GROUPS] }
    }
}

impl Tile {
    fn push(&mut self, keys: *const u8, values: *const u8, width: usize, tokens: usize) {
        self.groups[self.len] = Group { keys, values, width, first: self.tokens, tokens };
        self.len += 1;
        self.tokens += tokens;
    }

    /// Adds this tile to the running softmax of `queries` queries, of which query `i` looks at the tokens at `seen(i)`.
    ///
    /// # Safety
    /// The pointers of the first `len` groups are whole groups of `layout`; `s` holds `queries` queries.
    unsafe fn run(
        &self,
        isa: Isa,
        layout: &KvLayout,
        s: *mut Scratch,
        queries: usize,
        seen: impl Fn(usize) -> Range<usize>,
    ) {
        let (dim, padded) = (layout.dim, layout.padded());
        // SAFETY: by contract; each macro call covers `count` queries from `i` on.
        unsafe {
            let (q, p) = ((&raw const (*s).q).cast::<f32>(), (&raw mut (*s).p).cast::<f32>());
            let acc = (&raw mut (*s).acc).cast::<f32>();
            each_chunk(isa, queries, |i, count| {
                let (q, p) = (q.add(i * Q_STRIDE), p.add(i * SCORES));
                macro_rules! scores {
                    ($($count:literal),*) => {
                        match (count, layout.half) {
                            $(($count, true) => scores::<$count, true>(isa, self, q, dim, p),
                              ($count, false) => scores::<$count, false>(isa, self, q, dim, p),)*
                            _ => unreachable!("a chunk of another size"),
                        }
                    };
                }
                scores!(12, 8, 6, 4, 3, 2, 1);
            });
            for i in 0..queries {
                let (p, acc) = (p.add(i * SCORES), acc.add(i * padded));
                let Range { start, end } = seen(i);
                softmax(isa, self, start, end, p, &raw mut (*s).max[i], &raw mut (*s).sum[i], acc, padded);
            }
            each_chunk(isa, queries, |i, count| {
                let (p, acc) = (p.add(i * SCORES).cast_const(), acc.add(i * padded));
                macro_rules! weigh {
                    ($($count:literal),*) => {
                        match (count, layout.half) {
                            $(($count, true) => weigh::<$count, true>(isa, self, p, padded, acc),
                              ($count, false) => weigh::<$count, false>(isa, self, p, padded, acc),)*
                            _ => unreachable!("a chunk of another size"),
                        }
                    };
                }
                weigh!(12, 8, 6, 4, 3, 2, 1);
            });
        }
    }
}

/// Cuts queries into the sizes that kernels exist for: `work(first, count)`. Twelve sums of a vector each, or six where there
/// are fewer registers, and whatever they are made of.
#[inline]
fn each_chunk(isa: Isa, queries: usize, mut work: impl FnMut(usize, usize)) {
    let mut first = 0;
    while first < queries {
        let count = match (queries - first, isa.is_wide()) {
            (12.., true) => 12,
            (8..12, true) => 8,
            (6.., false) => 6,
            (4.., _) => 4,
            (rest, _) => rest,
        };
        work(first, count);
        first += count;
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const HALF: bool>(at: *const u8, index: usize) -> S::F {
    // SAFETY: 16 elements from `index` on, by the callers' contract.
    unsafe { if HALF { S::load_f16(at.cast::<u16>().add(index)) } else { S::load(at.cast::<f32>().add(index)) } }
}

by_isa! { fn scores<const C: usize, const HALF: bool>(tile: &Tile, q: *const f32, dim: usize, p: *mut f32) = scores_body }

/// `p[c][token] = q[c] . k[token]` for all tokens of the tile.
#[inline(always)]
unsafe fn scores_body<S: Simd, const C: usize, const HALF: bool>(tile: &Tile, q: *const f32, dim: usize, p: *mut f32) {
    let mut g = 0;
    // A few queries take several groups at once, so that there are sums enough to hide the latency of one.
    // SAFETY: the caller's promises are passed on.
    unsafe {
        while (C == 1 || C <= 3 && S::ROWS == 8) && g + 4 <= tile.len {
            scores_strip::<S, C, 4, HALF>(tile, g, q, dim, p);
            g += 4;
        }
        while (C == 2 || C == 3) && g + 2 <= tile.len {
            scores_strip::<S, C, 2, HALF>(tile, g, q, dim, p);
            g += 2;
        }
        while g < tile.len {
            scores_strip::<S, C, 1, HALF>(tile, g, q, dim, p);
            g += 1;
        }
    }
}

/// [`scores`] of V groups from `g` on.
#[inline(always)]
unsafe fn scores_strip<S: Simd, const C: usize, const V: usize, const HALF: bool>(
    tile: &Tile,
    g: usize,
    q: *const f32,
    dim: usize,
    p: *mut f32,
) {
    // SAFETY: C queries, C rows of SCORES results, groups of `dim` vectors, of which a narrow one reads into the
    // values behind it: at least a vector of them is there. The empty lanes of a short group are
    // overwritten by the next one, or lie behind the last token, where nobody looks.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; C];
        for d in 0..dim {
            let mut k = [S::splat(0.0); V];
            for (i, k) in k.iter_mut().enumerate() {
                *k = load::<S, HALF>(tile.groups[g + i].keys, d * tile.groups[g + i].width);
            }
            for (c, sums) in sums.iter_mut().enumerate() {
                let q = S::splat(*q.add(c * Q_STRIDE + d));
                for (sum, k) in sums.iter_mut().zip(k) {
                    *sum = S::fma(k, q, *sum);
                }
            }
        }
        for (c, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                S::store(p.add(c * SCORES + tile.groups[g + i].first), sum);
            }
        }
    }
}

by_isa! {
    fn softmax(
        tile: &Tile, start: usize, end: usize, p: *mut f32, max: *mut f32, sum: *mut f32, acc: *mut f32, padded: usize,
    ) = softmax_body
}

/// Turns scores into weights relative to the running maximum, which moves on, and sum and accumulator with it. Tokens
/// before position `start` and from `end` on weigh nothing.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn softmax_body<S: Simd>(
    tile: &Tile,
    start: usize,
    end: usize,
    p: *mut f32,
    max: *mut f32,
    sum: *mut f32,
    acc: *mut f32,
    padded: usize,
) {
    // SAFETY: SCORES scores, `padded` accumulators.
    unsafe {
        let none = S::splat(f32::NEG_INFINITY);
        let seen = |vector: usize| tile.tokens.min(end.saturating_sub(tile.position)).saturating_sub(vector * GROUP);
        let unseen = |vector: usize| start.saturating_sub(tile.position).saturating_sub(vector * GROUP);
        let vectors = tile.tokens.div_ceil(GROUP);
        let mut scores = [none; TILE / GROUP];
        let mut largest = none;
        for (v, scores) in scores[..vectors].iter_mut().enumerate() {
            *scores = lanes::<S>(unseen(v), seen(v), S::load(p.add(v * GROUP)), none);
            largest = S::max(largest, *scores);
        }
        let before = *max;
        let after = S::max_lane(S::max(largest, S::splat(before)));
        let mut weights = S::splat(0.0);
        for (v, scores) in scores[..vectors].iter().enumerate() {
            let weight = exp::<S>(S::sub(*scores, S::splat(after)));
            let weight = lanes::<S>(unseen(v), seen(v), weight, S::splat(0.0));
            S::store(p.add(v * GROUP), weight);
            weights = S::add(weights, weight);
        }
        let mut total = *sum;
        if after > before {
            let factor = exp::<S>(S::splat(before - after));
            let mut one = [0f32; GROUP];
            S::store(one.as_mut_ptr(), factor);
            total *= one[0];
            for at in (0..padded).step_by(GROUP) {
                S::store(acc.add(at), S::mul(S::load(acc.add(at)), factor));
            }
        }
        *max = after;
        *sum = total + S::sum(weights);
    }
}

/// `x` in the lanes from `start` on and before `end`, `other` in the others.
#[inline(always)]
unsafe fn lanes<S: Simd>(start: usize, end: usize, x: S::F, other: S::F) -> S::F {
    // SAFETY: arithmetic only; the caller's promise is that S is available.
    unsafe {
        let x = S::first(end, x, other);
        if start > 0 { S::first(start, other, x) } else { x }
    }
}

by_isa! { fn weigh<const C: usize, const HALF: bool>(tile: &Tile, p: *const f32, padded: usize, acc: *mut f32) = weigh_body }

/// `acc[c] += sum over tokens of p[c][token] * v[token]`.
#[inline(always)]
unsafe fn weigh_body<S: Simd, const C: usize, const HALF: bool>(
    tile: &Tile,
    p: *const f32,
    padded: usize,
    acc: *mut f32,
) {
    let mut at = 0;
    // A few queries take several vectors at once, as above.
    // SAFETY: the caller's promises are passed on.
    unsafe {
        while (C == 1 || C <= 4 && S::ROWS == 8) && at + 4 * GROUP <= padded {
            weigh_strip::<S, C, 4, HALF>(tile, at, p, padded, acc);
            at += 4 * GROUP;
        }
        while (C == 2 || C == 3) && at + 2 * GROUP <= padded {
            weigh_strip::<S, C, 2, HALF>(tile, at, p, padded, acc);
            at += 2 * GROUP;
        }
        while at < padded {
            weigh_strip::<S, C, 1, HALF>(tile, at, p, padded, acc);
            at += GROUP;
        }
    }
}

/// [`weigh`] of V vectors from number `at` on.
#[inline(always)]
unsafe fn weigh_strip<S: Simd, const C: usize, const V: usize, const HALF: bool>(
    tile: &Tile,
    at: usize,
    p: *const f32,
    padded: usize,
    acc: *mut f32,
) {
    // SAFETY: C rows of SCORES weights and `padded` accumulators, groups of `tokens` rows of V.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; C];
        for (c, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(acc.add(c * padded + at + i * GROUP));
            }
        }
        for group in &tile.groups[..tile.len] {
            for token in 0..group.tokens {
                let mut v = [S::splat(0.0); V];
                for (i, v) in v.iter_mut().enumerate() {
                    *v = load::<S, HALF>(group.values, token * padded + at + i * GROUP);
                }
                for (c, sums) in sums.iter_mut().enumerate() {
                    let p = S::splat(*p.add(c * SCORES + group.first + token));
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = S::fma(v, p, *sum);
                    }
                }
            }
        }
        for (c, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                S::store(acc.add(c * padded + at + i * GROUP), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Buffer;
    use crate::kernel::testing::{Dice, cpus};

    struct Sequence {
        /// Tokens in KV before the step, and rows of the step.
        start: usize,
        rows: usize,
    }

    struct Case {
        heads: usize,
        layout: KvLayout,
        sequences: Vec<Sequence>,
        /// Rows look in both directions.
        whole: bool,
        window: Option<usize>,
    }

    /// Runs attention and compares it with the formula in f64; returns the output.
    fn check(cpu: &Cpu, case: &Case, seed: u64) -> Vec<f32> {
        let Case { heads, layout, sequences, whole, window } = case;
        let (kv, dim, group) = (layout.heads, layout.dim, heads / layout.heads);
        let what = format!("{} {heads} heads {layout:?} whole {whole}, window {window:?}", cpu.isa);
        let rows: usize = sequences.iter().map(|sequence| sequence.rows).sum();
        let mut dice = Dice::new(seed);
        let q = dice.values(rows * heads * dim).into_iter().map(|x| x * 3.0).collect::<Vec<_>>();

        let needed: Vec<usize> = sequences.iter().map(|s| (s.start + s.rows).div_ceil(layout.block_tokens)).collect();
        let total: usize = needed.iter().sum::<usize>() + 1;
        // Blocks full of numbers that must not matter, handed out backwards.
        let mut blocks = Buffer::<u8>::zeroed(total * layout.block_bytes());
        let junk: Vec<u8> = if layout.half { vec![0x00, 0x7b] } else { 1e4f32.to_ne_bytes().to_vec() };
        blocks.iter_mut().zip(junk.iter().cycle()).for_each(|(byte, junk)| *byte = *junk);
        let mut tables = Vec::new();
        let mut spans = Vec::new();
        let mut expected = Vec::new();
        let (mut row, mut next) = (0, total as u32);
        for (sequence, needed) in sequences.iter().zip(needed) {
            spans.push(KvSpan { row, rows: sequence.rows, start: sequence.start, table: tables.len() });
            let table: Vec<u32> = (0..needed)
                .map(|_| {
                    next -= 1;
                    next
                })
                .collect();
            let tokens = sequence.start + sequence.rows;
            let round = |x: f32| if layout.half { half::f16::from_f32(x).to_f32() } else { x };
            let keys: Vec<f32> = dice.values(tokens * kv * dim).into_iter().map(round).collect();
            let values: Vec<f32> = dice.values(tokens * kv * dim).into_iter().map(round).collect();
            for token in 0..tokens {
                let block = table[token / layout.block_tokens] as usize;
                let block = &mut blocks[block * layout.block_bytes()..][..layout.block_bytes()];
                for head in 0..kv {
                    let at = (token * kv + head) * dim;
                    let slot = token % layout.block_tokens;
                    let (key, value) = (&keys[at..at + dim], &values[at..at + dim]);
                    // SAFETY: a whole block, and one thread.
                    unsafe { layout.write(cpu.isa, block.as_mut_ptr(), slot, head, key, value) };
                }
            }
            for i in 0..sequence.rows {
                for head in 0..*heads {
                    let q = &q[((row + i) * heads + head) * dim..][..dim];
                    let at = |token: usize| (token * kv + head / group) * dim;
                    let score = |token: usize| -> f64 {
                        q.iter().zip(&keys[at(token)..]).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() * 0.25
                    };
                    let end = if *whole { tokens } else { sequence.start + i + 1 };
                    let unseen = window.map_or(0, |window| end.saturating_sub(window));
                    let weights: Vec<f64> =
                        (0..end).map(|token| if token < unseen { 0.0 } else { score(token).exp() }).collect();
                    let sum: f64 = weights.iter().sum();
                    for d in 0..dim {
                        let value = |(token, weight): (usize, &f64)| weight * f64::from(values[at(token) + d]);
                        expected.push(weights.iter().enumerate().map(value).sum::<f64>() / sum);
                    }
                }
            }
            tables.extend(table);
            row += sequence.rows;
        }
        let mut plan = Attention::new(rows);
        if *whole {
            plan.plan_whole(spans.into_iter(), group);
        } else {
            plan.plan(spans.into_iter(), group);
        }
        let mut out = vec![f32::NAN; rows * heads * dim];
        let query = Query { q: &q, stride: heads * dim, heads: *heads, scale: 0.25, window: *window, out: &mut out };
        plan.run(cpu, layout, &blocks, &tables, query);
        for (got, expected) in out.iter().zip(&expected) {
            assert!((f64::from(*got) - expected).abs() < 2e-5, "{what}: {got} {expected}");
        }
        out
    }

    fn sequences(all: &[(usize, usize)]) -> Vec<Sequence> {
        all.iter().map(|&(start, rows)| Sequence { start, rows }).collect()
    }

    #[test]
    fn attention_is_the_formula_for_any_shape_of_heads_and_blocks() {
        for cpu in cpus() {
            for (heads, kv, dim) in
                [(1, 1, 16), (3, 1, 64), (9, 3, 64), (4, 4, 20), (8, 1, 128), (14, 2, 64), (2, 1, 8)]
            {
                for (block_tokens, half) in [(16, true), (8, false), (64, true), (40, true), (32, false)] {
                    let layout = KvLayout { heads: kv, dim, block_tokens, half };
                    for whole in [false, true] {
                        let sequences = sequences(&[(0, 1), (70, 1), (0, 35), (13, 5), (129, 9)]);
                        let case = Case { heads, layout, sequences, whole, window: None };
                        check(&cpu, &case, (heads * block_tokens) as u64);
                    }
                }
            }
        }
    }

    #[test]
    fn with_a_window_a_row_sees_its_last_tokens_and_no_others() {
        for cpu in cpus() {
            for (heads, kv, dim) in [(3, 1, 64), (4, 1, 256), (4, 2, 20)] {
                for (block_tokens, half) in [(16, true), (8, false), (64, true), (128, false), (40, true), (24, false)]
                {
                    let layout = KvLayout { heads: kv, dim, block_tokens, half };
                    for window in [1, 7, 64, 100, 1000] {
                        let sequences = sequences(&[(0, 1), (70, 1), (0, 95), (190, 5), (329, 9), (127, 1), (128, 1)]);
                        let case = Case { heads, layout, sequences, whole: false, window: Some(window) };
                        check(&cpu, &case, (heads * block_tokens) as u64);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_however_its_prompt_was_cut() {
        for (cpu, (block_tokens, window)) in cpus()
            .iter()
            .flat_map(|cpu| [(16, None), (16, Some(37)), (40, None), (40, Some(90))].map(|case| (cpu, case)))
        {
            let layout = KvLayout { heads: 1, dim: 64, block_tokens, half: true };
            let (tokens, heads, dim) = (400, 3, 64);
            let mut dice = Dice::new(1);
            let (q, kv) = (dice.values(tokens * heads * dim), dice.values(tokens * 2 * dim));
            let table: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32).collect();
            let mut blocks = Buffer::<u8>::zeroed(table.len() * layout.block_bytes());
            for token in 0..tokens {
                let block = &mut blocks[token / block_tokens * layout.block_bytes()..][..layout.block_bytes()];
                let (key, value) = kv[token * 2 * dim..][..2 * dim].split_at(dim);
                // SAFETY: a whole block, and one thread.
                unsafe { layout.write(cpu.isa, block.as_mut_ptr(), token % block_tokens, 0, key, value) };
            }
            let run = |cut: usize| {
                let mut out = vec![0.0; tokens * heads * dim];
                for start in (0..tokens).step_by(cut) {
                    let rows = cut.min(tokens - start);
                    let mut plan = Attention::new(rows);
                    plan.plan(std::iter::once(KvSpan { row: 0, rows, start, table: 0 }), 3);
                    let part = start * heads * dim..(start + rows) * heads * dim;
                    let (q, out) = (&q[part.clone()], &mut out[part]);
                    plan.run(
                        cpu,
                        &layout,
                        &blocks,
                        &table,
                        Query { q, stride: heads * dim, heads, scale: 0.125, window, out },
                    );
                }
                out
            };
            let whole = run(tokens);
            for cut in [1, 2, 3, 7, 64] {
                assert!(run(cut) == whole, "{} by {cut}, blocks of {block_tokens}, window {window:?}", cpu.isa);
            }
        }
    }

    #[test]
    fn numbers_beyond_half_precision_stay_finite() {
        for cpu in cpus() {
            let layout = KvLayout { heads: 1, dim: 16, block_tokens: 16, half: true };
            let mut block = Buffer::<u8>::zeroed(layout.block_bytes());
            // SAFETY: a whole block, and one thread.
            unsafe { layout.write(cpu.isa, block.as_mut_ptr(), 0, 0, &[1e9; 16], &[-1e9; 16]) };
            let mut plan = Attention::new(1);
            plan.plan(std::iter::once(KvSpan { row: 0, rows: 1, start: 0, table: 0 }), 1);
            let mut out = [0.0; 16];
            let query = Query { q: &[1.0; 16], stride: 16, heads: 1, scale: 1.0, window: None, out: &mut out };
            plan.run(&cpu, &layout, &block, &[0], query);
            assert_eq!(out, [-65504.0; 16]);
        }
    }
}
