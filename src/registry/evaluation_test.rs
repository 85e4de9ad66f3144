use serde_json::json;

use super::*;
use crate::base::Error;

/// `status result total_logs description` of each evaluator, after this outcome.
fn noted(outcome: Result<Sums>) -> Vec<Value> {
    let result = |evaluator| ResultRecord {
        id: Uuid::nil(),
        evaluator,
        status: Status::Waiting,
        description: "waits".into(),
        result: String::new(),
        total_logs: 0,
    };
    let mut evaluation = EvaluationRecord {
        id: Uuid::nil(),
        gateway: "g".into(),
        name: "n".into(),
        datasets: Vec::new(),
        results: [Evaluator::Cost, Evaluator::Speed, Evaluator::Feedback].map(result).into(),
        total_logs: 0,
        processed: false,
        created: crate::base::Millis(0),
        modified: crate::base::Millis(0),
    };
    let count = outcome.as_ref().map_or(0, |sums| sums.count);
    note(&mut evaluation, &outcome);
    assert_eq!((evaluation.processed, evaluation.total_logs), (true, count));
    let shown = |result: &ResultRecord| json!([result.status, result.result, result.total_logs, result.description]);
    evaluation.results.iter().map(shown).collect()
}

#[test]
fn results_are_averages_and_a_share_of_what_there_is() {
    // Three requests of 0.0011, 0.0022 and 0.0044 USD.
    let sums = Sums { count: 3, cost: 700_000_000, duration: 37_036, liked: 3, disliked: 1 };
    let share = "share of thumbs up, from 0 to 1";
    assert_eq!(
        noted(Ok(sums)),
        [
            json!(["done", "0.002566666663", 3, "average in USD"]),
            json!(["done", "12.345", 3, "average in milliseconds"]),
            json!(["done", "0.75", 4, share]),
        ]
    );
    // What costs next to nothing is written without an exponent, and sums may be larger than any one number.
    let sums = Sums { count: 2, cost: 2, duration: u128::from(u64::MAX) * 2, liked: 0, disliked: 2 };
    assert_eq!(
        noted(Ok(sums)),
        [
            json!(["done", "0.000000000011", 2, "average in USD"]),
            json!(["done", (u64::MAX as f64 / 1000.0).to_string(), 2, "average in milliseconds"]),
            json!(["done", "0", 2, share]),
        ]
    );
}

#[test]
fn where_there_is_nothing_no_number_is_made_up() {
    assert_eq!(
        noted(Ok(Sums::default())),
        [
            json!(["done", "", 0, "no log is in the datasets"]),
            json!(["done", "", 0, "no log is in the datasets"]),
            json!(["done", "", 0, "no log of the datasets has feedback"]),
        ]
    );
    assert_eq!(noted(Err(Error::internal("the disk is gone"))), vec![json!(["failed", "", 0, "the disk is gone"]); 3]);
}
