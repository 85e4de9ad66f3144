//! Calls to other servers over HTTP/1.1, from one HTTP worker: its own pool of connections, no lock, no other thread.
//!
//!     Request --> idle connection, or a new one: name -> addresses --allowed?--> TCP (--> proxy) --> TLS
//!                      |                |
//!                      |                +-- one ahead, while calls to a server overlap: streams that hold on to theirs leave none
//!                      |                    behind, and each would begin with handshakes
//!                      |
//!                 Response: head, then a body that is read no faster than its reader asks; dropped, it hangs up
//!
//! HTTP/1.1 on purpose: one connection a call means that a slow reader slows its own call only, and that hanging up is
//! heard at once. Redirects are not followed, bodies are not decompressed: what came is handed on as it came.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant as TokioInstant, Sleep, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use crate::base::Lookup;
use crate::net::gather::Gather;

/// Answer heads longer than this are refused.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// A connection that was not used for this long is closed: shorter than servers commonly keep theirs.
const IDLE: Duration = Duration::from_secs(50);
/// How long after the head of an answer a connection ahead is begun: its handshakes would delay what follows the head.
const AHEAD_AFTER: Duration = Duration::from_millis(5);
/// Idle connections kept to one server by one worker.
const MAX_IDLE: usize = 256;

/// What holds for every call of a client.
#[derive(Clone, Debug)]
pub struct Settings {
    /// From looking up the name to the end of the TLS handshake.
    pub connect_timeout: Duration,
    /// Whether every server may be on a private address, not only those whose call says so.
    pub allow_private: bool,
    /// `host:port` of a proxy that is asked to CONNECT; `None`: servers are reached directly.
    pub proxy: Option<String>,
    /// What vouches for servers.
    pub tls: Tls,
}

/// Whose certificates are believed. Cheap to clone.
#[derive(Clone)]
pub struct Tls(Arc<ClientConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// The web's certificate authorities, and those of a PEM text besides.
    ///
    /// # Errors
    /// If the text holds no certificate, or one that cannot be read.
    pub fn new(more: Option<&str>) -> Result<Self, String> {
        let mut roots = rustls::RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        if let Some(pem) = more {
            let mut found = 0;
            for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                let certificate = certificate.map_err(|error| format!("is no PEM text: {error:?}"))?;
                roots.add(certificate).map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
                found += 1;
            }
            if found == 0 {
                return Err("holds no certificate".into());
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self(Arc::new(config)))
    }
}

/// A server as it is reached: scheme, host and port.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Host, and port where it is not the scheme's own: what the `Host` header says.
    pub authority: Authority,
}

// By their bytes: the library's own comparison goes letter by letter, since hosts are alike whatever their case. Two spellings of one
// host have two pools.
impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        self.tls == other.tls && self.authority.as_str() == other.authority.as_str()
    }
}

impl Eq for Origin {}

impl Hash for Origin {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.tls, self.authority.as_str()).hash(state);
    }
}

impl Origin {
    /// Of `http` or `https`.
    ///
    /// # Errors
    /// If the authority is none, or names a user.
    pub fn new(tls: bool, authority: &str) -> Result<Self, Fault> {
        let parsed = authority.parse::<Authority>().ok().filter(|_| !authority.contains('@'));
        let authority = parsed.ok_or_else(|| Fault::Refused(format!("`{authority}` is no host")))?;
        Ok(Self { tls, authority })
    }

    fn host(&self) -> &str {
        let host = self.authority.host();
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(if self.tls { 443 } else { 80 })
    }
}

/// What is sent to a server. Its body is whole, so that it can be made again.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Where to.
    pub origin: Arc<Origin>,
    /// As it is sent.
    pub method: Method,
    /// As it is sent, byte for byte.
    pub path: PathAndQuery,
    /// Without `Host` and `Content-Length`, which are added.
    pub headers: HeaderMap,
    /// As it is sent.
    pub body: Bytes,
    /// Whether the server may be on a private address.
    pub allow_private: bool,
}

/// An answer whose head has come.
pub struct Answer {
    /// As it came.
    pub status: StatusCode,
    /// As they came.
    pub headers: HeaderMap,
    /// What follows.
    pub body: AnswerBody,
}

