//! A daemon on a free loopback port, and a client for it.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::dev::ServerHandle;
use neurond::adapters::Adapters;
use neurond::app::settings;
use neurond::base::{AccountId, DeviceId, KeyId, Millis, ModelId, Phase};
use neurond::config::{Binding, CatalogLimits, Config, KvType, Limits, Live, Model, Precision, Scopes, Token};
use neurond::gateway::Gateway;
use neurond::gateway::relay::{self, Parts};
use neurond::http::{self, Batches, Evaluations, Listener, Services};
use neurond::ledger::{Filter, Ledger, Row, Who};
use neurond::logs::Logs;
use neurond::metrics::Metrics;
use neurond::net::sse::{Decoder, SseEvent};
use neurond::supervisor::{FleetView, Outcome, Place, Supervisor};
use neurond::task::Task;
use neurond::vault::Vault;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// A model of the built-in catalog whose native results are classic.
pub const CLASSIC: &str = "@cf/meta/llama-3.2-1b-instruct";
/// One whose native results are OpenAI's chat completions.
pub const CHATTY: &str = "@cf/ibm-granite/granite-4.0-h-micro";
/// Longest sequence of the models that are served.
pub const CONTEXT: u32 = 2048;

/// Every floor but the outermost, in this process; models are simulated.
pub struct Daemon {
    /// Where the API listens.
    pub addr: SocketAddr,
    /// Where the AI binding listens.
    pub binding: SocketAddr,
    /// What its handlers reach for.
    pub services: Services,
    phase: watch::Sender<Phase>,
    handles: Vec<ServerHandle>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    /// Starts with both models on one simulated device: `sim` or `sim:key=value,…`.
    pub fn serving(sim: &str, tune: impl FnOnce(&mut Config)) -> Self {
        Self::serving_on(1, sim, tune)
    }

    /// The same on several such devices.
    pub fn serving_on(devices: u16, sim: &str, tune: impl FnOnce(&mut Config)) -> Self {
        let model = |id: &str| Model {
            id: ModelId::new(id),
            task: Task::TextGeneration,
            path: sim.into(),
            precision: Precision::default(),
            kv: KvType::default(),
            kv_bytes: 1 << 20,
            spill: None,
            draft: None,
            tensor_parallel: 1,
            on_gpu: Default::default(),
            context: CONTEXT,
            modified: None,
        };
        Self::start_on(devices, |config| {
            config.models = vec![model(CLASSIC), model(CHATTY)];
            tune(config);
        })
    }

    /// Starts with the built-in configuration after `tune` has changed it, which has no models.
    pub fn start(tune: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(1, tune)
    }

    /// Starts with what a file of this text says, and both models. What the API tells is kept only where the file says so.
    pub fn written(toml: &str, keeps: bool, tune: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("neurond.toml");
        std::fs::write(&path, toml).unwrap();
        let written = neurond::config::load(Some(&path), &Default::default()).unwrap();
        Self::serving("sim", |config| {
            let models = std::mem::take(&mut config.models);
            *config = Config { models, ..written };
            config.server.workers = 2;
            config.server.drain_timeout = Duration::from_secs(5);
            config.lora.path = None;
            let (registry, key_files) = (config.registry.take(), std::mem::take(&mut config.key_files));
            alone(config);
            if keeps {
                (config.registry, config.key_files) = (registry, key_files);
            }
            tune(config);
        })
    }

