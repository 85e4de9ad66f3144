//! A small file that is replaced as a whole: after a crash at any instant it holds the old bytes or the new ones.
//!
//! ```text
//! bytes ─> .NAME.new ─sync─> rename to NAME ─> sync folder        a .NAME.new that a crash left is removed when NAME is read
//! ```
//!
//! One writer a file: whoever may meet another one takes a lock first. Knows nothing of what the bytes mean.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Readable and writable for the daemon's user only.
pub const PRIVATE: u32 = 0o600;

/// Replaces the file, or makes it, with permissions `mode` (`0o600`); it is on disk when this returns.
///
/// # Errors
/// The system's; the file is what it was then.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let (folder, fresh) = beside(path)?;
    // What a crash left may have other permissions, and `mode` counts for new files only.
    remove(&fresh)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&fresh, path));
    if let Err(error) = written {
        // The next write or read tries again.
        let _ = fs::remove_file(&fresh);
        return Err(error);
    }
    sync(folder)
}

/// The file's bytes; `None` if there is none. What a crash left of a write is removed: for the one who writes.
///
/// # Errors
/// The system's.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let (_, fresh) = beside(path)?;
    remove(&fresh)?;
    peek(path)
}

/// The file's bytes, where somebody else may be writing it; `None` if there is none.
///
/// # Errors
/// The system's.
pub fn peek(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes the file; it is gone for good when this returns. None there is no error.
///
/// # Errors
/// The system's.
pub fn delete(path: &Path) -> Result<()> {
    let (folder, _) = beside(path)?;
    remove(path)?;
    sync(folder)
}

/// The folder, and the name that bytes have while they are written.
fn beside(path: &Path) -> Result<(&Path, PathBuf)> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(ErrorKind::InvalidInput, "a snapshot needs a file name"));
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut fresh = std::ffi::OsString::from(".");
    fresh.push(name);
    fresh.push(".new");
    Ok((folder, folder.join(fresh)))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A new name is only safe when the folder that holds it is on disk.
fn sync(folder: &Path) -> Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_written_last_is_read_and_what_a_crash_left_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let names = || {
            let mut names: Vec<_> = fs::read_dir(folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(read(&path).unwrap(), None);
        for bytes in ["one", "", "three is longer"] {
            write(&path, bytes.as_bytes(), PRIVATE).unwrap();
            assert_eq!(read(&path).unwrap().unwrap(), bytes.as_bytes());
            assert_eq!(names(), ["a.json"]);
        }
        // Half of a write, as a crash leaves it.
        fs::write(folder.path().join(".a.json.new"), "four is lon").unwrap();
        assert_eq!((peek(&path).unwrap().unwrap(), names().len()), (b"three is longer".to_vec(), 2));
        assert_eq!(read(&path).unwrap().unwrap(), b"three is longer");
        assert_eq!(names(), ["a.json"]);
        fs::write(folder.path().join(".a.json.new"), "five").unwrap();
        write(&path, b"six", PRIVATE).unwrap();
        assert_eq!((read(&path).unwrap().unwrap(), names()), (b"six".to_vec(), vec!["a.json".to_owned()]));
        delete(&path).unwrap();
        delete(&path).unwrap();
        assert_eq!((read(&path).unwrap(), names().len()), (None, 0));
    }

    #[test]
    fn a_private_file_is_private_even_where_a_crash_left_a_public_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let left = folder.path().join(".key.new");
        fs::write(&left, "x").unwrap();
        fs::set_permissions(&left, fs::Permissions::from_mode(0o644)).unwrap();
        write(&path, b"secret", PRIVATE).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, PRIVATE);
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "x").unwrap();
        assert!(write(&path, b"new", PRIVATE).is_err(), "a folder is in the way");
        assert_eq!(fs::read(path.join("inside")).unwrap(), b"x");
        assert!(!folder.path().join(".taken.new").exists());
        assert!(write(Path::new("/"), b"x", PRIVATE).is_err());
    }
}
