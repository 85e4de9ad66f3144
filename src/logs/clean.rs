//! Records as they may be kept: bodies that read as what they are, and no secrets.
//!
//! An answer that a cache gives again and again is the same bytes in each of its records. What it came to is remembered for as long as a
//! batch is taken in, by where it lies.

use std::io::Read;

use super::redact::Redactor;
use crate::base::Lookup;
use crate::logs::record::{Body, Record};

/// Bytes that a compressed body may become.
const INFLATED: u64 = 1 << 20;
/// Bodies that are remembered.
const MOST: usize = 256;

/// Cleans the records of a batch.
pub(super) struct Cleaner<'a> {
    redactor: &'a Redactor,
    /// By where they begin, and how long they are.
    known: Lookup<(usize, usize), Known>,
}

/// A body that others have too.
struct Known {
    /// As it was: while it is held, no other body lies where it does.
    was: Body,
    kind: Box<str>,
    is: Body,
}

impl<'a> Cleaner<'a> {
    pub(super) fn new(redactor: &'a Redactor) -> Self {
        Self { redactor, known: Lookup::default() }
    }

    /// Makes a record one that may be kept.
    pub(super) fn clean(&mut self, record: &mut Record) {
        let Record { asked, request_content_type, answered, response_content_type, .. } = record;
        for (body, kind) in [(asked, request_content_type), (answered, response_content_type)] {
            self.body(body, kind.as_deref().unwrap_or_default());
        }
        self.redactor.texts(record);
    }

    fn body(&mut self, body: &mut Body, kind: &str) {
        // Most bodies are of one call only.
        if body.kept.is_empty() || body.kept.is_unique() {
            return self.make(body, kind);
        }
        let place = (body.kept.as_ptr() as usize, body.kept.len());
        match self.known.get(&place) {
            Some(known) if known.was.size == body.size && *known.kind == *kind => *body = known.is.clone(),
            Some(_) => self.make(body, kind),
            None => {
                let was = body.clone();
                self.make(body, kind);
                if self.known.len() < MOST {
                    self.known.insert(place, Known { was, kind: kind.into(), is: body.clone() });
                }
            }
        }
    }

    fn make(&self, body: &mut Body, kind: &str) {
        inflate(body);
        drop_unreadable(body, kind);
        self.redactor.clean(body, kind);
    }
}

/// A compressed body as it reads: what is in it is to be found, by who looks for it and by who takes secrets out of it.
fn inflate(body: &mut Body) {
    if !body.kept.starts_with(&[0x1f, 0x8b]) {
        return;
    }
    let is_complete = body.is_complete();
    let mut text = Vec::new();
    let mut reader = flate2::read::GzDecoder::new(&body.kept[..]).take(INFLATED);
    // One that was cut ends in an error, and reads up to there.
    let is_whole = reader.read_to_end(&mut text).is_ok() && reader.limit() > 0;
    let size = text.len() as u64 + u64::from(!(is_whole && is_complete));
    *body = Body { kept: text.into(), size };
}

