//! Conditions of a route, in the language of MongoDB's queries, over what is known of a call.
//!
//!     {"metadata.plan": {"$in": ["paid", "trial"]}, "$or": [{"headers.x-team": "a"}, {"body.max_tokens": {"$gt": 1000}}]}
//!
//! Paths begin with `metadata.`, `headers.` or `body.`, or are `model`; further names and numbers lead into objects and arrays. As in MongoDB
//! a field that is missing equals null, an array has a property if one of its items has, and values of different types are neither
//! less nor greater. Headers are text: beside a number they are read as one. Compiled once, so that a wrong condition never meets a call.

use std::cmp::Ordering;

use regex::{Regex, RegexBuilder};
use serde_json::{Number, Value};

use crate::base::Millis;

/// Levels of `$and`, `$or`, `$nor` and `$not` at most.
const MAX_DEPTH: usize = 16;
/// Tests of one condition at most.
const MAX_TESTS: usize = 256;
/// Bytes of a compiled pattern at most.
const MAX_COMPILED: usize = 1 << 20;

/// What is known of a call.
pub struct Facts<'f> {
    /// The request's body.
    pub body: &'f Value,
    /// Its headers, names in any case.
    pub headers: &'f [(&'f str, &'f str)],
    /// The entries of `cf-aig-metadata`: an object, or null.
    pub metadata: &'f Value,
    /// The model as asked for.
    pub model: &'f str,
    /// What keeps percentages the same from call to call: a hash of the session, user or metadata, or a random number.
    pub key: u64,
    /// When this step is taken; it is noted beside it.
    pub now: Millis,
}

#[derive(Debug)]
pub(super) enum Condition {
    All(Vec<Condition>),
    Any(Vec<Condition>),
    Not(Box<Condition>),
    Test(FactPath, Test),
}

#[derive(Debug)]
pub(super) enum Test {
    Equal(Value),
    /// Compares as one of two orderings.
    Compare(Ordering, bool, Value),
    In(Vec<Value>),
    Exists(bool),
    Matches(Regex),
    Contains(Value),
}

/// The name of something known of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct FactPath {
    written: Box<str>,
    root: Root,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Root {
    Metadata,
    Headers,
    Body,
    Model,
}

/// A value at the end of a path.
#[derive(Clone, Copy)]
enum Fact<'f> {
    Missing,
    Json(&'f Value),
    /// Text that may stand for a number or a truth value.
    Text(&'f str),
}

impl FactPath {
    pub(super) fn parse(written: &str) -> Result<Self, String> {
        let roots = [("metadata.", Root::Metadata), ("headers.", Root::Headers), ("body.", Root::Body)];
        let root = match roots.iter().find(|(prefix, _)| written.len() > prefix.len() && written.starts_with(prefix)) {
            Some((_, root)) => *root,
            None if written == "model" => Root::Model,
            None => {
                return Err(format!("{written:?} is none of \"metadata.…\", \"headers.…\", \"body.…\" and \"model\"."));
            }
        };
        Ok(Self { written: written.into(), root })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.written
    }

    /// The value as the key of a counter; empty if there is none.
    pub(super) fn key(&self, facts: &Facts) -> String {
        match self.find(facts) {
            Fact::Missing | Fact::Json(Value::Null) => String::new(),
            Fact::Text(text) => text.to_owned(),
            Fact::Json(Value::String(text)) => text.clone(),
            Fact::Json(value) => value.to_string(),
        }
    }

    fn find<'f>(&self, facts: &Facts<'f>) -> Fact<'f> {
        let rest = self.written.split_once('.').map_or("", |(_, rest)| rest);
        match self.root {
            Root::Model => Fact::Text(facts.model),
            Root::Headers => {
                let header = facts.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(rest));
                header.map_or(Fact::Missing, |(_, value)| Fact::Text(value))
            }
            Root::Metadata => descend(facts.metadata, rest),
            Root::Body => descend(facts.body, rest),
        }
    }
}

/// Follows a path; a name with dots in it is tried as a whole first.
fn descend<'f>(value: &'f Value, path: &str) -> Fact<'f> {
    let here = match value {
        Value::Object(fields) => fields.get(path),
        Value::Array(items) => path.parse::<usize>().ok().and_then(|index| items.get(index)),
        _ => None,
    };
    if let Some(value) = here {
        return Fact::Json(value);
    }
    let Some((first, rest)) = path.split_once('.') else { return Fact::Missing };
    match descend(value, first) {
        Fact::Json(value) => descend(value, rest),
        _ => Fact::Missing,
    }
}

