//! A JSON schema, compiled, and the parts of an answer that it is held against.
//!
//!     request's document ------------------------------> validator --> Ok, or which place breaks which rule
//!     answer --text of each choice, if it is JSON-----'
//!
//! Nothing is ever fetched: a schema that refers to another document is refused when it is compiled, and so is one whose references
//! lead back to themselves without going deeper into the document, which no validator would ever finish.

use std::collections::HashSet;

use jsonschema::{Retrieve, Uri, Validator};
use serde_json::Value;

use crate::base::{Error, Result};

/// Objects and arrays of one schema at most.
const MAX_NODES: usize = 20_000;

pub(super) struct Schema {
    validator: Validator,
}

/// What a text of an answer is to a schema.
enum Text<'t> {
    /// Written by the model; validated if it is JSON.
    Written(std::borrow::Cow<'t, str>),
    /// Taken apart already.
    Parsed(&'t Value),
}

impl Schema {
    pub(super) fn new(schema: &Value) -> Result<Self> {
        if !schema.is_object() && !schema.is_boolean() {
            return Err(Error::bad_input("a schema is an object, or true or false."));
        }
        let mut nodes = 0;
        check_references(schema, true, &mut nodes)?;
        let mut safe = HashSet::new();
        check_loops(schema, schema, &mut safe)?;
        let validator = jsonschema::options().with_retriever(Nowhere).build(schema).map_err(|error| {
            Error::bad_input(format!("it does not compile, at {:?}: {error}", error.instance_path.as_str()))
        })?;
        Ok(Self { validator })
    }

    /// Holds a whole document against the schema.
    pub(super) fn document(&self, body: &[u8]) -> std::result::Result<(), String> {
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        let Ok(document) = serde_json::from_slice::<Value>(body) else {
            return Err("the body is not JSON".to_owned());
        };
        self.value(&document)
    }

    /// Holds the texts of an answer against it.
    pub(super) fn answer(&self, body: &[u8]) -> std::result::Result<(), String> {
        let Ok(document) = serde_json::from_slice::<Value>(body) else {
            return self.text(&String::from_utf8_lossy(body));
        };
        let Some(texts) = texts(&document) else { return self.value(&document) };
        texts.iter().try_for_each(|text| match text {
            Text::Written(text) => self.text(text),
            Text::Parsed(value) => self.value(value),
        })
    }

    /// Holds a text that a model wrote against it, if it is structured output.
    pub(super) fn text(&self, text: &str) -> std::result::Result<(), String> {
        let text = text.trim_ascii();
        let is_object = text.starts_with('{');
        if !is_object && !text.starts_with('[') {
            return Ok(());
        }
        match serde_json::from_str::<Value>(text) {
            Ok(value) => self.value(&value),
            // Prose may well begin with `[1]`, but hardly with `{`.
            Err(_) if is_object => Err("the answer is not whole JSON".to_owned()),
            Err(_) => Ok(()),
        }
    }

    fn value(&self, value: &Value) -> std::result::Result<(), String> {
        // The library's own words quote the value; places do not.
        self.validator.validate(value).map_err(|error| {
            let place = error.instance_path.as_str();
            let place = if place.is_empty() { "the document" } else { place };
            format!("{place} breaks {}", error.schema_path.as_str())
        })
    }
}

/// The texts of an answer; none if it has no known form.
fn texts(document: &Value) -> Option<Vec<Text<'_>>> {
    if let Some(items) = document.as_array() {
        return pieces(items);
    }
    if document.get("error").is_some_and(|error| !error.is_null()) || document.get("object") == Some(&"list".into()) {
        return Some(Vec::new());
    }
    // The native envelope, and the form of the run API.
    if let Some(result) = document.get("result")
        && (document.get("success").is_some() || document.get("state").is_some())
    {
        return texts(result).or(Some(Vec::new()));
    }
    if let Some(choices) = document.get("choices").and_then(Value::as_array) {
        let texts = choices.iter().filter_map(|choice| match choice.get("text") {
            Some(text) => written(text),
            None => written(choice.get("message")?.get("content")?),
        });
        return Some(texts.collect());
    }
    if let Some(candidates) = document.get("candidates").and_then(Value::as_array) {
        return Some(
            candidates.iter().filter_map(|candidate| written(candidate.get("content")?.get("parts")?)).collect(),
        );
    }
    if let Some(items) = document.get("output").and_then(Value::as_array) {
        let messages = items.iter().filter(|item| item.get("type") == Some(&"message".into()));
        return Some(messages.filter_map(|message| written(message.get("content")?)).collect());
    }
    let message = document.get("message").or_else(|| document.get("output")?.get("message"));
    if let Some(content) = message.and_then(|message| message.get("content")) {
        return Some(written(content).into_iter().collect());
    }
    if document.get("type") == Some(&"message".into()) {
        return Some(document.get("content").and_then(written).into_iter().collect());
    }
    if let Some(text) = document.get("generated_text") {
        return Some(written(text).into_iter().collect());
    }
    if document.get("generation_id").is_some() {
        return Some(document.get("text").and_then(written).into_iter().collect());
    }
    match document.get("response") {
        Some(Value::String(text)) => Some(vec![Text::Written(text.into())]),
        Some(value @ (Value::Object(_) | Value::Array(_))) => Some(vec![Text::Parsed(value)]),
        Some(Value::Null) => Some(Vec::new()),
        _ => None,
    }
}

