//! Makes an object of a segment: the lines of one job, compressed, under a name that follows from them.
//!
//! ```text
//! segment ─> records ─the job's gateways?─> lines ─gzip─> PREFIX/20250615/20250615T150640Z_20250615T150711Z_HASH.log.gz
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

/// What is sent in one go.
#[derive(Clone, Debug)]
pub(super) struct Object {
    /// With the prefix.
    pub name: String,
    /// Compressed.
    pub bytes: Bytes,
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

/// Packs a segment; no object where it holds nothing for the job.
///
/// # Errors
/// If the segment cannot be read at all, or a record cannot be sealed.
pub(super) fn pack(path: &Path, prefix: &str, chosen: &[Chosen]) -> Result<(Option<Object>, Shipped), Failure> {
    let mut lines = GzEncoder::new(Vec::new(), Compression::new(EFFORT));
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
            lines.write_all(renderer.line(&parts).map_err(Failure::Render)?)?;
            hash.update(record);
            (first, last) = (first.min(at), last.max(at));
            shipped.records += 1;
        }
        Ok::<_, Failure>(())
    })?;
    let bytes = lines.finish()?;
    if shipped.records == 0 {
        return Ok((None, shipped));
    }
    shipped.bytes = bytes.len() as u64;
    let hash = &hash.finalize().to_hex()[..16];
    let (first, last) = (stamp(first), stamp(last));
    let (day, slash) = (&first[..8], if prefix.is_empty() { "" } else { "/" });
    let name = format!("{prefix}{slash}{day}/{first}_{last}_{hash}.log.gz");
    Ok((Some(Object { name, bytes: bytes.into() }), shipped))
}

/// `20150830T123600Z`.
fn stamp(at: Millis) -> String {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    let moment = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX);
    moment.strftime("%Y%m%dT%H%M%SZ").to_string()
}
