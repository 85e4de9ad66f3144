//! A server that answers as the providers do, and misbehaves as they do when it is told to.
//!
//!     test --script--> behaviours ---------.
//!     client --> connection --request--> route --provider's shape--> answer --deliver--> connection
//!                     '-- seen: what came, when, and who hung up before the end
//!
//! Runs on threads of its own, listens on loopback, and stops when it is dropped. What can go wrong is in `behaviour.rs`:
//! told by a script for the next requests under a path, or by the request's own header `x-fake`. The paths are the
//! providers', behind a first part that names one: `http://127.0.0.1:…/anthropic/v1/messages`.
//!
//! Other programs than tests reach the same through `/_fake/…` (`control.rs`). It checks no keys and no signatures.

// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

mod answer;
mod anthropic;
mod ask;
mod bedrock;
pub mod behaviour;
mod connection;
mod control;
mod deliver;
pub mod frames;
mod google;
mod openai;
mod others;
mod route;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::watch;

use behaviour::Behaviour;
use connection::{Connection, Request};
use deliver::{Delivery, End};

/// How long [`Upstream::until`] waits before it gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running server.
pub struct Upstream {
    pub address: SocketAddr,
    house: Arc<House>,
    stop: Option<watch::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

/// Settings of a server.
pub struct Options {
    pub listen: SocketAddr,
    /// Each with its own listener on the same port.
    pub threads: usize,
    /// Requests are remembered.
    pub record: bool,
    /// Every request is answered with so many bytes at once: as fast as it goes.
    pub fixed: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 0)), threads: 1, record: true, fixed: None }
    }
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub id: u64,
    pub method: String,
    pub path: String,
    pub query: Option<String>,
    /// In order, with the names as they were written.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// When all of it was here.
    pub at: Instant,
    /// Which connection it came over, counted from 1.
    pub connection: u64,
    /// When the answer was sent to its end, or broken off as it was told to.
    pub answered: Option<Instant>,
    pub closed_early: Option<ClosedEarly>,
}

/// The client hung up before the end of the answer.
#[derive(Clone, Copy, Debug)]
pub struct ClosedEarly {
    pub at: Instant,
    /// Chunks of text that were sent before.
    pub chunks: usize,
}

impl Seen {
    /// The first value under this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a body of JSON")
    }
}

/// What all connections share.
struct House {
    record: bool,
    fixed: Option<Bytes>,
    seen: Mutex<Vec<Seen>>,
    scripts: Mutex<Vec<(String, VecDeque<Behaviour>)>>,
    scripted: AtomicBool,
    open: AtomicUsize,
    accepted: AtomicU64,
    next: AtomicU64,
}

impl Upstream {
    pub fn start() -> Self {
        Self::with(Options::default()).expect("loopback has a free port")
    }

    /// # Errors
    /// If the address cannot be listened on.
    pub fn with(options: Options) -> io::Result<Self> {
        let house = Arc::new(House {
            record: options.record,
            fixed: options.fixed.map(fixed_answer),
            seen: Mutex::default(),
            scripts: Mutex::default(),
            scripted: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
            next: AtomicU64::new(0),
        });
        let (stop, _) = watch::channel(());
        let first = listen(options.listen, options.threads > 1)?;
        let address = first.local_addr()?;
        let mut listeners = vec![first];
        for _ in 1..options.threads.max(1) {
            listeners.push(listen(address, true)?);
        }
        let threads = listeners.into_iter().map(|listener| {
            let (house, stop) = (house.clone(), stop.subscribe());
            std::thread::spawn(move || serve(listener, house, stop))
        });
        let threads = threads.collect();
        Ok(Self { address, house, stop: Some(stop), threads })
    }

    /// `http://127.0.0.1:…`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The base of one provider: `http://127.0.0.1:…/openai`.
    pub fn base(&self, provider: &str) -> String {
        format!("http://{}/{provider}", self.address)
    }

    /// Says what happens to the next requests whose path begins like this, one behaviour a request, behind those of
    /// earlier scripts for the same path. A request's own `x-fake` comes first and uses up none.
    pub fn script<B: Into<Behaviour>>(&self, path_prefix: &str, behaviours: impl IntoIterator<Item = B>) {
        self.house.script(path_prefix, behaviours.into_iter().map(Into::into));
    }

    /// Behaviours of scripts that were not used.
    pub fn scripted(&self) -> usize {
        self.house.scripts.lock().iter().map(|(_, left)| left.len()).sum()
    }

    /// All requests so far, in the order in which they were complete.
    pub fn requests(&self) -> Vec<Seen> {
        self.house.seen.lock().clone()
    }

    /// How many there were.
    pub fn count(&self) -> usize {
        self.house.seen.lock().len()
    }

    /// Forgets requests and scripts.
    pub fn clear(&self) {
        self.house.clear();
    }

    /// Connections that are open now.
    pub fn open(&self) -> usize {
        self.house.open.load(Ordering::Relaxed)
    }

    /// Connections that there ever were.
    pub fn accepted(&self) -> u64 {
        self.house.accepted.load(Ordering::Relaxed)
    }

