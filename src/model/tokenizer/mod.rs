//! Text to tokens, as the model's own files say: built from GGUF metadata, or read from `tokenizer.json`.
//!
//!     "<|im_start|>user\nHi"  --special tokens-->  [1] "user\nHi"  --merges-->  [1, 4093, 198, 18223]
//!
//! Token kinds: *control* tokens (`<|im_end|>`, `<s>`) print nothing and are recognised in text only when asked;
//! *user-defined* ones are ordinary text that is never split; all others come out of merging. What tokens print is the
//! [`Vocabulary`]'s. Tokenizers of GGUF are `gpt2` (byte-level BPE) and `llama` (SentencePiece).

mod json;
mod merge;
mod split;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use regex::Regex;
use serde_json::Value;

use crate::base::{Error, Result};
use crate::model::Vocabulary;
use crate::model::files::{ModelFiles, read_json};
use crate::model::gguf::{Gguf, broken};
use json::JsonTokenizer;
use merge::{Merger, NONE, PairMap, PieceIndex, Rule, Scratch};
use split::Splitter;

/// The tokenizer of one model.
pub struct Tokenizer {
    engine: Engine,
    vocabulary: Arc<Vocabulary>,
    begin: Option<u32>,
    control: HashMap<String, u32>,
    names: Vec<(&'static str, String)>,
}

enum Engine {
    Gguf(Box<GgufTokenizer>),
    Json(Box<JsonTokenizer>),
    Bytes,
}

/// Special tokens around a [`Merger`].
struct GgufTokenizer {
    merger: Merger,
    /// Control and user-defined tokens.
    all: Option<Specials>,
    /// User-defined tokens only.
    always: Option<Specials>,
    /// SentencePiece: a text, and what follows a special token, begins with a space.
    space_prefix: bool,
}

/// Finds the text of special tokens, the longest where several begin at the same place.
struct Specials {
    pattern: Regex,
    tokens: HashMap<String, u32>,
}

/// Control tokens that end an answer in one family or another.
const END_MARKERS: [&str; 12] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// What templates call the tokens that a GGUF file names by number.
const ROLES: [(&str, &str); 4] =
    [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")];

impl Tokenizer {
    /// Builds the tokenizer of a model.
    ///
    /// # Errors
    /// `ModelUnavailable` when it is missing or makes no sense, `Unsupported` for kinds that are not built; the message
    /// names file and key.
    pub fn read(files: &ModelFiles) -> Result<Self> {
        match files {
            ModelFiles::Gguf(gguf) => from_gguf(gguf),
            ModelFiles::Folder { path, config } => from_folder(path, config),
        }
    }

    /// A tokenizer without a file: token `b` is byte `b`, whatever else the vocabulary holds.
    pub fn bytes(vocabulary: Arc<Vocabulary>) -> Self {
        Self { engine: Engine::Bytes, vocabulary, begin: None, control: HashMap::new(), names: Vec::new() }
    }

    /// Bytes behind tokens, end tokens.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The token that the model wants at the beginning of a text, if it wants one.
    pub fn begin(&self) -> Option<u32> {
        self.begin
    }

    /// A control token by its text.
    pub fn control(&self, text: &str) -> Option<u32> {
        self.control.get(text).copied()
    }

    /// The texts and ids of all control tokens.
    pub fn controls(&self) -> impl Iterator<Item = (&str, u32)> {
        self.control.iter().map(|(text, &token)| (text.as_str(), token))
    }

    /// The texts of tokens that templates know by role: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    pub fn names(&self) -> &[(&'static str, String)] {
        &self.names
    }

    /// Bytes of the longest text that becomes a control token.
    pub fn longest_special(&self) -> usize {
        self.control.keys().map(String::len).max().unwrap_or(0)
    }

    /// Appends the tokens of `text`. With `special`, the text of control tokens becomes those tokens; without, it is
    /// text like any other. No token is put in front.
    ///
    /// # Errors
    /// `Internal` when a `tokenizer.json` turns out not to cover the text.
    pub fn encode(&self, text: &str, special: bool, out: &mut Vec<u32>) -> Result<()> {
        match &self.engine {
            Engine::Gguf(tokenizer) => tokenizer.encode(text, special, out),
            Engine::Json(tokenizer) => return tokenizer.encode(text, special, out),
            Engine::Bytes => out.extend(text.bytes().map(u32::from)),
        }
        Ok(())
    }
}

impl GgufTokenizer {
    fn encode(&self, text: &str, special: bool, out: &mut Vec<u32>) {
        let mut scratch = Scratch::default();
        let mut at = 0;
        if let Some(specials) = if special { &self.all } else { &self.always } {
            for found in specials.pattern.find_iter(text) {
                self.encode_text(&text[at..found.start()], &mut scratch, out);
                out.extend(specials.tokens.get(found.as_str()));
                at = found.end();
            }
        }
        self.encode_text(&text[at..], &mut scratch, out);
    }

