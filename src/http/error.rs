//! Errors on the wire: what each kind means as a status and code, in the shape of each surface.
//!
//!     OpenAI         {"error":{"message","type","param","code"}}
//!     Cloudflare     {"result":{},"success":false,"errors":[{"code","message"}],"messages":[]}   (+ OpenAI's `error` on /ai/v1)
//!     AI binding     {"name","internalCode","httpCode","message","description","requestId"}
//!     AI Gateway     {"success":false,"result":[],"messages":[],"error":[{"code","message"}],"name","httpCode","internalCode","message","description"}
//!     its management {"success":false,"errors":[{"code","message"}],"result":null,"messages":[]}
//!     Messages       {"type":"error","error":{"type","message"},"request_id"}

use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::{Value, json};

use crate::base::{Error, Kind, Limit, RequestId};
use crate::gateway::limits::WORTH_WAITING;
use crate::http::route::Surface;

/// What a kind is called on the wire.
struct Wire {
    /// Cloudflare's number.
    code: u32,
    /// Status on `/v1`.
    openai_status: u16,
    /// OpenAI's `type`.
    openai_type: &'static str,
    /// OpenAI's `code`.
    openai_code: Option<&'static str>,
}

const fn wire(kind: Kind) -> Wire {
    const INVALID: &str = "invalid_request_error";
    const SERVER: &str = "server_error";
    const fn w(code: u32, openai_status: u16, openai_type: &'static str, openai_code: &'static str) -> Wire {
        Wire { code, openai_status, openai_type, openai_code: Some(openai_code) }
    }
    match kind {
        Kind::BadInput => Wire { code: 5006, openai_status: 400, openai_type: INVALID, openai_code: None },
        Kind::Incomplete => w(3039, 400, INVALID, "finetune_incomplete"),
        Kind::TooLarge => w(3006, 413, INVALID, "request_too_large"),
        Kind::ContextLength => w(5021, 400, INVALID, "context_length_exceeded"),
        Kind::NoSuchModel => w(5007, 404, INVALID, "model_not_found"),
        Kind::NotFound => w(7000, 404, INVALID, "not_found"),
        Kind::MethodNotAllowed => w(7001, 405, INVALID, "method_not_allowed"),
        Kind::Unsupported => w(5006, 400, INVALID, "unsupported"),
        Kind::Unauthorized => w(10000, 401, "authentication_error", "invalid_api_key"),
        Kind::Forbidden => w(10000, 403, "permission_error", "forbidden"),
        Kind::RateLimited => w(3040, 429, "rate_limit_error", "rate_limit_exceeded"),
        Kind::OutOfNeurons => w(4006, 429, "insufficient_quota", "insufficient_quota"),
        Kind::OverBudget => w(2041, 429, "insufficient_quota", "insufficient_quota"),
        Kind::LedgerDown => w(3040, 503, SERVER, "ledger_unavailable"),
        Kind::Busy => w(3040, 503, SERVER, "overloaded"),
        Kind::ModelUnavailable => w(3040, 503, SERVER, "model_unavailable"),
        Kind::Timeout => w(3007, 408, "timeout_error", "timeout"),
        Kind::Aborted => w(3008, 408, SERVER, "aborted"),
        Kind::EngineLost => w(3040, 503, SERVER, "engine_lost"),
        Kind::ShuttingDown => w(3040, 503, SERVER, "shutting_down"),
        Kind::NoSuchGateway => w(2001, 400, INVALID, "gateway_not_found"),
        Kind::NoSuchProvider => w(2008, 400, INVALID, "provider_not_found"),
        Kind::NoStoredKey => w(2040, 400, INVALID, "stored_key_not_found"),
        Kind::Unreachable => w(2005, 502, SERVER, "upstream_unreachable"),
        Kind::UpstreamTimeout => w(2005, 504, SERVER, "upstream_timeout"),
        Kind::PromptBlocked => w(2016, 424, INVALID, "prompt_blocked"),
        Kind::AnswerBlocked => w(2017, 424, INVALID, "response_blocked"),
        Kind::Internal => w(3043, 500, SERVER, "internal_error"),
    }
}

