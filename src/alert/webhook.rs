//! A notice as a JSON document, and the signature that shows whose it is ([`super::Webhook::secret`] says how to verify it).
//!
//! ```text
//!   { id, alert, event, rule, severity, measure, value, threshold, since, … , title, text }
//!   X-Neurond-Delivery: id     X-Neurond-Timestamp: seconds     X-Neurond-Signature: sha256=hex(hmac(timestamp . body))
//! ```

use std::fmt::Write;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use ring::hmac;
use serde_json::json;

use super::notice::Notice;
use crate::base::{Error, Millis, Result, Secret};

const DELIVERY: HeaderName = HeaderName::from_static("x-neurond-delivery");
const TIMESTAMP: HeaderName = HeaderName::from_static("x-neurond-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("x-neurond-signature");

/// What calls are signed with.
///
/// # Errors
/// `BadInput` for an empty secret: everybody would know it.
pub(super) fn key(secret: &Secret<String>) -> Result<hmac::Key> {
    if secret.expose().is_empty() {
        return Err(Error::bad_input("the secret is empty; write a long random one, or leave it out"));
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes()))
}

/// The document: the same whenever the notice is sent.
pub(super) fn body(notice: &Notice, instance: &str) -> Bytes {
    let document = json!({
        "id": notice.id,
        "alert": notice.alert,
        "event": notice.event.as_str(),
        "number": notice.number,
        "instance": instance,
        "rule": notice.rule,
        "severity": notice.severity.as_str(),
        "measure": notice.measure,
        "filter": notice.filter,
        "of": notice.of,
        "unit": notice.unit.as_str(),
        "value": notice.value,
        "peak": notice.peak,
        "threshold": notice.threshold,
        "resolve_below": notice.resolve_below,
        "since": notice.since.0,
        "at": notice.at.0,
        "title": notice.title(),
        "text": notice.text(instance),
        "next": notice.next,
    });
    Bytes::from(document.to_string())
}

/// Its headers, for a call at this moment.
pub(super) fn headers(notice: &Notice, body: &[u8], key: Option<&hmac::Key>, now: Millis) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: &str| {
        // Ids, numbers and hex digits: there is nothing in them that a header could not hold.
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    let timestamp = now.seconds().to_string();
    put(DELIVERY, &notice.id);
    put(TIMESTAMP, &timestamp);
    if let Some(key) = key {
        let mut context = hmac::Context::with_key(key);
        context.update(timestamp.as_bytes());
        context.update(b".");
        context.update(body);
        let mut signature = "sha256=".to_owned();
        for byte in context.sign().as_ref() {
            // A text takes whatever is written to it.
            let _ = write!(signature, "{byte:02x}");
        }
        put(SIGNATURE, &signature);
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_that_of_any_other_implementation() {
        // printf '1750000000.{"a":1}' | openssl dgst -sha256 -hmac top-secret
        let expected = "sha256=83a9f8b2c21dbb58c9961b5855ed50572d0ddee92b3c387964db367a60076c7e";
        let notice = Notice::test(Millis(0));
        let key = key(&Secret::new("top-secret".into())).unwrap();
        let now = Millis(1_750_000_000_999);
        let signed = headers(&notice, br#"{"a":1}"#, Some(&key), now);
        assert_eq!(signed[SIGNATURE], expected);
        assert_eq!(
            (&signed[TIMESTAMP], &signed[DELIVERY]),
            (&"1750000000".parse().unwrap(), &notice.id.parse().unwrap())
        );
        assert_eq!(headers(&notice, b"{}", None, now).get(SIGNATURE), None);
        assert!(super::key(&Secret::new(String::new())).is_err());
    }

    #[test]
    fn the_document_is_the_same_each_time_it_is_sent() {
        let notice = Notice::test(Millis(1_750_000_000_000));
        assert_eq!(body(&notice, "here"), body(&notice.clone(), "here"));
        let document: serde_json::Value = serde_json::from_slice(&body(&notice, "here")).unwrap();
        assert_eq!((&document["event"], &document["at"]), (&json!("test"), &json!(1_750_000_000_000_u64)));
    }
}
