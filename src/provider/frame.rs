//! AWS event streams: binary frames with headers, as Bedrock streams them.
//!
//!     total length | headers length | CRC of these | headers | payload | CRC of everything before
//!        4 bytes          4               4            ...       ...             4
//!
//! Knows nothing of what events mean.

use bytes::{Buf, Bytes, BytesMut};

use crate::base::Result;
use crate::provider::broken;

const PRELUDE: usize = 12;
const TRAILER: usize = 4;

/// One message of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// `:message-type`: `event`, `exception` or `error`.
    pub kind: String,
    /// `:event-type`, `:exception-type` or `:error-code`.
    pub name: String,
    /// `:error-message`, where there is one.
    pub message: String,
    /// What it carries.
    pub payload: Bytes,
}

/// Puts frames together from bytes cut anywhere.
#[derive(Debug)]
pub struct Frames {
    buffer: BytesMut,
    limit: usize,
}

impl Frames {
    /// A decoder that refuses frames of more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { buffer: BytesMut::new(), limit }
    }

    /// Takes the next bytes and appends the frames they complete.
    ///
    /// # Errors
    /// If a checksum or a length is wrong; the stream cannot be read on after that.
    pub fn feed(&mut self, bytes: &[u8], frames: &mut Vec<Frame>) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        while self.buffer.len() >= PRELUDE {
            let mut prelude = &self.buffer[..PRELUDE];
            let checked = crc32(&self.buffer[..8]);
            let (total, headers, crc) = (prelude.get_u32() as usize, prelude.get_u32() as usize, prelude.get_u32());
            if crc != checked {
                return Err(broken("the event stream is damaged: the checksum of a frame's lengths is wrong"));
            }
            if total > self.limit || headers.saturating_add(PRELUDE + TRAILER) > total {
                return Err(broken(format!("the event stream has a frame of {total} bytes with {headers} of headers")));
            }
            if self.buffer.len() < total {
                return Ok(());
            }
            let frame = self.buffer.split_to(total).freeze();
            let mut trailer = &frame[total - TRAILER..];
            if trailer.get_u32() != crc32(&frame[..total - TRAILER]) {
                return Err(broken("the event stream is damaged: the checksum of a frame is wrong"));
            }
            let payload = frame.slice(PRELUDE + headers..total - TRAILER);
            let mut frame = read_headers(&frame[PRELUDE..PRELUDE + headers])
                .ok_or_else(|| broken("the event stream has a frame with headers that end too early"))?;
            frame.payload = payload;
            frames.push(frame);
        }
        Ok(())
    }

    /// Whether the stream may end here.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

/// The headers that say what a frame is; `None` if they do not add up.
fn read_headers(mut bytes: &[u8]) -> Option<Frame> {
    let mut frame = Frame::default();
    while !bytes.is_empty() {
        let name_length = usize::from(take(&mut bytes, 1)?[0]);
        let name = take(&mut bytes, name_length)?;
        let value: &[u8] = match take(&mut bytes, 1)?[0] {
            // True and false.
            0 | 1 => &[],
            2 => take(&mut bytes, 1)?,
            3 => take(&mut bytes, 2)?,
            4 => take(&mut bytes, 4)?,
            // A number, a point in time.
            5 | 8 => take(&mut bytes, 8)?,
            // Bytes, text.
            6 | 7 => {
                let length = usize::from(take(&mut bytes, 2)?.get_u16());
                take(&mut bytes, length)?
            }
            // A UUID.
            9 => take(&mut bytes, 16)?,
            _ => return None,
        };
        let text = || String::from_utf8_lossy(value).into_owned();
        match name {
            b":message-type" => frame.kind = text(),
            b":event-type" | b":exception-type" | b":error-code" => frame.name = text(),
            b":error-message" => frame.message = text(),
            _ => {}
        }
    }
    Some(frame)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(count)?;
    *bytes = tail;
    Some(head)
}

/// CRC-32 as in gzip and zip.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)])
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let mut crc = at as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        table[at] = crc;
        at += 1;
    }
    table
};

/// A frame as AWS writes it, for tests of whoever reads them.
#[cfg(test)]
pub(crate) fn encode(headers: &[(&str, &str)], payload: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    for (name, value) in headers {
        head.push(name.len() as u8);
        head.extend_from_slice(name.as_bytes());
        head.push(7);
        head.extend_from_slice(&(value.len() as u16).to_be_bytes());
        head.extend_from_slice(value.as_bytes());
    }
    let mut frame = Vec::new();
    frame.extend_from_slice(&((PRELUDE + head.len() + payload.len() + TRAILER) as u32).to_be_bytes());
    frame.extend_from_slice(&(head.len() as u32).to_be_bytes());
    frame.extend_from_slice(&crc32(&frame).to_be_bytes());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(payload);
    frame.extend_from_slice(&crc32(&frame).to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 16;

    fn event(name: &str, payload: &str) -> Vec<u8> {
        let headers = [(":event-type", name), (":content-type", "application/json"), (":message-type", "event")];
        encode(&headers, payload.as_bytes())
    }

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_frame_without_headers_and_payload_is_read() {
        // The smallest message of AWS's own test vectors.
        let bytes = [0, 0, 0, 16, 0, 0, 0, 0, 0x05, 0xc2, 0x48, 0xeb, 0x7d, 0x98, 0xc8, 0xff];
        let mut frames = Vec::new();
        Frames::new(LIMIT).feed(&bytes, &mut frames).unwrap();
        assert_eq!(frames, [Frame::default()]);
    }

    #[test]
    fn frames_are_the_same_however_they_are_cut() {
        let bytes = [event("messageStart", "{\"role\":\"assistant\"}"), event("metadata", "{}")].concat();
        let mut whole = Vec::new();
        Frames::new(LIMIT).feed(&bytes, &mut whole).unwrap();
        assert_eq!(whole.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["messageStart", "metadata"]);
        assert_eq!((whole[0].kind.as_str(), &whole[0].payload[..]), ("event", &b"{\"role\":\"assistant\"}"[..]));
        for cut in 0..bytes.len() {
            let mut frames = Vec::new();
            let mut decoder = Frames::new(LIMIT);
            decoder.feed(&bytes[..cut], &mut frames).unwrap();
            decoder.feed(&bytes[cut..], &mut frames).unwrap();
            assert_eq!(frames, whole, "cut at {cut}");
            assert!(decoder.is_empty());
        }
    }

    #[test]
    fn headers_of_every_type_are_stepped_over() {
        let mut head = Vec::new();
        for (kind, width) in [(0u8, 0), (1, 0), (2, 1), (3, 2), (4, 4), (5, 8), (8, 8), (9, 16)] {
            head.extend_from_slice(&[1, b'x', kind]);
            head.extend(std::iter::repeat_n(7u8, width));
        }
        head.extend_from_slice(b"\x01y\x06\x00\x03abc\x0d:message-type\x07\x00\x05event");
        assert_eq!(read_headers(&head).unwrap().kind, "event");
        for cut in 1..head.len() - 3 {
            // Whatever is cut off, nothing panics; a header that is whole may still be read.
            let _ = read_headers(&head[..cut]);
        }
        assert_eq!(read_headers(&[1, b'x', 10]), None);
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let bytes = event("contentBlockDelta", "{\"delta\":{\"text\":\"hi\"}}");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let mut frames = Vec::new();
            assert!(Frames::new(LIMIT).feed(&damaged, &mut frames).is_err(), "byte {at}");
        }
        let mut frames = Vec::new();
        assert!(Frames::new(64).feed(&bytes, &mut frames).is_err(), "larger than the limit");
    }
}
