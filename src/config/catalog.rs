//! The catalog: every model that can be asked for by name, with its task, limits and price, loaded or not.
//!
//!     configs/catalog.toml (built in) --+
//!     [catalog] path                  --+-- key by key --> Block --check--> CatalogEntry
//!     [[model]] entry                 --+
//!
//! Knows nothing of what is loaded; `supervisor::Fleet` does.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Price;
use super::value::Written;
use crate::base::{Millis, ModelId};
use crate::task::{Pooling, Task};

/// Flags an entry may carry, as clients search for them.
pub const FLAGS: [&str; 10] =
    ["function_calling", "json", "lora", "batch", "vision", "reasoning", "paid", "beta", "partner", "multipart"];

/// How long before its planned end a model is warned about.
const NOTICE_DAYS: i64 = 90;

/// When an entry that does not say was added: the day of the price list it was taken from.
const LISTED: &str = "2026-08-28 00:00:00.000";

/// Models by id and alias. Ids are compared as written; clients are exact about them.
#[derive(Debug, Default)]
pub struct Catalog {
    entries: Vec<Arc<CatalogEntry>>,
    by_name: HashMap<String, usize>,
}

/// One model of the catalog.
#[derive(Debug, Clone, PartialEq)]
pub struct CatalogEntry {
    /// The id that answers and bills.
    pub id: ModelId,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What it does.
    pub task: Task,
    /// Which shape `/ai/run` answers in.
    pub shape: ResultShape,
    /// One or two sentences.
    pub description: String,
    /// Longest sequence offered, prompt and answer; for embeddings and rerankers the longest input. 0 where a task has no such limit.
    pub context: u32,
    /// Tokens produced when the caller does not say.
    pub max_tokens: u32,
    /// Temperature when the caller does not say.
    pub temperature: f32,
    /// Length of an embedding vector, for models that make one.
    pub dimensions: Option<u32>,
    /// How an embedding model pools when the caller does not say.
    pub pooling: Pooling,
    /// Whether inputs longer than `context` are cut when the caller does not say, or refused.
    pub truncate: bool,
    /// Some of `function_calling`, `json`, `lora`, `batch`, `vision`, `reasoning`, `paid` …
    pub flags: Vec<String>,
    /// Neurons per unit.
    pub price: Price,
    /// Requests a minute and account.
    pub rate_per_minute: u32,
    /// `YYYY-MM-DD`, when it will go away.
    pub planned_deprecation: Option<String>,
    /// `YYYY-MM-DD HH:MM:SS.mmm`, for model search.
    pub created_at: String,
}

impl CatalogEntry {
    /// Whether it carries a flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|own| own == flag)
    }
}

/// Which shape `/ai/run` answers in for text generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ResultShape {
    /// `{"response", "tool_calls", "usage"}`.
    #[default]
    Classic,
    /// A whole OpenAI `chat.completion`.
    Chat,
}

/// A file of blocks.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Blocks {
    model: Vec<Block>,
}

