//! What calls may use and what they cost: plans, budgets, limits, prices, and where it is written down.
//!
//!     [plan], account.plan ──> Plan       what an account may use in a day, and what happens beyond
//!     auth.token.budget ────> Budget     what a token may use in a day or a month
//!     [limits], [[limit]] ──> Limits     how much in a time, for whoever shares a counter
//!     [prices] ─────────────> Tariffs    what other providers cost
//!     [ledger] ─────────────> Ledger     where all of that is kept
//!     [fleet] ──────────────> Fleet      with whom it is shared (`fleet.rs`)

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::check::{Check, state};
use super::fleet::{self, Fleet, FleetSection};
use super::gateway::Technique;
use super::machine::Surroundings;
use super::tariff::Tariffs;
use crate::base::{Neurons, Result};
use crate::task::Task;

/// `[plan]`: what accounts may use of the models of this machine, unless `[[account]] plan` says otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlanSection {
    /// Neurons of each day that cost nothing; the day ends at midnight UTC.
    pub neurons_per_day: f64,
    /// Beyond them: `"bill"`, calls go on and are billed at 0.011 USD per 1,000 neurons; `"refuse"`, they are refused with
    /// 429 (code 4006) until midnight UTC.
    pub beyond: Beyond,
    /// With `beyond = "refuse"`, an answer for which less is left than it may take: `"finish"`, it may use what it needs, and
    /// the debt counts against the next day; `"cut"`, it is ended where the allocation is.
    pub at_the_end: AtTheEnd,
}

impl Default for PlanSection {
    fn default() -> Self {
        Self { neurons_per_day: 10_000.0, beyond: Beyond::Bill, at_the_end: AtTheEnd::Finish }
    }
}

/// What happens beyond an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Beyond {
    /// Calls go on and are billed.
    #[default]
    Bill,
    /// Calls are refused.
    Refuse,
}

/// What happens to an answer that may take more than is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum AtTheEnd {
    /// It may use what it needs.
    #[default]
    Finish,
    /// It is ended where the allocation is.
    Cut,
}

/// `[limits]`: how much callers may ask for in a time; `[[limit]]` adds rules of one's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Whom the catalog's limits count for (requests a minute of each account and model: 300 for text generation, 3000 for
    /// embeddings …): `"tokens"`, whoever shows a token; `"all"`, callers without one as well; `"off"`, nobody.
    pub catalog: CatalogLimits,
    /// Addresses, or networks such as `"10.0.0.0/8"`, of proxies whose `X-Forwarded-For` is believed. Rules by `ip` count
    /// the address before the last of them; without any, the address that the connection comes from.
    pub trusted_proxies: Vec<String>,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self { catalog: CatalogLimits::Tokens, trusted_proxies: Vec::new() }
    }
}

/// Whom the catalog's limits count for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CatalogLimits {
    /// Whoever shows a token.
    Tokens,
    /// Everybody.
    All,
    /// Nobody.
    Off,
}

