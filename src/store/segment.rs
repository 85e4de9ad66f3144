//! A file that only grows: frames of bytes, each with its length and checksum.
//!
//! ```text
//! [ length u32 | checksum u32 | bytes ] [ … ] [ … ] [ le]        the last one torn: cut off when the file is opened
//! ```
//!
//! A frame counts when it is whole. What a crash leaves of the last one is cut, never guessed; nothing before it can be
//! damaged by it. Who needs no promise of the disk for each frame writes several and syncs later; who knows where a frame
//! lies reads that one. Knows nothing of what the bytes mean.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::Path;

/// Length and checksum.
const HEAD: usize = 8;
/// A longer frame is taken for rubbish.
const MAX_FRAME: usize = 1 << 30;
/// A longer frame is written in two parts rather than copied into one.
const COPIED: usize = 64 << 10;

/// A file that is written from its start to its end.
pub trait Bytes: Write + Sized {
    /// Cuts off what follows.
    ///
    /// # Errors
    /// The system's.
    fn set_len(&self, length: u64) -> Result<()>;

    /// Waits until what was written is on disk. After an error nothing is known of what was written since the last time
    /// that there was none: the system may have dropped it, and says so once only.
    ///
    /// # Errors
    /// The system's.
    fn sync_data(&self) -> Result<()>;

    /// The same file once more.
    ///
    /// # Errors
    /// The system's.
    fn try_clone(&self) -> Result<Self>;
}

impl Bytes for File {
    fn set_len(&self, length: u64) -> Result<()> {
        Self::set_len(self, length)
    }

    fn sync_data(&self) -> Result<()> {
        Self::sync_data(self)
    }

    fn try_clone(&self) -> Result<Self> {
        Self::try_clone(self)
    }
}

/// A file of frames, open at its end.
#[derive(Debug)]
pub struct Segment<F = File> {
    file: F,
    frame: Vec<u8>,
    /// Where the whole frames end.
    end: u64,
    /// Whether something else may follow them.
    is_torn: bool,
}

impl Segment {
    /// A new, empty file.
    ///
    /// # Errors
    /// The system's; `AlreadyExists` if there is one.
    pub fn create(path: &Path) -> Result<Self> {
        let segment = Self::begin(path)?;
        if let Some(folder) = path.parent() {
            // The name must be on disk as well.
            sync_names(folder)?;
        }
        Ok(segment)
    }

    /// The same without waiting for the disk: its name is on it after [`sync_names`].
    ///
    /// # Errors
    /// As [`Segment::create`].
    pub fn begin(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(path)?;
        Ok(Self::over(file))
    }

    /// A file that is there: `see` hears its frames, and whatever follows the last whole one is cut off.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, see: impl FnMut(&[u8])) -> Result<Self> {
        let whole = read(path, see)?;
        Self::resume(path, whole)
    }

    /// A file whose whole frames are known to end at `end`: whatever follows is cut off.
    ///
    /// # Errors
    /// The system's.
    pub fn resume(path: &Path, end: u64) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path)?;
        if file.metadata()?.len() > end {
            file.set_len(end)?;
            file.sync_all()?;
        }
        Ok(Self { file, frame: Vec::new(), end, is_torn: false })
    }

    /// The whole frames of a file that somebody else may be writing to.
    ///
    /// # Errors
    /// The system's.
    pub fn read(path: &Path, see: impl FnMut(&[u8])) -> Result<()> {
        read(path, see).map(drop)
    }

    /// The frame of `length` bytes that begins at `at`; nothing if there is none, or it is damaged.
    ///
    /// # Errors
    /// The system's.
    pub fn read_at(path: &Path, at: u64, length: usize) -> Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(at))?;
        let mut head = [0; HEAD];
        if !is_filled(file.read_exact(&mut head))? {
            return Ok(None);
        }
        let (known, sum) = parse(head);
        if known != length || length > MAX_FRAME {
            return Ok(None);
        }
        let mut frame = vec![0; length];
        let is_whole = is_filled(file.read_exact(&mut frame))?;
        Ok((is_whole && checksum(&frame) == sum).then_some(frame))
    }
}

/// Waits until the names of a folder's files are on disk.
///
/// # Errors
/// The system's.
pub fn sync_names(folder: &Path) -> Result<()> {
    File::open(folder)?.sync_all()
}

impl<F: Bytes> Segment<F> {
    /// Over a file that is empty.
    pub fn over(file: F) -> Self {
        Self { file, frame: Vec::new(), end: 0, is_torn: false }
    }

    /// One more frame, on disk when this returns.
    ///
    /// # Errors
    /// The system's; what was written of the frame is cut off again, now or before the next one.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write(&[bytes])?;
        self.sync()
    }

    /// Frames one behind the other, all of them or none; on disk after the next [`Segment::sync`]. Returns where the first
    /// begins.
    ///
    /// # Errors
    /// As [`Segment::append`].
    pub fn write(&mut self, frames: &[&[u8]]) -> Result<u64> {
        if frames.iter().any(|frame| frame.len() > MAX_FRAME) {
            return Err(Error::new(ErrorKind::InvalidInput, "a frame is longer than a segment takes"));
        }
        if self.is_torn {
            self.cut()?;
        }
        self.is_torn = true;
        if let Err(error) = frames.iter().try_for_each(|frame| self.put(frame)) {
            // If this fails as well, it is tried again before the next frame.
            let _ = self.cut();
            return Err(error);
        }
        self.is_torn = false;
        let begin = self.end;
        self.end += frames.iter().map(|frame| (HEAD + frame.len()) as u64).sum::<u64>();
        Ok(begin)
    }

    /// The file once more, for whoever syncs it on another thread.
    ///
    /// # Errors
    /// The system's.
    pub fn file(&self) -> Result<F> {
        self.file.try_clone()
    }

    /// Waits until what was written is on disk.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data()
    }

    /// Bytes of its whole frames.
    pub fn end(&self) -> u64 {
        self.end
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.frame.clear();
        self.frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.frame.extend_from_slice(&checksum(bytes));
        if bytes.len() > COPIED {
            self.file.write_all(&self.frame)?;
            return self.file.write_all(bytes);
        }
        self.frame.extend_from_slice(bytes);
        self.file.write_all(&self.frame)
    }

    fn cut(&mut self) -> Result<()> {
        self.file.set_len(self.end)?;
        self.is_torn = false;
        Ok(())
    }
}

