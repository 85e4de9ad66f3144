//! Makes an object of a segment: the lines of one job, compressed, under a name that follows from them.
//!
//! ```text
//! segment ─> records ─the job's gateways?─> lines ─┬─gzip──> PREFIX/20250615/20250615T150640Z_20250615T150711Z_HASH.log.gz
//!                                                  └─table─> PREFIX/20250615/20250615T150640Z_20250615T150711Z_HASH.parquet
//! ```
//!
//! The name is made of the first and last time and a hash of the records as they lie in the spool: the same segment has the same name
//! whenever it is packed, so a repeat takes the place of what is there. Envelopes are sealed anew each time, which their name
//! does not tell.

use std::io::{self, Write};
use std::path::Path;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;

use super::line::{self, Parts, Renderer};
use super::spool::{self, Shipped};
use super::table::Table;
use crate::base::{AccountId, Error, Millis};

/// Of nine: twice the work would save a tenth of the bytes.
const EFFORT: u32 = 2;

/// Gateways whose records a job ships.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chosen {
    /// Whose; `None`: that of any account.
    pub account: Option<AccountId>,
    /// The gateway's id.
    pub gateway: String,
}

/// What objects are.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Format {
    /// Lines of JSON, compressed with gzip.
    #[default]
    Lines,
    /// A Parquet file, its pages compressed with gzip.
    Parquet,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Self::Lines => "log.gz",
            Self::Parquet => "parquet",
        }
    }

    /// The media type.
    fn media(self) -> &'static str {
        match self {
            Self::Lines => "application/gzip",
            Self::Parquet => "application/vnd.apache.parquet",
        }
    }
}

/// What is sent in one go.
#[derive(Clone, Debug)]
pub(super) struct Object {
    /// With the prefix.
    pub name: String,
    /// Compressed.
    pub bytes: Bytes,
    /// What they are.
    pub media: &'static str,
}

/// Whether a gateway is among those chosen; all are where none is.
pub(super) fn is_chosen(chosen: &[Chosen], account: &[u8], gateway: &[u8]) -> bool {
    let fits = |chosen: &Chosen| {
        chosen.gateway.as_bytes() == gateway
            && chosen.account.as_ref().is_none_or(|wanted| wanted.as_str().as_bytes() == account)
    };
    chosen.is_empty() || chosen.iter().any(fits)
}

/// What went wrong.
pub(super) enum Failure {
    /// The spool cannot be read.
    Read(io::Error),
    /// A line cannot be made.
    Render(Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// An object that is being made.
enum Packer {
    Lines(GzEncoder<Vec<u8>>),
    Parquet(Box<Table>),
}

impl Packer {
    fn new(format: Format) -> Self {
        match format {
            Format::Lines => Self::Lines(GzEncoder::new(Vec::new(), Compression::new(EFFORT))),
            Format::Parquet => Self::Parquet(Box::new(Table::new(EFFORT))),
        }
    }

    fn push(&mut self, line: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Lines(lines) => lines.write_all(line).map_err(Failure::Read),
            Self::Parquet(table) => table.push(line).map_err(Failure::Render),
        }
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Lines(lines) => lines.finish(),
            Self::Parquet(table) => table.finish(),
        }
    }
}

/// Packs a segment; no object where it holds nothing for the job.
///
/// # Errors
/// If the segment cannot be read at all, or a record cannot be sealed.
pub(super) fn pack(
    path: &Path,
    prefix: &str,
    chosen: &[Chosen],
    format: Format,
) -> Result<(Option<Object>, Shipped), Failure> {
    let mut packer = Packer::new(format);
    let (mut renderer, mut hash, mut shipped) = (Renderer::default(), blake3::Hasher::new(), Shipped::default());
    let (mut first, mut last) = (Millis(u64::MAX), Millis(0));
    spool::blocks(path, |block| {
        let mut rest = block;
        while let Some((parts, after)) = line::next(rest) {
            let record = &rest[..rest.len() - after.len()];
            rest = after;
            let Parts { at, account, gateway, .. } = parts;
            if !is_chosen(chosen, account, gateway) {
                shipped.skipped += 1;
                continue;
            }
            packer.push(renderer.line(&parts).map_err(Failure::Render)?)?;
            hash.update(record);
            (first, last) = (first.min(at), last.max(at));
            shipped.records += 1;
        }
        Ok::<_, Failure>(())
    })?;
    if shipped.records == 0 {
        return Ok((None, shipped));
    }
    let bytes = packer.finish()?;
    shipped.bytes = bytes.len() as u64;
    let hash = &hash.finalize().to_hex()[..16];
    let (first, last) = (stamp(first), stamp(last));
    let (day, slash) = (&first[..8], if prefix.is_empty() { "" } else { "/" });
    let name = format!("{prefix}{slash}{day}/{first}_{last}_{hash}.{}", format.extension());
    Ok((Some(Object { name, bytes: bytes.into(), media: format.media() }), shipped))
}

/// `20150830T123600Z`.
fn stamp(at: Millis) -> String {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    let moment = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX);
    moment.strftime("%Y%m%dT%H%M%SZ").to_string()
}
