//! A file that only grows: frames of bytes, each with its length and checksum.
//!
//! ```text
//! [ length u32 | checksum u32 | bytes ] [ … ] [ … ] [ le]        the last one torn: cut off when the file is opened
//! ```
//!
//! A frame counts when it is whole. What a crash leaves of the last one is cut, never guessed; nothing before it can be
//! damaged by it. Knows nothing of what the bytes mean.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::path::Path;

/// Length and checksum.
const HEAD: usize = 8;
/// A longer frame is taken for rubbish.
const MAX_FRAME: usize = 1 << 30;

/// A file of frames, open at its end.
#[derive(Debug)]
pub struct Segment {
    file: File,
    frame: Vec<u8>,
}

impl Segment {
    /// A new, empty file.
    ///
    /// # Errors
    /// The system's; `AlreadyExists` if there is one.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(path)?;
        if let Some(folder) = path.parent() {
            // The name must be on disk as well.
            File::open(folder)?.sync_all()?;
        }
        Ok(Self { file, frame: Vec::new() })
    }

    /// A file that is there: `see` hears its frames, and whatever follows the last whole one is cut off.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, see: impl FnMut(&[u8])) -> Result<Self> {
        let whole = read(path, see)?;
        let file = OpenOptions::new().append(true).open(path)?;
        if file.metadata()?.len() > whole {
            file.set_len(whole)?;
            file.sync_all()?;
        }
        Ok(Self { file, frame: Vec::new() })
    }

    /// The whole frames of a file that somebody else may be writing to.
    ///
    /// # Errors
    /// The system's.
    pub fn read(path: &Path, see: impl FnMut(&[u8])) -> Result<()> {
        read(path, see).map(drop)
    }

    /// One more frame, on disk when this returns.
    ///
    /// # Errors
    /// The system's; the frame may be torn then, and the file is to be opened again before anything is appended.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > MAX_FRAME {
            return Err(Error::new(ErrorKind::InvalidInput, "a frame is longer than a segment takes"));
        }
        self.frame.clear();
        self.frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.frame.extend_from_slice(&checksum(bytes));
        self.frame.extend_from_slice(bytes);
        self.file.write_all(&self.frame)?;
        self.file.sync_data()
    }
}

/// Returns where the last whole frame ends.
fn read(path: &Path, mut see: impl FnMut(&[u8])) -> Result<u64> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let mut at = 0;
    while let Some((head, rest)) = bytes[at..].split_first_chunk::<HEAD>() {
        let [a, b, c, d, sum @ ..] = *head;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let Some(frame) = rest.get(..length).filter(|frame| checksum(frame) == sum) else { break };
        see(frame);
        at += HEAD + length;
    }
    Ok(at as u64)
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut sum = [0; 4];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..4]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(path: &Path) -> Vec<String> {
        let mut frames = Vec::new();
        Segment::read(path, |frame| frames.push(String::from_utf8(frame.to_vec()).unwrap())).unwrap();
        frames
    }

    #[test]
    fn a_file_cut_or_damaged_anywhere_keeps_its_whole_frames_and_takes_more() {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        let mut segment = Segment::create(&whole).unwrap();
        let texts = ["one", "", "three is longer"];
        texts.iter().for_each(|text| segment.append(text.as_bytes()).unwrap());
        assert_eq!(frames(&whole), texts);
        assert_eq!(Segment::create(&whole).unwrap_err().kind(), ErrorKind::AlreadyExists);
        let bytes = std::fs::read(&whole).unwrap();
        let ends = [11, 19, 42];
        assert_eq!(bytes.len(), ends[2]);
        let check = |bytes: &[u8], kept: usize, why: &str| {
            let path = folder.path().join("torn");
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(frames(&path), texts[..kept], "{why}");
            let mut seen = 0;
            let mut segment = Segment::open(&path, |_| seen += 1).unwrap();
            segment.append(b"more").unwrap();
            assert_eq!((seen, frames(&path).len()), (kept, kept + 1), "{why}");
            assert_eq!(frames(&path)[kept], "more", "{why}");
        };
        for cut in 0..=bytes.len() {
            check(&bytes[..cut], ends.iter().filter(|&&end| end <= cut).count(), &format!("cut at {cut}"));
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            check(&damaged, ends.iter().filter(|&&end| end <= at).count(), &format!("damaged at {at}"));
        }
    }
}
