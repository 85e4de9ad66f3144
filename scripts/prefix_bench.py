#!/usr/bin/env python3
"""A shared prefix beside llama-server: many clients whose prompts begin with the same long system prompt.

    client 1   [ system prompt, 1500 tokens ][ question, 32 ] -> 64 tokens
    client 2   [ the same                   ][ another one  ] -> 64 tokens      ... 16 at once

neurond computes the system prompt once: the first request computes it, the others that came with it wait for its blocks
and share them. llama-server keeps a prompt cache a slot, so each of its slots computes it once. Both start anew for every
round, so nothing is warm; `--waves 4` shows what happens when every client asks four questions in a row.

After the rounds the same questions are asked once more of a neurond without prefix cache: every answer must be the same
text, to the letter.

    scripts/prefix_bench.py                        3 rounds, a few minutes
    scripts/prefix_bench.py --quick                1 round

Build first: `cargo build --release` and scripts/peer_llama.sh. Standard library only. Every process is ended by its id.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import peers
from peers import Llama, Neurond, Server, completion, events, note, tokens

GOAL_THROUGHPUT, GOAL_TTFT = 5.0, 0.25


def main() -> int:
    parser = peers.parser(__doc__)
    peers.add_servers(parser)
    parser.add_argument("--no-peer", action="store_true", help="neurond alone: only its figures and the comparison of texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--waves", type=int, default=1, help="questions of each client, one after the other")
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--question", type=int, default=32)
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    peers.begin(args, not args.no_peer)

    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 if args.quick else args.rounds):
            sides = [neurond(args, scratch)]
            if not args.no_peer:
                sides.append(Llama(args, scratch, slots=args.clients, context=context(args)))
            if number % 2:
                sides.reverse()
            for side in sides:
                figures, _ = measure(side, args, number)
                found.setdefault(side.name, []).append(figures)
                note(f"round {number + 1}  {side.name:12}  " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
        _, cached = measure(neurond(args, scratch), args, 0)
        _, alone = measure(neurond(args, scratch, cache=False), args, 0)
    different = [at for at in cached if cached[at] != alone[at]]
    print(f"\n{peers.heading(args)}: {args.clients} clients, {args.prefix} + {args.question} tokens in, {args.out} out, "
          f"{args.waves} waves\n")
    print(table(found))
    print(f"\n{len(cached)} answers with prefix cache, {len(different)} of them another text without it")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if different else 0


def neurond(args, scratch, cache: bool = True) -> Server:
    running, kv_tokens = max(args.clients, 16), args.clients * context(args)
    # Nobody's answers are guessed: the figures are the prefix's alone.
    return Neurond(args, scratch, running=running, kv_tokens=kv_tokens, draft_tokens=0, prefix_cache=cache)


def context(args) -> int:
    return args.prefix + args.question + args.out + 64


def measure(side: Server, args, number: int) -> tuple[dict, dict[tuple, str]]:
    """All clients at once against a fresh server: figures, and the text of every answer."""
    draw = random.Random(1000 + number)
    prefix = tokens(draw, args.prefix)
    questions = {(client, wave): tokens(draw, args.question) for client in range(args.clients) for wave in range(args.waves)}
    answers: dict[tuple, dict] = {}
    failures: list[str] = []
    with side:
        model = peers.warm_up(side, random.Random(number))

        def client(of: int) -> None:
            try:
                for wave in range(args.waves):
                    answers[of, wave] = complete(side, model, prefix + questions[of, wave], args.out)
            except (OSError, RuntimeError, http.client.HTTPException, ValueError) as error:
                failures.append(f"client {of}: {error!r}")

        threads = [threading.Thread(target=client, args=(of,)) for of in range(args.clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - begin
    if failures:
        raise RuntimeError(f"{side.name}: {failures}")
    speed = args.clients * args.waves * args.out / took
    ttft = [answer["ttft"] * 1000 for answer in answers.values()]
    figures = {"tok/s": speed, "TTFT p50": statistics.median(ttft), "TTFT p99": peers.quantile(ttft, 0.99)}
    return figures, {at: answer["text"] for at, answer in answers.items()}


def complete(side: Server, model: str, prompt: list[int], count: int) -> dict:
    """Streams one completion: its text, and when its first token came."""
    text, first, begin = "", None, time.perf_counter()
    for at, event in events(side, "/v1/completions", completion(model, prompt, count)):
        first = first or at
        choices = json.loads(event).get("choices") or [{}]
        text += choices[0].get("text") or ""
    if first is None:
        raise RuntimeError(f"{side.name} sent no token")
    return {"text": text, "ttft": first - begin}


def table(found: dict[str, list[dict]]) -> str:
    lines = ["| figure | neurond | llama-server | ratio | goal |", "|---|---|---|---|---|"]
    goals = {"tok/s": f">= {GOAL_THROUGHPUT}", "TTFT p50": f"<= {GOAL_TTFT}", "TTFT p99": ""}
    for key, goal in goals.items():
        ours = [figures[key] for figures in found["neurond"]]
        theirs = [figures[key] for figures in found.get("llama-server", [])]
        ratio = f"{statistics.median(a / b for a, b in zip(ours, theirs)):.2f}" if theirs else ""
        both = [f"{statistics.median(values):.0f}" if values else "" for values in (ours, theirs)]
        lines.append(f"| {key}{'' if key == 'tok/s' else ', ms'} | {both[0]} | {both[1]} | {ratio} | {goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
