"""Who gives way: pure choices, of a row when KV pages run out, of a lane when somebody waited too long for one.

Knows nothing of how a request is taken back, or of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.requests.request import Request
from scheduler.types import LaneKey

Cost = Callable[[Request], float]
"""What it takes to bring a request back, in tokens to compute again."""


def recompute(request: Request) -> float:
    """All that was computed for it: the prefix tree may keep some of it, but it is short of pages now."""
    return request.computed


def choose_victim(candidates: Sequence[Request], first: Request, cost: Cost = recompute) -> Request:
    """The lowest priority, then the cheapest to bring back, then the latest.

    The `first` in order is never chosen while another is there, so it always gets on, and everything ends.
    """
    others = [request for request in candidates if request is not first] or candidates
    return max(others, key=lambda request: (request.priority, -cost(request), request.order))


@dataclass(slots=True)
class HeldLane:
    """A lane that may be taken from its rows. `held`: for how many seconds it has been theirs."""

    key: LaneKey
    held: float
    rows: list[Request] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        """Whether each of its rows has sampled since it got its row: taken then, it got on."""
        return all(request.decoding for request in self.rows)

    @property
    def remaining(self) -> int:
        """How many tokens its longest row may still generate."""
        return max(request.limit - len(request.tokens) for request in self.rows)


def by_end(lanes: Iterable[HeldLane]) -> list[HeldLane]:
    """By when they are free if nobody joins."""
    return sorted(lanes, key=lambda lane: (lane.remaining, lane.key))


def by_loss(
    lanes: Iterable[HeldLane], first: Request | None, fair: float = 0.0, cost: Cost = recompute
) -> list[HeldLane]:
    """Which lane is taken from its rows, the best first: the one that is cheapest to bring back.

    Those that were not held for `fair` seconds come after those that were, the lane of the `first` in order is last.
    """
    return sorted(
        lanes,
        key=lambda lane: (first in lane.rows, lane.held < fair, sum(map(cost, lane.rows)), -lane.held, lane.key),
    )