/// Google's stream as one array, whose texts belong together, or a list of generated texts.
fn pieces(items: &[Value]) -> Option<Vec<Text<'_>>> {
    let all: Option<Vec<_>> = items.iter().map(|item| item.as_object().and_then(|_| texts(item))).collect();
    let all = all.filter(|all| !all.is_empty())?;
    if !items.iter().any(|item| item.get("candidates").is_some()) {
        return Some(all.into_iter().flatten().collect());
    }
    let whole: String = all
        .iter()
        .flatten()
        .filter_map(|text| match text {
            Text::Written(text) => Some(&**text),
            Text::Parsed(_) => None,
        })
        .collect();
    Some(vec![Text::Written(whole.into())])
}

/// A content: a string, or parts whose texts belong together.
fn written(content: &Value) -> Option<Text<'_>> {
    match content {
        Value::String(text) => Some(Text::Written(text.into())),
        Value::Array(parts) => {
            let texts = parts.iter().filter(|part| part.get("thought") != Some(&true.into()));
            let text: String = texts.filter_map(|part| part.get("text")?.as_str()).collect();
            (!text.is_empty()).then_some(Text::Written(text.into()))
        }
        _ => None,
    }
}

/// Refuses references out of the document, whatever the library would do with them.
fn check_references(schema: &Value, root: bool, nodes: &mut usize) -> Result<()> {
    *nodes += 1;
    if *nodes > MAX_NODES {
        return Err(Error::bad_input(format!("it is larger than {MAX_NODES} parts.")));
    }
    match schema {
        Value::Array(items) => items.iter().try_for_each(|item| check_references(item, false, nodes)),
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| {
            if let Value::String(target) = value {
                let is_reference = matches!(name.as_str(), "$ref" | "$dynamicRef" | "$recursiveRef");
                if is_reference && !target.starts_with('#') {
                    return Err(Error::bad_input(format!(
                        "{name} {target:?} leads out of the document: put what it names under \"$defs\" and refer to \"#/$defs/…\"."
                    )));
                }
                if name == "$id" && !root && !target.starts_with('#') {
                    return Err(Error::bad_input(format!("$id {target:?} may stand at the top only.")));
                }
            }
            check_references(value, false, nodes)
        }),
        _ => Ok(()),
    }
}