/// Why a call brought no answer, or not all of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// We would not: the address is private, or none.
    Refused(String),
    /// No connection came about.
    Connect(String),
    /// The server went away, or did not speak HTTP.
    Broken(String),
    /// Nothing came for too long.
    Timeout(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Connect(why) => write!(f, "no connection: {why}"),
            Self::Broken(why) => write!(f, "connection broken: {why}"),
            Self::Timeout(what) => write!(f, "timeout: {what}"),
        }
    }
}

impl std::error::Error for Fault {}

/// One worker's client. Clones share the pool.
#[derive(Clone)]
pub struct Client {
    inner: Rc<Inner>,
}

struct Inner {
    settings: Settings,
    pools: RefCell<Lookup<Arc<Origin>, Rc<Pool>>>,
}

/// Connections to one server. Whoever calls it has a share in this.
#[derive(Default)]
struct Pool {
    idle: RefCell<Vec<Idle>>,
    /// Whether one more is on its way for a call that will come.
    opening: Cell<bool>,
}

struct Idle {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
    /// A connection to a private address serves only calls that may use one.
    private: bool,
}

impl Client {
    /// A client without connections.
    pub fn new(settings: Settings) -> Self {
        Self { inner: Rc::new(Inner { settings, pools: RefCell::default() }) }
    }

    /// Makes a call up to the head of its answer. The caller decides how long that may take.
    ///
    /// A kept connection that its server has closed meanwhile is not a failure: the call is made again on a new one.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn send(&self, call: &Attempt) -> Result<Answer, Fault> {
        let pool = self.pool(&call.origin);
        if let Some(idle) = pool.take(self.allows_private(call)) {
            let private = idle.private;
            match self.exchange(idle.sender, private, call, &pool).await {
                // Nothing was heard: the server closed while the request was on its way.
                Err(Lost::Silent(_)) => {}
                outcome => return outcome.map_err(Lost::fault),
            }
        }
        let (sender, private) = Box::pin(self.connect(&call.origin, self.allows_private(call))).await?;
        self.exchange(sender, private, call, &pool).await.map_err(Lost::fault)
    }

    /// Makes a handshake for another protocol on a connection of its own.
    ///
    /// # Errors
    /// See [`Fault`]; a server that answers in HTTP has refused.
    pub async fn upgrade(&self, call: &Attempt) -> Result<(HeaderMap, Upgraded), Fault> {
        let (mut sender, _) = self.connect(&call.origin, self.allows_private(call)).await?;
        let answer = sender.send_request(request(call)?).await.map_err(broken)?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Fault::Broken(format!("the handshake was answered with {}", answer.status())));
        }
        let headers = answer.headers().clone();
        Ok((headers, hyper::upgrade::on(answer).await.map_err(broken)?))
    }

    /// Connections that wait for a call.
    pub fn idle_connections(&self) -> usize {
        self.inner.pools.borrow().values().map(|pool| pool.idle.borrow().len()).sum()
    }

    /// Closes what has waited too long.
    pub fn sweep(&self) {
        self.inner.pools.borrow_mut().retain(|_, pool| {
            let mut waiting = pool.idle.borrow_mut();
            waiting.retain(|idle| idle.since.elapsed() < IDLE && !idle.sender.is_closed());
            !waiting.is_empty() || Rc::strong_count(pool) > 1
        });
    }

    fn pool(&self, origin: &Arc<Origin>) -> Rc<Pool> {
        let mut pools = self.inner.pools.borrow_mut();
        if let Some(pool) = pools.get(origin) {
            return Rc::clone(pool);
        }
        Rc::clone(pools.entry(Arc::clone(origin)).or_default())
    }

    fn allows_private(&self, call: &Attempt) -> bool {
        call.allow_private || self.inner.settings.allow_private
    }

    async fn exchange(
        &self,
        mut sender: SendRequest<Full<Bytes>>,
        private: bool,
        call: &Attempt,
        pool: &Rc<Pool>,
    ) -> Result<Answer, Lost> {
        let request = request(call).map_err(Lost::Heard)?;
        let answer = sender.send_request(request).await.map_err(|error| match error.is_parse() {
            true => Lost::Heard(broken(error)),
            false => Lost::Silent(broken(error)),
        })?;
        let (head, body) = answer.into_parts();
        // The map has a share, and this call.
        let overlaps = Rc::strong_count(pool) > 2;
        let lease = Lease { sender, private, pool: Rc::clone(pool) };
        let mut body = AnswerBody { incoming: body, lease: Some(lease), patience: None };
        body.settle();
        if overlaps && pool.idle.borrow().is_empty() && !pool.opening.replace(true) {
            self.open_ahead(call, pool);
        }
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    /// One that waits for the next call, begun when this one's first bytes are through. Should it not come about, the next call
    /// says why.
    fn open_ahead(&self, call: &Attempt, pool: &Rc<Pool>) {
        let (client, origin, pool) = (self.clone(), Arc::clone(&call.origin), Rc::clone(pool));
        let allow_private = self.allows_private(call);
        tokio::task::spawn_local(async move {
            sleep(AHEAD_AFTER).await;
            let opened = client.connect(&origin, allow_private).await;
            pool.opening.set(false);
            match opened {
                Ok((sender, private)) => pool.keep(sender, private),
                Err(fault) => tracing::debug!(%fault, "a connection ahead"),
            }
        });
    }

    async fn connect(&self, origin: &Origin, allow_private: bool) -> Result<(SendRequest<Full<Bytes>>, bool), Fault> {
        let settings = &self.inner.settings;
        let open = async {
            let (stream, private) = self.reach(origin, allow_private).await?;
            if !origin.tls {
                return Ok((spoken(stream).await?, private));
            }
            let name = ServerName::try_from(origin.host().to_owned())
                .map_err(|_| Fault::Refused(format!("`{}` is no name that a certificate can have", origin.host())))?;
            let stream = TlsConnector::from(settings.tls.0.clone())
                .connect(name, stream)
                .await
                .map_err(|error| Fault::Connect(format!("TLS: {error}")))?;
            Ok((spoken(stream).await?, private))
        };
        timeout(settings.connect_timeout, open).await.map_err(|_| Fault::Timeout("connecting"))?
    }

    /// A TCP connection to the server, or through the proxy; and whether it ends at a private address.
    async fn reach(&self, origin: &Origin, allow_private: bool) -> Result<(TcpStream, bool), Fault> {
        let (host, port) = (origin.host(), origin.port());
        if let Some(proxy) = &self.inner.settings.proxy {
            // The proxy looks names up, so only addresses can be judged here.
            let private = host.parse().is_ok_and(is_private);
            if private && !allow_private {
                return Err(private_address(host));
            }
            let mut stream = TcpStream::connect(proxy).await.map_err(|error| connect("the proxy", &error))?;
            tunnel(&mut stream, host, port).await?;
            return Ok((stream, private));
        }
        let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => tokio::net::lookup_host((host, port)).await.map_err(|error| connect(host, &error))?.collect(),
        };
        // Judged by the very address that is connected to: a name that changes its mind in between changes nothing.
        let allowed = addresses.iter().filter(|address| allow_private || !is_private(address.ip()));
        let mut last =
            if addresses.is_empty() { Fault::Connect(format!("{host} has no address")) } else { private_address(host) };
        for address in allowed {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // A token is worth sending at once, however small.
                    let _ = stream.set_nodelay(true);
                    return Ok((stream, is_private(address.ip())));
                }
                Err(error) => last = connect(host, &error),
            }
        }
        Err(last)
    }
}

