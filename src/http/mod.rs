//! HTTP: one file a wire surface, each parsing to a [`crate::gateway::Call`] and rendering events.
//!
//!     connection --> admit --> route --> auth --> body --> chat | completions | responses | run | binding | models | finetunes | health
//!                                                   |                      |
//!                                                   |     answer (JSON) or stream (SSE) <--+--> error, in the surface's own shape
//!                                                   '----> gateway --> relay (any provider, the engine included)
//!
//! One handler takes every request, so that whatever happens to it, the answer carries the ids, is counted and, when
//! refused, has its line in the log. Knows no model and no device: [`Services`] is all it reaches for.

mod answer;
mod ask;
mod auth;
mod batch;
mod binding;
mod chat;
mod classic;
mod completions;
mod encode;
mod entrance;
mod error;
mod evaluations;
mod fields;
mod finetunes;
mod format;
mod gateway;
mod health;
mod local;
mod management;
mod models;
mod native;
mod observe;
mod records;
mod responses;
mod route;
mod run;
mod server;
mod socket;
mod stream;
mod text;
mod tools;

#[cfg(test)]
mod tests;

pub use batch::Batches;
pub use evaluations::Evaluations;
pub use route::Listener;
pub use server::start;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::alert::Alerts;
use crate::base::{AccountId, Error, Kind, Limit, ModelId, Phase, RequestId, Result};
use crate::config::Live;
use crate::gateway::limits::{Ruled, Seen};
use crate::gateway::relay::{Parts, Relay};
use crate::gateway::{Gateway, Terms, hold};
use crate::metrics::Metrics;
use crate::net::client;
use crate::supervisor::FleetView;
use crate::vault::Vault;

use ask::Ask;
use observe::{InFlight, Observation, Requests};
use route::{Endpoint, Route, Surface};

/// What a request is called, by who sent it or by us.
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The same as Cloudflare names it.
static CALL_ID: HeaderName = HeaderName::from_static("cf-ai-req-id");

/// What handlers reach for.
#[derive(Clone)]
pub struct Services {
    /// Configuration in force.
    pub config: Live,
    /// Serves calls.
    pub gateway: Gateway,
    /// What relays share, and what their clients are made with.
    pub relays: Parts,
    /// See `relays`.
    pub clients: client::Settings,
    /// Who is told when something is wrong, if anything is watched.
    pub alerts: Option<Alerts>,
    /// Batches in line, if there is a folder for them.
    pub batches: Option<Batches>,
    /// Whoever runs evaluations.
    pub evaluations: Evaluations,
    /// What is loaded.
    pub fleet: FleetView,
    /// Who may call.
    pub vault: Vault,
    /// Where to count.
    pub metrics: Arc<Metrics>,
    /// Starting, ready, draining.
    pub phase: watch::Receiver<Phase>,
}

impl Services {
    /// How many bytes a body may have, and how long it may take to come. Values: who waits keeps no configuration from being let go.
    fn body_bounds(&self) -> (usize, Duration) {
        let server = &self.config.get().server;
        (server.max_body_bytes, server.read_timeout)
    }
}

/// A worker's view of the house through one listener.
struct Door {
    services: Services,
    relay: Rc<Relay>,
    listener: Listener,
    in_flight: InFlight,
    requests: Rc<Requests>,
    phase: KnownPhase,
}

/// The phase of the house as a worker knows it: to see that it has not changed takes no lock.
struct KnownPhase {
    known: Cell<Phase>,
    changes: RefCell<watch::Receiver<Phase>>,
}

impl KnownPhase {
    fn new(mut changes: watch::Receiver<Phase>) -> Self {
        let known = *changes.borrow_and_update();
        Self { known: Cell::new(known), changes: RefCell::new(changes) }
    }

    fn is_draining(&self) -> bool {
        let mut changes = self.changes.borrow_mut();
        // Where nobody is left to change it, the last phase counts.
        if changes.has_changed().unwrap_or(true) {
            self.known.set(*changes.borrow_and_update());
        }
        self.known.get() == Phase::Draining
    }
}

/// What the log wants to know of a refused request.
#[derive(Default)]
struct Trail {
    account: Option<AccountId>,
    model: Option<ModelId>,
    /// The gateway took the call over and has counted and logged how it ended.
    served: bool,
    /// How the tightest limit stands that it fell under.
    limit: Option<Limit>,
}

