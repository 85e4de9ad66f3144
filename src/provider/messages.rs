//! Anthropic's Messages as a surface for clients: whoever speaks it can be answered by anybody who speaks OpenAI's chat.
//!
//!     Messages request  --to_openai-->  chat request        failure     error body  -->  Anthropic's shape
//!     message           <--answer-----  chat.completion     Translator  chunks      -->  message_start … message_stop
//!
//! Left out without a word: `cache_control` and thoughts of earlier turns, which nobody else can read. Tools that
//! Anthropic itself runs are refused by name.

mod reply;

pub use reply::{Translator, answer, failure, ping};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::base::{Error, Result};

/// A Messages request as an OpenAI chat request. The model stays as it is named.
///
/// # Errors
/// `BadInput` naming the field that is malformed or has no counterpart.
pub fn to_openai(body: &[u8]) -> Result<Bytes> {
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| Error::bad_input(format!("the body is not a JSON object: {error}")))?;
    let fields = body.as_object().ok_or_else(|| Error::bad_input("the body is not a JSON object"))?;
    let model = fields.get("model").and_then(Value::as_str);
    let model = model.ok_or_else(|| Error::bad_field("model", "`model` is missing or no string"))?;
    if fields.get("mcp_servers").and_then(Value::as_array).is_some_and(|servers| !servers.is_empty()) {
        return Err(Error::bad_field("mcp_servers", "`mcp_servers` run at Anthropic only: leave them out"));
    }
    let mut out = Map::new();
    out.insert("model".into(), model.into());
    out.insert("messages".into(), messages(fields)?.into());
    let max_tokens = fields.get("max_tokens").filter(|max_tokens| max_tokens.is_u64());
    let max_tokens = max_tokens.ok_or_else(|| Error::bad_field("max_tokens", "`max_tokens` must be a whole number"))?;
    out.insert(length_field(model).into(), max_tokens.clone());
    for (name, theirs) in
        [("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"), ("stop_sequences", "stop")]
    {
        if let Some(value) = fields.get(name).filter(|value| !value.is_null()) {
            out.insert(theirs.into(), value.clone());
        }
    }
    tools(fields, &mut out)?;
    if let Some(effort) = effort(fields) {
        out.insert("reasoning_effort".into(), effort.into());
    }
    let format = fields.get("output_config").and_then(|config| config.get("format")).or(fields.get("output_format"));
    if let Some(schema) = format.and_then(|format| format.get("schema")) {
        let wrapped = json!({"name": "answer", "schema": schema, "strict": true});
        out.insert("response_format".into(), json!({"type": "json_schema", "json_schema": wrapped}));
    }
    if let Some(user) = fields.get("metadata").and_then(|metadata| metadata["user_id"].as_str()) {
        out.insert("user".into(), user.into());
    }
    if fields.get("stream") == Some(&Value::Bool(true)) {
        out.insert("stream".into(), true.into());
        // A message ends with what it used.
        out.insert("stream_options".into(), json!({"include_usage": true}));
    }
    Ok(Value::Object(out).to_string().into())
}

/// OpenAI's reasoning models know the limit by its newer name only, many others by its older one only.
fn length_field(model: &str) -> &'static str {
    let name = model.rsplit('/').next().unwrap_or(model);
    let newer = ["o1", "o3", "o4", "gpt-5", "gpt-6"].iter().any(|family| name.starts_with(family));
    if newer { "max_completion_tokens" } else { "max_tokens" }
}

/// How hard to think, in OpenAI's words.
fn effort(fields: &Map<String, Value>) -> Option<&'static str> {
    let said = fields.get("output_config").and_then(|config| config["effort"].as_str());
    let thinking = fields.get("thinking")?;
    let budget = thinking["budget_tokens"].as_u64();
    match (thinking["type"].as_str()?, said, budget) {
        ("disabled", ..) => None,
        (_, Some("low"), _) => Some("low"),
        (_, Some("high" | "xhigh" | "max"), _) => Some("high"),
        (_, _, Some(..=4095)) => Some("low"),
        (_, _, Some(16_384..)) => Some("high"),
        _ => Some("medium"),
    }
}

