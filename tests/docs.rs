//! Keeps the generated documents true: `docs/CONFIG.md` and `configs/neurond.toml` come from the doc comments and defaults of
//! `src/config/`, `docs/METRICS.md` from `src/metrics/`. When this fails: `UPDATE_DOCS=1 cargo test --test docs`, and read the diff.
//!
//! Also checks what lives beside the code and would rot unseen: the example configurations load, and dashboards, alerts and
//! the operator's manual name only series that exist.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use neurond::base::{DeviceId, ModelId};
use neurond::config::File;
use neurond::metrics::Metrics;

const FILE: &str = include_str!("../src/config/file.rs");
const METERING: &str = include_str!("../src/config/metering.rs");
const FLEET: &str = include_str!("../src/config/fleet.rs");
const RECORDS: &str = include_str!("../src/config/records.rs");
const GATEWAY: &str = include_str!("../src/config/gateway.rs");
const CATALOG: &str = include_str!("../src/config/catalog.rs");
const METRICS: &str = include_str!("../src/metrics/mod.rs");

/// Section, the struct behind it, whether it is a list of blocks, whether it is there by default.
const SECTIONS: [(&str, &str, bool, bool); 32] = [
    ("server", "ServerSection", false, true),
    ("binding", "BindingSection", false, false),
    ("auth", "AuthSection", false, true),
    ("auth.token", "TokenSection", true, false),
    ("engine", "EngineSection", false, true),
    ("gpu", "GpuSection", false, true),
    ("batch", "BatchSection", false, true),
    ("plan", "PlanSection", false, true),
    ("account", "AccountSection", true, false),
    ("limits", "LimitsSection", false, true),
    ("limit", "LimitSection", true, false),
    ("prices", "PricesSection", false, true),
    ("ledger", "LedgerSection", false, true),
    ("fleet", "FleetSection", false, true),
    ("logs", "LogsSection", false, true),
    ("redact", "RedactSection", true, false),
    ("ship", "ShipSection", true, false),
    ("analytics", "AnalyticsSection", false, true),
    ("alerts", "AlertsSection", false, true),
    ("alert", "AlertSection", true, false),
    ("channel", "ChannelSection", true, false),
    ("model", "ModelSection", true, false),
    ("lora", "LoraSection", false, true),
    ("gateway", "GatewaySection", true, false),
    ("provider", "ProviderSection", true, false),
    ("vault", "VaultSection", false, true),
    ("registry", "RegistrySection", false, true),
    ("upstream", "UpstreamSection", false, true),
    ("cache", "CacheSection", false, true),
    ("catalog", "CatalogSection", false, true),
    ("log", "LogSection", false, true),
    ("model (of a catalog file)", "Block", true, false),
];

#[test]
fn the_configuration_manual_is_up_to_date() {
    compare("docs/CONFIG.md", &config_manual());
}

#[test]
fn the_example_configuration_is_up_to_date() {
    compare("configs/neurond.toml", &example());
}

#[test]
fn the_metrics_manual_is_up_to_date() {
    compare("docs/METRICS.md", &metrics_manual());
}

#[test]
fn the_example_configuration_says_nothing_but_the_defaults() {
    let written: File = toml::from_str(&read("configs/neurond.toml")).unwrap();
    assert_eq!(toml::to_string(&written).unwrap(), toml::to_string(&File::default()).unwrap());
}

#[test]
fn the_example_configuration_reads_with_every_key_uncommented() {
    let text = read("configs/neurond.toml");
    let is_key = |line: &str| line.strip_prefix("# ").is_none_or(|rest| rest.is_empty()) && line.starts_with('#');
    let lines = text.lines().map(|line| if is_key(line) && line.len() > 1 { &line[1..] } else { line });
    let all: String =
        lines.filter(|line| !line.starts_with("# ") && *line != "#").fold(String::new(), |all, line| all + line + "\n");
    let file: toml::Table = toml::from_str(&all).unwrap_or_else(|error| panic!("{all}\n{error}"));
    for (section, name, list, _) in &SECTIONS[..SECTIONS.len() - 1] {
        let mut table = toml::Value::Table(file.clone());
        for key in section.split('.') {
            table = table.get(key).cloned().unwrap_or_else(|| panic!("no [{section}]\n{all}"));
        }
        let table = if *list { table[0].clone() } else { table };
        for field in fields(source(name), name).iter().filter(|field| !is_section(&field.kind)) {
            assert!(table.get(&field.name).is_some(), "{section}.{} is missing\n{all}", field.name);
        }
    }
    toml::from_str::<File>(&all).unwrap();
}

