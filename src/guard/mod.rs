//! What may go into a gateway and what may come out: rules (regular expressions) over text, JSON schemas over documents.
//!
//!     request  --text a person wrote--> rules --.
//!              --the whole document---> schema --+--> Verdict { flags, blocked }
//!     answer   --text a model wrote---> rules --'
//!              --its text, if JSON----> schema
//!     stream   --deltas--> window --> rules      bytes out as they came, or cut before the match (stream.rs)
//!
//! Everything is compiled once, when a gateway is made. A blocking rule fails closed: text that cannot be taken apart is searched
//! as it stands, a stream that cannot be looked at is cut. Compressed bodies must be unpacked by whoever asks. Pure.
//!
//! What rules see:
//! - Requests: every string below `messages`, `prompt`, `input`, `system`, `instructions`, `contents` and the like (`text.rs` has
//!   the list), but for names of the protocol (`role`, `type`, ids) and pictures or sound in base64. A document with none of these fields
//!   is unknown, and all its strings are searched. Strings are decoded first: `\u0041` is an `A`. Fields of a form and text parts of a multipart body too.
//! - Answers: the same below `choices`, `content`, `candidates`, `output`, `result`, `response` and the like, reasoning and the arguments
//!   of tool calls included.
//!
//! What schemas see:
//! - Requests: the whole document. A body that is not JSON breaks a schema; an empty body (a GET) is not looked at.
//! - Answers: the text of each choice (OpenAI's chat, completions and responses, Anthropic's, Google's, Cohere's and Bedrock's messages,
//!   and `response` of the native form) if it is structured output: it begins with `{`, or is a JSON array. `response` that is an object
//!   already is taken as it is. Prose, tool calls, lists of vectors and errors are not validated. An answer of no known form is validated whole.

mod delta;
mod frame;
mod schema;
mod stream;
mod text;

use std::fmt;
use std::sync::Arc;

use regex::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};
use serde_json::Value;

use crate::base::{Error, Result};
use schema::Schema;

pub use stream::StreamGuard;

/// Bytes of text that a stream holds back at most, where nobody says otherwise.
pub const HOLD: usize = 256;

/// Bytes that it holds back at most, whoever says so: all of it is searched again with each event.
const MAX_HOLD: usize = 4096;
/// Rules of one gateway at most.
const MAX_RULES: usize = 128;
/// Bytes of one pattern at most.
const MAX_PATTERN: usize = 4096;
/// Bytes of a compiled pattern at most.
const MAX_COMPILED: usize = 1 << 20;
/// The name under which broken schemas are reported.
const SCHEMA_RULE: &str = "schema";

/// A pattern to look for.
#[derive(Clone, Debug)]
pub struct Rule {
    /// How findings call it.
    pub name: Box<str>,
    /// A regular expression in the syntax of the `regex` crate: no look-around, no back references, linear time. In streams a match
    /// is seen if it lies within the text held back (`HOLD`); a pattern without an upper bound (`BEGIN.*END`) is seen as far as that.
    pub pattern: Box<str>,
    /// Which direction it looks at.
    pub on: On,
    /// What a match leads to.
    pub action: Action,
}

/// The direction a rule looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum On {
    /// What people send.
    Request,
    /// What models answer.
    Response,
    /// Both.
    Both,
}

/// What a match leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// The call is refused or cut off.
    Block,
    /// The call goes on and the finding is noted.
    Flag,
}

/// JSON Schemas, by default of draft 2020-12, or of what `$schema` names. `$ref` may point into the same document only.
#[derive(Clone, Debug, Default)]
pub struct Schemas {
    /// For bodies of requests.
    pub request: Option<Value>,
    /// For structured answers.
    pub response: Option<Value>,
}

/// Where something was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// In the request.
    Request,
    /// In the answer.
    Response,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "REQUEST",
            Self::Response => "RESPONSE",
        })
    }
}

/// A rule that matched or a schema that was broken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The rule's name; `schema` for schemas.
    pub rule: Arc<str>,
    /// Where.
    pub check: Check,
    /// The place, such as `messages[1].content`. Never the text itself: findings go to logs and headers.
    pub what: String,
}

