//! OpenAI's responses: `POST /v1/responses`, messages and calls of functions out. Nothing is stored, so nothing can be
//! continued by id.

use actix_web::HttpResponse;
use serde_json::{Map, Value, json};

use crate::base::{Error, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::http::ask::Ask;
use crate::http::fields::{Fields, mismatch};
use crate::http::format;
use crate::http::stream::{self, Render};
use crate::http::text::{self, Bounds};
use crate::http::{Services, answer, error, tools};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Message, Prompt, Role, TextInput, TokenLogprob, ToolCall, ToolDelta, Usage};

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
        return Ok(stream::response(vec![delivery], 1, ResponseStream::new(object, ask.id)));
    }
    let answer = delivery.collect().await?;
    let choice = answer.choices.into_iter().next().unwrap_or_default();
    let mut output = Output::new(ask.id);
    if !choice.text.is_empty() || choice.calls.is_empty() {
        output.items.push(Item::Message { text: choice.text });
    }
    output.items.extend(choice.calls.into_iter().map(Item::Call));
    answer::metered(&object.ended(&output, choice.finish, &answer.usage, answer.neurons), answer.neurons)
}

/// Reads a responses request; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<ResponsesRequest> {
    text::refuse_what_is_not_built(fields)?;
    fields.refuse("previous_response_id", "Responses are not stored here: send the whole conversation in `input`.")?;
    fields.refuse("conversation", "Conversations are not stored here: send the whole conversation in `input`.")?;
    fields.refuse("background", "Background responses are not available: leave out `background`.")?;
    fields.refuse("prompt", "Stored prompts are not available: write the text into `input`.")?;
    let format = fields.object("text")?.and_then(|text| text.get("format").cloned());
    if !matches!(fields.text("truncation")?, None | Some("disabled")) {
        return Err(Error::unsupported("Input is never truncated: leave out `truncation`.").with_param("truncation"));
    }
    if fields.integer("top_logprobs", 0..=text::MAX_TOP_LOGPROBS)?.is_some_and(|top| top > 0) {
        let message = "Log-probabilities are not part of a response here: use /v1/chat/completions.";
        return Err(Error::unsupported(message).with_param("top_logprobs"));
    }
    if fields.has("prompt_logprobs") {
        let message = "Log-probabilities are not part of a response here: use /v1/chat/completions.";
        return Err(Error::unsupported(message).with_param("prompt_logprobs"));
    }
    let mut template_kwargs = text::template_kwargs(fields)?;
    if let Some(effort) = fields.object("reasoning")?.map(|reasoning| reasoning.text("effort")).transpose()?.flatten() {
        template_kwargs.insert("reasoning_effort".to_owned(), Value::String(effort.to_owned()));
    }
    let max_tokens = text::max_tokens(fields, &["max_output_tokens"])?;
    let sampling = text::sampling(fields, entry, Bounds::OpenAi)?;
    let echoed = Map::from_iter([
        ("text".to_owned(), json!({ "format": format.unwrap_or_else(|| json!({ "type": "text" })) })),
        ("instructions".to_owned(), json!(fields.text("instructions")?)),
        ("max_output_tokens".to_owned(), json!(max_tokens)),
        ("metadata".to_owned(), metadata(fields)?),
        ("parallel_tool_calls".to_owned(), json!(fields.bool("parallel_tool_calls")?.unwrap_or(true))),
        ("temperature".to_owned(), as_written(sampling.temperature)),
        ("tool_choice".to_owned(), fields.get("tool_choice").cloned().unwrap_or_else(|| json!("auto"))),
        ("tools".to_owned(), fields.get("tools").cloned().unwrap_or_else(|| json!([]))),
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
        prompt_logprobs: None,
        speculation: text::speculation(fields)?,
        echo: false,
        priority: text::priority(fields)?,
        tools: tools::offered(fields)?,
        lora: text::lora(fields, entry)?,
        grammar: format::grammar(fields)?,
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
                add(&Fields::at(item, format!("{path}.{i}"))?, &mut messages)?;
            }
            tools::link(&mut messages);
        }
        Some(other) => return Err(mismatch(&path, "a string or an array of items", other)),
    }
    if messages.iter().all(|message| message.role == Role::System) && !messages.iter().any(|m| !m.content.is_empty()) {
        return Err(fields.wrong("input", "holds no text"));
    }
    Ok(messages)
}

