//! What alerts look at: sums of calls, the ledger, and the devices of this machine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::settings;
use crate::alert::{Alerts, Errors, Filter, Measure, Reading, What};
use crate::base::{AccountId, Millis, Neurons, Result};
use crate::config::{Config, Live};
use crate::gateway::limits;
use crate::gateway::relay::Parts;
use crate::ledger::Ledger;
use crate::logs::analytics::Analytics;
use crate::net::client;
use crate::supervisor::Pulses;

/// A device whose thread has not come round its loop for so long is not ready.
const SILENT: Duration = Duration::from_secs(10);

/// Watches what the configuration says, if it says anything.
///
/// # Errors
/// When something of it cannot be meant.
pub(super) fn start(live: &Live, clients: client::Settings, parts: &Parts, devices: Pulses) -> Result<Option<Alerts>> {
    let config = live.get();
    if config.records.rules.is_empty() {
        return Ok(None);
    }
    let mut source = Source {
        config: live.clone(),
        ledger: parts.ledger.clone(),
        analytics: parts.logs.analytics().clone(),
        devices,
        down: HashMap::new(),
    };
    let settings = settings::alerts(&config, clients)?;
    Alerts::start(settings, Box::new(move |measure, now| source.read(measure, now))).map(Some)
}

struct Source {
    config: Live,
    ledger: Ledger,
    analytics: Arc<Analytics>,
    devices: Pulses,
    /// Since when devices are not ready.
    down: HashMap<String, Instant>,
}

impl Source {
    fn read(&mut self, measure: &Measure, now: Millis) -> Vec<Reading> {
        let filter = &measure.filter;
        let one = |value: Option<f64>| value.map(Reading::from).into_iter().collect();
        match measure.what {
            What::Cost { window } => {
                let from = window.map_or_else(|| now.0 / 86_400_000 * 86_400_000, |window| before(now, window));
                // A day without calls has cost nothing.
                let cost = self.figures(filter, from, now).and_then(|row| row["sum"]["cost"].as_f64());
                one(Some(cost.unwrap_or(0.0)))
            }
            What::ErrorRate { window, errors, min_requests } => {
                let row = self.figures(filter, before(now, window), now);
                let row = row.filter(|row| row["count"].as_u64().unwrap_or(0) >= min_requests.max(1));
                let share = row.map(|row| {
                    let count = |name: &str| row["sum"][name].as_f64().unwrap_or(0.0);
                    let client = if errors == Errors::All { count("requests4xx") } else { 0.0 };
                    100.0 * (count("requests5xx") + client) / row["count"].as_f64().unwrap_or(1.0)
                });
                one(share)
            }
            What::LatencyP95 { window, min_requests } => {
                let row = self.figures(filter, before(now, window), now);
                let row = row.filter(|row| row["count"].as_u64().unwrap_or(0) >= min_requests.max(1));
                one(row.and_then(|row| row["quantiles"]["latencyP95"].as_f64()))
            }
            What::AllocationUsed => self.allocations(filter, now),
            What::DeviceDown => self.devices(),
        }
    }

    /// The sums of calls since a moment; nothing where there were none.
    fn figures(&self, filter: &Filter, from_ms: u64, now: Millis) -> Option<Value> {
        let account = filter.account.as_deref().map(AccountId::new);
        let mut query = format!("from={from_ms}");
        for (name, value) in filter.parts().filter(|(name, _)| *name != "account") {
            let value = percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC);
            query.push_str(&format!("&{name}={value}"));
        }
        let answer = self.analytics.query(account.as_ref(), &query, now);
        let answer = answer.map_err(|error| tracing::error!(%error, "an alert cannot be looked at")).ok()?;
        answer["rows"].get(0).cloned()
    }

    /// What share of the day's neurons is used, of the accounts that are known by name.
    fn allocations(&self, filter: &Filter, now: Millis) -> Vec<Reading> {
        let config = self.config.get();
        let accounts = match &filter.account {
            Some(account) => vec![AccountId::new(account)],
            None => named(&config),
        };
        let used = accounts.iter().filter_map(|id| {
            let plan = config.accounts.iter().find(|account| account.id == *id).and_then(|account| account.plan);
            let plan = plan.unwrap_or(config.metering.plan);
            if plan.allocation == Neurons::ZERO {
                return None;
            }
            let left = self.ledger.left(id, limits::plan(&plan), now).ok()?;
            let used = plan.allocation.saturating_sub(left).as_f64() / plan.allocation.as_f64();
            Some(Reading { of: Some(format!("account {id}")), value: 100.0 * used })
        });
        used.collect()
    }

    fn devices(&mut self) -> Vec<Reading> {
        let mut readings = Vec::new();
        for (name, silent) in self.devices.read() {
            let is_down = silent.is_none_or(|silent| silent > SILENT);
            let seconds = if is_down {
                let since = *self.down.entry(name.clone()).or_insert_with(Instant::now);
                since.elapsed().max(silent.unwrap_or_default()).as_secs_f64()
            } else {
                self.down.remove(&name);
                0.0
            };
            readings.push(Reading { of: Some(name), value: seconds });
        }
        readings
    }
}

/// Accounts that the configuration names.
fn named(config: &Config) -> Vec<AccountId> {
    let mut accounts: Vec<AccountId> = config.accounts.iter().map(|account| account.id.clone()).collect();
    accounts.extend(config.auth.anonymous.clone());
    accounts.extend(config.auth.tokens.iter().map(|token| token.account.clone()));
    accounts.sort();
    accounts.dedup();
    accounts
}

fn before(now: Millis, window: Duration) -> u64 {
    now.0.saturating_sub(u64::try_from(window.as_millis()).unwrap_or(u64::MAX))
}
