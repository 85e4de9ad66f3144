#!/usr/bin/env python3
"""Writes a GGUF model again with its matrices in another format, for measuring formats against each other.

    scripts/requantise.py models/SmolLM2-135M-Instruct.Q4_1.gguf Q4_0 target/test-models/SmolLM2-135M-Instruct.Q4_0.gguf

Formats: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 F16 BF16 F32. Vectors and the embedding (which is the head too) stay as they are; metadata is
copied. Quantising twice loses more than once: good for speed, not for quality. Needs the packages `gguf` and `numpy`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf


def main(source: str, kind: str, target: str) -> None:
    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind]
    architecture = reader.fields["general.architecture"].contents()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        # The first are the header's own, the second is written by the writer, the third says what the file was.
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        keep = len(tensor.shape) < 2 or tensor.name == "token_embd.weight"
        if keep:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
