//! What is kept and told of calls: records, where they are shipped to, sums, and alerts.
//!
//! Shapes are checked here; whether a destination can be one, and whether a rule makes sense, whoever uses them says at start.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::check::{Check, state};
use super::machine::Surroundings;
use super::value::ByteSize;
use crate::base::Secret;

/// `[logs]`: records of calls through gateways, with their bodies. They are listed under
/// `/client/v4/accounts/{account}/ai-gateway/gateways/{gateway}/logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogsSection {
    /// Keep records here. Without it they are still shipped where `[[ship]]` says, and counted.
    pub keep: bool,
    /// Folder of the records, of what waits to be shipped, and of sums.
    /// Left out: `logs` in the state directory: `$STATE_DIRECTORY` (set by systemd's `StateDirectory=`), or
    /// `$XDG_STATE_HOME/neurond`, or `~/.local/state/neurond`; without any of them nothing is kept but sums, in memory.
    /// Example: `"/var/lib/neurond/logs"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// How much is kept of a request's body, and of its answer's: bytes, or text such as `"64KiB"`. 0: none. A call's
    /// `cf-aig-collect-log-payload: false` keeps none of its own.
    pub body_bytes: ByteSize,
    /// Records of one gateway at most, unless it says so itself (`log_management`); the oldest go.
    pub max_records: u64,
    /// Records go when they are so old. 0: never for their age.
    pub max_age_days: u32,
    /// Disk for records; the oldest of all go.
    pub max_bytes: ByteSize,
    /// What is taken out of bodies and metadata before they are kept or shipped: `"keys"` (of providers, tokens, passwords in
    /// headers and JSON), `"emails"`, `"cards"`, `"phones"`.
    pub redact: Vec<String>,
    /// Disk for what waits to be shipped.
    pub spool_bytes: ByteSize,
    /// When that is full: `"drop"`, the oldest records go; `"refuse"`, new ones are not taken. Both are counted.
    pub spool_full: SpoolFull,
    /// Records are shipped in objects that are closed after so many seconds,
    pub ship_every_s: u64,
    /// or when they hold so many bytes before compression.
    pub ship_bytes: ByteSize,
}

impl Default for LogsSection {
    fn default() -> Self {
        Self {
            keep: true,
            folder: None,
            body_bytes: ByteSize(64 << 10),
            max_records: 10_000_000,
            max_age_days: 30,
            max_bytes: ByteSize(16 << 30),
            redact: ["keys", "emails", "cards", "phones"].map(str::to_owned).to_vec(),
            spool_bytes: ByteSize(1 << 30),
            spool_full: SpoolFull::Drop,
            ship_every_s: 60,
            ship_bytes: ByteSize(16 << 20),
        }
    }
}

/// What happens when the spool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum SpoolFull {
    /// The oldest records go.
    #[default]
    Drop,
    /// New ones are not taken.
    Refuse,
}

/// `[[redact]]`: a pattern of one's own that is taken out of records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedactSection {
    /// Names it in what stands in its place.
    /// Example: `"customer-number"`
    pub name: String,
    /// A regular expression.
    /// Example: `"KD-[0-9]{8}"`
    pub pattern: String,
    /// What stands in its place. Left out: `[NAME]`.
    /// Example: `"[customer]"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replacement: Option<String>,
}

/// `[[ship]]`: where records are shipped to, at most four places.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShipSection {
    /// Names it in metrics and logs, and its place in what was shipped: lower-case letters, digits, `-` and `_`.
    /// Example: `"archive"`
    pub name: String,
    /// `"s3"`: a bucket of S3, or of what speaks like it. `"folder"`: a folder. `"http"`: a server that takes POSTs.
    /// Example: `"s3"`
    pub to: ShipTo,
    /// `"ndjson"`: objects are lines of JSON, compressed (`.log.gz`). `"parquet"`: tables (`.parquet`), for `"s3"` and `"folder"`.
    /// Example: `"ndjson"`
    #[serde(default)]
    pub format: ShipFormat,
    /// Gateways whose records are shipped there, as `"GATEWAY"` or `"ACCOUNT/GATEWAY"`; `["*"]`: all. Left out: those that have
    /// `logpush` switched on.
    /// Example: `["*"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    /// What names of objects begin with.
    /// Example: `"prod/logs"`
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// Of `"s3"` and `"http"`: the address, without the bucket.
    /// Example: `"https://s3.eu-central-1.amazonaws.com"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Of `"folder"`: where.
    /// Example: `"/var/log/neurond"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Of `"s3"`: the region. Left out: `auto`.
    /// Example: `"eu-central-1"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Of `"s3"`: the bucket.
    /// Example: `"my-logs"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// Of `"s3"`: the bucket is a part of the path and not of the host's name, as small servers want it.
    #[serde(default)]
    pub path_style: bool,
    /// Of `"s3"`: the id of the access key.
    /// Example: `"AKIA0123456789EXAMPLE"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_key_id: Option<String>,
    /// Environment variable with the secret: the secret access key, or the whole `Authorization` of `"http"`.
    /// Example: `"S3_SECRET"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_env: Option<String>,
    /// File with the secret. A leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=` sets.
    /// Example: `"$CREDENTIALS_DIRECTORY/s3"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// The server may be on a private address; those of other `[[ship]]` blocks may be then as well.
    #[serde(default)]
    pub allow_private: bool,
}

