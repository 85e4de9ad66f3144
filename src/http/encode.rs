//! What encoders do, on every surface: embeddings, reranking, text classification.
//!
//!     native     {"text"}             -> {"shape","data","pooling"}      {"query","contexts"} -> {"response":[{"id","score"}]}
//!                {"contexts"}         -> {"response","shape","pooling"}  {"text"}, a classifier -> [{"label","score"}]
//!     /v1        embeddings: OpenAI's, floats or base64                  rerank: the shape that Jina and Cohere share
//!
//! Which native form is meant follows from its fields; whether the model can do it, the gateway says.

use std::sync::Arc;

use actix_web::{HttpResponse, web};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};

use crate::base::{Error, ModelId, Neurons, Result};
use crate::config::CatalogEntry;
use crate::gateway::Encoded;
use crate::http::answer::{self, to_json};
use crate::http::ask::Ask;
use crate::http::fields::{Fields, mismatch};
use crate::http::native::Envelope;
use crate::http::route::Surface;
use crate::http::{Services, text};
use crate::task::{EncodeInput, Passage, Pooling, Task, Usage, Want};

/// Most texts of a native call.
const MAX_TEXTS: usize = 100;
/// Most texts of a call in OpenAI's shape, which is OpenAI's own limit.
const MAX_INPUTS: usize = 2048;
/// Most passages that are scored against a query.
const MAX_CONTEXTS: usize = 1000;
/// Answers of more numbers than this are written on a blocking thread.
const INLINE_NUMBERS: usize = 16 * 1024;

/// Runs an encoder on native inputs.
pub(super) async fn infer(
    services: &Services,
    ask: &Ask,
    entry: &Arc<CatalogEntry>,
    fields: &Fields<'_>,
    reject_if_busy: bool,
) -> Result<HttpResponse> {
    let encode = async |input| ask.encode(services, entry, input, reject_if_busy).await;
    let (surface, result) = (ask.surface, native(encode, entry, fields).await?);
    respond(result.neurons(), result.numbers(), move || wrapped(surface, &result)).await
}

/// What a native call is answered with.
pub(super) enum Native {
    /// The best passages of a query.
    Ranking { best: Vec<(usize, f32)>, usage: Usage, neurons: Neurons },
    /// The labels of one text.
    Labels(Encoded),
    /// Vectors of texts, `plain`, or of contexts.
    Vectors { encoded: Encoded, plain: bool },
}

/// Reads native inputs, has them encoded, and says what came of it.
pub(super) async fn native(
    encode: impl AsyncFn(EncodeInput) -> Result<Encoded>,
    entry: &CatalogEntry,
    fields: &Fields<'_>,
) -> Result<Native> {
    if fields.has("requests") {
        return Err(fields.wrong("requests", "stands at the top of the body, not within another request"));
    }
    let truncate = fields.bool("truncate_inputs")?;
    if fields.has("query") {
        let (query, contexts) = (non_empty(fields, "query")?, contexts(fields)?);
        let top_k = fields.integer("top_k", 1..=i64::from(u32::MAX))?.map_or(usize::MAX, |k| k as usize);
        let scored = score(encode, entry, query, contexts, truncate).await?;
        let best = scored.best(top_k).collect();
        return Ok(Native::Ranking { best, usage: scored.usage, neurons: scored.neurons });
    }
    let (passages, plain) = match (fields.has("text"), fields.has("contexts")) {
        (true, _) => (texts(fields, "text", MAX_TEXTS)?, true),
        (false, true) => (contexts(fields)?.into_iter().map(Passage::Text).collect(), false),
        (false, false) if entry.task == Task::TextClassification => {
            let message = "oneOf at '/' not met, 0 matches: required properties at '/' are 'query', 'contexts', \
                           required properties at '/' are 'text'";
            return Err(Error::bad_input(message));
        }
        (false, false) => return Err(Error::bad_input("required properties at '/' are 'text'")),
    };
    if entry.task == Task::TextClassification {
        if passages.len() > 1 {
            return Err(fields.wrong("text", "must be one string: a classifier takes one text at a time"));
        }
        return Ok(Native::Labels(encode(EncodeInput { passages, want: Want::Labels, truncate }).await?));
    }
    let input = EncodeInput { passages, want: Want::Vectors(pooling(fields)?), truncate };
    Ok(Native::Vectors { encoded: encode(input).await?, plain })
}

impl Native {
    /// What it used.
    pub(super) fn usage(&self) -> Usage {
        match self {
            Self::Ranking { usage, .. } => *usage,
            Self::Labels(encoded) | Self::Vectors { encoded, .. } => encoded.usage,
        }
    }

    /// What it cost.
    pub(super) fn neurons(&self) -> Neurons {
        match self {
            Self::Ranking { neurons, .. } => *neurons,
            Self::Labels(encoded) | Self::Vectors { encoded, .. } => encoded.neurons,
        }
    }

    /// As JSON.
    pub(super) async fn into_raw(self) -> Result<Box<RawValue>> {
        let unwritten = |error| Error::internal("an answer does not serialise").with_source(error);
        aside(self.numbers(), move || to_raw_value(&self).map_err(unwritten)).await
    }

    /// How many numbers have to be written.
    fn numbers(&self) -> usize {
        match self {
            Self::Ranking { best, .. } => best.len(),
            Self::Labels(encoded) | Self::Vectors { encoded, .. } => encoded.numbers.len(),
        }
    }
}

impl Serialize for Native {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let usage = UsageJson::new(&self.usage(), self.neurons());
        match self {
            Self::Ranking { best, .. } => {
                let response: Vec<Value> = best.iter().map(|(id, score)| json!({ "id": id, "score": score })).collect();
                json!({ "response": response, "usage": usage }).serialize(serializer)
            }
            Self::Labels(encoded) => {
                let labels = encoded.labels.as_deref().unwrap_or_default();
                serializer
                    .collect_seq(labels.iter().zip(&encoded.numbers).map(|(label, &score)| LabelJson { label, score }))
            }
            Self::Vectors { encoded, plain } => {
                let rows = Rows::of(encoded);
                let (shape, pooling) = ([rows.count(), rows.width], encoded.pooling);
                match plain {
                    true => Vectors { shape, data: rows, pooling, usage }.serialize(serializer),
                    false => ContextVectors { response: rows, shape, pooling, usage }.serialize(serializer),
                }
            }
        }
    }
}

/// `POST /v1/embeddings`
pub(super) async fn embeddings(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let entry = ask.model_for(services, fields.required_text("model")?, &[Task::TextEmbeddings])?;
    let base64 = match fields.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(fields.wrong("encoding_format", "must be float or base64")),
    };
    let dimensions = fields.integer("dimensions", 1..=i64::from(u32::MAX))?;
    if let (Some(wanted), Some(own)) = (dimensions, entry.dimensions) {
        check_dimensions(wanted, own as usize, &entry)?;
    }
    let input = EncodeInput {
        passages: inputs(&fields)?,
        want: Want::Vectors(pooling(&fields)?),
        truncate: fields.bool("truncate_inputs")?,
    };
    let encoded = ask.encode(services, &entry, input, text::reject_if_busy(&fields)?).await?;
    if let Some(wanted) = dimensions {
        check_dimensions(wanted, encoded.width, &entry)?;
    }
    let model = entry.id.clone();
    respond(encoded.neurons, encoded.numbers.len(), move || {
        let usage = UsageJson::new(&encoded.usage, encoded.neurons);
        to_json(&List { object: "list", data: Embeddings { rows: Rows::of(&encoded), base64 }, model: &model, usage })
    })
    .await
}

/// A model's vectors are as long as it was trained for; none here can be shortened.
fn check_dimensions(wanted: i64, own: usize, entry: &CatalogEntry) -> Result<()> {
    if usize::try_from(wanted) == Ok(own) {
        return Ok(());
    }
    let message = format!("the vectors of {} have {own} numbers and cannot be shortened: leave it out", entry.id);
    Err(Error::unsupported(message).with_param("dimensions"))
}

