//! Native inputs of text generation, and results and streams of classic models.

use actix_web::HttpResponse;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::base::{Error, Neurons, RequestId, Result};
use crate::config::{CatalogEntry, ResultShape};
use crate::gateway::Answer;
use crate::http::answer::{self, UsageJson};
use crate::http::chat::{self, CallDelta};
use crate::http::fields::Fields;
use crate::http::native::{Envelope, Padding, UsageEvent};
use crate::http::route::Surface;
use crate::http::stream::Render;
use crate::http::text::{self, Bounds};
use crate::http::{error, format, tools};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Message, Prompt, Role, Task, TextInput, TokenLogprob, ToolCall, ToolDelta, Usage};

/// Classic models whose results hold calls of tools in OpenAI's form, as Cloudflare's do.
const OPENAI_CALLS: [&str; 2] =
    ["@cf/meta/llama-4-scout-17b-16e-instruct", "@cf/mistralai/mistral-small-3.1-24b-instruct"];

/// What runs on native inputs.
pub(super) const TASKS: [Task; 3] = [Task::TextGeneration, Task::TextEmbeddings, Task::TextClassification];

/// A native request as it was meant.
#[derive(Debug)]
pub(super) struct RunRequest {
    pub(super) input: TextInput,
    pub(super) stream: bool,
}

/// Reads native inputs; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<RunRequest> {
    text::refuse_what_is_not_built(fields)?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    let input = TextInput {
        prompt: prompt(fields)?,
        choices: text::choices(fields)?,
        max_tokens: text::max_tokens(fields, &["max_tokens", "max_completion_tokens"])?,
        sampling: text::sampling(fields, entry, Bounds::Native)?,
        stop: text::stop(fields)?,
        logprobs: chat::logprobs(fields)?,
        prompt_logprobs: text::prompt_logprobs(fields, stream)?,
        speculation: text::speculation(fields)?,
        echo: false,
        priority: text::priority(fields)?,
        tools: tools::offered(fields)?,
        lora: text::lora(fields, entry)?,
        grammar: format::grammar(fields)?,
    };
    if input.tools.is_some() && !matches!(input.prompt, Prompt::Chat { .. }) {
        return Err(fields.wrong("tools", "need the model's template: leave out `raw`"));
    }
    if entry.shape == ResultShape::Classic {
        if stream && input.grammar.as_ref().is_some_and(|grammar| grammar.is_json()) {
            return Err(fields.wrong("stream", "does not go with JSON Mode, whose `response` is one object"));
        }
        // The classic result has one `response` and no place for these.
        let elsewhere = |name| {
            Error::unsupported(format!("This model's result has no place for `{name}`: use /ai/v1/chat/completions."))
                .with_param(name)
        };
        if input.choices > 1 {
            return Err(elsewhere("n"));
        }
        if input.logprobs.is_some() {
            return Err(elsewhere("logprobs"));
        }
        if input.prompt_logprobs.is_some() {
            return Err(elsewhere("prompt_logprobs"));
        }
    }
    Ok(RunRequest { input, stream })
}

/// Exactly one of `prompt`, `messages`, `requests`.
fn prompt(fields: &Fields) -> Result<Prompt> {
    let raw = fields.bool("raw")?.unwrap_or(false);
    match (fields.has("prompt"), fields.has("messages"), fields.has("requests")) {
        (false, false, false) => Err(Error::bad_input(
            "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', required properties at '/' are 'messages'",
        )),
        (true, false, false) => {
            let prompt = fields.required_text("prompt")?;
            if prompt.is_empty() {
                return Err(fields.wrong("prompt", "must have at least 1 character"));
            }
            if raw {
                return Ok(Prompt::Raw(prompt.to_owned()));
            }
            let messages = vec![Message::new(Role::User, prompt)];
            Ok(Prompt::Chat { messages, template_kwargs: text::template_kwargs(fields)? })
        }
        (false, true, false) if raw => Err(fields.wrong("raw", "goes with `prompt`, not with `messages`")),
        (false, true, false) => {
            Ok(Prompt::Chat { messages: text::messages(fields)?, template_kwargs: text::template_kwargs(fields)? })
        }
        (false, false, true) => {
            Err(fields.wrong("requests", "stands at the top of the body, not within another request"))
        }
        (prompt, messages, requests) => {
            let matches = usize::from(prompt) + usize::from(messages) + usize::from(requests);
            Err(Error::bad_input(format!(
                "oneOf at '/' not met, {matches} matches: send exactly one of 'prompt', 'messages', 'requests'"
            )))
        }
    }
}

