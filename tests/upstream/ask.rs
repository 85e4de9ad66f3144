//! What a request asks for, read in the same way from all providers' shapes, and the answer it gets, as plain data.
//!
//! An answer repeats who gives it, for which model, and the caller's last words, so that a test can tell answers apart.
//! Tokens are words. If there are tools, and no result of one was just sent, the answer calls them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::behaviour::{Behaviour, Fault};

/// Bytes of arguments in a chunk of a streamed call.
const ARGUMENT_BYTES: usize = 10;

pub struct Ask<'a> {
    /// The provider's name: the first part of the path.
    pub by: &'a str,
    pub model: String,
    pub body: &'a Value,
    pub stream: bool,
    /// What is said, in chunks.
    pub text: Vec<String>,
    pub calls: Vec<Call>,
    pub end: End,
    pub usage: Option<Usage>,
    /// The status of the error in a stream, where it is not what this provider fails with.
    pub failing: Option<u16>,
    /// Seconds that an access token is good for, where that is not what it always is.
    pub expires: Option<usize>,
    id: u64,
}

/// A tool is to be called.
pub struct Call {
    pub id: String,
    pub name: String,
    pub arguments: Value,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Stop,
    Length,
    Calls,
}

#[derive(Clone, Copy)]
pub struct Usage {
    /// All tokens of the prompt, those that were cached among them.
    pub prompt: usize,
    pub cached: usize,
    pub output: usize,
}

impl<'a> Ask<'a> {
    pub fn read(by: &'a str, model: Option<&str>, stream: bool, body: &'a Value, behaviour: &Behaviour) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let said = body["model"].as_str().or(model).unwrap_or("unnamed").to_owned();
        let model = said.strip_prefix("models/").unwrap_or(&said).to_owned();

        let mut calls = Vec::new();
        let tools = tools(body);
        if !tools.is_empty() && !ends_with_result(body) {
            for index in 0..behaviour.calls.unwrap_or(1) {
                let (name, schema) = tools[index % tools.len()];
                let id = format!("{by}-{id}-{index}");
                calls.push(Call { id, name: name.to_owned(), arguments: example(schema, &heard(body)) });
            }
        }
        let (text, end) = if calls.is_empty() {
            text(by, &model, body, behaviour)
        } else {
            let talk = if behaviour.talk { vec!["Let me ".to_owned(), "look.".to_owned()] } else { Vec::new() };
            (talk, End::Calls)
        };
        let spoken: usize = text.iter().map(|piece| words(piece)).sum();
        let called: usize = calls.iter().map(|call| 1 + words(&call.arguments.to_string())).sum();
        let prompt = prompt_words(body);
        let usage = Usage { prompt, cached: behaviour.cached.min(prompt), output: spoken + called };
        let usage = (!behaviour.no_usage).then_some(usage);
        let failing = match behaviour.fault {
            Some(Fault::ErrorEvent { status, .. }) => status,
            _ => None,
        };
        Self { by, model, body, stream, text, calls, end, usage, failing, expires: behaviour.expires, id }
    }

    /// All that is said.
    pub fn words(&self) -> String {
        self.text.concat()
    }

    /// An id that no other answer has.
    pub fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:024}", self.id)
    }

    /// Seconds since 1970.
    pub fn created(&self) -> u64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
    }
}

impl Call {
    /// The arguments as text, cut as a stream would have them.
    pub fn pieces(&self) -> Vec<String> {
        let text: Vec<char> = self.arguments.to_string().chars().collect();
        text.chunks(ARGUMENT_BYTES).map(|piece| piece.iter().collect()).collect()
    }
}

pub fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// The caller's last words.
pub fn heard(body: &Value) -> String {
    let last = messages(body).last().map(content_text).unwrap_or_default();
    if !last.is_empty() {
        return last;
    }
    let fields = ["input", "prompt", "inputs", "inputText", "message", "content", "query"];
    fields.iter().map(|field| content_text(&body[*field])).find(|text| !text.is_empty()).unwrap_or_default()
}

fn text(by: &str, model: &str, body: &Value, behaviour: &Behaviour) -> (Vec<String>, End) {
    if behaviour.chunks.is_some() || behaviour.size.is_some() {
        let mut piece = "w".repeat(behaviour.size.unwrap_or(8) - 1);
        piece.push(' ');
        return (vec![piece; behaviour.chunks.unwrap_or(8)], End::Stop);
    }
    let repeated = || format!("{by} {model} heard: {}", heard(body));
    let whole = behaviour.says.clone().unwrap_or_else(repeated);
    let pieces: Vec<String> = whole.split_inclusive(' ').map(str::to_owned).collect();
    match max_tokens(body) {
        Some(most) if most < pieces.len() => (pieces[..most].to_vec(), End::Length),
        _ => (pieces, End::Stop),
    }
}