/// What a look at a body found. Each rule at most once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Noted only.
    pub flags: Vec<Finding>,
    /// The first reason to refuse the call; nothing was looked for behind it.
    pub blocked: Option<Finding>,
}

/// The compiled rules and schemas of a gateway. Cheap to clone.
#[derive(Clone)]
pub struct Guard(Arc<Compiled>);

struct Compiled {
    request: Side,
    response: Side,
}

/// One direction.
struct Side {
    check: Check,
    /// All rules at once: answers in one pass whether any matches.
    set: RegexSet,
    rules: Vec<Pattern>,
    schema: Option<Schema>,
}

struct Pattern {
    name: Arc<str>,
    action: Action,
    regex: Regex,
    /// Bytes of the longest text it can match; none if there is no such bound.
    span: Option<usize>,
    /// Whether it looks at what stands before or behind a match (`^`, `$`, `\b`).
    looks: bool,
}

impl Guard {
    /// Compiles rules and schemas.
    ///
    /// # Errors
    /// [`crate::base::Kind::BadInput`], naming the rule and what is wrong with it: a pattern that does not compile, is too large or matches the empty
    /// text; a name used twice; a schema that is none, refers to another document, or refers to itself without end.
    pub fn new(rules: &[Rule], schemas: Schemas) -> Result<Self> {
        if rules.len() > MAX_RULES {
            return Err(Error::bad_input(format!(
                "There are {} rules: a gateway has {MAX_RULES} at most.",
                rules.len()
            )));
        }
        for (at, rule) in rules.iter().enumerate() {
            if rule.name.is_empty() || rules[..at].iter().any(|other| other.name == rule.name) {
                return Err(Error::bad_input(format!("Rule {at} needs a name of its own, not {:?}.", rule.name)));
            }
        }
        let request = Side::new(Check::Request, rules, schemas.request)?;
        let response = Side::new(Check::Response, rules, schemas.response)?;
        Ok(Self(Arc::new(Compiled { request, response })))
    }

    /// Whether requests pass unseen, so that a body need not be read for the guard's sake.
    pub fn ignores_requests(&self) -> bool {
        self.0.request.is_idle()
    }

    /// Whether answers pass unseen.
    pub fn ignores_responses(&self) -> bool {
        self.0.response.is_idle()
    }

    /// Looks at the body of a request.
    pub fn request(&self, body: &[u8], content_type: &str) -> Verdict {
        let side = &self.0.request;
        let mut verdict = Verdict::default();
        if side.is_idle() || body.is_empty() {
            return verdict;
        }
        if !side.rules.is_empty() {
            text::request(body, content_type, &mut |place, text| side.scan(place, text, &mut verdict));
        }
        if let (Some(schema), None) = (&side.schema, &verdict.blocked) {
            verdict.blocked = schema.document(body).err().map(|what| side.broken(what));
        }
        verdict
    }

    /// Looks at a whole answer, of a provider or of a cache, but not at a provider's errors: ask for status 2xx only.
    pub fn response(&self, body: &[u8], content_type: &str) -> Verdict {
        let side = &self.0.response;
        let mut verdict = Verdict::default();
        if side.is_idle() || body.is_empty() {
            return verdict;
        }
        if frame::is_stream(content_type) {
            return self.replayed(body, content_type);
        }
        if !side.rules.is_empty() {
            text::response(body, content_type, &mut |place, text| side.scan(place, text, &mut verdict));
        }
        if let (Some(schema), None) = (&side.schema, &verdict.blocked)
            && !text::is_media(content_type)
        {
            verdict.blocked = schema.answer(body).err().map(|what| side.broken(what));
        }
        verdict
    }

    /// A guard for one answer that streams, which holds back at most `hold` bytes of text (4096 at most): see [`StreamGuard`].
    pub fn stream(&self, content_type: &str, hold: usize) -> StreamGuard {
        StreamGuard::new(self, content_type, hold.min(MAX_HOLD))
    }

