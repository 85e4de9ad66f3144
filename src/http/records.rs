//! What is told of calls, over HTTP: log records, sums, usage, alerts. Reading blocks, so it happens on blocking threads.
//!
//! ```text
//!   …/ai-gateway/gateways/{gateway}/logs                    GET list, DELETE by filter
//!   …/ai-gateway/gateways/{gateway}/logs/{id}               GET, PATCH {feedback, score, metadata}
//!   …/ai-gateway/gateways/{gateway}/logs/{id}/request       GET, as it was kept; and /response
//!   …/ai-gateway/analytics                                  GET
//!   …/ai-gateway/usage                                      GET: the ledger's rows by day, and what is left of today
//!   …/ai-gateway/alerts                                     GET, and POST {rule, for_s} to silence, DELETE {rule}
//! ```

use std::time::Duration;

use actix_web::http::Method;
use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpResponse, web};
use serde_json::{Map, Value, json};

use crate::base::{AccountId, Error, KeyId, Kind, LogId, Millis, ModelId, Result, UtcDay};
use crate::gateway::limits;
use crate::http::Services;
use crate::ledger::{Filter, Row, Who};
use crate::logs::{self, Body, Logs, Patch, Query, Store};

/// Rows of the ledger that are told at once.
const MOST_ROWS: usize = 100_000;
/// Days of usage that are told when nobody says.
const DAYS: u32 = 30;
/// Largest metadata that a record may be given.
const MAX_METADATA: usize = 10_000;
/// How long an alert is silenced when nobody says.
const SILENCE_S: u64 = 3600;

/// Answers a path that is about records; `None`: it is not.
pub(super) async fn serve(
    services: &Services,
    account: &AccountId,
    method: &Method,
    path: &[&str],
    query: &str,
    body: Option<&Value>,
) -> Option<Result<HttpResponse>> {
    let answer = match path {
        ["gateways", gateway, "logs", rest @ ..] => {
            logs_of(services, account, gateway, method, rest, query, body).await
        }
        ["analytics"] => analytics(services, account, method, query).await,
        ["usage"] => usage(services, account, method, query).await,
        ["alerts"] => alerts(services, method, body).await,
        _ => return None,
    };
    Some(answer)
}

async fn logs_of(
    services: &Services,
    account: &AccountId,
    gateway: &str,
    method: &Method,
    rest: &[&str],
    query: &str,
    body: Option<&Value>,
) -> Result<HttpResponse> {
    let logs = &services.relays.logs;
    if services.relays.registry.view().gateway(account.as_str(), gateway).is_none() {
        return Err(Error::new(Kind::NotFound, format!("There is no gateway `{gateway}` in this account.")));
    }
    let store = kept(logs)?.clone();
    let (account, gateway) = (account.clone(), gateway.to_owned());
    // Whoever looks for a call that has just ended finds it.
    logs.flush().await;
    match (method.as_str(), rest) {
        ("GET" | "HEAD", []) => {
            let query = Query::parse(query)?;
            let (query, page) = blocking(move || {
                let page = store.list(&account, &gateway, &query)?;
                Ok((query, page))
            })
            .await?;
            let list: Vec<Value> = page.records.iter().map(logs::item).collect();
            Ok(enveloped(&json!({ "result": list, "result_info": logs::result_info(&query, &page) })))
        }
        ("DELETE", []) => {
            let query = Query::parse(query)?;
            let deleted = blocking(move || store.delete(&account, &gateway, &query)).await?;
            Ok(enveloped(&json!({ "result": { "deleted": deleted } })))
        }
        ("GET" | "HEAD", [id]) => {
            let id = id_of(id)?;
            let found = blocking(move || store.get(&account, &gateway, id)).await?.ok_or_else(|| unknown(id))?;
            Ok(enveloped(&json!({ "result": logs::detail(&found) })))
        }
        ("PATCH", [id]) => {
            let (id, patch) = (id_of(id)?, patch(body)?);
            let found = blocking(move || {
                if !store.patch(&account, &gateway, id, &patch)? {
                    return Ok(None);
                }
                store.get(&account, &gateway, id)
            });
            let found = found.await?.ok_or_else(|| unknown(id))?;
            Ok(enveloped(&json!({ "result": logs::detail(&found) })))
        }
        ("GET" | "HEAD", [id, side @ ("request" | "response")]) => {
            let (id, is_request) = (id_of(id)?, *side == "request");
            let read = move |store: Store| match is_request {
                true => store.request(&account, &gateway, id),
                false => store.response(&account, &gateway, id),
            };
            let (body, kind) = blocking(move || read(store)).await?.ok_or_else(|| unknown(id))?;
            Ok(raw(body, kind.as_deref()))
        }
        _ => Err(wrong(method, rest.len() < 3)),
    }
}

