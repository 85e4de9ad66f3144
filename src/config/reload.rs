//! What a reload changes: two configurations in, a list of differences out, each with what has to happen for it to count.

use std::fmt;
use std::path::PathBuf;

use crate::base::AccountId;

use super::{
    Account, Auth, Cache, Config, Draft, Engine, Gpu, Log, Lora, Metering, Model, OnGpu, Plan, Records, Server, Spill,
    Upstream,
};

/// One difference between the configuration in force and a new one.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// As in the file: `server.request_timeout_ms`, `model @cf/…: path`.
    pub key: String,
    /// What was in force; empty if nothing was.
    pub from: String,
    /// What is wanted; empty if it is taken away.
    pub to: String,
    /// When it counts.
    pub effect: Effect,
}

/// When a change counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// From the next request on.
    Live,
    /// When the models concerned (those named, or all for `engine.*`) have been loaded, swapped or retired, which a reload does.
    Swap,
    /// After a restart only.
    Restart,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, from, to) = (&self.key, &self.from, &self.to);
        match (from.is_empty(), to.is_empty()) {
            (true, _) => write!(f, "{key}: {to} added")?,
            (_, true) => write!(f, "{key}: {from} removed")?,
            _ => write!(f, "{key}: {from} -> {to}")?,
        }
        f.write_str(match self.effect {
            Effect::Live | Effect::Swap => "",
            Effect::Restart => " (needs a restart)",
        })
    }
}

/// Everything that differs, in the order of the file. Secrets are not shown: a token appears by its name.
pub fn diff(old: &Config, new: &Config) -> Vec<Change> {
    let mut changes = Changes(Vec::new());
    changes.server(&old.server, &new.server);
    let binding = |config: &Config| config.binding.as_ref().map(|b| format!("{} for {}", b.listen, b.account));
    changes.note("binding", binding(old), binding(new), Effect::Restart);
    changes.auth(&old.auth, &new.auth);
    changes.engine(&old.engine, &new.engine);
    changes.gpu(&old.gpu, &new.gpu);
    let folder = |config: &Config| config.batches.as_ref().map(|folder| folder.display().to_string());
    changes.note("batch.folder", folder(old), folder(new), Effect::Restart);
    changes.accounts(&old.accounts, &new.accounts);
    changes.metering(&old.metering, &new.metering);
    changes.records(&old.records, &new.records);
    changes.models(&old.models, &new.models);
    changes.lora(&old.lora, &new.lora);
    changes.told(old, new);
    changes.upstream(&old.upstream, &new.upstream);
    changes.cache(&old.cache, &new.cache);
    changes.catalog(old, new);
    changes.log(&old.log, &new.log);
    changes.0
}

struct Changes(Vec<Change>);

impl Changes {
    fn note(&mut self, key: impl Into<String>, from: impl Shown, to: impl Shown, effect: Effect) {
        let (from, to) = (from.shown(), to.shown());
        if from != to {
            self.0.push(Change { key: key.into(), from, to, effect });
        }
    }

    // Whole structs are taken apart, so that a field added later cannot be forgotten here.
    fn server(&mut self, old: &Server, new: &Server) {
        let Server {
            listen,
            workers,
            max_body_bytes,
            max_connections,
            read_timeout,
            write_timeout,
            request_timeout,
            drain_timeout,
        } = new;
        // What the listener was built with cannot change under it.
        self.note("server.listen", old.listen, *listen, Effect::Restart);
        self.note("server.workers", old.workers, *workers, Effect::Restart);
        self.note("server.max_body_bytes", old.max_body_bytes, *max_body_bytes, Effect::Live);
        self.note("server.max_connections", old.max_connections, *max_connections, Effect::Restart);
        self.note("server.read_timeout_ms", old.read_timeout.as_millis(), read_timeout.as_millis(), Effect::Restart);
        self.note("server.write_timeout_ms", old.write_timeout.as_millis(), write_timeout.as_millis(), Effect::Restart);
        self.note(
            "server.request_timeout_ms",
            old.request_timeout.as_millis(),
            request_timeout.as_millis(),
            Effect::Live,
        );
        self.note("server.drain_timeout_ms", old.drain_timeout.as_millis(), drain_timeout.as_millis(), Effect::Restart);
    }

