//! What the request path reads: everything compiled, secrets open, never changed once made.
//!
//!     View ── fixed: what the file says
//!        └─── accounts: by account, what the API was told ── gateway, its keys and routes by name; custom providers
//!
//! Where both have something of one name, the file's counts. One exception: a key that an account has stored goes before a key of the
//! file that is everybody's.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};
use tracing::error;

use super::book::{Book, GatewayRecord, KeyRecord, ProviderRecord, RouteRecord, header_name, setting_name};
use crate::base::{AccountId, Error, Lookup, Millis, Result, Secret};
use crate::config::gateway::{
    Action, CUSTOM, Fixed, FixedGateway, FixedProvider, Settings, Sides, Timeouts, canonical, each_secret,
};
use crate::guard::{self, Guard};
use crate::route::Graph;
use crate::vault::seal::Sealer;

/// The alias that is meant when none is named.
pub(super) const DEFAULT: &str = "default";

/// All that was told, at one moment.
pub struct View {
    pub(super) fixed: Arc<FixedView>,
    pub(super) accounts: Lookup<String, Arc<AccountView>>,
}

/// A gateway, ready to serve.
pub struct Gateway {
    /// Its name.
    pub id: Arc<str>,
    /// What it does.
    pub settings: Settings,
    /// Its rules and schemas, compiled.
    pub guard: Guard,
    /// Part of the keys of its cached answers: another number, and all of them are forgotten.
    pub generation: u64,
    /// Says all of its settings: the same on every daemon that was told the same.
    pub shape: u64,
    /// Written in the file.
    pub fixed: bool,
}

/// A provider that is not built in, ready to be called.
#[derive(Debug)]
pub struct CustomProvider {
    /// Without `custom-`.
    pub slug: String,
    /// Without a slash at its end.
    pub base_url: String,
    /// Private addresses are allowed.
    pub allow_private: bool,
    /// Sent with each call.
    pub headers: Vec<(String, Secret<String>)>,
    /// How long to wait for it.
    pub timeouts: Timeouts,
    /// Part of the keys of cached answers: another number, and all of its answers are forgotten.
    pub generation: u64,
}

/// A key that stands in for the caller's.
#[derive(Debug)]
pub struct StoredKey {
    /// Names it in logs.
    pub id: String,
    /// Canonical slug.
    pub provider: String,
    /// Its name.
    pub alias: String,
    /// The key itself.
    pub secret: Secret<String>,
    /// Most requests with it, in so many seconds.
    pub rate_limit: Option<(f64, f64)>,
    /// Meant when no alias is named.
    default: bool,
}

/// The version of a route that is in force.
pub struct DeployedRoute {
    /// Of the route.
    pub id: String,
    /// As callers name it.
    pub name: String,
    /// Which version.
    pub version: String,
    /// What it does.
    pub graph: Graph,
}

/// What the file says, compiled.
pub(super) struct FixedView {
    pub written: Fixed,
    pub since: Millis,
    gateways: Lookup<String, Vec<Owned<Gateway>>>,
    customs: Lookup<String, Vec<Owned<CustomProvider>>>,
    providers: Lookup<String, Vec<Owned<FixedProvider>>>,
    keys: Lookup<String, Vec<Owned<StoredKey>>>,
}

/// Somebody's, or everybody's.
type Owned<T> = (Option<AccountId>, Arc<T>);

/// What an account has told, as it was told and compiled.
#[derive(Default)]
pub(super) struct AccountView {
    pub book: Book,
    gateways: Lookup<String, Arc<Gateway>>,
    parts: Lookup<String, Parts>,
    customs: Lookup<String, Arc<CustomProvider>>,
}

/// What belongs to a gateway, wherever that is written.
#[derive(Default)]
struct Parts {
    keys: Lookup<String, Vec<Arc<StoredKey>>>,
    routes: Lookup<String, Arc<DeployedRoute>>,
}

impl View {
    /// A gateway of an account.
    pub fn gateway(&self, account: &str, id: &str) -> Option<Arc<Gateway>> {
        if let Some(fixed) = pick(&self.fixed.gateways, id, account) {
            return Some(fixed.clone());
        }
        self.accounts.get(account)?.gateways.get(id).cloned()
    }

