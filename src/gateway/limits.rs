//! From rules to counters: which limits a call falls under, and whose counter that is.
//!
//! ```text
//!   request ─ [[limit]] ─> Ruled ─┬─ windows of the call: by address, credentials, account, gateway …
//!                                 └─ those that depend on who is asked ── target ──> windows of an attempt
//!   gateway ─ rate limit, spend limits ───────────────────────────────────^
//!   token ─── budget ─────────────────────────────────────────────────────^
//! ```
//!
//! Counts nothing: the ledger does. What tells two counters apart is hashed, so that no address and no credential is kept.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::{AUTHORIZATION, HeaderMap, HeaderName};
use serde_json::{Map, Value};

use crate::base::{AccountId, Error, KeyId, Kind, Limit, ModelId, Neurons};
use crate::config::gateway::{self, RateLimit, Scope, SpendRule};
use crate::config::{self, AtTheEnd, Budget, By, CatalogEntry, Counted, Limits, Network, Rule};
use crate::ledger::{AtLimit, Beyond, Counts, Denied, Plan, Span, Technique, What, Window};
use crate::route::{self, LimitNode};
use crate::task::Task;

/// A rate limit longer than this is not worth waiting for: a client that obeys `Retry-After` would sleep all the while.
pub const WORTH_WAITING: Duration = Duration::from_secs(60);

/// Where callers show who they are.
static CREDENTIALS: [HeaderName; 5] = [
    AUTHORIZATION,
    HeaderName::from_static("cf-aig-authorization"),
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// What of a request tells callers apart.
pub struct Seen<'a> {
    /// Where its connection comes from.
    pub peer: Option<IpAddr>,
    /// All of them.
    pub headers: &'a HeaderMap,
    /// Who pays.
    pub account: &'a AccountId,
    /// The token of ours that was shown.
    pub key: Option<&'a KeyId>,
    /// Through which gateway, if through one.
    pub gateway: Option<&'a str>,
    /// What the caller sent along.
    pub metadata: Option<&'a Map<String, Value>>,
}

/// The rules of the operator's own that a call falls under.
#[derive(Debug, Clone, Default)]
pub struct Ruled {
    /// Counters of the call.
    pub windows: Vec<Window>,
    /// Rules that depend on who is asked, by number, with what of the counter is known already.
    later: Vec<(usize, Named)>,
    limits: Option<Arc<Limits>>,
}

impl Ruled {
    /// Those of a request.
    pub fn of(limits: Arc<Limits>, seen: &Seen<'_>) -> Self {
        let mut ruled = Self::default();
        for (number, rule) in limits.rules.iter().enumerate() {
            if !admits(&rule.accounts, seen.account.as_str()) {
                continue;
            }
            if !rule.gateways.is_empty() && !seen.gateway.is_some_and(|id| admits(&rule.gateways, id)) {
                continue;
            }
            let named = counter(rule, seen, &limits.proxies);
            match rule.is_of_target() {
                false => windows(rule, named.id(), &mut ruled.windows),
                true => ruled.later.push((number, named)),
            }
        }
        ruled.limits = (!ruled.later.is_empty()).then_some(limits);
        ruled
    }

    /// Adds the counters of one who is asked.
    pub fn of_target(&self, provider: &str, model: &str, task: Option<Task>, out: &mut Vec<Window>) {
        let Some(limits) = &self.limits else { return };
        for (number, named) in &self.later {
            let rule = &limits.rules[*number];
            let is_task = rule.tasks.is_empty() || task.is_some_and(|task| rule.tasks.contains(&task));
            if !is_task || !admits(&rule.providers, provider) || !admits(&rule.models, model) {
                continue;
            }
            let mut named = named.clone();
            for by in &rule.by {
                match by {
                    By::Provider => named.add(provider),
                    By::Model => named.add(model),
                    By::Task => named.add(task.map_or("", Task::name)),
                    _ => {}
                }
            }
            windows(rule, named.id(), out);
        }
    }
}

