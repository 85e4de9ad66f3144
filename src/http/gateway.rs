//! Calls through a gateway: every form of address to an [`Ask`] for the relay, its reply to a response.
//!
//!     /v1/{account}/{gateway}/{provider}/…          a provider's own call
//!     /v1/{account}/{gateway}                       a list of steps, the first that answers counts
//!     /v1/{account}/{gateway}/compat/…              OpenAI's words for anybody's model
//!     /v1/messages, /ai/v1/messages                 Anthropic's words for anybody's model
//!     /ai/v1/…, /ai/run with cf-aig-gateway-id      the same on Cloudflare's own surface

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::http::header::HeaderMap;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde_json::Value;

use crate::base::{Error, Kind, RequestId, Result};
use crate::gateway::pipe::{End, Pipe};
use crate::gateway::record::Record;
use crate::gateway::relay::{Relay, Reply};
use crate::gateway::step;
use crate::http::entrance::{self, Entrance, Incoming};
use crate::http::route::{Endpoint, Route};
use crate::http::{Door, ask, models, socket};
use crate::provider;
use crate::vault::Caller;

/// Serves a call of one of the gateway's own addresses.
pub(super) async fn serve(
    door: &Door,
    request: &HttpRequest,
    payload: web::Payload,
    route: &Route,
    endpoint: &Endpoint,
    id: RequestId,
    received: Instant,
) -> Result<HttpResponse> {
    let Door { services, relay, .. } = door;
    let gateway = match endpoint {
        Endpoint::Provider { gateway, .. }
        | Endpoint::Universal { gateway }
        | Endpoint::CompatChat { gateway }
        | Endpoint::CompatEmbeddings { gateway }
        | Endpoint::CompatModels { gateway }
        | Endpoint::GatewayRun { gateway } => gateway,
        _ => return Err(Error::internal("an endpoint that is no gateway's")),
    };
    let entrance = entrance::enter(services, relay, route, request, gateway, id, received).await?;
    if socket::is_wanted(request) {
        return match endpoint {
            Endpoint::Universal { .. } => socket::universal(relay, request, payload, entrance),
            Endpoint::Provider { slug, rest, .. } => {
                let call = Incoming::read(request, Bytes::new());
                Box::pin(socket::realtime(relay, payload, entrance, call, slug, rest)).await
            }
            _ => Err(Error::bad_input("there is no WebSocket at this path")),
        };
    }
    if matches!(endpoint, Endpoint::Universal { .. }) && request.method() != actix_web::http::Method::POST {
        return Err(Error::new(Kind::MethodNotAllowed, "Method GET not available for that URI: use POST"));
    }
    let (limit, patience) = services.body_bounds();
    let body = ask::read_bytes(request.headers(), payload, limit, patience).await?;
    let call = Incoming::read(request, body);
    let ask = match endpoint {
        Endpoint::Provider { slug, rest, .. } => entrance.native(call, slug, rest),
        Endpoint::Universal { .. } => entrance.universal(call),
        Endpoint::CompatChat { .. } => entrance.chat(relay, call).await,
        Endpoint::CompatEmbeddings { .. } => entrance.embeddings(call),
        Endpoint::GatewayRun { .. } => return Box::pin(run(relay, entrance, call)).await,
        _ => return models::list(services),
    }?;
    Ok(render(relay.serve(ask).await?))
}

/// Serves a call of the surfaces that know accounts by their token, through the gateway it names.
pub(super) async fn serve_named(
    door: &Door,
    request: &HttpRequest,
    body: Bytes,
    endpoint: &Endpoint,
    caller: Caller,
    id: RequestId,
    received: Instant,
) -> Result<HttpResponse> {
    let Door { services, relay, .. } = door;
    let entrance = entrance::enter_named(services, relay, request, caller, id, received).await?;
    let mut call = Incoming::read(request, body);
    call.forget_token(*endpoint == Endpoint::Messages);
    let ask = match endpoint {
        Endpoint::Messages => entrance.messages(relay, call).await,
        Endpoint::ChatCompletions => entrance.chat(relay, call).await,
        Endpoint::Embeddings => entrance.embeddings(call),
        Endpoint::Completions => entrance.named_native(call, "completions"),
        Endpoint::Responses => entrance.named_native(call, "responses"),
        Endpoint::Run(model) => entrance.native(call, step::LOCAL, &format!("run/{model}")),
        Endpoint::RunUnified => return run(relay, entrance, call).await,
        _ => Err(Error::internal("an endpoint that goes through no gateway")),
    }?;
    Ok(render(relay.serve(ask).await?))
}

