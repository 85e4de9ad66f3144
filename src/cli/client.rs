//! A small client for any OpenAI-compatible URL: lists models, streams answers, and turns every way a server can fail
//! into a sentence that says what to do. Lean on purpose: `bench` runs it on the cores the server needs.
//! It never retries: what a server did is what the caller gets to see.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, StatusCode, Url};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Error, Kind, Result, Secret};
use crate::net::sse;

/// An event larger than this is no chunk of an answer.
const EVENT_LIMIT: usize = 16 << 20;

/// Which server, and with which credentials.
#[derive(clap::Args, Clone)]
pub struct Server {
    /// Base URL of an OpenAI-compatible API; `/v1` is added to a bare host
    #[arg(long, env = "NEUROND_URL", default_value = "http://127.0.0.1:8080/v1")]
    pub url: String,
    /// Bearer token [also read from OPENAI_API_KEY]
    #[arg(long, env = "NEUROND_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

/// A server to ask.
pub struct Api {
    http: reqwest::Client,
    base: String,
    token: Option<Secret<String>>,
}

/// One row of `GET /models`. What goes beyond OpenAI's four fields is kept as it came.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct ModelRow {
    /// The id to ask for.
    pub id: String,
    /// Everything else the server says.
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// Token counts as the server reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u64,
    /// Tokens produced.
    pub completion_tokens: u64,
    /// Where some of the prompt came from.
    pub prompt_tokens_details: Option<PromptDetails>,
}

/// The part of the prompt that was not computed again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PromptDetails {
    /// Tokens out of the prefix cache.
    pub cached_tokens: u64,
}

/// What one event of a stream brought.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk {
    /// Text of the answer.
    pub text: String,
    /// Text a reasoning model thinks before it answers.
    pub reasoning: String,
    /// Why it ended.
    pub finish: Option<String>,
    /// Token counts, once.
    pub usage: Option<Usage>,
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// For counting.
    pub reason: Reason,
    /// For reading.
    pub message: String,
}

/// The ways a request fails, seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// No connection.
    Unreachable,
    /// Nothing came for too long.
    Timeout,
    /// The answer stopped before its end.
    Cut,
    /// An HTTP status that is not a success.
    Status(u16),
    /// An error event inside a stream.
    InStream,
    /// An answer that is not what the API promises.
    Malformed,
}

