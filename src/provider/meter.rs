//! The usage of an answer that passes through as it is: whole, as SSE, or as an AWS event stream.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem::Finder;
use serde::Deserialize;

use crate::provider::frame::{Frame, Frames};
use crate::provider::json::Text;
use crate::provider::sieve::Sieve;
use crate::provider::usage::Counts;
use crate::task::Usage;

/// Longest frame of an event stream that is still looked into.
const LONGEST_FRAME: usize = 1 << 20;

/// Watches a native answer on its way to the client. Memory is bounded: nothing is kept but what a usage may be in.
#[derive(Debug)]
pub struct Meter {
    framing: Framing,
    counts: Counts,
}

#[derive(Debug)]
enum Framing {
    Whole(Sieve),
    Sse(Line, Sieve),
    Frames(Frames, Vec<Frame>),
    /// Sound, pictures, text; or a stream that broke.
    Nothing,
}

/// Where in a line of SSE the bytes have got to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Line {
    /// So many bytes of `data:` were there.
    Start(usize),
    Data,
    Other,
}

const DATA: &[u8] = b"data:";

/// What a usage announces itself with. None of it can stand inside a string of JSON but as text of the same letters, which only
/// costs a closer look.
static SIGNS: LazyLock<[Finder<'static>; 3]> =
    LazyLock::new(|| ["usage", "billed_units", "-invocationMetrics"].map(|sign| Finder::new(sign.as_bytes())));

impl Meter {
    /// A meter for an answer of this content type. Without one, or with one of JSON, the answer is taken for one document.
    pub fn new(content_type: Option<&str>) -> Self {
        let kind = content_type.map(|kind| kind.split(';').next().unwrap_or("").trim().to_ascii_lowercase());
        let framing = match kind.as_deref() {
            Some("text/event-stream") => Framing::Sse(Line::Start(0), Sieve::default()),
            Some("application/vnd.amazon.eventstream") => Framing::Frames(Frames::new(LONGEST_FRAME), Vec::new()),
            None | Some("") => Framing::Whole(Sieve::default()),
            Some(kind) if kind.ends_with("json") => Framing::Whole(Sieve::default()),
            Some(_) => Framing::Nothing,
        };
        Self { framing, counts: Counts::default() }
    }

    /// Looks at the next bytes of the answer.
    pub fn feed(&mut self, bytes: &[u8]) {
        match &mut self.framing {
            Framing::Whole(sieve) => sieve.feed(bytes, &mut self.counts),
            Framing::Sse(line, sieve) => sse(line, sieve, bytes, &mut self.counts),
            Framing::Frames(decoder, frames) => {
                let outcome = decoder.feed(bytes, frames);
                frames.drain(..).for_each(|frame| look_into(&frame, &mut self.counts));
                if outcome.is_err() {
                    self.framing = Framing::Nothing;
                }
            }
            Framing::Nothing => {}
        }
    }

    /// What the answer has said of its usage up to here.
    pub fn usage(&self) -> Option<Usage> {
        self.counts.usage()
    }

    /// What the answer said of its usage; `None` if it said nothing.
    pub fn finish(self) -> Option<Usage> {
        self.usage()
    }
}

fn sse(line: &mut Line, sieve: &mut Sieve, mut bytes: &[u8], counts: &mut Counts) {
    // Most chunks are whole events without a usage: these cost one search.
    let whole_lines = *line == Line::Start(0) && bytes.ends_with(b"\n");
    if whole_lines && !SIGNS.iter().any(|sign| sign.find(bytes).is_some()) {
        return;
    }
    while !bytes.is_empty() {
        match *line {
            Line::Start(matched) if matched == DATA.len() => {
                sieve.reset();
                *line = Line::Data;
            }
            Line::Start(matched) => {
                *line = match bytes[0] {
                    b'\n' | b'\r' => Line::Start(0),
                    byte if byte == DATA[matched] => Line::Start(matched + 1),
                    _ => Line::Other,
                };
                bytes = &bytes[1..];
            }
            Line::Data | Line::Other => {
                let end = memchr::memchr2(b'\n', b'\r', bytes);
                if *line == Line::Data {
                    sieve.feed(&bytes[..end.unwrap_or(bytes.len())], counts);
                }
                let Some(end) = end else { return };
                *line = Line::Start(0);
                bytes = &bytes[end + 1..];
            }
        }
    }
}

fn look_into(frame: &Frame, counts: &mut Counts) {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        bytes: Text<'a>,
    }
    match frame.name.as_str() {
        // What a model streams in its own dialect is packed once more.
        "chunk" => {
            let Ok(chunk) = serde_json::from_slice::<Chunk>(&frame.payload) else { return };
            let Ok(inner) = STANDARD.decode(chunk.bytes.as_bytes()) else { return };
            Sieve::default().feed(&inner, counts);
        }
        "metadata" => Sieve::default().feed(&frame.payload, counts),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::frame;

    fn used(prompt: u32, cached: u32, completion: u32) -> Option<Usage> {
        Some(Usage { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: completion, ..Usage::default() })
    }

    /// The same, of which so many tokens were written to a cache.
    fn writing(tokens: u32, usage: Option<Usage>) -> Option<Usage> {
        usage.map(|usage| Usage { written_tokens: tokens, ..usage })
    }

    fn metered(content_type: Option<&str>, bytes: &[u8], width: usize) -> Option<Usage> {
        let mut meter = Meter::new(content_type);
        bytes.chunks(width.max(1)).for_each(|piece| meter.feed(piece));
        meter.finish()
    }

    fn check(content_type: Option<&str>, bytes: &[u8], expected: Option<Usage>) {
        for width in [bytes.len(), 1, 2, 3, 7, 16, 61] {
            let found = metered(content_type, bytes, width);
            assert_eq!(found, expected, "{} in pieces of {width}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn every_spelling_of_usage_comes_to_the_same() {
        for (usage, expected) in [
            // OpenAI: chat, embeddings, Responses, images, speech by duration.
            (
                r#"{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":4}}"#,
                used(9, 4, 12),
            ),
            (r#"{"prompt_tokens":8,"total_tokens":8}"#, used(8, 0, 0)),
            (
                r#"{"input_tokens":36,"input_tokens_details":{"cached_tokens":6},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":3},"total_tokens":123}"#,
                used(36, 6, 87),
            ),
            (r#"{"type":"duration","seconds":3}"#, None),
            // xAI leaves reasoning out of the completion.
            (
                r#"{"prompt_tokens":10,"completion_tokens":5,"total_tokens":40,"completion_tokens_details":{"reasoning_tokens":25}}"#,
                used(10, 0, 30),
            ),
            // DeepSeek, and a proxy that adds Anthropic's fields to OpenAI's.
            (
                r#"{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12,"prompt_cache_hit_tokens":6,"prompt_cache_miss_tokens":4}"#,
                used(10, 6, 2),
            ),
            (
                r#"{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12,"cache_read_input_tokens":6,"cache_creation_input_tokens":0}"#,
                used(10, 6, 2),
            ),
            // Anthropic, Bedrock.
            (
                r#"{"input_tokens":21,"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"output_tokens":393}"#,
                writing(100, used(1121, 1000, 393)),
            ),
            (
                r#"{"inputTokens":30,"outputTokens":28,"totalTokens":58,"cacheReadInputTokens":5,"cacheWriteInputTokens":2}"#,
                writing(2, used(37, 5, 28)),
            ),
            // Google.
            (
                r#"{"promptTokenCount":4,"candidatesTokenCount":10,"thoughtsTokenCount":50,"totalTokenCount":64,"cachedContentTokenCount":2}"#,
                used(4, 2, 60),
            ),
            (r#"{"promptTokenCount":4,"totalTokenCount":4}"#, used(4, 0, 0)),
            // Cohere.
            (
                r#"{"billed_units":{"input_tokens":5.0,"output_tokens":418},"tokens":{"input_tokens":71,"output_tokens":418}}"#,
                used(5, 0, 418),
            ),
            (r#"{"billed_units":{"search_units":1},"tokens":{"input_tokens":71}}"#, used(71, 0, 0)),
            (r#"{"prompt_tokens":"many","completion_tokens":-1}"#, None),
            ("{}", None),
        ] {
            let counts: Counts = serde_json::from_str(usage).unwrap();
            assert_eq!(counts.usage(), expected, "{usage}");
            let body = format!("{{\"id\":1,\"usage\":{usage}}}");
            check(Some("application/json; charset=utf-8"), body.as_bytes(), expected);
        }
    }

    #[test]
    fn streams_are_merged_field_by_field() {
        let sse = Some("text/event-stream; charset=utf-8");
        let anthropic = concat!(
            "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":5,\"output_tokens\":1}}}\r\n\r\n",
            "event: ping\ndata: {\"type\": \"ping\"}\n\n",
            "event: content_block_delta\ndata:{\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"usage\"}}\n\n",
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n",
        );
        check(sse, anthropic.as_bytes(), used(30, 5, 15));
        let openai = concat!(
            "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}],\"usage\":null}\n\n: ping\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7}}\n\ndata: [DONE]\n\n",
        );
        check(sse, openai.as_bytes(), used(3, 0, 4));
        let google = concat!(
            "data: {\"candidates\":[],\"usageMetadata\":{\"promptTokenCount\":4,\"candidatesTokenCount\":1,\"totalTokenCount\":5}}\n\n",
            "data: {\"candidates\":[],\"usageMetadata\":{\"promptTokenCount\":4,\"candidatesTokenCount\":9,\"totalTokenCount\":13}}\n\n",
        );
        check(sse, google.as_bytes(), used(4, 0, 9));
        let groq = "data: {\"x_groq\":{\"id\":\"r\",\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}}\n\n";
        check(sse, groq.as_bytes(), used(3, 0, 4));
        let cohere = "data: {\"type\":\"message-end\",\"delta\":{\"finish_reason\":\"COMPLETE\",\"usage\":{\"billed_units\":{\"input_tokens\":2,\"output_tokens\":6}}}}\n\n";
        check(sse, cohere.as_bytes(), used(2, 0, 6));
        check(sse, b"data: {\"choices\":[]}\n\ndata: [DONE]\n\n", None);
        check(Some("audio/mpeg"), b"{\"usage\":{\"prompt_tokens\":3}}", None);
        check(None, br#"{"meta":{"api_version":{},"billed_units":{"input_tokens":3}}}"#, used(3, 0, 0));
    }

    #[test]
    fn event_streams_are_metered_plain_and_packed() {
        let event = |name: &str, payload: &str| {
            frame::encode(&[(":event-type", name), (":message-type", "event")], payload.as_bytes())
        };
        let aws = Some("application/vnd.amazon.eventstream");
        let converse = [
            event("contentBlockDelta", r#"{"delta":{"text":"usage"}}"#),
            event(
                "metadata",
                r#"{"usage":{"inputTokens":30,"outputTokens":28,"totalTokens":58},"metrics":{"latencyMs":9}}"#,
            ),
        ];
        check(aws, &converse.concat(), used(30, 0, 28));
        let chunk = |inner: &str| event("chunk", &format!("{{\"bytes\":\"{}\",\"p\":\"ab\"}}", STANDARD.encode(inner)));
        let invoke = [
            chunk(r#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#),
            chunk(
                r#"{"type":"message_stop","amazon-bedrock-invocationMetrics":{"inputTokenCount":25,"outputTokenCount":12,"invocationLatency":9}}"#,
            ),
        ];
        check(aws, &invoke.concat(), used(25, 0, 12));
        let mut damaged = converse.concat();
        damaged[20] ^= 1;
        check(aws, &damaged, None);
    }
}
