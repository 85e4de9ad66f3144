//! A simulated device: no network, but a paged KV pool that remembers what was written where.
//!
//! ```text
//! cell of the pool:  { token, position, chain = hash of the adapter and every token up to here }
//! ```
//!
//! The next token is drawn from the chain that the block table leads to, and by default every forward walks all the
//! cells a real attention would read and compares them. So a block that was shared wrongly, freed too early or never
//! written is an error or another answer, never a silent success. For tests, simulations and load work without weights:
//! the vocabulary is the 256 bytes and an end token, and answers are readable letters.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::base::{Error, Result};
use crate::engine::{Logits, Runner};
use crate::kernel::Pool;
use crate::model::lora::Adapter;
use crate::model::{Batch, Span, Vocabulary};

/// Tokens: 256 bytes and one end token.
pub const VOCABULARY: usize = 257;
/// The token that ends an answer.
pub const END: u32 = 256;
/// What answers are made of; every byte is a token.
const LETTERS: &[u8] = b"etaoin shrdlu cmfwyp vbgkjqxz    ";

/// What a simulated device is like. Parsed from `sim` or `sim:key=value,…` with the fields' names as keys.
#[derive(Clone, Debug, PartialEq)]
pub struct SimSpec {
    /// KV blocks.
    pub blocks: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Time each step takes, in microseconds.
    pub step_us: u64,
    /// Time each row takes on top, in microseconds.
    pub row_us: u64,
    /// An answer ends by itself with a chance of one in this at each token; 0: never.
    pub end_in: u32,
    /// An answer repeats what was said so many tokens ago, but for one token in eight; 0: it never repeats.
    pub period: u32,
    /// The step that fails, counted from 1; 0: none.
    pub fail_at: u64,
    /// The step that panics, counted from 1; 0: none.
    pub panic_at: u64,
    /// More rows than this in a step are an error; 0: no limit.
    pub most_rows: usize,
    /// Walk every cell that attention would read. Costs time in proportion to context.
    pub verify: bool,
    /// What it answers, percent-encoded in the text form; empty: letters.
    pub say: String,
}

impl Default for SimSpec {
    fn default() -> Self {
        Self {
            blocks: 1024,
            block_tokens: 16,
            step_us: 0,
            row_us: 0,
            end_in: 64,
            period: 0,
            fail_at: 0,
            panic_at: 0,
            most_rows: 0,
            verify: true,
            say: String::new(),
        }
    }
}

impl FromStr for SimSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str| {
            Error::bad_input(format!(
                "{part:?} is no setting of a simulated device: write sim or sim:blocks=1024,block_tokens=16,step_us=0,\
                 row_us=0,end_in=64,period=0,fail_at=0,panic_at=0,most_rows=0,verify=1,\
                 say=percent-encoded%20text, any of them left out"
            ))
        };
        let mut spec = Self::default();
        let settings = match text.strip_prefix("sim") {
            Some("") => return Ok(spec),
            Some(rest) => rest.strip_prefix(':').ok_or_else(|| wrong(text))?,
            None => return Err(wrong(text)),
        };
        for part in settings.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(part))?;
            if key == "say" {
                spec.say = percent_decode_str(value).decode_utf8().map_err(|_| wrong(part))?.into_owned();
                continue;
            }
            let value: u32 = value.parse().map_err(|_| wrong(part))?;
            match key {
                "blocks" if value > 0 => spec.blocks = value as usize,
                "block_tokens" if value > 0 => spec.block_tokens = value as usize,
                "step_us" => spec.step_us = value.into(),
                "row_us" => spec.row_us = value.into(),
                "end_in" => spec.end_in = value,
                "period" => spec.period = value,
                "fail_at" => spec.fail_at = value.into(),
                "panic_at" => spec.panic_at = value.into(),
                "most_rows" => spec.most_rows = value as usize,
                "verify" => spec.verify = value != 0,
                _ => return Err(wrong(part)),
            }
        }
        Ok(spec)
    }
}

/// Bytes of a cell outside the pool.
const CELL: usize = 20;

#[derive(Clone, Copy, Default)]
struct Cell {
    token: u32,
    /// Position plus one; 0: never written.
    place: u32,
    chain: u64,
    /// How much of what it is to say stands here at the end.
    said: u32,
}

