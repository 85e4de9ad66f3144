//! The tensors of a model, whatever file they lie in, under one set of names: GGUF's.
//!
//!     model.layers.3.self_attn.q_proj.weight  (safetensors)  ─┐
//!     blk.3.attn_q.weight                     (GGUF)         ─┴─> tensor("blk.3.attn_q.weight") = rows x cols, bytes
//!
//! Files are mapped: a tensor costs nothing until its bytes are read, and [`Weights::release`] gives the pages back once
//! they are packed into a kernel's own layout. Nothing is converted here. The order of q and k rows stays the file's:
//! [`crate::model::spec::RopeStyle`] says which it is.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap};
use serde_json::Value;

use crate::base::{Error, Kind, Result};
use crate::kernel::Dtype;
use crate::kernel::quant::dequantize_row;
use crate::model::encoder::spec::{self as encoder, EncoderSpec};
use crate::model::files::{ModelFiles, read_json};
use crate::model::gguf::{broken, map_file};
use crate::model::spec::DecoderSpec;

/// All tensors of a model.
#[derive(Debug)]
pub struct Weights {
    files: Arc<ModelFiles>,
    maps: Vec<Arc<Mmap>>,
    tensors: HashMap<String, Place>,
}

/// A matrix in its file, row-major: `rows` outputs of `cols` inputs. Vectors have one row.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Format of the weights.
    pub dtype: Dtype,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows` times [`Dtype::row_bytes`] of `cols`.
    pub data: &'a [u8],
}

#[derive(Debug)]
struct Place {
    map: usize,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    range: Range<usize>,
}

impl<'a> Tensor<'a> {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.data.len() / self.rows.max(1)
    }

    /// The bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let length = self.row_bytes();
        &self.data[row * length..][..length]
    }

    /// All weights as numbers, `[rows, cols]`: for norms, biases and tests, not for large matrices.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.rows * self.cols];
        dequantize_row(self.dtype, self.data, &mut out)?;
        Ok(out)
    }
}

impl Weights {
    /// Opens the weights of a GGUF file or of a safetensors folder.
    ///
    /// # Errors
    /// `ModelUnavailable` when a file is missing or not whole, `Unsupported` for formats that are not read; the message
    /// names the file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Arc::new(ModelFiles::open(path)?))
    }

    /// The weights of an open model.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn of(files: Arc<ModelFiles>) -> Result<Self> {
        let weights = Self::peek(files)?;
        for map in &weights.maps {
            // Only a hint: starts reading a cold file while the header is being worked on.
            let _ = map.advise(Advice::WillNeed);
        }
        Ok(weights)
    }

    /// [`Weights::of`], for whoever wants to know about the tensors and not their numbers.
    pub(super) fn peek(files: Arc<ModelFiles>) -> Result<Self> {
        let (maps, tensors) = match &*files {
            ModelFiles::Gguf(gguf) => {
                let place = |(name, info): (&str, &super::gguf::TensorInfo)| {
                    let (dtype, rows, cols) = (info.dtype, info.rows, info.cols);
                    (name.to_owned(), Place { map: 0, dtype, rows, cols, range: info.range.clone() })
                };
                (vec![Arc::clone(gguf.map())], gguf.tensors().map(place).collect())
            }
            ModelFiles::Folder { path, .. } => open_safetensors(path)?,
        };
        Ok(Self { files, maps, tensors })
    }

    /// A tensor by its canonical name.
    ///
    /// # Errors
    /// `ModelUnavailable` when the model has none of that name.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find(name).ok_or_else(|| broken(self.files.path(), format_args!("has no tensor {name}; fetch it again")))
    }

    /// A tensor by its canonical name, if the model has it.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let place = self.tensors.get(name)?;
        let data = &self.maps[place.map][place.range.clone()];
        Some(Tensor { dtype: place.dtype, rows: place.rows, cols: place.cols, data })
    }

    /// Gives the pages of a tensor back to the system: what was packed elsewhere need not stay in memory twice.
    /// Reading it again works, from the disk.
    pub fn release(&self, name: &str) {
        let Some(place) = self.tensors.get(name) else { return };
        #[cfg(unix)]
        {
            let (map, range) = (&self.maps[place.map], &place.range);
            // SAFETY: the mapping is private, read-only and backed by the file: dropped pages read the same again.
            // A failure costs memory only.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }

    /// Bytes of all tensors in their files.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.range.len() as u64).sum()
    }

    /// The decoder that these tensors make up, every one of them present and of the right shape.
    ///
    /// # Errors
    /// As [`DecoderSpec::read`], and `ModelUnavailable` for the first tensor that is missing or has another shape.
    pub fn spec(&self) -> Result<DecoderSpec> {
        let mut spec = DecoderSpec::read(&self.files)?;
        // Files with a tied head leave it out, and some say nothing about it elsewhere.
        spec.tied_head |= self.find("output.weight").is_none();
        self.agree(spec.tensors())?;
        for (name, known) in [
            ("blk.0.attn_output.bias", false),
            ("blk.0.ffn_down.bias", false),
            ("blk.0.attn_q_norm.weight", spec.qk_norm),
            ("blk.0.post_attention_norm.weight", spec.post_norms),
        ] {
            if self.find(name).is_some() && !known {
                let path = self.files.path().display();
                return Err(Error::unsupported(format!("{path}: tensors like {name} are not supported yet")));
            }
        }
        Ok(spec)
    }

    /// The encoder that these tensors make up, every one of them present and of the right shape.
    ///
    /// # Errors
    /// As [`EncoderSpec::read`], and `ModelUnavailable` for the first tensor that is missing or has another shape.
    pub fn encoder(&self) -> Result<EncoderSpec> {
        let spec = EncoderSpec::read(&self.files)?;
        self.agree(spec.tensors())?;
        Ok(spec)
    }

    /// Each of these names is a tensor of so many rows and columns.
    fn agree(&self, tensors: impl Iterator<Item = (String, usize, usize)>) -> Result<()> {
        for (name, rows, cols) in tensors {
            let tensor = self.tensor(&name)?;
            if (tensor.rows, tensor.cols) != (rows, cols) {
                return Err(broken(
                    self.files.path(),
                    format_args!(
                        "tensor {name} is {} x {}, and the configuration makes it {rows} x {cols}",
                        tensor.rows, tensor.cols
                    ),
                ));
            }
        }
        Ok(())
    }
}

type Opened = (Vec<Arc<Mmap>>, HashMap<String, Place>);

fn open_safetensors(folder: &Path) -> Result<Opened> {
    let mut maps = Vec::new();
    let mut tensors = HashMap::new();
    for path in shards(folder)? {
        let map = map_file(&path)?;
        read_shard(&path, &map, maps.len(), &mut tensors)?;
        maps.push(Arc::new(map));
    }
    name_post_norms(&mut tensors);
    Ok((maps, tensors))
}

/// Where the feed-forward's norm has a name of its own, what elsewhere is called the one after attention is just that.
fn name_post_norms(tensors: &mut HashMap<String, Place>) {
    let layers: Vec<String> = tensors.keys().filter_map(|name| name.strip_suffix(PRE_FFN).map(str::to_owned)).collect();
    for layer in layers {
        let name = |part: &str| format!("{layer}{part}");
        for (from, to) in [("ffn_norm.weight", "post_attention_norm.weight"), (PRE_FFN, "ffn_norm.weight")] {
            if let Some(place) = tensors.remove(&name(from)) {
                tensors.insert(name(to), place);
            }
        }
    }
}

/// The norm before the feed-forward, in families that have one behind it, too.
const PRE_FFN: &str = "pre_ffw_norm.weight";

/// The safetensors files of a folder: what the index names, or the only one.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let index_path = folder.join("model.safetensors.index.json");
    let Some(index) = read_json(&index_path)? else { return Ok(vec![folder.join("model.safetensors")]) };
    let Some(weight_map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(broken(&index_path, "has no weight_map; fetch it again"));
    };
    let names: BTreeSet<_> = weight_map.values().filter_map(Value::as_str).collect();
    for name in &names {
        // A name with a path in it would open files elsewhere.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(broken(&index_path, format_args!("names {name:?}, which is not a file of this folder")));
        }
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn read_shard(path: &Path, map: &Mmap, index: usize, tensors: &mut HashMap<String, Place>) -> Result<()> {
    let cut = |what: &dyn std::fmt::Display| {
        broken(path, format_args!("the safetensors file is cut or corrupt, fetch it again ({what})"))
    };
    let (length, metadata) = safetensors::SafeTensors::read_metadata(map).map_err(|error| cut(&error))?;
    let data = length.checked_add(8).filter(|&data| data <= map.len()).ok_or_else(|| cut(&"no data"))?;
    for (name, info) in metadata.tensors() {
        let Some(canonical) = canonical_name(&name).or_else(|| encoder::canonical_name(&name)) else { continue };
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => {
                let path = path.display();
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("{path}: tensor {name} is {other:?}; F32, F16 and BF16 are read"),
                ));
            }
        };
        let (cols, outer) = info.shape.split_last().map_or((1, [].as_slice()), |(&last, outer)| (last, outer));
        let rows = outer.iter().try_fold(1usize, |product, &length| product.checked_mul(length));
        let rows = rows.ok_or_else(|| cut(&"a shape is too large"))?;
        let (start, end) = info.data_offsets;
        let range = data.checked_add(start).zip(data.checked_add(end)).map(|(start, end)| start..end);
        let size = dtype.row_bytes(cols).and_then(|bytes| bytes.checked_mul(rows));
        match range.filter(|range| range.start <= range.end && range.end <= map.len() && Some(range.len()) == size) {
            Some(range) => tensors.insert(canonical, Place { map: index, dtype, rows, cols, range }),
            None => return Err(cut(&format_args!("tensor {name} does not lie in the file"))),
        };
    }
    Ok(())
}

/// GGUF's name for a decoder's tensor in a hub's file; `None` for those that it does not need.
fn canonical_name(name: &str) -> Option<String> {
    // The text part of a model that sees as well lies under a name of its own, outside or inside of that of all.
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    match name {
        "embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("layers.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (module, kind) = part.rsplit_once('.')?;
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "pre_feedforward_layernorm" => "pre_ffw_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        _ => return None,
    };
    matches!(kind, "weight" | "bias").then(|| format!("blk.{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests_support::{GgufFile, SafeTensor, demo_model, safetensors};

    fn floats(count: usize) -> Vec<u8> {
        (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect()
    }

    /// Every tensor of a decoder with hidden 8, ffn 12, 2 heads of 4, 1 KV head, 1 layer, vocabulary 5.
    fn tiny() -> Vec<SafeTensor<'static>> {
        vec![
            ("model.embed_tokens.weight", "F32", vec![5, 8], floats(40)),
            ("model.norm.weight", "F16", vec![8], vec![0; 16]),
            ("lm_head.weight", "BF16", vec![5, 8], vec![0x80; 80]),
            ("model.layers.0.input_layernorm.weight", "F32", vec![8], floats(8)),
            ("model.layers.0.self_attn.q_proj.weight", "F32", vec![8, 8], floats(64)),
            ("model.layers.0.self_attn.k_proj.weight", "F32", vec![4, 8], floats(32)),
            ("model.layers.0.self_attn.v_proj.weight", "F32", vec![4, 8], floats(32)),
            ("model.layers.0.self_attn.o_proj.weight", "F32", vec![8, 8], floats(64)),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", "F64", vec![2], vec![0; 16]),
            ("model.layers.0.post_attention_layernorm.weight", "F32", vec![8], floats(8)),
            ("model.layers.0.mlp.gate_proj.weight", "F32", vec![12, 8], floats(96)),
            ("model.layers.0.mlp.up_proj.weight", "F32", vec![12, 8], floats(96)),
            ("model.layers.0.mlp.down_proj.weight", "F32", vec![8, 12], floats(96)),
        ]
    }

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64})
    }

    fn folder(config: &Value, files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    #[test]
    fn a_safetensors_folder_is_read_under_gguf_names() {
        let folder = folder(&config(), &[("model.safetensors", &safetensors(&tiny()))]);
        let weights = Weights::open(folder.path()).unwrap();
        let spec = weights.spec().unwrap();
        assert_eq!((spec.vocab, spec.layers, spec.tied_head), (5, 1, false));
        let k = weights.tensor("blk.0.attn_k.weight").unwrap();
        assert_eq!((k.dtype, k.rows, k.cols), (Dtype::F32, 4, 8));
        assert_eq!(k.to_f32().unwrap()[9], 9.0);
        assert_eq!(k.row(1)[4..8], 9f32.to_le_bytes());
        weights.release("blk.0.attn_k.weight");
        assert_eq!(weights.tensor("blk.0.attn_k.weight").unwrap().to_f32().unwrap()[9], 9.0);
        assert_eq!(weights.tensor("output.weight").unwrap().dtype, Dtype::BF16);
        assert!(weights.tensor("rope_freqs.weight").unwrap_err().message().contains("no tensor rope_freqs.weight"));
    }

    #[test]
    fn shards_named_by_an_index_are_one_model() {
        let all = tiny();
        let (first, second) = all.split_at(4);
        let map = |part: &[SafeTensor<'_>], file: &str| -> serde_json::Map<String, Value> {
            part.iter().map(|(name, ..)| ((*name).to_owned(), json!(file))).collect()
        };
        let mut weight_map = map(first, "a.safetensors");
        weight_map.extend(map(second, "b.safetensors"));
        let index = json!({"weight_map": weight_map}).to_string();
        let files: [(&str, &[u8]); 3] = [
            ("a.safetensors", &safetensors(first)),
            ("b.safetensors", &safetensors(second)),
            ("model.safetensors.index.json", index.as_bytes()),
        ];
        let weights = Weights::open(folder(&config(), &files).path()).unwrap();
        assert_eq!(weights.spec().unwrap().hidden, 8);
        let error = Weights::open(folder(&config(), &files[1..]).path()).unwrap_err();
        assert!(error.message().contains("a.safetensors"), "{error}");
        let outside: [(&str, &[u8]); 1] =
            [("model.safetensors.index.json", br#"{"weight_map": {"x": "../../etc/passwd"}}"#)];
        let error = Weights::open(folder(&config(), &outside).path()).unwrap_err();
        assert!(error.message().contains("not a file of this folder"), "{error}");
    }

    #[test]
    fn norms_behind_attention_are_told_from_those_before_the_feed_forward() {
        let mut config = config();
        config["architectures"] = json!(["Gemma3ForCausalLM"]);
        config["head_dim"] = json!(4);
        for prefix in ["model.", "language_model.model.", "model.language_model."] {
            let norm = |name: &str, value: f32| {
                let bytes = (0..8).flat_map(|_| value.to_le_bytes()).collect::<Vec<u8>>();
                (format!("{prefix}layers.0.{name}.weight"), bytes)
            };
            let post = [
                norm("post_attention_layernorm", 1.0),
                norm("pre_feedforward_layernorm", 2.0),
                norm("post_feedforward_layernorm", 3.0),
            ];
            let heads = ["q_norm", "k_norm"].map(|name| format!("{prefix}layers.0.self_attn.{name}.weight"));
            let others: Vec<_> = tiny()
                .into_iter()
                .filter(|(name, ..)| !name.contains("post_attention_layernorm"))
                .map(|(name, kind, shape, bytes)| (name.replace("model.", prefix), kind, shape, bytes))
                .collect();
            let mut tensors: Vec<SafeTensor<'_>> = others
                .iter()
                .map(|(name, kind, shape, bytes)| (name.as_str(), *kind, shape.clone(), bytes.clone()))
                .collect();
            tensors.extend(post.iter().map(|(name, bytes)| (name.as_str(), "F32", vec![8], bytes.clone())));
            tensors.extend(heads.iter().map(|name| (name.as_str(), "F32", vec![4], floats(4))));
            let folder = folder(&config, &[("model.safetensors", &safetensors(&tensors))]);
            let weights = Weights::open(folder.path()).unwrap();
            assert!(weights.spec().unwrap().post_norms, "{prefix}");
            for (name, value) in [("post_attention_norm", 1.0), ("ffn_norm", 2.0), ("post_ffw_norm", 3.0)] {
                let found = weights.tensor(&format!("blk.0.{name}.weight")).unwrap().to_f32().unwrap();
                assert_eq!(found, [value; 8], "{prefix} {name}");
            }
        }
    }

    #[test]
    fn a_tied_head_may_be_left_out() {
        let tensors: Vec<_> = tiny().into_iter().filter(|(name, ..)| *name != "lm_head.weight").collect();
        let folder = folder(&config(), &[("model.safetensors", &safetensors(&tensors))]);
        assert!(Weights::open(folder.path()).unwrap().spec().unwrap().tied_head);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let check = |tensors: Vec<SafeTensor<'_>>, config: Value, words: &str| {
            let folder = folder(&config, &[("model.safetensors", &safetensors(&tensors))]);
            let error = Weights::open(folder.path()).and_then(|weights| weights.spec()).unwrap_err();
            assert!(error.message().contains(words), "{error} / {words}");
        };
        let without = |gone: &str| tiny().into_iter().filter(|(name, ..)| !name.contains(gone)).collect::<Vec<_>>();
        let with = |tensor: SafeTensor<'static>| tiny().into_iter().chain([tensor]).collect::<Vec<_>>();
        check(without("up_proj"), config(), "no tensor blk.0.ffn_up.weight");
        let mut larger = config();
        larger["intermediate_size"] = json!(16);
        check(tiny(), larger, "blk.0.ffn_gate.weight is 12 x 8, and the configuration makes it 16 x 8");
        let bias = ("model.layers.0.self_attn.o_proj.bias", "F32", vec![8], floats(8));
        check(with(bias), config(), "attn_output.bias are not supported");
        let eight = ("model.layers.1.mlp.up_proj.weight", "F8_E4M3", vec![8], vec![0; 8]);
        check(with(eight), config(), "F32, F16 and BF16 are read");
    }

    #[test]
    fn a_cut_safetensors_file_is_an_error() {
        let whole = safetensors(&tiny());
        for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
            let folder = folder(&config(), &[("model.safetensors", &whole[..length])]);
            let error = Weights::open(folder.path()).unwrap_err();
            assert!(error.message().contains("cut or corrupt"), "{length}: {error}");
        }
    }

    #[test]
    fn a_folder_around_one_gguf_file_is_that_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = Weights::open(folder.path()).unwrap_err();
        assert!(error.message().contains("neither a config.json nor a GGUF file"), "{error}");
        GgufFile::new().tensor("x", Dtype::F32, &[2], floats(2)).write(folder.path());
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.tensor("x").unwrap().to_f32().unwrap(), [0.0, 1.0]);
        assert_eq!(weights.bytes(), 8);
        assert!(Weights::open(&folder.path().join("gone.gguf")).unwrap_err().message().contains("gone.gguf"));
    }

    #[test]
    fn the_demo_model_is_what_its_card_says() {
        let Some(path) = demo_model() else { return };
        let weights = Weights::open(&path).unwrap();
        let spec = weights.spec().unwrap();
        assert_eq!((spec.layers, spec.hidden, spec.ffn, spec.heads, spec.kv_heads), (30, 576, 1536, 9, 3));
        assert_eq!((spec.head_dim, spec.vocab, spec.context, spec.tied_head), (64, 49_152, 8192, true));
        assert_eq!(spec.rope.theta, 100_000.0);
        assert_eq!(weights.tensor("blk.29.ffn_down.weight").unwrap().dtype, Dtype::Q4_1);
        assert_eq!(weights.tensor("token_embd.weight").unwrap().dtype, Dtype::Q8_0);
    }
}
