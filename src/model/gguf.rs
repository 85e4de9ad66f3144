//! Reads GGUF files, versions 2 and 3: metadata and where the tensors lie. The file is mapped, not read.
//!
//!     "GGUF" version tensors keys | key type value … | name dims type offset … | pad | tensor data …
//!
//! Every count and length in the file is a claim of somebody else: it is checked against the bytes that are there before
//! anything is done with it, so that a cut or corrupt file ends in an error, never in a panic or a huge allocation.
//! What the keys mean is `spec.rs` and `tokenizer.rs`; what the bytes of a tensor mean is `kernel::quant`.
//!
//! A mapped file must not be cut while it is in use (replacing or deleting it is fine): the system would stop the process.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::base::{Error, Kind, Result};
use crate::kernel::Dtype;

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    header: Header,
}

/// Where a tensor lies and what it looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Format of the weights.
    pub dtype: Dtype,
    /// Outputs: the product of all dimensions but the first. 1 for vectors.
    pub rows: usize,
    /// Inputs: the dimension that is contiguous in memory.
    pub cols: usize,
    /// Bytes in the file.
    pub range: Range<usize>,
}

/// What a file says before its tensor data.
#[derive(Debug, Default)]
struct Header {
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

/// A metadata value. Strings and arrays stay in the file.
#[derive(Debug, Clone)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { element: u32, count: usize, bytes: Range<usize> },
}

const TYPE_BOOL: u32 = 7;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;
/// Arrays in arrays, deeper than any real file.
const MAX_NESTING: usize = 4;
/// As many dimensions as ggml has.
const MAX_DIMENSIONS: u32 = 4;

impl Gguf {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// `ModelUnavailable` when the file cannot be read or is not whole, `Unsupported` for versions and tensor formats
    /// that are not read.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Arc::new(map_file(path)?);
        let header = parse(&map).map_err(|error| error.context(path.display()))?;
        Ok(Self { path: path.to_owned(), map, header })
    }

    /// Which file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole mapped file; [`TensorInfo::range`] points into it.
    pub fn map(&self) -> &Arc<Mmap> {
        &self.map
    }

    /// All tensors, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.header.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// A tensor by its name in the file.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    /// A text value; `None` when the key is not there.
    ///
    /// # Errors
    /// This and the other readers: `ModelUnavailable` when the key holds something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => {
                let text = std::str::from_utf8(&self.map[range.clone()]);
                text.map(Some).map_err(|_| self.wrong(key, "text in UTF-8"))
            }
            Some(_) => Err(self.wrong(key, "text")),
        }
    }

    /// A whole number; any integer type that holds it.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        let number = match self.header.metadata.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(number)) => u32::try_from(*number).ok(),
            Some(Value::Signed(number)) => u32::try_from(*number).ok(),
            Some(_) => None,
        };
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number of 32 bits"))
    }

    /// A number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) => Ok(Some(*number as f32)),
            Some(Value::Unsigned(number)) => Ok(Some(*number as f32)),
            Some(Value::Signed(number)) => Ok(Some(*number as f32)),
            Some(_) => Err(self.wrong(key, "a number")),
        }
    }

    /// True or false.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A list of texts, read out of the file as the caller goes. The bytes should be UTF-8, but need not be.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element: TYPE_STRING, count, bytes }) => {
                Ok(Some(Strings { rest: &self.map[bytes.clone()], left: *count }))
            }
            Some(_) => Err(self.wrong(key, "a list of texts")),
        }
    }

    /// A list of 32-bit floats.
    pub fn f32s<'a>(&'a self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = f32> + use<'a>>> {
        Ok(self.words(key, &[6], "a list of 32-bit floats")?.map(|words| words.map(f32::from_le_bytes)))
    }

    /// A list of 32-bit whole numbers, signed or not.
    pub fn i32s<'a>(&'a self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = i32> + use<'a>>> {
        Ok(self.words(key, &[4, 5], "a list of 32-bit whole numbers")?.map(|words| words.map(i32::from_le_bytes)))
    }

    /// Whether the key holds a list.
    pub fn is_list(&self, key: &str) -> bool {
        matches!(self.header.metadata.get(key), Some(Value::Array { .. }))
    }

    fn words<'a>(
        &'a self,
        key: &str,
        elements: &[u32],
        wanted: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = [u8; 4]> + use<'a>>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element, bytes, .. }) if elements.contains(element) => {
                Ok(Some(self.map[bytes.clone()].chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]])))
            }
            Some(_) => Err(self.wrong(key, wanted)),
        }
    }

    fn wrong(&self, key: &str, wanted: &str) -> Error {
        broken(&self.path, format_args!("the key {key} should hold {wanted}; the file was made wrongly"))
    }
}

