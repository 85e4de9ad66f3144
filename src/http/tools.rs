//! Tools in requests: what is offered, how free the model is, and the calls and results of earlier turns, in every shape
//! that clients send them in.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::http::fields::{Fields, mismatch};
use crate::task::{Message, Role, Tool, ToolCall, ToolChoice, Tools};

/// Most tools of a request, as OpenAI has it.
const MAX_TOOLS: usize = 128;
/// Longest name.
const MAX_NAME: usize = 64;
/// Bytes of all tools together: they become part of the prompt, and of a grammar where calls are forced.
const MAX_BYTES: usize = 256 << 10;
/// Most calls of one turn.
const MAX_CALLS: usize = 128;

/// `tools`, `tool_choice` and `parallel_tool_calls`. None: the request has nothing to do with tools.
pub(super) fn offered(fields: &Fields) -> Result<Option<Arc<Tools>>> {
    fields.refuse("functions", "Functions with code are not run here: offer them as `tools` and send back results.")?;
    fields.refuse("function_call", "`function_call` is not known any more: use `tools` and `tool_choice`.")?;
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    let values = fields.array("tools")?.unwrap_or_default();
    if values.len() > MAX_TOOLS {
        return Err(fields.wrong("tools", &format!("may hold at most {MAX_TOOLS} tools, not {}", values.len())));
    }
    let path = fields.path("tools");
    let (mut list, mut names, mut bytes) = (Vec::new(), HashSet::new(), 0);
    for (i, value) in values.iter().enumerate() {
        let item = Fields::at(value, format!("{path}.{i}"))?;
        let (tool, at) = tool(&item)?;
        if !names.insert(tool.name.clone()) {
            return Err(at.wrong("name", &format!("is {:?}, which another tool is called already", tool.name)));
        }
        bytes += tool.to_json().to_string().len();
        if bytes > MAX_BYTES {
            return Err(fields.wrong("tools", &format!("may have at most {MAX_BYTES} bytes in all; shorten them")));
        }
        list.push(tool);
    }
    let choice = choice(fields, &names)?;
    Ok((!list.is_empty()).then(|| Arc::new(Tools { list, choice, parallel })))
}

/// One tool, and the object that describes its function: `{"type": "function", "function": {…}}` or flat.
fn tool<'a>(item: &Fields<'a>) -> Result<(Tool, Fields<'a>)> {
    match item.text("type")? {
        None | Some("function") => {}
        Some(kind) => {
            let kind: String = kind.chars().take(MAX_NAME).collect();
            let message = format!("Tools of the type `{kind}` are not available: offer functions.");
            return Err(Error::unsupported(message).with_param(item.path("type")));
        }
    }
    let at = item.object("function")?.unwrap_or_else(|| item.clone());
    let name = at.required_text("name")?;
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(in_name) {
        return Err(at.wrong("name", &format!("must have 1 to {MAX_NAME} letters, digits, `_` or `-`")));
    }
    let parameters = match at.get("parameters") {
        None => Map::from_iter([("type".to_owned(), json!("object")), ("properties".to_owned(), json!({}))]),
        Some(Value::Object(schema)) => schema.clone(),
        Some(other) => return Err(mismatch(&at.path("parameters"), "a JSON Schema, which is an object", other)),
    };
    if parameters.get("type").is_some_and(|kind| kind != "object") {
        return Err(at.wrong("parameters", "must describe an object: its `type` is \"object\""));
    }
    let tool = Tool {
        name: name.to_owned(),
        description: at.text("description")?.unwrap_or_default().to_owned(),
        parameters,
        strict: at.bool("strict")?.unwrap_or(false),
    };
    Ok((tool, at))
}

fn in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// `"auto"`, `"none"`, `"required"`, `{"type": "function", "function": {"name"}}` or the same flat.
fn choice(fields: &Fields, names: &HashSet<String>) -> Result<ToolChoice> {
    const EXPECTED: &str = "must be auto, none, required or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let choice = match fields.get("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            _ => return Err(fields.wrong("tool_choice", EXPECTED)),
        },
        Some(Value::Object(_)) => {
            let Some(object) = fields.object("tool_choice")? else { return Ok(ToolChoice::Auto) };
            if object.text("type")?.is_some_and(|kind| kind != "function") {
                return Err(object.wrong("type", "must be `function`"));
            }
            let at = object.object("function")?.unwrap_or_else(|| object.clone());
            let name = at.required_text("name")?;
            if !names.contains(name) {
                return Err(at.wrong("name", "is none of the `tools`"));
            }
            ToolChoice::Named(name.to_owned())
        }
        Some(_) => return Err(fields.wrong("tool_choice", EXPECTED)),
    };
    if names.is_empty() && choice == ToolChoice::Required {
        return Err(fields.wrong("tool_choice", "asks for a call, but there are no `tools`"));
    }
    Ok(choice)
}

