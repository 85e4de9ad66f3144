//! OpenAI's legacy completions: `POST /v1/completions` and the same under Cloudflare's prefix. Several prompts run as
//! several calls at once; answer `i` to prompt `p` has index `p * n + i`. With `best_of`, more answers are computed than
//! given: those stay whose tokens were the most likely on average.

use std::ops::Range;

use actix_web::HttpResponse;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::base::{Error, Millis, Neurons, RequestId, Result};
use crate::config::CatalogEntry;
use crate::gateway;
use crate::http::answer::{self, PromptLogprobs, UsageJson, finite};
use crate::http::ask::{self, Ask};
use crate::http::chat::include_usage;
use crate::http::fields::{Fields, mismatch};
use crate::http::format;
use crate::http::stream::{self, Render};
use crate::http::text::{self, Bounds};
use crate::http::{Services, error};
use crate::net::sse::Encoder;
use crate::task::{FinishReason, Prompt, PromptToken, TextInput, TokenLogprob, ToolDelta, Usage};

/// Most prompts in a request.
const MAX_PROMPTS: usize = 64;
/// Most answers to a request: each is a sequence of the engine.
const MAX_ANSWERS: usize = 128;

/// A completion request as it was meant: one input a prompt.
#[derive(Debug)]
pub(super) struct CompletionRequest {
    pub(super) inputs: Vec<TextInput>,
    /// Answers to each prompt that are given.
    n: u32,
    /// Answers to each prompt that are computed.
    choices: u32,
    /// Rivals to report for each token; with `echo`, for those of the prompt as well.
    logprobs: Option<u32>,
    /// Rivals to report for each token of the prompt.
    prompt_logprobs: Option<u32>,
    echo: bool,
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
        let CompletionRequest { include_usage, echo, logprobs, .. } = request;
        let render = CompletionStream { shape, include_usage, echo, logprobs, offsets };
        return Ok(stream::response(deliveries, request.choices, render));
    }
    let mut answer = ask::collect(deliveries).await?;
    if request.choices > request.n {
        let groups = answer.choices.chunks(request.choices as usize);
        answer.choices = groups.flat_map(|group| best(group, request.n as usize)).collect();
    }
    let choices = answer.choices.iter().enumerate().map(|(index, choice)| {
        let prompt = choice.prompt.as_ref().filter(|_| request.echo);
        let prompt = prompt.map_or(&[][..], |prompt| prompt.as_slice());
        Choice {
            index,
            text: &choice.text,
            logprobs: request.logprobs.and_then(|rivals| Logprobs::new(prompt, &choice.logprobs, rivals, &mut 0)),
            finish_reason: Some(choice.finish.as_str()),
            stop_reason: choice.stop.as_deref(),
            prompt_logprobs: request.prompt_logprobs.and_then(|rivals| PromptLogprobs::new(choice, rivals)),
        }
    });
    let choices: Vec<_> = choices.collect();
    let usage = UsageJson::new(&answer.usage, answer.neurons);
    answer::metered(&shape.object(&choices, Some(Some(usage))), answer.neurons)
}

/// The `count` answers whose tokens are the most likely on average, best first; an empty one comes last.
fn best(choices: &[gateway::Choice], count: usize) -> Vec<gateway::Choice> {
    let mean = |choice: &gateway::Choice| match choice.logprobs.len() {
        0 => f64::NEG_INFINITY,
        tokens => choice.logprobs.iter().map(|token| f64::from(finite(token.logprob))).sum::<f64>() / tokens as f64,
    };
    let mut order: Vec<(f64, &gateway::Choice)> = choices.iter().map(|choice| (mean(choice), choice)).collect();
    // Stable: of equals, the one that was drawn first.
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    order.into_iter().take(count).map(|(_, choice)| choice.clone()).collect()
}

