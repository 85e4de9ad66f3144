//! A model's chat template: messages to the text the model was trained on. Templates are Jinja as the `transformers`
//! library sets it up, since that is what their authors test with:
//!
//! - blocks trim the line they stand on (`trim_blocks`, `lstrip_blocks`), loops have `break` and `continue`;
//! - `raise_exception(text)` refuses the conversation, `strftime_now(format)` is the time (UTC here);
//! - `tojson` writes what Python's `json.dumps` writes, with `ensure_ascii` off;
//! - values have Python's methods (`strip`, `split`, `items`, …), and `{% generation %}` marks are seen through.
//!
//! A template is the model's, not the caller's. Still its work is bounded: instructions, depth and length of the text.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::model::files::{ModelFiles, read_json, read_text};
use crate::task::Message;

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// Longest text a conversation may become.
const MAX_TEXT: usize = 64 << 20;
/// Instructions of a rendering; some hundred a message is usual.
const MAX_STEPS: u64 = 10_000_000;
/// Macros calling macros.
const MAX_DEPTH: usize = 100;
const NAME: &str = "chat";
/// For vocabularies that have its tokens when nothing else is said.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl ChatTemplate {
    /// The source of a model's template: GGUF metadata, `chat_template.jinja`, or `tokenizer_config.json`.
    ///
    /// # Errors
    /// `ModelUnavailable` when a file cannot be read.
    pub fn source(files: &ModelFiles) -> Result<Option<String>> {
        let folder = match files {
            ModelFiles::Gguf(gguf) => return Ok(gguf.str("tokenizer.chat_template")?.map(str::to_owned)),
            ModelFiles::Folder { path, .. } => path,
        };
        if let Some(source) = read_text(&folder.join("chat_template.jinja"))? {
            return Ok(Some(source));
        }
        let settings = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        Ok(match settings.get("chat_template") {
            Some(Value::String(source)) => Some(source.clone()),
            // [{"name": "default", "template": …}, {"name": "tool_use", …}]
            Some(Value::Array(named)) => {
                let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
                default.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
            }
            _ => None,
        })
    }

    /// The source of the template that a model keeps for conversations with tools, if it has a second one: GGUF metadata
    /// or the one called `tool_use` in `tokenizer_config.json`.
    ///
    /// # Errors
    /// `ModelUnavailable` when a file cannot be read.
    pub fn source_for_tools(files: &ModelFiles) -> Result<Option<String>> {
        let folder = match files {
            ModelFiles::Gguf(gguf) => return Ok(gguf.str("tokenizer.chat_template.tool_use")?.map(str::to_owned)),
            ModelFiles::Folder { path, .. } => path,
        };
        let settings = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let named = settings["chat_template"].as_array().map_or(&[][..], Vec::as_slice);
        let found = named.iter().find(|entry| entry["name"] == "tool_use");
        Ok(found.and_then(|entry| entry["template"].as_str()).map(str::to_owned))
    }

    /// Compiles a template. `names` are texts that it may use: `bos_token`, `eos_token` …
    ///
    /// # Errors
    /// `Unsupported` when the source is not a template that can be rendered.
    pub fn compile(source: &str, names: &[(&'static str, String)]) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| Error::internal("template syntax").with_source(error))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_debug(false);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, text) in names {
            environment.add_global(*name, text.clone());
        }
        environment.add_template_owned(NAME, without_generation_marks(source)?).map_err(|error| {
            Error::unsupported(format!("the model's chat template cannot be compiled: {error}")).with_source(error)
        })?;
        Ok(Self { environment })
    }

    /// ChatML, for models that have its tokens and no template.
    ///
    /// # Errors
    /// None in practice.
    pub fn chatml() -> Result<Self> {
        Self::compile(CHATML, &[])
    }

    /// The text of a conversation, with the beginning of the model's turn at its end. `kwargs` are variables of the
    /// template (`enable_thinking` …); `messages` is not one that can be replaced.
    ///
    /// # Errors
    /// `BadInput` when the template refuses the conversation or makes too much of it.
    pub fn render(&self, messages: &[Message], kwargs: &Map<String, Value>) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(template_message).collect::<Result<_>>()?;
        let mut context = Map::new();
        context.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        context.insert("tools".to_owned(), Value::Null);
        context.insert("documents".to_owned(), Value::Null);
        context.extend(kwargs.iter().map(|(name, value)| (name.clone(), value.clone())));
        context.insert("messages".to_owned(), Value::Array(messages));
        let mut text = Bounded { bytes: Vec::new() };
        let rendered = self.environment.get_template(NAME).and_then(|template| {
            let context = Jinja::from(Serde(&context));
            template.render_captured_to(context, &mut text).map(|_| ())
        });
        rendered.map_err(refusal)?;
        String::from_utf8(text.bytes).map_err(|error| Error::internal("a template wrote no text").with_source(error))
    }
}

