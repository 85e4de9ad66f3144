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

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PEER = ROOT / "target" / "peers" / "llama.cpp" / "build" / "bin" / "llama-server"
PROMPT, OUT = 128, 128
CONTEXT = PROMPT + OUT + 64  # tokens a stream: prompts are a little longer or shorter than asked for
KV_BYTES = 2 * 30 * 3 * 64 * 2  # of one token of the demo model: K and V, layers, KV heads, head size, f16
START_LIMIT_S = 60
LEVEL_LIMIT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target" / "release" / "neurond")
    parser.add_argument("--llama-server", type=Path, default=PEER)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, fewer streams")
    parser.add_argument("--streams", default="1,4,16,32,64")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--waves", type=int, default=2, help="requests of each stream")
    drafts = "tokens neurond guesses ahead; not by default, since greedy answers to random prompts repeat themselves"
    parser.add_argument("--drafts", type=int, default=0, help=drafts)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    wanted = {args.model: "scripts/quickstart.sh fetches it", args.neurond: "run cargo build --release"}
    for path, how in (wanted | {args.llama_server: "scripts/peer_llama.sh builds it"}).items():
        if not path.is_file():
            print(f"{path} is missing: {how}")
            return 2
    # So that a TERM, from `timeout` for one, runs the clean-up that an exception would.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    streams = [1, 4, 16] if args.quick else [int(n) for n in args.streams.split(",")]
    rounds = 1 if args.quick else args.rounds

    if os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        note(f"warning: the load is {os.getloadavg()[0]:.1f} already, and a busy machine hurts the two unequally: threads of")
        note("the peer spin while they wait for one that has lost its core. Figures taken now mean nothing.")

    found: dict[str, list[dict]] = {"neurond": [], "llama-server": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            sides = [Neurond(args, Path(scratch), max(streams)), Llama(args, Path(scratch))]
            if number % 2:
                sides.reverse()
            figures: dict[str, dict] = {side.name: {} for side in sides}
            for n in streams:
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
    print(f"\n{time.strftime('%Y-%m-%d')}, {cpu()}, {args.threads} threads, {args.model.name}, {rounds} rounds, median\n")
    print(table(found, streams))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(side: "Server", n: int, number: int, args, figures: dict) -> None:
    """Starts a server, runs the closed loop at `n` streams (and the single-stream figures at the first), stops it."""
    with side.start(n):
        if n == 1 or "ready" not in figures:
            figures["ready"], figures["resident"] = side.ready_ms, side.memory("VmRSS")
            draw = random.Random(number)
            warm_up(side, draw)
            figures["prefill"] = statistics.median(prefill(side, draw) for _ in range(3))
            figures["decode"] = statistics.median(decode(side, draw) for _ in range(3))
        level = closed_loop(side, n, number, args)
        figures[f"served {n}"] = level["output_tokens_per_s"]
        for name, key in (("ttft", "ttft_ms"), ("itl", "inter_token_ms")):
            for quantile in ("p50", "p99"):
                figures[f"{name}_{quantile} {n}"] = level[key][quantile]
        figures["peak"] = max(figures.get("peak", 0), side.memory("VmHWM"))


# ---------------------------------------------------------------------------------------------------------- servers


class Server:
    """A process that is ready when its health endpoint says so, and that is always ended."""

    name = health = ""

    def __init__(self, args, scratch: Path):
        self.args, self.scratch = args, scratch
        self.process: subprocess.Popen | None = None
        self.port = 0
        self.ready_ms = 0.0

    def command(self, streams: int) -> list:
        raise NotImplementedError

    def start(self, streams: int) -> "Server":
        self.port = free_port()
        command = [str(part) for part in self.command(streams)]
        with open(self.scratch / f"{self.name}.log", "ab") as log:
            begin = time.perf_counter()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        while not self.is_ready():
            if self.process.poll() is not None or time.perf_counter() - begin > START_LIMIT_S:
                self.stop()
                raise RuntimeError(f"{self.name} did not start:\n" + tail(self.scratch / f"{self.name}.log"))
            time.sleep(0.002)
        self.ready_ms = (time.perf_counter() - begin) * 1000
        return self

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def is_ready(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", self.health)
            status = connection.getresponse().status
            connection.close()
            return status == 200
        except OSError:
            return False

    def memory(self, field: str) -> float:
        """VmRSS or VmHWM in MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Neurond(Server):
    name, health = "neurond", "/health/ready"

    def __init__(self, args, scratch: Path, most: int):
        super().__init__(args, scratch)
        self.most = most

    def command(self, streams: int) -> list:
        config = self.scratch / "neurond.toml"
        kv_bytes = max(self.most * CONTEXT * KV_BYTES, 64 << 20)
        values = {"port": self.port, "model": self.args.model.resolve(), "threads": self.args.threads}
        values["drafts"] = self.args.drafts
        config.write_text(CONFIG.format(**values, running=max(self.most, 16), kv_bytes=kv_bytes))
        return [self.args.neurond, "serve", "--config", config]


class Llama(Server):
    name, health = "llama-server", "/health"

    def command(self, streams: int) -> list:
        context = max(streams * CONTEXT, 1024)
        flags = ["-t", self.args.threads, "-tb", self.args.threads, "-np", streams, "-c", context, "-cb", "--no-webui"]
        return [self.args.llama_server, "-m", self.args.model, "--host", "127.0.0.1", "--port", self.port, *flags]


# KV for as many tokens as the peer gets at the most streams; everything else as it comes.
CONFIG = """\
[server]
listen = "127.0.0.1:{port}"

[auth]
anonymous = "local"

[engine]
threads = {threads}
max_running = {running}
draft_tokens = {drafts}

[[model]]
id = "@cf/huggingfacetb/smollm2-135m-instruct"
path = "{model}"
kv_bytes = {kv_bytes}

[log]
filter = "warn"
"""


# --------------------------------------------------------------------------------------------------- what is measured


def warm_up(side: Server, draw: random.Random) -> None:
    complete(side, tokens(draw, 32), 4)


def prefill(side: Server, draw: random.Random) -> float:
    count = 512
    begin = time.perf_counter()
    complete(side, tokens(draw, count), 1)
    return count / (time.perf_counter() - begin)


def decode(side: Server, draw: random.Random) -> float:
    times = complete(side, tokens(draw, 16), OUT)
    # Not counted by events: one may carry the bytes of two tokens, or none.
    return (OUT - 1) / (times[-1] - times[0])


def tokens(draw: random.Random, count: int) -> list[int]:
    """Ordinary tokens at random: no two prompts share a beginning."""
    return [draw.randrange(1000, 40000) for _ in range(count)]


def complete(side: Server, prompt: list[int], count: int) -> list[float]:
    """Streams a completion; the time of every event."""
    body = {"model": model_of(side), "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{side.name} answered {response.status}: {response.read(500)!r}")
    times = []
    for line in response:
        if line.startswith(b"data:") and b"[DONE]" not in line:
            times.append(time.perf_counter())
    connection.close()
    return times


def model_of(side: Server) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=30)
    connection.request("GET", "/v1/models")
    name = json.loads(connection.getresponse().read())["data"][0]["id"]
    connection.close()
    return name


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


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