fn max_tokens(body: &Value) -> Option<usize> {
    let places = [
        &body["max_tokens"],
        &body["max_completion_tokens"],
        &body["max_output_tokens"],
        &body["generationConfig"]["maxOutputTokens"],
        &body["inferenceConfig"]["maxTokens"],
    ];
    places.iter().find_map(|place| place.as_u64()).map(|most| most as usize)
}

fn messages(body: &Value) -> &[Value] {
    let lists = [&body["messages"], &body["contents"], &body["input"]];
    lists.iter().find_map(|list| list.as_array()).map_or(&[], Vec::as_slice)
}

/// All words of the prompt.
fn prompt_words(body: &Value) -> usize {
    let instructions = ["system", "instructions", "systemInstruction", "system_instruction"];
    let instructed: usize = instructions.iter().map(|field| words(&content_text(&body[*field]))).sum();
    let said: usize = messages(body).iter().map(|message| words(&content_text(message))).sum();
    instructed + if messages(body).is_empty() { words(&heard(body)) } else { said }
}

/// The text in a message or a part of one, whatever its shape.
fn content_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().map(content_text).filter(|text| !text.is_empty());
            texts.collect::<Vec<_>>().join(" ")
        }
        Value::Object(part) => {
            let deeper = ["text", "content", "parts", "output", "toolResult", "json", "data", "document"];
            let found = deeper.iter().map(|key| part.get(*key).map(content_text).unwrap_or_default());
            let response = part.get("functionResponse").map(|call| call["response"].to_string());
            found.chain(response).find(|text| !text.is_empty()).unwrap_or_default()
        }
        _ => String::new(),
    }
}

fn ends_with_result(body: &Value) -> bool {
    let Some(last) = messages(body).last() else { return false };
    let parts = [&last["content"], &last["parts"]].into_iter().filter_map(Value::as_array).flatten();
    let is_result = |part: &Value| {
        part["type"] == "tool_result" || part.get("toolResult").is_some() || part.get("functionResponse").is_some()
    };
    last["role"] == "tool" || last["type"] == "function_call_output" || parts.into_iter().any(is_result)
}

/// Names and schemas of what may be called: all of them, or the one that must be.
fn tools(body: &Value) -> Vec<(&str, &Value)> {
    let choices =
        [&body["tool_choice"], &body["toolConfig"]["toolChoice"], &body["toolConfig"]["functionCallingConfig"]];
    let says_none = |choice: &&Value| {
        let words = [choice.as_str(), choice["type"].as_str(), choice["mode"].as_str()];
        words.into_iter().flatten().any(|word| word.eq_ignore_ascii_case("none"))
    };
    if choices.iter().any(says_none) {
        return Vec::new();
    }
    let names = |choice: &&'_ Value| -> Option<String> {
        let places =
            [&choice["function"]["name"], &choice["name"], &choice["tool"]["name"], &choice["allowedFunctionNames"][0]];
        places.iter().find_map(|place| place.as_str()).map(str::to_owned)
    };
    let wanted = choices.iter().find_map(names);

    let lists = [&body["tools"], &body["toolConfig"]["tools"]];
    let mut found = Vec::new();
    for tool in lists.into_iter().filter_map(Value::as_array).flatten() {
        let declared = [&tool["functionDeclarations"], &tool["function_declarations"]];
        for declaration in declared.into_iter().filter_map(Value::as_array).flatten() {
            found.push(declaration);
        }
        let flat = [&tool["function"], &tool["toolSpec"], tool];
        found.extend(flat.into_iter().find(|tool| tool["name"].is_string()));
    }
    let schema = |tool: &'_ Value| -> Option<&'static str> {
        ["parameters", "parametersJsonSchema", "parameters_json_schema", "input_schema", "inputSchema"]
            .into_iter()
            .find(|key| tool.get(*key).is_some())
    };
    let named = found.into_iter().filter_map(|tool| {
        let parameters = schema(tool).map_or(&Value::Null, |key| &tool[key]);
        Some((tool["name"].as_str()?, parameters.get("json").unwrap_or(parameters)))
    });
    named.filter(|(name, _)| wanted.as_deref().is_none_or(|wanted| wanted == *name)).collect()
}

/// A value that a schema allows: what must be there, made of the caller's words.
fn example(schema: &Value, heard: &str) -> Value {
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    let kind = schema["type"].as_str().unwrap_or(if schema.get("properties").is_some() { "object" } else { "" });
    match kind.to_ascii_lowercase().as_str() {
        "string" => json!(heard.split_whitespace().last().unwrap_or("nothing").trim_end_matches(['?', '.', '!'])),
        "integer" => json!(7),
        "number" => json!(1.5),
        "boolean" => json!(true),
        "array" => json!([example(&schema["items"], heard)]),
        "object" => {
            let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
            let names = required.iter().filter_map(Value::as_str);
            let fields = names.map(|name| (name.to_owned(), example(&schema["properties"][name], heard)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        _ => json!({}),
    }
}
