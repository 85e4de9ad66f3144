//! What may be written in `neurond.toml`. A field's doc comment is its manual: `docs/CONFIG.md` and `configs/neurond.toml`
//! are made from this file (`UPDATE_DOCS=1 cargo test --test docs`), so write them for an operator.
//!
//! Nothing is checked here beyond its shape; `resolve.rs` does that. A key whose default depends on the machine is an
//! `Option` and says under "Left out" what happens then.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::catalog::Block;
use super::fleet::FleetSection;
use super::gateway::{GatewaySection, ProviderSection, RegistrySection, VaultSection};
use super::metering::{BudgetSection, LedgerSection, LimitSection, LimitsSection, PlanSection, PricesSection};
use super::records::{
    AlertSection, AlertsSection, AnalyticsSection, ChannelSection, LogsSection, RedactSection, ShipSection,
};
use super::value::{ByteSize, Written};
use super::{Format, KvType, Packing, Precision, PromptKernel};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The whole file. Unknown keys are refused, so that a misspelt one cannot be silently ignored.
/// Relative paths are relative to the folder of the file they are written in.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Where the API is served, and its limits.
    pub server: ServerSection,
    /// The AI-binding listener. Left out: there is none.
    pub binding: Option<BindingSection>,
    /// Who may call.
    pub auth: AuthSection,
    /// How the device computes, for all models.
    pub engine: EngineSection,
    /// NVIDIA GPUs.
    pub gpu: GpuSection,
    /// Work that nobody waits for.
    pub batch: BatchSection,
    /// What accounts may use of the models of this machine.
    pub plan: PlanSection,
    /// One block an account that is not like all others.
    pub account: Vec<AccountSection>,
    /// How much callers may ask for in a time.
    pub limits: LimitsSection,
    /// One block a rule of one's own.
    pub limit: Vec<LimitSection>,
    /// What other providers' models cost.
    pub prices: PricesSection,
    /// Where it is written down who used what.
    pub ledger: LedgerSection,
    /// With which daemons limits are shared.
    pub fleet: FleetSection,
    /// Records of calls through gateways.
    pub logs: LogsSection,
    /// One block a pattern that is taken out of records.
    pub redact: Vec<RedactSection>,
    /// One block a place that records are shipped to.
    pub ship: Vec<ShipSection>,
    /// Sums of all calls.
    pub analytics: AnalyticsSection,
    /// Who is told when something is wrong.
    pub alerts: AlertsSection,
    /// One block a thing that can be wrong.
    pub alert: Vec<AlertSection>,
    /// One block who is told.
    pub channel: Vec<ChannelSection>,
    /// One block a model to be loaded, in this order.
    pub model: Vec<ModelSection>,
    /// LoRA adapters that accounts bring.
    pub lora: LoraSection,
    /// One block a gateway that the file decides about.
    pub gateway: Vec<GatewaySection>,
    /// One block a provider with another address or a key, or of one's own.
    pub provider: Vec<ProviderSection>,
    /// What stored keys are sealed with.
    pub vault: VaultSection,
    /// What the management API is told.
    pub registry: RegistrySection,
    /// How other servers are called.
    pub upstream: UpstreamSection,
    /// Answers of upstreams that are given again.
    pub cache: CacheSection,
    /// What can be asked for by name.
    pub catalog: CatalogSection,
    /// What is logged and how.
    pub log: LogSection,
}

impl File {
    /// What is in force without any file: for a first try on one machine. Unlike a file that says nothing, it serves callers
    /// without a token, since it listens on loopback only.
    pub(super) fn builtin() -> Self {
        let mut file = Self::default();
        file.auth.anonymous = Some("local".into());
        file
    }
}

/// `[server]`: where the API is served, and its limits. Times are milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSection {
    /// IP address and port of the API. The default is for this machine only; `0.0.0.0:8080` serves the network.
    pub listen: String,
    /// HTTP worker threads. They parse, stream and wait; computing happens elsewhere, so a few are enough.
    /// Left out: a quarter of the CPUs, at least 2, at most 16.
    /// Example: `2`
    pub workers: Option<usize>,
    /// Largest request body; a longer one is refused with 413 before it is read. Bytes, or text such as `"16MiB"`.
    pub max_body_bytes: ByteSize,
    /// Connections open at the same time over all workers; more wait in the kernel's accept queue.
    pub max_connections: usize,
    /// How long a client may take to send the head of a request, and again for its body: what cuts off a client that
    /// sends one byte a second.
    pub read_timeout_ms: u64,
    /// A client that takes no byte of its answer for this long is cut off, and its sequence leaves the batch.
    pub write_timeout_ms: u64,
    /// From the end of a request to the end of its answer, waiting in the queue included. After it the call fails with 408,
    /// or the stream ends with an error event.
    pub request_timeout_ms: u64,
    /// How long a drain (TERM, INT) waits for open calls before it cuts them off. Keep it below `TimeoutStopSec` of the
    /// systemd unit, or systemd kills what would have ended well.
    pub drain_timeout_ms: u64,
}

