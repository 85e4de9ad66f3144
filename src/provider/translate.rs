//! The shared way in: which dialect a call is written in, and which code reads the answer.
//!
//!     Provider + model  -->  outgoing()   -->  path, query, headers, body
//!     Dialect           -->  answer()          a whole answer
//!                       -->  Translator        a stream: SSE or AWS frames in, OpenAI chunks out

use bytes::Bytes;
use serde_json::Value;

use crate::base::{Error, Kind, Result};
use crate::net::sse::{Decoder, Encoder, SseEvent};
use crate::provider::ask::Ask;
use crate::provider::frame::{Frame, Frames};
use crate::provider::reply::Chunks;
use crate::provider::splice::{facts, quoted, splice};
use crate::provider::url::{is_label, segment};
use crate::provider::{Dialect, Meta, Outgoing, Place, Placing, Provider, broken};
use crate::provider::{anthropic, bedrock, cohere, google, openai};
use crate::task::Usage;

/// No event of a stream is larger: a picture in a tool's arguments still fits.
const LONGEST_EVENT: usize = 16 << 20;
/// The oldest version of Azure's API that takes everything we send.
const AZURE_VERSION: &str = "2024-10-21";
/// Where a Vertex project is called that does not say where it is.
const VERTEX_REGION: &str = "global";

/// What a unified chat call becomes.
pub(super) fn outgoing(provider: &Provider, model: &str, body: &Bytes, place: &Place) -> Result<Outgoing> {
    if model.is_empty() {
        return Err(Error::bad_field("model", format!("name a model behind the provider: {}/…", provider.slug)));
    }
    match provider.dialect {
        Dialect::OpenAi if provider.place == Placing::Azure => azure(provider, model, body, place),
        Dialect::OpenAi => {
            // Of bases that may be anywhere only the path can say the version.
            let anywhere = matches!(provider.slug, "custom" | "workers-ai");
            let path = if anywhere { "v1/chat/completions" } else { "chat/completions" };
            as_sent(path.to_owned(), provider.asks_usage, model, body)
        }
        Dialect::Google if provider.place == Placing::Vertex => vertex(model, body, place),
        Dialect::Opaque => {
            let advice = format!("{} has no chat that could be unified: call it by its own paths", provider.slug);
            Err(Error::unsupported(advice).with_param("model"))
        }
        dialect => {
            let document = read(body)?;
            let ask = Ask::read(&document)?;
            let mut headers = Vec::new();
            let (path, query, body) = match dialect {
                Dialect::Anthropic => {
                    headers.push(("anthropic-version", anthropic::VERSION));
                    let body = anthropic::request(anthropic::Host::Anthropic, model, &ask)?;
                    ("v1/messages".to_owned(), None, body)
                }
                Dialect::Google => {
                    let (method, query) = google_method(ask.stream);
                    let name = if model.contains('/') { in_path(model) } else { format!("models/{}", segment(model)) };
                    (format!("v1beta/{name}:{method}"), query, google::request(model, &ask)?)
                }
                Dialect::Bedrock => {
                    let region = place.region.as_deref().filter(|region| is_label(region));
                    let region = region.ok_or_else(|| {
                        Error::bad_input("aws-bedrock needs a region: store it with the key (`region`)")
                    })?;
                    let method = if ask.stream { "converse-stream" } else { "converse" };
                    let path = format!("bedrock-runtime/{region}/model/{}/{method}", segment(model));
                    (path, None, bedrock::request(model, &ask)?)
                }
                _ => ("v2/chat".to_owned(), None, cohere::request(model, &ask)?),
            };
            Ok(translated(path, query, headers, dialect, &ask, &body))
        }
    }
}

fn translated(
    path: String,
    query: Option<&str>,
    headers: Vec<(&'static str, &'static str)>,
    dialect: Dialect,
    ask: &Ask,
    body: &Value,
) -> Outgoing {
    Outgoing {
        path,
        query: query.map(str::to_owned),
        body: body.to_string().into(),
        headers,
        dialect,
        stream: ask.stream,
        include_usage: ask.include_usage,
    }
}

