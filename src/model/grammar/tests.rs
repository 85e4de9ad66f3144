//! What comes out of a grammar is what was asked for: whatever is drawn among the allowed tokens.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::model::tests_support::demo_model;
use crate::model::text::TextModel;

/// Every byte is a token, and one ends an answer.
fn bytes() -> Grammars {
    let pieces = (0..=255u8).map(|byte| vec![byte]).chain([vec![]]);
    Grammars::new(Arc::new(Vocabulary::new(pieces, vec![256])), Vec::new())
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Draws among the allowed tokens until the answer is whole; towards its end after `wild` tokens. `None`: it did not end.
fn draw(grammar: &CompiledGrammar, vocabulary: &Vocabulary, random: &mut Random, wild: usize) -> Option<Vec<u32>> {
    let mut matcher = grammar.matcher();
    let mut answer = Vec::new();
    for step in 0..wild + 2_000 {
        matcher.prepare(&[]);
        let allowed: Vec<u32> = (0..vocabulary.len() as u32).filter(|&token| allows(matcher.mask(0), token)).collect();
        assert!(!allowed.is_empty(), "nothing may follow {:?}: {:?}", text(vocabulary, &answer), matcher.error());
        // What closes something, in the order in which it helps most.
        let closing = |token: &u32| match vocabulary.piece(*token) {
            _ if vocabulary.is_end(*token) => 0,
            b"\"" => 1,
            b"}" | b"]" => 2,
            b"," => 8,
            b"{" | b"[" => 7,
            [b'\\' | 0x80..] => 9,
            [b'0'..=b'9' | b'a'..=b'z', ..] => 5,
            piece if piece.len() == 1 => 6,
            _ => 10,
        };
        let token = if step < wild {
            let quick = allowed.iter().find(|&&token| closing(&token) < 3);
            // Half of all strings and objects end where they may.
            quick.filter(|_| random.below(8) == 0).copied().unwrap_or_else(|| allowed[random.below(allowed.len())])
        } else {
            *allowed.iter().min_by_key(|token| (closing(token), random.0 ^ u64::from(**token))).unwrap()
        };
        let ends = vocabulary.is_end(token);
        if !ends {
            answer.push(token);
        }
        matcher.accept(token);
        assert!(matcher.error().is_none(), "{:?} after {:?}", matcher.error(), text(vocabulary, &answer));
        if ends || matcher.is_complete() {
            return Some(answer);
        }
        if step > wild {
            random.below(2);
        }
    }
    None
}

fn text(vocabulary: &Vocabulary, tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocabulary.piece(token)).copied().collect();
    String::from_utf8(bytes).unwrap_or_else(|error| format!("not UTF-8: {error}"))
}

/// Some answers under a grammar, over bytes.
fn answers(grammar: &Grammar, count: u64) -> Vec<String> {
    let grammars = bytes();
    let compiled = grammars.compile_now(grammar).unwrap();
    let mut random = Random(0x9e37_79b9);
    (0..count)
        .map(|at| {
            let tokens = draw(&compiled, &grammars.vocabulary, &mut random, at as usize * 7 % 60).expect("an end");
            text(&grammars.vocabulary, &tokens)
        })
        .collect()
}

#[test]
fn json_mode_writes_objects_and_nothing_else() {
    for answer in answers(&Grammar::Json, 40) {
        // As text: numbers beyond a double's range are JSON too.
        let document = serde_json::from_str::<&serde_json::value::RawValue>(&answer);
        assert!(document.is_ok_and(|document| document.get().starts_with('{')), "{answer}");
    }
}

#[test]
fn every_kind_of_grammar_is_kept_to() {
    let check = |grammar: Grammar, good: &dyn Fn(&str) -> bool| {
        for answer in answers(&grammar, 20) {
            assert!(good(&answer), "{grammar:?} wrote {answer:?}");
        }
    };
    let pattern = regex::Regex::new("^[a-f]{2,5}-(?:x|yz)+$").unwrap();
    check(Grammar::Regex("[a-f]{2,5}-(x|yz)+".to_owned()), &|answer| pattern.is_match(answer));
    check(Grammar::Regex("^[a-f]{2,5}-(x|yz){1,9}$".to_owned()), &|answer| pattern.is_match(answer));
    let texts = ["yes", "yes, but", "no\n", "(maybe)"];
    check(Grammar::Choice(texts.map(str::to_owned).to_vec()), &|answer| texts.contains(&answer));
    let lark = "start: \"(\" start \")\" | NUMBER\nNUMBER: /[0-9]{1,3}/";
    check(Grammar::Lark(lark.to_owned()), &|answer| {
        let open = answer.len() - answer.trim_start_matches('(').len();
        let bare = answer.trim_start_matches('(').trim_end_matches(')');
        answer.len() == 2 * open + bare.len() && bare.parse::<u16>().is_ok()
    });
    let lark = r#"start: "call " %json {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": false}"#;
    check(Grammar::Lark(lark.to_owned()), &|answer| {
        let json = answer.strip_prefix("call ").unwrap_or_default();
        serde_json::from_str::<Value>(json).is_ok_and(|value| value["x"].is_i64())
    });
}