    fn auth(&mut self, old: &Auth, new: &Auth) {
        let Auth { anonymous, tokens } = new;
        self.note("auth.anonymous", old.anonymous.as_ref(), anonymous.as_ref(), Effect::Live);
        for token in &old.tokens {
            let key = format!("auth.token {}", token.id);
            match tokens.iter().find(|other| other.id == token.id) {
                None => self.note(key, Some(&token.account), None::<String>, Effect::Live),
                Some(other) if other != token => {
                    let what = if other.sha256 == token.sha256 { "rights changed" } else { "replaced" };
                    self.note(key, "as it was", what, Effect::Live);
                }
                Some(_) => {}
            }
        }
        for token in tokens.iter().filter(|token| !old.tokens.iter().any(|other| other.id == token.id)) {
            self.note(format!("auth.token {}", token.id), None::<String>, Some(&token.account), Effect::Live);
        }
    }

    fn engine(&mut self, old: &Engine, new: &Engine) {
        let Engine {
            threads,
            step_tokens,
            prefill_chunk,
            max_running,
            max_queue,
            block_tokens,
            prefix_cache,
            prefill_stretch,
            draft_tokens,
            prompt_lookup,
        } = new;
        self.note("engine.threads", old.threads, *threads, Effect::Restart);
        self.note("engine.step_tokens", old.step_tokens, *step_tokens, Effect::Swap);
        self.note("engine.prefill_chunk", old.prefill_chunk, *prefill_chunk, Effect::Swap);
        self.note("engine.max_running", old.max_running, *max_running, Effect::Swap);
        self.note("engine.max_queue", old.max_queue, *max_queue, Effect::Swap);
        self.note("engine.block_tokens", old.block_tokens, *block_tokens, Effect::Swap);
        self.note("engine.prefix_cache", old.prefix_cache, *prefix_cache, Effect::Swap);
        self.note("engine.prefill_stretch", old.prefill_stretch, *prefill_stretch, Effect::Swap);
        self.note("engine.draft_tokens", old.draft_tokens, *draft_tokens, Effect::Swap);
        self.note("engine.prompt_lookup", old.prompt_lookup, *prompt_lookup, Effect::Swap);
    }

    fn gpu(&mut self, old: &Gpu, new: &Gpu) {
        let Gpu { devices, library_folders, memory_share, threads, step_tokens, prefill_chunk, max_running } = new;
        self.note("gpu.devices", ordinals(&old.devices), ordinals(devices), Effect::Restart);
        let folders = |folders: &[PathBuf]| (!folders.is_empty()).then(|| format!("{folders:?}"));
        self.note("gpu.library_folders", folders(&old.library_folders), folders(library_folders), Effect::Restart);
        self.note("gpu.memory_share", old.memory_share, *memory_share, Effect::Restart);
        self.note("gpu.threads", old.threads, *threads, Effect::Restart);
        self.note("gpu.step_tokens", old.step_tokens, *step_tokens, Effect::Swap);
        self.note("gpu.prefill_chunk", old.prefill_chunk, *prefill_chunk, Effect::Swap);
        self.note("gpu.max_running", old.max_running, *max_running, Effect::Swap);
    }

    fn accounts(&mut self, old: &[Account], new: &[Account]) {
        let find = |list: &[Account], id: &AccountId| list.iter().find(|account| account.id == *id).cloned();
        let mut ids: Vec<_> = old.iter().chain(new).map(|account| &account.id).collect();
        ids.sort();
        ids.dedup();
        for id in ids {
            let (old, new) = (find(old, id), find(new, id));
            let shown = |account: Option<&Account>| {
                account.map(|Account { id: _, weight, priority, plan }| {
                    let plan = plan.map(|plan| format!(", {plan}")).unwrap_or_default();
                    format!("weight {weight}, priority {priority}{plan}")
                })
            };
            self.note(format!("account {id}"), shown(old.as_ref()), shown(new.as_ref()), Effect::Live);
        }
    }

    fn metering(&mut self, old: &Metering, new: &Metering) {
        let Metering { plan, limits, tariffs, ledger, fleet } = new;
        self.note("plan", old.plan, *plan, Effect::Live);
        if old.limits != *limits {
            self.note("limits", "as they were", "changed", Effect::Live);
        }
        if old.tariffs != *tariffs {
            self.note("prices", "as they were", "changed", Effect::Live);
        }
        if old.ledger != *ledger {
            self.note("ledger", "as it was", "changed", Effect::Restart);
        }
        if old.fleet != *fleet {
            self.note("fleet", "as it was", "changed", Effect::Restart);
        }
    }

    fn records(&mut self, old: &Records, new: &Records) {
        let Records { logs, folder, redact, ship, analytics, alerts, alerts_folder, rules, channels } = new;
        let kept = (&old.logs, &old.folder, &old.redact, &old.ship, &old.analytics, &old.alerts_folder);
        if kept != (logs, folder, redact, ship, analytics, alerts_folder) {
            self.note("logs, redact, ship, analytics", "as they were", "changed", Effect::Restart);
        }
        if (&old.alerts, &old.rules, &old.channels) != (alerts, rules, channels) {
            // Where nothing was watched, nobody is there to be told.
            let effect = if old.rules.is_empty() { Effect::Restart } else { Effect::Live };
            self.note("alerts", "as they were", "changed", effect);
        }
    }