    /// A provider that is not built in, by its slug without `custom-`; one that is switched off is none.
    pub fn custom(&self, account: &str, slug: &str) -> Option<Arc<CustomProvider>> {
        if let Some(fixed) = pick(&self.fixed.customs, slug, account) {
            return Some(fixed.clone());
        }
        self.accounts.get(account)?.customs.get(slug).cloned()
    }

    /// What the file says of a built-in provider: another address, timeouts.
    pub fn provider(&self, account: &str, slug: &str) -> Option<Arc<FixedProvider>> {
        pick(&self.fixed.providers, canonical(slug), account).cloned()
    }

    /// The key that stands in for a caller's: the one of that alias; without an alias the one that was made the default, or else the
    /// one whose alias is `default`, and with the alias `default` the other way round. A key of the file answers to both.
    pub fn secret(
        &self,
        account: &str,
        gateway: &str,
        provider_slug: &str,
        alias: Option<&str>,
    ) -> Option<Arc<StoredKey>> {
        let provider = canonical(provider_slug);
        let stored = || {
            let keys = self.accounts.get(account)?.parts.get(gateway)?.keys.get(provider)?;
            let named = |name: &str| keys.iter().find(|key| key.alias == name);
            let default = || keys.iter().find(|key| key.default);
            let found = match alias {
                Some(DEFAULT) => named(DEFAULT).or_else(default),
                Some(alias) => named(alias),
                None => default().or_else(|| named(DEFAULT)),
            };
            found.cloned()
        };
        if alias.is_some_and(|alias| alias != DEFAULT) {
            return stored();
        }
        let fixed = self.fixed.keys.get(provider).map(Vec::as_slice).unwrap_or_default();
        let own = fixed.iter().find(|(owner, _)| owner.as_ref().is_some_and(|owner| owner.as_str() == account));
        let everybodys = || fixed.iter().find(|(owner, _)| owner.is_none()).map(|(_, key)| key.clone());
        own.map(|(_, key)| key.clone()).or_else(stored).or_else(everybodys)
    }

    /// The version of a route that is in force.
    pub fn route(&self, account: &str, gateway: &str, name: &str) -> Option<Arc<DeployedRoute>> {
        self.accounts.get(account)?.parts.get(gateway)?.routes.get(name).cloned()
    }

    /// A gateway of the file, as it was written.
    pub(super) fn fixed_gateway(&self, account: &str, id: &str) -> Option<&FixedGateway> {
        owned(&self.fixed.written.gateways, account, |gateway| &gateway.account, |gateway| gateway.id == id)
    }

    /// A custom provider of the file, as it was written.
    pub(super) fn fixed_provider(&self, account: &str, slug: &str) -> Option<&FixedProvider> {
        let is = |provider: &FixedProvider| provider.slug.strip_prefix(CUSTOM) == Some(slug);
        owned(&self.fixed.written.providers, account, |provider| &provider.account, is)
    }

    /// What an account has told.
    pub(super) fn book(&self, account: &str) -> Option<&Book> {
        self.accounts.get(account).map(|account| &account.book)
    }
}

/// An account's own before everybody's.
fn pick<'a, T>(all: &'a Lookup<String, Vec<Owned<T>>>, name: &str, account: &str) -> Option<&'a Arc<T>> {
    let list = all.get(name)?;
    let own = list.iter().find(|(owner, _)| owner.as_ref().is_some_and(|owner| owner.as_str() == account));
    own.or_else(|| list.iter().find(|(owner, _)| owner.is_none())).map(|(_, found)| found)
}

fn owned<'a, T>(
    all: &'a [T],
    account: &str,
    owner: impl Fn(&T) -> &Option<AccountId>,
    is: impl Fn(&T) -> bool,
) -> Option<&'a T> {
    let of = |wanted: Option<&str>| {
        all.iter().find(|item| is(item) && owner(item).as_ref().map(AccountId::as_str) == wanted)
    };
    of(Some(account)).or_else(|| of(None))
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("fixed", &self.fixed.written)
            .field("accounts", &self.accounts.values().map(|account| &account.book).collect::<Vec<_>>())
            .finish()
    }
}

/// Whether what the file says can be compiled: for whoever checks a configuration without serving.
///
/// # Errors
/// `BadInput` with a line for each mistake.
pub fn check(fixed: &Fixed) -> Result<()> {
    FixedView::new(fixed.clone(), Millis(0)).map(drop)
}

