//! Guessing ahead changes how fast an answer comes and nothing else.
//!
//! ```text
//! distribution   50,000 answers through the real lane, their draws against the exact probabilities; rules of acceptance
//!                that are broken on purpose fail the same test
//! determinism    real kernels, seeds: alone = in a batch of 64 = preempted = prefix-cached = guessed ahead
//! grammars       the same under a grammar, and nothing but what it allows
//! ```
//!
//! The last two on tiny models from many seeds, and once on a real one, which is looked for in `$NEUROND_TEST_MODELS`,
//! `target/test-models` and `models/`; without it those tests say "skipped: no weights". Builds without optimisation leave
//! it out and say so: `cargo test --release --test speculation` (or `NEUROND_TEST_MODELS_ALL=1`) takes it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use neurond::base::{AccountId, DeviceId, ModelId, RequestId, Result, SlotId};
use neurond::config::{KvType, Precision};
use neurond::engine::lane::Lane;
use neurond::engine::sampler::{Draw, Sampler};
use neurond::engine::speculate::agreed;
use neurond::engine::{Logits, ModelSlot, Runner, Speculation, Submit};
use neurond::kernel::{Isa, Pool};
use neurond::metrics::{EngineMetrics, Metrics};
use neurond::model::grammar::{CompiledGrammar, Grammars, allows};
use neurond::model::text::TextModel;
use neurond::model::weights::Weights;
use neurond::model::{Batch, Decoder, DecoderOptions, Vocabulary};
use neurond::task::{Event, Grammar, Message, Prompt, Role, Sampling, Usage};

// ------------------------------------------------------------------------------------------------- distribution

/// Tokens of the little language below.
const WORDS: usize = 4;
/// Tokens of an answer that are looked at together.
const LENGTH: usize = 3;

/// A language in which the next token depends on the last one alone, so that the chance of every answer is known.
fn logits(last: u32) -> [f32; WORDS] {
    let share = [[0.55, 0.25, 0.15, 0.05], [0.1, 0.6, 0.1, 0.2], [0.3, 0.3, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1]];
    share[last as usize].map(|share: f32| share.ln())
}

/// The exact chance of each answer to a prompt that ends with `last`; `shape` is what filters leave of a row.
fn exact(last: u32, shape: fn([f64; WORDS]) -> [f64; WORDS]) -> Vec<f64> {
    let mut chances = vec![1.0; WORDS.pow(LENGTH as u32)];
    for (answer, chance) in chances.iter_mut().enumerate() {
        let mut before = last;
        for place in 0..LENGTH {
            let token = answer / WORDS.pow(place as u32) % WORDS;
            *chance *= shape(logits(before).map(|logit| f64::from(logit).exp()))[token];
            before = token as u32;
        }
    }
    chances
}

fn cell(answer: &[u32]) -> usize {
    answer.iter().rev().fold(0, |cell, &token| cell * WORDS + token as usize)
}

/// Pearson's statistic in standard deviations from what it should be (Wilson-Hilferty), over cells of at least 5 expected.
fn deviation(counts: &[u64], chances: &[f64]) -> f64 {
    let draws: u64 = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0);
    for (&count, &chance) in counts.iter().zip(chances) {
        let expected = chance * draws as f64;
        if expected >= 5.0 {
            statistic += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        } else {
            assert!(chance > 0.0 || count == 0, "an answer that cannot be");
        }
    }
    let freedom = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

/// The little language on a device, or what somebody makes of it who knows it badly.
struct Little {
    blur: f32,
    logits: Vec<f32>,
    pool: Pool,
}

impl Little {
    fn new(blur: f32) -> Self {
        Self { blur, logits: vec![], pool: Pool::new(1) }
    }
}

impl Runner for Little {
    fn blocks(&self) -> usize {
        256
    }
    fn block_tokens(&self) -> usize {
        4
    }
    /// Nothing but the last token matters, so it keeps no KV.
    fn copy(&mut self, _: u32, _: u32) {}
    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        meanwhile();
        self.logits.clear();
        for &row in &batch.sample_rows {
            let blurred = logits(batch.tokens[row as usize]).into_iter().zip([0.4, -0.8, 0.0, 0.9]);
            self.logits.extend(blurred.map(|(logit, off)| logit + self.blur * off));
        }
        Ok(Logits::Host { data: &mut self.logits, vocab: WORDS, pool: &self.pool })
    }
}

