//! Sends an answer, or fails to, as a behaviour says.
//!
//!     answer --shape--> answer as it is on the wire --head, pieces, end--> connection
//!                                    '-- hang, reset, half a body, a drop at a time …
//!
//! An error is the client's: it hung up before the end.

use std::io;

use bytes::{Bytes, BytesMut};

use super::answer::{Answer, Body, Stream};
use super::behaviour::{Behaviour, Fault, Framing, Keep};
use super::connection::Connection;
use super::frames::{self, Gzip};

/// Bytes of a long body that are sent at a time.
const BLOCK: usize = 64 << 10;

/// What becomes of the connection.
pub enum End {
    Next,
    Close,
    CloseAtNext,
    Reset,
}

/// One answer on its way.
pub struct Delivery<'a> {
    pub connection: &'a mut Connection,
    pub behaviour: &'a Behaviour,
    /// The answer has a head only.
    pub head_only: bool,
    /// The client wants no other answer on this connection.
    pub last: bool,
    /// Chunks of text that were sent.
    pub sent: usize,
}

impl Delivery<'_> {
    pub async fn run(&mut self, answer: Answer) -> io::Result<End> {
        let behaviour = self.behaviour;
        self.connection.stay(behaviour.delay).await?;
        match &behaviour.fault {
            Some(Fault::Hang) => return self.hang().await,
            Some(Fault::Reset) => return Ok(End::Reset),
            Some(Fault::CloseEarly) => return Ok(End::Close),
            Some(Fault::Garbage) => {
                self.connection.send(b"\x16\x03\x01 this is no HTTP\r\n\r\n\0\0\0").await?;
                return Ok(End::Close);
            }
            _ => {}
        }
        if behaviour.early_hints {
            self.connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n").await?;
        }
        let answer = shape(answer, behaviour);
        let framing = match (&answer.body, behaviour.framing) {
            (Body::Stream(_), Framing::Length) => Framing::Chunked,
            // Only a body in chunks can have a chunk that is none.
            _ if matches!(behaviour.fault, Some(Fault::BadChunkAfter(_))) => Framing::Chunked,
            (_, framing) => framing,
        };
        let head = head(&answer, framing, behaviour, self.last);
        if self.head_only {
            self.connection.send(&head).await?;
            return Ok(self.end(framing));
        }
        let wire = Wire { framing };
        let broken = match answer.body {
            Body::Whole(body) => self.whole(head, body, wire).await?,
            Body::Filler(bytes) => self.filler(head, bytes, wire).await?,
            Body::Stream(stream) => self.stream(head, stream, wire).await?,
        };
        Ok(broken.unwrap_or_else(|| self.end(framing)))
    }

    fn end(&self, framing: Framing) -> End {
        match self.behaviour.keep {
            Keep::Alive if self.last || framing == Framing::UntilClose => End::Close,
            Keep::Alive => End::Next,
            Keep::Close | Keep::Stale => End::Close,
            Keep::StaleNext => End::CloseAtNext,
        }
    }

    async fn hang(&mut self) -> io::Result<End> {
        self.connection.hold().await?;
        Ok(End::Close)
    }

    async fn whole(&mut self, head: BytesMut, body: Bytes, wire: Wire) -> io::Result<Option<End>> {
        if let Some(Fault::Drip { .. }) = self.behaviour.fault {
            let mut all = head;
            all.extend_from_slice(&wire.piece(&body));
            all.extend_from_slice(wire.last());
            return self.drip(&all).await;
        }
        let mut out = head;
        if !self.behaviour.pause.is_zero() {
            self.connection.send(&out).await?;
            out.clear();
            self.connection.stay(self.behaviour.pause).await?;
        }
        if self.breaks_off() {
            out.extend_from_slice(&wire.piece(&body.slice(..body.len() / 2)));
            self.connection.send(&out).await?;
            self.sent = 1;
            return self.broken().await;
        }
        // One write: small answers go in one packet.
        out.extend_from_slice(&wire.piece(&body));
        out.extend_from_slice(wire.last());
        self.connection.send(&out).await?;
        Ok(matches!(self.behaviour.fault, Some(Fault::Short(_))).then_some(End::Close))
    }

    async fn filler(&mut self, head: BytesMut, bytes: usize, wire: Wire) -> io::Result<Option<End>> {
        self.connection.send(&head).await?;
        let (begin, end) = (b"{\"filler\":\"", b"\"}");
        let mut rest = bytes.saturating_sub(begin.len() + end.len());
        self.connection.send(&wire.piece(begin)).await?;
        let block = Bytes::from(vec![b'f'; BLOCK]);
        let framed = wire.piece(&block);
        while rest >= BLOCK {
            self.connection.send(&framed).await?;
            self.sent += 1;
            rest -= BLOCK;
        }
        self.connection.send(&wire.piece(&block[..rest])).await?;
        self.connection.send(&wire.piece(end)).await?;
        self.connection.send(wire.last()).await?;
        Ok(None)
    }

    async fn stream(&mut self, head: BytesMut, stream: Stream, wire: Wire) -> io::Result<Option<End>> {
        if let Some(Fault::Drip { .. }) = self.behaviour.fault {
            let mut all = head;
            for piece in stream.opening.iter().chain(&stream.chunks).chain(&stream.closing) {
                all.extend_from_slice(&wire.piece(piece));
            }
            all.extend_from_slice(wire.last());
            return self.drip(&all).await;
        }
        self.connection.send(&head).await?;
        self.connection.stay(self.behaviour.pause).await?;
        if let Some(Fault::ErrorEvent { after, .. }) = self.behaviour.fault {
            // Where there are too few of them, the last one over and over.
            let opening = stream.opening.iter().chain(stream.opening.last().into_iter().cycle());
            for piece in opening.take(after).chain([&stream.error]) {
                self.connection.send(&wire.piece(piece)).await?;
            }
            self.connection.send(wire.last()).await?;
            return Ok(None);
        }
        for piece in &stream.opening {
            self.connection.send(&wire.piece(piece)).await?;
        }
        let breaks_after = self.breaks_after();
        for index in 0..=stream.chunks.len() {
            let Some(piece) = stream.chunks.get(index) else { break };
            if breaks_after == Some(index) {
                return self.break_off(&stream, wire).await;
            }
            if let Some(Fault::GarbageAfter(after)) = self.behaviour.fault
                && after == index
            {
                self.connection.send(&wire.piece(&stream.garbage)).await?;
            }
            let gap = if index > 0 { self.behaviour.gap } else { std::time::Duration::ZERO };
            self.connection.stay(gap).await?;
            self.connection.send(&wire.piece(piece)).await?;
            self.sent += 1;
        }
        if breaks_after.is_some() {
            return self.break_off(&stream, wire).await;
        }
        for piece in &stream.closing {
            self.connection.send(&wire.piece(piece)).await?;
        }
        self.connection.send(wire.last()).await?;
        Ok(None)
    }

    async fn break_off(&mut self, stream: &Stream, wire: Wire) -> io::Result<Option<End>> {
        if let Some(Fault::ErrorAfter(_)) = self.behaviour.fault {
            self.connection.send(&wire.piece(&stream.error)).await?;
            self.connection.send(wire.last()).await?;
            return Ok(None);
        }
        self.broken().await
    }

    fn breaks_off(&self) -> bool {
        !matches!(self.behaviour.fault, Some(Fault::ErrorAfter(_))) && self.breaks_after().is_some()
    }

    /// The number of chunks behind which an answer ends before its end.
    fn breaks_after(&self) -> Option<usize> {
        match self.behaviour.fault {
            Some(
                Fault::HangAfter(after)
                | Fault::ResetAfter(after)
                | Fault::CloseAfter(after)
                | Fault::HalfCloseAfter(after)
                | Fault::BadChunkAfter(after)
                | Fault::ErrorAfter(after),
            ) => Some(after),
            _ => None,
        }
    }

    async fn broken(&mut self) -> io::Result<Option<End>> {
        match self.behaviour.fault {
            Some(Fault::ResetAfter(_)) => return Ok(Some(End::Reset)),
            Some(Fault::CloseAfter(_)) => return Ok(Some(End::Close)),
            Some(Fault::HalfCloseAfter(_)) => self.connection.finish().await,
            Some(Fault::BadChunkAfter(_)) => self.connection.send(b"no size\r\nno chunk\r\n").await?,
            _ => {}
        }
        self.hang().await.map(Some)
    }

    async fn drip(&mut self, all: &[u8]) -> io::Result<Option<End>> {
        let Some(Fault::Drip { bytes, every }) = self.behaviour.fault else { return Ok(None) };
        for drop in all.chunks(bytes) {
            self.connection.send(drop).await?;
            self.connection.stay(every).await?;
        }
        Ok(None)
    }
}

