//! The digest of a JSON text by what it means.
//!
//! ```text
//! {"b":1, "a":[true,{"c":"\u0041"}]} ──> o( a: [ t o( c: s"A" ) ]  b: n"1" )      o(…): the digest of an object's members, sorted by name
//! ```
//!
//! Members of objects count in any order, elements of arrays in theirs, strings by their characters, numbers by how they
//! are written: whether `1` and `1.0` are the same is the model's affair. A name that comes twice is not dropped, since
//! parsers disagree on which one wins. One pass, and each byte is hashed once. What is not strictly JSON has no digest.

use std::ops::Range;

/// Deeper texts have no digest: an attacker's, or nearly so.
const MAX_DEPTH: usize = 128;

/// The digest of a text that is an object or an array, or nothing.
pub(super) fn digest(text: &[u8]) -> Option<[u8; 32]> {
    // Most bodies that are no JSON are turned away here, before anything is read.
    if !matches!(text.iter().find(|byte| !is_blank(**byte))?, b'{' | b'[') {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?.as_bytes();
    let mut reader = Reader { text, at: 0, out: Vec::new(), members: Vec::new() };
    reader.value(0)?;
    reader.blanks();
    (reader.at == text.len()).then(|| *blake3::hash(&reader.out).as_bytes())
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    /// What was read, in a form that has one reading.
    out: Vec<u8>,
    /// Members of all objects that are still open, those of the innermost last.
    members: Vec<Member>,
}

/// Where a member's name and value stand in `out`.
struct Member {
    name: Range<usize>,
    value: Range<usize>,
}

impl Reader<'_> {
    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.blanks();
        match self.next()? {
            b'{' => self.object(depth),
            b'[' => self.array(depth),
            b'"' => self.sized(b's', |reader| reader.string()),
            b't' => self.literal(b"rue", b't'),
            b'f' => self.literal(b"alse", b'f'),
            b'n' => self.literal(b"ull", b'z'),
            b'-' | b'0'..=b'9' => {
                self.at -= 1;
                self.sized(b'n', |reader| reader.number())
            }
            _ => None,
        }
    }

    fn object(&mut self, depth: usize) -> Option<()> {
        let (begin, first) = (self.out.len(), self.members.len());
        self.blanks();
        if !self.take(b'}') {
            loop {
                self.blanks();
                self.expect(b'"')?;
                let name = self.out.len();
                self.string()?;
                let value = self.out.len();
                self.blanks();
                self.expect(b':')?;
                self.value(depth + 1)?;
                self.members.push(Member { name: name..value, value: value..self.out.len() });
                self.blanks();
                if self.take(b'}') {
                    break;
                }
                self.expect(b',')?;
            }
        }
        let Self { out, members, .. } = self;
        // Stable: equal names stay in their order.
        members[first..].sort_by(|a, b| out[a.name.clone()].cmp(&out[b.name.clone()]));
        let mut hasher = blake3::Hasher::new();
        for Member { name, value } in members.drain(first..) {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(&out[name]);
            hasher.update(&out[value]);
        }
        out.truncate(begin);
        out.push(b'o');
        out.extend_from_slice(hasher.finalize().as_bytes());
        Some(())
    }

    fn array(&mut self, depth: usize) -> Option<()> {
        self.out.push(b'[');
        self.blanks();
        if !self.take(b']') {
            loop {
                self.value(depth + 1)?;
                self.blanks();
                if self.take(b']') {
                    break;
                }
                self.expect(b',')?;
            }
        }
        self.out.push(b']');
        Some(())
    }

    /// Puts a tag and a length before what `read` writes.
    fn sized(&mut self, tag: u8, read: impl FnOnce(&mut Self) -> Option<()>) -> Option<()> {
        self.out.push(tag);
        let begin = self.out.len() + 8;
        self.out.extend_from_slice(&[0; 8]);
        read(self)?;
        let length = (self.out.len() - begin) as u64;
        self.out[begin - 8..begin].copy_from_slice(&length.to_le_bytes());
        Some(())
    }

    /// What follows an opening quote, unescaped.
    fn string(&mut self) -> Option<()> {
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..=0x1f))?;
            self.out.extend_from_slice(&rest[..plain]);
            self.at += plain;
            match self.next()? {
                b'"' => return Some(()),
                b'\\' => self.escape()?,
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        let plain = match self.next()? {
            byte @ (b'"' | b'\\' | b'/') => byte,
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let unit = self.unit()?;
                let code = self.low_half(unit).unwrap_or(unit);
                self.character(code);
                return Some(());
            }
            _ => return None,
        };
        self.out.push(plain);
        Some(())
    }

    /// The whole character if `high` is the first half of one and the second follows.
    fn low_half(&mut self, high: u32) -> Option<u32> {
        if !(0xd800..0xdc00).contains(&high) || !self.text[self.at..].starts_with(b"\\u") {
            return None;
        }
        let before = self.at;
        self.at += 2;
        match self.unit() {
            Some(low @ 0xdc00..0xe000) => Some(0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00)),
            _ => {
                self.at = before;
                None
            }
        }
    }

    fn unit(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..self.at + 4)?;
        self.at += 4;
        digits.iter().try_fold(0, |unit, digit| Some(unit << 4 | char::from(*digit).to_digit(16)?))
    }

    fn character(&mut self, code: u32) {
        match char::from_u32(code) {
            Some(character) => self.out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            // Half a character, which some clients send: three bytes that no text has.
            None => self.out.extend([
                0xe0 | (code >> 12) as u8,
                0x80 | (code >> 6 & 0x3f) as u8,
                0x80 | (code & 0x3f) as u8,
            ]),
        }
    }

    fn number(&mut self) -> Option<()> {
        let begin = self.at;
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            let _ = self.take(b'+') || self.take(b'-');
            self.digits()?;
        }
        self.out.extend_from_slice(&self.text[begin..self.at]);
        Some(())
    }

    fn digits(&mut self) -> Option<()> {
        let count = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        (count > 0).then_some(())
    }

    fn literal(&mut self, rest: &[u8], tag: u8) -> Option<()> {
        self.text[self.at..].starts_with(rest).then_some(())?;
        self.at += rest.len();
        self.out.push(tag);
        Some(())
    }

    fn blanks(&mut self) {
        while self.text.get(self.at).is_some_and(|byte| is_blank(*byte)) {
            self.at += 1;
        }
    }

    fn next(&mut self) -> Option<u8> {
        let byte = *self.text.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, byte: u8) -> bool {
        let is_there = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(is_there);
        is_there
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_same_when_they_mean_the_same() {
        let same = |one: &str, other: &str| {
            assert!(digest(one.as_bytes()).is_some(), "{one}");
            assert_eq!(digest(one.as_bytes()), digest(other.as_bytes()), "{one} {other}");
        };
        same(r#"{"a":1,"b":{"c":[1,2],"d":null}}"#, r#" {"b":{"d":null,"c":[ 1 , 2 ]},"a":1} "#);
        same(r#"["\u00e9\n\/\ud83d\ude00"]"#, "[\"é\\u000a/😀\"]");
        same(r#"{"\u0061":true}"#, r#"{"a":true}"#);
        same("[]", "[ ]");
        same("{}", "{\n}");
        let differ = |one: &str, other: &str| {
            assert!(digest(one.as_bytes()).is_some() && digest(other.as_bytes()).is_some(), "{one} {other}");
            assert_ne!(digest(one.as_bytes()), digest(other.as_bytes()), "{one} {other}");
        };
        differ("[1,2]", "[2,1]");
        differ("[1]", "[1.0]");
        differ("[1e2]", "[1E2]");
        differ("[1]", r#"["1"]"#);
        differ("[[1],2]", "[[1,2]]");
        differ("[null]", "[false]");
        differ("[]", "{}");
        differ(r#"{"a":{}}"#, r#"{"a":[]}"#);
        differ(r#"{"a":1,"a":2}"#, r#"{"a":2,"a":1}"#);
        differ(r#"{"a":1,"a":1}"#, r#"{"a":1}"#);
        differ(r#"{"ab":"c"}"#, r#"{"a":"bc"}"#);
        differ(r#"{"a":"b","c":"d"}"#, r#"{"a":"d","c":"b"}"#);
        differ(r#"["\ud800"]"#, r#"["\ud801"]"#);
        differ(r#"["\ud800\u0041"]"#, r#"["\ud800"]"#);
        differ(r#"["a","b"]"#, r#"["ab"]"#);
    }

    #[test]
    fn what_is_not_strictly_json_has_no_digest() {
        let check = |text: &[u8]| assert_eq!(digest(text), None, "{}", String::from_utf8_lossy(text));
        let texts = r#"1 "a" true { [ [1 [1,] [,1] [1_2] {"a"} {"a":} {"a":1,} {a:1} {'a':1} {"a":1}} [1]x [01] [1.] [.5] [-]
            [+1] [1e] [0x1] [NaN] [tru] ["a] ["\x"] ["\u12"] ["\u12g4"]"#;
        let more = ["", " ", "[1 2]", "[\"a\nb\"]", "\u{feff}[]", "[1]\u{0}"];
        for text in texts.split_whitespace().chain(more) {
            check(text.as_bytes());
        }
        check(b"[\"\xff\"]");
        let nested = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
        check(nested(MAX_DEPTH + 2).as_bytes());
        assert!(digest(nested(MAX_DEPTH).as_bytes()).is_some());
    }
}
