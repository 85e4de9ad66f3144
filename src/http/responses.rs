//! OpenAI's responses: `POST /v1/responses`, one text message out. Nothing is stored, so nothing can be continued by id.

use actix_web::HttpResponse;
use serde_json::{Map, Value, json};

use crate::base::{Error, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::http::ask::Ask;
use crate::http::fields::{Fields, mismatch};
use crate::http::stream::{self, Render};
use crate::http::text::{self, Bounds};
use crate::http::{Services, answer, error};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Message, Prompt, Role, TextInput, TokenLogprob, Usage};

/// Most metadata pairs, as OpenAI has it.
const MAX_METADATA: usize = 16;

/// A responses request as it was meant.
#[derive(Debug)]
pub(super) struct ResponsesRequest {
    pub(super) input: TextInput,
    stream: bool,
    reject_if_busy: bool,
    /// Fields that the response object repeats.
    echoed: Map<String, Value>,
}

/// Serves a response.
pub(super) async fn respond(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let entry = ask.text_model(services, fields.required_text("model")?)?;
    let request = parse(&fields, &entry)?;
    let delivery = ask.serve(services, &entry, request.input, request.reject_if_busy).await?;
    let object = ResponseObject::new(ask.id, &entry, request.echoed);
    if request.stream {
        return Ok(stream::response(vec![delivery], 1, ResponseStream::new(object)));
    }
    let answer = delivery.collect().await?;
    let (text, finish) = match answer.choices.first() {
        Some(choice) => (choice.text.as_str(), choice.finish),
        None => ("", FinishReason::Stop),
    };
    answer::metered(&object.ended(text, finish, &answer.usage, answer.neurons), answer.neurons)
}

/// Reads a responses request; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<ResponsesRequest> {
    text::refuse_what_is_not_built(fields)?;
    fields.refuse("previous_response_id", "Responses are not stored here: send the whole conversation in `input`.")?;
    fields.refuse("conversation", "Conversations are not stored here: send the whole conversation in `input`.")?;
    fields.refuse("background", "Background responses are not available: leave out `background`.")?;
    fields.refuse("prompt", "Stored prompts are not available: write the text into `input`.")?;
    if let Some(format) = fields.object("text")? {
        text::response_format(&format, "format")?;
    }
    if !matches!(fields.text("truncation")?, None | Some("disabled")) {
        return Err(Error::unsupported("Input is never truncated: leave out `truncation`.").with_param("truncation"));
    }
    if fields.integer("top_logprobs", 0..=text::MAX_TOP_LOGPROBS)?.is_some_and(|top| top > 0) {
        let message = "Log-probabilities are not part of a response here: use /v1/chat/completions.";
        return Err(Error::unsupported(message).with_param("top_logprobs"));
    }
    let mut template_kwargs = text::template_kwargs(fields)?;
    if let Some(effort) = fields.object("reasoning")?.map(|reasoning| reasoning.text("effort")).transpose()?.flatten() {
        template_kwargs.insert("reasoning_effort".to_owned(), Value::String(effort.to_owned()));
    }
    let max_tokens = text::max_tokens(fields, &["max_output_tokens"])?;
    let sampling = text::sampling(fields, entry, Bounds::OpenAi)?;
    let echoed = Map::from_iter([
        ("instructions".to_owned(), json!(fields.text("instructions")?)),
        ("max_output_tokens".to_owned(), json!(max_tokens)),
        ("metadata".to_owned(), metadata(fields)?),
        ("temperature".to_owned(), as_written(sampling.temperature)),
        ("top_p".to_owned(), as_written(sampling.top_p)),
        ("user".to_owned(), json!(fields.text("user")?)),
    ]);
    let input = TextInput {
        prompt: Prompt::Chat { messages: conversation(fields)?, template_kwargs },
        choices: 1,
        max_tokens,
        sampling,
        stop: text::stop(fields)?,
        logprobs: None,
        echo: false,
        priority: text::priority(fields)?,
    };
    Ok(ResponsesRequest {
        input,
        stream: fields.bool("stream")?.unwrap_or(false),
        reject_if_busy: text::reject_if_busy(fields)?,
        echoed,
    })
}

/// An f32 as the decimal number it was, not as its nearest double.
fn as_written(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn metadata(fields: &Fields) -> Result<Value> {
    let Some(metadata) = fields.object("metadata")? else { return Ok(json!({})) };
    let mut pairs = Map::new();
    for (name, value) in metadata.entries() {
        if !value.is_string() {
            return Err(mismatch(&fields.path("metadata"), "an object of strings", value));
        }
        pairs.insert(name.clone(), value.clone());
        if pairs.len() > MAX_METADATA {
            return Err(fields.wrong("metadata", &format!("may have at most {MAX_METADATA} entries")));
        }
    }
    Ok(Value::Object(pairs))
}

/// `instructions` first, then `input`: one string from the user, or items.
fn conversation(fields: &Fields) -> Result<Vec<Message>> {
    let mut messages = Vec::new();
    if let Some(instructions) = fields.text("instructions")? {
        messages.push(Message::new(Role::System, instructions));
    }
    let path = fields.path("input");
    match fields.get("input") {
        None => return Err(fields.missing("input")),
        Some(Value::String(text)) => messages.push(Message::new(Role::User, text.as_str())),
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(fields.wrong("input", "must hold at least one item"));
        }
        Some(Value::Array(items)) => {
            for (i, item) in items.iter().enumerate() {
                messages.extend(message(&Fields::at(item, format!("{path}.{i}"))?)?);
            }
        }
        Some(other) => return Err(mismatch(&path, "a string or an array of items", other)),
    }
    if messages.iter().all(|message| message.role == Role::System) && !messages.iter().any(|m| !m.content.is_empty()) {
        return Err(fields.wrong("input", "holds no text"));
    }
    Ok(messages)
}

