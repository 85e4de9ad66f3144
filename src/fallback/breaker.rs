//! One target's breaker: when it opens, how long it rests, who may try it first.
//!
//!     Closed --failures in a row, or too many of the recent calls--> Resting { until } --time passes, one asks--> Probing
//!       ^                  '--bad credential, no money: at once--------^   ^                                        |
//!       |                                                                  '--probe failed: twice as long-----------+
//!       '--probe answered-------------------------------------------------------------------------------------------'
//!
//! Pure: takes `now`, and the successes that are counted elsewhere. Quota, callers' errors and hang-ups are no failures; as the outcome
//! of a probe they show that the target answers again.

use super::class::Toll;
use super::recent::{Recent, WINDOW_MS};
use crate::base::Millis;

/// When targets rest, and for how long.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Policy {
    /// Failures in a row that open the breaker.
    pub consecutive: u32,
    /// Share of failures among the calls of the last half minute that opens it, 0 to 1.
    pub failure_rate: f64,
    /// Calls in the last half minute below which the share means nothing.
    pub min_samples: u32,
    /// Milliseconds of the first rest. It doubles with each that follows closely.
    pub rest_ms: u64,
    /// Milliseconds of a rest at most.
    pub max_rest_ms: u64,
    /// Milliseconds of the first rest after a bad credential or an empty account.
    pub credential_rest_ms: u64,
    /// What to do when all targets rest.
    pub all_rest: AllRest,
}

/// What to do when all targets of a call rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllRest {
    /// Try the one whose rest ends first.
    TryBest,
    /// Refuse the call.
    Refuse,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            consecutive: 5,
            failure_rate: 0.5,
            min_samples: 20,
            rest_ms: 5_000,
            max_rest_ms: 300_000,
            credential_rest_ms: 60_000,
            all_rest: AllRest::TryBest,
        }
    }
}

/// Whether a target rests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    /// It does not: the breaker is closed.
    None,
    /// Until then; a probe may go out after that.
    Until(Millis),
    /// A probe is on its way.
    Probing,
}

/// Successes as they are counted outside.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Successes {
    /// In the last half minute.
    pub recent: u32,
    /// Whether there was one since the last failure.
    pub since_failure: bool,
}

