//! WebSockets of a gateway.
//!
//!     universal    {"type":"universal.create","request":{…}} --> relay --> universal.created, .stream …, .done
//!     realtime     the client's own handshake --> the provider; then bytes both ways, as they come
//!
//! Many requests share a universal socket, told apart by `eventId`; each is a call like any other. A realtime socket is one
//! call, and nothing in it is read but what the provider says that it used.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderName, HeaderValue, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use actix_web::{HttpRequest, HttpResponse, web};
use actix_ws::{AggregatedMessage, CloseCode, CloseReason, Session};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::task::{JoinHandle, JoinSet};

use crate::base::{Error, RequestId, Result};
use crate::gateway::pipe::End;
use crate::gateway::record::Record;
use crate::gateway::relay::talk::Talk;
use crate::gateway::relay::{Relay, Reply};
use crate::http::entrance::{Entrance, Incoming};
use crate::http::route::Surface;
use crate::http::{auth, error};
use crate::net::sse;

/// Requests of one universal socket that are served at the same time; the next is read when one is done.
const MAX_OPEN: usize = 32;
/// Longest reason for closing a socket, in bytes.
const CLOSE_REASON: usize = 123;
/// Largest message.
const MAX_MESSAGE: usize = 16 << 20;

/// Whether a request wants to become a WebSocket.
pub(super) fn is_wanted(request: &HttpRequest) -> bool {
    let upgrade = request.headers().get(UPGRADE).and_then(|value| value.to_str().ok());
    upgrade.is_some_and(|value| value.eq_ignore_ascii_case("websocket"))
}

/// Opens a universal socket.
pub(super) fn universal(
    relay: &Rc<Relay>,
    request: &HttpRequest,
    payload: web::Payload,
    entrance: Entrance,
) -> Result<HttpResponse> {
    let (mut response, session, messages) = actix_ws::handle(request, payload)
        .map_err(|error| Error::bad_input(format!("this is no WebSocket handshake: {error}")))?;
    if let Some((_, protocol)) = auth::hidden(request)
        && let Ok(value) = HeaderValue::from_str(protocol)
    {
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, value);
    }
    let messages = messages.max_frame_size(MAX_MESSAGE).aggregate_continuations().max_continuation_size(MAX_MESSAGE);
    let (relay, request) = (relay.clone(), request.clone());
    actix_web::rt::spawn(converse(relay, request, entrance, session, messages));
    Ok(response)
}

/// Reads requests until the client leaves, which ends what is still being answered.
async fn converse(
    relay: Rc<Relay>,
    request: HttpRequest,
    entrance: Entrance,
    mut session: Session,
    mut messages: actix_ws::AggregatedMessageStream,
) {
    let mut open = JoinSet::new();
    loop {
        while open.len() >= MAX_OPEN {
            open.join_next().await;
        }
        let message = tokio::select! {
            message = messages.next() => message,
            Some(_) = open.join_next(), if !open.is_empty() => continue,
        };
        let text = match message {
            Some(Ok(AggregatedMessage::Text(text))) => Bytes::from(text.to_string()),
            Some(Ok(AggregatedMessage::Binary(bytes))) => bytes,
            Some(Ok(AggregatedMessage::Ping(bytes))) => {
                if session.pong(&bytes).await.is_err() {
                    return;
                }
                continue;
            }
            Some(Ok(AggregatedMessage::Pong(_))) => continue,
            Some(Ok(AggregatedMessage::Close(reason))) => {
                let _ = session.close(reason).await;
                return;
            }
            Some(Err(error)) => {
                let reason = CloseReason { code: CloseCode::Protocol, description: Some(error.to_string()) };
                let _ = session.close(Some(reason)).await;
                return;
            }
            None => return,
        };
        let (relay, entrance, session) = (relay.clone(), entrance.again(RequestId::random()), session.clone());
        let call = Incoming::read(&request, text);
        open.spawn_local(async move {
            let _ = answer(relay, entrance, call, session).await;
        });
    }
}

