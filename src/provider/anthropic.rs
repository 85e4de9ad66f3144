//! Anthropic's Messages: requests. Answers are in `anthropic/reply.rs`.
//!
//!     system messages        ->  `system`
//!     tool results           ->  the user's turn, before what the user says
//!     reasoning_effort       ->  `thinking`: adaptive from 4.6 on, before that a share of `max_tokens`
//!     response_format        ->  `output_config.format` where the model has it, else a tool that must be called;
//!                                for any JSON object, an instruction
//!
//! Also spoken on Vertex, with the model in the path.

mod reply;

pub(super) use reply::{Stream, answer};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::provider::ask::{Ask, Beyond, Choice, Effort, Format, JSON_ONLY, JSON_TOOL, Part, Role, Source};
use crate::provider::schema;
use crate::provider::turns::Turn;

/// The version of the API that this code speaks.
pub(super) const VERSION: &str = "2023-06-01";
/// The same on Vertex, where it is a field of the body.
const VERTEX_VERSION: &str = "vertex-2023-10-16";

/// Where the model runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Host {
    Anthropic,
    Vertex,
}

/// The body of a request.
pub(super) fn request(host: Host, model: &str, ask: &Ask) -> Result<Value> {
    ask.refuse("Anthropic", &[Beyond::Choices, Beyond::Logprobs, Beyond::Penalties, Beyond::Audio])?;
    let conversation = ask.conversation()?;
    let max_tokens = ask.max_tokens.unwrap_or_else(|| default_max_tokens(model));
    let forced = !has_output_format(host, model) && ask.json_tool().is_some();
    let thinking = thinking(model, ask, max_tokens, forced);

    let mut body = Map::new();
    match host {
        Host::Anthropic => body.insert("model".into(), model.into()),
        Host::Vertex => body.insert("anthropic_version".into(), VERTEX_VERSION.into()),
    };
    body.insert("max_tokens".into(), max_tokens.into());
    let mut system: Vec<_> = conversation.system.iter().map(|part| block(part)).collect::<Result<_>>()?;
    if matches!(ask.format, Format::Object) {
        system.push(json!({"type": "text", "text": JSON_ONLY}));
    }
    if !system.is_empty() {
        body.insert("system".into(), system.into());
    }
    body.insert("messages".into(), conversation.turns.iter().map(turn).collect::<Result<_>>()?);
    tools(host, model, ask, &mut body);
    if let Some(Thinking { config, effort }) = &thinking {
        body.insert("thinking".into(), config.clone());
        if let Some(effort) = effort {
            let output = body.entry("output_config").or_insert_with(|| json!({}));
            output["effort"] = (*effort).into();
        }
    }
    sampling(model, ask, thinking.is_some(), &mut body);
    if !ask.stop.is_empty() {
        body.insert("stop_sequences".into(), json!(ask.stop));
    }
    if let Some(user) = ask.user {
        body.insert("metadata".into(), json!({ "user_id": user }));
    }
    if ask.stream {
        body.insert("stream".into(), true.into());
    }
    Ok(Value::Object(body))
}

fn sampling(model: &str, ask: &Ask, thinks: bool, body: &mut Map<String, Value>) {
    if thinks {
        // A model that thinks does not let itself be sampled otherwise.
        return;
    }
    if let Some(temperature) = ask.temperature {
        body.insert("temperature".into(), temperature.clamp(0.0, 1.0).into());
    }
    // Newer models take one of the two.
    let both = ask.temperature.is_none() || version(model) < (4, 0);
    if let Some(top_p) = ask.top_p.filter(|_| both) {
        body.insert("top_p".into(), top_p.into());
    }
    if let Some(top_k) = ask.top_k {
        body.insert("top_k".into(), top_k.into());
    }
}

