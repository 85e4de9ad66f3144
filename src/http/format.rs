//! Structured output in requests: the ways in which clients say what an answer must look like.
//!
//! ```text
//! response_format     {"type": "text" | "json_object" | "json_schema", "json_schema": schema | {"name", "schema", "strict"}}
//! text.format         {"type", "name", "schema", "strict"}                        (responses)
//! guided_json, guided_regex, guided_choice, guided_grammar                        (vLLM, Workers AI)
//! structured_outputs  {"json" | "regex" | "choice" | "grammar" | "json_object"}   (vLLM)
//! json_schema, grammar                                                            (llama-server)
//! ```
//!
//! One of them at a time, on every surface. Whether the grammar itself makes sense shows when the model compiles it.

use std::sync::Arc;

use serde_json::Value;

use crate::base::{Error, Result};
use crate::http::fields::{Fields, mismatch};
use crate::task::Grammar;

/// Most texts to choose from.
const MAX_CHOICES: usize = 1024;

/// What the answer must look like, if anything was said about it.
pub(super) fn grammar(fields: &Fields) -> Result<Option<Arc<Grammar>>> {
    let mut found = Found { field: None };
    found.add(fields.path("response_format"), response_format(fields, "response_format")?)?;
    if let Some(text) = fields.get("text").filter(|text| text.is_object()) {
        let text = Fields::at(text, fields.path("text"))?;
        found.add(text.path("format"), response_format(&text, "format")?)?;
    }
    for (prefix, fields) in [("guided_", Some(fields.clone())), ("", fields.object("structured_outputs")?)] {
        let Some(fields) = fields else { continue };
        let name = |name: &str| format!("{prefix}{name}");
        found.add(fields.path(&name("json")), json(&fields, &name("json"))?)?;
        found.add(
            fields.path(&name("regex")),
            fields.text(&name("regex"))?.map(|text| Grammar::Regex(text.to_owned())),
        )?;
        found.add(fields.path(&name("choice")), choice(&fields, &name("choice"))?)?;
        found.add(fields.path(&name("grammar")), fields.text(&name("grammar"))?.map(notation))?;
        if fields.bool(&name("json_object"))? == Some(true) {
            found.add(fields.path(&name("json_object")), Some(Grammar::Json))?;
        }
    }
    found.add(fields.path("json_schema"), json(fields, "json_schema")?)?;
    found.add(fields.path("grammar"), fields.text("grammar")?.filter(|text| !text.is_empty()).map(notation))?;
    let Some((_, grammar)) = found.field else { return Ok(None) };
    if fields.get("stop").is_some_and(|stop| stop.as_array().is_none_or(|stops| !stops.is_empty())) {
        return Err(fields.wrong("stop", "does not go with a structured answer, which ends where it is whole"));
    }
    Ok(Some(Arc::new(grammar)))
}

struct Found {
    field: Option<(String, Grammar)>,
}

impl Found {
    fn add(&mut self, path: String, grammar: Option<Grammar>) -> Result<()> {
        let Some(grammar) = grammar else { return Ok(()) };
        if let Some((other, _)) = &self.field {
            let message = format!("'{other}' and '{path}' both say what the answer must look like: send one of them");
            return Err(Error::bad_field(path, message));
        }
        self.field = Some((path, grammar));
        Ok(())
    }
}

/// OpenAI's form and Cloudflare's, which has the bare schema.
fn response_format(fields: &Fields, name: &str) -> Result<Option<Grammar>> {
    let Some(format) = fields.object(name)? else { return Ok(None) };
    match format.text("type")? {
        None | Some("text") => Ok(None),
        Some("json_object") => match format.get("schema") {
            // llama-server takes a schema here.
            Some(schema) => Ok(Some(Grammar::JsonSchema(schema.clone()))),
            None => Ok(Some(Grammar::Json)),
        },
        Some("json_schema") => {
            // In a response's `text.format` the wrapper is the format itself.
            let Some(value) = format.get("json_schema") else {
                return match format.get("schema") {
                    Some(schema) => schema_of(&format, "schema", schema).map(Some),
                    None => Err(format.missing(if name == "format" { "schema" } else { "json_schema" })),
                };
            };
            let wrapper = Fields::at(value, format.path("json_schema"))?;
            wrapper.bool("strict").or_else(|error| if wrapper.has("schema") { Err(error) } else { Ok(None) })?;
            match wrapper.get("schema") {
                Some(schema) if is_wrapper(value) => schema_of(&wrapper, "schema", schema).map(Some),
                None if is_wrapper(value) && wrapper.has("name") => Ok(Some(Grammar::Json)),
                _ => Ok(Some(Grammar::JsonSchema(value.clone()))),
            }
        }
        Some(_) => Err(format.wrong("type", "must be text, json_object or json_schema")),
    }
}

