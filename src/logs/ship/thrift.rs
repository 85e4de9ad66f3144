//! Thrift's compact protocol, as far as footers of Parquet files need it.
//!
//! After Apache Thrift's "Thrift Compact protocol encoding" (thrift-compact-protocol.md in its source).

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const I32: u8 = 5;
const I64: u8 = 6;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Writes the fields of one struct, in the order of their numbers.
pub(super) struct Struct<'a> {
    out: &'a mut Vec<u8>,
    /// The number of the last field: the next one's is written as what it is more.
    last: u8,
}

/// Puts a struct behind `out`.
pub(super) fn structure(out: &mut Vec<u8>, fields: impl FnOnce(&mut Struct<'_>)) {
    fields(&mut Struct { out, last: 0 });
    out.push(0);
}

impl Struct<'_> {
    pub(super) fn flag(&mut self, id: u8, value: bool) {
        self.field(id, if value { TRUE } else { FALSE });
    }

    pub(super) fn i32(&mut self, id: u8, value: i32) {
        self.field(id, I32);
        varint(zigzag(value.into()), self.out);
    }

    pub(super) fn i64(&mut self, id: u8, value: i64) {
        self.field(id, I64);
        varint(zigzag(value), self.out);
    }

    pub(super) fn binary(&mut self, id: u8, value: &[u8]) {
        self.field(id, BINARY);
        binary(value, self.out);
    }

    pub(super) fn structure(&mut self, id: u8, fields: impl FnOnce(&mut Struct<'_>)) {
        self.field(id, STRUCT);
        structure(self.out, fields);
    }

    pub(super) fn i32s(&mut self, id: u8, values: &[i32]) {
        self.list(id, I32, values.len());
        values.iter().for_each(|value| varint(zigzag((*value).into()), self.out));
    }

    pub(super) fn binaries(&mut self, id: u8, values: &[&str]) {
        self.list(id, BINARY, values.len());
        values.iter().for_each(|value| binary(value.as_bytes(), self.out));
    }

    pub(super) fn structures<T>(
        &mut self,
        id: u8,
        items: impl ExactSizeIterator<Item = T>,
        mut fields: impl FnMut(&mut Struct<'_>, T),
    ) {
        self.list(id, STRUCT, items.len());
        items.for_each(|item| structure(self.out, |one| fields(one, item)));
    }

    fn list(&mut self, id: u8, kind: u8, count: usize) {
        self.field(id, LIST);
        match count {
            0..15 => self.out.push((count as u8) << 4 | kind),
            _ => {
                self.out.push(0xF0 | kind);
                varint(count as u64, self.out);
            }
        }
    }

    fn field(&mut self, id: u8, kind: u8) {
        debug_assert!(
            id > self.last && id - self.last < 16,
            "fields are written in order, and none of ours is far off"
        );
        self.out.push((id - self.last) << 4 | kind);
        self.last = id;
    }
}

/// Seven bits a byte, the lowest first.
pub(super) fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

fn binary(value: &[u8], out: &mut Vec<u8>) {
    varint(value.len() as u64, out);
    out.extend_from_slice(value);
}
