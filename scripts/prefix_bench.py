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

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import peer_bench as peer

GOAL_THROUGHPUT, GOAL_TTFT = 5.0, 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=peer.MODEL)
    parser.add_argument("--neurond", type=Path, default=peer.ROOT / "target" / "release" / "neurond")
    parser.add_argument("--llama-server", type=Path, default=peer.PEER)
    parser.add_argument("--no-peer", action="store_true", help="neurond alone: only its figures and the comparison of texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--waves", type=int, default=1, help="questions of each client, one after the other")
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--question", type=int, default=32)
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    wanted = {args.model: "scripts/quickstart.sh fetches it", args.neurond: "run cargo build --release"}
    if not args.no_peer:
        wanted[args.llama_server] = "scripts/peer_llama.sh builds it"
    for path, how in wanted.items():
        if not path.is_file():
            print(f"{path} is missing: {how}")
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        peer.note(f"warning: the load is {os.getloadavg()[0]:.1f} already; figures taken now mean nothing")

    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 if args.quick else args.rounds):
            sides = [Neurond(args, Path(scratch))] + ([] if args.no_peer else [Llama(args, Path(scratch))])
            if number % 2:
                sides.reverse()
            for side in sides:
                figures, _ = measure(side, args, number)
                found.setdefault(side.name, []).append(figures)
                peer.note(f"round {number + 1}  {side.name:12}  " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
        _, cached = measure(Neurond(args, Path(scratch)), args, 0)
        _, alone = measure(Neurond(args, Path(scratch), cache=False), args, 0)
    different = [at for at in cached if cached[at] != alone[at]]
    print(f"\n{time.strftime('%Y-%m-%d')}, {peer.cpu()}, {args.threads} threads, {args.model.name}: {args.clients} clients, "
          f"{args.prefix} + {args.question} tokens in, {args.out} out, {args.waves} waves\n")
    print(table(found))
    print(f"\n{len(cached)} answers with prefix cache, {len(different)} of them another text without it")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if different else 0


class Neurond(peer.Neurond):
    def __init__(self, args, scratch: Path, cache: bool = True):
        super().__init__(args, scratch, args.clients)
        self.cache = cache

    def command(self, streams: int) -> list:
        config = self.scratch / "neurond.toml"
        text = peer.CONFIG.format(
            port=self.port, model=self.args.model.resolve(), threads=self.args.threads, running=max(streams, 16),
            kv_bytes=context(self.args) * streams * peer.KV_BYTES,
        )
        config.write_text(text.replace("[engine]\n", f"[engine]\nprefix_cache = {str(self.cache).lower()}\n"))
        return [self.args.neurond, "serve", "--config", config]


class Llama(peer.Llama):
    def command(self, streams: int) -> list:
        flags = ["-t", self.args.threads, "-tb", self.args.threads, "-np", streams, "-c", streams * context(self.args)]
        return [self.args.llama_server, "-m", self.args.model, "--host", "127.0.0.1", "--port", self.port,
                *flags, "-cb", "--no-webui"]


def context(args) -> int:
    return args.prefix + args.question + args.out + 64


def measure(side: peer.Server, args, number: int) -> tuple[dict, dict[tuple, str]]:
    """All clients at once against a fresh server: figures, and the text of every answer."""
    draw = random.Random(1000 + number)
    prefix = peer.tokens(draw, args.prefix)
    questions = {(client, wave): peer.tokens(draw, args.question) for client in range(args.clients) for wave in range(args.waves)}
    answers: dict[tuple, dict] = {}
    failures: list[str] = []
    with side.start(args.clients):
        peer.warm_up(side, random.Random(number))
        model = peer.model_of(side)

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
    tokens = args.clients * args.waves * args.out
    ttft = sorted(answer["ttft"] * 1000 for answer in answers.values())
    figures = {"tok/s": tokens / took, "TTFT p50": statistics.median(ttft), "TTFT p99": ttft[int(0.99 * (len(ttft) - 1) + 0.5)]}
    return figures, {at: answer["text"] for at, answer in answers.items()}


def complete(side: peer.Server, model: str, prompt: list[int], count: int) -> dict:
    """Streams one completion: its text, and when its first token came."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=300)
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{side.name} answered {response.status}: {response.read(500)!r}")
    text, first = "", None
    for line in response:
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        first = first or time.perf_counter()
        choices = json.loads(line[5:]).get("choices") or [{}]
        text += choices[0].get("text") or ""
    connection.close()
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
