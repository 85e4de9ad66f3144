//! What the fake does instead of answering well, as a line of text, in a script or in the header `x-fake`:
//!
//!     429; retry-after=2          gap=20; reset-after=3          chunks=100; size=12          ok
//!
//! | part | what it does |
//! | --- | --- |
//! | `503` | an error of this status, in the provider's shape, with the headers it would have |
//! | `retry-after=S`, `retry-after-ms=MS`, `retry-after-date=S` | the headers; the last as a date so many seconds from now |
//! | `header=NAME: VALUE`, `long-headers=BYTES` | one more header; one of this length |
//! | `delay=MS`, `pause=MS`, `gap=MS` | before the first byte; between head and body; between two chunks |
//! | `chunks=N`, `size=BYTES` | how many chunks of text a stream has, and how long each is |
//! | `calls=N`, `talk` | tools are called so often; and something is said before |
//! | `says=TEXT` | this is said, whatever was heard; no `;` in it |
//! | `expires=S` | an access token is good for so many seconds |
//! | `cached=N`, `no-usage` | prompt tokens that count as cached; usage is left out |
//! | `hang`, `reset`, `close-early`, `garbage` | instead of an answer: nothing ever, RST, FIN, bytes that are not HTTP |
//! | `hang-after=N`, `reset-after=N`, `close-after=N`, `half-close-after=N` | the same behind so many chunks of text, or behind half of an answer that is no stream; the last closes one way only |
//! | `bad-chunk-after=N` | the same with a chunk whose size is no number, so that the framing itself is broken |
//! | `error-after=N`, `garbage-after=N` | an error event in a stream of status 200, or an event that is none |
//! | `error-event=N`, `error-event=N/STATUS` | the same before any text: so many events that say nothing yet, then the error, or the one of this status |
//! | `bad-json`, `html` | half of the JSON, as if it were whole; a web page of status 200, as proxies answer |
//! | `huge=BYTES`, `short=BYTES`, `drip=BYTES/MS` | a long body; one that lacks so much of its content-length; a little at a time |
//! | `chunked`, `until-close` | framing of answers that are no streams; the end of the connection is the end of any answer |
//! | `gzip`, `bomb=BYTES` | a compressed body; one of zeros that is small until it is unpacked |
//! | `redirect=URL`, `early-hints` | status 307; a 103 before the answer |
//! | `close`, `stale`, `stale-next` | closes behind the answer and says so; does not say so; when the next request comes |
//!
//! Sizes may end in `k` or `m`.

use std::time::Duration;

#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    pub status: Option<u16>,
    pub headers: Vec<(String, String)>,
    pub delay: Duration,
    pub pause: Duration,
    pub gap: Duration,
    pub chunks: Option<usize>,
    pub size: Option<usize>,
    pub calls: Option<usize>,
    pub talk: bool,
    pub says: Option<String>,
    pub expires: Option<usize>,
    pub cached: usize,
    pub no_usage: bool,
    pub fault: Option<Fault>,
    pub framing: Framing,
    pub early_hints: bool,
    pub keep: Keep,
}

/// What goes wrong. One a request.
#[derive(Clone, Debug)]
pub enum Fault {
    Hang,
    Reset,
    CloseEarly,
    Garbage,
    /// So many chunks of text were sent.
    HangAfter(usize),
    ResetAfter(usize),
    CloseAfter(usize),
    HalfCloseAfter(usize),
    BadChunkAfter(usize),
    ErrorAfter(usize),
    /// So many events that say nothing were sent; the error is the one that the status would have.
    ErrorEvent {
        after: usize,
        status: Option<u16>,
    },
    GarbageAfter(usize),
    BadJson,
    Html,
    /// Bytes of the body.
    Huge(usize),
    /// Bytes that are announced and not sent.
    Short(usize),
    Drip {
        bytes: usize,
        every: Duration,
    },
    Gzip,
    /// Bytes when unpacked.
    Bomb(usize),
    Redirect(String),
}

/// How the end of an answer is told. Streams are always chunked, unless the connection's end is theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    #[default]
    Length,
    Chunked,
    UntilClose,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    #[default]
    Alive,
    Close,
    Stale,
    StaleNext,
}

impl From<&str> for Behaviour {
    /// For scripts: a test with a typing error should say so.
    fn from(text: &str) -> Self {
        Self::parse(text).unwrap()
    }
}