    /// Waits until something holds of the requests so far, and returns them. `what` is for the panic when it never does.
    pub async fn until(&self, what: &str, holds: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.requests();
            if holds(&seen) {
                return seen;
            }
            assert!(Instant::now() < deadline, "upstream: never {what}: {seen:#?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until a client has hung up on that many answers, and returns those requests.
    pub async fn until_closed_early(&self, count: usize) -> Vec<Seen> {
        let closed = |seen: &&Seen| seen.closed_early.is_some();
        let what = format!("{count} answers that were not waited for");
        let seen = self.until(&what, |seen| seen.iter().filter(closed).count() >= count).await;
        seen.into_iter().filter(|seen| seen.closed_early.is_some()).collect()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl House {
    fn script(&self, prefix: &str, behaviours: impl Iterator<Item = Behaviour>) {
        let mut scripts = self.scripts.lock();
        let at = scripts.iter().position(|(have, _)| have == prefix).unwrap_or_else(|| {
            scripts.push((prefix.to_owned(), VecDeque::new()));
            scripts.len() - 1
        });
        scripts[at].1.extend(behaviours);
        self.scripted.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.seen.lock().clear();
        self.scripts.lock().clear();
    }

    /// What is to be done with this request.
    fn behaviour(&self, request: &Request) -> Result<Behaviour, String> {
        if let Some(text) = request.header("x-fake") {
            return Behaviour::parse(text);
        }
        if !self.scripted.load(Ordering::Acquire) {
            return Ok(Behaviour::default());
        }
        let mut scripts = self.scripts.lock();
        let mine = scripts.iter_mut().find(|(prefix, left)| !left.is_empty() && request.path.starts_with(prefix));
        Ok(mine.and_then(|(_, left)| left.pop_front()).unwrap_or_default())
    }

    fn note(&self, request: &Request, connection: u64) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        if self.record {
            let Request { method, path, query, headers, body } = request.clone();
            let (at, answered, closed_early) = (Instant::now(), None, None);
            self.seen.lock().push(Seen {
                id,
                method,
                path,
                query,
                headers,
                body,
                at,
                connection,
                answered,
                closed_early,
            });
        }
        id
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Seen)) {
        if self.record {
            self.seen.lock().iter_mut().rev().find(|seen| seen.id == id).map(change);
        }
    }
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// A chat completion with as much text as makes it so long.
fn fixed_answer(bytes: usize) -> Bytes {
    let body = |text: &str| {
        format!(
            "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"gpt-4o-mini\",\"choices\":[{{\
             \"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}],\
             \"usage\":{{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}}}}"
        )
    };
    let body = body(&"x".repeat(bytes.saturating_sub(body("").len())));
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    Bytes::from(head + &body)
}

/// Accepts until it is told to stop; then all its connections are dropped with the runtime.
fn serve(listener: std::net::TcpListener, house: Arc<House>, mut stop: watch::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener).expect("a listener that does not block");
        loop {
            tokio::select! {
                _ = stop.changed() => return,
                accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                    let number = house.accepted.fetch_add(1, Ordering::Relaxed) + 1;
                    tokio::spawn(converse(Connection::new(socket, number), house.clone()));
                },
            }
        }
    });
}

async fn converse(mut connection: Connection, house: Arc<House>) {
    let _open = Open::new(house.clone());
    // An error is a client that left, or one that speaks no HTTP: nothing to answer either way.
    let end = match &house.fixed {
        Some(answer) => repeat(&mut connection, answer).await,
        None => answer_all(&mut connection, &house).await,
    };
    match end {
        Ok(End::Reset) => connection.reset(),
        Ok(_) => connection.finish().await,
        Err(_) => {}
    }
}

async fn repeat(connection: &mut Connection, answer: &[u8]) -> io::Result<End> {
    while let Some(frame) = connection.next().await? {
        connection.skip(&frame).await?;
        connection.send(answer).await?;
        if frame.last {
            break;
        }
    }
    Ok(End::Close)
}

async fn answer_all(connection: &mut Connection, house: &Arc<House>) -> io::Result<End> {
    while let Some(frame) = connection.next().await? {
        let request = connection.take(&frame).await?;
        let (answer, behaviour, id) = if let Some(answer) = control::answer(&request, house) {
            (answer, Behaviour::default(), None)
        } else {
            let id = house.note(&request, connection.number);
            match house.behaviour(&request) {
                Ok(behaviour) => (route::answer(&request, &behaviour), behaviour, Some(id)),
                Err(why) => (control::refusal(&why), Behaviour::default(), Some(id)),
            }
        };
        let head_only = request.method == "HEAD";
        let (behaviour, last) = (&behaviour, frame.last);
        let mut delivery = Delivery { connection, behaviour, head_only, last, sent: 0 };
        let outcome = delivery.run(answer).await;
        let chunks = delivery.sent;
        if let Some(id) = id {
            let at = Instant::now();
            house.change(id, |seen| match &outcome {
                Ok(_) => seen.answered = Some(at),
                Err(_) => seen.closed_early = Some(ClosedEarly { at, chunks }),
            });
        }
        match outcome? {
            End::Next => {}
            End::CloseAtNext => {
                connection.until_more().await;
                return Ok(End::Close);
            }
            end => return Ok(end),
        }
    }
    Ok(End::Close)
}

/// A connection counts as open while this lives.
struct Open(Arc<House>);

impl Open {
    fn new(house: Arc<House>) -> Self {
        house.open.fetch_add(1, Ordering::Relaxed);
        Self(house)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
