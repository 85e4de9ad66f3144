//! Signals in, service-manager notifications out, sockets handed over at start.
//!
//!     TERM INT HUP USR1 USR2 --Signals--> app            app --Notifier--> $NOTIFY_SOCKET (systemd, or nobody)
//!     $LISTEN_FDS --inherited_listeners--> app
//!
//! Decides nothing: what a drain or a reload is, `app` knows. Written on plain system calls, since the protocol is a line of
//! text in a datagram.

use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{self, SignalKind};

/// What an operator asks of a running daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// TERM or INT: finish what runs, then leave.
    Drain,
    /// TERM or INT once more: leave now.
    Hurry,
    /// HUP: read the configuration again.
    Reload,
    /// USR1: write the state to the log.
    Dump,
    /// USR2: next log level.
    LogLevel,
}

/// The signals of this process, in the order they come. A signal that comes twice before it is read may be seen once.
pub struct Signals {
    term: unix::Signal,
    int: unix::Signal,
    hup: unix::Signal,
    usr1: unix::Signal,
    usr2: unix::Signal,
    draining: bool,
}

impl Signals {
    /// Takes over TERM, INT, HUP, USR1 and USR2. From here on none of them ends the process by itself.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled, as tokio does.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            term: unix::signal(SignalKind::terminate())?,
            int: unix::signal(SignalKind::interrupt())?,
            hup: unix::signal(SignalKind::hangup())?,
            usr1: unix::signal(SignalKind::user_defined1())?,
            usr2: unix::signal(SignalKind::user_defined2())?,
            draining: false,
        })
    }

    /// The next signal. Losing the race of a `select!` loses no signal.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.term.recv() => self.drain(),
            _ = self.int.recv() => self.drain(),
            _ = self.hup.recv() => Signal::Reload,
            _ = self.usr1.recv() => Signal::Dump,
            _ = self.usr2.recv() => Signal::LogLevel,
        }
    }

    fn drain(&mut self) -> Signal {
        if std::mem::replace(&mut self.draining, true) { Signal::Hurry } else { Signal::Drain }
    }
}

/// Tells the service manager where the process is in its life. Without one every method does nothing.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The manager that `NOTIFY_SOCKET` names (a path, or `@name` for an abstract one), with the watchdog of `WATCHDOG_USEC`
    /// if it is meant for this process.
    pub fn from_env() -> Self {
        let address = std::env::var_os("NOTIFY_SOCKET");
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| for_us);
        Self::new(address.as_deref().map(OsStrExt::as_bytes), watchdog)
    }

    fn new(address: Option<&[u8]>, watchdog_usec: Option<u64>) -> Self {
        let open = |address: &[u8]| -> io::Result<_> {
            let address = match address.strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name)?,
                None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(address))?,
            };
            let socket = UnixDatagram::unbound()?;
            // A manager that does not read must not stop the daemon: what does not fit is lost.
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        };
        let socket = address.filter(|address| !address.is_empty()).and_then(|address| {
            open(address).map_err(|error| tracing::warn!(%error, "NOTIFY_SOCKET cannot be used")).ok()
        });
        let watchdog = watchdog_usec.filter(|&usec| usec > 0).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// Serving. Also ends a reload.
    pub fn ready(&self) {
        self.send("READY=1\n");
    }

    /// Reading the configuration again; [`Notifier::ready`] follows, whether it was taken or refused.
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}\n", monotonic_usec()));
    }

    /// Draining.
    pub fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    /// One line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.send(&format!("STATUS={}\n", line.replace('\n', " ")));
    }

    /// Asks for more time than the unit allows for what goes on now (start, reload or stop).
    pub fn extend(&self, by: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}\n", by.as_micros()));
    }

    /// How often to [`Notifier::ping`]: half of what the manager waits. `None` when it does not watch.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|limit| limit / 2)
    }

    /// Alive. Call it only when that is true of what serves, not of the timer that calls.
    pub fn ping(&self) {
        self.send("WATCHDOG=1\n");
    }

    fn send(&self, text: &str) {
        let Some((socket, address)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(text.as_bytes(), address) {
            tracing::debug!(%error, text, "the service manager was not told");
        }
    }
}

/// CLOCK_MONOTONIC in microseconds: systemd tells by it which reload an answer belongs to.
fn monotonic_usec() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the whole call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// A listening socket that the service manager opened for us.
#[derive(Debug)]
pub struct Inherited {
    /// `FileDescriptorName=` of its socket unit: `binding` for the AI binding, anything else for the API.
    pub name: String,
    /// The socket, not inherited by children.
    pub listener: TcpListener,
}

/// The sockets of `LISTEN_FDS`; none when there is no such variable or it is meant for another process. To be called once:
/// a second call gives none, since the sockets have their owner by then.
///
/// # Errors
/// When one of them is not a listening TCP socket.
pub fn inherited_listeners() -> io::Result<Vec<Inherited>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let count = number("LISTEN_FDS").unwrap_or(0);
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    // SAFETY: the manager passes descriptors 3 and up to this process for it to own, and `TAKEN` lets one caller have them.
    unsafe { adopt(3, count, &names) }
}

