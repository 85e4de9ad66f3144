//! A caller's JSON Schema on its way to the compiler: what cannot be kept to the letter is refused by name and place,
//! what the compiler reads too freely is written down more narrowly.
//!
//! ```text
//! schema ── keyword by keyword ──> refused: '/properties/tags/uniqueItems' …
//!                             └──> the same schema, narrower where a document could slip through
//! ```
//!
//! Narrower means: every document that the result allows is valid under the schema as it was sent. Known here is only what
//! follows from one schema object alone; conflicts between several (`allOf`, `$ref`) are the compiler's to find.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};

/// White space between the parts of a document: a space, or a line break and an indent. A bound, since models that may
/// write any amount of it sometimes write nothing else.
const WHITE_SPACE: &str = r" |\r?\n[ \t]{0,80}";
/// Escapes in strings. Without `\u`, every string has one spelling, so no name can be written a second way.
const ESCAPES: &str = r#"nrbtf\""#;
/// Beyond this, whole numbers are no longer exact in the compiler's arithmetic.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Keywords that say something about a document which no grammar here can hold it to.
const UNSUPPORTED: [&str; 18] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
    "$dynamicRef",
    "$dynamicAnchor",
    "$recursiveRef",
    "$recursiveAnchor",
];

/// Formats of the standard without a grammar. Those in no standard are remarks and constrain nothing.
const FORMATS_REFUSED: [&str; 9] = [
    "idn-email",
    "idn-hostname",
    "uri-reference",
    "iri",
    "iri-reference",
    "uri-template",
    "json-pointer",
    "relative-json-pointer",
    "regex",
];
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Dialects whose keywords are the ones below. The scheme and a `#` at the end do not matter.
const DIALECTS: [&str; 6] = [
    "json-schema.org/draft/2020-12/schema",
    "json-schema.org/draft/2019-09/schema",
    "json-schema.org/draft-07/schema",
    "json-schema.org/draft-06/schema",
    "json-schema.org/draft-04/schema",
    "json-schema.org/schema",
];

/// Makes a schema ready for the compiler.
///
/// # Errors
/// `Unsupported` for what cannot be kept, `BadInput` for what is no schema; the message names keyword and place.
pub fn prepare(schema: &Value) -> Result<Value> {
    let mut walk = Walk::default();
    let mut ready = match schema {
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err(Error::bad_input("The JSON schema is `false`: no document satisfies it.")),
        Value::Object(_) => walk.schema(schema, "")?,
        _ => return Err(Error::bad_input("The JSON schema must be an object.")),
    };
    for (at, reference) in &walk.references {
        // What is reached by a pointer must have been looked at.
        let known = reference
            .strip_prefix('#')
            .map(decode)
            .is_none_or(|to| to.is_empty() || !to.starts_with('/') || walk.schemas.contains(to.trim_end_matches('/')));
        if !known {
            return Err(refused(at, &format!("leads to '{reference}', where no schema stands")));
        }
        if !reference.starts_with('#') {
            return Err(refused(at, &format!("leads outside to '{reference}': copy that schema into `$defs`")));
        }
    }
    ready["x-guidance"] = json!({ "whitespace_pattern": WHITE_SPACE, "json_allowed_escapes": ESCAPES });
    Ok(ready)
}

#[derive(Default)]
struct Walk {
    /// Pointers to all schemas that were looked at.
    schemas: HashSet<String>,
    /// Where a `$ref` stands, and what it says.
    references: Vec<(String, String)>,
}

