//! LoRA adapters as PEFT writes them, packed for the kernels.
//!
//!     adapter_config.json          rank, alpha, what is adapted; whatever else PEFT can do is refused by name
//!     adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [rank, inputs]
//!                                                                           …lora_B.weight          [outputs, rank]
//!
//! Adapted are the seven matrices of a layer, each `W x + scale * B (A x)`. An adapter fits every base of its shape; heads
//! are halves in it, as packed bases have them. Opened on any thread; whoever computes with one holds it by `Arc`, so that
//! it lives as long as its last request.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::Value;

use crate::base::{Error, Result};
use crate::kernel::{Arena, Cpu, Dtype, Isa, LowRank, MAX_RANK, Panels, Pool, Source};
use crate::model::files::read_text;
use crate::model::gguf::map_file;
use crate::model::spec::DecoderSpec;
use crate::model::weights::Tensor;

/// The two files of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights beside it.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Families that an adapter may say it is for; whether it fits, its shapes say.
const FAMILIES: [&str; 7] = ["llama", "mistral", "gemma", "gemma3", "gemma3_text", "qwen2", "qwen3"];

/// An adapter ready to compute.
pub struct Adapter {
    digest: [u32; 8],
    rank: usize,
    shape: Shape,
    bytes: usize,
    scale: f32,
    pub(super) layers: Vec<AdaptedLayer>,
    /// The file, for devices that pack it their own way.
    file: Option<(Mmap, Tensors)>,
}

/// What an adapter adds to a layer, product by product.
#[derive(Default)]
pub(super) struct AdaptedLayer {
    pub(super) qkv: LowRank,
    pub(super) output: LowRank,
    /// Gate and up.
    pub(super) ffn: LowRank,
    pub(super) down: LowRank,
}

/// The sizes of a base, as far as its adapters depend on them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Shape {
    layers: usize,
    hidden: usize,
    q: usize,
    kv: usize,
    ffn: usize,
}

impl Shape {
    /// Of a decoder.
    pub fn of(spec: &DecoderSpec) -> Self {
        Self { layers: spec.layers, hidden: spec.hidden, q: spec.q_width(), kv: spec.kv_width(), ffn: spec.ffn }
    }

    /// Outputs and inputs of a module.
    fn module(&self, module: Module) -> (usize, usize) {
        match module {
            Module::Q => (self.q, self.hidden),
            Module::K | Module::V => (self.kv, self.hidden),
            Module::O => (self.hidden, self.q),
            Module::Gate | Module::Up => (self.ffn, self.hidden),
            Module::Down => (self.hidden, self.ffn),
        }
    }
}

/// A matrix of a layer that can be adapted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Module {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Module {
    pub(super) const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// By its name in a layer.
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "self_attn.q_proj" => Self::Q,
            "self_attn.k_proj" => Self::K,
            "self_attn.v_proj" => Self::V,
            "self_attn.o_proj" => Self::O,
            "mlp.gate_proj" => Self::Gate,
            "mlp.up_proj" => Self::Up,
            "mlp.down_proj" => Self::Down,
            _ => return None,
        })
    }
}

/// What `adapter_config.json` says, as far as it counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterConfig {
    /// Rows of every A.
    pub rank: usize,
    /// What B A x is multiplied by.
    pub scale: f32,
}

