//! The life of a call that goes through a gateway, whoever answers it.
//!
//!     Ask --rules--> cache --Hit-----------------------------------------------------> Reply
//!                      |--Fill--> a task of its own: attempts --> shared answer --+
//!                      |--Follow: somebody asks the same at this moment ----------+--> Reply
//!                      '--not for keeping: attempts ---------------------------------> Reply
//!
//!     attempts:  step 1: try, wait, try ...  |  step 2  |  ...  until one answers; then the answer has begun
//!
//! Up to the head of an answer everything can be tried again; afterwards nothing can. One worker's relay: it knows the
//! engine of this process only as a function.

mod attempt;
mod credentials;
pub mod talk;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::body::BoxBody;
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderName, HeaderValue};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::unfold;
use http::Method;

use crate::base::{AccountId, Error, Kind, Millis, ModelId, Neurons, Result};
use crate::cache::{self, Cache, Common, Entry, FailedAnswer, FillTicket, Follower, Found, Lead, Material, Scope};
use crate::config::gateway::KeyFiles;
use crate::config::{self, Config, Live};
use crate::fallback::{Fallback, Policy};
use crate::gateway::asked::{Ask, Who};
use crate::gateway::bill::Receipt;
use crate::gateway::counts;
use crate::gateway::headers::{self, Headers};
use crate::gateway::hold;
use crate::gateway::limits;
use crate::gateway::pipe::{End, Pipe, Source, Words};
use crate::gateway::record::Record;
use crate::gateway::step::LocalCall;
use crate::gateway::watch::Watch;
use crate::ledger::{Claim, Counts, Ledger, Plan};
use crate::logs::{CacheUse, Logs};
use crate::metrics::Metrics;
use crate::net::client::{self, Client};
use crate::net::vertex::AccessToken;
use crate::registry::{Gateway, Registry};
use crate::vault::seal::Sealer;

use attempt::{Begun, MAX_FAILURE_BYTES, Trail, collect, content_type, is_events, is_frames};

/// How long an answer is kept that only a custom key asks to keep.
const KEY_ALONE_TTL: Duration = Duration::from_secs(300);
/// What a kept answer cost, in micro-neurons, among its headers; no caller sees it.
const COST: &str = "neurond-cost";

/// What all workers' relays share.
#[derive(Clone)]
pub struct Parts {
    /// Configuration in force.
    pub config: Live,
    /// Gateways, custom providers, stored keys, routes.
    pub registry: Registry,
    /// Answers that are given again.
    pub cache: Cache,
    /// How targets do.
    pub fallback: Fallback,
    /// What calls may use, and have used.
    pub ledger: Ledger,
    /// What is told of calls.
    pub logs: Logs,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

impl Parts {
    /// Opens what the configuration names: what was told before, answers that are kept.
    ///
    /// # Errors
    /// When a folder, a master key or what the file says of gateways cannot be used.
    pub fn start(
        live: &Live,
        ledger: &Ledger,
        fleet: Option<cache::Fleet>,
        metrics: &Arc<Metrics>,
        logs: impl FnOnce(&Config, &Registry) -> Result<Logs>,
    ) -> Result<Self> {
        let config = live.get();
        let KeyFiles { named, default, previous } = &config.key_files;
        let sealer = Sealer::open_files(named.as_deref(), default.as_deref(), previous)?;
        let registry = Registry::start(config.registry.as_deref(), config.fixed.clone(), sealer)?;
        let config::Cache { memory_bytes, disk_bytes, max_entries, max_entry_bytes, folder } = config.cache.clone();
        let settings = |folder| cache::Settings {
            memory_bytes,
            disk_bytes,
            max_entries,
            max_entry_bytes,
            folder,
            fleet: fleet.clone(),
        };
        let cache = Cache::start(settings(folder)).or_else(|error| {
            // A service's user may have no home to write to; answers that are lost at a restart are no reason not to start.
            tracing::warn!(%error, "answers are kept in memory only");
            Cache::start(settings(None))
        })?;
        let fallback = Fallback::start(Policy::default());
        let logs = logs(&config, &registry)?;
        let (config, ledger, metrics) = (live.clone(), ledger.clone(), metrics.clone());
        Ok(Self { config, registry, cache, fallback, ledger, logs, metrics })
    }
}

/// How workers' clients reach other servers.
///
/// # Errors
/// When the certificate authorities of the configuration cannot be read.
pub fn clients(upstream: &config::Upstream) -> Result<client::Settings> {
    let tls = client::Tls::new(upstream.authorities.as_deref())
        .map_err(|why| Error::bad_input(format!("upstream.ca_file {why}")))?;
    Ok(client::Settings {
        connect_timeout: upstream.connect_timeout,
        allow_private: upstream.allow_private,
        proxy: upstream.proxy.clone(),
        tls,
    })
}

/// Serves calls through gateways, on one HTTP worker.
pub struct Relay {
    /// What it has in common with others.
    pub parts: Parts,
    counts: Rc<counts::Counts>,
    last_scope: RefCell<Option<(Arc<Gateway>, AccountId, Names)>>,
    client: Client,
    local: Local,
    /// Google's access tokens, by the hash of the secret they were made from.
    tokens: RefCell<HashMap<[u8; 32], AccessToken>>,
    /// Whose turn it is to get one; the others wait and find it.
    turns: RefCell<HashMap<[u8; 32], Rc<tokio::sync::Mutex<()>>>>,
}

/// The engine of this process, as the HTTP floor serves it; who asks, and through which gateway.
pub type Local = Rc<dyn Fn(LocalCall, Who, Arc<str>) -> LocalBoxFuture<'static, LocalAnswer>>;

/// What the engine answers.
pub struct LocalAnswer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: Headers,
    /// What follows.
    pub body: BoxBody,
}

