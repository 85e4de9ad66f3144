#!/usr/bin/env python3
"""What the gateway costs: the same load on the same cores through neurond, nginx as a bare proxy, and other gateways.

    wrk --> neurond | nginx | a peer --> a static upstream        one side at a time, in rounds, the order reversed each round

For each side at 1, 16 and 128 connections: requests a second, latency p50 and p99 (and what is added to the upstream's own),
and CPU time of the side's processes a request. neurond is measured with key check, metering and its log record on, passing
through and answering from its cache. Medians over rounds; the goals are printed beside them.

Then streams: 200 at once, each of 60 chunks 50 ms apart: what is added to the first chunk, and how far gaps between chunks
are from the upstream's. And memory after the first and the last of many requests.

    scripts/gateway_bench.py                       3 rounds, some minutes
    scripts/gateway_bench.py --quick               1 round, no streams
    scripts/gateway_bench.py --peer "sglang=python -m sglang_router.launch_router --worker-urls http://127.0.0.1:{upstream} --port {port}"

Build first: `cargo build --release --bin neurond --example fake_upstream`. Needs wrk, and nginx to have a floor. A peer is a
name and a command with {upstream} and {port} in it, and is called at /v1/chat/completions. Every process is ended by its id.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = os.sysconf("SC_CLK_TCK")
TOKEN = "bench-token"
# Streams: all are open at once for a second, and none has to wait for the client to open the others.
CHUNKS, GAP_MS, START_S = 60, 50, 2.0
BODY = json.dumps({
    "model": "gpt-4o-mini",
    "temperature": 0.7,
    "messages": [{"role": "system", "content": "You are a helpful assistant. " * 8}, {"role": "user", "content": "Why is the sky blue? " * 20}],
})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target/release/neurond")
    parser.add_argument("--upstream", type=Path, default=ROOT / "target/release/examples/fake_upstream")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of one measurement")
    parser.add_argument("--connections", default="1,16,128")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests for the memory figure, such as 1000000")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = 1 if args.quick else args.rounds
    connections = [int(count) for count in args.connections.split(",")]
    found: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        lua = scratch / "post.lua"
        with Upstream(args, ["--static", "700", "--forget"]) as upstream:
            sides = [Direct(upstream), Neurond(args, scratch, upstream, ttl=None), Neurond(args, scratch, upstream, ttl=3600)]
            if shutil.which("nginx"):
                sides.insert(1, Nginx(scratch, upstream))
            for peer in args.peer:
                name, command = peer.split("=", 1)
                sides.append(Peer(name, command, upstream, scratch))
            for number in range(rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    with side:
                        for count in connections:
                            figures = load(side, lua, count, args.seconds)
                            found.setdefault(side.name, {}).setdefault(count, []).append(figures)
                            note(f"round {number + 1}  {side.name:16} {count:4}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            if args.soak:
                with Neurond(args, scratch, upstream, ttl=None) as side:
                    found["memory"] = soak(side, lua, args.soak)
        if not args.quick:
            with Upstream(args, ["--forget"]) as upstream:
                sides = [Direct(upstream), Neurond(args, scratch, upstream, ttl=None)]
                if shutil.which("nginx"):
                    sides.insert(1, Nginx(scratch, upstream))
                for side in sides:
                    with side:
                        found.setdefault("streams", {})[side.name] = asyncio.run(streams(side, args.streams))
    report(found, connections)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


# ------------------------------------------------------------------------------------------------------------ sides


class Side:
    name = "?"
    port = 0
    path = "/v1/chat/completions"
    headers: dict = {}
    process: subprocess.Popen | None = None

    def __enter__(self):
        self.port = free_port()
        self.start()
        wait_for(self)
        return self

    def __exit__(self, *_):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def start(self):
        raise NotImplementedError

    def pids(self) -> list[int]:
        """The process and all it has started."""
        if not self.process:
            return []
        found, more = [], [self.process.pid]
        while more:
            pid = more.pop()
            found.append(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    more += [int(child) for child in task.read_text().split()]
                except OSError:
                    pass
        return found

    def cpu(self) -> float:
        total = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total / TICK

    def memory(self) -> float:
        text = "".join(Path(f"/proc/{pid}/status").read_text() for pid in self.pids())
        return sum(int(kib) for kib in re.findall(r"VmRSS:\s+(\d+)", text)) / 1024


class Upstream:
    def __init__(self, args, flags: list):
        self.command = [str(args.upstream), *flags]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        address = json.loads(self.process.stdout.readline())["address"]
        self.port = int(address.rsplit(":", 1)[1])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Direct(Side):
    name = "upstream itself"

    def __init__(self, upstream):
        self.port_of = upstream
        self.path = "/openai/v1/chat/completions"

    def start(self):
        self.port = self.port_of.port


class Nginx(Side):
    name = "nginx"

    def __init__(self, scratch, upstream):
        self.scratch, self.upstream = scratch, upstream
        self.path = "/openai/v1/chat/completions"

    def start(self):
        config = self.scratch / "nginx.conf"
        config.write_text(f"""
