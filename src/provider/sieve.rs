//! Finds what an answer says of usage while its JSON flies past.
//!
//!     {"object":"list","data":[…megabytes…],"usage":{"prompt_tokens":8,"total_tokens":8}}
//!                                           ^^^^^^^ only this is kept
//!
//! Needs a few hundred bytes however large the document is, and does not mind where it is cut. A usage is an object under
//! one of the known names at the top level, or one level below under the names of envelopes; an array around
//! it all (Google's streams without SSE) is looked through.

use memchr::memchr2;

use crate::provider::usage::Counts;

/// More of one usage than this is not kept.
const LONGEST: usize = 16 * 1024;
/// Most have less than this.
const USUAL: usize = 512;
/// Longer keys are none of ours.
const LONGEST_KEY: usize = 40;

/// What a key can mean.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Name {
    #[default]
    Other,
    /// Its value is a usage.
    Usage,
    /// Its value may hold one.
    Envelope,
}

fn name(key: &[u8]) -> Name {
    match key {
        b"usage" | b"usageMetadata" | b"usage_metadata" | b"amazon-bedrock-invocationMetrics" | b"meta" => Name::Usage,
        // Messages, Responses, Cohere, Groq.
        b"message" | b"response" | b"delta" | b"x_groq" => Name::Envelope,
        _ => Name::Other,
    }
}

/// The state of one document.
#[derive(Default, Debug)]
pub(super) struct Sieve {
    depth: u32,
    /// Which of the innermost 64 levels are objects, the innermost in the lowest bit.
    objects: u64,
    /// 1 inside a top-level array, whose elements are then the documents.
    base: u32,
    in_string: bool,
    escaped: bool,
    /// The next string is a key.
    at_key: bool,
    /// The string being read is a key that could matter.
    in_key: bool,
    key: Vec<u8>,
    /// What the current keys of the two outer levels mean.
    names: [Name; 2],
    captured: Vec<u8>,
    /// The level at which the capture ends.
    capturing: Option<u32>,
}

impl Sieve {
    /// Begins a new document.
    pub(super) fn reset(&mut self) {
        self.key.clear();
        self.captured.clear();
        *self = Self {
            key: std::mem::take(&mut self.key),
            captured: std::mem::take(&mut self.captured),
            ..Self::default()
        };
    }

    /// Takes more of the document and adds what it says to `counts`.
    pub(super) fn feed(&mut self, mut bytes: &[u8], counts: &mut Counts) {
        while let Some(&byte) = bytes.first() {
            let eaten = if self.in_string { self.string(bytes) } else { self.structure(byte, counts) };
            if self.capturing.is_some() {
                let room = (LONGEST + 1).saturating_sub(self.captured.len());
                self.captured.extend_from_slice(&bytes[..eaten.min(room)]);
            }
            bytes = &bytes[eaten..];
        }
    }

    /// Takes the rest of a string, or what there is of it; returns how much that was.
    fn string(&mut self, bytes: &[u8]) -> usize {
        if std::mem::take(&mut self.escaped) {
            self.keep_key(&bytes[..1]);
            return 1;
        }
        let Some(end) = memchr2(b'"', b'\\', bytes) else {
            self.keep_key(bytes);
            return bytes.len();
        };
        self.keep_key(&bytes[..end]);
        if bytes[end] == b'\\' {
            self.escaped = true;
            // No name of ours needs an escape.
            self.keep_key(b"\\");
            return end + 1;
        }
        self.in_string = false;
        if std::mem::take(&mut self.in_key) {
            let level = (self.depth - self.base) as usize;
            self.names[level - 1] = name(&self.key);
        }
        end + 1
    }

    fn keep_key(&mut self, bytes: &[u8]) {
        if self.in_key && self.key.len() <= LONGEST_KEY {
            self.key.extend_from_slice(&bytes[..bytes.len().min(LONGEST_KEY + 1)]);
        }
    }