/// `POST /v1/rerank`, in the shape that Jina and Cohere share.
pub(super) async fn rerank(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let tasks = [Task::TextClassification, Task::TextEmbeddings];
    let entry = ask.model_for(services, fields.required_text("model")?, &tasks)?;
    let query = non_empty(&fields, "query")?;
    let documents = documents(&fields, "documents")?;
    let top_n = fields.integer("top_n", 1..=i64::from(u32::MAX))?.map_or(usize::MAX, |n| n as usize);
    let kept = fields.bool("return_documents")?.unwrap_or(false).then(|| documents.clone());
    let truncate = fields.bool("truncate_inputs")?;
    let busy = text::reject_if_busy(&fields)?;
    let encode = async |input| ask.encode(services, &entry, input, busy).await;
    let scored = score(encode, &entry, query, documents, truncate).await?;
    let results: Vec<Value> = scored
        .best(top_n)
        .map(|(index, score)| match &kept {
            Some(documents) => {
                json!({ "index": index, "relevance_score": score, "document": { "text": documents[index] } })
            }
            None => json!({ "index": index, "relevance_score": score }),
        })
        .collect();
    let (count, usage) = (results.len(), UsageJson::new(&scored.usage, scored.neurons));
    let body = json!({ "object": "list", "model": entry.id, "results": results, "usage": usage });
    respond(scored.neurons, count, move || to_json(&body)).await
}

/// How well each passage answers a query.
struct Scored {
    scores: Vec<f32>,
    usage: Usage,
    neurons: Neurons,
}

impl Scored {
    /// The best `count`, best first; among equals the earlier.
    fn best(&self, count: usize) -> impl Iterator<Item = (usize, f32)> {
        let mut order: Vec<usize> = (0..self.scores.len()).collect();
        order.sort_by(|&a, &b| self.scores[b].total_cmp(&self.scores[a]));
        order.into_iter().map(|index| (index, self.scores[index])).take(count)
    }
}

/// A reranker reads query and passage together; of an embedding model the vectors are compared.
async fn score(
    encode: impl AsyncFn(EncodeInput) -> Result<Encoded>,
    entry: &CatalogEntry,
    query: &str,
    contexts: Vec<String>,
    truncate: Option<bool>,
) -> Result<Scored> {
    let reranks = entry.task == Task::TextClassification;
    let (passages, want): (Vec<Passage>, _) = match reranks {
        true => {
            let pair = |context| Passage::Pair(query.to_owned(), context);
            (contexts.into_iter().map(pair).collect(), Want::Scores)
        }
        false => {
            let all = std::iter::once(query.to_owned()).chain(contexts);
            (all.map(Passage::Text).collect(), Want::Vectors(None))
        }
    };
    let encoded = encode(EncodeInput { passages, want, truncate }).await?;
    let scores = match reranks {
        true => encoded.numbers,
        false => {
            let (query, rest) = encoded.numbers.split_at(encoded.width);
            // Vectors have length 1, so this is the cosine.
            let dot = |row: &[f32]| row.iter().zip(query).map(|(a, b)| a * b).sum();
            rest.chunks_exact(encoded.width.max(1)).map(dot).collect()
        }
    };
    Ok(Scored { scores, usage: encoded.usage, neurons: encoded.neurons })
}

/// How many texts a native request names, at most; it need not be a good one.
pub(super) fn count(request: &Value) -> usize {
    let listed = |name| request.get(name).and_then(Value::as_array).map_or(0, Vec::len);
    1.max(listed("text")).max(listed("contexts"))
}

fn pooling(fields: &Fields<'_>) -> Result<Option<Pooling>> {
    match fields.text("pooling")? {
        None => Ok(None),
        Some("mean") => Ok(Some(Pooling::Mean)),
        Some("cls") => Ok(Some(Pooling::Cls)),
        Some(_) => Err(fields.wrong("pooling", "must be mean or cls")),
    }
}

fn non_empty<'a>(fields: &Fields<'a>, name: &str) -> Result<&'a str> {
    match fields.required_text(name)? {
        "" => Err(fields.wrong(name, "must have at least 1 character")),
        text => Ok(text),
    }
}

/// One text or up to `most`.
fn texts(fields: &Fields<'_>, name: &str, most: usize) -> Result<Vec<Passage>> {
    let values = match fields.get(name) {
        Some(Value::Array(values)) => values.as_slice(),
        Some(one) => std::slice::from_ref(one),
        None => return Err(fields.missing(name)),
    };
    check_count(fields, name, values.len(), most)?;
    let path = fields.path(name);
    let text = |(index, value): (usize, &Value)| {
        let path = if fields.get(name).is_some_and(Value::is_array) { format!("{path}.{index}") } else { path.clone() };
        match value {
            Value::String(text) if text.is_empty() => {
                Err(Error::bad_field(&path, format!("'{path}' must have at least 1 character")))
            }
            Value::String(text) => Ok(Passage::Text(text.clone())),
            other => Err(mismatch(&path, "a string", other)),
        }
    };
    values.iter().enumerate().map(text).collect()
}

fn check_count(fields: &Fields<'_>, name: &str, count: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&count) {
        return Ok(());
    }
    Err(fields.wrong(name, &format!("must hold from 1 to {most} entries, not {count}")))
}

/// OpenAI's `input`: a text, texts, the tokens of a text, or those of several.
fn inputs(fields: &Fields<'_>) -> Result<Vec<Passage>> {
    let tokens = |path: &str, values: &[Value]| match values {
        [] => Err(Error::bad_field(path, format!("'{path}' must hold at least one token"))),
        values => Ok(Passage::Tokens(text::token_ids(path, values)?)),
    };
    match fields.get("input") {
        Some(Value::Array(values)) if values.first().is_some_and(Value::is_number) => {
            Ok(vec![tokens(&fields.path("input"), values)?])
        }
        Some(Value::Array(values)) if values.first().is_some_and(Value::is_array) => {
            check_count(fields, "input", values.len(), MAX_INPUTS)?;
            let path = fields.path("input");
            let each = values.iter().enumerate().map(|(index, value)| {
                let path = format!("{path}.{index}");
                match value {
                    Value::Array(values) => tokens(&path, values),
                    other => Err(mismatch(&path, "an array of tokens", other)),
                }
            });
            each.collect()
        }
        _ => texts(fields, "input", MAX_INPUTS),
    }
}

/// `[{"text"}]`
fn contexts(fields: &Fields<'_>) -> Result<Vec<String>> {
    let Some(values) = fields.array("contexts")? else { return Err(fields.missing("contexts")) };
    check_count(fields, "contexts", values.len(), MAX_CONTEXTS)?;
    let path = fields.path("contexts");
    let text = |(index, value)| Fields::at(value, format!("{path}.{index}"))?.required_text("text").map(str::to_owned);
    values.iter().enumerate().map(text).collect()
}

/// Texts, or objects with a `text`.
fn documents(fields: &Fields<'_>, name: &str) -> Result<Vec<String>> {
    let Some(values) = fields.array(name)? else { return Err(fields.missing(name)) };
    check_count(fields, name, values.len(), MAX_CONTEXTS)?;
    let path = fields.path(name);
    let text = |(index, value): (usize, &Value)| match value {
        Value::String(text) => Ok(text.clone()),
        value => Fields::at(value, format!("{path}.{index}"))?.required_text("text").map(str::to_owned),
    };
    values.iter().enumerate().map(text).collect()
}

/// The envelope, or nothing around it on the binding.
fn wrapped(surface: Surface, result: &impl Serialize) -> Result<Vec<u8>> {
    match surface {
        Surface::Binding => to_json(result),
        _ => to_json(&Envelope::new(result)),
    }
}

async fn respond(
    neurons: Neurons,
    numbers: usize,
    write: impl FnOnce() -> Result<Vec<u8>> + Send + 'static,
) -> Result<HttpResponse> {
    Ok(answer::metered_json(aside(numbers, write).await?, neurons))
}

/// Writes an answer where it does not hold up others: a worker for a few thousand numbers, else a blocking thread.
async fn aside<Written: Send + 'static>(
    numbers: usize,
    write: impl FnOnce() -> Result<Written> + Send + 'static,
) -> Result<Written> {
    match numbers <= INLINE_NUMBERS {
        true => write(),
        false => {
            web::block(write).await.map_err(|error| Error::internal("an answer was not written").with_source(error))?
        }
    }
}

#[derive(Clone, Copy, Serialize)]
struct UsageJson {
    prompt_tokens: u32,
    total_tokens: u32,
    neurons: f64,
}

impl UsageJson {
    fn new(usage: &Usage, neurons: Neurons) -> Self {
        let neurons = neurons.as_f64();
        Self { prompt_tokens: usage.prompt_tokens, total_tokens: usage.total_tokens(), neurons }
    }
}

