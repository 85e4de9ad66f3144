//! `neurond models`: what a running server answers for, or, without one, what the configuration loads, what lies on this
//! disk, and what the catalog knows by name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Api, ModelRow, Server};
use super::table::{Side, render};
use crate::base::Result;
use crate::config::{self, CatalogEntry, Config, Overrides};

const EXAMPLES: &str = "\
Examples:
  neurond models                      of the server on 127.0.0.1:8080
  neurond models --url http://gpu-box:8080 --token \"$TOKEN\"
  neurond models --local              on this disk and in the configuration; no server needed
  neurond models --local --all        the whole catalog as well
  neurond models --json | python3 -m json.tool";

/// Arguments of `neurond models`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// Look here instead of asking a server
    #[arg(long)]
    local: bool,
    /// With --local: every catalog entry, loaded or not
    #[arg(long, requires = "local")]
    all: bool,
    /// With --local: where weights lie
    #[arg(long, default_value = "models")]
    dir: PathBuf,
    /// With --local: configuration file
    #[arg(long, short, value_name = "FILE", env = "NEUROND_CONFIG")]
    config: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
}

/// Lists them.
pub async fn run(args: Args) -> Result<()> {
    if args.local {
        let config = config::load(args.config.as_deref(), &Overrides::default())?;
        return local(&config, &args);
    }
    let models = Api::new(&args.server, Duration::from_secs(30))?.models().await?;
    if args.json {
        return super::print(&format!("{:#}\n", json!(models)));
    }
    if models.is_empty() {
        eprintln!("the server answers, and serves no model");
    }
    let rows: Vec<_> = models.iter().map(served).collect();
    super::print(&render(&COLUMNS, &rows))
}

const COLUMNS: [(&str, Side); 5] = [
    ("model", Side::Left),
    ("task", Side::Left),
    ("loaded", Side::Left),
    ("context", Side::Right),
    ("neurons per M tokens in / out", Side::Left),
];

/// A row of what a server says. OpenAI promises an id only; the rest is filled where the server says more.
fn served(model: &ModelRow) -> Vec<String> {
    let say = |value: &Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    let first =
        |names: &[&str]| names.iter().find_map(|name| say(model.more.get(*name)?)).unwrap_or_else(|| "-".into());
    let trained = model.more.get("meta").and_then(|meta| say(&meta["n_ctx_train"]));
    let context = match first(&["context_window", "context_length", "max_model_len"]) {
        unknown if unknown == "-" => trained.unwrap_or(unknown),
        context => context,
    };
    let loaded = match model.more.get("loaded").and_then(Value::as_bool) {
        Some(true) => "yes",
        Some(false) => "no",
        None => "-",
    };
    let price = model.more.get("price").filter(|price| price.is_object());
    let price = price.map(|price| format!("{} / {}", price["input"], price["output"])).unwrap_or_else(|| "-".into());
    vec![model.id.clone(), first(&["task"]), loaded.into(), context, price]
}

fn local(config: &Config, args: &Args) -> Result<()> {
    let configured = |entry: &CatalogEntry| config.models.iter().find(|model| model.id == entry.id);
    let entries: Vec<_> =
        config.catalog.entries().iter().filter(|entry| args.all || configured(entry).is_some()).collect();
    let files = weights_under(&args.dir);
    if args.json {
        let models = entries.iter().map(|entry| {
            json!({
                "id": entry.id,
                "task": entry.task,
                "configured": configured(entry).is_some(),
                "path": configured(entry).map(|model| &model.path),
                "context": entry.context,
                "tensor_parallel": configured(entry).map(|model| model.tensor_parallel),
                "price": { "input": entry.price.input, "output": entry.price.output },
                "aliases": entry.aliases,
            })
        });
        let files = files.iter().map(|(path, bytes)| json!({ "path": path, "bytes": bytes }));
        let whole = json!({ "models": models.collect::<Vec<_>>(), "files": files.collect::<Vec<_>>() });
        return super::print(&format!("{whole:#}\n"));
    }
    let mut text = String::new();
    if !entries.is_empty() {
        let rows: Vec<_> = entries.iter().map(|entry| known(entry, configured(entry).is_some())).collect();
        let mut columns = COLUMNS;
        columns[2].0 = "configured";
        text.push_str(&render(&columns, &rows));
        text.push('\n');
    }
    if files.is_empty() {
        eprintln!("no weights under {}: `neurond pull ORG/MODEL` fetches some", args.dir.display());
    } else {
        let used = |path: &Path| config.models.iter().find(|model| same_file(&model.path, path));
        let rows: Vec<_> = files
            .iter()
            .map(|(path, bytes)| {
                let user = used(path).map_or_else(|| "-".into(), |model| model.id.to_string());
                vec![path.display().to_string(), super::bytes(*bytes), user]
            })
            .collect();
        text.push_str(&render(&[("weights", Side::Left), ("size", Side::Right), ("configured as", Side::Left)], &rows));
    }
    super::print(&text)
}

