//! What can be asked for: OpenAI's model list, and Cloudflare's searches over the catalog.

use std::sync::Arc;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::base::{Error, Neurons, Result};
use crate::config::{CatalogEntry, Price};
use crate::http::ask::{Ask, no_such_model};
use crate::http::native::Envelope;
use crate::http::route::Surface;
use crate::http::{Services, answer, classic, encode};
use crate::task::Task;

/// Results on a page of a search when the caller does not say, and at most.
const PER_PAGE: usize = 50;
const MAX_PER_PAGE: usize = 1000;

/// OpenAI's list: the models that this server is configured to serve, whether they are loaded at this moment or not.
pub(super) fn list(services: &Services) -> Result<HttpResponse> {
    let data: Vec<Value> = served(services).iter().map(|entry| openai_model(entry)).collect();
    answer::json(StatusCode::OK, &json!({ "object": "list", "data": data }))
}

/// One model of that list, by id or alias.
pub(super) fn get(services: &Services, name: &str) -> Result<HttpResponse> {
    let config = services.config.get();
    let entry =
        config.catalog.resolve(name).filter(|entry| served(services).iter().any(|served| served.id == entry.id));
    let Some(entry) = entry else { return Err(no_such_model(&config.catalog, name)) };
    answer::json(StatusCode::OK, &openai_model(entry))
}

/// In the catalog's order: what is configured to be loaded, and what is loaded.
fn served(services: &Services) -> Vec<Arc<CatalogEntry>> {
    let config = services.config.get();
    let fleet = services.fleet.get();
    let served =
        |entry: &CatalogEntry| config.models.iter().any(|model| model.id == entry.id) || fleet.serves(&entry.id);
    config.catalog.entries().iter().filter(|entry| served(entry)).cloned().collect()
}

fn openai_model(entry: &CatalogEntry) -> Value {
    json!({
        "id": entry.id,
        "object": "model",
        "created": created_seconds(entry),
        "owned_by": author(entry).unwrap_or("neurond"),
        "context_window": entry.context,
    })
}

/// `models/search`: the whole catalog, filtered and paged.
pub(super) fn search(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let filter = Filter::new(ask)?;
    let config = services.config.get();
    let found: Vec<&Arc<CatalogEntry>> = config.catalog.entries().iter().filter(|entry| filter.takes(entry)).collect();
    let total = found.len();
    let page: Vec<_> =
        found.into_iter().skip((filter.page - 1).saturating_mul(filter.per_page)).take(filter.per_page).collect();
    if ask.query.get("format").is_some_and(|format| format == "openrouter") {
        let data: Vec<Value> = page.iter().map(|entry| openrouter_model(entry)).collect();
        return answer::json(StatusCode::OK, &json!({ "data": data }));
    }
    let result: Vec<Value> = page.iter().map(|entry| cloudflare_model(entry)).collect();
    let info = json!({ "page": filter.page, "per_page": filter.per_page, "count": result.len(), "total_count": total });
    list_response(ask.surface, result, Some(info))
}

/// `models/schema?model=…`: JSON Schemas of inputs and results.
pub(super) fn schema(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let Some(name) = ask.query.get("model") else { return Err(Error::bad_field("model", "'model' is required")) };
    let tasks = [Task::TextGeneration, Task::TextEmbeddings, Task::TextClassification];
    let entry = ask.model_for(services, name, &tasks)?;
    let schema = if entry.task == Task::TextGeneration { classic::schema(&entry) } else { encode::schema(&entry) };
    answer::json(StatusCode::OK, &Envelope::new(&schema))
}

/// `tasks/search`: what models can do.
pub(super) fn tasks(ask: &Ask) -> Result<HttpResponse> {
    let result = Task::ALL.iter().map(|task| task_json(*task)).collect();
    list_response(ask.surface, result, None)
}

/// `authors/search`: who made the models of the catalog.
pub(super) fn authors(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let config = services.config.get();
    let mut names: Vec<&str> = config.catalog.entries().iter().filter_map(|entry| author(entry)).collect();
    names.sort_unstable();
    names.dedup();
    let result = names.into_iter().map(|name| json!({ "id": uuid_of("author", name), "name": name })).collect();
    list_response(ask.surface, result, None)
}

