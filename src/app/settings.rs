//! From the configuration to the settings of ledger, log and alerts: the same, in the words of those who use them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use crate::alert::{self, Channel, Errors, Filter, Login, Mail, Measure, Security, Severity, Slack, To, Webhook, What};
use crate::base::{AccountId, Error, Result, Secret};
use crate::cache;
use crate::config::gateway::Otel;
use crate::config::{
    self, AlertOn, AlertSection, AlertSeverity, ChannelSection, ChannelTo, Config, MailSecurity, OnFault, OnLoss,
    ShipFormat, ShipSection, ShipTo, SpoolFull, WithSecret,
};
use crate::ledger;
use crate::logs::ship::{self, AtBound, Chosen, Destination, Format, Job};
use crate::logs::{self, Keep, Push, RedactRule, RedactRules, Redactor, Strategy, analytics, trace};
use crate::metrics::Metrics;
use crate::net::client;
use crate::net::redis::Address;
use crate::net::sigv4::Credentials;
use crate::registry::Registry;

/// Times an alert is told again, in seconds, where nobody says.
const REPEAT_S: u64 = 4 * 3600;

/// Of the ledger.
pub fn ledger(metering: &config::Metering) -> ledger::Settings {
    let config = &metering.ledger;
    ledger::Settings {
        folder: config.folder.clone(),
        commit_every: config.gather,
        on_fault: match config.on_fault {
            OnFault::Refuse => ledger::OnFault::Refuse,
            OnFault::Unmetered => ledger::OnFault::Unmetered,
        },
        fleet: metering.fleet.as_ref().map(fleet),
        ..ledger::Settings::default()
    }
}

fn fleet(config: &config::Fleet) -> ledger::Fleet {
    ledger::Fleet {
        store: store(config, &config.urls),
        name: config.name.clone(),
        share: config.share,
        on_loss: match config.on_loss {
            OnLoss::Refuse => ledger::OnLoss::Refuse,
            OnLoss::Local => ledger::OnLoss::Local,
        },
    }
}

fn store(config: &config::Fleet, urls: &[Secret<String>]) -> Address {
    Address {
        urls: urls.to_vec(),
        password: config.password.clone(),
        is_cluster: config.is_cluster,
        authorities: config.authorities.as_ref().map(|pem| pem.as_bytes().into()),
        timeout: config.timeout,
    }
}

/// Of what is shared of the cache, if anything is.
///
/// # Errors
/// When the store cannot be one.
pub fn shared_cache(metering: &config::Metering, metrics: &Arc<Metrics>) -> Result<Option<cache::Fleet>> {
    let Some((config, shared)) = metering.fleet.as_ref().and_then(|fleet| Some((fleet, fleet.cache.as_ref()?))) else {
        return Ok(None);
    };
    let store = store(config, &shared.urls);
    store.check().map_err(|error| Error::bad_input(format!("The fleet's store of cached answers: {error}.")))?;
    let (name, max_entry_bytes, metrics) = (config.name.clone(), shared.max_entry_bytes, metrics.clone());
    Ok(Some(cache::Fleet { store, name, max_entry_bytes, metrics }))
}