/// Whether a call of those surfaces goes through a gateway: it names one, or a model that is not served here.
pub(super) fn is_meant(headers: &HeaderMap, endpoint: &Endpoint, body: &[u8]) -> bool {
    let takes_model = matches!(
        endpoint,
        Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Embeddings | Endpoint::Responses
    );
    match endpoint {
        Endpoint::Messages => true,
        _ if !takes_model && !matches!(endpoint, Endpoint::Run(_) | Endpoint::RunUnified) => false,
        _ if headers.contains_key(&entrance::GATEWAY) => true,
        _ if !takes_model => false,
        _ => provider::facts(body).and_then(|facts| facts.model).is_some_and(|model| {
            let slug = model.split_once('/').map(|(slug, _)| slug);
            slug.is_some_and(|slug| slug == "dynamic" || slug.starts_with("custom-") || provider::find(slug).is_some())
        }),
    }
}

/// A call of the run form; a stream is handed on as it is, anything else in an envelope.
async fn run(relay: &Rc<Relay>, entrance: Entrance, call: Incoming) -> Result<HttpResponse> {
    let (ask, provider, model) = entrance.run(relay, call).await?;
    let limit = relay.parts.config.get().upstream.max_answer_bytes;
    let reply = relay.serve(ask).await?;
    if reply.headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
        return Ok(render(reply));
    }
    enveloped(reply, &provider, &model, limit).await
}

/// The run API's own envelope around a whole answer.
async fn enveloped(mut reply: Reply, provider: &str, model: &str, limit: usize) -> Result<HttpResponse> {
    let (status, headers) = (reply.status, std::mem::take(&mut reply.headers));
    let mut body = RelayBody::new(reply);
    let mut all = Vec::new();
    while let Some(chunk) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_next(cx)).await {
        let chunk = chunk?;
        if all.len() + chunk.len() > limit {
            return Err(Error::new(Kind::Unreachable, "The provider's answer is too large to be put in an envelope."));
        }
        all.extend_from_slice(&chunk);
    }
    let answer: Value =
        serde_json::from_slice(&all).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&all).into()));
    let body = if status.is_success() {
        let result = answer.get("result").filter(|_| answer.get("success").is_some()).cloned().unwrap_or(answer);
        serde_json::json!({ "state": "Completed", "result": result, "provider": provider, "model": model })
    } else {
        let first = answer.get("errors").and_then(|errors| errors.get(0)).cloned();
        let error = first.or_else(|| answer.get("error").cloned());
        let message = error.as_ref().and_then(|error| error.get("message")).cloned();
        let code = error.as_ref().and_then(|error| error.get("code")).cloned();
        let error = serde_json::json!({
            "code": code.unwrap_or(Value::from(status.as_u16())),
            "message": message.unwrap_or(answer),
        });
        serde_json::json!({ "state": "Failed", "error": error, "provider": provider, "model": model })
    };
    let mut response = HttpResponse::build(status);
    for header in headers.into_iter().filter(|(name, _)| name.as_str().starts_with("cf-aig-")) {
        response.append_header(header);
    }
    Ok(response.content_type("application/json").body(body.to_string()))
}

/// A reply as a response.
pub(super) fn render(mut reply: Reply) -> HttpResponse {
    let mut response = HttpResponse::new(reply.status);
    for (name, value) in std::mem::take(&mut reply.headers) {
        response.headers_mut().append(name, value);
    }
    response.set_body(BoxBody::new(RelayBody::new(reply)))
}

/// The body of a reply. What the caller has read by the end, or until it left, is what is recorded.
struct RelayBody {
    pipe: Box<Pipe>,
    record: Box<Record>,
    size: BodySize,
}

impl RelayBody {
    fn new(reply: Reply) -> Self {
        let size = reply.pipe.length().map_or(BodySize::Stream, BodySize::Sized);
        Self { pipe: reply.pipe, record: reply.record, size }
    }
}

impl MessageBody for RelayBody {
    type Error = Error;

    fn size(&self) -> BodySize {
        self.size
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes>>> {
        let this = &mut *self;
        let chunk = std::task::ready!(this.pipe.poll_chunk(cx));
        match &chunk {
            Some(Ok(bytes)) => this.record.sent(bytes),
            Some(Err(_)) | None => {
                this.pipe.settle();
                this.record.ended(this.pipe.end().unwrap_or(&End::Whole));
            }
        }
        Poll::Ready(chunk)
    }
}

impl Drop for RelayBody {
    fn drop(&mut self) {
        self.pipe.settle();
        // A body of known size is never asked for its end.
        match self.size {
            BodySize::Sized(bytes) if self.record.is_whole(bytes) => self.record.ended(&End::Whole),
            _ => self.record.left(),
        }
    }
}