/// A request in OpenAI's dialect: only its model changes, and a stream is made to tell what it used.
fn as_sent(path: String, asks_usage: bool, model: &str, body: &Bytes) -> Result<Outgoing> {
    let facts = facts(body).ok_or_else(|| Error::bad_input("the body is not a JSON object"))?;
    let mut sets = vec![("model", quoted(model))];
    if asks_usage && facts.stream && !facts.include_usage {
        sets.push(("stream_options", stream_options(body)));
    }
    Ok(Outgoing {
        path,
        query: None,
        body: splice(body, &sets)?,
        headers: Vec::new(),
        dialect: Dialect::OpenAi,
        stream: facts.stream,
        include_usage: facts.include_usage,
    })
}

/// The caller's options with the usage asked for.
fn stream_options(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Options {
        stream_options: Option<Value>,
    }
    let given = serde_json::from_slice::<Options>(body).ok().and_then(|options| options.stream_options);
    let mut options = given.filter(Value::is_object).unwrap_or_else(|| serde_json::json!({}));
    options["include_usage"] = true.into();
    options.to_string()
}

fn azure(provider: &Provider, model: &str, body: &Bytes, place: &Place) -> Result<Outgoing> {
    // Without a stored resource the model may name it: `resource/deployment`.
    let (resource, model) = match (&place.resource, model.split_once('/')) {
        (Some(resource), _) => (resource.as_str(), model),
        (None, Some((resource, model))) => (resource, model),
        (None, None) => {
            let advice =
                "azure-openai needs a resource: store it with the key, or ask for azure-openai/{resource}/{deployment}";
            return Err(Error::bad_field("model", advice));
        }
    };
    let deployment = segment(place.deployment.as_deref().unwrap_or(model));
    let path = format!("{resource}/{deployment}/chat/completions");
    let mut outgoing = as_sent(path, provider.asks_usage, model, body)?;
    let version = place.api_version.as_deref().unwrap_or(AZURE_VERSION);
    outgoing.query = Some(format!("api-version={}", segment(version)));
    Ok(outgoing)
}

/// Vertex houses several publishers, each with its own dialect.
fn vertex(model: &str, body: &Bytes, place: &Place) -> Result<Outgoing> {
    let project = place.project.as_deref().ok_or_else(|| {
        Error::bad_input("google-vertex-ai needs a project: store a service account's key, which names it")
    })?;
    let region = place.region.as_deref().unwrap_or(VERTEX_REGION);
    let root = format!("v1/projects/{}/locations/{region}", segment(project));
    let (publisher, name) = model.split_once('/').unwrap_or(("google", model));
    if !matches!(publisher, "google" | "anthropic") {
        return as_sent(format!("{root}/endpoints/openapi/chat/completions"), true, model, body);
    }
    let document = read(body)?;
    let ask = Ask::read(&document)?;
    let root = format!("{root}/publishers/{publisher}/models/{}", segment(name));
    if publisher == "anthropic" {
        let method = if ask.stream { "streamRawPredict" } else { "rawPredict" };
        let body = anthropic::request(anthropic::Host::Vertex, name, &ask)?;
        return Ok(translated(format!("{root}:{method}"), None, Vec::new(), Dialect::Anthropic, &ask, &body));
    }
    let (method, query) = google_method(ask.stream);
    let body = google::request(name, &ask)?;
    Ok(translated(format!("{root}:{method}"), query, Vec::new(), Dialect::Google, &ask, &body))
}

const fn google_method(stream: bool) -> (&'static str, Option<&'static str>) {
    if stream { ("streamGenerateContent", Some("alt=sse")) } else { ("generateContent", None) }
}

/// A name that is a path of its own: `tunedModels/mine`.
fn in_path(name: &str) -> String {
    name.split('/').map(segment).collect::<Vec<_>>().join("/")
}

fn read(body: &[u8]) -> Result<Value> {
    serde_json::from_slice(body).map_err(|error| Error::bad_input(format!("the body is not a JSON object: {error}")))
}

/// A whole answer of a provider as an OpenAI `chat.completion`.
///
/// # Errors
/// `ModelUnavailable` if it is not what the dialect answers with, or says that the model failed; the kind of the error
/// where there is one inside an answer with a good status.
pub fn answer(dialect: Dialect, meta: &Meta, body: &[u8]) -> Result<Bytes> {
    match dialect {
        Dialect::OpenAi | Dialect::Opaque => openai::answer(body),
        Dialect::Anthropic => anthropic::answer(meta, body),
        Dialect::Google => google::answer(meta, body),
        Dialect::Bedrock => bedrock::answer(meta, body),
        Dialect::Cohere => cohere::answer(meta, body),
    }
}

