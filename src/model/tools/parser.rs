//! The text of an answer, as it comes: what is said to the caller, and what is a call of a tool.
//!
//! ```text
//!            marker, or `{` first                 name known              complete
//!     Text ───────────────────────> Opened/Object ──────────> arguments ──────────> After ──> Opened | Text
//!       ^                                │                     stream out
//!       └──────── no call after all ─────┘  what was held back is text
//! ```
//!
//! What comes out does not depend on how the text was cut into pieces: it is read a character at a time, and nothing is
//! sent that could still turn out to be a part of a marker or of a call. A call is certain once it names a known function
//! and its arguments have begun; from then on they stream. Until then everything can still become text.

use std::sync::Arc;

use super::scan::CallScan;
use crate::task::{ToolDelta, Tools};

/// Bytes held back before a call is certain; longer ones are text. Names come first in practice.
const MAX_HELD: usize = 4 << 10;
/// Space held back in front of what may be a marker.
const MAX_SPACE: usize = 256;
/// Longest that may stand between a marker and the arguments where names have no quotes.
const MAX_HEAD: usize = 200;

/// How a family of models writes calls down.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Syntax {
    /// What opens a call, wherever it stands. An answer that begins with JSON may be a call without it.
    pub(super) open: &'static [&'static str],
    /// What closes one.
    pub(super) close: &'static [&'static str],
    /// `marker name [ARGS] {…}`.
    pub(super) named: bool,
    /// An answer may be a fenced block with calls inside.
    pub(super) fence: bool,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Said to the caller.
    Text(String),
    /// New of the call with this number.
    Tool(u32, ToolDelta),
}

/// Reads one answer.
#[derive(Debug, Clone)]
pub struct CallParser {
    syntax: &'static Syntax,
    /// Markers that are control tokens: never shown, even where no call follows.
    hidden: Vec<&'static str>,
    tools: Arc<Tools>,
    ids: Ids,
    state: State,
    calls: u32,
    complete: u32,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
enum State {
    /// `begun`: something other than space has been said. `held`: its end, which may become a marker.
    Text { begun: bool, held: String },
    /// After what opened a call: an object must follow, or the bracket of a list of them. `raw`: everything since.
    Opened { raw: String, marker: &'static str, listed: bool },
    /// A name without quotes.
    Head { raw: String, name: String },
    /// Inside an object that is no call yet.
    Object { raw: String, scan: CallScan },
    /// Inside the arguments of a call.
    Call { scan: CallScan },
    /// After a call. `raw`: what has been read since it, or since its closing marker.
    After { raw: String },
    /// One call was all that was wanted.
    Over,
}

impl State {
    fn text(begun: bool) -> Self {
        Self::Text { begun, held: String::new() }
    }
}

impl CallParser {
    pub(super) fn new(syntax: &'static Syntax, hidden: Vec<&'static str>, tools: Arc<Tools>, ids: Ids) -> Self {
        Self { syntax, hidden, tools, ids, state: State::text(false), calls: 0, complete: 0, pieces: Vec::new() }
    }

    /// Reads more of the answer and gives what has become certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        for c in text.chars() {
            self.read(c);
        }
        self.flush()
    }

    /// The answer is over: what was held back is text.
    pub fn finish(&mut self) -> Vec<Piece> {
        // What is given back is read again, and may have to be given back once more.
        loop {
            match std::mem::replace(&mut self.state, State::text(true)) {
                State::Text { begun, held } => {
                    self.say(&held);
                    self.state = State::text(begun);
                    return self.flush();
                }
                State::Opened { raw, .. } | State::Head { raw, .. } | State::Object { raw, .. } => {
                    let rest = self.give_back(&raw);
                    rest.chars().for_each(|c| self.read(c));
                }
                state @ (State::Call { .. } | State::After { .. } | State::Over) => {
                    let pieces = self.flush();
                    self.state = state;
                    return pieces;
                }
            }
        }
    }

    /// Whether the answer holds a whole call.
    pub fn has_called(&self) -> bool {
        self.complete > 0
    }

