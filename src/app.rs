//! Builds the house floor by floor, listens to signals, drains it from the top, exits.

mod alerts;
pub mod settings;

use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::dev::ServerHandle;
use actix_web::rt;
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::adapters::Adapters;
use crate::alert::Alerts;
use crate::base::{Error, Millis, Phase, Result};
use crate::cache::Cache;
use crate::config::{self, Config, Live, Overrides};
use crate::gateway::Gateway;
use crate::gateway::relay::{self, Parts};
use crate::http::{self, Batches, Evaluations, Listener, Services};
use crate::kernel::pages;
use crate::ledger::{self, Ledger};
use crate::logs::Logs;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::signal::{self, Notifier, Signal, Signals};
use crate::supervisor::{Devices, FleetView, Outcome, Report};
use crate::telemetry::{self, LogControl};
use crate::vault::Vault;

/// How often the ledger and the devices are looked at.
const PULSE: Duration = Duration::from_secs(1);
/// A device whose thread has not come round its loop for this long is taken for hung: the watchdog is not fed any more.
const HUNG: Duration = Duration::from_secs(120);

/// How long what waits to be shipped may take at the end.
const LOGS_LAST: Duration = Duration::from_secs(5);
/// How long the store of the fleet may take at the start.
const FLEET_FIRST: Duration = Duration::from_secs(5);
/// How long the ledger's disk may take at the end.
const LEDGER_LAST: Duration = Duration::from_secs(10);
/// How long the streams that a hurried drain has cut off may take to say so.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the command line adds to the configuration file.
#[derive(Debug, Default)]
pub struct Options {
    /// The configuration file; `None` looks in the usual places.
    pub config: Option<PathBuf>,
    /// Flags that win over the file.
    pub overrides: Overrides,
}

/// Why the daemon ended, when not by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Drained after TERM or INT.
    Drained,
    /// The ledger died: money is never guessed, so the process ends and is started again.
    LedgerLost,
}

/// Serves until a signal or a fatal fault ends it.
///
/// # Errors
/// When the configuration is refused, an address is taken, or no configured model can be loaded.
pub fn run(options: Options) -> Result<Ended> {
    pages::small_heap();
    let config = config::load(options.config.as_deref(), &options.overrides)?;
    let log = telemetry::init(&config.log)?;
    let ended = rt::System::new().block_on(async move {
        let signals =
            Signals::new().map_err(|error| Error::internal("signals cannot be handled").with_source(error))?;
        App::build(options, config, log)?.run(signals).await
    });
    telemetry::flush();
    ended
}

/// The house: every floor's handle, top to bottom.
struct App {
    options: Options,
    log: LogControl,
    servers: Vec<ServerHandle>,
    config: Live,
    vault: Vault,
    devices: Devices,
    ledger: Ledger,
    registry: Registry,
    cache: Cache,
    logs: Logs,
    alerts: Option<Alerts>,
    metrics: Arc<Metrics>,
    phase: watch::Sender<Phase>,
    notifier: Notifier,
}

impl App {
    fn build(options: Options, config: Config, log: LogControl) -> Result<Self> {
        let notifier = Notifier::from_env();
        for warning in &config.warnings {
            warn!("{warning}");
        }
        let metrics = Arc::new(Metrics::new());
        let ledger = Ledger::start(settings::ledger(&config.metering))?;
        let fleet = FleetView::default();
        let devices = Devices::start(&config, &fleet, &metrics)?;
        let vault = Vault::new(config.auth.clone());
        let (phase, phase_view) = watch::channel(Phase::Starting);
        let live = Live::new(config);
        let clients = relay::clients(&live.get().upstream)?;
        let shared = settings::shared_cache(&live.get().metering, &metrics)?;
        let relays = Parts::start(&live, &ledger, shared, &metrics, |config, registry| {
            Logs::start(settings::logs(config, registry, clients.clone())?, metrics.clone())
        })?;
        let gateway = Gateway {
            config: live.clone(),
            fleet: fleet.clone(),
            adapters: Adapters::start(live.clone(), metrics.clone()),
            ledger: ledger.clone(),
            logs: relays.logs.clone(),
            metrics: metrics.clone(),
        };
        let folder = live.get().batches.clone();
        let batches = folder.map(|folder| Batches::start(&folder, gateway.clone())).transpose()?;
        let alerts = alerts::start(&live, clients.clone(), &relays, devices.pulses())?;
        let evaluations = Evaluations::start(relays.registry.clone(), relays.logs.clone());
        let services = Services {
            alerts: alerts.clone(),
            config: live.clone(),
            gateway,
            relays: relays.clone(),
            clients,
            batches,
            evaluations,
            fleet,
            vault: vault.clone(),
            metrics: metrics.clone(),
            phase: phase_view,
        };
        let servers = listen(&live.get(), &services)?;
        let Parts { registry, cache, logs, .. } = relays;
        Ok(Self {
            options,
            log,
            servers,
            config: live,
            vault,
            devices,
            ledger,
            registry,
            cache,
            logs,
            alerts,
            metrics,
            phase,
            notifier,
        })
    }

    /// Listens to signals while models are loaded and reloaded beside it: neither the watchdog nor TERM waits for a model.
    async fn run(self, mut signals: Signals) -> Result<Ended> {
        let app = Rc::new(self);
        let mut work = rt::spawn({
            let app = app.clone();
            async move { app.load_models().await }
        });
        let (mut working, mut again) = (true, false);
        let mut pulse = interval(PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = interval(app.notifier.watchdog_interval().unwrap_or(PULSE));
        watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                done = &mut work, if working => {
                    working = false;
                    let outcome = done.unwrap_or_else(|error| Err(Error::internal("loading panicked").with_source(error)));
                    if let Err(error) = outcome {
                        app.drain(&mut signals).await;
                        return Err(error);
                    }
                }
                signal = signals.next() => match signal {
                    Signal::Drain | Signal::Hurry => {
                        app.drain(&mut signals).await;
                        return Ok(Ended::Drained);
                    }
                    Signal::Reload => again = true,
                    Signal::Dump => app.dump().await,
                    Signal::LogLevel => {
                        let filter = app.log.cycle();
                        warn!(filter, "log filter changed");
                    }
                },
                _ = pulse.tick() => {
                    if working {
                        app.notifier.extend(PULSE * 30);
                    }
                    if !app.ledger.is_alive() {
                        error!("the ledger died; draining, the process has to start again");
                        app.drain(&mut signals).await;
                        return Ok(Ended::LedgerLost);
                    }
                }
                _ = watchdog.tick() => {
                    let silent = app.devices.silent_for();
                    if silent < HUNG {
                        app.notifier.ping();
                    } else {
                        error!(silent_s = silent.as_secs(), "a device hangs; the watchdog is not fed");
                    }
                }
            }
            if again && !working {
                (again, working) = (false, true);
                let app = app.clone();
                work = rt::spawn(async move {
                    app.reload().await;
                    Ok(())
                });
            }
        }
    }

    /// Loads what is configured; the listeners answer already, with readiness off.
    async fn load_models(&self) -> Result<()> {
        let config = self.config.get();
        self.notifier.status("loading models");
        let started = Instant::now();
        let report = self.devices.reconcile(&config).await?;
        let failed = failures(&report);
        if !failed.is_empty() && failed.len() == report.len() {
            return Err(Error::internal(format!("No configured model could be loaded: {}", failed.join("; "))));
        }
        if !self.ledger.joined(FLEET_FIRST).await {
            warn!("the fleet's store has not answered yet: serving begins without leases");
        }
        self.phase.send_replace(Phase::Ready);
        self.notifier.ready();
        pages::enlarge();
        let served = report.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::Failed(_)));
        let models = served.map(|(model, _)| model).collect::<HashSet<_>>().len();
        self.notifier.status(&format!("serving {models} models"));
        info!(models, failed = failed.len(), ms = started.elapsed().as_millis() as u64, "ready");
        Ok(())
    }

    /// Reads the configuration again and puts in force what can change without a restart. Anything wrong keeps the old one.
    async fn reload(&self) {
        self.notifier.reloading();
        let outcome = match config::load(self.options.config.as_deref(), &self.options.overrides) {
            Ok(next) => self.apply(next).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => self.metrics.reloads.with_label_values(&["applied"]).inc(),
            Err(error) => {
                error!(%error, "reload refused; the configuration in force stays");
                self.metrics.reloads.with_label_values(&["refused"]).inc();
            }
        }
        self.notifier.ready();
    }

    async fn apply(&self, next: Config) -> Result<()> {
        let current = self.config.get();
        let changes = config::diff(&current, &next);
        for change in &changes {
            info!(%change, "reload");
        }
        for warning in &next.warnings {
            warn!("{warning}");
        }
        if next.log != current.log {
            self.log.set(&next.log.filter)?;
        }
        // What may still be refused comes first: then nothing else has changed.
        let watched = settings::alerts(&next, relay::clients(&next.upstream)?)?;
        self.registry.replace_fixed(next.fixed.clone())?;
        if let Some(alerts) = &self.alerts {
            alerts.reconfigure(watched).await?;
        }
        // A model that is new must be known to be on its way before the first call for it comes in; one that is gone must be
        // answered until it is retired. Both hold when the snapshot changes first and the fleet follows.
        self.vault.replace(next.auth.clone());
        self.config.set(next);
        let report = self.devices.reconcile(&self.config.get()).await?;
        pages::enlarge();
        for (model, outcome) in &report {
            match outcome {
                Outcome::Failed(error) => error!(%model, %error, "reload: model not loaded, what was there stays"),
                other => info!(%model, outcome = ?other, "reload"),
            }
        }
        info!(changes = changes.len(), failed = failures(&report).len(), "reload done");
        Ok(())
    }

    /// Writes what every floor is doing to the log.
    async fn dump(&self) {
        for status in self.devices.status().await {
            match status {
                Ok(status) => {
                    let state = serde_json::to_string(&status).unwrap_or_default();
                    info!(phase = ?*self.phase.borrow(), device = %status.device, %state, "state");
                }
                Err(error) => error!(%error, "state: device"),
            }
        }
        let health = serde_json::to_string(&self.ledger.health()).unwrap_or_default();
        info!(%health, "state: the ledger's disk");
        let today = Millis::now().day();
        match self.ledger.rows(ledger::Filter::days(today, today)).await {
            Ok(rows) => {
                for (day, who, row) in rows {
                    let (who, row) = (json(&who), json(&row));
                    info!(day = day.0, %who, %row, "state: ledger");
                }
            }
            Err(error) => error!(%error, "state: ledger"),
        }
    }

    /// From the top floor down, under one deadline. A second signal cuts off what is still open.
    async fn drain(&self, signals: &mut Signals) {
        let limit = self.config.get().server.drain_timeout;
        let deadline = Instant::now() + limit;
        info!(limit_s = limit.as_secs(), "draining: no new calls, open ones may finish");
        self.phase.send_replace(Phase::Draining);
        self.notifier.stopping();
        let mut closed = pin!(join_all(self.servers.iter().map(|server| server.stop(true))));
        let hurried = tokio::select! {
            _ = &mut closed => false,
            () = tokio::time::sleep_until(deadline.into()) => true,
            () = hurry(signals) => true,
        };
        if hurried {
            // Failing the sequences ends their streams with an error event; the servers are then left behind.
            warn!("cutting off what is still open");
            self.devices.drain(Instant::now()).await;
            let _ = tokio::time::timeout(LAST_WORDS, closed).await;
        } else {
            self.devices.drain(deadline).await;
        }
        if let Some(alerts) = &self.alerts
            && let Err(error) = alerts.flush().await
        {
            error!(%error, "alerts");
        }
        self.cache.flush().await;
        self.logs.close(LOGS_LAST).await;
        // Last: whatever ended above was settled.
        match tokio::time::timeout(LEDGER_LAST, self.ledger.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%error, "the ledger"),
            Err(_) => error!("the ledger's disk takes too long: what is not written is lost"),
        }
        info!("drained");
    }
}

