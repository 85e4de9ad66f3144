//! What providers say when they fail, in OpenAI's shape.
//!
//!     Anthropic  {"type":"error","error":{"type","message"}}        Google   {"error":{"code","message","status"}}, or a list of it
//!     Bedrock    {"message","__type"?}                              Cohere   {"id"?,"message"}
//!     others     {"error":{…}} | {"error":"…"} | {"message","type","code"} | {"detail":…} | a page of HTML
//!
//! Message, type and code are the provider's own where it has them; the status is always its own.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::base::{Error, Kind};
use crate::provider::Dialect;

/// More of a message that is no JSON is not passed on.
const LONGEST: usize = 1000;

/// An error answer of a provider as OpenAI would have put it. What is in OpenAI's shape already is left as it is.
pub fn failure(dialect: Dialect, status: u16, body: &[u8]) -> (u16, Bytes) {
    let document: Option<Value> = serde_json::from_slice(body).ok();
    let is_openai = document.as_ref().is_some_and(|document| {
        let error = &document["error"];
        error["message"].is_string() && error.get("status").is_none() && document["type"] != "error"
    });
    if is_openai && matches!(dialect, Dialect::OpenAi | Dialect::Opaque) {
        return (status, Bytes::copy_from_slice(body));
    }
    let said = Said::read(document.as_ref(), body);
    let message = said.message.unwrap_or_else(|| format!("the provider answered {status} without saying why"));
    let error = json!({
        "message": message,
        "type": said.kind.unwrap_or_else(|| kind_of(status).to_owned()),
        "param": said.param,
        "code": said.code,
    });
    (status, json!({ "error": error }).to_string().into())
}

