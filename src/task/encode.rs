//! Embeddings, reranking, text classification: one pass over each text, vectors or scores back.

use serde::{Deserialize, Serialize};

/// One call, whatever surface it came through. Ranges are checked where it is parsed.
#[derive(Clone, Debug)]
pub struct EncodeInput {
    /// What is read, at least one; results come in the same order.
    pub passages: Vec<Passage>,
    /// What is wanted of them.
    pub want: Want,
    /// Cut what is longer than the model reads, or refuse it. `None`: as the catalog says.
    pub truncate: Option<bool>,
}

/// What the model reads at a time.
#[derive(Clone, Debug)]
pub enum Passage {
    /// A text.
    Text(String),
    /// Two texts that are judged together: a query and a passage.
    Pair(String, String),
    /// Token ids as the model's own tokenizer makes them, special ones included or not.
    Tokens(Vec<u32>),
}

/// What is wanted of an encoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// A vector of length 1 for each passage. `None`: pooled as the catalog says.
    Vectors(Option<Pooling>),
    /// From 0 to 1, how well the second text of each pair answers the first.
    Scores,
    /// The probability of each label for each passage.
    Labels,
}

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The mean over all of them.
    #[default]
    Mean,
    /// The first one's, which models trained so put the whole text into.
    Cls,
}

impl Pooling {
    /// As on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
        }
    }
}
