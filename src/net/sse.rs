//! Server-sent events, both ways: what we stream to clients and what we read from others.
//!
//!     Encoder:  JSON, names, comments  -->  bytes, many events a buffer
//!     Decoder:  bytes cut anywhere     -->  whole events
//!
//! Neither knows what an event means; `[DONE]` is ordinary data here.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use crate::base::{Error, Kind, Result};

/// Collects events in one buffer, whose memory is used again once what was taken has been sent.
#[derive(Default)]
pub struct Encoder {
    buffer: BytesMut,
}

impl Encoder {
    /// Appends an event whose data is JSON. An event that does not serialise is left out whole and logged.
    pub fn json(&mut self, name: Option<&str>, data: &impl Serialize) {
        let mark = self.buffer.len();
        self.name(name);
        self.buffer.put_slice(b"data: ");
        // Compact JSON has no line breaks outside strings and escapes those inside: one `data:` line is enough.
        if let Err(error) = serde_json::to_writer((&mut self.buffer).writer(), data) {
            tracing::error!(%error, "an event does not serialise");
            self.buffer.truncate(mark);
            return;
        }
        self.buffer.put_slice(b"\n\n");
    }

    /// Appends an event with any text as its data; line breaks (LF, CR, CRLF) arrive as LF.
    pub fn text(&mut self, name: Option<&str>, data: &str) {
        self.name(name);
        let mut rest = data;
        loop {
            let end = rest.find(['\r', '\n']);
            self.buffer.put_slice(b"data: ");
            self.buffer.put_slice(&rest.as_bytes()[..end.unwrap_or(rest.len())]);
            self.buffer.put_u8(b'\n');
            let Some(end) = end else { break };
            let width = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
            rest = &rest[end + width..];
        }
        self.buffer.put_u8(b'\n');
    }

    /// Appends a comment, which clients drop: a sign of life. One line.
    pub fn comment(&mut self, words: &str) {
        debug_assert!(!words.contains(['\r', '\n']));
        self.buffer.put_slice(b": ");
        self.buffer.put_slice(words.as_bytes());
        self.buffer.put_slice(b"\n\n");
    }

    /// Bytes not taken yet.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Hands over what has been collected.
    pub fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    /// `name` is ours, never a caller's: a line break in it would end the field.
    fn name(&mut self, name: Option<&str>) {
        let Some(name) = name else { return };
        debug_assert!(!name.contains(['\r', '\n']));
        self.buffer.put_slice(b"event: ");
        self.buffer.put_slice(name.as_bytes());
        self.buffer.put_u8(b'\n');
    }
}

/// One event as it arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// What `event:` said, if it did.
    pub name: Option<String>,
    /// The `data:` lines, joined by LF.
    pub data: String,
    /// What `id:` said, if it did.
    pub id: Option<String>,
}

