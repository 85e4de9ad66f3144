//! Which provider's shape a path asks for. The path's first part is the provider's name, so that one address can be all of
//! them: `http://…/openai`, `http://…/groq`; what follows is as at the provider.

use percent_encoding::percent_decode_str;
use serde_json::Value;

use super::answer::Answer;
use super::ask::Ask;
use super::behaviour::Behaviour;
use super::connection::Request;
use super::{anthropic, bedrock, google, openai, others};

/// A provider's way to answer, and to fail.
#[derive(Clone, Copy)]
struct Shape {
    answer: fn(&Ask<'_>) -> Answer,
    error: fn(u16) -> Answer,
}

struct Route<'a> {
    shape: Shape,
    /// The model that the path names.
    model: Option<&'a str>,
    /// The path asks for a stream.
    stream: bool,
}

/// What is answered when nothing goes wrong but the status.
pub fn answer(request: &Request, behaviour: &Behaviour) -> Answer {
    let parts: Vec<&str> = request.path.split('/').filter(|part| !part.is_empty()).collect();
    let plain = match parts.as_slice() {
        [.., "bytes", count] => count.parse().ok().map(others::bytes),
        [.., "echo"] | [_, "echo", ..] => Some(others::echo(request)),
        _ => None,
    };
    if let Some(plain) = plain {
        return match behaviour.status {
            Some(status) => plain.status(status),
            None => plain,
        };
    }
    let Some(route) = route(&request.method, &parts, request.query.as_deref()) else {
        return others::unknown(&request.path);
    };
    if let Some(status) = behaviour.status.filter(|status| *status >= 400) {
        return (route.shape.error)(status).status(status);
    }
    let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
    let model = route.model.map(|model| percent_decode_str(model).decode_utf8_lossy().into_owned());
    let stream = route.stream || body["stream"] == true;
    let ask = Ask::read(parts[0], model.as_deref(), stream, &body, behaviour);
    let answer = (route.shape.answer)(&ask);
    match behaviour.status {
        Some(status) => answer.status(status),
        None => answer,
    }
}

fn route<'a>(method: &str, parts: &[&'a str], query: Option<&str>) -> Option<Route<'a>> {
    let by = *parts.first()?;
    let shape = |answer: fn(&Ask<'_>) -> Answer, error: fn(u16) -> Answer| Route {
        shape: Shape { answer, error },
        model: None,
        stream: false,
    };
    let openai = |answer| shape(answer, openai::error);
    let anthropic = |answer| shape(answer, anthropic::error);
    let bedrock = |model, stream, answer| Route { model: Some(model), stream, ..shape(answer, bedrock::error) };
    let replicate = |answer| shape(answer, others::detail_error);

    let listing: fn(&Ask<'_>) -> Answer = match by {
        "anthropic" => anthropic::models,
        "google-ai-studio" => google::models,
        _ => openai::models,
    };
    Some(match *parts {
        [.., "deployments", model, "chat", "completions"] => Route { model: Some(model), ..openai(openai::chat) },
        [.., "deployments", model, "embeddings"] => Route { model: Some(model), ..openai(openai::embeddings) },
        [.., "chat", "completions"] => openai(openai::chat),
        [.., "completions"] => openai(openai::completion),
        [.., "responses"] => openai(openai::responses),
        [.., "embeddings"] => openai(openai::embeddings),
        [.., "audio", "speech"] => openai(openai::speech),
        [.., "messages"] => anthropic(anthropic::messages),
        [.., "messages", "count_tokens"] => anthropic(anthropic::count_tokens),
        [.., "model", model, "converse"] => bedrock(model, false, bedrock::converse),
        [.., "model", model, "converse-stream"] => bedrock(model, true, bedrock::converse_stream),
        [.., "model", model, "invoke"] => bedrock(model, false, bedrock::invoke),
        [.., "model", model, "invoke-with-response-stream"] => bedrock(model, true, bedrock::invoke_stream),
        [.., "v2", "chat"] => shape(others::cohere_chat, others::cohere_error),
        [.., "v2", "embed"] => shape(others::cohere_embed, others::cohere_error),
        [.., "predictions"] if method == "POST" => replicate(others::replicate_create),
        [.., "predictions", id] => Route { model: Some(id), ..replicate(others::replicate_look) },
        [.., "token"] => shape(others::token, others::token_error),
        [.., "models"] if method == "GET" => shape(listing, openai::error),
        [.., "models", model] if method == "GET" => Route { model: Some(model), ..shape(listing, openai::error) },
        [.., last] if last.contains(':') => google_route(last, query)?,
        ["huggingface", _, model] | ["huggingface", "models", _, model] if method == "POST" => {
            Route { model: Some(model), ..shape(others::hugging_face, others::hugging_face_error) }
        }
        _ => return None,
    })
}

/// `{model}:{what}`, at AI Studio and at Vertex.
fn google_route<'a>(last: &'a str, query: Option<&str>) -> Option<Route<'a>> {
    let (model, what) = last.rsplit_once(':')?;
    let events = query.is_some_and(|query| query.split('&').any(|pair| pair == "alt=sse"));
    let (answer, stream): (fn(&Ask<'_>) -> Answer, bool) = match what {
        "generateContent" => (google::generate, false),
        "streamGenerateContent" if events => (google::stream, true),
        "streamGenerateContent" => (google::array_stream, true),
        "embedContent" => (google::embed, false),
        "batchEmbedContents" => (google::batch_embed, false),
        "predict" => (google::predict, false),
        "countTokens" => (google::count_tokens, false),
        "rawPredict" => (anthropic::messages, false),
        "streamRawPredict" => (anthropic::messages, true),
        _ => return None,
    };
    let error = if what.ends_with("awPredict") { anthropic::error } else { google::error };
    Some(Route { shape: Shape { answer, error }, model: Some(model), stream })
}