/// What is text and cannot be read as such (an AWS event stream, a compression that is not known here) is not kept: nobody could say what
/// secrets are in it. Pictures and sound are.
fn drop_unreadable(body: &mut Body, kind: &str) {
    let is_opaque =
        ["image/", "audio/", "video/", "application/octet-stream"].iter().any(|start| kind.starts_with(start));
    let is_read = match std::str::from_utf8(&body.kept) {
        Ok(_) => true,
        // Cut within a letter.
        Err(error) => error.error_len().is_none() && !body.is_complete(),
    };
    if !is_opaque && !is_read {
        body.kept = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bytes::Bytes;

    use super::*;
    use crate::logs::redact::Rules;
    use crate::logs::store::tests::record;

    fn packed(text: &str) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(text.as_bytes()).unwrap();
        packer.finish().unwrap()
    }

    #[test]
    fn what_cannot_be_read_and_should_be_is_not_kept() {
        let check = |kept: &[u8], size: u64, kind: &str, is_kept: bool| {
            let mut body = Body { kept: kept.to_vec().into(), size };
            drop_unreadable(&mut body, kind);
            assert_eq!((!body.kept.is_empty(), body.size), (is_kept, size), "{kind}");
        };
        check(b"\x00\x00\xff frame sk-secret", 20, "application/vnd.amazon.eventstream", false);
        check(b"\x00\x00\xff png", 7, "image/png", true);
        check("gr\u{fc}n".as_bytes(), 5, "application/json", true);
        check(&"gr\u{fc}n".as_bytes()[..3], 5, "application/json", true);
        check(&"gr\u{fc}n".as_bytes()[..3], 3, "application/json", false);
    }

    #[test]
    fn a_compressed_answer_is_kept_as_it_reads_and_a_part_of_one_as_far_as_it_does() {
        let text = "to be or not to be ".repeat(2000);
        let whole = packed(&text);
        let body = |kept: &[u8], size: usize| {
            let mut body = Body { kept: kept.to_vec().into(), size: size as u64 };
            inflate(&mut body);
            body
        };
        let read = body(&whole, whole.len());
        assert!(read.kept == text.as_bytes() && read.is_complete());
        let cut = body(&whole[..whole.len() / 2], whole.len());
        assert!(text.as_bytes().starts_with(&cut.kept) && !cut.is_complete());
        let huge = packed(&"x".repeat(INFLATED as usize + 10));
        let bomb = body(&huge, huge.len());
        assert_eq!((bomb.kept.len() as u64, bomb.is_complete()), (INFLATED, false));
        let plain = body(b"plain", 5);
        assert_eq!((&plain.kept[..], plain.is_complete()), (&b"plain"[..], true));
    }

    #[test]
    fn a_body_that_records_share_is_cleaned_once_and_only_for_those_that_mean_the_same() {
        let redactor = Redactor::new(&Rules::default()).unwrap();
        let answer = Bytes::from(r#"{"answer":"write to ann@example.com"}"#.to_owned());
        let size = answer.len() as u64;
        let records = [
            (answer.clone(), size, "application/json"),
            (answer.clone(), size, "application/json"),
            // The same text elsewhere, one that goes on, one of another kind.
            (Bytes::copy_from_slice(&answer), size, "application/json"),
            (answer.clone(), size + 1, "application/json"),
            (answer.clone(), size, "text/plain"),
        ];
        let mut cleaner = Cleaner::new(&redactor);
        let cleaned = records.map(|(kept, size, kind)| {
            let mut record = record(1_700_000_000_000, 1);
            record.answered = Body { kept, size };
            record.response_content_type = Some(kind.into());
            cleaner.clean(&mut record);
            record.answered
        });
        let [first, second, copy, cut, other] = cleaned;
        assert_eq!(first.kept, r#"{"answer":"write to [REDACTED:email]"}"#);
        for same in [&second, &copy, &other] {
            assert_eq!((same, same.is_complete()), (&first, true));
        }
        assert_eq!(second.kept.as_ptr(), first.kept.as_ptr());
        assert_ne!(copy.kept.as_ptr(), first.kept.as_ptr());
        assert_ne!(other.kept.as_ptr(), first.kept.as_ptr());
        assert!(!cut.is_complete() && !cut.kept.windows(3).any(|part| part == b"ann"));
    }

    #[test]
    fn a_shared_body_is_inflated_once_and_one_of_its_own_is_not_remembered() {
        let redactor = Redactor::new(&Rules::default()).unwrap();
        let answer = Bytes::from(packed("write to ann@example.com"));
        let mut cleaner = Cleaner::new(&redactor);
        let mut clean = |kept: Bytes| {
            let mut body = Body { size: kept.len() as u64, kept };
            cleaner.body(&mut body, "application/json");
            (body.kept, cleaner.known.len())
        };
        let ((first, _), (second, known)) = (clean(answer.clone()), clean(answer.clone()));
        assert_eq!((&first[..], first.as_ptr(), known), (&b"write to [REDACTED:email]"[..], second.as_ptr(), 1));
        assert_eq!(clean(Bytes::from("ann@example.com".to_owned())), ("[REDACTED:email]".into(), 1));
        for _ in 0..2 * MOST {
            let kept = Bytes::from("ann@example.com".to_owned());
            let (cleaned, known) = clean(kept.clone());
            assert!(cleaned == "[REDACTED:email]" && known <= MOST);
        }
    }
}
