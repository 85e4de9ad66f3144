//! One file, from the first byte to its final name.
//!
//!     final file there, right size and hash ────────────────────────────────> Present
//!     else  x.<identity>.part  <─ append ─  hub   (cut? wait, ask for the rest)
//!           size and SHA-256 right? fsync, rename ─────────────────────────> Verified / Unverified
//!           wrong? once more from the start, then give up
//!
//! The part's name carries the content's identity, so bytes of two revisions are never put together.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use sha2::{Digest, Sha256};

use super::hub::{Hub, Refusal, RemoteFile, Repo, backoff};
use crate::base::{Error, Kind, Result};
use crate::cli::client::root_cause;
use crate::cli::{bytes, failed};

/// A file without a hash is fetched anew up to this size, and believed by its size beyond.
const CHEAP_BYTES: u64 = 16 << 20;

/// Where files come from.
pub struct Source<'a> {
    /// The hub.
    pub hub: &'a Hub,
    /// The repository.
    pub repo: &'a Repo,
    /// At which commit.
    pub commit: &'a str,
    /// Attempts in a row that may bring no byte before we give up.
    pub retries: u32,
}

/// A file to have.
pub struct Job {
    /// What the hub says about it.
    pub file: RemoteFile,
    /// Where it will be.
    pub target: PathBuf,
    part: PathBuf,
}

/// How a file came to be here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was here before.
    Present,
    /// Downloaded, and its SHA-256 is the hub's.
    Verified,
    /// Downloaded; the hub gives no hash for it, its size is right.
    Unverified,
}

impl Job {
    /// A file of the repository, to lie under `folder`.
    pub fn new(folder: &Path, file: RemoteFile, commit: &str) -> Self {
        let target = folder.join(&file.path);
        let identity = file.sha256.as_deref().unwrap_or(commit);
        let identity: String = identity.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        let mut part = target.clone().into_os_string();
        part.push(format!(".{identity}.part"));
        Self { file, target, part: part.into() }
    }

    /// Bytes that have to come, as far as sizes tell.
    pub fn missing_bytes(&self) -> u64 {
        let size = self.file.size.unwrap_or(0);
        if length(&self.target) == Some(size) { 0 } else { size.saturating_sub(length(&self.part).unwrap_or(0)) }
    }
}

/// Has the file afterwards, or says why not.
pub async fn run(job: &Job, source: &Source<'_>, bar: &ProgressBar) -> Result<Outcome> {
    if is_present(job, bar).await? {
        return Ok(Outcome::Present);
    }
    if let Some(folder) = job.target.parent() {
        std::fs::create_dir_all(folder).map_err(|error| cannot("create", folder, &error))?;
    }
    // Two attempts at the right content: a part left by a broken disk or an odd proxy must not block us for good.
    for last in [false, true] {
        let mut part = Part::open(job, bar).await?;
        fetch(job, source, bar, &mut part).await?;
        let hash = format!("{:x}", part.hasher.clone().finalize());
        let size_is_right = job.file.size.is_none_or(|size| size == part.length);
        let hash_is_right = job.file.sha256.as_ref().is_none_or(|expected| *expected == hash);
        if size_is_right && hash_is_right {
            part.file.sync_all().map_err(|error| cannot("write", &job.part, &error))?;
            std::fs::rename(&job.part, &job.target).map_err(|error| cannot("rename", &job.part, &error))?;
            return Ok(if job.file.sha256.is_some() { Outcome::Verified } else { Outcome::Unverified });
        }
        std::fs::remove_file(&job.part).map_err(|error| cannot("remove", &job.part, &error))?;
        if last {
            return Err(failed(match size_is_right {
                true => format!(
                    "{}: SHA-256 is {hash}, the hub promises {}: twice wrong, so the hub or the line is; nothing was kept",
                    job.file.path,
                    job.file.sha256.as_deref().unwrap_or_default()
                ),
                false => format!(
                    "{}: {} came where the hub promises {}: nothing was kept",
                    job.file.path,
                    bytes(part.length),
                    bytes(job.file.size.unwrap_or(0))
                ),
            }));
        }
        bar.set_message("wrong content, again");
    }
    Err(Error::internal("a download ended without an outcome"))
}

async fn is_present(job: &Job, bar: &ProgressBar) -> Result<bool> {
    let Some(there) = length(&job.target) else { return Ok(false) };
    if job.file.size.is_some_and(|size| size != there) {
        return Ok(false);
    }
    let Some(expected) = &job.file.sha256 else {
        // A size alone says little about a small file: a template can change and keep its length.
        return Ok(job.file.size.is_some_and(|size| size > CHEAP_BYTES));
    };
    bar.set_message("checking");
    let mut file = File::open(&job.target).map_err(|error| cannot("read", &job.target, &error))?;
    let (hasher, _) = hash_of(&mut file, &job.target, bar).await?;
    let right = format!("{:x}", hasher.finalize()) == *expected;
    bar.set_message("");
    bar.set_position(0);
    Ok(right)
}

/// A half-written file, its hash so far, and the lock that keeps a second `pull` away from it.
struct Part {
    file: File,
    hasher: Sha256,
    length: u64,
}

