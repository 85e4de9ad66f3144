//! From what was written to what is used: defaults that depend on the machine, paths, hashes, names; and every check.
//!
//! Pure: the machine, the clock, the environment and the file system come in as [`Surroundings`]. All mistakes are
//! collected, so that an operator reads them in one go and not one a run.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::catalog::{Block, Builder, Catalog, is_unpinned};
use super::check::{Check, state};
use super::file::{
    AccountSection, CacheSection, EngineSection, File, GpuSection, LogSection, LoraSection, ModelSection,
    ServerSection, TokenSection, UpstreamSection,
};
use super::gateway;
use super::machine::Surroundings;
use super::metering;
use super::records;
use super::value::{ByteSize, Written};
use super::{
    Account, Auth, Binding, Cache, Config, Draft, Engine, Gpu, Log, Lora, Model, OnGpu, Overrides, Packing, Precision,
    Price, PromptKernel, Scopes, Server, Spill, Token, Upstream,
};
use super::{simulated, synthetic};
use crate::base::{Error, KeyId, Millis, Result};
use crate::task::Task;

/// Bounds of the KV pool that is chosen for a model.
const KV_POOL: (u64, u64) = (64 << 20, 2 << 30);
/// Most tokens guessed ahead.
const MOST_DRAFTS: usize = 64;
/// Most ranks of a model: more than any has heads to divide.
const MOST_RANKS: usize = 256;
/// Price of a model that only the command line names: as a small model of the catalog.
const STAND_IN: (u64, u64) = (2457, 18252);

/// Makes a [`Config`] of a file (`origin`; `None` for the built-in one) and what the command line says over it.
pub(super) fn resolve(
    origin: Option<&Path>,
    mut file: File,
    overrides: &Overrides,
    machine: &Surroundings,
) -> Result<Config> {
    let mut check = Check::new(origin, overrides);
    let folder = origin.and_then(Path::parent).unwrap_or(Path::new(""));

    apply(overrides, &mut file);
    let catalog = catalog(&mut check, &mut file, overrides, folder, machine);
    let server = server(&mut check, &file.server, machine);
    let binding = file.binding.as_ref().map(|section| Binding {
        listen: check.address("binding.listen", &section.listen),
        account: check.account("binding.account", &section.account),
    });
    let auth = auth(&mut check, &file, folder, machine);
    let engine = engine(&mut check, &file.engine, machine);
    let gpu = gpu(&mut check, &file.gpu, folder, machine);
    let batches = match (&file.batch.folder, (machine.variable)("STATE_DIRECTORY")) {
        (Some(written), _) => Some(folder.join(written)),
        // systemd lists several with colons between them; the unit has one.
        (None, Some(state)) => state.split(':').next().map(|state| Path::new(state).join("batches")),
        (None, None) => None,
    };
    let written = metering::Sections {
        plan: &file.plan,
        limits: &file.limits,
        rules: &file.limit,
        prices: &file.prices,
        ledger: &file.ledger,
        fleet: &file.fleet,
    };
    let metering = metering::resolve(&mut check, &written, folder, machine);
    let written = records::Sections {
        logs: &file.logs,
        redact: &file.redact,
        ship: &file.ship,
        analytics: &file.analytics,
        alerts: &file.alerts,
        rules: &file.alert,
        channels: &file.channel,
    };
    let records = records::resolve(&mut check, &written, folder, machine);
    let accounts = accounts(&mut check, &file.account);
    let models = models(&mut check, &file.model, &catalog, engine.threads, file.gpu.prompt_kernel, folder, machine);
    let lora = lora(&mut check, &file.lora, folder, machine);
    let told = gateways(&mut check, &file, origin, folder, machine);
    let upstream = upstream(&mut check, &file.upstream, folder, machine);
    let cache = cache(&mut check, &file.cache, folder, machine);
    let log = log(&mut check, &file.log);

    if let Some(binding) = binding.as_ref().filter(|b| b.listen == server.listen && b.listen.port() != 0) {
        check.wrong("binding.listen", binding.listen, "is server.listen as well; give each its own port");
    }
    if !file.auth.allow_anonymous_remote {
        let remedy = "serves callers without a token to the network; bind it to 127.0.0.1, take it out, or set \
                      auth.allow_anonymous_remote = true if the network is yours alone";
        if let Some(account) = auth.anonymous.as_ref().filter(|_| !server.listen.ip().is_loopback()) {
            check.wrong("auth.anonymous", format_args!("{:?} on {}", account.as_str(), server.listen), remedy);
        }
        if let Some(binding) = binding.as_ref().filter(|b| !b.listen.ip().is_loopback()) {
            check.wrong("binding.listen", binding.listen, remedy);
        }
    }
    if auth.anonymous.is_none() && auth.tokens.is_empty() && binding.is_none() {
        check.warn("auth: no token and no anonymous account: every call will be refused; add [[auth.token]]");
    }
    if models.is_empty() {
        check.warn("model: none: nothing will be served; add [[model]], or --model ID=PATH");
    }
    if engine.draft_tokens == 0 {
        for model in models.iter().filter(|model| model.draft.is_some()) {
            check.warn(format!("model {}: draft: is never asked, since engine.draft_tokens is 0", model.id));
        }
    }
    if let Some(long) = (engine.step_tokens < engine.max_running).then_some(engine.max_running) {
        let remedy = format!("is more than engine.step_tokens = {}; raise that, or lower this", engine.step_tokens);
        check.wrong("engine.max_running", long, &remedy);
    }

    let Check { problems, mut warnings, .. } = check;
    if !problems.is_empty() {
        return Err(Error::bad_input(problems.join("\n")));
    }
    for planned in catalog.deprecations(machine.now) {
        if models.iter().any(|model| model.id == planned.id) {
            warnings.push(planned.to_string());
        }
    }
    let origin = origin.map(Path::to_path_buf);
    Ok(Config {
        server,
        binding,
        auth,
        engine,
        gpu,
        batches,
        accounts,
        metering,
        records,
        models,
        lora,
        fixed: told.fixed,
        key_files: told.keys,
        registry: told.registry,
        upstream,
        cache,
        catalog,
        log,
        origin,
        warnings,
    })
}

