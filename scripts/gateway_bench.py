#!/usr/bin/env python3
"""What the gateway costs: the same load on the same cores through neurond, nginx as a bare proxy, and other gateways.

    wrk --> neurond | nginx | a peer --> a static upstream        one side at a time, in rounds, the order reversed each round

For each side at 1, 16 and 128 connections: requests a second, latency p50 and p99, and CPU time of all the side's processes a
request. neurond is measured with key check, a limit on requests by address, metering and its log record on, passing through and
answering from its cache.
Medians over rounds; beside them neurond's figures as multiples of nginx's and of the best peer's.

Then streams: 200 at once, each of 60 chunks 50 ms apart. A chunk says when the upstream sent it and the kernel says when it
arrived, so what is measured is how long a chunk was on its way, however late the upstream and this script are. And memory over
the second and the last tenth of many requests.

    scripts/gateway_bench.py                              3 rounds, some minutes
    scripts/gateway_bench.py --quick                      1 round, no streams
    scripts/gateway_bench.py --peers-dir DIR              with sglang-router, ferrogw, LiteLLM and Portkey, as far as they are in DIR
    scripts/gateway_bench.py --only nginx,neurond         these sides, by parts of their names
    scripts/gateway_bench.py --peer "mine=my-gateway --upstream http://127.0.0.1:{upstream} --port {port}"

Build first: `cargo build --release --bin neurond --example fake_upstream`. Needs wrk, and nginx to have a floor;
`scripts/gateway_peers.sh` installs the peers. A side that does not pass on what the upstream says is left out, with a word. A peer of
your own is a name and a command with {upstream} and {port} in it, and is called at /v1/chat/completions. Every side is a session of
its own: its processes are counted together, and ended by their ids.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import hashlib
import heapq
import http.client
import itertools
import json
import multiprocessing
import os
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = os.sysconf("SC_CLK_TCK")
TOKEN = "bench-token"
KEY = "sk-upstream"
MODEL = "gpt-4o-mini"
# One that is looked at for each call and never reached.
LIMIT = '[[limit]]\nname = "address"\nby = ["ip"]\nrequests = 100_000_000\nwindow_s = 60\n'
# Streams: all are open at once for a second, and none has to wait for the client to open the others. A 200th part of the time that they are
# opened in is no part of the gap: they would all speak at the same five moments, and a new one would wait for forty others.
CHUNKS, GAP_MS, START_S = 60, 50, 2.1
STAMP = re.compile(rb'"content": ?"(\d{19})"')
SO_TIMESTAMPNS = 35
# Of the table, and the figures in them.
ROWS = {"requests/s": ["requests/s"], "latency p50 / p99, us": ["p50, us", "p99, us"], "CPU a request, us": ["CPU a request, us"]}
BODY = json.dumps({
    "model": MODEL,
    "temperature": 0.7,
    "messages": [{"role": "system", "content": "You are a helpful assistant. " * 8}, {"role": "user", "content": "Why is the sky blue? " * 20}],
})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target/release/neurond")
    parser.add_argument("--upstream", type=Path, default=ROOT / "target/release/examples/fake_upstream")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--peers-dir", action="append", default=[], type=Path, metavar="DIR", help="that gateway_peers.sh filled; repeatable")
    parser.add_argument("--only", default="", help="comma-separated parts of names of sides")
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
    found: dict = {"sides": {}, "streams": {}}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        with canned(args, scratch) as upstream:
            def loads(side: Side) -> None:
                # Of a side that fails on the way nothing is kept.
                for count, figures in [(count, load(side, scratch, count, args.seconds)) for count in connections]:
                    keep(found["sides"], side.name, count, figures)

            turns(sides(args, scratch, upstream), rounds, loads)
            if args.soak:
                with Neurond(args, scratch, upstream) as side:
                    found["memory"] = soak(side, scratch, args.soak)
        if not args.quick:
            with Stamped() as upstream:
                quick = [side for side in sides(args, scratch, upstream) if side.streams]
                turns(quick, rounds, lambda side: keep(found["streams"], side.name, args.streams, streams(side, args.streams)))
    report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def sides(args, scratch, upstream) -> list:
    """All that can be measured here."""
    found = [Direct(upstream)]
    if shutil.which("nginx"):
        found.append(Nginx(scratch, upstream))
    found += [Neurond(args, scratch, upstream, ttl, more=LIMIT) for ttl in (None, 3600)]
    for kind in (SglangRouter, Ferrogw, LiteLlm, Portkey) if args.peers_dir else ():
        places = [place for folder in args.peers_dir for place in (folder / kind.file, *folder.glob(f"*/{kind.file}")) if place.exists()]
        if places:
            found.append(kind(places[0].absolute(), scratch, upstream))
        else:
            note_once(f"{kind.name} is left out: it is not installed")
    found += [Peer(*peer.split("=", 1), scratch, upstream) for peer in args.peer]
    wanted = [part for part in args.only.split(",") if part]
    return [side for side in found if not wanted or any(part in side.name for part in wanted)]


def turns(sides: list, rounds: int, measure) -> None:
    """Measures each side once a round. A peer that does not work is left out from then on."""
    broken = set()
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            if side.name in broken:
                continue
            with side:
                try:
                    hear(side)
                    measure(side)
                except (Broken, OSError, subprocess.CalledProcessError) as why:
                    if not isinstance(side, Peer):
                        raise SystemExit(f"{side.name}: {why}") from why
                    broken.add(side.name)
                    note(f"{side.name} is left out: {why}")


def keep(found: dict, name: str, count: int, figures: dict) -> None:
    found.setdefault(name, {}).setdefault(count, []).append(figures)
    note(f"{name:16} {count:4}  " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


# ------------------------------------------------------------------------------------------------------------ sides


class Broken(Exception):
    """It does not do what it is there for."""


class Side:
    name = "?"
    port = 0
    path = "/v1/chat/completions"
    headers: dict = {}
    # Quick enough for hundreds of streams.
    streams = True
    process: subprocess.Popen | None = None

    def __enter__(self):
        self.port = free_port()
        self.start()
        return self

    def start(self):
        raise NotImplementedError

    def run(self, command: list, **variables) -> None:
        environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables}
        with open(self.scratch / "side.log", "wb") as log:
            output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, **output, env=environment, cwd=self.scratch, start_new_session=True)

    def __exit__(self, *_):
        if not self.process:
            return
        # Not waited for before all are gone, so that its id stays its own.
        self.process.terminate()
        deadline = time.monotonic() + 10
        while self.family() and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid, _ in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def family(self) -> list[tuple[int, list[str]]]:
        """The process and all it has started, each with what `/proc` says of it."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat") if self.process else ():
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append((int(stat.parent.name), fields))
        return found

    def cpu(self) -> float:
        """Seconds, with those of children that have ended."""
        return sum(int(field) for _, fields in self.family() for field in fields[11:15]) / TICK

    def settle(self) -> None:
        """Until it does nothing any more: it has started, and what the last load left behind is done."""
        deadline, before = time.monotonic() + 30, -1.0
        while time.monotonic() < deadline and (now := self.cpu()) - before > 0.02:
            before = now
            time.sleep(0.3 if self.process else 0)

    def memory(self) -> float:
        text = "".join(Path(f"/proc/{pid}/status").read_text() for pid, _ in self.family())
        return sum(int(kib) for kib in re.findall(r"VmRSS:\s+(\d+)", text)) / 1024


