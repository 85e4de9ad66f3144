//! Looking at a request, and changing a member of it, without rewriting it: key order, the spelling of numbers and fields
//! that nobody here knows reach the provider as the client wrote them.

use std::fmt;

use bytes::Bytes;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::base::{Error, Result};
use crate::provider::json::{Maybe, Members, Text, skip};

/// What limits, routes and logs want to know of a request, in whichever dialect it is.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The model asked for.
    pub model: Option<String>,
    /// The answer shall be a stream.
    pub stream: bool,
    /// The stream shall end with what was used (OpenAI).
    pub include_usage: bool,
    /// Most tokens to produce per choice: the largest limit named, whatever its name.
    pub max_tokens: Option<u64>,
    /// How many choices; 1 unless said.
    pub choices: u64,
    /// Whom the caller acts for.
    pub user: Option<String>,
}

/// Reads the top level of a JSON request. `None` if it is not a JSON object. Of a member named twice the last one counts, as it
/// does for nearly everybody behind us.
pub fn facts(body: &[u8]) -> Option<Facts> {
    serde_json::from_slice(body).ok()
}

/// Replaces the value of the top-level `model`, or puts one in front where there is none.
///
/// # Errors
/// `BadInput` if the body is no JSON object, or names a model twice and so might be read in two ways.
pub fn splice_model(body: &Bytes, model: &str) -> Result<Bytes> {
    splice(body, &[("model", quoted(model))])
}

/// Text as a JSON string.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Sets top-level members to values that are JSON already.
pub(super) fn splice(body: &[u8], sets: &[(&str, String)]) -> Result<Bytes> {
    let members: Members = serde_json::from_slice(body)
        .map_err(|error| Error::bad_input(format!("the body is not a JSON object: {error}")))?;
    // Value spans, in the order in which they stand.
    let mut edits = Vec::with_capacity(sets.len());
    let mut missing = Vec::new();
    for (at, (name, _)) in sets.iter().enumerate() {
        let mut found = members.0.iter().filter(|(key, _)| &**key == *name);
        match (found.next(), found.next()) {
            (None, _) => missing.push(at),
            (Some((_, raw)), None) => {
                // Raw values are slices of the body they were read from.
                let start = raw.get().as_ptr() as usize - body.as_ptr() as usize;
                edits.push((start, start + raw.get().len(), at));
            }
            (Some(_), Some(_)) => return Err(Error::bad_field(*name, format!("`{name}` is given twice: send one"))),
        }
    }
    edits.sort_unstable();
    let open = body.iter().position(|byte| *byte == b'{').map_or(0, |at| at + 1);
    let longer: usize = sets.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    let mut out = Vec::with_capacity(body.len() + longer);
    out.extend_from_slice(&body[..open]);
    for (nth, at) in missing.iter().enumerate() {
        let (name, value) = &sets[*at];
        out.extend_from_slice(quoted(name).as_bytes());
        out.push(b':');
        out.extend_from_slice(value.as_bytes());
        if nth + 1 < missing.len() || !members.0.is_empty() {
            out.push(b',');
        }
    }
    let mut from = open;
    for (start, end, at) in edits {
        out.extend_from_slice(&body[from..start]);
        out.extend_from_slice(sets[at].1.as_bytes());
        from = end;
    }
    out.extend_from_slice(&body[from..]);
    Ok(out.into())
}

impl<'de> Deserialize<'de> for Facts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FactsWalk)
    }
}

struct FactsWalk;

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    user_id: Option<Text<'a>>,
}

/// What Google and Bedrock keep their limits in.
#[derive(Deserialize)]
struct Bounds {
    #[serde(rename = "maxOutputTokens", alias = "maxTokens")]
    max: Option<u64>,
}

