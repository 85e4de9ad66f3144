#!/usr/bin/env python3
"""How evenly answers flow while a long prompt is read: 16 streams decode, then a prompt of 4,000 tokens arrives.

    with       | token token token ... | token   token   token   token ... | token token
    prompt                              ^ sent                             ^ its first token
               |<----- before -------->|<--- during: p99 ----------------->|
    without    | token token token ... | token token token token ...           the same streams again, nobody else
                                       |<--- the same tokens: p50 -->|

Answers slow down as they grow, whoever else is there, so tokens are compared with themselves: p99 of the time between two
tokens while the prompt is read, over p50 between the same tokens of the same streams where it never came. The goal is at
most 2. Tokens that fell into moments when the processor itself ran slow (throttled hosts do that to all threads at once;
peers.Clock watches) are left out on both sides; the figure with all of them, and their share, are shown beside. The same is
measured of llama-server in turns. How long the prompt waited for its first token is the price, and is
shown as well.

    scripts/itl_bench.py                           3 rounds, some minutes
    scripts/itl_bench.py --quick --no-peer         1 round of neurond alone
    scripts/itl_bench.py --stretch 1.3             another engine.prefill_stretch

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
from peers import Clock, Llama, Neurond, Server, completion, events, note, tokens

GOAL = 2.0
OWN_PROMPT = 64


def main() -> int:
    parser = peers.parser(__doc__)
    peers.add_servers(parser)
    parser.add_argument("--no-peer", action="store_true", help="neurond alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--before", type=float, default=4.0, help="seconds measured before the prompt arrives")
    parser.add_argument("--out", type=int, default=2000, help="tokens of a stream, more than are needed")
    parser.add_argument("--stretch", type=float, help="engine.prefill_stretch; left out: the default")
    parser.add_argument("--drafts", type=int, default=0, help=peers.DRAFTS + ", and guessed tokens leave in a burst")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    peers.begin(args, not args.no_peer)

    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 if args.quick else args.rounds):
            sides = [neurond(args, scratch)] + ([] if args.no_peer else [llama(args, scratch)])
            if number % 2:
                sides.reverse()
            for side in sides:
                figures = measure(side, args, number)
                found.setdefault(side.name, []).append(figures)
                note(f"round {number + 1}  {side.name:12}  " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
    print(f"\n{peers.heading(args)}: {args.streams} streams, a prompt of {args.prompt} tokens\n")
    print("| figure | " + " | ".join(found) + " | goal |\n|---" * 1 + "|---" * (len(found) + 1) + "|")
    for key in next(iter(found.values()))[0]:
        cells = [f"{statistics.median(figures[key] for figures in rounds):.2f}" for rounds in found.values()]
        print(f"| {key} | " + " | ".join(cells) + f" | {'<= 2 (neurond)' if key == 'p99 during / p50 without' else ''} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    ratio = statistics.median(figures["p99 during / p50 without"] for figures in found["neurond"])
    return 0 if ratio <= GOAL else 1


def neurond(args, scratch) -> Server:
    kv_tokens = args.streams * (OWN_PROMPT + args.out) + args.prompt + 1024
    engine = {"draft_tokens": args.drafts, "prefill_stretch": args.stretch}
    return Neurond(args, scratch, running=args.streams + 8, kv_tokens=kv_tokens, **engine)


def llama(args, scratch) -> Server:
    # All slots have the same context, and one of them must hold the long prompt.
    one = max(args.prompt, OWN_PROMPT + args.out) + 256
    return Llama(args, scratch, slots=args.streams + 1, context=one)


def measure(side: Server, args, number: int) -> dict:
    with side:
        model = peers.warm_up(side, random.Random(number))
        draw = random.Random(2000 + number)
        prompts = [tokens(draw, OWN_PROMPT) for _ in range(args.streams)]
        long = tokens(draw, args.prompt)
        with Clock() as clock:
            heard, sent, first = run(side, model, prompts, args, long)
        # Of each stream: which of its gaps fell into the reading.
        spans = [[at for at, now in enumerate(times) if at and sent < now <= first] for times in heard]
        most = max((span[-1] + 1 for span in spans if span), default=0)
        with Clock() as clock_alone:
            alone, *_ = run(side, model, prompts, args, None, most)
    before = [(b - a) * 1000 for times in heard for a, b in zip(times[8:], times[9:]) if b <= sent]
    during, during_all = gaps(heard, spans, clock)
    without, without_all = gaps(alone, spans, clock_alone)
    p99, p50 = peers.quantile(during, 0.99), statistics.median(without)
    return {
        "p50 before, ms": statistics.median(before),
        "p50 without, ms": p50,
        "p99 without, ms": peers.quantile(without, 0.99),
        "p50 during, ms": statistics.median(during),
        "p99 during, ms": p99,
        "p99 during / p50 without": p99 / p50,
        "the same, slow moments of the processor included": peers.quantile(during_all, 0.99) / statistics.median(without_all),
        "p99 without / p50 without, those included": peers.quantile(without_all, 0.99) / statistics.median(without_all),
        "tokens in slow moments, %": 100 * (1 - len(during) / len(during_all)),
        "first token of the prompt, ms": (first - sent) * 1000,
    }


def gaps(heard: list, spans: list, clock: Clock) -> tuple[list[float], list[float]]:
    """Milliseconds between tokens: those while the processor ran as fast as it does, and all."""
    pairs = [(times[at - 1], times[at]) for times, span in zip(heard, spans) for at in span if at < len(times)]
    every = [(b - a) * 1000 for a, b in pairs]
    return [gap for gap, (a, b) in zip(every, pairs) if not clock.slow_between(a, b)] or every, every


def run(side: Server, model: str, prompts: list, args, long: list | None, most: int = 0) -> tuple:
    """Streams answers to `prompts`, until `long` has its first token or all have `most`: when each token came, when `long`
    was sent, when its first token came."""
    stop = threading.Event()
    heard: list[list[float]] = [[] for _ in prompts]
    failures: list[str] = []

    def stream(of: int, prompt: list[int]) -> None:
        try:
            for now, _ in events(side, "/v1/completions", completion(model, prompt, most or args.out)):
                heard[of].append(now)
                if stop.is_set():
                    return
            if long and not stop.is_set():
                failures.append(f"stream {of} ended before the prompt was read: give --out more than {args.out}")
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            failures.append(f"stream {of}: {error!r}")

    threads = [threading.Thread(target=stream, args=(of, prompt)) for of, prompt in enumerate(prompts)]
    for thread in threads:
        thread.start()
    sent = first = 0.0
    if long:
        while not failures and not all(len(times) > 8 for times in heard):
            time.sleep(0.01)
        time.sleep(args.before)
        sent = time.perf_counter()
        first, _ = next(events(side, "/v1/completions", completion(model, long, 1)))
        stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{side.name}: {failures}")
    return heard, sent, first


if __name__ == "__main__":
    sys.exit(main())
