//! What one event of a stream adds to the text of an answer, for every provider's events.
//!
//!     {"choices":[{"index":0,"delta":{"content":"Hel"}}]}            -> choice 0, content: "Hel"
//!     {"type":"content_block_delta","index":1,"delta":{…"json_delta"}} -> choice 1, call: …
//!     {"type":"content_block_stop","index":1}                        -> choice 1 is over
//!
//! Known: OpenAI's chat, completions and responses, Anthropic, Google, Cohere v1 and v2, the native `response`, Bedrock's converse, Ollama
//! and text-generation-inference. Of any other event every string is text, each field going on from event to event.
//! Events that repeat what deltas said already (`….done`, `response.completed`) are texts of their own.

use serde_json::Value;

use super::text::{PROTOCOL_FIELDS, is_base64};

/// One step of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<'e> {
    /// More text of a part.
    Text(Part, &'e str),
    /// A text that stands alone, in the choice of this number.
    Whole(u64, &'e str),
    /// A choice has ended.
    Close(u64),
    /// The answer has ended.
    CloseAll,
}

/// Which text a delta goes on with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    /// The choice, candidate, block or output item.
    pub choice: u64,
    /// What of it.
    pub kind: Kind,
    /// Which of several of the kind.
    pub index: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The answer itself.
    Content,
    /// Thoughts before it.
    Reasoning,
    /// A refusal in place of it.
    Refusal,
    /// Arguments of a tool call.
    Call,
    /// A field of an unknown event, told apart by a hash of its path.
    Other,
}

/// Told each step in order.
type Steps<'s, 'e> = &'s mut dyn FnMut(Step<'e>);

/// Takes the data of an event apart. Data that is not JSON is text itself.
pub(super) fn steps<'e>(event: &'e Value, tell: Steps<'_, 'e>) {
    let kind = event.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind.starts_with("response.") {
        return responses(kind, event, tell);
    }
    if let Some(kind) = event.get("event_type").and_then(Value::as_str) {
        return cohere_v1(kind, event, tell);
    }
    if !kind.is_empty() && (anthropic(kind, event, tell) || cohere_v2(kind, event, tell)) {
        return;
    }
    if let Some(choices) = event.get("choices").and_then(Value::as_array) {
        openai(choices, tell);
        return native(event, tell);
    }
    if let Some(candidates) = event.get("candidates").and_then(Value::as_array) {
        return google(candidates, tell);
    }
    if event.get("contentBlockIndex").is_some() || event.get("stopReason").is_some() {
        return converse(event, tell);
    }
    if event.get("response").is_some() || event.get("tool_calls").is_some() {
        return native(event, tell);
    }
    if let Some(message) = event.get("message").filter(|_| event.get("done").is_some()) {
        text(message, "content", part(0, Kind::Content, 0), tell);
        text(message, "thinking", part(0, Kind::Reasoning, 0), tell);
        return whole(message.get("tool_calls"), 0, tell);
    }
    if let Some(token) = event.get("token").filter(|token| token.get("text").is_some()) {
        text(token, "text", part(0, Kind::Content, 0), tell);
        return whole(event.get("generated_text"), 0, tell);
    }
    unknown(event, 0xcbf2_9ce4_8422_2325, tell);
}

fn openai<'e>(choices: &'e [Value], tell: Steps<'_, 'e>) {
    for (at, choice) in choices.iter().enumerate() {
        let number = number(choice, "index", at);
        text(choice, "text", part(number, Kind::Content, 0), tell);
        // Some servers stream whole messages.
        if let Some(delta) = choice.get("delta").or_else(|| choice.get("message")) {
            content(delta.get("content"), number, tell);
            for field in ["reasoning_content", "reasoning", "thinking"] {
                text(delta, field, part(number, Kind::Reasoning, 0), tell);
            }
            text(delta, "refusal", part(number, Kind::Refusal, 0), tell);
            calls(delta, number, tell);
            if let Some(call) = delta.get("function_call") {
                text(call, "arguments", part(number, Kind::Call, 0), tell);
            }
            if let Some(audio) = delta.get("audio") {
                text(audio, "transcript", part(number, Kind::Content, 1), tell);
            }
        }
        if choice.get("finish_reason").is_some_and(|reason| !reason.is_null()) {
            tell(Step::Close(number));
        }
    }
}

