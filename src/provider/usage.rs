//! What an answer used, in every spelling there is: one usage object, whoever wrote it; several are merged field by field, the
//! larger one counts.
//!
//! Streams tell it in pieces (Anthropic: the prompt first, the rest at the end) or over and over (Google), so the last one
//! must not win. Unknown is `None`, never zero.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::provider::json::{Maybe, Text, skip};
use crate::task::Usage;

/// One usage as read, before what its writer meant is worked out.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Counts {
    /// Prompt tokens that include cached ones (OpenAI's chat, Google).
    prompt: Option<u64>,
    /// Input tokens; include cached ones unless `beside` are told as well.
    input: Option<u64>,
    output: Option<u64>,
    /// Google: thoughts are counted beside the answer.
    thoughts: Option<u64>,
    reasoning: Option<u64>,
    total: Option<u64>,
    /// Cached tokens as a part of the prompt.
    cached: Option<u64>,
    /// Cached tokens beside `input` (Anthropic, Bedrock).
    read_beside: Option<u64>,
    /// Tokens written to a cache, beside `input`.
    written_beside: Option<u64>,
    /// What Google's tools put into the prompt.
    tool_prompt: Option<u64>,
}

impl Counts {
    /// Takes the larger of each.
    pub(super) fn merge(&mut self, other: &Self) {
        let pairs = [
            (&mut self.prompt, other.prompt),
            (&mut self.input, other.input),
            (&mut self.output, other.output),
            (&mut self.thoughts, other.thoughts),
            (&mut self.reasoning, other.reasoning),
            (&mut self.total, other.total),
            (&mut self.cached, other.cached),
            (&mut self.read_beside, other.read_beside),
            (&mut self.written_beside, other.written_beside),
            (&mut self.tool_prompt, other.tool_prompt),
        ];
        for (mine, theirs) in pairs {
            *mine = (*mine).max(theirs);
        }
    }

    /// What it comes to; `None` if nothing was said.
    pub(super) fn usage(&self) -> Option<Usage> {
        let beside = self.read_beside.unwrap_or(0).saturating_add(self.written_beside.unwrap_or(0));
        let prompt = match (self.prompt, self.input) {
            // Whoever speaks of a prompt means all of it, even with Anthropic's fields next to it.
            (Some(prompt), _) => Some(prompt.saturating_add(self.tool_prompt.unwrap_or(0))),
            (None, Some(input)) => Some(input.saturating_add(beside)),
            (None, None) => None,
        };
        let output = self.output.map(|output| output.saturating_add(self.thoughts.unwrap_or(0))).or(self.thoughts);
        // Some leave reasoning out of the completion, but none out of the total.
        let rest = self.prompt.and(self.total).and_then(|total| total.checked_sub(prompt?));
        let completion = output.max(rest);
        if prompt.is_none() && completion.is_none() {
            return None;
        }
        let small = |count: Option<u64>| u32::try_from(count.unwrap_or(0)).unwrap_or(u32::MAX);
        let prompt_tokens = small(prompt);
        Some(Usage {
            prompt_tokens,
            cached_tokens: small(self.cached.max(self.read_beside)).min(prompt_tokens),
            written_tokens: small(self.written_beside).min(prompt_tokens),
            completion_tokens: small(completion),
            ..Usage::default()
        })
    }

    /// Of the completion, how much was thought rather than said, if that is known.
    pub(super) fn reasoning(&self) -> Option<u64> {
        self.reasoning.max(self.thoughts)
    }

    /// Of the prompt, how much was written to a cache.
    pub(super) fn written(&self) -> u64 {
        self.written_beside.unwrap_or(0)
    }
}

impl<'de> Deserialize<'de> for Counts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(CountsWalk)
    }
}

struct CountsWalk;

impl<'de> Visitor<'de> for CountsWalk {
    type Value = Counts;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a usage object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Counts, A::Error> {
        let mut counts = Counts::default();
        let (mut billed, mut read) = (None, None);
        while let Some(key) = map.next_key::<Text>()? {
            let field = match &*key {
                "prompt_tokens" | "promptTokenCount" => &mut counts.prompt,
                "input_tokens" | "inputTokens" | "inputTokenCount" => &mut counts.input,
                "completion_tokens"
                | "output_tokens"
                | "outputTokens"
                | "outputTokenCount"
                | "responseTokenCount"
                | "candidatesTokenCount" => &mut counts.output,
                "thoughtsTokenCount" => &mut counts.thoughts,
                "reasoning_tokens" => &mut counts.reasoning,
                "total_tokens" | "totalTokens" | "totalTokenCount" => &mut counts.total,
                "cached_tokens" | "prompt_cache_hit_tokens" | "num_cached_tokens" | "cachedContentTokenCount" => {
                    &mut counts.cached
                }
                "cache_read_input_tokens" | "cacheReadInputTokens" | "cacheReadInputTokenCount" => {
                    &mut counts.read_beside
                }
                "cache_creation_input_tokens" | "cacheWriteInputTokens" | "cacheWriteInputTokenCount" => {
                    &mut counts.written_beside
                }
                "cache_write_tokens" => &mut counts.written_beside,
                "toolUsePromptTokenCount" => &mut counts.tool_prompt,
                "prompt_tokens_details"
                | "input_tokens_details"
                | "input_token_details"
                | "completion_tokens_details"
                | "output_tokens_details"
                | "output_token_details" => {
                    if let Some(details) = map.next_value::<Maybe<Counts>>()?.0 {
                        counts.cached = counts.cached.max(details.cached);
                        counts.reasoning = counts.reasoning.max(details.reasoning);
                        counts.written_beside = counts.written_beside.max(details.written_beside);
                    }
                    continue;
                }
                // Cohere counts what it reads and what it bills for.
                "billed_units" => {
                    billed = map.next_value::<Maybe<Counts>>()?.0;
                    continue;
                }
                "tokens" => {
                    read = map.next_value::<Maybe<Counts>>()?.0;
                    continue;
                }
                _ => {
                    skip(&mut map)?;
                    continue;
                }
            };
            // Some write whole numbers with a point.
            let number = map.next_value::<Maybe<f64>>()?.0.filter(|number| *number >= 0.0);
            *field = (*field).max(number.map(|number| number as u64));
        }
        let said = |of: &Option<Counts>| of.is_some_and(|of| of.input.is_some() || of.output.is_some());
        if let Some(of) = if said(&billed) { billed } else { read } {
            counts.merge(&of);
        }
        Ok(counts)
    }
}
