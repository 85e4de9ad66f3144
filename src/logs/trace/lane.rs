//! What waits for one destination, and the task that sends it: a batch after the other, each until it has arrived or is given up.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use super::{Counts, Destination, Held, Settings, span, wire};
use crate::base::{RequestId, Result};
use crate::logs::post::{self, Trouble};
use crate::net::client::{Attempt, Client};

/// Spans that are sent at once.
const BATCH: usize = 512;
/// Bytes of them, about: servers commonly take 20 MB.
const BATCH_BYTES: usize = 4 << 20;
/// Spans that wait for one destination.
const MAX_SPANS: usize = 1 << 14;
/// Bytes of them: a quarter of what may wait for all.
const MAX_BYTES: usize = super::MAX_BYTES / 4;

/// See the top of this file.
pub(super) struct Lane {
    pub to: Destination,
    waiting: RefCell<VecDeque<Rc<Held>>>,
    /// Of what waits and of what is on its way.
    bytes: Cell<usize>,
    /// Something came, or the end.
    more: Notify,
    ending: Cell<bool>,
    /// What failed was tried once more for the sake of the end.
    hurried: Cell<bool>,
    used: Cell<Instant>,
}

impl Lane {
    pub(super) fn new(to: Destination) -> Self {
        Self {
            to,
            waiting: RefCell::default(),
            bytes: Cell::new(0),
            more: Notify::new(),
            ending: Cell::new(false),
            hurried: Cell::new(false),
            used: Cell::new(Instant::now()),
        }
    }

    /// Takes a span, if there is room.
    pub(super) fn push(&self, held: Rc<Held>) -> bool {
        self.used.set(Instant::now());
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() >= MAX_SPANS || self.bytes.get() + held.size > MAX_BYTES {
            return false;
        }
        self.bytes.set(self.bytes.get() + held.size);
        waiting.push_back(held);
        self.more.notify_one();
        true
    }

    /// Nothing waits, and nothing came for so long.
    pub(super) fn is_idle(&self, time: Duration) -> bool {
        self.bytes.get() == 0 && self.used.get().elapsed() >= time
    }

    /// What waits goes now, and nothing comes any more: it is not to be kept.
    pub(super) fn end(&self) -> bool {
        self.ending.set(true);
        self.more.notify_one();
        false
    }

    /// The next spans to be sent, when there are enough of them or they have waited long enough; `None` at the end.
    async fn batch(&self, linger: Duration) -> Option<Vec<Rc<Held>>> {
        while self.waiting.borrow().is_empty() {
            if self.ending.get() {
                return None;
            }
            self.more.notified().await;
        }
        let is_full = || self.waiting.borrow().len() >= BATCH || self.bytes.get() >= BATCH_BYTES;
        let full = async {
            while !is_full() && !self.ending.get() {
                self.more.notified().await;
            }
        };
        // Full or not, it goes.
        let _ = timeout(linger, full).await;
        let mut waiting = self.waiting.borrow_mut();
        let (mut count, mut bytes) = (0, 0);
        for held in waiting.iter().take(BATCH) {
            bytes += held.size;
            if count > 0 && bytes > BATCH_BYTES {
                break;
            }
            count += 1;
        }
        Some(waiting.drain(..count).collect())
    }

