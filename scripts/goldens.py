#!/usr/bin/env python3
"""Writes tests/goldens/: what an independent reference says about a real model and about tiny ones.

    real GGUF  --reference.py--> tests/goldens/smollm2-135m-instruct-q4_1.json   (the weights are not committed)
    seeds      --tiny_models.py-> tests/goldens/tiny-*/ (weights committed) + their golden.json

Needs numpy, gguf, jinja2 and tokenizers. Two minutes on two cores for the real model; the same input gives the same file.

    scripts/goldens.py                         everything, model in models/
    scripts/goldens.py --model FILE --check    compare with what is committed; exit 1 when it differs
    scripts/goldens.py --only tiny             the tiny models alone (seconds)
    scripts/goldens.py --llama-lib DIR --llama-python DIR    also compare every tokenisation with llama.cpp's

A greedy step whose two best logits are closer than NEAR_TIE is listed in `near_ties`: there, and only there, another
correct implementation may pick the other token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import reference
import tiny_models
from golden_prompts import PROMPTS

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEAR_TIE = 2e-3
GREEDY = 48  # tokens of an answer
TOP = 64
SAMPLE = 256  # ids spread evenly over the vocabulary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / MODEL)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--only", choices=["real", "tiny"])
    parser.add_argument("--llama-lib", type=Path, help="folder of libllama.so")
    parser.add_argument("--llama-python", type=Path, help="folder that contains the llama_cpp Python package")
    args = parser.parse_args()

    made: dict[Path, bytes] = {}
    if args.only != "real":
        made |= tiny_models.build(GOLDENS, golden_of)
    if args.only != "tiny":
        if not args.model.is_file():
            print(f"no model at {args.model}: fetch it with scripts/quickstart.sh, or name one with --model")
            return 2
        made[GOLDENS / "smollm2-135m-instruct-q4_1.json"] = real(args)
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


def same(old: bytes, new: bytes) -> bool:
    """Equal bytes; or, for goldens, equal but for the last digit of a logit (another BLAS sums in another order)."""
    if old == new:
        return True
    try:
        return close(json.loads(old), json.loads(new))
    except ValueError:
        return False


def close(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 5e-5
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return a == b


def real(args) -> bytes:
    """The golden of the demo model."""
    from gguf import GGUFReader

    net = reference.from_gguf(args.model)
    tokenizer = reference.gguf_tokenizer(args.model)
    fields = GGUFReader(args.model).fields
    template = fields["tokenizer.chat_template"].contents()
    pieces = fields["tokenizer.ggml.tokens"].contents()
    special = {f"{name}_token": pieces[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos")}
    ends = sorted({fields["tokenizer.ggml.eos_token_id"].contents(), pieces.index("<|endoftext|>")})

    prompts = []
    for name, prompt in PROMPTS:
        entry = {"name": name}
        if isinstance(prompt, list):
            entry |= {"messages": prompt, "rendered": reference.render(template, prompt, **special)}
        else:
            entry["raw"] = prompt
        entry["tokens"] = tokenizer.encode(entry.get("rendered", prompt), add_special_tokens=False).ids
        prompts.append(entry)
    if args.llama_lib:
        cross_check(args, [(p["name"], p.get("rendered", p.get("raw")), p["tokens"]) for p in prompts])
    golden = {
        "model": {"file": MODEL, "sha256": hashlib.sha256(args.model.read_bytes()).hexdigest()},
        **golden_of(net, prompts, GREEDY, ends),
    }
    for prompt in golden["prompts"]:
        prompt["text"] = tokenizer.decode(prompt["greedy"], skip_special_tokens=True)
    ties = {p["name"]: p["near_ties"] for p in golden["prompts"] if p["near_ties"]}
    print(f"{len(prompts)} prompts, {sum(len(p['tokens']) for p in prompts)} prompt tokens; near ties: {ties or 'none'}")
    return dump(golden)


def golden_of(net: reference.Network, prompts: list[dict], steps: int, ends: list[int]) -> dict:
    """Greedy answers to prompts that have `tokens`, all in lockstep, and logits at a few positions of each."""
    stride = max(1, net.vocab // SAMPLE)
    sequences, hidden = [], []
    for prompt in prompts:
        sequence = reference.Sequence()
        hidden.append([reference.read(net, sequence, prompt["tokens"])])
        sequences.append(sequence)
        prompt |= {"greedy": [], "finish": "length", "near_ties": []}
    running = list(range(len(prompts)))
    for step in range(steps):
        rows = reference.logits(net, np.stack([hidden[i][-1][-1] for i in running]))
        work = []
        for i, row in zip(list(running), rows):
            second, best = np.partition(row, -2)[-2:]
            if best - second < NEAR_TIE:
                prompts[i]["near_ties"].append(step)
            token = int(row.argmax())
            prompts[i]["greedy"].append(token)
            if token in ends:
                prompts[i]["finish"] = "stop"
                running.remove(i)
            elif step + 1 < steps:
                work.append((i, token))
        if not work:
            break
        for (i, _), new in zip(work, reference.forward(net, [(sequences[i], [token]) for i, token in work])):
            hidden[i].append(new)
    for prompt, parts in zip(prompts, hidden):
        states = np.concatenate(parts)  # of the prompt and all of the answer but its last token
        last = len(prompt["tokens"]) - 1
        wanted = sorted({last // 2, last, len(states) - 1})
        prompt["logits"] = [logits_at(p, row, stride) for p, row in zip(wanted, reference.logits(net, states[wanted]))]
    return {"vocab": net.vocab, "end_tokens": ends, "near_tie": NEAR_TIE, "stride": stride, "prompts": prompts}


def logits_at(position: int, row: np.ndarray, stride: int) -> dict:
    """Logits after reading the token at `position`: the best ones, and every `stride`-th of the vocabulary."""
    top = np.argsort(-row, kind="stable")[:TOP]
    return {
        "position": position,
        "top_ids": top.tolist(),
        "top": np.round(row[top], 5).tolist(),
        "every": np.round(row[::stride], 5).tolist(),
    }


def dump(golden: dict) -> bytes:
    """JSON with one prompt a line: small, and a change shows where it is."""
    head = {key: value for key, value in golden.items() if key != "prompts"}
    lines = ",\n".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in golden["prompts"])
    return (json.dumps(head, separators=(",", ":"))[:-1] + ',"prompts":[\n' + lines + "\n]}\n").encode()


def cross_check(args, texts: list[tuple[str, str, list[int]]]) -> None:
    """Compares tokenisations with llama.cpp's, another independent implementation."""
    from agreement import Llama

    llama = Llama(args.llama_lib, args.llama_python, args.model, vocab_only=True)
    for name, text, tokens in texts:
        theirs = llama.tokenize(text)
        if theirs != tokens:
            at = next((i for i, (a, b) in enumerate(zip(theirs, tokens)) if a != b), min(len(theirs), len(tokens)))
            sys.exit(f"{name}: llama.cpp tokenises differently from token {at}: {theirs[at:at+8]} / {tokens[at:at+8]}")
    print(f"{len(texts)} tokenisations equal llama.cpp's")


if __name__ == "__main__":
    sys.exit(main())
