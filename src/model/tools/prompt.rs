//! Tools, calls and their results as the model's chat template takes them.
//!
//! Templates that know tools get them as a variable, and conversations in the shape they expect: ids they accept, one call
//! a turn where they take no more. For the others everything is said in words: the tools in the system text, calls and
//! results as the turns of a plain conversation.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::ToolFormat;
use super::parser::short_id;
use crate::task::{Message, Role, ToolChoice, Tools};

impl ToolFormat {
    /// The messages to render, and the value of the template's `tools`.
    pub fn conversation<'a>(
        &self,
        messages: &'a [Message],
        tools: Option<&Tools>,
    ) -> (Cow<'a, [Message]>, Option<Value>) {
        let tools = tools.filter(|tools| tools.are_shown());
        let called = messages.iter().any(|message| message.tool_calls.is_some() || message.role == Role::Tool);
        if !self.native {
            let mut messages = if called { Cow::Owned(in_words(messages)) } else { Cow::Borrowed(messages) };
            if let Some(tools) = tools {
                self.instruct(messages.to_mut(), tools);
            }
            return (messages, None);
        }
        let tools = tools.map(|tools| tools.list.iter().map(crate::task::Tool::to_json).collect());
        let mut messages = Cow::Borrowed(messages);
        if called && !self.several {
            messages = Cow::Owned(one_by_one(&messages));
        }
        if called && self.family.has_short_ids() {
            messages.to_mut().iter_mut().for_each(shorten_ids);
        }
        (messages, tools)
    }

    /// Says in the system text which tools there are and how to call them.
    fn instruct(&self, messages: &mut Vec<Message>, tools: &Tools) {
        let mut text = "You can call functions. These are their descriptions, one a line:\n".to_owned();
        for tool in &tools.list {
            text.push_str(&tool.to_json()["function"].to_string());
            text.push('\n');
        }
        text.push_str(match &tools.choice {
            ToolChoice::Auto => "\nTo call a function, answer with nothing but ",
            _ => "\nAnswer with a function call, which is nothing but ",
        });
        text.push_str(r#"a JSON object {"name": <its name>, "arguments": <an object that follows its parameters>}"#);
        text.push_str(if tools.parallel { "; to call several, write one object a line." } else { "." });
        match &tools.choice {
            ToolChoice::Auto => text.push_str(" When no function helps, answer in plain words."),
            ToolChoice::Named(name) => text.extend([" Call the function ", name, "."]),
            ToolChoice::Required | ToolChoice::None => {}
        }
        let role = if self.system { Role::System } else { Role::User };
        match messages.first_mut() {
            Some(first) if first.role == role => {
                // A system text is the caller's word and comes first; a question comes after what it may use.
                first.content = match role {
                    Role::System => format!("{}\n\n{text}", first.content),
                    _ => format!("{text}\n\n{}", first.content),
                };
            }
            _ => messages.insert(0, Message::new(role, text)),
        }
    }
}

/// Calls and results as text. Results in a row become one turn, since many templates want turns to alternate.
fn in_words(messages: &[Message]) -> Vec<Message> {
    let mut told: Vec<Message> = Vec::with_capacity(messages.len());
    let mut in_results = false;
    for message in messages {
        let mut text = message.content.clone();
        for call in calls(message) {
            let function = &call["function"];
            let arguments = parsed(&function["arguments"]);
            let line = json!({ "name": function["name"], "arguments": arguments }).to_string();
            text = if text.is_empty() { line } else { format!("{text}\n{line}") };
        }
        if message.role != Role::Tool {
            told.push(Message { tool_calls: None, tool_call_id: None, content: text, ..message.clone() });
            in_results = false;
            continue;
        }
        let of = message.name.as_ref().map(|name| format!(" of {name}")).unwrap_or_default();
        let text = format!("Result{of}:\n{text}");
        match told.last_mut() {
            Some(last) if in_results => last.content = format!("{}\n\n{text}", last.content),
            _ => told.push(Message::new(Role::User, text)),
        }
        in_results = true;
    }
    told
}

