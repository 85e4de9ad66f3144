//! What is told, in plain words: what happened, since when, how bad, where, and what to look at next.
//!
//! ```text
//!   rule + reading ──> Notice: facts as text, so that it can be sent even after its rule is gone ──> title, facts, text
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::settings::{Errors, Measure, Rule, Severity, Unit, What};
use crate::base::Millis;

/// One thing to be told, once.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// The same whenever it is sent: who has seen it can ignore it.
    pub id: String,
    /// The same for all that is told from firing to resolving.
    pub alert: String,
    /// What happened.
    pub event: Event,
    /// How often it was told before.
    pub number: u32,
    /// The rule's name.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is looked at, for machines ([`What::name`]).
    pub measure: String,
    /// What is looked at, in words.
    pub about: String,
    /// Whose figures, by name.
    pub filter: BTreeMap<String, String>,
    /// Which of several it is: `device 0`.
    pub of: Option<String>,
    /// What figures are counted in.
    pub unit: Unit,
    /// The last figure; none if there was none for a day.
    pub value: Option<f64>,
    /// The largest figure since it is wrong.
    pub peak: f64,
    /// From where on it is wrong.
    pub threshold: f64,
    /// Below which it is right again.
    pub resolve_below: f64,
    /// Since when it is wrong.
    pub since: Millis,
    /// When this was decided.
    pub at: Millis,
    /// What to look at next.
    pub next: String,
}

/// What a notice tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// It is wrong.
    Fired,
    /// It still is.
    Repeated,
    /// It is right again.
    Resolved,
    /// Nothing: somebody tries a channel.
    Test,
}

impl Event {
    /// As it is written for machines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fired => "fired",
            Self::Repeated => "repeated",
            Self::Resolved => "resolved",
            Self::Test => "test",
        }
    }
}

impl Unit {
    /// As it is written for machines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Usd => "usd",
            Self::Percent => "percent",
            Self::Milliseconds => "milliseconds",
            Self::Seconds => "seconds",
        }
    }

    /// A figure as people read it.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Usd if value.abs() < 1.0 => format!("{} USD", rounded(value, 4)),
            Self::Usd => format!("{value:.2} USD"),
            Self::Percent => format!("{} %", rounded(value, 2)),
            Self::Milliseconds if value >= 1000.0 => format!("{} s", rounded(value / 1000.0, 2)),
            Self::Milliseconds => format!("{} ms", rounded(value, 1)),
            Self::Seconds => span(Duration::try_from_secs_f64(value.max(0.0)).unwrap_or(Duration::MAX)),
        }
    }
}

