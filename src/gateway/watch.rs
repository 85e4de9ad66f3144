//! The rest of a streamed answer, looked at as it goes by: whether it says of itself that it failed. How it begins is judged
//! in `opening.rs`.

use std::sync::LazyLock;

use memchr::memmem::{self, Finder};

use crate::gateway::opening::{MAX_BYTES, Verdict, sse_event};
use crate::net::sse::Decoder;
use crate::provider::Dialect;

/// Looks on as a stream goes by, whether it says of itself that it failed. The caller reads that as it was said; it is not
/// kept for others, and no good answer.
#[derive(Debug)]
pub struct Watch {
    dialect: Dialect,
    /// None: AWS's frames.
    decoder: Option<Decoder>,
    /// In the middle of an event, or the last bytes of frames.
    midway: Vec<u8>,
    has_failed: bool,
}

/// In every event that says so, whatever else is in it.
static WORDS: LazyLock<[Finder<'static>; 2]> =
    LazyLock::new(|| ["rror", "RROR"].map(|word| Finder::new(word.as_bytes())));
/// The names of headers that only frames of failures have, with the lengths around them: no JSON holds these bytes.
const FAILURES: [&[u8]; 2] = [b"\x0f:exception-type\x07", b"\x0b:error-code\x07"];

impl Watch {
    /// Over an answer of this content type; nothing where that is no stream of events.
    pub fn new(dialect: Dialect, content_type: &str) -> Option<Self> {
        let kind = content_type.split(';').next().unwrap_or_default().trim();
        let decoder = match kind {
            _ if kind.eq_ignore_ascii_case("text/event-stream") => Some(Decoder::new(MAX_BYTES)),
            _ if kind.eq_ignore_ascii_case("application/vnd.amazon.eventstream") => None,
            _ => return None,
        };
        Some(Self { dialect, decoder, midway: Vec::new(), has_failed: false })
    }

    /// The next bytes of it.
    pub fn feed(&mut self, chunk: &[u8]) {
        if self.has_failed {
            return;
        }
        let Some(decoder) = &mut self.decoder else {
            // A name may come in two pieces.
            let longest = FAILURES.map(<[u8]>::len).into_iter().max().unwrap_or_default();
            self.midway.extend_from_slice(&chunk[..chunk.len().min(longest)]);
            let found = |bytes: &[u8]| FAILURES.iter().any(|name| memmem::find(bytes, name).is_some());
            self.has_failed = found(&self.midway) || found(chunk);
            if chunk.len() > longest {
                self.midway.clear();
                self.midway.extend_from_slice(&chunk[chunk.len() - longest..]);
            }
            self.midway.drain(..self.midway.len().saturating_sub(longest));
            return;
        };
        let is_whole = chunk.ends_with(b"\n\n") || chunk.ends_with(b"\r\n\r\n");
        // Most chunks are whole events that say nothing like it: these cost a search.
        if self.midway.is_empty() && is_whole && WORDS.iter().all(|word| word.find(chunk).is_none()) {
            return;
        }
        self.midway.clear();
        if !is_whole {
            self.midway.push(b'.');
        }
        let mut events = Vec::new();
        // What is too long to be an event is content.
        if decoder.feed(chunk, &mut events).is_err() {
            *decoder = Decoder::new(MAX_BYTES);
        }
        let dialect = self.dialect;
        let failed = |event| matches!(sse_event(dialect, event), Verdict::Failed { .. });
        self.has_failed = events.into_iter().any(failed);
    }

    /// Whether it has said so, now that all of it is there.
    pub fn has_failed(&mut self) -> bool {
        if self.decoder.is_some() && !self.midway.is_empty() {
            self.feed(b"\n\n");
        }
        self.has_failed
    }
}
