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

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::pack::Object;
use crate::base::{Error, Millis, Result, Secret};
use crate::logs::post::{self, Trouble};
use crate::net::client::{Attempt, Client, Origin};
use crate::net::sigv4::{self, Credentials, Payload, Request, Scope};
use crate::store::snapshot;

/// Everything but what S3 signs as it is.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
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
                let (tls, authority, path) = post::divide(&endpoint)?;
                let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
                if bucket.is_empty() || !bucket.bytes().all(is_letter) || !region.bytes().all(is_letter) {
                    return Err(Error::bad_input("a bucket and a region are names of letters, digits, - . and _"));
                }
                let root = path.path().trim_end_matches('/');
                let (authority, before) = match path_style {
                    true => (authority, format!("{root}/{bucket}/")),
                    false => (format!("{bucket}.{authority}"), format!("{root}/")),
                };
                Ok(Self::S3 { origin: post::origin(tls, &authority)?, before, region, credentials })
            }
            Destination::Folder { path } => Ok(Self::Folder(path)),
            Destination::Http { url, headers } => {
                let (origin, path) = post::parse(&url)?;
                let mut map = HeaderMap::new();
                map.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
                map.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                post::add_headers(&mut map, headers.iter().map(|(name, value)| (name.as_str(), value)))?;
                Ok(Self::Http { origin, path, headers: map })
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
                post::send(client, &attempt, patience, is_passing).await.map(drop)
            }
            Self::Folder(folder) => {
                let (path, bytes) = (folder.join(&object.name), object.bytes.clone());
                let written = tokio::task::spawn_blocking(move || write(&path, &bytes)).await;
                written.map_err(Trouble::passing)?.map_err(Trouble::passing)
            }
            Self::Http { origin, path, headers } => {
                let mut headers = headers.clone();
                let name = HeaderValue::try_from(&object.name).map_err(|error| Trouble::Lasting(error.to_string()))?;
                headers.insert("x-object-name", name);
                let (origin, path, body) = (origin.clone(), path.clone(), object.bytes.clone());
                let attempt = Attempt { origin, method: Method::POST, path, headers, body, allow_private: false };
                post::send(client, &attempt, patience, is_passing).await.map(drop)
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

/// Statuses that are no last word.
fn is_passing(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS)
        || status.is_server_error()
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
        headers: &[("host", origin.authority.as_str()), ("content-type", object.media)],
        payload: Payload::Bytes(&object.bytes),
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(object.media));
    for (name, value) in sigv4::sign(credentials, Scope { region, service: "s3" }, &request, now) {
        headers.insert(name, HeaderValue::try_from(value).map_err(|error| lasting(&error))?);
    }
    let path = PathAndQuery::try_from(path).map_err(|error| lasting(&error))?;
    let (origin, body) = (origin.clone(), object.bytes.clone());
    Ok(Attempt { origin, method: Method::PUT, path, headers, body, allow_private: false })
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    snapshot::write(path, bytes, MODE)
}
