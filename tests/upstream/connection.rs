//! One connection of a client: HTTP/1.1 requests out of its bytes, and a watch for the moment when it hangs up.
//!
//!     socket --> inbox: [head][body][next head …   frame: where things are    Request: what they say
//!
//! Knows nothing of what is answered. Written by hand so that answers can be wrong in ways no library would let them be.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MAX_HEAD: usize = 1 << 20;

pub struct Connection {
    socket: TcpStream,
    inbox: BytesMut,
    /// Counted from 1 over all connections of a server.
    pub number: u64,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Without the query, still encoded.
    pub path: String,
    pub query: Option<String>,
    /// In order, with the names as they were written.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Request {
    /// The first value under this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Where the next request lies in the inbox.
pub struct Frame {
    head: usize,
    body: Body,
    expects_continue: bool,
    /// The client takes no other answer on this connection.
    pub last: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Body {
    Sized(usize),
    Chunked,
}

impl Connection {
    pub fn new(socket: TcpStream, number: u64) -> Self {
        let _ = socket.set_nodelay(true);
        Self { socket, inbox: BytesMut::with_capacity(4096), number }
    }

    /// Waits for the head of the next request. `None`: the client closed the connection, as it may between requests.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        let mut searched = 0;
        loop {
            if let Some(head) = end_of_head(&self.inbox, &mut searched) {
                return frame(&self.inbox[..head]).map(Some);
            }
            if self.inbox.len() > MAX_HEAD {
                return Err(bad("the head of a request is too long"));
            }
            if self.socket.read_buf(&mut self.inbox).await? == 0 {
                return if self.inbox.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Takes a request out of the inbox, all of its body included.
    pub async fn take(&mut self, frame: &Frame) -> io::Result<Request> {
        let head = self.inbox.split_to(frame.head);
        let body = self.body(frame).await?;
        request(&head, body)
    }

    /// Takes a request out of the inbox without a look at it.
    pub async fn skip(&mut self, frame: &Frame) -> io::Result<()> {
        self.inbox.advance(frame.head);
        if frame.body != Body::Sized(0) {
            self.body(frame).await?;
        }
        Ok(())
    }

    async fn body(&mut self, frame: &Frame) -> io::Result<Bytes> {
        if frame.expects_continue {
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let Body::Sized(length) = frame.body else { return self.chunked_body().await };
        self.fill(length).await?;
        Ok(self.inbox.split_to(length).freeze())
    }

    async fn chunked_body(&mut self) -> io::Result<Bytes> {
        let mut body = BytesMut::new();
        loop {
            let line = self.line().await?;
            let size = line[..].split(|byte| *byte == b';').next().and_then(|size| std::str::from_utf8(size).ok());
            let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
            let size = size.ok_or_else(|| bad("the size of a chunk is no number"))?;
            if size == 0 {
                // Trailers, up to an empty line.
                while !self.line().await?.is_empty() {}
                return Ok(body.freeze());
            }
            self.fill(size + 2).await?;
            body.extend_from_slice(&self.inbox[..size]);
            self.inbox.advance(size + 2);
        }
    }

    /// The next line, without its end.
    async fn line(&mut self) -> io::Result<BytesMut> {
        loop {
            if let Some(end) = self.inbox.iter().position(|byte| *byte == b'\n') {
                let mut line = self.inbox.split_to(end + 1);
                let kept = line.len() - if line.ends_with(b"\r\n") { 2 } else { 1 };
                line.truncate(kept);
                return Ok(line);
            }
            self.fill(self.inbox.len() + 1).await?;
        }
    }

    async fn fill(&mut self, length: usize) -> io::Result<()> {
        self.inbox.reserve(length.saturating_sub(self.inbox.len()));
        while self.inbox.len() < length {
            if self.socket.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes).await
    }

    /// Waits that long, or until the client hangs up, which is the error.
    pub async fn stay(&mut self, time: Duration) -> io::Result<()> {
        if time.is_zero() {
            return self.look();
        }
        tokio::select! {
            gone = self.hold() => gone,
            () = tokio::time::sleep(time) => Ok(()),
        }
    }

    /// Waits until the client hangs up. What it sends meanwhile is kept: it may be the next request.
    pub async fn hold(&mut self) -> io::Result<()> {
        loop {
            if self.socket.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
    }

    /// Whether the client has hung up, without waiting.
    fn look(&mut self) -> io::Result<()> {
        match self.socket.try_read_buf(&mut self.inbox) {
            Ok(0) => Err(io::ErrorKind::ConnectionAborted.into()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until there is something of another request, or the client hangs up.
    pub async fn until_more(&mut self) {
        if self.inbox.is_empty() {
            let _ = self.socket.readable().await;
        }
    }

    /// Nothing more comes from here; the client may go on.
    pub async fn finish(&mut self) {
        let _ = self.socket.shutdown().await;
    }

    /// Ends the connection as a machine does that has lost it.
    pub fn reset(self) {
        let _ = socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }
}

/// Length of the head, its empty line included. `searched` is how far an earlier call has looked.
fn end_of_head(bytes: &[u8], searched: &mut usize) -> Option<usize> {
    let from = searched.saturating_sub(3);
    *searched = bytes.len();
    bytes[from..].windows(4).position(|window| window == b"\r\n\r\n").map(|at| from + at + 4)
}

/// Reads only what tells how long the request is. Nothing is allocated.
fn frame(head: &[u8]) -> io::Result<Frame> {
    let mut frame = Frame { head: head.len(), body: Body::Sized(0), expects_continue: false, last: false };
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    frame.last = lines.next().is_some_and(|line| line.ends_with(b"HTTP/1.0"));
    for line in lines {
        // Only names that begin with one of these letters matter.
        if !matches!(line.first(), Some(b'c' | b'C' | b't' | b'T' | b'e' | b'E')) {
            continue;
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
            frame.body = Body::Sized(length.ok_or_else(|| bad("content-length is no number"))?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            frame.body = Body::Chunked;
        } else if name.eq_ignore_ascii_case(b"expect") {
            frame.expects_continue = true;
        } else if name.eq_ignore_ascii_case(b"connection") && value.eq_ignore_ascii_case(b"close") {
            frame.last = true;
        }
    }
    Ok(frame)
}

fn request(head: &[u8], body: Bytes) -> io::Result<Request> {
    let head = std::str::from_utf8(head).map_err(|_| bad("the head of a request is no text"))?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Err(bad("no request line")) };
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query.to_owned())));
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
    Ok(Request { method: method.to_owned(), path: path.to_owned(), query, headers, body })
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
