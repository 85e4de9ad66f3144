//! A record on its way out: what the spool keeps of it, and the line of JSON that becomes of that.
//!
//! ```text
//! Record ──encode──> [ at | account | gateway | key | head: JSON so far | metadata | request body | response body ]
//!                                                      │                     │  plain: as JSON; sealed: an envelope each
//!                    ──render──>  {"Id":"01…","CreatedAt":"…", … ,"Metadata":{…},"RequestBody":"…","ResponseBody":"…"}
//! ```
//!
//! Encoding is done for every record while calls are served, so it writes the small fields as JSON once, copies the bodies and
//! does no more. A line is at most 1 MB: longer bodies are cut here, so that the spool does not carry what nobody will get,
//! and their `…BodyComplete` says so.

use serde_json::value::RawValue;

use super::envelope::{PublicKey, TAG};
use super::json::{COST, GROWTH, Object, base64_of, push_base64};
use crate::base::{Error, Kind, LogId, Millis, Result};
use crate::logs::record::{Body, Record};

/// Bytes of a line, its end included.
pub(super) const LINE: usize = 1_000_000;
/// Names, quotes and brackets around the three long fields, encodings and cuts said.
const AROUND: usize = 300;
/// A body that is no text.
const ASKED_BINARY: u8 = 1;
const ANSWERED_BINARY: u8 = 2;

/// A record as the spool keeps it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts<'a> {
    pub at: Millis,
    pub account: &'a [u8],
    pub gateway: &'a [u8],
    /// Empty where nothing is to be sealed.
    key: &'a [u8],
    binary: u8,
    /// An object without its last fields.
    head: &'a [u8],
    metadata: &'a [u8],
    asked: &'a [u8],
    answered: &'a [u8],
}

/// Puts a record behind `out`, with its length.
pub(super) fn encode(record: &Record, id: LogId, key: Option<&PublicKey>, out: &mut Vec<u8>) {
    let begin = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&record.at.0.to_le_bytes());
    let metadata = metadata(record);
    let (asked, answered) = (shape(&record.asked, key.is_some()), shape(&record.answered, key.is_some()));
    let binary = |form: Form, flag: u8| if form == Form::Binary { flag } else { 0 };
    out.push(binary(asked.0, ASKED_BINARY) | binary(answered.0, ANSWERED_BINARY));
    for text in [record.account.as_str().as_bytes(), record.gateway.as_bytes(), key.map_or(&[], PublicKey::der)] {
        put(out, text);
    }

    let place = out.len();
    out.extend_from_slice(&[0; 4]);
    head(record, id, out);
    let sealed = key.map_or(0, |key| 3 * (base64_of(key.size()) + base64_of(TAG) + 60));
    let used = out.len() - place + base64_of(metadata.len()) + sealed + AROUND;
    let room = LINE.saturating_sub(used);
    let (asked, answered) = cut(asked, answered, room);
    let complete = |body: &Body, kept: &[u8]| kept.len() as u64 == body.size;
    let mut object = Object { out, is_first: false };
    object.flag("RequestBodyComplete", complete(&record.asked, asked));
    object.flag("ResponseBodyComplete", complete(&record.answered, answered));
    fill(out, place);

    for bytes in [metadata, asked, answered] {
        put(out, bytes);
    }
    fill(out, begin);
}

/// The next record of those that [`encode`] has put behind one another, and what follows it.
pub(super) fn next(bytes: &[u8]) -> Option<(Parts<'_>, &[u8])> {
    let (mut record, rest) = take(bytes)?;
    let (at, after) = record.split_first_chunk::<8>()?;
    let (binary, after) = after.split_first()?;
    record = after;
    let mut field = || {
        let (field, after) = take(record)?;
        record = after;
        Some(field)
    };
    let parts = Parts {
        at: Millis(u64::from_le_bytes(*at)),
        binary: *binary,
        account: field()?,
        gateway: field()?,
        key: field()?,
        head: field()?,
        metadata: field()?,
        asked: field()?,
        answered: field()?,
    };
    Some((parts, rest))
}