/// Kinds of places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShipTo {
    /// A bucket.
    S3,
    /// A folder.
    Folder,
    /// A server that takes POSTs.
    Http,
}

/// What objects are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ShipFormat {
    /// Lines of JSON.
    #[default]
    Ndjson,
    /// Tables.
    Parquet,
}

/// `[analytics]`: sums of all calls, by `/client/v4/accounts/{account}/ai-gateway/analytics` and `neurond usage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnalyticsSection {
    /// Hours with figures by the minute.
    pub minutes_for_hours: u32,
    /// Days with figures by the hour.
    pub hours_for_days: u32,
    /// Days with figures by the day.
    pub days_for_days: u32,
    /// Combinations of account, gateway, provider, model, key, status and cache that are told apart in a minute, an hour or a
    /// day; what is more counts as `other`.
    pub series: usize,
}

impl Default for AnalyticsSection {
    fn default() -> Self {
        Self { minutes_for_hours: 48, hours_for_days: 60, days_for_days: 800, series: 2000 }
    }
}

/// `[alerts]`: who is told when something is wrong. `[[alert]]` says what is wrong, `[[channel]]` who is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlertsSection {
    /// How often rules are looked at.
    pub every_s: u64,
    /// Folder of what was told, so that a restart does not tell it again.
    /// Left out: `alerts` in the state directory, as for `[logs]`; without it, in memory.
    /// Example: `"/var/lib/neurond/alerts"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// What messages call this machine.
    pub instance: String,
}

impl Default for AlertsSection {
    fn default() -> Self {
        Self { every_s: 10, folder: None, instance: "neurond".into() }
    }
}

/// `[[alert]]`: what is wrong from when on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlertSection {
    /// Names it in messages.
    /// Example: `"costs-of-the-day"`
    pub name: String,
    /// `"cost"` (US dollars since midnight UTC, or in `window_s`), `"error_rate"` (percent of requests), `"latency_p95"`
    /// (milliseconds), `"allocation_used"` (percent of an account's neurons of the day), `"device_down"` (seconds).
    /// Example: `"cost"`
    pub what: AlertOn,
    /// It is wrong from here on.
    /// Example: `50.0`
    pub above: f64,
    /// It is right again below this. Left out: below `above`.
    /// Example: `45.0`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
    /// Seconds up to now that are looked at. Left out: 300; for costs, since midnight UTC.
    /// Example: `600`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_s: Option<u64>,
    /// Fewer requests than this in the window say nothing. Left out: 20.
    /// Example: `50`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_requests: Option<u64>,
    /// Of `"error_rate"`: 4xx are errors as well.
    #[serde(default)]
    pub client_errors: bool,
    /// Only this account's calls.
    /// Example: `"acme"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// Only calls through this gateway.
    /// Example: `"prod"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Only calls to this provider.
    /// Example: `"openai"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Only calls of this model.
    /// Example: `"gpt-4o"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Seconds that it must be wrong before anybody is told. Left out: 0.
    /// Example: `60`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_s: Option<u64>,
    /// Seconds that it must be right before it is over. Left out: 0.
    /// Example: `60`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolve_after_s: Option<u64>,
    /// Seconds after which it is told again while it lasts; 0: never. Left out: 14400, four hours.
    /// Example: `3600`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat_s: Option<u64>,
    /// `"info"`, `"warning"` or `"critical"`.
    #[serde(default)]
    pub severity: AlertSeverity,
    /// Names of the channels that are told. Left out: all.
    /// Example: `["ops"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<String>,
    /// What to look at next, in your words.
    /// Example: `"Look at the dashboard first."`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlertOn {
    /// US dollars.
    Cost,
    /// Percent of requests.
    ErrorRate,
    /// Milliseconds.
    LatencyP95,
    /// Percent of the day's neurons.
    AllocationUsed,
    /// Seconds.
    DeviceDown,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum AlertSeverity {
    /// Good to know.
    Info,
    /// To be looked at in working hours.
    #[default]
    Warning,
    /// To be looked at now.
    Critical,
}

