//! What an answer may look like that has to call tools, or whose calls have to follow their schemas: a grammar in Lark's
//! notation, in the model's own way of writing calls.
//!
//! ```text
//! forced                       start: calls
//! free, with strict tools      start: calls, or text and calls, or text       (what opens a call decides)
//! free, a document otherwise   start: calls | document                      (where calls begin with a marker)
//! ```

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::ToolFormat;
use super::format::Family;
use crate::base::{Error, Result};
use crate::model::grammar::prepare;
use crate::task::{Grammar, Tool, ToolChoice, Tools};

/// Most calls of an answer under a grammar.
const MAX_CALLS: usize = 16;

impl ToolFormat {
    /// The grammar of an answer that was offered `tools` and should otherwise look like `other`. None: it is free.
    ///
    /// # Errors
    /// `BadInput` or `Unsupported` for a strict tool whose schema cannot be kept, and for what does not go together.
    pub fn grammar(&self, tools: &Tools, other: Option<&Grammar>) -> Result<Option<Grammar>> {
        let strict = tools.list.iter().any(|tool| tool.strict);
        let start = match (tools.are_forced(), other) {
            (true, _) => "start: calls\n".to_owned(),
            (false, None) if !strict => return Ok(None),
            (false, None) => self.text_or_calls(),
            // Where calls begin with a marker they cannot be taken for documents.
            (false, Some(other @ (Grammar::Json | Grammar::JsonSchema(_)))) if self.has_marker() => {
                let schema = match other {
                    Grammar::JsonSchema(schema) => prepare(schema)?,
                    _ => prepare(&json!({ "type": "object" }))?,
                };
                format!("start: calls | document\ndocument: %json {schema}\n")
            }
            (false, Some(_)) => {
                let message = "A grammar for the answer does not go with tools that may be called or not: set \
                               `tool_choice` to none or required.";
                return Err(Error::bad_field("tool_choice", message));
            }
        };
        let mut text = start;
        self.put_calls(tools, &mut text);
        for (at, tool) in tools.callable().enumerate() {
            let (name, field) = (quoted(&tool.name), quoted(self.arguments_field()));
            // A name in quotes is JSON's and stands in Lark's quotes.
            let head = if self.family == (Family::Mistral { named: true }) {
                format!("{name} {} arguments_{at}", self.marker("[ARGS]"))
            } else {
                let head = format!("{{\"name\": {name}, {field}: ");
                format!("{} arguments_{at} \"}}\"", quoted(&head))
            };
            let _ = writeln!(text, "call_{at}: {head}\narguments_{at}: %json {}", parameters(tool)?);
        }
        Ok(Some(Grammar::Lark(text)))
    }

    fn has_marker(&self) -> bool {
        matches!(self.family, Family::Hermes | Family::Mistral { .. })
    }

    /// `calls`, and `call`, which is one of the functions.
    fn put_calls(&self, tools: &Tools, out: &mut String) {
        let any: Vec<_> = (0..tools.callable().count()).map(|at| format!("call_{at}")).collect();
        let more = match (&tools.choice, tools.parallel) {
            (ToolChoice::Named(_), _) | (_, false) => 0,
            _ => MAX_CALLS - 1,
        };
        let several = |first: &str, separator: &str, next: &str| match more {
            0 => first.to_owned(),
            _ => format!("{first} ({separator} {next}){{0,{more}}}"),
        };
        let open = self.marker("<tool_call>");
        let calls = match self.family {
            Family::Hermes => {
                let rest = format!("\"\\n\" call \"\\n\" {}", self.marker("</tool_call>"));
                let _ = writeln!(
                    out,
                    "calls: {open} opened\nopened: {}",
                    several(&rest, "\"\\n\"", &format!("{open} {rest}"))
                );
                None
            }
            Family::Llama => Some(several("call", "\"; \"", "call")),
            Family::Json => Some(several("call", "\"\\n\"", "call")),
            Family::Mistral { named: false } => {
                let list = format!("/ ?\\[/ {} \"]\"", several("call", "\", \"", "call"));
                let _ = writeln!(out, "calls: {} opened\nopened: {list}", self.marker("[TOOL_CALLS]"));
                None
            }
            Family::Mistral { named: true } => {
                let open = self.marker("[TOOL_CALLS]");
                let _ = writeln!(out, "calls: {open} opened\nopened: {}", several("call", "", &format!("{open} call")));
                None
            }
        };
        if let Some(calls) = calls {
            let _ = writeln!(out, "calls: {calls}");
        }
        let _ = writeln!(out, "call: {}", any.join(" | "));
    }