/// `[[limit]]`: how much callers may ask for in a time. A call counts in every rule that it falls under, and is refused with
/// 429 if any of them is used up; nothing is counted then. Write one or more of `requests`, `tokens`, `neurons` and `usd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitSection {
    /// Names the rule in refusals and metrics.
    /// Example: `"each-address"`
    pub name: String,
    /// Who shares a counter: those who are alike in all of these. `"ip"`, `"authorization"` (the credentials shown),
    /// `"token"`, `"account"`, `"gateway"`, `"provider"`, `"model"`, `"task"`, `"header:NAME"`, `"metadata:KEY"`. Left out:
    /// all calls share one.
    /// Example: `["ip"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by: Vec<String>,
    /// Requests in the window.
    /// Example: `100`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Tokens in the window, prompt and answer.
    /// Example: `200000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Neurons in the window, of the models of this machine.
    /// Example: `5000.0`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neurons: Option<f64>,
    /// US dollars in the window, of all providers.
    /// Example: `10.0`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd: Option<f64>,
    /// Length of the window in seconds.
    /// Example: `60`
    pub window_s: u64,
    /// `"fixed"`: windows begin at multiples of their length on the clock (UTC). `"sliding"`: of the window before, as much
    /// counts as still lies within one length of now.
    #[serde(default)]
    pub technique: WindowTechnique,
    /// Only calls of these accounts count. Left out: of all.
    /// Example: `["acme"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accounts: Vec<String>,
    /// Only calls through these gateways. Left out: all calls, through gateways or not.
    /// Example: `["prod"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    /// Only calls to these providers, however they are reached; `"workers-ai"` is this machine. Left out: to all.
    /// Example: `["openai"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub providers: Vec<String>,
    /// Only calls of these models, however they are reached. Left out: of all.
    /// Example: `["gpt-4o"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Only calls of these tasks, as the catalog names them; models of other providers have none. Left out: of all.
    /// Example: `["text-generation"]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<Task>,
}

/// How a window lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum WindowTechnique {
    /// On the clock.
    #[default]
    Fixed,
    /// Up to now.
    Sliding,
}

/// `[[auth.token]] budget`: what one token may use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetSection {
    /// Neurons a day, of the models of this machine; the day ends at midnight UTC.
    /// Example: `1000.0`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neurons_per_day: Option<f64>,
    /// Neurons in a month of the calendar.
    /// Example: `20000.0`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neurons_per_month: Option<f64>,
    /// US dollars a day, of all providers.
    /// Example: `5.0`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_per_day: Option<f64>,
    /// US dollars in a month of the calendar.
    /// Example: `100.0`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_per_month: Option<f64>,
}

/// `[prices]`: what other providers' models cost.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct PricesSection {
    /// A file in the form of `configs/prices.toml` (US dollars per million tokens, by provider and model) that adds to the
    /// built-in list and wins over it. Left out: the built-in list.
    /// Example: `"prices.toml"`
    pub path: Option<PathBuf>,
}

/// `[ledger]`: where it is written down who used what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LedgerSection {
    /// Folder of the ledger. What was settled survives a crash; calls that were open then are not charged.
    /// Left out: `ledger` in the state directory: `$STATE_DIRECTORY` (set by systemd's `StateDirectory=`), or
    /// `$XDG_STATE_HOME/neurond`, or `~/.local/state/neurond`; without any of them a restart begins with an empty ledger.
    /// Example: `"/var/lib/neurond/ledger"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// How long settlements are gathered before they are written to disk together, in milliseconds.
    pub gather_ms: u64,
    /// When the disk is full or broken: `"refuse"`, calls that cost something are refused with 503 until it is back;
    /// `"unmetered"`, they are served within their limits, and neither charged nor listed.
    pub on_fault: OnFault,
}

impl Default for LedgerSection {
    fn default() -> Self {
        Self { folder: None, gather_ms: 5, on_fault: OnFault::Refuse }
    }
}

/// What happens when the disk is full or broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OnFault {
    /// Calls are refused.
    #[default]
    Refuse,
    /// Calls are served.
    Unmetered,
}

/// What calls may use and what they cost.
#[derive(Debug, Clone)]
pub struct Metering {
    /// Of accounts of which nothing is said.
    pub plan: Plan,
    /// How much in a time.
    pub limits: Arc<Limits>,
    /// What other providers cost.
    pub tariffs: Arc<Tariffs>,
    /// Where it is written down.
    pub ledger: Ledger,
    /// With whom it is shared; `None`: nobody.
    pub fleet: Option<Fleet>,
}

/// See `PlanSection`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Neurons of each day that cost nothing.
    pub allocation: Neurons,
    /// Beyond them.
    pub beyond: Beyond,
    /// An answer that may take more than is left.
    pub at_the_end: AtTheEnd,
}

