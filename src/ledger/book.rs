//! The sums themselves. Pure: `now` comes in as a value, no clock, no I/O.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::base::{AccountId, Millis, ModelId, Neurons, RequestId, UtcDay};
use crate::task::Usage;

/// Days of per-model rows kept in memory.
const DAYS_KEPT: u32 = 35;

/// What a call asks to spend.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The call; settles at most once.
    pub request: RequestId,
    /// Who pays.
    pub account: AccountId,
    /// For what.
    pub model: ModelId,
    /// The most it can cost.
    pub estimate: Neurons,
}

/// One account's money.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AccountTotals {
    /// Settled since midnight UTC.
    pub today: Neurons,
    /// Settled since the book was opened.
    pub total: Neurons,
    /// Held by calls that have not ended.
    pub reserved: Neurons,
}

/// What one account used of one model on one day.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Calls settled.
    pub requests: u64,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
    /// Of those, tokens out of the prefix cache.
    pub cached_tokens: u64,
    /// Tokens produced.
    pub completion_tokens: u64,
    /// What they cost.
    pub neurons: Neurons,
}

/// Reservations and sums.
#[derive(Debug, Default)]
pub struct Book {
    open: HashMap<RequestId, Claim>,
    accounts: HashMap<AccountId, Account>,
    rows: BTreeMap<(UtcDay, AccountId, ModelId), Row>,
}

#[derive(Debug, Default)]
struct Account {
    day: Option<UtcDay>,
    totals: AccountTotals,
}

impl Account {
    fn at(&mut self, day: UtcDay) -> &mut AccountTotals {
        // A clock that leaps back stays on the later day: a day's sum is never opened twice.
        if self.day.is_none_or(|known| day > known) {
            self.day = Some(day);
            self.totals.today = Neurons::ZERO;
        }
        &mut self.totals
    }
}

impl Book {
    /// Holds the estimate. A second claim of the same request replaces the first.
    pub fn reserve(&mut self, claim: Claim, now: Millis) {
        self.release(claim.request);
        let totals = self.accounts.entry(claim.account.clone()).or_default().at(now.day());
        totals.reserved = totals.reserved + claim.estimate;
        self.open.insert(claim.request, claim);
    }

    /// Turns a reservation into a charge. Says whether there was one: a request settles once.
    pub fn settle(&mut self, request: RequestId, usage: &Usage, used: Neurons, now: Millis) -> bool {
        let Some(claim) = self.open.remove(&request) else { return false };
        let day = now.day();
        let totals = self.accounts.entry(claim.account.clone()).or_default().at(day);
        totals.reserved = totals.reserved.saturating_sub(claim.estimate);
        totals.today = totals.today + used;
        totals.total = totals.total + used;
        let row = self.rows.entry((day, claim.account, claim.model)).or_default();
        row.requests += 1;
        row.prompt_tokens += u64::from(usage.prompt_tokens);
        row.cached_tokens += u64::from(usage.cached_tokens);
        row.completion_tokens += u64::from(usage.completion_tokens);
        row.neurons = row.neurons + used;
        self.forget_before(UtcDay(day.0.saturating_sub(DAYS_KEPT)));
        true
    }

    /// Gives a reservation back.
    pub fn release(&mut self, request: RequestId) {
        let Some(claim) = self.open.remove(&request) else { return };
        if let Some(account) = self.accounts.get_mut(&claim.account) {
            account.totals.reserved = account.totals.reserved.saturating_sub(claim.estimate);
        }
    }

    /// One account's money now.
    pub fn totals(&mut self, account: &AccountId, now: Millis) -> AccountTotals {
        match self.accounts.get_mut(account) {
            Some(account) => *account.at(now.day()),
            None => AccountTotals::default(),
        }
    }

    /// All rows, oldest day first.
    pub fn rows(&self) -> impl Iterator<Item = (&(UtcDay, AccountId, ModelId), &Row)> {
        self.rows.iter()
    }

    fn forget_before(&mut self, day: UtcDay) {
        while let Some(oldest) = self.rows.first_entry() {
            if oldest.key().0 >= day {
                return;
            }
            oldest.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400_000;

    fn claim(request: RequestId, estimate: u64) -> Claim {
        let (account, model) = (AccountId::new("a"), ModelId::new("m"));
        Claim { request, account, model, estimate: Neurons::from_micro(estimate) }
    }

    fn totals(book: &mut Book, now: u64) -> [u64; 3] {
        let t = book.totals(&AccountId::new("a"), Millis(now));
        [t.today.micro(), t.total.micro(), t.reserved.micro()]
    }

    #[test]
    fn a_request_is_reserved_by_estimate_and_settled_by_use_once() {
        let mut book = Book::default();
        let request = RequestId::random();
        book.reserve(claim(request, 100), Millis(0));
        assert_eq!(totals(&mut book, 0), [0, 0, 100]);
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2, ..Usage::default() };
        assert!(book.settle(request, &usage, Neurons::from_micro(40), Millis(1)));
        assert!(!book.settle(request, &usage, Neurons::from_micro(40), Millis(2)));
        assert_eq!(totals(&mut book, 2), [40, 40, 0]);
        let (_, row) = book.rows().next().unwrap();
        assert_eq!((row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens), (1, 3, 1, 2));
    }

    #[test]
    fn a_released_reservation_charges_nothing() {
        let mut book = Book::default();
        let request = RequestId::random();
        book.reserve(claim(request, 100), Millis(0));
        book.release(request);
        book.release(request);
        assert!(!book.settle(request, &Usage::default(), Neurons::from_micro(1), Millis(1)));
        assert_eq!(totals(&mut book, 1), [0, 0, 0]);
    }

    #[test]
    fn midnight_utc_starts_a_new_day_and_a_clock_leaping_back_does_not() {
        let mut book = Book::default();
        for (now, expect) in [(DAY - 1, [7, 7, 0]), (DAY, [7, 14, 0]), (DAY - 1, [14, 21, 0]), (3 * DAY, [7, 28, 0])] {
            let request = RequestId::random();
            book.reserve(claim(request, 9), Millis(now));
            book.settle(request, &Usage::default(), Neurons::from_micro(7), Millis(now));
            assert_eq!(totals(&mut book, now), expect, "at {now}");
        }
    }

    #[test]
    fn old_rows_are_forgotten() {
        let mut book = Book::default();
        for day in [0, 1, 40] {
            let request = RequestId::random();
            book.reserve(claim(request, 1), Millis(day * DAY));
            book.settle(request, &Usage::default(), Neurons::from_micro(1), Millis(day * DAY));
        }
        assert_eq!(book.rows().map(|(key, _)| key.0.0).collect::<Vec<_>>(), [40]);
    }
}