impl Notice {
    /// About a rule; who decides fills in what it knows besides.
    pub(super) fn about(rule: &Rule, event: Event, of: Option<&str>) -> Self {
        let filter = rule.measure.filter.parts().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            id: String::new(),
            alert: String::new(),
            event,
            number: 0,
            rule: rule.name.clone(),
            severity: rule.severity,
            measure: rule.measure.what.name().to_owned(),
            about: about(&rule.measure),
            filter: filter.collect(),
            of: of.map(str::to_owned),
            unit: rule.measure.unit(),
            value: None,
            peak: 0.0,
            threshold: rule.threshold,
            resolve_below: rule.resolve_below.unwrap_or(rule.threshold),
            since: Millis(0),
            at: Millis(0),
            next: rule.note.clone().unwrap_or_else(|| next(&rule.measure.what).to_owned()),
        }
    }

    /// For trying a channel.
    pub(super) fn test(now: Millis) -> Self {
        let measure = Measure { what: What::DeviceDown, filter: super::Filter::default() };
        let mut rule = Rule::new("test", measure, 1.0);
        rule.severity = Severity::Info;
        rule.note = Some("Nothing is wrong. If you can read this, alerts of this channel reach you.".into());
        let id = format!("test-{}", crate::base::RequestId::random().simple());
        Self { alert: id.clone(), id, since: now, at: now, ..Self::about(&rule, Event::Test, None) }
    }

    /// One line: `critical: error rate is 12.5 % (gateway prod)`.
    pub fn title(&self) -> String {
        let Self { about, severity, rule, .. } = self;
        let place = self.place();
        let place = if place.is_empty() { String::new() } else { format!(" ({place})") };
        let severity = severity.as_str();
        match (self.event, self.value) {
            (Event::Test, _) => "test: alerts of this channel reach you".to_owned(),
            (Event::Fired, Some(value)) => format!("{severity}: {about} is {}{place}", self.unit.show(value)),
            (Event::Repeated, Some(value)) => format!("still {severity}: {about} is {}{place}", self.unit.show(value)),
            (Event::Resolved, Some(value)) => format!("resolved: {about} is {} again{place}", self.unit.show(value)),
            (_, None) => format!("{}: {about}, {rule}{place}", self.event.as_str()),
        }
    }

    /// One sentence on what happened.
    pub fn sentence(&self) -> String {
        let Self { about, rule, .. } = self;
        let about = capital(about);
        let threshold = self.unit.show(self.threshold);
        let lasted = span(Duration::from_millis(self.at.0.saturating_sub(self.since.0)));
        match (self.event, self.value) {
            (Event::Test, _) => "Somebody tries this channel.".to_owned(),
            (Event::Resolved, Some(value)) => {
                let value = self.unit.show(value);
                format!("{about} is {value} again, after {lasted}. The rule \"{rule}\" fires from {threshold} on.")
            }
            (Event::Resolved, None) => {
                format!(
                    "There was no reading for a day, so \"{rule}\" is taken as over. Whether it is, is for you to see."
                )
            }
            (_, value) => {
                let value = self.unit.show(value.unwrap_or(self.peak));
                format!("{about} is {value}. The rule \"{rule}\" fires from {threshold} on.")
            }
        }
    }

    /// What is known, by name, in the order it is read.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        if self.event == Event::Test {
            return vec![("When", clock(self.at))];
        }
        let place = self.place();
        let lasted = span(Duration::from_millis(self.at.0.saturating_sub(self.since.0)));
        let mut facts = vec![("Where", if place.is_empty() { "all accounts and gateways".to_owned() } else { place })];
        facts.push(("Since", format!("{} ({lasted})", clock(self.since))));
        if let Some(value) = self.value {
            facts.push(("Now", self.unit.show(value)));
        }
        facts.push(("Highest", self.unit.show(self.peak)));
        let threshold = self.unit.show(self.threshold);
        facts.push(("Threshold", format!("{threshold}, over below {}", self.unit.show(self.resolve_below))));
        facts.push(("Severity", self.severity.as_str().to_owned()));
        facts
    }

    /// All of it as plain text.
    pub fn text(&self, instance: &str) -> String {
        let mut text = format!("{}\n\n", self.sentence());
        for (name, fact) in self.facts() {
            text.push_str(&format!("  {name:<10} {fact}\n"));
        }
        if self.event != Event::Resolved {
            text.push_str(&format!("\nWhat to look at next\n  {}\n", self.next));
        }
        text.push_str(&format!("\n-- \n{instance}, rule \"{}\", notice {}\n", self.rule, self.id));
        text
    }

    /// `account 023e…, gateway prod, device 0`.
    fn place(&self) -> String {
        // The account may be both what was asked for and which it is.
        let filter = self.filter.iter().map(|(name, value)| format!("{name} {value}"));
        let mut parts: Vec<String> = filter.collect();
        parts.extend(self.of.clone().filter(|of| !parts.contains(of)));
        parts.join(", ")
    }
}

/// What is looked at, as the subject of a sentence.
pub(super) fn about(measure: &Measure) -> String {
    match measure.what {
        What::Cost { window: None } => "spend since midnight UTC".to_owned(),
        What::Cost { window: Some(window) } => format!("spend of the last {}", span(window)),
        What::ErrorRate { window, errors, .. } => {
            let which = if errors == Errors::Server { "5xx" } else { "4xx and 5xx" };
            format!("error rate ({which}) of the last {}", span(window))
        }
        What::LatencyP95 { window, .. } => format!("p95 latency of the last {}", span(window)),
        What::AllocationUsed => "use of today's neurons".to_owned(),
        What::DeviceDown => "device downtime".to_owned(),
    }
}

/// What to look at next.
fn next(what: &What) -> &'static str {
    match what {
        What::Cost { .. } => {
            "`neurond usage --by model` and `--by key` show what spends it. A spending limit on the gateway would stop it."
        }
        What::ErrorRate { .. } => {
            "The gateway's logs, filtered by failed requests, name the provider and what it said. If one provider is out, a \
             fallback in the route goes round it."
        }
        What::LatencyP95 { .. } => {
            "`neurond usage --by model` shows which model is slow. For models of this machine compare neurond_queue_seconds: if \
             the wait is the queue, there is too much work; if not, prompts are long."
        }
        What::AllocationUsed => {
            "`neurond usage --by model` shows what uses it. At 100 % calls are refused until midnight UTC, unless the account's \
             allocation is raised."
        }
        What::DeviceDown => "`neurond gpus` shows the devices; the daemon's log says why this one is not ready.",
    }
}