/// See `BudgetSection`. What is `None` has no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Budget {
    /// Of this machine's models, a day.
    pub neurons_per_day: Option<Neurons>,
    /// Of this machine's models, a month.
    pub neurons_per_month: Option<Neurons>,
    /// Of all providers, a day, as neurons of 0.000011 USD.
    pub cost_per_day: Option<Neurons>,
    /// Of all providers, a month.
    pub cost_per_month: Option<Neurons>,
}

/// See `LimitsSection`.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Whom the catalog's limits count for.
    pub catalog: CatalogLimits,
    /// Proxies that are believed.
    pub proxies: Vec<Network>,
    /// In the order written.
    pub rules: Vec<Rule>,
}

/// Addresses with the same beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// See `LimitSection`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Names it in refusals.
    pub name: Arc<str>,
    /// Who shares a counter.
    pub by: Vec<By>,
    /// What is counted, and how much of it there may be: requests, tokens, micro-neurons.
    pub counts: Vec<(Counted, u64)>,
    /// Length of the window.
    pub window: Duration,
    /// How it lies.
    pub technique: Technique,
    /// Empty: all.
    pub accounts: Vec<String>,
    /// Empty: all, through a gateway or not.
    pub gateways: Vec<String>,
    /// Empty: all.
    pub providers: Vec<String>,
    /// Empty: all.
    pub models: Vec<String>,
    /// Empty: all.
    pub tasks: Vec<Task>,
}

impl Rule {
    /// Whether it takes knowing who is asked to say if a call falls under it.
    pub fn is_of_target(&self) -> bool {
        let by = self.by.iter().any(|by| matches!(by, By::Provider | By::Model | By::Task));
        by || !(self.providers.is_empty() && self.models.is_empty() && self.tasks.is_empty())
    }
}

/// What those have in common who share a counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// Their address.
    Ip,
    /// The credentials they show.
    Authorization,
    /// The token of ours.
    Token,
    /// Who pays.
    Account,
    /// Through which gateway.
    Gateway,
    /// Who is asked.
    Provider,
    /// For which model.
    Model,
    /// What that does.
    Task,
    /// A header, in lower case.
    Header(String),
    /// An entry of their metadata.
    Metadata(String),
}

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Calls.
    Requests,
    /// Tokens, prompt and answer.
    Tokens,
    /// Micro-neurons of this machine's models.
    Neurons,
    /// Micro-neurons as money, of all providers.
    Cost,
}

/// See `LedgerSection`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    /// Its folder; `None`: it is kept in memory.
    pub folder: Option<PathBuf>,
    /// How long settlements are gathered.
    pub gather: Duration,
    /// When the disk is full or broken.
    pub on_fault: OnFault,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let beyond = match (self.beyond, self.at_the_end) {
            (Beyond::Bill, _) => "then billed",
            (Beyond::Refuse, AtTheEnd::Finish) => "then refused",
            (Beyond::Refuse, AtTheEnd::Cut) => "then cut and refused",
        };
        write!(f, "{} neurons a day, {beyond}", self.allocation)
    }
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address.parse::<IpAddr>().ok()?, Some(bits.parse::<u8>().ok()?)),
            None => (text.parse().ok()?, None),
        };
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(most);
        (bits <= most).then_some(Self { address, bits })
    }

    /// Whether an address begins so.
    pub fn holds(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(mine), IpAddr::V4(other)) => {
                let rest = 32 - u32::from(self.bits);
                (u64::from(mine.to_bits()) >> rest) == (u64::from(other.to_bits()) >> rest)
            }
            (IpAddr::V6(mine), IpAddr::V6(other)) => {
                let rest = 128 - u32::from(self.bits);
                mine.to_bits().checked_shr(rest) == other.to_bits().checked_shr(rest)
            }
            _ => false,
        }
    }
}

/// What is written of it.
pub(super) struct Sections<'a> {
    pub plan: &'a PlanSection,
    pub limits: &'a LimitsSection,
    pub rules: &'a [LimitSection],
    pub prices: &'a PricesSection,
    pub ledger: &'a LedgerSection,
    pub fleet: &'a FleetSection,
}

