//! Every series of `/metrics`, in one place. A field's help text is its documentation; `docs/METRICS.md` is made from it.
//!
//! Label values come from closed sets: catalog ids, route names, status codes. Never a request id, a raw path or
//! whatever else a client may choose. Handles are resolved once (a model is loaded, a route is mounted), so that
//! counting in a step is one atomic add.

mod striped;

use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::base::{DeviceId, ModelId};

pub use striped::Striped;

/// Edges of the latency histograms in seconds (time to first token, whole request), as in vLLM so that dashboards carry over.
const LATENCY: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
];
/// Edges for what happens between two tokens, in seconds.
const INTER_TOKEN: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0];
/// Edges for token and row counts of one step.
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Edges for what the gateway takes of a call, in seconds.
const OVERHEAD: &[f64] = &[2.5e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.1, 1.0];

/// Edges for the masks of grammars, in seconds.
const MASK: &[f64] = &[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0];

/// All series of the process. Cheap to clone behind an `Arc`; made once.
pub struct Metrics {
    registry: Registry,

    /// Requests by route, method and status.
    pub http_requests: Striped<IntCounterVec>,
    /// From the request's head to the end of its answer, by route.
    pub http_duration: Striped<HistogramVec>,
    /// Requests being answered.
    pub http_in_flight: Striped<IntGauge>,
    /// Connections open.
    pub http_connections: IntGauge,
    /// Refused credentials.
    pub auth_failures: IntCounter,

    /// Micro-neurons settled, by model.
    pub neurons: IntCounterVec,
    /// Errors told to callers, by kind.
    pub errors: IntCounterVec,
    /// Answers cut off because the client went away, by model.
    pub cancelled: IntCounterVec,
    /// Calls of tools that answers have begun, by model.
    pub tool_calls: IntCounterVec,

    /// Whether a model is loaded and takes requests, by model and device.
    pub model_ready: IntGaugeVec,
    /// Hot-swaps by outcome (`done`, `failed`).
    pub swaps: IntCounterVec,
    /// Reloads of the configuration by outcome (`applied`, `refused`).
    pub reloads: IntCounterVec,
    /// Times an engine thread was started again after it died, by device.
    pub engine_restarts: IntCounterVec,
    /// Memory of a GPU, `total` and `used`, in bytes.
    pub gpu_memory: IntGaugeVec,
    /// Clocks of a GPU, `sm` and `memory`, in hertz.
    pub gpu_clock: IntGaugeVec,
    /// What a GPU draws, in watts.
    pub gpu_power: GaugeVec,
    /// How warm a GPU is, in degrees Celsius.
    pub gpu_temperature: IntGaugeVec,
    /// Share of the last moments in which a GPU computed.
    pub gpu_busy: GaugeVec,
    /// What went wrong in a GPU: memory errors that could not be corrected, critical errors.
    pub gpu_errors: IntGaugeVec,

