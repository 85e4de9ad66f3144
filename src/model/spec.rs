//! One description for every decoder of the Llama family: sizes, rope, biases, windows. Read from GGUF metadata or from the
//! `config.json` of a hub's folder, and checked, so that whoever computes with it need not.
//!
//! Families: GGUF `llama`, `qwen2`, `qwen3`, `gemma` and `gemma3`; `LlamaForCausalLM`, `MistralForCausalLM`,
//! `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `GemmaForCausalLM`, `Gemma3ForCausalLM`, and of `Gemma3ForConditionalGeneration` what
//! reads and writes text.

use std::fmt::Display;

use half::bf16;
use serde_json::{Value, json};

use crate::base::{Error, Result};
use crate::kernel::Gate;
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
    /// What rows of some layers see; without it all rows see everything before them.
    pub window: Option<Window>,
    /// What the scores of attention are multiplied by, mostly `1 / sqrt(head_dim)`.
    pub score_scale: f32,
    /// What the rows of the embedding are multiplied by; 1 for most.
    pub embedding_scale: f32,
    /// What the gate of the feed-forward goes through.
    pub gate: Gate,
    /// Added to the weights of all norms: 1 where files store them less 1.
    pub norm_offset: f32,
    /// What attention and feed-forward give is normed before it is added to the residual stream.
    pub post_norms: bool,
    /// Longest sequence the model was made for.
    pub context: u32,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Each head of queries and keys is normed before it is turned, with weights that all heads share.
    pub qk_norm: bool,
    /// The head is the embedding; there is no `output.weight`.
    pub tied_head: bool,
}

/// Sliding-window attention: rows of some layers see only so far back.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Tokens that a row sees, its own included: at position `p` those from `p + 1 - tokens` on.
    pub tokens: u32,
    /// Of each layer, whether it has the window.
    pub layers: Vec<bool>,
    /// How positions enter in these layers, where it is not as in the others.
    pub rope: Option<Rope>,
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

    fn check(&self, head_dim: usize) -> Result<()> {
        positive("rope base", self.theta)?;
        match &self.scaling {
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
            RopeScaling::Factors(factors) if factors.len() != head_dim / 2 => Err(impossible(format_args!(
                "rope_freqs.weight has {} factors for heads of {head_dim}",
                factors.len(),
            ))),
            RopeScaling::Factors(factors) => factors.iter().try_for_each(|&factor| positive("rope factor", factor)),
        }
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

    /// Tokens that a row of this layer sees, its own included; `None`: all before it.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let window = self.window.as_ref().filter(|window| window.layers[layer])?;
        Some(window.tokens as usize)
    }

    /// How positions enter in layers with a window.
    pub fn window_rope(&self) -> &Rope {
        self.window.as_ref().and_then(|window| window.rope.as_ref()).unwrap_or(&self.rope)
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
            let post_norms = [("post_attention_norm.weight", 1, hidden), ("post_ffw_norm.weight", 1, hidden)];
            let post_norms = post_norms.into_iter().filter(move |_| self.post_norms);
            weights
                .into_iter()
                .chain(biases)
                .chain(norms)
                .chain(post_norms)
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
        positive("scale of the scores", self.score_scale)?;
        positive("scale of the embedding", self.embedding_scale)?;
        if let Some(Window { tokens, layers, rope }) = &self.window {
            if *tokens == 0 || layers.len() != self.layers {
                return Err(impossible(format_args!(
                    "a window of {tokens} tokens in {} of {} layers",
                    layers.len(),
                    self.layers
                )));
            }
            rope.iter().try_for_each(|rope| rope.check(self.head_dim))?;
        }
        self.rope.check(self.head_dim)
    }
}

fn positive(name: &str, value: f32) -> Result<()> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(impossible(format_args!("the {name} is {value}"))),
    }
}

