//! What the operator decides. `file.rs` is what may be written, this is what is used: resolved and validated, so that
//! nobody below has to check again.
//!
//!     neurond.toml --serde--> file::File --resolve--> Config (immutable, shared as Arc)
//!     catalog.toml ----------------^                    |
//!                                                     diff (what a reload changes)
//!
//! Loads no model and opens no socket: a path exists or it does not, what is in it is for `model` to say.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use crate::base::{AccountId, Error, KeyId, Millis, ModelId, Result};
use crate::task::Task;

pub use catalog::{Catalog, CatalogEntry, Deprecation, ResultShape, is_unpinned};
pub use file::{File, LogFormat};
pub use fleet::{Fleet, FleetCache, OnLoss};
pub use metering::{
    AtTheEnd, Beyond, Budget, By, CatalogLimits, Counted, Ledger, Limits, Metering, Network, OnFault, Plan, Rule,
};
pub use price::{Price, PriceLine};
pub use records::{
    AlertOn, AlertSection, AlertSeverity, AnalyticsSection, ChannelSection, ChannelTo, LogsSection, MailSecurity,
    Records, RedactSection, ShipFormat, ShipSection, ShipTo, SpoolFull, WithSecret,
};
pub use reload::{Change, Effect, diff};
pub use tariff::{Tariff, Tariffs};
pub use value::ByteSize;

mod catalog;
mod check;
mod file;
mod fleet;
pub mod gateway;
mod machine;
mod metering;
mod price;
mod records;
mod reload;
mod resolve;
mod tariff;
mod value;

/// Where a configuration is looked for when nobody names one, in this order.
pub const SEARCH: [&str; 2] = ["./neurond.toml", "/etc/neurond/neurond.toml"];

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
    /// GPUs, and how they compute where that differs.
    pub gpu: Gpu,
    /// Where batches lie that wait in line; `None`: there is no line.
    pub batches: Option<PathBuf>,
    /// Accounts of which something is said.
    pub accounts: Vec<Account>,
    /// What calls may use and what they cost.
    pub metering: Metering,
    /// What is kept and told of calls.
    pub records: Records,
    /// Which models are loaded, in the order written.
    pub models: Vec<Model>,
    /// Adapters that accounts bring.
    pub lora: Lora,
    /// Gateways and providers that the file decides about.
    pub fixed: gateway::Fixed,
    /// Where master keys are that stored keys are sealed with.
    pub key_files: gateway::KeyFiles,
    /// Where the registry keeps what the management API was told.
    pub registry: Option<PathBuf>,
    /// How other servers are called.
    pub upstream: Upstream,
    /// Answers that are given again.
    pub cache: Cache,
    /// Everything that can be asked for by name, loaded or not.
    pub catalog: Arc<Catalog>,
    /// What is logged and how.
    pub log: Log,
    /// The file it came from; `None` for the built-in defaults.
    pub origin: Option<PathBuf>,
    /// What is allowed but probably not meant: one sentence each, to be logged at start and shown by `check-config`.
    pub warnings: Vec<String>,
}

/// What the command line says over the file. Relative paths are relative to the working directory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// Replaces `server.listen`.
    pub listen: Option<String>,
    /// Replaces `auth.anonymous`.
    pub anonymous: Option<String>,
    /// `ID` and path: replaces the path of the `[[model]]` with this id, or adds one. An id that the catalog does not know
    /// becomes a text-generation model at a stand-in price, with a warning.
    pub models: Vec<(String, PathBuf)>,
    /// Replaces `engine.threads`.
    pub threads: Option<usize>,
    /// Replaces `log.filter`.
    pub log_filter: Option<String>,
    /// Replaces `log.format`.
    pub log_format: Option<LogFormat>,
}

/// Reads, resolves and checks the configuration: the file named, or the first that exists of [`SEARCH`], or the built-in
/// defaults (loopback only, callers without a token served as account `local`, no models but those of `overrides`).
///
/// # Errors
/// `BadInput` whose message lists every mistake on a line of its own, each with file, key, value and remedy.
pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Config> {
    let found = match path {
        Some(path) => Some(path.to_path_buf()),
        None => SEARCH.iter().map(PathBuf::from).find(|path| path.exists()),
    };
    let surroundings = machine::Surroundings::read();
    let Some(path) = found else { return resolve::resolve(None, File::builtin(), overrides, &surroundings) };
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Error::bad_input(format!(
            "{}: {error}; name an existing file with --config, or write one (configs/neurond.toml shows every key)",
            path.display()
        ))
    })?;
    let file: File = toml::from_str(&text).map_err(|error| Error::bad_input(format!("{}: {error}", path.display())))?;
    resolve::resolve(Some(&path), file, overrides, &surroundings)
}

