//! OpenAI's chat completions: `POST /v1/chat/completions`, the same under Cloudflare's prefix, and the result shape of
//! native chat-schema models.

use actix_web::HttpResponse;
use serde::Serialize;
use serde_json::Value;

use crate::base::{Error, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::gateway::Answer;
use crate::http::answer::{PromptLogprobs, UsageJson, finite};
use crate::http::ask::Ask;
use crate::http::fields::Fields;
use crate::http::format;
use crate::http::native::{Padding, UsageEvent};
use crate::http::route::Surface;
use crate::http::stream::{self, Render};
use crate::http::text::{self, Bounds};
use crate::http::{Services, answer, error, tools};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Prompt, TextInput, TokenLogprob, ToolDelta, Usage};

/// A chat request as it was meant.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) input: TextInput,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) reject_if_busy: bool,
}

/// Serves a chat completion.
pub(super) async fn chat(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let entry = ask.text_model(services, fields.required_text("model")?)?;
    let request = parse(&fields, &entry)?;
    let choices = request.input.choices;
    let delivery = ask.serve(services, &entry, request.input, request.reject_if_busy).await?;
    let shape = Shape::new(ask.id, &entry);
    if request.stream {
        let render = ChatStream::new(shape, ask.surface, choices, request.include_usage);
        return Ok(stream::response(vec![delivery], choices, render));
    }
    let answer = delivery.collect().await?;
    answer::metered(&shape.completion(&answer), answer.neurons)
}

/// Reads a chat request; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<ChatRequest> {
    text::refuse_what_is_not_built(fields)?;
    fields.refuse("audio", "Audio is not available in this build: leave out `audio`.")?;
    fields
        .refuse("web_search_options", "Web search is not available in this build: leave out `web_search_options`.")?;
    if fields.array("modalities")?.is_some_and(|wanted| wanted.iter().any(|modality| modality != "text")) {
        return Err(Error::unsupported("Answers are text only: leave out `modalities`.").with_param("modalities"));
    }
    let stream = fields.bool("stream")?.unwrap_or(false);
    let input = TextInput {
        prompt: Prompt::Chat { messages: text::messages(fields)?, template_kwargs: text::template_kwargs(fields)? },
        choices: text::choices(fields)?,
        max_tokens: text::max_tokens(fields, &["max_completion_tokens", "max_tokens"])?,
        sampling: text::sampling(fields, entry, Bounds::OpenAi)?,
        stop: text::stop(fields)?,
        logprobs: logprobs(fields)?,
        prompt_logprobs: text::prompt_logprobs(fields, stream)?,
        speculation: text::speculation(fields)?,
        echo: false,
        priority: text::priority(fields)?,
        tools: tools::offered(fields)?,
        lora: text::lora(fields, entry)?,
        grammar: format::grammar(fields)?,
    };
    Ok(ChatRequest {
        input,
        stream,
        include_usage: include_usage(fields, stream)?,
        reject_if_busy: text::reject_if_busy(fields)?,
    })
}

/// `logprobs: true` with `top_logprobs` rivals.
pub(super) fn logprobs(fields: &Fields) -> Result<Option<u32>> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=text::MAX_TOP_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(fields.wrong("top_logprobs", "needs `logprobs` to be true"));
    }
    Ok(wanted.then(|| top.unwrap_or(0) as u32))
}

/// `stream_options.include_usage`.
pub(super) fn include_usage(fields: &Fields, stream: bool) -> Result<bool> {
    let Some(options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(fields.wrong("stream_options", "is only allowed when `stream` is true"));
    }
    Ok(options.bool("include_usage")?.unwrap_or(false))
}

/// What all objects of one answer have in common.
pub(super) struct Shape {
    id: String,
    created: u64,
    model: String,
}

impl Shape {
    pub(super) fn new(id: RequestId, entry: &CatalogEntry) -> Self {
        Self { id: format!("chatcmpl-{}", id.simple()), created: Millis::now().seconds(), model: entry.id.to_string() }
    }

