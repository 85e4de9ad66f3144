//! Counts a request from its head to the last byte of its answer, or to the moment its client left.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::http::Method;
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use crate::base::{Lookup, RequestId};
use crate::http::route::Route;
use crate::metrics::Metrics;

/// What nginx calls a request whose client left before there was an answer.
const CLIENT_LEFT: u16 = 499;

/// A worker's handles of the series that requests count in: to find one by its labels takes longer than to count.
pub(super) struct Requests {
    requests: IntCounterVec,
    duration: HistogramVec,
    in_flight: IntGauge,
    known: RefCell<Lookup<Labels, Rc<Series>>>,
}

/// Route, method and status.
type Labels = (&'static str, &'static str, u16);

struct Series {
    requests: IntCounter,
    duration: Histogram,
}

impl Requests {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            requests: metrics.http_requests.own(),
            duration: metrics.http_duration.own(),
            in_flight: metrics.http_in_flight.own(),
            known: RefCell::default(),
        }
    }

    fn series(&self, route: &'static str, method: &'static str, status: u16) -> Rc<Series> {
        let mut known = self.known.borrow_mut();
        let found = known.entry((route, method, status)).or_insert_with(|| {
            let requests = self.requests.with_label_values(&[route, method, &status.to_string()]);
            let duration = self.duration.with_label_values(&[route]);
            Rc::new(Series { requests, duration })
        });
        found.clone()
    }
}

/// A request being answered. Counted when it is dropped.
pub(super) struct Observation {
    requests: Rc<Requests>,
    route: &'static str,
    method: &'static str,
    received: Instant,
    /// Of the answer, once there is one.
    pub(super) status: u16,
}

impl Observation {
    pub(super) fn begin(requests: &Rc<Requests>, route: &Route, method: &Method, received: Instant) -> Self {
        requests.in_flight.inc();
        let method = match method.as_str() {
            "GET" => "GET",
            "POST" => "POST",
            "HEAD" => "HEAD",
            _ => "other",
        };
        Self { requests: requests.clone(), route: route.label, method, received, status: CLIENT_LEFT }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        self.requests.in_flight.dec();
        let series = self.requests.series(self.route, self.method, self.status);
        series.requests.inc();
        series.duration.observe(self.received.elapsed().as_secs_f64());
    }
}

/// Ids that clients chose and that are in use now. The ledger settles by request id, so a client that sends one id twice
/// at the same time must not have two calls billed as one.
#[derive(Clone, Default)]
pub(super) struct InFlight(Arc<Mutex<HashSet<RequestId>>>);

/// A request's id; free for use again when dropped.
pub(super) struct HeldId {
    id: RequestId,
    held: Option<InFlight>,
}

impl InFlight {
    /// The id the client sent, if it may have it; a fresh one otherwise.
    pub(super) fn enter(&self, sent: Option<RequestId>) -> HeldId {
        match sent {
            Some(id) if self.0.lock().insert(id) => HeldId { id, held: Some(self.clone()) },
            _ => HeldId { id: RequestId::random(), held: None },
        }
    }
}

impl Deref for HeldId {
    type Target = RequestId;
    fn deref(&self) -> &RequestId {
        &self.id
    }
}

impl Drop for HeldId {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.0.lock().remove(&self.id);
        }
    }
}

/// The body as it is, observed until it is sent or dropped.
pub(super) fn watched(body: BoxBody, observation: Observation, id: HeldId) -> BoxBody {
    BoxBody::new(Watched { body, _observation: observation, _id: id })
}

struct Watched {
    body: BoxBody,
    // Dropped after the body, in this order: a delivery closes before its id is free again.
    _observation: Observation,
    _id: HeldId,
}

impl MessageBody for Watched {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_in_use_is_not_given_twice() {
        let in_flight = InFlight::default();
        let sent = RequestId::random();
        let first = in_flight.enter(Some(sent));
        let second = in_flight.enter(Some(sent));
        assert_eq!(*first, sent);
        assert_ne!(*second, sent);
        drop(second);
        assert_ne!(*in_flight.enter(Some(sent)), sent, "still held by the first");
        drop(first);
        assert_eq!(*in_flight.enter(Some(sent)), sent);
        assert_ne!(*in_flight.enter(None), *in_flight.enter(None));
    }
}
