//! The text half of an encoder: texts to tokens, with the marks the model was trained with around them. Shared by every
//! caller; never on a device.
//!
//!     text    [CLS] a a a [SEP]
//!     pair    [CLS] a a [SEP] b b b [SEP]        the second text, its mark included, is segment 1
//!
//! The marks come out of the post-processor of `tokenizer.json`, asked once. Truncation and padding, which some files ask
//! for, are left out: how much is read is the caller's business.

use std::path::Path;
use std::sync::Arc;

use tokenizers::tokenizer::{PostProcessor, Token};
use tokenizers::{Encoding, Tokenizer};

use crate::base::{Error, Kind, Result};
use crate::model::encoder::EncoderSpec;
use crate::model::files::{ModelFiles, read_text};
use crate::model::gguf::broken;
use crate::task::Passage;

/// Bytes of text for each token that is wanted, to begin with: more than most texts need.
const BYTES_A_TOKEN: usize = 16;
/// Stand for the two texts while the marks around them are found out: no vocabulary is so large.
const FIRST: u32 = u32::MAX;
const SECOND: u32 = u32::MAX - 1;

/// Tokenizer, marks and limits of one encoder.
pub struct EncoderText {
    engine: Engine,
    single: Frame,
    pair: Frame,
    vocab: u32,
    context: u32,
    width: u32,
    labels: Option<Arc<[String]>>,
}

enum Engine {
    Json(Box<Tokenizer>),
    /// Token `b` is byte `b`: the simulated device's.
    Bytes,
}

/// What stands around one text or two.
#[derive(Debug, Default, PartialEq)]
struct Frame {
    before: Vec<u32>,
    between: Vec<u32>,
    after: Vec<u32>,
    /// How many of `before` and `between` together belong to the first segment; `None`: everything does.
    first_segment: Option<usize>,
}

/// A text as the encoder reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// At least one.
    pub ids: Vec<u32>,
    /// Tokens from this one on are segment 1; as many as there are, if none.
    pub second: u32,
}

impl EncoderText {
    /// The text half of an open model. Nothing of the files is needed afterwards.
    ///
    /// # Errors
    /// `ModelUnavailable` or `Unsupported`, with the file and what to do.
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let spec = EncoderSpec::read(files)?;
        let path = files.path().join("tokenizer.json");
        let text =
            read_text(&path)?.ok_or_else(|| broken(&path, "is missing; fetch the model again, tokenizer included"))?;
        let mut tokenizer: Tokenizer = text.parse().map_err(|error: tokenizers::Error| {
            broken(&path, format_args!("is not a tokenizer that can be read ({error}); fetch it again"))
        })?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| broken(&path, error))?;
        let (single, pair) = (Frame::of(&tokenizer, &path, false)?, Frame::of(&tokenizer, &path, true)?);
        Ok(Self {
            single,
            pair,
            engine: Engine::Json(Box::new(tokenizer)),
            vocab: spec.vocab as u32,
            context: u32::try_from(spec.context()).unwrap_or(u32::MAX),
            width: spec.head.as_ref().map_or(spec.hidden, |head| head.labels.len()) as u32,
            labels: spec.head.map(|head| head.labels.into()),
        })
    }

    /// A text half without files, for the simulated device: every byte is a token, nothing stands around a text.
    pub fn bytes(context: u32, width: u32, labels: Option<Arc<[String]>>) -> Self {
        let (single, pair) = (Frame::default(), Frame::default());
        Self { engine: Engine::Bytes, single, pair, vocab: 256, context, width, labels }
    }

    /// The longest text the model was made for, marks included.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// Numbers that come out for a text.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// What the numbers stand for, for models that classify; one for a reranker. `None`: the numbers are a vector.
    pub fn labels(&self) -> Option<&Arc<[String]>> {
        self.labels.as_ref()
    }

    /// A passage as the model reads it, at most `most` tokens long. What is longer is cut, of a pair the longer text first,
    /// if `truncate`.
    ///
    /// # Errors
    /// `ContextLength` for passages that are longer, if not; `BadInput` for tokens the model does not know.
    pub fn tokens(&self, passage: &Passage, most: usize, truncate: bool) -> Result<Tokens> {
        let too_long = |tokens: usize| {
            Error::new(
                Kind::ContextLength,
                format!(
                    "The estimated number of input and maximum output tokens ({tokens}) exceeded this model context \
                     window limit ({most}). Shorten the input, or set `truncate_inputs` to have it cut."
                ),
            )
        };
        let room = |frame: &Frame| most.saturating_sub(frame.len());
        match passage {
            Passage::Text(text) => {
                let (mut ids, about) = self.ids(text, room(&self.single))?;
                if ids.len() > room(&self.single) && !truncate {
                    return Err(too_long(about + self.single.len()));
                }
                ids.truncate(room(&self.single));
                self.known(self.single.around(&ids, &[]))
            }
            Passage::Pair(first, second) => {
                let room = room(&self.pair);
                let ((mut a, about_a), (mut b, about_b)) = (self.ids(first, room)?, self.ids(second, room)?);
                if a.len() + b.len() > room {
                    if !truncate {
                        return Err(too_long(about_a + about_b + self.pair.len()));
                    }
                    let (short, long) = (a.len().min(b.len()), a.len().max(b.len()));
                    // The longer one gives way until both are as long.
                    let long = long.min((room - short.min(room)).max(room.div_ceil(2)));
                    let short = short.min(room - long);
                    let (first, second) = if a.len() > b.len() { (long, short) } else { (short, long) };
                    a.truncate(first);
                    b.truncate(second);
                }
                self.known(self.pair.around(&a, &b))
            }
            Passage::Tokens(ids) => {
                let framed = !self.single.before.is_empty() && ids.starts_with(&self.single.before);
                let mut ids = ids.clone();
                if framed {
                    // As our own tokenizer makes them: what is cut is the text, not the mark behind it.
                    ids.drain(..self.single.before.len());
                    if ids.ends_with(&self.single.after) {
                        ids.truncate(ids.len() - self.single.after.len());
                    }
                }
                if ids.len() > room(&self.single) && !truncate {
                    return Err(too_long(ids.len() + self.single.len()));
                }
                ids.truncate(room(&self.single));
                self.known(self.single.around(&ids, &[]))
            }
        }
    }

    fn known(&self, tokens: Tokens) -> Result<Tokens> {
        if let Some(token) = tokens.ids.iter().find(|&&token| token >= self.vocab) {
            return Err(Error::bad_input(format!("Token {token} is outside the vocabulary of {} tokens.", self.vocab)));
        }
        if tokens.ids.is_empty() {
            return Err(Error::bad_input("The input is empty: send at least one character."));
        }
        Ok(tokens)
    }

    /// The tokens of a text, all of them unless they are more than `most`: then at least one more than that, and its
    /// beginning is right. Words do not depend on what follows them, so of a book only the first pages are read; how many
    /// tokens all of it has is then a guess.
    fn ids(&self, text: &str, most: usize) -> Result<(Vec<u32>, usize)> {
        let tokenizer = match &self.engine {
            Engine::Json(tokenizer) => tokenizer,
            Engine::Bytes => return Ok((text.bytes().take(most + 1).map(u32::from).collect(), text.len())),
        };
        let mut bytes = (most * BYTES_A_TOKEN).max(1024);
        loop {
            let part = beginning(text, bytes);
            let encoding = tokenizer
                .encode_fast(part, false)
                .map_err(|error| Error::internal(format!("the tokenizer failed: {error}")))?;
            let count = encoding.get_ids().len();
            if part.len() == text.len() || count > most {
                let all = count as f64 * text.len() as f64 / part.len().max(1) as f64;
                return Ok((encoding.get_ids().to_vec(), all.round() as usize));
            }
            bytes = bytes.saturating_mul(4);
        }
    }
}

