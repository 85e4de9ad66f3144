//! Text to tokens by merging neighbours, as GGUF files describe it. Two rules, one loop:
//!
//!     byte-level BPE  (gpt2)    pieces of text (`split.rs`) -> bytes      -> merge the pair listed first
//!     SentencePiece   (llama)   the whole text              -> characters -> merge into the token of highest score
//!
//!     l o w e r  --lo-->  lo w e r  --er-->  lo w er  --low-->  low er  --lower-->  lower
//!
//! What no token covers becomes byte tokens where the vocabulary has them. Otherwise it is the unknown token
//! (SentencePiece), or is left out (byte-level, where the models' own tokenizers do the same).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use crate::model::Vocabulary;
use crate::model::tokenizer::split::Splitter;

/// A tokenizer by merges.
#[derive(Debug)]
pub(super) struct Merger {
    pub(super) index: PieceIndex,
    pub(super) rule: Rule,
    /// The token of each byte, or [`NONE`].
    pub(super) bytes: Box<[u32; 256]>,
    /// For characters without a token, where the family has one.
    pub(super) unknown: Option<u32>,
}

/// Which neighbours merge, and into what.
#[derive(Debug)]
pub(super) enum Rule {
    /// Byte-level BPE.
    Pairs {
        splitter: Splitter,
        merges: PairMap,
        /// A piece that is a token is taken as it is.
        whole: bool,
    },
    /// SentencePiece: `ranks[token]`, 0 for the highest score; equal for equal scores.
    Scores { ranks: Vec<u32> },
}

/// No token.
pub(super) const NONE: u32 = u32::MAX;

/// `(left, right)` to `(rank, merged)`.
pub(super) type PairMap = HashMap<u64, (u32, u32), BuildHasherDefault<PairHasher>>;

/// The key of a pair in a [`PairMap`].
pub(super) fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Hashes a pair: ids are no attacker's choice, so one multiplication will do.
#[derive(Debug, Default)]
pub(super) struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ mixed >> 32;
    }
}

/// Tokens by their bytes, without a second copy of the bytes.
#[derive(Debug)]
pub(super) struct PieceIndex {
    vocabulary: Arc<Vocabulary>,
    /// Open addressing; [`NONE`] is free. At most half full.
    slots: Vec<u32>,
}

impl PieceIndex {
    /// Of two tokens with the same bytes the first is found.
    pub(super) fn new(vocabulary: Arc<Vocabulary>, tokens: impl Iterator<Item = u32>) -> Self {
        let slots = vec![NONE; (vocabulary.len() * 2).next_power_of_two()];
        let mut index = Self { vocabulary, slots };
        for token in tokens {
            let slot = index.slot(index.vocabulary.piece(token));
            if index.slots[slot] == NONE {
                index.slots[slot] = token;
            }
        }
        index
    }

    /// The token with exactly these bytes.
    pub(super) fn find(&self, bytes: &[u8]) -> Option<u32> {
        Some(self.slots[self.slot(bytes)]).filter(|&token| token != NONE)
    }

