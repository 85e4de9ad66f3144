"""What the benches share: servers that are started, awaited and always ended, a client that reads streams, the usual
arguments, and words for tables. Standard library only.

    with Neurond(args, scratch, running=16, kv_tokens=8192) as side:      a process of our own on a free loopback port
        for at, event in events(side, "/v1/completions", body): ...       closed by whoever stops reading

Every process is ended by its id, also when a bench is ended by TERM or an exception.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NEUROND = ROOT / "target" / "release" / "neurond"
PEER = ROOT / "target" / "peers" / "llama.cpp" / "build" / "bin" / "llama-server"
KV_BYTES = 2 * 30 * 3 * 64 * 2  # of one token of the demo model: K and V, layers, KV heads, head size, f16
START_LIMIT_S = 60
# Greedy answers to random prompts repeat themselves, so guesses would come true more often than for anybody's question.
DRAFTS = "tokens neurond guesses ahead; not by default, since greedy answers to random prompts repeat themselves"


# -------------------------------------------------------------------------------------------------------- arguments


def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_servers(parser: argparse.ArgumentParser, peer: bool = True) -> None:
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--neurond", type=Path, default=NEUROND)
    if peer:
        parser.add_argument("--llama-server", type=Path, default=PEER)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))


def begin(args, peer: bool = True) -> None:
    """Ends the bench if something is missing; warns if others compute; lets a TERM run what an exception would."""
    wanted = {args.model: "scripts/quickstart.sh fetches it", args.neurond: "run cargo build --release"}
    if peer:
        wanted[args.llama_server] = "scripts/peer_llama.sh builds it"
    for path, how in wanted.items():
        if not path.is_file():
            print(f"{path} is missing: {how}")
            sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        note(f"warning: the load is {os.getloadavg()[0]:.1f} already, and a busy machine hurts the two unequally: threads of")
        note("the peer spin while they wait for one that has lost its core. Figures taken now mean nothing.")


# ---------------------------------------------------------------------------------------------------------- servers


class Server:
    """A process that is ready when its health endpoint says so, and that is ended with its `with` block."""

    name = health = ""

    def __init__(self, args, scratch: Path):
        self.args, self.scratch = args, Path(scratch)
        self.process: subprocess.Popen | None = None
        self.port = 0
        self.ready_ms = 0.0

    def command(self) -> list:
        raise NotImplementedError

    def __enter__(self) -> "Server":
        self.port = free_port()
        command = [str(part) for part in self.command()]
        with open(self.scratch / f"{self.name}.log", "ab") as log:
            begin = time.perf_counter()
            # What a daemon keeps goes with the measurement.
            env = {**os.environ, "XDG_STATE_HOME": str(self.scratch)}
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=env)
        try:
            while not self.is_ready():
                if self.process.poll() is not None or time.perf_counter() - begin > START_LIMIT_S:
                    raise RuntimeError(f"{self.name} did not start:\n" + tail(self.scratch / f"{self.name}.log"))
                time.sleep(0.002)
        except BaseException:
            self.stop()
            raise
        self.ready_ms = (time.perf_counter() - begin) * 1000
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self.health)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

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
    """The daemon with the demo model: `running` sequences, KV for `kv_tokens`, further keys of [engine] by name."""

    name, health = "neurond", "/health/ready"

    def __init__(self, args, scratch: Path, running: int, kv_tokens: int, **engine):
        super().__init__(args, scratch)
        self.kv_bytes = max(kv_tokens * KV_BYTES, 64 << 20)
        self.engine = {"threads": args.threads, "max_running": running, **engine}

    def command(self) -> list:
        config = self.scratch / "neurond.toml"
        engine = "\n".join(f"{key} = {json.dumps(value)}" for key, value in self.engine.items() if value is not None)
        model = self.args.model.resolve()
        config.write_text(CONFIG.format(port=self.port, engine=engine, model=model, kv_bytes=self.kv_bytes))
        return [self.args.neurond, "serve", "--config", config]


CONFIG = """\
[server]
listen = "127.0.0.1:{port}"

[auth]
anonymous = "local"

[engine]
{engine}

[[model]]
id = "@cf/huggingfacetb/smollm2-135m-instruct"
path = "{model}"
kv_bytes = {kv_bytes}

[log]
filter = "warn"
"""


class Llama(Server):
    """llama-server with `slots` slots of `context` tokens each, everything else as it comes."""

    name, health = "llama-server", "/health"

    def __init__(self, args, scratch: Path, slots: int, context: int):
        super().__init__(args, scratch)
        self.slots, self.context = slots, max(slots * context, 1024)

    def command(self) -> list:
        flags = ["-t", self.args.threads, "-tb", self.args.threads, "-np", self.slots, "-c", self.context, "-cb", "--no-webui"]
        return [self.args.llama_server, "-m", self.args.model, "--host", "127.0.0.1", "--port", self.port, *flags]


# ----------------------------------------------------------------------------------------------------------- client


def tokens(draw: random.Random, count: int) -> list[int]:
    """Ordinary tokens at random: no two prompts share a beginning."""
    return [draw.randrange(1000, 40000) for _ in range(count)]


def completion(model: str, prompt, count: int) -> dict:
    """Exactly `count` tokens, the likeliest each time."""
    return {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}


def events(side: Server, path: str, body: dict) -> Iterator[tuple[float, bytes]]:
    """Streams an answer: time and JSON of every event. Closed by whoever stops reading."""
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{side.name} answered {response.status}: {response.read(500)!r}")
        for line in response:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                yield time.perf_counter(), line[5:]
    finally:
        connection.close()


def model_of(side: Server) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=30)
    connection.request("GET", "/v1/models")
    name = json.loads(connection.getresponse().read())["data"][0]["id"]
    connection.close()
    return name


def warm_up(side: Server, draw: random.Random) -> str:
    """Computes something. Returns what the model is called."""
    model = model_of(side)
    for _ in events(side, "/v1/completions", completion(model, tokens(draw, 32), 4)):
        pass
    return model


# ------------------------------------------------------------------------------------------------------------ clock


class Clock:
    """When the processor ran slower than it does, whoever used it: hosts that throttle a whole socket stop all threads for
    tens of milliseconds, and no program can be blamed for those.

    A process of its own does the same sum every two milliseconds and takes the processor time it costs (waiting for a core
    does not count): some 2 % of a core. What took more than 1.3 times the median was slow, up to the sums before and after.

        with Clock() as clock: ...
        clock.slow_between(from, to)     in seconds of time.perf_counter(), after the block
    """

    SUM = """
import select, sys, time
done, modulus = [], (1 << 521) - 1
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.002)[0]:
    before, at = time.thread_time_ns(), time.perf_counter()
    pow(3, modulus - 2 >> 380, modulus)
    done.append((at, time.perf_counter(), time.thread_time_ns() - before))
for line in done: print(*line)
"""

    def __enter__(self) -> "Clock":
        command = [sys.executable, "-c", self.SUM]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()
        return self

    def __exit__(self, *_) -> None:
        output, _ = self.process.communicate("over")
        lines = [line.split() for line in output.splitlines()]
        sums = [(float(begin), float(end), int(took)) for begin, end, took in lines]
        usual = quantile([took for *_, took in sums], 0.5)
        self.slow: list[tuple[float, float]] = []
        for at, (_, _, took) in enumerate(sums):
            if took > 1.3 * usual:
                self.slow.append((sums[max(at - 1, 0)][1], sums[min(at + 1, len(sums) - 1)][0]))
        self.slow.sort()

    def slow_between(self, begin: float, end: float) -> bool:
        at = bisect.bisect_right(self.slow, (end, float("inf")))
        return at > 0 and self.slow[at - 1][1] > begin


# ------------------------------------------------------------------------------------------------------------ words


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1) + 0.5)]


def heading(args) -> str:
    return f"{time.strftime('%Y-%m-%d')}, {cpu()}, {args.threads} threads, {args.model.name}"


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