/// Looks from every part of the schema for a way back to it that goes through references and combinations only.
fn check_loops<'s>(root: &'s Value, schema: &'s Value, safe: &mut HashSet<*const Value>) -> Result<()> {
    follow(root, schema, &mut Vec::new(), safe)?;
    match schema {
        Value::Array(items) => items.iter().try_for_each(|item| check_loops(root, item, safe)),
        Value::Object(fields) => fields.values().try_for_each(|value| check_loops(root, value, safe)),
        _ => Ok(()),
    }
}

fn follow<'s>(
    root: &'s Value,
    at: &'s Value,
    way: &mut Vec<*const Value>,
    safe: &mut HashSet<*const Value>,
) -> Result<()> {
    let Some(fields) = at.as_object() else { return Ok(()) };
    if safe.contains(&std::ptr::from_ref(at)) {
        return Ok(());
    }
    if way.contains(&std::ptr::from_ref(at)) {
        return Err(Error::bad_input("its references lead in a circle: no document could ever be checked against it."));
    }
    // Every schema refers a few steps far; a longer way would cost the validator's stack as much as ours.
    if way.len() > 200 {
        return Err(Error::bad_input("its references lead from one to the next more than 200 times."));
    }
    way.push(at);
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("allOf" | "anyOf" | "oneOf", Value::Array(items)) => {
                items.iter().try_for_each(|item| follow(root, item, way, safe))?;
            }
            ("not" | "if" | "then" | "else", value) => follow(root, value, way, safe)?,
            ("dependentSchemas" | "dependencies", Value::Object(schemas)) => {
                schemas.values().try_for_each(|schema| follow(root, schema, way, safe))?;
            }
            ("$ref" | "$dynamicRef" | "$recursiveRef", Value::String(target)) => {
                // A target that does not exist is the compiler's to report.
                if let Some(target) = resolve(root, target) {
                    follow(root, target, way, safe)?;
                }
            }
            _ => {}
        }
    }
    way.pop();
    safe.insert(at);
    Ok(())
}

fn resolve<'s>(root: &'s Value, target: &str) -> Option<&'s Value> {
    let fragment = percent_encoding::percent_decode_str(target.strip_prefix('#')?).decode_utf8().ok()?;
    match fragment.as_ref() {
        "" => Some(root),
        pointer if pointer.starts_with('/') => root.pointer(pointer),
        anchor => find_anchor(root, anchor),
    }
}

fn find_anchor<'s>(schema: &'s Value, anchor: &str) -> Option<&'s Value> {
    match schema {
        Value::Array(items) => items.iter().find_map(|item| find_anchor(item, anchor)),
        Value::Object(fields) => {
            let named = |field: &str| fields.get(field).and_then(Value::as_str);
            let is_it = named("$anchor") == Some(anchor)
                || named("$dynamicAnchor") == Some(anchor)
                || named("$id").and_then(|id| id.strip_prefix('#')) == Some(anchor);
            if is_it {
                return Some(schema);
            }
            fields.values().find_map(|value| find_anchor(value, anchor))
        }
        _ => None,
    }
}

/// Fetches nothing, even in a build whose validator could.
struct Nowhere;

impl Retrieve for Nowhere {
    fn retrieve(&self, uri: &Uri<String>) -> std::result::Result<Value, Box<dyn std::error::Error + Send + Sync>> {
        Err(format!("{uri} is another document").into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_schema_that_could_not_be_used_safely_is_refused() {
        let check = |schema: Value, words: &str| {
            let error = Schema::new(&schema).err().unwrap_or_else(|| panic!("{schema} was accepted"));
            assert!(error.message().contains(words), "{schema}: {error}");
        };
        check(json!("x"), "a schema is an object");
        check(json!({"type": "nothing"}), "does not compile");
        check(json!({"properties": {"a": {"pattern": "("}}}), "does not compile");
        check(json!({"$ref": "https://example.org/s.json"}), "leads out");
        check(json!({"items": [{"$ref": "file:///etc/passwd"}]}), "leads out");
        check(json!({"$ref": "other.json#/a"}), "leads out");
        check(json!({"properties": {"a": {"$id": "http://x/y"}}}), "at the top only");
        check(json!({"$ref": "#/$defs/nothing"}), "does not compile");
        check(json!({"$ref": "#"}), "circle");
        check(
            json!({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}}}),
            "circle",
        );
        check(json!({"$anchor": "top", "if": {"$ref": "#top"}}), "circle");
        check(json!({"enum": vec![json!([]); 30_000]}), "larger than");
    }

