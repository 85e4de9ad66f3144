//! JSON schemas, cut down to what an upstream reads.
//!
//!     open_api   Google: references written out, `null` as `nullable`, keywords that it refuses left out
//!     closed     Anthropic: objects closed, bounds that it refuses left out
//!
//! What is left out only loosens: everything that fitted the schema before still does.

use serde_json::{Map, Value, json};

/// Deeper than this nobody nests; a schema that refers to itself would have no end.
const DEEPEST: usize = 32;
/// More schemas than this are not written out: references can multiply.
const LARGEST: usize = 10_000;

/// The part of OpenAPI's schema language that Google speaks.
pub(super) fn open_api(schema: &Value) -> Value {
    convert(schema, &mut Root { document: schema, left: LARGEST }, 0)
}

/// What references point into, and how many schemas may still be written.
struct Root<'a> {
    document: &'a Value,
    left: usize,
}

fn convert(schema: &Value, root: &mut Root, depth: usize) -> Value {
    root.left = root.left.saturating_sub(1);
    let Some(fields) = schema.as_object().filter(|_| depth < DEEPEST && root.left > 0) else {
        // `true`, or too much to tell.
        return json!({"type": "object"});
    };
    if let Some(target) = fields.get("$ref").and_then(Value::as_str) {
        let target = target.strip_prefix('#').and_then(|pointer| root.document.pointer(pointer));
        let mut found = match target {
            Some(target) => convert(target, root, depth + 1),
            None => json!({"type": "object"}),
        };
        if let Some(description) = fields.get("description") {
            found["description"] = description.clone();
        }
        return found;
    }
    let mut out = Map::new();
    if let Some(all) = fields.get("allOf").and_then(Value::as_array) {
        for part in all {
            if let Value::Object(part) = convert(part, root, depth + 1) {
                merge(&mut out, part);
            }
        }
    }
    for (key, value) in fields {
        match (key.as_str(), value) {
            ("type", Value::Array(types)) => one_type(types, &mut out),
            ("type", _) if value == "null" => {
                out.insert("nullable".into(), true.into());
            }
            ("anyOf" | "oneOf", Value::Array(options)) => alternatives(options, root, depth, &mut out),
            ("properties", Value::Object(properties)) => {
                let known = out.entry("properties").or_insert_with(|| json!({}));
                for (name, property) in properties {
                    known[name] = convert(property, root, depth + 1);
                }
            }
            ("items", Value::Object(_)) => {
                out.insert(key.clone(), convert(value, root, depth + 1));
            }
            ("const", Value::String(_)) => {
                out.insert("enum".into(), json!([value]));
                out.entry("type").or_insert_with(|| "string".into());
            }
            // Only strings can be enumerated.
            ("enum", Value::Array(values)) => {
                let words: Vec<_> = values.iter().filter(|value| value.is_string()).cloned().collect();
                if words.len() == values.iter().filter(|value| !value.is_null()).count() && !words.is_empty() {
                    out.insert(key.clone(), words.into());
                    out.entry("type").or_insert_with(|| "string".into());
                }
                if values.iter().any(Value::is_null) {
                    out.insert("nullable".into(), true.into());
                }
            }
            ("format", Value::String(format)) => {
                if matches!(format.as_str(), "date-time" | "enum" | "float" | "double" | "int32" | "int64") {
                    out.insert(key.clone(), value.clone());
                }
            }
            (
                "type" | "title" | "description" | "nullable" | "minItems" | "maxItems" | "required" | "minProperties"
                | "maxProperties" | "minimum" | "maximum" | "minLength" | "maxLength" | "pattern" | "propertyOrdering",
                _,
            ) => {
                out.insert(key.clone(), value.clone());
            }
            _ => {}
        }
    }
    // What is required must be there to be required.
    if let Some(Value::Array(required)) = out.get("required") {
        let known = |name: &&Value| name.as_str().is_some_and(|name| out["properties"].get(name).is_some());
        let required: Vec<_> =
            if out.contains_key("properties") { required.iter().filter(known).cloned().collect() } else { Vec::new() };
        if required.is_empty() {
            out.remove("required");
        } else {
            out.insert("required".into(), required.into());
        }
    }
    if !out.contains_key("type") && out.contains_key("properties") {
        out.insert("type".into(), "object".into());
    }
    Value::Object(out)
}

/// Several types at once: `null` becomes a flag, several others alternatives.
fn one_type(types: &[Value], out: &mut Map<String, Value>) {
    let others: Vec<_> = types.iter().filter(|kind| *kind != "null").collect();
    if others.len() < types.len() {
        out.insert("nullable".into(), true.into());
    }
    match others[..] {
        [] => {}
        [one] => {
            out.insert("type".into(), one.clone());
        }
        _ => {
            let options: Vec<_> = others.into_iter().map(|kind| json!({ "type": kind })).collect();
            out.insert("anyOf".into(), options.into());
        }
    }
}

