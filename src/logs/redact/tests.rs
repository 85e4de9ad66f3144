use serde_json::{Value, json};

use super::*;

pub(super) fn redactor() -> Redactor {
    Redactor::new(&Rules::default()).unwrap()
}

fn whole(text: &str) -> Body {
    Body { kept: Bytes::copy_from_slice(text.as_bytes()), size: text.len() as u64 }
}

pub(super) fn clean(text: &str) -> String {
    let kept = redactor().body(&whole(text), "");
    kept.map_or_else(|| text.to_owned(), |kept| String::from_utf8(kept.to_vec()).unwrap())
}

/// Letters and digits that look like chance, of some length. Made here, so that no list of keys lies in the source.
fn noise(length: usize, seed: u64) -> String {
    const LETTERS: &[u8] = b"AbCdEfGhIjKlMnOpQrStUvWxYz0123456789aBcDeFgHiJkLmNoPqRsTuVwXyZ9876543210";
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        LETTERS[(state >> 33) as usize % LETTERS.len()] as char
    };
    // A digit and a letter are always among them.
    format!("7{}q", (2..length).map(|_| next()).collect::<String>())
}

fn hex(length: usize) -> String {
    "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9"[..length].to_owned()
}

/// A card whose last digit makes it pass Luhn's test.
fn card(start: &str, length: usize) -> String {
    let mut digits = format!("{start}{}", &"1234567890123456789"[..length - 1 - start.len()]);
    let sum: u32 = digits
        .bytes()
        .rev()
        .enumerate()
        .map(|(at, digit)| {
            let digit = u32::from(digit - b'0') * if at % 2 == 0 { 2 } else { 1 };
            digit / 10 + digit % 10
        })
        .sum();
    digits.push(char::from(b'0' + ((10 - sum % 10) % 10) as u8));
    digits
}

fn grouped(digits: &str, sign: &str) -> String {
    digits.as_bytes().chunks(4).map(|part| std::str::from_utf8(part).unwrap()).collect::<Vec<_>>().join(sign)
}

/// What must never be seen again.
pub(super) fn secrets() -> Vec<String> {
    let upper = |length: usize| noise(length, 5).to_uppercase();
    let mut secrets = vec![
        format!("sk-{}", noise(48, 1)),
        format!("sk-proj-{}-{}_{}", noise(40, 2), noise(30, 3), noise(20, 4)),
        format!("sk-ant-api03-{}-{}AA", noise(60, 5), noise(30, 6)),
        format!("sk-or-v1-{}", hex(64)),
        format!("sk_live_{}", noise(24, 7)),
        format!("rk_test_{}", noise(24, 8)),
        format!("sk_{}", hex(48)),
        format!("AIza{}", noise(35, 9)),
        format!("AKIA{}", upper(16)),
        format!("ASIA{}", upper(16)),
        format!("ghp_{}", noise(36, 10)),
        format!("gho_{}", noise(36, 11)),
        format!("ghs_{}", noise(36, 12)),
        format!("github_pat_{}_{}", noise(22, 13), noise(59, 14)),
        format!("glpat-{}", noise(20, 15)),
        format!("xoxb-123456789012-1234567890123-{}", noise(24, 16)),
        format!("xoxp-12345-67890-{}", noise(24, 17)),
        format!("xapp-1-A012345-{}", noise(30, 18)),
        format!("gsk_{}", noise(52, 19)),
        format!("hf_{}", noise(34, 20)),
        format!("r8_{}", noise(37, 21)),
        format!("pplx-{}", noise(48, 22)),
        format!("xai-{}", noise(80, 23)),
        format!("csk-{}", noise(48, 24)),
        format!("nvapi-{}", noise(64, 25)),
        format!("SG.{}.{}", noise(22, 26), noise(43, 27)),
        format!("npm_{}", noise(36, 28)),
        format!("dop_v1_{}", hex(64)),
        format!("ya29.{}", noise(60, 29)),
        format!("GOCSPX-{}", noise(28, 30)),
        format!("123456789:AA{}", noise(33, 31)),
        format!("eyJ{}.eyJ{}.{}", noise(30, 32), noise(80, 33), noise(43, 34)),
    ];
    let addresses = [
        "ann@example.com",
        "ann.lee+news@mail.example.co.uk",
        "A.B-C_d%e@sub.domain.org",
        "x@y.io",
        "jörg.müller@beispiel.de",
        "o'neil@example.ie",
        "иван@пример.рф",
        "1234567@numbers.net",
        "root@example.photography",
    ];
    let phones = [
        "+14155552671",
        "+1 415 555 2671",
        "+1 (415) 555-2671",
        "+1-415-555-2671",
        "+44 20 7946 0958",
        "+49 (0)30 901820",
        "+33 6 12 34 56 78",
        "+91 98765 43210",
        "+55 11 91234-5678",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "1-800-356-9377",
        "0171 1234567",
        "020 7946 0958",
        "0049 30 123456",
        "06 12 34 56 78",
        "07700 900123",
        "(030) 9018200",
    ];
    secrets.extend([addresses.as_slice(), &phones].concat().into_iter().map(str::to_owned));
    for digits in [
        card("4", 16),
        card("51", 16),
        card("2221", 16),
        card("37", 15),
        card("6011", 16),
        card("36", 14),
        card("62", 19),
    ] {
        secrets.extend([grouped(&digits, " "), grouped(&digits, "-"), digits]);
    }
    secrets
}

/// Ways in which secrets are met. `S` is where one stands; the flag says whether the text is one that JSON can hold.
fn dressings(secret: &str) -> Vec<String> {
    let escaped: String = secret.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
    let at = secret.replace('@', "\\u0040").replace('-', "\\u002d");
    let nested = json!({ "to": secret }).to_string();
    vec![
        secret.to_owned(),
        format!("Please use {secret} for this."),
        format!("({secret}), or so"),
        format!("first\n{secret}\nlast"),
        format!("`{secret}`"),
        format!("x = \"{secret}\";"),
        format!("你好:{secret} 谢谢"),
        json!({ "messages": [{ "role": "user", "content": format!("it is {secret}.") }] }).to_string(),
        json!({ "a": [1, 2.5, secret, null] }).to_string(),
        json!({ "content": format!("line\n{secret}\n\"quoted\"") }).to_string(),
        format!("{{\"a\":\"{escaped}\"}}"),
        format!("{{\"a\" : \"see {at} there\"}}"),
        json!({ "arguments": nested }).to_string(),
        json!({ "arguments": json!({ "inner": format!("a\nb\t{secret}") }).to_string() }).to_string(),
        json!({ "arguments": json!({ "deep": json!({ "x": format!("\n{secret}") }).to_string() }).to_string() })
            .to_string(),
        json!({ secret: 1 }).to_string(),
    ]
}

/// Whether a secret can be read from what is left, as it is written or as it is meant.
pub(super) fn shows(text: &str, secret: &str) -> bool {
    let core: String = secret.chars().filter(|letter| letter.is_alphanumeric()).collect();
    let plain = |text: &str| text.chars().filter(|letter| letter.is_alphanumeric()).collect::<String>();
    let mut level = text.to_owned();
    for _ in 0..4 {
        if plain(&level).contains(&core) {
            return true;
        }
        level = Text::plain(&level, 0..level.len()).text;
    }
    false
}

#[test]
fn no_secret_is_missed_in_any_dressing() {
    let (mut tried, mut missed) = (0, Vec::new());
    for secret in secrets() {
        for dressed in dressings(&secret) {
            let left = clean(&dressed);
            tried += 1;
            if shows(&left, &secret) {
                missed.push(format!("{secret} in {dressed} left {left}"));
            }
            if serde_json::from_str::<Value>(&dressed).is_ok_and(|value| !value.is_number()) {
                assert!(serde_json::from_str::<Value>(&left).is_ok(), "{dressed} is no JSON any more: {left}");
            }
        }
    }
    assert!(tried > 1000, "{tried}");
    assert!(missed.is_empty(), "{} of {tried} missed:\n{}", missed.len(), missed.join("\n"));
}

