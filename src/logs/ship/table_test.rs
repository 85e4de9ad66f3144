use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::*;
use crate::base::{LogId, Millis, Neurons};
use crate::logs::record::{Body, CacheUse, Record};
use crate::logs::ship::envelope::PublicKey;
use crate::logs::ship::line::tests::{body, sample};
use crate::logs::ship::line::{self, Renderer};
use crate::task::Usage;

/// Fields by name, as they are written: numbers are compared to the last digit.
type Fields = BTreeMap<String, Box<RawValue>>;

/// What pyarrow prints of a file.
fn arrow(file: &[u8], options: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("NEUROND_TEST_PARQUET").map(Into::into);
    let reader = named.unwrap_or_else(|| root.join("target/test-parquet"));
    assert!(
        reader.join("pyarrow").is_dir(),
        "no reader of Parquet in {}: run scripts/fetch_parquet.sh",
        reader.display()
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    std::fs::write(&path, file).unwrap();
    let output = Command::new("python3")
        .arg(root.join("scripts/parquet_rows.py"))
        .args(options)
        .arg(path)
        .env("PYTHONPATH", reader)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Puts records into a table, each sealed for the key where there is one; the lines that went in come out as well.
fn table(records: &[(Record, Option<&PublicKey>)]) -> (Vec<u8>, Vec<String>) {
    let (mut table, mut renderer, mut lines) = (Table::new(2), Renderer::default(), Vec::new());
    for (record, key) in records {
        let mut block = Vec::new();
        line::encode(record, record.id.unwrap(), *key, &mut block);
        let line = renderer.line(&line::next(&block).unwrap().0).unwrap().to_vec();
        table.push(&line).unwrap();
        lines.push(String::from_utf8(line).unwrap());
    }
    (table.finish().unwrap(), lines)
}

/// Every field of a line is a cell, and every cell is a field.
fn compare(rows: &[String], lines: &[String]) {
    assert_eq!(rows.len(), lines.len());
    for (row, line) in rows.iter().zip(lines) {
        let [cells, fields]: [Fields; 2] = [row, line].map(|text| serde_json::from_str(text).unwrap());
        assert!(fields.keys().all(|name| cells.contains_key(name)), "{line:.2000} {row:.2000}");
        for (name, cell) in &cells {
            same(name, cell.get(), fields.get(name).map_or("null", |field| field.get()));
        }
    }
}

fn same(name: &str, cell: &str, field: &str) {
    if let (Ok(cell), Ok(field)) = (cell.parse::<f64>(), field.parse::<f64>()) {
        return assert!(cell == field, "{name}: {cell} is not {field}");
    }
    match (cell.chars().next(), field.chars().next()) {
        (Some('{'), Some('{')) => {
            let [cells, fields]: [Fields; 2] = [cell, field].map(|text| serde_json::from_str(text).unwrap());
            assert_eq!(cells.keys().collect::<Vec<_>>(), fields.keys().collect::<Vec<_>>(), "{name}");
            cells.iter().for_each(|(inner, cell)| same(inner, cell.get(), fields[inner].get()));
        }
        // An object or a list, as the text that it is.
        (Some('"'), Some('{' | '[')) => assert_eq!(serde_json::from_str::<String>(cell).unwrap(), field, "{name}"),
        _ => {
            let [cell, field]: [Value; 2] = [cell, field].map(|text| serde_json::from_str(text).unwrap());
            assert!(cell == field, "{name}: {cell:.300} is not {field:.300}");
        }
    }
}

/// Numbers that look drawn and are the same each time.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.below(3) > 0).then(|| make(self))
    }

    fn text(&mut self) -> String {
        const LETTERS: [&str; 10] = ["", "a", "\u{fc}", "\u{1f600}", "\"", "\\", "\n", "\u{0}", "null", "{\"x\":1}"];
        let count = self.below(6);
        (0..count).map(|_| LETTERS[self.below(10) as usize]).collect()
    }

    fn body(&mut self) -> Body {
        match self.below(4) {
            0 => body(""),
            1 => body([0xff, self.below(256) as u8, 0]),
            2 => Body { size: 900, ..body(self.text()) },
            _ => body(self.text()),
        }
    }

    fn record(&mut self) -> Record {
        let at = Millis(1_600_000_000_000 + self.below(400_000_000) * 1000 + self.below(1000));
        Record {
            id: Some(LogId::at(at)),
            at,
            key: None,
            gateway: self.text().into(),
            model: self.text().into(),
            status: self.below(600) as u16,
            success: self.below(2) > 0,
            cache: CacheUse::ALL[self.below(4) as usize],
            duration_us: self.below(1 << 31) << self.below(20),
            first_byte_us: self.maybe(|draw| draw.below(1 << 31)),
            usage: self.maybe(|draw| Usage {
                prompt_tokens: draw.below(1 << 31) as u32,
                cached_tokens: draw.below(9) as u32,
                ..Usage::default()
            }),
            cost: Neurons::from_micro(self.below(1 << 31) << self.below(30)),
            request_content_type: self.maybe(|draw| draw.text().into()),
            response_content_type: self.maybe(|draw| draw.text().into()),
            metadata: self.maybe(|draw| json!({ draw.text(): draw.text() }).to_string().into()),
            event: self.maybe(|draw| draw.text().into()),
            user_agent: self.maybe(|draw| draw.text().into()),
            why: self.maybe(|draw| draw.text().into()),
            findings: (0..self.below(3)).map(|_| self.text().into()).collect(),
            asked: self.body(),
            answered: self.body(),
            ..sample()
        }
    }
}