/// The command line wins; its models follow in [`catalog`], once aliases are known.
fn apply(overrides: &Overrides, file: &mut File) {
    let Overrides { listen, anonymous, models: _, threads, log_filter, log_format } = overrides;
    if let Some(listen) = listen {
        file.server.listen = listen.clone();
    }
    if anonymous.is_some() {
        file.auth.anonymous = anonymous.clone();
    }
    if threads.is_some() {
        file.engine.threads = *threads;
    }
    if let Some(filter) = log_filter {
        file.log.filter = filter.clone();
    }
    if let Some(format) = log_format {
        file.log.format = *format;
    }
}

fn server(check: &mut Check, section: &ServerSection, machine: &Surroundings) -> Server {
    let workers = section.workers.unwrap_or_else(|| (machine.cpus / 4).clamp(2, 16));
    let max_body_bytes = usize::try_from(section.max_body_bytes.0).unwrap_or(usize::MAX);
    check.at_least_one("server.workers", workers);
    check.at_least_one("server.max_body_bytes", max_body_bytes);
    check.at_least_one("server.max_connections", section.max_connections);
    if workers > 1024 {
        check.wrong("server.workers", workers, "is more than 1024; a few are enough, leave it out for the default");
    }
    Server {
        listen: check.address("server.listen", &section.listen),
        workers,
        max_body_bytes,
        max_connections: section.max_connections,
        read_timeout: check.timeout("server.read_timeout_ms", section.read_timeout_ms),
        write_timeout: check.timeout("server.write_timeout_ms", section.write_timeout_ms),
        request_timeout: check.timeout("server.request_timeout_ms", section.request_timeout_ms),
        drain_timeout: check.timeout("server.drain_timeout_ms", section.drain_timeout_ms),
    }
}

