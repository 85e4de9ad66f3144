//! From what was asked to what is sent: one step of a call, ready to be tried as often as it takes.
//!
//!     native      slug + path + headers + body  -->  the same at the provider's address, with a stored key if none was brought
//!     unified     OpenAI chat for `provider/model`  -->  the provider's own path, body and headers
//!     Messages    Anthropic's words for any model  -->  OpenAI's, and on as above; Anthropic's own as they are
//!     workers-ai  any of them  -->  the engine in this process
//!
//! Decides nothing about when and how often: `relay.rs` does.

use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;

use actix_web::http::Method as ServerMethod;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use serde_json::Value;

use crate::base::{AccountId, Error, Kind, Result, Secret};
use crate::config::gateway::{CUSTOM, Timeouts};
use crate::fallback::Target;
use crate::gateway::options::Options;
use crate::ledger::Window;
use crate::net::client::{Attempt, Origin};
use crate::net::sigv4;
use crate::net::vertex::ServiceAccount;
use crate::provider::{self, Auth, Dialect, Place, Provider};
use crate::registry::{CustomProvider, Gateway, View};

/// The provider whose models this process serves.
pub const LOCAL: &str = "workers-ai";

/// One thing to try.
pub struct Step {
    /// Who is asked, for breakers, headers and logs.
    pub target: Target,
    /// How.
    pub way: Way,
    /// What its answers are written in.
    pub dialect: Dialect,
    /// What becomes of its answers.
    pub speech: Speech,
    /// The caller wants a stream, as far as the body tells.
    pub stream: bool,
    /// What the caller wants for this step, defaults of its gateway included.
    pub options: Rc<Options>,
    /// How long its provider may take, where that is said.
    pub timeouts: Timeouts,
    /// Its credentials are ours: what is wrong with them is wrong for everybody.
    pub stored_key: bool,
    /// The way that led to it, if a route decided.
    pub route: Option<String>,
    /// Budgets that it passed on its way, which it counts against.
    pub budgets: Vec<Window>,
    /// Its number among the caller's own steps.
    pub index: usize,
}

/// Where a step goes.
pub enum Way {
    /// To another server.
    Upstream {
        /// What is sent.
        attempt: Attempt,
        /// What each attempt is signed with at its own time.
        sign: Sign,
    },
    /// To the engine.
    Local(LocalCall),
}

/// Credentials that depend on the moment.
pub enum Sign {
    /// None: what has to be sent is in the headers already.
    Ready,
    /// AWS Signature Version 4.
    Aws {
        /// With these.
        credentials: sigv4::Credentials,
        /// For this region.
        region: String,
        /// The name that the service has in signatures.
        service: &'static str,
    },
    /// An access token of a Google service account.
    Google {
        /// Whose.
        account: Box<ServiceAccount>,
        /// A hash of all of its secret: whoever brings only its name gets no token of its.
        secret: [u8; 32],
    },
}

/// What becomes of an answer before the caller sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Speech {
    /// It is translated to OpenAI's chat from the step's dialect.
    pub to_openai: bool,
    /// From OpenAI's chat to Anthropic's Messages.
    pub to_messages: bool,
    /// A chunk with the usage ends a translated stream.
    pub include_usage: bool,
}

impl Speech {
    /// As it came.
    pub const VERBATIM: Self = Self { to_openai: false, to_messages: false, include_usage: false };

    /// Whether anything is done at all.
    pub fn is_verbatim(self) -> bool {
        !self.to_openai && !self.to_messages
    }
}

/// A call of the engine in this process.
#[derive(Clone)]
pub struct LocalCall {
    /// Which endpoint.
    pub endpoint: LocalEndpoint,
    /// As sent.
    pub body: Bytes,
    /// `x-session-affinity`.
    pub affinity: Option<String>,
    /// The query string.
    pub query: String,
    /// Of the body.
    pub content_type: Option<String>,
}

/// What of the engine is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LocalEndpoint {
    /// An endpoint of `/v1`, by its path behind it.
    OpenAi(String),
    /// A model with its native input.
    Run(String),
}

