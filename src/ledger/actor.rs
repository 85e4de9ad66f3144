//! The actor that owns the book, the handle callers hold, and the guard that gives a reservation back.

use actix::prelude::*;

use crate::base::{AccountId, Error, Kind, Millis, ModelId, Neurons, RequestId, Result, UtcDay};
use crate::ledger::book::{AccountTotals, Book, Claim, Row};
use crate::task::Usage;

/// Messages waiting at most; callers wait in line behind it.
const MAILBOX: usize = 1024;

/// The ledger's whole outside.
#[derive(Clone)]
pub struct Ledger {
    addr: Addr<LedgerActor>,
}

impl Ledger {
    /// Opens an empty book on a thread of its own.
    pub fn start() -> Self {
        let arbiter = Arbiter::new();
        let addr = LedgerActor::start_in_arbiter(&arbiter.handle(), |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            LedgerActor { book: Book::default() }
        });
        Self { addr }
    }

    /// Holds the claim's estimate until the reservation is settled or dropped.
    ///
    /// # Errors
    /// [`Kind::Internal`] when the ledger has died; the process is about to end then.
    pub async fn reserve(&self, claim: Claim) -> Result<Reservation> {
        // A guard from the start: who asks may leave before the answer is there.
        let reservation = Reservation { request: claim.request, addr: Some(self.addr.clone()) };
        self.addr.send(Reserve(claim)).await.map_err(dead)?;
        Ok(reservation)
    }

    /// One account's money now.
    ///
    /// # Errors
    /// As [`Ledger::reserve`].
    pub async fn totals(&self, account: AccountId) -> Result<AccountTotals> {
        self.addr.send(Totals(account)).await.map_err(dead)
    }

    /// What was used, by day, account and model.
    ///
    /// # Errors
    /// As [`Ledger::reserve`].
    pub async fn rows(&self) -> Result<Vec<(UtcDay, AccountId, ModelId, Row)>> {
        self.addr.send(Rows).await.map_err(dead)
    }

    /// Whether the actor still takes messages.
    pub fn is_alive(&self) -> bool {
        self.addr.connected()
    }
}

fn dead(error: MailboxError) -> Error {
    Error::new(Kind::Internal, "The ledger is not answering.").with_source(error)
}

/// An amount held for one call. Dropped without being settled, it is given back.
pub struct Reservation {
    request: RequestId,
    addr: Option<Addr<LedgerActor>>,
}

impl Reservation {
    /// Charges what was used. Told, not asked: at most one such message a call is ever on its way.
    pub fn settle(mut self, usage: Usage, used: Neurons) {
        if let Some(addr) = self.addr.take() {
            addr.do_send(Settle { request: self.request, usage, used });
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(addr) = self.addr.take() {
            addr.do_send(Release(self.request));
        }
    }
}

struct LedgerActor {
    book: Book,
}

impl Actor for LedgerActor {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "()")]
struct Reserve(Claim);

#[derive(Message)]
#[rtype(result = "()")]
struct Settle {
    request: RequestId,
    usage: Usage,
    used: Neurons,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Release(RequestId);

#[derive(Message)]
#[rtype(result = "AccountTotals")]
struct Totals(AccountId);

#[derive(Message)]
#[rtype(result = "Vec<(UtcDay, AccountId, ModelId, Row)>")]
struct Rows;

impl Handler<Reserve> for LedgerActor {
    type Result = ();
    fn handle(&mut self, Reserve(claim): Reserve, _: &mut Context<Self>) {
        self.book.reserve(claim, Millis::now());
    }
}

impl Handler<Settle> for LedgerActor {
    type Result = ();
    fn handle(&mut self, settle: Settle, _: &mut Context<Self>) {
        self.book.settle(settle.request, &settle.usage, settle.used, Millis::now());
    }
}

impl Handler<Release> for LedgerActor {
    type Result = ();
    fn handle(&mut self, Release(request): Release, _: &mut Context<Self>) {
        self.book.release(request);
    }
}

impl Handler<Totals> for LedgerActor {
    type Result = MessageResult<Totals>;
    fn handle(&mut self, Totals(account): Totals, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.book.totals(&account, Millis::now()))
    }
}

impl Handler<Rows> for LedgerActor {
    type Result = MessageResult<Rows>;
    fn handle(&mut self, _: Rows, _: &mut Context<Self>) -> Self::Result {
        let rows = self.book.rows();
        MessageResult(
            rows.map(|((day, account, model), row)| (*day, account.clone(), model.clone(), row.clone())).collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix::test]
    async fn a_dropped_reservation_is_given_back_and_a_settled_one_is_charged() {
        let ledger = Ledger::start();
        let claim = |estimate| Claim {
            request: RequestId::random(),
            account: AccountId::new("a"),
            model: ModelId::new("m"),
            estimate: Neurons::from_micro(estimate),
        };
        let kept = ledger.reserve(claim(10)).await.unwrap();
        drop(ledger.reserve(claim(20)).await.unwrap());
        let totals = ledger.totals(AccountId::new("a")).await.unwrap();
        assert_eq!(totals.reserved.micro(), 10);
        kept.settle(Usage::default(), Neurons::from_micro(6));
        let totals = ledger.totals(AccountId::new("a")).await.unwrap();
        assert_eq!((totals.reserved.micro(), totals.today.micro()), (0, 6));
    }

    #[actix::test]
    async fn a_reservation_comes_back_from_who_leaves_before_it_is_handed_over() {
        let ledger = Ledger::start();
        let claim = Claim {
            request: RequestId::random(),
            account: AccountId::new("a"),
            model: ModelId::new("m"),
            estimate: Neurons::from_micro(10),
        };
        let mut asking = Box::pin(ledger.reserve(claim));
        let asked = std::future::poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await;
        let held = ledger.totals(AccountId::new("a")).await.unwrap().reserved.micro();
        assert_eq!((asked, held), (true, 10));
        drop(asking);
        assert_eq!(ledger.totals(AccountId::new("a")).await.unwrap().reserved.micro(), 0);
    }
}
