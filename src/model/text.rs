//! The text half of a model: tokenizer, chat template, vocabulary, limits. Shared by every caller; never on a device.

use std::path::Path;
use std::sync::Arc;

use crate::base::{Error, Result};
use crate::model::Vocabulary;
use crate::model::files::ModelFiles;
use crate::task::Prompt;

/// Tokenizer, template and limits of one model.
pub struct TextModel {
    vocabulary: Arc<Vocabulary>,
    context: u32,
}

impl TextModel {
    /// Opens the text half of a GGUF file or of a safetensors folder (`tokenizer.json`, `tokenizer_config.json`).
    pub fn open(path: &Path) -> Result<Self> {
        Err(Error::internal(format!("{}: no reader yet", path.display())))
    }

    /// The text half of files that are open already.
    pub fn of(files: &Arc<ModelFiles>) -> Result<Self> {
        Self::open(files.path())
    }

    /// A text half without a file: every byte is a token. For the simulated device.
    pub fn bytes(vocabulary: Arc<Vocabulary>, _end: u32, context: u32) -> Self {
        Self { vocabulary, context }
    }

    /// Bytes behind tokens, end tokens.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The longest sequence the model was made for.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// Text to tokens. With `special`, the text of control tokens (`<|im_end|>`) becomes those tokens.
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>> {
        Err(Error::internal("no tokenizer yet"))
    }

    /// A prompt in any form to the tokens the model reads: chat through the model's template (with the generation
    /// prompt added), raw text with a beginning-of-text token where the tokenizer wants one, tokens as they are.
    ///
    /// # Errors
    /// `BadInput` when the template refuses the messages, when the prompt is empty, or when a token id is outside the vocabulary.
    pub fn prompt_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let text = match prompt {
            Prompt::Raw(text) => text.clone(),
            Prompt::Chat { messages, .. } => messages.iter().map(|message| message.content.as_str()).collect(),
            Prompt::Tokens(tokens) => return Ok(tokens.clone()),
        };
        Ok(text.bytes().map(u32::from).collect())
    }
}
