//! Reads the fields of a JSON request: unknown ones are ignored, `null` counts as left out, and what is wrong is said with
//! the field's name, as the client wrote it (`messages.0.content`).

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::base::{Error, Result};

/// An object of the request and where it stands in the body.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    at: String,
}

impl<'a> Fields<'a> {
    /// The body itself.
    ///
    /// # Errors
    /// `BadInput` unless it is an object.
    pub(super) fn of(body: &'a Value) -> Result<Self> {
        Self::at(body, "")
    }

    /// An object at a place that has a name already.
    pub(super) fn at(value: &'a Value, at: impl Into<String>) -> Result<Self> {
        let at = at.into();
        match value {
            Value::Object(map) => Ok(Self { map, at }),
            other if at.is_empty() => {
                Err(Error::bad_input(format!("the body must be a JSON object, not {}", kind_of(other))))
            }
            other => Err(mismatch(&at, "an object", other)),
        }
    }

    /// The full name of a field of this object.
    pub(super) fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    /// Whatever was sent, if anything but `null` was.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether something other than `null` was sent.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// All fields.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// A boolean.
    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(mismatch(&self.path(name), "true or false", other)),
        }
    }

    /// A string.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(mismatch(&self.path(name), "a string", other)),
        }
    }

    /// A string that must be there.
    pub(super) fn required_text(&self, name: &str) -> Result<&'a str> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// An array.
    pub(super) fn array(&self, name: &str) -> Result<Option<&'a [Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(mismatch(&self.path(name), "an array", other)),
        }
    }

    /// An object.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        self.get(name).map(|value| Fields::at(value, self.path(name))).transpose()
    }

    /// A number within bounds.
    pub(super) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        self.get(name).map(|value| number(&self.path(name), value, range)).transpose()
    }

    /// A whole number within bounds; `7.0` counts as one.
    pub(super) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        self.get(name).map(|value| integer(&self.path(name), value, range)).transpose()
    }

    /// A field we know and do not serve: fine when left out or off (`false`, `[]`, `{}`, `""`), refused otherwise, so that
    /// nobody mistakes an answer for one that honoured it.
    pub(super) fn refuse(&self, name: &str, why: &str) -> Result<()> {
        let off = match self.get(name) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(values)) => values.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::String(text)) => text.is_empty(),
            Some(_) => false,
        };
        if off { Ok(()) } else { Err(Error::unsupported(why).with_param(self.path(name))) }
    }

    /// The error for a field that has to be there.
    pub(super) fn missing(&self, name: &str) -> Error {
        let path = self.path(name);
        let message = format!("'{path}' is required");
        Error::bad_field(path, message)
    }

    /// The error for a value that is no good.
    pub(super) fn wrong(&self, name: &str, words: &str) -> Error {
        let path = self.path(name);
        let message = format!("'{path}' {words}");
        Error::bad_field(path, message)
    }
}

/// A number within bounds, wherever it stands.
pub(super) fn number(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f64> {
    let Some(number) = value.as_f64() else { return Err(mismatch(path, "a number", value)) };
    if range.contains(&number) {
        return Ok(number);
    }
    Err(out_of_range(path, range.start(), range.end(), value))
}

/// A whole number within bounds, wherever it stands.
pub(super) fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64> {
    let whole = value.as_i64().or_else(|| {
        // Some clients write every number with a point. Beyond 2^53 a float is no longer one certain integer.
        value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= 9.007_199_254_740_992e15).map(|f| f as i64)
    });
    match whole {
        Some(whole) if range.contains(&whole) => Ok(whole),
        None if !value.is_number() => Err(mismatch(path, "an integer", value)),
        None if value.as_f64().is_some_and(|f| f.fract() != 0.0) => Err(mismatch(path, "an integer", value)),
        _ => Err(out_of_range(path, range.start(), range.end(), value)),
    }
}

/// The error for a value of the wrong type.
pub(super) fn mismatch(path: &str, expected: &str, value: &Value) -> Error {
    Error::bad_field(path, format!("'{path}' must be {expected}, not {}", kind_of(value)))
}

fn out_of_range(path: &str, low: impl std::fmt::Display, high: impl std::fmt::Display, value: &Value) -> Error {
    Error::bad_field(path, format!("'{path}' must be from {low} to {high}, not {value}"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_the_name_of_the_field() {
        let body = json!({"i": 3, "f": 1.5, "w": 2.0, "s": "x", "n": null, "b": true, "o": {"deep": 9}, "big": 1e300, "tools": [1]});
        let fields = Fields::of(&body).unwrap();
        let check = |outcome: Result<String>, expected: &str| {
            let seen =
                outcome.unwrap_or_else(|e| format!("{:?}: {} [{}]", e.kind(), e.message(), e.param().unwrap_or("")));
            assert_eq!(seen, expected);
        };
        let integer = |name: &str| fields.integer(name, 0..=5).map(|v| format!("{v:?}"));
        check(integer("i"), "Some(3)");
        check(integer("w"), "Some(2)");
        check(integer("n"), "None");
        check(integer("absent"), "None");
        check(integer("f"), "BadInput: 'f' must be an integer, not a fraction [f]");
        check(integer("s"), "BadInput: 's' must be an integer, not a string [s]");
        check(integer("big"), "BadInput: 'big' must be from 0 to 5, not 1e+300 [big]");
        check(
            fields.number("i", 0.0..=2.5).map(|v| format!("{v:?}")),
            "BadInput: 'i' must be from 0 to 2.5, not 3 [i]",
        );
        check(fields.number("f", 0.0..=2.0).map(|v| format!("{v:?}")), "Some(1.5)");
        check(fields.text("b").map(|v| format!("{v:?}")), "BadInput: 'b' must be a string, not a boolean [b]");
        check(fields.bool("b").map(|v| format!("{v:?}")), "Some(true)");
        let deep = fields.object("o").unwrap().unwrap();
        check(
            deep.text("deep").map(|v| format!("{v:?}")),
            "BadInput: 'o.deep' must be a string, not a number [o.deep]",
        );
        check(Err(deep.missing("x")), "BadInput: 'o.x' is required [o.x]");
        check(fields.refuse("tools", "no tools here").map(|()| String::new()), "Unsupported: no tools here [tools]");
        check(fields.refuse("n", "").map(|()| "fine".to_owned()), "fine");
        check(
            Fields::of(&json!([1])).map(|_| String::new()),
            "BadInput: the body must be a JSON object, not an array []",
        );
    }
}