/// One request of a universal socket. `Err`: the client has left.
async fn answer(
    relay: Rc<Relay>,
    entrance: Entrance,
    mut call: Incoming,
    mut session: Session,
) -> Result<(), actix_ws::Closed> {
    let id = entrance.id();
    let written: Value = serde_json::from_slice(&call.body).unwrap_or_default();
    let step = &written["request"];
    let event = step["eventId"].as_str().map(str::to_owned);
    let metadata = json!({ "eventId": event });
    let outcome = if written["type"] != "universal.create" || !step.is_object() {
        Err(Error::bad_input(
            "a message is {\"type\":\"universal.create\",\"request\":{\"eventId\",\"provider\",\"endpoint\",\"headers\",\"query\"}}",
        ))
    } else {
        call.body = Bytes::from(step.to_string());
        if event.is_some() {
            Rc::make_mut(&mut call.options).event_id = event;
        }
        match entrance.universal(call) {
            Ok(ask) => relay.serve(ask).await,
            Err(error) => Err(error),
        }
    };
    let reply = match outcome {
        Ok(reply) => reply,
        Err(error) => {
            relay.parts.metrics.errors.with_label_values(&[error.kind().as_str()]).inc();
            let refusal = error::value(Surface::Gateway, id, &error);
            return session
                .text(json!({ "type": "universal.error", "metadata": metadata, "error": refusal }).to_string())
                .await;
        }
    };
    let Reply { status, headers, mut pipe, mut record } = reply;
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let kind = text("content-type").unwrap_or_default().to_owned();
    let streams = kind.starts_with("text/event-stream");
    let about = json!({
        "cacheStatus": text("cf-aig-cache-status"),
        "eventId": metadata["eventId"],
        "logId": text("cf-aig-log-id"),
        "step": text("cf-aig-step").and_then(|step| step.parse::<u64>().ok()).unwrap_or(0),
        "contentType": kind,
        "status": status.as_u16(),
    });
    if streams {
        session.text(json!({ "type": "universal.created", "metadata": about }).to_string()).await?;
    }
    let mut whole = BytesMut::new();
    let mut decoder = sse::Decoder::new(MAX_MESSAGE);
    let mut events = Vec::new();
    while let Some(chunk) = std::future::poll_fn(|cx| pipe.poll_chunk(cx)).await {
        let Ok(chunk) = chunk else { break };
        record.sent(&chunk);
        if !streams {
            whole.extend_from_slice(&chunk);
            continue;
        }
        if decoder.feed(&chunk, &mut events).is_err() {
            break;
        }
        for event in events.drain(..) {
            let response = serde_json::from_str(&event.data).unwrap_or(Value::String(event.data));
            let message = json!({ "type": "universal.stream", "metadata": metadata, "response": response });
            session.text(message.to_string()).await?;
        }
    }
    pipe.settle();
    record.ended(pipe.end().unwrap_or(&End::Whole));
    if streams {
        return session.text(json!({ "type": "universal.done", "metadata": metadata }).to_string()).await;
    }
    let response =
        serde_json::from_slice(&whole).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&whole).into()));
    session.text(json!({ "type": "universal.created", "metadata": about, "response": response }).to_string()).await
}

/// Hands a client's handshake to a provider, and afterwards bytes both ways.
pub(super) async fn realtime(
    relay: &Rc<Relay>,
    payload: web::Payload,
    entrance: Entrance,
    call: Incoming,
    slug: &str,
    rest: &str,
) -> Result<HttpResponse> {
    let rest = if rest.is_empty() { realtime_path(slug) } else { rest };
    let (headers, upgraded, record, talk) = relay.upgrade(entrance.realtime(call, slug, rest)?).await?;
    let mut response = HttpResponse::new(StatusCode::SWITCHING_PROTOCOLS);
    for (name, value) in &headers {
        let name = HeaderName::from_bytes(name.as_str().as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value.as_bytes())) {
            response.headers_mut().append(name, value);
        }
    }
    response.head_mut().set_connection_type(actix_web::http::ConnectionType::Upgrade);
    let (from, to) = tokio::io::split(TokioIo::new(upgraded));
    let pump = actix_web::rt::spawn(pump(payload, to));
    Ok(response.set_body(BoxBody::new(Realtime { from, pump, record, talk, buffer: BytesMut::new(), is_over: false })))
}

/// Where a provider's sockets are that a client only named by the provider.
fn realtime_path(slug: &str) -> &'static str {
    match slug {
        "openai" => "realtime",
        "google" | "google-ai-studio" => "ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent",
        "cartesia" => "tts/websocket",
        _ => "",
    }
}

/// What the client says, to the provider, no faster than that takes it.
async fn pump(mut payload: web::Payload, mut to: WriteHalf<TokioIo<Upgraded>>) {
    while let Some(Ok(chunk)) = payload.next().await {
        if to.write_all(&chunk).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// What the provider says, to the client. Dropped, it ends both.
struct Realtime {
    from: ReadHalf<TokioIo<Upgraded>>,
    pump: JoinHandle<()>,
    record: Box<Record>,
    talk: Talk,
    buffer: BytesMut,
    is_over: bool,
}

impl MessageBody for Realtime {
    type Error = std::io::Error;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<std::io::Result<Bytes>>> {
        let this = &mut *self;
        if this.is_over {
            return Poll::Ready(None);
        }
        if let Err(reason) = ready!(this.talk.poll_settled(cx)) {
            this.end();
            // Between two messages it can be said why.
            let said = this.talk.is_between().then(|| Ok(close(reason.message()).into()));
            return Poll::Ready(said);
        }
        this.buffer.reserve(16 * 1024);
        let read = tokio_util::io::poll_read_buf(Pin::new(&mut this.from), cx, &mut this.buffer);
        match ready!(read) {
            Ok(0) => {
                this.end();
                Poll::Ready(None)
            }
            Ok(bytes) => {
                this.record.passed(bytes);
                this.talk.hear(&this.buffer);
                Poll::Ready(Some(Ok(this.buffer.split().freeze())))
            }
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }
}

impl Realtime {
    fn end(&mut self) {
        self.is_over = true;
        self.pump.abort();
        if let Some(charge) = self.talk.end() {
            let _ = self.record.receipt().set(charge);
        }
        self.record.ended(&End::Whole);
    }
}

impl Drop for Realtime {
    fn drop(&mut self) {
        self.pump.abort();
        // The client left. What was said up to then is owed, and the record tells it when it is dropped.
        if let Some(charge) = self.talk.end() {
            let _ = self.record.receipt().set(charge);
        }
    }
}

/// A server's frame that closes a socket because of a policy, and says why as far as there is room.
fn close(reason: &str) -> Vec<u8> {
    let mut end = reason.len().min(CLOSE_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut frame = vec![0x88, 2 + end as u8];
    frame.extend_from_slice(&u16::from(CloseCode::Policy).to_be_bytes());
    frame.extend_from_slice(&reason.as_bytes()[..end]);
    frame
}
