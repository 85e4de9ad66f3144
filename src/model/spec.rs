//! One description for every decoder of the Llama family: sizes, rope, biases. Read from GGUF metadata or from the
//! `config.json` of a hub's folder, and checked, so that whoever computes with it need not.
//!
//! Families: GGUF `llama`, `qwen2` and `qwen3`; `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`,
//! `Qwen3ForCausalLM`. A sliding window is not computed: such a model is offered up to the length of its window, where it
//! makes no difference.

use std::fmt::Display;

use serde_json::Value;

use crate::base::{Error, Result};
use crate::model::files::ModelFiles;
use crate::model::gguf::{Gguf, broken};

/// Everything about a decoder but its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Width of the feed-forward's middle.
    pub ffn: usize,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// How positions enter.
    pub rope: Rope,
    /// Longest sequence the model was made for.
    pub context: u32,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Each head of queries and keys is normed before it is turned, with weights that all heads share.
    pub qk_norm: bool,
    /// The head is the embedding; there is no `output.weight`.
    pub tied_head: bool,
}

/// Rotary position embedding over the whole head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Which two numbers of a head turn together.
    pub style: RopeStyle,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// Which two numbers of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `2i` and `2i + 1`: GGUF files of Llama, whose q and k rows are stored in that order.
    Interleaved,
    /// `i` and `i + head_dim / 2`: safetensors, and GGUF files of Qwen.
    Halves,
}

/// How the frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by the factor.
    Linear {
        /// Above 0.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by the factor, short ones kept, those between blended.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths beyond `original_context / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are short.
        high_freq_factor: f32,
        /// The context of pre-training.
        original_context: u32,
    },
    /// Each frequency divided by its own factor, `[head_dim / 2]`: a GGUF file's `rope_freqs.weight`.
    Factors(Vec<f32>),
}

impl Rope {
    /// Radians per position, `[head_dim / 2]`, scaling included.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| f64::from(self.theta).powf(-2.0 * i as f64 / head_dim as f64));
        let scaled = plain.enumerate().map(|(i, frequency)| match &self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / f64::from(*factor),
            RopeScaling::Factors(factors) => frequency / f64::from(factors.get(i).copied().unwrap_or(1.0)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                // How often the wave turns within the original context.
                let turns = f64::from(*original_context) * frequency / std::f64::consts::TAU;
                let short = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (short + (1.0 - short) / f64::from(*factor))
            }
        });
        scaled.map(|frequency| frequency as f32).collect()
    }
}