    /// Text between special tokens.
    fn encode_text(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        if matches!(self.merger.rule, Rule::Pairs { .. }) {
            return self.merger.encode(text, scratch, out);
        }
        // SentencePiece sees spaces as U+2581. Pieces have spaces in their place, so it goes the other way here.
        let prefix = if self.space_prefix { " " } else { "" };
        let text = format!("{prefix}{}", text.replace('\u{2581}', " "));
        self.merger.encode(&text, scratch, out);
    }
}

impl Specials {
    fn new(tokens: HashMap<String, u32>) -> Result<Option<Self>> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let mut texts: Vec<_> = tokens.keys().map(|text| regex::escape(text)).collect();
        texts.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        let pattern = regex::RegexBuilder::new(&texts.join("|")).unicode(true).size_limit(256 << 20).build();
        let pattern = pattern.map_err(|error| {
            Error::unsupported("the model has more special tokens than can be told apart").with_source(error)
        })?;
        Ok(Some(Self { pattern, tokens }))
    }
}

/// Appends what a token of the model's own alphabet prints: bytes written as printable characters, or `▁` for a space
/// and `<0x0A>` for a byte.
fn put_piece(text: &[u8], byte_level: bool, out: &mut Vec<u8>) {
    if byte_level {
        let start = out.len();
        if !put_from_byte_alphabet(text, out) {
            out.truncate(start);
            out.extend_from_slice(text);
        }
        return;
    }
    match byte_token(text) {
        Some(byte) => out.push(byte),
        None => out.extend_from_slice(String::from_utf8_lossy(text).replace('\u{2581}', " ").as_bytes()),
    }
}