#[test]
fn secrets_with_a_name_or_a_scheme_before_them_are_found() {
    let long = noise(40, 50);
    let rows = [
        (format!("Authorization: Bearer {long}"), long.as_str()),
        (format!("curl -H 'authorization: bearer {long}' https://x"), &long),
        (format!("Authorization: Basic {}==", &long[..38]), &long[..38]),
        (format!("Authorization:Token {long}"), &long),
        (format!("api_key={long}&x=1"), &long),
        (format!("OPENAI_API_KEY={long}"), &long),
        (format!("export AWS_SECRET_ACCESS_KEY=\"{long}\""), &long),
        (format!("\"x-api-key\": \"{long}\""), &long),
        (format!("client_secret: {long}"), &long),
        ("password: hunter2x".to_owned(), "hunter2x"),
        ("PASSWORD = 'Tr0ub4dor&3'".to_owned(), "Tr0ub4dor"),
        (format!("AccountKey={long}==;EndpointSuffix=core"), &long),
        (format!("?access_token={long}"), &long),
        (format!("Bearer%20{long}"), &long),
        ("postgres://app:s3cretpw@localhost:5432/db".to_owned(), "s3cretpw"),
        ("https://bot:hunter22@example.com/x".to_owned(), "hunter22"),
        (format!("https://hooks.slack.com/services/T00000000/B00000000/{}", noise(24, 51)), "B00000000"),
        ("email=ann%40example.com&x=1".to_owned(), "example.com"),
        (json!({ "api_key": long, "other": 1 }).to_string(), &long),
        (json!({ "auth": { "password": "hunter2" } }).to_string(), "hunter2"),
        (json!({ "headers": { "Authorization": format!("Bearer {long}") } }).to_string(), &long),
        (json!({ "phone": "4155552671" }).to_string(), "4155552671"),
        (json!({ "mobileNumber": 4_155_552_671_u64 }).to_string(), "4155552671"),
        (json!({ "card": 4_111_111_111_111_111_u64 }).to_string(), "4111111111111111"),
        ("call me at 555 1234 today".to_owned(), "555 1234"),
        ("Tel: 030 901820".to_owned(), "901820"),
        ("my phone number is 4155552671".to_owned(), "4155552671"),
    ];
    for (text, secret) in rows {
        let left = clean(&text);
        assert!(!left.contains(secret), "{text} left {left}");
        assert_eq!(
            serde_json::from_str::<Value>(&text).is_ok(),
            serde_json::from_str::<Value>(&left).is_ok(),
            "{left}"
        );
    }
    for (begin, end) in [
        ("RSA PRIVATE KEY", "RSA PRIVATE KEY"),
        ("PRIVATE KEY", "PRIVATE KEY"),
        ("OPENSSH PRIVATE KEY", "OPENSSH PRIVATE KEY"),
    ] {
        let body = format!("{}\n{}", noise(64, 60), noise(64, 61));
        let pem = format!("before\n-----BEGIN {begin}-----\n{body}\n-----END {end}-----\nafter");
        for text in [
            pem.clone(),
            json!({ "key": pem }).to_string(),
            json!({ "a": json!({ "key": pem }).to_string() }).to_string(),
        ] {
            let left = clean(&text);
            assert!(!left.contains(&noise(64, 60)) && !left.contains(&noise(64, 61)), "{left}");
            assert!(left.contains("before") && left.contains("after"), "{left}");
        }
        assert!(!clean(&pem[..100]).contains(&noise(64, 60)[..20]), "one without an end too");
    }
}