/// A provider's own call as it was sent.
pub struct Native<'a> {
    /// As sent.
    pub method: &'a ServerMethod,
    /// The path behind the provider, as sent.
    pub rest: &'a str,
    /// Without `?`.
    pub query: &'a str,
    /// Without what is ours.
    pub headers: HeaderMap,
    /// As sent.
    pub body: &'a Bytes,
    /// What is ours.
    pub options: Rc<Options>,
}

impl<'a> Native<'a> {
    fn post(rest: &'a str, headers: HeaderMap, body: &'a Bytes, options: Rc<Options>) -> Self {
        Self { method: &ServerMethod::POST, rest, query: "", headers, body, options }
    }
}

/// Makes the steps of one call.
pub struct Steps<'a> {
    /// Whose call.
    pub account: &'a AccountId,
    /// Through which gateway.
    pub gateway: &'a Gateway,
    /// Providers and keys as they are now.
    pub view: &'a View,
    /// Whether the caller may use stored keys.
    pub trusted: bool,
}

impl Steps<'_> {
    /// A provider's own call.
    ///
    /// # Errors
    /// `NoSuchProvider`, `NoStoredKey`, and `BadInput` for paths that lead nowhere.
    pub fn native(&self, slug: &str, sent: Native<'_>) -> Result<Step> {
        let Native { method, rest, query, mut headers, body, options } = sent;
        let facts = provider::facts(body);
        let stream = facts.as_ref().is_some_and(|facts| facts.stream);
        let asked = facts.and_then(|facts| facts.model).unwrap_or_default();
        if slug == LOCAL && self.is_here() {
            let sent = Native { method, rest, query, headers, body, options };
            return self.local_native(sent, stream, asked);
        }
        let known = self.known(slug)?;
        let query = (!query.is_empty()).then_some(query);
        let url = known.provider.url(known.base.as_deref(), rest, query)?;
        let model = Some(asked).filter(|asked| !asked.is_empty()).or_else(|| known.provider.model_in_path(rest));
        // Sockets have no body to name it in.
        let model = model.or_else(|| query.and_then(model_in_query)).unwrap_or_default();
        if !covers_encodings(&headers) {
            narrow_encodings(&mut headers);
        }
        let brought = known.provider.credential_headers().iter().any(|name| headers.contains_key(*name))
            || query.is_some_and(|query| carries(query, known.provider.credential_query()));
        let sign = match brought {
            true => brought_sign(&known, &headers)?,
            false => self.sign(&known, &options, &mut headers, rest)?,
        };
        let method = http::Method::from_bytes(method.as_str().as_bytes())
            .map_err(|_| Error::bad_input("the method is none that HTTP knows"))?;
        let attempt = attempt(&known, &url, method, headers, body.clone())?;
        Ok(Step {
            target: target(slug, &model),
            way: Way::Upstream { attempt, sign },
            dialect: dialect(known.provider, rest),
            speech: Speech::VERBATIM,
            stream,
            options,
            timeouts: known.timeouts,
            stored_key: !brought && self.trusted,
            route: None,
            budgets: Vec::new(),
            index: 0,
        })
    }

    /// A chat in OpenAI's words, for `provider/model` or a model of this process.
    ///
    /// # Errors
    /// As [`Steps::native`], and `BadInput` for what the provider cannot be asked.
    pub fn chat(&self, name: &str, headers: &HeaderMap, body: &Bytes, options: Rc<Options>) -> Result<Step> {
        let (slug, model) = divide_name(name)?;
        let stream = provider::facts(body).is_some_and(|facts| facts.stream);
        if slug == LOCAL && self.is_here() {
            let body = provider::splice_model(body, model)?;
            return Ok(self.local_openai("chat/completions", model, headers, body, stream, options));
        }
        let known = self.known(slug)?;
        let mut headers = headers.clone();
        let Found { secret, place, stored_key } = self.chat_key(&known, &options, &mut headers)?;
        let chat = known.provider.chat(model, body, &place)?;
        let url = known.provider.url(known.base.as_deref(), &chat.path, chat.query.as_deref())?;
        for name in [header::CONTENT_TYPE, header::ACCEPT, header::ACCEPT_ENCODING] {
            headers.remove(name);
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Whoever is not told may compress, and what is to be translated must be readable.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for (name, value) in &chat.headers {
            headers.entry(*name).or_insert(HeaderValue::from_static(value));
        }
        let sign = match secret {
            Some(secret) => self.credentials(&known, &secret, &mut headers, &chat.path)?,
            None => Sign::Ready,
        };
        let attempt = attempt(&known, &url, http::Method::POST, headers, chat.body)?;
        Ok(Step {
            target: target(slug, model),
            way: Way::Upstream { attempt, sign },
            dialect: chat.dialect,
            speech: Speech {
                // Who speaks OpenAI's words already was asked for a chunk that the caller did not ask for.
                to_openai: chat.dialect != Dialect::OpenAi || (chat.stream && !chat.include_usage),
                to_messages: false,
                include_usage: chat.include_usage,
            },
            stream: chat.stream,
            options,
            timeouts: known.timeouts,
            stored_key,
            route: None,
            budgets: Vec::new(),
            index: 0,
        })
    }

    /// Anthropic's Messages, for any model.
    ///
    /// # Errors
    /// As [`Steps::chat`].
    pub fn messages(&self, name: &str, headers: &HeaderMap, body: &Bytes, options: Rc<Options>) -> Result<Step> {
        let (slug, model) = divide_name(name)?;
        if provider::find(slug).is_some_and(|provider| provider.slug == "anthropic") {
            let body = provider::splice_model(body, model)?;
            return self.native(slug, Native::post("v1/messages", headers.clone(), &body, options));
        }
        let body = provider::messages::to_openai(body)?;
        let mut step = self.chat(name, headers, &body, options)?;
        step.speech.to_messages = true;
        // Anthropic's streams always say what was used.
        step.speech.include_usage = true;
        Ok(step)
    }

    /// OpenAI's embeddings for `provider/model`: providers that speak OpenAI's dialect, and this process.
    ///
    /// # Errors
    /// As [`Steps::chat`].
    pub fn embeddings(&self, name: &str, headers: &HeaderMap, body: &Bytes, options: Rc<Options>) -> Result<Step> {
        let (slug, model) = divide_name(name)?;
        let body = provider::splice_model(body, model)?;
        if slug == LOCAL {
            return Ok(self.local_openai("embeddings", model, headers, body, false, options));
        }
        let known = self.known(slug)?;
        if known.provider.dialect != Dialect::OpenAi {
            let message = format!("{slug} has no embeddings in OpenAI's words: call it natively, under /{slug}/.");
            return Err(Error::unsupported(message).with_param("model"));
        }
        self.native(slug, Native::post("embeddings", headers.clone(), &body, options))
    }

    fn local_native(&self, sent: Native<'_>, stream: bool, asked: String) -> Result<Step> {
        let Native { rest, query, ref headers, body, options, .. } = sent;
        let rest = rest.trim_start_matches('/');
        if let Some(path) = rest.strip_prefix("v1/") {
            let mut step = self.local_openai(path, &asked, headers, body.clone(), stream, options);
            if let Way::Local(call) = &mut step.way {
                call.query = query.to_owned();
            }
            return Ok(step);
        }
        let model = rest.strip_prefix("run/").unwrap_or(rest);
        let model = percent_encoding::percent_decode_str(model)
            .decode_utf8()
            .map_err(|_| Error::bad_input("the model in the path is not valid UTF-8 after decoding"))?
            .into_owned();
        if model.is_empty() {
            return Err(Error::new(Kind::NoSuchModel, "Name a model behind workers-ai/, such as workers-ai/@cf/…"));
        }
        Ok(Step {
            target: target(LOCAL, &model),
            way: Way::Local(LocalCall {
                endpoint: LocalEndpoint::Run(model),
                body: body.clone(),
                affinity: affinity(headers),
                query: query.to_owned(),
                content_type: content_type(headers),
            }),
            dialect: Dialect::OpenAi,
            speech: Speech::VERBATIM,
            stream,
            options,
            timeouts: Timeouts::default(),
            stored_key: false,
            route: None,
            budgets: Vec::new(),
            index: 0,
        })
    }

    fn local_openai(
        &self,
        path: &str,
        model: &str,
        headers: &HeaderMap,
        body: Bytes,
        stream: bool,
        options: Rc<Options>,
    ) -> Step {
        Step {
            target: target(LOCAL, model),
            way: Way::Local(LocalCall {
                endpoint: LocalEndpoint::OpenAi(path.to_owned()),
                body,
                affinity: affinity(headers),
                query: String::new(),
                content_type: Some("application/json".into()),
            }),
            dialect: Dialect::OpenAi,
            speech: Speech::VERBATIM,
            stream,
            options,
            timeouts: Timeouts::default(),
            stored_key: false,
            route: None,
            budgets: Vec::new(),
            index: 0,
        }
    }

    /// Whether `workers-ai` is this process, and not another machine that the operator put in its place.
    fn is_here(&self) -> bool {
        self.view.provider(self.account.as_str(), LOCAL).is_none_or(|known| known.base_url.is_none())
    }

    fn known(&self, slug: &str) -> Result<Known> {
        if let Some(name) = slug.strip_prefix(CUSTOM) {
            let Some(custom) = self.view.custom(self.account.as_str(), name) else {
                let message = format!("There is no custom provider `{slug}` in this account, or it is switched off.");
                return Err(Error::new(Kind::NoSuchProvider, message));
            };
            return Ok(Known {
                slug: slug.into(),
                provider: provider::custom(),
                base: Some(custom.base_url.clone()),
                allow_private: custom.allow_private,
                timeouts: custom.timeouts,
                custom: Some(custom),
            });
        }
        let Some(provider) = provider::find(slug) else {
            let message = format!("Invalid provider `{slug}`: name one such as openai, anthropic or workers-ai.");
            return Err(Error::new(Kind::NoSuchProvider, message));
        };
        let settings = self.view.provider(self.account.as_str(), provider.slug);
        let (base, allow_private, timeouts) = settings.map_or((None, false, Timeouts::default()), |known| {
            (known.base_url.clone(), known.allow_private, known.timeouts)
        });
        Ok(Known { slug: provider.slug.into(), provider, base, allow_private, timeouts, custom: None })
    }

    /// A stored key for a native call that brought none. Without one the call goes out as it is: some upstreams want none,
    /// and the others say so themselves.
    fn sign(&self, known: &Known, options: &Options, headers: &mut HeaderMap, path: &str) -> Result<Sign> {
        match self.stored(known, options)? {
            Some(secret) => self.credentials(known, &secret, headers, path),
            None => Ok(Sign::Ready),
        }
    }

    /// The key of a unified call: the caller's bearer token, whatever header the provider wants it in, or the stored one.
    fn chat_key(&self, known: &Known, options: &Options, headers: &mut HeaderMap) -> Result<Found> {
        let bearer = headers.remove(header::AUTHORIZATION).and_then(|value| {
            let value = value.to_str().ok()?.trim();
            let (scheme, token) = value.split_once(' ').unwrap_or(("bearer", value));
            scheme.eq_ignore_ascii_case("bearer").then(|| Secret::new(token.trim().to_owned()))
        });
        let brought = bearer.or_else(|| {
            let names = known.provider.credential_headers().iter().filter(|name| **name != "authorization");
            let found = names.filter_map(|name| headers.remove(*name)).next()?;
            Some(Secret::new(found.to_str().ok()?.to_owned()))
        });
        let (secret, stored_key) = match brought {
            Some(secret) => (Some(secret), false),
            None => (self.stored(known, options)?, true),
        };
        let place = secret.as_ref().map(|secret| place(secret.expose())).unwrap_or_default();
        Ok(Found { secret, place, stored_key })
    }

    fn stored(&self, known: &Known, options: &Options) -> Result<Option<Secret<String>>> {
        if !self.trusted {
            return Ok(None);
        }
        let alias = options.byok_alias.as_deref();
        let found = self.view.secret(self.account.as_str(), &self.gateway.id, &known.slug, alias);
        match (found, alias) {
            (Some(key), _) => Ok(Some(key.secret.clone())),
            (None, Some(alias)) => Err(Error::new(
                Kind::NoStoredKey,
                format!("No key of {} is stored under the alias `{alias}` in this gateway.", known.slug),
            )),
            (None, None) => Ok(None),
        }
    }

    fn credentials(&self, known: &Known, secret: &Secret<String>, headers: &mut HeaderMap, path: &str) -> Result<Sign> {
        match known.provider.auth {
            Auth::SigV4 if secret.expose().trim_start().starts_with('{') => {
                let (credentials, own) = sigv4::Credentials::parse(secret.expose())?;
                let region = region(path).map(str::to_owned).or(own).ok_or_else(|| {
                    Error::bad_input(
                        "Neither the path nor the stored AWS key names a region: add \"region\" to the key.",
                    )
                })?;
                Ok(Sign::Aws { credentials, region, service: service(path) })
            }
            Auth::Vertex => match ServiceAccount::parse(secret.expose()) {
                Ok(account) => Ok(google(account, secret.expose())),
                Err(error) if secret.expose().trim_start().starts_with('{') => Err(error),
                // Not a service account: an access token as it is.
                Err(_) => {
                    insert(headers, "authorization", &format!("Bearer {}", secret.expose().trim()))?;
                    Ok(Sign::Ready)
                }
            },
            _ => {
                for (name, value) in known.provider.credentials(secret.expose()) {
                    insert(headers, name, &value)?;
                }
                Ok(Sign::Ready)
            }
        }
    }
}

