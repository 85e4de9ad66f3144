//! What a provider says over a realtime socket that it used: each of its messages may tell, and each counts.
//!
//! ```text
//! bytes ─ frames of RFC 6455 ─ messages ─ Sieve ─> Usage, one a message that has one
//! ```
//!
//! Nothing is kept of a message but what a usage may be in, however long it is. Only the server's side is read: its frames
//! are not masked. Compressed ones cannot be read, so handshakes are made without extensions.

use crate::provider::sieve::Sieve;
use crate::provider::usage::Counts;
use crate::task::Usage;

/// The longest head of a frame that is not masked.
const HEAD: usize = 10;

/// See the top of this file.
#[derive(Debug, Default)]
pub struct Talk {
    head: [u8; HEAD],
    /// Bytes of the head that are there.
    read: usize,
    /// Bytes of the frame's payload that are still to come; `None`: its head is not whole.
    left: Option<u64>,
    sieve: Sieve,
    counts: Counts,
    /// It is no WebSocket's, or packed in a way that nobody agreed to.
    is_foreign: bool,
}

impl Talk {
    /// Reads on. `told` hears what each message that ended said of its usage.
    pub fn feed(&mut self, mut bytes: &[u8], mut told: impl FnMut(Usage)) {
        while !bytes.is_empty() && !self.is_foreign {
            let Some(left) = self.left else {
                self.head[self.read] = bytes[0];
                (self.read, bytes) = (self.read + 1, &bytes[1..]);
                self.left = self.begun();
                if self.left == Some(0) {
                    self.end(&mut told);
                }
                continue;
            };
            let here = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (payload, rest) = bytes.split_at(here);
            if !self.is_control() {
                self.sieve.feed(payload, &mut self.counts);
            }
            bytes = rest;
            self.left = Some(left - here as u64);
            if self.left == Some(0) {
                self.end(&mut told);
            }
        }
    }

    /// Whether a frame may begin here.
    pub fn is_between(&self) -> bool {
        self.read == 0 && !self.is_foreign
    }

    /// The length of the payload, once the head is whole.
    fn begun(&mut self) -> Option<u64> {
        let [first, second, rest @ ..] = &self.head;
        if self.read < 2 {
            // Bits that stand for what was not agreed on, or a mask that servers do not use.
            self.is_foreign = first & 0x70 != 0;
            return None;
        }
        self.is_foreign |= second & 0x80 != 0;
        match second & 0x7f {
            126 if self.read == 4 => Some(u64::from(u16::from_be_bytes([rest[0], rest[1]]))),
            127 if self.read == HEAD => Some(u64::from_be_bytes(*rest)),
            126 | 127 => None,
            length => Some(u64::from(length)),
        }
    }

    fn is_control(&self) -> bool {
        self.head[0] & 0x08 != 0
    }

    /// The frame is over, and the message with it if it says so.
    fn end(&mut self, told: &mut impl FnMut(Usage)) {
        (self.read, self.left) = (0, None);
        if self.is_control() || self.head[0] & 0x80 == 0 {
            return;
        }
        self.sieve.reset();
        if let Some(usage) = std::mem::take(&mut self.counts).usage() {
            told(usage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            length @ ..126 => frame.push(length as u8),
            length @ ..65536 => frame.extend([&[126], &(length as u16).to_be_bytes()[..]].concat()),
            length => frame.extend([&[127], &(length as u64).to_be_bytes()[..]].concat()),
        }
        frame.extend_from_slice(payload);
        frame
    }

    fn heard(bytes: &[u8], step: usize) -> Vec<(u32, u32, u32)> {
        let (mut talk, mut told) = (Talk::default(), Vec::new());
        for bytes in bytes.chunks(step) {
            talk.feed(bytes, |usage| told.push((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)));
        }
        told
    }

    #[test]
    fn each_message_that_tells_a_usage_counts_once_wherever_it_is_cut() {
        let done = |input: u32, cached: u32, output: u32| {
            format!(
                r#"{{"type":"response.done","response":{{"output":[{{"text":"usage"}}],"usage":{{"total_tokens":{},"input_tokens":{input},"output_tokens":{output},
                "input_token_details":{{"text_tokens":1,"cached_tokens":{cached}}}}}}}}}"#,
                input + output
            )
        };
        let live = r#"{"serverContent":{"turnComplete":true},"usageMetadata":{"promptTokenCount":9,"responseTokenCount":4,"totalTokenCount":13}}"#;
        let long = format!(r#"{{"type":"response.audio.delta","delta":"{}"}}"#, "A".repeat(70_000));
        let second = done(20, 5, 6);
        let (begin, end) = second.as_bytes().split_at(50);
        let bytes = [
            frame(0x81, br#"{"type":"session.created","session":{"model":"gpt-realtime"}}"#),
            frame(0x81, done(10, 0, 3).as_bytes()),
            frame(0x81, long.as_bytes()),
            frame(0x89, b"usage"),
            // In two frames, with a pong between them.
            frame(0x01, begin),
            frame(0x8a, b""),
            frame(0x80, end),
            frame(0x82, live.as_bytes()),
            frame(0x88, &1000u16.to_be_bytes()),
        ]
        .concat();
        for step in [1, 2, 3, 7, 100, 5000, bytes.len()] {
            assert_eq!(heard(&bytes, step), [(10, 0, 3), (20, 5, 6), (9, 0, 4)], "{step}");
        }
    }

    #[test]
    fn what_is_packed_or_no_socket_tells_nothing() {
        let usage = br#"{"usage":{"input_tokens":1,"output_tokens":1}}"#;
        assert_eq!(heard(&frame(0x81, usage), 3).len(), 1);
        assert!(heard(&frame(0xc1, usage), 3).is_empty());
        assert!(heard(&[0x81, 0x80 | 3, 1, 2, 3, 4, 5, 6, 7], 3).is_empty());
        assert!(heard(b"HTTP/1.1 200 OK\r\n", 3).is_empty());
    }

    #[test]
    fn a_frame_may_begin_only_between_two() {
        let mut talk = Talk::default();
        let bytes = frame(0x81, b"{}");
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(talk.is_between(), at == 0);
            talk.feed(&[*byte], |_| {});
        }
        assert!(talk.is_between());
    }
}