/// What looks a little like a secret and is none.
fn innocents() -> Vec<String> {
    let written = "\
        @cf/meta/llama-3.1-8b-instruct|@anthropic-ai/sdk|@types/node@20.1.0|lodash@4.17.21|user@host|git@github.com:org/repo.git|icon@2x.png\
        |a @ b|@everyone|meet @ 5pm|foo@|@media (max-width: 600px)|x@y|name@localhost|logo@3x.webp|3 @ 4.50|@property|@Override|@app.route('/')\
        |risk-management-and-compliance-2024|task-list-item-17-of-the-big-plan|sk-learn|the disk-usage-report-for-2023-q4|ask-me-anything-2024-edition\
        |sk-|sk-test|scikit-learn==1.3.2|desk-lamp-with-3-levels-of-light|mask-rcnn-resnet50-fpn-v2-coco|sk-a-b-c-1-2-3-d-e-f|AKIA|AIza\
        |AKIRA is a film of 1988|ghp_short|github_pat_|xoxb-|hf_hub_download|gsk_abc|npm_config_registry|npm_lifecycle_event|eyJ|eyJhbGciOi\
        |-----BEGIN CERTIFICATE-----|-----BEGIN PUBLIC KEY-----|Bearer of bad news|the bearer bonds of 1929|bearer token authentication\
        |Authorization: Bearer <token>|Authorization: Bearer $TOKEN|Authorization: Bearer YOUR_API_KEY|Bearer ${{ secrets.KEY }}|basic understanding\
        |Basic concepts of law|basic training 2024|token: string|max_tokens: 4096|prompt_tokens=1234|\"total_tokens\": 55|token_type: bearer\
        |password: string|password = getenv(\"DB_PASSWORD\")|password: ********|api_key = os.environ[\"OPENAI_API_KEY\"]|api_key=YOUR_KEY\
        |secret santa 2024|a secret: keep it|the password is required|token = tokenizer.encode(text1)|apiKey: process.env.API_KEY2|secret: null\
        |private_key: /run/secrets/key1|access_key: <none>|credential: missing|passwd file|pwd: /home/user1|token = next(tokens)\
        |const token = await getToken(user1)|secret=false|token: undefined|authorization: none\
        |2024-01-15|2024-01-15T10:30:00Z|2024-01-15 10:30:00.123456|15/01/2024|01.02.2024|01-02-2024 03:04:05|1700000000|1700000000123\
        |1700000000123456|1700000000123456789|0.123456789012345|3.14159265358979|-0.0000123456|1e-10|6.02214076e23|1,234,567|1 234 567\
        |12345678|123456789|1234567890|12345678901234|123456789012345678|4111111111111112|1234567812345678|0000000000000000|4242|5555-1234\
        |192.168.1.1|10.0.0.255:8080|255.255.255.255|2001:db8::ff00:42:8329|127.0.0.1|172.16.254.1/24|fe80::1|0.0.0.0\
        |550e8400-e29b-41d4-a716-446655440000|123e4567-e89b-12d3-a456-426614174000|00000000-0000-0000-0000-000000000000\
        |d41d8cd98f00b204e9800998ecf8427e|da39a3ee5e6b4b0d3255bfef95601890afd80709|sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\
        |v1.2.3|1.2.3-beta.4|version 10.15.7|Python 3.11.4|Chrome/120.0.6099.109|5.15.0-91-generic|rustc 1.75.0 (82e1608df 2023-12-21)\
        |ISBN 978-0-306-40615-7|978-3-16-148410-0|10.1000/182|arXiv:2301.12345|RFC 7231|PMID 12345678|AA-12-3456|SKU-415-555-2671\
        |02139-4307|90210-1234|SW1A 1AA|D-10115 Berlin|order 1234567890|invoice #415-555-2671|$415-555-2671|build.415-555-2671\
        |100-200|1-2-3-4-5-6-7|10-20-30|7 8 9 10 11 12|1 2 3 4 5 6 7 8 9 10|100 200 300|12 345 678|1.000.000,50|100 000 000 000\
        |+1|+100|+0.12345678|a +1234 b|x+12345678|1 + 12345678|+1.23456789|+100 000 000|C++ 20170301|+++|+-12|3+4155552671\
        |(1234567)|f(415) 555|(2024) 123|foo(123, 456, 7890)|range(100000000)|(1, 2, 3)|[1000, 2000, 3000]|{\"x\": 1234567}\
        |mobile 1200000 users|the phone cost 999|call 911|cell 12 of row 3|fax machines of 1985|dial 0|text me in 2024|sms 160\
        |2024/01/15/12|1/2/2024|50/50|24/7|9-5|16:9|3840x2160|1920x1080@60|4K@120Hz|100%|99.999%|1:1000|5'11\"\
        |#1234567|#ff00ff|0xdeadbeef|0x7fff5fbff8c0|0b10101010|0o755|1_000_000|1_000_000_000_000|9007199254740993|18446744073709551615\
        |gpt-4o-2024-08-06|claude-3-5-sonnet-20241022|text-embedding-3-small|gemini-1.5-pro-002|llama-3.1-405b-instruct-fp8|o1-2024-12-17\
        |chatcmpl-9a8b7c6d5e4f3a2b1c0d|msg_01XFDUDYJgAACzvnptvVoYEL|req_0123456789abcdef|call_abc123DEF456|run_7f3e|thread_abc123|toolu_01A09q90qw90lq917835lq9\
        |https://example.com/path?x=1234567890&y=2|http://localhost:8080/v1/chat|https://example.com/a@b/c|file:///etc/hosts|s3://bucket/2024/01/15\
        |data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==\
        |SELECT * FROM users WHERE id = 12345678|INSERT INTO t VALUES (1, 2.5, 'x')|git commit -m 'fix 12345678'|kill -9 12345|chmod 0644 file\
        |for i in range(0, 1000000, 1000):|let x: u64 = 1 << 40;|a[i] * b[j] + c[k]|if (x >= 100 && y <= 200)|x = 1234.5678|0,1,2,3,4,5,6,7,8,9\
        |lat 52.520008, lon 13.404954|-122.419416,37.774929|GPS 40.7128 -74.0060|12h 34m 56s|T+00:12:34|UTC+0530|GMT-08:00\
        |Room 415, 555 Main Street|In 1984, 2001 and 2049|pp. 123-145|Lev. 19:18|Section 4.1.2.3|Fig. 12-34|No. 5, Op. 67|64 KiB, 128 MiB";
    written.split('|').map(str::to_owned).collect()
}