fn admits(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|one| one == name)
}

/// What tells this caller's counter from others', as far as the request says it.
fn counter(rule: &Rule, seen: &Seen<'_>, proxies: &[Network]) -> Named {
    let mut named = Named::of("rule", &rule.name);
    for by in &rule.by {
        match by {
            By::Ip => match address(seen, proxies) {
                Some(IpAddr::V4(ip)) => named.add(ip.octets()),
                Some(IpAddr::V6(ip)) => named.add(ip.octets()),
                None => named.add(""),
            },
            By::Authorization => {
                // Credentials may come in any of them; together they say who it is.
                for name in &CREDENTIALS {
                    named.add(seen.headers.get(name).map_or(&[][..], |value| value.as_bytes()));
                }
            }
            By::Token => named.add(seen.key.map_or("", |key| key.as_str())),
            By::Account => named.add(seen.account.as_str()),
            By::Gateway => {
                named.add(seen.account.as_str());
                named.add(seen.gateway.unwrap_or_default());
            }
            By::Header(name) => named.add(seen.headers.get(name).map_or(&[][..], |value| value.as_bytes())),
            By::Metadata(key) => named.add(metadata(seen.metadata, key)),
            By::Provider | By::Model | By::Task => {}
        }
    }
    named
}

/// Where the call comes from: the last address that is no proxy of ours, as each proxy adds the one before it.
fn address(seen: &Seen<'_>, proxies: &[Network]) -> Option<IpAddr> {
    let is_ours = |address: IpAddr| proxies.iter().any(|network| network.holds(address));
    let mut address = seen.peer?.to_canonical();
    if !is_ours(address) {
        return Some(address);
    }
    let values: Vec<_> = seen.headers.get_all("x-forwarded-for").filter_map(|value| value.to_str().ok()).collect();
    let mut named = values.iter().rev().flat_map(|value| value.rsplit(',')).map(str::trim);
    while is_ours(address) {
        // A word that is no address was written by nobody we believe.
        let Some(before) = named.next().and_then(parse) else { break };
        address = before;
    }
    Some(address)
}

/// An address with or without a port.
fn parse(text: &str) -> Option<IpAddr> {
    let bare = text.trim_start_matches('[').split(']').next()?;
    let address = bare.parse().or_else(|_| text.parse().map(|socket: std::net::SocketAddr| socket.ip()));
    address.ok().map(|address| address.to_canonical())
}