/// A time as people read it.
fn clock(time: Millis) -> String {
    let seconds = i64::try_from(time.seconds()).unwrap_or(i64::MAX);
    let stamp = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX);
    stamp.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// How long, in its two largest units.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds == 0 && !time.is_zero() {
        return format!("{} ms", time.as_millis());
    }
    let units = [("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)];
    let first = units.iter().position(|(_, size)| seconds >= *size).unwrap_or(3);
    let mut left = seconds;
    let parts = units[first..].iter().take(2).filter_map(|(name, size)| {
        let count = left / size;
        left %= size;
        (count > 0 || first == 3).then(|| format!("{count} {name}"))
    });
    parts.collect::<Vec<_>>().join(" ")
}

/// At most so many decimals, and no zeros behind them.
fn rounded(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    first + letters.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::Filter;

    const SINCE: Millis = Millis(1_750_000_000_000);

    fn notice(what: What, event: Event, value: Option<f64>) -> Notice {
        let filter = Filter { gateway: Some("prod".into()), ..Filter::default() };
        let mut rule = Rule::new("errors", Measure { what, filter }, 5.0);
        rule.resolve_below = Some(4.0);
        let at = Millis(SINCE.0 + 3_780_000);
        Notice { value, peak: 20.0, since: SINCE, at, id: "a-0".into(), ..Notice::about(&rule, event, None) }
    }

    #[test]
    fn a_message_says_what_where_since_when_how_bad_and_what_to_look_at_next() {
        let what = What::ErrorRate { window: Duration::from_secs(300), errors: Errors::Server, min_requests: 20 };
        let fired = notice(what, Event::Fired, Some(12.5));
        assert_eq!(fired.title(), "warning: error rate (5xx) of the last 5 min is 12.5 % (gateway prod)");
        let text = fired.text("neurond on gpu-1");
        let expected = "\
Error rate (5xx) of the last 5 min is 12.5 %. The rule \"errors\" fires from 5 % on.

  Where      gateway prod
  Since      2025-06-15 15:06:40 UTC (1 h 3 min)
  Now        12.5 %
  Highest    20 %
  Threshold  5 %, over below 4 %
  Severity   warning

What to look at next
  The gateway's logs, filtered by failed requests, name the provider and what it said. If one provider is out, a fallback \
                        in the route goes round it.

-- 
neurond on gpu-1, rule \"errors\", notice a-0
";
        assert_eq!(text, expected);
        let resolved = notice(what, Event::Resolved, Some(1.0));
        assert_eq!(resolved.title(), "resolved: error rate (5xx) of the last 5 min is 1 % again (gateway prod)");
        assert!(resolved.text("x").starts_with("Error rate (5xx) of the last 5 min is 1 % again, after 1 h 3 min."));
        assert!(!resolved.text("x").contains("What to look at next"));
    }

    #[test]
    fn every_measure_has_a_title_of_its_own_for_every_event() {
        let check = |what: What, event: Event, value: Option<f64>, title: &str| {
            assert_eq!(notice(what, event, value).title(), title);
        };
        let hour = Some(Duration::from_secs(3600));
        let window = Duration::from_secs(90);
        let latency = What::LatencyP95 { window, min_requests: 1 };
        let spent = "warning: spend since midnight UTC is 12.35 USD (gateway prod)";
        check(What::Cost { window: None }, Event::Fired, Some(12.345_678), spent);
        let spent = "still warning: spend of the last 1 h is 0.012 USD (gateway prod)";
        check(What::Cost { window: hour }, Event::Repeated, Some(0.012), spent);
        let slow = "warning: p95 latency of the last 1 min 30 s is 1.5 s (gateway prod)";
        check(latency, Event::Fired, Some(1500.0), slow);
        let used = "resolved: use of today's neurons is 0 % again (gateway prod)";
        check(What::AllocationUsed, Event::Resolved, Some(0.0), used);
        let down = "warning: device downtime is 2 min 5 s (gateway prod)";
        check(What::DeviceDown, Event::Fired, Some(125.0), down);
        let lost = "resolved: device downtime, errors (gateway prod)";
        check(What::DeviceDown, Event::Resolved, None, lost);
    }

    #[test]
    fn figures_and_spans_are_short_and_right() {
        let check = |unit: Unit, value: f64, text: &str| assert_eq!(unit.show(value), text, "{unit:?} {value}");
        check(Unit::Usd, 0.0, "0 USD");
        check(Unit::Usd, 1234.5, "1234.50 USD");
        check(Unit::Percent, 100.0, "100 %");
        check(Unit::Percent, 33.333, "33.33 %");
        check(Unit::Milliseconds, 999.96, "1000 ms");
        check(Unit::Milliseconds, 20.0, "20 ms");
        check(Unit::Seconds, 0.0, "0 s");
        check(Unit::Seconds, 0.25, "250 ms");
        check(Unit::Seconds, 60.0, "1 min");
        check(Unit::Seconds, 90_061.0, "1 d 1 h");
        check(Unit::Seconds, f64::MAX, "213503982334601 d 7 h");
        check(Unit::Seconds, -5.0, "0 s");
        assert_eq!(clock(Millis(u64::MAX)).split(' ').next_back(), Some("UTC"));
    }
}