/// A call that brought no head of an answer.
enum Lost {
    /// The server said nothing at all.
    Silent(Fault),
    /// It said something else.
    Heard(Fault),
}

impl Lost {
    fn fault(self) -> Fault {
        match self {
            Self::Silent(fault) | Self::Heard(fault) => fault,
        }
    }
}

fn private_address(host: &str) -> Fault {
    Fault::Refused(format!("{host} is on a private address; the operator can allow it with `allow_private`"))
}

fn connect(whom: &str, error: &std::io::Error) -> Fault {
    Fault::Connect(format!("{whom}: {error}"))
}

fn broken(error: hyper::Error) -> Fault {
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        text = format!("{text}: {source}");
    }
    Fault::Broken(text)
}

/// Asks a proxy for a connection to `host`.
async fn tunnel(stream: &mut TcpStream, host: &str, port: u16) -> Result<(), Fault> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let ask = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
    let failed = |error: std::io::Error| connect("the proxy", &error);
    stream.write_all(ask.as_bytes()).await.map_err(failed)?;
    let mut head = Vec::new();
    // Byte by byte, so that nothing of what the server says behind it is swallowed.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > MAX_HEAD_BYTES {
            return Err(Fault::Connect("the proxy answers without end".into()));
        }
        head.push(stream.read_u8().await.map_err(failed)?);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    match line.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(()),
        _ => Err(Fault::Connect(format!("the proxy answers `{line}`"))),
    }
}

