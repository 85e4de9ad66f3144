//! What a failed attempt means, said once for all who must act on it.
//!
//!     status and the head of the body, or no answer --classify--> Class --worth_retry?--> the same target again
//!                                                                      '--toll---------> the target's breaker
//!
//! The status alone does not tell: billing comes as 400 and 429, overload as 529, errors as events in a stream whose status was 200. Words
//! are looked for in the first few kilobytes, codes rather than sentences where there are any.

use serde_json::Value;

/// Bytes of a body that are looked at.
const HEAD: usize = 4096;

/// What went wrong, and whose business it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// The request is wrong: it would be everywhere.
    Caller,
    /// The key is missing, wrong or not allowed to do this.
    Credential,
    /// Too many requests or tokens for now.
    Quota,
    /// The provider is overloaded or broken.
    Overload,
    /// No connection, or one that broke before an answer.
    Transport,
    /// No first byte in time.
    Timeout,
    /// The prompt does not fit this model; a larger one might take it.
    ContextTooLong,
    /// The provider will not answer this content.
    Refused,
    /// The account has no money left.
    Billing,
}

/// What a failure costs the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Toll {
    /// Nothing: the target did its work.
    Nothing,
    /// One failure.
    Failure,
    /// A rest at once: nothing will change by asking again.
    Rest,
}

/// How an attempt failed, as its connection saw it.
#[derive(Clone, Copy, Debug)]
pub enum Failure<'b> {
    /// An answer with an error status, or an error event in a stream (with status 200).
    Answer {
        /// The HTTP status.
        status: u16,
        /// The beginning of the body, or the data of the event.
        head: &'b [u8],
    },
    /// No answer: name resolution, connection, TLS, reset.
    Transport,
    /// No first byte in time.
    Timeout,
}

impl Class {
    /// Whether the same target may do better in a moment.
    pub const fn worth_retry(self) -> bool {
        matches!(self, Self::Quota | Self::Overload | Self::Transport | Self::Timeout)
    }

    /// What it costs the target.
    pub const fn toll(self) -> Toll {
        match self {
            Self::Overload | Self::Transport | Self::Timeout => Toll::Failure,
            Self::Credential | Self::Billing => Toll::Rest,
            Self::Caller | Self::Quota | Self::ContextTooLong | Self::Refused => Toll::Nothing,
        }
    }

    /// For metric labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Credential => "credential",
            Self::Quota => "quota",
            Self::Overload => "overload",
            Self::Transport => "transport",
            Self::Timeout => "timeout",
            Self::ContextTooLong => "context_too_long",
            Self::Refused => "refused",
            Self::Billing => "billing",
        }
    }
}

const TOO_LONG: &[&str] = &[
    "context_length_exceeded",
    "maximum context length",
    "prompt is too long",
    "input is too long",
    "exceeds the context window",
    "exceed context limit",
    "exceeds the maximum number of tokens",
    "exceeds the model's maximum",
    "too many input tokens",
    "input length and `max_tokens` exceed",
];
const BILLING: &[&str] = &[
    "insufficient_quota",
    "billing_hard_limit",
    "billing_not_active",
    "credit balance is too low",
    "insufficient credits",
    "insufficient balance",
    "exceeded your monthly",
    "payment required",
];
const REFUSED: &[&str] = &[
    "content_filter",
    "content_policy",
    "responsibleaipolicy",
    "content management policy",
    "prohibited_content",
    "content_blocked",
    "safety system",
    "flagged by moderation",
    "requires moderation",
    "\"moderation_blocked\"",
];
const BAD_KEY: &[&str] = &[
    "invalid_api_key",
    "api_key_invalid",
    "incorrect api key",
    "api key not valid",
    "invalid x-api-key",
    "authentication_error",
    "expiredtoken",
    "unrecognizedclient",
    "invalidsignature",
    "unauthenticated",
    "permission_denied",
];
const QUOTA: &[&str] =
    &["rate_limit", "rate limit", "throttling", "resource_exhausted", "too_many_requests", "too many requests"];

/// Says what a failure means.
pub fn classify(failure: Failure) -> Class {
    let (status, head) = match failure {
        Failure::Transport => return Class::Transport,
        Failure::Timeout => return Class::Timeout,
        Failure::Answer { status, head } => (status, &head[..head.len().min(HEAD)]),
    };
    // An event in a stream that began well carries its status in its body, if anywhere.
    let status = if status >= 400 { status } else { status_within(head).unwrap_or(0) };
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match status {
        402 => return Class::Billing,
        408 | 504 | 522 | 524 => return Class::Timeout,
        // Some servers fail on long prompts instead of refusing them; of other words in such bodies nothing is to be made.
        500 if says(TOO_LONG) => return Class::ContextTooLong,
        500..=599 => return Class::Overload,
        _ => {}
    }
    // Before the length: limits of tokens a minute also speak of too many tokens.
    match status {
        _ if says(BILLING) => Class::Billing,
        429 => Class::Quota,
        413 if says(QUOTA) => Class::Quota,
        _ if says(TOO_LONG) => Class::ContextTooLong,
        _ if says(REFUSED) => Class::Refused,
        401 | 403 => Class::Credential,
        400 | 0 if says(BAD_KEY) => Class::Credential,
        400 | 0 if says(QUOTA) => Class::Quota,
        0 if says(&["invalid_request"]) => Class::Caller,
        400 if says(&["overloaded"]) => Class::Overload,
        // An error of which we know nothing, in an answer that had begun well: the provider's.
        0 => Class::Overload,
        _ => Class::Caller,
    }
}