fn lane(
    runner: impl Runner + 'static,
    draft: Option<Box<dyn Runner>>,
    vocabulary: Arc<Vocabulary>,
    max_running: usize,
    speculation: Speculation,
) -> (Lane, EngineMetrics) {
    let metrics = Metrics::new().engine(&ModelId::new("m"), DeviceId(0));
    let lane = Lane::new(ModelSlot {
        slot: SlotId::next(),
        model: ModelId::new("m"),
        vocabulary,
        runner: Box::new(runner),
        context: 1024,
        step_tokens: 256,
        prefill_chunk: 64,
        max_running,
        max_queue: 100_000,
        prefix_cache: true,
        prefill_stretch: 1.7,
        spill: None,
        speculation,
        draft,
        metrics: metrics.clone(),
    });
    (lane, metrics)
}

#[derive(Clone)]
struct Asked {
    prompt: Vec<u32>,
    expected: Vec<u32>,
    grammar: Option<CompiledGrammar>,
    tokens: u32,
    sampling: Sampling,
    seed: u64,
}

/// Answers all, at once; tokens are told by their log-probabilities.
fn answers(lane: &mut Lane, asked: &[Asked]) -> Vec<(Vec<u32>, Usage)> {
    let now = Instant::now();
    let submit = |lane: &mut Lane, asked: &Asked| {
        let (events, receiver) = flume::bounded(Submit::event_capacity(1, asked.tokens));
        let submit = Submit {
            request: RequestId::random(),
            account: AccountId::new("a"),
            weight: 1,
            slot: lane.id(),
            prompt: asked.prompt.clone(),
            choices: 1,
            max_tokens: asked.tokens,
            sampling: Sampling { ignore_eos: true, ..asked.sampling.clone() },
            seed: asked.seed,
            stop: vec![],
            logprobs: Some(0),
            grammar: asked.grammar.clone(),
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            adapter: None,
            vocabulary: None,
            drafts: None,
            expected: asked.expected.clone(),
            deadline: now + Duration::from_secs(3600),
            received: now,
            events,
        };
        lane.submit(submit, now);
        receiver
    };
    let receivers: Vec<_> = asked.iter().map(|asked| submit(lane, asked)).collect();
    while !lane.is_idle() {
        assert!(lane.plan(now));
        // A draft model that takes no time, and steps that all take the same: rows cost next to nothing, so every guess is
        // worth one.
        lane.compute(&|| now).expect("a step");
        lane.deliver(now);
        lane.step_took(Duration::from_millis(10), Duration::from_millis(10));
    }
    lane.check().expect("books");
    let answer = |(receiver, asked): (flume::Receiver<Event>, &Asked)| {
        let (mut tokens, mut used) = (Vec::new(), None);
        for event in receiver.try_iter() {
            match event {
                Event::Text { logprobs, .. } => tokens.extend(logprobs.iter().map(|token| token.token)),
                Event::Finish { .. } | Event::Tool { .. } | Event::Prompt(_) => {}
                Event::Done(usage) => used = Some(usage),
                Event::Failed(error) => panic!("{error}"),
            }
        }
        let used = used.expect("an end");
        // The end token of a grammar is not told.
        let ended = asked.grammar.is_some() && tokens.len() + 1 == used.completion_tokens as usize;
        assert!(ended || tokens.len() == used.completion_tokens as usize);
        (tokens, used)
    };
    receivers.into_iter().zip(asked).map(answer).collect()
}

fn plain(share: [f64; WORDS]) -> [f64; WORDS] {
    share
}

/// Top-p 0.75 at temperature 1: the likeliest until 0.8 is reached; ties by id.
fn top_p(share: [f64; WORDS]) -> [f64; WORDS] {
    let mut order: Vec<usize> = (0..WORDS).collect();
    order.sort_by(|&a, &b| share[b].total_cmp(&share[a]).then(a.cmp(&b)));
    let (mut kept, mut total) = ([0.0; WORDS], 0.0);
    for id in order {
        if total < 0.75 {
            kept[id] = share[id];
            total += share[id];
        }
    }
    kept.map(|share| share / total)
}

