//! What may be written in `neurond.toml` about gateways, providers and their keys, and what becomes of it. A field's doc comment is
//! its manual, as in `file.rs`.
//!
//!     [[gateway]] ──fields of the wire──> check.rs ──> Settings ─┐
//!     [[provider]] ──────────────────────────────────────────────┴──> Fixed ──> registry (what the file says wins there)
//!     [vault] [registry] ───────────────────────────────────────────> KeyFiles, a folder
//!
//! Whether patterns and schemas compile is `registry::check`'s to say; whether a provider answers, nobody's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::base::{AccountId, Secret};

pub use settings::{
    Action, Backoff, CATEGORIES, DlpPolicy, FIELDS, Guardrails, LogLimit, MASK, Otel, Problem, RateLimit, Retry, Rule,
    Schemas, Scope, Settings, Sides, SpendRule, Target, Technique, Timeouts, each_secret, is_plain_url, is_slug,
};

pub(super) use resolve::{resolve, state_folder};

mod check;
mod resolve;
mod settings;

/// Providers that are known by name; their addresses are defaults that `[[provider]]` may replace.
pub const PROVIDERS: [&str; 26] = [
    "adobe-firefly",
    "anthropic",
    "aws-bedrock",
    "azure-openai",
    "baseten",
    "cartesia",
    "cerebras",
    "cohere",
    "deepgram",
    "deepseek",
    "elevenlabs",
    "fal",
    "fireworks",
    "google-ai-studio",
    "google-vertex-ai",
    "grok",
    "groq",
    "huggingface",
    "ideogram",
    "mistral",
    "openai",
    "openrouter",
    "parallel",
    "perplexity-ai",
    "replicate",
    "workers-ai",
];

/// Other names that clients use.
const ALIASES: [(&str, &str); 12] = [
    ("azure", "azure-openai"),
    ("bedrock", "aws-bedrock"),
    ("cerebras-ai", "cerebras"),
    ("fireworks-ai", "fireworks"),
    ("google", "google-ai-studio"),
    ("google-vertex", "google-vertex-ai"),
    ("hugging-face", "huggingface"),
    ("mistralai", "mistral"),
    ("perplexity", "perplexity-ai"),
    ("vertex", "google-vertex-ai"),
    ("x-ai", "grok"),
    ("xai", "grok"),
];

/// In front of the slug of a provider that is not built in.
pub const CUSTOM: &str = "custom-";

/// The one name of a provider that has several.
pub fn canonical(slug: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == slug).map_or(slug, |(_, name)| name)
}