    /// Reads a character, and again what turns out to be no part of a call.
    fn read(&mut self, c: char) {
        let mut again = Vec::new();
        let mut next = Some(c);
        while let Some(c) = next {
            if let Some(rest) = self.step(c) {
                again.extend(rest.chars().rev());
            }
            next = again.pop();
        }
    }

    /// Reads a character. What it gives back has to be read again.
    fn step(&mut self, c: char) -> Option<String> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Text { begun, mut held } => {
                held.push(c);
                self.in_text(begun, held)
            }
            State::Opened { mut raw, marker, listed } => {
                raw.push(c);
                match c {
                    '{' => self.object(raw, CallScan::object(), c),
                    '[' if !listed => {
                        self.state = State::Opened { raw, marker, listed: true };
                        None
                    }
                    // The name of a language stands behind a fence.
                    _ if c.is_whitespace() || marker == FENCE && c.is_ascii_alphabetic() => {
                        self.state = State::Opened { raw, marker, listed };
                        None
                    }
                    _ if self.syntax.named && !marker.is_empty() && is_name(c) => {
                        self.state = State::Head { raw, name: c.into() };
                        None
                    }
                    _ => Some(self.give_back(&raw)),
                }
            }
            State::Head { mut raw, mut name } => {
                raw.push(c);
                if c == '{' {
                    let end = name.find('[').unwrap_or(name.len());
                    return match name[..end].trim() {
                        name if self.tools.has(name) => self.object(raw, CallScan::arguments_of(name), c),
                        _ => Some(self.give_back(&raw)),
                    };
                }
                if name.len() >= MAX_HEAD {
                    return Some(self.give_back(&raw));
                }
                name.push(c);
                self.state = State::Head { raw, name };
                None
            }
            State::Object { mut raw, scan } => {
                raw.push(c);
                self.object(raw, scan, c)
            }
            State::Call { mut scan } => match scan.push(c) {
                Ok(done) => {
                    self.argue(&mut scan);
                    if done {
                        self.complete()
                    } else {
                        self.state = State::Call { scan }
                    }
                    None
                }
                // Too late to take it back: the caller sees arguments that do not parse, and what follows as text.
                Err(_) => {
                    self.state = State::text(true);
                    Some(c.into())
                }
            },
            State::After { mut raw } => {
                raw.push(c);
                self.after(raw, c)
            }
            State::Over => None,
        }
    }

    /// Text ends with `held` now: says what cannot become a marker, or sees one.
    fn in_text(&mut self, mut begun: bool, mut held: String) -> Option<String> {
        loop {
            let space = held.len() - held.trim_start().len();
            let end = &held[space..];
            let fence = !begun && self.syntax.fence && FENCE.starts_with(end);
            if let Some(marker) = self.syntax.open.iter().copied().chain(fence.then_some(FENCE)).find(|&m| m == end) {
                self.state = State::Opened { raw: held, marker, listed: false };
                return None;
            }
            let possible = fence || self.syntax.open.iter().any(|marker| marker.starts_with(end));
            if possible && (!end.is_empty() || held.len() < MAX_SPACE) {
                self.state = State::Text { begun, held };
                return None;
            }
            // An answer that begins with JSON.
            if !begun && end.starts_with(['{', '[']) {
                let listed = end.starts_with('[');
                let rest = held.split_off(space + usize::from(listed));
                self.state = State::Opened { raw: held, marker: "", listed };
                return Some(rest);
            }
            let Some(first) = held.chars().next() else {
                self.state = State::Text { begun, held };
                return None;
            };
            self.say(&held[..first.len_utf8()]);
            begun |= !first.is_whitespace();
            held.drain(..first.len_utf8());
        }
    }

    /// Reads `c` of an object that is no call yet.
    fn object(&mut self, raw: String, mut scan: CallScan, c: char) -> Option<String> {
        let Ok(done) = scan.push(c) else { return Some(self.give_back(&raw)) };
        let known = match scan.name() {
            Some(name) if !self.tools.has(name) => return Some(self.give_back(&raw)),
            Some(name) => (done || scan.has_arguments()).then(|| name.to_owned()),
            None if done => return Some(self.give_back(&raw)),
            None => None,
        };
        let Some(name) = known else {
            if raw.len() > MAX_HELD {
                return Some(self.give_back(&raw));
            }
            self.state = State::Object { raw, scan };
            return None;
        };
        let id = self.ids.next(self.calls);
        self.pieces.push(Piece::Tool(self.calls, ToolDelta::Begin { id, name }));
        self.calls += 1;
        if done && !scan.has_arguments() {
            self.pieces.push(Piece::Tool(self.calls - 1, ToolDelta::Arguments("{}".to_owned())));
        }
        self.argue(&mut scan);
        if done {
            self.complete()
        } else {
            self.state = State::Call { scan }
        }
        None
    }

    /// Sends what was read of the arguments.
    fn argue(&mut self, scan: &mut CallScan) {
        let arguments = scan.take_arguments();
        if arguments.is_empty() {
            return;
        }
        match self.pieces.last_mut() {
            Some(Piece::Tool(_, ToolDelta::Arguments(last))) => last.push_str(&arguments),
            _ => self.pieces.push(Piece::Tool(self.calls - 1, ToolDelta::Arguments(arguments))),
        }
    }

    /// The call at hand is whole.
    fn complete(&mut self) {
        self.complete += 1;
        self.state = if self.tools.parallel { State::After { raw: String::new() } } else { State::Over };
    }

    /// Reads `c`, the end of `raw`, between calls.
    fn after(&mut self, raw: String, c: char) -> Option<String> {
        let end = raw.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | ']' | '}'));
        if let Some(marker) = self.syntax.open.iter().find(|marker| **marker == end) {
            self.state = State::Opened { raw, marker, listed: false };
            return None;
        }
        if end == "{" {
            return self.object(raw, CallScan::object(), c);
        }
        let fence: &[&str] = if self.syntax.fence { &[FENCE] } else { &[] };
        let close = || self.syntax.close.iter().chain(fence);
        if close().any(|marker| *marker == end) {
            self.state = State::After { raw: String::new() };
            return None;
        }
        if self.syntax.open.iter().chain(close()).any(|marker| marker.starts_with(end)) && raw.len() < MAX_HELD {
            self.state = State::After { raw };
            return None;
        }
        self.state = State::text(true);
        Some(end.to_owned())
    }

    /// No call after all: what seemed to open one is text, and the rest, which is returned, has to be read again.
    fn give_back(&mut self, raw: &str) -> String {
        self.state = State::text(true);
        let start = raw.len() - raw.trim_start().len();
        let marker = self.syntax.open.iter().find(|marker| raw[start..].starts_with(**marker));
        let first = raw[start..].chars().next().map_or(0, char::len_utf8);
        let end = start + marker.map_or(first, |marker| marker.len());
        match marker {
            Some(marker) if self.hidden.contains(marker) => self.say(&raw[..start]),
            _ => self.say(&raw[..end]),
        }
        raw[end..].to_owned()
    }

    fn say(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.pieces.last_mut() {
            Some(Piece::Text(last)) => last.push_str(text),
            _ => self.pieces.push(Piece::Text(text.to_owned())),
        }
    }

    fn flush(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.pieces)
    }
}