impl Default for ServerSection {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            workers: None,
            max_body_bytes: ByteSize(16 << 20),
            max_connections: 4096,
            read_timeout_ms: 30_000,
            write_timeout_ms: 30_000,
            request_timeout_ms: 600_000,
            drain_timeout_ms: 30_000,
        }
    }
}

/// `[binding]`: the listener for Worker code that calls `env.AI`. It knows no credentials, so whoever reaches it spends
/// the neurons of one account: bind it where only the Workers runtime can reach it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindingSection {
    /// IP address and port of the listener.
    /// Example: `"127.0.0.1:8081"`
    pub listen: String,
    /// Who pays for what comes in there: 32 hex digits, or a short name.
    /// Example: `"local"`
    pub account: String,
}

/// `[auth]`: who may call.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct AuthSection {
    /// The account of callers without a token. For development. Left out: they are refused with 401.
    /// Example: `"local"`
    pub anonymous: Option<String>,
    /// Allow callers without a token (`anonymous`, `[binding]`) on an address that other machines can reach. Without it such a
    /// configuration is refused, since everybody on the network could spend the account's neurons.
    pub allow_anonymous_remote: bool,
    /// A TOML file with `[[token]]` blocks of the same keys as `[[auth.token]]`, so that tokens can have their own owner and
    /// rights and be rotated alone. A leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=` sets.
    /// Left out: only the tokens written here count.
    /// Example: `"tokens.toml"`
    pub token_file: Option<PathBuf>,
    /// One block a token.
    pub token: Vec<TokenSection>,
}

/// `[[auth.token]]`: a bearer token. Only its SHA-256 is held, in the file as in memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSection {
    /// Name of the token in logs; never the token itself.
    /// Example: `"ops"`
    pub id: String,
    /// SHA-256 of the token, 64 hex digits: `printf %s "$TOKEN" | sha256sum`. Either this or `env`.
    /// Example: `"0000000000000000000000000000000000000000000000000000000000000000"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Name of an environment variable that holds the token. It is hashed at start. Either this or `sha256`.
    /// Example: `"NEUROND_TOKEN"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<String>,
    /// Who pays: 32 hex digits, or a short name. It is also the only account accepted in a path
    /// (`/client/v4/accounts/{account}/…`).
    /// Example: `"023e105f4ecef8ad9ca31a8372d0c353"`
    pub account: String,
    /// May use any account in a path: for operators.
    #[serde(default)]
    pub any_account: bool,
    /// What it is good for: `"run"` (calls of the models served here), `"gateway"` (calls through every gateway of its account),
    /// `"gateway:NAME"` (through that one), `"admin"` (the management API). Left out: all of it.
    /// Example: `["run", "gateway:prod"]`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes: Option<Vec<String>>,
    /// Refused after this moment: a date (`2027-12-31`, to its end in UTC) or a time with offset (`2027-12-31T12:00:00Z`).
    /// Left out: never.
    /// Example: `2027-12-31`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Written>,
    /// What may be used with it: `neurons_per_day` and `neurons_per_month` (UTC) of the models of this machine, `usd_per_day` and
    /// `usd_per_month` of all providers. Beyond it calls with this token are refused. Left out: what its account may.
    /// Example: `{ usd_per_month = 50.0 }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetSection>,
}

