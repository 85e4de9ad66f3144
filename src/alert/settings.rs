//! What is watched, from which figure on it is wrong, and who is told. Plain data; `check.rs` says what of it cannot be meant.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::Secret;
use crate::net::client;

/// All of it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is watched. Names are unique.
    pub rules: Vec<Rule>,
    /// Who is told; nobody: alerts stand in the log and in the status only. Names are unique.
    pub channels: Vec<Channel>,
    /// Where it is kept what was told and what is still to be. Left out: in memory only, so that after a restart what lasts is
    /// told once more, and what could not be delivered is lost.
    pub folder: Option<PathBuf>,
    /// How often the rules are looked at. Usually 10 s.
    pub every: Duration,
    /// How long a channel is left alone after a delivery failed; doubles with each failure, up to ten minutes. Usually 5 s.
    pub retry: Duration,
    /// What messages call this installation: `neurond on gpu-1`.
    pub instance: String,
    /// How servers of Slack and webhooks are reached.
    pub http: client::Settings,
}

impl Settings {
    /// Nothing watched and nobody told, every 10 s, in memory.
    pub fn new(http: client::Settings) -> Self {
        Self {
            rules: Vec::new(),
            channels: Vec::new(),
            folder: None,
            every: Duration::from_secs(10),
            retry: Duration::from_secs(5),
            instance: "neurond".into(),
            http,
        }
    }
}

/// When something is wrong, and who hears of it.
#[derive(Clone, PartialEq, Debug)]
pub struct Rule {
    /// How it is called in messages, in the status, and when it is silenced.
    pub name: String,
    /// What is looked at.
    pub measure: Measure,
    /// Wrong from this figure on, in the unit of the measure ([`Measure::unit`]).
    pub threshold: f64,
    /// Right again below this figure, so that one that swings about the threshold does not fire each time. Left out: below the
    /// threshold.
    pub resolve_below: Option<f64>,
    /// How long it must be wrong before it fires. Only time with readings counts.
    pub hold: Duration,
    /// How long it must be right before it is over.
    pub resolve_after: Duration,
    /// How often it is told again while it lasts. Left out: once.
    pub repeat: Option<Duration>,
    /// How bad it is.
    pub severity: Severity,
    /// Names of the channels it goes to; none: all.
    pub channels: Vec<String>,
    /// What to look at next, in the words of who runs this. Left out: ours.
    pub note: Option<String>,
}

impl Rule {
    /// A warning at once, to everybody, told again every four hours, over as soon as it is right.
    pub fn new(name: impl Into<String>, measure: Measure, threshold: f64) -> Self {
        Self {
            name: name.into(),
            measure,
            threshold,
            resolve_below: None,
            hold: Duration::ZERO,
            resolve_after: Duration::ZERO,
            repeat: Some(Duration::from_secs(4 * 3600)),
            severity: Severity::Warning,
            channels: Vec::new(),
            note: None,
        }
    }
}

/// What figures are counted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// US dollars.
    Usd,
    /// Percent.
    Percent,
    /// Milliseconds.
    Milliseconds,
    /// Seconds.
    Seconds,
}

/// What is looked at, and whose.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Measure {
    /// Which figure.
    pub what: What,
    /// Whose.
    pub filter: Filter,
}

impl Measure {
    /// What its readings and thresholds are counted in.
    pub fn unit(&self) -> Unit {
        match self.what {
            What::Cost { .. } => Unit::Usd,
            What::ErrorRate { .. } | What::AllocationUsed => Unit::Percent,
            What::LatencyP95 { .. } => Unit::Milliseconds,
            What::DeviceDown => Unit::Seconds,
        }
    }
}

/// Figures there are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum What {
    /// USD spent.
    Cost {
        /// In the time up to now. Left out: since midnight UTC.
        window: Option<Duration>,
    },
    /// Percentage of requests that failed.
    ErrorRate {
        /// The time up to now that is looked at.
        window: Duration,
        /// What counts as a failure.
        errors: Errors,
        /// With fewer requests there is no reading.
        min_requests: u64,
    },
    /// Milliseconds within which 95 of 100 requests were answered.
    LatencyP95 {
        /// The time up to now that is looked at.
        window: Duration,
        /// With fewer requests there is no reading.
        min_requests: u64,
    },
    /// Percentage used of an account's neurons of this day. Without an account in the filter: of each, by its name.
    AllocationUsed,
    /// Seconds for which a device was not ready; of each, by its name.
    DeviceDown,
}