/// Whether this is `{"name", "schema", "strict"}` around a schema, not a schema itself.
fn is_wrapper(value: &Value) -> bool {
    let wraps = |name: &String| matches!(name.as_str(), "name" | "description" | "schema" | "strict");
    value.as_object().is_some_and(|map| map.keys().all(wraps))
}

fn schema_of(fields: &Fields, name: &str, schema: &Value) -> Result<Grammar> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::JsonSchema(schema.clone())),
        other => Err(mismatch(&fields.path(name), "a JSON schema", other)),
    }
}

/// A schema, or the text of one.
fn json(fields: &Fields, name: &str) -> Result<Option<Grammar>> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(schema) => schema_of(fields, name, &schema).map(Some),
            Err(error) => Err(fields.wrong(name, &format!("is not JSON: {error}"))),
        },
        Some(schema) => schema_of(fields, name, schema).map(Some),
    }
}

fn choice(fields: &Fields, name: &str) -> Result<Option<Grammar>> {
    let Some(values) = fields.array(name)? else { return Ok(None) };
    if values.is_empty() || values.len() > MAX_CHOICES {
        return Err(fields.wrong(name, &format!("must hold from 1 to {MAX_CHOICES} texts")));
    }
    let texts = values.iter().map(|value| match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => Err(mismatch(&fields.path(name), "an array of texts, none of them empty", other)),
    });
    Ok(Some(Grammar::Choice(texts.collect::<Result<_>>()?)))
}

/// GBNF by its `::=`, which Lark does not have.
fn notation(text: &str) -> Grammar {
    if text.contains("::=") { Grammar::Gbnf(text.to_owned()) } else { Grammar::Lark(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> String {
        match grammar(&Fields::of(&body).unwrap()) {
            Ok(None) => "none".to_owned(),
            Ok(Some(grammar)) => match &*grammar {
                Grammar::JsonSchema(schema) => format!("schema {schema}"),
                other => format!("{other:?}"),
            },
            Err(error) => error.message().to_owned(),
        }
    }

    #[test]
    fn every_spelling_of_a_structured_answer_is_understood() {
        let schema = json!({"type": "null"});
        for (body, expected) in [
            (json!({}), "none"),
            (json!({"response_format": {"type": "text"}, "grammar": ""}), "none"),
            (json!({"response_format": {"type": "json_object"}}), "Json"),
            (json!({"response_format": {"type": "json_object", "schema": schema}}), r#"schema {"type":"null"}"#),
            (json!({"response_format": {"type": "json_schema", "json_schema": schema}}), r#"schema {"type":"null"}"#),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
                r#"schema {"type":"null"}"#,
            ),
            (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}), "Json"),
            (
                json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}),
                r#"schema {"type":"null"}"#,
            ),
            (json!({"text": {"format": {"type": "text"}}}), "none"),
            (json!({"guided_json": schema}), r#"schema {"type":"null"}"#),
            (json!({"guided_json": schema.to_string()}), r#"schema {"type":"null"}"#),
            (json!({"guided_regex": "a+"}), r#"Regex("a+")"#),
            (json!({"guided_choice": ["a", "b"]}), r#"Choice(["a", "b"])"#),
            (json!({"guided_grammar": "start: \"a\""}), r#"Lark("start: \"a\"")"#),
            (json!({"structured_outputs": {"json": schema}}), r#"schema {"type":"null"}"#),
            (json!({"structured_outputs": {"regex": "a"}}), r#"Regex("a")"#),
            (json!({"structured_outputs": {"json_object": true}}), "Json"),
            (json!({"json_schema": schema}), r#"schema {"type":"null"}"#),
            (json!({"grammar": "root ::= \"a\""}), r#"Gbnf("root ::= \"a\"")"#),
        ] {
            assert_eq!(read(body.clone()), expected, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_about_it_is_said_with_the_field() {
        for (body, words) in [
            (json!({"response_format": {"type": "yaml"}}), "'response_format.type' must be text"),
            (json!({"response_format": {"type": "json_schema"}}), "'response_format.json_schema' is required"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
                "must be a JSON schema",
            ),
            (json!({"guided_json": "{"}), "'guided_json' is not JSON"),
            (json!({"guided_choice": []}), "'guided_choice' must hold from 1 to"),
            (json!({"guided_choice": ["a", ""]}), "none of them empty"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "'guided_regex' and 'guided_choice' both say"),
            (json!({"guided_regex": "a", "stop": "b"}), "'stop' does not go with"),
        ] {
            assert!(read(body.clone()).contains(words), "{body}: {}", read(body.clone()));
        }
    }
}
