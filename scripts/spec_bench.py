#!/usr/bin/env python3
"""What guessing ahead brings one stream, and what it costs where nothing can be guessed.

    for each text:    without guesses ── with ── without ── with ...    same server, same request but for speculative.n_max
                      rate of decode = (tokens - 1) / time from the first to the last       ratio = with / without

| text | what it is | goal |
| copy | a passage twice, then its beginning: the answer goes on with it | >= 1.5 |
| code | a function twice, then its beginning | >= 1.5 |
| foreseen | a chat answer that the caller sends along as `prediction` | |
| chat | an ordinary answer | |
| adversarial | random tokens whose triples come again and again with another token behind, answered at temperature 1 | >= 0.95 |

Both answers of a text must be equal to the letter, or the script fails.

    scripts/spec_bench.py                    5 rounds, some minutes

Build first: `cargo build --release`. Standard library only. Every process is ended by its id.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from typing import Callable, Iterator

import peers
from peers import Neurond, Server, events, tokens

PASSAGE = """The harbour was quiet when the first boats came back. Three of them carried herring, one carried nothing at all,
and the last, which had been out since Tuesday, carried a bell that nobody in the village had ever seen before. It was
green with age and heavier than it looked. Old Marta, who kept the keys of the church, said that it had been lost in the
great storm, when her grandmother was a girl, and that it should be hung again before the winter came. The council met
in the evening, argued for two hours about the price of rope, and agreed with her in the end.
"""
CODE = '''def merge(left, right, key=None):
    """Merges two sorted lists into one."""
    result = []
    i, j = 0, 0
    while i < len(left) and j < len(right):
        a = left[i] if key is None else key(left[i])
        b = right[j] if key is None else key(right[j])
        if a <= b:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    result.extend(left[i:])
    result.extend(right[j:])
    return result

'''


def main() -> int:
    parser = peers.parser(__doc__)
    peers.add_servers(parser, peer=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=int, default=128, help="tokens of an answer")
    args = parser.parse_args()
    peers.begin(args, peer=False)
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        with Neurond(args, scratch, running=8, kv_tokens=16384) as side:
            model = peers.warm_up(side, random.Random(0))
            print(f"\n{peers.heading(args)}, {args.rounds} rounds\n")
            print("| text | without, tok/s | with, tok/s | ratio (median of rounds) | drafted | accepted | goal |")
            print("|---|---|---|---|---|---|---|")
            for name, path, bodies, goal in texts(side, model, args):
                rates: list[tuple[float, float]] = []
                drafted = accepted = 0
                for number in range(args.rounds):
                    body = bodies(number)
                    pair = {}
                    order = (0, None) if number % 2 == 0 else (None, 0)
                    for most in order:
                        more = {} if most is None else {"speculative.n_max": 0}
                        pair[most] = ask(side, path, body | more)
                    if pair[0][0] != pair[None][0]:
                        raise SystemExit(f"{name}: the answers differ:\n{pair[0][0]!r}\n{pair[None][0]!r}")
                    rates.append((pair[0][1], pair[None][1]))
                    drafted, accepted = drafted + pair[None][2], accepted + pair[None][3]
                ratio = statistics.median(b / a for a, b in rates)
                off, on = (statistics.median(rate) for rate in zip(*rates))
                print(f"| {name} | {off:.0f} | {on:.0f} | {ratio:.2f} | {drafted} | {accepted} | {goal or ''} |", flush=True)
                if goal and ratio < goal:
                    missed.append(name)
    print(f"\nmissed: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


def texts(side: Server, model: str, args) -> Iterator[tuple[str, str, Callable[[int], dict], float | None]]:
    greedy = {"model": model, "max_tokens": args.out, "temperature": 0, "ignore_eos": True}

    def again(text: str):
        # Another beginning each time, so that no prompt is found in the prefix cache whole.
        return lambda number: greedy | {"prompt": f"{number}.\n{text}\n{text}\n" + text[: 40 + number]}

    def adversarial(number: int) -> dict:
        draw = random.Random(number)
        triples = [tokens(draw, 3) for _ in range(40)]
        prompt = [token for _ in range(6) for triple in draw.sample(triples, 40) for token in [*triple, *tokens(draw, 1)]]
        return {"model": model, "max_tokens": args.out, "temperature": 1, "seed": number, "ignore_eos": True, "prompt": prompt}

    def chat(number: int) -> dict:
        question = f"Write a short story about the number {number + 3}."
        return greedy | {"messages": [{"role": "user", "content": question}]}

    def foreseen(number: int) -> dict:
        answer = ask(side, "/v1/chat/completions", chat(number) | {"speculative.n_max": 0})[0]
        return chat(number) | {"prediction": {"type": "content", "content": answer}}

    yield "copy", "/v1/completions", again(PASSAGE), 1.5
    yield "code", "/v1/completions", again(CODE), 1.5
    yield "foreseen", "/v1/chat/completions", foreseen, None
    yield "chat", "/v1/chat/completions", chat, None
    yield "adversarial", "/v1/completions", adversarial, 0.95


def ask(side: Server, path: str, body: dict) -> tuple[str, float, int, int]:
    """Text, tokens a second, drafts verified, drafts that came true."""
    text, first, last, usage = "", None, None, {}
    for at, event in events(side, path, body | {"stream_options": {"include_usage": True}}):
        event = json.loads(event)
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if piece:
                first, last = first or at, at
                text += piece
    details = usage.get("completion_tokens_details") or {}
    accepted = details.get("accepted_prediction_tokens", 0)
    drafted = accepted + details.get("rejected_prediction_tokens", 0)
    return text, (usage["completion_tokens"] - 1) / max(last - first, 1e-9), drafted, accepted


if __name__ == "__main__":
    sys.exit(main())