impl FixedView {
    /// Compiles it.
    ///
    /// # Errors
    /// `BadInput` with a line for each mistake.
    pub(super) fn new(written: Fixed, since: Millis) -> Result<Self> {
        let mut view = Self {
            since,
            gateways: Lookup::default(),
            customs: Lookup::default(),
            providers: Lookup::default(),
            keys: Lookup::default(),
            written,
        };
        let mut problems = Vec::new();
        for gateway in &view.written.gateways {
            let FixedGateway { account, id, fields, settings, origin } = gateway;
            let guard = match compile_guard(settings) {
                Ok(guard) => guard,
                Err(error) => {
                    problems.push(format!("{origin}: gateway {id}: {error}"));
                    continue;
                }
            };
            let shape = shape_of(fields);
            let generation = if settings.cache_invalidate_on_update { generation_of(fields) } else { 0 };
            let gateway =
                Gateway { id: id.as_str().into(), settings: settings.clone(), guard, generation, shape, fixed: true };
            view.gateways.entry(id.clone()).or_default().push((account.clone(), Arc::new(gateway)));
        }
        for provider in &view.written.providers {
            let FixedProvider { account, slug, base_url, allow_private, key, timeouts, origin: _ } = provider;
            if let Some(secret) = key {
                let key = StoredKey {
                    id: format!("file:{slug}"),
                    provider: slug.clone(),
                    alias: DEFAULT.into(),
                    secret: secret.clone(),
                    rate_limit: None,
                    default: true,
                };
                view.keys.entry(slug.clone()).or_default().push((account.clone(), Arc::new(key)));
            }
            match (slug.strip_prefix(CUSTOM), base_url) {
                (Some(slug), Some(base_url)) => {
                    let custom = CustomProvider {
                        slug: slug.to_owned(),
                        base_url: base_url.clone(),
                        allow_private: *allow_private,
                        headers: Vec::new(),
                        timeouts: *timeouts,
                        generation: short_hash(base_url.as_bytes()),
                    };
                    view.customs.entry(slug.to_owned()).or_default().push((account.clone(), Arc::new(custom)));
                }
                _ => {
                    let entry = view.providers.entry(slug.clone()).or_default();
                    entry.push((account.clone(), Arc::new(provider.clone())));
                }
            }
        }
        if problems.is_empty() { Ok(view) } else { Err(Error::bad_input(problems.join("\n"))) }
    }
}

impl AccountView {
    /// Compiles a book; what did not change since `before` is taken from there. What cannot be used is left out, loudly: a gateway
    /// without its guard would be an open one.
    pub(super) fn new(account: &str, book: Book, before: Option<&Self>, sealer: &Sealer) -> Self {
        let mut view = Self::default();
        for (id, record) in &book.gateways {
            let same = before.filter(|before| before.book.gateways.get(id) == Some(record));
            let gateway = match same.and_then(|before| before.gateways.get(id)) {
                Some(gateway) => Ok(gateway.clone()),
                None => gateway(account, id, record, sealer).map(Arc::new),
            };
            match gateway {
                Ok(gateway) => {
                    view.gateways.insert(id.clone(), gateway);
                }
                Err(error) => error!(account, gateway = id, %error, "a gateway cannot be used and is not served"),
            }
        }
        for record in &book.keys {
            match stored_key(account, record, sealer) {
                Ok(key) => {
                    let keys = &mut view.parts.entry(record.gateway.clone()).or_default().keys;
                    keys.entry(record.provider.clone()).or_default().push(Arc::new(key));
                }
                Err(error) => {
                    let (gateway, provider, alias) = (&record.gateway, &record.provider, &record.alias);
                    error!(account, gateway, provider, alias, %error, "a stored key cannot be used");
                }
            }
        }
        for record in &book.routes {
            let same = before.filter(|before| before.book.routes.contains(record));
            let same = same.and_then(|before| before.parts.get(&record.gateway)?.routes.get(&record.name));
            match same.cloned().map_or_else(|| route(record).map(Arc::new), Ok) {
                Ok(route) => {
                    let routes = &mut view.parts.entry(record.gateway.clone()).or_default().routes;
                    routes.insert(record.name.clone(), route);
                }
                Err(error) => {
                    let (gateway, route) = (&record.gateway, &record.name);
                    error!(account, gateway, route, %error, "a route cannot be used");
                }
            }
        }
        for record in book.providers.iter().filter(|record| record.enable) {
            match custom(account, record, sealer) {
                Ok(custom) => {
                    view.customs.insert(record.slug.clone(), Arc::new(custom));
                }
                Err(error) => error!(account, provider = record.slug, %error, "a custom provider cannot be used"),
            }
        }
        view.book = book;
        view
    }
}