/// Reads a completion request; the model is known already.
pub(super) fn parse(fields: &Fields, entry: &CatalogEntry) -> Result<CompletionRequest> {
    text::refuse_what_is_not_built(fields)?;
    fields.refuse("tools", "Completions call no tools: use /v1/chat/completions.")?;
    fields.refuse("suffix", "Inserting text before a `suffix` is not available: leave it out.")?;
    let prompts = prompts(fields)?;
    let n = text::choices(fields)?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    let choices = fields.integer("best_of", 1..=text::MAX_CHOICES)?.map_or(n, |best_of| best_of as u32);
    if choices < n {
        return Err(fields.wrong("best_of", &format!("must be at least `n`, which is {n}")));
    }
    if choices > n && stream {
        return Err(fields.wrong("best_of", "must not be more than `n` when `stream` is true"));
    }
    if prompts.len() > MAX_PROMPTS || prompts.len() * choices as usize > MAX_ANSWERS {
        let words = format!("may hold at most {MAX_PROMPTS} prompts, and {MAX_ANSWERS} answers over all of them");
        return Err(fields.wrong("prompt", &words));
    }
    let echo = fields.bool("echo")?.unwrap_or(false);
    let logprobs = logprobs(fields)?;
    let prompt_logprobs = text::prompt_logprobs(fields, stream)?;
    // 0 is how evaluations ask about the prompt alone.
    let nothing = fields.get("max_tokens").and_then(Value::as_f64) == Some(0.0);
    let max_tokens = match nothing && (echo || prompt_logprobs.is_some()) {
        true => Some(0),
        false => text::max_tokens(fields, &["max_tokens"])?,
    };
    let common = TextInput {
        prompt: Prompt::Tokens(Vec::new()),
        choices,
        max_tokens,
        sampling: text::sampling(fields, entry, Bounds::OpenAi)?,
        stop: text::stop(fields)?,
        // Ranking takes them, whoever else does.
        logprobs: if choices > n { logprobs.or(Some(0)) } else { logprobs },
        prompt_logprobs: if echo { logprobs.max(prompt_logprobs) } else { prompt_logprobs },
        speculation: text::speculation(fields)?,
        echo,
        priority: text::priority(fields)?,
        tools: None,
        lora: text::lora(fields, entry)?,
        grammar: format::grammar(fields)?,
    };
    let inputs = prompts.into_iter().map(|prompt| TextInput { prompt, ..common.clone() }).collect();
    Ok(CompletionRequest {
        inputs,
        n,
        choices,
        logprobs,
        prompt_logprobs,
        echo,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

/// Id, bytes, log-probability.
type Rival = (u32, Vec<u8>, f32);

/// `logprobs` of a choice in the legacy form: four arrays with one entry a token. What precedes everything has no
/// probability: `null`.
#[derive(Serialize, Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
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

impl Choice<'_> {
    /// Nothing new of a choice.
    fn empty(index: u32) -> Self {
        let index = index as usize;
        Self { index, text: "", logprobs: None, finish_reason: None, stop_reason: None, prompt_logprobs: None }
    }
}

impl Logprobs {
    /// Of an echoed prompt and of an answer, with at most so many rivals a token. `offset` counts the characters that the
    /// tokens before these have begun, and is moved on.
    fn new(prompt: &[PromptToken], tokens: &[TokenLogprob], rivals: u32, offset: &mut usize) -> Option<Self> {
        if prompt.is_empty() && tokens.is_empty() {
            return None;
        }
        let mut logprobs = Self { top_logprobs: (rivals > 0).then(Vec::new), ..Self::default() };
        for token in prompt {
            let known = token.scored.as_ref().map(|scored| (scored.logprob, scored.top.as_slice()));
            logprobs.push(&token.bytes, known, rivals, offset);
        }
        for token in tokens {
            logprobs.push(&token.bytes, Some((token.logprob, &token.top)), rivals, offset);
        }
        Some(logprobs)
    }

    fn push(&mut self, bytes: &[u8], known: Option<(f32, &[Rival])>, rivals: u32, offset: &mut usize) {
        self.tokens.push(printable(bytes));
        self.token_logprobs.push(known.map(|(logprob, _)| finite(logprob)));
        self.text_offset.push(*offset);
        // A character belongs to the token that holds its first byte.
        *offset += bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
        if let Some(top) = &mut self.top_logprobs {
            top.push(known.map(|(_, best)| {
                let best = best.iter().take(rivals as usize);
                best.map(|(_, bytes, p)| (printable(bytes), Value::from(finite(*p)))).collect()
            }));
        }
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
    echo: bool,
    logprobs: Option<u32>,
    /// Characters so far, by choice, for `text_offset`.
    offsets: Vec<usize>,
}

impl CompletionStream {
    fn offset(&mut self, choice: u32) -> Option<&mut usize> {
        self.offsets.get_mut(choice as usize)
    }

    fn chunk(&self, choices: &[Choice], usage: Option<UsageJson>, out: &mut Encoder) {
        out.json(None, &self.shape.object(choices, self.include_usage.then_some(usage)));
    }
}

impl Render for CompletionStream {
    fn begin(&mut self, _: &mut Encoder) {}

    fn prompt(&mut self, choices: Range<u32>, tokens: &[PromptToken], out: &mut Encoder) {
        let Some(rivals) = self.logprobs.filter(|_| self.echo) else { return };
        for choice in choices {
            let logprobs = self.offset(choice).and_then(|offset| Logprobs::new(tokens, &[], rivals, offset));
            self.chunk(&[Choice { logprobs, ..Choice::empty(choice) }], None, out);
        }
    }

    fn text(&mut self, choice: u32, text: &str, logprobs: &[TokenLogprob], out: &mut Encoder) {
        let rivals = self.logprobs.unwrap_or(0);
        let logprobs = self.offset(choice).and_then(|offset| Logprobs::new(&[], logprobs, rivals, offset));
        self.chunk(&[Choice { text, logprobs, ..Choice::empty(choice) }], None, out);
    }

    fn tool(&mut self, _: u32, _: u32, _: &ToolDelta, _: &mut Encoder) {
        // Requests of this surface offer none.
    }

    fn finish(&mut self, choice: u32, reason: FinishReason, stop: Option<&str>, out: &mut Encoder) {
        let finish_reason = Some(reason.as_str());
        self.chunk(&[Choice { finish_reason, stop_reason: stop, ..Choice::empty(choice) }], None, out);
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
        let logprobs = Logprobs::new(&[], &tokens, 1, &mut offset).unwrap();
        assert_eq!(logprobs.tokens, ["né", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]);
        assert_eq!(logprobs.text_offset, [0, 2, 3, 3]);
        assert_eq!(logprobs.token_logprobs, [-0.5, -9999.0, -1.0, -2.0].map(Some));
        assert_eq!(logprobs.top_logprobs.unwrap()[0].as_ref().unwrap()["x"], -1.5);
        assert_eq!(offset, 4);
    }

    #[test]
    fn the_best_answers_are_those_with_the_most_likely_tokens_on_average() {
        let check = |answers: &[&[f32]], count: usize, expected: &[usize]| {
            let answers: Vec<gateway::Choice> = answers
                .iter()
                .enumerate()
                .map(|(at, logprobs)| gateway::Choice {
                    text: at.to_string(),
                    logprobs: logprobs.iter().map(|&logprob| token(b"x", logprob)).collect(),
                    ..gateway::Choice::default()
                })
                .collect();
            let best: Vec<usize> = best(&answers, count).iter().map(|choice| choice.text.parse().unwrap()).collect();
            assert_eq!(best, expected);
        };
        check(&[&[-1.0, -1.0], &[-0.5], &[-3.0]], 2, &[1, 0]);
        check(&[&[-1.0; 9], &[-1.5]], 1, &[0]);
        check(&[&[-1.0], &[-1.0], &[]], 3, &[0, 1, 2]);
        check(&[&[], &[f32::NEG_INFINITY], &[-9.0]], 3, &[2, 1, 0]);
    }
}
