//! What all surfaces write of an answer: the response around it and what it used.

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::base::{Error, Neurons, Result};
use crate::gateway::Choice;
use crate::task::Usage;

/// OpenAI's `usage`, with neurons beside the tokens.
#[derive(Clone, Copy, Serialize)]
pub(super) struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    /// Left out where nothing was guessed.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionDetails>,
    neurons: f64,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

/// What was guessed ahead. Unlike OpenAI's, rejected tokens are not billed.
#[derive(Clone, Copy, Serialize)]
struct CompletionDetails {
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

impl UsageJson {
    pub(super) fn new(usage: &Usage, neurons: Neurons) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: (usage.drafted_tokens > 0).then(|| CompletionDetails {
                accepted_prediction_tokens: usage.accepted_tokens,
                rejected_prediction_tokens: usage.drafted_tokens.saturating_sub(usage.accepted_tokens),
            }),
            neurons: neurons.as_f64(),
        }
    }
}

/// JSON has no infinity; OpenAI writes this for what is all but impossible.
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(-9999.0) } else { -9999.0 }
}

/// vLLM's `prompt_logprobs`: an entry a token of the prompt, `null` for the first, else the token and the best in its
/// place by id.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct PromptLogprobs(Vec<Option<ById>>);

struct ById(Vec<(u32, Weighed)>);

#[derive(Serialize)]
struct Weighed {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl PromptLogprobs {
    /// With at most so many rivals a token; `None` if nothing is known of the prompt.
    pub(super) fn new(choice: &Choice, rivals: u32) -> Option<Self> {
        let weighed = |logprob: f32, rank: u32, bytes: &[u8]| {
            let decoded_token = String::from_utf8_lossy(bytes).into_owned();
            Weighed { logprob: finite(logprob), rank, decoded_token }
        };
        let tokens = choice.prompt.as_ref()?.iter().map(|of| {
            let scored = of.scored.as_ref()?;
            let own = (of.token, weighed(scored.logprob, scored.rank, &of.bytes));
            let best = scored.top.iter().take(rivals as usize).enumerate();
            let best = best.filter(|(_, rival)| rival.0 != of.token);
            let best = best.map(|(at, (id, bytes, logprob))| (*id, weighed(*logprob, at as u32 + 1, bytes)));
            Some(ById([own].into_iter().chain(best).collect()))
        });
        Some(Self(tokens.collect()))
    }
}

impl Serialize for ById {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, weighed) in &self.0 {
            map.serialize_entry(&id.to_string(), weighed)?;
        }
        map.end()
    }
}

/// Two calls' usage as one.
pub(super) fn sum(a: Usage, b: Usage) -> Usage {
    Usage {
        prompt_tokens: a.prompt_tokens.saturating_add(b.prompt_tokens),
        cached_tokens: a.cached_tokens.saturating_add(b.cached_tokens),
        written_tokens: a.written_tokens.saturating_add(b.written_tokens),
        completion_tokens: a.completion_tokens.saturating_add(b.completion_tokens),
        drafted_tokens: a.drafted_tokens.saturating_add(b.drafted_tokens),
        accepted_tokens: a.accepted_tokens.saturating_add(b.accepted_tokens),
    }
}

/// A JSON answer of a model, with its cost in the header.
///
/// # Errors
/// `Internal` if it does not serialise, which would be a bug.
pub(super) fn metered(value: &impl Serialize, neurons: Neurons) -> Result<HttpResponse> {
    Ok(metered_json(to_json(value)?, neurons))
}

/// The same for a body that is JSON already.
pub(super) fn metered_json(body: Vec<u8>, neurons: Neurons) -> HttpResponse {
    HttpResponse::build(StatusCode::OK)
        .content_type("application/json")
        .insert_header(("cf-ai-neurons", neurons.to_string()))
        .body(body)
}

/// A JSON answer that costs nothing.
///
/// # Errors
/// As [`metered`].
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Result<HttpResponse> {
    // Exactly this type, with no charset: Worker code gets a stream instead of an object otherwise.
    Ok(HttpResponse::build(status).content_type("application/json").body(to_json(value)?))
}

pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::internal("an answer does not serialise").with_source(error))
}