/// `[[channel]]`: who is told of alerts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelSection {
    /// What `[[alert]] channels` calls it.
    /// Example: `"ops"`
    pub name: String,
    /// `"mail"` (SMTP), `"slack"` (an incoming webhook of Slack, or of what takes the same), `"webhook"` (signed JSON).
    /// Example: `"mail"`
    pub to: ChannelTo,
    /// Of `"mail"`: the server's name; its certificate must be for it.
    /// Example: `"smtp.example.com"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Of `"mail"`. Left out: 587 with STARTTLS, 465 with TLS, 25 in plain.
    /// Example: `587`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of `"mail"`: `"starttls"`, `"tls"`, or `"plain"` for a server on this machine.
    #[serde(default)]
    pub security: MailSecurity,
    /// Of `"mail"`: the user; the password is the secret.
    /// Example: `"neurond"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Of `"mail"`: the sender.
    /// Example: `"neurond <neurond@example.com>"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Of `"mail"`: who gets it.
    /// Example: `["ops@example.com"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recipients: Vec<String>,
    /// Of `"mail"`: PEM file of certificate authorities that are believed besides those of the web.
    /// Example: `"/etc/ssl/certs/internal.pem"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Of `"slack"` and `"webhook"`: the address. Slack's is a secret: leave it out and name where the secret is.
    /// Example: `"https://alerts.example.com/neurond"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Environment variable with the secret: the password of `"mail"`, the address of `"slack"`, or what calls of `"webhook"` are
    /// signed with (`X-Neurond-Signature`).
    /// Example: `"ALERT_SECRET"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_env: Option<String>,
    /// File with the secret. A leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=` sets.
    /// Example: `"$CREDENTIALS_DIRECTORY/alerts"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// The server may be on a private address.
    #[serde(default)]
    pub allow_private: bool,
}

/// Kinds of channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChannelTo {
    /// SMTP.
    Mail,
    /// Slack.
    Slack,
    /// Signed JSON.
    Webhook,
}

/// How a connection to a mail server is kept private.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum MailSecurity {
    /// It must turn to TLS before anything is said.
    #[default]
    StartTls,
    /// TLS from the first byte.
    Tls,
    /// Not at all.
    Plain,
}

/// What is kept and told of calls.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    /// As it is written.
    pub logs: LogsSection,
    /// Its folder, resolved; `None`: nothing is kept.
    pub folder: Option<PathBuf>,
    /// Patterns of one's own.
    pub redact: Vec<RedactSection>,
    /// Where records are shipped to.
    pub ship: Vec<WithSecret<ShipSection>>,
    /// Sums.
    pub analytics: AnalyticsSection,
    /// As it is written.
    pub alerts: AlertsSection,
    /// Its folder, resolved.
    pub alerts_folder: Option<PathBuf>,
    /// What is wrong from when on.
    pub rules: Vec<AlertSection>,
    /// Who is told.
    pub channels: Vec<WithSecret<ChannelSection>>,
}

/// A block, and the secret that it names the place of.
#[derive(Debug, Clone, PartialEq)]
pub struct WithSecret<T> {
    /// Paths are resolved.
    pub section: T,
    /// What is there.
    pub secret: Option<Secret<String>>,
    /// The text of its `ca_file`.
    pub authorities: Option<String>,
}

/// What is written of it.
pub(super) struct Sections<'a> {
    pub logs: &'a LogsSection,
    pub redact: &'a [RedactSection],
    pub ship: &'a [ShipSection],
    pub analytics: &'a AnalyticsSection,
    pub alerts: &'a AlertsSection,
    pub rules: &'a [AlertSection],
    pub channels: &'a [ChannelSection],
}

