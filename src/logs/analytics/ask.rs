//! The query string of a request for figures: what it may say, and what it means.
//!
//! ```text
//!  from=7d & step=hour & group_by=provider,model & status=5xx & order_by=cost & limit=100
//! ```
//!
//! | parameter | values | left out |
//! | --- | --- | --- |
//! | `from`, `to` | RFC 3339, a date, Unix seconds or milliseconds, `30m`, `24h`, `7d` ago, `now`; `to` is not part of it | a day ago; now |
//! | `step` | `minute`, `hour`, `day`, `auto`: a row for each; `none` | none: totals |
//! | `group_by` | some of `account`, `gateway`, `provider`, `model`, `key`, `status`, `statusClass`, `cache`; a step as `datetimeMinute`, `datetimeHour`, `date` | one row |
//! | the same names but times and `statusClass` | only these; `status` also as `4xx`; several with commas or repeated | all |
//! | `order_by`, `direction` | a measure or `time`; `asc`, `desc` | the busiest first; with a step by time |
//! | `limit` | 1 to 10,000 | 1,000 |
//!
//! GraphQL's spellings are understood: `orderBy=[sum_cost_DESC]`, `datetimeHour_geq`, `date_lt` and their like. Times that are no
//! whole stretch of what is kept are rounded outwards.

use std::ops::Range;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use percent_encoding::percent_decode_str;

use crate::base::{AccountId, Error, Result};
use crate::logs::analytics::measure::Measure;
use crate::logs::analytics::row::{NAMES, Name};
use crate::logs::analytics::shelf::Tier;
use crate::logs::record::CacheUse;

/// Most rows that are told: as JSON a row takes some 6 kB of memory.
const MOST_ROWS: usize = 10_000;
const USUAL_ROWS: usize = 1000;
/// With `step=auto` a row is a minute up to so many minutes in all, and an hour up to so many.
const AUTO: [(Tier, u32); 2] = [(Tier::Minute, 6 * 60), (Tier::Hour, 14 * 1440)];
const PARAMETERS: &str =
    "from, to, step, group_by, account, gateway, provider, model, key, status, cache, order_by, direction, limit";
const DIMENSIONS: &str =
    "account, gateway, provider, model, key, status, statusClass, cache, datetimeMinute, datetimeHour, date";

/// How finely statuses are told apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum ByStatus {
    No,
    Class,
    Code,
}

/// What to order by.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Time,
    By(&'static Measure),
}

/// What was asked.
#[derive(Debug)]
pub(super) struct Ask {
    /// In minutes; whole stretches of what is kept.
    pub(super) range: Range<u32>,
    /// `None`: totals.
    pub(super) step: Option<Tier>,
    /// By [`Name`].
    pub(super) by: [bool; NAMES],
    pub(super) by_status: ByStatus,
    pub(super) by_cache: bool,
    /// By [`Name`]: any of these; none: all.
    pub(super) only: [Vec<String>; NAMES],
    /// Lowest and highest.
    pub(super) only_status: Vec<(u16, u16)>,
    /// Indices into [`CacheUse::ALL`].
    pub(super) only_cache: Vec<u8>,
    pub(super) order: Order,
    pub(super) ascending: bool,
    pub(super) limit: usize,
}

/// The names of the dimensions that are names.
pub(super) const NAMED: [(&str, Name); NAMES] = [
    ("account", Name::Account),
    ("gateway", Name::Gateway),
    ("provider", Name::Provider),
    ("model", Name::Model),
    ("key", Name::Key),
];

/// The name of a stretch of time among the dimensions.
pub(super) const fn time_name(step: Tier) -> &'static str {
    match step {
        Tier::Minute => "datetimeMinute",
        Tier::Hour => "datetimeHour",
        Tier::Day => "date",
    }
}

