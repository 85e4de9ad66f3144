"""An independent reference for Llama-architecture models: numpy only, weights dequantised, arithmetic in f64.

    GGUF file ------------+
                          +--> Network --forward--> hidden rows --logits--> [rows, vocab]
    safetensors folder ---+

It shares no code with neurond. Weights are dequantised to f32 exactly as the formats define them; everything after that
is computed in f64, so that what differs from another implementation is that implementation's rounding and not ours.
It is written to be read, not to be fast: a packed batch of sequences is computed layer by layer, and each sequence
attends to its own contiguous cache. No paging, no sampling other than greedy.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REAL = np.float64
CHUNK = 512  # rows of one sequence computed at a time: bounds the score matrix


@dataclass
class Layer:
    attn_norm: np.ndarray  # [hidden]
    q: np.ndarray  # [heads * dim, hidden]
    k: np.ndarray  # [kv_heads * dim, hidden]
    v: np.ndarray  # [kv_heads * dim, hidden]
    o: np.ndarray  # [hidden, heads * dim]
    ffn_norm: np.ndarray  # [hidden]
    gate: np.ndarray  # [ffn, hidden]
    up: np.ndarray  # [ffn, hidden]
    down: np.ndarray  # [hidden, ffn]


@dataclass
class Network:
    embed: np.ndarray  # [vocab, hidden]
    layers: list[Layer]
    norm: np.ndarray  # [hidden]
    head: np.ndarray  # [vocab, hidden]; the embedding itself when tied
    heads: int
    kv_heads: int
    dim: int  # of one head
    eps: float
    frequencies: np.ndarray  # [dim / 2] radians a position
    interleaved: bool  # rotate (0,1) (2,3) ... as GGUF stores Llama; else (0,dim/2) (1,dim/2+1) ... as Hugging Face does

    @property
    def vocab(self) -> int:
        return self.head.shape[0]


@dataclass
class Sequence:
    """Keys and values of what one sequence has read so far, a pair of arrays [kv_heads, tokens, dim] a layer."""

    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    length: int = 0


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rotate(x: np.ndarray, positions: np.ndarray, net: Network) -> np.ndarray:
    """RoPE on x [rows, heads, dim]."""
    angle = positions[:, None].astype(REAL) * net.frequencies  # [rows, dim / 2]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    half = net.dim // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if net.interleaved else (x[..., :half], x[..., half:])
    out = np.empty_like(x)
    a, b = first * cos - second * sin, first * sin + second * cos
    if net.interleaved:
        out[..., 0::2], out[..., 1::2] = a, b
    else:
        out[..., :half], out[..., half:] = a, b
    return out


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
    """Causal attention of q [rows, heads, dim] at positions start.. over k, v [kv_heads, tokens, dim]."""
    rows, heads, dim = q.shape
    kv_heads, tokens, _ = k.shape
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)  # [kv, group, rows, dim]
    scores = grouped @ k[:, None].transpose(0, 1, 3, 2) / math.sqrt(dim)
    hidden_from = np.arange(tokens)[None, :] > (start + np.arange(rows))[:, None]
    scores = np.where(hidden_from, -np.inf, scores)
    return (softmax(scores) @ v[:, None]).transpose(2, 0, 1, 3).reshape(rows, heads * dim)


def forward(net: Network, work: list[tuple[Sequence, list[int]]]) -> list[np.ndarray]:
    """Reads the given tokens into each sequence; returns normed hidden states [tokens, hidden], ready for the head."""
    spans, row = [], 0
    for sequence, tokens in work:
        if not sequence.keys:
            sequence.keys = [np.zeros((net.kv_heads, 0, net.dim), REAL) for _ in net.layers]
            sequence.values = [np.zeros((net.kv_heads, 0, net.dim), REAL) for _ in net.layers]
        spans.append((sequence, row, len(tokens)))
        row += len(tokens)
    positions = np.concatenate([np.arange(s.length, s.length + n) for s, _, n in spans])
    x = net.embed[np.concatenate([tokens for _, tokens in work]).astype(int)].astype(REAL)
    for index, layer in enumerate(net.layers):
        h = rms_norm(x, layer.attn_norm, net.eps)
        q = rotate((h @ layer.q.T).reshape(row, net.heads, net.dim), positions, net)
        k = rotate((h @ layer.k.T).reshape(row, net.kv_heads, net.dim), positions, net)
        v = (h @ layer.v.T).reshape(row, net.kv_heads, net.dim)
        mixed = np.empty((row, net.heads * net.dim), REAL)
        for sequence, first, count in spans:
            here = slice(first, first + count)
            keys = np.concatenate([sequence.keys[index], k[here].transpose(1, 0, 2)], axis=1)
            values = np.concatenate([sequence.values[index], v[here].transpose(1, 0, 2)], axis=1)
            sequence.keys[index], sequence.values[index] = keys, values
            mixed[here] = attend(q[here], keys, values, sequence.length)
        x = x + mixed @ layer.o.T
        h = rms_norm(x, layer.ffn_norm, net.eps)
        gate = h @ layer.gate.T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer.up.T)) @ layer.down.T
    for sequence, _, count in spans:
        sequence.length += count
    x = rms_norm(x, net.norm, net.eps)
    return [x[first : first + count] for _, first, count in spans]


def read(net: Network, sequence: Sequence, tokens: list[int]) -> np.ndarray:
    """Reads a whole prompt in chunks; hidden states [tokens, hidden]."""
    parts = [forward(net, [(sequence, tokens[i : i + CHUNK])])[0] for i in range(0, len(tokens), CHUNK)]
    return np.concatenate(parts)


def logits(net: Network, hidden: np.ndarray) -> np.ndarray:
    return hidden @ net.head.T


# ---------------------------------------------------------------------------------------------------- reading files


def from_gguf(path: Path) -> Network:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    key = lambda name, default=None: reader.fields[name].contents() if name in reader.fields else default  # noqa: E731
    assert key("general.architecture") == "llama", "only the llama architecture is known here"

    def take(name: str) -> np.ndarray:
        tensor = tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).astype(REAL)

    heads, hidden = key("llama.attention.head_count"), key("llama.embedding_length")
    dim = key("llama.rope.dimension_count", hidden // heads)
    frequencies = rope_frequencies(key("llama.rope.freq_base", 10000.0), dim)
    if "rope_freqs.weight" in tensors:  # how GGUF carries the scaling of Llama 3.1: a divisor a frequency
        frequencies = frequencies / take("rope_freqs.weight")
    embed = take("token_embd.weight")
    names = {"attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    layers = [
        Layer(**{ours: take(f"blk.{i}.{theirs}.weight") for ours, theirs in names.items()})
        for i in range(key("llama.block_count"))
    ]
    return Network(
        embed=embed,
        layers=layers,
        norm=take("output_norm.weight"),
        head=take("output.weight") if "output.weight" in tensors else embed,
        heads=heads,
        kv_heads=key("llama.attention.head_count_kv", heads),
        dim=dim,
        eps=key("llama.attention.layer_norm_rms_epsilon"),
        frequencies=frequencies,
        interleaved=True,
    )


def from_safetensors(folder: Path) -> Network:
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors |= read_safetensors(folder / shard)
    take = lambda name: tensors[name].astype(REAL)  # noqa: E731
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {n: f"self_attn.{n}_proj" for n in "qkvo"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    return Network(
        embed=take("model.embed_tokens.weight"),
        layers=[
            Layer(**{ours: take(f"model.layers.{i}.{theirs}.weight") for ours, theirs in names.items()})
            for i in range(config["num_hidden_layers"])
        ],
        norm=take("model.norm.weight"),
        head=take("model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"),
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        dim=config["head_dim"],
        eps=config["rms_norm_eps"],
        frequencies=llama3_frequencies(
            rope_frequencies(config["rope_theta"], config["head_dim"]), config["rope_scaling"]
        ),
        interleaved=False,
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as f32. The format: u64 length of a JSON header, the header, the bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        out[name] = widen(raw[begin:end], entry["dtype"]).reshape(entry["shape"])
    return out


def widen(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def rope_frequencies(base: float, dim: int) -> np.ndarray:
    return REAL(base) ** (-np.arange(0, dim, 2, dtype=REAL) / dim)


def llama3_frequencies(frequencies: np.ndarray, scaling: dict) -> np.ndarray:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones stay, those between are blended."""
    assert scaling["rope_type"] == "llama3"
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies / factor * (1 - keep) + frequencies * keep


# -------------------------------------------------------------------------------------------- templates and tokens


def render(template: str, messages: list[dict], **tokens: str) -> str:
    """A chat template as Hugging Face renders it, with the generation prompt."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


PRE_TOKENIZERS = {
    # name in the GGUF file -> (split digits one by one, regex or None for the one of GPT-2)
    "smollm": (True, None),
    "gpt-2": (False, None),
    "llama-bpe": (
        False,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def gguf_tokenizer(path: Path):
    """The byte-level BPE of a GGUF file, built with the `tokenizers` package."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(path)
    key = lambda name: reader.fields[name].contents()  # noqa: E731
    assert key("tokenizer.ggml.model") == "gpt2"
    tokens, types = key("tokenizer.ggml.tokens"), key("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in key("tokenizer.ggml.merges")]
    pre = key("tokenizer.ggml.pre")
    digits, regex = PRE_TOKENIZERS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if regex:
        steps.append(pre_tokenizers.Split(Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer
