//! An OpenAI chat request, read once for every dialect that is not OpenAI's.
//!
//!     JSON  -->  Ask { messages, tools, format, sampling … }  -->  conversation(): system texts and turns that alternate
//!
//! What no other dialect can do is refused here by name; what only some cannot, they refuse with [`Ask::refuse`]. Fields
//! that do not change the answer (`store`, `metadata`, `prediction` …) are left out without a word.

mod content;

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};

/// A request as it was meant. Borrows from the document.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub(super) messages: Vec<Message<'a>>,
    pub(super) tools: Vec<Tool<'a>>,
    pub(super) choice: Choice<'a>,
    /// Several calls at once are welcome; not said is yes.
    pub(super) parallel: bool,
    pub(super) format: Format<'a>,
    pub(super) max_tokens: Option<u64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<u64>,
    pub(super) seed: Option<i64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) stop: Vec<&'a str>,
    pub(super) choices: u64,
    /// Log-probabilities, with so many rivals.
    pub(super) logprobs: Option<u64>,
    pub(super) effort: Option<Effort>,
    /// Anthropic's own `thinking`, for callers who know whom they ask.
    pub(super) thinking: Option<&'a Value>,
    pub(super) user: Option<&'a str>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    System,
    User,
    Assistant,
    Tool,
}

#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) role: Role,
    pub(super) parts: Vec<Part<'a>>,
}

#[derive(Debug)]
pub(super) enum Part<'a> {
    Text {
        text: &'a str,
        cache: Option<&'a Value>,
    },
    Image {
        source: Source<'a>,
        detail: Option<&'a str>,
    },
    File {
        data: Source<'a>,
        name: Option<&'a str>,
    },
    Audio {
        data: &'a str,
        format: &'a str,
    },
    Call {
        id: &'a str,
        name: &'a str,
        arguments: Map<String, Value>,
        written: &'a str,
        signature: Option<&'a str>,
    },
    Result {
        id: &'a str,
        name: Option<&'a str>,
        parts: Vec<Part<'a>>,
    },
    /// A block of thoughts as we gave it out, with the signature that lets it be read again.
    Thinking(&'a Value),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    /// Base64.
    Data {
        media_type: &'a str,
        data: &'a str,
    },
    Url(&'a str),
}

#[derive(Debug)]
pub(super) struct Tool<'a> {
    pub(super) name: &'a str,
    pub(super) description: Option<&'a str>,
    pub(super) parameters: Option<&'a Value>,
}

