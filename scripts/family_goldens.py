#!/usr/bin/env python3
"""Tiny random checkpoints of model families as a hub has them, and what transformers computes with them.

    scripts/family_goldens.py            writes tests/goldens/tiny-FAMILY/: config.json, model.safetensors, golden.json

Weights are drawn from a fixed seed and are exact in bf16; logits are computed in f64. Needs torch, transformers and safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GOLDENS = Path(__file__).resolve().parent.parent / "tests/goldens"
TOKENS = 60
POSITIONS = [0, 1, 17, 40, 59]
# Tokens of the most likely answer, which ends earlier where one is not that much more likely than others, in logits.
GREEDY, MARGIN = 20, 0.01
# With these weights a Llama's answer is neither short nor one word over and over.
LLAMA_GREEDY, LLAMA_SEED = 64, 8


def tiny(
    name: str, model: torch.nn.Module, norms_less_1: bool = False, greedy_tokens: int = GREEDY, seed: int = 7
) -> None:
    torch.manual_seed(seed)
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, dtype=torch.float64)
            # Norms around 1, matrices so that nothing grows.
            centre = 0 if norms_less_1 else 1
            values = centre + 0.2 * values if parameter.dim() == 1 else values * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(torch.bfloat16).to(torch.float64))
    if hasattr(model.model.embed_tokens, "embed_scale"):
        # As in bf16, which these models were trained in.
        model.model.embed_tokens.embed_scale.copy_(model.model.embed_tokens.embed_scale.to(torch.bfloat16))
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    greedy, margins = [], []
    with torch.no_grad():
        logits = model(tokens).logits[0]
        for _ in range(greedy_tokens):
            read = torch.cat([tokens, torch.tensor([greedy], dtype=tokens.dtype)], dim=1)
            (best, other), (token, _) = model(read).logits[0, -1].topk(2)
            if best - other < MARGIN:
                break
            greedy.append(int(token))
            margins.append(round(float(best - other), 3))
    folder = GOLDENS / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["torch_dtype"] = "bfloat16"
    keep = {key: value for key, value in sorted(config.items()) if value is not None and not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(keep, indent=1) + "\n")
    rows = [[round(float(value), 5) for value in logits[at]] for at in POSITIONS]
    golden = {"tokens": tokens[0].tolist(), "positions": POSITIONS, "logits": rows, "greedy": greedy, "margins": margins}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{folder}: logits from {logits.min():.2f} to {logits.max():.2f}")


def main() -> None:
    small = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 256,
    }
    # Positions as Llama 3.1 has them: some of the waves longer than the text it was first taught with.
    wide = small | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama = LlamaConfig(**wide, num_hidden_layers=2, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    tiny("tiny-llama3", LlamaForCausalLM(llama), greedy_tokens=LLAMA_GREEDY, seed=LLAMA_SEED)

    qwen3 = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    tiny("tiny-qwen3", Qwen3ForCausalLM(qwen3))

    # Windows much shorter than the text, in every layer.
    mistral = MistralConfig(
        **small, num_hidden_layers=2, sliding_window=24, rope_theta=10_000.0, architectures=["MistralForCausalLM"]
    )
    tiny("tiny-mistral-window", MistralForCausalLM(mistral))

    # Layers of both kinds; scores that do not go by the heads' width.
    gemma3 = Gemma3TextConfig(
        **small,
        num_hidden_layers=4,
        sliding_window=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        architectures=["Gemma3ForCausalLM"],
    )
    tiny("tiny-gemma3", Gemma3ForCausalLM(gemma3), norms_less_1=True)

    gemma = GemmaConfig(**small, num_hidden_layers=2, architectures=["GemmaForCausalLM"])
    tiny("tiny-gemma", GemmaForCausalLM(gemma), norms_less_1=True)


if __name__ == "__main__":
    main()
