//! OpenAI's own dialect: nothing is translated, but streams are watched.
//!
//!     data: {"choices":[{"delta":…}]}          passes as it is
//!     data: {"choices":[],"usage":{…}}         passes if the caller asked for it, or else was only for us
//!     data: {"error":{…}}                      the stream has failed, whatever its status was
//!     data: [DONE]                             the stream is complete

use std::fmt;

use bytes::Bytes;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::base::Result;
use crate::net::sse::Encoder;
use crate::provider::json::{Maybe, Text};
use crate::provider::usage::Counts;
use crate::provider::{broken, failure};

/// What there is to see in a chunk.
#[derive(Deserialize)]
struct Peek<'a> {
    error: Option<Value>,
    #[serde(default)]
    usage: Maybe<Counts>,
    #[serde(default)]
    x_groq: Maybe<Groq>,
    choices: Option<Endings>,
    /// Errors of those who leave out the envelope.
    message: Option<Value>,
    #[serde(borrow)]
    object: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct Groq {
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Ending<'a> {
    index: Option<u32>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

/// Which choices are in a chunk, and which of them end with it, a bit each. No list is made of them.
#[derive(Default)]
struct Endings {
    begun: u128,
    ended: u128,
}

impl<'de> Deserialize<'de> for Endings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Endings;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of choices")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Endings, A::Error> {
                let mut endings = Endings::default();
                while let Some(choice) = list.next_element::<Ending>()? {
                    let bit = 1 << choice.index.unwrap_or(0).min(127);
                    endings.begun |= bit;
                    if choice.finish_reason.is_some_and(|reason| reason.get() != "null") {
                        endings.ended |= bit;
                    }
                }
                Ok(endings)
            }
        }
        deserializer.deserialize_seq(Walk)
    }
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
        let usage = peek.usage.0.or(peek.x_groq.0.and_then(|groq| groq.usage));
        if let Some(counts) = &usage {
            self.counts.merge(counts);
        }
        let Endings { begun, ended } = peek.choices.unwrap_or_default();
        self.begun |= begun;
        self.ended |= ended;
        let only_usage = usage.is_some() && begun == 0;
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