impl Api {
    /// A client for this server. `patience` is how long it may stay silent, also in the middle of an answer.
    pub fn new(server: &Server, patience: Duration) -> Result<Self> {
        let base = base_url(&server.url)?;
        let token = server.token.clone().or_else(|| std::env::var("OPENAI_API_KEY").ok()).filter(|t| !t.is_empty());
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("neurond/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(patience)
            .tcp_nodelay(true)
            // Some servers close kept connections whenever they like, and a request must not meet one that is closing. A new
            // connection costs nothing beside an answer.
            .pool_max_idle_per_host(0);
        if is_loopback(&base) {
            // A proxy cannot reach this machine's loopback.
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| Error::internal(format!("cannot set up HTTP: {error}")))?;
        Ok(Self { http, base: base.as_str().trim_end_matches('/').to_owned(), token: token.map(Secret::new) })
    }

    /// The base URL as used.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `GET /models`, in the server's order.
    pub async fn models(&self) -> Result<Vec<ModelRow>, Failure> {
        #[derive(Deserialize)]
        struct List {
            data: Vec<ModelRow>,
        }
        let request = self.http.get(format!("{}/models", self.base)).timeout(Duration::from_secs(30));
        let body = self.send(request).await?.bytes().await.map_err(|error| self.transport(&error))?;
        match serde_json::from_slice::<List>(&body) {
            Ok(list) => Ok(list.data),
            Err(error) => Err(Failure {
                reason: Reason::Malformed,
                message: format!("{}/models is not a list of models ({error}): is the URL right?", self.base),
            }),
        }
    }

    /// The model to talk to: the one asked for, or the server's first.
    pub async fn pick_model(&self, wanted: Option<String>) -> Result<String, Failure> {
        if let Some(model) = wanted {
            return Ok(model);
        }
        let first = self.models().await?.into_iter().next();
        first.map(|row| row.id).ok_or_else(|| Failure {
            reason: Reason::Malformed,
            message: format!("{} lists no model: name one with --model", self.base),
        })
    }

    /// `GET` of a path below the place where this server's APIs begin, whatever the base URL names there; the whole answer.
    pub async fn get_from_root(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Bytes, Failure> {
        let Some(url) = from_root(&self.base, path) else {
            return Err(Failure {
                reason: Reason::Malformed,
                message: format!("{} has no path to ask under", self.base),
            });
        };
        let request = self.http.get(url).query(query).timeout(Duration::from_secs(60));
        self.send(request).await?.bytes().await.map_err(|error| self.transport(&error))
    }

    /// `POST {path}`; the whole answer.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Bytes, Failure> {
        let response = self.send(self.http.post(format!("{}{path}", self.base)).json(body)).await?;
        response.bytes().await.map_err(|error| self.transport(&error))
    }

    /// `POST {path}` with `"stream": true` in the body; the answer arrives as it is made.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Answer, Failure> {
        let response = self.send(self.http.post(format!("{}{path}", self.base)).json(body)).await?;
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("text/event-stream") {
            return Err(Failure {
                reason: Reason::Malformed,
                message: format!("{}{path} answered with {kind:?} where an event stream was asked for", self.base),
            });
        }
        Ok(Answer { response, decoder: sse::Decoder::new(EVENT_LIMIT), ready: VecDeque::new(), over: false })
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        };
        let response = request.send().await.map_err(|error| self.transport(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let said = response.bytes().await.ok().and_then(|body| said_by_server(&body));
        Err(Failure { reason: Reason::Status(status.as_u16()), message: self.refused(status, said) })
    }

    fn refused(&self, status: StatusCode, said: Option<String>) -> String {
        let said = said.unwrap_or_else(|| status.canonical_reason().unwrap_or("no reason given").to_owned());
        let remedy = match status {
            StatusCode::UNAUTHORIZED => ". Give a token with --token or NEUROND_TOKEN",
            StatusCode::NOT_FOUND => ". `neurond models` lists what can be asked for; --url should end in /v1",
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => ". It may answer again in a moment",
            _ => "",
        };
        format!("{} answered {}: {}{remedy}", self.base, status.as_u16(), said.trim_end_matches('.'))
    }

    fn transport(&self, error: &reqwest::Error) -> Failure {
        if error.is_timeout() && !error.is_connect() {
            return Failure { reason: Reason::Timeout, message: format!("{} did not answer in time", self.base) };
        }
        if !error.is_connect() {
            return Failure { reason: Reason::Cut, message: format!("{} broke off: {}", self.base, root_cause(error)) };
        }
        let remedy = match is_loopback_text(&self.base) {
            true => "Is the daemon running? Start it with `scripts/quickstart.sh` or `neurond serve`, or give --url",
            false => "Check --url and the network",
        };
        Failure {
            reason: Reason::Unreachable,
            message: format!("cannot reach {}: {}. {remedy}", self.base, root_cause(error)),
        }
    }
}

/// A stream of chunks. Dropping it closes the connection, which is how a request is cancelled.
pub struct Answer {
    response: Response,
    decoder: sse::Decoder,
    ready: VecDeque<sse::SseEvent>,
    over: bool,
}

impl Answer {
    /// The next chunk; `None` after `[DONE]`. A stream that ends without it was cut.
    pub async fn next(&mut self) -> Result<Option<Chunk>, Failure> {
        loop {
            if self.over {
                return Ok(None);
            }
            if let Some(event) = self.ready.pop_front() {
                self.over = event.data == "[DONE]";
                if self.over {
                    continue;
                }
                return chunk(&event.data).map(Some);
            }
            let bytes = match self.response.chunk().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return Err(cut("the server closed the stream before its end")),
                Err(error) if error.is_timeout() => {
                    let message = "the server fell silent in the middle of an answer".to_owned();
                    return Err(Failure { reason: Reason::Timeout, message });
                }
                Err(error) => return Err(cut(&format!("the answer broke off: {}", root_cause(&error)))),
            };
            let mut events = Vec::new();
            let fed = self.decoder.feed(&bytes, &mut events);
            self.ready.extend(events);
            fed.map_err(|error| Failure { reason: Reason::Malformed, message: error.message().to_owned() })?;
        }
    }
}

