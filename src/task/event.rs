//! What an engine or an upstream tells the gateway while it works on a call.
//!
//!     Prompt? (Text | Tool)* Finish (once a choice) … Done | Failed
//!
//! A stream ends with exactly one `Done` or `Failed`; a channel that closes without either means the engine died.

use serde::{Deserialize, Serialize};

use crate::base::Error;
use crate::task::ToolDelta;

/// One step of an answer.
#[derive(Clone, Debug)]
pub enum Event {
    /// What the model thinks of the prompt's tokens, before the first text; only if that was asked for.
    Prompt(Vec<PromptToken>),
    /// New text of one choice. Always whole UTF-8 characters; may be empty when only log-probabilities are due.
    Text {
        /// Which choice, from 0.
        choice: u32,
        /// What is new since the last event of this choice.
        text: String,
        /// One entry a token behind this text, if asked for.
        logprobs: Vec<TokenLogprob>,
        /// What the call has used so far, over all choices: what is billed if the client leaves now.
        usage: Usage,
    },
    /// More of a tool call. Made by the gateway out of text; engines send none.
    Tool {
        /// Which choice, from 0.
        choice: u32,
        /// Which call of this choice, from 0. A call is complete when the next one, a text or the finish follows.
        call: u32,
        /// What is new.
        delta: ToolDelta,
    },
    /// A choice is complete.
    Finish {
        /// Which choice, from 0.
        choice: u32,
        /// Why it ended.
        reason: FinishReason,
        /// The stop string that ended it, if one did.
        stop: Option<String>,
    },
    /// All choices are complete.
    Done(Usage),
    /// The call failed. What was sent before stands, nothing follows.
    Failed(Error),
}

/// Why a choice ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model's end token or a stop string.
    Stop,
    /// `max_tokens` or the context window.
    Length,
    /// The model ended with calls of tools; engines say `Stop`.
    ToolCalls,
}

impl FinishReason {
    /// As on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// Log-probability of one produced token under the model's own distribution (before temperature and filters).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token's id.
    pub token: u32,
    /// The token's bytes; a token may be part of a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The best rivals, best first: id, bytes, log-probability.
    pub top: Vec<(u32, Vec<u8>, f32)>,
}

/// A token of the prompt, and what the model thinks of it where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    /// The token's id.
    pub token: u32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// `None` for the first one, before which there is nothing to expect it from.
    pub scored: Option<Scored>,
}

/// What a model thinks of a token that it did not draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: u32,
    /// The best tokens, best first: id, bytes, log-probability.
    pub top: Vec<(u32, Vec<u8>, f32)>,
}

/// What a call used, in the units its price is written in.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens read, cached ones included.
    pub prompt_tokens: u32,
    /// Of those, how many came out of the prefix cache.
    pub cached_tokens: u32,
    /// Of the prompt, how many tokens an upstream wrote to its cache, which have a price of their own.
    #[serde(default)]
    pub written_tokens: u32,
    /// Tokens produced, over all choices, end tokens included.
    pub completion_tokens: u32,
    /// Tokens that were guessed ahead and verified; they cost nothing.
    #[serde(default)]
    pub drafted_tokens: u32,
    /// Of those, how many came true and are part of `completion_tokens`.
    #[serde(default)]
    pub accepted_tokens: u32,
}

impl Usage {
    /// Read plus produced.
    pub const fn total_tokens(&self) -> u32 {
        self.prompt_tokens + self.completion_tokens
    }
}