/// The texts of a list.
#[derive(Clone)]
pub struct Strings<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        // Cannot fail in a header that was parsed; ends early rather than trusting that.
        let (length, rest) = self.rest.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        self.rest = rest;
        self.left = self.left.saturating_sub(1);
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// Maps a file for reading.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    let cannot = |error: std::io::Error| {
        broken(path, format_args!("cannot be read ({error}); check the path and its permissions")).with_source(error)
    };
    let file = File::open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(broken(path, "is not a file"));
    }
    // SAFETY: the map is only read. That nobody cuts the file meanwhile is asked of the operator (head of this file).
    unsafe { Mmap::map(&file) }.map_err(cannot)
}

/// An error about a model's files.
pub(super) fn broken(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(Kind::ModelUnavailable, format!("{}: {what}", path.display()))
}

/// A place in the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = usize::try_from(length).ok().and_then(|length| rest.get(..length)) else {
            return Err(cut(format_args!("{what} wants {length} bytes at {}, and {} are left", self.at, rest.len())));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Result<Range<usize>> {
        let length = self.u64(what)?;
        self.take(length, what)?;
        Ok(self.at - length as usize..self.at)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let range = self.text(what)?;
        String::from_utf8(self.bytes[range].to_vec()).map_err(|_| cut(format_args!("{what} is not text")))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array(what)?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array(what)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(what)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array(what)?))),
            4 => Value::Unsigned(u64::from(self.u32(what)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array(what)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(what)?))),
            TYPE_BOOL => Value::Bool(self.array::<1>(what)?[0] != 0),
            TYPE_STRING => Value::Text(self.text(what)?),
            TYPE_ARRAY => {
                let (element, count) = (self.u32(what)?, self.u64(what)?);
                let start = self.at;
                self.skip_elements(element, count, MAX_NESTING)?;
                Value::Array { element, count: count as usize, bytes: start..self.at }
            }
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(cut(format_args!("there is no metadata type {kind}"))),
        })
    }

    fn skip_elements(&mut self, element: u32, count: u64, nesting: usize) -> Result<()> {
        let what = "a metadata list";
        let width = match element {
            0 | 1 | TYPE_BOOL => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            TYPE_STRING => {
                for _ in 0..count {
                    self.text(what)?;
                }
                return Ok(());
            }
            TYPE_ARRAY if nesting > 0 => {
                for _ in 0..count {
                    let (element, count) = (self.u32(what)?, self.u64(what)?);
                    self.skip_elements(element, count, nesting - 1)?;
                }
                return Ok(());
            }
            _ => return Err(cut(format_args!("there is no metadata list of type {element}"))),
        };
        // A count that overflows wants more bytes than any file has.
        self.take(count.saturating_mul(width), what)?;
        Ok(())
    }
}

/// An error about the contents of the file; the caller puts the path in front.
fn cut(what: impl std::fmt::Display) -> Error {
    Error::new(Kind::ModelUnavailable, format!("the GGUF file is cut or corrupt, fetch it again ({what})"))
}

fn parse(bytes: &[u8]) -> Result<Header> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(4, "the magic").ok() != Some(b"GGUF".as_slice()) {
        return Err(Error::new(Kind::ModelUnavailable, "this is not a GGUF file (it does not begin with GGUF)"));
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 2 | 3) => {
            return Err(Error::unsupported("this GGUF file is big-endian; convert it to little-endian"));
        }
        version => {
            return Err(Error::unsupported(format!(
                "GGUF version {version} is not read, only 2 and 3; convert it anew"
            )));
        }
    }
    let (tensor_count, key_count) = (reader.u64("the tensor count")?, reader.u64("the key count")?);
    // Nothing is reserved by these counts: a claim of 2^60 keys ends at the end of the file.
    let mut metadata = HashMap::new();
    for _ in 0..key_count {
        let key = reader.name("a metadata key")?;
        let kind = reader.u32("a metadata type")?;
        let value = reader.value(kind).map_err(|error| error.context(format_args!("key {key:?}")))?;
        if metadata.contains_key(&key) {
            return Err(cut(format_args!("the key {key:?} is there twice")));
        }
        metadata.insert(key, value);
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 20 => *alignment,
        Some(_) => return Err(cut("general.alignment is not a power of two up to a MiB")),
    };
    let mut found = Vec::new();
    for _ in 0..tensor_count {
        let name = reader.name("a tensor name")?;
        let tensor = read_tensor(&mut reader).map_err(|error| error.context(format_args!("tensor {name:?}")))?;
        found.push((name, tensor));
    }
    let data = (reader.at as u64).next_multiple_of(alignment);
    let mut tensors = HashMap::with_capacity(found.len());
    for (name, (offset, mut info)) in found {
        let size = info.range.end;
        let start = data.checked_add(offset).and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(size)).filter(|&end| end <= bytes.len());
        let (Some(start), Some(end)) = (start, end) else {
            return Err(cut(format_args!(
                "tensor {name:?} wants {size} bytes at {data} + {offset}, and the file has {}",
                bytes.len()
            )));
        };
        if offset % alignment != 0 {
            return Err(cut(format_args!("tensor {name:?} is not aligned to {alignment}")));
        }
        info.range = start..end;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(cut(format_args!("tensor {name:?} is there twice")));
        }
    }
    Ok(Header { metadata, tensors })
}