impl AdapterConfig {
    /// Reads the configuration.
    ///
    /// # Errors
    /// `BadInput` for what is no configuration and for what it asks that is not computed here, by its name.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Value = serde_json::from_str(text).map_err(|error| wrong(format_args!("is not JSON ({error})")))?;
        if !config.is_object() {
            return Err(wrong("is not a JSON object"));
        }
        let get = |name: &str| config.get(name).filter(|value| !value.is_null());
        let is_set = |name: &str| match get(name) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(values)) => !values.is_empty(),
            Some(Value::Object(values)) => !values.is_empty(),
            Some(_) => true,
        };
        if let Some(kind) = get("peft_type").filter(|kind| *kind != "LORA") {
            return Err(wrong(format_args!("has peft_type {kind}; only \"LORA\" is computed")));
        }
        if let Some(family) = get("model_type").filter(|family| !FAMILIES.iter().any(|known| **family == **known)) {
            return Err(wrong(format_args!("has model_type {family}; it may be one of {}", FAMILIES.join(", "))));
        }
        if let Some(bias) = get("bias").filter(|bias| *bias != "none") {
            return Err(wrong(format_args!("has bias {bias}; only \"none\" is computed")));
        }
        let others = [
            "use_dora",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "lora_bias",
            "trainable_token_indices",
            "layer_replication",
            "use_qalora",
            "alora_invocation_tokens",
            "megatron_config",
            "target_parameters",
        ];
        if let Some(name) = others.into_iter().find(|name| is_set(name)) {
            return Err(wrong(format_args!("sets {name}, which is not supported: train the adapter without it")));
        }
        // Text is "all-linear" or a pattern: then the tensors say what is adapted.
        if let Some(Value::Array(modules)) = get("target_modules") {
            let known = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
            let last = |module: &Value| module.as_str().and_then(|name| name.rsplit('.').next()).map(str::to_owned);
            let strange =
                modules.iter().find(|module| !last(module).is_some_and(|name| known.contains(&name.as_str())));
            if let Some(module) = strange {
                return Err(wrong(format_args!("adapts {module}; only {} can be adapted", known.join(", "))));
            }
        }
        let rank = get("r").and_then(Value::as_u64).ok_or_else(|| wrong("has no rank `r`"))?;
        if rank == 0 || rank > MAX_RANK as u64 {
            return Err(wrong(format_args!("has rank {rank}; ranks from 1 to {MAX_RANK} are served")));
        }
        let alpha = get("lora_alpha").and_then(Value::as_f64).ok_or_else(|| wrong("has no `lora_alpha`"))?;
        let divisor = if get("use_rslora") == Some(&Value::Bool(true)) { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(wrong(format_args!("has lora_alpha {alpha}, which is no scale")));
        }
        Ok(Self { rank: rank as usize, scale })
    }
}

fn wrong(what: impl fmt::Display) -> Error {
    Error::bad_input(format!("{CONFIG_FILE} {what}"))
}

impl Adapter {
    /// Opens the adapter of a folder for bases of this shape.
    ///
    /// # Errors
    /// `BadInput` when it is broken, asks for what is not computed, or does not fit; the message names file and tensor.
    pub fn open(folder: &Path, shape: Shape) -> Result<Self> {
        let text = read_text(&folder.join(CONFIG_FILE))?.ok_or_else(|| wrong("is missing"))?;
        let config = AdapterConfig::parse(&text)?;
        let map = map_file(&folder.join(WEIGHTS_FILE))?;
        let tensors = Tensors::read(&map)?;
        tensors.fit(config, shape)?;

        // The pool of a device is busy with decoding: this thread packs alone.
        let cpu = Cpu { pool: Arc::new(Pool::new(1)), isa: Isa::detect() };
        let mut arena = Arena::of(tensors.packed_bytes());
        let mut layers: Vec<AdaptedLayer> = (0..shape.layers).map(|_| AdaptedLayer::default()).collect();
        for (&(layer, module), [a, b]) in &tensors.pairs {
            let (Some(a), Some(b)) = (a, b) else { continue };
            let mut pack = |half: &Half| {
                let bytes = &map[half.range.clone()];
                let source = Source { dtype: half.dtype, bytes, channels: half.rows, inputs: half.cols };
                Panels::pack(&cpu, &mut arena, source, false, |channel| channel)
            };
            let (a, b) = (pack(a)?, pack(b)?);
            let layer = &mut layers[layer];
            let (product, part) = match module {
                Module::Q => (&mut layer.qkv, 0),
                Module::K => (&mut layer.qkv, 1),
                Module::V => (&mut layer.qkv, 2),
                Module::O => (&mut layer.output, 0),
                Module::Gate => (&mut layer.ffn, 0),
                Module::Up => (&mut layer.ffn, 1),
                Module::Down => (&mut layer.down, 0),
            };
            product.set(part, a, b, config.scale)?;
        }
        let bytes = layers
            .iter()
            .map(|layer| layer.qkv.bytes() + layer.output.bytes() + layer.ffn.bytes() + layer.down.bytes());
        let bytes = bytes.sum();
        let digest = blake3::Hasher::new()
            .update(&(text.len() as u64).to_le_bytes())
            .update(text.as_bytes())
            .update(&map)
            .finalize();
        let (digest, rank, scale) = (words(digest.as_bytes()), config.rank, config.scale);
        Ok(Self { digest, rank, shape, bytes, scale, layers, file: Some((map, tensors)) })
    }

