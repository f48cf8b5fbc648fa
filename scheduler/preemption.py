"""Who gives way: pure choices, of a row when KV pages run out, of a lane when somebody waited too long for one.

Knows nothing of how a request is taken back, or of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.request import LaneKey, Request

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
    draining: bool
    rows: list[Request] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        """Whether each of its rows has sampled since it got its row: taken then, it got on."""
        return all(request.decoding for request in self.rows)

    @property
    def remaining(self) -> int:
        """How many tokens its longest row may still generate."""
        return max(request.limit - len(request.tokens) for request in self.rows)


def by_drain(lanes: Iterable[HeldLane]) -> list[HeldLane]:
    """Which lane is to take nobody any more, the best first: one that does so already, then the one that is free first.

    Nobody who runs loses anything by it, so what counts is only how soon it helps. A lane that everybody joins
    all the time is as good as another: its rows are as short.
    """
    return sorted(lanes, key=lambda lane: (not lane.draining, lane.remaining, len(lane.rows), lane.key))


def by_loss(lanes: Iterable[HeldLane], first: Request | None, cost: Cost = recompute) -> list[HeldLane]:
    """Which lane is taken from its rows, the best first: the one that is cheapest to bring back.

    That is often a draining one, as it has few rows left. The lane of the `first` in order is the last.
    """
    return sorted(
        lanes,
        key=lambda lane: (first in lane.rows, sum(map(cost, lane.rows)), not lane.draining, -lane.held, lane.key),
    )