impl Behaviour {
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut behaviour = Self::default();
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').map_or((part, ""), |(name, value)| (name.trim(), value.trim()));
            behaviour
                .set(name, value)
                .map_err(|why| format!("{part:?} is no behaviour of the fake upstream: {why}"))?;
        }
        Ok(behaviour)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let fault = match name {
            "ok" => None,
            "hang" => Some(Fault::Hang),
            "reset" => Some(Fault::Reset),
            "close-early" => Some(Fault::CloseEarly),
            "garbage" => Some(Fault::Garbage),
            "hang-after" => Some(Fault::HangAfter(number(value)?)),
            "reset-after" => Some(Fault::ResetAfter(number(value)?)),
            "close-after" => Some(Fault::CloseAfter(number(value)?)),
            "half-close-after" => Some(Fault::HalfCloseAfter(number(value)?)),
            "bad-chunk-after" => Some(Fault::BadChunkAfter(number(value)?)),
            "error-after" => Some(Fault::ErrorAfter(number(value)?)),
            "error-event" => {
                let (after, status) = value.split_once('/').map_or((value, None), |(n, status)| (n, Some(status)));
                let status = status.map(|status| number(status).map(|status| status as u16)).transpose()?;
                Some(Fault::ErrorEvent { after: number(after)?, status })
            }
            "garbage-after" => Some(Fault::GarbageAfter(number(value)?)),
            "bad-json" => Some(Fault::BadJson),
            "html" => Some(Fault::Html),
            "huge" => Some(Fault::Huge(number(value)?)),
            "short" => Some(Fault::Short(number(value)?)),
            "drip" => {
                let (bytes, every) = value.split_once('/').ok_or("it is BYTES/MS")?;
                Some(Fault::Drip { bytes: number(bytes)?.max(1), every: millis(every)? })
            }
            "gzip" => Some(Fault::Gzip),
            "bomb" => Some(Fault::Bomb(number(value)?)),
            "redirect" => Some(Fault::Redirect(value.to_owned())),
            _ => return self.set_other(name, value),
        };
        if self.fault.is_some() && fault.is_some() {
            return Err("one fault is enough".into());
        }
        self.fault = fault.or(self.fault.take());
        Ok(())
    }

    fn set_other(&mut self, name: &str, value: &str) -> Result<(), String> {
        let mut header = |name: &str, value: String| self.headers.push((name.to_owned(), value));
        match name {
            "retry-after" => header(name, value.to_owned()),
            "retry-after-ms" => header(name, value.to_owned()),
            "retry-after-date" => {
                let moment = jiff::Timestamp::now() + Duration::from_secs(number(value)? as u64);
                header("retry-after", moment.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string());
            }
            "header" => {
                let (name, value) = value.split_once(':').ok_or("it is NAME: VALUE")?;
                header(name.trim(), value.trim().to_owned());
            }
            "long-headers" => header("x-long", "l".repeat(number(value)?)),
            "delay" => self.delay = millis(value)?,
            "pause" => self.pause = millis(value)?,
            "gap" => self.gap = millis(value)?,
            "chunks" => self.chunks = Some(number(value)?),
            "size" => self.size = Some(number(value)?.max(1)),
            "calls" => self.calls = Some(number(value)?),
            "talk" => self.talk = true,
            "says" => self.says = Some(value.to_owned()),
            "expires" => self.expires = Some(number(value)?),
            "cached" => self.cached = number(value)?,
            "no-usage" => self.no_usage = true,
            "chunked" => self.framing = Framing::Chunked,
            "until-close" => self.framing = Framing::UntilClose,
            "early-hints" => self.early_hints = true,
            "close" => self.keep = Keep::Close,
            "stale" => self.keep = Keep::Stale,
            "stale-next" => self.keep = Keep::StaleNext,
            _ => {
                let status = if name == "status" { value } else { name };
                let status = status.parse().ok().filter(|status| (200..=599).contains(status));
                self.status = Some(status.ok_or("see the table in behaviour.rs")?);
            }
        }
        Ok(())
    }
}

fn number(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k') => (&text[..text.len() - 1], 1 << 10),
        Some(b'm') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<usize>().map(|count| count * unit).map_err(|_| format!("{text:?} is no number"))
}

fn millis(text: &str) -> Result<Duration, String> {
    number(text).map(|count| Duration::from_millis(count as u64))
}