impl Walk {
    fn schema(&mut self, schema: &Value, at: &str) -> Result<Value> {
        self.schemas.insert(at.to_owned());
        let map = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(map) => map,
            _ => return Err(wrong(at, "must be a schema: an object, true or false")),
        };
        check_count(map, at)?;
        let mut ready = Map::new();
        for (name, value) in map {
            let place = join(at, name);
            if let Some(value) = self.keyword(name, value, &place, map)? {
                ready.insert(name.clone(), value);
            }
        }
        put_format(map, at, &mut ready)?;
        Ok(Value::Object(ready))
    }

    /// A keyword's value as the compiler should see it; `None` to leave it out.
    fn keyword(&mut self, name: &str, value: &Value, at: &str, map: &Map<String, Value>) -> Result<Option<Value>> {
        let ready = match name {
            "properties" | "$defs" | "definitions" => self.schemas_by_name(value, at, |name| Ok(name.to_owned()))?,
            "patternProperties" => self.schemas_by_name(value, at, |pattern| pattern_of(pattern, at))?,
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => self.list(value, at)?,
            "items" if value.is_array() => self.list(value, at)?,
            "additionalItems" if map.contains_key("prefixItems") => {
                return Err(refused(at, "does not go with `prefixItems`: write `items`"));
            }
            "items" | "additionalItems" | "additionalProperties" => self.schema(value, at)?,
            "$ref" => {
                let Some(reference) = value.as_str() else { return Err(wrong(at, "must be a string")) };
                self.references.push((at.to_owned(), reference.to_owned()));
                value.clone()
            }
            "$id" | "id" if !self.is_root(at) && value.is_string() => {
                return Err(refused(at, "is not supported inside a schema: refer by `#/$defs/…`"));
            }
            "$schema" => {
                let known = value.as_str().map(|name| name.trim_end_matches('#')).is_some_and(|name| {
                    DIALECTS.iter().any(|known| name.strip_suffix(known).is_some_and(|s| s.ends_with("//")))
                });
                if !known {
                    return Err(refused(at, &format!("names a dialect that is not known: {value}")));
                }
                value.clone()
            }
            "pattern" => match value.as_str() {
                Some(pattern) => Value::from(pattern_of(pattern, at)?),
                None => return Err(wrong(at, "must be a string")),
            },
            "const" => {
                check_values(value, at)?;
                value.clone()
            }
            "enum" => {
                if value.as_array().is_none_or(Vec::is_empty) {
                    return Err(wrong(at, "must be an array of at least one value"));
                }
                check_values(value, at)?;
                value.clone()
            }
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => {
                check_values(value, at)?;
                value.clone()
            }
            "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" => {
                let whole = value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=EXACT).contains(number));
                Value::from(whole.ok_or_else(|| wrong(at, "must be a whole number from 0 on"))? as u64)
            }
            "uniqueItems" if value == &Value::Bool(false) => return Ok(None),
            "unevaluatedItems" | "unevaluatedProperties" if value == &Value::Bool(true) => return Ok(None),
            "format" | "x-guidance" => return Ok(None),
            _ if UNSUPPORTED.contains(&name) => return Err(refused(at, "is not supported")),
            _ => value.clone(),
        };
        Ok(Some(ready))
    }

    fn is_root(&self, at: &str) -> bool {
        !at[1..].contains('/')
    }

    fn schemas_by_name(&mut self, value: &Value, at: &str, name: impl Fn(&str) -> Result<String>) -> Result<Value> {
        let Value::Object(map) = value else { return Err(wrong(at, "must be an object of schemas")) };
        let ready = map.iter().map(|(key, schema)| Ok((name(key)?, self.schema(schema, &join(at, key))?)));
        Ok(Value::Object(ready.collect::<Result<_>>()?))
    }

    fn list(&mut self, value: &Value, at: &str) -> Result<Value> {
        let Value::Array(list) = value else { return Err(wrong(at, "must be an array of schemas")) };
        let ready = list.iter().enumerate().map(|(i, schema)| self.schema(schema, &join(at, &i.to_string())));
        Ok(Value::Array(ready.collect::<Result<_>>()?))
    }
}

/// Names that a schema leaves free can be written twice, and count once then: only one of them can be asked for.
fn check_count(map: &Map<String, Value>, at: &str) -> Result<()> {
    let required = map.get("required").and_then(Value::as_array);
    let required = required.map_or(0, |names| names.iter().filter_map(Value::as_str).collect::<HashSet<_>>().len());
    let least = map.get("minProperties").and_then(Value::as_f64).unwrap_or(0.0);
    if least > required as f64 + 1.0 {
        return Err(refused(&join(at, "minProperties"), "is supported up to one more than there are `required` names"));
    }
    Ok(())
}

