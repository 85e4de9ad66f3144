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

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use crate::base::Result;
use crate::gateway::asked::Ask;
use crate::gateway::bill::{Bill, Charge, Receipt};
use crate::gateway::options::CustomCost;
use crate::gateway::relay::Relay;
use crate::gateway::step::Step;
use crate::provider;
use crate::task::Usage;

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
    pub async fn begin(relay: &Rc<Relay>, ask: Ask, step: Step) -> Result<Self> {
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
