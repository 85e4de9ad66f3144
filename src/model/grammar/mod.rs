//! Grammars over one model's tokens: which tokens may come next, so that an answer can only become what was asked for.
//!
//! ```text
//! task::Grammar ── compile, once (cached) ──> CompiledGrammar ── one a choice ──> Matcher: prepare → mask → accept …
//! ```
//!
//! A [`Grammars`] belongs to a model and turns wishes into [`CompiledGrammar`]s: on threads of its own, few at a time,
//! within limits of size and time, so that a bad wish costs its sender an error and nobody else anything. A [`Matcher`]
//! follows one answer, token by token. Knows nothing of engines: who prepares masks when is theirs to say.

mod gbnf;
mod schema;

pub use schema::prepare;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{ParserFactory, earley::SlicedBiasComputer};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::base::{Error, Kind, Result};
use crate::metrics::EngineMetrics;
use crate::model::Vocabulary;
use crate::task::Grammar;

/// Longest grammar, as text.
const MAX_BYTES: usize = 256 * 1024;
/// Grammars compiled at the same time for one model.
const MAX_COMPILING: usize = 2;
/// How long a grammar may wait for its turn, and then take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stack of a compiling thread: a grammar may nest as deep as its text is long. Only what is touched is memory.
const STACK: usize = 512 << 20;
/// Compiled grammars kept, and what they may weigh together.
const CACHE_ENTRIES: usize = 128;
const CACHE_BYTES: usize = 128 << 20;
/// What a compiled grammar weighs at least.
const LEAST_BYTES: usize = 16 * 1024;

/// The grammars of one model.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    /// Text and id of control tokens, which Lark grammars may name.
    control: Vec<(String, u32)>,
    /// Made at the first use: a vocabulary takes its time to sort.
    factory: OnceLock<Result<ParserFactory>>,
    cache: Mutex<Cache>,
    turns: Arc<Semaphore>,
}

/// A grammar, ready for answers. Cheap to clone.
#[derive(Clone)]
pub struct CompiledGrammar {
    template: Arc<Mutex<llguidance::Matcher>>,
    /// Whether a matcher can take tokens back; else it is copied before it tries some.
    rolls_back: bool,
    bytes: usize,
}

impl Grammars {
    /// Grammars over these tokens; `control` are the texts of tokens that print nothing.
    pub fn new(vocabulary: Arc<Vocabulary>, control: Vec<(String, u32)>) -> Self {
        Self {
            vocabulary,
            control,
            factory: OnceLock::new(),
            cache: Mutex::default(),
            turns: Arc::new(Semaphore::new(MAX_COMPILING)),
        }
    }