    /// `start` where the model is free until it opens a call.
    fn text_or_calls(&self) -> String {
        let open = match self.family {
            Family::Hermes => "<tool_call>",
            Family::Mistral { .. } => "[TOOL_CALLS]",
            // Without a marker the first character decides.
            Family::Llama | Family::Json => {
                return "start: (calls | PLAIN)?\nPLAIN: /[ \\n\\r\\t]*[^{\\[ \\n\\r\\t](.|\\n)*/\n".to_owned();
            }
        };
        match self.control(open) {
            Some(_) => "start: (TEXT | TEXT calls | calls)?\nTEXT: /(.|\\n)+/\n".to_owned(),
            None => {
                let open = quoted(open);
                format!("start: (TEXT | before opened)?\nbefore[suffix={open}]: /(.|\\n)*/\nTEXT: /(.|\\n)+/\n")
            }
        }
    }

    fn control(&self, marker: &str) -> Option<u32> {
        self.control.iter().find(|(text, _)| *text == marker).map(|&(_, token)| token)
    }

    /// A marker as a token where it is one that prints nothing, as text elsewhere.
    fn marker(&self, text: &str) -> String {
        self.control(text).map_or_else(|| quoted(text), |token| format!("<[{token}]>"))
    }

    fn arguments_field(&self) -> &'static str {
        if self.family == Family::Llama { "parameters" } else { "arguments" }
    }
}

/// The schema that a tool's arguments are held to, ready for the compiler.
fn parameters(tool: &Tool) -> Result<Value> {
    let schema = narrowed(tool);
    match prepare(&schema) {
        Err(_) if !tool.strict => Ok(lenient(schema)),
        prepared => prepared.map_err(|error| {
            error.context(format_args!("the parameters of the strict tool {}", tool.name)).with_param("tools")
        }),
    }
}