/// The calls of an assistant's turn in OpenAI's shape, whether they came in it or in Cloudflare's.
pub(super) fn calls(fields: &Fields) -> Result<Option<Value>> {
    let values = match fields.array("tool_calls")? {
        None | Some([]) => return Ok(None),
        Some(values) => values,
    };
    if values.len() > MAX_CALLS {
        return Err(fields.wrong("tool_calls", &format!("may hold at most {MAX_CALLS} calls")));
    }
    let path = fields.path("tool_calls");
    let calls = values.iter().enumerate().map(|(i, value)| {
        let item = Fields::at(value, format!("{path}.{i}"))?;
        let at = item.object("function")?.unwrap_or_else(|| item.clone());
        Ok(call(item.text("id")?.unwrap_or_default(), at.required_text("name")?, arguments(&at)?))
    });
    Ok(Some(Value::Array(calls.collect::<Result<_>>()?)))
}

/// A call in OpenAI's shape. An empty id is one to be made up.
pub(super) fn call(id: &str, name: &str, arguments: Value) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

/// Arguments as they were sent: an object, or its JSON text.
pub(super) fn arguments(at: &Fields) -> Result<Value> {
    match at.get("arguments") {
        None => Ok(json!({})),
        Some(value @ (Value::Object(_) | Value::String(_))) => Ok(value.clone()),
        Some(other) => Err(mismatch(&at.path("arguments"), "an object or its JSON text", other)),
    }
}

/// Joins results to their calls where the client has left that open: calls without an id get one, results without one
/// belong to the oldest call that has no result yet, and results know the name of their function.
pub(super) fn link(messages: &mut [Message]) {
    // Calls that have no result yet, with their functions' names.
    let mut open: Vec<(String, String)> = Vec::new();
    for (turn, message) in messages.iter_mut().enumerate() {
        for (at, call) in message.tool_calls.iter_mut().filter_map(Value::as_array_mut).flatten().enumerate() {
            if call["id"] == "" {
                // Nine letters and digits: the form that the strictest templates want.
                call["id"] = Value::from(format!("c{:04}{:04}", turn % 10_000, at));
            }
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            open.push((text(&call["id"]), text(&call["function"]["name"])));
        }
        if message.role != Role::Tool || open.is_empty() {
            continue;
        }
        let mine = match (&message.tool_call_id, &message.name) {
            (Some(id), _) => open.iter().position(|(call, _)| call == id),
            (None, Some(name)) => open.iter().position(|(_, function)| function == name).or(Some(0)),
            (None, None) => Some(0),
        };
        if let Some((id, name)) = mine.map(|mine| open.remove(mine)) {
            message.tool_call_id.get_or_insert(id);
            message.name.get_or_insert(name);
        }
    }
}

/// A call as OpenAI's surfaces write it.
pub(super) fn function_call(call: &ToolCall) -> Value {
    self::call(&call.id, &call.name, Value::from(call.arguments.as_str()))
}

