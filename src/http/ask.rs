//! A request on its way to an answer: who asks, what was sent, and what the log wants to know at the end.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use actix_web::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, HeaderMap};
use actix_web::web;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use serde_json::Value;

use crate::base::{Error, Kind, ModelId, RequestId, Result};
use crate::config::{Catalog, CatalogEntry};
use crate::gateway::{Answer, Call, Delivery, Encoded, Terms};
use crate::http::Services;
use crate::http::fields::Fields;
use crate::http::route::Surface;
use crate::net::gather::Gather;
use crate::task::{EncodeInput, Task, TextInput};
use crate::vault::Caller;

/// Bodies larger than this are parsed on a blocking thread.
const INLINE_BODY_BYTES: usize = 256 * 1024;
/// Longest session affinity looked at; it is hashed, not stored.
const MAX_AFFINITY: usize = 256;
/// Longest model name repeated in an error.
const MAX_ECHO: usize = 128;

/// A request whose sender is known and whose body has been read.
pub(super) struct Ask {
    pub(super) id: RequestId,
    pub(super) surface: Surface,
    pub(super) caller: Caller,
    pub(super) affinity: Option<String>,
    pub(super) received: Instant,
    pub(super) query: HashMap<String, String>,
    /// `cf-consn-model-id` of the AI binding.
    pub(super) model_header: Option<String>,
    /// `null` for requests that have none.
    pub(super) body: Value,
    /// Which model it turned out to be, for the log.
    pub(super) model: OnceCell<ModelId>,
    /// Whether the gateway has taken it over: from then on the gateway counts and logs.
    pub(super) served: Cell<bool>,
    /// By what its calls are measured.
    pub(super) terms: Terms,
}

impl Ask {
    /// The body's fields.
    ///
    /// # Errors
    /// `BadInput` if the body is no object.
    pub(super) fn fields(&self) -> Result<Fields<'_>> {
        Fields::of(&self.body)
    }

    /// The catalog entry behind a name, if it generates text.
    ///
    /// # Errors
    /// `NoSuchModel` for unknown names and for models of other tasks.
    pub(super) fn text_model(&self, services: &Services, name: &str) -> Result<Arc<CatalogEntry>> {
        self.model_for(services, name, &[Task::TextGeneration])
    }

    /// The catalog entry behind a name, if it does one of these tasks.
    ///
    /// # Errors
    /// `NoSuchModel` for unknown names and for models of other tasks.
    pub(super) fn model_for(&self, services: &Services, name: &str, tasks: &[Task]) -> Result<Arc<CatalogEntry>> {
        let config = services.config.get();
        let entry = config.catalog.resolve(name).filter(|entry| tasks.contains(&entry.task));
        let Some(entry) = entry else { return Err(no_such_model(&config.catalog, name)) };
        let _ = self.model.set(entry.id.clone());
        Ok(entry.clone())
    }

    /// Serves one call up to its first event.
    pub(super) async fn serve(
        &self,
        services: &Services,
        entry: &Arc<CatalogEntry>,
        input: TextInput,
        reject_if_busy: bool,
    ) -> Result<Delivery> {
        let delivery = services.gateway.serve(self.call(self.id, entry, input, reject_if_busy)).await?;
        self.served.set(true);
        Ok(delivery)
    }

    /// Serves several calls at once, up to the first event of each.
    pub(super) async fn serve_all(
        &self,
        services: &Services,
        entry: &Arc<CatalogEntry>,
        inputs: Vec<TextInput>,
        reject_if_busy: bool,
    ) -> Result<Vec<Delivery>> {
        let calls = inputs.into_iter().enumerate().map(|(i, input)| {
            // The ledger settles by id, so each call has its own; the first has the request's, and counts as it.
            let id = if i == 0 { self.id } else { RequestId::random() };
            let mut call = self.call(id, entry, input, reject_if_busy);
            call.terms.is_part = i > 0;
            services.gateway.serve(call)
        });
        let deliveries = try_join_all(calls).await?;
        self.served.set(true);
        Ok(deliveries)
    }

    /// Embeds or classifies.
    pub(super) async fn encode(
        &self,
        services: &Services,
        entry: &Arc<CatalogEntry>,
        input: EncodeInput,
        reject_if_busy: bool,
    ) -> Result<Encoded> {
        let encoded = services.gateway.encode(self.call(self.id, entry, Arc::new(input), reject_if_busy)).await?;
        self.served.set(true);
        Ok(encoded)
    }

    fn call<Input>(&self, id: RequestId, entry: &Arc<CatalogEntry>, input: Input, reject_if_busy: bool) -> Call<Input> {
        Call {
            id,
            account: self.caller.account.clone(),
            key: self.caller.key.clone(),
            entry: entry.clone(),
            input,
            affinity: self.affinity.clone(),
            reject_if_busy,
            received: self.received,
            terms: self.terms.clone(),
        }
    }
}