/// The records that are kept.
///
/// # Errors
/// `NotFound` with what the server's operator has to do.
pub(super) fn kept(logs: &Logs) -> Result<&Store> {
    logs.store().ok_or_else(|| {
        let message = "This server keeps no log records: `logs.keep` is off, or it has no folder for them.";
        Error::new(Kind::NotFound, message)
    })
}

/// A body as it was kept.
fn raw(body: Body, kind: Option<&str>) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    response.insert_header((CONTENT_TYPE, kind.unwrap_or("application/octet-stream")));
    // Nobody's browser is to run what somebody else has sent.
    response.insert_header(("x-content-type-options", "nosniff"));
    response.insert_header(("content-disposition", "attachment"));
    if !body.is_complete() {
        response.insert_header(("x-neurond-truncated", body.size.to_string()));
    }
    response.body(body.kept)
}

fn patch(body: Option<&Value>) -> Result<Patch> {
    let Some(Value::Object(fields)) = body else { return Err(Error::bad_input("The body must be a JSON object.")) };
    let mut patch = Patch::default();
    for (name, value) in fields {
        match name.as_str() {
            "feedback" => {
                let feedback = value.as_i64().and_then(|value| i8::try_from(value).ok());
                match (value, feedback) {
                    (Value::Null, _) => patch.feedback = Some(None),
                    (_, Some(feedback @ -1..=1)) => patch.feedback = Some(Some(feedback)),
                    _ => return Err(Error::bad_field("feedback", "'feedback' must be -1, 0, 1 or null")),
                }
            }
            "score" => {
                let score = value.as_f64().filter(|score| (0.0..=100.0).contains(score));
                match (value, score) {
                    (Value::Null, _) => patch.score = Some(None),
                    (_, Some(score)) => patch.score = Some(Some(score.round() as u8)),
                    _ => return Err(Error::bad_field("score", "'score' must be from 0 to 100, or null")),
                }
            }
            "metadata" => match value {
                Value::Null => patch.metadata = Some(None),
                Value::Object(_) if value.to_string().len() <= MAX_METADATA => {
                    patch.metadata = Some(Some(value.to_string().into()));
                }
                _ => {
                    let message = format!("'metadata' must be an object of at most {MAX_METADATA} bytes, or null");
                    return Err(Error::bad_field("metadata", message));
                }
            },
            _ => {
                return Err(Error::bad_field(
                    name,
                    format!("'{name}' cannot be changed: feedback, score and metadata can"),
                ));
            }
        }
    }
    Ok(patch)
}

async fn analytics(services: &Services, account: &AccountId, method: &Method, query: &str) -> Result<HttpResponse> {
    if *method != Method::GET {
        return Err(wrong(method, true));
    }
    let logs = &services.relays.logs;
    logs.flush().await;
    let (analytics, account, query) = (logs.analytics().clone(), account.clone(), query.to_owned());
    let answer = blocking(move || analytics.query(Some(&account), &query, Millis::now())).await?;
    Ok(enveloped(&json!({ "result": answer })))
}

/// What the ledger says: rows by day, and how today stands.
async fn usage(services: &Services, account: &AccountId, method: &Method, query: &str) -> Result<HttpResponse> {
    if *method != Method::GET {
        return Err(wrong(method, true));
    }
    let now = Millis::now();
    let pairs = web::Query::<Vec<(String, String)>>::from_query(query)
        .map_err(|_| Error::bad_input("the query string does not parse"))?;
    let mut filter = Filter::days(UtcDay(now.day().0.saturating_sub(DAYS)), now.day());
    (filter.account, filter.most) = (Some(account.clone()), MOST_ROWS);
    for (name, value) in pairs.iter() {
        match name.as_str() {
            "from" => filter.from = day(name, value)?,
            "to" => filter.to = day(name, value)?,
            "key" => filter.key = Some(KeyId::new(value)),
            "gateway" => filter.gateway = Some(value.as_str().into()),
            "provider" => filter.provider = Some(value.as_str().into()),
            "model" => filter.model = Some(ModelId::new(value)),
            _ => {
                let message = format!("'{name}' is no parameter: from, to, key, gateway, provider and model are");
                return Err(Error::bad_field(name, message));
            }
        }
    }
    let ledger = &services.relays.ledger;
    let rows = ledger.rows(filter).await?;
    let totals = ledger.totals(account, now)?;
    let config = services.config.get();
    let plan = config.accounts.iter().find(|one| one.id == *account).and_then(|one| one.plan);
    let plan = plan.unwrap_or(config.metering.plan);
    let left = ledger.left(account, limits::plan(&plan), now)?;
    let rows: Vec<Value> = rows.iter().map(|(day, who, row)| usage_row(*day, who, row)).collect();
    Ok(enveloped(&json!({
        "result": {
            "account": account,
            "today": {
                "neurons": totals.today.as_f64(),
                "billed_neurons": totals.billed.as_f64(),
                "reserved_neurons": totals.reserved.as_f64(),
                "allocation": plan.allocation.as_f64(),
                "left": left.as_f64(),
                "plan": plan.to_string(),
                "resets_at": logs::moment(now.day().end()),
            },
            "total_neurons": totals.total.as_f64(),
            "rows": rows,
        }
    })))
}

fn usage_row(day: UtcDay, who: &Who, row: &Row) -> Value {
    let begin = Millis(day.end().0 - 86_400_000);
    let date = logs::moment(begin);
    json!({
        "date": &date[..10],
        "key": who.key,
        "gateway": &*who.gateway,
        "provider": &*who.provider,
        "model": who.model,
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "neurons": row.neurons.as_f64(),
        "billed_neurons": row.billed.as_f64(),
        "cost_usd": row.cost.rounded_usd(),
    })
}

fn day(name: &str, value: &str) -> Result<UtcDay> {
    let date: Option<jiff::civil::Date> = value.parse().ok();
    let moment = date.and_then(|date| date.to_zoned(jiff::tz::TimeZone::UTC).ok()).map(|zoned| zoned.timestamp());
    let millis = moment.and_then(|moment| u64::try_from(moment.as_millisecond()).ok());
    let wrong = || Error::bad_field(name, format!("'{name}' must be a date such as 2026-05-31"));
    millis.map(|millis| Millis(millis).day()).ok_or_else(wrong)
}

async fn alerts(services: &Services, method: &Method, body: Option<&Value>) -> Result<HttpResponse> {
    let Some(alerts) = &services.alerts else {
        return Err(Error::new(Kind::NotFound, "This server watches nothing: write [[alert]] and [[channel]]."));
    };
    let empty = Map::new();
    let fields = body.and_then(Value::as_object).unwrap_or(&empty);
    let rule = || {
        let rule = fields.get("rule").and_then(Value::as_str);
        rule.ok_or_else(|| Error::bad_field("rule", "'rule' is required: the name of the rule"))
    };
    match method.as_str() {
        "GET" | "HEAD" => {}
        "POST" => match fields.get("channel").and_then(Value::as_str) {
            Some(channel) => alerts.try_channel(channel).await?,
            None => {
                let seconds = fields.get("for_s").and_then(Value::as_u64).unwrap_or(SILENCE_S);
                let until = Millis(Millis::now().0.saturating_add(Duration::from_secs(seconds).as_millis() as u64));
                alerts.silence(rule()?, until).await?;
            }
        },
        "DELETE" => alerts.unsilence(rule()?).await?,
        _ => return Err(wrong(method, true)),
    }
    let status = alerts.status().await?;
    Ok(enveloped(&json!({ "result": status })))
}

fn id_of(text: &str) -> Result<LogId> {
    LogId::parse(text).ok_or_else(|| Error::new(Kind::NotFound, "A log record's id has 26 letters and digits."))
}

fn unknown(id: LogId) -> Error {
    Error::new(Kind::NotFound, format!("There is no log record {id}: it was deleted, or never kept."))
}

fn wrong(method: &Method, is_path: bool) -> Error {
    match is_path {
        true => Error::new(Kind::MethodNotAllowed, format!("Method {method} not available for that URI.")),
        false => Error::new(Kind::NotFound, "No route for that URI"),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    web::block(work).await.map_err(|error| Error::internal("a record was not read").with_source(error))?
}

/// The usual envelope around an answer.
fn enveloped(answer: &Value) -> HttpResponse {
    let mut body = json!({ "success": true, "errors": [], "messages": [] });
    if let (Some(body), Some(answer)) = (body.as_object_mut(), answer.as_object()) {
        body.extend(answer.clone());
    }
    HttpResponse::Ok().content_type("application/json").body(body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Neurons;

    #[test]
    fn a_row_of_usage_tells_dollars_as_they_were_said() {
        let (account, model) = (AccountId::new("acme"), ModelId::new("m"));
        let who = Who { account, key: None, gateway: "default".into(), provider: "openai".into(), model };
        let row = Row { requests: 1, cost: Neurons::from_usd(0.25), ..Row::default() };
        let told = usage_row(Millis(1_777_593_600_000).day(), &who, &row);
        assert_eq!((&told["date"], &told["cost_usd"]), (&json!("2026-05-01"), &json!(0.25)));
    }
}
