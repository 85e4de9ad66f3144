//! Datasets: selections of a gateway's log records by filters, which are checked when they are written.

use serde_json::{Map, Value, json};
use tracing::info;
use uuid::Uuid;

use super::super::book::{Book, DatasetRecord, FilterRecord, compile};
use super::{Answer, Call, Method, flag, id, missing, moment, not_found, text, wrong};
use crate::base::{Error, Result};

/// Of one gateway.
pub(super) const MOST: usize = 10;
/// Bytes of a dataset's filters, as JSON: each evaluation keeps a copy of them.
const MOST_BYTES: usize = 8 << 10;
const LONGEST_NAME: usize = 256;
/// What the official clients know. They cannot read a list in which there is another one, so the log's own filters have more.
const KEYS: [&str; 13] = [
    "created_at",
    "request_content_type",
    "response_content_type",
    "success",
    "cached",
    "provider",
    "model",
    "cost",
    "tokens",
    "tokens_in",
    "tokens_out",
    "duration",
    "feedback",
];
const OPERATORS: [&str; 4] = ["eq", "contains", "lt", "gt"];

pub(super) async fn serve(mut call: Call<'_>, method: Method, gateway: &str, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call, gateway),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, gateway, fields).await
        }
        ([dataset], Method::Get) => get(&call, gateway, dataset),
        ([dataset], Method::Put) => {
            let fields = call.fields()?;
            update(&call, gateway, dataset, fields).await
        }
        ([dataset], Method::Delete) => delete(&call, gateway, dataset).await,
        ([] | [_], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call, gateway: &str) -> Result<Answer> {
    let view = call.registry.view();
    let datasets = view.book(call.account.as_str()).into_iter().flat_map(|book| book.datasets(gateway));
    let datasets = datasets.filter(|dataset| {
        let filters: Vec<Value> = dataset.filters.iter().map(FilterRecord::written).collect();
        call.finds(&[&dataset.id.to_string(), &dataset.name, &Value::from(filters).to_string()])
            && call.asked("name").is_none_or(|name| name == dataset.name)
            && call.fits("enable", dataset.enable)
    });
    let mut page = call.page()?;
    let shown = datasets.map(|dataset| show(call.account.as_str(), dataset)).collect();
    Ok(Answer::Page(page.cut(shown), page))
}

fn get(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    let (view, wanted) = (call.registry.view(), id("dataset", text)?);
    let mut datasets = view.book(call.account.as_str()).into_iter().flat_map(|book| book.datasets(gateway));
    let dataset = datasets.find(|dataset| dataset.id == wanted).ok_or_else(|| not_found("dataset", text))?;
    Ok(Answer::Result(show(call.account.as_str(), dataset)))
}

async fn create(call: &Call<'_>, gateway: &str, fields: Map<String, Value>) -> Result<Answer> {
    let (told, gateway) = (Told::read(&fields)?, gateway.to_owned());
    let made = call.registry.change(call.account, move |book, bench| {
        if book.datasets(&gateway).count() >= MOST {
            return Err(Error::bad_input(format!("a gateway has at most {MOST} datasets: delete one first")));
        }
        let Told { name, enable, filters } = told;
        let (id, now) = (Uuid::new_v4(), bench.now);
        let dataset = DatasetRecord { id, gateway, name, enable, filters, created: now, modified: now };
        info!(account = bench.account, gateway = dataset.gateway, dataset = %id, "dataset made");
        let shown = show(bench.account, &dataset);
        book.datasets.push(dataset);
        Ok(shown)
    });
    made.await.map(Answer::Result)
}

async fn update(call: &Call<'_>, gateway: &str, text: &str, fields: Map<String, Value>) -> Result<Answer> {
    let (at, told) = (place(gateway, text)?, Told::read(&fields)?);
    let changed = call.registry.change(call.account, move |book, bench| {
        let at = at(book)?;
        let dataset = &mut book.datasets[at];
        Told { name: dataset.name, enable: dataset.enable, filters: dataset.filters } = told;
        dataset.modified = bench.now;
        Ok(show(bench.account, dataset))
    });
    changed.await.map(Answer::Result)
}