fn cut(message: &str) -> Failure {
    Failure { reason: Reason::Cut, message: message.to_owned() }
}

fn chunk(data: &str) -> Result<Chunk, Failure> {
    #[derive(Deserialize)]
    struct Wire {
        #[serde(default)]
        choices: Vec<Choice>,
        usage: Option<Usage>,
        error: Option<Value>,
    }
    #[derive(Deserialize)]
    struct Choice {
        delta: Option<Delta>,
        text: Option<String>,
        finish_reason: Option<String>,
    }
    #[derive(Deserialize)]
    struct Delta {
        content: Option<String>,
        reasoning_content: Option<String>,
    }

    let wire: Wire = serde_json::from_str(data).map_err(|error| Failure {
        reason: Reason::Malformed,
        message: format!("the stream carried something that is not a chunk ({error}): {:.200}", data),
    })?;
    if let Some(error) = wire.error {
        let said = message_of(&error).unwrap_or_else(|| error.to_string());
        return Err(Failure { reason: Reason::InStream, message: format!("the server gave up: {said}") });
    }
    let mut chunk = Chunk { usage: wire.usage, ..Chunk::default() };
    // With `n` above one the choices are interleaved; the commands here ask for one.
    if let Some(choice) = wire.choices.into_iter().next() {
        let delta = choice.delta.unwrap_or(Delta { content: None, reasoning_content: None });
        chunk.text = delta.content.or(choice.text).unwrap_or_default();
        chunk.reasoning = delta.reasoning_content.unwrap_or_default();
        chunk.finish = choice.finish_reason;
    }
    Ok(chunk)
}

/// The sentence in an error body: OpenAI's `error.message`, Cloudflare's `errors[0].message`, or the text itself.
fn said_by_server(body: &[u8]) -> Option<String> {
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        let text = String::from_utf8_lossy(body);
        let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
        return (!line.starts_with('<')).then(|| line.chars().take(300).collect());
    };
    message_of(&value["error"]).or_else(|| message_of(&value["errors"][0])).or_else(|| message_of(&value))
}

fn message_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["message"].as_str()).map(str::to_owned)
}

/// Accepts what people type: `localhost:8080`, `http://host`, a full base URL with or without a slash at its end.
fn base_url(text: &str) -> Result<Url> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let mut url = Url::parse(&with_scheme).map_err(|error| {
        Error::bad_input(format!("--url {text:?} is no URL ({error}): try http://127.0.0.1:8080/v1"))
    })?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(Error::bad_input(format!("--url {text:?} must begin with http:// or https://")));
    }
    if matches!(url.path(), "" | "/") {
        url.set_path("/v1");
    }
    Ok(url)
}

