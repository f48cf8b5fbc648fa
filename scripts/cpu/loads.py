"""What is asked of a server: the base, one adapter or several, and the bytes that a step must read for it.

Sends nothing and starts nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.shapes import Shape, make_adapter
from bench.workload import Ask, Lengths, Plan

PROMPT, OUTPUT = 128, 64  # tokens
TOKEN_IDS = (300, 31999)
MAX_RANK = 64
RANKS = {f"mixed{number}": (8, 16, 64)[number % 3] for number in range(8)} | {
    f"r16-{number}": 16 for number in range(32)
}


@dataclass(frozen=True)
class Load:
    """A name in tables, and the adapters that requests name in turn."""

    title: str
    adapters: tuple[str, ...]

    def asks(self, concurrency: int, seed: int) -> list[Ask]:
        """Two requests for each client, and three for a lone one, who then meets every rank."""
        way = "round-robin" if self.adapters else "none"
        count, prompt, output = max(3, 2 * concurrency), Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT)
        return Plan(count, prompt, output, TOKEN_IDS, self.adapters, way, 1.0, None, 1.0).asks(seed)


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


def floor(shape: Shape, asks: Sequence[Ask], concurrency: int) -> float:
    """The share of the base's throughput that bytes allow: base / (base + active LoRA).

    Active are the different adapters among `concurrency` requests that follow one another, in the mean over all such.
    """
    width = min(concurrency, len(asks))
    windows = [{ask.adapter for ask in asks[at : at + width]} - {None} for at in range(len(asks) - width + 1)]
    active = statistics.fmean(sum(shape.lora_bytes(RANKS[name]) for name in names if name) for names in windows)
    return shape.weight_bytes() / (shape.weight_bytes() + active)


def adapters(shape: Shape, directory: Path) -> dict[str, Path]:
    """All adapters by name, generated where they are missing."""
    return {
        name: make_adapter(shape, directory / name, rank, seed=number)
        for number, (name, rank) in enumerate(RANKS.items())
    }
