//! What must survive a crash: how rules are and what is still to be told, as one file that is replaced as a whole.
//!
//! ```text
//!   <folder>/.lock          held while somebody watches: a successor waits for its predecessor
//!            alerts.json    { version, rules, outbox }
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::error;

use super::outbox::Outbox;
use super::rules::Saved;
use crate::base::{Error, Result};
use crate::store::snapshot;

/// Written in the file; one with another is not read.
const VERSION: u32 = 1;
const NAME: &str = "alerts.json";
const LOCK: &str = ".lock";

/// The folder, as long as it is ours.
pub(super) struct Keep {
    path: PathBuf,
    /// Held, not read.
    _lock: File,
    /// What is on disk.
    written: Vec<u8>,
}

/// What is kept.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    version: u32,
    pub rules: Saved,
    pub outbox: Outbox,
}

impl Kept {
    pub(super) fn new(rules: Saved, outbox: Outbox) -> Self {
        Self { version: VERSION, rules, outbox }
    }
}

impl Keep {
    /// The folder, which is made, and what was kept there; nothing while another process has it.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be used.
    pub(super) fn open(folder: &Path) -> Result<Option<(Self, Kept)>> {
        let wrong = |what: &str, error: std::io::Error| {
            let name = folder.display();
            let words = format!("alerts.folder = {name}: {what} ({error}); name a folder that the daemon may write to");
            Error::bad_input(words).with_source(error)
        };
        fs::create_dir_all(folder).map_err(|error| wrong("it cannot be made", error))?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK));
        let lock = lock.map_err(|error| wrong("it cannot be written to", error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(wrong("it cannot be locked", error)),
        }
        let path = folder.join(NAME);
        let written = snapshot::read(&path).map_err(|error| wrong("it cannot be read", error))?.unwrap_or_default();
        let kept = if written.is_empty() { Kept::default() } else { parse(&path, &written) };
        Ok(Some((Self { path, _lock: lock, written }, kept)))
    }

    /// On disk when this returns; the same as before is not written again.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn write(&mut self, kept: &Kept) -> std::io::Result<()> {
        let bytes = serde_json::to_vec(kept)?;
        if bytes != self.written {
            snapshot::write(&self.path, &bytes, snapshot::PRIVATE)?;
            self.written = bytes;
        }
        Ok(())
    }
}

/// What cannot be read is put aside: watching on, and telling once more what lasts, is better than not watching.
fn parse(path: &Path, bytes: &[u8]) -> Kept {
    let parsed = serde_json::from_slice::<Kept>(bytes).map_err(|error| error.to_string());
    let known = |kept: Kept| match kept.version {
        VERSION => Ok(kept),
        other => Err(format!("it is of version {other}, and this daemon reads {VERSION}")),
    };
    parsed.and_then(known).unwrap_or_else(|why| {
        let aside = path.with_extension("json.unread");
        let moved = fs::rename(path, &aside);
        error!(path = %path.display(), why, aside = %aside.display(), ?moved, "what alerts had told cannot be read; what lasts is told once more");
        Kept::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::notice::Notice;
    use crate::base::Millis;

    fn kept() -> Kept {
        let mut outbox = Outbox::default();
        outbox.push("mail", Notice::test(Millis(1)).into());
        Kept::new(Saved::default(), outbox)
    }

    #[test]
    fn what_was_kept_is_there_again_and_only_one_process_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made/for/it");
        let (mut keep, found) = Keep::open(&folder).unwrap().unwrap();
        assert_eq!(found, Kept::default());
        let kept = kept();
        keep.write(&kept).unwrap();
        assert!(Keep::open(&folder).unwrap().is_none(), "the first still has it");
        drop(keep);
        let (mut keep, found) = Keep::open(&folder).unwrap().unwrap();
        assert_eq!(found, kept);
        fs::remove_file(folder.join(NAME)).unwrap();
        keep.write(&kept).unwrap();
        assert!(!folder.join(NAME).exists(), "the same is not written again");
        keep.write(&Kept::new(Saved::default(), Outbox::default())).unwrap();
        assert!(folder.join(NAME).exists());
    }

    #[test]
    fn what_cannot_be_read_is_put_aside_and_watching_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        for text in
            ["{", "[]", r#"{"version":2,"rules":{"alerts":{},"silences":{},"begun":0},"outbox":{"channels":{}}}"#]
        {
            fs::write(folder.path().join(NAME), text).unwrap();
            let (_, found) = Keep::open(folder.path()).unwrap().unwrap();
            assert_eq!(found, Kept::default());
            assert_eq!(fs::read_to_string(folder.path().join("alerts.json.unread")).unwrap(), text);
        }
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let Err(error) = Keep::open(&file) else { panic!("a file is no folder") };
        assert!(error.message().contains("name a folder that the daemon may write to"), "{error}");
    }
}
