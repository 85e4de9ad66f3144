//! The JSON of a call, a character at a time: its function's name, and its arguments as they come.
//!
//! ```text
//! {"name": "f", "parameters": {"a": [1, 2]}}     name and arguments in either order, under the names that models use,
//!           └┬┘               └─────┬─────┘      also one level deeper: {"type": "function", "function": {…}}
//!           name                arguments
//! ```
//!
//! Knows nothing of what stands around an object, and not which functions there are.

use serde_json::{Map, Value};

/// Deepest nesting: what reads the arguments in the end allows 128 levels.
const MAX_DEPTH: usize = 120;

/// No call, or no JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong;

/// One call object.
#[derive(Debug, Clone)]
pub(super) struct CallScan {
    json: Json,
    /// The depth at which the object's own names stand; 0 where there is nothing but arguments.
    level: usize,
    slot: Slot,
    /// The string being read at this level, as written.
    text: String,
    name: Option<String>,
    arguments: String,
    begun: bool,
}

/// What the value at hand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Name,
    /// `"function"`: the name, or an object that holds name and arguments.
    Function,
    Arguments,
    Other,
}

impl CallScan {
    /// An object with a name and arguments in it.
    pub(super) fn object() -> Self {
        Self {
            json: Json { stack: Vec::new(), state: State::Value },
            level: 1,
            slot: Slot::Other,
            text: String::new(),
            name: None,
            arguments: String::new(),
            begun: false,
        }
    }

    /// An object that is the arguments of a function known already.
    pub(super) fn arguments_of(name: &str) -> Self {
        Self { level: 0, slot: Slot::Arguments, name: Some(name.to_owned()), ..Self::object() }
    }

    /// The function, once its name is complete.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether arguments have begun.
    pub(super) fn has_arguments(&self) -> bool {
        self.begun
    }

    /// Arguments read since this was last asked.
    pub(super) fn take_arguments(&mut self) -> String {
        std::mem::take(&mut self.arguments)
    }

    /// Reads one character, the first of which is `{`; true when the object is complete.
    ///
    /// # Errors
    /// When no character of a call can stand here.
    pub(super) fn push(&mut self, c: char) -> Result<bool, Wrong> {
        let depth = self.json.stack.len();
        let part = self.json.push(c)?;
        if depth > self.level || depth == self.level && part == Part::Open && self.slot == Slot::Arguments {
            if self.slot == Slot::Arguments {
                self.argue(c, part, depth)?;
            }
        } else if depth == self.level {
            self.note(c, part)?;
        }
        let depth = self.json.stack.len();
        if depth < self.level && depth > 0 {
            // The nested form ends before the object around it does.
            self.level = depth;
        }
        Ok(depth == 0)
    }

    /// A character of the arguments.
    fn argue(&mut self, c: char, part: Part, depth: usize) -> Result<(), Wrong> {
        if depth == self.level && (c != '{' || self.begun) {
            return Err(Wrong);
        }
        self.begun = true;
        if part == Part::Text && c < ' ' {
            // Models break lines inside strings, where JSON has an escape for it.
            let quoted = Value::from(c.to_string()).to_string();
            self.arguments.push_str(&quoted[1..quoted.len() - 1]);
        } else {
            self.arguments.push(c);
        }
        Ok(())
    }

    /// A character among the object's own names and values.
    fn note(&mut self, c: char, part: Part) -> Result<(), Wrong> {
        let unescaped = |text: &str| serde_json::from_str::<String>(&format!("\"{text}\"")).map_err(|_| Wrong);
        match (part, self.slot) {
            (Part::Begin, _) => self.text.clear(),
            (Part::Text, _) => self.text.push(c),
            (Part::EndName, _) => {
                self.slot = match self.text.as_str() {
                    "name" => Slot::Name,
                    "function" => Slot::Function,
                    "arguments" | "parameters" => Slot::Arguments,
                    _ => Slot::Other,
                };
            }
            (Part::End, Slot::Name | Slot::Function) => self.name = Some(unescaped(&self.text)?),
            (Part::End, Slot::Arguments) => {
                // Arguments as JSON text inside a string: OpenAI's own form, which some models have learnt.
                let text = unescaped(&self.text)?;
                if self.begun || serde_json::from_str::<Map<String, Value>>(&text).is_err() {
                    return Err(Wrong);
                }
                self.begun = true;
                self.arguments.push_str(&text);
            }
            (Part::Open, Slot::Function) if c == '{' => {
                self.level += 1;
                self.slot = Slot::Other;
            }
            (Part::Open | Part::Plain, Slot::Name | Slot::Function) => return Err(Wrong),
            // `null` is how some say that there are none.
            (Part::Plain, Slot::Arguments) if c != 'n' => return Err(Wrong),
            _ => {}
        }
        Ok(())
    }
}

/// What a character of JSON is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// `{` or `[`.
    Open,
    /// The quote that opens a string.
    Begin,
    /// Inside a string.
    Text,
    /// The quote that closes a value.
    End,
    /// The quote that closes a name.
    EndName,
    /// The first character of a number, `true`, `false` or `null`.
    Plain,
    /// Everything else: brackets that close, colons, commas, space, the rest of a plain value.
    Glue,
}

