//! How a decoder is divided over ranks: who holds which rows and columns of each matrix.
//!
//! ```text
//! q k v       by heads: a rank has some query heads and the KV heads they look at; with more ranks than KV heads, several
//!             ranks hold the same KV head
//! output      by inputs, as the heads are        gate up   by channels, in units that down can be cut at
//! embedding   by words, the head likewise        down      by inputs, as gate and up are
//! ```
//!
//! So a rank goes from the residual stream to its part of `output` and of `down` without a word to the others. Inputs of a
//! quantised matrix are cut between its blocks, and on GPUs where their kernels can begin, which is what makes some numbers of ranks
//! impossible.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::base::{Error, Result};
use crate::config::{Packing, synthetic};
use crate::kernel::{Cut, LANES, Part, share};
use crate::model::files::ModelFiles;
use crate::model::spec::DecoderSpec;
use crate::model::synthetic::synthetic as made_up;
use crate::model::weights::Weights;

/// A decoder, and a number of ranks that it can be divided over.
#[derive(Clone, Debug)]
pub struct Division {
    spec: DecoderSpec,
    ranks: usize,
    /// Numbers of the feed-forward's middle that stay together.
    ffn_unit: usize,
}

/// What a rank holds.
#[derive(Clone, Debug)]
pub(super) struct Shard {
    /// The rank's part as if it were a decoder: its heads, its part of the middle, its words.
    pub(super) spec: DecoderSpec,
    /// Width of the residual stream, as a range.
    hidden: Range<usize>,
    /// Channels of the queries.
    q: Range<usize>,
    /// Channels of the keys, and of the values.
    kv: Range<usize>,
    ffn: Range<usize>,
    /// Tokens whose embeddings and logits are here.
    pub(super) vocab: Range<usize>,
}

/// Where the inputs of a matrix can be cut.
#[derive(Clone, Copy)]
enum Cuts<'a> {
    /// Between the blocks of a file.
    Blocks(&'a Weights),
    /// At multiples of so many.
    Multiples(usize),
}

impl Division {
    /// Divides a decoder over `ranks` ranks of a CPU.
    ///
    /// # Errors
    /// `BadInput` when it cannot be divided by this number; the message says why, and by which it can.
    pub fn new(weights: &Weights, spec: &DecoderSpec, ranks: usize) -> Result<Self> {
        Self::by(Cuts::Blocks(weights), spec, ranks)
    }

    /// Divides a decoder over `ranks` GPUs, which keep its matrices as `packing` says, whatever they are in a file.
    ///
    /// # Errors
    /// `Unsupported` when it cannot be divided by this number; the message says why, and by which it can.
    pub fn on_gpus(spec: &DecoderSpec, ranks: usize, packing: Packing) -> Result<Self> {
        Self::by(Cuts::Multiples(unit(packing)), spec, ranks)
    }

    fn by(cuts: Cuts<'_>, spec: &DecoderSpec, ranks: usize) -> Result<Self> {
        let wrong = match Self::attempt(cuts, spec, ranks)? {
            Ok(division) => return Ok(division),
            Err(wrong) => wrong,
        };
        let mut possible = Vec::new();
        for ranks in 1..=spec.heads {
            if Self::attempt(cuts, spec, ranks)?.is_ok() {
                possible.push(ranks.to_string());
            }
        }
        let possible = match possible.split_last() {
            Some((last, [])) => format!("only {last} is"),
            Some((last, others)) => format!("{} and {last} are", others.join(", ")),
            None => "no number is".to_owned(),
        };
        let message = format!("tensor_parallel = {ranks} is not possible for this model: {wrong}; {possible}");
        Err(match cuts {
            Cuts::Blocks(_) => Error::bad_input(message),
            // A CPU may be able to.
            Cuts::Multiples(_) => Error::unsupported(message),
        })
    }

    /// Whether the decoder of a GGUF file or safetensors folder can be divided over `ranks` ranks: of a CPU, or GPUs that keep it
    /// so. Reads no weights.
    ///
    /// # Errors
    /// As [`Division::new`], and as [`Weights::spec`] for what is no decoder.
    pub fn check(path: &Path, ranks: usize, on_gpus: Option<Packing>) -> Result<()> {
        if let Some(name) = synthetic(path) {
            let spec = made_up(name)?.spec;
            return on_gpus.map_or(Ok(()), |packing| Self::on_gpus(&spec, ranks, packing).map(|_| ()));
        }
        let weights = Weights::peek(Arc::new(ModelFiles::open(path)?))?;
        let spec = weights.spec()?;
        match on_gpus {
            Some(packing) => Self::on_gpus(&spec, ranks, packing),
            None => Self::new(&weights, &spec, ranks),
        }
        .map(|_| ())
    }

