//! OpenAI's answers, written for dialects that are not OpenAI's.
//!
//!     Completion   choices put together part by part  -->  one chat.completion
//!     Chunks       the same parts as they come        -->  chat.completion.chunk events: the role first, [DONE] last
//!
//! Thoughts go where open models have them, in `reasoning_content`. Blocks of thoughts that are signed go into
//! `thinking_blocks` as well: sent back with the message, they let the model go on from them.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::net::sse::Encoder;
use crate::provider::Meta;
use crate::provider::ask::JSON_TOOL;
use crate::provider::usage::Counts;

/// Why a choice ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Finish {
    Stop,
    Length,
    ToolCalls,
    ContentFilter,
}

impl Finish {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
        }
    }
}

/// OpenAI's `usage` of what was counted.
#[derive(Clone, Copy, Serialize)]
pub(super) struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
    #[serde(skip_serializing_if = "is_zero")]
    cache_write_tokens: u64,
}

#[derive(Clone, Copy, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl UsageJson {
    pub(super) fn new(counts: &Counts) -> Option<Self> {
        let usage = counts.usage()?;
        Some(Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptDetails {
                cached_tokens: usage.cached_tokens,
                cache_write_tokens: counts.written(),
            },
            completion_tokens_details: counts.reasoning().map(|tokens| CompletionDetails { reasoning_tokens: tokens }),
        })
    }
}

/// A choice of a whole answer, put together part by part.
#[derive(Default, Debug)]
pub(super) struct Choice {
    content: Option<String>,
    reasoning: String,
    refusal: Option<String>,
    thinking: Vec<Value>,
    calls: Vec<Value>,
    logprobs: Option<Value>,
    in_json: bool,
}

impl Choice {
    pub(super) fn text(&mut self, text: &str) {
        self.content.get_or_insert_default().push_str(text);
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        self.reasoning.push_str(text);
    }

    pub(super) fn refusal(&mut self, text: String) {
        self.refusal = Some(text);
    }

    pub(super) fn thinking_block(&mut self, block: Value) {
        self.thinking.push(block);
    }

    pub(super) fn logprobs(&mut self, entries: Vec<Value>) {
        self.logprobs = Some(json!({ "content": entries, "refusal": null }));
    }

    /// A call of a tool, or the answer itself where a tool was the way to get JSON.
    pub(super) fn call(&mut self, id: &str, name: &str, arguments: String, signature: Option<&str>) {
        if name == JSON_TOOL {
            self.in_json = true;
            return self.text(&arguments);
        }
        let mut call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        if let Some(signature) = signature {
            call["extra_content"] = json!({"google": {"thought_signature": signature}});
        }
        self.calls.push(call);
    }

    pub(super) fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    fn json(self, index: usize, finish: Finish) -> Value {
        let mut message = Map::new();
        message.insert("role".into(), "assistant".into());
        message.insert("content".into(), self.content.into());
        message.insert("refusal".into(), self.refusal.into());
        if !self.reasoning.is_empty() {
            message.insert("reasoning_content".into(), self.reasoning.into());
        }
        if !self.thinking.is_empty() {
            message.insert("thinking_blocks".into(), self.thinking.into());
        }
        let finish = settled(finish, self.in_json, !self.calls.is_empty());
        if !self.calls.is_empty() {
            message.insert("tool_calls".into(), self.calls.into());
        }
        json!({"index": index, "message": message, "logprobs": self.logprobs, "finish_reason": finish.as_str()})
    }
}

/// Whoever was made to answer through a tool has not called one.
fn settled(finish: Finish, in_json: bool, calls: bool) -> Finish {
    if finish == Finish::ToolCalls && in_json && !calls { Finish::Stop } else { finish }
}

/// A whole `chat.completion`. What the upstream says of id and model wins over ours.
pub(super) fn completion(
    meta: &Meta,
    id: Option<&str>,
    model: Option<&str>,
    choices: Vec<(Choice, Finish)>,
    counts: &Counts,
) -> Bytes {
    let choices = choices.into_iter().enumerate().map(|(index, (choice, finish))| choice.json(index, finish));
    let mut answer = json!({
        "id": id.unwrap_or(&meta.id),
        "object": "chat.completion",
        "created": meta.created,
        "model": model.unwrap_or(&meta.model),
        "choices": choices.collect::<Vec<_>>(),
    });
    if let Some(usage) = UsageJson::new(counts) {
        answer["usage"] = json!(usage);
    }
    answer.to_string().into()
}

/// One token in OpenAI's `logprobs.content`.
pub(super) fn logprob(token: &str, logprob: f64, rivals: Option<Vec<Value>>) -> Value {
    let mut entry = json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
    if let Some(rivals) = rivals {
        entry["top_logprobs"] = rivals.into();
    }
    entry
}

/// The chunks of a streamed answer.
#[derive(Debug)]
pub(super) struct Chunks {
    meta: Meta,
    include_usage: bool,
    choices: Vec<Progress>,
    pub(super) counts: Counts,
    done: bool,
}

#[derive(Clone, Default, Debug)]
struct Progress {
    begun: bool,
    calls: u32,
    in_json: bool,
    finished: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Outer `None`: not asked for. Inner `None`: `null` until the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageJson>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<&'a Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<Value>,
    refusal: Option<()>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking_blocks: Option<[Value; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_content: Option<Value>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

/// Where the arguments of a call go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// Into the call of this number.
    Call(u32),
    /// Into the text: they are the answer.
    Text,
}

impl Chunks {
    pub(super) fn new(meta: Meta, include_usage: bool) -> Self {
        Self { meta, include_usage, choices: Vec::new(), counts: Counts::default(), done: false }
    }