fn tools(fields: &Map<String, Value>, out: &mut Map<String, Value>) -> Result<()> {
    let list = fields.get("tools").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if list.is_empty() {
        return Ok(());
    }
    let mut tools = Vec::with_capacity(list.len());
    for (at, tool) in list.iter().enumerate() {
        if let Some(kind) = tool["type"].as_str().filter(|kind| *kind != "custom") {
            let advice = format!("tools of type `{kind}` run at Anthropic only: leave it out");
            return Err(Error::bad_field(format!("tools.{at}.type"), advice));
        }
        let name = tool["name"].as_str();
        let name = name.ok_or_else(|| Error::bad_field(format!("tools.{at}.name"), "a tool needs a name"))?;
        let mut function = json!({ "name": name });
        if let Some(description) = tool.get("description").filter(|description| description.is_string()) {
            function["description"] = description.clone();
        }
        function["parameters"] = match &tool["input_schema"] {
            Value::Null => json!({"type": "object", "properties": {}}),
            schema => schema.clone(),
        };
        if tool["strict"] == true {
            function["strict"] = true.into();
        }
        tools.push(json!({"type": "function", "function": function}));
    }
    out.insert("tools".into(), tools.into());
    let Some(choice) = fields.get("tool_choice").filter(|choice| !choice.is_null()) else { return Ok(()) };
    let theirs = match (choice["type"].as_str(), choice["name"].as_str()) {
        (Some("auto"), _) => "auto".into(),
        (Some("any"), _) => "required".into(),
        (Some("none"), _) => "none".into(),
        (Some("tool"), Some(name)) => json!({"type": "function", "function": {"name": name}}),
        _ => {
            return Err(Error::bad_field(
                "tool_choice",
                "`tool_choice.type` must be auto, any, none, or tool with a name",
            ));
        }
    };
    out.insert("tool_choice".into(), theirs);
    if choice["disable_parallel_tool_use"] == true {
        out.insert("parallel_tool_calls".into(), false.into());
    }
    Ok(())
}

fn messages(fields: &Map<String, Value>) -> Result<Vec<Value>> {
    let mut out = Vec::new();
    match fields.get("system") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) if text.is_empty() => {}
        Some(Value::String(text)) => out.push(json!({"role": "system", "content": text})),
        Some(Value::Array(blocks)) => {
            let texts: Vec<_> = blocks.iter().filter_map(|block| block["text"].as_str()).collect();
            if !texts.is_empty() {
                out.push(json!({"role": "system", "content": texts.join("\n\n")}));
            }
        }
        Some(_) => return Err(Error::bad_field("system", "`system` must be a string or an array of text blocks")),
    }
    let list = fields.get("messages").and_then(Value::as_array).filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| Error::bad_field("messages", "`messages` must be an array with a message in it"))?;
    for (at, message) in list.iter().enumerate() {
        let path = format!("messages.{at}");
        let blocks = match &message["content"] {
            Value::String(text) => vec![json!({"type": "text", "text": text})],
            Value::Array(blocks) => blocks.clone(),
            _ => {
                let advice = "the content of a message must be a string or an array of blocks";
                return Err(Error::bad_field(format!("{path}.content"), advice));
            }
        };
        match message["role"].as_str() {
            Some("user") => user(&blocks, &path, &mut out)?,
            Some("assistant") => out.push(assistant(&blocks)),
            Some("system") => {
                let texts: Vec<_> = blocks.iter().filter_map(|block| block["text"].as_str()).collect();
                out.push(json!({"role": "system", "content": texts.join("\n\n")}));
            }
            _ => {
                return Err(Error::bad_field(
                    format!("{path}.role"),
                    "the role of a message must be user or assistant",
                ));
            }
        }
    }
    Ok(out)
}

