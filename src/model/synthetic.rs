//! Shapes of well-known models, for measurements without their weights.

use crate::base::{Error, Result};
use crate::kernel::Gate;
use crate::model::spec::{DecoderSpec, Rope, RopeScaling, RopeStyle, Window, all_but_every};

/// Name, layers, hidden, query heads, kv heads, width of a head, feed-forward, vocabulary, head tied, factor of the rope.
type Shape = (&'static str, usize, usize, usize, usize, usize, usize, usize, bool, f32);

const SHAPES: [Shape; 6] = [
    ("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256, true, 32.0),
    ("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128_256, true, 32.0),
    ("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256, false, 8.0),
    ("llama-3.3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256, false, 8.0),
    ("gemma-3-12b", 48, 3840, 16, 8, 256, 15_360, 262_208, true, 8.0),
    ("tiny", 2, 128, 2, 1, 64, 256, 512, false, 8.0),
];

/// A model whose weights are made up.
#[derive(Clone, Debug, PartialEq)]
pub struct Synthetic {
    /// Its shape: the figures are those of the model's published configuration.
    pub spec: DecoderSpec,
    /// Share of the drafts that come true, whatever the weights say: what speculation costs and gains can be measured so.
    pub accept: Option<f32>,
}

/// The model of this name, or `NAME,accept=SHARE`.
///
/// # Errors
/// `BadInput` for a name that is none, with those that are, and for a share that is none.
pub fn synthetic(text: &str) -> Result<Synthetic> {
    let (name, accept) = match text.split_once(",accept=") {
        Some((name, share)) => {
            let share = share.parse().ok().filter(|share| (0.0..=1.0).contains(share));
            let wrong = || Error::bad_input(format!("synthetic:{text}: accept is a share from 0 to 1"));
            (name, Some(share.ok_or_else(wrong)?))
        }
        None => (text, None),
    };
    let Some(&(_, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied_head, factor)) =
        SHAPES.iter().find(|shape| shape.0 == name)
    else {
        let names = SHAPES.map(|shape| shape.0).join(", ");
        return Err(Error::bad_input(format!("synthetic:{name}: there are {names}")));
    };
    let spec = DecoderSpec {
        vocab,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        norm_eps: 1e-5,
        rope: Rope {
            theta: 500_000.0,
            style: RopeStyle::Halves,
            scaling: RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context: 8192,
            },
        },
        window: None,
        score_scale: 1.0 / (head_dim as f32).sqrt(),
        embedding_scale: 1.0,
        gate: Gate::Silu,
        norm_offset: 0.0,
        post_norms: false,
        context: 131_072,
        qkv_bias: false,
        qk_norm: false,
        tied_head,
    };
    let spec = if name.starts_with("gemma") { gemma(spec, factor) } else { spec };
    Ok(Synthetic { spec, accept })
}

/// What else there is to a Gemma 3.
fn gemma(spec: DecoderSpec, factor: f32) -> DecoderSpec {
    let rope = |theta: f32, scaling: RopeScaling| Rope { theta, style: RopeStyle::Halves, scaling };
    let local = rope(10_000.0, RopeScaling::None);
    DecoderSpec {
        norm_eps: 1e-6,
        rope: rope(1_000_000.0, RopeScaling::Linear { factor }),
        window: Some(Window { tokens: 1024, layers: all_but_every(6, spec.layers), rope: Some(local) }),
        embedding_scale: (spec.hidden as f32).sqrt(),
        gate: Gate::Gelu,
        post_norms: true,
        qk_norm: true,
        ..spec
    }
}