/// `[engine]`: how the device computes, for all models.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSection {
    /// Threads of the CPU device. More than there are cores makes it slower, since all meet at the end of each operation.
    /// Left out: the physical cores this process may use (affinity and cgroup quota respected).
    /// Example: `8`
    pub threads: Option<usize>,
    /// Tokens computed in a step over all sequences of a model. Larger reads prompts faster, smaller keeps the time between
    /// two tokens of a running answer even. At least `max_running`, so that every running sequence gets its token.
    pub step_tokens: usize,
    /// Most prompt tokens of one sequence in a step, so that a short prompt is not stuck behind a long one. At most
    /// `step_tokens`.
    pub prefill_chunk: usize,
    /// Sequences computed at the same time. More raises throughput until the arithmetic is saturated, and each one's own
    /// pace falls.
    pub max_running: usize,
    /// Sequences waiting for their first step; beyond it callers get 429 with `Retry-After` at once.
    pub max_queue: usize,
    /// Tokens in a KV block, a power of two from 4 to 256. Smaller wastes less at the end of a sequence and shares
    /// prefixes finer, larger means less bookkeeping.
    pub block_tokens: usize,
    /// Keep the KV of finished prompts while there is room, and share it between requests of one account that begin alike.
    pub prefix_cache: bool,
    /// How many times longer a step may take because of a prompt while other answers are being written: 2 allows twice the
    /// time of a step without prompts. Smaller keeps the time between two tokens even, larger reads prompts sooner. When
    /// many prompts come at once beside few answers, up to twenty-one times as much is added until they are read. 0: no bound
    /// but `step_tokens`.
    pub prefill_stretch: f64,
    /// Most tokens of one answer that are guessed ahead and verified in the same step (speculative decoding); 0 switches it
    /// off. How many of them are tried follows from how often the guesses come true and from how full the step is. Answers are
    /// the same with and without, only faster where text repeats itself. A request may ask for fewer: `"speculative.n_max"`.
    pub draft_tokens: usize,
    /// Guess from earlier text: where the last tokens of an answer occurred before, in the prompt or in the answer, what
    /// followed there is tried.
    pub prompt_lookup: bool,
}

impl Default for EngineSection {
    fn default() -> Self {
        Self {
            threads: None,
            step_tokens: 512,
            prefill_chunk: 256,
            max_running: 64,
            max_queue: 256,
            block_tokens: 16,
            prefix_cache: true,
            prefill_stretch: 1.3,
            draft_tokens: 15,
            prompt_lookup: true,
        }
    }
}

/// `[gpu]`: NVIDIA GPUs. Each that serves holds a whole copy of every model that writes, embeds or classifies text and is not kept from
/// it, or with others a part of it (`tensor_parallel`), and answers go to the one that has least to do. Where there is none, or no driver, the CPU serves and the log says so. The keys that
/// `[engine]` has as well count here in their place; all others of `[engine]` count on GPUs too.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuSection {
    /// Numbers of the GPUs that serve, as `nvidia-smi` counts those that `CUDA_VISIBLE_DEVICES` leaves; `[]`: none.
    /// Left out: all of them.
    /// Example: `[0, 1]`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<u16>>,
    /// Folders that hold CUDA's libraries (`libcublasLt.so.13`, `libnccl.so.2`) where the system's loader does not find them.
    /// Without the first prompts are read by slower kernels, without the second no model is divided over GPUs.
    pub library_folders: Vec<PathBuf>,
    /// Share of the memory that weights and work buffers leave free on a GPU that becomes the KV pool of a model without
    /// `kv_bytes`. Models that say what they need, and those that embed or classify, are loaded before. The first of the others takes
    /// it: with several of them on a GPU, or to swap a model while it serves, write `kv_bytes` so that all fit.
    pub memory_share: f64,
    /// Which kernel attends to prompts. `fastest`: all that the GPU has are tried when a model is loaded, and the log says which one serves.
    /// `warps` runs anywhere; `warpgroups` and `bulk` need a Hopper (H100, H200), whose tensor cores multiply for four warps at once and
    /// which brings bf16 keys and values by itself; where there is none, `warps` serves.
    pub prompt_kernel: PromptKernel,
    /// Threads of each GPU, which convert weights when a model is loaded and draw tokens whose wishes the GPU cannot meet.
    /// Left out: a quarter of the physical cores, at least 1, at most 8.
    /// Example: `4`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// As `engine.step_tokens`.
    pub step_tokens: usize,
    /// As `engine.prefill_chunk`.
    pub prefill_chunk: usize,
    /// As `engine.max_running`.
    pub max_running: usize,
}

impl Default for GpuSection {
    fn default() -> Self {
        Self {
            devices: None,
            library_folders: Vec::new(),
            memory_share: 0.9,
            prompt_kernel: PromptKernel::default(),
            threads: None,
            step_tokens: 4096,
            prefill_chunk: 2048,
            max_running: 256,
        }
    }
}