pub(super) fn resolve(check: &mut Check, written: &Sections<'_>, folder: &Path, machine: &Surroundings) -> Records {
    const REDACTED: [&str; 4] = ["keys", "emails", "cards", "phones"];
    for word in &written.logs.redact {
        if !REDACTED.contains(&word.as_str()) {
            let remedy = "is nothing that is known; write \"keys\", \"emails\", \"cards\" or \"phones\", and [[redact]] for others";
            check.wrong("logs.redact", format_args!("{word:?}"), remedy);
        }
    }
    if written.logs.ship_every_s == 0 {
        check.wrong("logs.ship_every_s", 0, "would close an object for every record; 60 is the default");
    }
    for (index, section) in written.redact.iter().enumerate() {
        if let Err(error) = regex::Regex::new(&section.pattern) {
            let remedy = format!("is no regular expression: {error}");
            check.wrong(&format!("redact[{index}].pattern"), format_args!("{:?}", section.pattern), &remedy);
        }
    }
    let secrets = Secrets { folder, machine };
    let ship = written.ship.iter().enumerate().map(|(index, section)| {
        let key = format!("ship[{index}]");
        let secret = secrets.read(check, &key, section.secret_env.as_deref(), section.secret_file.as_deref());
        let needs: &[(&str, bool)] = match section.to {
            ShipTo::S3 => &[
                ("url", section.url.is_some()),
                ("bucket", section.bucket.is_some()),
                ("access_key_id", section.access_key_id.is_some()),
                ("secret_env or secret_file", section.secret_env.is_some() || section.secret_file.is_some()),
            ],
            ShipTo::Folder => &[("path", section.path.is_some())],
            ShipTo::Http => &[("url", section.url.is_some())],
        };
        lacks(check, &key, needs);
        if section.to == ShipTo::Http && section.format == ShipFormat::Parquet {
            let remedy = "is for \"s3\" and \"folder\"; leave it out, and the server gets \"ndjson\"";
            check.wrong(&format!("{key}.format"), "\"parquet\"", remedy);
        }
        let mut section = section.clone();
        section.path = section.path.map(|path| folder.join(path));
        WithSecret { section, secret, authorities: None }
    });
    let ship = ship.collect();
    let channels = written.channels.iter().enumerate().map(|(index, section)| {
        let key = format!("channel[{index}]");
        let secret = secrets.read(check, &key, section.secret_env.as_deref(), section.secret_file.as_deref());
        let needs: &[(&str, bool)] = match section.to {
            ChannelTo::Mail => &[
                ("host", section.host.is_some()),
                ("from", section.from.is_some()),
                ("recipients", !section.recipients.is_empty()),
            ],
            ChannelTo::Slack => &[("url, secret_env or secret_file", section.url.is_some() || secret.is_some())],
            ChannelTo::Webhook => &[("url", section.url.is_some())],
        };
        lacks(check, &key, needs);
        let authorities = section.ca_file.as_ref().and_then(|path| {
            let path = folder.join(path);
            let read = (machine.text)(&path);
            read.map_err(|error| {
                check.wrong(&format!("{key}.ca_file"), path.display(), &format!("cannot be read: {error}"))
            })
            .ok()
        });
        WithSecret { section: section.clone(), secret, authorities }
    });
    let channels = channels.collect();
    let own = |written: &Option<PathBuf>, name: &str| {
        written.as_ref().map(|path| folder.join(path)).or_else(|| state(machine, name))
    };
    Records {
        logs: written.logs.clone(),
        folder: own(&written.logs.folder, "logs"),
        redact: written.redact.to_vec(),
        ship,
        analytics: written.analytics.clone(),
        alerts: written.alerts.clone(),
        alerts_folder: own(&written.alerts.folder, "alerts"),
        rules: written.rules.to_vec(),
        channels,
    }
}

fn lacks(check: &mut Check, key: &str, needs: &[(&str, bool)]) {
    for (name, _) in needs.iter().filter(|(_, is_there)| !is_there) {
        check.problem(&format!("{key} lacks {name}"));
    }
}

/// Where secrets are that a block only names.
pub(super) struct Secrets<'a> {
    pub(super) folder: &'a Path,
    pub(super) machine: &'a Surroundings<'a>,
}

impl Secrets<'_> {
    pub(super) fn read(
        &self,
        check: &mut Check,
        key: &str,
        env: Option<&str>,
        file: Option<&Path>,
    ) -> Option<Secret<String>> {
        if env.is_some() && file.is_some() {
            check.problem(&format!("{key} has both secret_env and secret_file; keep one of them"));
        }
        if let Some(name) = env {
            let value = (self.machine.variable)(name).filter(|value| !value.is_empty());
            if value.is_none() {
                check.wrong(&format!("{key}.secret_env"), format_args!("{name:?}"), "is not set in the environment");
            }
            return value.map(Secret::new);
        }
        let path = file?;
        let path = match path.strip_prefix("$CREDENTIALS_DIRECTORY") {
            Ok(rest) => Path::new(&(self.machine.variable)("CREDENTIALS_DIRECTORY").unwrap_or_default()).join(rest),
            Err(_) => self.folder.join(path),
        };
        match (self.machine.text)(&path) {
            Ok(text) => Some(Secret::new(text.trim().to_owned())),
            Err(error) => {
                check.wrong(&format!("{key}.secret_file"), path.display(), &format!("cannot be read: {error}"));
                None
            }
        }
    }
}
