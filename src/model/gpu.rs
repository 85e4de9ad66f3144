//! The decoder on a GPU: as [`crate::model::Decoder`], with everything that a step touches in the device's memory.
//!
//! ```text
//! host    Batch ── ids, positions, slots, tables, items of attention ──> device     logits <── last
//! device  embed ─> x ─┬─ norm ─ qkv ─ rope + K, V into pages ─ attention ─ output ─(+)─┬─ norm ─ gate, up ─ silu·mul ─ down ─(+)─
//!                     └──────────────────────────────────────────────────────────────┘└─────────────────────────────────────┘
//! ```
//!
//! All memory is taken when the model is loaded. Activations are bf16, sums and logits f32; matrices are bf16, or 4 bits in blocks, or fp8
//! with a scale a channel, whose rows are quantised in the step before them. Tokens are drawn where the logits are ([`GpuLogits`]).
//!
//! A step in which every sequence has one row, or a few whose drafts are verified, is launched as a whole: what it launches is noted
//! once for each of a few numbers of rows, and whatever differs from step to step lies in the device's memory. Rows that fill such a
//! number up write nothing.
//!
//! One rank of a group ([`crate::model::Group`]) is such a decoder as well, with its part of each matrix: see `ranks.rs`.
//!
//! A [`GpuDecoder`] belongs to one thread; any error is the device's, and nothing of it can be trusted afterwards.

mod ahead;
mod draw;
mod layers;
mod load;
mod lora;
mod pool;
mod ranks;

use std::sync::Arc;

use half::bf16;

use self::ahead::Ahead;
use self::draw::Drawing;
pub use self::draw::GpuLogits;
use self::layers::{Data, Layer, Matrix, Rows};
use self::load::Loader;
pub use self::load::Source;
use self::lora::Adapters;
use self::pool::KvPool;
pub use self::pool::KvSize;
use self::ranks::Ranks;
pub(in crate::model) use self::ranks::Seat;

use crate::base::{Error, Result};
use crate::config::{Format, Packing, PromptKernel};
use crate::kernel::Pool;
use crate::kernel::gpu::{
    Attention, Bits, Card, Heads, Item, LARGE_UNIT, Merge, NARROW, Norm, Parts, Ptr, Tile, WIDE, fastest,
};
use crate::model::Batch;
use crate::model::batch::Bounds;
use crate::model::lora::Adapter;
use crate::model::shard::{Shard, unit};
use crate::model::spec::{DecoderSpec, Rope};

/// Of so many steps one is launched piece by piece to see what its time goes into. Emulated ones take long.
const TIMED_EVERY: u64 = if cfg!(test) { 32 } else { 128 };
/// Rows of a step that is launched as a whole are filled up to a multiple of this, above it.
const FEW: usize = 8;
/// And to a multiple of this above [`LARGE_UNIT`], where products are filled up anyway.
const MANY: usize = 32;

/// How a decoder is laid out on a GPU.
#[derive(Clone)]
pub struct GpuOptions {
    /// Threads of the host, which convert weights and draw tokens.
    pub pool: Arc<Pool>,
    /// Of all matrices but the embedding and the head.
    pub weights: Packing,
    /// Of keys and values.
    pub kv: Format,
    /// What attends to prompts.
    pub prompt_kernel: PromptKernel,
    /// Size of the KV pool.
    pub kv_size: KvSize,
    /// Tokens in a KV block: a power of two.
    pub block_tokens: usize,
    /// Rows in a step, at most.
    pub max_rows: usize,
    /// Rows with logits in a step, at most.
    pub max_sample_rows: usize,
    /// Sequences in a step, at most.
    pub max_sequences: usize,
    /// Tokens of a sequence, at most.
    pub context: usize,
    /// Share of the drafts that come true, where weights are made up.
    pub accept: Option<f32>,
}

/// A model ready to compute: weights, KV pool and work buffers on a device.
pub struct GpuDecoder {
    card: Box<dyn Card>,
    /// Of the whole model.
    spec: DecoderSpec,
    /// What of it is here: all, unless it is a rank of a group.
    shard: Shard,
    ranks: Option<Ranks>,
    options: GpuOptions,
    heads: Heads,
    /// `[vocab, hidden]`
    embedding: Ptr<bf16>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Matrix,
    /// How positions enter in layers that see everything, and in those with a window.
    frequencies: [Ptr<f32>; 2],
    kv: KvPool,
    step: Step,
    work: Work,
    attention: Attention,
    /// What reads prompts.
    wide: Tile,
    drawing: Drawing,
    adapters: Adapters,
    /// The note of a whole step, by [`bucket`] of its rows: in which every sequence has one, and in which some have more.
    notes: [Vec<Option<usize>>; 2],
    steps: u64,
    /// The last step was timed, and nobody has asked yet.
    timed: bool,
    ahead: Ahead,
    /// How the last step was launched.
    launched: Launched,
    /// What a copy of blocks ran into: the next step says so.
    failed: Option<Error>,
}

