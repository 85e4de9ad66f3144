//! Secrets in plain text: where they begin and end, and what they are.
//!
//! ```text
//!   text ─┬─ one pass for prefixes and words ("sk-", "eyJ", "Bearer", "password") ─> the run behind each is looked at
//!         ├─ every '@' ─> e-mail address, password of a URL
//!         ├─ where digits are dense ─> payment cards (Luhn), phone numbers
//!         └─ patterns of the operator
//! ```
//!
//! Each candidate is judged by itself and in linear time. Knows nothing of JSON and streams.

use std::ops::Range;

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};
use regex::RegexSet;
use regex::bytes::Regex;

use super::number::{self, Found};
use super::{Rule, Rules};
use crate::base::{Error, Result};

/// What stands where a secret was.
pub(super) const KEY: &str = "[REDACTED:key]";
pub(super) const EMAIL: &str = "[REDACTED:email]";
pub(super) const CARD: &str = "[REDACTED:card]";
pub(super) const PHONE: &str = "[REDACTED:phone]";
/// What may be the first part of a secret, where a body was cut.
pub(super) const CUT: &str = "[REDACTED:cut]";

/// Bytes of a compiled pattern at most.
const MAX_COMPILED: usize = 1 << 20;

/// What a run behind a prefix is made of.
#[derive(Clone, Copy)]
enum Run {
    /// Letters and digits.
    Plain,
    /// And `-` and `_`.
    Dashed,
    /// And `.` too.
    Dotted,
    Upper,
    Hex,
}

/// A prefix of keys: what follows it, and how long that is at least.
type Prefix = (&'static str, Run, usize);

const PREFIXES: &[Prefix] = &[
    ("sk-", Run::Dashed, 16),
    ("sk_live_", Run::Plain, 16),
    ("sk_test_", Run::Plain, 16),
    ("rk_live_", Run::Plain, 16),
    ("rk_test_", Run::Plain, 16),
    ("sk_", Run::Hex, 32),
    ("AIza", Run::Dashed, 30),
    ("AKIA", Run::Upper, 16),
    ("ASIA", Run::Upper, 16),
    ("ABIA", Run::Upper, 16),
    ("ACCA", Run::Upper, 16),
    ("ABSK", Run::Plain, 40),
    ("ghp_", Run::Plain, 30),
    ("gho_", Run::Plain, 30),
    ("ghu_", Run::Plain, 30),
    ("ghs_", Run::Plain, 30),
    ("ghr_", Run::Plain, 30),
    ("github_pat_", Run::Dashed, 22),
    ("glpat-", Run::Dashed, 16),
    ("xoxb-", Run::Dashed, 10),
    ("xoxp-", Run::Dashed, 10),
    ("xoxa-", Run::Dashed, 10),
    ("xoxr-", Run::Dashed, 10),
    ("xoxs-", Run::Dashed, 10),
    ("xoxe-", Run::Dashed, 10),
    ("xoxe.", Run::Dashed, 10),
    ("xapp-", Run::Dashed, 10),
    ("gsk_", Run::Plain, 20),
    ("hf_", Run::Plain, 30),
    ("r8_", Run::Plain, 30),
    ("pplx-", Run::Plain, 32),
    ("xai-", Run::Plain, 40),
    ("csk-", Run::Plain, 30),
    ("fw_", Run::Plain, 20),
    ("nvapi-", Run::Dashed, 30),
    ("tgp_v1_", Run::Dashed, 30),
    ("SG.", Run::Dotted, 40),
    ("npm_", Run::Plain, 30),
    ("pypi-", Run::Dashed, 50),
    ("dop_v1_", Run::Hex, 40),
    ("shpat_", Run::Hex, 24),
    ("ya29.", Run::Dashed, 20),
    ("GOCSPX-", Run::Dashed, 20),
    ("lsv2_pt_", Run::Dashed, 30),
    ("cfut_", Run::Dashed, 30),
    ("cfat_", Run::Dashed, 30),
    ("dapi", Run::Hex, 32),
    ("SK", Run::Hex, 32),
    ("AGE-SECRET-KEY-1", Run::Upper, 50),
    ("hvs.", Run::Dashed, 24),
    ("whsec_", Run::Plain, 24),
];

/// Words before a secret, in any case, as `name: value` or `name=value`, and how long the secret is at least.
const NAMES: &[(&str, usize)] = &[
    ("api_key", 12),
    ("apikey", 12),
    ("api-key", 12),
    ("access_key", 12),
    ("accesskey", 12),
    ("access-key", 12),
    ("account_key", 12),
    ("accountkey", 12),
    ("private_key", 12),
    ("privatekey", 12),
    ("auth_key", 12),
    ("subscription-key", 12),
    ("secret_key", 8),
    ("secret", 8),
    ("token", 16),
    ("credential", 12),
    ("authorization", 8),
    ("passphrase", 6),
    ("password", 6),
    ("passwd", 6),
    ("pwd", 6),
];

/// Other words that something follows, in any case.
const WORDS: [&str; 4] = ["bearer", "basic", "%40", ":aa"];
const PEM: &str = "-----BEGIN ";
const JWT: &str = "eyJ";
const SLACK_HOOK: &str = "hooks.slack.com/services/";

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
    prefixes: Option<AhoCorasick>,
    words: Option<AhoCorasick>,
    has_emails: bool,
    has_cards: bool,
    has_phones: bool,
    custom: Vec<(Regex, Box<str>)>,
    any_custom: RegexSet,
}