/// Waits for a second request to drain, ignoring everything else.
async fn hurry(signals: &mut Signals) {
    while signals.next().await != Signal::Hurry {}
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn failures(report: &Report) -> Vec<String> {
    let failed = report.iter().filter_map(|(_, outcome)| match outcome {
        Outcome::Failed(error) => Some(error.message().to_owned()),
        _ => None,
    });
    failed.collect()
}

/// Starts the API and, if configured, the AI-binding listener, each on the socket that systemd opened for it or on its own.
fn listen(config: &Config, services: &Services) -> Result<Vec<ServerHandle>> {
    let mut inherited = signal::inherited_listeners()
        .map_err(|error| Error::internal(format!("socket activation: {error}")).with_source(error))?;
    let mut wanted = vec![(Listener::Api, config.server.listen)];
    wanted.extend(config.binding.as_ref().map(|binding| (Listener::Binding, binding.listen)));
    let mut servers = Vec::new();
    for (listener, address) in wanted {
        let ours = inherited.iter().position(|socket| (socket.name == "binding") == (listener == Listener::Binding));
        let socket = match ours {
            Some(index) => inherited.swap_remove(index).listener,
            None => bind(address)?,
        };
        let local = socket.local_addr().unwrap_or(address);
        let server = http::start(services.clone(), socket, listener)?;
        servers.push(server.handle());
        rt::spawn(server);
        info!(address = %local, ?listener, "listening");
    }
    Ok(servers)
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let open = || -> std::io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    };
    open().map_err(|error| {
        Error::internal(format!(
            "server.listen = \"{address}\": {error}. Is another daemon running? Choose another port."
        ))
        .with_source(error)
    })
}