/// The version in a model's name (`claude-3-5-sonnet-…`, `claude-opus-4-1@…`); of a name without one, the newest.
pub(super) fn version(model: &str) -> (u32, u32) {
    let Some((_, name)) = model.split_once("claude-") else { return (u32::MAX, 0) };
    // Longer numbers are dates.
    let mut numbers =
        name.split(['-', '.', '@', '/']).filter(|word| word.len() <= 2).filter_map(|word| word.parse().ok());
    (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(0))
}

/// OpenAI's models write until they are done; these must be told how far they may go.
fn default_max_tokens(model: &str) -> u64 {
    match version(model) {
        (..=2, _) | (3, 0) => 4096,
        (3, ..=6) => 8192,
        _ => 32_000,
    }
}

#[derive(Debug)]
pub(super) struct Thinking {
    pub(super) config: Value,
    /// For models that decide themselves how much to think.
    pub(super) effort: Option<&'static str>,
}

/// What an effort is in the words of a model, if it can think and may. Thinking and a call that is forced exclude each other; a
/// caller who asks for both gets what was asked for by name, the call.
pub(super) fn thinking(model: &str, ask: &Ask, max_tokens: u64, forced: bool) -> Option<Thinking> {
    if let Some(config) = ask.thinking {
        return (config["type"] != "disabled").then(|| Thinking { config: config.clone(), effort: None });
    }
    let effort = ask.effort.filter(|effort| *effort != Effort::None)?;
    let version = version(model);
    let forced = forced || matches!(ask.choice, Choice::Required | Choice::Named(_));
    if version < (3, 7) || forced {
        return None;
    }
    if version >= (4, 6) {
        let word = match effort {
            Effort::None | Effort::Minimal | Effort::Low => "low",
            Effort::Medium => "medium",
            Effort::High => "high",
            Effort::XHigh => "max",
        };
        // From 4.7 on thoughts are told only to whoever asks.
        let config = if version >= (4, 7) {
            json!({"type": "adaptive", "display": "summarized"})
        } else {
            json!({"type": "adaptive"})
        };
        return Some(Thinking { config, effort: Some(word) });
    }
    // These want to read what they thought before a call they go on from.
    if resumes_without_thoughts(ask) {
        return None;
    }
    let percent = match effort {
        Effort::None | Effort::Minimal => 10,
        Effort::Low => 20,
        Effort::Medium => 50,
        Effort::High => 80,
        Effort::XHigh => 90,
    };
    let budget = (max_tokens.saturating_mul(percent) / 100).clamp(1024, 32_000);
    (budget < max_tokens)
        .then(|| Thinking { config: json!({"type": "enabled", "budget_tokens": budget}), effort: None })
}

fn resumes_without_thoughts(ask: &Ask) -> bool {
    let resumes = ask.messages.last().is_some_and(|message| message.role == Role::Tool);
    let mut caller = ask.messages.iter().rev().skip_while(|message| message.role == Role::Tool);
    let thought = |part: &Part| matches!(part, Part::Thinking(_));
    resumes && caller.next().is_some_and(|message| !message.parts.iter().any(thought))
}

/// Whether a model on a host is held to schemas by the API itself.
fn has_output_format(host: Host, model: &str) -> bool {
    let version = version(model);
    host == Host::Anthropic && (version >= (4, 5) || (version >= (4, 1) && model.contains("opus")))
}

