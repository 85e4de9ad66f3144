//! The texts in a document or a stream of documents: strings as they are meant, and where each of their bytes is written.
//!
//! ```text
//!   data: {"choices":[{"index":0,"delta":{"content":"sk-a"}}]} ─┐ same channel       ┌─ Text "sk-abc…", its bytes
//!   data: {"choices":[{"index":0,"delta":{"content":"bc…"}}]} ──┴──── joined ────────┴─ lie in both events
//! ```
//!
//! Reads what is there, whole or cut off, JSON or nearly: it never fails, and a string without an end ends with the body. A channel is a path
//! of names, with the numbers that events give their choices, blocks and parts instead of positions.

use std::collections::HashMap;
use std::ops::Range;

/// Deeper documents are read no deeper: what lies below is one level.
const DEEPEST: usize = 512;

/// A string or a number.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    /// Where it is written, without quotes.
    pub(super) place: Range<usize>,
    /// Where the name of its field is written.
    pub(super) name: Option<Range<usize>>,
    pub(super) is_string: bool,
    /// The body ends before it does.
    pub(super) is_open: bool,
    /// Which text it is a piece of, if it may be one.
    pub(super) channel: Option<u64>,
}

/// What is open while a document is read.
struct Frame {
    parent: usize,
    is_array: bool,
    /// Of the field of the parent, or its position.
    step: u64,
    /// Of the numbers that it gives itself.
    index: u64,
    count: u64,
}