#[test]
fn a_bad_grammar_is_an_error_with_a_reason() {
    let grammars = bytes();
    for (grammar, words) in [
        (Grammar::Regex("(".to_owned()), "unclosed group"),
        (Grammar::Regex("(a)\\1".to_owned()), "backreferences"),
        (Grammar::Regex("a^b".to_owned()), "The regular expression cannot be used"),
        (Grammar::Lark("start: nowhere".to_owned()), "nowhere"),
        (Grammar::Lark(String::new()), "The grammar cannot be used"),
        (Grammar::JsonSchema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "minimum"),
        (Grammar::JsonSchema(json!({"type": "text"})), "Invalid type"),
        (Grammar::JsonSchema(json!({"oneOf": [{"minimum": 1}, {"maximum": 9}]})), "oneOf"),
    ] {
        let error = grammars.compile_now(&grammar).err().unwrap_or_else(|| panic!("{grammar:?} compiled"));
        assert!(matches!(error.kind(), Kind::BadInput | Kind::Unsupported), "{error:?}");
        assert!(error.message().contains(words), "{grammar:?}: {error}");
        assert!(!error.message().contains("<non-verbose"), "{error}");
    }
}

#[test]
fn a_draft_has_a_mask_a_row_and_leaves_no_trace() {
    let grammars = bytes();
    for lark in ["start: \"ab\" (\"c\" | \"de\")", "start: \"ab\" x\nx[stop=\"!\"]: /c|de/"] {
        let compiled = grammars.compile_now(&Grammar::Lark(lark.to_owned())).unwrap();
        let mut matcher = compiled.matcher();
        let allowed = |matcher: &Matcher, row: usize| -> String {
            (0..=256u32)
                .filter(|&token| allows(matcher.mask(row), token))
                .map(|t| if t == 256 { '$' } else { t as u8 as char })
                .collect()
        };
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        matcher.prepare(&ids("abx"));
        let rows: Vec<_> = (0..4).map(|row| allowed(&matcher, row)).collect();
        assert_eq!(rows, ["a", "b", "cd", ""], "{lark}: behind the draft that is not allowed nothing is");
        matcher.prepare(&ids("abc"));
        assert_eq!(allowed(&matcher, 2), "cd");
        for token in ids("ab") {
            matcher.accept(token);
        }
        matcher.prepare(&[]);
        assert_eq!(allowed(&matcher, 0), "cd", "{lark}");
        assert!(!matcher.is_complete() && matcher.error().is_none());
    }
    let compiled = grammars.compile_now(&Grammar::Choice(vec!["abc".to_owned()])).unwrap();
    let mut matcher = compiled.matcher();
    "abc".bytes().for_each(|byte| matcher.accept(byte.into()));
    assert!(matcher.is_complete());
    matcher.prepare(&[]);
    assert!(allows(matcher.mask(0), 256) && !allows(matcher.mask(0), u32::from(b'a')), "only the end may follow");
    matcher.rollback(2);
    assert!(!matcher.is_complete());
    matcher.prepare(&[u32::from(b'b'), u32::from(b'c'), 256]);
    assert!(allows(matcher.mask(2), 256) && matcher.mask(3).is_empty());
    assert!(!matcher.is_complete(), "drafts are no answer");
    matcher.accept(u32::from(b'x'));
    assert!(matcher.error().is_some());
    matcher.prepare(&[]);
    assert!(matcher.mask(0).is_empty());
}

#[test]
fn a_draft_that_leads_into_an_error_costs_the_answer_nothing_but_drafts() {
    let compiled = bytes().compile_now(&Grammar::Regex("ab(c|d)e".to_owned())).unwrap();
    let (mut matcher, mut other) = (compiled.matcher(), compiled.matcher());
    for token in "ab".bytes().map(u32::from) {
        matcher.accept(token);
        other.accept(token);
    }
    other.prepare(&[u32::from(b'c')]);
    assert!(allows(other.mask(1), u32::from(b'e')));
    matcher.prepare(&[]);
    // What such an error leaves behind, and what is made of it.
    assert!(matcher.inner.test_trigger_lexer_error().is_err() && matcher.inner.is_error());
    matcher.forget_drafts();
    assert_eq!(matcher.mask(0), other.mask(0));
    for token in "ce".bytes().map(u32::from) {
        matcher.prepare(&[token]);
        assert!(allows(matcher.mask(0), token) && matcher.mask(1).is_empty());
        matcher.accept(token);
    }
    assert!(matcher.is_complete());
}

