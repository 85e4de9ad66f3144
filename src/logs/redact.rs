//! Secrets are taken out of what is logged, before it touches the disk or leaves the house.
//!
//! ```text
//!   body ─ suspects? ─no─────────────────────────────────────────> as it was, not copied
//!             └yes─> texts of JSON, of streams, of forms (json.rs) ─> secrets (find.rs, number.rs) ─> replaced where they are written
//! ```
//!
//! - What is found: keys of the known providers, tokens behind `Bearer` and names like `api_key`, JWTs, private keys, e-mail addresses, payment
//!   cards, phone numbers, and what the operator's own rules match. `[REDACTED:key]` and the like stand in their place.
//! - JSON stays JSON: a secret is found behind its escapes (`\u0040`, a document within a string) and replaced inside of its string. A card
//!   that is a bare number becomes a string.
//! - Streams are read as their readers do: the pieces of one text (a choice, a block, the arguments of a tool) are joined, and each piece of a
//!   secret is taken out of its own event.
//! - Of a body that was cut, the last word goes too: it may be the first half of a secret.
//! - What is no UTF-8 is left alone: pictures, sound, and bodies that are still compressed.
//!
//! Pure. Not a guard: what the caller and the model see is not changed.

mod find;
mod json;
mod key;
mod known;
mod marks;
mod number;
#[cfg(test)]
#[path = "redact/stream_test.rs"]
mod stream_test;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use crate::base::Result;
use crate::logs::record::{Body, Record};
use find::{Finder, Label, Span};
use json::{Leaf, Text};

/// A body with more texts of one stream than this is one that nobody reads.
const LONGEST: usize = u32::MAX as usize;
/// Documents within strings within strings.
const LEVELS: usize = 3;

/// What is taken out.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Keys, tokens, passwords and private keys.
    pub keys: bool,
    /// E-mail addresses.
    pub emails: bool,
    /// Numbers of payment cards.
    pub cards: bool,
    /// Phone numbers.
    pub phones: bool,
    /// What the operator adds.
    pub custom: Vec<Rule>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { keys: true, emails: true, cards: true, phones: true, custom: Vec::new() }
    }
}

/// A pattern of the operator's.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What it is called in `[REDACTED:name]`.
    pub name: Box<str>,
    /// A regular expression in the syntax of the `regex` crate; it sees one text at a time: a string of JSON, the joined text of a stream.
    pub pattern: Box<str>,
    /// What stands in place of a match, without quotes, backslashes and control characters. Left out: `[REDACTED:name]`.
    pub replacement: Option<Box<str>>,
}

/// Rules, ready. One serves all records of a thread or of many.
pub struct Redactor(Option<Finder>);

impl Redactor {
    /// Compiles rules.
    ///
    /// # Errors
    /// Names the custom rule whose pattern or replacement cannot be taken.
    pub fn new(rules: &Rules) -> Result<Self> {
        let is_idle = !rules.keys && !rules.emails && !rules.cards && !rules.phones && rules.custom.is_empty();
        Ok(Self(if is_idle { None } else { Some(Finder::new(rules)?) }))
    }

    /// Takes secrets out of bodies, metadata, path, event and user agent; returns whether anything was found.
    pub fn apply(&self, record: &mut Record) -> bool {
        let Record { asked, request_content_type, answered, response_content_type, .. } = record;
        let bodies = [(asked, request_content_type), (answered, response_content_type)];
        let is_changed =
            bodies.map(|(body, kind)| self.clean(body, kind.as_deref().unwrap_or_default())).contains(&true);
        self.texts(record) | is_changed
    }

    /// The same of one body.
    pub fn clean(&self, body: &mut Body, kind: &str) -> bool {
        let Some(kept) = self.body(body, kind) else { return false };
        // A body that was whole still is; of one that was cut, the size tells.
        let is_complete = body.is_complete();
        body.kept = kept;
        body.size = if is_complete { body.kept.len() as u64 } else { body.size.max(body.kept.len() as u64 + 1) };
        true
    }

    /// The same of all but the bodies.
    pub fn texts(&self, record: &mut Record) -> bool {
        let texts = [&mut record.metadata, &mut record.event, &mut record.user_agent].into_iter().flatten();
        let mut is_changed = false;
        for text in std::iter::once(&mut record.path).chain(texts) {
            if let Cow::Owned(clean) = self.text(text) {
                *text = clean.into();
                is_changed = true;
            }
        }
        is_changed
    }