fn engine(check: &mut Check, section: &EngineSection, machine: &Surroundings) -> Engine {
    let threads = section.threads.unwrap_or(machine.cores);
    for (key, value) in [
        ("engine.threads", threads),
        ("engine.step_tokens", section.step_tokens),
        ("engine.prefill_chunk", section.prefill_chunk),
        ("engine.max_running", section.max_running),
        ("engine.max_queue", section.max_queue),
    ] {
        check.at_least_one(key, value);
    }
    if threads > 4096 {
        check.wrong("engine.threads", threads, "is more than 4096; leave it out to use every core");
    } else if threads > machine.cpus {
        check.warn(format!(
            "engine.threads = {threads}: this process may use {} CPUs; more threads than that slow each other down",
            machine.cpus
        ));
    }
    if section.prefill_chunk > section.step_tokens {
        let remedy = format!("is more than engine.step_tokens = {}; lower it", section.step_tokens);
        check.wrong("engine.prefill_chunk", section.prefill_chunk, &remedy);
    }
    if section.step_tokens > 1 << 20 {
        check.wrong("engine.step_tokens", section.step_tokens, "is more than 1048576; lower it");
    }
    if section.draft_tokens > MOST_DRAFTS {
        let remedy = format!("is more than {MOST_DRAFTS}, and guesses that deep are hardly ever right; lower it");
        check.wrong("engine.draft_tokens", section.draft_tokens, &remedy);
    }
    if !section.block_tokens.is_power_of_two() || !(4..=256).contains(&section.block_tokens) {
        check.wrong(
            "engine.block_tokens",
            section.block_tokens,
            "is not a power of two from 4 to 256; 16 is the default",
        );
    }
    let stretch = section.prefill_stretch;
    if stretch != 0.0 && !(1.0..=1000.0).contains(&stretch) {
        let remedy = "is neither 0 nor from 1 to 1000; 1.3 is the default, 0 sets no bound";
        check.wrong("engine.prefill_stretch", stretch, remedy);
    }
    Engine {
        threads,
        step_tokens: section.step_tokens,
        prefill_chunk: section.prefill_chunk,
        max_running: section.max_running,
        max_queue: section.max_queue,
        block_tokens: section.block_tokens,
        prefix_cache: section.prefix_cache,
        prefill_stretch: stretch,
        draft_tokens: section.draft_tokens,
        prompt_lookup: section.prompt_lookup,
    }
}

fn gpu(check: &mut Check, section: &GpuSection, folder: &Path, machine: &Surroundings) -> Gpu {
    let threads = section.threads.unwrap_or_else(|| (machine.cores / 4).clamp(1, 8));
    for (key, value) in [
        ("gpu.threads", threads),
        ("gpu.step_tokens", section.step_tokens),
        ("gpu.prefill_chunk", section.prefill_chunk),
        ("gpu.max_running", section.max_running),
    ] {
        check.at_least_one(key, value);
    }
    if threads > 4096 {
        check.wrong("gpu.threads", threads, "is more than 4096; leave it out for the default");
    }
    if section.prefill_chunk > section.step_tokens {
        let remedy = format!("is more than gpu.step_tokens = {}; lower it", section.step_tokens);
        check.wrong("gpu.prefill_chunk", section.prefill_chunk, &remedy);
    }
    if section.step_tokens < section.max_running {
        let remedy = format!("is more than gpu.step_tokens = {}; raise that, or lower this", section.step_tokens);
        check.wrong("gpu.max_running", section.max_running, &remedy);
    }
    if section.step_tokens > 1 << 20 {
        check.wrong("gpu.step_tokens", section.step_tokens, "is more than 1048576; lower it");
    }
    let share = section.memory_share;
    if !(share > 0.0 && share <= 1.0) {
        check.wrong("gpu.memory_share", share, "is not above 0 and at most 1; 0.9 is the default");
    }
    check.unlike("gpu.devices", section.devices.as_deref());
    Gpu {
        devices: section.devices.clone(),
        library_folders: section.library_folders.iter().map(|path| folder.join(path)).collect(),
        memory_share: share,
        threads,
        step_tokens: section.step_tokens,
        prefill_chunk: section.prefill_chunk,
        max_running: section.max_running,
    }
}

fn accounts(check: &mut Check, sections: &[AccountSection]) -> Vec<Account> {
    let mut accounts: Vec<Account> = Vec::new();
    for (index, section) in sections.iter().enumerate() {
        let key = format!("account[{index}]");
        let id = check.account(&format!("{key}.id"), &section.id);
        if accounts.iter().any(|other| other.id == id) {
            check.wrong(&format!("{key}.id"), format_args!("{:?}", section.id), "is written twice; keep one of them");
        }
        let (weight, priority) = (section.weight.unwrap_or(1), section.priority.unwrap_or(0));
        if !(1..=1000).contains(&weight) {
            check.wrong(&format!("{key}.weight"), weight, "is not from 1 to 1000; 1 is the default");
        }
        if !(-100..=100).contains(&priority) {
            check.wrong(&format!("{key}.priority"), priority, "is not from -100 to 100; 0 is the default");
        }
        let plan = section.plan.as_ref().map(|plan| metering::plan(check, &format!("{key}.plan"), plan));
        accounts.push(Account { id, weight, priority, plan });
    }
    accounts
}