/// Where in a text of JSON we are: enough to say of every next character whether it can stand there.
#[derive(Debug, Clone)]
struct Json {
    /// What is open: objects (true) and arrays.
    stack: Vec<bool>,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Value,
    /// Just after `[`.
    ValueOrEnd,
    Name,
    /// Just after `{`.
    NameOrEnd,
    Colon,
    /// A value is complete: a comma or the end of what it stands in.
    After,
    Text {
        name: bool,
    },
    Escape {
        name: bool,
    },
    Hex {
        name: bool,
        left: u8,
    },
    Number(Number),
    /// What is left of `true`, `false`, `null`.
    Word(&'static str),
}

#[derive(Debug, Clone, Copy)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

impl Json {
    fn push(&mut self, c: char) -> Result<Part, Wrong> {
        let (state, part) = match (self.state, c) {
            (State::Text { name: true }, '"') => (State::Colon, Part::EndName),
            (State::Text { name: false }, '"') => (State::After, Part::End),
            (State::Text { name }, '\\') => (State::Escape { name }, Part::Text),
            (State::Text { name }, _) => (State::Text { name }, Part::Text),
            (State::Escape { name }, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => {
                (State::Text { name }, Part::Text)
            }
            (State::Escape { name }, 'u') => (State::Hex { name, left: 4 }, Part::Text),
            (State::Hex { name, left: 1 }, c) if c.is_ascii_hexdigit() => (State::Text { name }, Part::Text),
            (State::Hex { name, left }, c) if c.is_ascii_hexdigit() => {
                (State::Hex { name, left: left - 1 }, Part::Text)
            }
            (State::Number(number), _) => match number.after(c) {
                Some(next) => (State::Number(next), Part::Glue),
                None if number.may_end() => {
                    self.state = State::After;
                    return self.push(c);
                }
                None => return Err(Wrong),
            },
            (State::Word(left), _) => match left.strip_prefix(c) {
                Some("") => (State::After, Part::Glue),
                Some(left) => (State::Word(left), Part::Glue),
                None => return Err(Wrong),
            },
            (state, ' ' | '\n' | '\r' | '\t') if !matches!(state, State::Escape { .. } | State::Hex { .. }) => {
                (state, Part::Glue)
            }
            (State::ValueOrEnd, ']') | (State::NameOrEnd, '}') => (self.close()?, Part::Glue),
            (State::After, '}' | ']') if self.stack.last() == Some(&(c == '}')) => (self.close()?, Part::Glue),
            (State::After, ',') => match self.stack.last() {
                Some(true) => (State::Name, Part::Glue),
                Some(false) => (State::Value, Part::Glue),
                None => return Err(Wrong),
            },
            (State::Name | State::NameOrEnd, '"') => (State::Text { name: true }, Part::Begin),
            (State::Colon, ':') => (State::Value, Part::Glue),
            (State::Value | State::ValueOrEnd, _) => self.value(c)?,
            _ => return Err(Wrong),
        };
        self.state = state;
        Ok(part)
    }

    /// A value begins with `c`.
    fn value(&mut self, c: char) -> Result<(State, Part), Wrong> {
        Ok(match c {
            '{' | '[' if self.stack.len() == MAX_DEPTH => return Err(Wrong),
            '{' => {
                self.stack.push(true);
                (State::NameOrEnd, Part::Open)
            }
            _ if self.stack.is_empty() => return Err(Wrong),
            '[' => {
                self.stack.push(false);
                (State::ValueOrEnd, Part::Open)
            }
            '"' => (State::Text { name: false }, Part::Begin),
            '-' => (State::Number(Number::Minus), Part::Plain),
            '0' => (State::Number(Number::Zero), Part::Plain),
            '1'..='9' => (State::Number(Number::Whole), Part::Plain),
            't' => (State::Word("rue"), Part::Plain),
            'f' => (State::Word("alse"), Part::Plain),
            'n' => (State::Word("ull"), Part::Plain),
            _ => return Err(Wrong),
        })
    }

    fn close(&mut self) -> Result<State, Wrong> {
        self.stack.pop().map(|_| State::After).ok_or(Wrong)
    }
}

impl Number {
    fn after(self, c: char) -> Option<Self> {
        Some(match (self, c) {
            (Self::Minus, '0') => Self::Zero,
            (Self::Minus | Self::Whole, '0'..='9') => Self::Whole,
            (Self::Zero | Self::Whole, '.') => Self::Point,
            (Self::Point | Self::Fraction, '0'..='9') => Self::Fraction,
            (Self::Zero | Self::Whole | Self::Fraction, 'e' | 'E') => Self::Exponent,
            (Self::Exponent, '+' | '-') => Self::Sign,
            (Self::Exponent | Self::Sign | Self::Power, '0'..='9') => Self::Power,
            _ => return None,
        })
    }