/// An array in the envelope; the binding reads `result` and nothing else.
fn list_response(surface: Surface, result: Vec<Value>, info: Option<Value>) -> Result<HttpResponse> {
    let mut body = match surface {
        Surface::Binding => json!({ "result": result }),
        _ => json!({ "success": true, "errors": [], "messages": [], "result": result }),
    };
    if let Some(info) = info {
        body["result_info"] = info;
    }
    answer::json(StatusCode::OK, &body)
}

struct Filter {
    search: Option<String>,
    author: Option<String>,
    task: Option<String>,
    page: usize,
    per_page: usize,
}

impl Filter {
    fn new(ask: &Ask) -> Result<Self> {
        let word = |name: &str| ask.query.get(name).filter(|text| !text.is_empty()).map(|text| text.to_lowercase());
        let count = |name: &str, default: usize, most: usize| match ask.query.get(name) {
            None => Ok(default),
            Some(text) => match text.parse() {
                Ok(count) if (1..=most).contains(&count) => Ok(count),
                _ => Err(Error::bad_field(name, format!("'{name}' must be a whole number from 1 to {most}"))),
            },
        };
        Ok(Self {
            search: word("search"),
            author: word("author"),
            task: word("task"),
            page: count("page", 1, 1_000_000)?,
            per_page: count("per_page", PER_PAGE, MAX_PER_PAGE)?,
        })
    }

    fn takes(&self, entry: &CatalogEntry) -> bool {
        let holds = |wanted: &Option<String>, check: &dyn Fn(&str) -> bool| wanted.as_deref().is_none_or(check);
        holds(&self.search, &|text| {
            let named = |name: &str| name.to_lowercase().contains(text);
            named(entry.id.as_str()) || entry.aliases.iter().any(|alias| named(alias)) || named(&entry.description)
        }) && holds(&self.author, &|text| author(entry).is_some_and(|author| author.to_lowercase() == text))
            && holds(&self.task, &|text| entry.task.id() == text || entry.task.name().to_lowercase() == text)
    }
}

fn cloudflare_model(entry: &CatalogEntry) -> Value {
    let mut properties = vec![json!({ "property_id": "context_window", "value": entry.context.to_string() })];
    for flag in &entry.flags {
        let property = match flag.as_str() {
            "batch" => "async_queue",
            "paid" => "require_workers_paid",
            "function_calling" | "lora" | "vision" | "reasoning" | "beta" | "partner" | "realtime" => flag,
            _ => continue,
        };
        properties.push(json!({ "property_id": property, "value": "true" }));
    }
    if let Some(dimensions) = entry.dimensions {
        properties.push(json!({ "property_id": "output_dimensions", "value": dimensions.to_string() }));
    }
    if let Some(date) = &entry.planned_deprecation {
        properties.push(json!({ "property_id": "planned_deprecation_date", "value": date }));
    }
    properties.push(json!({ "property_id": "price", "value": prices(&entry.price) }));
    json!({
        "id": uuid_of("model", entry.id.as_str()),
        "source": 1,
        "name": entry.id,
        "description": entry.description,
        "task": task_json(entry.task),
        "created_at": entry.created_at,
        "tags": [],
        "properties": properties,
    })
}

fn task_json(task: Task) -> Value {
    let description = match task {
        Task::TextGeneration => "Answers and continues text.",
        Task::TextEmbeddings => "Turns text into vectors that are close when meanings are.",
        Task::TextToImage => "Draws what a text describes.",
        Task::AutomaticSpeechRecognition => "Writes down what is said.",
        Task::TextToSpeech => "Reads text aloud.",
        Task::TextClassification => "Sorts text into classes, or by relevance.",
        Task::ImageClassification => "Says what a picture shows.",
        Task::ObjectDetection => "Finds things in a picture.",
        Task::ImageToText => "Describes a picture.",
        Task::Summarization => "Makes long text short.",
        Task::Translation => "Says the same in another language.",
    };
    json!({ "id": task.id(), "name": task.name(), "description": description })
}

/// Every unit that costs something, in USD as published: a tenth of a cent of a cent at the finest.
fn prices(price: &Price) -> Vec<Value> {
    let rounded = |usd: f64| if usd >= 0.01 { (usd * 1e3).round() / 1e3 } else { (usd * 1e6).round() / 1e6 };
    let lines = price.listed();
    lines.iter().map(|line| json!({ "unit": line.unit, "price": rounded(line.usd()), "currency": "USD" })).collect()
}