    /// A stream that is all there; text is looked at over as long a reach as may be.
    fn replayed(&self, body: &[u8], content_type: &str) -> Verdict {
        let mut stream = self.stream(content_type, MAX_HOLD);
        let mut out = Vec::new();
        let outcome = stream.feed(bytes::Bytes::copy_from_slice(body), &mut out).and_then(|()| stream.finish(&mut out));
        Verdict { flags: stream.flags().to_vec(), blocked: outcome.err() }
    }
}

impl Side {
    fn new(check: Check, rules: &[Rule], schema: Option<Value>) -> Result<Self> {
        let unwanted = match check {
            Check::Request => On::Response,
            Check::Response => On::Request,
        };
        let rules: Vec<Pattern> =
            rules.iter().filter(|rule| rule.on != unwanted).map(Pattern::new).collect::<Result<_>>()?;
        let set = RegexSetBuilder::new(rules.iter().map(|rule| rule.regex.as_str()))
            .size_limit(MAX_COMPILED * 8)
            .build()
            .map_err(|error| Error::bad_input(format!("The rules are too large together: {error}")))?;
        let schema = schema.map(|schema| Schema::new(&schema)).transpose();
        let schema = schema.map_err(|error| error.context(format_args!("The schema for {check}")))?;
        Ok(Self { check, set, rules, schema })
    }

    fn is_idle(&self) -> bool {
        self.rules.is_empty() && self.schema.is_none()
    }

    /// Searches one text for all rules.
    fn scan(&self, place: &dyn fmt::Display, text: &str, verdict: &mut Verdict) {
        if verdict.blocked.is_some() || !self.set.is_match(text) {
            return;
        }
        for index in &self.set.matches(text) {
            let rule = &self.rules[index];
            match rule.action {
                Action::Block => {
                    verdict.blocked = Some(self.finding(rule, place.to_string()));
                    return;
                }
                Action::Flag if verdict.flags.iter().any(|flag| flag.rule == rule.name) => {}
                Action::Flag => verdict.flags.push(self.finding(rule, place.to_string())),
            }
        }
    }

    fn finding(&self, rule: &Pattern, what: String) -> Finding {
        Finding { rule: rule.name.clone(), check: self.check, what }
    }

    /// Whether nothing that is found here ends a call.
    fn fails_open(&self) -> bool {
        self.schema.is_none() && self.rules.iter().all(|rule| rule.action == Action::Flag)
    }

    /// What cannot be looked at is refused, unless nothing depends on it.
    fn cannot(&self, what: &str) -> Result<(), Finding> {
        if self.fails_open() { Ok(()) } else { Err(self.broken(what.to_owned())) }
    }

    /// A schema that was broken, or a stream that could not be looked at.
    fn broken(&self, what: String) -> Finding {
        Finding { rule: Arc::from(SCHEMA_RULE), check: self.check, what }
    }
}

impl Pattern {
    fn new(rule: &Rule) -> Result<Self> {
        let wrong = |why: &str| Error::bad_field(&*rule.name, format!("Rule {:?}: {why}", rule.name));
        if rule.pattern.len() > MAX_PATTERN {
            return Err(wrong(&format!("its pattern is longer than {MAX_PATTERN} bytes.")));
        }
        let regex = RegexBuilder::new(&rule.pattern)
            .size_limit(MAX_COMPILED)
            .build()
            .map_err(|error| wrong(&format!("its pattern does not compile: {error}")))?;
        // The same defaults as the builder's, so the same language.
        let hir =
            regex_syntax::parse(&rule.pattern).map_err(|error| wrong(&format!("its pattern is wrong: {error}")))?;
        let shape = hir.properties();
        match shape.minimum_len() {
            None => return Err(wrong("its pattern can never match.")),
            Some(0) => return Err(wrong("its pattern matches the empty text, and so every text.")),
            Some(_) => {}
        }
        Ok(Self {
            name: Arc::from(&*rule.name),
            action: rule.action,
            regex,
            span: shape.maximum_len(),
            looks: !shape.look_set().is_empty(),
        })
    }
}

#[cfg(test)]
mod tests;
