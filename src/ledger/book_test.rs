use super::*;
use crate::base::ModelId;
use crate::ledger::once::ONCE;
use crate::task::Usage;

const MINUTE: u64 = 60_000;
const DAY: u64 = 86_400_000;
/// 2026-01-31T23:00Z.
const JANUARY: u64 = 1_769_900_400_000;

fn plan(allocation: u64, beyond: Beyond, at_limit: AtLimit) -> Plan {
    Plan { allocation: Neurons::from_micro(allocation), beyond, at_limit }
}

fn window(id: u128, limit: u64, span: Span, technique: Technique, counts: Counts) -> Window {
    Window { id, rule: format!("rule {id}").into(), limit, span, technique, counts }
}

fn spent(neurons: u64, cost: u64, tokens: u32) -> Spent {
    Spent {
        key: None,
        gateway: "".into(),
        provider: "workers-ai".into(),
        model: ModelId::new("m"),
        usage: Usage { completion_tokens: tokens, ..Usage::default() },
        neurons: Neurons::from_micro(neurons),
        cost: Neurons::from_micro(cost),
    }
}

/// A book of one account, told what happens in words.
struct Told {
    book: Book,
    plan: Plan,
    windows: Vec<Window>,
    open: Vec<Open>,
    is_once: bool,
}

impl Told {
    fn new(plan: Plan, windows: Vec<Window>) -> Self {
        Self { book: Book::new(100), plan, windows, open: Vec::new(), is_once: false }
    }

