//! Which way of calling tools a model was trained on. Its chat template tells: a conversation with a call in it is
//! rendered, and what comes out is looked at.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::parser::{CallParser, Ids, Syntax};
use crate::model::template::ChatTemplate;
use crate::task::{Message, Role, Tools};

/// `<tool_call>{"name", "arguments"}</tool_call>`, once a call: Hermes, Qwen 2.5 and 3, Granite 4.
pub(super) const HERMES: Syntax =
    Syntax { open: &["<tool_call>"], close: &["</tool_call>"], named: false, fence: false };
/// `{"name", "parameters"}`, with or without a tag: Llama 3.1 to 3.3.
pub(super) const LLAMA: Syntax = Syntax { open: &["<|python_tag|>"], close: &[], named: false, fence: false };
/// `[TOOL_CALLS] [{"name", "arguments"}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` in newer ones: Mistral.
pub(super) const MISTRAL: Syntax = Syntax { open: &["[TOOL_CALLS]"], close: &[], named: true, fence: false };
/// `{"name", "arguments"}`, however it is wrapped: all others.
pub(super) const JSON: Syntax = Syntax {
    open: &["<tool_call>", "<|tool_call|>", "<|tool_call>"],
    close: &["</tool_call>"],
    named: false,
    fence: true,
};

/// Texts of markers that may be control tokens, which print nothing unless asked to.
const MARKERS: [&str; 8] = [
    "<tool_call>",
    "</tool_call>",
    "<|tool_call|>",
    "<|tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
];

/// How a model calls tools, and what its chat template makes of them.
#[derive(Debug, Clone)]
pub struct ToolFormat {
    pub(super) family: Family,
    /// Markers of this model that are control tokens.
    pub(super) control: Vec<(&'static str, u32)>,
    /// The template shows tools and calls. Otherwise they are written into the texts of messages.
    pub(super) native: bool,
    /// The template takes several calls in one turn.
    pub(super) several: bool,
    /// The template takes a system message.
    pub(super) system: bool,
}

/// A way of writing calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Hermes,
    Llama,
    Mistral {
        /// `[TOOL_CALLS]name[ARGS]{…}`.
        named: bool,
    },
    Json,
}

impl ToolFormat {
    /// Looks at what a template makes of tools and calls; `control` knows control tokens by their text.
    pub fn of(template: &ChatTemplate, control: impl Fn(&str) -> Option<u32>) -> Self {
        const PROBE: &str = "probe_of_tools";
        let call = json!({ "id": "abcdef123", "type": "function", "function": { "name": PROBE, "arguments": {} } });
        let tools: Value =
            json!([{ "type": "function", "function": { "name": PROBE, "description": "x", "parameters": {} } }]);
        let user = Message::new(Role::User, "x");
        let turn = |calls: Vec<Value>| {
            let calls = Some(Value::Array(calls));
            Message { tool_calls: calls, ..Message::new(Role::Assistant, "") }
        };
        let render = |messages: &[Message], tools: Option<&Value>| {
            let variables: Map<_, _> = tools.map(|tools| ("tools".to_owned(), tools.clone())).into_iter().collect();
            template.render(messages, &variables).unwrap_or_default()
        };
        let shown = render(std::slice::from_ref(&user), Some(&tools));
        let called = render(&[user.clone(), turn(vec![call.clone()])], None);
        let twice = render(&[user.clone(), turn(vec![call.clone(), call])], None);
        // What a template says around a call counts; else what it tells the model to write.
        let says = |text: &str| if called.contains(PROBE) { called.contains(text) } else { shown.contains(text) };
        let native = shown.contains(PROBE);
        let family = match native {
            true if says("<tool_call>") => Family::Hermes,
            true if says("[TOOL_CALLS]") => Family::Mistral { named: called.contains("[ARGS]") },
            true if says("\"parameters\": ") && control("<|python_tag|>").is_some() => Family::Llama,
            _ => Family::Json,
        };
        Self {
            family,
            control: MARKERS.iter().filter_map(|marker| Some((*marker, control(marker)?))).collect(),
            native,
            several: twice.matches(PROBE).count() > 1,
            system: !render(&[Message::new(Role::System, "x"), user], None).is_empty(),
        }
    }

    /// Reads an answer to a call that offered `tools`. `seed` makes the ids of its calls.
    pub fn parser(&self, tools: Arc<Tools>, seed: u64) -> CallParser {
        let hidden = self.control.iter().map(|&(marker, _)| marker).collect();
        CallParser::new(self.family.syntax(), hidden, tools, Ids { seed, short: self.family.has_short_ids() })
    }

    /// Control tokens that an answer with calls has to show, with their texts.
    pub fn markers(&self) -> &[(&'static str, u32)] {
        &self.control
    }
}

impl Family {
    fn syntax(self) -> &'static Syntax {
        match self {
            Self::Hermes => &HERMES,
            Self::Llama => &LLAMA,
            Self::Mistral { .. } => &MISTRAL,
            Self::Json => &JSON,
        }
    }

    /// Whether ids of calls have nine letters and digits.
    pub(super) fn has_short_ids(self) -> bool {
        matches!(self, Self::Mistral { .. })
    }
}