/// Arguments as an object. None where the answer was cut inside, or the model wrote no JSON.
pub(super) fn object(call: &ToolCall) -> Option<Map<String, Value>> {
    serde_json::from_str(&call.arguments).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Kind;

    fn read(body: Value) -> Result<Option<Arc<Tools>>> {
        offered(&Fields::of(&body).unwrap())
    }

    fn weather() -> Value {
        json!({"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}})
    }

    #[test]
    fn tools_are_read_in_both_shapes() {
        let flat = read(json!({ "tools": [weather()] })).unwrap().unwrap();
        let nested = read(json!({"tools": [{"type": "function", "function": weather()}]})).unwrap().unwrap();
        let responses =
            read(json!({"tools": [{"type": "function", "name": "weather", "description": "Now.", "strict": null,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]}));
        assert_eq!((&flat, &nested), (&nested, &responses.unwrap().unwrap()));
        assert_eq!((flat.choice.clone(), flat.parallel, flat.list[0].strict), (ToolChoice::Auto, true, false));
        let bare = read(json!({"tools": [{"name": "now"}], "parallel_tool_calls": false})).unwrap().unwrap();
        assert_eq!(Value::Object(bare.list[0].parameters.clone()), json!({"type": "object", "properties": {}}));
        assert!(!bare.parallel);
        for nothing in [json!({}), json!({"tools": null}), json!({"tools": [], "tool_choice": "auto", "functions": []})]
        {
            assert_eq!(read(nothing).unwrap(), None);
        }
    }

    #[test]
    fn a_choice_is_a_word_or_a_function() {
        let check = |choice: Value, expected: ToolChoice| {
            let tools = read(json!({"tools": [weather()], "tool_choice": choice})).unwrap().unwrap();
            assert_eq!(tools.choice, expected);
        };
        check(json!("auto"), ToolChoice::Auto);
        check(json!("none"), ToolChoice::None);
        check(json!("required"), ToolChoice::Required);
        check(json!({"type": "function", "function": {"name": "weather"}}), ToolChoice::Named("weather".into()));
        check(json!({"type": "function", "name": "weather"}), ToolChoice::Named("weather".into()));
    }

    #[test]
    fn what_is_wrong_is_said_by_field() {
        let check = |body: Value, kind: Kind, param: &str| {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!((error.kind(), error.param()), (kind, Some(param)), "{body}: {error}");
        };
        let bad = |body: Value, param: &str| check(body, Kind::BadInput, param);
        let tool = |change: Value| {
            let mut tool = weather();
            tool.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            json!({ "tools": [{ "type": "function", "function": tool }] })
        };
        bad(json!({"tools": "weather"}), "tools");
        bad(json!({"tools": [1]}), "tools.0");
        bad(json!({"tools": [{"type": "function"}]}), "tools.0.name");
        bad(tool(json!({"name": "two words"})), "tools.0.function.name");
        bad(tool(json!({"name": ""})), "tools.0.function.name");
        bad(tool(json!({"name": "x".repeat(65)})), "tools.0.function.name");
        bad(tool(json!({"description": 1})), "tools.0.function.description");
        bad(tool(json!({"parameters": "none"})), "tools.0.function.parameters");
        bad(tool(json!({"parameters": {"type": "string"}})), "tools.0.function.parameters");
        bad(tool(json!({"strict": "yes"})), "tools.0.function.strict");
        bad(json!({"tools": [weather(), {"type": "function", "function": weather()}]}), "tools.1.function.name");
        bad(json!({"tools": (0..129).map(|i| json!({"name": format!("t{i}")})).collect::<Vec<_>>()}), "tools");
        bad(tool(json!({"description": "x".repeat(MAX_BYTES)})), "tools");
        bad(json!({"tools": [weather()], "tool_choice": "maybe"}), "tool_choice");
        bad(json!({"tools": [weather()], "tool_choice": 1}), "tool_choice");
        bad(
            json!({"tools": [weather()], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
            "tool_choice.function.name",
        );
        bad(json!({"tools": [weather()], "tool_choice": {"type": "custom"}}), "tool_choice.type");
        bad(json!({"tool_choice": "required"}), "tool_choice");
        bad(json!({"tool_choice": {"type": "function", "name": "x"}}), "tool_choice.name");
        bad(json!({"tools": [weather()], "parallel_tool_calls": 1}), "parallel_tool_calls");
        check(json!({"tools": [{"type": "web_search"}]}), Kind::Unsupported, "tools.0.type");
        check(json!({"functions": [{"name": "f", "code": "x"}]}), Kind::Unsupported, "functions");
    }

    #[test]
    fn results_find_their_calls() {
        let turn = |calls: Value| Message { tool_calls: Some(calls), ..Message::new(Role::Assistant, "") };
        let result = |id: Option<&str>, name: Option<&str>| Message {
            tool_call_id: id.map(str::to_owned),
            name: name.map(str::to_owned),
            ..Message::new(Role::Tool, "x")
        };
        let calls = json!([call("", "a", json!({})), call("", "b", json!({})), call("given", "c", json!({}))]);
        let mut messages = vec![
            turn(calls),
            result(Some("given"), None),
            result(None, Some("b")),
            result(None, None),
            result(Some("unknown"), None),
            turn(json!([call("", "a", json!({}))])),
            result(None, None),
        ];
        link(&mut messages);
        let found: Vec<_> = messages
            .iter()
            .filter(|m| m.role == Role::Tool)
            .map(|m| (m.tool_call_id.as_deref(), m.name.as_deref()))
            .collect();
        assert_eq!(
            found,
            [
                (Some("given"), Some("c")),
                (Some("c00000001"), Some("b")),
                (Some("c00000000"), Some("a")),
                (Some("unknown"), None),
                (Some("c00050000"), Some("a")),
            ]
        );
    }
}
