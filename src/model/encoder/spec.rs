//! One description for every encoder of the BERT family: sizes, position rule, activation, head. Read from the
//! `config.json` of a hub's folder, and checked, so that whoever computes with it need not.
//!
//! | architecture | positions | segments | head of `…ForSequenceClassification` |
//! | --- | --- | --- | --- |
//! | `Bert…` | from 0 | 2 | tanh of `pooler.dense`, then `classifier` |
//! | `Roberta…`, `XLMRoberta…` | from `pad_token_id` + 1 | 1 | tanh of `classifier.dense`, then `classifier.out_proj` |
//! | `DistilBert…` | from 0 | none | relu of `pre_classifier`, then `classifier` |
//!
//! Without a head the vectors themselves are what is wanted. Names of tensors are GGUF's, as everywhere in `model`.

use serde_json::Value;

use crate::base::{Error, Result};
use crate::kernel::Then;
use crate::model::files::ModelFiles;
use crate::model::gguf::broken;

/// Everything about an encoder but its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderSpec {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of a row.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads; divides `hidden`.
    pub heads: usize,
    /// Width of the feed-forward's middle.
    pub ffn: usize,
    /// Added to the variance in layer norms.
    pub norm_eps: f32,
    /// Rows of the position table.
    pub positions: usize,
    /// The row of the first token's position.
    pub first_position: usize,
    /// Segment embeddings: 0, 1 or 2.
    pub segments: usize,
    /// The feed-forward's activation.
    pub activation: Then,
    /// What classifies, for models that do.
    pub head: Option<Head>,
}

/// From the first token's vector to a number for each label: `output(activation(dense(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Between the two matrices: tanh, or relu.
    pub relu: bool,
    /// What the numbers stand for; a reranker has one.
    pub labels: Vec<String>,
}

/// Families by how they name things.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Bert,
    Roberta,
    DistilBert,
}

/// Architectures that are computed, and whether they classify.
const ARCHITECTURES: [(&str, Family, bool); 8] = [
    ("BertModel", Family::Bert, false),
    ("BertForSequenceClassification", Family::Bert, true),
    ("RobertaModel", Family::Roberta, false),
    ("RobertaForSequenceClassification", Family::Roberta, true),
    ("XLMRobertaModel", Family::Roberta, false),
    ("XLMRobertaForSequenceClassification", Family::Roberta, true),
    ("DistilBertModel", Family::DistilBert, false),
    ("DistilBertForSequenceClassification", Family::DistilBert, true),
];

impl EncoderSpec {
    /// Reads the description of a model. Whether the tensors agree is checked by
    /// [`Weights::encoder`](crate::model::weights::Weights::encoder).
    ///
    /// # Errors
    /// `Unsupported` for architectures and options that are not computed, `ModelUnavailable` for a missing or impossible
    /// value, with the key's name.
    pub fn read(files: &ModelFiles) -> Result<Self> {
        let ModelFiles::Folder { path, config } = files else {
            let path = files.path().display();
            return Err(Error::unsupported(format!(
                "{path}: embedding and classification models are read from safetensors folders, not from GGUF"
            )));
        };
        let file = path.join("config.json");
        let wrong = |key: &str| broken(&file, format_args!("{key} is missing or no size"));
        let unsupported = |what: String| Error::unsupported(format!("{}: {what}", file.display()));
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let name =
            config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str).unwrap_or("none named");
        let Some((_, family, classifies)) = ARCHITECTURES.into_iter().find(|(known, ..)| *known == name) else {
            let known = ARCHITECTURES.map(|(known, ..)| known).join(", ");
            return Err(unsupported(format!("architecture {name} does not embed or classify text here; {known} do")));
        };
        if let Some(kind) = text("position_embedding_type").filter(|kind| *kind != "absolute") {
            return Err(unsupported(format!("positions of type {kind:?} are not supported; absolute ones are")));
        }
        let number =
            |key: &str| config.get(key).and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok());
        // Far above any model, far below where products of two sizes overflow.
        let size = |key: &str| number(key).filter(|&size| size > 0 && size <= 1 << 28).ok_or_else(|| wrong(key));
        let distil = family == Family::DistilBert;
        let named = |key: &'static str, in_distil: &'static str| size(if distil { in_distil } else { key });
        let activation = text(if distil { "activation" } else { "hidden_act" }).unwrap_or("gelu");
        let spec = Self {
            vocab: size("vocab_size")?,
            hidden: named("hidden_size", "dim")?,
            layers: named("num_hidden_layers", "n_layers")?,
            heads: named("num_attention_heads", "n_heads")?,
            ffn: named("intermediate_size", "hidden_dim")?,
            norm_eps: config.get("layer_norm_eps").and_then(Value::as_f64).unwrap_or(1e-12) as f32,
            positions: size("max_position_embeddings")?,
            first_position: if family == Family::Roberta { number("pad_token_id").unwrap_or(1) + 1 } else { 0 },
            segments: if distil { 0 } else { number("type_vocab_size").unwrap_or(2) },
            activation: match activation {
                "gelu" => Then::Gelu,
                "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Then::GeluTanh,
                "relu" => Then::Relu,
                other => return Err(unsupported(format!("the activation {other:?} is not supported yet"))),
            },
            head: classifies.then(|| Head { relu: distil, labels: labels(config) }),
        };
        spec.check().map_err(|what| broken(&file, what))?;
        Ok(spec)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Numbers that come out for a text: as many as a vector is long, or one for each label.
    pub fn width(&self) -> usize {
        self.head.as_ref().map_or(self.hidden, |head| head.labels.len())
    }

    /// Longest sequence that has positions.
    pub fn context(&self) -> usize {
        self.positions - self.first_position
    }

    /// Names, rows and columns of every tensor that the encoder needs.
    pub fn tensors(&self) -> impl Iterator<Item = (String, usize, usize)> {
        let (hidden, ffn) = (self.hidden, self.ffn);
        let layer = move |layer: usize| {
            LAYER.into_iter().flat_map(move |(name, ..)| {
                let (rows, cols) = match name {
                    "ffn_up" => (ffn, hidden),
                    "ffn_down" => (hidden, ffn),
                    "attn_output_norm" | "layer_output_norm" => (1, hidden),
                    _ => (hidden, hidden),
                };
                let outputs = if rows == 1 { cols } else { rows };
                let name = |kind| format!("blk.{layer}.{name}.{kind}");
                [(name("weight"), rows, cols), (name("bias"), 1, outputs)]
            })
        };
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), self.vocab, hidden),
            ("position_embd.weight".to_owned(), self.positions, hidden),
            ("token_embd_norm.weight".to_owned(), 1, hidden),
            ("token_embd_norm.bias".to_owned(), 1, hidden),
        ];
        if self.segments > 0 {
            tensors.push(("token_types.weight".to_owned(), self.segments, hidden));
        }
        if let Some(head) = &self.head {
            tensors.push(("cls.weight".to_owned(), hidden, hidden));
            tensors.push(("cls.bias".to_owned(), 1, hidden));
            tensors.push(("cls.output.weight".to_owned(), head.labels.len(), hidden));
            tensors.push(("cls.output.bias".to_owned(), 1, head.labels.len()));
        }
        tensors.into_iter().chain((0..self.layers).flat_map(layer))
    }

    fn check(&self) -> Result<(), String> {
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(format!("{} heads do not divide a width of {}", self.heads, self.hidden));
        }
        if self.positions <= self.first_position + 2 {
            return Err(format!("{} positions leave no room for a text", self.positions));
        }
        if self.segments > 2 {
            return Err(format!("{} segments are more than a pair of texts has", self.segments));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(format!("the norm epsilon is {}", self.norm_eps));
        }
        match &self.head {
            Some(head) if head.labels.is_empty() || head.labels.len() > 4096 => Err("it names no labels".to_owned()),
            _ => Ok(()),
        }
    }
}