/// The beginning of `text`, whole words of at most `bytes` bytes; all of it where no word ends there.
fn beginning(text: &str, bytes: usize) -> &str {
    if text.len() <= bytes {
        return text;
    }
    let whole = (0..=bytes).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    let fits = &text[..whole];
    match fits.rfind(char::is_whitespace) {
        Some(end) if end > 0 => &fits[..end],
        _ => text,
    }
}

impl Frame {
    /// What the tokenizer puts around one text, or around two.
    fn of(tokenizer: &Tokenizer, path: &Path, pair: bool) -> Result<Self> {
        let Some(rule) = tokenizer.get_post_processor() else { return Ok(Self::default()) };
        let stand_in = |id: u32, segment| Encoding::from_tokens(vec![Token::new(id, String::new(), (0, 0))], segment);
        let second = pair.then(|| stand_in(SECOND, 1));
        let whole = rule
            .process(stand_in(FIRST, 0), second, true)
            .map_err(|error| broken(path, format_args!("has a post-processor that fails ({error})")))?;
        let (ids, segments) = (whole.get_ids(), whole.get_type_ids());
        let place = |id: u32| ids.iter().position(|&token| token == id);
        let odd = || broken(path, "has a post-processor that leaves texts out");
        let first = place(FIRST).ok_or_else(odd)?;
        let second = if pair { place(SECOND).ok_or_else(odd)? } else { first };
        if second < first {
            return Err(odd());
        }
        let between = if pair { ids[first + 1..second].to_vec() } else { Vec::new() };
        // The first text's own place is no mark.
        let first_segment = segments.iter().position(|&segment| segment == 1).map(|at| at - usize::from(at > first));
        Ok(Self { before: ids[..first].to_vec(), between, after: ids[second + 1..].to_vec(), first_segment })
    }

    fn len(&self) -> usize {
        self.before.len() + self.between.len() + self.after.len()
    }

    fn around(&self, first: &[u32], second: &[u32]) -> Tokens {
        let ids = [&self.before[..], first, &self.between, second, &self.after].concat();
        let second = self.first_segment.map_or(ids.len(), |marks| marks + first.len());
        Tokens { second: second.min(ids.len()) as u32, ids }
    }
}
