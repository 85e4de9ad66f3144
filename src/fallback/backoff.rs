//! Whether to try a target again, and when.
//!
//!     class, tries so far, Retry-After, time left --next--> Retry { after_ms } | FailOver(why)
//!
//! Delays as the contract has them: constant d, linear d·n, exponential d·2^(n-1) with full jitter. A provider's own word wins over
//! them, up to a bound. `Budget` keeps retries a small part of a provider's traffic, so that an outage is not doubled. Randomness and time are
//! passed in.

use jiff::Timestamp;

use super::class::Class;
use super::recent::Recent;
use crate::base::Millis;

/// Tries of one target at most.
const MAX_ATTEMPTS: u8 = 5;
/// Milliseconds of a configured delay at most.
const MAX_BASE_MS: u64 = 5000;
/// Milliseconds that a growing delay ends at.
const MAX_DELAY_MS: u64 = 30_000;
/// Milliseconds that a provider may ask us to wait at most.
const MAX_ASKED_MS: u64 = 60_000;

/// How delays grow from try to try.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Growth {
    /// Always the same.
    Constant,
    /// By the same amount.
    Linear,
    /// Doubled, and drawn from between none and all of it.
    #[default]
    Exponential,
}

impl Growth {
    /// The contract's names: `constant`, `linear`, `exponential`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "constant" => Some(Self::Constant),
            "linear" => Some(Self::Linear),
            "exponential" => Some(Self::Exponential),
            _ => None,
        }
    }
}

/// How often a target is tried, and how long is waited in between.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backoff {
    attempts: u8,
    delay_ms: u64,
    growth: Growth,
}

/// What to do after a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The same target once more.
    Retry {
        /// Milliseconds from now.
        after_ms: u64,
    },
    /// The next target, if there is one.
    FailOver(Why),
}

/// Why a target is not tried again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It would fail again.
    Hopeless,
    /// It was tried as often as it may be.
    Tried,
    /// The wait is longer than the time left.
    TooLate,
}

impl Backoff {
    /// Of `attempts` tries (1 to 5) with `delay_ms` (up to 5000) between the first two. Values beyond are cut: a header never fails a call.
    pub fn new(attempts: u64, delay_ms: u64, growth: Growth) -> Self {
        let attempts = attempts.clamp(1, u64::from(MAX_ATTEMPTS)) as u8;
        Self { attempts, delay_ms: delay_ms.min(MAX_BASE_MS), growth }
    }

    /// Tries in all.
    pub fn attempts(&self) -> u8 {
        self.attempts
    }

    /// Milliseconds to wait after try `n` (1, 2, …) failed; `random` is any number.
    pub fn delay_ms(&self, n: u8, random: u64) -> u64 {
        let n = n.max(1);
        match self.growth {
            Growth::Constant => self.delay_ms.min(MAX_DELAY_MS),
            Growth::Linear => (self.delay_ms * u64::from(n)).min(MAX_DELAY_MS),
            Growth::Exponential => {
                let most = (self.delay_ms << (n - 1).min(16)).min(MAX_DELAY_MS);
                random % (most + 1)
            }
        }
    }

    /// What follows when try `n` (1, 2, …) failed. `asked_ms` is what the provider asked us to wait, `left_ms` what is left of the call's time.
    pub fn next(&self, n: u8, class: Class, asked_ms: Option<u64>, left_ms: Option<u64>, random: u64) -> Next {
        if !class.worth_retry() {
            return Next::FailOver(Why::Hopeless);
        }
        if n >= self.attempts {
            return Next::FailOver(Why::Tried);
        }
        let after_ms = asked_ms.map_or_else(|| self.delay_ms(n, random), |asked| asked.min(MAX_ASKED_MS));
        // With nothing left behind the wait, the try would have no time of its own.
        if left_ms.is_some_and(|left| after_ms >= left) {
            return Next::FailOver(Why::TooLate);
        }
        Next::Retry { after_ms }
    }
}

