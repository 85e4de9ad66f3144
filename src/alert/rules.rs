//! When a rule fires, is told again, and is over.
//!
//! ```text
//!             wrong                  held long enough               told, told again while it lasts
//!   (nothing) ──────> Pending ────────────────────────> Firing ──────────────────────────────> …
//!       ^                │ right                          │ right for long enough: told if firing was
//!       └────────────────┴────────────────────────────────┘
//! ```
//!
//! Each of several things that a rule looks at (devices, accounts) is an alert of its own. Time is counted in steps, from one
//! look to the next, and no step counts for more than `patience`: a clock that leaps, a machine that slept, and a restart
//! neither make a rule fire nor make it forget. A missing reading is neither right nor wrong.
//!
//! Pure: readings and the time come in, notices go out, and all that must survive is one value.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::notice::{Event, Notice, about};
use super::settings::{Rule, Severity};
use crate::base::Millis;

/// Alerts of one rule at most; what goes wrong beyond is told when there is room again.
const MAX_ALERTS: usize = 100;
/// What has no reading for so long is taken as over, in milliseconds: an account that was deleted, a device that was taken out.
const FORGOTTEN_AFTER: u64 = 86_400_000;

/// A figure as it is now.
#[derive(Clone, PartialEq, Debug)]
pub struct Reading {
    /// Which of several things it is of, as people call it: `device 0`, `account 023e…`. None: the rule looks at one thing only.
    pub of: Option<String>,
    /// In the measure's unit. What is no finite number is no reading.
    pub value: f64,
}

impl From<f64> for Reading {
    fn from(value: f64) -> Self {
        Self { of: None, value }
    }
}

/// All rules, and how they are.
#[derive(Debug)]
pub struct Rules {
    watched: Vec<Watched>,
    silences: BTreeMap<String, Millis>,
    /// Alerts so far, so that no two have the same id, whatever the clock says.
    begun: u64,
    /// The last look.
    last: Option<Millis>,
    /// The longest step that counts, in milliseconds.
    patience: u64,
}

#[derive(Debug)]
struct Watched {
    rule: Rule,
    alerts: Alerts,
    /// The worst reading of the last look.
    worst: Option<Reading>,
    /// How many were left out for want of room at the last look.
    left_out: usize,
}

/// What is not right, by what it is; the whole is `""`.
type Alerts = BTreeMap<String, Alert>;

/// Something that is not right. Spans are in milliseconds of steps.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Alert {
    id: String,
    /// By the clock, for people.
    since: Millis,
    is_firing: bool,
    /// How long it is wrong, while it does not fire yet.
    held: u64,
    /// How long it is right again, while it fires.
    clear: Option<u64>,
    /// Since it was last told.
    quiet: u64,
    /// Since its last reading.
    unseen: u64,
    /// How often it was told.
    told: u32,
    value: f64,
    peak: f64,
}

/// What must survive a restart.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// By the rule's name.
    alerts: BTreeMap<String, Alerts>,
    silences: BTreeMap<String, Millis>,
    begun: u64,
}

/// How a rule is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is wrong, or nothing is known.
    Ok,
    /// Wrong, and not for long enough yet.
    Pending,
    /// Wrong.
    Firing,
    /// Nobody wants to hear of it for now.
    Silenced,
}

/// A rule, for who looks.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RuleStatus {
    /// The rule's name.
    pub rule: String,
    /// What it looks at, in words.
    pub about: String,
    /// How bad it is when it fires.
    pub severity: Severity,
    /// The worst of its alerts, or that it is silenced.
    pub state: State,
    /// Since when the oldest of them is wrong.
    pub since: Option<Millis>,
    /// The worst figure at the last look; none: there was no reading.
    pub value: Option<f64>,
    /// What the figure is of, where there are several.
    pub of: Option<String>,
    /// Wrong from here on.
    pub threshold: f64,
    /// What figures are counted in.
    pub unit: &'static str,
    /// Until when nobody wants to hear of it.
    pub silenced_until: Option<Millis>,
    /// What is not right.
    pub alerts: Vec<AlertStatus>,
    /// What went wrong besides at the last look, and is not watched: a rule has a hundred alerts at most.
    pub left_out: usize,
}

/// One thing that is not right.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct AlertStatus {
    /// What it is, where there are several.
    pub of: Option<String>,
    /// [`State::Pending`] or [`State::Firing`].
    pub state: State,
    /// Since when it is wrong.
    pub since: Millis,
    /// Its last figure.
    pub value: f64,
    /// How often it was told.
    pub told: u32,
}