#[tokio::test]
async fn a_grammar_is_compiled_once_and_the_cache_is_bounded() {
    let grammars = Arc::new(bytes());
    let metrics = crate::metrics::Metrics::new();
    let metrics = metrics.engine(&crate::base::ModelId::new("m"), crate::base::DeviceId(0));
    let grammar = Arc::new(Grammar::Regex("a+".to_owned()));
    for _ in 0..3 {
        grammars.compile(&grammar, &metrics).await.unwrap();
    }
    assert_eq!((metrics.grammar_hits.get(), metrics.grammar_compile_time.get_sample_count()), (2, 1));
    let bad = Arc::new(Grammar::Regex("(".to_owned()));
    assert!(grammars.compile(&bad, &metrics).await.is_err());
    assert_eq!(metrics.grammar_refused.get(), 1);
    let long = Arc::new(Grammar::Regex("a".repeat(MAX_BYTES + 1)));
    assert!(grammars.compile(&long, &metrics).await.is_err_and(|error| error.message().contains("bytes")));
    let compiled = grammars.compile(&grammar, &metrics).await.unwrap();
    let mut cache = Cache::default();
    for i in 0..2 * CACHE_ENTRIES as u64 {
        cache.put(blake3::hash(&i.to_le_bytes()), compiled.clone());
        cache.get(&blake3::hash(&0u64.to_le_bytes()));
    }
    assert_eq!((cache.entries.len(), cache.bytes), (CACHE_ENTRIES, CACHE_ENTRIES * compiled.bytes));
    assert!(
        cache.get(&blake3::hash(&0u64.to_le_bytes())).is_some()
            && cache.get(&blake3::hash(&1u64.to_le_bytes())).is_none()
    );
}

/// Grammars that are meant to hurt: deep, long, or exploding. None may take the process down or hold a thread for long.
#[tokio::test]
async fn a_grammar_that_is_made_to_hurt_costs_an_error_at_most() {
    let grammars = Arc::new(bytes());
    let metrics = crate::metrics::Metrics::new();
    let metrics = metrics.engine(&crate::base::ModelId::new("m"), crate::base::DeviceId(0));
    let chain: String = (0..9_000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let references: serde_json::Map<String, Value> =
        (0..5_000).map(|i| (format!("a{i}"), json!({"$ref": format!("#/$defs/a{}", i + 1)}))).collect();
    for grammar in [
        Grammar::Lark(format!("start: {}", "(".repeat(200_000))),
        Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))),
        Grammar::Lark(format!("start: r0\n{chain}r9000: \"a\"")),
        Grammar::Regex("((((a{0,99}){0,99}){0,99}){0,99}){0,99}".to_owned()),
        Grammar::Regex("(a|b)*a(a|b){4000}".to_owned()),
        Grammar::Regex("(".repeat(100_000)),
        Grammar::JsonSchema(json!({"$ref": "#/$defs/a0", "$defs": references})),
        Grammar::JsonSchema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000_000})),
        Grammar::JsonSchema(json!({"type": "array", "minItems": 1_000_000_000})),
        Grammar::JsonSchema(json!({"$ref": "#"})),
        Grammar::JsonSchema(json!({"allOf": [{"$ref": "#"}]})),
    ] {
        let started = Instant::now();
        let label = format!("{grammar:?}").chars().take(60).collect::<String>();
        match grammars.compile(&Arc::new(grammar), &metrics).await {
            Ok(compiled) => {
                let mut matcher = compiled.matcher();
                matcher.prepare(&[]);
                println!("{label}: ready after {:?}", started.elapsed());
            }
            Err(error) => {
                assert!(matches!(error.kind(), Kind::BadInput | Kind::Unsupported), "{label}: {error:?}");
                println!("{label}: {error} after {:?}", started.elapsed());
            }
        }
    }
}

