//! Secrets in plain text: where they begin and end, and what they are.
//!
//! ```text
//!   text ─┬─ long runs of letters and digits ─> "sk-…", "eyJ….….…": what keys are made of
//!         ├─ every ':' and '=' ─> "password: …", "api_key=…"      "Bearer …", "Basic …", "-----BEGIN …"
//!         ├─ every '@' ─> e-mail address, password of a URL
//!         ├─ where digits are dense ─> payment cards (Luhn), phone numbers
//!         └─ patterns of the operator
//! ```
//!
//! Prose is passed over many bytes at once, since it has few digits and signs. Each candidate is judged by itself and in linear time. Knows nothing of JSON and
//! streams.

use std::ops::Range;

use memchr::memmem::Finder as Word;
use regex::RegexSet;
use regex::bytes::Regex;

use super::key::{is_dashed, is_word, keys, pem, run, run_back, run_with};
use super::known::{self, NAMES, PEM, WORDS};
use super::marks::{marks, ones};
use super::number::{self, Found, Numbers};
use super::{Rule, Rules};
use crate::base::{Error, Result};

/// What stands where a secret was.
pub(super) const KEY: &str = "[REDACTED:key]";
pub(super) const EMAIL: &str = "[REDACTED:email]";
pub(super) const CARD: &str = "[REDACTED:card]";
pub(super) const PHONE: &str = "[REDACTED:phone]";
/// What may be the first part of a secret, where a body was cut.
pub(super) const CUT: &str = "[REDACTED:cut]";

/// Shorter texts are no secrets, unless their name says so.
const SHORTEST: usize = 6;
/// The shortest secret with the word that tells it: `asic`, a blank, eight letters.
const SHORTEST_TOLD: usize = 13;
/// The shortest head of a private key.
const SHORTEST_PEM: usize = 22;
/// Bytes of a compiled pattern at most.
const MAX_COMPILED: usize = 1 << 20;

/// A secret, and what is to stand in its place.
pub(super) type Span = (Range<usize>, Label);

/// Which replacement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Label {
    Key,
    Email,
    Card,
    Phone,
    Cut,
    Custom(u16),
}

pub(super) struct Finder {
    has_keys: bool,
    has_emails: bool,
    has_cards: bool,
    has_phones: bool,
    /// All words that tell a secret, in one pass.
    words: Regex,
    pem: Word<'static>,
    custom: Vec<(Regex, Box<str>)>,
    any_custom: RegexSet,
}

impl Finder {
    pub(super) fn new(rules: &Rules) -> Result<Self> {
        let broken = |name: &str, error: regex::Error| {
            let message =
                format!("the redaction rule {name:?} is no regular expression of the kind that is taken: {error}");
            Error::bad_field("pattern", message)
        };
        let mut custom = Vec::new();
        for Rule { name, pattern, replacement } in &rules.custom {
            let built = regex::bytes::RegexBuilder::new(pattern).size_limit(MAX_COMPILED).build();
            let built = built.map_err(|error| broken(name, error))?;
            if built.is_match(b"") {
                return Err(Error::bad_field(
                    "pattern",
                    format!("the redaction rule {name:?} finds nothing at all: it must not match an empty text"),
                ));
            }
            let replacement = replacement.clone().unwrap_or_else(|| format!("[REDACTED:{name}]").into());
            if replacement.contains(['"', '\\']) || replacement.contains(char::is_control) {
                let message = format!(
                    "the redaction rule {name:?} must replace by a text without quotes, backslashes and control characters"
                );
                return Err(Error::bad_field("replacement", message));
            }
            custom.push((built, replacement));
        }
        let any = regex::RegexSetBuilder::new(rules.custom.iter().map(|rule| &*rule.pattern))
            .size_limit(16 * MAX_COMPILED)
            .build();
        let any_custom = any.map_err(|error| broken("all of them together", error))?;
        let words = Regex::new(&WORDS.map(regex::escape).join("|")).map_err(|error| broken("of words", error))?;
        Ok(Self {
            has_keys: rules.keys,
            has_emails: rules.emails,
            has_cards: rules.cards,
            has_phones: rules.phones,
            words,
            pem: Word::new(PEM),
            custom,
            any_custom,
        })
    }

    /// What stands in place of a secret.
    pub(super) fn replacement(&self, label: Label) -> &str {
        match label {
            Label::Key => KEY,
            Label::Email => EMAIL,
            Label::Card => CARD,
            Label::Phone => PHONE,
            Label::Cut => CUT,
            Label::Custom(rule) => &self.custom[rule as usize].1,
        }
    }

