//! Bytes of two formats that have checksums: AWS event streams, and gzip without a compressor.

use bytes::{BufMut, Bytes, BytesMut};

/// One message of `application/vnd.amazon.eventstream`, all of its headers texts:
///
///     total u32 | headers u32 | crc of these 8 bytes | headers | payload | crc of everything before
pub fn event(headers: &[(&str, &str)], payload: &[u8]) -> Bytes {
    let headers_len: usize = headers.iter().map(|(name, value)| 4 + name.len() + value.len()).sum();
    let total = 16 + headers_len + payload.len();
    let mut frame = BytesMut::with_capacity(total);
    frame.put_u32(total as u32);
    frame.put_u32(headers_len as u32);
    frame.put_u32(crc32(&frame));
    for (name, value) in headers {
        frame.put_u8(name.len() as u8);
        frame.put_slice(name.as_bytes());
        frame.put_u8(7);
        frame.put_u16(value.len() as u16);
        frame.put_slice(value.as_bytes());
    }
    frame.put_slice(payload);
    frame.put_u32(crc32(&frame));
    frame.freeze()
}

/// A gzip stream whose blocks are stored as they are.
pub struct Gzip {
    crc: u32,
    bytes: u32,
    begun: bool,
}

impl Default for Gzip {
    fn default() -> Self {
        Self { crc: !0, bytes: 0, begun: false }
    }
}

impl Gzip {
    /// The next bytes of the stream; they can be unpacked at once.
    pub fn piece(&mut self, data: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(data.len() + 16);
        self.begin(&mut out);
        for block in data.chunks(0xffff) {
            out.put_u8(0);
            put_stored(&mut out, block);
        }
        self.crc = update(self.crc, data);
        self.bytes = self.bytes.wrapping_add(data.len() as u32);
        out.freeze()
    }

    /// The last bytes of the stream.
    pub fn end(mut self) -> Bytes {
        let mut out = BytesMut::new();
        self.begin(&mut out);
        out.put_u8(1);
        put_stored(&mut out, b"");
        out.put_u32_le(!self.crc);
        out.put_u32_le(self.bytes);
        out.freeze()
    }

    fn begin(&mut self, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.begun, true) {
            out.put_slice(GZIP_HEAD);
        }
    }
}

const GZIP_HEAD: &[u8] = &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

fn put_stored(out: &mut BytesMut, block: &[u8]) {
    out.put_u16_le(block.len() as u16);
    out.put_u16_le(!(block.len() as u16));
    out.put_slice(block);
}

/// A gzip stream of zeros that is about 160 times smaller than what it unpacks to: one literal, then copies of 258 bytes
/// from one byte before, in the code that every unpacker knows.
pub fn bomb(bytes: usize) -> Bytes {
    let mut bits = Bits { out: BytesMut::from(GZIP_HEAD), held: 0, count: 0 };
    // Last block, fixed code.
    bits.put(0b011, 3);
    if bytes > 0 {
        bits.put_code(0x30, 8);
    }
    let rest = bytes.saturating_sub(1);
    for _ in 0..rest / 258 {
        bits.put_code(0b1100_0101, 8);
        bits.put_code(0, 5);
    }
    for _ in 0..rest % 258 {
        bits.put_code(0x30, 8);
    }
    bits.put_code(0, 7);
    let mut out = bits.finish();
    out.put_u32_le(crc_of_zeros(bytes));
    out.put_u32_le(bytes as u32);
    out.freeze()
}

struct Bits {
    out: BytesMut,
    held: u64,
    count: u32,
}

impl Bits {
    fn put(&mut self, value: u32, count: u32) {
        self.held |= u64::from(value) << self.count;
        self.count += count;
        while self.count >= 8 {
            self.out.put_u8(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }

    /// Huffman codes are sent with their first bit first.
    fn put_code(&mut self, code: u32, count: u32) {
        self.put(code.reverse_bits() >> (32 - count), count);
    }

    fn finish(mut self) -> BytesMut {
        self.put(0, (8 - self.count) % 8);
        self.out
    }
}

/// CRC-32 as of gzip and Ethernet.
pub fn crc32(bytes: &[u8]) -> u32 {
    !update(!0, bytes)
}

fn update(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8))
}

/// A zero byte changes the sum by a linear map of its bits, so many of them are a power of that map.
fn crc_of_zeros(mut count: usize) -> u32 {
    let apply =
        |map: &[u32; 32], sum: u32| (0..32).filter(|bit| sum >> bit & 1 == 1).fold(0, |all, bit| all ^ map[bit]);
    let mut map: [u32; 32] = std::array::from_fn(|bit| update(1 << bit, &[0]));
    let mut sum = !0;
    while count > 0 {
        if count & 1 == 1 {
            sum = apply(&map, sum);
        }
        map = std::array::from_fn(|bit| apply(&map, map[bit]));
        count >>= 1;
    }
    !sum
}

static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
}
