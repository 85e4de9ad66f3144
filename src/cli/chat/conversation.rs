//! What a conversation is and what can be typed at it, without terminal or network.

use serde_json::{Map, Value, json};

/// Everything that goes into the next request, except the model.
#[derive(Debug, Default)]
pub struct Conversation {
    /// Sent first, if set.
    pub system: Option<String>,
    /// Sampling parameters set by hand; the server's defaults hold for the rest.
    pub settings: Map<String, Value>,
    turns: Vec<Turn>,
}

#[derive(Debug, Clone, PartialEq)]
struct Turn {
    role: &'static str,
    text: String,
}

/// What a line beginning with a slash asks for.
#[derive(Debug, PartialEq)]
pub enum Order {
    /// List the orders.
    Help,
    /// Show the models, or talk to another one.
    Model(Option<String>),
    /// Show, set or (with `off`) remove the system prompt.
    System(Option<String>),
    /// Show the settings, or set one.
    Set(Option<(String, Value)>),
    /// Forget the conversation.
    Reset,
    /// Ask for the last answer again.
    Retry,
    /// Write the conversation to a file.
    Save(String),
    /// Tokens and speed so far.
    Usage,
    /// Read several lines as one message.
    Multi,
    /// Leave.
    Quit,
}

/// Every order with its arguments and one line of help, in the order shown.
pub const ORDERS: [(&str, &str, &str); 10] = [
    ("/help", "", "this list"),
    ("/model", "[ID]", "list the models, or go on with another one"),
    ("/system", "[TEXT|off]", "show, set or remove the system prompt"),
    ("/set", "[NAME VALUE|off]", "temperature, top_p, top_k, min_p, max_tokens, seed, stop, *_penalty"),
    ("/reset", "", "forget the conversation, keep the settings"),
    ("/retry", "", "ask for the last answer again"),
    ("/save", "FILE", "write the conversation: JSON if FILE ends in .json, else Markdown"),
    ("/usage", "", "tokens and speed so far"),
    ("/multi", "", "type several lines, a dot alone ends them (or end lines with \\)"),
    ("/quit", "", "leave; so does Ctrl-D"),
];

const NUMBERS: [&str; 7] =
    ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "repeat_penalty"];
const COUNTS: [&str; 4] = ["top_k", "max_tokens", "max_completion_tokens", "seed"];

/// Reads a line as an order: `None` if it is something to say, an error with the remedy if it is half an order.
/// An unambiguous beginning (`/q`) is enough. A path such as `/etc/hosts` is something to say.
pub fn order(line: &str) -> Option<Result<Order, String>> {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    if !word.starts_with('/') || word[1..].contains('/') {
        return None;
    }
    let mut fitting = ORDERS.iter().map(|(name, ..)| *name).filter(|name| name.starts_with(word));
    let name = match (fitting.next(), fitting.next()) {
        (Some(only), None) => only,
        (Some(_), Some(_)) if ORDERS.iter().any(|(name, ..)| *name == word) => word,
        (Some(one), Some(other)) => return Some(Err(format!("{word} could be {one} or {other}"))),
        (None, _) => return Some(Err(format!("there is no {word}: /help lists what there is"))),
    };
    let given = (!rest.is_empty()).then(|| rest.to_owned());
    Some(Ok(match name {
        "/help" => Order::Help,
        "/model" => Order::Model(given),
        "/system" => Order::System(given),
        "/set" => match given.map(|text| setting(&text)).transpose() {
            Ok(setting) => Order::Set(setting),
            Err(why) => return Some(Err(why)),
        },
        "/reset" => Order::Reset,
        "/retry" => Order::Retry,
        "/save" => match given {
            Some(file) => Order::Save(file),
            None => return Some(Err("/save needs a file name, such as /save talk.md".into())),
        },
        "/usage" => Order::Usage,
        "/multi" => Order::Multi,
        _ => Order::Quit,
    }))
}

/// `temperature 0.2` or `temperature=0.2`; `off` gives null, which takes the setting away.
pub fn setting(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text
        .split_once('=')
        .or_else(|| text.split_once(char::is_whitespace))
        .map(|(name, value)| (name.trim(), value.trim()))
        .ok_or_else(|| format!("{text} needs a value, such as {text} 0.2, or off"))?;
    let value = match value {
        "off" => Value::Null,
        number if NUMBERS.contains(&name) => {
            let number: f64 = number.parse().map_err(|_| format!("{name} takes a number, not {number:?}"))?;
            serde_json::Number::from_f64(number).map(Value::Number).ok_or_else(|| format!("{name} must be finite"))?
        }
        count if COUNTS.contains(&name) => {
            json!(count.parse::<u64>().map_err(|_| format!("{name} takes a whole number, not {count:?}"))?)
        }
        text if name == "stop" => json!([text]),
        _ => {
            let known = [&NUMBERS[..], &COUNTS[..], &["stop"]].concat().join(", ");
            return Err(format!("there is no setting {name:?}: {known}"));
        }
    };
    Ok((name.to_owned(), value))
}

impl Conversation {
    /// Sets a parameter; null takes it away.
    pub fn set(&mut self, name: String, value: Value) {
        if value.is_null() {
            self.settings.shift_remove(&name);
        } else {
            self.settings.insert(name, value);
        }
    }

    /// The user's next message.
    pub fn ask(&mut self, text: String) {
        self.turns.push(Turn { role: "user", text });
    }

