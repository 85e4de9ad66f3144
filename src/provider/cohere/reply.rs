//! What Cohere answers, whole and streamed.
//!
//!     message-start  content-start  content-delta …  content-end  message-end
//!                    tool-plan-delta …  tool-call-start  tool-call-delta …  tool-call-end
//!
//! The stream is complete with `message-end`, which also says why and what was used.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::base::Result;
use crate::net::sse::Encoder;
use crate::provider::json::Text;
use crate::provider::reply::{Choice, Chunks, Finish, Target, completion, logprob};
use crate::provider::usage::Counts;
use crate::provider::{Meta, broken};

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    #[serde(borrow)]
    message: Message<'a>,
    usage: Option<Counts>,
    #[serde(borrow)]
    logprobs: Option<Vec<Logprob<'a>>>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<Vec<Content<'a>>>,
    #[serde(borrow)]
    tool_plan: Option<Text<'a>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<Call<'a>>>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    thinking: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct Call<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    function: Option<Function<'a>>,
}

#[derive(Deserialize)]
struct Function<'a> {
    #[serde(borrow)]
    name: Option<Text<'a>>,
    #[serde(borrow)]
    arguments: Option<Text<'a>>,
}

/// A token, or a few that are told together.
#[derive(Deserialize)]
struct Logprob<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(default)]
    logprobs: Vec<f64>,
}

impl Logprob<'_> {
    /// The probability of tokens together is the product of theirs.
    fn entry(&self) -> Value {
        logprob(self.text.as_deref().unwrap_or(""), self.logprobs.iter().sum(), Some(Vec::new()))
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    logprobs: Option<Logprob<'a>>,
    /// An error has this and no type.
    message: Option<Value>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    message: Option<MessageDelta<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    #[serde(borrow)]
    error: Option<Text<'a>>,
    usage: Option<Counts>,
}

/// As in a whole message, but one of each.
#[derive(Deserialize)]
struct MessageDelta<'a> {
    #[serde(borrow, default)]
    content: OneOrList<Content<'a>>,
    #[serde(borrow)]
    tool_plan: Option<Text<'a>>,
    #[serde(borrow, default)]
    tool_calls: OneOrList<Call<'a>>,
}

/// `message-start` has empty lists where the other events have one object.
enum OneOrList<T> {
    One(T),
    List(Vec<T>),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrList<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Walk<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Walk<T> {
            type Value = OneOrList<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object or a list")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(OneOrList::One)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> std::result::Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrList::List)
            }
            fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
                Ok(OneOrList::default())
            }
        }
        deserializer.deserialize_any(Walk(PhantomData))
    }
}

