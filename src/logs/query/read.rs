//! From text to [`Query`]: keys, operators and values, and the words for what is wrong with them.

use std::fmt::Display;
use std::ops::RangeInclusive;

use percent_encoding::percent_decode_str;
use serde_json::Value;

use super::{DEEPEST, Filter, MOST_PER_PAGE, Match, Number, Order, Query, Test, Text, first_id, is_id};
use crate::base::{Error, LogId, Millis, Result};

/// Filters of one query at most, and values of one filter.
const MOST_FILTERS: usize = 32;
const MOST_VALUES: usize = 200;
/// Bytes of a value or a search at most.
const LONGEST: usize = 1024;
/// USD of a micro-neuron: 1,000 neurons are 0.011 USD.
const USD: f64 = 0.011 / 1e9;
const KEYS: &str = "id, created_at, request_content_type, response_content_type, request_type, success, cached, provider, model, \
    model_type, cost, tokens, tokens_in, tokens_out, duration, feedback, event_id, metadata.key, metadata.value, \
    authentication, wholesale, compatibilityMode, dlp_action, user_agent, status_code";
const ORDERS: &str =
    "created_at, provider, model, model_type, success, cached, cost, tokens, tokens_in, tokens_out, duration, feedback";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operator {
    Eq,
    Neq,
    Contains,
    Lt,
    Gt,
}

/// A filter as it is written.
#[derive(Default)]
struct Written {
    key: String,
    operator: Option<String>,
    values: Vec<Value>,
}

/// What belongs to several filters of which all keys were named first, then all operators, then all values, as Cloudflare's SDK
/// for Python writes them.
#[derive(Default)]
struct Columns {
    operators: Vec<String>,
    values: Vec<Value>,
}

impl Columns {
    /// Gives each filter what is its own. Which values those are is not written, so there must be one way only in which all of
    /// them can be read: `cost` has no value `openai`.
    fn deal(self, written: &mut [Written]) -> Result<()> {
        let (filters, values) = (written.len(), self.values.len());
        if filters > MOST_FILTERS || values > MOST_VALUES {
            let most = format_args!("must be at most {MOST_VALUES}, of at most {MOST_FILTERS} filters");
            return Err(wrong("filters.value", most));
        }
        if self.operators.len() > filters || (1..filters).contains(&self.operators.len()) || values < filters {
            return Err(wrong("filters", "must have an operator and a value for each key"));
        }
        for (filter, operator) in written.iter_mut().zip(self.operators) {
            filter.operator = Some(operator);
        }
        let fits = |at: usize, value: &Value| {
            let Written { key, operator, .. } = &written[at];
            let alone = Written { key: key.clone(), operator: operator.clone(), values: vec![value.clone()] };
            compile(&alone).is_ok()
        };
        // ways[n][v]: how often, up to two, the first `n` filters can have the first `v` values; and how many the last one has then.
        let mut ways = vec![vec![(0u8, 0); values + 1]; filters + 1];
        ways[0][0] = (1, 0);
        for at in 0..filters {
            for end in at + 1..=values {
                for begin in (at..end).rev().take_while(|begin| fits(at, &self.values[*begin])) {
                    let (before, _) = ways[at][begin];
                    if before > 0 {
                        let (known, _) = ways[at + 1][end];
                        ways[at + 1][end] = ((known + before).min(2), end - begin);
                    }
                }
            }
        }
        let mut end = values;
        if values > filters && ways[filters][values].0 > 1 {
            let remedy = "could belong to several of the filters: send filters=[{key, operator, value}, …] as JSON, or each \
                          filters.key with its values behind it";
            return Err(wrong("filters.value", remedy));
        }
        let mut left = self.values;
        for at in (0..filters).rev() {
            // Where there is no way, each has one, and what is wrong is said of the filter that it is wrong with.
            let count = if ways[filters][values].0 == 0 { 1.max(end - at) } else { ways[at + 1][end].1 };
            end -= count;
            written[at].values = left.split_off(end);
        }
        Ok(())
    }
}