fn known(entry: &CatalogEntry, configured: bool) -> Vec<String> {
    let context = if entry.context == 0 { "-".into() } else { entry.context.to_string() };
    let price = match (entry.price.input, entry.price.output) {
        (0, 0) => "-".into(),
        (input, output) => format!("{input} / {output}"),
    };
    vec![
        entry.id.to_string(),
        entry.task.name().to_owned(),
        if configured { "yes" } else { "no" }.to_owned(),
        context,
        price,
    ]
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// GGUF files and safetensors folders, as deep as `pull` puts them, with their sizes.
fn weights_under(folder: &Path) -> Vec<(PathBuf, u64)> {
    const DEPTH: usize = 4;
    let mut found = Vec::new();
    let mut open = vec![(folder.to_path_buf(), 0)];
    while let Some((folder, depth)) = open.pop() {
        if folder.join("config.json").is_file()
            && let Some(bytes) = weight_bytes(&folder).filter(|&bytes| bytes > 0)
        {
            found.push((folder.clone(), bytes));
        }
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && depth < DEPTH {
                open.push((path, depth + 1));
            } else if path.extension().is_some_and(|ending| ending == "gguf") {
                found.extend(weight_bytes(&path).map(|bytes| (path, bytes)));
            }
        }
    }
    found.sort();
    found
}

/// Bytes of a GGUF file, or of the safetensors in a folder; `None` if there is nothing at `path`.
pub fn weight_bytes(path: &Path) -> Option<u64> {
    let about = std::fs::metadata(path).ok()?;
    if about.is_file() {
        return Some(about.len());
    }
    let files = std::fs::read_dir(path).ok()?.flatten().map(|entry| entry.path());
    let weights = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    Some(weights.filter_map(|path| std::fs::metadata(path).ok()).map(|about| about.len()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_every_make_are_read() {
        let row = |text: &str| served(&serde_json::from_str(text).expect(text)).join("|");
        assert_eq!(row(r#"{"id":"a","object":"model"}"#), "a|-|-|-|-");
        assert_eq!(
            row(
                r#"{"id":"a","task":"Text Generation","loaded":true,"context_window":8192,"price":{"input":25,"output":75}}"#
            ),
            "a|Text Generation|yes|8192|25 / 75"
        );
        assert_eq!(row(r#"{"id":"a","max_model_len":4096}"#), "a|-|-|4096|-");
        assert_eq!(row(r#"{"id":"a","meta":{"n_ctx_train":2048}}"#), "a|-|-|2048|-");
    }

    #[test]
    fn weights_are_found_where_pull_puts_them() {
        let folder = tempfile::tempdir().expect("folder");
        let at = |path: &str| folder.path().join(path);
        for (path, bytes) in [
            ("flat.gguf", 3),
            ("org/model/m.gguf", 5),
            ("org/model/m.gguf.0123.part", 9),
            ("org/other/config.json", 2),
            ("org/other/model-1.safetensors", 7),
            ("org/other/model-2.safetensors", 7),
            ("org/empty/config.json", 2),
        ] {
            std::fs::create_dir_all(at(path).parent().expect("a folder")).expect("created");
            std::fs::write(at(path), vec![0; bytes]).expect("written");
        }
        let expected = [(at("flat.gguf"), 3), (at("org/model/m.gguf"), 5), (at("org/other"), 14)];
        assert_eq!(weights_under(folder.path()), expected);
        assert_eq!(weight_bytes(&at("nothing")), None);
    }
}