    /// Attempts at upstreams by provider and outcome (`ok`, or the class of failure).
    pub upstream_attempts: Striped<IntCounterVec>,
    /// From sending a request to the head of its answer, by provider.
    pub upstream_first_byte: Striped<HistogramVec>,
    /// Calls through gateways by how they ended (`done`, `failed`, `cancelled`, `refused`).
    pub gateway_calls: Striped<IntCounterVec>,
    /// Calls through gateways under way.
    pub gateway_in_flight: Striped<IntGauge>,
    /// What the gateway itself took of a call up to the head of its answer: all but waiting for upstreams.
    pub gateway_overhead: Striped<Histogram>,
    /// Calls by what the response cache did (`hit`, `coalesced`, `miss`, `off`).
    pub gateway_cache: Striped<IntCounterVec>,
    /// Second and later attempts by provider.
    pub gateway_retries: IntCounterVec,
    /// Times a later step answered or was tried because an earlier one failed, by provider that was turned to.
    pub gateway_fallbacks: IntCounterVec,
    /// What rules of gateways found, by direction and action.
    pub gateway_findings: IntCounterVec,
    /// Tokens that upstreams say they used, by provider and kind.
    pub upstream_tokens: Striped<IntCounterVec>,
    /// Millionths of neurons that answers of upstreams cost by the price list, by provider; 1,000 neurons are 0.011 USD.
    pub upstream_cost: Striped<IntCounterVec>,
    /// Answers of upstreams whose model has no price, by provider.
    pub upstream_unpriced: Striped<IntCounterVec>,
    /// Calls refused by a limit, by kind (rate, budget, allocation, ledger, fleet).
    pub refused_by_limits: IntCounterVec,
    /// What the ledger has under way, and whether its disk keeps (faulty), by what is counted.
    pub ledger: IntGaugeVec,
    /// How it is with the store of the fleet, by what is counted.
    pub fleet: IntGaugeVec,
    /// Log records that were kept.
    pub log_records: IntCounter,
    /// Log records that were not: the queue or the disk was full, or their gateway is.
    pub log_records_dropped: IntCounter,
    /// Log records that went without their bodies, since too many bytes waited.
    pub log_bodies_dropped: IntCounter,
    /// Spans of calls by what became of them (sent, rejected, failed, dropped), each destination counted for itself.
    pub spans: IntCounterVec,
    /// What is kept of log records, by what is counted (records, bytes, segments).
    pub log_store: IntGaugeVec,
    /// Bytes of records that wait to be shipped.
    pub log_spool_bytes: IntGauge,
    /// Records that were not shipped and never will be, since the start.
    pub log_ship_lost: IntGauge,
    /// Records that wait to be shipped, by job.
    pub log_ship_waiting: IntGaugeVec,
    /// Records that were shipped since the start, by job.
    pub log_shipped: IntGaugeVec,
    /// Attempts to ship that failed since the start, by job.
    pub log_ship_failures: IntGaugeVec,
    /// Upstream connections that wait for a call.
    pub upstream_idle: IntGauge,
    /// Entries, bytes and open fills of the response cache, by what is counted.
    pub cache_state: IntGaugeVec,
    /// Answers looked for at, and sent to, the store of a fleet, by what became of them (hit, miss, failed, sent, dropped).
    pub cache_shared: IntCounterVec,
    /// State of breakers that are not closed, by provider: 1 open, 2 half-open.
    pub breakers: IntGaugeVec,

    /// Adapters in memory.
    pub adapters: IntGauge,
    /// Their bytes.
    pub adapter_bytes: IntGauge,
    /// Adapters opened, by outcome (`done`, `failed`).
    pub adapter_loads: IntCounterVec,
    /// Adapters that had to go for others or were deleted.
    pub adapter_evictions: IntCounter,

    /// Batches in line, being computed, and kept whole, by state (`queued`, `running`, `whole`).
    pub batches: IntGaugeVec,
    /// Requests of batches in line that nobody computes yet.
    pub batch_requests_waiting: IntGauge,
    /// Requests of batches in line that are being computed.
    pub batch_requests_running: IntGauge,
    /// Requests of batches in line whose response is on disk, by outcome (`done`, `failed`).
    pub batch_requests: IntCounterVec,

    engine: EngineVecs,
}

struct EngineVecs {
    queue: IntGaugeVec,
    running: IntGaugeVec,
    kv_total: IntGaugeVec,
    kv_used: IntGaugeVec,
    kv_cached: IntGaugeVec,
    spill_used: IntGaugeVec,
    spill_stored: IntCounterVec,
    spill_hits: IntCounterVec,
    spill_evicted: IntCounterVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    adapted_tokens: IntCounterVec,
    drafted_tokens: IntCounterVec,
    accepted_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    made_way: IntCounterVec,
    followed: IntCounterVec,
    requests: IntCounterVec,
    finished: IntCounterVec,
    cancelled: IntCounterVec,
    steps: IntCounterVec,
    step_time: HistogramVec,
    step_rows: HistogramVec,
    step_sequences: HistogramVec,
    queue_time: HistogramVec,
    ttft: HistogramVec,
    inter_token: HistogramVec,
    request_time: HistogramVec,
    grammar_compile_time: HistogramVec,
    grammar_hits: IntCounterVec,
    grammar_refused: IntCounterVec,
    mask_time: HistogramVec,
    mask_wait: HistogramVec,
    scribe_wait: HistogramVec,
    draft_time: HistogramVec,
    step_gap: HistogramVec,
    graph_steps: IntCounterVec,
    gpu_part: HistogramVec,
}