/// Every request, whatever it wants.
async fn handle(request: HttpRequest, payload: web::Payload, door: web::Data<Door>) -> HttpResponse {
    let received = Instant::now();
    let services = &door.services;
    let route = Route::find(door.listener, request.method(), request.uri().path());
    let sent = request.headers().get(&REQUEST_ID).and_then(|id| RequestId::parse(id.to_str().ok()?));
    let id = door.in_flight.enter(sent);
    let mut observation = Observation::begin(&door.requests, &route, request.method(), received);

    let mut trail = Trail::default();
    let outcome = dispatch(&door, &request, payload, &route, *id, received, &mut trail).await;
    let mut response = match outcome {
        Ok(response) => response,
        Err(error) => {
            let response = error::response(route.surface, *id, &error);
            if !trail.served {
                refused(services, *id, &route, &trail, response.status().as_u16(), &error, received);
            }
            response
        }
    };
    observation.status = response.status().as_u16();
    if let Some(limit) = trail.limit {
        for (name, number) in error::limits(limit) {
            let (name, value) = (HeaderName::from_static(name), HeaderValue::from_str(&number));
            if let Ok(value) = value.map_err(drop)
                && !response.headers().contains_key(&name)
            {
                response.headers_mut().insert(name, value);
            }
        }
    }
    if let Ok(value) = HeaderValue::from_str(id.text(&mut [0; 36])) {
        let headers = response.headers_mut();
        // An upstream's own id for what it answered is what its support asks for.
        if route.surface != Surface::Gateway || !headers.contains_key(&REQUEST_ID) {
            headers.insert(REQUEST_ID.clone(), value.clone());
        }
        headers.insert(CALL_ID.clone(), value);
    }
    if door.phase.is_draining() {
        response.head_mut().set_connection_type(actix_web::http::ConnectionType::Close);
    }
    response.map_body(|_, body| observe::watched(body, observation, id))
}

/// From a route to its answer.
async fn dispatch(
    door: &Door,
    request: &HttpRequest,
    payload: web::Payload,
    route: &Route,
    id: RequestId,
    received: Instant,
    trail: &mut Trail,
) -> Result<HttpResponse> {
    let services = &door.services;
    let endpoint = route.endpoint.as_ref().map_err(Error::clone)?;
    match endpoint {
        Endpoint::Live => return health::live(),
        Endpoint::Ready => return health::ready(services),
        Endpoint::Metrics => return Ok(Box::pin(health::metrics(services)).await),
        _ => {}
    }
    if door.phase.is_draining() {
        return Err(Error::new(Kind::ShuttingDown, "This server is shutting down; try again in a moment."));
    }
    if route.surface == Surface::Gateway {
        let outcome = gateway::serve(door, request, payload, route, endpoint, id, received).await;
        trail.served = outcome.is_ok();
        return outcome;
    }
    let caller = auth::caller(services, door.listener, route, request.headers())?;
    trail.account = Some(caller.account.clone());

    if let Endpoint::Management(path) = endpoint {
        return Box::pin(management::serve(services, request, payload, &caller, path)).await;
    }
    // Who may come in through a gateway need not be one who may come in here.
    let may_run = caller.scopes.run;
    let refused = || Error::new(Kind::Forbidden, "This token may not call models: its scopes lack `run`.");
    if !may_run && !takes_body(endpoint) {
        return Err(refused());
    }
    if let Endpoint::NotBuilt(what) = endpoint {
        return Err(Error::unsupported(format!("{what} not available in this build.")));
    }
    if let Endpoint::FinetuneAssets(key) = endpoint {
        return Box::pin(finetunes::upload(services, &caller.account, key, request.headers(), payload)).await;
    }
    let body = match takes_body(endpoint) {
        true => {
            let (limit, patience) = services.body_bounds();
            let body = ask::read_bytes(request.headers(), payload, limit, patience).await?;
            if route.surface != Surface::Binding && gateway::is_meant(request.headers(), endpoint, &body) {
                let named = gateway::serve_named(door, request, body, endpoint, caller, id, received);
                let outcome = Box::pin(named).await;
                trail.served = outcome.is_ok();
                return outcome;
            }
            if !may_run {
                return Err(refused());
            }
            Box::pin(ask::plain_json(request.headers(), body)).await?
        }
        false => Value::Null,
    };
    let query = web::Query::<HashMap<String, String>>::from_query(request.query_string())
        .map_err(|_| Error::bad_input("the query string does not parse"))?;
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let rules = services.config.get().metering.limits.clone();
    let seen = Seen {
        peer: request.peer_addr().map(|peer| peer.ip()),
        headers: request.headers(),
        account: &caller.account,
        key: caller.key.as_ref(),
        gateway: None,
        metadata: None,
    };
    let terms = Terms { ruled: Ruled::of(rules, &seen), budget: caller.budget, ..Terms::default() };
    let standing = terms.standing.clone();
    let ask = Ask {
        terms,
        id,
        surface: route.surface,
        caller,
        affinity: ask::affinity(request.headers()),
        received,
        query: query.into_inner(),
        model_header: header("cf-consn-model-id").map(str::to_owned),
        body,
        model: OnceCell::new(),
        served: Cell::new(false),
    };
    // A future is as large as its largest branch and is moved once: what is large or seldom has a place of its own.
    let outcome = Box::pin(answer(services, &ask, endpoint)).await;
    trail.served = ask.served.get();
    trail.model = ask.model.into_inner();
    trail.limit = standing.get().map(hold::limit);
    outcome
}