pub(super) fn query(raw: &str) -> Result<Query> {
    let mut query = Query::default();
    let mut written: Vec<Written> = Vec::new();
    let mut columns = None::<Columns>;
    for (name, value) in pairs(raw) {
        match name
            .strip_prefix("filters.")
            .or_else(|| name.strip_prefix("filters[]").map(|rest| rest.trim_start_matches('.')))
        {
            Some("key") => {
                if written.last().is_some_and(|before| before.operator.is_none() && before.values.is_empty()) {
                    columns.get_or_insert_default();
                }
                written.push(Written { key: value, ..Written::default() });
            }
            Some("operator") => match &mut columns {
                Some(columns) => columns.operators.push(value),
                None => last(&mut written, &name)?.operator = Some(value),
            },
            Some("value" | "value[]") => match &mut columns {
                Some(columns) => columns.values.push(Value::String(value)),
                None => last(&mut written, &name)?.values.push(Value::String(value)),
            },
            _ if name == "filters" => {
                let list = serde_json::from_str(&value)
                    .map_err(|error| wrong("filters", format_args!("must be a JSON array: {error}")))?;
                query.filters.extend(filters(&list)?);
            }
            _ => parameter(&mut query, &name, value)?,
        }
    }
    if let Some(columns) = columns {
        columns.deal(&mut written)?;
    }
    for filter in written {
        query.filters.push(compile(&filter)?);
    }
    if query.filters.len() > MOST_FILTERS {
        return Err(wrong("filters", format_args!("must be at most {MOST_FILTERS}")));
    }
    if query.skipped().saturating_add(query.per_page) > DEEPEST {
        let remedy = format_args!(
            "must not lead further than {DEEPEST} records into the list: narrow it with filters, such as created_at"
        );
        return Err(wrong("page", remedy));
    }
    Ok(query)
}

/// The filters of a data set: `[{"key", "operator", "value": […]}]`.
pub(super) fn filters(list: &Value) -> Result<Vec<Filter>> {
    let list = list.as_array().ok_or_else(|| wrong("filters", "must be an array of {key, operator, value}"))?;
    if list.len() > MOST_FILTERS {
        return Err(wrong("filters", format_args!("must be at most {MOST_FILTERS}")));
    }
    let read = |filter: &Value| {
        let text = |name| filter.get(name).and_then(Value::as_str).map(str::to_owned);
        let key = text("key").ok_or_else(|| wrong("filters.key", "must be given with each filter"))?;
        let values = match filter.get("value") {
            None => Vec::new(),
            Some(Value::Array(values)) => values.clone(),
            Some(value) => vec![value.clone()],
        };
        compile(&Written { key, operator: text("operator"), values })
    };
    let each = list.iter().enumerate();
    each.map(|(at, filter)| read(filter).map_err(|error| error.context(format_args!("filters.{at}")))).collect()
}

fn pairs(raw: &str) -> impl Iterator<Item = (String, String)> + '_ {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    raw.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty()).map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
}

/// The filter that an operator or a value belongs to.
fn last<'a>(written: &'a mut [Written], name: &str) -> Result<&'a mut Written> {
    written.last_mut().ok_or_else(|| wrong(name, "must follow the filters.key that it belongs to"))
}

fn parameter(query: &mut Query, name: &str, value: String) -> Result<()> {
    let whole = |most: u64| {
        let number = value.parse().ok().filter(|number| (1..=most).contains(number));
        number.ok_or_else(|| wrong(name, format_args!("must be a whole number from 1 to {most}, not {value:?}")))
    };
    match name {
        "page" => query.page = whole(u64::MAX)?,
        "per_page" => query.per_page = whole(MOST_PER_PAGE)?,
        "limit" => query.limit = Some(whole(DEEPEST)?),
        "meta_info" => query.meta_info = flag(name, &Value::String(value))?,
        "search" if value.len() > LONGEST => {
            return Err(wrong(name, format_args!("must have at most {LONGEST} bytes")));
        }
        "search" => query.search = (!value.is_empty()).then(|| value.into()),
        "order_by" => query.order = order(&value)?,
        "order_by_direction" | "direction" => {
            query.is_descending = match value.as_str() {
                "asc" => false,
                "desc" => true,
                _ => return Err(wrong(name, format_args!("must be asc or desc, not {value:?}"))),
            }
        }
        _ => query.filters.extend(deprecated(name, value)?),
    }
    Ok(())
}