/// What the user says, after the results of tools, each a message of its own.
fn user(blocks: &[Value], path: &str, out: &mut Vec<Value>) -> Result<()> {
    let mut parts = Vec::new();
    for (at, block) in blocks.iter().enumerate() {
        let path = format!("{path}.content.{at}");
        if block["type"] != "tool_result" {
            parts.push(part(block, &path)?);
            continue;
        }
        let id = block["tool_use_id"].as_str();
        let id =
            id.ok_or_else(|| Error::bad_field(format!("{path}.tool_use_id"), "a result needs the id of its call"))?;
        let mut text = String::new();
        match &block["content"] {
            Value::String(said) => text.push_str(said),
            Value::Array(inner) => {
                for (at, inner) in inner.iter().enumerate() {
                    match inner["text"].as_str() {
                        Some(said) => text.push_str(said),
                        // Tools answer in words there; what they show follows as the user's.
                        None => parts.push(part(inner, &format!("{path}.content.{at}"))?),
                    }
                }
            }
            _ => {}
        }
        if block["is_error"] == true {
            text.insert_str(0, "Error: ");
        }
        out.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
    }
    match parts.as_slice() {
        [] => {}
        [only] if only["type"] == "text" => out.push(json!({"role": "user", "content": only["text"]})),
        _ => out.push(json!({"role": "user", "content": parts})),
    }
    Ok(())
}

fn part(block: &Value, path: &str) -> Result<Value> {
    let refuse = |advice: &str| Err(Error::bad_field(path, advice));
    let source = &block["source"];
    let media_type = source["media_type"].as_str().unwrap_or("");
    let data = source["data"].as_str().or(source["url"].as_str()).unwrap_or("");
    match (block["type"].as_str(), source["type"].as_str()) {
        (Some("text"), _) => match &block["text"] {
            Value::String(text) => Ok(json!({"type": "text", "text": text})),
            _ => refuse("a text block needs `text`"),
        },
        (Some("image"), Some("base64")) => {
            let url = format!("data:{media_type};base64,{data}");
            Ok(json!({"type": "image_url", "image_url": {"url": url}}))
        }
        (Some("image"), Some("url")) => Ok(json!({"type": "image_url", "image_url": {"url": data}})),
        (Some("document"), Some("text")) => Ok(json!({"type": "text", "text": data})),
        (Some("document"), Some("base64")) => {
            let name = block["title"].as_str().unwrap_or("document.pdf");
            let url = format!("data:{media_type};base64,{data}");
            Ok(json!({"type": "file", "file": {"filename": name, "file_data": url}}))
        }
        (Some("search_result"), _) => {
            let found = block["content"].as_array().into_iter().flatten().filter_map(|block| block["text"].as_str());
            let text: Vec<_> = block["title"].as_str().into_iter().chain(source.as_str()).chain(found).collect();
            Ok(json!({"type": "text", "text": text.join("\n")}))
        }
        (Some("image" | "document"), _) => refuse("images and documents are taken in base64, images by URL as well"),
        _ => refuse("a block must be text, image, document, search_result or tool_result"),
    }
}

fn assistant(blocks: &[Value]) -> Value {
    let mut text = String::new();
    let mut calls = Vec::new();
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => text.push_str(block["text"].as_str().unwrap_or("")),
            Some("tool_use") => {
                let arguments = match &block["input"] {
                    Value::Null => "{}".to_owned(),
                    input => input.to_string(),
                };
                calls.push(json!({
                    "id": block["id"],
                    "type": "function",
                    "function": {"name": block["name"], "arguments": arguments},
                }));
            }
            // Thoughts, and what ran at Anthropic.
            _ => {}
        }
    }
    let mut message = json!({"role": "assistant"});
    message["content"] = if text.is_empty() && !calls.is_empty() { Value::Null } else { text.into() };
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    message
}

#[cfg(test)]
mod tests;