/// The key of a unified call.
struct Found {
    secret: Option<Secret<String>>,
    place: Place,
    stored_key: bool,
}

/// A provider as this account knows it.
struct Known {
    slug: Box<str>,
    provider: &'static Provider,
    base: Option<String>,
    allow_private: bool,
    timeouts: Timeouts,
    custom: Option<Arc<CustomProvider>>,
}

fn attempt(
    known: &Known,
    url: &provider::Url,
    method: http::Method,
    mut headers: HeaderMap,
    body: Bytes,
) -> Result<Attempt> {
    for (name, value) in known.custom.iter().flat_map(|custom| &custom.headers) {
        let unusable = || Error::bad_input(format!("The header `{name}` of {} cannot be sent.", known.slug));
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
        let mut value = HeaderValue::from_str(value.expose()).map_err(|_| unusable())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    let origin = Origin::new(url.tls, &url.authority)
        .map_err(|fault| Error::new(Kind::NoSuchProvider, format!("{}: {fault}", known.slug)))?;
    let path = PathAndQuery::from_str(&url.path_and_query)
        .map_err(|_| Error::bad_input("the path or query holds characters that HTTP does not allow; encode them"))?;
    Ok(Attempt { origin: Arc::new(origin), method, path, headers, body, allow_private: known.allow_private })
}

fn target(provider: &str, model: &str) -> Target {
    Target { provider: provider.into(), model: model.into() }
}

fn insert(headers: &mut HeaderMap, name: &'static str, value: &str) -> Result<()> {
    let mut value = HeaderValue::from_str(value).map_err(|_| {
        Error::bad_input(format!("The key cannot be sent in a header ({name}): it holds control characters."))
    })?;
    value.set_sensitive(true);
    headers.insert(HeaderName::from_static(name), value);
    Ok(())
}

/// `provider/model`; a bare `@cf/…` is served here.
///
/// # Errors
/// `NoSuchModel` where nothing says whose model it is.
pub fn divide_name(name: &str) -> Result<(&str, &str)> {
    if name.starts_with('@') {
        return Ok((LOCAL, name));
    }
    match name.split_once('/') {
        Some((slug, model)) if !slug.is_empty() && !model.is_empty() => Ok((slug, model)),
        _ => Err(Error::new(
            Kind::NoSuchModel,
            "Name the provider in front of the model, such as openai/gpt-4.1 or workers-ai/@cf/….".to_string(),
        )
        .with_param("model")),
    }
}

/// Answers may come compressed only in a way that can be read here, for their usage.
fn narrow_encodings(headers: &mut HeaderMap) {
    let Some(accepted) = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()) else { return };
    if accepted == "gzip" || accepted == "identity" {
        return;
    }
    let gzip = accepted.split(',').any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        matches!(name.trim(), "gzip" | "*") && !matches!(weight.trim(), "q=0" | "q=0.0")
    });
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(if gzip { "gzip" } else { "identity" }));
}

