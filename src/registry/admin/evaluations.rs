//! Evaluations of datasets, and the evaluators there are. One that was made waits here until somebody runs it: `evaluation.rs`.

use serde_json::{Map, Value, json};
use tracing::info;
use uuid::Uuid;

use super::super::book::{Book, DatasetRecord, EvaluationRecord, Evaluator, ResultRecord, Status};
use super::{Answer, Call, Method, datasets, id, missing, moment, not_found, text, wrong};
use crate::base::{Error, Millis, Result};

/// Of one gateway.
const MOST: usize = 100;
const LONGEST_NAME: usize = 256;
/// When the evaluators came to be what they are: 2026-01-01.
const SINCE: Millis = Millis(1_767_225_600_000);

impl Evaluator {
    const ALL: [Self; 3] = [Self::Cost, Self::Speed, Self::Feedback];

    /// What callers name it by, for ever.
    const fn id(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Speed => "speed",
            Self::Feedback => "feedback",
        }
    }

    fn show(self) -> Value {
        let (name, description) = match self {
            Self::Cost => ("Cost", "What a request costs on average, in USD"),
            Self::Speed => ("Speed", "How long a request takes on average, in milliseconds"),
            Self::Feedback => ("Human feedback", "The share of thumbs up among the requests that have feedback"),
        };
        json!({
            "id": self.id(),
            "name": name,
            "type": self.id(),
            "description": description,
            "enable": true,
            "mandatory": false,
            "created_at": moment(SINCE),
            "modified_at": moment(SINCE),
        })
    }
}

impl Status {
    const fn code(self) -> u8 {
        match self {
            Self::Waiting => 0,
            Self::Done => 1,
            Self::Failed => 2,
        }
    }
}

/// Answers for `evaluation-types`.
pub(super) fn types(call: &Call, method: Method) -> Result<Answer> {
    if method != Method::Get {
        return Ok(Answer::NoMethod);
    }
    let mut types: Vec<Value> = Evaluator::ALL.into_iter().map(Evaluator::show).collect();
    if let Some(key) = call.asked("order_by") {
        if types.iter().any(|shown| shown.get(key).is_none()) {
            let remedy = "must be a field of evaluation types, such as name";
            return Err(wrong("order_by", &Value::from(key), remedy));
        }
        types.sort_by_key(|shown| shown[key].to_string());
    }
    match call.asked("order_by_direction") {
        None | Some("asc") => {}
        Some("desc") => types.reverse(),
        Some(other) => return Err(wrong("order_by_direction", &Value::from(other), "must be asc or desc")),
    }
    let mut page = call.page()?;
    Ok(Answer::Page(page.cut(types), page))
}

pub(super) async fn serve(mut call: Call<'_>, method: Method, gateway: &str, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call, gateway),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, gateway, fields).await
        }
        ([evaluation], Method::Get) => get(&call, gateway, evaluation),
        ([evaluation], Method::Delete) => delete(&call, gateway, evaluation).await,
        ([] | [_], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call, gateway: &str) -> Result<Answer> {
    let view = call.registry.view();
    let evaluations = view.book(call.account.as_str()).into_iter().flat_map(|book| book.evaluations(gateway));
    let evaluations = evaluations.filter(|evaluation| {
        call.finds(&[&evaluation.id.to_string(), &evaluation.name])
            && call.asked("name").is_none_or(|name| name == evaluation.name)
            && call.fits("processed", evaluation.processed)
    });
    let mut page = call.page()?;
    let shown = evaluations.map(|evaluation| show(call.account.as_str(), evaluation)).collect();
    Ok(Answer::Page(page.cut(shown), page))
}

fn get(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    let (view, wanted) = (call.registry.view(), id("evaluation", text)?);
    let mut evaluations = view.book(call.account.as_str()).into_iter().flat_map(|book| book.evaluations(gateway));
    let found = evaluations.find(|evaluation| evaluation.id == wanted).ok_or_else(|| not_found("evaluation", text))?;
    Ok(Answer::Result(show(call.account.as_str(), found)))
}

