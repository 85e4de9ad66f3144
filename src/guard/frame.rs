//! Finds where the events of a stream end, and what each says, without copying what passes.
//!
//!     chunks cut anywhere --next--> end of an event in the chunk, its data in a buffer that is used again
//!
//! Server-sent events, JSON lines, and the binary frames of AWS. Bytes are counted, never changed; what an event means is
//! `delta.rs`'s.

use serde_json::Value;

/// Bytes of one event at most.
const MAX_EVENT: usize = 16 << 20;

/// An event could not be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

pub(super) enum Frames {
    /// `text/event-stream`.
    Sse(Sse),
    /// One JSON document a line.
    Lines(Vec<u8>),
    /// `application/vnd.amazon.eventstream`.
    Amazon(Vec<u8>),
}

/// Lines of server-sent events on their way to be one.
#[derive(Default)]
pub(super) struct Sse {
    /// The unfinished line of earlier chunks.
    line: Vec<u8>,
    has_data: bool,
    /// The last byte of the last chunk was CR: an LF ends the same line.
    after_cr: bool,
    begun: bool,
}

/// Whether a content type is one that [`Frames`] can take apart.
pub(super) fn is_stream(content_type: &str) -> bool {
    Frames::of(content_type).is_some()
}

impl Frames {
    /// The framing of a content type; none if it is no stream of events.
    pub(super) fn of(content_type: &str) -> Option<Self> {
        match super::text::essence(content_type).as_str() {
            "text/event-stream" => Some(Self::Sse(Sse::default())),
            "application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/stream+json" => {
                Some(Self::Lines(Vec::new()))
            }
            "application/vnd.amazon.eventstream" => Some(Self::Amazon(Vec::new())),
            _ => None,
        }
    }

    /// Reads on from `chunk[*at..]`. True if an event has ended, at `*at`, its data in `data`; false if the chunk is used up.
    pub(super) fn next(&mut self, chunk: &[u8], at: &mut usize, data: &mut Vec<u8>) -> Result<bool, TooLarge> {
        match self {
            Self::Sse(sse) => sse.next(chunk, at, data),
            Self::Lines(line) => {
                let rest = &chunk[*at..];
                let end = rest.iter().position(|byte| *byte == b'\n');
                let taken = end.map_or(rest.len(), |end| end + 1);
                *at += taken;
                check_size(line.len() + taken)?;
                if end.is_none() {
                    line.extend_from_slice(rest);
                    return Ok(false);
                }
                data.append(line);
                data.extend_from_slice(&rest[..taken]);
                data.truncate(data.trim_ascii_end().len());
                Ok(true)
            }
            Self::Amazon(frame) => amazon(frame, chunk, at, data),
        }
    }

    /// What the stream ends with, where its last event was not ended; some clients read it all the same.
    pub(super) fn rest(&mut self, data: &mut Vec<u8>) {
        match self {
            Self::Sse(sse) => {
                let line = std::mem::take(&mut sse.line);
                sse.field(&line, data);
            }
            Self::Lines(line) => data.append(line),
            // A frame whose checksum never came is read by nobody.
            Self::Amazon(_) => {}
        }
    }
}

