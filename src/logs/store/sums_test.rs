use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::tests::forty;
use super::super::{Patch, Stored};
use super::*;

/// A filter that a plain loop understands too.
#[derive(Clone, Debug)]
enum Condition {
    Provider(Vec<&'static str>),
    ModelContains(&'static str),
    Success(bool),
    CostAbove(u64),
    DurationBelow(u64),
    TokensInAbove(u32),
    CreatedAfter(u64),
    Feedback(i8),
}

impl Condition {
    fn written(&self) -> Value {
        let (key, operator, value) = match self {
            Self::Provider(names) => ("provider", "eq", json!(names)),
            Self::ModelContains(part) => ("model", "contains", json!([part])),
            Self::Success(is_wanted) => ("success", "eq", json!([is_wanted])),
            Self::CostAbove(neurons) => ("cost", "gt", json!([*neurons as f64 * 0.011 / 1000.0])),
            Self::DurationBelow(us) => ("duration", "lt", json!([*us as f64 / 1000.0])),
            Self::TokensInAbove(tokens) => ("tokens_in", "gt", json!([tokens])),
            Self::CreatedAfter(at) => ("created_at", "gt", json!([at])),
            Self::Feedback(feedback) => ("feedback", "eq", json!([feedback])),
        };
        json!({ "key": key, "operator": operator, "value": value })
    }

    fn holds(&self, Stored { record, feedback, .. }: &Stored) -> bool {
        match self {
            Self::Provider(names) => names.contains(&&*record.provider),
            Self::ModelContains(part) => record.model.contains(part),
            Self::Success(is_wanted) => record.success == *is_wanted,
            Self::CostAbove(neurons) => record.cost.micro() > neurons * 1_000_000,
            Self::DurationBelow(us) => record.duration_us < *us,
            Self::TokensInAbove(tokens) => record.usage.is_some_and(|usage| usage.prompt_tokens > *tokens),
            Self::CreatedAfter(at) => record.at.0 > *at,
            Self::Feedback(wanted) => *feedback == Some(*wanted),
        }
    }
}

fn condition() -> impl Strategy<Value = Condition> {
    let provider = prop::sample::select(vec!["anthropic", "openai", "google", "nobody"]);
    prop_oneof![
        prop::collection::vec(provider, 1..3).prop_map(Condition::Provider),
        prop::sample::select(vec!["model", "-3", "x"]).prop_map(Condition::ModelContains),
        any::<bool>().prop_map(Condition::Success),
        (0..45u64).prop_map(Condition::CostAbove),
        (12_340..12_390u64).prop_map(Condition::DurationBelow),
        (5..55u32).prop_map(Condition::TokensInAbove),
        (1_699_999_995..1_700_000_045u64).prop_map(|s| Condition::CreatedAfter(s * 1000)),
        (-1..2i8).prop_map(Condition::Feedback),
    ]
}

/// The long way: every record, one after the other.
fn fold(records: &[Stored], sets: &[Vec<Condition>]) -> Sums {
    let mut sums = Sums::default();
    let is_meant = |stored: &&Stored| sets.iter().any(|set| set.iter().all(|condition| condition.holds(stored)));
    for Stored { record, feedback, .. } in records.iter().filter(is_meant) {
        sums.count += 1;
        sums.cost += u128::from(record.cost.micro());
        sums.duration += u128::from(record.duration_us);
        sums.liked += u64::from(*feedback == Some(1));
        sums.disliked += u64::from(*feedback == Some(-1));
    }
    sums
}

#[test]
fn sums_over_any_sets_of_filters_are_those_of_a_plain_loop_over_the_records() {
    let folder = tempfile::tempdir().unwrap();
    let (store, records) = forty(folder.path());
    let account = Store::account();
    // In full segments and in the open one: feedback, of which some was taken back, and records that are gone.
    for (at, record) in records.iter().enumerate() {
        let feedback = [None, Some(1), Some(-1), Some(1), Some(0)][at % 5];
        let patch = Patch { feedback: Some(feedback), ..Patch::default() };
        assert!(store.patch(&account, "gw", record.id.unwrap(), &patch).unwrap());
    }
    let gone = Query::parse("filters.key=metadata.value&filters.value=u3").unwrap();
    assert_eq!(store.delete(&account, "gw", &gone).unwrap(), 4);
    let all = Query::parse("per_page=1000").unwrap();
    let live = store.list(&account, "gw", &all).unwrap().records;
    assert_eq!(live.len(), 36);
    let check = |sets: Vec<Vec<Condition>>| {
        let compile = |set: &Vec<Condition>| {
            let written: Vec<Value> = set.iter().map(Condition::written).collect();
            Query::of_filters(&written.into()).unwrap().filters
        };
        let filters: Vec<_> = sets.iter().map(compile).collect();
        assert_eq!(store.sums(&account, "gw", &filters).unwrap(), fold(&live, &sets), "{sets:?}");
        assert_eq!(store.sums(&account, "other", &filters).unwrap(), Sums::default());
    };
    check(vec![]);
    check(vec![vec![]]);
    let whole = store.sums(&account, "gw", &[vec![]]).unwrap();
    assert!(whole.liked > 0 && whole.disliked > 0 && whole.liked + whole.disliked < whole.count, "{whole:?}");
    let sets = prop::collection::vec(prop::collection::vec(condition(), 0..4), 1..4);
    proptest!(|(sets in sets)| check(sets));
}
