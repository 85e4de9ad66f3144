//! A model on disk, before anybody asks what is in it: one GGUF file, or a folder as hubs have it.
//!
//!     model.gguf                          weights, configuration, tokenizer and template in one
//!     folder/config.json                  configuration, beside *.safetensors, tokenizer.json, tokenizer_config.json …
//!     folder/only.gguf                    a folder around one GGUF file is that file
//!
//! Open it once and share it: the weights half and the text half both read from it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::base::Result;
use crate::model::gguf::{Gguf, broken};

/// An open model.
#[derive(Debug)]
pub enum ModelFiles {
    /// One GGUF file.
    Gguf(Gguf),
    /// A folder with `config.json`.
    Folder {
        /// Which.
        path: PathBuf,
        /// Its `config.json`.
        config: Value,
    },
}

/// Configuration files are a few KiB, tokenizers up to some 30 MiB; beyond this something else lies there.
const MAX_JSON: u64 = 256 << 20;

impl ModelFiles {
    /// Opens a GGUF file or a folder.
    ///
    /// # Errors
    /// `ModelUnavailable` or `Unsupported`, with the path and what to do.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Ok(Self::Gguf(Gguf::open(path)?));
        }
        if let Some(config) = read_json(&path.join("config.json"))? {
            return Ok(Self::Folder { path: path.to_owned(), config });
        }
        match &gguf_files(path)[..] {
            [only] => Ok(Self::Gguf(Gguf::open(only)?)),
            [] => Err(broken(path, "has neither a config.json nor a GGUF file; fetch the model again")),
            _ => Err(broken(path, "has several GGUF files; name the one to load")),
        }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Folder { path, .. } => path,
        }
    }
}

/// A JSON file; `None` when it is not there.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| broken(path, format_args!("is not JSON ({error}); fetch it again")).with_source(error))
}

/// A text file; `None` when it is not there.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    let too_large = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len() > MAX_JSON,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(_) => false,
    };
    if too_large {
        return Err(broken(path, "is far too large for what it should hold"));
    }
    let text = std::fs::read_to_string(path);
    text.map(Some).map_err(|error| broken(path, format_args!("cannot be read ({error})")).with_source(error))
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")).collect()
}
