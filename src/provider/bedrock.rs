//! Bedrock's Converse: requests. Answers are in `bedrock/reply.rs`.
//!
//!     system messages    ->  `system`
//!     tool results       ->  `toolResult` blocks of the user
//!     reasoning_effort   ->  `additionalModelRequestFields`, in the words of the model's family
//!     response_format    ->  a tool that must be called, which every model with tools understands; for any JSON object,
//!                            an instruction

mod reply;

pub(super) use reply::{Stream, answer};

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::provider::anthropic::{call_id, thinking};
use crate::provider::ask::{Ask, Beyond, Choice, Effort, Format, JSON_ONLY, JSON_TOOL, Part, Source};
use crate::provider::turns::{Conversation, Turn};

/// What Claude may write where the caller does not say.
const DEFAULT_MAX_TOKENS: u64 = 8192;

/// The body of a request. The model is in the path.
pub(super) fn request(model: &str, ask: &Ask) -> Result<Value> {
    let beyond = [Beyond::Choices, Beyond::Logprobs, Beyond::Penalties, Beyond::OneCall, Beyond::Audio];
    ask.refuse("Bedrock", &beyond)?;
    let conversation = ask.conversation()?;
    let mut body = Map::new();
    body.insert("messages".into(), conversation.turns.iter().map(turn).collect::<Result<_>>()?);
    let mut system: Vec<_> = conversation.system.iter().map(|part| block(part)).collect::<Result<_>>()?;
    if matches!(ask.format, Format::Object) {
        system.push(json!({ "text": JSON_ONLY }));
    }
    if !system.is_empty() {
        body.insert("system".into(), system.into());
    }
    if let Some(tools) = tools(ask, &conversation)? {
        body.insert("toolConfig".into(), tools);
    }
    let mut inference = Map::new();
    let mut extra = Map::new();
    family(model, ask, &mut inference, &mut extra);
    if !ask.stop.is_empty() {
        inference.insert("stopSequences".into(), json!(ask.stop));
    }
    if !inference.is_empty() {
        body.insert("inferenceConfig".into(), inference.into());
    }
    if !extra.is_empty() {
        body.insert("additionalModelRequestFields".into(), extra.into());
    }
    Ok(Value::Object(body))
}

/// Sampling, length and thinking, which families of models take differently.
fn family(model: &str, ask: &Ask, inference: &mut Map<String, Value>, extra: &mut Map<String, Value>) {
    let mut max_tokens = ask.max_tokens;
    let mut sampled = true;
    if model.contains("claude") {
        let most = max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if let Some(thinking) = thinking(model, ask, most, ask.json_tool().is_some()) {
            max_tokens = Some(most);
            sampled = false;
            extra.insert("thinking".into(), thinking.config);
            if let Some(effort) = thinking.effort {
                extra.insert("output_config".into(), json!({ "effort": effort }));
            }
        } else if let Some(top_k) = ask.top_k {
            extra.insert("top_k".into(), top_k.into());
        }
    } else if model.contains("nova") {
        if let Some(top_k) = ask.top_k {
            extra.insert("inferenceConfig".into(), json!({ "topK": top_k }));
        }
    } else if model.contains("gpt-oss")
        && let Some(effort) = ask.effort
    {
        let word = match effort {
            Effort::None | Effort::Minimal | Effort::Low => "low",
            Effort::Medium => "medium",
            Effort::High | Effort::XHigh => "high",
        };
        extra.insert("reasoning_effort".into(), word.into());
    }
    if let Some(max_tokens) = max_tokens {
        inference.insert("maxTokens".into(), max_tokens.into());
    }
    if sampled {
        // Nobody here goes beyond 1.
        if let Some(temperature) = ask.temperature {
            inference.insert("temperature".into(), temperature.clamp(0.0, 1.0).into());
        }
        // Newer models of Anthropic's take one of the two.
        if let Some(top_p) = ask.top_p.filter(|_| ask.temperature.is_none() || !model.contains("claude")) {
            inference.insert("topP".into(), top_p.into());
        }
    }
}