#[test]
fn sampled_answers_have_the_models_own_distribution_however_they_were_guessed() {
    const ANSWERS: u64 = 50_000;
    let vocabulary = Arc::new(Vocabulary::new([b"a", b"b", b"c", b"d"], vec![]));
    let hot = Sampling { top_p: 0.75, ..Sampling::default() };
    let kinds = [(Sampling::default(), plain as fn(_) -> _), (hot, top_p)];
    // Guessed by lookup, and by a draft model that is often wrong.
    for ((sampling, shape), model) in kinds.iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let speculation = Speculation { most: 4, rows: 64, lookup: !model };
        let draft = model.then(|| Box::new(Little::new(1.0)) as Box<dyn Runner>);
        let (mut lane, metrics) = lane(Little::new(0.0), draft, vocabulary.clone(), 8, speculation);
        let asked: Vec<Asked> = (0..ANSWERS)
            .map(|seed| Asked {
                // The caller foresees a likely answer, so that drafts are tried at all three places.
                prompt: vec![1, 0],
                expected: vec![0, 0, 1, 1],
                grammar: None,
                tokens: LENGTH as u32,
                sampling: sampling.clone(),
                seed,
            })
            .collect();
        let mut counts = vec![0; WORDS.pow(LENGTH as u32)];
        for (answer, _) in answers(&mut lane, &asked) {
            counts[cell(&answer)] += 1;
        }
        let (drafted, accepted) = (metrics.drafted_tokens.get(), metrics.accepted_tokens.get());
        assert!(accepted > ANSWERS / 4 && drafted > accepted + ANSWERS / 4, "{accepted} of {drafted} came true");
        let off = deviation(&counts, &exact(0, *shape));
        assert!(off.abs() < 4.0, "{off} standard deviations off, model: {model}: {counts:?}");
    }
}

/// How many tokens of a step count, given drafts and what was drawn after each; and which they are.
type Rule = fn(&[u32], &[u32]) -> Vec<u32>;

/// Answers of the little language to a prompt that ends with 0, with drafts verified by `rule`; three steps at most.
fn verified(rule: Rule, answers: u64) -> Vec<u64> {
    let (mut sampler, pool, sampling) = (Sampler::default(), Pool::new(1), Sampling::default());
    let mut counts = vec![0; WORDS.pow(LENGTH as u32)];
    for seed in 0..answers {
        let mut answer: Vec<u32> = Vec::new();
        while answer.len() < LENGTH {
            let drafts: Vec<u32> = [0, 1, 1][..LENGTH - 1 - answer.len()].to_vec();
            let last = answer.last().copied().unwrap_or(0);
            let mut rows: Vec<f32> = std::iter::once(last).chain(drafts.iter().copied()).flat_map(logits).collect();
            let from = answer.len() as u64;
            let draw = |row: usize| Draw {
                sampling: &sampling,
                seed,
                position: from + row as u64,
                seen: None,
                ahead: &[],
                logprobs: None,
                mask: None,
                given: None,
            };
            let logits = Logits::Host { data: &mut rows, vocab: WORDS, pool: &pool };
            sampler.pick(logits, |row| Some(draw(row))).unwrap();
            let drawn: Vec<u32> = sampler.drawn().iter().map(|drawn| drawn.token.unwrap()).collect();
            answer.extend(rule(&drafts, &drawn));
        }
        counts[cell(&answer[..LENGTH])] += 1;
    }
    counts
}

#[test]
fn a_broken_rule_of_acceptance_fails_the_test_that_the_rule_in_force_passes() {
    let right: Rule = |drafts, drawn| drawn[..agreed(drafts, drawn.iter().copied())].to_vec();
    // Keeps what was drawn behind a draft that did not come true.
    let keeps_all: Rule = |_, drawn| drawn.to_vec();
    // One token too many.
    let one_more: Rule = |drafts, drawn| {
        let count = agreed(drafts, drawn.iter().copied());
        drawn[..(count + 1).min(drawn.len())].to_vec()
    };
    // Takes a likely draft for the token drawn.
    let believes: Rule = |drafts, drawn| {
        let count = agreed(drafts, drawn.iter().copied());
        let mut kept = drawn[..count].to_vec();
        if drafts.get(count - 1) == Some(&0) {
            kept[count - 1] = 0;
        }
        kept
    };
    for (rule, holds) in [(right, true), (keeps_all, false), (one_more, false), (believes, false)] {
        let off = deviation(&verified(rule, 50_000), &exact(0, plain));
        assert_eq!(off.abs() < 4.0, holds, "{off} standard deviations off");
    }
}