    /// Reserves so many neurons, cost and tokens alike, and says what was granted.
    fn ask(&mut self, now: u64, amount: u64) -> Result<u64, Over> {
        let account = AccountId::new("a");
        let claim = Claim {
            request: RequestId::from_number(7),
            account: &account,
            plan: self.plan,
            windows: &self.windows,
            tokens: amount,
            neurons: Neurons::from_micro(amount),
            cost: Neurons::from_micro(amount),
            is_once: self.is_once,
        };
        match self.book.reserve(&claim, Millis(now)) {
            Ok(open) => {
                let granted = open.granted().neurons.micro();
                self.open.push(open);
                Ok(granted)
            }
            Err(Denied::Over(over)) => Err(over),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Settles the call that is open longest.
    fn settle(&mut self, now: u64, amount: u64) {
        let open = self.open.remove(0);
        assert!(self.book.settle(open, &spent(amount, amount, amount as u32), Millis(now)).0);
    }

    fn totals(&self, now: u64) -> [u64; 4] {
        let totals = self.book.totals(&AccountId::new("a"), Millis(now));
        [totals.today, totals.billed, totals.total, totals.reserved].map(Neurons::micro)
    }

    fn left(&self, now: u64) -> u64 {
        self.book.left(&AccountId::new("a"), self.plan, Millis(now)).micro()
    }
}

#[test]
fn a_call_is_reserved_by_estimate_and_settled_by_use() {
    let mut told = Told::new(plan(100, Beyond::Refuse, AtLimit::Finish), Vec::new());
    assert_eq!(told.ask(0, 60), Ok(60));
    assert_eq!((told.totals(0), told.left(0)), ([0, 0, 0, 60], 40));
    told.settle(1, 25);
    assert_eq!((told.totals(1), told.left(1)), ([25, 0, 25, 0], 75));
}

#[test]
fn a_released_call_charges_nothing() {
    let mut told = Told::new(plan(100, Beyond::Refuse, AtLimit::Finish), Vec::new());
    told.ask(0, 60).unwrap();
    let open = told.open.remove(0);
    assert_eq!(told.book.release(open, Millis(1)), None);
    assert_eq!((told.totals(1), told.left(1)), ([0, 0, 0, 0], 100));
}

#[test]
fn plans_differ_in_what_they_grant_when_little_is_left_and_when_nothing_is() {
    // Of 100 neurons 70 are held: 30 are left for an estimate of 50, then none.
    let check = |beyond, at_limit, little: Option<u64>, nothing: Option<u64>| {
        let mut told = Told::new(plan(100, beyond, at_limit), Vec::new());
        assert_eq!(told.ask(0, 70), Ok(70));
        assert_eq!(told.ask(0, 50).ok(), little, "{beyond:?} {at_limit:?}");
        let last = told.ask(0, 1);
        assert_eq!(last.clone().ok(), nothing, "{beyond:?} {at_limit:?}");
        if let Err(over) = last {
            assert_eq!((over.what, over.limit, over.left), (What::Allocation, 100, 0));
            assert_eq!(over.retry_after_ms, Some(DAY));
        }
        assert_eq!(told.ask(0, 0), Ok(0), "a call that costs nothing is never refused");
    };
    check(Beyond::Refuse, AtLimit::Finish, Some(50), None);
    check(Beyond::Refuse, AtLimit::Cut, Some(30), None);
    check(Beyond::Bill, AtLimit::Finish, Some(50), Some(1));
    check(Beyond::Bill, AtLimit::Cut, Some(50), Some(1));
}

#[test]
fn an_allocation_of_zero_lets_nothing_through() {
    let mut told = Told::new(plan(0, Beyond::Refuse, AtLimit::Finish), Vec::new());
    let over = told.ask(0, 1).unwrap_err();
    assert_eq!((over.left, over.retry_after_ms), (0, None));
}

#[test]
fn what_a_paid_plan_uses_beyond_its_allocation_is_billed() {
    let mut told = Told::new(plan(100, Beyond::Bill, AtLimit::Finish), Vec::new());
    for (used, totals) in [(80, [80, 0, 80, 0]), (50, [130, 30, 130, 0]), (7, [137, 37, 137, 0])] {
        told.ask(0, used).unwrap();
        told.settle(0, used);
        assert_eq!(told.totals(0), totals);
    }
    assert_eq!((told.totals(DAY), told.left(DAY)), ([0, 0, 137, 0], 100), "what is billed is no debt");
}

#[test]
fn a_day_is_that_of_the_clock_and_none_begins_twice() {
    let mut told = Told::new(plan(100, Beyond::Refuse, AtLimit::Finish), Vec::new());
    // When, what is left before, and the day's sum after ten more.
    let days = [
        (DAY - 1, 100, 10),
        (DAY, 100, 10),
        (DAY + 5, 90, 20),
        // The clock leaps back over midnight, and forward again.
        (DAY - 1, 90, 20),
        (DAY + 7, 80, 30),
        // Days are skipped, in error.
        (20 * DAY, 100, 10),
        (DAY + 8, 70, 40),
        (20 * DAY + 1, 90, 20),
        (21 * DAY, 100, 10),
    ];
    for (now, left, today) in days {
        assert_eq!(told.left(now), left, "at {now}");
        told.ask(now, 10).unwrap();
        told.settle(now, 10);
        assert_eq!(told.totals(now)[0], today, "at {now}");
    }
}

#[test]
fn a_call_across_midnight_is_charged_where_it_began_and_its_debt_where_it_ends() {
    let mut told = Told::new(plan(100, Beyond::Refuse, AtLimit::Finish), Vec::new());
    told.ask(DAY - 1, 90).unwrap();
    assert_eq!(told.ask(DAY, 100), Ok(100), "the next day is whole");
    told.settle(DAY + 1, 130);
    assert_eq!((told.totals(DAY - 1)[0], told.left(DAY - 1)), (130, 0));
    assert_eq!(told.ask(DAY + 1, 1).unwrap_err().retry_after_ms, Some(DAY - 1));
    told.settle(DAY + 2, 60);
    // 60 of its own, and 30 that were too many the day before.
    assert_eq!(told.left(DAY + 2), 10);
}

#[test]
fn debt_is_carried_until_it_is_paid() {
    let mut told = Told::new(plan(100, Beyond::Refuse, AtLimit::Finish), Vec::new());
    told.ask(0, 100).unwrap();
    told.settle(0, 350);
    for (now, left, wait) in [(DAY, 0, Some(2 * DAY)), (2 * DAY + 5, 0, Some(DAY - 5)), (3 * DAY, 50, None)] {
        assert_eq!(told.left(now), left, "at {now}");
        assert_eq!(told.ask(now, 1).err().map(|over| over.retry_after_ms), wait.map(Some), "at {now}");
        told.open.clear();
    }
}

#[test]
fn a_refusal_by_any_rule_charges_none() {
    let spans = [Counts::Requests, Counts::Tokens, Counts::Cost];
    let minute = Span::Millis(MINUTE);
    let mut windows: Vec<_> =
        (1..).zip(spans).map(|(id, counts)| window(id, 10, minute, Technique::Fixed, counts)).collect();
    windows.push(window(9, 0, minute, Technique::Fixed, Counts::Requests));
    let mut told = Told::new(Plan::FREE, windows);
    let over = told.ask(0, 10).unwrap_err();
    assert_eq!((over.what, &*over.rule, over.limit, over.retry_after_ms), (What::Window, "rule 9", 0, None));
    assert_eq!(told.totals(0), [0; 4]);
    told.windows.pop();
    assert_eq!(told.ask(0, 10), Ok(10), "all of it is left");
    assert_eq!(told.ask(0, 1).unwrap_err().rule.as_ref(), "rule 1".replace('1', "2"), "by tokens");
}

#[test]
fn windows_let_through_as_much_as_they_may() {
    // At a second, an amount: granted, or for how many seconds not, or never.
    #[derive(Debug)]
    enum Then {
        Granted,
        Wait(u64),
        Never,
    }
    use Then::{Granted, Never, Wait};
    let check = |technique, counts, steps: &[(u64, u64, Then)]| {
        let mut told = Told::new(Plan::PAID, vec![window(1, 4, Span::Millis(MINUTE), technique, counts)]);
        for (second, amount, then) in steps {
            let asked = told.ask(second * 1000, *amount).map_err(|over| over.retry_after_ms.map(|wait| wait / 1000));
            let expected = match then {
                Granted => Ok(*amount),
                Wait(seconds) => Err(Some(*seconds)),
                Never => Err(None),
            };
            assert_eq!(asked, expected, "{technique:?} {counts:?} at {second}");
        }
    };
    let requests =
        [(1, 0, Granted), (1, 0, Granted), (2, 0, Granted), (3, 0, Granted), (10, 0, Wait(50)), (60, 0, Granted)];
    check(Technique::Fixed, Counts::Requests, &requests);
    // Four fade over the next minute: after a quarter there is room for one.
    let requests = [
        (59, 0, Granted),
        (59, 0, Granted),
        (59, 0, Granted),
        (59, 0, Granted),
        (59, 0, Wait(16)),
        (60, 0, Wait(15)),
        (74, 0, Wait(1)),
        (75, 0, Granted),
        (75, 0, Wait(15)),
        (200, 0, Granted),
    ];
    check(Technique::Sliding, Counts::Requests, &requests);
    check(Technique::Fixed, Counts::Tokens, &[(0, 3, Granted), (0, 2, Wait(60)), (0, 5, Never), (0, 1, Granted)]);
    check(
        Technique::Sliding,
        Counts::Tokens,
        &[(30, 4, Granted), (30, 2, Wait(60)), (90, 2, Granted), (90, 1, Wait(15))],
    );
    // Money: with something left a call goes on, with nothing left it does not.
    check(Technique::Fixed, Counts::Cost, &[(0, 3, Granted), (0, 2, Granted), (0, 1, Wait(60)), (0, 0, Granted)]);
}

#[test]
fn a_budget_cuts_a_call_or_lets_it_finish_into_debt() {
    for (at_limit, granted) in [(AtLimit::Cut, 4), (AtLimit::Finish, 9)] {
        let budget = window(1, 10, Span::Month, Technique::Fixed, Counts::Neurons);
        let mut told = Told::new(plan(1000, Beyond::Bill, at_limit), vec![budget]);
        told.ask(JANUARY, 6).unwrap();
        assert_eq!(told.ask(JANUARY, 9), Ok(granted));
        let over = told.ask(JANUARY, 1).unwrap_err();
        assert_eq!((over.what, over.left, over.retry_after_ms), (What::Budget, 0, Some(3_600_000)));
        told.settle(JANUARY, 6);
        told.settle(JANUARY, granted);
        let february = JANUARY + 3_600_000;
        assert_eq!(told.ask(february, 10), Ok(10));
        let left = told.book.windows.get(1, Span::Month).left(told.windows[0].terms(), Millis(february));
        assert_eq!(left, 0);
        told.settle(february, 2);
        let left = told.book.windows.get(1, Span::Month).left(told.windows[0].terms(), Millis(february));
        assert_eq!(left, if at_limit == AtLimit::Cut { 8 } else { 3 }, "what was beyond counts in the next month");
    }
}

#[test]
fn what_other_providers_cost_uses_no_allocation() {
    let account = AccountId::new("a");
    let budget = [window(1, 100, Span::DAY, Technique::Fixed, Counts::Cost)];
    let mut book = Book::new(10);
    let claim = Claim {
        request: RequestId::from_number(1),
        account: &account,
        plan: plan(0, Beyond::Refuse, AtLimit::Finish),
        windows: &budget,
        tokens: 0,
        neurons: Neurons::ZERO,
        cost: Neurons::from_micro(60),
        is_once: false,
    };
    let open = book.reserve(&claim, Millis(0)).unwrap();
    book.settle(open, &spent(0, 70, 5), Millis(0));
    assert_eq!(book.totals(&account, Millis(0)), AccountTotals::default());
    let Ok((standing, None)) = book.pass(&budget[0], Millis(0)) else { panic!("30 are left") };
    assert_eq!((standing.left, standing.reset_ms), (30, DAY));
}

#[test]
fn the_tightest_window_stands_in_the_headers() {
    let windows = [(1, 100), (2, 10), (3, 1000)].map(|(id, limit)| {
        window(
            id,
            limit,
            Span::Millis(MINUTE),
            Technique::Fixed,
            if id == 3 { Counts::Tokens } else { Counts::Requests },
        )
    });
    let mut told = Told::new(Plan::FREE, windows.to_vec());
    told.ask(1000, 100).unwrap();
    // 99 of 100, 9 of 10, 900 of 1000.
    let standing = |told: &Told| told.open.last().unwrap().standing().map(|is| (is.limit, is.left, is.reset_ms));
    assert_eq!(standing(&told), Some((10, 9, 59_000)));
    told.ask(2000, 200).unwrap();
    assert_eq!(standing(&told), Some((1000, 700, 58_000)));
}

#[test]
fn a_window_is_passed_without_a_reservation() {
    let long = window(1, 2, Span::DAY, Technique::Fixed, Counts::Requests);
    let mut book = Book::new(10);
    let mut kept = Book::new(10);
    for _ in 0..2 {
        let (_, entry) = book.pass(&long, Millis(0)).unwrap();
        kept.apply(&entry.unwrap());
    }
    assert!(matches!(book.pass(&long, Millis(5)), Err(Denied::Over(over)) if over.retry_after_ms == Some(DAY - 5)));
    assert!(kept.pass(&long, Millis(5)).is_err(), "a long one survives");
    let short = window(2, 2, Span::Millis(MINUTE), Technique::Fixed, Counts::Requests);
    assert_eq!(book.pass(&short, Millis(0)).unwrap().1, None);
}

#[test]
fn what_used_nothing_of_a_long_window_leaves_nothing_to_keep() {
    let mut book = Book::new(4);
    let account = AccountId::new("a");
    let windows = [window(1, 100, Span::DAY, Technique::Fixed, Counts::Cost)];
    let mut count = |used: u64| {
        let claim = Claim {
            request: RequestId::from_number(1),
            account: &account,
            plan: Plan::PAID,
            windows: &windows,
            tokens: 0,
            neurons: Neurons::ZERO,
            cost: Neurons::from_micro(40),
            is_once: false,
        };
        let open = book.reserve(&claim, Millis(0)).unwrap();
        let entry = book.count(open, &Usage::default(), Neurons::from_micro(used), Millis(0));
        (entry.is_some(), book.windows.get(1, Span::DAY).left(windows[0].terms(), Millis(0)))
    };
    assert_eq!(count(0), (false, 100), "what was held is given back");
    assert_eq!(count(7), (true, 93));
}

#[test]
fn a_call_that_counts_once_is_billed_once() {
    let mut told = Told::new(Plan::FREE, Vec::new());
    told.is_once = true;
    told.ask(0, 5).unwrap();
    told.ask(0, 5).unwrap();
    told.settle(0, 5);
    let second = told.open.remove(0);
    assert_eq!(told.book.settle(second, &spent(5, 5, 5), Millis(1)), (false, None));
    assert_eq!(told.totals(1), [5, 0, 5, 0]);
    let account = AccountId::new("a");
    let again = |book: &mut Book, request: u128| {
        let request = RequestId::from_number(request);
        let (neurons, cost) = (Neurons::from_micro(1), Neurons::ZERO);
        let claim = Claim {
            request,
            account: &account,
            plan: Plan::FREE,
            windows: &[],
            tokens: 0,
            neurons,
            cost,
            is_once: true,
        };
        book.reserve(&claim, Millis(2)).map(|open| book.settle(open, &spent(1, 0, 0), Millis(ONCE + 1)).0)
    };
    assert_eq!(again(&mut told.book, 7).unwrap_err(), Denied::Settled);
    assert_eq!(again(&mut told.book, 8), Ok(true));
    assert_eq!(again(&mut told.book, 7), Ok(true), "it is forgotten after two days");
}

#[test]
fn windows_that_are_over_are_forgotten_first_then_those_that_end_first_and_none_that_is_held() {
    let mut book = Book::new(4);
    let account = AccountId::new("a");
    let fill = |book: &mut Book, id: u128, span: u64, now: u64| {
        let window = window(id, 10, Span::Millis(span), Technique::Fixed, Counts::Requests);
        book.pass(&window, Millis(now)).map(|(standing, _)| standing.left)
    };
    let known = |book: &Book| {
        let known = |id: &u128| {
            [1000, 2000, DAY, 2 * DAY].iter().any(|&span| {
                let counter = book.windows.get(*id, Span::Millis(span));
                counter != Counter::new(Span::Millis(span))
            })
        };
        (1..20).filter(known).collect::<Vec<u128>>()
    };
    let held = [window(1, 10, Span::Millis(1000), Technique::Fixed, Counts::Tokens)];
    let neurons = Neurons::ZERO;
    let claim = Claim {
        request: RequestId::from_number(1),
        account: &account,
        plan: Plan::FREE,
        windows: &held,
        tokens: 3,
        neurons,
        cost: neurons,
        is_once: false,
    };
    let open = book.reserve(&claim, Millis(1000)).unwrap();
    fill(&mut book, 2, 2000, 1000).unwrap();
    fill(&mut book, 3, DAY, 1000).unwrap();
    fill(&mut book, 4, 2 * DAY, 1000).unwrap();
    assert_eq!(known(&book), [1, 2, 3, 4]);
    fill(&mut book, 5, DAY, 1000).unwrap();
    assert_eq!(known(&book), [1, 3, 4, 5], "the second ends first, of those that are not held");
    let much_later = 5 * DAY;
    fill(&mut book, 6, DAY, much_later).unwrap();
    fill(&mut book, 7, DAY, much_later).unwrap();
    assert_eq!(known(&book), [1, 4, 6, 7], "two were over");
    let _ = book.release(open, Millis(much_later));
    fill(&mut book, 8, DAY, much_later).unwrap();
    assert_eq!(known(&book), [4, 6, 7, 8], "and so is one that nobody holds any longer");
}

#[test]
fn months_are_those_of_the_calendar() {
    for (text, begins) in [
        ("2026-01-31T23:59:59Z", "2026-01-01T00:00:00Z"),
        ("2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z"),
        ("2026-12-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("1970-01-15T00:00:00Z", "1970-01-01T00:00:00Z"),
    ] {
        let millis = |text: &str| Millis(text.parse::<jiff::Timestamp>().unwrap().as_millisecond() as u64);
        assert_eq!(Span::Month.start(Span::Month.index(millis(text))), millis(begins));
    }
    let day = JANUARY / DAY;
    assert_eq!(Span::Month.index(Millis((day + 1) * DAY)), Span::Month.index(Millis(day * DAY)) + 1);
}