/// Draws documents under a schema and holds them against it. Returns whether the schema is supported.
fn check_schema(
    grammars: &Grammars,
    schema: &Value,
    draft: jsonschema::Draft,
    seed: u64,
    count: usize,
) -> Result<bool> {
    let compiled = match grammars.compile_now(&Grammar::JsonSchema(schema.clone())) {
        Ok(compiled) => compiled,
        Err(error) if error.kind() == Kind::Internal => return Err(error),
        Err(error) => {
            let words = error.message();
            assert!(words.len() > 40 && !words.contains("panic"), "{schema}: {words}");
            return Ok(false);
        }
    };
    let validator = jsonschema::options().with_draft(draft).should_validate_formats(true).build(schema);
    let Ok(validator) = validator else { return Ok(false) };
    let mut random = Random(seed | 1);
    for _ in 0..count {
        let wild = random.below(50);
        let Some(tokens) = draw(&compiled, &grammars.vocabulary, &mut random, wild) else { continue };
        let text = text(&grammars.vocabulary, &tokens);
        let document: Value = match serde_json::from_str(&text) {
            Ok(document) => document,
            // JSON bounds no number, but a double does.
            Err(error) if error.to_string().starts_with("number out of range") => continue,
            Err(error) => panic!("{schema} wrote {text}: {error}"),
        };
        if !is_exact(&document) {
            continue;
        }
        let wrong = validator.iter_errors(&document).filter(|error| match &error.kind {
            // The validator divides in binary, where 0.3 is no multiple of 0.1.
            jsonschema::error::ValidationErrorKind::MultipleOf { multiple_of } => {
                let times = error.instance.as_f64().unwrap() / multiple_of;
                (times - times.round()).abs() > 1e-9 * times.abs().max(1.0)
            }
            _ => true,
        });
        let wrong: Vec<_> = wrong.map(|error| error.to_string()).collect();
        assert!(wrong.is_empty(), "{schema}\nwrote {text}\n{wrong:?}");
    }
    Ok(true)
}

/// A schema of the supported keywords, at random.
fn any_schema(random: &mut Random, depth: usize) -> Value {
    let low = random.below(20) as i64 - 9;
    let few = random.below(3);
    match random.below(if depth == 0 { 6 } else { 10 }) {
        0 => json!({"type": "integer", "minimum": low, "maximum": low + random.below(300) as i64}),
        1 => json!({"type": "number", "exclusiveMinimum": low, "maximum": low as f64 + 0.5 + random.below(9) as f64}),
        2 => json!({"type": "string", "minLength": few, "maxLength": few + random.below(5)}),
        3 => {
            json!({"type": "string", "pattern": (["^[a-c]+$", "x\\d{2}", "^(ab|c)*$", "[^\\s]z"][random.below(4)]), "maxLength": 40})
        }
        4 => {
            let values = [json!(null), json!(true), json!(low), json!("a\"b"), json!({"k": [1]}), json!(["x", 2.5])];
            json!({"enum": (values[random.below(3)..].to_vec())})
        }
        5 => {
            let formats = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri"];
            json!({"type": "string", "format": formats[random.below(formats.len())]})
        }
        6 => json!({"type": "array", "items": any_schema(random, depth - 1), "minItems": few, "maxItems": few + 2}),
        7 => {
            let items = [any_schema(random, depth - 1), any_schema(random, depth - 1)];
            json!({"type": "array", "prefixItems": items, "items": random.below(2) == 0, "minItems": few})
        }
        8 => json!({"anyOf": [any_schema(random, depth - 1), any_schema(random, depth - 1)]}),
        _ => {
            let properties: serde_json::Map<_, _> =
                ["a", "b", "c d"].iter().map(|&name| (name.to_owned(), any_schema(random, depth - 1))).collect();
            let mut schema =
                json!({"type": "object", "properties": properties, "required": (["b", "z"][..few.min(2)].to_vec())});
            match random.below(4) {
                0 => schema["additionalProperties"] = json!(false),
                1 => schema["additionalProperties"] = any_schema(random, depth - 1),
                2 => schema["patternProperties"] = json!({"^n[0-9]$": any_schema(random, depth - 1)}),
                _ => schema["allOf"] = json!([{"properties": {"a": {"$ref": "#/$defs/shared"}}}]),
            }
            schema
        }
    }
}

#[test]
fn documents_under_schemas_made_at_random_are_valid() {
    let grammars = bytes();
    let mut random = Random(0x5eed);
    let mut supported = 0;
    for round in 0..150 {
        let mut schema = any_schema(&mut random, 3);
        schema["$defs"] = json!({"shared": {"type": ["string", "integer", "object", "array"]}});
        supported += usize::from(check_schema(&grammars, &schema, jsonschema::Draft::Draft202012, round, 6).unwrap());
    }
    println!("{supported} of 150 supported");
    assert!(supported > 120, "only {supported} supported");
}

