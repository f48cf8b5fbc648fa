"""The loads of the CPU benchmark: the base, one adapter or several, and the bytes that a step must read for them.

Sends nothing and starts nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.shapes import Shape, make_adapter
from bench.workload import Lengths, Plan, Request

PROMPT, OUTPUT = 128, 64  # tokens of every prompt and every output
TOKEN_IDS = (300, 31999)
MAX_RANK = 64
RANKS = {f"mixed{number}": (8, 16, 64)[number % 3] for number in range(8)} | {
    f"r16-{number}": 16 for number in range(32)
}


@dataclass(frozen=True)
class Load:
    """A load: its title in tables, and the adapters that its requests use in turn."""

    title: str
    adapters: tuple[str, ...]

    def requests(self, concurrency: int, seed: int) -> list[Request]:
        """Returns two requests for each client, or three for a single client, so that it uses every rank."""
        distribution = "round-robin" if self.adapters else "none"
        count, prompt, output = max(3, 2 * concurrency), Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT)
        return Plan(count, prompt, output, TOKEN_IDS, self.adapters, distribution, 1.0, None, 1.0).requests(seed)


MIXED = tuple(name for name in RANKS if name.startswith("mixed"))
SIXTEEN = tuple(name for name in RANKS if name.startswith("r16"))
LOADS = {
    "base": Load("base", ()),
    "one": Load("one of rank 16", SIXTEEN[:1]),
    "mixed": Load("eight of 8/16/64", MIXED),
    "sixteen": Load("eight of rank 16", SIXTEEN[:8]),
    "many": Load("32 of rank 16", SIXTEEN),
}
TITLES = {name: load.title for name, load in LOADS.items()}


def floor(shape: Shape, requests: Sequence[Request], concurrency: int) -> float:
    """Returns the share of the base's throughput that the bytes allow: base / (base + active LoRA).

    Active adapters are those of `concurrency` consecutive requests, averaged over all such windows.
    """
    width = min(concurrency, len(requests))
    windows = [
        {request.adapter for request in requests[at : at + width]} - {None} for at in range(len(requests) - width + 1)
    ]
    active = statistics.fmean(sum(shape.lora_bytes(RANKS[name]) for name in names if name) for names in windows)
    return shape.weight_bytes() / (shape.weight_bytes() + active)


def adapters(shape: Shape, directory: Path) -> dict[str, Path]:
    """Returns all adapters by name; generates missing ones."""
    return {
        name: make_adapter(shape, directory / name, rank, seed=number)
        for number, (name, rank) in enumerate(RANKS.items())
    }