/// `[[model]]`: one model that can be asked for by name. A block whose id is already known changes only
/// the keys it names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Block {
    /// The id that answers and bills: `@cf/author/model`, pinned (never `…:latest`).
    /// Example: `"@cf/meta/llama-3.2-1b-instruct"`
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Other names that resolve to it. Left out: none.
    /// Example: `["llama-3.2-1b"]`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aliases: Option<Vec<String>>,
    /// What it does: `text-generation`, `text-embeddings`, `text-to-image`, `automatic-speech-recognition`, `text-to-speech`,
    /// `text-classification`, `image-classification`, `object-detection`, `image-to-text`, `summarization` or `translation`.
    /// Left out: `text-generation`.
    /// Example: `"text-generation"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// What `/ai/run` answers with: `classic` (`{"response": …}`) or `chat` (a whole OpenAI `chat.completion`). Left out: `classic`.
    /// Example: `"classic"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<ResultShape>,
    /// One or two sentences for model search. Left out: empty.
    /// Example: `"A small instruction model."`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Longest sequence offered, prompt and answer, in tokens; the longest input for embeddings and rerankers. Needed for both kinds of
    /// model, meaningless for others.
    /// Example: `60000`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Tokens produced when the caller does not say. Left out: 256, for image-to-text 512.
    /// Example: `256`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Temperature when the caller does not say. Left out: 0.6.
    /// Example: `0.6`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Length of an embedding vector. Left out: not told.
    /// Example: `1024`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
    /// How an embedding model makes one vector of a text's tokens when the caller does not say: `mean` of all, or the first
    /// one's, `cls`. Left out: `mean`.
    /// Example: `"mean"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
    /// Whether an embedding or classification model cuts inputs longer than `context` when the caller does not say, or
    /// refuses them. Left out: `true`.
    /// Example: `true`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    /// Some of `function_calling`, `json`, `lora`, `batch`, `vision`, `reasoning`, `paid`, `beta`, `partner`, `multipart`. Left out: none.
    /// Example: `["lora"]`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
    /// Neurons per unit. Token prices (`input`, `cached_input`, `output`) are per million; the other keys are `tile`, `step`, `tile_step`,
    /// `input_tile`, `input_tile_step`, `first_megapixel`, `megapixel`, `input_megapixel`, `audio_minute`, `stream_audio_minute`,
    /// `output_audio_minute`, `characters` (a thousand) and `image`. Cached tokens without a price of their own pay the input
    /// price. At least one must be above 0, unless `free = true`.
    /// Example: `{ input = 2457, output = 18252 }`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
    /// Costs nothing, and is meant to. Left out: `false`.
    /// Example: `false`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<bool>,
    /// Requests a minute and account. Left out, by task: text generation 300, embeddings 3000, text classification 2000, image
    /// classification and object detection 3000, summarization 1500, all others 720.
    /// Example: `300`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_minute: Option<u32>,
    /// The day it will go away; warned about from 90 days before. Left out: it stays.
    /// Example: `2027-03-01`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planned_deprecation: Option<Written>,
    /// `YYYY-MM-DD HH:MM:SS.mmm`, when it was added, for model search. Left out: the day of the built-in price list.
    /// Example: `"2024-07-18 22:53:33.746"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

/// A model that goes away soon, or should have.
#[derive(Debug, Clone, PartialEq)]
pub struct Deprecation {
    /// Which.
    pub id: ModelId,
    /// `YYYY-MM-DD`.
    pub date: String,
    /// Days from now; negative when it is past.
    pub days: i64,
}

impl fmt::Display for Deprecation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, date, days } = self;
        match days {
            0.. => write!(f, "{id} goes away on {date}, in {days} days: tell its users, and move the date if it stays"),
            _ => write!(f, "{id} was to go away on {date}, {} days ago: take it out, or move the date", -days),
        }
    }
}

impl Catalog {
    /// The catalog that is compiled in: `configs/catalog.toml`.
    ///
    /// # Panics
    /// If that file does not pass its own checks, which the tests below rule out.
    #[allow(clippy::expect_used)]
    pub fn builtin() -> Arc<Self> {
        static BUILTIN: std::sync::LazyLock<Arc<Catalog>> = std::sync::LazyLock::new(|| {
            let catalog = Builder::builtin().build();
            Arc::new(catalog.map_err(|problems| problems.join("\n")).expect("a built-in catalog without mistakes"))
        });
        BUILTIN.clone()
    }

    /// The entry behind an id or alias.
    pub fn resolve(&self, name: &str) -> Option<&Arc<CatalogEntry>> {
        self.by_name.get(name).map(|&index| &self.entries[index])
    }

    /// All entries, in the order written.
    pub fn entries(&self) -> &[Arc<CatalogEntry>] {
        &self.entries
    }

