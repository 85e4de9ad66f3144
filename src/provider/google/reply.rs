//! What Google answers. A stream consists of whole answers, each with what is new.
//!
//!     {"candidates":[{"content":{"parts":[{"text":"Hel"}]}}],"usageMetadata":{…}}
//!     {"candidates":[{"content":{"parts":[{"text":"lo"}]},"finishReason":"STOP"}],"usageMetadata":{…}}
//!
//! There is no mark at the end: the stream is complete when every candidate has said why it ended.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::base::{Error, Result};
use crate::net::sse::Encoder;
use crate::provider::json::Text;
use crate::provider::reply::{Choice, Chunks, Finish, completion, logprob};
use crate::provider::usage::Counts;
use crate::provider::{Meta, broken, failure};

/// More candidates than this nobody offers.
const MOST_CANDIDATES: u32 = 128;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    #[serde(borrow, default)]
    candidates: Vec<Candidate<'a>>,
    #[serde(borrow)]
    prompt_feedback: Option<Feedback<'a>>,
    usage_metadata: Option<Counts>,
    #[serde(borrow)]
    model_version: Option<Text<'a>>,
    #[serde(borrow)]
    response_id: Option<Text<'a>>,
    error: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Candidate<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    content: Option<Content<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    #[serde(borrow)]
    finish_message: Option<Text<'a>>,
    #[serde(borrow)]
    logprobs_result: Option<LogprobsResult<'a>>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, default)]
    parts: Vec<Part<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(default)]
    thought: bool,
    #[serde(borrow)]
    thought_signature: Option<Text<'a>>,
    #[serde(borrow)]
    function_call: Option<FunctionCall<'a>>,
}

#[derive(Deserialize)]
struct FunctionCall<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow)]
    args: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Feedback<'a> {
    #[serde(borrow)]
    block_reason: Option<Text<'a>>,
    #[serde(borrow)]
    block_reason_message: Option<Text<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LogprobsResult<'a> {
    #[serde(borrow, default)]
    chosen_candidates: Vec<Token<'a>>,
    #[serde(borrow, default)]
    top_candidates: Vec<Top<'a>>,
}

#[derive(Deserialize)]
struct Top<'a> {
    #[serde(borrow, default)]
    candidates: Vec<Token<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Token<'a> {
    #[serde(borrow)]
    token: Text<'a>,
    #[serde(default)]
    log_probability: f64,
}

impl LogprobsResult<'_> {
    fn entries(&self) -> Vec<Value> {
        let entries = self.chosen_candidates.iter().enumerate().map(|(at, chosen)| {
            let rivals = self.top_candidates.get(at).map_or(&[][..], |top| &top.candidates);
            let rivals = rivals.iter().map(|rival| logprob(&rival.token, rival.log_probability, None)).collect();
            logprob(&chosen.token, chosen.log_probability, Some(rivals))
        });
        entries.collect()
    }
}

fn read(bytes: &[u8]) -> Result<Response<'_>> {
    let response: Response =
        serde_json::from_slice(bytes).map_err(|error| broken(format!("the answer is not one of Google's: {error}")))?;
    if let Some(error) = &response.error {
        return Err(failure::inside(Some(error)));
    }
    Ok(response)
}

/// Why a candidate ended, unless it failed.
fn finish(candidate: &Candidate, calls: bool) -> Result<Option<Finish>> {
    let Some(reason) = candidate.finish_reason.as_deref() else { return Ok(None) };
    Ok(Some(match reason {
        "FINISH_REASON_UNSPECIFIED" => return Ok(None),
        "MAX_TOKENS" => Finish::Length,
        "SAFETY"
        | "RECITATION"
        | "LANGUAGE"
        | "BLOCKLIST"
        | "PROHIBITED_CONTENT"
        | "SPII"
        | "IMAGE_SAFETY"
        | "IMAGE_PROHIBITED_CONTENT"
        | "IMAGE_RECITATION"
        | "MODEL_ARMOR" => Finish::ContentFilter,
        "MALFORMED_FUNCTION_CALL"
        | "UNEXPECTED_TOOL_CALL"
        | "TOO_MANY_TOOL_CALLS"
        | "MALFORMED_RESPONSE"
        | "MISSING_THOUGHT_SIGNATURE" => return Err(failed(reason, candidate.finish_message.as_deref())),
        _ if calls => Finish::ToolCalls,
        _ => Finish::Stop,
    }))
}

fn failed(reason: &str, message: Option<&str>) -> Error {
    match message {
        Some(message) => broken(format!("the model failed with {reason}: {message}")),
        None => broken(format!("the model failed with {reason}: try again")),
    }
}