#[test]
fn the_development_configuration_loads() {
    let text = read("configs/dev.toml");
    let file: File = toml::from_str(&text).unwrap();
    assert_eq!(file.server.listen, "127.0.0.1:8080");
    // Loaded for real beside a stand-in for the weights, which the repository does not hold.
    let folder = tempfile::tempdir().unwrap();
    let (configs, models) = (folder.path().join("configs"), folder.path().join("models"));
    std::fs::create_dir_all(&configs).unwrap();
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(configs.join("dev.toml"), &text).unwrap();
    std::fs::write(models.join("SmolLM2-135M-Instruct.Q4_1.gguf"), "").unwrap();
    let config = neurond::config::load(Some(&configs.join("dev.toml")), &Default::default()).unwrap();
    assert_eq!(config.models[0].id.as_str(), "@cf/huggingfacetb/smollm2-135m-instruct");
    assert!(config.auth.anonymous.is_some() && config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn dashboards_alerts_and_manuals_name_series_that_exist() {
    let known: BTreeSet<String> = series().into_iter().map(|series| series.name).collect();
    for file in ["configs/grafana.json", "configs/alerts.yml", "docs/OPERATIONS.md", "README.md"] {
        let Ok(text) = std::fs::read_to_string(root().join(file)) else { continue };
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for word in words.filter(|word| word.starts_with("neurond_")) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            assert!(known.contains(word) || known.contains(base), "{file} names {word}, which is no series of ours");
        }
    }
    serde_json::from_str::<serde_json::Value>(&read("configs/grafana.json")).unwrap();
}

#[test]
fn the_manual_lists_every_series_that_is_served() {
    let metrics = Metrics::new();
    metrics.engine(&ModelId::new("m"), DeviceId(0)).steps.inc();
    let served = String::from_utf8(metrics.render()).unwrap();
    let listed: BTreeSet<String> = series().into_iter().map(|series| series.name).collect();
    for line in served.lines() {
        let Some(rest) = line.strip_prefix("# HELP ") else { continue };
        let name = rest.split(' ').next().unwrap_or_default();
        assert!(listed.contains(name), "{name} is served, but the reader of src/metrics/mod.rs missed it");
    }
}

// ---- configuration ----

/// One field of a struct, as its source says it.
struct Field {
    name: String,
    kind: String,
    doc: String,
    example: Option<String>,
}

/// The fields of `struct name`, with their doc comments.
fn fields(source: &str, name: &str) -> Vec<Field> {
    let (mut found, mut doc) = (Vec::new(), Vec::new());
    for line in body(source, name).lines().map(str::trim) {
        if let Some(words) = line.strip_prefix("///") {
            doc.push(words.trim().to_owned());
        } else if let Some(field) = line.strip_prefix("pub ") {
            let (name, kind) = field.trim_end_matches(',').split_once(": ").unwrap();
            let example = doc
                .iter()
                .find_map(|line| line.strip_prefix("Example: "))
                .map(|code| code.trim_matches('`').to_owned());
            doc.retain(|line| !line.starts_with("Example: "));
            assert!(!doc.is_empty(), "{name} has no doc comment, so it has no manual");
            let (name, kind, doc) = (name.to_owned(), kind.to_owned(), std::mem::take(&mut doc).join(" "));
            found.push(Field { name, kind, doc, example });
        }
    }
    assert!(!found.is_empty(), "struct {name} has no fields, or is written in a form this reader does not know");
    found
}

fn body<'a>(source: &'a str, name: &str) -> &'a str {
    let start = source.find(&format!("pub struct {name} {{\n")).unwrap_or_else(|| panic!("no struct {name}"));
    let body = &source[start..];
    &body[body.find('\n').unwrap()..body.find("\n}").unwrap()]
}

