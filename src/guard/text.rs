//! Finds the text in a body: strings of JSON documents by the fields they stand under, fields of forms, plain text.
//!
//!     body --first byte, content type--> JSON   --> strings below known fields, else all strings
//!                                        form   --> its fields
//!                                        text   --> itself
//!                                        media  --> nothing
//!
//! Documents are walked without being built, so that a field that stands twice is seen twice. What does not parse is given as it
//! stands, once raw and once with its escapes undone: a more forgiving parser upstream might read it.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Told each text and where it stands.
pub(super) type Found<'f> = &'f mut dyn FnMut(&dyn fmt::Display, &str);

/// Top-level fields of requests with text that a person wrote.
const REQUEST_FIELDS: &[&str] = &[
    "messages",
    "prompt",
    "input",
    "inputs",
    "system",
    "instructions",
    "contents",
    "systemInstruction",
    "system_instruction",
    "message",
    "chat_history",
    "preamble",
    "documents",
    "text",
    "texts",
    "query",
    "context",
    "contexts",
    "suffix",
    "negative_prompt",
    "inputText",
    "content",
];

/// Top-level fields of answers with text that a model wrote.
const RESPONSE_FIELDS: &[&str] = &[
    "choices",
    "content",
    "candidates",
    "output",
    "outputs",
    "output_text",
    "result",
    "results",
    "message",
    "response",
    "text",
    "tool_calls",
    "generations",
    "generation",
    "generated_text",
    "completion",
    "translated_text",
    "summary",
    "description",
    "data",
];

/// Fields that belong to the protocol: their values are names and ids, not text.
pub(super) const PROTOCOL_FIELDS: &[&str] = &[
    "role",
    "type",
    "id",
    "object",
    "model",
    "tool_call_id",
    "tool_use_id",
    "call_id",
    "item_id",
    "media_type",
    "mime_type",
    "mimeType",
    "format",
    "detail",
    "cache_control",
    "signature",
    "thoughtSignature",
    "encrypted_content",
    "finish_reason",
    "finishReason",
    "stop_reason",
    "created_at",
    "system_fingerprint",
    "embedding",
    "p",
];

/// Fields that hold what a tool is called with: there every name is the caller's own.
const FREE_FIELDS: &[&str] = &["arguments", "args", "parameters", "input", "response"];

/// Fields that may hold a picture or sound in base64.
const MEDIA_FIELDS: &[&str] = &["url", "image_url", "file_data", "data", "image", "audio", "b64_json", "image_b64"];

/// The text of a request's body.
pub(super) fn request(body: &[u8], content_type: &str, found: Found) {
    search(body, content_type, REQUEST_FIELDS, found);
}

/// The text of an answer's body.
pub(super) fn response(body: &[u8], content_type: &str, found: Found) {
    search(body, content_type, RESPONSE_FIELDS, found);
}

/// Whether a content type says that there is no text.
pub(super) fn is_media(content_type: &str) -> bool {
    let essence = essence(content_type);
    ["audio/", "image/", "video/", "font/"].iter().any(|kind| essence.starts_with(kind))
        || ["application/octet-stream", "application/zip", "application/pdf", "application/gzip"]
            .contains(&essence.as_str())
}

/// A content type without its parameters, in lower case.
pub(super) fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn search(body: &[u8], content_type: &str, fields: &[&str], found: Found) {
    if let Some(narrow) = utf8_of_utf16(body) {
        return search(narrow.as_bytes(), content_type, fields, found);
    }
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let essence = essence(content_type);
    // What looks like JSON is read as JSON whatever it is called: the server behind us may do the same.
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    if matches!(first, Some(b'{' | b'[')) || essence.contains("json") {
        document(body, fields, found);
    } else if essence == "multipart/form-data" {
        multipart(body, content_type, fields, found);
    } else if essence == "application/x-www-form-urlencoded" {
        for field in body.split(|byte| *byte == b'&') {
            let spaced: Vec<u8> = field.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
            found(&"the form", &percent_encoding::percent_decode(&spaced).decode_utf8_lossy());
        }
    } else if !is_media(content_type) {
        found(&"the body", &String::from_utf8_lossy(body));
    }
}

