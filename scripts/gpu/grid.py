"""The grid of the kernel benchmark: its points, the sites of an 8B model, and the least bytes that must be read.

Contains numbers only, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (1, 8, 32, 128, 512, 4096)
LANES = (1, 8, 32)
RANKS = ("8", "16", "64", "mixed")
MIXED = (8, 16, 32, 64)
DECODES = 128  # the most tokens of a decode point (one token per request); larger points have one request per lane


@dataclass(frozen=True)
class SiteShape:
    """A linear of the model: its input size, and the output sizes of its fused slices."""

    name: str
    inputs: int
    slices: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """The output size of all slices."""
        return sum(self.slices)

    def lora_bytes(self, ranks: tuple[int, ...], itemsize: int = 2) -> int:
        """Bytes of the adapters' A and B at this site."""
        return sum(ranks) * (len(self.slices) * self.inputs + self.outputs) * itemsize


SITES = (
    SiteShape("qkv", 4096, (4096, 1024, 1024)),
    SiteShape("o", 4096, (4096,)),
    SiteShape("gate_up", 4096, (14336, 14336)),
    SiteShape("down", 14336, (4096,)),
)


@dataclass(frozen=True)
class Point:
    """One point: `tokens` spread evenly over `lanes` adapters of rank `rank`."""

    tokens: int
    lanes: int
    rank: str

    @property
    def key(self) -> str:
        """The point's name in the results."""
        return f"t{self.tokens}-l{self.lanes}-r{self.rank}"

    @property
    def decodes(self) -> bool:
        """Whether each token belongs to a different request."""
        return self.tokens <= DECODES

    @property
    def ranks(self) -> tuple[int, ...]:
        """The true rank of every adapter."""
        return tuple(MIXED[lane % len(MIXED)] if self.rank == "mixed" else int(self.rank) for lane in range(self.lanes))

    @property
    def lane_of_token(self) -> list[int]:
        """The adapter of each token, from 0: alternating for decodes, in runs for prefills."""
        if self.decodes:
            return [token % self.lanes for token in range(self.tokens)]
        return [token * self.lanes // self.tokens for token in range(self.tokens)]


def points() -> list[Point]:
    """Returns the grid: 60 points, the small and quick ones first."""
    return [Point(tokens, lanes, rank) for tokens in TOKENS for lanes in LANES for rank in RANKS if lanes <= tokens]


def floor_us(site: SiteShape, point: Point, bytes_per_us: float) -> float:
    """Returns the least time in microseconds to read the point's adapters at this site."""
    return site.lora_bytes(point.ranks) / bytes_per_us