fn lora(check: &mut Check, section: &LoraSection, folder: &Path, machine: &Surroundings) -> Lora {
    for (key, bytes) in [("lora.max_file_bytes", section.max_file_bytes), ("lora.cache_bytes", section.cache_bytes)] {
        if bytes.0 < 1 << 20 {
            check.wrong(key, bytes, "is less than 1MiB, too little for any adapter; leave it out for the default");
        }
    }
    check.at_least_one("lora.max_adapters", section.max_adapters);
    Lora {
        path: section.path.as_ref().map(|path| folder.join(path)).or_else(|| state(machine, "adapters")),
        max_file_bytes: section.max_file_bytes.0,
        max_adapters: section.max_adapters,
        cache_bytes: section.cache_bytes.0,
        public_account: section.public_account.as_ref().map(|account| check.account("lora.public_account", account)),
    }
}

/// What the file says of gateways and providers.
fn gateways(
    check: &mut Check,
    file: &File,
    origin: Option<&Path>,
    folder: &Path,
    machine: &Surroundings,
) -> gateway::Resolved {
    let written = gateway::Sections {
        gateway: &file.gateway,
        provider: &file.provider,
        vault: &file.vault,
        registry: &file.registry,
    };
    let origin = origin.map_or_else(|| "built-in defaults".to_owned(), |path| path.display().to_string());
    let mut told = gateway::resolve(&written, &origin, folder, machine);
    check.problems.append(&mut told.problems);
    told.warnings.drain(..).for_each(|warning| check.warn(warning));
    told
}

fn upstream(check: &mut Check, section: &UpstreamSection, folder: &Path, machine: &Surroundings) -> Upstream {
    let mut time = |key: &str, ms: u64| {
        if ms == 0 {
            check.wrong(key, ms, "would end every call at once; write at least 1");
        }
        Duration::from_millis(ms)
    };
    let connect_timeout = time("upstream.connect_timeout_ms", section.connect_timeout_ms);
    let first_byte_timeout = time("upstream.first_byte_timeout_ms", section.first_byte_timeout_ms);
    let idle_timeout = time("upstream.idle_timeout_ms", section.idle_timeout_ms);
    let total_timeout = time("upstream.total_timeout_ms", section.total_timeout_ms);
    if let Some(proxy) = &section.proxy {
        let port =
            proxy.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok())?);
        if port.is_none() || proxy.contains('/') {
            check.wrong(
                "upstream.proxy",
                format_args!("{proxy:?}"),
                "is not HOST:PORT, such as \"proxy.internal:3128\"",
            );
        }
    }
    let authorities = section.ca_file.as_ref().and_then(|path| {
        let path = folder.join(path);
        match (machine.text)(&path) {
            Ok(text) if text.contains("-----BEGIN CERTIFICATE-----") => Some(text),
            Ok(_) => {
                check.wrong("upstream.ca_file", path.display(), "holds no certificate; it must be a PEM file");
                None
            }
            Err(error) => {
                check.wrong("upstream.ca_file", path.display(), &format!("cannot be read: {error}"));
                None
            }
        }
    });
    let max_answer_bytes = usize::try_from(section.max_answer_bytes.0).unwrap_or(usize::MAX);
    check.at_least_one("upstream.max_answer_bytes", max_answer_bytes);
    Upstream {
        connect_timeout,
        first_byte_timeout,
        idle_timeout,
        total_timeout,
        max_retry_after: Duration::from_millis(section.max_retry_after_ms),
        allow_private: section.allow_private,
        proxy: section.proxy.clone(),
        authorities,
        max_answer_bytes,
    }
}