/// How long a provider asks us to wait, in milliseconds: `retry-after-ms`, `retry-after` (seconds or a date), or when its limits are reset
/// (`x-ratelimit-reset…`, `anthropic-ratelimit-…-reset`: seconds from now or since 1970, `6m0s`, or a time). Of several limits the last to be reset counts, but
/// not one of which something remains. `header` looks a header up by its name in lower case.
pub fn retry_after_ms<'h>(header: impl Fn(&str) -> Option<&'h str>, now: Millis) -> Option<u64> {
    let number = |name: &str| header(name)?.trim().parse::<f64>().ok().filter(|number| *number >= 0.0);
    if let Some(ms) = number("retry-after-ms") {
        return Some(ms as u64);
    }
    if let Some(seconds) = number("retry-after") {
        return Some((seconds * 1000.0) as u64);
    }
    if let Some(date) = header("retry-after").and_then(|date| http_date(date.trim())) {
        return Some(date.saturating_sub(now.0));
    }
    let limits = [
        ("x-ratelimit-reset", "x-ratelimit-remaining"),
        ("x-ratelimit-reset-requests", "x-ratelimit-remaining-requests"),
        ("x-ratelimit-reset-tokens", "x-ratelimit-remaining-tokens"),
        ("anthropic-ratelimit-requests-reset", "anthropic-ratelimit-requests-remaining"),
        ("anthropic-ratelimit-tokens-reset", "anthropic-ratelimit-tokens-remaining"),
        ("anthropic-ratelimit-input-tokens-reset", "anthropic-ratelimit-input-tokens-remaining"),
        ("anthropic-ratelimit-output-tokens-reset", "anthropic-ratelimit-output-tokens-remaining"),
    ];
    let is_used_up = |remaining: &str| number(remaining).is_none_or(|remaining| remaining < 1.0);
    let resets = limits.iter().filter(|(_, remaining)| is_used_up(remaining));
    resets.filter_map(|(reset, _)| reset_ms(header(reset)?.trim(), now)).max()
}

/// When a limit is reset, in milliseconds from now.
fn reset_ms(written: &str, now: Millis) -> Option<u64> {
    if let Ok(number) = written.parse::<f64>() {
        return match number {
            // Nobody waits for thirty years: large numbers are times.
            ms if ms >= 1e11 => Some((ms as u64).saturating_sub(now.0)),
            seconds if seconds >= 1e9 => Some(((seconds * 1000.0) as u64).saturating_sub(now.0)),
            seconds if seconds >= 0.0 => Some((seconds * 1000.0) as u64),
            _ => None,
        };
    }
    if let Some(ms) = duration_ms(written) {
        return Some(ms);
    }
    let time: Timestamp = written.parse().ok()?;
    Some(u64::try_from(time.as_millisecond()).ok()?.saturating_sub(now.0))
}

/// `20ms`, `1s`, `6m0s`, `1h2m3.5s`, `1d`.
fn duration_ms(written: &str) -> Option<u64> {
    let mut rest = written;
    let mut sum = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
        sum += number
            * match &rest[..letters] {
                "ms" => 1.0,
                "s" => 1000.0,
                "m" => 60_000.0,
                "h" => 3_600_000.0,
                "d" => 86_400_000.0,
                _ => return None,
            };
        rest = &rest[letters..];
    }
    (!written.is_empty()).then_some(sum as u64)
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, in milliseconds since 1970.
fn http_date(written: &str) -> Option<u64> {
    let parser = jiff::fmt::rfc2822::DateTimeParser::new().relaxed_weekday(true);
    u64::try_from(parser.parse_timestamp(written).ok()?.as_millisecond()).ok()
}

/// Keeps a provider's retries to a share of its recent calls.
#[derive(Debug, Default)]
pub(super) struct Budget {
    calls: Recent,
    retries: Recent,
}

impl Budget {
    /// Of a hundred recent calls this many may be retries.
    const SHARE_PERCENT: u32 = 20;
    /// Retries that are allowed in any case, or a quiet provider's first failure would be final.
    const FLOOR: u32 = 5;

    /// A call was made.
    pub(super) fn call(&self, now: Millis) {
        self.calls.add(now);
    }