impl Condition {
    pub(super) fn parse(written: &Value) -> Result<Self, String> {
        let mut tests = 0;
        let condition = parse(written, 0, &mut tests)?;
        if tests == 0 {
            return Err("its conditions are empty.".to_owned());
        }
        Ok(condition)
    }

    pub(super) fn holds(&self, facts: &Facts) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|part| part.holds(facts)),
            Self::Any(parts) => parts.iter().any(|part| part.holds(facts)),
            Self::Not(part) => !part.holds(facts),
            Self::Test(path, test) => test.holds(path.find(facts)),
        }
    }
}

/// An object of paths and combinations, all of which must hold; or an array of such.
fn parse(written: &Value, depth: usize, tests: &mut usize) -> Result<Condition, String> {
    if depth > MAX_DEPTH {
        return Err(format!("its conditions are nested deeper than {MAX_DEPTH} levels."));
    }
    let fields = match written {
        Value::Object(fields) => fields,
        Value::Array(_) => return Ok(Condition::All(parse_list(written, "conditions", depth, tests)?)),
        _ => return Err("a condition is an object such as {\"metadata.plan\": {\"$eq\": \"paid\"}}.".to_owned()),
    };
    let mut parts = Vec::with_capacity(fields.len());
    for (name, value) in fields {
        parts.push(match name.as_str() {
            "$and" => Condition::All(parse_list(value, name, depth, tests)?),
            "$or" => Condition::Any(parse_list(value, name, depth, tests)?),
            "$nor" => Condition::Not(Box::new(Condition::Any(parse_list(value, name, depth, tests)?))),
            "$not" => Condition::Not(Box::new(parse(value, depth + 1, tests)?)),
            operator if operator.starts_with('$') => {
                return Err(format!("{operator:?} must stand behind a path, or is no operator."));
            }
            path => parse_tests(&FactPath::parse(path)?, value, depth, tests)?,
        });
    }
    Ok(one_or_all(parts))
}

fn parse_list(value: &Value, name: &str, depth: usize, tests: &mut usize) -> Result<Vec<Condition>, String> {
    let Some(items) = value.as_array().filter(|items| !items.is_empty()) else {
        return Err(format!("{name:?} needs an array of conditions."));
    };
    items.iter().map(|item| parse(item, depth + 1, tests)).collect()
}

/// A plain value, or an object of operators, all of which must hold.
fn parse_tests(path: &FactPath, written: &Value, depth: usize, tests: &mut usize) -> Result<Condition, String> {
    *tests += 1;
    if *tests > MAX_TESTS {
        return Err(format!("it has more than {MAX_TESTS} conditions."));
    }
    if depth > MAX_DEPTH {
        return Err(format!("its conditions are nested deeper than {MAX_DEPTH} levels."));
    }
    let test = |test| Condition::Test(path.clone(), test);
    let operators = match written.as_object() {
        Some(fields) if fields.keys().any(|name| name.starts_with('$')) => fields,
        _ => return Ok(test(Test::Equal(written.clone()))),
    };
    let mut parts = Vec::with_capacity(operators.len());
    for (name, value) in operators {
        let list = || match value.as_array() {
            Some(values) => Ok(values.clone()),
            None => Err(format!("{name:?} needs an array of values.")),
        };
        let compare = |ordering, or_equal| match value {
            Value::Number(_) | Value::String(_) => Ok(test(Test::Compare(ordering, or_equal, value.clone()))),
            _ => Err(format!("{name:?} needs a number or a string.")),
        };
        let not = |condition| Condition::Not(Box::new(condition));
        parts.push(match name.as_str() {
            "$eq" => test(Test::Equal(value.clone())),
            "$ne" => not(test(Test::Equal(value.clone()))),
            "$gt" => compare(Ordering::Greater, false)?,
            "$gte" => compare(Ordering::Greater, true)?,
            "$lt" => compare(Ordering::Less, false)?,
            "$lte" => compare(Ordering::Less, true)?,
            "$in" => test(Test::In(list()?)),
            "$nin" => not(test(Test::In(list()?))),
            "$exists" => match value.as_bool() {
                Some(wanted) => test(Test::Exists(wanted)),
                None => return Err("\"$exists\" is true or false.".to_owned()),
            },
            "$regex" => test(Test::Matches(pattern(value, operators.get("$options"))?)),
            "$options" if operators.contains_key("$regex") => continue,
            "$contains" => match value {
                Value::Array(_) | Value::Object(_) => return Err("\"$contains\" needs one plain value.".to_owned()),
                _ => test(Test::Contains(value.clone())),
            },
            "$not" => not(parse_tests(path, value, depth + 1, tests)?),
            other => {
                let known = "$eq $ne $gt $gte $lt $lte $in $nin $exists $regex $contains $not";
                return Err(format!("{other:?} is no operator; there are {known}."));
            }
        });
    }
    Ok(one_or_all(parts))
}