fn cache(check: &mut Check, section: &CacheSection, folder: &Path, machine: &Surroundings) -> Cache {
    for (key, bytes) in
        [("cache.memory_bytes", section.memory_bytes), ("cache.max_entry_bytes", section.max_entry_bytes)]
    {
        if bytes.0 == 0 {
            check.wrong(key, 0, "leaves room for no answer; write at least some MiB");
        }
    }
    check.at_least_one("cache.max_entries", section.max_entries);
    Cache {
        memory_bytes: section.memory_bytes.0,
        disk_bytes: section.disk_bytes.0,
        max_entries: section.max_entries,
        max_entry_bytes: section.max_entry_bytes.0,
        folder: section.folder.as_ref().map(|path| folder.join(path)).or_else(|| state(machine, "cache")),
    }
}

fn log(check: &mut Check, section: &LogSection) -> Log {
    if let Err(error) = tracing_subscriber::EnvFilter::try_new(&section.filter) {
        let remedy = format!("is not a log filter ({error}); write info, debug, or neurond=debug,warn");
        check.wrong("log.filter", format_args!("{:?}", section.filter), &remedy);
    }
    Log { filter: section.filter.clone(), format: section.format }
}

fn auth(check: &mut Check, file: &File, folder: &Path, machine: &Surroundings) -> Auth {
    let section = &file.auth;
    let anonymous = section.anonymous.as_ref().map(|account| check.account("auth.anonymous", account));
    let mut tokens = Vec::new();
    for (index, written) in section.token.iter().enumerate() {
        token(check, &format!("auth.token[{index}]"), written, machine, &mut tokens);
    }
    if let Some(path) = &section.token_file {
        for (key, written) in token_file(check, path, folder, machine) {
            token(check, &key, &written, machine, &mut tokens);
        }
    }
    Auth { anonymous, tokens }
}

/// `[[token]]` blocks of a file of their own.
fn token_file(check: &mut Check, path: &Path, folder: &Path, machine: &Surroundings) -> Vec<(String, TokenSection)> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct TokenFile {
        #[serde(default)]
        token: Vec<TokenSection>,
    }
    let credentials = path.strip_prefix("$CREDENTIALS_DIRECTORY").ok();
    let path = match (credentials, (machine.variable)("CREDENTIALS_DIRECTORY")) {
        (Some(rest), Some(directory)) => Path::new(&directory).join(rest),
        (Some(_), None) => {
            let remedy = "needs CREDENTIALS_DIRECTORY, which systemd sets for units with LoadCredential=; \
                          write a path to use it elsewhere";
            check.wrong("auth.token_file", path.display(), remedy);
            return Vec::new();
        }
        (None, _) => folder.join(path),
    };
    let text = match (machine.text)(&path) {
        Ok(text) => text,
        Err(error) => {
            let remedy =
                format!("cannot be read ({error}); create it, make it readable for the daemon, or take the key out");
            check.wrong("auth.token_file", path.display(), &remedy);
            return Vec::new();
        }
    };
    match toml::from_str::<TokenFile>(&text) {
        Ok(file) => {
            let key = |index| format!("{}: token[{index}]", path.display());
            file.token.into_iter().enumerate().map(|(index, token)| (key(index), token)).collect()
        }
        Err(error) => {
            check.problems.push(format!("{}: {error}", path.display()));
            Vec::new()
        }
    }
}