/// The number of a kind in a gateway's own refusals, where those have one of their own.
const fn gateway_code(kind: Kind) -> u32 {
    match kind {
        Kind::Unauthorized | Kind::Forbidden => 2009,
        Kind::RateLimited => 2003,
        Kind::OutOfNeurons => 2041,
        Kind::BadInput | Kind::Unsupported | Kind::TooLarge | Kind::ContextLength => 7003,
        Kind::NoSuchModel => 2008,
        _ => wire(kind).code,
    }
}

/// How long a caller should wait when the error itself does not say.
const SOON: Duration = Duration::from_secs(1);

/// The status of an error on a surface.
pub(super) fn status(surface: Surface, error: &Error) -> StatusCode {
    let wire = wire(error.kind());
    let status = match surface {
        _ if is_lora(error) && !matches!(surface, Surface::OpenAi | Surface::Messages) => 405,
        Surface::OpenAi | Surface::Messages => wire.openai_status,
        Surface::Management if error.kind() == Kind::BadInput => 400,
        Surface::CloudflareV1 | Surface::Native | Surface::Binding | Surface::Gateway | Surface::Management => {
            error.kind().status()
        }
    };
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// An error as a body.
pub(super) fn value(surface: Surface, id: RequestId, error: &Error) -> Value {
    let status = status(surface, error);
    match surface {
        Surface::OpenAi => json!({ "error": openai(error) }),
        Surface::CloudflareV1 => {
            let mut body = envelope(id, error);
            body["error"] = openai(error);
            body
        }
        Surface::Native => envelope(id, error),
        Surface::Binding => binding(id, status, error),
        Surface::Gateway => gateway(status, error),
        Surface::Management => management(error),
        Surface::Messages => messages(id, status, error),
    }
}

/// An error as a whole response.
pub(super) fn response(surface: Surface, id: RequestId, error: &Error) -> HttpResponse {
    let status = status(surface, error);
    let body = value(surface, id, error);
    let mut response = HttpResponse::build(status);
    response.content_type("application/json");
    let wait = error.retry_after().or(match error.kind() {
        Kind::Busy | Kind::ModelUnavailable | Kind::EngineLost | Kind::ShuttingDown | Kind::RateLimited => Some(SOON),
        _ => None,
    });
    if let Some(wait) = wait {
        response.insert_header(("retry-after", wait.as_secs_f64().ceil().max(1.0).to_string()));
    }
    if let Some(attempts) = error.attempts() {
        response.insert_header(("cf-aig-attempts", attempts));
    }
    let is_spent = matches!(error.kind(), Kind::OutOfNeurons | Kind::OverBudget);
    if is_spent || error.kind() == Kind::RateLimited && wait.is_some_and(|wait| wait > WORTH_WAITING) {
        // Without this a Node SDK sleeps until midnight: it obeys Retry-After however long.
        response.insert_header(("x-should-retry", "false"));
    }
    if let Some(limit) = error.limit() {
        for header in limits(limit) {
            response.insert_header(header);
        }
    }
    if error.kind() == Kind::MethodNotAllowed {
        let allowed = match error.message().rsplit(' ').next() {
            Some("POST") => "POST",
            Some("DELETE") => "DELETE",
            _ => "GET, HEAD",
        };
        response.insert_header(("allow", allowed));
    }
    if matches!(error.kind(), Kind::TooLarge | Kind::Timeout | Kind::ShuttingDown) {
        response.force_close();
    }
    response.body(body.to_string())
}

/// A limit in headers: as the drafts of RateLimit name them, and as most APIs do.
pub(super) fn limits(limit: Limit) -> [(&'static str, String); 6] {
    let reset = limit.reset.as_secs_f64().ceil() as u64;
    [
        ("ratelimit-limit", limit.limit.to_string()),
        ("ratelimit-remaining", limit.left.to_string()),
        ("ratelimit-reset", reset.to_string()),
        ("x-ratelimit-limit", limit.limit.to_string()),
        ("x-ratelimit-remaining", limit.left.to_string()),
        ("x-ratelimit-reset", reset.to_string()),
    ]
}

/// The value of an OpenAI `error` key, also for streams that fail midway.
pub(super) fn openai(error: &Error) -> Value {
    let wire = wire(error.kind());
    let message = match error.kind() {
        Kind::Unauthorized => "Incorrect API key provided, or none. Send it as `Authorization: Bearer <token>`.",
        _ => public_message(error),
    };
    json!({ "message": message, "type": wire.openai_type, "param": error.param(), "code": wire.openai_code })
}

/// `code` and `message` as on Cloudflare's surfaces, also for streams that fail midway.
pub(super) fn native(id: RequestId, error: &Error) -> Value {
    let description = description(error);
    let message = match error.kind() {
        // These never reach a model and are worded by the API in front of it.
        Kind::Unauthorized | Kind::Forbidden | Kind::NotFound | Kind::MethodNotAllowed => description,
        _ => format!("AiError: {description} ({id})"),
    };
    json!({ "code": code(error), "message": message })
}

fn envelope(id: RequestId, error: &Error) -> Value {
    json!({ "result": {}, "success": false, "errors": [native(id, error)], "messages": [] })
}

fn binding(id: RequestId, status: StatusCode, error: &Error) -> Value {
    let description = description(error);
    json!({
        "name": "AiError",
        "internalCode": code(error),
        "httpCode": status.as_u16(),
        "message": format!("AiError: {description} ({id})"),
        "description": description,
        "requestId": id.to_string(),
    })
}

fn gateway(status: StatusCode, error: &Error) -> Value {
    let code = gateway_code(error.kind());
    let message = match error.kind() {
        Kind::Unauthorized => "Unauthorized",
        Kind::NoSuchGateway => "Please configure AI Gateway in the Cloudflare dashboard",
        Kind::RateLimited => "Rate limited",
        _ => public_message(error),
    };
    json!({
        "success": false,
        "result": [],
        "messages": [],
        "error": [{ "code": code, "message": message }],
        "name": "AiGatewayError",
        "httpCode": status.as_u16(),
        "internalCode": code,
        "message": message,
        "description": public_message(error),
    })
}

fn management(error: &Error) -> Value {
    let code = match error.kind() {
        Kind::NotFound | Kind::NoSuchGateway => 7002,
        Kind::Unauthorized | Kind::Forbidden => 10000,
        _ => 7001,
    };
    json!({
        "success": false,
        "errors": [{ "code": code, "message": public_message(error) }],
        "result": null,
        "messages": [],
    })
}

/// As Anthropic's API words it.
fn messages(id: RequestId, status: StatusCode, error: &Error) -> Value {
    let kind = match status.as_u16() {
        400 | 422 | 424 => "invalid_request_error",
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        408 | 504 => "timeout_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": public_message(error) }, "request_id": id.to_string() })
}