    /// A whole `chat.completion`.
    pub(super) fn completion<'a>(&'a self, answer: &'a Answer) -> Completion<'a> {
        let choices = answer.choices.iter().enumerate().map(|(index, choice)| CompletionChoice {
            index,
            message: AssistantMessage {
                role: "assistant",
                // Whoever only calls tools has nothing to say: OpenAI's word for that is `null`.
                content: Some(choice.text.as_str()).filter(|text| !text.is_empty() || choice.calls.is_empty()),
                refusal: None,
                reasoning_content: None,
                tool_calls: choice.calls.iter().map(tools::function_call).collect(),
            },
            logprobs: ChatLogprobs::new(&choice.logprobs),
            finish_reason: choice.finish.as_str(),
            stop_reason: choice.stop.as_deref(),
        });
        Completion {
            id: &self.id,
            object: "chat.completion",
            created: self.created,
            model: &self.model,
            choices: choices.collect(),
            usage: UsageJson::new(&answer.usage, answer.neurons),
            prompt_logprobs: answer.choices.first().and_then(|choice| PromptLogprobs::new(choice, u32::MAX)),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice<'a>>,
    usage: UsageJson,
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    message: AssistantMessage<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    stop_reason: Option<&'a str>,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    reasoning_content: Option<()>,
    tool_calls: Vec<Value>,
}

/// `logprobs` of a choice in chat form.
#[derive(Serialize)]
struct ChatLogprobs {
    content: Vec<TokenJson>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct TokenJson {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<RivalJson>,
}

#[derive(Serialize)]
struct RivalJson {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    fn new(tokens: &[TokenLogprob]) -> Option<Self> {
        if tokens.is_empty() {
            return None;
        }
        let content = tokens.iter().map(|token| TokenJson {
            token: String::from_utf8_lossy(&token.bytes).into_owned(),
            logprob: finite(token.logprob),
            bytes: token.bytes.clone(),
            top_logprobs: token
                .top
                .iter()
                .map(|(_, bytes, logprob)| RivalJson {
                    token: String::from_utf8_lossy(bytes).into_owned(),
                    logprob: finite(*logprob),
                    bytes: bytes.clone(),
                })
                .collect(),
        });
        Some(Self { content: content.collect(), refusal: None })
    }
}

/// Chunks of a streamed chat completion; on the native surface with padding and its own usage event.
pub(super) struct ChatStream {
    shape: Shape,
    surface: Surface,
    choices: u32,
    include_usage: bool,
    padding: Option<Padding>,
    request: Option<RequestId>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Outer `None`: not asked for, left out. Inner `None`: asked for, `null` until the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageJson>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    p: Option<&'static str>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'a str>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

/// New of a call: its id and name at first, then only more of its arguments.
#[derive(Serialize)]
pub(super) struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a str>,
}

impl<'a> CallDelta<'a> {
    /// `begin`: what stands in the place of arguments when a call begins.
    pub(super) fn new(call: u32, delta: &'a ToolDelta, begin: Option<&'a str>) -> Self {
        let (id, kind, function) = match delta {
            ToolDelta::Begin { id, name } => {
                (Some(id.as_str()), Some("function"), FunctionDelta { name: Some(name), arguments: begin })
            }
            ToolDelta::Arguments(more) => (None, None, FunctionDelta { name: None, arguments: Some(more) }),
        };
        Self { index: call, id, kind, function }
    }
}

impl ChatStream {
    pub(super) fn new(shape: Shape, surface: Surface, choices: u32, include_usage: bool) -> Self {
        Self { shape, surface, choices, include_usage, padding: None, request: None }
    }

    /// The form that native chat-schema models stream in.
    pub(super) fn native(shape: Shape, surface: Surface, choices: u32, request: RequestId) -> Self {
        let padding = Some(Padding::new(request));
        Self { shape, surface, choices, include_usage: false, padding, request: Some(request) }
    }

    fn chunk(&mut self, choices: &[ChunkChoice], usage: Option<UsageJson>, out: &mut Encoder) {
        let chunk = Chunk {
            id: &self.shape.id,
            object: "chat.completion.chunk",
            created: self.shape.created,
            model: &self.shape.model,
            choices,
            usage: self.include_usage.then_some(usage),
            p: self.padding.as_mut().map(Padding::next),
        };
        out.json(None, &chunk);
    }
}

impl Render for ChatStream {
    fn begin(&mut self, out: &mut Encoder) {
        for index in 0..self.choices {
            let delta = Delta { role: Some("assistant"), content: Some(""), tool_calls: None };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None };
            self.chunk(&[choice], None, out);
        }
    }

    fn text(&mut self, choice: u32, text: &str, logprobs: &[TokenLogprob], out: &mut Encoder) {
        let delta = Delta { content: Some(text), ..Delta::default() };
        let logprobs = ChatLogprobs::new(logprobs);
        let choice = ChunkChoice { index: choice, delta, logprobs, finish_reason: None, stop_reason: None };
        self.chunk(&[choice], None, out);
    }

    fn tool(&mut self, choice: u32, call: u32, delta: &ToolDelta, out: &mut Encoder) {
        let delta = Delta { tool_calls: Some([CallDelta::new(call, delta, Some(""))]), ..Delta::default() };
        let choice = ChunkChoice { index: choice, delta, logprobs: None, finish_reason: None, stop_reason: None };
        self.chunk(&[choice], None, out);
    }

    fn finish(&mut self, choice: u32, reason: FinishReason, stop: Option<&str>, out: &mut Encoder) {
        let choice = ChunkChoice {
            index: choice,
            delta: Delta::default(),
            logprobs: None,
            finish_reason: Some(reason.as_str()),
            stop_reason: stop,
        };
        self.chunk(&[choice], None, out);
    }

    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder) {
        let usage = UsageJson::new(usage, neurons);
        if self.padding.is_some() {
            out.json(None, &UsageEvent::new(usage));
        } else if self.include_usage {
            self.chunk(&[], Some(usage), out);
        }
        out.text(None, "[DONE]");
    }

    fn failed(&mut self, failure: &Error, out: &mut Encoder) {
        let value: Value = match (self.surface, self.request) {
            (Surface::Native | Surface::Binding, Some(request)) => error::native(request, failure),
            _ => error::openai(failure),
        };
        out.json(None, &serde_json::json!({ "error": value }));
    }
}