/// The doc comment above `struct name`, without the section's name in front.
fn about(source: &str, name: &str) -> String {
    let end = source.find(&format!("pub struct {name} {{\n")).unwrap();
    let above: Vec<_> =
        source[..end].lines().rev().take_while(|line| line.starts_with("///") || line.starts_with("#[")).collect();
    let lines = above.into_iter().rev().filter_map(|line| line.strip_prefix("///")).map(str::trim);
    let text = lines.collect::<Vec<_>>().join(" ");
    let text = text.split_once("`: ").map_or(text.as_str(), |(_, rest)| rest).to_owned();
    text[..1].to_uppercase() + &text[1..]
}

/// The file that a struct is written in.
fn source(name: &str) -> &'static str {
    let holds = |source: &&str| source.contains(&format!("pub struct {name} {{\n"));
    [FILE, METERING, FLEET, RECORDS, GATEWAY, CATALOG]
        .into_iter()
        .find(holds)
        .unwrap_or_else(|| panic!("no struct {name}"))
}

fn is_section(kind: &str) -> bool {
    // What is optional within a block is written there.
    kind.contains("Section") && !kind.starts_with("Option<")
}

/// What the key is when nobody writes it; `None` where that depends or where it must be written.
fn default_of(section: &str, field: &Field) -> Option<String> {
    let all: toml::Table = toml::from_str(&toml::to_string(&File::default()).unwrap()).unwrap();
    if let Some(value) = all.get(section).and_then(|table| table.get(&field.name)) {
        return Some(value.to_string());
    }
    // Blocks of lists have no place in the defaults; their types say it.
    match field.kind.as_str() {
        "bool" => Some("false".into()),
        "Precision" => Some("\"fast\"".into()),
        "KvType" => Some("\"f16\"".into()),
        "Format" => Some("\"bf16\"".into()),
        "WindowTechnique" => Some("\"fixed\"".into()),
        "AlertSeverity" => Some("\"warning\"".into()),
        "MailSecurity" => Some("\"starttls\"".into()),
        _ => None,
    }
}

fn config_manual() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         Made from the doc comments of `src/config/` by `tests/docs.rs`: change them there.\n\n",
    );
    writeln!(out, "{}\n", about(FILE, "File")).unwrap();
    out.push_str(
        "`neurond` reads the file named by `--config`, or the first that exists of `./neurond.toml` and `/etc/neurond/neurond.toml`. \
         Without any file it listens on `127.0.0.1:8080` and serves callers without a token as account `local`; a file, even an \
         empty one, refuses them unless it says otherwise. Command-line options win over the file.\n\n\
         `neurond check-config` reads a configuration as the daemon would and tells every mistake at once: file, key, value, \
         remedy. `configs/neurond.toml` is a file with every key at its default.\n\n\
         A reload (HUP) reads everything again. Values marked *restart* keep what they had until the process is started anew; \
         *swap* ones count when the reload has swapped the models they concern (all of them for `[engine]`); all others at once.\n",
    );
    for (section, name, list, _) in SECTIONS {
        let title = match section.split_once(" (") {
            Some((section, file)) => format!("`[[{section}]]` ({file}"),
            None if list => format!("`[[{section}]]`"),
            None => format!("`[{section}]`"),
        };
        write!(out, "\n## {title}\n\n{}\n\n", about(source(name), name)).unwrap();
        out.push_str("| key | default | meaning |\n| --- | --- | --- |\n");
        for field in fields(source(name), name).iter().filter(|field| !is_section(&field.kind)) {
            let default = match default_of(section, field) {
                Some(value) => format!("`{value}`"),
                None if field.kind.starts_with("Option") => "–".into(),
                None => "must be written".into(),
            };
            let example = match &field.example {
                Some(example) if field.kind.starts_with("Option") || default == "must be written" => {
                    format!(" Example: `{} = {example}`.", field.name)
                }
                _ => String::new(),
            };
            let when = when(section, &field.name).map(|when| format!(" *{when}*")).unwrap_or_default();
            let doc = field.doc.replace('|', "\\|");
            writeln!(out, "| `{}` | {default} | {doc}{example}{when} |", field.name).unwrap();
        }
    }
    out
}