/// `[batch]`: work that nobody waits for.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSection {
    /// Folder of the batches that were put in line (`?queueRequest=true`): what was asked, and the answers for a day. The
    /// daemon makes it and writes to it; whoever can read it can read them. Left out: `batches` in the folder that systemd
    /// gives the unit as its state (`$STATE_DIRECTORY`); without that there is no line, and such requests are refused.
    /// Example: `"/var/lib/neurond/batches"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
}

/// `[[account]]`: an account that is not like all others. Accounts need not be written to be served.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountSection {
    /// Which: 32 hex digits, or a short name, as in its tokens.
    /// Example: `"023e105f4ecef8ad9ca31a8372d0c353"`
    pub id: String,
    /// Its share of a busy device: twice the weight is served twice as much when both want more than there is. From 1 to
    /// 1000. Left out: 1, which accounts have that are not written.
    /// Example: `2`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The highest priority its requests may ask for, from -100 to 100: what asks for more gets this. `service_tier` asks
    /// for 10 (`priority`), 0 or -10 (`flex`), `priority` for minus its value. Left out: 0, so that requests can only step back.
    /// Example: `10`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i8>,
    /// What it may use, with the keys of `[plan]`; those that are not written are the defaults given there.
    /// Left out: what `[plan]` says.
    /// Example: `{ neurons_per_day = 10000.0, beyond = "refuse" }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanSection>,
}

/// `[[model]]`: a model to be loaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Its catalog id, or an alias of it. Pinned names only: `…:latest` is refused.
    /// Example: `"@cf/huggingfacetb/smollm2-135m-instruct"`
    pub id: String,
    /// GGUF file, or folder with safetensors, `config.json` and tokenizer.
    /// Example: `"models/SmolLM2-135M-Instruct.Q4_1.gguf"`
    pub path: PathBuf,
    /// `"fast"`: quantised kernels. `"plain"`: everything in f32, the yardstick for comparisons.
    #[serde(default)]
    pub precision: Precision,
    /// Type of the KV cache: `"f16"`, or `"f32"` for comparisons.
    #[serde(default)]
    pub kv: KvType,
    /// Bytes of KV pool, a number or text such as `"512MiB"`: how many tokens can be in flight and cached. The pool is reserved at
    /// load and costs memory only where it has been used.
    /// Left out: an eighth of the memory this process may use (cgroup limit respected), at least 64 MiB and
    /// at most 2 GiB; with many models on one machine, write it. On a GPU: what `gpu.memory_share` says.
    /// Of ranks on GPUs, each has so many.
    /// Example: `"512MiB"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<ByteSize>,
    /// Bytes for KV that had to leave the pool, a number or text such as `"8GiB"`: prefixes that come back are copied from there
    /// instead of being computed again. Memory or disk is only taken as it fills. Left out: what leaves the pool is forgotten.
    /// Example: `"8GiB"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_bytes: Option<ByteSize>,
    /// Folder of the file that holds those bytes. The file has no name while it is used and is gone with the process: nothing
    /// is left behind, and nothing is ever read that another process wrote. Left out: they are kept in memory.
    /// Example: `"/var/cache/neurond"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_folder: Option<PathBuf>,
    /// GGUF file or folder of a smaller model with the same vocabulary, which guesses what this one says next: up to
    /// `engine.draft_tokens` tokens, verified in one step. Answers are the same with and without. It pays where the small model
    /// computes much faster and often agrees, and is not asked where it does not pay. It takes a KV pool for as many tokens as
    /// this model's, in its own size.
    /// Example: `"models/draft.gguf"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<PathBuf>,
    /// Ranks that the model is divided over (tensor parallelism): each holds a part of every matrix and of the KV pool. Where
    /// as many GPUs serve, each rank is on one of them: those that `gpus` names, or the first; they are one device then, the
    /// first's. That is for models that one GPU cannot hold, or not fast enough; it needs NCCL (`libnccl.so.2`), and such a
    /// model takes no adapters. Elsewhere ranks compute with their share of `engine.threads`, which pays where parts of the
    /// machine have memory of their own (several sockets), and costs a little where they have not. It must divide the model's
    /// query heads, and divide its key-value heads or be a multiple of them; `neurond check-config` says which numbers a model
    /// file allows. Another number rounds differently, so a greedy answer may part from that of another where two tokens were
    /// nearly even. Only for text generation.
    /// Left out: 1, which divides nothing.
    /// Example: `2`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_parallel: Option<usize>,
    /// Numbers of the GPUs that serve it, out of those of `[gpu]`, each with a copy of its own, or with a rank if
    /// `tensor_parallel` is as many; `[]`: the CPU does. Only models that write, embed or classify text and whose shapes the GPU's kernels take: 16-bit and quantised files alike become `gpu_weights`.
    /// Left out: all of them, or the CPU where there is none or its kernels do not take the model.
    /// Example: `[0]`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<Vec<u16>>,
    /// How a GPU keeps the matrices of the layers: `"bf16"`; `"fp8"`, which is half as much to read for each token and rounds more;
    /// `"q4"`, a quarter as much: 4 bits and a scale for each 32 weights, as in a file of Q4_0, which is taken as it is.
    /// Models that embed or classify are always kept in bf16.
    /// Left out: `"fp8"` for ids that say so (`…-fp8`, `…-fp8-fast`), `"q4"` for `…-awq` and `…-int4`, else `"bf16"`.
    /// Example: `"fp8"`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_weights: Option<Packing>,
    /// How a GPU keeps keys and values: `"bf16"`, or `"fp8"` for twice as many tokens.
    #[serde(default)]
    pub gpu_kv: Format,
    /// Longest sequence served, prompt and answer, in tokens.
    /// Left out: what the catalog says, or the model file if that is less.
    /// Example: `4096`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Catalog entry for this id: needed when the catalog does not know it, and changes the entry key by key when it does.
    /// Same keys as a `[[model]]` block of `configs/catalog.toml`, without `id`.
    /// Example: `{ task = "text-generation", context = 8192, price = { input = 300, output = 2000 } }`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Block>,
}