fn gateway(account: &str, id: &str, record: &GatewayRecord, sealer: &Sealer) -> Result<Gateway> {
    let mut open = record.fields.clone();
    each_secret(&mut open, |label, text| {
        sealer.open(&setting_name(account, id, label), text)?.expose().clone_into(text);
        Ok(())
    })?;
    let settings = checked(&open)?;
    let guard = compile_guard(&settings)?;
    let shape = shape_of(&open);
    Ok(Gateway { id: id.into(), settings, guard, generation: record.generation, shape, fixed: false })
}

/// Settings of fields whose secrets are open.
///
/// # Errors
/// `BadInput` with all mistakes in one line.
pub(super) fn checked(open: &Map<String, Value>) -> Result<Settings> {
    Settings::check(open).map_err(|problems| {
        let words: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let error = Error::bad_input(words.join("; "));
        match problems.into_iter().next() {
            Some(first) => error.with_param(first.key),
            None => error,
        }
    })
}

/// The guard of a gateway.
///
/// # Errors
/// `BadInput` that names the rule or schema and what is wrong with it.
pub(super) fn compile_guard(settings: &Settings) -> Result<Guard> {
    let rules: Vec<_> = settings
        .rules
        .iter()
        .map(|rule| guard::Rule {
            name: rule.name.as_str().into(),
            pattern: rule.pattern.as_str().into(),
            on: match rule.sides {
                Sides { request: true, response: false } => guard::On::Request,
                Sides { request: false, response: true } => guard::On::Response,
                _ => guard::On::Both,
            },
            action: match rule.action {
                Action::Block => guard::Action::Block,
                Action::Flag => guard::Action::Flag,
            },
        })
        .collect();
    let schemas = &settings.schemas;
    Guard::new(&rules, guard::Schemas { request: schemas.request.clone(), response: schemas.response.clone() })
}

fn stored_key(account: &str, record: &KeyRecord, sealer: &Sealer) -> Result<StoredKey> {
    Ok(StoredKey {
        id: record.id.to_string(),
        provider: record.provider.clone(),
        alias: record.alias.clone(),
        secret: sealer.open(&record.seal_name(account), &record.sealed)?,
        rate_limit: record.rate_limit.zip(record.rate_limit_period),
        default: record.default,
    })
}

fn route(record: &RouteRecord) -> Result<DeployedRoute> {
    let version = record.deployed().ok_or_else(|| Error::internal("no version of it is deployed"))?;
    Ok(DeployedRoute {
        id: record.id.to_string(),
        name: record.name.clone(),
        version: version.id.to_string(),
        graph: Graph::parse(&version.elements)?,
    })
}

fn custom(account: &str, record: &ProviderRecord, sealer: &Sealer) -> Result<CustomProvider> {
    let id = record.id.to_string();
    let headers = record
        .headers
        .iter()
        .map(|(name, sealed)| Ok((name.clone(), sealer.open(&header_name(account, &id, name), sealed)?)));
    Ok(CustomProvider {
        slug: record.slug.clone(),
        base_url: record.base_url.trim_end_matches('/').to_owned(),
        allow_private: false,
        headers: headers.collect::<Result<_>>()?,
        timeouts: Timeouts::default(),
        generation: record.generation,
    })
}

/// Follows from what was written, so that it is the same after a restart and another one after any change.
fn generation_of(fields: &Map<String, Value>) -> u64 {
    short_hash(Value::Object(fields.clone()).to_string().as_bytes())
}

/// In whatever order it was told.
fn shape_of(fields: &Map<String, Value>) -> u64 {
    let mut fields = Value::Object(fields.clone());
    fields.sort_all_objects();
    short_hash(fields.to_string().as_bytes())
}

fn short_hash(bytes: &[u8]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(bytes).as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