/// An answer that has begun.
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// What the upstream said, without what belongs to its connection, and what the gateway says.
    pub headers: Headers,
    /// What follows.
    pub pipe: Box<Pipe>,
    /// Closes with it.
    pub record: Box<Record>,
}

impl Relay {
    /// A relay with a client of its own.
    pub fn new(parts: Parts, client: Client, local: Local) -> Self {
        let body_bytes = usize::try_from(parts.config.get().records.logs.body_bytes.0).unwrap_or(usize::MAX);
        let counts = Rc::new(counts::Counts::new(parts.metrics.clone(), parts.logs.clone(), body_bytes));
        Self {
            parts,
            counts,
            last_scope: RefCell::default(),
            client,
            local,
            tokens: RefCell::default(),
            turns: RefCell::default(),
        }
    }

    /// Serves a call up to the head of its answer.
    ///
    /// # Errors
    /// The gateway's own refusals, and `Unreachable` or `UpstreamTimeout` where nobody answered. Whatever an upstream says
    /// itself is a reply.
    pub async fn serve(self: &Rc<Self>, mut ask: Ask) -> Result<Reply> {
        let mut record = Record::begin(&self.counts, &ask);
        let mut trail = Trail { receipt: record.receipt().clone(), ..Trail::default() };
        let outcome = match self.admit(&mut ask, &mut record).await {
            Ok(()) => self.answer(ask, &mut record, &mut trail).await,
            Err(error) => Err(error),
        };
        record.waited(trail.elsewhere);
        match outcome {
            Ok((begun, cache)) => Ok(finish(begun, cache, record)),
            Err(error) => {
                let error = error.with_attempts(&trail.text);
                record.refused(&error);
                Err(error)
            }
        }
    }

    /// Looks at the limits that bind a call whoever answers it, and holds what it needs of them.
    async fn admit(&self, ask: &mut Ask, record: &mut Record) -> Result<()> {
        let mut windows = std::mem::take(&mut ask.ruled.windows);
        if let Some(limit) = &ask.gateway.settings.rate_limit {
            windows.push(limits::of_gateway(&ask.account, &ask.gateway.id, limit));
        }
        if windows.is_empty() {
            return Ok(());
        }
        let counts_tokens = windows.iter().any(|window| window.counts == Counts::Tokens);
        let tokens = if counts_tokens { u64::from(ask.most().total_tokens()) } else { 0 };
        let claim = Claim {
            request: ask.who.id,
            account: &ask.account,
            plan: Plan::PAID,
            windows: &windows,
            tokens,
            neurons: Neurons::ZERO,
            // Who answers is not known yet, so what it costs is not either: a budget that is used up lets nothing through.
            cost: Neurons::from_micro(u64::from(windows.iter().any(|window| window.counts.is_money()))),
            is_once: false,
        };
        let held = self.parts.ledger.claim(&claim, Millis::now()).await.map_err(|denied| {
            self.parts.metrics.refused_by_limits.with_label_values(&[limits::label(&denied)]).inc();
            limits::refusal(denied, &ask.provider, &ModelId::new("any model"))
        })?;
        record.hold(held);
        Ok(())
    }

