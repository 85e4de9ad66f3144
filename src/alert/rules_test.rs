//! Rules by the step: what comes in, and what is told at which look.

use proptest::prelude::*;

use super::*;
use crate::alert::settings::{Filter, Measure, What};

const START: Millis = Millis(1_750_000_000_000);
/// Between two looks, in seconds.
const STEP: u64 = 10;
const PATIENCE: Duration = Duration::from_secs(3 * STEP);

/// Fires from 5 on at once, is over below 5 at once, and is told once.
fn rule() -> Rule {
    let measure = Measure { what: What::DeviceDown, filter: Filter::default() };
    Rule { repeat: None, ..Rule::new("r", measure, 5.0) }
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn rules(rule: &Rule) -> Rules {
    Rules::new(vec![rule.clone()], Saved::default(), PATIENCE)
}

/// The readings of a word: `7`, `-` (none), `a=7,b=1`.
fn readings(word: &str) -> Vec<Reading> {
    let one = |part: &str| match part.split_once('=') {
        Some((of, value)) => Reading { of: Some(of.to_owned()), value: value.parse().unwrap() },
        None => Reading::from(part.parse::<f64>().unwrap()),
    };
    word.split(',').filter(|part| *part != "-").map(one).collect()
}

fn word(notice: &Notice) -> String {
    let of = notice.of.as_ref().map(|of| format!(" {of}")).unwrap_or_default();
    format!("{}{of}", notice.event.as_str())
}

/// Looks every ten seconds. `+20` and `-20` let the clock leap by so many more seconds before the next look, `!` restarts,
/// `s20` silences for so many seconds, `u` ends that. Expects what is told, each with the number of its look.
fn check(rule: Rule, script: &str, expected: &[&str]) {
    assert_eq!(run(&rule, script), expected, "{script}");
}

fn run(rule: &Rule, script: &str) -> Vec<String> {
    let (mut rules, mut now, mut look, mut told) = (rules(rule), START, 0, Vec::new());
    for word_in in script.split_whitespace() {
        match word_in.split_at(1) {
            ("!", "") => rules = Rules::new(vec![rule.clone()], rules.saved(), PATIENCE),
            ("+", by) => now.0 += by.parse::<u64>().unwrap() * 1000,
            ("-", by) if !by.is_empty() => now.0 -= by.parse::<u64>().unwrap() * 1000,
            ("s", by) => assert!(rules.silence("r", Millis(now.0 + by.parse::<u64>().unwrap() * 1000))),
            ("u", "") => assert!(rules.unsilence("r")),
            _ => {
                now.0 += STEP * 1000;
                look += 1;
                let notices = rules.step(now, &[readings(word_in)]);
                told.extend(notices.iter().map(|notice| format!("{look} {}", word(notice))));
            }
        }
    }
    told
}

#[test]
fn a_rule_fires_once_and_is_over_once() {
    check(rule(), "1 4.9 5 9 9 4.9 1 1", &["3 fired", "6 resolved"]);
    check(rule(), "9 1 9 1", &["1 fired", "2 resolved", "3 fired", "4 resolved"]);
    check(rule(), "1 1 1", &[]);
}

#[test]
fn it_fires_only_when_it_has_held_and_is_over_only_when_that_has_held_too() {
    let held = || Rule { hold: seconds(20), ..rule() };
    check(held(), "9 9 9 9", &["3 fired"]);
    check(held(), "9 9 1 9 9 1 9 9 9", &["9 fired"]);
    let slow = || Rule { resolve_after: seconds(20), ..rule() };
    check(slow(), "9 1 1 1 1", &["1 fired", "4 resolved"]);
    check(slow(), "9 1 1 9 1 1 9 1 1 1", &["1 fired", "10 resolved"]);
}

#[test]
fn a_figure_that_swings_about_the_threshold_does_not_fire_each_time() {
    let calm = || Rule { resolve_below: Some(3.0), ..rule() };
    check(calm(), "9 4 9 4 3 9 2.9 4 5", &["1 fired", "7 resolved", "9 fired"]);
    let held = Rule { hold: seconds(10), ..calm() };
    check(held, "9 4 9 4", &[]);
}

#[test]
fn it_is_told_again_at_the_interval_while_it_lasts_and_only_then() {
    let loud = || Rule { repeat: Some(seconds(30)), ..rule() };
    check(loud(), "9 9 9 9 9 9 9 1", &["1 fired", "4 repeated", "7 repeated", "8 resolved"]);
    let slow = Rule { resolve_after: seconds(60), ..loud() };
    check(slow, "9 1 1 1 1 9", &["1 fired", "6 repeated"]);
}

#[test]
fn a_missing_reading_is_neither_right_nor_wrong() {
    let held = Rule { hold: seconds(20), repeat: Some(seconds(30)), resolve_after: seconds(20), ..rule() };
    check(held.clone(), "9 - - - - 9 - 9", &["8 fired"]);
    check(held.clone(), "9 9 9 - - - - - 9", &["3 fired", "9 repeated"]);
    check(held.clone(), "9 9 9 1 - - - - - 1 1", &["3 fired", "11 resolved"]);
    check(held, "9 - - 1 9 9", &[]);
    let nan = rules(&rule()).step(START, &[vec![Reading::from(f64::NAN), Reading::from(f64::INFINITY)]]);
    assert_eq!(nan, []);
}

#[test]
fn a_clock_that_leaps_neither_fires_nor_repeats_nor_forgets() {
    let held = Rule { hold: seconds(60), repeat: Some(seconds(3600)), resolve_after: seconds(60), ..rule() };
    // A year ahead counts as three looks, a year back as none.
    check(held.clone(), "9 +31536000 9 9 9 9", &["5 fired"]);
    check(held.clone(), "9 9 -31536000 9 9 9 9 9 9", &["8 fired"]);
    let firing = "9 9 9 9 9 9 9";
    check(held.clone(), &format!("{firing} +31536000 9 9 9 -31536000 9 9"), &["7 fired"]);
    check(held.clone(), &format!("{firing} 1 +31536000 1 1 1 1"), &["7 fired", "12 resolved"]);
    check(held, &format!("{firing} -31536000 1 1 1 1 1 1 1"), &["7 fired", "14 resolved"]);
    let mut rules = rules(&rule());
    let fired = rules.step(START, &[readings("9")]);
    let earlier = Millis(START.0 - 1_000_000);
    let over = rules.step(earlier, &[readings("1")]);
    assert_eq!((over[0].since, &over[0].alert), (earlier, &fired[0].alert), "never since a time to come");
}

#[test]
fn a_restart_neither_fires_again_nor_counts_the_time_between() {
    let held = Rule { hold: seconds(20), repeat: Some(seconds(30)), resolve_after: seconds(20), ..rule() };
    check(rule(), "9 ! 9 9 ! 9 1", &["1 fired", "5 resolved"]);
    check(rule(), "9 +86400 ! 1", &["1 fired", "2 resolved"]);
    check(held.clone(), "9 9 +86400 ! 9 9", &["4 fired"]);
    check(held.clone(), "9 9 9 +86400 ! 9 9 9 9", &["3 fired", "7 repeated"]);
    check(held, "9 9 9 1 1 +86400 ! 1 1", &["3 fired", "7 resolved"]);
}

#[test]
fn a_silent_rule_tells_nothing_but_the_end_of_what_was_told_and_speaks_up_when_it_lasts() {
    let loud = || Rule { repeat: Some(seconds(30)), ..rule() };
    check(loud(), "1 s40 9 9 9 9 9", &["5 fired"]);
    check(loud(), "1 s30 9 9 1 1 1", &[]);
    check(loud(), "9 s100 9 9 9 9 1", &["1 fired", "6 resolved"]);
    check(loud(), "9 s45 9 9 9 9 9", &["1 fired", "6 repeated"]);
    check(loud(), "s100 9 9 u 9", &["3 fired"]);
    check(loud(), "s100 9 ! 9 9", &[]);
    check(loud(), "s25 9 ! 9 9", &["3 fired"]);
    let mut rules = rules(&rule());
    assert!(!rules.silence("other", Millis(u64::MAX)) && !rules.unsilence("other") && rules.unsilence("r"));
}

#[test]
fn each_of_several_things_is_an_alert_of_its_own() {
    let expected = ["1 fired a", "2 fired b", "3 resolved a", "5 resolved b"];
    check(rule(), "a=9,b=1 a=9,b=9 a=1,b=9 b=9 a=1,b=1", &expected);
    // What is left out is neither right nor wrong.
    check(rule(), "a=9 b=1 a=9 - a=1", &["1 fired a", "5 resolved a"]);
}

#[test]
fn what_has_no_reading_for_a_day_is_taken_as_over_and_says_so() {
    let mut rules = rules(&rule());
    let mut now = START;
    assert_eq!(rules.step(now, &[readings("a=9")]).len(), 1);
    let mut told = Vec::new();
    for _ in 0..86_400 / STEP {
        now.0 += STEP * 1000;
        told = rules.step(now, &[readings("b=1")]);
        if !told.is_empty() {
            break;
        }
    }
    assert_eq!((told.len(), now.0 - START.0, told[0].value), (1, 86_400_000, None));
    assert!(told[0].sentence().starts_with("There was no reading for a day"), "{}", told[0].sentence());
    assert_eq!(rules.saved().alerts.len(), 0);
}

#[test]
fn a_rule_has_a_hundred_alerts_at_most_and_says_how_many_it_leaves_out() {
    let mut rules = rules(&rule());
    let many = |count: usize| (0..count).map(|n| Reading { of: Some(format!("account {n:03}")), value: 9.0 }).collect();
    assert_eq!(rules.step(START, &[many(130)]).len(), 100);
    assert_eq!(rules.status(START)[0].left_out, 30);
    let mut later: Vec<Reading> = many(130);
    later[0].value = 0.0;
    let told: Vec<_> = rules.step(Millis(START.0 + 1), &[later]).iter().map(word).collect();
    assert_eq!(told, ["resolved account 000", "fired account 100"]);
}

#[test]
fn a_notice_carries_all_that_is_known_and_its_alert_keeps_its_name() {
    let mut rules = rules(&Rule { repeat: Some(seconds(10)), resolve_below: Some(4.0), ..rule() });
    let mut look = |at: u64, word: &str| rules.step(Millis(START.0 + at * 1000), &[readings(word)]).remove(0);
    let notices = [look(0, "a=6"), look(10, "a=9"), look(20, "a=3")];
    let [fired, repeated, resolved] = &notices;
    assert_eq!(fired.id, format!("{}-0", fired.alert));
    assert_eq!(repeated.id, format!("{}-1", fired.alert));
    assert_eq!(resolved.id, format!("{}-2", fired.alert));
    assert!(notices.iter().all(|notice| notice.since == START && notice.rule == "r" && notice.threshold == 5.0));
    assert_eq!((resolved.value, resolved.peak, resolved.resolve_below), (Some(3.0), 9.0, 4.0));
    assert_eq!((resolved.at, repeated.number), (Millis(START.0 + 20_000), 1));
    assert_ne!(look(30, "a=9").alert, fired.alert, "another time is another alert");
}

#[test]
fn the_status_says_how_each_rule_is() {
    let mut rules = rules(&Rule { hold: seconds(10), ..rule() });
    let state = |rules: &Rules, at: u64| {
        let status = rules.status(Millis(START.0 + at * 1000)).remove(0);
        (status.state, status.since, status.value, status.of.unwrap_or_default(), status.alerts.len())
    };
    assert_eq!(state(&rules, 0), (State::Ok, None, None, String::new(), 0));
    rules.step(START, &[readings("a=6,b=2")]);
    assert_eq!(state(&rules, 0), (State::Pending, Some(START), Some(6.0), "a".into(), 1));
    rules.step(Millis(START.0 + 10_000), &[readings("a=7,b=8")]);
    assert_eq!(state(&rules, 10), (State::Firing, Some(START), Some(8.0), "b".into(), 2));
    assert!(rules.silence("r", Millis(START.0 + 30_000)));
    assert_eq!(state(&rules, 29).0, State::Silenced);
    assert_eq!(state(&rules, 30).0, State::Firing);
    let json = serde_json::to_value(rules.status(START)).unwrap();
    assert_eq!((&json[0]["state"], &json[0]["unit"]), (&"silenced".into(), &"seconds".into()));
}

#[test]
fn rules_that_are_no_more_are_forgotten() {
    let mut rules = rules(&rule());
    rules.step(START, &[readings("9")]);
    rules.silence("r", Millis(u64::MAX));
    let other = Rule { name: "other".into(), ..rule() };
    let after = Rules::new(vec![other], rules.saved(), PATIENCE);
    assert_eq!(after.saved(), Saved { begun: 1, ..Saved::default() });
}

fn reading() -> impl Strategy<Value = Vec<Reading>> {
    let value = prop_oneof![Just(1.0), Just(4.0), Just(9.0), Just(f64::NAN)];
    let one = (prop::sample::select(vec![None, Some("a"), Some("b")]), value);
    prop::collection::vec(one.prop_map(|(of, value)| Reading { of: of.map(str::to_owned), value }), 0..4)
}

proptest! {
    /// Whatever the readings, the clock and the settings are, and wherever it is restarted.
    #[test]
    fn of_every_alert_it_is_told_once_that_it_began_and_at_most_once_that_it_is_over(
        looks in prop::collection::vec((reading(), -100_000i64..100_000, 0u8..12), 0..60),
        hold in 0u64..40, resolve_after in 0u64..40, repeat in prop::option::of(1u64..60), below in 1.0f64..5.0,
    ) {
        let rule = Rule {
            hold: seconds(hold), resolve_after: seconds(resolve_after), repeat: repeat.map(seconds), resolve_below: Some(below), ..rule()
        };
        let (mut rules, mut now) = (rules(&rule), START);
        let mut told: BTreeMap<String, Vec<Notice>> = BTreeMap::new();
        for (readings, leap, chance) in looks {
            now = Millis(now.0.saturating_add_signed(leap));
            match chance {
                0 => {
                    // Through the file, as a restart goes.
                    let saved = serde_json::from_slice(&serde_json::to_vec(&rules.saved()).unwrap()).unwrap();
                    rules = Rules::new(vec![rule.clone()], saved, PATIENCE);
                }
                1 => { rules.silence("r", Millis(now.0 + 50_000)); }
                2 => { rules.unsilence("r"); }
                _ => {}
            }
            for notice in rules.step(now, &[readings]) {
                prop_assert!(notice.since <= notice.at && notice.at == now);
                told.entry(notice.alert.clone()).or_default().push(notice);
            }
        }
        for notices in told.values() {
            for (number, notice) in notices.iter().enumerate() {
                let is_last = number + 1 == notices.len();
                prop_assert_eq!(notice.number as usize, number);
                prop_assert_eq!(notice.event == Event::Fired, number == 0);
                prop_assert!(notice.event != Event::Resolved || is_last);
                prop_assert!(notice.event != Event::Repeated || repeat.is_some());
            }
        }
    }
}
