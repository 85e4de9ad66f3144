//! What all surfaces write of an answer: the response around it and what it used.

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde::Serialize;

use crate::base::{Error, Neurons, Result};
use crate::task::Usage;

/// OpenAI's `usage`, with neurons beside the tokens.
#[derive(Clone, Copy, Serialize)]
pub(super) struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    neurons: f64,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl UsageJson {
    pub(super) fn new(usage: &Usage, neurons: Neurons) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
            neurons: neurons.as_f64(),
        }
    }
}

/// Two calls' usage as one.
pub(super) fn sum(a: Usage, b: Usage) -> Usage {
    Usage {
        prompt_tokens: a.prompt_tokens.saturating_add(b.prompt_tokens),
        cached_tokens: a.cached_tokens.saturating_add(b.cached_tokens),
        completion_tokens: a.completion_tokens.saturating_add(b.completion_tokens),
    }
}

/// A JSON answer of a model, with its cost in the header.
///
/// # Errors
/// `Internal` if it does not serialise, which would be a bug.
pub(super) fn metered(value: &impl Serialize, neurons: Neurons) -> Result<HttpResponse> {
    Ok(HttpResponse::build(StatusCode::OK)
        .content_type("application/json")
        .insert_header(("cf-ai-neurons", neurons.to_string()))
        .body(to_json(value)?))
}

/// A JSON answer that costs nothing.
///
/// # Errors
/// As [`metered`].
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Result<HttpResponse> {
    // Exactly this type, with no charset: Worker code gets a stream instead of an object otherwise.
    Ok(HttpResponse::build(status).content_type("application/json").body(to_json(value)?))
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::internal("an answer does not serialise").with_source(error))
}