impl Ask {
    /// Of an account, or of all; `head` is the minute it is, `kept` the first minutes of which there are minutes, hours and days.
    ///
    /// # Errors
    /// `BadInput` that names the parameter, and what it may be.
    pub(super) fn parse(account: Option<&AccountId>, query: &str, head: u32, kept: [u32; 3]) -> Result<Self> {
        let mut from = head.saturating_sub(1440);
        // The running minute is part of it.
        let mut to = head.saturating_add(1);
        let (mut step, mut direction, mut order) = (None, None, None);
        let mut ask = Self {
            range: 0..0,
            step: None,
            by: [false; NAMES],
            by_status: ByStatus::No,
            by_cache: false,
            only: Default::default(),
            only_status: Vec::new(),
            only_cache: Vec::new(),
            order: Order::Time,
            ascending: false,
            limit: USUAL_ROWS,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            match name.as_str() {
                "from" => from = moment(&name, &value, head)?,
                "to" => to = end_of_moment(&name, &value, head)?,
                "step" => Self::take_step(&mut step, &value)?,
                "group_by" | "groupBy" => ask.take_groups(&mut step, &value)?,
                "status" => ask.only_status.append(&mut list(&value, statuses)?),
                "cache" => ask.only_cache.append(&mut list(&value, cache_use)?),
                "order_by" | "orderBy" => order = Some(Self::read_order(&name, &value, &mut direction)?),
                "direction" => direction = Some(is_ascending(&value)?),
                "limit" => ask.limit = limit(&value)?,
                _ => match (NAMED.iter().find(|(known, _)| *known == name), bound(&name)) {
                    (Some((_, place)), _) => ask.only[*place as usize].extend(value.split(',').map(str::to_owned)),
                    (_, Some((unit, is_from, after))) => {
                        let at = moment(&name, &value, head)? / unit.minutes() * unit.minutes();
                        *(if is_from { &mut from } else { &mut to }) =
                            at.saturating_add(if after { unit.minutes() } else { 0 });
                    }
                    _ => return Err(wrong(&name, format_args!("is no parameter here; there are {PARAMETERS}"))),
                },
            }
        }
        if let Some(account) = account {
            let asked = &mut ask.only[Name::Account as usize];
            if asked.iter().any(|asked| asked != account.as_str()) {
                return Err(wrong("account", format_args!("is {account} here, as the path says; leave it out")));
            }
            *asked = vec![account.as_str().to_owned()];
        }
        if from >= to {
            let (from, to) = (timestamp(from), timestamp(to));
            return Err(wrong("from", format_args!("({from}) must be before `to` ({to})")));
        }
        ask.settle_time(from..to, step, kept)?;
        let usual = if ask.step.is_some() { Order::Time } else { Order::By(Measure::count()) };
        ask.order = order.unwrap_or(usual);
        ask.ascending = direction.unwrap_or(matches!(ask.order, Order::Time));
        Ok(ask)
    }

    fn take_step(step: &mut Option<Step>, value: &str) -> Result<()> {
        let read = match value {
            "none" => Step::None,
            "auto" => Step::Auto,
            _ => {
                let tier = Tier::ALL.into_iter().find(|tier| tier.as_str() == value);
                Step::Of(tier.ok_or_else(|| {
                    wrong("step", format_args!("is {value:?}; it may be minute, hour, day, auto or none"))
                })?)
            }
        };
        set_step(step, read)
    }

    fn take_groups(&mut self, step: &mut Option<Step>, value: &str) -> Result<()> {
        for group in value.split(',').map(str::trim) {
            if let Some((_, name)) = NAMED.iter().find(|(known, _)| *known == group) {
                self.by[*name as usize] = true;
            } else if let Some(tier) = Tier::ALL.into_iter().find(|tier| time_name(*tier) == group) {
                set_step(step, Step::Of(tier))?;
            } else {
                match group {
                    "status" => self.by_status = ByStatus::Code,
                    "statusClass" => self.by_status = self.by_status.max(ByStatus::Class),
                    "cache" => self.by_cache = true,
                    _ => return Err(wrong("group_by", format_args!("has {group:?}; it may have {DIMENSIONS}"))),
                }
            }
        }
        Ok(())
    }

    fn read_order(name: &str, value: &str, direction: &mut Option<bool>) -> Result<Order> {
        let text = value.trim_matches(['[', ']']);
        let (text, said) = match text.rsplit_once('_') {
            Some((text, said)) if is_ascending(said).is_ok() => (text, is_ascending(said).ok()),
            _ => (text, None),
        };
        *direction = said.or(*direction);
        if text == "time" || Tier::ALL.into_iter().any(|tier| time_name(tier) == text) {
            return Ok(Order::Time);
        }
        let measure = Measure::find(text);
        measure.map(Order::By).ok_or_else(|| {
            wrong(
                name,
                format_args!("is {value:?}; it may be time, {}", Measure::names().collect::<Vec<_>>().join(", ")),
            )
        })
    }