    /// An adapter without weights, for simulated devices: no decoder takes it.
    pub fn hollow(name: u64) -> Self {
        let digest = words(blake3::hash(&name.to_le_bytes()).as_bytes());
        Self { digest, rank: 0, shape: Shape::default(), bytes: 0, scale: 0.0, layers: Vec::new(), file: None }
    }

    /// Checks a weights file as far as that is possible without a base.
    ///
    /// # Errors
    /// `BadInput` when it is cut or corrupt, or holds what is no part of an adapter.
    pub fn check_weights(path: &Path) -> Result<()> {
        Tensors::read(&map_file(path)?).map(|_| ())
    }

    /// Names its content: two adapters with equal digests compute the same.
    pub fn digest(&self) -> &[u32; 8] {
        &self.digest
    }

    /// Rows of its A matrices.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What `B A x` is multiplied by.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// A `[rank, inputs]` and B `[outputs, rank]` of a matrix as the file has them, if it is adapted.
    pub(super) fn halves(&self, layer: usize, module: Module) -> Option<[Tensor<'_>; 2]> {
        let (map, tensors) = self.file.as_ref()?;
        let [Some(a), Some(b)] = tensors.pairs.get(&(layer, module))? else { return None };
        let tensor = |half: &Half| Tensor {
            dtype: half.dtype,
            rows: half.rows,
            cols: half.cols,
            data: &map[half.range.clone()],
        };
        Some([tensor(a), tensor(b)])
    }

    /// Whether it was opened for bases of this shape.
    pub fn fits(&self, spec: &DecoderSpec) -> bool {
        self.shape == Shape::of(spec)
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({:08x}, rank {})", self.digest[0], self.rank)
    }
}

fn words(digest: &[u8; 32]) -> [u32; 8] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([digest[4 * i], digest[4 * i + 1], digest[4 * i + 2], digest[4 * i + 3]])
    })
}

/// Where A and B of every adapted matrix lie.
struct Tensors {
    pairs: BTreeMap<(usize, Module), [Option<Half>; 2]>,
}

/// A or B of one matrix in the file.
struct Half {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    range: std::ops::Range<usize>,
}

