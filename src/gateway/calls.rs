//! Calls of tools in the events of an answer: text that turns out to be a call becomes events of its own.
//!
//! ```text
//! Text "Let me see. <tool_" , Text "call>{…" , Finish Stop  ──>  Text "Let me see." , Tool … , Finish ToolCalls
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use crate::model::tools::{CallParser, Piece, ToolFormat};
use crate::task::{Event, FinishReason, Tools, Usage};

/// One parser a choice.
pub(super) struct Calls(Vec<CallParser>);

impl Calls {
    /// For an answer of a model of this format that was offered `tools`. `seed` makes the ids of its calls.
    pub(super) fn new(format: &ToolFormat, tools: &Arc<Tools>, choices: u32, seed: u64) -> Self {
        // Seeds of different requests are far apart, so those of choices may be close.
        Self((0..choices).map(|choice| format.parser(tools.clone(), seed.wrapping_add(choice.into()))).collect())
    }

    /// Puts what an event has made certain behind what is already there.
    pub(super) fn read(&mut self, event: Event, out: &mut VecDeque<Event>) {
        match event {
            Event::Text { choice, text, logprobs, usage } => {
                let Some(parser) = self.0.get_mut(choice as usize) else { return };
                let pieces = parser.push(&text);
                // Log-probabilities are of tokens, whatever these turn out to be: they go out with their own event.
                let mut logprobs = Some(logprobs).filter(|logprobs| !logprobs.is_empty());
                if logprobs.is_some() && !matches!(pieces.first(), Some(Piece::Text(_))) {
                    let logprobs = logprobs.take().unwrap_or_default();
                    out.push_back(Event::Text { choice, text: String::new(), logprobs, usage });
                }
                for piece in pieces {
                    out.push_back(event_of(choice, piece, usage, &mut logprobs));
                }
            }
            Event::Finish { choice, reason, stop } => {
                let Some(parser) = self.0.get_mut(choice as usize) else { return };
                for piece in parser.finish() {
                    out.push_back(event_of(choice, piece, Usage::default(), &mut None));
                }
                let reason = match reason {
                    FinishReason::Stop if parser.has_called() => FinishReason::ToolCalls,
                    reason => reason,
                };
                out.push_back(Event::Finish { choice, reason, stop });
            }
            other => out.push_back(other),
        }
    }
}

fn event_of(choice: u32, piece: Piece, usage: Usage, logprobs: &mut Option<Vec<crate::task::TokenLogprob>>) -> Event {
    match piece {
        Piece::Text(text) => Event::Text { choice, text, logprobs: logprobs.take().unwrap_or_default(), usage },
        Piece::Tool(call, delta) => Event::Tool { choice, call, delta },
    }
}