impl Rules {
    /// Goes on where `saved` left off. What is of rules that are no more is dropped. A step of more than `patience` counts as
    /// that: some times what usually lies between two looks.
    pub fn new(rules: Vec<Rule>, mut saved: Saved, patience: Duration) -> Self {
        let names: BTreeSet<_> = rules.iter().map(|rule| rule.name.clone()).collect();
        saved.silences.retain(|name, _| names.contains(name));
        let mut watch = |rule: Rule| {
            let alerts = saved.alerts.remove(&rule.name).unwrap_or_default();
            Watched { rule, alerts, worst: None, left_out: 0 }
        };
        let watched = rules.into_iter().map(&mut watch).collect();
        Self { watched, silences: saved.silences, begun: saved.begun, last: None, patience: millis(patience) }
    }

    /// Those that are watched, in the order in which [`Rules::step`] wants their readings.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.watched.iter().map(|watched| &watched.rule)
    }

    /// One look at everything: the readings of each rule, none where none is known. Returns what is to be told.
    pub fn step(&mut self, now: Millis, readings: &[Vec<Reading>]) -> Vec<Notice> {
        let elapsed = self.last.map_or(0, |last| now.0.saturating_sub(last.0)).min(self.patience);
        self.last = Some(now);
        self.silences.retain(|_, until| *until > now);
        let mut notices = Vec::new();
        for (watched, readings) in self.watched.iter_mut().zip(readings) {
            let is_silenced = self.silences.contains_key(&watched.rule.name);
            let look = Look { now, elapsed, is_silenced };
            watched.step(&look, readings, &mut self.begun, &mut notices);
        }
        notices
    }

    /// Tells nobody of this rule until then, by the clock. What fires meanwhile and still does then is told then; that
    /// something is over is told at once if it was told that it began. `false`: there is no such rule.
    pub fn silence(&mut self, rule: &str, until: Millis) -> bool {
        let is_known = self.has(rule);
        if is_known {
            self.silences.insert(rule.to_owned(), until);
        }
        is_known
    }

    /// Tells of this rule again. `false`: there is no such rule.
    pub fn unsilence(&mut self, rule: &str) -> bool {
        self.silences.remove(rule);
        self.has(rule)
    }

    fn has(&self, rule: &str) -> bool {
        self.rules().any(|known| known.name == rule)
    }

    /// What must survive a restart.
    pub fn saved(&self) -> Saved {
        let some = self.watched.iter().filter(|watched| !watched.alerts.is_empty());
        let alerts = some.map(|watched| (watched.rule.name.clone(), watched.alerts.clone())).collect();
        Saved { alerts, silences: self.silences.clone(), begun: self.begun }
    }

    /// How all rules are, in their order.
    pub fn status(&self, now: Millis) -> Vec<RuleStatus> {
        self.watched.iter().map(|watched| watched.status(self.silences.get(&watched.rule.name), now)).collect()
    }
}

impl Watched {
    fn step(&mut self, look: &Look, readings: &[Reading], begun: &mut u64, notices: &mut Vec<Notice>) {
        let &Look { now, elapsed, is_silenced } = look;
        self.left_out = 0;
        self.worst = None;
        let finite = readings.iter().filter(|reading| reading.value.is_finite());
        let mut values: BTreeMap<&str, f64> = BTreeMap::new();
        for reading in finite {
            if self.worst.as_ref().is_none_or(|worst| worst.value < reading.value) {
                self.worst = Some(reading.clone());
            }
            values.entry(reading.of.as_deref().unwrap_or_default()).or_insert(reading.value);
        }
        let rule = &self.rule;
        let resolve_below = rule.resolve_below.unwrap_or(rule.threshold);
        self.alerts.retain(|of, alert| {
            let value = values.remove(of.as_str());
            // A clock that was set back must not leave marks in the future.
            alert.since = alert.since.min(now);
            alert.see(value, elapsed, rule, resolve_below);
            let event = match alert.verdict(value.is_some(), is_silenced, rule) {
                Verdict::Keep => return true,
                Verdict::Drop => return false,
                Verdict::Tell(event) => event,
            };
            notices.push(alert.tell(event, of, value, rule, now));
            event != Event::Resolved
        });
        for (of, value) in values.into_iter().filter(|(_, value)| *value >= rule.threshold) {
            if self.alerts.len() >= MAX_ALERTS {
                self.left_out += 1;
                continue;
            }
            *begun += 1;
            let mut alert = Alert::new(*begun, of, value, rule, now);
            if let Verdict::Tell(event) = alert.verdict(true, is_silenced, rule) {
                notices.push(alert.tell(event, of, Some(value), rule, now));
            }
            self.alerts.insert(of.to_owned(), alert);
        }
    }

