//! What all surfaces share in reading a text-generation request: messages, sampling, stop strings. Each surface brings its
//! own names and bounds for the rest.

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::config::CatalogEntry;
use crate::http::fields::{Fields, integer, mismatch, number};
use crate::http::tools;
use crate::task::{Dry, Message, Role, Sampling, Speculation};

/// Most answers to one prompt.
pub(super) const MAX_CHOICES: i64 = 16;
/// Most stop strings.
const MAX_STOP: usize = 16;
/// Longest stop string in bytes: it is looked for at every token.
const MAX_STOP_BYTES: usize = 1024;
/// Most texts that end a repeat, and the longest of them in bytes: they are looked for at every token.
const MAX_BREAKERS: usize = 32;
const MAX_BREAKER_BYTES: usize = 64;
/// Where a repeat ends if nothing is said: line feed, colon, quote, star.
const BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];
/// Most biased tokens.
const MAX_BIAS: usize = 1024;
/// Most rivals reported for a token.
pub(super) const MAX_TOP_LOGPROBS: i64 = 20;
/// Priorities from minus this to this.
const MOST_PRIORITY: i64 = 100;
/// How far the tiers `flex` and `priority` are from the default. A level that is passed over gains one a second.
const TIER: i8 = 10;
/// Most tokens guessed ahead that a caller may ask for; a model's own limit is far below.
const MAX_DRAFTS: i64 = 1024;
/// Longest foreseen text in bytes: it is indexed beside the prompt.
const MAX_PREDICTION_BYTES: usize = 1 << 20;
/// More tokens than any context has.
pub(super) const MAX_TOKENS: i64 = 1 << 24;

/// Whose bounds a sampling parameter must keep.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bounds {
    /// Cloudflare's published schema.
    Native,
    /// OpenAI's, with the extensions that open-model servers share.
    OpenAi,
}

/// How tokens are drawn. What is left out is the catalog's (temperature) or off.
pub(super) fn sampling(fields: &Fields, entry: &CatalogEntry, bounds: Bounds) -> Result<Sampling> {
    let native = bounds == Bounds::Native;
    let defaults = Sampling::default();
    let seed = if native { 1..=9_999_999_999 } else { i64::MIN..=i64::MAX };
    let top_k = if native { 1..=50 } else { -1..=i64::from(u32::MAX) };
    let float = |name: &str, low: f64, high: f64| fields.number(name, low..=high).map(|v| v.map(|v| v as f32));
    Ok(Sampling {
        temperature: float("temperature", 0.0, 5.0)?.unwrap_or(entry.temperature),
        // Cloudflare's schema allows up to 2; beyond 1 there is nothing more to keep.
        top_p: float("top_p", 0.0, if native { 2.0 } else { 1.0 })?.unwrap_or(defaults.top_p).min(1.0),
        // -1 is how some clients say "off".
        top_k: fields.integer("top_k", top_k)?.map_or(defaults.top_k, |k| k.max(0) as u32),
        min_p: float("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
        typical_p: float("typical_p", 0.0, 1.0)?.unwrap_or(defaults.typical_p),
        seed: fields.integer("seed", seed)?.map(|seed| seed as u64),
        // The schema allows 0, by which nothing can be divided: off, like 1.
        repetition_penalty: float("repetition_penalty", 0.0, 2.0)?
            .or(float("repeat_penalty", 0.0, 2.0)?)
            .filter(|penalty| *penalty > 0.0)
            .unwrap_or(defaults.repetition_penalty),
        frequency_penalty: float("frequency_penalty", -2.0, 2.0)?.unwrap_or(defaults.frequency_penalty),
        presence_penalty: float("presence_penalty", -2.0, 2.0)?.unwrap_or(defaults.presence_penalty),
        penalty_last_n: match last_n(fields, "penalty_last_n")? {
            None => last_n(fields, "repeat_last_n")?.flatten(),
            Some(last_n) => last_n,
        },
        dry: dry(fields)?,
        logit_bias: logit_bias(fields)?,
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(defaults.ignore_eos),
    })
}

/// How many of the newest tokens count. Outer `None`: nothing was said; inner: -1, all of them.
fn last_n(fields: &Fields, name: &str) -> Result<Option<Option<u32>>> {
    Ok(fields.integer(name, -1..=MAX_TOKENS)?.map(|n| u32::try_from(n).ok()))
}

/// `dry_multiplier` and what goes with it, by the names of llama.cpp's server; off at 0, but checked all the same.
fn dry(fields: &Fields) -> Result<Option<Dry>> {
    let multiplier = fields.number("dry_multiplier", 0.0..=100.0)?.unwrap_or(0.0) as f32;
    let last_n = last_n(fields, "dry_penalty_last_n")?.flatten();
    let name = "dry_sequence_breakers";
    let breakers = match fields.array(name)? {
        None => BREAKERS.map(str::to_owned).to_vec(),
        Some(values) if values.len() > MAX_BREAKERS => {
            return Err(fields.wrong(name, &format!("may have at most {MAX_BREAKERS} strings, not {}", values.len())));
        }
        Some(values) => values.iter().map(|value| breaker(fields, name, value)).collect::<Result<_>>()?,
    };
    let dry = Dry {
        multiplier,
        base: fields.number("dry_base", 1.0..=16.0)?.unwrap_or(1.75) as f32,
        allowed_length: fields.integer("dry_allowed_length", 1..=MAX_TOKENS)?.unwrap_or(2) as u32,
        last_n,
        breakers,
    };
    Ok((dry.multiplier > 0.0 && dry.last_n != Some(0)).then_some(dry))
}

fn breaker(fields: &Fields, name: &str, value: &Value) -> Result<String> {
    match value {
        Value::String(text) if (1..=MAX_BREAKER_BYTES).contains(&text.len()) => Ok(text.clone()),
        Value::String(_) => Err(fields.wrong(name, &format!("must hold strings of 1 to {MAX_BREAKER_BYTES} bytes"))),
        other => Err(mismatch(&fields.path(name), "an array of strings", other)),
    }
}

/// How far to guess ahead: llama-server's `speculative.n_max` (0 switches it off) and OpenAI's `prediction`.
pub(super) fn speculation(fields: &Fields) -> Result<Speculation> {
    let most = fields.integer("speculative.n_max", 0..=MAX_DRAFTS)?.map(|most| most as u32);
    let Some(prediction) = fields.object("prediction")? else { return Ok(Speculation { most, prediction: None }) };
    if prediction.required_text("type")? != "content" {
        return Err(prediction.wrong("type", "must be `content`: other predictions are not known"));
    }
    let Some(value) = prediction.get("content") else { return Err(prediction.missing("content")) };
    let text = content(&prediction.path("content"), value)?;
    if text.len() > MAX_PREDICTION_BYTES {
        return Err(prediction.wrong("content", &format!("may hold at most {MAX_PREDICTION_BYTES} bytes")));
    }
    Ok(Speculation { most, prediction: (!text.is_empty()).then_some(text) })
}

/// `{"token id": bias}` with biases from -100 to 100.
fn logit_bias(fields: &Fields) -> Result<Vec<(u32, f32)>> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut biases = Vec::new();
    for (token, bias) in map.entries() {
        let path = map.path(token);
        let Ok(token) = token.parse::<u32>() else {
            return Err(fields.wrong("logit_bias", "must have token ids (whole numbers) as keys"));
        };
        biases.push((token, number(&path, bias, -100.0..=100.0)? as f32));
        if biases.len() > MAX_BIAS {
            return Err(fields.wrong("logit_bias", &format!("may have at most {MAX_BIAS} entries")));
        }
    }
    Ok(biases)
}

