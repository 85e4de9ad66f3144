//! The headers of an answer on its way: a short list in the order they came in. There are a dozen, so looking through them
//! takes less than a map of them takes to be made.

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use bytes::BytesMut;

/// Names of the gateway's own, made once.
pub static CACHE_STATUS: HeaderName = HeaderName::from_static("cf-aig-cache-status");
/// See [`CACHE_STATUS`].
pub static EVENT_ID: HeaderName = HeaderName::from_static("cf-aig-event-id");
/// See [`CACHE_STATUS`].
pub static LOG_ID: HeaderName = HeaderName::from_static("cf-aig-log-id");
/// See [`CACHE_STATUS`].
pub static REQUEST_ID: HeaderName = HeaderName::from_static("cf-aig-request-id");
/// See [`CACHE_STATUS`].
pub static DLP: HeaderName = HeaderName::from_static("cf-aig-dlp");
/// See [`CACHE_STATUS`].
pub static STEP: HeaderName = HeaderName::from_static("cf-aig-step");
/// See [`CACHE_STATUS`].
pub static PROVIDER: HeaderName = HeaderName::from_static("cf-aig-provider");
/// See [`CACHE_STATUS`].
pub static MODEL: HeaderName = HeaderName::from_static("cf-aig-model");
/// See [`CACHE_STATUS`].
pub static ATTEMPTS: HeaderName = HeaderName::from_static("cf-aig-attempts");
/// See [`CACHE_STATUS`].
pub static ROUTING_REASON: HeaderName = HeaderName::from_static("cf-aig-routing-reason");

/// Of limits, as the drafts of RateLimit name them.
pub static LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
/// See [`LIMIT`].
pub static LIMIT_REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
/// See [`LIMIT`].
pub static LIMIT_RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

/// Values one behind the other in one block, whose parts they are: many small ones cost one allocation.
pub struct Values(BytesMut);

impl Values {
    /// With room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self(BytesMut::with_capacity(bytes))
    }

    /// A text as a value; `None` where it is none.
    pub fn make(&mut self, text: &str) -> Option<HeaderValue> {
        self.0.extend_from_slice(text.as_bytes());
        HeaderValue::from_maybe_shared(self.0.split().freeze()).ok()
    }
}

/// A name as a header's; those that every kept answer has are not read again.
pub fn name(text: &str) -> Option<HeaderName> {
    let known = [&STEP, &PROVIDER, &MODEL, &ATTEMPTS].into_iter().find(|known| known.as_str() == text);
    known.cloned().or_else(|| HeaderName::from_bytes(text.as_bytes()).ok())
}

/// See the top of this file.
#[derive(Default)]
pub struct Headers(Vec<(HeaderName, HeaderValue)>);

impl Headers {
    /// None yet, with room for so many.
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// The same with room for so many more.
    pub fn copied(&self, more: usize) -> Self {
        let mut copy = Self::with_capacity(self.0.len() + more);
        copy.0.extend_from_slice(&self.0);
        copy
    }

    /// The first of this name, in small letters.
    pub fn get(&self, name: &str) -> Option<&HeaderValue> {
        self.0.iter().find(|(known, _)| known.as_str() == name).map(|(_, value)| value)
    }

    /// The same as text; empty where there is none.
    pub fn text(&self, name: &str) -> &str {
        self.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// One more, whether or not there are others of its name.
    pub fn append(&mut self, name: HeaderName, value: HeaderValue) {
        self.0.push((name, value));
    }

    /// This one in place of all of its name.
    pub fn insert(&mut self, name: &HeaderName, value: HeaderValue) {
        self.0.retain(|(known, _)| known != name);
        self.append(name.clone(), value);
    }

    /// Takes out all whose name is one of these: what this gateway says of a call counts, where an upstream that is a gateway as well has
    /// said it too.
    pub fn make_way(&mut self, is_said: impl Fn(&str) -> bool) {
        self.0.retain(|(name, _)| !is_said(name.as_str()));
    }

    /// Takes out all of this name; returns the first.
    pub fn remove(&mut self, name: &str) -> Option<HeaderValue> {
        let mut found = None;
        self.0.retain_mut(|(known, value)| {
            let keep = known.as_str() != name;
            if !keep && found.is_none() {
                found = Some(value.clone());
            }
            keep
        });
        found
    }

    /// Each in turn.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HeaderValue)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl From<&HeaderMap> for Headers {
    fn from(map: &HeaderMap) -> Self {
        Self(map.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }
}

impl IntoIterator for Headers {
    type Item = (HeaderName, HeaderValue);
    type IntoIter = std::vec::IntoIter<(HeaderName, HeaderValue)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inserted_stands_alone_and_what_is_appended_beside_others() {
        let mut headers = Headers::with_capacity(2);
        for value in ["a", "b"] {
            headers.append(HeaderName::from_static("x-many"), HeaderValue::from_static(value));
        }
        assert_eq!((headers.text("x-many"), headers.iter().count()), ("a", 2));
        headers.insert(&HeaderName::from_static("x-many"), HeaderValue::from_static("c"));
        assert_eq!((headers.text("x-many"), headers.iter().count()), ("c", 1));
        assert_eq!(headers.remove("x-many"), Some(HeaderValue::from_static("c")));
        assert_eq!(headers.remove("x-many"), None);
        assert_eq!(headers.text("x-many"), "");
    }

    #[test]
    fn what_another_gateway_says_makes_way_for_what_this_one_does() {
        let mut headers = Headers::default();
        for name in [&STEP, &CACHE_STATUS, &LOG_ID, &CACHE_STATUS, &LIMIT] {
            headers.append(name.clone(), HeaderValue::from_static("theirs"));
        }
        headers.make_way(|name| name == "cf-aig-cache-status" || name.starts_with("ratelimit-"));
        let names: Vec<&str> = headers.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["cf-aig-step", "cf-aig-log-id"]);
    }
}