/// `id2label` in order of the ids, else as many as `num_labels` says, else two, as the library that wrote the file has it.
fn labels(config: &Value) -> Vec<String> {
    let numbered = |count: usize| (0..count).map(|id| format!("LABEL_{id}")).collect();
    let Some(names) = config.get("id2label").and_then(Value::as_object) else {
        let count = config.get("num_labels").and_then(Value::as_u64).unwrap_or(2);
        return numbered(count.min(1 << 16) as usize);
    };
    let name = |id: usize| names.get(&id.to_string()).and_then(Value::as_str);
    let found: Option<Vec<String>> = (0..names.len()).map(|id| name(id).map(str::to_owned)).collect();
    found.unwrap_or_else(|| numbered(names.len()))
}

/// Tensors of a layer: our name, BERT's and its kin's, DistilBERT's.
const LAYER: [(&str, &str, &str); 8] = [
    ("attn_q", "attention.self.query", "attention.q_lin"),
    ("attn_k", "attention.self.key", "attention.k_lin"),
    ("attn_v", "attention.self.value", "attention.v_lin"),
    ("attn_output", "attention.output.dense", "attention.out_lin"),
    ("attn_output_norm", "attention.output.LayerNorm", "sa_layer_norm"),
    ("ffn_up", "intermediate.dense", "ffn.lin1"),
    ("ffn_down", "output.dense", "ffn.lin2"),
    ("layer_output_norm", "output.LayerNorm", "output_layer_norm"),
];

/// Tensors outside layers. `classifier.weight` is the only matrix of its name in files of BERT and DistilBERT.
const OUTSIDE: [(&str, &str); 9] = [
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("pooler.dense", "cls"),
    ("pre_classifier", "cls"),
    ("classifier.dense", "cls"),
    ("classifier.out_proj", "cls.output"),
    ("classifier", "cls.output"),
];

/// GGUF's name for an encoder's tensor in a hub's file; `None` for those that are not needed.
pub(in crate::model) fn canonical_name(name: &str) -> Option<String> {
    let prefixes = ["bert.", "roberta.", "distilbert."];
    let name = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    let (module, kind) = name.rsplit_once('.')?;
    let kind = match kind {
        // Names of old files.
        "gamma" => "weight",
        "beta" => "bias",
        "weight" | "bias" => kind,
        _ => return None,
    };
    if let Some((_, ours)) = OUTSIDE.iter().find(|(theirs, _)| *theirs == module) {
        return Some(format!("{ours}.{kind}"));
    }
    let (rest, distil) = match module.strip_prefix("encoder.layer.") {
        Some(rest) => (rest, false),
        None => (module.strip_prefix("transformer.layer.")?, true),
    };
    let (layer, module) = rest.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (ours, ..) = LAYER.iter().find(|(_, bert, in_distil)| module == if distil { *in_distil } else { *bert })?;
    Some(format!("blk.{layer}.{ours}.{kind}"))
}
