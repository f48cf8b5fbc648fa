"""Writes traces for the simulator: S-LoRA's workloads, Zipf traffic, bursts, a hot set that drifts.

python scripts/make_trace.py zipf --adapters 2000 --requests 20000 --rate 20 -o trace.jsonl
python scripts/make_trace.py slora --adapters 200 --rate 2 --requests 600 --cv 4 -o trace.jsonl
python scripts/make_trace.py slora-code --alpha 0.3 --adapters 200 --rate 2 --requests 600 -o trace.jsonl

slora       as in the paper: each adapter has its own Gamma arrivals, with rates by a power law i^-alpha
slora-code  what its released code draws: one Gamma process, adapter floor(n u^(1/alpha)); alpha 1 is uniform there
zipf        Poisson arrivals; adapter i has weight i^-alpha
bursts      zipf; in the first --burst-share of each --period requests arrive --factor times as fast as in the rest
drift       zipf; in each --period the ranks shift by --step adapters
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scheduler.simulate.trace import write
from scheduler.simulate.workload import KINDS, Workload


def _range(text: str) -> tuple[int, int]:
    """Parses `128` or `8:511`."""
    low, _, high = text.partition(":")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one trace and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("-o", "--out", type=Path, required=True, help="the file to write, .jsonl")
    add("--adapters", type=int, default=200, help="number of adapters (200)")
    add("--requests", type=int, default=1000, help="number of requests, for slora on average (1000)")
    add("--rate", type=float, default=10.0, help="requests a second (10)")
    add("--alpha", type=float, default=1.0, help="skew (1.0)")
    add("--cv", type=float, default=1.0, help="coefficient of variation of the gaps between arrivals (1)")
    add("--prompt", type=_range, default=(8, 511), metavar="LOW:HIGH", help="prompt tokens, uniform (8:511)")
    add("--output", type=_range, default=(8, 511), metavar="LOW:HIGH", help="answer tokens, uniform (8:511)")
    add("--base-share", type=float, default=0.0, help="share of requests without an adapter (0)")
    add("--tenants", type=int, default=0, help="number of tenants; each adapter belongs to one (none)")
    add("--groups", type=int, default=0, help="shared prompt prefixes of each adapter (none)")
    add("--prefix", type=int, default=0, help="tokens in such a prefix (0)")
    add("--period", type=float, default=60.0, help="of bursts and drift, seconds (60)")
    add("--factor", type=float, default=5.0, help="how much faster a burst is (5)")
    add("--burst-share", type=float, default=0.2, help="of a period, 0 to 1 (0.2)")
    add("--step", type=int, default=10, help="adapters by which drift shifts the ranks (10)")
    add("--seed", type=int, default=0, help="(0)")
    fields = vars(parser.parse_args(argv))
    out = fields.pop("out")
    requests = Workload(**fields).generate()
    write(out, requests)
    busy = Counter(request.adapter for request in requests)
    top = ", ".join(f"{name} {count / len(requests):.1%}" for name, count in busy.most_common(3))
    print(f"{out}: {len(requests)} requests in {requests[-1].at:.0f} s, {len(busy)} adapters; busiest {top}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