/// What a caller brought goes along as it is, but for a service account: Google takes none, only tokens of it.
fn brought_sign(known: &Known, headers: &HeaderMap) -> Result<Sign> {
    if known.provider.auth != Auth::Vertex {
        return Ok(Sign::Ready);
    }
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default().trim();
    let (scheme, token) = value.split_once(' ').unwrap_or_default();
    let secret = if scheme.eq_ignore_ascii_case("bearer") { token.trim() } else { value };
    match ServiceAccount::parse(secret) {
        Ok(account) => Ok(google(account, secret)),
        Err(error) if secret.starts_with('{') => Err(error),
        Err(_) => Ok(Sign::Ready),
    }
}

fn google(account: ServiceAccount, secret: &str) -> Sign {
    Sign::Google { account: Box::new(account), secret: *blake3::hash(secret.as_bytes()).as_bytes() }
}

fn model_in_query(query: &str) -> Option<String> {
    let model = query.split('&').find_map(|pair| pair.strip_prefix("model="))?;
    Some(percent_encoding::percent_decode_str(model).decode_utf8_lossy().into_owned())
}

/// Whether a caller's own signature (AWS) is over `accept-encoding` as well, so that it must stay as it is.
pub fn covers_encodings(headers: &HeaderMap) -> bool {
    let proof = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let proof = proof.filter(|proof| proof.starts_with("AWS4-"));
    let names = proof.and_then(|proof| proof.split_once("SignedHeaders=")?.1.split([',', ' ']).next());
    names.is_some_and(|names| names.split(';').any(|name| name == "accept-encoding"))
}