fn token(check: &mut Check, key: &str, written: &TokenSection, machine: &Surroundings, tokens: &mut Vec<Token>) {
    let named = format!("{key} ({})", written.id);
    let Some(sha256) = token_hash(check, &named, written, machine) else { return };
    if written.id.is_empty() || !written.id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        let remedy = "is not a name; use letters, digits and - _ . since it appears in logs";
        check.wrong(&format!("{key}.id"), format_args!("{:?}", written.id), remedy);
    }
    if tokens.iter().any(|other| other.id.as_str() == written.id) {
        check.wrong(
            &format!("{key}.id"),
            format_args!("{:?}", written.id),
            "is written twice; give each token its own",
        );
    }
    if let Some(other) = tokens.iter().find(|other| other.sha256 == sha256) {
        let remedy = format!("is the same token as {}; keep one of them", other.id);
        check.problems.push(format!("{}: {named}: {remedy}", check.origin));
    }
    let expires = written.expires.as_ref().and_then(|moment| {
        let end = end_of(moment);
        if end.is_none() {
            let remedy = "is not a date or a time with offset; write 2027-12-31, or 2027-12-31T12:00:00Z";
            check.wrong(&format!("{named}.expires"), moment, remedy);
        }
        end
    });
    if expires.is_some_and(|expires| expires <= machine.now) {
        check.warn(format!(
            "{named}: expired on {}: it is refused; take it out, or issue a new one",
            Shown(&written.expires)
        ));
    }
    let account = check.account(&format!("{named}.account"), &written.account);
    let scopes = match written.scopes.as_ref().map(|words| Scopes::parse(words.iter().map(String::as_str))) {
        None => Scopes::ALL,
        Some(Ok(scopes)) => scopes,
        Some(Err(word)) => {
            let remedy = "is no scope; write \"run\", \"gateway\", \"gateway:NAME\" or \"admin\"";
            check.wrong(&format!("{key}.scopes"), format_args!("{word:?}"), remedy);
            Scopes::ALL
        }
    };
    let budget = written.budget.unwrap_or_default();
    let budget = metering::budget(check, &format!("{named}.budget"), &budget);
    let (id, any_account) = (KeyId::new(&written.id), written.any_account);
    tokens.push(Token { id, sha256, account, any_account, scopes, expires, budget });
}

/// The hash, written or made of an environment variable's value.
fn token_hash(check: &mut Check, key: &str, written: &TokenSection, machine: &Surroundings) -> Option<[u8; 32]> {
    match (&written.sha256, &written.env) {
        (Some(text), None) => {
            let hash = hex32(text);
            if hash.is_none() {
                let remedy = "is not 64 hex digits; make it with: printf %s \"$TOKEN\" | sha256sum";
                // Somebody may have written the token itself here: never echo it.
                check.wrong(&format!("{key}.sha256"), format_args!("({} characters)", text.chars().count()), remedy);
            }
            hash
        }
        (None, Some(name)) => {
            let Some(value) = (machine.variable)(name).filter(|value| !value.is_empty()) else {
                let remedy = "is not set in the environment; set it, or write sha256 instead";
                check.wrong(&format!("{key}.env"), format_args!("{name:?}"), remedy);
                return None;
            };
            if value.trim() != value {
                let remedy = "has white space around its value, which no client will send; set it without";
                check.wrong(&format!("{key}.env"), format_args!("{name:?}"), remedy);
            }
            if value.len() < 16 {
                check.warn(format!("{key}: the token in {name} is {} characters long: it can be guessed", value.len()));
            }
            Some(Sha256::digest(value.as_bytes()).into())
        }
        (None, None) => {
            check.problems.push(format!("{}: {key}: has neither sha256 nor env; write one of them", check.origin));
            None
        }
        (Some(_), Some(_)) => {
            check.problems.push(format!("{}: {key}: has both sha256 and env; keep one of them", check.origin));
            None
        }
    }
}