    fn models(&mut self, old: &[Model], new: &[Model]) {
        for model in old {
            let key = format!("model {}", model.id);
            let Some(other) = new.iter().find(|other| other.id == model.id) else {
                self.note(key, Some(&model.path), None::<String>, Effect::Swap);
                continue;
            };
            let Model {
                id: _,
                task,
                path,
                precision,
                kv,
                kv_bytes,
                spill,
                draft,
                tensor_parallel,
                on_gpu,
                context,
                modified,
            } = other;
            self.note(format!("{key}: task"), model.task.name(), task.name(), Effect::Swap);
            self.note(format!("{key}: path"), &model.path, path, Effect::Swap);
            self.note(format!("{key}: precision"), word(model.precision), word(*precision), Effect::Swap);
            self.note(format!("{key}: kv"), word(model.kv), word(*kv), Effect::Swap);
            self.note(format!("{key}: kv_bytes"), model.kv_bytes, *kv_bytes, Effect::Swap);
            let room = |spill: &Option<Spill>| {
                spill.as_ref().map(|Spill { bytes, folder }| match folder {
                    Some(folder) => format!("{bytes} in {}", folder.display()),
                    None => bytes.to_string(),
                })
            };
            self.note(format!("{key}: spill_bytes"), room(&model.spill), room(spill), Effect::Swap);
            self.note(format!("{key}: context"), Some(model.context), Some(*context), Effect::Swap);
            let (from, to) = (model.tensor_parallel, *tensor_parallel);
            self.note(format!("{key}: tensor_parallel"), from, to, Effect::Swap);
            let OnGpu { gpus, weights, kv, kv_bytes: gpu_kv_bytes, prompt_kernel } = on_gpu;
            let was = &model.on_gpu;
            self.note(format!("{key}: gpus"), ordinals(&was.gpus), ordinals(gpus), Effect::Swap);
            self.note(format!("{key}: gpu_weights"), word(was.weights), word(*weights), Effect::Swap);
            self.note(format!("{key}: gpu_kv"), word(was.kv), word(*kv), Effect::Swap);
            if model.kv_bytes == *kv_bytes {
                self.note(format!("{key}: kv_bytes on a GPU"), was.kv_bytes, *gpu_kv_bytes, Effect::Swap);
            }
            let (from, to) = (word(was.prompt_kernel), word(*prompt_kernel));
            self.note(format!("{key}: gpu.prompt_kernel"), from, to, Effect::Swap);
            let paths = |draft: &Option<Draft>| draft.as_ref().map(|draft| draft.path.clone());
            self.note(format!("{key}: draft"), paths(&model.draft), paths(draft), Effect::Swap);
            if paths(&model.draft) == paths(draft) && model.draft != *draft {
                self.note(format!("{key}: draft weights"), "as loaded", "written anew", Effect::Swap);
            }
            if model.path == *path && model.modified != *modified {
                self.note(format!("{key}: weights"), "as loaded", "written anew", Effect::Swap);
            }
        }
        for model in new.iter().filter(|model| !old.iter().any(|other| other.id == model.id)) {
            self.note(format!("model {}", model.id), None::<String>, Some(&model.path), Effect::Swap);
        }
    }

    /// Blocks of gateways and providers hold secrets: which changed is said, not how.
    fn told(&mut self, old: &Config, new: &Config) {
        if old.fixed.gateways != new.fixed.gateways {
            self.note("gateway", "as they were", "changed", Effect::Live);
        }
        if old.fixed.providers != new.fixed.providers {
            self.note("provider", "as they were", "changed", Effect::Live);
        }
        if old.key_files != new.key_files {
            self.note("vault", "as it was", "changed", Effect::Restart);
        }
        self.note("registry.folder", old.registry.as_ref(), new.registry.as_ref(), Effect::Restart);
    }

