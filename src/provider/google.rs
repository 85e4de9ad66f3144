//! Google's `generateContent`, on AI Studio and Vertex: requests. Answers are in `google/reply.rs`.
//!
//!     system messages    ->  `systemInstruction`
//!     assistant          ->  role `model`; calls are `functionCall` parts, with the signature they came with
//!     tool results       ->  `functionResponse` parts of the user, found by name and order, not by id
//!     reasoning_effort   ->  `thinkingConfig`: a level from Gemini 3 on, before that a budget
//!     response_format    ->  `responseMimeType` and `responseSchema`

mod reply;

pub(super) use reply::{Stream, answer};

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::provider::ask::{Ask, Beyond, Choice, Effort, Format, Part, Source};
use crate::provider::schema;
use crate::provider::turns::Turn;

/// Stands in for the signature of a call that was not made by Gemini, which checks from 3 on.
const NO_SIGNATURE: &str = "skip_thought_signature_validator";

/// The body of a request.
pub(super) fn request(model: &str, ask: &Ask) -> Result<Value> {
    ask.refuse("Google", &[Beyond::OneCall])?;
    let conversation = ask.conversation()?;
    let signs = version(model) >= 3;
    let mut body = Map::new();
    if !conversation.system.is_empty() {
        let parts: Vec<_> = conversation.system.iter().filter_map(|part| text(part)).collect();
        body.insert("systemInstruction".into(), json!({ "parts": parts }));
    }
    let contents = conversation.turns.iter().map(|turn| content(turn, signs)).collect::<Result<Vec<_>>>()?;
    body.insert("contents".into(), contents.into_iter().flatten().collect());
    tools(ask, &mut body);
    let config = config(model, ask)?;
    if !config.is_empty() {
        body.insert("generationConfig".into(), config.into());
    }
    Ok(Value::Object(body))
}

/// The major version in `gemini-2.5-pro`; of other names 0: they are older, or no Gemini.
fn version(model: &str) -> u32 {
    let name = model.rsplit('/').next().unwrap_or(model);
    let number = name.strip_prefix("gemini-").and_then(|rest| rest.split(['-', '.']).next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn config(model: &str, ask: &Ask) -> Result<Map<String, Value>> {
    let mut config = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(name.to_owned(), value);
        }
    };
    set("temperature", ask.temperature.map(Value::from));
    set("topP", ask.top_p.map(Value::from));
    set("topK", ask.top_k.map(Value::from));
    set("maxOutputTokens", ask.max_tokens.map(Value::from));
    set("candidateCount", (ask.choices > 1).then(|| ask.choices.into()));
    set("stopSequences", (!ask.stop.is_empty()).then(|| json!(ask.stop)));
    set("seed", ask.seed.map(Value::from));
    set("presencePenalty", ask.presence_penalty.map(Value::from));
    set("frequencyPenalty", ask.frequency_penalty.map(Value::from));
    set("responseLogprobs", ask.logprobs.map(|_| true.into()));
    set("logprobs", ask.logprobs.filter(|rivals| *rivals > 0).map(Value::from));
    match ask.format {
        Format::Text => {}
        Format::Object => set("responseMimeType", Some("application/json".into())),
        Format::Schema { schema, .. } => {
            set("responseMimeType", Some("application/json".into()));
            set("responseSchema", Some(schema::open_api(schema)));
        }
    }
    set("thinkingConfig", ask.effort.and_then(|effort| thinking(model, effort)));
    Ok(config)
}

fn thinking(model: &str, effort: Effort) -> Option<Value> {
    if version(model) >= 3 {
        let flash = model.contains("flash");
        let level = match effort {
            Effort::None | Effort::Minimal if flash => "minimal",
            Effort::None | Effort::Minimal | Effort::Low => "low",
            // The first of its kind knew two levels.
            Effort::Medium if model.contains("gemini-3-pro") => "high",
            Effort::Medium => "medium",
            Effort::High | Effort::XHigh => "high",
        };
        return Some(json!({"thinkingLevel": level, "includeThoughts": effort != Effort::None}));
    }
    if !model.contains("gemini-2.5") {
        return None;
    }
    let budget = match effort {
        // Pro thinks at least a little.
        Effort::None if model.contains("pro") => 128,
        Effort::None => 0,
        Effort::Minimal | Effort::Low => 1024,
        Effort::Medium => 8192,
        Effort::High | Effort::XHigh => 24_576,
    };
    Some(json!({"thinkingBudget": budget, "includeThoughts": effort != Effort::None}))
}

