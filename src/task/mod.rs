//! What can be asked of a model and what comes back, as plain data. No model, no transport.

mod encode;
mod event;
mod grammar;
mod text;
mod tools;

pub use encode::{EncodeInput, Passage, Pooling, Want};
pub use event::{Event, FinishReason, PromptToken, Scored, TokenLogprob, Usage};
pub use grammar::Grammar;
pub use text::{Dry, Message, Prompt, Role, Sampling, Speculation, TextInput};
pub use tools::{Tool, ToolCall, ToolChoice, ToolDelta, Tools};

use serde::{Deserialize, Serialize};

/// The kinds of work a catalog entry can do. Names and ids are Cloudflare's, since clients filter by either.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Chat and completion.
    TextGeneration,
    /// Text to vector.
    TextEmbeddings,
    /// Prompt to picture.
    TextToImage,
    /// Speech to text.
    AutomaticSpeechRecognition,
    /// Text to speech.
    TextToSpeech,
    /// Sentiment and rerankers.
    TextClassification,
    /// Picture to labels.
    ImageClassification,
    /// Picture to boxes.
    ObjectDetection,
    /// Picture to text.
    ImageToText,
    /// Long text to short.
    Summarization,
    /// One language to another.
    Translation,
}

impl Task {
    /// Every task, in the order of the catalog documentation.
    pub const ALL: [Self; 11] = [
        Self::TextGeneration,
        Self::TextEmbeddings,
        Self::TextToImage,
        Self::AutomaticSpeechRecognition,
        Self::TextToSpeech,
        Self::TextClassification,
        Self::ImageClassification,
        Self::ObjectDetection,
        Self::ImageToText,
        Self::Summarization,
        Self::Translation,
    ];

    /// Display name as in `task.name` of a model search result.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TextGeneration => "Text Generation",
            Self::TextEmbeddings => "Text Embeddings",
            Self::TextToImage => "Text-to-Image",
            Self::AutomaticSpeechRecognition => "Automatic Speech Recognition",
            Self::TextToSpeech => "Text-to-Speech",
            Self::TextClassification => "Text Classification",
            Self::ImageClassification => "Image Classification",
            Self::ObjectDetection => "Object Detection",
            Self::ImageToText => "Image-to-Text",
            Self::Summarization => "Summarization",
            Self::Translation => "Translation",
        }
    }

    /// Whether an encoder answers it: texts in, vectors or scores out.
    pub const fn encodes(self) -> bool {
        matches!(self, Self::TextEmbeddings | Self::TextClassification)
    }

    /// The fixed id behind the name.
    pub const fn id(self) -> &'static str {
        match self {
            Self::TextGeneration => "c329a1f9-323d-4e91-b2aa-582dd4188d34",
            Self::TextEmbeddings => "0137cdcf-162a-4108-94f2-1ca59e8c65ee",
            Self::TextToImage => "3d6e1f35-341b-4915-a6c8-9a7142a9033a",
            Self::AutomaticSpeechRecognition => "dfce1c48-2a81-462e-a7fd-de97ce985207",
            Self::TextToSpeech => "b52660a1-9a95-4ab2-8b1d-f232be34604a",
            Self::TextClassification => "19606750-23ed-4371-aab2-c20349b53a60",
            Self::ImageClassification => "00cd182b-bf30-4fc4-8481-84a3ab349657",
            Self::ObjectDetection => "9c178979-90d9-49d8-9e2c-0f1cf01815d4",
            Self::ImageToText => "882a91d1-c331-4eec-bdad-834c919942a8",
            Self::Summarization => "6f4e65d8-da0f-40d2-9aa4-db582a5a04fd",
            Self::Translation => "f57d07cb-9087-487a-bbbf-bc3e17fecc4b",
        }
    }
}
