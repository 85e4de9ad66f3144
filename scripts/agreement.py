#!/usr/bin/env python3
"""How far neurond and llama.cpp stray from an exact reference on the same file: mean KL divergence and top-1 agreement.

    text --tokens--> windows --+--> reference.py (numpy, f64)   p
                               +--> examples/logits (neurond)   q1   fast and plain
                               +--> libllama through ctypes     q2

Teacher forcing: everyone reads the same tokens and says what it would have answered at every position, so that one
early difference does not turn into many. KL is KL(p || q) in nats, averaged over positions.

    scripts/agreement.py --model FILE                                   neurond against the reference
    scripts/agreement.py --llama-lib DIR --llama-python DIR             llama.cpp beside it
    scripts/agreement.py --text FILE ... --window 512 --positions 2048  other text, longer windows

--llama-lib is the folder of libllama.so, --llama-python the one that contains the `llama_cpp` package of the same version
(scripts/peer_llama.sh makes both and prints them). Needs numpy, gguf, tokenizers; typing_extensions for llama.cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

import reference

ROOT = Path(__file__).resolve().parent.parent
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = 100  # tokens of a prompt from which on it is not short; tests/model/main.rs has the same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / MODEL)
    parser.add_argument("--text", type=Path, nargs="*", default=[ROOT / "docs" / "ARCHITECTURE.md"])
    parser.add_argument("--goldens", type=Path, default=ROOT / "tests" / "goldens" / "smollm2-135m-instruct-q4_1.json")
    parser.add_argument("--window", type=int, default=512, help="tokens read in a row")
    parser.add_argument("--positions", type=int, default=3072, help="positions of running text")
    parser.add_argument("--llama-lib", type=Path, help="folder of libllama.so")
    parser.add_argument("--llama-python", type=Path, help="folder that contains the llama_cpp Python package")
    parser.add_argument("--logits", type=Path, help="a built examples/logits; else cargo builds it")
    parser.add_argument("--kv", choices=["f16", "f32"], default="f16", help="KV type of both")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-ours", action="store_true", help="llama.cpp alone")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()

    groups = windows(args)
    everything = [window for _, window in groups]
    with tempfile.TemporaryDirectory() as scratch:
        candidates = {}
        if not args.no_ours:
            for precision in ("plain", "fast"):
                candidates[f"neurond {precision}"] = ours(args, everything, precision, Path(scratch))
        if args.llama_lib:
            candidates["llama.cpp"] = theirs(args, everything, Path(scratch))
        figures = compare(reference.from_gguf(args.model), groups, candidates)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def windows(args) -> list[tuple[str, list[int]]]:
    """(group, tokens) of everything that is read."""
    tokenizer = reference.gguf_tokenizer(args.model)
    text = tokenizer.encode("\n\n".join(path.read_text() for path in args.text), add_special_tokens=False).ids
    text = text[: args.positions]
    out = [("text", text[i : i + args.window]) for i in range(0, len(text), args.window)]
    for prompt in json.loads(args.goldens.read_text())["prompts"]:
        if len(prompt["tokens"]) < SHORT:
            out.append(("short prompts and answers", prompt["tokens"] + prompt["greedy"][:-1]))
    return out


def ours(args, everything: list[list[int]], precision: str, scratch: Path) -> np.ndarray:
    """Logits of all positions, [positions, vocab], through examples/logits.rs."""
    tokens, out = scratch / "tokens.json", scratch / f"neurond-{precision}.f32"
    tokens.write_text(json.dumps(everything))
    cargo = ["cargo", "run", "--release", "--quiet", "--example", "logits", "--"]
    command = [args.logits] if args.logits else cargo
    command += ["--model", args.model, "--tokens", tokens, "--out", out, "--precision", precision]
    command += ["--kv", "f32" if precision == "plain" else args.kv, "--threads", str(args.threads)]
    subprocess.run(command, cwd=ROOT, check=True)
    return np.memmap(out, np.float32, "r").reshape(sum(map(len, everything)), -1)


def theirs(args, everything: list[list[int]], scratch: Path) -> np.ndarray:
    """The same through libllama."""
    llama = Llama(args.llama_lib, args.llama_python, args.model, context=args.window, threads=args.threads, kv=args.kv)
    out = np.memmap(scratch / "llama.f32", np.float32, "w+", shape=(sum(map(len, everything)), llama.vocab_size))
    row = 0
    for tokens in everything:
        out[row : row + len(tokens)] = llama.logits(tokens)
        row += len(tokens)
    return out


def compare(net: reference.Network, groups: list[tuple[str, list[int]]], candidates: dict[str, np.ndarray]) -> dict:
    """name -> group -> figures."""
    found: dict[str, dict[str, dict[str, list]]] = {name: {} for name in candidates}
    row = 0
    for group, tokens in groups:
        hidden = reference.read(net, reference.Sequence(), tokens)
        for begin in range(0, len(tokens), 128):
            exact = reference.logits(net, hidden[begin : begin + 128])
            log_p = reference.log_softmax(exact)
            p = np.exp(log_p)
            here = slice(row + begin, row + begin + len(exact))
            for name, rows in candidates.items():
                given = rows[here].astype(np.float64)
                kl = (p * (log_p - reference.log_softmax(given))).sum(axis=-1)
                for key in (group, "all"):
                    lists = found[name].setdefault(key, {"kl": [], "top1": [], "off": []})
                    lists["kl"].append(kl)
                    lists["top1"].append(given.argmax(axis=-1) == exact.argmax(axis=-1))
                    lists["off"].append(np.abs(given - exact).max(axis=-1))
        row += len(tokens)
    return {name: {group: summary(lists) for group, lists in by.items()} for name, by in found.items()}


def summary(lists: dict[str, list]) -> dict:
    kl, top1, off = (np.concatenate(lists[key]) for key in ("kl", "top1", "off"))
    return {
        "positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(top1.mean()),
        "logit_off_max": float(off.max()),
    }


def show(figures: dict) -> None:
    print("| implementation | on | positions | mean KL (nats) | KL p99 | top-1 agreement | largest logit difference |")
    print("|---|---|---|---|---|---|---|")
    for name, by in figures.items():
        for group, f in by.items():
            print(
                f"| {name} | {group} | {f['positions']} | {f['kl_mean']:.3e} | {f['kl_p99']:.3e} "
                f"| {100 * f['top1']:.2f} % | {f['logit_off_max']:.2e} |"
            )


class Llama:
    """libllama through the ctypes declarations of llama-cpp-python, without importing the package's other modules."""

    def __init__(self, lib: Path, python: Path, model: Path, vocab_only=False, context=0, threads=1, kv="f16"):
        os.environ["LLAMA_CPP_LIB_PATH"] = str(lib.resolve())
        package = types.ModuleType("llama_cpp")
        package.__path__ = [str(python.resolve() / "llama_cpp")]
        sys.modules["llama_cpp"] = package
        self.api = api = importlib.import_module("llama_cpp.llama_cpp")
        self.silence = api.llama_log_callback(lambda level, text, user: None)  # kept: the library holds a pointer to it
        api.llama_log_set(self.silence, ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.vocab_only = vocab_only
        self.model = api.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {model}")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.vocab_size = api.llama_vocab_n_tokens(self.vocab)
        if vocab_only:
            return
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = api.GGML_TYPE_F16 if kv == "f16" else api.GGML_TYPE_F32
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")

    def tokenize(self, text: str) -> list[int]:
        """With the text of control tokens read as those tokens, and no token added in front that the model does not ask for."""
        data = text.encode()
        room = len(data) + 16
        out = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, data, len(data), out, room, True, True)
        assert count >= 0, "a token has at least one byte"
        return list(out[:count])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits at every position, [tokens, vocab]."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        status = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        data = api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(data, (len(tokens), self.vocab_size)).copy()


if __name__ == "__main__":
    sys.exit(main())