/// `{"error":{"code":502}}`, `{"error":{"status":…}}`, `{"status":…}`.
fn status_within(head: &[u8]) -> Option<u16> {
    let value: Value = serde_json::from_slice(head).ok()?;
    let error = value.get("error").unwrap_or(&value);
    let number = |name: &str| error.get(name).or_else(|| value.get(name)).and_then(Value::as_u64);
    let status = ["code", "status", "status_code", "httpCode"].iter().find_map(|name| number(name))?;
    u16::try_from(status).ok().filter(|status| (400..600).contains(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(status: u16, head: &str, expected: Class) {
        let class = classify(Failure::Answer { status, head: head.as_bytes() });
        assert_eq!(class, expected, "{status} {head}");
    }

    #[test]
    fn answers_of_providers_are_told_apart() {
        check(400, r#"{"error":{"message":"Unknown field","type":"invalid_request_error"}}"#, Class::Caller);
        check(404, r#"{"error":{"code":"model_not_found"}}"#, Class::Caller);
        check(409, "", Class::Caller);
        check(422, "", Class::Caller);
        check(400, r#"{"error":{"code":"context_length_exceeded"}}"#, Class::ContextTooLong);
        check(
            400,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 210000 tokens > 200000 maximum"}}"#,
            Class::ContextTooLong,
        );
        check(500, "This model's maximum context length is 4096 tokens", Class::ContextTooLong);
        check(
            400,
            r#"{"error":{"code":"content_filter","innererror":{"code":"ResponsibleAIPolicyViolation"}}}"#,
            Class::Refused,
        );
        check(403, "flagged by moderation", Class::Refused);
        check(401, "", Class::Credential);
        check(403, "", Class::Credential);
        check(
            400,
            r#"{"error":{"code":400,"message":"API key not valid","status":"INVALID_ARGUMENT"}}"#,
            Class::Credential,
        );
        check(
            429,
            r#"{"error":{"type":"tokens","code":"rate_limit_exceeded","message":"maximum context length"}}"#,
            Class::Quota,
        );
        check(429, r#"{"error":{"type":"insufficient_quota","code":"insufficient_quota"}}"#, Class::Billing);
        check(413, r#"{"error":{"code":"rate_limit_exceeded"}}"#, Class::Quota);
        check(413, "", Class::Caller);
        check(400, r#"{"__type":"ThrottlingException"}"#, Class::Quota);
        check(402, "", Class::Billing);
        check(400, r#"{"error":{"message":"Your credit balance is too low to access the API"}}"#, Class::Billing);
        check(408, "", Class::Timeout);
        check(504, "", Class::Timeout);
        check(524, "<html>", Class::Timeout);
        check(500, "", Class::Overload);
        check(502, "<html>rate limit</html>", Class::Overload);
        check(503, "insufficient_quota", Class::Overload);
        check(529, r#"{"error":{"type":"overloaded_error"}}"#, Class::Overload);
    }

    #[test]
    fn errors_in_a_stream_that_began_well_are_told_apart() {
        check(200, r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#, Class::Overload);
        check(200, r#"{"error":{"code":502,"message":"Provider returned error"}}"#, Class::Overload);
        check(200, r#"{"error":{"code":429,"message":"x"}}"#, Class::Quota);
        check(200, r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}"#, Class::Quota);
        check(200, r#"{"error":{"type":"rate_limit_error"}}"#, Class::Quota);
        check(200, r#"{"error":{"type":"authentication_error"}}"#, Class::Credential);
        check(200, r#"{"error":{"type":"invalid_request_error"}}"#, Class::Caller);
        check(
            200,
            r#"{"error":{"type":"invalid_request_error","code":"context_length_exceeded"}}"#,
            Class::ContextTooLong,
        );
        check(200, "something", Class::Overload);
    }

    #[test]
    fn whether_to_retry_and_what_it_costs_are_two_answers() {
        let check = |class: Class, retry: bool, toll: Toll| {
            assert_eq!((class.worth_retry(), class.toll()), (retry, toll), "{class:?}");
        };
        check(classify(Failure::Transport), true, Toll::Failure);
        check(classify(Failure::Timeout), true, Toll::Failure);
        check(Class::Overload, true, Toll::Failure);
        check(Class::Quota, true, Toll::Nothing);
        check(Class::Credential, false, Toll::Rest);
        check(Class::Billing, false, Toll::Rest);
        check(Class::Caller, false, Toll::Nothing);
        check(Class::ContextTooLong, false, Toll::Nothing);
        check(Class::Refused, false, Toll::Nothing);
    }
}