class Direct(Side):
    name = "upstream itself"

    def __init__(self, upstream):
        self.upstream = upstream

    def start(self):
        self.port = self.upstream.port


class Nginx(Side):
    name = "nginx"

    def __init__(self, scratch, upstream):
        self.scratch, self.upstream = scratch, upstream

    def start(self):
        upstream = f"upstream up {{ server 127.0.0.1:{self.upstream.port}; keepalive 256; keepalive_requests 1000000; }}"
        location = 'proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;'
        self.run(nginx(self.scratch / "nginx.conf", self.port, 2, location, upstream))


class Neurond(Side):
    path = "/v1/acme/bench/openai/chat/completions"
    headers = {"cf-aig-authorization": f"Bearer {TOKEN}", "authorization": f"Bearer {KEY}"}

    def __init__(self, args, scratch, upstream, ttl: int | None = None, gateway: str = "", more: str = ""):
        """`gateway` is more of its gateway's settings, `more` of the file's sections."""
        self.args, self.scratch, self.upstream, self.ttl = args, scratch, upstream, ttl
        self.name = "neurond, a hit" if ttl else "neurond"
        self.streams = not ttl
        self.gateway, self.more = gateway, more

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
{self.gateway}
[[provider]]
slug = "openai"
base_url = "http://127.0.0.1:{self.upstream.port}/v1"
allow_private = true
[cache]
folder = "{self.scratch}/cache"
[registry]
folder = "{self.scratch}/registry"
[lora]
path = "{self.scratch}/lora"
{self.more}
""")
        self.run([str(self.args.neurond.absolute()), "serve", "--config", str(config)], XDG_STATE_HOME=str(self.scratch))


class Peer(Side):
    """Another gateway. Its file is looked for in the folders of `--peers-dir` and one below."""

    file = ""

    def __init__(self, name, command, scratch, upstream):
        self.name, self.command, self.scratch, self.upstream = name, command, scratch, upstream

    def start(self):
        self.run(shlex.split(self.command.format(upstream=self.upstream.port, port=self.port)))


class Installed(Peer):
    headers = {"authorization": f"Bearer {KEY}"}

    def __init__(self, place, scratch, upstream):
        self.place, self.scratch, self.upstream = str(place), scratch, upstream

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.upstream.port}/v1"


class SglangRouter(Installed):
    """Routes, and checks no keys. The cheapest policy will do for one upstream, which knows nothing of health checks."""

    name, file = "sglang-router", "bin/sglang-router"

    def start(self):
        self.run([self.place, "launch", "--worker-urls", self.base.removesuffix("/v1"), "--policy", "round_robin",
                  "--disable-health-check", "--log-level", "error", "--host", "127.0.0.1", "--port", str(self.port),
                  "--prometheus-port", str(free_port())], TOKIO_WORKER_THREADS="2")


class Ferrogw(Installed):
    """Without its limit of requests a second, and without the catalogue that it would fetch."""

    name, file = "ferrogw", "bin/ferrogw"
    headers = {"authorization": f"Bearer fgw_{TOKEN}"}

    def start(self):
        config = self.scratch / "ferrogw.yaml"
        config.write_text("strategy: {mode: single}\ntargets: [{virtual_key: openai}]\n")
        self.run([self.place, "serve"], GATEWAY_CONFIG=str(config), GATEWAY_ENV="production", PORT=str(self.port),
                 MASTER_KEY=f"fgw_{TOKEN}", OPENAI_API_KEY=KEY, OPENAI_BASE_URL=self.base, LOG_LEVEL="error",
                 RATE_LIMIT_RPS="0", FERRO_MODEL_CATALOG_TIMEOUT="0", GOMAXPROCS="2")


class LiteLlm(Installed):
    """Two workers under gunicorn, as its documentation has it for more than one; 200 streams are more than they can do here."""

    name, file = "LiteLLM", "bin/litellm"
    headers = {"authorization": f"Bearer sk-{TOKEN}"}
    streams = False

    def start(self):
        config = self.scratch / "litellm.yaml"
        config.write_text(f"""
