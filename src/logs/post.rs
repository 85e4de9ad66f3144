//! How what is told of calls is sent to somebody's server: what one answers, what that means, and how long to wait before the next try.
//!
//! For what ships records and what sends spans. Their threads step back behind those that serve calls.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use jiff::fmt::rfc2822;
use tokio::time::timeout;

use crate::base::{Error, Millis, Result, Secret};
use crate::net::client::{Attempt, Client, Fault, Origin};

/// Bytes of an answer that are read, so that the connection can be used again.
const ANSWER: usize = 64 << 10;
/// Letters of an answer that are told.
const TOLD: usize = 300;
/// A server may ask to wait so long at most.
const MAX_ASKED: Duration = Duration::from_secs(600);
/// The longest wait, in first ones.
const MAX_WAIT: u32 = 60;
/// The wait where somebody must see to it, in first ones.
const HELD_WAIT: u32 = 300;
/// How nice the threads are to others, of 19.
pub(super) const NICE: i32 = 15;

/// Why something did not arrive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    /// It may arrive later, not before a while where that was asked for.
    Passing(String, Option<Duration>),
    /// Somebody must see to it.
    Lasting(String),
}

impl Trouble {
    /// It may arrive later.
    pub(super) fn passing(why: impl ToString) -> Self {
        Self::Passing(why.to_string(), None)
    }

    /// How long to wait after so many tries; `random` is any number.
    pub(super) fn wait(&self, tries: u32, first: Duration, random: u64) -> Duration {
        let most = match self {
            Self::Lasting(_) => first * HELD_WAIT,
            Self::Passing(..) => first * (1 << tries.saturating_sub(1).min(16)).min(MAX_WAIT),
        };
        // Between a half and all of it: many daemons that failed together do not come back together.
        let half = most / 2;
        let drawn = half + Duration::from_micros(random % (half.as_micros() as u64 + 1));
        match self {
            Self::Passing(_, Some(asked)) => drawn.max(*asked),
            _ => drawn,
        }
    }
}

/// An address taken apart: the server, and what it is asked for.
///
/// # Errors
/// `BadInput` when it is none.
pub(super) fn parse(url: &str) -> Result<(Arc<Origin>, PathAndQuery)> {
    let (tls, authority, path) = divide(url)?;
    Ok((origin(tls, &authority)?, path))
}

