//! What a conversation over a realtime socket costs: each answer is settled as the provider tells what it took.
//!
//! ```text
//!   handshake ─ limits, budgets ─> held ─ "it took so much" ─> settled, and held anew ─ … ─ end: given back
//!                                                                     └─ refused: the conversation ends
//! ```
//!
//! So what was used is written down while the conversation goes on, and a budget that is used up ends it. A conversation is
//! one request, whatever is said in it.

use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use actix_web::http::StatusCode;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::header;
use hyper::upgrade::Upgraded;
use tokio::time::timeout;

use super::Relay;
use super::attempt::{Failure, Trail, no_answer, word};
use crate::base::{Error, Result};
use crate::fallback::Target;
use crate::gateway::asked::Ask;
use crate::gateway::bill::{Bill, Charge, Receipt};
use crate::gateway::options::CustomCost;
use crate::gateway::record::Record;
use crate::gateway::step::{Step, Way};
use crate::logs::CacheUse;
use crate::net::client::Fault;
use crate::provider;
use crate::task::Usage;

impl Relay {
    /// Hands a handshake for a WebSocket to the provider of a call's first step.
    ///
    /// # Errors
    /// As [`Relay::serve`].
    pub async fn upgrade(self: &Rc<Self>, mut ask: Ask) -> Result<(http::HeaderMap, Upgraded, Box<Record>, Talk)> {
        let mut record = Record::begin(&self.counts, &ask);
        record.is_socket();
        let mut trail = Trail::default();
        let outcome = match self.admit(&mut ask, &mut record).await {
            Ok(()) => self.handshake(ask, &mut trail).await,
            Err(error) => Err(error),
        };
        record.waited(trail.elsewhere);
        match outcome {
            Ok((mut headers, upgraded, target, talk)) => {
                let status = StatusCode::SWITCHING_PROTOCOLS;
                record.begun(status, CacheUse::Off, (&target.provider, &target.model), 0, &trail.text, "");
                headers.insert("cf-aig-step", http::HeaderValue::from_static("0"));
                if let Some(log) = record.log
                    && let Ok(value) = http::HeaderValue::from_str(&log.to_string())
                {
                    headers.insert("cf-aig-log-id", value);
                }
                Ok((headers, upgraded, record, talk))
            }
            Err(error) => {
                let error = error.with_attempts(&trail.text);
                record.refused(&error);
                Err(error)
            }
        }
    }

    async fn handshake(
        self: &Rc<Self>,
        mut ask: Ask,
        trail: &mut Trail,
    ) -> Result<(http::HeaderMap, Upgraded, Target, Talk)> {
        let step = ask.next_step().unwrap_or_else(|| Err(Error::internal("a call without steps")))?;
        let Way::Upstream { attempt, sign } = &step.way else {
            return Err(Error::unsupported("The models of this server have no realtime sockets."));
        };
        let failed = |failure| match failure {
            Failure::Ours(error) => error,
            Failure::Fault(fault) => no_answer(&step.target, &fault),
        };
        let signed = self.signed(attempt, sign, &ask.gateway).await.map_err(failed)?;
        let mut attempt = signed.unwrap_or_else(|| attempt.clone());
        attempt.headers.insert(header::CONNECTION, http::HeaderValue::from_static("Upgrade"));
        attempt.headers.insert(header::UPGRADE, http::HeaderValue::from_static("websocket"));
        // Compressed, nobody here could read what it costs.
        attempt.headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
        let target = step.target.clone();
        let talk = Talk::begin(self, ask, step).await?;
        let patience = self.parts.config.get().upstream.first_byte_timeout;
        let began = Instant::now();
        let outcome = timeout(patience, self.client.upgrade(&attempt)).await;
        trail.elsewhere += began.elapsed();
        let outcome = outcome.unwrap_or(Err(Fault::Timeout("the handshake")));
        trail.note(&target, outcome.as_ref().map_or_else(word, |_| "101"));
        let (headers, upgraded) = outcome.map_err(|fault| no_answer(&target, &fault))?;
        Ok((headers, upgraded, target, talk))
    }
}

/// See the top of this file.
pub struct Talk {
    relay: Rc<Relay>,
    about: Rc<(Ask, Step)>,
    /// Of the answer that comes next, or is told already.
    bill: Option<Box<Bill>>,
    /// What holds the next one.
    next: Option<LocalBoxFuture<'static, Result<Box<Bill>>>>,
    heard: provider::Talk,
    /// Told, and not settled. There is a bill for it: nothing more is read before the next one is held.
    told: Option<Usage>,
    /// All answers together; `None`: there was none.
    sum: Option<Charge>,
}

impl Talk {
    /// Looks at the limits that bind it.
    ///
    /// # Errors
    /// Which of them refuses it.
    async fn begin(relay: &Rc<Relay>, ask: Ask, step: Step) -> Result<Self> {
        let bill = Some(relay.bill(&ask, &step, &Receipt::default(), false).await?);
        let (relay, about) = (relay.clone(), Rc::new((ask, step)));
        Ok(Self { relay, about, bill, next: None, heard: provider::Talk::default(), told: None, sum: None })
    }

    /// Hears what the provider says.
    pub fn hear(&mut self, bytes: &[u8]) {
        self.heard.feed(bytes, |usage| self.told = self.told.into_iter().chain([usage]).reduce(sum));
    }

    /// Settles what was told; ready when the next answer may come.
    ///
    /// # Errors
    /// Which limit is reached: the conversation is to end.
    pub fn poll_settled(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            if let Some(next) = &mut self.next {
                let bill = ready!(next.as_mut().poll(cx));
                self.next = None;
                self.bill = Some(bill?);
            }
            let Some(usage) = self.told.take() else { return Poll::Ready(Ok(())) };
            self.settle(Some(usage));
            let (relay, about) = (self.relay.clone(), self.about.clone());
            let next = async move { relay.bill(&about.0, &about.1, &Receipt::default(), true).await };
            self.next = Some(next.boxed_local());
        }
    }

    /// Whether a message to the client may begin here.
    pub fn is_between(&self) -> bool {
        self.heard.is_between()
    }

    /// What it came to. Nothing is held any longer.
    pub fn end(&mut self) -> Option<Charge> {
        // The caller's own price is owed without an answer as well.
        let is_priced = self.sum.is_none() && self.about.0.options.custom_cost.is_some();
        let told = self.told.take();
        if told.is_some() || is_priced {
            self.settle(told);
        }
        self.bill = None;
        self.sum
    }

    fn settle(&mut self, usage: Option<Usage>) {
        let Some(mut bill) = self.bill.take() else { return };
        if let (Some(_), Some(CustomCost::Total(_))) = (&self.sum, bill.custom) {
            // It is one price for all of it.
            bill.custom = Some(CustomCost::Total(0.0));
        }
        let receipt = bill.receipt.clone();
        bill.settle(usage, 0, false);
        let Some(charge) = receipt.get() else { return };
        self.sum = Some(match self.sum {
            None => *charge,
            Some(before) => Charge {
                usage: before.usage.into_iter().chain(charge.usage).reduce(sum),
                cost: before.cost + charge.cost,
                unpriced: before.unpriced || charge.unpriced,
                ..*charge
            },
        });
    }
}

fn sum(one: Usage, other: Usage) -> Usage {
    Usage {
        prompt_tokens: one.prompt_tokens.saturating_add(other.prompt_tokens),
        cached_tokens: one.cached_tokens.saturating_add(other.cached_tokens),
        written_tokens: one.written_tokens.saturating_add(other.written_tokens),
        completion_tokens: one.completion_tokens.saturating_add(other.completion_tokens),
        ..one
    }
}