    /// What the model said to it, whole or as far as it came.
    pub fn answered(&mut self, text: String) {
        self.turns.push(Turn { role: "assistant", text });
    }

    /// Takes the last message back when nothing was said to it.
    pub fn unask(&mut self) {
        if self.turns.last().is_some_and(|turn| turn.role == "user") {
            self.turns.pop();
        }
    }

    /// Drops the last answer so that it can be asked for again; false if nothing was asked yet.
    pub fn rewind(&mut self) -> bool {
        if self.turns.last().is_some_and(|turn| turn.role == "assistant") {
            self.turns.pop();
        }
        self.turns.last().is_some_and(|turn| turn.role == "user")
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.turns.clear();
    }

    /// The request that asks for the next answer.
    pub fn request(&self, model: &str) -> Value {
        let mut body = json!({
            "model": model,
            "messages": self.messages(),
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        for (name, value) in &self.settings {
            body[name] = value.clone();
        }
        body
    }

    /// The conversation as a file: JSON for programs, Markdown for people.
    pub fn export(&self, model: &str, as_json: bool) -> String {
        if as_json {
            let whole = json!({ "model": model, "settings": self.settings, "messages": self.messages() });
            return format!("{whole:#}\n");
        }
        let mut text = format!("# A conversation with {model}\n");
        for turn in self.messages() {
            let (role, said) =
                (turn["role"].as_str().unwrap_or_default(), turn["content"].as_str().unwrap_or_default());
            text.push_str(&format!("\n**{role}**\n\n{}\n", said.trim()));
        }
        text
    }

    fn messages(&self) -> Vec<Value> {
        let system = self.system.iter().map(|text| ("system", text.as_str()));
        let turns = self.turns.iter().map(|turn| (turn.role, turn.text.as_str()));
        system.chain(turns).map(|(role, text)| json!({ "role": role, "content": text })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Order) {
        assert_eq!(order(line), Some(Ok(expected)), "{line}");
    }

    fn refused(line: &str, word: &str) {
        let why = order(line).expect("an order").expect_err("not a good one");
        assert!(why.contains(word), "{line}: {why}");
    }

    #[test]
    fn orders_are_read_whole_or_by_their_beginning() {
        check("/help", Order::Help);
        check("  /q ", Order::Quit);
        check("/model", Order::Model(None));
        check("/model a/b", Order::Model(Some("a/b".into())));
        check("/mo x", Order::Model(Some("x".into())));
        check("/system You are  brief.", Order::System(Some("You are  brief.".into())));
        check("/set temperature 0.2", Order::Set(Some(("temperature".into(), json!(0.2)))));
        check("/set seed=7", Order::Set(Some(("seed".into(), json!(7)))));
        check("/set stop END", Order::Set(Some(("stop".into(), json!(["END"])))));
        check("/set top_k off", Order::Set(Some(("top_k".into(), Value::Null))));
        check("/set", Order::Set(None));
        check("/save a b.md", Order::Save("a b.md".into()));
    }

    #[test]
    fn half_an_order_says_what_is_missing() {
        refused("/save", "file name");
        refused("/s temperature 1", "could be");
        refused("/set temperature", "needs a value");
        refused("/set temperature warm", "number");
        refused("/set seed 1.5", "whole number");
        refused("/set temprature 1", "temperature");
        refused("/nope", "/help");
        refused("/m", "/model");
    }

    #[test]
    fn what_is_no_order_is_said() {
        for line in ["hello", "/etc/hosts is what?", "what does /help do", ""] {
            assert_eq!(order(line), None, "{line}");
        }
    }

    #[test]
    fn a_retry_asks_the_same_again() {
        let mut talk = Conversation::default();
        assert!(!talk.rewind(), "nothing was asked");
        talk.ask("one".into());
        let asked = talk.request("m");
        talk.answered("1".into());
        assert!(talk.rewind());
        assert_eq!(talk.request("m"), asked);
    }

    #[test]
    fn a_message_that_failed_leaves_no_trace() {
        let mut talk = Conversation::default();
        talk.ask("one".into());
        talk.answered("1".into());
        let before = talk.request("m");
        talk.ask("two".into());
        talk.unask();
        talk.unask();
        assert_eq!(talk.request("m"), before);
    }

    #[test]
    fn settings_and_system_prompt_reach_the_request() {
        let mut talk = Conversation { system: Some("Be brief.".into()), ..Conversation::default() };
        talk.set("temperature".into(), json!(0.2));
        talk.set("seed".into(), json!(1));
        talk.set("seed".into(), Value::Null);
        talk.ask("Hi".into());
        let body = talk.request("m");
        assert_eq!(body["messages"][0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(body["messages"][1], json!({"role": "user", "content": "Hi"}));
        assert_eq!((&body["temperature"], &body["seed"]), (&json!(0.2), &Value::Null));
    }

    #[test]
    fn a_conversation_can_be_kept() {
        let mut talk = Conversation::default();
        talk.ask("Hi".into());
        talk.answered("Hello\n".into());
        assert!(talk.export("m", false).contains("**user**\n\nHi\n\n**assistant**\n\nHello\n"));
        let json: Value = serde_json::from_str(&talk.export("m", true)).expect("JSON");
        assert_eq!(json["messages"][1]["content"], "Hello\n");
    }
}