/// Mirrors `config::diff`, which the last test below holds it to.
fn when(section: &str, key: &str) -> Option<&'static str> {
    match (section, key) {
        ("server", "request_timeout_ms" | "max_body_bytes") => None,
        ("server" | "binding", _) | ("engine", "threads") | ("log", "format") | ("lora", "path") => Some("restart"),
        ("vault" | "registry" | "cache", _) => Some("restart"),
        ("upstream", "connect_timeout_ms" | "allow_private" | "proxy" | "ca_file") => Some("restart"),
        ("engine" | "model", _) => Some("swap"),
        _ => None,
    }
}

#[test]
fn the_manual_says_of_each_key_when_a_reload_counts() {
    use neurond::config::{Config, Effect, diff};
    let old = Config::default();
    let mut new = old.clone();
    let second = std::time::Duration::from_secs(1);
    new.server.listen.set_port(1);
    new.server.workers += 1;
    new.server.max_body_bytes += 1;
    new.server.max_connections += 1;
    new.server.read_timeout += second;
    new.server.write_timeout += second;
    new.server.request_timeout += second;
    new.server.drain_timeout += second;
    new.auth.anonymous = None;
    new.engine.threads += 1;
    new.engine.step_tokens += 1;
    new.engine.prefill_chunk += 1;
    new.engine.max_running += 1;
    new.engine.max_queue += 1;
    new.engine.block_tokens += 1;
    new.engine.prefix_cache ^= true;
    new.engine.prefill_stretch += 1.0;
    new.lora.path = Some("/elsewhere".into());
    new.lora.max_file_bytes += 1;
    new.lora.max_adapters += 1;
    new.lora.cache_bytes += 1;
    new.lora.public_account = Some(neurond::base::AccountId::new("x"));
    new.registry = Some("/elsewhere".into());
    new.upstream.connect_timeout += second;
    new.upstream.first_byte_timeout += second;
    new.upstream.idle_timeout += second;
    new.upstream.total_timeout += second;
    new.upstream.max_retry_after += second;
    new.upstream.allow_private ^= true;
    new.upstream.proxy = Some("p:1".into());
    new.upstream.authorities = Some("x".into());
    new.upstream.max_answer_bytes += 1;
    new.cache.memory_bytes += 1;
    new.cache.disk_bytes += 1;
    new.cache.max_entries += 1;
    new.cache.max_entry_bytes += 1;
    new.cache.folder = Some("/elsewhere".into());
    new.log.filter += "x";
    new.log.format = neurond::config::LogFormat::Json;
    let changes = diff(&old, &new);
    assert_eq!(changes.len(), 39);
    for change in changes {
        let (section, key) = change.key.split_once('.').unwrap();
        let said = when(section, key);
        let is = match change.effect {
            Effect::Restart => Some("restart"),
            Effect::Swap => Some("swap"),
            Effect::Live => None,
        };
        assert_eq!(said, is, "{}", change.key);
    }
}

/// Every key at its default; what is not there by default is commented out without a space (`#key`), prose with one.
fn example() -> String {
    let mut out = String::from(
        "# neurond's configuration: every key at its default. Made from src/config/file.rs by tests/docs.rs.\n\
         # A file needs only what differs. Lines that begin with a bare # are keys that are left out by default.\n\
         # neurond check-config tells whether a file is right. The manual is docs/CONFIG.md.\n",
    );
    for (section, name, list, present) in &SECTIONS[..SECTIONS.len() - 1] {
        out.push('\n');
        prose(&mut out, &about(source(name), name));
        let mark = if *present { "" } else { "#" };
        let (open, close) = if *list { ("[[", "]]") } else { ("[", "]") };
        writeln!(out, "{mark}{open}{section}{close}").unwrap();
        for field in fields(source(name), name).iter().filter(|field| !is_section(&field.kind)) {
            out.push('\n');
            prose(&mut out, &field.doc);
            match (default_of(section, field), &field.example) {
                (Some(value), _) => writeln!(out, "{mark}{} = {value}", field.name).unwrap(),
                (None, Some(example)) => writeln!(out, "#{} = {example}", field.name).unwrap(),
                (None, None) => panic!("{section}.{} has neither a default nor an `Example:` line", field.name),
            }
        }
    }
    out
}

/// Words as comment lines of at most 118 columns.
fn prose(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > 118 {
            writeln!(out, "{line}").unwrap();
            line = String::from("#");
        }
        line = line + " " + word;
    }
    writeln!(out, "{line}").unwrap();
}