fn tools(ask: &Ask, body: &mut Map<String, Value>) {
    if ask.tools.is_empty() {
        return;
    }
    let declarations = ask.tools.iter().map(|tool| {
        let mut out = json!({ "name": tool.name });
        if let Some(description) = tool.description {
            out["description"] = description.into();
        }
        // An object without properties is refused; no parameters at all are not.
        let takes_any = |schema: &&Value| schema["properties"].as_object().is_some_and(|fields| !fields.is_empty());
        let parameters = tool.parameters.map(schema::open_api);
        if let Some(parameters) = parameters.as_ref().filter(takes_any) {
            out["parameters"] = parameters.clone();
        }
        out
    });
    body.insert("tools".into(), json!([{"functionDeclarations": declarations.collect::<Vec<_>>()}]));
    let calling = match ask.choice {
        Choice::Auto => return,
        Choice::None => json!({"mode": "NONE"}),
        Choice::Required => json!({"mode": "ANY"}),
        Choice::Named(name) => json!({"mode": "ANY", "allowedFunctionNames": [name]}),
    };
    body.insert("toolConfig".into(), json!({ "functionCallingConfig": calling }));
}

/// A turn; `None` if nothing in it can be told.
fn content(turn: &Turn, signs: bool) -> Result<Option<Value>> {
    let mut parts = Vec::with_capacity(turn.parts.len());
    // Of calls made at once the first is signed.
    let mut unsigned = signs;
    for part in &turn.parts {
        match part {
            Part::Text { .. } => parts.extend(text(part)),
            Part::Image { source, .. } => parts.push(media(source, "image/jpeg")),
            Part::File { data, .. } => parts.push(media(data, "application/pdf")),
            Part::Audio { data, format } => {
                let media_type = if *format == "mp3" { "audio/mp3".to_owned() } else { format!("audio/{format}") };
                parts.push(json!({"inlineData": {"mimeType": media_type, "data": data}}));
            }
            Part::Call { name, arguments, signature, .. } => {
                let mut call = json!({"functionCall": {"name": name, "args": arguments}});
                let stand_in = std::mem::take(&mut unsigned).then_some(NO_SIGNATURE);
                if let Some(signature) = signature.or(stand_in) {
                    call["thoughtSignature"] = signature.into();
                }
                parts.push(call);
            }
            Part::Result { name, parts: said, .. } => result(*name, said, &mut parts)?,
            Part::Thinking(_) => {}
        }
    }
    let role = if turn.user { "user" } else { "model" };
    Ok((!parts.is_empty()).then(|| json!({"role": role, "parts": parts})))
}

fn text(part: &Part) -> Option<Value> {
    let Part::Text { text, .. } = part else { return None };
    Some(json!({ "text": text }))
}

/// Data in place, or what is behind a URL. Its type has to be said, so it is guessed from its name.
fn media(source: &Source, otherwise: &str) -> Value {
    match source {
        Source::Data { media_type, data } => json!({"inlineData": {"mimeType": media_type, "data": data}}),
        Source::Url(url) => {
            let path = url.split(['?', '#']).next().unwrap_or(url);
            let ending = path.rsplit('.').next().unwrap_or("").to_ascii_lowercase();
            let media_type = match ending.as_str() {
                "png" => "image/png",
                "jpg" | "jpeg" => "image/jpeg",
                "webp" => "image/webp",
                "gif" => "image/gif",
                "heic" => "image/heic",
                "heif" => "image/heif",
                "pdf" => "application/pdf",
                _ => otherwise,
            };
            json!({"fileData": {"mimeType": media_type, "fileUri": url}})
        }
    }
}

/// The result of a call: an object as it is, anything else as its `output`. Pictures follow it.
fn result(name: Option<&str>, said: &[Part], parts: &mut Vec<Value>) -> Result<()> {
    let name = name
        .ok_or_else(|| Error::bad_field("messages", "a tool message answers a call that no message before it makes"))?;
    let mut words = String::new();
    let mut pictures = Vec::new();
    for part in said {
        match part {
            Part::Text { text, .. } => words.push_str(text),
            Part::Image { source, .. } => pictures.push(media(source, "image/jpeg")),
            _ => return Err(Error::bad_field("messages", "results of tools are text and images")),
        }
    }
    let response = match serde_json::from_str(&words) {
        Ok(Value::Object(object)) => Value::Object(object),
        _ => json!({ "output": words }),
    };
    parts.push(json!({"functionResponse": {"name": name, "response": response}}));
    parts.extend(pictures);
    Ok(())
}

#[cfg(test)]
mod tests;