/// What the service behind a path of Bedrock's is called in signatures.
fn service(rest: &str) -> &'static str {
    if rest.trim_start_matches('/').starts_with("bedrock-mantle/") { "bedrock-mantle" } else { "bedrock" }
}

/// The region in a path of Bedrock's.
fn region(rest: &str) -> Option<&str> {
    let mut segments = rest.trim_start_matches('/').split('/');
    segments.next().filter(|first| first.starts_with("bedrock-"))?;
    segments.next()
}

/// What a native call's answer is written in: some providers serve others' models in others' words.
///
/// Unknown providers have the custom ones' until they are refused.
pub fn dialect_of(slug: &str, rest: &str) -> Dialect {
    dialect(provider::find(slug).unwrap_or_else(provider::custom), rest)
}

fn dialect(provider: &Provider, rest: &str) -> Dialect {
    if rest.contains("publishers/anthropic/") || rest.contains("/anthropic/v1/") {
        return Dialect::Anthropic;
    }
    provider.dialect
}

fn carries(query: &str, names: &[&str]) -> bool {
    query.split('&').any(|pair| names.iter().any(|name| pair.split('=').next() == Some(name)))
}

/// What a stored key says of where to call, if it is JSON (or its base64) and says anything.
fn place(secret: &str) -> Place {
    let decoded = || STANDARD.decode(secret.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let text = if secret.trim_start().starts_with('{') { Some(secret.to_owned()) } else { decoded() };
    let Some(Ok(value)) = text.map(|text| serde_json::from_str::<Value>(&text)) else { return Place::default() };
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    Place {
        region: text("region"),
        project: text("project").or_else(|| text("project_id")),
        resource: text("resource"),
        deployment: text("deployment"),
        api_version: text("api_version").or_else(|| text("apiVersion")),
    }
}

fn affinity(headers: &HeaderMap) -> Option<String> {
    headers.get("x-session-affinity")?.to_str().ok().map(str::to_owned)
}

fn content_type(headers: &HeaderMap) -> Option<String> {
    headers.get(header::CONTENT_TYPE)?.to_str().ok().map(str::to_owned)
}