    /// What the upstream calls itself, once it says so.
    pub(super) fn named(&mut self, id: Option<&str>, model: Option<&str>) {
        if self.choices.is_empty() {
            if let Some(id) = id {
                id.clone_into(&mut self.meta.id);
            }
            if let Some(model) = model {
                model.clone_into(&mut self.meta.model);
            }
        }
    }

    /// The role, before anything else of a choice.
    pub(super) fn begin(&mut self, choice: u32, out: &mut Encoder) {
        if !std::mem::replace(&mut self.progress(choice).begun, true) {
            self.send(
                choice,
                Delta { role: Some("assistant"), content: Some(""), ..Delta::default() },
                None,
                None,
                out,
            );
        }
    }

    pub(super) fn text(&mut self, choice: u32, text: &str, out: &mut Encoder) {
        self.delta(choice, !text.is_empty(), Delta { content: Some(text), ..Delta::default() }, out);
    }

    pub(super) fn text_with_logprobs(&mut self, choice: u32, text: &str, entries: Vec<Value>, out: &mut Encoder) {
        self.begin(choice, out);
        let logprobs = Logprobs { content: entries, refusal: None };
        self.send(choice, Delta { content: Some(text), ..Delta::default() }, Some(&logprobs), None, out);
    }

    pub(super) fn reasoning(&mut self, choice: u32, text: &str, out: &mut Encoder) {
        self.delta(choice, !text.is_empty(), Delta { reasoning_content: Some(text), ..Delta::default() }, out);
    }

    pub(super) fn refusal(&mut self, choice: u32, text: &str, out: &mut Encoder) {
        self.delta(choice, true, Delta { refusal: Some(text), ..Delta::default() }, out);
    }

    pub(super) fn thinking_block(&mut self, choice: u32, block: Value, out: &mut Encoder) {
        self.delta(choice, true, Delta { thinking_blocks: Some([block]), ..Delta::default() }, out);
    }

    /// A call begins; its arguments follow.
    pub(super) fn call(
        &mut self,
        choice: u32,
        id: &str,
        name: &str,
        signature: Option<&str>,
        out: &mut Encoder,
    ) -> Target {
        let progress = self.progress(choice);
        if name == JSON_TOOL {
            progress.in_json = true;
            self.begin(choice, out);
            return Target::Text;
        }
        let index = progress.calls;
        progress.calls += 1;
        let delta = CallDelta {
            index,
            id: Some(id),
            kind: Some("function"),
            function: FunctionDelta { name: Some(name), arguments: "" },
            extra_content: signature.map(|signature| json!({"google": {"thought_signature": signature}})),
        };
        self.delta(choice, true, Delta { tool_calls: Some([delta]), ..Delta::default() }, out);
        Target::Call(index)
    }

    pub(super) fn arguments(&mut self, choice: u32, target: Target, more: &str, out: &mut Encoder) {
        let Target::Call(index) = target else { return self.text(choice, more, out) };
        let function = FunctionDelta { name: None, arguments: more };
        let delta = CallDelta { index, id: None, kind: None, function, extra_content: None };
        self.delta(choice, !more.is_empty(), Delta { tool_calls: Some([delta]), ..Delta::default() }, out);
    }

    pub(super) fn has_calls(&self, choice: u32) -> bool {
        self.choices.get(choice as usize).is_some_and(|progress| progress.calls > 0)
    }

    pub(super) fn finish(&mut self, choice: u32, finish: Finish, out: &mut Encoder) {
        self.begin(choice, out);
        let progress = self.progress(choice);
        if std::mem::replace(&mut progress.finished, true) {
            return;
        }
        let finish = settled(finish, progress.in_json, progress.calls > 0);
        self.send(choice, Delta::default(), None, Some(finish), out);
    }

    /// Whether every choice that began has ended, and one has.
    pub(super) fn is_finished(&self) -> bool {
        !self.choices.is_empty() && self.choices.iter().all(|progress| progress.finished)
    }

    /// The end, once: usage if that was asked for, and the mark.
    pub(super) fn done(&mut self, out: &mut Encoder) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        // Unknown is not told: a client would take it for nothing used.
        if self.include_usage
            && let Some(usage) = UsageJson::new(&self.counts)
        {
            self.write(&[], Some(usage), out);
        }
        out.text(None, "[DONE]");
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    fn progress(&mut self, choice: u32) -> &mut Progress {
        let at = choice as usize;
        if self.choices.len() <= at {
            self.choices.resize(at + 1, Progress::default());
        }
        &mut self.choices[at]
    }

    fn delta(&mut self, choice: u32, says_something: bool, delta: Delta, out: &mut Encoder) {
        if says_something {
            self.begin(choice, out);
            self.send(choice, delta, None, None, out);
        }
    }

    fn send(
        &mut self,
        index: u32,
        delta: Delta,
        logprobs: Option<&Logprobs>,
        finish: Option<Finish>,
        out: &mut Encoder,
    ) {
        let choice = ChunkChoice { index, delta, logprobs, finish_reason: finish.map(Finish::as_str) };
        self.write(&[choice], None, out);
    }

    fn write(&self, choices: &[ChunkChoice], usage: Option<UsageJson>, out: &mut Encoder) {
        let chunk = Chunk {
            id: &self.meta.id,
            object: "chat.completion.chunk",
            created: self.meta.created,
            model: &self.meta.model,
            choices,
            usage: self.include_usage.then_some(usage),
        };
        out.json(None, &chunk);
    }
}