model_list: [{{model_name: {MODEL}, litellm_params: {{model: openai/{MODEL}, api_base: "{self.base}", api_key: {KEY}}}}}]
litellm_settings: {{set_verbose: false, json_logs: true, request_timeout: 600}}
general_settings: {{master_key: sk-{TOKEN}, disable_error_logs: true}}
""")
        self.run([self.place, "--config", str(config), "--host", "127.0.0.1", "--port", str(self.port), "--run_gunicorn", "--num_workers", "2"],
                 LITELLM_MODE="PRODUCTION", LITELLM_LOG="ERROR", LITELLM_DISABLE_ACCESS_LOG_PATHS=self.path, LITELLM_LOCAL_MODEL_COST_MAP="True")


class Portkey(Installed):
    """One process; it is told by headers where to go. Streams of OpenAI's make it fail on its own headers with today's packages."""

    name, file = "Portkey", "node_modules/@portkey-ai/gateway/build/start-server.js"
    streams = False

    def start(self):
        self.headers = {"authorization": f"Bearer {KEY}", "x-portkey-provider": "openai", "x-portkey-custom-host": self.base}
        self.run(["node", self.place, f"--port={self.port}", "--headless"], NODE_ENV="production")


# -------------------------------------------------------------------------------------------------------- upstreams


@contextmanager
def canned(args, scratch: Path):
    """An upstream with one answer to everything: a chat completion, as gateways look into it."""
    with Upstream(args) as upstream:
        if said(upstream.port, Direct.path, {}) is not None:
            yield upstream
            return
    note("the fake upstream's static answer is no chat completion: nginx answers instead")
    with Canned(scratch) as upstream:
        yield upstream


class Upstream:
    def __init__(self, args):
        self.command = [str(args.upstream), "--static", "700", "--forget"]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        address = json.loads(self.process.stdout.readline())["address"]
        self.port = int(address.rsplit(":", 1)[1])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Canned(Side):
    def __init__(self, scratch):
        self.scratch = scratch

    def start(self):
        message = {"role": "assistant", "content": "x" * 420}
        usage = {"prompt_tokens": 170, "completion_tokens": 105, "total_tokens": 275}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL, "usage": usage,
                  "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        self.run(nginx(self.scratch / "canned.conf", self.port, 1, f"default_type application/json; return 200 '{json.dumps(answer)}';"))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                said(self.port, self.path, {})
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"nginx does not listen: {last_words(self)}")


class Stamped:
    """An upstream of streams whose chunks say when they were sent, in a process of its own."""

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = listener.getsockname()[1]
        self.process = multiprocessing.get_context("fork").Process(target=serve_stamped, args=(listener,), daemon=True)
        self.process.start()
        listener.close()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def serve_stamped(listener: socket.socket) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    poll, calls, due, order = select.epoll(), {}, [], itertools.count()
    poll.register(listener, select.EPOLLIN)
    while True:
        for fd, _ in poll.poll(max(due[0][0] - time.monotonic(), 0) if due else None):
            if fd == listener.fileno():
                peer = listener.accept()[0]
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                calls[peer.fileno()] = [peer, b""]
                poll.register(peer, select.EPOLLIN)
                continue
            call = calls[fd]
            try:
                piece = call[0].recv(65536)
            except ConnectionError:
                piece = b""
            call[1] += piece
            if not piece:
                calls.pop(fd)[0].close()
            elif whole(call[1]):
                asked, call[1] = call[1], b""
                if re.search(rb'"stream": ?true', asked):
                    send(call[0], b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
                    heapq.heappush(due, (time.monotonic(), next(order), call[0], CHUNKS))
                else:
                    answer = completion("chat.completion", "message", {"role": "assistant", "content": "Hello."}, "stop")
                    send(call[0], b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))
        while due and due[0][0] <= time.monotonic():
            at, _, peer, left = heapq.heappop(due)
            if left:
                stamped = {"role": "assistant", "content": str(time.time_ns())}
                send(peer, event(completion("chat.completion.chunk", "delta", stamped, None)))
                heapq.heappush(due, (at + GAP_MS / 1000, next(order), peer, left - 1))
            else:
                last = completion("chat.completion.chunk", "delta", {}, "stop")
                send(peer, event(last) + event(b"[DONE]") + b"0\r\n\r\n")


def whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
        return len(body) >= int(length.group(1))
    return bool(end) and (b"chunked" not in head.lower() or body.endswith(b"0\r\n\r\n"))


def completion(kind: str, part: str, words: dict, finish: str | None) -> bytes:
    choice = {"index": 0, part: words, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "object": kind, "created": 1, "model": MODEL, "choices": [choice]}).encode()


def event(data: bytes) -> bytes:
    data = b"data: %s\n\n" % data
    return b"%x\r\n%s\r\n" % (len(data), data)


def send(peer: socket.socket, data: bytes) -> None:
    # Whoever has hung up is told nothing more.
    with suppress(OSError):
        peer.sendall(data)


# ------------------------------------------------------------------------------------------------------ measurements


def hear(side: Side) -> None:
    """Waits until it passes on what the upstream says, and until it is at rest."""
    wanted = said(side.upstream.port, Direct.path, {})
    deadline, why = time.monotonic() + 90, "it does not listen"
    while time.monotonic() < deadline:
        if side.process and os.waitid(os.P_PID, side.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise Broken(f"it has ended\n{last_words(side)}")
        try:
            heard = said(side.port, side.path, side.headers)
            if heard is not None and heard == wanted:
                return side.settle()
            why = "its answer is not the upstream's"
        except OSError as error:
            why = f"it does not answer: {error}"
        time.sleep(0.2)
    raise Broken(f"{why}\n{last_words(side)}")


def said(port: int, path: str, headers: dict) -> str | None:
    """The words of a chat completion, asked for as in the load."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", path, BODY, {"content-type": "application/json", **headers})
        return json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def last_words(side: Side) -> str:
    return "\n".join((side.scratch / "side.log").read_text(errors="replace").splitlines()[-8:]) if side.process else ""


