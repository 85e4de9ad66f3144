//! Shapes of well-known models, for measurements without their weights.

use crate::base::{Error, Result};
use crate::model::spec::{DecoderSpec, Rope, RopeScaling, RopeStyle};

/// Name, layers, hidden, query heads, kv heads, width of a head, feed-forward, vocabulary, head tied, factor of Llama 3's rope.
type Shape = (&'static str, usize, usize, usize, usize, usize, usize, usize, bool, f32);

const SHAPES: [Shape; 5] = [
    ("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256, true, 32.0),
    ("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128_256, true, 32.0),
    ("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256, false, 8.0),
    ("llama-3.3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256, false, 8.0),
    ("tiny", 2, 128, 2, 1, 64, 256, 512, false, 8.0),
];

/// The shape of this name. The figures are those of the models' published configurations.
///
/// # Errors
/// `BadInput` for a name that is none, with those that are.
pub fn synthetic(name: &str) -> Result<DecoderSpec> {
    let Some(&(_, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied_head, factor)) =
        SHAPES.iter().find(|shape| shape.0 == name)
    else {
        let names = SHAPES.map(|shape| shape.0).join(", ");
        return Err(Error::bad_input(format!("synthetic:{name}: there are {names}")));
    };
    Ok(DecoderSpec {
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
        context: 131_072,
        qkv_bias: false,
        tied_head,
    })
}
