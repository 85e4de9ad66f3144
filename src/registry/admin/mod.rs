//! The management API of gateways and what belongs to them, without HTTP: path and values in, status and value out.
//!
//!     gateways                                  list create
//!     gateways/{id}                             get put delete
//!     gateways/{id}/url[/{provider}]            get
//!     gateways/{id}/provider_configs[/{id}]     keys.rs
//!     gateways/{id}/routes[/{id}/…]             routes.rs
//!     gateways/{id}/datasets[/{id}]             datasets.rs
//!     gateways/{id}/evaluations[/{id}]          evaluations.rs
//!     evaluation-types                          evaluations.rs
//!     custom-providers[/{id}]                   providers.rs
//!
//! Answers have the usual envelope but for four of the routes. Reads come from the snapshot, changes go through the actor. Who may
//! call was asked before.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use super::actor::Registry;
use crate::base::{AccountId, Error, Kind, Millis, Result};

mod datasets;
mod evaluations;
pub(super) mod gateways;
pub(super) mod keys;
mod providers;
mod routes;

/// What is done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Makes.
    Post,
    /// Replaces.
    Put,
    /// Changes in part.
    Patch,
    /// Removes.
    Delete,
    /// Anything else, which no path knows.
    Other,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// HTTP's.
    pub status: u16,
    /// JSON.
    pub body: Value,
}

/// Entries on a page when nobody says.
const PER_PAGE: usize = 20;
const MOST_PER_PAGE: usize = 1000;

/// A call, taken apart.
struct Call<'a> {
    registry: &'a Registry,
    account: &'a AccountId,
    query: &'a [(String, String)],
    body: Option<Value>,
    public_base: &'a str,
}

/// What an answer is, before it has its envelope.
enum Answer {
    /// In `result`.
    Result(Value),
    /// A page of a list in `result`, with `result_info`.
    Page(Vec<Value>, Page),
    /// Without the envelope.
    Bare(Value),
    /// No such path.
    NoPath,
    /// The path is there, the method is not.
    NoMethod,
}

impl Registry {
    /// Answers a call of the management API. `path` is what follows `…/ai-gateway/`, decoded, without empty parts; `public_base` is how
    /// callers reach this server (`https://host`), for addresses in answers.
    pub async fn serve(
        &self,
        account: &AccountId,
        method: Method,
        path: &[&str],
        query: &[(String, String)],
        body: Option<Value>,
        public_base: &str,
    ) -> Reply {
        let call = Call { registry: self, account, query, body, public_base };
        let answer = match path {
            ["gateways", rest @ ..] => gateways::serve(call, method, rest).await,
            ["custom-providers", rest @ ..] => providers::serve(call, method, rest).await,
            ["evaluation-types"] => evaluations::types(&call, method),
            _ => Ok(Answer::NoPath),
        };
        match answer {
            Ok(Answer::Result(result)) => {
                ok(json!({ "success": true, "errors": [], "messages": [], "result": result }))
            }
            Ok(Answer::Page(list, page)) => {
                let info = page.info(list.len());
                ok(json!({ "success": true, "errors": [], "messages": [], "result": list, "result_info": info }))
            }
            Ok(Answer::Bare(body)) => ok(body),
            Ok(Answer::NoPath) => refused(404, 7000, "No route for that URI"),
            Ok(Answer::NoMethod) => {
                let name = format!("{method:?}").to_uppercase();
                refused(405, 7001, &format!("Method {name} not available for that URI."))
            }
            Err(error) => match error.kind() {
                Kind::BadInput | Kind::Unsupported => refused(400, 7001, error.message()),
                Kind::NotFound => refused(404, 7002, error.message()),
                _ => {
                    tracing::error!(%account, ?error, "the registry failed");
                    refused(500, 7000, "Internal error; the server's log says more")
                }
            },
        }
    }
}

fn ok(body: Value) -> Reply {
    Reply { status: 200, body }
}

fn refused(status: u16, code: u32, message: &str) -> Reply {
    let errors = json!([{ "code": code, "message": message }]);
    Reply { status, body: json!({ "success": false, "errors": errors, "result": null, "messages": [] }) }
}

impl Call<'_> {
    /// The body, which must be an object.
    fn fields(&mut self) -> Result<Map<String, Value>> {
        match self.body.take() {
            Some(Value::Object(fields)) => Ok(fields),
            _ => Err(Error::bad_input("The body must be a JSON object.")),
        }
    }

    fn asked(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Which page of a list is asked for.
    fn page(&self) -> Result<Page> {
        let number = |key, default, most| {
            let Some(text) = self.asked(key) else { return Ok(default) };
            let number = text.parse().ok().filter(|number| (1..=most).contains(number));
            number.ok_or_else(|| wrong(key, &Value::from(text), format_args!("must be from 1 to {most}")))
        };
        Ok(Page {
            page: number("page", 1, usize::MAX)?,
            per_page: number("per_page", PER_PAGE, MOST_PER_PAGE)?,
            total: 0,
        })
    }

    /// Whether one of these texts has what is searched for.
    fn finds(&self, texts: &[&str]) -> bool {
        let Some(wanted) = self.asked("search").map(str::to_lowercase) else { return true };
        texts.iter().any(|text| text.to_lowercase().contains(&wanted))
    }

    /// Whether a flag is as the query wants it.
    fn fits(&self, key: &str, flag: bool) -> bool {
        self.asked(key).and_then(|text| text.parse::<bool>().ok()).is_none_or(|wanted| wanted == flag)
    }
}

/// A page of a list.
struct Page {
    page: usize,
    per_page: usize,
    total: usize,
}

impl Page {
    /// The entries that are on it; none behind the last page, which is how clients find the end.
    fn cut<T>(&mut self, list: Vec<T>) -> Vec<T> {
        self.total = list.len();
        let skip = (self.page - 1).saturating_mul(self.per_page);
        list.into_iter().skip(skip).take(self.per_page).collect()
    }

    fn info(&self, count: usize) -> Value {
        json!({
            "page": self.page,
            "per_page": self.per_page,
            "count": count,
            "total_count": self.total,
            "total_pages": self.total.div_ceil(self.per_page),
        })
    }
}

/// What is wrong with a field.
fn wrong(key: &str, value: &Value, remedy: impl Display) -> Error {
    Error::bad_field(key, format!("'{key}' {remedy}, not {value}"))
}

fn missing(key: &str) -> Error {
    Error::bad_field(key, format!("'{key}' is required"))
}

fn not_found(what: &str, id: &str) -> Error {
    Error::new(Kind::NotFound, format!("{what} {id:?} is not there"))
}

/// The text of a field, if it is there and not null.
fn text<'a>(fields: &'a Map<String, Value>, key: &str, lengths: RangeInclusive<usize>) -> Result<Option<&'a str>> {
    let Some(value) = fields.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let text = value.as_str().filter(|text| lengths.contains(&text.chars().count()));
    let (least, most) = (lengths.start(), lengths.end());
    // What is too long to be right may be anything, so it is not shown.
    text.map(Some)
        .ok_or_else(|| Error::bad_field(key, format!("'{key}' must be a text of {least} to {most} characters")))
}

fn flag(fields: &Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(wrong(key, other, "must be true or false")),
    }
}

/// An id of ours; a text that is none names nothing.
fn id(what: &str, text: &str) -> Result<uuid::Uuid> {
    uuid::Uuid::try_parse(text).map_err(|_| not_found(what, text))
}

/// A moment as the wire writes it.
fn moment(at: Millis) -> String {
    let at = i64::try_from(at.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map(|at| format!("{at:.3}")).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests;