/// The catalog in force: built in, changed by `[catalog] path`, changed by the entries of models. On the way ids of models become
/// catalog ids, and the command line's models join the file's.
fn catalog(
    check: &mut Check,
    file: &mut File,
    overrides: &Overrides,
    folder: &Path,
    machine: &Surroundings,
) -> Arc<Catalog> {
    let mut builder = Builder::builtin();
    if let Some(path) = file.catalog.path.as_ref().map(|path| folder.join(path)) {
        let read = (machine.text)(&path).map_err(|error| {
            let remedy = "correct it, or take it out";
            format!("{}: catalog.path = {}: cannot be read ({error}); {remedy}", check.origin, path.display())
        });
        if let Err(problem) = read.and_then(|text| builder.read(&text, &path.display().to_string())) {
            check.problems.push(problem);
        }
    }
    // Aliases are known once a catalog stands; the entries of models belong to the ids that those stand for.
    let known = match builder.clone().build() {
        Ok(known) => known,
        Err(problems) => {
            check.problems.extend(problems);
            return Catalog::builtin();
        }
    };
    let pinned = |name: &str| known.resolve(name).map_or(name.to_owned(), |entry| entry.id.as_str().to_owned());
    for model in &mut file.model {
        model.id = pinned(&model.id);
    }
    for (name, path) in &overrides.models {
        let id = pinned(name);
        // The working directory counts here, not the folder of the file.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        if let Some(model) = file.model.iter_mut().find(|model| model.id == id) {
            model.path = path;
            continue;
        }
        let mut entry = None;
        if known.resolve(&id).is_none() && !is_unpinned(&id) {
            let (input, output) = STAND_IN;
            check.warn(format!(
                "{id} is not in the catalog: it answers as a text-generation model at a stand-in price of {input} neurons per \
                 million tokens in and {output} out; give it an entry in the configuration file"
            ));
            let (context, price) = (Some(131_072), Some(Price::tokens(input, output)));
            entry = Some(Block { context, price, ..Block::default() });
        }
        file.model.push(ModelSection::new(id, path, entry));
    }
    for model in &mut file.model {
        let Some(block) = model.entry.take() else { continue };
        if !block.id.is_empty() {
            let remedy = format!("belongs above, in the [[model]] block; take it out of the entry of {}", model.id);
            check.wrong("model.entry.id", format_args!("{:?}", block.id), &remedy);
            continue;
        }
        builder.add(Block { id: model.id.clone(), ..block }, &format!("{}: model.entry", check.origin));
    }
    match builder.build() {
        Ok(catalog) => Arc::new(catalog),
        Err(problems) => {
            check.problems.extend(problems);
            Arc::new(known)
        }
    }
}