/// OpenAI's type of an error with this status.
fn kind_of(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

/// What could be made out.
#[derive(Default)]
struct Said {
    message: Option<String>,
    kind: Option<String>,
    param: Value,
    code: Value,
}

impl Said {
    fn read(document: Option<&Value>, body: &[u8]) -> Self {
        let Some(document) = document else {
            let text = String::from_utf8_lossy(body);
            let text = text.trim();
            // A page for people's eyes helps nobody here.
            let is_page = text.starts_with('<');
            let message = (!text.is_empty() && !is_page).then(|| text.chars().take(LONGEST).collect());
            return Self { message, ..Self::default() };
        };
        let document = document.get(0).unwrap_or(document);
        let error = match &document["error"] {
            Value::Object(_) => &document["error"],
            _ => document,
        };
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let message = text(&error["message"])
            .or(text(&error["Message"]))
            .or(text(&document["error"]))
            .or(text(&document["detail"]))
            // Validation errors come as lists.
            .or(document.get("detail").filter(|detail| !detail.is_null()).map(Value::to_string));
        // `com.amazon.coral.service#ThrottlingException`, with or without what is in front.
        let aws = error["__type"].as_str().map(|name| name.rsplit('#').next().unwrap_or(name).to_owned());
        let kind = text(&error["type"]).filter(|kind| kind != "error").or_else(|| aws.clone());
        // Google's word says more than its number, which is the status again.
        let code = match (text(&error["status"]).or(aws), error.get("code")) {
            (Some(word), _) => word.into(),
            (None, Some(code)) => code.clone(),
            (None, None) => Value::Null,
        };
        let param = error.get("param").cloned().unwrap_or_default();
        Self { message, kind, param, code }
    }
}

/// An error that came inside a stream which had begun well.
pub(super) fn inside(error: Option<&Value>) -> Error {
    let wrapped = json!({ "error": error });
    let said = Said::read(Some(&wrapped), b"");
    let word = said.kind.as_deref().or(said.code.as_str()).unwrap_or("").to_owned();
    let number = error.and_then(|error| error["code"].as_u64());
    let message = said.message.unwrap_or_else(|| "the provider broke off without saying why".to_owned());
    Error::new(kind(&word, number), message)
}

/// The kind of an error that a provider calls `word`, or whose status inside the stream is `number`.
pub(super) fn kind(word: &str, number: Option<u64>) -> Kind {
    let word = word.to_ascii_lowercase();
    let says = |part: &str| word.contains(part);
    match number {
        _ if says("overloaded") || says("unavailable") => Kind::Busy,
        _ if says("rate_limit") || says("throttl") || says("resource_exhausted") || says("quota") => Kind::RateLimited,
        _ if says("timeout") || says("deadline") => Kind::Timeout,
        _ if says("context_length") => Kind::ContextLength,
        _ if says("invalid") || says("validation") => Kind::BadInput,
        Some(429) => Kind::RateLimited,
        Some(503 | 529) => Kind::Busy,
        Some(408 | 504) => Kind::Timeout,
        Some(400 | 413 | 422) => Kind::BadInput,
        _ => Kind::ModelUnavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(dialect: Dialect, status: u16, body: &str, message: &str, kind: &str, code: Value) {
        let (same, answer) = failure(dialect, status, body.as_bytes());
        assert_eq!(same, status);
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let error = &answer["error"];
        assert_eq!((error["message"].as_str(), error["type"].as_str()), (Some(message), Some(kind)), "{body}");
        assert_eq!(error["code"], code, "{body}");
        assert!(error.get("param").is_some(), "{body}");
    }

    #[test]
    fn every_providers_words_are_kept() {
        check(
            Dialect::Anthropic,
            529,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"req_1"}"#,
            "Overloaded",
            "overloaded_error",
            Value::Null,
        );
        let google =
            r#"{"error":{"code":400,"message":"API key not valid.","status":"INVALID_ARGUMENT","details":[]}}"#;
        check(Dialect::Google, 400, google, "API key not valid.", "invalid_request_error", "INVALID_ARGUMENT".into());
        let list = format!("[{google}]");
        check(Dialect::Google, 429, &list, "API key not valid.", "rate_limit_error", "INVALID_ARGUMENT".into());
        check(
            Dialect::Bedrock,
            429,
            r#"{"__type":"com.amazon.coral#ThrottlingException","message":"Too many tokens"}"#,
            "Too many tokens",
            "ThrottlingException",
            "ThrottlingException".into(),
        );
        check(Dialect::Bedrock, 403, r#"{"Message":"no"}"#, "no", "permission_error", Value::Null);
        check(
            Dialect::Cohere,
            404,
            r#"{"id":"1","message":"model 'x' not found"}"#,
            "model 'x' not found",
            "not_found_error",
            Value::Null,
        );
        let mistral =
            r#"{"object":"error","message":"Bad","type":"invalid_request_message_order","param":null,"code":3230}"#;
        check(Dialect::OpenAi, 400, mistral, "Bad", "invalid_request_message_order", 3230.into());
        check(
            Dialect::OpenAi,
            400,
            r#"{"error":"no such model"}"#,
            "no such model",
            "invalid_request_error",
            Value::Null,
        );
        check(
            Dialect::OpenAi,
            422,
            r#"{"detail":[{"msg":"x"}]}"#,
            r#"[{"msg":"x"}]"#,
            "invalid_request_error",
            Value::Null,
        );
        check(Dialect::OpenAi, 502, "upstream gone\n", "upstream gone", "server_error", Value::Null);
        let nothing = "the provider answered 503 without saying why";
        check(Dialect::Cohere, 503, "<html>oops</html>", nothing, "server_error", Value::Null);
        check(Dialect::Cohere, 503, "", nothing, "server_error", Value::Null);
    }

    #[test]
    fn openais_own_shape_is_not_touched() {
        let body = r#"{"error": {"message": "x", "type": "y", "param": "z", "code": "w", "more": 1.50}}"#;
        let (status, same) = failure(Dialect::OpenAi, 400, body.as_bytes());
        assert_eq!((status, &same[..]), (400, body.as_bytes()));
    }

    #[test]
    fn errors_inside_streams_get_a_kind_to_act_on() {
        for (error, kind, message) in [
            (json!({"type": "overloaded_error", "message": "Overloaded"}), Kind::Busy, "Overloaded"),
            (json!({"type": "rate_limit_error", "message": "slow"}), Kind::RateLimited, "slow"),
            (json!({"code": 503, "message": "busy", "status": "UNAVAILABLE"}), Kind::Busy, "busy"),
            (json!({"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}), Kind::RateLimited, "quota"),
            (json!({"message": "bad", "type": "invalid_request_error"}), Kind::BadInput, "bad"),
            (json!({"message": "x", "code": 500}), Kind::ModelUnavailable, "x"),
            (json!("plain"), Kind::ModelUnavailable, "plain"),
            (Value::Null, Kind::ModelUnavailable, "the provider broke off without saying why"),
        ] {
            let found = inside(Some(&error));
            assert_eq!((found.kind(), found.message()), (kind, message), "{error}");
        }
    }
}
