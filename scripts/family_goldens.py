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
from transformers import Qwen3Config, Qwen3ForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests/goldens"
TOKENS = 60
POSITIONS = [0, 1, 17, 40, 59]


def tiny(name: str, model: torch.nn.Module) -> None:
    torch.manual_seed(7)
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, dtype=torch.float64)
            # Norms around 1, matrices so that nothing grows.
            values = 1 + 0.2 * values if parameter.dim() == 1 else values * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(torch.bfloat16).to(torch.float64))
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits[0]
    folder = GOLDENS / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["torch_dtype"] = "bfloat16"
    keep = {key: value for key, value in sorted(config.items()) if value is not None and not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(keep, indent=1) + "\n")
    rows = [[round(float(value), 5) for value in logits[at]] for at in POSITIONS]
    golden = {"tokens": tokens[0].tolist(), "positions": POSITIONS, "logits": rows}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{folder}: logits from {logits.min():.2f} to {logits.max():.2f}")


def main() -> None:
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


if __name__ == "__main__":
    main()
