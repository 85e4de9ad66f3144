//! A whole answer, as it is kept in memory and on disk.
//!
//! ```text
//! Record  version | digest | created | expires | scopes and their generations | length of the frame      what a start reads
//! frame   digest | status | headers | lengths of the chunks | body                                       what a hit needs
//! ```
//!
//! In memory the frame is one block: headers and body are slices of it, and so are the chunks that a stream is replayed in.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::base::Millis;
use crate::cache::key::{Digest, Scope};

/// The layout of records and frames.
const VERSION: u8 = 1;
/// What an entry takes beside its bytes, in the index and in the view: an estimate.
const OVERHEAD: u64 = 1024;
/// The same for a header.
const HEADER_OVERHEAD: u64 = 192;

/// How an answer begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The HTTP status.
    pub status: u16,
    /// Names and values in their order, `content-type` among them.
    pub headers: Vec<(Box<str>, Bytes)>,
}

impl Head {
    /// The first value under a name, however its case.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Bytes of all names and values.
    pub(super) fn size(&self) -> u64 {
        self.headers.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum()
    }
}

/// What must still be so for an answer to be served: the generation of each of its scopes.
pub(super) type Stamps = [Option<(Scope, u64)>; 2];

/// An entry without its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Record {
    pub(super) digest: Digest,
    pub(super) created: Millis,
    pub(super) expires: Millis,
    pub(super) stamps: Stamps,
}

