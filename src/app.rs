//! Builds the house floor by floor, listens to signals, drains it from the top, exits.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::dev::ServerHandle;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::base::{DeviceId, Error, Phase, Result};
use crate::config::{self, Config, Live, Overrides};
use crate::gateway::Gateway;
use crate::http::{self, Listener, Services};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::signal::{self, Notifier, Signal, Signals};
use crate::supervisor::{FleetView, Outcome, Report, Supervisor};
use crate::telemetry::{self, LogControl};
use crate::vault::Vault;

/// How often the ledger and the devices are looked at.
const PULSE: Duration = Duration::from_secs(1);
/// A device whose thread has not come round its loop for this long is taken for hung: the watchdog is not fed any more.
const HUNG: Duration = Duration::from_secs(120);

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
    let config = config::load(options.config.as_deref(), &options.overrides)?;
    let log = telemetry::init(&config.log)?;
    actix_web::rt::System::new().block_on(async move {
        let mut app = App::build(options, config, log).await?;
        Ok(app.run().await)
    })
}

/// The house: every floor's handle, top to bottom.
struct App {
    options: Options,
    log: LogControl,
    servers: Vec<ServerHandle>,
    config: Live,
    vault: Vault,
    device: Supervisor,
    ledger: Ledger,
    metrics: Arc<Metrics>,
    phase: watch::Sender<Phase>,
    signals: Signals,
    notifier: Notifier,
}

impl App {
    async fn build(options: Options, config: Config, log: LogControl) -> Result<Self> {
        let signals =
            Signals::new().map_err(|error| Error::internal("signals cannot be handled").with_source(error))?;
        let notifier = Notifier::from_env();
        for warning in &config.warnings {
            warn!("{warning}");
        }
        let metrics = Arc::new(Metrics::new());
        let ledger = Ledger::start();
        let fleet = FleetView::default();
        let device = Supervisor::start(DeviceId(0), config.engine.threads, fleet.clone(), metrics.clone())?;
        let vault = Vault::new(config.auth.clone());
        let (phase, phase_view) = watch::channel(Phase::Starting);
        let live = Live::new(config);
        let config = live.get();

        let gateway =
            Gateway { config: live.clone(), fleet: fleet.clone(), ledger: ledger.clone(), metrics: metrics.clone() };
        let services = Services {
            config: live.clone(),
            gateway,
            fleet,
            vault: vault.clone(),
            metrics: metrics.clone(),
            phase: phase_view,
        };
        let servers = listen(&config, &services)?;
        let mut app =
            Self { options, log, servers, config: live, vault, device, ledger, metrics, phase, signals, notifier };
        app.load_models(&config).await?;
        Ok(app)
    }

    /// Loads what is configured; the listeners answer already, with readiness off.
    async fn load_models(&mut self, config: &Config) -> Result<()> {
        self.notifier.status("loading models");
        let started = Instant::now();
        let report = self.device.reconcile(config.models.clone(), config.engine.clone()).await?;
        let failed = failures(&report);
        if !failed.is_empty() && failed.len() == report.len() {
            return Err(Error::internal(format!("No configured model could be loaded: {}", failed.join("; "))));
        }
        self.phase.send_replace(Phase::Ready);
        self.notifier.ready();
        self.notifier.status(&format!("serving {} models", report.len() - failed.len()));
        info!(
            models = report.len() - failed.len(),
            failed = failed.len(),
            ms = started.elapsed().as_millis() as u64,
            "ready"
        );
        Ok(())
    }

    async fn run(&mut self) -> Ended {
        let mut pulse = interval(PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = interval(self.notifier.watchdog_interval().unwrap_or(PULSE));
        watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                signal = self.signals.next() => match signal {
                    Signal::Drain | Signal::Hurry => {
                        self.drain().await;
                        return Ended::Drained;
                    }
                    Signal::Reload => self.reload().await,
                    Signal::Dump => self.dump().await,
                    Signal::LogLevel => {
                        let filter = self.log.cycle();
                        warn!(filter, "log filter changed");
                    }
                },
                _ = pulse.tick() => {
                    if !self.ledger.is_alive() {
                        error!("the ledger died; draining, the process has to start again");
                        self.drain().await;
                        return Ended::LedgerLost;
                    }
                }
                _ = watchdog.tick() => {
                    if self.device.silent_for() < HUNG {
                        self.notifier.ping();
                    } else {
                        error!(silent_s = self.device.silent_for().as_secs(), "a device hangs; the watchdog is not fed");
                    }
                }
            }
        }
    }

    /// Reads the configuration again and puts in force what can change without a restart. Anything wrong keeps the old one.
    async fn reload(&mut self) {
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

    async fn apply(&mut self, next: Config) -> Result<()> {
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
        // A model that is new must be known to be on its way before the first call for it comes in; one that is gone must be
        // answered until it is retired. Both hold when the snapshot changes first and the fleet follows.
        let (models, engine) = (next.models.clone(), next.engine.clone());
        self.vault.replace(next.auth.clone());
        self.config.set(next);
        let report = self.device.reconcile(models, engine).await?;
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
        match self.device.status().await {
            Ok(status) => {
                let state = serde_json::to_string(&status).unwrap_or_default();
                info!(phase = ?*self.phase.borrow(), device = %status.device, %state, "state");
            }
            Err(error) => error!(%error, "state: device"),
        }
        match self.ledger.rows().await {
            Ok(rows) => {
                for (day, account, model, row) in rows {
                    let row = serde_json::to_string(&row).unwrap_or_default();
                    info!(day = day.0, %account, %model, %row, "state: ledger");
                }
            }
            Err(error) => error!(%error, "state: ledger"),
        }
    }

    /// From the top floor down, under one deadline. A second signal cuts off what is still open.
    async fn drain(&mut self) {
        let limit = self.config.get().server.drain_timeout;
        let deadline = Instant::now() + limit;
        info!(limit_s = limit.as_secs(), "draining: no new calls, open ones may finish");
        self.phase.send_replace(Phase::Draining);
        self.notifier.stopping();
        let stop_all = futures_util::future::join_all(self.servers.iter().map(|server| server.stop(true)));
        let hurried = tokio::select! {
            _ = stop_all => false,
            () = tokio::time::sleep_until(deadline.into()) => true,
            () = hurry(&mut self.signals) => true,
        };
        if hurried {
            warn!("cutting off what is still open");
            futures_util::future::join_all(self.servers.iter().map(|server| server.stop(false))).await;
        }
        self.device.drain(if hurried { Instant::now() } else { deadline }).await;
        info!("drained");
    }
}

/// Waits for a second request to drain, ignoring everything else.
async fn hurry(signals: &mut Signals) {
    while signals.next().await != Signal::Hurry {}
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
        actix_web::rt::spawn(server);
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