fn alternatives(options: &[Value], root: &mut Root, depth: usize, out: &mut Map<String, Value>) {
    let is_null = |option: &&Value| option["type"] == "null";
    let mut others: Vec<_> =
        options.iter().filter(|option| !is_null(option)).map(|option| convert(option, root, depth + 1)).collect();
    if others.len() < options.len() {
        out.insert("nullable".into(), true.into());
    }
    match (others.len(), others.pop()) {
        (1, Some(Value::Object(only))) => merge(out, only),
        (_, Some(last)) => {
            others.push(last);
            out.insert("anyOf".into(), others.into());
        }
        (_, None) => {}
    }
}

fn merge(out: &mut Map<String, Value>, more: Map<String, Value>) {
    for (key, value) in more {
        match (out.get_mut(&key), value) {
            (Some(Value::Object(known)), Value::Object(value)) if key == "properties" => known.extend(value),
            (Some(Value::Array(known)), Value::Array(value)) if key == "required" => known.extend(value),
            (Some(_), _) if key == "description" => {}
            (_, value) => {
                out.insert(key, value);
            }
        }
    }
}

/// The part of JSON schema that Anthropic's output format takes: closed objects without bounds on their values.
pub(super) fn closed(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let mut out = Map::new();
            for (key, value) in fields {
                match (key.as_str(), value) {
                    (
                        "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" | "minLength"
                        | "maxLength" | "maxItems" | "uniqueItems" | "minProperties" | "maxProperties",
                        _,
                    ) => {}
                    ("minItems", count) if count.as_u64().is_none_or(|count| count > 1) => {}
                    // Names are the caller's own here, whatever they look like.
                    ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                        let named = named.iter().map(|(name, value)| (name.clone(), closed(value)));
                        out.insert(key.clone(), Value::Object(named.collect()));
                    }
                    ("enum" | "const" | "default" | "examples" | "required", _) => {
                        out.insert(key.clone(), value.clone());
                    }
                    _ => {
                        out.insert(key.clone(), closed(value));
                    }
                }
            }
            if fields.get("type").is_some_and(|kind| kind == "object") || fields.contains_key("properties") {
                out.insert("additionalProperties".into(), false.into());
            }
            Value::Object(out)
        }
        Value::Array(list) => list.iter().map(closed).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn google_gets_what_it_understands() {
        for (schema, expected) in [
            (
                json!({"$schema": "x", "type": "object", "additionalProperties": false, "properties": {"a": {"type": "string", "format": "uuid", "minLength": 1}}, "required": ["a", "b"]}),
                json!({"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}, "required": ["a"]}),
            ),
            (json!({"type": ["string", "null"]}), json!({"nullable": true, "type": "string"})),
            (json!({"type": ["string", "integer"]}), json!({"anyOf": [{"type": "string"}, {"type": "integer"}]})),
            (
                json!({"anyOf": [{"type": "number"}, {"type": "null"}], "description": "d"}),
                json!({"nullable": true, "type": "number", "description": "d"}),
            ),
            (
                json!({"oneOf": [{"const": "x"}, {"enum": [1, 2]}]}),
                json!({"anyOf": [{"enum": ["x"], "type": "string"}, {}]}),
            ),
            (
                json!({"$defs": {"p": {"type": "object", "properties": {"x": {"type": "integer", "exclusiveMinimum": 0}}}}, "type": "array", "items": {"$ref": "#/$defs/p"}}),
                json!({"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}}),
            ),
            (
                json!({"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}}]}),
                json!({"properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a"], "type": "object"}),
            ),
            (json!({"$ref": "#/nowhere"}), json!({"type": "object"})),
        ] {
            assert_eq!(open_api(&schema), expected, "{schema}");
        }
    }

    #[test]
    fn a_schema_that_refers_to_itself_has_an_end() {
        let tree = json!({"type": "object", "properties": {"next": {"$ref": "#"}}});
        assert_eq!(open_api(&tree)["properties"]["next"]["properties"]["next"]["type"], "object");
        let many =
            json!({"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}, "c": {"$ref": "#"}}});
        assert!(open_api(&many).to_string().len() < 1 << 20);
        let knot = json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"});
        assert_eq!(open_api(&knot), json!({"type": "object"}));
    }

    #[test]
    fn objects_are_closed_and_bounds_left_out() {
        let schema = json!({
            "type": "object",
            "properties": {"minimum": {"type": "integer", "minimum": 1, "enum": [1]}, "o": {"properties": {}}},
            "required": ["minimum"],
            "minItems": 1,
        });
        let expected = json!({
            "type": "object",
            "properties": {"minimum": {"type": "integer", "enum": [1]}, "o": {"properties": {}, "additionalProperties": false}},
            "required": ["minimum"],
            "minItems": 1,
            "additionalProperties": false,
        });
        assert_eq!(closed(&schema), expected);
    }
}