/// The word for a prompt that was not let through.
fn blocked(feedback: Option<&Feedback>) -> Option<String> {
    let feedback = feedback?;
    let reason = feedback.block_reason.as_deref()?;
    let message = feedback.block_reason_message.as_deref();
    Some(message.map_or_else(|| format!("The prompt was blocked: {reason}."), str::to_owned))
}

/// An id for a call that came without one.
fn call_id(given: Option<&str>, meta_id: &str, count: u32) -> String {
    given.map_or_else(|| format!("call_{}_{count}", meta_id.trim_start_matches("chatcmpl-")), str::to_owned)
}

/// A whole answer.
pub(in crate::provider) fn answer(meta: &Meta, body: &[u8]) -> Result<Bytes> {
    let response = read(body)?;
    let mut choices = Vec::with_capacity(response.candidates.len());
    let mut calls = 0;
    for candidate in &response.candidates {
        let mut choice = Choice::default();
        for part in candidate.content.iter().flat_map(|content| &content.parts) {
            if let Some(text) = &part.text {
                if part.thought { choice.reasoning(text) } else { choice.text(text) }
            }
            if let Some(call) = &part.function_call {
                let id = call_id(call.id.as_deref(), &meta.id, calls);
                let arguments = call.args.map_or("{}", RawValue::get).to_owned();
                choice.call(&id, &call.name, arguments, part.thought_signature.as_deref());
                calls += 1;
            }
        }
        if let Some(logprobs) = &candidate.logprobs_result {
            choice.logprobs(logprobs.entries());
        }
        let finish = finish(candidate, choice.has_calls())?.unwrap_or(Finish::Stop);
        choices.push((choice, finish));
    }
    if choices.is_empty() {
        let refusal = blocked(response.prompt_feedback.as_ref())
            .ok_or_else(|| broken("the answer has no candidates and does not say why"))?;
        let mut choice = Choice::default();
        choice.refusal(refusal);
        choices.push((choice, Finish::ContentFilter));
    }
    let counts = response.usage_metadata.unwrap_or_default();
    Ok(completion(meta, response.response_id.as_deref(), response.model_version.as_deref(), choices, &counts))
}

/// The state of a stream.
#[derive(Debug)]
pub(in crate::provider) struct Stream {
    /// What ids of calls are made of.
    id: String,
    calls: u32,
}

impl Stream {
    pub(in crate::provider) fn new(meta: &Meta) -> Self {
        Self { id: meta.id.clone(), calls: 0 }
    }

    pub(in crate::provider) fn event(&mut self, data: &str, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        let response = read(data.as_bytes())?;
        chunks.named(response.response_id.as_deref(), response.model_version.as_deref());
        chunks.counts.merge(&response.usage_metadata.unwrap_or_default());
        for candidate in &response.candidates {
            if candidate.index < MOST_CANDIDATES {
                self.candidate(candidate, chunks, out)?;
            }
        }
        if response.candidates.is_empty()
            && let Some(refusal) = blocked(response.prompt_feedback.as_ref())
        {
            chunks.refusal(0, &refusal, out);
            chunks.finish(0, Finish::ContentFilter, out);
        }
        Ok(())
    }

    fn candidate(&mut self, candidate: &Candidate, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        let index = candidate.index;
        chunks.begin(index, out);
        let mut logprobs = candidate.logprobs_result.as_ref().map(LogprobsResult::entries);
        for part in candidate.content.iter().flat_map(|content| &content.parts) {
            match &part.text {
                Some(text) if part.thought => chunks.reasoning(index, text, out),
                Some(text) => match logprobs.take() {
                    Some(entries) => chunks.text_with_logprobs(index, text, entries, out),
                    None => chunks.text(index, text, out),
                },
                None => {}
            }
            if let Some(call) = &part.function_call {
                let id = call_id(call.id.as_deref(), &self.id, self.calls);
                self.calls += 1;
                let target = chunks.call(index, &id, &call.name, part.thought_signature.as_deref(), out);
                chunks.arguments(index, target, call.args.map_or("{}", RawValue::get), out);
            }
        }
        if let Some(finish) = finish(candidate, chunks.has_calls(index))? {
            chunks.finish(index, finish, out);
        }
        Ok(())
    }

    /// The upstream has closed the stream.
    pub(in crate::provider) fn end(&mut self, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        if !chunks.is_finished() {
            return Err(broken("the stream ended before every candidate had said why it ended"));
        }
        chunks.done(out);
        Ok(())
    }
}
