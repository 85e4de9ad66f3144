use serde_json::json;

use super::*;

pub(super) fn rule(name: &str, pattern: &str, on: On, action: Action) -> Rule {
    Rule { name: name.into(), pattern: pattern.into(), on, action }
}

fn show(verdict: &Verdict) -> String {
    let mut words: Vec<String> = verdict.flags.iter().map(|flag| format!("flag {} {}", flag.rule, flag.what)).collect();
    words.extend(verdict.blocked.iter().map(|found| format!("block {} {}", found.rule, found.what)));
    words.join("; ")
}

fn secret_guard() -> Guard {
    let rules = [
        rule("secret", "(?i)secret", On::Both, Action::Block),
        rule("mail", r"\b\w+@\w+\.\w+\b", On::Both, Action::Flag),
    ];
    Guard::new(&rules, Schemas::default()).unwrap()
}

fn check_request(content_type: &str, body: impl AsRef<[u8]>, expected: &str) {
    let verdict = secret_guard().request(body.as_ref(), content_type);
    assert_eq!(show(&verdict), expected, "{}", String::from_utf8_lossy(body.as_ref()));
    assert!(verdict.flags.iter().chain(&verdict.blocked).all(|found| found.check == Check::Request));
}

#[test]
fn what_a_person_wrote_is_searched_wherever_it_stands() {
    const JSON: &str = "application/json";
    let chat = |content: Value| json!({"model": "secret-model", "messages": [{"role": "user", "content": content}]});
    check_request(JSON, chat(json!("hello")).to_string(), "");
    check_request(JSON, chat(json!("a Secret")).to_string(), "block secret messages[0].content");
    let parts = json!([{"type": "text", "text": "ok"}, {"type": "text", "text": "secret"}]);
    check_request(JSON, chat(parts).to_string(), "block secret messages[0].content[1].text");
    check_request(JSON, chat(json!("ann@example.org")).to_string(), "flag mail messages[0].content");
    check_request(JSON, r#"{"prompt": "\u0073ecr\u0065t"}"#, "block secret prompt");
    check_request(JSON, r#"{"pr\u006fmpt": "secret"}"#, "block secret prompt");
    check_request(JSON, r#"{"input": ["x", "secret"]}"#, "block secret input[1]");
    check_request(
        JSON,
        r#"{"system": [{"type": "text", "text": "secret"}], "messages": []}"#,
        "block secret system[0].text",
    );
    check_request(JSON, r#"{"contents": [{"parts": [{"text": "secret"}]}]}"#, "block secret contents[0].parts[0].text");
    let call = json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"type\":\"secret\"}"}}]}]});
    check_request(JSON, call.to_string(), "block secret messages[0].tool_calls[0].function.arguments");
    let used =
        json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"type": "secret"}}]}]});
    check_request(JSON, used.to_string(), "block secret messages[0].content[0].input.type");
    check_request(JSON, r#"{"query": {"who": "x"}, "top": "secret", "prompt": "fine"}"#, "");
    check_request(JSON, r#"[{"provider": "openai", "query": {"a": "secret"}}]"#, "block secret [0].query.a");
    check_request(JSON, r#"{"whatever": {"deep": ["secret"]}}"#, "block secret whatever.deep[0]");
}

#[test]
fn a_word_cannot_hide_behind_the_form_of_a_body() {
    const JSON: &str = "application/json";
    check_request(JSON, r#"{"prompt": "fine", "prompt": "secret"}"#, "block secret prompt");
    check_request(JSON, r#"{"prompt": "secret", "prompt": "fine"}"#, "block secret prompt");
    check_request(JSON, r#"{"prompt": "\ud800 \u0073ecret"}"#, "block secret the body");
    check_request(JSON, r#"{"prompt": "secret", "x": NaN}"#, "block secret prompt");
    check_request(JSON, b"{\"prompt\": \"\xff secret\"}", "block secret the body");
    check_request("image/png", r#"{"prompt": "secret"}"#, "block secret prompt");
    check_request("", r#"{"prompt": "secret"}"#, "block secret prompt");
    check_request(JSON, "\u{feff}{\"prompt\": \"secret\"}", "block secret prompt");
    let wide: Vec<u8> = r#"{"prompt":"secret"}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    check_request(JSON, wide, "block secret prompt");
    check_request("text/plain", "a secret", "block secret the body");
    check_request("application/x-www-form-urlencoded", "a=1&prompt=%73ecret", "block secret the form");
    let deep = format!("{{\"prompt\":{}\"secret\"{}}}", "[".repeat(200), "]".repeat(200));
    check_request(JSON, deep, "block secret the body");
}

#[test]
fn pictures_and_sound_are_not_text() {
    let data = "c2VjcmV0".repeat(100) + "secret";
    let body = json!({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{data}")}},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]}]});
    check_request("application/json", body.to_string(), "");
    check_request("audio/wav", "RIFF secret", "");
    let body = |head: &str| format!("--B\r\n{head}\r\n\r\nsecret\r\n--B--\r\n");
    let kind = "multipart/form-data; boundary=\"B\"";
    check_request(kind, body("Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\""), "");
    check_request(kind, body("Content-Disposition: form-data; name=\"prompt\""), "block secret the form");
}

#[test]
fn answers_are_searched_in_every_form() {
    let check = |body: Value, expected: &str| {
        let verdict = secret_guard().response(body.to_string().as_bytes(), "application/json");
        assert_eq!(show(&verdict), expected, "{body}");
    };
    check(json!({"id": "secret", "choices": [{"message": {"role": "assistant", "content": "fine"}}]}), "");
    check(
        json!({"choices": [{"message": {"content": "fine"}}, {"message": {"content": "secret"}}]}),
        "block secret choices[1].message.content",
    );
    check(json!({"type": "message", "content": [{"type": "text", "text": "secret"}]}), "block secret content[0].text");
    check(
        json!({"candidates": [{"content": {"parts": [{"text": "secret"}]}}]}),
        "block secret candidates[0].content.parts[0].text",
    );
    check(json!({"result": {"response": "secret"}, "success": true}), "block secret result.response");
    check(json!({"whatever": "secret"}), "block secret whatever");
}

#[test]
fn a_stream_that_is_all_there_is_looked_at_as_one() {
    let body = "data: {\"response\":\"a sec\"}\n\ndata: {\"response\":\"ret b@c.de\"}\n\ndata: [DONE]\n\n";
    let verdict = secret_guard().response(body.as_bytes(), "text/event-stream");
    assert_eq!(show(&verdict), "block secret the stream");
    let flagged = secret_guard().response(b"data: {\"response\":\"b@c.de \"}\n\n", "text/event-stream; charset=utf-8");
    assert_eq!(show(&flagged), "flag mail the stream");
}

#[test]
fn a_wrong_rule_is_named() {
    let check = |rules: &[Rule], words: &str| {
        let error = Guard::new(rules, Schemas::default()).err().unwrap();
        assert!(error.message().contains(words), "{error}");
    };
    let one = |pattern: &str| [rule("r1", pattern, On::Both, Action::Block)];
    check(&one("("), "\"r1\": its pattern does not compile");
    check(&one("a*"), "empty text");
    check(&one("^$"), "empty text");
    check(&one(&"x".repeat(5000)), "longer than");
    check(&one(r"\w{200}{200}"), "\"r1\"");
    check(&[one("a"), one("b")].concat(), "a name of its own");
    check(&[rule("", "a", On::Both, Action::Block)], "a name of its own");
    let many: Vec<Rule> = (0..200).map(|n| rule(&n.to_string(), "a", On::Both, Action::Block)).collect();
    check(&many, "128 at most");
}

#[test]
fn a_rule_looks_in_its_direction_only() {
    let rules = [rule("in", "aa", On::Request, Action::Block), rule("out", "bb", On::Response, Action::Block)];
    let guard = Guard::new(&rules, Schemas::default()).unwrap();
    let look = |text: &str| {
        let body = json!({"prompt": text, "response": text}).to_string();
        let asked = guard.request(body.as_bytes(), "application/json");
        let answered = guard.response(body.as_bytes(), "application/json");
        (show(&asked), show(&answered))
    };
    assert_eq!(look("aa"), ("block in prompt".to_owned(), String::new()));
    assert_eq!(look("bb"), (String::new(), "block out response".to_owned()));
    assert!(!guard.ignores_requests() && !guard.ignores_responses());
    let none = Guard::new(&[], Schemas::default()).unwrap();
    assert!(none.ignores_requests() && none.ignores_responses());
}

#[test]
fn a_request_must_keep_its_schema() {
    let schema = json!({"type": "object", "required": ["user"], "properties": {"max_tokens": {"maximum": 100}}});
    let guard = Guard::new(&[], Schemas { request: Some(schema), response: None }).unwrap();
    let check = |body: &str, expected: &str| {
        assert_eq!(show(&guard.request(body.as_bytes(), "application/json")), expected, "{body}");
    };
    check(r#"{"user": "a", "max_tokens": 10}"#, "");
    check(r#"{"max_tokens": 10}"#, "block schema the document breaks /required");
    check(r#"{"user": "a", "max_tokens": 1000}"#, "block schema /max_tokens breaks /properties/max_tokens/maximum");
    check("hello", "block schema the body is not JSON");
    check("", "");
}
