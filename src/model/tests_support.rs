//! For tests: writes small GGUF files and safetensors folders in the real formats. Knows nothing of how they are read.

use std::path::{Path, PathBuf};

use crate::kernel::Dtype;

/// A GGUF file being put together; [`GgufFile::bytes`] is the file.
#[derive(Clone, Default)]
pub(crate) struct GgufFile {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl GgufFile {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn key(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.keys += 1;
        put_text(&mut self.metadata, key.as_bytes());
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value.as_ref());
        self
    }

    fn list<T: AsRef<[u8]>>(self, key: &str, element: u32, values: impl IntoIterator<Item = T>) -> Self {
        let mut count = 0u64;
        let mut bytes = Vec::<u8>::new();
        for value in values {
            count += 1;
            bytes.extend(value.as_ref());
        }
        let mut list = element.to_le_bytes().to_vec();
        list.extend(count.to_le_bytes());
        list.extend(bytes);
        self.key(key, 9, list)
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.key(key, 4, value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.key(key, 6, value.to_le_bytes())
    }

    pub(crate) fn flag(self, key: &str, value: bool) -> Self {
        self.key(key, 7, [u8::from(value)])
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        put_text(&mut bytes, value.as_bytes());
        self.key(key, 8, bytes)
    }

    pub(crate) fn texts<T: AsRef<[u8]>>(self, key: &str, values: impl IntoIterator<Item = T>) -> Self {
        let values = values.into_iter().map(|value| {
            let mut bytes = Vec::new();
            put_text(&mut bytes, value.as_ref());
            bytes
        });
        self.list(key, 8, values)
    }

    pub(crate) fn f32s(self, key: &str, values: impl IntoIterator<Item = f32>) -> Self {
        self.list(key, 6, values.into_iter().map(f32::to_le_bytes))
    }

    pub(crate) fn i32s(self, key: &str, values: impl IntoIterator<Item = i32>) -> Self {
        self.list(key, 5, values.into_iter().map(i32::to_le_bytes))
    }

    /// `shape` in the file's order: inputs first.
    pub(crate) fn tensor(mut self, name: &str, dtype: Dtype, shape: &[u64], data: Vec<u8>) -> Self {
        let rows: u64 = shape[1..].iter().product();
        assert_eq!(dtype.row_bytes(shape[0] as usize).unwrap() * rows as usize, data.len(), "{name}");
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(data);
        self.raw_tensor(name, dtype.ggml(), shape, offset)
    }

    /// A tensor's entry without its data, right or wrong.
    pub(crate) fn raw_tensor(mut self, name: &str, kind: u32, shape: &[u64], offset: u64) -> Self {
        self.tensors += 1;
        put_text(&mut self.infos, name.as_bytes());
        self.infos.extend((shape.len() as u32).to_le_bytes());
        self.infos.extend(shape.iter().flat_map(|length| length.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.keys.to_le_bytes());
        file.extend(self.metadata);
        file.extend(self.infos);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }

    /// Writes the file as `model.gguf` into `folder`.
    pub(crate) fn write(self, folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

/// A tensor for [`safetensors`]: name, `F32` | `F16` | `BF16` …, shape (outputs first), bytes.
pub(crate) type SafeTensor<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

/// A safetensors file.
pub(crate) fn safetensors(tensors: &[SafeTensor<'_>]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::<u8>::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert((*name).to_owned(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// The demo model, if this machine has it: in `NEUROND_TEST_MODELS`, `target/test-models` or `models`. Says so on stdout
/// when a test has to be skipped for want of it.
pub(crate) fn demo_model() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = std::env::var_os("NEUROND_TEST_MODELS")
        .map(PathBuf::from)
        .into_iter()
        .chain([root.join("target/test-models"), root.join("models")]);
    let found = folders.map(|folder| folder.join("SmolLM2-135M-Instruct.Q4_1.gguf")).find(|path| path.is_file());
    if found.is_none() {
        println!(
            "skipped: no weights (SmolLM2-135M-Instruct.Q4_1.gguf is not in NEUROND_TEST_MODELS, target/test-models or models)"
        );
    }
    found
}
