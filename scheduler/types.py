"""Types that all tables of the scheduler share: lane keys, places in the queue, and the nodes of the radix tree."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

LaneKey = tuple[tuple[int, float], ...]
"""What a lane is for: (copy id, scale) pairs sorted by id; () is the base model, which takes no lane."""

Order = tuple[float, ...]
"""A place in the queue: smaller goes first; no two requests share one. See requests/policy."""

BASE: LaneKey = ()


def lane_key(lora: Iterable[tuple[int, float]]) -> LaneKey:
    """The lane of a selection. What is named twice counts with the sum of its scales."""
    scales: dict[int, float] = {}
    for copy_id, scale in lora:
        scales[copy_id] = scales.get(copy_id, 0.0) + scale
    return tuple(sorted(scales.items()))


Owner = tuple[tuple[str, float], ...]
"""(revision, scale) pairs, sorted; () is the base model."""

BASE_OWNER: Owner = ()


@dataclass(slots=True, eq=False)
class Stem:
    """Where the pages of one owner and tenant begin. `dropped`: nobody finds it, and what is released there goes.

    Of an activated adapter: `branches` are its first pages, each below one of the base's, and `holders` counts who may
    add one. `number` tells it from any other.
    """

    owner: Owner
    cache_salt: str
    dropped: bool = False
    number: int = 0
    holders: int = 0
    branches: dict[Node, None] = field(default_factory=dict)

    def key(self, tokens: bytes, offset: int) -> bytes:
        """What the page is found by in which it begins to act, at its token number `offset`; longer than any other."""
        return tokens + array("Q", (self.number, offset)).tobytes()


@dataclass(slots=True, eq=False)
class Node:
    """One page, the `depth`-th of its path (the top of a stem has none: page 0, depth 0).

    `step` is the one that writes it, 0 if that was before. `holds` counts its holders and its held children.
    """

    stem: Stem
    parent: Node | None
    key: bytes = b""
    page: int = 0
    depth: int = 0
    step: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)
    holds: int = 0
    alive: bool = True

    def path(self) -> list[Node]:
        """Its pages' nodes from the top down, itself the last."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes
