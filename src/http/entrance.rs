//! From a request to a call through a gateway: who is let in, and what is to be tried.
//!
//!     request --token, gateway--> Entrance --native | chat | messages | embeddings | universal | run | realtime--> Ask

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::HttpRequest;
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, USER_AGENT};
use bytes::Bytes;
use http::header::HeaderMap as Forwarded;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::base::{AccountId, Error, Kind, Millis, RequestId, Result};
use crate::config::Limits;
use crate::gateway::asked::{Ask, Plan, Who};
use crate::gateway::limits::{self, Ruled, Seen};
use crate::gateway::options::{self, Options};
use crate::gateway::pipe::Words;
use crate::gateway::relay::Relay;
use crate::gateway::route;
use crate::gateway::step::{self, Native, Step, Steps};
use crate::http::route::Route;
use crate::http::{Services, auth};
use crate::ledger::{Counts, Window};
use crate::provider::{self, Dialect};
use crate::registry::{Gateway, View};
use crate::route::{Facts, LimitNode};
use crate::vault::Caller;

/// Most steps of a universal call.
const MAX_STEPS: usize = 16;
/// The gateway of calls that name none.
const DEFAULT: &str = "default";
/// Where a call of the surfaces without a gateway in their path names one.
pub(super) static GATEWAY: HeaderName = HeaderName::from_static("cf-aig-gateway-id");
/// Where callers bring credentials for providers, or say which stored ones are meant.
static CREDENTIALS: [HeaderName; 5] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
    HeaderName::from_static("cf-aig-byok-alias"),
];
/// What stands for a provider where a model's name decides, and where steps do.
const COMPAT: &str = "compat";
const UNIVERSAL: &str = "universal";

/// Who is let in, and through what.
pub(super) struct Entrance {
    account: AccountId,
    gateway: Arc<Gateway>,
    view: Arc<View>,
    who: Who,
    /// A token of ours was shown: stored keys may be used.
    trusted: bool,
    /// The operator's own rules, if there are any.
    limits: Option<Arc<Limits>>,
}

/// The operator's own rules, if there are any.
fn rules(services: &Services) -> Option<Arc<Limits>> {
    let config = services.config.get();
    let limits = &config.metering.limits;
    (!limits.rules.is_empty()).then(|| limits.clone())
}

/// Lets a caller into a gateway of the account in the path.
pub(super) async fn enter(
    services: &Services,
    relay: &Relay,
    route: &Route,
    request: &HttpRequest,
    gateway: &str,
    id: RequestId,
    received: Instant,
) -> Result<Entrance> {
    let Some(account) = &route.account else { return Err(Error::internal("a gateway without an account")) };
    let now = Millis::now();
    let headers = request.headers();
    let token = headers.get(&auth::TOKEN).and_then(|value| value.to_str().ok()).map(auth::bare);
    let token = token.or_else(|| auth::hidden(request).map(|(token, _)| token));
    let admitted =
        services.vault.admit(token, Some(account), now).and_then(|caller| match caller.scopes.opens(gateway) {
            true => Ok(caller),
            false => Err(Error::new(Kind::Forbidden, "This token does not open this gateway.")),
        });
    let account = match &admitted {
        Ok(caller) if caller.account.as_str() == account.as_str() => caller.account.clone(),
        _ => AccountId::new(account),
    };
    let known = admitted.as_ref().is_ok_and(|caller| caller.key.is_some());
    let (gateway, view) = find(relay, &account, gateway, known).await?;
    // Where no token exists at all, nobody can show one; everybody may do everything then.
    let open = admitted.as_ref().is_ok_and(|caller| caller.scopes.admin);
    if gateway.settings.authentication && !known && !open {
        services.metrics.auth_failures.inc();
        return Err(Error::new(Kind::Unauthorized, "Unauthorized"));
    }
    // The engine wants a caller of its own: what it computes is billed.
    let engine = match &admitted {
        Ok(caller) if caller.key.is_some() => caller.scopes.run.then(|| caller.clone()),
        _ => {
            let bearer = auth::bearer(headers);
            services.vault.admit(bearer, Some(account.as_str()), now).ok().filter(|caller| caller.scopes.run)
        }
    };
    let caller = admitted.unwrap_or(Caller::anonymous(account.clone()));
    let caller = Caller { account: account.clone(), ..caller };
    let who = Who { id, caller, engine, received, tally: None };
    Ok(Entrance { account, gateway, view, who, trusted: known, limits: rules(services) })
}

/// A gateway, and what else the registry says at this moment.
async fn find(relay: &Relay, account: &AccountId, id: &str, known: bool) -> Result<(Arc<Gateway>, Arc<View>)> {
    let view = relay.parts.registry.view();
    if let Some(gateway) = view.gateway(account.as_str(), id) {
        return Ok((gateway, view));
    }
    if id == DEFAULT && known {
        let gateway = Box::pin(relay.parts.registry.ensure_default(account)).await?;
        return Ok((gateway, relay.parts.registry.view()));
    }
    Err(Error::new(Kind::NoSuchGateway, format!("There is no gateway `{id}` in this account: create it first.")))
}

/// Lets a caller whose token is known already into the gateway that a header names.
pub(super) async fn enter_named(
    services: &Services,
    relay: &Relay,
    request: &HttpRequest,
    caller: Caller,
    id: RequestId,
    received: Instant,
) -> Result<Entrance> {
    let named = request.headers().get(&GATEWAY).and_then(|value| value.to_str().ok());
    let trusted = caller.key.is_some();
    let account = caller.account.clone();
    let named = named.unwrap_or(DEFAULT);
    if !caller.scopes.opens(named) {
        return Err(Error::new(Kind::Forbidden, "This token does not open this gateway."));
    }
    let (gateway, view) = find(relay, &account, named, true).await?;
    let who = Who { id, engine: caller.scopes.run.then(|| caller.clone()), caller, received, tally: None };
    Ok(Entrance { account, gateway, view, who, trusted, limits: rules(services) })
}

/// A request, divided into what is ours and what is the upstream's.
pub(super) struct Incoming {
    method: actix_web::http::Method,
    query: String,
    headers: Theirs,
    pub(super) options: Rc<Options>,
    pub(super) body: Bytes,
}

impl Incoming {
    /// Takes out the token of ours that came where providers' keys are; Anthropic's clients may send it in a header of theirs.
    pub(super) fn forget_token(&mut self, as_key: bool) {
        self.headers.without = if as_key { &["authorization", "x-api-key"] } else { &["authorization"] };
    }

    pub(super) fn read(request: &HttpRequest, body: Bytes) -> Self {
        let headers = Theirs { request: request.clone(), without: &[], made: OnceCell::new() };
        Self {
            method: request.method().clone(),
            query: request.query_string().to_owned(),
            options: Rc::new(Options::read(pairs(request))),
            headers,
            body,
        }
    }

    /// The caller's own credentials for providers, whatever header they are in.
    fn credentials(&self) -> Vec<u8> {
        let headers = self.headers.request.headers();
        let mut credentials = Vec::new();
        for name in &CREDENTIALS {
            if let Some(value) = headers.get(name) {
                credentials.extend_from_slice(name.as_str().as_bytes());
                credentials.extend_from_slice(value.as_bytes());
                credentials.push(0);
            }
        }
        credentials
    }
}

/// The upstream's part of a request's headers, put together when a step wants it: an answer from the cache never does.
#[derive(Clone)]
struct Theirs {
    request: HttpRequest,
    without: &'static [&'static str],
    made: OnceCell<Forwarded>,
}

impl Theirs {
    fn get(&self) -> &Forwarded {
        self.made.get_or_init(|| {
            let mut headers = options::forwarded(pairs(&self.request));
            for name in self.without {
                headers.remove(*name);
            }
            headers
        })
    }

    fn take(self) -> Forwarded {
        self.get();
        self.made.into_inner().unwrap_or_default()
    }
}

fn pairs(request: &HttpRequest) -> impl Iterator<Item = (&str, &[u8])> {
    request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes()))
}

/// A universal step as it is written.
#[derive(Deserialize)]
struct Written {
    provider: String,
    #[serde(default)]
    endpoint: String,
    #[serde(default)]
    headers: Map<String, Value>,
    query: Option<Box<RawValue>>,
    #[serde(default)]
    config: Map<String, Value>,
}

/// One of them, or a list.
fn written_steps(body: &[u8]) -> serde_json::Result<Vec<Written>> {
    match body.trim_ascii_start().first() {
        Some(b'{') => Ok(vec![serde_json::from_slice(body)?]),
        _ => serde_json::from_slice(body),
    }
}

impl Entrance {
    /// The id of the call.
    pub(super) fn id(&self) -> RequestId {
        self.who.id
    }

    /// The same entrance for another call, with what the registry says by now.
    pub(super) fn again(&self, id: RequestId) -> Self {
        Self {
            account: self.account.clone(),
            gateway: self.gateway.clone(),
            view: self.view.clone(),
            who: Who { id, received: Instant::now(), ..self.who.clone() },
            trusted: self.trusted,
            limits: self.limits.clone(),
        }
    }

    /// A provider's WebSocket.
    pub(super) fn realtime(self, call: Incoming, slug: &str, rest: &str) -> Result<Ask> {
        // A token of ours among the protocols is nobody else's.
        let mut headers = call.headers.get().clone();
        let protocols = headers.get("sec-websocket-protocol").and_then(|value| value.to_str().ok());
        if let Some(protocols) = protocols {
            let theirs: Vec<&str> =
                protocols.split(',').map(str::trim).filter(|name| !name.starts_with("cf-aig-authorization.")).collect();
            match http::HeaderValue::from_str(&theirs.join(", ")) {
                Ok(value) if !theirs.is_empty() => headers.insert("sec-websocket-protocol", value),
                _ => headers.remove("sec-websocket-protocol"),
            };
        }
        let method = call.method.clone();
        let (query, body, options) = (call.query.as_str(), &call.body, call.options.clone());
        let step = self.steps().native(slug, Native { method: &method, rest, query, headers, body, options })?;
        let words = Words::Native(step.dialect);
        self.ask(call, Plan::list(vec![Ok(step)]), words, slug)
    }

    /// What steps are made with.
    fn steps(&self) -> Steps<'_> {
        Steps { account: &self.account, gateway: &self.gateway, view: &self.view, trusted: self.trusted }
    }

    fn ask(self, call: Incoming, plan: Plan, words: Words, provider: &str) -> Result<Ask> {
        let request = &call.headers.request;
        let (path, query) = (request.uri().path(), call.query.as_str());
        let endpoint = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let method = match call.method.as_str() {
            "POST" => http::Method::POST,
            other => http::Method::from_bytes(other.as_bytes())
                .map_err(|_| Error::bad_input("the method is none that HTTP knows"))?,
        };
        let mut credentials = Vec::new();
        if self.gateway.settings.cache_per_account {
            credentials = call.credentials();
            // What a stored key was spent on is not for somebody who could not have used it.
            credentials.push(u8::from(self.trusted));
        }
        let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let user_agent = request.headers().get(USER_AGENT).cloned();
        let ruled = self.limits.map(|limits| {
            let seen = Seen {
                peer: request.peer_addr().map(|peer| peer.ip()),
                headers: request.headers(),
                account: &self.account,
                key: self.who.caller.key.as_ref(),
                gateway: Some(&self.gateway.id),
                metadata: call.options.metadata.as_ref(),
            };
            Ruled::of(limits, &seen)
        });
        Ok(Ask {
            ruled: ruled.unwrap_or_default(),
            who: self.who,
            account: self.account,
            gateway: self.gateway,
            view: self.view,
            trusted: self.trusted,
            plan,
            tries_all: provider == UNIVERSAL,
            provider: provider.into(),
            words,
            method,
            endpoint,
            content_type: content_type.map(str::to_owned),
            user_agent,
            options: call.options,
            body: call.body,
            credentials,
            most: OnceCell::new(),
        })
    }

    pub(super) fn native(self, call: Incoming, slug: &str, rest: &str) -> Result<Ask> {
        let dialect = step::dialect_of(slug, rest);
        // What OpenAI's words ask of one can be asked of another.
        let chat = dialect == Dialect::OpenAi && rest.trim_end_matches('/').ends_with("chat/completions");
        if chat && (call.options.fallback.is_some() || !self.gateway.settings.fallback.is_empty()) {
            let (headers, options) = (call.headers.get().clone(), call.options.clone());
            let (method, query, body) = (&call.method, call.query.as_str(), &call.body);
            let sent = Native { method, rest, query, headers, body, options };
            let first = self.steps().native(slug, sent)?;
            let plan = self.with_fallbacks(first, &call);
            return self.ask(call, plan, Words::Native(dialect), slug);
        }
        // Made when it is taken: an answer from the cache needs no step.
        let mut parts = Some((call.headers.clone(), slug.to_owned(), rest.to_owned()));
        let (method, query, body) = (call.method.clone(), call.query.clone(), call.body.clone());
        let options = call.options.clone();
        let next = move |steps: &Steps<'_>| {
            let (headers, slug, rest) = parts.take()?;
            let headers = headers.take();
            let (method, query, body, options) = (&method, query.as_str(), &body, options.clone());
            Some(steps.native(&slug, Native { method, rest: &rest, query, headers, body, options }))
        };
        self.ask(call, Plan { next: Box::new(next), most: 1 }, Words::Native(dialect), slug)
    }

    /// A path of OpenAI's own surface, for `provider/model` in the body.
    pub(super) fn named_native(self, mut call: Incoming, path: &str) -> Result<Ask> {
        let name = model(&call.body)?;
        let (slug, model) = step::divide_name(&name)?;
        call.body = provider::splice_model(&call.body, model)?;
        let rest = if slug == step::LOCAL { format!("v1/{path}") } else { path.to_owned() };
        self.native(call, slug, &rest)
    }

    pub(super) async fn chat(self, relay: &Relay, call: Incoming) -> Result<Ask> {
        let name = model(&call.body)?;
        if let Some(route) = name.strip_prefix("dynamic/") {
            let plan = self.routed(relay, route, &call, false).await?;
            return self.ask(call, plan, Words::OpenAi, COMPAT);
        }
        let step = self.steps().chat(&name, call.headers.get(), &call.body, call.options.clone())?;
        let plan = self.with_fallbacks(step, &call);
        self.ask(call, plan, Words::OpenAi, COMPAT)
    }

    pub(super) async fn messages(self, relay: &Relay, call: Incoming) -> Result<Ask> {
        let name = model(&call.body)?;
        if let Some(route) = name.strip_prefix("dynamic/") {
            let plan = self.routed(relay, route, &call, true).await?;
            return self.ask(call, plan, Words::Messages, COMPAT);
        }
        // Anthropic's own clients name Anthropic's models alone, and aliases of ours have no provider either.
        let whole = match name.split_once('/') {
            Some(_) => name,
            None if name.starts_with("claude-") => format!("anthropic/{name}"),
            None => format!("{}/{name}", step::LOCAL),
        };
        let step = self.steps().messages(&whole, call.headers.get(), &call.body, call.options.clone())?;
        let plan = Plan::list(vec![Ok(step)]);
        self.ask(call, plan, Words::Messages, COMPAT)
    }

    pub(super) fn embeddings(self, call: Incoming) -> Result<Ask> {
        let name = model(&call.body)?;
        let step = self.steps().embeddings(&name, call.headers.get(), &call.body, call.options.clone())?;
        self.ask(call, Plan::list(vec![Ok(step)]), Words::OpenAi, COMPAT)
    }

    /// The step that was asked for, and behind it what the gateway or the caller turns to when it fails.
    fn with_fallbacks(&self, first: Step, call: &Incoming) -> Plan {
        let written = || {
            let targets = self.gateway.settings.fallback.iter();
            targets.map(|target| format!("{}/{}", target.provider, target.model)).collect()
        };
        let names: Vec<String> = call.options.fallback.clone().unwrap_or_else(written);
        let mut steps = vec![Ok(first)];
        for (at, name) in names.iter().enumerate() {
            // Credentials were brought for the first.
            let mut headers = call.headers.get().clone();
            for name in ["authorization", "x-api-key", "api-key", "x-goog-api-key"] {
                headers.remove(name);
            }
            let step = self.steps().chat(name, &headers, &call.body, call.options.clone());
            steps.push(step.map(|mut step| {
                step.index = at + 1;
                step
            }));
        }
        Plan::list(steps)
    }

    pub(super) fn universal(self, call: Incoming) -> Result<Ask> {
        let written = written_steps(&call.body).map_err(|error| {
            Error::bad_input(format!(
                "the body is no list of steps, each an object with provider, endpoint, headers and query: {error}"
            ))
        })?;
        if written.is_empty() || written.len() > MAX_STEPS {
            return Err(Error::bad_input(format!("a call has 1 to {MAX_STEPS} steps, this one {}", written.len())));
        }
        let most = written.len();
        let request = call.options.clone();
        let outer = call.headers.get().clone();
        let mut written = written.into_iter().enumerate();
        let next = move |steps: &Steps<'_>| {
            let (index, step) = written.next()?;
            Some(universal_step(steps, index, step, &request, &outer))
        };
        self.ask(call, Plan { next: Box::new(next), most }, Words::OpenAi, UNIVERSAL)
    }

    /// The models that a dynamic route turns to, one after the other.
    async fn routed(&self, relay: &Relay, name: &str, call: &Incoming, messages: bool) -> Result<Plan> {
        let Some(route) = self.view.route(self.account.as_str(), &self.gateway.id, name) else {
            let message = format!("There is no route `{name}` with a deployed version in this gateway.");
            return Err(Error::new(Kind::NoSuchModel, message).with_param("model"));
        };
        let asked = Asked::read(call, &self.who)?;
        let ledger = relay.parts.ledger.clone();
        let counters = format!("{}/{}/{}", self.account, self.gateway.id, route.id);
        // What the call costs counts against the budgets that it passed on its way.
        let budgets: Rc<RefCell<Vec<Window>>> = Rc::default();
        let passed = budgets.clone();
        // Where a fleet shares them: which limits lie on the way is known by going it.
        while ledger.is_shared() {
            let mut unleased = Vec::new();
            let mut look = |limit: &LimitNode, key: &str| {
                let window = limits::of_route(&counters, limit, key);
                ledger.has_room(&window, Millis::now()).unwrap_or_else(|_| {
                    unleased.push(window);
                    true
                })
            };
            asked.with(|facts| drop(route.graph.walk(facts, &mut look)));
            if unleased.is_empty() || ledger.lease(&unleased, Millis::now()).await.is_err() {
                break;
            }
        }
        let mut within = move |limit: &LimitNode, key: &str| {
            let window = limits::of_route(&counters, limit, key);
            let is_within = ledger.pass(&window, Millis::now()).is_ok();
            if is_within && window.counts == Counts::Cost {
                passed.borrow_mut().push(window);
            }
            is_within
        };
        let most = route.graph.models().count();
        let mut walk = asked.with(|facts| route.graph.walk(facts, &mut within));
        if walk.model().is_none() {
            let limit = walk.refused().map(|limit| limit.id.to_string()).unwrap_or_default();
            let message = format!("Rate limited: the route `{name}` leads to no model now (limit `{limit}`).");
            return Err(Error::new(Kind::RateLimited, message));
        }
        let (headers, body, options) = (call.headers.get().clone(), call.body.clone(), call.options.clone());
        let mut index = 0;
        let next = move |steps: &Steps<'_>| {
            if index > 0 {
                asked.with(|facts| walk.failed(facts, &mut within).is_some());
            }
            let node = walk.model()?;
            let name = format!("{}/{}", node.provider, node.model);
            let options = Options {
                request_timeout: node.timeout_ms.map(Duration::from_millis).or(options.request_timeout),
                max_attempts: node.retries.map(|retries| u32::from(retries) + 1).or(options.max_attempts),
                ..(*options).clone()
            };
            let options = Rc::new(options);
            let step = if messages {
                steps.messages(&name, &headers, &body, options)
            } else {
                steps.chat(&name, &headers, &body, options)
            };
            index += 1;
            Some(step.map(|mut step| {
                (step.index, step.route) = (index - 1, Some(walk.to_string()));
                step.budgets = budgets.borrow().clone();
                step
            }))
        };
        Ok(Plan { next: Box::new(next), most })
    }

    /// `{"model","input","provider"?}`: the call, the provider and the model.
    pub(super) async fn run(self, relay: &Relay, mut call: Incoming) -> Result<(Ask, String, String)> {
        #[derive(Deserialize)]
        struct Run {
            model: String,
            #[serde(default)]
            input: Option<Box<RawValue>>,
            provider: Option<String>,
        }
        let run: Run = serde_json::from_slice(&call.body)
            .map_err(|error| Error::bad_input(format!("the body is no {{\"model\", \"input\"}}: {error}")))?;
        let name = match &run.provider {
            Some(provider) if !run.model.starts_with(&format!("{provider}/")) => format!("{provider}/{}", run.model),
            _ => run.model.clone(),
        };
        let (slug, model) = step::divide_name(&name)?;
        let (slug, model) = (slug.to_owned(), model.to_owned());
        call.body =
            Bytes::from(run.input.map_or_else(|| "{}".to_owned(), |input| String::from(Box::<str>::from(input))));
        call.method = actix_web::http::Method::POST;
        let ask = if slug == step::LOCAL {
            self.native(call, &slug, &format!("run/{model}"))?
        } else {
            let body = provider::splice_model(&call.body, &name)?;
            self.chat(relay, Incoming { body, ..call }).await?
        };
        Ok((ask, slug, model))
    }
}

/// What a route decides by, held as long as it may have to decide again.
struct Asked {
    body: Value,
    headers: Vec<(String, String)>,
    metadata: Value,
    model: String,
    key: u64,
}

impl Asked {
    fn read(call: &Incoming, who: &Who) -> Result<Self> {
        let body: Value = serde_json::from_slice(&call.body)
            .map_err(|error| Error::bad_input(format!("the request body is not JSON: {error}")))?;
        let headers = call.headers.get().iter();
        let headers: Vec<(String, String)> = headers
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())))
            .collect();
        let metadata = call.options.metadata.clone().map_or(Value::Null, Value::Object);
        let model = body.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
        // Who can be told apart takes the same branch each time; everybody else takes any.
        let session = call.headers.get().get("x-session-affinity").and_then(|value| value.to_str().ok());
        let user = session
            .or_else(|| body.get("user").and_then(Value::as_str))
            .map(str::to_owned)
            .or_else(|| metadata.get("user_id").or_else(|| metadata.get("user")).map(Value::to_string));
        let key = user.map_or(who.id.low_bits(), |user| route::affinity(&user, &who.caller.account));
        Ok(Self { body, headers, metadata, model, key })
    }

    fn with<T>(&self, act: impl FnOnce(&Facts<'_>) -> T) -> T {
        let headers: Vec<(&str, &str)> =
            self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        act(&Facts {
            body: &self.body,
            headers: &headers,
            metadata: &self.metadata,
            model: &self.model,
            key: self.key,
            now: Millis::now(),
        })
    }
}

fn universal_step(
    steps: &Steps<'_>,
    index: usize,
    written: Written,
    request: &Options,
    outer: &Forwarded,
) -> Result<Step> {
    let texts: Vec<(String, String)> = written
        .headers
        .iter()
        .map(|(name, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (name.to_ascii_lowercase(), value)
        })
        .collect();
    let pairs = texts.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
    let mut options = Options::read(pairs.clone());
    let mut headers = options::forwarded(pairs);
    options.take_config(&written.config);
    if !headers.contains_key(http::header::CONTENT_TYPE) {
        headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    }
    if let Some(agent) = outer.get(http::header::USER_AGENT) {
        headers.entry(http::header::USER_AGENT).or_insert(agent.clone());
    }
    let (path, query) = written.endpoint.split_once('?').unwrap_or((&written.endpoint, ""));
    let body = written.query.map_or_else(Bytes::new, |query| Bytes::from(String::from(Box::<str>::from(query))));
    let post = actix_web::http::Method::POST;
    let options = Rc::new(options.or(request));
    let path = path.trim_start_matches('/');
    let mut step = if written.provider == "compat" {
        steps.chat(&model(&body)?, &headers, &body, options)?
    } else {
        steps.native(&written.provider, Native { method: &post, rest: path, query, headers, body: &body, options })?
    };
    step.index = index;
    Ok(step)
}

fn model(body: &Bytes) -> Result<String> {
    provider::facts(body)
        .ok_or_else(|| Error::bad_input("the request body is no JSON object"))?
        .model
        .ok_or_else(|| Error::bad_field("model", "'model' is required: name it as provider/model"))
}