impl DecoderSpec {
    /// Reads the description of a model. Whether the tensors agree is checked by [`super::weights::Weights::spec`].
    ///
    /// # Errors
    /// `Unsupported` for architectures and options that are not computed, `ModelUnavailable` for a missing or
    /// impossible value, with the key's name.
    pub fn read(files: &ModelFiles) -> Result<Self> {
        let spec = match files {
            ModelFiles::Gguf(gguf) => from_gguf(gguf)?,
            ModelFiles::Folder { path, config } => {
                let file = path.join("config.json");
                from_config(&Config { file: &file, value: config })?
            }
        };
        spec.check().map_err(|error| error.context(files.path().display()))?;
        Ok(spec)
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together; values are as wide.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Names, rows and columns of every tensor that the decoder needs.
    pub fn tensors(&self) -> impl Iterator<Item = (String, usize, usize)> {
        let (hidden, ffn, q, kv) = (self.hidden, self.ffn, self.q_width(), self.kv_width());
        let layer = move |layer: usize| {
            let weights = [
                ("attn_norm.weight", 1, hidden),
                ("attn_q.weight", q, hidden),
                ("attn_k.weight", kv, hidden),
                ("attn_v.weight", kv, hidden),
                ("attn_output.weight", hidden, q),
                ("ffn_norm.weight", 1, hidden),
                ("ffn_gate.weight", ffn, hidden),
                ("ffn_up.weight", ffn, hidden),
                ("ffn_down.weight", hidden, ffn),
            ];
            let biases = [("attn_q.bias", 1, q), ("attn_k.bias", 1, kv), ("attn_v.bias", 1, kv)];
            let biases = biases.into_iter().filter(move |_| self.qkv_bias);
            let norms = [("attn_q_norm.weight", 1, self.head_dim), ("attn_k_norm.weight", 1, self.head_dim)];
            let norms = norms.into_iter().filter(move |_| self.qk_norm);
            weights
                .into_iter()
                .chain(biases)
                .chain(norms)
                .map(move |(name, rows, cols)| (format!("blk.{layer}.{name}"), rows, cols))
        };
        let head = (!self.tied_head).then(|| ("output.weight".to_owned(), self.vocab, hidden));
        [("token_embd.weight".to_owned(), self.vocab, hidden), ("output_norm.weight".to_owned(), 1, hidden)]
            .into_iter()
            .chain(head)
            .chain((0..self.layers).flat_map(layer))
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("vocabulary", self.vocab),
            ("hidden size", self.hidden),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of key-value heads", self.kv_heads),
            ("head width", self.head_dim),
            ("feed-forward width", self.ffn),
            ("context length", self.context as usize),
        ];
        for (name, size) in sizes {
            // Far above any model, far below where products of two sizes overflow.
            if size == 0 || size > 1 << 28 {
                return Err(impossible(format_args!("the {name} is {size}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(impossible(format_args!(
                "{} heads cannot share {} key-value heads",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(impossible(format_args!("the head width {} is odd", self.head_dim)));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(impossible(format_args!("the norm epsilon is {}", self.norm_eps)));
        }
        let positive = |name: &str, value: f32| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(impossible(format_args!("the {name} is {value}"))),
        };
        positive("rope base", self.rope.theta)?;
        match &self.rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope scaling factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("rope scaling factor", *factor)?;
                positive("rope low_freq_factor", *low_freq_factor)?;
                if !(high_freq_factor > low_freq_factor && high_freq_factor.is_finite()) || *original_context == 0 {
                    return Err(impossible("rope scaling wants high_freq_factor > low_freq_factor and a context"));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) if factors.len() != self.head_dim / 2 => Err(impossible(format_args!(
                "rope_freqs.weight has {} factors for heads of {}",
                factors.len(),
                self.head_dim
            ))),
            RopeScaling::Factors(factors) => factors.iter().try_for_each(|&factor| positive("rope factor", factor)),
        }
    }
}

fn impossible(what: impl Display) -> Error {
    Error::new(crate::base::Kind::ModelUnavailable, format!("the model's description cannot be: {what}"))
}

fn from_gguf(gguf: &Gguf) -> Result<DecoderSpec> {
    let missing = |key: &str| broken(gguf.path(), format_args!("the key {key} is missing; the file was made wrongly"));
    let unsupported = |what: String| Error::unsupported(format!("{}: {what}", gguf.path().display()));
    let arch = gguf.str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let style = match arch {
        "llama" => RopeStyle::Interleaved,
        "qwen2" | "qwen3" => RopeStyle::Halves,
        _ => {
            return Err(unsupported(format!("architecture {arch:?} is not supported yet; llama, qwen2 and qwen3 are")));
        }
    };
    let key = |name: &str| format!("{arch}.{name}");
    let optional = |name: &str| -> Result<Option<usize>> { Ok(gguf.u32(&key(name))?.map(|number| number as usize)) };
    let size = |name: &str| optional(name)?.ok_or_else(|| missing(&key(name)));
    for name in ["attention.head_count", "attention.head_count_kv", "feed_forward_length"] {
        if gguf.is_list(&key(name)) {
            return Err(unsupported(format!("{} differs from layer to layer, which is not supported", key(name))));
        }
    }
    if optional("expert_count")?.unwrap_or(0) > 0 {
        return Err(unsupported("mixtures of experts are not supported yet".to_owned()));
    }
    let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    if optional("attention.value_length")?.is_some_and(|width| width != head_dim) {
        return Err(unsupported("values of another width than keys are not supported".to_owned()));
    }
    if optional("rope.dimension_count")?.is_some_and(|width| width != head_dim) {
        return Err(unsupported("rope over a part of the head is not supported".to_owned()));
    }
    let embedding = gguf.tensor("token_embd.weight").ok_or_else(|| {
        broken(
            gguf.path(),
            "has no token_embd.weight: it is a vocabulary or one part of several; merge the parts first",
        )
    })?;
    let mut context = gguf.u32(&key("context_length"))?.ok_or_else(|| missing(&key("context_length")))?;
    if let Some(window) = gguf.u32(&key("attention.sliding_window"))?.filter(|&window| window > 0) {
        context = context.min(window);
    }
    let epsilon = "attention.layer_norm_rms_epsilon";
    Ok(DecoderSpec {
        vocab: embedding.rows,
        hidden,
        layers: size("block_count")?,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: size("feed_forward_length")?,
        norm_eps: gguf.f32(&key(epsilon))?.ok_or_else(|| missing(&key(epsilon)))?,
        rope: Rope {
            theta: gguf.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            style,
            scaling: gguf_scaling(gguf, &key)?,
        },
        context,
        qkv_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
        qk_norm: arch == "qwen3",
        tied_head: gguf.tensor("output.weight").is_none(),
    })
}

fn gguf_scaling(gguf: &Gguf, key: &dyn Fn(&str) -> String) -> Result<RopeScaling> {
    if let Some(info) = gguf.tensor("rope_freqs.weight") {
        let mut factors = vec![0.0; info.cols];
        if info.rows != 1 {
            return Err(broken(gguf.path(), "rope_freqs.weight is not a vector"));
        }
        crate::kernel::quant::dequantize_row(info.dtype, &gguf.map()[info.range.clone()], &mut factors)?;
        return Ok(RopeScaling::Factors(factors));
    }
    let factor = match gguf.f32(&key("rope.scaling.factor"))? {
        None => gguf.f32(&key("rope.scale_linear"))?,
        factor => factor,
    };
    match (gguf.str(&key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None, None) => Ok(RopeScaling::None),
        (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("linear"), None) => Err(broken(gguf.path(), format_args!("{} is missing", key("rope.scaling.factor")))),
        (Some(other), _) => {
            let path = gguf.path().display();
            Err(Error::unsupported(format!("{path}: rope scaling {other:?} is not supported yet")))
        }
    }
}

/// `config.json` and where it lies, for errors.
struct Config<'a> {
    file: &'a std::path::Path,
    value: &'a Value,
}

impl<'a> Config<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn child(&self, key: &str) -> Option<Config<'a>> {
        self.get(key).filter(|value| value.is_object()).map(|value| Config { file: self.file, value })
    }