    /// Rounds the time outwards to whole stretches of what is told and kept.
    fn settle_time(&mut self, asked: Range<u32>, step: Option<Step>, kept: [u32; 3]) -> Result<()> {
        let has = |tier: Tier, minute: u32| minute >= kept[tier as usize];
        self.step = match step.unwrap_or(Step::None) {
            Step::None => None,
            Step::Of(tier) => Some(tier),
            Step::Auto => {
                let mut fits =
                    AUTO.iter().filter(|(tier, most)| asked.len() <= *most as usize && has(*tier, asked.start));
                Some(fits.next().map_or(Tier::Day, |(tier, _)| *tier))
            }
        };
        let unit = |minute: u32| match self.step {
            Some(step) => step,
            // The finest that there still is.
            None => Tier::ALL.into_iter().find(|tier| has(*tier, minute)).unwrap_or(Tier::Day),
        };
        let (first, last) = (unit(asked.start).minutes(), unit(asked.end).minutes());
        self.range = asked.start / first * first..asked.end.div_ceil(last) * last;
        match self.step.filter(|step| *step != Tier::Day && !has(*step, asked.start)) {
            Some(step) => {
                let (tier, first) = (step.as_str(), timestamp(kept[step as usize]));
                let coarser = if step == Tier::Minute { "hour or day" } else { "day" };
                let remedy =
                    format_args!("is before {first}, when the figures by the {tier} begin; ask for step={coarser}");
                Err(wrong("from", remedy))
            }
            None => Ok(()),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    None,
    Auto,
    Of(Tier),
}

fn set_step(step: &mut Option<Step>, read: Step) -> Result<()> {
    if step.is_some_and(|step| step != read) {
        return Err(wrong("step", format_args!("and the times of group_by are two different steps; give one")));
    }
    *step = Some(read);
    Ok(())
}

/// `datetimeHour_geq` and its like: the unit, whether the time begins or ends there, and whether behind that unit.
fn bound(name: &str) -> Option<(Tier, bool, bool)> {
    let (name, operator) = name.rsplit_once('_')?;
    let unit = match name {
        "datetime" | "datetimeMinute" => Tier::Minute,
        "datetimeHour" => Tier::Hour,
        "date" => Tier::Day,
        _ => return None,
    };
    match operator {
        "geq" => Some((unit, true, false)),
        "gt" => Some((unit, true, true)),
        "leq" => Some((unit, false, true)),
        "lt" => Some((unit, false, false)),
        _ => None,
    }
}

/// The minute a text means.
fn moment(name: &str, text: &str, head: u32) -> Result<u32> {
    moment_in_seconds(text, head).and_then(|seconds| u32::try_from(seconds.div_euclid(60)).ok()).ok_or_else(|| {
        let example = "2026-05-01, 2026-05-01T10:00:00Z, 1777629600, 30m, 24h, 7d (ago) or now";
        wrong(name, format_args!("is {text:?}; write it as {example}"))
    })
}

/// The minute that begins then or after: a minute that has begun is part of what ends in it.
fn end_of_moment(name: &str, text: &str, head: u32) -> Result<u32> {
    let minute = moment(name, text, head)?;
    let is_within = text == "now" || moment_in_seconds(text, head).is_some_and(|seconds| seconds.rem_euclid(60) != 0);
    Ok(minute.saturating_add(u32::from(is_within)))
}

fn moment_in_seconds(text: &str, head: u32) -> Option<i64> {
    let now = i64::from(head) * 60;
    if text == "now" {
        return Some(now);
    }
    if let Ok(number) = text.parse::<i64>() {
        // Seconds until the year 5138, milliseconds from 1973 on.
        return Some(if number >= 100_000_000_000 { number / 1000 } else { number }).filter(|number| *number >= 0);
    }
    let ago = text.trim_start_matches('-');
    for (unit, minutes) in [('m', 1), ('h', 60), ('d', 1440)] {
        if let Some(number) = ago.strip_suffix(unit).and_then(|number| number.parse::<u32>().ok()) {
            return Some(now - i64::from(number) * minutes * 60).map(|seconds| seconds.max(0));
        }
    }
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Some(moment.as_second());
    }
    let date = text.parse::<Date>().ok().filter(|_| text.len() == 10)?;
    date.to_zoned(TimeZone::UTC).ok().map(|midnight| midnight.timestamp().as_second())
}

/// A minute as it is written.
pub(super) fn timestamp(minute: u32) -> Timestamp {
    Timestamp::from_duration(SignedDuration::from_secs(i64::from(minute) * 60)).unwrap_or_default()
}

fn statuses(text: &str) -> Result<(u16, u16)> {
    let class =
        text.strip_suffix("xx").and_then(|class| class.parse::<u16>().ok()).filter(|class| (1..=9).contains(class));
    let code = || text.parse::<u16>().ok().map(|code| (code, code));
    let read = class.map(|class| (class * 100, class * 100 + 99)).or_else(code);
    read.ok_or_else(|| wrong("status", format_args!("is {text:?}; it may be a code such as 429, or 2xx, 4xx, 5xx")))
}

fn cache_use(text: &str) -> Result<u8> {
    let found = CacheUse::ALL.iter().position(|cache| cache.as_str() == text);
    found
        .map(|index| index as u8)
        .ok_or_else(|| wrong("cache", format_args!("is {text:?}; it may be off, miss, hit or coalesced")))
}

fn list<T>(value: &str, read: fn(&str) -> Result<T>) -> Result<Vec<T>> {
    value.split(',').map(|text| read(text.trim())).collect()
}

fn is_ascending(text: &str) -> Result<bool> {
    match text {
        "asc" | "ASC" => Ok(true),
        "desc" | "DESC" => Ok(false),
        _ => Err(wrong("direction", format_args!("is {text:?}; it may be asc or desc"))),
    }
}

fn limit(text: &str) -> Result<usize> {
    let read = text.parse().ok().filter(|limit| (1..=MOST_ROWS).contains(limit));
    read.ok_or_else(|| wrong("limit", format_args!("is {text:?}; it may be from 1 to {MOST_ROWS}")))
}

fn decode(text: &str) -> Result<String> {
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8();
    decoded
        .map(|text| text.into_owned())
        .map_err(|_| Error::bad_input("the query string is not UTF-8: encode it with %XX"))
}

fn wrong(name: &str, words: std::fmt::Arguments<'_>) -> Error {
    Error::bad_field(name, format!("{name} {words}"))
}

#[cfg(test)]
#[path = "ask_test.rs"]
mod tests;