/// A content: a string, or parts of one.
fn content<'e>(content: Option<&'e Value>, choice: u64, tell: Steps<'_, 'e>) {
    match content {
        Some(Value::String(text)) => say(part(choice, Kind::Content, 0), text, tell),
        Some(Value::Array(parts)) => {
            for piece in parts {
                text(piece, "text", part(choice, Kind::Content, 0), tell);
                match piece.get("thinking") {
                    Some(Value::String(thought)) => say(part(choice, Kind::Reasoning, 0), thought, tell),
                    thoughts => {
                        for thought in thoughts.and_then(Value::as_array).into_iter().flatten() {
                            text(thought, "text", part(choice, Kind::Reasoning, 0), tell);
                        }
                    }
                }
            }
        }
        _ => {}
    }
}

fn calls<'e>(holder: &'e Value, choice: u64, tell: Steps<'_, 'e>) {
    for (at, call) in holder.get("tool_calls").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let index = number(call, "index", at);
        let function = call.get("function").unwrap_or(call);
        match function.get("arguments") {
            Some(Value::String(text)) => say(part(choice, Kind::Call, index), text, tell),
            arguments => whole(arguments, choice, tell),
        }
    }
}

fn native<'e>(event: &'e Value, tell: Steps<'_, 'e>) {
    match event.get("response") {
        Some(Value::String(text)) => say(part(0, Kind::Content, 0), text, tell),
        other => whole(other, 0, tell),
    }
    calls(event, 0, tell);
    if event.get("finish_reason").is_some_and(|reason| !reason.is_null()) {
        tell(Step::Close(0));
    }
}

fn responses<'e>(kind: &'e str, event: &'e Value, tell: Steps<'_, 'e>) {
    let item = number(event, "output_index", 0);
    if let Some(what) = kind.strip_suffix(".delta") {
        if what.ends_with("audio") || what.contains("image") {
            return;
        }
        let sort = match what {
            _ if what.contains("reasoning") => Kind::Reasoning,
            _ if what.ends_with("refusal") => Kind::Refusal,
            _ if what.ends_with("output_text") => Kind::Content,
            _ => Kind::Call,
        };
        let index = number(event, "content_index", number(event, "summary_index", 0) as usize);
        return text(event, "delta", part(item, sort, index), tell);
    }
    for field in ["text", "refusal", "arguments", "input", "part", "item"] {
        whole(event.get(field), item, tell);
    }
    // The request is echoed beside the output, and is not the model's.
    whole(event.get("response").and_then(|response| response.get("output")), item, tell);
    match kind {
        "response.output_item.done" => tell(Step::Close(item)),
        "response.completed" | "response.incomplete" | "response.failed" => tell(Step::CloseAll),
        _ => {}
    }
}

fn anthropic<'e>(kind: &str, event: &'e Value, tell: Steps<'_, 'e>) -> bool {
    let block = number(event, "index", 0);
    match kind {
        "content_block_start" | "content_block_delta" => {
            let piece = event.get("content_block").or_else(|| event.get("delta")).unwrap_or(&Value::Null);
            text(piece, "text", part(block, Kind::Content, 0), tell);
            text(piece, "thinking", part(block, Kind::Reasoning, 0), tell);
            text(piece, "partial_json", part(block, Kind::Call, 0), tell);
            // Blocks that come whole: calls with their input, results of the provider's own tools, citations.
            for field in ["input", "content", "citation"] {
                whole(piece.get(field), block, tell);
            }
        }
        "content_block_stop" => tell(Step::Close(block)),
        "message_start" => whole(event.get("message").and_then(|message| message.get("content")), 0, tell),
        "message_delta" | "ping" => {}
        "message_stop" => tell(Step::CloseAll),
        _ => return false,
    }
    true
}