impl Tensors {
    fn read(file: &[u8]) -> Result<Self> {
        let wrong = |what: String| Error::bad_input(format!("{WEIGHTS_FILE} {what}"));
        let cut = |what: &dyn fmt::Display| wrong(format!("is cut or corrupt ({what}): upload it again"));
        let (length, metadata) = safetensors::SafeTensors::read_metadata(file).map_err(|error| cut(&error))?;
        let data = length.checked_add(8).filter(|&data| data <= file.len()).ok_or_else(|| cut(&"no data"))?;
        let mut pairs: BTreeMap<_, [Option<Half>; 2]> = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let Some((layer, module, is_b)) = place(&name) else {
                return Err(wrong(format!("holds {name}, which is no A or B of a matrix that can be adapted")));
            };
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::BF16,
                other => return Err(wrong(format!("holds {name} in {other:?}; F32, F16 and BF16 are read"))),
            };
            let &[rows, cols] = info.shape.as_slice() else {
                return Err(wrong(format!("holds {name}, which is no matrix")));
            };
            let (start, end) = info.data_offsets;
            let range = data.checked_add(start).zip(data.checked_add(end)).map(|(start, end)| start..end);
            let size = dtype.row_bytes(cols).and_then(|bytes| bytes.checked_mul(rows));
            let range =
                range.filter(|range| range.start <= range.end && range.end <= file.len() && Some(range.len()) == size);
            let range = range.ok_or_else(|| cut(&format_args!("{name} does not lie in the file")))?;
            pairs.entry((layer, module)).or_default()[usize::from(is_b)] = Some(Half { dtype, rows, cols, range });
        }
        match pairs.is_empty() {
            true => Err(wrong("holds no tensors".to_owned())),
            false => Ok(Self { pairs }),
        }
    }

    /// Every matrix has both halves, of this rank, and is one of the base's.
    fn fit(&self, config: AdapterConfig, shape: Shape) -> Result<()> {
        for (&(layer, module), halves) in &self.pairs {
            let wrong = |what: String| Error::bad_input(format!("{WEIGHTS_FILE}: {module:?} of layer {layer} {what}"));
            if layer >= shape.layers {
                return Err(wrong(format!("does not exist: this model has {} layers", shape.layers)));
            }
            let [Some(a), Some(b)] = halves else { return Err(wrong("has only one of lora_A and lora_B".to_owned())) };
            let (outputs, inputs) = shape.module(module);
            let (rank, found) = (config.rank, [(a.rows, a.cols), (b.rows, b.cols)]);
            if found != [(rank, inputs), (outputs, rank)] {
                let [a, b] = found.map(|(rows, cols)| format!("{rows} x {cols}"));
                return Err(wrong(format!(
                    "is {a} and {b}; with rank {rank} this model takes {rank} x {inputs} and {outputs} x {rank}"
                )));
            }
        }
        Ok(())
    }

    /// Room that the panels of all halves take.
    fn packed_bytes(&self) -> usize {
        self.pairs.values().flatten().flatten().map(|half| Panels::size(half.dtype, half.rows, half.cols)).sum()
    }
}

