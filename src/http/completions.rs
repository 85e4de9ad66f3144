//! OpenAI's legacy completions: `POST /v1/completions` and the same under Cloudflare's prefix. Several prompts run as
//! several calls at once; answer `i` to prompt `p` has index `p * n + i`.

use actix_web::HttpResponse;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::base::{Error, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::http::answer::{self, UsageJson};
use crate::http::ask::{self, Ask};
use crate::http::chat::{finite, include_usage};
use crate::http::fields::{Fields, mismatch};
use crate::http::format;
use crate::http::stream::{self, Render};
use crate::http::text::{self, Bounds};
use crate::http::{Services, error};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Prompt, TextInput, TokenLogprob, ToolDelta, Usage};

/// Most prompts in a request.
const MAX_PROMPTS: usize = 64;
/// Most answers to a request: each is a sequence of the engine.
const MAX_ANSWERS: usize = 128;

/// A completion request as it was meant: one input a prompt.
#[derive(Debug)]
pub(super) struct CompletionRequest {
    pub(super) inputs: Vec<TextInput>,
    choices: u32,
    stream: bool,
    include_usage: bool,
    reject_if_busy: bool,
}

/// Serves a completion.
pub(super) async fn complete(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let entry = ask.text_model(services, fields.required_text("model")?)?;
    let request = parse(&fields, &entry)?;
    let prompts = request.inputs.len() as u32;
    let deliveries = ask.serve_all(services, &entry, request.inputs, request.reject_if_busy).await?;
    let shape = Shape::new(ask.id, &entry);
    if request.stream {
        let offsets = vec![0; (prompts * request.choices) as usize];
        let render = CompletionStream { shape, include_usage: request.include_usage, offsets };
        return Ok(stream::response(deliveries, request.choices, render));
    }
    let answer = ask::collect(deliveries).await?;
    let choices = answer.choices.iter().enumerate().map(|(index, choice)| Choice {
        index,
        text: &choice.text,
        logprobs: Logprobs::new(&choice.logprobs, &mut 0),
        finish_reason: Some(choice.finish.as_str()),
        stop_reason: choice.stop.as_deref(),
    });
    let choices: Vec<_> = choices.collect();
    let usage = UsageJson::new(&answer.usage, answer.neurons);
    answer::metered(&shape.object(&choices, Some(Some(usage))), answer.neurons)
}

/// Reads a completion request; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<CompletionRequest> {
    text::refuse_what_is_not_built(fields)?;
    fields.refuse("tools", "Completions call no tools: use /v1/chat/completions.")?;
    fields.refuse("suffix", "Inserting text before a `suffix` is not available: leave it out.")?;
    let prompts = prompts(fields)?;
    let choices = text::choices(fields)?;
    if prompts.len() > MAX_PROMPTS || prompts.len() * choices as usize > MAX_ANSWERS {
        let words = format!("may hold at most {MAX_PROMPTS} prompts, and {MAX_ANSWERS} answers over all of them");
        return Err(fields.wrong("prompt", &words));
    }
    if fields.integer("best_of", 1..=text::MAX_CHOICES)?.is_some_and(|best_of| best_of != i64::from(choices)) {
        let message = "Choosing the best of several answers is not available: leave out `best_of`.";
        return Err(Error::unsupported(message).with_param("best_of"));
    }
    let stream = fields.bool("stream")?.unwrap_or(false);
    let echo = fields.bool("echo")?.unwrap_or(false);
    let logprobs = logprobs(fields)?;
    if echo && logprobs.is_some() {
        let message = "Log-probabilities of the prompt are not available: leave out `echo` or `logprobs`.";
        return Err(Error::unsupported(message).with_param("echo"));
    }
    let common = TextInput {
        prompt: Prompt::Tokens(Vec::new()),
        choices,
        max_tokens: text::max_tokens(fields, &["max_tokens"])?,
        sampling: text::sampling(fields, entry, Bounds::OpenAi)?,
        stop: text::stop(fields)?,
        logprobs,
        echo,
        priority: text::priority(fields)?,
        tools: None,
        lora: text::lora(fields, entry)?,
        grammar: format::grammar(fields)?,
    };
    let inputs = prompts.into_iter().map(|prompt| TextInput { prompt, ..common.clone() }).collect();
    Ok(CompletionRequest {
        inputs,
        choices,
        stream,
        include_usage: include_usage(fields, stream)?,
        reject_if_busy: text::reject_if_busy(fields)?,
    })
}

/// `prompt`: a string, strings, token ids, or arrays of token ids.
fn prompts(fields: &Fields) -> Result<Vec<Prompt>> {
    const EXPECTED: &str = "a string, an array of strings, an array of token ids, or an array of those";
    let path = fields.path("prompt");
    let values = match fields.get("prompt") {
        None => return Err(fields.missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Raw(text.clone())]),
        Some(Value::Array(values)) => values,
        Some(other) => return Err(mismatch(&path, EXPECTED, other)),
    };
    match values.first() {
        None => Err(fields.wrong("prompt", "must hold at least one prompt")),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(text::token_ids(&path, values)?)]),
        Some(_) => {
            if values.len() > MAX_PROMPTS {
                return Err(fields.wrong("prompt", &format!("may hold at most {MAX_PROMPTS} prompts")));
            }
            let one = |(i, value): (usize, &Value)| match value {
                Value::String(text) => Ok(Prompt::Raw(text.clone())),
                Value::Array(ids) => Ok(Prompt::Tokens(text::token_ids(&format!("{path}.{i}"), ids)?)),
                other => Err(mismatch(&format!("{path}.{i}"), EXPECTED, other)),
            };
            values.iter().enumerate().map(one).collect()
        }
    }
}

