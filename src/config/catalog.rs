//! The catalog: every model that can be asked for by name, with its task, limits and price, loaded or not.

use std::collections::HashMap;
use std::sync::Arc;

use crate::base::{ModelId, Neurons};
use crate::task::{Task, Usage};

/// Models by id and alias. Ids are compared as written; clients are exact about them.
#[derive(Debug, Default)]
pub struct Catalog {
    entries: Vec<Arc<CatalogEntry>>,
    by_name: HashMap<String, usize>,
}

/// One model of the catalog.
#[derive(Debug, Clone)]
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
    /// Longest sequence offered, prompt and answer.
    pub context: u32,
    /// Tokens produced when the caller does not say.
    pub max_tokens: u32,
    /// Temperature when the caller does not say.
    pub temperature: f32,
    /// `function_calling`, `json`, `lora`, `batch`, `vision`, `reasoning`, `paid`.
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

/// Which shape `/ai/run` answers in for text generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ResultShape {
    /// `{"response", "tool_calls", "usage"}`.
    #[default]
    Classic,
    /// A whole OpenAI `chat.completion`.
    Chat,
}

/// Prices in neurons per million tokens, which is micro-neurons per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Prompt tokens computed.
    #[serde(default)]
    pub input: u64,
    /// Prompt tokens out of the prefix cache; the input price if left out.
    #[serde(default)]
    pub cached_input: Option<u64>,
    /// Tokens produced.
    #[serde(default)]
    pub output: u64,
}

impl Price {
    /// What this usage costs.
    pub fn charge(&self, usage: &Usage) -> Neurons {
        let cached = u64::from(usage.cached_tokens.min(usage.prompt_tokens));
        let fresh = u64::from(usage.prompt_tokens) - cached;
        Neurons::priced(fresh, self.input)
            + Neurons::priced(cached, self.cached_input.unwrap_or(self.input))
            + Neurons::priced(u64::from(usage.completion_tokens), self.output)
    }
}

impl Catalog {
    /// The entry behind an id or alias.
    pub fn resolve(&self, name: &str) -> Option<&Arc<CatalogEntry>> {
        self.by_name.get(name).map(|&index| &self.entries[index])
    }

    /// All entries, in the order written.
    pub fn entries(&self) -> &[Arc<CatalogEntry>] {
        &self.entries
    }
}