/// Turns with several calls become turns with one each, every call in front of its result.
fn one_by_one(messages: &[Message]) -> Vec<Message> {
    let mut apart: Vec<Message> = Vec::with_capacity(messages.len());
    let mut rest = messages;
    while let [message, following @ ..] = rest {
        rest = following;
        if calls(message).len() < 2 {
            apart.push(message.clone());
            continue;
        }
        let end = following.iter().take_while(|message| message.role == Role::Tool).count();
        let (results, after) = following.split_at(end);
        rest = after;
        let mut answered = vec![false; results.len()];
        for (at, call) in calls(message).iter().enumerate() {
            let content = if at == 0 { message.content.clone() } else { String::new() };
            apart.push(Message { content, tool_calls: Some(json!([call])), ..message.clone() });
            let mine = |result: &Message| {
                result.tool_call_id.is_some() && result.tool_call_id.as_deref() == call["id"].as_str()
            };
            for (result, answered) in results.iter().zip(&mut answered).filter(|(result, _)| mine(result)) {
                apart.push(result.clone());
                *answered = true;
            }
        }
        // What answers no call that we know stays behind them.
        apart.extend(
            results.iter().zip(&answered).filter(|(_, answered)| !**answered).map(|(result, _)| result.clone()),
        );
    }
    apart
}

/// Ids of other makes become ones of nine letters and digits, the same id always the same.
fn shorten_ids(message: &mut Message) {
    let fits = |id: &str| id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let short = |id: &str| short_id(blake3::hash(id.as_bytes()).as_bytes());
    if let Some(id) = message.tool_call_id.as_mut().filter(|id| !fits(id)) {
        *id = short(id);
    }
    let calls = message.tool_calls.as_mut().and_then(Value::as_array_mut);
    for id in calls.into_iter().flatten().filter_map(|call| call.get_mut("id")) {
        if let Some(long) = id.as_str().filter(|id| !fits(id)) {
            *id = Value::from(short(long));
        }
    }
}