    fn upstream(&mut self, old: &Upstream, new: &Upstream) {
        let Upstream {
            connect_timeout,
            first_byte_timeout,
            idle_timeout,
            total_timeout,
            max_retry_after,
            allow_private,
            proxy,
            authorities,
            max_answer_bytes,
        } = new;
        for (key, was, is, effect) in [
            ("upstream.connect_timeout_ms", old.connect_timeout, connect_timeout, Effect::Restart),
            ("upstream.first_byte_timeout_ms", old.first_byte_timeout, first_byte_timeout, Effect::Live),
            ("upstream.idle_timeout_ms", old.idle_timeout, idle_timeout, Effect::Live),
            ("upstream.total_timeout_ms", old.total_timeout, total_timeout, Effect::Live),
            ("upstream.max_retry_after_ms", old.max_retry_after, max_retry_after, Effect::Live),
        ] {
            self.note(key, was.as_millis(), is.as_millis(), effect);
        }
        // What workers' clients were made with cannot change under them.
        self.note("upstream.allow_private", old.allow_private, *allow_private, Effect::Restart);
        self.note("upstream.proxy", old.proxy.as_ref(), proxy.as_ref(), Effect::Restart);
        if old.authorities != *authorities {
            self.note("upstream.ca_file", "as it was", "changed", Effect::Restart);
        }
        self.note("upstream.max_answer_bytes", old.max_answer_bytes, *max_answer_bytes, Effect::Live);
    }

    fn cache(&mut self, old: &Cache, new: &Cache) {
        let Cache { memory_bytes, disk_bytes, max_entries, max_entry_bytes, folder } = new;
        self.note("cache.memory_bytes", old.memory_bytes, *memory_bytes, Effect::Restart);
        self.note("cache.disk_bytes", old.disk_bytes, *disk_bytes, Effect::Restart);
        self.note("cache.max_entries", old.max_entries, *max_entries, Effect::Restart);
        self.note("cache.max_entry_bytes", old.max_entry_bytes, *max_entry_bytes, Effect::Restart);
        self.note("cache.folder", old.folder.as_ref(), folder.as_ref(), Effect::Restart);
    }

    fn lora(&mut self, old: &Lora, new: &Lora) {
        let Lora { path, max_file_bytes, max_adapters, cache_bytes, public_account } = new;
        self.note("lora.path", old.path.as_ref(), path.as_ref(), Effect::Restart);
        self.note("lora.max_file_bytes", old.max_file_bytes, *max_file_bytes, Effect::Live);
        self.note("lora.max_adapters", old.max_adapters, *max_adapters, Effect::Live);
        self.note("lora.cache_bytes", old.cache_bytes, *cache_bytes, Effect::Live);
        self.note("lora.public_account", old.public_account.as_ref(), public_account.as_ref(), Effect::Live);
    }

    fn catalog(&mut self, old: &Config, new: &Config) {
        for entry in old.catalog.entries() {
            let key = format!("catalog {}", entry.id);
            match new.catalog.entries().iter().find(|other| other.id == entry.id) {
                None => self.note(key, Some("entry"), None::<String>, Effect::Live),
                Some(other) if other.price != entry.price => {
                    let list = |lines: Vec<super::PriceLine>| {
                        let lines: Vec<_> =
                            lines.iter().map(|line| format!("{} {}", line.neurons, line.unit)).collect();
                        if lines.is_empty() { "free".to_owned() } else { lines.join(", ") }
                    };
                    self.note(
                        format!("{key}: price"),
                        list(entry.price.listed()),
                        list(other.price.listed()),
                        Effect::Live,
                    );
                }
                Some(other) if other != entry => self.note(key, "as it was", "changed", Effect::Live),
                Some(_) => {}
            }
        }
        for entry in new.catalog.entries() {
            if !old.catalog.entries().iter().any(|other| other.id == entry.id) {
                self.note(format!("catalog {}", entry.id), None::<String>, Some("entry"), Effect::Live);
            }
        }
    }

    fn log(&mut self, old: &Log, new: &Log) {
        let Log { filter, format } = new;
        self.note("log.filter", &old.filter, filter, Effect::Live);
        self.note("log.format", word(old.format), word(*format), Effect::Restart);
    }
}

