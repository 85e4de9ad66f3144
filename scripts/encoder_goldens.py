#!/usr/bin/env python3
"""Writes tests/goldens/ for encoders: what an independent reference says about a real model and about tiny ones.

    real folder ----------------> tests/goldens/all-minilm-l6-v2.json            (the weights are not committed)
    seeds --> tiny-bert           BertModel                              bf16    vectors, both poolings
              tiny-cross-encoder  BertForSequenceClassification          bf16    a score a pair, segments 0 and 1
              tiny-reranker       XLMRobertaForSequenceClassification    bf16    a score a pair, SentencePiece-like tokens
              tiny-sentiment      DistilBertForSequenceClassification    f32     two labels
                                  each with config.json, tokenizer.json, model.safetensors, golden.json

The reference shares no code with neurond: numpy in f64, one text at a time. Tiny weights are small integers over a power
of two, exact in bf16 and f32 alike. Needs numpy and tokenizers.

    scripts/encoder_goldens.py                        everything, the real model in models/all-MiniLM-L6-v2
    scripts/encoder_goldens.py --model DIR --check    compare with what is committed; exit 1 when it differs
    scripts/encoder_goldens.py --only tiny            the tiny models alone
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"

TEXTS = [
    "Hi",
    "!!!",
    "How do I reset my password?",
    "The quick brown fox jumps over the lazy dog.",
    "Paged attention keeps the keys and values of many sequences in blocks of a fixed size, so that memory is neither "
    "fragmented nor reserved for tokens that may never come.",
    "Ça coûte 12,50 € à l'hôtel; 東京 and a naïve café: 42 %!",
    "def add(a, b):\n    return a + b\n",
    "antidisestablishmentarianism  \t pneumonoultramicroscopicsilicovolcanoconiosis 🚢",
    "London is the capital of England. " * 12,
    " ".join(f"In year {year} the harbour took in {year * 7 % 113} ships and {year * 3 % 17} tugs." for year in range(40)),
]
PAIRS = [
    ("which ship came in from riga", "the ship from riga came in on day two"),
    ("which ship came in from riga", "the pilot asked for a second tug"),
    ("a tug", "day " * 60),
    ("the pilot " * 40, "a tug"),
    ("the pilot " * 30, "a tug and a ship " * 30),
]
TINY_TEXTS = ["the ship from riga", "day two", "A pilot asked for the Second tug, and came in!", "x", "tug " * 80]


# ------------------------------------------------------------------------------------------------------- reference


class Encoder:
    """BERT and its kin, from a folder."""

    def __init__(self, config: dict, tensors: dict[str, np.ndarray]):
        name = config["architectures"][0]
        self.distil = name.startswith("DistilBert")
        self.roberta = "Roberta" in name
        self.classifies = name.endswith("ForSequenceClassification")
        prefix = ("distilbert." if self.distil else "roberta." if self.roberta else "bert.") if self.classifies else ""
        self.tensors, self.prefix = {key: value.astype(np.float64) for key, value in tensors.items()}, prefix
        self.heads = config["n_heads" if self.distil else "num_attention_heads"]
        self.layers = config["n_layers" if self.distil else "num_hidden_layers"]
        self.first = config["pad_token_id"] + 1 if self.roberta else 0
        self.eps = config.get("layer_norm_eps", 1e-12)
        self.most = config["max_position_embeddings"] - self.first

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[name + ".weight"].T + self.tensors[name + ".bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = x.mean(-1, keepdims=True)
        unit = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + self.eps)
        return unit * self.tensors[name + ".weight"] + self.tensors[name + ".bias"]

    def rows(self, ids: list[int], second: int) -> np.ndarray:
        p = self.prefix
        count = len(ids)
        x = self.tensors[p + "embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors[p + "embeddings.position_embeddings.weight"][self.first : self.first + count]
        if not self.distil:
            kinds = self.tensors[p + "embeddings.token_type_embeddings.weight"]
            x = x + kinds[[0 if at < second or len(kinds) == 1 else 1 for at in range(count)]]
        x = self.norm(x, p + "embeddings.LayerNorm")
        for layer in range(self.layers):
            if self.distil:
                at = f"{p}transformer.layer.{layer}."
                q, k, v, o = (at + f"attention.{part}_lin" for part in ("q", "k", "v", "out"))
                up, down, norm1, norm2 = at + "ffn.lin1", at + "ffn.lin2", at + "sa_layer_norm", at + "output_layer_norm"
            else:
                at = f"{p}encoder.layer.{layer}."
                q, k, v = (at + f"attention.self.{part}" for part in ("query", "key", "value"))
                o, norm1 = at + "attention.output.dense", at + "attention.output.LayerNorm"
                up, down, norm2 = at + "intermediate.dense", at + "output.dense", at + "output.LayerNorm"
            split = lambda name: self.linear(x, name).reshape(count, self.heads, -1).transpose(1, 0, 2)
            queries, keys, values = split(q), split(k), split(v)
            scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(queries.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            attended = (weights @ values).transpose(1, 0, 2).reshape(count, -1)
            x = self.norm(x + self.linear(attended, o), norm1)
            middle = self.linear(x, up)
            middle = middle * 0.5 * (1 + np.vectorize(math.erf)(middle / math.sqrt(2)))
            x = self.norm(x + self.linear(middle, down), norm2)
        return x

    def logits(self, rows: np.ndarray) -> np.ndarray:
        first = rows[0]
        if self.distil:
            return self.linear(np.maximum(self.linear(first, "pre_classifier"), 0), "classifier")
        if self.roberta:
            return self.linear(np.tanh(self.linear(first, "classifier.dense")), "classifier.out_proj")
        return self.linear(np.tanh(self.linear(first, "bert.pooler.dense")), "classifier")


def golden_of(config: dict, tensors: dict[str, np.ndarray], tokenizer: Tokenizer, texts: list, most: int) -> dict:
    encoder = Encoder(config, tensors)
    tokenizer.no_padding()
    tokenizer.enable_truncation(most, strategy="longest_first")
    cases = []
    for text in texts:
        first, second = (text, None) if isinstance(text, str) else text
        encoding = tokenizer.encode(first, second)
        ids, kinds = encoding.ids, encoding.type_ids
        switch = kinds.index(1) if 1 in kinds else len(ids)
        rows = encoder.rows(ids, switch)
        case = {"text": first, "pair": second, "ids": ids, "second": switch}
        if encoder.classifies:
            case["logits"] = rounded(encoder.logits(rows))
        else:
            unit = lambda vector: rounded(vector / np.linalg.norm(vector))
            case |= {"mean": unit(rows.mean(0)), "cls": unit(rows[0])}
        cases.append(case)
    return {"most": most, "cases": cases}


def rounded(vector: np.ndarray) -> list[float]:
    return [round(float(value), 7) for value in vector]


# ----------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and info["dtype"] == "F32":
            begin, end = (8 + length + offset for offset in info["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], np.float32).reshape(info["shape"])
    return tensors


def write_safetensors(tensors: dict[str, np.ndarray], half: bool) -> bytes:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        bits = np.ascontiguousarray(tensor, np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), f"{name} is not exact in bf16"
        data = (bits >> 16).astype(np.uint16).tobytes() if half else bits.tobytes()
        dtype, shape = "BF16" if half else "F32", list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# ----------------------------------------------------------------------------------------------------- tiny models

HIDDEN, FFN, HEADS, POSITIONS = 64, 128, 4, 48
WORDS = sorted(set("the ship from riga day two a pilot asked for second tug and came in which on".split()))


def word_piece() -> Tokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters + ["##" + letter for letter in letters]
    pieces += list("0123456789.,!?'") + [word for word in WORDS if len(word) > 1] + ["##ed", "##s", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As sentence-transformers writes it: a reader must do without both.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -5.0 - at / 50) for at, word in enumerate(WORDS)]
    pieces += [(chr(code), -8.0 - code / 500) for code in range(ord("a"), ord("z") + 1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def draw_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    name = config["architectures"][0]
    distil, roberta, classifies = name.startswith("Distil"), "Roberta" in name, "For" in name
    prefix = ("distilbert." if distil else "roberta." if roberta else "bert.") if classifies else ""
    tensors = {}

    def matrix(name, rows, columns, size):
        # 8 bits at most, and a power of two: exact in bf16.
        tensors[name] = np.clip(np.rint(draw.normal(size=(rows, columns)) * 32), -127, 127) / 2.0**size

    def linear(name, rows, columns):
        matrix(name + ".weight", rows, columns, 7)
        tensors[name + ".bias"] = np.rint(draw.normal(size=rows) * 8) / 64

    def norm(name):
        tensors[name + ".weight"] = 1 + np.rint(draw.normal(size=HIDDEN) * 8) / 64
        tensors[name + ".bias"] = np.rint(draw.normal(size=HIDDEN) * 8) / 64

    matrix(prefix + "embeddings.word_embeddings.weight", config["vocab_size"], HIDDEN, 6)
    matrix(prefix + "embeddings.position_embeddings.weight", config["max_position_embeddings"], HIDDEN, 7)
    if not distil:
        matrix(prefix + "embeddings.token_type_embeddings.weight", config["type_vocab_size"], HIDDEN, 7)
    norm(prefix + "embeddings.LayerNorm")
    for layer in range(config["n_layers" if distil else "num_hidden_layers"]):
        at = f"{prefix}{'transformer' if distil else 'encoder'}.layer.{layer}."
        if distil:
            parts = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]
            up, down, norms = "ffn.lin1", "ffn.lin2", ["sa_layer_norm", "output_layer_norm"]
        else:
            parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
            up, down, norms = "intermediate.dense", "output.dense", ["attention.output.LayerNorm", "output.LayerNorm"]
        for part in parts:
            linear(at + part, HIDDEN, HIDDEN)
        linear(at + up, FFN, HIDDEN)
        linear(at + down, HIDDEN, FFN)
        for part in norms:
            norm(at + part)
    if classifies:
        labels = len(config["id2label"])
        dense = "pre_classifier" if distil else "classifier.dense" if roberta else "bert.pooler.dense"
        linear(dense, HIDDEN, HIDDEN)
        linear("classifier.out_proj" if roberta else "classifier", labels, HIDDEN)
    else:
        linear("pooler.dense", HIDDEN, HIDDEN)
    return tensors


def bert(architecture: str, vocab: int, **more) -> dict:
    return {
        "architectures": [architecture],
        "model_type": "xlm-roberta" if "Roberta" in architecture else "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "layer_norm_eps": 1e-5 if "Roberta" in architecture else 1e-12,
        "max_position_embeddings": POSITIONS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "pad_token_id": 1 if "Roberta" in architecture else 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1 if "Roberta" in architecture else 2,
        "vocab_size": vocab,
    } | more


def tiny() -> dict[Path, bytes]:
    pieces, words = word_piece(), unigram()
    one, vocab = {"id2label": {"0": "LABEL_0"}}, pieces.get_vocab_size()
    distil = {
        "architectures": ["DistilBertForSequenceClassification"],
        "model_type": "distilbert",
        "activation": "gelu",
        "dim": HIDDEN,
        "hidden_dim": FFN,
        "max_position_embeddings": POSITIONS,
        "n_heads": HEADS,
        "n_layers": 2,
        "pad_token_id": 0,
        "vocab_size": vocab,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
    }
    made = {
        "tiny-bert": (bert("BertModel", vocab), pieces, TINY_TEXTS, True),
        "tiny-cross-encoder": (bert("BertForSequenceClassification", vocab, **one), pieces, PAIRS, True),
        "tiny-reranker": (
            bert("XLMRobertaForSequenceClassification", words.get_vocab_size(), **one), words, PAIRS, True
        ),
        "tiny-sentiment": (distil, pieces, TINY_TEXTS, False),
    }
    files = {}
    for seed, (name, (config, tokenizer, texts, half)) in enumerate(made.items(), 11):
        tensors = draw_weights(config, seed)
        folder = GOLDENS / name
        files[folder / "config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        files[folder / "tokenizer.json"] = tokenizer.to_str().encode()
        files[folder / "model.safetensors"] = write_safetensors(tensors, half)
        most = POSITIONS - (2 if "Roberta" in config["architectures"][0] else 0)
        golden = golden_of(config, tensors, Tokenizer.from_str(tokenizer.to_str()), texts, most)
        files[folder / "golden.json"] = dump(golden)
    return files


def dump(golden: dict) -> bytes:
    cases = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in golden["cases"])
    return f'{{"most":{golden["most"]},"cases":[\n{cases}\n]}}\n'.encode()


# ------------------------------------------------------------------------------------------------------------ main


def same(old: bytes, new: bytes) -> bool:
    """Equal bytes, or equal but for the last digits of a number (another BLAS sums in another order)."""
    try:
        return old == new or close(json.loads(old), json.loads(new))
    except ValueError:
        return False


def close(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-6
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--only", choices=["real", "tiny"])
    args = parser.parse_args()
    made: dict[Path, bytes] = {}
    if args.only != "real":
        made |= tiny()
    if args.only != "tiny":
        if not (args.model / "model.safetensors").is_file():
            print(f"no model in {args.model}: fetch it with scripts/fetch_model.sh embedding, or name a folder with --model")
            return 2
        config = json.loads((args.model / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        golden = golden_of(config, read_safetensors(args.model / "model.safetensors"), tokenizer, TEXTS, 256)
        made[GOLDENS / "all-minilm-l6-v2.json"] = dump(golden)
    if not args.check:
        for path, data in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{len(data):9,} bytes  {path.relative_to(ROOT)}")
        return 0
    differing = [path for path, data in made.items() if not path.is_file() or not same(path.read_bytes(), data)]
    for path in differing:
        print(f"differs: {path.relative_to(ROOT)}")
    print(f"{len(made) - len(differing)} of {len(made)} files agree")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