pub(super) fn resolve(check: &mut Check, written: &Sections<'_>, folder: &Path, machine: &Surroundings) -> Metering {
    let mut proxies = Vec::new();
    for text in &written.limits.trusted_proxies {
        match Network::parse(text) {
            Some(network) => proxies.push(network),
            None => {
                let remedy = "is no address and no network; write 10.0.0.1, or 10.0.0.0/8";
                check.wrong("limits.trusted_proxies", format_args!("{text:?}"), remedy);
            }
        }
    }
    let mut rules: Vec<Rule> = Vec::new();
    for (index, section) in written.rules.iter().enumerate() {
        let rule = rule(check, &format!("limit[{index}]"), section);
        if rules.iter().any(|other| other.name == rule.name) {
            check.wrong(&format!("limit[{index}].name"), format_args!("{:?}", section.name), "is written twice");
        }
        rules.push(rule);
    }
    let path = written.prices.path.as_ref().map(|path| folder.join(path));
    let tariffs: Result<Tariffs> = Tariffs::load(path.as_deref());
    let tariffs = tariffs.unwrap_or_else(|error| {
        check.problem(error.message());
        Tariffs::default()
    });
    let ledger = written.ledger;
    if !(1..=1000).contains(&ledger.gather_ms) {
        check.wrong("ledger.gather_ms", ledger.gather_ms, "is not from 1 to 1000; 5 is the default");
    }
    Metering {
        plan: plan(check, "plan", written.plan),
        limits: Arc::new(Limits { catalog: written.limits.catalog, proxies, rules }),
        tariffs: Arc::new(tariffs),
        ledger: Ledger {
            folder: ledger.folder.as_ref().map(|path| folder.join(path)).or_else(|| state(machine, "ledger")),
            gather: Duration::from_millis(ledger.gather_ms),
            on_fault: ledger.on_fault,
        },
        fleet: fleet::resolve(check, written.fleet, folder, machine),
    }
}

pub(super) fn plan(check: &mut Check, key: &str, section: &PlanSection) -> Plan {
    Plan {
        allocation: amount(check, &format!("{key}.neurons_per_day"), section.neurons_per_day, neurons),
        beyond: section.beyond,
        at_the_end: section.at_the_end,
    }
}

pub(super) fn budget(check: &mut Check, key: &str, section: &BudgetSection) -> Budget {
    let mut bound = |name: &str, value: Option<f64>, unit: fn(f64) -> Neurons| {
        value.map(|value| amount(check, &format!("{key}.{name}"), value, unit))
    };
    Budget {
        neurons_per_day: bound("neurons_per_day", section.neurons_per_day, neurons),
        neurons_per_month: bound("neurons_per_month", section.neurons_per_month, neurons),
        cost_per_day: bound("usd_per_day", section.usd_per_day, Neurons::from_usd),
        cost_per_month: bound("usd_per_month", section.usd_per_month, Neurons::from_usd),
    }
}

fn amount(check: &mut Check, key: &str, value: f64, unit: fn(f64) -> Neurons) -> Neurons {
    // A hundred million dollars are nine billion neurons, and fit.
    if !(0.0..=1e8).contains(&value) {
        check.wrong(key, value, "is not from 0 to 100000000");
        return Neurons::ZERO;
    }
    unit(value)
}

fn neurons(value: f64) -> Neurons {
    Neurons::from_micro((value * 1e6).round() as u64)
}

