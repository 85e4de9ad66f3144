//! The book against a model that remembers everything and adds it up each time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::base::{AccountId, Millis, ModelId, Neurons, RequestId};
use crate::ledger::book::{Book, Open};
use crate::ledger::claim::{AtLimit, Beyond, Claim, Counts, Denied, Plan, Spent, Window};
use crate::ledger::window::{Span, Technique};
use crate::task::Usage;

/// All that ever happened under one rule.
#[derive(Default)]
struct Rule {
    used: BTreeMap<u64, u64>,
    held: BTreeMap<u64, u64>,
    /// Stretches in which anything was asked for.
    seen: BTreeSet<u64>,
}

impl Rule {
    /// What counts in a stretch, debts of all earlier ones included.
    fn used(&self, index: u64, limit: u64, technique: Technique) -> u64 {
        let debt = |latest: (u64, u64), index: u64| match technique {
            Technique::Fixed => latest.1.saturating_sub(limit * (index - latest.0)),
            Technique::Sliding => 0,
        };
        let mut latest = (0, 0);
        for &seen in self.seen.range(..=index) {
            latest = (seen, self.used.get(&seen).unwrap_or(&0) + debt(latest, seen));
        }
        if latest.0 == index { latest.1 } else { debt(latest, index) }
    }

    fn left(&self, index: u64, limit: u64, technique: Technique, overlap: (u64, u64)) -> u64 {
        let held = |index: u64| self.held.get(&index).copied().unwrap_or(0);
        let mut count = self.used(index, limit, technique) + held(index);
        if technique == Technique::Sliding && index > 0 {
            let before = self.used.get(&(index - 1)).unwrap_or(&0) + held(index - 1);
            count += (before * overlap.0).div_ceil(overlap.1);
        }
        limit.saturating_sub(count)
    }

    fn hold(&mut self, index: u64, amount: u64) {
        self.seen.insert(index);
        *self.held.entry(index).or_default() += amount;
    }

    fn settle(&mut self, index: u64, held: u64, used: u64, limit: u64, technique: Technique) {
        *self.held.entry(index).or_default() -= held;
        let latest = *self.seen.last().unwrap();
        if self.seen.iter().rev().nth(2).is_some_and(|third| *third > index) {
            *self.used.entry(latest).or_default() += used.saturating_sub(held);
            return;
        }
        let room = match technique {
            Technique::Fixed => limit.saturating_sub(self.used(index, limit, technique)),
            Technique::Sliding => used,
        };
        *self.used.entry(index).or_default() += used.min(room);
        *self.used.entry(latest).or_default() += used.saturating_sub(room);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Reserve { amount: u64 },
    Settle { which: prop::sample::Index, used: u64 },
    Release { which: prop::sample::Index },
    Pass { millis: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..60).prop_map(|amount| Step::Reserve { amount }),
        4 => (any::<prop::sample::Index>(), 0u64..150).prop_map(|(which, used)| Step::Settle { which, used }),
        1 => any::<prop::sample::Index>().prop_map(|which| Step::Release { which }),
        // Some milliseconds, some hours, some days.
        3 => prop_oneof![0u64..3000, 0u64..9_000_000, 0u64..90_000_000].prop_map(|millis| Step::Pass { millis }),
    ]
}

const DAY: u64 = 86_400_000;
const WINDOWS: [(u64, Span, Technique, Counts); 6] = [
    (7, Span::Millis(1000), Technique::Fixed, Counts::Requests),
    (90, Span::Millis(60_000), Technique::Sliding, Counts::Tokens),
    (100, Span::Millis(2 * 3_600_000), Technique::Fixed, Counts::Cost),
    (200, Span::Millis(5 * 3_600_000), Technique::Sliding, Counts::Neurons),
    (300, Span::DAY, Technique::Fixed, Counts::Tokens),
    (9, Span::Millis(3 * 3_600_000), Technique::Fixed, Counts::Requests),
];

/// A call under way: its amount, what is held of the allocation and of each window, and since when.
type Call = (Open, u64, u64, Vec<u64>, u64);