impl Sse {
    fn next(&mut self, chunk: &[u8], at: &mut usize, data: &mut Vec<u8>) -> Result<bool, TooLarge> {
        while *at < chunk.len() {
            if std::mem::take(&mut self.after_cr) && chunk[*at] == b'\n' {
                *at += 1;
                continue;
            }
            let rest = &chunk[*at..];
            let Some(end) = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
                check_size(self.line.len() + data.len() + rest.len())?;
                self.line.extend_from_slice(rest);
                *at = chunk.len();
                return Ok(false);
            };
            check_size(self.line.len() + data.len() + end)?;
            *at += end + 1;
            if rest[end] == b'\r' {
                // The LF belongs to this event, if it is here already.
                match chunk.get(*at) {
                    Some(b'\n') => *at += 1,
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            let blank = if self.line.is_empty() {
                self.field(&rest[..end], data)
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&rest[..end]);
                let blank = self.field(&line, data);
                line.clear();
                self.line = line;
                blank
            };
            if blank {
                self.has_data = false;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes one line; true if it is blank.
    fn field(&mut self, mut line: &[u8], data: &mut Vec<u8>) -> bool {
        if !std::mem::replace(&mut self.begun, true) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        let value = match line {
            b"data" => &[],
            _ => match line.strip_prefix(b"data:") {
                Some(value) => value.strip_prefix(b" ").unwrap_or(value),
                None => return line.is_empty(),
            },
        };
        if std::mem::replace(&mut self.has_data, true) {
            data.push(b'\n');
        }
        data.extend_from_slice(value);
        false
    }
}

/// One frame: total length, length of headers, checksum (4 bytes each), headers, payload, checksum.
fn amazon(frame: &mut Vec<u8>, chunk: &[u8], at: &mut usize, data: &mut Vec<u8>) -> Result<bool, TooLarge> {
    let word = |bytes: &[u8], at: usize| -> usize {
        bytes.get(at..at + 4).map_or(0, |word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize)
    };
    loop {
        let wanted = if frame.len() < 8 { 8 } else { word(frame, 0) };
        if frame.len() >= 8 && wanted < 16 {
            // Not a frame: nothing behind it can be found either.
            return Err(TooLarge);
        }
        check_size(wanted)?;
        if frame.len() >= 8 && frame.len() == wanted {
            break;
        }
        let taken = (wanted - frame.len()).min(chunk.len() - *at);
        if taken == 0 {
            return Ok(false);
        }
        frame.extend_from_slice(&chunk[*at..*at + taken]);
        *at += taken;
    }
    let headers = word(frame, 4);
    let payload = frame.get(12 + headers..frame.len() - 4).unwrap_or_default();
    match inner(payload) {
        Some(inner) => data.extend_from_slice(&inner),
        None => data.extend_from_slice(payload),
    }
    frame.clear();
    Ok(true)
}

/// The provider's own event, which `invoke-with-response-stream` wraps as `{"bytes": base64}`.
fn inner(payload: &[u8]) -> Option<Vec<u8>> {
    use base64::Engine as _;
    let wrapper: Value = serde_json::from_slice(payload).ok()?;
    base64::engine::general_purpose::STANDARD.decode(wrapper.get("bytes")?.as_str()?).ok()
}

fn check_size(bytes: usize) -> Result<(), TooLarge> {
    if bytes > MAX_EVENT { Err(TooLarge) } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A frame as AWS sends it, without headers; checksums are not looked at.
    pub(in crate::guard) fn amazon_frame(payload: &str) -> Vec<u8> {
        let total = 16 + payload.len();
        let mut frame = (total as u32).to_be_bytes().to_vec();
        frame.extend_from_slice(&[0; 8]);
        frame.extend_from_slice(payload.as_bytes());
        frame.extend_from_slice(&[0; 4]);
        frame
    }

    fn events(content_type: &str, chunks: &[&[u8]]) -> Vec<(usize, String)> {
        let mut frames = Frames::of(content_type).unwrap();
        let mut events = Vec::new();
        let mut data = Vec::new();
        let mut before = 0;
        for chunk in chunks {
            let mut at = 0;
            while frames.next(chunk, &mut at, &mut data).unwrap() {
                events.push((before + at, String::from_utf8(std::mem::take(&mut data)).unwrap()));
            }
            assert_eq!(at, chunk.len());
            before += chunk.len();
        }
        frames.rest(&mut data);
        if !data.is_empty() {
            events.push((before, String::from_utf8(data).unwrap()));
        }
        events
    }

    fn check(content_type: &str, bytes: &[u8], expected: &[(usize, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(end, data)| (*end, data.to_string())).collect();
        assert_eq!(events(content_type, &[bytes]), expected, "whole");
        let bytewise: Vec<&[u8]> = bytes.chunks(1).collect();
        let datas = |events: Vec<(usize, String)>| events.into_iter().map(|event| event.1).collect::<Vec<_>>();
        assert_eq!(datas(events(content_type, &bytewise)), datas(expected), "byte by byte");
    }

    #[test]
    fn events_end_where_the_standard_says() {
        const SSE: &str = "text/event-stream; charset=utf-8";
        check(SSE, b"data: a\n\ndata:b\n\n", &[(9, "a"), (17, "b")]);
        check(SSE, b"data: a\r\n\r\ndata: b\r\n\r\n", &[(11, "a"), (22, "b")]);
        check(SSE, b"data: a\r\rdata: b\r\r", &[(9, "a"), (18, "b")]);
        check(SSE, b"\xef\xbb\xbfdata: a\ndata\ndata: b\nid: 1\n\n", &[(31, "a\n\nb")]);
        check(SSE, b": ping\n\ndata: a\n\n", &[(8, ""), (17, "a")]);
        check(SSE, b"data: a\n\ndata: unfinished", &[(9, "a"), (25, "unfinished")]);
    }

    #[test]
    fn lines_and_frames_end_where_they_should() {
        check(
            "application/x-ndjson",
            b"{\"a\":1}\r\n{\"b\":2}\n{}",
            &[(9, "{\"a\":1}"), (17, "{\"b\":2}"), (19, "{}")],
        );
        let mut bytes = amazon_frame(r#"{"delta":{"text":"a"}}"#);
        let first = bytes.len();
        bytes.extend(amazon_frame(r#"{"bytes":"eyJ4IjoxfQ=="}"#));
        let expected = [(first, r#"{"delta":{"text":"a"}}"#), (bytes.len(), r#"{"x":1}"#)];
        check("application/vnd.amazon.eventstream", &bytes, &expected);
    }

    #[test]
    fn what_is_too_large_or_no_frame_is_an_error() {
        let mut data = Vec::new();
        let large = vec![b'x'; MAX_EVENT + 1];
        for kind in ["text/event-stream", "application/jsonl"] {
            let mut frames = Frames::of(kind).unwrap();
            assert_eq!(frames.next(&large, &mut 0, &mut data), Err(TooLarge), "{kind}");
        }
        let mut frames = Frames::of("application/vnd.amazon.eventstream").unwrap();
        assert_eq!(frames.next(&[0xff; 64], &mut 0, &mut data), Err(TooLarge));
        let mut frames = Frames::of("application/vnd.amazon.eventstream").unwrap();
        assert_eq!(frames.next(&[0; 64], &mut 0, &mut data), Err(TooLarge));
    }
}