/// The same, with the host as text.
///
/// # Errors
/// `BadInput` when it is no address.
pub(super) fn divide(url: &str) -> Result<(bool, String, PathAndQuery)> {
    let wrong = || Error::bad_input(format!("{url:?} is no address: write https://host/path"));
    let parts = url.parse::<Uri>().map_err(|_| wrong())?.into_parts();
    let tls = match parts.scheme.as_ref().map(Scheme::as_str) {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let authority = parts.authority.ok_or_else(wrong)?.to_string();
    Ok((tls, authority, parts.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"))))
}

/// A server, by its host.
///
/// # Errors
/// `BadInput` when that is none.
pub(super) fn origin(tls: bool, authority: &str) -> Result<Arc<Origin>> {
    Origin::new(tls, authority).map(Arc::new).map_err(|fault| Error::bad_input(fault.to_string()))
}

/// Puts headers that an operator wrote beside those that are there.
///
/// # Errors
/// `BadInput` names the header that cannot be one; never its value.
pub(super) fn add_headers<'a>(
    map: &mut HeaderMap,
    headers: impl IntoIterator<Item = (&'a str, &'a Secret<String>)>,
) -> Result<()> {
    for (name, value) in headers {
        let parsed = (HeaderName::try_from(name), HeaderValue::try_from(value.expose()));
        let (Ok(known), Ok(mut value)) = parsed else {
            return Err(Error::bad_input(format!("the header {name:?} cannot be sent: correct its name or value")));
        };
        value.set_sensitive(true);
        map.insert(known, value);
    }
    Ok(())
}

/// Sends, and returns what a server says that has taken it. `is_passing` tells which statuses are no last word.
///
/// # Errors
/// See [`Trouble`].
pub(super) async fn send(
    client: &Client,
    attempt: &Attempt,
    patience: Duration,
    is_passing: fn(StatusCode) -> bool,
) -> Result<Bytes, Trouble> {
    let exchange = async {
        let answer = client.send(attempt).await.map_err(|fault| match fault {
            // We would not, and will not until somebody allows it.
            Fault::Refused(_) => Trouble::Lasting(fault.to_string()),
            _ => Trouble::passing(fault),
        })?;
        let asked = answer.headers.get(RETRY_AFTER).and_then(|value| asked(value.to_str().ok()?, Millis::now()));
        let status = answer.status;
        // Read to its end, or the connection could not be used again.
        let said = answer.body.collect(ANSWER).await.unwrap_or_default();
        if status.is_success() {
            return Ok(said);
        }
        let words = String::from_utf8_lossy(&said).split_whitespace().collect::<Vec<_>>().join(" ");
        let words: String = words.chars().filter(|letter| !letter.is_control()).take(TOLD).collect();
        let why = format!("it answers {status}: {words}");
        Err(if is_passing(status) { Trouble::Passing(why, asked) } else { Trouble::Lasting(why) })
    };
    let late = |_| Trouble::passing(format_args!("no answer within {} s", patience.as_secs_f32()));
    timeout(patience, exchange).await.map_err(late)?
}

/// How long a `Retry-After` asks to wait: seconds, or until a date.
fn asked(text: &str, now: Millis) -> Option<Duration> {
    let text = text.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let until = rfc2822::parse(text).ok()?.timestamp().as_millisecond();
            Duration::from_millis(u64::try_from(until).ok()?.saturating_sub(now.0))
        }
    };
    Some(wait.min(MAX_ASKED))
}

/// Calls come first: where they want the processor, this thread has little of it.
pub(super) fn step_back() {
    // SAFETY: it takes numbers only. On Linux 0 is the thread that asks.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_are_drawn_from_their_upper_half() {
        let second = Duration::from_secs(1);
        let check = |trouble: &Trouble, tries: u32, expected: [u64; 2]| {
            let drawn = (0..200u64).map(|draw| {
                let random = draw.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                trouble.wait(tries, second, random).as_millis() as u64
            });
            let (least, most) = drawn.fold((u64::MAX, 0), |(least, most), ms| (least.min(ms), most.max(ms)));
            let [from, to] = expected;
            assert!(
                from <= least && most <= to && most - least >= (to - from) / 2,
                "{trouble:?} {tries}: {least}..{most}"
            );
        };
        let passing = Trouble::Passing(String::new(), None);
        check(&passing, 1, [500, 1000]);
        check(&passing, 2, [1000, 2000]);
        check(&passing, 6, [16_000, 32_000]);
        check(&passing, 7, [30_000, 60_000]);
        check(&passing, 4_000_000_000, [30_000, 60_000]);
        check(&Trouble::Lasting(String::new()), 1, [150_000, 300_000]);
        check(&Trouble::Passing(String::new(), Some(second * 90)), 1, [90_000, 90_000]);
    }

    #[test]
    fn a_server_asks_to_wait_in_seconds_or_until_a_date_and_not_for_ever() {
        let now = Millis(784_111_777_000);
        let check = |text: &str, seconds: Option<u64>| {
            assert_eq!(asked(text, now), seconds.map(Duration::from_secs), "{text:?}");
        };
        check(" 12 ", Some(12));
        check("0", Some(0));
        check("86400", Some(600));
        check("Sun, 06 Nov 1994 08:50:07 GMT", Some(30));
        check("Sun, 06 Nov 1994 08:00:00 GMT", Some(0));
        check("soon", None);
        check("-1", None);
    }
}