fn document(body: &[u8], fields: &[&str], found: Found) {
    let mut known = false;
    let root = Place::Root;
    let mut top = serde_json::Deserializer::from_slice(body);
    let outcome = Top { fields, known: &mut known, place: &root, found }.deserialize(&mut top).and_then(|()| top.end());
    if outcome.is_err() {
        return as_it_stands(body, found);
    }
    if known {
        return;
    }
    let mut whole = serde_json::Deserializer::from_slice(body);
    if (Walk { mode: Mode::All, place: &root, found }).deserialize(&mut whole).is_err() {
        as_it_stands(body, found);
    }
}

/// Text that is not JSON although it should be.
fn as_it_stands(body: &[u8], found: Found) {
    let raw = String::from_utf8_lossy(body);
    found(&"the body", &raw);
    if raw.contains('\\') {
        found(&"the body", &unescaped(&raw));
    }
}

/// Undoes JSON's escapes wherever they stand; halves of a character become U+FFFD.
pub(super) fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut units: Vec<u16> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        if !before.is_empty() {
            flush(&mut units, &mut out);
            out.push_str(before);
        }
        let code = escape.get(2..6).and_then(|digits| u16::from_str_radix(digits, 16).ok());
        if let (Some(b'u'), Some(unit)) = (escape.as_bytes().get(1), code) {
            units.push(unit);
            rest = &escape[6..];
            continue;
        }
        flush(&mut units, &mut out);
        let mut chars = escape[1..].chars();
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('b') => out.push('\u{8}'),
            Some('f') => out.push('\u{c}'),
            Some(other) => out.push(other),
            None => {}
        }
        rest = chars.as_str();
    }
    flush(&mut units, &mut out);
    out.push_str(rest);
    out
}

fn flush(units: &mut Vec<u16>, out: &mut String) {
    out.extend(char::decode_utf16(units.drain(..)).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)));
}

/// Some servers read JSON in UTF-16, recognised by its mark or by the zero next to the first letter.
fn utf8_of_utf16(body: &[u8]) -> Option<String> {
    let unit: fn([u8; 2]) -> u16 = match body {
        [0xff, 0xfe, ..] => u16::from_le_bytes,
        [0xfe, 0xff, ..] => u16::from_be_bytes,
        [b'{' | b'[' | b'"' | b' ' | b'\n', 0, ..] => u16::from_le_bytes,
        [0, b'{' | b'[' | b'"' | b' ' | b'\n', ..] => u16::from_be_bytes,
        _ => return None,
    };
    let units: Vec<u16> = body.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
    let text = String::from_utf16_lossy(&units);
    let text = text.trim_start_matches('\u{feff}');
    // Sound and pictures may begin like this by chance.
    text.starts_with(['{', '[', '"', ' ', '\n', '\r', '\t']).then(|| text.to_owned())
}

/// Parts that are not files, and files of text.
fn multipart(body: &[u8], content_type: &str, fields: &[&str], found: Found) {
    let boundary = content_type.split(';').find_map(|part| {
        let (name, value) = part.split_once('=')?;
        name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
    });
    let Some(boundary) = boundary.filter(|boundary| !boundary.is_empty()) else {
        return as_it_stands(body, found);
    };
    let mark = [b"--", boundary.as_bytes()].concat();
    for part in split(body, &mark) {
        let Some(end) = find(part, b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&part[..end]).to_ascii_lowercase();
        let content = &part[end + 4..];
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type:")).unwrap_or_default().trim();
        let is_text = kind.starts_with("text/") || kind.contains("json");
        if kind.contains("json") {
            document(content, fields, found);
        } else if is_text || !head.contains("filename") {
            found(&"the form", &String::from_utf8_lossy(content));
        }
    }
}

fn split<'b>(mut body: &'b [u8], mark: &'b [u8]) -> impl Iterator<Item = &'b [u8]> {
    std::iter::from_fn(move || {
        if body.is_empty() {
            return None;
        }
        let end = find(body, mark);
        let part = &body[..end.unwrap_or(body.len())];
        body = end.map_or(&[], |end| &body[end + mark.len()..]);
        Some(part)
    })
}

/// Jumps from first byte to first byte, so that files of many megabytes cost little.
fn find(body: &[u8], mark: &[u8]) -> Option<usize> {
    let first = *mark.first()?;
    let mut at = 0;
    loop {
        at += body[at..].iter().position(|byte| *byte == first)?;
        if body[at..].starts_with(mark) {
            return Some(at);
        }
        at += 1;
    }
}

