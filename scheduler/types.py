"""Types shared by all tables of the scheduler: lane keys, sort keys of requests, and the nodes of the radix tree."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

LaneKey = tuple[tuple[int, float], ...]
"""The adapters of a lane, as (copy id, scale) pairs sorted by id. () is the base model, which takes no lane."""

Order = tuple[float, ...]
"""A request's sort key in the queue and among the rows: the smallest goes first, and no two requests have equal orders.

(-is_suspect, priority, the schedule policy's fields ...): the first field puts a suspect before every other request,
see batching.isolation; for the other fields see requests.policy.
"""

BASE: LaneKey = ()


def lane_key(lora: Iterable[tuple[int, float]]) -> LaneKey:
    """Returns the lane key of (copy id, scale) pairs. The scales of a copy that is named twice are added."""
    scales: dict[int, float] = {}
    for copy_id, scale in lora:
        scales[copy_id] = scales.get(copy_id, 0.0) + scale
    return tuple(sorted(scales.items()))


Owner = tuple[tuple[str, float], ...]
"""The adapters with which a KV page was computed, as sorted (revision, scale) pairs. () is the base model."""

BASE_OWNER: Owner = ()


@dataclass(slots=True, eq=False)
class Namespace:
    """The KV pages of one owner and cache salt.

    The pages of most owners are below their own root node. An activated LoRA (aLoRA) has no root: its pages are below
    pages of the base model, from the page in which its invocation begins.
    """

    owner: Owner
    cache_salt: str
    dropped: bool = False  # its revision was unloaded: no lookup finds its pages, and each is freed by its last holder
    number: int = 0  # aLoRA only: distinguishes this namespace from every other one, dropped ones included
    holders: int = 0  # aLoRA only: how many running requests may insert pages here
    first_pages: dict[Node, None] = field(default_factory=dict)  # aLoRA only: nodes whose parent is the base model's

    def first_key(self, tokens: bytes, offset: int) -> bytes:
        """Returns the tree key of the page of `tokens` in which an aLoRA's invocation begins, at offset `offset`.

        This key is longer than the keys of other pages, so that it equals none of them.
        """
        return tokens + array("Q", (self.number, offset)).tobytes()


@dataclass(slots=True, eq=False)
class Node:
    """One full KV page in the radix tree. A root has page 0 and depth 0; page 0 is never allocated."""

    namespace: Namespace
    parent: Node | None
    key: bytes = b""
    page: int = 0
    depth: int = 0  # how many pages there are on the path from the root to this one
    step: int = 0  # the id of the step that writes the page; 0: an earlier step than the one being planned
    children: dict[bytes, Node] = field(default_factory=dict)
    holds: int = 0  # requests that hold this node, and children that are held
    alive: bool = True  # False once it has left the tree

    def path(self) -> list[Node]:
        """Returns the nodes from the root, which is left out, down to this one."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes
