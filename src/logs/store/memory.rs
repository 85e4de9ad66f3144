//! The index of the segment that is being written: one entry a record, texts as numbers, and what became of the rows.
//!
//! Some 200 bytes a record and each distinct text once. When the segment is full, `columns.rs` makes a file of it.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::block::{Block, Mark};
use crate::base::LogId;
use crate::logs::query::{Number, Text};
use crate::logs::record::Record;

/// Entries of metadata that count.
pub(super) const ENTRIES: usize = 5;
/// Texts of a row: those that are its own, then names and values of its metadata.
pub(super) const TEXTS: usize = Text::COUNT + 2 * ENTRIES;
/// Where names of metadata begin among the texts, and where values do.
pub(super) const KEYS: usize = Text::COUNT;
pub(super) const VALUES: usize = KEYS + ENTRIES;

/// A row as the index sees it.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) scope: u32,
    pub(super) id: u128,
    pub(super) block: u32,
    pub(super) slot: u32,
    /// 0: there is none; else the number and one.
    pub(super) numbers: [u64; Number::COUNT],
    /// 0: there is none; else the word's number and one.
    pub(super) texts: [u32; TEXTS],
    pub(super) marks: [u8; 3],
}

/// See the top of this file.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) number: u32,
    /// When its first record arrived, in milliseconds since 1970.
    pub(super) begun: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) blocks: Vec<Block>,
    pub(super) words: Vec<Words>,
    /// Bytes of the log.
    pub(super) bytes: u64,
}

impl Memory {
    pub(super) fn new(number: u32) -> Self {
        let words = (0..TEXTS).map(|_| Words::default()).collect();
        Self { number, words, ..Self::default() }
    }

    /// Takes in a block: the scope, id and record of each of its rows.
    pub(super) fn push<'a>(&mut self, block: Block, rows: impl Iterator<Item = (u32, LogId, &'a Record)>) {
        let number = self.blocks.len() as u32;
        self.blocks.push(block);
        for (slot, (scope, id, record)) in rows.enumerate() {
            if self.entries.is_empty() {
                self.begun = record.at.0;
            }
            let entry = Entry {
                scope,
                id: id.number(),
                block: number,
                slot: slot as u32,
                numbers: numbers(record),
                texts: self.texts(record),
                marks: [0; 3],
            };
            self.entries.push(entry);
        }
    }

    /// Applies a mark to a row that is there.
    pub(super) fn mark(&mut self, (row, plane, value): Mark) {
        if let Some(entry) = self.entries.get_mut(row as usize) {
            entry.marks[plane as usize] = value;
        }
    }

    fn texts(&mut self, record: &Record) -> [u32; TEXTS] {
        let mut codes = [0; TEXTS];
        let own: [(Text, &str); Text::COUNT] = [
            (Text::Provider, &record.provider),
            (Text::Model, &record.model),
            (Text::ModelType, model_type(record)),
            (Text::RequestType, &record.request_type),
            (Text::RequestContentType, record.request_content_type.as_deref().unwrap_or_default()),
            (Text::ResponseContentType, record.response_content_type.as_deref().unwrap_or_default()),
            (Text::Event, record.event.as_deref().unwrap_or_default()),
            (Text::UserAgent, record.user_agent.as_deref().unwrap_or_default()),
            (Text::DlpAction, dlp_action(record)),
        ];
        for (text, word) in own {
            codes[text as usize] = self.words[text as usize].code(word);
        }
        if let Some(metadata) = &record.metadata {
            for (at, (name, value)) in entries(metadata).into_iter().enumerate().take(ENTRIES) {
                codes[KEYS + at] = self.words[KEYS + at].code(&name);
                codes[VALUES + at] = self.words[VALUES + at].code(&value);
            }
        }
        codes
    }
}

/// The distinct texts of a column.
#[derive(Default)]
pub(super) struct Words {
    codes: HashMap<Arc<str>, u32>,
    pub(super) list: Vec<Arc<str>>,
    /// The one that was asked for last, which is often the next too.
    last: usize,
}

impl Words {
    fn code(&mut self, word: &str) -> u32 {
        if word.is_empty() {
            return 0;
        }
        if self.list.get(self.last).is_some_and(|last| &**last == word) {
            return self.last as u32 + 1;
        }
        let known = self.codes.get(word).copied();
        let code = known.unwrap_or_else(|| {
            let word: Arc<str> = word.into();
            self.list.push(word.clone());
            self.codes.insert(word, self.list.len() as u32);
            self.list.len() as u32
        });
        self.last = code as usize - 1;
        code
    }
}

/// What the model does, as the wire says it.
pub(in crate::logs) fn model_type(record: &Record) -> &'static str {
    use crate::task::Task;
    match record.task {
        None => "",
        Some(Task::TextGeneration) => "text-generation",
        Some(Task::TextEmbeddings) => "text-embeddings",
        Some(Task::TextToImage) => "text-to-image",
        Some(Task::AutomaticSpeechRecognition) => "automatic-speech-recognition",
        Some(Task::TextToSpeech) => "text-to-speech",
        Some(Task::TextClassification) => "text-classification",
        Some(Task::ImageClassification) => "image-classification",
        Some(Task::ObjectDetection) => "object-detection",
        Some(Task::ImageToText) => "image-to-text",
        Some(Task::Summarization) => "summarization",
        Some(Task::Translation) => "translation",
    }
}

/// What the rules of the gateway did.
pub(in crate::logs) fn dlp_action(record: &Record) -> &'static str {
    match record.why.as_deref() {
        Some("prompt_blocked" | "answer_blocked") => "BLOCK",
        _ if record.findings.is_empty() => "",
        _ => "FLAG",
    }
}

/// Names and values of metadata; none where it is no object.
fn entries(metadata: &str) -> Vec<(String, String)> {
    let Ok(Value::Object(entries)) = serde_json::from_str(metadata) else { return Vec::new() };
    let word = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    entries.into_iter().map(|(name, value)| (name, word(value))).collect()
}

fn numbers(record: &Record) -> [u64; Number::COUNT] {
    let tokens = |count: fn(&crate::task::Usage) -> u64| record.usage.as_ref().map(count);
    let values: [(Number, Option<u64>); Number::COUNT] = [
        (Number::At, Some(record.at.0)),
        (Number::Status, Some(record.status.into())),
        (Number::Success, Some(record.success.into())),
        (Number::Cached, Some(record.cache.is_hit().into())),
        (Number::Cost, Some(record.cost.micro())),
        (Number::Tokens, tokens(|usage| u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens))),
        (Number::TokensIn, tokens(|usage| usage.prompt_tokens.into())),
        (Number::TokensOut, tokens(|usage| usage.completion_tokens.into())),
        (Number::Duration, Some(record.duration_us)),
        (Number::Authenticated, Some(record.authenticated.into())),
    ];
    let mut numbers = [0; Number::COUNT];
    for (number, value) in values {
        numbers[number as usize] = value.map_or(0, |value| value.saturating_add(1));
    }
    numbers
}
