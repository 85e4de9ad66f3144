//! The one step from a notice to somebody's channel: which way, what counts as delivered, and whether it is worth another try.
//!
//! ```text
//!   Notice ──> Mailer │ Hook ──> delivered │ Failure: later, or refused and so only a few times more
//! ```
//!
//! One try. When to try again is the courier's business (`actor.rs`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use ring::hmac;
use tokio::time::timeout;

use super::failure::{Failure, cut};
use super::mail::Mailer;
use super::notice::Notice;
use super::settings::To;
use super::{slack, webhook};
use crate::base::{Error, Millis, Result, Secret};
use crate::net::client::{Attempt, Client, Origin};

/// A delivery that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of an answer that are looked at.
const MAX_ANSWER: usize = 64 << 10;
/// Letters of an answer that are shown.
const SHOWN: usize = 200;

/// A way to somebody, ready to be used.
pub(super) enum Sender {
    Mail(Mailer),
    Slack(Hook),
    Webhook(Hook, Option<hmac::Key>),
}

impl Sender {
    /// # Errors
    /// `BadInput` when an address, a certificate or a URL cannot be used; says what to write instead.
    pub(super) fn new(to: &To) -> Result<Self> {
        Ok(match to {
            To::Mail(mail) => Self::Mail(Mailer::new(mail)?),
            To::Slack(slack) => Self::Slack(Hook::new(&slack.url, slack.allow_private)?),
            To::Webhook(hook) => {
                let key = hook.secret.as_ref().map(webhook::key).transpose()?;
                Self::Webhook(Hook::new(&hook.url, hook.allow_private)?, key)
            }
        })
    }

    /// For the status.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Mail(_) => "mail",
            Self::Slack(_) => "slack",
            Self::Webhook(..) => "webhook",
        }
    }

    /// Tries once.
    pub(super) async fn send(&self, notice: &Notice, instance: &str, client: &Client) -> Result<(), Failure> {
        let delivery = async {
            match self {
                Self::Mail(mailer) => mailer.send(notice, instance).await,
                Self::Slack(hook) => hook.post(client, HeaderMap::new(), slack::body(notice, instance)).await,
                Self::Webhook(hook, key) => {
                    let body = webhook::body(notice, instance);
                    let headers = webhook::headers(notice, &body, key.as_ref(), Millis::now());
                    hook.post(client, headers, body).await
                }
            }
        };
        let late = |_| Failure::later(format!("there was no answer within {} s", PATIENCE.as_secs()));
        timeout(PATIENCE, delivery).await.map_err(late)?
    }
}

/// A URL that takes JSON documents.
pub(super) struct Hook {
    origin: Arc<Origin>,
    path: PathAndQuery,
    allow_private: bool,
}

impl Hook {
    fn new(url: &Secret<String>, allow_private: bool) -> Result<Self> {
        let wrong = |words: &str| Error::bad_input(format!("the URL {words}"));
        let uri: Uri = url.expose().parse().map_err(|_| wrong("cannot be read; write https://host/path"))?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(wrong("is not whole; write https://host/path"));
        };
        let tls = *scheme == Scheme::HTTPS;
        if !tls && *scheme != Scheme::HTTP {
            return Err(wrong("begins with neither https:// nor http://"));
        }
        if !tls && !allow_private {
            return Err(wrong("must begin with https://; http:// is for private networks: `allow_private`"));
        }
        let origin =
            Origin::new(tls, authority.as_str()).map_err(|_| wrong("holds a user; write https://host/path"))?;
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        Ok(Self { origin: Arc::new(origin), path, allow_private })
    }

    async fn post(&self, client: &Client, mut headers: HeaderMap, body: Bytes) -> Result<(), Failure> {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static("neurond"));
        let call = Attempt {
            origin: self.origin.clone(),
            method: Method::POST,
            path: self.path.clone(),
            headers,
            body,
            allow_private: self.allow_private,
        };
        let answer = client.send(&call).await.map_err(|fault| Failure::later(fault.to_string()))?;
        let (status, wait) = (answer.status.as_u16(), retry_after(&answer.headers));
        // Read to its end, or the connection could not be used again. What cannot be read is not needed.
        let said = answer.body.collect(MAX_ANSWER).await.unwrap_or_default();
        if (200..300).contains(&status) {
            return Ok(());
        }
        let why = format!("it answered {status}{}", shown(&said));
        Err(Failure { why, is_refusal: is_refusal(status), wait })
    }
}

/// Whether a status is about this document. What is about the credentials, the address or the moment may be mended.
fn is_refusal(status: u16) -> bool {
    (400..500).contains(&status) && !matches!(status, 401 | 403 | 404 | 407 | 408 | 410 | 425 | 429)
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    const NAME: HeaderName = header::RETRY_AFTER;
    headers.get(NAME)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The beginning of an answer, on one line.
fn shown(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match cut(&text, SHOWN) {
        "" => String::new(),
        text => format!(": {}", text.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_cannot_be_meant_is_refused_without_being_shown() {
        let check = |url: &str, allow_private: bool, words: Option<&str>| {
            let outcome = Hook::new(&Secret::new(url.to_owned()), allow_private).map(|_| ());
            let said = outcome.map_err(|error| error.message().to_owned()).err();
            assert_eq!(said.is_some(), words.is_some(), "{url}: {said:?}");
            if let (Some(said), Some(words)) = (said, words) {
                assert!(said.contains(words) && !said.contains("s3cret"), "{url}: {said}");
            }
        };
        check("https://hooks.example.com/T0/s3cret", false, None);
        check("https://hooks.example.com", false, None);
        check("http://127.0.0.1:9/s3cret", true, None);
        check("http://hooks.example.com/s3cret", false, Some("must begin with https://"));
        check("ftp://hooks.example.com/s3cret", true, Some("neither"));
        check("/only/s3cret", true, Some("not whole"));
        check("https://user:s3cret@host/", false, Some("holds a user"));
        check("no url s3cret", false, Some("cannot be read"));
    }

    #[test]
    fn only_what_is_about_the_document_is_a_refusal() {
        let refused: Vec<u16> = [301, 400, 401, 403, 404, 408, 410, 413, 415, 422, 425, 429, 500, 503]
            .into_iter()
            .filter(|s| is_refusal(*s))
            .collect();
        assert_eq!(refused, [400, 413, 415, 422]);
    }

    #[test]
    fn an_answer_is_shown_short_and_on_one_line() {
        assert_eq!(shown(b""), "");
        assert_eq!(shown(b"invalid\r\n  payload\x07"), ": invalid payload\\u{7}");
        assert_eq!(shown("ä".repeat(500).as_bytes()).chars().count(), 2 + SHOWN);
    }
}