async fn create(call: &Call<'_>, gateway: &str, fields: Map<String, Value>) -> Result<Answer> {
    let name = text(&fields, "name", 1..=LONGEST_NAME)?.ok_or_else(|| missing("name"))?.to_owned();
    let wanted = ids(&fields, "dataset_ids", datasets::MOST)?;
    let evaluators = ids(&fields, "evaluation_type_ids", Evaluator::ALL.len())?;
    let evaluators: Vec<_> = evaluators.iter().map(|id| evaluator(id)).collect::<Result<_>>()?;
    let gateway = gateway.to_owned();
    let made = call.registry.change(call.account, move |book, bench| {
        if book.evaluations(&gateway).count() >= MOST {
            return Err(Error::bad_input(format!("a gateway has at most {MOST} evaluations: delete one first")));
        }
        let datasets = wanted.iter().map(|id| dataset(book, &gateway, id)).collect::<Result<_>>()?;
        let results = evaluators.iter().map(|evaluator| ResultRecord {
            id: Uuid::new_v4(),
            evaluator: *evaluator,
            status: Status::Waiting,
            description: "waits to be run".into(),
            result: String::new(),
            total_logs: 0,
        });
        let evaluation = EvaluationRecord {
            id: Uuid::new_v4(),
            gateway,
            name,
            datasets,
            results: results.collect(),
            total_logs: 0,
            processed: false,
            created: bench.now,
            modified: bench.now,
        };
        info!(account = bench.account, gateway = evaluation.gateway, evaluation = %evaluation.id, "evaluation made");
        let shown = show(bench.account, &evaluation);
        book.evaluations.push(evaluation);
        Ok(shown)
    });
    made.await.map(Answer::Result)
}

async fn delete(call: &Call<'_>, gateway: &str, text: &str) -> Result<Answer> {
    let (wanted, gateway, text) = (id("evaluation", text)?, gateway.to_owned(), text.to_owned());
    let gone = call.registry.change(call.account, move |book, bench| {
        let is_it = |evaluation: &EvaluationRecord| evaluation.id == wanted && evaluation.gateway == gateway;
        let at = book.evaluations.iter().position(is_it).ok_or_else(|| not_found("evaluation", &text))?;
        let evaluation = book.evaluations.remove(at);
        info!(account = bench.account, gateway, evaluation = %evaluation.id, "evaluation deleted");
        Ok(show(bench.account, &evaluation))
    });
    gone.await.map(Answer::Result)
}

/// The ids in a field, each once.
fn ids(fields: &Map<String, Value>, key: &str, most: usize) -> Result<Vec<String>> {
    let written = fields.get(key).filter(|ids| !ids.is_null()).ok_or_else(|| missing(key))?;
    let texts: Option<Vec<&str>> = written.as_array().and_then(|ids| ids.iter().map(Value::as_str).collect());
    let mut ids: Vec<String> = Vec::new();
    for id in texts.unwrap_or_default() {
        if !ids.iter().any(|other| other == id) {
            ids.push(id.to_owned());
        }
    }
    match ids.len() {
        count if (1..=most).contains(&count) => Ok(ids),
        _ => Err(Error::bad_field(key, format!("'{key}' must be a list of 1 to {most} ids"))),
    }
}

fn evaluator(id: &str) -> Result<Evaluator> {
    Evaluator::ALL.into_iter().find(|evaluator| evaluator.id() == id).ok_or_else(|| {
        let remedy = format!("must be some of {}", Evaluator::ALL.map(Evaluator::id).join(", "));
        wrong("evaluation_type_ids", &Value::from(id), remedy)
    })
}

fn dataset(book: &Book, gateway: &str, id: &str) -> Result<DatasetRecord> {
    let found = book.datasets(gateway).find(|dataset| dataset.id.to_string() == id);
    let Some(dataset) = found else {
        let remedy = "must be ids of this gateway's datasets";
        return Err(wrong("dataset_ids", &Value::from(id), remedy));
    };
    if !dataset.enable {
        let message = format!("dataset {id:?} is switched off: set its 'enable' to true first");
        return Err(Error::bad_field("dataset_ids", message));
    }
    Ok(dataset.clone())
}

fn show(account: &str, evaluation: &EvaluationRecord) -> Value {
    let (id, created, modified) = (evaluation.id.to_string(), moment(evaluation.created), moment(evaluation.modified));
    let datasets = evaluation.datasets.iter().map(|dataset| datasets::show(account, dataset));
    let results = evaluation.results.iter().map(|result| {
        json!({
            "id": result.id.to_string(),
            "result_id": result.id.to_string(),
            "evaluation_id": id,
            "evaluation_type_id": result.evaluator.id(),
            "status": result.status.code(),
            "status_description": result.description,
            "result": result.result,
            "total_logs": result.total_logs,
            "created_at": created,
            "modified_at": modified,
        })
    });
    json!({
        "id": id,
        "account_id": account,
        "account_tag": account,
        "gateway_id": evaluation.gateway,
        "name": evaluation.name,
        "processed": evaluation.processed,
        "total_logs": evaluation.total_logs,
        "datasets": datasets.collect::<Vec<_>>(),
        "results": results.collect::<Vec<_>>(),
        "created_at": created,
        "modified_at": modified,
    })
}