/// A file's frames one by one, without reading those that are passed over.
#[derive(Debug)]
pub struct Frames {
    file: BufReader<File>,
    length: u64,
    at: u64,
}

impl Frames {
    /// From the start of a file.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file: BufReader::new(file), length, at: 0 })
    }

    /// Where the next frame begins: the end of the whole ones, once there is no next.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Bytes of the file, whole frames or not.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Reads the next frame into `frame`; `false` if none is there, or it is damaged or torn.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&mut self, frame: &mut Vec<u8>) -> Result<bool> {
        let Some((length, sum)) = self.head()? else { return Ok(false) };
        frame.clear();
        frame.resize(length, 0);
        self.file.read_exact(frame)?;
        if checksum(frame) != sum {
            self.back()?;
            return Ok(false);
        }
        self.at += (HEAD + length) as u64;
        Ok(true)
    }

    /// Passes over the next frame and returns its length; nothing if none is there, or it is torn. Whether it is damaged
    /// is not looked at.
    ///
    /// # Errors
    /// The system's.
    pub fn skip(&mut self) -> Result<Option<usize>> {
        let Some((length, _)) = self.head()? else { return Ok(None) };
        self.file.seek_relative(length as i64)?;
        self.at += (HEAD + length) as u64;
        Ok(Some(length))
    }

    /// Length and checksum of the next frame, if the file is long enough for it.
    fn head(&mut self) -> Result<Option<(usize, [u8; 4])>> {
        let left = self.length.saturating_sub(self.at);
        if left < HEAD as u64 {
            return Ok(None);
        }
        let mut head = [0; HEAD];
        self.file.read_exact(&mut head)?;
        let (length, sum) = parse(head);
        if (HEAD + length) as u64 > left || length > MAX_FRAME {
            self.back()?;
            return Ok(None);
        }
        Ok(Some((length, sum)))
    }

    fn back(&mut self) -> Result<()> {
        self.file.seek(SeekFrom::Start(self.at)).map(drop)
    }
}

/// Whether there was enough to read.
fn is_filled(read: Result<()>) -> Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn parse(head: [u8; HEAD]) -> (usize, [u8; 4]) {
    let [a, b, c, d, sum @ ..] = head;
    (u32::from_le_bytes([a, b, c, d]) as usize, sum)
}

/// Returns where the last whole frame ends.
fn read(path: &Path, mut see: impl FnMut(&[u8])) -> Result<u64> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let mut at = 0;
    while let Some((head, rest)) = bytes[at..].split_first_chunk::<HEAD>() {
        let (length, sum) = parse(*head);
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
    #[test]
    fn frames_are_passed_over_and_read_where_they_lie_and_a_damaged_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frames");
        let mut segment = Segment::create(&path).unwrap();
        let long = vec![7; COPIED + 1];
        assert_eq!(segment.write(&[b"one", &long]).unwrap(), 0);
        assert_eq!(segment.write(&[b"two", b""]).unwrap(), segment.end() - 19);
        segment.sync().unwrap();
        let (second, third) = (11, 11 + 8 + long.len() as u64);
        assert_eq!(segment.end(), third + 19);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), segment.end());
        let at = |at: u64, length: usize| Segment::read_at(&path, at, length).unwrap();
        assert_eq!(at(0, 3).unwrap(), b"one");
        assert_eq!(at(second, long.len()).unwrap(), long);
        assert_eq!(at(third + 11, 0).unwrap(), b"");
        for (wrong, length) in [(0, 4), (1, 3), (second, 3), (segment.end(), 0), (1 << 40, 3)] {
            assert_eq!(at(wrong, length), None, "{wrong} {length}");
        }
        let walk = || {
            let (mut frames, mut frame, mut seen) = (Frames::open(&path).unwrap(), Vec::new(), Vec::new());
            while frames.read(&mut frame).unwrap() {
                let Some(length) = frames.skip().unwrap() else { break };
                seen.push((String::from_utf8(frame.clone()).unwrap(), length));
            }
            (seen, frames.at())
        };
        let pairs = |count: usize| [("one".to_owned(), long.len()), ("two".to_owned(), 0)][..count].to_vec();
        assert_eq!(walk(), (pairs(2), segment.end()));
        let bytes = std::fs::read(&path).unwrap();
        let damage = |at: u64| {
            let mut damaged = bytes.clone();
            damaged[at as usize] ^= 1;
            std::fs::write(&path, damaged).unwrap();
        };
        damage(second + 8);
        assert_eq!(walk(), (pairs(2), segment.end()), "what is passed over is not looked at");
        assert_eq!(at(second, long.len()), None);
        damage(third + 8);
        assert_eq!(walk(), (pairs(1), third), "nothing behind a damaged frame is believed");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(walk(), (pairs(1), third + 11), "the end of a frame that was read, and nothing behind it");
        let mut resumed = Segment::resume(&path, third).unwrap();
        assert_eq!(resumed.write(&[b"more"]).unwrap(), third);
        assert_eq!((at(third, 4).unwrap(), resumed.end()), (b"more".to_vec(), third + 12));
    }
}