    /// Takes a retry, if there is one left.
    pub(super) fn retry(&self, now: Millis) -> bool {
        // Taken first and given back, so that threads never take more than there are.
        self.retries.add(now);
        let allowed = Self::FLOOR.saturating_add(self.calls.sum(now).saturating_mul(Self::SHARE_PERCENT) / 100);
        if self.retries.sum(now) <= allowed {
            return true;
        }
        self.retries.take_back(now);
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Millis = Millis(1_750_000_000_000);

    #[test]
    fn delays_grow_as_the_contract_says() {
        let check = |growth: Growth, delay: u64, expected: [u64; 4]| {
            let backoff = Backoff::new(5, delay, growth);
            // The largest draw of each range.
            let most = |n: u8| {
                let draws = (0..=40_000).map(|random| backoff.delay_ms(n, random));
                draws.max().unwrap()
            };
            assert_eq!([most(1), most(2), most(3), most(4)], expected, "{growth:?} {delay}");
        };
        check(Growth::Constant, 500, [500, 500, 500, 500]);
        check(Growth::Linear, 500, [500, 1000, 1500, 2000]);
        check(Growth::Exponential, 500, [500, 1000, 2000, 4000]);
        check(Growth::Exponential, 5000, [5000, 10_000, 20_000, 30_000]);
        check(Growth::Exponential, 0, [0, 0, 0, 0]);
        check(Growth::Constant, 90_000, [5000, 5000, 5000, 5000]);
    }

    #[test]
    fn only_exponential_delays_are_drawn_and_from_their_whole_range() {
        let constant = Backoff::new(5, 100, Growth::Constant);
        assert!((0..500).all(|random| constant.delay_ms(2, random) == 100));
        let exponential = Backoff::new(5, 100, Growth::Exponential);
        let drawn: std::collections::BTreeSet<u64> = (0..1000).map(|random| exponential.delay_ms(2, random)).collect();
        assert_eq!(drawn, (0..=200).collect());
    }

    #[test]
    fn a_failure_leads_to_a_retry_or_to_the_next_target() {
        let backoff = Backoff::new(3, 400, Growth::Linear);
        let check = |n: u8, class: Class, asked: Option<u64>, left: Option<u64>, expected: Next| {
            assert_eq!(backoff.next(n, class, asked, left, 0), expected, "{n} {class:?} {asked:?} {left:?}");
        };
        check(1, Class::Overload, None, None, Next::Retry { after_ms: 400 });
        check(2, Class::Transport, None, Some(10_000), Next::Retry { after_ms: 800 });
        check(3, Class::Timeout, None, None, Next::FailOver(Why::Tried));
        check(1, Class::Credential, None, None, Next::FailOver(Why::Hopeless));
        check(1, Class::Caller, Some(1), None, Next::FailOver(Why::Hopeless));
        check(1, Class::Quota, Some(2500), None, Next::Retry { after_ms: 2500 });
        check(1, Class::Quota, Some(0), None, Next::Retry { after_ms: 0 });
        check(1, Class::Quota, Some(900_000), None, Next::Retry { after_ms: 60_000 });
        check(1, Class::Quota, Some(900_000), Some(30_000), Next::FailOver(Why::TooLate));
        check(1, Class::Overload, None, Some(400), Next::FailOver(Why::TooLate));
        check(1, Class::Overload, None, Some(401), Next::Retry { after_ms: 400 });
        assert_eq!(
            (Backoff::new(0, 1, Growth::Linear).attempts(), Backoff::new(9, 1, Growth::Linear).attempts()),
            (1, 5)
        );
        assert_eq!(["constant", "linear", "exponential", "x"].map(Growth::parse).iter().flatten().count(), 3);
    }

    #[test]
    fn what_providers_ask_for_is_read_in_every_form() {
        let check = |headers: &[(&str, &str)], expected: Option<u64>| {
            let header = |name: &str| headers.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
            assert_eq!(retry_after_ms(header, NOW), expected, "{headers:?}");
        };
        check(&[], None);
        check(&[("retry-after", "3")], Some(3000));
        check(&[("retry-after", " 1.5 ")], Some(1500));
        check(&[("retry-after", "-1")], None);
        check(&[("retry-after", "soon")], None);
        check(&[("retry-after-ms", "250"), ("retry-after", "3")], Some(250));
        check(&[("retry-after", "Sun, 15 Jun 2025 15:06:50 GMT")], Some(10_000));
        check(&[("retry-after", "Sun, 15 Jun 2025 15:00:00 GMT")], Some(0));
        check(&[("x-ratelimit-reset", "20")], Some(20_000));
        check(&[("x-ratelimit-reset", "1750000030")], Some(30_000));
        check(&[("x-ratelimit-reset", "1750000000500")], Some(500));
        check(&[("x-ratelimit-reset-requests", "20ms"), ("x-ratelimit-reset-tokens", "6m0s")], Some(360_000));
        check(
            &[
                ("x-ratelimit-reset-requests", "1m2.5s"),
                ("x-ratelimit-remaining-requests", "0"),
                ("x-ratelimit-reset-tokens", "6m0s"),
                ("x-ratelimit-remaining-tokens", "900"),
            ],
            Some(62_500),
        );
        check(&[("anthropic-ratelimit-tokens-reset", "2025-06-15T15:06:45Z")], Some(5000));
        check(&[("x-ratelimit-reset", "x"), ("x-ratelimit-reset-tokens", "5")], Some(5000));
        check(&[("x-ratelimit-reset-tokens", "")], None);
    }

    #[test]
    fn retries_are_a_fifth_of_recent_calls_and_a_few() {
        let check = |calls: usize, expected: usize| {
            let budget = Budget::default();
            (0..calls).for_each(|_| budget.call(NOW));
            let taken = (0..1000).filter(|_| budget.retry(NOW)).count();
            assert_eq!(taken, expected, "{calls}");
            assert_eq!((0..1000).filter(|_| budget.retry(Millis(NOW.0 + 60_000))).count(), 5);
        };
        check(0, 5);
        check(10, 7);
        check(1000, 205);
    }

    proptest! {
        #[test]
        fn no_header_makes_the_reader_panic(text in "\\PC{0,30}") {
            for name in ["retry-after", "retry-after-ms", "x-ratelimit-reset", "anthropic-ratelimit-tokens-reset"] {
                let _ = retry_after_ms(|asked| (asked == name).then_some(&*text), NOW);
            }
        }
    }
}