/// `max_tokens` under any of its names, first come first served. `None`: the model's default.
pub(super) fn max_tokens(fields: &Fields, names: &[&str]) -> Result<Option<u32>> {
    for name in names {
        if let Some(tokens) = fields.integer(name, 1..=MAX_TOKENS)? {
            return Ok(Some(tokens as u32));
        }
    }
    Ok(None)
}

/// `prompt_logprobs`, by the name it has at vLLM; a list of this length does not go into a stream.
pub(super) fn prompt_logprobs(fields: &Fields, stream: bool) -> Result<Option<u32>> {
    let rivals = fields.integer("prompt_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    if rivals.is_some() && stream {
        return Err(fields.wrong("prompt_logprobs", "is not available when `stream` is true"));
    }
    Ok(rivals.map(|rivals| rivals as u32))
}

/// One stop string or several; none of them empty.
pub(super) fn stop(fields: &Fields) -> Result<Vec<String>> {
    let values = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    if values.len() > MAX_STOP {
        return Err(fields.wrong("stop", &format!("may have at most {MAX_STOP} strings, not {}", values.len())));
    }
    values
        .iter()
        .map(|value| match value {
            Value::String(text) if text.is_empty() => Err(fields.wrong("stop", "must not hold an empty string")),
            Value::String(text) if text.len() > MAX_STOP_BYTES => {
                Err(fields.wrong("stop", &format!("may hold strings of at most {MAX_STOP_BYTES} bytes")))
            }
            Value::String(text) => Ok(text.clone()),
            other => Err(mismatch(&fields.path("stop"), "a string or an array of strings", other)),
        })
        .collect()
}

/// `priority`, lower served first as open-model servers have it; or OpenAI's `service_tier`.
pub(super) fn priority(fields: &Fields) -> Result<i8> {
    if let Some(late) = fields.integer("priority", i64::MIN..=i64::MAX)? {
        return Ok(late.saturating_neg().clamp(-MOST_PRIORITY, MOST_PRIORITY) as i8);
    }
    match fields.text("service_tier")? {
        None | Some("auto" | "default" | "standard_only") => Ok(0),
        Some("flex") => Ok(-TIER),
        Some("priority") => Ok(TIER),
        Some(_) => Err(fields.wrong("service_tier", "must be one of auto, default, flex, priority")),
    }
}