impl Cell {
    fn bytes(self) -> [u8; CELL] {
        let Self { token, place, chain, said } = self;
        let mut bytes = [0; CELL];
        for (at, word) in [token, place, chain as u32, (chain >> 32) as u32, said].into_iter().enumerate() {
            bytes[4 * at..][..4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn of(bytes: &[u8; CELL]) -> Self {
        let word = |at: usize| (0..4).fold(0, |word, byte| word | u32::from(bytes[4 * at + byte]) << (8 * byte));
        let chain = u64::from(word(2)) | u64::from(word(3)) << 32;
        Self { token: word(0), place: word(1), chain, said: word(4) }
    }
}

/// The simulated device.
pub struct SimRunner {
    spec: SimSpec,
    cells: Vec<Cell>,
    logits: Vec<f32>,
    pool: Pool,
    steps: u64,
}

impl SimRunner {
    /// An empty device.
    pub fn new(spec: SimSpec) -> Self {
        let cells = vec![Cell::default(); spec.blocks * spec.block_tokens];
        Self { cells, logits: Vec::new(), pool: Pool::new(1), steps: 0, spec }
    }

    /// The bytes behind its tokens.
    pub fn vocabulary() -> Arc<Vocabulary> {
        let pieces = (0..=255u8).map(|byte| vec![byte]).chain([vec![]]);
        Arc::new(Vocabulary::new(pieces, vec![END]))
    }

    fn cell(&self, table: &[u32], position: u32) -> Result<usize> {
        let size = self.spec.block_tokens as u32;
        let block = table.get((position / size) as usize);
        let block = block.filter(|&&block| (block as usize) < self.spec.blocks);
        let block =
            block.ok_or_else(|| Error::internal(format!("sim: no block for position {position} in {table:?}")))?;
        Ok((block * size + position % size) as usize)
    }

    fn block(&mut self, block: u32) -> &mut [Cell] {
        &mut self.cells[block as usize * self.spec.block_tokens..][..self.spec.block_tokens]
    }

    /// The cell before `position`, which must lie in the pool: its chain is that of everything up to there, `root` that of
    /// no tokens.
    fn cell_before(&self, root: u64, table: &[u32], position: u32) -> Result<Cell> {
        let Some(before) = position.checked_sub(1) else { return Ok(Cell { chain: root, ..Cell::default() }) };
        let cell = self.cells[self.cell(table, before)?];
        if cell.place != position {
            return Err(Error::internal(format!(
                "sim: position {before} is needed, but its cell holds {}",
                cell.place
            )));
        }
        Ok(cell)
    }

    /// How much of `say` stands at the end after `token`, if it was `said` before. A text that goes wrong begins again.
    fn said(&self, said: u32, token: u32) -> u32 {
        let at = |said: u32| self.spec.say.as_bytes().get(said as usize).copied().map(u32::from);
        if at(said) == Some(token) { said + 1 } else { u32::from(at(0) == Some(token)) }
    }

    fn verify(&self, root: u64, table: &[u32], end: u32) -> Result<()> {
        let mut chain = root;
        for position in 0..end {
            let cell = self.cells[self.cell(table, position)?];
            chain = link(chain, cell.token);
            if cell.place != position + 1 || cell.chain != chain {
                return Err(Error::internal(format!("sim: position {position} was overwritten: {table:?}")));
            }
        }
        Ok(())
    }
}

/// Where the chain of a span begins: KV of one adapter is wrong under any other.
fn root(batch: &Batch, span: &Span) -> u64 {
    batch.adapter(span).map_or(0, |adapter| adapter.digest().iter().fold(1, |chain, &word| link(chain, word)))
}

fn link(chain: u64, token: u32) -> u64 {
    let mut x = (chain ^ u64::from(token).wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// The logits that follow a chain: one letter clearly the best, others possible, the end token now and then. `repeated` is
/// what was said a period ago.
fn logits(spec: &SimSpec, chain: u64, repeated: Option<u32>, row: &mut [f32]) {
    row.fill(-30.0);
    let mut x = chain;
    let repeated = repeated.filter(|&token| LETTERS.iter().any(|&letter| u32::from(letter) == token));
    let again = repeated.filter(|_| !link(chain, 1_002).is_multiple_of(8));
    for &letter in LETTERS {
        x = link(x, u32::from(letter));
        row[letter as usize] = (x >> 40) as f32 / (1 << 22) as f32;
    }
    if let Some(token) = again {
        row[token as usize] = 8.0;
    }
    x = link(x, END);
    if spec.end_in > 0 && x.is_multiple_of(u64::from(spec.end_in)) {
        row[END as usize] = 20.0;
    }
}

impl Runner for SimRunner {
    fn blocks(&self) -> usize {
        self.spec.blocks
    }

    fn block_tokens(&self) -> usize {
        self.spec.block_tokens
    }

    fn takes(&self, _: &Adapter) -> bool {
        true
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        self.steps += 1;
        if self.steps == self.spec.fail_at {
            return Err(Error::internal(format!("sim: step {} was to fail", self.steps)));
        }
        assert!(self.steps != self.spec.panic_at, "sim: step {} was to panic", self.steps);
        if self.spec.most_rows > 0 && batch.rows() > self.spec.most_rows {
            return Err(Error::internal(format!("sim: {} rows in a step", batch.rows())));
        }
        meanwhile();
        let mut sampled = 0;
        self.logits.resize(batch.sample_rows.len() * VOCABULARY, 0.0);
        // All rows are written before any is read for verification: spans of one step must not disturb each other.
        for span in &batch.spans {
            let table = batch.table(span);
            let Cell { mut chain, mut said, .. } = self.cell_before(root(batch, span), table, span.start)?;
            for row in span.row..span.row + span.rows {
                let (token, position) = (batch.tokens[row as usize], batch.positions[row as usize]);
                if position != span.start + (row - span.row) {
                    return Err(Error::internal(format!("sim: row {row} says position {position}")));
                }
                chain = link(chain, token);
                said = self.said(said, token);
                let at = self.cell(table, position)?;
                self.cells[at] = Cell { token, place: position + 1, chain, said };
                if batch.sample_rows.get(sampled) == Some(&row) {
                    // The next position's token a period ago; its cell is written already.
                    let repeated = match (position + 1).checked_sub(self.spec.period) {
                        Some(place) if place <= position => Some(self.cells[self.cell(table, place)?].token),
                        _ => None,
                    };
                    let row = &mut self.logits[sampled * VOCABULARY..][..VOCABULARY];
                    logits(&self.spec, chain, repeated, row);
                    if !self.spec.say.is_empty() {
                        // Above every letter: said at any temperature that tests use, unless a grammar forbids it.
                        let next = self.spec.say.as_bytes().get(said as usize);
                        row[END as usize] = -30.0;
                        row[next.map_or(END as usize, |&byte| usize::from(byte))] = 60.0;
                    }
                    sampled += 1;
                }
            }
        }
        if sampled != batch.sample_rows.len() {
            return Err(Error::internal("sim: a row to sample lies in no span"));
        }
        if self.spec.verify {
            for span in &batch.spans {
                self.verify(root(batch, span), batch.table(span), span.start + span.rows)?;
            }
        }
        let busy = self.spec.step_us + self.spec.row_us * batch.rows() as u64;
        if busy > 0 {
            std::thread::sleep(Duration::from_micros(busy));
        }
        Ok(Logits::Host { data: &mut self.logits, vocab: VOCABULARY, pool: &self.pool })
    }

    fn copy(&mut self, from: u32, to: u32) {
        let (size, from, to) = (self.spec.block_tokens, from as usize, to as usize);
        self.cells.copy_within(from * size..(from + 1) * size, to * size);
    }

    fn block_bytes(&self) -> usize {
        self.spec.block_tokens * CELL
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        for (cell, out) in self.block(block).iter().zip(out.chunks_exact_mut(CELL)) {
            out.copy_from_slice(&cell.bytes());
        }
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        for (cell, from) in self.block(block).iter_mut().zip(from.as_chunks::<CELL>().0) {
            *cell = Cell::of(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> SimSpec {
        SimSpec { blocks: 8, block_tokens: 2, ..SimSpec::default() }
    }

    fn data(logits: Logits<'_>) -> &[f32] {
        match logits {
            Logits::Host { data, .. } => data,
            Logits::Gpu(_) => panic!("there is no GPU"),
        }
    }

    /// Tokens, start, block table.
    type Rows<'a> = (&'a [u32], u32, &'a [u32]);

    /// Runs steps of spans and returns the last row's logits, or the error.
    fn check(steps: &[&[Rows<'_>]]) -> Result<Vec<f32>> {
        let mut runner = SimRunner::new(spec());
        let mut last = Vec::new();
        for step in steps {
            let mut batch = Batch::default();
            for &(tokens, start, table) in *step {
                batch.push(tokens, start, table, [tokens.len() as u32 - 1]);
            }
            let logits = data(runner.forward(&batch, &mut || ())?);
            last = logits[logits.len() - VOCABULARY..].to_vec();
        }
        Ok(last)
    }

    #[test]
    fn logits_depend_on_all_tokens_and_not_on_how_they_came_into_the_pool() {
        let whole = check(&[&[(&[1, 2, 3], 0, &[4, 5])]]).unwrap();
        assert_eq!(check(&[&[(&[1], 0, &[7])], &[(&[2, 3], 1, &[7, 0])]]).unwrap(), whole);
        assert_ne!(check(&[&[(&[9, 2, 3], 0, &[4, 5])]]).unwrap(), whole);
    }

    #[test]
    fn wrong_block_management_is_an_error() {
        let unwritten = check(&[&[(&[3], 2, &[4, 5])]]);
        let overwritten = check(&[&[(&[1, 2, 3], 0, &[4, 5])], &[(&[9], 0, &[4])], &[(&[4], 3, &[4, 5])]]);
        let short = check(&[&[(&[1, 2, 3], 0, &[4])]]);
        let outside = check(&[&[(&[1], 0, &[8])]]);
        let disturbed = check(&[&[(&[1, 2], 0, &[4]), (&[3], 0, &[4])]]);
        for wrong in [unwritten, overwritten, short, outside, disturbed] {
            assert!(wrong.is_err());
        }
    }

    #[test]
    fn a_device_says_what_it_is_told_to_after_whatever_prompt() {
        let spec = SimSpec { say: "aab".into(), ..spec() };
        for (prompt, expected) in [(&b"xy"[..], "aab"), (b"aab", ""), (b"aa", "b"), (b"aabx", "aab")] {
            let mut runner = SimRunner::new(spec.clone());
            let (mut tokens, mut start, mut said) = (prompt.to_vec(), 0, String::new());
            loop {
                let ids: Vec<u32> = tokens.iter().copied().map(u32::from).collect();
                let mut batch = Batch::default();
                batch.push(&ids, start, &[4, 5, 6, 7], [ids.len() as u32 - 1]);
                let logits = data(runner.forward(&batch, &mut || ()).unwrap());
                let best = (0..VOCABULARY).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                let Ok(best) = u8::try_from(best) else { break };
                said.push(char::from(best));
                (start, tokens) = (start + ids.len() as u32, vec![best]);
            }
            assert_eq!(said, expected, "after {prompt:?}");
        }
    }

    #[test]
    fn a_copied_block_serves_like_the_one_it_was_copied_from() {
        let whole = check(&[&[(&[1, 2, 3], 0, &[4, 5]), (&[4], 3, &[4, 5])]]).unwrap();
        let mut runner = SimRunner::new(spec());
        let mut batch = Batch::default();
        batch.push(&[1, 2, 3], 0, &[4, 5], []);
        runner.forward(&batch, &mut || ()).unwrap();
        runner.copy(5, 7);
        batch.clear();
        batch.push(&[4], 3, &[4, 7], [0]);
        assert_eq!(data(runner.forward(&batch, &mut || ()).unwrap()), whole);
    }

    #[test]
    fn a_spec_is_read_from_text() {
        assert_eq!("sim".parse::<SimSpec>().unwrap(), SimSpec::default());
        let spec = "sim:blocks=7,step_us=9,verify=0".parse::<SimSpec>().unwrap();
        assert_eq!(spec, SimSpec { blocks: 7, step_us: 9, verify: false, ..SimSpec::default() });
        assert_eq!("sim:say=a%2C%C3%BC".parse::<SimSpec>().unwrap().say, "a,ü");
        for wrong in ["", "simx", "sim:", "sim:blocks", "sim:blocks=0", "sim:blocks=x", "sim:color=1", "sim:say=%ff"] {
            assert!(wrong.parse::<SimSpec>().is_err(), "{wrong}");
        }
    }
}
