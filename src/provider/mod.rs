//! Other people's models: who the providers are, where they live, and how their dialects are spoken.
//!
//!     OpenAI chat request --Provider::chat--> Outgoing --Provider::url--> Url        the rim sends it
//!     OpenAI chat answer  <--answer---------- a whole answer in the provider's dialect
//!     OpenAI chunks       <--Translator------ its stream, cut anywhere
//!     tokens used         <--Meter----------- answers that pass through as they are
//!
//! `table.rs` lists providers, `url.rs` finds their addresses. `ask.rs` reads an OpenAI request once for all dialects and
//! `reply.rs` writes OpenAI answers; `anthropic`, `google`, `bedrock` and `cohere` hold what differs. `messages` is the
//! other direction: Anthropic's surface for clients, OpenAI's behind it.
//!
//! Pure: bytes in, bytes out. Sending, signing and deciding whom to ask happen elsewhere.

mod anthropic;
mod ask;
mod bedrock;
mod blocks;
mod cohere;
mod failure;
pub mod frame;
mod google;
mod json;
pub mod messages;
mod meter;
mod openai;
mod reply;
mod schema;
mod sieve;
mod splice;
mod table;
mod talk;
#[cfg(test)]
mod testing;
mod translate;
mod turns;
mod url;
mod usage;

pub use failure::failure;
pub use meter::Meter;
pub use splice::{Facts, facts, splice_model};
pub use talk::Talk;
pub use translate::{Translator, answer};
pub use url::Url;

use bytes::Bytes;

use crate::base::{Error, Result};

/// What a provider speaks where unified chat calls it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// OpenAI's chat completions: requests and answers pass through.
    OpenAi,
    /// Anthropic's Messages.
    Anthropic,
    /// Google's `generateContent`.
    Google,
    /// Bedrock's Converse.
    Bedrock,
    /// Cohere's chat, version 2.
    Cohere,
    /// Something that is no chat: native calls only.
    Opaque,
}

/// Where a provider wants its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Auth {
    /// `Authorization: Bearer <key>`.
    Bearer,
    /// `Authorization: <scheme> <key>`.
    Scheme(&'static str),
    /// The key alone in a header of this name.
    Header(&'static str),
    /// In a header of this name, and as a bearer token: some of its paths read one, some the other.
    HeaderAndBearer(&'static str),
    /// AWS Signature Version 4 over the request, or an API key as a bearer token.
    SigV4,
    /// A Google access token, made from a service account.
    Vertex,
    /// None at all.
    None,
}

/// One upstream, as the table knows it.
#[derive(Debug)]
pub struct Provider {
    /// Its name in paths and in front of models.
    pub slug: &'static str,
    /// Other names that clients use.
    pub aliases: &'static [&'static str],
    /// Where it lives, without a slash at the end. `{region}` and `{resource}` stand for what a path begins with. Empty
    /// where only an operator can know.
    pub base: &'static str,
    /// Where its key rides.
    pub auth: Auth,
    /// What it speaks in unified chat.
    pub dialect: Dialect,
    /// The version that its paths begin with, added where neither base nor path have one.
    version: Option<&'static str>,
    /// Headers by which a client shows credentials of its own.
    brings: &'static [&'static str],
    /// Query parameters that do the same.
    brings_query: &'static [&'static str],
    /// Streams say what they used only when asked to.
    asks_usage: bool,
    place: Placing,
}

/// How the address of a provider depends on the path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Placing {
    /// Not at all.
    Fixed,
    /// `{resource}/{deployment}/…`
    Azure,
    /// `bedrock-runtime/{region}/…`
    Bedrock,
    /// `v1/projects/{project}/locations/{region}/…`
    Vertex,
}

/// Where to call: what a stored key or the configuration may carry beside the secret.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Place {
    /// Cloud region (Bedrock, Vertex).
    pub region: Option<String>,
    /// Google Cloud project.
    pub project: Option<String>,
    /// Azure resource.
    pub resource: Option<String>,
    /// Azure deployment; left out, it is named as the model.
    pub deployment: Option<String>,
    /// Azure's `api-version`.
    pub api_version: Option<String>,
}

/// A unified chat call in the provider's own terms. Always a POST of JSON.
#[derive(Debug)]
pub struct Outgoing {
    /// The path as [`Provider::url`] wants it.
    pub path: String,
    /// The query, without `?`.
    pub query: Option<String>,
    /// The body.
    pub body: Bytes,
    /// Headers beside credentials and content type.
    pub headers: Vec<(&'static str, &'static str)>,
    /// What the answer will be written in: one provider may speak several.
    pub dialect: Dialect,
    /// The answer will be a stream.
    pub stream: bool,
    /// The caller wants a chunk with the usage at the end of the stream.
    pub include_usage: bool,
}

/// What an OpenAI answer carries where the upstream has nothing of its own.
#[derive(Clone, Debug)]
pub struct Meta {
    /// `chatcmpl-…`
    pub id: String,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// The model as the caller named it.
    pub model: String,
}

/// Looks a provider up by slug or alias. Every `custom-…` is [`custom`].
pub fn find(slug: &str) -> Option<&'static Provider> {
    if slug.strip_prefix("custom-").is_some_and(|rest| !rest.is_empty()) {
        return Some(custom());
    }
    all().iter().find(|provider| provider.slug == slug || provider.aliases.contains(&slug))
}