#[derive(Debug)]
pub(super) struct Breaker {
    rest: Rest,
    /// When the last rest ends or ended.
    until: Millis,
    /// The probe that is out, if one is; numbers are never used twice.
    probe: u64,
    in_a_row: u32,
    failures: Recent,
    /// Rests one soon after the other.
    trips: u32,
    /// Rests since the start.
    rests: u64,
    closed_at: Millis,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self {
            rest: Rest::None,
            until: Millis(0),
            probe: 0,
            in_a_row: 0,
            failures: Recent::default(),
            trips: 0,
            rests: 0,
            closed_at: Millis(0),
        }
    }

    pub(super) fn rest(&self) -> Rest {
        self.rest
    }

    pub(super) fn in_a_row(&self) -> u32 {
        self.in_a_row
    }

    pub(super) fn recent_failures(&self, now: Millis) -> u32 {
        self.failures.sum(now)
    }

    pub(super) fn rests(&self) -> u64 {
        self.rests
    }

    /// A call without a probe failed. While the target rests it tells nothing new.
    pub(super) fn failed(&mut self, toll: Toll, ok: Successes, policy: &Policy, now: Millis) {
        if self.rest != Rest::None {
            return;
        }
        match toll {
            Toll::Nothing => {}
            Toll::Rest => self.trip(toll, policy, now),
            Toll::Failure => {
                self.in_a_row = if ok.since_failure { 1 } else { self.in_a_row + 1 };
                self.failures.add(now);
                let failed = self.failures.sum(now);
                let calls = failed.saturating_add(ok.recent);
                let is_often =
                    calls >= policy.min_samples && f64::from(failed) >= policy.failure_rate * f64::from(calls);
                if self.in_a_row >= policy.consecutive || is_often {
                    self.trip(toll, policy, now);
                }
            }
        }
    }

    /// A call without a probe was answered although the target rests: it was tried for want of others, or began before. Worth a probe now.
    pub(super) fn answered(&mut self, now: Millis) {
        if let Rest::Until(until) = self.rest {
            self.until = until.min(now);
            self.rest = Rest::Until(self.until);
        }
    }

    /// Hands out the probe, if the rest is over and nobody has it.
    pub(super) fn take_probe(&mut self, now: Millis) -> Option<u64> {
        match self.rest {
            Rest::Until(until) if until <= now => {
                self.probe += 1;
                self.rest = Rest::Probing;
                Some(self.probe)
            }
            _ => None,
        }
    }

    /// The probe came to an end: `None` is an answer.
    pub(super) fn probed(&mut self, probe: u64, toll: Option<Toll>, policy: &Policy, now: Millis) {
        if !self.is_out(probe) {
            return;
        }
        match toll {
            None | Some(Toll::Nothing) => {
                self.rest = Rest::None;
                self.in_a_row = 0;
                self.failures.clear();
                self.closed_at = now;
            }
            Some(toll) => self.trip(toll, policy, now),
        }
    }

    /// The probe was not used: the next who asks gets one.
    pub(super) fn give_back(&mut self, probe: u64) {
        if self.is_out(probe) {
            self.rest = Rest::Until(self.until);
        }
    }

    fn is_out(&self, probe: u64) -> bool {
        self.rest == Rest::Probing && self.probe == probe
    }

    fn trip(&mut self, toll: Toll, policy: &Policy, now: Millis) {
        // A target that has been well for long enough begins anew.
        let well_for = now.0.saturating_sub(self.closed_at.0);
        if self.rest == Rest::None && well_for > policy.max_rest_ms.max(WINDOW_MS) {
            self.trips = 0;
        }
        let first = if toll == Toll::Rest { policy.credential_rest_ms } else { policy.rest_ms };
        let most = policy.max_rest_ms.max(first);
        let rest = first.saturating_mul(1 << self.trips.min(20)).min(most);
        self.until = Millis(now.0.saturating_add(rest));
        self.rest = Rest::Until(self.until);
        self.trips = self.trips.saturating_add(1);
        self.rests += 1;
        self.in_a_row = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 1_750_000_000_000;

    /// Runs a script and compares what the breaker is after each word:
    /// `f` failure, `o` success then failure, `x` credential, `p` take a probe, `+` it answers, `-` it fails, `q` it meets a quota, `b` it is given back, `a` an
    /// answer without a probe, a number: that many milliseconds pass.
    fn check(policy: &Policy, script: &str, expected: &str) {
        let mut breaker = Breaker::new();
        let mut now = START;
        let mut probe = 0;
        let mut seen = Vec::new();
        for word in script.split_whitespace() {
            let at = Millis(now);
            let ok = |recent, since_failure| Successes { recent, since_failure };
            match word {
                "f" => breaker.failed(Toll::Failure, ok(0, false), policy, at),
                "o" => breaker.failed(Toll::Failure, ok(1, true), policy, at),
                "many" => breaker.failed(Toll::Failure, ok(1000, true), policy, at),
                "x" => breaker.failed(Toll::Rest, ok(0, false), policy, at),
                "n" => breaker.failed(Toll::Nothing, ok(0, false), policy, at),
                "p" => match breaker.take_probe(at) {
                    Some(number) => probe = number,
                    None => seen.push("none".to_owned()),
                },
                "+" => breaker.probed(probe, None, policy, at),
                "-" => breaker.probed(probe, Some(Toll::Failure), policy, at),
                "q" => breaker.probed(probe, Some(Toll::Nothing), policy, at),
                "b" => breaker.give_back(probe),
                "a" => breaker.answered(at),
                "?" => seen.push(match breaker.rest() {
                    Rest::None => "closed".to_owned(),
                    Rest::Probing => "probing".to_owned(),
                    Rest::Until(until) => format!("rests {}", until.0.saturating_sub(now)),
                }),
                ms => now += ms.parse::<u64>().unwrap(),
            }
        }
        assert_eq!(seen.join(", "), expected, "{script}");
    }

    #[test]
    fn it_opens_on_failures_in_a_row_or_on_their_share() {
        let policy = Policy { consecutive: 3, min_samples: 10, ..Policy::default() };
        check(&policy, "f f ? f ?", "closed, rests 5000");
        check(&policy, "f f o f ? f ?", "closed, rests 5000");
        check(&policy, "n n n n n ?", "closed");
        check(&policy, "x ?", "rests 60000");
        let rate = Policy { consecutive: 1000, min_samples: 10, ..Policy::default() };
        check(&rate, "o o o o o o o o ? o ?", "closed, rests 5000");
        check(&rate, "f f f f f f f f 40000 f f ?", "closed");
        check(&rate, "many many many many many many many many many many many ?", "closed");
    }

    #[test]
    fn one_probe_goes_out_when_the_rest_is_over() {
        let policy = Policy { consecutive: 1, ..Policy::default() };
        check(&policy, "p f p 4999 p 1 p ? p + ?", "none, none, none, probing, none, closed");
        check(&policy, "f 5000 p - ? p 10000 p - ? 20000 p - ?", "rests 10000, none, rests 20000, rests 40000");
        check(&policy, "f 5000 p b ? p ?", "rests 0, probing");
        check(&policy, "f 5000 p q ?", "closed");
        check(&policy, "f f f ? 5000 p f ? a ? +  ?", "rests 5000, probing, probing, closed");
        check(&policy, "f 1000 a ? p + ?", "rests 0, closed");
        check(&policy, "x 60000 p - ?", "rests 10000");
    }

    #[test]
    fn rests_grow_while_trouble_stays_and_are_short_again_after_a_long_good_time() {
        let policy = Policy { consecutive: 1, ..Policy::default() };
        check(&policy, "f 5000 p + 1000 f ?", "rests 10000");
        check(&policy, "f 5000 p + 400000 f ?", "rests 5000");
        let failing = "f 5000 p - 10000 p - 20000 p - 40000 p - 80000 p - 160000 p - ? 300000 p - ?";
        check(&policy, failing, "rests 300000, rests 300000");
    }

    #[test]
    fn a_probe_that_is_over_changes_nothing() {
        let policy = Policy { consecutive: 1, ..Policy::default() };
        let mut breaker = Breaker::new();
        breaker.failed(Toll::Failure, Successes::default(), &policy, Millis(0));
        let first = breaker.take_probe(Millis(5000)).unwrap();
        breaker.give_back(first);
        let second = breaker.take_probe(Millis(5000)).unwrap();
        breaker.probed(first, None, &policy, Millis(5000));
        breaker.give_back(first);
        assert_eq!((breaker.rest(), breaker.take_probe(Millis(9000))), (Rest::Probing, None));
        breaker.probed(second, None, &policy, Millis(5000));
        assert_eq!((breaker.rest(), breaker.rests()), (Rest::None, 1));
    }

    proptest! {
        #[test]
        fn never_are_two_probes_out_and_no_rest_is_longer_than_it_may_be(
            steps in prop::collection::vec((0u8..8, 0u64..20_000), 0..200),
            consecutive in 1u32..4,
        ) {
            let policy = Policy { consecutive, ..Policy::default() };
            let mut breaker = Breaker::new();
            let mut now = Millis(START);
            let mut out: Vec<u64> = Vec::new();
            for (step, passes) in steps {
                now = Millis(now.0 + passes);
                match step {
                    0 | 1 => breaker.failed(Toll::Failure, Successes::default(), &policy, now),
                    2 => breaker.failed(Toll::Rest, Successes::default(), &policy, now),
                    3 | 4 => out.extend(breaker.take_probe(now)),
                    5 => out.drain(..).for_each(|probe| breaker.probed(probe, None, &policy, now)),
                    6 => out.drain(..).for_each(|probe| breaker.probed(probe, Some(Toll::Failure), &policy, now)),
                    _ => out.drain(..).for_each(|probe| breaker.give_back(probe)),
                }
                prop_assert!(out.len() <= 1);
                prop_assert_eq!(out.len() == 1, breaker.rest() == Rest::Probing);
                if let Rest::Until(until) = breaker.rest() {
                    prop_assert!(until.0 <= now.0 + policy.max_rest_ms);
                }
            }
        }
    }
}