fn order(name: &str) -> Result<Order> {
    match name {
        "feedback" => return Ok(Order::Feedback),
        "tokens" => return Ok(Order::Number(Number::Tokens)),
        _ => {}
    }
    if let Some(number) = number_of(name).filter(|_| name != "status_code" && name != "authentication") {
        return Ok(Order::Number(number));
    }
    match text_of(name) {
        Some(text @ (Text::Provider | Text::Model | Text::ModelType)) => Ok(Order::Text(text)),
        _ => Err(wrong("order_by", format_args!("must be one of {ORDERS}, not {name:?}"))),
    }
}

/// The forms that clients had before there were filters. What is no parameter of ours is none of a filter either.
fn deprecated(name: &str, value: String) -> Result<Option<Filter>> {
    let value = Value::String(value);
    let interval = |number, low, high| Some(Filter { test: Test::Number(number, vec![low..=high]), is_negated: false });
    let bound = |rest: &str| match rest {
        "total_tokens" => Some(Number::Tokens),
        "cost" | "duration" | "tokens_in" | "tokens_out" => number_of(rest),
        _ => None,
    };
    Ok(match name {
        "start_date" => interval(Number::At, moment(name, &value)?, u64::MAX),
        "end_date" => interval(Number::At, 0, moment(name, &value)?),
        "cached"
        | "success"
        | "feedback"
        | "model"
        | "model_type"
        | "provider"
        | "request_content_type"
        | "response_content_type" => {
            Some(compile(&Written { key: name.to_owned(), operator: None, values: vec![value] })?)
        }
        _ => match (name.strip_prefix("min_").and_then(bound), name.strip_prefix("max_").and_then(bound)) {
            (Some(number), _) => interval(number, at_least(scaled(name, number, &value)?), u64::MAX),
            (_, Some(number)) => interval(number, 0, at_most(scaled(name, number, &value)?)),
            _ => None,
        },
    })
}

fn compile(filter: &Written) -> Result<Filter> {
    let key = filter.key.as_str();
    let operator = match filter.operator.as_deref() {
        None | Some("eq") => Operator::Eq,
        Some("neq") => Operator::Neq,
        Some("contains") => Operator::Contains,
        Some("lt") => Operator::Lt,
        Some("gt") => Operator::Gt,
        Some(other) => {
            return Err(wrong("filters.operator", format_args!("must be eq, neq, contains, lt or gt, not {other:?}")));
        }
    };
    if filter.values.is_empty() || filter.values.len() > MOST_VALUES {
        return Err(wrong("filters.value", format_args!("of {key:?} must be given 1 to {MOST_VALUES} times")));
    }
    let mut is_negated = operator == Operator::Neq;
    let texts = || filter.values.iter().map(|value| text_match(operator, value)).collect::<Result<Vec<_>>>();
    let test = match key {
        "id" if operator == Operator::Contains => Test::IdPart(all(filter, digits)?),
        "id" => Test::Id(all(filter, |value| id(operator, value))?),
        "metadata.key" => Test::MetadataKey(texts()?),
        "metadata.value" => Test::MetadataValue(texts()?),
        "feedback" => Test::Feedback(all(filter, |value| feedback(operator, value))?),
        // Nothing is sold through us.
        "wholesale" => Test::Always(all(filter, |value| flag("filters.value", value))?.contains(&false)),
        "compatibilityMode" => {
            let flags = all(filter, |value| flag("filters.value", value))?;
            match (flags.contains(&true), flags.contains(&false)) {
                (true, true) => Test::Always(true),
                (is_wanted, _) => {
                    is_negated ^= !is_wanted;
                    Test::Text(Text::RequestType, vec![Match::Is("compat".into())])
                }
            }
        }
        _ => match (number_of(key), text_of(key)) {
            (Some(number), _) => Test::Number(number, all(filter, |value| interval(number, key, operator, value))?),
            (_, Some(text)) => Test::Text(text, texts()?),
            _ => return Err(wrong("filters.key", format_args!("must be one of {KEYS}, not {key:?}"))),
        },
    };
    Ok(Filter { test, is_negated })
}

