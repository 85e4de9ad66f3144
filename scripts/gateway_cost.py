#!/usr/bin/env python3
"""What metering, log records and limits add to a call through the gateway: CPU time of the daemon a request, at saturation.

    wrk --> neurond, one of three configurations --> a static upstream        in turns, the order reversed each round

    without          no records, no limits. Keys are checked and calls are counted all the same: the ledger is never off
    records          a record of each call with both bodies, secrets taken out, on disk, and sums by minute
    and limits       the same, and three rules: requests by address, tokens by credentials, dollars by gateway and model

Each passes calls through and answers them from its cache. The table shows medians over rounds, and the median of the rounds' ratios to
the first: two measurements that follow each other have more in common than figures that are minutes apart.

    scripts/gateway_cost.py                       5 rounds, four minutes
    scripts/gateway_cost.py --rounds 9 --json FILE

Build first: `cargo build --release --bin neurond --example fake_upstream`. Needs wrk. Every process is ended by its id. Ends with 1 where
a ratio is beyond the aim.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

from gateway_bench import ROOT, Neurond, canned, hear, load, note

AIM = 1.3
CPU = "CPU a request, us"
# Lines of the process's own log are not what is measured.
QUIET = '[log]\nfilter = "info,neurond::gateway=warn"\n'
NO_RECORDS = ("collect_logs = false", QUIET + "[logs]\nkeep = false\n")
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
CONFIGURATIONS = {"without": NO_RECORDS, "records": ("", QUIET), "and limits": ("", QUIET + LIMITS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurond", type=Path, default=ROOT / "target/release/neurond")
    parser.add_argument("--upstream", type=Path, default=ROOT / "target/release/examples/fake_upstream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of one measurement")
    parser.add_argument("--connections", default="16,128")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    connections = [int(count) for count in args.connections.split(",")]
    found: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        with canned(args, Path(scratch)) as upstream:
            for number in range(args.rounds):
                names = list(CONFIGURATIONS)
                for way, ttl in (("passed through", None), ("a hit", 3600)):
                    for name in names if number % 2 == 0 else names[::-1]:
                        gateway, more = CONFIGURATIONS[name]
                        place = Path(scratch) / name.replace(" ", "-")
                        place.mkdir(exist_ok=True)
                        with Neurond(args, place, upstream, ttl, gateway, more) as side:
                            hear(side)
                            for count in connections:
                                cpu = load(side, place, count, args.seconds)[CPU]
                                note(f"round {number + 1}  {way:14} {count:4}  {name:10} {cpu:.1f} us")
                                found.setdefault(f"{way}, {count} connections", {}).setdefault(name, []).append(cpu)
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