/// The leaves of a document that is written at `place`, one behind another where there are several; texts without form are one leaf.
pub(super) fn leaves(body: &str, place: Range<usize>, out: &mut Vec<Leaf>) {
    let bytes = body.as_bytes();
    // The root, whose parent is itself.
    let mut frames = Vec::with_capacity(16);
    frames.push(Frame { parent: 0, is_array: false, step: 0, index: 0, count: 0 });
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    let (mut top, mut depth, mut name, mut at) = (0, 0usize, None::<Range<usize>>, place.start);
    while at < place.end {
        match bytes[at] {
            b'{' | b'[' if depth < DEEPEST => {
                let parent = &mut frames[top];
                // The pieces of a stream may be one array: their positions tell nothing apart.
                let step = match (&name, parent.is_array && depth > 1) {
                    (Some(name), _) => mix(SEED, &body.as_bytes()[name.clone()]),
                    (None, true) => parent.count,
                    (None, false) => 0,
                };
                frames.push(Frame { parent: top, is_array: bytes[at] == b'[', step, index: 0, count: 0 });
                (top, depth, name) = (frames.len() - 1, depth + 1, None);
                at += 1;
            }
            b'}' | b']' if depth > 0 => {
                (top, depth, name) = (frames[top].parent, depth - 1, None);
                at += 1;
            }
            b',' => {
                frames[top].count += 1;
                name = None;
                at += 1;
            }
            b'"' => {
                let end = end_of_string(bytes, at + 1, place.end);
                let (text, is_open) = (at + 1..end, end == place.end);
                at = (end + 1).min(place.end);
                let colon =
                    bytes[at..place.end].iter().position(|byte| !byte.is_ascii_whitespace()).map(|gap| at + gap);
                if let Some(colon) = colon.filter(|colon| bytes[*colon] == b':' && !frames[top].is_array) {
                    out.push(Leaf { place: text.clone(), name: None, is_string: true, is_open: false, channel: None });
                    (name, at) = (Some(text), colon + 1);
                    continue;
                }
                // A text in an array belongs to the array's own name, which is not looked for.
                let is_piece = name.as_ref().is_some_and(|name| is_piece(&body[name.clone()]));
                if is_piece {
                    pieces.push((out.len(), top));
                }
                out.push(Leaf { place: text, name: name.take(), is_string: true, is_open, channel: None });
            }
            b'-' | b'0'..=b'9' => {
                let length = bytes[at..place.end]
                    .iter()
                    .position(|byte| !matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'));
                let number = at..length.map_or(place.end, |length| at + length);
                at = number.end;
                if let Some(name) = name.as_ref().filter(|name| is_index(&body[(*name).clone()])) {
                    let named = mix(frames[top].index, &bytes[name.clone()]);
                    frames[top].index = mix(named, &bytes[number.clone()]);
                }
                let is_open = at == place.end;
                out.push(Leaf { place: number, name: name.clone(), is_string: false, is_open, channel: None });
            }
            _ => at += 1,
        }
    }
    for (leaf, frame) in pieces {
        let field = out[leaf].name.clone().map_or(SEED, |name| mix(SEED, &bytes[name]));
        out[leaf].channel = Some(channel(&frames, frame, field));
    }
}

/// The way from a field to the root as one number, once all numbers on it are known.
fn channel(frames: &[Frame], mut at: usize, field: u64) -> u64 {
    let mut way = field;
    while at != 0 {
        let Frame { parent, step, index, .. } = &frames[at];
        // Its own number counts, and not its place.
        let is_numbered = *index != 0 && frames[*parent].is_array;
        way = mix(mix(way, &(if is_numbered { 0 } else { *step }).to_le_bytes()), &index.to_le_bytes());
        at = *parent;
    }
    way
}

/// Whether streams send fields of this name piece by piece.
fn is_piece(name: &str) -> bool {
    matches!(
        name,
        "content"
            | "text"
            | "delta"
            | "reasoning_content"
            | "reasoning"
            | "thinking"
            | "partial_json"
            | "arguments"
            | "response"
            | "refusal"
            | "transcript"
            | "generated_text"
            | "outputText"
            | "completion"
            | "output"
            | "token"
            | "message"
            | "input"
    )
}

/// Whether numbers of this name tell one piece's text from another's.
fn is_index(name: &str) -> bool {
    matches!(name, "index" | "output_index" | "content_index" | "summary_index")
}

const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a: short names, and no harm in two that are taken for one.
fn mix(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ SEED, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn end_of_string(bytes: &[u8], mut at: usize, end: usize) -> usize {
    while let Some(found) = memchr::memchr2(b'"', b'\\', &bytes[at..end]) {
        at += found;
        if bytes[at] == b'"' {
            return at;
        }
        at = (at + 2).min(end);
    }
    end
}

/// A text as it is meant, and where it is written.
#[derive(Clone, Default, Debug)]
pub(super) struct Text {
    pub(super) text: String,
    /// Of each byte, and of the end.
    places: Vec<u32>,
    /// Where each piece ends in the text, and where that is written.
    pieces: Vec<(usize, u32)>,
}

impl Text {
    /// A string as it is written, without its escapes.
    pub(super) fn plain(body: &str, place: Range<usize>) -> Self {
        let mut text = Self::default();
        text.push(body, place);
        text
    }

    /// Strings one behind the other, without their escapes.
    pub(super) fn joined(body: &str, places: impl Iterator<Item = Range<usize>>) -> Self {
        let mut text = Self::default();
        places.for_each(|place| text.push(body, place));
        text
    }

    fn push(&mut self, body: &str, place: Range<usize>) {
        self.places.truncate(self.text.len());
        unescape(&body[place.clone()], |part, at, length| {
            self.text.push_str(part);
            let base = (place.start + at) as u32;
            // Bytes that are written as they are lie each in its place; those of an escape all in one.
            self.places
                .extend((0..part.len() as u32).map(|offset| base + if length == part.len() { offset } else { 0 }));
        });
        self.places.push(place.end as u32);
        self.pieces.push((self.text.len(), place.end as u32));
    }

    /// The text once more without escapes: of a document that lies in a string. Nothing where it has none.
    pub(super) fn deeper(&self) -> Option<Self> {
        if !self.text.contains('\\') {
            return None;
        }
        let mut deeper = Self::default();
        let mut ends = self.pieces.iter().copied().peekable();
        unescape(&self.text, |part, at, length| {
            let is_escape = length != part.len();
            let mut done = 0;
            // Pieces end between letters as they are, or behind the escape that they end in.
            while let Some((end, place)) = ends.next_if(|(end, _)| *end <= at || (!is_escape && *end < at + length)) {
                deeper.take(&part[done..end.saturating_sub(at)], &self.places[at + done..]);
                done = end.saturating_sub(at);
                deeper.pieces.push((deeper.text.len(), place));
            }
            match is_escape {
                true => {
                    deeper.text.push_str(part);
                    deeper.places.extend(std::iter::repeat_n(self.places[at], part.len()));
                }
                false => deeper.take(&part[done..], &self.places[at + done..]),
            }
        });
        deeper.pieces.extend(ends.map(|(_, place)| (deeper.text.len(), place)));
        deeper.places.push(self.places[self.text.len()]);
        Some(deeper)
    }

    /// Takes over a part of another text as it is.
    fn take(&mut self, part: &str, places: &[u32]) {
        self.text.push_str(part);
        self.places.extend_from_slice(&places[..part.len()]);
    }

    /// Where a part of the text is written: once for each piece that it lies in.
    pub(super) fn places(&self, part: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let first = self.pieces.partition_point(|(end, _)| *end <= part.start);
        let (begin, end) = (part.start, part.end);
        let begins = std::iter::once(begin).chain(self.pieces[first..].iter().map(|(end, _)| *end));
        let places = self.pieces[first..].iter().zip(begins).take_while(move |(_, begin)| *begin < end).map(
            move |((piece, place), begin)| {
                let last = if end >= *piece { *place } else { self.places[end] };
                self.places[begin] as usize..last as usize
            },
        );
        // An empty piece lies nowhere.
        places.filter(|place| !place.is_empty())
    }
}

/// Gives what is written part by part: what is meant, where it is written, and how long that is.
fn unescape(written: &str, mut give: impl FnMut(&str, usize, usize)) {
    let mut at = 0;
    while let Some(found) = memchr::memchr(b'\\', &written.as_bytes()[at..]) {
        if found > 0 {
            give(&written[at..at + found], at, found);
        }
        at += found;
        let (letter, length) = escape(&written[at..]);
        match letter {
            Some(letter) => give(letter.encode_utf8(&mut [0; 4]), at, length),
            None => give(&written[at..at + length], at, length),
        }
        at += length;
    }
    if at < written.len() {
        give(&written[at..], at, written.len() - at);
    }
}

/// What an escape means, and how long it is; one that is none stays as it is.
fn escape(written: &str) -> (Option<char>, usize) {
    let unit = |at: usize| {
        let digits = written.get(at..at + 6)?.strip_prefix("\\u")?;
        u32::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
    };
    let letter = match written.as_bytes().get(1) {
        Some(b'n') => '\n',
        Some(b't') => '\t',
        Some(b'r') => '\r',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(sign @ (b'"' | b'\\' | b'/')) => char::from(*sign),
        Some(b'u') => {
            let Some(first) = unit(0) else { return (None, 1) };
            let pair = unit(6).filter(|second| (0xd800..0xdc00).contains(&first) && (0xdc00..0xe000).contains(second));
            return match pair {
                Some(second) => (char::from_u32(0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)), 12),
                // Half of a pair stands for a letter that nothing looks for.
                None => (Some(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER)), 6),
            };
        }
        _ => return (None, 1),
    };
    (Some(letter), 2)
}

/// The leaves of each channel, in order.
pub(super) fn channels(leaves: &[Leaf]) -> Vec<Vec<usize>> {
    let mut numbers: HashMap<u64, usize> = HashMap::new();
    let mut channels: Vec<Vec<usize>> = Vec::new();
    for (at, channel) in leaves.iter().enumerate().filter_map(|(at, leaf)| Some((at, leaf.channel?))) {
        let number = *numbers.entry(channel).or_insert(channels.len());
        if number == channels.len() {
            channels.push(Vec::new());
        }
        channels[number].push(at);
    }
    channels
}