/// Puts `format` in, as itself or as the pattern that keeps to it more strictly.
fn put_format(map: &Map<String, Value>, at: &str, ready: &mut Map<String, Value>) -> Result<()> {
    let Some(format) = map.get("format") else { return Ok(()) };
    let place = join(at, "format");
    let Some(name) = format.as_str() else { return Err(wrong(&place, "must be a string")) };
    if FORMATS_REFUSED.contains(&name) {
        return Err(refused(&place, &format!("'{name}' is not supported")));
    }
    if !FORMATS.contains(&name) {
        return Ok(());
    }
    // Neither a leap day nor a leap second is right in every year.
    let date = "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|\
                02-(?:0[1-9]|1[0-9]|2[0-8]))";
    let time = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
    let pattern = match name {
        "date" => format!("^{date}$"),
        "time" => format!("^{time}$"),
        "date-time" => format!("^{date}T{time}$"),
        _ => {
            ready.insert("format".to_owned(), format.clone());
            return Ok(());
        }
    };
    if !ready.contains_key("pattern") {
        ready.insert("pattern".to_owned(), Value::from(pattern));
        return Ok(());
    }
    let all = ready.entry("allOf").or_insert_with(|| json!([]));
    if let Value::Array(all) = all {
        all.push(json!({ "pattern": pattern }));
    }
    Ok(())
}

/// Numbers must be exact, and text must have a spelling without `\u`.
fn check_values(value: &Value, at: &str) -> Result<()> {
    match value {
        Value::Number(number) if number.as_f64().is_none_or(|number| number.abs() >= EXACT) => {
            Err(refused(at, "holds a number beyond 2^53, which is not exact"))
        }
        Value::String(text) if text.chars().any(|c| c.is_control() && !"\n\r\t\u{8}\u{c}".contains(c)) => {
            Err(refused(at, "holds a control character that has no short escape"))
        }
        Value::Array(values) => values.iter().try_for_each(|value| check_values(value, at)),
        Value::Object(map) => map.values().try_for_each(|value| check_values(value, at)),
        _ => Ok(()),
    }
}

