//! Rows of an answer: lines of blocks grouped, summed, ordered and told as JSON.
//!
//! ```text
//!  block, block, block (by time) ─filter─> group: sums, sketches ─at the next step─> row: sums, six quantiles ─order─> JSON
//! ```
//!
//! ```json
//! {"from": "…", "to": "…", "step": "hour", "total": 2, "truncated": false, "relativeError": 0.01, "rows": [
//!   {"count": 12, "dimensions": {"model": "gpt-4o", "datetimeHour": "2026-05-01T10:00:00Z"},
//!    "sum": {"cost": 0.04, "erroredRequests": 1, …}, "avg": {"latency": 812.4, …}, "quantiles": {"latencyP50": …}, "ratio": {"cacheHits": 0.25, …}}]}
//! ```
//!
//! The names are GraphQL's where there is one. `total` counts the rows before `limit`, times are in milliseconds, money is in USD and
//! in neurons, and `null` is said where nothing was measured. [`MEASURES`] has them all.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::logs::analytics::ask::{Ask, ByStatus, NAMED, Order, time_name, timestamp};
use crate::logs::analytics::block::Block;
use crate::logs::analytics::measure::{COUNT, MEASURES, Row, Sum};
use crate::logs::analytics::row::{Key, Names, OTHER};
use crate::logs::analytics::shelf::Tier;
use crate::logs::analytics::sketch::{RELATIVE_ERROR, Sketch};

/// Groups under way at a time, each with its sketches.
const MOST_GROUPS: usize = 20_000;
/// Groups of all steps that are put in order.
const MOST_ROWS: usize = 100_000;

#[derive(Default)]
struct Group {
    sum: Sum,
    latency: Sketch,
    ttft: Sketch,
}

/// See the top of this file.
pub(super) struct Answer<'a> {
    ask: &'a Ask,
    names: Names,
    groups: HashMap<Key, Group>,
    minute: u32,
    rows: Vec<Row>,
}

impl<'a> Answer<'a> {
    pub(super) fn new(ask: &'a Ask) -> Self {
        Self { ask, names: Names::default(), groups: HashMap::new(), minute: 0, rows: Vec::new() }
    }

    /// What is added next begins at this minute, which is no earlier than the one before.
    ///
    /// # Errors
    /// `BadInput`: there are more rows than one answer has.
    pub(super) fn turn_to(&mut self, minute: u32) -> Result<()> {
        let minute = self.ask.step.map_or(0, |step| minute / step.minutes() * step.minutes());
        if minute != self.minute {
            self.end_step();
            self.minute = minute;
        }
        if self.groups.len() > MOST_GROUPS || self.rows.len() + self.groups.len() > MOST_ROWS {
            let remedy = "ask for a longer step, a shorter time, fewer groups, or only some of them";
            return Err(Error::bad_field(
                "group_by",
                format!("group_by: these are too many rows for one answer; {remedy}"),
            ));
        }
        Ok(())
    }

    /// Adds what was asked for of a block; `None` if the block is damaged, and then some of it was added.
    pub(super) fn add(&mut self, block: &Block<'_>) -> Option<()> {
        let Self { ask, names, groups, .. } = self;
        // What the block calls by number: its number here, and whether it was asked for, dimension by dimension.
        let mut known =
            vec![(OTHER, ask.only.each_ref().map(|only| only.is_empty() || only.iter().any(|name| name == "other")))];
        // Whoever asks for an account that is called `other` does not get the accounts that were folded.
        known[0].1[0] = ask.only[0].is_empty();
        known.extend(block.names().iter().map(|text| {
            let is_asked_for = ask.only.each_ref().map(|only| only.is_empty() || only.iter().any(|name| name == text));
            (names.number(text), is_asked_for)
        }));
        for line in block.lines() {
            let line = line?;
            let mut group = Key::default();
            let mut is_asked_for = true;
            for (name, number) in line.key.names.into_iter().enumerate() {
                let (number, asked_for) = known.get(number as usize)?;
                is_asked_for &= asked_for[name];
                if ask.by[name] {
                    group.names[name] = *number;
                }
            }
            let Key { status, cache, .. } = line.key;
            is_asked_for &= ask.only_status.is_empty()
                || ask.only_status.iter().any(|(low, high)| (*low..=*high).contains(&status));
            is_asked_for &= ask.only_cache.is_empty() || ask.only_cache.contains(&cache);
            if !is_asked_for {
                continue;
            }
            group.status = match ask.by_status {
                ByStatus::No => 0,
                ByStatus::Class => status / 100 * 100,
                ByStatus::Code => status,
            };
            group.cache = if ask.by_cache { cache } else { 0 };
            let group = groups.entry(group).or_default();
            group.sum.add(&line);
            group.latency.merge(line.latency)?;
            group.ttft.merge(line.ttft)?;
        }
        Some(())
    }