    /// Whether a body may have something to hide, as it is written: with its escapes and quotes. Quick where it has not.
    pub(super) fn suspects(&self, raw: &str) -> bool {
        let mut is_suspect = false;
        self.search(raw.as_bytes(), false, |_, _| is_suspect = true);
        is_suspect || (!self.custom.is_empty() && (raw.contains('\\') || self.any_custom.is_match(raw)))
    }

    /// All secrets of a text, in no order; they may overlap.
    pub(super) fn find(&self, text: &str, found: &mut Vec<Span>) {
        // Most texts are short and have none of what every secret has: a digit, or one of these signs.
        let is_suspect = has_any(text.as_bytes(), |byte| byte.is_ascii_digit() || matches!(byte, b'@' | b'='));
        if is_suspect || (text.len() >= SHORTEST_PEM && self.pem.find(text.as_bytes()).is_some()) {
            self.search(text.as_bytes(), true, |range, label| found.push((range, label)));
        }
        for (at, (pattern, _)) in self.custom.iter().enumerate() {
            found.extend(pattern.find_iter(text.as_bytes()).map(|hit| (hit.range(), Label::Custom(at as u16))));
        }
    }

    /// Whether the value of a field of this name is a secret by its name alone, and which kind.
    pub(super) fn find_named(&self, name: &str, value: &str) -> Option<Label> {
        // Few values are numbers, and few names end like that of a secret.
        if self.has_phones && number::is_number(value) && number::names_phone(name) {
            return Some(Label::Phone);
        }
        let least = least_of(name.as_bytes()).filter(|_| self.has_keys)?;
        let run = run(value.as_bytes(), is_value);
        (run == value.len() && is_secret(value.as_bytes(), least)).then_some(Label::Key)
    }

    /// Whether a text of this length may be a secret by itself.
    pub(super) fn is_worth(&self, length: usize) -> bool {
        length >= SHORTEST || !self.custom.is_empty()
    }

    /// `is_exact`: what stands before a candidate counts. As a body is written, that may be part of an escape; there, a letter behind an
    /// escape is heard of too.
    fn search(&self, text: &[u8], is_exact: bool, mut hears: impl FnMut(Range<usize>, Label)) {
        if self.has_keys && text.len() >= SHORTEST_TOLD {
            self.told(text, |secret| hears(secret, Label::Key));
        }
        let (mut known, mut numbers) = (0, Numbers::default());
        let (mut escaped, mut later) = (Vec::new(), Vec::new());
        for (begin, marks) in marks(text) {
            if self.has_keys {
                // Runs that keys may be in: a key has a digit, and prose has few.
                for digit in ones(marks.digits).map(|bit| begin + bit) {
                    if digit >= known {
                        let run = run_with(text, digit);
                        known = run.end;
                        keys(text, run, is_exact, |key| hears(key, Label::Key));
                    }
                }
                for sign in ones(marks.signs).map(|bit| begin + bit) {
                    if let Some(value) = name_before(text, sign).and_then(|(name, least)| assigned(text, name, least)) {
                        hears(value, Label::Key);
                    }
                }
            }
            for at in ones(marks.ats).map(|bit| begin + bit) {
                match &text[at..] {
                    [b'@', ..] => self.at(text, at..at + 1, &mut hears),
                    // In forms.
                    [b'%', b'4', b'0', ..] => escaped.push(at),
                    // `\u0020` to `\u007f`: letters that hide from a search of what is written.
                    [b'\\', b'u', b'0', b'0', b'2'..=b'7', ..] if !is_exact => hears(at..at + 5, Label::Key),
                    _ => {}
                }
            }
            if self.has_cards || self.has_phones {
                numbers.search(text, begin, marks.digits, is_exact, |range, found| match found {
                    Found::Card if self.has_cards => later.push((range, Label::Card)),
                    Found::Phone if self.has_phones => later.push((range, Label::Phone)),
                    _ => {}
                });
            }
        }
        // Heard of last: where several begin at the same place, the first gives its name.
        escaped.into_iter().for_each(|at| self.at(text, at..at + 3, &mut hears));
        later.into_iter().for_each(|(range, label)| hears(range, label));
    }