/// `<0x0A>` to 10.
fn byte_token(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// Byte-level tokenizers write bytes as characters that can be seen: printable ones of Latin-1 as they are, the other 68
/// in order from U+0100 on. False when a character is none of them. By hand, since a model has some 100,000 of these.
fn put_from_byte_alphabet(text: &[u8], out: &mut Vec<u8>) -> bool {
    let mut rest = text;
    loop {
        let code = match *rest {
            [] => return true,
            [byte @ 0x21..=0x7E, ..] => {
                rest = &rest[1..];
                u16::from(byte)
            }
            [first @ 0xC2..=0xC5, second, ..] => {
                rest = &rest[2..];
                u16::from(first & 0x1F) << 6 | u16::from(second & 0x3F)
            }
            _ => return false,
        };
        out.push(match code {
            0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code as u8,
            0x100..=0x120 => (code - 0x100) as u8,
            0x121..=0x142 => (code - 0x121 + 0x7F) as u8,
            0x143 => 0xAD,
            _ => return false,
        });
    }
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
    let missing = |key: &str| broken(gguf.path(), format_args!("the key {key} is missing; the file has no tokenizer"));
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let unsupported = |what: String| Error::unsupported(format!("{}: {what}", gguf.path().display()));
    let byte_level = match gguf.str(&key("model"))?.ok_or_else(|| missing("tokenizer.ggml.model"))? {
        "gpt2" => true,
        "llama" => false,
        other => return Err(unsupported(format!("the tokenizer {other:?} is not supported yet; gpt2 and llama are"))),
    };
    let texts = gguf.strings(&key("tokens"))?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let count = texts.len();
    let mut kinds: Vec<i32> = match gguf.i32s(&key("token_type"))? {
        Some(kinds) => kinds.collect(),
        // Old files: only bytes can be told by their looks.
        None => texts.clone().map(|text| if byte_token(text).is_some() { BYTE } else { NORMAL }).collect(),
    };
    if kinds.len() != count {
        return Err(broken(gguf.path(), format_args!("has {count} tokens, but {} token types", kinds.len())));
    }
    // Pieces back to back: a vocabulary is large, and this is on the way to being ready.
    let (mut pieces, mut ends_of_pieces) = (Vec::with_capacity(count * 8), Vec::with_capacity(count));
    let mut bytes = Box::new([NONE; 256]);
    let (mut control, mut user_defined) = (HashMap::new(), HashMap::new());
    for (id, text) in texts.clone().enumerate() {
        let start = pieces.len();
        let name = || String::from_utf8_lossy(text).into_owned();
        // Some files have end markers as user-defined tokens.
        if kinds[id] == USER_DEFINED && END_MARKERS.iter().any(|marker| marker.as_bytes() == text) {
            kinds[id] = CONTROL;
        }
        match kinds[id] {
            NORMAL | BYTE => put_piece(text, byte_level, &mut pieces),
            USER_DEFINED => {
                let text = if byte_level { name() } else { name().replace('\u{2581}', " ") };
                pieces.extend_from_slice(text.as_bytes());
                if !text.is_empty() {
                    user_defined.insert(text, id as u32);
                }
            }
            CONTROL | UNKNOWN if !text.is_empty() => {
                control.insert(name(), id as u32);
            }
            _ => {}
        }
        if let ([byte], true) = (&pieces[start..], kinds[id] == if byte_level { NORMAL } else { BYTE }) {
            bytes[usize::from(*byte)] = id as u32;
        }
        ends_of_pieces.push(pieces.len());
    }
    let names = gguf_names(gguf, &texts)?;
    let ends = gguf_ends(gguf, count, &control)?;
    let starts = std::iter::once(0).chain(ends_of_pieces.iter().copied());
    let pieces = starts.zip(&ends_of_pieces).map(|(start, &end)| &pieces[start..end]);
    let vocabulary = Arc::new(Vocabulary::new(pieces, ends));
    let merged = (0..count as u32).filter(|&id| kinds[id as usize] == NORMAL && !vocabulary.piece(id).is_empty());
    let index = PieceIndex::new(Arc::clone(&vocabulary), merged);
    let (rule, begins) = if byte_level {
        let name = gguf.str(&key("pre"))?.unwrap_or_default();
        let (splitter, whole) = Splitter::named(name).map_err(|error| error.context(gguf.path().display()))?;
        let merges = gguf.strings(&key("merges"))?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
        (Rule::Pairs { splitter, merges: pairs(merges, &index), whole }, whole && name != "tekken")
    } else {
        let scores = gguf.f32s(&key("scores"))?.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
        if scores.len() != count {
            return Err(broken(gguf.path(), format_args!("has {count} tokens, but {} scores", scores.len())));
        }
        (Rule::Scores { ranks: ranks(scores.collect()) }, true)
    };
    let unknown = match gguf.u32(&key("unknown_token_id"))? {
        Some(id) if (id as usize) < count => Some(id),
        _ => control.get("<unk>").copied(),
    };
    let begin = match gguf.bool(&key("add_bos_token"))?.unwrap_or(begins) {
        true => gguf.u32(&key("bos_token_id"))?.or_else(|| control.get("<s>").copied()),
        false => None,
    };
    if let Some(begin) = begin.filter(|&begin| begin as usize >= count) {
        return Err(broken(gguf.path(), format_args!("tokenizer.ggml.bos_token_id is {begin} of {count} tokens")));
    }
    let all = user_defined.iter().chain(&control).map(|(text, &id)| (text.clone(), id)).collect();
    let tokenizer = GgufTokenizer {
        merger: Merger { index, rule, bytes, unknown: unknown.filter(|_| !byte_level) },
        all: Specials::new(all)?,
        always: Specials::new(user_defined)?,
        space_prefix: gguf.bool(&key("add_space_prefix"))?.unwrap_or(true),
    };
    Ok(Tokenizer { engine: Engine::Gguf(Box::new(tokenizer)), vocabulary, begin, control, names })
}

/// `"Ġ t"`, … in order of rank. A merge of or into something that is no token can never apply.
fn pairs(merges: super::gguf::Strings<'_>, index: &PieceIndex) -> PairMap {
    let mut map = PairMap::with_capacity_and_hasher(merges.len(), Default::default());
    let mut whole = Vec::new();
    for (rank, text) in merges.enumerate() {
        // The first character may itself be a space in very old files.
        let Some(space) = text.iter().skip(1).position(|&byte| byte == b' ').map(|at| at + 1) else { continue };
        whole.clear();
        put_piece(&text[..space], true, &mut whole);
        let middle = whole.len();
        put_piece(&text[space + 1..], true, &mut whole);
        let (left, right) = whole.split_at(middle);
        let (Some(left), Some(right)) = (index.find(left), index.find(right)) else { continue };
        let Some(merged) = index.find(&whole) else { continue };
        map.entry(merge::pair(left, right)).or_insert((rank as u32, merged));
    }
    map
}

/// 0 for the highest score; equal for equal scores.
fn ranks(scores: Vec<f32>) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    let mut ranks = vec![0; scores.len()];
    let mut rank = 0;
    for (at, &token) in order.iter().enumerate() {
        if at > 0 && scores[order[at - 1] as usize] != scores[token as usize] {
            rank += 1;
        }
        ranks[token as usize] = rank;
    }
    ranks
}