/// The series of one model on one device, resolved when the model is installed.
#[derive(Clone)]
pub struct EngineMetrics {
    /// Sequences waiting for their first step.
    pub queue: IntGauge,
    /// Sequences in the running batch.
    pub running: IntGauge,
    /// KV blocks of the pool.
    pub kv_total: IntGauge,
    /// KV blocks held by sequences.
    pub kv_used: IntGauge,
    /// KV blocks held by nobody but still good for a prefix hit.
    pub kv_cached: IntGauge,
    /// KV blocks kept outside the pool.
    pub spill_used: IntGauge,
    /// KV blocks copied out of the pool.
    pub spill_stored: IntCounter,
    /// KV blocks copied back for a prefix hit.
    pub spill_hits: IntCounter,
    /// KV blocks outside the pool that were given up for others.
    pub spill_evicted: IntCounter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: IntCounter,
    /// Prompt tokens found there.
    pub prefix_hits: IntCounter,
    /// Prompt tokens computed.
    pub prompt_tokens: IntCounter,
    /// Tokens produced.
    pub generation_tokens: IntCounter,
    /// Tokens computed with an adapter.
    pub adapted_tokens: IntCounter,
    /// Tokens guessed ahead and verified.
    pub drafted_tokens: IntCounter,
    /// Of those, tokens that came true.
    pub accepted_tokens: IntCounter,
    /// Sequences thrown out of the batch for want of KV, to be recomputed.
    pub preemptions: IntCounter,
    /// Sequences that made way for an account that had less of the batch, to be recomputed.
    pub made_way: IntCounter,
    /// Requests that waited for a running one to compute their common prefix.
    pub followed: IntCounter,
    /// Requests taken in.
    pub requests: IntCounter,
    /// Choices ended by the model or a stop string.
    pub finished_stop: IntCounter,
    /// Choices ended by `max_tokens` or the context window.
    pub finished_length: IntCounter,
    /// Requests whose receiver went away.
    pub cancelled: IntCounter,
    /// Steps computed.
    pub steps: IntCounter,
    /// Seconds a step took.
    pub step_time: Histogram,
    /// Rows (tokens) in a step.
    pub step_rows: Histogram,
    /// Sequences in a step.
    pub step_sequences: Histogram,
    /// Seconds from submission to the first step.
    pub queue_time: Histogram,
    /// Seconds from submission to the first token.
    pub ttft: Histogram,
    /// Seconds between two tokens of a choice.
    pub inter_token: Histogram,
    /// Seconds from submission to the end of the answer.
    pub request_time: Histogram,
    /// Seconds that a grammar took to compile.
    pub grammar_compile_time: Histogram,
    /// Requests whose grammar was compiled already.
    pub grammar_hits: IntCounter,
    /// Grammars that could not be used.
    pub grammar_refused: IntCounter,
    /// Seconds that one choice's masks took in a step.
    pub mask_time: Histogram,
    /// Seconds that a step waited for masks after its forward pass.
    pub mask_wait: Histogram,
    /// Seconds that a step waited until the answers' text of the one before was written, if it had to.
    pub scribe_wait: Histogram,
    /// Seconds that a draft model took of a step.
    pub draft_time: Histogram,
    /// Seconds of a step in which nothing was computed.
    pub step_gap: Histogram,
    /// Steps that a GPU was told of as a whole.
    pub graph_replayed: IntCounter,
    /// The same, before the tokens they begin with were known here.
    pub graph_ahead: IntCounter,
    /// Steps that it was told of launch by launch, to be told as a whole from then on.
    pub graph_noted: IntCounter,
    /// Steps that it was told of launch by launch, since no other is like them.
    pub graph_eager: IntCounter,
    /// Seconds of a step in products with weights.
    pub gpu_product: Histogram,
    /// Seconds of a step in attention.
    pub gpu_attention: Histogram,
    /// Seconds of a step in everything else.
    pub gpu_other: Histogram,
}

