//! OpenAI's own dialect: nothing is translated, but streams are watched.
//!
//!     data: {"choices":[{"delta":…}]}          passes as it is
//!     data: {"choices":[],"usage":{…}}         passes if the caller asked for it, or else was only for us
//!     data: {"error":{…}}                      the stream has failed, whatever its status was
//!     data: [DONE]                             the stream is complete

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::base::Result;
use crate::net::sse::Encoder;
use crate::provider::usage::Counts;
use crate::provider::{broken, failure};

/// What there is to see in a chunk.
#[derive(Deserialize)]
struct Peek<'a> {
    error: Option<Value>,
    usage: Option<Counts>,
    x_groq: Option<Groq>,
    #[serde(borrow)]
    choices: Option<Vec<Ending<'a>>>,
    /// Errors of those who leave out the envelope.
    message: Option<Value>,
    object: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Groq {
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Ending<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    finish_reason: Option<&'a serde_json::value::RawValue>,
}

/// A whole answer: as it came, if it is one.
pub(super) fn answer(body: &[u8]) -> Result<Bytes> {
    #[derive(Deserialize)]
    struct Whole {
        error: Option<Value>,
        choices: Option<Vec<IgnoredAny>>,
    }
    let whole: Whole = serde_json::from_slice(body)
        .map_err(|error| broken(format!("the answer is not a chat completion: {error}")))?;
    match whole {
        Whole { choices: Some(_), error: None } => Ok(Bytes::copy_from_slice(body)),
        Whole { error: Some(error), .. } => Err(failure::inside(Some(&error))),
        Whole { choices: None, .. } => Err(broken("the answer is not a chat completion: it has no choices")),
    }
}

/// The state of a stream.
#[derive(Debug)]
pub(super) struct Stream {
    include_usage: bool,
    pub(super) counts: Counts,
    /// Which choices have begun, and which of them have ended.
    begun: u128,
    ended: u128,
    done: bool,
}

impl Stream {
    pub(super) fn new(include_usage: bool) -> Self {
        Self { include_usage, counts: Counts::default(), begun: 0, ended: 0, done: false }
    }

    pub(super) fn event(&mut self, data: &str, out: &mut Encoder) -> Result<()> {
        if self.done {
            return Ok(());
        }
        if data.trim() == "[DONE]" {
            self.done = true;
            out.text(None, "[DONE]");
            return Ok(());
        }
        let peek: Peek =
            serde_json::from_str(data).map_err(|error| broken(format!("the stream is not one of chunks: {error}")))?;
        if peek.error.is_some() || peek.object.as_deref() == Some("error") {
            return Err(failure::inside(peek.error.as_ref().or(peek.message.as_ref())));
        }
        let usage = peek.usage.or(peek.x_groq.and_then(|groq| groq.usage));
        if let Some(counts) = &usage {
            self.counts.merge(counts);
        }
        for choice in peek.choices.iter().flatten() {
            let bit = 1 << choice.index.min(127);
            self.begun |= bit;
            if choice.finish_reason.is_some_and(|reason| reason.get() != "null") {
                self.ended |= bit;
            }
        }
        let only_usage = usage.is_some() && peek.choices.is_none_or(|choices| choices.is_empty());
        if !only_usage || self.include_usage {
            out.text(None, data);
        }
        Ok(())
    }

    /// The upstream has closed the stream. Some do so behind the last chunk, without a mark.
    pub(super) fn end(&mut self, out: &mut Encoder) -> Result<()> {
        if self.done {
            return Ok(());
        }
        if self.begun == 0 || self.begun != self.ended {
            return Err(broken("the stream ended before the answer did"));
        }
        self.done = true;
        out.text(None, "[DONE]");
        Ok(())
    }
}