    fn status(&self, silenced_until: Option<&Millis>, now: Millis) -> RuleStatus {
        let alerts = self.alerts.iter().map(|(of, alert)| AlertStatus {
            of: (!of.is_empty()).then(|| of.clone()),
            state: if alert.is_firing { State::Firing } else { State::Pending },
            since: alert.since,
            value: alert.value,
            told: alert.told,
        });
        let alerts: Vec<_> = alerts.collect();
        let silenced_until = silenced_until.copied().filter(|until| *until > now);
        let worst = alerts.iter().map(|alert| alert.state).max().unwrap_or(State::Ok);
        RuleStatus {
            rule: self.rule.name.clone(),
            about: about(&self.rule.measure),
            severity: self.rule.severity,
            state: if silenced_until.is_some() { State::Silenced } else { worst },
            since: alerts.iter().map(|alert| alert.since).min(),
            value: self.worst.as_ref().map(|worst| worst.value),
            of: self.worst.as_ref().and_then(|worst| worst.of.clone()),
            threshold: self.rule.threshold,
            unit: self.rule.measure.unit().as_str(),
            silenced_until,
            alerts,
            left_out: self.left_out,
        }
    }
}

/// What is the same for all alerts of a rule at a look.
struct Look {
    now: Millis,
    /// Since the last one.
    elapsed: u64,
    is_silenced: bool,
}

/// What becomes of an alert at a look.
enum Verdict {
    Keep,
    /// Without a word.
    Drop,
    Tell(Event),
}

impl Alert {
    fn new(begun: u64, of: &str, value: f64, rule: &Rule, now: Millis) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in [rule.name.as_bytes(), of.as_bytes(), &begun.to_le_bytes(), &now.0.to_le_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let id = hasher.finalize().to_hex()[..24].to_owned();
        Self {
            id,
            since: now,
            is_firing: rule.hold.is_zero(),
            held: 0,
            clear: None,
            quiet: 0,
            unseen: 0,
            told: 0,
            value,
            peak: value,
        }
    }

    /// Counts a step.
    fn see(&mut self, value: Option<f64>, elapsed: u64, rule: &Rule, resolve_below: f64) {
        self.quiet = self.quiet.saturating_add(elapsed);
        let Some(value) = value else {
            self.unseen = self.unseen.saturating_add(elapsed);
            return;
        };
        self.unseen = 0;
        self.value = value;
        self.peak = self.peak.max(value);
        if self.is_firing {
            let is_right = value < resolve_below;
            self.clear = is_right.then(|| self.clear.map_or(0, |clear| clear.saturating_add(elapsed)));
        } else if value >= rule.threshold {
            self.held = self.held.saturating_add(elapsed);
            self.is_firing = self.held >= millis(rule.hold);
        }
    }

    fn verdict(&self, is_seen: bool, is_silenced: bool, rule: &Rule) -> Verdict {
        let is_over = match self.clear {
            _ if self.unseen >= FORGOTTEN_AFTER => true,
            Some(clear) => is_seen && clear >= millis(rule.resolve_after),
            None => is_seen && !self.is_firing && self.value < rule.threshold,
        };
        if is_over {
            return if self.told > 0 { Verdict::Tell(Event::Resolved) } else { Verdict::Drop };
        }
        // Only what is seen to last is told.
        if !self.is_firing || !is_seen || self.clear.is_some() || is_silenced {
            return Verdict::Keep;
        }
        match rule.repeat {
            _ if self.told == 0 => Verdict::Tell(Event::Fired),
            Some(repeat) if self.quiet >= millis(repeat) => Verdict::Tell(Event::Repeated),
            _ => Verdict::Keep,
        }
    }

    fn tell(&mut self, event: Event, of: &str, value: Option<f64>, rule: &Rule, now: Millis) -> Notice {
        let number = self.told;
        self.told = self.told.saturating_add(1);
        self.quiet = 0;
        Notice {
            id: format!("{}-{number}", self.id),
            alert: self.id.clone(),
            number,
            value,
            peak: self.peak,
            since: self.since,
            at: now,
            ..Notice::about(rule, event, Some(of).filter(|of| !of.is_empty()))
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "rules_test.rs"]
mod tests;