async fn delete(call: &Call<'_>, gateway: &str, text: &str) -> Result<Answer> {
    let at = place(gateway, text)?;
    let gone = call.registry.change(call.account, move |book, bench| {
        let dataset = book.datasets.remove(at(book)?);
        info!(account = bench.account, gateway = dataset.gateway, dataset = %dataset.id, "dataset deleted");
        Ok(show(bench.account, &dataset))
    });
    gone.await.map(Answer::Result)
}

/// Finds the dataset that the path names.
fn place(gateway: &str, text: &str) -> Result<impl FnOnce(&Book) -> Result<usize> + Send + use<>> {
    let (wanted, gateway, text) = (id("dataset", text)?, gateway.to_owned(), text.to_owned());
    Ok(move |book: &Book| {
        let at = book.datasets.iter().position(|dataset| dataset.id == wanted && dataset.gateway == gateway);
        at.ok_or_else(|| not_found("dataset", &text))
    })
}

/// What is said of a dataset: all of it, each time.
struct Told {
    name: String,
    enable: bool,
    filters: Vec<FilterRecord>,
}

impl Told {
    fn read(fields: &Map<String, Value>) -> Result<Self> {
        Ok(Self {
            name: text(fields, "name", 1..=LONGEST_NAME)?.ok_or_else(|| missing("name"))?.to_owned(),
            enable: flag(fields, "enable")?.ok_or_else(|| missing("enable"))?,
            filters: filters(fields)?,
        })
    }
}

fn filters(fields: &Map<String, Value>) -> Result<Vec<FilterRecord>> {
    let written = fields.get("filters").filter(|filters| !filters.is_null()).ok_or_else(|| missing("filters"))?;
    let remedy = "must be a list of {key, operator, value}";
    let list = written.as_array().ok_or_else(|| Error::bad_field("filters", format!("'filters' {remedy}")))?;
    if written.to_string().len() > MOST_BYTES {
        return Err(Error::bad_field("filters", format!("'filters' must be at most {MOST_BYTES} bytes of JSON")));
    }
    let filters: Vec<_> = list.iter().enumerate().map(|(at, written)| filter(at, written)).collect::<Result<_>>()?;
    compile(&filters).map_err(|error| error.with_param("filters"))?;
    Ok(filters)
}

fn filter(at: usize, written: &Value) -> Result<FilterRecord> {
    let one_of = |part: &str, known: &[&str]| {
        let word = written[part].as_str().filter(|word| known.contains(word)).map(str::to_owned);
        let remedy = || format!("must be one of {}", known.join(", "));
        word.ok_or_else(|| wrong(&format!("filters.{at}.{part}"), &written[part], remedy()))
    };
    let values = || {
        let is_value = |value: &Value| value.is_string() || value.is_number() || value.is_boolean();
        written["value"].as_array().filter(|values| !values.is_empty() && values.iter().all(is_value)).cloned()
    };
    Ok(FilterRecord {
        key: one_of("key", &KEYS)?,
        operator: one_of("operator", &OPERATORS)?,
        value: values().ok_or_else(|| {
            let remedy = "must be a list of texts, numbers and booleans, with one at least";
            wrong(&format!("filters.{at}.value"), &written["value"], remedy)
        })?,
    })
}

pub(super) fn show(account: &str, dataset: &DatasetRecord) -> Value {
    json!({
        "id": dataset.id.to_string(),
        "account_id": account,
        "account_tag": account,
        "gateway_id": dataset.gateway,
        "name": dataset.name,
        "enable": dataset.enable,
        "filters": dataset.filters.iter().map(FilterRecord::written).collect::<Vec<_>>(),
        "created_at": moment(dataset.created),
        "modified_at": moment(dataset.modified),
    })
}