/// Every provider of the table, custom ones left out.
pub fn all() -> &'static [Provider] {
    table::PROVIDERS
}

/// What is known of providers that operators add: they speak OpenAI's dialect, at a base of their own.
pub fn custom() -> &'static Provider {
    &table::CUSTOM
}

impl Provider {
    /// The address of a native call. `base` is an operator's override of the table's. `rest` is the raw path behind the
    /// slug, still percent-encoded, which is kept byte for byte but for its version (added where it is missing, dropped
    /// where base and path both have it) and what it says of place; `query` is as sent, without `?`.
    ///
    /// # Errors
    /// `BadInput` for paths that climb (`..`), that do not name their place as this provider's must, or whose region or
    /// resource could not be part of a host name; for a provider without a base if none is given.
    pub fn url(&self, base: Option<&str>, rest: &str, query: Option<&str>) -> Result<Url> {
        url::build(self, base, rest, query)
    }

    /// The model of a native call where the path names it rather than the body: Google, Vertex (`publisher/model`), Bedrock,
    /// Azure (the deployment), Hugging Face. `rest` as in [`Self::url`].
    pub fn model_in_path(&self, rest: &str) -> Option<String> {
        url::model_in(self, rest)
    }

    /// What a unified chat call becomes. `model` is the name behind the provider's, `body` the OpenAI request as sent.
    ///
    /// # Errors
    /// `BadInput` naming the field that is malformed or that this provider could only have ignored; `Unsupported` where
    /// the provider has no chat.
    pub fn chat(&self, model: &str, body: &Bytes, place: &Place) -> Result<Outgoing> {
        translate::outgoing(self, model, body, place)
    }

    /// The headers that carry `secret`. None for what has to be signed or exchanged first: Vertex, and AWS keys in JSON.
    pub fn credentials(&self, secret: &str) -> Vec<(&'static str, String)> {
        let secret = secret.trim();
        let bearer = || ("authorization", format!("Bearer {}", secret.strip_prefix("Bearer ").unwrap_or(secret)));
        match self.auth {
            Auth::Bearer => vec![bearer()],
            // Tokens of a person's account, unlike API keys, are bearer tokens.
            Auth::Header("x-api-key") if secret.starts_with("sk-ant-oat") => vec![bearer()],
            Auth::Header(name) => vec![(name, secret.to_owned())],
            Auth::HeaderAndBearer(name) => vec![(name, secret.to_owned()), bearer()],
            Auth::Scheme(scheme) => vec![("authorization", format!("{scheme} {secret}"))],
            Auth::SigV4 if !secret.starts_with('{') => vec![bearer()],
            Auth::SigV4 | Auth::Vertex | Auth::None => Vec::new(),
        }
    }

    /// Header names, in lower case, that count as the client's own credentials.
    pub fn credential_headers(&self) -> &'static [&'static str] {
        self.brings
    }

    /// Query parameters that count as the client's own credentials; never to be logged.
    pub fn credential_query(&self) -> &'static [&'static str] {
        self.brings_query
    }
}

/// An upstream said something that is not its dialect, or stopped in the middle.
fn broken(message: impl Into<String>) -> Error {
    Error::new(crate::base::Kind::ModelUnavailable, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_to_one_provider() {
        let mut names: Vec<_> = all().iter().flat_map(|p| p.aliases.iter().chain([&p.slug])).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "a name is given twice");
        for (name, slug) in [
            ("openai", "openai"),
            ("google", "google-ai-studio"),
            ("bedrock", "aws-bedrock"),
            ("azure", "azure-openai"),
            ("xai", "grok"),
            ("perplexity", "perplexity-ai"),
            ("workers-ai", "workers-ai"),
            ("custom-mine", "custom"),
        ] {
            assert_eq!(find(name).map(|p| p.slug), Some(slug), "{name}");
        }
        assert!(find("nobody").is_none() && find("custom-").is_none());
    }

    #[test]
    fn keys_ride_where_each_provider_looks_for_them() {
        for (slug, secret, expected) in [
            ("openai", "sk-1", vec![("authorization", "Bearer sk-1")]),
            ("openai", "Bearer sk-1", vec![("authorization", "Bearer sk-1")]),
            ("anthropic", "sk-ant-api03", vec![("x-api-key", "sk-ant-api03")]),
            ("anthropic", "sk-ant-oat01", vec![("authorization", "Bearer sk-ant-oat01")]),
            ("google", "AIza", vec![("x-goog-api-key", "AIza")]),
            ("azure", "k", vec![("api-key", "k")]),
            ("elevenlabs", "k", vec![("xi-api-key", "k")]),
            ("deepgram", "k", vec![("authorization", "Token k")]),
            ("fal", "k", vec![("authorization", "Key k")]),
            ("parallel", "k", vec![("x-api-key", "k"), ("authorization", "Bearer k")]),
            ("bedrock", "{\"accessKeyId\":\"A\"}", vec![]),
            ("bedrock", "ABSKx", vec![("authorization", "Bearer ABSKx")]),
            ("google-vertex-ai", "ewog", vec![]),
        ] {
            let provider = find(slug).unwrap();
            let found = provider.credentials(secret);
            let found: Vec<_> = found.iter().map(|(name, value)| (*name, value.as_str())).collect();
            assert_eq!(found, expected, "{slug}");
            for (name, _) in found {
                assert!(provider.credential_headers().contains(&name), "{slug}: {name} is not known as a credential");
            }
        }
    }
}
