#!/usr/bin/env python3
"""How evenly answers flow while a long prompt is read: 16 streams decode, then a prompt of 4,000 tokens arrives.

    streams    | token token token token ... | token   token   token   token ... | token token
               |<--- without: p50 --------->|<--- during: p99 ----------------->|
    prompt                                   ^ sent                             ^ its first token

The figure is p99 of the time between two tokens of a stream during the reading, over p50 without it; the goal is at most
2. The same is measured of llama-server in turns, for comparison. How long the prompt waited for its first token is the
price, and is shown as well.

    scripts/itl_bench.py                           3 rounds, some minutes
    scripts/itl_bench.py --quick --no-peer         1 round of neurond alone
    scripts/itl_bench.py --stretch 1.3             another engine.prefill_stretch

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

GOAL = 2.0
OWN_PROMPT = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=peer.MODEL)
    parser.add_argument("--neurond", type=Path, default=peer.ROOT / "target" / "release" / "neurond")
    parser.add_argument("--llama-server", type=Path, default=peer.PEER)
    parser.add_argument("--no-peer", action="store_true", help="neurond alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--before", type=float, default=4.0, help="seconds measured before the prompt arrives")
    parser.add_argument("--out", type=int, default=2000, help="tokens of a stream, more than are needed")
    parser.add_argument("--stretch", type=float, help="engine.prefill_stretch; left out: the default")
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
                figures = measure(side, args, number)
                found.setdefault(side.name, []).append(figures)
                peer.note(f"round {number + 1}  {side.name:12}  " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
    print(f"\n{time.strftime('%Y-%m-%d')}, {peer.cpu()}, {args.threads} threads, {args.model.name}: {args.streams} streams, "
          f"a prompt of {args.prompt} tokens\n")
    print("| figure | " + " | ".join(found) + " | goal |\n|---" * 1 + "|---" * (len(found) + 1) + "|")
    for key in next(iter(found.values()))[0]:
        cells = [f"{statistics.median(figures[key] for figures in rounds):.2f}" for rounds in found.values()]
        print(f"| {key} | " + " | ".join(cells) + f" | {'<= 2 (neurond)' if key == 'p99 during / p50 without' else ''} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    ratio = statistics.median(figures["p99 during / p50 without"] for figures in found["neurond"])
    return 0 if ratio <= GOAL else 1


class Neurond(peer.Neurond):
    def __init__(self, args, scratch: Path):
        super().__init__(args, scratch, args.streams)

    def command(self, streams: int) -> list:
        config = self.scratch / "neurond.toml"
        text = peer.CONFIG.format(
            port=self.port, model=self.args.model.resolve(), threads=self.args.threads, running=streams + 8, drafts=0,
            kv_bytes=(streams * (OWN_PROMPT + self.args.out) + self.args.prompt + 1024) * peer.KV_BYTES,
        )
        if self.args.stretch is not None:
            text = text.replace("[engine]\n", f"[engine]\nprefill_stretch = {self.args.stretch}\n")
        config.write_text(text)
        return [self.args.neurond, "serve", "--config", config]


class Llama(peer.Llama):
    def command(self, streams: int) -> list:
        # All slots have the same context, and one of them must hold the long prompt.
        one = max(self.args.prompt, OWN_PROMPT + self.args.out) + 256
        flags = ["-t", self.args.threads, "-tb", self.args.threads, "-np", streams + 1, "-c", (streams + 1) * one]
        return [self.args.llama_server, "-m", self.args.model, "--host", "127.0.0.1", "--port", self.port,
                *flags, "-cb", "--no-webui"]


def measure(side: peer.Server, args, number: int) -> dict:
    draw = random.Random(2000 + number)
    stop = threading.Event()
    tokens: list[list[float]] = [[] for _ in range(args.streams)]
    failures: list[str] = []
    with side.start(args.streams):
        peer.warm_up(side, random.Random(number))
        model = peer.model_of(side)

        def stream(of: int, prompt: list[int]) -> None:
            try:
                for now in events(side, model, prompt, args.out):
                    tokens[of].append(now)
                    if stop.is_set():
                        return
                if not stop.is_set():
                    failures.append(f"stream {of} ended before the prompt was read: give --out more than {args.out}")
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                failures.append(f"stream {of}: {error!r}")

        threads = [threading.Thread(target=stream, args=(of, peer.tokens(draw, OWN_PROMPT))) for of in range(args.streams)]
        for thread in threads:
            thread.start()
        while not failures and not all(len(times) > 8 for times in tokens):
            time.sleep(0.01)
        settled = time.perf_counter()
        time.sleep(args.before)
        sent = time.perf_counter()
        first = next(events(side, model, peer.tokens(draw, args.prompt), 1))
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise RuntimeError(f"{side.name}: {failures}")
    gaps = [(b, b - a) for times in tokens for a, b in zip(times, times[1:])]
    without = sorted(gap * 1000 for at, gap in gaps if settled < at <= sent)
    during = sorted(gap * 1000 for at, gap in gaps if sent < at <= first)
    p99 = during[int(0.99 * (len(during) - 1) + 0.5)]
    return {
        "p50 without, ms": statistics.median(without),
        "p99 without, ms": without[int(0.99 * (len(without) - 1) + 0.5)],
        "p50 during, ms": statistics.median(during),
        "p99 during, ms": p99,
        "p99 during / p50 without": p99 / statistics.median(without),
        "first token of the prompt, ms": (first - sent) * 1000,
    }


def events(side: peer.Server, model: str, prompt: list[int], count: int):
    """Streams one completion: the time of every token that shows. Closed by whoever stops reading."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{side.name} answered {response.status}: {response.read(500)!r}")
        for line in response:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                yield time.perf_counter()
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