    /// Secrets that a word before them tells.
    fn told(&self, text: &[u8], mut hears: impl FnMut(Range<usize>)) {
        for word in self.words.find_iter(text) {
            let (begin, end) = (word.start(), word.end());
            let secret = match text[begin] {
                b'-' => pem(text, end).map(|end| begin..end),
                b'h' => {
                    let length = run(&text[end..], |byte| byte == b'/' || is_dashed(byte));
                    (length >= 30).then(|| begin..end + length)
                }
                b'e' | b'E' => follows(text, end).filter(|value| is_token(&text[value.clone()])),
                _ => follows(text, end).filter(|value| is_basic(&text[value.clone()])),
            };
            secret.into_iter().for_each(&mut hears);
        }
    }

    fn at(&self, text: &[u8], at: Range<usize>, hears: &mut impl FnMut(Range<usize>, Label)) {
        if self.has_emails
            && let Some(found) = email(text, at.clone())
        {
            hears(found, Label::Email);
        }
        // scheme://user:password@host
        if self.has_keys {
            let is_part =
                |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'@' | b'"' | b'\'' | b'<' | b'>');
            let begin = at.start - run_back(&text[..at.start], is_part);
            let is_url = text[..begin].ends_with(b"://");
            let colon = memchr::memchr(b':', &text[begin..at.start]).map(|colon| begin + colon + 1);
            if let Some(secret) = colon.filter(|secret| is_url && *secret < at.start) {
                hears(secret..at.start, Label::Key);
            }
        }
    }
}

