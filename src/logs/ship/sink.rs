//! Where objects go: a bucket, a folder, or a server that takes them by POST.
//!
//! ```text
//! Object ─┬─ PUT https://host/bucket/name, signed      S3 and what speaks like it
//!         ├─ folder/name: written beside, renamed      a disk
//!         └─ POST url, the name in a header            a collector
//! ```
//!
//! An object that was put may be put again: it takes the place of the first, or its name tells. How often it is tried, and when, is for
//! others to know.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::time::timeout;

use super::pack::Object;
use crate::base::{Error, Millis, Result, Secret};
use crate::net::client::{Attempt, Client, Origin};
use crate::net::sigv4::{self, Credentials, Payload, Request, Scope};
use crate::store::snapshot;

/// Everything but what S3 signs as it is.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// Bytes of an answer that are read, so that the connection can be used again.
const ANSWER: usize = 64 << 10;
/// Letters of an answer that are told.
const TOLD: usize = 300;
/// A destination may ask to wait so long at most.
const MAX_ASKED: Duration = Duration::from_secs(600);
/// Whoever collects from a folder may be in its group.
const MODE: u32 = 0o640;

/// Where a job's objects go.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A bucket of S3, or of what speaks like it.
    S3 {
        /// `https://s3.eu-central-1.amazonaws.com`, without the bucket.
        endpoint: String,
        /// As it is signed for; `auto` for some.
        region: String,
        /// Its name.
        bucket: String,
        /// Who writes.
        credentials: Credentials,
        /// Whether the bucket is part of the path (`https://host/bucket/…`), as small servers want it, or of the host's name.
        path_style: bool,
    },
    /// A folder, which is made where it is missing.
    Folder {
        /// Where.
        path: PathBuf,
    },
    /// A server that takes a POST of compressed lines and answers with a status of 200 to 299 when it has them for good. The header
    /// `x-object-name` tells repeats.
    Http {
        /// Where.
        url: String,
        /// Sent along, such as `authorization`.
        headers: Vec<(String, Secret<String>)>,
    },
}

/// Why an object did not arrive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    /// It may arrive later, not before a while where that was asked for.
    Passing(String, Option<Duration>),
    /// Somebody must see to it.
    Lasting(String),
}

/// A destination made ready.
pub(super) enum Sink {
    S3 { origin: Arc<Origin>, before: String, region: String, credentials: Credentials },
    Folder(PathBuf),
    Http { origin: Arc<Origin>, path: PathAndQuery, headers: HeaderMap },
}

impl Sink {
    /// Makes a destination ready.
    ///
    /// # Errors
    /// `BadInput` when it cannot be one.
    pub(super) fn new(destination: Destination) -> Result<Self> {
        match destination {
            Destination::S3 { endpoint, region, bucket, credentials, path_style } => {
                let (tls, authority, path) = parse(&endpoint)?;
                let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
                if bucket.is_empty() || !bucket.bytes().all(is_letter) || !region.bytes().all(is_letter) {
                    return Err(Error::bad_input("a bucket and a region are names of letters, digits, - . and _"));
                }
                let root = path.path().trim_end_matches('/');
                let (authority, before) = match path_style {
                    true => (authority, format!("{root}/{bucket}/")),
                    false => (format!("{bucket}.{authority}"), format!("{root}/")),
                };
                Ok(Self::S3 { origin: origin(tls, &authority)?, before, region, credentials })
            }
            Destination::Folder { path } => Ok(Self::Folder(path)),
            Destination::Http { url, headers } => {
                let (tls, authority, path) = parse(&url)?;
                let mut map = HeaderMap::new();
                map.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
                map.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                for (name, value) in headers {
                    let parsed = (HeaderName::try_from(&name), HeaderValue::try_from(value.expose()));
                    let (Ok(known), Ok(mut value)) = parsed else {
                        return Err(Error::bad_input(format!(
                            "the header {name:?} cannot be sent: correct its name or value"
                        )));
                    };
                    value.set_sensitive(true);
                    map.insert(known, value);
                }
                Ok(Self::Http { origin: origin(tls, &authority)?, path, headers: map })
            }
        }
    }