impl Tool<'_> {
    /// The schema of the parameters; an object in any case.
    pub(super) fn schema(&self) -> Value {
        match self.parameters {
            None => json!({"type": "object", "properties": {}}),
            Some(schema) if schema.get("type").is_some() => schema.clone(),
            Some(schema) => {
                let mut schema = schema.clone();
                schema["type"] = "object".into();
                schema
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Choice<'a> {
    Auto,
    None,
    Required,
    Named(&'a str),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Format<'a> {
    Text,
    /// Any JSON object.
    Object,
    Schema {
        description: Option<&'a str>,
        schema: &'a Value,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Effort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    XHigh,
}

/// What a dialect may be unable to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Beyond {
    Choices,
    Logprobs,
    Penalties,
    /// One call at a time, where the model is free to call.
    OneCall,
    Audio,
}

/// What an instruction to write JSON says, where there is no switch for it.
pub(super) const JSON_ONLY: &str =
    "Answer with a single valid JSON object and nothing else: no prose around it, no code fence.";

/// How [`JSON_TOOL`] is offered.
#[derive(Debug)]
pub(super) struct JsonTool<'a> {
    pub(super) description: &'a str,
    pub(super) schema: &'a Value,
    /// It must be called, rather than any tool.
    pub(super) alone: bool,
}

/// The tool that a model is made to call where there is no other way to hold it to a schema. Its arguments are the answer.
pub(super) const JSON_TOOL: &str = "answer_in_json";

impl<'a> Ask<'a> {
    /// Reads a request.
    pub(super) fn read(body: &'a Value) -> Result<Self> {
        let fields = Fields(body.as_object().ok_or_else(|| Error::bad_input("the body is not a JSON object"))?);
        refuse_what_nobody_has(&fields)?;
        let mut tools = tools(&fields)?;
        let choice = choice(&fields, &mut tools)?;
        let wanted = fields.bool("logprobs")?.unwrap_or(false);
        let top = fields.count("top_logprobs")?;
        let options = fields.get("stream_options").and_then(|options| options.get("include_usage"));
        let ask = Self {
            messages: content::messages(fields.list("messages")?)?,
            tools,
            choice,
            parallel: fields.bool("parallel_tool_calls")?.unwrap_or(true),
            format: format(&fields)?,
            max_tokens: fields.count("max_completion_tokens")?.or(fields.count("max_tokens")?),
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.count("top_k")?,
            seed: fields.get("seed").and_then(Value::as_i64),
            presence_penalty: fields.number("presence_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            stop: stop(&fields)?,
            choices: fields.count("n")?.unwrap_or(1),
            logprobs: wanted.then(|| top.unwrap_or(0)),
            effort: effort(&fields)?,
            thinking: fields.get("thinking").filter(|thinking| thinking.is_object()),
            user: fields.text("user")?.or(fields.text("safety_identifier")?),
            stream: fields.bool("stream")?.unwrap_or(false),
            include_usage: options.and_then(Value::as_bool).unwrap_or(false),
        };
        if ask.choices == 0 {
            return Err(Error::bad_field("n", "`n` must be 1 or more"));
        }
        Ok(ask)
    }

    /// Refuses what `who` could only ignore, and what would then come out otherwise than asked.
    pub(super) fn refuse(&self, who: &str, what: &[Beyond]) -> Result<()> {
        let free = matches!(self.choice, Choice::Auto | Choice::Required) && !self.tools.is_empty();
        let used = |penalty: Option<f64>| penalty.is_some_and(|penalty| penalty != 0.0);
        let audio = || self.messages.iter().flat_map(|m| &m.parts).any(|part| matches!(part, Part::Audio { .. }));
        for beyond in what {
            let (param, asked, advice) = match beyond {
                Beyond::Choices => ("n", self.choices > 1, "gives one choice a call: leave out `n`"),
                Beyond::Logprobs => {
                    ("logprobs", self.logprobs.is_some(), "has no log-probabilities: leave out `logprobs`")
                }
                Beyond::Penalties if used(self.presence_penalty) => {
                    ("presence_penalty", true, "has no penalties: leave out `presence_penalty`")
                }
                Beyond::Penalties => {
                    let asked = used(self.frequency_penalty);
                    ("frequency_penalty", asked, "has no penalties: leave out `frequency_penalty`")
                }
                Beyond::OneCall => (
                    "parallel_tool_calls",
                    free && !self.parallel,
                    "cannot be held to one call at a time: leave out `parallel_tool_calls`, or name a tool in `tool_choice`",
                ),
                Beyond::Audio => ("messages", audio(), "does not listen: leave out `input_audio`"),
            };
            if asked {
                return Err(Error::bad_field(param, format!("{who} {advice}")));
            }
        }
        Ok(())
    }

    /// How a schema is held to by a tool that must be called; `None` if no schema is asked for, or another tool must be called anyway.
    pub(super) fn json_tool(&self) -> Option<JsonTool<'a>> {
        let Format::Schema { description, schema, .. } = self.format else { return None };
        let alone = match self.choice {
            Choice::Auto => self.tools.is_empty(),
            Choice::None => true,
            Choice::Required | Choice::Named(_) => return None,
        };
        let description =
            description.unwrap_or("Gives the final answer. Call it exactly once, when the answer is known.");
        Some(JsonTool { description, schema, alone })
    }

    /// Whether a tool has been called in what was said before.
    pub(super) fn has_tool_history(&self) -> bool {
        let mut parts = self.messages.iter().flat_map(|message| &message.parts);
        parts.any(|part| matches!(part, Part::Call { .. } | Part::Result { .. }))
    }
}

/// The top level of the request.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// A field that is there and not `null`.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, name: &str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| Error::bad_field(name, format!("`{name}` must be {what}")))
    }

    fn bool(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number", Value::as_f64)
    }

    fn count(&self, name: &str) -> Result<Option<u64>> {
        self.typed(name, "a whole number", Value::as_u64)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.typed(name, "a string", Value::as_str)
    }

    fn list(&self, name: &str) -> Result<Option<&'a Vec<Value>>> {
        self.typed(name, "an array", Value::as_array)
    }
}

