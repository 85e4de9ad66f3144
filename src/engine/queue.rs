//! Who is next among the waiting.
//!
//! ```text
//! level  +1   resumed: …   lines:  acme [t t t t t]   bob [t]
//! level   0   resumed: t   lines:  acme [t]           carol [t t]
//! ```
//!
//! An account of weight 2 is served twice as much as one of weight 1 when both want more than there is.
//!
//! Higher levels go first, but a level that was passed over gains one level a second until it has had a turn: the lowest
//! priority is slow, never starved. Within a level, sequences that were thrown out of the batch come back first; then
//! the account that was served the fewest tokens goes next, so a thousand requests of one account delay another's
//! single request by one turn. Within an account: first come, first served.
//!
//! Pure: `now` is an argument. Knows nothing of blocks or budgets.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::base::AccountId;

/// A level that is passed over this long counts as one level higher.
const AGING: Duration = Duration::from_secs(1);
/// What is counted of a token that an account of weight 1 is served.
const TOKEN: u64 = 1 << 10;
/// Accounts without requests that are remembered, because they were served more than others, before all are forgotten.
const MOST_IDLE: usize = 1024;

/// An account known to a [`Queue`].
pub type AccountKey = u32;

/// One waiting sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// Which sequence.
    pub sequence: u32,
    /// Of which account.
    pub account: AccountKey,
    /// Its level.
    pub priority: i8,
    /// Counts up with arrival; breaks ties between accounts.
    pub arrival: u64,
}

struct Account {
    id: AccountId,
    /// Requests here and in the batch.
    requests: usize,
    /// Sequences here.
    waiting: usize,
    /// Its share beside others', at least 1.
    weight: u32,
    /// Tokens served, by weight; joining after a pause lifts it to the floor, so that idling saves nothing up.
    served: u64,
}

struct Level {
    priority: i8,
    /// When this level last had a turn, or began to wait.
    turn: Instant,
    resumed: VecDeque<Ticket>,
    lines: Vec<Line>,
}

struct Line {
    account: AccountKey,
    tickets: VecDeque<Ticket>,
}

/// Waiting sequences of one model, and what their accounts were served.
#[derive(Default)]
pub struct Queue {
    levels: Vec<Level>,
    accounts: Vec<Option<Account>>,
    by_id: HashMap<AccountId, AccountKey>,
    vacant: Vec<AccountKey>,
    idle: usize,
    /// Of all accounts with requests.
    weights: u64,
    /// What the account of the last turn had been served: where newcomers start.
    floor: u64,
    length: usize,
}

impl Queue {
    /// Sequences waiting.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether an account may have `more` sequences here: within its part of `most` among all accounts with requests.
    pub fn has_share(&self, id: &AccountId, weight: u32, more: usize, most: usize) -> bool {
        let known = self.by_id.get(id).and_then(|&key| self.accounts[key as usize].as_ref());
        let waiting = known.map_or(0, |account| account.waiting);
        let own = known.map_or(0, |account| if account.requests > 0 { account.weight.into() } else { 0 });
        let weight = u64::from(weight.max(1));
        (waiting + more) as u64 * (self.weights - own + weight) <= most as u64 * weight
    }

    /// An account has one more request. Every `enter` is followed by one [`Queue::leave`]. The newest weight counts.
    pub fn enter(&mut self, id: &AccountId, weight: u32) -> AccountKey {
        let key = match self.by_id.get(id) {
            Some(&key) => key,
            None => {
                let account = Account { id: id.clone(), requests: 0, waiting: 0, weight: 1, served: 0 };
                let key = self.vacant.pop().unwrap_or_else(|| {
                    self.accounts.push(None);
                    self.accounts.len() as AccountKey - 1
                });
                self.accounts[key as usize] = Some(account);
                self.by_id.insert(id.clone(), key);
                self.idle += 1;
                key
            }
        };
        let floor = self.floor;
        if let Some(account) = &mut self.accounts[key as usize] {
            if account.requests == 0 {
                account.served = account.served.max(floor);
                self.idle -= 1;
            } else {
                self.weights -= u64::from(account.weight);
            }
            account.weight = weight.max(1);
            self.weights += u64::from(account.weight);
            account.requests += 1;
        }
        key
    }

    /// One request of the account ended.
    pub fn leave(&mut self, key: AccountKey) {
        let Some(account) = &mut self.accounts[key as usize] else { return };
        account.requests -= 1;
        if account.requests > 0 {
            return;
        }
        self.weights -= u64::from(account.weight);
        self.idle += 1;
        if account.served <= self.floor {
            self.forget(key);
        }
        if self.idle > MOST_IDLE {
            for key in 0..self.accounts.len() as AccountKey {
                if self.accounts[key as usize].as_ref().is_some_and(|account| account.requests == 0) {
                    self.forget(key);
                }
            }
        }
    }

