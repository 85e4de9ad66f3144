//! Answers in blocks, as Anthropic and Bedrock stream them: each begins, grows and stops under a number of its own.
//!
//!     0 thinking   begin  +"let me"  +"see"  signature  stop     -->  reasoning_content …, then thinking_blocks
//!     1 text              +"Hi"                         stop     -->  content
//!     2 tool use   begin  +"{\"a\""  +":1}"             stop     -->  tool_calls

use serde_json::{Value, json};

use crate::net::sse::Encoder;
use crate::provider::reply::{Chunks, Target};

/// The blocks that have begun and not stopped.
#[derive(Default, Debug)]
pub(super) struct Blocks {
    calls: Vec<Call>,
    thoughts: Vec<Thought>,
}

#[derive(Debug)]
struct Call {
    index: u32,
    target: Target,
    /// Some of its arguments have come.
    any: bool,
}

#[derive(Default, Debug)]
struct Thought {
    index: u32,
    text: String,
    signature: String,
}

impl Blocks {
    pub(super) fn call(&mut self, index: u32, id: &str, name: &str, chunks: &mut Chunks, out: &mut Encoder) {
        let target = chunks.call(0, id, name, None, out);
        self.calls.push(Call { index, target, any: false });
    }

    pub(super) fn arguments(&mut self, index: u32, more: &str, chunks: &mut Chunks, out: &mut Encoder) {
        let Some(call) = self.calls.iter_mut().find(|call| call.index == index) else { return };
        call.any |= !more.is_empty();
        chunks.arguments(0, call.target, more, out);
    }

    pub(super) fn thinking(&mut self, index: u32, more: &str, chunks: &mut Chunks, out: &mut Encoder) {
        self.thought(index).text.push_str(more);
        chunks.reasoning(0, more, out);
    }

    pub(super) fn signature(&mut self, index: u32, more: &str) {
        self.thought(index).signature.push_str(more);
    }

    /// The block is complete.
    pub(super) fn stop(&mut self, index: u32, chunks: &mut Chunks, out: &mut Encoder) {
        if let Some(at) = self.calls.iter().position(|call| call.index == index) {
            let call = self.calls.swap_remove(at);
            if !call.any {
                // Whoever reads the arguments expects JSON, also of a call without any.
                chunks.arguments(0, call.target, "{}", out);
            }
        }
        if let Some(at) = self.thoughts.iter().position(|thought| thought.index == index) {
            let thought = self.thoughts.swap_remove(at);
            if !thought.signature.is_empty() {
                chunks.thinking_block(0, signed(&thought.text, &thought.signature), out);
            }
        }
    }

    fn thought(&mut self, index: u32) -> &mut Thought {
        let at = self.thoughts.iter().position(|thought| thought.index == index).unwrap_or_else(|| {
            self.thoughts.push(Thought { index, ..Thought::default() });
            self.thoughts.len() - 1
        });
        &mut self.thoughts[at]
    }
}

/// Thoughts that may be given back.
pub(super) fn signed(text: &str, signature: &str) -> Value {
    json!({"type": "thinking", "thinking": text, "signature": signature})
}

/// Thoughts that only their model can read.
pub(super) fn redacted(data: &str) -> Value {
    json!({"type": "redacted_thinking", "data": data})
}