fn models(
    check: &mut Check,
    sections: &[ModelSection],
    catalog: &Catalog,
    threads: usize,
    prompt_kernel: PromptKernel,
    folder: &Path,
    machine: &Surroundings,
) -> Vec<Model> {
    // Not divided by the number of models: one more would change the pool of all others, and a reload would swap them.
    let usual = (machine.memory / 8).clamp(KV_POOL.0, KV_POOL.1) >> 20 << 20;
    let mut models: Vec<Model> = Vec::new();
    for section in sections {
        let key = |name: &str| format!("model {}: {name}", section.id);
        if is_unpinned(&section.id) {
            let remedy = "moves with time; name one version, so that answers and prices stay what they were";
            check.wrong("model.id", format_args!("{:?}", section.id), remedy);
            continue;
        }
        let Some(entry) = catalog.resolve(&section.id) else {
            let near = catalog
                .nearest(&section.id)
                .map(|near| format!("did you mean {near:?}? Otherwise "))
                .unwrap_or_default();
            let remedy = format!(
                "is not in the catalog; {near}give it an entry of its own: \
                 entry = {{ context = 8192, price = {{ input = 300, output = 2000 }} }}"
            );
            check.wrong("model.id", format_args!("{:?}", section.id), &remedy);
            continue;
        };
        if models.iter().any(|other| other.id == entry.id) {
            check.wrong("model.id", format_args!("{:?}", section.id), "is loaded twice; keep one of the blocks");
            continue;
        }
        let mut modified = |name: &str, path: &Path| match (machine.modified)(path) {
            Ok(modified) => Some(modified),
            Err(_) if simulated(path).is_some() || synthetic(path).is_some() => None,
            Err(error) => {
                let remedy = format!("cannot be read ({error}); correct it, or fetch the model with neurond pull");
                check.wrong(&key(name), path.display(), &remedy);
                None
            }
        };
        let path = folder.join(&section.path);
        let draft = section.draft.as_ref().map(|draft| folder.join(draft));
        let draft = draft.map(|path| Draft { modified: modified("draft", &path), path });
        let modified = modified("path", &path);
        let kv_bytes = section.kv_bytes.unwrap_or(ByteSize(usual));
        if kv_bytes.0 < 1 << 20 {
            check.wrong(
                &key("kv_bytes"),
                kv_bytes,
                "is less than 1MiB, too little for any sequence; 512MiB is a good start",
            );
        }
        if section.context == Some(0) {
            check.wrong(&key("context"), 0, "allows nothing; write at least 1, or leave it out");
        }
        let ranks = section.tensor_parallel.unwrap_or(1);
        let wrong = if !(1..=MOST_RANKS).contains(&ranks) {
            Some(format!("is not from 1 to {MOST_RANKS}; 1, the default, divides nothing"))
        } else if ranks > 1 && entry.task != Task::TextGeneration {
            Some(format!("divides models for text generation only, and this one is for {}; write 1", entry.task.name()))
        } else if ranks > 1 && simulated(&path).is_some() {
            Some("divides nothing on a simulated device; write 1".to_owned())
        } else {
            None
        };
        if let Some(remedy) = &wrong {
            check.wrong(&key("tensor_parallel"), ranks, remedy);
        } else if ranks > threads && section.gpus.as_ref().is_none_or(Vec::is_empty) {
            check.warn(format!(
                "{} = {ranks}: is more than engine.threads = {threads}: on the CPU each rank takes a thread, and they slow each other down",
                key("tensor_parallel")
            ));
        }
        check.unlike(&key("gpus"), section.gpus.as_deref());
        if let Some(gpus) = section.gpus.as_ref().filter(|gpus| !gpus.is_empty()) {
            let other = format!(
                "tensor_parallel = {ranks} takes as many GPUs, one a rank; name {ranks} of them, or leave gpus out"
            );
            let wrong = match () {
                () if entry.task != Task::TextGeneration && !entry.task.encodes() => {
                    "GPUs serve models that write, embed or classify text; take it out"
                }
                () if simulated(&path).is_some() => "a simulated device needs none; take it out",
                () if ranks > 1 && gpus.len() != ranks => other.as_str(),
                () if section.precision == Precision::Plain => {
                    "precision = \"plain\" is the CPU's; take one of them out"
                }
                () => "",
            };
            if !wrong.is_empty() {
                check.wrong(&key("gpus"), format_args!("{gpus:?}"), wrong);
            }
        }
        if let Some(packing) = section.gpu_weights.filter(|&packing| packing != Packing::Bf16 && entry.task.encodes()) {
            let remedy = "models that embed or classify are kept in bf16; take it out";
            check.wrong(&key("gpu_weights"), format_args!("{packing:?}").to_string().to_lowercase(), remedy);
        }
        let says = |words: &[&str]| entry.id.as_str().split('-').any(|part| words.contains(&part));
        let packing = match () {
            () if entry.task.encodes() => Packing::Bf16,
            () if says(&["fp8"]) => Packing::Fp8,
            () if says(&["awq", "int4"]) => Packing::Q4,
            () => Packing::Bf16,
        };
        let spill = section.spill_bytes.map(|bytes| Spill {
            bytes: usize::try_from(bytes.0).unwrap_or(usize::MAX),
            folder: section.spill_folder.as_ref().map(|path| folder.join(path)),
        });
        if let (None, Some(path)) = (&spill, &section.spill_folder) {
            check.wrong(
                &key("spill_folder"),
                path.display(),
                "says where, but not how much: write spill_bytes as well",
            );
        }
        models.push(Model {
            id: entry.id.clone(),
            task: entry.task,
            path,
            precision: section.precision,
            kv: section.kv,
            kv_bytes: usize::try_from(kv_bytes.0).unwrap_or(usize::MAX),
            spill,
            draft,
            tensor_parallel: ranks,
            on_gpu: OnGpu {
                gpus: section.gpus.clone(),
                weights: section.gpu_weights.unwrap_or(packing),
                kv: section.gpu_kv,
                kv_bytes: section.kv_bytes.map(|bytes| usize::try_from(bytes.0).unwrap_or(usize::MAX)),
                prompt_kernel,
            },
            context: section.context.unwrap_or(u32::MAX).min(entry.context),
            modified,
        });
    }
    models
}

/// The last moment of a date, or the moment itself.
fn end_of(moment: &Written) -> Option<Millis> {
    let text = moment.to_string();
    let end = match text.parse::<jiff::civil::Date>() {
        // A time without an offset reads as a date as well; guessing its zone would be wrong half of the time.
        Ok(_) if text.len() > 10 => text.parse::<jiff::Timestamp>().ok()?,
        Ok(date) => date.tomorrow().ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp(),
        Err(_) => text.parse::<jiff::Timestamp>().ok()?,
    };
    u64::try_from(end.as_millisecond()).ok().map(Millis)
}

fn hex32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// An optional date in a sentence.
struct Shown<'a>(&'a Option<Written>);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(moment) => moment.fmt(f),
            None => f.write_str("never"),
        }
    }
}

#[cfg(test)]
#[path = "resolve_test.rs"]
mod tests;
