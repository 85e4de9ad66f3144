//! Evaluations from the side of whoever runs them: which is next, and what is noted of it when it is over.
//!
//!     admin ─ create ─> waiting, on disk ─ due ─> (sums of the log) ─ evaluated ─> done or failed, on disk
//!
//! The line is the registry itself: what a crash left waiting is due again at the next start.

use serde_json::Value;
use uuid::Uuid;

use super::actor::Registry;
use super::book::{EvaluationRecord, Evaluator, FilterRecord, ResultRecord, Status, compile};
use crate::base::{AccountId, Neurons, Result};
use crate::logs::{Filter, Sums};

/// An evaluation that waits to be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    /// Whose.
    pub account: AccountId,
    /// Of which gateway.
    pub gateway: String,
    /// Which.
    pub id: Uuid,
    /// The filters of each of its datasets.
    sets: Vec<Vec<FilterRecord>>,
}

impl Due {
    /// The filters of each of its datasets, as the log understands them.
    ///
    /// # Errors
    /// When one was written by a version that knew more of them.
    pub fn sets(&self) -> Result<Vec<Vec<Filter>>> {
        self.sets.iter().map(|filters| compile(filters)).collect()
    }
}

impl Registry {
    /// The evaluation that has waited longest, of any account.
    pub fn due(&self) -> Option<Due> {
        let view = self.view();
        let each = view.accounts.iter().flat_map(|(account, view)| {
            let waiting = view.book.evaluations.iter().filter(|evaluation| !evaluation.processed);
            waiting.map(move |evaluation| (account, evaluation))
        });
        let (account, first) = each.min_by_key(|(_, evaluation)| (evaluation.created, evaluation.id))?;
        Some(Due {
            account: AccountId::new(account),
            gateway: first.gateway.clone(),
            id: first.id,
            sets: first.datasets.iter().map(|dataset| dataset.filters.clone()).collect(),
        })
    }

    /// Notes how an evaluation ended, unless it was deleted meanwhile.
    ///
    /// # Errors
    /// What the disk says; it is due again then.
    pub async fn evaluated(&self, due: &Due, outcome: Result<Sums>) -> Result<()> {
        let id = due.id;
        let noted = self.change(&due.account, move |book, bench| {
            if let Some(evaluation) = book.evaluations.iter_mut().find(|evaluation| evaluation.id == id) {
                note(evaluation, &outcome);
                evaluation.modified = bench.now;
            }
            Ok(Value::Null)
        });
        noted.await.map(drop)
    }
}

fn note(evaluation: &mut EvaluationRecord, outcome: &Result<Sums>) {
    evaluation.processed = true;
    evaluation.total_logs = outcome.as_ref().map_or(0, |sums| sums.count);
    for result in &mut evaluation.results {
        match outcome {
            Ok(sums) => judge(result, sums),
            Err(error) => {
                result.status = Status::Failed;
                result.description = error.message().to_owned();
            }
        }
    }
}

fn judge(result: &mut ResultRecord, sums: &Sums) {
    let (number, total_logs, words, without) = match result.evaluator {
        Evaluator::Cost => {
            let usd = |micro| Neurons::from_micro(micro).usd();
            (average(sums.cost, sums.count).map(usd), sums.count, "average in USD", "no log is in the datasets")
        }
        Evaluator::Speed => {
            let ms = |us| us as f64 / 1000.0;
            (
                average(sums.duration, sums.count).map(ms),
                sums.count,
                "average in milliseconds",
                "no log is in the datasets",
            )
        }
        Evaluator::Feedback => {
            let judged = sums.liked + sums.disliked;
            let share = (judged > 0).then(|| sums.liked as f64 / judged as f64);
            (share, judged, "share of thumbs up, from 0 to 1", "no log of the datasets has feedback")
        }
    };
    result.status = Status::Done;
    result.total_logs = total_logs;
    result.description = if number.is_some() { words } else { without }.to_owned();
    // Twelve digits behind the point: a micro-neuron is 11 of the last.
    result.result = number.map(|number| ((number * 1e12).round() / 1e12).to_string()).unwrap_or_default();
}

fn average(sum: u128, count: u64) -> Option<u64> {
    let half = u128::from(count / 2);
    let average = (sum + half).checked_div(count.into())?;
    Some(u64::try_from(average).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[path = "evaluation_test.rs"]
mod tests;