impl GpuOptions {
    /// Bytes of a KV block over all layers.
    pub fn kv_block_bytes(&self, spec: &DecoderSpec) -> usize {
        let element = if self.kv == Format::Bf16 { 2 } else { 1 };
        2 * spec.layers * spec.kv_width() * self.block_tokens * element
    }

    /// Bytes of all weights, scales and the like left out.
    pub fn weight_bytes(&self, spec: &DecoderSpec) -> usize {
        let bits = |name: &str| match self.weights {
            _ if !name.starts_with("blk.") => 16,
            Packing::Bf16 => 16,
            Packing::Fp8 => 8,
            // And a scale for each 32.
            Packing::Q4 => 5,
        };
        spec.tensors().map(|(name, rows, cols)| rows * cols * bits(&name) / 8).sum()
    }
}

/// What a step is told, on the host and on the device.
struct Step {
    ids: Told<i32>,
    positions: Told<i32>,
    slots: Told<i32>,
    sampled: Told<i32>,
    tables: Told<i32>,
    narrow: Told<Item>,
    wide: Told<Item>,
    narrow_merges: Told<Merge>,
    wide_merges: Told<Merge>,
}

struct Told<T> {
    host: Vec<T>,
    device: Ptr<T>,
}

impl<T: Bits> Told<T> {
    fn alloc(card: &dyn Card, most: usize) -> Result<Self> {
        Ok(Self { host: Vec::with_capacity(most), device: card.alloc(most)? })
    }

    fn tell(&mut self, card: &dyn Card, values: impl IntoIterator<Item = T>) -> Result<()> {
        self.host.clear();
        self.host.extend(values);
        card.upload(&self.host, self.device)
    }
}

/// What a step computes in; sized for the largest one.
struct Work {
    /// The residual stream, `[rows, hidden]`.
    x: Ptr<bf16>,
    /// `[rows, hidden]`: what is normed before it is added to it. Nothing in families that do not.
    added: Ptr<bf16>,
    /// `[rows, hidden]` or `[rows, q width]`, into a matrix.
    inputs: Rows,
    /// `[rows, q, k and v of all heads]`
    qkv: Ptr<bf16>,
    /// `[rows, 2 * ffn]`
    gate_up: Ptr<bf16>,
    /// `[rows, ffn]`
    middle: Rows,
    /// Sums of attention that are merged.
    partial: Ptr<f32>,
    /// `[sampled rows, hidden]`
    sampled: Ptr<bf16>,
    /// `[sampled rows, vocab]`, the vocabulary rounded up to eights; of a rank but the first, its own words.
    logits: Ptr<f32>,
}

/// How a step was launched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Launched {
    /// As a whole, as it was noted before.
    Replayed,
    /// The same, before its tokens were known here.
    Ahead,
    /// Piece by piece, and noted.
    Noted,
    /// Piece by piece.
    Eager,
}

/// How large the launches of a step are.
#[derive(Clone, Copy)]
struct Extent {
    rows: usize,
    sampled: usize,
    /// Its parts are timed.
    timed: bool,
    /// Some rows have an adapter.
    adapted: bool,
    /// Items of attention, and merges with the most rows of one: narrow, wide.
    items: [(usize, usize, usize); 2],
}

/// Which of a few numbers of rows a step that is launched as a whole has: the smallest that is large enough, and its place among
/// all. 1, 2, 4, then eights, then thirty-twos.
fn bucket(rows: usize) -> (usize, usize) {
    let before_few = FEW.trailing_zeros() as usize;
    match rows.max(1).next_power_of_two() {
        rows if rows < FEW => (rows, rows.trailing_zeros() as usize),
        _ if rows <= LARGE_UNIT => (rows.next_multiple_of(FEW), before_few + rows.div_ceil(FEW) - 1),
        _ => (rows.next_multiple_of(MANY), before_few + LARGE_UNIT / FEW + (rows - LARGE_UNIT).div_ceil(MANY) - 1),
    }
}

