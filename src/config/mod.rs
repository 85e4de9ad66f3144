//! What the operator decides. `file.rs` is what may be written, this is what is used: resolved and validated, so that
//! nobody below has to check again.
//!
//!     neurond.toml --serde--> file::File --resolve--> Config (immutable, shared as Arc)
//!     catalog.toml ----------------^

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::base::{AccountId, KeyId, ModelId};

pub use catalog::{Catalog, CatalogEntry, Price, ResultShape};
pub use file::{File, LogFormat};

mod catalog;
mod file;

/// Everything the daemon was told, checked. A reload makes a whole new one and swaps the `Arc`.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where HTTP is served.
    pub server: Server,
    /// The AI-binding listener, if configured.
    pub binding: Option<Binding>,
    /// Who may call.
    pub auth: Auth,
    /// How devices compute.
    pub engine: Engine,
    /// Which models are loaded, in the order written.
    pub models: Vec<Model>,
    /// Everything that can be asked for by name, loaded or not.
    pub catalog: Arc<Catalog>,
    /// What is logged and how.
    pub log: Log,
}

/// HTTP limits and timeouts.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// Address of the API.
    pub listen: SocketAddr,
    /// HTTP worker threads.
    pub workers: usize,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Open connections over all workers; more wait in the accept queue.
    pub max_connections: usize,
    /// For the request head, and again for the body.
    pub read_timeout: Duration,
    /// A client that takes nothing for this long is cut off.
    pub write_timeout: Duration,
    /// From the end of the request to the end of the answer.
    pub request_timeout: Duration,
    /// How long a drain may take before what is left is cut off.
    pub drain_timeout: Duration,
}

/// The listener for Worker code that calls `env.AI`: no credentials, one account.
#[derive(Debug, Clone, PartialEq)]
pub struct Binding {
    /// Address of the listener.
    pub listen: SocketAddr,
    /// Who pays for what comes in there.
    pub account: AccountId,
}

/// Who may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Auth {
    /// The account of callers without a token; `None` refuses them.
    pub anonymous: Option<AccountId>,
    /// Tokens by hash.
    pub tokens: Vec<Token>,
}

/// A gateway token. Only its hash is ever held.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Name for logs and metrics.
    pub id: KeyId,
    /// SHA-256 of the token.
    pub sha256: [u8; 32],
    /// Who pays; also the only account id accepted in a path, unless `any_account`.
    pub account: AccountId,
    /// May use any account id in a path (an operator's token).
    pub any_account: bool,
    /// Unix milliseconds after which it is refused.
    pub expires: Option<crate::base::Millis>,
}

/// How devices compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Engine {
    /// Threads of the CPU device.
    pub threads: usize,
    /// Tokens computed in a step over all sequences of a model.
    pub step_tokens: usize,
    /// Most prompt tokens of one sequence in a step, so that a short prompt is not stuck behind a long one.
    pub prefill_chunk: usize,
    /// Sequences computed at the same time.
    pub max_running: usize,
    /// Sequences waiting for their first step, beyond which callers are told to come back.
    pub max_queue: usize,
    /// Tokens in a KV block.
    pub block_tokens: usize,
    /// Share finished prompts' KV between requests of one account.
    pub prefix_cache: bool,
}

/// A model to be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its catalog id.
    pub id: ModelId,
    /// GGUF file or safetensors folder.
    pub path: PathBuf,
    /// Quantised kernels as fast as they go, or everything in f32.
    pub precision: Precision,
    /// Type of the KV cache.
    pub kv: KvType,
    /// Bytes of KV pool.
    pub kv_bytes: usize,
    /// Longest sequence, prompt and answer.
    pub context: Option<u32>,
}

/// Which arithmetic the CPU uses for the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Weights as stored, activations in int8 against quantised weights.
    #[default]
    Fast,
    /// Everything in f32: the yardstick.
    Plain,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// Half the bytes; enough for every model here.
    #[default]
    F16,
    /// For comparisons.
    F32,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// A `tracing` filter such as `info` or `neurond=debug`.
    pub filter: String,
    /// Text for people, JSON for machines.
    pub format: LogFormat,
}

/// The configuration in force. Readers clone the `Arc` and leave; a reload swaps it.
#[derive(Clone)]
pub struct Live(Arc<parking_lot::RwLock<Arc<Config>>>);

impl Live {
    /// Begins with a first configuration.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(parking_lot::RwLock::new(Arc::new(config))))
    }

    /// The snapshot in force now.
    pub fn get(&self) -> Arc<Config> {
        self.0.read().clone()
    }

    /// Puts a new one in force.
    pub fn set(&self, config: Config) {
        *self.0.write() = Arc::new(config);
    }
}