/// Makes listeners of `count` descriptors from `first` on, named by `names` (`a:b`).
///
/// # Safety
/// The descriptors must have no other owner.
unsafe fn adopt(first: RawFd, count: u32, names: &str) -> io::Result<Vec<Inherited>> {
    let mut names = names.split(':');
    let mut listeners = Vec::new();
    for fd in first..first.saturating_add_unsigned(count) {
        let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned();
        // SAFETY: only asks whether the descriptor is open and sets its flag.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(refused(&name, fd, "is not open"));
        }
        // SAFETY: it is open, and by this function's contract nobody else's.
        let socket = socket2::Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let address = socket.local_addr().ok().and_then(|address| address.as_socket());
        if address.is_none() || socket.r#type().ok() != Some(socket2::Type::STREAM) {
            return Err(refused(&name, fd, "is not a TCP socket"));
        }
        if socket.peer_addr().is_ok() {
            return Err(refused(&name, fd, "is a connection, not a listener: set Accept=no in its socket unit"));
        }
        listeners.push(Inherited { name, listener: socket.into() });
    }
    Ok(listeners)
}

fn refused(name: &str, fd: RawFd, why: &str) -> io::Error {
    io::Error::other(format!("inherited socket {name:?} (descriptor {fd}) {why}"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    fn check(manager: &UnixDatagram, address: &[u8]) {
        manager.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let notifier = Notifier::new(Some(address), Some(3_000_000));
        assert_eq!(notifier.watchdog_interval(), Some(Duration::from_millis(1500)));
        notifier.ready();
        assert_eq!(heard(manager), "READY=1\n");
        notifier.status("2 models,\nall well");
        assert_eq!(heard(manager), "STATUS=2 models, all well\n");
        let before = monotonic_usec();
        notifier.reloading();
        let reloading = heard(manager);
        let usec: u64 = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim_end().parse().unwrap();
        assert!(usec >= before && usec <= monotonic_usec(), "{reloading}");
        notifier.extend(Duration::from_secs(2));
        assert_eq!(heard(manager), "EXTEND_TIMEOUT_USEC=2000000\n");
        notifier.ping();
        assert_eq!(heard(manager), "WATCHDOG=1\n");
        notifier.stopping();
        assert_eq!(heard(manager), "STOPPING=1\n");
    }

    #[test]
    fn the_manager_hears_every_state_on_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        check(&manager, path.as_os_str().as_bytes());
    }

    #[test]
    fn the_manager_hears_every_state_on_an_abstract_name() {
        let name = format!("neurond-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        check(&manager, format!("@{name}").as_bytes());
    }

    #[test]
    fn without_a_manager_or_with_a_dead_one_nothing_happens() {
        for address in [None, Some(&b""[..]), Some(b"/nowhere/at/all"), Some(&[b'/'; 300])] {
            let notifier = Notifier::new(address, None);
            notifier.ready();
            assert_eq!(notifier.watchdog_interval(), None);
        }
        assert_eq!(Notifier::new(None, Some(0)).watchdog_interval(), None, "0 would ask for endless pings");
    }

    #[test]
    fn a_manager_that_does_not_read_does_not_stop_us() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str().as_bytes()), None);
        (0..10_000).for_each(|_| notifier.ping());
    }

    #[test]
    fn inherited_sockets_are_listeners_with_their_names() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let fd = listener.into_raw_fd();
        // SAFETY: the listener gave its descriptor up.
        let inherited = unsafe { adopt(fd, 1, "binding:more") }.unwrap();
        assert_eq!(inherited[0].name, "binding");
        assert_eq!(inherited[0].listener.local_addr().unwrap(), address);
        std::net::TcpStream::connect(address).unwrap();
        inherited[0].listener.accept().unwrap();
    }

    #[test]
    fn what_is_not_a_tcp_listener_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(folder.path().join("f")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for (fd, why) in [(file.into_raw_fd(), "is not a TCP socket"), (connection.into_raw_fd(), "is a connection")] {
            // SAFETY: its owner gave the descriptor up.
            let error = unsafe { adopt(fd, 1, "") }.unwrap_err().to_string();
            assert!(error.starts_with("inherited socket \"unknown\"") && error.contains(why), "{error}");
        }
        // SAFETY: nothing is open there, so nothing is owned.
        assert!(unsafe { adopt(1_000_000, 1, "x") }.unwrap_err().to_string().contains("is not open"));
        assert!(inherited_listeners().unwrap().is_empty(), "this test was not started by a manager");
    }

    #[test]
    fn signals_arrive_as_what_they_ask_for() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = Signals::new().unwrap();
            for (number, asked) in [
                (libc::SIGHUP, Signal::Reload),
                (libc::SIGUSR1, Signal::Dump),
                (libc::SIGUSR2, Signal::LogLevel),
                (libc::SIGINT, Signal::Drain),
                (libc::SIGTERM, Signal::Hurry),
                (libc::SIGHUP, Signal::Reload),
            ] {
                // SAFETY: a signal to ourselves, whose handler was installed above.
                assert_eq!(unsafe { libc::raise(number) }, 0);
                let heard = tokio::time::timeout(Duration::from_secs(5), signals.next()).await.unwrap();
                assert_eq!(heard, asked);
            }
        });
    }
}