#[test]
fn another_reader_finds_every_field_of_ten_thousand_lines() {
    let mut draw = Draw(7);
    let mut records: Vec<_> = (0..10_000).map(|_| (draw.record(), None)).collect();
    // Where pages turn: texts longer than one, and long runs of nulls and of texts.
    for at in [0, 17, 18, 5000] {
        records[at].0.answered = body("\u{1f600}x".repeat(190_000));
    }
    records[2000..4000].iter_mut().for_each(|(record, _)| record.user_agent = None);
    records[4000..6000].iter_mut().for_each(|(record, _)| record.user_agent = Some("\u{e9}".into()));
    let (file, lines) = table(&records);
    compare(&arrow(&file, &[]), &lines);

    let about: Value = serde_json::from_str(&arrow(&file, &["--about"])[0]).unwrap();
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&about["rows"], &about["groups"]), (&json!(10_000), &json!(1)));
    let times = || lines.iter().map(|line| line["CreatedAt"].as_str().unwrap());
    assert_eq!(about["columns"]["CreatedAt"]["span"], json!([times().min(), times().max()]));
    let nulls = lines.iter().filter(|line| line["UserAgent"].is_null()).count();
    let agents = &about["columns"]["UserAgent"];
    assert_eq!((&agents["nulls"], &agents["codec"]), (&json!(nulls), &json!("GZIP")));
    for (name, expected) in [
        ("CreatedAt", "timestamp[ms, tz=UTC]"),
        ("StatusCode", "int64"),
        ("Cost", "double"),
        ("Cached", "bool"),
        ("Metadata", "string"),
        ("UsageMetadata", "struct<CachedTokensIn: int64>"),
        ("Timings", "struct<FirstByte: double, Total: double>"),
    ] {
        assert_eq!(about["types"][name], expected, "{name}");
    }
}

#[test]
fn tables_of_few_rows_are_read_as_well() {
    let bare = Record {
        key: None,
        task: None,
        usage: None,
        first_byte_us: None,
        request_content_type: None,
        response_content_type: None,
        metadata: None,
        event: None,
        user_agent: None,
        findings: Vec::new(),
        asked: body(""),
        answered: body(""),
        ..sample()
    };
    for records in [vec![sample()], vec![bare.clone()], vec![bare.clone(), sample(), bare]] {
        let (file, lines) = table(&records.into_iter().map(|record| (record, None)).collect::<Vec<_>>());
        compare(&arrow(&file, &[]), &lines);
    }
}

#[test]
fn what_is_sealed_is_the_text_of_its_envelope() {
    let openssl = |command: &[&str], input: &[u8]| {
        let piped = Stdio::piped;
        let mut child =
            Command::new("openssl").args(command).stdin(piped()).stdout(piped()).stderr(piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap().stdout
    };
    let public = openssl(&["rsa", "-pubout"], &openssl(&["genrsa", "2048"], b""));
    let key = PublicKey::parse(std::str::from_utf8(&public).unwrap()).unwrap();
    let mut draw = Draw(8);
    let records: Vec<_> = (0..60).map(|at| (draw.record(), (at % 3 > 0).then_some(&key))).collect();
    let (file, lines) = table(&records);
    let rows = arrow(&file, &[]);
    compare(&rows, &lines);
    let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect();
    for name in ["Metadata", "RequestBody", "ResponseBody"] {
        assert!(rows[1][name].as_str().unwrap().starts_with("{\"key\":\""), "{name}: {}", rows[1][name]);
    }
}

#[test]
fn what_is_no_line_of_ours_is_refused_and_a_field_that_is_missing_is_null() {
    for line in ["", "[]", r#"{"StatusCode":"x"}"#, r#"{"CreatedAt":"now"}"#, r#"{"Timings":7}"#] {
        let error = Table::new(2).push(line.as_bytes()).unwrap_err();
        assert!(error.message().contains("cannot be put into a table"), "{line}: {error}");
    }
    for line in ["{}\n", "{\"Timings\":null,\"Id\":null}\n"] {
        let mut table = Table::new(2);
        table.push(line.as_bytes()).unwrap();
        let row: Value = serde_json::from_str(&arrow(&table.finish().unwrap(), &[])[0]).unwrap();
        let is_null = |value: &Value| match value {
            Value::Object(fields) => fields.values().all(Value::is_null),
            value => value.is_null(),
        };
        assert!(row.as_object().unwrap().values().all(is_null), "{row}");
    }
}