    /// Makes a grammar ready, or finds that it is.
    ///
    /// # Errors
    /// `BadInput` or `Unsupported` for a grammar that cannot be used, with the reason; `Busy` when too many are being
    /// compiled.
    pub async fn compile(self: &Arc<Self>, grammar: &Arc<Grammar>, metrics: &EngineMetrics) -> Result<CompiledGrammar> {
        let key = key(grammar)?;
        if let Some(compiled) = self.cache.lock().get(&key) {
            metrics.grammar_hits.inc();
            return Ok(compiled);
        }
        let turn = timeout(PATIENCE, self.turns.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            let busy = "Too many grammars are being compiled; try again in a moment.";
            return Err(Error::new(Kind::Busy, busy).with_retry_after(Duration::from_secs(2)));
        };
        // Whoever had the turn before may have asked for the same.
        if let Some(compiled) = self.cache.lock().get(&key) {
            metrics.grammar_hits.inc();
            return Ok(compiled);
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (grammars, grammar, told) = (self.clone(), grammar.clone(), metrics.clone());
        let work = move || {
            let started = Instant::now();
            let compiled = grammars.compile_now(&grammar);
            told.grammar_compile_time.observe(started.elapsed().as_secs_f64());
            match &compiled {
                Ok(compiled) => grammars.cache.lock().put(key, compiled.clone()),
                Err(_) => told.grammar_refused.inc(),
            }
            // Nobody listens any more if it took too long.
            let _ = sender.send(compiled);
            drop(turn);
        };
        let thread = std::thread::Builder::new().name("neurond-grammar".to_owned()).stack_size(STACK);
        thread.spawn(work).map_err(|error| Error::internal("no thread to compile a grammar on").with_source(error))?;
        match timeout(PATIENCE, receiver).await {
            Ok(Ok(compiled)) => compiled,
            Ok(Err(_)) => Err(Error::internal("the grammar's compiler died")),
            Err(_) => {
                let seconds = PATIENCE.as_secs();
                Err(Error::bad_input(format!("The grammar was not compiled within {seconds} s: make it simpler.")))
            }
        }
    }

    /// Compiles here and now, whatever it takes.
    ///
    /// # Errors
    /// As [`Grammars::compile`].
    pub fn compile_now(&self, grammar: &Grammar) -> Result<CompiledGrammar> {
        let factory = self.factory.get_or_init(|| self.factory());
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let (what, source) = match grammar {
            Grammar::Json => ("JSON schema", json_source(&json!({ "type": "object" }))?),
            Grammar::JsonSchema(schema) => ("JSON schema", json_source(schema)?),
            Grammar::Regex(pattern) => ("regular expression", GrammarWithLexer::from_regex(whole(pattern))),
            Grammar::Choice(texts) => {
                let texts: Vec<_> = texts.iter().map(|text| regex::escape(text)).collect();
                ("choice", GrammarWithLexer::from_regex(&texts.join("|")))
            }
            Grammar::Lark(text) => ("grammar", GrammarWithLexer::from_lark(text.clone())),
            Grammar::Gbnf(text) => ("grammar", GrammarWithLexer::from_lark(gbnf::to_lark(text)?)),
        };
        let refused = |error: &dyn std::fmt::Display| {
            // The compiler adds a trace below its first paragraph, which is of no use to a caller.
            let words = error.to_string();
            let words = words.split("\n<").next().unwrap_or_default().trim().to_owned();
            Error::bad_input(format!("The {what} cannot be used: {words}"))
        };
        let parser = factory.create_parser(TopLevelGrammar::from_grammar(source));
        let parser = parser.map_err(|error| refused(&format_args!("{error:#}")))?;
        let rolls_back = parser.parser.grammar().lexer_spec().can_rollback();
        let bytes = parser.parser.lexer_stats().num_bytes.max(LEAST_BYTES);
        let matcher = llguidance::Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(refused(&error));
        }
        let compiled = CompiledGrammar { template: Arc::new(Mutex::new(matcher)), rolls_back, bytes };
        // A grammar that allows nothing at all shows at its first token.
        let mut first = compiled.matcher();
        first.prepare(&[]);
        match first.error() {
            Some(_) => Err(refused(&"no text satisfies it")),
            None => Ok(compiled),
        }
    }

    fn factory(&self) -> Result<ParserFactory> {
        let vocabulary = &self.vocabulary;
        let Some(&end) = vocabulary.end_tokens().first() else {
            return Err(Error::unsupported("This model has no end token, so no grammar can end an answer."));
        };
        let mut words: Vec<Vec<u8>> = (0..vocabulary.len() as u32)
            .map(|token| if vocabulary.is_end(token) { Vec::new() } else { vocabulary.piece(token).to_vec() })
            .collect();
        for (text, token) in &self.control {
            if let Some(word) = words.get_mut(*token as usize).filter(|word| word.is_empty()) {
                word.push(TokTrie::SPECIAL_TOKEN_MARKER);
                word.extend_from_slice(text.as_bytes());
            }
        }
        let info = TokRxInfo::new(words.len() as u32, end);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(vocabulary.end_tokens());
        let tokens: TokEnv = Arc::new(Tokens(trie));
        let slices = SlicedBiasComputer::general_slices();
        let broken = |error| Error::internal(format!("the vocabulary cannot be used with grammars: {error:#}"));
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices).map_err(broken)?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(factory)
    }
}