    fn start_on(devices: u16, tune: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        alone(&mut config);
        config.server.workers = 2;
        config.server.drain_timeout = Duration::from_secs(5);
        config.lora.path = None;
        config.binding =
            Some(Binding { listen: "127.0.0.1:0".parse().unwrap(), account: AccountId::new("worker-account") });
        tune(&mut config);
        let api = TcpListener::bind("127.0.0.1:0").unwrap();
        let binding = TcpListener::bind("127.0.0.1:0").unwrap();
        let (addr, binding_addr) = (api.local_addr().unwrap(), binding.local_addr().unwrap());
        let (sender, receiver) = std::sync::mpsc::channel();
        let (phase, phases) = watch::channel(Phase::Ready);
        let thread = std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let metrics = Arc::new(Metrics::new());
                let vault = Vault::new(config.auth.clone());
                let config = Live::new(config);
                let fleet = FleetView::default();
                let ledger = Ledger::start(settings::ledger(&config.get().metering)).unwrap();
                let wanted = config.get();
                let start =
                    |id| Supervisor::start(DeviceId(id), Place::Cpu, 1, fleet.clone(), metrics.clone()).unwrap();
                let devices: Vec<_> = (0..devices).map(start).collect();
                for device in &devices {
                    let report = device.reconcile(wanted.models.clone(), wanted.engine.clone()).await.unwrap();
                    for (model, outcome) in report {
                        assert!(!matches!(outcome, Outcome::Failed(_)), "{model}: {outcome:?}");
                    }
                }
                let adapters = Adapters::start(config.clone(), metrics.clone());
                let (fleet_view, series) = (fleet.clone(), metrics.clone());
                let clients = relay::clients(&wanted.upstream).unwrap();
                let shared = settings::shared_cache(&wanted.metering, &metrics).unwrap();
                let relays = Parts::start(&config, &ledger, shared, &metrics, |config, registry| {
                    Logs::start(settings::logs(config, registry, clients.clone())?, metrics.clone())
                });
                let relays = relays.unwrap();
                let logs = relays.logs.clone();
                let (config_view, fleet) = (config.clone(), fleet.clone());
                let gateway =
                    Gateway { config: config_view, fleet: fleet_view, adapters, ledger, logs, metrics: series };
                let batches = wanted.batches.as_deref().map(|folder| Batches::start(folder, gateway.clone()).unwrap());
                let evaluations = Evaluations::start(relays.registry.clone(), relays.logs.clone());
                let alerts = None;
                let services = Services {
                    config,
                    gateway,
                    relays,
                    clients,
                    alerts,
                    batches,
                    evaluations,
                    fleet,
                    vault,
                    metrics,
                    phase: phases,
                };
                let api = http::start(services.clone(), api, Listener::Api).unwrap();
                let binding = http::start(services.clone(), binding, Listener::Binding).unwrap();
                sender.send((services, vec![api.handle(), binding.handle()])).unwrap();
                let _ = futures_util::future::join(api, binding).await;
                for device in devices {
                    device.drain(Instant::now()).await;
                }
            });
        });
        let (services, handles) = receiver.recv().unwrap();
        Self { addr, binding: binding_addr, services, phase, handles, thread: Some(thread) }
    }

    /// The address of a path of the API.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    /// Tells every handler where the process is in its life.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Begins a graceful stop and says so when it is over.
    pub fn stop(&self) -> impl Future<Output = ()> + use<> {
        let stops: Vec<_> = self.handles.iter().map(|handle| handle.stop(true)).collect();
        async move {
            for stop in stops {
                stop.await;
            }
        }
    }

    /// `POST` with a JSON body and no credentials.
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::of(reqwest::Client::new().post(self.url(path)).json(&body)).await
    }

    /// `GET` with no credentials.
    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(reqwest::Client::new().get(self.url(path))).await
    }

    /// What the ledger says of today.
    pub async fn rows(&self) -> Vec<(Who, Row)> {
        let today = Millis::now().day();
        let rows = self.services.gateway.ledger.rows(Filter::days(today, today)).await.unwrap();
        rows.into_iter().map(|(_, who, row)| (who, row)).collect()
    }

    /// The value of one series of `/metrics`, as written there; 0 while it does not exist.
    pub fn metric(&self, series: &str) -> f64 {
        let text = String::from_utf8(self.services.metrics.render()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until something is true, or fails after ten seconds.
    pub async fn eventually(&self, what: &str, mut is_true: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !is_true(self) {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for handle in &self.handles {
            drop(handle.stop(false));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Nothing of this machine's own daemon is touched.
fn alone(config: &mut Config) {
    config.cache.folder = None;
    config.registry = None;
    config.key_files = Default::default();
    config.metering.ledger.folder = None;
    config.records.folder = None;
    config.records.alerts_folder = None;
    // Tests ask for more in a minute than anybody does.
    let written = (*config.metering.limits).clone();
    config.metering.limits = Arc::new(Limits { catalog: CatalogLimits::Off, ..written });
}

/// A token as the configuration holds it.
pub fn token(id: &str, secret: &str, account: &str) -> Token {
    Token {
        id: KeyId::new(id),
        sha256: Sha256::digest(secret.as_bytes()).into(),
        account: AccountId::new(account),
        any_account: false,
        scopes: Scopes::ALL,
        expires: None,
        budget: Default::default(),
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    /// A header as text, empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The body, which must be JSON and say so exactly.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), "application/json", "{self:?}");
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

impl Answer {
    /// The events of a stream that began well.
    #[track_caller]
    pub fn events(&self) -> Vec<SseEvent> {
        assert_eq!((self.status, self.header("content-type")), (200, "text/event-stream"), "{self:?}");
        let mut events = Vec::new();
        Decoder::new(1 << 20).feed(self.text.as_bytes(), &mut events).unwrap();
        events
    }

    /// The JSON of every event of a stream that must end with `[DONE]`.
    #[track_caller]
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        let last = events.pop().expect("an event");
        assert_eq!(last.data, "[DONE]", "{}", self.text);
        events.iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect()
    }
}

/// The strings at a JSON pointer in each of the values, put together.
pub fn joined(values: &[Value], pointer: &str) -> String {
    values.iter().filter_map(|value| value.pointer(pointer)?.as_str()).collect()
}