    /// The name closest to one that is not there, if it looks like a slip of the pen.
    pub fn nearest(&self, name: &str) -> Option<&str> {
        let limit = name.len() / 5 + 1;
        let all = self
            .entries
            .iter()
            .flat_map(|e| std::iter::once(e.id.as_str()).chain(e.aliases.iter().map(String::as_str)));
        let known = all.map(|known| (distance(name, known), known));
        known.filter(|(slips, _)| *slips <= limit).min_by_key(|(slips, _)| *slips).map(|(_, known)| known)
    }

    /// Models whose planned end is less than 90 days away at `now`, or past.
    pub fn deprecations(&self, now: Millis) -> Vec<Deprecation> {
        let today = i64::from(now.day().0);
        let planned = self.entries.iter().filter_map(|entry| {
            let date = entry.planned_deprecation.clone()?;
            let days = days_since_epoch(&date)? - today;
            Some(Deprecation { id: entry.id.clone(), date, days })
        });
        planned.filter(|planned| planned.days <= NOTICE_DAYS).collect()
    }
}

/// Whether a name moves with time instead of naming one set of weights.
pub fn is_unpinned(name: &str) -> bool {
    name.ends_with(":latest") || name.ends_with("@latest")
}

/// Blocks on their way to a [`Catalog`], each with the place it was written in.
#[derive(Clone)]
pub(super) struct Builder {
    blocks: Vec<(String, Block)>,
}

impl Builder {
    pub(super) fn empty() -> Self {
        Self { blocks: Vec::new() }
    }

    #[allow(clippy::expect_used)]
    pub(super) fn builtin() -> Self {
        let mut builder = Self::empty();
        let text = include_str!("../../configs/catalog.toml");
        builder.read(text, "configs/catalog.toml").expect("a built-in catalog that is TOML");
        builder
    }

    /// Adds a whole catalog file.
    ///
    /// # Errors
    /// What is wrong with its syntax, with the line.
    pub(super) fn read(&mut self, text: &str, origin: &str) -> Result<(), String> {
        let file: Blocks = toml::from_str(text).map_err(|error| format!("{origin}: {error}"))?;
        let mut seen = std::collections::HashSet::new();
        for block in file.model {
            // Two blocks of one file that name the same id are a mistake; of two files, a change.
            if !seen.insert(block.id.clone()) {
                return Err(format!("{origin}: id = {:?}: written twice; keep one of the blocks", block.id));
            }
            self.add(block, origin);
        }
        Ok(())
    }

    /// Adds one block, or changes the keys it names of the block that has its id.
    pub(super) fn add(&mut self, block: Block, origin: &str) {
        match self.blocks.iter_mut().find(|(_, known)| known.id == block.id) {
            Some((place, known)) => {
                *place = origin.to_owned();
                known.overlay(block);
            }
            None => self.blocks.push((origin.to_owned(), block)),
        }
    }

    /// Checks everything.
    ///
    /// # Errors
    /// Every mistake, each with file, model, key, value and remedy.
    pub(super) fn build(self) -> Result<Catalog, Vec<String>> {
        let mut problems = Vec::new();
        let mut catalog = Catalog::default();
        for (origin, block) in self.blocks {
            let before = problems.len();
            let entry =
                block.check(&mut |key, problem| problems.push(format!("{origin}: {}: {key}: {problem}", block.id)));
            for name in std::iter::once(entry.id.as_str()).chain(entry.aliases.iter().map(String::as_str)) {
                if let Some(&other) = catalog.by_name.get(name) {
                    let other = catalog.entries.get(other).map_or(entry.id.as_str(), |e| e.id.as_str());
                    problems.push(format!("{origin}: {}: {name:?} already names {other}; give each its own", entry.id));
                } else {
                    catalog.by_name.insert(name.to_owned(), catalog.entries.len());
                }
            }
            if problems.len() == before {
                catalog.entries.push(Arc::new(entry));
            } else {
                // Keep indices true for the names already taken.
                catalog.by_name.retain(|_, index| *index < catalog.entries.len());
            }
        }
        if problems.is_empty() { Ok(catalog) } else { Err(problems) }
    }
}