/// A tensor's offset in the data, and its shape with `range` as `0..size` for now.
fn read_tensor(reader: &mut Reader<'_>) -> Result<(u64, TensorInfo)> {
    let dimensions = reader.u32("a number of dimensions")?;
    if dimensions > MAX_DIMENSIONS {
        return Err(cut(format_args!("{dimensions} dimensions")));
    }
    let (mut rows, mut cols) = (1usize, 1usize);
    for dimension in 0..dimensions {
        let length = usize::try_from(reader.u64("a dimension")?).map_err(|_| cut("a dimension is too large"))?;
        if dimension == 0 {
            cols = length;
        } else {
            rows = rows.checked_mul(length).ok_or_else(|| cut("its shape is too large"))?;
        }
    }
    let number = reader.u32("a tensor type")?;
    let Some(dtype) = Dtype::from_ggml(number) else {
        let known = Dtype::ALL.map(Dtype::name).join(", ");
        return Err(Error::unsupported(format!("weights of GGUF type {number} are not read; these are: {known}")));
    };
    let row_bytes = dtype.row_bytes(cols).ok_or_else(|| {
        cut(format_args!("a row of {cols} is not whole blocks of {} {}", dtype.block_len(), dtype.name()))
    })?;
    let size = row_bytes.checked_mul(rows).ok_or_else(|| cut("its shape is too large"))?;
    Ok((reader.u64("a tensor offset")?, TensorInfo { dtype, rows, cols, range: 0..size }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::tests_support::GgufFile;

    fn small() -> GgufFile {
        GgufFile::new()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 3)
            .f32("llama.rope.freq_base", 1e4)
            .flag("tokenizer.ggml.add_bos_token", true)
            .texts("tokenizer.ggml.tokens", ["a", "bc", "", "é"])
            .f32s("tokenizer.ggml.scores", [0.0, -1.5])
            .i32s("tokenizer.ggml.token_type", [3, 1])
            .tensor("a", Dtype::F32, &[3, 2], (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect())
            .tensor("b", Dtype::Q4_0, &[64], vec![7; 36])
    }

    fn write(file: GgufFile) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        (folder, path)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let (_folder, path) = write(small());
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.u32("llama.block_count").unwrap(), Some(3));
        assert_eq!(gguf.f32("llama.rope.freq_base").unwrap(), Some(1e4));
        assert_eq!(gguf.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
        assert_eq!(gguf.u32("nothing").unwrap(), None);
        let tokens: Vec<_> = gguf.strings("tokenizer.ggml.tokens").unwrap().unwrap().collect();
        assert_eq!(tokens, [b"a".as_slice(), b"bc", b"", "é".as_bytes()]);
        assert_eq!(gguf.f32s("tokenizer.ggml.scores").unwrap().unwrap().collect::<Vec<_>>(), [0.0, -1.5]);
        assert_eq!(gguf.i32s("tokenizer.ggml.token_type").unwrap().unwrap().collect::<Vec<_>>(), [3, 1]);
        let a = gguf.tensor("a").unwrap();
        assert_eq!((a.dtype, a.rows, a.cols, a.range.len()), (Dtype::F32, 2, 3, 24));
        assert_eq!(gguf.map()[a.range.clone()][4..8], 1f32.to_le_bytes());
        let b = gguf.tensor("b").unwrap();
        assert_eq!((b.dtype, b.rows, b.cols, &gguf.map()[b.range.clone()]), (Dtype::Q4_0, 1, 64, [7; 36].as_slice()));
    }

    #[test]
    fn a_key_of_another_type_is_named() {
        let (_folder, path) = write(small());
        let gguf = Gguf::open(&path).unwrap();
        let error = gguf.u32("general.architecture").unwrap_err();
        assert!(error.message().contains("general.architecture should hold a whole number"), "{error}");
        assert!(error.message().contains("m.gguf"), "{error}");
        assert!(gguf.strings("tokenizer.ggml.scores").is_err());
        assert!(gguf.bool("llama.block_count").is_err());
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        let whole = small().bytes();
        parse(&whole).unwrap();
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "cut at {length} of {}", whole.len());
        }
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let check = |bytes: &[u8], words: &str| {
            let error = parse(bytes).unwrap_err();
            assert!(error.message().contains(words), "{error} / {words}");
        };
        let with = |at: usize, bytes: &[u8]| {
            let mut file = small().bytes();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            file
        };
        check(b"", "not a GGUF file");
        check(b"PK\x03\x04aaaaaaaaaaaaaa", "not a GGUF file");
        check(&with(4, &[1, 0, 0, 0]), "version 1 is not read");
        check(&with(4, &[0, 0, 0, 3]), "big-endian");
        check(&with(16, &[0xff; 8]), "cut or corrupt");
        check(&with(8, &[0xff; 7]), "cut or corrupt");
        check(&GgufFile::new().u32("general.alignment", 24).bytes(), "power of two");
        check(&GgufFile::new().u32("a", 1).u32("a", 2).bytes(), "twice");
        check(&GgufFile::new().raw_tensor("x", 4, &[32], 0).bytes(), "type 4 are not read");
        check(&GgufFile::new().raw_tensor("x", 2, &[33], 0).bytes(), "whole blocks of 32 Q4_0");
        check(&GgufFile::new().raw_tensor("x", 0, &[1 << 40, 1 << 40], 0).bytes(), "too large");
        check(&GgufFile::new().raw_tensor("x", 0, &[1 << 40], 0).bytes(), "the file has");
        check(&GgufFile::new().raw_tensor("x", 0, &[0], u64::MAX - 31).bytes(), "the file has");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn flipped_bytes_never_panic(flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = small().bytes();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(header) = parse(&bytes) {
                for info in header.tensors.values() {
                    prop_assert!(info.range.end <= bytes.len());
                }
            }
        }

        #[test]
        fn random_bytes_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..300), keys in 0u64..4, tensors in 0u64..4) {
            let mut bytes = b"GGUF\x03\0\0\0".to_vec();
            bytes.extend(tensors.to_le_bytes());
            bytes.extend(keys.to_le_bytes());
            bytes.extend(&tail);
            let _ = parse(&bytes);
            let _ = parse(&tail);
        }
    }
}
