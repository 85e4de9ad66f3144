//! JSON written by hand: a line of the log is made for every call.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::base::Neurons;

/// The most that a byte of text becomes: `\u001f`.
pub(super) const GROWTH: usize = 6;

/// Writes the fields of a JSON object.
pub(super) struct Object<'a> {
    pub(super) out: &'a mut Vec<u8>,
    /// Whether the next field is the first one.
    pub(super) is_first: bool,
}

impl Object<'_> {
    pub(super) fn name(&mut self, name: &str) {
        self.out.extend_from_slice(if self.is_first { b"\"" } else { b",\"" });
        self.is_first = false;
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    pub(super) fn raw(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        self.out.extend_from_slice(value);
    }

    pub(super) fn text(&mut self, name: &str, value: &str) {
        self.quoted(name, value.as_bytes());
    }

    pub(super) fn quoted(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        quote(value, self.out);
    }

    pub(super) fn texts(&mut self, name: &str, values: &[Box<str>]) {
        self.name(name);
        self.out.push(b'[');
        for (at, value) in values.iter().enumerate() {
            self.out.extend_from_slice(if at > 0 { b"," } else { b"" });
            quote(value.as_bytes(), self.out);
        }
        self.out.push(b']');
    }

    pub(super) fn maybe(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.text(name, value),
            None => self.raw(name, b"null"),
        }
    }

    pub(super) fn number(&mut self, name: &str, value: u64) {
        self.raw(name, itoa::Buffer::new().format(value).as_bytes());
    }

    pub(super) fn maybe_number(&mut self, name: &str, value: Option<u64>) {
        match value {
            Some(value) => self.number(name, value),
            None => self.raw(name, b"null"),
        }
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) {
        self.raw(name, if value { b"true" } else { b"false" });
    }

    pub(super) fn written(&mut self, name: &str, value: std::fmt::Arguments<'_>) {
        self.name(name);
        // Writing to memory does not fail.
        let _ = self.out.write_fmt(value);
    }

    /// To the last digit: a micro-neuron is 11 / 10^12 USD.
    pub(super) fn dollars(&mut self, name: &str, amount: Neurons) {
        const ONE: u128 = 1_000_000_000_000;
        let parts = u128::from(amount.micro()) * 11;
        if parts == 0 {
            return self.raw(name, b"0");
        }
        self.written(name, format_args!("{}.{:012}", parts / ONE, parts % ONE));
        while self.out.last() == Some(&b'0') {
            self.out.pop();
        }
        if self.out.last() == Some(&b'.') {
            self.out.pop();
        }
    }
}

/// What so many bytes become as base64.
pub(super) const fn base64_of(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4
}

/// Puts bytes as base64 behind `out`.
pub(super) fn push_base64(bytes: &[u8], out: &mut Vec<u8>) {
    let begin = out.len();
    out.resize(begin + base64_of(bytes.len()), 0);
    // There is exactly as much room as it takes.
    let written = STANDARD.encode_slice(bytes, &mut out[begin..]);
    debug_assert_eq!(written.ok(), Some(out.len() - begin));
}

/// Bytes that a byte of text becomes in JSON.
pub(super) const COST: [u8; 256] = {
    let mut cost = [1; 256];
    let mut byte = 0;
    while byte < 32 {
        cost[byte] = match byte as u8 {
            b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
            _ => GROWTH as u8,
        };
        byte += 1;
    }
    cost[b'"' as usize] = 2;
    cost[b'\\' as usize] = 2;
    cost
};

/// Puts text as a JSON string behind `out`.
fn quote(text: &[u8], out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let mut from = 0;
    for (at, &byte) in text.iter().enumerate() {
        if COST[usize::from(byte)] == 1 {
            continue;
        }
        out.extend_from_slice(&text[from..at]);
        from = at + 1;
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            8 => out.extend_from_slice(b"\\b"),
            12 => out.extend_from_slice(b"\\f"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            _ => {
                let (high, low) = (DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]);
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            }
        }
    }
    out.extend_from_slice(&text[from..]);
    out.push(b'"');
}