fn code(error: &Error) -> u32 {
    if is_lora(error) { 5005 } else { wire(error.kind()).code }
}

/// Asking for an adapter where none can be had has a code of its own.
fn is_lora(error: &Error) -> bool {
    error.kind() == Kind::Unsupported && error.param() == Some("lora")
}

/// The text Cloudflare's clients look for.
fn description(error: &Error) -> String {
    let message = public_message(error);
    match (error.kind(), error.param()) {
        (Kind::BadInput | Kind::Unsupported, Some(_)) if is_lora(error) => message.to_owned(),
        (Kind::BadInput | Kind::Unsupported, Some(param)) => {
            format!("Bad input: Error: {message} (at '/{}')", param.replace('.', "/"))
        }
        (Kind::BadInput | Kind::Unsupported, None) => format!("Bad input: Error: {message}"),
        (Kind::Busy, _) => "Capacity temporarily exceeded, please try again.".to_owned(),
        _ => message.to_owned(),
    }
}

/// What a caller may read: bugs are described in the log only.
fn public_message(error: &Error) -> &str {
    match error.kind() {
        Kind::Internal => "Something went wrong on our side. The log has the details under this request's id.",
        _ => error.message(),
    }
}

#[cfg(test)]
mod tests {
    use actix_web::body::MessageBody;

    use super::*;

    const ID: &str = "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c";

    fn shape(surface: Surface, error: Error) -> (u16, Value, Vec<String>) {
        let response = response(surface, RequestId::parse(ID).unwrap(), &error);
        assert_eq!(response.headers().get("content-type").unwrap(), "application/json", "exactly, with no charset");
        let mut extra: Vec<String> = response
            .headers()
            .iter()
            .filter(|(name, _)| *name != "content-type")
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        extra.sort();
        let status = response.status().as_u16();
        let body = response.into_body().try_into_bytes().unwrap();
        (status, serde_json::from_slice(&body).unwrap(), extra)
    }