fn cohere_v2<'e>(kind: &str, event: &'e Value, tell: Steps<'_, 'e>) -> bool {
    let number = number(event, "index", 0);
    match kind {
        "content-start" | "content-delta" | "tool-plan-delta" | "tool-call-start" | "tool-call-delta" => {
            let Some(message) = event.get("delta").and_then(|delta| delta.get("message")) else { return true };
            text(message, "tool_plan", part(number, Kind::Reasoning, 1), tell);
            if let Some(content) = message.get("content") {
                text(content, "text", part(number, Kind::Content, 0), tell);
                text(content, "thinking", part(number, Kind::Reasoning, 0), tell);
            }
            if let Some(function) = message.get("tool_calls").and_then(|call| call.get("function")) {
                text(function, "arguments", part(number, Kind::Call, 0), tell);
            }
        }
        "content-end" | "tool-call-end" => tell(Step::Close(number)),
        "message-start" | "citation-end" => {}
        "citation-start" => whole(event.get("delta"), number, tell),
        "message-end" => tell(Step::CloseAll),
        _ => return false,
    }
    true
}

fn cohere_v1<'e>(kind: &str, event: &'e Value, tell: Steps<'_, 'e>) {
    match kind {
        "text-generation" => text(event, "text", part(0, Kind::Content, 0), tell),
        "tool-calls-chunk" => {
            text(event, "text", part(0, Kind::Reasoning, 0), tell);
            let Some(call) = event.get("tool_call_delta") else { return };
            text(call, "parameters", part(0, Kind::Call, number(call, "index", 0)), tell);
        }
        "stream-start" => {}
        "stream-end" => {
            let response = event.get("response");
            whole(response.and_then(|response| response.get("text")), 0, tell);
            whole(response.and_then(|response| response.get("tool_calls")), 0, tell);
            tell(Step::CloseAll);
        }
        _ => whole(Some(event), 0, tell),
    }
}

fn google<'e>(candidates: &'e [Value], tell: Steps<'_, 'e>) {
    for (at, candidate) in candidates.iter().enumerate() {
        let number = number(candidate, "index", at);
        let parts = candidate.get("content").and_then(|content| content.get("parts")).and_then(Value::as_array);
        for piece in parts.into_iter().flatten() {
            let thought = piece.get("thought") == Some(&Value::Bool(true));
            let kind = if thought { Kind::Reasoning } else { Kind::Content };
            text(piece, "text", part(number, kind, 0), tell);
            for field in ["functionCall", "executableCode", "codeExecutionResult"] {
                whole(piece.get(field), number, tell);
            }
        }
        if candidate.get("finishReason").is_some_and(|reason| !reason.is_null()) {
            tell(Step::Close(number));
        }
    }
}

fn converse<'e>(event: &'e Value, tell: Steps<'_, 'e>) {
    let block = number(event, "contentBlockIndex", 0);
    if let Some(delta) = event.get("delta") {
        text(delta, "text", part(block, Kind::Content, 0), tell);
        if let Some(call) = delta.get("toolUse") {
            text(call, "input", part(block, Kind::Call, 0), tell);
        }
        if let Some(thought) = delta.get("reasoningContent") {
            text(thought, "text", part(block, Kind::Reasoning, 0), tell);
        }
    } else if event.get("stopReason").is_some() {
        tell(Step::CloseAll);
    } else if event.get("start").is_none() {
        tell(Step::Close(block));
    }
}

