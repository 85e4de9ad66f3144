#!/usr/bin/env python3
"""Writes src/kernel/goldens/quant.bin: random blocks of every GGUF format and what the `gguf` package reads in them.

    pip install numpy gguf
    scripts/quant_goldens.py

Layout, little endian, for each format: u32 type, u32 weights, u32 bytes, the row, then its weights as f32.
"""
import pathlib
import struct

import numpy as np
from gguf import GGUFReader  # noqa: F401  (fails early with a clear message when the package is missing)
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize

OUT = pathlib.Path(__file__).resolve().parent.parent / "src/kernel/goldens/quant.bin"
ORDER = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
# Where a block keeps its f16 numbers: random bytes there would be infinities and NaNs.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def row(name: str, rng: np.random.Generator) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[Type[name]]
    if block == 1:
        numbers = rng.standard_normal(32, dtype=np.float32)
        if name == "F32":
            return numbers.view(np.uint8)
        if name == "F16":
            return numbers.astype(np.float16).view(np.uint8)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = rng.standard_normal((2, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


def main() -> None:
    rng = np.random.default_rng(20)
    out = bytearray()
    for name in ORDER:
        data = row(name, rng)
        weights = dequantize(data, Type[name]).astype(np.float32).reshape(-1)
        out += struct.pack("<III", Type[name].value, len(weights), len(data)) + data.tobytes() + weights.tobytes()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(out)
    print(f"{OUT.name}: {len(out)} bytes, {len(ORDER)} formats")


if __name__ == "__main__":
    main()