/// The envelope, or nothing around it on the binding.
pub(super) fn wrap(surface: Surface, result: &impl Serialize, neurons: Neurons) -> Result<HttpResponse> {
    match surface {
        Surface::Binding => answer::metered(result, neurons),
        _ => answer::metered(&Envelope::new(result), neurons),
    }
}

/// What a classic model answers.
#[derive(Serialize)]
pub(super) struct ClassicResult<'a> {
    response: Option<Response<'a>>,
    tool_calls: Vec<Value>,
    usage: UsageJson,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Response<'a> {
    Text(&'a str),
    /// JSON mode: the document itself, as it was written.
    Json(&'a RawValue),
}

impl<'a> ClassicResult<'a> {
    /// # Errors
    /// In JSON mode, when the answer was cut before the document was whole.
    pub(super) fn new(answer: &'a Answer, entry: &CatalogEntry, json: bool) -> Result<Self> {
        let (text, finish, calls) = match answer.choices.first() {
            Some(choice) => (choice.text.as_str(), Some(choice.finish), choice.calls.as_slice()),
            None => ("", None, &[][..]),
        };
        let tool_calls: Vec<_> = match OPENAI_CALLS.contains(&entry.id.as_str()) {
            true => calls.iter().map(tools::function_call).collect(),
            false => calls.iter().filter_map(classic_call).collect(),
        };
        let response = match text.is_empty() && !tool_calls.is_empty() {
            true => None,
            false if json => Some(Response::Json(document(text, finish)?)),
            false => Some(Response::Text(text)),
        };
        Ok(Self { response, tool_calls, usage: UsageJson::new(&answer.usage, answer.neurons) })
    }
}

/// A call with its arguments as an object. One that was cut off has none that a caller could use, and is left out.
fn classic_call(call: &ToolCall) -> Option<Value> {
    Some(json!({ "name": call.name, "arguments": tools::object(call)? }))
}

/// The document that an answer in JSON mode is.
fn document(text: &str, finish: Option<FinishReason>) -> Result<&RawValue> {
    if finish == Some(FinishReason::Length) {
        let message = "JSON Mode couldn't be met: the answer reached `max_tokens` before its end; ask for more tokens.";
        return Err(Error::bad_field("max_tokens", message));
    }
    serde_json::from_str(text)
        .map_err(|error| Error::bad_input(format!("JSON Mode couldn't be met: {error}")).with_source(error))
}

/// Classic models' events: `{"response", "p"}`, then usage, then `[DONE]`.
pub(super) struct NativeStream {
    id: RequestId,
    padding: Padding,
    /// `tool_calls` rides on the first event only.
    first: bool,
    /// The newest call.
    call: Option<u32>,
}

impl NativeStream {
    pub(super) fn new(id: RequestId) -> Self {
        Self { id, padding: Padding::new(id), first: true, call: None }
    }
}

#[derive(Serialize)]
struct TextEvent<'a> {
    /// Always a string, even when the token looks like a number.
    response: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[(); 0]>,
    p: &'static str,
}

impl Render for NativeStream {
    fn begin(&mut self, _: &mut Encoder) {}

    fn text(&mut self, _: u32, text: &str, _: &[TokenLogprob], out: &mut Encoder) {
        if text.is_empty() {
            return;
        }
        let tool_calls = std::mem::take(&mut self.first).then_some([]);
        out.json(None, &TextEvent { response: text, tool_calls, p: self.padding.next() });
    }

    fn tool(&mut self, _: u32, call: u32, delta: &ToolDelta, out: &mut Encoder) {
        self.first = false;
        self.call = Some(call);
        let mut event = json!({});
        if matches!(delta, ToolDelta::Begin { .. }) {
            event["response"] = Value::Null;
        }
        event["tool_calls"] = json!([CallDelta::new(call, delta, None)]);
        out.json(None, &event);
    }