impl Metrics {
    /// Registers every series.
    ///
    /// # Panics
    /// If two series share a name, which the test below rules out.
    #[allow(clippy::expect_used)]
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = Registrar { registry: &registry };
        let by_engine = &["model", "device"];
        let metrics = Self {
            http_requests: r.striped_counters(
                "neurond_http_requests_total",
                "Requests by route, method and status.",
                &["route", "method", "status"],
            ),
            http_duration: r.striped_histograms(
                "neurond_http_request_seconds",
                "From the request's head to the end of its answer.",
                &["route"],
                LATENCY,
            ),
            http_in_flight: r.striped_gauge("neurond_http_in_flight", "Requests being answered."),
            http_connections: r.gauge("neurond_http_connections", "Connections open."),
            auth_failures: r
                .counter("neurond_auth_failures_total", "Requests refused for missing or wrong credentials."),
            neurons: r.counters(
                "neurond_micro_neurons_total",
                "Micro-neurons settled (1 neuron = 1,000,000).",
                &["model"],
            ),
            errors: r.counters("neurond_errors_total", "Errors told to callers, by kind.", &["kind"]),
            cancelled: r.counters(
                "neurond_cancelled_total",
                "Answers cut off because the client went away.",
                &["model"],
            ),
            tool_calls: r.counters("neurond_tool_calls_total", "Calls of tools that answers have begun.", &["model"]),
            model_ready: r.gauges("neurond_model_ready", "1 while a model is loaded and takes requests.", by_engine),
            swaps: r.counters("neurond_swaps_total", "Hot-swaps by outcome.", &["outcome"]),
            reloads: r.counters("neurond_config_reloads_total", "Configuration reloads by outcome.", &["outcome"]),
            engine_restarts: r.counters(
                "neurond_engine_restarts_total",
                "Engine threads started again after they died.",
                &["device"],
            ),
            gpu_memory: r.gauges(
                "neurond_gpu_memory_bytes",
                "Memory of a GPU: all of it (`total`) and what anybody has taken (`used`).",
                &["device", "kind"],
            ),
            gpu_clock: r.gauges(
                "neurond_gpu_clock_hertz",
                "Clocks of a GPU now: its multiprocessors' (`sm`) and its memory's (`memory`).",
                &["device", "clock"],
            ),
            gpu_power: r.numbers("neurond_gpu_power_watts", "What a GPU draws now.", &["device"]),
            gpu_temperature: r.gauges("neurond_gpu_temperature_celsius", "How warm a GPU is.", &["device"]),
            gpu_busy: r.numbers(
                "neurond_gpu_busy_ratio",
                "Share of the last moments in which some kernel ran on a GPU, as its driver counts.",
                &["device"],
            ),
            gpu_errors: r.gauges(
                "neurond_gpu_errors",
                "Errors of a GPU: of its memory, not corrected, since the driver was loaded (`ecc`), and critical ones since the daemon was started (`xid`).",
                &["device", "kind"],
            ),
            upstream_attempts: r.striped_counters(
                "neurond_upstream_attempts_total",
                "Attempts at upstreams, by provider and outcome (ok, or the class of failure).",
                &["provider", "outcome"],
            ),
            upstream_first_byte: r.striped_histograms(
                "neurond_upstream_first_byte_seconds",
                "From sending a request to an upstream to the head of its answer.",
                &["provider"],
                LATENCY,
            ),
            gateway_calls: r.striped_counters(
                "neurond_gateway_calls_total",
                "Calls through gateways, by how they ended (done, failed, cancelled, refused).",
                &["outcome"],
            ),
            gateway_in_flight: r.striped_gauge("neurond_gateway_in_flight", "Calls through gateways under way."),
            gateway_overhead: r.striped_histogram(
                "neurond_gateway_overhead_seconds",
                "What the gateway itself took of a call, from its head to the head of its answer: all but waiting for upstreams and between attempts.",
                OVERHEAD,
            ),
            gateway_cache: r.striped_counters(
                "neurond_gateway_cache_total",
                "Calls by what the response cache did: hit, coalesced (somebody asked the same at that moment), miss, off.",
                &["status"],
            ),
            gateway_retries: r.counters(
                "neurond_gateway_retries_total",
                "Attempts that repeat one that failed, by provider.",
                &["provider"],
            ),
            gateway_fallbacks: r.counters(
                "neurond_gateway_fallbacks_total",
                "Times another target was turned to because one failed, by the provider that was turned to.",
                &["provider"],
            ),
            gateway_findings: r.counters(
                "neurond_gateway_findings_total",
                "What rules of gateways found, by direction (REQUEST, RESPONSE) and action (FLAG, BLOCK).",
                &["check", "action"],
            ),
            upstream_tokens: r.striped_counters(
                "neurond_upstream_tokens_total",
                "Tokens that upstreams say they used, by provider and kind (prompt, cached, completion).",
                &["provider", "kind"],
            ),
            upstream_cost: r.striped_counters(
                "neurond_upstream_cost_micro_neurons_total",
                "Millionths of neurons that answers of upstreams cost by the price list, by provider; 1,000 neurons are 0.011 USD.",
                &["provider"],
            ),
            upstream_unpriced: r.striped_counters(
                "neurond_upstream_unpriced_total",
                "Answers of upstreams whose model has no price in the list, by provider.",
                &["provider"],
            ),
            refused_by_limits: r.counters(
                "neurond_refused_by_limits_total",
                "Calls refused by a limit, or without a look at it, by kind (rate, budget, allocation, ledger, fleet).",
                &["kind"],
            ),
            ledger: r.gauges(
                "neurond_ledger",
                "What the ledger has under way (open reservations, settlements queued for the disk), and whether its disk is faulty, by what is counted (open, queued, faulty, faults, refused, unmetered).",
                &["what"],
            ),
            fleet: r.gauges(
                "neurond_fleet",
                "How it is with the store that daemons share limits through: whether it answers (up), how often it was lost, leases, asks and their rounds, calls that waited for a lease, were refused without one or went on without the store (local), and milliseconds by which its clock differs, by what is counted (up, losses, leases, asks, rounds, waits, refused, local, clock_off_ms). Nothing without a fleet.",
                &["what"],
            ),
            log_records: r.counter("neurond_log_records_total", "Log records that were kept."),
            log_records_dropped: r.counter(
                "neurond_log_records_dropped_total",
                "Log records that were not kept: the queue or the disk was full, or their gateway is.",
            ),
            log_bodies_dropped: r.counter(
                "neurond_log_bodies_dropped_total",
                "Log records that went without their bodies, since too many bytes waited.",
            ),
            spans: r.counters(
                "neurond_spans_total",
                "Spans of calls by what became of them (sent, rejected, failed, dropped), each destination counted for itself.",
                &["outcome"],
            ),
            log_store: r.gauges(
                "neurond_log_store",
                "What is kept of log records, by what is counted (records, bytes, segments).",
                &["what"],
            ),
            log_spool_bytes: r.gauge("neurond_log_spool_bytes", "Bytes of records that wait to be shipped."),
            log_ship_lost: r.gauge(
                "neurond_log_ship_lost",
                "Records that were not shipped and never will be, since the start.",
            ),
            log_ship_waiting: r.gauges(
                "neurond_log_ship_waiting",
                "Records that wait to be shipped, by job.",
                &["job"],
            ),
            log_shipped: r.gauges("neurond_log_shipped", "Records that were shipped since the start, by job.", &["job"]),
            log_ship_failures: r.gauges(
                "neurond_log_ship_failures",
                "Attempts to ship that failed since the start, by job.",
                &["job"],
            ),
            upstream_idle: r.gauge("neurond_upstream_idle_connections", "Upstream connections that wait for a call."),
            cache_state: r.gauges(
                "neurond_cache",
                "The response cache: entries, memory_bytes, disk_bytes, fills and followers.",
                &["what"],
            ),
            cache_shared: r.counters(
                "neurond_cache_shared_total",
                "Cached answers that a fleet shares, by outcome: found at the store (hit), not found there (miss), sent to it (sent), asked or sent without success, or damaged (failed), not sent since too many wait or the store is gone (dropped).",
                &["outcome"],
            ),
            breakers: r.gauges(
                "neurond_breakers_open",
                "Targets that rest because they failed, by provider.",
                &["provider"],
            ),
            adapters: r.gauge("neurond_adapters_loaded", "LoRA adapters in memory."),
            adapter_bytes: r
                .gauge("neurond_adapter_bytes", "Memory that LoRA adapters take, estimated while one is opened."),
            adapter_loads: r.counters("neurond_adapter_loads_total", "LoRA adapters opened, by outcome.", &["outcome"]),
            adapter_evictions: r.counter(
                "neurond_adapter_evictions_total",
                "LoRA adapters that left memory for others, or because they were deleted.",
            ),
            batches: r.gauges(
                "neurond_batches",
                "Batches that were put in line, by state: waiting, being computed, or whole and kept for a day.",
                &["state"],
            ),
            batch_requests_waiting: r.gauge(
                "neurond_batch_requests_waiting",
                "Requests of batches in line that are not being computed yet.",
            ),
            batch_requests_running: r
                .gauge("neurond_batch_requests_running", "Requests of batches in line that are being computed."),
            batch_requests: r.counters(
                "neurond_batch_requests_total",
                "Requests of batches in line whose response is on disk, by outcome (done, failed).",
                &["outcome"],
            ),
            engine: EngineVecs {
                queue: r.gauges("neurond_queue_depth", "Sequences waiting for their first step.", by_engine),
                running: r.gauges("neurond_running", "Sequences in the running batch.", by_engine),
                kv_total: r.gauges("neurond_kv_blocks_total", "KV blocks of the pool.", by_engine),
                kv_used: r.gauges("neurond_kv_blocks_used", "KV blocks held by sequences.", by_engine),
                kv_cached: r.gauges(
                    "neurond_kv_blocks_cached",
                    "KV blocks held by no sequence but good for a prefix hit.",
                    by_engine,
                ),
                spill_used: r.gauges("neurond_spill_blocks", "KV blocks kept outside the pool.", by_engine),
                spill_stored: r.counters(
                    "neurond_spill_stored_total",
                    "KV blocks copied out of the pool when it needed the room.",
                    by_engine,
                ),
                spill_hits: r.counters(
                    "neurond_spill_hits_total",
                    "KV blocks copied back into the pool for a prefix hit.",
                    by_engine,
                ),
                spill_evicted: r.counters(
                    "neurond_spill_evicted_total",
                    "KV blocks outside the pool that were given up for others.",
                    by_engine,
                ),
                prefix_queries: r.counters(
                    "neurond_prefix_queried_tokens_total",
                    "Prompt tokens looked up in the prefix cache.",
                    by_engine,
                ),
                prefix_hits: r.counters(
                    "neurond_prefix_hit_tokens_total",
                    "Prompt tokens found in the prefix cache.",
                    by_engine,
                ),
                prompt_tokens: r.counters("neurond_prompt_tokens_total", "Prompt tokens computed.", by_engine),
                generation_tokens: r.counters("neurond_generation_tokens_total", "Tokens produced.", by_engine),
                adapted_tokens: r.counters(
                    "neurond_adapted_tokens_total",
                    "Tokens computed with a LoRA adapter, of prompts and of answers.",
                    by_engine,
                ),
                drafted_tokens: r.counters(
                    "neurond_spec_drafted_tokens_total",
                    "Tokens guessed ahead (speculative decoding) and verified.",
                    by_engine,
                ),
                accepted_tokens: r.counters(
                    "neurond_spec_accepted_tokens_total",
                    "Tokens guessed ahead that came true; by neurond_spec_drafted_tokens_total it is the acceptance rate.",
                    by_engine,
                ),
                preemptions: r.counters(
                    "neurond_preemptions_total",
                    "Sequences thrown out of the batch for want of KV, to be recomputed.",
                    by_engine,
                ),
                made_way: r.counters(
                    "neurond_made_way_total",
                    "Sequences that made way for an account with less of the batch, to be recomputed.",
                    by_engine,
                ),
                followed: r.counters(
                    "neurond_prefix_followed_total",
                    "Requests that waited for a running one to compute their common prefix.",
                    by_engine,
                ),
                requests: r.counters("neurond_engine_requests_total", "Requests taken in by the engine.", by_engine),
                finished: r.counters(
                    "neurond_finished_total",
                    "Choices that ended, by reason.",
                    &["model", "device", "reason"],
                ),
                cancelled: r.counters(
                    "neurond_engine_cancelled_total",
                    "Requests whose receiver went away.",
                    by_engine,
                ),
                steps: r.counters("neurond_steps_total", "Steps computed.", by_engine),
                step_time: r.histograms("neurond_step_seconds", "Time of a step.", by_engine, INTER_TOKEN),
                step_rows: r.histograms("neurond_step_rows", "Rows (tokens) computed in a step.", by_engine, ROWS),
                step_sequences: r.histograms("neurond_step_sequences", "Sequences in a step.", by_engine, ROWS),
                queue_time: r.histograms(
                    "neurond_queue_seconds",
                    "From submission to the first step.",
                    by_engine,
                    LATENCY,
                ),
                ttft: r.histograms(
                    "neurond_time_to_first_token_seconds",
                    "From submission to the first token.",
                    by_engine,
                    LATENCY,
                ),
                inter_token: r.histograms(
                    "neurond_inter_token_seconds",
                    "Between two tokens of a choice.",
                    by_engine,
                    INTER_TOKEN,
                ),
                request_time: r.histograms(
                    "neurond_engine_request_seconds",
                    "From submission to the end of the answer.",
                    by_engine,
                    LATENCY,
                ),
                grammar_compile_time: r.histograms(
                    "neurond_grammar_compile_seconds",
                    "Time to compile a grammar.",
                    by_engine,
                    LATENCY,
                ),
                grammar_hits: r.counters(
                    "neurond_grammar_cache_hits_total",
                    "Requests whose grammar was compiled already.",
                    by_engine,
                ),
                grammar_refused: r.counters(
                    "neurond_grammar_refused_total",
                    "Grammars that could not be used.",
                    by_engine,
                ),
                mask_time: r.histograms(
                    "neurond_grammar_mask_seconds",
                    "Time to find out which tokens a choice's grammar allows next.",
                    by_engine,
                    MASK,
                ),
                mask_wait: r.histograms(
                    "neurond_grammar_wait_seconds",
                    "How long a step waited for masks after its forward pass; they are computed beside it.",
                    by_engine,
                    MASK,
                ),
                scribe_wait: r.histograms(
                    "neurond_scribe_wait_seconds",
                    "How long a step waited for the text and events of the step before, where they were not written by the end of its forward pass.",
                    by_engine,
                    MASK,
                ),
                draft_time: r.histograms(
                    "neurond_draft_seconds",
                    "Time that the draft model took of a step, where it guessed or caught up.",
                    by_engine,
                    INTER_TOKEN,
                ),
                graph_steps: r.counters(
                    "neurond_gpu_graph_steps_total",
                    "Steps on a GPU: launched as a whole (`replayed`), the same before the tokens they begin with were known to the host (`ahead`), noted for that (`noted`), or launched piece by piece because of prompts or deep drafts (`eager`).",
                    &["model", "device", "launch"],
                ),
                gpu_part: r.histograms(
                    "neurond_gpu_part_seconds",
                    "What the time of a step on a GPU goes into (`product`, `attention`, `other`), of one step in 128.",
                    &["model", "device", "part"],
                    INTER_TOKEN,
                ),
                step_gap: r.histograms(
                    "neurond_step_gap_seconds",
                    "How much of a step the device waited: planning what could not be decided before the tokens of the step before were known, and delivery.",
                    by_engine,
                    MASK,
                ),
            },
            registry: registry.clone(),
        };
        let build = r.gauges("neurond_build_info", "Always 1; the version is in the label.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        metrics
    }

