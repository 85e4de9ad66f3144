//! The sums themselves. Pure: `now` comes in as a value, no clock, no I/O.
//!
//! ```text
//! reserve(claim) ── every limit looked at ── one refuses ─> Denied, nothing charged
//!                          │ none
//!                          v
//!                   all held ─> Open ── settle(spent) ─> sums, Entry
//!                                 └──── release ───────> as if it had never been
//! ```
//!
//! An [`Open`] is a value that settling or releasing eats, so no call ends twice. [`Book::apply`] is what both settling and
//! replaying do to what is kept. Where several daemons share a limit, each takes of its lease of it ([`Book::share`]).

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::base::{AccountId, Lookup, Millis, Neurons, RequestId, UtcDay};
use crate::ledger::ask::Place;
use crate::ledger::claim::{
    AtLimit, Beyond, Claim, Counts, Denied, Granted, Over, Plan, Spent, Standing, What, Window,
};
use crate::ledger::entry::{Bill, Entry, Who};
use crate::ledger::lease::{Amount, Leases};
use crate::ledger::once::Once;
use crate::ledger::table::Windows;
use crate::ledger::window::{Charge, Counter, Span, Technique, Terms};
use crate::task::Usage;

/// One account's money.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AccountTotals {
    /// Settled of this UTC day.
    pub today: Neurons,
    /// Of those, what is beyond the allocation and is billed.
    pub billed: Neurons,
    /// Settled since the book was begun.
    pub total: Neurons,
    /// Held by calls that have not ended.
    pub reserved: Neurons,
}

/// Balances, windows, and calls that count once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Book {
    pub(super) accounts: Lookup<AccountId, Account>,
    pub(super) windows: Windows,
    once: Once,
    /// What this daemon may take of what it shares with others; `None`: it shares nothing.
    #[serde(skip)]
    pub(super) leases: Option<Box<Leases>>,
}

/// A call under way: what is held for it. Give it to [`Book::settle`] or [`Book::release`].
#[derive(Debug)]
#[must_use]
pub struct Open {
    request: RequestId,
    account: AccountId,
    plan: Plan,
    is_once: bool,
    granted: Granted,
    standing: Option<Standing>,
    /// The day whose allocation it uses.
    day: u64,
    /// Of the allocation.
    held: u64,
    /// What the account shows as reserved.
    neurons: Neurons,
    /// On the heap: what is held goes from hand to hand.
    charges: Vec<(Counts, Charge)>,
}

impl Open {
    /// What it may spend.
    pub fn granted(&self) -> Granted {
        self.granted
    }

