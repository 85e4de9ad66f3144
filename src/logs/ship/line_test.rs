use std::io::Write as _;
use std::process::{Command, Stdio};

use aes_gcm::aead::{Aead, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::base::{AccountId, KeyId, Neurons, RequestId};
use crate::logs::record::CacheUse;
use crate::task::{Task, Usage};

pub(in crate::logs::ship) fn body(bytes: impl AsRef<[u8]>) -> Body {
    let kept = bytes::Bytes::copy_from_slice(bytes.as_ref());
    Body { size: kept.len() as u64, kept }
}

/// A call in which everything is known.
pub(in crate::logs::ship) fn sample() -> Record {
    Record {
        id: LogId::parse("01HF7YAT00ABCDEFGHJKMNPQRS"),
        request: RequestId::from_number(7),
        at: Millis(1_750_000_000_123),
        account: AccountId::new("acme"),
        key: Some(KeyId::new("ada")),
        gateway: "g".into(),
        provider: "openai".into(),
        model: "gpt-4.1".into(),
        task: Some(Task::TextGeneration),
        path: "v1/chat/completions".into(),
        status: 200,
        success: true,
        cache: CacheUse::Miss,
        duration_us: 1_234_567,
        first_byte_us: Some(250_001),
        usage: Some(Usage { prompt_tokens: 10, cached_tokens: 4, completion_tokens: 20, ..Usage::default() }),
        cost: Neurons::from_micro(1_500_000),
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 1,
        request_type: "http".into(),
        request_content_type: Some("application/json".into()),
        response_content_type: Some("text/event-stream".into()),
        metadata: Some(r#"{"user":"a \"b\"","n":1}"#.into()),
        trace: None,
        zero_retention: false,
        event: Some("ev-1".into()),
        user_agent: Some("curl/8".into()),
        authenticated: true,
        stored_key: true,
        attempts: "openai=200".into(),
        why: None,
        findings: vec!["pii".into(), "x\ny".into()],
        asked: body(r#"{"q":"hi\n"}"#),
        answered: body("data: {}\n\n"),
    }
}

fn written(record: &Record, key: Option<&PublicKey>) -> String {
    let mut block = Vec::new();
    encode(record, record.id.unwrap(), key, &mut block);
    let (parts, rest) = next(&block).unwrap();
    assert_eq!((parts.at, parts.account, rest.len()), (record.at, record.account.as_str().as_bytes(), 0));
    let line = String::from_utf8(Renderer::default().line(&parts).unwrap().to_vec()).unwrap();
    assert_eq!(line.find('\n'), Some(line.len() - 1), "one line: {line:.200}");
    line
}

fn read(record: &Record) -> Value {
    serde_json::from_str(&written(record, None)).unwrap()
}

#[test]
fn a_line_says_everything_that_the_record_does() {
    let expected = r#"{
        "Id": "01HF7YAT00ABCDEFGHJKMNPQRS",
        "CreatedAt": "2025-06-15T15:06:40.123Z",
        "Account": "acme",
        "Gateway": "g",
        "Token": "ada",
        "RequestId": "00000000-0000-0000-0000-000000000007",
        "EventId": "ev-1",
        "Provider": "openai",
        "Model": "gpt-4.1",
        "ModelType": "text-generation",
        "Endpoint": "v1/chat/completions",
        "StatusCode": 200,
        "Success": true,
        "Cached": false,
        "CacheStatus": "miss",
        "RateLimited": false,
        "Duration": 1235,
        "TokensIn": 10,
        "TokensOut": 20,
        "Cost": 0.0000165,
        "CustomCost": false,
        "SavedCost": 0,
        "Step": 1,
        "RequestType": "http",
        "RequestContentType": "application/json",
        "ResponseContentType": "text/event-stream",
        "RequestSize": 12,
        "ResponseSize": 10,
        "Feedback": null,
        "Score": null,
        "UserAgent": "curl/8",
        "Authentication": true,
        "Wholesale": false,
        "Byok": true,
        "Attempts": "openai=200",
        "Error": null,
        "Findings": ["pii", "x\ny"],
        "UsageMetadata": { "CachedTokensIn": 4 },
        "Timings": { "FirstByte": 250.001, "Total": 1234.567 },
        "RequestBodyComplete": true,
        "ResponseBodyComplete": true,
        "Metadata": { "user": "a \"b\"", "n": 1 },
        "RequestBody": "{\"q\":\"hi\\n\"}",
        "ResponseBody": "data: {}\n\n"
    }"#;
    let expected: Value = serde_json::from_str(expected).unwrap();
    let line = read(&sample());
    assert_eq!(line, expected);
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&line), names(&expected), "in this order");
}

