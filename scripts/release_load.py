#!/usr/bin/env python3
"""The load that scripts/release.sh learns from: calls through the gateway of a daemon, passed on, translated, answered from its cache, and
streams, on 1, 16 and 128 connections. The upstream is a few lines of Python on the same machine; nothing else is called.

    scripts/release_load.py --neurond target/release/neurond

Standard library only. Every process is ended by its id, the daemon by a signal that lets it close: what it counted is written then.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from pathlib import Path

from gateway_bench import BODY, LIMIT, MODEL, ROOT, Neurond, Stamped, hear, note, streams, whole

COMPAT = "/v1/acme/bench/compat/chat/completions"
# Connections, and calls on each of them.
LOADS = ((1, 2000), (16, 500), (128, 60))
STREAMS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target/release/neurond")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Stamped() as upstream:
        for ttl in (None, 3600):
            with Neurond(args, Path(scratch), upstream, ttl, more=LIMIT) as side:
                hear(side)
                for path, body in ((side.path, BODY), (COMPAT, BODY.replace(MODEL, f"openai/{MODEL}"))):
                    for connections, calls in LOADS:
                        call(side, path, body, connections, calls)
                if not ttl:
                    streams(side, STREAMS)
            note(f"{'from the cache' if ttl else 'passed on'}: done")
    return 0


def call(side: Neurond, path: str, body: str, connections: int, calls: int) -> None:
    """So many calls on each connection, one at a time."""
    headers = {"host": "release", "content-type": "application/json", "content-length": str(len(body)), **side.headers}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"{head}\r\n{body}".encode()
    open_ones = [socket.create_connection(("127.0.0.1", side.port), timeout=30) for _ in range(connections)]
    for _ in range(calls):
        for connection in open_ones:
            connection.sendall(request)
        for connection in open_ones:
            answer = b""
            while not whole(answer):
                piece = connection.recv(65536)
                if not piece:
                    sys.exit(f"the daemon closed a connection after {answer[:300]!r}")
                answer += piece
            if not answer.startswith(b"HTTP/1.1 200"):
                sys.exit(f"the daemon answered {answer[:500]!r}")
    for connection in open_ones:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
