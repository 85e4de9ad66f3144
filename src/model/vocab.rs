//! What the engine needs of a tokenizer: the bytes behind each token, which tokens end an answer, and a detokeniser
//! that turns tokens into text one at a time.

use std::sync::Arc;

use crate::base::{Error, Result};

/// The bytes of every token, and the roles some of them play. Shared by the engine and the text half of a model.
#[derive(Debug, Default)]
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// `ends[i]` is where token `i`'s bytes end; they begin where token `i - 1`'s end.
    ends: Vec<u32>,
    end_tokens: Vec<u32>,
}

impl Vocabulary {
    /// `pieces[i]` is what token `i` prints: empty for control tokens. `end_tokens` end an answer (EOS, EOT, EOM …).
    pub fn new<P: AsRef<[u8]>>(pieces: impl IntoIterator<Item = P>, mut end_tokens: Vec<u32>) -> Self {
        let mut vocabulary = Self::default();
        for piece in pieces {
            vocabulary.bytes.extend_from_slice(piece.as_ref());
            vocabulary.ends.push(vocabulary.bytes.len() as u32);
        }
        end_tokens.sort_unstable();
        end_tokens.dedup();
        vocabulary.end_tokens = end_tokens;
        vocabulary
    }

    /// Whether another model's tokens are these.
    ///
    /// # Errors
    /// `BadInput` that names the first that is not.
    pub fn check_same(&self, other: &Self) -> Result<()> {
        let tokens = self.len().max(other.len()) as u32;
        let has = |of: &Self, token: u32| (token < of.len() as u32).then(|| of.piece(token).to_vec());
        if let Some(token) = (0..tokens).find(|&token| has(self, token) != has(other, token)) {
            let shown = |of: &Self| match has(of, token) {
                Some(piece) => format!("{:?}", String::from_utf8_lossy(&piece)),
                None => "nothing".to_owned(),
            };
            let (mine, others) = (shown(self), shown(other));
            return Err(Error::bad_input(format!(
                "its vocabulary is another: token {token} is {others} there and {mine} in the model"
            )));
        }
        Ok(())
    }

    /// The same with other texts for some tokens: control tokens that an answer has to show.
    pub fn printing(&self, texts: &[(&str, u32)]) -> Self {
        let piece = |token: u32| match texts.iter().find(|&&(_, shown)| shown == token) {
            Some((text, _)) => text.as_bytes(),
            None => self.piece(token),
        };
        Self::new((0..self.len() as u32).map(piece), self.end_tokens.clone())
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// What a token prints; nothing for control tokens and ids outside the vocabulary (padding rows of the head).
    pub fn piece(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(&end) = self.ends.get(token) else { return &[] };
        let start = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Whether this token ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.end_tokens.contains(&token)
    }

    /// The tokens that end an answer, ascending.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }
}

/// Turns tokens into text one at a time. A character whose bytes are spread over several tokens is held back until it
/// is whole; bytes that can never become one turn into U+FFFD, so that what comes out is always valid UTF-8.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// The beginning of a character that is not whole yet: at most 3 bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A detokeniser at the beginning of an answer.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, pending: Vec::with_capacity(8) }
    }

    /// Appends the text that this token completes to `out`.
    pub fn push(&mut self, token: u32, out: &mut String) {
        self.pending.extend_from_slice(self.vocabulary.piece(token));
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    self.pending.clear();
                    return;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(good).unwrap_or_default());
                    match error.error_len() {
                        Some(length) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[length..];
                        }
                        None => {
                            let keep = self.pending.len() - bad.len();
                            self.pending.drain(..keep);
                            return;
                        }
                    }
                }
            }
        }
    }

    /// At the end of an answer: what was held back is an unfinished character.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pieces: &[&[u8]]) -> Vec<String> {
        let vocabulary = Arc::new(Vocabulary::new(pieces.iter(), vec![]));
        let mut detokenizer = Detokenizer::new(vocabulary);
        let mut steps = Vec::new();
        for token in 0..pieces.len() as u32 {
            let mut out = String::new();
            detokenizer.push(token, &mut out);
            steps.push(out);
        }
        let mut out = String::new();
        detokenizer.finish(&mut out);
        steps.push(out);
        steps
    }

    #[test]
    fn another_vocabulary_is_told_by_its_first_token_that_differs() {
        let of = |pieces: &[&str]| Vocabulary::new(pieces, vec![]);
        let mine = of(&["a", "b"]);
        assert!(mine.check_same(&of(&["a", "b"])).is_ok());
        for (other, words) in [
            (&["a", "c"][..], "token 1 is \"c\" there and \"b\" in the model"),
            (&["a"], "token 1 is nothing there"),
            (&["a", "b", "c"], "token 2 is \"c\" there and nothing in the model"),
        ] {
            let error = mine.check_same(&of(other)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_character_spread_over_tokens_is_held_until_whole() {
        assert_eq!(text(&[b"a\xf0\x9f", b"\x98", b"\x80b"]), ["a", "", "😀b", ""]);
    }

    #[test]
    fn a_control_token_prints_where_it_is_asked_to() {
        let plain = Vocabulary::new([b"a".as_slice(), b"", b"", b"b"], vec![2]);
        let shown = plain.printing(&[("<call>", 1)]);
        let pieces: Vec<&[u8]> = (0..5).map(|token| shown.piece(token)).collect();
        assert_eq!(pieces, [b"a".as_slice(), b"<call>", b"", b"b", b""]);
        assert_eq!((shown.len(), shown.end_tokens(), plain.piece(1)), (4, plain.end_tokens(), b"".as_slice()));
    }

    #[test]
    fn bytes_that_can_never_be_text_become_one_replacement_each() {
        assert_eq!(text(&[b"\xff", b"x\x80y", b"\xe2\x82"]), ["\u{fffd}", "x\u{fffd}y", "", "\u{fffd}"]);
        assert_eq!(text(&[b"\xe2\x82", b"A"]), ["", "\u{fffd}A", ""]);
    }
}