impl ModelSection {
    /// A block that says nothing but this.
    pub(super) fn new(id: String, path: PathBuf, entry: Option<Block>) -> Self {
        let (precision, kv, gpu_kv) = Default::default();
        Self {
            id,
            path,
            precision,
            kv,
            kv_bytes: None,
            spill_bytes: None,
            spill_folder: None,
            draft: None,
            tensor_parallel: None,
            gpus: None,
            gpu_weights: None,
            gpu_kv,
            context: None,
            entry,
        }
    }
}

/// `[lora]`: LoRA adapters that accounts bring (`/ai/finetunes`) and requests name (`lora`).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Folder of the adapters, a folder each under their account's; made when the first one comes.
    /// Left out: `adapters` in the state directory: `$STATE_DIRECTORY` (set by systemd's `StateDirectory=`), or
    /// `$XDG_STATE_HOME/neurond`, or `~/.local/state/neurond`; without any of them nobody can bring adapters.
    /// Example: `"/var/lib/neurond/adapters"`
    pub path: Option<PathBuf>,
    /// Largest file of an adapter, a number of bytes or text such as `"300MiB"`.
    pub max_file_bytes: ByteSize,
    /// Most adapters of one account, complete or not.
    pub max_adapters: usize,
    /// Memory for adapters in use, a number of bytes or text such as `"1GiB"`. They are opened when a request names them;
    /// beyond this the least recently used that nobody computes with goes, and while all are in use a request for another one
    /// is told to come back.
    pub cache_bytes: ByteSize,
    /// The account whose adapters every other one may use as well. Left out: each account has its own only.
    /// Example: `"house"`
    pub public_account: Option<String>,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self {
            path: None,
            max_file_bytes: ByteSize(300 << 20),
            max_adapters: 100,
            cache_bytes: ByteSize(1 << 30),
            public_account: None,
        }
    }
}