impl Record {
    /// The record as bytes, beside a frame of `length` bytes.
    pub(super) fn encode(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.digest.0);
        bytes.extend_from_slice(&self.created.0.to_le_bytes());
        bytes.extend_from_slice(&self.expires.0.to_le_bytes());
        for stamp in self.stamps {
            let (scope, generation) = stamp.unwrap_or((Scope([0; 16]), 0));
            bytes.push(u8::from(stamp.is_some()));
            bytes.extend_from_slice(&scope.0);
            bytes.extend_from_slice(&generation.to_le_bytes());
        }
        bytes.extend_from_slice(&(length as u64).to_le_bytes());
        bytes
    }

    /// A record and the length of its frame; nothing if it is of another version.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, u64)> {
        let mut cursor = Cursor(bytes);
        if cursor.array::<1>()? != [VERSION] {
            return None;
        }
        let digest = Digest(cursor.array()?);
        let (created, expires) = (Millis(cursor.u64()?), Millis(cursor.u64()?));
        let mut stamps = [None; 2];
        for stamp in &mut stamps {
            let is_some = cursor.array::<1>()? == [1];
            let (scope, generation) = (Scope(cursor.array()?), cursor.u64()?);
            *stamp = is_some.then_some((scope, generation));
        }
        let length = cursor.u64()?;
        cursor.0.is_empty().then_some((Self { digest, created, expires, stamps }, length))
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Entry {
    pub(super) record: Record,
    pub(super) frame: Bytes,
    head: Arc<Head>,
    body: Bytes,
    /// Where each chunk ends in the body.
    ends: Box<[u32]>,
    /// When it was last served.
    used: AtomicU64,
    /// How many purges there had been when the stamps were last compared.
    pub(super) checked: AtomicU64,
    /// See [`Entry::read`].
    read: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Entry {
    /// Puts an answer together, or nothing if it is too large for a frame. Copies: what came from a socket is often a
    /// small part of a large buffer.
    pub(super) fn new(record: Record, head: &Head, chunks: &[Bytes], now: Millis) -> Option<Self> {
        Self::from_frame(record, encode(record.digest, head, chunks)?.into(), now)
    }

    /// Takes a frame apart, or nothing if it is no frame of this record.
    pub(super) fn from_frame(record: Record, frame: Bytes, now: Millis) -> Option<Self> {
        let mut cursor = Cursor(&frame);
        if cursor.array()? != record.digest.0 {
            return None;
        }
        let status = u16::from_le_bytes(cursor.array()?);
        let count = cursor.u32()? as usize;
        // Lengths alone are eight bytes a header: a count beyond that is rubbish, and nothing is allocated for it.
        let mut headers = Vec::with_capacity(Some(count).filter(|count| *count <= cursor.0.len() / 8)?);
        for _ in 0..count {
            let (name, value) = (cursor.u32()? as usize, cursor.u32()? as usize);
            let name = std::str::from_utf8(cursor.take(name)?).ok()?;
            headers.push((name.into(), frame.slice_ref(cursor.take(value)?)));
        }
        let count = cursor.u32()? as usize;
        let mut end = 0_u32;
        let mut ends = Vec::with_capacity(Some(count).filter(|count| *count <= cursor.0.len() / 4)?);
        for _ in 0..count {
            end = end.checked_add(cursor.u32()?)?;
            ends.push(end);
        }
        let body = frame.slice_ref(cursor.0);
        if body.len() != end as usize {
            return None;
        }
        let (head, ends) = (Arc::new(Head { status, headers }), ends.into_boxed_slice());
        let (used, checked) = (AtomicU64::new(now.0), AtomicU64::new(u64::MAX));
        Some(Self { record, frame, head, body, ends, used, checked, read: OnceLock::new() })
    }

    /// Status and headers.
    pub fn head(&self) -> &Arc<Head> {
        &self.head
    }

    /// The head as whoever serves it has it in its own types: read for the first hit and kept for the others, about as large as the head
    /// itself. `None` where another type was read before.
    pub fn read<T: Any + Send + Sync>(&self, read: impl FnOnce(&Head) -> T) -> Option<&T> {
        self.read.get_or_init(|| Box::new(read(&self.head))).downcast_ref()
    }

    /// The whole body.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The body in the chunks that it came in.
    pub fn chunks(self: Arc<Self>) -> impl Iterator<Item = Bytes> + Send {
        (0..self.ends.len()).map(move |at| {
            let begin = if at == 0 { 0 } else { self.ends[at - 1] };
            self.body.slice(begin as usize..self.ends[at] as usize)
        })
    }

    /// When it was answered.
    pub fn created(&self) -> Millis {
        self.record.created
    }

    /// When it stops being served.
    pub fn expires(&self) -> Millis {
        self.record.expires
    }

    /// What it takes of the memory tier.
    pub(super) fn memory(&self) -> u64 {
        let headers = self.head.headers.len() as u64 * HEADER_OVERHEAD + self.head.size();
        self.frame.len() as u64 + self.ends.len() as u64 * 4 + headers + OVERHEAD
    }

    pub(super) fn used(&self) -> Millis {
        Millis(self.used.load(Ordering::Relaxed))
    }

    pub(super) fn touch(&self, now: Millis) {
        self.used.store(now.0, Ordering::Relaxed);
    }
}

fn encode(digest: Digest, head: &Head, chunks: &[Bytes]) -> Option<Vec<u8>> {
    let body: usize = chunks.iter().map(Bytes::len).sum();
    // The lengths inside add up to less than this.
    u32::try_from(body as u64 + head.size()).ok()?;
    let size = 64 + head.size() as usize + head.headers.len() * 8 + chunks.len() * 4 + body;
    let mut frame = Vec::with_capacity(size);
    frame.extend_from_slice(&digest.0);
    frame.extend_from_slice(&head.status.to_le_bytes());
    frame.extend_from_slice(&(head.headers.len() as u32).to_le_bytes());
    for (name, value) in &head.headers {
        frame.extend_from_slice(&(name.len() as u32).to_le_bytes());
        frame.extend_from_slice(&(value.len() as u32).to_le_bytes());
        frame.extend_from_slice(name.as_bytes());
        frame.extend_from_slice(value);
    }
    frame.extend_from_slice(&(chunks.len() as u32).to_le_bytes());
    chunks.iter().for_each(|chunk| frame.extend_from_slice(&(chunk.len() as u32).to_le_bytes()));
    chunks.iter().for_each(|chunk| frame.extend_from_slice(chunk));
    Some(frame)
}

/// Reads from the front, never beyond the end.
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(stamps: Stamps) -> Record {
        Record { digest: Digest([7; 32]), created: Millis(1), expires: Millis(u64::MAX), stamps }
    }

    fn head(headers: &[(&str, &'static str)]) -> Head {
        Head { status: 201, headers: headers.iter().map(|&(name, value)| (name.into(), value.into())).collect() }
    }

    #[test]
    fn an_answer_is_read_back_as_it_was_with_the_bounds_of_its_chunks() {
        let check = |headers: &[(&str, &'static str)], chunks: &[&'static str]| {
            let (head, chunks) = (head(headers), chunks.iter().map(|chunk| Bytes::from(*chunk)).collect::<Vec<_>>());
            let written = Entry::new(record([None; 2]), &head, &chunks, Millis(5)).unwrap();
            let read = Entry::from_frame(written.record, written.frame.clone(), Millis(5)).unwrap();
            assert_eq!((&**read.head(), read.body()), (&head, &Bytes::from(chunks.concat())));
            assert_eq!(read.memory(), written.memory());
            assert_eq!(Arc::new(read).chunks().collect::<Vec<_>>(), chunks);
            // Cut anywhere, or in a place that belongs to another key, it is nothing: its end belongs to the body, whose
            // length is known.
            for cut in 0..written.frame.len() {
                assert!(Entry::from_frame(written.record, written.frame.slice(..cut), Millis(5)).is_none(), "{cut}");
            }
            let other = Record { digest: Digest([8; 32]), ..written.record };
            assert!(Entry::from_frame(other, written.frame, Millis(5)).is_none());
        };
        check(&[], &[]);
        check(&[("content-type", "text/event-stream"), ("x", "")], &["data: 1\n\n", "d", "ata: 2\n\n"]);
        check(&[("content-type", "application/json")], &["{}"]);
    }

    #[test]
    fn a_frame_with_any_byte_changed_is_read_without_a_panic() {
        let chunks = [Bytes::from("one"), Bytes::from("two")];
        let entry = Entry::new(record([None; 2]), &head(&[("a", "b")]), &chunks, Millis(5)).unwrap();
        for at in 0..entry.frame.len() {
            let mut frame = entry.frame.to_vec();
            frame[at] = 0xff;
            let _ = Entry::from_frame(entry.record, frame.into(), Millis(5));
        }
    }

    #[test]
    fn a_record_is_read_back_and_one_of_another_version_is_not() {
        let scopes = [Some((Scope::gateway("a", "g"), 3)), Some((Scope::provider("a", "p"), u64::MAX))];
        for stamps in [[None; 2], [scopes[0], None], scopes] {
            let bytes = record(stamps).encode(99);
            assert_eq!(Record::decode(&bytes), Some((record(stamps), 99)));
            (0..bytes.len()).for_each(|cut| assert_eq!(Record::decode(&bytes[..cut]), None));
            let newer = [&[VERSION + 1], &bytes[1..]].concat();
            assert_eq!(Record::decode(&newer), None);
        }
    }

    #[test]
    fn a_head_is_read_once() {
        let entry = Entry::new(record([None; 2]), &head(&[("etag", "a")]), &[], Millis(1)).unwrap();
        let reads = std::cell::Cell::new(0);
        let read = |head: &Head| {
            reads.set(reads.get() + 1);
            head.headers.len()
        };
        assert_eq!([entry.read(read), entry.read(read)], [Some(&1), Some(&1)]);
        assert_eq!((reads.get(), entry.read(|_| "another")), (1, None));
    }

    #[test]
    fn headers_are_found_however_their_case() {
        let head = head(&[("Content-Type", "a"), ("content-type", "b")]);
        assert_eq!(head.header("CONTENT-TYPE"), Some(&Bytes::from("a")));
        assert_eq!(head.header("etag"), None);
    }
}
