//! Holds the source to the floors of `docs/ARCHITECTURE.md`, section 2: a module imports from lower floors only, and
//! modules on one floor do not know each other. The table here and the table there must say the same.
//!
//! Reads `crate::…` paths out of the text of `src/`, comments and string literals left out. A new module is a row here and in the document; an
//! edge that must be is a line in `ALLOWED`, visible in review.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Floor by floor, the ground last.
const FLOORS: [(u8, &[&str]); 9] = [
    (8, &["main", "cli", "app", "signal", "telemetry"]),
    (7, &["http", "simulate"]),
    (6, &["gateway"]),
    (5, &["adapters", "supervisor"]),
    (4, &["engine", "registry"]),
    (3, &["model", "provider", "ledger", "cache", "fallback", "logs", "vault", "alert"]),
    (2, &["config", "store", "net", "metrics", "kernel", "guard", "route"]),
    (1, &["task"]),
    (0, &["base"]),
];

/// Edges that do not go down: who, whom. Floor 8 is the one floor with an inner order, from left to right.
const ALLOWED: [(&str, &str); 7] = [
    ("main", "cli"),
    ("main", "app"),
    ("main", "telemetry"),
    ("cli", "app"),
    ("cli", "telemetry"),
    ("app", "signal"),
    ("app", "telemetry"),
];

#[test]
fn modules_import_from_lower_floors_only() {
    let mut wrong = Vec::new();
    for file in sources(&root().join("src")) {
        let name = file.strip_prefix(root()).unwrap().display().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        let from = module_of(&name);
        for (line, to) in imports(&text, from == "main") {
            if let Some(problem) = judge(from, &to) {
                wrong.push(format!("{name}:{line}: {problem}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "\n{}\n\nMove the data down, or add the edge to ALLOWED in tests/floors.rs.\n",
        wrong.join("\n")
    );
}

#[test]
fn every_module_has_a_floor() {
    let homeless: BTreeSet<_> = sources(&root().join("src"))
        .iter()
        .map(|file| module_of(&file.strip_prefix(root()).unwrap().display().to_string()).to_owned())
        .filter(|module| module != "lib" && floor(module).is_none())
        .collect();
    assert!(homeless.is_empty(), "give {homeless:?} a floor in tests/floors.rs and docs/ARCHITECTURE.md");
}

#[test]
fn the_document_draws_the_same_floors() {
    let text = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let mut drawn: BTreeMap<u8, BTreeSet<String>> = BTreeMap::new();
    for row in text.lines() {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [_, floor, modules, _, _] = &cells[..] else { continue };
        let Ok(floor) = floor.parse() else { continue };
        drawn.insert(floor, modules.split('`').skip(1).step_by(2).map(str::to_owned).collect());
    }
    let ours: BTreeMap<u8, BTreeSet<String>> =
        FLOORS.iter().map(|(floor, modules)| (*floor, modules.iter().map(ToString::to_string).collect())).collect();
    assert_eq!(drawn, ours, "docs/ARCHITECTURE.md (left) and tests/floors.rs (right) draw different houses");
}

#[test]
fn the_reader_finds_every_form_of_a_path() {
    let text = "\
//! [`crate::http::Services`] is only a comment
use crate::base::{Error, Kind};
use crate::{
    config::{self, Live},
    task as work,
};
pub(crate) fn f() { crate::engine::go(\"crate::gateway\") } // crate::supervisor
macro_rules! m { () => { $crate::metrics::count() }; }
";
    let found = imports(text, false);
    let expected = [(2, "base"), (4, "config"), (5, "task"), (7, "engine"), (8, "metrics")];
    assert_eq!(found, expected.map(|(line, module)| (line, module.to_owned())));
    assert_eq!(imports("use neurond::cli;\n", true), [(1, "cli".to_owned())]);
}

#[test]
fn edges_are_judged_by_their_floors() {
    for (from, to, wrong) in [
        ("engine", "model", false),
        ("model", "engine", true),
        ("ledger", "vault", true),
        ("model", "kernel", false),
        ("kernel", "config", true),
        ("app", "signal", false),
        ("signal", "app", true),
        ("engine", "engine", false),
        ("engine", "nothing", true),
    ] {
        assert_eq!(judge(from, to).is_some(), wrong, "{from} -> {to}: {:?}", judge(from, to));
    }
}

/// What is wrong with an edge, if anything is.
fn judge(from: &str, to: &str) -> Option<String> {
    if from == to || from == "lib" || ALLOWED.contains(&(from, to)) {
        return None;
    }
    let (Some(above), Some(below)) = (floor(from), floor(to)) else {
        return Some(format!("`{from}` uses `{to}`: one of them has no floor in tests/floors.rs"));
    };
    let direction = match above.cmp(&below) {
        std::cmp::Ordering::Greater => return None,
        std::cmp::Ordering::Equal => "sideways",
        std::cmp::Ordering::Less => "up",
    };
    Some(format!("`{from}` (floor {above}) looks {direction} to `{to}` (floor {below})"))
}

fn floor(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(_, modules)| modules.contains(&module)).map(|(floor, _)| *floor)
}

/// `src/engine/run.rs` and `src/engine.rs` to `engine`.
fn module_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap_or(path);
    inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs")
}

/// Lines and first components of all `crate::…` paths; of `neurond::…` paths too where the text is the binary's.
fn imports(text: &str, binary: bool) -> Vec<(usize, String)> {
    let code = without_comments_and_strings(text);
    let mut found = Vec::new();
    let roots: &[&str] = if binary { &["crate::", "neurond::"] } else { &["crate::"] };
    for root in roots {
        for (at, _) in code.match_indices(root) {
            let after = &code[at + root.len()..];
            let line = |offset: usize| 1 + code[..at + root.len() + offset].matches('\n').count();
            match after.strip_prefix('{') {
                Some(group) => {
                    found.extend(group_heads(group).into_iter().map(|(offset, head)| (line(offset + 1), head)))
                }
                None => found.push((line(0), identifier(after))),
            }
        }
    }
    found.retain(|(_, module)| module.starts_with(|c: char| c.is_ascii_lowercase()));
    found.sort();
    found
}

/// First components inside `{…}`, with their offsets: `config::{self, Live}, task as work}` to config and task.
fn group_heads(group: &str) -> Vec<(usize, String)> {
    let mut heads = Vec::new();
    let (mut depth, mut expecting) = (0, true);
    for (offset, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expecting = true,
            _ if expecting && !c.is_whitespace() => {
                heads.push((offset, identifier(&group[offset..])));
                expecting = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}

/// The text with line comments and string literals blanked; lines keep their numbers.
fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    for line in text.lines() {
        let (mut quoted, mut previous) = (false, ' ');
        let mut rest = line.chars().peekable();
        while let Some(c) = rest.next() {
            if !quoted && c == '/' && rest.peek() == Some(&'/') {
                break;
            }
            // Character literals of a quote are the one form that would be misread.
            if c == '"' && previous != '\\' && previous != '\'' {
                quoted = !quoted;
            } else if !quoted {
                code.push(c);
            }
            previous = if previous == '\\' { ' ' } else { c };
        }
        code.push('\n');
    }
    code
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