/// How many answers.
pub(super) fn choices(fields: &Fields) -> Result<u32> {
    Ok(fields.integer("n", 1..=MAX_CHOICES)?.unwrap_or(1) as u32)
}

/// The turns of a conversation, oldest first.
pub(super) fn messages(fields: &Fields) -> Result<Vec<Message>> {
    let Some(values) = fields.array("messages")? else { return Err(fields.missing("messages")) };
    if values.is_empty() {
        return Err(fields.wrong("messages", "must hold at least one message"));
    }
    let path = fields.path("messages");
    let messages = values.iter().enumerate().map(|(i, value)| message(&Fields::at(value, format!("{path}.{i}"))?));
    let mut messages = messages.collect::<Result<Vec<_>>>()?;
    tools::link(&mut messages);
    Ok(messages)
}

/// One turn in OpenAI's shape.
fn message(fields: &Fields) -> Result<Message> {
    let role = role(fields)?;
    let tool_calls = tools::calls(fields)?;
    let content = match fields.get("content") {
        // An assistant turn that only calls tools has none; `null` is empty in OpenAI's contract.
        None if fields.entries().any(|(name, _)| name == "content") || tool_calls.is_some() => String::new(),
        None if fields.has("refusal") => String::new(),
        None => return Err(fields.missing("content")),
        Some(value) => content(&fields.path("content"), value)?,
    };
    let text = |name: &str| fields.text(name).map(|text| text.map(str::to_owned));
    Ok(Message { role, content, name: text("name")?, tool_call_id: text("tool_call_id")?, tool_calls })
}

/// Who speaks, by the names that clients use.
pub(super) fn role(fields: &Fields) -> Result<Role> {
    match fields.required_text("role")? {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => Ok(Role::Tool),
        _ => Err(fields.wrong("role", "must be one of system, developer, user, assistant, tool")),
    }
}

/// Text, or parts of text that are joined. Whatever is not text is refused by name.
pub(super) fn content(path: &str, value: &Value) -> Result<String> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(mismatch(path, "a string or an array of parts", other)),
    };
    let mut content = String::new();
    for (i, part) in parts.iter().enumerate() {
        let part = Fields::at(part, format!("{path}.{i}"))?;
        match part.required_text("type")? {
            "text" | "input_text" | "output_text" => content.push_str(part.required_text("text")?),
            "refusal" => content.push_str(part.required_text("refusal")?),
            "image_url" | "input_image" | "image" => {
                return Err(Error::unsupported("This model reads text only: leave out image parts.")
                    .with_param(part.path("type")));
            }
            "input_audio" | "audio" | "file" | "input_file" => {
                return Err(Error::unsupported("This model reads text only: leave out audio and file parts.")
                    .with_param(part.path("type")));
            }
            _ => return Err(part.wrong("type", "must be `text`: other parts are not known")),
        }
    }
    Ok(content)
}

/// Extra variables for the chat template.
pub(super) fn template_kwargs(fields: &Fields) -> Result<Map<String, Value>> {
    let mut kwargs = Map::new();
    if let Some(object) = fields.object("chat_template_kwargs")? {
        kwargs.extend(object.entries().map(|(name, value)| (name.clone(), value.clone())));
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        kwargs.insert("reasoning_effort".to_owned(), Value::String(effort.to_owned()));
    }
    Ok(kwargs)
}

/// What no model here does yet, by the names it has in requests on every surface.
pub(super) fn refuse_what_is_not_built(fields: &Fields) -> Result<()> {
    fields.refuse("image", "This model reads text only: leave out `image`.")
}

/// The adapter to compute with, by id or name.
pub(super) fn lora(fields: &Fields, entry: &CatalogEntry) -> Result<Option<String>> {
    let Some(name) = fields.text("lora")? else { return Ok(None) };
    takes_adapters(entry)?;
    Ok(Some(name.to_owned()))
}

/// Whether a model is offered with adapters.
pub(super) fn takes_adapters(entry: &CatalogEntry) -> Result<()> {
    if entry.has("lora") {
        return Ok(());
    }
    Err(Error::unsupported(format!("LoRA is not supported by {}.", entry.id)).with_param("lora"))
}

/// `options.rejectIfBusy`.
pub(super) fn reject_if_busy(fields: &Fields) -> Result<bool> {
    let Some(options) = fields.object("options")? else { return Ok(false) };
    Ok(options.bool("rejectIfBusy")?.unwrap_or(false))
}

/// A prompt of token ids.
pub(super) fn token_ids(path: &str, values: &[Value]) -> Result<Vec<u32>> {
    values.iter().map(|value| Ok(integer(path, value, 0..=i64::from(u32::MAX))? as u32)).collect()
}
