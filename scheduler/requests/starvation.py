"""Since when requests are passed by younger ones. Knows nothing of lanes, pages or why they are passed.

    order       1  2  3  4  5  6  7  8  9 ...
    admitted    x     x        x                  2, 4 and 5 were passed when 6 went; 7 was not
                               ^ the frontier

Whoever could not go though there was room for him (the frontier is put past him) was passed as well, by nobody. Only
the times at which the frontier moved are kept: thousands may wait, and what is asked is about a few of them.
"""

from __future__ import annotations

from bisect import bisect_right

from scheduler.types import Order

LONGEST = 4096  # moves that are kept; beyond them neighbours are merged, and the later one's time is forgotten


class StarvationTracker:
    """The frontier, and when it got where."""

    def __init__(self) -> None:
        self._orders: list[Order] = []
        self._times: list[float] = []

    def passed(self, order: Order, now: float) -> None:
        """Everyone before `order` who still waits was passed, now at the latest."""
        if self._orders and order <= self._orders[-1]:
            return
        if self._times and self._times[-1] == now:
            self._orders[-1] = order
            return
        if len(self._orders) == LONGEST:
            del self._orders[::2], self._times[1::2]  # a move counts from its earlier neighbour's time: never too late
        self._orders.append(order)
        self._times.append(now)

    @property
    def frontier(self) -> Order | None:
        """Everyone before it was passed."""
        return self._orders[-1] if self._orders else None

    def since(self, order: Order) -> float | None:
        """When the one at `order` was passed for the first time; None if nobody did."""
        index = bisect_right(self._orders, order)
        return self._times[index] if index < len(self._times) else None

    def settle(self, first: Order | None) -> None:
        """Nobody before `first` waits any more: what is known of them can go. None: nobody waits."""
        gone = len(self._orders) if first is None else bisect_right(self._orders, first)
        if gone:
            del self._orders[:gone], self._times[:gone]