/// `[upstream]`: how other servers are called, all providers alike; `[[provider]]` and `[[gateway]]` say what differs.
/// Times are milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamSection {
    /// From looking up the name to the end of the TLS handshake.
    pub connect_timeout_ms: u64,
    /// From sending the request to the head of the answer, unless a gateway or a caller says less. A provider that thinks
    /// before it answers a call that does not stream takes minutes.
    pub first_byte_timeout_ms: u64,
    /// Between two pieces of an answer that has begun. There is no bound on the whole of it.
    pub idle_timeout_ms: u64,
    /// From the first attempt of a call to the head of its answer, retries and fallbacks included.
    pub total_timeout_ms: u64,
    /// The longest wait that a provider's `Retry-After` is obeyed for; what asks for more is not waited for.
    pub max_retry_after_ms: u64,
    /// Let every provider be on a private address (loopback, 10.0.0.0/8, link-local …). Callers choose addresses of custom
    /// providers, so without it those that resolve to one are refused; `[[provider]] allow_private` allows a single one.
    pub allow_private: bool,
    /// `host:port` of an HTTP proxy that all calls go through (CONNECT). The environment's `HTTPS_PROXY` is not looked at.
    /// Left out: servers are called directly.
    /// Example: `"proxy.internal:3128"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// PEM file of certificate authorities that are believed besides those of the web: for a provider of your own.
    /// Left out: those of the web only.
    /// Example: `"/etc/ssl/certs/internal.pem"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Largest answer that is read whole, because it is translated or checked by rules. Others are passed on however long.
    pub max_answer_bytes: ByteSize,
}

impl Default for UpstreamSection {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 5_000,
            first_byte_timeout_ms: 300_000,
            idle_timeout_ms: 120_000,
            total_timeout_ms: 600_000,
            max_retry_after_ms: 10_000,
            allow_private: false,
            proxy: None,
            ca_file: None,
            max_answer_bytes: ByteSize(64 << 20),
        }
    }
}

/// `[cache]`: answers of upstreams that are given again. Whether a gateway keeps any is its own setting (`cache_ttl`).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSection {
    /// Memory for answers; beyond it the least recently used are only on disk, or forgotten. Bytes, or text such as `"256MiB"`.
    pub memory_bytes: ByteSize,
    /// Disk for answers, in `folder`; beyond it the oldest go. 0: memory only.
    pub disk_bytes: ByteSize,
    /// Most answers, in memory and on disk.
    pub max_entries: usize,
    /// The largest answer that is kept.
    pub max_entry_bytes: ByteSize,
    /// Folder of the answers on disk, which survive a restart.
    /// Left out: `cache` in the state directory: `$STATE_DIRECTORY` (set by systemd's `StateDirectory=`), or
    /// `$XDG_STATE_HOME/neurond`, or `~/.local/state/neurond`; without any of them answers are kept in memory only.
    /// Example: `"/var/cache/neurond"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
}

impl Default for CacheSection {
    fn default() -> Self {
        Self {
            memory_bytes: ByteSize(256 << 20),
            disk_bytes: ByteSize(1 << 30),
            max_entries: 100_000,
            max_entry_bytes: ByteSize(25 << 20),
            folder: None,
        }
    }
}

/// `[catalog]`: what can be asked for by name.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct CatalogSection {
    /// A file of `[[model]]` blocks that adds to the built-in `configs/catalog.toml`. A block whose id is known changes only
    /// the keys it names (a price, an alias list). Left out: the built-in catalog as it is.
    /// Example: `"catalog.toml"`
    pub path: Option<PathBuf>,
}

/// `[log]`: what is logged and how. Logs go to stderr.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// Level, or levels by module: `"info"`, `"warn,neurond::engine=debug"`. USR2 changes it in the running process.
    pub filter: String,
    /// `"text"` for people, `"json"` for machines (one object a line).
    pub format: LogFormat,
}

impl Default for LogSection {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_text_dates_and_native_ones_are_the_same_to_a_reader() {
        let file: File = toml::from_str(
            "[server]\nmax_body_bytes = 1024\n[[auth.token]]\nid='a'\naccount='x'\nexpires = 2027-12-31\n\
             [[auth.token]]\nid='b'\naccount='x'\nexpires = '2027-12-31'\n",
        )
        .unwrap();
        assert_eq!(file.server.max_body_bytes, ByteSize(1024));
        let dates: Vec<_> = file.auth.token.iter().map(|t| t.expires.as_ref().unwrap().to_string()).collect();
        assert_eq!(dates, ["2027-12-31", "2027-12-31"]);
        let refused = toml::from_str::<File>("[server]\nmax_body_bytes = -5\n").unwrap_err().to_string();
        assert!(refused.contains("512MiB"), "{refused}");
    }

    #[test]
    fn what_is_written_by_default_reads_back_as_the_default() {
        let text = toml::to_string(&File::default()).unwrap();
        let back: File = toml::from_str(&text).unwrap();
        assert_eq!(toml::to_string(&back).unwrap(), text);
    }
}