    fn finish(&mut self, _: u32, reason: FinishReason, _: Option<&str>, out: &mut Encoder) {
        // Streams of text end without a word on why.
        let Some(index) = self.call else { return };
        let function = json!({ "name": null, "arguments": "" });
        let call = json!({ "id": null, "type": null, "index": index, "function": function });
        out.json(None, &json!({ "tool_calls": [call], "finish_reason": reason.as_str() }));
    }

    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder) {
        out.json(None, &UsageEvent::new(UsageJson::new(usage, neurons)));
        out.text(None, "[DONE]");
    }

    fn failed(&mut self, failure: &Error, out: &mut Encoder) {
        out.json(None, &json!({ "error": error::native(self.id, failure) }));
    }
}

/// JSON Schemas of a text-generation model's inputs and results, as `models/schema` gives them.
pub(super) fn schema(entry: &CatalogEntry) -> Value {
    let number = |low: f64, high: f64, default: Option<f64>| {
        let mut schema = json!({ "type": "number", "minimum": low, "maximum": high });
        if let Some(default) = default {
            schema["default"] = json!(default);
        }
        schema
    };
    // A float of the catalog as it was written there: 0.6, not 0.6000000238418579.
    let temperature = entry.temperature.to_string().parse().unwrap_or(0.6);
    let common = json!({
        "stream": { "type": "boolean", "default": false },
        "max_tokens": { "type": "integer", "minimum": 1, "default": entry.max_tokens },
        "temperature": number(0.0, 5.0, Some(temperature)),
        "top_p": number(0.0, 2.0, None),
        "top_k": { "type": "integer", "minimum": 1, "maximum": 50 },
        "min_p": number(0.0, 1.0, None),
        "seed": { "type": "integer", "minimum": 1, "maximum": 9_999_999_999_i64 },
        "repetition_penalty": number(0.0, 2.0, None),
        "frequency_penalty": number(-2.0, 2.0, None),
        "presence_penalty": number(-2.0, 2.0, None),
        "stop": { "oneOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] },
        "tools": { "type": "array", "items": { "type": "object" } },
        "tool_choice": { "oneOf": [{ "type": "string", "enum": ["auto", "none", "required"] }, { "type": "object" }] },
    });
    let with = |extra: Value| {
        let mut properties = Map::new();
        for part in [extra, common.clone()] {
            if let Value::Object(part) = part {
                properties.extend(part);
            }
        }
        properties
    };
    let prompt = with(json!({
        "prompt": { "type": "string", "minLength": 1 },
        "raw": { "type": "boolean", "default": false },
    }));
    let messages = with(json!({
        "messages": { "type": "array", "minItems": 1, "items": {
            "type": "object",
            "properties": { "role": { "type": "string" }, "content": { "type": "string" } },
            "required": ["role", "content"],
        } },
    }));
    let output = match entry.shape {
        ResultShape::Classic => json!({ "type": "object", "properties": {
            "response": { "type": ["string", "null"] },
            "tool_calls": { "type": "array" },
            "usage": { "type": "object" },
        }, "required": ["response"] }),
        ResultShape::Chat => json!({ "type": "object", "properties": {
            "id": { "type": "string" },
            "object": { "type": "string", "const": "chat.completion" },
            "created": { "type": "integer" },
            "model": { "type": "string" },
            "choices": { "type": "array" },
            "usage": { "type": "object" },
        }, "required": ["id", "object", "created", "model", "choices"] }),
    };
    json!({
        "input": { "type": "object", "oneOf": [
            { "title": "Prompt", "properties": prompt, "required": ["prompt"] },
            { "title": "Messages", "properties": messages, "required": ["messages"] },
        ] },
        "output": { "oneOf": [output, { "type": "string", "contentType": "text/event-stream", "format": "binary" }] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_text_then_usage_then_the_end() {
        let mut render = NativeStream::new(RequestId::random());
        let mut out = Encoder::default();
        render.text(0, "1", &[], &mut out);
        render.text(0, "", &[], &mut out);
        render.text(0, "2", &[], &mut out);
        render.finish(0, FinishReason::Stop, None, &mut out);
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2, ..Usage::default() };
        render.done(&usage, Neurons::from_micro(1_500), &mut out);
        let text = String::from_utf8(out.take().to_vec()).unwrap();
        let lines: Vec<&str> = text.split_terminator("\n\n").map(|line| line.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with(r#"{"response":"1","tool_calls":[],"p":""#), "{}", lines[0]);
        assert!(lines[1].starts_with(r#"{"response":"2","p":""#), "{}", lines[1]);
        assert_eq!(
            lines[2],
            r#"{"response":"","usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1},"neurons":0.0015}}"#
        );
        assert_eq!(lines[3], "[DONE]");
    }
}
