//! What an engine is asked.

use std::sync::Arc;
use std::time::Instant;

use crate::base::{AccountId, RequestId, SlotId};
use crate::model::Vocabulary;
use crate::model::grammar::CompiledGrammar;
use crate::model::lora::Adapter;
use crate::task::{Event, Sampling};

/// A request on its way to the engine: tokens in, events out.
pub struct Submit {
    /// Whose answer it is, for logs.
    pub request: RequestId,
    /// Who is served; the scheduler is fair between accounts.
    pub account: AccountId,
    /// The account's share beside others', at least 1.
    pub weight: u32,
    /// Which loaded model.
    pub slot: SlotId,
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Independent answers, at least 1. They share the prompt's full KV blocks.
    pub choices: u32,
    /// Most tokens to produce for each choice, at least 1. `prompt.len() + max_tokens` fits the context window.
    pub max_tokens: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Seed in force: the caller's, or drawn for the request. Choice `i` uses `seed + i`.
    pub seed: u64,
    /// Text that ends a choice, none of them empty.
    pub stop: Vec<String>,
    /// `Some(k)`: report log-probabilities and `k` rivals for each token.
    pub logprobs: Option<u32>,
    /// What every choice must look like.
    pub grammar: Option<CompiledGrammar>,
    /// `Some(k)`: report log-probabilities and the `k` best for each token of the prompt, before anything else. The
    /// prompt is computed in full then, whatever the prefix cache holds.
    pub prompt_logprobs: Option<u32>,
    /// Higher is served first; 0 is normal.
    pub priority: i8,
    /// Separates prefix caches: requests share KV only if their salts are equal.
    pub cache_salt: u64,
    /// The adapter to compute with, opened for this slot's model. Its requests share KV among themselves only.
    pub adapter: Option<Arc<Adapter>>,
    /// Most tokens guessed ahead in a step, if fewer than the model's; changes the pace of the answer only.
    pub drafts: Option<u32>,
    /// Tokens of the text that the caller foresees; empty: nothing is known.
    pub expected: Vec<u32>,
    /// When the answer is worth nothing any more.
    pub deadline: Instant,
    /// When the call came in, for queue time and TTFT.
    pub received: Instant,
    /// What tokens print in this answer, if it is not what the slot's vocabulary says: the same tokens, others shown.
    pub vocabulary: Option<Arc<Vocabulary>>,
    /// Where the events go. Capacity: [`Submit::event_capacity`], so that the engine never waits for a client. Dropping
    /// the receiver cancels the request.
    pub events: flume::Sender<Event>,
}

impl Submit {
    /// Room for every event that a request can cause: one for the prompt, one a token, a finish a choice, usage of what
    /// was held back at the end, and `Done` or `Failed`.
    pub fn event_capacity(choices: u32, max_tokens: u32) -> usize {
        choices as usize * (max_tokens as usize + 2) + 3
    }
}