fn gguf_names(gguf: &Gguf, texts: &super::gguf::Strings<'_>) -> Result<Vec<(&'static str, String)>> {
    let mut names = Vec::new();
    for (name, role) in ROLES {
        let Some(id) = gguf.u32(&format!("tokenizer.ggml.{role}_token_id"))? else { continue };
        let Some(text) = texts.clone().nth(id as usize) else { continue };
        names.push((name, String::from_utf8_lossy(text).into_owned()));
    }
    Ok(names)
}

fn gguf_ends(gguf: &Gguf, count: usize, control: &HashMap<String, u32>) -> Result<Vec<u32>> {
    let mut ends: Vec<u32> = END_MARKERS.iter().filter_map(|marker| control.get(*marker).copied()).collect();
    for role in ["eos", "eot", "eom"] {
        ends.extend(gguf.u32(&format!("tokenizer.ggml.{role}_token_id"))?.filter(|&id| (id as usize) < count));
    }
    if ends.is_empty() {
        return Err(broken(gguf.path(), "names no token that ends an answer (tokenizer.ggml.eos_token_id)"));
    }
    Ok(ends)
}

fn from_folder(folder: &Path, config: &Value) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    let tokenizer = JsonTokenizer::open(&path)?;
    let settings = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let generation = read_json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let tokens = tokenizer.tokens().map_err(|error| error.context(path.display()))?;
    // Ids may have gaps, but a file of a few tokens cannot ask for a table of billions.
    let count = tokens.iter().map(|token| token.id as usize + 1).max().unwrap_or(0);
    if count > 2 * tokens.len() + (1 << 16) {
        return Err(broken(&path, format_args!("has {} tokens with ids up to {}", tokens.len(), count - 1)));
    }
    let mut pieces = vec![Vec::new(); count];
    let (mut control, mut ids) = (HashMap::new(), HashMap::new());
    for token in tokens {
        pieces[token.id as usize] = token.piece;
        if token.special {
            control.insert(token.text.clone(), token.id);
        }
        ids.insert(token.text, token.id);
    }
    // "eos_token": "</s>" or {"content": "</s>", …}
    let named = |name: &str| {
        let value = settings.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    };
    let names: Vec<_> = ROLES.iter().filter_map(|&(name, _)| Some((name, named(name)?.to_owned()))).collect();
    let mut ends: Vec<u32> = END_MARKERS.iter().filter_map(|marker| control.get(*marker).copied()).collect();
    ends.extend(named("eos_token").and_then(|text| ids.get(text).copied()));
    for source in [&generation, config] {
        // One id or several.
        let listed = source.get("eos_token_id").map_or(&[][..], |value| match value {
            Value::Array(list) => list,
            single => std::slice::from_ref(single),
        });
        ends.extend(listed.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    ends.retain(|&id| (id as usize) < count);
    if ends.is_empty() {
        return Err(broken(folder, "names no token that ends an answer (eos_token_id in generation_config.json)"));
    }
    let begin = match settings.get("add_bos_token").and_then(Value::as_bool) {
        Some(true) => named("bos_token").and_then(|text| ids.get(text).copied()),
        Some(false) => None,
        None => tokenizer.first_token(),
    };
    let vocabulary = Arc::new(Vocabulary::new(pieces, ends));
    Ok(Tokenizer { engine: Engine::Json(Box::new(tokenizer)), vocabulary, begin, control, names })
}

#[cfg(test)]
mod tests;