fn all<T>(filter: &Written, read: impl Fn(&Value) -> Result<T>) -> Result<Vec<T>> {
    filter.values.iter().map(read).collect()
}

fn number_of(key: &str) -> Option<Number> {
    Some(match key {
        "created_at" => Number::At,
        "status_code" => Number::Status,
        "success" => Number::Success,
        "cached" => Number::Cached,
        "cost" => Number::Cost,
        "tokens" => Number::Tokens,
        "tokens_in" => Number::TokensIn,
        "tokens_out" => Number::TokensOut,
        "duration" => Number::Duration,
        "authentication" => Number::Authenticated,
        _ => return None,
    })
}

fn text_of(key: &str) -> Option<Text> {
    Some(match key {
        "provider" => Text::Provider,
        "model" => Text::Model,
        "model_type" => Text::ModelType,
        "request_type" => Text::RequestType,
        "request_content_type" => Text::RequestContentType,
        "response_content_type" => Text::ResponseContentType,
        "event_id" => Text::Event,
        "user_agent" => Text::UserAgent,
        "dlp_action" => Text::DlpAction,
        _ => return None,
    })
}

/// A value as text, however it was written.
fn text(value: &Value) -> Result<Box<str>> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        _ => return Err(wrong("filters.value", format_args!("must be a text, a number or a boolean, not {value}"))),
    };
    if text.len() > LONGEST {
        return Err(wrong("filters.value", format_args!("must have at most {LONGEST} bytes")));
    }
    Ok(text.into())
}

fn text_match(operator: Operator, value: &Value) -> Result<Match> {
    let text = text(value)?;
    Ok(match operator {
        Operator::Eq | Operator::Neq => Match::Is(text),
        Operator::Contains => Match::Contains(text),
        Operator::Lt => Match::Below(text),
        Operator::Gt => Match::Above(text),
    })
}

fn interval(number: Number, key: &str, operator: Operator, value: &Value) -> Result<RangeInclusive<u64>> {
    if operator == Operator::Contains {
        return Err(wrong(
            "filters.operator",
            format_args!("contains is for texts: ask {key:?} with eq, neq, lt or gt"),
        ));
    }
    let value = match number {
        Number::At => moment("filters.value", value)? as f64,
        Number::Success | Number::Cached | Number::Authenticated => f64::from(u8::from(flag("filters.value", value)?)),
        _ => scaled("filters.value", number, value)?,
    };
    Ok(between(operator, value))
}

/// What lies on the wanted side of a value; an empty interval where nothing does.
#[allow(clippy::reversed_empty_ranges)]
fn between(operator: Operator, value: f64) -> RangeInclusive<u64> {
    match operator {
        // Less than zero and more than anything are no numbers of ours.
        Operator::Lt if value <= 0.0 => 1..=0,
        Operator::Lt => 0..=(value.ceil() as u64).saturating_sub(1),
        Operator::Gt if value < 0.0 => 0..=u64::MAX,
        Operator::Gt => (value.floor() as u64).saturating_add(1)..=u64::MAX,
        _ if value < 0.0 || value.fract() != 0.0 => 1..=0,
        _ => value as u64..=value as u64,
    }
}

fn at_least(value: f64) -> u64 {
    value.ceil() as u64
}

fn at_most(value: f64) -> u64 {
    value.floor() as u64
}