fn metadata(all: Option<&Map<String, Value>>, key: &str) -> String {
    match all.and_then(|all| all.get(key)) {
        None => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn windows(rule: &Rule, id: u128, out: &mut Vec<Window>) {
    for (counted, limit) in &rule.counts {
        let counts = match counted {
            Counted::Requests => Counts::Requests,
            Counted::Tokens => Counts::Tokens,
            Counted::Neurons => Counts::Neurons,
            Counted::Cost => Counts::Cost,
        };
        out.push(Window {
            // The same callers' counters of other things lie beside it.
            id: id.wrapping_add(*counted as u128),
            rule: rule.name.clone(),
            limit: *limit,
            span: Span::Millis(rule.window.as_millis() as u64),
            technique: technique(rule.technique),
            counts,
        });
    }
}

/// The rate limit of a gateway.
pub fn of_gateway(account: &AccountId, gateway: &str, limit: &RateLimit) -> Window {
    let mut named = Named::of("gateway", gateway);
    named.add(account.as_str());
    Window {
        id: named.id(),
        rule: gateway.into(),
        limit: limit.limit,
        span: Span::Millis(limit.interval.as_millis() as u64),
        technique: technique(limit.technique),
        counts: Counts::Requests,
    }
}

/// The counter of a spend limit of a gateway; `None` where the rule is not about this call.
pub fn of_spending(
    account: &AccountId,
    gateway: &str,
    rule: &SpendRule,
    told: Option<&Map<String, Value>>,
    (provider, model): (&str, &str),
) -> Option<Window> {
    let mut named = Named::of("spend", gateway);
    named.add(account.as_str());
    named.add(&rule.id);
    let sides = rule.metadata.iter().map(|(key, scope)| (metadata(told, key), scope));
    let sides = sides.chain(rule.model.iter().map(|scope| (model.to_owned(), scope)));
    for (value, scope) in sides.chain(rule.provider.iter().map(|scope| (provider.to_owned(), scope))) {
        match scope {
            Scope::Partition => named.add(&value),
            Scope::Filter(values) if values.contains(&value) => {}
            Scope::Filter(_) => return None,
        }
    }
    Some(Window {
        id: named.id(),
        rule: rule.id.as_str().into(),
        limit: Neurons::from_usd(rule.limit_usd).micro(),
        span: Span::Millis(rule.window.as_millis() as u64),
        technique: technique(rule.technique),
        counts: Counts::Cost,
    })
}

/// The counters of a token's budget: of neurons, or of money.
pub fn of_budget(key: &KeyId, budget: &Budget, money: bool, out: &mut Vec<Window>) {
    let (day, month, counts) = match money {
        true => (budget.cost_per_day, budget.cost_per_month, Counts::Cost),
        false => (budget.neurons_per_day, budget.neurons_per_month, Counts::Neurons),
    };
    for (limit, span, name) in [(day, Span::DAY, "day"), (month, Span::Month, "month")] {
        let Some(limit) = limit else { continue };
        let mut named = Named::of("budget", key.as_str());
        named.add(name);
        named.mark(u8::from(money));
        out.push(Window {
            id: named.id(),
            rule: format!("budget of {key} a {name}").into(),
            limit: limit.micro(),
            span,
            technique: Technique::Fixed,
            counts,
        });
    }
}

/// The catalog's limit on requests a minute: of the task, all its models together, or of a model that has its own.
pub fn of_catalog(account: &AccountId, entry: &CatalogEntry) -> Window {
    let own = entry.has_own_rate();
    let mut named = Named::of("catalog", account.as_str());
    named.add(if own { entry.id.as_str() } else { entry.task.name() });
    named.mark(u8::from(own));
    Window {
        id: named.id(),
        rule: if own { entry.id.as_str().into() } else { entry.task.name().into() },
        limit: u64::from(entry.rate_per_minute),
        span: Span::Millis(60_000),
        technique: Technique::Fixed,
        counts: Counts::Requests,
    }
}

/// The counter of a limit in a dynamic route.
pub fn of_route(route: &str, limit: &LimitNode, key: &str) -> Window {
    let mut named = Named::of("route", route);
    named.add(&*limit.id);
    named.add(key);
    let (counts, most) = match limit.counts {
        route::Counts::Requests => (Counts::Requests, limit.limit as u64),
        route::Counts::Cost => (Counts::Cost, Neurons::from_usd(limit.limit).micro()),
    };
    Window {
        id: named.id(),
        rule: limit.id.clone(),
        limit: most,
        span: Span::Millis(limit.window_s.max(1) * 1000),
        technique: match limit.technique {
            route::Technique::Fixed => Technique::Fixed,
            route::Technique::Sliding => Technique::Sliding,
        },
        counts,
    }
}

/// How an account pays.
pub fn plan(plan: &config::Plan) -> Plan {
    Plan {
        allocation: plan.allocation,
        beyond: match plan.beyond {
            config::Beyond::Bill => Beyond::Bill,
            config::Beyond::Refuse => Beyond::Refuse,
        },
        at_limit: match plan.at_the_end {
            AtTheEnd::Finish => AtLimit::Finish,
            AtTheEnd::Cut => AtLimit::Cut,
        },
    }
}

/// What a caller hears who may not go on; `target` is whom it asked.
pub fn refusal(denied: Denied, provider: &str, model: &ModelId) -> Error {
    let over = match denied {
        Denied::Over(over) => over,
        Denied::Settled => return Error::internal("The request was settled before."),
        Denied::Faulty => {
            let message = "What calls cost cannot be written down at this moment (the disk); try again in a moment.";
            return Error::new(Kind::LedgerDown, message).with_retry_after(Duration::from_secs(5));
        }
        Denied::Unleased => {
            let message = "The store that shares limits with other servers does not answer at this moment; try again in a moment.";
            return Error::new(Kind::LedgerDown, message).with_retry_after(Duration::from_secs(1));
        }
        Denied::Dead => return Error::internal("The ledger is not answering."),
    };
    let wait = over.retry_after_ms.map(Duration::from_millis);
    let (limit, left) = (over.limit, over.left);
    let usd = |micro: u64| Neurons::from_micro(micro).usd();
    let error = match (over.what, over.counts) {
        (What::Allocation, _) => Error::new(
            Kind::OutOfNeurons,
            format!(
                "you have used up your daily free allocation of {} neurons, please upgrade to a plan that goes on \
                 beyond it, or wait until 00:00 UTC",
                thousands(limit / 1_000_000)
            ),
        ),
        (What::Budget, Counts::Cost) => {
            let message = format!(
                "Spend limit exceeded: rule '{}' (cost limit {:.2} USD) for {provider} {model}",
                over.rule,
                usd(limit)
            );
            Error::new(Kind::OverBudget, message)
        }
        (What::Budget, _) => {
            let message = format!(
                "Spend limit exceeded: rule '{}' (limit {} neurons) for {provider} {model}",
                over.rule,
                Neurons::from_micro(limit)
            );
            Error::new(Kind::OverBudget, message)
        }
        (What::Window, counts) => {
            let what = if counts == Counts::Tokens { "tokens" } else { "requests" };
            let when = match wait {
                Some(wait) => format!("try again in {} s", wait.as_secs_f64().ceil()),
                None => "it asks for more than the limit at once".to_owned(),
            };
            let message = format!("Rate limited: rule '{}' allows {limit} {what}, {left} are left; {when}.", over.rule);
            Error::new(Kind::RateLimited, message)
        }
    };
    let limit = Limit { limit, left, reset: wait.unwrap_or_default() };
    let error = error.with_limit(limit);
    match wait {
        Some(wait) => error.with_retry_after(wait),
        None => error,
    }
}

/// Which kind of limit it was, for metrics.
pub fn label(denied: &Denied) -> &'static str {
    match denied {
        Denied::Over(over) => match over.what {
            What::Window => "rate",
            What::Budget => "budget",
            What::Allocation => "allocation",
        },
        Denied::Settled => "settled",
        Denied::Unleased => "fleet",
        Denied::Faulty | Denied::Dead => "ledger",
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn technique(technique: gateway::Technique) -> Technique {
    match technique {
        gateway::Technique::Fixed => Technique::Fixed,
        gateway::Technique::Sliding => Technique::Sliding,
    }
}

/// What a counter is named by: a kind of rule, one rule, and what tells callers apart. Hashed when it is whole, since a hash under way
/// is two kilobytes that would be carried from hand to hand. Most fit into the 64 bytes that BLAKE3 takes at once.
#[derive(Debug, Clone)]
struct Named(Vec<u8>);

impl Named {
    fn of(kind: &str, name: &str) -> Self {
        let mut named = Self(Vec::with_capacity(128));
        named.add(kind);
        named.add(name);
        named
    }

    /// With its length, so that no two values run into each other: a byte, or 255 and eight.
    fn add(&mut self, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        match u8::try_from(value.len()) {
            Ok(len) if len < u8::MAX => self.0.push(len),
            _ => {
                self.0.push(u8::MAX);
                self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
            }
        }
        self.0.extend_from_slice(value);
    }

    fn mark(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn id(&self) -> u128 {
        let mut half = [0; 16];
        half.copy_from_slice(&blake3::hash(&self.0).as_bytes()[..16]);
        u128::from_le_bytes(half)
    }
}