    /// The whole answer.
    ///
    /// # Errors
    /// As [`Answer::turn_to`].
    pub(super) fn finish(mut self) -> Result<Value> {
        self.turn_to(u32::MAX)?;
        self.end_step();
        let Self { ask, names, mut rows, .. } = self;
        let total = rows.len();
        order(&mut rows, ask, &names);
        rows.truncate(ask.limit);
        Ok(json!({
            "from": timestamp(ask.range.start).to_string(),
            "to": timestamp(ask.range.end).to_string(),
            "step": ask.step,
            "total": total,
            "truncated": total > ask.limit,
            "relativeError": RELATIVE_ERROR,
            "rows": rows.iter().map(|row| told(row, ask, &names)).collect::<Vec<_>>(),
        }))
    }

    fn end_step(&mut self) {
        const SHARES: [f64; 3] = [0.5, 0.95, 0.99];
        let minute = self.minute;
        self.rows.extend(self.groups.drain().map(|(key, group)| {
            let Group { sum, latency, ttft } = group;
            Row { minute, key, sum, latency: latency.quantiles(SHARES), ttft: ttft.quantiles(SHARES) }
        }));
    }
}

/// What is equal is told by time, then busiest first, then by name, so that one question has one answer.
fn order(rows: &mut Vec<Row>, ask: &Ask, names: &Names) {
    let value = |row: &Row| match ask.order {
        Order::Time => f64::from(row.minute),
        // What was not measured comes last either way.
        Order::By(measure) => (measure.of)(row).as_f64().unwrap_or(if ask.ascending { f64::MAX } else { f64::MIN }),
    };
    let mut ranked: Vec<(f64, Row)> = rows.drain(..).map(|row| (value(&row), row)).collect();
    let texts = |row: &Row| row.key.names.map(|name| names.text(name).to_owned());
    ranked.sort_by(|(one_value, one), (other_value, other)| {
        let by_value = one_value.total_cmp(other_value);
        let by_value = if ask.ascending { by_value } else { by_value.reverse() };
        let by_requests = || other.sum.counts.requests.cmp(&one.sum.counts.requests);
        let by_name = || match texts(one).cmp(&texts(other)) {
            Ordering::Equal => (one.key.status, one.key.cache).cmp(&(other.key.status, other.key.cache)),
            unequal => unequal,
        };
        by_value.then_with(|| one.minute.cmp(&other.minute)).then_with(by_requests).then_with(by_name)
    });
    rows.extend(ranked.into_iter().map(|(_, row)| row));
}

fn told(row: &Row, ask: &Ask, names: &Names) -> Value {
    let mut dimensions = Map::new();
    if let Some(step) = ask.step {
        let at = timestamp(row.minute);
        let at = if step == Tier::Day { at.strftime("%Y-%m-%d").to_string() } else { at.to_string() };
        dimensions.insert(time_name(step).to_owned(), at.into());
    }
    for (label, name) in NAMED.iter().filter(|(_, name)| ask.by[*name as usize]) {
        dimensions.insert((*label).to_owned(), names.text(row.key.names[*name as usize]).into());
    }
    match ask.by_status {
        ByStatus::No => {}
        ByStatus::Class => {
            drop(dimensions.insert("statusClass".to_owned(), format!("{}xx", row.key.status / 100).into()))
        }
        ByStatus::Code => drop(dimensions.insert("status".to_owned(), row.key.status.into())),
    }
    if ask.by_cache {
        dimensions.insert("cache".to_owned(), row.key.cache_use().as_str().into());
    }
    let mut told = Map::new();
    told.insert(COUNT.name.to_owned(), (COUNT.of)(row));
    told.insert("dimensions".to_owned(), dimensions.into());
    for measure in &MEASURES {
        let section = told.entry(measure.section).or_insert_with(|| Map::new().into());
        section[measure.name] = (measure.of)(row);
    }
    told.into()
}