// -------------------------------------------------------------------------------------------------- determinism

fn tiny(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file)
}

/// A real model, or a word to whoever reads the output.
fn smollm() -> Option<PathBuf> {
    const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("NEUROND_TEST_MODELS").map(PathBuf::from);
    let folders = named.into_iter().chain([root.join("target/test-models"), root.join("models")]);
    let found = folders.map(|folder| folder.join(FILE)).find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no weights ({FILE} in $NEUROND_TEST_MODELS, target/test-models or models/)");
    } else if cfg!(debug_assertions) && std::env::var_os("NEUROND_TEST_MODELS_ALL").is_none() {
        eprintln!("skipped: a real model takes long without optimisation (cargo test --release --test speculation)");
        return None;
    }
    found
}

/// A decoder with so many blocks.
fn decoder(path: &Path, precision: Precision, blocks: usize) -> Decoder {
    let weights = Weights::open(path).expect("the weights open");
    let spec = weights.spec().expect("a decoder");
    let mut options = DecoderOptions {
        pool: Arc::new(Pool::new(2)),
        isa: Isa::detect(),
        precision,
        kv: KvType::F16,
        kv_bytes: 0,
        block_tokens: 8,
        max_rows: 256,
        max_sample_rows: 128,
    };
    options.kv_bytes = blocks * options.kv_block_bytes(&spec);
    Decoder::open(&weights, spec, &options, &|_| ()).expect("a decoder")
}

/// A lane over real kernels. A draft model has the same weights, in arithmetic of its own.
fn real(
    path: &Path,
    blocks: usize,
    max_running: usize,
    speculation: Speculation,
    drafts: Option<Precision>,
) -> (Lane, EngineMetrics) {
    let words = Weights::open(path).unwrap().spec().unwrap().vocab as u32;
    let pieces = (0..words).map(|token| format!("{token} ").into_bytes());
    real_with(path, Arc::new(Vocabulary::new(pieces, vec![])), blocks, max_running, speculation, drafts)
}

/// The same, and these are the texts of its tokens.
fn real_with(
    path: &Path,
    vocabulary: Arc<Vocabulary>,
    blocks: usize,
    max_running: usize,
    speculation: Speculation,
    drafts: Option<Precision>,
) -> (Lane, EngineMetrics) {
    let target = decoder(path, Precision::Fast, blocks);
    let draft = drafts.map(|precision| Box::new(decoder(path, precision, blocks)) as Box<dyn Runner>);
    lane(target, draft, vocabulary, max_running, speculation)
}

fn guessing() -> Speculation {
    Speculation { most: 6, rows: 48, lookup: true }
}

/// 64 requests from a seed: a few beginnings that are shared, prompts that repeat themselves, all kinds of sampling.
fn crowd(seed: u64, words: u32) -> Vec<Asked> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = move |bound: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % bound
    };
    let plain = Sampling::default();
    let kinds = [
        Sampling { temperature: 0.0, ..plain.clone() },
        plain.clone(),
        Sampling { temperature: 0.7, top_k: 20, top_p: 0.9, ..plain.clone() },
        Sampling { repetition_penalty: 1.2, frequency_penalty: 0.3, temperature: 0.4, ..plain },
    ];
    (0..64)
        .map(|_| {
            let (family, own) = (below(3) as u32, below(u64::from(words)) as u32);
            let shared = below(30) as u32;
            let tail = 1 + below(12) as u32;
            let period = 2 + below(5) as u32;
            let prompt =
                (0..shared).map(|at| (family * 31 + at) % words).chain((0..tail).map(|at| (own + at % period) % words));
            Asked {
                prompt: prompt.collect(),
                expected: if below(4) == 0 { vec![own; 8] } else { vec![] },
                grammar: None,
                tokens: 1 + below(40) as u32,
                sampling: kinds[below(4) as usize].clone(),
                seed: below(1 << 40),
            }
        })
        .collect()
}