#[test]
fn few_innocent_texts_are_taken_for_secrets() {
    let innocents = innocents();
    let mut wrong = Vec::new();
    for text in &innocents {
        for dressed in
            [text.clone(), format!("It says {text} there."), json!({ "content": text, "n": 1_700_000_000 }).to_string()]
        {
            let left = clean(&dressed);
            if left != dressed {
                wrong.push(format!("{dressed} became {left}"));
            }
        }
    }
    assert!(innocents.len() >= 200, "{}", innocents.len());
    // Of some seven hundred.
    assert!(wrong.len() <= 3, "{} false alarms of {}:\n{}", wrong.len(), innocents.len() * 3, wrong.join("\n"));
}

#[test]
fn what_is_no_text_is_left_alone_but_for_the_text_beside_it_in_a_form() {
    let redactor = redactor();
    let picture = b"\x89PNG\r\n\x1a\n\0\0 ann@example.com \xff\xfe".to_vec();
    let body = |kept: Vec<u8>| Body { size: kept.len() as u64, kept: kept.into() };
    assert_eq!(redactor.body(&body(picture.clone()), "image/png"), None);
    let part = |name: &str, bytes: &[u8]| {
        [format!("--B7\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n").as_bytes(), bytes, b"\r\n"].concat()
    };
    let form = [part("file", &picture), part("prompt", b"write to ann@example.com"), b"--B7--\r\n".to_vec()].concat();
    let left = redactor.body(&body(form), "multipart/form-data; boundary=B7").unwrap();
    let wanted =
        [part("file", &picture), part("prompt", b"write to [REDACTED:email]"), b"--B7--\r\n".to_vec()].concat();
    assert_eq!(left, wanted);
}