/// A connection that speaks HTTP. Its own task moves the bytes; it ends with the connection.
async fn spoken<Stream>(stream: Stream) -> Result<SendRequest<Full<Bytes>>, Fault>
where
    Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD_BYTES.max(128 * 1024))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "an upstream connection ended");
        }
    });
    Ok(sender)
}

fn request(call: &Attempt) -> Result<Request<Full<Bytes>>, Fault> {
    let mut request = Request::new(Full::new(call.body.clone()));
    *request.method_mut() = call.method.clone();
    *request.uri_mut() = Uri::from(call.path.clone());
    *request.headers_mut() = call.headers.clone();
    let headers = request.headers_mut();
    let host = HeaderValue::from_str(call.origin.authority.as_str())
        .map_err(|_| Fault::Refused("the host is no header value".into()))?;
    headers.insert(header::HOST, host);
    if !call.body.is_empty() || matches!(call.method, Method::POST | Method::PUT | Method::PATCH) {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(call.body.len()));
    }
    Ok(request)
}

impl Pool {
    /// The connection used last: it is the least likely to have been closed.
    fn take(&self, allow_private: bool) -> Option<Idle> {
        let mut waiting = self.idle.borrow_mut();
        while let Some(idle) = waiting.pop() {
            let allowed = !idle.private || allow_private;
            if allowed && idle.since.elapsed() < IDLE && idle.sender.is_ready() {
                return Some(idle);
            }
        }
        None
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>, private: bool) {
        let mut waiting = self.idle.borrow_mut();
        if !sender.is_closed() && waiting.len() < MAX_IDLE {
            waiting.push(Idle { sender, since: Instant::now(), private });
        }
    }
}

/// A connection in use.
struct Lease {
    sender: SendRequest<Full<Bytes>>,
    private: bool,
    pool: Rc<Pool>,
}

impl Lease {
    /// Hands the connection back for the next call.
    fn give_back(self) {
        self.pool.keep(self.sender, self.private);
    }
}

/// The body of an answer. Read to its end, its connection serves the next call; dropped before, it is closed, which is how
/// an upstream hears that nobody listens any more.
pub struct AnswerBody {
    incoming: Incoming,
    lease: Option<Lease>,
    patience: Option<Patience>,
}

struct Patience {
    limit: Duration,
    heard: TokioInstant,
    /// When it has to be whole.
    until: Option<TokioInstant>,
    alarm: Pin<Box<Sleep>>,
}

impl AnswerBody {
    /// Fails with a timeout when nothing comes for `limit`, counted from now and from every chunk, or when it is not whole
    /// within `whole`.
    pub fn with_patience(mut self, limit: Duration, whole: Option<Duration>) -> Self {
        let now = TokioInstant::now();
        let until = whole.map(|whole| now + whole);
        let first = until.map_or(now + limit, |until| until.min(now + limit));
        self.patience = Some(Patience { limit, heard: now, until, alarm: Box::pin(sleep_until(first)) });
        self
    }

    /// How many bytes will come, if the server said so.
    pub fn length(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }

    /// The next bytes; `None` at the end.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        loop {
            match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(patience) = &mut self.patience {
                        patience.heard = TokioInstant::now();
                        if patience.until.is_some_and(|until| until <= patience.heard) {
                            self.lease = None;
                            return Poll::Ready(Some(Err(Fault::Timeout("the whole answer"))));
                        }
                    }
                    self.settle();
                    // Trailers are nobody's business here.
                    if let Ok(chunk) = frame.into_data() {
                        return Poll::Ready(Some(Ok(chunk)));
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    self.lease = None;
                    return Poll::Ready(Some(Err(broken(error))));
                }
                Poll::Ready(None) => {
                    self.settle();
                    return Poll::Ready(None);
                }
                Poll::Pending => return self.poll_patience(cx),
            }
        }
    }

    /// As [`AnswerBody::poll_chunk`].
    pub async fn chunk(&mut self) -> Option<Result<Bytes, Fault>> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// All that is left, if that is at most `limit` bytes.
    ///
    /// # Errors
    /// [`Fault::Broken`] when there is more; what the connection says otherwise.
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, Fault> {
        let mut gather = Gather::default();
        while let Some(chunk) = self.chunk().await {
            if !gather.push(chunk?, limit) {
                return Err(Fault::Broken(format!("the answer has more than {limit} bytes")));
            }
        }
        Ok(gather.whole())
    }

    /// Chunks only move the mark; the timer is set anew when it rings, not with each of them.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        let Some(patience) = &mut self.patience else { return Poll::Pending };
        while patience.alarm.as_mut().poll(cx).is_ready() {
            let (now, end) = (TokioInstant::now(), patience.heard + patience.limit);
            let late = patience.until.is_some_and(|until| until <= now);
            if late || end <= now {
                self.lease = None;
                let what = if late { "the whole answer" } else { "between two chunks" };
                return Poll::Ready(Some(Err(Fault::Timeout(what))));
            }
            patience.alarm.as_mut().reset(patience.until.map_or(end, |until| until.min(end)));
        }
        Poll::Pending
    }

    /// After the last byte the connection is free.
    fn settle(&mut self) {
        if self.incoming.is_end_stream()
            && let Some(lease) = self.lease.take()
        {
            lease.give_back();
        }
    }
}

/// Addresses that are nobody's server on the internet: loopback, private, link-local (the metadata services of clouds),
/// shared, reserved, multicast; also where one of them is written inside an IPv6 address.
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_private_v4(address),
        IpAddr::V6(address) => is_private_v6(address),
    }
}

fn is_private_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && (c == 0 || c == 2))
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19))
        || (a, b, c) == (198, 51, 100)
        || (a, b, c) == (203, 0, 113)
}

fn is_private_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_private_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // Unspecified, loopback, and IPv4 in its compatible and mapped forms.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => high == 0 || embedded(high, low),
        // NAT64, well-known and local prefix.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => true,
        // 6to4.
        [0x2002, high, low, ..] => embedded(high, low),
        // Teredo, documentation, ORCHID, and discard.
        [0x2001, 0, ..] | [0x2001, 0xdb8, ..] | [0x2001, 0x10..=0x2f, ..] | [0x100, 0, 0, 0, ..] => true,
        [first, ..] => {
            (first & 0xfe00) == 0xfc00 || (first & 0xffc0) == 0xfe80 || (first & 0xffc0) == 0xfec0 || first >= 0xff00
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_no_server_of_the_internet_is_private_however_it_is_written() {
        for (address, private) in [
            ("127.0.0.1", true),
            ("10.1.2.3", true),
            ("172.16.0.1", true),
            ("172.32.0.1", false),
            ("192.168.1.1", true),
            ("169.254.169.254", true),
            ("100.64.0.1", true),
            ("100.128.0.1", false),
            ("0.0.0.0", true),
            ("255.255.255.255", true),
            ("224.0.0.1", true),
            ("198.18.0.1", true),
            ("8.8.8.8", false),
            ("104.18.7.192", false),
            ("::1", true),
            ("::", true),
            ("::ffff:127.0.0.1", true),
            ("::ffff:8.8.8.8", false),
            ("::169.254.169.254", true),
            ("64:ff9b::a9fe:a9fe", true),
            ("64:ff9b::808:808", false),
            ("2002:7f00:1::", true),
            ("fc00::1", true),
            ("fd12::1", true),
            ("fe80::1", true),
            ("ff02::1", true),
            ("2001:db8::1", true),
            ("2606:4700::6812:7c0", false),
        ] {
            assert_eq!(is_private(address.parse().unwrap()), private, "{address}");
        }
    }

    #[test]
    fn a_host_is_an_origin_and_a_user_in_it_is_refused() {
        for (authority, host, port) in
            [("api.openai.com", "api.openai.com", 443), ("localhost:8080", "localhost", 8080), ("[::1]:9", "::1", 9)]
        {
            let origin = Origin::new(true, authority).unwrap();
            assert_eq!((origin.host(), origin.port()), (host, port), "{authority}");
        }
        for authority in ["", "a b", "user@host", "host/path"] {
            assert!(Origin::new(true, authority).is_err(), "{authority}");
        }
    }

    #[test]
    fn certificate_authorities_of_ones_own_must_be_readable() {
        assert!(Tls::new(None).is_ok());
        for text in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(Tls::new(Some(text)).is_err(), "{text}");
        }
    }
}