/// Who asks a model at once, and how.
struct Crowd<'a> {
    name: String,
    path: &'a Path,
    asked: Vec<Asked>,
    /// So few blocks that sequences lose theirs.
    tight: usize,
    /// How the draft model computes.
    draft: Precision,
    /// One in so many asks again.
    again: usize,
}

/// The property. Tallies tokens cached, sequences preempted, drafts that came true, drafts that did not, and steps with a
/// draft model.
fn check_same(crowd: Crowd<'_>, tally: &mut [u64; 5]) {
    let Crowd { name, path, mut asked, tight, draft, again } = crowd;
    let (mut alone, _) = real(path, 64, 1, Speculation::default(), None);
    let expected: Vec<Vec<u32>> =
        asked.iter().map(|one| answers(&mut alone, std::slice::from_ref(one)).remove(0).0).collect();
    // Some callers foresee their answer, but for one token.
    for (asked, answer) in asked.iter_mut().zip(&expected).step_by(4) {
        asked.expected = answer.clone();
        asked.expected[answer.len() / 2] = 0;
    }
    // All at once: with and without guesses, with room for all and with so little that sequences lose their blocks.
    let ways = [(false, None), (true, None), (true, Some(draft))];
    for (blocks, (guesses, draft)) in [1024, tight].into_iter().flat_map(|blocks| ways.map(|way| (blocks, way))) {
        let speculation = if guesses { guessing() } else { Speculation::default() };
        let how = format!("{blocks} blocks, guesses: {guesses}, draft model: {}", draft.is_some());
        let (mut crowded, metrics) = real(path, blocks, 64, speculation, draft);
        for (at, ((answer, _), expected)) in answers(&mut crowded, &asked).iter().zip(&expected).enumerate() {
            assert_eq!(answer, expected, "{name}, request {at}, {how}");
        }
        // Once more, one by one, with what the others left in the prefix cache.
        for (at, expected) in expected.iter().enumerate().step_by(again) {
            let (answer, usage) = answers(&mut crowded, &asked[at..=at]).remove(0);
            assert_eq!(&answer, expected, "{name}, request {at} again, {how}");
            tally[0] += u64::from(usage.cached_tokens);
        }
        tally[1] += metrics.preemptions.get();
        tally[2] += metrics.accepted_tokens.get();
        tally[3] += metrics.drafted_tokens.get() - metrics.accepted_tokens.get();
        if draft.is_some() {
            tally[4] += metrics.draft_time.get_sample_count();
        }
    }
}

#[test]
fn tokens_are_the_same_alone_in_a_batch_of_64_preempted_cached_and_guessed() {
    for model in ["tiny-gguf/legacy.gguf", "tiny-gguf/k.gguf", "tiny-llama"] {
        let (path, mut tally) = (tiny(model), [0; 5]);
        let words = Weights::open(&path).unwrap().spec().unwrap().vocab as u32;
        for seed in 0..4 {
            let (name, asked) = (format!("{model}, seed {seed}"), crowd(seed, words));
            let crowd = Crowd { name, path: &path, asked, tight: 20, draft: Precision::Plain, again: 7 };
            check_same(crowd, &mut tally);
        }
        assert!(tally.iter().all(|&times| times > 10), "{model}: not everything happened: {tally:?}");
    }
}

/// Requests for a model that can read: conversations that begin alike, and answers that repeat what was said.
fn readers(text: &TextModel, tokens: u32) -> Vec<Asked> {
    const CLERK: &str = "You are the clerk of a small library. Novels are on the first shelf, poems are on the second shelf, \
                         maps are on the third shelf, and letters are in the drawer. Answer in full sentences.";
    const COOK: &str = "You are a cook. Give each recipe as a numbered list of short steps.";
    let plain = Sampling::default();
    let kinds = [
        Sampling { temperature: 0.0, ..plain.clone() },
        plain.clone(),
        Sampling { temperature: 0.7, top_k: 20, top_p: 0.9, ..plain.clone() },
        Sampling { repetition_penalty: 1.1, frequency_penalty: 0.2, temperature: 0.3, ..plain },
    ];
    let questions = [
        (CLERK, "Repeat word for word where novels, poems, maps and letters are."),
        (CLERK, "Where do I find a map of the harbour, and where the letters of its keeper?"),
        (COOK, "How do I boil an egg?"),
        (CLERK, "Count from one to forty, with commas between the numbers."),
        (COOK, "How do I boil two eggs, and how three?"),
        (CLERK, "Where do I find a map of the harbour, and where poems about it?"),
    ];
    let asked = questions.iter().enumerate().map(|(at, &(system, question))| {
        let messages = vec![Message::new(Role::System, system), Message::new(Role::User, question)];
        let prompt = Prompt::Chat { messages, template_kwargs: Default::default() };
        Asked {
            prompt: text.prompt_tokens(&prompt).expect("a prompt"),
            expected: vec![],
            grammar: None,
            tokens: tokens - at as u32,
            sampling: kinds[at % kinds.len()].clone(),
            seed: at as u64,
        }
    });
    asked.collect()
}

#[test]
fn a_real_models_tokens_are_the_same_alone_in_a_batch_preempted_cached_and_guessed() {
    let Some(path) = smollm() else { return };
    let asked = readers(&TextModel::open(&path).unwrap(), 48);
    let (name, mut tally) = ("a real model".to_owned(), [0; 5]);
    // The draft model is the model itself, so that it is right wherever it is asked; lookups are not.
    let crowd = Crowd { name, path: &path, asked, tight: 36, draft: Precision::Fast, again: 3 };
    check_same(crowd, &mut tally);
    let [cached, preempted, came_true, did_not, passes] = tally;
    assert!(preempted > 0, "not everything happened: {tally:?}");
    assert!([cached, came_true, did_not, passes].iter().all(|&times| times > 10), "not everything happened: {tally:?}");
}

// ------------------------------------------------------------------------------------------------------ grammars

/// Tokens of which documents are made, and some that no document needs; the last one ends an answer.
fn document_tokens(words: u32) -> Arc<Vocabulary> {
    let parts = [
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "\"size\":",
        "{\"",
        "\"color\"",
        "},{",
        ":\"",
        "red",
        "re",
        "d\"",
        "gre",
        "en",
    ];
    let parts = parts.iter().map(|part| part.to_string()).chain(('0'..='9').chain('a'..='z').map(String::from));
    let pieces: Vec<String> =
        parts.chain((0..words).map(|token| format!("<{token}>"))).take(words as usize - 1).collect();
    Arc::new(Vocabulary::new(pieces.iter().map(String::as_str).chain([""]), vec![words - 1]))
}

fn document_schema() -> serde_json::Value {
    serde_json::json!({
        "type": "array", "minItems": 3, "maxItems": 8,
        "items": {
            "type": "object", "additionalProperties": false, "required": ["size", "color"],
            "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "color": {"enum": ["red", "green"]}},
        },
    })
}

/// Whether a grammar allows an answer, token by token.
fn keeps_to(grammar: &CompiledGrammar, answer: &[u32]) -> bool {
    let mut matcher = grammar.matcher();
    answer.iter().all(|&token| {
        matcher.prepare(&[]);
        let allowed = allows(matcher.mask(0), token);
        matcher.accept(token);
        allowed
    })
}

/// Documents that a model is asked for.
struct Documents<'a> {
    name: String,
    path: &'a Path,
    vocabulary: Arc<Vocabulary>,
    grammar: CompiledGrammar,
    schema: &'a serde_json::Value,
    asked: Vec<Asked>,
    /// Room for all.
    blocks: usize,
    /// How a draft model computes, if there is one.
    draft: Option<Precision>,
}