impl Block {
    /// Takes the keys that `newer` names.
    fn overlay(&mut self, newer: Block) {
        macro_rules! take {
            ($($key:ident)*) => { $(if newer.$key.is_some() { self.$key = newer.$key; })* };
        }
        take!(aliases task result description context max_tokens temperature dimensions pooling truncate flags price free);
        take!(rate_per_minute planned_deprecation created_at);
    }

    /// The entry it describes; `problem(key, what)` hears every mistake.
    fn check(&self, problem: &mut dyn FnMut(&str, String)) -> CatalogEntry {
        let block = self.clone();
        let task = block.task.unwrap_or(Task::TextGeneration);
        let aliases = block.aliases.unwrap_or_default();
        for (key, name) in std::iter::once(("id", &block.id)).chain(aliases.iter().map(|alias| ("aliases", alias))) {
            if is_unpinned(name) {
                problem(
                    key,
                    format!(
                        "{name:?} moves with time; name one version, so that answers and prices stay what they were"
                    ),
                );
            } else if !is_name(name) {
                problem(
                    key,
                    format!("{name:?} is not a model name; use letters, digits and @ / . _ - such as @cf/author/model"),
                );
            }
        }
        if matches!(task, Task::TextGeneration | Task::TextEmbeddings) && block.context.is_none() {
            problem("context", "missing; write the longest sequence in tokens, such as 8192".into());
        }
        for (key, value) in [
            ("context", block.context),
            ("max_tokens", block.max_tokens),
            ("dimensions", block.dimensions),
            ("rate_per_minute", block.rate_per_minute),
        ] {
            if value == Some(0) {
                problem(key, "0 allows nothing; write at least 1, or leave it out".into());
            }
        }
        let temperature = block.temperature.unwrap_or(0.6);
        if !(0.0..=5.0).contains(&temperature) {
            problem("temperature", format!("{temperature} is out of range; write a number from 0 to 5"));
        }
        let flags = block.flags.unwrap_or_default();
        for flag in flags.iter().filter(|flag| !FLAGS.contains(&flag.as_str())) {
            problem("flags", format!("{flag:?} is unknown; use some of {}", FLAGS.join(", ")));
        }
        let price = block.price.unwrap_or_default();
        match (block.free.unwrap_or(false), price.is_zero()) {
            (false, true) => problem(
                "price",
                "missing or 0; write neurons per unit, or free = true if it is meant to cost nothing".into(),
            ),
            (true, false) => problem("free", "true, but it has a price; keep one of the two".into()),
            _ => {}
        }
        let planned_deprecation = block.planned_deprecation.map(|date| date.to_string());
        if let Some(date) = planned_deprecation.as_deref().filter(|date| days_since_epoch(date).is_none()) {
            problem("planned_deprecation", format!("{date:?} is not a date; write it as 2027-03-01"));
        }
        let created_at = block.created_at.unwrap_or_else(|| LISTED.to_owned());
        if jiff::civil::DateTime::strptime("%Y-%m-%d %H:%M:%S%.f", &created_at).is_err() {
            problem("created_at", format!("{created_at:?} is not a moment; write it as {LISTED:?}"));
        }
        CatalogEntry {
            id: ModelId::new(&block.id),
            aliases,
            task,
            shape: block.result.unwrap_or_default(),
            description: block.description.unwrap_or_default(),
            context: block.context.unwrap_or(0),
            max_tokens: block.max_tokens.unwrap_or(if task == Task::ImageToText { 512 } else { 256 }),
            temperature,
            dimensions: block.dimensions,
            pooling: block.pooling.unwrap_or_default(),
            truncate: block.truncate.unwrap_or(true),
            flags,
            price,
            rate_per_minute: block.rate_per_minute.unwrap_or(default_rate(task)),
            planned_deprecation,
            created_at,
        }
    }
}