/// An enum's name as the file writes it.
fn word(value: impl fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

/// Numbers of GPUs as the file writes them.
fn ordinals(gpus: &Option<Vec<u16>>) -> Option<String> {
    gpus.as_ref().map(|gpus| format!("{gpus:?}"))
}

/// How a value appears in a change; what is absent is empty.
trait Shown {
    fn shown(&self) -> String;
}

macro_rules! shown {
    ($($kind:ty)*) => { $(impl Shown for $kind { fn shown(&self) -> String { self.to_string() } })* };
}
shown!(usize u32 u64 u128 f64 bool str String std::net::SocketAddr crate::base::AccountId Plan);

impl Shown for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl<T: Shown + ?Sized> Shown for &T {
    fn shown(&self) -> String {
        (*self).shown()
    }
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map(Shown::shown).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::Scopes;
    use super::super::{KvType, Precision, Token};
    use super::*;
    use crate::base::{AccountId, KeyId, Millis, ModelId};
    use crate::task::Task;

    fn model(id: &str) -> Model {
        Model {
            id: ModelId::new(id),
            task: Task::TextGeneration,
            path: "/m/a.gguf".into(),
            precision: Precision::Fast,
            kv: KvType::F16,
            kv_bytes: 1 << 20,
            spill: None,
            context: 8192,
            draft: Some(Draft { path: "small".into(), modified: Some(Millis(1)) }),
            tensor_parallel: 1,
            on_gpu: OnGpu::default(),
            modified: Some(Millis(1)),
        }
    }

    fn token(id: &str, hash: u8) -> Token {
        let (id, account) = (KeyId::new(id), AccountId::new("x"));
        let budget = Default::default();
        Token { id, sha256: [hash; 32], account, any_account: false, scopes: Scopes::ALL, expires: None, budget }
    }

    /// Makes two equal configurations, changes one, and compares what is said about it.
    fn check(change: impl FnOnce(&mut Config), said: &[&str]) {
        let auth = Auth { tokens: vec![token("ops", 1), token("ci", 2)], ..Config::default().auth };
        let old = Config { models: vec![model("a"), model("b")], auth, ..Config::default() };
        let mut new = old.clone();
        change(&mut new);
        let changes: Vec<_> = diff(&old, &new).iter().map(ToString::to_string).collect();
        assert_eq!(changes, said);
    }

    #[test]
    fn the_same_configuration_changes_nothing() {
        check(|_| {}, &[]);
        check(|new| new.catalog = Arc::new(super::super::catalog::Builder::builtin().build().unwrap()), &[]);
    }

    #[test]
    fn timeouts_count_at_once_and_listeners_need_a_restart() {
        check(
            |new| {
                new.server.request_timeout = Duration::from_secs(5);
                new.server.listen.set_port(81);
                new.log.filter = "debug".into();
            },
            &[
                "server.listen: 127.0.0.1:8080 -> 127.0.0.1:81 (needs a restart)",
                "server.request_timeout_ms: 600000 -> 5000",
                "log.filter: info -> debug",
            ],
        );
    }

    #[test]
    fn models_are_added_removed_and_swapped_by_id() {
        check(
            |new| {
                new.models.remove(0);
                new.models[0].path = "/m/b2.gguf".into();
                new.models.push(model("c"));
                new.engine.max_running = 8;
            },
            &[
                "engine.max_running: 64 -> 8",
                "model a: /m/a.gguf removed",
                "model b: path: /m/a.gguf -> /m/b2.gguf",
                "model c: /m/a.gguf added",
            ],
        );
        check(|new| new.models[0].draft = None, &["model a: draft: small removed"]);
        let newer = Draft { path: "small".into(), modified: Some(Millis(2)) };
        check(|new| new.models[0].draft = Some(newer), &["model a: draft weights: as loaded -> written anew"]);
        check(|new| new.models[0].modified = Some(Millis(2)), &["model a: weights: as loaded -> written anew"]);
        check(|new| new.models[1].tensor_parallel = 3, &["model b: tensor_parallel: 1 -> 3"]);
        check(|new| new.models.swap(0, 1), &[]);
    }

    #[test]
    fn tokens_appear_by_name_and_never_by_hash() {
        check(
            |new| {
                new.auth.tokens[0].sha256 = [9; 32];
                new.auth.tokens[1] = token("new", 3);
                new.auth.anonymous = None;
            },
            &[
                "auth.anonymous: local removed",
                "auth.token ops: as it was -> replaced",
                "auth.token ci: x removed",
                "auth.token new: x added",
            ],
        );
    }

    #[test]
    fn an_account_is_changed_by_name_and_at_once() {
        let account = |id: &str, weight| Account { id: AccountId::new(id), weight, priority: 0, plan: None };
        check(|new| new.accounts = vec![account("a", 2)], &["account a: weight 2, priority 0 added"]);
    }

    #[test]
    fn a_new_price_is_shown_in_full() {
        let mut builder = super::super::catalog::Builder::builtin();
        let block = "[[model]]\nid = '@cf/meta/llama-3.2-1b-instruct'\nprice = { input = 1, output = 2 }\n";
        builder.read(block, "x").unwrap();
        let catalog = Arc::new(builder.build().unwrap());
        check(
            |new| new.catalog = catalog,
            &["catalog @cf/meta/llama-3.2-1b-instruct: price: 2457 per M input tokens, 18252 per M output tokens -> \
               1 per M input tokens, 2 per M output tokens"],
        );
    }
}