#[test]
fn what_is_clean_is_not_copied_and_a_record_is_cleaned_as_a_whole() {
    let redactor = redactor();
    let mut record = crate::logs::store::tests::record(1_700_000_000_000, 1);
    let before = record.clone();
    assert!(!redactor.apply(&mut record));
    assert_eq!(record, before);
    assert_eq!(record.asked.kept.as_ptr(), before.asked.kept.as_ptr());
    record.asked = whole(r#"{"a":"ann@example.com"}"#);
    record.answered = Body { kept: Bytes::from_static(b"{\"a\":\"ann@exam"), size: 500 };
    record.metadata = Some(r#"{"who":"ann@example.com","n":1}"#.into());
    record.path = "v1/users/ann@example.com".into();
    record.event = Some("ann@example.com".into());
    record.user_agent = Some("bot (+ann@example.com)".into());
    assert!(redactor.apply(&mut record));
    assert_eq!(record.asked, whole(r#"{"a":"[REDACTED:email]"}"#));
    assert_eq!((&record.answered.kept[..], record.answered.is_complete()), (&b"{\"a\":\"[REDACTED:cut]"[..], false));
    assert_eq!(record.metadata.as_deref(), Some(r#"{"who":"[REDACTED:email]","n":1}"#));
    assert_eq!(&*record.path, "v1/users/[REDACTED:email]");
    assert_eq!(record.event.as_deref(), Some("[REDACTED:email]"));
    assert!(!record.user_agent.as_deref().unwrap().contains("ann"));
}

#[test]
fn rules_are_switched_and_added() {
    let text = "ann@example.com, 415-555-2671, EMP-00042, sk-abcdefghijklmnop1234";
    let check = |rules: Rules, wanted: &str| assert_eq!(Redactor::new(&rules).unwrap().text(text), wanted);
    let none = Rules { keys: false, emails: false, cards: false, phones: false, custom: Vec::new() };
    check(none.clone(), text);
    check(Rules { emails: true, ..none.clone() }, "[REDACTED:email], 415-555-2671, EMP-00042, sk-abcdefghijklmnop1234");
    check(
        Rules { phones: true, ..none.clone() },
        "ann@example.com, [REDACTED:phone], EMP-00042, sk-abcdefghijklmnop1234",
    );
    check(Rules { keys: true, ..none.clone() }, "ann@example.com, 415-555-2671, EMP-00042, [REDACTED:key]");
    let rule = |pattern: &str, replacement: Option<&str>| Rule {
        name: "employee".into(),
        pattern: pattern.into(),
        replacement: replacement.map(Into::into),
    };
    let custom = |rule: Rule| Rules { custom: vec![rule], ..none.clone() };
    check(
        custom(rule(r"EMP-\d+", None)),
        "ann@example.com, 415-555-2671, [REDACTED:employee], sk-abcdefghijklmnop1234",
    );
    check(custom(rule(r"EMP-\d+", Some("someone"))), "ann@example.com, 415-555-2671, someone, sk-abcdefghijklmnop1234");
    let redactor = Redactor::new(&custom(rule(r".+", Some("x")))).unwrap();
    assert_eq!(
        redactor.text(r#"{"a":"one\n\"two\"","b":[2,"three"]}"#),
        r#"{"x":"x\nx","x":[2,"x"]}"#,
        "never more than one string"
    );
    for (wrong, words) in
        [(rule("(", None), "regular expression"), (rule("x*", None), "empty"), (rule("x", Some("\"")), "quotes")]
    {
        let error = Redactor::new(&custom(wrong)).err().unwrap();
        assert!(error.message().contains(words) && error.message().contains("employee"), "{error}");
    }
}

mod whatever_it_is {
    use proptest::prelude::*;

    use super::*;

    /// Any JSON whose texts hold secrets here and there.
    fn document() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            ".{0,20}",
            Just("ann@example.com".to_owned()),
            Just("a\n\"sk-abcdefghijklmnop1234\" \u{1F600}é".to_owned())
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            text.prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec(("[a-z]{1,6}", inner), 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn json_stays_json_and_holds_no_secret(document in document(), is_wrapped in any::<bool>()) {
            let value = if is_wrapped { json!({ "arguments": document.to_string() }) } else { document };
            let left = clean(&value.to_string());
            prop_assert!(serde_json::from_str::<Value>(&left).is_ok(), "{left}");
            prop_assert!(!left.contains("ann@example.com") && !left.contains("sk-abcdef"), "{left}");
        }

        #[test]
        fn any_text_cut_anywhere_is_survived(text in "(\\PC|[\"\\\\{}:,@+\\[\\]\n]|data:|\\\\u00|eyJ|sk-|[0-9]){0,60}", cut in 0..400usize) {
            let kept = Bytes::copy_from_slice(&text.as_bytes()[..text.len().min(cut)]);
            let body = Body { size: text.len() as u64, kept };
            if let Some(left) = redactor().body(&body, "multipart/form-data; boundary=x") {
                prop_assert!(std::str::from_utf8(&left).is_ok());
            }
        }
    }
}