impl<'de> Visitor<'de> for FactsWalk {
    type Value = Facts;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Facts, A::Error> {
        let mut facts = Facts { choices: 1, ..Facts::default() };
        let owned = |text: Maybe<Text>| text.0.map(|text| text.to_string());
        while let Some(key) = map.next_key::<Text>()? {
            match &*key {
                "model" => facts.model = owned(map.next_value()?),
                "stream" => facts.stream = map.next_value::<Maybe<bool>>()?.0.unwrap_or(false),
                "stream_options" => {
                    let options = map.next_value::<Maybe<StreamOptions>>()?.0;
                    facts.include_usage = options.is_some_and(|options| options.include_usage);
                }
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" | "max_tokens_to_sample" => {
                    facts.max_tokens = facts.max_tokens.max(map.next_value::<Maybe<u64>>()?.0);
                }
                "generationConfig" | "generation_config" | "inferenceConfig" => {
                    let bounds = map.next_value::<Maybe<Bounds>>()?.0;
                    facts.max_tokens = facts.max_tokens.max(bounds.and_then(|bounds| bounds.max));
                }
                "n" => facts.choices = map.next_value::<Maybe<u64>>()?.0.unwrap_or(1),
                "user" => facts.user = owned(map.next_value()?).or(facts.user),
                "safety_identifier" => facts.user = facts.user.or(owned(map.next_value()?)),
                "metadata" => {
                    let metadata = map.next_value::<Maybe<Metadata>>()?.0;
                    let user = metadata.and_then(|metadata| metadata.user_id);
                    facts.user = facts.user.or(user.map(|user| user.to_string()));
                }
                _ => skip(&mut map)?,
            }
        }
        Ok(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_model_changes() {
        for (before, after) in [
            (
                r#"{ "temperature": 1.0e+0, "model" : "openai/gpt","x":{"model":"keep"},"n":1.50 }"#,
                r#"{ "temperature": 1.0e+0, "model" : "gpt-4\"1","x":{"model":"keep"},"n":1.50 }"#,
            ),
            (r#"{"model":null,"u":"\u00e9"}"#, r#"{"model":"gpt-4\"1","u":"\u00e9"}"#),
            (r#" {"messages":[]}"#, r#" {"model":"gpt-4\"1","messages":[]}"#),
            ("{}", r#"{"model":"gpt-4\"1"}"#),
            (r#"{"mod\u0065l":"a"}"#, r#"{"mod\u0065l":"gpt-4\"1"}"#),
        ] {
            let spliced = splice_model(&Bytes::from(before), "gpt-4\"1").unwrap();
            assert_eq!(std::str::from_utf8(&spliced).unwrap(), after);
        }
    }

    #[test]
    fn several_members_change_at_once() {
        let sets = [("b", "2".to_owned()), ("c", "3".to_owned()), ("a", "1".to_owned()), ("d", "4".to_owned())];
        let spliced = splice(br#"{"a":[0,{}], "b":"x", "z":0}"#, &sets).unwrap();
        assert_eq!(&spliced[..], br#"{"c":3,"d":4,"a":1, "b":2, "z":0}"#);
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for body in ["[]", "", "{\"model\":\"a\"", "{\"model\":\"a\",\"model\":\"b\"}", "{} x", "\u{feff}{}"] {
            assert!(splice_model(&Bytes::from(body), "m").is_err(), "{body}");
        }
    }

    #[test]
    fn facts_are_found_in_every_dialect() {
        let of = |model: &str| Facts { model: Some(model.to_owned()), choices: 1, ..Facts::default() };
        for (body, expected) in [
            (
                r#"{"model":"m","messages":[{"model":"no"}],"stream":true,"stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":9,"n":2,"user":"u"}"#,
                Facts {
                    stream: true,
                    include_usage: true,
                    max_tokens: Some(9),
                    choices: 2,
                    user: Some("u".to_owned()),
                    ..of("m")
                },
            ),
            (
                r#"{"metadata":{"user_id":"who"},"model":"c","max_tokens":1024}"#,
                Facts { max_tokens: Some(1024), user: Some("who".to_owned()), ..of("c") },
            ),
            (
                r#"{"contents":[],"generationConfig":{"maxOutputTokens":7}}"#,
                Facts { model: None, max_tokens: Some(7), ..of("") },
            ),
            (r#"{"inferenceConfig":{"maxTokens":8}}"#, Facts { model: None, max_tokens: Some(8), ..of("") }),
            (r#"{"model":"a","model":"b","stream":"yes","max_tokens":-1,"n":null}"#, of("b")),
        ] {
            assert_eq!(facts(body.as_bytes()), Some(expected), "{body}");
        }
        assert_eq!(facts(b"[1]"), None);
        assert_eq!(facts(b"{\"model\":"), None);
    }
}