    /// How the tightest of its windows stood when it was reserved.
    pub fn standing(&self) -> Option<&Standing> {
        self.standing.as_ref()
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Account {
    /// Against the allocation.
    pub(super) free: Counter,
    /// All that was settled.
    spent: Counter,
    billed: Counter,
    total: Neurons,
    #[serde(skip)]
    reserved: Neurons,
}

impl Default for Account {
    fn default() -> Self {
        let none = Counter::new(Span::DAY);
        Self { free: none, spent: none, billed: none, total: Neurons::ZERO, reserved: Neurons::ZERO }
    }
}

impl Book {
    /// An empty one, with so many windows at most: those that are over are forgotten first, then the ones that end first.
    pub fn new(max_windows: usize) -> Self {
        let mut book =
            Self { accounts: Lookup::default(), windows: Windows::default(), once: Once::default(), leases: None };
        book.restore(max_windows);
        book
    }

    /// Completes one that was read.
    pub(super) fn restore(&mut self, max_windows: usize) {
        self.windows.limit(max_windows);
        self.once.restore();
    }

    /// Looks at the allocation and all windows, then holds what the call may spend.
    ///
    /// # Errors
    /// The limit that refuses it, or that it was settled before. Nothing is changed then.
    pub fn reserve(&mut self, claim: &Claim<'_>, now: Millis) -> Result<Open, Denied> {
        let Claim { plan, windows, .. } = *claim;
        if claim.is_once && self.is_settled(claim.request) {
            return Err(Denied::Settled);
        }
        let allowance = terms_of(plan);
        let (must, is_shared) = (plan.beyond == Beyond::Refuse, self.leases.is_some());
        let mut granted = Granted { neurons: claim.neurons, cost: claim.cost };
        let (mut free, mut is_unleased) = (u64::MAX, false);
        if (must || is_shared) && claim.neurons > Neurons::ZERO {
            let counter = self.accounts.get(claim.account).map_or(Counter::new(Span::DAY), |account| account.free);
            let amount = Amount { wanted: claim.neurons.micro(), needed: 1, is_optional: !must };
            match self.room(|| Place::Allocation(claim.account.clone()), &counter, allowance, amount, now) {
                Err(_) => is_unleased = true,
                Ok(room) if must && room.left == 0 => {
                    let place = Place::Allocation(claim.account.clone());
                    return Err(Denied::Over(Over {
                        what: What::Allocation,
                        rule: "allocation".into(),
                        counts: Counts::Neurons,
                        limit: allowance.limit,
                        left: room.shown,
                        retry_after_ms: self.known(&place, &counter, allowance, now).wait(allowance, now, 1),
                    }));
                }
                Ok(room) => free = room.left,
            }
            if must {
                cut(&mut granted.neurons, plan, free);
            }
        }
        // What may be taken here, and what is shown as left.
        let mut lefts = SmallVec::<[(u64, u64); 4]>::new();
        for window in windows {
            let (terms, counter) = (window.terms(), self.windows.get(window.id, window.span));
            let (wanted, needed) = match window.counts {
                Counts::Requests => (1, 1),
                Counts::Tokens => (claim.tokens, claim.tokens),
                Counts::Neurons => (claim.neurons.micro(), claim.neurons.micro().min(1)),
                Counts::Cost => (claim.cost.micro(), claim.cost.micro().min(1)),
            };
            let amount = Amount { wanted, needed, is_optional: false };
            // All that are not leased are asked for at once.
            let Ok(room) = self.room(|| Place::Window(window.id, window.span), &counter, terms, amount, now) else {
                is_unleased = true;
                continue;
            };
            if room.left < needed {
                return Err(self.over(window, &counter, now, needed));
            }
            if room.left < wanted {
                let amount = if window.counts == Counts::Cost { &mut granted.cost } else { &mut granted.neurons };
                cut(amount, plan, room.left);
            }
            lefts.push((room.left, room.shown));
        }
        if is_unleased {
            return Err(Denied::Unleased);
        }

        let mut open = Open {
            request: claim.request,
            account: claim.account.clone(),
            plan,
            is_once: claim.is_once,
            granted,
            standing: None,
            day: Span::DAY.index(now),
            held: if must || is_shared { granted.neurons.micro().min(free) } else { 0 },
            neurons: granted.neurons,
            charges: Vec::with_capacity(windows.len()),
        };
        if open.neurons > Neurons::ZERO {
            let terms = if is_shared { Terms::leased(Span::DAY) } else { allowance };
            let account = self.account(claim.account);
            account.reserved = account.reserved + open.neurons;
            account.free.hold(terms, now, open.held);
        }
        let mut tightest: Option<(&Window, u64)> = None;
        for (window, (left, shown)) in windows.iter().zip(lefts) {
            let terms = if is_shared { Terms::leased(window.span) } else { window.terms() };
            let counter = self.windows.open(window.id, window.span, now);
            let (amount, charge) = match window.counts {
                Counts::Requests => (1, Charge::used(window.id, terms, counter.add(terms, now, 1), 1)),
                counts => {
                    let amount = match counts {
                        Counts::Neurons => granted.neurons.micro().min(left),
                        Counts::Cost => granted.cost.micro().min(left),
                        _ => claim.tokens,
                    };
                    (amount, Charge::held(window.id, terms, counter.hold(terms, now, amount), amount))
                }
            };
            if window.counts != Counts::Requests || window.span.is_durable() {
                open.charges.push((window.counts, charge));
            }
            let left = shown.saturating_sub(amount);
            if tightest.is_none_or(|(other, least)| is_tighter(window, left, other, least)) {
                tightest = Some((window, left));
            }
        }
        open.standing = tightest.map(|(window, left)| standing(window, left, now));
        Ok(open)
    }

    /// Charges what a call has used. `false` if it counts once and was settled before: then it is released.
    ///
    /// The entry is for the journal. There is none when nothing changed that is kept.
    pub fn settle(&mut self, open: Open, spent: &Spent, now: Millis) -> (bool, Option<Entry>) {
        if open.is_once && self.is_settled(open.request) {
            return (false, self.release(open, now));
        }
        let charges = self.charge(&open, &spent.usage, spent.neurons, spent.cost, now);
        let (plan, terms) = (open.plan, terms_of(open.plan));
        let account = self.accounts.entry(open.account.clone()).or_default();
        account.reserved = account.reserved.saturating_sub(open.neurons);
        let free = match (plan.beyond, &self.leases) {
            (Beyond::Refuse, _) => spent.neurons,
            (Beyond::Bill, None) => {
                let used = Neurons::from_micro(account.free.used(open.day));
                spent.neurons.min(plan.allocation.saturating_sub(used))
            }
            (Beyond::Bill, Some(leases)) => {
                let place = Place::Allocation(open.account.clone());
                let spare = leases.spare(&place, &account.free, terms, open.day, now);
                spent.neurons.min(Neurons::from_micro(open.held.saturating_add(spare)))
            }
        };
        let terms = if self.leases.is_some() { Terms::leased(Span::DAY) } else { terms };
        let held = Charge::held(0, terms, open.day, open.held);
        let bill = Bill {
            request: open.request,
            is_once: open.is_once,
            day: UtcDay(u32::try_from(open.day).unwrap_or(u32::MAX)),
            free: account.free.placed(held, free.micro()),
            neurons: spent.neurons,
            billed: spent.neurons.saturating_sub(free),
            cost: spent.cost,
            prompt_tokens: spent.usage.prompt_tokens,
            cached_tokens: spent.usage.cached_tokens,
            completion_tokens: spent.usage.completion_tokens,
            who: Who {
                account: open.account,
                key: spent.key.clone(),
                gateway: spent.gateway.clone(),
                provider: spent.provider.clone(),
                model: spent.model.clone(),
            },
        };
        self.bill(&bill, now);
        (true, Some(Entry { seq: 0, at: now, charges, bill: Some(bill) }))
    }

    /// Counts what a call has used in its windows, and bills nothing: another reservation does, or somebody else.
    pub fn count(&mut self, open: Open, usage: &Usage, cost: Neurons, now: Millis) -> Option<Entry> {
        let charges = self.charge(&open, usage, Neurons::ZERO, cost, now);
        if open.neurons > Neurons::ZERO {
            let account = self.account(&open.account);
            account.reserved = account.reserved.saturating_sub(open.neurons);
            account.free.release(open.day, open.held);
        }
        (!charges.is_empty()).then_some(Entry { seq: 0, at: now, charges, bill: None })
    }

    /// Corrects the windows of a call by what it has used. Returns the charges that are kept.
    fn charge(&mut self, open: &Open, usage: &Usage, neurons: Neurons, cost: Neurons, now: Millis) -> Vec<Charge> {
        let mut charges = Vec::new();
        for &(counts, mut charge) in &open.charges {
            if counts != Counts::Requests {
                let used = match counts {
                    Counts::Tokens => usage.total_tokens().into(),
                    Counts::Neurons => neurons.micro(),
                    _ => cost.micro(),
                };
                charge = self.windows.placed(charge, used);
                self.windows.settle(&charge, now);
            }
            // What used nothing, as an answer from the cache, has nothing to be kept.
            if charge.terms.span.is_durable() && charge.used.max(charge.beyond) > 0 {
                charges.push(charge);
            }
        }
        charges
    }

    /// Gives back what a call held. What it counted as a request stays counted: for long windows the entry says so.
    pub fn release(&mut self, open: Open, now: Millis) -> Option<Entry> {
        if open.neurons > Neurons::ZERO {
            let account = self.account(&open.account);
            account.reserved = account.reserved.saturating_sub(open.neurons);
            account.free.release(open.day, open.held);
        }
        let mut charges = Vec::new();
        for (counts, charge) in open.charges {
            if counts == Counts::Requests {
                charges.push(charge);
            } else {
                self.windows.release(&charge);
            }
        }
        (!charges.is_empty()).then_some(Entry { seq: 0, at: now, charges, bill: None })
    }

    /// Passes a window without a reservation: one that counts requests counts this one, others only must have something left.
    ///
    /// # Errors
    /// [`Denied::Over`].
    pub fn pass(&mut self, window: &Window, now: Millis) -> Result<(Standing, Option<Entry>), Denied> {
        let (terms, counter) = (window.terms(), self.windows.get(window.id, window.span));
        let amount = Amount { wanted: 1, needed: 1, is_optional: false };
        let room = self.room(|| Place::Window(window.id, window.span), &counter, terms, amount, now)?;
        if room.left == 0 {
            return Err(self.over(window, &counter, now, 1));
        }
        let left = room.shown;
        if window.counts != Counts::Requests {
            return Ok((standing(window, left, now), None));
        }
        let terms = if self.leases.is_some() { Terms::leased(window.span) } else { terms };
        let index = self.windows.open(window.id, window.span, now).add(terms, now, 1);
        let charge = Charge::used(window.id, terms, index, 1);
        let entry = window.span.is_durable().then(|| Entry { seq: 0, at: now, charges: vec![charge], bill: None });
        Ok((standing(window, left.saturating_sub(1), now), entry))
    }

    /// One account's money now.
    pub fn totals(&self, account: &AccountId, now: Millis) -> AccountTotals {
        let Some(account) = self.accounts.get(account) else { return AccountTotals::default() };
        let today = Span::DAY.index(now);
        AccountTotals {
            today: Neurons::from_micro(account.spent.used(today)),
            billed: Neurons::from_micro(account.billed.used(today)),
            total: account.total,
            reserved: account.reserved,
        }
    }

    /// What is left of the allocation, what calls under way hold taken off.
    pub fn left(&self, account: &AccountId, plan: Plan, now: Millis) -> Neurons {
        let (none, terms) = (Counter::new(Span::DAY), terms_of(plan));
        let counter = self.accounts.get(account).map_or(none, |account| account.free);
        let counter = self.known(&Place::Allocation(account.clone()), &counter, terms, now);
        Neurons::from_micro(counter.left(terms, now))
    }

    /// Whether a call that counts once was settled.
    pub fn is_settled(&self, request: RequestId) -> bool {
        self.once.has(request)
    }

    /// Does again what an entry says was done.
    pub(super) fn apply(&mut self, entry: &Entry) {
        entry.charges.iter().for_each(|charge| self.windows.settle(charge, entry.at));
        if let Some(bill) = &entry.bill {
            self.bill(bill, entry.at);
        }
    }

    fn bill(&mut self, bill: &Bill, now: Millis) {
        let account = self.account(&bill.who.account);
        account.free.settle(&bill.free);
        let all = Terms { limit: u64::MAX, ..ALLOWANCE };
        let today = |used: Neurons| Charge::used(0, all, bill.day.0.into(), used.micro());
        account.spent.settle(&today(bill.neurons));
        account.billed.settle(&today(bill.billed));
        account.total = account.total + bill.neurons;
        if bill.is_once {
            self.once.insert(bill.request, now);
        }
    }

    /// Why a call with less than it needs of a window may not go on.
    fn over(&self, window: &Window, counter: &Counter, now: Millis, needed: u64) -> Denied {
        let (terms, place) = (window.terms(), Place::Window(window.id, window.span));
        let known = self.known(&place, counter, terms, now);
        Denied::Over(Over {
            what: if window.counts.is_money() { What::Budget } else { What::Window },
            rule: window.rule.clone(),
            counts: window.counts,
            limit: window.limit,
            left: known.left(terms, now),
            retry_after_ms: known.wait(terms, now, needed),
        })
    }

    fn account(&mut self, id: &AccountId) -> &mut Account {
        self.accounts.entry(id.clone()).or_default()
    }
}

const ALLOWANCE: Terms = Terms { limit: 0, span: Span::DAY, technique: Technique::Fixed };

fn terms_of(plan: Plan) -> Terms {
    Terms { limit: plan.allocation.micro(), ..ALLOWANCE }
}

/// Grants less, if the plan says so.
fn cut(granted: &mut Neurons, plan: Plan, left: u64) {
    if plan.at_limit == AtLimit::Cut {
        *granted = (*granted).min(Neurons::from_micro(left));
    }
}

/// Whether less of its limit is left.
fn is_tighter(window: &Window, left: u64, other: &Window, least: u64) -> bool {
    u128::from(left) * u128::from(other.limit) < u128::from(least) * u128::from(window.limit)
}

fn standing(window: &Window, left: u64, now: Millis) -> Standing {
    let ends = window.span.start(window.span.index(now) + 1);
    let (rule, counts, limit) = (window.rule.clone(), window.counts, window.limit);
    Standing { rule, counts, limit, left, reset_ms: ends.0.saturating_sub(now.0) }
}

#[cfg(test)]
#[path = "book_test.rs"]
mod tests;