impl CatalogEntry {
    /// Whether its limit on requests is its own, and not the one that all models of its task share.
    pub fn has_own_rate(&self) -> bool {
        self.rate_per_minute != default_rate(self.task)
    }
}

/// Requests a minute and account, by task.
fn default_rate(task: Task) -> u32 {
    match task {
        Task::TextGeneration => 300,
        Task::TextEmbeddings | Task::ImageClassification | Task::ObjectDetection => 3000,
        Task::TextClassification => 2000,
        Task::Summarization => 1500,
        Task::TextToImage
        | Task::AutomaticSpeechRecognition
        | Task::TextToSpeech
        | Task::ImageToText
        | Task::Translation => 720,
    }
}

/// Names go into paths, headers, labels and logs.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 200 && name.chars().all(|c| c.is_ascii_alphanumeric() || "@/._-:".contains(c))
}

fn days_since_epoch(date: &str) -> Option<i64> {
    let date: jiff::civil::Date = date.parse().ok()?;
    let noon = date.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some(noon.timestamp().as_second().div_euclid(86_400))
}

/// Insertions, deletions and exchanges of a character from one text to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let exchanged = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = exchanged.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(text: &str) -> Result<Catalog, String> {
        let mut builder = Builder::empty();
        builder.read(text, "x.toml")?;
        builder.build().map_err(|problems| problems.join("\n"))
    }

    #[test]
    fn the_built_in_catalog_knows_the_models_users_ask_for() {
        let catalog = Catalog::builtin();
        for (name, id, task, rate, micro_in) in [
            (
                "@cf/meta/llama-3.3-70b-instruct",
                "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
                Task::TextGeneration,
                300,
                26_668,
            ),
            (
                "@cf/mistral/mistral-small-3.1-24b-instruct",
                "@cf/mistralai/mistral-small-3.1-24b-instruct",
                Task::TextGeneration,
                300,
                31_876,
            ),
            (
                "@cf/meta/llama-3.2-11b-vision-instruct",
                "@cf/meta/llama-3.2-11b-vision-instruct",
                Task::TextGeneration,
                720,
                4_410,
            ),
            ("@cf/baai/bge-large-en-v1.5", "@cf/baai/bge-large-en-v1.5", Task::TextEmbeddings, 1500, 18_582),
            ("@cf/baai/bge-reranker-base", "@cf/baai/bge-reranker-base", Task::TextClassification, 2000, 283),
            ("@cf/moonshotai/kimi-k2.6", "@cf/moonshotai/kimi-k2.6", Task::TextGeneration, 20, 86_364),
            ("smollm2-135m-instruct", "@cf/huggingfacetb/smollm2-135m-instruct", Task::TextGeneration, 300, 300),
        ] {
            let entry = catalog.resolve(name).unwrap_or_else(|| panic!("{name} is not in the catalog"));
            assert_eq!(
                (entry.id.as_str(), entry.task, entry.rate_per_minute, entry.price.input),
                (id, task, rate, micro_in),
                "{name}"
            );
        }
        assert!(catalog.entries().iter().all(|entry| !entry.description.is_empty()));
        let scout = catalog.resolve("@cf/meta/llama-4-scout-17b-16e-instruct").unwrap();
        assert_eq!((scout.temperature, scout.max_tokens, scout.has("vision")), (0.15, 256, true));
        assert_eq!(catalog.resolve("@cf/openai/gpt-oss-20b").unwrap().shape, ResultShape::Chat);
        assert!(catalog.resolve("@cf/meta/llama-9").is_none());
    }

    #[test]
    fn each_mistake_names_file_model_key_and_remedy() {
        let check = |body: &str, wanted: &str| {
            let said = build(&format!("[[model]]\nid = \"@cf/a/b\"\n{body}")).unwrap_err();
            assert!(said.starts_with("x.toml: @cf/a/b: ") && said.contains(wanted), "{body}\n{said}");
        };
        check("price = { input = 1 }", "context: missing");
        check("context = 0\nprice = { input = 1 }", "context: 0 allows nothing");
        check("context = 1", "price: missing or 0; write neurons per unit, or free = true");
        check("context = 1\nfree = true\nprice = { output = 1 }", "free: true, but it has a price");
        check(
            "context = 1\nfree = true\nflags = ['tools']",
            "flags: \"tools\" is unknown; use some of function_calling",
        );
        check("context = 1\nfree = true\naliases = ['b:latest']", "aliases: \"b:latest\" moves with time");
        check("context = 1\nfree = true\naliases = ['a b']", "aliases: \"a b\" is not a model name");
        check("context = 1\nfree = true\naliases = ['@cf/a/b']", "\"@cf/a/b\" already names @cf/a/b");
        check("context = 1\nfree = true\ntemperature = 6", "temperature: 6 is out of range");
        check(
            "context = 1\nfree = true\nplanned_deprecation = '2027-02-30'",
            "planned_deprecation: \"2027-02-30\" is not a date",
        );
        check("context = 1\nfree = true\ncreated_at = 'today'", "created_at: \"today\" is not a moment");
        let twice = "[[model]]\nid='a'\ncontext=1\nfree=true\n[[model]]\nid='a'\n";
        assert!(build(twice).unwrap_err().contains("written twice"));
        let shared = "[[model]]\nid='a'\ncontext=1\nfree=true\naliases=['c']\n[[model]]\nid='b'\ncontext=1\nfree=true\naliases=['c']";
        assert_eq!(build(shared).unwrap_err(), "x.toml: b: \"c\" already names a; give each its own");
        let unknown = build("[[model]]\nid='a'\nprices={}\n").unwrap_err();
        assert!(unknown.contains("line 3") && unknown.contains("unknown field `prices`"), "{unknown}");
    }

    #[test]
    fn a_later_block_changes_only_the_keys_it_names() {
        let mut builder = Builder::builtin();
        builder.read("[[model]]\nid='@cf/meta/llama-3.2-1b-instruct'\nprice={input=1,output=2}\n[[model]]\nid='mine'\ncontext=9\nfree=true\n", "x").unwrap();
        let catalog = builder.build().unwrap();
        let llama = catalog.resolve("@cf/meta/llama-3.2-1b-instruct").unwrap();
        assert_eq!((llama.price, llama.context), (Price::tokens(1, 2), 60_000));
        assert_eq!(catalog.entries().len(), Catalog::builtin().entries().len() + 1);
    }

    #[test]
    fn a_model_is_warned_about_from_90_days_before_its_end() {
        let catalog = build("[[model]]\nid='a'\ncontext=1\nfree=true\nplanned_deprecation = 2027-03-01\n").unwrap();
        let day = 86_400_000;
        let end = u64::try_from(days_since_epoch("2027-03-01").unwrap()).unwrap() * day;
        let warned = |now: u64| catalog.deprecations(Millis(now)).first().map(ToString::to_string);
        assert_eq!(warned(end - 91 * day), None);
        assert!(warned(end - 90 * day).unwrap().starts_with("a goes away on 2027-03-01, in 90 days"));
        assert!(warned(end + 2 * day).unwrap().starts_with("a was to go away on 2027-03-01, 2 days ago"));
    }

    #[test]
    fn a_slip_of_the_pen_finds_the_name_that_was_meant() {
        let catalog = Catalog::builtin();
        let near = |name| catalog.nearest(name);
        assert_eq!(near("@cf/meta/llama-3.2-1b-instuct"), Some("@cf/meta/llama-3.2-1b-instruct"));
        assert_eq!(near("something else"), None);
    }
}