    /// A text or a document without its secrets.
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.0.as_ref().and_then(|finder| document(finder, text, false)).map_or(Cow::Borrowed(text), Cow::Owned)
    }

    /// A body without its secrets; `None`: it has none.
    pub fn body(&self, body: &Body, kind: &str) -> Option<Bytes> {
        let finder = self.0.as_ref()?;
        let (kept, is_cut) = (&body.kept[..], !body.is_complete());
        if kept.len() > LONGEST {
            return None;
        }
        match std::str::from_utf8(kept) {
            Ok(text) => document(finder, text, is_cut).map(Bytes::from),
            // The cut fell into a character, which goes with the word that it is part of.
            Err(error) if error.error_len().is_none() && is_cut => {
                let text = std::str::from_utf8(&kept[..error.valid_up_to()]).ok()?;
                Some(document(finder, text, is_cut).unwrap_or_else(|| text.to_owned()).into())
            }
            Err(_) => form(finder, kept, kind),
        }
    }
}

/// The parts of a form that are text, beside others that are not.
fn form(finder: &Finder, body: &[u8], kind: &str) -> Option<Bytes> {
    let (_, boundary) = kind.split_once("boundary=").filter(|_| kind.starts_with("multipart/"))?;
    let boundary = boundary.split(';').next()?.trim_matches('"');
    let line = format!("--{boundary}");
    let (mut out, mut at, mut is_changed) = (Vec::with_capacity(body.len()), 0, false);
    let ends = memchr::memmem::find_iter(body, &line).skip(1).chain(std::iter::once(body.len()));
    for end in ends {
        let part = &body[at..end];
        match std::str::from_utf8(part).ok().and_then(|text| document(finder, text, false)) {
            Some(clean) => {
                out.extend_from_slice(clean.as_bytes());
                is_changed = true;
            }
            None => out.extend_from_slice(part),
        }
        at = end;
    }
    is_changed.then(|| out.into())
}

/// A text, a document or a stream of documents; `None`: there is nothing to take out.
fn document(finder: &Finder, body: &str, is_cut: bool) -> Option<String> {
    let form = Form::of(body);
    // A stream may hide in its pieces what it does not show as it is written, and so may an array of them.
    let is_stream = form == Form::Stream || (form == Form::Json && is_list(body));
    if !is_stream && !is_cut && !finder.suspects(body) {
        return None;
    }
    let mut leaves = Vec::new();
    match form {
        Form::Text => leaves.push(text_leaf(0..body.len())),
        Form::Json => json::leaves(body, 0..body.len(), &mut leaves),
        Form::Stream => events(body, &mut leaves),
    }
    let mut edits = Edits { finder, edits: Vec::new(), found: Vec::new() };
    for leaf in &leaves {
        edits.leaf(body, leaf);
    }
    // Only in streams and arrays are there texts of several pieces.
    for pieces in json::channels(&leaves) {
        if pieces.len() > 1 {
            edits.search(Text::joined(body, pieces.iter().map(|leaf| leaves[*leaf].place.clone())));
        }
        if is_cut && is_stream {
            // The next piece might have gone on.
            edits.cut(&Text::joined(body, pieces.iter().map(|leaf| leaves[*leaf].place.clone())));
        }
    }
    if is_cut && let Some(last) = leaves.last().filter(|last| form == Form::Text || last.is_open) {
        edits.cut(&Text::plain(body, last.place.clone()));
    }
    edits.apply(body)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
    Stream,
}

impl Form {
    fn of(body: &str) -> Self {
        let start = body.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
        let is_events = ["data:", "event:", "id:", "retry:", ":"].iter().any(|field| start.starts_with(field));
        if is_events && (memchr::memmem::find(body.as_bytes(), b"\ndata:").is_some() || start.starts_with("data:")) {
            return Self::Stream;
        }
        match start.as_bytes().first() {
            Some(b'[') => Self::Json,
            // Several documents one behind the other, a line each.
            Some(b'{') if is_lines(start) => Self::Stream,
            Some(b'{' | b'"') => Self::Json,
            // A document that is one number.
            Some(b'0'..=b'9') if start.bytes().all(|byte| byte.is_ascii_digit()) => Self::Json,
            _ => Self::Text,
        }
    }
}

/// An array of documents.
fn is_list(body: &str) -> bool {
    let inside = body.trim_start().strip_prefix('[').map(str::trim_start);
    inside.is_some_and(|inside| inside.starts_with('{'))
}

/// A document a line.
fn is_lines(body: &str) -> bool {
    // Most documents are one line.
    let Some(first) = memchr::memchr(b'\n', body.as_bytes()) else { return false };
    let ends = memchr::memmem::find_iter(&body.as_bytes()[first..], b"\n{").map(|end| first + end);
    ends.map(|end| body[..end].trim_end_matches('\r')).any(|line| line.ends_with('}'))
}