    fn optional_u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number.map(Some).ok_or_else(|| broken(self.file, format_args!("{key} is {value}, not a whole number")))
    }

    fn u32(&self, key: &str) -> Result<u32> {
        self.optional_u32(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional_f32(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().map(|number| number as f32);
        number.map(Some).ok_or_else(|| broken(self.file, format_args!("{key} is {value}, not a number")))
    }

    fn f32(&self, key: &str) -> Result<f32> {
        self.optional_f32(key)?.ok_or_else(|| self.missing(key))
    }

    fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn missing(&self, key: &str) -> Error {
        broken(self.file, format_args!("{key} is missing"))
    }

    fn unsupported(&self, what: impl Display) -> Error {
        Error::unsupported(format!("{}: {what}", self.file.display()))
    }
}

fn from_config(config: &Config<'_>) -> Result<DecoderSpec> {
    let named = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let family = match (named, config.get("model_type").and_then(Value::as_str)) {
        (Some("LlamaForCausalLM" | "MistralForCausalLM" | "Qwen2ForCausalLM" | "Qwen3ForCausalLM"), _) => {
            named.unwrap_or_default()
        }
        (None, Some("llama")) => "LlamaForCausalLM",
        (None, Some("mistral")) => "MistralForCausalLM",
        (None, Some("qwen2")) => "Qwen2ForCausalLM",
        (None, Some("qwen3")) => "Qwen3ForCausalLM",
        (named, kind) => {
            let name = named.or(kind).unwrap_or("none named");
            return Err(config.unsupported(format_args!(
                "architecture {name} is not supported yet; LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and \
                 Qwen3ForCausalLM are"
            )));
        }
    };
    if let Some(activation) = config.get("hidden_act").and_then(Value::as_str).filter(|&name| name != "silu") {
        return Err(config.unsupported(format_args!("hidden_act {activation:?} is not supported, only \"silu\"")));
    }
    if config.get("quantization_config").is_some() {
        return Err(config.unsupported("quantised safetensors are not supported yet; use a GGUF file"));
    }
    if config.flag("mlp_bias") {
        return Err(config.unsupported("mlp_bias is not supported"));
    }
    let (hidden, heads) = (config.u32("hidden_size")? as usize, config.u32("num_attention_heads")? as usize);
    let mut context = config.u32("max_position_embeddings")?;
    let windowed = family == "MistralForCausalLM" || config.flag("use_sliding_window");
    if let Some(window) = config.optional_u32("sliding_window")?.filter(|&window| windowed && window > 0) {
        context = context.min(window);
    }
    let head_dim = config.optional_u32("head_dim")?.map_or(hidden / heads.max(1), |width| width as usize);
    Ok(DecoderSpec {
        vocab: config.u32("vocab_size")? as usize,
        hidden,
        layers: config.u32("num_hidden_layers")? as usize,
        heads,
        kv_heads: config.optional_u32("num_key_value_heads")?.map_or(heads, |number| number as usize),
        head_dim,
        ffn: config.u32("intermediate_size")? as usize,
        norm_eps: config.f32("rms_norm_eps")?,
        rope: config_rope(config)?,
        context,
        qkv_bias: family == "Qwen2ForCausalLM" || config.flag("attention_bias"),
        qk_norm: family == "Qwen3ForCausalLM",
        tied_head: config.flag("tie_word_embeddings"),
    })
}

/// `rope_theta` and `rope_scaling`, or both under `rope_parameters` as newer files have it.
fn config_rope(config: &Config<'_>) -> Result<Rope> {
    let parameters = config.child("rope_parameters");
    let theta = match &parameters {
        Some(parameters) => parameters.optional_f32("rope_theta")?,
        None => None,
    };
    let theta = theta.or(config.optional_f32("rope_theta")?).unwrap_or(10_000.0);
    let scaling = match parameters.or_else(|| config.child("rope_scaling")) {
        None => RopeScaling::None,
        Some(scaling) => {
            let name = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
            match name.unwrap_or("default") {
                "default" => RopeScaling::None,
                "linear" => RopeScaling::Linear { factor: scaling.f32("factor")? },
                "llama3" => RopeScaling::Llama3 {
                    factor: scaling.f32("factor")?,
                    low_freq_factor: scaling.f32("low_freq_factor")?,
                    high_freq_factor: scaling.f32("high_freq_factor")?,
                    original_context: scaling.u32("original_max_position_embeddings")?,
                },
                other => return Err(config.unsupported(format_args!("rope scaling {other:?} is not supported yet"))),
            }
        }
    };
    Ok(Rope { theta, style: RopeStyle::Halves, scaling })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kernel::Dtype;
    use crate::model::tests_support::GgufFile;

    fn llama_config() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 128256, "hidden_size": 4096,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}
        })
    }

    fn read(config: Value) -> Result<DecoderSpec> {
        DecoderSpec::read(&ModelFiles::Folder { path: "m".into(), config })
    }

    fn with(changes: Value) -> Value {
        let mut config = llama_config();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    #[test]
    fn llama_3_1_reads_as_it_is() {
        let spec = read(llama_config()).unwrap();
        assert_eq!((spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim), (4096, 32, 32, 8, 128));
        assert_eq!((spec.q_width(), spec.kv_width(), spec.ffn, spec.vocab), (4096, 1024, 14336, 128256));
        assert_eq!((spec.context, spec.qkv_bias, spec.tied_head), (131_072, false, false));
        assert_eq!(spec.rope.style, RopeStyle::Halves);
        let names: Vec<_> = spec.tensors().map(|(name, ..)| name).collect();
        assert_eq!(names.len(), 3 + 32 * 9);
        assert!(names.contains(&"blk.31.ffn_down.weight".to_owned()) && names.contains(&"output.weight".to_owned()));
    }

    #[test]
    fn llama_3_1_keeps_short_waves_and_stretches_long_ones() {
        let rope = read(llama_config()).unwrap().rope;
        let plain = Rope { scaling: RopeScaling::None, ..rope.clone() }.frequencies(128);
        let scaled = rope.frequencies(128);
        // Worked out with the formula of the Llama 3.1 paper's code for these sizes: lambda = 2 pi / frequency,
        // short below 2048, long above 8192.
        for (i, (&plain, &scaled)) in plain.iter().zip(&scaled).enumerate() {
            let wavelength = std::f32::consts::TAU / plain;
            let ratio = plain / scaled;
            match wavelength {
                w if w < 2048.0 => assert_eq!(ratio, 1.0, "{i}"),
                w if w > 8192.0 => assert!((ratio - 8.0).abs() < 1e-5, "{i}: {ratio}"),
                w => {
                    let smooth = (8192.0 / w - 1.0) / 3.0;
                    let expected = plain * ((1.0 - smooth) / 8.0 + smooth);
                    assert!((scaled / expected - 1.0).abs() < 1e-5, "{i}");
                }
            }
        }
        assert_eq!(plain[0], 1.0);
        assert!((plain[32] / 500_000f32.powf(-0.5) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_familys_other_members_differ_where_they_should() {
        let mistral = read(with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}))).unwrap();
        assert_eq!(mistral.context, 4096);
        let mistral = read(with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null}))).unwrap();
        assert_eq!(mistral.context, 131_072);
        let qwen = read(with(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}))).unwrap();
        assert_eq!((qwen.context, qwen.qkv_bias), (131_072, true));
        let newer = read(with(json!({"rope_theta": null, "rope_scaling": null,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "head_dim": 64})))
        .unwrap();
        assert_eq!((newer.rope.theta, newer.head_dim), (7.0, 64));
        assert_eq!(newer.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn what_cannot_be_computed_is_named() {
        let check = |changes: Value, words: &str| {
            let error = read(with(changes)).unwrap_err();
            assert!(error.message().contains(words), "{error} / {words}");
        };
        check(json!({"architectures": ["GemmaForCausalLM"]}), "GemmaForCausalLM is not supported yet");
        check(json!({"hidden_size": null}), "hidden_size is missing");
        check(json!({"hidden_size": "big"}), "hidden_size is \"big\"");
        check(json!({"hidden_size": 0}), "hidden size is 0");
        check(json!({"num_hidden_layers": -1}), "num_hidden_layers");
        check(json!({"num_key_value_heads": 5}), "32 heads cannot share 5");
        check(json!({"head_dim": 63}), "odd");
        check(json!({"rms_norm_eps": 0}), "epsilon");
        check(json!({"rope_theta": 0}), "rope base is 0");
        check(json!({"rope_scaling": {"rope_type": "yarn", "factor": 2}}), "\"yarn\"");
        check(json!({"rope_scaling": {"type": "linear"}}), "factor is missing");
        check(json!({"hidden_act": "gelu"}), "gelu");
        check(json!({"quantization_config": {}}), "use a GGUF file");
    }

    fn gguf_llama() -> GgufFile {
        GgufFile::new()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .u32("llama.context_length", 128)
            .u32("llama.embedding_length", 64)
            .u32("llama.feed_forward_length", 96)
            .u32("llama.attention.head_count", 4)
            .u32("llama.attention.head_count_kv", 2)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .tensor("token_embd.weight", Dtype::Q4_0, &[64, 10], vec![0; 360])
    }

    fn read_gguf(file: GgufFile) -> Result<DecoderSpec> {
        let folder = tempfile::tempdir().unwrap();
        DecoderSpec::read(&ModelFiles::open(&file.write(folder.path())).unwrap())
    }

    #[test]
    fn gguf_keys_read_as_the_same_description() {
        let spec = read_gguf(gguf_llama()).unwrap();
        assert_eq!((spec.vocab, spec.hidden, spec.layers, spec.heads, spec.kv_heads), (10, 64, 2, 4, 2));
        assert_eq!((spec.head_dim, spec.ffn, spec.context, spec.tied_head), (16, 96, 128, true));
        assert_eq!(spec.rope, Rope { theta: 1e4, style: RopeStyle::Interleaved, scaling: RopeScaling::None });
        let linear = gguf_llama().text("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4.0);
        assert_eq!(read_gguf(linear).unwrap().rope.scaling, RopeScaling::Linear { factor: 4.0 });
        let factors: Vec<u8> = (1..=8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let rope = read_gguf(gguf_llama().tensor("rope_freqs.weight", Dtype::F32, &[8], factors)).unwrap().rope;
        assert_eq!(rope.frequencies(16)[1], (1e4f64.powf(-0.125) / 2.0) as f32);
    }

    #[test]
    fn gguf_files_that_cannot_be_computed_are_named() {
        let check = |file: GgufFile, words: &str| {
            let error = read_gguf(file).unwrap_err();
            assert!(error.message().contains(words), "{error} / {words}");
        };
        check(GgufFile::new(), "general.architecture is missing");
        check(GgufFile::new().text("general.architecture", "gemma3"), "\"gemma3\" is not supported yet");
        check(GgufFile::new().text("general.architecture", "llama"), "llama.embedding_length is missing");
        check(gguf_llama().u32("llama.expert_count", 8), "experts");
        check(gguf_llama().u32("llama.attention.value_length", 8), "values of another width");
        check(gguf_llama().text("llama.rope.scaling.type", "yarn"), "yarn");
        let short = vec![0; 16];
        check(gguf_llama().tensor("rope_freqs.weight", Dtype::F32, &[4], short), "4 factors for heads of 16");
    }
}