fn refuse_what_nobody_has(fields: &Fields) -> Result<()> {
    let filled = |value: &Value| match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    };
    for (name, advice) in [
        ("functions", "`functions` is not translated for other providers: use `tools`"),
        ("function_call", "`function_call` is not translated for other providers: use `tool_choice`"),
        ("logit_bias", "`logit_bias` means tokens of OpenAI's models: leave it out"),
        ("audio", "other providers do not speak in chat: leave out `audio`"),
        ("web_search_options", "`web_search_options` is not translated for other providers: leave it out"),
    ] {
        if fields.get(name).is_some_and(filled) {
            return Err(Error::bad_field(name, advice));
        }
    }
    if fields.list("modalities")?.is_some_and(|wanted| wanted.iter().any(|modality| modality != "text")) {
        return Err(Error::bad_field("modalities", "answers of other providers are text only: leave out `modalities`"));
    }
    Ok(())
}

fn stop<'a>(fields: &Fields<'a>) -> Result<Vec<&'a str>> {
    let wrong = || Error::bad_field("stop", "`stop` must be a string or an array of strings");
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop.as_str()]),
        Some(Value::Array(list)) => list.iter().map(|stop| stop.as_str().ok_or_else(wrong)).collect(),
        Some(_) => Err(wrong()),
    }
}

fn effort(fields: &Fields) -> Result<Option<Effort>> {
    let nested = fields.get("reasoning").and_then(|reasoning| reasoning.get("effort")).and_then(Value::as_str);
    let Some(word) = fields.text("reasoning_effort")?.or(nested) else { return Ok(None) };
    Ok(Some(match word {
        "none" => Effort::None,
        "minimal" => Effort::Minimal,
        "low" => Effort::Low,
        "medium" => Effort::Medium,
        "high" => Effort::High,
        "xhigh" | "max" => Effort::XHigh,
        _ => {
            let advice = "`reasoning_effort` must be none, minimal, low, medium, high or xhigh";
            return Err(Error::bad_field("reasoning_effort", advice));
        }
    }))
}

fn format<'a>(fields: &Fields<'a>) -> Result<Format<'a>> {
    let Some(format) = fields.get("response_format") else { return Ok(Format::Text) };
    match format["type"].as_str() {
        Some("text") => Ok(Format::Text),
        Some("json_object") => Ok(Format::Object),
        Some("json_schema") => {
            let wrapped = &format["json_schema"];
            let schema = wrapped.get("schema").filter(|schema| schema.is_object());
            // OpenAI takes a missing schema for any object.
            let Some(schema) = schema else { return Ok(Format::Object) };
            Ok(Format::Schema { description: wrapped["description"].as_str(), schema })
        }
        _ => Err(Error::bad_field(
            "response_format.type",
            "`response_format.type` must be text, json_object or json_schema",
        )),
    }
}

fn tools<'a>(fields: &Fields<'a>) -> Result<Vec<Tool<'a>>> {
    let Some(list) = fields.list("tools")? else { return Ok(Vec::new()) };
    let tools = list.iter().enumerate().map(|(at, tool)| {
        if tool["type"] != "function" {
            return Err(Error::bad_field(
                format!("tools.{at}.type"),
                "only tools of type `function` are translated for other providers",
            ));
        }
        let function = &tool["function"];
        let name = function["name"]
            .as_str()
            .ok_or_else(|| Error::bad_field(format!("tools.{at}.function.name"), "a tool needs a name"))?;
        let parameters = function.get("parameters").filter(|schema| schema.is_object());
        Ok(Tool { name, description: function["description"].as_str(), parameters })
    });
    tools.collect()
}

fn choice<'a>(fields: &Fields<'a>, tools: &mut Vec<Tool<'a>>) -> Result<Choice<'a>> {
    let wrong =
        || Error::bad_field("tool_choice", "`tool_choice` must be auto, none, required, or name a function of `tools`");
    let mode = |word: &str| match word {
        "auto" => Some(Choice::Auto),
        "none" => Some(Choice::None),
        "required" | "any" => Some(Choice::Required),
        _ => None,
    };
    match fields.get("tool_choice") {
        None => Ok(Choice::Auto),
        Some(Value::String(word)) => mode(word).ok_or_else(wrong),
        Some(value) if value["type"] == "allowed_tools" => {
            let allowed = value.get("allowed_tools").unwrap_or(value);
            let names: Vec<_> = allowed["tools"].as_array().ok_or_else(wrong)?.iter().collect();
            tools.retain(|tool| {
                names.iter().any(|name| name["function"]["name"] == tool.name || name["name"] == tool.name)
            });
            mode(allowed["mode"].as_str().unwrap_or("auto")).ok_or_else(wrong)
        }
        Some(value) => {
            let name = value["function"]["name"].as_str().ok_or_else(wrong)?;
            if !tools.iter().any(|tool| tool.name == name) {
                return Err(wrong());
            }
            Ok(Choice::Named(name))
        }
    }
}