impl Default for Config {
    /// The built-in defaults as [`load`] gives them when there is no file: for tests and tools.
    ///
    /// # Panics
    /// If the built-in defaults do not pass their own checks, which a test rules out.
    #[allow(clippy::expect_used)]
    fn default() -> Self {
        resolve::resolve(None, File::builtin(), &Overrides::default(), &machine::Surroundings::read())
            .expect("built-in defaults without mistakes")
    }
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
    /// What it is good for.
    pub scopes: Scopes,
    /// Unix milliseconds after which it is refused.
    pub expires: Option<Millis>,
    /// What may be used with it.
    pub budget: Budget,
}

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scopes {
    /// Calls of models served here.
    pub run: bool,
    /// Calls through gateways.
    pub gateways: Gateways,
    /// The management API.
    pub admin: bool,
}

/// Which gateways a token opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gateways {
    /// None.
    None,
    /// Those.
    These(Arc<[String]>),
    /// All of its account.
    All,
}

impl Scopes {
    /// Everything.
    pub const ALL: Self = Self { run: true, gateways: Gateways::All, admin: true };

    /// Reads `run`, `admin`, `gateway` and `gateway:NAME`.
    ///
    /// # Errors
    /// The word that is none of them.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> std::result::Result<Self, &'a str> {
        let mut scopes = Self { run: false, gateways: Gateways::None, admin: false };
        let (mut all, mut these) = (false, Vec::new());
        for word in words {
            match word {
                "run" => scopes.run = true,
                "admin" => scopes.admin = true,
                "gateway" => all = true,
                _ => match word.strip_prefix("gateway:") {
                    Some(name) if !name.is_empty() => these.push(name.to_owned()),
                    _ => return Err(word),
                },
            }
        }
        scopes.gateways = match (all, these.is_empty()) {
            (true, _) => Gateways::All,
            (false, false) => Gateways::These(these.into()),
            (false, true) => Gateways::None,
        };
        Ok(scopes)
    }

    /// Whether it opens a gateway.
    pub fn opens(&self, gateway: &str) -> bool {
        match &self.gateways {
            Gateways::None => false,
            Gateways::These(names) => names.iter().any(|name| name == gateway),
            Gateways::All => true,
        }
    }
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
    /// How many times longer a step may take because of a prompt while others decode; 0: as long as it takes.
    pub prefill_stretch: f64,
    /// Most tokens of one answer guessed ahead in a step; 0: none.
    pub draft_tokens: usize,
    /// Guess from earlier text of prompt and answer.
    pub prompt_lookup: bool,
}

/// GPUs, and how they compute where that differs from the CPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu {
    /// Which serve, by ordinal; `None`: all there are.
    pub devices: Option<Vec<u16>>,
    /// Where CUDA's libraries are looked for before the system's own places.
    pub library_folders: Vec<PathBuf>,
    /// Share of what is free beside weights and work buffers that becomes KV, for a model that does not say how much; above 0, at
    /// most 1.
    pub memory_share: f64,
    /// Threads of each.
    pub threads: usize,
    /// As [`Engine::step_tokens`].
    pub step_tokens: usize,
    /// As [`Engine::prefill_chunk`].
    pub prefill_chunk: usize,
    /// As [`Engine::max_running`].
    pub max_running: usize,
}

impl Engine {
    /// The same on a GPU.
    pub fn on_gpu(&self, gpu: &Gpu) -> Self {
        let Gpu { threads, step_tokens, prefill_chunk, max_running, .. } = *gpu;
        Self { threads, step_tokens, prefill_chunk, max_running, ..self.clone() }
    }
}

/// What is special about an account.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    /// Which.
    pub id: AccountId,
    /// Its share of a busy device beside accounts that are not written, which have 1.
    pub weight: u32,
    /// The highest priority its requests may ask for; 0 is normal.
    pub priority: i8,
    /// What it may use, where that differs from others.
    pub plan: Option<Plan>,
}

/// A model to be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its catalog id.
    pub id: ModelId,
    /// What it does, by its catalog entry: decides how it is loaded.
    pub task: Task,
    /// GGUF file or safetensors folder.
    pub path: PathBuf,
    /// Quantised kernels as fast as they go, or everything in f32.
    pub precision: Precision,
    /// Type of the KV cache.
    pub kv: KvType,
    /// Bytes of KV pool.
    pub kv_bytes: usize,
    /// Where KV goes that the pool has no room for.
    pub spill: Option<Spill>,
    /// Longest sequence, prompt and answer, as catalog and operator allow it; the model file may allow less.
    pub context: u32,
    /// The model that guesses its answers.
    pub draft: Option<Draft>,
    /// Ranks that it is divided over, at least 1.
    pub tensor_parallel: usize,
    /// What is different where a GPU serves it.
    pub on_gpu: OnGpu,
    /// When the file (of a folder: its newest file) was last written, so that a reload notices new weights under an old name.
    pub modified: Option<Millis>,
}

impl Model {
    /// Whether GPUs serve it where there are any, unless their kernels do not take its shapes.
    pub fn is_for_gpus(&self) -> bool {
        (self.task == Task::TextGeneration || self.task.encodes())
            && self.precision == Precision::Fast
            && simulated(&self.path).is_none()
            && self.on_gpu.gpus.as_ref().is_none_or(|gpus| !gpus.is_empty())
    }
}

/// How GPUs serve a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OnGpu {
    /// Which do, by ordinal; `None`: all that serve, or the first of them, one a rank; `[]`: the CPU does.
    pub gpus: Option<Vec<u16>>,
    /// How matrices are kept.
    pub weights: Packing,
    /// How keys and values are kept.
    pub kv: Format,
    /// Bytes of KV pool on each; `None`: what is left.
    pub kv_bytes: Option<usize>,
    /// What attends to prompts.
    pub prompt_kernel: PromptKernel,
}

/// A smaller model that guesses for another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// Its file or folder.
    pub path: PathBuf,
    /// As of the model itself.
    pub modified: Option<Millis>,
}

/// Room for KV blocks that had to leave the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spill {
    /// How much.
    pub bytes: usize,
    /// Where its file lives; `None`: in memory.
    pub folder: Option<PathBuf>,
}

/// Adapters that accounts bring.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Their folder; `None`: nobody can bring any.
    pub path: Option<PathBuf>,
    /// Largest file of an adapter.
    pub max_file_bytes: u64,
    /// Most adapters of one account.
    pub max_adapters: usize,
    /// Memory for those in use.
    pub cache_bytes: u64,
    /// Whose adapters everybody may use.
    pub public_account: Option<AccountId>,
}

/// How other servers are called.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// From the name to the end of the handshake.
    pub connect_timeout: Duration,
    /// To the head of an answer.
    pub first_byte_timeout: Duration,
    /// Between two pieces of an answer.
    pub idle_timeout: Duration,
    /// To the head of an answer, all attempts together.
    pub total_timeout: Duration,
    /// Longest `Retry-After` that is obeyed.
    pub max_retry_after: Duration,
    /// Whether every server may be on a private address.
    pub allow_private: bool,
    /// `host:port` of a proxy.
    pub proxy: Option<String>,
    /// Certificate authorities besides the web's, as PEM text.
    pub authorities: Option<String>,
    /// Largest answer that is read whole.
    pub max_answer_bytes: usize,
}

/// Answers that are given again.
#[derive(Debug, Clone, PartialEq)]
pub struct Cache {
    /// In memory.
    pub memory_bytes: u64,
    /// On disk; 0: memory only.
    pub disk_bytes: u64,
    /// Most of them.
    pub max_entries: usize,
    /// The largest one.
    pub max_entry_bytes: u64,
    /// Where they are on disk.
    pub folder: Option<PathBuf>,
}

/// The settings of a device without weights, for tests and load work: a path `sim` or `sim:key=value,…`, unless there is
/// such a file.
pub fn simulated(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    ((name == "sim" || name.starts_with("sim:")) && !path.exists()).then_some(name)
}

/// The shape of a model whose weights a GPU makes up, so that its speed can be measured where there are no weights: a path
/// `synthetic:NAME`, unless there is such a file.
pub fn synthetic(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?.strip_prefix("synthetic:")?;
    (!path.exists()).then_some(name)
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

/// How a GPU keeps matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Rounded to 8 bits of mantissa.
    #[default]
    Bf16,
    /// Half as large, and half as much to read: 3 bits of mantissa and a scale a channel.
    Fp8,
    /// A quarter as large: 4 bits and a scale for each 32 (GGUF's Q4_0).
    Q4,
}

/// How a GPU keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As computed.
    #[default]
    Bf16,
    /// Half as large, and half as much to read: 3 bits of mantissa and a scale.
    Fp8,
}

/// Which kernel of a GPU attends to prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum PromptKernel {
    /// All that it has are tried.
    #[default]
    Fastest,
    /// The portable one.
    Warps,
    /// Products of warpgroups.
    Warpgroups,
    /// The same, and keys and values are brought by the GPU itself.
    Bulk,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// A `tracing` filter such as `info` or `neurond=debug`.
    pub filter: String,
    /// Text for people, JSON for machines.
    pub format: LogFormat,
}

/// The configuration in force. Readers look at it and leave; a reload swaps it.
#[derive(Clone)]
pub struct Live(Arc<ArcSwap<Config>>);

impl Live {
    /// Begins with a first configuration.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(config)))
    }

    /// The snapshot in force now. Counts no reference and takes no lock, which workers would pass back and forth with every call.
    pub fn get(&self) -> Guard<Arc<Config>> {
        self.0.load()
    }

    /// Puts a new one in force.
    pub fn set(&self, config: Config) {
        self.0.store(Arc::new(config));
    }
}
