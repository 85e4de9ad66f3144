//! Logits to token: `sample.cu`.

use super::launch::{Launch, Launcher, Ptr};
use crate::base::Result;

/// How one row is drawn. As the kernel reads it. Default: the best token.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Wish {
    /// Of the choice.
    pub seed: u64,
    /// Tokens that the answer has already.
    pub position: u64,
    /// 0: the best.
    pub temperature: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
    /// 0: off.
    pub frequency_penalty: f32,
    /// 0: off.
    pub presence_penalty: f32,
    /// 0: off.
    pub top_k: i32,
    /// Where its edits begin.
    pub first_edit: i32,
    /// How many there are, each of another token.
    pub edits: i32,
    /// 1: its mask counts.
    pub masked: i32,
    /// 1: the log-probability is wanted.
    pub logprob: i32,
    /// Nothing is drawn, and this token of the prompt looked up; -1: one is drawn; [`UNWANTED`].
    pub given: i32,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            seed: 0,
            position: 0,
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            top_k: 0,
            first_edit: 0,
            edits: 0,
            masked: 0,
            logprob: 0,
            given: -1,
        }
    }
}

/// [`Wish::given`] of a row that nobody wants anything of.
pub const UNWANTED: i32 = -2;

/// What is changed about one token's logit.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Edit {
    /// Which.
    pub token: i32,
    /// Added first.
    pub bias: f32,
    /// How often the answer has it: frequency and presence.
    pub answered: i32,
    /// 1: prompt or answer have it: repetition.
    pub seen: i32,
}

/// What came of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Drawn {
    /// The token; below 0: no logit is a number.
    pub token: i32,
    /// Under the raw logits, if wanted.
    pub logprob: f32,
    /// Of a given token: 1 if it is the best.
    pub rank: i32,
    /// Among how many it was drawn.
    pub candidates: i32,
}

/// Draws a token for each row of logits `[rows, stride]`, the first `vocab` of each, which it changes. masks `[rows, vocab / 32 rounded up]`; scratch `[rows,
/// vocab]`.
///
/// # Errors
/// `Internal` when memory is too short.
#[allow(clippy::too_many_arguments)]
pub fn sample(
    on: &dyn Launcher,
    rows: usize,
    (vocab, stride): (usize, usize),
    logits: Ptr<f32>,
    wishes: Ptr<Wish>,
    masks: Ptr<u32>,
    edits: Ptr<Edit>,
    scratch: Ptr<u64>,
    drawn: Ptr<Drawn>,
) -> Result<()> {
    logits.needs("logits", rows * stride, 4)?;
    wishes.needs("wishes", rows, 8)?;
    scratch.needs("scratch", rows * vocab, 8)?;
    drawn.needs("drawn", rows, 4)?;
    if !masks.is_null() {
        masks.needs("masks", rows * vocab.div_ceil(32), 4)?;
    }
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch::new("sample", [rows, 1, 1], 1024).ptr(logits).ptr(wishes).ptr(masks).ptr(edits);
    on.launch(launch.ptr(scratch).ptr(drawn).int(vocab).int(stride))
}

/// Makes the tokens drawn of `rows` rows the ids that a step begins with; 0 where there is none.
///
/// # Errors
/// As [`sample`].
pub fn follow(on: &dyn Launcher, rows: usize, drawn: Ptr<Drawn>, ids: Ptr<i32>) -> Result<()> {
    drawn.needs("drawn", rows, 4)?;
    ids.needs("ids", rows, 4)?;
    if rows == 0 {
        return Ok(());
    }
    on.launch(Launch::new("follow", [rows.div_ceil(128), 1, 1], 128).ptr(drawn).ptr(ids).int(rows))
}

/// How many rows' tokens count of each sequence: those up to the first that is not the draft behind it. drafts `[rows]`; spans
/// `[count, 2]` of first row and rows.
///
/// # Errors
/// As [`sample`].
pub fn verify(
    on: &dyn Launcher,
    count: usize,
    drawn: Ptr<Drawn>,
    drafts: Ptr<i32>,
    spans: Ptr<i32>,
    accepted: Ptr<i32>,
) -> Result<()> {
    spans.needs("spans", 2 * count, 4)?;
    accepted.needs("accepted", count, 4)?;
    if count == 0 {
        return Ok(());
    }
    let launch = Launch::new("verify", [count.div_ceil(128), 1, 1], 128).ptr(drawn).ptr(drafts).ptr(spans);
    on.launch(launch.ptr(accepted).int(count))
}