    fn may_end(self) -> bool {
        matches!(self, Self::Zero | Self::Whole | Self::Fraction | Self::Power)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// `name(arguments)`, or where it went wrong.
    fn scan(text: &str) -> String {
        let mut scan = CallScan::object();
        let mut arguments = String::new();
        for (at, c) in text.char_indices() {
            match scan.push(c) {
                Ok(false) => arguments += &scan.take_arguments(),
                Ok(true) => {
                    arguments += &scan.take_arguments();
                    let rest = &text[at + c.len_utf8()..];
                    return format!("{}({arguments}){rest}", scan.name().unwrap_or("?"));
                }
                Err(Wrong) => return format!("wrong at {at}"),
            }
        }
        "more".to_owned()
    }

    #[test]
    fn a_call_is_read_whatever_its_fields_are_called_and_wherever_they_stand() {
        let check = |text: &str, expected: &str| assert_eq!(scan(text), expected, "{text}");
        check(r#"{"name": "f", "arguments": {"a": 1}}"#, r#"f({"a": 1})"#);
        check(r#"{"name":"f","parameters":{}}"#, "f({})");
        check(r#"{"parameters": {"x": [{"y": "}"}]}, "name": "f"}"#, r#"f({"x": [{"y": "}"}]})"#);
        check(r#"{"type": "function", "name": "f", "parameters": {"a": null}}"#, r#"f({"a": null})"#);
        check(r#"{"type": "function", "function": "f", "parameters": {}}"#, "f({})");
        check(
            r#"{"type": "function", "function": {"name": "f", "arguments": {"a": {"b": []}}}}"#,
            r#"f({"a": {"b": []}})"#,
        );
        check(r#"{"function": {"name": "f", "arguments": {}}, "id": "x", "name2": {"name": "g"}}"#, "f({})");
        check(r#"{"name": "f", "arguments": {}, "id": "abcdef123", "more": {"arguments": {"q": 1}}}"#, "f({})");
        check(r#"{"name": "f", "arguments": "{\"a\": \"é\\n\"}"}"#, r#"f({"a": "é\n"})"#);
        check(r#"{"name": "f", "arguments": null}"#, "f()");
        check(r#"{"name": "f"}"#, "f()");
        check(r#"{"name": "\u0066\"", "arguments": {}}"#, "f\"({})");
        check("{\"name\": \"f\", \"arguments\": {\"a\": \"two\nlines\"}}", r#"f({"a": "two\nlines"})"#);
        check(
            r#"{"name": "f", "arguments": {"name": "g", "arguments": {"function": 1}}}"#,
            r#"f({"name": "g", "arguments": {"function": 1}})"#,
        );
    }

    #[test]
    fn what_is_no_call_is_wrong_where_that_shows() {
        let check = |text: &str, expected: &str| assert_eq!(scan(text), expected, "{text}");
        check(r#"{"name": {"first": "x"}}"#, "wrong at 9");
        check(r#"{"name": 1}"#, "wrong at 9");
        check(r#"{"name": "f", "arguments": [1]}"#, "wrong at 27");
        check(r#"{"name": "f", "arguments": 7}"#, "wrong at 27");
        check(r#"{"name": "f", "arguments": "x"}"#, "wrong at 29");
        check(r#"{"name": "f", "arguments": {}, "arguments": {}}"#, "wrong at 44");
        check(r#"{"a": 01}"#, "wrong at 7");
        check(r#"{"a": tru}"#, "wrong at 9");
        check(r#"{"a": 1,}"#, "wrong at 8");
        check(r#"{'a': 1}"#, "wrong at 1");
        check(r#"{"a": "\x"}"#, "wrong at 8");
        check(r#"{"a": [1}"#, "wrong at 8");
        check("[1]", "wrong at 0");
        check(r#"{"a": "#, "more");
        let deep = format!(r#"{{"name": "f", "arguments": {}"#, r#"{"a":"#.repeat(200));
        assert!(scan(&deep).starts_with("wrong"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            // Such as are the same after a reading that rounds.
            any::<i32>().prop_map(|n| Value::from(f64::from(n) / 8.0)),
            "(?s).{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("(?s).{0,5}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn arguments_come_out_as_they_went_in(value in any_json(), pretty in any::<bool>()) {
            let arguments = json!({ "value": value });
            let call = json!({ "id": 1, "name": "f", "arguments": arguments });
            let text = if pretty { serde_json::to_string_pretty(&call).unwrap() } else { call.to_string() };
            let out = scan(&text);
            let read: Value = serde_json::from_str(&out[2..out.len() - 1]).unwrap();
            prop_assert_eq!(read, arguments);
        }

        #[test]
        fn what_is_accepted_is_json(text in r#"\{"name": "f", "arguments": \{[\{\}\[\]",:0-9a-z \\.-]{0,24}\}\}"#) {
            let out = scan(&text);
            let whole = text.strip_prefix(r#"{"name": "f", "arguments": "#).and_then(|rest| rest.strip_suffix('}'));
            if out.strip_prefix("f(").and_then(|rest| rest.strip_suffix(')')) == whole {
                prop_assert!(serde_json::from_str::<Value>(&text).is_ok(), "{}", text);
            }
        }
    }
}