/// `[[gateway]]`: a gateway that the management API can show and not change. Callers name it in the path
/// (`/v1/{account}/{gateway}/…`) or in `cf-aig-gateway-id`. Gateways that are made with the API need no block.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySection {
    /// Its name in paths: up to 64 letters, digits, `-` and `_`.
    /// Example: `"prod"`
    pub id: String,
    /// The account that has it. Left out: every account has one of this name, each with limits and a cache of its own.
    /// Example: `"023e105f4ecef8ad9ca31a8372d0c353"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// Whether callers need a token of this server (`cf-aig-authorization`). Without it they can bring their own key of a provider,
    /// and stored keys are not for them. Left out: true.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authentication: Option<bool>,
    /// Seconds that answers are kept and given to equal requests, up to 2678400; 0: none are, unless a request asks for it.
    /// Left out: 0.
    /// Example: `3600`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_ttl: Option<u64>,
    /// Whether any change of this block empties its cache. Left out: false.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_invalidate_on_update: Option<bool>,
    /// Whether each account has its own cached answers. `false` shares them between accounts, which saves the most and lets one
    /// account learn what another asked. Left out: true.
    /// Example: `false`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_per_account: Option<bool>,
    /// Whether calls are logged; a request may say otherwise (`cf-aig-collect-log`). Left out: true.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collect_logs: Option<bool>,
    /// Most log records kept, from 10000 to 10000000. Left out: as many as the log has room for.
    /// Example: `1000000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_management: Option<u64>,
    /// What happens when there are so many: `"DELETE_OLDEST"` or `"STOP_INSERTING"`. Left out: `"DELETE_OLDEST"`.
    /// Example: `"STOP_INSERTING"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_management_strategy: Option<String>,
    /// Shown by the API; nothing is classified. Left out: false.
    /// Example: `false`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_classification: Option<bool>,
    /// Requests allowed in `rate_limiting_interval`, by account; more get 429. 0: no limit. Left out: 0.
    /// Example: `100`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiting_limit: Option<u64>,
    /// Seconds that `rate_limiting_limit` counts for. Left out: 0, which is no limit.
    /// Example: `60`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiting_interval: Option<u64>,
    /// `"fixed"`: the interval begins anew at its multiples on the clock. `"sliding"`: it is always the last so many seconds.
    /// Left out: `"fixed"`.
    /// Example: `"sliding"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiting_technique: Option<String>,
    /// Tries of a provider in all, 1 to 5, when it fails before it sent a byte. Left out: what the daemon does without a gateway.
    /// Example: `3`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_max_attempts: Option<u64>,
    /// Milliseconds before the second try, up to 5000. Left out: as above.
    /// Example: `500`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_delay: Option<u64>,
    /// How the delay grows: `"constant"`, `"linear"` or `"exponential"`. Left out: as above.
    /// Example: `"exponential"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_backoff: Option<String>,
    /// Milliseconds for a whole answer of a provider, however it comes; then it is cut off. Left out: the provider's.
    /// Example: `120000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_timeout_ms: Option<u64>,
    /// Milliseconds for the first byte of an answer; after it the next try or target begins. Left out: the provider's.
    /// Example: `10000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte_timeout_ms: Option<u64>,
    /// Milliseconds between two pieces of a stream, after which it is ended as failed. Left out: the provider's.
    /// Example: `30000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_ms: Option<u64>,
    /// `provider/model` targets that are tried in this order when the one that was asked for failed. Left out: none.
    /// Example: `["anthropic/claude-sonnet-4-5", "workers-ai/@cf/meta/llama-3.1-8b-instruct"]`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Vec<String>>,
    /// Budgets in US dollars: `window` is seconds; `metadata`, `model` and `provider` say which calls count (`mode = "filter"` with
    /// `values`) or that each value has a budget of its own (`mode = "partition"`). At most 20. Left out: none.
    /// Example: `{ rules = [{ id = "day", limit = 10.0, limitType = "cost", window = 86400 }] }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spend_limits: Option<toml::Value>,
    /// What a guard model judges, by category (`S1` to `S13`, `P1` for prompt injection): `"FLAG"` marks, `"BLOCK"` refuses.
    /// Left out: nothing.
    /// Example: `{ prompt = { P1 = "BLOCK" }, response = { S10 = "FLAG" } }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guardrails: Option<toml::Value>,
    /// Data-loss policies, by profile. Left out: none.
    /// Example: `{ action = "BLOCK", profiles = ["keys"] }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dlp: Option<toml::Value>,
    /// Regular expressions that texts are searched for: `on` is `"request"`, `"response"` or `"both"` (the default), `action`
    /// `"block"` (the default) or `"flag"`. Left out: none.
    /// Example: `[{ name = "card", pattern = '\b\d{16}\b', on = "request", action = "block" }]`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<GatewayRule>>,
    /// JSON schemas that bodies must follow, as paths of files or inline: a request that does not is refused, an answer that does
    /// not is a failure of the provider. Left out: none.
    /// Example: `{ response = { type = "object" } }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schemas: Option<GatewaySchemas>,
    /// Where a span of each call is sent, OTLP over HTTP; a server on a private address needs `allow_private = true`, which only this file can
    /// say. Left out: nowhere.
    /// Example: `[{ url = "https://otel.example/v1/traces", authorization = { env = "OTEL_AUTHORIZATION" }, content_type = "json" }]`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otel: Option<Vec<GatewayOtel>>,
    /// Whether log records are exported. Left out: false.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logpush: Option<bool>,
    /// RSA key in PEM that exported bodies are encrypted for. Left out: they are not encrypted.
    /// Example: `"-----BEGIN PUBLIC KEY-----"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logpush_public_key: Option<String>,
    /// Only providers that retain nothing are asked. Left out: false.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zdr: Option<bool>,
}

/// A pattern that texts are searched for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayRule {
    /// Names it in refusals and logs.
    pub name: String,
    /// A regular expression.
    pub pattern: String,
    /// `"request"`, `"response"` or `"both"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    /// `"block"` or `"flag"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
}

/// JSON schemas of both directions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySchemas {
    /// Of what callers send.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<SchemaSource>,
    /// Of what comes back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<SchemaSource>,
}

/// A schema, or the file that holds one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SchemaSource {
    /// A file of JSON.
    File(PathBuf),
    /// The schema itself.
    Inline(toml::Table),
}

/// Where spans go.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayOtel {
    /// OTLP over HTTP.
    pub url: String,
    /// Sent with each export.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Sent as `Authorization`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authorization: Option<SecretRef>,
    /// `"json"` or `"protobuf"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The server may be on a private address. Not among the fields of the wire: whoever may change a gateway by its management API must
    /// not reach what only the daemon can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_private: bool,
}

