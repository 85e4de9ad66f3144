"""Tiny Llama models with random weights in the real file formats, and what the reference says about them.

    tests/goldens/tiny-llama/         safetensors, bf16, two shards + index, config.json as Llama 3.1 writes it
    tests/goldens/tiny-llama-lora/    adapters of tiny-llama as PEFT saves them; their goldens are those of the merged weights
    tests/goldens/tiny-gguf/legacy    GGUF: F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1, untied head, rope_freqs of Llama 3.1
    tests/goldens/tiny-gguf/k         GGUF: Q4_K Q5_K Q6_K (+ Q8_0), tied head, head size named by key_length

Weights are drawn from fixed seeds. Those of the safetensors checkpoint are small integers over a power of two, exact in
bf16, f16 and f32 alike: a test may rewrite the files in another type and expect the same numbers. K-quant blocks are
random bytes under sane scales, since any bytes are a valid block. The tokenizer is a byte-level BPE of 512 tokens learnt
here from a few sentences.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

import reference
from golden_prompts import harbour_log, turns

VOCAB = 512
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL += [f"<|reserved_special_token_{i}|>" for i in range(11)]
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
STEPS = 24
PROMPTS = [
    ("chat", turns("Which ship came in from Riga?")),
    ("chat-system", turns("system: Be brief. ", "  Hello there!\n", "Hello.", "Day 2?")),
    ("raw", "The pilot asked for a second tug"),
    ("raw-unicode", "größer, 長城 and 🚢!"),
    ("raw-beyond-the-original-context", harbour_log(10, 5)),
]


def build(folder: Path, golden_of) -> dict[Path, bytes]:
    """path -> bytes of every file."""
    vocabulary, merges = learn()
    made = safetensors_checkpoint(vocabulary, merges)
    made |= {f"tiny-gguf/{name}.gguf": data for name, data in gguf_files(vocabulary, merges).items()}
    tokenizer = hugging_face_tokenizer(vocabulary, merges)
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in made.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        nets = {
            "tiny-llama/golden.json": reference.from_safetensors(Path(scratch) / "tiny-llama"),
            "tiny-gguf/legacy.json": reference.from_gguf(Path(scratch) / "tiny-gguf/legacy.gguf"),
            "tiny-gguf/k.json": reference.from_gguf(Path(scratch) / "tiny-gguf/k.gguf"),
        }
        for name, (files, deltas) in adapters().items():
            made |= {f"tiny-llama-lora/{name}/{file}": data for file, data in files.items()}
            nets[f"tiny-llama-lora/{name}/golden.json"] = merged_network(nets["tiny-llama/golden.json"], deltas)
            if name == "all":  # the other checkpoint of this shape, whose heads lie in another order
                legacy = nets["tiny-gguf/legacy.json"]
                nets[f"tiny-llama-lora/{name}/legacy.json"] = merged_network(legacy, [interleaved(d) for d in deltas])
        for name, net in nets.items():
            prompts = [prompt_of(tokenizer, *prompt) for prompt in PROMPTS]
            ends = [vocabulary["<|end_of_text|>"], vocabulary["<|eot_id|>"]]
            made[name] = dump(golden_of(net, prompts, STEPS, ends))
    return {folder / name: data for name, data in made.items()}


def prompt_of(tokenizer, name: str, prompt) -> dict:
    if isinstance(prompt, str):
        return {"name": name, "raw": prompt, "tokens": tokenizer.encode(prompt).ids}
    rendered = reference.render(TEMPLATE, prompt, bos_token=CONTROL[0], eos_token=CONTROL[4])
    tokens = tokenizer.encode(rendered, add_special_tokens=False).ids
    return {"name": name, "messages": prompt, "rendered": rendered, "tokens": tokens}


def dump(golden: dict) -> bytes:
    head = {key: value for key, value in golden.items() if key != "prompts"}
    lines = ",\n".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in golden["prompts"])
    return (json.dumps(head, separators=(",", ":"))[:-1] + ',"prompts":[\n' + lines + "\n]}\n").encode()


# ------------------------------------------------------------------------------------------------------- tokenizer


def learn() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE: 256 bytes, merges of the most frequent pair (the smaller one when even), control tokens."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(reference.PRE_TOKENIZERS["llama-bpe"][1]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = harbour_log(7, 40) + "\n\nHello there! Be brief. Which ship came in? größer größer 長城 長城"
    words = Counter(tuple(word) for word, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    while len(alphabet) + len(merges) + len(CONTROL) < VOCAB:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({merged(word, best): count for word, count in words.items()})
    tokens = alphabet + [a + b for a, b in merges] + CONTROL
    assert len(set(tokens)) == VOCAB
    return {token: i for i, token in enumerate(tokens)}, merges


def merged(word: tuple, pair: tuple) -> tuple:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def hugging_face_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    plain = {token: i for token, i in vocabulary.items() if token not in CONTROL}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(reference.PRE_TOKENIZERS["llama-bpe"][1]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    begin = CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
    )
    return tokenizer


# ----------------------------------------------------------------------------------------------------- safetensors


def safetensors_checkpoint(vocabulary: dict[str, int], merges) -> dict[str, bytes]:
    """File name -> bytes of a two-layer checkpoint as a hub would hold it."""
    hidden, ffn, heads, kv_heads, dim = 64, 96, 4, 2, 16
    draw = np.random.default_rng(20240)

    def matrix(rows: int, columns: int, shift: int) -> np.ndarray:
        return (np.clip(np.round(draw.normal(0, 64, (rows, columns))), -255, 255) / 2**shift).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + draw.integers(-48, 49, hidden) / 128).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden, 6)}
    for i in range(2):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": norm(),
            layer + "self_attn.q_proj.weight": matrix(heads * dim, hidden, 8),
            layer + "self_attn.k_proj.weight": matrix(kv_heads * dim, hidden, 8),
            layer + "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden, 9),
            layer + "self_attn.o_proj.weight": matrix(hidden, heads * dim, 9),
            layer + "post_attention_layernorm.weight": norm(),
            layer + "mlp.gate_proj.weight": matrix(ffn, hidden, 9),
            layer + "mlp.up_proj.weight": matrix(ffn, hidden, 9),
            layer + "mlp.down_proj.weight": matrix(hidden, ffn, 9),
        }
    tensors |= {"model.norm.weight": norm(), "lm_head.weight": matrix(VOCAB, hidden, 7)}
    names = list(tensors)
    cut = next(i for i, name in enumerate(names) if name.startswith("model.layers.1."))
    shards = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
    total = sum(tensor.size * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: s for s, part in shards.items() for n in part}}
    end, eot, begin = (vocabulary[token] for token in ("<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": begin,
        "eos_token_id": [end, eot],
        "head_dim": dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    tokenizer_config = {
        "added_tokens_decoder": {
            str(vocabulary[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in CONTROL
        },
        "bos_token": CONTROL[0],
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = lambda value: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()  # noqa: E731
    files = {
        "config.json": text(config),
        "generation_config.json": text({"bos_token_id": begin, "eos_token_id": [end, eot], "temperature": 0.6}),
        "model.safetensors.index.json": text(index),
        "tokenizer.json": hugging_face_tokenizer(vocabulary, merges).to_str().encode() + b"\n",
        "tokenizer_config.json": text(tokenizer_config),
    }
    files |= {shard: write_safetensors({name: tensors[name] for name in part}) for shard, part in shards.items()}
    return {f"tiny-llama/{name}": data for name, data in files.items()}


def write_safetensors(tensors: dict[str, np.ndarray], dtype: str = "BF16") -> bytes:
    """Every value must be exact in the type."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = narrow(np.ascontiguousarray(tensor, np.float32), dtype)
        assert (reference.widen(data, dtype) == tensor.ravel()).all(), f"{name} is not exact in {dtype}"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def narrow(values: np.ndarray, dtype: str) -> bytes:
    """What is too fine for bf16 is cut off."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


# -------------------------------------------------------------------------------------------------------- adapters

ADAPTED = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
ADAPTED |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def adapters() -> dict[str, tuple[dict[str, bytes], list[dict[str, np.ndarray]]]]:
    """Adapters of tiny-llama: name -> (its files, what it adds to each layer's matrices)."""
    return {
        "all": adapter(41, "F32", list(ADAPTED), [0, 1], r=8, lora_alpha=16, target_modules="all-linear"),
        "wide": adapter(42, "BF16", ["q", "v"], [0, 1], r=32, lora_alpha=8, use_rslora=True),
        "late": adapter(43, "F16", ["o", "up", "down"], [1], r=3, lora_alpha=6, layers_to_transform=[1]),
    }


def adapter(seed: int, dtype: str, parts: list[str], layers: list[int], **settings):
    hidden, ffn, q, kv = 64, 96, 64, 32
    outputs = {"q": q, "k": kv, "v": kv, "o": hidden, "gate": ffn, "up": ffn, "down": hidden}
    inputs = {"q": hidden, "k": hidden, "v": hidden, "o": q, "gate": hidden, "up": hidden, "down": ffn}
    draw, rank = np.random.default_rng(seed), settings["r"]

    def matrix(rows: int, columns: int, size: float) -> np.ndarray:
        values = draw.normal(0, size, (rows, columns)).astype(np.float32)
        return reference.widen(narrow(values, dtype), dtype).reshape(rows, columns)

    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    tensors, deltas = {}, [{}, {}]
    for layer in layers:
        for part in parts:
            a, b = matrix(rank, inputs[part], 0.2), matrix(outputs[part], rank, 0.2 / rank**0.5 / scale)
            name = f"base_model.model.model.layers.{layer}.{ADAPTED[part]}.lora_"
            tensors |= {name + "A.weight": a, name + "B.weight": b}
            deltas[layer][part] = scale * (b.astype(reference.REAL) @ a.astype(reference.REAL))
    config = {
        "base_model_name_or_path": "tiny-llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "model_type": "llama",
        "modules_to_save": None,
        "peft_type": "LORA",
        "target_modules": [ADAPTED[part].split(".")[1] for part in parts],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | settings
    files = {
        "adapter_config.json": (json.dumps(config, indent=1) + "\n").encode(),
        "adapter_model.safetensors": write_safetensors(tensors, dtype),
    }
    return files, deltas


def interleaved(deltas: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For rows of q and k as GGUF stores them: number i of a head beside number i + 8."""
    turn = lambda delta: delta.reshape(-1, 2, 8, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)  # noqa: E731
    return {part: turn(delta) if part in "qk" else delta for part, delta in deltas.items()}


def merged_network(net: reference.Network, deltas: list[dict[str, np.ndarray]]) -> reference.Network:
    layers = [
        replace(layer, **{part: getattr(layer, part) + delta for part, delta in added.items()})
        for layer, added in zip(net.layers, deltas)
    ]
    return replace(net, layers=layers)


# ------------------------------------------------------------------------------------------------------------ GGUF


def gguf_files(vocabulary: dict[str, int], merges) -> dict[str, bytes]:
    legacy = gguf_file(
        vocabulary,
        merges,
        seed=31,
        hidden=64,
        ffn=96,
        dim=16,
        types={
            "token_embd": "Q8_0",
            "output": "Q5_1",
            "blk.0": {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1"}
            | {"ffn_gate": "F16", "ffn_up": "BF16", "ffn_down": "Q8_0"},
            "blk.1": {"attn_q": "F32", "attn_k": "Q8_0", "attn_v": "F16", "attn_output": "Q4_1"}
            | {"ffn_gate": "Q4_0", "ffn_up": "Q4_0", "ffn_down": "Q5_0"},
        },
        rope_freqs=True,
    )
    k = gguf_file(
        vocabulary,
        merges,
        seed=32,
        hidden=256,
        ffn=256,
        dim=32,
        types={
            "token_embd": "Q6_K",
            "blk.0": {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q8_0"}
            | {"ffn_gate": "Q4_K", "ffn_up": "Q4_K", "ffn_down": "Q6_K"},
            "blk.1": {"attn_q": "Q5_K", "attn_k": "Q6_K", "attn_v": "Q4_K", "attn_output": "Q8_0"}
            | {"ffn_gate": "Q5_K", "ffn_up": "Q6_K", "ffn_down": "Q4_K"},
        },
        rope_freqs=False,
    )
    return {"legacy": legacy, "k": k}


def gguf_file(vocabulary, merges, seed, hidden, ffn, dim, types, rope_freqs) -> bytes:
    from gguf import GGUFWriter

    heads, kv_heads = 4, 2
    draw = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_block_count(2)
        writer.add_context_length(512)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(ffn)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(dim)
        writer.add_value_length(dim)
        writer.add_rope_dimension_count(dim)
        writer.add_rope_freq_base(500000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(VOCAB)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(list(vocabulary))
        writer.add_token_types([3 if token in CONTROL else 1 for token in vocabulary])
        writer.add_token_merges([f"{a} {b}" for a, b in merges])
        writer.add_bos_token_id(vocabulary["<|begin_of_text|>"])
        writer.add_eos_token_id(vocabulary["<|eot_id|>"])
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)

        def add(name: str, kind: str, rows: int, columns: int, size: float) -> None:
            data, dtype = blocks(draw, kind, rows, columns, size)
            writer.add_tensor(name + ".weight", data, raw_dtype=dtype)

        def add_norm(name: str) -> None:
            writer.add_tensor(name + ".weight", draw.uniform(0.6, 1.4, hidden).astype(np.float32))

        add("token_embd", types["token_embd"], VOCAB, hidden, 4 / hidden**0.5)
        shapes = {"attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden), "attn_v": (kv_heads * dim, hidden)}
        shapes |= {"attn_output": (hidden, heads * dim), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
        shapes |= {"ffn_down": (hidden, ffn)}
        for i in range(2):
            add_norm(f"blk.{i}.attn_norm")
            add_norm(f"blk.{i}.ffn_norm")
            for name, (rows, columns) in shapes.items():
                # Queries and keys twice as large, so that attention looks at some tokens more than at others.
                size = (2 if name in ("attn_q", "attn_k") else 1) / columns**0.5
                add(f"blk.{i}.{name}", types[f"blk.{i}"][name], rows, columns, size)
        add_norm("output_norm")
        if "output" in types:
            add("output", types["output"], VOCAB, hidden, 4 / hidden**0.5)
        if rope_freqs:
            frequencies = reference.rope_frequencies(500000.0, dim)
            factors = frequencies / reference.llama3_frequencies(frequencies, SCALING)
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def blocks(draw: np.random.Generator, kind: str, rows: int, columns: int, size: float):
    """Random weights of standard deviation about `size` in a storage type: (array to write, raw type or None)."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    dtype = GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        values = draw.normal(0, size, (rows, columns)).astype(np.float32)
        if kind == "F32":
            return values, None
        return (values.astype(np.float16), None) if kind == "F16" else (quantize(values, dtype), dtype)
    count = rows * columns // 256
    random = lambda width: draw.integers(0, 256, (count, width), np.uint8)  # noqa: E731
    half = lambda values: values.astype(np.float16).view(np.uint8).reshape(count, 2)  # noqa: E731
    vary = draw.uniform(0.7, 1.3, count)
    if kind == "Q6_K":  # low 4 bits [128], high 2 bits [64], i8 scales [16], f16 scale; values -32..31
        scales = draw.integers(-32, 32, (count, 16)).astype(np.int8).view(np.uint8)
        raw = [random(128), random(64), scales, half(vary * size / 342)]
    else:  # f16 scale, f16 minimum, 6-bit scales and minimums [12], (fifth bits [32],) low 4 bits [128]
        middle, spread = (7.5, 191) if kind == "Q4_K" else (15.5, 393)
        step = vary * size / spread
        raw = [half(step), half(step * middle), random(12)] + ([random(32)] if kind == "Q5_K" else []) + [random(128)]
    return np.concatenate(raw, axis=1).reshape(rows, -1), dtype