/// Turns a provider's stream into OpenAI's as it comes.
#[derive(Debug)]
pub struct Translator {
    state: State,
    chunks: Chunks,
    /// What the stream failed with; it stays failed.
    failed: Option<Error>,
}

#[derive(Debug)]
enum State {
    OpenAi(Sse, openai::Stream),
    Anthropic(Sse, anthropic::Stream),
    Google(Sse, google::Stream),
    Cohere(Sse, cohere::Stream),
    Bedrock(Frames, Vec<Frame>, bedrock::Stream),
}

#[derive(Debug)]
struct Sse {
    decoder: Decoder,
    events: Vec<SseEvent>,
}

impl Sse {
    fn new() -> Self {
        Self { decoder: Decoder::new(LONGEST_EVENT), events: Vec::new() }
    }

    /// Hands over the events that `bytes` complete. Those before a bad one count.
    fn each(&mut self, bytes: &[u8], mut event: impl FnMut(&str) -> Result<()>) -> Result<()> {
        let outcome = self.decoder.feed(bytes, &mut self.events);
        for arrived in self.events.drain(..) {
            event(&arrived.data)?;
        }
        outcome
    }
}

impl Translator {
    /// A translator of streams of `dialect`. `include_usage`: the caller wants a last chunk that says what was used.
    pub fn new(dialect: Dialect, meta: Meta, include_usage: bool) -> Self {
        let state = match dialect {
            Dialect::OpenAi | Dialect::Opaque => State::OpenAi(Sse::new(), openai::Stream::new(include_usage)),
            Dialect::Anthropic => State::Anthropic(Sse::new(), anthropic::Stream::default()),
            Dialect::Google => State::Google(Sse::new(), google::Stream::new(&meta)),
            Dialect::Cohere => State::Cohere(Sse::new(), cohere::Stream::default()),
            Dialect::Bedrock => State::Bedrock(Frames::new(LONGEST_EVENT), Vec::new(), bedrock::Stream::default()),
        };
        Self { state, chunks: Chunks::new(meta, include_usage), failed: None }
    }

    /// Takes the next bytes of the stream and writes the chunks that follow from them.
    ///
    /// # Errors
    /// The error event of the upstream, with a kind to act on; `ModelUnavailable` for bytes that are not its dialect. What
    /// was written before stands; nothing follows but the same error.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Encoder) -> Result<()> {
        self.unless_failed(|state, chunks| match state {
            State::OpenAi(sse, stream) => sse.each(bytes, |data| stream.event(data, out)),
            State::Anthropic(sse, stream) => sse.each(bytes, |data| stream.event(data, chunks, out)),
            State::Google(sse, stream) => sse.each(bytes, |data| stream.event(data, chunks, out)),
            State::Cohere(sse, stream) => sse.each(bytes, |data| stream.event(data, chunks, out)),
            State::Bedrock(decoder, frames, stream) => {
                let outcome = decoder.feed(bytes, frames);
                for frame in frames.drain(..) {
                    stream.event(&frame, chunks, out)?;
                }
                outcome
            }
        })
    }

    /// The upstream has closed its stream.
    ///
    /// # Errors
    /// `ModelUnavailable` if it did so before the answer was complete; then no `[DONE]` is written.
    pub fn end(&mut self, out: &mut Encoder) -> Result<()> {
        self.unless_failed(|state, chunks| match state {
            State::OpenAi(_, stream) => stream.end(out),
            State::Google(_, stream) => stream.end(chunks, out),
            State::Bedrock(decoder, _, stream) if decoder.is_empty() => stream.end(chunks, out),
            State::Anthropic(..) | State::Cohere(..) if chunks.is_done() => Ok(()),
            State::Anthropic(..) | State::Cohere(..) | State::Bedrock(..) => {
                Err(broken("the stream ended before the answer did"))
            }
        })
    }

    /// What the stream has said of its usage up to here.
    pub fn usage(&self) -> Option<Usage> {
        match &self.state {
            State::OpenAi(_, stream) => stream.counts.usage(),
            _ => self.chunks.counts.usage(),
        }
    }

    fn unless_failed(&mut self, step: impl FnOnce(&mut State, &mut Chunks) -> Result<()>) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        step(&mut self.state, &mut self.chunks).map_err(|error| {
            // An event too large is the upstream's doing, not the caller's.
            let error = if error.kind() == Kind::TooLarge { broken(error.message()) } else { error };
            self.failed = Some(error.clone());
            error
        })
    }
}

#[cfg(test)]
mod tests;
