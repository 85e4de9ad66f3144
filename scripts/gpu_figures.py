#!/usr/bin/env python3
"""What scripts/gpu_check.sh has measured, as one table and one file: each figure beside what bounds it, measured in the same run.

    scripts/gpu_figures.py FOLDER         FIGURES.md and figures.json there, of all figures-*.json and facts.txt in it
    scripts/gpu_figures.py --show FILE    the lines of one load

A decode step has to read all weights but the embedding, and the keys and values of every sequence: so many bytes at the card's measured
bandwidth are the least time it can take. A prompt has to multiply each token with all weights but embedding and head, and with the keys and
values before it: so many operations at the measured rate of products.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# layers, hidden, query heads, kv heads, width of a head, feed-forward, vocabulary: as src/model/synthetic.rs has them.
SHAPES = {"8b": (32, 4096, 32, 8, 128, 14336, 128256), "70b": (80, 8192, 64, 8, 128, 28672, 128256)}
# Bytes of a weight; 4 bits have a 16-bit scale for each 32.
BYTES = {"bf16": 2.0, "fp8": 1.0, "q4": 0.5625, "draft": 1.0}


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--show":
        for level in levels(Path(sys.argv[2])):
            print(line(Path(sys.argv[2]).stem.removeprefix("figures-"), level))
        return 0
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    folder = Path(sys.argv[1])
    card = next(iter(read(folder / "figures-card.json") or []), {})
    rows, whole = [], {"card": card, "facts": {}, "loads": {}}
    for file in sorted(folder.glob("figures-*-*.json")):
        name, what = parts(file)
        for level in levels(file):
            whole["loads"].setdefault(name, {}).setdefault(what, []).append(level)
            rows += figures(name, what, level, card)
    for name, what, value in facts(folder / "facts.txt"):
        whole["facts"].setdefault(name, {})[what] = value
        rows.append((name, what, f"{value:g}", ""))
    if card:
        ceilings = [("copies", "copy_bytes_per_s", 1e9, "GB/s"), ("bf16", "bf16_flops_per_s", 1e12, "TFLOP/s"), ("fp8", "fp8_flops_per_s", 1e12, "TFLOP/s")]
        rows = [("card", what, f"{card[key] / unit:.0f} {word}", card["name"]) for what, key, unit, word in ceilings if card.get(key)] + rows
    (folder / "figures.json").write_text(json.dumps(whole, indent=1) + "\n")
    table = ["", "| model | what | figure | of what bounds it |", "| --- | --- | --- | --- |"] + [f"| {' | '.join(row)} |" for row in rows]
    (folder / "FIGURES.md").write_text("\n".join(table) + "\n")
    print(f"{len(rows)} figures: {folder / 'FIGURES.md'}, {folder / 'figures.json'}")
    return 0


def read(file: Path):
    return json.loads(file.read_text()) if file.exists() and file.stat().st_size else None


def levels(file: Path) -> list[dict]:
    return (read(file) or {}).get("levels", [])


def parts(file: Path) -> tuple[str, str]:
    """Name of the model and of the load: `figures-8b-fp8-decode-32.json`."""
    words = file.stem.removeprefix("figures-").split("-")
    count = next((at + 1 for at, word in enumerate(words) if word in BYTES or word == "embed"), 1)
    return "-".join(words[:count]), "-".join(words[count:])


def facts(file: Path):
    for text in file.read_text().splitlines() if file.exists() else []:
        name, what, value = text.split()
        yield name, what, float(value)


def line(what: str, level: dict) -> str:
    first, each = level["ttft_ms"] or {}, level["time_per_output_token_ms"] or {}
    speed = level["texts_per_s"] or level["output_tokens_per_s"]
    return (f"{what:28} {level['concurrency'] or '':4} {speed:10.1f}/s  first {first.get('p50', 0):9.2f} ms (p99 {first.get('p99', 0):.2f})"
            f"  each {each.get('p50', 0):.2f} ms  failed {level['failed']}")


def figures(name: str, what: str, level: dict, card: dict) -> list[tuple[str, str, str, str]]:
    size, _, weights = name.removeprefix("ranks-").partition("-")
    if level["texts"]:
        return [(name, f"{what} tokens, {level['concurrency']} clients", f"{level['texts_per_s']:.0f} texts/s", "")]
    first, each, count = level["ttft_ms"] or {}, level["time_per_output_token_ms"] or {}, level["ok"] or 1
    read_each, written = level["prompt_tokens"] / count, level["output_tokens"] / count
    shape = SHAPES.get(size)
    rows = []
    if each:
        share = ""
        if shape and card.get("copy_bytes_per_s") and "draft" not in name:
            # Of two cards, where the model is divided over them.
            cards = 2 if name.startswith("ranks-") else 1
            needed = bytes_of_step(shape, BYTES[weights], level["concurrency"], read_each + written / 2) / cards / card["copy_bytes_per_s"]
            share = f"{needed * 1e3 / each['p50'] * 100:.0f} % of the bandwidth"
        text = f"{level['output_tokens_per_s']:.0f} tok/s, one each {each['p50']:.2f} ms, first {first.get('p50', 0):.0f} ms (p99 {first.get('p99', 0):.0f})"
        rows.append((name, f"{what}: {level['concurrency']} streams, {read_each:.0f} in, {written:.0f} out", text, share))
    elif first:
        share = ""
        rate = card.get("fp8_flops_per_s" if weights in ("fp8", "draft") else "bf16_flops_per_s")
        if shape and rate and what.startswith("prompt"):
            share = f"{operations(shape, read_each - level['cached_tokens'] / count) / rate * 1e3 / first['p50'] * 100:.0f} % of the products' rate"
        known = level["cached_tokens"] / count
        cached = f", {known:.0f} of them cached" if known else ""
        rows.append((name, f"{what}: {read_each:.0f} in{cached}", f"first token {first['p50']:.1f} ms, {read_each * 1e3 / first['p50']:.0f} tok/s", share))
    return rows


def layer(shape) -> int:
    _, hidden, heads, kv_heads, dim, ffn, _ = shape
    return hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * ffn


def bytes_of_step(shape, each: float, streams: int, context: float) -> float:
    layers, hidden, _, kv_heads, dim, _, vocab = shape
    # The head stays in bf16, keys and values too.
    return layers * layer(shape) * each + 2 * vocab * hidden + streams * context * 2 * layers * kv_heads * dim * 2


def operations(shape, tokens: float) -> float:
    layers, _, heads, _, dim, _, _ = shape
    return layers * (2 * layer(shape) * tokens + 2 * heads * dim * tokens * tokens)


if __name__ == "__main__":
    sys.exit(main())
