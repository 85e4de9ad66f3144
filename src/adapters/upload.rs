//! A file on its way in: written to disk as it comes, never held in memory, checked when it is whole, then moved into its
//! place. Dropped before that, it leaves nothing behind.

use std::path::{Path, PathBuf};

use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use crate::adapters::book::Finetune;
use crate::adapters::disk::unreadable;
use crate::base::{Error, Kind, Result};
use crate::model::lora::{Adapter, AdapterConfig, CONFIG_FILE, WEIGHTS_FILE};

/// A configuration is a few hundred bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// One file of an adapter.
pub struct Upload {
    pub(super) finetune: Finetune,
    /// Where it is until it is moved into its place.
    pub(super) path: PathBuf,
    file: File,
    size: u64,
    most: u64,
    _turn: OwnedSemaphorePermit,
}

impl Upload {
    pub(super) async fn begin(
        finetune: Finetune,
        folder: &Path,
        most: u64,
        turn: OwnedSemaphorePermit,
    ) -> Result<Self> {
        let path = folder.join(format!(".upload-{}", Uuid::new_v4()));
        let file = File::create_new(&path).await.map_err(|error| not_written(&path, error))?;
        Ok(Self { finetune, path, file, size: 0, most, _turn: turn })
    }

    /// The next bytes.
    ///
    /// # Errors
    /// `TooLarge` beyond the limit of a file.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.size += bytes.len() as u64;
        if self.size > self.most {
            let message = format!(
                "The file is larger than {} bytes, the limit of this server for one file of a fine-tune.",
                self.most
            );
            return Err(Error::new(Kind::TooLarge, message));
        }
        self.file.write_all(bytes).await.map_err(|error| not_written(&self.path, error))
    }

    /// All bytes are here: waits until they are on disk, and sees whether they are the file of a fine-tune that `name` says.
    ///
    /// # Errors
    /// `BadInput` when a fine-tune has no file of that name, or this is none.
    pub(super) async fn finish(&mut self, name: &str) -> Result<&'static str> {
        let name = match name {
            CONFIG_FILE if self.size > MAX_CONFIG => {
                return Err(Error::bad_field("file", format!("{CONFIG_FILE} is larger than {MAX_CONFIG} bytes")));
            }
            CONFIG_FILE => CONFIG_FILE,
            WEIGHTS_FILE => WEIGHTS_FILE,
            _ => {
                return Err(Error::bad_field(
                    "file_name",
                    format!("'file_name' must be {CONFIG_FILE} or {WEIGHTS_FILE}"),
                ));
            }
        };
        let synced = async {
            self.file.flush().await?;
            self.file.sync_all().await
        };
        synced.await.map_err(|error| not_written(&self.path, error))?;
        let path = self.path.clone();
        let checked = tokio::task::spawn_blocking(move || check(name, &path)).await;
        checked.map_err(|error| Error::internal("a file was not checked").with_source(error))?.map_err(unreadable)?;
        Ok(name)
    }
}

/// As far as a file can be checked alone.
fn check(name: &str, path: &Path) -> Result<()> {
    if name == WEIGHTS_FILE {
        return Adapter::check_weights(path).map_err(|error| error.with_param("file"));
    }
    let text = std::fs::read(path).map_err(|error| not_written(path, error))?;
    let text = String::from_utf8(text).map_err(|_| Error::bad_field("file", format!("{CONFIG_FILE} is not UTF-8")))?;
    AdapterConfig::parse(&text).map(|_| ()).map_err(|error| error.with_param("file"))
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Gone already when it was moved into its place.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn not_written(path: &Path, error: std::io::Error) -> Error {
    Error::internal(format!("an upload could not be written: {}", path.display())).with_source(error)
}