/// A tool's schema without room for arguments that the function has no name for: they would be made up.
fn narrowed(tool: &Tool) -> Value {
    let mut schema = tool.parameters.clone();
    schema.entry("type").or_insert_with(|| json!("object"));
    let open =
        ["additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "allOf", "$ref"];
    if !open.iter().any(|keyword| schema.contains_key(*keyword)) {
        schema.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
    Value::Object(schema)
}

/// What cannot be kept of a schema is let go: nobody was promised it.
fn lenient(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        _ => Map::new(),
    };
    schema.insert("x-guidance".to_owned(), json!({ "lenient": true, "whitespace_flexible": false }));
    Value::Object(schema)
}

/// Text as a string of Lark, which is one of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::parser::Piece;
    use super::*;
    use crate::model::Vocabulary;
    use crate::model::grammar::{Grammars, Matcher, allows};
    use crate::task::ToolDelta;

    const END: u32 = 256;
    /// Control tokens that some of the models below have.
    const MARKERS: [&str; 2] = ["[TOOL_CALLS]", "[ARGS]"];

    /// Every byte is a token, then come the end and the markers.
    fn vocabulary() -> Vocabulary {
        Vocabulary::new((0..=255u8).map(|byte| vec![byte]).chain([vec![], vec![], vec![]]), vec![END])
    }

    fn format(family: Family, control: bool) -> ToolFormat {
        let control = if control { MARKERS.iter().zip(257..).map(|(text, id)| (*text, id)).collect() } else { vec![] };
        ToolFormat { family, control, native: true, several: true, system: true }
    }

    fn all() -> Vec<ToolFormat> {
        let mistral = |named| Family::Mistral { named };
        vec![
            format(Family::Hermes, false),
            format(Family::Llama, false),
            format(Family::Json, false),
            format(mistral(false), false),
            format(mistral(true), false),
            format(mistral(false), true),
            format(mistral(true), true),
        ]
    }

    fn tools(choice: ToolChoice, parallel: bool) -> Tools {
        let tool = |name: &str, parameters: Value| Tool {
            name: name.to_owned(),
            description: String::new(),
            parameters: parameters.as_object().unwrap().clone(),
            strict: name == "weather",
        };
        let weather = json!({"type": "object", "properties": {
            "city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}}, "required": ["city"]});
        Tools {
            list: vec![tool("weather", weather), tool("now", json!({"type": "object", "properties": {}}))],
            choice,
            parallel,
        }
    }

    fn matcher(format: &ToolFormat, tools: &Tools, other: Option<&Grammar>) -> Matcher {
        let control = MARKERS.iter().zip(257..).map(|(text, id)| ((*text).to_owned(), id)).collect();
        let grammars = Grammars::new(Arc::new(vocabulary()), control);
        let grammar = format.grammar(tools, other).unwrap().expect("a grammar");
        grammars.compile_now(&grammar).unwrap_or_else(|error| panic!("{error}: {grammar:?}")).matcher()
    }

    /// A text as tokens, markers that are control tokens as those.
    fn tokens(format: &ToolFormat, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        let mut rest = text;
        while let Some(byte) = rest.bytes().next() {
            match format.control.iter().find(|(marker, _)| rest.starts_with(marker)) {
                Some(&(marker, id)) => {
                    tokens.push(id);
                    rest = &rest[marker.len()..];
                }
                None => {
                    // Texts here are ASCII.
                    tokens.push(byte.into());
                    rest = &rest[1..];
                }
            }
        }
        tokens
    }

    /// Whether a text is a whole answer.
    fn accepts(format: &ToolFormat, tools: &Tools, other: Option<&Grammar>, text: &str) -> bool {
        let mut matcher = matcher(format, tools, other);
        for token in tokens(format, text) {
            matcher.prepare(&[]);
            if !allows(matcher.mask(0), token) {
                return false;
            }
            matcher.accept(token);
        }
        matcher.prepare(&[]);
        matcher.is_complete() || allows(matcher.mask(0), END)
    }

    #[test]
    fn calls_are_forced_in_the_way_of_the_model() {
        let (one, two) = (
            r#"{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}"#,
            r#"{"name": "now", "arguments": {}}"#,
        );
        let llama = (one.replace("arguments", "parameters"), two.replace("arguments", "parameters"));
        let check = |format: &ToolFormat, single: String, double: String| {
            let forced = tools(ToolChoice::Required, true);
            assert!(accepts(format, &forced, None, &single), "{format:?} {single}");
            assert!(accepts(format, &forced, None, &double), "{format:?} {double}");
            assert!(!accepts(format, &forced, None, "") && !accepts(format, &forced, None, "Hello"), "{format:?}");
            let alone = tools(ToolChoice::Required, false);
            assert!(accepts(format, &alone, None, &single) && !accepts(format, &alone, None, &double), "{format:?}");
            let named = tools(ToolChoice::Named("weather".into()), true);
            assert!(accepts(format, &named, None, &single) && !accepts(format, &named, None, &double), "{format:?}");
            let other = tools(ToolChoice::Named("now".into()), true);
            assert!(!accepts(format, &other, None, &single), "{format:?}");
            for wrong in
                [single.replace("Oslo", "Oslo and more"), single.replace("city", "town"), single.replace("\"C\"", "1")]
            {
                assert!(!accepts(format, &forced, None, &wrong), "{format:?} {wrong}");
            }
        };
        let [hermes, of_llama, plain, list, named, list_token, named_token] = &all()[..] else { panic!("seven") };
        let tag = |call: &str| format!("<tool_call>\n{call}\n</tool_call>");
        check(hermes, tag(one), format!("{}\n{}", tag(one), tag(two)));
        check(of_llama, llama.0.clone(), format!("{}; {}", llama.0, llama.1));
        check(plain, one.to_owned(), format!("{one}\n{two}"));
        for format in [list, list_token] {
            check(format, format!("[TOOL_CALLS] [{one}]"), format!("[TOOL_CALLS][{one}, {two}]"));
        }
        let short = r#"[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "unit": "C"}"#;
        for format in [named, named_token] {
            check(format, short.to_owned(), format!("{short}[TOOL_CALLS]now[ARGS]{{}}"));
        }
    }

    #[test]
    fn where_the_model_is_free_a_call_that_it_begins_follows_the_schema() {
        let free = tools(ToolChoice::Auto, true);
        for format in all() {
            assert!(accepts(&format, &free, None, "Hello there."), "{format:?}");
            assert!(accepts(&format, &free, None, "Braces {} come later, [too]."), "{format:?}");
            let call = match format.family {
                Family::Hermes => {
                    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>"
                }
                Family::Llama => r#"{"name": "weather", "parameters": {"city": "Oslo"}}"#,
                Family::Json => r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#,
                Family::Mistral { named: false } => {
                    r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]"#
                }
                Family::Mistral { named: true } => r#"[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}"#,
            };
            assert!(accepts(&format, &free, None, call), "{format:?}");
            assert!(!accepts(&format, &free, None, &call.replace("city", "town")), "{format:?}");
            if matches!(format.family, Family::Hermes | Family::Mistral { .. }) {
                assert!(accepts(&format, &free, None, &format!("I look. {call}")), "{format:?}");
            }
        }
        let mut loose = tools(ToolChoice::Auto, true);
        loose.list.iter_mut().for_each(|tool| tool.strict = false);
        assert_eq!(format(Family::Hermes, false).grammar(&loose, None).unwrap(), None, "nothing to hold it to");
    }

    #[test]
    fn a_document_and_calls_are_told_apart() {
        let free = tools(ToolChoice::Auto, true);
        let schema = json!({"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"], "additionalProperties": false});
        for format in all().into_iter().filter(ToolFormat::has_marker) {
            let other = Grammar::JsonSchema(schema.clone());
            assert!(accepts(&format, &free, Some(&other), r#"{"answer": 1}"#), "{format:?}");
            assert!(!accepts(&format, &free, Some(&other), "Hello"), "{format:?}");
        }
        let hermes = format(Family::Hermes, false);
        let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
        assert!(accepts(&hermes, &free, Some(&Grammar::Json), call));
        let refused = hermes.grammar(&free, Some(&Grammar::Regex("a".into()))).unwrap_err();
        assert_eq!(refused.param(), Some("tool_choice"));
        assert!(!accepts(&hermes, &tools(ToolChoice::Required, true), Some(&Grammar::Json), "{}"));
    }

    #[test]
    fn a_schema_that_cannot_be_kept_is_refused_where_it_was_promised() {
        let mut tools = tools(ToolChoice::Required, true);
        let odd = json!({"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": true}}});
        tools.list[0].parameters = odd.as_object().unwrap().clone();
        let format = format(Family::Json, false);
        let error = format.grammar(&tools, None).unwrap_err();
        assert!(error.message().contains("weather") && error.message().contains("uniqueItems"), "{error}");
        assert_eq!(error.param(), Some("tools"));
        tools.list[0].strict = false;
        assert!(accepts(&format, &tools, None, r#"{"name": "weather", "arguments": {"tags":["a","a"]}}"#));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn what_a_forced_answer_can_be_is_read_as_calls(
            which in 0..7usize,
            draws in prop::collection::vec(any::<u32>(), 400),
            named in any::<bool>(),
        ) {
            let format = &all()[which];
            let choice = if named { ToolChoice::Named("weather".into()) } else { ToolChoice::Required };
            let tools = Arc::new(tools(choice, !named));
            let mut matcher = matcher(format, &tools, None);
            let mut parser = format.parser(tools.clone(), 1);
            let shown = vocabulary().printing(format.markers());
            let (mut bytes, mut pieces) = (Vec::new(), Vec::new());
            for draw in draws {
                matcher.prepare(&[]);
                // Control characters and half characters would be read all the same, but hold the walk up.
                let allowed: Vec<u32> = (0..259)
                    .filter(|&token| allows(matcher.mask(0), token) && (token >= END || (32..127).contains(&token) || token == 10))
                    .collect();
                if matcher.is_complete() || allowed.contains(&END) && draw % 4 == 0 {
                    break;
                }
                let allowed: Vec<u32> = allowed.into_iter().filter(|&token| token != END).collect();
                if allowed.is_empty() {
                    break;
                }
                // Strings should come to an end now and then.
                let quote = allowed.contains(&34) && draw % 3 == 0;
                let token = if quote { 34 } else { allowed[draw as usize / 8 % allowed.len()] };
                matcher.accept(token);
                bytes.extend_from_slice(shown.piece(token));
            }
            matcher.prepare(&[]);
            prop_assume!(matcher.is_complete() || allows(matcher.mask(0), END));
            let text = String::from_utf8(bytes).unwrap();
            pieces.extend(parser.push(&text));
            pieces.extend(parser.finish());
            prop_assert!(parser.has_called(), "{}", text);
            let mut calls: Vec<(String, String)> = Vec::new();
            for piece in pieces {
                match piece {
                    Piece::Text(said) => prop_assert!(false, "{said:?} is text in {text:?}"),
                    Piece::Tool(_, ToolDelta::Begin { name, .. }) => calls.push((name, String::new())),
                    Piece::Tool(_, ToolDelta::Arguments(more)) => calls.last_mut().unwrap().1 += &more,
                }
            }
            for (name, arguments) in calls {
                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                let city = arguments["city"].as_str().map_or(0, str::len);
                prop_assert!(if name == "weather" { arguments["city"].is_string() && city <= 9 } else { arguments == json!({}) }, "{}", text);
            }
        }
    }
}