/// Other paths of a server than its OpenAI-compatible ones, which the base URL names with or without an account.
fn from_root(base: &str, path: &[&str]) -> Option<Url> {
    let mut url = Url::parse(base).ok()?;
    let root = url.path().split("/client/v4/").next()?.trim_end_matches('/');
    let root = root.strip_suffix("/v1").unwrap_or(root).to_owned();
    url.set_path(&root);
    url.path_segments_mut().ok()?.pop_if_empty().extend(path);
    Some(url)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_loopback_text(base: &str) -> bool {
    Url::parse(base).is_ok_and(|url| is_loopback(&url))
}

/// The innermost error: "connection refused" says more than the four layers around it.
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable => f.write_str("unreachable"),
            Self::Timeout => f.write_str("timeout"),
            Self::Cut => f.write_str("cut off"),
            Self::Status(status) => write!(f, "status {status}"),
            Self::InStream => f.write_str("error in stream"),
            Self::Malformed => f.write_str("malformed"),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Error::new(Kind::ModelUnavailable, failure.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_as_people_type_them() {
        for (typed, used) in [
            ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
            ("localhost:9000/", "http://localhost:9000/v1"),
            (
                "https://api.example.com/client/v4/accounts/a/ai/v1",
                "https://api.example.com/client/v4/accounts/a/ai/v1",
            ),
        ] {
            assert_eq!(base_url(typed).map(|url| url.to_string()).expect(typed), used);
        }
        for typed in ["ftp://host", "http://", "http://[::1"] {
            assert!(base_url(typed).is_err(), "{typed}");
        }
    }

    #[test]
    fn other_paths_begin_where_the_base_url_does() {
        for (base, url) in [
            ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/client/v4/a%2Fb"),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080/client/v4/a%2Fb"),
            ("https://example.com/neurond/v1", "https://example.com/neurond/client/v4/a%2Fb"),
            ("https://example.com/client/v4/accounts/x/ai/v1", "https://example.com/client/v4/a%2Fb"),
        ] {
            assert_eq!(from_root(base, &["client", "v4", "a/b"]).expect(base).as_str(), url);
        }
    }

    #[test]
    fn loopback_is_recognised() {
        for (url, local) in [
            ("http://127.0.0.1:1/", true),
            ("http://localhost/", true),
            ("http://[::1]:80/", true),
            ("http://10.0.0.1/", false),
            ("http://localhost.example.com/", false),
        ] {
            assert_eq!(is_loopback_text(url), local, "{url}");
        }
    }

    #[test]
    fn chunks_of_both_endpoints_are_understood() {
        let text = |text: &str| Chunk { text: text.into(), ..Chunk::default() };
        let check = |data: &str, expected: Chunk| assert_eq!(chunk(data).expect(data), expected, "{data}");
        check(r#"{"choices":[{"delta":{"content":"Hi"},"finish_reason":null}],"usage":null}"#, text("Hi"));
        check(r#"{"choices":[{"text":"Hi","index":0}]}"#, text("Hi"));
        check(r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#, text(""));
        check(
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            Chunk { finish: Some("stop".into()), ..Chunk::default() },
        );
        let usage = Usage {
            prompt_tokens: 5,
            completion_tokens: 2,
            prompt_tokens_details: Some(PromptDetails { cached_tokens: 4 }),
        };
        check(
            r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}}"#,
            Chunk { usage: Some(usage), ..Chunk::default() },
        );
    }

    #[test]
    fn an_error_in_the_stream_is_a_failure_with_the_servers_words() {
        let failure = chunk(r#"{"error":{"message":"the device is gone","type":"server_error"}}"#).expect_err("error");
        assert_eq!(failure.reason, Reason::InStream);
        assert!(failure.message.contains("the device is gone"));
    }

    #[test]
    fn error_bodies_of_both_shapes_are_read() {
        for (body, said) in [
            (r#"{"error":{"message":"no such model"}}"#, Some("no such model")),
            (r#"{"success":false,"errors":[{"code":5007,"message":"No such model"}]}"#, Some("No such model")),
            (r#"{"error":"plain"}"#, Some("plain")),
            ("upstream is down\n", Some("upstream is down")),
            ("<html>502</html>", None),
            ("", None),
        ] {
            assert_eq!(said_by_server(body.as_bytes()).as_deref(), said, "{body}");
        }
    }
}