#[test]
fn what_is_not_known_is_null_and_the_caller_of_a_hit_paid_nothing() {
    let record = Record {
        key: None,
        task: None,
        usage: None,
        first_byte_us: None,
        request_content_type: None,
        response_content_type: None,
        metadata: None,
        event: None,
        user_agent: None,
        cost: Neurons::ZERO,
        saved: Neurons::from_micro(1),
        cache: CacheUse::Coalesced,
        status: 429,
        success: false,
        why: Some(Kind::RateLimited.as_str().into()),
        findings: Vec::new(),
        ..sample()
    };
    let line = read(&record);
    let nulls =
        ["Token", "ModelType", "TokensIn", "TokensOut", "RequestContentType", "ResponseContentType", "UserAgent"];
    assert!(nulls.iter().all(|name| line[name] == Value::Null), "{line}");
    assert_eq!(
        (&line["Cached"], &line["RateLimited"], &line["Error"]),
        (&json!(true), &json!(true), &json!("rate_limited"))
    );
    assert_eq!((&line["Metadata"], &line["Findings"], &line["EventId"]), (&json!({}), &json!([]), &line["Id"]));
    assert_eq!(line["Timings"]["FirstByte"], Value::Null);
    assert!(written(&record, None).contains(r#""Cost":0,"CustomCost":false,"SavedCost":0.000000000011,"#));
}

#[test]
fn amounts_are_written_to_the_last_digit() {
    for (micro, expected) in [
        (0, "0"),
        (1, "0.000000000011"),
        (1_000_000, "0.000011"),
        (1_000_000_000, "0.011"),
        (1_000_000_000_000_000, "11000"),
        (u64::MAX, "202914184.810805067765"),
    ] {
        let line = written(&Record { cost: Neurons::from_micro(micro), ..sample() }, None);
        assert!(line.contains(&format!("\"Cost\":{expected},")), "{micro}: {line}");
    }
}

#[test]
fn metadata_that_is_no_object_on_one_line_is_left_out() {
    for (text, expected) in [
        (r#"{"a":[1,{"b":null}]}"#, json!({"a": [1, {"b": null}]})),
        ("{\"a\":\n1}", json!({})),
        ("{\"a\":1", json!({})),
        ("[1]", json!({})),
        ("", json!({})),
        (r#"{"a":1},"Id":{}"#, json!({})),
    ] {
        assert_eq!(read(&Record { metadata: Some(text.into()), ..sample() })["Metadata"], expected, "{text}");
    }
}

#[test]
fn a_body_is_text_or_said_to_be_base64() {
    let check = |kept: &[u8], size: u64, text: &str, encoding: Value, complete: bool| {
        let answered = Body { kept: bytes::Bytes::copy_from_slice(kept), size };
        let line = read(&Record { answered, ..sample() });
        assert_eq!(line["ResponseBody"], text, "{kept:?}");
        let said = line.get("ResponseBodyEncoding").cloned().unwrap_or_default();
        assert_eq!((said, &line["ResponseBodyComplete"]), (encoding, &json!(complete)), "{kept:?}");
    };
    check(b"", 0, "", Value::Null, true);
    check(b"", 900, "", Value::Null, false);
    check(
        "gr\u{fc}n \u{1f600}\u{0}\u{1f}\u{7f}\u{2028}\"\\".as_bytes(),
        18,
        "gr\u{fc}n \u{1f600}\u{0}\u{1f}\u{7f}\u{2028}\"\\",
        Value::Null,
        true,
    );
    check(b"gr\xc3", 90, "gr", Value::Null, false);
    check(b"gr\xc3", 3, "Z3LD", json!("base64"), true);
    check(b"\xff\xfe", 2, "//4=", json!("base64"), true);
}

#[test]
fn no_line_is_longer_than_a_megabyte_and_what_is_cut_is_marked() {
    let key = PublicKey::parse(&openssl(&["rsa", "-pubout"], private_key().as_bytes())).unwrap();
    let bodies: [(&str, Vec<u8>); 6] = [
        ("short", b"abc".to_vec()),
        ("plain", vec![b'a'; 3_000_000]),
        ("quotes", b"\"".repeat(700_000)),
        ("controls", vec![1; 2_000_000]),
        ("wide", "\u{1f600}".repeat(300_000).into_bytes()),
        ("binary", [[0xff, b'a', 0]; 400_000].concat()),
    ];
    for (asked_name, asked) in &bodies {
        for (answered_name, answered) in &bodies {
            for key in [None, Some(&key)] {
                let record = Record { asked: body(asked), answered: body(answered), ..sample() };
                let line = written(&record, key);
                let why = format!("{asked_name} {answered_name} {}: {}", key.is_some(), line.len());
                assert!(line.len() <= LINE, "{why}");
                let value: Value = serde_json::from_str(&line).unwrap();
                let complete = ["RequestBodyComplete", "ResponseBodyComplete"].map(|name| value[name] == true);
                if complete == [true, true] {
                    continue;
                }
                assert!(line.len() > LINE - 400, "what there is room for is kept: {why}");
                let share = |name: &str| value[name].to_string().len();
                if complete == [false, false] {
                    let [a, b] = ["RequestBody", "ResponseBody"].map(share);
                    assert!(a.abs_diff(b) < 400, "half for each: {a} {b}, {why}");
                }
            }
        }
    }
    let line = read(&Record { answered: body(&bodies[4].1), asked: body("x"), ..sample() });
    let kept = line["ResponseBody"].as_str().unwrap();
    assert!(kept.chars().all(|letter| letter == '\u{1f600}') && kept.len() > 900_000, "cut between characters");
}

#[test]
fn a_sealed_record_is_opened_with_the_private_key_only() {
    let private = private_key();
    let public = openssl(&["rsa", "-pubout"], private.as_bytes());
    assert!((16..=1024).contains(&public.len()), "as a gateway takes it: {}", public.len());
    let key = PublicKey::parse(&public).unwrap();
    let record = Record { answered: body(b"\xff\x00 binary"), ..sample() };
    let (line, again) = (written(&record, Some(&key)), written(&record, Some(&key)));
    assert_ne!(line, again, "no key is used twice");
    let value: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&value["Model"], value.get("ResponseBodyEncoding")), (&json!("gpt-4.1"), None));
    for (name, expected) in [
        ("Metadata", record.metadata.as_deref().unwrap().as_bytes()),
        ("RequestBody", &*record.asked.kept),
        ("ResponseBody", &*record.answered.kept),
    ] {
        let part = |part: &str| STANDARD.decode(value[name][part].as_str().unwrap()).unwrap();
        let (wrapped, iv, data) = (part("key"), part("iv"), part("data"));
        assert_eq!((wrapped.len(), iv.len(), data.len()), (512, 12, expected.len() + TAG), "{name}");
        assert_eq!(opened(&private, &wrapped, &iv, &data), expected, "{name}");
    }
}

#[test]
fn a_key_that_seals_nothing_is_refused() {
    let short = openssl(&["genrsa", "1024"], b"");
    let curve = openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout"], b"");
    for pem in [
        String::new(),
        "-----BEGIN PUBLIC KEY-----".into(),
        private_key(),
        openssl(&["rsa", "-pubout"], short.as_bytes()),
        openssl(&["ec", "-pubout"], curve.as_bytes()),
    ] {
        let error = PublicKey::parse(&pem).unwrap_err();
        assert!(error.message().contains("openssl genrsa"), "{pem}: {error}");
    }
}

proptest! {
    #[test]
    fn any_body_comes_back_from_its_line(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "\\PC{0,40}") {
        let line = read(&Record { asked: body(&bytes), answered: body(&text), attempts: text.clone().into(), ..sample() });
        let asked = line["RequestBody"].as_str().unwrap();
        let read = match line.get("RequestBodyEncoding") {
            Some(_) => STANDARD.decode(asked).unwrap(),
            None => asked.as_bytes().to_vec(),
        };
        prop_assert_eq!(read, bytes);
        prop_assert_eq!(line["ResponseBody"].as_str().unwrap(), &*text);
        prop_assert_eq!(line["Attempts"].as_str().unwrap(), &*text);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut rest = &bytes[..];
        while let Some((_, after)) = next(rest) {
            rest = after;
        }
    }
}

/// A new key of 4096 bits.
fn private_key() -> String {
    openssl(&["genrsa", "4096"], b"")
}

/// Opens with OpenSSL what wraps the key, and with another implementation than the one that sealed what it locks.
fn opened(private: &str, wrapped: &[u8], iv: &[u8], data: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let [pem, sealed] = ["pem", "sealed"].map(|name| folder.path().join(name));
    std::fs::write(&pem, private).unwrap();
    std::fs::write(&sealed, wrapped).unwrap();
    let [pem, sealed] = [&pem, &sealed].map(|path| path.to_str().unwrap());
    let command =
        ["pkeyutl", "-decrypt", "-inkey", pem, "-in", sealed, "-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt"];
    let command: Vec<&str> = command.into_iter().chain(["rsa_oaep_md:sha256"]).collect();
    let key = output(&command, b"");
    assert_eq!(key.len(), 32);
    Aes256Gcm::new_from_slice(&key).unwrap().decrypt(Nonce::from_slice(iv), data).unwrap()
}

fn openssl(command: &[&str], input: &[u8]) -> String {
    String::from_utf8(output(command, input)).unwrap()
}

fn output(command: &[&str], input: &[u8]) -> Vec<u8> {
    let piped = || Stdio::piped();
    let mut child =
        Command::new("openssl").args(command).stdin(piped()).stdout(piped()).stderr(piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
