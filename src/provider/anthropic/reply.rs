//! What Anthropic answers, whole and streamed.
//!
//!     message_start  content_block_start  content_block_delta …  content_block_stop  message_delta  message_stop
//!
//! The stream is complete with `message_stop` and never before.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::base::Result;
use crate::net::sse::Encoder;
use crate::provider::blocks::{Blocks, redacted, signed};
use crate::provider::json::Text;
use crate::provider::reply::{Choice, Chunks, Finish, completion};
use crate::provider::usage::Counts;
use crate::provider::{Meta, broken, failure};

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    model: Option<Text<'a>>,
    #[serde(borrow, default)]
    content: Vec<Block<'a>>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Block<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    thinking: Option<Text<'a>>,
    #[serde(borrow)]
    signature: Option<Text<'a>>,
    #[serde(borrow)]
    data: Option<Text<'a>>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    name: Option<Text<'a>>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    message: Option<Message<'a>>,
    #[serde(borrow)]
    content_block: Option<Block<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    usage: Option<Counts>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    partial_json: Option<Text<'a>>,
    #[serde(borrow)]
    thinking: Option<Text<'a>>,
    #[serde(borrow)]
    signature: Option<Text<'a>>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
}

fn finish(reason: Option<&str>) -> Finish {
    match reason {
        Some("max_tokens" | "model_context_window_exceeded") => Finish::Length,
        Some("tool_use") => Finish::ToolCalls,
        Some("refusal") => Finish::ContentFilter,
        _ => Finish::Stop,
    }
}

/// A whole answer.
pub(in crate::provider) fn answer(meta: &Meta, body: &[u8]) -> Result<Bytes> {
    let message: Message = serde_json::from_slice(body)
        .map_err(|error| broken(format!("the answer is not one of Anthropic's: {error}")))?;
    let mut choice = Choice::default();
    for block in &message.content {
        match &*block.kind {
            "text" => choice.text(block.text.as_deref().unwrap_or("")),
            "thinking" => {
                let (text, signature) = (block.thinking.as_deref(), block.signature.as_deref());
                choice.reasoning(text.unwrap_or(""));
                if let Some(signature) = signature.filter(|signature| !signature.is_empty()) {
                    choice.thinking_block(signed(text.unwrap_or(""), signature));
                }
            }
            "redacted_thinking" => choice.thinking_block(redacted(block.data.as_deref().unwrap_or(""))),
            "tool_use" => {
                let (id, name) = (block.id.as_deref().unwrap_or(""), block.name.as_deref().unwrap_or(""));
                choice.call(id, name, block.input.map_or("{}", RawValue::get).to_owned(), None);
            }
            // Tools that run at the provider and what they found.
            _ => {}
        }
    }
    let finish = finish(message.stop_reason.as_deref());
    let counts = message.usage.unwrap_or_default();
    Ok(completion(meta, message.id.as_deref(), message.model.as_deref(), vec![(choice, finish)], &counts))
}

/// The state of a stream.
#[derive(Default, Debug)]
pub(in crate::provider) struct Stream {
    blocks: Blocks,
}

impl Stream {
    pub(in crate::provider) fn event(&mut self, data: &str, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        let event: Event = serde_json::from_str(data)
            .map_err(|error| broken(format!("the stream is not one of Anthropic's: {error}")))?;
        let index = event.index;
        match &*event.kind {
            "message_start" => {
                let Some(message) = event.message else { return Ok(()) };
                chunks.named(message.id.as_deref(), message.model.as_deref());
                chunks.counts.merge(&message.usage.unwrap_or_default());
                chunks.begin(0, out);
            }
            "content_block_start" => {
                let Some(block) = event.content_block else { return Ok(()) };
                self.begin(index, &block, chunks, out);
            }
            "content_block_delta" => {
                let Some(delta) = event.delta else { return Ok(()) };
                if let Some(text) = &delta.text {
                    chunks.text(0, text, out);
                }
                if let Some(more) = &delta.partial_json {
                    self.blocks.arguments(index, more, chunks, out);
                }
                if let Some(more) = &delta.thinking {
                    self.blocks.thinking(index, more, chunks, out);
                }
                if let Some(more) = &delta.signature {
                    self.blocks.signature(index, more);
                }
            }
            "content_block_stop" => self.blocks.stop(index, chunks, out),
            "message_delta" => {
                chunks.counts.merge(&event.usage.unwrap_or_default());
                if let Some(reason) = event.delta.as_ref().and_then(|delta| delta.stop_reason.as_deref()) {
                    chunks.finish(0, finish(Some(reason)), out);
                }
            }
            "message_stop" if chunks.is_finished() => chunks.done(out),
            "message_stop" => return Err(broken("the stream ended without saying why")),
            "error" => return Err(failure::inside(event.error.as_ref())),
            // `ping`, and what is yet to be invented.
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, index: u32, block: &Block, chunks: &mut Chunks, out: &mut Encoder) {
        match &*block.kind {
            "tool_use" => {
                let (id, name) = (block.id.as_deref().unwrap_or(""), block.name.as_deref().unwrap_or(""));
                self.blocks.call(index, id, name, chunks, out);
                // Arguments that come with the call rather than after it.
                if let Some(input) = block.input.map(RawValue::get).filter(|input| !is_empty_object(input)) {
                    self.blocks.arguments(index, input, chunks, out);
                }
            }
            "text" => chunks.text(0, block.text.as_deref().unwrap_or(""), out),
            "thinking" => {
                self.blocks.thinking(index, block.thinking.as_deref().unwrap_or(""), chunks, out);
                self.blocks.signature(index, block.signature.as_deref().unwrap_or(""));
            }
            "redacted_thinking" => {
                chunks.thinking_block(0, redacted(block.data.as_deref().unwrap_or("")), out);
            }
            _ => {}
        }
    }
}

fn is_empty_object(json: &str) -> bool {
    json.bytes().all(|byte| matches!(byte, b'{' | b'}' | b' ' | b'\n' | b'\r' | b'\t')) || json == "null"
}