/// Layer, matrix, and whether it is B: `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`, with the name of
/// an adapter before `.weight` in files that were not written by PEFT's own saving, and `language_model` before or behind the
/// inner `model` where the base sees as well.
fn place(name: &str) -> Option<(usize, Module, bool)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    let (module, half) = rest.split_once(".lora_")?;
    let is_b = match half.strip_suffix(".weight")?.split('.').next()? {
        "A" => false,
        "B" => true,
        _ => return None,
    };
    Some((layer.parse().ok()?, Module::of(module)?, is_b))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests_support::{SafeTensor, safetensors};

    fn config(changes: Value) -> String {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": null, "use_dora": false, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": false,
            "fan_in_fan_out": false, "task_type": "CAUSAL_LM", "lora_dropout": 0.05, "model_type": "llama"});
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config.to_string()
    }

    #[test]
    fn a_configuration_says_rank_and_scale_and_the_rest_is_refused_by_name() {
        let check = |changes: Value, expected: Result<(usize, f32), &str>| {
            let found = AdapterConfig::parse(&config(changes.clone()));
            match (found, expected) {
                (Ok(found), Ok((rank, scale))) => assert_eq!((found.rank, found.scale), (rank, scale), "{changes}"),
                (Err(error), Err(words)) => assert!(error.message().contains(words), "{error} / {words}"),
                (found, expected) => panic!("{changes}: {found:?}, not {expected:?}"),
            }
        };
        check(json!({}), Ok((4, 2.0)));
        check(json!({"use_rslora": true}), Ok((4, 4.0)));
        check(json!({"r": 32, "lora_alpha": 16.0, "target_modules": "all-linear"}), Ok((32, 0.5)));
        check(json!({"target_modules": ["model.layers.0.self_attn.v_proj"], "model_type": null}), Ok((4, 2.0)));
        check(json!({"r": 33}), Err("rank 33; ranks from 1 to 32"));
        check(json!({"r": 0}), Err("rank 0"));
        check(json!({"r": "8"}), Err("has no rank"));
        check(json!({"lora_alpha": null}), Err("lora_alpha"));
        check(json!({"peft_type": "IA3"}), Err("IA3"));
        check(json!({"bias": "all"}), Err("bias \"all\""));
        check(json!({"use_dora": true}), Err("use_dora"));
        check(json!({"modules_to_save": ["lm_head"]}), Err("modules_to_save"));
        check(json!({"rank_pattern": {"q_proj": 2}}), Err("rank_pattern"));
        check(json!({"target_modules": ["q_proj", "lm_head"]}), Err("lm_head"));
        check(json!({"model_type": "bert"}), Err("bert"));
        check(json!({"model_type": "gemma3_text"}), Ok((4, 2.0)));
        for text in ["", "[]", "{\"r\":"] {
            assert!(AdapterConfig::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_of_tensors_are_read_as_peft_writes_them() {
        let check = |name: &str, expected: Option<(usize, Module, bool)>| assert_eq!(place(name), expected, "{name}");
        let layer = "base_model.model.model.layers.12.";
        check(&format!("{layer}self_attn.q_proj.lora_A.weight"), Some((12, Module::Q, false)));
        check(&format!("{layer}mlp.down_proj.lora_B.weight"), Some((12, Module::Down, true)));
        check(&format!("{layer}self_attn.o_proj.lora_B.default.weight"), Some((12, Module::O, true)));
        check("model.layers.0.mlp.up_proj.lora_A.weight", Some((0, Module::Up, false)));
        for prefix in ["language_model.model.", "model.language_model."] {
            let name = format!("base_model.model.{prefix}layers.3.mlp.gate_proj.lora_B.weight");
            check(&name, Some((3, Module::Gate, true)));
        }
        check("base_model.model.vision_tower.layers.3.mlp.gate_proj.lora_B.weight", None);
        check(&format!("{layer}self_attn.q_proj.lora_magnitude_vector.weight"), None);
        check(&format!("{layer}self_attn.qkv_proj.lora_A.weight"), None);
        check("base_model.model.lm_head.lora_A.weight", None);
        check("base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight", None);
    }

    #[test]
    fn what_does_not_fit_its_base_is_named() {
        let shape = Shape { layers: 2, hidden: 8, q: 8, kv: 4, ffn: 12 };
        let floats = |count: usize| vec![0u8; 4 * count];
        fn name(layer: usize, half: &str) -> &'static str {
            Box::leak(
                format!("base_model.model.model.layers.{layer}.self_attn.k_proj.lora_{half}.weight").into_boxed_str(),
            )
        }
        let check = |tensors: &[SafeTensor<'_>], words: &str| {
            let config = AdapterConfig { rank: 2, scale: 1.0 };
            let file = safetensors(tensors);
            let outcome = Tensors::read(&file).and_then(|tensors| tensors.fit(config, shape));
            match outcome {
                Ok(()) => assert_eq!(words, "fits"),
                Err(error) => assert!(error.message().contains(words), "{error} / {words}"),
            }
        };
        let a = || (name(0, "A"), "F32", vec![2, 8], floats(16));
        let b = || (name(0, "B"), "F32", vec![4, 2], floats(8));
        check(&[a(), b()], "fits");
        check(&[a()], "K of layer 0 has only one of lora_A and lora_B");
        check(
            &[a(), (name(0, "B"), "F32", vec![8, 2], floats(16))],
            "2 x 8 and 8 x 2; with rank 2 this model takes 2 x 8 and 4 x 2",
        );
        check(&[(name(7, "A"), "F32", vec![2, 8], floats(16))], "this model has 2 layers");
        check(&[(name(0, "A"), "I32", vec![2, 8], floats(16))], "I32");
        check(&[(name(0, "A"), "F32", vec![16], floats(16))], "no matrix");
        check(&[("lm_head.weight", "F32", vec![2, 8], floats(16))], "holds lm_head.weight");
        check(&[], "no tensors");
        let whole = safetensors(&[a(), b()]);
        for length in [0, 7, 8, 60, whole.len() - 1] {
            assert!(Tensors::read(&whole[..length]).is_err(), "{length}");
        }
    }
}