fn text_leaf(place: Range<usize>) -> Leaf {
    Leaf { place, name: None, is_string: true, is_open: true, channel: None }
}

/// The leaves of a stream of events, or of documents a line each.
fn events(body: &str, leaves: &mut Vec<Leaf>) {
    let mut at = 0;
    for line in body.split_inclusive('\n') {
        let written = line.trim_end_matches(['\r', '\n']);
        let data = written.strip_prefix("data:").map_or(written, str::trim_start);
        let place = at + written.len() - data.len()..at + written.len();
        at += line.len();
        match data.as_bytes().first() {
            None => {}
            Some(b'{' | b'[' | b'"') => json::leaves(body, place, leaves),
            // Texts without form go on in the next event.
            Some(_) => {
                let channel = written.starts_with("data:").then_some(0);
                leaves.push(Leaf { channel, is_open: at == body.len(), ..text_leaf(place) });
            }
        }
    }
}

/// What is to be replaced, and by what.
struct Edits<'a> {
    finder: &'a Finder,
    /// Where, by which label; none: what stands there goes without a word.
    edits: Vec<(Range<usize>, Option<Label>, bool)>,
    found: Vec<Span>,
}

impl Edits<'_> {
    fn leaf(&mut self, body: &str, leaf: &Leaf) {
        let written = &body[leaf.place.clone()];
        self.found.clear();
        let named = leaf.name.as_ref().and_then(|name| self.finder.find_named(&body[name.clone()], written));
        if let Some(label) = named {
            self.edits.push((leaf.place.clone(), Some(label), !leaf.is_string));
            return;
        }
        if leaf.is_string {
            if !self.finder.is_worth(written.len()) {
                return;
            }
            if memchr::memchr(b'\\', written.as_bytes()).is_some() {
                self.search(Text::plain(body, leaf.place.clone()));
                return;
            }
            // What has no escapes is meant as it is written.
            let begin = leaf.place.start;
            self.finder.find(written, &mut self.found);
            let found = self.found.drain(..);
            self.edits.extend(found.map(|(part, label)| (begin + part.start..begin + part.end, Some(label), false)));
        } else if number::is_card(written) {
            self.found.clear();
            self.finder.find(written, &mut self.found);
            let label = self.found.iter().find(|(place, _)| place.len() == written.len()).map(|(_, label)| *label);
            self.edits.extend(label.map(|label| (leaf.place.clone(), Some(label), true)));
        }
    }

    /// Looks for secrets in a text, and in the text that it is when its escapes are meant.
    fn search(&mut self, text: Text) {
        let mut text = Some(text);
        for _ in 0..LEVELS {
            let Some(level) = text else { return };
            self.found.clear();
            self.finder.find(&level.text, &mut self.found);
            for (part, label) in std::mem::take(&mut self.found) {
                self.replace(&level, &part, label);
            }
            text = level.deeper();
        }
    }

    /// Takes the last word of a text that was cut.
    fn cut(&mut self, text: &Text) {
        let begin = find::tail(&text.text);
        self.replace(text, &(begin..text.text.len()), Label::Cut);
    }

    fn replace(&mut self, text: &Text, part: &Range<usize>, label: Label) {
        let mut label = Some(label);
        for place in text.places(part) {
            self.edits.push((place, label.take(), false));
        }
    }

    fn apply(mut self, body: &str) -> Option<String> {
        if self.edits.is_empty() {
            return None;
        }
        // What overlaps is one: by the word of the one that begins first, or is longer.
        self.edits.sort_by_key(|(place, label, _)| (place.start, std::cmp::Reverse(place.end), label.is_none()));
        let mut out = String::with_capacity(body.len());
        let mut edits = self.edits.into_iter().peekable();
        let mut at = 0;
        while let Some((mut place, mut label, mut is_bare)) = edits.next() {
            while let Some((next, other, bare)) = edits.next_if(|(next, ..)| next.start < place.end || *next == place) {
                place.end = place.end.max(next.end);
                label = label.or(other);
                is_bare |= bare;
            }
            out.push_str(&body[at..place.start]);
            let quote = if is_bare { "\"" } else { "" };
            out.push_str(quote);
            out.push_str(label.map_or("", |label| self.finder.replacement(label)));
            out.push_str(quote);
            at = place.end;
        }
        out.push_str(&body[at..]);
        Some(out)
    }
}