    /// Waits, but not into the end: when that comes, or has come meanwhile, one more try is made at once.
    async fn pause(&self, wait: Duration) {
        if self.hurried.get() {
            return sleep(wait).await;
        }
        let ended = async {
            while !self.ending.get() {
                self.more.notified().await;
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = ended => self.hurried.set(true),
        }
    }

    fn attempt(&self) -> Result<Attempt> {
        let Destination { url, headers, authorization, protobuf, allow_private } = &self.to;
        let (origin, path) = post::parse(url)?;
        let mut map = HeaderMap::new();
        post::add_headers(&mut map, headers.iter().map(|(name, value)| (name.as_str(), value)))?;
        post::add_headers(&mut map, authorization.iter().map(|value| (AUTHORIZATION.as_str(), value)))?;
        map.insert(CONTENT_TYPE, HeaderValue::from_static(wire::content_type(*protobuf)));
        let allow_private = *allow_private;
        Ok(Attempt { origin, method: Method::POST, path, headers: map, body: Bytes::new(), allow_private })
    }
}

/// Sends what the lane gets, until its end.
pub(super) async fn run(lane: Rc<Lane>, client: Client, settings: Settings, counts: Counts) {
    let made = lane.attempt();
    let mut sender =
        Sender { lane: &lane, client, settings, counts, is_failing: false, is_losing: false, has_rejected: false };
    while let Some(batch) = lane.batch(sender.settings.linger).await {
        let arrived = match &made {
            Ok(attempt) => sender.send(attempt, &batch).await,
            Err(error) => Err(error.to_string()),
        };
        sender.conclude(&batch, arrived);
        lane.bytes.set(lane.bytes.get() - batch.iter().map(|held| held.size).sum::<usize>());
    }
}

struct Sender<'a> {
    lane: &'a Lane,
    client: Client,
    settings: Settings,
    counts: Counts,
    is_failing: bool,
    is_losing: bool,
    has_rejected: bool,
}

impl Sender<'_> {
    /// Sends a batch until it has arrived or is given up. Returns how many of its spans the server would not take, and why it did not arrive.
    async fn send(&mut self, attempt: &Attempt, batch: &[Rc<Held>]) -> Result<u64, String> {
        let spans = batch.iter().map(|held| span::span(&held.record, &held.ids)).collect();
        let body = wire::encode(spans, self.lane.to.protobuf).map_err(|error| error.to_string())?;
        let attempt = Attempt { body: body.into(), ..attempt.clone() };
        let (begun, mut tries) = (Instant::now(), 0);
        loop {
            match post::send(&self.client, &attempt, self.settings.patience, wire::is_passing).await {
                Ok(said) => return Ok(self.rejected(&said, batch.len() as u64)),
                Err(Trouble::Lasting(why)) => return Err(why),
                Err(trouble @ Trouble::Passing(..)) => {
                    tries += 1;
                    let wait = trouble.wait(tries, self.settings.first_wait, RequestId::random().low_bits());
                    let (Trouble::Passing(why, _) | Trouble::Lasting(why)) = trouble;
                    if begun.elapsed() + wait > self.settings.give_up {
                        return Err(why);
                    }
                    let url = &self.lane.to.url;
                    if std::mem::replace(&mut self.is_failing, true) {
                        debug!(url, why, tries, ?wait, "spans could not be sent");
                    } else {
                        warn!(url, why, ?wait, "spans could not be sent; they are kept for a while and tried again");
                    }
                    self.lane.pause(wait).await;
                }
            }
        }
    }

    /// Spans that the server says that it did not take, which is told once.
    fn rejected(&mut self, said: &[u8], sent: u64) -> u64 {
        let Some((rejected, why)) = wire::rejected(said) else { return 0 };
        if (rejected > 0 || !why.is_empty()) && !std::mem::replace(&mut self.has_rejected, true) {
            warn!(url = self.lane.to.url, rejected, why, "a server takes spans, but not as they are");
        }
        rejected.min(sent)
    }

    fn conclude(&mut self, batch: &[Rc<Held>], arrived: Result<u64, String>) {
        let count = batch.len() as u64;
        let url = &self.lane.to.url;
        match arrived {
            Ok(rejected) => {
                self.is_losing = false;
                if std::mem::take(&mut self.is_failing) {
                    info!(url, "spans are sent again");
                }
                self.counts.sent.inc_by(count - rejected);
                self.counts.rejected.inc_by(rejected);
            }
            Err(why) => {
                self.is_failing = true;
                self.counts.failed.inc_by(count);
                if std::mem::replace(&mut self.is_losing, true) {
                    debug!(url, why, count, "spans are lost");
                } else {
                    error!(
                        url,
                        why,
                        count,
                        "spans are lost until they arrive again; see to the gateway's `otel`, or to the server"
                    );
                }
            }
        }
    }
}