daemon off; master_process on; worker_processes 2; pid {self.scratch}/nginx.pid; error_log {self.scratch}/nginx.err;
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; client_body_temp_path {self.scratch}; proxy_temp_path {self.scratch};
  fastcgi_temp_path {self.scratch}; uwsgi_temp_path {self.scratch}; scgi_temp_path {self.scratch};
  upstream up {{ server 127.0.0.1:{self.upstream.port}; keepalive 256; keepalive_requests 1000000; }}
  server {{ listen 127.0.0.1:{self.port}; keepalive_requests 1000000;
    location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}
""")
        self.process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(self.scratch)], stderr=subprocess.DEVNULL)


class Neurond(Side):
    def __init__(self, args, scratch, upstream, ttl: int | None):
        self.args, self.scratch, self.upstream = args, scratch, upstream
        self.name = "neurond, a hit" if ttl else "neurond"
        self.path = "/v1/acme/bench/openai/chat/completions"
        self.headers = {"cf-aig-authorization": f"Bearer {TOKEN}", "authorization": "Bearer sk-upstream"}
        self.ttl = ttl

    def start(self):
        config = self.scratch / f"neurond{self.ttl or ''}.toml"
        config.write_text(f"""
[server]
listen = "127.0.0.1:{self.port}"
workers = 2
[[auth.token]]
id = "bench"
account = "acme"
sha256 = "{hashlib.sha256(TOKEN.encode()).hexdigest()}"
[[gateway]]
id = "bench"
cache_ttl = {self.ttl or 0}
[[provider]]
slug = "openai"
base_url = "http://127.0.0.1:{self.upstream.port}/openai"
allow_private = true
[cache]
folder = "{self.scratch}/cache"
[registry]
folder = "{self.scratch}/registry"
[lora]
path = "{self.scratch}/lora"
""")
        log = open(self.scratch / "neurond.log", "wb")
        self.process = subprocess.Popen([str(self.args.neurond), "serve", "--config", str(config)], stdout=log, stderr=log,
                                        env={**os.environ, "XDG_STATE_HOME": str(self.scratch)})


class Peer(Side):
    def __init__(self, name, command, upstream, scratch):
        self.name, self.command, self.upstream, self.scratch = name, command, upstream, scratch

    def start(self):
        command = self.command.format(upstream=self.upstream.port, port=self.port)
        log = open(self.scratch / f"{self.name}.log", "wb")
        self.process = subprocess.Popen(shlex.split(command), stdout=log, stderr=log)


# ------------------------------------------------------------------------------------------------------ measurements


def load(side: Side, lua: Path, connections: int, seconds: float) -> dict:
    headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in side.headers.items())
    lua.write_text(f'wrk.method = "POST"\nwrk.body = [==[{BODY}]==]\nwrk.headers["content-type"] = "application/json"\n{headers}')
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(int(seconds), 1)}s", "--latency", "-s", str(lua), f"http://127.0.0.1:{side.port}{side.path}"]
    subprocess.run([*command[:3], "-d1s", *command[4:]], capture_output=True, check=True)
    before = side.cpu()
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = side.cpu() - before
    requests = int(re.search(r"(\d+) requests in", output).group(1))
    if bad := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        raise SystemExit(f"{side.name}: {bad.group(1)} of {requests} requests were refused")
    quantiles = dict(re.findall(r"^\s+(50|99)%\s+([\d.]+\w+)$", output, re.M))
    return {
        "requests/s": float(re.search(r"Requests/sec:\s+([\d.]+)", output).group(1)),
        "p50, us": microseconds(quantiles["50"]),
        "p99, us": microseconds(quantiles["99"]),
        "CPU a request, us": used * 1e6 / max(requests, 1),
    }


def soak(side: Side, lua: Path, total: int) -> dict:
    """Memory after a tenth of the requests, and after all."""
    done, memory = 0, []
    for share in (total // 10, total - total // 10):
        target = done + share
        while done < target:
            figures = load(side, lua, 64, 5)
            done += int(figures["requests/s"] * 6)
        memory.append(side.memory())
    return {"requests": done, "after a tenth, MiB": memory[0], "at the end, MiB": memory[1]}


async def streams(side: Side, count: int) -> dict:
    """Time to the first chunk, and gaps between chunks, of streams that all run at once."""
    body = json.dumps({"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "x"}]})
    headers = {"host": "bench", "content-type": "application/json", "content-length": str(len(body)), "x-fake": f"chunks={CHUNKS}; gap={GAP_MS}", **side.headers}
    head = f"POST {side.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"

    async def one(delay: float) -> tuple[float, list[float]]:
        await asyncio.sleep(delay)
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        began = time.perf_counter()
        writer.write((head + body).encode())
        times = []
        while True:
            chunk = await reader.read(65536)
            if not chunk:
                break
            if b"data:" in chunk:
                times.append(time.perf_counter())
            if b"[DONE]" in chunk:
                break
        writer.close()
        return times[0] - began, [b - a for a, b in zip(times, times[1:])]

    all_streams = await asyncio.gather(*(one(number * START_S / count) for number in range(count)))
    first = [first * 1000 for first, _ in all_streams]
    gaps = [gap * 1000 for _, gaps in all_streams for gap in gaps]
    at = lambda values, share: sorted(values)[int(share * (len(values) - 1))]
    return {"TTFT p50, ms": at(first, 0.5), "TTFT p99, ms": at(first, 0.99), "gap p50, ms": at(gaps, 0.5), "gap p99, ms": at(gaps, 0.99)}


# ------------------------------------------------------------------------------------------------------------- words


def report(found: dict, connections: list) -> None:
    sides = [name for name in found if name not in ("streams", "memory")]
    print(f"\n{time.strftime('%Y-%m-%d')}, {cpu()}, {os.cpu_count()} cores, load generator and upstream on the same\n")
    for count in connections:
        print(f"{count} connections:\n\n| figure | " + " | ".join(sides) + " |\n| --- |" + " --- |" * len(sides))
        for key in found[sides[0]][count][0]:
            cells = [statistics.median(figures[key] for figures in found[side][count]) for side in sides]
            print(f"| {key} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
        if "nginx" in sides:
            floor = statistics.median(figures["CPU a request, us"] for figures in found["nginx"][count])
            ratio = lambda side: statistics.median(figures["CPU a request, us"] for figures in found[side][count]) / floor
            print("| CPU, times nginx's | " + " | ".join("" if side == "upstream itself" else f"{ratio(side):.2f}" for side in sides) + " |")
        print()
    if "streams" in found:
        print("streams:\n\n| figure | " + " | ".join(found["streams"]) + " |\n| --- |" + " --- |" * len(found["streams"]))
        for key in next(iter(found["streams"].values())):
            print(f"| {key} | " + " | ".join(f"{figures[key]:.2f}" for figures in found["streams"].values()) + " |")
    if "memory" in found:
        print("\n" + ", ".join(f"{key}: {value:.1f}" for key, value in found["memory"].items()))


def microseconds(text: str) -> float:
    number, unit = re.match(r"([\d.]+)(\w+)", text).groups()
    return float(number) * {"us": 1, "ms": 1e3, "s": 1e6}[unit]


def wait_for(side: Side) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if side.process and side.process.poll() is not None:
            raise SystemExit(f"{side.name} ended with {side.process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", side.port)) == 0:
                time.sleep(0.5)
                return
        time.sleep(0.1)
    raise SystemExit(f"{side.name} does not listen")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else "unknown CPU"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