impl Finder {
    pub(super) fn new(rules: &Rules) -> Result<Self> {
        let broken = |name: &str, error: regex::Error| {
            let message = format!("the redaction rule {name:?} is no regular expression of the kind that is taken: {error}");
            Error::bad_field("pattern", message)
        };
        let mut custom = Vec::new();
        for Rule { name, pattern, replacement } in &rules.custom {
            let built = regex::bytes::RegexBuilder::new(pattern).size_limit(MAX_COMPILED).build();
            let built = built.map_err(|error| broken(name, error))?;
            if built.is_match(b"") {
                return Err(Error::bad_field("pattern", format!("the redaction rule {name:?} finds nothing at all: it must not match an empty text")));
            }
            let replacement = replacement.clone().unwrap_or_else(|| format!("[REDACTED:{name}]").into());
            if replacement.contains(['"', '\\']) || replacement.contains(char::is_control) {
                let message = format!("the redaction rule {name:?} must replace by a text without quotes, backslashes and control characters");
                return Err(Error::bad_field("replacement", message));
            }
            custom.push((built, replacement));
        }
        let any = regex::RegexSetBuilder::new(rules.custom.iter().map(|rule| &*rule.pattern)).size_limit(16 * MAX_COMPILED).build();
        let any_custom = any.map_err(|error| broken("all of them together", error))?;
        let prefixes = PREFIXES.iter().map(|(prefix, ..)| *prefix).chain([PEM, JWT, SLACK_HOOK]);
        let words = NAMES.iter().map(|(name, _)| *name).chain(WORDS);
        let search = |words: Vec<&str>, any_case: bool| {
            let search = AhoCorasickBuilder::new().match_kind(MatchKind::LeftmostLongest).ascii_case_insensitive(any_case).build(words);
            search.map_err(|error| Error::internal("the words of the redactor cannot be searched for").with_source(error))
        };
        let has_words = rules.keys || rules.emails;
        Ok(Self {
            prefixes: rules.keys.then(|| search(prefixes.collect(), false)).transpose()?,
            words: has_words.then(|| search(words.collect(), true)).transpose()?,
            has_emails: rules.emails,
            has_cards: rules.cards,
            has_phones: rules.phones,
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
        let bytes = raw.as_bytes();
        let mut is_suspect = false;
        let hears = |_: Range<usize>, _: Label| is_suspect = true;
        self.search(bytes, false, hears);
        is_suspect || has_escaped_letters(bytes) || self.any_custom.is_match(raw) || (!self.custom.is_empty() && raw.contains('\\'))
    }

    /// All secrets of a text, in no order; they may overlap.
    pub(super) fn find(&self, text: &str, found: &mut Vec<Span>) {
        self.search(text.as_bytes(), true, |range, label| found.push((range, label)));
        for (at, (pattern, _)) in self.custom.iter().enumerate() {
            found.extend(pattern.find_iter(text.as_bytes()).map(|hit| (hit.range(), Label::Custom(at as u16))));
        }
    }

    /// Whether the value of a field of this name is a secret by its name alone, and which kind.
    pub(super) fn find_named(&self, name: &str, value: &str) -> Option<Label> {
        if self.has_phones && number::names_phone(name) && number::is_number(value) {
            return Some(Label::Phone);
        }
        let words = self.words.as_ref().filter(|_| self.prefixes.is_some())?;
        let least = words.find_iter(name).filter(|hit| hit.end() == name.len()).find_map(|hit| NAMES.get(hit.pattern().as_usize()))?.1;
        let run = run(value.as_bytes(), is_value);
        (run == value.len() && is_secret(value.as_bytes(), least)).then_some(Label::Key)
    }

    /// `is_exact`: what stands before a candidate counts. As a body is written, that may be part of an escape.
    fn search(&self, text: &[u8], is_exact: bool, mut hears: impl FnMut(Range<usize>, Label)) {
        if let Some(prefixes) = &self.prefixes {
            for hit in prefixes.find_iter(text) {
                let is_free = !is_exact || hit.start() == 0 || !is_word(text[hit.start() - 1]);
                if let Some(end) = is_free.then(|| key(text, hit.pattern().as_usize(), hit.start(), hit.end())).flatten() {
                    hears(hit.start()..end, Label::Key);
                }
            }
        }
        if let Some(words) = &self.words {
            for hit in words.find_iter(text) {
                self.word(text, hit.pattern().as_usize(), hit.start()..hit.end(), &mut hears);
            }
        }
        if self.has_emails || self.prefixes.is_some() {
            for at in memchr::memchr_iter(b'@', text) {
                self.at(text, at..at + 1, &mut hears);
            }
        }
        if self.has_cards || self.has_phones {
            number::search(text, is_exact, |range, found| match found {
                Found::Card if self.has_cards => hears(range, Label::Card),
                Found::Phone if self.has_phones => hears(range, Label::Phone),
                _ => {}
            });
        }
    }

    fn word(&self, text: &[u8], pattern: usize, hit: Range<usize>, hears: &mut impl FnMut(Range<usize>, Label)) {
        let Some(word) = pattern.checked_sub(NAMES.len()).map(|word| WORDS[word]) else {
            if self.prefixes.is_some()
                && let Some(value) = assigned(text, hit.end, NAMES[pattern].1)
            {
                hears(value, Label::Key);
            }
            return;
        };
        if word == "%40" {
            return self.at(text, hit, hears);
        }
        if self.prefixes.is_none() {
            return;
        }
        let secret = match word {
            "bearer" => follows(text, hit.end).filter(|value| is_secret(&text[value.clone()], 8)),
            "basic" => follows(text, hit.end).filter(|value| is_basic(&text[value.clone()])),
            // Telegram: an account's number, then `:AA` and 33 more.
            _ => {
                let begin = hit.start - run_back(text, hit.start, |byte| byte.is_ascii_digit());
                let end = hit.end + run(&text[hit.end..], is_dashed);
                (hit.start - begin >= 8 && end - hit.end >= 30).then_some(begin..end)
            }
        };
        if let Some(secret) = secret {
            hears(secret, Label::Key);
        }
    }

    fn at(&self, text: &[u8], at: Range<usize>, hears: &mut impl FnMut(Range<usize>, Label)) {
        if self.has_emails
            && let Some(found) = email(text, at.clone())
        {
            hears(found, Label::Email);
        }
        // scheme://user:password@host
        if self.prefixes.is_some() {
            let is_part = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'@' | b'"' | b'\'' | b'<' | b'>');
            let begin = at.start - run_back(text, at.start, is_part);
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
    let mut begin = bytes.len() - run_back(bytes, bytes.len(), is_part);
    let is_digits = |range: Range<usize>| bytes[range].iter().all(|byte| byte.is_ascii_digit() || b"+()-. ".contains(byte));
    if is_digits(begin..bytes.len()) {
        let back = run_back(bytes, bytes.len(), |byte| byte.is_ascii_digit() || b"+()-. ".contains(&byte));
        let number = bytes.len() - back.min(32);
        // A blank before the number is none of it.
        begin = (number..=begin).find(|at| *at == bytes.len() || bytes[*at] != b' ').unwrap_or(begin);
    }
    // Never inside of a character.
    (begin..=bytes.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(bytes.len())
}

/// `\u0020` to `\u007f`: letters that hide from a search of what is written.
fn has_escaped_letters(raw: &[u8]) -> bool {
    memchr::memmem::find_iter(raw, b"\\u00").any(|at| matches!(raw.get(at + 4), Some(b'2'..=b'7')))
}

/// Where a key that begins with this prefix ends.
fn key(text: &[u8], pattern: usize, begin: usize, behind: usize) -> Option<usize> {
    let Some((prefix, run_of, least)) = PREFIXES.get(pattern) else {
        return match pattern - PREFIXES.len() {
            0 => pem(text, behind),
            1 => jwt(text, begin),
            _ => {
                let end = behind + run(&text[behind..], |byte| is_dashed(byte) || byte == b'/');
                (end - behind >= 30).then_some(end)
            }
        };
    };
    let length = match run_of {
        Run::Plain => run(&text[behind..], |byte| byte.is_ascii_alphanumeric()),
        Run::Dashed => run(&text[behind..], is_dashed),
        Run::Dotted => run(&text[behind..], |byte| is_dashed(byte) || byte == b'.'),
        Run::Upper => run(&text[behind..], |byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()),
        Run::Hex => run(&text[behind..], |byte| byte.is_ascii_hexdigit()),
    };
    let value = &text[behind..behind + length];
    let value = &value[..length - run_back(value, length, |byte| !byte.is_ascii_alphanumeric())];
    if value.len() < *least || !value.iter().any(u8::is_ascii_digit) {
        return None;
    }
    // A name with dashes is no key: a key has a long part without.
    let is_key = *prefix != "sk-" || value.split(|byte| *byte == b'-' || *byte == b'_').any(|part| part.len() >= 12);
    is_key.then_some(behind + length)
}

/// From `-----BEGIN … PRIVATE KEY-----` to its end, or to the end of the text.
fn pem(text: &[u8], behind: usize) -> Option<usize> {
    let head = &text[behind..text.len().min(behind + 48)];
    let name = memchr::memmem::find(head, b"-----").unwrap_or(head.len());
    memchr::memmem::find(&head[..name], b"PRIVATE KEY")?;
    let rest = behind + name;
    let Some(end) = memchr::memmem::find(&text[rest..], b"-----END").map(|end| rest + end + 8) else { return Some(text.len()) };
    let last = memchr::memmem::find(&text[end..text.len().min(end + 48)], b"-----").map(|last| end + last + 5);
    Some(last.unwrap_or(end))
}

fn jwt(text: &[u8], begin: usize) -> Option<usize> {
    let end = begin + run(&text[begin..], |byte| is_dashed(byte) || byte == b'.');
    let mut parts = text[begin..end].split(|byte| *byte == b'.');
    let (head, body) = (parts.next()?, parts.next()?);
    (parts.next().is_some() && head.len() >= 10 && body.len() >= 4).then_some(end)
}

/// A value behind a name: `: value`, `= "value"`, `": "value"`, `=> value`.
fn assigned(text: &[u8], name: usize, least: usize) -> Option<Range<usize>> {
    let mut at = name;
    let skip = |at: usize, of: &[u8], most: usize| at + run(&text[at..text.len().min(at + most)], |byte| of.contains(&byte));
    at = skip(at, b"\"'`\\]*", 4);
    at = skip(at, b" \t", 8);
    let sign = skip(at, b":=>", 2);
    if sign == at {
        return None;
    }
    at = skip(sign, b" \t", 8);
    at = skip(at, b"\"'`\\*", 4);
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
    let is_name = |part: &[u8]| part.first().is_some_and(u8::is_ascii_alphabetic) && part.iter().all(|byte| is_word(*byte)) && part.len() < 16;
    let mut parts = value.split(|byte| *byte == b'.');
    is_path || (value.contains(&b'.') && parts.all(is_name))
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
    let is_local = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'%' | b'+' | b'-' | b'\'') || is_letter(byte);
    let is_domain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') || is_letter(byte);
    let mut begin = at.start - run_back(text, at.start, is_local);
    // What cannot begin an address, or is the second half of a character.
    while begin < at.start && (matches!(text[begin], b'.' | b'\'' | b'-' | b'%' | b'+') || (0x80..0xc0).contains(&text[begin])) {
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
    let is_file = host.first().is_some_and(u8::is_ascii_digit) && FILES.iter().any(|file| top.eq_ignore_ascii_case(file.as_bytes()));
    let is_machine = local == b"git" && matches!(text.get(end), Some(b':' | b'/'));
    (!local.is_empty() && local.len() <= 64 && !host.is_empty() && is_top && !is_file && !is_machine).then_some(begin..end)
}

const FILES: [&str; 8] = ["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js"];

fn is_letter(byte: u8) -> bool {
    (0x80..0xe0).contains(&byte)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_dashed(byte: u8) -> bool {
    is_word(byte) || byte == b'-'
}

fn is_value(byte: u8) -> bool {
    is_dashed(byte) || matches!(byte, b'.' | b'/' | b'+' | b'=' | b'~' | b'!' | b'@' | b'#' | b'$' | b'%' | b'^' | b'*' | b'?')
}

fn run(text: &[u8], is_part: impl Fn(u8) -> bool) -> usize {
    text.iter().position(|byte| !is_part(*byte)).unwrap_or(text.len())
}

fn run_back(text: &[u8], end: usize, is_part: impl Fn(u8) -> bool) -> usize {
    text[..end].iter().rev().position(|byte| !is_part(*byte)).unwrap_or(end)
}