fn one_or_all(mut parts: Vec<Condition>) -> Condition {
    match parts.pop() {
        Some(part) if parts.is_empty() => part,
        last => {
            parts.extend(last);
            Condition::All(parts)
        }
    }
}

fn pattern(value: &Value, options: Option<&Value>) -> Result<Regex, String> {
    let Some(pattern) = value.as_str() else { return Err("\"$regex\" needs a pattern.".to_owned()) };
    let options = options.map_or(Some(""), Value::as_str);
    let Some(options) = options.filter(|options| options.chars().all(|letter| "imsx".contains(letter))) else {
        return Err("\"$options\" are letters of \"imsx\".".to_owned());
    };
    RegexBuilder::new(pattern)
        .case_insensitive(options.contains('i'))
        .multi_line(options.contains('m'))
        .dot_matches_new_line(options.contains('s'))
        .ignore_whitespace(options.contains('x'))
        .size_limit(MAX_COMPILED)
        .build()
        .map_err(|error| format!("\"$regex\" does not compile: {error}"))
}

impl Test {
    fn holds(&self, fact: Fact) -> bool {
        match (self, fact) {
            (Self::Exists(wanted), Fact::Missing) => !wanted,
            (Self::Exists(wanted), _) => *wanted,
            (Self::Equal(wanted), fact) => equal(fact, wanted),
            (Self::In(values), fact) => values.iter().any(|wanted| equal(fact, wanted)),
            (Self::Compare(ordering, or_equal, wanted), fact) => any(fact, &|fact| {
                compare(fact, wanted).is_some_and(|found| found == *ordering || (*or_equal && found == Ordering::Equal))
            }),
            (Self::Matches(regex), fact) => any(fact, &|fact| text(fact).is_some_and(|text| regex.is_match(text))),
            (Self::Contains(wanted), Fact::Json(Value::Array(items))) => items.iter().any(|item| same(item, wanted)),
            (Self::Contains(wanted), fact) => match (text(fact), wanted.as_str()) {
                (Some(text), Some(wanted)) => text.contains(wanted),
                _ => false,
            },
        }
    }
}

/// Whether a value has a property, or an item of an array.
fn any(fact: Fact, holds: &dyn Fn(Fact) -> bool) -> bool {
    match fact {
        Fact::Json(Value::Array(items)) => items.iter().any(|item| holds(Fact::Json(item))),
        fact => holds(fact),
    }
}

fn text(fact: Fact<'_>) -> Option<&str> {
    match fact {
        Fact::Text(text) => Some(text),
        Fact::Json(value) => value.as_str(),
        Fact::Missing => None,
    }
}

fn equal(fact: Fact, wanted: &Value) -> bool {
    match fact {
        Fact::Missing => wanted.is_null(),
        Fact::Json(Value::Array(items)) => items.iter().any(|item| same(item, wanted)) || same_items(items, wanted),
        Fact::Json(value) => same(value, wanted),
        Fact::Text(text) => match wanted {
            Value::Bool(wanted) => text.trim().eq_ignore_ascii_case(if *wanted { "true" } else { "false" }),
            wanted => compare(fact, wanted) == Some(Ordering::Equal),
        },
    }
}

/// Equal as JSON, 1 and 1.0 alike.
fn same(value: &Value, wanted: &Value) -> bool {
    match (value, wanted) {
        (Value::Number(a), Value::Number(b)) => compare_numbers(a, b) == Some(Ordering::Equal),
        (Value::Array(items), wanted) => same_items(items, wanted),
        (value, wanted) => value == wanted,
    }
}