fn impossible(what: impl Display) -> Error {
    Error::new(crate::base::Kind::ModelUnavailable, format!("the model's description cannot be: {what}"))
}

/// What tells a family from the others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma3,
}

impl Family {
    /// `architectures` and `model_type` of a `config.json`.
    const NAMES: [(&'static str, &'static str, Self); 7] = [
        ("LlamaForCausalLM", "llama", Self::Llama),
        ("MistralForCausalLM", "mistral", Self::Mistral),
        ("Qwen2ForCausalLM", "qwen2", Self::Qwen2),
        ("Qwen3ForCausalLM", "qwen3", Self::Qwen3),
        ("GemmaForCausalLM", "gemma", Self::Gemma),
        ("Gemma3ForCausalLM", "gemma3_text", Self::Gemma3),
        ("Gemma3ForConditionalGeneration", "gemma3", Self::Gemma3),
    ];

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma3)
    }

    fn gate(self) -> Gate {
        if self.is_gemma() { Gate::Gelu } else { Gate::Silu }
    }

    /// The root of the width, as exact as the bf16 that these models were trained in.
    fn embedding_scale(self, hidden: usize) -> f32 {
        if self.is_gemma() { bf16::from_f32((hidden as f32).sqrt()).to_f32() } else { 1.0 }
    }

    fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    /// What a `config.json` may leave out.
    fn defaults(self) -> Value {
        match self {
            Self::Gemma => json!({"head_dim": 256, "tie_word_embeddings": true}),
            Self::Gemma3 => json!({
                "vocab_size": 262_208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": true,
            }),
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => json!({}),
        }
    }
}

/// Which of so many layers have the window. Where a file says there are millions, it is refused later: it gets no memory first.
fn layers_that(have: impl Fn(usize) -> bool, layers: usize) -> Vec<bool> {
    (0..layers.min(1 << 16)).map(have).collect()
}

/// All but every `period`-th: Gemma 3.
pub(super) fn all_but_every(period: usize, layers: usize) -> Vec<bool> {
    layers_that(|layer| !(layer + 1).is_multiple_of(period.max(1)), layers)
}

/// A window that makes a difference.
fn window(tokens: u32, layers: Vec<bool>, rope: Option<Rope>, context: u32) -> Option<Window> {
    let counts = layers.contains(&true) && (tokens < context || rope.is_some());
    counts.then_some(Window { tokens, layers, rope })
}