/// Makes lines, and keeps what it needs for that.
#[derive(Default)]
pub(super) struct Renderer {
    line: Vec<u8>,
    scratch: Vec<u8>,
    /// The last key that was used: there are few.
    key: Option<PublicKey>,
}

impl Renderer {
    /// The line of a record, with its end.
    ///
    /// # Errors
    /// If its key cannot be used: nothing goes out that should have been sealed.
    pub(super) fn line(&mut self, parts: &Parts<'_>) -> Result<&[u8]> {
        let Self { line, scratch, key } = self;
        line.clear();
        line.extend_from_slice(parts.head);
        if parts.key.is_empty() {
            Object { out: line, is_first: false }.raw("Metadata", parts.metadata);
            let is_binary = |flag: u8| parts.binary & flag != 0;
            body(line, ["RequestBody", "RequestBodyEncoding"], parts.asked, is_binary(ASKED_BINARY));
            body(line, ["ResponseBody", "ResponseBodyEncoding"], parts.answered, is_binary(ANSWERED_BINARY));
        } else {
            if key.as_ref().is_none_or(|key| key.der() != parts.key) {
                *key = PublicKey::from_der(parts.key);
            }
            let unreadable = || Error::internal("a record's public key cannot be read");
            let key = key.as_ref().ok_or_else(unreadable)?;
            let fields = [("Metadata", parts.metadata), ("RequestBody", parts.asked), ("ResponseBody", parts.answered)];
            for (name, bytes) in fields {
                Object { out: line, is_first: false }.name(name);
                key.seal(bytes, line, scratch)?;
            }
        }
        line.extend_from_slice(b"}\n");
        Ok(line)
    }
}

fn body(line: &mut Vec<u8>, [name, encoding]: [&str; 2], bytes: &[u8], is_binary: bool) {
    let mut object = Object { out: line, is_first: false };
    if !is_binary {
        return object.quoted(name, bytes);
    }
    object.name(name);
    object.out.push(b'"');
    push_base64(bytes, object.out);
    object.out.push(b'"');
    object.text(encoding, "base64");
}

/// All of §17.1 but the long fields. What is not known yet when a call ends is `null`.
fn head(record: &Record, id: LogId, out: &mut Vec<u8>) {
    out.push(b'{');
    let mut object = Object { out, is_first: true };
    let (mut letters, mut digits) = ([0; 26], [0; 36]);
    let id = id.text(&mut letters);
    object.text("Id", id);
    let millis = i64::try_from(record.at.0).unwrap_or(i64::MAX);
    let moment = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX);
    object.written("CreatedAt", format_args!("\"{moment:.3}\""));
    object.text("Account", record.account.as_str());
    object.text("Gateway", &record.gateway);
    object.maybe("Token", record.key.as_ref().map(|key| key.as_str()));
    object.text("RequestId", record.request.text(&mut digits));
    object.text("EventId", record.event.as_deref().unwrap_or(id));
    object.text("Provider", &record.provider);
    object.text("Model", &record.model);
    match record.task {
        // `Text-to-Image` is `text-to-image`.
        Some(task) => object.text("ModelType", &task.name().to_ascii_lowercase().replace(' ', "-")),
        None => object.raw("ModelType", b"null"),
    }
    object.text("Endpoint", &record.path);
    object.number("StatusCode", record.status.into());
    object.flag("Success", record.success);
    object.flag("Cached", record.cache.is_hit());
    object.text("CacheStatus", record.cache.as_str());
    object.flag("RateLimited", record.why.as_deref() == Some(Kind::RateLimited.as_str()));
    object.number("Duration", record.duration_us.saturating_add(500) / 1000);
    let tokens = |count: Option<u32>| count.map(u64::from);
    object.maybe_number("TokensIn", tokens(record.usage.map(|usage| usage.prompt_tokens)));
    object.maybe_number("TokensOut", tokens(record.usage.map(|usage| usage.completion_tokens)));
    object.dollars("Cost", record.cost);
    object.flag("CustomCost", record.custom_cost);
    object.dollars("SavedCost", record.saved);
    object.number("Step", record.step.into());
    object.text("RequestType", &record.request_type);
    object.maybe("RequestContentType", record.request_content_type.as_deref());
    object.maybe("ResponseContentType", record.response_content_type.as_deref());
    object.number("RequestSize", record.asked.size);
    object.number("ResponseSize", record.answered.size);
    object.raw("Feedback", b"null");
    object.raw("Score", b"null");
    object.maybe("UserAgent", record.user_agent.as_deref());
    object.flag("Authentication", record.authenticated);
    object.flag("Wholesale", false);
    object.flag("Byok", record.stored_key);
    object.text("Attempts", &record.attempts);
    object.maybe("Error", record.why.as_deref());
    object.texts("Findings", &record.findings);
    let cached = record.usage.map_or(0, |usage| usage.cached_tokens);
    object.written("UsageMetadata", format_args!("{{\"CachedTokensIn\":{cached}}}"));
    let ms = |us: u64| (us / 1000, us % 1000);
    let (whole, part) = ms(record.duration_us);
    match record.first_byte_us.map(ms) {
        Some((first, rest)) => {
            object.written("Timings", format_args!("{{\"FirstByte\":{first}.{rest:03},\"Total\":{whole}.{part:03}}}"))
        }
        None => object.written("Timings", format_args!("{{\"FirstByte\":null,\"Total\":{whole}.{part:03}}}")),
    }
}