    #[test]
    fn bad_input_names_the_field_in_each_surfaces_own_way() {
        let error = || Error::bad_field("messages.0.role", "'messages.0.role' is required");
        let (status, body, _) = shape(Surface::OpenAi, error());
        assert_eq!(status, 400);
        assert_eq!(
            body,
            json!({"error": {"message": "'messages.0.role' is required", "type": "invalid_request_error", "param": "messages.0.role", "code": null}})
        );

        let text = format!("AiError: Bad input: Error: 'messages.0.role' is required (at '/messages/0/role') ({ID})");
        let enveloped =
            json!({"result": {}, "success": false, "errors": [{"code": 5006, "message": text}], "messages": []});
        assert_eq!(shape(Surface::Native, error()).1, enveloped);

        let (_, body, _) = shape(Surface::CloudflareV1, error());
        assert_eq!((&body["errors"], &body["success"]), (&enveloped["errors"], &json!(false)));
        assert_eq!(body["error"]["param"], "messages.0.role");

        let (status, body, _) = shape(Surface::Binding, error());
        assert_eq!(status, 400);
        assert_eq!(
            (&body["internalCode"], &body["httpCode"], &body["message"]),
            (&json!(5006), &json!(400), &json!(text))
        );
        assert_eq!(body["description"], "Bad input: Error: 'messages.0.role' is required (at '/messages/0/role')");
    }

    #[test]
    fn every_kind_has_its_status_code_and_retry_advice() {
        let check = |kind: Kind, native: (u16, u32), openai: (u16, Value), headers: &[&str]| {
            let (status, body, extra) = shape(Surface::Native, Error::new(kind, "words: use POST"));
            assert_eq!((status, &body["errors"][0]["code"]), (native.0, &json!(native.1)), "{kind:?}");
            assert_eq!(extra, headers, "{kind:?}");
            let (status, body, _) = shape(Surface::OpenAi, Error::new(kind, "words"));
            assert_eq!((status, &body["error"]["code"]), (openai.0, &openai.1), "{kind:?}");
        };
        check(Kind::NoSuchModel, (400, 5007), (404, json!("model_not_found")), &[]);
        check(Kind::ContextLength, (400, 5021), (400, json!("context_length_exceeded")), &[]);
        check(Kind::Incomplete, (400, 3039), (400, json!("finetune_incomplete")), &[]);
        check(Kind::TooLarge, (413, 3006), (413, json!("request_too_large")), &[]);
        check(Kind::NotFound, (404, 7000), (404, json!("not_found")), &[]);
        check(Kind::MethodNotAllowed, (405, 7001), (405, json!("method_not_allowed")), &["allow: POST"]);
        check(Kind::Unauthorized, (401, 10000), (401, json!("invalid_api_key")), &[]);
        check(Kind::Busy, (429, 3040), (503, json!("overloaded")), &["retry-after: 1"]);
        check(Kind::OutOfNeurons, (429, 4006), (429, json!("insufficient_quota")), &["x-should-retry: false"]);
        check(Kind::ModelUnavailable, (503, 3040), (503, json!("model_unavailable")), &["retry-after: 1"]);
        check(Kind::Timeout, (408, 3007), (408, json!("timeout")), &[]);
        check(Kind::Unsupported, (400, 5006), (400, json!("unsupported")), &[]);
    }

    #[test]
    fn what_broke_inside_is_not_told() {
        for surface in [Surface::OpenAi, Surface::CloudflareV1, Surface::Native, Surface::Binding] {
            let (status, body, _) = shape(surface, Error::internal("/etc/secret is missing"));
            assert_eq!(status, 500);
            assert!(!body.to_string().contains("secret"), "{body}");
        }
    }

    #[test]
    fn a_lora_where_none_can_be_had_has_a_code_of_its_own() {
        let (status, body, _) = shape(Surface::Native, Error::unsupported("LoRA is not available").with_param("lora"));
        assert_eq!((status, &body["errors"][0]["code"]), (405, &json!(5005)));
    }
}
