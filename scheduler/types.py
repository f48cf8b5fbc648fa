"""Types shared by all tables of the scheduler: lane keys, sort keys of requests, and the nodes of the radix tree."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

LaneKey = tuple[tuple[int, float], ...]
"""The adapters of a lane: (copy id, scale) pairs sorted by id; () is the base model, which takes no lane."""

Order = tuple[float, ...]
"""A request's sort key in the queue and among the rows: smaller goes first, and no two requests share one.

(-is_suspect, priority, the schedule policy's fields ...): see requests.policy for the rest, and batching.isolation for
the first field, which puts a suspect before every other request.
"""

BASE: LaneKey = ()


def lane_key(lora: Iterable[tuple[int, float]]) -> LaneKey:
    """The lane of an adapter selection. The scales of an adapter that is named twice are added."""
    scales: dict[int, float] = {}
    for copy_id, scale in lora:
        scales[copy_id] = scales.get(copy_id, 0.0) + scale
    return tuple(sorted(scales.items()))


Owner = tuple[tuple[str, float], ...]
"""The model that computed a KV page: (revision, scale) pairs, sorted; () is the base model."""

BASE_OWNER: Owner = ()


@dataclass(slots=True, eq=False)
class Namespace:
    """The KV pages of one owner and cache salt.

    The pages of most owners hang below a root node of their own. An activated LoRA (aLoRA) has no root: its pages hang
    below pages of the base model, from the page in which its invocation begins.
    """

    owner: Owner
    cache_salt: str
    dropped: bool = False  # its revision was unloaded: no lookup finds it, and a page is freed with its last holder
    number: int = 0  # of an aLoRA: distinguishes it from every other namespace, also from dropped ones
    holders: int = 0  # of an aLoRA: running requests that may insert pages here
    first_pages: dict[Node, None] = field(default_factory=dict)  # of an aLoRA: its nodes whose parent is the base's

    def first_key(self, tokens: bytes, offset: int) -> bytes:
        """The key of the page in which an aLoRA's invocation begins, `offset` tokens in; longer than any other key."""
        return tokens + array("Q", (self.number, offset)).tobytes()


@dataclass(slots=True, eq=False)
class Node:
    """One full KV page in the radix tree. A root has page 0 and depth 0; page 0 is never allocated."""

    namespace: Namespace
    parent: Node | None
    key: bytes = b""
    page: int = 0
    depth: int = 0  # pages from the root down to this one
    step: int = 0  # the step that writes it; 0: an earlier one
    children: dict[bytes, Node] = field(default_factory=dict)
    holds: int = 0  # requests that hold this node, and children that are held
    alive: bool = True  # False once it has left the tree

    def path(self) -> list[Node]:
        """The nodes with pages from the root down to this one."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes
