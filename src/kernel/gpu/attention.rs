//! Attention over the paged pool: `paged_attention.cu`, and how a step's rows are cut into items.

use half::bf16;

use super::launch::{Fp8, Launch, Launcher, Ptr, Table};
use crate::base::{Error, Result};

/// Queries of a narrow item, and of a wide one: rows times query heads of a kv head.
pub const NARROW: usize = 16;
/// See [`NARROW`].
pub const WIDE: usize = 64;

/// Which kernel computes items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// For those of up to [`NARROW`] queries.
    Narrow,
    /// For those of up to [`WIDE`].
    Wide,
    /// The same by products of warpgroups, which not every card has: see [`Card::has_warpgroups`](super::Card::has_warpgroups). Heads that
    /// have no such kernel go as if it was `Wide`.
    Group,
    /// The same with keys and values that the card brings by itself, where there are [`Boxes`] of them; else as if it was `Group`.
    Bulk,
}

impl Tile {
    fn queries(self) -> usize {
        if self == Self::Narrow { NARROW } else { WIDE }
    }
}

/// Heads of an attention layer.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Of queries.
    pub heads: usize,
    /// Of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Numbers of each, even.
    pub dim: usize,
}

/// Fewest keys that an item is cut into: below that merging costs more than the others' company gains.
const LEAST_KEYS: usize = 256;

/// Keys and values of a layer, `[blocks, kv_heads, block_tokens, dim]`.
#[derive(Clone, Copy)]
pub enum Keys {
    /// As they are.
    Bf16(Ptr<bf16>, Ptr<bf16>),
    /// Divided by the scales of [`PagedKv`].
    Fp8(Ptr<Fp8>, Ptr<Fp8>),
}

/// Keys and values as tables, a row a token and kv head; a box has the tokens of a block, at most 64.
#[derive(Clone, Copy)]
pub struct Boxes {
    pub(super) keys: Table,
    pub(super) values: Table,
}

/// A layer's part of the KV pool.
#[derive(Clone, Copy)]
pub struct PagedKv {
    /// Where it is.
    pub data: Keys,
    /// The same once more, for [`Tile::Bulk`].
    pub boxes: Option<Boxes>,
    /// Blocks have `1 << block_shift` tokens.
    pub block_shift: u32,
    /// Of fp8 keys, else 1.
    pub k_scale: f32,
    /// Of fp8 values, else 1.
    pub v_scale: f32,
}

/// Some rows of a sequence and the range of keys that a block of threads reads for them. As the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Item {
    /// First row of the step.
    pub row: i32,
    /// Rows; 0: nothing to do.
    pub rows: i32,
    /// Position of the first row.
    pub start: i32,
    /// First entry in the tables.
    pub table: i32,
    /// Keys, from the first on.
    pub first: i32,
    /// To before this one.
    pub end: i32,
    /// Where its sums go to be merged; below 0: it is all there is of its rows.
    pub part: i32,
    /// Fills it up to 32 bytes.
    pub unused: i32,
}

/// Parts that are the same rows' sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Merge {
    /// First row of the step.
    pub row: i32,
    /// Rows.
    pub rows: i32,
    /// First part.
    pub part: i32,
    /// Parts.
    pub parts: i32,
}

/// What a step's attention consists of: the same for every layer. Keeps its memory from step to step.
#[derive(Default)]
pub struct Attention {
    /// Those of up to [`NARROW`] queries.
    pub narrow: Vec<Item>,
    /// Those of up to [`WIDE`].
    pub wide: Vec<Item>,
    /// Of narrow items' parts.
    pub narrow_merges: Vec<Merge>,
    /// Of wide items' parts, which have a room of their own.
    pub wide_merges: Vec<Merge>,
}

impl Attention {
    /// Cuts a step into items. `spans` gives each sequence's first row, rows, position of the first and first table entry.
    /// `group` is query heads of a kv head, at most [`NARROW`]; `window` how far a row sees, 0: everything. Keys are cut into
    /// ranges as long as there are fewer than `wanted` blocks of threads over all `kv_heads`.
    pub fn plan(
        &mut self,
        spans: impl Iterator<Item = (usize, usize, usize, usize)> + Clone,
        group: usize,
        kv_heads: usize,
        window: usize,
        wanted: usize,
    ) {
        self.narrow.clear();
        self.wide.clear();
        self.narrow_merges.clear();
        self.wide_merges.clear();
        let is_narrow = |rows: usize| rows * group <= NARROW;
        let pieces = |rows: usize| if is_narrow(rows) { 1 } else { rows.div_ceil((WIDE / group).max(1)) };
        let items: usize = spans.clone().map(|(_, rows, ..)| pieces(rows)).sum();
        let cuts = (wanted / (items * kv_heads).max(1)).max(1);
        for (row, rows, start, table) in spans {
            let narrow = is_narrow(rows);
            let most = if narrow { rows } else { (WIDE / group).max(1) };
            for at in (0..rows).step_by(most.max(1)) {
                let count = most.min(rows - at);
                let (items, merges) = match narrow {
                    true => (&mut self.narrow, &mut self.narrow_merges),
                    false => (&mut self.wide, &mut self.wide_merges),
                };
                let part = merges.last().map_or(0, |merge| merge.part + merge.parts);
                let end = start + at + count;
                let first = if window > 0 { (start + at + 1).saturating_sub(window) } else { 0 };
                // Whole tiles, so that no tile is read twice.
                let length = (end - first).div_ceil(cuts).max(LEAST_KEYS).next_multiple_of(64);
                let ranges = (end - first).div_ceil(length);
                for range in 0..ranges {
                    items.push(Item {
                        row: (row + at) as i32,
                        rows: count as i32,
                        start: (start + at) as i32,
                        table: table as i32,
                        first: (first + range * length) as i32,
                        end: end.min(first + (range + 1) * length) as i32,
                        part: if ranges > 1 { part + range as i32 } else { -1 },
                        unused: 0,
                    });
                }
                if ranges > 1 {
                    merges.push(Merge { row: (row + at) as i32, rows: count as i32, part, parts: ranges as i32 });
                }
            }
        }
    }

    /// Whether there are kernels for such heads.
    ///
    /// # Errors
    /// `Unsupported` for those that are not 64, 128 or 256 wide or in groups of more than 16.
    pub fn takes(Heads { heads, kv_heads, dim }: Heads) -> Result<()> {
        let group = heads / kv_heads;
        if [64, 128, 256].contains(&dim) && group <= NARROW {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "heads of {dim} in groups of {group}: GPU kernels take 64, 128 and 256, in groups of up to {NARROW}"
        )))
    }

    /// Numbers that the parts of `merges` take.
    pub fn partial_len(merges: &[Merge], tile: Tile, heads: Heads) -> usize {
        let parts = merges.last().map_or(0, |merge| (merge.part + merge.parts) as usize);
        parts * heads.kv_heads * tile.queries() * (heads.dim + 2)
    }

    /// Attention of `items` items, all of them for this tile, and the merge of `merges` after them. q is
    /// `[rows, q_stride]`, queries first; out `[rows, heads * dim]`. `scale` is that of the scores.
    ///
    /// # Errors
    /// `Unsupported` for heads that [`Attention::takes`] refuses; `Internal` when memory is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        on: &dyn Launcher,
        tile: Tile,
        (items, count): (Ptr<Item>, usize),
        (merges, merge_count, most_rows): (Ptr<Merge>, usize, usize),
        heads: Heads,
        q: Ptr<bf16>,
        q_stride: usize,
        kv: &PagedKv,
        tables: Ptr<i32>,
        scale: f32,
        window: usize,
        out: Ptr<bf16>,
        partial: Ptr<f32>,
    ) -> Result<()> {
        Self::takes(heads)?;
        let Heads { heads, kv_heads, dim } = heads;
        items.needs("items", count, 4)?;
        merges.needs("merges", merge_count, 4)?;
        q.needs("q", q_stride, 16)?;
        if count == 0 {
            return Ok(());
        }
        let boxes = kv.boxes.filter(|_| tile == Tile::Bulk);
        // Tiles of warpgroups begin at a multiple of 1,024 bytes; what counts the bytes of boxes lies behind them.
        let (width, tokens, apart) = match tile {
            Tile::Narrow => ("narrow", 64, 0),
            Tile::Wide | Tile::Group | Tile::Bulk if dim == 256 => ("wide", 32, 0),
            Tile::Wide => ("wide", 64, 0),
            Tile::Bulk if boxes.is_some() => ("bulk", 64, 1024 + 16),
            Tile::Group | Tile::Bulk => ("group", 64, 1024),
        };
        let kind = match kv.data {
            Keys::Bf16(..) => "bf16",
            Keys::Fp8(..) => "fp8",
        };
        // Two tiles of keys and two of values; the narrow one's four sums lie in the same place afterwards.
        let shared = (4 * tokens * dim * 2 + apart).max(4 * 16 * (dim + 2) * 4);
        let launch = Launch::new(format!("attend_{width}_{dim}_{kind}"), [count, kv_heads, 1], 128).shared(shared);
        let launch = match (boxes, kv.data) {
            (Some(Boxes { keys, values }), _) => launch.table(keys).table(values).ptr(q),
            (None, Keys::Bf16(keys, values)) => launch.ptr(q).ptr(keys).ptr(values),
            (None, Keys::Fp8(keys, values)) => launch.ptr(q).ptr(keys).ptr(values),
        };
        let launch = launch.ptr(tables).ptr(items).ptr(out).ptr(partial);
        let launch = launch.int(heads).int(kv_heads).int(q_stride).int(kv.block_shift as usize);
        on.launch(launch.float(scale * kv.k_scale).float(kv.v_scale).int(window))?;
        if merge_count == 0 {
            return Ok(());
        }
        let launch =
            Launch::new("merge_attention", [merge_count, heads, most_rows], 64).ptr(partial).ptr(merges).ptr(out);
        on.launch(launch.int(heads).int(kv_heads).int(tile.queries()).int(dim).float(kv.v_scale))
    }
}