/// `logprobs: k`; `true` as some clients send it means the token alone.
fn logprobs(fields: &Fields) -> Result<Option<u32>> {
    match fields.get("logprobs") {
        Some(Value::Bool(wanted)) => Ok(wanted.then_some(0)),
        _ => Ok(fields.integer("logprobs", 0..=text::MAX_TOP_LOGPROBS)?.map(|k| k as u32)),
    }
}

/// What all objects of one answer have in common.
struct Shape {
    id: String,
    created: u64,
    model: String,
}

#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    /// Outer `None`: left out. Inner `None`: `null` until the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageJson>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'a str>,
}

/// `logprobs` of a choice in the legacy form: four arrays with one entry a token.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Option<Vec<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Shape {
    fn new(id: RequestId, entry: &CatalogEntry) -> Self {
        Self { id: format!("cmpl-{}", id.simple()), created: Millis::now().seconds(), model: entry.id.to_string() }
    }

    fn object<'a>(&'a self, choices: &'a [Choice<'a>], usage: Option<Option<UsageJson>>) -> Object<'a> {
        let Self { id, created, model } = self;
        Object { id, object: "text_completion", created: *created, model, choices, usage }
    }
}

impl Logprobs {
    /// `offset` counts the characters that the tokens before these have begun, and is moved on.
    fn new(tokens: &[TokenLogprob], offset: &mut usize) -> Option<Self> {
        if tokens.is_empty() {
            return None;
        }
        let mut logprobs =
            Self { tokens: Vec::new(), token_logprobs: Vec::new(), top_logprobs: None, text_offset: Vec::new() };
        for token in tokens {
            logprobs.tokens.push(printable(&token.bytes));
            logprobs.token_logprobs.push(finite(token.logprob));
            logprobs.text_offset.push(*offset);
            // A character belongs to the token that holds its first byte.
            *offset += token.bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
            if !token.top.is_empty() {
                let rivals = token.top.iter().map(|(_, bytes, p)| (printable(bytes), Value::from(finite(*p))));
                logprobs.top_logprobs.get_or_insert_default().push(rivals.collect());
            }
        }
        Some(logprobs)
    }
}

/// A token as a JSON string; one that is part of a character is spelled out, as OpenAI does it.
fn printable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

struct CompletionStream {
    shape: Shape,
    include_usage: bool,
    /// Characters so far, by choice, for `text_offset`.
    offsets: Vec<usize>,
}

impl CompletionStream {
    fn chunk(&self, choices: &[Choice], usage: Option<UsageJson>, out: &mut Encoder) {
        out.json(None, &self.shape.object(choices, self.include_usage.then_some(usage)));
    }
}

impl Render for CompletionStream {
    fn begin(&mut self, _: &mut Encoder) {}

    fn text(&mut self, choice: u32, text: &str, logprobs: &[TokenLogprob], out: &mut Encoder) {
        let index = choice as usize;
        let logprobs = self.offsets.get_mut(index).and_then(|offset| Logprobs::new(logprobs, offset));
        self.chunk(&[Choice { index, text, logprobs, finish_reason: None, stop_reason: None }], None, out);
    }

    fn tool(&mut self, _: u32, _: u32, _: &ToolDelta, _: &mut Encoder) {
        // Requests of this surface offer none.
    }

    fn finish(&mut self, choice: u32, reason: FinishReason, stop: Option<&str>, out: &mut Encoder) {
        let finish_reason = Some(reason.as_str());
        let choice = Choice { index: choice as usize, text: "", logprobs: None, finish_reason, stop_reason: stop };
        self.chunk(&[choice], None, out);
    }

    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder) {
        if self.include_usage {
            self.chunk(&[], Some(UsageJson::new(usage, neurons)), out);
        }
        out.text(None, "[DONE]");
    }

    fn failed(&mut self, failure: &Error, out: &mut Encoder) {
        out.json(None, &serde_json::json!({ "error": error::openai(failure) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8], logprob: f32) -> TokenLogprob {
        TokenLogprob { token: 1, bytes: bytes.to_vec(), logprob, top: vec![(2, b"x".to_vec(), -1.5)] }
    }

    #[test]
    fn offsets_count_characters_even_when_tokens_cut_them() {
        let mut offset = 0;
        let tokens = [
            token("né".as_bytes(), -0.5),
            token(b"\xf0\x9f", f32::NEG_INFINITY),
            token(b"\x98\x80", -1.0),
            token(b"!", -2.0),
        ];
        let logprobs = Logprobs::new(&tokens, &mut offset).unwrap();
        assert_eq!(logprobs.tokens, ["né", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]);
        assert_eq!(logprobs.text_offset, [0, 2, 3, 3]);
        assert_eq!(logprobs.token_logprobs, [-0.5, -9999.0, -1.0, -2.0]);
        assert_eq!(logprobs.top_logprobs.unwrap()[0]["x"], -1.5);
        assert_eq!(offset, 4);
    }
}