impl Part {
    async fn open(job: &Job, bar: &ProgressBar) -> Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&job.part).map_err(|error| cannot("write", &job.part, &error))?;
        if matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            return Err(failed(format!("{} is being downloaded by another neurond pull", job.file.path)));
        }
        let (hasher, length) = hash_of(&mut file, &job.part, bar).await?;
        let mut part = Self { file, hasher, length };
        if job.file.size.is_some_and(|size| part.length > size) {
            part.restart(job)?;
        }
        bar.set_position(part.length);
        // Speed and ETA are about what comes now, not about what was here.
        bar.reset_eta();
        Ok(part)
    }

    fn restart(&mut self, job: &Job) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| cannot("write", &job.part, &error))?;
        self.hasher = Sha256::new();
        self.length = 0;
        Ok(())
    }

    // A plain write: the page cache takes it, and one thread drives all downloads.
    fn append(&mut self, job: &Job, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| cannot("write", &job.part, &error))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// Brings the part to its full length, however often the line is cut.
async fn fetch(job: &Job, source: &Source<'_>, bar: &ProgressBar, part: &mut Part) -> Result<()> {
    let mut fruitless = 0;
    let mut answered_past_end = false;
    loop {
        if part.length > 0 && job.file.size == Some(part.length) {
            return Ok(());
        }
        let before = part.length;
        let stopped = match stream(job, source, bar, part).await {
            Ok(()) if job.file.size.is_none_or(|size| part.length >= size) => return Ok(()),
            Ok(()) => Refusal::Passing("the connection closed early".into(), None),
            Err(refusal) => refusal,
        };
        let (why, wait) = match stopped {
            Refusal::Final(error) => return Err(error),
            // What is here is as long as the file or longer. With no size to compare it starts over, once.
            Refusal::PastEnd if !answered_past_end => {
                answered_past_end = true;
                part.restart(job)?;
                continue;
            }
            Refusal::PastEnd => return Err(failed(format!("{}: the hub refuses every range of it", job.file.path))),
            Refusal::Passing(why, wait) => (why, wait),
        };
        fruitless = if part.length > before { 0 } else { fruitless + 1 };
        if fruitless > source.retries {
            return Err(Error::new(
                Kind::ModelUnavailable,
                format!(
                    "{}: {why}; given up after {fruitless} tries without progress. {} are kept: run the same command again",
                    job.file.path,
                    bytes(part.length)
                ),
            ));
        }
        bar.set_message(why);
        tokio::time::sleep(backoff(fruitless.saturating_sub(1), wait)).await;
        bar.set_message("");
    }
}

async fn stream(job: &Job, source: &Source<'_>, bar: &ProgressBar, part: &mut Part) -> Result<(), Refusal> {
    let mut response = source.hub.open(source.repo, source.commit, &job.file, part.length).await?;
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let begins_at = match response.status() {
        StatusCode::PARTIAL_CONTENT => range.and_then(range_start),
        _ => Some(0),
    };
    // A server may ignore the range: then everything comes again, and everything is taken again.
    if begins_at != Some(part.length) {
        part.restart(job).map_err(Refusal::Final)?;
        bar.set_position(0);
        if begins_at != Some(0) {
            return Err(Refusal::Passing("the hub answered with another range than asked for".into(), None));
        }
    }
    loop {
        match response.chunk().await {
            Ok(Some(bytes)) => {
                if job.file.size.is_some_and(|size| part.length + bytes.len() as u64 > size) {
                    return Err(Refusal::Final(failed(format!(
                        "{}: more comes than the hub promised: the file changed, or it is not the file",
                        job.file.path
                    ))));
                }
                part.append(job, &bytes).map_err(Refusal::Final)?;
                bar.inc(bytes.len() as u64);
            }
            Ok(None) => return Ok(()),
            Err(error) => return Err(Refusal::Passing(root_cause(&error), None)),
        }
    }
}

/// `bytes 100-199/200` -> 100.
fn range_start(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// Hash and length of a file from its start; leaves it positioned at its end. Yields between blocks, so that other
/// downloads go on.
async fn hash_of(file: &mut File, path: &Path, bar: &ProgressBar) -> Result<(Sha256, u64)> {
    let mut hasher = Sha256::new();
    let mut length = 0;
    let mut block = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut block).map_err(|error| cannot("read", path, &error))?;
        if read == 0 {
            return Ok((hasher, length));
        }
        hasher.update(&block[..read]);
        length += read as u64;
        bar.set_position(length);
        tokio::task::yield_now().await;
    }
}

fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|about| about.len())
}

fn cannot(verb: &str, path: &Path, error: &std::io::Error) -> Error {
    failed(format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_different_content_have_different_names() {
        let job = |sha256: Option<&str>, commit| {
            let file = RemoteFile { path: "a/m.gguf".into(), size: Some(9), sha256: sha256.map(str::to_owned) };
            Job::new(Path::new("models"), file, commit).part
        };
        assert_eq!(job(Some("0123456789abcdef99"), "c"), Path::new("models/a/m.gguf.0123456789abcdef.part"));
        assert_ne!(job(None, "one"), job(None, "two"));
        assert_eq!(job(None, "refs/pr/1"), Path::new("models/a/m.gguf.refspr1.part"));
    }

    #[test]
    fn a_content_range_says_where_it_begins() {
        assert_eq!(range_start("bytes 100-199/200"), Some(100));
        assert_eq!(range_start("bytes */200"), None);
    }
}