/// The caller's JSON object as it is; anything else is none.
fn metadata(record: &Record) -> &[u8] {
    let text = record.metadata.as_deref().unwrap_or_default();
    // Line feeds between its fields would end the line.
    let is_object = text.starts_with('{') && !text.contains(['\n', '\r']);
    match is_object && serde_json::from_str::<&RawValue>(text).is_ok() {
        true => text.as_bytes(),
        false => b"{}",
    }
}

/// How a body is written, which says how long it becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Text,
    Binary,
    Sealed,
}

/// A body's form, and what of it can be written so.
fn shape(body: &Body, sealed: bool) -> (Form, &[u8]) {
    let kept = &body.kept;
    if sealed {
        return (Form::Sealed, kept);
    }
    match std::str::from_utf8(kept) {
        Ok(_) => (Form::Text, kept),
        // A text whose last character was cut.
        Err(error) if error.error_len().is_none() && !body.is_complete() => (Form::Text, &kept[..error.valid_up_to()]),
        Err(_) => (Form::Binary, kept),
    }
}

/// The beginnings of both bodies that fit into `room` as they are written: each has half of it, and what the other leaves.
fn cut<'a>(asked: (Form, &'a [u8]), answered: (Form, &'a [u8]), room: usize) -> (&'a [u8], &'a [u8]) {
    if (asked.1.len() + answered.1.len()) * GROWTH <= room {
        return (asked.1, answered.1);
    }
    let wanted = fit(answered, room).1;
    let (asked_end, taken) = fit(asked, room - wanted.min(room / 2));
    let (answered_end, _) = fit(answered, room - taken);
    (&asked.1[..asked_end], &answered.1[..answered_end])
}

/// How much of a body fits into `room`, and what it takes of it.
fn fit((form, bytes): (Form, &[u8]), room: usize) -> (usize, usize) {
    match form {
        Form::Binary | Form::Sealed => {
            let kept = bytes.len().min(room / 4 * 3);
            (kept, base64_of(kept))
        }
        Form::Text => {
            let (mut end, mut taken) = (0, 0);
            for &byte in bytes {
                let cost = usize::from(COST[usize::from(byte)]);
                if taken + cost > room {
                    break;
                }
                (end, taken) = (end + 1, taken + cost);
            }
            // Back to where a character begins.
            while end < bytes.len() && end > 0 && bytes[end] & 0xC0 == 0x80 {
                (end, taken) = (end - 1, taken - 1);
            }
            (end, taken)
        }
    }
}

/// Bytes with their length before them.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    // The cut has seen to it that nothing here is longer than a line; heads are bounded by the server.
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Writes the length of what has followed `place` into it.
fn fill(out: &mut [u8], place: usize) {
    let length = (out.len() - place - 4) as u32;
    out[place..place + 4].copy_from_slice(&length.to_le_bytes());
}

/// What [`put`] has put, and what follows it.
fn take(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

#[cfg(test)]
#[path = "line_test.rs"]
pub(super) mod tests;