fn tools(host: Host, model: &str, ask: &Ask, body: &mut Map<String, Value>) {
    let mut tools: Vec<_> = ask
        .tools
        .iter()
        .map(|tool| {
            let mut out = json!({ "name": tool.name });
            if let Some(description) = tool.description {
                out["description"] = description.into();
            }
            out["input_schema"] = tool.schema();
            out
        })
        .collect();
    let mut choice = match ask.choice {
        Choice::Auto => json!({"type": "auto"}),
        Choice::None => json!({"type": "none"}),
        Choice::Required => json!({"type": "any"}),
        Choice::Named(name) => json!({"type": "tool", "name": name}),
    };
    let mut said = ask.choice != Choice::Auto;
    if let Format::Schema { schema, .. } = ask.format
        && has_output_format(host, model)
    {
        body.insert(
            "output_config".into(),
            json!({"format": {"type": "json_schema", "schema": schema::closed(schema)}}),
        );
    } else if let Some(json) = ask.json_tool() {
        tools.push(json!({"name": JSON_TOOL, "description": json.description, "input_schema": json.schema}));
        choice = if json.alone { json!({"type": "tool", "name": JSON_TOOL}) } else { json!({"type": "any"}) };
        said = true;
    }
    if tools.is_empty() {
        return;
    }
    if !ask.parallel && choice["type"] != "none" {
        choice["disable_parallel_tool_use"] = true.into();
        said = true;
    }
    body.insert("tools".into(), tools.into());
    if said {
        body.insert("tool_choice".into(), choice);
    }
}

fn turn(turn: &Turn) -> Result<Value> {
    let mut blocks: Vec<_> = turn.parts.iter().map(|part| block(part)).collect::<Result<_>>()?;
    if turn.user {
        // Results stand first, whatever else the user has to say. The sort is stable.
        blocks.sort_by_key(|block| block["type"] != "tool_result");
    }
    Ok(json!({"role": if turn.user { "user" } else { "assistant" }, "content": blocks}))
}

fn block(part: &Part) -> Result<Value> {
    Ok(match part {
        Part::Text { text, cache } => {
            let mut block = json!({"type": "text", "text": text});
            if let Some(cache) = cache {
                block["cache_control"] = (*cache).clone();
            }
            block
        }
        Part::Image { source: Source::Data { media_type, data }, .. } => {
            json!({"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}})
        }
        Part::Image { source: Source::Url(url), .. } => json!({"type": "image", "source": {"type": "url", "url": url}}),
        Part::File { data, name } => document(data, *name)?,
        Part::Audio { .. } => return Err(Error::bad_input("Anthropic does not listen: leave out `input_audio`")),
        Part::Call { id, name, arguments, .. } => {
            json!({"type": "tool_use", "id": call_id(id), "name": name, "input": arguments})
        }
        Part::Result { id, parts, .. } => {
            let mut block = json!({"type": "tool_result", "tool_use_id": call_id(id)});
            let content: Vec<_> =
                parts.iter().filter(|part| says_something(part)).map(self::block).collect::<Result<_>>()?;
            if !content.is_empty() {
                block["content"] = content.into();
            }
            block
        }
        Part::Thinking(block) => (*block).clone(),
    })
}

fn document(data: &Source, name: Option<&str>) -> Result<Value> {
    let source = match data {
        Source::Url(url) => json!({"type": "url", "url": url}),
        Source::Data { media_type: "application/pdf", data } => {
            json!({"type": "base64", "media_type": "application/pdf", "data": data})
        }
        Source::Data { media_type, data } if media_type.starts_with("text/") => {
            let text = STANDARD.decode(data).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let text = text.ok_or_else(|| Error::bad_field("messages", "a text file must be UTF-8 in base64"))?;
            json!({"type": "text", "media_type": "text/plain", "data": text})
        }
        Source::Data { media_type, .. } => {
            let advice = format!("Anthropic reads files of PDF and text, not {media_type}");
            return Err(Error::bad_field("messages", advice));
        }
    };
    let mut block = json!({"type": "document", "source": source});
    if let Some(name) = name {
        block["title"] = name.into();
    }
    Ok(block)
}

fn says_something(part: &Part) -> bool {
    !matches!(part, Part::Text { text, .. } if text.is_empty())
}

/// The id of a call in the letters that are allowed; the same for the call and its result.
pub(super) fn call_id(id: &str) -> String {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
    id.chars().map(|letter| if allowed(letter) { letter } else { '_' }).collect()
}

#[cfg(test)]
mod tests;
