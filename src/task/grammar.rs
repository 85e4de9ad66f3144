//! What an answer has to look like: the caller's wish as data, before any model's tokens are known.

use serde_json::Value;

/// A set of texts. An answer under a grammar is one of them, unless a limit cuts it short.
#[derive(Clone, PartialEq, Debug)]
pub enum Grammar {
    /// Any JSON object.
    Json,
    /// JSON that is valid under this schema.
    JsonSchema(Value),
    /// Text that this regular expression matches from its first to its last character.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation, as llguidance reads it: `start` is the whole answer, `%json {…}` a schema within.
    Lark(String),
    /// A grammar in GBNF, llama.cpp's notation: `root` is the whole answer.
    Gbnf(String),
}

impl Grammar {
    /// Whether every complete answer is a JSON document.
    pub const fn is_json(&self) -> bool {
        matches!(self, Self::Json | Self::JsonSchema(_))
    }
}