    #[test]
    fn a_schema_may_refer_to_itself_deeper_down() {
        let tree = json!({"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"});
        let schema = Schema::new(&tree).unwrap();
        assert_eq!(schema.document(br#"{"next": {"next": {}}}"#), Ok(()));
        assert_eq!(
            schema.document(br#"{"next": {"next": 1}}"#),
            Err("/next/next breaks /$ref/properties/next/$ref/properties/next/$ref/type".to_owned())
        );
        let draft7 = json!({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "string"}}, "items": {"$ref": "#/definitions/a"}});
        assert!(Schema::new(&draft7).unwrap().document(b"[1]").is_err());
    }

    #[test]
    fn structured_answers_are_validated_and_prose_is_not() {
        let schema = Schema::new(&json!({"type": "object", "required": ["city"]})).unwrap();
        let good = r#"{"city": "Oslo"}"#;
        let forms: [fn(&str) -> Value; 9] = [
            |text| json!({"choices": [{"message": {"role": "assistant", "content": text}}]}),
            |text| json!({"choices": [{"text": "{\"city\":1}"}, {"text": text}]}),
            |text| json!({"type": "message", "role": "assistant", "content": [{"type": "text", "text": text}]}),
            |text| json!({"candidates": [{"content": {"parts": [{"text": "{", "thought": true}, {"text": text}]}}]}),
            |text| json!({"object": "response", "output": [{"type": "reasoning", "content": []}, {"type": "message", "content": [{"type": "output_text", "text": text}]}]}),
            |text| json!({"result": {"response": text}, "success": true, "errors": []}),
            |text| json!({"message": {"role": "assistant", "content": [{"type": "text", "text": text}]}}),
            |text| json!({"generation_id": "x", "text": text}),
            |text| json!({"output": {"message": {"content": [{"text": text}]}}, "stopReason": "end_turn"}),
        ];
        for form in forms {
            let check = |text: &str, expected: bool| {
                let body = form(text).to_string();
                assert_eq!(schema.answer(body.as_bytes()).is_ok(), expected, "{body}");
            };
            check(good, true);
            check("The city is Oslo.", true);
            check("[1] Oslo, a city.", true);
            check("", true);
            check(r#" {"town": "Oslo"}"#, false);
            check(r#"{"city": "Os"#, false);
            check("[1]", false);
        }
        let check = |body: Value, expected: bool| {
            assert_eq!(schema.answer(body.to_string().as_bytes()).is_ok(), expected, "{body}");
        };
        check(json!({"result": {"response": {"city": "Oslo"}}, "success": true}), true);
        check(json!({"result": {"response": {"town": "Oslo"}}, "success": true}), false);
        check(json!({"result": {"data": [[0.1]]}, "success": true}), true);
        check(json!({"object": "list", "data": []}), true);
        let piece = |text: &str| json!({"candidates": [{"content": {"parts": [{"text": text}]}}]});
        check(json!([piece("{\"ci"), piece("ty\": 1}"), {"candidates": [{"finishReason": "STOP"}]}]), true);
        check(json!([piece("{\"to"), piece("wn\": 1}")]), false);
        check(json!([{"generated_text": "{\"city\": 1}"}]), true);
        check(json!([{"generated_text": "{\"town\": 1}"}]), false);
        check(json!({"error": {"message": "no"}}), true);
        check(json!({"choices": [{"message": {"content": null, "tool_calls": [{}]}}]}), true);
        check(json!({"response": null, "tool_calls": [{}]}), true);
        check(json!({"town": "Oslo"}), false);
        check(json!({"city": "Oslo"}), true);
    }
}