impl<T> Default for OneOrList<T> {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl<T> OneOrList<T> {
    fn first(&self) -> Option<&T> {
        match self {
            Self::One(one) => Some(one),
            Self::List(list) => list.first(),
        }
    }
}

fn finish(reason: Option<&str>) -> Result<Finish> {
    Ok(match reason {
        Some("MAX_TOKENS") => Finish::Length,
        Some("TOOL_CALL") => Finish::ToolCalls,
        Some("ERROR_TOXIC") => Finish::ContentFilter,
        Some(reason @ ("ERROR" | "TIMEOUT" | "ERROR_LIMIT")) => {
            return Err(broken(format!("the model failed with {reason}: try again")));
        }
        _ => Finish::Stop,
    })
}

/// A whole answer.
pub(in crate::provider) fn answer(meta: &Meta, body: &[u8]) -> Result<Bytes> {
    let response: Response =
        serde_json::from_slice(body).map_err(|error| broken(format!("the answer is not one of Cohere's: {error}")))?;
    let mut choice = Choice::default();
    if let Some(plan) = &response.message.tool_plan {
        choice.text(plan);
    }
    for content in response.message.content.iter().flatten() {
        choice.reasoning(content.thinking.as_deref().unwrap_or(""));
        if let Some(text) = &content.text {
            choice.text(text);
        }
    }
    for call in response.message.tool_calls.iter().flatten() {
        let function = call.function.as_ref();
        let name = function.and_then(|function| function.name.as_deref()).unwrap_or("");
        let arguments = function.and_then(|function| function.arguments.as_deref()).unwrap_or("{}");
        choice.call(call.id.as_deref().unwrap_or(""), name, arguments.to_owned(), None);
    }
    if let Some(tokens) = &response.logprobs {
        choice.logprobs(tokens.iter().map(Logprob::entry).collect());
    }
    let finish = finish(response.finish_reason.as_deref())?;
    let counts = response.usage.unwrap_or_default();
    Ok(completion(meta, response.id.as_deref(), None, vec![(choice, finish)], &counts))
}

/// The state of a stream.
#[derive(Default, Debug)]
pub(in crate::provider) struct Stream {
    /// Calls that have begun: their number upstream, where their arguments go, whether there were any.
    calls: Vec<(u32, Target, bool)>,
}

impl Stream {
    pub(in crate::provider) fn event(&mut self, data: &str, chunks: &mut Chunks, out: &mut Encoder) -> Result<()> {
        if data == "[DONE]" {
            return Ok(());
        }
        let event: Event = serde_json::from_str(data)
            .map_err(|error| broken(format!("the stream is not one of Cohere's: {error}")))?;
        let Some(kind) = &event.kind else {
            let message = event.message.as_ref().and_then(Value::as_str);
            return Err(broken(message.unwrap_or("the stream has an event without a type")));
        };
        let message = event.delta.as_ref().and_then(|delta| delta.message.as_ref());
        match &**kind {
            "message-start" => {
                chunks.named(event.id.as_deref(), None);
                chunks.begin(0, out);
            }
            "content-start" | "content-delta" => {
                let Some(content) = message.and_then(|message| message.content.first()) else { return Ok(()) };
                chunks.reasoning(0, content.thinking.as_deref().unwrap_or(""), out);
                let text = content.text.as_deref().unwrap_or("");
                match &event.logprobs {
                    Some(logprob) => chunks.text_with_logprobs(0, text, vec![logprob.entry()], out),
                    None => chunks.text(0, text, out),
                }
            }
            "tool-plan-delta" => {
                let plan = message.and_then(|message| message.tool_plan.as_deref());
                chunks.text(0, plan.unwrap_or(""), out);
            }
            "tool-call-start" | "tool-call-delta" => {
                let Some(call) = message.and_then(|message| message.tool_calls.first()) else { return Ok(()) };
                self.call(event.index, call, &**kind == "tool-call-start", chunks, out);
            }
            "tool-call-end" => {
                if let Some(at) = self.calls.iter().position(|(index, ..)| *index == event.index) {
                    let (_, target, any) = self.calls.swap_remove(at);
                    if !any {
                        chunks.arguments(0, target, "{}", out);
                    }
                }
            }
            "message-end" => {
                let delta = event.delta.as_ref();
                if let Some(error) = delta.and_then(|delta| delta.error.as_deref()) {
                    return Err(broken(error));
                }
                chunks.counts.merge(&delta.and_then(|delta| delta.usage).unwrap_or_default());
                let reason = delta.and_then(|delta| delta.finish_reason.as_deref());
                chunks.finish(0, finish(reason)?, out);
                chunks.done(out);
            }
            // Citations and debugging.
            _ => {}
        }
        Ok(())
    }

    fn call(&mut self, index: u32, call: &Call, begins: bool, chunks: &mut Chunks, out: &mut Encoder) {
        let function = call.function.as_ref();
        if begins {
            let name = function.and_then(|function| function.name.as_deref()).unwrap_or("");
            let target = chunks.call(0, call.id.as_deref().unwrap_or(""), name, None, out);
            self.calls.push((index, target, false));
        }
        let more = function.and_then(|function| function.arguments.as_deref()).unwrap_or("");
        if let Some((_, target, any)) = self.calls.iter_mut().find(|(known, ..)| *known == index) {
            *any |= !more.is_empty();
            chunks.arguments(0, *target, more, out);
        }
    }
}