fn tools(ask: &Ask, conversation: &Conversation) -> Result<Option<Value>> {
    let spec = |name: &str, description: Option<&str>, schema: &Value| {
        let mut spec = json!({ "name": name });
        if let Some(description) = description.filter(|description| !description.is_empty()) {
            spec["description"] = description.into();
        }
        spec["inputSchema"] = json!({ "json": schema });
        json!({ "toolSpec": spec })
    };
    let any = json!({"type": "object", "properties": {}});
    let forbidden = ask.choice == Choice::None && !ask.tools.is_empty();
    if forbidden && ask.has_tool_history() && ask.json_tool().is_none() {
        let advice = "Bedrock cannot be kept from calling tools that were called before: leave out `tool_choice`";
        return Err(Error::bad_field("tool_choice", advice));
    }
    let mut tools: Vec<_> = if forbidden && !ask.has_tool_history() {
        Vec::new()
    } else {
        ask.tools.iter().map(|tool| spec(tool.name, tool.description, &tool.schema())).collect()
    };
    if tools.is_empty() && ask.has_tool_history() {
        // Calls in the history must be of tools that are declared, even if no more are to come.
        let mut names: Vec<&str> = Vec::new();
        for part in conversation.turns.iter().flat_map(|turn| &turn.parts) {
            if let Part::Call { name, .. } = part
                && !names.contains(name)
            {
                names.push(name);
            }
        }
        tools.extend(names.into_iter().map(|name| spec(name, None, &any)));
    }
    let mut choice = match ask.choice {
        Choice::Auto | Choice::None => None,
        Choice::Required => Some(json!({"any": {}})),
        Choice::Named(name) => Some(json!({"tool": {"name": name}})),
    };
    if let Some(json) = ask.json_tool() {
        tools.push(spec(JSON_TOOL, Some(json.description), json.schema));
        choice = Some(if json.alone { json!({"tool": {"name": JSON_TOOL}}) } else { json!({"any": {}}) });
    }
    if tools.is_empty() {
        return Ok(None);
    }
    let mut config = json!({ "tools": tools });
    if let Some(choice) = choice {
        config["toolChoice"] = choice;
    }
    Ok(Some(config))
}

fn turn(turn: &Turn) -> Result<Value> {
    let mut blocks: Vec<_> = turn.parts.iter().map(|part| block(part)).collect::<Result<_>>()?;
    if turn.user {
        blocks.sort_by_key(|block| block.get("toolResult").is_none());
    }
    Ok(json!({"role": if turn.user { "user" } else { "assistant" }, "content": blocks}))
}

fn block(part: &Part) -> Result<Value> {
    Ok(match part {
        Part::Text { text, .. } => json!({ "text": text }),
        Part::Image { source, .. } => image(source)?,
        Part::File { data, name } => document(data, *name)?,
        Part::Audio { .. } => return Err(Error::bad_input("Bedrock does not listen: leave out `input_audio`")),
        Part::Call { id, name, arguments, .. } => {
            json!({"toolUse": {"toolUseId": call_id(id), "name": name, "input": arguments}})
        }
        Part::Result { id, parts, .. } => {
            let blank = |part: &&Part| matches!(part, Part::Text { text, .. } if text.trim().is_empty());
            let mut content: Vec<_> = parts.iter().filter(|part| !blank(part)).map(block).collect::<Result<_>>()?;
            if content.is_empty() {
                content.push(json!({"text": "(empty)"}));
            }
            json!({"toolResult": {"toolUseId": call_id(id), "content": content}})
        }
        Part::Thinking(block) if block["type"] == "redacted_thinking" => {
            json!({"reasoningContent": {"redactedContent": block["data"]}})
        }
        Part::Thinking(block) => {
            let text = json!({"text": block["thinking"], "signature": block["signature"]});
            json!({"reasoningContent": {"reasoningText": text}})
        }
    })
}

fn image(source: &Source) -> Result<Value> {
    let wrong = |advice: String| Error::bad_field("messages", advice);
    match source {
        Source::Data { media_type, data } => {
            let format = match *media_type {
                "image/png" => "png",
                "image/jpeg" => "jpeg",
                "image/gif" => "gif",
                "image/webp" => "webp",
                other => return Err(wrong(format!("Bedrock reads PNG, JPEG, GIF and WebP, not {other}"))),
            };
            Ok(json!({"image": {"format": format, "source": {"bytes": data}}}))
        }
        Source::Url(url) if url.starts_with("s3://") => {
            let format = match url.rsplit('.').next() {
                Some("png") => "png",
                Some("gif") => "gif",
                Some("webp") => "webp",
                _ => "jpeg",
            };
            Ok(json!({"image": {"format": format, "source": {"s3Location": {"uri": url}}}}))
        }
        Source::Url(_) => {
            Err(wrong("Bedrock does not fetch images: send them as data: URLs, or name them in S3 (s3://…)".to_owned()))
        }
    }
}

fn document(data: &Source, name: Option<&str>) -> Result<Value> {
    let Source::Data { media_type, data } = data else {
        return Err(Error::bad_field("messages", "Bedrock does not fetch files: send them as data: URLs"));
    };
    let format = match *media_type {
        "application/pdf" => "pdf",
        "text/csv" => "csv",
        "text/html" => "html",
        "text/markdown" => "md",
        "text/plain" => "txt",
        "application/msword" => "doc",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document" => "docx",
        "application/vnd.ms-excel" => "xls",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet" => "xlsx",
        other => return Err(Error::bad_field("messages", format!("Bedrock does not read files of {other}"))),
    };
    // Names are letters, digits, spaces and a few signs.
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '(' | ')' | '[' | ']');
    let name: String = name.unwrap_or("document").chars().map(|l| if allowed(l) { l } else { '-' }).collect();
    Ok(json!({"document": {"format": format, "name": name, "source": {"bytes": data}}}))
}

#[cfg(test)]
mod tests;