/// Of the log. What gateways say of it themselves is asked of the registry.
///
/// # Errors
/// When a destination cannot be one.
pub fn logs(config: &Config, registry: &Registry, client: client::Settings) -> Result<logs::Settings> {
    let records = &config.records;
    let written = &records.logs;
    let redacts = |word: &str| written.redact.iter().any(|one| one == word);
    let rules = RedactRules {
        keys: redacts("keys"),
        emails: redacts("emails"),
        cards: redacts("cards"),
        phones: redacts("phones"),
        custom: records
            .redact
            .iter()
            .map(|rule| RedactRule {
                name: rule.name.as_str().into(),
                pattern: rule.pattern.as_str().into(),
                replacement: rule.replacement.as_deref().map(Box::from),
            })
            .collect(),
    };
    let folder = records.folder.as_ref();
    let usual = Keep { records: written.max_records.max(1), strategy: Strategy::DeleteOldest };
    let of = registry.clone();
    let keep = move |account: &AccountId, gateway: &str| {
        let known = of.view().gateway(account.as_str(), gateway).and_then(|gateway| gateway.settings.log_limit);
        known.map_or(usual, |limit| Keep {
            records: limit.records,
            strategy: if limit.delete_oldest { Strategy::DeleteOldest } else { Strategy::StopInserting },
        })
    };
    let store = folder.filter(|_| written.keep).map(|folder| logs::StoreSettings {
        max_bytes: written.max_bytes.0,
        max_age: (written.max_age_days > 0).then(|| Duration::from_secs(u64::from(written.max_age_days) * 86_400)),
        keep: Arc::new(keep),
        ..logs::StoreSettings::new(folder.join("records"))
    });
    let traces = trace::Settings::new(client.clone());
    let ship = match folder {
        _ if records.ship.is_empty() => None,
        None => {
            let message = "[[ship]] needs a place for what waits: write logs.folder, or set STATE_DIRECTORY";
            return Err(Error::bad_input(message));
        }
        Some(folder) => {
            let jobs = records.ship.iter().map(job).collect();
            let mut client = client;
            client.allow_private |= records.ship.iter().any(|job| job.section.allow_private);
            let settings = ship::Settings::new(folder.join("spool"), jobs, client);
            Some(ship::Settings {
                segment_bytes: written.ship_bytes.0,
                segment_age: Duration::from_secs(written.ship_every_s.max(1)),
                max_bytes: written.spool_bytes.0,
                at_bound: match written.spool_full {
                    SpoolFull::Drop => AtBound::DropOldest,
                    SpoolFull::Refuse => AtBound::Refuse,
                },
                ..settings
            })
        }
    };
    let named: HashSet<(Option<String>, String)> =
        records.ship.iter().flat_map(|job| &job.section.gateways).map(|name| divided(name)).collect();
    let all = named.contains(&(None, "*".to_owned()));
    let of = registry.clone();
    let push = move |account: &AccountId, gateway: &str| {
        let known = of.view().gateway(account.as_str(), gateway);
        let settings = known.as_ref().map(|gateway| &gateway.settings);
        let is_named = || {
            named.contains(&(None, gateway.to_owned()))
                || named.contains(&(Some(account.as_str().to_owned()), gateway.to_owned()))
        };
        Push {
            enabled: all || settings.is_some_and(|settings| settings.logpush) || is_named(),
            key: settings.and_then(|settings| settings.logpush_public_key.as_deref()).map(Arc::from),
            traces: settings.map_or_else(Arc::default, |settings| settings.otel.iter().map(destination).collect()),
        }
    };
    let sums = &records.analytics;
    Ok(logs::Settings {
        store,
        redactor: Redactor::new(&rules)?,
        ship,
        traces,
        analytics: analytics::Settings {
            folder: folder.map(|folder| folder.join("analytics")),
            minutes_for_hours: sums.minutes_for_hours,
            hours_for_days: sums.hours_for_days,
            days_for_days: sums.days_for_days,
            series: sums.series,
            ..analytics::Settings::default()
        },
        push: Arc::new(push),
    })
}

fn destination(otel: &Otel) -> trace::Destination {
    let Otel { url, headers, authorization, protobuf, allow_private } = otel.clone();
    trace::Destination { url, headers, authorization, protobuf, allow_private }
}

/// `ACCOUNT/GATEWAY`, or a gateway of any account.
fn divided(name: &str) -> (Option<String>, String) {
    match name.split_once('/') {
        Some((account, gateway)) => (Some(account.to_owned()), gateway.to_owned()),
        None => (None, name.to_owned()),
    }
}