    async fn answer(self: &Rc<Self>, ask: Ask, record: &mut Record, trail: &mut Trail) -> Result<(Begun, CacheUse)> {
        let verdict = ask.gateway.guard.request(&ask.body, ask.content_type.as_deref().unwrap_or_default());
        record.flags(&verdict.flags);
        if let Some(finding) = verdict.blocked {
            record.blocked(&finding);
            let message = format!("The prompt was blocked by the rule `{}` ({})", finding.rule, finding.what);
            return Err(Error::new(Kind::PromptBlocked, message));
        }
        let Some(keep) = kept_for(&ask) else {
            return Ok((Box::pin(self.attempts(ask, trail)).await?, CacheUse::Off));
        };
        let keying = self.keying(&ask);
        let auth = [ask.credentials.as_slice()];
        let material = keying.material(&ask, &auth);
        let raw = material.raw();
        let now = Millis::now();
        let cache = &self.parts.cache;
        let found = if ask.options.skip_cache == Some(true) {
            Found::Fill(cache.refresh(material.key(&raw)))
        } else if let Some(entry) = cache.peek(&raw, now) {
            Found::Hit(entry)
        } else {
            // Only now: a key over what the bytes mean takes reading them.
            Box::pin(cache.lookup(material.key(&raw), now)).await
        };
        match found {
            Found::Hit(entry) => Ok((hit(entry, ask.words), CacheUse::Hit)),
            Found::Off => Ok((Box::pin(self.attempts(ask, trail)).await?, CacheUse::Off)),
            Found::Fill(ticket) => {
                let (follower, words) = (ticket.follow(), ask.words);
                self.fill(ticket, ask, keep, trail.receipt.clone());
                Box::pin(self.follow(follower, None, words, keep, trail)).await
            }
            Found::Follow(follower) => {
                let words = ask.words;
                Box::pin(self.follow(follower, Some(ask), words, keep, trail)).await
            }
        }
    }

    /// What a gateway is called in the cache. Most calls are of the gateway that the last one was of.
    fn names(&self, ask: &Ask) -> Names {
        let mut last = self.last_scope.borrow_mut();
        if let Some((gateway, account, names)) = &*last
            && Arc::ptr_eq(gateway, &ask.gateway)
            && *account == ask.account
        {
            return *names;
        }
        // A change of the gateway that empties its cache changes its name there.
        let name = format!("{}#{}", ask.gateway.id, ask.gateway.generation);
        let own = Scope::gateway(ask.account.as_str(), &name);
        let names = Names { own, common: common(ask, "") };
        *last = Some((ask.gateway.clone(), ask.account.clone(), names));
        names
    }

    /// What stands for a request in the cache.
    fn keying(&self, ask: &Ask) -> Keying {
        let Names { own, common: named } = self.names(ask);
        let slug = ask.provider.strip_prefix("custom-");
        // Daemons share answers of a provider of the account's own where they call it under one address.
        let common = self.parts.cache.is_shared().then(|| match slug {
            Some(slug) => {
                let custom = self.parts.registry.view().custom(ask.account.as_str(), slug);
                common(ask, custom.as_ref().map_or("", |custom| &custom.base_url))
            }
            None => named,
        });
        Keying {
            gateway: own,
            common,
            provider: slug.map(|slug| Scope::provider(ask.account.as_str(), slug)),
            owner: ask.gateway.settings.cache_per_account.then(|| ask.who.caller.account.clone()),
        }
    }

    /// Reads an answer that is being written, by this call's own task or by another's. `ask` is there as long as this call
    /// may have to become the one that asks.
    async fn follow(
        self: &Rc<Self>,
        mut follower: Follower,
        mut ask: Option<Ask>,
        words: Words,
        keep: Duration,
        trail: &mut Trail,
    ) -> Result<(Begun, CacheUse)> {
        let began = Instant::now();
        loop {
            let lead = follower.head().await;
            trail.elsewhere = began.elapsed();
            match lead {
                Lead::Head(head) => {
                    let (status, headers, saved) = known_head(&head);
                    let events = is_events(&headers);
                    let chunks = unfold(follower, |mut follower| async {
                        let chunk = follower.next().await?;
                        Some((chunk, follower))
                    });
                    let watch = match words {
                        Words::Native(dialect) => Watch::new(dialect, headers.text("content-type")),
                        Words::OpenAi | Words::Messages => None,
                    };
                    let pipe = Pipe::new(Source::Shared(chunks.boxed_local()), words, events).watched(watch);
                    let cache = if ask.is_some() { CacheUse::Coalesced } else { CacheUse::Miss };
                    return Ok((Begun { status, headers, pipe, saved }, cache));
                }
                Lead::Lead(ticket) => match ask.take() {
                    Some(ask) => self.fill(ticket, ask, keep, trail.receipt.clone()),
                    None => return Err(Error::internal("a call was to lead twice")),
                },
                Lead::Failed(FailedAnswer::Answer { head, body }) => {
                    let (status, headers, saved) = known_head(&head);
                    let pipe = Pipe::new(Source::Whole(Some(body)), words, false);
                    return Ok((Begun { status, headers, pipe, saved }, CacheUse::Miss));
                }
                Lead::Failed(FailedAnswer::Error(error)) => return Err(error),
                Lead::Failed(FailedAnswer::Abandoned) => {
                    return Err(Error::new(Kind::Unreachable, "The answer broke off before it began; try again."));
                }
            }
        }
    }

    /// Gets an answer for all who wait for it, in a task that outlives the caller it came from.
    fn fill(self: &Rc<Self>, mut ticket: FillTicket, ask: Ask, keep: Duration, receipt: Receipt) {
        let relay = self.clone();
        actix_web::rt::spawn(async move {
            let mut trail = Trail { receipt, ..Trail::default() };
            let mut begun = match relay.attempts(ask, &mut trail).await {
                Ok(begun) => begun,
                Err(error) => return ticket.fail(FailedAnswer::Error(error.with_attempts(&trail.text))),
            };
            // Each who reads it is told in words of their own.
            begun.pipe.says_nothing();
            let head = cached_head(&begun);
            if !begun.status.is_success() {
                let body = collect(&mut begun.pipe, MAX_FAILURE_BYTES).await.unwrap_or_default();
                return ticket.fail(FailedAnswer::Answer { head: Arc::new(head), body });
            }
            let keep = is_keepable(&begun.headers).then_some(keep);
            ticket.begin(head, keep);
            loop {
                match poll_fn(|cx| begun.pipe.poll_chunk(cx)).await {
                    Some(Ok(chunk)) => {
                        if ticket.push(chunk).await.is_err() {
                            return;
                        }
                    }
                    Some(Err(error)) => return ticket.fail(FailedAnswer::Error(error)),
                    None if matches!(begun.pipe.end(), Some(End::Failed)) => return ticket.finish_unkept(),
                    None => {
                        let cost = trail.receipt.get().map_or(Neurons::ZERO, |charge| charge.cost);
                        ticket.note(COST, cost.micro().to_string().into());
                        return ticket.finish();
                    }
                }
            }
        });
    }
}

/// How long an answer to this is to be kept; `None`: it is not even looked for.
fn kept_for(ask: &Ask) -> Option<Duration> {
    if ask.method != Method::POST {
        return None;
    }
    let gateways = ask.gateway.settings.cache_ttl.filter(|ttl| !ttl.is_zero());
    let alone = ask.options.cache_key.as_ref().map(|_| KEY_ALONE_TTL);
    ask.options.cache_ttl.or(gateways).or(alone).filter(|ttl| !ttl.is_zero())
}

/// What a gateway is called in the cache, and where a fleet shares its answers.
#[derive(Clone, Copy)]
struct Names {
    own: Scope,
    common: Common,
}

/// The name that daemons have in common whose gateways are alike in all settings, and when this one was emptied.
fn common(ask: &Ask, base: &str) -> Common {
    let gateway = &ask.gateway;
    // What the file says has no time of its own: where a change of it empties the cache, the name changes with it.
    let since = Millis(if gateway.fixed { 0 } else { gateway.generation });
    let name = format!("{}#{:x}#{base}", gateway.id, gateway.shape);
    Common { gateway: Scope::gateway(ask.account.as_str(), &name), since }
}

/// What stands for a request in the cache.
struct Keying {
    gateway: Scope,
    common: Option<Common>,
    provider: Option<Scope>,
    /// Whose answers these are; `None`: everybody's.
    owner: Option<AccountId>,
}