/// The message as templates know it. They take the arguments of tool calls as objects; callers send them as JSON text.
fn template_message(message: &Message) -> Result<Value> {
    let mut value = serde_json::to_value(message)
        .map_err(|error| Error::internal("a message cannot be written").with_source(error))?;
    let calls = value.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
            continue;
        };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(parsed) = parsed.filter(Value::is_object) {
            *arguments = parsed;
        }
    }
    Ok(value)
}

fn refusal(error: minijinja::Error) -> Error {
    let message = match error.kind() {
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => {
            "The messages make too long a prompt for the model's chat template; send fewer or shorter ones.".to_owned()
        }
        _ => {
            let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            format!("The model's chat template refused the messages: {detail}")
        }
    };
    Error::bad_field("messages", message).with_source(error)
}

/// A text that fails to grow beyond [`MAX_TEXT`].
struct Bounded {
    bytes: Vec<u8>,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_TEXT {
            return Err(io::Error::other("the text is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` marks the model's own words for training. Rendering needs only what is inside.
fn without_generation_marks(source: &str) -> Result<String> {
    if !source.contains("generation") {
        return Ok(source.to_owned());
    }
    let pattern = |text: &str| Regex::new(text).map_err(|error| Error::internal("a pattern").with_source(error));
    let opened = pattern(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")?.replace_all(source, "{%${1} if true ${2}%}");
    Ok(pattern(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")?.replace_all(&opened, "{%${1} endif ${2}%}").into_owned())
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
fn to_json(value: &Jinja, indent: Option<usize>, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = match options.get::<Option<usize>>("indent")? {
        None => indent,
        indent => indent,
    };
    // Read so that they are allowed; texts are never escaped to ASCII.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        _ => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let value = serde_json::to_value(value).map_err(|error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(error)
    })?;
    let mut out = String::new();
    Json { indent, comma, colon, sort_keys }.write(&value, 0, &mut out);
    Ok(out)
}

/// How `json.dumps` was asked to write.
struct Json {
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort_keys: bool,
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Array(items) => self.list('[', items.iter(), ']', depth, out, |item, out| {
                self.write(item, depth + 1, out);
            }),
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_unstable_by_key(|(name, _)| *name);
                }
                self.list('{', fields.into_iter(), '}', depth, out, |(name, value), out| {
                    out.push_str(&Value::from(name.as_str()).to_string());
                    out.push_str(&self.colon);
                    self.write(value, depth + 1, out);
                });
            }
            plain => out.push_str(&plain.to_string()),
        }
    }

    fn list<T>(
        &self,
        open: char,
        items: impl ExactSizeIterator<Item = T>,
        close: char,
        depth: usize,
        out: &mut String,
        write: impl Fn(T, &mut String),
    ) {
        let empty = items.len() == 0;
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(open);
        for (at, item) in items.enumerate() {
            if at > 0 {
                out.push_str(&self.comma);
            }
            line(depth + 1, out);
            write(item, out);
        }
        if !empty {
            line(depth, out);
        }
        out.push(close);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests_support::demo_model;
    use crate::task::Role;

    /// `{"templates": {name: source}, "cases": [{template, names, messages, kwargs, text | error}]}`, rendered by Python's
    /// jinja2 (`scripts/template_goldens.py`).
    const GOLDENS: &str = include_str!("goldens/templates.json");

    fn message(value: &Value) -> Message {
        let role = match value["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => Role::Tool,
        };
        let text = |name: &str| value.get(name).map(|text| text.as_str().unwrap().to_owned());
        Message {
            role,
            content: text("content").unwrap_or_default(),
            name: text("name"),
            tool_call_id: text("tool_call_id"),
            tool_calls: value.get("tool_calls").cloned(),
        }
    }

    fn check(case: &Value, source: &str) {
        let names: Vec<(&'static str, String)> =
            [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name, text.to_owned())).into();
        let template = ChatTemplate::compile(source, &names).unwrap();
        let messages: Vec<_> = case["messages"].as_array().unwrap().iter().map(message).collect();
        let rendered = template.render(&messages, case["kwargs"].as_object().unwrap());
        match (rendered, case.get("error")) {
            (Ok(text), None) => assert_eq!(text, case["text"].as_str().unwrap(), "{case:#}"),
            (Err(error), Some(expected)) => {
                assert_eq!(error.kind(), crate::base::Kind::BadInput);
                assert!(error.message().ends_with(expected.as_str().unwrap()), "{error} / {expected}");
            }
            (rendered, _) => panic!("{rendered:?} for {case:#}"),
        }
    }

    #[test]
    fn templates_render_as_python_renders_them() {
        let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
        let cases = goldens["cases"].as_array().unwrap();
        assert!(cases.len() > 30);
        for case in cases {
            let name = case["template"].as_str().unwrap();
            match goldens["templates"].get(name) {
                Some(source) => check(case, source.as_str().unwrap()),
                None => assert_eq!(name, "demo"),
            }
        }
    }

    #[test]
    fn the_demo_models_template_renders_as_python_renders_it() {
        let Some(path) = demo_model() else { return };
        let source = ChatTemplate::source(&ModelFiles::open(&path).unwrap()).unwrap().unwrap();
        let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
        let cases: Vec<_> =
            goldens["cases"].as_array().unwrap().iter().filter(|case| case["template"] == "demo").collect();
        assert!(cases.len() >= 3);
        cases.iter().for_each(|case| check(case, &source));
    }

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::compile(source, &[])?.render(messages, &Map::new())
    }

    #[test]
    fn chatml_stands_in_where_there_is_no_template() {
        let messages = [Message::new(Role::System, "Be brief."), Message::new(Role::User, "Hi")];
        assert_eq!(
            ChatTemplate::chatml().unwrap().render(&messages, &Map::new()).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn endless_templates_end() {
        let check = |source: &str| {
            let error = render(source, &[]).unwrap_err();
            assert_eq!(error.kind(), crate::base::Kind::BadInput, "{error:?}");
        };
        check("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}");
        let loops = |depth: usize, body: &str| {
            format!("{}{body}{}", "{% for i in range(2000) %}".repeat(depth), "{% endfor %}".repeat(depth))
        };
        check(&loops(3, "{% set x = 1 %}"));
        check(&loops(2, &"x".repeat(1000)));
    }

    #[test]
    fn a_broken_template_is_an_error_when_compiled() {
        let error = ChatTemplate::compile("{% for x in %}", &[]).unwrap_err();
        assert!(error.message().contains("cannot be compiled"), "{error}");
    }

    #[test]
    fn the_time_is_told_in_pythons_words() {
        let date = render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap();
        let parts: Vec<_> = date.split(' ').collect();
        assert!(parts.len() == 3 && parts[0].len() == 2 && parts[1].len() == 3 && parts[2].starts_with("20"), "{date}");
    }

    #[test]
    fn the_source_is_found_wherever_hubs_put_it() {
        let check = |files: &[(&str, String)], expected: Option<&str>| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), "{}").unwrap();
            for (name, text) in files {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            let files = ModelFiles::open(folder.path()).unwrap();
            assert_eq!(ChatTemplate::source(&files).unwrap().as_deref(), expected);
        };
        let settings = |value: Value| ("tokenizer_config.json", json!({"chat_template": value}).to_string());
        check(&[], None);
        check(&[settings(json!("a"))], Some("a"));
        let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        check(&[settings(named.clone())], Some("d"));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let for_tools = || ChatTemplate::source_for_tools(&ModelFiles::open(folder.path()).unwrap()).unwrap();
        assert_eq!(for_tools(), None);
        std::fs::write(folder.path().join("tokenizer_config.json"), settings(named).1).unwrap();
        assert_eq!(for_tools().as_deref(), Some("t"));
        check(&[settings(json!("a")), ("chat_template.jinja", "b".to_owned())], Some("b"));
    }
}