impl What {
    /// As it is written in messages for machines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cost { .. } => "cost",
            Self::ErrorRate { .. } => "error_rate",
            Self::LatencyP95 { .. } => "latency_p95",
            Self::AllocationUsed => "allocation_used",
            Self::DeviceDown => "device_down",
        }
    }

    /// The time up to now that is looked at, where it can be chosen.
    pub const fn window(self) -> Option<Duration> {
        match self {
            Self::Cost { window } => window,
            Self::ErrorRate { window, .. } | Self::LatencyP95 { window, .. } => Some(window),
            Self::AllocationUsed | Self::DeviceDown => None,
        }
    }

    pub(super) const fn is_share(self) -> bool {
        matches!(self, Self::ErrorRate { .. })
    }
}

/// Which answers are failures.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Errors {
    /// 5xx.
    #[default]
    Server,
    /// 4xx and 5xx.
    All,
}

/// Whose figures; what is left out is not looked at.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct Filter {
    /// Account id.
    pub account: Option<String>,
    /// Gateway id.
    pub gateway: Option<String>,
    /// Provider slug.
    pub provider: Option<String>,
    /// Model id.
    pub model: Option<String>,
}

impl Filter {
    /// What is set, by its name.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let parts = [
            ("account", &self.account),
            ("gateway", &self.gateway),
            ("provider", &self.provider),
            ("model", &self.model),
        ];
        parts.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }
}

/// How bad something is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// To be looked at in working hours.
    Warning,
    /// To be looked at now.
    Critical,
}

impl Severity {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// Somebody who is told.
#[derive(Clone, Debug)]
pub struct Channel {
    /// What rules call it.
    pub name: String,
    /// How it is reached.
    pub to: To,
}

/// How somebody is told.
#[derive(Clone, Debug)]
pub enum To {
    /// By mail.
    Mail(Mail),
    /// By what Slack calls an incoming webhook, and others take as well.
    Slack(Slack),
    /// By a signed JSON document.
    Webhook(Webhook),
}

/// Mail by SMTP.
#[derive(Clone, Debug)]
pub struct Mail {
    /// The server's name or address; its certificate must be for it.
    pub host: String,
    /// Left out: 587 with STARTTLS, 465 with TLS, 25 in plain.
    pub port: Option<u16>,
    /// How the connection is kept private.
    pub security: Security,
    /// Who we are to the server. Left out: nobody in particular.
    pub login: Option<Login>,
    /// The sender: `neurond <neurond@example.com>`.
    pub from: String,
    /// Who gets it, at least one.
    pub to: Vec<String>,
    /// Certificate authorities, as PEM, that are believed besides the web's.
    pub authorities: Option<String>,
}

impl Mail {
    /// Whether the server is this machine, where nobody listens on the wire.
    pub(super) fn is_local(&self) -> bool {
        self.host == "localhost" || self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

/// A user and a password.
#[derive(Clone, Debug)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The password.
    pub password: Secret<String>,
}

/// How a connection to a mail server is kept private.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Security {
    /// It begins in plain and must turn to TLS before anything is said.
    #[default]
    StartTls,
    /// TLS from the first byte.
    Tls,
    /// Not at all: for a server on this machine.
    Plain,
}

/// A Slack-shaped webhook.
#[derive(Clone, Debug)]
pub struct Slack {
    /// The URL, which is a secret.
    pub url: Secret<String>,
    /// Whether it may be on a private address.
    pub allow_private: bool,
}

/// A webhook of one's own: it takes a POST with a JSON object and answers 2xx. How calls are verified: [`Webhook::secret`].
///
/// ```text
/// id, alert         this notice; the same for all of one alert, from fired to resolved
/// event, number     fired, repeated, resolved or test; how often it was told before
/// rule, severity    the rule's name; info, warning or critical
/// measure, unit     cost (usd), error_rate (percent), latency_p95 (milliseconds), allocation_used (percent), device_down (seconds)
/// filter, of        whose figures, by name; which of several things, or null
/// value, peak       the last figure, or null; the largest since it is wrong
/// threshold, resolve_below        wrong from here on; right again below
/// since, at         since when it is wrong; when this was decided: milliseconds since 1970
/// instance, title, text, next     who says so; one line; all in words; what to look at next
/// ```
#[derive(Clone, Debug)]
pub struct Webhook {
    /// The URL, which may hold a secret.
    pub url: Secret<String>,
    /// What calls are signed with; left out: they are not.
    ///
    /// A call has three headers. `X-Neurond-Delivery` is the notice's id: the same when a notice is sent again, so whoever has
    /// seen it ignores it. `X-Neurond-Timestamp` is when it was sent, in seconds since 1970. `X-Neurond-Signature` is
    /// `sha256=` and the hex digits of HMAC-SHA256, keyed with this secret, over the timestamp as written, a dot, and the body
    /// byte for byte. To verify a call, compute the same over what came, compare in constant time, and refuse timestamps that
    /// are more than five minutes off:
    ///
    /// ```text
    /// expected = "sha256=" + hmac_sha256(secret, timestamp + "." + body).hex()
    /// ```
    pub secret: Option<Secret<String>>,
    /// Whether it may be on a private address.
    pub allow_private: bool,
}
