//! What Converse answers, whole and as an event stream.
//!
//!     messageStart  contentBlockStart?  contentBlockDelta …  contentBlockStop  messageStop  metadata
//!
//! `messageStop` makes the answer complete, `metadata` tells what it used and is the last. Exceptions come as frames of their own.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::base::{Error, Result};
use crate::net::sse::Encoder;
use crate::provider::blocks::{Blocks, redacted, signed};
use crate::provider::frame::Frame;
use crate::provider::json::Text;
use crate::provider::reply::{Choice, Chunks, Finish, completion};
use crate::provider::usage::Counts;
use crate::provider::{Meta, broken, failure};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    #[serde(borrow)]
    output: Output<'a>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Output<'a> {
    #[serde(borrow)]
    message: Message<'a>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Vec<Block<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Block<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    tool_use: Option<ToolUse<'a>>,
    #[serde(borrow)]
    reasoning_content: Option<Reasoning<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ToolUse<'a> {
    #[serde(borrow)]
    tool_use_id: Option<Text<'a>>,
    #[serde(borrow)]
    name: Option<Text<'a>>,
    /// An object in a whole answer, a piece of its text in a stream.
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reasoning<'a> {
    #[serde(borrow)]
    reasoning_text: Option<ReasoningText<'a>>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    signature: Option<Text<'a>>,
    #[serde(borrow)]
    redacted_content: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct ReasoningText<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    signature: Option<Text<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    #[serde(default)]
    content_block_index: u32,
    #[serde(borrow)]
    start: Option<Block<'a>>,
    #[serde(borrow)]
    delta: Option<Block<'a>>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
    usage: Option<Counts>,
    #[serde(borrow)]
    message: Option<Text<'a>>,
}

fn finish(reason: Option<&str>) -> Result<Finish> {
    Ok(match reason {
        Some("max_tokens" | "model_context_window_exceeded") => Finish::Length,
        Some("tool_use") => Finish::ToolCalls,
        Some("guardrail_intervened" | "content_filtered") => Finish::ContentFilter,
        Some(reason @ ("malformed_model_output" | "malformed_tool_use")) => {
            return Err(broken(format!("the model failed with {reason}: try again")));
        }
        _ => Finish::Stop,
    })
}

/// A whole answer.
pub(in crate::provider) fn answer(meta: &Meta, body: &[u8]) -> Result<Bytes> {
    let response: Response =
        serde_json::from_slice(body).map_err(|error| broken(format!("the answer is not one of Converse: {error}")))?;
    let mut choice = Choice::default();
    for block in &response.output.message.content {
        if let Some(text) = &block.text {
            choice.text(text);
        }
        if let Some(call) = &block.tool_use {
            let (id, name) = (call.tool_use_id.as_deref().unwrap_or(""), call.name.as_deref().unwrap_or(""));
            choice.call(id, name, call.input.map_or("{}", RawValue::get).to_owned(), None);
        }
        if let Some(reasoning) = &block.reasoning_content {
            if let Some(said) = &reasoning.reasoning_text {
                let text = said.text.as_deref().unwrap_or("");
                choice.reasoning(text);
                if let Some(signature) = &said.signature {
                    choice.thinking_block(signed(text, signature));
                }
            }
            if let Some(data) = &reasoning.redacted_content {
                choice.thinking_block(redacted(data));
            }
        }
    }
    let finish = finish(response.stop_reason.as_deref())?;
    Ok(completion(meta, None, None, vec![(choice, finish)], &response.usage.unwrap_or_default()))
}

/// The state of a stream.
#[derive(Default, Debug)]
pub(in crate::provider) struct Stream {
    blocks: Blocks,
}

impl Stream {
    pub(in crate::provider) fn event(&mut self, frame: &Frame, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        if frame.kind == "error" {
            return Err(Error::new(failure::kind(&frame.name, None), frame.message.clone()));
        }
        let event: Event = match serde_json::from_slice(&frame.payload) {
            Ok(event) => event,
            Err(_) if frame.kind == "exception" => return Err(exception(frame, None)),
            Err(error) => return Err(broken(format!("the stream is not one of Converse: {error}"))),
        };
        if frame.kind == "exception" {
            return Err(exception(frame, event.message.as_deref()));
        }
        let index = event.content_block_index;
        match frame.name.as_str() {
            "messageStart" => chunks.begin(0, out),
            "contentBlockStart" => {
                if let Some(call) = event.start.as_ref().and_then(|start| start.tool_use.as_ref()) {
                    let (id, name) = (call.tool_use_id.as_deref().unwrap_or(""), call.name.as_deref().unwrap_or(""));
                    self.blocks.call(index, id, name, chunks, out);
                }
            }
            "contentBlockDelta" => {
                if let Some(delta) = &event.delta {
                    self.delta(index, delta, chunks, out)?;
                }
            }
            "contentBlockStop" => self.blocks.stop(index, chunks, out),
            "messageStop" => chunks.finish(0, finish(event.stop_reason.as_deref())?, out),
            "metadata" => {
                chunks.counts.merge(&event.usage.unwrap_or_default());
                if chunks.is_finished() {
                    chunks.done(out);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn delta(&mut self, index: u32, delta: &Block, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        if let Some(text) = &delta.text {
            chunks.text(0, text, out);
        }
        if let Some(piece) = delta.tool_use.as_ref().and_then(|call| call.input) {
            let piece: Text = serde_json::from_str(piece.get())
                .map_err(|error| broken(format!("a piece of a call's arguments is no text: {error}")))?;
            self.blocks.arguments(index, &piece, chunks, out);
        }
        if let Some(reasoning) = &delta.reasoning_content {
            if let Some(text) = &reasoning.text {
                self.blocks.thinking(index, text, chunks, out);
            }
            if let Some(signature) = &reasoning.signature {
                self.blocks.signature(index, signature);
            }
            if let Some(data) = &reasoning.redacted_content {
                chunks.thinking_block(0, redacted(data), out);
            }
        }
        Ok(())
    }

    /// The upstream has closed the stream.
    pub(in crate::provider) fn end(&mut self, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        if !chunks.is_finished() {
            return Err(broken("the stream ended before the model had said why it ended"));
        }
        chunks.done(out);
        Ok(())
    }
}

fn exception(frame: &Frame, message: Option<&str>) -> Error {
    Error::new(failure::kind(&frame.name, None), message.unwrap_or(&frame.name))
}
