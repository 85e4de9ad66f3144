//! Text generation: what a caller asks for after parsing, before the model's own template and tokenizer see it.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::task::{Grammar, Tools};

/// One text-generation call, whatever surface it came through. Ranges are checked where it is parsed; whoever holds one
/// may rely on them.
#[derive(Clone, Debug)]
pub struct TextInput {
    /// What the model reads.
    pub prompt: Prompt,
    /// Independent answers to the same prompt, at least 1.
    pub choices: u32,
    /// Most tokens to produce for each choice. `None`: as many as the context window leaves. 0: the prompt is only read,
    /// for what is said about it.
    pub max_tokens: Option<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Text that ends a choice; never part of the answer.
    pub stop: Vec<String>,
    /// `Some(k)`: report the log-probability of each token and of its `k` best rivals.
    pub logprobs: Option<u32>,
    /// `Some(k)`: report the log-probability of each token of the prompt, and the `k` best in its place.
    pub prompt_logprobs: Option<u32>,
    /// How far the answer may be guessed ahead.
    pub speculation: Speculation,
    /// Give the prompt back in front of the answer (completions only).
    pub echo: bool,
    /// Higher is served first, -100 to 100; 0 is normal. The account may not be allowed as much.
    pub priority: i8,
    /// Functions the model may ask for; with [`Prompt::Chat`] only.
    pub tools: Option<Arc<Tools>>,
    /// The adapter to compute with, by id or name.
    pub lora: Option<String>,
    /// What the answer must look like.
    pub grammar: Option<Arc<Grammar>>,
}

impl TextInput {
    /// The tools that the model sees and whose calls its answer may hold.
    pub fn shown_tools(&self) -> Option<&Arc<Tools>> {
        self.tools.as_ref().filter(|tools| tools.are_shown())
    }
}

/// What the model reads, in the form the caller chose.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Turns of a conversation, to be rendered by the model's chat template.
    Chat {
        /// Oldest first, at least one.
        messages: Vec<Message>,
        /// Extra variables for the template (`enable_thinking` …).
        template_kwargs: Map<String, Value>,
    },
    /// Text sent to the model as it is. A beginning-of-text token is still put in front where the tokenizer wants one.
    Raw(String),
    /// Token ids sent to the model as they are.
    Tokens(Vec<u32>),
}

/// Who speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

/// One turn. Serialises to what chat templates expect of a message.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text; parts are joined, `null` is empty.
    pub content: String,
    /// Name of the speaker or tool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Which call a tool result answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Calls an assistant turn made, in OpenAI's shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Value>,
}

impl Message {
    /// A plain turn.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), name: None, tool_call_id: None, tool_calls: None }
    }
}

/// What a caller says about guessing ahead (speculative decoding). It changes how fast an answer comes, never the answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Speculation {
    /// Most tokens guessed ahead; `None`: what the model is configured for; 0: none.
    pub most: Option<u32>,
    /// Text that the answer is expected to repeat for the most part.
    pub prediction: Option<String>,
}

/// How the next token is drawn from the logits. Order of application: bias, penalties, DRY, temperature, top-k, typical,
/// top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; 0 to 5.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 is off.
    pub top_p: f32,
    /// Keep this many of the best; 0 is off.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the best; 0 is off.
    pub min_p: f32,
    /// Keep the smallest set of tokens that reaches this probability and whose surprise is nearest to what is expected;
    /// 1 is off. Meister et al., "Locally Typical Sampling", TACL 2023.
    pub typical_p: f32,
    /// Same seed, same prompt, same answer, whatever else the batch holds. `None`: drawn per request.
    pub seed: Option<u64>,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurred in the answer; 0 is off.
    pub presence_penalty: f32,
    /// How many of the newest tokens, prompt and answer, the three penalties look at; `None`: all.
    pub penalty_last_n: Option<u32>,
    /// Makes repeats of longer pieces less likely; `None` is off.
    pub dry: Option<Dry>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Do not end at the model's own end-of-text tokens (load tests).
    pub ignore_eos: bool,
}

/// "Don't repeat yourself": a token that would carry on a repeat of `n` tokens, for `n` of at least `allowed_length`, loses
/// `multiplier * base^(n - allowed_length)` of its logit.
#[derive(Clone, Debug, PartialEq)]
pub struct Dry {
    /// Above 0.
    pub multiplier: f32,
    /// At least 1.
    pub base: f32,
    /// Longest repeat that costs nothing yet, plus one; at least 1.
    pub allowed_length: u32,
    /// How many of the newest tokens, prompt and answer, are searched for the repeated piece; `None`: all.
    pub last_n: Option<u32>,
    /// No repeat is followed back across one of these texts, none of them empty.
    pub breakers: Vec<String>,
}

impl Default for Sampling {
    /// Plain sampling at temperature 1: what OpenAI's surfaces promise when nothing is said.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: None,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: None,
            dry: None,
            logit_bias: Vec::new(),
            ignore_eos: false,
        }
    }
}