/// All strings of an event that nobody knows.
fn unknown<'e>(value: &'e Value, path: u64, tell: Steps<'_, 'e>) {
    match value {
        Value::String(text) => say(part(0, Kind::Other, path), text, tell),
        Value::Array(items) => items.iter().for_each(|item| unknown(item, mixed(path, b"[]"), tell)),
        Value::Object(fields) => {
            for (name, value) in fields.iter().filter(|(name, _)| !PROTOCOL_FIELDS.contains(&name.as_str())) {
                unknown(value, mixed(path, name.as_bytes()), tell);
            }
        }
        _ => {}
    }
}

/// All strings of something that came whole, each on its own.
fn whole<'e>(value: Option<&'e Value>, choice: u64, tell: Steps<'_, 'e>) {
    match value {
        Some(Value::String(text)) if !text.is_empty() && !is_base64(text) => tell(Step::Whole(choice, text)),
        Some(Value::Array(items)) => items.iter().for_each(|item| whole(Some(item), choice, tell)),
        Some(Value::Object(fields)) => {
            for (_, value) in fields.iter().filter(|(name, _)| !PROTOCOL_FIELDS.contains(&name.as_str())) {
                whole(Some(value), choice, tell);
            }
        }
        _ => {}
    }
}

fn text<'e>(holder: &'e Value, field: &str, part: Part, tell: Steps<'_, 'e>) {
    if let Some(text) = holder.get(field).and_then(Value::as_str) {
        say(part, text, tell);
    }
}

fn say<'e>(part: Part, text: &'e str, tell: Steps<'_, 'e>) {
    if !text.is_empty() {
        tell(Step::Text(part, text));
    }
}

fn part(choice: u64, kind: Kind, index: u64) -> Part {
    Part { choice, kind, index }
}

fn number(holder: &Value, field: &str, missing: usize) -> u64 {
    holder.get(field).and_then(Value::as_u64).unwrap_or(missing as u64)
}