    fn forget(&mut self, key: AccountKey) {
        if let Some(account) = self.accounts[key as usize].take() {
            self.by_id.remove(&account.id);
            self.vacant.push(key);
            self.idle -= 1;
        }
    }

    /// The account was served `tokens` more.
    pub fn charge(&mut self, key: AccountKey, tokens: usize) {
        if let Some(account) = &mut self.accounts[key as usize] {
            account.served += tokens as u64 * TOKEN / u64::from(account.weight);
        }
    }

    /// The account was served one token more, so many times: each is rounded by its weight.
    pub fn charge_singly(&mut self, key: AccountKey, times: usize) {
        if let Some(account) = &mut self.accounts[key as usize] {
            account.served += times as u64 * (TOKEN / u64::from(account.weight));
        }
    }

    /// What the account was served, by its weight: comparable between accounts.
    pub fn served(&self, key: AccountKey) -> u64 {
        self.accounts[key as usize].as_ref().map_or(0, |account| account.served)
    }

    /// The account's share beside others'.
    pub fn weight(&self, key: AccountKey) -> u32 {
        self.accounts[key as usize].as_ref().map_or(1, |account| account.weight)
    }

    fn count(&mut self, key: AccountKey) {
        self.length += 1;
        if let Some(account) = &mut self.accounts[key as usize] {
            account.waiting += 1;
        }
    }

    /// Waits behind everything of its account and level.
    pub fn join(&mut self, ticket: Ticket, now: Instant) {
        self.line(ticket, now).push_back(ticket);
        self.count(ticket.account);
    }

    /// Waits before everything else of its account and level: its turn has been, but it could not or need not run yet.
    pub fn join_front(&mut self, ticket: Ticket, now: Instant) {
        self.line(ticket, now).push_front(ticket);
        self.count(ticket.account);
    }

    /// Waits before everything else of its level: it was in the batch already.
    pub fn rejoin(&mut self, ticket: Ticket, now: Instant) {
        self.level(ticket.priority, now).resumed.push_front(ticket);
        self.count(ticket.account);
    }

    fn level(&mut self, priority: i8, now: Instant) -> &mut Level {
        let at = match self.levels.iter().position(|level| level.priority == priority) {
            Some(at) => at,
            None => {
                self.levels.push(Level { priority, turn: now, resumed: VecDeque::new(), lines: Vec::new() });
                self.levels.len() - 1
            }
        };
        &mut self.levels[at]
    }

    fn line(&mut self, ticket: Ticket, now: Instant) -> &mut VecDeque<Ticket> {
        let level = self.level(ticket.priority, now);
        let at = match level.lines.iter().position(|line| line.account == ticket.account) {
            Some(at) => at,
            None => {
                level.lines.push(Line { account: ticket.account, tickets: VecDeque::new() });
                level.lines.len() - 1
            }
        };
        &mut level.lines[at].tickets
    }

    /// Whose turn it is. Stays the same until it is taken, others arrive, or time passes.
    pub fn next(&self, now: Instant) -> Option<Ticket> {
        let level = self.levels.iter().max_by_key(|level| (level.urgency(now), level.priority))?;
        if let Some(&ticket) = level.resumed.front() {
            return Some(ticket);
        }
        level
            .lines
            .iter()
            .filter_map(|line| line.tickets.front())
            .min_by_key(|ticket| (self.served(ticket.account), ticket.arrival))
            .copied()
    }

    /// The ticket of [`Queue::next`] has its turn.
    pub fn take(&mut self, ticket: Ticket, now: Instant) {
        self.floor = self.floor.max(self.served(ticket.account));
        self.level(ticket.priority, now).turn = now;
        self.remove(ticket);
    }

    /// Takes a ticket out of the queue, wherever it stands. Does nothing if it is not there.
    pub fn remove(&mut self, ticket: Ticket) {
        let Some(at) = self.levels.iter().position(|level| level.priority == ticket.priority) else { return };
        let level = &mut self.levels[at];
        if !level.remove(ticket) {
            return;
        }
        self.length -= 1;
        if let Some(account) = &mut self.accounts[ticket.account as usize] {
            account.waiting -= 1;
        }
        if level.resumed.is_empty() && level.lines.is_empty() {
            self.levels.swap_remove(at);
        }
    }
}

impl Level {
    fn urgency(&self, now: Instant) -> i64 {
        let passed = now.saturating_duration_since(self.turn);
        i64::from(self.priority) + (passed.as_millis() / AGING.as_millis()) as i64
    }