fn openrouter_model(entry: &CatalogEntry) -> Value {
    // Per token, as a decimal string.
    let price = |neurons: u64| {
        let text = format!("{:.12}", Neurons::priced(1, neurons).usd());
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    let (input, output, modality) = match entry.task {
        Task::TextGeneration => ("text", "text", "text->text"),
        Task::TextToImage => ("text", "image", "text->image"),
        Task::AutomaticSpeechRecognition => ("audio", "text", "audio->text"),
        Task::TextToSpeech => ("text", "audio", "text->audio"),
        Task::ImageClassification | Task::ObjectDetection | Task::ImageToText => ("image", "text", "image->text"),
        _ => ("text", "text", "text->text"),
    };
    json!({
        "id": entry.id,
        "name": entry.id,
        "created": created_seconds(entry),
        "description": entry.description,
        "context_length": entry.context,
        "architecture": {
            "modality": modality,
            "input_modalities": [input],
            "output_modalities": [output],
            "tokenizer": "Other",
            "instruct_type": null,
        },
        "pricing": {
            "prompt": price(entry.price.input),
            "completion": price(entry.price.output),
            "input_cache_read": price(entry.price.cached_input.unwrap_or(entry.price.input)),
            "request": "0",
            "image": "0",
        },
        "top_provider": { "context_length": entry.context, "max_completion_tokens": null, "is_moderated": false },
    })
}

/// The part of an id that names its maker: `@cf/{author}/{model}`.
fn author(entry: &CatalogEntry) -> Option<&str> {
    let mut parts = entry.id.as_str().split('/');
    let first = parts.next()?;
    let second = parts.next()?;
    if first.starts_with('@') { parts.next().map(|_| second) } else { Some(first) }
}

/// The catalog's `YYYY-MM-DD HH:MM:SS.mmm` in Unix seconds; 0 for what does not parse.
fn created_seconds(entry: &CatalogEntry) -> i64 {
    let Ok(time) = entry.created_at.parse::<jiff::civil::DateTime>() else { return 0 };
    time.to_zoned(jiff::tz::TimeZone::UTC).map_or(0, |time| time.timestamp().as_second())
}

/// A name's own id, the same on every server and after every restart.
fn uuid_of(kind: &str, name: &str) -> String {
    let digest = Sha256::digest(format!("neurond:{kind}:{name}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ModelId;
    use crate::http::tests::entry;

    #[test]
    fn a_model_is_described_as_the_catalog_call_does_it() {
        let mut llama = entry("@cf/meta/llama-3.1-8b-instruct");
        llama.price = Price::tokens(25_608, 75_147);
        llama.flags = vec!["function_calling".into(), "batch".into(), "json".into()];
        llama.created_at = "2024-07-18 22:53:33.746".into();
        let model = cloudflare_model(&llama);
        assert_eq!(model["task"]["id"], "c329a1f9-323d-4e91-b2aa-582dd4188d34");
        let properties: Vec<_> =
            model["properties"].as_array().unwrap().iter().map(|p| p["property_id"].as_str().unwrap()).collect();
        assert_eq!(properties, ["context_window", "function_calling", "async_queue", "price"]);
        assert_eq!(model["properties"][0]["value"], "4096");
        assert_eq!(
            model["properties"][3]["value"][0],
            json!({"unit": "per M input tokens", "price": 0.282, "currency": "USD"})
        );
        assert_eq!(model["properties"][3]["value"][1]["price"], 0.827);
        assert_eq!(model["id"], cloudflare_model(&llama)["id"]);
        assert_eq!(openai_model(&llama)["created"], 1_721_343_213);
        assert_eq!(openai_model(&llama)["owned_by"], "meta");
        assert_eq!(openrouter_model(&llama)["pricing"]["prompt"], "0.000000281688");
    }

    #[test]
    fn the_author_is_the_part_after_the_namespace() {
        let check = |id: &str, expected: Option<&str>| {
            let mut entry = entry("x");
            entry.id = ModelId::new(id);
            assert_eq!(author(&entry), expected, "{id}");
        };
        check("@cf/meta/llama", Some("meta"));
        check("openai/gpt", Some("openai"));
        check("@cf/llama", None);
        check("smollm2", None);
    }
}
