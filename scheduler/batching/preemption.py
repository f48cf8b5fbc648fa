"""Chooses which row is preempted when KV pages run out, and which lane when a request waited too long for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.requests.request import Request
from scheduler.types import LaneKey

Cost = Callable[[Request], float]
"""Returns the cost of resuming a preempted request, in tokens to recompute."""


def recompute_cost(request: Request) -> float:
    """Returns the number of computed tokens, as if all were lost.

    The radix tree may keep some of their pages, but pages are scarce when a row is preempted.
    """
    return request.computed


def choose_victim(candidates: Sequence[Request], first: Request, cost: Cost = recompute_cost) -> Request:
    """Returns the candidate of the lowest priority; among those the cheapest to resume, then the last in order.

    `first`, the first request in order, is chosen only if there is no other candidate: so the first request always
    advances, and all requests end.
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
        """Whether each row of the lane has been planned up to its first sample since it was admitted."""
        return all(request.decoding for request in self.rows)

    @property
    def remaining(self) -> int:
        """The most tokens that a row of the lane may still generate."""
        return max(request.limit - len(request.tokens) for request in self.rows)


def sorted_by_end(lanes: Iterable[HeldLane]) -> list[HeldLane]:
    """Returns the lanes sorted by when they become free if no request joins them."""
    return sorted(lanes, key=lambda lane: (lane.remaining, lane.key))


def sorted_by_cost(
    lanes: Iterable[HeldLane], first: Request | None, fair: float = 0.0, cost: Cost = recompute_cost
) -> list[HeldLane]:
    """Returns the lanes in the order in which to preempt them: first the lanes whose rows are cheapest to resume.

    Lanes that were held for less than `fair` seconds come after the others, and the lane of the `first` request comes
    last.
    """
    return sorted(
        lanes,
        key=lambda lane: (first in lane.rows, lane.held < fair, sum(map(cost, lane.rows)), -lane.held, lane.key),
    )