/// How pieces of a body are written.
#[derive(Clone, Copy)]
struct Wire {
    framing: Framing,
}

impl Wire {
    fn piece(self, bytes: &[u8]) -> Bytes {
        if self.framing != Framing::Chunked {
            return Bytes::copy_from_slice(bytes);
        }
        // A chunk of no bytes would be the last one.
        if bytes.is_empty() {
            return Bytes::new();
        }
        let mut chunk = BytesMut::with_capacity(bytes.len() + 12);
        chunk.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        chunk.freeze()
    }

    fn last(self) -> &'static [u8] {
        if self.framing == Framing::Chunked { b"0\r\n\r\n" } else { b"" }
    }
}

/// What a behaviour makes of an answer before anything of it is sent.
fn shape(mut answer: Answer, behaviour: &Behaviour) -> Answer {
    let gzip = |answer: Answer| answer.header("content-encoding", "gzip");
    answer = match (&behaviour.fault, answer.body) {
        (Some(Fault::Redirect(url)), _) => Answer::bytes("text/plain", "elsewhere").status(307).header("location", url),
        (Some(Fault::Html), _) => Answer::bytes("text/html", "<!doctype html><title>All is well</title>"),
        (Some(Fault::Huge(bytes)), _) => Answer { body: Body::Filler(*bytes), ..Answer::bytes("application/json", "") },
        (Some(Fault::Bomb(bytes)), _) => gzip(Answer::bytes("application/json", frames::bomb(*bytes))),
        (Some(Fault::Gzip), Body::Whole(body)) => {
            let mut unpacked = Gzip::default();
            let body = [unpacked.piece(&body), unpacked.end()].concat();
            gzip(Answer { body: Body::Whole(body.into()), ..answer })
        }
        (Some(Fault::Gzip), Body::Stream(stream)) => gzip(Answer { body: Body::Stream(gzip_stream(stream)), ..answer }),
        (Some(Fault::BadJson | Fault::GarbageAfter(_)), Body::Whole(body)) => {
            Answer { body: Body::Whole(body.slice(..body.len() / 2)), ..answer }
        }
        (Some(Fault::BadJson), Body::Stream(mut stream)) => {
            stream.chunks.insert(0, stream.garbage.clone());
            Answer { body: Body::Stream(stream), ..answer }
        }
        (Some(Fault::ErrorAfter(_)), Body::Whole(_)) => {
            let error = r#"{"error":{"message":"The server had an error.","type":"server_error","code":500}}"#;
            Answer { body: Body::Whole(error.into()), ..answer }
        }
        (_, body) => Answer { body, ..answer },
    };
    answer.headers.extend(behaviour.headers.iter().cloned());
    answer
}