#[derive(Serialize)]
struct LabelJson<'a> {
    label: &'a str,
    score: f32,
}

#[derive(Serialize)]
struct Vectors<'a> {
    shape: [usize; 2],
    data: Rows<'a>,
    pooling: Pooling,
    usage: UsageJson,
}

#[derive(Serialize)]
struct ContextVectors<'a> {
    response: Rows<'a>,
    shape: [usize; 2],
    pooling: Pooling,
    usage: UsageJson,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Embeddings<'a>,
    model: &'a ModelId,
    usage: UsageJson,
}

/// An array of arrays.
struct Rows<'a> {
    numbers: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    fn of(encoded: &'a Encoded) -> Self {
        Self { numbers: &encoded.numbers, width: encoded.width.max(1) }
    }

    fn count(&self) -> usize {
        self.numbers.len() / self.width
    }
}

impl Serialize for Rows<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.numbers.chunks_exact(self.width))
    }
}

/// OpenAI's list of embeddings.
struct Embeddings<'a> {
    rows: Rows<'a>,
    base64: bool,
}

#[derive(Serialize)]
struct Embedding<Vector> {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

impl Serialize for Embeddings<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.rows.count()))?;
        let object = "embedding";
        for (index, row) in self.rows.numbers.chunks_exact(self.rows.width).enumerate() {
            if self.base64 {
                let bytes: Vec<u8> = row.iter().flat_map(|number| number.to_le_bytes()).collect();
                list.serialize_element(&Embedding { object, index, embedding: STANDARD.encode(bytes) })?;
            } else {
                list.serialize_element(&Embedding { object, index, embedding: row })?;
            }
        }
        list.end()
    }
}

/// JSON Schemas of an encoder's native inputs and results, as `models/schema` gives them.
pub(super) fn schema(entry: &CatalogEntry) -> Value {
    let string = json!({ "type": "string", "minLength": 1 });
    let contexts = json!({ "type": "array", "minItems": 1, "maxItems": MAX_CONTEXTS, "items": {
        "type": "object", "properties": { "text": { "type": "string" } }, "required": ["text"],
    } });
    let truncate = json!({ "type": "boolean", "default": entry.truncate });
    let scored = json!({
        "title": "Query and contexts",
        "properties": {
            "query": string, "contexts": contexts, "top_k": { "type": "integer", "minimum": 1 },
            "truncate_inputs": truncate,
        },
        "required": ["query", "contexts"],
    });
    let scores = json!({ "type": "object", "properties": { "response": { "type": "array", "items": {
        "type": "object", "properties": { "id": { "type": "integer" }, "score": { "type": "number" } },
    } } } });
    if entry.task == Task::TextClassification {
        let text = json!({ "title": "Text", "properties": { "text": string }, "required": ["text"] });
        let labels = json!({ "type": "array", "items": {
            "type": "object", "properties": { "label": { "type": "string" }, "score": { "type": "number" } },
        } });
        return json!({
            "input": { "type": "object", "oneOf": [scored, text] },
            "output": { "oneOf": [scores, labels] },
        });
    }
    let pooling = json!({ "type": "string", "enum": ["mean", "cls"], "default": entry.pooling });
    let text = json!({
        "title": "Text",
        "properties": {
            "text": { "oneOf": [string, { "type": "array", "items": string, "minItems": 1, "maxItems": MAX_TEXTS }] },
            "pooling": pooling, "truncate_inputs": truncate,
        },
        "required": ["text"],
    });
    let alone = json!({
        "title": "Contexts",
        "properties": { "contexts": contexts, "pooling": pooling, "truncate_inputs": truncate },
        "required": ["contexts"],
    });
    let numbers = json!({ "type": "array", "items": { "type": "array", "items": { "type": "number" } } });
    let shape = json!({ "type": "array", "items": { "type": "integer" } });
    let vectors = json!({ "type": "object", "properties": {
        "shape": shape, "data": numbers, "response": numbers, "pooling": { "type": "string", "enum": ["mean", "cls"] },
    } });
    json!({
        "input": { "type": "object", "oneOf": [text, scored, alone] },
        "output": { "oneOf": [vectors, scores] },
    })
}
