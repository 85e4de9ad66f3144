//! Functions that a model may ask its caller to run: what is offered, how free the model is to use it, what it asks for.

use serde_json::{Map, Value, json};

/// What a call offers the model. Names are checked and different where it is parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// At least one.
    pub list: Vec<Tool>,
    /// Whether the model may or must use them.
    pub choice: ToolChoice,
    /// Whether one answer may hold several calls.
    pub parallel: bool,
}

/// One function.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// What it does, for the model; may be empty.
    pub description: String,
    /// JSON Schema of its arguments, which are one object.
    pub parameters: Map<String, Value>,
    /// Arguments must follow the schema even where the model is free to call or not.
    pub strict: bool,
}

/// How free the model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Text, calls or both.
    Auto,
    /// The tools are not shown, and the answer is text whatever it looks like.
    None,
    /// At least one call, and nothing else.
    Required,
    /// One call of this function, and nothing else.
    Named(String),
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Names the call when its result comes back.
    pub id: String,
    /// Which function.
    pub name: String,
    /// JSON text of an object; a beginning of one if the answer was cut inside.
    pub arguments: String,
}

/// What is new of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolDelta {
    /// It begins.
    Begin {
        /// Names the call when its result comes back.
        id: String,
        /// Which function.
        name: String,
    },
    /// More of its arguments' JSON text.
    Arguments(String),
}

impl Tools {
    /// Whether the model sees them and its answer may hold calls.
    pub fn are_shown(&self) -> bool {
        self.choice != ToolChoice::None
    }

    /// Whether the answer can be nothing but calls.
    pub fn are_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// Whether there is a function of this name.
    pub fn has(&self, name: &str) -> bool {
        self.list.iter().any(|tool| tool.name == name)
    }

    /// The functions that an answer may call.
    pub fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.list.iter().filter(|tool| match &self.choice {
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::None => false,
            ToolChoice::Named(name) => tool.name == *name,
        })
    }
}

impl Tool {
    /// In the form chat templates take tools in, which is OpenAI's.
    pub fn to_json(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".to_owned(), Value::from(self.name.as_str()));
        // Some templates put it between other texts, which fails on what is not there.
        function.insert("description".to_owned(), Value::from(self.description.as_str()));
        function.insert("parameters".to_owned(), Value::Object(self.parameters.clone()));
        json!({ "type": "function", "function": function })
    }
}
