//! What is answered, before anything goes wrong with it.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::Value;

pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Body,
}

pub enum Body {
    Whole(Bytes),
    /// JSON of this many bytes, made while it is sent.
    Filler(usize),
    Stream(Stream),
}

/// A stream in its parts, so that one can be broken off behind a number of chunks that have text.
#[derive(Default)]
pub struct Stream {
    pub opening: Vec<Bytes>,
    pub chunks: Vec<Bytes>,
    pub closing: Vec<Bytes>,
    /// What this provider sends when it fails in the middle.
    pub error: Bytes,
    /// What no reader of this format should survive unnoticed.
    pub garbage: Bytes,
}

impl Answer {
    pub fn json(value: &Value) -> Self {
        Self::bytes("application/json", value.to_string())
    }

    pub fn bytes(content_type: &str, body: impl Into<Bytes>) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status: 200, headers, body: Body::Whole(body.into()) }
    }

    pub fn stream(content_type: &str, stream: Stream) -> Self {
        Self { body: Body::Stream(stream), ..Self::bytes(content_type, Bytes::new()) }
    }

    /// Server-sent events.
    pub fn events(mut stream: Stream) -> Self {
        if stream.garbage.is_empty() {
            stream.garbage = Bytes::from_static(b"data: {\"choices\": [{\"delta\": \xff\xfe\n\n");
        }
        Self::stream("text/event-stream; charset=utf-8", stream).header("cache-control", "no-cache")
    }

    pub fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// One server-sent event with JSON as its data.
pub fn event(name: Option<&str>, data: &Value) -> Bytes {
    let mut bytes = BytesMut::with_capacity(256);
    if let Some(name) = name {
        bytes.put_slice(b"event: ");
        bytes.put_slice(name.as_bytes());
        bytes.put_u8(b'\n');
    }
    bytes.put_slice(b"data: ");
    serde_json::to_writer((&mut bytes).writer(), data).unwrap();
    bytes.put_slice(b"\n\n");
    bytes.freeze()
}
