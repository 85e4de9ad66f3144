//! Cohere's chat, version 2: requests. Answers are in `cohere/reply.rs`.
//!
//! Closest to OpenAI of all: roles and tools are the same words. What a model says beside its calls is a `tool_plan` there.
//!
//!     tool_choice        ->  `REQUIRED` or `NONE`; a named tool is the only one offered
//!     response_format    ->  `json_object`, with the schema if there is one

mod reply;

pub(super) use reply::{Stream, answer};

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::provider::ask::{Ask, Beyond, Choice, Effort, Format, Message, Part, Role, Source};

/// The body of a request.
pub(super) fn request(model: &str, ask: &Ask) -> Result<Value> {
    ask.refuse("Cohere", &[Beyond::Choices, Beyond::OneCall, Beyond::Audio])?;
    if ask.logprobs.is_some_and(|rivals| rivals > 0) {
        return Err(Error::bad_field("top_logprobs", "Cohere names no rivals of a token: leave out `top_logprobs`"));
    }
    let mut body = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            body.insert(name.to_owned(), value);
        }
    };
    set("model", Some(model.into()));
    let mut messages = Vec::with_capacity(ask.messages.len());
    for message in &ask.messages {
        messages.extend(self::message(message)?);
    }
    set("messages", Some(messages.into()));
    let named = |name: &str| !matches!(ask.choice, Choice::Named(only) if only != name);
    let tools: Vec<_> = ask.tools.iter().filter(|tool| named(tool.name)).collect();
    if !tools.is_empty() {
        let tools = tools.into_iter().map(|tool| {
            let mut function = json!({ "name": tool.name });
            if let Some(description) = tool.description {
                function["description"] = description.into();
            }
            function["parameters"] = tool.schema();
            json!({"type": "function", "function": function})
        });
        set("tools", Some(tools.collect()));
        set(
            "tool_choice",
            match ask.choice {
                Choice::Auto => None,
                Choice::None => Some("NONE".into()),
                Choice::Required | Choice::Named(_) => Some("REQUIRED".into()),
            },
        );
    }
    set(
        "response_format",
        match ask.format {
            Format::Text => None,
            Format::Object => Some(json!({"type": "json_object"})),
            Format::Schema { schema, .. } => Some(json!({"type": "json_object", "schema": schema})),
        },
    );
    set("max_tokens", ask.max_tokens.map(Value::from));
    set("temperature", ask.temperature.map(Value::from));
    // All of the probability is what happens anyway, and not a value that is taken.
    set("p", ask.top_p.filter(|top_p| *top_p < 1.0).map(|top_p| top_p.clamp(0.01, 0.99).into()));
    set("k", ask.top_k.map(Value::from));
    set("seed", ask.seed.map(Value::from));
    set("presence_penalty", ask.presence_penalty.map(Value::from));
    set("frequency_penalty", ask.frequency_penalty.map(Value::from));
    set("stop_sequences", (!ask.stop.is_empty()).then(|| json!(ask.stop)));
    set("logprobs", ask.logprobs.map(|_| true.into()));
    set("thinking", ask.effort.filter(|_| model.contains("reasoning")).map(thinking));
    set("stream", ask.stream.then(|| true.into()));
    Ok(Value::Object(body))
}

fn thinking(effort: Effort) -> Value {
    let budget = match effort {
        Effort::None => return json!({"type": "disabled"}),
        Effort::Minimal | Effort::Low => 1024,
        Effort::Medium => 8192,
        Effort::High | Effort::XHigh => 24_576,
    };
    json!({"type": "enabled", "token_budget": budget})
}

/// A message; none where nothing of it is left.
fn message(message: &Message) -> Result<Option<Value>> {
    let role = match message.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => return Ok(assistant(message)),
        Role::Tool => return tool(message).map(Some),
    };
    Ok(Some(json!({"role": role, "content": content(&message.parts)?})))
}

fn content(parts: &[Part]) -> Result<Value> {
    if let [Part::Text { text, .. }] = parts {
        return Ok((*text).into());
    }
    let parts = parts.iter().map(|part| match part {
        Part::Text { text, .. } => Ok(json!({"type": "text", "text": text})),
        Part::Image { source, detail } => {
            let url = match source {
                Source::Url(url) => (*url).to_owned(),
                Source::Data { media_type, data } => format!("data:{media_type};base64,{data}"),
            };
            let mut image = json!({ "url": url });
            if let Some(detail) = detail {
                image["detail"] = (*detail).into();
            }
            Ok(json!({"type": "image_url", "image_url": image}))
        }
        _ => Err(Error::bad_field("messages", "Cohere reads text and images: leave out other parts")),
    });
    Ok(Value::Array(parts.collect::<Result<_>>()?))
}

fn assistant(message: &Message) -> Option<Value> {
    let mut text = String::new();
    let mut calls = Vec::new();
    for part in &message.parts {
        match part {
            Part::Text { text: more, .. } => text.push_str(more),
            Part::Call { id, name, written, .. } => {
                let arguments = if written.is_empty() { "{}" } else { *written };
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}));
            }
            _ => {}
        }
    }
    let mut out = json!({"role": "assistant"});
    match (calls.is_empty(), text.is_empty()) {
        (true, true) => return None,
        (true, false) => out["content"] = text.into(),
        (false, true) => {}
        (false, false) => out["tool_plan"] = text.into(),
    }
    if !calls.is_empty() {
        out["tool_calls"] = calls.into();
    }
    Some(out)
}

fn tool(message: &Message) -> Result<Value> {
    let mut text = String::new();
    let mut answered = "";
    for part in &message.parts {
        let Part::Result { id, parts, .. } = part else { continue };
        answered = *id;
        for part in parts {
            let Part::Text { text: more, .. } = part else {
                return Err(Error::bad_field("messages", "Cohere takes results of tools as text"));
            };
            text.push_str(more);
        }
    }
    Ok(json!({"role": "tool", "tool_call_id": answered, "content": text}))
}

#[cfg(test)]
mod tests;