fn run(plan: Plan, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let account = AccountId::new("a");
    let windows: Vec<Window> = (1..)
        .zip(WINDOWS)
        .map(|(id, (limit, span, technique, counts))| Window { id, rule: "r".into(), limit, span, technique, counts })
        .collect();
    let (mut book, mut kept) = (Book::new(100), Book::new(100));
    let mut allowance = Rule::default();
    let mut rules: Vec<Rule> = windows.iter().map(|_| Rule::default()).collect();
    let mut now = 700 * DAY;
    let (mut open, mut total): (Vec<Call>, u64) = (Vec::new(), 0);
    let index = |window: &Window, now: u64| {
        let Span::Millis(length) = window.span else { unreachable!() };
        (now / length, (length - now % length, length))
    };
    let limit = plan.allocation.micro();
    let fixed = Technique::Fixed;
    for step in steps {
        match step {
            // A call lasts no three days.
            Step::Pass { millis } if open.iter().all(|(.., since)| since + 2 * DAY > now + millis) => now += millis,
            Step::Reserve { amount } => {
                let (neurons, cost) = (Neurons::from_micro(amount), Neurons::from_micro(amount));
                let request = RequestId::from_number(0);
                let claim = Claim {
                    request,
                    account: &account,
                    plan,
                    windows: &windows,
                    tokens: amount,
                    neurons,
                    cost,
                    is_once: false,
                };
                let got = book.reserve(&claim, Millis(now));
                let free = allowance.left(now / DAY, limit, fixed, (0, 1));
                let is_bounded = plan.beyond == Beyond::Refuse;
                let lefts: Vec<u64> = windows
                    .iter()
                    .zip(&rules)
                    .map(|(window, rule)| {
                        let (index, overlap) = index(window, now);
                        rule.left(index, window.limit, window.technique, overlap)
                    })
                    .collect();
                let fits = |(window, left): (&Window, &u64)| match window.counts {
                    Counts::Requests => *left >= 1,
                    Counts::Tokens => *left >= amount,
                    Counts::Neurons | Counts::Cost => *left >= 1 || amount == 0,
                };
                let is_ok = windows.iter().zip(&lefts).all(fits) && !(is_bounded && amount > 0 && free == 0);
                prop_assert_eq!(got.is_ok(), is_ok, "{:?} {:?} {:?}", lefts, free, got.err());
                let Ok(got) = got else { continue };
                let (mut neurons, mut cost) = (amount, amount);
                if plan.at_limit == AtLimit::Cut {
                    neurons = neurons.min(if is_bounded { free } else { amount }).min(lefts[3]);
                    cost = cost.min(lefts[2]);
                }
                prop_assert_eq!((got.granted().neurons.micro(), got.granted().cost.micro()), (neurons, cost));
                let held = if is_bounded { neurons.min(free) } else { 0 };
                if neurons > 0 {
                    allowance.hold(now / DAY, held);
                }
                let mut holds = Vec::new();
                for ((window, rule), left) in windows.iter().zip(&mut rules).zip(&lefts) {
                    let hold = match window.counts {
                        Counts::Requests => 0,
                        Counts::Tokens => amount,
                        Counts::Neurons => neurons.min(*left),
                        Counts::Cost => cost.min(*left),
                    };
                    let (index, _) = index(window, now);
                    rule.hold(index, hold);
                    if window.counts == Counts::Requests {
                        *rule.used.entry(index).or_default() += 1;
                    }
                    holds.push(hold);
                }
                open.push((got, neurons, held, holds, now));
            }
            Step::Settle { which, used } if !open.is_empty() => {
                let (call, _, held, holds, since) = open.swap_remove(which.index(open.len()));
                let spent = Spent {
                    key: None,
                    gateway: "".into(),
                    provider: "".into(),
                    model: ModelId::new("m"),
                    usage: Usage { prompt_tokens: used as u32, ..Usage::default() },
                    neurons: Neurons::from_micro(used),
                    cost: Neurons::from_micro(used),
                };
                let (is_billed, entry) = book.settle(call, &spent, Millis(now));
                prop_assert!(is_billed);
                kept.apply(&entry.unwrap());
                total += used;
                let before = allowance.used(since / DAY, limit, fixed);
                let free = if plan.beyond == Beyond::Refuse { used } else { used.min(limit.saturating_sub(before)) };
                allowance.seen.insert(since / DAY);
                allowance.settle(since / DAY, held, free, limit, fixed);
                for ((window, rule), hold) in windows.iter().zip(&mut rules).zip(holds) {
                    if window.counts != Counts::Requests {
                        rule.settle(index(window, since).0, hold, used, window.limit, window.technique);
                    }
                }
            }
            Step::Release { which } if !open.is_empty() => {
                let (call, _, held, holds, since) = open.swap_remove(which.index(open.len()));
                if let Some(entry) = book.release(call, Millis(now)) {
                    kept.apply(&entry);
                }
                *allowance.held.entry(since / DAY).or_default() -= held;
                for ((window, rule), hold) in windows.iter().zip(&mut rules).zip(holds) {
                    *rule.held.get_mut(&index(window, since).0).unwrap() -= hold;
                }
            }
            Step::Settle { .. } | Step::Release { .. } | Step::Pass { .. } => {}
        }
        prop_assert_eq!(
            book.left(&account, plan, Millis(now)).micro(),
            allowance.left(now / DAY, limit, fixed, (0, 1))
        );
        let totals = book.totals(&account, Millis(now));
        prop_assert_eq!(totals.total.micro(), total);
        prop_assert_eq!(totals.reserved.micro(), open.iter().map(|(_, neurons, ..)| neurons).sum::<u64>());
    }
    for (call, ..) in open {
        if let Some(entry) = book.release(call, Millis(now)) {
            kept.apply(&entry);
        }
    }
    // What was kept comes out as it was.
    prop_assert_eq!(kept.totals(&account, Millis(now)), book.totals(&account, Millis(now)));
    prop_assert_eq!(kept.left(&account, plan, Millis(now)), book.left(&account, plan, Millis(now)));
    for window in windows.iter().filter(|window| window.span.is_durable()) {
        let left = |book: &mut Book| match book.pass(window, Millis(now)) {
            Ok((standing, _)) => standing.left,
            Err(Denied::Over(over)) => over.left,
            Err(other) => panic!("{other:?}"),
        };
        prop_assert_eq!(left(&mut kept), left(&mut book), "{:?}", window);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_book_says_what_adding_everything_up_says(
        allocation in 0u64..2000,
        bills in any::<bool>(),
        cuts in any::<bool>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let beyond = if bills { Beyond::Bill } else { Beyond::Refuse };
        let at_limit = if cuts { AtLimit::Cut } else { AtLimit::Finish };
        run(Plan { allocation: Neurons::from_micro(allocation), beyond, at_limit }, steps)?;
    }
}