/// What may be the first part of a secret at the end of a text that was cut: its last word, and numbers before it that it may belong to.
pub(super) fn tail(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_part = |byte: u8| byte >= 0x80 || (byte.is_ascii_graphic() && !b"\"`<>()[]{},;|".contains(&byte));
    let mut begin = bytes.len() - run_back(bytes, is_part);
    let is_digits =
        |range: Range<usize>| bytes[range].iter().all(|byte| byte.is_ascii_digit() || b"+()-. ".contains(byte));
    if is_digits(begin..bytes.len()) {
        let back = run_back(bytes, |byte| byte.is_ascii_digit() || b"+()-. ".contains(&byte));
        let number = bytes.len() - back.min(32);
        // A blank before the number is none of it.
        begin = (number..=begin).find(|at| *at == bytes.len() || bytes[*at] != b' ').unwrap_or(begin);
    }
    // Never inside of a character.
    (begin..=bytes.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(bytes.len())
}

/// As `any`, but looks at all bytes, many at once.
fn has_any(bytes: &[u8], is_meant: impl Fn(u8) -> bool) -> bool {
    bytes.iter().fold(false, |has, byte| has | is_meant(*byte))
}

/// The name that stands before a sign: where it ends, and how long its secret is at least.
fn name_before(text: &[u8], sign: usize) -> Option<(usize, usize)> {
    let back = |end: usize, most: usize, of: fn(u8) -> bool| end - run_back(&text[end.saturating_sub(most)..end], of);
    let end = back(back(sign, 8, is_blank), 4, is_quote);
    least_of(&text[end.saturating_sub(16)..end]).map(|least| (end, least))
}

/// How long a secret is at least that goes by a name which ends like this.
fn least_of(name: &[u8]) -> Option<usize> {
    // Most do not even end with three such letters.
    if !known::ends_name(name.last_chunk()?) {
        return None;
    }
    let ends = |known: &str| {
        let end = name.len().checked_sub(known.len()).map(|begin| &name[begin..]);
        end.is_some_and(|end| end.eq_ignore_ascii_case(known.as_bytes()))
    };
    NAMES.iter().find(|(known, _)| ends(known)).map(|(_, least)| *least)
}

/// A value behind a name: `: value`, `= "value"`, `": "value"`, `=> value`.
fn assigned(text: &[u8], name: usize, least: usize) -> Option<Range<usize>> {
    let mut at = name;
    let skip = |at: usize, most: usize, of: fn(u8) -> bool| at + run(&text[at..text.len().min(at + most)], of);
    at = skip(at, 4, is_quote);
    at = skip(at, 8, is_blank);
    let sign = skip(at, 2, |byte| matches!(byte, b':' | b'=' | b'>'));
    if sign == at {
        return None;
    }
    at = skip(sign, 8, is_blank);
    at = skip(at, 4, |byte| byte != b']' && is_quote(byte));
    for scheme in ["bearer ", "basic ", "token "] {
        let end = at + scheme.len();
        if text.get(at..end).is_some_and(|word| word.eq_ignore_ascii_case(scheme.as_bytes())) {
            at = end;
        }
    }
    let end = at + run(&text[at..], is_value);
    // Code that gets a secret somewhere is none.
    let is_code = matches!(text.get(end), Some(b'(' | b'[' | b'{'));
    let value = &text[at..end];
    (!is_code && is_secret(value, least) && !is_reference(value)).then_some(at..end)
}

/// Letters and digits, of some length: a word of prose has no digits, a number no letters.
fn is_secret(value: &[u8], least: usize) -> bool {
    value.len() >= least && value.iter().any(u8::is_ascii_digit) && value.iter().any(u8::is_ascii_alphabetic)
}

/// `process.env.KEY2`, `config.v1.token`, `/run/secrets/key1`, `https://…`: where a secret is, not what it is.
fn is_reference(value: &[u8]) -> bool {
    let is_path = value.starts_with(b"/") || value.starts_with(b"./") || memchr::memmem::find(value, b"://").is_some();
    let is_name = |part: &[u8]| {
        part.first().is_some_and(u8::is_ascii_alphabetic) && part.iter().all(|byte| is_word(*byte)) && part.len() < 16
    };
    let mut parts = value.split(|byte| *byte == b'.');
    is_path || (value.contains(&b'.') && parts.all(is_name))
}

fn is_token(value: &[u8]) -> bool {
    is_secret(value, 8)
}

fn is_basic(value: &[u8]) -> bool {
    let ends = value.iter().rev().take_while(|byte| **byte == b'=').count();
    value.len() >= 8 && value.len().is_multiple_of(4) && (ends > 0 || is_secret(value, 8)) && !value.contains(&b'-')
}

/// The word behind a word: `Bearer abc`, `Bearer%20abc`, `bearer+abc`.
fn follows(text: &[u8], word: usize) -> Option<Range<usize>> {
    let rest = &text[word..];
    let gap = match rest {
        [b'%', b'2', b'0', ..] => 3,
        [b'+', ..] => 1,
        _ => run(&rest[..rest.len().min(8)], |byte| matches!(byte, b' ' | b'\t' | b':')),
    };
    let begin = word + gap;
    let end = begin + run(&text[begin..], |byte| is_dashed(byte) || matches!(byte, b'.' | b'~' | b'+' | b'/' | b'='));
    (gap > 0 && end > begin).then_some(begin..end)
}

/// An address around an `@`, or a `%40`.
fn email(text: &[u8], at: Range<usize>) -> Option<Range<usize>> {
    // Letters of two bytes, from Latin to Cyrillic; other scripts do not write addresses.
    let is_local = |byte: u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'%' | b'+' | b'-' | b'\'') || is_letter(byte)
    };
    let is_domain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') || is_letter(byte);
    let mut begin = at.start - run_back(&text[..at.start], is_local);
    // What cannot begin an address, or is the second half of a character.
    while begin < at.start
        && (matches!(text[begin], b'.' | b'\'' | b'-' | b'%' | b'+') || (0x80..0xc0).contains(&text[begin]))
    {
        begin += 1;
    }
    let local = &text[begin..at.start];
    let mut end = at.end + run(&text[at.end..], is_domain);
    while end > at.end && matches!(text[end - 1], b'.' | b'-') {
        end -= 1;
    }
    let domain = &text[at.end..end];
    let dot = memchr::memrchr(b'.', domain)?;
    let (host, top) = (&domain[..dot], &domain[dot + 1..]);
    let is_top = top.len() >= 2 && top.iter().all(|byte| byte.is_ascii_alphabetic() || is_letter(*byte));
    // `icon@2x.png` is a picture, `git@github.com:` a way to fetch.
    let is_file = host.first().is_some_and(u8::is_ascii_digit)
        && FILES.iter().any(|file| top.eq_ignore_ascii_case(file.as_bytes()));
    let is_machine = local == b"git" && matches!(text.get(end), Some(b':' | b'/'));
    (!local.is_empty() && local.len() <= 64 && !host.is_empty() && is_top && !is_file && !is_machine)
        .then_some(begin..end)
}

const FILES: [&str; 8] = ["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js"];

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// What names and values are wrapped in.
fn is_quote(byte: u8) -> bool {
    matches!(byte, b'"' | b'\'' | b'`' | b'\\' | b']' | b'*')
}

fn is_letter(byte: u8) -> bool {
    (0x80..0xe0).contains(&byte)
}

fn is_value(byte: u8) -> bool {
    is_dashed(byte)
        || matches!(byte, b'.' | b'/' | b'+' | b'=' | b'~' | b'!' | b'@' | b'#' | b'$' | b'%' | b'^' | b'*' | b'?')
}