    /// The series of one model on one device.
    pub fn engine(&self, model: &ModelId, device: DeviceId) -> EngineMetrics {
        let v = &self.engine;
        let device = device.to_string();
        let l = &[model.as_str(), device.as_str()];
        EngineMetrics {
            queue: v.queue.with_label_values(l),
            running: v.running.with_label_values(l),
            kv_total: v.kv_total.with_label_values(l),
            kv_used: v.kv_used.with_label_values(l),
            kv_cached: v.kv_cached.with_label_values(l),
            spill_used: v.spill_used.with_label_values(l),
            spill_stored: v.spill_stored.with_label_values(l),
            spill_hits: v.spill_hits.with_label_values(l),
            spill_evicted: v.spill_evicted.with_label_values(l),
            prefix_queries: v.prefix_queries.with_label_values(l),
            prefix_hits: v.prefix_hits.with_label_values(l),
            prompt_tokens: v.prompt_tokens.with_label_values(l),
            generation_tokens: v.generation_tokens.with_label_values(l),
            adapted_tokens: v.adapted_tokens.with_label_values(l),
            drafted_tokens: v.drafted_tokens.with_label_values(l),
            accepted_tokens: v.accepted_tokens.with_label_values(l),
            preemptions: v.preemptions.with_label_values(l),
            made_way: v.made_way.with_label_values(l),
            followed: v.followed.with_label_values(l),
            requests: v.requests.with_label_values(l),
            finished_stop: v.finished.with_label_values(&[l[0], l[1], "stop"]),
            finished_length: v.finished.with_label_values(&[l[0], l[1], "length"]),
            cancelled: v.cancelled.with_label_values(l),
            steps: v.steps.with_label_values(l),
            step_time: v.step_time.with_label_values(l),
            step_rows: v.step_rows.with_label_values(l),
            step_sequences: v.step_sequences.with_label_values(l),
            queue_time: v.queue_time.with_label_values(l),
            ttft: v.ttft.with_label_values(l),
            inter_token: v.inter_token.with_label_values(l),
            request_time: v.request_time.with_label_values(l),
            grammar_compile_time: v.grammar_compile_time.with_label_values(l),
            grammar_hits: v.grammar_hits.with_label_values(l),
            grammar_refused: v.grammar_refused.with_label_values(l),
            mask_time: v.mask_time.with_label_values(l),
            mask_wait: v.mask_wait.with_label_values(l),
            scribe_wait: v.scribe_wait.with_label_values(l),
            draft_time: v.draft_time.with_label_values(l),
            step_gap: v.step_gap.with_label_values(l),
            graph_replayed: v.graph_steps.with_label_values(&[l[0], l[1], "replayed"]),
            graph_ahead: v.graph_steps.with_label_values(&[l[0], l[1], "ahead"]),
            graph_noted: v.graph_steps.with_label_values(&[l[0], l[1], "noted"]),
            graph_eager: v.graph_steps.with_label_values(&[l[0], l[1], "eager"]),
            gpu_product: v.gpu_part.with_label_values(&[l[0], l[1], "product"]),
            gpu_attention: v.gpu_part.with_label_values(&[l[0], l[1], "attention"]),
            gpu_other: v.gpu_part.with_label_values(&[l[0], l[1], "other"]),
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 * 1024);
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            tracing::error!(%error, "metrics could not be rendered");
        }
        out
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

struct Registrar<'a> {
    registry: &'a Registry,
}

