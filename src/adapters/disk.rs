//! Adapters on disk: a folder each, whole or not there.
//!
//!     <root>/<account>/<id>/finetune.json              what it is
//!                           adapter_config.json        its two files
//!                           adapter_model.safetensors
//!                           .upload-…                  on their way; removed when the daemon starts
//!     <root>/<account>/.new-… .gone-…                  folders on their way in or out; removed when the daemon starts
//!
//! Folders are named by id, never by what a caller wrote.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use uuid::Uuid;

use crate::adapters::book::Finetune;
use crate::base::{AccountId, Error, Kind, Millis, ModelId, Result};
use crate::model::lora::{CONFIG_FILE, WEIGHTS_FILE};

const ABOUT_FILE: &str = "finetune.json";

/// What `finetune.json` holds; whose it is and what it is called on disk, its path says.
#[derive(Serialize, Deserialize)]
struct About {
    name: String,
    model: ModelId,
    description: String,
    created: Millis,
}

/// A file of ours that cannot be read is no fault of the caller, and none of the model.
pub(super) fn unreadable(error: Error) -> Error {
    match error.kind() {
        Kind::ModelUnavailable => Error::internal(error.message()),
        _ => error,
    }
}

/// The folder of all adapters.
#[derive(Clone)]
pub(super) struct Disk {
    root: PathBuf,
}

impl Disk {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Everything that is whole. What was under way when the last process ended is removed; what cannot be read is left alone and told.
    pub(super) fn read(&self) -> Vec<Finetune> {
        let mut found = Vec::new();
        for account in entries(&self.root) {
            for folder in entries(&account) {
                let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if name.starts_with(".new-") || name.starts_with(".gone-") {
                    forget(&folder, fs::remove_dir_all(&folder));
                } else if let (Ok(id), Some(account)) =
                    (Uuid::try_parse(name), account.file_name().and_then(|name| name.to_str()))
                {
                    match read(&folder, id, account) {
                        Ok(finetune) => found.push(finetune),
                        Err(error) => {
                            warn!(folder = %folder.display(), %error, "a fine-tune cannot be read; left alone")
                        }
                    }
                }
            }
        }
        found.sort_by_key(|finetune| finetune.created);
        if !found.is_empty() {
            info!(path = %self.root.display(), finetunes = found.len(), "fine-tunes found");
        }
        found
    }

    /// The folder of an adapter.
    pub(super) fn folder(&self, finetune: &Finetune) -> PathBuf {
        self.account(&finetune.account).join(finetune.id.to_string())
    }

    /// Account ids are letters, digits, `-`, `_` and `.`; a leading dot would leave the folder, or hide in it.
    fn account(&self, account: &AccountId) -> PathBuf {
        self.root.join(account.as_str().replace(['/', '\\'], "_").trim_start_matches('.'))
    }

    /// Makes the folder of a new adapter.
    pub(super) fn create(&self, finetune: &Finetune) -> Result<()> {
        if finetune.account.as_str().starts_with('.') || finetune.account.as_str().is_empty() {
            return Err(Error::bad_input("an account whose name begins with a dot cannot have fine-tunes"));
        }
        let about = About {
            name: finetune.name.clone(),
            model: finetune.model.clone(),
            description: finetune.description.clone(),
            created: finetune.created,
        };
        let parent = self.account(&finetune.account);
        let fresh = parent.join(format!(".new-{}", finetune.id));
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&fresh)?;
            let mut file = File::create(fresh.join(ABOUT_FILE))?;
            file.write_all(&serde_json::to_vec(&about)?)?;
            file.sync_all()?;
            sync(&fresh)?;
            fs::rename(&fresh, self.folder(finetune))?;
            sync(&parent)?;
            sync(&self.root)
        };
        write().map_err(|error| failed("a fine-tune could not be written", &parent, error))
    }

    /// Moves an uploaded file, synced already, into its place.
    pub(super) fn take_in(&self, finetune: &Finetune, temporary: &Path, file: &str) -> Result<()> {
        let folder = self.folder(finetune);
        let place = || fs::rename(temporary, folder.join(file)).and_then(|()| sync(&folder));
        place().map_err(|error| failed("an uploaded file could not be put into its place", &folder, error))
    }

    /// Removes an adapter: gone at once, its bytes soon after.
    pub(super) fn remove(&self, finetune: &Finetune) -> Result<()> {
        let (folder, parent) = (self.folder(finetune), self.account(&finetune.account));
        let gone = parent.join(format!(".gone-{}", finetune.id));
        let renamed = fs::rename(&folder, &gone).and_then(|()| sync(&parent));
        renamed.map_err(|error| failed("a fine-tune could not be removed", &folder, error))?;
        forget(&gone, fs::remove_dir_all(&gone));
        Ok(())
    }
}

fn read(folder: &Path, id: Uuid, account: &str) -> std::io::Result<Finetune> {
    let about: About = serde_json::from_slice(&fs::read(folder.join(ABOUT_FILE))?)?;
    let mut modified = about.created;
    let mut has = |name: &str| match fs::metadata(folder.join(name)) {
        Ok(file) => {
            let at = file.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            modified = modified.max(Millis(at.map_or(0, |at| at.as_millis() as u64)));
            true
        }
        Err(_) => false,
    };
    let (has_config, has_weights) = (has(CONFIG_FILE), has(WEIGHTS_FILE));
    for path in entries(folder) {
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(".upload-")) {
            forget(&path, fs::remove_file(&path));
        }
    }
    Ok(Finetune {
        id,
        account: AccountId::new(account),
        name: about.name,
        model: about.model,
        description: about.description,
        created: about.created,
        modified,
        has_config,
        has_weights,
        version: 0,
    })
}

/// What is in a folder; nothing if it is not there.
fn entries(folder: &Path) -> Vec<PathBuf> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Vec::new(),
        Err(error) => {
            warn!(folder = %folder.display(), %error, "fine-tunes cannot be listed");
            Vec::new()
        }
    }
}

/// A rename is only safe when the folder that it changed is on disk.
fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

fn forget(path: &Path, outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        warn!(path = %path.display(), %error, "left behind");
    }
}

fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::internal(format!("{what}: {}", path.display())).with_source(error)
}