/// Whether doubles, which the validator counts in, hold all its numbers.
fn is_exact(document: &Value) -> bool {
    match document {
        Value::Number(number) => number.as_f64().is_some_and(|number| number.abs() < 9e15),
        Value::Array(items) => items.iter().all(is_exact),
        Value::Object(map) => map.values().all(is_exact),
        _ => true,
    }
}

/// The public JSON-Schema-Test-Suite: `NEUROND_TEST_JSON_SCHEMAS` names its `tests` folder.
#[test]
fn documents_under_the_public_suites_schemas_are_valid() {
    let Some(folder) = std::env::var_os("NEUROND_TEST_JSON_SCHEMAS").map(PathBuf::from) else {
        println!(
            "SKIPPED: scripts/json_schema_suite.sh fetches the suite and names its folder in NEUROND_TEST_JSON_SCHEMAS"
        );
        return;
    };
    let grammars = bytes();
    for (name, draft) in [
        ("draft2020-12", jsonschema::Draft::Draft202012),
        ("draft2019-09", jsonschema::Draft::Draft201909),
        ("draft7", jsonschema::Draft::Draft7),
        ("draft6", jsonschema::Draft::Draft6),
        ("draft4", jsonschema::Draft::Draft4),
    ] {
        let (mut supported, mut refused, mut wrong) = (0, std::collections::BTreeMap::<String, u32>::new(), Vec::new());
        let mut files: Vec<PathBuf> = Vec::new();
        for folder in [folder.join(name), folder.join(name).join("optional"), folder.join(name).join("optional/format")]
        {
            files.extend(std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
        }
        files.sort();
        for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "json")) {
            let groups: Vec<Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            // Drafts 6 and 7 let a validator look into strings; later ones say that it does not.
            if file.ends_with("optional/content.json") {
                continue;
            }
            for group in groups {
                let mut schema = group["schema"].clone();
                // The suite says by folder what a lone schema says itself.
                if let Some(map) = schema.as_object_mut() {
                    map.entry("$schema").or_insert_with(|| {
                        Value::from(match name {
                            "draft2020-12" => "https://json-schema.org/draft/2020-12/schema",
                            "draft2019-09" => "https://json-schema.org/draft/2019-09/schema",
                            "draft7" => "http://json-schema.org/draft-07/schema#",
                            "draft6" => "http://json-schema.org/draft-06/schema#",
                            _ => "http://json-schema.org/draft-04/schema#",
                        })
                    });
                }
                let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
                    check_schema(&grammars, &schema, draft, 7, 12).unwrap()
                }));
                match outcome {
                    Ok(true) => supported += 1,
                    Ok(false) => *refused.entry(file.file_stem().unwrap().display().to_string()).or_default() += 1,
                    Err(panic) => wrong.push(format!(
                        "{}: {}",
                        file.display(),
                        panic.downcast_ref::<String>().cloned().unwrap_or_default()
                    )),
                }
            }
        }
        println!("{name}: {supported} supported, {} refused: {refused:?}", refused.values().sum::<u32>());
        assert!(wrong.is_empty(), "{name}: {}\n{}", wrong.len(), wrong.join("\n"));
        assert!(supported > 100, "{name}: only {supported} supported");
    }
}

#[test]
fn a_real_vocabulary_writes_valid_documents_in_tokens_of_any_length() {
    let Some(path) = demo_model() else { return };
    let model = TextModel::open(&path).unwrap();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
            "born": {"type": "string", "format": "date"},
            "child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["name", "age", "child"],
        "additionalProperties": false,
    });
    let started = Instant::now();
    let compiled = model.grammars().compile_now(&Grammar::JsonSchema(schema.clone())).unwrap();
    println!("factory and compilation: {:?}", started.elapsed());
    let started = Instant::now();
    let again = model.grammars().compile_now(&Grammar::JsonSchema(schema.clone())).unwrap();
    println!("compilation: {:?}, {} KiB", started.elapsed(), again.bytes >> 10);
    let started = Instant::now();
    for _ in 0..100 {
        std::hint::black_box(compiled.matcher());
    }
    println!("a matcher: {:?}", started.elapsed() / 100);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut random = Random(5);
    for round in 0..8 {
        let started = Instant::now();
        let tokens = draw(&compiled, model.vocabulary(), &mut random, 20 + 5 * round).expect("an end");
        let text = text(model.vocabulary(), &tokens);
        println!("{} tokens, {:?} a token: {text}", tokens.len(), started.elapsed() / tokens.len() as u32);
        let document: Value = serde_json::from_str(&text).unwrap();
        assert!(validator.is_valid(&document), "{text}");
    }
}