impl GpuDecoder {
    /// Sends the weights to the device, or has it make them up, and takes all memory that a step needs. `progress` hears how much is sent, 0 to 1.
    ///
    /// # Errors
    /// `ModelUnavailable` when a tensor is missing or broken or the device has not the memory, `Unsupported` for shapes the
    /// kernels do not have, `BadInput` when the KV pool is too small, and whatever the device says.
    pub fn open(
        card: Box<dyn Card>,
        source: Source<'_>,
        spec: DecoderSpec,
        options: &GpuOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let mut this = Self::open_seat(card, source, spec, None, options, progress)?;
        this.take_pool(this.fit()?)?;
        Ok(this)
    }

    /// [`GpuDecoder::open`] of a rank's part, or of all, with a KV pool that has no blocks yet.
    pub(super) fn open_seat(
        card: Box<dyn Card>,
        source: Source<'_>,
        spec: DecoderSpec,
        seat: Option<Seat>,
        options: &GpuOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let options = options.clone();
        let rank = seat.as_ref().map_or(0, |seat| seat.rank);
        let (shard, seat) = match seat {
            Some(seat) => (seat.shard, Some((seat.rank, seat.words))),
            None => (Shard::whole(&spec), None),
        };
        let own = &shard.spec;
        let heads = Heads { heads: own.heads, kv_heads: own.kv_heads, dim: own.head_dim };
        Attention::takes(heads)?;
        let widths = [("hidden size", own.hidden), ("query width", own.q_width()), ("feed-forward", own.ffn)];
        let unit = unit(options.weights);
        if let Some((what, width)) = widths.iter().find(|(_, width)| !width.is_multiple_of(unit)) {
            return Err(Error::unsupported(format!("a {what} of {width}: GPU kernels take multiples of {unit}")));
        }
        if !options.block_tokens.is_power_of_two() {
            let tokens = options.block_tokens;
            return Err(Error::bad_input(format!("block_tokens is {tokens}: on a GPU it is a power of two")));
        }
        // Room for rows that are computed for nothing.
        let [rows, sample_rows] =
            [options.max_rows, options.max_sample_rows].map(|rows| rows.max(1).next_multiple_of(LARGE_UNIT));

        let mut loader = Loader::new(&*card, source, &spec, (rank, &shard), &options.pool, progress);
        let embedding = loader.matrix(&["token_embd.weight"], None, Packing::Bf16)?;
        let layers: Vec<Layer> =
            (0..spec.layers).map(|layer| loader.layer(layer, options.weights)).collect::<Result<_>>()?;
        let norm = loader.norm("output_norm.weight", spec.norm_eps)?;
        let head = match spec.tied_head {
            true => embedding,
            false => loader.matrix(&["output.weight"], None, Packing::Bf16)?,
        };
        let Data::Bf16(embedding) = embedding.data else {
            return Err(Error::internal("the embedding is not in bf16"));
        };
        let frequencies = |rope: &Rope| -> Result<Ptr<f32>> {
            let values = rope.frequencies(spec.head_dim);
            let at = card.alloc(values.len())?;
            card.upload(&values, at)?;
            Ok(at)
        };
        let frequencies = [frequencies(&spec.rope)?, frequencies(spec.window_rope())?];

        // Attention is cut until there are so many blocks of threads.
        let wanted = 2 * card.processors();
        let tables = options.max_sequences * options.context.div_ceil(options.block_tokens);
        let step = Step {
            ids: Told::alloc(&*card, rows)?,
            positions: Told::alloc(&*card, rows)?,
            slots: Told::alloc(&*card, rows)?,
            sampled: Told::alloc(&*card, sample_rows)?,
            tables: Told::alloc(&*card, tables)?,
            narrow: Told::alloc(&*card, rows + wanted)?,
            wide: Told::alloc(&*card, rows + wanted)?,
            narrow_merges: Told::alloc(&*card, rows + wanted)?,
            wide_merges: Told::alloc(&*card, rows + wanted)?,
        };
        let work = Work {
            x: card.alloc(rows * spec.hidden)?,
            added: card.alloc(if spec.post_norms { rows * spec.hidden } else { 0 })?,
            inputs: Rows::alloc(&*card, rows.max(sample_rows), spec.hidden.max(own.q_width()))?,
            qkv: card.alloc(rows * (own.q_width() + 2 * own.kv_width()))?,
            gate_up: card.alloc(rows * 2 * own.ffn)?,
            middle: Rows::alloc(&*card, rows, own.ffn)?,
            partial: card.alloc(wanted * WIDE * (spec.head_dim + 2))?,
            sampled: card.alloc(sample_rows * spec.hidden)?,
            logits: card.alloc(sample_rows * if rank == 0 { spec.vocab.next_multiple_of(8) } else { head.n })?,
        };
        let ranks = seat.map(|seat| Ranks::alloc(&*card, seat, (rows, sample_rows), spec.hidden)).transpose()?;
        // Rank 0 draws.
        let drawing = Drawing::alloc(&*card, if rank == 0 { sample_rows } else { 0 }, spec.vocab)?;
        let adapters = Adapters::alloc(&*card, &spec, rows, options.max_sequences.max(1))?;
        let kv = KvPool::new(&*card, own, &options)?;
        let wide = match options.prompt_kernel {
            PromptKernel::Warps => Tile::Wide,
            PromptKernel::Fastest => fastest(&*card, heads, options.kv == Format::Fp8, kv.block_shift)?,
            kernel if !card.has_warpgroups() => {
                tracing::warn!(
                    card = card.name(),
                    ?kernel,
                    "this GPU has no such kernel for prompts: gpu.prompt_kernel = \"warps\" serves"
                );
                Tile::Wide
            }
            PromptKernel::Warpgroups => Tile::Group,
            PromptKernel::Bulk => Tile::Bulk,
        };
        tracing::info!(card = card.name(), kernel = ?wide, "attends to prompts");
        progress(1.0);
        Ok(Self {
            heads,
            embedding,
            layers,
            norm,
            head,
            frequencies,
            kv,
            step,
            work,
            attention: Attention::default(),
            wide,
            drawing,
            adapters,
            notes: [options.max_sequences, options.max_sample_rows].map(|rows| vec![None; bucket(rows).1 + 1]),
            steps: 0,
            timed: false,
            ahead: Ahead::default(),
            launched: Launched::Eager,
            failed: None,
            card,
            spec,
            shard,
            ranks,
            options,
        })
    }