impl Keying {
    fn material<'a>(&'a self, ask: &'a Ask, auth: &'a [&'a [u8]]) -> Material<'a> {
        Material {
            account: self.owner.as_ref().map(AccountId::as_str),
            gateway: self.gateway,
            common: self.common,
            provider: &ask.provider,
            provider_scope: self.provider,
            method: ask.method.as_str(),
            endpoint: &ask.endpoint,
            auth: if self.owner.is_some() { auth } else { &[] },
            body: &ask.body,
            custom: ask.options.cache_key.as_deref(),
        }
    }
}

/// The reply to a call, with what the gateway says in its headers.
fn finish(begun: Begun, cache: CacheUse, mut record: Box<Record>) -> Reply {
    let Begun { status, mut headers, pipe, saved } = begun;
    record.flags(pipe.flags());
    record.saves(saved);
    {
        let step = headers.text("cf-aig-step").parse().unwrap_or(0);
        let (provider, model) = (headers.text("cf-aig-provider"), headers.text("cf-aig-model"));
        let attempts = headers.text("cf-aig-attempts");
        record.begun(status, cache, (provider, model), step, attempts, headers.text("content-type"));
    }
    let (found, has_limits, has_log) = (record.dlp(), record.standing().is_some(), record.log.is_some());
    headers.make_way(|name| match name {
        "cf-aig-cache-status" | "cf-aig-event-id" => true,
        "cf-aig-log-id" | "cf-aig-request-id" => has_log,
        "cf-aig-dlp" => found.is_some(),
        "ratelimit-limit" | "ratelimit-remaining" | "ratelimit-reset" => has_limits,
        _ => false,
    });
    let hit = if cache.is_hit() { "HIT" } else { "MISS" };
    headers.append(headers::CACHE_STATUS.clone(), HeaderValue::from_static(hit));
    let mut values = headers::Values::with_capacity(192);
    let mut say = |name: &HeaderName, value: Option<HeaderValue>| {
        if let Some(value) = value {
            headers.append(name.clone(), value);
        }
    };
    if let Some(standing) = record.standing() {
        let limit = hold::limit(standing);
        let reset = limit.reset.as_secs_f64().ceil() as u64;
        for (name, number) in
            [(&headers::LIMIT, limit.limit), (&headers::LIMIT_REMAINING, limit.left), (&headers::LIMIT_RESET, reset)]
        {
            say(name, values.make(itoa::Buffer::new().format(number)));
        }
    }
    if let Some(found) = &found {
        say(&headers::DLP, values.make(found));
    }
    let log = record.log.and_then(|log| values.make(log.text(&mut [0; 26])));
    let event = match &record.event {
        Some(event) => values.make(event),
        None => log.clone().or_else(|| values.make(record.request().text(&mut [0; 36]))),
    };
    say(&headers::EVENT_ID, event);
    say(&headers::LOG_ID, log.clone());
    say(&headers::REQUEST_ID, log);
    Reply { status, headers, pipe: Box::new(pipe), record }
}

/// An answer out of the cache: as it was, with its chunks where those are events.
fn hit(entry: Arc<Entry>, words: Words) -> Begun {
    let (status, headers, saved) = match entry.read(known_head) {
        Some((status, headers, saved)) => (*status, headers.copied(8), *saved),
        None => known_head(entry.head()),
    };
    let events = is_events(&headers);
    let source =
        if events { Source::Chunks(Box::new(entry.chunks())) } else { Source::Whole(Some(entry.body().clone())) };
    Begun { status, headers, pipe: Pipe::new(source, words, events), saved }
}

/// Status and headers as the cache keeps them.
fn cached_head(begun: &Begun) -> cache::Head {
    let headers = begun.headers.iter();
    let headers = headers.map(|(name, value)| (name.into(), Bytes::copy_from_slice(value.as_bytes()))).collect();
    cache::Head { status: begun.status.as_u16(), headers }
}

/// The same as it was, and what it cost, if that was known by then.
fn known_head(head: &cache::Head) -> (StatusCode, Headers, Neurons) {
    let mut known = Headers::with_capacity(head.headers.len() + 8);
    let mut cost = Neurons::ZERO;
    for (name, value) in &head.headers {
        if **name == *COST {
            let micro = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            cost = Neurons::from_micro(micro.unwrap_or(0));
            continue;
        }
        if let (Some(name), Ok(value)) = (headers::name(name), HeaderValue::from_maybe_shared(value.clone())) {
            known.append(name, value);
        }
    }
    (StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY), known, cost)
}

/// Text and images may be kept; what an upstream marks as not to be stored may not.
fn is_keepable(headers: &Headers) -> bool {
    let kind = content_type(headers);
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let fits = kind.starts_with("text/") || kind.starts_with("image/") || kind.ends_with("json") || is_frames(headers);
    // Providers say `no-cache` of every stream; `no-store` is meant.
    fits && !headers.text("cache-control").split(',').any(|word| word.trim().eq_ignore_ascii_case("no-store"))
}