fn from_gguf(gguf: &Gguf) -> Result<DecoderSpec> {
    let missing = |key: &str| broken(gguf.path(), format_args!("the key {key} is missing; the file was made wrongly"));
    let unsupported = |what: String| Error::unsupported(format!("{}: {what}", gguf.path().display()));
    let arch = gguf.str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let (family, style) = match arch {
        "llama" => (Family::Llama, RopeStyle::Interleaved),
        "qwen2" => (Family::Qwen2, RopeStyle::Halves),
        "qwen3" => (Family::Qwen3, RopeStyle::Halves),
        "gemma" => (Family::Gemma, RopeStyle::Halves),
        "gemma3" => (Family::Gemma3, RopeStyle::Halves),
        _ => {
            return Err(unsupported(format!(
                "architecture {arch:?} is not supported yet; llama, qwen2, qwen3, gemma and gemma3 are"
            )));
        }
    };
    let key = |name: &str| format!("{arch}.{name}");
    let optional = |name: &str| -> Result<Option<usize>> { Ok(gguf.u32(&key(name))?.map(|number| number as usize)) };
    let size = |name: &str| optional(name)?.ok_or_else(|| missing(&key(name)));
    for name in
        ["attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.sliding_window_pattern"]
    {
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
    if gguf.f32(&key("final_logit_softcapping"))?.is_some_and(|cap| cap > 0.0) {
        return Err(unsupported("logits with a soft cap are not supported".to_owned()));
    }
    let embedding = gguf.tensor("token_embd.weight").ok_or_else(|| {
        broken(
            gguf.path(),
            "has no token_embd.weight: it is a vocabulary or one part of several; merge the parts first",
        )
    })?;
    let context = gguf.u32(&key("context_length"))?.ok_or_else(|| missing(&key("context_length")))?;
    let layers = size("block_count")?;
    let window = match (gguf.u32(&key("attention.sliding_window"))?.filter(|&tokens| tokens > 0), family) {
        (None, _) => None,
        (Some(tokens), Family::Gemma3) => {
            let period = optional("attention.sliding_window_pattern")?.unwrap_or(6);
            let theta = gguf.f32(&key("rope.freq_base_swa"))?.unwrap_or(10_000.0);
            let rope = Rope { theta, style, scaling: RopeScaling::None };
            window(tokens, all_but_every(period, layers), Some(rope), context)
        }
        (Some(tokens), _) => window(tokens, layers_that(|_| true, layers), None, context),
    };
    // Files do not say it, but the largest of its family goes by the width of heads that would share the hidden size.
    let score_width = if family == Family::Gemma3 && layers == 62 { hidden / heads.max(1) } else { head_dim };
    let epsilon = "attention.layer_norm_rms_epsilon";
    Ok(DecoderSpec {
        vocab: embedding.rows,
        hidden,
        layers,
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
        window,
        score_scale: 1.0 / (score_width as f32).sqrt(),
        embedding_scale: family.embedding_scale(hidden),
        gate: family.gate(),
        // Whoever made the file has added it.
        norm_offset: 0.0,
        post_norms: family == Family::Gemma3,
        context,
        qkv_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
        qk_norm: family.has_qk_norm(),
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
    let kind = config.get("model_type").and_then(Value::as_str);
    let known = Family::NAMES.iter().find(|(name, of, _)| match named {
        Some(named) => named == *name,
        None => kind == Some(*of),
    });
    let Some(&(_, _, family)) = known else {
        let names = Family::NAMES.map(|(name, ..)| name).join(", ");
        let name = named.or(kind).unwrap_or("none named");
        return Err(config.unsupported(format_args!("architecture {name} is not supported yet; {names} are")));
    };
    if config.get("quantization_config").is_some() {
        return Err(config.unsupported("quantised safetensors are not supported yet; use a GGUF file"));
    }
    // A model that sees as well says of its text part under a name of its own.
    let mut value = family.defaults();
    let own = config.child("text_config").filter(|_| family == Family::Gemma3);
    let own = own.as_ref().unwrap_or(config).value.as_object();
    for (key, given) in own.into_iter().flatten().filter(|(_, given)| !given.is_null()) {
        value[key] = given.clone();
    }
    let config = &Config { file: config.file, value: &value };

    let activation = config.get("hidden_activation").or_else(|| config.get("hidden_act")).and_then(Value::as_str);
    // The first Gemma's files say "gelu", and mean the formula with tanh all the same.
    let takes: &[&str] = if family.is_gemma() { &["gelu_pytorch_tanh", "gelu"] } else { &["silu"] };
    if let Some(activation) = activation.filter(|name| !takes.contains(name)) {
        return Err(config.unsupported(format_args!("hidden_act {activation:?} is not supported, only {:?}", takes[0])));
    }
    for name in ["mlp_bias", "use_bidirectional_attention"] {
        if config.flag(name) {
            return Err(config.unsupported(format_args!("{name} is not supported")));
        }
    }
    if let Some(name) =
        ["attn_logit_softcapping", "final_logit_softcapping"].iter().find(|name| config.get(name).is_some())
    {
        return Err(config.unsupported(format_args!("{name} is not supported")));
    }
    let (hidden, heads) = (config.u32("hidden_size")? as usize, config.u32("num_attention_heads")? as usize);
    let (layers, context) = (config.u32("num_hidden_layers")? as usize, config.u32("max_position_embeddings")?);
    let head_dim = config.optional_u32("head_dim")?.map_or(hidden / heads.max(1), |width| width as usize);
    let score_width = config.optional_f32("query_pre_attn_scalar")?.filter(|_| family == Family::Gemma3);
    Ok(DecoderSpec {
        vocab: config.u32("vocab_size")? as usize,
        hidden,
        layers,
        heads,
        kv_heads: config.optional_u32("num_key_value_heads")?.map_or(heads, |number| number as usize),
        head_dim,
        ffn: config.u32("intermediate_size")? as usize,
        norm_eps: config.f32("rms_norm_eps")?,
        rope: config_rope(config)?,
        window: config_window(config, family, layers, context)?,
        score_scale: 1.0 / score_width.unwrap_or(head_dim as f32).sqrt(),
        embedding_scale: family.embedding_scale(hidden),
        gate: family.gate(),
        norm_offset: if family.is_gemma() { 1.0 } else { 0.0 },
        post_norms: family == Family::Gemma3,
        context,
        qkv_bias: family == Family::Qwen2 || config.flag("attention_bias"),
        qk_norm: family.has_qk_norm(),
        tied_head: config.flag("tie_word_embeddings"),
    })
}

/// `sliding_window`, and which layers have it: `layer_types`, or what the family says where a file does not.
fn config_window(config: &Config<'_>, family: Family, layers: usize, context: u32) -> Result<Option<Window>> {
    let windowed = match family {
        Family::Llama | Family::Gemma => false,
        Family::Mistral | Family::Gemma3 => true,
        Family::Qwen2 | Family::Qwen3 => config.flag("use_sliding_window"),
    };
    let Some(tokens) = config.optional_u32("sliding_window")?.filter(|&tokens| windowed && tokens > 0) else {
        return Ok(None);
    };
    let of_layer = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(config.unsupported(format_args!("layer_types has {kind}, which is not supported"))),
    };
    let all = match (config.get("layer_types").and_then(Value::as_array), family) {
        (Some(kinds), _) => kinds.iter().map(of_layer).collect::<Result<_>>()?,
        (None, Family::Gemma3) => {
            all_but_every(config.optional_u32("sliding_window_pattern")?.unwrap_or(6) as usize, layers)
        }
        (None, Family::Qwen2 | Family::Qwen3) => {
            let whole = config.optional_u32("max_window_layers")?.unwrap_or(28) as usize;
            layers_that(|layer| layer >= whole, layers)
        }
        (None, _) => layers_that(|_| true, layers),
    };
    let rope = match family {
        Family::Gemma3 => {
            let parameters = config.child("rope_parameters").and_then(|all| all.child("sliding_attention"));
            Some(rope(config, "rope_local_base_freq", parameters.as_ref(), parameters.as_ref())?)
        }
        _ => None,
    };
    Ok(window(tokens, all, rope, context))
}

/// `rope_theta` and `rope_scaling`, or both under `rope_parameters` as newer files have it, there by kind of layer if there are
/// several.
fn config_rope(config: &Config<'_>) -> Result<Rope> {
    let parameters = config.child("rope_parameters");
    let parameters = parameters.map(|all| all.child("full_attention").unwrap_or(all));
    let scaling = config.child("rope_scaling").filter(|_| parameters.is_none());
    rope(config, "rope_theta", parameters.as_ref(), parameters.as_ref().or(scaling.as_ref()))
}

/// The base from `parameters`, or from `key` of the file.
fn rope(config: &Config<'_>, key: &str, parameters: Option<&Config<'_>>, scaling: Option<&Config<'_>>) -> Result<Rope> {
    let theta = match parameters {
        Some(parameters) => parameters.optional_f32("rope_theta")?,
        None => None,
    };
    let theta = theta.or(config.optional_f32(key)?).unwrap_or(10_000.0);
    let scaling = match scaling {
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
#[path = "spec_test.rs"]
mod tests;