/// Where a text stands; written out only when something is found there.
enum Place<'p> {
    Root,
    Field(&'p Place<'p>, &'p str),
    Item(&'p Place<'p>, usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("the document"),
            Self::Field(Self::Root, name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Item(Self::Root, index) => write!(f, "[{index}]"),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Every string but those of the protocol and media.
    Text,
    /// Every string.
    All,
    /// A string that is text unless it is base64.
    Media,
}

/// The outermost value: picks the known fields of an object, and notes whether there was one.
struct Top<'w, 'f> {
    fields: &'w [&'w str],
    known: &'w mut bool,
    place: &'w Place<'w>,
    found: Found<'f>,
}

impl<'de> DeserializeSeed<'de> for Top<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Values that hold no text, for either visitor.
macro_rules! no_text {
    () => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON value")
        }
        fn visit_bool<E>(self, _: bool) -> Result<(), E> {
            Ok(())
        }
        fn visit_i64<E>(self, _: i64) -> Result<(), E> {
            Ok(())
        }
        fn visit_u64<E>(self, _: u64) -> Result<(), E> {
            Ok(())
        }
        fn visit_f64<E>(self, _: f64) -> Result<(), E> {
            Ok(())
        }
        fn visit_unit<E>(self) -> Result<(), E> {
            Ok(())
        }
    };
}

impl<'de> Visitor<'de> for Top<'_, '_> {
    type Value = ();
    no_text!();

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key_seed(Name)? {
            if self.fields.contains(&&*name) {
                *self.known = true;
                let place = Place::Field(self.place, &name);
                let mode = if MEDIA_FIELDS.contains(&&*name) { Mode::Media } else { Mode::Text };
                fields.next_value_seed(Walk { mode, place: &place, found: self.found })?;
            } else {
                fields.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Any value below.
struct Walk<'w, 'f> {
    mode: Mode,
    place: &'w Place<'w>,
    found: Found<'f>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_, '_> {
    type Value = ();
    no_text!();

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.mode != Mode::Media || !is_base64(text) {
            (self.found)(self.place, text);
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut index = 0;
        loop {
            let place = Place::Item(self.place, index);
            let item = Walk { mode: self.mode, place: &place, found: self.found };
            if items.next_element_seed(item)?.is_none() {
                return Ok(());
            }
            index += 1;
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key_seed(Name)? {
            let place = Place::Field(self.place, &name);
            let mode = match self.mode {
                Mode::All => Mode::All,
                _ if FREE_FIELDS.contains(&&*name) => Mode::All,
                _ if MEDIA_FIELDS.contains(&&*name) => Mode::Media,
                _ => Mode::Text,
            };
            if mode == Mode::Text && PROTOCOL_FIELDS.contains(&&*name) {
                fields.next_value::<IgnoredAny>()?;
            } else {
                fields.next_value_seed(Walk { mode, place: &place, found: self.found })?;
            }
        }
        Ok(())
    }
}

/// The name of a field, borrowed where it has no escapes.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name {
    type Value = Cow<'de, str>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }
    fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(name))
    }
    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(name.to_owned()))
    }
}

/// Whether a string is a data URL, or long and of base64's letters only as far as one must look to tell it from words.
pub(super) fn is_base64(text: &str) -> bool {
    let head = &text.as_bytes()[..text.len().min(256)];
    if head.starts_with(b"data:") {
        return find(head, b";base64,").is_some();
    }
    text.len() >= 256 && head.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/-_=".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone_and_halves_of_characters_replaced() {
        let check = |text: &str, expected: &str| assert_eq!(unescaped(text), expected, "{text}");
        check("plain", "plain");
        check(r"\u0041\n\t\\\/", "A\n\t\\/");
        check(r"\ud83d\ude00!", "😀!");
        check(r"\ud83d x \ude00", "\u{fffd} x \u{fffd}");
        check(r"\u00", "u00");
        check(r"end\", "end");
        check(r"\ué123", "ué123");
    }

    #[test]
    fn base64_is_told_from_words() {
        let check = |text: String, expected: bool| assert_eq!(is_base64(&text), expected, "{text}");
        check("QUJD".repeat(100), true);
        check("data:image/png;base64,QUJD".to_owned(), true);
        check("data:,hello".to_owned(), false);
        check("QUJD".to_owned(), false);
        check("a long text of words ".repeat(40), false);
    }
}