/// Every document is valid as far as it goes, and the same without guesses and with 15 at a time. Tallies whole
/// documents, cut ones, drafts that came true, drafts that did not.
fn check_documents(documents: Documents<'_>, tally: &mut [u64; 4]) {
    let Documents { name, path, vocabulary, grammar, schema, mut asked, blocks, draft } = documents;
    asked.iter_mut().for_each(|asked| asked.grammar = Some(grammar.clone()));
    let (mut plain, _) = real_with(path, vocabulary.clone(), blocks, 64, Speculation::default(), None);
    let expected = answers(&mut plain, &asked);
    // Some callers foresee their document, but for one token.
    for (asked, (answer, _)) in asked.iter_mut().zip(&expected).step_by(4) {
        asked.expected = answer.clone();
        asked.expected[answer.len() / 2] = 0;
    }
    let speculation = Speculation { most: 15, rows: 64, lookup: true };
    let (mut guessing, metrics) = real_with(path, vocabulary.clone(), blocks, 64, speculation, draft);
    let guessed = answers(&mut guessing, &asked);
    for (at, ((answer, usage), (plain, _))) in guessed.iter().zip(&expected).enumerate() {
        assert_eq!(answer, plain, "{name}, request {at}");
        assert!(keeps_to(&grammar, answer), "{name}, request {at}: {answer:?}");
        let text: Vec<u8> = answer.iter().flat_map(|&token| vocabulary.piece(token)).copied().collect();
        let whole = usage.completion_tokens < asked[at].tokens;
        if whole {
            let document = serde_json::from_slice(&text).expect("a document");
            assert!(jsonschema::is_valid(schema, &document), "{document}");
        }
        tally[usize::from(!whole)] += 1;
    }
    tally[2] += metrics.accepted_tokens.get();
    tally[3] += metrics.drafted_tokens.get() - metrics.accepted_tokens.get();
}

#[test]
fn documents_are_valid_and_the_same_however_far_they_were_guessed() {
    let (schema, mut tally) = (document_schema(), [0; 4]);
    for model in ["tiny-gguf/legacy.gguf", "tiny-llama"] {
        let path = tiny(model);
        let words = Weights::open(&path).unwrap().spec().unwrap().vocab as u32;
        let vocabulary = document_tokens(words);
        let grammars = Grammars::new(vocabulary.clone(), vec![]);
        let grammar = grammars.compile_now(&Grammar::JsonSchema(schema.clone())).unwrap();
        for seed in 0..3 {
            let mut asked = crowd(seed, words - 1);
            for (at, asked) in asked.iter_mut().enumerate() {
                asked.tokens = if at % 3 == 0 { 1 + at as u32 } else { 300 };
            }
            let (vocabulary, grammar) = (vocabulary.clone(), grammar.clone());
            let draft = (seed % 2 == 1).then_some(Precision::Plain);
            let name = format!("{model}, seed {seed}");
            let (path, schema, blocks) = (&path, &schema, 4096);
            let documents = Documents { name, path, vocabulary, grammar, schema, asked, blocks, draft };
            check_documents(documents, &mut tally);
        }
    }
    assert!(tally.iter().all(|&times| times > 50), "not everything happened: {tally:?}");
}

#[test]
fn a_real_models_documents_are_valid_and_the_same_however_far_they_were_guessed() {
    let Some(path) = smollm() else { return };
    let text = TextModel::open(&path).unwrap();
    let schema = serde_json::json!({
        "type": "object", "additionalProperties": false, "required": ["question", "words", "shelves", "sure"],
        "properties": {
            "question": {"type": "string", "maxLength": 30},
            "words": {"type": "integer", "minimum": 0, "maximum": 99},
            "shelves": {"type": "array", "maxItems": 3, "items": {
                "type": "object", "additionalProperties": false, "required": ["shelf", "holds"],
                "properties": {"shelf": {"enum": ["first", "second", "third"]}, "holds": {"type": "string", "maxLength": 12}},
            }},
            "sure": {"type": "boolean"},
        },
    });
    let grammar = text.grammars().compile_now(&Grammar::JsonSchema(schema.clone())).unwrap();
    let mut tally = [0; 4];
    for draft in [None, Some(Precision::Fast)] {
        let (vocabulary, grammar, asked) = (text.vocabulary().clone(), grammar.clone(), readers(&text, 400));
        let name = format!("a real model, draft model: {}", draft.is_some());
        let (path, schema, blocks) = (&path, &schema, 512);
        let documents = Documents { name, path, vocabulary, grammar, schema, asked, blocks, draft };
        check_documents(documents, &mut tally);
    }
    let [whole, cut, came_true, did_not] = tally;
    assert_eq!((whole, cut), (12, 0), "every document comes to its end");
    assert!(came_true > 50 && did_not > 10, "not everything happened: {tally:?}");
}