// ---- metrics ----

struct Series {
    name: String,
    kind: &'static str,
    labels: Vec<String>,
    help: String,
    edges: Option<String>,
}

/// Every call of the registrar in the source: its name, help, labels and edges.
fn series() -> Vec<Series> {
    let mut found = Vec::new();
    for (method, kind) in [
        (".counter(", "counter"),
        (".counters(", "counter"),
        (".gauge(", "gauge"),
        (".gauges(", "gauge"),
        (".histogram(", "histogram"),
        (".histograms(", "histogram"),
        (".striped_counters(", "counter"),
        (".striped_gauge(", "gauge"),
        (".striped_histogram(", "histogram"),
        (".striped_histograms(", "histogram"),
    ] {
        for (at, _) in METRICS.match_indices(method) {
            let call = METRICS[at + method.len()..].trim_start();
            // The registrar's own definitions and uses of handles are not registrations.
            if !call.starts_with("\"neurond_") {
                continue;
            }
            let (name, rest) = literal(call);
            let (help, rest) = literal(rest);
            let arguments = &rest[..rest.find(')').unwrap()];
            let labels = if arguments.contains("by_engine") { "\"model\", \"device\"" } else { arguments };
            let labels = labels.split('"').skip(1).step_by(2).map(str::to_owned).collect();
            let edges = ["LATENCY", "INTER_TOKEN", "ROWS", "MASK"].iter().find(|edges| arguments.contains(**edges));
            found.push((at, Series { name, kind, labels, help, edges: edges.map(|name| edges_of(name)) }));
        }
    }
    found.sort_by_key(|(at, _)| *at);
    assert!(found.len() > 20, "the reader of src/metrics/mod.rs found only {} series", found.len());
    found.into_iter().map(|(_, series)| series).collect()
}

/// The first string literal and what follows it.
fn literal(text: &str) -> (String, &str) {
    let start = text.find('"').unwrap() + 1;
    let end = start + text[start..].find('"').unwrap();
    (text[start..end].to_owned(), &text[end + 1..])
}

fn edges_of(name: &str) -> String {
    let declared = &METRICS[METRICS.find(&format!("const {name}: &[f64]")).unwrap()..];
    let list = &declared[declared.find("&[f64] =").unwrap() + 8..declared.find("];").unwrap()];
    list.trim()
        .trim_start_matches("&[")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .trim_end_matches(',')
        .to_owned()
}

fn metrics_manual() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         Made from `src/metrics/mod.rs` by `tests/docs.rs`: change it there. Served on `/metrics` in Prometheus' text format; \
         `configs/grafana.json` draws them, `configs/alerts.yml` watches them.\n\n\
         Labels come from closed sets (catalog ids, route names, status codes), never from what a client may choose. `device` is 0 \
         for the CPU.\n\n\
         | series | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    let mut edges: Vec<String> = Vec::new();
    for series in series() {
        let labels = series.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        let kind = match series.edges {
            Some(list) => {
                let index = edges.iter().position(|known| *known == list).unwrap_or_else(|| {
                    edges.push(list);
                    edges.len() - 1
                });
                format!("{} ({})", series.kind, char::from(b'a' + index as u8))
            }
            None => series.kind.to_owned(),
        };
        let labels = if labels.is_empty() { "–".to_owned() } else { labels };
        writeln!(out, "| `{}` | {kind} | {labels} | {} |", series.name, series.help).unwrap();
    }
    out.push_str("\nUpper edges of the histograms' buckets:\n\n");
    for (index, list) in edges.iter().enumerate() {
        writeln!(out, "- ({}) {list}", char::from(b'a' + index as u8)).unwrap();
    }
    out
}

// ---- files ----

fn compare(file: &str, wanted: &str) {
    let path = root().join(file);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, wanted).unwrap();
        return;
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(wanted.lines()).position(|(a, b)| a != b);
    assert!(
        written == wanted,
        "{file} is out of date at line {}: run UPDATE_DOCS=1 cargo test --test docs, and commit what it wrote",
        differs.map_or(written.lines().count().min(wanted.lines().count()), |line| line) + 1
    );
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}
