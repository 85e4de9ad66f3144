//! Messages as the dialects want them that know two speakers only: instructions apart, and turns that alternate.
//!
//!     system  user  user  assistant(calls)  tool  tool  user    -->    system: [..]   user | assistant | user
//!
//! Tool results are the user's, since whoever runs tools sits on that side. Empty texts, which most upstreams refuse, go.

use crate::base::{Error, Result};
use crate::provider::ask::{Ask, Part, Role};

/// What stands for a turn of the user that says nothing.
static EMPTY: Part<'static> = Part::Text { text: "(empty)", cache: None };
/// What stands before an assistant that speaks first.
static OPENING: Part<'static> = Part::Text { text: "Hello.", cache: None };

#[derive(Debug)]
pub(super) struct Turn<'m, 'a> {
    pub(super) user: bool,
    pub(super) parts: Vec<&'m Part<'a>>,
}

#[derive(Debug)]
pub(super) struct Conversation<'m, 'a> {
    /// The texts of all system and developer messages, wherever they stood.
    pub(super) system: Vec<&'m Part<'a>>,
    /// The first one is the user's, and no two neighbours are by the same.
    pub(super) turns: Vec<Turn<'m, 'a>>,
}

impl<'a> Ask<'a> {
    /// Puts messages into turns.
    ///
    /// # Errors
    /// `BadInput` if nobody says anything.
    pub(super) fn conversation(&self) -> Result<Conversation<'_, 'a>> {
        let mut system = Vec::new();
        let mut turns: Vec<Turn> = Vec::new();
        for message in &self.messages {
            let parts: Vec<_> = message.parts.iter().filter(|part| !is_blank(part)).collect();
            match message.role {
                Role::System => system.extend(parts),
                Role::Assistant if parts.is_empty() => {}
                Role::Assistant => push(&mut turns, false, parts),
                Role::User | Role::Tool => push(&mut turns, true, parts),
            }
        }
        if turns.is_empty() {
            if system.is_empty() {
                return Err(Error::bad_field("messages", "all messages are empty: say something"));
            }
            // Instructions alone are a question as well.
            turns.push(Turn { user: true, parts: std::mem::take(&mut system) });
        }
        for turn in &mut turns {
            if turn.parts.is_empty() {
                turn.parts.push(&EMPTY);
            }
        }
        if !turns[0].user {
            turns.insert(0, Turn { user: true, parts: vec![&OPENING] });
        }
        Ok(Conversation { system, turns })
    }
}

fn push<'m, 'a>(turns: &mut Vec<Turn<'m, 'a>>, user: bool, parts: Vec<&'m Part<'a>>) {
    match turns.last_mut() {
        Some(last) if last.user == user => last.parts.extend(parts),
        _ => turns.push(Turn { user, parts }),
    }
}

fn is_blank(part: &Part) -> bool {
    matches!(part, Part::Text { text, .. } if text.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Turns in short: `S` system, `U` user, `A` assistant, each with its parts.
    fn outline(messages: Value) -> String {
        let body = json!({ "messages": messages });
        let ask = Ask::read(&body).unwrap();
        let conversation = ask.conversation().unwrap();
        let list = |parts: &[&Part]| parts.iter().map(|part| short(part)).collect::<Vec<_>>().join(",");
        let mut out = format!("S[{}]", list(&conversation.system));
        for turn in &conversation.turns {
            out.push_str(&format!(" {}[{}]", if turn.user { "U" } else { "A" }, list(&turn.parts)));
        }
        out
    }

    fn short(part: &Part) -> String {
        match part {
            Part::Text { text, .. } => (*text).to_owned(),
            Part::Call { name, .. } => format!("call {name}"),
            Part::Result { name, .. } => format!("result {}", name.unwrap_or("?")),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn turns_alternate_whatever_was_sent() {
        let call =
            |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}});
        for (messages, expected) in [
            (
                json!([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]),
                "S[] U[a,b]",
            ),
            (
                json!([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "developer", "content": "d"}, {"role": "user", "content": "b"}]),
                "S[s,d] U[a,b]",
            ),
            (
                json!([
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": null, "tool_calls": [call("1", "x"), call("2", "y")]},
                    {"role": "tool", "tool_call_id": "2", "content": "r"},
                    {"role": "tool", "tool_call_id": "1", "content": "r"},
                    {"role": "user", "content": "b"},
                ]),
                "S[] U[a] A[call x,call y] U[result y,result x,b]",
            ),
            (
                json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]),
                "S[] U[a,b]",
            ),
            (json!([{"role": "user", "content": " \n"}]), "S[] U[(empty)]"),
            (json!([{"role": "assistant", "content": "hi "}]), "S[] U[Hello.] A[hi]"),
            (json!([{"role": "system", "content": "s"}]), "S[] U[s]"),
            (json!([{"role": "system", "content": "s"}, {"role": "user", "content": ""}]), "S[s] U[(empty)]"),
        ] {
            assert_eq!(outline(messages.clone()), expected, "{messages}");
        }
        let body = json!({"messages": [{"role": "system", "content": ""}]});
        assert!(Ask::read(&body).unwrap().conversation().is_err());
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        let with = |field: &str, value: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
            body[field] = value;
            body
        };
        let message = |message: Value| json!({ "messages": [message] });
        for (body, param) in [
            (json!([]), None),
            (json!({}), Some("messages")),
            (json!({"messages": []}), Some("messages")),
            (message(json!({"role": "function", "content": "x"})), Some("messages.0.role")),
            (message(json!({"role": "user", "content": 1})), Some("messages.0.content")),
            (message(json!({"role": "user", "content": [{"type": "video"}]})), Some("messages.0.content.0")),
            (
                message(
                    json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}),
                ),
                Some("messages.0.content.0"),
            ),
            (message(json!({"role": "tool", "content": "x"})), Some("messages.0.tool_call_id")),
            (
                message(
                    json!({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}),
                ),
                Some("messages.0.tool_calls.0.function.arguments"),
            ),
            (with("functions", json!([{}])), Some("functions")),
            (with("logit_bias", json!({"1": 2})), Some("logit_bias")),
            (with("modalities", json!(["text", "audio"])), Some("modalities")),
            (with("tools", json!([{"type": "custom"}])), Some("tools.0.type")),
            (with("tool_choice", json!({"type": "function", "function": {"name": "f"}})), Some("tool_choice")),
            (with("temperature", json!("hot")), Some("temperature")),
            (with("stop", json!(1)), Some("stop")),
            (with("n", json!(0)), Some("n")),
            (with("reasoning_effort", json!("huge")), Some("reasoning_effort")),
            (with("response_format", json!({"type": "xml"})), Some("response_format.type")),
        ] {
            let refused = Ask::read(&body).map(drop);
            let error = refused.expect_err(&body.to_string());
            assert_eq!(error.param(), param, "{body}: {error}");
        }
        for harmless in [with("logit_bias", json!({})), with("functions", Value::Null), with("store", json!(true))] {
            assert!(Ask::read(&harmless).is_ok(), "{harmless}");
        }
    }
}