#[allow(clippy::expect_used)]
impl Registrar<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: Result<C, prometheus::Error>) -> C {
        let collector = collector.expect("a well-formed series");
        self.registry.register(Box::new(collector.clone())).expect("a name used once");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn striped<C: Collector + Clone + 'static>(
        &self,
        make: impl Fn() -> Result<C, prometheus::Error> + Send + Sync + 'static,
    ) -> Striped<C> {
        self.add(Ok(Striped::new(move || make().expect("a well-formed series"))))
    }

    fn striped_counters(&self, name: &str, help: &str, labels: &'static [&'static str]) -> Striped<IntCounterVec> {
        let opts = Opts::new(name, help);
        self.striped(move || IntCounterVec::new(opts.clone(), labels))
    }

    fn striped_gauge(&self, name: &str, help: &str) -> Striped<IntGauge> {
        let opts = Opts::new(name, help);
        self.striped(move || IntGauge::with_opts(opts.clone()))
    }

    fn striped_histogram(&self, name: &str, help: &str, edges: &[f64]) -> Striped<Histogram> {
        let opts = HistogramOpts::new(name, help).buckets(edges.to_vec());
        self.striped(move || Histogram::with_opts(opts.clone()))
    }

    fn striped_histograms(
        &self,
        name: &str,
        help: &str,
        labels: &'static [&'static str],
        edges: &[f64],
    ) -> Striped<HistogramVec> {
        let opts = HistogramOpts::new(name, help).buckets(edges.to_vec());
        self.striped(move || HistogramVec::new(opts.clone(), labels))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn numbers(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], edges: &[f64]) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(edges.to_vec()), labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_registers_once_and_renders() {
        let metrics = Metrics::new();
        metrics.engine(&ModelId::new("m"), DeviceId(0)).steps.inc();
        let text = String::from_utf8(metrics.render()).unwrap();
        assert!(text.contains(r#"neurond_steps_total{device="0",model="m"} 1"#), "{text}");
        assert!(text.contains("neurond_build_info"));
    }
}