def load(side: Side, scratch: Path, connections: int, seconds: int) -> dict:
    lua = scratch / "post.lua"
    headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in side.headers.items())
    lua.write_text(f'wrk.method = "POST"\nwrk.body = [==[{BODY}]==]\nwrk.headers["content-type"] = "application/json"\n{headers}')
    url = f"http://127.0.0.1:{side.port}{side.path}"
    command = ["wrk", "-t1", f"-c{connections}", "--timeout", "30s", "--latency", "-s", str(lua), url]
    requests_in = lambda output: int(re.search(r"(\d+) requests in", output).group(1))
    rate = requests_in(subprocess.run([*command, "-d1s"], capture_output=True, text=True, check=True).stdout)
    # Some need longer for a few requests on each connection.
    seconds = min(max(seconds, 5 * connections // max(rate, 1), 1), 30)
    side.settle()
    before = side.cpu()
    output = subprocess.run([*command, f"-d{seconds}s"], capture_output=True, text=True, check=True).stdout
    side.settle()
    used, requests = side.cpu() - before, requests_in(output)
    if bad := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        raise Broken(f"{bad.group(1)} of {requests} requests were refused")
    quantiles = dict(re.findall(r"^\s+(50|99)%\s+([\d.]+\w+)\s*$", output, re.M))
    if len(quantiles) < 2:
        raise Broken(f"the load says: {output}")
    return {
        "requests/s": float(re.search(r"Requests/sec:\s+([\d.]+)", output).group(1)),
        "p50, us": microseconds(quantiles["50"]),
        "p99, us": microseconds(quantiles["99"]),
        # wrk goes with a request under way on each connection, and the side does its work on them.
        "CPU a request, us": used * 1e6 / (requests + connections),
    }


def soak(side: Side, scratch: Path, total: int) -> dict:
    """Memory over the second tenth of the requests and over the last. It goes up and down with each segment of records, so that a
    moment says little: samples all along, and their mean."""
    hear(side)
    tenth, done, found = total // 10, 0, {}
    for until, name in ((tenth, ""), (2 * tenth, "second tenth"), (total - tenth, ""), (total, "last tenth")):
        samples, is_over = [], threading.Event()

        def sample() -> None:
            while not is_over.wait(0.1):
                samples.append(side.memory())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            # Once at least, so that there are samples.
            while done < until or not samples:
                figures = load(side, scratch, 64, 1)
                done += int(figures["requests/s"] * 2)
        finally:
            is_over.set()
            sampler.join()
        if name:
            found |= {f"{name}, MiB": statistics.fmean(samples), f"{name}, least": min(samples), f"{name}, most": max(samples)}
    return {**found, "requests": done}


def streams(side: Side, count: int) -> dict:
    """What streams that all run at once wait for: one thread that reads what is there, and looks at it when all is over."""
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "x"}]})
    headers = {"host": "bench", "content-type": "application/json", "content-length": str(len(body)), **side.headers}
    request = (f"POST {side.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + f"\r\n{body}").encode()
    poll, reading, done = select.epoll(), {}, []
    before, began = side.cpu(), time.monotonic()
    while len(done) < count or reading:
        now, due = time.monotonic(), began + len(done) * START_S / count
        if len(done) < count and now >= due:
            peer = socket.create_connection(("127.0.0.1", side.port))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            reading[peer.fileno()] = (peer, pieces := [])
            done.append((time.time_ns(), pieces))
            peer.sendall(request)
            poll.register(peer, select.EPOLLIN)
            continue
        ready = poll.poll(max(due - now, 0) if len(done) < count else 30)
        if not ready and len(done) == count:
            raise Broken(f"{len(reading)} of {count} streams do not end")
        for fd, _ in ready:
            peer, pieces = reading[fd]
            piece, told, _, _ = peer.recvmsg(65536, 64)
            pieces.append((arrival(told), piece))
            if not piece or b"[DONE]" in piece:
                del reading[fd]
                peer.close()
    side.settle()
    used = side.cpu() - before
    first, gaps, late = [], [], []
    for sent, pieces in done:
        times = chunks(pieces)
        if len(times) != CHUNKS:
            raise Broken(f"{len(times)} of {CHUNKS} chunks came: {pieces[0][1][:300]}")
        first.append((times[0][1] - sent) / 1e6)
        gaps += [(b - a) / 1e6 for (_, a), (_, b) in zip(times, times[1:])]
        late += [(came - went) / 1e6 for went, came in times]
    at = lambda values, share: sorted(values)[int(share * (len(values) - 1))]
    return {
        "first chunk p50, ms": at(first, 0.5),
        "first chunk p99, ms": at(first, 0.99),
        "chunk on its way p50, ms": at(late, 0.5),
        "chunk on its way p99, ms": at(late, 0.99),
        "longest, ms": max(late),
        "gap p50, ms": at(gaps, 0.5),
        "gap p99, ms": at(gaps, 0.99),
        "CPU a chunk, us": used * 1e6 / (count * CHUNKS),
    }


def arrival(told: list) -> int:
    """When the kernel had it, which is earlier than when this thread has."""
    for level, kind, data in told:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, rest = struct.unpack("qq", data)
            return seconds * 10**9 + rest
    return time.time_ns()


def chunks(pieces: list) -> list[tuple[int, int]]:
    """When each chunk was sent, and when its last byte was here."""
    ends = list(itertools.accumulate(len(piece) for _, piece in pieces))
    text = b"".join(piece for _, piece in pieces)
    return [(int(stamp.group(1)), pieces[bisect.bisect_left(ends, stamp.end())][0]) for stamp in STAMP.finditer(text)]


# ------------------------------------------------------------------------------------------------------------- words


def report(found: dict) -> None:
    print(f"\n{time.strftime('%Y-%m-%d')}, {cpu()}, {os.cpu_count()} cores, load generator and upstream on the same\n")
    names = [name for name in found["sides"] if name != Direct.name]
    known = {Direct.name, "nginx", "neurond", "neurond, a hit"}
    peers = [name for name in names if name not in known]
    middle = lambda name, count, key: statistics.median(figures[key] for figures in found["sides"][name][count])
    others = {"neurond / nginx": ["nginx"] if "nginx" in names else [], "neurond / best peer": peers} if "neurond" in names else {}
    others = {title: group for title, group in others.items() if group}
    head = ["connections", "figure", *names, *others]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for count in found["sides"][names[0]] if names else ():
        for row, keys in ROWS.items():
            cells = [" / ".join(f"{middle(name, count, key):.0f}" for key in keys) for name in names]
            best = max if row == "requests/s" else min
            ratio = lambda group, key: middle("neurond", count, key) / best(middle(name, count, key) for name in group)
            cells += [" / ".join(f"{ratio(group, key):.2f}" for key in keys) for group in others.values()]
            print(f"| {count if row == 'requests/s' else ''} | {row} | " + " | ".join(cells) + " |")
    if found["streams"]:
        print("\nstreams at once, in brackets what is more than from the upstream itself:\n")
        all_runs = {name: next(iter(by_count.values())) for name, by_count in found["streams"].items()}
        tables = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in all_runs.items()}
        floor = tables.get(Direct.name)
        print("| figure | " + " | ".join(tables) + " |\n| --- |" + " --- |" * len(tables))
        for key in next(iter(tables.values())):
            added = lambda name: f" ({tables[name][key] - floor[key]:+.2f})" if floor and name != Direct.name and key.endswith("ms") else ""
            print(f"| {key} | " + " | ".join(f"{tables[name][key]:.2f}{added(name)}" for name in tables) + " |")
    if "memory" in found:
        print("\n" + ", ".join(f"{key}: {value:.1f}" for key, value in found["memory"].items()))


def nginx(config: Path, port: int, workers: int, location: str, more: str = "") -> list:
    """Writes a configuration, and says how it is run."""
    folder = config.parent
    places = " ".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config.write_text(f"""
daemon off; master_process on; worker_processes {workers}; pid {config}.pid; error_log {config}.err;
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000000; {places}
  {more}
  server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }}
}}
""")
    return ["nginx", "-c", str(config), "-p", str(folder)]


def microseconds(text: str) -> float:
    number, unit = re.match(r"([\d.]+)(\w+)", text).groups()
    return float(number) * {"us": 1, "ms": 1e3, "s": 1e6, "m": 6e7}[unit]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else "unknown CPU"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


note_once = functools.cache(note)


if __name__ == "__main__":
    sys.exit(main())