/// FNV-1a, with a mark between names.
fn mixed(path: u64, name: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    name.iter().chain(b"/").fold(path, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(event: &str, expected: &str) {
        let value: Value = serde_json::from_str(event).unwrap();
        let mut words = Vec::new();
        steps(&value, &mut |step| {
            words.push(match step {
                Step::Text(Part { choice, kind, index }, text) if kind != Kind::Other => {
                    format!("{choice}.{kind:?}.{index}={text}")
                }
                Step::Text(_, text) => format!("?={text}"),
                Step::Whole(choice, text) => format!("{choice}!{text}"),
                Step::Close(choice) => format!("{choice} ends"),
                Step::CloseAll => "end".to_owned(),
            });
        });
        assert_eq!(words.join(" "), expected, "{event}");
    }

    #[test]
    fn openai_and_native() {
        check(
            r#"{"choices":[{"index":1,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}],"p":"abc"}"#,
            "1.Content.0=Hi",
        );
        check(
            r#"{"choices":[{"delta":{"reasoning_content":"hm"}},{"delta":{"content":"x"},"finish_reason":"stop"}]}"#,
            "0.Reasoning.0=hm 1.Content.0=x 1 ends",
        );
        check(r#"{"choices":[{"text":"a"}]}"#, "0.Content.0=a");
        check(
            r#"{"choices":[{"delta":{"tool_calls":[{"index":2,"id":"x","function":{"name":"f","arguments":"{\"a"}}]}}]}"#,
            "0.Call.2={\"a",
        );
        check(
            r#"{"choices":[{"delta":{"content":[{"type":"text","text":"a"},{"type":"thinking","thinking":[{"type":"text","text":"b"}]}]}}]}"#,
            "0.Content.0=a 0.Reasoning.0=b",
        );
        check(r#"{"choices":[],"usage":{"total_tokens":3}}"#, "");
        check(r#"{"response":"lo","p":"abd"}"#, "0.Content.0=lo");
        check(r#"{"response":null,"tool_calls":[{"name":"f","arguments":{"type":"t","city":"Oslo"}}]}"#, "0!Oslo");
        check(
            r#"{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}],"finish_reason":"tool_calls"}"#,
            "0.Call.0={} 0 ends",
        );
    }

    #[test]
    fn responses_and_anthropic() {
        check(
            r#"{"type":"response.output_text.delta","output_index":1,"content_index":0,"item_id":"i","delta":"Hi"}"#,
            "1.Content.0=Hi",
        );
        check(
            r#"{"type":"response.reasoning_summary_text.delta","output_index":0,"summary_index":2,"delta":"hm"}"#,
            "0.Reasoning.2=hm",
        );
        check(r#"{"type":"response.function_call_arguments.delta","output_index":1,"delta":"{"}"#, "1.Call.0={");
        check(r#"{"type":"response.output_text.done","output_index":1,"text":"Hi"}"#, "1!Hi");
        check(
            r#"{"type":"response.output_item.done","output_index":1,"item":{"id":"i","content":[{"type":"output_text","text":"Hi"}]}}"#,
            "1!Hi 1 ends",
        );
        check(r#"{"type":"response.created","response":{"instructions":"echo","output":[]}}"#, "");
        check(
            r#"{"type":"response.completed","response":{"instructions":"echo","output":[{"content":[{"text":"Hi"}]}]}}"#,
            "0!Hi end",
        );
        check(r#"{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}"#, "");
        check(
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Hi"}}"#,
            "1.Content.0=Hi",
        );
        check(
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"a"}}"#,
            "1.Call.0={\"a",
        );
        check(
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}"#,
            "0.Reasoning.0=hm",
        );
        check(r#"{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"abc"}}"#, "");
        check(r#"{"type":"content_block_stop","index":1}"#, "1 ends");
        check(r#"{"type":"message_stop"}"#, "end");
        check(r#"{"type":"message_start","message":{"model":"m","content":[]}}"#, "");
    }

    #[test]
    fn google_cohere_bedrock_and_others() {
        check(
            r#"{"candidates":[{"content":{"parts":[{"text":"a","thought":true},{"text":"b"}],"role":"model"},"finishReason":"STOP","index":0}]}"#,
            "0.Reasoning.0=a 0.Content.0=b 0 ends",
        );
        check(
            r#"{"candidates":[{"content":{"parts":[{"functionCall":{"name":"f","args":{"city":"Oslo"}}}]}}]}"#,
            "0!f 0!Oslo",
        );
        check(r#"{"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"Hi"}}}}"#, "0.Content.0=Hi");
        check(
            r#"{"type":"tool-call-delta","index":0,"delta":{"message":{"tool_calls":{"function":{"arguments":"{"}}}}}"#,
            "0.Call.0={",
        );
        check(r#"{"type":"content-end","index":0}"#, "0 ends");
        check(r#"{"type":"message-end","delta":{"finish_reason":"COMPLETE"}}"#, "end");
        check(r#"{"event_type":"text-generation","text":"Hi"}"#, "0.Content.0=Hi");
        check(r#"{"event_type":"stream-end","response":{"text":"Hi","generation_id":"x"}}"#, "0!Hi end");
        check(r#"{"contentBlockIndex":0,"delta":{"text":"Hi"},"p":"abc"}"#, "0.Content.0=Hi");
        check(r#"{"contentBlockIndex":0,"p":"abc"}"#, "0 ends");
        check(r#"{"stopReason":"end_turn","p":"abc"}"#, "end");
        check(
            r#"{"model":"m","created_at":"t","message":{"role":"assistant","content":"Hi"},"done":false}"#,
            "0.Content.0=Hi",
        );
        check(r#"{"token":{"id":5,"text":" Hi","special":false},"generated_text":null}"#, "0.Content.0= Hi");
        check(r#"{"generation":"Hi","stop_reason":null}"#, "?=Hi");
        check(r#"{"error":{"message":"no","type":"server_error"}}"#, "?=no");
        check(r#""Hi""#, "?=Hi");
    }
}