    /// Puts an object there; it is there for good when this returns.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub(super) async fn put(&self, object: &Object, client: &Client, patience: Duration) -> Result<(), Trouble> {
        match self {
            Self::S3 { origin, before, region, credentials } => {
                let attempt = put(origin, before, region, credentials, object, Millis::now())?;
                send(client, &attempt, patience).await
            }
            Self::Folder(folder) => {
                let (path, bytes) = (folder.join(&object.name), object.bytes.clone());
                let written = tokio::task::spawn_blocking(move || write(&path, &bytes)).await;
                written.map_err(|error| passing(error.to_string()))?.map_err(|error| passing(error.to_string()))
            }
            Self::Http { origin, path, headers } => {
                let mut headers = headers.clone();
                let name = HeaderValue::try_from(&object.name).map_err(|error| Trouble::Lasting(error.to_string()))?;
                headers.insert("x-object-name", name);
                let (origin, path, body) = (origin.clone(), path.clone(), object.bytes.clone());
                let attempt = Attempt { origin, method: Method::POST, path, headers, body, allow_private: false };
                send(client, &attempt, patience).await
            }
        }
    }
}

/// Whether a prefix of objects' names can be one: no empty, hidden or climbing part.
pub(super) fn is_prefix(prefix: &str) -> bool {
    let is_clean =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(|byte| byte.is_ascii_graphic());
    prefix.is_empty() || prefix.split('/').all(is_clean)
}

fn passing(why: String) -> Trouble {
    Trouble::Passing(why, None)
}

fn parse(url: &str) -> Result<(bool, String, PathAndQuery)> {
    let wrong = || Error::bad_input(format!("{url:?} is no address: write https://host/path"));
    let parts = url.parse::<Uri>().map_err(|_| wrong())?.into_parts();
    let tls = match parts.scheme.as_ref().map(http::uri::Scheme::as_str) {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let authority = parts.authority.ok_or_else(wrong)?.to_string();
    Ok((tls, authority, parts.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"))))
}

fn origin(tls: bool, authority: &str) -> Result<Arc<Origin>> {
    Origin::new(tls, authority).map(Arc::new).map_err(|fault| Error::bad_input(fault.to_string()))
}

fn put(
    origin: &Arc<Origin>,
    before: &str,
    region: &str,
    credentials: &Credentials,
    object: &Object,
    now: Millis,
) -> Result<Attempt, Trouble> {
    let lasting = |error: &dyn std::fmt::Display| Trouble::Lasting(error.to_string());
    let path = format!("{before}{}", utf8_percent_encode(&object.name, RESERVED));
    let request = Request {
        method: "PUT",
        path: &path,
        query: "",
        headers: &[("host", origin.authority.as_str()), ("content-type", "application/gzip")],
        payload: Payload::Bytes(&object.bytes),
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/gzip"));
    for (name, value) in sigv4::sign(credentials, Scope { region, service: "s3" }, &request, now) {
        headers.insert(name, HeaderValue::try_from(value).map_err(|error| lasting(&error))?);
    }
    let path = PathAndQuery::try_from(path).map_err(|error| lasting(&error))?;
    let (origin, body) = (origin.clone(), object.bytes.clone());
    Ok(Attempt { origin, method: Method::PUT, path, headers, body, allow_private: false })
}

async fn send(client: &Client, attempt: &Attempt, patience: Duration) -> Result<(), Trouble> {
    let exchange = async {
        let answer = client.send(attempt).await.map_err(|fault| passing(fault.to_string()))?;
        let asked = answer.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let asked = asked.map(|seconds| Duration::from_secs(seconds).min(MAX_ASKED));
        let status = answer.status;
        // Read to its end, or the connection could not be used again.
        let said = answer.body.collect(ANSWER).await.unwrap_or_default();
        judge(status, asked, &said)
    };
    let late = || passing(format!("no answer within {} s", patience.as_secs_f32()));
    timeout(patience, exchange).await.map_err(|_| late())?
}

fn judge(status: StatusCode, asked: Option<Duration>, said: &[u8]) -> Result<(), Trouble> {
    if status.is_success() {
        return Ok(());
    }
    let said: String = String::from_utf8_lossy(said).split_whitespace().collect::<Vec<_>>().join(" ");
    let said: String = said.chars().filter(|letter| !letter.is_control()).take(TOLD).collect();
    let why = format!("it answers {status}: {said}");
    match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            Err(Trouble::Passing(why, asked))
        }
        status if status.is_server_error() => Err(Trouble::Passing(why, asked)),
        _ => Err(Trouble::Lasting(why)),
    }
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    snapshot::write(path, bytes, MODE)
}