/// One item: a turn; a call, which belongs to the turn that stands before it; the result of one; or the reasoning of an
/// earlier answer, which templates leave out as well.
fn add(item: &Fields, messages: &mut Vec<Message>) -> Result<()> {
    match item.text("type")? {
        None | Some("message") => {
            let Some(content) = item.get("content") else { return Err(item.missing("content")) };
            let role = text::role(item)?;
            messages.push(Message::new(role, text::content(&item.path("content"), content)?));
        }
        Some("function_call") => {
            let call =
                tools::call(item.required_text("call_id")?, item.required_text("name")?, tools::arguments(item)?);
            if messages.last().is_none_or(|last| last.role != Role::Assistant) {
                messages.push(Message::new(Role::Assistant, ""));
            }
            let calls = messages.last_mut().map(|last| last.tool_calls.get_or_insert_with(|| json!([])));
            if let Some(Value::Array(calls)) = calls {
                calls.push(call);
            }
        }
        Some("function_call_output") => {
            let Some(output) = item.get("output") else { return Err(item.missing("output")) };
            let content = text::content(&item.path("output"), output)?;
            let tool_call_id = Some(item.required_text("call_id")?.to_owned());
            messages.push(Message { tool_call_id, ..Message::new(Role::Tool, content) });
        }
        Some("reasoning") => {}
        Some("item_reference") => {
            return Err(Error::unsupported("Responses are not stored here: send the item itself.")
                .with_param(item.path("type")));
        }
        Some("custom_tool_call" | "custom_tool_call_output") => {
            return Err(
                Error::unsupported("Custom tools are not available: offer functions.").with_param(item.path("type"))
            );
        }
        Some(_) => {
            let known =
                "must be `message`, `function_call`, `function_call_output` or `reasoning`: others are not known";
            return Err(item.wrong("type", known));
        }
    }
    Ok(())
}

/// What the model has put out so far.
struct Output {
    request: String,
    items: Vec<Item>,
}

enum Item {
    Message { text: String },
    Call(ToolCall),
}

impl Output {
    fn new(request: RequestId) -> Self {
        Self { request: request.simple(), items: Vec::new() }
    }

    /// The id of an item by its place.
    fn id(&self, at: usize) -> String {
        match self.items.get(at) {
            Some(Item::Call(_)) => format!("fc_{}{at:02x}", self.request),
            // The one message that most answers are has the request's own.
            _ if at == 0 => format!("msg_{}", self.request),
            _ => format!("msg_{}{at:02x}", self.request),
        }
    }

    /// An item by its place, as it stands.
    fn item(&self, at: usize, status: &str) -> Value {
        let id = self.id(at);
        match self.items.get(at) {
            Some(Item::Call(call)) => json!({
                "id": id,
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
            }),
            Some(Item::Message { text }) if status != "in_progress" => message(id, status, json!([part(text)])),
            _ => message(id, status, json!([])),
        }
    }
}

fn message(id: String, status: &str, content: Value) -> Value {
    json!({ "id": id, "type": "message", "status": status, "role": "assistant", "content": content })
}

/// The response object through its life.
struct ResponseObject {
    id: String,
    created_at: u64,
    model: String,
    echoed: Map<String, Value>,
}