    /// Takes one byte outside strings.
    fn structure(&mut self, byte: u8, counts: &mut Counts) -> usize {
        match byte {
            b'"' => {
                self.in_string = true;
                let level = self.depth.saturating_sub(self.base);
                self.in_key = std::mem::take(&mut self.at_key) && (1..=2).contains(&level) && self.capturing.is_none();
                if self.in_key {
                    self.key.clear();
                    self.key.reserve(LONGEST_KEY + 1);
                }
            }
            b'{' => {
                if self.capturing.is_none() && self.is_usage() {
                    self.capturing = Some(self.depth);
                    self.captured.clear();
                    self.captured.reserve(USUAL);
                }
                self.open(true);
            }
            b'[' => {
                if self.depth == 0 {
                    self.base = 1;
                }
                self.open(false);
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.objects >>= 1;
                self.at_key = false;
                if self.capturing == Some(self.depth) {
                    self.capturing = None;
                    self.captured.push(byte);
                    if let Ok(found) = serde_json::from_slice::<Counts>(&self.captured) {
                        counts.merge(&found);
                    }
                }
            }
            b',' => self.at_key = self.objects & 1 == 1,
            _ => {}
        }
        1
    }

    fn open(&mut self, object: bool) {
        let level = self.depth.saturating_sub(self.base) as usize;
        if let Some(inner) = self.names.get_mut(level) {
            *inner = Name::Other;
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u64::from(object);
        self.at_key = object;
    }

    /// Whether the object that begins here is a usage.
    fn is_usage(&self) -> bool {
        match self.depth.saturating_sub(self.base) {
            1 => self.objects & 1 == 1 && self.names[0] == Name::Usage,
            2 => self.objects & 3 == 3 && self.names == [Name::Envelope, Name::Usage],
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(document: &str, prompt: Option<u32>) {
        let found = |pieces: Vec<&[u8]>| {
            let (mut sieve, mut counts) = (Sieve::default(), Counts::default());
            pieces.into_iter().for_each(|piece| sieve.feed(piece, &mut counts));
            counts.usage().map(|usage| usage.prompt_tokens)
        };
        assert_eq!(found(vec![document.as_bytes()]), prompt, "{document}");
        assert_eq!(found(document.as_bytes().chunks(1).collect()), prompt, "{document}, byte by byte");
        for cut in 0..document.len() {
            let (head, tail) = document.as_bytes().split_at(cut);
            assert_eq!(found(vec![head, tail]), prompt, "{document}, cut at {cut}");
        }
    }

    #[test]
    fn usage_is_found_where_answers_have_it() {
        check(r#"{"id":"x","data":[[0.1,-2e3],{"a":"}{\"]"}],"usage":{"prompt_tokens":8,"total_tokens":8}}"#, Some(8));
        check(r#" { "usage" : {"prompt_tokens":8, "prompt_tokens_details":{"cached_tokens":1}} , "x":1}"#, Some(8));
        check(r#"{"type":"response.completed","response":{"output":[],"usage":{"input_tokens":3}}}"#, Some(3));
        check(r#"{"type":"message_start","message":{"usage":{"input_tokens":4}}}"#, Some(4));
        check(r#"[{"usageMetadata":{"promptTokenCount":2}},{"usageMetadata":{"promptTokenCount":6}}]"#, Some(6));
    }

    #[test]
    fn what_only_looks_like_usage_is_not_counted() {
        for document in [
            r#"{"choices":[{"message":{"usage":{"prompt_tokens":8}}}]}"#,
            r#"{"content":[{"type":"tool_use","input":{"usage":{"input_tokens":9}}}]}"#,
            r#"{"a":{"usage":{"prompt_tokens":8}}}"#,
            r#"{"usage":null,"b":{"prompt_tokens":8}}"#,
            r#"{"usage":[{"prompt_tokens":8}]}"#,
            r#"{"text":"\"usage\":{\"prompt_tokens\":8}"}"#,
            r#"{"us\u0061ge":{"prompt_tokens":8}}"#,
            r#"{"message":"usage","usage":"{\"prompt_tokens\":8}"}"#,
            r#"{"message":["usage",{"prompt_tokens":8}]}"#,
            r#"}}]]{"usage"#,
        ] {
            check(document, None);
        }
    }

    #[test]
    fn a_usage_without_end_is_not_kept_whole() {
        let (mut sieve, mut counts) = (Sieve::default(), Counts::default());
        sieve.feed(b"{\"usage\":{\"x\":\"", &mut counts);
        for _ in 0..100 {
            sieve.feed(&[b'x'; 10_000], &mut counts);
        }
        assert!(sieve.captured.capacity() < 4 * LONGEST);
    }
}