    /// What stands in the way, if anything does.
    fn attempt(cuts: Cuts<'_>, spec: &DecoderSpec, ranks: usize) -> Result<std::result::Result<Self, String>> {
        let (heads, kv_heads) = (spec.heads, spec.kv_heads);
        if ranks == 0 || !heads.is_multiple_of(ranks) {
            return Ok(Err(format!("its {heads} query heads cannot be divided evenly")));
        }
        if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
            return Ok(Err(format!("its {kv_heads} key-value heads can neither be divided nor repeated evenly")));
        }
        if ranks == 1 {
            return Ok(Ok(Self { spec: spec.clone(), ranks, ffn_unit: LANES }));
        }
        let own = heads / ranks * spec.head_dim;
        // Whole panels, so that only the last rank's may have empty lanes.
        let mut ffn_unit = LANES;
        match cuts {
            Cuts::Multiples(unit) => {
                ffn_unit = ffn_unit.max(unit);
                if !own.is_multiple_of(unit) {
                    return Ok(Err(format!(
                        "the heads of a rank are {own} wide, and GPU kernels take multiples of {unit}"
                    )));
                }
            }
            Cuts::Blocks(weights) => {
                for layer in 0..spec.layers {
                    for (part, is_output) in [("attn_output", true), ("ffn_down", false)] {
                        let name = format!("blk.{layer}.{part}.weight");
                        let dtype = weights.tensor(&name)?.dtype;
                        if !is_output {
                            ffn_unit = ffn_unit.max(dtype.block_len());
                        } else if !own.is_multiple_of(dtype.block_len()) {
                            let (dtype, block) = (dtype.name(), dtype.block_len());
                            return Ok(Err(format!(
                                "{name} is {dtype}, whose inputs come in blocks of {block}, and the heads of a rank are {own} wide"
                            )));
                        }
                    }
                }
            }
        }
        for (what, length, unit) in [("feed-forward", spec.ffn, ffn_unit), ("vocabulary", spec.vocab, LANES)] {
            if length.div_ceil(unit) < ranks {
                return Ok(Err(format!("its {what} of {length} has fewer units of {unit} than there are ranks")));
            }
        }
        Ok(Ok(Self { spec: spec.clone(), ranks, ffn_unit }))
    }

    /// What is divided.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// What rank number `rank` holds.
    pub(super) fn shard(&self, rank: usize) -> Shard {
        let Self { spec, ranks, ffn_unit } = self;
        let (ranks, dim) = (*ranks, spec.head_dim);
        let heads = spec.heads / ranks;
        let kv_heads = (spec.kv_heads / ranks).max(1);
        // The KV head of its first query head.
        let kv_first = rank * spec.kv_heads / ranks;
        let (ffn, vocab) = (share(spec.ffn, *ffn_unit, rank, ranks), share(spec.vocab, LANES, rank, ranks));
        Shard {
            spec: DecoderSpec { heads, kv_heads, ffn: ffn.len(), vocab: vocab.len(), ..spec.clone() },
            hidden: 0..spec.hidden,
            q: rank * heads * dim..(rank + 1) * heads * dim,
            kv: kv_first * dim..(kv_first + kv_heads) * dim,
            ffn,
            vocab,
        }
    }

    /// Whether every rank finds its part of an adapter, which is whole, at the beginning of a panel.
    pub(super) fn takes_adapters(&self) -> bool {
        (0..self.ranks).map(|rank| self.shard(rank)).all(|shard| {
            [shard.q.start, shard.kv.start, shard.ffn.start].iter().all(|start| start.is_multiple_of(LANES))
        })
    }
}

impl Shard {
    /// All of a decoder.
    pub(super) fn whole(spec: &DecoderSpec) -> Self {
        Self {
            spec: spec.clone(),
            hidden: 0..spec.hidden,
            q: 0..spec.q_width(),
            kv: 0..spec.kv_width(),
            ffn: 0..spec.ffn,
            vocab: 0..spec.vocab,
        }
    }

    /// The part of a matrix that is here.
    pub(super) fn part(&self, matrix: Matrix) -> Part {
        let (channels, inputs) = match matrix {
            Matrix::Query => (&self.q, &self.hidden),
            Matrix::KeyOrValue => (&self.kv, &self.hidden),
            Matrix::Output => (&self.hidden, &self.q),
            Matrix::GateOrUp => (&self.ffn, &self.hidden),
            Matrix::Down => (&self.hidden, &self.ffn),
            Matrix::Words => (&self.vocab, &self.hidden),
        };
        Part { channels: channels.clone(), inputs: inputs.clone() }
    }

    /// The same by the name of the matrix, or of its bias. `None`: what has no parts.
    pub(super) fn part_of(&self, name: &str) -> Option<Part> {
        let matrix = match name.rsplit('.').nth(1)? {
            "attn_q" => Matrix::Query,
            "attn_k" | "attn_v" => Matrix::KeyOrValue,
            "attn_output" => Matrix::Output,
            "ffn_gate" | "ffn_up" => Matrix::GateOrUp,
            "ffn_down" => Matrix::Down,
            "token_embd" | "output" => Matrix::Words,
            _ => return None,
        };
        Some(self.part(matrix))
    }

    /// Where this rank's part of queries, keys and values lies in an adapter's.
    pub(super) fn cut_qkv(&self) -> Cut {
        Cut { input: 0, panels: [self.q.start / LANES, self.kv.start / LANES, self.kv.start / LANES] }
    }

    /// Of the output's inputs.
    pub(super) fn cut_output(&self) -> Cut {
        Cut { input: self.q.start, ..Cut::default() }
    }

    /// Of gate and up.
    pub(super) fn cut_ffn(&self) -> Cut {
        let panel = self.ffn.start / LANES;
        Cut { input: 0, panels: [panel, panel, 0] }
    }

    /// Of the inputs of down.
    pub(super) fn cut_down(&self) -> Cut {
        Cut { input: self.ffn.start, ..Cut::default() }
    }
}

/// The matrices of a decoder, by how they are divided.
#[derive(Clone, Copy, Debug)]
pub(super) enum Matrix {
    Query,
    KeyOrValue,
    Output,
    GateOrUp,
    Down,
    /// Embedding and head.
    Words,
}

/// Inputs of a GPU's matrices come in multiples of it.
pub(super) fn unit(packing: Packing) -> usize {
    match packing {
        Packing::Bf16 => 32,
        Packing::Fp8 => 64,
        Packing::Q4 => 128,
    }
}
