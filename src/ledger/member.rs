//! Who this daemon is in its fleet: a name that stays in its folder, and the number of the process.
//!
//! Leases are kept under the name, so that a daemon that is started again finds what it had. The number rises with each start,
//! before anything is asked, so that what an earlier process sent and comes late is known for that.

use std::io;
use std::path::Path;

use uuid::Uuid;

use crate::store::snapshot;

const FILE: &str = "member";

/// See the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) process: u64,
}

impl Member {
    /// One that nobody knows.
    pub(super) fn new() -> Self {
        Self { name: Uuid::new_v4().simple().to_string(), process: 1 }
    }

    /// The one of a folder, to which nobody else writes, with the next number.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn next(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        let text = snapshot::read(&path)?.unwrap_or_default();
        let before = std::str::from_utf8(&text).ok().and_then(Self::parse);
        // Under a new name nothing is found, and what was leased under the old one counts as taken.
        let member = before.map_or_else(Self::new, |before| Self { process: before.process + 1, ..before });
        member.write(&path)?;
        Ok(member)
    }

    /// Takes another name, where somebody else has this one.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn rename(&mut self, folder: Option<&Path>) -> io::Result<()> {
        *self = Self::new();
        folder.map_or(Ok(()), |folder| self.write(&folder.join(FILE)))
    }

    fn parse(text: &str) -> Option<Self> {
        let (name, process) = text.trim().split_once(' ')?;
        let is_name = name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let process = process.parse().ok()?;
        is_name.then(|| Self { name: name.to_owned(), process })
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        snapshot::write(path, format!("{} {}\n", self.name, self.process).as_bytes(), snapshot::PRIVATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_and_the_number_rises() {
        let folder = tempfile::tempdir().unwrap();
        let first = Member::next(folder.path()).unwrap();
        let mut second = Member::next(folder.path()).unwrap();
        assert_eq!((&second.name, second.process), (&first.name, first.process + 1));
        second.rename(Some(folder.path())).unwrap();
        assert_ne!(second.name, first.name);
        assert_eq!(Member::next(folder.path()).unwrap().name, second.name);
        std::fs::write(folder.path().join(FILE), "not a name").unwrap();
        assert_ne!(Member::next(folder.path()).unwrap().name, second.name);
    }
}