    fn remove(&mut self, ticket: Ticket) -> bool {
        if let Some(at) = self.resumed.iter().position(|&other| other == ticket) {
            self.resumed.remove(at);
            return true;
        }
        let Some(at) = self.lines.iter().position(|line| line.account == ticket.account) else { return false };
        let tickets = &mut self.lines[at].tickets;
        let Some(place) = tickets.iter().position(|&other| other == ticket) else { return false };
        tickets.remove(place);
        if tickets.is_empty() {
            self.lines.swap_remove(at);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script; turns are written down. `a0` joins a ticket of account a at level 0 (`a-2`: level -2), `!a0`
    /// rejoins, `.` gives a turn and charges the account 10 tokens, `..a` charges account a 10 more, `~3` lets 3 s pass.
    fn check(script: &str, turns: &str) {
        let mut queue = Queue::default();
        let mut now = Instant::now();
        let mut arrival = 0;
        let mut names: HashMap<AccountKey, char> = HashMap::new();
        let mut seen = Vec::new();
        for word in script.split_whitespace() {
            if word == "." {
                let Some(ticket) = queue.next(now) else {
                    seen.push("none".into());
                    continue;
                };
                queue.take(ticket, now);
                queue.charge(ticket.account, 10);
                seen.push(format!("{}{}", names[&ticket.account], ticket.priority));
                continue;
            }
            if let Some(seconds) = word.strip_prefix('~') {
                now += Duration::from_secs(seconds.parse().unwrap());
                continue;
            }
            if let Some(name) = word.strip_prefix("..") {
                let account = queue.by_id[&AccountId::new(name)];
                queue.charge(account, 10);
                continue;
            }
            let (name, again) = word.strip_prefix('!').map_or((word, false), |rest| (rest, true));
            let account = queue.enter(&AccountId::new(&name[..1]), if name.starts_with('W') { 2 } else { 1 });
            names.insert(account, name.chars().next().unwrap());
            arrival += 1;
            let ticket = Ticket { sequence: arrival as u32, account, priority: name[1..].parse().unwrap(), arrival };
            if again { queue.rejoin(ticket, now) } else { queue.join(ticket, now) }
        }
        assert_eq!(seen.join(" "), turns, "{script}");
    }

    #[test]
    fn one_account_is_served_in_order_of_arrival() {
        check("a0 a1 a0 . . . .", "a1 a0 a0 none");
    }

    #[test]
    fn a_flood_delays_another_account_by_one_turn() {
        check("a0 a0 a0 a0 a0 . . b0 . . b0 . .", "a0 a0 b0 a0 b0 a0");
    }

    #[test]
    fn the_account_that_was_served_least_goes_next() {
        check("a0 b0 a0 b0 ..a ..a . . . .", "b0 b0 a0 a0");
    }

    #[test]
    fn an_account_of_twice_the_weight_has_twice_as_many_turns() {
        check("W0 W0 W0 W0 a0 a0 a0 . . . . . . .", "W0 a0 W0 W0 a0 W0 a0");
    }

    #[test]
    fn a_newcomer_starts_where_the_others_are_and_not_at_zero() {
        check("a0 a0 a0 a0 a0 a0 . . . . b0 b0 b0 . . . .", "a0 a0 a0 a0 b0 a0 b0 a0");
    }

    #[test]
    fn higher_levels_go_first_but_a_level_passed_over_rises() {
        check("a0 b5 b5 b5 . . .", "b5 b5 b5");
        check("a0 b5 b5 b5 b5 . ~3 . ~3 . ~3 . .", "b5 b5 b5 a0 b5");
        check("a0 a0 b5 b5 ~6 . . . .", "b5 a0 b5 a0");
    }

    #[test]
    fn what_was_thrown_out_of_the_batch_comes_back_first() {
        check("a0 b0 !c0 . . .", "c0 a0 b0");
    }

    #[test]
    fn a_removed_ticket_has_no_turn_and_idle_accounts_are_forgotten() {
        let mut queue = Queue::default();
        let now = Instant::now();
        for round in 0..5_000u64 {
            let account = queue.enter(&AccountId::new(format!("account-{round}")), 1);
            let ticket = Ticket { sequence: 1, account, priority: 0, arrival: round };
            queue.join(ticket, now);
            queue.charge(account, 1);
            queue.remove(ticket);
            queue.remove(ticket);
            queue.leave(account);
        }
        assert!(queue.is_empty() && queue.next(now).is_none());
        assert!(queue.accounts.len() <= MOST_IDLE + 1, "{}", queue.accounts.len());
    }
}
