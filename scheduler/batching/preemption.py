"""Which row is preempted when KV pages run out, and which lane when a request waited too long for one.

Knows nothing of how a request is requeued, or of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.requests.request import Request
from scheduler.types import LaneKey

Cost = Callable[[Request], float]
"""The cost of bringing a request back, in tokens to recompute."""


def recompute_cost(request: Request) -> float:
    """All computed tokens: the radix tree may keep some of their pages, but pages are scarce when this is asked."""
    return request.computed


def choose_victim(candidates: Sequence[Request], first: Request, cost: Cost = recompute_cost) -> Request:
    """The candidate of the lowest priority; among those the cheapest to bring back, then the latest.

    `first`, the first request in order, is chosen only when it is alone: so it always advances, and all requests end.
    """
    others = [request for request in candidates if request is not first] or candidates
    return max(others, key=lambda request: (request.priority, -cost(request), request.order))


@dataclass(slots=True)
class HeldLane:
    """A lane with running rows."""

    key: LaneKey
    held: float  # seconds since it was acquired
    rows: list[Request] = field(default_factory=list)

    @property
    def all_decoding(self) -> bool:
        """Whether each of its rows has sampled a token since it was admitted."""
        return all(request.decoding for request in self.rows)

    @property
    def remaining(self) -> int:
        """How many tokens its longest row may still generate."""
        return max(request.limit - len(request.tokens) for request in self.rows)


def sorted_by_end(lanes: Iterable[HeldLane]) -> list[HeldLane]:
    """By when they are free if no request joins them."""
    return sorted(lanes, key=lambda lane: (lane.remaining, lane.key))


def sorted_by_cost(
    lanes: Iterable[HeldLane], first: Request | None, fair: float = 0.0, cost: Cost = recompute_cost
) -> list[HeldLane]:
    """The order in which lanes are preempted: those that are cheapest to bring back come first.

    Lanes held for less than `fair` seconds come after the others, and the lane of the `first` request in order last.
    """
    return sorted(
        lanes,
        key=lambda lane: (first in lane.rows, lane.held < fair, sum(map(cost, lane.rows)), -lane.held, lane.key),
    )
