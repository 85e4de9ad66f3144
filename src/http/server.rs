//! The sockets: workers, timeouts, and what a connection must put up with.

use std::any::Any;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::{Extensions, Server};
use actix_web::rt::net::TcpStream;
use actix_web::{App, HttpServer, rt, web};
use prometheus::IntGauge;
use socket2::SockRef;

use crate::base::{Error, Result};
use crate::gateway::relay::Relay;
use crate::http::observe::{InFlight, Requests};
use crate::http::{Door, KnownPhase, Listener, Services, handle, local};
use crate::net::client::Client;

/// How long an idle connection is kept. Longer than common load balancers do (60 s), so that they close first.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How often idle upstream connections are looked at.
const TENDED_EVERY: Duration = Duration::from_secs(5);
/// How long a closing connection may take to read its last bytes.
const LAST_BYTES: Duration = Duration::from_secs(3);

/// Serves on a socket that is bound already (ours, or handed over by systemd). Must be called on a runtime; the server
/// runs while the returned future is polled, and `handle().stop(true)` drains it: the socket closes, idle connections
/// close, what is being answered ends well, and after the configured drain timeout what is left is cut off.
///
/// Whoever drains sets the phase to `Draining` first, so that requests on kept-alive connections are sent elsewhere.
///
/// # Errors
/// If the socket cannot be listened on.
pub fn start(services: Services, socket: TcpListener, listener: Listener) -> Result<Server> {
    let config = services.config.get().server.clone();
    let connections = Connections { gauge: services.metrics.http_connections.clone(), patience: config.write_timeout };
    let in_flight = InFlight::default();
    let workers = config.workers.max(1);
    let server = HttpServer::new(move || {
        // On each worker's own thread: connections to upstreams never change hands.
        let services = services.clone();
        let client = Client::new(services.clients.clone());
        rt::spawn(tend(client.clone(), services.metrics.upstream_idle.clone()));
        let relay = Rc::new(Relay::new(services.relays.clone(), client, local::engine(services.clone())));
        let requests = Rc::new(Requests::new(&services.metrics));
        let phase = KnownPhase::new(services.phase.clone());
        let door = Door { services, relay, listener, in_flight: in_flight.clone(), requests, phase };
        App::new().app_data(web::Data::new(door)).default_service(web::to(handle))
    })
    .workers(workers)
    // Counted by worker; more wait in the accept queue.
    .max_connections(config.max_connections.div_ceil(workers).max(1))
    .keep_alive(KEEP_ALIVE)
    .client_request_timeout(config.read_timeout)
    .client_disconnect_timeout(LAST_BYTES)
    // A client that closes its side is gone: its call is cancelled, whether it was waiting or streaming.
    .h1_allow_half_closed(false)
    .on_connect(move |socket, extensions| connections.opened(socket, extensions))
    .shutdown_timeout(config.drain_timeout.as_secs_f64().ceil() as u64)
    .disable_signals()
    .listen(socket)
    .map_err(|error| Error::internal("the HTTP socket cannot be used").with_source(error))?;
    Ok(server.run())
}

/// Closes upstream connections that nobody used for long, and counts the others.
async fn tend(client: Client, idle: IntGauge) {
    let mut known = 0;
    loop {
        rt::time::sleep(TENDED_EVERY).await;
        client.sweep();
        let now = client.idle_connections() as i64;
        idle.add(now - known);
        known = now;
    }
}

#[derive(Clone)]
struct Connections {
    gauge: IntGauge,
    patience: Duration,
}

/// Counts a connection for as long as it lives.
struct Open(IntGauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Connections {
    fn opened(&self, socket: &dyn Any, extensions: &mut Extensions) {
        self.gauge.inc();
        extensions.insert(Arc::new(Open(self.gauge.clone())));
        let Some(socket) = socket.downcast_ref::<TcpStream>() else { return };
        let socket = SockRef::from(socket);
        // A token is worth sending at once, however small.
        let nodelay = socket.set_tcp_nodelay(true);
        // A client that takes nothing would hold its stream's memory for ever: the kernel cuts it off.
        let timeout = socket.set_tcp_user_timeout(Some(self.patience));
        if let Err(error) = nodelay.and(timeout) {
            tracing::debug!(%error, "a socket option was not taken");
        }
    }
}