/// Where a secret is: never in this file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretRef {
    /// An environment variable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<String>,
    /// A file; a leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=` sets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// `[[provider]]`: another address or a key for a provider that is built in, or a provider that is not.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderSection {
    /// Its name in paths: a built-in one (`openai`, `anthropic`, …), or `custom-` and up to 64 letters, digits, `-` and `_`.
    /// Example: `"custom-vllm"`
    pub slug: String,
    /// The account that this is for. Left out: for all that have no block of their own for it.
    /// Example: `"023e105f4ecef8ad9ca31a8372d0c353"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// Where it answers; what follows the slug in a path is added. Must be written for a custom provider. Left out: the provider's own
    /// address.
    /// Example: `"https://models.example/v1"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// Allow an address in a private network or on this machine, and `http://`. Without it calls to such an address are refused,
    /// wherever its name may lead. Left out: false.
    /// Example: `true`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_private: Option<bool>,
    /// Its key, for callers that bring none and have a token of ours: `{ env = "NAME" }` or `{ file = "path" }`. A key that an
    /// account has stored under its gateway goes before one without `account`. Left out: there is none.
    /// Example: `{ env = "VLLM_API_KEY" }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SecretRef>,
    /// Milliseconds for a whole answer, however it comes; then it is cut off. Left out: no bound on answers that go on coming.
    /// Example: `120000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_timeout_ms: Option<u64>,
    /// Milliseconds for the first byte of an answer. Left out: none but the whole answer's.
    /// Example: `10000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte_timeout_ms: Option<u64>,
    /// Milliseconds between two pieces of a stream. Left out: none but the whole answer's.
    /// Example: `30000`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_ms: Option<u64>,
}

/// `[vault]`: the key that stored keys of providers are sealed under.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct VaultSection {
    /// File of the master key: 64 hex digits (`neurond keys init` makes one), base64, or 32 raw bytes. Whoever has it and
    /// `registry.folder` has the keys, so keep them apart. A leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=`
    /// sets. Left out: `master.key` in the state directory, made when the first key is stored.
    /// Example: `"$CREDENTIALS_DIRECTORY/master.key"`
    pub master_key_file: Option<PathBuf>,
    /// Files of master keys that were used before: what they sealed still opens, and is sealed anew at start.
    pub previous_key_files: Vec<PathBuf>,
}

/// `[registry]`: what the management API is told.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySection {
    /// Folder of gateways, custom providers, stored keys (sealed) and routes, a file an account. One daemon a folder: a second one can
    /// read it and changes nothing. Left out: `registry` in the state directory, as for `lora.path`; without any, the API can show
    /// what is written here and change nothing.
    /// Example: `"/var/lib/neurond/registry"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
}

/// What the file says about gateways and providers, checked.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fixed {
    /// In the order written.
    pub gateways: Vec<FixedGateway>,
    /// In the order written.
    pub providers: Vec<FixedProvider>,
}

/// A gateway of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct FixedGateway {
    /// Whose; `None`: everybody's.
    pub account: Option<AccountId>,
    /// Its name.
    pub id: String,
    /// What was written, in the names of the wire, secrets masked: for the API to show.
    pub fields: Map<String, Value>,
    /// What it does.
    pub settings: Settings,
    /// Where it is written, for whoever tries to change it elsewhere.
    pub origin: String,
}

/// A provider of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct FixedProvider {
    /// For whom; `None`: for everybody.
    pub account: Option<AccountId>,
    /// Canonical, with `custom-` in front if it is not built in.
    pub slug: String,
    /// Without a slash at its end; `None`: the built-in one.
    pub base_url: Option<String>,
    /// Private addresses are allowed.
    pub allow_private: bool,
    /// What stands in for a caller's key.
    pub key: Option<Secret<String>>,
    /// How long to wait for it.
    pub timeouts: Timeouts,
    /// Where it is written.
    pub origin: String,
}

/// Where master keys are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyFiles {
    /// The one that was named.
    pub named: Option<PathBuf>,
    /// The one that is made if none was named; `None`: there is no place for it.
    pub default: Option<PathBuf>,
    /// Those of before.
    pub previous: Vec<PathBuf>,
}

/// All sections of this file.
pub(super) struct Sections<'a> {
    pub gateway: &'a [GatewaySection],
    pub provider: &'a [ProviderSection],
    pub vault: &'a VaultSection,
    pub registry: &'a RegistrySection,
}

/// What they mean, and what is wrong with them.
pub(super) struct Resolved {
    pub fixed: Fixed,
    pub keys: KeyFiles,
    pub registry: Option<PathBuf>,
    pub problems: Vec<String>,
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests;
