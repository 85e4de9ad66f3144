//! For tests: writes small GGUF files and safetensors folders in the real formats. Knows nothing of how they are read.

use std::path::{Path, PathBuf};

use crate::kernel::Dtype;
use crate::kernel::testing::Dice;

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

/// Tokens that a row of a windowed layer sees.
pub(crate) const TINY_WINDOW: u32 = 40;

/// A decoder of random weights that a test wants.
#[derive(Clone, Copy)]
pub(crate) struct Tiny {
    /// `llama`: heads interleaved in the file. `qwen2`: halves, and biases for q, k and v. `gemma3`: halves, norms on both
    /// sides and of heads, the first layer with a window of [`TINY_WINDOW`].
    pub(crate) arch: &'static str,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    /// Without a head of its own.
    pub(crate) tied: bool,
    /// Of the matrices, in turn.
    pub(crate) dtypes: &'static [Dtype],
}

impl Tiny {
    /// The file, of two layers.
    pub(crate) fn file(&self, seed: u64) -> GgufFile {
        let mut dice = Dice::new(seed);
        let Self { arch, hidden, heads, kv_heads, dim, ffn, vocab, .. } = *self;
        let (q, kv) = (heads * dim, kv_heads * dim);
        let key = |name: &str| format!("{arch}.{name}");
        let mut file = GgufFile::new()
            .text("general.architecture", arch)
            .u32(&key("block_count"), 2)
            .u32(&key("embedding_length"), hidden as u32)
            .u32(&key("attention.head_count"), heads as u32)
            .u32(&key("attention.head_count_kv"), kv_heads as u32)
            .u32(&key("attention.key_length"), dim as u32)
            .u32(&key("attention.value_length"), dim as u32)
            .u32(&key("feed_forward_length"), ffn as u32)
            .u32(&key("context_length"), 512)
            .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5);
        if arch == "gemma3" {
            file = file
                .u32(&key("attention.sliding_window"), TINY_WINDOW)
                .u32(&key("attention.sliding_window_pattern"), 2)
                .f32(&key("rope.freq_base"), 1e6);
        }
        let vector = |dice: &mut Dice, length: usize, centre: f32, spread: f32| -> Vec<u8> {
            (0..length).flat_map(|_| (centre + spread * dice.value()).to_le_bytes()).collect()
        };
        let mut matrices = vec![("token_embd.weight".to_owned(), vocab, hidden)];
        if !self.tied {
            matrices.push(("output.weight".to_owned(), vocab, hidden));
        }
        let norm = vector(&mut dice, hidden, 1.0, 0.2);
        file = file.tensor("output_norm.weight", Dtype::F32, &[hidden as u64], norm);
        for layer in 0..2 {
            let name = |part: &str| format!("blk.{layer}.{part}");
            let mut norms = vec![("attn_norm.weight", hidden), ("ffn_norm.weight", hidden)];
            if arch == "gemma3" {
                norms.extend([("post_attention_norm.weight", hidden), ("post_ffw_norm.weight", hidden)]);
                norms.extend([("attn_q_norm.weight", dim), ("attn_k_norm.weight", dim)]);
            }
            for (part, length) in norms {
                let norm = vector(&mut dice, length, 1.0, 0.2);
                file = file.tensor(&name(part), Dtype::F32, &[length as u64], norm);
            }
            for (part, length) in [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)] {
                if arch == "qwen2" {
                    let bias = vector(&mut dice, length, 0.0, 0.5);
                    file = file.tensor(&name(part), Dtype::F32, &[length as u64], bias);
                }
            }
            matrices.extend([
                (name("attn_q.weight"), q, hidden),
                (name("attn_k.weight"), kv, hidden),
                (name("attn_v.weight"), kv, hidden),
                (name("attn_output.weight"), hidden, q),
                (name("ffn_gate.weight"), ffn, hidden),
                (name("ffn_up.weight"), ffn, hidden),
                (name("ffn_down.weight"), hidden, ffn),
            ]);
        }
        for (i, (name, rows, cols)) in matrices.into_iter().enumerate() {
            let dtype = self.dtypes[i % self.dtypes.len()];
            // Floats of the size that a network's are.
            let mut float = || dice.value() * 1.7 / (hidden as f32).sqrt();
            let data = match dtype {
                Dtype::F32 => (0..rows * cols).flat_map(|_| float().to_le_bytes()).collect(),
                Dtype::F16 => (0..rows * cols).flat_map(|_| half::f16::from_f32(float()).to_le_bytes()).collect(),
                Dtype::BF16 => (0..rows * cols).flat_map(|_| half::bf16::from_f32(float()).to_le_bytes()).collect(),
                quantised => {
                    let mut data = dice.weights(quantised, rows, cols);
                    // Scales of scales: what they multiply is up to 63, or 127.
                    let (at, by) = match quantised {
                        Dtype::Q4_K | Dtype::Q5_K => (&[0, 2][..], 1.0 / 64.0),
                        Dtype::Q6_K => (&[208][..], 1.0 / 256.0),
                        _ => (&[][..], 1.0),
                    };
                    for block in data.chunks_exact_mut(quantised.block_bytes()) {
                        for &at in at {
                            let scale = half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32() * by;
                            block[at..at + 2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
                        }
                    }
                    data
                }
            };
            file = file.tensor(&name, dtype, &[cols as u64, rows as u64], data);
        }
        file
    }
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