/// Puts events together from bytes cut anywhere, even inside a character. Follows the rules of the HTML standard: LF, CR
/// and CRLF all end a line, a byte order mark is skipped, comments and unknown fields are dropped, an event without data is none.
#[derive(Debug)]
pub struct Decoder {
    line: Vec<u8>,
    event: SseEvent,
    has_data: bool,
    /// The last byte was CR: an LF right behind it ends the same line.
    after_cr: bool,
    first_line: bool,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses events of more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { line: Vec::new(), event: SseEvent::default(), has_data: false, after_cr: false, first_line: true, limit }
    }

    /// Takes the next bytes and appends the events they complete to `events`. What is left unfinished at the end of the
    /// stream was never sent whole, and is dropped with the decoder.
    ///
    /// # Errors
    /// [`Kind::TooLarge`] if an event grows beyond the limit; the stream cannot be read on after that.
    pub fn feed(&mut self, mut bytes: &[u8], events: &mut Vec<SseEvent>) -> Result<()> {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_cr) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
                self.line.extend_from_slice(bytes);
                return self.check_size();
            };
            self.line.extend_from_slice(&bytes[..end]);
            self.check_size()?;
            self.after_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            self.end_line(events);
        }
        Ok(())
    }

    fn check_size(&self) -> Result<()> {
        if self.line.len() + self.event.data.len() <= self.limit {
            return Ok(());
        }
        Err(Error::new(Kind::TooLarge, format!("an event of the stream is larger than {} bytes", self.limit)))
    }

    fn end_line(&mut self, events: &mut Vec<SseEvent>) {
        let line = std::mem::take(&mut self.line);
        let mut bytes = line.as_slice();
        if std::mem::take(&mut self.first_line) {
            bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        }
        if bytes.is_empty() {
            let event = std::mem::take(&mut self.event);
            if std::mem::take(&mut self.has_data) {
                events.push(event);
            }
        } else {
            self.field(&String::from_utf8_lossy(bytes));
        }
        // Keep the memory for the next line.
        self.line = line;
        self.line.clear();
    }

    fn field(&mut self, line: &str) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            "event" => self.event.name = Some(value.to_owned()),
            "id" => self.event.id = Some(value.to_owned()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<SseEvent> {
        let mut decoder = Decoder::new(1 << 20);
        let mut events = Vec::new();
        for piece in pieces {
            decoder.feed(piece, &mut events).unwrap();
        }
        events
    }

    fn check(bytes: &str, expected: &[(Option<&str>, &str)]) {
        let expected: Vec<_> =
            expected.iter().map(|(name, data)| (name.map(str::to_owned), data.to_string())).collect();
        let whole: Vec<_> = decode([bytes.as_bytes()]).into_iter().map(|e| (e.name, e.data)).collect();
        assert_eq!(whole, expected, "{bytes:?}");
        let one_by_one: Vec<_> = decode(bytes.as_bytes().chunks(1)).into_iter().map(|e| (e.name, e.data)).collect();
        assert_eq!(one_by_one, expected, "{bytes:?} one byte at a time");
    }

    #[test]
    fn every_line_ending_ends_a_line_once() {
        check("data: a\n\ndata: b\r\n\r\ndata: c\r\r", &[(None, "a"), (None, "b"), (None, "c")]);
        check("data: a\r\ndata: b\n\r\n", &[(None, "a\nb")]);
    }

    #[test]
    fn names_comments_marks_and_unknown_fields_are_read_as_the_standard_says() {
        check("\u{feff}: hello\nevent: x\ndata:a\nretry: 3\ndata:  b\n\n", &[(Some("x"), "a\n b")]);
        check("event: lonely\n\ndata\n\ndata: [DONE]\n\n", &[(None, ""), (None, "[DONE]")]);
    }

    #[test]
    fn an_event_that_was_not_sent_whole_is_no_event() {
        check("data: a\n\ndata: b\n", &[(None, "a")]);
    }

    #[test]
    fn an_event_beyond_the_limit_is_refused_however_it_is_cut() {
        let mut decoder = Decoder::new(64);
        let mut events = Vec::new();
        let outcome = (0..100).try_for_each(|_| decoder.feed(b"data: 0123456789\n", &mut events));
        assert_eq!(outcome.unwrap_err().kind(), Kind::TooLarge);
        assert_eq!(Decoder::new(64).feed(&[b'x'; 65], &mut events).unwrap_err().kind(), Kind::TooLarge);
    }

    #[test]
    fn the_buffer_can_be_taken_and_filled_again() {
        let mut encoder = Encoder::default();
        encoder.json(Some("a"), &serde_json::json!({"text": "x\n\"y\""}));
        encoder.comment("ping");
        assert_eq!(&encoder.take()[..], b"event: a\ndata: {\"text\":\"x\\n\\\"y\\\"\"}\n\n: ping\n\n");
        assert!(encoder.is_empty());
        encoder.text(None, "[DONE]");
        assert_eq!(&encoder.take()[..], b"data: [DONE]\n\n");
    }

    fn as_received(data: &str) -> String {
        data.replace("\r\n", "\n").replace('\r', "\n")
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same_however_the_bytes_are_cut(
            sent in prop::collection::vec((prop::option::of("[a-z.]{1,12}"), any::<bool>(), "(?s).{0,40}", any::<bool>()), 0..12),
            cuts in prop::collection::vec(1usize..9, 1..40),
        ) {
            let mut encoder = Encoder::default();
            let mut expected = Vec::new();
            for (name, json, data, ping) in &sent {
                if *ping {
                    encoder.comment("ping");
                }
                let data = if *json { serde_json::to_string(data).unwrap() } else { as_received(data) };
                if *json {
                    let value: String = serde_json::from_str(&data).unwrap();
                    encoder.json(name.as_deref(), &value);
                } else {
                    encoder.text(name.as_deref(), &data);
                }
                expected.push(SseEvent { name: name.clone(), data, id: None });
            }
            let bytes = encoder.take();
            let mut rest = &bytes[..];
            let mut pieces = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, tail) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece);
                rest = tail;
            }
            prop_assert_eq!(decode(pieces), expected);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut events = Vec::new();
            let _ = Decoder::new(128).feed(&bytes, &mut events);
        }
    }
}