/// The answers to several prompts as one, in order.
pub(super) async fn collect(deliveries: Vec<Delivery>) -> Result<Answer> {
    let mut answers = try_join_all(deliveries.into_iter().map(Delivery::collect)).await?.into_iter();
    let Some(mut whole) = answers.next() else { return Err(Error::internal("no prompt was served")) };
    for answer in answers {
        whole.choices.extend(answer.choices);
        whole.usage = crate::http::answer::sum(whole.usage, answer.usage);
        whole.neurons = whole.neurons + answer.neurons;
    }
    Ok(whole)
}

/// The error for a name that is in no catalog, or does not do this task.
pub(super) fn no_such_model(catalog: &Catalog, name: &str) -> Error {
    let told: String = name.chars().take(MAX_ECHO).collect();
    // Comparing a long name with every entry would be work for nothing.
    let nearest =
        if told.len() == name.len() { catalog.nearest(name).filter(|nearest| *nearest != name) } else { None };
    let hint = nearest.map(|nearest| format!("; did you mean `{nearest}`?")).unwrap_or_default();
    Error::new(Kind::NoSuchModel, format!("No such model `{told}` or task{hint}")).with_param("model")
}

/// A body as JSON, sent as it is.
///
/// # Errors
/// `BadInput` if it is compressed or not JSON in UTF-8.
pub(super) async fn plain_json(headers: &HeaderMap, body: Bytes) -> Result<Value> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        let encoding = encoding.to_str().unwrap_or("?");
        return Err(Error::bad_input(format!("Content-Encoding `{encoding}` is not accepted: send plain JSON")));
    }
    parse_json(body).await
}

/// Reads a whole body, whatever it holds. A body that came in one piece is not copied.
///
/// # Errors
/// `TooLarge` beyond `limit` bytes, `Timeout` if it is not there within `patience`.
pub(super) async fn read_bytes(
    headers: &HeaderMap,
    mut payload: web::Payload,
    limit: usize,
    patience: Duration,
) -> Result<Bytes> {
    let too_large = || {
        let message = format!("The request body is larger than {limit} bytes, the limit of this server.");
        Error::new(Kind::TooLarge, message)
    };
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut read = pin!(async {
        let mut gather = Gather::expecting(announced.unwrap_or(0).min(INLINE_BODY_BYTES));
        while let Some(chunk) = payload.next().await {
            let chunk = chunk.map_err(|error| {
                Error::bad_input("the request body broke off before its end")
                    .with_source(std::io::Error::other(error.to_string()))
            })?;
            if !gather.push(chunk, limit) {
                return Err(too_large());
            }
        }
        Ok(gather.whole())
    });
    // Most bodies come with their heads, right behind this first look: no clock is wound up for them.
    let mut looked = false;
    let there = poll_fn(|cx| match read.as_mut().poll(cx) {
        Poll::Ready(body) => Poll::Ready(Some(body)),
        Poll::Pending if std::mem::replace(&mut looked, true) => Poll::Ready(None),
        Poll::Pending => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    });
    if let Some(body) = there.await {
        return body;
    }
    tokio::time::timeout(patience, read).await.map_err(|_| {
        let message = format!("The request body was not complete within {} s.", patience.as_secs_f64());
        Error::new(Kind::Timeout, message)
    })?
}

/// A body as JSON; a large one is parsed on a blocking thread.
///
/// # Errors
/// `BadInput` if it is not JSON in UTF-8.
pub(super) async fn parse_json(body: Bytes) -> Result<Value> {
    if body.len() <= INLINE_BODY_BYTES {
        return parse(&body);
    }
    web::block(move || parse(&body))
        .await
        .map_err(|error| Error::internal("the body was not parsed").with_source(error))?
}

fn parse(body: &[u8]) -> Result<Value> {
    if body.is_empty() {
        return Err(Error::bad_input("the request body is empty: send a JSON object"));
    }
    // Nesting is bounded by the parser itself (128 levels), so a bomb is an error like any other.
    serde_json::from_slice(body).map_err(|error| match std::str::from_utf8(body) {
        Ok(_) => Error::bad_input(format!("the request body is not JSON: {error}")),
        Err(utf8) => Error::bad_input(format!("the request body is not UTF-8 from byte {} on", utf8.valid_up_to())),
    })
}

/// `x-session-affinity`, as far as it is looked at.
pub(super) fn affinity(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-session-affinity")?.to_str().ok()?;
    (!value.is_empty()).then(|| value.chars().take(MAX_AFFINITY).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_json_is_refused_with_the_reason() {
        let check = |body: &[u8], expected: &str| {
            let error = parse(body).unwrap_err();
            assert_eq!(error.kind(), Kind::BadInput);
            assert!(error.message().contains(expected), "{}", error.message());
        };
        check(b"", "empty");
        check(b"{\"a\":", "EOF");
        check(b"{\"a\": \"\xff\"}", "not UTF-8 from byte 7 on");
        check("[".repeat(1_000_000).as_bytes(), "recursion limit");
        check("{\"a\":".repeat(100_000).as_bytes(), "recursion limit");
    }
}