fn same_items(items: &[Value], wanted: &Value) -> bool {
    let Value::Array(wanted) = wanted else { return false };
    items.len() == wanted.len() && items.iter().zip(wanted).all(|(item, wanted)| same(item, wanted))
}

/// Which of two values of one type is greater; none if there is no saying.
fn compare(fact: Fact, wanted: &Value) -> Option<Ordering> {
    match (fact, wanted) {
        (Fact::Json(Value::Number(value)), Value::Number(wanted)) => compare_numbers(value, wanted),
        (Fact::Json(Value::String(value)), Value::String(wanted)) => Some(value.as_str().cmp(wanted)),
        (Fact::Text(value), Value::String(wanted)) => Some(value.cmp(wanted)),
        (Fact::Text(value), Value::Number(wanted)) => value.trim().parse::<f64>().ok()?.partial_cmp(&wanted.as_f64()?),
        _ => None,
    }
}

fn compare_numbers(a: &Number, b: &Number) -> Option<Ordering> {
    if let (Some(a), Some(b)) = (a.as_i64(), b.as_i64()) {
        return Some(a.cmp(&b));
    }
    if let (Some(a), Some(b)) = (a.as_u64(), b.as_u64()) {
        return Some(a.cmp(&b));
    }
    a.as_f64()?.partial_cmp(&b.as_f64()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::base::Millis;

    fn check(condition: Value, expected: bool) {
        let body = json!({"max_tokens": 500, "temperature": 0.5, "tags": ["a", "b"], "stream": true, "sizes": [1, 20],
            "messages": [{"role": "user", "content": "Hello there"}], "nothing": null});
        let metadata = json!({"plan": "paid", "user": 42, "beta": false, "a.b": "dotted", "a": {"c": "deep"}});
        let headers = [("X-Team", "blue"), ("x-level", "12"), ("x-debug", "TRUE"), ("x.y", "dots")];
        let facts = Facts {
            body: &body,
            headers: &headers,
            metadata: &metadata,
            model: "dynamic/support",
            key: 0,
            now: Millis(0),
        };
        let parsed = Condition::parse(&condition).unwrap_or_else(|why| panic!("{condition}: {why}"));
        assert_eq!(parsed.holds(&facts), expected, "{condition}");
    }

    #[test]
    fn operators_hold_as_mongodb_s_do() {
        check(json!({"metadata.plan": "paid"}), true);
        check(json!({"metadata.plan": {"$eq": "free"}}), false);
        check(json!({"metadata.plan": {"$ne": "free"}}), true);
        check(json!({"metadata.gone": {"$ne": "free"}}), true);
        check(json!({"metadata.gone": null}), true);
        check(json!({"body.nothing": null}), true);
        check(json!({"metadata.plan": null}), false);
        check(json!({"metadata.user": 42.0}), true);
        check(json!({"metadata.user": "42"}), false);
        check(json!({"metadata.beta": false}), true);
        check(json!({"body.max_tokens": {"$gt": 499, "$lte": 500}}), true);
        check(json!({"body.max_tokens": {"$gt": 500}}), false);
        check(json!({"body.max_tokens": {"$gte": 500}}), true);
        check(json!({"body.max_tokens": {"$lt": 500}}), false);
        check(json!({"body.max_tokens": {"$lt": "x"}}), false);
        check(json!({"body.gone": {"$lt": 5}}), false);
        check(json!({"metadata.plan": {"$gt": "oaid"}}), true);
        check(json!({"metadata.plan": {"$in": ["free", "paid"]}}), true);
        check(json!({"metadata.gone": {"$in": ["free", null]}}), true);
        check(json!({"metadata.plan": {"$nin": ["free", "paid"]}}), false);
        check(json!({"metadata.gone": {"$nin": ["free"]}}), true);
        check(json!({"metadata.plan": {"$exists": true}}), true);
        check(json!({"body.nothing": {"$exists": true}}), true);
        check(json!({"metadata.gone": {"$exists": false}}), true);
        check(json!({"metadata.plan": {"$regex": "^PA", "$options": "i"}}), true);
        check(json!({"metadata.plan": {"$regex": "^PA"}}), false);
        check(json!({"metadata.user": {"$regex": "4"}}), false);
        check(json!({"metadata.plan": {"$contains": "ai"}}), true);
        check(json!({"body.tags": {"$contains": "b"}}), true);
        check(json!({"body.tags": {"$contains": "ab"}}), false);
        check(json!({"metadata.plan": {"$not": {"$regex": "x"}}}), true);
        check(json!({"metadata.plan": {"$not": "paid"}}), false);
    }

    #[test]
    fn arrays_hold_when_an_item_does() {
        check(json!({"body.tags": "a"}), true);
        check(json!({"body.tags": ["a", "b"]}), true);
        check(json!({"body.tags": ["b", "a"]}), false);
        check(json!({"body.tags": {"$in": ["z", "b"]}}), true);
        check(json!({"body.sizes": {"$gt": 10}}), true);
        check(json!({"body.sizes": {"$gt": 20}}), false);
        check(json!({"body.tags": {"$regex": "^b$"}}), true);
    }

    #[test]
    fn paths_lead_into_objects_arrays_and_headers() {
        check(json!({"body.messages.0.content": {"$contains": "Hello"}}), true);
        check(json!({"body.messages.1.content": {"$exists": true}}), false);
        check(json!({"metadata.a.b": "dotted"}), true);
        check(json!({"metadata.a.c": "deep"}), true);
        check(json!({"headers.x-team": "blue"}), true);
        check(json!({"headers.X-TEAM": "Blue"}), false);
        check(json!({"headers.x.y": "dots"}), true);
        check(json!({"headers.x-level": {"$gt": 9}}), true);
        check(json!({"headers.x-level": 12}), true);
        check(json!({"headers.x-level": {"$gt": "9"}}), false);
        check(json!({"headers.x-debug": true}), true);
        check(json!({"headers.x-team": {"$gt": 9}}), false);
        check(json!({"headers.gone": {"$exists": false}}), true);
        check(json!({"model": {"$regex": "support$"}}), true);
    }

    #[test]
    fn combinations_combine() {
        let yes = json!({"metadata.plan": "paid"});
        let no = json!({"metadata.plan": "free"});
        check(json!({"$and": [yes, yes]}), true);
        check(json!({"$and": [yes, no]}), false);
        check(json!({"$or": [no, yes]}), true);
        check(json!({"$or": [no, no]}), false);
        check(json!({"$nor": [no, no]}), true);
        check(json!({"$nor": [no, yes]}), false);
        check(json!({"$not": no}), true);
        check(json!([yes, no]), false);
        check(json!({"metadata.plan": "paid", "metadata.user": 41}), false);
        check(json!({"$or": [{"$and": [yes, {"$not": no}]}, no]}), true);
    }

    #[test]
    fn a_wrong_condition_says_what_is_wrong() {
        let check = |condition: Value, words: &str| {
            let why = Condition::parse(&condition).err().unwrap_or_else(|| panic!("{condition} was accepted"));
            assert!(why.contains(words), "{condition}: {why}");
        };
        check(json!("x"), "a condition is an object");
        check(json!({}), "empty");
        check(json!({"$and": []}), "\"$and\" needs an array");
        check(json!({"$or": {"model": 1}}), "\"$or\" needs an array");
        check(json!({"$gt": 5}), "\"$gt\" must stand behind a path");
        check(json!({"plan": 5}), "\"plan\" is none of");
        check(json!({"body.": 5}), "\"body.\" is none of");
        check(json!({"model": {"$like": "x"}}), "\"$like\" is no operator");
        check(json!({"model": {"$eq": "x", "y": 1}}), "\"y\" is no operator");
        check(json!({"model": {"$in": "x"}}), "\"$in\" needs an array");
        check(json!({"model": {"$gt": true}}), "\"$gt\" needs a number or a string");
        check(json!({"model": {"$exists": 1}}), "\"$exists\" is true or false");
        check(json!({"model": {"$regex": "("}}), "does not compile");
        check(json!({"model": {"$regex": "a", "$options": "q"}}), "\"$options\" are letters");
        check(json!({"model": {"$options": "i"}}), "\"$options\" is no operator");
        check(json!({"model": {"$contains": []}}), "\"$contains\" needs one plain value");
        let deep = (0..40).fold(json!({"model": 1}), |inner, _| json!({"$not": inner}));
        check(deep, "nested deeper");
        check(json!({"$or": vec![json!({"model": "x"}); 300]}), "more than 256");
    }
}
