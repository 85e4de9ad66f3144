//! The registry on disk: a file an account, replaced as a whole, and a lock that keeps a second writer out.
//!
//!     <folder>/.lock                  held as long as somebody may write
//!              023e105f….json         { version, account, book }
//!              .023e105f….json.new    on its way; removed by the next reader that may write

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use super::book::Book;
use crate::base::{AccountId, Error, Result};
use crate::store::snapshot;

/// Written in each file; a file with a higher one is left alone.
const VERSION: u32 = 1;
const LOCK: &str = ".lock";
const ENDING: &str = ".json";
/// Most bytes of a file's name; the system takes 255.
const MOST_NAME: usize = 200;
/// What stays as it is in a file's name: no dot and no slash, whatever an account is called.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');

#[derive(Serialize, Deserialize)]
struct OnDisk<'a> {
    version: u32,
    account: AccountId,
    book: std::borrow::Cow<'a, Book>,
}

/// The folder, and whether it may be written.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Or why it may only be read.
    lock: Result<File, String>,
}

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    /// Whole books.
    pub books: BTreeMap<String, Book>,
    /// Accounts whose file cannot be read, and why. It must not be overwritten.
    pub broken: BTreeMap<String, String>,
}

impl Folder {
    /// To read and write.
    ///
    /// # Errors
    /// `BadInput` when somebody else has it, or it cannot be made.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let wrong = |words: String| Error::bad_input(format!("registry.folder = {shown}: {words}"));
        fs::create_dir_all(path).map_err(|error| wrong(format!("cannot be made ({error})")))?;
        let lock = File::options().create(true).truncate(false).write(true).open(path.join(LOCK));
        let lock = lock.map_err(|error| wrong(format!("cannot be locked ({error})")))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_path_buf(), lock: Ok(lock) }),
            Err(TryLockError::WouldBlock) => Err(wrong("another neurond has it".into())),
            Err(TryLockError::Error(error)) => Err(wrong(format!("cannot be locked ({error})"))),
        }
    }

    /// Only to read, whoever has it; `why` is told to those who want to write.
    pub(super) fn peek(path: &Path, why: &str) -> Self {
        Self { path: path.to_path_buf(), lock: Err(why.to_owned()) }
    }

    /// All accounts.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub(super) fn read(&self) -> Result<Found> {
        let mut found = Found::default();
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(self.failed("cannot be listed", error)),
        };
        for entry in entries {
            let path = entry.map_err(|error| self.failed("cannot be listed", error))?.path();
            let Some(stem) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(ENDING)) else {
                // Of an account that was never written before.
                if path.extension().is_some_and(|ending| ending == "new") && self.lock.is_ok() {
                    let _ = fs::remove_file(&path);
                }
                continue;
            };
            match self.read_file(&path) {
                Ok(Some(OnDisk { account, book, .. })) => {
                    found.books.insert(account.as_str().to_owned(), book.into_owned());
                }
                Ok(None) => {}
                Err(words) => {
                    let account = percent_encoding::percent_decode_str(stem).decode_utf8_lossy().into_owned();
                    found.broken.insert(account, format!("{}: {words}", path.display()));
                }
            }
        }
        Ok(found)
    }

    /// Replaces an account's file; it is on disk when this returns.
    ///
    /// # Errors
    /// `Unsupported` when it may not be written, `BadInput` for an account that no file can be named after, and the system's.
    pub(super) fn write(&self, account: &str, book: &Book) -> Result<()> {
        if let Err(why) = &self.lock {
            return Err(Error::unsupported(format!("Nothing can be changed here: {why}")));
        }
        let name = utf8_percent_encode(account, KEPT).to_string();
        if name.is_empty() || name.len() > MOST_NAME {
            return Err(Error::bad_input("Nothing can be stored for an account with a name this long."));
        }
        let whole =
            OnDisk { version: VERSION, account: AccountId::new(account), book: std::borrow::Cow::Borrowed(book) };
        let bytes = serde_json::to_vec(&whole)
            .map_err(|error| Error::internal("a book cannot be written").with_source(error))?;
        let path = self.path.join(name + ENDING);
        snapshot::write(&path, &bytes, snapshot::PRIVATE).map_err(|error| self.failed("cannot be written", error))
    }

    fn read_file(&self, path: &Path) -> Result<Option<OnDisk<'static>>, String> {
        let bytes = if self.lock.is_ok() { snapshot::read(path) } else { snapshot::peek(path) };
        let Some(bytes) = bytes.map_err(|error| error.to_string())? else { return Ok(None) };
        let version = serde_json::from_slice::<serde_json::Value>(&bytes).map_err(|error| error.to_string())?;
        match version["version"].as_u64() {
            Some(version) if version <= u64::from(VERSION) => {}
            _ => return Err("was written by another version of neurond".into()),
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|error| error.to_string())
    }

    fn failed(&self, what: &str, error: std::io::Error) -> Error {
        Error::internal(format!("registry folder {} {what}: {error}", self.path.display())).with_source(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(last: u64) -> Book {
        Book { last, ..Book::default() }
    }

    #[test]
    fn accounts_of_any_name_come_back_and_leave_no_folder() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("registry");
        let names = ["acme", "023e105f4ecef8ad9ca31a8372d0c353", "../etc", ".hidden", "ä b/c", "%41"];
        let folder = Folder::open(&path).unwrap();
        for (at, name) in names.iter().enumerate() {
            folder.write(name, &book(at as u64)).unwrap();
        }
        for name in ["", &"x".repeat(201)] {
            assert!(folder.write(name, &book(0)).is_err(), "{name}");
        }
        let found = folder.read().unwrap();
        assert!(found.broken.is_empty());
        for (at, name) in names.iter().enumerate() {
            assert_eq!(found.books[*name].last, at as u64, "{name}");
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&path).unwrap().count(), names.len() + 1);
    }

    #[test]
    fn a_second_writer_is_kept_out_and_may_read() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::open(root.path()).unwrap();
        folder.write("acme", &book(7)).unwrap();
        assert!(Folder::open(root.path()).unwrap_err().message().contains("another neurond"));
        let reader = Folder::peek(root.path(), "because");
        assert_eq!(reader.read().unwrap().books["acme"].last, 7);
        assert!(reader.write("acme", &book(8)).unwrap_err().message().contains("because"));
        drop(folder);
        assert!(Folder::open(root.path()).is_ok());
        assert!(Folder::peek(&root.path().join("none"), "").read().unwrap().books.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_told_and_the_rest_is_there() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::open(root.path()).unwrap();
        folder.write("good", &book(1)).unwrap();
        for (name, text) in
            [("cut", "{\"version\":1,\"acc"), ("later", "{\"version\":2,\"account\":\"later\",\"book\":{}}")]
        {
            fs::write(root.path().join(format!("{name}.json")), text).unwrap();
        }
        fs::write(root.path().join(".fresh.json.new"), "half").unwrap();
        let found = folder.read().unwrap();
        assert_eq!(found.books.keys().collect::<Vec<_>>(), ["good"]);
        assert_eq!(found.broken.keys().collect::<Vec<_>>(), ["cut", "later"]);
        assert!(found.broken["later"].contains("another version"));
        assert!(!root.path().join(".fresh.json.new").exists());
    }
}