/// One item: a turn, or the reasoning of an earlier answer, which templates leave out as well.
fn message(item: &Fields) -> Result<Option<Message>> {
    match item.text("type")? {
        None | Some("message") => {
            let Some(content) = item.get("content") else { return Err(item.missing("content")) };
            let role = text::role(item)?;
            Ok(Some(Message::new(role, text::content(&item.path("content"), content)?)))
        }
        Some("reasoning") => Ok(None),
        Some("item_reference") => {
            Err(Error::unsupported("Responses are not stored here: send the item itself.")
                .with_param(item.path("type")))
        }
        Some("function_call" | "function_call_output" | "custom_tool_call" | "custom_tool_call_output") => {
            Err(Error::unsupported("Tool calling is not available in this build.").with_param(item.path("type")))
        }
        Some(_) => Err(item.wrong("type", "must be `message`: other items are not known")),
    }
}

/// The response object through its life.
struct ResponseObject {
    id: String,
    item: String,
    created_at: u64,
    model: String,
    echoed: Map<String, Value>,
}

impl ResponseObject {
    fn new(id: RequestId, entry: &CatalogEntry, echoed: Map<String, Value>) -> Self {
        Self {
            id: format!("resp_{}", id.simple()),
            item: format!("msg_{}", id.simple()),
            created_at: Millis::now().seconds(),
            model: entry.id.to_string(),
            echoed,
        }
    }

    fn with(&self, status: &str, output: Value, usage: Value) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": null,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": true,
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "store": false,
            "text": { "format": { "type": "text" } },
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": usage,
        });
        for (name, value) in &self.echoed {
            object[name] = value.clone();
        }
        object
    }

    fn in_progress(&self) -> Value {
        self.with("in_progress", json!([]), Value::Null)
    }

    /// The whole response. One cut off by `max_output_tokens` or the context window is `incomplete`.
    fn ended(&self, text: &str, finish: FinishReason, usage: &Usage, neurons: Neurons) -> Value {
        let usage = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": { "cached_tokens": usage.cached_tokens },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": usage.total_tokens(),
            "neurons": neurons.as_f64(),
        });
        let status = status(finish);
        let mut object = self.with(status, json!([self.message(status, json!([part(text)]))]), usage);
        if finish == FinishReason::Length {
            object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        object
    }

    fn message(&self, status: &str, content: Value) -> Value {
        json!({ "id": self.item, "type": "message", "status": status, "role": "assistant", "content": content })
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

const fn status(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "completed",
        FinishReason::Length => "incomplete",
    }
}

/// The named events of a streamed response.
struct ResponseStream {
    object: ResponseObject,
    sequence: u64,
    text: String,
    finish: FinishReason,
}

impl ResponseStream {
    fn new(object: ResponseObject) -> Self {
        Self { object, sequence: 0, text: String::new(), finish: FinishReason::Stop }
    }

    /// Sends one event; `fields` is an object.
    fn event(&mut self, name: &'static str, mut fields: Value, out: &mut Encoder) {
        fields["type"] = Value::from(name);
        fields["sequence_number"] = Value::from(self.sequence);
        self.sequence += 1;
        out.json(Some(name), &fields);
    }
}

impl Render for ResponseStream {
    fn begin(&mut self, out: &mut Encoder) {
        let response = self.object.in_progress();
        self.event("response.created", json!({ "response": response }), out);
        self.event("response.in_progress", json!({ "response": response }), out);
        let item = self.object.message("in_progress", json!([]));
        self.event("response.output_item.added", json!({ "output_index": 0, "item": item }), out);
        let fields = json!({ "item_id": self.object.item, "output_index": 0, "content_index": 0, "part": part("") });
        self.event("response.content_part.added", fields, out);
    }

    fn text(&mut self, _: u32, text: &str, _: &[TokenLogprob], out: &mut Encoder) {
        if text.is_empty() {
            return;
        }
        self.text.push_str(text);
        let item = &self.object.item;
        let fields = json!({ "item_id": item, "output_index": 0, "content_index": 0, "delta": text, "logprobs": [] });
        self.event("response.output_text.delta", fields, out);
    }

    fn finish(&mut self, _: u32, reason: FinishReason, _: Option<&str>, out: &mut Encoder) {
        self.finish = reason;
        let at = json!({ "item_id": self.object.item, "output_index": 0, "content_index": 0 });
        let mut fields = at.clone();
        fields["text"] = Value::from(self.text.as_str());
        fields["logprobs"] = json!([]);
        self.event("response.output_text.done", fields, out);
        let mut fields = at;
        fields["part"] = part(&self.text);
        self.event("response.content_part.done", fields, out);
        let item = self.object.message(status(reason), json!([part(&self.text)]));
        self.event("response.output_item.done", json!({ "output_index": 0, "item": item }), out);
    }

    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder) {
        let response = self.object.ended(&self.text, self.finish, usage, neurons);
        let name = match self.finish {
            FinishReason::Stop => "response.completed",
            FinishReason::Length => "response.incomplete",
        };
        self.event(name, json!({ "response": response }), out);
    }

    fn failed(&mut self, failure: &Error, out: &mut Encoder) {
        let mut response = self.object.with("failed", json!([]), Value::Null);
        let told = error::openai(failure);
        response["error"] = json!({ "code": told["code"], "message": told["message"] });
        self.event("response.failed", json!({ "response": response }), out);
    }
}