/// The tokens of a model, for llguidance. Text is never cut into tokens here: the model chooses how it writes.
struct Tokens(TokTrie);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<u32> {
        self.0.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

fn json_source(schema: &serde_json::Value) -> Result<GrammarWithLexer> {
    Ok(GrammarWithLexer::from_json_schema(schema::prepare(schema)?))
}

/// A pattern without the anchors around it: it matches the whole answer as it is.
fn whole(pattern: &str) -> &str {
    let open = pattern.strip_prefix('^').unwrap_or(pattern);
    let closed = open.strip_suffix('$').filter(|rest| {
        let escapes = rest.bytes().rev().take_while(|&byte| byte == b'\\').count();
        escapes % 2 == 0
    });
    closed.unwrap_or(open)
}

/// What a grammar is found by.
fn key(grammar: &Grammar) -> Result<blake3::Hash> {
    let schema;
    let (kind, parts) = match grammar {
        Grammar::Json => ("json", &[][..]),
        Grammar::JsonSchema(value) => {
            schema = value.to_string();
            ("schema", std::slice::from_ref(&schema))
        }
        Grammar::Regex(text) => ("regex", std::slice::from_ref(text)),
        Grammar::Lark(text) => ("lark", std::slice::from_ref(text)),
        Grammar::Gbnf(text) => ("gbnf", std::slice::from_ref(text)),
        Grammar::Choice(texts) => ("choice", texts.as_slice()),
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes());
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let size: usize = parts.iter().map(String::len).sum();
    if size > MAX_BYTES {
        return Err(Error::bad_input(format!("The grammar has {size} bytes, more than the {MAX_BYTES} allowed.")));
    }
    Ok(hasher.finalize())
}

/// Compiled grammars by what they were compiled from, those that were not asked for longest leave first.
#[derive(Default)]
struct Cache {
    entries: HashMap<blake3::Hash, (CompiledGrammar, u64)>,
    bytes: usize,
    clock: u64,
}

impl Cache {
    fn get(&mut self, key: &blake3::Hash) -> Option<CompiledGrammar> {
        self.clock += 1;
        let (compiled, used) = self.entries.get_mut(key)?;
        *used = self.clock;
        Some(compiled.clone())
    }

    fn put(&mut self, key: blake3::Hash, compiled: CompiledGrammar) {
        self.clock += 1;
        self.bytes += compiled.bytes;
        if let Some((old, _)) = self.entries.insert(key, (compiled, self.clock)) {
            self.bytes -= old.bytes;
        }
        while self.entries.len() > CACHE_ENTRIES || self.bytes > CACHE_BYTES {
            let Some(oldest) = self.entries.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key) else {
                return;
            };
            if let Some((old, _)) = self.entries.remove(&oldest) {
                self.bytes -= old.bytes;
            }
        }
    }
}

impl CompiledGrammar {
    /// Follows a new answer. Shares nothing with other matchers, so that they may run side by side.
    pub fn matcher(&self) -> Matcher {
        Matcher {
            inner: self.template.lock().deep_clone(),
            grammar: self.clone(),
            answer: Vec::new(),
            masks: Vec::new(),
            prepared: 0,
            looks_ahead: true,
            failed: None,
        }
    }
}

/// One answer under a grammar.
///
/// ```text
/// prepare(drafts) ──> mask(0): what may follow the answer
///                     mask(i): what may follow the answer and the first i drafts
/// accept(token) ──> the answer is longer, the masks are gone
/// ```
pub struct Matcher {
    inner: llguidance::Matcher,
    grammar: CompiledGrammar,
    answer: Vec<u32>,
    masks: Vec<SimpleVob>,
    /// Of `masks`, how many count.
    prepared: usize,
    /// No draft has led into an error so far.
    looks_ahead: bool,
    failed: Option<Error>,
}

impl Matcher {
    /// Computes the masks of the next token and of those after each of `drafts`, as far as the drafts are allowed.
    pub fn prepare(&mut self, drafts: &[u32]) {
        self.prepared = 0;
        if self.failed.is_some() {
            return;
        }
        let drafts = if self.looks_ahead { drafts } else { &[] };
        let saved = (!drafts.is_empty() && !self.grammar.rolls_back).then(|| self.inner.clone());
        let mut taken = 0;
        loop {
            match self.inner.compute_mask_or_eos() {
                Ok(mask) => self.keep(mask),
                // A draft may lead where no token goes on; only the answer itself may not.
                Err(error) if taken == 0 => return self.fail(&error),
                Err(_) => return self.forget_drafts(),
            }
            let Some(&draft) = drafts.get(taken) else { break };
            if !allows(self.mask(taken), draft) || self.inner.is_stopped() {
                break;
            }
            if self.inner.consume_token(draft).is_err() {
                return self.forget_drafts();
            }
            taken += 1;
        }
        match saved {
            _ if taken == 0 => {}
            Some(saved) => self.inner = saved,
            None if self.inner.rollback(taken).is_err() => self.forget_drafts(),
            None => {}
        }
    }

    /// A draft led into an error, out of which nothing leads back. It must not cost the answer anything but time: the
    /// answer is followed again from its beginning, and no draft from now on.
    fn forget_drafts(&mut self) {
        self.looks_ahead = false;
        self.prepared = self.prepared.min(1);
        self.inner = self.grammar.template.lock().deep_clone();
        if let Err(error) = self.inner.consume_tokens(&self.answer) {
            self.fail(&error);
        }
    }

    fn keep(&mut self, mask: SimpleVob) {
        match self.masks.get_mut(self.prepared) {
            Some(slot) => *slot = mask,
            None => self.masks.push(mask),
        }
        self.prepared += 1;
    }

    /// A bit a token, those allowed set: after the answer and the first `row` prepared drafts. Empty, so that nothing is
    /// allowed, behind a draft that was not or could not be followed, or when the matcher failed.
    pub fn mask(&self, row: usize) -> &[u32] {
        if row < self.prepared { self.masks[row].as_slice() } else { &[] }
    }

    /// The answer has one more token. One that the mask does not allow makes the matcher fail.
    pub fn accept(&mut self, token: u32) {
        self.prepared = 0;
        self.answer.push(token);
        if self.failed.is_none()
            && let Err(error) = self.inner.consume_token(token)
        {
            self.fail(&error);
        }
    }

    /// Takes the last `tokens` of the answer back.
    pub fn rollback(&mut self, tokens: usize) {
        self.prepared = 0;
        self.answer.truncate(self.answer.len().saturating_sub(tokens));
        if self.failed.is_none()
            && let Err(error) = self.inner.rollback(tokens)
        {
            self.fail(&error);
        }
    }

    /// Whether the answer is whole and nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.failed.is_none() && self.inner.is_stopped()
    }

    /// Why the answer cannot go on, if it cannot.
    pub fn error(&self) -> Option<&Error> {
        self.failed.as_ref()
    }

    /// Nothing is allowed from now on, for this reason.
    pub fn fail(&mut self, error: &dyn std::fmt::Display) {
        self.prepared = 0;
        let error = Error::bad_input("The answer cannot go on within its grammar: make the grammar simpler or wider.")
            .with_source(std::io::Error::other(error.to_string()));
        tracing::warn!(?error, "a grammar could not be followed");
        self.failed = Some(error);
    }
}

/// Whether a mask allows a token.
pub fn allows(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

#[cfg(test)]
mod tests;
