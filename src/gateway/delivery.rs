//! The answer on its way to the client, and its close.

use crate::base::{Neurons, Result};
use crate::task::{Event, FinishReason, TokenLogprob, Usage};

/// The events of a call that has begun to answer. Closes the call exactly once, however it ends: settled by what was
/// produced, logged, counted. Dropping it early cancels the work.
pub struct Delivery {}

impl Delivery {
    /// The next event; `None` after `Done` or `Failed`.
    pub async fn next(&mut self) -> Option<Event> {
        None
    }

    /// What the call cost; final once `Done` has been seen.
    pub fn neurons(&self) -> Neurons {
        Neurons::ZERO
    }

    /// Takes the whole answer at once.
    ///
    /// # Errors
    /// The error the stream failed with.
    pub async fn collect(self) -> Result<Answer> {
        Ok(Answer { choices: Vec::new(), usage: Usage::default(), neurons: Neurons::ZERO })
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// In order of their index.
    pub choices: Vec<Choice>,
    /// What it used.
    pub usage: Usage,
    /// What it cost.
    pub neurons: Neurons,
}

/// One of the answers to a prompt.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// The stop string that ended it, if one did.
    pub stop: Option<String>,
    /// One entry a token, if asked for.
    pub logprobs: Vec<TokenLogprob>,
}
