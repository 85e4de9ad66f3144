//! A record as bytes: its head, with all but the bodies, and the bodies, which lie elsewhere.
//!
//! Numbers are LEB128, texts have their length in front, in the order of the fields. A head that ends early or is no text is nothing.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use crate::base::{AccountId, KeyId, LogId, Millis, Neurons, RequestId};
use crate::logs::record::{Body, CacheUse, Record, Text};
use crate::task::{Task, Usage};

/// A record as it is read back. Of its bodies only the sizes are there, unless they were asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct Stored {
    /// The record.
    pub record: Record,
    /// Thumbs down (-1), up (1), or taken back (0).
    pub feedback: Option<i8>,
    /// From 0 to 100.
    pub score: Option<u8>,
}

/// Appends the head of a record with an id.
pub(super) fn encode(id: LogId, record: &Record, out: &mut Vec<u8>) {
    out.extend_from_slice(&id.number().to_le_bytes());
    out.extend_from_slice(&record.request.number().to_le_bytes());
    put_number(out, record.at.0);
    put(out, record.account.as_str());
    put(out, &record.gateway);
    put_maybe(out, record.key.as_ref().map(KeyId::as_str));
    put(out, &record.provider);
    put(out, &record.model);
    put_number(
        out,
        record.task.and_then(|task| Task::ALL.iter().position(|other| *other == task)).map_or(0, |at| at as u64 + 1),
    );
    put(out, &record.path);
    put_number(out, record.status.into());
    let flags = [record.success, record.custom_cost, record.authenticated, record.stored_key];
    let flags = flags.iter().enumerate().map(|(bit, flag)| u64::from(*flag) << bit).sum::<u64>();
    put_number(out, flags | (record.cache as u64) << 4);
    put_number(out, record.duration_us);
    put_number(out, record.first_byte_us.map_or(0, |us| us.saturating_add(1)));
    put_number(out, record.usage.is_some().into());
    if let Some(usage) = record.usage {
        let counts = [
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.written_tokens,
            usage.completion_tokens,
            usage.drafted_tokens,
            usage.accepted_tokens,
        ];
        counts.iter().for_each(|count| put_number(out, (*count).into()));
    }
    put_number(out, record.cost.micro());
    put_number(out, record.saved.micro());
    put_number(out, record.step.into());
    put(out, &record.request_type);
    let texts = [
        &record.request_content_type,
        &record.response_content_type,
        &record.metadata,
        &record.event,
        &record.user_agent,
    ];
    texts.iter().for_each(|text| put_maybe(out, text.as_deref()));
    put(out, &record.attempts);
    put_maybe(out, record.why.as_deref());
    put_number(out, record.findings.len() as u64);
    record.findings.iter().for_each(|finding| put(out, finding));
    for body in [&record.asked, &record.answered] {
        put_number(out, body.size);
    }
}

/// Reads what [`encode`] wrote, and leaves `bytes` behind it; nothing if it is damaged.
pub(super) fn decode(bytes: &mut &[u8]) -> Option<Record> {
    let id = LogId::from_number(u128::from_le_bytes(*take(bytes)?));
    let request = RequestId::from_number(u128::from_le_bytes(*take(bytes)?));
    let at = Millis(number(bytes)?);
    let account = AccountId::new(text(bytes)?);
    let gateway: Arc<str> = text(bytes)?.into();
    let key = maybe(bytes)?.map(KeyId::new);
    let (provider, model) = (text(bytes)?.into(), text(bytes)?.into());
    let task = (number(bytes)? as usize).checked_sub(1).and_then(|at| Task::ALL.get(at).copied());
    let path = text(bytes)?.into();
    let status = number(bytes)? as u16;
    let flags = number(bytes)?;
    let [success, custom_cost, authenticated, stored_key] = [0, 1, 2, 3].map(|bit| flags >> bit & 1 == 1);
    let cache = *CacheUse::ALL.get((flags >> 4) as usize)?;
    let duration_us = number(bytes)?;
    let first_byte_us = number(bytes)?.checked_sub(1);
    let usage = match number(bytes)? {
        0 => None,
        _ => Some(Usage {
            prompt_tokens: number(bytes)? as u32,
            cached_tokens: number(bytes)? as u32,
            written_tokens: number(bytes)? as u32,
            completion_tokens: number(bytes)? as u32,
            drafted_tokens: number(bytes)? as u32,
            accepted_tokens: number(bytes)? as u32,
        }),
    };
    let (cost, saved) = (Neurons::from_micro(number(bytes)?), Neurons::from_micro(number(bytes)?));
    let step = number(bytes)? as u16;
    let request_type = Cow::Owned(text(bytes)?.to_owned());
    let mut next = || Some(maybe(bytes)?.map(Text::from));
    let (request_content_type, response_content_type) = (next()?, next()?);
    let (metadata, event, user_agent) = (next()?, next()?, next()?);
    let attempts = text(bytes)?.into();
    let why = maybe(bytes)?.map(|why| Cow::Owned(why.to_owned()));
    let count = number(bytes)?;
    let findings = (0..count).map(|_| Some(text(bytes)?.into())).collect::<Option<Vec<_>>>()?;
    let mut body = || Some(Body { kept: Bytes::new(), size: number(bytes)? });
    let (asked, answered) = (body()?, body()?);
    Some(Record {
        id: Some(id),
        request,
        at,
        account,
        key,
        gateway,
        provider,
        model,
        task,
        path,
        status,
        success,
        cache,
        duration_us,
        first_byte_us,
        usage,
        cost,
        custom_cost,
        saved,
        step,
        request_type,
        request_content_type,
        response_content_type,
        metadata,
        // For spans, which are sent once and not from here.
        trace: None,
        zero_retention: false,
        event,
        user_agent,
        authenticated,
        stored_key,
        attempts,
        why,
        findings,
        asked,
        answered,
    })
}

pub(super) fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(super) fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = *take(bytes)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put(out: &mut Vec<u8>, text: &str) {
    put_number(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// Nothing is 0, a text its length and one.
fn put_maybe(out: &mut Vec<u8>, text: Option<&str>) {
    let Some(text) = text else { return out.push(0) };
    put_number(out, text.len() as u64 + 1);
    out.extend_from_slice(text.as_bytes());
}

fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let length = number(bytes)?;
    cut(bytes, length)
}

fn maybe<'a>(bytes: &mut &'a [u8]) -> Option<Option<&'a str>> {
    match number(bytes)? {
        0 => Some(None),
        length => cut(bytes, length - 1).map(Some),
    }
}

fn cut<'a>(bytes: &mut &'a [u8], length: u64) -> Option<&'a str> {
    let (text, rest) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

fn take<'a, const N: usize>(bytes: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(taken)
}