impl ResponseObject {
    fn new(id: RequestId, entry: &CatalogEntry, echoed: Map<String, Value>) -> Self {
        Self {
            id: format!("resp_{}", id.simple()),
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
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "store": false,
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
    fn ended(&self, output: &Output, finish: FinishReason, usage: &Usage, neurons: Neurons) -> Value {
        let usage = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": { "cached_tokens": usage.cached_tokens },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": usage.total_tokens(),
            "neurons": neurons.as_f64(),
        });
        let last = output.items.len().saturating_sub(1);
        // Whatever was cut off was cut off in the last item.
        let items = (0..output.items.len())
            .map(|at| output.item(at, if at == last { status(finish) } else { status(FinishReason::Stop) }));
        let mut object = self.with(status(finish), items.collect(), usage);
        if finish == FinishReason::Length {
            object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        object
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

const fn status(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop | FinishReason::ToolCalls => "completed",
        FinishReason::Length => "incomplete",
    }
}

/// The named events of a streamed response.
struct ResponseStream {
    object: ResponseObject,
    sequence: u64,
    output: Output,
    finish: FinishReason,
}

impl ResponseStream {
    fn new(object: ResponseObject, request: RequestId) -> Self {
        Self { object, sequence: 0, output: Output::new(request), finish: FinishReason::Stop }
    }

    /// Sends one event; `fields` is an object.
    fn event(&mut self, name: &'static str, mut fields: Value, out: &mut Encoder) {
        fields["type"] = Value::from(name);
        fields["sequence_number"] = Value::from(self.sequence);
        self.sequence += 1;
        out.json(Some(name), &fields);
    }

    /// Sends one event about the newest item.
    fn item_event(&mut self, name: &'static str, more: Value, out: &mut Encoder) {
        let at = self.output.items.len().saturating_sub(1);
        let mut fields = json!({ "item_id": self.output.id(at), "output_index": at });
        for (key, value) in more.as_object().into_iter().flatten() {
            fields[key] = value.clone();
        }
        self.event(name, fields, out);
    }

    /// Closes the newest item, if there is one, and begins another.
    fn open(&mut self, item: Item, out: &mut Encoder) {
        self.close("completed", out);
        self.output.items.push(item);
        let at = self.output.items.len() - 1;
        let fields = json!({ "output_index": at, "item": self.output.item(at, "in_progress") });
        self.event("response.output_item.added", fields, out);
        if let Some(Item::Message { .. }) = self.output.items.last() {
            self.item_event("response.content_part.added", json!({ "content_index": 0, "part": part("") }), out);
        }
    }

    /// Says that the newest item is complete.
    fn close(&mut self, status: &str, out: &mut Encoder) {
        match self.output.items.last() {
            None => return,
            Some(Item::Message { text }) => {
                let done = json!({ "content_index": 0, "text": text, "logprobs": [] });
                let part = json!({ "content_index": 0, "part": part(text) });
                self.item_event("response.output_text.done", done, out);
                self.item_event("response.content_part.done", part, out);
            }
            Some(Item::Call(call)) => {
                let done = json!({ "name": call.name, "arguments": call.arguments });
                self.item_event("response.function_call_arguments.done", done, out);
            }
        }
        let at = self.output.items.len() - 1;
        let fields = json!({ "output_index": at, "item": self.output.item(at, status) });
        self.event("response.output_item.done", fields, out);
    }
}

impl Render for ResponseStream {
    fn begin(&mut self, out: &mut Encoder) {
        let response = self.object.in_progress();
        self.event("response.created", json!({ "response": response }), out);
        self.event("response.in_progress", json!({ "response": response }), out);
    }

    fn text(&mut self, _: u32, text: &str, _: &[TokenLogprob], out: &mut Encoder) {
        if text.is_empty() {
            return;
        }
        if !matches!(self.output.items.last(), Some(Item::Message { .. })) {
            self.open(Item::Message { text: String::new() }, out);
        }
        if let Some(Item::Message { text: whole }) = self.output.items.last_mut() {
            whole.push_str(text);
        }
        let more = json!({ "content_index": 0, "delta": text, "logprobs": [] });
        self.item_event("response.output_text.delta", more, out);
    }

    fn tool(&mut self, _: u32, _: u32, delta: &ToolDelta, out: &mut Encoder) {
        match delta {
            ToolDelta::Begin { id, name } => {
                let call = ToolCall { id: id.clone(), name: name.clone(), arguments: String::new() };
                self.open(Item::Call(call), out);
            }
            ToolDelta::Arguments(more) => {
                if let Some(Item::Call(call)) = self.output.items.last_mut() {
                    call.arguments.push_str(more);
                }
                self.item_event("response.function_call_arguments.delta", json!({ "delta": more }), out);
            }
        }
    }

    fn finish(&mut self, _: u32, reason: FinishReason, _: Option<&str>, out: &mut Encoder) {
        self.finish = reason;
        if self.output.items.is_empty() {
            self.open(Item::Message { text: String::new() }, out);
        }
        self.close(status(reason), out);
    }

    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder) {
        let response = self.object.ended(&self.output, self.finish, usage, neurons);
        let name = match self.finish {
            FinishReason::Stop | FinishReason::ToolCalls => "response.completed",
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