/// What opens a block of code, with the name of its language behind it.
const FENCE: &str = "```";

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Makes the ids of calls: unguessable enough to be unique, the same for the same request.
#[derive(Debug, Clone)]
pub(super) struct Ids {
    pub(super) seed: u64,
    /// Nine letters and digits and nothing else, as Mistral's templates demand.
    pub(super) short: bool,
}

impl Ids {
    /// The id of a call by its number.
    fn next(&self, call: u32) -> String {
        let hash = blake3::Hasher::new().update(&self.seed.to_le_bytes()).update(&call.to_le_bytes()).finalize();
        if self.short { short_id(hash.as_bytes()) } else { format!("call_{}", &hash.to_hex()[..24]) }
    }
}

/// Nine letters and digits out of a hash.
pub(super) fn short_id(hash: &[u8]) -> String {
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    hash.iter().take(9).map(|&byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Map;

    use super::super::format::{HERMES, JSON, LLAMA, MISTRAL};
    use super::*;
    use crate::task::{Tool, ToolChoice};

    fn parser(syntax: &'static Syntax, parallel: bool) -> CallParser {
        let tool =
            |name: &str| Tool { name: name.into(), description: String::new(), parameters: Map::new(), strict: false };
        let tools = Tools { list: vec![tool("f"), tool("get_weather")], choice: ToolChoice::Auto, parallel };
        let hidden = if *syntax == LLAMA { vec!["<|python_tag|>"] } else { vec![] };
        CallParser::new(syntax, hidden, Arc::new(tools), Ids { seed: 7, short: *syntax == MISTRAL })
    }

    /// What comes out, in order: `text`, `name(arguments)`; an open call has no closing parenthesis.
    fn run<'a>(mut parser: CallParser, pieces: impl IntoIterator<Item = &'a str>) -> String {
        let mut all = Vec::new();
        for piece in pieces {
            all.extend(parser.push(piece));
        }
        all.extend(parser.finish());
        let mut shown: Vec<String> = Vec::new();
        let mut calls: Vec<(String, String)> = Vec::new();
        let mut in_text = false;
        for piece in all {
            match piece {
                Piece::Text(text) => {
                    assert!(!text.is_empty());
                    if in_text {
                        shown.last_mut().unwrap().push_str(&text)
                    } else {
                        shown.push(text)
                    }
                    in_text = true;
                }
                Piece::Tool(call, ToolDelta::Begin { id, name }) => {
                    assert_eq!((call as usize, id.is_empty()), (calls.len(), false));
                    calls.push((name, String::new()));
                    shown.push(format!("\0{call}"));
                    in_text = false;
                }
                Piece::Tool(call, ToolDelta::Arguments(arguments)) => {
                    assert_eq!(call as usize + 1, calls.len(), "only the newest call grows");
                    calls[call as usize].1.push_str(&arguments);
                }
            }
        }
        assert_eq!(parser.has_called(), parser.complete > 0);
        for (at, (name, arguments)) in calls.iter().enumerate() {
            let end = if (at as u32) < parser.complete { ")" } else { "" };
            let place = shown.iter().position(|text| *text == format!("\0{at}")).unwrap();
            shown[place] = format!("{name}({arguments}{end}");
        }
        shown.join(" | ")
    }

    /// The same whatever way the text is cut: whole, every cut in two, and by characters.
    #[track_caller]
    fn check(syntax: &'static Syntax, text: &str, expected: &str) {
        let fresh = || parser(syntax, true);
        assert_eq!(run(fresh(), [text]), expected, "{text}");
        // Long texts are long for one reason each, which a few cuts find.
        for (at, _) in text.char_indices().step_by(1 + text.len() / 300 * 20) {
            assert_eq!(run(fresh(), [&text[..at], &text[at..]]), expected, "cut at {at}: {text}");
        }
        let characters: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(run(fresh(), characters.iter().map(String::as_str)), expected, "by characters: {text}");
    }

    #[test]
    fn hermes_calls_stand_in_tags() {
        let check = |text: &str, expected: &str| check(&HERMES, text, expected);
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"ü}\"}}\n</tool_call>";
        check(call, r#"f({"a": "ü}"})"#);
        check(&format!("Let me see.\n\n{call}\n"), r#"Let me see. | f({"a": "ü}"})"#);
        check(&format!("{call}\n{call}"), r#"f({"a": "ü}"}) | f({"a": "ü}"})"#);
        check(&format!("{call}\nThat was it."), r#"f({"a": "ü}"}) | That was it."#);
        check(&format!("a {call} b {call}"), r#"a | f({"a": "ü}"}) | b | f({"a": "ü}"})"#);
        check(
            "<tool_call>[{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"f\", \"arguments\": {}}]</tool_call>",
            "f({}) | f({})",
        );
        check("<tool_call>{\"name\": \"get_weather\"}</tool_call>", "get_weather({})");
        check(r#"<tool_call>{"name": "f", "arguments": {}}}</tool_call> x"#, "f({}) | x");
        check(r#"{"name": "f", "arguments": {}}"#, "f({})");
    }

    #[test]
    fn llama_calls_are_bare_json_or_follow_a_tag() {
        let check = |text: &str, expected: &str| check(&LLAMA, text, expected);
        let call = r#"{"name": "f", "parameters": {"a": 1}}"#;
        check(call, r#"f({"a": 1})"#);
        check(&format!("\n\n{call}\n"), r#"f({"a": 1})"#);
        check(&format!("<|python_tag|>{call}"), r#"f({"a": 1})"#);
        check(&format!("{call}; {call}"), r#"f({"a": 1}) | f({"a": 1})"#);
        check(&format!("{call}\n{call}"), r#"f({"a": 1}) | f({"a": 1})"#);
        check(&format!("[{call}, {call}]"), r#"f({"a": 1}) | f({"a": 1})"#);
        check(&format!("<|python_tag|>{call}<|python_tag|>{call}"), r#"f({"a": 1}) | f({"a": 1})"#);
        check(r#"{"type": "function", "name": "f", "parameters": {}}"#, "f({})");
        // Code for an interpreter that is not there: the tag is a control token and never shown.
        check("<|python_tag|>print(1)", "print(1)");
        check(&format!("Sure: {call}"), &format!("Sure: {call}"));
    }

    #[test]
    fn mistral_calls_are_a_list_or_names_with_arguments() {
        let check = |text: &str, expected: &str| check(&MISTRAL, text, expected);
        check(r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": []}, "id": "abcdef123"}]"#, r#"f({"a": []})"#);
        check(
            r#"[TOOL_CALLS][{"name":"f","arguments":{}},{"name":"get_weather","arguments":{}}]"#,
            "f({}) | get_weather({})",
        );
        check(r#"[TOOL_CALLS]f[ARGS]{"a": 1}"#, r#"f({"a": 1})"#);
        check(
            r#"[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}"#,
            r#"f({"a": 1}) | get_weather({})"#,
        );
        check(r#"[TOOL_CALLS] f{"a": {"b": 2}}"#, r#"f({"a": {"b": 2}})"#);
        check(r#"I look. [TOOL_CALLS]f[ARGS]{}"#, "I look. | f({})");
        check("[TOOL_CALLS]g[ARGS]{}", "[TOOL_CALLS]g[ARGS]{}");
        check("[TOOL_CALLS] nothing here", "[TOOL_CALLS] nothing here");
        check("[TOOL", "[TOOL");
        let long = format!("[TOOL_CALLS]{}", "x".repeat(500));
        check(&long, &long);
    }

    #[test]
    fn other_models_write_json_in_the_ways_they_know() {
        let check = |text: &str, expected: &str| check(&JSON, text, expected);
        let call = r#"{"name": "f", "arguments": {"a": 1}}"#;
        check(call, r#"f({"a": 1})"#);
        check(&format!("{call}\n{call}"), r#"f({"a": 1}) | f({"a": 1})"#);
        check(&format!("```json\n{call}\n```"), r#"f({"a": 1})"#);
        check(&format!("```\n[{call}]\n```\nDone."), r#"f({"a": 1}) | Done."#);
        check(&format!("<tool_call>{call}</tool_call>"), r#"f({"a": 1})"#);
        check(r#"{"type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}"#, r#"f({"a": 1})"#);
        check("```python\nprint({})\n```", "```python\nprint({})\n```");
    }

    #[test]
    fn what_only_looks_like_a_call_is_text_and_nothing_of_it_is_lost() {
        for syntax in [&HERMES, &LLAMA, &MISTRAL, &JSON] {
            let same = |text: &str| check(syntax, text, text);
            same(r#"{"name": "Alice", "arguments": {"x": 1}}"#);
            same(r#"{"city": "Oslo", "list": [{"name": "f"}]} and so on"#);
            same(r#"[1, 2, 3]"#);
            same("[");
            same("{");
            same("  {\"name\": \"f\"");
            same("{\"name\": \"f\", \"arguments\": 7} ");
            same("a <b> [c] {d} `e` <tool <|py [TOOL");
            same("Nothing but text, with trailing space. \n ");
            same(&" ".repeat(600));
            same(&format!("{}x", "\n".repeat(600)));
            let long = format!(r#"{{"x": "{}", "name": "f", "arguments": {{}}}}"#, "y".repeat(5000));
            same(&long);
        }
        check(&HERMES, "<tool_call>\nno <tool_call>{\"name\": \"f\"}</tool_call>", "<tool_call>\nno | f({})");
        check(&HERMES, "<tool_call>{\"name\": \"<tool_call>{\"name\": \"f\"}", "<tool_call>{\"name\": \" | f({})");
    }

    #[test]
    fn a_call_that_breaks_off_or_breaks_down_keeps_what_was_sent() {
        check(&LLAMA, r#"{"name": "f", "parameters": {"a": "b"#, r#"f({"a": "b"#);
        check(&LLAMA, r#"{"name": "f", "parameters": {"a": 1, }} x"#, r#"f({"a": 1,  | }} x"#);
        check(&LLAMA, r#"{"name": "f", "parameters": {}}; {"name": "f", "par"#, r#"f({}) | ; {"name": "f", "par"#);
    }

    #[test]
    fn where_one_call_is_wanted_nothing_follows_it() {
        let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
        assert_eq!(run(parser(&HERMES, false), [format!("a {call} b {call} c").as_str()]), "a | f({})");
    }

    #[test]
    fn ids_differ_between_calls_and_are_short_where_they_must_be() {
        let ids = |short| {
            let ids = Ids { seed: 1, short };
            [ids.next(0), ids.next(1), Ids { seed: 2, short }.next(0)]
        };
        for (short, length) in [(true, 9), (false, 29)] {
            let [a, b, c] = ids(short);
            assert!(a.len() == length && a != b && a != c && ids(short)[0] == a, "{a} {b} {c}");
            assert!(a.trim_start_matches("call_").chars().all(|c| c.is_ascii_alphanumeric()));
        }
    }

    /// Pieces of which calls and what looks like them are made.
    fn any_text() -> impl Strategy<Value = String> {
        let part = prop::sample::select(vec![
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "f",
            "get_weather",
            "g",
            "{",
            "}",
            "[",
            "]",
            "{\"name\": \"f\", \"arguments\": {",
            "{\"name\": \"g\", ",
            "\"arguments\": {\"a\": [1]}",
            "\"parameters\": ",
            "}}",
            "\"",
            ",",
            ": ",
            "; ",
            "\n",
            " ",
            "text",
            "é",
            "```json\n",
            "```",
            "{\"name\": \"f\", \"parameters\": {\"x\": \"y\"}}",
            "\\",
            "null",
        ]);
        prop::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn what_comes_out_does_not_depend_on_where_the_text_is_cut(
            text in any_text(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
            syntax in prop::sample::select(vec![&HERMES, &LLAMA, &MISTRAL, &JSON]),
            parallel in any::<bool>(),
        ) {
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            at.retain(|&at| text.is_char_boundary(at));
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(run(parser(syntax, parallel), pieces), run(parser(syntax, parallel), [text.as_str()]));
        }

        #[test]
        fn every_whole_call_has_arguments_that_parse(text in any_text()) {
            let mut parser = parser(&HERMES, true);
            let mut pieces = parser.push(&text);
            pieces.extend(parser.finish());
            // A call that broke down in the middle counts among all, not among the whole ones.
            for call in 0..if parser.complete == parser.calls { parser.calls } else { 0 } {
                let arguments: String = pieces.iter().filter_map(|piece| match piece {
                    Piece::Tool(of, ToolDelta::Arguments(text)) if *of == call => Some(text.as_str()),
                    _ => None,
                }).collect();
                prop_assert!(serde_json::from_str::<Map<String, serde_json::Value>>(&arguments).is_ok(), "{}", arguments);
            }
        }
    }
}
