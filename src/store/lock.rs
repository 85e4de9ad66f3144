//! One process a folder: a file that whoever writes there holds locked.

use std::fs::{File, TryLockError};
use std::io::Result;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How often it is tried, and how long it rests in between: the one before may be about to end, and a process that is just
/// being started holds what its parent does for a moment.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// Locks a file, which is made where it is missing, for as long as what is returned lives. Nothing if another process has it.
///
/// # Errors
/// The system's.
pub fn lock(path: &Path) -> Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    for turn in 0..TRIES {
        if turn > 0 {
            thread::sleep(PAUSE);
        }
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_one_holders_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = lock(&path).unwrap();
        assert!(first.is_some() && lock(&path).unwrap().is_none());
        let waiting = thread::spawn({
            let path = path.clone();
            move || lock(&path).unwrap().is_some()
        });
        thread::sleep(PAUSE * 3);
        drop(first);
        assert!(waiting.join().unwrap(), "whoever waits for a moment gets it");
    }
}
