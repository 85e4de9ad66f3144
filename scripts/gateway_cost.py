#!/usr/bin/env python3
"""What metering, log records and limits add to a call through the gateway: CPU time of the daemon a request, at saturation.

    wrk --> neurond, three of them, one at a time --> a static upstream        in turns of a second, the order reversed each round

    without          no records, no limits. Keys are checked and calls are counted all the same: the ledger is never off
    records          a record of each call with both bodies, secrets taken out, on disk, and sums by minute
    and limits       the same, and three rules: requests by address, tokens by credentials, dollars by gateway and model

Each passes calls through and answers them from its cache. The table shows medians over rounds, and the median of the rounds' ratios to
the first: the three run side by side and those without load wait, so that two measurements that are compared are a second apart. A machine
that is shared changes its speed within a minute by more than what is looked for.

    scripts/gateway_cost.py                       15 rounds, seven minutes
    scripts/gateway_cost.py --rounds 40 --json FILE

Build first: `cargo build --release --bin neurond --example fake_upstream`. Needs wrk. Every process is ended by its id. Ends with 1 where
a ratio is beyond the aim.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from gateway_bench import ROOT, Neurond, canned, hear, load, note

AIM = 1.3
CPU = "CPU a request, us"
NO_RECORDS = ("collect_logs = false", "[logs]\nkeep = false\n")
LIMITS = """
[[limit]]
name = "address"
by = ["ip"]
requests = 100_000_000
window_s = 60
[[limit]]
name = "credentials"
by = ["authorization"]
tokens = 1_000_000_000_000
window_s = 3600
[[limit]]
name = "spending"
by = ["gateway", "model"]
usd = 1_000_000
window_s = 86400
"""
CONFIGURATIONS = {"without": NO_RECORDS, "records": ("", ""), "and limits": ("", LIMITS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target/release/neurond")
    parser.add_argument("--upstream", type=Path, default=ROOT / "target/release/examples/fake_upstream")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=1, help="of one measurement")
    parser.add_argument("--connections", default="16,128")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    connections = [int(count) for count in args.connections.split(",")]
    found: dict = {}
    with tempfile.TemporaryDirectory() as scratch, canned(args, Path(scratch)) as upstream:
        for way, ttl in (("passed through", None), ("a hit", 3600)):
            with ExitStack() as running:
                sides = {}
                for name, (gateway, more) in CONFIGURATIONS.items():
                    place = Path(scratch) / f"{name}{ttl or ''}".replace(" ", "-")
                    place.mkdir()
                    sides[name] = (running.enter_context(Neurond(args, place, upstream, ttl, gateway, more)), place)
                    hear(sides[name][0])
                for number in range(args.rounds + 1):
                    for count in connections:
                        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
                        cpu = {name: load(*sides[name], count, args.seconds)[CPU] for name in names}
                        # The first round warms them.
                        if number > 0:
                            note(f"round {number:2}  {way:14} {count:4}  " + "  ".join(f"{name} {cpu[name]:.1f} us" for name in sides))
                            for name in sides:
                                found.setdefault(f"{way}, {count} connections", {}).setdefault(name, []).append(cpu[name])
    is_met = report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if is_met else 1


def report(found: dict) -> bool:
    """Prints the table, and whether all is within the aim."""
    first, *others = CONFIGURATIONS
    print(f"| CPU a request, us | {first} | {' | '.join(others)} |")
    print("| --- |" + " --- |" * len(CONFIGURATIONS))
    worst = 0.0
    for what, sides in found.items():
        cells = [f"{median(sides[first]):.1f}"]
        for name in others:
            ratio = median(cpu / base for cpu, base in zip(sides[name], sides[first]))
            worst = max(worst, ratio)
            cells.append(f"{median(sides[name]):.1f} ({ratio:.2f}x)")
        print(f"| {what} | {' | '.join(cells)} |")
    print(f"aim: {AIM}x; worst: {worst:.2f}x")
    return worst <= AIM


if __name__ == "__main__":
    sys.exit(main())
