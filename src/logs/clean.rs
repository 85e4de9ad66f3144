//! Records as they may be kept: bodies that read as what they are, and no secrets.
//!
//! An answer that a cache gives again and again is the same bytes in each of its records, and whoever asks for it says the same words. What
//! they came to is remembered for as long as a batch is taken in: of an answer by where it lies, of a question by what it says.

use std::hash::BuildHasher;
use std::io::Read;

use bytes::Bytes;

use super::redact::Redactor;
use crate::base::Lookup;
use crate::logs::record::{Body, Record, Text};

/// Bytes that a compressed body may become.
const INFLATED: u64 = 1 << 20;
/// Bodies that are remembered.
const MOST: usize = 256;

/// Cleans the records of a batch.
pub(super) struct Cleaner<'a> {
    redactor: &'a Redactor,
    known: Lookup<Place, Known>,
    /// Path and user agent of the last record that had nothing but these, and nothing in them.
    clean: Option<(Text, Option<Text>)>,
}

/// What bodies are remembered by. Those of one place need not be the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// Where it begins, and its length.
    Memory(usize, usize),
    /// A hash of all of it.
    Text(u64),
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
        Self { redactor, known: Lookup::default(), clean: None }
    }

    /// Makes a record one that may be kept.
    pub(super) fn clean(&mut self, record: &mut Record) {
        let is_hit = record.cache.is_hit();
        let Record { asked, request_content_type, answered, response_content_type, .. } = record;
        self.body(asked, request_content_type.as_deref().unwrap_or_default(), is_hit);
        self.body(answered, response_content_type.as_deref().unwrap_or_default(), false);
        self.texts(record);
    }

    /// All but the bodies. Many calls have the same path and come from the same program.
    fn texts(&mut self, record: &mut Record) {
        let is_plain = record.metadata.is_none() && record.event.is_none();
        let is_known = |(path, agent): &(Text, Option<Text>)| *path == record.path && *agent == record.user_agent;
        if is_plain && self.clean.as_ref().is_some_and(is_known) {
            return;
        }
        let is_changed = self.redactor.texts(record);
        if is_plain && !is_changed {
            self.clean = Some((record.path.clone(), record.user_agent.clone()));
        }
    }

    /// A body that `is_said_again` is likely to be so in this batch.
    fn body(&mut self, body: &mut Body, kind: &str, is_said_again: bool) {
        // Most bodies are of one call only.
        if body.kept.is_empty() || (!is_said_again && body.kept.is_unique()) {
            return self.make(body, kind);
        }
        let place = match is_said_again {
            true => Place::Text(self.known.hasher().hash_one(&body.kept[..])),
            false => Place::Memory(body.kept.as_ptr() as usize, body.kept.len()),
        };
        match self.known.get(&place) {
            Some(Known { was, kind: known, is })
                if was.size == body.size && **known == *kind && are_same(&was.kept, &body.kept) =>
            {
                *body = is.clone();
            }
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

fn are_same(one: &Bytes, other: &Bytes) -> bool {
    (one.as_ptr() == other.as_ptr() && one.len() == other.len()) || one == other
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
    use crate::logs::record::CacheUse;
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
    fn what_is_asked_again_is_cleaned_once_and_texts_whose_like_was_clean_are_not_looked_at() {
        let redactor = Redactor::new(&Rules::default()).unwrap();
        let mut cleaner = Cleaner::new(&redactor);
        let mut clean = |asked: &str, cache: CacheUse, path: &str| {
            let mut record = record(1_700_000_000_000, 1);
            record.asked = Body { kept: asked.to_owned().into(), size: asked.len() as u64 };
            (record.cache, record.path, record.event, record.metadata) = (cache, path.into(), None, None);
            cleaner.clean(&mut record);
            (record.asked.kept, record.path)
        };
        let (hit, miss) = (CacheUse::Hit, CacheUse::Miss);
        let (first, _) = clean(r#"{"to":"ann@example.com"}"#, hit, "v1/x");
        let (again, _) = clean(r#"{"to":"ann@example.com"}"#, hit, "v1/x");
        let (other, _) = clean(r#"{"to":"bob@example.com"}"#, hit, "v1/x");
        let (new, path) = clean(r#"{"to":"ann@example.com"}"#, miss, "v1/key=sk-abcdefghijklmnopqrstuvwxyz123456");
        for one in [&first, &again, &other, &new] {
            assert_eq!(one, &r#"{"to":"[REDACTED:email]"}"#);
        }
        assert_eq!(again.as_ptr(), first.as_ptr());
        assert!(other.as_ptr() != first.as_ptr() && new.as_ptr() != first.as_ptr());
        assert!(!path.contains("sk-abc"), "{path}");
        assert_eq!(&*clean("{}", hit, "v1/x").1, "v1/x");
    }

    #[test]
    fn a_shared_body_is_inflated_once_and_one_of_its_own_is_not_remembered() {
        let redactor = Redactor::new(&Rules::default()).unwrap();
        let answer = Bytes::from(packed("write to ann@example.com"));
        let mut cleaner = Cleaner::new(&redactor);
        let mut clean = |kept: Bytes| {
            let mut body = Body { size: kept.len() as u64, kept };
            cleaner.body(&mut body, "application/json", false);
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