fn gzip_stream(stream: Stream) -> Stream {
    let mut gzip = Gzip::default();
    let mut pack = |pieces: Vec<Bytes>| -> Vec<Bytes> { pieces.iter().map(|piece| gzip.piece(piece)).collect() };
    let (opening, chunks, mut closing) = (pack(stream.opening), pack(stream.chunks), pack(stream.closing));
    closing.push(gzip.end());
    Stream { opening, chunks, closing, ..stream }
}

fn head(answer: &Answer, framing: Framing, behaviour: &Behaviour, last: bool) -> BytesMut {
    let mut head = BytesMut::with_capacity(512);
    let mut line = |parts: &[&str]| {
        parts.iter().for_each(|part| head.extend_from_slice(part.as_bytes()));
        head.extend_from_slice(b"\r\n");
    };
    line(&["HTTP/1.1 ", &answer.status.to_string(), " ", reason(answer.status)]);
    for (name, value) in &answer.headers {
        line(&[name, ": ", value]);
    }
    let length = match &answer.body {
        Body::Whole(body) => body.len(),
        Body::Filler(bytes) => (*bytes).max(13),
        Body::Stream(_) => 0,
    };
    let missing = if let Some(Fault::Short(bytes)) = behaviour.fault { bytes } else { 0 };
    match framing {
        Framing::Length => line(&["content-length: ", &(length + missing).to_string()]),
        Framing::Chunked => line(&["transfer-encoding: chunked"]),
        Framing::UntilClose => {}
    }
    if behaviour.keep == Keep::Close || last || framing == Framing::UntilClose {
        line(&["connection: close"]);
    }
    line(&[]);
    head
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        529 => "Overloaded",
        _ => "Whatever",
    }
}
