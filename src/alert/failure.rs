//! Why a notice was not delivered, in words that fit where they are shown.

use std::time::Duration;

/// Why a notice was not delivered.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Failure {
    /// For who runs this; holds no secret.
    pub why: String,
    /// Whether it was understood and not wanted: the same again will hardly help.
    pub is_refusal: bool,
    /// How long the other side wants to be left alone.
    pub wait: Option<Duration>,
}

impl Failure {
    pub(super) fn later(why: impl Into<String>) -> Self {
        Self { why: why.into(), is_refusal: false, wait: None }
    }
}

/// So many letters at most.
pub(super) fn cut(text: &str, most: usize) -> &str {
    text.char_indices().nth(most).map_or(text, |(end, _)| &text[..end])
}
