//! What a channel's courier makes of how a try ended: the next notice, a rest, or giving up.
//!
//! ```text
//!   delivered ──> next        failed ──> rest: 5 s, 10 s, 20 s … 10 min ──> again        for a day, or refused for ten minutes ──> lost
//! ```
//!
//! Pure: who sends, and when a rest is over, is the actor's business.

use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use tracing::{error, warn};

use super::failure::Failure;
use super::send::Sender;
use crate::base::Millis;

/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(600);
/// A notice that failed so often, about a day, is given up.
const MAX_TRIES: u32 = 150;
/// One that was refused so often, about ten minutes, is too.
const MAX_REFUSALS: u32 = 8;

/// Who delivers for one channel, one notice at a time.
pub(super) struct Courier {
    pub sender: Rc<Sender>,
    /// Neither on the way nor resting.
    pub is_free: bool,
    /// Without what waits.
    pub status: ChannelStatus,
    /// In a row, of the notice whose turn it is.
    failures: u32,
    /// Those of them that were refusals.
    refusals: u32,
}

/// How a channel is.
#[derive(Clone, PartialEq, Default, Debug, Serialize)]
pub struct ChannelStatus {
    /// Its name.
    pub channel: String,
    /// `mail`, `slack` or `webhook`.
    pub kind: &'static str,
    /// Notices that are still to be delivered.
    pub waiting: usize,
    /// Delivered since the start.
    pub delivered: u64,
    /// Given up since the start.
    pub lost: u64,
    /// When the last one was delivered.
    pub delivered_at: Option<Millis>,
    /// Why the last try failed; none once one succeeds.
    pub error: Option<String>,
    /// When it did.
    pub error_at: Option<Millis>,
}

/// What becomes of a notice after a try.
#[derive(PartialEq, Debug)]
pub(super) enum Verdict {
    /// Delivered, or given up: the next.
    Done,
    /// To be tried again after so long.
    Rest(Duration),
}

impl Courier {
    pub(super) fn new(channel: &str, sender: Sender) -> Self {
        let status = ChannelStatus { channel: channel.to_owned(), kind: sender.kind(), ..ChannelStatus::default() };
        Self { sender: Rc::new(sender), is_free: true, status, failures: 0, refusals: 0 }
    }

    /// Back from a try. `first`: the rest after a first failure.
    pub(super) fn returned(&mut self, id: &str, outcome: Result<(), Failure>, first: Duration, now: Millis) -> Verdict {
        let status = &mut self.status;
        let channel = &status.channel;
        let Err(Failure { why, is_refusal, wait }) = outcome else {
            status.delivered += 1;
            (status.delivered_at, status.error, status.error_at) = (Some(now), None, None);
            return self.done();
        };
        self.failures += 1;
        self.refusals += u32::from(is_refusal);
        let tries = self.failures;
        if tries >= MAX_TRIES || self.refusals >= MAX_REFUSALS {
            error!(channel, id, error = why, tries, "an alert is given up");
            status.lost += 1;
            (status.error, status.error_at) = (Some(why), Some(now));
            return self.done();
        }
        let doubled = first.saturating_mul(1 << (tries - 1).min(16));
        let rest = doubled.max(wait.unwrap_or_default()).min(LONGEST_REST);
        warn!(channel, id, error = why, tries, ?rest, "an alert was not delivered");
        (status.error, status.error_at) = (Some(why), Some(now));
        Verdict::Rest(rest)
    }

    fn done(&mut self) -> Verdict {
        (self.is_free, self.failures, self.refusals) = (true, 0, 0);
        Verdict::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::settings::{Slack, To};
    use crate::base::Secret;

    const FIRST: Duration = Duration::from_secs(5);

    fn courier() -> Courier {
        let slack = Slack { url: Secret::new("https://example.com/".into()), allow_private: false };
        Courier { is_free: false, ..Courier::new("ops", Sender::new(&To::Slack(slack)).unwrap()) }
    }

    fn failure(is_refusal: bool, wait: Option<u64>) -> Result<(), Failure> {
        Err(Failure { why: "why".into(), is_refusal, wait: wait.map(Duration::from_secs) })
    }

    /// The rests after each failure, in seconds, up to giving up.
    fn rests(mut next: impl FnMut(usize) -> Result<(), Failure>) -> (Vec<u64>, Courier) {
        let mut courier = courier();
        let mut rests = Vec::new();
        while let Verdict::Rest(rest) = courier.returned("a-0", next(rests.len()), FIRST, Millis(7)) {
            assert!(!courier.is_free && rests.len() < 1000);
            rests.push(rest.as_secs());
        }
        (rests, courier)
    }

    #[test]
    fn a_failed_delivery_is_tried_for_a_day_and_a_refused_one_for_ten_minutes() {
        let (failed, courier) = rests(|_| failure(false, None));
        assert_eq!(failed[..9], [5, 10, 20, 40, 80, 160, 320, 600, 600]);
        let hours = failed.iter().sum::<u64>() / 3600;
        assert_eq!((failed.len(), hours, courier.status.lost, courier.is_free), (149, 23, 1, true));
        let (refused, courier) = rests(|_| failure(true, None));
        assert_eq!((refused.len(), refused.iter().sum(), courier.status.lost), (7, 635, 1));
        assert_eq!((courier.status.error.as_deref(), courier.status.error_at), (Some("why"), Some(Millis(7))));
    }

    #[test]
    fn who_wants_to_be_left_alone_for_longer_is_and_nobody_for_ever() {
        let (asked, _) = rests(|tries| failure(false, [Some(90), Some(1), Some(86_400)].get(tries).copied().flatten()));
        assert_eq!(asked[..4], [90, 10, 600, 40]);
    }

    #[test]
    fn after_a_success_everything_begins_anew() {
        let mut courier = courier();
        for _ in 0..5 {
            courier.returned("a-0", failure(true, None), FIRST, Millis(1));
        }
        assert_eq!(courier.returned("a-0", Ok(()), FIRST, Millis(2)), Verdict::Done);
        let ChannelStatus { delivered, lost, delivered_at, error, .. } = courier.status.clone();
        assert_eq!((delivered, lost, delivered_at, error), (1, 0, Some(Millis(2)), None));
        assert_eq!(courier.returned("b-0", failure(true, None), FIRST, Millis(3)), Verdict::Rest(FIRST));
    }
}