fn job(WithSecret { section, secret, .. }: &WithSecret<ShipSection>) -> Job {
    let ShipSection { name, gateways, prefix, url, path, region, bucket, path_style, access_key_id, .. } =
        section.clone();
    let url = url.unwrap_or_default();
    let destination = match section.to {
        ShipTo::S3 => Destination::S3 {
            endpoint: url,
            region: region.unwrap_or_else(|| "auto".to_owned()),
            bucket: bucket.unwrap_or_default(),
            credentials: Credentials {
                access_key_id: access_key_id.unwrap_or_default(),
                secret_access_key: secret.clone().unwrap_or_else(|| Secret::new(String::new())),
                session_token: None,
            },
            path_style,
        },
        ShipTo::Folder => Destination::Folder { path: path.unwrap_or_default() },
        ShipTo::Http => Destination::Http {
            url,
            headers: secret.iter().map(|secret| ("authorization".to_owned(), secret.clone())).collect(),
        },
    };
    let chosen = gateways.iter().filter(|name| *name != "*").map(|name| {
        let (account, gateway) = divided(name);
        Chosen { account: account.map(|account| AccountId::new(&account)), gateway }
    });
    let gateways = if gateways.iter().any(|name| name == "*") { Vec::new() } else { chosen.collect() };
    let format = match section.format {
        ShipFormat::Ndjson => Format::Lines,
        ShipFormat::Parquet => Format::Parquet,
    };
    Job { name, gateways, prefix, format, destination }
}

/// Of alerts.
///
/// # Errors
/// When something of them cannot be meant.
pub fn alerts(config: &Config, http: client::Settings) -> Result<alert::Settings> {
    let records = &config.records;
    let settings = alert::Settings {
        rules: records.rules.iter().map(rule).collect(),
        channels: records.channels.iter().map(channel).collect(),
        folder: records.alerts_folder.clone(),
        every: Duration::from_secs(records.alerts.every_s),
        instance: records.alerts.instance.clone(),
        ..alert::Settings::new(http)
    };
    settings.check()?;
    Ok(settings)
}

fn rule(section: &AlertSection) -> alert::Rule {
    let window = Duration::from_secs(section.window_s.unwrap_or(300));
    let min_requests = section.min_requests.unwrap_or(20);
    let what = match section.what {
        AlertOn::Cost => What::Cost { window: section.window_s.map(Duration::from_secs) },
        AlertOn::ErrorRate => What::ErrorRate {
            window,
            errors: if section.client_errors { Errors::All } else { Errors::Server },
            min_requests,
        },
        AlertOn::LatencyP95 => What::LatencyP95 { window, min_requests },
        AlertOn::AllocationUsed => What::AllocationUsed,
        AlertOn::DeviceDown => What::DeviceDown,
    };
    let AlertSection { account, gateway, provider, model, .. } = section.clone();
    let measure = Measure { what, filter: Filter { account, gateway, provider, model } };
    let repeat = section.repeat_s.unwrap_or(REPEAT_S);
    alert::Rule {
        resolve_below: section.below,
        hold: Duration::from_secs(section.for_s.unwrap_or(0)),
        resolve_after: Duration::from_secs(section.resolve_after_s.unwrap_or(0)),
        repeat: (repeat > 0).then(|| Duration::from_secs(repeat)),
        severity: match section.severity {
            AlertSeverity::Info => Severity::Info,
            AlertSeverity::Warning => Severity::Warning,
            AlertSeverity::Critical => Severity::Critical,
        },
        channels: section.channels.clone(),
        note: section.note.clone(),
        ..alert::Rule::new(section.name.clone(), measure, section.above)
    }
}

fn channel(WithSecret { section, secret, authorities }: &WithSecret<ChannelSection>) -> Channel {
    let url = || section.url.clone().map(Secret::new);
    let none = || Secret::new(String::new());
    let to = match section.to {
        ChannelTo::Mail => To::Mail(Mail {
            host: section.host.clone().unwrap_or_default(),
            port: section.port,
            security: match section.security {
                MailSecurity::StartTls => Security::StartTls,
                MailSecurity::Tls => Security::Tls,
                MailSecurity::Plain => Security::Plain,
            },
            login: section.user.clone().map(|user| Login { user, password: secret.clone().unwrap_or_else(none) }),
            from: section.from.clone().unwrap_or_default(),
            to: section.recipients.clone(),
            authorities: authorities.clone(),
        }),
        ChannelTo::Slack => To::Slack(Slack {
            url: secret.clone().or_else(url).unwrap_or_else(none),
            allow_private: section.allow_private,
        }),
        ChannelTo::Webhook => To::Webhook(Webhook {
            url: url().unwrap_or_else(none),
            secret: secret.clone(),
            allow_private: section.allow_private,
        }),
    };
    Channel { name: section.name.clone(), to }
}