/// A number in the unit of its column.
fn scaled(name: &str, number: Number, value: &Value) -> Result<f64> {
    let written = match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    let written: f64 = written
        .filter(|value: &f64| value.is_finite())
        .ok_or_else(|| wrong(name, format_args!("must be a number, not {value}")))?;
    Ok(match number {
        // What is a whole number of our units but for the last bits of a float is one.
        Number::Cost => snapped(written / USD),
        Number::Duration => snapped(written * 1000.0),
        _ => written,
    })
}

fn snapped(value: f64) -> f64 {
    let whole = value.round();
    if (value - whole).abs() <= whole.abs() * 1e-12 + 1e-9 { whole } else { value }
}

fn feedback(operator: Operator, value: &Value) -> Result<RangeInclusive<u64>> {
    if operator == Operator::Contains {
        return Err(wrong("filters.operator", "contains is for texts: ask \"feedback\" with eq, neq, lt or gt"));
    }
    let text = text(value)?;
    let value: i8 = text
        .parse()
        .ok()
        .filter(|value| (-1..=1).contains(value))
        .ok_or_else(|| wrong("filters.value", format_args!("of \"feedback\" must be -1, 0 or 1, not {text:?}")))?;
    Ok(between(operator, f64::from(value) + 1.0))
}

fn flag(name: &str, value: &Value) -> Result<bool> {
    match value {
        Value::Bool(flag) => Ok(*flag),
        Value::String(text) if text == "true" || text == "1" => Ok(true),
        Value::String(text) if text == "false" || text == "0" => Ok(false),
        other => Err(wrong(name, format_args!("must be true or false, not {other}"))),
    }
}

fn moment(name: &str, value: &Value) -> Result<u64> {
    let at = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => read_moment(text),
        _ => None,
    };
    at.ok_or_else(|| {
        wrong(
            name,
            format_args!("must be a time such as 2026-01-31T12:00:00Z, a day, or milliseconds since 1970, not {value}"),
        )
    })
}

fn read_moment(text: &str) -> Option<u64> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let at = text.parse::<jiff::Timestamp>().ok().or_else(|| {
        let day = text.parse::<jiff::civil::Date>().ok()?;
        day.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|day| day.timestamp())
    })?;
    u64::try_from(at.as_millisecond()).ok()
}

/// An id, or where comparing asks for one, a moment.
fn id(operator: Operator, value: &Value) -> Result<RangeInclusive<u128>> {
    let text = text(value)?;
    let id = LogId::parse(&text);
    let number = id.map(LogId::number).or_else(|| read_moment(&text).map(|at| first_id(Millis(at))));
    match (operator, id, number) {
        (Operator::Eq | Operator::Neq, Some(id), _) => Ok(is_id(id)),
        (Operator::Lt, _, Some(number)) if number > 0 => Ok(0..=number - 1),
        (Operator::Gt, _, Some(number)) if number < u128::MAX => Ok(number + 1..=u128::MAX),
        _ => Err(wrong("filters.value", format_args!("of \"id\" must be the 26 characters of a log id, not {text:?}"))),
    }
}

/// A part of an id: Crockford's base 32.
fn digits(value: &Value) -> Result<(u128, u32)> {
    let text = text(value)?;
    part_of_id(&text).ok_or_else(|| {
        wrong("filters.value", format_args!("of \"id\" must be some of the 26 characters of a log id, not {text:?}"))
    })
}

/// The number that these digits of an id are, and how many they are.
pub(in crate::logs) fn part_of_id(text: &str) -> Option<(u128, u32)> {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    // Twenty-five digits are 125 bits; the whole of an id is asked for as one.
    if text.is_empty() || text.len() > 25 {
        return LogId::parse(text).map(|id| (id.number(), 26));
    }
    let digit = |letter: u8| DIGITS.iter().position(|digit| *digit == letter.to_ascii_uppercase());
    let number = text.bytes().try_fold(0u128, |number, letter| Some((number << 5) | digit(letter)? as u128))?;
    Some((number, text.len() as u32))
}

fn wrong(name: &str, remedy: impl Display) -> Error {
    Error::bad_field(name, format!("'{name}' {remedy}"))
}