/// A pattern of ECMA 262 as ours reads it. Inside a class, `[`, `&` and `~` mean themselves there and sets here. What is
/// white space or a line differs from reader to reader: what is allowed here is so to all of them.
fn pattern_of(pattern: &str, at: &str) -> Result<String> {
    const NARROW_SPACE: &str = r" \t\n\r\x0B\x0C";
    const WIDE_SPACE: &str = r"\s\x{85}\x{180E}\x{FEFF}";
    let mut out = String::with_capacity(pattern.len());
    let mut chars = pattern.char_indices().peekable();
    // Inside a class, and whether it says what is not meant.
    let (mut class, mut negated) = (false, false);
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some((_, 's')) => {
                    let space = if negated { WIDE_SPACE } else { NARROW_SPACE };
                    out.push_str(&if class { space.to_owned() } else { format!("[{space}]") });
                }
                Some((_, 'S')) => out.push_str(&format!("[^{}]", if negated { NARROW_SPACE } else { WIDE_SPACE })),
                Some((_, escaped)) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            '[' if !class => {
                (class, negated) = (true, chars.peek().is_some_and(|&(_, next)| next == '^'));
                out.push('[');
            }
            ']' => {
                (class, negated) = (false, false);
                out.push(']');
            }
            '[' | '&' | '~' if class => out.extend(['\\', c]),
            '.' if !class => out.push_str(r"[^\n\r\x{2028}\x{2029}]"),
            '(' if !class => {
                let marks = ["?=", "?!", "?<=", "?<!"];
                if let Some(mark) = marks.into_iter().find(|mark| pattern[i + 1..].starts_with(mark)) {
                    return Err(refused(at, &format!("uses `({mark}`, which is not supported")));
                }
                out.push('(');
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// A part of a pointer, percent-decoded.
fn decode(pointer: &str) -> String {
    percent_encoding::percent_decode_str(pointer).decode_utf8_lossy().into_owned()
}

fn join(at: &str, name: &str) -> String {
    format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"))
}

fn refused(at: &str, words: &str) -> Error {
    Error::unsupported(format!("The JSON schema cannot be used: '{}' {words}.", if at.is_empty() { "/" } else { at }))
}

fn wrong(at: &str, words: &str) -> Error {
    Error::bad_input(format!("The JSON schema is not valid: '{}' {words}.", if at.is_empty() { "/" } else { at }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(schema: &Value) -> String {
        prepare(schema).unwrap_err().message().to_owned()
    }

    #[test]
    fn what_cannot_be_kept_is_refused_by_name_and_place() {
        for (schema, words) in [
            (json!({"properties": {"a/b": {"not": {}}}}), "'/properties/a~1b/not' is not supported"),
            (json!({"items": {"uniqueItems": true}}), "'/items/uniqueItems' is not supported"),
            (json!({"if": {}, "then": {}}), "'/if' is not supported"),
            (json!({"anyOf": [{}, {"contains": {}}]}), "'/anyOf/1/contains' is not supported"),
            (json!({"format": "regex"}), "'/format' 'regex' is not supported"),
            (json!({"$schema": "http://json-schema.org/draft-03/schema#"}), "'/$schema' names a dialect"),
            (json!({"$ref": "#/nowhere"}), "'/$ref' leads to '#/nowhere'"),
            (json!({"$ref": "https://example.com/x"}), "'/$ref' leads outside"),
            (json!({"minProperties": 2}), "'/minProperties' is supported up to"),
            (json!({"const": 9007199254740993_u64}), "'/const' holds a number beyond 2^53"),
            (json!({"enum": ["a\u{1}"]}), "'/enum' holds a control character"),
            (json!({"pattern": "^(?!a)"}), "'/pattern' uses `(?!`"),
            (json!({"prefixItems": [], "additionalItems": false}), "'/additionalItems' does not go with"),
            (json!({"$defs": {"a": {"$id": "b"}}}), "'/$defs/a/$id' is not supported inside"),
        ] {
            assert!(refusal(&schema).contains(words), "{schema}: {}", refusal(&schema));
        }
        assert!(refusal(&json!(false)).contains("`false`"));
        assert!(refusal(&json!({"properties": 3})).contains("'/properties' must be an object of schemas"));
        assert!(refusal(&json!({"minLength": -1})).contains("'/minLength' must be a whole number"));
    }

    #[test]
    fn names_of_properties_are_not_keywords_and_remarks_constrain_nothing() {
        let names = json!({"properties": {"not": {"type": "string"}, "$ref": {"type": "null"}, "format": {}}});
        assert_eq!(prepare(&names).unwrap()["properties"], names["properties"]);
        for (schema, gone) in [
            (json!({"format": "password"}), "format"),
            (json!({"uniqueItems": false}), "uniqueItems"),
            (json!({"x-guidance": {"lenient": true}}), "lenient"),
        ] {
            assert!(!prepare(&schema).unwrap().to_string().contains(gone), "{schema}");
        }
        assert_eq!(prepare(&json!({"maxLength": 2.0})).unwrap()["maxLength"], json!(2));
    }

    #[test]
    fn brackets_in_a_class_mean_themselves() {
        let check = |from: &str, to: &str| assert_eq!(pattern_of(from, "").unwrap(), to);
        check(r"[[a]b[c&&d]", r"[\[a]b[c\&\&d]");
        check(r"\[[\]]x[^~]", r"\[[\]]x[^\~]");
        check(r"\s[^\s]\\s", r"[ \t\n\r\x0B\x0C][^\s\x{85}\x{180E}\x{FEFF}]\\s");
        check(r"a.[.]\.", r"a[^\n\r\x{2028}\x{2029}][.]\.");
    }

    #[test]
    fn a_reference_may_be_written_with_escapes() {
        let schema = json!({"$ref": "#/$defs/a%25~1b", "$defs": {"a%/b": {"type": "null"}}});
        assert!(prepare(&schema).is_ok());
        assert!(prepare(&json!({"properties": {"child": {"$ref": "#"}}})).is_ok());
    }
}
