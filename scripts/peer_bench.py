#!/usr/bin/env python3
"""neurond and llama-server side by side: same model file, same cores, same client, alternating rounds.

    for each round:                                   the order of the two changes with every round
        start A, wait for ready ── one stream ── 4 ── 16 ... ── stop        start B ... stop

A host that is shared moves absolute figures by a lot from one minute to the next, so only ratios of figures taken one
after the other mean something; the table gives the median over rounds of both and of their ratio.

What is measured
- ready: from exec to the first 200 of the health endpoint, model loaded. resident: VmRSS then. peak: VmHWM at the end.
- prefill: one prompt of 512 random tokens, one token out, 512 / time. No prefix in common with any other prompt.
- decode: one stream, 128 tokens out after a 16-token prompt, rate between the first and the last token.
- served: closed loop, N streams, each a random 128-token prompt and 128 tokens out, end-of-text ignored: all tokens out /
  time; TTFT and inter-token latency as the client sees them, by `neurond bench`, the same client for both.

llama-server gets one slot a stream (-np N, context for N requests, continuous batching, flash attention and prompt cache
as it comes) and is started anew for each N; neurond runs from one configuration for all of them.

    scripts/peer_bench.py                          3 rounds, about 15 minutes
    scripts/peer_bench.py --quick                  1 round, 1/4/16 streams, about 2 minutes
    scripts/peer_bench.py --rounds 5 --streams 1,16,64 --json target/peer.json

Build first: `cargo build --release` and scripts/peer_llama.sh. Standard library only. Every process is ended by its id.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
from peers import Llama, Neurond, Server, completion, events, note, tokens

PROMPT, OUT = 128, 128
CONTEXT = PROMPT + OUT + 64  # tokens a stream: prompts are a little longer or shorter than asked for
LEVEL_LIMIT_S = 600


def main() -> int:
    parser = peers.parser(__doc__)
    peers.add_servers(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, fewer streams")
    parser.add_argument("--streams", default="1,4,16,32,64")
    parser.add_argument("--waves", type=int, default=2, help="requests of each stream")
    parser.add_argument("--drafts", type=int, default=0, help=peers.DRAFTS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    peers.begin(args)
    streams = [1, 4, 16] if args.quick else [int(n) for n in args.streams.split(",")]
    rounds = 1 if args.quick else args.rounds

    found: dict[str, list[dict]] = {"neurond": [], "llama-server": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            figures: dict[str, dict] = {name: {} for name in found}
            for n in streams:
                # KV for as many tokens as the peer gets at the most streams; everything else as it comes.
                most = max(streams)
                ours = Neurond(args, scratch, running=max(most, 16), kv_tokens=most * CONTEXT, draft_tokens=args.drafts)
                sides = [ours, Llama(args, scratch, slots=n, context=CONTEXT)]
                if number % 2:
                    sides.reverse()
                for side in sides:
                    try:
                        measure(side, n, number, args, figures[side.name])
                    except RuntimeError as error:  # one broken level must not cost the others
                        note(f"round {number + 1}/{rounds}  {side.name:12}  {n:2} streams  failed: {error}")
                        continue
                    speed = figures[side.name][f"served {n}"]
                    note(f"round {number + 1}/{rounds}  {side.name:12}  {n:2} streams  {speed:.0f} tok/s")
            for name, figure in figures.items():
                found[name].append(figure)
    print(f"\n{peers.heading(args)}, {rounds} rounds, median\n")
    print(table(found, streams))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(side: Server, n: int, number: int, args, figures: dict) -> None:
    """Starts a server, runs the closed loop at `n` streams (and the single-stream figures at the first), stops it."""
    with side:
        starts = figures.setdefault("starts", [])
        starts.append(side.ready_ms)
        figures["ready"] = statistics.median(starts)
        if n == 1 or "resident" not in figures:
            figures["resident"] = side.memory("VmRSS")
            draw = random.Random(number)
            model = peers.warm_up(side, draw)
            figures["prefill"] = statistics.median(prefill(side, model, draw) for _ in range(3))
            figures["decode"] = statistics.median(decode(side, model, draw) for _ in range(3))
        level = closed_loop(side, n, number, args)
        figures[f"served {n}"] = level["output_tokens_per_s"]
        for name, key in (("ttft", "ttft_ms"), ("itl", "inter_token_ms")):
            for quantile in ("p50", "p99"):
                figures[f"{name}_{quantile} {n}"] = level[key][quantile]
        figures["peak"] = max(figures.get("peak", 0), side.memory("VmHWM"))


# --------------------------------------------------------------------------------------------------- what is measured


def prefill(side: Server, model: str, draw: random.Random) -> float:
    count = 512
    begin = time.perf_counter()
    complete(side, model, tokens(draw, count), 1)
    return count / (time.perf_counter() - begin)


def decode(side: Server, model: str, draw: random.Random) -> float:
    times = complete(side, model, tokens(draw, 16), OUT)
    # Not counted by events: one may carry the bytes of two tokens, or none.
    return (OUT - 1) / (times[-1] - times[0])


def complete(side: Server, model: str, prompt: list[int], count: int) -> list[float]:
    """Streams a completion; the time of every event."""
    return [at for at, _ in events(side, "/v1/completions", completion(model, prompt, count))]


def closed_loop(side: Server, n: int, number: int, args) -> dict:
    command = [args.neurond, "bench", "--url", f"http://127.0.0.1:{side.port}/v1", "--endpoint", "completions"]
    command += ["--concurrency", n, "--requests", max(args.waves * n, 4), "--input-tokens", PROMPT, "--output-tokens", OUT]
    command += ["--seed", number, "--json", "-"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LEVEL_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"bench of {side.name} at {n}: {done.stderr}")
    (level,) = json.loads(done.stdout)["levels"]
    if level["failed"] or set(level["finish_reasons"]) != {"length"}:
        raise RuntimeError(f"{side.name} at {n}: {level['failures']}, answers ended by {level['finish_reasons']}")
    return level


# ------------------------------------------------------------------------------------------------------------- output


def table(found: dict[str, list[dict]], streams: list[int]) -> str:
    rows = [
        ("prefill 512, tok/s", "prefill", "{:.0f}"),
        ("decode, one stream, tok/s", "decode", "{:.0f}"),
        *[(f"served at {n}, tok/s", f"served {n}", "{:.0f}") for n in streams],
        *[(f"TTFT p50 at {n}, ms", f"ttft_p50 {n}", "{:.0f}") for n in streams],
        *[(f"TTFT p99 at {n}, ms", f"ttft_p99 {n}", "{:.0f}") for n in streams],
        *[(f"ITL p50 at {n}, ms", f"itl_p50 {n}", "{:.1f}") for n in streams],
        *[(f"ITL p99 at {n}, ms", f"itl_p99 {n}", "{:.1f}") for n in streams],
        ("exec to ready, ms", "ready", "{:.0f}"),
        ("resident when ready, MiB", "resident", "{:.0f}"),
        ("peak, MiB", "peak", "{:.0f}"),
    ]
    lines = ["| figure | neurond | llama-server | ratio |", "|---|---|---|---|"]
    for title, key, form in rows:
        ours = [figures.get(key, float("nan")) for figures in found["neurond"]]
        theirs = [figures.get(key, float("nan")) for figures in found["llama-server"]]
        ratio = statistics.median(a / b if b else float("nan") for a, b in zip(ours, theirs))
        both = [form.format(statistics.median(values)) for values in (ours, theirs)]
        lines.append(f"| {title} | {both[0]} | {both[1]} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