fn calls(message: &Message) -> &[Value] {
    message.tool_calls.as_ref().and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Arguments as an object where they are JSON text.
fn parsed(arguments: &Value) -> Value {
    arguments.as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_else(|| arguments.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::model::template::ChatTemplate;
    use crate::task::Tool;

    const GOLDENS: &str = include_str!("../goldens/templates.json");

    fn template(name: &str) -> ChatTemplate {
        let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
        let names = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name, text.to_owned()));
        ChatTemplate::compile(goldens["templates"][name].as_str().unwrap(), &names).unwrap()
    }

    fn format(name: &str) -> ToolFormat {
        ToolFormat::of(&template(name), |text| (text == "<|python_tag|>").then_some(9))
    }

    fn tools(choice: ToolChoice, parallel: bool) -> Tools {
        let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        let tool = |name: &str| Tool {
            name: name.to_owned(),
            description: "About it.".to_owned(),
            parameters: parameters.as_object().unwrap().clone(),
            strict: false,
        };
        Tools { list: vec![tool("weather"), tool("time")], choice, parallel }
    }

    fn call(id: &str, name: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{\"city\": \"Oslo\"}"}})
    }

    fn result(id: &str, name: &str, text: &str) -> Message {
        Message { name: Some(name.into()), tool_call_id: Some(id.into()), ..Message::new(Role::Tool, text) }
    }

    /// A question, two calls in one turn, their results the other way round.
    fn talk() -> Vec<Message> {
        let calls = json!([call("call_1", "weather"), call("call_2", "time")]);
        vec![
            Message::new(Role::User, "Oslo?"),
            Message { tool_calls: Some(calls), ..Message::new(Role::Assistant, "") },
            result("call_2", "time", "12:00"),
            result("call_1", "weather", "rain"),
        ]
    }

    fn render(name: &str, messages: &[Message], tools: Option<&Tools>) -> String {
        let (messages, tools) = format(name).conversation(messages, tools);
        let variables: Map<_, _> = tools.map(|tools| ("tools".to_owned(), tools)).into_iter().collect();
        template(name).render(&messages, &variables).unwrap()
    }

    #[test]
    fn templates_tell_how_their_models_call() {
        use super::super::format::Family;
        let check = |name: &str, family: Family, native: bool, several: bool, system: bool| {
            let format = format(name);
            assert_eq!(
                (format.family, format.native, format.several, format.system),
                (family, native, several, system),
                "{name}"
            );
        };
        check("qwen-2.5", Family::Hermes, true, true, true);
        check("hermes-2-pro", Family::Hermes, true, true, true);
        check("llama-3", Family::Llama, true, false, true);
        check("mistral", Family::Mistral { named: false }, true, true, true);
        check("mistral-new", Family::Mistral { named: true }, true, true, true);
        check("chatml", Family::Json, false, false, true);
        check("gemma", Family::Json, false, false, false);
    }

    #[test]
    fn a_template_that_takes_one_call_a_turn_gets_them_one_by_one() {
        let text = render("llama-3", &talk(), Some(&tools(ToolChoice::Auto, true)));
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part} in {text}"));
        assert!(at(r#"{"name": "weather", "parameters": {"city": "Oslo"}}"#) < at("rain"));
        assert!(at("rain") < at(r#"{"name": "time", "parameters""#));
        assert!(at(r#"{"name": "time", "parameters""#) < at("12:00"));
    }

    #[test]
    fn ids_of_other_makes_fit_mistrals_templates_and_still_belong_together() {
        let text = render("mistral", &talk(), Some(&tools(ToolChoice::Auto, true)));
        let short = short_id(blake3::hash(b"call_2").as_bytes());
        assert_eq!(text.matches(&short).count(), 2, "{text}");
        assert!(text.contains("[AVAILABLE_TOOLS]"));
    }

    #[test]
    fn a_template_without_tools_is_told_in_words() {
        let tools = tools(ToolChoice::Auto, true);
        let text = render("chatml", &talk(), Some(&tools));
        let expected = r#"<|im_start|>system
You can call functions. These are their descriptions, one a line:
{"name":"weather","description":"About it.","parameters":{"type":"object","properties":{"city":{"type":"string"}}}}
{"name":"time","description":"About it.","parameters":{"type":"object","properties":{"city":{"type":"string"}}}}

To call a function, answer with nothing but a JSON object {"name": <its name>, "arguments": <an object that follows its parameters>}; to call several, write one object a line. When no function helps, answer in plain words.<|im_end|>
<|im_start|>user
Oslo?<|im_end|>
<|im_start|>assistant
{"name":"weather","arguments":{"city":"Oslo"}}
{"name":"time","arguments":{"city":"Oslo"}}<|im_end|>
<|im_start|>user
Result of time:
12:00

Result of weather:
rain<|im_end|>
<|im_start|>assistant
"#;
        assert_eq!(text, expected);
        let brief = [Message::new(Role::System, "Be brief."), Message::new(Role::User, "Oslo?")];
        let text = render("chatml", &brief, Some(&tools));
        assert!(text.starts_with("<|im_start|>system\nBe brief.\n\nYou can call functions."), "{text}");
        let text = render("gemma", &brief[1..], Some(&tools));
        assert!(
            text.contains("user\nYou can call functions.") && text.contains("words.\n\nOslo?<end_of_turn>"),
            "{text}"
        );
    }

    #[test]
    fn tools_that_must_not_be_used_are_not_shown() {
        for name in ["chatml", "qwen-2.5", "llama-3", "mistral"] {
            let question = [Message::new(Role::User, "Oslo?")];
            let hidden = render(name, &question, Some(&tools(ToolChoice::None, true)));
            assert_eq!(hidden, render(name, &question, None));
            assert!(render(name, &question, Some(&tools(ToolChoice::Auto, true))).contains("weather"), "{name}");
        }
    }

    #[test]
    fn who_must_call_is_told_so() {
        let question = [Message::new(Role::User, "Oslo?")];
        let text = render("chatml", &question, Some(&tools(ToolChoice::Named("time".into()), false)));
        assert!(
            text.contains("Answer with a function call") && text.contains("parameters>}. Call the function time."),
            "{text}"
        );
    }
}