    /// Where these bytes are, or would be.
    fn slot(&self, bytes: &[u8]) -> usize {
        let mut hasher = PairHasher::default();
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            hasher.write_u64(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        hasher.write_u64(u64::from_le_bytes(last) ^ (bytes.len() as u64) << 56);
        let mask = self.slots.len() - 1;
        let mut slot = hasher.finish() as usize & mask;
        while self.slots[slot] != NONE && self.vocabulary.piece(self.slots[slot]) != bytes {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

/// A stretch of text that is one token, or one character or byte that is none; linked to its neighbours.
#[derive(Clone, Copy)]
struct Symbol {
    token: u32,
    start: u32,
    /// 0 once it was merged into its left neighbour.
    length: u32,
    previous: u32,
    next: u32,
}

/// Work buffers of an encoding, kept from piece to piece.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    /// Rank, left symbol, merged token: the lowest rank first, leftmost among equals.
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

impl Merger {
    /// Appends the tokens of a text without special tokens in it.
    pub(super) fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        match &self.rule {
            Rule::Pairs { splitter, whole, .. } => {
                splitter.pieces(text, &mut |piece| match self.index.find(piece.as_bytes()).filter(|_| *whole) {
                    Some(token) => out.push(token),
                    None => self.merge(piece, scratch, out),
                })
            }
            Rule::Scores { .. } => self.merge(text, scratch, out),
        }
    }

    fn merge(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Scratch { symbols, heap } = scratch;
        self.begin(text, symbols);
        heap.clear();
        for left in 1..symbols.len() {
            self.offer(text, symbols, left as u32 - 1, left as u32, heap);
        }
        while let Some(Reverse((rank, left, merged))) = heap.pop() {
            let right = symbols[left as usize].next;
            // Stale unless the two are still there and still make the same token.
            if symbols[left as usize].length == 0
                || right == NONE
                || self.join(text, &symbols[left as usize], &symbols[right as usize]) != Some((rank, merged))
            {
                continue;
            }
            let gone = symbols[right as usize];
            symbols[right as usize].length = 0;
            let keeper = &mut symbols[left as usize];
            keeper.token = merged;
            // Bytes without a token may lie between the two; they are nobody's.
            keeper.length = gone.start + gone.length - keeper.start;
            keeper.next = gone.next;
            let previous = keeper.previous;
            if gone.next != NONE {
                symbols[gone.next as usize].previous = left;
                self.offer(text, symbols, left, gone.next, heap);
            }
            if previous != NONE {
                self.offer(text, symbols, previous, left, heap);
            }
        }
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            if symbol.token != NONE {
                out.push(symbol.token);
                continue;
            }
            let bytes = &text.as_bytes()[symbol.start as usize..][..symbol.length as usize];
            if bytes.iter().all(|&byte| self.bytes[usize::from(byte)] != NONE) {
                out.extend(bytes.iter().map(|&byte| self.bytes[usize::from(byte)]));
            } else {
                out.extend(self.unknown);
            }
        }
    }

    /// The smallest parts: bytes that are tokens, or characters.
    fn begin(&self, text: &str, symbols: &mut Vec<Symbol>) {
        symbols.clear();
        let symbol = |token, start: usize, length: usize| Symbol {
            token,
            start: start as u32,
            length: length as u32,
            previous: NONE,
            next: NONE,
        };
        match self.rule {
            Rule::Pairs { .. } => {
                let tokens = text.bytes().map(|byte| self.bytes[usize::from(byte)]).enumerate();
                symbols.extend(tokens.filter(|&(_, token)| token != NONE).map(|(at, token)| symbol(token, at, 1)));
            }
            Rule::Scores { .. } => symbols.extend(text.char_indices().map(|(at, char)| {
                let length = char.len_utf8();
                symbol(self.index.find(&text.as_bytes()[at..at + length]).unwrap_or(NONE), at, length)
            })),
        }
        let count = symbols.len();
        for (at, symbol) in symbols.iter_mut().enumerate() {
            symbol.previous = if at == 0 { NONE } else { at as u32 - 1 };
            symbol.next = if at + 1 == count { NONE } else { at as u32 + 1 };
        }
    }

    fn offer(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: u32,
        right: u32,
        heap: &mut BinaryHeap<Reverse<(u32, u32, u32)>>,
    ) {
        if let Some((rank, merged)) = self.join(text, &symbols[left as usize], &symbols[right as usize]) {
            heap.push(Reverse((rank, left, merged)));
        }
    }

    /// Rank and token of two neighbours, if they merge.
    fn join(&self, text: &str, left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        match &self.rule {
            Rule::Pairs { merges, .. } => merges.get(&pair(left.token, right.token)).copied(),
            Rule::Scores { ranks } => {
                let end = (right.start + right.length) as usize;
                let token = self.index.find(&text.as_bytes()[left.start as usize..end])?;
                Some((ranks[token as usize], token))
            }
        }
    }
}