    /// What it computes.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Whether it can compute with this adapter.
    pub fn takes(&self, adapter: &Adapter) -> bool {
        adapter.fits(&self.spec)
    }

    /// Brings an adapter over that steps will have, unless it is there.
    ///
    /// # Errors
    /// [`Kind::Busy`](crate::base::Kind::Busy) when there is no memory for it now, and the device's.
    pub fn adopt(&mut self, adapter: &Arc<Adapter>) -> Result<()> {
        self.adapters.adopt(&*self.card, adapter)
    }

    /// How the last step was launched.
    pub fn launched(&self) -> Launched {
        self.launched
    }

    /// Writes K and V of all rows into their blocks and computes logits of `batch.sample_rows`. Calls `errand` when all is launched.
    ///
    /// # Errors
    /// `Internal` when the batch is larger than this decoder was opened for or names what does not exist, and whatever the
    /// device says: then nothing of it can be trusted.
    pub fn forward(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<GpuLogits<'_>> {
        self.check(batch)?;
        self.compute(batch, errand)?;
        Ok(self.logits(batch))
    }

    /// Whether a batch can be computed.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        batch.check(&Bounds {
            rows: self.options.max_rows,
            sample_rows: self.options.max_sample_rows,
            vocab: self.spec.vocab,
            blocks: self.kv.blocks,
            block_tokens: self.options.block_tokens,
        })
    }

    /// Logits of the step that was computed last.
    pub(super) fn logits(&mut self, batch: &Batch) -> GpuLogits<'_> {
        GpuLogits::new(self, batch.sample_rows.len())
    }

    /// [`GpuDecoder::forward`] of a batch that was checked; in a group, together with all other ranks, and until the device is done.
    pub(super) fn compute(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        if self.ahead.has(batch, self.options.block_tokens) {
            errand();
            self.launched = Launched::Ahead;
            self.ahead.expect(batch, self.options.block_tokens);
            return Ok(());
        }
        let rows = batch.rows();
        let deep = batch.spans.len() != rows;
        let whole =
            self.is_whole(batch).then(|| bucket(rows)).filter(|&(_, at)| at < self.notes[usize::from(deep)].len());
        let mut extent = self.tell(batch, whole.map(|(rows, _)| rows))?;
        if extent.adapted {
            self.adapters.tell(&*self.card, batch)?;
        }
        self.steps += 1;
        // Where nobody asks, as of a draft model, marks would pile up.
        extent.timed = self.steps.is_multiple_of(TIMED_EVERY) && batch.rows() > 0 && !self.timed;
        self.timed |= extent.timed;
        let whole = whole.filter(|_| !extent.timed);
        self.launched = match whole.map(|(_, at)| (at, self.notes[usize::from(deep)][at])) {
            Some((_, Some(note))) => {
                self.card.replay(note)?;
                Launched::Replayed
            }
            Some((at, None)) => {
                self.launch(extent)?;
                self.notes[usize::from(deep)][at] = Some(self.card.record(&mut || self.launch(extent))?);
                Launched::Noted
            }
            None => {
                self.launch(extent)?;
                Launched::Eager
            }
        };
        errand();
        match self.options.accept {
            Some(_) => self.drawing.foresee(batch),
            // The tokens lie on rank 0 alone.
            None if self.ranks.is_some() => {}
            None => self.ahead.expect(batch, self.options.block_tokens),
        }
        // What goes wrong on the device of one rank has to be heard of by all.
        if self.ranks.is_some() { self.card.finish() } else { Ok(()) }
    }

    /// Whether all that a step launches follows from its number of rows, and from whether some sequence has several: each row is
    /// looked at, and attention takes each sequence's in one.
    fn is_whole(&self, batch: &Batch) -> bool {
        let most = NARROW * self.heads.kv_heads / self.heads.heads;
        let is_narrow = batch.spans.iter().all(|span| span.rows as usize <= most);
        is_narrow && batch.sample_rows.len() == batch.rows() && batch.adapters.is_empty()
    }

    /// What the time of a step went into that was looked at since the last call. The next one is looked at after that.
    ///
    /// # Errors
    /// The device's.
    pub fn parts(&mut self) -> Result<Option<Parts>> {
        match std::mem::take(&mut self.timed) {
            true => self.card.marked().map(Some),
            false => Ok(None),
        }
    }

    /// Sends what the kernels are told of a step, filled up to so many rows.
    fn tell(&mut self, batch: &Batch, fill: Option<usize>) -> Result<Extent> {
        let (card, step, tokens) = (&*self.card, &mut self.step, self.options.block_tokens);
        let rows = fill.unwrap_or(batch.rows());
        let more = rows - batch.rows();
        let fill_up = |value: i32| std::iter::repeat_n(value, more);
        step.ids.tell(card, batch.tokens.iter().map(|&token| token as i32).chain(fill_up(0)))?;
        step.positions.tell(card, batch.positions.iter().map(|&position| position as i32).chain(fill_up(0)))?;
        let slots = batch.spans.iter().flat_map(|span| {
            let table = batch.table(span);
            (span.start as usize..(span.start + span.rows) as usize)
                .map(move |position| (table[position / tokens] as usize * tokens + position % tokens) as i32)
        });
        // They are written nowhere.
        step.slots.tell(card, slots.chain(fill_up(-1)))?;
        step.sampled.tell(card, batch.sample_rows.iter().map(|&row| row as i32).chain(fill_up(0)))?;
        step.tables.tell(card, batch.tables.iter().map(|&block| block as i32))?;
        let spans = batch
            .spans
            .iter()
            .map(|span| (span.row as usize, span.rows as usize, span.start as usize, span.table as usize));
        let Heads { heads, kv_heads, .. } = self.heads;
        let (plan, wanted) = (&mut self.attention, 2 * card.processors());
        // For layers that see everything: those with a window pass over what they do not see.
        plan.plan(spans, heads / kv_heads, kv_heads, 0, wanted);
        if fill.is_some() {
            // As many as there can be of so many rows: see `Attention::plan`.
            plan.narrow.resize(rows.max(wanted / kv_heads), Item::default());
            plan.narrow_merges.resize(rows, Merge::default());
        }
        step.narrow.tell(card, plan.narrow.iter().copied())?;
        step.wide.tell(card, plan.wide.iter().copied())?;
        step.narrow_merges.tell(card, plan.narrow_merges.iter().copied())?;
        step.wide_merges.tell(card, plan.wide_merges.iter().copied())?;
        let most = |merges: &[Merge]| match fill {
            Some(_) if batch.spans.len() == batch.rows() => 1,
            Some(_) => NARROW * kv_heads / heads,
            None => merges.iter().map(|merge| merge.rows as usize).max().unwrap_or(0).max(1),
        };
        let items = [(&plan.narrow, &plan.narrow_merges), (&plan.wide, &plan.wide_merges)];
        let items = items.map(|(items, merges)| (items.len(), merges.len(), most(merges)));
        let (adapted, timed) = (!batch.adapters.is_empty(), false);
        Ok(Extent { rows, sampled: batch.sample_rows.len() + more, timed, adapted, items })
    }
}

#[cfg(test)]
#[cfg(feature = "emulate")]
#[path = "gpu_test.rs"]
mod tests;
