//! The messages of a request: who says what, in which parts.
//!
//!     "text" | [{"type":"text"}, {"type":"image_url"}, {"type":"file"}, {"type":"input_audio"}]  -->  parts
//!     tool_calls, tool_call_id, thinking_blocks                                                 -->  parts as well

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::provider::ask::{Message, Part, Role, Source};

/// Reads the messages of a request.
pub(super) fn messages(list: Option<&Vec<Value>>) -> Result<Vec<Message<'_>>> {
    let list = list.filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| Error::bad_field("messages", "`messages` must be an array with a message in it"))?;
    let mut messages = Vec::with_capacity(list.len());
    for (at, message) in list.iter().enumerate() {
        let path = format!("messages.{at}");
        let role = match message["role"].as_str() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("tool") => Role::Tool,
            _ => {
                let advice = "the role of a message must be system, developer, user, assistant or tool";
                return Err(Error::bad_field(format!("{path}.role"), advice));
            }
        };
        let mut parts = Vec::new();
        if role == Role::Assistant {
            parts.extend(message["thinking_blocks"].as_array().into_iter().flatten().map(Part::Thinking));
        }
        content(&message["content"], &format!("{path}.content"), &mut parts)?;
        match role {
            Role::Assistant => calls(message, &path, &mut parts)?,
            Role::Tool => {
                let id = message["tool_call_id"].as_str().ok_or_else(|| {
                    Error::bad_field(format!("{path}.tool_call_id"), "a tool message needs the id of its call")
                })?;
                let name = called(&messages, id).or(message["name"].as_str());
                parts = vec![Part::Result { id, name, parts }];
            }
            Role::System | Role::User => {}
        }
        messages.push(Message { role, parts });
    }
    // An answer that is to be continued must not end in white space, or so some upstreams hold.
    if let Some(Message { role: Role::Assistant, parts }) = messages.last_mut()
        && let Some(Part::Text { text, .. }) = parts.last_mut()
    {
        *text = text.trim_end();
    }
    Ok(messages)
}

/// The name of the function that a call asked for.
fn called<'a>(messages: &[Message<'a>], wanted: &str) -> Option<&'a str> {
    messages.iter().rev().flat_map(|message| &message.parts).find_map(|part| match part {
        Part::Call { id, name, .. } if *id == wanted => Some(*name),
        _ => None,
    })
}

fn content<'a>(content: &'a Value, path: &str, parts: &mut Vec<Part<'a>>) -> Result<()> {
    match content {
        Value::Null => Ok(()),
        Value::String(text) => {
            parts.push(Part::Text { text, cache: None });
            Ok(())
        }
        Value::Array(list) => {
            for (at, item) in list.iter().enumerate() {
                parts.push(part(item).map_err(|advice| Error::bad_field(format!("{path}.{at}"), advice))?);
            }
            Ok(())
        }
        _ => Err(Error::bad_field(path, "the content of a message must be a string or an array of parts")),
    }
}

/// One part of a message, or what is wrong with it.
fn part(item: &Value) -> Result<Part<'_>, String> {
    let need = |value: &'_ Value, what: &str| format!("{what} is missing or no string: {value}");
    match item["type"].as_str() {
        Some("text" | "input_text" | "output_text") => {
            let text = item["text"].as_str().ok_or_else(|| need(item, "`text`"))?;
            Ok(Part::Text { text, cache: item.get("cache_control") })
        }
        Some("refusal") => {
            let text = item["refusal"].as_str().ok_or_else(|| need(item, "`refusal`"))?;
            Ok(Part::Text { text, cache: None })
        }
        Some("image_url") => {
            let image = &item["image_url"];
            let url = image["url"].as_str().or(image.as_str()).ok_or("`image_url.url` is missing or no string")?;
            Ok(Part::Image { source: source(url)?, detail: image["detail"].as_str() })
        }
        Some("input_audio") => {
            let audio = &item["input_audio"];
            let (data, format) = (audio["data"].as_str(), audio["format"].as_str());
            let (data, format) = data.zip(format).ok_or("`input_audio` needs `data` and `format`")?;
            Ok(Part::Audio { data, format })
        }
        Some("file") => {
            let file = &item["file"];
            let data = file["file_data"].as_str().ok_or("files are taken as `file_data`, a data: URL, only")?;
            Ok(Part::File { data: source(data)?, name: file["filename"].as_str() })
        }
        _ => Err("a part must be text, image_url, input_audio or file".to_owned()),
    }
}

/// A URL as such, or taken apart if it is the data itself.
fn source(url: &str) -> Result<Source<'_>, String> {
    let is_data = url.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"));
    if !is_data {
        return Ok(Source::Url(url));
    }
    let (head, data) = url[5..].split_once(',').ok_or("a data: URL has a comma before its data")?;
    let Some(kind) = head.strip_suffix(";base64") else {
        return Err("a data: URL must be base64 (data:image/png;base64,…)".to_owned());
    };
    let media_type = kind.split(';').next().filter(|kind| kind.contains('/'));
    let media_type = media_type.ok_or("a data: URL must say its media type (data:image/png;base64,…)")?;
    // A name that nobody registered and many write.
    let media_type = if media_type == "image/jpg" { "image/jpeg" } else { media_type };
    Ok(Source::Data { media_type, data })
}

fn calls<'a>(message: &'a Value, path: &str, parts: &mut Vec<Part<'a>>) -> Result<()> {
    for (at, call) in message["tool_calls"].as_array().into_iter().flatten().enumerate() {
        let path = format!("{path}.tool_calls.{at}");
        let function = &call["function"];
        let (Some(id), Some(name)) = (call["id"].as_str(), function["name"].as_str()) else {
            return Err(Error::bad_field(path, "a tool call needs `id` and `function.name`"));
        };
        let written = function["arguments"].as_str().unwrap_or("").trim();
        let arguments = match written {
            "" | "null" => Map::new(),
            written => serde_json::from_str(written).map_err(|error| {
                let advice = format!("the arguments of a call must be a JSON object: {error}");
                Error::bad_field(format!("{path}.function.arguments"), advice)
            })?,
        };
        let signature = call["extra_content"]["google"]["thought_signature"].as_str();
        parts.push(Part::Call { id, name, arguments, written, signature });
    }
    Ok(())
}