fn takes_body(endpoint: &Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::ChatCompletions
            | Endpoint::Completions
            | Endpoint::Responses
            | Endpoint::Embeddings
            | Endpoint::Rerank
            | Endpoint::Run(_)
            | Endpoint::RunUnified
            | Endpoint::BindingRun
            | Endpoint::CreateFinetune
            | Endpoint::Messages
    )
}

async fn answer(services: &Services, ask: &Ask, endpoint: &Endpoint) -> Result<HttpResponse> {
    match endpoint {
        Endpoint::ChatCompletions => chat::chat(services, ask).await,
        Endpoint::Completions => completions::complete(services, ask).await,
        Endpoint::Responses => responses::respond(services, ask).await,
        Endpoint::Embeddings => encode::embeddings(services, ask).await,
        Endpoint::Rerank => encode::rerank(services, ask).await,
        Endpoint::Run(model) => run::run(services, ask, model).await,
        Endpoint::RunUnified => run::run_unified(services, ask).await,
        Endpoint::BindingRun => binding::serve(services, ask).await,
        Endpoint::Models => models::list(services),
        Endpoint::Model(name) => models::get(services, name),
        Endpoint::ModelSearch => models::search(services, ask),
        Endpoint::ModelSchema => models::schema(services, ask),
        Endpoint::TaskSearch => models::tasks(ask),
        Endpoint::AuthorSearch => models::authors(services, ask),
        Endpoint::Finetunes => finetunes::list(services, &ask.caller.account).await,
        Endpoint::PublicFinetunes => finetunes::public(services).await,
        Endpoint::CreateFinetune => finetunes::create(services, ask).await,
        Endpoint::DeleteFinetune(key) => finetunes::delete(services, ask, key).await,
        Endpoint::Live
        | Endpoint::Ready
        | Endpoint::Metrics
        | Endpoint::FinetuneAssets(_)
        | Endpoint::NotBuilt(_)
        | Endpoint::Messages
        | Endpoint::Management(_)
        | Endpoint::Provider { .. }
        | Endpoint::Universal { .. }
        | Endpoint::CompatChat { .. }
        | Endpoint::CompatEmbeddings { .. }
        | Endpoint::CompatModels { .. }
        | Endpoint::GatewayRun { .. } => Err(Error::internal("an endpoint that was answered before")),
    }
}

/// The log line and the count of a request that the gateway never took over. Served ones are the gateway's to log.
fn refused(
    services: &Services,
    id: RequestId,
    route: &Route,
    trail: &Trail,
    status: u16,
    error: &Error,
    received: Instant,
) {
    services.metrics.errors.with_label_values(&[error.kind().as_str()]).inc();
    let account = trail.account.as_ref().map_or("-", AccountId::as_str);
    let model = trail.model.as_ref().map_or("-", ModelId::as_str);
    let kind = error.kind().as_str();
    let total_ms = received.elapsed().as_millis() as u64;
    let route = route.label;
    if status >= 500 {
        warn!(target: "neurond::call", request = %id, account, model, route, status, outcome = "refused", kind, error = ?error, total_ms);
    } else {
        info!(target: "neurond::call", request = %id, account, model, route, status, outcome = "refused", kind, error = ?error, total_ms);
    }
}
