//! Keys by what they are made of: a known prefix and a long run of letters and digits, a JWT, a private key.

use std::ops::Range;

use super::known::{self, JWT, Run};

/// The shortest key with its prefix is longer.
const SHORTEST: usize = 14;

/// Letters, digits, `-`, `_` and `.`.
const IS_PART: [bool; 256] = {
    let (mut table, mut byte) = ([false; 256], 0);
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric() || matches!(byte as u8, b'-' | b'_' | b'.');
        byte += 1;
    }
    table
};

/// The run of such bytes around one of them.
pub(super) fn run_with(text: &[u8], at: usize) -> Range<usize> {
    let is_part = |byte: u8| IS_PART[byte as usize];
    at - run_back(&text[..at], is_part)..at + run(&text[at..], is_part)
}

/// The keys in a run: they begin where a word does.
pub(super) fn keys(text: &[u8], run: Range<usize>, is_exact: bool, mut hears: impl FnMut(Range<usize>)) {
    // Telegram: an account's number, then `:AA` and 33 more.
    if run.start > 0 && text[run.start - 1] == b':' && text[run.clone()].starts_with(b"AA") && run.len() >= 32 {
        let begin = run.start - 1 - run_back(&text[..run.start - 1], |byte| byte.is_ascii_digit());
        if run.start - 1 - begin >= 8 {
            hears(begin..run.start + self::run(&text[run.start..], is_dashed));
        }
    }
    // As a body is written, the letters of an escape may stand before.
    let is_escape = !is_exact && run.start > 0 && text[run.start - 1] == b'\\';
    let mut at = run.start;
    while at + SHORTEST <= run.end {
        let is_start = at == run.start || !is_word(text[at - 1]) || (is_escape && [1, 5].contains(&(at - run.start)));
        match is_start.then(|| key(text, at)).flatten() {
            Some(end) => {
                hears(at..end);
                at = end;
            }
            None => at += 1,
        }
    }
}

/// Where a key that begins here ends.
fn key(text: &[u8], begin: usize) -> Option<usize> {
    let rest = &text[begin..];
    if rest.starts_with(JWT) {
        return jwt(text, begin);
    }
    let fitting = known::prefixes(rest.first_chunk()?).filter(|(prefix, ..)| rest.starts_with(prefix.as_bytes()));
    fitting.filter_map(|(prefix, of, least)| key_of(text, begin + prefix.len(), *prefix == "sk-", *of, *least)).max()
}

fn key_of(text: &[u8], behind: usize, is_common: bool, of: Run, least: usize) -> Option<usize> {
    let length = match of {
        Run::Plain => run(&text[behind..], |byte| byte.is_ascii_alphanumeric()),
        Run::Dashed => run(&text[behind..], is_dashed),
        Run::Dotted => run(&text[behind..], |byte| is_dashed(byte) || byte == b'.'),
        Run::Upper => run(&text[behind..], |byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()),
        Run::Hex => run(&text[behind..], |byte| byte.is_ascii_hexdigit()),
    };
    let value = &text[behind..behind + length];
    let value = &value[..length - run_back(value, |byte| !byte.is_ascii_alphanumeric())];
    if value.len() < least || !value.iter().any(u8::is_ascii_digit) {
        return None;
    }
    // A name with dashes is no key: a key has a long part without.
    let is_key = !is_common || value.split(|byte| *byte == b'-' || *byte == b'_').any(|part| part.len() >= 12);
    is_key.then_some(behind + length)
}

/// From `-----BEGIN … PRIVATE KEY-----` to its end, or to the end of the text.
pub(super) fn pem(text: &[u8], behind: usize) -> Option<usize> {
    let head = &text[behind..text.len().min(behind + 48)];
    let name = memchr::memmem::find(head, b"-----").unwrap_or(head.len());
    memchr::memmem::find(&head[..name], b"PRIVATE KEY")?;
    let rest = behind + name;
    let Some(end) = memchr::memmem::find(&text[rest..], b"-----END").map(|end| rest + end + 8) else {
        return Some(text.len());
    };
    let last = memchr::memmem::find(&text[end..text.len().min(end + 48)], b"-----").map(|last| end + last + 5);
    Some(last.unwrap_or(end))
}

fn jwt(text: &[u8], begin: usize) -> Option<usize> {
    let end = begin + run(&text[begin..], |byte| is_dashed(byte) || byte == b'.');
    let mut parts = text[begin..end].split(|byte| *byte == b'.');
    let (head, body) = (parts.next()?, parts.next()?);
    (parts.next().is_some() && head.len() >= 10 && body.len() >= 4).then_some(end)
}

pub(super) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

pub(super) fn is_dashed(byte: u8) -> bool {
    is_word(byte) || byte == b'-'
}

/// How many bytes at the begin of a text are part of something.
pub(super) fn run(text: &[u8], is_part: impl Fn(u8) -> bool) -> usize {
    text.iter().position(|byte| !is_part(*byte)).unwrap_or(text.len())
}

/// How many at its end.
pub(super) fn run_back(text: &[u8], is_part: impl Fn(u8) -> bool) -> usize {
    text.iter().rev().position(|byte| !is_part(*byte)).unwrap_or(text.len())
}