fn rule(check: &mut Check, key: &str, section: &LimitSection) -> Rule {
    if section.name.is_empty() || section.name.len() > 64 || section.name.chars().any(|c| c.is_control() || c == '"') {
        let remedy = "is not a name: write up to 64 letters, which refusals show";
        check.wrong(&format!("{key}.name"), format_args!("{:?}", section.name), remedy);
    }
    // A year: beyond it no counter lives.
    if !(1..=366 * 86_400).contains(&section.window_s) {
        check.wrong(&format!("{key}.window_s"), section.window_s, "is not from 1 to 31622400 seconds");
    }
    let mut by = Vec::new();
    for word in &section.by {
        match By::parse(word) {
            Some(one) if !by.contains(&one) => by.push(one),
            Some(_) => check.wrong(&format!("{key}.by"), format_args!("{word:?}"), "is written twice"),
            None => {
                let remedy = "is nothing that calls are told apart by; write \"ip\", \"authorization\", \"token\", \
                              \"account\", \"gateway\", \"provider\", \"model\", \"task\", \"header:NAME\" or \"metadata:KEY\"";
                check.wrong(&format!("{key}.by"), format_args!("{word:?}"), remedy);
            }
        }
    }
    let mut counts = Vec::new();
    counts.extend(section.requests.map(|limit| (Counted::Requests, limit)));
    counts.extend(section.tokens.map(|limit| (Counted::Tokens, limit)));
    if let Some(most) = section.neurons {
        counts.push((Counted::Neurons, amount(check, &format!("{key}.neurons"), most, neurons).micro()));
    }
    if let Some(usd) = section.usd {
        counts.push((Counted::Cost, amount(check, &format!("{key}.usd"), usd, Neurons::from_usd).micro()));
    }
    if counts.is_empty() {
        check.problem(&format!("{key} limits nothing; write requests, tokens, neurons or usd"));
    }
    Rule {
        name: section.name.as_str().into(),
        by,
        counts,
        window: Duration::from_secs(section.window_s),
        technique: match section.technique {
            WindowTechnique::Fixed => Technique::Fixed,
            WindowTechnique::Sliding => Technique::Sliding,
        },
        accounts: section.accounts.clone(),
        gateways: section.gateways.clone(),
        providers: section.providers.clone(),
        models: section.models.clone(),
        tasks: section.tasks.clone(),
    }
}

impl By {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "ip" => Self::Ip,
            "authorization" => Self::Authorization,
            "token" => Self::Token,
            "account" => Self::Account,
            "gateway" => Self::Gateway,
            "provider" => Self::Provider,
            "model" => Self::Model,
            "task" => Self::Task,
            _ => match word.split_once(':') {
                Some(("header", name)) if http::HeaderName::from_bytes(name.as_bytes()).is_ok() => {
                    Self::Header(name.to_ascii_lowercase())
                }
                Some(("metadata", key)) if !key.is_empty() => Self::Metadata(key.to_owned()),
                _ => return None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_holds_the_addresses_that_begin_as_it_does() {
        let check = |network: &str, address: &str, held: bool| {
            let network = Network::parse(network).unwrap_or_else(|| panic!("{network}"));
            assert_eq!(network.holds(address.parse().unwrap()), held, "{network:?} {address}");
        };
        check("10.0.0.0/8", "10.255.1.2", true);
        check("10.0.0.0/8", "11.0.0.0", false);
        check("10.0.0.1", "10.0.0.1", true);
        check("10.0.0.1", "::ffff:10.0.0.1", true);
        check("10.0.0.1", "10.0.0.2", false);
        check("0.0.0.0/0", "1.2.3.4", true);
        check("0.0.0.0/0", "::1", false);
        check("fd00::/8", "fd12::1", true);
        check("fd00::/8", "fe80::1", false);
        check("::/0", "2001:db8::1", true);
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "a", "10.0.0.1/"] {
            assert_eq!(Network::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_calls_are_told_apart_by_has_names() {
        assert_eq!(By::parse("header:X-User"), Some(By::Header("x-user".into())));
        assert_eq!(By::parse("metadata:plan"), Some(By::Metadata("plan".into())));
        for wrong in ["header:", "header:a b", "metadata:", "user", ""] {
            assert_eq!(By::parse(wrong), None, "{wrong}");
        }
    }
}
