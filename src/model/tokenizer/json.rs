//! Text to tokens by a `tokenizer.json`, through the `tokenizers` crate: every kind of tokenizer that hubs have.
//!
//! Truncation and padding, which some files ask for, are left out, and so is the post-processor: which token begins a
//! prompt is `TextModel`'s business.

use std::path::Path;

use tokenizers::tokenizer::{AddedVocabulary, Model, OffsetType, PostProcessor, PreTokenizer};

use crate::base::{Error, Result};
use crate::model::gguf::broken;
use crate::model::tokenizer::put_piece;

/// A tokenizer out of a `tokenizer.json`.
pub(super) struct JsonTokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// The same added tokens, with special ones taken as plain text.
    plain: AddedVocabulary,
}

/// What a token is, read out of the file.
pub(super) struct JsonToken {
    pub(super) id: u32,
    pub(super) text: String,
    /// What it prints.
    pub(super) piece: Vec<u8>,
    pub(super) special: bool,
}

impl JsonTokenizer {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            broken(path, format_args!("is not a tokenizer that can be read ({error}); fetch it again"))
        };
        let text = super::super::files::read_text(path)?
            .ok_or_else(|| broken(path, "is missing; fetch the model again, tokenizer included"))?;
        let tokenizer: tokenizers::Tokenizer = text.parse().map_err(|error| wrong(&error))?;
        let mut plain = tokenizer.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        Ok(Self { tokenizer, plain })
    }

    pub(super) fn encode(&self, text: &str, special: bool, out: &mut Vec<u32>) -> Result<()> {
        let failed = |error: tokenizers::Error| Error::internal(format!("the tokenizer failed: {error}"));
        let added = if special { self.tokenizer.get_added_vocabulary() } else { &self.plain };
        let mut pieces = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        if let Some(rule) = self.tokenizer.get_pre_tokenizer() {
            rule.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.tokenizer.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(failed)?;
        out.extend_from_slice(pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?.get_ids());
        Ok(())
    }

    /// The token that the post-processor puts in front of a text, if it does.
    pub(super) fn first_token(&self) -> Option<u32> {
        let rule = self.tokenizer.get_post_processor()?;
        let empty = tokenizers::Encoding::default();
        rule.process(empty, None, true).ok()?.get_ids().first().copied()
    }

    pub(super) fn tokens(&self) -> Result<Vec<JsonToken>> {
        let decoder = serde_json::to_string(&self.tokenizer.get_decoder()).unwrap_or_default();
        let byte_level = decoder.contains("\"ByteLevel\"");
        if !byte_level
            && !["\"ByteFallback\"", "\"Metaspace\"", "\"Replace\""].iter().any(|kind| decoder.contains(kind))
        {
            return Err(Error::unsupported(
                "tokenizer.json decodes in a way that is not supported; byte-level and SentencePiece tokenizers are",
            ));
        }
        let added = self.tokenizer.get_added_tokens_decoder();
        let token = |(text, id): (String, u32)| match added.get(&id) {
            Some(added) => {
                let piece = if added.special { Vec::new() } else { text.clone().into_bytes() };
                JsonToken { id, text, piece, special: added.special }
            }
            None => {
                let mut piece = Vec::new();
                put_piece(text.as_bytes(), byte_level, &mut piece);
                JsonToken { id, text, piece, special: false }
            }
        };
        Ok(self.tokenizer.get_vocab(true).into_iter().map(token).collect())
    }
}
